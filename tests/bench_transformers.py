"""Speed beside transformers' Llama of the same shape, in one run: training steps, document masks, greedy sampling.

    python tests/bench_transformers.py [--compile] [--rounds 10] [--only training masks sampling compiled limits]

Training: bf16 products over fp32 weights, fused AdamW, clipping; theirs under autocast; 12M parameters at 16 rows of
256 tokens, and the shape of nanoGPT's CPU recipe. Masks: a step on 2,048 tokens of documents of about 300, each
attending to itself, against one document, both ours. Sampling: 200 greedy tokens.
Compiled: 100 by the compiled step, which takes a minute to compile. Limits: where a step of sampling spends its time,
beside its matrix products alone and one reading of the weights; attention in the laptop's rows by both of its routes.
Everything is timed in turn, several rounds, so that a machine whose speed drifts is fair to both; the figures are
medians.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from cost import keep_freed_memory
from model import GPT, PRESETS, ModelConfig, dense_attention, document_attention, multiply
from sample import generate
from schedule import build_optimizer

MIDDLE = ModelConfig(4096, 384, 1152, 6, 6, 2, max_position_embeddings=256)
NANOGPT = ModelConfig(65, 128, 341, 4, 4, 4, max_position_embeddings=64)  # the SwiGLU of as many weights
SAME = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings""".split()


def theirs_like(config):
    return LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in SAME}, tie_word_embeddings=True))


def in_turn(rounds, **works):
    """{name: median seconds}; each is called twice before."""
    times = {name: [] for name in works}
    for i in range(rounds + 2):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name] += [time.perf_counter() - start] * (i > 1)
    return {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}


def step_of(model, optimizer, loss_of):
    def step():
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
    return step


def our_step(config, x, y, starts, compiled):
    model = GPT(config)
    model.compute_dtype = torch.bfloat16
    if compiled:
        model.compile_blocks()
    return step_of(model, build_optimizer(model, 1e-3), lambda m: m(x, starts, targets=y)[0] / y.numel())


def their_step(config, x, y):
    model = theirs_like(config)

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=x, labels=x, use_cache=False).loss
    return step_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), loss)


def batch(config, rows, context):
    tokens = torch.randint(config.vocab_size, (rows, context + 1))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def training(args):
    for config, rows, context in ((MIDDLE, 16, 256), (NANOGPT, 12, 64)):
        x, y = batch(config, rows, context)
        starts = torch.arange(0, rows * context + 1, context, dtype=torch.int32)
        rounds = args.rounds * (1 if rows == 16 else 20)
        found = in_turn(rounds, ours=our_step(config, x, y, starts, args.compile), theirs=their_step(config, x, y))
        speed = {name: rows * context / seconds for name, seconds in found.items()}
        print(f"training  {rows} x {context}, width {config.hidden_size}: ours{' compiled' * args.compile} "
              f"{speed['ours']:,.0f} tok/s, transformers {speed['theirs']:,.0f}: "
              f"{speed['ours'] / speed['theirs']:.2f} times", flush=True)


def masks(args):
    config, N = MIDDLE.change(max_position_embeddings=2048), 2048
    x, y = batch(config, 1, N)
    torch.manual_seed(0)
    lengths = (torch.distributions.LogNormal(5.3, 0.9).sample((100,)) + 8).long()  # about 300 tokens, some long
    starts = torch.cat((torch.zeros(1), lengths.cumsum(0))).clamp(max=N).int().unique()
    whole = torch.tensor([0, N], dtype=torch.int32)
    found = in_turn(args.rounds, masked=our_step(config, x, y, starts, args.compile),
                    causal=our_step(config, x, y, whole, args.compile), theirs=their_step(config, x, y))
    print(f"masks     a step on {N} tokens of {len(starts) - 1} documents takes {found['masked']:.3f} s, plain causal "
          f"{found['causal']:.3f} s: {found['causal'] / found['masked']:.2f} times; transformers, causal, "
          f"{found['theirs']:.3f} s: {found['theirs'] / found['masked']:.2f} times", flush=True)


def sampling(args):
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 16):
            ours, theirs = GPT(MIDDLE).eval().to(dtype), theirs_like(MIDDLE).eval().to(dtype)
            ours.compute_dtype, n = dtype, 200
            prompt = torch.randint(MIDDLE.vocab_size, (rows, 8))
            found = in_turn(max(2, args.rounds // 2),
                            ours=lambda: list(generate(ours, prompt.tolist(), n, temperature=0)),
                            theirs=lambda: theirs.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                                           pad_token_id=0, use_cache=True))
            speed = {name: rows * n / seconds for name, seconds in found.items()}
            print(f"sampling  greedy, batch {rows}, {str(dtype)[6:]}: ours {speed['ours']:,.0f} tok/s, transformers "
                  f"{speed['theirs']:,.0f}: {speed['ours'] / speed['theirs']:.2f} times", flush=True)


