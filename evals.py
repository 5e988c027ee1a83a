"""Evals: what a model can do, with a standard error and the chance level beside every score.

Bits per byte say how well text is predicted, whatever the tokenizer; tasks say what that is good for. The playbook
asks multiple choice in two ways. Cloze (CF) takes the choice that is most likely per character, without showing the
others, and gives signal from the start. Letters (MCF) show the choices; they stay at chance until late (MMLU: about
500B tokens at 7B, 6T for SmolLM2 1.7B). Trust a task that passes `criteria` (FineTasks): its score rises with training,
is over 20 times its noise, and 3 times its noise above chance. SmolLM3's ablations took 1000 questions per task.

    python evals.py runs/laptop                              # bits per byte and every built-in task
    python evals.py runs/laptop --tasks arithmetic,my.jsonl:letters --json   # lines of {"context", "choices", "answer"}
    python evals.py runs/laptop-long --tasks recall,position --context 4096 --extend yarn
    python evals.py fetch hellaswag,arc_easy,piqa --out tasks    # standard tasks as such lines (needs lm_eval), for
    python train.py --eval-tasks tasks/hellaswag.jsonl           # both ways: cloze says early what helps, letters late
    python evals.py criteria runs/laptop                     # which tasks give early signal
    python evals.py SmolLM2-135M --harness hellaswag,arc_easy --limit 1000   # pip install "lm_eval[hf]"

What the built-in tasks ask was held out when their data was made. `recall` hides notes in long held-out text (needles
in a haystack) and asks for one, at several lengths and depths; `position` is the loss by place in a document.
"""

import contextlib
import functools
import json
import math
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from tokenizer import ChatFormat, Parser, UserError, installed, option, reading, run, write_text

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from checkpoint import Log, from_pretrained, is_hugging_face, save_pretrained
from data import HELD_OUT, Split, draw_notes, generated_math, held_out_batches, load_data, note, note_question, uniform
from sample import ContextOptions, command_options, extended, load, recipe_of

AT_ONCE = 2048  # tokens whose logits are computed together


class Score(NamedTuple):
    """A mean over n examples and its standard error; `chance` is the mean of guessing, nan where it has no meaning."""
    mean: float
    stderr: float
    n: int
    chance: float = math.nan

    @classmethod
    def of(cls, values, chance=math.nan, groups=None):
        """`groups`: what each value is about, since questions about one thing are not independent. n values in G groups
        have the error sqrt(G / (G - 1) sum over groups of (their summed deviations)^2) / n (cluster-robust; Miller
        2024, arXiv 2411.00640); without groups, or with a single one, the usual deviation / sqrt(n). That claims too
        much for 0 of 100 right answers: the error of values that are all 0 or 1 is at least sqrt(p (1 - p) / (G + 4)),
        p = (mean G + 2) / (G + 4) (Agresti and Coull 1998); here 0.013."""
        x = np.asarray(list(values), np.float64)
        groups = groups if groups and len(set(groups)) > 1 else range(len(x))
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], x - x.mean())  # [G]
        mean, count = float(x.mean()), len(sums)
        error = math.sqrt(count / (count - 1) * (sums**2).sum()) / len(x) if count > 1 else math.nan
        if np.isin(x, (0, 1)).all():
            p = (mean * count + 2) / (count + 4)
            error = float(np.fmax(error, math.sqrt(p * (1 - p) / (count + 4))))
        return cls(mean, error, len(x), chance)

    def __str__(self):
        chance = f"   chance {self.chance:.3f}" if self.chance >= 0 else ""
        return f"{self.mean:.3f} ± {self.stderr:.3f}{chance}   n {self.n:,}"


