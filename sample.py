"""Sampling: text from a trained model, one token at a time through a KV cache (small with grouped-query attention).
    python sample.py                                   # the newest run, a sample from nothing
    python sample.py runs/laptop --prompt "def" --samples 3 --temperature 0.7 --top-p 0.9 --seed 1
    python sample.py SmolLM3-3B                        # a Hugging Face folder with a template: --chat --prompt "Why?"
    python sample.py runs/laptop --context 1024 --max-tokens 600   # beyond the trained context (--extend yarn)

Temperature 0 takes the most likely token. top-k keeps the k most likely tokens; top-p (Holtzman et al. 2020) the most
likely that together reach probability p; min-p (Nguyen et al. 2024) those at least p times as likely as the first.
"""

import contextlib
import functools
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenizer import (ChatFormat, Parser, Tokenizer, UserError, add_options, check_options, option, parse_options,
                       read_json, run)

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import from_pretrained, is_hugging_face
from model import GPT, KVCache


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Logits [B, V] divided by the temperature, -inf where top-k, top-p or min-p exclude a token; each applies to what
    the one before it left, as in transformers. The most likely token always stays."""
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / temperature  # the shift prevents an overflow
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


def draw_tokens(probabilities, generator):
    """A token per row of probabilities [B, V] -> [B, 1]: where a running sum passes a random number; on a GPU, where
    sums are not deterministic, the shortest of exponential waiting times."""
    if probabilities.is_cuda:
        waiting = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / waiting).argmax(-1, keepdim=True)
    sums = probabilities.cumsum(-1)
    height = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    last = sums.argmax(-1, keepdim=True)  # where the whole is reached: rounding must not lead beyond
    return torch.minimum(torch.searchsorted(sums, height, right=True), last)


def compiled_step(model, tokens, cache, last_only):
    """The model's logits for tokens [rows, 1] after those in a static KVCache, compiled once for each of its sizes. On
    CUDA a graph, which reads weights where training changes them. Where compiling fails, the model is called."""
    if not torch.is_tensor(cache.length):  # the first token after the prompt
        for stored in itertools.chain(*cache.layers.values()):
            torch._dynamo.mark_static_address(stored)  # a graph writes to it, not to a copy
    # Not a constant, or each token would compile again; a copy, because a graph's next run overwrites what it returns.
    cache.length = torch.as_tensor(cache.length, device=tokens.device).clone()
    if model.step is not False:
        torch._dynamo.config.recompile_limit = 256
        model.step = model.step or torch.compile(model.forward, fullgraph=True, dynamic=False,
                                                 mode="reduce-overhead" if tokens.is_cuda else None)
        try:
            if model.config.num_experts and model.compute_dtype != torch.bfloat16:
                raise UserError("experts need bfloat16")  # the compiler would say it in 100 lines
            torch.compiler.cudagraph_mark_step_begin()
            return model.step(tokens, cache=cache, last_only=last_only)
        except Exception as error:  # a compiler fails in many ways; any other fault comes again without it
            print(f"(sampling is not compiled: {str(error).splitlines()[0][:100]})", file=sys.stderr)
            model.step = False
    return model(tokens, cache=cache, last_only=last_only)


def generate(model, prompt, max_tokens, samples=1, *, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=0, stop=(),
             vocab_size=None, first=None, compile=False):
    """Yields a token id for each of `samples` continuations of the prompt, None for those that have ended, until all
    have produced one of `stop`. Several prompts of one length are continued together, each with its samples in a row.
    Ids from `vocab_size` on are never drawn. `first`: ids that may come first. `compile`: every token after the prompt
    by `compiled_step`; not for weights that FSDP shards. In bf16 it rounds otherwise: a greedy choice may differ."""
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.atleast_2d(torch.tensor(prompt, device=device)).repeat_interleave(samples, 0)
    rows, length = tokens.shape  # then [rows, 1]; rows = prompts * samples
    cache, step, padding = KVCache(length + max_tokens), model, 0
    running = [True] * rows
    # inference_mode is faster, but must not run the first forward pass of a model that FSDP then trains.
    mode = torch.no_grad if torch.distributed.is_initialized() else torch.inference_mode
    # A compiled step cannot say where learned positions end.
    fits = model.config.position != "learned" or cache.capacity <= model.config.max_position_embeddings + 1
    if compile and fits and model.step is not False:
        # One cache is kept, whose addresses a CUDA graph knows; it only grows, so that few steps are compiled. What a
        # text before left in it is masked.
        sizes = max(cache.capacity, model.cache.capacity), max(rows, model.cache.rows)
        if sizes != (model.cache.capacity, model.cache.rows):
            model.cache = KVCache(*(1 << (n - 1).bit_length() for n in sizes))
        cache = model.cache
        cache.length = 0
        step, padding = functools.partial(compiled_step, model), cache.rows - rows
    # For a single row in bf16, oneDNN rearranges the weights; PyTorch's own product reads them as they are.
    own = rows + padding == 1 and model.compute_dtype == torch.bfloat16 and device.type == "cpu"
    for made in range(max_tokens):
        with mode(), torch.backends.mkldnn.flags(not (own and made), None, None):
            logits = (step if made else model)(F.pad(tokens, (0, 0, 0, padding)), cache=cache, last_only=True)
        logits = logits[:rows, -1, :vocab_size]  # [rows, V]
        if first:
            allowed = torch.full_like(logits, -torch.inf)
            allowed[:, first] = logits[:, first]
            logits, first = allowed, None
        tokens = logits.argmax(-1, keepdim=True) if temperature == 0 else draw_tokens(
            filter_logits(logits, temperature, top_k, top_p, min_p).softmax(-1), generator)
        ids = tokens[:, 0].tolist()
        running = [alive and id not in stop for alive, id in zip(running, ids)]
        if not any(running):
            return
        yield [id if alive else None for alive, id in zip(running, ids)]


def continue_all(model, prompts, max_tokens, samples=1, *, seed=0, at_once=128, **options):
    """ids [prompts][samples][at most max_tokens], without the stop token: one that is shorter has stopped by itself.
    Prompts of one length are drawn together, about `at_once` rows at a time, so that no attention needs padding."""
    made, groups, count = [[[] for _ in range(samples)] for _ in prompts], {}, max(1, at_once // samples)
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(i)
    batches = (group[i:i + count] for group in groups.values() for i in range(0, len(group), count))
    for number, batch in enumerate(tqdm(list(batches), "sampling", leave=False, delay=2, disable=None)):
        rows = [ids for i in batch for ids in made[i]]
        for step in generate(model, [prompts[i] for i in batch], max_tokens, samples,
                             seed=seed + 1_000_003 * number, **options):
            for ids, id in zip(rows, step):
                if id is not None:
                    ids.append(id)
    return made


def split_prompt(tokenizer, prompt):
    """A prompt without the spaces at its end, and, if it had some, the ids that may follow: those that begin with a
    space. " word" is one token, so a model never saw a space of its own before a word."""
    text = prompt.rstrip(" ")
    return text, [id for id, size in enumerate(tokenizer.token_bytes)
                  if size and text != prompt and tokenizer.decode_bytes([id])[:1] == b" "]


def complete(model, tokenizer, prompt, max_tokens, **options):
    """Continuations of a prompt as text; EOS, which opens a document, stands before the prompt."""
    text, first = split_prompt(tokenizer, prompt)
    made, = continue_all(model, [[tokenizer.eos_id, *tokenizer.encode(text)]], max_tokens, first=first,
                         stop={tokenizer.eos_id}, vocab_size=tokenizer.vocab_size, **options)
    return [tokenizer.decode(ids).removeprefix(prompt[len(text):]) for ids in made]


def recipe_of(folder):
    """recipe.json of a run, or of the run that a checkpoint is from; {} for other folders."""
    files = (place / "recipe.json" for place in (Path(folder), Path(folder).parent.parent))
    return next((read_json(file) for file in files if file.exists()), {})


def load(folder, device=None):
    """Model and tokenizer of a run or of a Hugging Face folder, ready to sample: bf16 on a GPU, fp32 elsewhere."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for every length of the cache
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = from_pretrained(folder, dtype).eval()
    model.compute_dtype = dtype
    return model.to(device), Tokenizer.load(folder)


