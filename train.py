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

import abc
import argparse
import collections
import contextlib
import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cost
import data as data_
import evals
import schedule as schedule_
from data import Batch, Curriculum, Split, Stage
from checkpoint import check_manifest, load_config, newest_checkpoint, read_sharded
from model import GPT, PRESETS, ModelConfig, cross_entropy, watch_attention, z_loss
from sample import complete
from tokenizer import Parser, Tokenizer, UserError, run

DEVICES, DTYPES = ("auto", "cuda", "mps", "cpu"), ("auto", "bfloat16", "float32")
GUARDS, TRACKERS = ("warn", "skip", "rewind"), ("tensorboard", "wandb", "trackio")


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
    optimizer: str = "adamw"  # adamw, or muon for the hidden matrices (which waits for the GPU once an update)
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
    eval_tasks: str = ""  # tasks of evals.py in each evaluation, such as arithmetic,continuation
    noise_every: int = 0  # steps between measurements of the gradient noise scale; 0: none
    watch_every: int = 50  # steps between looks at loss by source, updates, logits, attention and slow processes; 0: none
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that stay, besides those at the end of a stage
    keep_every: int = 0  # checkpoints of multiples of so many steps stay too; 0: none
    async_save: bool = False  # save from a copy while training goes on
    guard: str = "warn"  # what a loss spike leads to: warn, skip or rewind
    rewind_tries: int = 3  # rewinds for one spike before the run gives up
    spike_margin: int = 16  # batches passed over on either side of a spike that was rewound; twice as many in each further try
    log: str = ""  # other trackers, separated by commas: tensorboard, wandb or trackio
    sample_prompt: str = ""  # what the sample at each evaluation continues; empty: the start of a held-out document
    start: str = ""  # a run or checkpoint whose weights and moments a new run begins with
    seed: int = 0  # of the weights and of the order of the data
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # bfloat16 or float32, of the matrix products; weights are float32
    compile: str = "auto"  # true or false: torch.compile of every block
    parallel: str = "auto"  # ddp, or fsdp, which shards weights, gradients and moments over the processes
    activation_checkpointing: bool = False  # compute blocks twice instead of keeping their activations
    deterministic: bool = False  # only deterministic kernels, slower, on CUDA (a CPU's are anyway)

    def __post_init__(self):
        for name, allowed in (("optimizer", schedule_.OPTIMIZERS), ("schedule", schedule_.SCHEDULES),
                              ("decay_shape", schedule_.DECAYS), ("packing", data_.PACKINGS), ("device", DEVICES),
                              ("dtype", DTYPES), ("compile", ("auto", "true", "false")),
                              ("guard", GUARDS), ("parallel", ("auto", "ddp", "fsdp"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)} is not one of {', '.join(allowed)}")
        for name, least, most in (
                ("tokens", 0, 1e18), ("batch_tokens", 1, 1e12), ("micro_batch", 0, 1e9), ("learning_rate", 1e-12, 1e30),
                ("warmup_steps", 0, 1e12), ("decay_share", -1, 1), ("final_share", 0, 1), ("weight_decay", 0, 1e6),
                ("beta1", 0, 0.999999), ("beta2", 0, 0.999999), ("eps", 0, 1), ("clip", 1e-12, 1e30), ("z_loss", 0, 1e6),
                ("eval_every", 1, 1e18), ("eval_tokens", 1, 1e18), ("noise_every", 0, 1e18), ("save_every", 1, 1e18),
                ("watch_every", 0, 1e18), ("keep", 1, 1e9), ("keep_every", 0, 1e18), ("rewind_tries", 0, 1e9),
                ("spike_margin", 0, 1e9), ("seed", 0, 2**63 - 1)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)} is not between {least:g} and {most:g}")
        if unknown := set(filter(None, self.log.split(","))) - set(TRACKERS):
            raise UserError(f"--log {unknown.pop()} is not one of {', '.join(TRACKERS)}")
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
    # SmolLM3's long-context stages in miniature, from the finished laptop run: context times 4 twice, with a larger RoPE
    # base each time, on long documents and lookups. Looking up is learned at 128 tokens and then stretched: a run that
    # begins at 512 did not learn it from as many tokens (README). Whole documents, so that no question loses its notes.
    "laptop-long": Recipe(
        data="data/laptop,data/recall", start="runs/laptop",
        stages=(
            Stage("lookup", 0.4e6, {"recall-128": 0.8, "code": 0.1, "prose": 0.05, "math": 0.05}),
            Stage("long-512", 0.3e6, {"recall-512": 0.6, "code": 0.2, "prose": 0.1, "math": 0.1}, context=512,
                  rope_theta=5e4),
            Stage("long-2048", 0.4e6, {"recall-2048": 0.5, "code": 0.3, "prose": 0.1, "math": 0.1}, context=2048,
                  rope_theta=2e5),
        ),
        batch_tokens=2048, learning_rate=3e-3, warmup_steps=30, decay_share=0.3, packing="best-fit", eval_every=200),
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


