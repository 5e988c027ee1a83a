"""Cost: parameters, FLOPs, memory, time, money and loss, predicted before a run and measured on this machine.

Training a token takes about 6 FLOPs a parameter, 2 forward and 4 backward, so a run costs C = 6ND (playbook). That
leaves out attention's scores, 12 L H D T more for a full square of T tokens, half of that if only the causal half
counts, and in proportion to the documents' squared lengths if attention stays inside them. Shares of peak (MFU)
always say which was counted. SmolLM3: 3.08B parameters, 11.14T tokens, 221,184 H100-hours, 26 % MFU by 6ND; the
playbook's whole bill, with ablations and restarts, is 437,760: 58 % on top of the main run.

    python cost.py plan --budget 100000                            # how big, how long, which batch and rate
    python cost.py plan --parameters 3e9 --days 24 --gpus 384 --json --picture sizes.png
    python cost.py plan --minutes 5                                # what this machine should train: train.py --minutes 5
    python cost.py published                                       # predicted against published GPU-hours
    python cost.py measure [laptop]                                # this machine's speed and memory, beside the prediction
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import schedule
from model import GPT, PRESETS, ModelConfig, count_parameters, cross_entropy
from schedule import CHINCHILLA, HOFFMANN, LAPTOP_LAW, Extrapolation, LossLaw, overtrain
from tokenizer import Parser, UserError, run

# Dense bf16 peak in FLOP/s by a part of the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "H800": 989.4e12, "A100": 312e12, "B200": 2250e12,
              "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "4090": 165.2e12, "3090": 71e12}
MEMORY_GB = {"H200": 141, "H100 PCIe": 80, "H100": 80, "H800": 80, "A100": 80, "B200": 180, "L40S": 48, "L40": 48, "L4": 24,
             "A10G": 24, "4090": 24, "3090": 24}
USD_PER_GPU_HOUR = {"H100": (2.2, 4.0)}  # as the brief calibrates it; of other devices with --price
# The share of peak to plan with and its range, by 6ND, from the published runs below. Other devices: as the H100.
MFU = {"H100": (0.30, 0.26, 0.35), "A100": (0.42, 0.39, 0.51)}
# Ablations and restarts on top of the main run: SmolLM3's 161,280 / 276,480 GPU-hours. Its evaluations, slightly under 10,000
# more (4 %), are not in the playbook's bill.
OVERHEAD = 0.58


# ---- FLOPs ----------------------------------------------------------------------------------------------------


def attention_flops_per_token(config: ModelConfig, length: float, counted: str = "causal") -> float:
    """FLOPs of the scores and the weighted sums for one trained token, forward and backward.

    `length`: how long the attended sequence is, the context or, with document masks, `attended_length`. "full" counts
    the square, 12 L H D T (PaLM, appendix B); "causal" half of it. A sliding or chunked layer counts its window or chunk
    where that is shorter, MLA the mean width of key and value; linear layers, whose cost does not grow, are left out.
    """
    width, full = config.head_dim, 0.0
    if config.kv_lora_rank:
        width = (config.head_dim + config.v_head_dim) / 2
    reach = {"full": length, "sliding": min(length, config.sliding_window),
             "chunked": min(length, config.attention_chunk_size), "linear": 0}
    for layer in range(config.num_hidden_layers):
        full += 12 * config.num_attention_heads * width * reach[config.layer_type(layer)]
    return full if counted == "full" else full / 2


def attended_length(documents: list[float]) -> float:
    """sum(len^2) / sum(len): the length whose square, token for token, costs what these packed documents' do."""
    return sum(n * n for n in documents) / sum(documents)


def flops_per_token(config: ModelConfig, length: float, counted: str = "causal") -> float:
    """FLOPs to train one token: 6 x the matmul parameters, plus attention; counted "6N" is 6 x all parameters.

    6N (Kaplan et al. 2020) drops attention: at a context of 2 widths the causal half adds 10 to 14 % (SmolLM3, Llama 2 7B).
    """
    count = count_parameters(config)
    if counted == "6N":
        if length > 2 * config.hidden_size:
            warnings.warn(f"6ND leaves attention out, which is not small at {length:,.0f} tokens of context, more than 2 widths",
                          Extrapolation)
        return 6 * count["active"]
    return 6 * count["matmul"] + attention_flops_per_token(config, length, counted)


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6ND (Kaplan et al. 2020; playbook): 2 FLOPs a parameter and token forward, 4 backward."""
    return 6 * parameters * tokens


# ---- memory ---------------------------------------------------------------------------------------------------


def training_memory(config: ModelConfig, rows: int, context: int, compute_bytes: int = 2, device: str = "cuda",
                    accumulates: bool = True, recompute: bool = False, shards: int = 1) -> dict[str, float]:
    """Bytes of all tensors on one device at the peak of an eager step on `rows` sequences.

    Weights, gradients and AdamW's two moments are fp32. Activations: what autograd keeps of each block for the
    backward pass, the weights cast to the compute dtype, and the logits with the fp32 log-softmax of their loss, which
    in small models outweighs all else. `accumulates`: the gradients of earlier micro-batches are there at the peak.
    `recompute`: blocks keep their inputs alone, and one at a time is computed again (Chen et al. 2016). `shards`: FSDP's
    processes, which share weights, gradients and moments and gather one block's weights at a time.
    """
    count = count_parameters(config)
    parameters = count["total"]
    C, M, V = config.hidden_size, config.intermediate_size, config.vocab_size
    if config.num_experts:  # what a token goes through
        M = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    b, tokens, cast = compute_bytes, rows * context, compute_bytes < 4
    normed = (2 if device == "cuda" else 1) * b + (0 if device == "cuda" else 8)  # a CPU keeps norms' fp32 steps
    norms = 2 * C * normed + ((q + kv) * (normed - b) if config.qk_norm else 0)  # RoPE keeps its own result instead
    block = norms + b * (2 * q + 2 * kv + 4 * M) + 4 * config.num_attention_heads
    blocks = block + config.num_hidden_layers * C * b if recompute else config.num_hidden_layers * block
    at_once = recompute or shards > 1
    whole = count["embedding"] + count["non_embedding"] / config.num_hidden_layers if at_once else parameters
    kept = tokens * (blocks + C * normed) + (b * whole if cast or shards > 1 else 0)
    chunk = min(512, tokens)  # rows of `cross_entropy` at a time
    head = V * max((b + 4) * tokens + (4 * chunk if cast else 0), 4 * tokens + 8 * chunk)  # of loss, of its gradient
    share = parameters / shards
    gradients = 4.0 * share
    first = V * (b * tokens + (b * cast + 4) * C)  # the head's gradient comes first, while the blocks keep all
    activations = float(kept + max(head, first if not accumulates else 0))
    peak = gradients + activations if accumulates else max(activations, gradients + 4 * V * C)
    return {"weights": 4.0 * share, "gradients": gradients, "optimizer": 8.0 * share,
            "activations": activations, "total": 12.0 * share + peak}


# A CPU process holds more than tensors: measured on Linux, torch's kernels beyond `find_machine`'s, and the holes of glibc's
# heap, which keeps what is freed (`keep_freed_memory`; without it 1.0 and a slower step), in bf16 and in fp32.
CPU_KERNELS, CPU_HEAP = 50 * 2**20, {2: 1.6, 4: 1.45}


def process_memory(config: ModelConfig, rows: int, context: int, compute_bytes: int, device: str, before: float,
                   accumulates: bool = False, recompute: bool = False, shards: int = 1) -> float:
    """Peak bytes of the training process: `before` it has a model, plus what training takes (CUDA: tensors alone)."""
    tensors = training_memory(config, rows, context, compute_bytes, device, accumulates, recompute, shards)["total"]
    return tensors if device == "cuda" else before + CPU_KERNELS + CPU_HEAP[compute_bytes] * tensors


def peak_memory(device: str = "cpu") -> float:
    """Bytes: the most this process has held so far (CUDA: the most that tensors held); 0 where that is not told."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, StopIteration):  # Linux; getrusage would begin at what the parent process held
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def memory_now() -> float:
    """Bytes this process holds; where only the peak is known, that."""
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory()


