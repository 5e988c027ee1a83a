"""What a run of weeks meets: kills, signals, full disks, NaN, spikes, and another number of processes."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import ablate
import train
from conftest import ROOT, TORCHRUN, TRAIN, torchrun
from checkpoint import from_pretrained, newest_checkpoint, read_sharded
from model import GPT, attention_extremes
from tokenizer import UserError
from test_train import TINY, assert_same_state, command, corpus, here, log_of, losses, recipe, state  # noqa: F401


def same_weights(a: str, b: str) -> None:
    x, y = (from_pretrained(folder).state_dict() for folder in (a, b))
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], atol=1e-5, rtol=1e-5)


def test_sharded_training_equals_one_process_and_each_resumes_the_other(here):
    """FSDP on two processes, stopped halfway, goes on as one process, and the reverse: losses and weights within 1e-5."""
    flags = ["--tokens", "5120", "--save-every", "10"]
    train.train(recipe(*flags), Path("runs/one"))
    done = torchrun(TRAIN, *TINY, *flags, "--parallel", "fsdp", "--name", "two")
    assert done.returncode == 0, done.stderr
    assert losses(Path("runs/two")) == pytest.approx(losses(Path("runs/one")), abs=1e-5)
    same_weights("runs/one", "runs/two")
    assert list(Path("runs/two/checkpoints/step-00000020/sharded").glob("__1_*"))
    for source, copy in (("one", "one-cut"), ("two", "two-cut")):
        shutil.copytree(f"runs/{source}", f"runs/{copy}")
        shutil.rmtree(f"runs/{copy}/checkpoints/step-00000020")
    train.train(train.read_recipe(Path("runs/two-cut"))[0], Path("runs/two-cut"), resume=True)
    done = torchrun(TRAIN, "--resume", "runs/one-cut", "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr
    for copy in ("one-cut", "two-cut"):
        assert losses(Path(f"runs/{copy}")) == pytest.approx(losses(Path("runs/one")), abs=1e-5)
        same_weights("runs/one", f"runs/{copy}")


def test_a_start_from_another_run_is_the_same_on_two_processes(here):
    """--start takes weights and moments along, in every process: two end where one does."""
    train.train(recipe("--tokens", "2560", "--name", "first"), Path("runs/first"))
    train.train(recipe("--tokens", "2560", "--start", "runs/first", "--keep", "9"), Path("runs/one"))
    done = torchrun("--", TRAIN, *TINY, "--tokens", "2560", "--start", "runs/first", "--name", "two")
    assert done.returncode == 0, done.stderr
    same_weights("runs/one", "runs/two")
    assert losses(Path("runs/two")) == pytest.approx(losses(Path("runs/one")), abs=1e-5)
    moments = torch.load("runs/one/checkpoints/step-00000000/optimizer.pt", weights_only=True)
    assert {float(kinds["step"]) for kinds in moments.values()} == {10.0}


def test_a_checkpoints_index_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not loaded"):
        read_sharded(tmp_path, {"x": torch.zeros(1)})
    assert not (tmp_path / "owned").exists()


KILLED = """
import os, random, shutil, signal, sys, threading, time
sys.path.insert(0, {root!r})
import torch, train
from pathlib import Path
from tqdm import tqdm

random.seed(1)
flags, folder = {flags!r}, Path("runs/killed")
log = folder / "log.jsonl"

