"""What a run of weeks meets: kills, signals, full disks, NaN, spikes, and another number of processes."""

import functools
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import train
from checkpoint import Log, Saver, from_pretrained, find_checkpoint
from conftest import ROOT, call, torchrun
from model import GPT, ModelConfig, watch_attention
from schedule import Guard
from test_train import (TINY, assert_same_state, corpus, cut, hasten, here, log_of, losses,  # noqa: F401
                        one_update, prepared, pretrain, quick, recipe, resume)
from tokenizer import UserError


# ---- two processes --------------------------------------------------------------------------------------------

SHORT = ["--data", "data/short", "--tokens", "1536", "--save-every", "3", "--clip", "0.1", "--micro-batch", "2"]
EXPERTS = ["--num-experts", "4", "--tokens", "768"]
HALF = [*EXPERTS, "--dtype", "bfloat16", "--position", "relative", "--norm-zero-centered", "true", "--tokens", "256"]

TWO = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pytest, torch, train
from dataclasses import replace
from model import RMSNorm, Router
from pathlib import Path
from test_faults import EXPERTS, HALF, SHORT, hasten, recipe
from torch.nn import Embedding
from torch.nn.modules.module import register_module_forward_hook
from tokenizer import run

hasten(pytest.MonkeyPatch())


def work(world):
    def pretrain(name, *flags):
        train.pretrain(recipe(*flags), Path("runs") / name, world=world)

    def watched(name, do, *flags):  # does something before the update of step 5 in process 1
        def losses_of(run, step):
            losses = train.pretraining_losses(run, step)
            return do(losses) if world.rank == 1 and step == 4 else losses
        train.train(train.connect(train.set_up(recipe(*flags), Path("runs") / name, world)), losses_of)

    for packing in ("concat", "best-fit"):
        pretrain("ddp-" + packing, *SHORT, "--packing", packing)
    pretrain("fsdp", *SHORT, "--parallel", "fsdp")
    again = Path("runs/one-cut")
    train.pretrain(replace(train.read_recipe(again)[0], parallel="fsdp", micro_batch=2), again, True, world)
    pretrain("started", *SHORT, "--start", "runs/one")
    pretrain("experts", *EXPERTS, "--parallel", "fsdp")
    seen = set()

    def note(part, *_):
        if isinstance(part, (Router, RMSNorm, Embedding)) and part.weight.shape in ((4, 32), (32,), (32, 2)):
            seen.add((*part.weight.shape, str(part.weight.dtype)))

    register_module_forward_hook(note)
    pretrain("bfloat16", *HALF, "--parallel", "fsdp")
    print("exact", sorted(seen, key=str))
    try:
        watched("nan", lambda losses: [lambda: [x * float("nan") for x in losses[0]()], *losses[1:]], *SHORT)
    except train.Diverged as error:
        print("diverged", error)
    watched("stopped", lambda losses: (os.kill(os.getpid(), signal.SIGTERM), losses)[1], *SHORT)


run(lambda: train.command_line(work))
"""


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):  # noqa: F811
    """A folder of runs by one process and by two, and what the two said."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(corpus / "data", folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        patch.chdir(folder)
        for packing in ("concat", "best-fit"):
            pretrain(packing, *SHORT, "--packing", packing, "--micro-batch", "8")
        shutil.copytree("runs/concat", "runs/one")
        cut(Path("runs/one"), "one-cut", 3)
        pretrain("one-started", *SHORT, "--start", "runs/one")
        pretrain("one-experts", *EXPERTS)
        pretrain("one-bfloat16", *HALF)
        Path("two.py").write_text(TWO)
        done = torchrun("two.py")
    return folder / "runs", done


def assert_same_run(a: Path, b: Path) -> None:
    """Losses and weights within 1e-5."""
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    x, y = (from_pretrained(folder).state_dict() for folder in (a, b))
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddp-concat", "ddp-best-fit", "fsdp"])
def test_two_processes_equal_one(two, name):
    """The same global batch, with padding and without, sharded and not, clipped at every step."""
    runs, _ = two
    one = runs / name.removeprefix("ddp-") if "ddp" in name else runs / "one"
    assert min(entry["grad_norm"] for entry in log_of(one) if "grad_norm" in entry) > 0.1
    assert_same_run(runs / name, one)
    for entry, other in zip(log_of(runs / name), log_of(one)):
        assert entry.get("val", {}) == pytest.approx(other.get("val", {}), abs=1e-5)


