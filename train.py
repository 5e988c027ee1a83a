"""Training: recipes, one loop, checkpoints.

The playbook's run in miniature: three stages whose mixture moves from prose to code and math, warmup-stable-decay
whose decay is the last fifth, AdamW, clipping, a global batch in tokens. Without an argument it makes a tokenizer
and token files from the Python installation, trains on them for a few minutes and writes runs/laptop.

    python train.py                                     # the laptop recipe, from nothing to a sample
    python train.py --minutes 5                         # the model that `cost.py plan --minutes 5` finds for this machine
    python train.py laptop --data data/mine --tokens 2e6
    python train.py smollm2-135m --data data/fineweb
    torchrun --nproc_per_node=8 train.py baseline-1b    # the same, on eight GPUs
    python train.py --resume runs/laptop
    python train.py --anneal runs/laptop --candidate math    # is this source worth more of the mixture?

A recipe is a value of the class `Recipe` below; each of its fields but `stages`, and each of its model's, is a flag.
"""

import argparse
import contextlib
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cost
import data as data_
import schedule as schedule_
from data import Batch, Curriculum, Split, Stage
from model import GPT, PRESETS, ModelConfig, ModelError, check_manifest, cross_entropy, newest_checkpoint, z_loss
from sample import complete
from tokenizer import Parser, Tokenizer, UserError, run

DEVICES, DTYPES = ("auto", "cuda", "mps", "cpu"), ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class Recipe:
    """One training run. Tokens are counted over all processes."""

    model: ModelConfig = PRESETS["laptop"]
    data: str = "data/laptop"  # prepared folders, separated by commas
    stages: tuple[Stage, ...] = ()
    tokens: float = 0  # how long to train; 0: what the stages add up to; otherwise they shrink or grow in proportion
    batch_tokens: int = 8192  # global batch, in tokens
    micro_batch: int = 0  # sequences a process computes at once; 0: as many as fit
    batch_doublings: str = ""  # steps at which the batch doubles and the rate grows by sqrt(2), such as 500,2000
    optimizer: str = "adamw"  # adamw, or muon for the hidden matrices
    learning_rate: float = 3e-3  # at its peak
    schedule: str = "wsd"  # wsd, cosine or multistep
    warmup_steps: int = 50  # steps until the peak rate
    decay_share: float = 0.2  # of the steps, for wsd; -1: the last stage
    decay_shape: str = "linear"  # linear, sqrt (1-sqrt) or cosine, for wsd
    final_share: float = 0.0  # of the peak rate, at the last step
    weight_decay: float = 0.1  # not on the embedding
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # and of its square
    eps: float = 1e-8  # added to AdamW's denominator
    clip: float = 1.0  # of the gradient's norm
    z_loss: float = 0.0  # weight of the mean squared log-partition of the output (OLMo 2: 1e-5)
    packing: str = "concat"  # concat, best-fit or bos: how documents become sequences (data.py)
    document_mask: bool = True  # attention stays inside each document
    eval_every: int = 100  # steps between evaluations, each with a sample
    eval_tokens: int = 32_768  # held-out tokens of each source in an evaluation, always the same ones
    noise_every: int = 0  # steps between measurements of the gradient noise scale; 0: none
    save_every: int = 500  # steps between checkpoints; the last two are kept
    sample_prompt: str = ""  # what the sample at each evaluation continues; empty: the start of a held-out document
    start: str = ""  # a run or checkpoint whose weights and moments a new run begins with
    seed: int = 0  # of the weights and of the order of the data
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # bfloat16 or float32, of the matrix products; weights are float32
    compile: str = "auto"  # true or false: torch.compile of every block

    def __post_init__(self):
        for name, allowed in (("optimizer", schedule_.OPTIMIZERS), ("schedule", schedule_.SCHEDULES),
                              ("decay_shape", schedule_.DECAYS), ("packing", data_.PACKINGS), ("device", DEVICES),
                              ("dtype", DTYPES), ("compile", ("auto", "true", "false"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)} is not one of {', '.join(allowed)}")
        for name, least, most in (
                ("tokens", 0, 1e18), ("batch_tokens", 1, 1e12), ("micro_batch", 0, 1e9), ("learning_rate", 1e-12, 1e30),
                ("warmup_steps", 0, 1e12), ("decay_share", -1, 1), ("final_share", 0, 1), ("weight_decay", 0, 1e6),
                ("beta1", 0, 0.999999), ("beta2", 0, 0.999999), ("eps", 0, 1), ("clip", 1e-12, 1e30), ("z_loss", 0, 1e6),
                ("eval_every", 1, 1e18), ("eval_tokens", 1, 1e18), ("noise_every", 0, 1e18), ("save_every", 1, 1e18),
                ("seed", 0, 2**63 - 1)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)} is not between {least:g} and {most:g}")
        if -1 < self.decay_share < 0:
            raise UserError(f"--decay_share {self.decay_share} is neither a share of the steps nor -1, the last stage")
        if not all(part.strip().isdecimal() for part in self.batch_doublings.split(",") if self.batch_doublings):
            raise UserError(f"--batch_doublings {self.batch_doublings} is not a list of steps such as 500,2000")

    def doublings(self) -> list[int]:
        """The steps of batch_doublings."""
        return [int(part) for part in self.batch_doublings.split(",") if part]


