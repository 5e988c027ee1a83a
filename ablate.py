"""Ablations: short trainings that answer one question before a long one is paid for.

Ablations and debugging cost the playbook 58 % of what SmolLM3's main run did. Every command trains what `train.py`
would train, in one process; the first four take its recipe and flags, too.

    python ablate.py change laptop --try num_key_value_heads=2 --try position=none    # each alone, and the seeds' noise
    python ablate.py change laptop --tokens 4e5 --try mixture=code=.9,prose=.1        # what each source gains and loses
    python ablate.py change --anneal runs/laptop --try candidate=math                 # against the base mixture alone
    python ablate.py lr-range laptop        # one short run whose rate grows until the loss diverges
    python ablate.py spikes laptop --cause rate    # what causes of loss spikes cost: rate, data, init, precision
    python ablate.py fit                    # a ladder of sizes and its scaling law
    python ablate.py branch runs/laptop     # the critical batch size at its newest checkpoint, or one given; it grows
    python ablate.py noise runs/laptop      # the gradient noise scale there, without training
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from tokenizer import Parser, UserError, add_options, check_options, draw, option, run as run_command, write_json

import numpy as np
import torch
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import cost
import schedule
import train
from checkpoint import Log, find_checkpoint, new_run_folder
from data import fit_stages, load_data
from model import count_parameters


@dataclass
class AblationOptions:
    """The flags that are not train.py's, each with the command that takes it."""
    seeds: int = option(3, "change: trainings of each", 2)
    out: str = option("runs/changes", "change: folder of the trainings")
    low: float = option(1e-4, "lr-range: first rate", 1e-12)
    high: float = option(1.0, "lr-range: last rate", 1e-12)
    steps: int = option(200, "lr-range: updates", 20)
    cause: str = option("data", "spikes: what brings them about", choices=("rate", "data", "init", "precision"))
    doublings: int = option(3, "branch: how often the batch is doubled", 1, 20)
    epsilon: float = option(0.01, "branch: bits per byte that a larger batch may lose", 0)
    read: float = option(2e5, "branch and noise: tokens to read", 1)
    tries: tuple[str, ...] = ()  # change: each "NAME=VALUE", or several that belong together


def recipe_from(words, more=""):
    """The Recipe of a train.py command line and `more` flags without dashes; device, dtype, compilation decided."""
    words = [*words, *(f"--{flag}" for flag in more.split())]
    if wrong := {word.split("=")[0] for word in words} & {"--resume", "--minutes", "--check", "--name"}:
        raise UserError(f"{wrong.pop()} belongs to train.py alone; leave it out here")
    recipe = train.parse(words)[1]
    return cost.settle(recipe, cost.choose_machine(recipe), processes=1, context=1)


def prepared(recipe, folder=Path("runs/none"), resume=False):
    """`train.set_up` without its prints; nothing is written."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train.set_up(recipe, folder, resume=resume)


def trained(run, losses_of=train.pretraining_losses):
    """`held_out` after a whole training without its prints. A signal that stops it stops what follows, too."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(train.connect(run), losses_of, evaluate=lambda *_: {})  # evaluated at the end alone
    except train.Interrupted as stop:
        raise KeyboardInterrupt from stop
    return held_out(run)


def updates(run, rates, label):
    """Yields the loss of one update at each rate, from `run.step` on; nothing is logged or saved."""
    for rate in tqdm(rates, label, leave=False, disable=None):  # no bar in a file
        train.enter_stage(run)
        loss = train.update(run, train.pretraining_losses(run, run.step), rate).read()["loss"]
        run.step += 1
        yield loss


def held_out(run):
    """{source: bits per byte now}."""
    train.enter_stage(run)
    splits = [source["val"] for source in run.sources]
    return {split.name: train.held_out_bits(run, split, run.recipe.eval_tokens) for split in splits}


def mean_loss(bits):
    """The mean over {source: bits per byte} without generated math, which is learned in a jump that no law fits."""
    return float(np.mean([bits[name] for name in bits if name != "math"] or [*bits.values()]))


