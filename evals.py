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
import functools
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
from tqdm import tqdm

import data as data_
from data import HELD_OUT, Split, uniform
from model import GPT, cross_entropy
from sample import EXTENSIONS, continue_all, extended, load
from tokenizer import ChatFormat, Parser, Tokenizer, UserError, run, utf8

LOGITS = {"cpu": 2**24, "cuda": 2**28, "mps": 2**26}  # computed at once; 2^24 are 64 MiB in fp32


class Score(NamedTuple):
    """A mean over n examples and its standard error; `chance` is what guessing gives, nan where that has no meaning."""

    mean: float
    stderr: float
    n: int
    chance: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float], chance: float = math.nan, groups: list[str] | None = None) -> "Score":
        """Standard error: sqrt(G / (G - 1) sum over groups of (their summed deviations)^2) / n, which without `groups`
        (every value one of its own) is the sample's deviation over sqrt(n). Questions about the same thing in other words
        are no independent ones: `groups` names what each is about (cluster-robust errors; Miller 2024)."""
        x = np.asarray(list(values), np.float64)
        sums = np.bincount(np.unique(groups, return_inverse=True)[1] if groups else np.arange(len(x)), x - x.mean())
        error = math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(x) if len(sums) > 1 else math.nan
        return cls(float(x.mean()), error, len(x), chance)

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
        raise UserError(f"sequence {short[0] + 1} has nothing before what it scores, nothing to score, or more than the "
                        f"context of {context} tokens holds")
    width = min(context, max(int(sizes.max()), 1024))
    row, device = data_.best_fit(sizes, width), model.model.embed_tokens.weight.device
    rows: list[list[int]] = [[] for _ in range(row.max() + 1)]
    for i, r in enumerate(row):
        rows[r].append(i)
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(ids)
    at_once = max(1, LOGITS[device.type] // (width * model.config.vocab_size))
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
    about: str = ""  # examples about the same thing are one draw for the standard error; "": about their context


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
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
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
    """ids of a text cut into (before, after). A token that holds the end of the one and the start of the other counts as
    after, since the model has to predict it whole."""
    alone, whole = tokenizer.encode(context), tokenizer.encode(context + following)
    same = next((i for i, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole)))
    return (opening + whole[:same]) or [tokenizer.eos_id], whole[same:]


def spaced(context: str, choice: str) -> str:
    """The choice with a space before it where neither side has white space."""
    return choice if not context or context[-1].isspace() or choice[0].isspace() else " " + choice


def evaluate(model: GPT, tokenizer: Tokenizer, tasks: list[Task], opening: list[int] | None = None,
             limit: int = 0) -> dict[str, Score]:
    """{task: score}. `opening`: ids that begin a text (`tokenizer.ChatFormat.opening`), EOS if None; `limit`: of questions."""
    opening, scores = [tokenizer.eos_id] if opening is None else opening, {}
    for task in tasks:
        examples = task.examples[:limit or None]
        groups = [e.about or e.context for e in examples]
        if task.kind == "exact":
            pairs = [encode_pair(tokenizer, opening, e.context, spaced(e.context, e.choices[e.answer])) for e in examples]
            scores[task.name] = Score.of((exact for _, exact in log_likelihoods(model, pairs)), task.chance, groups)
            continue
        asked = [as_letters(e) for e in examples] if task.kind == "letters" else examples
        pairs = [encode_pair(tokenizer, opening, e.context, spaced(e.context, c)) for e in asked for c in e.choices]
        found, right = iter(log_likelihoods(model, pairs)), []
        for e in asked:
            by_character = [next(found)[0] / len(choice.strip()) for choice in e.choices]
            right.append(float(np.argmax(by_character) == e.answer))
        scores[task.name] = Score.of(right, task.chance, groups)
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


# ---- built-in tasks -------------------------------------------------------------------------------------------
# Made from a seed and from held-out documents, so that they need no network; `texts` are those documents by source.


def shuffled(rng: random.Random, context: str, right: str, wrong: list[str], about: str = "") -> Example:
    choices = rng.sample([right, *wrong], 1 + len(wrong))
    return Example(context, tuple(choices), choices.index(right), about)


def held_out_problems(kinds: str) -> Iterator[tuple[str, str, str]]:
    """(question up to "Answer:", worked answer, the problem without its story) of the math source's held-out problems."""
    for key, problem in data_.generated_math(40_000, seed=1):
        if uniform(key) < HELD_OUT and any(sign in key for sign in kinds):
            question, _, answer = problem.rstrip("\n").partition("Answer:")
            yield question + "Answer:", answer, key