def live(operations):
    # A run that dies with the given number of operations on files of its folder: open, rename, remove, mkdir.
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default one is shared by forks, and would stay locked when its holder dies
    sys.stdout = sys.stderr = open(os.devnull, "w")
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
    train.train(train.read_recipe(folder)[0] if begun else train.parse(flags)[1], folder, bool(begun))
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
        lines = (log.read_text().count("\\n") if log.exists() else 0) + random.randrange(8)
        while not (log.exists() and log.read_text().count("\\n") > lines):  # a moment in its training, not in its start
            time.sleep(0.002)
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
    """SIGKILL at 20 random moments of one run, half of them at an operation on its files: each time it goes on from what is
    whole, and it ends with the weights, moments and losses of a run that nothing happened to."""
    flags = [*TINY, "--tokens", "40960", "--save-every", "3", "--eval-every", "50"]
    Path("killed.py").write_text(KILLED.format(root=str(ROOT), flags=flags))
    Path("straight.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch, train\n"
                                   f"torch.set_num_threads(1); train.train(train.parse({flags!r})[1], train.Path('runs/straight'))")
    for script in ("straight.py", "killed.py"):
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    status, kills, inside = map(int, done.stdout.split())
    assert status == 0 and kills == 20 and inside >= 3, done.stdout
    assert losses(Path("runs/killed")) == losses(Path("runs/straight")) and len(losses(Path("runs/killed"))) == 160
    assert_same_state(Path("runs/killed"), Path("runs/straight"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_saves_and_ends_both(here, number):
    process = subprocess.Popen(
        [*TORCHRUN, TRAIN, *TINY, "--tokens", "1e7"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, end = Path("runs/laptop/log.jsonl"), time.time() + 60
    while time.time() < end and not (log.exists() and len(losses(log.parent)) > 3):
        time.sleep(0.1)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[-1], number)
    _, errors = process.communicate(timeout=60)
    assert "exitcode  : 75" in errors and errors.count("python train.py --resume runs/laptop") == 1, errors
    assert newest_checkpoint("runs/laptop").name == f"step-{len(losses(Path('runs/laptop'))):08d}"


def test_nan_in_one_process_stops_both_before_the_update(here):
    """Process 1 gets NaN in its loss at step 7: both end, nothing is saved, and the message names step and sequences."""
    Path("poison.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
loss = train.Pretraining.loss
def poisoned(job, *tensors):
    part, extra = loss(job, *tensors)
    return part * float("nan") if job.world.rank == 1 and job.guard.count == 6 else part, extra
train.Pretraining.loss = poisoned
train.run(train.main)
""")
    done = torchrun("poison.py", *TINY, "--tokens", "25600", "--save-every", "5")
    said = [line for line in done.stderr.splitlines() if "the loss is nan" in line]
    assert done.returncode and len(said) == 1, done.stderr
    assert "step 7:" in said[0] and "process 1, sequences 4 to 7" in said[0] and "step-00000005" in said[0]
    assert newest_checkpoint("runs/laptop").name == "step-00000005" and len(losses(Path("runs/laptop"))) == 6


def test_nan_leaves_weights_and_moments_as_they_are(here):
    job = train.set_up(recipe(), train.World(), Path("runs/none"), False)
    job.update(0, 1)
    before = [p.clone() for p in job.model.parameters()]
    loss, job.loss = job.loss, lambda *tensors: (loss := train.Pretraining.loss(job, *tensors))[:0] + (loss[0] * np.nan, 0.0)
    job.update(1, 2)
    job.loss = loss
    job.update(2, 3)  # nor does any update after it
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters()))
    assert {float(s["step"]) for s in job.optimizer.state.values()} == {1.0}


def test_nothing_in_an_update_waits_for_the_device(here):
    """`.item()` and its like: none in an update, and one read of the report; the watched steps may."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.waits += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
                                       torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    job = train.set_up(recipe("--guard", "skip", "--num-experts", "4"), train.World(), Path("runs/none"), False)
    job.update(0, 1)
    with Count() as count:
        job.update(1, 2, measure_noise=True)
    assert count.waits == 0


def test_a_full_disk_during_a_save_loses_nothing(here):
    """A limit on the size of files breaks the writing of optimizer.pt (a real short write): the run says so, goes on, and
    the checkpoint before it stays."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import resource, train
save, write = train.Saver.save, train.Saver.write
def limited(self, step, *args):
    if 0 < step < 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30000, resource.RLIM_INFINITY))
    try:
        return write(self, step, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
train.Saver.write = limited
train.run(train.main)
"""
    Path("full.py").write_text(code)
    done = subprocess.run([sys.executable, "full.py", *TINY, "--tokens", "5120", "--save-every", "10", "--keep", "9"],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in Path("runs/laptop/checkpoints").iterdir()) == ["step-00000000", "step-00000020"]
    assert any(entry.get("event") == "warning" for entry in log_of(Path("runs/laptop")))


def test_a_disk_that_fails_one_of_two_sharding_processes_stops_neither(here):
    Path("full.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
hash_files = train.hash_files
def fails(paths, root):
    if "00000010" in root.name and (train.dist.get_rank() == 1):
        raise OSError("no space left")
    return hash_files(paths, root)
train.hash_files = fails
train.run(train.main)
""")
    done = torchrun("full.py", *TINY, "--tokens", "5120", "--save-every", "10", "--keep", "9", "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not be written") == 1 and "no space left" in done.stderr
    assert {"step-00000000", "step-00000020"} <= {p.name for p in Path("runs/laptop/checkpoints").iterdir()}
    assert not Path("runs/laptop/checkpoints/step-00000010").exists() and len(losses(Path("runs/laptop"))) == 20


def test_saving_beside_training_writes_the_same(here, monkeypatch):
    train.train(recipe("--tokens", "2560", "--save-every", "2", "--keep", "9"), Path("runs/a"))
    write = train.Saver.write
    monkeypatch.setattr(train.Saver, "write", lambda *parts: (time.sleep(0.1), write(*parts)))  # training moves on meanwhile
    train.train(recipe("--tokens", "2560", "--save-every", "2", "--keep", "9", "--async-save", "true"), Path("runs/b"))
    names = [p.name for p in sorted(Path("runs/a/checkpoints").iterdir())]
    assert names == [p.name for p in sorted(Path("runs/b/checkpoints").iterdir())] and len(names) >= 6
    for name in names:
        a, b = (from_pretrained(f"runs/{run}/checkpoints/{name}").state_dict() for run in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)
        for file in ("config.json", "guard.json"):
            assert Path(f"runs/a/checkpoints/{name}/{file}").read_text() == Path(f"runs/b/checkpoints/{name}/{file}").read_text()
    assert_same_state(Path("runs/a"), Path("runs/b"))


def test_guard_by_hand():
    """Quiet for 63 values; then one above mean + 6 deviations of the window is a spike, one below is none."""
    guard = train.Guard("skip", 3, 4, "cpu")
    values = [1.0, 2.0] * 40
    for value in values:
        judged = guard.judge(torch.tensor(value), torch.tensor(1.0 + value))
        assert not judged["spike"]
    high = np.mean(values) + 6 * np.std(values, ddof=1)
    saved = guard.state()
    for value, spike in ((high - 0.01, 0), (high + 0.01, 1)):
        guard.restore(json.loads(json.dumps(saved)))
        judged = guard.judge(torch.tensor(value), torch.tensor(2.0))
        assert judged["spike"] == judged["dropped"] == spike
    guard.restore(saved)
    assert guard.judge(torch.tensor(1.0), torch.tensor(100.0))["spike"]  # the gradient norm counts as well
    events = [guard.follow(step, {"loss": loss, "grad_norm": 1.0, "usual": 1.5, "spread": 0.1, "spike": step == 90})
              for step, loss in enumerate([9.0] * 5 + [1.5] * 3, start=90)]
    assert [event and event["event"] for event in events] == ["spike"] + [None] * 6 + ["over"]
    assert events[-1]["kind"] == "fast" and events[-1]["lasted"] == 5


def follow(guard: train.Guard, losses: list[float]) -> list[dict]:
    """The events of a spike that begins with the first of these losses, at step 90, where 1.5 is usual."""
    events = [guard.follow(step, {"loss": loss, "grad_norm": 1.0, "usual": 1.5, "spread": 0.1, "spike": step == 90})
              for step, loss in enumerate(losses, start=90)]
    return [event for event in events if event]


def test_how_spikes_end_by_hand():
    """Back within 10 updates is fast, later is slow, after 256 given up."""
    for away, kind in ((10, "fast"), (11, "slow"), (300, "not recovered")):
        _, over = follow(train.Guard("warn", 3, 4, "cpu"), [9.0] * away + [1.5] * 3)
        assert over["kind"] == kind and over["lasted"] == min(away, 257)


def test_rewinds_widen_clip_tighter_and_end_by_hand():
    """Each try passes over twice as many batches around the spike; clipped at half until 128 updates after; the third is
    one too many, and says why."""
    old = train.Guard("rewind", 2, 4, "cpu")
    for margin in (4, 8):
        new = train.Guard("rewind", 2, 4, "cpu")
        _, event = follow(new, [9.0] * 11)
        assert event == {"event": "rewind", "step": 100, "began": 90}
        new.after_rewind(event, old)
        assert new.passed_over[-1] == [89 - margin, 100 + margin]
        assert new.after_gap(90) == 100 + margin and new.after_gap(80) == 80
        edge = 100 + 2 * margin + 128
        assert new.clip(edge - 1, 1.0) == 0.5 and new.clip(edge, 1.0) == 1.0
        old = new
    with pytest.raises(UserError, match="2 rewinds did not help"):
        train.Guard("rewind", 2, 4, "cpu").after_rewind(event, old)


def test_a_skipped_update_leaves_weights_and_moments(here):
    """--guard skip: what the guard calls a spike is not applied, and the next update is."""
    job = train.set_up(recipe("--guard", "skip"), train.World(), Path("runs/none"), False)
    job.update(0, 1)
    before, judge = [p.clone() for p in job.model.parameters()], job.guard.judge
    job.guard.judge = lambda *values: judge(*values) | {"spike": torch.ones(()), "dropped": torch.ones(())}
    job.update(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters()))
    job.guard.judge = judge
    job.update(2, 3)
    assert not any(torch.equal(a, b) for a, b in zip(before, job.model.parameters()))
    assert {float(s["step"]) for s in job.optimizer.state.values()} == {2.0}


def test_rewinding_past_poisoned_batches(here, monkeypatch):
    """32 of 800 batches are noise. With nothing done the run ends worse; one that goes back and passes over them ends within
    1 % of the clean run. What it undid is not left for --resume to find."""
    back, go_back = [], train.go_back

    def watched(job, *args):
        back.append((go_back(job, *args), newest_checkpoint(job.folder).name))
        return back[-1][0]

    monkeypatch.setattr(train, "go_back", watched)
    scores = ablate.spikes(recipe("--tokens", str(800 * 256), "--learning-rate", "0.02", "--eval-tokens", "4000"))
    assert scores["poisoned"] > 1.02 * scores["clean"] and scores["rewind"] < 1.01 * scores["clean"], scores
    assert back and all(name == f"step-{step:08d}" for step, name in back)
    log = log_of(Path("runs/spikes/rewind"))
    went_back = [entry for entry in log if entry.get("event") == "rewind"]
    passed = {step for entry in went_back for step in range(*entry["passed_over"])}
    assert went_back and not passed & {entry["step"] - 1 for entry in log if "loss" in entry and entry["step"] > 600}


def test_watched_numbers_by_hand(here):
    """Loss by source adds up to the loss; update-to-weight is what two checkpoints differ by; logits are the model's."""
    train.train(recipe("--tokens", "1024", "--watch-every", "1", "--save-every", "1", "--keep", "9"), Path("runs/a"))
    entry = next(e for e in log_of(Path("runs/a")) if e.get("step") == 3 and "loss" in e)
    job = train.set_up(train.read_recipe(Path("runs/a"))[0], train.World(), Path("runs/none"), False)
    before, after = (from_pretrained(f"runs/a/checkpoints/step-0000000{n}").state_dict() for n in (2, 3))
    job.model.load_state_dict(before)
    tokens, targets, cu_seqlens = job.load((2, 0, 8), None)
    logits = job.model(tokens, cu_seqlens)
    assert entry["logit_max"] == pytest.approx(float(logits.detach().abs().max()), rel=1e-5)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    sources = job.curriculum.locate(2, 0, 8)[0]
    for number, name in enumerate(job.names):
        mine = [row for row in range(8) if sources[row] == number]
        assert entry["loss_by_source"][name] == pytest.approx(float(losses[mine].mean().detach()), rel=1e-5)
    changed = [float((after[n] - w).norm() / w.norm()) for n, w in before.items() if "layers" in n and w.ndim == 2]
    assert entry["update_to_weight"] == pytest.approx(max(changed), rel=1e-4)
    assert 0 <= entry["attention_entropy_min"] <= entry["attention_entropy_max"] < np.log(32) and entry["memory"] > 1e6


def test_attention_extremes_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 24, heads, 8, generator=generator) for heads in (4, 2))
    starts, window, scale = torch.tensor([0, 10, 24], dtype=torch.int32), 6, 0.4
    scores, entropies = [], torch.zeros(4, 24)
    for head in range(4):
        for at in range(24):
            begin = max(0 if at < 10 else 10, at - window + 1)
            row = scale * q[0, at, head] @ k[0, begin:at + 1, head // 2].T
            scores.append(float(row.max()))
            entropies[head, at] = torch.distributions.Categorical(logits=row).entropy()
    mean = entropies.mean(1)
    expected = torch.tensor([max(scores), mean.min(), mean.max()])
    torch.testing.assert_close(attention_extremes(q, k, starts, window, 0, scale), expected)


@pytest.mark.parametrize("part", ["fw_compiler", "bw_compiler"])
def test_a_compiler_that_fails_is_left_out(here, monkeypatch, capsys, part):
    def fails(*_):
        raise RuntimeError("no C++ compiler was found")

    backend = aot_autograd(**{"fw_compiler": lambda graph, _: graph, "bw_compiler": lambda graph, _: graph, part: fails})
    monkeypatch.setattr(GPT, "compile_blocks", lambda self: [layer.compile(backend=backend) for layer in self.model.layers])
    train.train(recipe("--tokens", "512", "--compile", "true"), Path("runs/eager"))
    train.train(recipe("--tokens", "512"), Path("runs/plain"))
    assert capsys.readouterr().out.count("compile   off: it failed here") == 1
    assert losses(Path("runs/eager")) == losses(Path("runs/plain"))


@pytest.mark.parametrize("flag", ["--keep=1", "--check"])
def test_one_process_that_dies_takes_the_other_with_it(here, flag):
    """Process 1 raises, as from a broken disk, while process 0 waits for it in a collective: both end at once, and only the
    true reason is said."""
    Path("broken.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
load = train.Pretraining.load
def breaks(job, piece, following):
    if job.world.rank == 1 and job.guard.count == 1:
        raise train.UserError("the disk of process 1 is gone")
    return load(job, piece, following)
train.Pretraining.load = breaks
train.run(train.main)
""")
    begin = time.time()
    done = torchrun("broken.py", *TINY, "--tokens", "1e7", flag)
    assert done.returncode and done.stderr.count("the disk of process 1 is gone") == 1, done.stderr
    assert "Connection closed" not in done.stderr and time.time() - begin < 60


def test_a_full_disk_costs_lines_of_the_log_and_not_the_run(here, capsys):
    """The disk is full from the second line on, in the middle of which it became so, and has room again for the fourth."""
    log = train.Log(Path("."))
    log.write(step=1, loss=3.0)
    with open(log.path, "a") as file:
        file.write('{"step": 2, "lo')
    path, log.path = log.path, Path("/dev/full")
    log.write(step=2, loss=2.9)
    log.write(step=3, loss=2.8)
    log.path = path
    log.write(step=4, loss=2.7)
    assert [entry["step"] for entry in log.entries()] == [1, 4]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_the_log_forgets_steps_but_not_events(here):
    log = train.Log(Path("."))
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0)
        log.write(step=step, event="warning", text=f"at {step}")
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')  # a killed run
    again = train.Log(Path("."), 2)
    again.write(step=3, event="warning", text="at 3")  # met before
    assert [(e["step"], "event" in e) for e in again.entries()] == [(1, False), (1, True), (2, False), (2, True), (3, True)]


def test_a_save_after_damaged_checkpoints_stays(here):
    """Steps 16 and 20 are damaged, 10 is resumed and stopped at once: the new checkpoint must not be the one that goes."""
    train.train(recipe("--tokens", "5120", "--save-every", "5", "--keep", "2"), Path("runs/a"))
    shutil.copytree("runs/a/checkpoints/step-00000020", "runs/a/checkpoints/step-00000010")
    job = train.set_up(recipe(), train.World(), Path("runs/none"), False)
    train.Saver(job, Path("runs/a")).rotate(10)
    assert {"10", "16", "20"} <= {path.name[-2:] for path in Path("runs/a/checkpoints").iterdir()}


def test_a_tracker_that_fails_does_not_end_the_run(here, capsys):
    log = train.Log(Path("."))
    log.trackers = [(lambda step, numbers: 1 / 0, None)]
    log.write(step=1, loss=3.0)
    log.write(step=2, loss=3.0)
    assert len(list(log.entries())) == 2 and capsys.readouterr().err.count("division by zero") == 1


def test_deterministic_trains_experts(here):
    """Strict mode raises where a kernel has no deterministic form; everything that is used has one, on a CPU at least."""
    try:
        train.train(recipe("--tokens", "512", "--deterministic", "true", "--num-experts", "4"), Path("runs/a"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_slow_processes_and_slow_stretches_are_reported(here, capsys):
    """By hand: half the usual speed for 8 updates, said once; a process at 1.5 times the others' forward pass."""
    meter = train.Meter(train.set_up(recipe(), train.World(), Path("runs/none"), False), train.Log(Path(".")))
    capsys.readouterr()
    for speed in [100.0] * 70 + [60.0] * 20 + [40.0] * 10:
        meter.compare(1, speed, {})
    assert capsys.readouterr().err.count("40 tokens/s where 100 were usual") == 1
    meter.compare(1, 100.0, {"0": 0.1, "1": 0.1, "2": 0.15})
    assert "process 2 took 0.150 s for a forward pass, the others 0.100 s" in capsys.readouterr().err


def test_check_tries_everything_and_leaves_nothing(here):
    done = command("--check", "--tokens", "25600")
    assert done.returncode == 0, done.stderr
    for word in ("data:", "disk:", "memory:", "two steps:", "a save and a load:", "would end on"):
        assert word in done.stdout
    assert "FAILS" not in done.stdout and not list(Path("runs").iterdir())


def test_recomputed_activations_give_the_same_gradients(here):
    gradients = []
    for recompute in ("false", "true"):
        job = train.set_up(recipe("--activation-checkpointing", recompute, "--num-experts", "4"), train.World(),
                           Path("runs/none"), False)
        (piece,) = job.micro_batches(0, 1)
        part, extra = job.loss(*job.load(piece, None))
        (part + extra).backward()
        gradients.append([p.grad for p in job.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_trackers_get_the_numbers(here, monkeypatch):
    told = []
    fake = type("wandb", (), {"init": staticmethod(lambda **k: told.append(k)), "finish": staticmethod(lambda: told.append("end")),
                              "log": staticmethod(lambda numbers, step: told.append((step, numbers)))})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.train(recipe("--tokens", "512", "--log", "wandb"), Path("runs/a"))
    assert told[0]["name"] == "a" and told[-1] == "end" and any(step == 2 and "val/left" in n for step, n in told[1:-1])
    assert told[0]["id"].startswith("a-")
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install trackio"):
        train.train(recipe("--tokens", "512", "--log", "trackio"), Path("runs/b"))
    assert not Path("runs/b").exists()
    with pytest.raises(UserError, match="tensorboard, wandb"):
        recipe("--log", "excel")


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    train.Log(tmp_path).write(step=1, loss=1.5, noise={"a": float("nan"), "b": float("inf")})
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line == {"step": 1, "loss": 1.5, "noise": {"a": None, "b": None}}
