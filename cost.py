"""Cost: parameters, FLOPs, memory and time, predicted before a run and measured on this machine.

Training a token takes about 6 FLOPs a parameter, 2 forward and 4 backward, so a run costs C = 6ND (playbook). That
leaves out attention's scores, 12 L H D T more for a full square of T tokens, half of that if only the causal half
counts, and in proportion to the documents' squared lengths if attention stays inside them. Shares of peak (MFU)
always say which was counted. SmolLM3: 3.08B parameters, 11.14T tokens, 221,184 H100-hours, 26 % MFU by 6ND.

    python cost.py plan smollm3-3b --tokens 11.1e12 --gpus 384     # FLOPs, memory, hours, money
    python cost.py measure [laptop]                                # this machine's tokens/s and share of its peak
"""

import argparse
import contextlib
import ctypes
import platform
import time
from dataclasses import dataclass

import torch

from model import GPT, PRESETS, ModelConfig, ModelError, count_parameters, cross_entropy
from tokenizer import Parser, UserError, run

# Dense bf16 peak in FLOP/s by a part of the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "H800": 989.4e12, "A100": 312e12, "B200": 2250e12,
              "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "4090": 165.2e12, "3090": 71e12}
USD_PER_GPU_HOUR = (2.2, 4.0)  # an H100, as the brief calibrates it


# ---- FLOPs and memory -----------------------------------------------------------------------------------------


def attention_flops_per_token(config: ModelConfig, length: float, counted: str = "causal") -> float:
    """FLOPs of the scores and the weighted sums for one trained token, forward and backward.

    `length`: how long the attended sequence is (for packed documents sum(len^2) / sum(len)). "full" counts the
    square, 12 L H D T (PaLM, appendix B); "causal" half of it.
    """
    full = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return full if counted == "full" else full / 2


def flops_per_token(config: ModelConfig, length: float, counted: str = "causal") -> float:
    """FLOPs to train one token: 6 x the matmul parameters, plus attention; counted "6N" is 6 x all parameters."""
    count = count_parameters(config)
    if counted == "6N":
        return 6 * count["active"]
    return 6 * count["matmul"] + attention_flops_per_token(config, length, counted)


def training_memory(config: ModelConfig, rows: int, context: int, compute_bytes: int = 2) -> dict[str, float]:
    """Bytes on one device without sharding: fp32 weights, gradients and two AdamW moments; activations that eager
    training keeps for the backward pass of `rows` sequences, estimated from the tensors each block saves."""
    parameters = count_parameters(config)["total"]
    C, M = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    block = 6 * C + 3 * heads + 4 * M  # numbers a token: norms and residuals, q k v around RoPE, the SwiGLU's four
    cast = parameters * compute_bytes if compute_bytes < 4 else 0  # the weights in the compute dtype
    activations = rows * context * (config.num_hidden_layers * block + 3 * config.vocab_size) * compute_bytes + cast
    state = {"weights": 4.0 * parameters, "gradients": 4.0 * parameters, "optimizer": 8.0 * parameters,
             "activations": float(activations)}
    return state | {"total": sum(state.values())}


# ---- this machine ---------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """What a run computes on, and why."""

    device: str  # "cuda", "mps" or "cpu"
    dtype: torch.dtype  # of the matrix products
    compile: bool
    peak_flops: float  # FLOP/s of large matrix products in that dtype
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
        half = matmul_flops(device, torch.bfloat16)
    except (RuntimeError, TypeError):
        return torch.float32, f"float32 ({device} has no bfloat16 here)"
    speeds = f"measured {half / 1e9:.0f} GFLOP/s, float32 {single / 1e9:.0f}"
    if half > 1.2 * single:
        return torch.bfloat16, f"bfloat16 ({speeds})"
    return torch.float32, f"float32 (bfloat16 is no faster: {speeds})"


