"""What train.py gained for choosing hyperparameters, and the commands that choose them, on a tiny corpus."""

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ablate
import train
from conftest import TRAIN, call, torchrun
from model import cross_entropy
from schedule import NoiseScale
from test_train import TINY, assert_same_state, corpus, here, log_of, losses, recipe  # noqa: F401 (fixtures)
from tokenizer import UserError


def mean_square(job: train.Job, first: int, rows: int) -> float:
    """The squared norm of the mean gradient over some rows of the first batch."""
    tokens, targets, starts = job.loader.make(0, first, rows)
    mean = cross_entropy(job.model(tokens, starts), targets) / (rows * job.curriculum.context)
    return sum(g.square().sum().item() for g in torch.autograd.grad(mean, job.model.parameters()))


def test_logged_noise_scale_equals_gradients_computed_apart(here):
    """The first update's |G|^2 and tr(S), from the gradients of its first half and of its whole batch of 256 tokens; the
    logged scale is the ratio of the averages of all measurements, in order."""
    job = recipe("--tokens", "5120", "--noise-every", "1", "--eval-every", "1000")
    train.train(job, Path("runs/a"))
    entries = [e for e in log_of(Path("runs/a")) if "loss" in e]
    fresh = train.set_up(job, train.World(), Path("runs/none"), False)
    squares = {rows: mean_square(fresh, 0, rows) for rows in (4, 8)}
    size = (256 * squares[8] - 128 * squares[4]) / 128
    noise = (squares[4] - squares[8]) / (1 / 128 - 1 / 256)
    assert (entries[0]["grad_signal"], entries[0]["grad_noise"]) == pytest.approx((size, noise), rel=1e-3)
    scale = NoiseScale()
    for entry in entries:
        expected = scale.add(entry["grad_signal"], entry["grad_noise"])
        assert entry["noise_scale_tokens"] == pytest.approx(expected, nan_ok=True)
    assert len(entries) == 20


def test_noise_scale_of_two_processes_averages_the_ranks(here):
    """|G_small|^2 is the mean over the ranks' first micro-batches, rows 0-1 and 2-3, before their gradients are averaged."""
    flags = ["--tokens", "256", "--noise-every", "1"]
    done = torchrun(TRAIN, *TINY, *flags, "--micro-batch", "2", "--name", "two")
    assert done.returncode == 0, done.stderr
    fresh = train.set_up(recipe(*flags), train.World(), Path("runs/none"), False)
    first, second, whole = (mean_square(fresh, *rows) for rows in ((0, 2), (2, 2), (0, 8)))
    size, noise = NoiseScale.split((first + second) / 2, whole, 64, 256)
    entry = next(e for e in log_of(Path("runs/two")) if "loss" in e)
    assert (entry["grad_signal"], entry["grad_noise"]) == pytest.approx((size, noise), rel=1e-3)


def test_batch_warmup_reads_the_same_data_in_fewer_updates(here):
    """Doubling after 4 and 8 of 20 steps: 4 + 2 + 3 updates, each with its rate times sqrt(2) more, and the mean loss of an
    update is that of all its tokens."""
    job = recipe("--tokens", "5120", "--batch-doublings", "4,8", "--decay-share", "0", "--warmup-steps", "1",
                 "--learning-rate", "1e-12", "--eval-every", "1000")
    train.train(job, Path("runs/warm"))
    train.train(replace(job, batch_doublings=""), Path("runs/plain"))  # at this rate the weights hardly move
    warm, plain = ([e for e in log_of(Path(f"runs/{name}")) if "loss" in e] for name in ("warm", "plain"))
    assert [e["step"] for e in warm] == [1, 2, 3, 4, 6, 8, 12, 16, 20] and len(plain) == 20
    assert [e["batch_tokens"] for e in warm] == [256] * 4 + [512] * 2 + [1024] * 3
    assert [e["lr"] / 1e-12 for e in warm] == pytest.approx([1] * 4 + [math.sqrt(2)] * 2 + [2] * 3)
    per_step = [e["loss"] for e in plain]
    assert warm[4]["loss"] == pytest.approx(sum(per_step[4:6]) / 2, abs=1e-4)
    assert warm[-1]["loss"] == pytest.approx(sum(per_step[16:20]) / 4, abs=1e-4)