def draw_lines(path, lines, **labels):
    """Draws {label: (x, y)} where matplotlib is installed."""
    def paint(axes):
        for label, points in lines.items():
            axes.plot(*points, label=label)
        axes.set(**labels)
        axes.legend()

    if draw(path, paint):
        print(f"The picture is in {path}")


# ---- one change at a time -------------------------------------------------------------------------------------
# Student's t for 1 to 9 degrees of freedom: 95 % lie within so many standard errors. For more, the last is a bit wide.
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def paired_difference(baseline, changed):
    """The mean difference of runs of the same seed, and the half width of its 95 % interval. Such runs read the same
    data in the same order and, where shapes agree, begin with the same weights: luck that both share cancels."""
    differences, n = np.subtract(changed, baseline), len(baseline)
    return differences.mean(), T95[min(n, 10) - 2] * differences.std(ddof=1) / math.sqrt(n)


def fingerprint(recipe, data):
    """A hash of what a training depends on: the recipe, its first weights, the code, and `data`, a list of hashes."""
    start = (find_checkpoint(recipe.start) / "manifest.json").read_text("utf-8") if recipe.start else ""
    code = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(json.dumps([asdict(recipe), start, code, data]).encode()).hexdigest()[:16]


def train_arm(recipe, folder):
    """Trains a recipe, or resumes it where it was stopped; returns what `compare_runs` reads."""
    run, found = prepared(recipe, folder, any(folder.glob("checkpoints/step-*"))), {"diverged": ""}
    try:
        found["sources"] = trained(run)
        found["loss"] = mean_loss(found["sources"])
    except train.Diverged as error:
        found["diverged"] = f"seed {recipe.seed}, {str(error).split(':')[0]}"
    shutil.rmtree(folder / "checkpoints")
    speeds = [entry["tokens_per_second"] for entry in run.log.entries() if "loss" in entry]
    return found | {"step": run.step, "parameters": count_parameters(run.recipe.model)["total"],
                    "tokens_per_second": float(np.median(speeds or [0])), "seed": recipe.seed}


def change(words, o):
    """Trains a recipe as it is and with each of the tries alone, with every seed; returns `compare_runs`. A finished
    training is a line of log.jsonl in the folder: the same command, or one with more tries, trains what is missing."""
    base, folder, runs = recipe_from(words), Path(o.out), {}
    recipes = {"baseline": base}
    for name in o.tries:
        if fixed := {word.split("=")[0].replace("-", "_") for word in name.split()} & {"seed", "eval_tokens", "data"}:
            raise UserError(f"--try {name} changes what is measured with; give --{fixed.pop()} to all, or compare "
                            "data with --try mixture=code=.9,prose=.1")
        recipes[name] = recipe_from(words, name)
        if recipes[name] == base:
            raise UserError(f"--try {name} changes nothing: the baseline has it already")
    tokenizer, sources = load_data(base.data, base.model.vocab_size)
    data = [tokenizer.hash, *((split.name, split.sha256) for source in sources for split in source.values())]
    for recipe in recipes.values():
        if recipe.mixture:  # a mistake in one ends all now, not after the trainings before it
            fit_stages(recipe.stages, [source["train"].name for source in sources], strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, resumed_at=10**18)  # drops a line that a kill tore
    done = {entry["key"]: entry for entry in log.entries()}
    for i, (seed, name) in enumerate(itertools.product(range(o.seeds), recipes), 1):
        recipe = replace(recipes[name], seed=base.seed + seed)
        if (key := fingerprint(recipe, data)) not in done:
            train.say(f"training {i} of {o.seeds * len(recipes)}: {name}, seed {recipe.seed}")
            done[key] = train_arm(recipe, folder / key)
            log.write(key=key, change=name, **done[key])
        runs.setdefault(name, []).append(done[key])
    found = compare_runs(runs)
    lines = {name: ([x - half, x, x + half], [i] * 3, "o-") for i, (name, (x, half)) in enumerate(found.items())}
    draw_lines(folder / "changes.png", lines | {"baseline": ([0, 0], [0, len(found)], "k-")}, yticks=[],
               xlabel="difference in held-out bits per byte, with 95 % intervals (left is better)")
    print(f"The trainings are in {folder}")
    return found