def arithmetic(texts: dict[str, list[str]], count: int) -> list[Example]:
    """Which worked answer belongs to the question: its own, or those of three others of the same kind?"""
    rng, found = random.Random(0), list(dict.fromkeys(held_out_problems("+-*")))
    answers = {sign: [a for q, a, _ in found if f" {sign} " in a.split(".")[-2]] for sign in "+-*"}
    examples = []
    for question, answer, key in found[:count]:
        others = answers[next(sign for sign in "+-*" if f" {sign} " in answer.split(".")[-2])]
        examples.append(shuffled(rng, question, answer, rng.sample([a for a in others if a != answer], 3), key))
    return examples


def carry(texts: dict[str, list[str]], count: int) -> list[Example]:
    """The result of a sum whose steps are written out: the right one, or one with a digit that is off by one."""
    rng, examples = random.Random(0), []
    for question, answer, key in dict.fromkeys(held_out_problems("+")):
        steps, _, result = answer.rstrip(".").rpartition(" = ")
        if len(result) > 1 and len(examples) < count:
            near = {str(int(result) + sign * 10**i) for i in range(len(result)) for sign in (1, -1)}
            examples.append(shuffled(rng, question + steps + " =", result, rng.sample(sorted(near), 3), key))
    return examples


def continuation(texts: dict[str, list[str]], count: int) -> list[Example]:
    """How a held-out text goes on: 120 characters of it, or of three other documents of its source, after 240."""
    rng, examples = random.Random(0), []
    for source in texts.values():
        pieces = [(number, text[i:i + 240], text[i + 240:i + 360]) for number, text in enumerate(source)
                  for i in range(0, min(len(text) - 359, 7200), 360)]
        for number, before, after in rng.sample(pieces, len(pieces)):
            others = list({a: 0 for n, _, a in pieces if n != number and a.strip()})
            if after.strip() and len(others) > 3:
                examples.append(shuffled(rng, before, after, rng.sample(others, 3)))
    return rng.sample(examples, min(count, len(examples)))


def lookup(texts: dict[str, list[str]], count: int) -> list[Example]:
    """Which of four notes above the question is asked for? No pair of them was trained on."""
    rng, examples = random.Random(0), []
    while len(examples) < count:
        pairs = data_.draw_notes(rng, 4, held_out=True)
        (key, value), others = pairs[0], [v for _, v in pairs[1:]]
        if len({value, *others}) == 4:
            notes = "".join(data_.note(*pair) for pair in rng.sample(pairs, 4))
            examples.append(shuffled(rng, notes + data_.note_question(key), value, others))
    return examples


BUILT_IN = {"arithmetic": arithmetic, "carry": carry, "continuation": continuation, "lookup": lookup}


def held_out_texts(data: str, documents: int = 400) -> dict[str, list[str]]:
    """{source: the first held-out documents} of prepared data, lookups left out."""
    tokenizer, texts = Tokenizer.load(data_.find_tokenizer(data)), {}
    for folder in data_.source_folders(data):
        split = data_.load_source(folder, tokenizer, verify=False)["val"]
        spans = list(zip(split.starts, split.starts[1:]))[:0 if split.name.startswith("recall") else documents]
        texts[split.name] = [tokenizer.decode(split.tokens[a + 1:b].tolist()) for a, b in spans]
    return texts


def encoded(name: str, texts: list[str], tokenizer: Tokenizer) -> Split:
    """Documents as a split, for a tokenizer that the data was not prepared with."""
    ids = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in texts]
    tokens = np.concatenate([np.array(i, np.uint32) for i in ids])
    return Split(name, data_.Tokens([tokens]), np.cumsum([0, *map(len, ids)]), sum(map(len, map(utf8, texts))), "")


@functools.lru_cache
def tasks_of(names: str, data: str, count: int = 200) -> list[Task]:
    """The tasks of a list with commas, asked about the held-out documents of prepared data."""
    return find_tasks(names.split(","), held_out_texts(data), count)


