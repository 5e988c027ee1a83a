"""Evals: what a model can do, with a standard error and the chance level beside every score.

Bits per byte say how well text is predicted, whatever the tokenizer; tasks say what that is good for. The playbook
asks multiple choice in two ways: cloze (CF), where the choice is taken that the model finds likeliest by character
without seeing the others, gives signal from the start; letters (MCF), where the choices are shown and A, B, C and D
compared, stays at chance until late (MMLU: about 500B tokens at 7B, 6T for SmolLM2 1.7B). Before a task may decide
anything it has to pass four criteria over a run's checkpoints (FineTasks): the score rises with training (Spearman's
correlation of at least 0.5), stands out of its noise (20 times), is off chance (by 3 standard errors), and ranks runs
the same way from checkpoint to checkpoint (Kendall's tau). 1000 questions a task were enough for SmolLM3's ablations.

    python evals.py runs/laptop                              # bits per byte and every built-in task
    python evals.py runs/laptop --tasks arithmetic,my.jsonl:letters --json   # lines of {"context", "choices", "answer"}
    python evals.py runs/laptop-long --tasks recall,position --context 4096 --extend yarn
    python evals.py criteria runs/laptop                     # which tasks give early signal
    python evals.py SmolLM2-135M --harness hellaswag,arc_easy --limit 1000   # pip install lm_eval

What the built-in tasks ask was held out when their data was made. `recall` hides notes in long held-out text (the needle
in a haystack) and asks for one of them, at several lengths and depths; `position` is the loss by place in a document.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data as data_
from data import HELD_OUT, Split
from model import GPT, ModelError, cross_entropy
from sample import EXTENSIONS, Prompter, continue_all, extended, load
from tokenizer import Parser, Tokenizer, UserError, run, uniform

LOGITS = 2**26  # computed at once: 256 MiB in fp32


class Score(NamedTuple):
    """A mean over n examples and its standard error; `chance` is what guessing gives, nan where that has no meaning."""

    mean: float
    stderr: float
    n: int
    chance: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float], chance: float = math.nan) -> "Score":
        """Standard error: the sample's deviation (n - 1) over sqrt(n)."""
        x = np.asarray(list(values), np.float64)
        return cls(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan, len(x), chance)

    def __str__(self) -> str:
        beside = "" if math.isnan(self.chance) else f"   chance {self.chance:.3f}"
        return f"{self.mean:.3f} ± {self.stderr:.3f}{beside}   n {self.n:,}"


