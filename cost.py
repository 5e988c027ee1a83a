"""Cost: parameters, FLOPs, memory, time, money and loss, predicted before a run and measured on this machine.

Training takes about 6 FLOPs a parameter and token, 2 forward and 4 backward: C = 6ND (Kaplan et al. 2020; playbook).
Attention adds 12 L H D T a token for the full square of T tokens, half for the causal half, less inside documents; a
share of peak (MFU) always says which it counts.

    python cost.py plan --budget 100k                        # how large a model, how many tokens, which batch and rate
    python cost.py plan --parameters 3B --days 24 --gpus 384 --json --picture sizes.png
    python cost.py plan --minutes 5                          # what this machine should train, and how
    python cost.py published                                 # predicted beside published GPU-hours; SmolLM3's bill
    python cost.py measure laptop                            # this machine's speed and memory beside the prediction
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import re
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from time import perf_counter

from tokenizer import Parser, UserError, add_options, check_options, draw, given_options, option, parse_options, run

import torch

import schedule
from model import DENSE_ROWS, GPT, PRESETS, ModelConfig, cache_bytes, count_parameters
from schedule import CHINCHILLA, LAPTOP_LAW

# Dense bf16 peak in FLOP/s (data sheets, without sparsity) and GB of memory, by a part of the device's name.
GPUS = {"H200": (989.4e12, 141), "H100 PCIe": (756e12, 80), "H100": (989.4e12, 80), "H800": (989.4e12, 80),
        "A100": (312e12, 80), "B200": (2250e12, 180), "4090": (165.2e12, 24), "3090": (71e12, 24)}
# Share of the peak to plan with, lowest and highest, by 6ND, from the published runs below. Other devices: as the H100.
MFU = {"H100": (0.30, 0.26, 0.35), "A100": (0.42, 0.39, 0.51)}
OVERHEAD = 0.58  # ablations and restarts: SmolLM3's 161,280 GPU-hours on top of the main run's 276,480


def attention_flops_per_token(config, length, counted="causal"):
    """FLOPs of attention for one trained token, where `length` tokens attend to each other (in documents
    `attended_length`). "full" counts the square, 12 L H D T (PaLM, appendix B), "causal" half of it."""
    width = (config.head_dim + config.v_head_dim) / 2 if config.kv_lora_rank else config.head_dim
    reach = {"sliding": config.sliding_window, "chunked": config.attention_chunk_size, "linear": 0}
    attended = sum(min(length, reach.get(config.layer_type(i), length)) for i in range(config.num_hidden_layers))
    return (12 if counted == "full" else 6) * config.num_attention_heads * width * attended


def attended_length(documents):
    """sum(len^2) / sum(len): the sequence length at which attention costs as much a token as in these documents."""
    return sum(n * n for n in documents) / sum(documents)


def flops_per_token(config, length, counted="causal"):
    """FLOPs to train one token. "6N" omits attention, 10 to 14 % at a context of 2 widths: beyond that it warns."""
    if counted == "6N":
        schedule.check_range("6ND, which leaves attention out,", length, 0, 2 * config.hidden_size, "tokens of context")
        return 6 * count_parameters(config)["active"]
    return 6 * count_parameters(config)["matmul"] + attention_flops_per_token(config, length, counted)


def training_memory(config, rows, context, compute_bytes=2, device="cuda", accumulates=True, recompute=False, shards=1):
    """Bytes of all tensors on one device at the peak of an eager step: "weights", "gradients" and "optimizer" (AdamW's
    moments) in fp32; "activations": what autograd keeps of each block, the cast weights, a piece of the logits, both
    gradients of the head; "total". `accumulates`: gradients of earlier micro-batches, or DDP's buckets, exist in the
    forward pass. `recompute`: blocks keep only their inputs and are computed again (Chen et al. 2016). `shards`:
    processes of FSDP, which gather the weights of one block at a time."""
    count = count_parameters(config)
    C, M, V, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    if config.num_experts:  # those that a token visits
        shared = config.shared_expert_intermediate_size or config.n_shared_experts * config.moe_intermediate_size
        M = config.num_experts_per_tok * config.moe_intermediate_size + shared
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    b, N, cast = compute_bytes, rows * context, compute_bytes < 4
    norm = 2 * b if device == "cuda" else b + 8  # bytes an element; a CPU keeps the fp32 steps of a norm
    short = context <= DENSE_ROWS[torch.bfloat16 if cast else torch.float32]
    scores = b * context if device == "cpu" and short else 4  # kept, or their logarithmic sums
    block = 2 * C * norm + b * (2 * q + 2 * kv + 4 * M) + config.num_attention_heads * scores  # bytes a token
    more = config.qk_norm * (q + kv) + (config.norm_position == "sandwich") * 2 * C
    block += more * (norm - b)  # RoPE and the residual stream keep no output of these
    blocks = block + layers * C * b if recompute else layers * block
    gathered = count["embedding"] + count["non_embedding"] / (layers if recompute or shards > 1 else 1)
    kept = N * (blocks + C * norm) + (b * gathered if cast or shards > 1 else 0)
    piece = min(2048 if device == "cuda" else 512, N)  # model.pieces_of; its logits and p in fp32, and their gradient
    head = 2 * b * N * C + V * (4 * C + (8 + b * cast) * piece)  # the weight's gradient is made while blocks are kept
    share = 4.0 * count["total"] / shards
    last = 4 * V * C * (1 + accumulates)  # the embedding's gradient, beside the head's
    peak = max(share + last, kept + head + accumulates * share)
    return {"weights": share, "gradients": share, "optimizer": 2 * share, "activations": kept + head,
            "total": 3 * share + peak}


def process_memory(memory, device, before):
    """Peak bytes of a training process (on CUDA of its tensors), from its `training_memory` and what it held before.
    Measured on Linux: torch's kernels take 50 MiB, and gaps that glibc leaves between activations 40 % of those."""
    return memory["total"] + (device != "cuda") * (before + 50 * 2**20 + 0.4 * memory["activations"])


