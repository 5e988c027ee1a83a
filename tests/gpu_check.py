"""What only a GPU can show, settled on one H100 or H200 by three commands of about 8 minutes each:

    python tests/gpu_check.py kernels --out results    # attention, DeltaNet and experts against definitions in fp64
    python tests/gpu_check.py speed --out results      # share of peak, memory beside the prediction, kernels, decoding
    python tests/gpu_check.py training --out results   # waits, recompilations, deterministic, post-training, saving

Each prints a table and writes gpu_check_NAME.json after every item. An item that fails is a row with its error, and
one that would begin after --minutes is a row that says so. Targets: 124M at 1,024 tokens 42 % of the peak, 1B at 4,096
tokens with document masks 52 %. --dry runs a miniature of every item on a CPU; its numbers mean nothing.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo.utils

import cost
import sample
import train
from checkpoint import Saver, load_checkpoint
from data import Stage
from model import GPT, PRESETS, ModelConfig, MoE, document_attention, gated, gated_delta_rule
from schedule import build_optimizer
from tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent
FORMULA = ("MFU = tokens/s x cost.flops_per_token(config, tokens of a document), causal attention counted, / the data "
           "sheet's dense bf16 peak in cost.GPUS")
SMALL = ModelConfig(50304, 768, 2048, 12, 12, 12, 0, 1024)  # 124M, GPT-2's size
LARGE = replace(PRESETS["llama-3.2-1b"], position="rope", rope_theta=5e4, max_position_embeddings=4096)
TINY = ModelConfig(256, 64, 128, 2, 4, 2, 0, 64)
HYBRID = ModelConfig(50304, 1024, 3072, 8, 16, 4, 128, 4096, layer_types="linear,linear,linear,full")


def pick(real, miniature):
    """`real` on a GPU, its miniature in a dry run."""
    return miniature if DRY else real


def row(case, value, unit="", good=None):
    """A line of the table: `good` is None where nothing was promised."""
    return {"case": case, "value": value, "unit": unit, "good": good}


def wait():
    if not DRY:
        torch.cuda.synchronize()


def milliseconds(work, times=3):
    """The best of a few, after one to warm up."""
    best = math.inf
    for i in range(times + 1):
        wait()
        start = perf_counter()
        work()
        wait()
        best = min(best, perf_counter() - start) if i else best
    return 1000 * best


def start_memory():
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def error(found, exact):
    """The norm of the difference over the norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def built(config):
    """A model with new weights, made on the device: a CPU takes long for a billion random numbers."""
    with torch.device(DEVICE):
        return GPT(config)


def machine():
    return train.cost.Machine(DEVICE, DTYPE, True, cost.GPUS.get(gpu(), (1e12, 0))[0], "")


def gpu():
    name = "none" if DRY else torch.cuda.get_device_name()
    return next((part for part in cost.GPUS if part in name), name)


def command(*words):
    """A command of this project in a process of its own, in a dry run in this one: seconds and what it printed."""
    start, words = perf_counter(), list(map(str, words))
    if DRY:
        from conftest import call  # only here: it sets variables of the environment

        done = call(importlib.import_module(words[0].removesuffix(".py")).main, *words[1:])
    else:
        done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stdout + done.stderr)[-300:]}")
    return perf_counter() - start, done.stdout


# ---- kernels --------------------------------------------------------------------------------------------------

def cuda_tests():
    """1. The tests that need a GPU."""
    words = pick(["-n", "0", "-q", "-m", "cuda"], ["--version"])
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    yield row("pytest -m cuda: " + done.stdout.strip()[-80:], done.returncode, "status", done.returncode == 0)


def exact_attention(q, k, v, documents, window, sink):
    """The definition in fp64, document by document."""
    out = []
    q, k, v = (x.double().transpose(0, 1) for x in (q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1)
                                                          for x in (k, v))))
    for q, k, v in zip(*(x.split(documents, 1) for x in (q, k, v))):
        apart = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(q.shape[1], device=q.device)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill((apart < 0) | (apart >= (window or 10**9)), -torch.inf)
        scores = torch.cat((scores, sink.double().view(-1, 1, 1).expand(*scores.shape[:2], 1)), -1)
        out.append(scores.softmax(-1)[..., :-1] @ v)
    return torch.cat(out, 1).transpose(0, 1)


