"""The commands that choose hyperparameters, on a tiny corpus."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ablate
import train
from checkpoint import Log
from conftest import call
from model import cross_entropy
from schedule import NoiseScale
from test_train import TINY, corpus, here, losses, pretrain, quick, recipe  # noqa: F401 (fixtures)


def test_paired_difference_by_hand():
    # differences 0.10, 0.05, 0.10: mean 0.08333, standard deviation 0.028868; 4.30 * 0.028868 / sqrt(3) = 0.07167
    assert ablate.paired_difference([1.0, 1.2, 1.1], [1.1, 1.25, 1.2]) == pytest.approx((0.08333, 0.07167), abs=1e-4)
    stats = pytest.importorskip("scipy.stats")
    for n, t in enumerate(ablate.T95, start=1):
        assert t == pytest.approx(stats.t.ppf(0.975, n), abs=0.006)


def test_one_change_at_a_time(here, capsys):
    """What hurts is found, what does nothing is not, what diverges is named; nothing is trained twice."""
    given = ["change", *TINY, "--tokens", "2560", "--seeds", "3"]
    tries = ["learning_rate=1e-6", "save_every=7", "learning_rate=1e20"]
    done = call(ablate.main, *given, *(word for change in tries for word in ("--try", change)))
    assert done.returncode == 0, done.stderr
    table = {name: next(line for line in done.stdout.splitlines() if line.startswith(name)) for name in tries}
    assert "worse" in table["learning_rate=1e-6"] and "exactly the same" in table["save_every=7"]
    assert "diverged" in table["learning_rate=1e20"]
    runs = [json.loads(line) for line in Path("runs/changes/log.jsonl").read_text().splitlines()]
    assert len(runs) == 12
    straight = pretrain("a", "--tokens", "2560", "--seed", "1")
    mine = next(run for run in runs if run["change"] == "baseline" and run["seed"] == 1)
    assert losses(Path("runs/changes") / mine["key"]) == losses(straight)
    again = call(ablate.main, *given, "--try", tries[0])
    assert again.returncode == 0 and "worse" in again.stdout
    assert len(Path("runs/changes/log.jsonl").read_text().splitlines()) == 12


def test_a_fingerprint_changes_with_what_changes_a_training(here, monkeypatch):
    job = recipe("--tokens", "2560")
    around = ablate.code_and_data(job)
    before = ablate.fingerprint(job, around)
    assert ablate.fingerprint(recipe("--tokens", "2560"), ablate.code_and_data(job)) == before
    for other in (replace(job, clip=2.0), replace(job, dtype="bfloat16")):
        assert ablate.fingerprint(other, around) != before
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"# edited" * (path.name == "schedule.py"))
    assert ablate.fingerprint(job, ablate.code_and_data(job)) != before


@pytest.mark.parametrize("flags, words", [
    (["--try", "learning_rate"], "is not NAME=VALUE"),
    (["--try", "learning_rat=1"], "did you mean --learning_rate"),
    (["--try", "save_every=500"], "changes nothing"),
    (["--try", "eval_tokens=256"], "changes what is measured with"),
    (["--try", "clip=2", "--seeds", "1"], "--seeds 1 is not between 2"),
    (["--try", "position=nope"], "position 'nope' is not one of"),
    (["--try", "clip=2", "--name", "mine"], "train.py"),
])
def test_mistaken_changes_are_a_sentence(here, flags, words):
    done = call(ablate.main, "change", *TINY, *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not Path("runs").exists()


def test_ablations_do_not_start_under_torchrun(here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = call(ablate.main, "change", *TINY, "--try", "clip=2")
    assert done.returncode == 2 and "in one process" in done.stderr and not Path("runs").exists()


def test_lr_range_test_stops_where_training_diverges(here):
    done = call(ablate.main, "lr-range", *TINY, "--high", "1e3", "--steps", "60")
    assert done.returncode == 0 and "a peak to try" in done.stdout, done.stderr


def test_a_larger_batch_falls_behind_on_the_same_tokens(here):
    run = pretrain("a", "--tokens", "5120", "--learning-rate", "0.01", "--eval-every", "1000")
    before = sorted(run.rglob("*"))
    done = call(ablate.main, "branch", run, "--multiples", "1,2,16", "--tokens", str(64 * 256))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] in (["1"], ["2"], ["16"])]
    assert len(rows) == 3 and float(rows[2][-1]) > float(rows[0][-1]) + 0.01
    assert "critical batch size" in done.stdout and sorted(run.rglob("*")) == before  # the run stays as it was


def test_noise_scale_equals_gradients_computed_apart(here, monkeypatch):
    """|G|^2 and tr(S) from the gradients of 16 single sequences and of their mean, computed here one by one."""
    run = pretrain("a", "--tokens", "2560", "--eval-every", "1000")
    found = ablate.noise(ablate.NoiseOptions(str(run), 16 * 32))
    at = ablate.at_checkpoint(str(run))
    train.enter_stage(at)
    squares, total, n = 0.0, None, 0
    for step in range(at.step, at.step + 2):
        for row in range(at.curriculum.rows(step)):
            tokens, targets, starts = at.loader.get((step, row, 1))
            grads = torch.autograd.grad(cross_entropy(at.model(tokens, starts), targets) / 32, at.model.parameters())
            flat = torch.cat([grad.flatten() for grad in grads])
            squares, total, n = squares + flat.square().sum().item(), flat if total is None else total + flat, n + 1
    signal, noise = NoiseScale.split(squares / n, (total / n).square().sum().item(), 1, n)
    expected = noise / signal * 32 if signal > 0 else math.nan
    assert n == 16 and found == pytest.approx(expected, rel=1e-2, nan_ok=True)


def test_poisoned_batches_cost_and_the_guard_rewinds(here):
    done = call(ablate.main, "spikes", *TINY, "--tokens", "76800", "--learning-rate", "0.01", "--eval-tokens", "512")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("clean", "poisoned", "rewind")), done.stdout
    kinds = [entry["event"] for entry in Log(Path("runs/spikes/poisoned")).entries() if "event" in entry]
    assert "spike" in kinds


@pytest.mark.filterwarnings("ignore::schedule.Extrapolation")
def test_ladder_predicts_its_largest(here, monkeypatch):
    monkeypatch.setattr(ablate, "LADDER", [(16, 0.25), (16, 0.5), (32, 0.5), (16, 1), (24, 1), (32, 1)])
    monkeypatch.setattr(ablate, "PREDICTED", 48)
    predicted, measured = ablate.fit_ladder(ablate.RecipeOptions([*TINY, "--tokens", "10240", "--learning-rate", "0.01",
                                                                  "--eval-tokens", "4096"]))
    assert predicted == pytest.approx(measured, rel=0.2)  # after 40 steps
    found = json.loads(next(Path("runs").glob("ladder*/law.json")).read_text())
    assert found["runs"][-1]["loss"] == measured and len(found["runs"]) == 7


@pytest.mark.parametrize("flags, words", [
    (["branch", "runs/none"], "no whole checkpoint"), (["lr-range", "--steps", "3"], "--steps 3 is not between 20"),
    (["lr-range", "--low", "1", "--high", "0.1"], "low"), (["lr-range", "laptob"], "take laptop")])
def test_bad_commands_are_one_sentence(here, flags, words):
    done = call(ablate.main, *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
