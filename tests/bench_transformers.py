"""Speed beside transformers' Llama of the same 12M-parameter shape, in one run: training steps and greedy sampling.

    python tests/bench_transformers.py [--compile]

Training: bf16 products over fp32 weights, fused AdamW, clipping, 16 sequences of 256; theirs under autocast, ours
with document masks of one document a row. Each trains in turn, several rounds, so that a machine whose speed drifts
is fair to both. Sampling: one sequence of 200 greedy tokens, fp32, the two in turn.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model import GPT, ModelConfig
from sample import generate
from schedule import build_optimizer

ROWS, CONTEXT = 16, 256
OURS = ModelConfig(4096, 384, 1152, 6, 6, 2, max_position_embeddings=CONTEXT)
THEIRS = LlamaConfig(vocab_size=4096, hidden_size=384, intermediate_size=1152, num_hidden_layers=6,
                     num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=CONTEXT,
                     tie_word_embeddings=True, use_cache=False)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    ours, theirs = GPT(OURS), LlamaForCausalLM(THEIRS)
    ours.compute_dtype = torch.bfloat16
    if args.compile:
        for layer in ours.model.layers:
            layer.compile(fullgraph=True)
    optimizers = build_optimizer(ours, 1e-3), torch.optim.AdamW(theirs.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(4096, (ROWS, CONTEXT + 1))
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    starts = torch.arange(0, ROWS * CONTEXT + 1, CONTEXT, dtype=torch.int32)

    def our_step() -> None:
        (ours(x, starts, targets=y)[0] / y.numel()).backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

    def their_step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = theirs(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)

    for step in (our_step, their_step) * 2:  # warm up
        step()
    times = {"ours": [], "transformers": []}
    for _ in range(args.rounds):
        for name, step in (("ours", our_step), ("transformers", their_step)):
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    speed = {name: ROWS * CONTEXT / median(t) for name, t in times.items()}
    print(f"training  ours{' compiled' if args.compile else ''} {speed['ours']:,.0f} tok/s, transformers "
          f"{speed['transformers']:,.0f} tok/s: {speed['ours'] / speed['transformers']:.2f} times "
          f"(torch {torch.__version__}, {torch.get_num_threads()} threads)")

    sampler = GPT(OURS).eval()
    theirs.eval()
    prompt, n = tokens[0, :8].tolist(), 200
    times = {"ours": [], "transformers": []}
    for _ in range(5):
        start = time.perf_counter()
        made = len(list(generate(sampler, prompt, n, temperature=0)))
        times["ours"].append((time.perf_counter() - start) / made)
        start = time.perf_counter()
        theirs.generate(torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                        pad_token_id=0, use_cache=True)
        times["transformers"].append((time.perf_counter() - start) / n)
    speed = {name: 1 / median(t) for name, t in times.items()}
    print(f"sampling  ours {speed['ours']:,.0f} tok/s, transformers {speed['transformers']:,.0f} tok/s: "
          f"{speed['ours'] / speed['transformers']:.2f} times (greedy, batch 1, fp32)")


if __name__ == "__main__":
    main()
