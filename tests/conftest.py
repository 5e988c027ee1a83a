"""Makes the flat files importable from anywhere, and skips tests marked `cuda` where there is no GPU."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' matrices are too small to share, least of all by two processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not on this disk is missing at once, not after retries

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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