def peak_memory(device, line="VmHWM"):
    """The most bytes that this process has held, on CUDA in tensors; "VmRSS": those that it holds now. 0 if unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError), open("/proc/self/status") as status:  # Linux
        return 1024.0 * int(re.search(rf"{line}:\s+(\d+)", status.read())[1])
    return 0.0


def machine_memory(device):
    """Bytes of memory of the GPU or of this computer; 8 GiB if unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30


def smallest_sharding(config, gpus, context, room):
    """(name, `training_memory`) of train.py's first way to fit a sequence into `room` bytes; None if nothing fits."""
    for recompute in (False, True):
        for name, shards in (("nothing sharded (DDP)", 1), ("everything sharded (FSDP)", gpus)):
            memory = training_memory(config, 1, context, recompute=recompute, shards=shards)
            if memory["total"] <= room:
                return name + ", activations recomputed" * recompute, memory


# ---- this machine ---------------------------------------------------------------------------------------------
@dataclass
class Machine:
    """What a run computes on, and why."""
    device: str  # "cuda", "mps" or "cpu"
    dtype: torch.dtype  # of the matrix products
    compile: bool
    peak_flops: float  # FLOP/s of large matrix products: on CUDA the data sheet's in bf16, else measured in `dtype`
    reason: str  # one line for people


def matmul_flops(device, dtype, size, seconds=0.15):
    """FLOP/s of size^3 matrix products: the best of those that begin in this time."""
    a = torch.randn(size, size, device=device).to(dtype)
    times, end = [], perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter()
        a @ a
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(perf_counter() - start)
    return 2 * size**3 / min(times)


def keep_freed_memory():
    """Makes glibc keep what a step frees for the next, so that a CPU trains 5 to 10 % faster. No effect elsewhere."""
    with contextlib.suppress(Exception):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what was freed before no longer counts as held
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD in malloc.h
        libc.mallopt(-4, 0)  # M_MMAP_MAX


