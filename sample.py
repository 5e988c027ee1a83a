"""Sampling: text from a trained model, one token at a time through a KV cache.

The cache keeps the keys and values of what was read, so that a new token costs one column of attention instead of
the whole square; it is the reason why the playbook chooses grouped-query attention.

    python sample.py                                   # the newest run, a sample from nothing
    python sample.py runs/laptop --prompt "def " --samples 3 --temperature 0.7 --top-p 0.9 --seed 1
    python sample.py SmolLM3-3B                        # a downloaded Hugging Face folder: chats if it has a chat template
    python sample.py SmolLM3-3B --chat --prompt "Why is the sky blue?"
    python sample.py runs/laptop --context 1024 --max-tokens 600   # beyond the trained context (--extend yarn)

`--temperature 0` always takes the likeliest token. top-k keeps the k likeliest tokens; top-p (Holtzman et al. 2020)
the likeliest that together reach probability p; min-p (Nguyen et al. 2024) those at least p times as likely as the
likeliest.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import from_pretrained
from model import GPT, KVCache
from tokenizer import ChatFormat, Parser, Tokenizer, UserError, run


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


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row of probabilities [B, V] -> [B, 1]: where the sum from the left passes a random number.

    One random number a row; torch.multinomial draws one a token, which took most of the time of a small model.
    """
    sums = probabilities.cumsum(-1)
    height = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    last = sums.argmax(-1, keepdim=True)  # where the whole is reached: rounding must not lead beyond
    return torch.minimum(torch.searchsorted(sums, height, right=True), last)


@torch.inference_mode()
def generate(model: GPT, prompt: list[int] | list[list[int]], max_tokens: int, samples: int = 1, *,
             temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
             stop: int | Iterable[int] = (), vocab_size: int | None = None) -> Iterator[list[int | None]]:
    """Yields one token id for each of `samples` continuations of the prompt, None for one that has ended.

    Several prompts of one length are continued together, the samples of one before those of the next. Ends after
    `max_tokens`, or when every sample has produced `stop` (one of them), which is not yielded. `vocab_size`: ids from
    there on are never drawn (a padded vocabulary has rows that stand for nothing).
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    prompts = torch.atleast_2d(torch.tensor(prompt, device=device))  # [prompts, T]
    cache = KVCache(prompts.shape[1] + max_tokens)
    tokens = prompts.repeat_interleave(samples, 0)  # [rows, T], then [rows, 1]; rows = prompts * samples
    running, stops = [True] * len(tokens), {stop} if isinstance(stop, int) else set(stop)
    for _ in range(max_tokens):
        logits = model(tokens, cache=cache, last_only=True)[:, -1, :vocab_size]  # [rows, V]
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            probabilities = filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1)
            tokens = draw(probabilities, generator)
        ids = tokens[:, 0].tolist()
        running = [alive and id not in stops for alive, id in zip(running, ids)]
        if not any(running):
            return
        yield [id if alive else None for alive, id in zip(running, ids)]


def continue_all(model: GPT, prompts: list[list[int]], max_tokens: int, samples: int = 1, *, seed: int = 0,
                 at_once: int = 128, **options) -> list[list[list[int]]]:
    """ids [prompts][samples][at most max_tokens] that continue each prompt; the stop token is not among them, so one
    that is shorter has stopped by itself.

    Prompts of one length are drawn together, about `at_once` sequences at a time. Padding to a common length would need
    a mask in every kind of attention; grouping needs nothing.
    """
    made: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in prompts]
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(i)
    count, batch = max(1, at_once // samples), 0
    for group in groups.values():
        for first in range(0, len(group), count):
            chosen = group[first:first + count]
            rows = [ids for i in chosen for ids in made[i]]
            for step in generate(model, [prompts[i] for i in chosen], max_tokens, samples, seed=seed + 1_000_003 * batch,
                                 **options):
                for ids, id in zip(rows, step):
                    if id is not None:
                        ids.append(id)
            batch += 1
    return made


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, samples: int = 1, **options) -> list[str]:
    """The continuations of a prompt as text; a document's opening EOS stands before the prompt."""
    made = continue_all(model, [[tokenizer.eos_id, *tokenizer.encode(prompt)]], max_tokens, samples,
                        stop=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, **options)
    return [tokenizer.decode(ids) for ids in made[0]]