def compare_runs(runs):
    """Prints a table of {change: [`train_arm` by seed]}; returns {change: `paired_difference` in bits per byte}."""
    losses = {name: [run.get("loss", math.nan) for run in done] for name, done in runs.items()}
    base, found, wide = runs["baseline"], {}, max(map(len, runs))
    print(f"\n{'':{wide}}  parameters  tokens/s  bits per byte  difference from the baseline")
    for name, done in runs.items():
        bad = "; ".join(run["diverged"] for run in done if run["diverged"])
        says = f"seeds differ by {np.std(losses[name], ddof=1):.4f} (standard deviation)"
        if name != "baseline":
            difference, half = found[name] = paired_difference(losses["baseline"], losses[name])
            verdict = ("exactly the same losses" if difference == half == 0 else "better" if difference < -half else
                       "worse" if difference > half else f"no difference seen; one under {2 * half:.4f} may not show")
            says = f"diverged ({bad})" if bad else f"{difference:+.4f} ± {half:.4f}  {verdict}"
        elif bad:
            raise UserError(f"the baseline itself diverges ({bad}): lower its --learning_rate")
        speed, size = np.median([run["tokens_per_second"] for run in done]), done[0]["parameters"]
        print(f"{name:{wide}}{size:12,}{speed:10,.0f}{np.mean(losses[name]):15.4f}  {says}")
        if abs(ratio := size / base[0]["parameters"] - 1) > 0.02:
            print(f"{'':{wide}}  ({ratio:+.0%} parameters: part of the difference is size; change layers or width too)")
        for source in [] if bad else done[0]["sources"]:  # their mean hides what one loses while another gains
            bits = [[run["sources"][source] for run in arm] for arm in (base, done)]
            says = "{:+.4f} ± {:.4f}".format(*paired_difference(*bits)) if name != "baseline" else ""
            print(f"{source:>{wide + 22}}{np.mean(bits[1]):15.4f}  {says}")
    print("bits per byte: the mean over held-out sources but generated math (lower is better). ±: the 95 % interval of "
          f"{len(base)} seeds; of 20 changes that do nothing, about one looks better or worse.")
    return found


