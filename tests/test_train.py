"""train.py as a user runs it: a run from text to sample, exact resume, many processes, bad input."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data as d
import evals
import train
from conftest import ROOT, TRAIN, call, torchrun
from checkpoint import from_pretrained, newest_checkpoint
from model import GPT
from tokenizer import Tokenizer, UserError, train_bpe

TINY = ["--data", "data/tiny", "--hidden-size", "32", "--intermediate-size", "48", "--num-hidden-layers", "2",
        "--num-attention-heads", "2", "--num-key-value-heads", "1", "--max-position-embeddings", "32",
        "--batch-tokens", "256", "--warmup-steps", "3", "--device", "cpu", "--dtype", "float32", "--eval-tokens", "128"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with data/tiny: two sources and a tokenizer; and data/short, whose documents fill half a row or more, so
    that whole documents need padding and an epoch is over soon."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 8))) for _ in range(60)]
    text = {name: [(f"{name}{i}", " ".join(rng.choice(words, rng.integers(5, 60)))) for i in range(150)]
            for name in ("left", "right")}
    tokenizer = train_bpe([t for _, t in text["left"]], 300)
    d.prepare(text, root / "data/tiny", tokenizer)
    d.prepare({name: [(key, document[:rng.integers(36, 50)]) for key, document in documents if len(document) > 50]
               for name, documents in text.items()}, root / "data/short", tokenizer)
    return root


@pytest.fixture
def here(corpus, tmp_path, monkeypatch) -> Path:
    shutil.copytree(corpus / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*flags: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *TINY, *flags], capture_output=True, text=True,
                          timeout=120, **options)


def recipe(*flags: str) -> train.Recipe:
    return train.parse([*TINY, *flags])[1]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def state(folder: Path) -> tuple[dict, dict]:
    last = newest_checkpoint(folder)
    return (torch.load(last / "model.pt", weights_only=True), torch.load(last / "optimizer.pt", weights_only=True))


def assert_same_state(a: Path, b: Path) -> None:
    for x, y in zip(state(a), state(b)):
        x, y = (torch.utils._pytree.tree_leaves(tree) for tree in (x, y))
        assert len(x) == len(y)
        assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(x, y))


def test_a_run_from_text_to_sample(here):
    """The main job in small: the loss falls, everything is in the run folder, and sample.py picks it up."""
    done = command("--tokens", "25600", "--learning-rate", "0.01", "--eval-every", "40")
    assert done.returncode == 0, done.stderr
    for word in ("machine ", "model ", "plan ", "6ND", "stage ", "minutes", "held-out bits per byte", "Done"):
        assert word in done.stdout
    folder = here / "runs/laptop"
    log = log_of(folder)
    steps = [e for e in log if "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 101)) and steps[-1]["tokens"] == 25_600
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and steps[-1]["lr"] == 0
    assert max(e["lr"] for e in steps) == 0.01 and steps[0]["lr"] == pytest.approx(0.01 / 3)
    assert list(dict.fromkeys(e["stage"] for e in steps)) == ["base", "quality", "decay"]
    assert min(e["step"] for e in steps if e["lr"] < 0.01 and e["step"] > 3) == 81  # the decay: the last 20 steps
    evals = [e for e in log if "val" in e]
    assert [e["step"] for e in evals] == [1, 40, 80, 100] and set(evals[-1]["val"]) == {"left", "right"}
    assert evals[-1]["val"]["left"] < evals[0]["val"]["left"]
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "loss.png").stat().st_size > 5000
    sampled = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--prompt", "ab ", "--temperature", "0"],
                             capture_output=True, text=True)
    assert sampled.returncode == 0 and sampled.stdout.startswith("ab "), sampled.stderr
    again = call(train.main, *TINY, "--tokens", "2560")  # a second run overwrites nothing
    assert (here / "runs/laptop-2").is_dir() and log_of(folder) == log and again.returncode == 0


def test_tasks_are_scored_during_training(here):
    """--eval_tasks: in the log, with errors and chance, and `evals.py criteria` reads them from there."""
    question = json.dumps({"context": "ab", "choices": ["cd", "ef", "gh"], "answer": 0})
    (here / "my.jsonl").write_text(f"{question}\n" * 6)
    done = call(train.main, *TINY, "--tokens", "1024", "--eval-every", "2", "--eval-tasks", "my.jsonl")
    assert done.returncode == 0, done.stderr
    found = [entry["tasks"] for entry in log_of(here / "runs/laptop") if "tasks" in entry]
    assert len(found) == 3 and all(list(tasks) == ["my.jsonl"] and tasks["my.jsonl"][2:] == [6, 1 / 3] for tasks in found)
    told = call(evals.main, "criteria", "runs/laptop")
    assert told.returncode == 0 and "1, 2, 4: no early signal" in told.stdout
    done = call(train.main, *TINY, "--eval-tasks", "mine.jsonl")
    assert done.returncode == 2 and "there is no task mine.jsonl" in done.stderr and not (here / "runs/laptop-2").exists()


def test_bits_per_byte_by_hand(here):
    """A model of equal logits needs log2(vocabulary) bits a target, EOS included."""
    tokenizer = Tokenizer.load("data/tiny")
    split = d.load_source("data/tiny/left", tokenizer)["val"]
    job = train.set_up(recipe(), train.World(), Path("runs/none"), False)
    job.model.model.norm.weight.data.zero_()
    score = train.bits_per_byte(job, split, 5 * 32)
    targets = split.tokens[1:5 * 32 + 1].tolist()
    size = sum(len(tokenizer.decode_bytes([t])) for t in targets if t != tokenizer.eos_id)
    assert score == pytest.approx(len(targets) * np.log2(tokenizer.vocab_size) / size)


def test_the_loss_of_padded_rows_is_the_mean_over_their_targets(here):
    """A model of equal logits has ln(vocabulary) nats a target, whatever share of the rows is padding."""
    job = train.set_up(recipe("--data", "data/short", "--packing", "best-fit"), train.World(), Path("runs/none"), False)
    job.model.model.norm.weight.data.zero_()
    batch = job.curriculum.batch(3)
    assert (batch.targets < 0).any() and job.curriculum.targets(3) == (batch.targets >= 0).sum()
    assert job.update(3, 4).read()["loss"] == pytest.approx(np.log(job.tokenizer.vocab_size), rel=1e-5)


@pytest.mark.parametrize("at", [1, 17, 37])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(here, at, monkeypatch):
    """Across stage boundaries and epochs: weights, optimizer and logged losses."""
    job = recipe("--data", "data/short", "--tokens", "20480", "--eval-every", "7")
    epochs = train.set_up(job, train.World(), Path("runs/none"), False).curriculum.epochs()
    assert max(epochs.values()) > 80 / (37 - 1), epochs  # so a source begins anew after the last of the interruptions
    train.train(job, Path("runs/straight"))
    update = train.training_step

    def interrupt(job, step, *args, **kwargs):
        if step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(job, step, *args, **kwargs)

    monkeypatch.setattr(train, "training_step", interrupt)
    with pytest.raises(train.Interrupted, match="--resume runs/stopped"):
        train.train(job, Path("runs/stopped"))
    assert at <= len(losses(Path("runs/stopped"))) <= at + 1  # noted during a step, a signal is heard by all in the next
    monkeypatch.setattr(train, "training_step", update)
    train.train(train.read_recipe(Path("runs/stopped"))[0], Path("runs/stopped"), resume=True)
    assert losses(Path("runs/stopped")) == losses(Path("runs/straight"))
    assert_same_state(Path("runs/stopped"), Path("runs/straight"))


def test_a_finished_run_says_so_and_another_begins_with_its_weights(here, capsys):
    train.train(recipe("--tokens", "2560"), Path("runs/a"))
    train.train(train.read_recipe(Path("runs/a"))[0], Path("runs/a"), resume=True)
    assert "all 10 steps are done" in capsys.readouterr().out
    done = call(train.main, *TINY, "--start", "runs/a", "--tokens", "512", "--hidden-size", "64")
    assert done.returncode == 2 and "a model of other sizes" in done.stderr and "Traceback" not in done.stderr


def test_which_checkpoints_stay(here):
    """The newest, the ends of stages, and multiples of --keep-every."""
    job = recipe("--tokens", "5120", "--save-every", "2", "--keep", "1", "--keep-every", "6")
    ends = train.set_up(job, train.World(), Path("runs/none"), False).curriculum.ends
    train.train(job, Path("runs/a"))
    steps = {int(path.name[5:]) for path in Path("runs/a/checkpoints").iterdir()}
    assert steps - {0} == {6, 12, 18, 20, *ends}


def test_ctrl_c_saves_and_says_how_to_resume(here):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY, "--tokens", "1e6"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while time.time() < end and not (Path("runs/laptop/log.jsonl").exists() and len(losses(Path("runs/laptop"))) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "python train.py --resume runs/laptop" in errors and "Traceback" not in errors
    assert newest_checkpoint("runs/laptop").name == f"step-{len(losses(Path('runs/laptop'))):08d}"


def test_evaluation_does_not_change_training(here):
    for every in ("5", "1000"):
        train.train(recipe("--tokens", "5120", "--eval-every", every), Path(f"runs/{every}"))
    assert_same_state(Path("runs/5"), Path("runs/1000"))


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_accumulation_and_processes_equal_one_big_batch(here, packing):
    """The same global batch in one piece, in four, and on two processes, clipped at every step, with padding and without:
    losses and weights within 1e-5."""
    flags = ["--data", "data/short", "--tokens", "5120", "--clip", "0.1", "--packing", packing]
    train.train(recipe(*flags, "--micro-batch", "8"), Path("runs/whole"))
    train.train(recipe(*flags, "--micro-batch", "2"), Path("runs/parts"))
    done = torchrun(TRAIN, *TINY, *flags, "--micro-batch", "2", "--name", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Done") == 1
    assert min(entry["grad_norm"] for entry in log_of(Path("runs/two")) if "grad_norm" in entry) > 0.1
    for other in ("parts", "two"):
        assert losses(Path(f"runs/{other}")) == pytest.approx(losses(Path("runs/whole")), abs=1e-5)
        for name, weight in state(Path("runs/whole"))[0].items():
            torch.testing.assert_close(state(Path(f"runs/{other}"))[0][name], weight, atol=1e-5, rtol=1e-5)


def test_damaged_checkpoint_is_passed_over(here, capsys):
    train.train(recipe("--tokens", "5120", "--save-every", "10"), Path("runs/a"))
    *_, good, bad = sorted(Path("runs/a/checkpoints").iterdir())
    raw = bytearray((bad / "model.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (bad / "model.pt").write_bytes(raw)
    assert newest_checkpoint("runs/a") == good and "sha256" in capsys.readouterr().err
    assert isinstance(from_pretrained("runs/a"), GPT)
    with pytest.raises(UserError, match="sha256"):
        from_pretrained(bad)


def test_resume_refuses_other_data_and_other_sizes(here, monkeypatch):
    train.train(recipe("--tokens", "2560"), Path("runs/a"))
    done = call(train.main, "--resume", "runs/a", "--hidden-size", "64")
    assert done.returncode == 2 and "--hidden_size" in done.stderr
    text = {name: [(f"{i}", f"other text {i} of {name}") for i in range(200)] for name in ("left", "right")}
    tokenizer = Tokenizer.load("data/tiny")
    shutil.rmtree("data/tiny")
    d.prepare(text, "data/tiny", tokenizer)
    with pytest.raises(UserError, match="not the data"):
        train.train(train.read_recipe(Path("runs/a"))[0], Path("runs/a"), resume=True)


def test_without_document_masks(here):
    """It trains, and the masks do change what is learned."""
    for mask in ("true", "false"):
        train.train(recipe("--tokens", "2560", "--document-mask", mask), Path(f"runs/{mask}"))
    assert losses(Path("runs/true")) != losses(Path("runs/false"))


def test_a_loss_that_is_not_finite_stops_before_the_update(here):
    done = command("--tokens", "25600", "--learning-rate", "1e30", "--save-every", "1", "--warmup-steps", "1")
    assert done.returncode == 2 and "--learning_rate" in done.stderr and "Traceback" not in done.stderr
    assert all(p.isfinite().all() for p in from_pretrained("runs/laptop").parameters())
    steps = len(losses(Path("runs/laptop")))
    assert newest_checkpoint("runs/laptop").name == f"step-{steps:08d}"


def test_stages_change_context_rope_base_and_rate(here):
    """SmolLM3's curriculum in small: the run's schedule ends with its third stage; the long ones have a rate of their own.
    Stopped in a long stage and resumed, it ends bit for bit the same."""
    stages = (d.Stage("base", 5120, {}), d.Stage("decay", 2560, {}),
              d.Stage("long", 2560, {}, context=64, rope_theta=2e6, learning_rate=0.004, warmup_steps=2))
    job = replace(recipe("--eval-every", "1000"), stages=stages, decay_share=-1, learning_rate=0.01)
    train.train(job, Path("runs/a"))
    rates = [entry["lr"] for entry in log_of(Path("runs/a")) if "loss" in entry]
    assert rates[2:20] == [0.01] * 18 and rates[20:30] == pytest.approx([0.01 * (1 - i / 10) for i in range(1, 11)])
    assert rates[30:32] == pytest.approx([0.002, 0.004], rel=0.06) and rates[39] == pytest.approx(0, abs=1e-12)
    assert all(x >= y for x, y in zip(rates[31:], rates[32:])) and len(rates) == 40
    model = from_pretrained("runs/a")
    assert (model.config.rope_theta, model.config.max_position_embeddings) == (2e6, 64)
    base = from_pretrained("runs/a/checkpoints/step-00000020")  # the ends of stages stay
    assert (base.config.rope_theta, base.config.max_position_embeddings) == (job.model.rope_theta, 32)
    shutil.copytree("runs/a", "runs/b")
    for step in (40,):
        shutil.rmtree(f"runs/b/checkpoints/step-{step:08d}")
    train.train(train.read_recipe(Path("runs/b"))[0], Path("runs/b"), resume=True)
    assert losses(Path("runs/b")) == losses(Path("runs/a"))
    assert_same_state(Path("runs/a"), Path("runs/b"))


def test_annealing_is_one_command(here):
    """40 % of the base mixture and 60 % of the candidate, from the weights after the first stage, the rate falling to 0."""
    train.train(replace(recipe(), stages=(d.Stage("base", 2560, {"left": 0.75, "right": 0.25}), d.Stage("decay", 1280, {}))),
                Path("runs/a"))
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--anneal", "runs/a", "--candidate", "right",
                           "--tokens", "5120"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step-00000010" in done.stdout and "30% left, 70% right" in done.stdout
    entries = [entry for entry in log_of(Path("runs/anneal-right")) if "loss" in entry]
    assert len(entries) == 20 and entries[0]["lr"] == pytest.approx(3e-3 * 0.95) and entries[-1]["lr"] == 0
    assert entries[0]["loss"] < losses(Path("runs/a"))[0]  # it does begin with the trained weights
    wrong = subprocess.run([sys.executable, str(ROOT / "train.py"), "--anneal", "runs/a", "--candidate", "poems"],
                           capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "no source of data/tiny; take left or right" in wrong.stderr


def test_the_smollm3_recipe_is_the_published_one():
    """Steps and proportions of huggingface/smollm's configurations (FACTS: 4,720,000 steps, then 20,000 and 22,000)."""
    job = train.RECIPES["smollm3"]
    ends = np.cumsum([stage.tokens for stage in job.stages]) / job.batch_tokens
    assert ends[2] == pytest.approx(4_720_000, rel=1e-3)
    assert np.diff(ends)[2:] == pytest.approx([20_000, 22_000], rel=1e-3)
    assert job.stages[2].tokens / sum(stage.tokens for stage in job.stages[:3]) == pytest.approx(522_000 / 4_720_000, abs=5e-4)
    assert [(stage.context or job.model.max_position_embeddings, stage.rope_theta or job.model.rope_theta)
            for stage in job.stages] == [(4096, 5e4)] * 3 + [(32768, 2e6), (65536, 5e6)]
    published = {  # per cent of huggingface/smollm's five stages: English, multilingual, code, math, reasoning and questions
        "base": (72.4, 12.0, 12.9, 2.7, 0), "quality": (64.7, 11.7, 14.5, 9.1, 0), "decay": (51.2, 12.3, 23.4, 13.1, 0.1),
        "long-32k": (40.7, 11.1, 22.8, 14.8, 10.6), "long-64k": (46.6, 10.8, 20.0, 13.0, 9.6)}
    for stage in job.stages:
        shares = [100 * stage.mixture.get(name, 0) for name in ("english", "multilingual", "code", "math", "reasoning")]
        assert shares == pytest.approx(published[stage.name]) and sum(shares) == pytest.approx(100, abs=0.11)
    laptop = train.RECIPES["laptop"].stages
    assert [stage.name for stage in laptop] == [stage.name for stage in job.stages[:3]]
    assert laptop[2].tokens / sum(stage.tokens for stage in laptop) == pytest.approx(0.2)


