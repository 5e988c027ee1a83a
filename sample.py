"""Sampling: text from a trained model, one token at a time through a KV cache.

The cache keeps the keys and values of what was read, so that a new token costs one column of attention instead of
the whole square. It is the reason why the playbook chooses grouped-query attention.

    python sample.py                                   # the newest run, a sample from nothing
    python sample.py runs/laptop --prompt "def" --samples 3 --temperature 0.7 --top-p 0.9 --seed 1
    python sample.py SmolLM3-3B                        # a Hugging Face folder: chats if it has a chat template
    python sample.py SmolLM3-3B --chat --prompt "Why is the sky blue?"
    python sample.py runs/laptop --context 1024 --max-tokens 600   # beyond the trained context (--extend yarn)

`--temperature 0` always takes the most likely token. top-k keeps the k most likely tokens; top-p (Holtzman et al. 2020)
the most likely ones that together reach probability p; min-p (Nguyen et al. 2024) those at least p times as likely as
the most likely one.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import from_pretrained, is_hugging_face
from model import GPT, KVCache
from tokenizer import ChatFormat, Parser, Tokenizer, UserError, add_options, check_options, option, parse_options, run


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0) -> Tensor:
    """Logits [B, V] divided by the temperature, with -inf where top-k, top-p or min-p exclude a token.

    0, 1 and 0 switch them off. They apply in this order, each to the tokens that the one before it left, as in
    transformers; the most likely token always stays.
    """
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the shift prevents an overflow, nothing else
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(-1)  # the least likely first
        excluded = ordered.softmax(-1).cumsum(-1) <= 1 - top_p  # the more likely tokens already reach p
        excluded[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(-1, index, excluded), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -torch.inf)  # the most likely token's logit is 0
    return logits


def draw_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of probabilities [B, V] -> [B, 1].

    On a CPU: where the running sum passes one random number (torch.multinomial draws one per token, which took most of
    the time of a small model). On a GPU, where a running sum is not deterministic: every token waits an exponential
    time with its probability as the rate, and the first to arrive is drawn.
    """
    if probabilities.is_cuda:
        waiting = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / waiting).argmax(-1, keepdim=True)
    sums = probabilities.cumsum(-1)
    height = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    last = sums.argmax(-1, keepdim=True)  # where the whole is reached: rounding must not lead beyond
    return torch.minimum(torch.searchsorted(sums, height, right=True), last)


@torch.no_grad()  # not inference_mode: this may be the first forward pass of a model that FSDP then trains
def generate(model: GPT, prompt: list[int] | list[list[int]], max_tokens: int, samples: int = 1, *,
             temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0,
             stop: int | Iterable[int] = (), vocab_size: int | None = None,
             first: list[int] | None = None) -> Iterator[list[int | None]]:
    """Yields one token id for each of `samples` continuations of the prompt, None for one that has ended.

    Several prompts of one length are continued together, the samples of one before those of the next. Ends after
    `max_tokens`, or when every sample has produced `stop` (or one of several), which is not yielded. `vocab_size`: ids
    from there on are never drawn (the rows that pad a vocabulary stand for nothing). `first`: ids that may come first.
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    prompts = torch.atleast_2d(torch.tensor(prompt, device=device))  # [prompts, T]
    cache = KVCache()
    tokens = prompts.repeat_interleave(samples, 0)  # [rows, T], then [rows, 1]; rows = prompts * samples
    running, stops = [True] * len(tokens), {stop} if isinstance(stop, int) else set(stop)
    for _ in range(max_tokens):
        logits = model(tokens, cache=cache, last_only=True)[:, -1, :vocab_size]  # [rows, V]
        if first:
            allowed = torch.full_like(logits, -torch.inf)
            allowed[:, first] = logits[:, first]
            logits, first = allowed, None
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            tokens = draw_tokens(filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1), generator)
        ids = tokens[:, 0].tolist()
        running = [alive and id not in stops for alive, id in zip(running, ids)]
        if not any(running):
            return
        yield [id if alive else None for alive, id in zip(running, ids)]


def continue_all(model: GPT, prompts: list[list[int]], max_tokens: int, samples: int = 1, *, seed: int = 0,
                 at_once: int = 128, **options) -> list[list[list[int]]]:
    """ids [prompts][samples][at most max_tokens] that continue each prompt, without the stop token: one that is shorter
    has stopped by itself.

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
            for step in generate(model, [prompts[i] for i in chosen], max_tokens, samples,
                                 seed=seed + 1_000_003 * batch, **options):
                for ids, id in zip(rows, step):
                    if id is not None:
                        ids.append(id)
            batch += 1
    return made