@functools.cache  # one choice for a whole process: trainings that are compared must not differ in it
def choose_dtype(device):
    """(torch.bfloat16 where that is faster, else torch.float32; the reason in words)."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32, "the GPU's best"
    for size in (128, 1024):  # where bfloat16 is emulated, a large product would take seconds
        # A busy machine slows single probes: the first warms up, both take turns, and the best of each counts.
        probes = [[matmul_flops(device, d, size, 0.02) for d in (torch.float32, torch.bfloat16)] for _ in range(5)]
        single, half = map(max, zip(*probes))
        if half < single / 10:
            break
    why = f"{half / 1e9:.0f} GFLOP/s in bfloat16, {single / 1e9:.0f} in float32"
    return torch.bfloat16 if half > 1.2 * single else torch.float32, why


def fast_attention():
    """Takes FlashAttention 4 or 3 where the package is there and the GPU is of its kind; in words. With torch 2.11 the
    backward pass of FA4 knows no windows, which `document_attention` always states."""
    for kernels, generations in ("FA4", (9, 10) if torch.__version__ >= (2, 13) else ()), ("FA3", (9,)):
        if torch.cuda.get_device_capability()[0] in generations:
            with contextlib.suppress(ImportError, RuntimeError):  # no package, or another version of it
                torch.nn.attention.activate_flash_attention_impl(kernels)
                return f"; attention by {kernels}"
    return "; attention by FA2"


def find_machine(device="auto", dtype="auto", compile="auto"):
    """Picks device, dtype and compilation, and tries a tiny training step. UserError if that fails, also on a CPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    asked, device = device, best if device == "auto" else device
    try:
        kernels = fast_attention() if device == "cuda" else ""
        chosen, why = choose_dtype(device) if dtype == "auto" else (getattr(torch, dtype), "as asked")
        measure_training(ModelConfig(64, 64, 128, 1, 1, 1), Machine(device, chosen, False, 0.0, ""), 2, 32, 2, 0.0)
    except Exception as error:  # a device fails in many ways
        failure = f"{device} with {dtype} failed ({repr(error)[:80]})"
        if asked != "auto" or device == "cpu":
            raise UserError(f"{failure}; try --device cpu --dtype float32") from None
        print(f"machine   {failure}: taking the CPU")
        return find_machine("cpu", dtype, compile)
    compiled = compile == "true" or compile == "auto" and device == "cuda" and sys.platform == "linux"
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN builds an attention plan for each new length
    what = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    known = next((flops for part, (flops, _) in GPUS.items() if part in what), 0.0)
    dtype = torch.float32 if device == "cpu" and chosen == torch.float16 else chosen  # as `model.multiply` does
    peak = known or matmul_flops(device, dtype, 8192 if device == "cuda" else 2048)
    if device != "cuda":
        keep_freed_memory()
    reason = f"{what}; {str(chosen)[6:]} ({why}){kernels}; compile {'on' if compiled else 'off'}"
    return Machine(device, chosen, compiled, peak, reason)


def measure_speed(model, tokens, cu_seqlens, seconds=1.0, optimizer=None):
    """Tokens/s (median, after one to warm up) of steps on tokens [B, T]; without an optimizer weights stay."""
    device, times, end = tokens.device.type, [], math.inf
    while len(times) < 3 or perf_counter() < end:
        start = perf_counter()
        try:
            (model(tokens, cu_seqlens, targets=tokens)[0] / tokens.numel()).backward()
        except Exception as error:  # a compiler fails in many ways; any other fault comes again without it
            if not model.compiled:
                raise
            model.compiled = False
            print(f"compile   off: it failed here ({repr(error)[:100]})")
            model.zero_grad()
            continue
        if optimizer:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(perf_counter() - start)
        end = min(end, perf_counter() + seconds)
    return tokens.numel() / statistics.median(times[1:])


def measure_training(config, machine, rows, context, documents, seconds):
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


def compiling_pays(compile, device, minutes):
    """Whether a training that is planned to take so long is compiled, where --compile leaves it open on a CPU."""
    return compile == "auto" and device == "cpu" and minutes > 10


