"""Ablations: short trainings that answer one question before a long one is paid for.

Ablations and debugging cost the playbook 58 % of what SmolLM3's main run did: each changes one thing on a small budget, for
what is not tested on your own baseline is a guess. Every command trains what `train.py` would train, with its flags.

    python ablate.py change laptop --try num_key_value_heads=2 --try position=none    # one at a time, and the seeds' noise
    python ablate.py lr-range laptop                       # one short run whose rate grows until the loss diverges
    python ablate.py branch runs/laptop --multiples 1,2,4  # the critical batch size at its newest checkpoint
    python ablate.py spikes laptop                         # what a stretch of broken data costs, and what a guard saves
    python ablate.py fit                                   # a ladder of sizes and its scaling law

`branch` (Merrill et al. 2025): from one checkpoint, branches with k times the batch and sqrt(k) times the rate read the
same text; the largest k whose loss stays within epsilon of all smaller ones is the critical multiple. The optimizer
starts anew and the rate warms up again, as in the playbook. The critical batch grows during training: ask again later,
of RUN/checkpoints/step-00001055 too.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cost
import schedule
import train
from checkpoint import from_pretrained
from model import PRESETS, count_parameters
from schedule import LossLaw
from tokenizer import Parser, UserError, run


@contextlib.contextmanager
def quietly():
    """Without the plans and samples that training prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def stoppable():
    """A training that a signal has stopped stops what comes after it, too."""
    try:
        yield
    except train.Interrupted as stop:
        raise KeyboardInterrupt from stop


def recipe_of(words: list[str]) -> train.Recipe:
    """The recipe that train.py would make of a command line."""
    args, recipe = train.parse(words)
    for name in ("resume", "minutes", "check", "name"):
        if getattr(args, name):
            raise UserError(f"--{name} is train.py's alone; leave it out here")
    return recipe


def mean_score(scores: dict[str, float]) -> float:
    """The mean bits per byte of the sources but generated math, which is learned in a jump that no law describes."""
    return float(np.mean([score for name, score in scores.items() if name != "math"] or list(scores.values())))


def held_out_score(job: train.Pretraining) -> float:
    """`mean_score` of a job's model as it is now."""
    return mean_score({s["val"].name: train.bits_per_byte(job, s["val"], job.recipe.eval_tokens) for s in job.sources})


# ---- one change at a time ----------------------------------------------------------------------------------------

# Student's t for 1 to 9 degrees of freedom: 95 % lie within so many standard errors. For more, the last is a little wide.
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def paired_difference(baseline: list[float], changed: list[float]) -> tuple[float, float]:
    """The mean difference of runs of the same seed, and the half width of its 95 % confidence interval.

    The same seed reads the same data in the same order and, where shapes agree, begins with the same weights: what luck gives
    to both cancels, so that pairs tell smaller differences than two means do.
    """
    differences = np.subtract(changed, baseline)
    n = len(differences)
    return float(differences.mean()), T95[min(n, 10) - 2] * float(differences.std(ddof=1)) / math.sqrt(n)


def verdict(difference: float, half_width: float) -> str:
    """In words, of held-out bits per byte, of which fewer are better."""
    if difference == half_width == 0:
        return "the very same losses"
    if abs(difference) <= half_width:
        return f"no difference seen; one under about {2 * half_width:.4f} may well not show"
    return "better" if difference < 0 else "worse"