def split_prompt(tokenizer: Tokenizer, prompt: str) -> tuple[str, list[int]]:
    """A prompt without the spaces at its end, and, if it had some, the ids that may follow: those that begin with a
    space. " word" is one token, so a model never saw a space of its own before a word."""
    text = prompt.rstrip(" ")
    return text, [id for id, size in enumerate(tokenizer.token_bytes)
                  if size and text != prompt and tokenizer.decode_bytes([id])[:1] == b" "]


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, samples: int = 1, **options) -> list[str]:
    """Continuations of a prompt as text; EOS, which opens a document, stands before the prompt."""
    text, first = split_prompt(tokenizer, prompt)
    made = continue_all(model, [[tokenizer.eos_id, *tokenizer.encode(text)]], max_tokens, samples, first=first,
                        stop=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, **options)
    return [tokenizer.decode(ids).removeprefix(prompt[len(text):]) for ids in made[0]]


def newest_run() -> Path:
    """The run folder in runs/ whose checkpoint was written last."""
    manifests = list(Path("runs").glob("*/checkpoints/step-????????/manifest.json"))
    if not manifests:
        raise UserError("there is no trained model in runs/; run `python train.py` first")
    return max(manifests, key=lambda path: path.stat().st_mtime).parents[2]


def recipe_of(folder: str | Path) -> dict:
    """recipe.json of a run, or of the run that a checkpoint is from; {} for other folders."""
    for place in (Path(folder), Path(folder).parent.parent):
        if (place / "recipe.json").exists():
            return json.loads((place / "recipe.json").read_bytes())
    return {}


def load(folder: str | Path, device: str | None = None) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of a run or of a Hugging Face folder, ready to sample: bf16 on a GPU, fp32 elsewhere."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for every length of the cache
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = from_pretrained(folder, dtype).eval()
    model.compute_dtype = dtype
    return model.to(device), Tokenizer.load(folder)


EXTENSIONS = ("dual_chunk", "yarn", "rope")  # rope: unchanged, for comparison


def extended(model: GPT, context: int, by: str = "dual_chunk") -> GPT:
    """The same weights reading `context` tokens through dual chunk attention, YaRN or unchanged RoPE, without training;
    the model itself where its context is that long already."""
    trained = model.config.max_position_embeddings
    if context <= trained:
        return model
    if model.config.position != "rope":
        raise UserError(f"--context {context} goes beyond the trained {trained} tokens, which needs plain RoPE, not "
                        f"{model.config.position}")
    with torch.device("meta"):
        longer = GPT(model.config.change(position=by, original_max_position_embeddings=trained,
                                         rope_factor=context / trained, max_position_embeddings=context)).eval()
    longer.load_state_dict(model.state_dict(), assign=True)
    longer.compute_dtype = model.compute_dtype
    return longer


def room_after(prompt: list[int], model: GPT) -> int:
    """How many tokens the context holds after a prompt; UserError for none."""
    context = model.config.max_position_embeddings
    if len(prompt) >= context:
        raise UserError(f"the prompt has {len(prompt):,} tokens, but the model reads at most {context:,}, its answer "
                        "included; shorten it")
    return context - len(prompt)


def speak(model: GPT, tokenizer: Tokenizer, prompt: list[int], max_tokens: int, **options) -> list[int]:
    """Prints one continuation while it is made, and returns its ids."""
    stream, ids = tokenizer.stream(), []
    for (id,) in generate(model, prompt, max_tokens, **options):
        ids.append(id)
        print(stream([id]), end="", flush=True)
    print(stream([], final=True))
    return ids