def choose_machine(recipe):
    """The device of a train.Recipe, and what is set once for a whole process."""
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    machine = find_machine(recipe.device, recipe.dtype, recipe.compile)
    if machine.device == "cuda":  # TensorFloat-32 for what is left in fp32, unless fp32 was asked for
        torch.set_float32_matmul_precision("highest" if recipe.dtype == "float32" else "high")
    return machine


def recipe_memory(recipe, rows, context, processes, device, accumulates=True):
    """`training_memory` of a process that trains a recipe, whose dtype and parallel plan `settle` chose."""
    shards = processes if recipe.parallel == "fsdp" else 1
    return training_memory(recipe.model, rows, context, 4 if recipe.dtype == "float32" else 2, device, accumulates,
                           recipe.activation_checkpointing, shards)


def settle(recipe, machine, processes, context):
    """The recipe with what its "auto"s became, so that a resumed run computes as it began: FSDP where a process cannot
    hold the longest context's training. Where it can, "auto" stays, to be decided again for other processes."""
    recipe = replace(recipe, device=machine.device, dtype=str(machine.dtype)[6:], compile=str(machine.compile).lower())
    if recipe.parallel == "auto" and processes > 1:
        needs = recipe_memory(recipe, 1, context, processes, machine.device)["total"]
        if needs > 0.85 * machine_memory(machine.device):
            return replace(recipe, parallel="fsdp")
    return recipe


def fits(recipe, rows, context, processes, device, share=0.85):
    """Whether so many sequences fit into a share of a GPU, or 1 GiB of activations: a CPU is no faster with more."""
    memory = recipe_memory(recipe, rows, context, processes, device)
    return memory["total"] <= share * machine_memory(device) if device == "cuda" else memory["activations"] <= 2**30


def rows_at_once(recipe):
    """Answers to draw together: their KV cache, kept while GRPO trains, takes 10 % of a GPU, more if --samples asks."""
    row = cache_bytes(recipe.model, 1 << (recipe.model.max_position_embeddings - 1).bit_length())
    fit = max(1, int(0.1 * machine_memory(recipe.device) / row)) if recipe.device == "cuda" else 256
    return min(256, 1 << fit.bit_length() - 1)


def stage_rows(recipe, processes, device):
    """Sequences of a micro-batch in each stage; UserError, with the nearest that do, where sizes do not divide."""
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
        asked = recipe.micro_batch if context == base else 0  # --micro_batch is for the model's own context
        if asked and asked not in divisors:
            raise UserError(f"--micro_batch {asked} does not divide the {rows} sequences of a process; "
                            f"take one of {', '.join(map(str, divisors))}")
        found.append(asked or max((n for n in divisors if fits(recipe, n, context, processes, device)), default=1))
    return found