# ---- likelihoods ----------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(model: GPT, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each (ids before, ids that follow): log p(what follows | what is before) in nats, and whether every token of
    it is the likeliest one.

    The sequences are packed whole into rows, as documents that do not see each other, so a score does not depend on its
    neighbours. What is longer than the model's context loses its beginning.
    """
    context = model.config.max_position_embeddings
    ids = [(before + after)[-context - 1:] for before, after in pairs]
    sizes = np.array([len(i) - 1 for i in ids])  # the last id is a target only
    if len(ids) == 0:
        return []
    if short := [i for i, (before, after) in enumerate(pairs) if not before or not 0 < len(after) <= context]:
        raise UserError(f"sequence {short[0] + 1} has nothing before what it scores, nothing to score, or more to score than "
                        f"the context of {context} tokens holds")
    width = min(context, max(int(sizes.max()), 1024))
    row, device = data_.best_fit(sizes, width), model.model.embed_tokens.weight.device
    rows: list[list[int]] = [[] for _ in range(row.max() + 1)]
    for i, r in enumerate(row):
        rows[r].append(i)
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(ids)
    at_once = max(1, LOGITS // (width * model.config.vocab_size))
    for first in tqdm(range(0, len(rows), at_once), desc="scoring", leave=False, delay=2, disable=None):
        chosen = rows[first:first + at_once]
        tokens, starts, spans = np.zeros((len(chosen), width), np.int64), [], []
        for r, members in enumerate(chosen):
            ends = np.cumsum([0, *sizes[members]])
            starts.append(ends[:-1] if ends[-1] == width else ends)  # what is left of the row is a document too
            for i, end in zip(members, ends[1:]):
                tokens[r, end - sizes[i]:end] = ids[i][:-1]
                spans.append((i, r * width + end, len(pairs[i][1])))
        most = max(map(len, starts)) * len(starts) + 1
        cu_seqlens = torch.from_numpy(data_.pack_cu_seqlens(starts, width, most)).to(device)
        logits = model(torch.from_numpy(tokens).to(device), cu_seqlens).flatten(0, 1)  # [rows * width, V]
        for i, end, length in spans:
            log_p = logits[end - length:end].float().log_softmax(-1)
            targets = torch.tensor(ids[i][-length:], device=device)
            scores[i] = (log_p.gather(1, targets[:, None]).sum().item(), bool((log_p.argmax(-1) == targets).all()))
    return scores


@torch.no_grad()
def bits_per_byte(model: GPT, tokenizer: Tokenizer, split: Split, tokens: float, rows: int = 8,
                  document_mask: bool = True, documents: int = 0, world=None) -> Score:
    """Bits that the model needs for a byte of held-out text, comparable between tokenizers: the negative log-likelihood of
    every target, each document's end included, over the bytes of the targets' text, for the first `tokens` tokens of
    the split whatever the batch of `rows` is. `documents`: at most so many touch a sequence (0: counted here). `world`: the
    processes (train.World) that take turns, all as often, because a sharded model needs all of them for every batch.

    Standard error of a ratio of sums over the sequences (Cochran): sqrt(n / (n - 1) sum (nats - ratio bytes)^2) / bytes.
    """
    device, context = model.model.embed_tokens.weight.device, model.config.max_position_embeddings
    documents = documents or data_.Packing(split, context).most_documents()
    batches = list(data_.validation_batches(split, context, rows, max(1, round(tokens / context)), documents))
    sizes, sums = np.array(tokenizer.token_bytes), torch.zeros(2, len(batches), rows, dtype=torch.float64)  # bits, bytes
    rank, world_size = (world.rank, world.size) if world else (0, 1)
    for first in range(0, len(batches), world_size):
        mine = first + rank
        batch = batches[min(mine, len(batches) - 1)]
        inputs, targets, starts = (torch.from_numpy(x).to(device) for x in (batch.tokens, batch.targets, batch.cu_seqlens))
        logits = model(inputs, starts if document_mask else None)
        if mine < len(batches):
            for i in range(rows):
                sums[0, mine, i] = cross_entropy(logits[i:i + 1], targets[i:i + 1]).item() / math.log(2)
                sums[1, mine, i] = int(sizes[batch.targets[i][batch.targets[i] >= 0]].sum())
    bits, size = (world.sum(sums) if world else sums).flatten(1)
    n, ratio = int((size > 0).sum()), float(bits.sum() / size.sum())
    error = math.sqrt(n / (n - 1) * (bits - ratio * size).square().sum()) / float(size.sum()) if n > 1 else math.nan
    return Score(ratio, error, n)


# ---- tasks ----------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    context: str
    choices: tuple[str, ...]
    answer: int  # which choice is right


@dataclass
class Task:
    """Questions of one kind. cloze: the likeliest choice by character; letters: the choices are shown and their letters
    compared; exact: the one choice is written as it stands by greedy sampling."""

    name: str
    examples: list[Example] = field(repr=False)
    kind: str = "cloze"

    @property
    def chance(self) -> float:
        return 0.0 if self.kind == "exact" else float(np.mean([1 / len(e.choices) for e in self.examples]))


def read_task(path: str | Path, kind: str = "cloze") -> Task:
    """A task from lines of {"context": text, "choices": [text, text, ...], "answer": number of the right one, from 0}."""
    examples = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            context, choices, answer = entry["context"], entry["choices"], entry["answer"]
            if not (isinstance(context, str) and isinstance(choices, list) and len(choices) > 1 and
                    all(isinstance(c, str) and c.strip() for c in choices) and type(answer) is int
                    and 0 <= answer < len(choices)):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{path} line {number} is not {{"context": text, "choices": [two texts or more], "answer": the '
                            'number of the right one, from 0}') from None
        examples.append(Example(context, tuple(choices), answer))
    if not examples:
        raise UserError(f"{path} holds no questions")
    return Task(Path(path).stem, examples, kind)


def as_letters(example: Example) -> Example:
    """The same question with its choices shown, to be answered by a letter."""
    letters = [chr(ord("A") + i) for i in range(len(example.choices))]
    stem = example.context.rstrip().removesuffix("Answer:").rstrip()
    shown = "\n".join(f"{letter}. {choice.strip()}" for letter, choice in zip(letters, example.choices))
    return Example(f"{stem}\n{shown}\nAnswer:", tuple(letters), example.answer)


def encode_pair(tokenizer: Tokenizer, opening: list[int], context: str, following: str) -> tuple[list[int], list[int]]:
    """ids of a text cut into (before, after): a space goes between where neither side has one, and a token that holds the
    end of the one and the start of the other counts as after, since the model would have to predict it whole."""
    if context and not context[-1].isspace() and not following[:1].isspace():
        following = " " + following
    alone, whole = tokenizer.encode(context), tokenizer.encode(context + following)
    same = next((i for i, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole)))
    return (opening + whole[:same]) or [tokenizer.eos_id], whole[same:]


def evaluate(model: GPT, tokenizer: Tokenizer, tasks: list[Task], opening: list[int] | None = None,
             limit: int = 0) -> dict[str, Score]:
    """{task: score}. `opening`: ids that begin a text (`sample.Prompter.opening`), EOS if None; `limit`: of questions."""
    opening, scores = [tokenizer.eos_id] if opening is None else opening, {}
    for task in tasks:
        examples = task.examples[:limit or None]
        if task.kind == "exact":
            pairs = [encode_pair(tokenizer, opening, e.context, e.choices[e.answer]) for e in examples]
            scores[task.name] = Score.of((exact for _, exact in log_likelihoods(model, pairs)), task.chance)
            continue
        asked = [as_letters(e) for e in examples] if task.kind == "letters" else examples
        pairs = [encode_pair(tokenizer, opening, e.context, choice) for e in asked for choice in e.choices]
        found, right = iter(log_likelihoods(model, pairs)), []
        for e in asked:
            by_character = [next(found)[0] / len(choice.strip()) for choice in e.choices]
            right.append(float(np.argmax(by_character) == e.answer))
        scores[task.name] = Score.of(right, task.chance)
    return scores


def generation_accuracy(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], check: Callable[[int, str], float],
                        max_tokens: int, samples: int = 1, stop: Iterable[int] | None = None, **options) -> Score:
    """Mean of check(number of the prompt, text that the model wrote) over prompts; greedy unless `options` for
    `sample.generate` say otherwise. Several samples of a prompt are averaged before the standard error is taken."""
    options = {"temperature": 0.0, "vocab_size": tokenizer.vocab_size} | options
    room = model.config.max_position_embeddings - max(map(len, prompts))
    if room < 1:
        raise UserError(f"a prompt fills the context of {model.config.max_position_embeddings} tokens; shorten it")
    stop = {tokenizer.eos_id} if stop is None else set(stop)
    made = continue_all(model, prompts, min(max_tokens, room), samples, stop=stop, **options)
    return Score.of((np.mean([check(i, tokenizer.decode(ids)) for ids in texts]) for i, texts in enumerate(made)), 0.0)