# ---- rates, spikes, a scaling law, batch sizes ----------------------------------------------------------------
def lr_range(words, o):
    """Trains with growing rates until the loss is a third above its lowest. Returns `schedule.suggest_rates`."""
    recipe = recipe_from(words)
    if o.low >= o.high:
        raise UserError(f"--low {o.low:g} is not below --high {o.high:g}; give a range such as --low 1e-4 --high 1")
    run, losses = prepared(replace(recipe, tokens=o.steps * recipe.batch_tokens)), []
    rates = np.geomspace(o.low, o.high, run.steps).tolist()  # Smith 2017
    for loss in itertools.takewhile(math.isfinite, updates(run, rates, "rate grows")):
        losses.append(loss)
        smooth = schedule.smoothed(losses)
        if len(losses) > 11 and smooth[-1] > min(smooth) * 4 / 3:
            break
    if len(losses) < 10:
        raise UserError(f"the loss diverged after {len(losses)} steps; begin with a --low below {o.low:g}")
    steepest, tenth = schedule.suggest_rates(rates, losses)
    print(f"{'rate':>10}{'loss':>10}")
    for i in range(0, len(losses), max(1, len(losses) // 20)):
        print(f"{rates[i]:10.2e}{smooth[i]:10.3f}")
    print(f"the loss falls fastest at {steepest:.1e} and is lowest at {10 * tenth:.1e}; a peak to try lies between the "
          f"first and a tenth of the second, such as {math.sqrt(steepest * tenth):.1e}"
          + "; the loss was still falling: raise --high" * (10 * tenth > 0.99 * rates[-1]))
    Path("runs").mkdir(exist_ok=True)
    draw_lines("runs/lr-range.png", {"smoothed": (rates[:len(smooth)], smooth)}, xscale="log", xlabel="learning rate",
               ylabel="loss, nats per token")
    return steepest, tenth


def poisoned_losses(run, step, poison):
    """`train.pretraining_losses` with random tokens in the batches of some steps, as from a broken shard."""
    def load(piece, following):
        tokens, _, cu_seqlens = run.loader.get(piece, following)
        random = torch.randint(run.model.config.vocab_size, (2, *tokens.shape),
                               generator=torch.Generator().manual_seed(sum(piece)))
        return *random.to(tokens.device), cu_seqlens

    return train.pretraining_losses(replace(run, loader=SimpleNamespace(get=load)) if step in poison else run, step)


# The playbook's causes of spikes: {cause: (its flags, what is tried after them: fixes, and more of the same)}. Bad data
# is no flag: from 80 % of the run on, 4 % of the batches are random tokens, or only the first three. float16 overflows
# where bfloat16 does not.
CAUSES = {
    "rate": ("learning_rate=0.1", ["learning_rate=0.01", "clip=0.1", "qk_norm=true", "warmup_steps=150",
                                   "learning_rate=1", "learning_rate=1 guard=rewind"]),
    "data": ("", ["3 batches", "guard=skip", "guard=rewind", "clip=0.1"]),
    "init": ("initializer_range=0.5", ["initializer=scaled", "initializer_range=0.02",
                                       "initializer_range=0.02 initializer=scaled", "qk_norm=true", "clip=0.1"]),
    "precision": ("dtype=float16", ["dtype=bfloat16", "dtype=float32", "learning_rate=1",
                                    "learning_rate=1 dtype=bfloat16"]),
}


def spikes(words, o):
    """Trains a recipe as it is (`clean`), with a cause of CAUSES (`cause`), and with each of its fixes; all that comes
    before bad data is trained once. Prints a table, draws the losses; returns {arm: (bits per byte, how it went)}."""
    (cause, fixes), root, base, lines, found = CAUSES[o.cause], new_run_folder("spikes"), recipe_from(words), {}, {}
    tokens = base.tokens or 200 * base.batch_tokens * (o.cause != "data")  # bad data: all of the recipe
    if (steps := prepared(replace(base, tokens=tokens)).steps) < 200:
        raise UserError(f"{steps} steps are too few for this; give --tokens {200 * base.batch_tokens} or more")
    poison = range(round(0.8 * steps), round(0.84 * steps)) if o.cause == "data" else ()
    what = f"random tokens in steps {poison[0] + 1} to {poison[-1] + 1}" if poison else cause
    print(f"cause     {what}; {steps} steps; runs are in {root}\n"
          f"{'':42}bits per byte   to clean  largest loss  how it went")
    for name in ("clean", "cause", *fixes):
        flags = {"clean": "", "cause": cause, "3 batches": ""}.get(name, f"{cause} {name}")
        recipe = replace(recipe_from(words, flags), tokens=tokens, save_every=steps // 20, keep=20)
        if late := poison and name != "clean":
            early = find_checkpoint(root / "clean", before=poison[0] - schedule.Guard.MARGIN).name
            shutil.copytree(root / "clean", root / name, ignore=lambda _, names: [
                file for file in names if file.startswith("step-") and file != early])
        run, loss, stopped = prepared(recipe, root / name, late), math.nan, []
        try:
            bad = poison[:3] if name == "3 batches" else poison if late else ()
            loss = mean_loss(trained(run, functools.partial(poisoned_losses, poison=bad)))
        except train.Diverged:
            stopped = [f"not recovered: stopped at step {run.step}"]
        went = [event["kind"] for event in run.log.events if "kind" in event]
        went += ["not recovered"] * (run.guard.began is not None)
        went += [f"rewound to step {event['to']}" for event in run.log.events if event["event"] == "rewind"] + stopped
        points = [(entry["step"], entry["loss"]) for entry in run.log.entries() if entry.get("loss")]
        worse = loss / found.get("clean", (loss,))[0] - 1
        found[name] = loss, ", ".join(went) or "no spike"
        lines[f"{name}: {found[name][1]}"] = tuple(zip(*points))
        largest = max((y for _, y in points), default=math.nan)
        train.say(f"{name:42}{loss:13.4f}{worse:+11.1%}{largest:14.2f}  {found[name][1]}")
    draw_lines(root / "spikes.png", lines, xlabel="step", ylabel="loss, nats per token", yscale="log")
    return found


# (width, share of the tokens): several lengths at two widths, so that the law can tell tokens from parameters.
LADDER = [(32, 0.25), (64, 0.25), (32, 0.5), (64, 0.5), (32, 1), (48, 1), (64, 1), (96, 1), (128, 1)]
PREDICTED = 192  # the width whose loss the law must predict


def fit_ladder(words, o):
    """Trains LADDER, fits the law, predicts PREDICTED, trains it, and compares; all is in runs/ladder/law.json.
    `--tokens` is the length of a full rung (400k without it). Returns (predicted, measured)."""
    base, points = recipe_from(words), []
    tokens = base.tokens or 4e5
    for width, share in [*LADDER, (PREDICTED, 1)]:
        model = base.model.change(hidden_size=width, intermediate_size=3 * width, num_key_value_heads=1,
            num_attention_heads=max(1, round(width / 64)), initializer_range=0.05 * math.sqrt(128 / width))
        run = prepared(replace(base, model=model, tokens=tokens * share,
                               warmup_steps=math.ceil(0.04 * tokens * share / base.batch_tokens)))
        size = float(count_parameters(run.recipe.model)["total"])
        if width == PREDICTED:
            law = schedule.fit_law(points, "this ladder")
            predicted = law.loss(size, tokens)
            train.say(f"law          loss = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / "
                      f"D^{law.beta:.3f} bits per byte\npredicted    {predicted:.4f} for width {width}")
        list(updates(run, [run.rate(step) for step in range(run.steps)], f"width {width}"))
        points.append((size, tokens * share, mean_loss(held_out(run))))
        train.say(f"{len(points):3} of {len(LADDER) + 1}    width {width:4}{cost.say_number(size):>8} parameters"
                  f"{cost.say_number(tokens * share):>8} tokens  loss {points[-1][2]:.4f}")
    measured, folder = points[-1][2], new_run_folder("ladder")
    print(f"measured     {measured:.4f}: the prediction is off by {predicted / measured - 1:+.2%}; it is in {folder}")
    folder.mkdir(parents=True)
    write_json(folder / "law.json", {"law": asdict(law), "parameters, tokens, loss": points, "predicted": predicted})
    return predicted, measured


def at_checkpoint(words):
    """A run as it was at a checkpoint, or at the newest of a run folder; it writes nothing."""
    checkpoint = find_checkpoint(" ".join(words))
    run = prepared(replace(train.read_recipe(checkpoint.parent.parent)[0], start=str(checkpoint)))
    run.step = int(checkpoint.name[5:])
    return run


def branch(words, o):
    """Trains branches from a checkpoint with k times the batch and sqrt(k) times the rate; returns {k: bits per byte}.
    Critical is the largest k within epsilon of all smaller ones (Merrill et al. 2025). All read the sequences that come
    next in the run. The optimizer starts anew and the rate warms up over a fifth of the tokens, as in the playbook."""
    run, losses, largest = at_checkpoint(words), {}, 2**o.doublings
    recipe, curriculum, step = run.recipe, run.curriculum, run.step
    stage, batch = (of[curriculum.stage(step)] for of in (curriculum.stages, curriculum.batches))
    if (count := int(o.read / batch / largest)) < 4:  # updates with the largest batch
        raise UserError(f"--read {o.read:g} is fewer than 4 of the largest batches; give {4 * largest * batch}")
    rate = stage.learning_rate or schedule.scale_rate(recipe.learning_rate, batch / recipe.batch_tokens)
    read, passed = curriculum.tokens(step), curriculum.passed
    past = [replace(part, tokens=min(after, read) - before)
            for part, before, after in zip(curriculum.stages, passed, passed[1:]) if before < read]
    print(f"{'k':>4}{'batch':>12}{'rate':>10}{'updates':>9}{'held-out bits per byte':>24}")
    for k in (2**i for i in range(o.doublings + 1)):
        run, peak, steps = None, schedule.scale_rate(rate, k), count * largest // k  # the last run's memory is free
        next_stage = replace(stage, tokens=steps * k * batch, batch_tokens=k * batch)
        run = prepared(replace(recipe, stages=(*past, next_stage), tokens=0, micro_batch=0))
        for optimizer in run.optimizer.optimizers:
            optimizer.state.clear()
        run.step = run.steps - steps
        list(updates(run, [peak * schedule.warmup(i, round(steps / 5)) for i in range(steps)], f"k = {k}"))
        losses[k] = mean_loss(held_out(run))
        train.say(f"{k:4}{k * batch:12,}{peak:10.2e}{steps:9,}{losses[k]:24.4f}")
    best = schedule.critical_multiple(losses, o.epsilon)
    print(f"critical batch size at step {step:,}: {best * batch:,} tokens (k = {best}, epsilon {o.epsilon:g})"
          + " or more: no branch lost more; raise --doublings" * (best == largest))
    return losses


def noise(words, o):
    """The gradient noise scale at a checkpoint in tokens, from the squared norms of the gradients of single sequences
    and of all of them (McCandlish et al. 2018); nan if noise hides the gradient. Nothing is updated."""
    run, squares, scale = at_checkpoint(words), 0.0, math.nan
    train.enter_stage(run)
    context = run.model.config.max_position_embeddings
    rows, run.rows = run.curriculum.rows(run.step), [1] * len(run.rows)  # a piece of a batch is a sequence
    pieces = (piece for step in itertools.count(run.step) for piece in train.pretraining_losses(run, step))
    count, weights = max(16, int(o.read / context)), list(run.model.parameters())
    total = [torch.zeros_like(weight) for weight in weights]
    for n, piece in zip(range(1, count + 1), pieces):
        gradients = torch.autograd.grad(piece()[0] * rows, weights, materialize_grads=True)
        torch._foreach_add_(total, gradients)
        squares += float(get_total_norm(gradients)) ** 2
        if n in (count // 4, count // 2, count):  # shows whether it has settled
            signal, variance = schedule.gradient_noise(squares / n, float(get_total_norm(total) / n) ** 2, n)
            scale = variance / signal * context if min(signal, variance) > 0 else math.nan
            train.say(f"{n:9,} sequences: |G|^2 {signal:.3g}, tr(S) {variance:.3g}, noise scale {scale:,.0f} tokens")
    batch = rows * context
    print("noise hides the gradient; give more tokens to --read" if math.isnan(scale) else
          f"noise scale {scale:,.0f} tokens: a batch of this size needs twice the fewest steps and tokens; this run's\n"
          f"{batch:,} need {1 + scale / batch:.2f} times the fewest steps and {1 + batch / scale:.2f} times the fewest "
          "tokens. Adam may bear a larger batch: see `branch`.")
    return scale


COMMANDS = {"change": (change, "tries seeds out"), "lr-range": (lr_range, "low high steps"),
            "spikes": (spikes, "cause"), "fit": (fit_ladder, ""), "branch": (branch, "doublings epsilon read"),
            "noise": (noise, "read")}


def main():
    if "RANK" in os.environ:
        raise UserError("ablate.py trains in one process; start it with python, not torchrun")
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--try", dest="tries", action="append", metavar="NAME=VALUE",
                        help="change: a flag of train.py; several that belong together in quotes; once for each change")
    add_options(parser, AblationOptions)
    args, words = parser.parse_known_args()  # what is left is for train.py, or a run
    given = {name: value for name, value in vars(args).items() if value is not None}
    work, flags = COMMANDS[name := given.pop("command")]
    if wrong := set(given) - set(flags.split()):
        raise UserError(f"{name} takes no --{wrong.pop()}; see `python ablate.py --help`")
    check_options(options := AblationOptions(**given))
    work(words, options)


if __name__ == "__main__":
    run_command(main)
