"""Cost: parameters, FLOPs, memory, time, money and loss, predicted before a run and measured on this machine.

Training takes about 6 FLOPs a parameter and token, 2 forward and 4 backward: C = 6ND (playbook). Attention adds
12 L H D T a token for the full square of T tokens, half for the causal half, less inside documents; a share of peak
(MFU) always says which it counts. SmolLM3: 3.08B parameters, 11.14T tokens, 221,184 H100-hours, 26 % MFU by 6ND. Its
whole bill, with ablations and restarts, is 437,760 GPU-hours.

    python cost.py plan --budget 100k                        # how large a model, how many tokens, which batch and rate
    python cost.py plan --parameters 3B --days 24 --gpus 384 --json --picture sizes.png
    python cost.py plan --minutes 5                          # what this machine should train: train.py --minutes 5
    python cost.py published                                 # predicted beside published GPU-hours; SmolLM3's bill
    python cost.py measure laptop                            # this machine's speed and memory beside the prediction
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import schedule
from model import GPT, PRESETS, ModelConfig, count_parameters, cross_entropy
from schedule import CHINCHILLA, LAPTOP_LAW
from tokenizer import Parser, UserError, add_options, check_options, draw, number, option, parse_options, run

# Dense bf16 peak in FLOP/s (data sheets, without sparsity) and GB of memory, by a part of the device's name.
GPUS = {"H200": (989.4e12, 141), "H100 PCIe": (756e12, 80), "H100": (989.4e12, 80), "H800": (989.4e12, 80),
        "A100": (312e12, 80), "B200": (2250e12, 180), "L40S": (362e12, 48), "L40": (181e12, 48), "L4": (121e12, 24),
        "A10G": (70e12, 24), "4090": (165.2e12, 24), "3090": (71e12, 24)}
USD_PER_GPU_HOUR = {"H100": (2.2, 4.0)}  # low and high; other devices: --price
# Share of the peak to plan with, lowest and highest, by 6ND, from the published runs below. Other devices: as the H100.
MFU = {"H100": (0.30, 0.26, 0.35), "A100": (0.42, 0.39, 0.51)}
OVERHEAD = 0.58  # ablations and restarts: SmolLM3's 161,280 GPU-hours on top of the main run's 276,480


# ---- FLOPs ----------------------------------------------------------------------------------------------------


def attention_flops_per_token(config: ModelConfig, length: float, counted: str = "causal") -> float:
    """FLOPs of attention's scores and weighted sums for one trained token, where `length` tokens attend to each other
    (document masks: `attended_length`). "full" counts the square, 12 L H D T (PaLM, appendix B), "causal" half of it.
    Sliding and chunked layers reach their window or chunk, MLA has the mean width of key and value, linear layers 0."""
    width = (config.head_dim + config.v_head_dim) / 2 if config.kv_lora_rank else config.head_dim
    reach = {"full": length, "sliding": min(length, config.sliding_window),
             "chunked": min(length, config.attention_chunk_size), "linear": 0}
    attended = sum(reach[config.layer_type(layer)] for layer in range(config.num_hidden_layers))
    return (12 if counted == "full" else 6) * config.num_attention_heads * width * attended


def attended_length(documents: list[float]) -> float:
    """sum(len^2) / sum(len): the sequence length at which attention costs as much a token as in these documents."""
    return sum(n * n for n in documents) / sum(documents)


def flops_per_token(config: ModelConfig, length: float, counted: str = "causal") -> float:
    """FLOPs to train one token: 6 x the matmul parameters plus attention; counted "6N", 6 x the active parameters.
    6N (Kaplan et al. 2020) drops attention, which adds 10 to 14 % at a context of 2 widths: beyond that it warns."""
    count = count_parameters(config)
    if counted == "6N":
        schedule.check_range("6ND, which leaves attention out,", length, 0, 2 * config.hidden_size, "tokens of context")
        return 6 * count["active"]
    return 6 * count["matmul"] + attention_flops_per_token(config, length, counted)


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6ND (Kaplan et al. 2020; playbook): 2 FLOPs a parameter and token forward, 4 backward."""
    return 6 * parameters * tokens


# ---- memory ---------------------------------------------------------------------------------------------------