def find_tasks(names: Iterable[str], texts: dict[str, list[str]], count: int = 300) -> list[Task]:
    """Built-in tasks by name, tasks from files by path; NAME:letters shows the choices, NAME:exact wants the right one
    written by greedy sampling."""
    tasks = []
    for full in names:
        name, _, kind = full.partition(":")
        kind = kind or "cloze"
        if kind not in ("cloze", "letters", "exact"):
            raise UserError(f"task {full}: {kind} is not one of cloze, letters, exact")
        if name in BUILT_IN:
            examples = BUILT_IN[name](texts, count)
            if not examples:
                raise UserError(f"task {name} finds no held-out documents of 360 characters; leave it out with --tasks")
            tasks.append(Task(full, examples, kind))
        elif Path(name).exists():
            tasks.append(Task(full, read_task(name).examples, kind))
        else:
            raise UserError(f"there is no task {name}; take {', '.join([*BUILT_IN, *REPORTS])}, or a .jsonl file")
    return tasks


# ---- long context ---------------------------------------------------------------------------------------------

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def haystack(rng: random.Random, lines: list[list[int]], length: int, needles: list[list[int]], depth: float) -> list[int]:
    """ids of `length` tokens: held-out lines, the first needle after the share `depth` of them and the others anywhere."""
    room, text = length - sum(map(len, needles)), []
    while sum(map(len, text)) < room:
        text.append(rng.choice(lines))
    text[-1] = text[-1][:room - sum(map(len, text[:-1]))]
    ends, at = np.cumsum([0, *map(len, text)]), [rng.randrange(len(text) + 1) for _ in needles]
    at[0] = int(np.abs(ends - depth * room).argmin())
    for place, needle in sorted(zip(at, needles), reverse=True):
        text.insert(place, needle)
    return [id for line in text for id in line]