def measure_speed(model: GPT, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None, seconds: float = 1.0,
                  optimizer: torch.optim.Optimizer | None = None) -> float:
    """Tokens/s of training steps on tokens [B, T]; the weights stay as they are unless there is an optimizer.
    The median of the steps that fit into the time, after one to warm up. Compilation that fails is switched off."""
    device, times, end = tokens.device.type, [], None
    while end is None or time.perf_counter() < end or len(times) < 2:
        synchronize(device)
        start = time.perf_counter()
        try:
            logits = model(tokens, cu_seqlens)
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"compile   off: it failed here ({str(error).strip().splitlines()[0][:100]})")
            model.forget_compilation()
            logits = model(tokens, cu_seqlens)
        (cross_entropy(logits, tokens) / tokens.numel()).backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize(device)
        times.append(time.perf_counter() - start)
        end = end or time.perf_counter() + seconds
    return tokens.numel() / sorted(times[1:])[len(times[1:]) // 2]


# ---- command line ---------------------------------------------------------------------------------------------


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value


def positive_integer(text: str) -> int:
    return int(positive(str(int(text))))


def plan(config: ModelConfig, tokens: float, gpus: int, mfu: float, context: int) -> None:
    count = count_parameters(config)
    total = 6 * count["active"] * tokens
    hours = total / (PEAK_FLOPS["H100"] * mfu * 3600)
    memory = training_memory(config, 1, context)
    print(f"parameters   {count['total']:,} ({count['non_embedding']:,} without embeddings)")
    print(f"FLOPs        6ND = {total:.3g}; a token {flops_per_token(config, context, '6N'):.4g} (6N), "
          f"{flops_per_token(config, context):.4g} (causal attention at {context:,}), "
          f"{flops_per_token(config, context, 'full'):.4g} (full)")
    print("memory       " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in memory.items())
          + f" (one sequence of {context:,} at a time, unsharded)")
    print(f"time         {hours:,.0f} H100-hours at {mfu:.0%} of peak by 6ND = {hours / gpus / 24:,.2f} days on {gpus:,} GPUs")
    print(f"money        {hours * USD_PER_GPU_HOUR[0]:,.0f} to {hours * USD_PER_GPU_HOUR[1]:,.0f} USD "
          f"({USD_PER_GPU_HOUR[0]} to {USD_PER_GPU_HOUR[1]} USD an hour)")


def measure(config: ModelConfig, rows: int, context: int, machine: Machine, documents: int, seconds: float) -> None:
    torch.manual_seed(0)
    model = GPT(config).to(machine.device)
    model.compute_dtype = machine.dtype
    if machine.compile:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
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


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan | measure")
    p = commands.add_parser("plan", help="what a run would cost")
    p.add_argument("preset", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    p.add_argument("--tokens", type=positive, required=True)
    p.add_argument("--gpus", type=positive_integer, default=8)
    p.add_argument("--mfu", type=positive, default=0.3, help="share of an H100's bf16 peak, by 6ND (SmolLM3: 0.26)")
    p.add_argument("--context", type=positive_integer, default=4096)
    p = commands.add_parser("measure", help="this machine's training speed")
    p.add_argument("preset", nargs="?", choices=PRESETS, default="laptop", metavar="PRESET", help=", ".join(PRESETS))
    p.add_argument("--rows", type=positive_integer, default=16, help="sequences at a time")
    p.add_argument("--context", type=positive_integer, default=0, help="default: the preset's, at most 4096")
    p.add_argument("--documents", type=int, default=1, help="equal documents a sequence; 0: no document mask")
    p.add_argument("--seconds", type=positive, default=10)
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    p.add_argument("--compile", default="auto", choices=("auto", "true", "false"))
    args = parser.parse_args()
    config = PRESETS[args.preset]
    if args.command == "plan":
        return plan(config, args.tokens, args.gpus, args.mfu, args.context)
    context = args.context or min(config.max_position_embeddings, 4096)
    if args.documents < 0 or args.documents and context % args.documents:
        raise UserError(f"--documents {args.documents} does not divide the context of {context} tokens")
    measure(config, args.rows, context, find_machine(args.device, args.dtype, args.compile), args.documents, args.seconds)


if __name__ == "__main__":
    run(main, ModelError)