def training_memory(config: ModelConfig, rows: int, context: int, compute_bytes: int = 2, device: str = "cuda",
                    accumulates: bool = True, recompute: bool = False, shards: int = 1) -> dict:
    """Bytes of all tensors on one device at the peak of an eager step on `rows` sequences of `context` tokens:
    "weights", "gradients" and "optimizer" (AdamW's moments) in fp32; "activations": what autograd keeps of each block,
    the weights cast to the compute dtype, and the logits with their fp32 log-softmax; "total".
    `accumulates`: gradients exist during the forward pass, those of earlier micro-batches or DDP's buckets.
    `recompute`: blocks keep only their inputs, and are computed again one at a time (Chen et al. 2016).
    `shards`: processes of FSDP, which share weights, moments and gradients (train.py synchronizes gradients after every
    micro-batch, so none stay whole) and gather the weights of one block at a time."""
    count = count_parameters(config)
    C, M, V, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    if config.num_experts:  # those that a token visits
        M = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    b, N, cast = compute_bytes, rows * context, compute_bytes < 4
    norm = 2 * b if device == "cuda" else b + 8  # bytes an element; a CPU keeps the fp32 steps of a norm
    block = 2 * C * norm + b * (2 * q + 2 * kv + 4 * M) + 4 * config.num_attention_heads  # bytes a token
    if config.qk_norm:
        block += (q + kv) * (norm - b)  # RoPE no longer keeps its input
    blocks = block + layers * C * b if recompute else layers * block
    gathered = count["embedding"] + count["non_embedding"] / (layers if recompute or shards > 1 else 1)
    kept = N * (blocks + C * norm) + (b * gathered if cast or shards > 1 else 0)
    chunk = min(512, N)  # rows of `cross_entropy` at a time
    head = V * max((b + 4) * N + 4 * chunk * cast, 4 * N + 8 * chunk)  # the loss, its gradient
    if not accumulates:  # the head's gradient comes first, while all blocks are still kept
        head = max(head, V * (b * N + (b * cast + 4) * C))
    share = 4.0 * count["total"] / shards
    peak = share + kept + head if accumulates else max(kept + head, share + 4 * V * C)
    return {"weights": share, "gradients": share, "optimizer": 2 * share, "activations": kept + head,
            "total": 3 * share + peak}


# A CPU process holds more than tensors. Measured on Linux: torch's kernels beyond those of `find_machine`, and gaps in
# the heap by bytes a number, because glibc keeps freed memory (`keep_freed_memory`).
CPU_KERNELS, CPU_HEAP = 50 * 2**20, {2: 1.6, 4: 1.45}


def process_memory(config: ModelConfig, rows: int, context: int, compute_bytes: int, device: str, before: float,
                   accumulates: bool = False, recompute: bool = False, shards: int = 1) -> float:
    """Peak bytes of a training process that holds `before` bytes without a model. On CUDA: of its tensors alone."""
    tensors = training_memory(config, rows, context, compute_bytes, device, accumulates, recompute, shards)["total"]
    return tensors if device == "cuda" else before + CPU_KERNELS + CPU_HEAP[compute_bytes] * tensors


def process_status(name: str) -> float:
    """Bytes on a line of Linux's /proc/self/status: "VmRSS" now, "VmHWM" at the peak. 0 on other systems."""
    with contextlib.suppress(OSError):
        return 1024.0 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return 0.0