SHARDING = {  # what is divided by the number of GPUs: weights, gradients, optimizer
    "nothing sharded (DDP)": (False, False, False), "optimizer sharded (ZeRO-1)": (False, False, True),
    "gradients too (ZeRO-2)": (False, True, True), "weights too (ZeRO-3, FSDP)": (True, True, True)}


def smallest_sharding(config: ModelConfig, gpus: int, context: int, room: float) -> tuple[str, dict[str, float]] | None:
    """The first of SHARDING, each also with recomputed activations last of all, with which one sequence at a time fits
    into `room` bytes; its name and bytes a GPU by part. None: none does."""
    for again in (False, True):
        memory = training_memory(config, 1, context, recompute=again)
        cast = 2 * memory["weights"] / 4 * (1 - 1 / config.num_hidden_layers)  # all blocks' weights in bf16 but one's
        for name, divided in SHARDING.items():
            parts = {part: memory[part] / (gpus if shared else 1)
                     for part, shared in zip(("weights", "gradients", "optimizer"), divided)}
            gathered = divided[0] and gpus > 1  # only one block's weights are whole at a time, as recomputing has it anyway
            parts["activations"] = memory["activations"] - (cast if gathered and not again else 0)
            if sum(parts.values()) <= room:
                return name + (", activations recomputed" if again else ""), parts | {"total": sum(parts.values())}
    return None


# ---- the model family -----------------------------------------------------------------------------------------


def family(parameters: float, vocab_size: int, context: int) -> ModelConfig:
    """The Llama-shaped model nearest to a size: MLP 3 times the width, heads of 64 (128 from a width of 2048 on), 2 to
    8 query heads a KV head, tied embeddings; of sizes equally near the one whose width is nearest to 64 times its
    depth. At the laptop's size and vocabulary it is the preset `laptop`."""
    best = None
    for width in [*range(16, 128, 16), *range(128, 1024, 64), *range(1024, 4096, 128), *range(4096, 32769, 512)]:
        heads = max(1, round(width / (128 if width >= 2048 else 64)))
        shared = [g for g in range(1, heads + 1) if heads % g == 0 and 2 <= heads / g <= 8] or [1] * (heads == 1)
        if width % heads or width // heads % 2 or not shared:
            continue
        groups = min(shared, key=lambda g: abs(heads / g - 4))
        block = 2 * width * width * (1 + groups / heads) + 9 * width * width + 2 * width
        layers = max(2, min(256, round((parameters - vocab_size * width - width) / block)))
        error = abs(math.log((vocab_size * width + width + layers * block) / parameters))
        score = 10 * error + abs(math.log(width / layers / 64))
        if best is None or score < best[0]:
            best = (score, width, layers, heads, groups)
    _, width, layers, heads, groups = best
    return ModelConfig(vocab_size, width, 3 * width, layers, heads, groups, max_position_embeddings=context,
                       rope_theta=1e4 if context <= 2048 else 5e4,
                       initializer_range=0.05 * math.sqrt(128 / width) if width < 512 else 0.02)


# ---- this machine ---------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """What a run computes on, and why."""

    device: str  # "cuda", "mps" or "cpu"
    dtype: torch.dtype  # of the matrix products
    compile: bool
    peak_flops: float  # FLOP/s of large matrix products: on CUDA the data sheet's in bf16, else measured in that dtype
    reason: str  # one line for people


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def matmul_flops(device: str, dtype: torch.dtype, size: int = 1024, seconds: float = 0.15) -> float:
    """FLOP/s of size^3 matrix products, the best of those that fit into the time."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def try_step(device: str, dtype: torch.dtype) -> None:
    """A tiny forward and backward with document attention: raises whatever this device cannot do."""
    model = GPT(ModelConfig(64, 64, 128, 1, 1, 1, max_position_embeddings=32)).to(device)
    model.compute_dtype = dtype
    tokens = torch.zeros(2, 32, dtype=torch.int64, device=device)
    starts = torch.tensor([0, 5, 32, 64, 64], dtype=torch.int32, device=device)
    loss = cross_entropy(model(tokens, starts), tokens)
    loss.backward()
    if not torch.isfinite(loss):
        raise RuntimeError("the loss of a tiny model is not finite")


def keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next step: given back to the kernel and faulted in again, it costs
    a CPU 5 to 10 % of its training speed. Does nothing with other C libraries."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def give_back_memory() -> None:
    """The opposite, once: what earlier models left in glibc's heap is given back, and not counted as held by the next."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def find_machine(device: str = "auto", dtype: str = "auto", compile: str = "auto") -> Machine:
    """Picks device, dtype and compilation by trying a tiny training step; what was asked for is not replaced."""
    candidates = [device] if device != "auto" else (
        ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"])
    notes = []
    for device in candidates:
        try:
            chosen, why = _find_dtype(device, dtype)
            try_step(device, chosen)
            break
        except (RuntimeError, AssertionError, TypeError) as error:
            notes.append(f"{device} with {dtype} failed ({' '.join(str(error).split())[:80] or type(error).__name__})")
    else:
        raise UserError(f"{'; '.join(notes)}; try --device cpu --dtype float32")
    if device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), 0)
        what = name + (f", {peak / 1e12:.0f} TFLOP/s by its data sheet" if peak else "")
        peak = peak or matmul_flops(device, chosen, 8192, 1.0)
    else:
        what = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else device
        keep_freed_memory()
        peak = matmul_flops(device, chosen, 2048)
    compiled = {"true": True, "false": False, "auto": device == "cuda" and platform.system() == "Linux"}[compile]
    why_compile = "" if compile != "auto" else "" if compiled else " (pays on CUDA; --compile true to try)"
    reason = "; ".join([*notes, f"{what}; {why}; compile {'on' if compiled else 'off'}{why_compile}"])
    return Machine(device, chosen, compiled, peak, reason)