# Smallest first. The laptop's stages are the first three of SmolLM3 in miniature: code and math take over from prose, and
# the learning rate decays in the last, a fifth of the steps (SmolLM3: a ninth). Sizes, batch and rate were
# picked by measuring (README).
RECIPES = {
    "laptop": Recipe(
        stages=(
            Stage("base", 1.76e6, {"prose": 0.28, "code": 0.65, "math": 0.07}),
            Stage("quality", 0.4e6, {"prose": 0.18, "code": 0.70, "math": 0.12}),
            Stage("decay", 0.54e6, {"prose": 0.10, "code": 0.74, "math": 0.16}),
        ),
        batch_tokens=2048, learning_rate=3e-3, decay_share=-1, eval_every=200, noise_every=10),
    "smollm2-135m": Recipe(  # huggingface/smollm, text/pretraining/smollm2
        model=replace(PRESETS["smollm2-135m"], rope_theta=1e4, max_position_embeddings=2048), data="data/smollm2",
        stages=(Stage("base", 2e12, {}),), batch_tokens=2**20, learning_rate=3e-3, warmup_steps=2000, weight_decay=0.01,
        save_every=2000, eval_every=1000, eval_tokens=2**20),
    "baseline-1b": Recipe(  # the playbook's ablation baseline: 45B tokens, 1.5 days on 8 H100s
        model=replace(PRESETS["llama-3.2-1b"], position="rope", rope_theta=5e4, max_position_embeddings=4096),
        data="data/fineweb-edu,data/stack-edu-python,data/finemath",
        stages=(Stage("base", 45e9, {"fineweb-edu": 0.7, "stack-edu-python": 0.2, "finemath": 0.1}),),
        batch_tokens=8 * 16 * 3 * 4096, learning_rate=5e-4, schedule="cosine", warmup_steps=2000, final_share=0.1,
        save_every=2000, eval_every=1000, eval_tokens=2**20),
    # huggingface/smollm, text/pretraining/smollm3: 11.1T tokens at 4k, then 4k -> 32k -> 64k with a fresh, low rate.
    # `english` is FineWeb-Edu and DCLM (0.333 : 0.370 of stage 1) and a few books and papers; code counts StackExchange.
    "smollm3": Recipe(
        model=replace(PRESETS["smollm3-3b"], rope_theta=5e4, max_position_embeddings=4096),
        data="data/english,data/multilingual,data/code,data/math,data/reasoning",
        stages=(
            Stage("base", 8.14e12, {"english": 0.724, "multilingual": 0.120, "code": 0.129, "math": 0.027}),
            Stage("quality", 1.76e12, {"english": 0.647, "multilingual": 0.117, "code": 0.145, "math": 0.091}),
            Stage("decay", 1.2359e12,
                  {"english": 0.512, "multilingual": 0.123, "code": 0.234, "math": 0.131, "reasoning": 0.001}),
            Stage("long-32k", 47.2e9,
                  {"english": 0.407, "multilingual": 0.111, "code": 0.228, "math": 0.148, "reasoning": 0.106},
                  context=32768, rope_theta=2e6, learning_rate=2e-5, warmup_steps=1000),
            Stage("long-64k", 51.9e9,
                  {"english": 0.466, "multilingual": 0.108, "code": 0.200, "math": 0.130, "reasoning": 0.096},
                  context=65536, rope_theta=5e6, learning_rate=2e-5, warmup_steps=1000),
        ),
        batch_tokens=2_359_296, learning_rate=2e-4, warmup_steps=2000, decay_share=-1, save_every=2000, eval_every=1000,
        eval_tokens=2**20),
}


# ---- one process or many --------------------------------------------------------------------------------------


@dataclass
class World:
    """This process among those that `torchrun` started; alone without it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "World":
        if "RANK" not in os.environ:
            return cls()
        if torch.cuda.is_available():
            if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
                raise UserError(f"process {local} finds {torch.cuda.device_count()} GPU(s); lower --nproc_per_node")
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def agree(self, value):
        """The first process's value, in all of them."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def sum(self, *values: float, device: str) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64 if device != "mps" else torch.float32, device=device)
        dist.all_reduce(total)
        return total.tolist()


# ---- run folders ----------------------------------------------------------------------------------------------
# runs/NAME/: recipe.json, log.jsonl, loss.png, tokenizer.json, checkpoints/step-NNNNNNNN/ with config.json, model.pt,
# optimizer.pt, tokenizer.json and manifest.json. A checkpoint is written beside its place and renamed, its manifest
# of sha256 last, so that one which exists is whole; the two newest stay.


def new_run_folder(name: str) -> Path:
    """runs/name, or runs/name-2, runs/name-3, ... : no run is overwritten."""
    number, folder = 1, Path("runs") / name
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def save_checkpoint(run_folder: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer,
                    keep: int = 2, always: tuple[int, ...] = ()) -> Path:
    """Writes the checkpoint after `step` steps and removes all but the newest `keep` and those after `always` steps."""
    place = run_folder / "checkpoints" / f"step-{step:08d}"
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(model.state_dict(), partial / "model.pt")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "config.json").write_text(json.dumps(asdict(model.config), indent=1), "utf-8")
    tokenizer.save(partial)
    files = {}
    for path in sorted(partial.iterdir()):
        with open(path, "rb+") as file:
            files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    (partial / "manifest.json").write_text(json.dumps({"step": step, "files": files}, indent=1), "utf-8")
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    for old in sorted(place.parent.glob("step-????????"))[:-keep]:
        if int(old.name[5:]) not in always:
            shutil.rmtree(old)
    return place


def write_recipe(folder: Path, recipe: Recipe, sources: list[Split]) -> None:
    """recipe.json: the resolved recipe, and the sha256 of the tokens that it trains on."""
    partial = folder / "recipe.json.partial"
    partial.write_text(json.dumps(asdict(recipe) | {"sources": {s.name: s.sha256 for s in sources}}, indent=1), "utf-8")
    partial.replace(folder / "recipe.json")