def test_muon_with_batch_warmup_resumes_exactly(here, monkeypatch):
    """Both optimizers' states and the doublings survive a stop; and it learns."""
    job = recipe("--tokens", "10240", "--optimizer", "muon", "--batch-doublings", "10", "--learning-rate", "0.01",
                 "--eval-every", "1000", "--noise-every", "5")
    train.train(job, Path("runs/straight"))
    count, step = 0, torch.optim.Muon.step

    def interrupt(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 15:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Muon, "step", interrupt)
    with pytest.raises(train.Interrupted):
        train.train(job, Path("runs/stopped"))
    train.train(train.read_recipe(Path("runs/stopped"))[0], Path("runs/stopped"), resume=True)
    assert losses(Path("runs/stopped")) == losses(Path("runs/straight"))
    assert_same_state(Path("runs/stopped"), Path("runs/straight"))
    assert losses(Path("runs/straight"))[-1] < 0.9 * losses(Path("runs/straight"))[0]


def test_paired_difference_by_hand():
    # differences 0.10, 0.05, 0.10: mean 0.08333, standard deviation 0.028868; 4.30 * 0.028868 / sqrt(3) = 0.07167
    assert ablate.paired_difference([1.0, 1.2, 1.1], [1.1, 1.25, 1.2]) == pytest.approx((0.08333, 0.07167), abs=1e-4)
    stats = pytest.importorskip("scipy.stats")
    for n, t in enumerate(ablate.T95, start=1):
        assert t == pytest.approx(stats.t.ppf(0.975, n), abs=0.006)
    assert ablate.verdict(-0.1, 0.05) == "better" and ablate.verdict(0.1, 0.05) == "worse"
    assert ablate.verdict(0.01, 0.05).startswith("no difference seen; one under about 0.1000")
    assert ablate.verdict(0.0, 0.0) == "the very same losses"


def test_one_change_at_a_time(here, capsys, monkeypatch):
    """What hurts is found, what does nothing is not; the losses are those of `train.train`; nothing is trained twice."""
    given = [*TINY, "--tokens", "2560", "--batch-doublings", "6"]
    tries = ["learning_rate=1e-6", "watch_every=3", "hidden_size=32 num_hidden_layers=1", "learning_rate=1e20"]
    begun, one_run = [], ablate.one_run

    def counted(recipe, folder):
        begun.append((recipe.learning_rate, recipe.watch_every, recipe.model.num_hidden_layers, recipe.seed))
        if len(begun) == 7:
            raise KeyboardInterrupt
        return one_run(recipe, folder)

    monkeypatch.setattr(ablate, "one_run", counted)
    with pytest.raises(KeyboardInterrupt):
        ablate.change(given, tries, 3, Path("runs/changes"))
    with open("runs/changes/log.jsonl", "a") as file:
        file.write('{"key": "cut')  # as kill -9 leaves it
    found = ablate.change(given, tries, 3, Path("runs/changes"))
    assert len(begun) == 16 and len(set(begun)) == 15  # the seventh twice
    out = capsys.readouterr().out
    assert "training 2 of 9: " in out and " left" in out
    table = {line.split("  ")[0]: line for line in out.splitlines() if line.startswith(("base", *tries))}
    assert found["learning_rate=1e-6"][0] > 0.1 and "worse" in table["learning_rate=1e-6"]
    assert found["watch_every=3"] == (0.0, 0.0) and "the very same losses" in table["watch_every=3"]
    assert "diverged (seed 0, step " in table["learning_rate=1e20"] and math.isnan(found["learning_rate=1e20"][0])
    assert "% parameters: part of the difference is size" in out
    runs = list(train.Log(Path("runs/changes")).entries())
    assert len(runs) == 15
    straight = train.train(recipe("--tokens", "2560", "--batch-doublings", "6", "--seed", "1"), Path("runs/a"))
    mine = next(run for run in runs if run["change"] == "baseline" and run["seed"] == 1)
    assert straight == mine["scores"] and losses(Path("runs/changes") / mine["run"]) == losses(Path("runs/a"))
    again = ablate.change(given, tries[:3], 3, Path("runs/changes"))
    assert again == {name: found[name] for name in tries[:3]} and len(begun) == 16
    monkeypatch.setattr(ablate, "fingerprint", lambda recipe, around: f"other data {recipe.watch_every}")
    ablate.change(given, tries[1:2], 2, Path("runs/changes"))
    assert len(begun) == 20  # all anew