# ---- likelihoods ----------------------------------------------------------------------------------------------
@torch.no_grad()
def log_likelihoods(model, pairs):
    """[(log p(after | before) in nats, whether each token of `after` is the most likely one)] for pairs of lists of ids
    (before, after). What is longer than the model's context loses its beginning; UserError where `after` does not fit.
    Sequences of similar length share a batch and are padded on the right, which a causal model does not see."""
    context, device = model.config.max_position_embeddings, model.model.embed_tokens.weight.device
    if any(not 0 < len(after) <= context for _, after in pairs):
        raise UserError(f"an answer to score has no tokens, or more than the context of {context}")
    ids = [torch.tensor((before + after)[-context - 1:], device=device) for before, after in pairs]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    rows, scores = max(1, AT_ONCE // max(map(len, ids), default=1)), {}
    for first in tqdm(range(0, len(ids), rows), "scoring", leave=False, delay=2, disable=None):
        chosen = order[first:first + rows]
        inputs = pad_sequence([ids[i][:-1] for i in chosen], batch_first=True)  # [rows, T]
        for i, logits in zip(chosen, model(inputs)):
            targets = ids[i][-len(pairs[i][1]):]
            logits = logits[:len(ids[i]) - 1][-len(targets):]  # [targets, V]
            log_p = logits.float().log_softmax(-1)[range(len(targets)), targets].sum().item()
            scores[i] = log_p, bool((logits.argmax(-1) == targets).all())
    return [scores[i] for i in sorted(scores)]


@torch.no_grad()
def bits_per_byte(model, tokenizer, split, tokens, rows=8, document_mask=True, world=None):
    """Bits per byte of held-out text, comparable between tokenizers: -log2 p of all targets, document ends included,
    over the bytes of their text, for the first `tokens` tokens whatever `rows` is. `world`: the processes that share
    the batches. Error of a ratio over n sequences (Cochran): sqrt(n / (n - 1) sum (bits - ratio bytes)^2) / bytes."""
    device, context = model.model.embed_tokens.weight.device, model.config.max_position_embeddings
    batches = list(held_out_batches(split, context, rows, max(1, round(tokens / context))))
    (rank, processes), count = (world.rank, world.size) if world else (0, 1), len(batches)
    batches += batches[-1:] * (-count % processes)  # a sharded model needs every process for every batch
    token_bytes = torch.tensor(tokenizer.token_bytes, device=device)
    sums = torch.zeros(2, len(batches), rows, dtype=torch.float64)
    for k, batch in list(enumerate(batches))[rank::processes]:
        inputs, targets, starts = (torch.from_numpy(array).to(device) for array in batch)
        _, nats = model(inputs, starts if document_mask else None, targets=targets)
        for i, (row, target) in enumerate(zip(nats, targets)):
            sums[0, k, i] = row.sum() / math.log(2)
            sums[1, k, i] = token_bytes[target[target >= 0]].sum()
    bits, size = (world.sum(sums) if world else sums)[:, :count].flatten(1)
    n, ratio = (size > 0).sum(), bits.sum() / size.sum()
    error = (bits - ratio * size).norm() / size.sum() * (n / (n - 1)).sqrt()
    return Score(float(ratio), float(error), int(n))


# ---- tasks ----------------------------------------------------------------------------------------------------
class Example(NamedTuple):
    """A question, answered by the choice most likely per character; a single one must be written by greedy sampling."""
    context: str
    choices: tuple[str, ...]
    answer: int  # which choice is right
    about: str = ""  # examples about the same thing are one draw for the standard error


def read_task(path):
    """[Example] from lines of {"context": text, "choices": [text, text, ...], "answer": number of the right one}."""
    examples = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if line.strip():
            with reading(f"{path} line {number}"):
                entry = json.loads(line)  # of bytes: a byte order mark may stand first
                context, choices, answer = entry["context"] + "", entry["choices"] + [], entry["answer"]
                if answer not in range(len(choices)) or not choices[1:] or not all(c.strip() for c in choices):
                    raise ValueError("it needs two choices or more, and the number of the right one, from 0")
                examples.append(Example(context, tuple(choices), answer, context.strip() or str(number)))
    return examples


def as_letters(example):
    """The same question with its choices shown, to be answered by a letter."""
    letters = ascii_uppercase[:len(example.choices)]
    stem = example.context.rstrip().removesuffix("Answer:").rstrip()
    shown = "".join(f"\n{letter}. {choice.strip()}" for letter, choice in zip(letters, example.choices))
    return example._replace(context=f"{stem}{shown}\nAnswer:", choices=tuple(letters))


FORMS = {"cloze": lambda example: example, "letters": as_letters,
         "exact": lambda example: example._replace(choices=(example.choices[example.answer],), answer=0)}


def encode_pair(tokenizer, opening, context, choice):
    """Ids (before, after) of context and choice, a space between if neither has one; a straddling token is after."""
    space = " " if context[-1:].strip() and choice[0].strip() else ""
    whole = tokenizer.encode(context + space + choice)
    same = len(os.path.commonprefix([tokenizer.encode(context), whole]))
    return (opening + whole[:same]) or [tokenizer.eos_id], whole[same:]


def evaluate(model, tokenizer, tasks, opening=None):
    """{name: Score} of tasks [(name, [Example])]. `opening`: ids that begin a text (`ChatFormat.opening`), else EOS."""
    opening, results = [tokenizer.eos_id] if opening is None else opening, {}
    for name, examples in tasks:
        right, found = [], iter(log_likelihoods(model, [encode_pair(tokenizer, opening, e.context, choice)
                                                    for e in examples for choice in e.choices]))
        for e in examples:
            scores = [(log_p / len(choice.strip()), exact) for choice, (log_p, exact) in zip(e.choices, found)]
            right.append(np.argmax(scores, 0)[0] == e.answer if scores[1:] else scores[0][1])
        chance = float(np.mean([1 / len(e.choices) if e.choices[1:] else 0 for e in examples]))
        results[name] = Score.of(right, chance, [e.about for e in examples])
    return results


# ---- built-in tasks -------------------------------------------------------------------------------------------
# Examples made from a seed, without a network, of what training has never seen; `data`: folders of prepared data.

def held_out_problems(kinds):
    """[(question up to "Answer:", worked answer, problem without its story)] that the math source held out."""
    parts = ((key, *text.rstrip("\n").split("Answer:")) for key, text in generated_math(seed=1))
    return [(question + "Answer:", answer, key) for key, question, answer in dict.fromkeys(parts)
            if uniform(key) < HELD_OUT and set(kinds) & set(key)]


def mixed(rng, context, right, wrong, about):
    """An Example of the right choice and three of the wrong ones, in random order."""
    choices = rng.sample([right, *rng.sample(wrong, 3)], 4)
    return Example(context, tuple(choices), choices.index(right), about)


def arithmetic(data, count):
    """Which worked answer belongs to the question: its own, or those of three others of the same kind?"""
    rng, found = random.Random(0), held_out_problems("+-*")
    for question, answer, key in found[:count]:
        others = [a for _, a, other in found if a != answer and set("+-*") & set(key) & set(other)]
        yield mixed(rng, question, answer, others, key)


def carry(data, count):
    """The result of a sum whose steps are written out: the right one, or one with a digit that is off by one."""
    rng = random.Random(0)
    for question, answer, key in held_out_problems("+"):
        steps, _, result = answer.rstrip(".").rpartition(" = ")
        if len(result) > 1:
            near = {str(int(result) + sign * 10**i) for i in range(len(result)) for sign in (1, -1)}
            yield mixed(rng, question + steps + " =", result, sorted(near), key)


def continuation(data, count):
    """How a held-out text continues: 120 characters of it, or of three other documents of its source, after 240."""
    rng, examples = random.Random(0), []
    for texts in held_out_texts(data).values():
        pieces = [(number, text[i:i + 360]) for number, text in enumerate(texts)
                  for i in range(0, min(len(text) - 359, 7200), 360) if text[i + 240:i + 360].strip()]
        for number, piece in rng.sample(pieces, min(count, len(pieces))):
            others = sorted({other[240:] for n, other in pieces if n != number} - {piece[240:]})
            if len(others) > 2:
                examples.append(mixed(rng, piece[:240], piece[240:], others, piece[:240]))
    return rng.sample(examples, min(count, len(examples)))


def lookup(data, count):
    """Which of four notes above the question is asked for? No pair of them was trained on."""
    rng, examples = random.Random(0), []
    while len(examples) < count:
        keys, values = zip(*draw_notes(rng, 4, held_out=True))
        answer = rng.randrange(4)
        if len(set(values)) == 4:
            context = "".join(map(note, keys, values)) + note_question(keys[answer])
            examples.append(Example(context, values, answer, context))
    return examples


BUILT_IN = {"arithmetic": arithmetic, "carry": carry, "continuation": continuation, "lookup": lookup}
REPORTS = ("bpb", "recall", "position")


def held_out_texts(data):
    """{source: the first 400 held-out documents as text} of prepared data, lookups left out."""
    tokenizer, sources = load_data(data, verify=False)
    return {split.name: [tokenizer.decode(split.tokens[a + 1:b].tolist())
                         for a, b in zip(split.starts[:400], split.starts[1:])]
            for split in (source["val"] for source in sources) if not split.name.startswith("recall")}


def encode_documents(name, texts, tokenizer):
    """Documents as a Split, for a tokenizer that the data was not prepared with."""
    ids = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in texts]
    return Split(name, np.concatenate(ids), np.cumsum([0, *map(len, ids)]), 0, "")