def starts_of(documents, padded=0):
    ends = torch.tensor([0, *documents]).cumsum(0).int()
    return torch.cat((ends, ends[-1:].expand(max(0, padded - len(ends))))).to(DEVICE)


def attention_is_exact():
    """2. document_attention, its outputs and gradients."""
    documents = pick([700, 1, 299, 24], [20, 1, 11])
    for implementation in implementations():
        for D in pick((64, 128, 192, 256), (16,)):
            for groups in (1, 4, 8):
                for window, sinks in ((0, False), (128, False), (0, True), (100, True)):
                    q, k, v = (torch.randn(sum(documents), heads, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
                               for heads in (8, groups, groups))
                    sink = torch.full((8,), 1.0 if sinks else -1e4, device=DEVICE, requires_grad=True)
                    inputs = [q, k, v] + [sink] * sinks
                    found = document_attention(q, k, v, starts_of(documents, 16), sum(documents), window,
                                               sink if sinks else None)
                    exact = exact_attention(q, k, v, documents, window, sink)
                    grad = torch.randn_like(found)
                    pairs = zip(torch.autograd.grad(found, inputs, grad),
                                torch.autograd.grad(exact, inputs, grad.double()))
                    worst = max(error(found, exact), *(error(a, b.double()) for a, b in pairs))
                    yield row(f"{implementation}: D {D}, {groups} KV heads, window {window}, sinks {sinks}", worst,
                              "relative", worst < 0.02)


def implementations():
    """FA2, which torch brings, then FA3 and FA4 where they are installed; an ordinary loop sees one after another."""
    yield "default"
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    for name in ("FA3", "FA4") if activate and not DRY else ():
        try:
            activate(name)
        except Exception as missing:
            print(f"          {name} is not here: {str(missing)[:80]}")
            continue
        try:
            yield name
        finally:
            torch.nn.attention.restore_flash_attention_impl()


def attention_of_many_documents():
    """2. Time and bytes of a forward and a backward pass over one batch cut into more and more documents."""
    N, heads, groups, D = pick((65_536, 16, 4, 128), (256, 4, 2, 16))
    for implementation in implementations():
        for count in pick((16, 100, 1000, 10_000, 65_000), (4, 32)):
            documents = [N // count] * (count - 1) + [N - (count - 1) * (N // count)]
            q, k, v = (torch.randn(N, h, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
                       for h in (heads, groups, groups))
            starts = starts_of(documents, 1 << count.bit_length())
            start_memory()
            spent = milliseconds(lambda: document_attention(q, k, v, starts, min(N, 4096), 0).sum().backward())
            yield row(f"{implementation}: {N:,} tokens, {count:,} documents", spent, "ms")
            yield row(f"{implementation}: {N:,} tokens, {count:,} documents", cost.peak_memory(DEVICE) / 2**30, "GiB")


def deltanet():
    """7. The chunked rule against the recurrence in fp64, and a training step of a hybrid."""
    T = pick(512, 70)
    q, k, v = (torch.randn(1, T, 4, 64, device=DEVICE) for _ in range(3))
    k, decay, beta = k / k.norm(dim=-1, keepdim=True), -torch.rand(1, T, 4, device=DEVICE), torch.rand(
        1, T, 4, device=DEVICE)
    state, exact = torch.zeros(1, 4, 64, 64, device=DEVICE, dtype=torch.float64), []
    for qt, kt, vt, dt, bt in zip(*(x.double().unbind(1) for x in (q, k, v, decay, beta))):
        state = state * dt.exp()[..., None, None]
        written = bt[..., None] * (vt - torch.einsum("bhkv,bhk->bhv", state, kt))
        state = state + torch.einsum("bhk,bhv->bhkv", kt, written)
        exact.append(torch.einsum("bhkv,bhk->bhv", state, qt))
    found, _ = gated_delta_rule(q, k, v, decay, beta, torch.zeros(1, 4, 64, 64, device=DEVICE))
    off = error(found, torch.stack(exact, 1))
    yield row("chunks against the recurrence", off, "relative", off < 1e-2)
    config, start = pick(HYBRID, replace(TINY, layer_types="linear,full")), perf_counter()
    speed, eager = trained(config, 1, 1, pick(5.0, 0.0))
    yield row("hybrid: seconds until measured, compilation included", perf_counter() - start, "s")
    yield row(f"hybrid: training{eager}", speed, "tokens/s", False if eager else None)


def experts():
    """7. 64 experts, 6 a token, against a loop over experts in fp64; and their time."""
    config = pick(ModelConfig(1024, 2048, 6144, 2, 16, 4, num_experts=64, num_experts_per_tok=6),
                  replace(TINY, num_experts=64, num_experts_per_tok=6, moe_intermediate_size=16))
    moe = MoE(config).to(DEVICE)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x = torch.randn(1, pick(8192, 64), config.hidden_size, device=DEVICE).to(DTYPE)
    with torch.no_grad():
        weights, index, *_ = moe.gate(x[0])
        exact = torch.zeros_like(x[0], dtype=torch.float64)
        for e in range(64):
            token, place = (index == e).nonzero(as_tuple=True)
            gate, up = (x[0, token].double() @ moe.experts.gate_up_proj[e].double().T).chunk(2, -1)
            y = gated(gate, up, config) @ moe.experts.down_proj[e].double().T
            exact.index_add_(0, token, y * weights[token, place].double()[:, None])
        off = error(moe(x)[0], exact)
    yield row("experts against a loop", off, "relative", off < 0.02)
    yield row(f"experts: forward and backward of {x.shape[1]:,} tokens",
              milliseconds(lambda: moe(x).float().square().mean().backward()), "ms")


# ---- speed ----------------------------------------------------------------------------------------------------

def trained(config, rows, documents, seconds):
    """Tokens/s of full compiled steps. Where the compiler fails, cost.py measures without it: then also ", not compiled
    ...", for the name of a row that is to fail."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        speed = cost.measure_training(config, machine(), rows, config.max_position_embeddings, documents, seconds)
    _, failed, why = said.getvalue().partition("compile   off: ")
    return speed, f", not compiled: {' '.join(why.split())}" if failed else ""


def measured(what, config, rows, documents, target=None):
    """Rows of a full training step: share of peak, and the peak of memory beside the prediction."""
    start_memory()
    context = config.max_position_embeddings
    speed, eager = trained(config, rows, documents, pick(6.0, 0.0))
    share = speed * cost.flops_per_token(config, context / max(1, documents)) / machine().peak_flops
    case, good = f"{what}: {rows} x {context:,} tokens, {documents} documents a row", False if eager else None
    yield row(case + eager, speed, "tokens/s", good)
    yield row(case + eager, share, "MFU", good if eager or target is None else share >= target)
    held = cost.peak_memory(DEVICE)
    predicted = cost.training_memory(config, rows, context, DTYPE.itemsize, DEVICE, accumulates=False)["total"]
    yield row(case + ", peak memory" + eager, held / 2**30, "GiB", good)
    yield row(case + ", predicted memory over measured" + eager, predicted / held, "",
              good if eager else pick(abs(predicted / held - 1) < 0.15, None))


def step_of(name, config, documents, rows, target):
    """4. One size: as it is, then twice as many rows until memory is full, which the JSON calls an end, no error."""
    try:
        while rows <= pick(256, 2):
            yield from measured(name, config, rows, documents, target)
            rows *= 2
    except torch.OutOfMemoryError:
        yield row(f"{name}: memory is full at {rows} rows", rows, "rows")


def small_step():
    """4. 124M at 1,024 tokens, no mask."""
    yield from step_of("124M", pick(SMALL, TINY), 0, pick(16, 2), pick(0.42, None))


def large_step():
    """4. 1B at 4,096 tokens with document masks."""
    yield from step_of("1B", pick(LARGE, TINY), 4, pick(1, 2), pick(0.52, None))


def other_kernels():
    """4. The same 1B step by FA3 or FA4."""
    for name in implementations():
        if name != "default" or DRY:
            yield from measured(f"1B, {name}", pick(LARGE, TINY), 2, 4)


def kernels_by_time():
    """4. Where a step spends its time: ten kernels of each size."""
    for name, config, rows, documents in (("124M", SMALL, 16, 0), ("1B", LARGE, 2, 4)):
        config = pick(config, TINY)
        _, eager = trained(config, rows, documents, 0.0)  # compiles
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[pick(kinds.CUDA, kinds.CPU)]) as profile:
            trained(config, rows, documents, 0.0)
        spent = {event.key: pick(event.self_device_time_total, event.self_cpu_time_total)
                 for event in profile.key_averages()}
        for kernel in sorted(spent, key=spent.get, reverse=True)[:10]:
            yield row(f"{name}: {kernel[:60]}{eager}", spent[kernel] / max(1e-9, sum(spent.values())), "of the time",
                      False if eager else None)


def decoding():
    """3. 100 tokens of a 1B model, one at a time: by cuDNN's attention, without it, and by the compiled step."""
    model = built(pick(LARGE, TINY)).to(DTYPE).eval()
    model.compute_dtype = DTYPE
    for compiled, cudnn in ((False, True), (False, False), (True, False)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for prompt in pick((16, 2048), (4,)):
            tokens = sample.generate(model, [1] * prompt, pick(104, 14), temperature=0, compile=compiled)
            for _ in range(4):  # the prompt's; the one that compiles; a CUDA graph's recording; its first replay
                next(tokens)
            wait()
            start = perf_counter()
            count = sum(1 for _ in tokens)
            wait()
            seconds, failed = perf_counter() - start, compiled and not model.step
            way = "not compiled: the compiler failed" if failed else "compiled" if compiled else f"cuDNN {cudnn}"
            yield row(f"1B after {prompt} tokens, {way}", count / seconds, "tokens/s", False if failed else None)


# ---- training -------------------------------------------------------------------------------------------------

def laptop(*flags):
    return train.parse([*BASE, *flags])[1]


def waits():
    """5. How often three updates make the host wait for the GPU."""
    run = train.set_up(laptop("--tokens", "100k", "--compile", "true"), Path("runs/none"))
    run.parallel = run.model
    train.update(run, train.pretraining_losses(run, 0), 1e-4)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if not DRY:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for run.step in (1, 2, 3):
                train.update(run, train.pretraining_losses(run, run.step), 1e-4)
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]
    yield row(f"waits in three updates {sorted(set(found))[:5]}", len(found), "waits", not found)


def recompilations():
    """5. Graphs made by a run with evaluations and a second stage: blocks for each context, and one for the loss."""
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    before, context = stats["unique_graphs"], laptop().model.max_position_embeddings
    recipe, stage = laptop("--compile", "true", "--eval-every", "5"), pick(20, 5) * laptop().batch_tokens
    recipe = replace(recipe, tokens=0, stages=(Stage("first", stage, {}), Stage("longer", stage, {}, 2 * context)))
    train.pretrain(recipe, Path("runs/stages"))
    graphs = stats["unique_graphs"] - before
    yield row("graphs of all steps and evaluations in 2 contexts", graphs, "graphs", graphs == 3)


def deterministic():
    """6. --deterministic true, twice: the same losses."""
    losses = []
    for name in pick(("a", "b"), ("a",)):
        seconds, _ = command("train.py", *BASE, "--tokens", LENGTH, "--deterministic", "true", "--name", name)
        lines = Path(f"runs/{name}/log.jsonl").read_text("utf-8").splitlines()
        losses.append([entry["loss"] for entry in map(json.loads, lines) if "loss" in entry])
        yield row(f"--deterministic true, run {name}", seconds, "s")
    yield row("losses of both are equal", float(losses[0] == losses[-1]), "", losses[0] == losses[-1])


def post_training():
    """6. sft, dpo and grpo, compiled, from a short run: rows of their own, so that each may fail alone."""
    train.pretrain(laptop("--tokens", LENGTH), Path("runs/base"))
    pairs = [{"prompt": f"What is {i}?", "chosen": "a number " * (1 + i % 5), "rejected": f"{i}"} for i in range(200)]
    turns = [[{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["chosen"]}] for p in pairs]
    for name, lines in (("sft", [{"messages": turn} for turn in turns]), ("dpo", pairs), ("grpo", pairs)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    Path("reward.py").write_text("def score(problem, answer):\n    return answer.count('a') / (1 + len(answer))\n")
    more = {"grpo": ["--reward", "reward.py:score", "--prompts", pick("32", "4"), "--samples", "4"]}
    for method in ("sft", "dpo", "grpo"):
        words = [method, "runs/base", "--data", f"{method}.jsonl", *more.get(method, ()), "--eval-problems", "10",
                 "--max-tokens", pick("56", "8"), "--steps", pick("20", "2"), "--name", method, "--device", DEVICE,
                 "--compile", pick("true", "false")]
        try:
            seconds, said = command("posttrain.py", *words)
            yield row(f"{method}, compiled" + ", but the compiler failed" * ("compile   off" in said), seconds, "s",
                      "compile   off" not in said)
        except RuntimeError as failed:
            yield row(f"{method}: {failed}", 1, "status", False)


def saving():
    """8. A checkpoint of 1B parameters: how long training waits for the copy, the whole save, and a load."""
    model = built(pick(LARGE, TINY))
    model.compute_dtype = DTYPE
    optimizer = build_optimizer(model, 1e-4, dtype=DTYPE)
    tokens = torch.zeros(1, 64, dtype=torch.long, device=DEVICE)
    model(tokens, targets=tokens)[0].backward()
    optimizer.step()
    saver, start = Saver("runs/saved", train_bpe(["a cat"], 261)), perf_counter()
    saver.save(1, model, optimizer, {})
    yield row("1B: training waits for the copy", perf_counter() - start, "s")
    failed = saver.finish()
    yield row(f"1B: the whole save {failed}", perf_counter() - start, "s", not failed)
    start = perf_counter()
    load_checkpoint(Path("runs/saved/checkpoints/step-00000001"), model, optimizer)
    yield row("1B: a load", perf_counter() - start, "s")


# ---- command line ---------------------------------------------------------------------------------------------

COMMANDS = {"kernels": (cuda_tests, attention_is_exact, deltanet, experts, attention_of_many_documents),
            "speed": (small_step, large_step, decoding, kernels_by_time, other_kernels),
            "training": (waits, recompilations, deterministic, post_training, saving)}


def about():
    """What the numbers belong to."""
    return {"device": "CPU, a dry run: no number means anything" if DRY else torch.cuda.get_device_name(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "dtype": str(DTYPE), "mfu": FORMULA, "peak_flops": machine().peak_flops,
            "sizes": {"124M": vars(SMALL), "1B": vars(LARGE)}}


def main():
    global DRY, DEVICE, DTYPE, BASE, LENGTH
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the JSON")
    parser.add_argument("--minutes", type=float, default=8.0, help="no item begins later")
    parser.add_argument("--dry", action="store_true", help="a miniature on the CPU")
    parser.add_argument("--base", default="laptop", help="recipe, or flags of train.py, of the training items")
    args = parser.parse_args()
    DRY, LENGTH = args.dry, "2k" if args.dry else "400k"
    if not DRY and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here; --dry runs a miniature of every item on the CPU")
    DEVICE, DTYPE = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)
    BASE = args.base.split()
    if DRY:
        GPT.compile_blocks = partialmethod(GPT.compile_blocks, backend="eager")
        torch.compile = partial(torch.compile, backend="eager")
    else:
        torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)
    cost.GPT = built
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found, begun = {"about": about(), "rows": []}, perf_counter()
    print(json.dumps(found["about"], default=str)[:300] + "\n")
    with tempfile.TemporaryDirectory(dir=out) as place:
        if (data := Path("data").resolve()).exists():
            (Path(place) / "data").symlink_to(data)
        os.chdir(place)
        for item in COMMANDS[args.command]:
            for line in rows_of(item, begun + 60 * args.minutes):
                found["rows"].append({"item": item.__name__} | line)
                value = line["value"] if isinstance(line["value"], str) else f"{line['value']:,.4g}"
                verdict = {None: "", True: "ok", False: "NOT OK"}[line["good"]]
                print(f"{item.__name__:28}{line['case'][:90]:92}{value:>12} {line['unit']:12}{verdict}", flush=True)
                (out / f"gpu_check_{args.command}.json").write_text(json.dumps(found, indent=1), "utf-8")
        os.chdir(out)
    print(f"\n{out}/gpu_check_{args.command}.json is written; {perf_counter() - begun:.0f} s")


def rows_of(item, deadline):
    """The rows of an item; a row with the error where it fails, or is late."""
    if perf_counter() > deadline:
        yield row("not begun: --minutes were over", "late", good=False)
        return
    try:
        yield from item()
    except Exception as failed:  # whatever it is, the next item is to run
        yield row(f"{type(failed).__name__}: {' '.join(str(failed).split())[:300]}", "error", good=False)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py and cost.py have it
    gc.collect()
    start_memory()


if __name__ == "__main__":
    main()
