"""Ablations: short trainings that answer one question before a long one is paid for.

Ablations and debugging cost the playbook 58 % of what SmolLM3's main run did: each changes one thing on a small budget,
because what is not tested on your own baseline is a guess. Every command trains what `train.py` would train, in one
process; `change`, `lr-range`, `spikes` and `fit` take its recipe and flags.

    python ablate.py change laptop --try num_key_value_heads=2 --try position=none    # each alone, and the seeds' noise
    python ablate.py lr-range laptop                       # one short run whose rate grows until the loss diverges
    python ablate.py spikes laptop                         # what a stretch of broken data costs, and what a guard saves
    python ablate.py fit                                   # a ladder of sizes and its scaling law
    python ablate.py branch runs/laptop --multiples 1,2,4  # the critical batch size at its newest checkpoint
    python ablate.py noise runs/laptop                     # the gradient noise scale there, without training

`branch` and `noise` also take one checkpoint, such as runs/laptop/checkpoints/step-00000859: the critical batch grows
during training, so ask again later.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import cost
import schedule
import train
from checkpoint import Log, find_checkpoint, load_checkpoint, new_run_folder, newest_checkpoint, write_json
from data import load_data
from model import count_parameters
from tokenizer import Parser, UserError, add_options, check_options, draw, given_options, option, parse_options
from tokenizer import run as run_command

NOWHERE = Path("runs/none")  # the folder of runs that write nothing
progress = functools.partial(tqdm, leave=False, mininterval=0.5 if sys.stderr.isatty() else 10)


@contextlib.contextmanager
def quietly():
    """Hides the plans and samples that training prints. A signal that stopped a training stops what follows, too."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield
        except train.Interrupted as stop:
            raise KeyboardInterrupt from stop


def recipe_of(words: list[str]) -> train.Recipe:
    """The recipe that train.py would make of a command line."""
    args, recipe = train.parse(words)
    for name in ("resume", "minutes", "check", "name"):
        if getattr(args, name):
            raise UserError(f"--{name} belongs to train.py alone; leave it out here")
    return recipe


def settled(recipe: train.Recipe) -> train.Recipe:
    """With device, dtype and compilation decided once, so that all trainings that are compared compute alike."""
    return cost.settle(recipe, cost.choose_machine(recipe), 1, recipe.model.max_position_embeddings)


def updates(run: train.Run, rates: Iterable[float], label: str) -> Iterator[float]:
    """The loss of one update at each rate, from `run.step` on; nothing is logged or saved."""
    for rate in progress(rates, desc=label):
        train.enter_stage(run)
        report = train.update(run, train.pretraining_losses(run, run.step), rate)
        run.step += 1
        yield report.read()["loss"]


def held_out_scores(run: train.Run) -> dict[str, float]:
    """Held-out bits per byte of each source, with the model as it is now."""
    train.enter_stage(run)
    return {s["val"].name: train.bits_per_byte(run, s["val"], run.recipe.eval_tokens) for s in run.sources}


def mean_score(scores: dict[str, float]) -> float:
    """The mean over sources; without generated math, which is learned in a jump that no law describes."""
    return float(np.mean([score for name, score in scores.items() if name != "math"] or list(scores.values())))


def draw_lines(path: Path, lines: dict[str, tuple], **labels: str) -> None:
    """Draws {label: (x, y, format)}, where matplotlib is installed."""
    def paint(axes) -> None:
        for label, (x, y, style) in lines.items():
            axes.plot(x, y, style, label=label, lw=1)
        axes.set(**labels)
        axes.legend()

    if draw(path, paint):
        print(f"The picture is in {path}")


# ---- one change at a time -------------------------------------------------------------------------------------


@dataclass
class ChangeOptions:
    words: list[str]  # recipe and flags of train.py
    seeds: int = option(3, "trainings of each; a single one would not show the noise", 2)
    out: str = option("runs/changes", "folder of the trainings, and of changes.png where matplotlib is installed")
    tries: list[str] | None = None  # each "NAME=VALUE", or several that belong together: flags of train.py