@functools.lru_cache
def tasks_of(names, data, count=200):
    """[(name, [Example])] of task names with commas between them: built-in ones, `count` questions about the held-out
    side of prepared data, and .jsonl files. NAME:letters compares the choices' letters; NAME:exact samples greedily. A
    file without a form is asked in both of the playbook's, as FILE (cloze) and FILE:letters."""
    tasks = []
    for full in filter(None, names.split(",")):
        name, kind, *_ = f"{full}:cloze".split(":")
        if kind not in FORMS or name not in BUILT_IN and not Path(name).exists():
            raise UserError(f"there is no task {full}; take {', '.join([*BUILT_IN, *REPORTS])}, or a .jsonl file, "
                            "with :letters or :exact behind it")
        examples = list(BUILT_IN[name](data, count))[:count] if name in BUILT_IN else read_task(name)
        if not examples:  # an empty file, or no text that is long enough
            raise UserError(f"task {full} finds no questions; leave it out with --tasks")
        tasks.append((full, list(map(FORMS[kind], examples))))
        if full.endswith(".jsonl"):
            tasks.append((f"{full}:letters", list(map(as_letters, examples))))
    return tasks


# ---- long context ---------------------------------------------------------------------------------------------
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def recall(model, tokenizer, texts, length, opening):
    """[depths, 20], 1 where greedy sampling writes the answer. Held-out text hides one note after the share `depth` of
    it and three anywhere; the question asks for the first, all in `length` tokens. Chance: any of the four values."""
    rng, pairs = random.Random(length), []
    text = tokenizer.encode("\n".join(sum(texts.values(), [])) + "\n")
    text *= 1 + length // len(text)
    for depth in np.repeat(DEPTHS, 20):
        keys, values = zip(*draw_notes(rng, 4, held_out=True))
        needles = [tokenizer.encode("\n" + line) for line in map(note, keys, values)]
        question, answer = tokenizer.encode(note_question(keys[0])), tokenizer.encode(" " + values[0])
        room = length - sum(map(len, [opening, question, answer, *needles]))
        if room < 1:
            raise UserError(f"recall needs a context that holds its notes, more than {length} tokens")
        start = rng.randint(0, len(text) - room)
        hay, shares = text[start:start + room], [depth, *(rng.random() for _ in range(3))]
        for share, needle in sorted(zip(shares, needles), reverse=True):  # from the back: no place moves
            hay[int(share * room):int(share * room)] = needle
        pairs.append((opening + hay + question, answer))
    return np.array(log_likelihoods(model, pairs))[:, 1].reshape(len(DEPTHS), 20)