def compiled(args):
    for dtype, rows in (torch.float32, 1), (torch.float32, 16), (torch.bfloat16, 1), (torch.bfloat16, 16):
        model, theirs, n = GPT(MIDDLE).eval().to(dtype), theirs_like(MIDDLE).eval().to(dtype), 100
        model.compute_dtype, prompt = dtype, torch.randint(MIDDLE.vocab_size, (rows, 8))
        start = time.perf_counter()
        list(generate(model, prompt.tolist(), n, temperature=0, compile=True))
        first = time.perf_counter() - start
        found = in_turn(5, ours=lambda: list(generate(model, prompt.tolist(), n, temperature=0, compile=True)),
                        eager=lambda: list(generate(model, prompt.tolist(), n, temperature=0)),
                        theirs=lambda: theirs.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                                                       pad_token_id=0, use_cache=True))
        speed = {name: rows * n / seconds for name, seconds in found.items()}
        print(f"compiled  greedy, batch {rows}, {str(dtype)[6:]}: ours {speed['ours']:,.0f} tok/s after {first:.0f} s "
              f"of compiling{' that failed' * (not model.step)}, eager {speed['eager']:,.0f}, transformers "
              f"{speed['theirs']:,.0f}: {speed['ours'] / speed['theirs']:.2f} times", flush=True)


def parts_of_a_step(decode, steps):
    """{part: share of a step's time under the profiler}, which slows small operators most; operators; seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        decode()
        seconds = time.perf_counter() - start
    parts, calls = dict.fromkeys(("products", "attention", "norms, elementwise, copies", "argmax"), 0.0), 0
    for event in profile.key_averages():
        part = ("products" if event.key in ("aten::mm", "aten::addmm") else "argmax" if event.key == "aten::argmax" else
                "attention" if "scaled_dot_product" in event.key else "norms, elementwise, copies")
        parts[part] += event.self_cpu_time_total / 1e6 / seconds
        calls += event.count
    return parts | {"Python between them": 1 - sum(parts.values())}, calls / steps, seconds / steps


def limits(args):
    memory = torch.randn(2**24)
    read = memory.nbytes / min(in_turn(10, sum=memory.sum, dot=lambda: torch.dot(memory, memory)).values())
    print(f"limits    a sum over 64 MiB reads {read / 1e9:.0f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        model, n = GPT(MIDDLE).eval().to(dtype), 50
        model.compute_dtype = dtype
        weights = [p.detach() for p in model.parameters() if p.ndim == 2]
        for rows in (1, 16):
            widths = MIDDLE.hidden_size, MIDDLE.intermediate_size
            inputs = {width: torch.randn(rows, width).to(dtype) for width in widths}
            prompt = torch.randint(MIDDLE.vocab_size, (rows, 8)).tolist()

            def products(product):
                return [product(inputs[w.shape[1]], w) for _ in range(5) for w in weights]

            def without():
                with torch.backends.mkldnn.flags(False, None, None):
                    products(F.linear)

            def step():
                list(generate(model, prompt, n, temperature=0))

            ways = {"F.linear": lambda: products(F.linear), "model.multiply": lambda: products(multiply),
                    "F.linear without oneDNN": without}
            with torch.inference_mode():
                found = in_turn(args.rounds, step=step, **ways)
            spent, found = found["step"] / n, {way: found[way] / 5 for way in ways}
            parts, calls, slowed = parts_of_a_step(step, n)
            size, best = sum(w.nbytes for w in weights), min(found, key=found.get)
            print(f"limits    batch {rows}, {str(dtype)[6:]}: a step takes {1e3 * spent:.2f} ms, reading "
                  f"{size / 1e6:.0f} MB of weights {1e3 * size / read:.2f}, its products alone "
                  + ", ".join(f"{1e3 * seconds:.2f} by {way}" for way, seconds in found.items())
                  + f": {found[best] / spent:.0%} of the step\n"
                  f"limits        {slowed * 1e3:.2f} ms under the profiler, {calls:,.0f} operators: "
                  + ", ".join(f"{part} {share:.0%}" for part, share in parts.items()), flush=True)
    heads, groups = (getattr(PRESETS["laptop"], f"num_{name}_heads") for name in ("attention", "key_value"))
    q, k, v = (torch.randn(16, 128, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (heads, groups, groups))
    starts = torch.cat((torch.arange(0, 2048, 40), torch.arange(0, 2049, 128))).unique().int()
    document = torch.searchsorted(starts, torch.arange(2048), right=True).view(16, 1, 128)
    visible = (document.mT == document) & torch.ones(128, 128, dtype=torch.bool).tril()
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    found = in_turn(args.rounds, dense=lambda: dense_attention(q, k, v, visible[:, None]).sum().backward(),
                    flash=lambda: document_attention(*flat, starts, 128).sum().backward())
    print(f"limits    attention forward and backward, 16 rows of 128 in documents of 40: batched products "
          f"{1e3 * found['dense']:.1f} ms, a flash kernel per document {1e3 * found['flash']:.1f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=["training", "masks", "sampling", "compiled", "limits"])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    torch.manual_seed(0)
    keep_freed_memory()  # for both: as in a run of train.py
    for part in args.only:
        globals()[part](args)


if __name__ == "__main__":
    main()
