"""Training: recipes, one update, one loop.

The playbook's run in miniature: three stages whose mixture moves from prose to code and math, a warmup-stable-decay
rate that decays in the last stage, AdamW, clipping, a global batch in tokens. Without an argument it makes a tokenizer
and token files from the Python installation, trains on them for a few minutes and writes runs/laptop.

    python train.py                                     # the laptop recipe, from nothing to a sample
    python train.py --minutes 5                         # as many tokens as this machine reads in 5 minutes
    python train.py laptop --data data/mine --tokens 2M
    torchrun --nproc_per_node=8 train.py baseline-1b    # the same code on eight GPUs
    torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py smollm3
    python train.py --resume runs/laptop
    python train.py --mixture code=.9,prose=.1          # or "decay:code=.8,math=.2;base:prose=1"
    python train.py --anneal runs/laptop --candidate math    # is this source worth more of the mixture?

torchrun kills 30 s after SIGTERM; to save 3B, raise --shutdown-timeout (torch 2.13 on) or lower --save_every.

Read `update`, then `train`, then what they call. Each field of `Recipe` but `stages`, and of its model, is a flag.
"""

import contextlib
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from tokenizer import (Parser, Tokenizer, UserError, add_options, check_options, given_options, number, option,
                       parse_options, reading, run as run_command, write_json)

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import cost
import evals
from checkpoint import Log, Saver, check_trackers, draw_log, find_checkpoint, load_checkpoint, new_run_folder
from data import PACKINGS, Curriculum, Stage, fit_stages, load_data, with_mixture
from model import (GPT, PRESETS, Attention, Block, GatedDeltaNet, ModelConfig, RMSNorm, Router, count_parameters,
                   watch_attention)
from sample import complete
from schedule import DECAYS, OPTIMIZERS, SCHEDULES, Guard, Optimizers, build_optimizer, laptop_excess, learning_rate


@dataclass(frozen=True)
class Recipe:
    """One training run. Tokens are counted over all processes."""
    model: ModelConfig = PRESETS["laptop"]
    stages: tuple = ()  # of Stage
    data: str = option("data/laptop", "prepared folders, separated by commas", group="data and length")
    mixture: str = option("", "SOURCE=SHARE,... of all stages, or STAGE:SOURCE=SHARE,...; several with ; between")
    tokens: float = option(0.0, "how long to train; 0: the sum of the stages, which otherwise shrink or grow", 0, 1e18)
    batch_tokens: int = option(8192, "global batch, in tokens", 1, 10**12)
    micro_batch: int = option(0, "sequences that a process computes at once; 0: as many as fit", 0)
    optimizer: str = option("adamw", "adamw, or muon for the hidden matrices", choices=OPTIMIZERS, group="optimizer")
    learning_rate: float = option(3e-3, "peak rate", 1e-12, 1e30)
    schedule: str = option("wsd", "shape of the rate: wsd, cosine or multistep", choices=SCHEDULES)
    warmup_steps: int = option(50, "steps until the peak rate", 0)
    decay_share: float = option(0.2, "share of the steps that decay, for wsd; -1: the last stage", -1, 1)
    decay_shape: str = option("linear", "linear, sqrt (1-sqrt) or cosine, for wsd", choices=DECAYS)
    final_share: float = option(0.0, "rate of the last step, as a share of the peak", 0, 1)
    weight_decay: float = option(0.1, "AdamW's decay, on all but the embedding", 0, 1e6)
    beta1: float = option(0.9, "AdamW's memory of the gradient", 0, 0.999999)
    beta2: float = option(0.95, "AdamW's memory of its square", 0, 0.999999)
    eps: float = option(1e-8, "added to AdamW's denominator", 0, 1)
    clip: float = option(1.0, "largest norm of the gradient", 1e-12, 1e30)
    z_loss: float = option(0.0, "weight of mean squared log-partition (OLMo 2: 1e-5)", 0, 1e6, group="loss, sequences")
    packing: str = option("concat", "how documents become sequences", choices=PACKINGS)
    document_mask: bool = option(True, "attention stays inside each document")
    eval_every: int = option(100, "steps between evaluations, each with a sample", 1, group="evaluation, checkpoints")
    eval_tokens: int = option(32_768, "held-out tokens of each source in an evaluation, always the same", 1)
    eval_tasks: str = option("", "tasks of evals.py in each evaluation, such as arithmetic,tasks/hellaswag.jsonl")
    save_every: int = option(500, "steps between checkpoints", 1)
    keep: int = option(2, "newest checkpoints that stay, besides the end of each stage", 1)
    keep_every: int = option(0, "checkpoints of multiples of so many steps stay too; 0: none", 0)
    guard: str = option("warn", "what to do about a loss spike", choices=("warn", "skip", "rewind"))
    log: str = option("", "other trackers, separated by commas: tensorboard, wandb, trackio")
    sample_prompt: str = option("", "text that samples continue; empty: the start of held-out documents")
    start: str = option("", "a run or checkpoint whose weights and moments a new run begins with")
    seed: int = option(0, "of the weights and the order of the data", 0, 2**63 - 1)
    device: str = option("auto", "where to train", choices=("auto", "cuda", "mps", "cpu"), group="machine")
    dtype: str = option("auto", "of the matrix products; weights are float32; float16 shows why nobody trains with it",
                        choices=("auto", "bfloat16", "float32", "float16"))
    compile: str = option("auto", "blocks; auto: on CUDA, or over 10 minutes of CPU", choices=("auto", "true", "false"))
    parallel: str = option("auto", "fsdp shards weights, gradients and moments", choices=("auto", "ddp", "fsdp"))
    activation_checkpointing: bool = option(False, "compute blocks twice instead of keeping their activations")
    deterministic: bool = option(False, "only deterministic kernels on CUDA, slower (a CPU's always are)")

    def __post_init__(self):
        check_options(self)
        check_trackers(self.log)
        if -1 < self.decay_share < 0:
            raise UserError(f"--decay_share {self.decay_share} is neither a share of the steps nor -1, the last stage")