class World:
    """This process among those that `torchrun` started; alone without it."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store, self.failing, self.waits = rank, size, store, False, 0
        self.files = dist.new_group(backend="gloo") if size > 1 else None  # for saves beside training
        self.over, self.watcher = threading.Event(), threading.Thread(target=self.leave_with_others, daemon=True)
        if size > 1:
            self.watcher.start()

    @classmethod
    def join(cls) -> "World":
        if "RANK" not in os.environ:
            return cls()
        if torch.cuda.is_available():
            if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
                raise UserError(f"process {local} finds {torch.cuda.device_count()} GPU(s); lower --nproc_per_node")
            torch.cuda.set_device(local)
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                                world_size=size)
        return cls(rank, size, store)

    def first_to_fail(self) -> bool:
        """Whether no other process has failed before this one, which alone then says why."""
        self.failing = True
        return self.size == 1 or self.store.add("failed", 1) == 1

    def leave_with_others(self) -> None:
        """Ends this process soon after another has failed: a collective with one that is gone could wait for ever."""
        while not self.over.wait(0.5):
            with contextlib.suppress(RuntimeError):  # the store went with the process that held it
                if not self.store.check(["failed"]):
                    continue
            if not self.over.wait(1.0) and not self.failing:
                os._exit(1)

    def leave(self) -> None:
        """Together with the others, at the end."""
        if self.size > 1:
            dist.barrier()
            self.over.set()
            self.watcher.join()
            dist.destroy_process_group()

    def agree(self, value):
        """The first process's value, in all of them."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def from_first(self, work: Callable):
        """What `work` finds in the first process, in all of them; the others do not do it."""
        found = work() if self.rank == 0 else None
        self.wait_for_first()
        return self.agree(found)

    def wait_for_first(self) -> None:
        """Until the first process is here too, whatever its work takes: collectives give up after half an hour."""
        self.waits += 1
        if self.size > 1 and self.rank == 0:
            self.store.set(f"first-{self.waits}", "here")
        while self.rank and not self.store.check([f"first-{self.waits}"]):
            time.sleep(0.1)

    def gather(self, value) -> list:
        """Every process's value, in all of them."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor summed over the processes, in place; does not wait for the device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


# ---- run folders ----------------------------------------------------------------------------------------------
# runs/NAME/: recipe.json, log.jsonl, loss.png, tokenizer.json, checkpoints/step-NNNNNNNN/ with config.json, guard.json,
# tokenizer.json, manifest.json, and model.pt and optimizer.pt, or sharded/ where FSDP trains. A checkpoint is written
# beside its place and renamed, its manifest of sha256 last, so that one which exists is whole. Nothing in it is code.


def new_run_folder(name: str) -> Path:
    """runs/name, or runs/name-2, runs/name-3, ... : no run is overwritten."""
    number, folder = 1, Path("runs") / name
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def sync_folder(folder: Path) -> None:
    """Makes what was created or renamed in a folder survive a power cut, where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def hash_files(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """{path below root: sha256} of files that are then on the disk, not just on their way to it."""
    found = {}
    for path in sorted(paths):
        with open(path, "rb+") as file:
            found[path.relative_to(root).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    return found


def parts_of(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    return optimizer.optimizers


def training_state(model: GPT, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Weights by name, moments by name and kind, whatever is sharded how; no moments before the first update."""
    if not any(part.state for part in parts_of(optimizer)):  # get_state_dict would make some, by an update at rate 0
        return get_model_state_dict(model), {}
    weights, moments = get_state_dict(model, parts_of(optimizer))
    return weights, moments["state"]


def flat(weights: dict, moments: dict) -> dict[str, torch.Tensor]:
    """One dict of tensors, the form in which sharded checkpoints are written."""
    return ({f"model.{name}": w for name, w in weights.items()}
            | {f"optimizer.{name}.{kind}": m for name, kinds in moments.items() for kind, m in kinds.items()})


def load_checkpoint(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> dict:
    """Weights and moments of a checkpoint into model and optimizer, however many processes wrote it, FSDP or not;
    returns what `guard.json` holds."""
    guard = json.loads((folder / "guard.json").read_text("utf-8"))
    with torch.device("meta"):
        other = GPT(load_config(folder))
    if {name: w.shape for name, w in other.named_parameters()} != {name: w.shape for name, w in model.named_parameters()}:
        raise UserError(f"{folder} is a model of other sizes than this run's; leave out the flags that change them, or give "
                        "those that it was trained with")
    weights, moments = get_state_dict(model, parts_of(optimizer))  # both made here where there are none, to be filled
    if (folder / "sharded").exists():
        read_sharded(folder / "sharded", flat(weights, moments["state"] if guard["moments"] else {}))  # in place
        whole = False
    else:
        weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True, mmap=True)
        if guard["moments"]:
            moments["state"] = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        whole = any(isinstance(p, DTensor) for p in model.parameters())
    options = StateDictOptions(full_state_dict=whole)
    set_model_state_dict(model, weights, options=options)
    if guard["moments"]:
        set_optimizer_state_dict(model, parts_of(optimizer), moments, options=options)
    else:
        for part in parts_of(optimizer):
            part.state.clear()
    return guard


CHAT_FORMAT = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Saver:
    """Writes a job's checkpoints and removes old ones; with --async_save true beside the training, from a copy."""

    def __init__(self, job: "Job", run_folder: Path):
        self.job, self.folder = job, run_folder / "checkpoints"
        self.pool = ThreadPoolExecutor(1) if job.recipe.async_save else None
        self.pending: Future | None = None

    def save(self, step: int, must: bool = False) -> str:
        """The checkpoint after `step` steps. Returns "" or, where the disk fails, a sentence, and training goes on without
        it; `must`: then it ends with UserError."""
        job, trouble = self.job, self.finish()
        if job.world.rank and not job.sharded:
            return ""
        weights, moments = training_state(job.model, job.optimizer)
        small = {"config.json": asdict(job.model.config),  # as they are now: training goes on while a thread writes them
                 "guard.json": job.guard.state() | {"step": step, "moments": bool(moments)}}
        if self.pool and not must:
            copies = BlockingAsyncStager(cache_staged_state_dict=False).stage({"model": weights, "optimizer": moments})
            self.pending = self.pool.submit(self.write, step, copies["model"], copies["optimizer"], small)
            return trouble
        return self.attempt(lambda: self.write(step, weights, moments, small), must) or trouble

    def finish(self) -> str:
        """Waits for the save that is under way."""
        pending, self.pending = self.pending, None
        return self.attempt(pending.result, False) if pending else ""

    def attempt(self, work: Callable[[], None], must: bool) -> str:
        try:
            work()
            return ""
        except (OSError, RuntimeError, CheckpointException) as error:  # torch.save tells of a full disk by RuntimeError
            self.sweep()
            free, reason = shutil.disk_usage(self.folder.parent).free, str(error).strip().splitlines()[0][:120]
            sentence = (f"a checkpoint could not be written to {self.folder} ({reason}; {free / 2**20:,.0f} MiB are free); "
                        "the ones before it are whole; make room")
        if must:
            raise UserError(sentence + (f" and go on with: {self.job.command} --resume {self.folder.parent}"
                                        if list(self.folder.glob("step-????????")) else " and start again"))
        return sentence

    def sweep(self) -> None:
        for rest in self.folder.glob("step-*.partial"):  # of a save that failed, or of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)

    def all_do(self, work: Callable[[], dict]) -> dict:
        """What every writing process finds, together; fails in all of them where it fails in one, so that none waits."""
        try:
            found = [work()]
        except OSError as error:
            found = [str(error)]
        if self.job.sharded:
            mine, found = found[0], [None] * self.job.world.size
            dist.all_gather_object(found, mine, group=self.job.world.files)
        if errors := [one for one in found if isinstance(one, str)]:
            raise OSError(errors[0])
        return {name: value for one in found for name, value in one.items()}

    def write(self, step: int, weights: dict, moments: dict, small: dict[str, dict]) -> None:
        job, place = self.job, self.folder / f"step-{step:08d}"
        partial, leader = place.with_name(place.name + ".partial"), job.world.rank == 0
        shards = partial / "sharded"

        def prepare() -> dict:
            if leader:
                self.sweep()
                shards.mkdir(parents=True) if job.sharded else partial.mkdir(parents=True)
                for name, content in small.items():
                    (partial / name).write_text(json.dumps(content, indent=1), "utf-8")
                job.tokenizer.save(partial)
                for name in CHAT_FORMAT:  # of the Hugging Face folder that posttrain.py began with
                    if (job.folder / name).exists():
                        shutil.copy(job.folder / name, partial)
            return {}

        def publish() -> dict:
            if leader:
                rest = [path for path in partial.rglob("*")
                        if path.is_file() and path.relative_to(partial).as_posix() not in hashes]
                write_whole(partial / "manifest.json", {"step": step, "files": hashes | hash_files(rest, partial)})
                if job.sharded:
                    sync_folder(shards)
                shutil.rmtree(place, ignore_errors=True)  # a damaged one
                partial.rename(place)
                sync_folder(self.folder)
                self.rotate(step)
            return {}

        self.all_do(prepare)
        if job.sharded:
            dcp.save(flat(weights, moments), checkpoint_id=shards, process_group=job.world.files)
        else:
            torch.save(weights, partial / "model.pt")
            torch.save(moments, partial / "optimizer.pt")
        hashes = self.all_do(lambda: hash_files(shards.glob(f"__{job.world.rank}_*"), partial))  # each what it wrote
        self.all_do(publish)

    def rotate(self, step: int) -> None:
        """Removes what --keep and --keep_every do not keep of the checkpoints up to `step` (later ones are damaged ones that
        a resume passed over); while a spike lasts, one from before it stays."""
        recipe, spike = self.job.recipe, self.job.guard.spike
        found = sorted(at for path in self.folder.glob("step-????????") if (at := int(path.name[5:])) <= step)
        before = [at for at in found if spike and at < spike["step"]]
        stay = {*found[-recipe.keep:], *before[-1:], *self.job.keepers}
        for at in found:
            if at not in stay and not (recipe.keep_every and at % recipe.keep_every == 0):
                shutil.rmtree(self.folder / f"step-{at:08d}", ignore_errors=True)


def write_whole(path: Path, content: dict) -> None:
    """JSON that is on the disk, whole, when it has its name."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_recipe(folder: Path, recipe: Recipe, sources: dict[str, str]) -> None:
    """recipe.json: the resolved recipe, and {source: sha256 of the tokens} that it trains on."""
    write_whole(folder / "recipe.json", asdict(recipe) | {"sources": sources})


def read_recipe(folder: Path, kind: type = Recipe) -> tuple[Recipe, dict[str, str]]:
    """What `write_recipe` wrote; `kind`: the class of the recipe."""
    try:
        saved = json.loads((folder / "recipe.json").read_text("utf-8"))
        sources = saved.pop("sources")
        saved["model"], saved["stages"] = ModelConfig(**saved["model"]), tuple(Stage(**s) for s in saved["stages"])
        return kind(**saved), sources
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run; give a folder such as runs/laptop") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/recipe.json is damaged ({error}); start again with `python train.py`") from None


class Log:
    """log.jsonl: one JSON object a line; {"step", "loss", ...} of training, {"step", "val", ...} of evaluations."""

    def __init__(self, folder: Path, resumed_at: int | None = None, recipe: Recipe | None = None):
        """Goes on with what is there; `resumed_at`: forgets what came after that step. `recipe`: also writes to its
        trackers."""
        self.path, self.torn = folder / "log.jsonl", False
        if resumed_at is not None:
            self.forget(resumed_at)
        if self.path.exists() and self.path.stat().st_size:
            with open(self.path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                self.torn = file.read() != b"\n"  # as kill -9 can leave it
        self.events = [entry for entry in self.entries() if "event" in entry]
        self.trackers = open_trackers(recipe, folder, resumed_at) if recipe else []

    def entries(self) -> Iterator[dict]:
        """Read from the file, which a long run makes too large to hold."""
        with open(self.path, encoding="utf-8") if self.path.exists() else contextlib.nullcontext(()) as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
                    yield json.loads(line)

    def forget(self, step: int) -> None:
        """Drops what a run did after a checkpoint that it goes on from, but for what happened to it."""
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            for entry in self.entries():
                if entry["step"] <= step or "event" in entry:
                    file.write(json.dumps(entry) + "\n")
        partial.replace(self.path)

    def write(self, **entry) -> None:
        entry = plain(entry)
        if "event" in entry:
            if entry in self.events:
                return  # a resumed run meets again what it met before
            self.events.append(entry)
        self.append(json.dumps(entry))
        numbers = {f"{name}/{part}" if part else name: number for name, value in entry.items() if name != "step"
                   for part, number in (value.items() if isinstance(value, dict) else (("", value),))
                   if isinstance(number, (int, float))}
        for tracker in list(self.trackers):
            try:
                tracker[0](entry["step"], numbers)
            except Exception as error:  # a service that is down must not end the run
                self.trackers.remove(tracker)
                tqdm.write(f"warning   a tracker of --log failed and gets no more: {error}", file=sys.stderr)

    def append(self, line: str) -> None:
        """Appends a line; a full disk costs lines of the log, not the run."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" * self.torn + line + "\n")
            self.torn = False
        except OSError as error:
            if not self.torn:
                tqdm.write(f"warning   {self.path} cannot be written ({error}); training goes on without it", file=sys.stderr)
            self.torn = True  # perhaps in the middle of a line

    def close(self) -> None:
        for _, finish in self.trackers:
            finish()


def plain(value):
    """With null for what is not finite, such as a noise scale that is not known yet: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_trackers(recipe: Recipe) -> None:
    """Before anything is written: that what --log names is installed."""
    for name in filter(None, recipe.log.split(",")):
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise UserError(f"--log {name} needs the package {name}: pip install {name}") from None


def open_trackers(recipe: Recipe, folder: Path, step: int | None) -> list[tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]]:
    """(write the numbers of a step, finish) of each tracker that --log names; `step`: where the run is resumed."""
    opened, known = [], folder / "tracker-id"  # another run of the same name is another one there
    if recipe.log and not known.exists():
        known.write_text(f"{folder.name}-{secrets.token_hex(4)}", "utf-8")
    for name in filter(None, recipe.log.split(",")):
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

            def tell(step, numbers, writer=writer):
                for key, number in numbers.items():
                    writer.add_scalar(key, number, step)
            opened.append((tell, writer.close))
        else:
            module = importlib.import_module(name)
            more = {"id": known.read_text("utf-8"), "dir": str(folder)} if name == "wandb" else {}
            module.init(project="nanoplaybook", name=folder.name, config=asdict(recipe), resume="allow", **more)
            opened.append((lambda step, numbers, module=module: module.log(numbers, step=step), module.finish))
    return opened


def draw_log(run_folder: Path) -> bool:
    """The loss and held-out curves of a run as loss.png; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve, evals, begins = [], [], {}  # of a long log only what is drawn
    for e in Log(run_folder).entries():
        if "loss" in e:
            curve.append((e["tokens"], e["loss"], e["lr"]))
            begins.setdefault(e["stage"], e["tokens"])
        elif "val" in e:
            evals.append((e["tokens"], e["val"]))
    tokens, losses, rates = zip(*curve) if curve else ((), (), ())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(tokens, losses, lw=0.8)
    left.set(title="training loss", xlabel="tokens", ylabel="nats per token")
    rate = left.twinx()
    rate.plot(tokens, rates, color="tab:gray", lw=0.8)
    rate.set_ylabel("learning rate")
    for begin in begins.values():
        left.axvline(begin, color="lightgray", lw=0.8, zorder=0)
    for source in evals[-1][1] if evals else ():
        right.plot([at for at, _ in evals], [scores[source] for _, scores in evals], marker=".", label=source)
    right.set(title="held-out text", xlabel="tokens", ylabel="bits per byte")
    right.legend()
    figure.savefig(run_folder / "loss.png", dpi=120)
    pyplot.close(figure)
    return True


# ---- loss spikes ----------------------------------------------------------------------------------------------


class Guard:
    """Watches loss and gradient norm for spikes (OLMo-core's rule: more than 6 standard deviations above the mean of the
    last 128 values, this one left out; quiet until there are 63) and does what `--guard` says:

    warn    write it down: the playbook lets a run go on through spikes that it recovers from
    skip    and do not apply this update (OLMo-core's SkipStepAdamW)
    rewind  and, where the loss is not back within FAST updates, go back to a checkpoint from before it, pass over the
            batches around the spike (PaLM: about 100 steps back, 200 to 500 batches), clip at half for a while; each
            further try passes over twice as many, and after `rewind_tries` the run ends and says so

    A spike is over when three losses in a row are within 2 standard deviations of where it began: `fast` in at most FAST
    updates, `slow` in at most LOST, otherwise `not recovered`.
    """

    WINDOW, LEAST, SIGMAS, FAST, LOST = 128, 63, 6.0, 10, 256

    def __init__(self, policy: str, tries: int, margin: int, device: str):
        self.policy, self.tries, self.margin = policy, tries, margin
        self.seen = torch.zeros(2, self.WINDOW, device=device)  # losses and norms, a ring
        self.count = 0  # of values that went in
        self.stopped = torch.zeros((), device=device)  # 1 after a value that is not finite: no update follows
        self.spike: dict | None = None  # the one that is not over: where it began, and what was usual there
        self.calm, self.since = 0, 0  # losses in a row that are back to it; updates since it began
        self.passed_over: list[list[int]] = []  # [begin, end) of steps without an update
        self.tight_until, self.rewinds = 0, 0

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> dict[str, torch.Tensor]:
        """On the device: whether this update is a spike, whether to apply it, and the window's mean and deviation."""
        new = torch.stack((loss, norm))  # [2]
        seen = self.seen[:, :min(self.count, self.WINDOW)]
        if self.count >= self.LEAST:
            mean, deviation = seen.mean(1), seen.std(1)
            spike = (new > mean + self.SIGMAS * deviation).any().float()
        else:
            mean, deviation, spike = new, torch.zeros_like(new), torch.zeros_like(loss)
        self.stopped = torch.maximum(self.stopped, 1 - new.isfinite().all().float())
        self.seen[:, self.count % self.WINDOW] = new
        self.count += 1
        dropped = torch.maximum(self.stopped, spike) if self.policy == "skip" else self.stopped
        return {"spike": spike, "dropped": dropped, "stopped": self.stopped, "usual": mean[0], "spread": deviation[0]}

    def follow(self, step: int, values: dict[str, float]) -> dict | None:
        """On the host, after `judge`: the event to write down, if any; its "event" is spike, over, or rewind."""
        event = None
        if values["spike"] and self.spike is None:
            self.spike = {"step": step, **{name: values[name] for name in ("loss", "grad_norm", "usual", "spread")}}
            self.calm, self.since, event = 0, 0, {"event": "spike", "step": step, "spike": dict(self.spike)}
        elif self.spike:
            begin, back = self.spike["step"], self.spike["usual"] + 2 * self.spike["spread"]
            self.since += 1
            self.calm = self.calm + 1 if values["loss"] <= back else 0
            if self.calm == 3 or self.since >= self.LOST:
                lasted = self.since - self.calm + 1
                kind = ("fast" if lasted <= self.FAST else "slow") if self.calm == 3 else "not recovered"
                event, self.spike = {"event": "over", "step": step, "kind": kind, "began": begin, "lasted": lasted}, None
            elif self.policy == "rewind" and self.since >= self.FAST and not self.calm:
                event = {"event": "rewind", "step": step, "began": begin}
        return event

    def after_rewind(self, event: dict, old: "Guard") -> None:
        """What this guard, restored from the checkpoint, has to know of what came after it; raises UserError when
        enough has been tried."""
        near = old.passed_over and event["began"] <= old.passed_over[-1][1] + self.WINDOW  # the same trouble, not a new one
        self.passed_over, self.rewinds = list(old.passed_over), old.rewinds + 1 if near else 1
        if self.rewinds > self.tries:
            raise UserError(f"step {event['step']}: the loss has not come back from the spike at step {event['began']}, and "
                            f"{self.tries} rewinds did not help, so it is not the data; remove the checkpoints from that step "
                            "on and --resume with a lower --learning_rate or --clip")
        margin = self.margin * 2 ** (self.rewinds - 1)
        self.passed_over.append([event["began"] - 1 - margin, event["step"] + margin])
        self.tight_until = event["step"] + 2 * margin + self.WINDOW

    def after_gap(self, step: int) -> int:
        """The next step at or after this one whose batch is not passed over."""
        while gap := next((end for begin, end in self.passed_over if begin <= step < end), None):
            step = gap
        return step

    def clip(self, step: int, clip: float) -> float:
        return clip / 2 if step < self.tight_until else clip

    def state(self) -> dict:
        """As plain numbers, for a checkpoint."""
        return {"seen": self.seen.tolist(), **{name: getattr(self, name) for name in self.PLAIN}}

    PLAIN = ("count", "spike", "calm", "since", "passed_over", "tight_until", "rewinds")

    def restore(self, state: dict) -> None:
        self.seen = torch.tensor(state["seen"], device=self.seen.device)
        self.stopped = torch.zeros_like(self.stopped)
        for name in self.PLAIN:
            setattr(self, name, state[name])


# ---- one update -----------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A signal asked the run to stop; the checkpoint is written."""


RESUMABLE_EXIT = 75  # EX_TEMPFAIL: what a run that a signal stopped exits with, for `while [ $? = 75 ]`


class Report:
    """What an update found. Its numbers travel to the host while the device goes on; `read` waits for them only."""

    def __init__(self, values: dict[str, torch.Tensor], parts: list[tuple[object, torch.Tensor]]):
        self.names, self.parts = list(values), parts  # parts: each piece of the batch and its share of the loss
        numbers = torch.stack([value.float() for value in values.values()])
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self.there = torch.cuda.Event() if numbers.is_cuda else None
        if self.there:
            self.there.record()

    def read(self) -> dict[str, float]:
        if self.there:
            self.there.synchronize()
        return dict(zip(self.names, self.numbers.tolist()))


class Job(abc.ABC):
    """Everything that a run works with. Subclasses say what a batch is, what its loss is, and how it is judged;
    posttrain.py has more of them. Nothing of it but weights, moments and the guard changes from step to step."""

    command, onward = "python train.py", "python train.py --start"

    def __init__(self, recipe: Recipe, world: World, machine: cost.Machine, tokenizer: Tokenizer):
        self.recipe, self.world, self.machine, self.tokenizer = recipe, world, machine, tokenizer
        self.first = 0  # steps done before, when a run is resumed
        self.steps = 0  # of the whole run
        self.keepers: tuple[int, ...] = ()  # steps whose checkpoints stay
        self.names: list[str] = []  # of the sources
        self.flops = 0.0  # a token
        self.memory = 0.0  # bytes that training is predicted to need at its peak
        self.fingerprint: dict[str, str] = {}  # {source: sha256} of what it trains on
        self.found: dict[str, torch.Tensor] = {}  # what the last `loss` found besides; summed over pieces and processes

    def equip(self, model: GPT, begun: Path | None = None, resume: bool = False) -> None:
        """Takes a model, on the CPU, to the device: optimizer, guard, sharding, and the state of the checkpoint `begun`."""
        recipe, device = self.recipe, self.machine.device
        model.compute_dtype, model.recompute = self.machine.dtype, recipe.activation_checkpointing
        self.sharded = recipe.parallel == "fsdp" and self.world.size > 1
        if self.sharded:  # each block moves to the device by itself, so that the whole need never fit there
            half = self.machine.dtype != torch.float32
            policy = MixedPrecisionPolicy(param_dtype=self.machine.dtype if half else None, reduce_dtype=torch.float32)
            for part in (*model.model.layers, model):
                fully_shard(part, mp_policy=policy)
        self.model = self.parallel = model.to(device)
        self.optimizer = schedule_.build_optimizer(model, recipe.learning_rate, recipe.weight_decay,
                                                   (recipe.beta1, recipe.beta2), recipe.eps, recipe.optimizer, self.machine.dtype)
        self.guard = Guard(recipe.guard, recipe.rewind_tries, recipe.spike_margin, device)
        if begun:
            guard = load_checkpoint(begun, model, self.optimizer)
            if resume:
                self.first = guard["step"]
                self.guard.restore(guard)
        if self.machine.compile:
            model.compile_blocks()

    def connect(self) -> None:
        """From here on, gradients are averaged over the processes."""
        if self.world.size > 1 and not self.sharded:
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    # What a subclass has to say:

    def begin(self, log: "Log | None", resume: bool) -> None:
        """What is to be done once in a run folder before the first update; every process calls it, the first with the log."""

    def enter(self, step: int) -> int:
        """Prepares for the update that begins at a step; returns the step at which that update ends."""
        return step + 1

    @abc.abstractmethod
    def micro_batches(self, step: int, steps: int) -> list:
        """This process's pieces of the batches of these steps: whatever `load` understands."""

    @abc.abstractmethod
    def load(self, piece, following) -> tuple[torch.Tensor, ...]:
        """A piece on the device; `following` will be asked for next."""

    @abc.abstractmethod
    def loss(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """A piece's share of the batch's mean loss, and what is added to it for the gradient but not reported."""

    def halves(self, piece) -> list:
        """A piece cut in two, for the noise scale of a batch that is one piece."""
        return [piece]

    def watch(self, piece, first: bool, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Numbers about a piece for the log, summed over pieces and processes, the same names in all; on watched steps."""
        return {}

    def rate(self, step: int) -> float:
        return self.recipe.learning_rate

    def update(self, step: int, end: int, **options) -> Report:
        return training_step(self, step, self.rate(step), end - step, **options)

    def batch_tokens(self, step: int, end: int) -> int:
        return (end - step) * self.recipe.batch_tokens

    def describe(self, piece) -> str:
        return str(piece)

    def note(self, step: int, values: dict[str, float]) -> tuple[dict, str]:
        """What of an update's numbers else is logged, and shown behind the progress bar."""
        return {}, ""

    def evaluate(self, step: int, last: bool) -> dict:
        """Prints how the model does and returns it for the log; every process calls it."""
        return {}


def training_step(job: Job, step: int, rate: float, steps: int = 1, measure_noise: bool = False, watched: bool = False,
                  signals: int = 0) -> Report:
    """One update from the batches of `steps` steps, `step` and those after it, without waiting for the device.

    The report has the mean loss in nats a token and the gradient norm, over all processes, what `Guard.judge` says, and
    the signals noted by all processes. An update whose loss or norm is not finite is not made, in no process, nor is
    any after it. `measure_noise`: also the squared norm of a small batch's gradient, each process's first micro-batch
    before any averaging (one that is alone is cut in two). `watched`: also what is logged now and then.
    """
    recipe, world, device = job.recipe, job.world, job.machine.device
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    pieces = job.micro_batches(step, steps)
    if measure_noise and len(pieces) == 1:
        pieces = job.halves(pieces[0])
    ahead = [*pieces[1:], None]  # what will be asked for next
    local: dict[str, torch.Tensor] = {"signals": torch.full((), float(signals), device=device)}
    parts: list[tuple[object, torch.Tensor]] = []
    weights = watched_weights(job.model) if watched else {}
    for number, piece in enumerate(pieces if watched else ()):  # before any gradient: FSDP loses those it holds in a forward
        tensors = job.load(piece, pieces[(number + 1) % len(pieces)])
        for name, value in job.watch(piece, number == 0, *tensors).items():
            local[name] = local.get(name, 0) + value
    if watched:  # what was asked for before is not this step's
        cost.synchronize(device)
    data_seconds, begin = 0.0, time.perf_counter()
    for number, (piece, following) in enumerate(zip(pieces, ahead)):
        waited = time.perf_counter()
        tensors = job.load(piece, following)
        data_seconds += time.perf_counter() - waited
        synchronize = number == len(pieces) - 1
        if job.sharded:
            job.model.set_requires_gradient_sync(synchronize)
        with contextlib.nullcontext() if job.sharded or synchronize or world.size == 1 else job.parallel.no_sync():
            part, extra = job.loss(*tensors)
            for name, value in job.found.items():
                local[name] = local.get(name, 0) + value
            if watched and number == 0 and not job.sharded:  # before the first wait for the others; FSDP waits all along
                cost.synchronize(device)
                busy = [torch.full((), (time.perf_counter() - begin) * (i == world.rank), device=device)
                        for i in range(world.size)]
                local |= {f"seconds/{i}": seconds for i, seconds in enumerate(busy)}
            ((part + extra) * world.size).backward()  # because DDP and FSDP divide by the number of processes
        parts.append((piece, part.detach()))
        if measure_noise and number == 0 and len(pieces) > 1:
            local["grad_square"] = sum(p.grad.square().sum() for p in job.model.parameters() if p.grad is not None)
            small = tensors[0].numel()
    norm = torch.nn.utils.clip_grad_norm_(job.model.parameters(), job.guard.clip(step, recipe.clip))
    local |= {"loss": torch.stack([part for _, part in parts]).sum(),
              "grad_norm": (norm.full_tensor() if isinstance(norm, DTensor) else norm) / world.size}
    values = dict(zip(local, world.sum(torch.stack([value.float() for value in local.values()])).unbind()))
    values |= job.guard.judge(values["loss"], values["grad_norm"])
    job.optimizer.found_inf = values["dropped"]  # on the device: 1 leaves weights and moments as they are
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    for layer, uneven in enumerate(job.model.balance_experts(1 - values["dropped"])):
        values[f"expert_load/{layer}"] = uneven
    for name, before in weights.items():
        change = (job.model.get_parameter(name).detach() - before).norm() / before.norm()
        values[f"update/{name}"] = change.full_tensor() if isinstance(change, DTensor) else change
    values["data_seconds"] = torch.full((), data_seconds, device=device)
    if "grad_square" in values:
        values["small_tokens"] = torch.full((), float(small), device=device)
    return Report(values, parts)


def watched_weights(model: GPT) -> dict[str, torch.Tensor]:
    """Copies of some matrices, whose change an update is measured by: those of the first, middle and last block."""
    layers = {0, len(model.model.layers) // 2, len(model.model.layers) - 1}
    return {name: p.detach().clone() for name, p in model.named_parameters()
            if p.ndim == 2 and (found := re.match(r"model\.layers\.(\d+)\.", name)) and int(found[1]) in layers}


class Diverged(UserError):
    """A loss or a gradient is not finite."""


def blame(job: Job, report: Report, step: int, values: dict[str, float]) -> Diverged:
    """Why an update was not made, naming the pieces of the batch; every process calls it."""
    bad = [f"process {job.world.rank}, {job.describe(piece)}" for piece, part in report.parts if not part.isfinite()]
    places = [place for places in job.world.gather(bad) for place in places]
    where = f" (in {'; '.join(places[:4])}{' and more' if len(places) > 4 else ''})" if places else ""
    saved = sorted(path.name for path in (job.folder / "checkpoints").glob("step-????????"))
    return Diverged(f"step {step}: the loss is {values['loss']}{where} and the gradient norm {values['grad_norm']}, so this "
                    f"update was not made and nothing was saved; the last checkpoint is {saved[-1] if saved else 'none'}: go "
                    f"on with {job.command} --resume {job.folder} and a lower --learning_rate or --clip")


# ---- the loop -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noted_signals():
    """Collects SIGINT and SIGTERM in a list instead of dying of them, so that a step is never left half done."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, lambda number, _: noted.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_job(job: Job, run_folder: Path, resume: bool = False) -> dict:
    """Trains until the end, a signal or an error; returns the last evaluation. The one loop of train.py and posttrain.py.

    On CUDA a step's numbers are read while the next is computed, so that the GPU never waits for the host.
    """
    recipe, leader, log, scores = job.recipe, job.world.rank == 0, None, {}
    job.folder, lag = run_folder, 1 if job.machine.device == "cuda" else 0
    check_trackers(recipe)
    if leader:
        run_folder.mkdir(parents=True, exist_ok=resume)
        write_recipe(run_folder, recipe, job.fingerprint)
        job.tokenizer.save(run_folder)
        log = Log(run_folder, job.first, recipe)
    job.begin(log, resume)
    if resume and job.first >= job.steps:
        print(f"finished  all {job.steps:,} steps are done; a new run can begin with these weights: {job.onward} {run_folder}")
    saver, meter = Saver(job, run_folder), Meter(job, log)
    if not resume:
        saver.save(0, must=True)  # proves that the disk works before anything is lost
    print(f"run       {run_folder}" + (f", continued from step {job.first:,}" if resume else "")
          + "; Ctrl-C stops, saves, and says how to go on\n", flush=True)
    bar = tqdm(total=job.steps, initial=job.first, disable=not leader, dynamic_ncols=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 10,
               bar_format="{n_fmt}/{total_fmt} steps [{elapsed}, {remaining} left]{postfix}")
    waiting: collections.deque[tuple[int, int, Report]] = collections.deque()

    def read(most: int) -> tuple[bool, dict | None]:
        """Reads reports until `most` wait; whether a signal came, and the event to go back for, the same in all processes."""
        stop = False
        while len(waiting) > (0 if stop else most):
            at, to, report = waiting.popleft()
            values = report.read()
            if values["stopped"]:
                saver.finish()
                raise blame(job, report, to, values)
            event, stop = job.guard.follow(to, values), stop or values["signals"] > 0
            meter.count(at, to, values, event)
            bar.set_postfix_str(meter.shown, refresh=False)
            bar.update(to - bar.n)
            if event and event["event"] == "rewind":
                waiting.clear()
                return stop, event
        return stop, None

    step, stop = job.first, False
    with noted_signals() as noted, contextlib.closing(bar), contextlib.closing(meter):
        while step < job.steps:
            before, begin = step, min(job.steps, job.guard.after_gap(step))

            def due(every: int) -> bool:
                return every > 0 and step // every > before // every  # an update, or a gap, can cover several steps

            step = begin
            if begin < job.steps:
                step = job.enter(begin)
                waiting.append((begin, step, job.update(begin, step, measure_noise=due(recipe.noise_every),
                                                        watched=due(recipe.watch_every), signals=len(noted))))
            last = step == job.steps
            judges = due(recipe.eval_every) or last or before == 0
            saves = due(recipe.save_every) or last or any(before < end <= step for end in job.keepers)
            heard, rewind = read(0 if saves or judges or stop else lag)
            stop = stop or heard
            if rewind:
                meter.trouble(step, saver.finish())
                step = bar.n = go_back(job, rewind, log)
            elif judges and not (stop and not last):  # before the save: a checkpoint's log is complete
                started, scores = time.perf_counter(), job.evaluate(step, last)
                if leader:
                    log.write(step=step, tokens=step * recipe.batch_tokens, train_seconds=meter.seconds,
                              seconds=time.perf_counter() - started, **scores)
            if not rewind and (saves or stop):
                meter.restart()
                meter.trouble(step, saver.save(step, must=last or stop))
                meter.lost("save_seconds")
            if stop and not last and not rewind:
                raise Interrupted(f"Stopped after step {step:,} of {job.steps:,} and saved; go on with: "
                                  f"{job.command} --resume {run_folder}")
            if judges or rewind:
                meter.restart()
        meter.trouble(step, saver.finish())
    return scores


def go_back(job: Job, event: dict, log: "Log | None") -> int:
    """Rewinds a job to a checkpoint from before a spike; returns its step."""
    old, before = job.guard, event["began"] - 1
    found = [path for path in sorted((job.folder / "checkpoints").glob("step-????????")) if int(path.name[5:]) <= before]
    early = [path for path in found if int(path.name[5:]) <= before - job.guard.margin]
    whole = job.world.agree(next((path for path in reversed(early or found) if job.world.rank == 0 and not broken(path)), None))
    if whole is None:
        raise UserError(f"step {event['step']}: the loss has not come back from the spike at step {event['began']}, and no "
                        f"checkpoint from before it is left; start again with a higher --keep than {job.recipe.keep}")
    job.guard = Guard(old.policy, old.tries, old.margin, job.machine.device)
    job.guard.restore(load_checkpoint(whole, job.model, job.optimizer))
    job.guard.after_rewind(event, old)
    begin, end = job.guard.passed_over[-1]
    step = int(whole.name[5:])
    for later in (job.folder / "checkpoints").glob("step-????????"):  # what is undone must not be resumed
        if job.world.rank == 0 and int(later.name[5:]) > step:
            shutil.rmtree(later)
    tqdm.write(f"step {event['step']:,}: the loss is not back {event['step'] - event['began']} updates after the spike at step "
               f"{event['began']:,}: back to step {step:,}; the batches of steps {max(begin, step):,} to {end:,} are passed over "
               f"and the gradient is clipped at {job.recipe.clip / 2:g} for a while (try {job.guard.rewinds} of {old.tries})",
               file=sys.stdout)
    if log:
        log.forget(step)
        log.write(**event, to=step, passed_over=[begin, end], rewinds=job.guard.rewinds)
    return step


def broken(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used; "" if it can."""
    try:
        check_manifest(checkpoint)
        return ""
    except UserError as error:
        return str(error)


class Meter:
    """Turns an update's numbers into its line of the log and of the progress bar, and says what slows a run down."""

    USUAL, SLOW, BEHIND = 64, 0.5, 1.3  # updates; of the usual speed; times the median process

    def __init__(self, job: Job, log: "Log | None"):
        self.job, self.log, self.shown = job, log, ""
        self.seconds = 0.0  # spent in updates so far
        self.noise, self.speeds, self.losses = schedule_.NoiseScale(), collections.deque(maxlen=self.USUAL), {}
        self.slow = False
        for entry in log.entries() if log else ():
            self.seconds = entry.get("train_seconds", self.seconds)
            if "grad_noise" in entry:
                self.noise.add(entry["grad_signal"], entry["grad_noise"])
        self.restart()

    def restart(self) -> None:
        """After something that is not training."""
        self.mark = time.perf_counter()

    def lost(self, what: str) -> None:
        self.losses[what] = self.losses.get(what, 0.0) + time.perf_counter() - self.mark
        self.restart()

    def trouble(self, step: int, sentence: str) -> None:
        if sentence and self.log:
            tqdm.write(f"warning   step {step:,}: {sentence}", file=sys.stderr)
            self.log.write(step=step, event="warning", text=sentence)

    def count(self, at: int, step: int, values: dict[str, float], event: dict | None) -> None:
        job, now = self.job, time.perf_counter()
        elapsed, self.mark = now - self.mark, now
        self.seconds += elapsed
        if not self.log:
            return
        tokens, rate = job.batch_tokens(at, step), job.rate(at)
        speed = tokens / elapsed
        share = speed * job.flops / job.machine.peak_flops / job.world.size
        more, shown = job.note(at, values)
        groups: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            if "/" in name:
                groups.setdefault(name.split("/", 1)[0], {})[name.split("/", 1)[1]] = value
        if uneven := groups.get("expert_load"):  # per MoE layer, the fullest expert's over the mean
            more["expert_load"] = list(uneven.values())
            shown += f" | fullest expert {max(uneven.values()):.1f}x"
        if "grad_square" in values:
            small, large = values["small_tokens"], tokens
            square = values["grad_square"] * (large / small) ** 2 / job.world.size ** 3
            signal, noise = schedule_.NoiseScale.split(square, values["grad_norm"] ** 2, small, large)
            more |= {"grad_signal": signal, "grad_noise": noise, "noise_scale_tokens": self.noise.add(signal, noise)}
        if changed := groups.get("update"):
            more |= {"update_to_weight": max(changed.values()), "memory": cost.peak_memory(job.machine.device)}
            more |= {name: value for name, value in values.items() if name.startswith(("logit_", "attention_"))}
        if values["dropped"]:
            more["dropped"] = True
        self.log.write(step=step, tokens=step * job.recipe.batch_tokens, batch_tokens=tokens, loss=values["loss"], lr=rate,
                       grad_norm=values["grad_norm"], tokens_per_second=speed, share_of_peak=share,
                       train_seconds=self.seconds, data_seconds=values["data_seconds"], **self.losses, **more)
        self.losses = {}
        if event and event["event"] != "rewind":
            self.log.write(**event)
            if event["event"] == "spike":
                done = {"skip": "this update is left out", "warn": "training goes on", "rewind": "training goes on for now"}
                seen = event["spike"]
                high = "loss" if seen["loss"] > seen["usual"] + Guard.SIGMAS * seen["spread"] else "gradient norm"
                what = (f"a spike of the {high}: loss {seen['loss']:.3f} where {seen['usual']:.3f} is usual, gradient norm "
                        f"{seen['grad_norm']:.2f}; {done[job.recipe.guard]}")
            else:
                what = (f"not recovered {event['lasted']} updates after the spike at step {event['began']:,}: a lower rate, a "
                        "lower --clip or --guard rewind are what helps" if event["kind"] == "not recovered" else
                        f"recovered from the spike at step {event['began']:,}: {event['kind']}, {event['lasted']} updates")
            tqdm.write(f"step {step:,}: {what}", file=sys.stdout)
        self.compare(step, speed, groups.get("seconds", {}))
        stage = f"{more['stage']} | " if "stage" in more else ""
        self.shown = (f"{stage}loss {values['loss']:.3f} | lr {rate:.1e} | grad {values['grad_norm']:.2f} | {speed:,.0f} tok/s | "
                      f"{share:.0%} of peak{shown}")

    def compare(self, step: int, speed: float, busy: dict[str, float]) -> None:
        """Warns when a run has become slower than it was, or one process is slower than the others."""
        self.speeds.append(speed)
        if len(self.speeds) == self.USUAL:
            usual, recent = (statistics.median(list(self.speeds)[part]) for part in (slice(0, -8), slice(-8, None)))
            if recent < self.SLOW * usual and not self.slow:
                self.trouble(step, f"{recent:,.0f} tokens/s where {usual:,.0f} were usual: look for other work on the machine, "
                                   "heat, or a slow disk")
            self.slow = recent < self.SLOW * usual
        if len(busy) > 1:
            usual = statistics.median(busy.values())
            process, seconds = max(busy.items(), key=lambda item: item[1])
            if seconds > self.BEHIND * usual and seconds - usual > 0.005:
                self.trouble(step, f"process {process} took {seconds:.3f} s for a forward pass, the others {usual:.3f} s: all "
                                   "wait for it")

    def close(self) -> None:
        if self.log:
            self.log.close()


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


def bits_per_byte(job: "Job", split: Split, tokens: float) -> float:
    """`evals.bits_per_byte` with the shapes and the masks of training, so that nothing is compiled anew; the processes take
    turns."""
    documents = job.curriculum.most_documents[job.model.config.max_position_embeddings]
    return evals.bits_per_byte(job.model, job.tokenizer, split, tokens, job.rows, job.recipe.document_mask, documents,
                               job.world).mean


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
    return max((n for n in range(1, rows + 1) if rows % n == 0 and fits(recipe, n, context, world, device)), default=1)


def fits(recipe: Recipe, rows: int, context: int, world: World, device: str) -> bool:
    """Whether a process can compute so many sequences at once: in 60 % of the GPU's memory, weights and all; on a CPU, with
    1 GiB of activations, past which a batch is no faster."""
    memory = cost.training_memory(recipe.model, rows, context, 4 if recipe.dtype == "float32" else 2, device,
                                  recompute=recipe.activation_checkpointing, shards=shards(recipe, world))
    if device == "cuda":
        return memory["total"] <= 0.6 * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    return memory["activations"] <= 2**30


def shards(recipe: Recipe, world: World) -> int:
    """Into how many parts weights, gradients and moments are divided."""
    return world.size if recipe.parallel == "fsdp" else 1


def load_data(recipe: Recipe, leader: bool) -> tuple[Tokenizer, list[dict[str, Split]]]:
    """The tokenizer and the sources of a recipe; the leader checks their sha256 and makes the embedded corpus if it is
    not there yet."""
    if leader and recipe.data == "data/laptop" and not Path(recipe.data).exists():
        print("data      data/laptop is not there yet: reading the Python installation, training a tokenizer, encoding")
        data_.prepare_embedded(recipe.data, recipe.model.vocab_size)
    tokenizer = Tokenizer.load(data_.find_tokenizer(recipe.data))
    if leader and "data/recall" in recipe.data.split(",") and not Path("data/recall").exists():
        print("data      data/recall is not there yet: writing documents with notes to look up, encoding")
        data_.prepare_recall("data/recall", tokenizer)
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


def print_plan(job: "Pretraining", tokens_per_second: float) -> None:
    recipe, curriculum, world, rows = job.recipe, job.curriculum, job.world, job.rows
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
    print(f"peak      share of peak = tokens/s x {job.flops:,.0f} FLOPs a token (6 x {count['active']:,} parameters and causal "
          f"attention) / {world.size} x {job.machine.peak_flops:.3g} FLOP/s")
    print(f"memory    {job.memory / 2**20:,.0f} MiB at the peak, as `cost.process_memory` predicts")


# ---- pretraining ----------------------------------------------------------------------------------------------


class Pretraining(Job):
    """Next-token prediction on a curriculum: its batches, its rate, its held-out text."""

    def __init__(self, recipe: Recipe, world: World, machine: cost.Machine, tokenizer: Tokenizer,
                 sources: list[dict[str, Split]]):
        super().__init__(recipe, world, machine, tokenizer)
        self.sources, splits = sources, [source["train"] for source in sources]
        self.names = [split.name for split in splits]
        self.fingerprint = {split.name: split.sha256 for split in splits}
        context = recipe.model.max_position_embeddings
        self.curriculum = Curriculum(splits, list(recipe.stages), context, recipe.batch_tokens // context, recipe.seed,
                                     recipe.packing, [source["val"] for source in sources])
        self.steps, self.keepers = self.curriculum.steps, tuple(self.curriculum.ends)
        self.rows = world.agree(micro_batch_rows(recipe, world, machine.device))  # sequences of a micro-batch
        self.loader = Loader(self.curriculum, machine.device)

    def enter(self, step: int) -> int:
        """What changes with a stage besides the data: context, RoPE's base, and so the sequences of a micro-batch."""
        number, base, contexts = self.curriculum.stage(step), self.recipe.model, self.curriculum.contexts
        stage = self.curriculum.stages[number]
        config = base.change(max_position_embeddings=contexts[number], rope_theta=stage.rope_theta or base.rope_theta)
        if config != self.model.config:
            if config.max_position_embeddings != self.model.config.max_position_embeddings:
                own = config.max_position_embeddings != base.max_position_embeddings  # --micro_batch is for the model's
                recipe = replace(self.recipe, model=config, micro_batch=0 if own else self.recipe.micro_batch)
                self.rows = self.world.agree(micro_batch_rows(recipe, self.world, self.machine.device))
            self.model.config = config
        changes = [end for end, a, b in zip(self.curriculum.ends, contexts, contexts[1:]) if a != b and end > step]
        return min([step + 2 ** sum(step >= at for at in self.recipe.doublings()), self.steps, *changes])

    def rate(self, step: int) -> float:
        return learning_rate(self.recipe, self.curriculum, step)

    def micro_batches(self, step: int, steps: int) -> list[tuple[int, int, int]]:
        """(step, first sequence of its batch, sequences) of this process."""
        if self.recipe.packing == "concat":  # without padding: all count
            self.share = 1 / (steps * self.recipe.batch_tokens)  # of a token in the update's mean loss
        else:
            self.share = 1 / sum(self.curriculum.targets(at) for at in range(step, step + steps))
        sequences, turn = self.recipe.batch_tokens // self.model.config.max_position_embeddings, self.world.size * self.rows
        return [(at, first + self.world.rank * self.rows, self.rows) for at in range(step, step + steps)
                for first in range(0, sequences, turn)]

    def halves(self, piece: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        at, first, count = piece
        return [(at, first, count // 2), (at, first + count // 2, count - count // 2)] if count > 1 else [piece]

    def load(self, piece, following) -> tuple[torch.Tensor, ...]:
        return self.loader.get(piece, following or (piece[0] + 1, self.world.rank * self.rows, self.rows))

    def loss(self, tokens, targets, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor | float]:
        logits = self.parallel(tokens, cu_seqlens if self.recipe.document_mask else None)
        extra = self.model.routing_loss() * (tokens.numel() * self.share)
        if self.recipe.z_loss:
            extra = extra + self.recipe.z_loss * z_loss(logits, targets) * self.share
        return cross_entropy(logits, targets) * self.share, extra

    @torch.no_grad()
    def watch(self, piece, first: bool, tokens, targets, cu_seqlens) -> dict[str, torch.Tensor]:
        """Per source, the sums of loss and targets; of the first piece of the first process also the extremes of logits,
        of attention scores, and of the heads' entropy. A forward pass more."""
        with watch_attention() as extremes:
            logits = self.model(tokens, cu_seqlens if self.recipe.document_mask else None)
        zero = torch.zeros((), device=logits.device)
        found = {f"{what}/{name}": zero for name in self.names for what in ("loss", "tokens")}
        for row, source in enumerate(self.curriculum.locate(*piece)[0]):
            name = self.names[source]
            found[f"loss/{name}"] = found[f"loss/{name}"] + cross_entropy(logits[row:row + 1], targets[row:row + 1])
            found[f"tokens/{name}"] = found[f"tokens/{name}"] + (targets[row] >= 0).sum()
        mine = first and self.world.rank == 0
        high, low = (torch.stack(extremes).amax(0), torch.stack(extremes).amin(0)) if extremes else [zero.expand(3)] * 2
        for name, value in (("logit_max", logits.abs().max()), ("attention_score_max", high[0]),
                            ("attention_entropy_min", low[1]), ("attention_entropy_max", high[2])):
            found[name] = value if mine else zero
        return found

    def describe(self, piece) -> str:
        at, first, count = piece
        sources = sorted({self.names[source] for source in self.curriculum.locate(at, first, count)[0]})
        return f"sequences {first} to {first + count - 1} of the batch of step {at + 1}, from {', '.join(sources)}"

    def note(self, step: int, values: dict[str, float]) -> tuple[dict, str]:
        entry = {"stage": self.curriculum.stages[self.curriculum.stage(step)].name}
        if by_source := {name: values[f"loss/{name}"] / values[f"tokens/{name}"] for name in self.names
                         if values.get(f"tokens/{name}")}:
            entry["loss_by_source"] = by_source
        return entry, ""

    def evaluate(self, step: int, last: bool) -> dict:
        """Held-out bits per byte of each source, the scores of eval_tasks, and a sample: how the model continues the first
        words of a held-out document, of one source in turn, at the end of each."""
        recipe, model = self.recipe, self.model
        scores = {source["val"].name: bits_per_byte(self, source["val"], recipe.eval_tokens) for source in self.sources}
        tasks = evals.tasks_of(recipe.eval_tasks, recipe.data) if recipe.eval_tasks else []
        tasks = evals.evaluate(model, self.tokenizer, tasks)
        turn = step // recipe.eval_every % len(self.sources)
        shown = self.sources if last else [self.sources[turn]]
        prompts = [self.tokenizer.decode(source["val"].tokens[1:9].tolist()) for source in shown]
        prompts = [recipe.sample_prompt] if recipe.sample_prompt else prompts
        length = min(96, recipe.model.max_position_embeddings // 2)
        texts = [complete(model, self.tokenizer, prompt, length, min_p=0.05, seed=step)[0] for prompt in prompts]
        listed = ", ".join([*(f"{name} {score:.3f}" for name, score in scores.items()),
                            *(f"{name} {score.mean:.3f} ± {score.stderr:.3f}" for name, score in tasks.items())])
        said = [f"  after {prompt!r}\n    | " + text.strip().replace("\n", "\n    | ") for prompt, text in zip(prompts, texts)]
        tqdm.write("\n".join([f"step {step:,}: held-out bits per byte {listed}", *said, ""]), file=sys.stdout)
        sys.stdout.flush()
        found = {"val": scores, "samples": [prompt + text for prompt, text in zip(prompts, texts)]}
        return found | ({"tasks": tasks} if tasks else {})


def choose_machine(recipe: Recipe, world: World) -> cost.Machine:
    """The device, and what is set once for a whole process."""
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    machine = world.agree(cost.find_machine(recipe.device, recipe.dtype, recipe.compile))
    if machine.device == "cuda":  # TensorFloat-32 for what is left in fp32, unless fp32 was asked for
        torch.set_float32_matmul_precision("highest" if recipe.dtype == "float32" else "high")
    print(f"machine   {machine.reason}")
    return machine


def set_up(recipe: Recipe, world: World, run_folder: Path, resume: bool,
           kind: Callable[..., Pretraining] = Pretraining) -> Pretraining:
    """Checks everything that can be wrong, prints the plan, and returns what is needed to train."""
    begun = world.from_first(lambda: newest_checkpoint(run_folder) if resume else
                             starting_point(recipe.start) if recipe.start else None)
    micro_batch_rows(recipe, world, "cpu")  # an impossible batch is said before any work
    machine = choose_machine(recipe, world)
    tokenizer, sources = load_data(recipe, True) if world.rank == 0 else (None, None)
    world.wait_for_first()  # which makes the data, or checks terabytes of it
    if world.rank:
        tokenizer, sources = load_data(recipe, False)
    splits = [source["train"] for source in sources]
    if resume and (Tokenizer.load(run_folder).hash != tokenizer.hash
                   or read_recipe(run_folder)[1] != {split.name: split.sha256 for split in splits}):
        raise UserError(f"{recipe.data} is not the data that {run_folder} began with; put that back or start a new run")
    context, dtype = recipe.model.max_position_embeddings, machine.dtype.itemsize
    recipe = replace(fit_to_data(recipe, tokenizer, splits), device=machine.device, compile=str(machine.compile).lower(),
                     dtype=str(machine.dtype).removeprefix("torch."))  # a resumed run computes as it began
    if recipe.parallel == "auto":
        room = torch.cuda.get_device_properties(0).total_memory if machine.device == "cuda" else math.inf
        needs = cost.training_memory(recipe.model, 1, context, dtype, recompute=recipe.activation_checkpointing)["total"]
        recipe = replace(recipe, parallel="fsdp" if world.size > 1 and needs > 0.9 * room else "ddp")
    if recipe.noise_every and recipe.parallel == "fsdp" and world.size > 1:
        print("noise     its scale is not measured: FSDP keeps no whole gradients")
        recipe = replace(recipe, noise_every=0)
    job = kind(recipe, world, machine, tokenizer, sources)
    if recipe.model.position == "learned" and max(job.curriculum.contexts) > context:
        raise UserError(f"--position learned ends at {context} tokens, but a stage has {max(job.curriculum.contexts)}; take rope")
    if recipe.eval_tasks:
        evals.tasks_of(recipe.eval_tasks, recipe.data)  # what is wrong with them is said now
    print("data      " + ", ".join(f"{s.name} {len(s.tokens):,} tokens" for s in splits)
          + f"; {sum(s.bytes for s in splits) / sum(len(s.tokens) for s in splits):.2f} bytes a token")
    job.memory = max(cost.peak_memory(machine.device), cost.process_memory(  # the search of --minutes may have held more
        recipe.model, job.rows, context, dtype, machine.device, cost.memory_now(),
        job.curriculum.rows > job.rows * world.size, recipe.activation_checkpointing, shards(recipe, world)))
    torch.manual_seed(recipe.seed)
    job.equip(GPT(recipe.model), begun, resume)
    inputs, _, cu_seqlens = to_device(job.loader.make(0, 0, job.rows), machine.device)
    speed = cost.measure_speed(job.model, inputs, cu_seqlens if recipe.document_mask else None,
                               repeats=3 if job.sharded else 0)  # as often in every process
    job.connect()
    job.flops = cost.flops_per_token(recipe.model, attended_length(job))
    print_plan(job, speed * world.size)
    return job


def train(recipe: Recipe, run_folder: Path, resume: bool = False, world: World | None = None,
          kind: Callable[..., Pretraining] = Pretraining) -> dict[str, float]:
    """Runs or continues a recipe in a run folder; returns held-out bits per byte of each source at the end."""
    job = set_up(recipe, world or World(), run_folder, resume, kind)
    scores = run_job(job, run_folder, resume)
    if held := cost.peak_memory(job.machine.device):
        print(f"Memory: {held / 2**20:,.0f} MiB at the peak; predicted were {job.memory / 2**20:,.0f}")
    if job.world.rank == 0 and draw_log(run_folder):
        print(f"The curves are in {run_folder}/loss.png")
    print(f'Done: {run_folder}. Read more of what it writes with: python sample.py {run_folder} --prompt "def "')
    return scores.get("val", {})


def check(recipe: Recipe, world: World) -> None:
    """`--check`: everything that a long run could fail at in its first hours, tried in a minute; leaves nothing behind."""
    Path("runs").mkdir(exist_ok=True)
    folder, troubles = Path(world.agree(tempfile.mkdtemp(prefix=".check-", dir="runs") if world.rank == 0 else None)), []

    def verdict(good: bool, what: str) -> None:
        print(f"{'ok' if good else 'FAILS':9} {what}")
        troubles.extend([] if good else [what])

    try:
        job = set_up(recipe, world, folder, False)
        job.folder = folder
        print()
        verdict(True, f"data: {sum(len(s['train'].tokens) for s in job.sources):,} tokens, whole by their sha256")
        size = 12.0 * cost.count_parameters(recipe.model)["total"]
        free, kept = shutil.disk_usage(folder).free, recipe.keep + 1 + len(job.keepers) + (
            job.steps // recipe.keep_every if recipe.keep_every else 0)
        verdict(size * kept < free, f"disk: {kept} checkpoints of {size / 2**30:.2f} GiB; {free / 2**30:.1f} GiB are free")
        room = torch.cuda.mem_get_info()[1] if job.machine.device == "cuda" else cost.host_memory()
        verdict(job.memory < room, f"memory: {job.memory / 2**30:.2f} GiB predicted a process; {room / 2**30:.1f} GiB are there")
        for step in range(2):
            cost.synchronize(job.machine.device)
            started = time.perf_counter()
            job.enter(step)
            values = job.update(step, step + 1).read()
        seconds = time.perf_counter() - started
        verdict(math.isfinite(values["loss"]), f"two steps: loss {values['loss']:.3f}, gradient norm {values['grad_norm']:.2f}, "
                f"{seconds:.2f} s a step")
        saver = Saver(job, folder)
        started = time.perf_counter()
        saver.save(2, must=True)
        saving, before = time.perf_counter() - started, [p.detach().clone() for p in job.model.parameters()]
        for p in job.model.parameters():
            p.detach().zero_()
        world.agree(None)
        load_checkpoint(folder / "checkpoints/step-00000002", job.model, job.optimizer)
        same = not broken(folder / "checkpoints/step-00000002") and all(
            bool((a == b).all()) for a, b in zip(before, job.model.parameters()))
        verdict(same, f"a save and a load: {saving:.2f} s to save, read back bit for bit")
        end = datetime.now() + timedelta(seconds=job.steps * seconds + saving * job.steps / recipe.save_every)
        print(f"{'end':9} {job.steps:,} steps would end on {end:%Y-%m-%d at %H:%M}, evaluations not counted")
        world.agree(None)  # not below: after an error the others are elsewhere
    finally:  # by whoever is left
        shutil.rmtree(folder, ignore_errors=True)
    if troubles:
        raise UserError(f"--check found what would end this run: {'; '.join(troubles)}")


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
    return recipe.learning_rate * share * math.sqrt(2 ** sum(step >= at for at in recipe.doublings()))


def attended_length(job: Pretraining) -> float:
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
    if lacking := set(base) - set(sizes):
        raise UserError(f"the base mixture needs {', '.join(sorted(lacking))}, which {data} does not have; add those folders to "
                        "--data")
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
RESUMABLE = {"micro_batch", "learning_rate", "clip", "eval_every", "eval_tokens", "eval_tasks", "save_every",
             "sample_prompt", "device", "dtype", "compile", "data", "watch_every", "keep", "keep_every", "async_save",
             "guard", "rewind_tries", "spike_margin", "log", "parallel", "activation_checkpointing", "deterministic"}


def read_flags(parser: Parser, argv: list[str], flags: dict[str, type],
               comments: dict[str, str]) -> tuple[argparse.Namespace, dict]:
    """The command line with a flag for each of `flags` besides the parser's own, and those of them that were given. Dashes
    and underscores are the same."""
    for name, kind in flags.items():
        parser.add_argument(f"--{name}", type=truth if kind is bool else kind, metavar=kind.__name__, default=None,
                            help=comments[name].replace("%", "%%"))
    words = [word.partition("=") for word in argv]
    args, unknown = parser.parse_known_args(
        [(flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag) + equals + value
         for flag, equals, value in words])
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], vars(args), 1)
        raise UserError(f"there is no flag {unknown[0]}; "
                        + (f"did you mean --{near[0]}?" if near else f"see `python {parser.prog} --help`"))
    return args, {name: value for name in flags if (value := getattr(args, name)) is not None}


def parse(argv: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """The command line, and the recipe that it names with the flags applied."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python train.py [RECIPE] [--FLAG VALUE ...]")
    parser.add_argument("recipe", nargs="?", help=", ".join(RECIPES))
    parser.add_argument("--resume", metavar="RUN", help="continue this run folder from its newest checkpoint")
    parser.add_argument("--anneal", metavar="RUN",
                        help="test --candidate: 40 %% base mixture, 60 %% of it, from this run or checkpoint")
    parser.add_argument("--candidate", metavar="SOURCE", help="the source that --anneal tests")
    parser.add_argument("--minutes", type=float, metavar="M", help="train for so long: size, batch and rate follow")
    parser.add_argument("--check", action="store_true",
                        help="try data, disk, memory, two steps, a save and a load, and say when the run would end")
    parser.add_argument("--name", metavar="NAME", help="of the run folder below runs/ (default: the recipe's)")
    parser.add_argument("--model", choices=PRESETS, metavar="PRESET", help="another architecture: " + ", ".join(PRESETS))
    args, given = read_flags(parser, argv, FLAGS, field_comments(ModelConfig, Recipe))
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
    cost.print_machine_plan(found)
    steps = max(1, round(found["tokens"] / found["batch_tokens"]))
    return replace(recipe, model=found["config"], tokens=found["tokens"], batch_tokens=found["batch_tokens"],
                   learning_rate=found["learning_rate"], warmup_steps=schedule_.suggest_warmup(steps))


def command_line(work: Callable[[World], None]) -> None:
    """Joins the other processes, if any, does the work, and ends all of them alike: a signal with exit status 75 after
    saving, an error with its message said once."""
    world = World.join()
    if world.rank:
        sys.stdout = open(os.devnull, "w")
    try:
        work(world)
    except Interrupted as stop:
        if world.rank == 0:
            print(stop, file=sys.stderr)
        sys.exit(RESUMABLE_EXIT)
    except BaseException as error:
        if not world.first_to_fail():
            time.sleep(1.0)  # until the first has said why: torchrun ends all when one ends
            os._exit(1)
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError("the GPU's memory is full; halve --micro_batch (the global batch stays the same), take "
                            "--activation_checkpointing true or a shorter --max_position_embeddings") from None
        raise
    finally:
        if not world.failing:
            world.leave()


def start(world: World) -> None:
    args, recipe = parse(sys.argv[1:])
    if args.minutes:
        recipe = fit_to_minutes(recipe, args.minutes)
    if args.check:
        return check(recipe, world)
    folder = Path(args.resume) if args.resume else world.agree(new_run_folder(args.name or args.recipe))
    train(recipe, folder, bool(args.resume), world)


def main() -> None:
    command_line(start)


if __name__ == "__main__":
    run(main)