def read_recipe(folder: Path) -> tuple[Recipe, dict[str, str]]:
    """What `write_recipe` wrote."""
    try:
        saved = json.loads((folder / "recipe.json").read_text("utf-8"))
        sources = saved.pop("sources")
        saved["model"], saved["stages"] = ModelConfig(**saved["model"]), tuple(Stage(**s) for s in saved["stages"])
        return Recipe(**saved), sources
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run; give a folder such as runs/laptop") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/recipe.json is damaged ({error}); start again with `python train.py`") from None


class Log:
    """log.jsonl: one JSON object a line; {"step", "loss", ...} of training, {"step", "val", ...} of evaluations."""

    def __init__(self, folder: Path, resumed_at: int = 0):
        self.path, self.entries = folder / "log.jsonl", []
        if self.path.exists():  # what the run did after the checkpoint that it resumes from is done again
            for line in self.path.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
                    self.entries.append(json.loads(line))
            self.entries = [entry for entry in self.entries if entry["step"] <= resumed_at]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), "utf-8")
            partial.replace(self.path)

    def write(self, **entry) -> None:
        self.entries.append(entry)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def train_seconds(self) -> float:
        """Seconds spent in training steps so far."""
        return max((entry["train_seconds"] for entry in self.entries), default=0.0)

    def draw(self, path: Path) -> bool:
        """The loss and held-out curves as a picture; False without matplotlib."""
        try:
            import matplotlib
        except ImportError:
            return False
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        steps = [e for e in self.entries if "loss" in e]
        left.plot([e["tokens"] for e in steps], [e["loss"] for e in steps], lw=0.8)
        left.set(title="training loss", xlabel="tokens", ylabel="nats per token")
        rate = left.twinx()
        rate.plot([e["tokens"] for e in steps], [e["lr"] for e in steps], color="tab:gray", lw=0.8)
        rate.set_ylabel("learning rate")
        for stage in sorted({e["stage"] for e in steps}, key=[e["stage"] for e in steps].index):
            left.axvline(next(e["tokens"] for e in steps if e["stage"] == stage), color="lightgray", lw=0.8, zorder=0)
        evals = [e for e in self.entries if "val" in e]
        for source in evals[-1]["val"] if evals else ():
            right.plot([e["tokens"] for e in evals], [e["val"][source] for e in evals], marker=".", label=source)
        right.set(title="held-out text", xlabel="tokens", ylabel="bits per byte")
        right.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return True


# ---- evaluation -----------------------------------------------------------------------------------------------


def to_host(batch: Batch, device: str) -> tuple[torch.Tensor, ...]:
    """tokens, targets, cu_seqlens; for CUDA in pinned memory, from which a copy does not stop the GPU."""
    tensors = [torch.from_numpy(x) for x in (batch.tokens, batch.targets, batch.cu_seqlens)]
    return tuple(x.pin_memory() for x in tensors) if device == "cuda" else tuple(tensors)


def to_device(tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(device, non_blocking=device == "cuda") for x in tensors)