def extended(model, context, by="dual_chunk"):
    """The same weights reading `context` tokens, without training; the model itself if its context is that long."""
    trained = model.config.max_position_embeddings
    if context <= trained:
        return model
    if model.config.position != "rope":
        raise UserError(f"--context beyond the trained {trained} tokens needs RoPE, not {model.config.position}")
    config = model.config.change(position=by, original_max_position_embeddings=trained, rope_factor=context / trained,
                                 max_position_embeddings=context)
    with torch.device("meta"):
        longer = GPT(config).eval()
    longer.load_state_dict(model.state_dict(), assign=True)
    longer.compute_dtype = model.compute_dtype
    return longer


def room_after(prompt, model):
    """How many tokens the context holds after a prompt; UserError for none."""
    if (room := model.config.max_position_embeddings - len(prompt)) <= 0:
        raise UserError(f"the prompt's {len(prompt):,} tokens fill the context of the model; shorten it")
    return room


def speak(model, tokenizer, prompt, max_tokens, **options):
    """Prints one continuation while it is made, and returns its ids."""
    stream, ids = tokenizer.stream(), []
    for (id,) in generate(model, prompt, max_tokens, **options):
        ids.append(id)
        print(stream([id]), end="", flush=True)
    print(stream([], final=True))
    return ids