# Student's t for 1 to 9 degrees of freedom: 95 % lie within so many standard errors. For more, the last is a bit wide.
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def paired_difference(baseline: list[float], changed: list[float]) -> tuple[float, float]:
    """The mean difference of runs of the same seed, and the half width of its 95 % confidence interval.

    Runs of the same seed read the same data in the same order and, where shapes agree, begin with the same weights:
    luck that both share cancels, so pairs show smaller differences than two means do.
    """
    differences = np.subtract(changed, baseline)
    n = len(differences)
    return float(differences.mean()), T95[min(n, 10) - 2] * float(differences.std(ddof=1)) / math.sqrt(n)


def verdict(difference: float, half_width: float) -> str:
    """What a difference in held-out bits per byte (lower is better) says."""
    if difference == half_width == 0:
        return "exactly the same losses"
    if abs(difference) <= half_width:
        return f"no difference seen; one under about {2 * half_width:.4f} may not show"
    return "better" if difference < 0 else "worse"


def changed_recipes(given: list[str], tries: list[str]) -> dict[str, train.Recipe]:
    """The recipe of the given words as "baseline", and it with each of the tries."""
    recipes = {"baseline": recipe_of(given)}
    for words in tries:
        if not (names := set(re.findall(r"([\w-]+)=\S+", words))) or len(words.split()) != words.count("="):
            raise UserError(f"--try {words!r} is not NAME=VALUE of a flag of train.py, such as num_key_value_heads=2")
        if fixed := {name.replace("-", "_") for name in names} & {"seed", "eval_tokens", "data"}:
            raise UserError(f"--try {words} changes what is measured with; give --{fixed.pop()} to all, or compare "
                            "data with `python train.py --anneal RUN --candidate SOURCE`")
        recipes[words] = recipe_of([*given, *(f"--{word}" for word in words.split())])
        if recipes[words] == recipes["baseline"]:
            raise UserError(f"--try {words} changes nothing: the baseline has it already")
    return {name: replace(recipe, eval_every=10**9) for name, recipe in recipes.items()}  # evaluated at the end


def code_and_data(recipe: train.Recipe) -> list:
    """Hashes of all that a training depends on besides its recipe."""
    with quietly():
        tokenizer, sources = load_data(recipe.data, recipe.model.vocab_size)
    code = [hashlib.sha256(Path(__file__).with_name(f"{name}.py").read_bytes()).hexdigest()
            for name in ("train", "data", "schedule", "model", "evals")]
    return [code, tokenizer.hash, [(split.name, split.sha256) for source in sources for split in source.values()]]


def fingerprint(recipe: train.Recipe, around: list) -> str:
    """Changes with whatever changes a training; `around`: from `code_and_data`."""
    start = (find_checkpoint(recipe.start) / "manifest.json").read_text("utf-8") if recipe.start else ""
    return hashlib.sha256(json.dumps([asdict(recipe), start, around]).encode()).hexdigest()[:16]