def _find_dtype(device: str, wanted: str) -> tuple[torch.dtype, str]:
    if wanted != "auto":
        return getattr(torch, wanted), f"{wanted} as asked"
    if device == "cuda":
        if torch.cuda.get_device_capability() >= (8, 0):
            return torch.bfloat16, "bfloat16 (the GPU has it in hardware)"
        return torch.float32, "float32 (the GPU has no bfloat16)"
    single = matmul_flops(device, torch.float32)
    try:
        half = matmul_flops(device, torch.bfloat16, 128, 0.01)  # emulated, a large product would take seconds
        half = half if half < single / 10 else matmul_flops(device, torch.bfloat16)
    except (RuntimeError, TypeError):
        return torch.float32, f"float32 ({device} has no bfloat16 here)"
    speeds = f"measured {half / 1e9:.0f} GFLOP/s, float32 {single / 1e9:.0f}"
    if half > 1.2 * single:
        return torch.bfloat16, f"bfloat16 ({speeds})"
    return torch.float32, f"float32 (bfloat16 is no faster: {speeds})"


def measure_speed(model: GPT, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None, seconds: float = 1.0,
                  optimizer: torch.optim.Optimizer | None = None, repeats: int = 0) -> float:
    """Tokens/s of training steps on tokens [B, T]; the weights stay as they are unless there is an optimizer.
    The median of the steps that fit into the time (or of `repeats`), after one to warm up. Compilation that fails is
    switched off."""
    device, times, end = tokens.device.type, [], None

    def forward_and_backward() -> None:
        (cross_entropy(model(tokens, cu_seqlens), tokens) / tokens.numel()).backward()  # unnamed, the logits are freed early

    while len(times) < (repeats or 2) or not repeats and time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        try:
            forward_and_backward()
        except Exception as error:  # a compiler fails in many ways; what else is wrong comes again without it
            if not model.forget_compilation():
                raise
            print(f"compile   off: it failed here ({(str(error).strip() or repr(error)).splitlines()[0][:100]})")
            model.zero_grad(set_to_none=True)
            forward_and_backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize(device)
        times.append(time.perf_counter() - start)
        end = end or time.perf_counter() + seconds
    return tokens.numel() / sorted(times[1:])[len(times[1:]) // 2]


# ---- the plan -------------------------------------------------------------------------------------------------

SMALLEST, LARGEST = 1.4e5, 3e12  # parameters that a plan may have: the family's ends


@dataclass(frozen=True)
class Hardware:
    """What a plan buys or rents."""

    device: str = "H100"
    gpus: int = 8
    mfu: tuple[float, float, float] = MFU["H100"]  # planned, worst, best; of the dense bf16 peak, by 6ND
    price: tuple[float, float] | None = USD_PER_GPU_HOUR["H100"]  # USD an hour of one GPU, low and high
    overhead: float = OVERHEAD  # GPU-hours beside the main run, as a share of it

    def hours(self, flops: float, mfu: float | None = None) -> float:
        return flops / (PEAK_FLOPS[self.device] * (mfu or self.mfu[0]) * 3600)

    def flops(self, hours: float) -> float:
        return hours * 3600 * PEAK_FLOPS[self.device] * self.mfu[0]

    def bought(self, budget: float) -> float:
        """GPU-hours of the main run for so many USD, the overhead paid too, at the dearer price."""
        if self.price is None:
            raise UserError(f"the price of a {self.device} is not known here; give --price in USD an hour")
        return budget / self.price[1] / (1 + self.overhead)


def derive(hardware: Hardware, law: LossLaw, parameters: float = 0, tokens: float = 0, budget: float = 0,
           gpu_hours: float = 0, days: float = 0) -> tuple[float, float]:
    """(parameters, tokens) from one or two of the limits, 0 meaning not given; compute-optimal in what is left free.

    `budget` in USD pays for everything at the dearer price, overhead included; GPU-hours and days are the main run's.
    """
    hours = {}
    if budget:
        hours[f"--budget {budget:g}"] = hardware.bought(budget)
    if gpu_hours:
        hours[f"--gpu-hours {gpu_hours:g}"] = gpu_hours
    if days:
        hours[f"--days {days:g} on {hardware.gpus:,} GPUs"] = days * 24 * hardware.gpus
    if len(hours) > 1:
        (one, first), (other, second), *_ = hours.items()
        raise UserError(f"{one} is {say_amount(first)} GPU-hours of the run and {other} is {say_amount(second)}: give only "
                        "one of them")
    compute = hardware.flops(next(iter(hours.values()))) if hours else 0
    if parameters and tokens:
        if tokens < parameters:
            raise UserError(f"{say_number(tokens)} tokens are fewer than one a parameter: the nearest possible is --tokens "
                            f"{parameters:g}")
        needed = hardware.hours(training_flops(parameters, tokens))
        if hours:
            raise UserError(f"{say_number(parameters)} parameters on {say_number(tokens)} tokens take {say_amount(needed)} "
                            f"GPU-hours, and "
                            f"{next(iter(hours))} is {say_amount(next(iter(hours.values())))}: give two of the three")
        return parameters, tokens
    if not compute:
        return (parameters, law.tokens_for(parameters)) if parameters else (law.parameters_for(tokens), tokens)
    best = law.optimum(compute)
    nearest = f"the nearest possible is {say_number(best[0])} parameters on {say_number(best[1])} tokens"
    if best[0] < SMALLEST:
        least = training_flops(SMALLEST, law.tokens_for(SMALLEST))
        raise UserError(f"{next(iter(hours))} is too little for any model: the smallest, {say_number(SMALLEST)} parameters, "
                        f"takes {hardware.hours(least):.2g} GPU-hours; plan it for this machine with --minutes")
    if parameters and compute / 6 / parameters < parameters:
        wanted = hardware.hours(training_flops(parameters, law.tokens_for(parameters)))
        raise UserError(f"{say_number(parameters)} parameters would see {say_number(compute / 6 / parameters)} tokens with "
                        f"{next(iter(hours))}, fewer than one a parameter: {nearest}, or {wanted:,.0f} GPU-hours")
    if tokens and compute / 6 / tokens < SMALLEST:
        raise UserError(f"{say_number(tokens)} tokens leave room for {say_number(compute / 6 / tokens)} parameters with "
                        f"{next(iter(hours))}: {nearest}")
    parameters = parameters or (compute / 6 / tokens if tokens else best[0])
    return parameters, compute / 6 / parameters


def say_number(x: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def say_amount(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def round_batch(tokens: float, unit: int) -> int:
    """The batch nearest to one in tokens that is a power of two of units: a sequence, or a sequence on every GPU."""
    return unit * 2 ** max(0, round(math.log2(max(1.0, tokens / unit))))


def make_plan(hardware: Hardware, law: LossLaw, parameters: float, tokens: float, context: int, vocab_size: int = 0,
              keep: str = "compute", config: ModelConfig | None = None) -> dict:
    """Everything that follows from a size and a number of tokens. `keep`: what the nearest config of the family leaves
    as it was given, "tokens" or, tokens bending instead, "compute"."""
    vocab_size = vocab_size or (128_256 if parameters >= 1e9 else 49_152 if parameters >= 5e7 else 8192)
    asked, config = config, config or family(parameters, vocab_size, context)
    count = count_parameters(config)
    if not asked and not 0.8 < count["total"] / parameters < 1.25:
        raise UserError(f"no model of the family with a vocabulary of {vocab_size:,} has {say_number(parameters)} "
                        f"parameters; the nearest has {say_number(count['total'])}: give that or a smaller --vocab-size")
    tokens = tokens if keep == "tokens" else parameters * tokens / count["active"]
    compute = training_flops(count["active"], tokens)
    blocks = count["active"] - count["embedding"]  # what the laws of rate and batch count
    fitted = (6 * blocks + attention_flops_per_token(config, context, "full")) * tokens
    wanted, unit = schedule.deepseek_batch(fitted), context * hardware.gpus  # every GPU takes a sequence at least
    batch = min(round_batch(wanted, unit), round_batch(tokens / 100, unit))
    rate = schedule.deepseek_rate(fitted) * min(1.0, math.sqrt(batch / wanted))
    steps = max(1, round(tokens / batch))
    if config.num_experts:
        warnings.warn("the loss is foretold as a dense model's of the active parameters", Extrapolation)
    if batch > 2 * min(wanted, tokens / 100):
        warnings.warn(f"{hardware.gpus:,} GPUs make a batch of {say_number(batch)} tokens with a sequence each, "
                      f"{batch / min(wanted, tokens / 100):.2g} times what pays: take fewer --gpus", Extrapolation)
    room = 0.9e9 * MEMORY_GB[hardware.device]  # the rest: the CUDA context, the allocator's holes, communication
    fit = smallest_sharding(config, hardware.gpus, context, room)
    if fit is None:
        enough = next((n for n in (2**i for i in range(1, 21)) if smallest_sharding(config, n, context, room)), None)
        raise UserError(f"{say_number(count['total'])} parameters do not fit on {hardware.gpus} {hardware.device}(s) of "
                        f"{MEMORY_GB[hardware.device]} GB even fully sharded; "
                        + (f"the nearest that do are --gpus {enough}" if enough else "take a shorter --context"))
    hours = hardware.hours(compute)
    bill = hours * (1 + hardware.overhead)
    return {
        "config": asdict(config), "parameters": count["total"], "non_embedding": count["non_embedding"], "tokens": tokens,
        "tokens_per_parameter": tokens / count["active"], "flops": compute,
        "flops_per_token": {how: flops_per_token(config, context, how) for how in ("6N", "causal", "full")},
        "loss": law.loss(count["active"], tokens), "optimum": law.optimum(compute), "law": law.source,
        "batch_tokens": batch, "learning_rate": rate, "steps": steps, "warmup_steps": schedule.suggest_warmup(steps),
        "weight_decay": schedule.suggest_weight_decay(rate, steps),
        "step_law": {"batch_tokens": schedule.step_law_batch(tokens),
                     "learning_rate": schedule.step_law_rate(blocks, tokens)},
        "device": hardware.device, "gpus": hardware.gpus, "context": context, "sharding": fit[0], "memory_per_gpu": fit[1],
        "mfu": hardware.mfu, "gpu_hours": hours,
        "gpu_hours_range": [hardware.hours(compute, share) for share in hardware.mfu[:0:-1]],
        "days": hours / hardware.gpus / 24, "overhead": hardware.overhead, "gpu_hours_with_overhead": bill,
        "usd": [hours * p for p in hardware.price] if hardware.price else None,
        "usd_with_overhead": [bill * p for p in hardware.price] if hardware.price else None,
    }


def halvings(law: LossLaw, plan: dict, fixed: str, count: int = 4) -> list[dict]:
    """What each halving of the budget costs in predicted loss. `fixed`: the "parameters" or the "tokens" stay, "both"
    shrink alike, or, "", each budget is spent at its own optimum."""
    parameters, tokens = plan["flops"] / 6 / plan["tokens"], plan["tokens"]
    rows = []
    for i in range(count):
        share = 1 / 2**i
        shrink = {"parameters": (1, share), "tokens": (share, 1), "both": (share**0.5, share**0.5)}.get(fixed)
        size, length = (parameters * shrink[0], tokens * shrink[1]) if shrink else law.optimum(plan["flops"] * share)
        rows.append({"share": share, "parameters": size, "tokens": length, "loss": law.loss(size, length),
                     "fitted": law.covers(size, length)})
    return rows


OUTSIDE = {True: "", False: "  outside what the law was fitted on"}


def print_halvings(what: str, plan: dict) -> None:
    """The warnings of a plan, and what half of `what`, and half of that, would lead to."""
    for warning in plan["warnings"]:
        print(f"warning      {warning}")
    print(f"\n{what:>8}{'parameters':>13}{'tokens':>10}{'loss':>8}{'worse by':>10}")
    for row in plan["halvings"]:
        print(f"{row['share']:8.3g}{say_number(row['parameters']):>13}{say_number(row['tokens']):>10}{row['loss']:8.3f}"
              f"{row['loss'] - plan['halvings'][0]['loss']:10.3f}" + OUTSIDE[row["fitted"]])


def print_plan(plan: dict) -> None:
    config, each, law = ModelConfig(**plan["config"]), plan["flops_per_token"], plan["step_law"]
    gpu, (planned, low, high), (less, more) = plan["device"], plan["mfu"], plan["gpu_hours_range"]
    print(f"model        {plan['parameters']:,} parameters ({plan['non_embedding']:,} without embeddings): "
          f"{config.num_hidden_layers} layers, width {config.hidden_size}, MLP {config.intermediate_size}, "
          f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {config.head_dim}, vocabulary "
          f"{config.vocab_size:,}")
    print(f"tokens       {say_number(plan['tokens'])}, {plan['tokens_per_parameter']:,.3g} a parameter; the optimum of this "
          f"compute is {' parameters on '.join(map(say_number, plan['optimum']))} tokens")
    print(f"FLOPs        6ND = {plan['flops']:.3g}; a token {each['6N']:.4g} (6N), {each['causal']:.4g} (causal at "
          f"{plan['context']:,}), {each['full']:.4g} (full)")
    print(f"batch        {plan['batch_tokens']:,} tokens (Step Law: {law['batch_tokens']:,.0f}), {plan['steps']:,} steps")
    print(f"rate         {plan['learning_rate']:.2g} at its peak (Step Law: {law['learning_rate']:.2g}), "
          f"{plan['warmup_steps']:,} steps of warmup, weight decay {plan['weight_decay']:g}")
    print(f"memory       {plan['sharding']} on {plan['gpus']:,} {gpu}(s), one sequence at a time: "
          + ", ".join(f"{part} {size / 2**30:.2f} GiB" for part, size in plan["memory_per_gpu"].items()))
    print(f"time         {say_amount(plan['gpu_hours'])} {gpu}-hours at {planned:.0%} of peak by 6ND "
          f"({say_amount(less)} at {high:.0%}, "
          f"{say_amount(more)} at {low:.0%}) = {plan['days']:,.3g} days on {plan['gpus']:,} GPUs")
    print(f"whole bill   {say_amount(plan['gpu_hours_with_overhead'])} {gpu}-hours, {plan['overhead']:.0%} more for "
          "ablations and restarts (evaluations, 4 % of SmolLM3's main run, not counted)")
    if not plan["usd"]:
        print(f"money        the price of a {gpu} is not known here: give --price in USD an hour")
    else:
        print("money        {} to {} USD the run, ".format(*map(say_amount, plan["usd"]))
              + "{} to {} USD the whole bill".format(*map(say_amount, plan["usd_with_overhead"])))
    print(f"loss         {plan['loss']:.3f} nats a token ({plan['law']})")
    print_halvings("budget", plan)
    print("\nA smaller model trained longer, at the same compute, beside the optimum:")
    print(f"{'smaller':>8}{'parameters':>13}{'tokens':>10}{'worse by':>18}{'inference saved':>17}{'compute to match':>18}")
    for row in plan["smaller"]:
        match = f"{row['compute_to_match']:.2f} times" if row["compute_to_match"] < 1e3 else "never"
        print(f"{row['k']:7g}x{say_number(row['parameters']):>13}{say_number(row['tokens']):>10}{row['loss_penalty']:18.3f}"
              f"{row['inference_saving']:17.0%}{match:>18}" + OUTSIDE[row["fitted"]])


def pyplot_or_error(path: str | Path = ""):
    """matplotlib's pyplot, if it is there and can write such a file: said before any work."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib, or leave out --picture") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if path and (Path(path).suffix[1:].lower() not in kinds or not Path(path).parent.is_dir()):
        raise UserError(f"--picture {path} cannot be written; give a name in a folder that exists, such as curve.png")
    return pyplot


def draw_sizes(curves: dict[str, list[tuple[float, float]]], chosen: tuple[float, float], what: str, path: str) -> None:
    """Loss against size: a curve of (parameters, loss) for each budget, its lowest point marked, and the plan's."""
    pyplot = pyplot_or_error(path)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points), label=name)
        axes.plot(*min(points, key=lambda point: point[1]), "k.")
    axes.plot(*chosen, "r*", ms=12, label="the plan")
    axes.set(xscale="log", xlabel="parameters", ylabel="predicted loss", title=what)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"The curves are in {path}", file=sys.stderr)