def test_a_fingerprint_changes_with_what_changes_a_training(here, monkeypatch):
    job = recipe("--tokens", "2560")
    train.train(job, Path("runs/a"))
    around = ablate.code_and_data(job)
    before = ablate.fingerprint(job, around)
    assert ablate.fingerprint(recipe("--tokens", "2560"), ablate.code_and_data(job)) == before
    for other in (replace(job, clip=2.0), replace(job, start="runs/a"), replace(job, dtype="bfloat16")):
        assert ablate.fingerprint(other, around) != before
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"# edited" * (path.name == "schedule.py"))
    assert ablate.fingerprint(job, ablate.code_and_data(job)) != before


@pytest.mark.parametrize("flags, words", [
    (["--try", "learning_rate"], "is not NAME=VALUE"),
    (["--try", "learning_rat=1"], "did you mean --learning_rate"),
    (["--try", "watch_every=50"], "changes nothing"),
    (["--try", "eval_tokens=256"], "changes what is measured with"),
    (["--try", "clip=2", "--seeds", "1"], "one seed tells nothing"),
    (["--try", "position=nope"], "position nope is not one of"),
    (["--try", "clip=2", "--name", "mine"], "--name is train.py's alone"),
    (["--try", "resume=runs/a"], "runs/a is not a run"),
])
def test_mistaken_changes_are_a_sentence(here, flags, words):
    done = call(ablate.main, "change", *TINY, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not Path("runs").exists()


def test_ablations_do_not_start_under_torchrun(here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = call(ablate.main, "change", *TINY, "--try", "clip=2")
    assert done.returncode == 2 and "in one process" in done.stderr and not Path("runs").exists()


def test_lr_range_test_stops_where_training_diverges(here, capsys):
    pytest.importorskip("matplotlib")
    steepest, tenth = ablate.lr_range(recipe(), 1e-4, 1e3, 60, "range.png")
    assert 1e-4 < steepest < 10 and 1e-4 < tenth < 10 and Path("range.png").stat().st_size > 5000
    assert "a peak to try" in capsys.readouterr().out and not Path("runs").exists()


def test_branches_read_the_same_tokens_and_large_ones_fall_behind(here, capsys, monkeypatch):
    """From a young checkpoint, 16 times the batch is past the critical size, with the same tokens and sqrt(16) the rate."""
    train.train(recipe("--tokens", "5120", "--learning-rate", "0.01", "--eval-every", "1000"), Path("runs/a"))
    seen, step = {}, train.training_step

    def spy(job, at, rate, steps=1):
        seen.setdefault(steps, []).append((range(at, at + steps), rate))
        return step(job, at, rate, steps)

    monkeypatch.setattr(train, "training_step", spy)
    found = ablate.branch(Path("runs/a"), [1, 2, 16], 64 * 256, 0.01)
    read = {k: [i for part, _ in parts for i in part] for k, parts in seen.items()}
    assert read == {k: list(range(20, 84)) for k in (1, 2, 16)}
    assert [max(rate for _, rate in seen[k]) for k in (1, 2, 16)] == pytest.approx([0.01, 0.01 * math.sqrt(2), 0.04])
    assert found[16] > found[1] + 0.01
    assert re.search(r"critical batch size at step 20 of runs/a: (256|512) tokens", capsys.readouterr().out)
    with pytest.raises(UserError, match="give 4096"):
        ablate.branch(Path("runs/a"), [1, 4], 1000, 0.01)
    seen.clear()
    early = next(path for path in sorted(Path("runs/a/checkpoints").iterdir()) if path.name != "step-00000000")
    ablate.branch(early, [1], 4 * 256, 0.01)  # from a checkpoint in the middle
    assert seen[1][0][0].start == int(early.name[5:])


@pytest.mark.filterwarnings("ignore::schedule.Extrapolation")
def test_ladder_foretells_its_largest(here, capsys, monkeypatch):
    """Three sizes, three lengths: every rung is trained to its end with its own tokens, and the law that is fitted to them,
    not to the largest, says what the largest loses (within 10 %, after 40 steps)."""
    monkeypatch.setitem(train.RECIPES, "laptop", replace(recipe(), learning_rate=0.01, eval_tokens=4096))
    monkeypatch.setattr(ablate, "LADDER", [(16, 0.25), (16, 0.5), (32, 0.5), (16, 1), (24, 1), (32, 1)])
    monkeypatch.setattr(ablate, "HELD_OUT", 48)
    predicted, measured = ablate.fit_ladder(10_240, "cpu", "float32")
    found = json.loads(Path("runs/ladder/law.json").read_text())
    assert [run["tokens"] for run in found["runs"]] == [2560, 5120, 5120, 10240, 10240, 10240, 10240]
    assert found["runs"][-1]["loss"] == measured and predicted == pytest.approx(measured, rel=0.10)
    law, size = found["law"], found["runs"][-1]["parameters"]
    assert predicted == pytest.approx(law["E"] + law["A"] * size**-law["alpha"] + law["B"] * 10_240**-law["beta"])
    again = train.set_up(ablate.rung(16, 2560, "cpu", "float32"), train.World(), Path("runs/none"), False)
    for step in range(10):
        train.training_step(again, step, again.rate(step))
    assert found["runs"][0]["loss"] == pytest.approx(ablate.held_out_score(again))
    assert "off by" in capsys.readouterr().out


def test_minutes_trains_what_the_plan_says(here):
    """`train.py --minutes` takes about that long (not asserted: the host decides) with the plan's size and batch."""
    run = [train.main, "--data", "data/tiny", "--minutes", "0.05", "--device", "cpu", "--eval-tokens", "128"]
    done = call(*run, "--batch-tokens", "0")
    assert done.returncode == 2 and "--minutes decides --batch_tokens" in done.stderr
    done = call(*run)
    assert done.returncode == 0, done.stderr
    planned = int(re.search(r"model +([\d,]+) parameters: ", done.stdout)[1].replace(",", ""))
    assert f"{planned:,} parameters (" in done.stdout and "Memory: " in done.stdout
    saved = json.loads(Path("runs/laptop/recipe.json").read_text())
    batch = int(re.search(r"batch +([\d,]+) tokens, rate", done.stdout)[1].replace(",", ""))
    assert saved["batch_tokens"] == batch


@pytest.mark.parametrize("flags, words", [
    (["--batch-doublings", "a,b"], "list of steps such as"), (["--optimizer", "sgd"], "adamw, muon"),
    (["--minutes", "5"], "--minutes decides")])
def test_bad_flags_are_one_sentence(here, flags, words):
    done = call(train.main, *TINY, *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("flags, words", [
    (["branch", "runs/none"], "not a run"), (["branch", "runs/none", "--multiples", "2,4"], "begins with 1"),
    (["lr-range", "--steps", "3"], "at least 20"),
    (["lr-range", "--low", "1", "--high", "0.1"], "not below"), (["lr-range", "laptob"], "take laptop")])
def test_bad_commands_are_one_sentence(here, flags, words):
    done = call(ablate.main, *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