# Smallest first. The laptop's stages are SmolLM3's first three in miniature: code and math take over from prose, and
# the rate decays in the last fifth (SmolLM3: a ninth). Sizes, batch and rate were measured (docs/results.md).
AT_SCALE = dict(warmup_steps=2000, save_every=2000, eval_every=1000, eval_tokens=2**20)
LONG = dict(learning_rate=2e-5, warmup_steps=1000, batch_tokens=2**21)
RECIPES = {
    "laptop": Recipe(
        stages=(Stage("base", 1.76e6, {"prose": 0.28, "code": 0.65, "math": 0.07}),
                Stage("quality", 0.4e6, {"prose": 0.18, "code": 0.70, "math": 0.12}),
                Stage("decay", 0.54e6, {"prose": 0.10, "code": 0.74, "math": 0.16})),
        batch_tokens=2048, decay_share=-1, eval_every=200),
    # SmolLM3's long-context stages in miniature, after the laptop run. Looking up is learned at 128 tokens, then
    # stretched; a run that began at 512 did not learn it. Documents stay whole, so that no question loses its notes.
    "laptop-long": Recipe(
        data="data/laptop,data/recall", start="runs/laptop",
        stages=(Stage("lookup", 0.4e6, {"recall-128": 0.8, "code": 0.1, "prose": 0.05, "math": 0.05}),
                Stage("long-512", 0.3e6, {"recall-512": 0.6, "code": 0.2, "prose": 0.1, "math": 0.1}, context=512,
                      rope_theta=5e4),
                Stage("long-2048", 0.4e6, {"recall-2048": 0.5, "code": 0.3, "prose": 0.1, "math": 0.1}, context=2048,
                      rope_theta=2e5)),
        batch_tokens=2048, warmup_steps=30, decay_share=0.3, packing="best-fit", eval_every=200),
    "smollm2-135m": Recipe(  # huggingface/smollm, text/pretraining/smollm2
        model=replace(PRESETS["smollm2-135m"], rope_theta=1e4, max_position_embeddings=2048), data="data/smollm2",
        stages=(Stage("base", 2e12, {}),), batch_tokens=2**20, learning_rate=3e-3, weight_decay=0.01, **AT_SCALE),
    "baseline-1b": Recipe(  # the playbook's ablation baseline: 45B tokens, 1.5 days on 8 H100s
        model=replace(PRESETS["llama-3.2-1b"], position="rope", rope_theta=5e4, max_position_embeddings=4096),
        data="data/fineweb-edu,data/stack-edu-python,data/finemath",
        stages=(Stage("base", 45e9, {"fineweb-edu": 0.7, "stack-edu-python": 0.2, "finemath": 0.1}),),
        batch_tokens=8 * 16 * 3 * 4096, learning_rate=5e-4, schedule="cosine", final_share=0.1, **AT_SCALE),
    # huggingface/smollm, text/pretraining/smollm3; FineWeb-Edu and DCLM share what papers and Wikipedia had; code
    # counts StackExchange. It kept its batch in long context; 2.1M tokens also divide by 8 and 32 processes.
    "smollm3": Recipe(
        model=replace(PRESETS["smollm3-3b"], rope_theta=5e4, max_position_embeddings=4096),
        data="data/english,data/multilingual,data/code,data/math,data/reasoning",
        stages=(Stage("base", 8.14e12,
                      {"fineweb-edu": 0.343, "dclm": 0.381, "multilingual": 0.120, "code": 0.129, "math": 0.027}),
                Stage("quality", 1.76e12,
                      {"fineweb-edu": 0.308, "dclm": 0.339, "multilingual": 0.117, "code": 0.145, "math": 0.091}),
                Stage("decay", 1.2359e12, {"fineweb-edu": 0.205, "dclm": 0.307, "multilingual": 0.123, "code": 0.234,
                                           "math": 0.131, "reasoning": 0.001}),
                Stage("long-32k", 47.2e9, {"fineweb-edu": 0.142, "dclm": 0.265, "multilingual": 0.111, "code": 0.228,
                                           "math": 0.148, "reasoning": 0.106}, context=32768, rope_theta=2e6, **LONG),
                Stage("long-64k", 51.9e9, {"fineweb-edu": 0.163, "dclm": 0.303, "multilingual": 0.108, "code": 0.200,
                                           "math": 0.130, "reasoning": 0.096}, context=65536, rope_theta=5e6, **LONG)),
        batch_tokens=2_359_296, learning_rate=2e-4, decay_share=-1, activation_checkpointing=True, **AT_SCALE),
}


# ---- one process or many --------------------------------------------------------------------------------------

class World:
    """This process among those that `torchrun` started; alone without it."""
    def __init__(self, rank=0, size=1, store=None):
        self.rank, self.size, self.leader, self.store = rank, size, rank == 0, store

    @classmethod
    def join(cls):
        if "RANK" not in os.environ:
            return cls()
        if cuda := torch.cuda.is_available():
            if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
                raise UserError(f"process {local} finds {torch.cuda.device_count()} GPU(s); lower --nproc_per_node")
            torch.cuda.set_device(local)
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
                                timeout=timedelta(days=7))  # the first may have terabytes to read before it answers
        return cls(rank, size, store)

    def agree(self, value=None):
        """The first process's value, in all of them; waits for it."""
        return self.gather(value)[0]

    def gather(self, value):
        """A list of every process's value, in all of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, tensor):
        """The tensor summed over the processes, in place; does not wait for the device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@dataclass
class Run:
    """All that a training works with. What changes from step to step: weights, moments, `guard`, `step`."""
    recipe: Recipe
    folder: Path
    world: World
    machine: cost.Machine
    tokenizer: Tokenizer
    model: GPT  # computes, is evaluated and saved
    optimizer: Optimizers
    guard: Guard
    steps: int  # of the whole run
    rate: Callable  # learning rate of the update that begins at a step
    step: int = 0  # updates made so far
    parallel: nn.Module | None = None  # the model through which gradients are averaged: itself, or DDP around it
    curriculum: Curriculum | None = None  # packed text: pre-training and SFT
    sources: list = field(default_factory=list)  # {"train": Split, "val": Split} of each
    rows: list = field(default_factory=list)  # sequences of a micro-batch, by stage
    loader: "Loader | None" = None
    log: Log | None = None  # the first process's
    fingerprint: dict = field(default_factory=dict)  # {source: sha256 of what it trains on}
    flops: float = 0.0  # per token
    tokens_per_step: float = 0.0  # where there is no curriculum
    speed: float = 0.0  # tokens per second of all processes, measured before the run
    found: dict = field(default_factory=dict)  # {name: tensor} that losses report besides, summed over pieces
    signals: list = field(default_factory=list)  # SIGINT and SIGTERM that arrived
    command: str = "python train.py"

    def tokens_before(self, step):
        return self.curriculum.tokens(step) if self.curriculum else step * self.tokens_per_step


# ---- one update -----------------------------------------------------------------------------------------------