def test_each_number_of_processes_resumes_the_others_run(two, monkeypatch):
    runs, done = two
    assert_same_run(runs / "one-cut", runs / "one")  # continued by two with FSDP
    assert "one-cut, step 3 of 6" in done.stdout
    copy = cut(runs / "fsdp", "fsdp-cut", 3)
    monkeypatch.chdir(runs.parent)
    resume(copy, parallel="ddp")
    assert_same_run(copy, runs / "one")
    assert train.read_recipe(runs / "ddp-concat")[0].parallel == "auto"  # decided again where the run resumes


def test_a_start_from_another_run_is_the_same_on_two_processes(two):
    """--start takes weights and moments along, in every process."""
    runs, _ = two
    assert_same_run(runs / "started", runs / "one-started")
    assert losses(runs / "started")[0] < losses(runs / "one")[0]


def test_experts_on_two_sharding_processes(two):
    """The load-balancing loss is counted over both; where the rest is bfloat16, routers, T5's biases and zero-centred
    gains stay in fp32."""
    runs, done = two
    assert_same_run(runs / "experts", runs / "one-experts")
    assert [e["expert_load"] for e in log_of(runs / "experts") if "expert_load" in e] == pytest.approx(
        [e["expert_load"] for e in log_of(runs / "one-experts") if "expert_load" in e])
    assert "exact [(32, 'torch.float32'), (32, 2, 'torch.float32'), (4, 32, 'torch.float32')]" in done.stdout
    assert losses(runs / "bfloat16") == pytest.approx(losses(runs / "one-bfloat16"), abs=0.02)


def test_nan_in_one_process_stops_both_before_the_update(two):
    """Process 1 gets NaN in its loss at step 5: nothing is saved, and the message names step and sequences."""
    runs, done = two
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("diverged")]
    assert "step 5:" in said and "process 1, micro-batch 1 (sequences 2 to 3)" in said and "--resume runs/nan" in said
    assert find_checkpoint(runs / "nan").name == "step-00000003" and len(losses(runs / "nan")) == 4


def test_a_signal_to_one_of_two_processes_saves_and_ends_both(two):
    runs, done = two
    assert "exitcode  : 75" in done.stderr
    assert done.stderr.count("python train.py --resume runs/stopped") == 1, done.stderr
    assert find_checkpoint(runs / "stopped").name == "step-00000005" and len(losses(runs / "stopped")) == 5