class Loader:
    """Micro-batches of a curriculum on the device. On CUDA a thread makes the next while the GPU works on this one;
    a CPU, which has no time to spare, makes it when it is wanted. No state: what was made ahead in vain is dropped."""

    def __init__(self, curriculum: Curriculum, device: str):
        self.curriculum, self.device, self.ahead = curriculum, device, {}
        self.pool = ThreadPoolExecutor(1) if device == "cuda" else None

    def make(self, step: int, first: int, count: int) -> tuple[torch.Tensor, ...]:
        return to_host(self.curriculum.batch(step, first, count), self.device)

    def get(self, now: tuple[int, int, int], following: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
        """The micro-batch (step, first row, rows) `now`; `following` is the one that will be asked for next."""
        tensors = self.ahead.pop(now).result() if now in self.ahead else self.make(*now)
        if self.pool:
            self.ahead = {following: self.pool.submit(self.make, *following)}
        return to_device(tensors, self.device)


@torch.no_grad()
def bits_per_byte(job: "Job", split: Split, tokens: float) -> float:
    """Bits that the model needs for a byte of held-out text, comparable between tokenizers.

    The negative log-likelihood of every target, each document's end included, over the bytes of the targets' text,
    for the first `tokens` tokens of the split.
    """
    device, context = job.machine.device, job.model.config.max_position_embeddings
    sizes = torch.tensor(job.tokenizer.token_bytes, device=device)
    nats, size = 0.0, 0
    for batch in data_.validation_batches(split, context, job.rows, max(1, round(tokens / context)),
                                          job.curriculum.most_documents[context]):
        inputs, targets, cu_seqlens = to_device(to_host(batch, device), device)
        logits = job.model(inputs, cu_seqlens if job.recipe.document_mask else None)
        nats += cross_entropy(logits, targets).item()
        size += sizes[targets[targets >= 0]].sum().item()
    return nats / math.log(2) / size


# ---- the plan -------------------------------------------------------------------------------------------------


def micro_batch_rows(recipe: Recipe, world: World, device: str) -> int:
    """Sequences that a process computes at once, such that processes x steps of accumulation make the global batch."""
    context = recipe.model.max_position_embeddings
    unit = context * world.size
    if recipe.batch_tokens % unit:
        below, above = recipe.batch_tokens // unit * unit, -(-recipe.batch_tokens // unit) * unit
        raise UserError(f"--batch_tokens {recipe.batch_tokens} does not divide into sequences of {context} tokens on "
                        f"{world.size} process(es); the nearest that do are {' and '.join(str(n) for n in (below, above) if n)}")
    rows = recipe.batch_tokens // unit
    if recipe.micro_batch:
        if rows % recipe.micro_batch:
            divisors = [n for n in range(1, rows + 1) if rows % n == 0]
            nearest = sorted(divisors, key=lambda n: abs(n - recipe.micro_batch))[:2]
            raise UserError(f"--micro_batch {recipe.micro_batch} does not divide the {rows} sequences of a process; the "
                            f"nearest that do are {' and '.join(map(str, sorted(nearest)))}")
        return recipe.micro_batch
    room, part = (0.6 * torch.cuda.mem_get_info()[0], "total") if device == "cuda" else (2**30, "activations")
    fit = (n for n in range(1, rows + 1) if rows % n == 0 and cost.training_memory(recipe.model, n, context)[part] <= room)
    return max(fit, default=1)


def load_data(recipe: Recipe, leader: bool) -> tuple[Tokenizer, list[dict[str, Split]]]:
    """The tokenizer and the sources of a recipe; the leader checks their sha256 and makes the embedded corpus if it is
    not there yet."""
    if leader and recipe.data == "data/laptop" and not Path(recipe.data).exists():
        print("data      data/laptop is not there yet: reading the Python installation, training a tokenizer, encoding")
        data_.prepare_embedded(recipe.data, recipe.model.vocab_size)
    tokenizer = Tokenizer.load(data_.find_tokenizer(recipe.data))
    return tokenizer, [data_.load_source(folder, tokenizer, verify=leader) for folder in data_.source_folders(recipe.data)]


def fit_to_data(recipe: Recipe, tokenizer: Tokenizer, sources: list[Split]) -> Recipe:
    """The recipe with the tokenizer's vocabulary, the asked number of tokens, and a mixture that the data has."""
    if recipe.model.vocab_size != tokenizer.vocab_size:
        print(f"tokens    {recipe.data} has a vocabulary of {tokenizer.vocab_size:,}; the model takes it instead of "
              f"{recipe.model.vocab_size:,}")
    names, wanted = {split.name for split in sources}, {name for stage in recipe.stages for name in stage.mixture}
    stages = recipe.stages
    if wanted - names:
        print(f"mixture   {recipe.data} has {', '.join(sorted(names))}, the recipe's mixture {', '.join(sorted(wanted))}: "
              "every stage takes the sources as large as they are")
        stages = tuple(replace(stage, mixture={}) for stage in stages)
    total = sum(stage.tokens for stage in stages)
    if recipe.tokens and recipe.tokens != total:
        stages = tuple(replace(stage, tokens=stage.tokens * recipe.tokens / total) for stage in stages)
    return replace(recipe, model=recipe.model.change(vocab_size=tokenizer.vocab_size), stages=stages,
                   tokens=sum(stage.tokens for stage in stages))


def print_plan(recipe: Recipe, curriculum: Curriculum, world: World, rows: int, tokens_per_second: float) -> None:
    config, count = recipe.model, cost.count_parameters(recipe.model)
    tokens = curriculum.steps * recipe.batch_tokens
    accumulation = curriculum.rows // (rows * world.size)
    print(f"model     {count['total']:,} parameters ({count['non_embedding']:,} without embeddings): "
          f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} query and "
          f"{config.num_key_value_heads} KV heads, vocabulary {config.vocab_size:,}, context {config.max_position_embeddings}")
    print(f"batch     {recipe.batch_tokens:,} tokens = {rows} sequences x {world.size} process(es) x {accumulation} "
          f"micro-batch(es); {recipe.optimizer} at {recipe.learning_rate:g}, {recipe.schedule}, warmup {recipe.warmup_steps}"
          " steps")
    begin = 0
    for stage, end, shares in zip(curriculum.stages, curriculum.ends, curriculum.shares):
        mixture = ", ".join(f"{share:.0%} {split.name}" for split, share in zip(curriculum.sources, shares) if share)
        changes = "".join(f"; {name} {value:g}" for name, value in (
            ("context", stage.context), ("RoPE base", stage.rope_theta), ("learning rate", stage.learning_rate)) if value)
        print(f"stage     {stage.name:8} steps {begin:,} to {end:,}: {mixture}{changes}")
        begin = end
    epochs = curriculum.epochs()
    print("epochs    " + ", ".join(f"{name} {n:.2f}" for name, n in epochs.items()))
    print(*curriculum.report(), sep="\n", end="\n" if curriculum.report() else "")
    flops = 6 * count["active"] * tokens
    print(f"plan      {curriculum.steps:,} steps, {tokens:,} tokens, 6ND = {flops:.2e} FLOPs, about "
          f"{tokens / tokens_per_second / 60:.1f} minutes at {tokens_per_second:,.0f} tokens/s (measured just now)")


# ---- the loop -------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A signal asked the run to stop; the checkpoint is written."""


@dataclass
class Job:
    """Everything that a run works with, and nothing that a step changes but weights and optimizer."""

    recipe: Recipe  # fitted to the data
    world: World
    machine: cost.Machine
    tokenizer: Tokenizer
    sources: list[dict[str, Split]]  # {"train", "val"} of each
    curriculum: Curriculum
    loader: Loader
    rows: int  # sequences of a micro-batch
    model: GPT
    parallel: torch.nn.Module  # the model, or what averages its gradients over the processes
    optimizer: torch.optim.Optimizer
    first: int  # steps done before, when a run is resumed
    memory: float  # bytes that training is predicted to need at its peak