def typed():
    """The lines of standard input, until it ends."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ").strip()
    print()


def chat(model, tokenizer, chat_format, question, max_tokens, **options):
    """Answers a question, or each line that is typed; drops the oldest turns when they leave no room for an answer."""
    messages, context = [], model.config.max_position_embeddings
    for said in filter(None, [question] if question else typed()):
        messages.append({"role": "user", "content": said})
        while len(prompt := chat_format.prompt(messages)) + min(max_tokens, context // 2) > context and messages[1:]:
            print(f"(the context of {context:,} tokens is full: the oldest turn is dropped)", file=sys.stderr)
            del messages[:2]
        answer = speak(model, tokenizer, prompt, min(max_tokens, room_after(prompt, model)), **options)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})


@dataclass
class ContextOptions:
    chat: bool = False
    context: int = option(0, "tokens to read and write, beyond the trained context by --extend", 0)
    extend: str = option("dual_chunk", "how; rope: as it was trained", choices=("dual_chunk", "yarn", "rope"))


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
    compile: str = option("auto", "one compiled step for all tokens; auto: on CUDA", choices=("auto", "true", "false"))


def command_options(parser, kind):
    """The command line as an instance of a dataclass of `option`s, whose other fields the parser's own flags fill."""
    add_options(parser, kind)
    given = vars(parse_options(parser, sys.argv[1:])).items()
    options = kind(**{name: value for name, value in given if value is not None})
    check_options(options)
    return options


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", help="run, checkpoint or Hugging Face folder (default: the newest run)")
    parser.add_argument("--chat", action="store_true", help="answer --prompt, or what is typed, in the chat format")
    asked = command_options(parser, SampleOptions)
    folder = Path(asked.run)
    if not asked.run:
        runs = Path("runs").glob("*/checkpoints/step-????????/manifest.json")
        if not (newest := max(runs, key=lambda path: path.stat().st_mtime, default=None)):
            raise UserError("there is no trained model in runs/; run `python train.py` first")
        folder = newest.parents[2]
        print(f"({folder} is the newest run)", file=sys.stderr)
    model, tokenizer = load(folder)
    model, chat_format = extended(model, asked.context, asked.extend), ChatFormat(folder, tokenizer)
    options = {name: getattr(asked, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    options |= {"stop": chat_format.stop, "vocab_size": tokenizer.vocab_size,
                "compile": asked.compile == "true" or asked.compile == "auto" and torch.cuda.is_available()}
    if asked.chat or chat_format.template and not asked.prompt and asked.samples == 1:
        if asked.samples > 1:
            raise UserError("a chat has one answer; leave --samples out")
        recipe = recipe_of(folder)  # post-training's has a method
        if not chat_format.template and "method" not in recipe and (recipe or is_hugging_face(folder)):
            print(f"({folder} was never trained on chats; `python posttrain.py sft {folder}` does it)", file=sys.stderr)
        return chat(model, tokenizer, chat_format, asked.prompt, asked.max_tokens, **options)
    text, options["first"] = split_prompt(tokenizer, asked.prompt)
    prompt = chat_format.text(text)
    length = min(asked.max_tokens, room_after(prompt, model))
    if asked.samples == 1:
        print(text, end="", flush=True)
        made = [speak(model, tokenizer, prompt, length, **options)]
    else:
        made, = continue_all(model, [prompt], length, asked.samples, **options)
        for number, ids in enumerate(made, 1):
            print(f"--- {number}\n{text}{tokenizer.decode(ids)}")
    if max(map(len, made)) == length < asked.max_tokens:
        print(f"(the context of {model.config.max_position_embeddings} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