def check_memory(recipe, machine, processes, rows, curriculum):
    """Bytes that a process needs in its largest stage; UserError where this machine does not have them."""
    device, room, before = machine.device, machine_memory(machine.device), peak_memory("cpu", "VmRSS")
    need = max(process_memory(
        recipe_memory(recipe, n, context, processes, device,
                      batch // context > n * (processes if recipe.parallel == "fsdp" else 1)),  # DDP keeps its buckets
        device, before)
        for n, context, batch in zip(rows, curriculum.contexts, curriculum.batches))
    if need > room:
        raise UserError(f"a process needs {need / 2**30:.2f} GiB of memory and {room / 2**30:.2f} are there; take "
                        "--activation_checkpointing true, --parallel fsdp on more processes, or a smaller model")
    return need


# ---- the plan -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlanOptions:
    """Plans what to train: give one or two limits (0: not given), the rest follows."""
    preset: str = option("", ", ".join(PRESETS), choices=("", *PRESETS))
    parameters: float = option(0.0, "of the model, such as 3B", 0)
    tokens: float = option(0.0, "of training, such as 60B", 0)
    budget: float = option(0.0, "USD for everything, overhead included", 0)
    gpu_hours: float = option(0.0, "of the main run", 0)
    days: float = option(0.0, "of the main run; with --budget or --gpu-hours they decide the number of GPUs", 0)
    minutes: float = option(0.0, "of training on this machine, instead of all other limits", 0)
    gpus: int = option(0, "rented; 0: 8, or what --days decides", 0)
    device: str = option("H100", "rented: " + ", ".join(GPUS), choices=GPUS)
    price: float = option(0.0, "USD of a GPU-hour; 0: 4 for an H100, for which 2.2 to 4 are asked", 0)
    mfu: float = option(0.0, "share of the bf16 peak by 6ND; 0: 0.42 on an A100, else an H100's 0.30", 0, 1)
    overhead: float = option(OVERHEAD, "ablations and restarts, as a share of the main run", 0)
    context: int = option(4096, "tokens", 1)
    vocab_size: int = option(0, "0: 128,256 from 1B parameters on, 49,152 from 50M on, else 8,192", 0)
    picture: str = option("", "file to draw loss against size in, such as curve.png")
    json: bool = option(False, "print the plan as JSON")


def derive(o, flops_per_hour, price):
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
    if not 1.4e5 <= parameters <= 3e12 or tokens < parameters:  # the sizes of `family`
        size = min(3e12, max(1.4e5, CHINCHILLA.optimum(6 * parameters * tokens)[0]))
        raise UserError(f"no plan has {say_number(parameters)} parameters and {say_number(tokens)} tokens; the nearest "
                        f"possible is {say_number(size)} and {say_number(CHINCHILLA.tokens_for(size))}")
    return parameters, tokens, hours, gpus


def family(parameters, vocab_size, context):
    """The Llama-shaped model nearest to a size, with tied embeddings and a width near 64 times the depth."""
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


def say_number(x):
    """1234567 -> 1.23M."""
    for unit in ("", "k", "M", "B"):
        if x < 999.5:
            return f"{x:.3g}{unit}"
        x /= 1000
    return f"{x:.3g}T"


def round_batch(tokens, unit):
    """The batch nearest to `tokens` that is a power of two of `unit`, a sequence or one on every GPU."""
    return unit * 2 ** round(math.log2(max(tokens, unit) / unit))


def plan_rented(o):
    """All that follows from the limits. The tokens adapt to the exact size of the config so that the compute stays."""
    (peak, memory), price = GPUS[o.device], o.price or 4.0 * (o.device == "H100")
    if not price:
        raise UserError(f"the price of a {o.device} is not known here; give --price in USD an hour")
    mfu = (o.mfu,) * 3 if o.mfu else MFU.get(o.device, MFU["H100"])
    if o.preset and o.parameters:
        raise UserError("a preset has its own size; leave it or --parameters out")
    if o.preset:
        o = replace(o, parameters=count_parameters(PRESETS[o.preset])["active"])
    parameters, tokens, limit, gpus = derive(o, 3600 * peak * mfu[0], price)
    vocab_size = o.vocab_size or (128_256 if parameters >= 1e9 else 49_152 if parameters >= 5e7 else 8192)
    config = PRESETS.get(o.preset) or family(parameters, vocab_size, o.context)
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
                        f"{max(gpus, 16 * count['total'] / room):.0f}, or a shorter --context")
    flops = 6 * active * tokens
    hours, most, least = (flops / 3600 / peak / share for share in mfu)
    bill, spent = hours * (1 + o.overhead), [flops / 2**i for i in range(4)]
    fixed = [active] * 4 if o.parameters or o.tokens else [CHINCHILLA.optimum(compute)[0] for compute in spent]
    fitted = (6 * (active - count["embedding"]) + attention_flops_per_token(config, o.context, "full")) * tokens
    wanted = schedule.deepseek_batch(fitted)
    batch = round_batch(min(wanted, tokens / 100), o.context * gpus)  # 100 steps or so, and a sequence on every GPU
    if batch > 2 * wanted:
        warnings.warn(f"{gpus:,} GPUs make the batch {batch / wanted:.2g} times what the law says: take fewer --gpus")
    steps, rate = max(1, round(tokens / batch)), schedule.deepseek_rate(fitted) * min(1.0, math.sqrt(batch / wanted))
    return {
        "config": config, "parameters": count["total"], "active": active, "tokens": tokens, "flops": flops,
        "batch_tokens": batch, "learning_rate": rate, "steps": steps, "weight_decay": 0.1,
        "warmup_steps": max(1, min(2000, round(0.04 * steps))),  # playbook: 2000, or 1 to 5 % of a short run
        "device": o.device, "gpus": gpus,
        "loss": CHINCHILLA.loss(active, tokens), "unit": "nats a token", "law": CHINCHILLA.source, "sharding": fit[0],
        "memory_per_gpu": fit[1], "mfu": mfu, "gpu_hours": hours, "gpu_hours_range": (least, most),
        "days": hours / gpus / 24, "overhead": o.overhead, "gpu_hours_with_overhead": bill, "price": price,
        "usd": hours * price, "usd_with_overhead": bill * price,
        "sizes": [CHINCHILLA.predict(active * 2 ** (i / 5), tokens / 2 ** (i / 5)) for i in range(-15, 16)],
        "halvings": [CHINCHILLA.predict(size, compute / 6 / size) for size, compute in zip(fixed, spent)]}


