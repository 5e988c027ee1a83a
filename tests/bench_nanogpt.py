"""The yardstick for the laptop recipe: nanoGPT's CPU recipe on the same code, for as many training seconds.

    python tests/bench_nanogpt.py runs/laptop

nanoGPT's README trains characters on a CPU with 4 layers, width 128, 4 heads, context 64, batch 12, no dropout, fp32,
AdamW 0.9 / 0.99 at 1e-3, 100 steps of warmup and a cosine to 1e-4. This builds that model (GPT-2's: LayerNorm, GELU,
learned positions, tied embeddings, no biases), trains it on the code of data/laptop for as long as the run trained,
and compares bits per byte on all the held-out code.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import evals
from checkpoint import Log, from_pretrained
from data import load_source, held_out_batches
from tokenizer import Tokenizer
from train import read_recipe

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 128, 4, 64, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * LAYERS) if name.endswith(("out.weight", "down.weight")) else 0.02
                )

    def forward(self, x):
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(h)), self.tokens.weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, help="train this long instead of as long as the run")
    args = parser.parse_args()
    recipe = read_recipe(args.run)[0]
    seconds = args.seconds or [entry for entry in Log(args.run).entries() if "val" in entry][-1]["train_seconds"]
    tokenizer = Tokenizer.load(args.run)
    splits = load_source(Path(recipe.data) / "code", tokenizer)
    text = tokenizer.decode(splits["train"].tokens[:].tolist()).replace("<|endoftext|>", "\n")
    context, val = recipe.model.max_position_embeddings, splits["val"]
    sequences = len(val.tokens) // context
    held_out = "".join(tokenizer.decode(row[row >= 0].tolist())
                       for batch in held_out_batches(val, context, 8, sequences) for row in batch.targets)
    ours = evals.bits_per_byte(from_pretrained(args.run).eval(), tokenizer, val, sequences * context).mean
    held_out = held_out.replace("<|endoftext|>", "\n")
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    train = torch.tensor([index[c] for c in text])
    unknown = sum(c not in index for c in held_out)  # left out of the text, in nanoGPT's favour
    val = torch.tensor([index[c] for c in held_out if c in index])

    torch.manual_seed(0)
    model = CharacterModel(len(index))
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
         {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.99))
    used, step, bar = 0.0, 0, tqdm(total=round(seconds), unit="s", mininterval=2)
    while used < seconds:  # the schedule follows the time, whose end is known, instead of a number of steps
        start = time.perf_counter()
        rate = 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * used / seconds))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100)
        at = torch.randint(len(train) - CONTEXT, (BATCH,))
        rows = train[at[:, None] + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        used, step = used + time.perf_counter() - start, step + 1
        bar.update(min(round(used), bar.total) - bar.n)
    bar.close()
    with torch.no_grad():
        n = (len(val) - 1) // CONTEXT
        x, y = val[: n * CONTEXT].view(n, CONTEXT), val[1 : n * CONTEXT + 1].view(n, CONTEXT)
        nats = sum(
            F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item()
            for a, b in zip(x.split(256), y.split(256))
        )
    theirs = nats / math.log(2) / len(held_out[: n * CONTEXT].encode())
    print(
        f"nanoGPT's recipe: {step:,} steps, {step * BATCH * CONTEXT:,} characters in {used:.0f} s, {theirs:.3f} bits "
        "per "
        f"byte on {len(held_out):,} held-out characters of code ({unknown} unknown ones left out)"
    )
    print(f"{args.run}: {ours:.3f} bits per byte on the same text, {1 - ours / theirs:.1%} fewer")


if __name__ == "__main__":
    main()