def train_arm(recipe: train.Recipe, folder: Path) -> dict:
    """Trains a recipe, or resumes it where it was stopped; returns what is compared."""
    resume = any((folder / "checkpoints").glob("step-*"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    with quietly():
        run = train.connect(train.set_up(recipe, folder, resume=resume))
        try:
            train.train(run)
            found = {"scores": held_out_scores(run)}
        except train.Diverged as error:
            found = {"diverged": str(error).split(":")[0]}
    shutil.rmtree(folder / "checkpoints")
    speeds = [entry["tokens_per_second"] for entry in run.log.entries() if "loss" in entry]
    return found | {"step": run.step, "parameters": count_parameters(run.recipe.model)["total"],
                    "tokens_per_second": float(np.median(speeds or [0])), "seed": recipe.seed}


def change(o: ChangeOptions) -> dict[str, tuple[float, float]]:
    """One change at a time against a baseline: trains a recipe, and it with each --try alone, with every seed.

    Prints, draws and returns each try's `paired_difference` in held-out bits per byte. A finished training is a line
    of log.jsonl in the folder: the same command resumes after an interruption, and one with more tries or seeds trains
    only those.
    """
    base, folder = settled(changed_recipes(o.words, o.tries)["baseline"]), Path(o.out)
    decided = [f"--{name}={getattr(base, name)}" for name in ("device", "dtype", "compile")]
    recipes, around = changed_recipes([*o.words, *decided], o.tries), code_and_data(base)
    arms = {(name, seed): replace(recipe, seed=recipe.seed + seed)
            for seed in range(o.seeds) for name, recipe in recipes.items()}  # one seed of all before the next
    keys = {arm: fingerprint(recipe, around) for arm, recipe in arms.items()}
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, resumed_at=10**18)  # drops a line that a kill tore
    done = {entry["key"]: entry for entry in log.entries()}
    todo = [arm for arm in arms if keys[arm] not in done]
    for i, arm in enumerate(todo):
        train.say(f"training {i + 1} of {len(todo)}: {arm[0]}, seed {arms[arm].seed}")
        log.write(key=keys[arm], change=arm[0], **train_arm(arms[arm], folder / keys[arm]))
    done = {entry["key"]: entry for entry in log.entries()}
    found = compare_runs({name: [done[keys[name, seed]] for seed in range(o.seeds)] for name in recipes})

    def paint(axes) -> None:
        for i, (difference, half) in enumerate(found.values()):  # one that diverged leaves its line empty
            color = {"better": "tab:green", "worse": "tab:red"}.get(verdict(difference, half), "gray")
            axes.errorbar(difference, i, xerr=half, fmt="o", color=color, capsize=3)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_yticks(range(len(found)), found)
        axes.set(xlabel="difference in held-out bits per byte, with 95 % intervals (left is better)")

    drawn = draw(folder / "changes.png", paint, size=(8, 1 + 0.5 * len(found)))
    print(f"The trainings are in {folder}" + ", with a picture in changes.png" * drawn)
    return found


def compare_runs(runs: dict[str, list[dict]]) -> dict[str, tuple[float, float]]:
    """Prints a table of what `train_arm` returned, by change and seed; returns the changes' `paired_difference`."""
    losses = {name: [mean_score(run.get("scores", {"": math.nan})) for run in done] for name, done in runs.items()}
    base, found, wide = runs["baseline"], {}, max(map(len, runs))
    print(f"\n{'':{wide}}  parameters  tokens/s  bits per byte  difference from the baseline")
    for name, done in runs.items():
        bad = "; ".join(f"seed {run['seed']}, {run['diverged']}" for run in done if "diverged" in run)
        says = f"seeds differ by {np.std(losses[name], ddof=1):.4f} (standard deviation)"
        if name != "baseline":
            difference, half = found[name] = paired_difference(losses["baseline"], losses[name])
            says = f"diverged ({bad})" if bad else f"{difference:+.4f} ± {half:.4f}  {verdict(difference, half)}"
        elif bad:
            raise UserError(f"the baseline itself diverges ({bad}): lower its --learning_rate")
        speed, size = np.median([run["tokens_per_second"] for run in done]), done[0]["parameters"]
        print(f"{name:{wide}}{size:12,}{speed:10,.0f}{np.mean(losses[name]):15.4f}  {says}")
        if abs(ratio := size / base[0]["parameters"] - 1) > 0.02:
            print(f"{'':{wide}}  ({ratio:+.0%} parameters: part of the difference is size; change layers or width too)")
    names = " and ".join(name for name in base[0]["scores"] if name != "math")
    print(f"bits per byte: the mean over held-out {names} (lower is better). ±: the 95 % interval over "
          f"{len(base)} seeds; "
          "of 20 changes that do nothing, about one looks better or worse.")
    return found


# ---- the learning-rate range test -----------------------------------------------------------------------------


@dataclass
class RangeOptions:
    words: list[str]  # recipe and flags of train.py
    low: float = option(1e-4, "first rate", 1e-12)
    high: float = option(1.0, "last rate", 1e-12)
    steps: int = option(200, "updates", 20)


def lr_range(o: RangeOptions) -> tuple[float, float]:
    """The learning-rate range test: the rate grows by equal factors until the loss is a third above its lowest.

    Prints and draws loss against rate. Returns `schedule.suggest_rates`.
    """
    recipe = recipe_of(o.words)
    if o.low >= o.high:
        raise UserError(f"--low {o.low:g} is not below --high {o.high:g}; give a range such as --low 1e-4 --high 1")
    with quietly():
        run = train.set_up(replace(recipe, tokens=o.steps * recipe.batch_tokens), NOWHERE)
    rates, losses = [schedule.range_test_rate(step, run.steps, o.low, o.high) for step in range(run.steps)], []
    for loss in updates(run, rates, "rate grows"):
        if not math.isfinite(loss):
            break
        losses.append(loss)
        smooth = schedule.smoothed(losses)
        if len(losses) > 11 and smooth[-1] > min(smooth) * 4 / 3:
            break
    if len(losses) < 10:
        raise UserError(f"the loss diverged after {len(losses)} steps; begin with a --low below {o.low:g}")
    rates = rates[:len(losses)]
    steepest, tenth = schedule.suggest_rates(rates, losses)
    peak = math.sqrt(steepest * tenth)
    print(f"{'rate':>10}{'loss':>10}")
    for i in range(0, len(rates), max(1, len(rates) // 20)):
        print(f"{rates[i]:10.2e}{smooth[i]:10.3f}")
    print(f"the loss falls fastest at {steepest:.1e} and is lowest at {10 * tenth:.1e}; a peak to try lies between the "
          f"first and a tenth of the second, such as {peak:.1e}"
          + "; the loss was still falling: raise --high" * (10 * tenth > 0.99 * rates[-1]))
    Path("runs").mkdir(exist_ok=True)
    draw_lines(Path("runs/lr-range.png"), {"loss": (rates, losses, "y-"), "smoothed": (rates, smooth, "-"),
               f"peak to try {peak:.1e}": ([peak] * 2, [min(losses), max(losses)], "g--")},
               xscale="log", xlabel="learning rate", ylabel="loss, nats per token", title="Learning-rate range test")
    return steepest, tenth


# ---- what a loss spike costs ----------------------------------------------------------------------------------


@dataclass
class RecipeOptions:
    words: list[str]  # recipe and flags of train.py


def poisoned(steps: range):
    """`train.pretraining_losses` with random tokens in the batches of these steps, as from a broken shard."""
    def losses_of(run: train.Run, step: int) -> list:
        def load(piece, following) -> tuple[torch.Tensor, ...]:
            tokens, _, cu_seqlens = run.loader.get(piece, following)
            generator = torch.Generator().manual_seed(sum(piece))
            noise = torch.randint(run.model.config.vocab_size, (2, *tokens.shape), generator=generator)
            return *noise.to(tokens.device), cu_seqlens

        poison = replace(run, loader=SimpleNamespace(get=load)) if step in steps else run
        return train.pretraining_losses(poison, step)

    return losses_of


def spikes(o: RecipeOptions) -> dict[str, float]:
    """What poisoned batches cost: trains on clean data, then twice with 4 % of the batches poisoned at 80 % of the run.

    The second does nothing about it, the third has `--guard rewind`; both begin at a checkpoint from before the poison.
    Prints, draws and returns the mean held-out bits per byte of each.
    """
    root, lines, scores = new_run_folder("spikes"), {}, {}
    with quietly():
        run = train.set_up(recipe_of(o.words), NOWHERE)
    steps, recipe = run.steps, run.recipe  # with device, dtype and compilation decided for all three
    if steps < 200:
        raise UserError(f"{steps} steps are too few for this; give --tokens {200 * recipe.batch_tokens} or more")
    poison = range(round(0.8 * steps), round(0.84 * steps))
    recipe = replace(recipe, save_every=steps // 20, keep=20, eval_every=10**9)
    for name, guard, bad in (("clean", "warn", range(0)), ("poisoned", "warn", poison), ("rewind", "rewind", poison)):
        folder = root / name
        train.say(f"training  {name}" + f": random tokens in steps {poison[0] + 1} to {poison[-1] + 1}" * bool(bad))
        if bad:
            early = newest_checkpoint(root / "clean", before=poison[0] - schedule.Guard.MARGIN).name
            shutil.copytree(root / "clean", folder, ignore=lambda _, names: [
                file for file in names if file.startswith("step-") and file != early])
        with quietly():
            run = train.connect(train.set_up(replace(recipe, guard=guard), folder, resume=bool(bad)))
            train.train(run, losses_of=poisoned(bad))
            scores[name] = mean_score(held_out_scores(run))
        points = [(entry["step"], entry["loss"]) for entry in run.log.entries() if "loss" in entry]
        lines[f"{name}: {scores[name]:.3f} bits per byte"] = (*zip(*points), "-")
        rewinds = ", ".join(f"{e['step']} to {e['to']}" for e in run.log.events if e["event"] == "rewind")
        train.say(f"{name:10}{scores[name]:.4f} bits per byte, {scores[name] / scores['clean'] - 1:+.1%}"
                  + f"; went back from step {rewinds}" * bool(rewinds))
    lowest = min(lines[next(iter(lines))][1])
    draw_lines(root / "spikes.png", lines | {"poison": ((poison[0], poison[-1]), (lowest, lowest), "r-")},
               xlabel="step", ylabel="loss, nats per token", title="A stretch of broken data")
    print(f"The runs are in {root}")
    return scores


# ---- a scaling law of your own --------------------------------------------------------------------------------

# (width, share of the tokens): several lengths at two widths, so that the law can tell tokens from parameters.
LADDER = [(32, 0.25), (64, 0.25), (32, 0.5), (64, 0.5), (32, 1), (48, 1), (64, 1), (96, 1), (128, 1)]
PREDICTED = 192  # the width whose loss the law must predict


def rung(base: train.Recipe, width: int, tokens: float) -> train.Recipe:
    """The recipe at another width and length."""
    model = base.model.change(hidden_size=width, intermediate_size=3 * width, num_key_value_heads=1,
                              num_attention_heads=max(1, round(width / 64)),
                              initializer_range=0.05 * math.sqrt(128 / width))
    return replace(base, model=model, tokens=tokens, warmup_steps=math.ceil(0.04 * tokens / base.batch_tokens))


def fit_ladder(o: RecipeOptions) -> tuple[float, float]:
    """A scaling law of your own: trains a ladder of widths and lengths, fits the law, and predicts a larger model.

    --tokens is the length of a full rung (400k without it). Trains the predicted model too, writes law.json and law.png
    in runs/ladder, and returns (predicted, measured) held-out bits per byte.
    """
    base, points = settled(recipe_of(o.words)), []
    tokens = base.tokens or 4e5
    for width, share in [*LADDER, (PREDICTED, 1)]:
        with quietly():
            run = train.set_up(rung(base, width, tokens * share), NOWHERE)
        size = float(count_parameters(run.recipe.model)["total"])
        if len(points) == len(LADDER):
            try:
                law = schedule.fit_law(points, "this ladder")
            except ValueError as error:
                raise UserError(f"{error}; give the ladder more --tokens") from None
            predicted = law.loss(size, tokens)
            train.say(f"law          loss = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / "
                      f"D^{law.beta:.3f} bits per byte\npredicted    {predicted:.4f} for width {width}")
        list(updates(run, map(run.rate, range(run.steps)), f"width {width}"))
        points.append((size, tokens * share, mean_score(held_out_scores(run))))
        train.say(f"{len(points):3} of {len(LADDER) + 1}    width {width:4}{cost.say_number(size):>8} parameters"
                  f"{cost.say_number(tokens * share):>8} tokens  loss {points[-1][2]:.4f}")
    sizes, lengths, losses = zip(*points)
    measured, folder = losses[-1], new_run_folder("ladder")
    print(f"measured     {measured:.4f}: the prediction is off by {predicted / measured - 1:+.2%}; see "
          f"{folder}/law.json")
    folder.mkdir(parents=True)
    runs = [dict(zip(("parameters", "tokens", "loss"), point)) for point in points]
    write_json(folder / "law.json", {"law": asdict(law), "runs": runs, "predicted": predicted, "measured": measured})
    at = np.geomspace(min(sizes) / 1.3, size * 1.3, 60)
    lines = {f"law at {cost.say_number(d)} tokens": (at, [law.predict(n, d)["loss"] for n in at], "-")
             for d in sorted(set(lengths))}
    draw_lines(folder / "law.png", lines | {"fitted": (sizes[:-1], losses[:-1], "ko"),
                                           "predicted": (size, measured, "r*")},
               xscale="log", xlabel="parameters", ylabel="held-out bits per byte",
               title="A scaling law on this machine")
    return predicted, measured


# ---- the batch size at a checkpoint ---------------------------------------------------------------------------


@dataclass
class NoiseOptions:
    run: str  # a run, or one checkpoint
    tokens: float = option(2e5, "tokens to read, per branch", 1)


@dataclass
class BranchOptions(NoiseOptions):
    multiples: str = option("1,2,4,8", "batches to try, in batches of the run; each divides the largest")
    epsilon: float = option(0.01, "bits per byte that a larger batch may lose", 0)


def at_checkpoint(path: str) -> train.Run:
    """A run as it was at a checkpoint, or at the newest of a run folder; it writes nothing."""
    checkpoint = find_checkpoint(path)
    with quietly():
        run = train.set_up(replace(train.read_recipe(checkpoint.parent.parent)[0], start=""), NOWHERE)
    run.step = load_checkpoint(checkpoint, run.model, run.optimizer)["step"]
    return run


def branch(o: BranchOptions) -> dict[float, float]:
    """The critical batch size at a checkpoint: branches with k times the batch and sqrt(k) times the rate.

    Merrill et al. (2025): the largest k whose held-out bits per byte stay within epsilon of all smaller ones. All
    branches read the same sequences: those that come next in the run, whose last stage continues if need be. The
    optimizer starts anew and the rate warms up again over a fifth of the tokens, as in the playbook.
    """
    multiples = sorted({float(k) for k in re.findall(r"\d*\.?\d+", o.multiples)} - {0})
    largest = multiples[-1] if multiples else 0
    if len(multiples) <= o.multiples.count(",") or any(largest % k for k in multiples):
        raise UserError(f"--multiples {o.multiples} is not a list of numbers that divide the largest, such as 1,2,4,8")
    run = at_checkpoint(o.run)
    recipe, curriculum, step, losses = run.recipe, run.curriculum, run.step, {}
    weights, run = {name: w.cpu() for name, w in run.model.state_dict().items()}, None  # its memory is free again
    number = curriculum.stage(step)
    stage, batch = curriculum.stages[number], curriculum.batches[number]
    if o.tokens < 4 * largest * batch:
        raise UserError(f"--tokens {o.tokens:g} are fewer than 4 of the largest batches; give {4 * largest * batch:g}")
    tokens = o.tokens // (largest * batch) * largest * batch  # every branch reads all of them
    rate = stage.learning_rate or schedule.scale_rate(recipe.learning_rate, batch / recipe.batch_tokens)
    read = [replace(part, tokens=(min(end, step) - begin) * size) for part, begin, end, size in
            zip(curriculum.stages, [0, *curriculum.ends], curriculum.ends, curriculum.batches) if begin < step]
    print(f"{'k':>4}{'batch':>12}{'rate':>10}{'updates':>9}{'held-out bits per byte':>24}")
    for k in multiples:
        size, count, peak = int(k * batch), round(tokens / batch / k), schedule.scale_rate(rate, k)
        last = replace(stage, tokens=tokens, batch_tokens=size)
        with quietly():
            run = train.set_up(replace(recipe, stages=(*read, last), tokens=0, micro_batch=0), NOWHERE)
        run.model.load_state_dict(weights)
        run.step = run.steps - count
        list(updates(run, [peak * schedule.warmup(i, round(count / 5)) for i in range(count)], f"k = {k:g}"))
        losses[k] = mean_score(held_out_scores(run))
        train.say(f"{k:4g}{size:12,}{peak:10.2e}{count:9,}{losses[k]:24.4f}")
    best = schedule.critical_multiple(losses, o.epsilon)
    print(f"critical batch size at step {step:,} of {o.run}: {best * batch:,.0f} tokens (k = {best:g}, epsilon "
          f"{o.epsilon:g})" + " or more: no branch lost more; add a larger one to --multiples" * (best == largest))
    return losses


def noise(o: NoiseOptions) -> float:
    """The gradient noise scale at a checkpoint, which stays as it is, in tokens; nan if noise hides the gradient.

    McCandlish et al. (2018), from the squared norms of the gradients of single sequences and of all of them.
    """
    run, squares, scale = at_checkpoint(o.run), 0.0, math.nan
    train.enter_stage(run)
    number = run.curriculum.stage(run.step)
    context, batch = run.curriculum.contexts[number], run.curriculum.batches[number]
    run.rows = [1] * len(run.rows)  # a piece of a batch is a sequence
    pieces = (piece for step in itertools.count(run.step) for piece in train.pretraining_losses(run, step))
    count, weights = max(16, int(o.tokens / context)), list(run.model.parameters())
    total = [torch.zeros_like(weight) for weight in weights]
    print(f"{'sequences':>9}{'|G|^2':>12}{'tr(S)':>12}{'noise scale, tokens':>21}")
    for n, piece in zip(progress(range(1, count + 1), desc="gradients"), pieces):
        run.model.zero_grad()
        (sum(piece()) * (batch // context)).backward()  # a batch's gradient is the mean of these
        for mean, weight in zip(total, weights):
            if weight.grad is not None:  # an expert may have had no token
                squares += float(weight.grad.square().sum())
                mean += weight.grad
        if n == count or n >= 16 and n & (n - 1) == 0:  # several lines show whether it has settled
            whole = sum(float(mean.square().sum()) for mean in total) / n**2
            signal, variance = schedule.NoiseScale.split(squares / n, whole, 1, n)
            scale = variance / signal * context if signal > 0 else math.nan
            train.say(f"{n:9,}{signal:12.3g}{variance:12.3g}{scale:21,.0f}")
    print("the noise hides the gradient; give more --tokens" if math.isnan(scale) else
          f"gradient noise scale at step {run.step:,}: {scale:,.0f} tokens. A batch of this size needs twice the "
          f"fewest possible steps and tokens;\nthis run's batch of {batch:,} needs {1 + scale / batch:.2f} times "
          f"the fewest steps and {1 + batch / scale:.2f} times the fewest tokens (McCandlish et al. 2018).\nAdam often "
          f"bears a larger batch: `python ablate.py branch {o.run}` measures it.")
    return scale


# ---- command line ---------------------------------------------------------------------------------------------

COMMANDS = {"change": (change, ChangeOptions), "lr-range": (lr_range, RangeOptions), "spikes": (spikes, RecipeOptions),
            "fit": (fit_ladder, RecipeOptions), "branch": (branch, BranchOptions), "noise": (noise, NoiseOptions)}


def main() -> None:
    if "RANK" in os.environ:
        raise UserError("ablate.py trains in one process; start it with python, not torchrun")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (work, kind) in COMMANDS.items():
        p = commands.add_parser(name, description=work.__doc__, help=work.__doc__.split(":")[0])
        add_options(p, kind)
        if issubclass(kind, NoiseOptions):
            p.add_argument("run", metavar="RUN", help="a run, or one checkpoint: RUN/checkpoints/step-00000859")
    commands.choices["change"].add_argument("--try", dest="tries", action="append", required=True, metavar="NAME=VALUE",
        help="a flag of train.py; several that belong together in quotes; again for each change")
    args, subject = parser.parse_known_args()  # what is left is for train.py
    work, kind = COMMANDS[args.command]
    if issubclass(kind, NoiseOptions):
        args = parse_options(parser, sys.argv[1:])
        subject = args.run
    options = kind(subject, **given_options(args, kind))
    if kind is ChangeOptions:
        options.tries = args.tries
    check_options(options)
    work(options)


if __name__ == "__main__":
    run_command(main)