def print_rows(title, rows):
    """A table of `LossLaw.predict`, whose losses are compared with the first."""
    print(f"\n{title}:\n{'parameters':>13}{'tokens':>10}{'loss':>8}{'worse by':>10}")
    for row in rows:
        print(f"{say_number(row['parameters']):>13}{say_number(row['tokens']):>10}{row['loss']:8.3f}"
              f"{row['loss'] - rows[0]['loss']:10.3f}{'' if row['fitted'] else '  outside the range of the law'}")


def print_plan(p):
    """A plan of `plan_rented` or `plan_machine` for people."""
    c = p["config"]
    print(f"""\
model        {p['parameters']:,} parameters, vocabulary {c.vocab_size:,}, context {c.max_position_embeddings:,}
             {c.num_hidden_layers} layers of width {c.hidden_size}, MLP {c.intermediate_size}
             {c.num_attention_heads} query and {c.num_key_value_heads} KV heads of {c.head_dim}
tokens       {say_number(p['tokens'])}, {p['tokens'] / p.get('active', p['parameters']):,.3g} a parameter
batch        {p['batch_tokens']:,} tokens, rate {p['learning_rate']:.2g} at its peak
loss         {p['loss']:.3f} {p['unit']} ({p['law']})""")
    if "minutes" in p:
        print(f"machine      {p['machine']}; {p['tokens_per_second']:,.0f} tokens/s (measured now)")
        names = """minutes hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
            initializer_range batch_tokens learning_rate"""  # --minutes alone trains the laptop recipe
        print("train it     python train.py", *(f"--{name} {(vars(c) | p)[name]:.9g}" for name in names.split()))
        return print_rows("The sizes that were measured, best first", sorted(p["sizes"], key=lambda row: row["loss"]))
    gpu, (planned, low, high), (less, more) = p["device"], p["mfu"], p["gpu_hours_range"]
    memory = ", ".join(f"{part} {size / 2**30:.2f} GiB" for part, size in p["memory_per_gpu"].items())
    print(f"""\
steps        {p['steps']:,}, {p['warmup_steps']:,} of warmup; weight decay {p['weight_decay']:g}; {p['flops']:.3g} FLOPs
memory       {p['sharding']} on {p['gpus']:,} {gpu}(s), a sequence at a time
             {memory}
time         {p['gpu_hours']:,.1f} {gpu}-hours at {planned:.0%} of peak by 6ND, {p['days']:,.3g} days
             {less:,.1f} at {high:.0%}, {more:,.1f} at {low:.0%}
whole bill   {p['gpu_hours_with_overhead']:,.1f} {gpu}-hours, {p['overhead']:.0%} more for ablations and restarts
money        {p['usd']:,.0f} USD the run, {p['usd_with_overhead']:,.0f} USD in all, at {p['price']:g} an hour""")
    print_rows("This budget, and each time half of it", p["halvings"])
    print_rows("This size, and each time half of it, at equal compute", p["sizes"][15::-5])