def recall(model: GPT, tokenizer: Tokenizer, texts: dict[str, list[str]], lengths: list[int], questions: int = 20,
           notes: int = 4, opening: list[int] | None = None) -> dict[int, dict[float, Score]]:
    """{length: {depth: score}}: one of `notes` notes in a held-out text of so many tokens is asked for, and has to be
    written by greedy sampling. Chance is that of naming the value of any note of the passage."""
    rng, opening = random.Random(0), [tokenizer.eos_id] if opening is None else opening
    lines = [tokenizer.encode(line + "\n") for source in texts.values() for text in source for line in text.split("\n")]
    longest = max(len(tokenizer.encode(f" {value}.")) for value in data_.VALUES)
    if not lines:
        raise UserError("recall hides its notes in held-out text, of which this data has none; name other data with --data")
    asked = len(opening) + longest + max(len(tokenizer.encode(data_.note_question(key))) for key in data_.KEYS)
    asked += notes * (longest + max(len(tokenizer.encode(data_.note(key, ""))) for key in data_.KEYS))
    if not (lengths := [length for length in lengths if length > asked]):
        raise UserError(f"recall needs a context of more than {asked} tokens with this tokenizer")
    table: dict[int, dict[float, Score]] = {}
    bar = tqdm(total=len(lengths) * len(DEPTHS), desc="recall", leave=False, delay=2, disable=None)
    for length in lengths:
        for depth in DEPTHS:
            prompts, values = [], []
            for _ in range(questions):
                pairs = data_.draw_notes(rng, notes, held_out=True)
                question = tokenizer.encode(data_.note_question(pairs[0][0]))
                needles = [tokenizer.encode(data_.note(*pair)) for pair in pairs]
                values.append(pairs[0][1])
                room = length - len(opening) - len(question) - longest
                prompts.append([*opening, *haystack(rng, lines, room, needles, depth), *question])
            score = generation_accuracy(model, tokenizer, prompts, lambda i, text: text.split(".")[0].strip() == values[i],
                                        longest, at_once=max(1, 2**15 // length))
            table.setdefault(length, {})[depth] = score._replace(chance=1 / notes)
            bar.update()
    bar.close()
    return table


@torch.no_grad()
def loss_by_position(model: GPT, tokenizer: Tokenizer, texts: dict[str, list[str]], length: int, documents: int = 24,
                     opening: list[int] | None = None) -> dict[str, Score]:
    """{"first-last place": nats a token} over held-out documents that have `length` tokens or more, in doubling spans.
    Where context helps, the loss falls with the place; beyond what the model can read it rises."""
    opening, rows = [tokenizer.eos_id] if opening is None else opening, []
    for text in (text for source in texts.values() for text in source):
        ids = opening + tokenizer.encode(text) if len(text) > length and len(rows) < documents else []
        if len(ids) > length:
            rows.append(ids[:length + 1])
    edges = [0] + [2**i for i in range(6, 30) if 2**i < length] + [length]
    losses = []
    for row in torch.tensor(rows, device=model.model.embed_tokens.weight.device):
        logits = model(row[None, :-1])[0]
        nats = [cross_entropy(logits[None, a:b], row[None, a + 1:b + 1]).item() / (b - a) for a, b in zip(edges, edges[1:])]
        losses.append(nats)
    return {f"{a}-{b - 1}": Score.of(column) for a, b, column in zip(edges, edges[1:], zip(*losses))}


def draw_recall(table: dict[int, dict[float, Score]], path: Path, title: str) -> bool:
    """The table of `recall` as a picture; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = np.array([[table[length][depth].mean for length in table] for depth in DEPTHS])
    figure, axes = pyplot.subplots(figsize=(1.2 * len(table) + 2.5, 4), layout="constrained")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set(title=title, xlabel="tokens", ylabel="depth of the note", xticks=range(len(table)), xticklabels=list(table),
             yticks=range(len(DEPTHS)), yticklabels=[f"{depth:.0%}" for depth in DEPTHS])
    for (row, column), value in np.ndenumerate(grid):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    figure.colorbar(image, label="recalled")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


# ---- criteria -------------------------------------------------------------------------------------------------


def ranks(x: Iterable[float]) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    x = np.asarray(list(x), np.float64)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2


def spearman(x: Iterable[float], y: Iterable[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks; nan where one side is constant."""
    a, b = ranks(x), ranks(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def kendall(x: Iterable[float], y: Iterable[float]) -> float:
    """Kendall's tau-a: (pairs in the same order - pairs in opposite order) / all pairs; ties are neither."""
    x, y = np.asarray(list(x), np.float64), np.asarray(list(y), np.float64)
    n = len(x)
    return float(np.triu(np.sign(x[:, None] - x) * np.sign(y[:, None] - y), 1).sum() / (n * (n - 1) / 2))


def criteria(runs: list[dict[int, Score]]) -> dict[str, float | bool]:
    """The playbook's four criteria of one task, over runs of {step: score}.

    monotonic: mean over runs of Spearman's correlation of score and step, >= 0.5. noise: last score over its noise, > 20;
    the noise is the deviation between runs (of other seeds), with one run the standard error. above: the best last
    score's distance from chance in noises, > 3. order: mean Kendall's tau between how neighbouring steps rank the
    runs, nan for fewer than two; it has no threshold, more is better.
    """
    last = [run[max(run)] for run in runs]
    noise = float(np.std([s.mean for s in last], ddof=1)) if len(runs) > 1 else last[0].stderr
    common = sorted(set.intersection(*(set(run) for run in runs)))
    taus = [kendall([run[a].mean for run in runs], [run[b].mean for run in runs]) for a, b in zip(common, common[1:])
            if len(runs) > 1]
    best = max(last, key=lambda s: s.mean)
    found = {"monotonic": float(np.mean([spearman(run, [s.mean for s in run.values()]) for run in runs])),
             "noise": float(np.mean([s.mean for s in last])) / noise if noise else math.inf,
             "above": (best.mean - best.chance) / noise if noise else math.inf * (best.mean - best.chance),
             "order": float(np.mean(taus)) if taus else math.nan}
    return found | {"early signal": found["monotonic"] >= 0.5 and found["noise"] > 20 and found["above"] > 3}


def run_scores(folder: Path, names: list[str], limit: int) -> dict[str, dict[int, Score]]:
    """{task: {step: score}} of a run: what its log holds (train.py --eval_tasks), else of the checkpoints it has kept."""
    scores: dict[str, dict[int, Score]] = {}
    if (folder / "log.jsonl").exists():
        for line in (folder / "log.jsonl").read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a killed run may be torn
                continue
            for name, score in entry.get("tasks", {}).items():
                scores.setdefault(name, {})[entry["step"]] = Score(*score)
    scores = {name: found for name, found in scores.items() if len(found) > 2 and (not names or name in names)}
    if not scores:
        checkpoints = sorted(folder.glob("checkpoints/step-????????"))
        if len(checkpoints) < 3:
            raise UserError(f"{folder} has {len(checkpoints)} checkpoint(s) and no scores in its log, and criteria need "
                            "three; train with --eval_tasks arithmetic,carry,continuation")
        texts = held_out_texts(data_of(folder))
        tasks = find_tasks(names or list(BUILT_IN), texts, limit)
        for checkpoint in tqdm(checkpoints, desc="checkpoints", leave=False, disable=None):
            model, tokenizer = load(checkpoint)
            for name, score in evaluate(model, tokenizer, tasks).items():
                scores.setdefault(name, {})[int(checkpoint.name[5:])] = score
    return scores


def print_criteria(folders: list[Path], names: list[str], limit: int) -> dict[str, dict]:
    runs = [run_scores(folder, names, limit) for folder in folders]
    found = {name: criteria([run[name] for run in runs]) for name in runs[0] if all(name in run for run in runs)}
    print(f"{'task':24}{'Spearman >= 0.5':>16}{'signal/noise > 20':>19}{'over chance > 3':>17}{'Kendall':>9}   steps")
    for name, c in found.items():
        steps = ", ".join(map(str, runs[0][name]))
        print(f"{name:24}{c['monotonic']:16.2f}{c['noise']:19.1f}{c['above']:17.1f}{c['order']:9.2f}   {steps}: "
              + ("early signal" if c["early signal"] else "no early signal"))
    if len(runs) == 1:
        print("(one run: noise is the standard error of its questions, and runs cannot be ranked; give several runs)")
    return found


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------


def harness_model(model: GPT, tokenizer: Tokenizer, chat_format: ChatFormat):
    """The model as lm-evaluation-harness wants one; its numbers are those of `log_likelihoods` and `continue_all`."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError("--harness needs the package lm_eval: pip install lm_eval") from None

    class Adapter(LM):
        def loglikelihood(self, requests) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [encode_pair(tokenizer, chat_format.opening, *r.args) for r in requests])

        def loglikelihood_rolling(self, requests) -> list[float]:
            """Whole texts; a long one in pieces of the context, each without what stands before it."""
            context, scores = model.config.max_position_embeddings, []
            for request in requests:
                ids, first = tokenizer.encode(request.args[0]), chat_format.opening or [tokenizer.eos_id]
                pieces = [(first, ids[i:i + context - len(first)]) for i in range(0, len(ids), context - len(first))]
                scores.append(sum(score for score, _ in log_likelihoods(model, pieces)))
            return scores

        def generate_until(self, requests) -> list[str]:
            texts = []
            for request in tqdm(requests, desc="generating", leave=False, delay=2, disable=None):
                prompt, options = request.args
                limit, until = options.get("max_gen_toks", 256), options.get("until") or []
                limit = min(limit, model.config.max_position_embeddings // 2)  # the other half is for the prompt
                until = [until] if isinstance(until, str) else until
                ids = chat_format.text(prompt)[limit - model.config.max_position_embeddings:]
                made = continue_all(model, [ids], limit, temperature=options.get("temperature", 0.0), stop=chat_format.stop,
                                    vocab_size=tokenizer.vocab_size)
                text = tokenizer.decode(made[0][0])
                texts.append(text[:min([text.find(u) for u in until if u in text], default=len(text))])
            return texts

    return Adapter()


def harness(model: GPT, tokenizer: Tokenizer, chat_format: ChatFormat, tasks: list[str], limit: int = 0, **options) -> dict:
    """{task/metric: score} of lm-evaluation-harness; its tasks fetch their data."""
    adapter = harness_model(model, tokenizer, chat_format)
    import lm_eval

    found = lm_eval.simple_evaluate(model=adapter, tasks=tasks, limit=limit or None, **options)
    scores = {}
    for task, metrics in found["results"].items():
        n = found["n-samples"].get(task, {}).get("effective", 0)
        for metric, value in metrics.items():
            name, comma, kept = metric.partition(",")  # kept: which part of an answer counts, such as gsm8k's strict-match
            if comma and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kept}")
                error = error if isinstance(error, float) else math.nan
                scores[f"{task}/{metric.removesuffix(',none')}"] = Score(value, error, n)
    return scores


# ---- command line ---------------------------------------------------------------------------------------------

REPORTS = ("bpb", "recall", "position")


def data_of(folder: Path) -> str:
    """The prepared data that a run or checkpoint learned from, or else the embedded corpus."""
    for place in (folder, folder.parent.parent):
        if (place / "recipe.json").exists():
            data = json.loads((place / "recipe.json").read_text("utf-8"))["data"]
            break
    else:
        data = "data/laptop"
    if not all(Path(name).exists() for name in data.split(",")):
        raise UserError(f"{data} is not there, and held-out text comes from it; name prepared data with --data, or make the "
                        "embedded one with `python data.py prepare --vocab-size 8192`")
    return data


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="run folder, checkpoint or Hugging Face folder; or: criteria RUN...")
    parser.add_argument("--tasks", default="", metavar="A,B", help=f"of {', '.join([*REPORTS, *BUILT_IN])} and .jsonl files "
                        "(NAME:letters, NAME:exact); default: all built-in ones but recall and position")
    parser.add_argument("--limit", type=int, default=300, metavar="N", help="questions a task")
    parser.add_argument("--tokens", type=float, default=2**17, help="held-out tokens of each source for bits per byte")
    parser.add_argument("--data", default="", metavar="DIR", help="prepared data (default: what the run learned from)")
    parser.add_argument("--context", type=int, default=0, help="tokens to read, beyond the trained context by --extend")
    parser.add_argument("--extend", choices=EXTENSIONS, default="dual_chunk", help="how to read beyond the trained context")
    parser.add_argument("--harness", default="", metavar="A,B", help="tasks of lm-evaluation-harness instead of ours")
    parser.add_argument("--picture", default="", metavar="FILE", help="of the recall table (default: RUN/recall.png)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    names, out = [name for name in args.tasks.split(",") if name], sys.stdout
    if args.limit < 1 or args.tokens < 1:
        raise UserError(f"--{'limit' if args.limit < 1 else 'tokens'} must be at least 1")
    if args.json:
        sys.stdout = sys.stderr
    if args.run[0] == "criteria" and len(args.run) > 1:
        found = print_criteria([Path(run) for run in args.run[1:]], names, args.limit)
    elif len(args.run) > 1:
        raise UserError(f"one model at a time, not {' and '.join(args.run)}; or `criteria` and runs to compare")
    else:
        found = {name: score._asdict() for name, score in report(Path(args.run[0]), names, args).items()}
    if args.json:
        known = {name: {part: None if isinstance(value, float) and not math.isfinite(value) else value  # as JSON
                        for part, value in about.items()} for name, about in found.items()}
        print(json.dumps(known), file=out)


def report(folder: Path, names: list[str], args: argparse.Namespace) -> dict[str, Score]:
    """Runs the evaluations that the command line asks for and prints them."""
    model, tokenizer = load(folder)
    chat_format, scores = ChatFormat(folder, tokenizer), {}
    if args.context > model.config.max_position_embeddings:
        model = extended(model, args.context, args.extend)
    context = model.config.max_position_embeddings

    def show(found: dict[str, Score]) -> None:
        scores.update(found)
        for name, score in found.items():
            print(f"{name:28} {score}", flush=True)

    if args.harness:
        show(harness(model, tokenizer, chat_format, args.harness.split(","), args.limit))
        return scores
    data = args.data or data_of(folder)
    names = names or ["bpb", *BUILT_IN]
    texts = held_out_texts(data)
    if "bpb" in names:
        if tokenizer.hash == Tokenizer.load(data_.find_tokenizer(data)).hash:
            splits = [data_.load_source(s, tokenizer, verify=False)["val"] for s in data_.source_folders(data)]
        else:
            splits = [encoded(name, documents, tokenizer) for name, documents in texts.items() if documents]
        for split in splits:
            show({f"bits per byte/{split.name}": bits_per_byte(model, tokenizer, split, args.tokens)})
    for task in find_tasks([name for name in names if name not in REPORTS], texts, args.limit):
        show(evaluate(model, tokenizer, [task], chat_format.opening, args.limit))
    if "recall" in names:
        lengths = [n for n in (2**i for i in range(7, 30)) if n < context] + [context]
        table = recall(model, tokenizer, texts, lengths, opening=chat_format.opening)
        print(f"recall of one of 4 notes{'':10}" + "".join(f"{length:>14,}" for length in table) + " tokens")
        for depth in DEPTHS:
            cells = "".join(f"{s.mean:8.2f} ± {s.stderr:.2f}" for s in (table[length][depth] for length in table))
            print(f"{'':24}depth {depth:4.0%}" + cells)
        show({f"recall/{length}": Score(*np.mean([row.mean for row in cells.values()], keepdims=True),
                                        math.sqrt(sum(row.stderr**2 for row in cells.values())) / len(cells),
                                        sum(row.n for row in cells.values()), 1 / 4) for length, cells in table.items()})
        picture = args.picture or (str(folder / "recall.png") if (folder / "log.jsonl").exists() else "")
        if picture and draw_recall(table, Path(picture), f"{folder}, {context:,} tokens"):
            print(f"The table is drawn in {picture}")
    if "position" in names:
        show({f"nats a token/{span}": s for span, s in
              loss_by_position(model, tokenizer, texts, context, opening=chat_format.opening).items()})
    return scores


if __name__ == "__main__":
    run(main)