def one_run(recipe: train.Recipe, folder: Path) -> dict:
    """Trains a recipe, or goes on where that was stopped; what is compared, and where the log is."""
    resume = any((folder / "checkpoints").glob("step-*"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    found = {"parameters": count_parameters(recipe.model)["total"], "run": folder.name}
    with quietly(), stoppable():
        try:
            found["scores"] = train.train(recipe, folder, resume)
        except train.Diverged as error:
            found["diverged"] = str(error).split(",")[0]
    shutil.rmtree(folder / "checkpoints")
    speeds = [entry["tokens_per_second"] for entry in train.Log(folder).entries() if "tokens_per_second" in entry]
    return found | {"tokens_per_second": float(np.median(speeds)) if speeds else math.nan}


def code_and_data(recipe: train.Recipe) -> list:
    """What a training depends on besides its recipe and the machine, as hashes."""
    tokenizer, sources = train.load_data(recipe, True)
    code = [Path(module.__file__).read_bytes() for module in (train, train.data_, train.schedule_, sys.modules["model"])]
    return [[hashlib.sha256(text).hexdigest() for text in code], tokenizer.hash,
            [(split.name, split.sha256) for source in sources for split in source.values()]]


def fingerprint(recipe: train.Recipe, around: list) -> str:
    """Changes with whatever changes a training; `around`: from `code_and_data`."""
    machine = cost.find_machine(recipe.device, recipe.dtype, recipe.compile)
    start = (train.starting_point(recipe.start) / "manifest.json").read_text("utf-8") if recipe.start else ""
    content = [asdict(recipe), machine.device, str(machine.dtype), machine.compile, start, around]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def changed_recipes(given: list[str], tries: list[str]) -> dict[str, train.Recipe]:
    """The recipe that `given` names as "baseline", and it with each of `tries`."""
    recipes = {"baseline": recipe_of(given)}
    for words in tries:
        if not all(re.fullmatch(r"\w+=\S+", word) for word in words.split()):
            raise UserError(f"--try {words!r} is not NAME=VALUE of a flag of train.py, such as --try num_key_value_heads=2")
        if fixed := {word.split("=")[0] for word in words.split()} & {"seed", "eval_tokens", "data"}:
            raise UserError(f"--try {words} changes what is measured with; give --{fixed.pop()} to all, or compare data with "
                            "`python train.py --anneal RUN --candidate SOURCE`")
        recipes[words] = recipe_of([*given, *(f"--{word}" for word in words.split())])
        if recipes[words] == recipes["baseline"]:
            raise UserError(f"--try {words} changes nothing: the baseline has it already")
    return {name: replace(recipe, eval_every=10**9) for name, recipe in recipes.items()}  # at the end only


def change(given: list[str], tries: list[str], seeds: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Trains the recipe that `given` names, and it with each of `tries` ("NAME=VALUE", or several that belong together), with
    `seeds` seeds; prints, draws and returns each change's (difference in held-out bits per byte, half width of its 95 %).

    A finished training is a line of log.jsonl in `folder`: the same command goes on after an interruption, and one with
    more changes or seeds trains only those.
    """
    recipes, log, started = changed_recipes(given, tries), train.Log(folder), time.time()
    runs = {run["key"]: run for run in log.entries()}
    with quietly():
        around = code_and_data(recipes["baseline"])
        keys = {(seed, name): f"{fingerprint(recipe, around)}-{seed}"
                for name, recipe in recipes.items() for seed in range(seeds)}
    todo = sorted(pair for pair, key in keys.items() if key not in runs)  # a seed of all before the next
    for i, (seed, name) in enumerate(todo):
        left = f", about {tqdm.format_interval((time.time() - started) / i * (len(todo) - i))} left" if i else ""
        print(f"training {i + 1} of {len(todo)}: {name}, seed {seed}{left}", flush=True)
        recipe, key = replace(recipes[name], seed=recipes[name].seed + seed), keys[seed, name]
        runs[key] = {"key": key, "change": name, "seed": recipe.seed} | one_run(recipe, folder / key)
        log.append(json.dumps(runs[key]))
    found = compare_runs({name: [runs[keys[seed, name]] for seed in range(seeds)] for name in recipes})
    print(f"The trainings are in {folder}")
    with contextlib.suppress(UserError):  # a picture only where matplotlib is
        draw_changes(found, folder / "changes.png")
    return found


def compare_runs(runs: dict[str, list[dict]]) -> dict[str, tuple[float, float]]:
    """Prints a table of what `one_run` returned, by change and seed; returns the `paired_difference` of each change."""
    losses = {name: [mean_score(run["scores"]) if "scores" in run else math.nan for run in done] for name, done in runs.items()}
    baseline, found, wide = runs["baseline"], {}, max(map(len, runs))
    if bad := [run for run in baseline if "diverged" in run]:
        raise UserError(f"the baseline itself diverges (seed {bad[0]['seed']}, {bad[0]['diverged']}): lower its --learning_rate")
    print(f"\n{'':{wide}}  parameters  tokens/s  bits per byte  difference from the baseline")
    for name, done in runs.items():
        line = (f"{name:{wide}}{done[0]['parameters']:12,}{np.median([run['tokens_per_second'] for run in done]):10,.0f}"
                f"{np.mean(losses[name]):15.4f}  ")
        if name == "baseline":
            print(f"{line}seeds differ by {np.std(losses[name], ddof=1):.4f} (standard deviation)")
            continue
        found[name] = paired_difference(losses["baseline"], losses[name])
        if bad := [f"seed {run['seed']}, {run['diverged']}" for run in done if "diverged" in run]:
            print(f"{line}diverged ({'; '.join(bad)})")
        else:
            print(f"{line}{found[name][0]:+.4f} ± {found[name][1]:.4f}  {verdict(*found[name])}")
        if abs(ratio := done[0]["parameters"] / baseline[0]["parameters"] - 1) > 0.02:
            print(f"{'':{wide}}  ({ratio:+.0%} parameters: part of the difference is size; change layers or widths with it)")
    names = " and ".join(name for name in baseline[0]["scores"] if name != "math")
    print(f"bits per byte: the mean over held-out {names}. ±: the 95 % interval over {len(baseline)} seeds; of 20 changes that "
          "do nothing, about one looks better or worse.")
    return found


def draw_changes(found: dict[str, tuple[float, float]], path: Path) -> None:
    pyplot = cost.pyplot_or_error()
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.5 * len(found)), layout="constrained")
    colors = {"better": "tab:green", "worse": "tab:red"}
    for i, (difference, half) in enumerate(found.values()):  # what diverged leaves its line empty
        axes.errorbar(difference, i, xerr=half, fmt="o", color=colors.get(verdict(difference, half), "gray"), capsize=3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(found)), found)
    axes.invert_yaxis()
    axes.set(xlabel="difference in held-out bits per byte, with 95 % intervals (left is better)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"They are drawn in {path}")


# ---- the learning-rate range test -----------------------------------------------------------------------------


def lr_range(recipe: train.Recipe, low: float, high: float, steps: int, picture: str) -> tuple[float, float]:
    """Trains with rates that grow from low to high by equal factors until the loss is a third above its lowest; prints
    and draws loss against rate. Returns what `schedule.suggest_rates` makes of them."""
    pyplot = cost.pyplot_or_error(picture) if picture else None
    with quietly():
        job = train.set_up(replace(recipe, tokens=steps * recipe.batch_tokens), train.World(), Path("runs/none"), False)
    rates, losses = [], []
    for step in tqdm(range(job.curriculum.steps), desc="rate grows", mininterval=0.5 if sys.stderr.isatty() else 10):
        rate = schedule.range_test_rate(step, job.curriculum.steps, low, high)
        loss = train.training_step(job, step, rate).read()["loss"]
        if not math.isfinite(loss):  # beyond here is nothing
            break
        rates.append(rate)
        losses.append(loss)
        smooth = schedule.smoothed(losses)
        if step > 10 and smooth[-1] > min(smooth) * 4 / 3:
            break
    if len(losses) < 10:
        raise UserError(f"the loss diverged after {len(losses)} steps; begin with a --low below {low:g}")
    steepest, tenth = schedule.suggest_rates(rates, losses)
    peak = math.sqrt(steepest * tenth)
    print(f"{'rate':>10}{'loss':>10}")
    for i in range(0, len(rates), max(1, len(rates) // 20)):
        print(f"{rates[i]:10.2e}{smooth[i]:10.3f}")
    print(f"the loss falls fastest at {steepest:.1e} and is lowest at {10 * tenth:.1e}; a peak to try lies between the one "
          f"and a tenth of the other, such as {peak:.1e}"
          + ("; the loss was still falling: go on with a higher --high" if 10 * tenth > 0.99 * rates[-1] else ""))
    if pyplot:
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(rates, losses, lw=0.5, color="lightgray")
        axes.plot(rates, smooth, label="smoothed loss")
        axes.axvline(peak, color="tab:green", label=f"peak to try {peak:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats a token", title="Learning-rate range test")
        axes.legend()
        figure.savefig(picture, dpi=120)
        pyplot.close(figure)
        print(f"The curve is in {picture}")
    return steepest, tenth


# ---- the branch method ----------------------------------------------------------------------------------------


def branch(begin: Path, multiples: list[int], tokens: float, epsilon: float, batch_tokens: int = 0,
           warmup_share: float = 0.2) -> dict[int, float]:
    """Trains a branch for each k from a checkpoint, or the newest of a run; prints and returns their held-out losses in
    bits per byte. `batch_tokens`: that of k = 1 (0: the run's); its rate is the run's peak, times sqrt of the batches'
    ratio.

    All branches read the same sequences: those that come next in the run, whose last stage goes on if need be.
    """
    alone = begin.parent.name == "checkpoints"  # RUN/checkpoints/step-00001055
    recipe = train.read_recipe(begin.parent.parent if alone else begin)[0]
    checkpoint, largest = train.starting_point(str(begin)), max(multiples)
    step = json.loads((checkpoint / "manifest.json").read_text("utf-8"))["step"]
    batch = batch_tokens or recipe.batch_tokens
    rate = schedule.scale_rate(recipe.learning_rate, batch / recipe.batch_tokens)
    if tokens < 4 * largest * batch:
        raise UserError(f"--tokens {tokens:g} are fewer than 4 updates of {largest} x {batch:,}; give {4 * largest * batch}")
    losses, weights, common = {}, from_pretrained(checkpoint).state_dict(), math.lcm(*multiples)
    batches = int(tokens / batch) // common * common or int(tokens / batch)  # so that every k reads all of them
    context, first = recipe.model.max_position_embeddings, round(step * recipe.batch_tokens / batch)
    if batch % context:
        raise UserError(f"--batch-tokens {batch} is not a number of sequences of {context}; take "
                        f"{max(1, batch // context) * context}")
    last = recipe.stages[-1]  # which goes on for as long as a branch
    longer = replace(recipe, batch_tokens=batch, batch_doublings="", micro_batch=0, tokens=0,
                     stages=(*recipe.stages[:-1], replace(last, tokens=last.tokens + tokens + batch)))
    print(f"{'k':>4}{'batch':>12}{'rate':>10}{'updates':>9}{'held-out bits per byte':>24}")
    for k in sorted(multiples):
        with quietly():
            job = train.set_up(longer, train.World(), Path("runs/none"), False)
        job.model.load_state_dict(weights)
        updates = batches // k
        for update in tqdm(range(updates), desc=f"k = {k}", leave=False, mininterval=0.5 if sys.stderr.isatty() else 10):
            share = schedule.warmup(update, round(warmup_share * updates))  # the same tokens whatever k
            train.training_step(job, first + update * k, rate * math.sqrt(k) * share, steps=k)
        losses[k] = held_out_score(job)
        print(f"{k:4}{k * batch:12,}{rate * math.sqrt(k):10.2e}{updates:9,}{losses[k]:24.4f}", flush=True)
    best = schedule.critical_multiple(losses, epsilon)
    more = " or more: no branch lost more; add a larger one to --multiples" if best == largest else ""
    print(f"critical batch size at step {step:,} of {begin}: {best * batch:,} tokens (k = {best}, epsilon "
          f"{epsilon:g}){more}")
    return losses


# ---- what a loss spike costs ----------------------------------------------------------------------------------


class Poisoned(train.Pretraining):
    """Pretraining whose batches of the steps `poison` hold random tokens, as from a broken shard."""

    def __init__(self, poison: range, *parts):
        super().__init__(*parts)
        self.poison = poison

    def load(self, piece, following) -> tuple[torch.Tensor, ...]:
        tokens, targets, cu_seqlens = super().load(piece, following)
        if piece[0] in self.poison:
            generator = torch.Generator().manual_seed(sum(piece))
            tokens, targets = torch.randint(self.model.config.vocab_size, (2, *tokens.shape), generator=generator).to(
                tokens.device)
        return tokens, targets, cu_seqlens


def spikes(recipe: train.Recipe, begin: float = 0.8, share: float = 0.04) -> dict[str, float]:
    """Trains on clean data; then twice from before `begin` (of the steps) on with `share` of the batches poisoned: nothing
    done about it, and with `--guard rewind`. Prints and returns the mean held-out bits per byte of each."""
    root = train.new_run_folder("spikes")
    steps = round((recipe.tokens or sum(stage.tokens for stage in recipe.stages)) / recipe.batch_tokens)
    poison, every = range(round(begin * steps), round((begin + share) * steps)), max(1, steps // 20)
    recipe = replace(recipe, save_every=every, keep=20, eval_every=10**9)
    scores = {}
    for name, guard in (("clean", "warn"), ("poisoned", "warn"), ("rewind", "rewind")):
        folder = root / name
        if name != "clean":  # the same until the poison
            early = [path for path in sorted((root / "clean/checkpoints").glob("step-????????"))
                     if int(path.name[5:]) < poison[0] - recipe.spike_margin]
            if not early:
                raise UserError(f"{steps} steps are too few for this; give --tokens of {200 * recipe.batch_tokens} or more")
            shutil.copytree(early[-1], folder / "checkpoints" / early[-1].name)
            for file in ("recipe.json", "tokenizer.json"):
                shutil.copy(root / "clean" / file, folder)
            recipe = replace(train.read_recipe(folder)[0], guard=guard)
        with quietly(), stoppable():
            scores[name] = mean_score(train.train(recipe, folder, name != "clean", kind=lambda *parts: Poisoned(
                poison if name != "clean" else range(0), *parts)))
        rewinds = [f"{e['step']} -> {e['to']}" for e in train.Log(folder).events if e["event"] == "rewind"]
        print(f"{name:10} {scores[name]:.4f} bits per byte, {scores[name] / scores['clean'] - 1:+.1%}"
              + (f"; poison in steps {poison[0] + 1} to {poison[-1] + 1}" if name != "clean" else "")
              + (f"; went back {', '.join(rewinds)}" if rewinds else ""), flush=True)
    with contextlib.suppress(UserError):  # a picture only where matplotlib is
        pyplot = cost.pyplot_or_error()
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for name in scores:
            points = [(e["step"], e["loss"]) for e in train.Log(root / name).entries() if "loss" in e]
            axes.plot(*zip(*points), lw=0.8, label=f"{name}: {scores[name]:.3f} bits per byte")
        axes.axvspan(poison[0], poison[-1], color="mistyrose", zorder=0)
        axes.set(xlabel="step", ylabel="loss, nats a token", title="A stretch of broken data")
        axes.legend()
        figure.savefig(root / "spikes.png", dpi=120)
        pyplot.close(figure)
    print(f"The runs are in {root}, and spikes.png where matplotlib is installed")
    return scores


# ---- a scaling law of your own --------------------------------------------------------------------------------

# (width, share of the tokens); several lengths at two widths, so that the law sees tokens and parameters apart.
LADDER = [(32, 0.25), (64, 0.25), (32, 0.5), (64, 0.5), (32, 1), (48, 1), (64, 1), (96, 1), (128, 1)]
PREDICTED = 192  # the width whose loss the law must foretell


def rung(width: int, tokens: float, device: str, dtype: str) -> train.Recipe:
    """The laptop recipe at another width and length."""
    model = PRESETS["laptop"].change(hidden_size=width, intermediate_size=3 * width, num_key_value_heads=1,
                                     num_attention_heads=max(1, round(width / 64)),
                                     initializer_range=0.05 * math.sqrt(128 / width))
    recipe = train.RECIPES["laptop"]
    return replace(recipe, model=model, tokens=tokens, device=device, dtype=dtype,
                   warmup_steps=math.ceil(0.04 * tokens / recipe.batch_tokens))


def fit_ladder(tokens: float, device: str, dtype: str) -> tuple[float, float]:
    """Trains LADDER on the embedded corpus, fits the law, foretells PREDICTED, trains it, and compares: numbers, law.json
    and law.png in runs/ladder. Returns (predicted, measured)."""
    rungs, points, started = [*LADDER, (PREDICTED, 1)], [], time.time()
    flops = [cost.training_flops(count_parameters(rung(width, 1, device, dtype).model)["total"], tokens * share)
             for width, share in rungs]
    bar = tqdm(total=sum(flops), unit="FLOP", unit_scale=True, leave=False, mininterval=0.5 if sys.stderr.isatty() else 10)

    def say(text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    for (width, share), work in zip(rungs, flops):
        with quietly():
            job = train.set_up(rung(width, tokens * share, device, dtype), train.World(), Path("runs/none"), False)
        size = float(count_parameters(job.recipe.model)["total"])
        if width == PREDICTED:
            try:
                law = schedule.fit_law(points, "this ladder")
            except ValueError as error:
                raise UserError(f"{error}; give the ladder more --tokens") from None
            predicted = law.loss(size, tokens)
            say(f"law          loss = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f} bits a "
                "byte")
            say(f"predicted    {predicted:.4f} for width {PREDICTED}; training it to see")
        for step in range(job.steps):
            train.training_step(job, step, job.rate(step))
            bar.update(work / job.steps)
        points.append((size, tokens * share, held_out_score(job)))
        say(f"width {width:4}{cost.say_number(size):>8} parameters{cost.say_number(tokens * share):>8} tokens  loss "
            f"{points[-1][2]:.4f}  ({time.time() - started:.0f} s so far)")
    bar.close()
    *points, held_out = points
    measured = held_out[2]
    print(f"measured     {measured:.4f}: the prediction is off by {predicted / measured - 1:+.2%}")
    folder = train.new_run_folder("ladder")
    folder.mkdir(parents=True)
    runs = [dict(zip(("parameters", "tokens", "loss"), point)) for point in (*points, held_out)]
    (folder / "law.json").write_text(json.dumps(
        {"law": asdict(law), "runs": runs, "predicted": predicted, "measured": measured}, indent=1), "utf-8")
    with contextlib.suppress(UserError):  # a picture only where matplotlib is
        draw_law(law, points, held_out, folder / "law.png")
    print(f"In {folder}: law.json, and law.png where matplotlib is installed; {time.time() - started:.0f} s in all")
    return predicted, measured


def draw_law(law: LossLaw, points: list[tuple], held_out: tuple, path: Path) -> None:
    pyplot = cost.pyplot_or_error()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    sizes = np.geomspace(min(p[0] for p in points) / 1.3, held_out[0] * 1.3, 60)
    for tokens in sorted({p[1] for p in points}):
        curve = [law.E + law.A * n**-law.alpha + law.B * tokens**-law.beta for n in sizes]
        line, = axes.plot(sizes, curve, label=f"law at {cost.say_number(tokens)} tokens")
        measured = [(p[0], p[2]) for p in points if p[1] == tokens]
        axes.plot(*zip(*measured), "o", color=line.get_color())
    axes.plot(held_out[0], held_out[2], "r*", ms=12, label="held out of the fit")
    axes.set(xscale="log", xlabel="parameters", ylabel="held-out bits per byte", title="A scaling law on this machine")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---- command line ---------------------------------------------------------------------------------------------


def multiples(text: str) -> list[int]:
    values = sorted({int(part) for part in text.split(",") if part.strip().isdecimal()} - {0})
    if values[:1] != [1] or values[-1] > 2**20 or len(values) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text} is not a list of whole numbers that begins with 1, such as 1,2,4,8")
    return values


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="change | lr-range | branch | spikes | fit")
    p = commands.add_parser("change", help="one change at a time against a baseline; takes train.py's recipe and flags too")
    p.add_argument("--try", dest="tries", action="append", required=True, metavar="NAME=VALUE",
                   help="a flag of train.py; several that belong together in quotes; again for each change")
    p.add_argument("--seeds", type=cost.positive_integer, default=3, help="trainings of each (default: 3)")
    p.add_argument("--out", type=Path, default=Path("runs/changes"), help="of the trainings and changes.png (runs/changes)")
    p = commands.add_parser("lr-range", help="loss against a rate that grows; takes train.py's recipe and flags too")
    p.add_argument("--low", type=cost.positive, default=1e-4, help="first rate (default: 1e-4)")
    p.add_argument("--high", type=cost.positive, default=1.0, help="last rate (default: 1)")
    p.add_argument("--steps", type=cost.positive_integer, default=200)
    p.add_argument("--picture", default="", metavar="FILE", help="draw the curve into this file")
    p = commands.add_parser("branch", help="the critical batch size at a checkpoint")
    p.add_argument("run", type=Path, metavar="RUN", help="a run, or one checkpoint: RUN/checkpoints/step-00001055")
    p.add_argument("--multiples", type=multiples, default=[1, 2, 4, 8], help="batches to try, in batches of the run")
    p.add_argument("--tokens", type=cost.positive, default=2e5, help="that each branch reads")
    p.add_argument("--batch-tokens", type=cost.positive_integer, default=0, help="of k = 1 (default: the run's)")
    p.add_argument("--epsilon", type=cost.positive, default=0.01, help="bits per byte that a larger batch may lose")
    commands.add_parser("spikes", help="poisons batches of a run, with and without a guard; takes train.py's flags")
    p = commands.add_parser("fit", help="train a ladder of sizes, fit the loss law, predict the largest")
    p.add_argument("--tokens", type=cost.positive, default=4e5, help="of every full rung of the ladder")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    args, rest = parser.parse_known_args()
    if "RANK" in os.environ:
        raise UserError("ablate.py trains in one process; start it with python, not torchrun")
    if args.command == "change":
        if args.seeds < 2:
            raise UserError("one seed tells nothing of the noise; give --seeds 2 or more")
        change(rest, args.tries, args.seeds, args.out)
        return
    if args.command == "fit":
        if not 1e5 <= args.tokens <= 1e10:
            raise UserError(f"--tokens {args.tokens:g} is not between 1e5, below which nothing is learned, and 1e10")
        fit_ladder(args.tokens, args.device, args.dtype)
        return
    if args.command == "spikes":
        spikes(recipe_of(rest))
        return
    if args.command == "branch":
        if rest:
            raise UserError(f"there is no flag {rest[0]}; see `python ablate.py branch --help`")
        branch(args.run, args.multiples, args.tokens, args.epsilon, args.batch_tokens)
        return
    if args.steps < 20:
        raise UserError(f"--steps {args.steps} are too few to see where the loss falls; give at least 20")
    if args.low >= args.high:
        raise UserError(f"--low {args.low:g} is not below --high {args.high:g}; give a range such as --low 1e-4 --high 1")
    lr_range(recipe_of(rest), args.low, args.high, args.steps, args.picture)


if __name__ == "__main__":
    run(main)