def update(run, losses, rate):
    """One optimizer step from a batch in pieces, without waiting for the device. Each of `losses` returns, of a piece,
    what is minimised, z-loss and routing loss included, and its share of the batch's mean loss. The `Report` has sums
    over all processes. After a loss or norm that is not finite, none changes its weights."""
    world, parts, run.found = run.world, [], {}
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    for i, loss_of_piece in enumerate(losses, 1):
        run.parallel.require_backward_grad_sync = i == len(losses)  # DDP averages once; FSDP every time
        minimised, loss = loss_of_piece()
        (minimised * world.size).backward()  # DDP and FSDP divide by the number of processes
        parts.append(loss.detach())
    clip = run.recipe.clip / (2 if run.step < run.guard.tight_until else 1)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's is sharded
    signals = torch.full_like(norm, len(run.signals))  # made on the device: copying a number there would wait
    local = {"loss": torch.stack(parts).sum(), "signals": signals, **run.found}
    summed = world.sum(torch.stack([value.float().to(norm.device) for value in local.values()]))
    values = dict(zip(local, summed)) | {"grad_norm": norm}
    values |= run.guard.judge(values["loss"], norm)
    run.optimizer.found_inf = values["dropped"]  # stays on the device; 1 leaves weights and moments as they are
    run.optimizer.step()
    run.model.zero_grad(set_to_none=run.parallel is run.model)  # DDP's gradients are views of its buckets
    if loads := run.model.balance_experts(1 - values["dropped"]):
        values["expert_load"] = torch.stack(loads).max()  # of the layers: the fullest expert's load over the mean
    return Report(run.step, values, parts)


def pretraining_losses(run, step):
    """The losses of this process's micro-batches of a step: next-token prediction on the curriculum's rows."""
    curriculum, rows = run.curriculum, run.rows[run.curriculum.stage(step)]
    share = 1 / max(1, curriculum.targets(step))  # over all processes: a mean of means would favour short batches
    pieces = [(step, first + run.world.rank * rows, rows)
              for first in range(0, curriculum.rows(step), run.world.size * rows)]

    def loss_of(piece, following):
        tokens, targets, cu_seqlens = run.loader.get(piece, following)
        minimised, nats = run.parallel(tokens, cu_seqlens if run.recipe.document_mask else None, targets=targets,
                                       z_loss=run.recipe.z_loss)
        return (minimised + run.model.routing_loss() * tokens.numel()) * share, nats.sum() * share

    following = [*pieces[1:], (step + 1, run.world.rank * rows, rows)]
    return [functools.partial(loss_of, *pair) for pair in zip(pieces, following)]


class Report:
    """What an update found, on its way to the host while the device works; `read` waits for these numbers only."""
    def __init__(self, step, values, parts):
        self.step, self.names, self.parts = step, list(values), parts  # parts: the loss of each piece of this process
        numbers = torch.stack([value.float() for value in values.values()])
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self.arrived = torch.cuda.current_stream().record_event() if numbers.is_cuda else None

    def read(self):
        if self.arrived:
            self.arrived.synchronize()
        return dict(zip(self.names, self.numbers.tolist()))


# ---- the loop -------------------------------------------------------------------------------------------------

class Interrupted(Exception):
    """A signal asked the run to stop; the checkpoint is written."""


class Diverged(UserError):
    """A loss or a gradient is not finite, or rewinds did not help."""


def train(run, losses_of=pretraining_losses, evaluate=None):
    """Trains until the end, a signal or an error; returns the last evaluation. posttrain.py runs the same loop.
    `losses_of(run, step)`: see `update`; `evaluate(run, last)` prints how the model does and returns it for the log. On
    CUDA a step's numbers are read while the next is computed, so that the GPU never waits for the host."""
    recipe, guard, scores, evaluate = run.recipe, run.guard, {}, evaluate or evaluate_text
    lag = 1 if run.machine.device == "cuda" else 0
    ends = run.curriculum.ends if run.curriculum else ()
    saver = Saver(run.folder, run.tokenizer, recipe.keep, recipe.keep_every, ends, run.world.leader)
    if not run.step:
        saver.save(0, run.model, run.optimizer, guard.state(0), must=True)  # proves that the disk works
    with contextlib.closing(Meter(run, saver)) as meter:
        while run.step < run.steps:
            enter_stage(run)
            meter.waiting.append(update(run, losses_of(run, run.step), run.rate(run.step)))
            run.step = guard.after_gap(run.step + 1)  # skips what a rewind leaves out
            last = run.step == run.steps
            judges = last or run.step == 1 or run.step % recipe.eval_every == 0
            saves = last or run.step in ends or run.step % recipe.save_every == 0
            stop, spike = meter.read(0 if judges or saves else lag)
            if spike:
                meter.warn(saver.finish())
                meter.waiting.clear()
                go_back(run, spike)
                meter.mark = time.perf_counter()
                continue
            stop = stop and not last
            if judges and not stop:  # before the save: a checkpoint's log is complete
                scores = evaluate(run, last)
                meter.write(train_seconds=meter.seconds, **scores)
            if saves or stop:
                started = time.perf_counter()
                meter.warn(saver.save(run.step, run.model, run.optimizer, guard.state(run.step), must=last or stop,
                                      protect=guard.began))
                meter.write(save_seconds=time.perf_counter() - started)
            if stop:
                raise Interrupted(f"Stopped after step {run.step:,} of {run.steps:,} and saved; resume with: "
                                  f"{run.command} --resume {run.folder}")
    return scores


def say(text):
    """A line above the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def enter_stage(run):
    """Sets what changes with a stage besides the data: the context and RoPE's base."""
    if curriculum := run.curriculum:
        number, base = curriculum.stage(run.step), run.recipe.model
        if run.step in curriculum.ends:
            run.guard.lowest = run.guard.guessing  # other data may have a higher loss
        run.model.config = base.change(max_position_embeddings=curriculum.contexts[number],
                                       rope_theta=curriculum.stages[number].rope_theta or base.rope_theta)