@pytest.mark.cuda
def test_loader_copies_from_pinned_memory_ahead_of_time(here):
    job = train.set_up(replace(recipe(), device="cuda", dtype="auto"), train.World(), Path("runs/none"), False)
    keys = [(step, 0, job.rows) for step in range(4)]
    for now, following in zip(keys, keys[1:]):
        got = job.loader.get(now, following)
        expected = job.curriculum.batch(*now)
        assert following in job.loader.ahead and all(x.is_pinned() for x in job.loader.ahead[following].result())
        assert (got[0].cpu().numpy() == expected.tokens).all() and (got[2].cpu().numpy() == expected.cu_seqlens).all()


@pytest.mark.parametrize("flags, words", [
    (["--learning-rat", "1"], "did you mean --learning_rate"),
    (["--batch-tokens", "100"], "96 and 128"),
    (["--micro-batch", "3"], "2 and 4"),
    (["laptob"], "take laptop"),
    (["--seed", "-1"], "--seed -1"),
    (["--learning-rate", "nan"], "--learning_rate nan"),
    (["--rope-theta", "0"], "rope_theta"),
    (["--num-attention-heads", "5"], "does not divide"),
    (["--resume", "runs/none"], "not a run"),
    (["--schedule", "wds"], "wsd, cosine"),
    (["--num-key-value-heads", "3"], "take one of [1, 2]"),
    (["--learning-rate", "fast"], "learning_rate"),
    (["--data", "nowhere"], "data.py prepare"),
    (["--max-position-embeddings", "65536", "--batch-tokens", "65536"], "fewer than one sequence"),
])
def test_bad_input_is_one_sentence_and_nothing_is_written(here, flags, words):
    before = sorted(p for p in here.rglob("*"))
    done = call(train.main, *TINY, *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1, done.stderr
    assert sorted(p for p in here.rglob("*")) == before


def test_every_flag_has_its_help():
    done = call(train.main, "--help")
    assert done.returncode == 0
    comments = train.field_comments(train.ModelConfig, train.Recipe)
    for name in train.FLAGS:
        assert f"--{name}" in done.stdout and comments[name]


def test_recipes_are_consistent():
    for name, job in train.RECIPES.items():
        train.micro_batch_rows(job, train.World(), "cpu")
        assert job.stages, name
    assert UserError is train.UserError


HYBRID = ["--num-experts", "4", "--layer-types", "linear,full", "--router-bias-update-rate", "0.01", "--z-loss", "1e-4"]


def test_experts_and_linear_layers_train_resume_exactly_and_log_their_balance(here):
    train.train(recipe("--tokens", "2560", *HYBRID), here / "runs/whole")
    train.train(recipe("--tokens", "2560", "--save-every", "5", *HYBRID), here / "runs/cut")
    shutil.rmtree(sorted((here / "runs/cut/checkpoints").iterdir())[-1])
    train.train(train.read_recipe(here / "runs/cut")[0], here / "runs/cut", resume=True)
    assert_same_state(here / "runs/whole", here / "runs/cut")  # the routers' biases included
    steps = [entry for entry in log_of(here / "runs/whole") if "loss" in entry]
    assert all(len(entry["expert_load"]) == 2 and 1 <= min(entry["expert_load"]) for entry in steps)
    assert state(here / "runs/whole")[0]["model.layers.0.mlp.gate.e_score_correction_bias"].any()