def equal_compute(law: LossLaw, plan: dict) -> dict[str, list[tuple[float, float]]]:
    """`draw_sizes`' curves for the plan's compute and three halvings of it."""
    budgets = [plan["flops"] / 2**i for i in range(4)]
    around = np.geomspace(1 / 8, 8, 101)  # times the best size
    return {f"{compute:.2g} FLOPs": [(n, law.loss(n, compute / 6 / n)) for n in law.optimum(compute)[0] * around]
            for compute in budgets}


def equal_time(plan: dict, minutes: float) -> dict[str, list[tuple[float, float]]]:
    """`draw_sizes`' curves for the sizes that a plan for this machine measured, for its minutes and three halvings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Extrapolation)
        return {f"{share * minutes:g} minutes": [
            (size["parameters"], LAPTOP_LAW.loss(size["parameters"], size["tokens_per_second"] * 60 * share * minutes))
            for size in plan["sizes"]] for share in (1, 1 / 2, 1 / 4, 1 / 8)}


# ---- a plan for this machine ----------------------------------------------------------------------------------


def quick_speed(config: ModelConfig, machine: Machine, rows: int, seconds: float = 0.5) -> float:
    """Tokens/s of full training steps, document masks on."""
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).to(machine.device)
    model.compute_dtype = machine.dtype
    context = config.max_position_embeddings
    tokens = torch.zeros(rows, context, dtype=torch.int64, device=machine.device)
    starts = torch.arange(0, rows * context + 1, max(1, context // 2), dtype=torch.int32, device=machine.device)
    return measure_speed(model, tokens, starts, seconds, schedule.build_optimizer(model, 1e-4))


def plan_machine(machine: Machine, minutes: float, parameters: float = 0, tokens: float = 0, vocab_size: int = 8192) -> dict:
    """What this machine should train in so many minutes: the size of the family with the lowest loss by LAPTOP_LAW for
    the tokens that it is measured to read in that time. Batch and rate: the laptop recipe's, which were found by
    measuring, moved along DeepSeek's exponents. `sizes`: all that were measured; `halvings`: the best of them in less time
    (of a size or length that was asked for: that size)."""
    context, anchor, seconds = PRESETS["laptop"].max_position_embeddings, training_flops(1_836_160, 2.7e6), 60 * minutes
    room, sizes = torch.cuda.mem_get_info()[0] if machine.device == "cuda" else host_memory(), []

    def attempt(config: ModelConfig) -> dict | None:
        """Its speed, and what it would read and lose; None: it does not fit."""
        if training_memory(config, 16, context, machine.dtype.itemsize, machine.device)["total"] > 0.5 * room:
            return None
        count, speed = count_parameters(config)["active"], quick_speed(config, machine, 16)
        return {"config": config, "parameters": count, "tokens_per_second": speed} | outcome(count, speed * seconds)

    def outcome(count: float, length: float) -> dict:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Extrapolation)  # what is chosen is checked at the end
            return {"parameters": count, "tokens": length, "loss": LAPTOP_LAW.loss(count, length),
                    "fitted": LAPTOP_LAW.covers(count, length)}

    def batch_and_rate(size: dict) -> tuple[int, float]:
        growth = training_flops(size["parameters"], size["tokens"]) / anchor
        batch = round_batch(2048 * growth**0.3271, context)
        return batch, 3e-3 * growth**-0.1250 * math.sqrt(batch / 2048 / growth**0.3271)

    for width in (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024):
        layers = max(4, width // 64)
        size = vocab_size * width + width + layers * (11.5 * width * width + 2 * width)
        found = attempt(family(size, vocab_size, context))
        if found is None or sizes and found["loss"] > min(other["loss"] for other in sizes) + 0.1:
            break  # past the optimum, where every larger size is slower and worse
        sizes.append(found)
    give_back_memory()
    if not sizes:
        raise UserError(f"a vocabulary of {vocab_size:,} leaves no memory for any model here; take a smaller --vocab-size")
    best = min(sizes, key=lambda found: found["loss"])
    steps = best["tokens"] / batch_and_rate(best)[0]
    if steps < 50:
        raise UserError(f"--minutes {minutes:g} is less than 50 steps of any model here; the nearest possible is --minutes "
                        f"{math.ceil(6000 / steps * minutes) / 100:g}")
    nearest = (f"the nearest possible in {minutes:g} minutes is {say_number(best['parameters'])} parameters on "
               f"{say_number(best['tokens'])} tokens")
    chosen = best
    if parameters:
        seen = machine.peak_flops * seconds / 6 / parameters
        if seen < parameters:  # not even at full speed
            raise UserError(f"{say_number(parameters)} parameters would see at most {say_number(seen)} tokens in "
                            f"{minutes:g} minutes on this machine, fewer than one a parameter: {nearest}")
        chosen = attempt(family(parameters, vocab_size, context))
        if chosen is None or chosen["tokens"] < parameters:
            raise UserError(f"{say_number(parameters)} parameters are too many for {minutes:g} minutes here: {nearest}")
    elif tokens:
        if tokens > best["tokens"] * 20:
            raise UserError(f"{say_number(tokens)} tokens in {minutes:g} minutes is {tokens / seconds:,.0f} a second: "
                            + nearest)
        size = best["parameters"] * best["tokens"] / tokens
        for _ in range(4):  # speed falls about as size grows, and is measured
            chosen = attempt(family(max(SMALLEST, size), vocab_size, context))
            if chosen is None or abs(chosen["tokens"] / tokens - 1) < 0.1:
                break
            size = chosen["parameters"] * chosen["tokens"] / tokens
        if chosen is None or not 0.8 < chosen["tokens"] / tokens < 1.25:
            raise UserError(f"no size reads just {say_number(tokens)} tokens in {minutes:g} minutes here: {nearest}")
        chosen |= outcome(chosen["parameters"], tokens)
    batch, rate = batch_and_rate(chosen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LAPTOP_LAW.loss(chosen["parameters"], chosen["tokens"])
    of = [chosen] if parameters or tokens else sizes
    rows = [min((outcome(size["parameters"], size["tokens"] * share) for size in of), key=lambda row: row["loss"])
            | {"share": share} for share in (1, 1 / 2, 1 / 4, 1 / 8)]
    return chosen | {"batch_tokens": batch, "learning_rate": rate, "halvings": rows,
                     "warnings": [str(w.message) for w in caught],
                     "sizes": [{name: size[name] for name in ("parameters", "tokens_per_second")} for size in sizes]}


def host_memory() -> float:
    """Bytes of this machine's memory; 8 GiB where that is not told."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 8.0 * 2**30