def newest_run(root: str | Path = "runs") -> Path:
    """The run folder whose checkpoint was written last."""
    checkpoints = [p for p in Path(root).glob("*/checkpoints/step-????????") if (p / "manifest.json").exists()]
    if not checkpoints:
        raise UserError(f"there is no trained model in {root}/; run `python train.py` first")
    return max(checkpoints, key=lambda p: (p / "manifest.json").stat().st_mtime).parent.parent


def load(folder: str | Path, device: str | None = None) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a run or of a Hugging Face folder, ready to sample: bf16 on a GPU, fp32 elsewhere."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = from_pretrained(folder, dtype).eval()
    model.compute_dtype = dtype
    return model.to(device), Tokenizer.load(folder)


EXTENSIONS = ("dual_chunk", "yarn", "rope")  # rope: as it is, for comparison


def extended(model: GPT, context: int, by: str = "dual_chunk") -> GPT:
    """The same weights reading `context` tokens through dual chunk attention, YaRN or RoPE as it is, without training."""
    trained = model.config.max_position_embeddings
    if model.config.position != "rope":
        raise UserError(f"--context {context} goes beyond the trained {trained} tokens, which needs plain RoPE, not "
                        f"{model.config.position}")
    with torch.device("meta"):
        longer = GPT(model.config.change(position=by, original_max_position_embeddings=trained,
                                         rope_factor=context / trained, max_position_embeddings=context)).eval()
    longer.load_state_dict(model.state_dict(), assign=True)
    longer.compute_dtype = model.compute_dtype
    return longer


def speak(model: GPT, tokenizer: Tokenizer, prompt: list[int], max_tokens: int, **options) -> str:
    """Prints one continuation while it is made, and returns it."""
    stream, parts = tokenizer.stream(), []
    for (id,) in generate(model, prompt, max_tokens, **options):
        parts.append(stream([id]))
        print(parts[-1], end="", flush=True)
    parts.append(stream([], final=True))
    print(parts[-1])
    return "".join(parts)


def chat(model: GPT, tokenizer: Tokenizer, chat_format: ChatFormat, question: str, max_tokens: int, **options) -> None:
    """Answers a question, or, without one, line after line of standard input until it ends."""
    messages: list[dict[str, str]] = []
    while True:
        if not (said := question):
            try:
                said = input("> ").strip()
            except EOFError:
                return print()
            if not said:
                continue
        messages.append({"role": "user", "content": said})
        prompt = chat_format.prompt(messages)
        room = model.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise UserError(f"the conversation has {len(prompt):,} tokens, but the model reads at most "
                            f"{model.config.max_position_embeddings - 1:,}; start a new one")
        messages.append({"role": "assistant", "content": speak(model, tokenizer, prompt, min(max_tokens, room), **options)})
        if question:
            return


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder, checkpoint or Hugging Face folder (default: the newest run)")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="answer --prompt, or what is typed, in the model's chat format")
    parser.add_argument("--context", type=int, default=0, help="tokens to read and write, beyond the trained context by "
                        "--extend (0: the trained context)")
    parser.add_argument("--extend", choices=EXTENSIONS, default="dual_chunk", help="how to read beyond the trained context")
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
    if args.context > model.config.max_position_embeddings:
        model = extended(model, args.context, args.extend)
    chat_format = ChatFormat(folder, tokenizer)
    options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed,
                   stop=chat_format.stop, vocab_size=tokenizer.vocab_size)
    if args.chat and args.samples > 1:
        raise UserError("a chat has one answer; leave --samples out")
    if args.chat or chat_format.template and not args.prompt and args.samples == 1:
        return chat(model, tokenizer, chat_format, args.prompt, args.max_tokens, **options)
    prompt = chat_format.text(args.prompt)
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt):,} tokens, but {folder} reads at most "
                        f"{model.config.max_position_embeddings - 1:,} and needs room to answer; shorten it")
    if args.samples == 1:
        print(args.prompt, end="", flush=True)
        texts = [speak(model, tokenizer, prompt, min(args.max_tokens, room), **options)]
    else:
        made = continue_all(model, [prompt], min(args.max_tokens, room), args.samples, at_once=args.samples, **options)
        texts = [tokenizer.decode(ids) for ids in made[0]]
        for number, text in enumerate(texts, start=1):
            print(f"--- {number}\n{args.prompt}{text}")
    if args.max_tokens > room and max(len(tokenizer.encode(text)) for text in texts) >= room:
        print(f"(the context of {model.config.max_position_embeddings} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
