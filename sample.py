"""Sampling: text from a trained model, one token at a time through a KV cache.

The cache keeps the keys and values of what was read, so that a new token costs one column of attention instead of
the whole square; it is the reason why the playbook chooses grouped-query attention.

    python sample.py                                   # the newest run, a sample from nothing
    python sample.py runs/laptop --prompt "def " --samples 3 --temperature 0.7 --top-p 0.9 --seed 1

`--temperature 0` always takes the likeliest token. top-k keeps the k likeliest tokens; top-p (Holtzman et al. 2020)
the likeliest that together reach probability p; min-p (Nguyen et al. 2024) those at least p times as likely as the
likeliest.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, KVCache, ModelError, from_pretrained
from tokenizer import Parser, Tokenizer, UserError, run


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0) -> Tensor:
    """Logits [B, V] divided by the temperature, with -inf where top-k, top-p or min-p exclude a token.

    0, 1 and 0 switch them off. In this order, each looks at the probabilities of what the one before it left; the
    likeliest token always stays.
    """
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the shift changes nothing but overflows
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        surplus = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it already reach p
        surplus[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(-1, index, surplus), -torch.inf)
    return logits


@torch.inference_mode()
def generate(model: GPT, prompt: list[int], max_tokens: int, samples: int = 1, *, temperature: float = 0.8,
             top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0, stop: int | None = None,
             vocab_size: int | None = None) -> Iterator[list[int | None]]:
    """Yields one token id for each of `samples` continuations of the prompt, None for one that has ended.

    Ends after `max_tokens`, or when every sample has produced `stop`, which is not yielded. `vocab_size`: ids from
    there on are never drawn (a padded vocabulary has rows that stand for nothing).
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(len(prompt) + max_tokens)
    tokens = torch.tensor([prompt] * samples, device=device)  # [samples, T], then [samples, 1]
    running = [True] * samples
    for _ in range(max_tokens):
        logits = model(tokens, cache=cache, last_only=True)[:, -1, :vocab_size]  # [samples, V]
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            probabilities = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator)
        ids = tokens[:, 0].tolist()
        running = [alive and id != stop for alive, id in zip(running, ids)]
        if not any(running):
            return
        yield [id if alive else None for alive, id in zip(running, ids)]


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, samples: int = 1, **options) -> list[str]:
    """The continuations of a prompt as text; a document's opening EOS stands before the prompt."""
    ids = [[] for _ in range(samples)]
    for step in generate(model, [tokenizer.eos_id, *tokenizer.encode(prompt)], max_tokens, samples,
                         stop=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, **options):
        for sample, id in zip(ids, step):
            if id is not None:
                sample.append(id)
    return [tokenizer.decode(sample) for sample in ids]


def newest_run(root: str | Path = "runs") -> Path:
    """The run folder whose checkpoint was written last."""
    checkpoints = [p for p in Path(root).glob("*/checkpoints/step-*") if (p / "manifest.json").exists()]
    if not checkpoints:
        raise UserError(f"there is no trained model in {root}/; run `python train.py` first")
    return max(checkpoints, key=lambda p: (p / "manifest.json").stat().st_mtime).parent.parent


def load(folder: str | Path, device: str | None = None) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a run, ready to sample: bf16 on a GPU, fp32 elsewhere."""
    model = from_pretrained(folder).eval()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        model.to(torch.bfloat16).compute_dtype = torch.bfloat16
    return model.to(device), Tokenizer.load(folder)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder or checkpoint (default: the newest run)")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1, help="how many, drawn at once")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: off")
    parser.add_argument("--min-p", type=float, default=0.05, help="0: off")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, good in (("temperature", args.temperature >= 0), ("top-k", args.top_k >= 0), ("samples", args.samples > 0),
                       ("top-p", 0 < args.top_p <= 1), ("min-p", 0 <= args.min_p <= 1), ("max-tokens", args.max_tokens > 0)):
        if not good:
            raise UserError(f"--{name} {getattr(args, name.replace('-', '_'))} is out of range; see `python sample.py --help`")
    folder = Path(args.run) if args.run else newest_run()
    model, tokenizer = load(folder)
    prompt = [tokenizer.eos_id, *tokenizer.encode(args.prompt)]
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt):,} tokens, but {folder} reads at most "
                        f"{model.config.max_position_embeddings - 1:,} and needs room to answer; shorten it")
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
                   stop=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    texts = [[] for _ in range(args.samples)]
    streams = [tokenizer.stream() for _ in range(args.samples)]
    if args.samples == 1:
        print(args.prompt, end="", flush=True)
    for step in generate(model, prompt, min(args.max_tokens, room), args.samples, **options):
        for text, stream, id in zip(texts, streams, step):
            if id is not None:
                text.append(stream([id]))
                if args.samples == 1:
                    print(text[-1], end="", flush=True)
    for number, (text, stream) in enumerate(zip(texts, streams), start=1):
        text.append(stream([], final=True))
        print(text[-1] if args.samples == 1 else f"--- {number}\n{args.prompt}{''.join(text)}")
    if args.max_tokens > room and len(texts[0]) > room:
        print(f"(the context of {model.config.max_position_embeddings} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
    run(main, ModelError)