def print_machine_plan(found: dict, machine: Machine, minutes: float) -> None:
    config = found["config"]
    print(f"machine      {machine.reason}")
    print(f"model        {found['parameters']:,} parameters: {config.num_hidden_layers} layers, width {config.hidden_size}, "
          f"vocabulary {config.vocab_size:,}, context {config.max_position_embeddings}")
    print(f"tokens       {found['tokens']:,.0f} in {minutes:g} minutes at {found['tokens_per_second']:,.0f} tokens/s "
          "(measured just now)")
    print(f"batch        {found['batch_tokens']:,} tokens, rate {found['learning_rate']:.2g}: the laptop recipe's, moved by "
          "DeepSeek's exponents")
    print(f"loss         {found['loss']:.3f} bits per byte of held-out prose and code ({LAPTOP_LAW.source})")
    print_halvings("of time", found)
    print()


# ---- published runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A training run whose GPU-hours are public. Sources: model cards of Llama, TinyLlama's README, SmolLM3's
    blog post (24 days on 384 GPUs), DeepSeek-V3's report."""

    active: float
    tokens: float
    device: str
    hours: float
    heads: int  # layers x query heads x head_dim, what attention's FLOPs need; 0: not worked out
    context: int
    why: str


PUBLISHED = {
    "Llama-2 7B": Published(6.738e9, 2e12, "A100", 184_320, 32 * 4096, 4096, ""),
    "Llama-2 70B": Published(68.98e9, 2e12, "A100", 1_720_320, 80 * 8192, 4096, ""),
    "Llama-3.1 8B": Published(8.030e9, 15e12, "H100", 1.46e6, 32 * 4096, 8192, "an outlier, its cause unpublished"),
    "Llama-3.1 405B": Published(405.85e9, 15.6e12, "H100", 30.84e6, 126 * 16384, 8192, "large matrices reach more"),
    "SmolLM3 3B": Published(3.075e9, 11.14e12, "H100", 221_184, 36 * 2048, 4096, "small matrices, 384 GPUs"),
    "TinyLlama 1.1B": Published(1.100e9, 300e9, "A100", 3456, 22 * 2048, 2048, "16 GPUs: little communication"),
    "DeepSeek-V3": Published(37e9, 14.8e12, "H800", 2.664e6, 0, 4096, "products in FP8: 17 % of that peak"),
}