def peak_memory(device: str = "cpu") -> float:
    """The most bytes that this process has held so far, on CUDA in tensors; 0 if unknown."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else process_status("VmHWM")


def memory_now() -> float:
    """Bytes that this process holds; 0 if unknown."""
    return process_status("VmRSS")


def host_memory() -> float:
    """Bytes of this machine's memory; 8 GiB if unknown."""
    with contextlib.suppress(AttributeError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8.0 * 2**30


def smallest_sharding(config: ModelConfig, gpus: int, context: int, room: float) -> tuple | None:
    """(name, `training_memory`) of the first way of train.py to fit a sequence at a time into `room` bytes: DDP, FSDP,
    then both with recomputed activations. None if nothing fits."""
    for recompute in (False, True):
        for name, shards in (("nothing sharded (DDP)", 1), ("everything sharded (FSDP)", gpus)):
            memory = training_memory(config, 1, context, recompute=recompute, shards=shards)
            if memory["total"] <= room:
                return name + ", activations recomputed" * recompute, memory
    return None


# ---- this machine ---------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """What a run computes on, and why."""

    device: str  # "cuda", "mps" or "cpu"
    dtype: torch.dtype  # of the matrix products
    compile: bool
    peak_flops: float  # FLOP/s of large matrix products: on CUDA the data sheet's in bf16, else measured in `dtype`
    reason: str  # one line for people


def synchronize(device: str) -> None:
    """Waits until the device has finished all work it was given."""
    if device != "cpu":
        getattr(torch, device).synchronize()


def matmul_flops(device: str, dtype: torch.dtype, size: int = 1024, seconds: float = 0.15) -> float:
    """FLOP/s of size^3 matrix products: the best of those that begin in this time."""
    a = torch.randn(size, size, device=device).to(dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next, so that a CPU trains 5 to 10 % faster. No effect elsewhere."""
    with contextlib.suppress(Exception):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD in malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX


@functools.cache  # one choice for a whole process: trainings that are compared must not differ in it
def choose_dtype(device: str) -> tuple:
    """(torch.bfloat16 where that is faster, else torch.float32; the reason in words)."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32, "the GPU's best"
    single, half = 1.0, 0.0
    with contextlib.suppress(RuntimeError, TypeError):  # a device without bfloat16
        for size in (128, 1024):  # where bfloat16 is emulated, a large product would take seconds
            # A busy machine slows single probes: the first warms up, both take turns, and the best of each counts.
            probes = [[matmul_flops(device, d, size, 0.02) for d in (torch.float32, torch.bfloat16)] for _ in range(5)]
            single, half = map(max, zip(*probes))
            if half < single / 10:
                break
    why = f"{half / 1e9:.0f} GFLOP/s in bfloat16, {single / 1e9:.0f} in float32"
    return torch.bfloat16 if half > 1.2 * single else torch.float32, why


def find_machine(device: str = "auto", dtype: str = "auto", compile: str = "auto") -> Machine:
    """Picks device, dtype and compilation by trying a tiny training step. UserError if nothing that was asked works."""
    candidates = [device] if device != "auto" else (
        ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"])
    notes = []
    for device in candidates:
        try:
            chosen, why = choose_dtype(device) if dtype == "auto" else (getattr(torch, dtype), "as asked")
            measure_training(ModelConfig(64, 64, 128, 1, 1, 1), Machine(device, chosen, False, 0.0, ""), 2, 32, 2, 0.0)
            break
        except Exception as error:  # a device fails in many ways; the next one is tried
            notes.append(f"{device} with {dtype} failed ({repr(error)[:80]})")
    else:
        raise UserError(f"{'; '.join(notes)}; try --device cpu --dtype float32")
    compiled = compile == "true" or compile == "auto" and device == "cuda" and sys.platform == "linux"
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN builds an attention plan for each new length
    if device != "cuda":
        keep_freed_memory()
    what = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    known = [flops for part, (flops, _) in GPUS.items() if part in what]
    peak = known[0] if known else matmul_flops(device, chosen, 8192 if device == "cuda" else 2048)
    reason = f"{what}; {str(chosen)[6:]} ({why}); compile {'on' if compiled else 'off'}"
    return Machine(device, chosen, compiled, peak, "; ".join([*notes, reason]))


def measure_speed(model: GPT, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None, seconds: float = 1.0,
                  optimizer: schedule.Optimizers | None = None, repeats: int = 0) -> float:
    """Tokens/s of training steps on tokens [B, T]: the median of the steps in this time (or of `repeats`), after one to
    warm up. Without an optimizer the weights stay as they are. Compilation that fails is switched off."""
    device, times, end = tokens.device.type, [], math.inf
    while len(times) < (repeats or 2) or not repeats and time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        try:  # the logits have no name here, so that they are freed early
            (cross_entropy(model(tokens, cu_seqlens), tokens) / tokens.numel()).backward()
        except Exception as error:  # a compiler fails in many ways; any other fault comes again without it
            if not model.compiled:
                raise
            model.compiled = False
            print(f"compile   off: it failed here ({(str(error).strip() or repr(error)).splitlines()[0][:100]})")
            model.zero_grad(set_to_none=True)
            continue
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize(device)
        times.append(time.perf_counter() - start)
        end = min(end, time.perf_counter() + seconds)
    return tokens.numel() / statistics.median(times[1:])


def measure_training(config: ModelConfig, machine: Machine, rows: int, context: int, documents: int,
                     seconds: float) -> float:
    """Tokens/s of full training steps of a new model on `rows` sequences of equal documents (0: no mask)."""
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).to(machine.device)
        tokens = torch.randint(config.vocab_size, (rows, context)).to(machine.device)
    model.compute_dtype = machine.dtype
    if machine.compile:
        model.compile_blocks()
    starts = torch.linspace(0, rows * context, rows * documents + 1).round().int().to(machine.device)
    optimizer = schedule.build_optimizer(model, 1e-4, dtype=machine.dtype)
    return measure_speed(model, tokens, starts if documents else None, seconds, optimizer)


# ---- what a recipe needs of this machine ----------------------------------------------------------------------


def choose_machine(recipe) -> Machine:
    """The device of a train.Recipe, and what is set once for a whole process."""
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    machine = find_machine(recipe.device, recipe.dtype, recipe.compile)
    if machine.device == "cuda":  # TensorFloat-32 for what is left in fp32, unless fp32 was asked for
        torch.set_float32_matmul_precision("highest" if recipe.dtype == "float32" else "high")
    return machine


def settle(recipe, machine: Machine, processes: int, context: int):
    """The recipe with what its "auto"s became, so that a resumed run computes as it began: FSDP where a process cannot
    hold the training of one sequence of the longest context."""
    recipe = replace(recipe, device=machine.device, compile=str(machine.compile).lower(),
                     dtype=str(machine.dtype).removeprefix("torch."))
    if recipe.parallel == "auto":
        room = torch.cuda.get_device_properties(0).total_memory if machine.device == "cuda" else math.inf
        needs = training_memory(recipe.model, 1, context, machine.dtype.itemsize, machine.device,
                                recompute=recipe.activation_checkpointing)["total"]
        recipe = replace(recipe, parallel="fsdp" if processes > 1 and needs > 0.9 * room else "ddp")
    return recipe


def shards(recipe, processes: int) -> int:
    """Into how many parts weights, gradients and moments are divided."""
    return processes if recipe.parallel == "fsdp" else 1


def fits(recipe, rows: int, context: int, processes: int, device: str) -> bool:
    """Whether a process can compute so many sequences at once: in 60 % of the GPU's memory, weights included; on a CPU,
    with 1 GiB of activations, past which a batch is no faster."""
    memory = training_memory(recipe.model, rows, context, 4 if recipe.dtype == "float32" else 2, device,
                             recompute=recipe.activation_checkpointing, shards=shards(recipe, processes))
    if device == "cuda":
        return memory["total"] <= 0.6 * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    return memory["activations"] <= 2**30


def stage_rows(recipe, processes: int, device: str) -> list[int]:
    """Sequences of a micro-batch in each stage, such that processes x accumulation steps make the stage's batch.
    UserError, with the nearest batch that does, where it does not divide."""
    found, base = [], recipe.model.max_position_embeddings
    for stage in recipe.stages:
        context, batch = stage.context or base, stage.batch_tokens or recipe.batch_tokens
        if batch % (unit := context * processes):
            if not stage.batch_tokens:  # a batch that suits every stage that shares it
                unit = processes * math.lcm(*(s.context or base for s in recipe.stages if not s.batch_tokens))
            nearest = " or ".join(str(n) for n in (batch // unit * unit, -(-batch // unit) * unit) if n)
            own = f"batch_tokens of stage {stage.name} in the recipe" if stage.batch_tokens else "--batch_tokens"
            raise UserError(f"stage {stage.name}: a batch of {batch} tokens does not divide into sequences of "
                            f"{context} tokens on {processes} process(es); give {own} {nearest}")
        rows = batch // unit
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        if recipe.micro_batch and context == base:  # --micro_batch is for the model's own context
            if recipe.micro_batch not in divisors:
                nearest = sorted(sorted(divisors, key=lambda n: abs(n - recipe.micro_batch))[:2])
                raise UserError(f"--micro_batch {recipe.micro_batch} does not divide the {rows} sequences of a "
                                f"process; the nearest that do are {' and '.join(map(str, nearest))}")
            found.append(recipe.micro_batch)
        else:
            found.append(max((n for n in divisors if fits(recipe, n, context, processes, device)), default=1))
    return found


def check_memory(recipe, machine: Machine, processes: int, rows: list[int], curriculum) -> float:
    """Bytes that a process needs in the stage that needs most; UserError where this machine does not have them."""
    need = max(process_memory(
        recipe.model, n, context, machine.dtype.itemsize, machine.device, memory_now(),
        batch // context > n * processes, recipe.activation_checkpointing, shards(recipe, processes))
        for n, context, batch in zip(rows, curriculum.contexts, curriculum.batches))
    room = torch.cuda.mem_get_info()[1] if machine.device == "cuda" else host_memory()
    if need > room:
        raise UserError(f"a process needs {need / 2**30:.2f} GiB of memory and {room / 2**30:.2f} are there; take "
                        "--activation_checkpointing true, --parallel fsdp on more processes, or a smaller model")
    return need


# ---- the plan -------------------------------------------------------------------------------------------------

SMALLEST, LARGEST = 1.4e5, 3e12  # parameters of the family
COUNTED = ("6N", "causal", "full")  # the ways of counting FLOPs


@dataclass(frozen=True)
class PlanOptions:
    """Plans what to train: give one or two limits (0: not given), the rest follows."""

    parameters: float = option(0.0, "of the model, such as 3B", 0)
    tokens: float = option(0.0, "of training, such as 60B", 0)
    budget: float = option(0.0, "USD for everything, overhead included, at the higher price", 0)
    gpu_hours: float = option(0.0, "of the main run", 0)
    days: float = option(0.0, "of the main run; with --budget or --gpu-hours they decide the number of GPUs", 0)
    minutes: float = option(0.0, "of training on this machine, instead of all other limits", 0)
    gpus: int = option(0, "rented; 0: 8, or what --days decides", 0)
    device: str = option("H100", "rented: " + ", ".join(GPUS), choices=GPUS)
    price: float = option(0.0, "USD of a GPU-hour; 0: an H100's range", 0)
    mfu: float = option(0.0, "share of the bf16 peak by 6ND; 0: 0.42 on an A100, else an H100's 0.30", 0, 1)
    overhead: float = option(OVERHEAD, "ablations and restarts, as a share of the main run", 0)
    context: int = option(4096, "tokens", 1)
    vocab_size: int = option(0, "0: 128,256 from 1B parameters on, 49,152 from 50M on, else 8,192", 0)


def derive(o: PlanOptions, flops_per_hour: float, price: float) -> tuple:
    """(parameters, tokens, GPU-hours (0: no limit), GPUs) from the limits, compute-optimal in what they leave free."""
    limits = [hours for hours in (o.gpu_hours, o.budget / price / (1 + o.overhead), o.days * 24 * o.gpus) if hours]
    hours = limits[0] if limits else o.days * 24 * 8
    gpus = o.gpus or (math.ceil(hours / 24 / o.days) if o.days else 8)
    parameters, tokens, compute = o.parameters, o.tokens, hours * flops_per_hour
    if len(limits) > 1 or not 1 <= bool(parameters) + bool(tokens) + bool(hours) <= 2:
        raise UserError("give one or two of --parameters, --tokens, and --budget, --gpu-hours or --days with --gpus")
    if hours:
        parameters = parameters or (compute / 6 / tokens if tokens else CHINCHILLA.optimum(compute)[0])
        tokens = compute / 6 / parameters
    parameters = parameters or CHINCHILLA.parameters_for(tokens)
    tokens = tokens or CHINCHILLA.tokens_for(parameters)
    if not SMALLEST <= parameters <= LARGEST or tokens < parameters:
        size = min(LARGEST, max(SMALLEST, CHINCHILLA.optimum(training_flops(parameters, tokens))[0]))
        raise UserError(f"no plan has {say_number(parameters)} parameters and {say_number(tokens)} tokens; the nearest "
                        f"possible is {say_number(size)} and {say_number(CHINCHILLA.tokens_for(size))}")
    return parameters, tokens, hours, gpus


def family(parameters: float, vocab_size: int, context: int) -> ModelConfig:
    """The Llama-shaped model nearest to a size: MLPs of 3 widths, heads of 64 (128 from a width of 2048 on), 2 or 4
    query heads a KV head, tied embeddings, a width near 64 times the depth. For the laptop's size the laptop preset."""
    best = (math.inf,)
    for width in (16, 32, 48, 64, 96, *range(128, 2048, 128), *range(2048, 32769, 512)):
        heads = max(1, width // (128 if width >= 2048 else 64))
        groups = heads // math.gcd(heads, 4)
        rest, block = vocab_size * width + width, width * width * (11 + 2 * groups / heads) + 2 * width
        layers = max(2, min(256, round((parameters - rest) / block)))
        score = 10 * abs(math.log((rest + layers * block) / parameters)) + abs(math.log(width / layers / 64))
        best = min(best, (score, width, layers, heads, groups))
    _, width, layers, heads, groups = best
    return ModelConfig(vocab_size, width, 3 * width, layers, heads, groups, max_position_embeddings=context,
                       rope_theta=1e4 if context <= 2048 else 5e4,
                       initializer_range=0.05 * math.sqrt(128 / width) if width < 512 else 0.02)


def say_number(x: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def say_amount(x: float) -> str:
    """221184 -> 221,184; 0.12345 -> 0.123."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def round_batch(tokens: float, unit: int) -> int:
    """The batch nearest to `tokens` that is a power of two of `unit`, a sequence or one on every GPU."""
    return unit * 2 ** round(math.log2(max(tokens, unit) / unit))


def choose_batch(config: ModelConfig, blocks: int, tokens: float, context: int, gpus: int) -> dict:
    """Batch and rate by DeepSeek's and Step Law's laws for `blocks` parameters without embeddings."""
    fitted = (6 * blocks + attention_flops_per_token(config, context, "full")) * tokens
    wanted = schedule.deepseek_batch(fitted)
    batch = round_batch(min(wanted, tokens / 100), context * gpus)  # 100 steps or so, and a sequence on every GPU
    if batch > 2 * wanted:
        warnings.warn(f"{gpus:,} GPUs make the batch {batch / wanted:.2g} times what the law says: take fewer --gpus")
    steps, rate = max(1, round(tokens / batch)), schedule.deepseek_rate(fitted) * min(1.0, math.sqrt(batch / wanted))
    law = {"batch_tokens": schedule.step_law_batch(tokens), "learning_rate": schedule.step_law_rate(blocks, tokens)}
    return {"batch_tokens": batch, "learning_rate": rate, "steps": steps, "step_law": law,
            "warmup_steps": schedule.suggest_warmup(steps), "weight_decay": schedule.suggest_weight_decay(rate, steps)}


def plan_rented(o: PlanOptions, preset: ModelConfig | None) -> dict:
    """All that follows from the limits. The tokens adapt to the exact size of the config so that the compute stays."""
    (peak, memory), prices = GPUS[o.device], (o.price, o.price) if o.price else USD_PER_GPU_HOUR.get(o.device)
    if not prices:
        raise UserError(f"the price of a {o.device} is not known here; give --price in USD an hour")
    mfu = (o.mfu,) * 3 if o.mfu else MFU.get(o.device, MFU["H100"])
    parameters, tokens, limit, gpus = derive(o, 3600 * peak * mfu[0], prices[1])
    vocab_size = o.vocab_size or (128_256 if parameters >= 1e9 else 49_152 if parameters >= 5e7 else 8192)
    config = preset or family(parameters, vocab_size, o.context)
    count = count_parameters(config)
    active = count["active"]
    if config.num_experts:
        warnings.warn("predicted loss assumes a dense model of the same active size")
    if limit or not o.tokens:
        tokens *= parameters / active
    room = 0.9e9 * memory  # 10 % is for the CUDA context, communication and gaps in the allocator's memory
    fit = smallest_sharding(config, gpus, o.context, room)
    if not fit:
        raise UserError(f"{count['total']:,} parameters do not fit on {gpus} {o.device}(s): take more than --gpus "
                        f"{16 * count['total'] / room:.0f}, or a shorter --context")
    flops = training_flops(active, tokens)
    hours, least, most = (flops / 3600 / peak / share for share in (mfu[0], mfu[2], mfu[1]))
    bill, spent = hours * (1 + o.overhead), [flops / 2**i for i in range(4)]
    fixed = [active] * 4 if o.parameters or o.tokens else [CHINCHILLA.optimum(compute)[0] for compute in spent]
    return choose_batch(config, active - count["embedding"], tokens, o.context, gpus) | {
        "config": config, "parameters": count["total"], "active": active, "non_embedding": count["non_embedding"],
        "tokens": tokens, "tokens_per_parameter": tokens / active, "flops": flops,
        "flops_per_token": {how: flops_per_token(config, o.context, how) for how in COUNTED},
        "loss": CHINCHILLA.loss(active, tokens), "law": CHINCHILLA.source, "optimum": CHINCHILLA.optimum(flops),
        "device": o.device, "gpus": gpus, "context": o.context, "sharding": fit[0], "memory_per_gpu": fit[1],
        "mfu": mfu, "gpu_hours": hours, "gpu_hours_range": (least, most), "days": hours / gpus / 24,
        "overhead": o.overhead, "gpu_hours_with_overhead": bill,
        "usd": [hours * price for price in prices], "usd_with_overhead": [bill * price for price in prices],
        "sizes": [CHINCHILLA.predict(active * 2 ** (i / 5), tokens / 2 ** (i / 5)) for i in range(-15, 16)],
        "halvings": [CHINCHILLA.predict(size, compute / 6 / size) for size, compute in zip(fixed, spent)]}


def print_rows(title: str, labels: Iterable, rows: list[dict]) -> None:
    """A table of `LossLaw.predict`, one label a row; the losses are compared with the first."""
    print(f"\n{title:>8}{'parameters':>13}{'tokens':>10}{'loss':>8}{'worse by':>10}")
    for label, row in zip(labels, rows):
        print(f"{label:8,.4g}{say_number(row['parameters']):>13}{say_number(row['tokens']):>10}{row['loss']:8.3f}"
              f"{row['loss'] - rows[0]['loss']:10.3f}{'' if row['fitted'] else '  outside the range of the law'}")


def print_plan(p: dict) -> None:
    """A plan of `plan_rented` for people."""
    c, each, law, gpu = p["config"], p["flops_per_token"], p["step_law"], p["device"]
    (planned, low, high), (less, more) = p["mfu"], p["gpu_hours_range"]
    memory = ", ".join(f"{part} {size / 2**30:.2f} GiB" for part, size in p["memory_per_gpu"].items())
    cheap, dear, least, most = map(say_amount, p["usd"] + p["usd_with_overhead"])
    print(f"""\
model        {p['parameters']:,} parameters ({p['non_embedding']:,} without embeddings), vocabulary {c.vocab_size:,}
             {c.num_hidden_layers} layers of width {c.hidden_size}, MLP {c.intermediate_size}
             {c.num_attention_heads} query and {c.num_key_value_heads} KV heads of {c.head_dim}
tokens       {say_number(p['tokens'])}, {p['tokens_per_parameter']:,.3g} a parameter
             optimum of this compute: {' parameters on '.join(map(say_number, p['optimum']))} tokens
FLOPs        6ND = {p['flops']:.3g}
             a token {each['6N']:.4g} (6N), {each['causal']:.4g} (causal), {each['full']:.4g} (full)
batch        {p['batch_tokens']:,} tokens (Step Law: {law['batch_tokens']:,.0f}), {p['steps']:,} steps
rate         {p['learning_rate']:.2g} at its peak (Step Law: {law['learning_rate']:.2g})
             {p['warmup_steps']:,} steps of warmup, weight decay {p['weight_decay']:g}
memory       {p['sharding']} on {p['gpus']:,} {gpu}(s), a sequence of {p['context']:,} tokens at a time
             {memory}
time         {say_amount(p['gpu_hours'])} {gpu}-hours at {planned:.0%} of peak by 6ND = {p['days']:,.3g} days
             {say_amount(less)} at {high:.0%}, {say_amount(more)} at {low:.0%}
whole bill   {say_amount(p['gpu_hours_with_overhead'])} {gpu}-hours, {p['overhead']:.0%} more for ablations and restarts
             (evaluations, 4 % of SmolLM3's main run, not counted)
money        {cheap} to {dear} USD the run, {least} to {most} USD the whole bill
loss         {p['loss']:.3f} nats a token ({p['law']})""")
    print_rows("budget", (1, 1 / 2, 1 / 4, 1 / 8), p["halvings"])


def draw_sizes(plan: dict, path: str) -> None:
    """Loss against size at the plan's compute or time; a star is the plan."""
    def paint(axes) -> None:
        axes.plot([row["parameters"] for row in plan["sizes"]], [row["loss"] for row in plan["sizes"]])
        axes.plot(plan.get("active", plan["parameters"]), plan["loss"], "r*", ms=12)
        axes.set(xscale="log", xlabel="parameters", ylabel="predicted loss", title=plan["law"])

    draw(path, paint)


def plan_machine(machine: Machine, minutes: float, vocab_size: int = 8192) -> dict:
    """What this machine should train: the size of the family with the lowest loss by LAPTOP_LAW for the tokens that it
    is measured to read in so many minutes. Batch and rate are the laptop recipe's, scaled with DeepSeek's exponents."""
    context, sizes = PRESETS["laptop"].max_position_embeddings, []
    room = torch.cuda.mem_get_info()[0] if machine.device == "cuda" else host_memory()
    for i in range(24):
        config = family(vocab_size * 24 * 1.6**i, vocab_size, context)
        if training_memory(config, 16, context, machine.dtype.itemsize, machine.device)["total"] > 0.5 * room:
            break
        speed = measure_training(config, replace(machine, compile=False), 16, context, 2, 0.5)
        sizes.append(LAPTOP_LAW.predict(count_parameters(config)["active"], speed * 60 * minutes)
                     | {"config": config, "tokens_per_second": speed})
        best = min(sizes, key=lambda size: size["loss"])
        if sizes[-1]["loss"] > best["loss"] + 0.1:
            break  # past the optimum, where every larger size is slower and worse
    if not sizes:
        raise UserError(f"no model with a vocabulary of {vocab_size:,} fits here; take a smaller --vocab-size")
    growth = best["parameters"] * best["tokens"] / (1_836_160 * 2.7e6)  # of the compute, from the laptop recipe's
    batch = round_batch(2048 * growth**0.3271, context)
    LAPTOP_LAW.loss(best["parameters"], best["tokens"])  # warns outside its range
    rate = 3e-3 * growth**-0.1250 * math.sqrt(batch / 2048 / growth**0.3271)
    return best | {"batch_tokens": batch, "learning_rate": rate, "law": LAPTOP_LAW.source, "minutes": minutes,
                   "machine": machine.reason, "sizes": sizes}


def print_machine_plan(p: dict) -> None:
    """A plan of `plan_machine` for people."""
    c = p["config"]
    print(f"""\
machine      {p['machine']}
model        {p['parameters']:,} parameters: {c.num_hidden_layers} layers of width {c.hidden_size}
             vocabulary {c.vocab_size:,}, context {c.max_position_embeddings}
tokens       {p['tokens']:,.0f} in {p['minutes']:g} minutes at {p['tokens_per_second']:,.0f} tokens/s (measured now)
batch        {p['batch_tokens']:,} tokens, rate {p['learning_rate']:.2g} (the laptop recipe's, scaled)
loss         {p['loss']:.3f} bits per byte of held-out prose and code ({p['law']})
train it     python train.py --minutes {p['minutes']:g}""")
    print_rows("tokens/s", (size["tokens_per_second"] for size in p["sizes"]), p["sizes"])


# ---- published runs -------------------------------------------------------------------------------------------
# Active parameters, tokens, GPU, GPU-hours, layers x width of all query heads (DeepSeek: mean of key, value), context,
# remark. Sources: model cards of Llama, TinyLlama's README, SmolLM3's post (384 GPUs, 24 days), DeepSeek-V3's report.
PUBLISHED = {
    "Llama-2 7B": (6.738e9, 2e12, "A100", 184_320, 32 * 4096, 4096, ""),
    "Llama-2 70B": (68.98e9, 2e12, "A100", 1_720_320, 80 * 8192, 4096, ""),
    "Llama-3.1 8B": (8.030e9, 15e12, "H100", 1.46e6, 32 * 4096, 8192, "an outlier, its cause unpublished"),
    "Llama-3.1 405B": (405.85e9, 15.6e12, "H100", 30.84e6, 126 * 16384, 8192, "large matrices reach more"),
    "SmolLM3 3B": (3.075e9, 11.14e12, "H100", 221_184, 36 * 2048, 4096, "small matrices, 384 GPUs"),
    "TinyLlama 1.1B": (1.100e9, 300e9, "A100", 3456, 22 * 2048, 2048, "16 GPUs: little communication"),
    "DeepSeek-V3": (37e9, 14.8e12, "H800", 2.664e6, 61 * 128 * 160, 4096, "products in FP8: 17 % of that peak")}
# SmolLM3's GPU-hours (playbook): the main run is booked with 30 days, of which it trained 24.
SMOLLM3_BILL = {
    "main run, 384 GPUs x 30 days": 384 * 30 * 24, "pretraining ablations, 192 x 15": 192 * 15 * 24,
    "mid-training ablations, 192 x 10": 192 * 10 * 24, "restarts, 384 x 3 + 192 x 4": (384 * 3 + 192 * 4) * 24}


def published() -> dict:
    """The share of peak that each run reached, by name and way of counting FLOPs."""
    return {name: {how: (6 * active + attention * heads * context) * tokens / (hours * 3600 * GPUS[device][0])
                   for how, attention in zip(COUNTED, (0, 6, 12))}
            for name, (active, tokens, device, hours, heads, context, _) in PUBLISHED.items()}


def print_published() -> None:
    """Shows the share of peak that published runs reached, a plan's GPU-hours over theirs, and SmolLM3's bill."""
    print(f"{'':16}{'GPU':>6}{'GPU-hours':>12}{'6N':>8}{'causal':>8}{'full':>8}{'planned':>9}  planned / true hours")
    for name, shares in published().items():
        _, _, device, hours, *_, remark = PUBLISHED[name]
        planned = MFU.get(device, MFU["H100"])[0]
        print(f"{name:16}{device:>6}{hours:12,.0f}" + "".join(f"{share:8.1%}" for share in shares.values())
              + f"{planned:9.0%}{shares['6N'] / planned:8.2f}  {remark}")
    print("""
6N counts 6 FLOPs a parameter and token; full and causal add attention's squares or their lower halves. The planned
share is the middle of what such runs reached by 6N: the last column is their spread, at most 21 % without the outlier.
""")
    for name, hours in SMOLLM3_BILL.items():
        print(f"{name:44}{hours:10,} H100-hours")
    total, main_run = sum(SMOLLM3_BILL.values()), SMOLLM3_BILL["main run, 384 GPUs x 30 days"]
    low, high = (total * price / 1e6 for price in USD_PER_GPU_HOUR["H100"])
    print(f"{'SmolLM3, the whole bill':44}{total:10,} H100-hours = {low:.2f} to {high:.2f} million USD; "
          f"{total / main_run - 1:.0%} on top of the main run")


# ---- command line ---------------------------------------------------------------------------------------------


def positive(text: str) -> float:
    """A number greater than 0 on the command line, such as 0.5 or 2M."""
    if not 0 < (value := number(text)) < 1e30:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0 and less than 1e30")
    return value


def positive_integer(text: str) -> int:
    """A whole number greater than 0 on the command line, such as 100k."""
    if (value := positive(text)) % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(value)


@dataclass(frozen=True)
class MeasureOptions:
    """Measures this machine's training speed and memory."""

    rows: int = option(16, "sequences at a time", 1)
    context: int = option(0, "tokens; 0: the preset's, at most 4096", 0)
    documents: int = option(1, "equal documents a sequence; 0: no document mask", 0)
    seconds: float = option(10.0, "of measuring")
    device: str = option("auto", "auto, cuda, mps or cpu")
    dtype: str = option("auto", "auto, bfloat16 or float32")
    compile: str = option("auto", "auto, true or false")


def measure(o: MeasureOptions, config: ModelConfig) -> None:
    """Prints this machine's training speed, share of peak and memory, beside the prediction."""
    context = o.context or min(config.max_position_embeddings, 4096)
    machine, before = find_machine(o.device, o.dtype, o.compile), memory_now()
    speed = measure_training(config, machine, o.rows, context, o.documents, o.seconds)
    print(f"""\
machine      {machine.reason}; torch {torch.__version__}; {machine.peak_flops / 1e9:,.0f} GFLOP/s
speed        {speed:,.0f} tokens/s at {o.rows} sequences of {context} tokens, documents: {o.documents or 'no mask'}""")
    for counted in COUNTED:
        share = speed * flops_per_token(config, context / max(1, o.documents), counted) / machine.peak_flops
        print(f"share        {share:6.1%} of peak, counting {counted}")
    predicted = process_memory(config, o.rows, context, machine.dtype.itemsize, machine.device, before)
    if held := peak_memory(machine.device):
        print(f"memory       predicted {predicted / 2**20:,.0f} MiB, measured {held / 2**20:,.0f}: "
              f"{predicted / held - 1:+.0%}")


def plan(o: PlanOptions, preset: ModelConfig | None, as_json: bool, picture: str | None) -> None:
    """Makes, prints and draws a plan."""
    if o.minutes and (preset or o != PlanOptions(minutes=o.minutes, vocab_size=o.vocab_size)):
        raise UserError("--minutes plans for this machine: beside it give --vocab-size, --json and --picture alone")
    if preset and o.parameters:
        raise UserError("a preset has its own size; leave it or --parameters out")
    if preset:
        o = replace(o, parameters=count_parameters(preset)["active"])
    if picture and not (picture.endswith((".png", ".pdf", ".svg")) and draw(picture, lambda axes: None)):
        raise UserError("--picture takes a name such as curve.png and needs matplotlib: pip install matplotlib")
    found = plan_machine(find_machine(), o.minutes, o.vocab_size or 8192) if o.minutes else plan_rented(o, preset)
    if picture:
        draw_sizes(found, picture)
    if as_json:
        print(json.dumps(found, indent=1, default=asdict))
    else:
        (print_machine_plan if o.minutes else print_plan)(found)


def main() -> None:
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("published", help=print_published.__doc__)
    kinds = {"plan": PlanOptions, "measure": MeasureOptions}
    for name, kind in kinds.items():
        p = commands.add_parser(name, help=kind.__doc__)
        p.add_argument("preset", nargs="?", help=", ".join(PRESETS))
        add_options(p, kind)
        if name == "plan":
            p.add_argument("--json", action="store_true", help="print the plan as JSON")
            p.add_argument("--picture", metavar="FILE", help="draw loss against size")
    args = parse_options(parser, sys.argv[1:])
    if args.command == "published":
        return print_published()
    if args.preset and args.preset not in PRESETS:
        raise UserError(f"there is no preset {args.preset}; take one of {', '.join(PRESETS)}")
    kind, preset = kinds[args.command], PRESETS.get(args.preset)
    options = kind(**{f.name: value for f in fields(kind) if (value := getattr(args, f.name)) is not None})
    check_options(options)
    if args.command == "plan":
        plan(options, preset, args.json, args.picture)
    else:
        measure(options, preset or PRESETS["laptop"])


if __name__ == "__main__":
    run(main)