def test_one_process_that_dies_takes_the_other_with_it(here):
    """Process 1 raises, as from a broken disk, while process 0 waits for it in a collective: both end at once, and only
    the true reason is printed."""
    Path("broken.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist, train
get = train.Loader.get
def breaks(self, now, *following):
    if now[0] == 3 and dist.get_rank() == 1:
        raise train.UserError("the disk of process 1 is gone")
    return get(self, now, *following)
train.Loader.get = breaks
train.run_command(train.main)
""")
    begin = time.time()
    done = torchrun("broken.py", *TINY, "--tokens", "1e7")
    assert done.returncode and done.stderr.count("the disk of process 1 is gone") == 1, done.stderr
    assert "Connection closed" not in done.stderr and time.time() - begin < 60
    assert done.stdout.count("plan ") == 1


# ---- kills and disks ------------------------------------------------------------------------------------------

KILLED = """
import os, random, shutil, signal, sys, threading, time
sys.path.insert(0, {root!r})
import cost, functools, torch, torch._dynamo, train  # all that a child would import again
from pathlib import Path
from tqdm import tqdm

random.seed(1)
flags, folder = {flags!r}, Path("runs/killed")
log = folder / "log.jsonl"
cost.find_machine = lambda *_: cost.Machine("cpu", torch.float32, False, 1e11, "a CPU")  # a set-up takes no time
cost.measure_speed, train.draw_log = lambda *_, **__: 1e5, lambda _: False
cost.count_parameters = train.count_parameters = functools.cache(cost.count_parameters)
train.set_up(train.parse(flags)[1], folder)  # counts; writes nothing

def live(operations):
    # A run that dies with the given number of operations on files of its folder: open, rename, remove, mkdir.
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default one is shared by forks, and would stay locked when its holder dies
    sys.stdout = sys.stderr = open("said", "w", buffering=1)
    left = [operations]
    def watch(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and "killed" in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    begun = list((folder / "checkpoints").glob("step-????????"))
    if not begun and folder.exists():
        shutil.rmtree(folder)  # killed before the first checkpoint: the user starts again
    train.pretrain(train.read_recipe(folder)[0] if begun else train.parse(flags)[1], folder, bool(begun))
    os._exit(0)

kills, inside = 0, 0
while True:
    at_random = kills % 2
    child = os.fork()
    if not child:
        try:
            live(10**9 if at_random or kills >= 20 else random.randrange(1, 40))
        finally:
            os._exit(1)
    if at_random and kills < 20:
        lines = (log.read_text().count("\\n") if log.exists() else 0) + random.randrange(4)
        ended = 0
        while not ended and not (log.exists() and log.read_text().count("\\n") > lines):  # in its training
            time.sleep(0.002)
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        time.sleep(random.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        kills += 1
        inside += bool(list((folder / "checkpoints").glob("*.partial")))
        continue
    print(status, kills, inside)
    break
"""


def test_twenty_kills_and_the_run_ends_bit_for_bit_the_same(here):
    """SIGKILL at 20 moments of one run, half of them random, half at an operation on its files: each time it resumes
    from what is whole, and it ends with the weights, moments and losses of a run that nothing happened to."""
    flags = [*TINY, "--tokens", "28160", "--save-every", "3", "--eval-every", "50"]
    Path("killed.py").write_text(KILLED.format(root=str(ROOT), flags=flags))
    straight = pretrain("straight", *flags)
    done = subprocess.run([sys.executable, "killed.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    status, kills, inside = map(int, done.stdout.splitlines()[-1].split())
    assert status == 0 and kills == 20 and inside >= 3, done.stdout + Path("said").read_text()
    assert losses(Path("runs/killed")) == losses(straight) and len(losses(straight)) == 110
    assert_same_state(Path("runs/killed"), straight)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(here, monkeypatch):
    """A limit on the size of files breaks the writing of a checkpoint (a real short write): the run says so and
    continues, and the checkpoint before it stays."""
    save = torch.save

    def limited(tensors, path):
        most = 30_000 if "step-00000002" in str(path) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            save(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(torch, "save", limited)
    done = call(train.main, *TINY, "--tokens", "1024", "--save-every", "2", "--keep", "9")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not be written") == 1 and "Traceback" not in done.stderr
    assert sorted(p.name[-2:] for p in Path("runs/tiny/checkpoints").iterdir()) == ["00", "04"]
    assert any(entry.get("event") == "warning" for entry in log_of(Path("runs/tiny")))


def test_a_disk_that_is_full_at_the_end_ends_the_run_in_a_sentence(here, monkeypatch):
    save = torch.save

    def full(tensors, path):
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(torch, "save", full)
    done = call(train.main, *TINY, "--tokens", "512")
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    assert find_checkpoint("runs/tiny").name == "step-00000000"


def test_a_full_disk_costs_lines_of_the_log_and_not_the_run(here, capsys):
    """The disk is full from the second line on, in the middle of which it became so, and has room for the fourth."""
    log = Log(Path("."))
    log.write(step=1, loss=3.0)
    with open(log.path, "a") as file:
        file.write('{"step": 2, "lo')
    path, log.path = log.path, Path("/dev/full")
    log.write(step=2, loss=2.9)
    log.write(step=3, loss=2.8)
    log.path = path
    log.write(step=4, loss=2.7)
    log.write(step=5, loss=2.6)
    assert [entry["step"] for entry in log.entries()] == [1, 4, 5]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_the_log_forgets_steps_but_not_events(here):
    log = Log(Path("."))
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0)
        log.write(step=step, event="warning", text=f"at {step}")
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')  # a killed run
    again = Log(Path("."), resumed_at=2)
    again.write(step=3, event="warning", text="at 3")  # met before
    assert [(e["step"], "event" in e) for e in again.entries()] == [
        (1, False), (1, True), (2, False), (2, True), (3, True)]


def test_a_log_with_damaged_lines_keeps_the_others(tmp_path):
    """Bytes that are no UTF-8, other types, nesting without end: such lines are skipped."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "x": "\xe2"}\n' + b"[" * 100_000
                                         + b'\n{"step": 3, "tokens": "x"}\n{"step": 4, "loss": [1]}\n{"step": 5}\n')
    assert [entry["step"] for entry in Log(tmp_path).entries()] == [1, 5]


@pytest.mark.parametrize("damage", [{"count": "x"}, {"skipped": [[1, "x"]]}, {"skipped": [3]}, {"began": [1]},
                                    {"seen": [[1.0], [2.0, 3.0]]}, {"lowest": None}, {"rewinds": 0.5}])
def test_a_guard_refuses_a_damaged_state(damage):
    saved = Guard("warn", "cpu").state(3)
    Guard("warn", "cpu").restore(json.loads(json.dumps(saved)))
    with pytest.raises((ValueError, TypeError)):
        Guard("warn", "cpu").restore(saved | damage)


def test_a_save_after_damaged_checkpoints_stays(here):
    """Steps 6 and 8 are damaged, 2 is resumed and stopped at 4: the new checkpoint must not be the one that goes."""
    folder = pretrain("a", "--tokens", "2048", "--save-every", "2", "--keep", "2")
    run = prepared("--start", "runs/a")
    saver = Saver(folder, run.tokenizer, keep=2)
    saver.save(4, run.model, run.optimizer, run.guard.state(4), must=True)
    assert {path.name[-2:] for path in (folder / "checkpoints").iterdir()} >= {"04", "06", "08"}


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    Log(tmp_path).write(step=1, loss=1.5, noise={"a": float("nan"), "b": float("inf")})
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line == {"step": 1, "loss": 1.5, "noise": {"a": None, "b": None}}


# ---- trackers -------------------------------------------------------------------------------------------------


def test_trackers_get_the_numbers_and_no_step_twice(here, monkeypatch):
    told = []
    fake = type("wandb", (), {"init": staticmethod(lambda **k: told.append(k)),
                              "finish": staticmethod(lambda: told.append("end")),
                              "log": staticmethod(lambda numbers, step: told.append((step, numbers)))})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = pretrain("a", "--tokens", "1024", "--save-every", "2", "--log", "wandb")
    first, *rest, end = told
    assert first["name"] == first["id"] and first["id"].startswith("a-") and end == "end"
    assert any(step == 4 and "val/left" in numbers for step, numbers in rest)
    assert [step for step, numbers in rest if "loss" in numbers] == [1, 2, 3, 4]
    copy = cut(folder, "b", 2)  # killed after step 4, before its save
    told.clear()
    resume(copy)
    assert told[0]["id"] == first["id"] and told[1:] == ["end"] and len(losses(copy)) == 4
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install trackio"):
        recipe("--log", "trackio")


def test_a_tracker_that_fails_does_not_end_the_run(here, capsys):
    log = Log(Path("."))
    log.trackers = [(lambda step, numbers: 1 / 0, None)]
    log.write(step=1, loss=3.0)
    log.write(step=2, loss=3.0)
    assert len(list(log.entries())) == 2 and capsys.readouterr().err.count("division by zero") == 1


# ---- NaN and spikes -------------------------------------------------------------------------------------------


def moved(before: list, run: train.Run) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(before, run.model.parameters())]


def test_nan_leaves_weights_and_moments_as_they_are(here):
    run = prepared()
    one_update(run, 0)
    before = [p.clone() for p in run.model.parameters()]
    (loss,) = train.pretraining_losses(run, 1)
    values = one_update(run, 1, [lambda: [x * math.nan for x in loss()]])
    assert values["stopped"] and values["dropped"]
    assert one_update(run, 2)["stopped"]  # nor does any update after it
    assert not any(moved(before, run))
    assert {float(s["step"]) for s in run.optimizer.optimizers[0].state.values()} == {1.0}


def test_a_skipped_update_leaves_weights_and_moments(here):
    """--guard skip: what the guard calls a spike is not applied, and the next update is."""
    run = prepared("--guard", "skip")
    one_update(run, 0)
    before, judge = [p.clone() for p in run.model.parameters()], run.guard.judge
    run.guard.judge = lambda *values: judge(*values) | {"spike": torch.ones(()), "dropped": torch.ones(())}
    one_update(run, 1)
    assert not any(moved(before, run))
    run.guard.judge = judge
    one_update(run, 2)
    assert all(moved(before, run))
    assert {float(s["step"]) for s in run.optimizer.optimizers[0].state.values()} == {2.0}


def test_nothing_in_an_update_waits_for_the_device(here):
    """`.item()` and its like, `torch.tensor(number)`: none in an update; the report is read later."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.waits += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
                                       torch.ops.aten.nonzero.default, torch.ops.aten.lift_fresh.default)
            return function(*args, **(kwargs or {}))

    run = prepared("--guard", "skip", "--num-experts", "4")
    one_update(run, 0)
    batch = run.loader.get((1, 0, run.rows[0]))
    run.loader = SimpleNamespace(get=lambda *_: batch)  # a thread of its own makes it ahead
    with Count() as count:
        train.update(run, train.pretraining_losses(run, 1), 1e-3)
    assert count.waits == 0


def test_guard_by_hand():
    """Quiet for 63 values; then one above mean + 6 deviations of the window is a spike, one below is none."""
    guard = Guard("skip", "cpu")
    values = [1.0, 2.0] * 40
    for count, value in enumerate(values):
        judged = guard.judge(torch.tensor(value if count != 60 else 99.0), torch.tensor(1.0 + value))
        assert not judged["spike"]
    guard = Guard("skip", "cpu")
    for value in values:
        assert not guard.judge(torch.tensor(value), torch.tensor(1.0 + value))["spike"]
    high = np.mean(values) + 6 * np.std(values, ddof=1)
    saved = guard.state(80)
    for value, spike in ((high - 0.01, 0), (high + 0.01, 1)):
        guard.restore(json.loads(json.dumps(saved)))
        judged = guard.judge(torch.tensor(value), torch.tensor(2.0))
        assert judged["spike"] == judged["dropped"] == spike
    guard.restore(saved)
    assert guard.judge(torch.tensor(1.0), torch.tensor(100.0))["spike"]  # the gradient norm counts as well
    warning = Guard("warn", "cpu")
    warning.restore(saved)
    assert not warning.judge(torch.tensor(99.0), torch.tensor(2.0))["dropped"]


def test_a_large_gradient_alone_is_no_alarm():
    values = {"loss": 1.2, "grad_norm": 9.0, "usual": 1.5, "spread": 0.1, "spike": 1.0}
    assert Guard("warn", "cpu").follow(90, values) is None
    assert Guard("skip", "cpu").follow(90, values)["event"] == "spike"  # it is left out, so it is said


def follow(guard: Guard, losses: list[float]) -> list[dict]:
    """The events of a spike that begins with the first of these losses, at step 90, where 1.5 is usual."""
    events = [guard.follow(step, {"loss": loss, "grad_norm": 1.0, "usual": 1.5, "spread": 0.1, "spike": step == 90})
              for step, loss in enumerate(losses, start=90)]
    return [event for event in events if event]


def test_how_spikes_end_by_hand():
    """Back within 10 updates is fast, later is slow, after 256 given up."""
    for away, kind in ((5, "fast"), (10, "fast"), (11, "slow"), (300, "not recovered")):
        spike, over = follow(Guard("warn", "cpu"), [9.0] * away + [1.5] * 3)
        assert spike["event"] == "spike" and spike["step"] == 90
        assert over["event"] == "over" and over["kind"] == kind and over["lasted"] == min(away, 257)


def test_rewinds_widen_clip_tighter_and_end_by_hand(here):
    """Each try skips twice as many batches around the spike and clips at half until 128 updates after; the fourth is
    one too many, and says why."""
    run = train.connect(train.set_up(recipe("--tokens", "1e6"), Path("runs/a")))
    saver = Saver(run.folder, run.tokenizer)
    for step in (0, 60, 85):
        saver.save(step, run.model, run.optimizer, run.guard.state(step), must=True)
    for margin in (16, 32, 64):
        guard = Guard("rewind", "cpu")
        *_, event = follow(guard, [9.0] * 11)
        assert event == {"event": "rewind", "step": 100, "began": 90}
        train.go_back(run, event)
        begin, end = run.guard.skipped[-1]
        assert (begin, end) == (89 - margin, 100 + margin)
        assert run.step == run.guard.after_gap(60)  # 85 is too near to the spike
        assert [run.guard.after_gap(step) for step in (begin - 1, begin, end - 1, end)] == [begin - 1, end, end, end]
        assert run.guard.tight_until == end + 128
    assert [path.name[-2:] for path in sorted((run.folder / "checkpoints").iterdir())] == ["00", "60"]
    one_update(run, run.guard.tight_until - 1)
    moments = run.optimizer.optimizers[0].state.values()
    assert math.sqrt(sum(float(s["exp_avg"].square().sum()) for s in moments)) == pytest.approx(0.1 * 0.5, rel=1e-4)
    with pytest.raises(UserError, match="3 rewinds did not help"):
        train.go_back(run, event)
    run.log.close()


def test_rewinding_past_poisoned_batches(here, monkeypatch):
    """Sixteen batches in a row are noise: a run with --guard rewind goes back to the checkpoint from before them,
    which stayed although it keeps one, skips them, and ends better than a run that trained on them."""
    get = train.Loader.get

    def poisoned(self, now, *following):
        tensors = get(self, now, *following)
        if 100 <= now[0] < 116:
            noise = torch.randint(len(losses_of), tensors[0].shape, generator=torch.Generator().manual_seed(now[0]))
            return noise, noise.flip(1), tensors[2]
        return tensors

    losses_of = range(300)
    monkeypatch.setattr(train.Loader, "get", poisoned)
    flags = ["--tokens", str(180 * 256), "--learning-rate", "0.02", "--eval-every", "1000", "--eval-tokens", "2000"]
    found = {}
    for policy in ("warn", "rewind"):
        train.pretrain(recipe(*flags, "--guard", policy, "--save-every", "10", "--keep", "1"), Path("runs") / policy)
        found[policy] = sum([entry for entry in log_of(Path("runs") / policy) if "val" in entry][-1]["val"].values())
    events = [entry for entry in log_of(Path("runs/rewind")) if "event" in entry]
    spike, rewind = events[0], next(event for event in events if event["event"] == "rewind")
    assert spike["step"] == 101 and rewind["began"] == 101 and rewind["skipped"] == [84, 127] and rewind["to"] == 100
    steps = [entry["step"] for entry in log_of(Path("runs/rewind")) if "loss" in entry]
    assert steps == [*range(1, 101), *range(128, 181)]  # the log tells what was kept, once
    assert found["rewind"] < found["warn"], found
    assert [e["event"] for e in log_of(Path("runs/warn")) if "event" in e] == ["spike", "over"]


# ---- what a run shows and checks ------------------------------------------------------------------------------


def test_watched_numbers_by_hand(here):
    """Losses by source are the model's, and its largest logit; update-to-weight is what two checkpoints differ by."""
    folder = pretrain("a", "--tokens", "768", "--eval-every", "1", "--save-every", "1", "--keep", "9",
                      "--weight-decay", "0", "--optimizer", "adamw")
    trained, watched = ([e for e in log_of(folder) if e.get("step") == 3 and name in e][0] for name in ("loss", "val"))
    before, after = (from_pretrained(folder / f"checkpoints/step-0000000{n}").state_dict() for n in (2, 3))
    changed = [float((after[n] - w).norm() / after[n].norm()) for n, w in before.items() if w.ndim == 2]
    assert watched["update_to_weight"] == pytest.approx(max(changed), rel=1e-4)
    run = train.set_up(train.read_recipe(folder)[0], Path("runs/none"))
    tokens, targets, cu_seqlens = run.loader.get((2, 0, 8))
    run.model.load_state_dict(before)
    by_token = torch.nn.functional.cross_entropy(run.model(tokens, cu_seqlens).transpose(1, 2), targets)
    assert trained["loss"] == pytest.approx(float(by_token.detach()), rel=1e-5)
    run.model.load_state_dict(after)
    logits = run.model(tokens, cu_seqlens).detach()
    assert watched["logit_max"] == pytest.approx(float(logits.abs().max()), rel=1e-5)
    by_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    sources = run.curriculum.locate(2, 0, 8)[0]
    for number, split in enumerate(run.curriculum.sources):
        mine = [row for row in range(8) if sources[row] == number]
        assert watched["loss_by_source"][split.name] == pytest.approx(float(by_token[mine].mean()), rel=1e-5)
    assert 0 <= watched["attention_first_token"] <= 1
    assert 0 <= watched["attention_entropy_min"] <= watched["attention_entropy_max"] < np.log(32)
    assert watched["memory"] > 1e6


def test_attention_extremes_by_brute_force():
    """The largest score, and the entropies of the heads that look at least and at most widely."""
    config = ModelConfig(50, 32, 48, 1, 4, 2, max_position_embeddings=24, position="none", layer_types="sliding",
                         sliding_window=6, initializer_range=0.5)
    model, tokens = GPT(config), torch.randint(50, (1, 24))
    with watch_attention() as (extremes, _):
        model(tokens, torch.tensor([0, 10, 24], dtype=torch.int32))
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(tokens))
    q, k = (part(x).unflatten(-1, (-1, 8))[0].detach() for part in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    scores, entropies = [], torch.zeros(4, 24)
    for head in range(4):
        for at in range(24):
            begin = max(0 if at < 10 else 10, at - 5)
            row = q[at, head] @ k[begin:at + 1, head // 2].T / 8**0.5
            scores.append(float(row.max()))
            entropies[head, at] = torch.distributions.Categorical(logits=row).entropy()
    mean = entropies.mean(1)
    torch.testing.assert_close(extremes[0][:3], torch.tensor([max(scores), mean.min(), mean.max()]))


@pytest.mark.parametrize("part", ["fw_compiler", "bw_compiler"])
def test_a_compiler_that_fails_is_left_out(here, monkeypatch, capsys, part):
    def fails(*_):
        raise RuntimeError("no C++ compiler was found")

    compilers = {"fw_compiler": lambda graph, _: graph, "bw_compiler": lambda graph, _: graph, part: fails}
    monkeypatch.setattr(GPT, "compile_blocks",
                        functools.partialmethod(GPT.compile_blocks, backend=aot_autograd(**compilers)))
    eager = pretrain("eager", "--tokens", "512", "--compile", "true")
    assert capsys.readouterr().out.count("compile   off: it failed here") == 1
    assert losses(eager) == losses(pretrain("plain", "--tokens", "512"))


def test_deterministic_trains_experts(here):
    """Strict mode raises where a kernel has no deterministic form; all that is used has one, on a CPU at least."""
    try:
        pretrain("a", "--tokens", "512", "--deterministic", "true", "--num-experts", "4")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_check_tries_everything_and_leaves_nothing(here):
    done = call(train.main, *TINY, "--check", "--tokens", "25600")
    assert done.returncode == 0, done.stderr
    for words in ("data whole", "memory; disk for", "stage train: loss", "a save and a load", "would end on"):
        assert words in done.stdout
    assert not list(Path("runs").iterdir())


def test_check_tries_every_stage_and_names_the_one_that_fails(here, monkeypatch):
    """A stage whose sequences do not divide, and a disk too small for the checkpoints that would stay."""
    from data import Stage

    stages = (Stage("base", 2560, {}), Stage("long", 2560, {}, context=96))
    for work in (train.check, lambda *job: train.pretrain(job[0], Path("runs/a"))):
        with pytest.raises(UserError, match="stage long: .* give --batch_tokens 192 or 288"):
            work(replace(recipe(), stages=stages), train.World())
        assert not Path("runs").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    done = call(train.main, *TINY, "--check", "--tokens", "25600")
    assert done.returncode == 2 and "--keep" in done.stderr and not list(Path("runs").iterdir())
