"""Reading beyond the trained context without training: a run's loss by position, with plain RoPE, dual chunk attention
and YaRN, on held-out documents of at least eight contexts.

    python tests/bench_context.py runs/laptop data/laptop/code
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from checkpoint import from_pretrained  # noqa: E402
from model import GPT  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@torch.no_grad()
def main(run: str, source: str) -> None:
    trained = from_pretrained(run).eval()
    n = trained.config.max_position_embeddings
    split = data.load_source(source, Tokenizer.load(run))["val"]
    starts = [int(s) for s in split.starts]
    long = [start for start, end in zip(starts, starts[1:]) if end - start > 8 * n][:24]
    rows = torch.stack([torch.as_tensor(split.tokens[start : start + 8 * n + 1].astype("int64")) for start in long])
    spans = [(0, n // 2), (n // 2, n), (n, 2 * n), (2 * n, 4 * n), (4 * n, 8 * n)]
    print(f"{len(long)} documents; nats a token at positions " + ", ".join(f"{a}-{b}" for a, b in spans))
    for name, change in (
        ("rope", {}),
        ("dual_chunk", {"position": "dual_chunk", "original_max_position_embeddings": n}),
        ("yarn", {"position": "yarn", "rope_factor": 8.0, "original_max_position_embeddings": n}),
    ):
        model = GPT(trained.config.change(**change)).eval()
        model.load_state_dict(trained.state_dict())
        losses = [F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none") for row in rows]
        mean = torch.stack(losses).mean(0)
        print(f"{name:10} " + "  ".join(f"{mean[a:b].mean():.3f}" for a, b in spans))


if __name__ == "__main__":
    main(*sys.argv[1:])