def set_up(recipe: Recipe, world: World, run_folder: Path, resume: bool) -> Job:
    """Checks everything that can be wrong, prints the plan, and returns what is needed to train."""
    checkpoint = newest_checkpoint(run_folder) if resume else None
    micro_batch_rows(recipe, world, "cpu")  # an impossible batch is said before any work
    machine = world.agree(cost.find_machine(recipe.device, recipe.dtype, recipe.compile))
    print(f"machine   {machine.reason}")
    tokenizer, sources = load_data(recipe, True) if world.rank == 0 else (None, None)
    world.agree(None)  # the others wait until the first has made and checked the data
    if world.rank:
        tokenizer, sources = load_data(recipe, False)
    splits = [source["train"] for source in sources]
    if resume and (Tokenizer.load(run_folder).hash != tokenizer.hash
                   or read_recipe(run_folder)[1] != {split.name: split.sha256 for split in splits}):
        raise UserError(f"{recipe.data} is not the data that {run_folder} began with; put that back or start a new run")
    recipe = replace(fit_to_data(recipe, tokenizer, splits), device=machine.device, compile=str(machine.compile).lower(),
                     dtype=str(machine.dtype).removeprefix("torch."))  # a resumed run computes as it began
    context = recipe.model.max_position_embeddings
    curriculum = Curriculum(splits, list(recipe.stages), context, recipe.batch_tokens // context, recipe.seed,
                            recipe.packing, [source["val"] for source in sources])
    if recipe.model.position == "learned" and max(curriculum.contexts) > context:
        raise UserError(f"--position learned ends at {context} tokens, but a stage has {max(curriculum.contexts)}; take rope")
    rows = world.agree(micro_batch_rows(recipe, world, machine.device))
    print("data      " + ", ".join(f"{s.name} {len(s.tokens):,} tokens" for s in splits)
          + f"; {sum(s.bytes for s in splits) / sum(len(s.tokens) for s in splits):.2f} bytes a token")

    memory = cost.process_memory(recipe.model, rows, context, machine.dtype.itemsize, machine.device, cost.memory_now(),
                                 accumulates=curriculum.rows > rows * world.size)
    torch.manual_seed(recipe.seed)
    model, first = GPT(recipe.model), 0
    model.compute_dtype = machine.dtype
    begun = checkpoint or (starting_point(recipe.start) if recipe.start else None)
    if begun:
        first = json.loads((begun / "manifest.json").read_text("utf-8"))["step"] if checkpoint else 0
        model.load_state_dict(torch.load(begun / "model.pt", map_location="cpu", weights_only=True))
    model.to(machine.device)
    optimizer = schedule_.build_optimizer(model, recipe.learning_rate, recipe.weight_decay,
                                          (recipe.beta1, recipe.beta2), recipe.eps, recipe.optimizer)
    if begun:
        optimizer.load_state_dict(torch.load(begun / "optimizer.pt", map_location="cpu", weights_only=True))
    if machine.compile:
        model.compile_blocks()
    loader = Loader(curriculum, machine.device)
    inputs, _, cu_seqlens = to_device(loader.make(0, 0, rows), machine.device)
    speed = cost.measure_speed(model, inputs, cu_seqlens if recipe.document_mask else None)
    print_plan(recipe, curriculum, world, rows, speed * world.size)
    print(f"memory    {memory / 2**20:,.0f} MiB at the peak, as `cost.process_memory` predicts")
    parallel = DistributedDataParallel(model) if world.size > 1 else model
    return Job(recipe, world, machine, tokenizer, sources, curriculum, loader, rows, model, parallel, optimizer, first,
               memory)


def starting_point(start: str) -> Path:
    """A checkpoint folder as it is, or the newest of a run; whole, or an error."""
    if (Path(start) / "manifest.json").exists():
        check_manifest(Path(start))
        return Path(start)
    return newest_checkpoint(start)


def learning_rate(recipe: Recipe, curriculum: Curriculum, step: int) -> float:
    """The rate of the update that begins at a step: that of the run's schedule, which ends with the last stage that has no
    rate of its own, times the square root of how much larger the batch is by then; or the stage's own: warmup, then a
    cosine to 0 (SmolLM3's long-context stages)."""
    ends, number = curriculum.ends, curriculum.stage(step)
    stage, begin = curriculum.stages[number], ends[number - 1] if number else 0
    if stage.learning_rate:
        return stage.learning_rate * schedule_.cosine(step - begin, ends[number] - begin, stage.warmup_steps, 0.0)
    last = max(i for i, stage in enumerate(curriculum.stages) if not stage.learning_rate)
    total, before = ends[last], ends[last - 1] if last else 0
    decay = total - before if recipe.decay_share == -1 else round(recipe.decay_share * total)
    share = schedule_.rate_share(recipe.schedule, step, total, recipe.warmup_steps, decay, recipe.decay_shape,
                                 recipe.final_share)
    return recipe.learning_rate * share * math.sqrt(schedule_.batch_multiple(step, recipe.doublings()))


def enter_stage(job: Job, step: int) -> None:
    """What changes with a stage besides the data: context, RoPE's base, and so the sequences of a micro-batch."""
    number = job.curriculum.stage(step)
    stage, model = job.curriculum.stages[number], job.recipe.model
    config = model.change(max_position_embeddings=job.curriculum.contexts[number],
                          rope_theta=stage.rope_theta or model.rope_theta)
    if config != job.model.config:
        if config.max_position_embeddings != job.model.config.max_position_embeddings:
            own = config.max_position_embeddings != model.max_position_embeddings  # --micro_batch is for the model's context
            job.rows = job.world.agree(micro_batch_rows(
                replace(job.recipe, model=config, micro_batch=0 if own else job.recipe.micro_batch), job.world,
                job.machine.device))
        job.model.config = config


