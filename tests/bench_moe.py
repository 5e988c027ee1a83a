"""What a mixture of experts costs: the laptop model with 8 experts, two a token, against the dense one of the same
active parameters, step by step in turn.

    python tests/bench_moe.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cost import keep_freed_memory  # noqa: E402
from model import GPT, PRESETS, count_parameters  # noqa: E402


def main() -> None:
    keep_freed_memory()
    tokens, starts = torch.randint(8192, (16, 128)), torch.arange(0, 2049, 64, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        jobs = []
        for config in (PRESETS["laptop"].change(num_experts=8), PRESETS["laptop"]):
            model = GPT(config)
            model.compute_dtype = dtype
            jobs.append((model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), []))
        for _ in range(int(sys.argv[1]) if sys.argv[1:] else 60):
            for model, optimizer, times in jobs:
                begin = time.perf_counter()
                (model(tokens, starts, targets=tokens)[0] / tokens.numel() + model.routing_loss()).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                model.balance_experts()
                times.append(time.perf_counter() - begin)
        moe, dense = (times[1:] for *_, times in jobs)
        print(
            f"{dtype}: experts {statistics.median(moe) * 1e3:.0f} ms, dense {statistics.median(dense) * 1e3:.0f} ms a "
            "step of "
            f"2,048 tokens, {statistics.median(a / b for a, b in zip(moe, dense)):.2f} times; active parameters "
            + ", ".join(f"{count_parameters(model.config)['active']:,}" for model, *_ in jobs)
        )


if __name__ == "__main__":
    main()