def go_back(run, event):
    """Rewinds a run to a checkpoint from before a spike, and has its guard skip the batches around it. They need not be
    bad data: PaLM (Chowdhery et al. 2022, section 5.1) trained on such batches from an earlier checkpoint and saw no
    spike. It takes certain batches and a certain state of the weights together."""
    guard, began, at = run.guard, event["began"], event["step"]
    rewinds = guard.rewinds + 1 if began <= guard.tight_until else 1  # the same trouble, or a new one
    what = f"step {at:,}: the loss has not recovered from the spike at step {began:,}"
    if rewinds > Guard.TRIES:
        raise Diverged(f"{what}, and {Guard.TRIES} rewinds did not help, so it is not the data; remove checkpoints "
                        "from that step on and --resume with a lower --learning_rate or --clip")
    margin = Guard.MARGIN * 2 ** (rewinds - 1)
    gap = [began - 1 - margin, min(at + margin, run.steps - 1)]
    saved = {int(path.name[5:]): path for path in (run.folder / "checkpoints").glob("step-????????")}
    before = began - Guard.MARGIN * (min(saved, default=0) < began - Guard.MARGIN)  # or what is left
    whole = run.world.agree(find_checkpoint(run.folder, before) if run.world.leader else None)
    state = load_checkpoint(whole, run.model, run.optimizer)
    guard.restore(state | {"skipped": [*guard.skipped, gap], "rewinds": rewinds, "tight_until": gap[1] + Guard.WINDOW})
    run.step = guard.after_gap(state["step"])
    if run.world.leader:
        for step in saved:
            if step > state["step"]:  # what is undone must not be resumed
                shutil.rmtree(saved[step])
        run.log.forget(state["step"])
        run.log.write(**event, to=state["step"], skipped=gap, rewinds=rewinds)
        say(f"{what}: back to step {state['step']:,}; skips batches {gap[0]:,} to {gap[1]:,}, clips at half a while")


