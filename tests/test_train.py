"""train.py as a user runs it: a run from text to sample, exact resume, stages, bad input."""

import functools
import importlib.util
import json
import math
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

import ablate
import cost
import data as d
import evals
import sample
import train
from checkpoint import from_pretrained, find_checkpoint
from conftest import TRAIN, call
from data import Stage
from model import GPT, ModelConfig
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
    d.prepare({name: [(key, document[:rng.integers(36, 50)]) for key, document in documents[:60] if len(document) > 50]
               for name, documents in text.items()}, root / "data/short", tokenizer)
    return root


look_at_machine, measure_speed = functools.cache(cost.find_machine), cost.measure_speed


def hasten(monkeypatch) -> None:
    """The machine is looked at once, its speed measured by two steps, no curve is drawn."""
    monkeypatch.setattr(cost, "find_machine", look_at_machine)
    monkeypatch.setattr(cost, "measure_speed", lambda *words: measure_speed(*words[:3], 0.0, *words[4:]))
    monkeypatch.setattr(train, "draw_log", lambda folder: False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    hasten(monkeypatch)


@pytest.fixture
def here(corpus, quick, tmp_path, monkeypatch) -> Path:
    shutil.copytree(corpus / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*flags: str) -> train.Recipe:
    return train.parse([*TINY, *flags])[1]


def prepared(*flags: str) -> train.Run:
    """A run that has not begun; nothing is written."""
    return train.set_up(recipe(*flags), Path("runs/none"))


def pretrain(name: str, *flags: str) -> Path:
    """A whole run."""
    train.pretrain(recipe(*flags), Path("runs") / name)
    return Path("runs") / name


def resume(folder: Path, **changes) -> None:
    train.pretrain(replace(train.read_recipe(folder)[0], **changes), folder, resume=True)


def one_update(run: train.Run, step: int, losses: list | None = None) -> dict[str, float]:
    run.step = step
    return train.update(run, losses or train.pretraining_losses(run, step), run.rate(step)).read()


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def state(folder: Path) -> tuple[dict, dict]:
    last = find_checkpoint(folder)
    return (torch.load(last / "model.pt", weights_only=True), torch.load(last / "optimizer.pt", weights_only=True))


def assert_same_state(a: Path, b: Path) -> None:
    for x, y in zip(state(a), state(b)):
        x, y = (torch.utils._pytree.tree_leaves(tree) for tree in (x, y))
        assert len(x) == len(y)
        assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(x, y))


def cut(folder: Path, name: str, step: int) -> Path:
    """A copy of a run as it was after a step, except for its log, which knows more."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return copy


# ---- a whole run ----------------------------------------------------------------------------------------------


def test_a_run_from_text_to_sample(here, monkeypatch):
    """The main job in small: the loss falls, everything is in the run folder, and sample.py picks it up. The run is
    named after its data, and equal stages are one."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    done = call(train.main, *TINY, "--tokens", "15.36k", "--learning-rate", "0.01", "--eval-every", "25")
    assert done.returncode == 0, done.stderr
    for word in ("machine ", "model ", "plan ", "6ND", "stage     train", "minutes", "held-out bits per byte",
                 "Done: runs/tiny"):
        assert word in done.stdout
    folder = here / "runs/tiny"
    log = log_of(folder)
    steps = [e for e in log if "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 61)) and steps[-1]["tokens"] == 15_360
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and steps[-1]["lr"] == 0
    assert max(e["lr"] for e in steps) == 0.01 and steps[0]["lr"] == pytest.approx(0.01 / 3)
    assert min(e["step"] for e in steps if e["lr"] < 0.01 and e["step"] > 3) == 49  # the decay: the last 12 steps
    scores = [e for e in log if "val" in e]
    assert [e["step"] for e in scores] == [1, 25, 50, 60] and set(scores[-1]["val"]) == {"left", "right"}
    assert scores[-1]["val"]["left"] < scores[0]["val"]["left"]
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "loss.png").stat().st_size > 5000
    sampled = call(sample.main, "--prompt", "ab ", "--temperature", "0", "--max-tokens", "8")
    assert sampled.returncode == 0 and sampled.stdout.startswith("ab "), sampled.stderr
    again = call(train.main, *TINY, "--tokens", "512")  # a second run overwrites nothing
    assert again.returncode == 0 and (here / "runs/tiny-2").is_dir() and log_of(folder) == log