def plan_machine(machine, minutes, vocab_size):
    """What this machine should train: the size whose loss is lowest by LAPTOP_LAW for the tokens that it is measured to
    read in so many minutes. Batch and rate are the laptop recipe's, scaled with DeepSeek's exponents."""
    context, room, sizes = PRESETS["laptop"].max_position_embeddings, machine_memory(machine.device), []
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
    wanted = 2048 * growth**0.3271
    batch = round_batch(wanted, context)
    LAPTOP_LAW.loss(best["parameters"], best["tokens"])  # warns outside its range
    rate = 3e-3 * growth**-0.1250 * math.sqrt(batch / wanted)
    return best | {"batch_tokens": batch, "learning_rate": rate, "law": LAPTOP_LAW.source, "minutes": minutes,
                   "unit": "bits per byte of held-out text", "machine": machine.reason, "sizes": sizes}


# Active parameters, tokens, GPU, GPU-hours, layers x width of heads (DeepSeek: mean of key, value), context, remark;
# from Llama's model cards, TinyLlama's README, SmolLM3's post, DeepSeek-V3's report.
PUBLISHED = {
    "Llama-2 7B": (6.738e9, 2e12, "A100", 184_320, 32 * 4096, 4096, ""),
    "Llama-2 70B": (68.98e9, 2e12, "A100", 1_720_320, 80 * 8192, 4096, ""),
    "Llama-3.1 8B": (8.030e9, 15e12, "H100", 1.46e6, 32 * 4096, 8192, "an outlier, its cause unpublished"),
    "Llama-3.1 405B": (405.85e9, 15.6e12, "H100", 30.84e6, 126 * 16384, 8192, "large matrices reach more"),
    "SmolLM3 3B": (3.075e9, 11.14e12, "H100", 221_184, 36 * 2048, 4096, "small matrices, 384 GPUs"),
    "TinyLlama 1.1B": (1.100e9, 300e9, "A100", 3456, 22 * 2048, 2048, "16 GPUs: little communication"),
    "DeepSeek-V3": (37e9, 14.8e12, "H800", 2.664e6, 61 * 128 * 160, 4096, "products in FP8: 17 % of that peak")}
SMOLLM3_BILL = {  # GPU-hours (playbook); of the main run's 30 days it trained 24
    "main run, 384 GPUs x 30 days": 276_480, "pretraining ablations, 192 x 15": 69_120,
    "mid-training ablations, 192 x 10": 46_080, "restarts, 384 x 3 + 192 x 4": 46_080}


def print_published():
    """Shows the share of peak that published runs reached, a plan's GPU-hours over theirs, and SmolLM3's bill."""
    print(f"{'':16}{'GPU':>6}{'GPU-hours':>12}{'6N':>8}{'causal':>8}{'full':>8}{'planned':>9}  planned / true hours")
    for name, (active, tokens, device, hours, heads, context, remark) in PUBLISHED.items():
        shares = [(6 * active + attention * heads * context) * tokens / (hours * 3600 * GPUS[device][0])
                  for attention in (0, 6, 12)]
        planned = MFU.get(device, MFU["H100"])[0]
        print(f"{name:16}{device:>6}{hours:12,.0f}" + "".join(f"{share:8.1%}" for share in shares)
              + f"{planned:9.0%}{shares[0] / planned:8.2f}  {remark}")
    print("\n6N leaves attention out. The last column is the spread around a plan's share, at most 21 % but for one.\n")
    for name, hours in SMOLLM3_BILL.items():
        print(f"{name:44}{hours:10,} H100-hours")
    total = sum(SMOLLM3_BILL.values())
    print(f"{'SmolLM3, the whole bill':44}{total:10,} H100-hours, {OVERHEAD:.0%} on top of the main run\n"
          f"At 2.2 to 4 USD an hour: {2.2e-6 * total:.2f} to {4e-6 * total:.2f} million USD")