class Meter:
    """Reads what updates report into the log and the progress bar, and notes signals, so that no step is half done."""
    def __init__(self, run, saver):
        self.run, self.saver, self.waiting = run, saver, []  # waiting: reports that are not read yet
        self.handlers = {kind: signal.signal(kind, lambda kind, _: run.signals.append(kind))
                         for kind in (signal.SIGINT, signal.SIGTERM)}  # what they were before
        entries = run.log.entries() if run.log else ()
        self.seconds = max((e.get("train_seconds", 0.0) for e in entries), default=0.0)  # spent in updates so far
        self.bar = tqdm(total=run.steps, initial=run.step, disable=not run.world.leader, dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 10,
                        bar_format="{n_fmt}/{total_fmt} steps [{elapsed}]{postfix}")
        self.pace = run.speed  # then averaged; evaluations would spoil tqdm's own estimate of the time left
        self.mark = time.perf_counter()  # when the last update was read, or something else than training ended

    def write(self, **entry):
        """Logs what something else than an update found."""
        if self.run.log:
            self.run.log.write(step=self.run.step, tokens=self.run.tokens_before(self.run.step), **entry)
        self.mark = time.perf_counter()

    def warn(self, sentence):
        if sentence and self.run.log:
            tqdm.write(f"warning   step {self.run.step:,}: {sentence}", file=sys.stderr)
            self.write(event="warning", text=sentence)

    def read(self, most):
        """Reads reports until `most` wait; whether a signal came to a process, and the spike to rewind from, if any."""
        run, stop = self.run, False
        while len(self.waiting) > (0 if stop else most):
            report = self.waiting.pop(0)
            values = report.read()
            if values["stopped"]:
                self.warn(self.saver.finish())  # it is the last one
                raise Diverged(blame(run, report, values))
            stop, event = stop or values["signals"] > 0, run.guard.follow(report.step + 1, values)
            if run.log:
                self.count(report.step, values)
            if event and event["event"] == "rewind":
                return stop, event
            if event and run.log:
                run.log.write(**event)
                say(f"step {report.step + 1:,}: {event['text']}")
        return stop, None

    def count(self, at, values):
        """Logs and shows the update that began at step `at`."""
        run, now = self.run, time.perf_counter()
        seconds, self.mark = now - self.mark, now
        self.seconds += seconds
        begin, end = run.tokens_before(at), run.tokens_before(at + 1)
        speed = (end - begin) / seconds
        self.pace = 0.95 * (self.pace or speed) + 0.05 * speed
        stage = run.curriculum.stages[run.curriculum.stage(at)].name if run.curriculum else run.recipe.method
        entry = {"stage": stage, "loss": values["loss"], "lr": run.rate(at), "grad_norm": values["grad_norm"],
                 "tokens_per_second": speed,
                 "share_of_peak": speed * run.flops / run.machine.peak_flops / run.world.size}
        entry |= {name: values[name] for name in (*run.found, "expert_load") if name in values}
        entry |= {"dropped": True} if values["dropped"] else {}
        run.log.write(step=at + 1, tokens=end, batch_tokens=end - begin, **entry, train_seconds=self.seconds,
                      data_seconds=run.loader.seconds if run.loader else 0.0)
        left = tqdm.format_interval((run.tokens_before(run.steps) - end) / self.pace)
        shown = ", ".join(f"{name} {entry[name]:.3g}" for name in ("loss", "lr", "grad_norm", *run.found))
        self.bar.set_postfix_str(f"{left} left; {stage}: {shown}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(at + 1 - self.bar.n)

    def close(self):
        self.bar.close()
        self.warn(self.saver.finish())
        if self.run.log:
            self.run.log.close()
        for kind, handler in self.handlers.items():
            signal.signal(kind, handler)


def blame(run, report, values):
    """Why an update was not made, naming processes and their pieces of the batch; every process calls it."""
    world, rows = run.world, run.rows[run.curriculum.stage(report.step)] if run.curriculum else 0
    places = []
    for i, part in enumerate(report.parts):
        if not part.isfinite():
            first = (i * world.size + world.rank) * rows
            sequences = f" (sequences {first} to {first + rows - 1})" * bool(rows)
            places.append(f"process {world.rank}, micro-batch {i + 1}{sequences}")
    places = sum(world.gather(places), [])
    what = f"step {report.step + 1}: the loss is {values['loss']} and the gradient norm {values['grad_norm']}"
    return "; ".join([what, *places[:4], "this update was not made and nothing was saved; resume the last checkpoint "
                      f"with a lower --learning_rate or --clip: {run.command} --resume {run.folder}"])


# ---- batches and evaluations ----------------------------------------------------------------------------------

class Loader:
    """Micro-batches of a curriculum on the device. On CUDA a thread makes the next while the GPU works on this one; a
    CPU, which has no time to spare, makes it when it is wanted. It has no state that a checkpoint would need."""
    def __init__(self, curriculum, device):
        self.curriculum, self.device, self.ahead = curriculum, device, {}
        self.seconds = 0.0  # spent waiting for data
        self.pool = ThreadPoolExecutor(1) if device == "cuda" else None

    def make(self, step, first, count):
        batch = self.curriculum.batch(step, first, count)
        tensors = [torch.from_numpy(x) for x in (batch.tokens, batch.targets, batch.cu_seqlens)]
        return [x.pin_memory() for x in tensors] if self.pool else tensors

    def get(self, now, following=None):
        """tokens and targets [B, T], cu_seqlens of the micro-batch `now`, (step, first row, rows)."""
        started = time.perf_counter()
        tensors = self.ahead.pop(now).result() if now in self.ahead else self.make(*now)
        if self.pool and following and following[0] < self.curriculum.steps:
            self.ahead = {following: self.pool.submit(self.make, *following)}
        self.seconds += time.perf_counter() - started
        return tuple(x.to(self.device, non_blocking=self.pool is not None) for x in tensors)


def held_out_bits(run, split, tokens):
    """`evals.bits_per_byte` with the shapes and masks of training; the processes take turns."""
    rows = run.rows[run.curriculum.stage(min(run.step, run.steps - 1))]
    return evals.bits_per_byte(run.model, run.tokenizer, split, tokens, rows, run.recipe.document_mask, run.world).mean


def evaluate_text(run, last):
    """Held-out bits per byte of each source, scores of eval_tasks, what `watch` finds, and a sample: how the model
    continues the first words of a held-out document, of one source in turn; at the end three, of each at least one."""
    recipe, tokenizer, samples = run.recipe, run.tokenizer, []
    scores = {source["val"].name: held_out_bits(run, source["val"], recipe.eval_tokens) for source in run.sources}
    tasks = evals.evaluate(run.model, tokenizer, evals.tasks_of(recipe.eval_tasks, recipe.data))
    listed = [f"{name} {score:.3f}" for name, score in scores.items()]
    listed += [f"{name} {score}" for name, score in tasks.items()]
    say(f"step {run.step:,}: held-out bits per byte (lower is better): {', '.join(listed)}")
    count, length = len(run.sources), min(96, recipe.model.max_position_embeddings // 2)
    turn = run.step // recipe.eval_every % count
    for i in range(max(3, count)) if last and not recipe.sample_prompt else [turn]:
        prompt = recipe.sample_prompt or opening(tokenizer, run.sources[i % count]["val"], i // count)
        text, = complete(run.model, tokenizer, prompt, length, min_p=0.05, seed=run.step + i // count)
        samples.append(prompt + text)
        say(f"  after {prompt!r}\n    | " + text.strip().replace("\n", "\n    | "))
    say("")
    return {"val": scores, "samples": samples, "tasks": tasks, **watch(run)}


def opening(tokenizer, split, number=0):
    """The first line of a held-out document that has three words and is no comment; of a long one the first words."""
    begin, end = split.starts[number % (len(split.starts) - 1):][:2]
    text = tokenizer.decode(split.tokens[begin + 1:end][:999].tolist())
    return (re.search(r"(?m)^(?! *#)(?=.*\S +\S+ +\S).{1,40}(?!\S)", text) or re.match(".{,40}", text))[0]


def conclude(run, scores):
    """Prints the held-out bits per byte {source: score} beside what they may be compared with."""
    with contextlib.suppress(ImportError):  # some installations of Python lack lzma
        import lzma
        for split in (source["val"] for source in run.sources):
            ids = split.tokens[:run.recipe.eval_tokens].tolist()
            text = run.tokenizer.decode_bytes(id for id in ids if id != run.tokenizer.eos_id)
            bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
            print(f"compare   {split.name}: {scores[split.name]:.3f} bits per byte, where xz -9e needs "
                  f"{bits / len(text):.3f} for the same text; guessing needs 8")
    if run.recipe.data == "data/laptop" and run.recipe.model == PRESETS["laptop"]:
        print("compare   on all held-out code (docs/results.md) the whole laptop recipe reaches 1.501, nanoGPT's CPU "
              "recipe, trained as long, 2.150")


@torch.no_grad()
def watch(run):
    """What comes before trouble: the last batch's loss by source, extremes of logits, attention scores and entropy of
    its first micro-batch, the attention that its first tokens take, and how far the last update moved the weights (a
    healthy run: 1e-3 of their norm)."""
    rows = run.rows[run.curriculum.stage(run.step - 1)]
    piece = run.step - 1, run.world.rank * rows, rows
    tokens, targets, cu_seqlens = run.loader.get(piece)
    with watch_attention() as (extremes, logits):
        _, by_token = run.model(tokens, cu_seqlens if run.recipe.document_mask else None, targets=targets)
    sums = torch.zeros(2, len(run.sources), device=tokens.device)  # nats and targets
    for row, source in enumerate(run.curriculum.locate(*piece)[0]):
        sums[0, source] += by_token[row].sum()
        sums[1, source] += (targets[row] >= 0).sum()
    nats, counts = run.world.sum(sums).tolist()
    found = {"loss_by_source": {split["train"].name: n / k for split, n, k in zip(run.sources, nats, counts) if k},
             "logit_max": max(logits).item(), "memory": cost.peak_memory(run.machine.device),
             "update_to_weight": run.optimizer.update_to_weight()}
    if extremes:
        score, low, high, first = torch.stack(extremes).unbind(1)
        found |= {"attention_score_max": score.max().item(), "attention_entropy_min": low.min().item(),
                  "attention_entropy_max": high.max().item(),
                  "attention_first_token": first.nanmean().item()}  # nan: no query of the layer sees it
    return found


# ---- setting up -----------------------------------------------------------------------------------------------

def read_recipe(folder, kind=Recipe):
    """The recipe of a run, a `kind`, and {source: sha256 of the tokens} that it trains on."""
    with reading(folder / "recipe.json", "it is damaged, of an older version or no run; give one such as runs/laptop"):
        saved = json.loads((folder / "recipe.json").read_text("utf-8"))
        sources = saved.pop("sources")
        saved["model"], saved["stages"] = ModelConfig(**saved["model"]), tuple(Stage(**s) for s in saved["stages"])
        return kind(**saved), sources


def shard(model, dtype):
    """FSDP, block by block, so that the whole need never fit on a device. Weights are gathered in `dtype`, but exactly
    where the model computes with them in fp32: routers, decays, sinks, T5's biases, gains of 1 + weight."""
    exact, rounded = (MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32) for kind in (None, dtype))
    biased = model.config.attention_sinks or model.config.position == "relative"
    kinds = (Router, GatedDeltaNet) + (Attention,) * biased + (RMSNorm,) * model.config.norm_zero_centered
    for part in reversed([*model.modules()]):  # parts before what holds them
        if isinstance(part, (*kinds, Block, GPT)):
            fully_shard(part, mp_policy=exact if isinstance(part, kinds) else rounded)


def make_run(recipe, folder, world, machine, tokenizer, model, steps, rate, begun=None, resume=False, **more):
    """Takes a model, on the CPU, to the device: sharding, optimizer, guard, and the state of the checkpoint `begun`."""
    model.compute_dtype, model.recompute = machine.dtype, recipe.activation_checkpointing
    if recipe.parallel == "fsdp" and world.size > 1:
        shard(model, machine.dtype)
    model = model.to(machine.device)
    optimizer = build_optimizer(model, recipe.learning_rate, recipe.weight_decay, (recipe.beta1, recipe.beta2),
                                recipe.eps, recipe.optimizer, machine.dtype)
    guard = Guard(recipe.guard, machine.device, math.log(recipe.model.vocab_size))
    run = Run(recipe, folder, world, machine, tokenizer, model, optimizer, guard, steps, rate, parallel=model, **more)
    if begun:
        state = load_checkpoint(begun, model, optimizer)
        if resume:
            run.step = state["step"]
            with reading(begun / "training.json"):
                guard.restore(state)
    if machine.compile:
        model.compile_blocks()
    return run


def training_speed(run, compile):
    """Measures run.speed on the first rows. A long run on a CPU is compiled if --compile was "auto", and its
    recipe says so: resumed, it does the same, because compiled code rounds differently."""
    world, (inputs, _, cu_seqlens) = run.world, run.loader.get((0, 0, run.rows[0]))
    starts = cu_seqlens if run.recipe.document_mask else None
    attended = run.curriculum.contexts[0] if starts is None else cost.attended_length(starts.diff().tolist())
    run.flops = cost.flops_per_token(run.recipe.model, attended)
    measure = functools.partial(cost.measure_speed, run.model, inputs, starts, 0.0 if world.size > 1 else 1.0)
    run.speed = world.agree(world.size * measure())
    minutes = (run.tokens_before(run.steps) - run.tokens_before(run.step)) / run.speed / 60
    if cost.compiling_pays(compile, run.machine.device, minutes):
        print(f"machine   compile on: {minutes:.0f} minutes are planned; compiling, about 25 s, pays after two")
        run.model.compile_blocks()
        run.speed = world.size * measure()
        run.recipe = replace(run.recipe, compile=str(run.model.compiled).lower())


def connect(run):
    """From here on gradients are averaged over the processes, and the first process logs."""
    if run.world.size > 1 and run.recipe.parallel != "fsdp":
        run.parallel = nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    if run.world.leader:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / "recipe.json", asdict(run.recipe) | {"sources": run.fingerprint})
        if not (run.folder / "tokenizer.json").exists():  # a kill while it is written again would damage a run
            run.tokenizer.save(run.folder)
        run.log = Log(run.folder, run.recipe, run.step)
    print(f"run       {run.folder}, step {run.step:,} of {run.steps:,}; Ctrl-C stops and saves\n", flush=True)
    return run


def set_up(recipe, folder, world=None, resume=False):
    """Checks everything that can be wrong, in every stage, prints the plan, and returns what is needed to pre-train."""
    world, context, compile = world or World(), recipe.model.max_position_embeddings, recipe.compile
    longest = max(stage.context or context for stage in recipe.stages)
    if recipe.model.position == "learned" and longest > context:
        raise UserError(f"--position learned ends at {context} tokens, but a stage has {longest}; take rope")
    cost.stage_rows(recipe, world.size, "cpu")  # reject an impossible batch size first
    begun = find_checkpoint(folder if resume else recipe.start) if resume or recipe.start else None
    machine = world.agree(cost.choose_machine(recipe))
    print(f"machine   {machine.reason}")
    loaded = load_data(recipe.data, recipe.model.vocab_size) if world.leader else None
    world.agree()  # the first process makes the data, or checks terabytes of it
    tokenizer, sources = loaded or load_data(recipe.data, verify=False)
    splits = [source["train"] for source in sources]
    fingerprint = {split.name: split.sha256 for split in splits}
    if resume and read_recipe(folder)[1] != fingerprint:
        raise UserError(f"{recipe.data} is not the data that {folder} began with; put that back or start a new run")
    stages = fit_stages(recipe.stages, [split.name for split in splits], recipe.tokens, recipe.mixture)
    if recipe.decay_share == -1 and len(stages) < len(recipe.stages):  # collapsed: the last stage's share still decays
        recipe = replace(recipe, decay_share=recipe.stages[-1].tokens / sum(s.tokens for s in recipe.stages))
    recipe = cost.settle(replace(recipe, model=recipe.model.change(vocab_size=tokenizer.vocab_size), stages=stages,
                                 tokens=sum(stage.tokens for stage in stages)), machine, world.size, longest)
    rows = world.agree(cost.stage_rows(recipe, world.size, machine.device))
    evals.tasks_of(recipe.eval_tasks, recipe.data)  # a mistake in them ends the run now, not at step 100
    curriculum = Curriculum(splits, list(stages), context, recipe.batch_tokens, recipe.seed, recipe.packing)
    memory = cost.check_memory(recipe, machine, world.size, rows, curriculum)
    torch.manual_seed(recipe.seed)
    run = make_run(recipe, folder, world, machine, tokenizer, GPT(recipe.model), curriculum.steps,
                   functools.partial(learning_rate, recipe, curriculum), begun, resume, curriculum=curriculum,
                   sources=sources, rows=rows, loader=Loader(curriculum, machine.device), fingerprint=fingerprint)
    training_speed(run, compile)
    print_run(run, memory)
    return run


def print_run(run, memory):
    """The plan; `memory` in bytes of a process."""
    recipe, plan, config, size = run.recipe, run.curriculum, run.recipe.model, run.world.size
    count, tokens, epochs = count_parameters(config), plan.tokens(plan.steps), plan.epochs()
    read = [f"{s.name} {len(s.tokens):,} tokens, read {epochs[s.name]:.2f} times" for s in plan.sources]
    print("data      " + "; ".join(read))
    print(f"model     {count['total']:,} parameters ({count['non_embedding']:,} without embeddings): "
          f"{config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary {config.vocab_size:,}; "
          f"{memory / 2**20:,.0f} MiB at the peak; {size} process(es)" + ", FSDP" * (recipe.parallel == "fsdp"))
    for i, (stage, begin, end) in enumerate(zip(plan.stages, plan.begins, plan.ends)):
        context, rows, base = plan.contexts[i], run.rows[i], stage.rope_theta or config.rope_theta
        mixture = ", ".join(f"{share:.0%} {split.name}" for split, share in zip(plan.sources, plan.shares[i]) if share)
        pieces = plan.batches[i] // context // rows // size
        print(f"stage     {stage.name:8} steps {begin:,} to {end:,}: {mixture}; a step of {plan.batches[i]:,} tokens: "
              f"{pieces} x {rows} rows of {context:,} a process; RoPE base {base:g}")
    for line in plan.report():
        print(line)
    print(f"plan      {plan.steps:,} steps, {tokens:,} tokens, 6ND = {6 * count['active'] * tokens:.2e} FLOPs, about "
          f"{tokens / run.speed / 60:.1f} minutes at {run.speed:,.0f} tokens/s (measured just now); the log's share_of_"
          f"peak = tokens/s x {run.flops:,.0f} FLOPs per token / ({size} x {run.machine.peak_flops:.3g} FLOP/s)")


def pretrain(recipe, folder, resume=False, world=None):
    """Runs or resumes a recipe in a run folder; returns held-out bits per byte of each source at the end."""
    run = connect(set_up(recipe, folder, world, resume))
    if run.step == run.steps:
        print(f"finished  all {run.steps:,} steps are done; {train_longer(folder)}")
    scores, verdict = train(run), ""
    if run.world.leader and scores:
        conclude(run, scores["val"])
        held_out = sum(share * scores["val"][source["val"].name] * math.log(2) * source["val"].bytes
                       / len(source["val"].tokens) for source, share in zip(run.sources, run.curriculum.shares[-1]))
        excess = laptop_excess(scores["val"], count_parameters(run.recipe.model)["active"],
                               run.tokens_before(run.steps), run.steps)
        if verdict := run.guard.verdict([e["loss"] for e in run.log.entries() if "loss" in e], held_out, excess):
            print(f"verdict   {verdict}")
    if run.world.leader and draw_log(folder):
        print(f"The curves are in {folder}/loss.png")
    prompt = shlex.quote(opening(run.tokenizer, run.sources[0]["val"]))
    ended = "Ended" if verdict else "Done"
    print(f"{ended}: {folder}. Try next:\n  python sample.py {folder} --samples 3 --prompt {prompt}\n"
          f"  python posttrain.py sft {folder}      # teaches it to answer, then python sample.py {folder}-sft --chat\n"
          f"  python ablate.py change laptop --data {recipe.data} --tokens 4e5 --try optimizer=muon  # is it better?")
    return scores.get("val", {})


def check(recipe, world):
    """`--check`: what a long run could fail at in its first hours, tried in a minute; leaves nothing behind."""
    folder = world.agree(new_run_folder(".check"))
    try:
        run, seconds, begin = connect(set_up(recipe, folder, world)), 0.0, 0
        size, free = 12.0 * count_parameters(run.recipe.model)["total"], shutil.disk_usage(folder).free
        kept = recipe.keep + 1 + len(run.curriculum.ends) + run.steps // (recipe.keep_every or run.steps + 1)
        if kept * size > free:
            raise UserError(f"--check: {kept} checkpoints of {size / 2**30:.2f} GiB do not fit on the disk with "
                            f"{free / 2**30:.1f} GiB free; lower --keep or raise --keep_every")
        print(f"ok        data whole by its sha256; memory; disk for {kept} checkpoints of {size / 2**30:.2f} GiB")
        for stage, end in zip(run.curriculum.stages, run.curriculum.ends):
            for run.step in (begin, begin):  # the first may compile
                started = time.perf_counter()
                enter_stage(run)
                values = update(run, pretraining_losses(run, run.step), 0.0).read()
                each = time.perf_counter() - started
            if values["stopped"]:
                raise UserError(f"--check: stage {stage.name} has a loss of {values['loss']}; lower --learning_rate")
            print(f"ok        stage {stage.name}: loss {values['loss']:.3f}, {each:.2f} s per step")
            seconds, begin = seconds + each * (end - begin), min(end, run.steps - 1)
        saver = Saver(folder, run.tokenizer, leader=world.leader)
        saver.save(2, run.model, run.optimizer, run.guard.state(2), must=True)
        world.agree()
        load_checkpoint(folder / "checkpoints/step-00000002", run.model, run.optimizer)
        finish = datetime.now() + timedelta(seconds=seconds)
        print(f"ok        a save and a load; without evaluations it would end on {finish:%Y-%m-%d at %H:%M}")
        world.agree()
    finally:
        if world.leader:
            shutil.rmtree(folder, ignore_errors=True)


# What a resumed run may change; everything else would make the step number mean something else.
RESUMABLE = set("""micro_batch learning_rate clip eval_every eval_tokens eval_tasks save_every log data sample_prompt
    device dtype compile keep keep_every guard parallel activation_checkpointing deterministic""".split())


def annealing(start, candidate, given):
    """The playbook's test of a data set: from a checkpoint, or a run's after its first stage, 40 % of the base mixture
    and 60 % of the candidate while the rate falls to 0 (SmolLM3: 50B tokens from 7T on); or the base alone."""
    begun = find_checkpoint(start)
    recipe, _ = read_recipe(begun.parent.parent)
    if begun != Path(start):  # a run
        begun = find_checkpoint(start, before=round(recipe.stages[0].tokens / recipe.batch_tokens) + 1)
    base = recipe.stages[0].mixture or {split["train"].name: len(split["train"].tokens)
                                        for split in load_data(given.get("data", recipe.data))[1]}
    kept = 0.4 if candidate else 1
    shares = {name: kept * share / sum(base.values()) for name, share in base.items()}
    if candidate:
        shares[candidate] = shares.get(candidate, 0) + 0.6
    tokens = given.get("tokens", 0.2 * sum(stage.tokens for stage in recipe.stages))
    print(f"anneal    from {begun} for {tokens:,.0f} tokens" +
          f"; with its control: python ablate.py change --anneal {start} --try candidate={candidate}" * bool(candidate))
    changes = {"schedule": "wsd", "warmup_steps": 0, "decay_share": -1, "compile": "auto",
               "seed": recipe.seed + 1,  # not the same order
               "mixture": ",".join(f"{name}={share:.9f}" for name, share in shares.items())}
    changes |= given | {"tokens": 0, "start": str(begun)}
    return replace(recipe, stages=(Stage("anneal", tokens),), **changes)


def train_longer(folder, tokens=None):
    """In words: the command that continues a run from its last checkpoint before the rate falls, or its last one."""
    recipe, rates = read_recipe(folder)[0], {e["step"]: e["lr"] for e in Log(folder).entries() if "lr" in e}
    peak = max((step for step, rate in rates.items() if rate == max(rates.values())), default=0)
    early = [path for path in sorted(folder.glob("checkpoints/step-*[0-9]")) if 0 < int(path.name[5:]) <= peak]
    return ("to train longer, start a new run, with the flags of this model if any: "
            f"python train.py --data {recipe.data} --start {(early or [folder])[-1]} "
            f"--tokens {tokens or recipe.tokens:g} --seed {recipe.seed + 1}")


def resumed(args, given, others, kind, allowed):
    """The recipe of --resume, a `kind`, with what is given; UserError for what is not `allowed`, and for `others`."""
    saved = read_recipe(Path(args.resume), kind)[0]
    if wrong := [f"--{name}" for name in given if name not in allowed] + others:
        raise UserError(f"a resumed run cannot change {' or '.join(wrong)}; " + (
            train_longer(Path(args.resume), given["tokens"]) if "tokens" in given else "leave it out"))
    return replace(saved, **given)


# What nanoGPT and others call our flags, or what to type instead.
ALIASES = {
    "block_size context context_length seq_len n_positions": "max_position_embeddings",
    "n_layer layers": "num_hidden_layers", "n_head heads": "num_attention_heads", "width": "hidden_size",
    "n_embd": "hidden_size", "dataset": "data", "lr": "learning_rate", "grad_clip": "clip",
    "warmup_iters": "warmup_steps", "eval_interval": "eval_every",
    "epochs": "give --tokens N: the line `data` says how often each source is then read",
    "max_iters max_steps iters steps": "steps follow from tokens: give --tokens N, where N is steps x --batch_tokens",
    "batch_size": "a batch is counted in tokens: give --batch_tokens N, where N is sequences x context",
    "gradient_accumulation_steps": "it follows from --batch_tokens and --micro_batch",
    "min_lr": "give --final_share, the last rate as a share of the peak",
    "dropout": "there is no dropout: a run that reads its data about once does not overfit; see --weight_decay",
    "out_dir": "a run's folder is runs/NAME: give --name NAME", "init_from": "give --resume RUN, or --start RUN",
    "wandb_log": "give --log wandb", "eval_iters": "give --eval_tokens"}


def parse(argv):
    """The command line, and the recipe that it names with the flags applied."""
    parser = Parser(__doc__, ALIASES, prog="train.py")
    parser.add_argument("recipe", nargs="?", help=", ".join(RECIPES) + " (default: laptop; so are the defaults below)")
    parser.add_argument("--resume", metavar="RUN", help="continue this run folder from its newest checkpoint")
    parser.add_argument("--anneal", metavar="RUN", help="test --candidate, from this run or checkpoint on")
    parser.add_argument("--candidate", metavar="SOURCE", default="", help="none: the control, the base mixture alone")
    parser.add_argument("--minutes", type=number, metavar="M", help="train for about so long on this machine")
    parser.add_argument("--check", action="store_true", help="try all that could fail later, and say when it would end")
    parser.add_argument("--name", metavar="NAME", help="of the folder in runs/ (default: the recipe's or the data's)")
    parser.add_argument("--model", metavar="PRESET", choices=PRESETS, help="architecture: " + ", ".join(PRESETS))
    add_options(parser, RECIPES["laptop"], RECIPES["laptop"].model)
    args = parse_options(parser, argv)
    given, sizes = given_options(args, Recipe), given_options(args, ModelConfig)
    if args.resume:
        fixed = ("recipe", "model", "name", "minutes", *sizes)
        others = [f"--{name}" for name in fixed if vars(args)[name] is not None]
        return args, resumed(args, given, others, Recipe, RESUMABLE)
    if args.anneal:
        if args.recipe or args.model or sizes or args.candidate and args.mixture:
            raise UserError("--anneal takes its run's recipe and model, and a --candidate such as math or a --mixture")
        args.recipe = f"anneal-{args.candidate or 'control'}"
        recipe = annealing(args.anneal, args.candidate, given)
    else:
        recipe = RECIPES.get(args.recipe or "laptop")
        if not recipe:
            raise UserError(f"there is no recipe {args.recipe}; take {', '.join(RECIPES)}, or for a folder of data "
                            f"--data {args.recipe}")
        recipe = replace(recipe, model=PRESETS.get(args.model, recipe.model).change(**sizes), **given)
    return args, replace(recipe, stages=with_mixture(recipe.stages, recipe.mixture))


def command_line(work):
    """Joins the other processes, if any, and calls work(world). A signal ends all with status 75 after saving; an error
    is printed once, by the first process that meets one, and torchrun ends the others."""
    world = World.join()
    if not world.leader:
        sys.stdout = open(os.devnull, "w")
    status = 0
    try:
        work(world)
    except Interrupted as stop:
        if world.leader:
            print(stop, file=sys.stderr)
        status = 75  # EX_TEMPFAIL, for `until python train.py --resume RUN; do [ $? = 75 ] || break; done`
    except torch.OutOfMemoryError:
        raise UserError("GPU memory is full; halve --micro_batch or take --activation_checkpointing true") from None
    except BaseException:
        if world.size > 1 and world.store.add("failed", 1) > 1:
            time.sleep(1.0)  # until the first to fail has printed why: torchrun ends all when one ends
            os._exit(1)
        raise
    if world.size > 1:
        world.agree()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)  # FSDP's groups live on in threads of gloo, which may abort an interpreter that ends
    if status:
        sys.exit(status)


def start(world):
    args, recipe = parse(sys.argv[1:])
    if args.minutes is not None:
        machine = cost.find_machine(recipe.device, recipe.dtype, recipe.compile)
        machine.compile |= cost.compiling_pays(recipe.compile, machine.device, args.minutes)
        rows, context = cost.stage_rows(recipe, world.size, machine.device)[0], recipe.model.max_position_embeddings
        speed = world.size * cost.measure_training(recipe.model, machine, rows, context, 2, 2.0)
        recipe = replace(recipe, tokens=world.agree(60 * args.minutes * speed))
        if not recipe.tokens >= 20 * recipe.batch_tokens:
            raise UserError(f"--minutes {args.minutes:g} is under 20 steps; give {recipe.batch_tokens / speed / 3:.2g}")
    if args.check:
        return check(recipe, world)
    name = args.name or args.recipe or Path((args.data or "laptop").split(",")[0]).name
    folder = Path(args.resume) if args.resume else world.agree(new_run_folder(name))
    pretrain(recipe, folder, bool(args.resume), world)


def main():
    command_line(start)


if __name__ == "__main__":
    run_command(main)