def chat(model: GPT, tokenizer: Tokenizer, chat_format: ChatFormat, question: str, max_tokens: int, **options) -> None:
    """Answers a question, or, without one, line after line of standard input until it ends. The oldest turns are
    dropped when they leave no room for an answer of `max_tokens` or half of the context."""
    messages, context = [], model.config.max_position_embeddings
    while True:
        try:
            said = question or input("> ").strip()
        except EOFError:
            return print()
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        prompt = chat_format.prompt(messages)
        while len(messages) > 1 and len(prompt) + min(max_tokens, context // 2) > context:
            print(f"(the context of {context:,} tokens is full: the oldest turn is dropped)", file=sys.stderr)
            del messages[:2]
            prompt = chat_format.prompt(messages)
        answer = speak(model, tokenizer, prompt, min(max_tokens, room_after(prompt, model)), **options)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        if question:
            return


@dataclass
class ContextOptions:
    chat: bool = False
    context: int = option(0, "tokens to read and write, beyond the trained context by --extend", 0)
    extend: str = option("dual_chunk", "how to read beyond the trained context", choices=EXTENSIONS)


@dataclass
class SampleOptions(ContextOptions):
    run: str = ""
    prompt: str = option("", "text to continue")
    max_tokens: int = option(200, "length of a sample or answer", 1)
    samples: int = option(1, "how many, drawn at once", 1)
    temperature: float = option(0.8, "0: greedy", 0)
    top_k: int = option(0, "0: off", 0)
    top_p: float = option(1.0, "1: off", 0, 1)
    min_p: float = option(0.05, "0: off", 0, 1)
    seed: int = option(0, "decides what is drawn", 0)


def command_options(parser: Parser, kind: type):
    """The command line as an instance of a dataclass of `option`s, whose other fields the parser's own flags fill."""
    add_options(parser, kind)
    given = vars(parse_options(parser, sys.argv[1:]))
    options = kind(**{name: value for name, value in given.items() if value is not None})
    check_options(options)
    return options


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run, checkpoint or Hugging Face folder (default: the newest run)")
    parser.add_argument("--chat", action="store_true", help="answer --prompt, or what is typed, in the chat format")
    asked = command_options(parser, SampleOptions)
    folder = Path(asked.run or newest_run())
    if not asked.run:
        print(f"({folder} is the newest run)", file=sys.stderr)
    model, tokenizer = load(folder)
    model, chat_format = extended(model, asked.context, asked.extend), ChatFormat(folder, tokenizer)
    options = {name: getattr(asked, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    options |= {"stop": chat_format.stop, "vocab_size": tokenizer.vocab_size}
    if asked.chat or chat_format.template and not asked.prompt and asked.samples == 1:
        if asked.samples > 1:
            raise UserError("a chat has one answer; leave --samples out")
        recipe = recipe_of(folder)  # post-training's has a method
        if not chat_format.template and "method" not in recipe and (recipe or is_hugging_face(folder)):
            print(f"({folder} was never trained on chats and will babble; "
                  f"`python posttrain.py sft {folder}` trains it on some)", file=sys.stderr)
        return chat(model, tokenizer, chat_format, asked.prompt, asked.max_tokens, **options)
    text, options["first"] = split_prompt(tokenizer, asked.prompt)
    prompt = chat_format.text(text)
    length = min(asked.max_tokens, room_after(prompt, model))
    if asked.samples == 1:
        print(text, end="", flush=True)
        made = [speak(model, tokenizer, prompt, length, **options)]
    else:
        made, = continue_all(model, [prompt], length, asked.samples, at_once=asked.samples, **options)
        for number, ids in enumerate(made, start=1):
            print(f"--- {number}\n{text}{tokenizer.decode(ids)}")
    if max(map(len, made)) == length < asked.max_tokens:
        print(f"(the context of {model.config.max_position_embeddings} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