@dataclass(frozen=True)
class MeasureOptions:
    """Measures this machine's training speed and memory."""
    preset: str = option("laptop", ", ".join(PRESETS), choices=tuple(PRESETS))
    rows: int = option(16, "sequences at a time", 1)
    context: int = option(0, "tokens; 0: the preset's, at most 4096", 0)
    documents: int = option(1, "equal documents a sequence; 0: no document mask", 0)
    seconds: float = option(10.0, "of measuring")
    device: str = option("auto", "auto, cuda, mps or cpu")
    dtype: str = option("auto", "auto, bfloat16 or float32")
    compile: str = option("auto", "auto, true or false")


def measure(o):
    """Prints this machine's training speed, share of peak and memory, beside the prediction."""
    config, context = PRESETS[o.preset], o.context or min(PRESETS[o.preset].max_position_embeddings, 4096)
    machine, before = find_machine(o.device, o.dtype, o.compile), peak_memory("cpu", "VmRSS")
    speed = measure_training(config, machine, o.rows, context, o.documents, o.seconds)
    print(f"machine      {machine.reason}; torch {torch.__version__}; {machine.peak_flops / 1e9:,.0f} GFLOP/s")
    print(f"speed        {speed:,.0f} tokens/s at {o.rows} x {context} tokens, documents: {o.documents or 'no mask'}")
    for counted in ("6N", "causal", "full"):
        share = speed * flops_per_token(config, context / max(1, o.documents), counted) / machine.peak_flops
        print(f"share        {share:6.1%} of peak, counting {counted}")
    memory = training_memory(config, o.rows, context, machine.dtype.itemsize, machine.device, accumulates=False)
    predicted, held = process_memory(memory, machine.device, before), peak_memory(machine.device)
    if held:
        print(f"memory       predicted {predicted / 2**20:,.0f} MiB, measured {held / 2**20:,.0f} MiB at the peak")


def plan(o):
    """Makes, prints and draws a plan."""
    if o.minutes and o != PlanOptions(minutes=o.minutes, vocab_size=o.vocab_size, picture=o.picture, json=o.json):
        raise UserError("--minutes plans for this machine: beside it give --vocab-size, --json and --picture alone")
    if o.picture and not (o.picture.endswith((".png", ".pdf", ".svg")) and draw(o.picture, lambda axes: None)):
        raise UserError("--picture takes a name such as curve.png and needs matplotlib: pip install matplotlib")
    found = plan_machine(find_machine(), o.minutes, o.vocab_size or 8192) if o.minutes else plan_rented(o)

    def paint(axes):
        axes.plot([row["parameters"] for row in found["sizes"]], [row["loss"] for row in found["sizes"]])
        axes.plot(found.get("active", found["parameters"]), found["loss"], "r*", ms=12)  # the plan is a star
        axes.set(xscale="log", xlabel="parameters", ylabel="predicted loss", title=found["law"])

    if o.picture:
        draw(o.picture, paint)
    if o.json:
        print(json.dumps(found, indent=1, default=asdict))
    else:
        print_plan(found)


def main():
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("published", help=print_published.__doc__)
    kinds = {"plan": (plan, PlanOptions), "measure": (measure, MeasureOptions)}
    for name, (_, kind) in kinds.items():
        p = commands.add_parser(name, help=kind.__doc__)
        p.add_argument("preset", nargs="?", help=", ".join(PRESETS))
        add_options(p, kind, without=["preset", "json"])
    commands.choices["plan"].add_argument("--json", action="store_true", help="print the plan as JSON")
    args = parse_options(parser, sys.argv[1:])
    if args.command == "published":
        return print_published()
    command, kind = kinds[args.command]
    check_options(options := kind(**given_options(args, kind)))
    command(options)


if __name__ == "__main__":
    run(main)