def test_minutes_become_tokens(here, monkeypatch):
    """At 1,000 tokens a second half a minute is 30,000 tokens, 117 steps; a second is too short, and a minute named."""
    monkeypatch.setattr(cost, "measure_training", lambda *_: 1000.0)
    monkeypatch.setattr(train, "train", lambda run: {})
    done = call(train.main, *TINY, "--minutes", "0.5")
    assert done.returncode == 0 and train.read_recipe(Path("runs/tiny"))[0].tokens == 30_000, done.stderr
    assert "step 0 of 117" in done.stdout
    done = call(train.main, *TINY, "--minutes", "0.01")
    assert done.returncode == 2 and "--minutes 0.01 is under 20 steps; give 0.085" in done.stderr


def test_ctrl_c_saves_and_says_how_to_resume(here):
    process = subprocess.Popen([sys.executable, TRAIN, *TINY, "--tokens", "1e6"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, end = Path("runs/tiny"), time.time() + 60
    while time.time() < end and not ((folder / "log.jsonl").exists() and len(losses(folder)) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "python train.py --resume runs/tiny" in errors and "Traceback" not in errors
    assert find_checkpoint(folder).name == f"step-{len(losses(folder)):08d}"


def test_tasks_are_scored_during_training(here):
    """--eval_tasks: in the log, with errors and chance, and `evals.py criteria` reads them from there."""
    question = json.dumps({"context": "ab", "choices": ["cd", "ef", "gh"], "answer": 0})
    (here / "my.jsonl").write_text(f"{question}\n" * 6)
    done = call(train.main, *TINY, "--tokens", "1024", "--eval-every", "2", "--eval-tasks", "my.jsonl")
    assert done.returncode == 0, done.stderr
    found = [entry["tasks"] for entry in log_of(here / "runs/tiny") if "tasks" in entry]
    assert len(found) == 3
    assert all(list(tasks) == ["my.jsonl", "my.jsonl:letters"] for tasks in found)  # both of the playbook's forms
    assert all(score[2:] == [6, 1 / 3] for tasks in found for score in tasks.values())
    for name, score in found[-1].items():
        assert f", {name} {score[0]:.3f} ± {score[1]:.3f}" in done.stdout
    told = call(evals.main, "criteria", "runs/tiny")
    assert told.returncode == 0 and "1, 2, 4: no early signal" in told.stdout
    done = call(train.main, *TINY, "--eval-tasks", "mine.jsonl")
    assert done.returncode == 2 and "there is no task mine.jsonl" in done.stderr
    assert not (here / "runs/tiny-2").exists()


# ---- losses and batches ---------------------------------------------------------------------------------------


def test_bits_per_byte_by_hand(here):
    """A model of equal logits needs log2(vocabulary) bits a target, EOS included."""
    tokenizer = Tokenizer.load("data/tiny")
    split = d.load_source("data/tiny/left", tokenizer)["val"]
    run = prepared()
    run.model.model.norm.weight.data.zero_()
    score = train.held_out_bits(run, split, 5 * 32)
    targets = split.tokens[1:5 * 32 + 1].tolist()
    size = sum(len(tokenizer.decode_bytes([t])) for t in targets if t != tokenizer.eos_id)
    assert score == pytest.approx(len(targets) * np.log2(tokenizer.vocab_size) / size)


def test_the_loss_of_padded_rows_is_the_mean_over_their_targets(here):
    """A model of equal logits has ln(vocabulary) nats a target, whatever share of the rows is padding."""
    run = prepared("--data", "data/short", "--packing", "best-fit", "--micro-batch", "2")
    run.model.model.norm.weight.data.zero_()
    batch = run.curriculum.batch(3)
    assert (batch.targets < 0).any() and run.curriculum.targets(3) == (batch.targets >= 0).sum()
    assert one_update(run, 3)["loss"] == pytest.approx(np.log(run.tokenizer.vocab_size), rel=1e-5)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_accumulation_equals_one_big_batch(here, packing):
    """The same global batch in one piece and in four, clipped at every step, with padding and without."""
    flags = ["--data", "data/short", "--tokens", "1280", "--clip", "0.1", "--packing", packing, "--micro-batch"]
    whole, parts = pretrain("whole", *flags, "8"), pretrain("parts", *flags, "2")
    assert min(entry["grad_norm"] for entry in log_of(whole) if "grad_norm" in entry) > 0.1
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    for name, weight in state(whole)[0].items():
        torch.testing.assert_close(state(parts)[0][name], weight, atol=1e-5, rtol=1e-5)


def test_without_document_masks(here):
    """It trains, and the masks do change what is learned."""
    found = [losses(pretrain(mask, "--tokens", "768", "--document-mask", mask)) for mask in ("true", "false")]
    assert found[0] != found[1]


def test_recomputed_activations_give_the_same_gradients(here):
    gradients = []
    for recompute in ("false", "true"):
        run = prepared("--activation-checkpointing", recompute, "--num-experts", "4")
        (loss_of_piece,) = train.pretraining_losses(run, 0)
        loss_of_piece()[0].backward()
        gradients.append([p.grad for p in run.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.cuda
def test_loader_copies_from_pinned_memory_ahead_of_time(here):
    run = train.set_up(replace(recipe(), device="cuda", dtype="auto"), Path("runs/none"))
    keys = [(step, 0, run.rows[0]) for step in range(4)]
    for now, following in zip(keys, keys[1:]):
        got = run.loader.get(now, following)
        expected = run.curriculum.batch(*now)
        assert all(x.is_pinned() for x in run.loader.ahead[following].result())
        assert (got[0].cpu().numpy() == expected.tokens).all() and (got[2].cpu().numpy() == expected.cu_seqlens).all()


# ---- stages ---------------------------------------------------------------------------------------------------

# SmolLM3's curriculum in small, with a stage whose batch is four times as large: steps 0, 10, 15, 25 to 35.
STAGES = (Stage("base", 2560, {}), Stage("wide", 5120, {}, batch_tokens=1024), Stage("decay", 2560, {}),
          Stage("long", 2560, {}, context=64, rope_theta=2e6, learning_rate=0.004, warmup_steps=2))


def staged() -> train.Recipe:
    flags = ["--data", "data/short", "--eval-every", "12", "--decay-share", "-1", "--learning-rate", "0.01"]
    return replace(recipe(*flags), stages=STAGES)


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    """A run through STAGES that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    shutil.copytree(corpus / "data", folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        patch.chdir(folder)
        train.pretrain(staged(), Path("straight"))
    return folder / "straight"


def test_stages_change_context_rope_base_batch_and_rate(straight):
    """Against closed forms: the run's schedule ends with its third stage; a batch of a stage's own has the rate times
    the square root of the ratio; the long stage has a rate of its own."""
    steps = [entry for entry in log_of(straight) if "loss" in entry]
    assert [entry["stage"] for entry in steps] == ["base"] * 10 + ["wide"] * 5 + ["decay"] * 10 + ["long"] * 10
    assert [entry["batch_tokens"] for entry in steps] == [256] * 10 + [1024] * 5 + [256] * 20
    assert [entry["tokens"] for entry in steps] == np.cumsum([entry["batch_tokens"] for entry in steps]).tolist()
    rates = [0.01 / 3, 0.02 / 3, *[0.01] * 8, *[0.02] * 5, *[0.01 * (1 - i / 10) for i in range(1, 11)],
             0.002, *[0.004 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]]
    assert [entry["lr"] for entry in steps] == pytest.approx(rates, abs=1e-12)
    for step, expected in ((10, (1e4, 32)), (15, (1e4, 32)), (25, (1e4, 32)), (35, (2e6, 64))):  # ends of stages stay
        config = from_pretrained(straight / f"checkpoints/step-{step:08d}").config
        assert (config.rope_theta, config.max_position_embeddings) == expected


@pytest.mark.parametrize("at", [1, 13, 31])
def test_interrupted_and_resumed_equals_straight_bit_for_bit(here, straight, at, monkeypatch):
    """Across stage boundaries and epochs: weights, moments and logged losses."""
    epochs = train.set_up(staged(), Path("runs/none")).curriculum.epochs()
    assert max(epochs.values()) > 1, epochs
    update = train.update

    def interrupt(run, *rest):
        if run.step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(run, *rest)

    monkeypatch.setattr(train, "update", interrupt)
    with pytest.raises(train.Interrupted, match="--resume runs/stopped"):
        train.pretrain(staged(), Path("runs/stopped"))
    assert len(losses(Path("runs/stopped"))) == at
    monkeypatch.setattr(train, "update", update)
    resume(Path("runs/stopped"))
    assert losses(Path("runs/stopped")) == losses(straight)
    assert_same_state(Path("runs/stopped"), straight)


def test_evaluation_does_not_change_training(here, straight):
    train.pretrain(replace(staged(), eval_every=1000), Path("runs/a"))
    assert_same_state(Path("runs/a"), straight)


def test_the_smollm3_recipe_is_the_published_one():
    """Steps and proportions of huggingface/smollm's configurations: 4,720,000 steps, then 20,000 and 22,000 of the
    first batch."""
    job = train.RECIPES["smollm3"]
    ends = np.cumsum([stage.tokens for stage in job.stages]) / job.batch_tokens
    assert ends[2] == pytest.approx(4_720_000, rel=1e-3)
    assert np.diff(ends)[2:] == pytest.approx([20_000, 22_000], rel=1e-3)
    decay = job.stages[2].tokens / sum(stage.tokens for stage in job.stages[:3])
    assert decay == pytest.approx(522_000 / 4_720_000, abs=5e-4)
    assert [(stage.context or job.model.max_position_embeddings, stage.rope_theta or job.model.rope_theta)
            for stage in job.stages] == [(4096, 5e4)] * 3 + [(32768, 2e6), (65536, 5e6)]
    published = {  # per cent of its five stages: English, multilingual, code, math, reasoning and questions
        "base": (72.4, 12.0, 12.9, 2.7, 0), "quality": (64.7, 11.7, 14.5, 9.1, 0),
        "decay": (51.2, 12.3, 23.4, 13.1, 0.1),
        "long-32k": (40.7, 11.1, 22.8, 14.8, 10.6), "long-64k": (46.6, 10.8, 20.0, 13.0, 9.6)}
    for stage in job.stages:
        names = ("fineweb-edu", "dclm", "multilingual", "code", "math", "reasoning")
        edu, dclm, *others = (100 * stage.mixture.get(name, 0) for name in names)
        shares = [edu + dclm, *others]
        ratio = {"base": 0.333 / 0.370, "quality": 0.30 / 0.33, "decay": 0.20 / 0.30}.get(stage.name, 0.35 / 0.65)
        assert edu / dclm == pytest.approx(ratio, rel=5e-3)
        assert shares == pytest.approx(published[stage.name]) and sum(shares) == pytest.approx(100, abs=0.11)
    laptop = train.RECIPES["laptop"].stages
    assert [stage.name for stage in laptop] == [stage.name for stage in job.stages[:3]]
    assert laptop[2].tokens / sum(stage.tokens for stage in laptop) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("name", train.RECIPES)
def test_recipes_divide_among_processes_or_say_what_would(name):
    """In every stage, or the sentence names the nearest batch, which then works."""
    job, worked = train.RECIPES[name], []
    for processes in (1, 2, 8, 32, 384):
        for _ in range(len(job.stages) + 1):  # one sentence a stage at most
            try:
                rows = cost.stage_rows(job, processes, "cpu")
                break
            except UserError as error:
                stages = [stage for stage in job.stages if f"stage {stage.name}:" in str(error)]
                assert len(stages) == 1, error
                nearest = [int(word.strip(".,;")) for word in str(error).split("give ")[1].replace(",", "").split()
                           if word.strip(".,;").isdigit()]
                unit = (stages[0].context or job.model.max_position_embeddings) * processes
                assert nearest and all(batch % unit == 0 for batch in nearest), error
                batch = stages[0].batch_tokens or job.batch_tokens
                assert any(abs(batch - n) == min(batch % unit, -batch % unit) or batch < unit for n in nearest), error
                job = replace(job, stages=tuple(replace(stage, batch_tokens=nearest[0]) if stage == stages[0] else stage
                                                for stage in job.stages))
        else:
            pytest.fail(f"{name} on {processes} processes: the advice does not help")
        worked += [processes] * (job == train.RECIPES[name])
        for stage, count in zip(job.stages, rows):
            row_tokens = (stage.context or job.model.max_position_embeddings) * processes * count
            assert (stage.batch_tokens or job.batch_tokens) % row_tokens == 0
        job = train.RECIPES[name]
    assert worked[:1] == [1] and (name != "smollm3" or {8, 32} <= set(worked))


def test_annealing_is_one_command(here):
    """40 % of the base mixture and 60 % of the candidate, from the weights after the first stage, the rate falling
    to 0."""
    stages = (Stage("base", 2560, {"left": 0.75, "right": 0.25}), Stage("decay", 1280, {}))
    train.pretrain(replace(recipe(), stages=stages), Path("runs/a"))
    done = call(train.main, "--anneal", "runs/a", "--candidate", "right", "--tokens", "5120")
    assert done.returncode == 0, done.stderr
    assert "step-00000010" in done.stdout and "30% left, 70% right" in done.stdout
    entries = [entry for entry in log_of(Path("runs/anneal-right")) if "loss" in entry]
    assert len(entries) == 20 and entries[0]["lr"] == pytest.approx(3e-3 * 0.95) and entries[-1]["lr"] == 0
    assert entries[0]["loss"] < losses(Path("runs/a"))[0]  # it does begin with the trained weights
    control = call(train.main, "--anneal", "runs/a", "--tokens", "5120")  # the base mixture alone
    assert "75% left, 25% right" in control.stdout and len(losses(Path("runs/anneal-control"))) == 20
    wrong = call(train.main, "--anneal", "runs/a", "--candidate", "left", "--mixture", "left=1")
    assert wrong.returncode == 2 and "a --candidate such as math or a --mixture" in wrong.stderr
    wrong = call(train.main, "--anneal", "runs/a", "--candidate", "poems")
    assert wrong.returncode == 2 and "has no poems; it has left, right" in wrong.stderr


def test_a_long_run_on_a_cpu_is_compiled(here, monkeypatch, capsys):
    """More than ten minutes by its measured speed; a resumed run does what it began with, however fast it is then;
    without a compiler it trains all the same."""
    def plan(backend, speed, folder, again=False):
        """Whether a run of 2,560 tokens is compiled that far, and what it prints; a checkpoint is there afterwards."""
        torch._dynamo.reset()
        monkeypatch.setattr(cost, "measure_speed", lambda *words: measure_speed(*words[:3], 0.0) and speed)
        monkeypatch.setattr(GPT, "compile_blocks", functools.partialmethod(compile_blocks, backend=backend))
        run = train.set_up(train.read_recipe(folder)[0] if again else recipe("--tokens", "2560"), folder, resume=again)
        out = capsys.readouterr().out
        if not again:
            train.train(train.connect(run), evaluate=lambda *_: {})
            shutil.rmtree(sorted(folder.glob("checkpoints/*"))[-1])
        assert train.read_recipe(folder)[0].compile == str(run.model.compiled).lower()
        return run.model.compiled, "machine   compile on: " in out, "compile   off: it failed here" in out

    def fails(*_):
        raise RuntimeError("no C++ compiler was found")

    compile_blocks, graphs = GPT.compile_blocks, []
    def counting(graph, _):
        graphs.append(graph)
        return graph

    slow, fast, long, short = 2560 / 601, 2560 / 599, Path("runs/long"), Path("runs/short")
    assert plan(counting, fast, short) == (False, False, False) and not graphs
    assert plan(counting, slow, short, again=True) == (False, False, False) and not graphs
    assert plan(counting, slow, long) == (True, True, False) and graphs
    assert plan(counting, fast, long, again=True) == (True, False, False)
    assert plan(fails, slow, Path("runs/none")) == (False, True, True) and len(losses(Path("runs/none"))) == 10
    ablated = ablate.recipe_from([*TINY, "--tokens", "1e6"])  # arms are compared: none is compiled
    assert ablated.compile == "false"


def test_a_mixture_is_a_flag(here):
    """Batches have it, stage by stage; recipe.json keeps it, so that a resumed run has it too and cannot change it."""
    words = [*TINY, "--tokens", "6400", "--name", "a", "--mixture", "left=3,right=1;decay:right=1"]
    done = call(train.main, *words)
    assert done.returncode == 0 and "75% left, 25% right" in done.stdout and "sum to 4" in done.stdout, done.stderr
    folder = Path("runs/a")
    saved = train.read_recipe(folder)[0]
    assert [stage.mixture for stage in saved.stages] == [{"left": 3, "right": 1}] * 2 + [{"right": 1}]
    plain = train.RECIPES["laptop"].stages
    assert [stage.name for stage in saved.stages] == [stage.name for stage in plain]  # nothing else differs
    assert [stage.tokens for stage in saved.stages] == pytest.approx([stage.tokens * 6400 / 2.7e6 for stage in plain])
    run = train.set_up(saved, folder, resume=True)
    counts = np.zeros((3, 2), int)
    for step in range(run.steps):
        np.add.at(counts[run.curriculum.stage(step)], run.curriculum.locate(step, 0, run.curriculum.rows(step))[0], 1)
    assert counts[2, 0] == 0 < counts[2, 1] and abs(counts[:2, 0] / counts[:2].sum(1) - 0.75).max() < 0.03
    wrong = call(train.main, "--resume", folder, "--mixture", "left=1")
    assert wrong.returncode == 2 and "cannot change --mixture" in wrong.stderr


# ---- checkpoints ----------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_another_begins_with_its_weights(here, capsys):
    folder = pretrain("a", "--tokens", "5120", "--save-every", "3", "--keep", "9")
    resume(folder)
    out = capsys.readouterr().out
    assert "runs/a, step 20 of 20" in out and len(losses(folder)) == 20
    told = "python train.py --data data/tiny --start runs/a/checkpoints/step-00000015 --tokens {} --seed 1"
    assert told.format(5120) in out  # the rate falls from step 17 on
    longer = call(train.main, "--resume", "runs/a", "--tokens", "1M")
    assert longer.returncode == 2 and told.format("1e+06") in longer.stderr
    done = call(train.main, *TINY, "--start", "runs/a", "--tokens", "512", "--hidden-size", "64")
    assert done.returncode == 2 and "a model of other sizes" in done.stderr and "Traceback" not in done.stderr
    pretrain("b", *told.format(512).split()[2:])
    begun, early = (torch.load(f"runs/{name}/model.pt", weights_only=True)
                    for name in ("b/checkpoints/step-00000000", "a/checkpoints/step-00000015"))
    assert all(torch.equal(weight, begun[name]) for name, weight in early.items())
    assert {float(kinds["step"]) for kinds in state(Path("runs/b"))[1].values()} == {17.0}  # and with its moments


def test_which_checkpoints_stay(here):
    """The newest, the ends of stages, and multiples of --keep-every."""
    job = replace(recipe("--save-every", "2", "--keep", "1", "--keep-every", "6"),
                  stages=(Stage("a", 7 * 256, {}), Stage("b", 4 * 256, {}), Stage("c", 9 * 256, {})))
    train.pretrain(job, Path("runs/a"))
    steps = {int(path.name[5:]) for path in Path("runs/a/checkpoints").iterdir()}
    assert steps - {0} == {6, 12, 18, 7, 11, 20}


def test_damaged_checkpoint_is_skipped(here, capsys):
    folder = pretrain("a", "--tokens", "1024", "--save-every", "2")
    *_, good, bad = sorted((folder / "checkpoints").iterdir())
    raw = bytearray((bad / "model.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (bad / "model.pt").write_bytes(raw)
    assert find_checkpoint(folder) == good and "sha256" in capsys.readouterr().err
    assert isinstance(from_pretrained(folder), GPT)
    with pytest.raises(UserError, match="sha256"):
        from_pretrained(bad)
    before = losses(folder)
    resume(folder)
    assert losses(folder) == before and find_checkpoint(folder) == bad


def test_resume_refuses_other_data_and_other_sizes(here):
    folder = pretrain("a", "--tokens", "256")
    done = call(train.main, "--resume", "runs/a", "--hidden-size", "64", "--seed", "3")
    assert done.returncode == 2 and "--hidden_size" in done.stderr and "--seed" in done.stderr
    text = {name: [(f"{i}", f"other text {i} of {name}") for i in range(200)] for name in ("left", "right")}
    tokenizer = Tokenizer.load("data/tiny")
    shutil.rmtree("data/tiny")
    d.prepare(text, "data/tiny", tokenizer)
    with pytest.raises(UserError, match="not the data"):
        resume(folder)


HYBRID = ["--num-experts", "4", "--layer-types", "linear,full", "--router-bias-update-rate", "0.01", "--z-loss", "1e-4"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_and_linear_layers_train_resume_exactly_and_log_their_balance(here, optimizer):
    whole = pretrain("whole", "--tokens", "1024", "--save-every", "2", "--optimizer", optimizer, *HYBRID)
    copy = cut(whole, "cut", 2)
    resume(copy)
    assert_same_state(whole, copy)  # the routers' biases included
    assert any("momentum_buffer" in moments for moments in state(whole)[1].values()) == (optimizer == "muon")
    steps = [entry for entry in log_of(whole) if "loss" in entry]
    assert all(1 <= entry["expert_load"] <= 4 for entry in steps)
    assert state(whole)[0]["model.layers.0.mlp.gate.e_score_correction_bias"].any()


# ---- bad input ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update(here):
    done = call(train.main, *TINY, "--tokens", "25.6k", "--learning-rate", "1e30", "--save-every", "1",
                "--warmup-steps", "1")
    assert done.returncode == 2 and "--learning_rate" in done.stderr and "Traceback" not in done.stderr
    folder = Path("runs/tiny")
    assert all(p.isfinite().all() for p in from_pretrained(folder).parameters())
    assert find_checkpoint(folder).name == f"step-{len(losses(folder)):08d}"


@pytest.mark.parametrize("flags, words", [
    (["--learning-rat", "1"], "did you mean --learning_rate"),
    (["--batch-tokens", "100"], "96 or 128"),
    (["--micro-batch", "3"], "take one of 1, 2, 4"),
    (["laptob"], "take laptop"),
    (["--model", "gpt-9"], "smollm2-135m"),
    (["data/tiny"], "folder of data --data data/tiny"),
    (["--seed", "-1"], "--seed -1"),
    (["--learning-rate", "nan"], "--learning_rate nan"),
    (["--rope-theta", "0"], "rope_theta"),
    (["--num-attention-heads", "5"], "does not divide"),
    (["--schedule", "wds"], "wsd, cosine"),
    (["--num-key-value-heads", "3"], "take one of [1, 2]"),
    (["--learning-rate", "fast"], "learning_rate"),
    (["--batch-tokens", "1.5"], "batch_tokens"),
    (["--data", "nowhere"], "data.py prepare"),
    (["--max-position-embeddings", "65536", "--batch-tokens", "32768"], "give --batch_tokens 65536"),
    (["--anneal", "runs/none"], "takes its run's recipe and model"),
    (["--mixture", "poems=1"], "the data has no poems; it has left, right"),
    (["--mixture", "late:left=1"], "the stages are base, quality, decay"),
    (["--data", "data/english"], '"Data of the recipes" in docs/playbook.md'),
    (["--decay-share", "-0.5"], "neither"),
    (["--log", "excel"], "tensorboard, wandb"),
])
def test_bad_input_is_one_sentence_and_nothing_is_written(here, flags, words):
    before = sorted(p for p in here.rglob("*"))
    done = call(train.main, *TINY, *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1, done.stderr
    assert sorted(p for p in here.rglob("*")) == before


def test_resuming_what_is_no_run_is_one_sentence(here):
    done = call(train.main, "--resume", "runs/none")
    assert done.returncode == 2 and done.stderr.startswith("error: runs/none/recipe.json cannot be read")
    assert "no run; give one such as runs/laptop" in done.stderr and done.stderr.count("\n") == 1
    assert not Path("runs").exists()


def test_numbers_may_be_short():
    job = recipe("--tokens", "2M", "--batch-tokens", "8k", "--eval-every", "1e3")
    assert (job.tokens, job.batch_tokens, job.eval_every) == (2e6, 8000, 1000)


def test_every_flag_has_its_help():
    done = call(train.main, "--help")
    text = "".join(done.stdout.split())  # lines break anywhere
    assert done.returncode == 0
    for kind in (train.Recipe, ModelConfig):
        for field in kind.__dataclass_fields__.values():
            if field.metadata:
                assert f"--{field.name}" in text and "".join(field.metadata["help"].split()) in text, field.name