def loss_by_position(model, tokenizer, texts, length, opening):
    """Yields ("nats per token/first-last place", Score) over 24 held-out documents of more than `length` tokens, for
    spans that double. Where context helps, the loss falls with the place; beyond what the model can read it rises."""
    ids = (opening + tokenizer.encode(text) for text in sum(texts.values(), []))
    rows = [row for row in ids if len(row) > length][:24]
    if not rows:
        raise UserError(f"position needs held-out documents of more than {length} tokens; name other data with --data")
    edges = [0, length // 8, length // 4, length // 2, length]
    for a, b in zip(edges, edges[1:]):
        found = log_likelihoods(model, [(row[:a + 1], row[a + 1:b + 1]) for row in rows])
        yield f"nats per token/{a}-{b - 1}", Score.of(-nats / (b - a) for nats, _ in found)


# ---- criteria -------------------------------------------------------------------------------------------------
def signs(x):
    """sign(x_i - x_j) [n, n]; its sums over j order as ranks do, with the mean rank for equal values."""
    return np.sign(np.subtract.outer(x, x))


@np.errstate(all="ignore")  # nan where a criterion cannot be told
def criteria(runs):
    """The playbook's criteria of a task over runs [{step: Score}], at common steps. monotonic: mean Spearman
    correlation of score and step (Pearson's of ranks), >= 0.5. noise: last score over its noise, > 20: the deviation
    between runs of other seeds, of one run its error. above: the best last score's distance from chance in noises, > 3.
    order: whether neighbouring steps rank runs alike: mean Kendall tau-a, (same - opposite order) / all pairs."""
    steps, count = sorted(set.intersection(*map(set, runs))), len(runs)
    means = np.array([[run[step].mean for step in steps] for run in runs])  # [runs, steps]
    last, score = means[:, -1], runs[0][steps[-1]]
    noise = last.std(ddof=1) if count > 1 else np.float64(score.stderr)
    spearman = [np.corrcoef(signs(steps).sum(1), signs(row).sum(1))[0, 1] for row in means]
    kendall = [(signs(a) * signs(b)).sum() / (count * (count - 1)) for a, b in zip(means.T, means.T[1:])]
    found = {"monotonic": np.mean(spearman), "noise": last.mean() / noise, "above": (last.max() - score.chance) / noise}
    early = found["monotonic"] >= 0.5 and found["noise"] > 20 and found["above"] > 3
    return found | {"order": np.mean(kendall), "early signal": bool(early)}


def print_criteria(folders):
    """Prints and returns {task: criteria} of the tasks that all runs logged at three common steps or more."""
    scores, found = {}, {}  # scores: {task: {run: {step: Score}}}
    for folder in folders:
        with reading(folder / "log.jsonl"):
            for entry in Log(folder).entries():
                for name, score in entry.get("tasks", {}).items():
                    scores.setdefault(name, {}).setdefault(folder, {})[entry["step"]] = Score(*score)
    print(f"{'task':24}{'Spearman >= 0.5':>16}{'signal/noise > 20':>19}{'over chance > 3':>17}{'Kendall':>9}   steps")
    for name, runs in scores.items():
        steps = sorted(set.intersection(*map(set, runs.values())))
        if len(runs) == len(folders) and len(steps) > 2:
            found[name] = c = criteria(list(runs.values()))
            print(f"{name:24}{c['monotonic']:16.2f}{c['noise']:19.1f}{c['above']:17.1f}{c['order']:9.2f}   "
                  f"{', '.join(map(str, steps))}: {'' if c['early signal'] else 'no '}early signal")
    if not found:
        raise UserError(f"criteria need three scores of a task in log.jsonl of {' and '.join(map(str, folders))}; "
                        "train with --eval-tasks arithmetic,carry,continuation")
    return found


# ---- command line ---------------------------------------------------------------------------------------------
HARNESS = "`lm_eval ls tasks` shows its tasks; the questions are downloaded at first use"


def fetch(tasks, out):
    """Writes at most 1000 questions of each multiple-choice task, drawn with a fixed seed, as lines for `read_task`.
    lm-evaluation-harness, which must be installed, downloads them with `datasets` and cleans them, as for --harness."""
    with reading(f"fetch {tasks}", HARNESS):
        manager = installed("lm_eval.tasks", "fetch", '"lm_eval[hf]"').TaskManager()
        Path(out).mkdir(parents=True, exist_ok=True)
        for name, task in manager.load(tasks.split(","))["tasks"].items():
            docs, path = list(task.eval_docs), Path(out, f"{name}.jsonl")
            rows = [{"context": task.doc_to_text(doc) + "", "choices": task.doc_to_choice(doc),
                     "answer": task.doc_to_target(doc)}
                    for doc in random.Random(0).sample(docs, min(1000, len(docs)))]
            if rows[0]["choices"][0] == "A":
                raise UserError(f"{name} shows its choices in the question, as :letters does; take one that does not")
            write_text(path, "\n".join(map(json.dumps, rows)))
            print(f"{path}: {len(rows)} questions")


def harness(folder, tasks, **options):
    """Yields (task/metric, Score) of lm-evaluation-harness on the folder or the run's export; options: of lm_eval."""
    with reading(f"--harness {tasks}", HARNESS), tempfile.TemporaryDirectory() as place:
        lm_eval = installed("lm_eval", "--harness", '"lm_eval[hf]"')
        if not is_hugging_face(folder):
            save_pretrained(from_pretrained(folder), f"{place}/model", tokenizer_from=folder)
            folder = f"{place}/model"
        found = lm_eval.simple_evaluate("hf", {"pretrained": str(folder)}, tasks.split(","), batch_size=8,
                                        device="cuda" if torch.cuda.is_available() else "cpu", **options)
    for task, metrics in found["results"].items():
        for metric, value in metrics.items():  # metric: name,filter; the filter says which part of an answer counts
            error = metrics.get(metric.replace(",", "_stderr,"))
            if "," in metric and error is not None:
                yield f"{task}/{metric.removesuffix(',none')}", Score(
                    value, math.nan if error == "N/A" else error, found["n-samples"][task]["effective"])


@dataclass
class EvalOptions(ContextOptions):
    run: tuple[str, ...] = ()
    json: bool = False
    tasks: str = option("bpb," + ",".join(BUILT_IN), "also recall, position, FILE.jsonl, NAME:letters, NAME:exact")
    limit: int = option(300, "questions per task", 1)
    tokens: float = option(2**17, "held-out tokens of each source for bits per byte", 1)
    data: str = option("", "prepared data; without it what the run learned from, or data/laptop")
    out: str = option("tasks", "fetch: folder of the files (it needs lm_eval, and datasets through it)")
    harness: str = option("", "tasks of lm-evaluation-harness instead of ours, with commas; at the trained context")


def measure_run(folder, asked):
    """Yields (name, Score) of what EvalOptions ask of one model; prints recall by depth."""
    model, tokenizer = load(folder)
    model, opening = extended(model, asked.context, asked.extend), ChatFormat(folder, tokenizer).opening
    data = asked.data or str(recipe_of(folder).get("data") or "data/laptop")
    names, context = asked.tasks.split(","), model.config.max_position_embeddings
    tasks = tasks_of(",".join(name for name in names if name not in REPORTS), data, asked.limit)
    texts = held_out_texts(data) if {*names} & {*REPORTS} else {}
    if "bpb" in names:
        theirs, sources = load_data(data, verify=False)
        splits = [source["val"] for source in sources]
        if theirs.hash != tokenizer.hash:
            splits = [encode_documents(name, documents, tokenizer) for name, documents in texts.items() if documents]
        for split in splits:
            yield f"bits per byte/{split.name}", bits_per_byte(model, tokenizer, split, asked.tokens)
    for name, examples in tasks:
        yield from evaluate(model, tokenizer, [(name, examples[:asked.limit])], opening).items()
    if "recall" in names:
        for length in [*(2**i for i in range(8, 30) if 2**i < context), context]:
            right = recall(model, tokenizer, texts, length, opening)
            print(f"recall/{length} by depth {DEPTHS}: {right.mean(1)}")
            yield f"recall/{length}", Score.of(right.flat, 1 / 4)
    if "position" in names:
        yield from loss_by_position(model, tokenizer, texts, context, opening)


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="+", help="run, checkpoint or transformers folder; criteria RUN... or fetch TASK")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--chat", action="store_true", help="--harness asks in the model's chat template")
    asked = command_options(parser, EvalOptions)
    folders, found = list(map(Path, asked.run)), {}
    with contextlib.redirect_stdout(sys.stderr if asked.json else sys.stdout):
        if asked.run[0] == "criteria" and folders[1:]:
            found = print_criteria(folders[1:])
        elif asked.run[0] == "fetch" and folders[1:]:
            fetch(asked.run[1], asked.out)
        elif len(folders) > 1:
            raise UserError(f"one model at a time, not {' and '.join(asked.run)}; or `criteria` and runs to compare")
        else:
            scores = (harness(folders[0], asked.harness, limit=asked.limit, apply_chat_template=asked.chat)
                      if asked.harness else measure_run(folders[0], asked))
            for name, score in scores:
                print(f"{name:28} {score}", flush=True)
                found[name] = score._asdict()
    if asked.json:
        print(json.dumps(found).replace("NaN", "null"))


if __name__ == "__main__":
    run(main)