def training_step(job: Job, step: int, rate: float, steps: int = 1,
                  measure_noise: bool = False) -> tuple[float, float, tuple[float, float] | None]:
    """One update from the batches of `steps` steps, `step` and those after it. Returns the mean loss in nats a token
    and the gradient norm, of all of them, and the (|G|^2, tr(S)) of `NoiseScale.split` in tokens, None unless measured.

    The small batch of the noise scale is each process's first micro-batch, before any averaging; one that is alone is
    cut in two. Raises UserError before the update, in every process, if loss or norm is not finite.
    """
    recipe, world, device = job.recipe, job.world, job.machine.device
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    context, turn = job.model.config.max_position_embeddings, world.size * job.rows
    pieces = [(at, first + world.rank * job.rows, job.rows) for at in range(step, step + steps)
              for first in range(0, recipe.batch_tokens // context, turn)]
    if measure_noise and len(pieces) == 1 and job.rows > 1:
        at, first, count = pieces[0]
        pieces = [(at, first, count // 2), (at, first + count // 2, count - count // 2)]
    ahead = [*pieces[1:], (step + steps, world.rank * job.rows, job.rows)]  # what will be asked for next
    loss, batch_tokens, noise = torch.zeros((), device=device), steps * recipe.batch_tokens, None
    for number, ((at, first, count), following) in enumerate(zip(pieces, ahead)):
        tokens, targets, cu_seqlens = job.loader.get((at, first, count), following)
        synchronize = world.size == 1 or number == len(pieces) - 1
        with contextlib.nullcontext() if synchronize else job.parallel.no_sync():
            logits = job.parallel(tokens, cu_seqlens if recipe.document_mask else None)
            part = cross_entropy(logits, targets) / batch_tokens  # a share of the global batch's mean
            extra = job.model.routing_loss() / (len(pieces) * world.size)
            if recipe.z_loss:
                extra = extra + recipe.z_loss * z_loss(logits, targets) / batch_tokens
            del logits  # so that their memory is free in the backward pass, which keeps what it needs
            ((part + extra) * world.size).backward()  # because DDP divides by the number of processes
        loss += part.detach()
        if measure_noise and number == 0 and len(pieces) > 1:
            square = sum(p.grad.square().sum() for p in job.model.parameters() if p.grad is not None).item()
            small = count * context
            noise = world.sum(square, device=device)[0] / world.size * (batch_tokens / small / world.size) ** 2, small
    norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), recipe.clip).item()
    mean = world.sum(loss.item(), device=device)[0]
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise UserError(f"step {step + 1}: the loss is {mean} and the gradient norm {norm}, so this update was not made and "
                        f"nothing was saved; resume from the last checkpoint with a --learning_rate below {rate:.1e} or a "
                        f"--clip below {recipe.clip:g}")
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    cost.synchronize(device)
    return mean, norm, noise and schedule_.NoiseScale.split(noise[0], norm**2, noise[1], batch_tokens)


def evaluate(job: Job, log: Log, step: int, last: bool, train_seconds: float) -> dict[str, float]:
    """Held-out bits per byte of each source, and a sample: how the model continues the first words of a held-out
    document, of one source in turn, at the end of each. Printed and logged."""
    recipe, started = job.recipe, time.perf_counter()
    scores = {source["val"].name: bits_per_byte(job, source["val"], recipe.eval_tokens) for source in job.sources}
    turn = step // recipe.eval_every % len(job.sources)
    prompts = [job.tokenizer.decode(s["val"].tokens[1:9].tolist()) for s in (job.sources if last else [job.sources[turn]])]
    prompts = [recipe.sample_prompt] if recipe.sample_prompt else prompts
    length = min(96, recipe.model.max_position_embeddings // 2)
    texts = [complete(job.model, job.tokenizer, prompt, length, min_p=0.05, seed=step)[0] for prompt in prompts]
    log.write(step=step, tokens=step * recipe.batch_tokens, val=scores, samples=[p + t for p, t in zip(prompts, texts)],
              train_seconds=train_seconds, seconds=time.perf_counter() - started)
    listed = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    shown = [f"  after {prompt!r}\n    | " + text.strip().replace("\n", "\n    | ") for prompt, text in zip(prompts, texts)]
    tqdm.write("\n".join([f"step {step:,}: held-out bits per byte {listed}", *shown, ""]), file=sys.stdout)
    sys.stdout.flush()
    return scores


@contextlib.contextmanager
def noted_signals():
    """Collects SIGINT and SIGTERM in a list instead of dying of them, so that a step is never left half done."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(recipe: Recipe, run_folder: Path, resume: bool = False) -> dict[str, float]:
    """Runs or continues a recipe in a run folder; returns held-out bits per byte of each source at the end."""
    world = World.join()
    if world.rank:
        sys.stdout = open(os.devnull, "w")
    job = set_up(recipe, world, run_folder, resume)
    recipe, curriculum, leader = job.recipe, job.curriculum, world.rank == 0
    if leader:
        run_folder.mkdir(parents=True, exist_ok=resume)
        write_recipe(run_folder, recipe, curriculum.sources)
        job.tokenizer.save(run_folder)
        log = Log(run_folder, job.first)
    print(f"run       {run_folder}" + (f", continued from step {job.first:,}" if resume else "")
          + "; Ctrl-C stops, saves, and says how to go on\n", flush=True)
    flops = cost.flops_per_token(recipe.model, attended_length(job))
    bar = tqdm(total=curriculum.steps, initial=job.first, disable=not leader, dynamic_ncols=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 10,
               bar_format="{n_fmt}/{total_fmt} steps [{elapsed}, {remaining} left]{postfix}")
    scores, seconds = {}, log.train_seconds() if leader else 0.0
    noise_scale = schedule_.NoiseScale()
    for entry in log.entries if leader else ():
        if "grad_noise" in entry:
            noise_scale.add(entry["grad_signal"], entry["grad_noise"])
    step = job.first
    with noted_signals() as noted, contextlib.closing(bar):
        while step < curriculum.steps:
            started, begin = time.perf_counter(), step
            enter_stage(job, begin)
            changes = [end for end, a, b in zip(curriculum.ends, curriculum.contexts, curriculum.contexts[1:]) if a != b]
            step = min([begin + schedule_.batch_multiple(begin, recipe.doublings()), curriculum.steps,
                        *(end for end in changes if end > begin)])  # no update has sequences of two contexts
            rate = learning_rate(recipe, curriculum, begin)

            def due(every: int) -> bool:
                return step // every > begin // every  # an update can cover several steps

            measured = recipe.noise_every > 0 and due(recipe.noise_every)
            loss, norm, noise = training_step(job, begin, rate, step - begin, measured)
            uneven = job.model.balance_experts()
            elapsed = time.perf_counter() - started
            seconds += elapsed
            stop = world.sum(len(noted), device=job.machine.device)[0] > 0  # all processes leave at the same step
            last = step == curriculum.steps
            if not leader:
                if stop:
                    break
                continue
            batch_tokens = (step - begin) * recipe.batch_tokens
            speed, stage = batch_tokens / elapsed, curriculum.stages[curriculum.stage(begin)].name
            share = speed * flops / job.machine.peak_flops / world.size
            more = {"expert_load": uneven} if uneven else {}  # per MoE layer, the fullest expert's over the mean
            if noise is not None:
                more |= {"grad_signal": noise[0], "grad_noise": noise[1], "noise_scale_tokens": noise_scale.add(*noise)}
            log.write(step=step, tokens=step * recipe.batch_tokens, batch_tokens=batch_tokens, loss=loss, lr=rate,
                      grad_norm=norm, stage=stage, tokens_per_second=speed, share_of_peak=share, train_seconds=seconds,
                      **more)
            fullest = f" | fullest expert {max(uneven):.1f}x" if uneven else ""
            bar.set_postfix_str(f"{stage} | loss {loss:.3f} | lr {rate:.1e} | grad {norm:.2f} | {speed:,.0f} tok/s | "
                                f"{share:.0%} of peak{fullest}", refresh=False)
            bar.update(step - begin)
            if due(recipe.save_every) or any(begin < end <= step for end in curriculum.ends) or stop:
                save_checkpoint(run_folder, step, job.model, job.optimizer, job.tokenizer, always=tuple(curriculum.ends))
            if stop and not last:
                raise Interrupted(f"Stopped after step {step:,} of {curriculum.steps:,} and saved; go on with: "
                                  f"python train.py --resume {run_folder}")
            if due(recipe.eval_every) or last or begin == 0:
                scores = evaluate(job, log, step, last, seconds)
    if held := cost.peak_memory(job.machine.device):
        print(f"Memory: {held / 2**20:,.0f} MiB at the peak; predicted were {job.memory / 2**20:,.0f}")
    if leader and log.draw(run_folder / "loss.png"):
        print(f"The curves are in {run_folder}/loss.png")
    print(f'Done: {run_folder}. Read more of what it writes with: python sample.py {run_folder} --prompt "def "')
    return scores


def attended_length(job: Job) -> float:
    """How long the piece of text is that attention works on: the context, or, with document masks,
    sum(len^2) / sum(len) over the documents' pieces in the first batch."""
    if not job.recipe.document_mask:
        return job.curriculum.context
    starts = job.curriculum.batch(0).cu_seqlens.astype(float)
    lengths = starts[1:] - starts[:-1]
    return float((lengths**2).sum() / lengths.sum())


# ---- command line ---------------------------------------------------------------------------------------------


def annealing(run: str, candidate: str, given: dict) -> Recipe:
    """The playbook's test of a data set: from a checkpoint, 40 % of the base mixture and 60 % of the candidate while the
    learning rate falls to 0 (SmolLM3: 50B tokens from about 7T on). Compare with the same command for another candidate.

    `run`: a checkpoint, or a run, of which the checkpoint after its first stage is taken, or else the newest.
    """
    root = Path(run).parent.parent if (Path(run) / "manifest.json").exists() else Path(run)
    recipe, _ = read_recipe(root)
    if root == Path(run):
        end = root / "checkpoints" / f"step-{round(recipe.stages[0].tokens / recipe.batch_tokens):08d}"
        run = str(end if end.exists() else newest_checkpoint(root))
    data = given.get("data", recipe.data)
    sizes = {folder.name: json.loads((folder / "meta.json").read_text("utf-8"))["train"]["tokens"]
             for folder in data_.source_folders(data)}
    if candidate not in sizes:
        raise UserError(f"--candidate {candidate} is no source of {data}; take {' or '.join(sizes)}, or add "
                        "a folder to --data")
    base = recipe.stages[0].mixture or sizes
    mixture = {name: 0.4 * weight / sum(base.values()) for name, weight in base.items()}
    mixture[candidate] = mixture.get(candidate, 0.0) + 0.6
    tokens = given.get("tokens", 0.2 * sum(stage.tokens for stage in recipe.stages))
    print(f"anneal    from {run}: 40 % of the base mixture and 60 % {candidate} for {tokens:,.0f} tokens")
    return replace(recipe, data=data, stages=(Stage("anneal", tokens, mixture),), tokens=0, schedule="wsd", warmup_steps=0,
                   decay_share=-1, start=run)


FLAGS = {f.name: f.type for f in (*fields(Recipe), *fields(ModelConfig)) if f.name not in ("model", "stages")}


def field_comments(*classes: type) -> dict[str, str]:
    """{field: the comment behind it}: the dataclasses' own text is the help of the flags."""
    found = (re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(c), re.MULTILINE) for c in classes)
    return {name: text for pairs in found for name, text in pairs}


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


# What a resumed run may change; everything else would make the step number mean something else.
RESUMABLE = {"micro_batch", "learning_rate", "clip", "eval_every", "eval_tokens", "save_every", "sample_prompt", "device",
             "dtype", "compile", "data"}


def parse(argv: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """The command line, and the recipe that it names with the flags applied. Dashes and underscores are the same."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help=", ".join(RECIPES))
    parser.add_argument("--resume", metavar="RUN", help="continue this run folder from its newest checkpoint")
    parser.add_argument("--anneal", metavar="RUN",
                        help="test --candidate: 40 %% base mixture, 60 %% of it, from this run or checkpoint")
    parser.add_argument("--candidate", metavar="SOURCE", help="the source that --anneal tests")
    parser.add_argument("--minutes", type=float, metavar="M", help="train for so long: size, batch and rate follow")
    parser.add_argument("--name", metavar="NAME", help="of the run folder below runs/ (default: the recipe's)")
    parser.add_argument("--model", choices=PRESETS, metavar="PRESET", help="another architecture: " + ", ".join(PRESETS))
    comments = field_comments(ModelConfig, Recipe)
    for name, kind in FLAGS.items():
        parser.add_argument(f"--{name}", type=truth if kind is bool else kind, metavar=kind.__name__, default=None,
                            help=comments[name].replace("%", "%%"))
    words = [word.partition("=") for word in argv]
    args, unknown = parser.parse_known_args(
        [(flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag) + equals + value
         for flag, equals, value in words])
    if unknown:
        names = [*FLAGS, "resume", "anneal", "candidate", "minutes", "name", "model"]
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, 1)
        raise UserError(f"there is no flag {unknown[0]}; "
                        + (f"did you mean --{near[0]}?" if near else "see `python train.py --help`"))
    given = {name: value for name in FLAGS if (value := getattr(args, name)) is not None}
    if args.resume:
        recipe = read_recipe(Path(args.resume))[0]
        fixed = [f"--{name}" for name in given if name not in RESUMABLE]
        others = (("--model", args.model), ("--name", args.name), ("--minutes", args.minutes), ("a recipe", args.recipe))
        fixed += [what for what, value in others if value]
        if fixed:
            raise UserError(f"a resumed run cannot change {' or '.join(fixed)}; leave it out or start a new run")
    elif args.anneal:
        if args.recipe or args.model or not args.candidate:
            raise UserError("--anneal takes the run's own recipe and model, and a --candidate: "
                            "python train.py --anneal runs/laptop --candidate math")
        recipe, args.recipe = annealing(args.anneal, args.candidate, given), f"anneal-{args.candidate}"
    else:
        args.recipe = args.recipe or "laptop"
        if args.recipe not in RECIPES:
            near = difflib.get_close_matches(args.recipe, RECIPES, 1) or list(RECIPES)
            raise UserError(f"there is no recipe {args.recipe}; take {' or '.join(near)}")
        recipe = RECIPES[args.recipe]
    if args.minutes is not None:
        planned = {"tokens", "batch_tokens", "learning_rate", "warmup_steps", *ModelConfig.__dataclass_fields__}
        if wrong := [f"--{name}" for name in given if name in planned] + ["--model"] * bool(args.model):
            raise UserError(f"--minutes decides {wrong[0]}; leave one of them out")
        if not 0 < args.minutes <= 1e6 or args.recipe != "laptop" or "RANK" in os.environ:
            raise UserError("--minutes takes more than 0 minutes, at most 1000000, of the laptop recipe in one process; for "
                            "others "
                            "see `python cost.py plan`")
    model = PRESETS[args.model] if args.model else recipe.model
    if sizes := {name: given.pop(name) for name in list(given) if name in ModelConfig.__dataclass_fields__}:
        model = model.change(**sizes)
    return args, replace(recipe, model=model, **given)


def fit_to_minutes(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with what `cost.plan_machine` finds for so many minutes on this machine."""
    machine = cost.find_machine(recipe.device, recipe.dtype, recipe.compile)
    made = Path(recipe.data.split(",")[0]).exists()
    vocabulary = Tokenizer.load(data_.find_tokenizer(recipe.data)).vocab_size if made else recipe.model.vocab_size
    found = cost.plan_machine(machine, minutes, vocab_size=vocabulary)
    cost.print_machine_plan(found, machine, minutes)
    steps = max(1, round(found["tokens"] / found["batch_tokens"]))
    return replace(recipe, model=found["config"], tokens=found["tokens"], batch_tokens=found["batch_tokens"],
                   learning_rate=found["learning_rate"], warmup_steps=schedule_.suggest_warmup(steps))


def main() -> None:
    args, recipe = parse(sys.argv[1:])
    if args.minutes:
        recipe = fit_to_minutes(recipe, args.minutes)
    folder = Path(args.resume) if args.resume else new_run_folder(args.name or args.recipe)
    try:
        train(recipe, folder, bool(args.resume))
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory is full; halve --micro_batch (the global batch stays the same) or take a "
                        "shorter --max_position_embeddings") from None
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main, ModelError)