def published() -> list[dict]:
    """For each run and each way of counting: the share of peak that it reached, and the planner's hours over the true
    ones, with the planner's share for the device (by 6ND)."""
    rows = []
    for name, run_ in PUBLISHED.items():
        attention = 12 * run_.heads * run_.context
        flops = {"6N": 6 * run_.active * run_.tokens}
        if run_.heads:
            flops |= {"full": flops["6N"] + attention * run_.tokens, "causal": flops["6N"] + attention / 2 * run_.tokens}
        spent = run_.hours * 3600 * PEAK_FLOPS[run_.device]
        planned = MFU.get(run_.device, MFU["H100"])[0]
        predicted = {k: f / PEAK_FLOPS[run_.device] / planned / 3600 for k, f in flops.items()}
        reached = {k: f / spent for k, f in flops.items()}
        rows.append({"model": name, "device": run_.device, "hours": run_.hours, "mfu": reached,
                     "planned_mfu": planned, "predicted": predicted,
                     "why": run_.why})
    return rows


# SmolLM3's GPU-hours (playbook): the main run is booked with 30 days, of which 24 trained.
SMOLLM3_BILL = {"main run, 384 GPUs x 30 days": 384 * 30 * 24, "pretraining ablations, 192 x 15": 192 * 15 * 24,
                "mid-training ablations, 192 x 10": 192 * 10 * 24,
                "restart and debugging, 384 x 3 + 192 x 4": (384 * 3 + 192 * 4) * 24}


