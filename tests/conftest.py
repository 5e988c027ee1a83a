"""Makes the flat files importable from anywhere, and skips tests marked `cuda` without a GPU. Where pytest-xdist is
installed (tests/requirements.txt) every core runs tests; `-n 0` runs them one after another."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the tests' matrices are too small to share, least of all by two processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not on this disk is missing at once, not after retries

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # takes any free port
TRAIN = str(ROOT / "train.py")


def torchrun(*words: str) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=2 WORDS`, a thread each."""
    return subprocess.run(
        [*TORCHRUN, *words], capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def call(main: Callable[[], None], *words: str) -> subprocess.CompletedProcess:
    """A command of the project, such as `call(cost.main, "plan")`, in this process, which has torch already."""
    from tokenizer import run

    out, errors, status, before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [f"{sys.modules[main.__module__].__name__}.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            run(main)
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(list(words), status, out.getvalue(), errors.getvalue())


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    here = "PYTEST_XDIST_WORKER" not in os.environ  # workers come through here too, and must start no workers
    if here and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = os.cpu_count()


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