def print_published() -> None:
    print(f"{'':16}{'GPU':>6}{'published':>12}   share of peak reached      predicted / published hours")
    print(f"{'':16}{'':6}{'GPU-hours':>12}{'6N':>8}{'causal':>8}{'full':>8}{'planned':>10}{'6N':>8}{'causal':>8}{'full':>8}")
    for row in published():
        shares = "".join(f"{row['mfu'][k]:8.1%}" if k in row["mfu"] else f"{'-':>8}" for k in ("6N", "causal", "full"))
        ratios = "".join(f"{row['predicted'][k] / row['hours']:8.2f}" if k in row["predicted"] else f"{'-':>8}"
                         for k in ("6N", "causal", "full"))
        print(f"{row['model']:16}{row['device']:>6}{row['hours']:12,.0f}{shares}{row['planned_mfu']:10.0%}{ratios}  "
              f"{row['why']}")
    print("""
6N is 6 FLOPs a parameter and token; full and causal add attention's squares or their lower halves. Predicted with the
planned share, the middle of what such runs reached by 6N: so only the spread of that column says anything, 21 % at most
but for the outlier. The other two columns show what such a share is off if the FLOPs are counted another way.
""")
    total, main_run = sum(SMOLLM3_BILL.values()), next(iter(SMOLLM3_BILL.values()))
    for name, hours in SMOLLM3_BILL.items():
        print(f"{name:44}{hours:10,} H100-hours")
    low, high = USD_PER_GPU_HOUR["H100"]
    print(f"{'SmolLM3, the whole bill':44}{total:10,} H100-hours = {total * low / 1e6:.2f} to {total * high / 1e6:.2f} "
          f"million USD; "
          f"{(total - main_run) / main_run:.0%} on top of the main run")


# ---- command line ---------------------------------------------------------------------------------------------


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < 1e30:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0 and less than 1e30")
    return value


def positive_integer(text: str) -> int:
    return int(positive(str(int(text))))


def price(text: str) -> tuple[float, float]:
    """"3" or "2.2-4"."""
    low, _, high = text.partition("-")
    low, high = positive(low), positive(high or low)
    return (min(low, high), max(low, high))


def measure(config: ModelConfig, rows: int, context: int, machine: Machine, documents: int, seconds: float) -> None:
    before = memory_now()
    torch.manual_seed(0)
    model = GPT(config).to(machine.device)
    model.compute_dtype = machine.dtype
    if machine.compile:
        model.compile_blocks()
    optimizer = schedule.build_optimizer(model, 1e-4)
    tokens = torch.randint(config.vocab_size, (rows, context), device=machine.device)
    starts = torch.arange(0, rows * context + 1, context // max(1, documents), dtype=torch.int32, device=machine.device)
    speed = measure_speed(model, tokens, starts if documents else None, seconds, optimizer)
    print(f"machine      {machine.reason}; torch {torch.__version__}")
    print(f"peak         {machine.peak_flops / 1e9:,.0f} GFLOP/s")
    what = f"{documents} documents a sequence" if documents else "no document mask"
    print(f"speed        {speed:,.0f} tokens/s at {rows} sequences of {context}, {what}")
    length = context / max(1, documents)
    for counted in ("6N", "causal", "full"):
        used = speed * flops_per_token(config, length, counted)
        print(f"share        {used / machine.peak_flops:6.1%} of peak, counting {counted}")
    predicted = process_memory(config, rows, context, machine.dtype.itemsize, machine.device, before)
    if held := peak_memory(machine.device):
        ratio = predicted / held - 1
        print(f"memory       predicted {predicted / 2**20:,.0f} MiB, measured {held / 2**20:,.0f}: {ratio:+.0%}")


# Flags of `plan` that say what is rented, and their defaults.
RENTED = {"gpus": 0, "device": "H100", "price": None, "mfu": 0, "overhead": OVERHEAD, "context": 4096, "law": "besiroglu"}


def plan(args: argparse.Namespace) -> None:
    if args.picture:
        pyplot_or_error(args.picture)
    preset = PRESETS.get(args.preset) if args.preset else None
    if preset and args.parameters:
        raise UserError(f"{args.preset} has {count_parameters(preset)['total']:,} parameters; leave it or --parameters out")
    parameters = args.parameters or (float(count_parameters(preset)["active"]) if preset else 0.0)
    given = [flag for flag, value in (("--parameters", parameters), ("--tokens", args.tokens), ("--budget", args.budget),
             ("--gpu-hours", args.gpu_hours), ("--days", args.days), ("--minutes", args.minutes)) if value]
    if not 1 <= len(given) <= 2 and not (len(given) == 3 and "--minutes" not in given):
        raise UserError("give one or two of --parameters, --tokens, --budget, --gpu-hours, --days with --gpus, --minutes, "
                        "not " + (", ".join(given) or "none"))
    for flag, value in (("--parameters", parameters), ("--tokens", args.tokens)):
        if value and not SMALLEST <= value <= LARGEST * 1e4:
            raise UserError(f"{flag} {value:g} is not between {SMALLEST:g} and {LARGEST * 1e4:g}")
    if args.minutes:
        if wrong := [flag for flag in given if flag not in ("--minutes", "--parameters", "--tokens")]:
            raise UserError(f"--minutes is this machine's time and {wrong[0]} is rented: give only one of them")
        if wrong := [name for name, default in RENTED.items() if getattr(args, name.replace("-", "_")) != default]:
            raise UserError(f"--{wrong[0]} is of rented GPUs and --minutes is this machine's time: leave one of them out")
        machine = find_machine()
        found = plan_machine(machine, args.minutes, parameters, args.tokens, args.vocab_size or 8192)
        if args.picture:
            draw_sizes(equal_time(found, args.minutes), (found["parameters"], found["loss"]),
                       "Bits per byte after equal time on this machine", args.picture)
        if args.json:
            print(json.dumps(found | {"config": asdict(found["config"]), "machine": machine.reason}, indent=1))
        else:
            print_machine_plan(found, machine, args.minutes)
            if not parameters and not args.tokens:
                print(f"train it with python train.py --minutes {args.minutes:g}")
        return
    mfu = MFU.get(args.device, MFU["H100"])
    mfu = tuple(min(1.0, args.mfu * share / mfu[0]) for share in mfu) if args.mfu else mfu
    hardware = Hardware(args.device, args.gpus or 8, mfu,
                        args.price or USD_PER_GPU_HOUR.get(args.device), args.overhead)
    days = args.days
    if days and not args.gpus and (args.gpu_hours or args.budget):  # then the number of GPUs is what is not given
        hours = args.gpu_hours or hardware.bought(args.budget)
        hardware, days = replace(hardware, gpus=max(1, math.ceil(hours / 24 / days))), 0
    law = {"besiroglu": CHINCHILLA, "hoffmann": HOFFMANN}[args.law]
    size, tokens = derive(hardware, law, parameters, args.tokens, args.budget, args.gpu_hours, days)
    if not SMALLEST <= size <= LARGEST:
        limit = SMALLEST if size < SMALLEST else LARGEST
        raise UserError(f"that would be {say_number(size)} parameters: the nearest possible is {say_number(limit)} on "
                        f"{say_number(law.tokens_for(limit))} tokens")
    limited = args.budget or args.gpu_hours or args.days
    keep = "tokens" if args.tokens and not limited else "compute"
    fixed = "both" if parameters and args.tokens else "parameters" if parameters else "tokens" if args.tokens else ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if args.device not in MFU and not args.mfu:
            warnings.warn(f"the share of peak is an H100's; give that of this {args.device} as --mfu")
        found = make_plan(hardware, law, size, tokens, args.context, args.vocab_size, keep, preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Extrapolation)  # said for the plan itself
        found |= {"warnings": list(dict.fromkeys(str(w.message) for w in caught)), "halvings": halvings(law, found, fixed),
                  "smaller": [overtrain(law, found["flops"], k) | {"k": k} for k in (1, 1.5, 2, 3, 4, 8)]}
        if args.picture:
            draw_sizes(equal_compute(law, found), (found["flops"] / 6 / found["tokens"], found["loss"]),
                       f"Loss at equal compute ({law.source})", args.picture)
    if args.json:
        print(json.dumps(found, indent=1).replace("Infinity", "null"))
    else:
        print_plan(found)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan | published | measure")
    p = commands.add_parser("plan", help="what to train: give one or two limits, the rest follows",
                            description="Give one or two limits; the rest follows.")
    p.add_argument("preset", nargs="?", choices=PRESETS, metavar="PRESET", help="this model's size: " + ", ".join(PRESETS))
    p.add_argument("--parameters", type=positive, default=0)
    p.add_argument("--tokens", type=positive, default=0)
    p.add_argument("--budget", type=positive, default=0, metavar="USD", help="for all, with overhead, at the dearer price")
    p.add_argument("--gpu-hours", type=positive, default=0, help="of the main run")
    p.add_argument("--days", type=positive, default=0, help="of the main run, on --gpus")
    p.add_argument("--minutes", type=positive, default=0, help="of training on this machine")
    p.add_argument("--gpus", type=positive_integer, default=RENTED["gpus"],
                   help="default: 8, or what --days and --gpu-hours or --budget ask for")
    p.add_argument("--device", choices=PEAK_FLOPS, default=RENTED["device"], metavar="GPU", help=", ".join(PEAK_FLOPS))
    p.add_argument("--price", type=price, metavar="USD", help="of a GPU-hour, such as 3 or 2.2-4 (an H100's default)")
    p.add_argument("--mfu", type=positive, default=0, help="share of the bf16 peak by 6ND (H100: 0.30; SmolLM3: 0.26)")
    p.add_argument("--overhead", type=float, default=RENTED["overhead"], help="of the main run, for ablations and restarts")
    p.add_argument("--context", type=positive_integer, default=RENTED["context"])
    p.add_argument("--vocab-size", type=positive_integer, default=0, help="default: 128,256 from 1B on, 49,152 from 50M")
    p.add_argument("--law", choices=("besiroglu", "hoffmann"), default=RENTED["law"], help="Chinchilla's constants")
    p.add_argument("--json", action="store_true", help="the plan as JSON on stdout")
    p.add_argument("--picture", metavar="FILE", help="loss against size at equal compute")
    commands.add_parser("published", help="predicted against published GPU-hours; SmolLM3's bill")
    p = commands.add_parser("measure", help="this machine's training speed and memory")
    p.add_argument("preset", nargs="?", choices=PRESETS, default="laptop", metavar="PRESET", help=", ".join(PRESETS))
    p.add_argument("--rows", type=positive_integer, default=16, help="sequences at a time")
    p.add_argument("--context", type=positive_integer, default=0, help="default: the preset's, at most 4096")
    p.add_argument("--documents", type=int, default=1, help="equal documents a sequence; 0: no document mask")
    p.add_argument("--seconds", type=positive, default=10)
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    p.add_argument("--compile", default="auto", choices=("auto", "true", "false"))
    args = parser.parse_args()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if args.command == "plan":
        if not 0 <= args.overhead <= 100:
            raise UserError(f"--overhead {args.overhead} is not between 0 and 100")
        if args.mfu > 1:
            raise UserError(f"--mfu {args.mfu:g} is more than the whole peak; give a share such as 0.3")
        return plan(args)
    if args.command == "published":
        return print_published()
    config = PRESETS[args.preset]
    context = args.context or min(config.max_position_embeddings, 4096)
    if args.documents < 0 or args.documents and context % args.documents:
        nearest = min((n for n in range(1, context + 1) if context % n == 0), key=lambda n: abs(n - args.documents))
        raise UserError(f"--documents {args.documents} does not divide the context of {context} tokens; take {nearest}")
    measure(config, args.rows, context, find_machine(args.device, args.dtype, args.compile), args.documents, args.seconds)


if __name__ == "__main__":
    run(main)
