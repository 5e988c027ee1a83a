"""Post-training: a base model learns to answer (SFT), which of two answers is better (DPO, APO), and what a program
can check (GRPO).

The playbook's order for SmolLM3: SFT, then APO-zero, then a merge of checkpoints; it was released without RL, and GRPO
came later. From a run or a Hugging Face folder:

    python posttrain.py sft runs/laptop                    # -> runs/laptop-sft; built-in problems, no network
    python posttrain.py sft SmolLM3-3B --data chats.jsonl --learning-rate 1e-5
    python posttrain.py apo runs/laptop-sft                # -> runs/laptop-apo; or dpo
    python posttrain.py grpo runs/laptop-sft --reward my_reward.py:score --data problems.jsonl
    python posttrain.py merge runs/laptop-apo runs/laptop-sft --weights .9 .1 --out runs/merged
    python posttrain.py --resume runs/laptop-sft
    python sample.py runs/laptop-sft --chat --prompt "What is 12 + 30?"

Data is jsonl (.gz too), one object a line, a conversation a list of {"role", "content"}:
    sft   {"messages": conversation}
    dpo   {"prompt": text or conversation, "chosen": text or messages, "rejected": text or messages}
    grpo  {"prompt": text or conversation, ...}; the whole object goes to the reward: score(problem, answer) -> number

What the playbook found. SFT: a rate of 3e-6 to 1e-5 was best (SmolLM3's recipe has 2e-5), batches of 128 sequences, 4 to 5
epochs of some 8B tokens, loss on the assistant's turns only (a small gain, mostly in following instructions), sources
balanced by tokens. Packing is 3.8 to 5.3 times as fast, but on small data 128 packed rows are few updates: IFEval lost 12
points, so lower --batch-tokens there. Preferences: APO-zero did best; a rate some 10 times below SFT's (scan 5 to
20), beta 0.1 (0.01 to 0.5; SmolLM3 0.05), one epoch; beta high stays close to the start (the playbook's text once has it the
other way round). RL: without an overlong penalty the answers' length exploded.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data as data_
import train
from data import Split, Tokens
from model import GPT, ModelError, cross_entropy, from_pretrained, is_hugging_face, save_pretrained
from sample import Prompter, continue_all
from tokenizer import HELD_OUT, Parser, Tokenizer, UserError, opened, run, uniform, utf8

# ---- built-in problems ----------------------------------------------------------------------------------------
# {"kind", "prompt", "reply", "answer"}. What is held out is decided by the hash of the problem itself, for arithmetic the
# same one that the pre-training data goes by: no held-out problem was ever trained on, in any stage.


def arithmetic(seed: int, held_out: bool) -> Iterator[dict]:
    """The math source's worked problems on numbers below 100, as question and reply."""
    for key, text in data_.generated_math(10**9, seed):
        question, reply = text.removeprefix("Question: ").strip().split("\nAnswer: ")
        if (uniform(key) < HELD_OUT) == held_out and max(map(int, re.findall(r"\d+", question))) < 100:
            yield {"kind": "arithmetic", "prompt": question, "reply": reply, "answer": re.findall(r"\d+", reply)[-1]}


def lookups(seed: int, held_out: bool) -> Iterator[dict]:
    """A passage, and a question whose answer stands in it."""
    rng = random.Random(seed)
    while True:
        people, things = rng.sample(data_.PEOPLE, 3), rng.sample(data_.THINGS, 3)
        numbers = [rng.randrange(2, 100) for _ in range(3)]
        who, what, many = rng.choice(list(zip(people, things, numbers)))
        passage = " ".join(f"{p} has {n} {t}." for p, t, n in zip(people, things, numbers))
        if (uniform(passage) < HELD_OUT) == held_out:
            yield {"kind": "lookup", "prompt": f"{passage} How many {what} does {who} have?",
                   "reply": f"{who} has {many} {what}.", "answer": str(many)}


FUNCTION = re.compile(r"^ *def ([a-z]\w*)\(([a-z_]\w*(?:, [a-z_]\w*){0,2})\):", re.MULTILINE)


def instructions(seed: int, held_out: bool) -> Iterator[dict]:
    """Short orders about the functions of the embedded code."""
    found = {match[1]: match[2] for _, text in data_.embedded_code() for match in FUNCTION.finditer(text)}
    functions = [pair for pair in sorted(found.items()) if (uniform(pair[0]) < HELD_OUT) == held_out]
    rng = random.Random(seed)
    while True:
        name, arguments = rng.choice(functions)
        line, listed = f"def {name}({arguments}):", arguments.replace(", ", " and ")
        prompt, reply = rng.choice([
            (f"Write the first line of a Python function {name} with the arguments {listed}.", line),
            (f"Which arguments does this function take? {line}", listed),
            (f"What is the name of this function? {line}", name)])
        yield {"kind": "instruction", "prompt": prompt, "reply": reply, "answer": reply}


PROBLEMS = {"arithmetic": arithmetic, "lookup": lookups, "instruction": instructions}


def problems(kind: str, count: int, seed: int, held_out: bool = False) -> list[dict]:
    """`count` built-in problems; held-out ones are all different."""
    made, seen = [], set()
    for problem in PROBLEMS[kind](seed, held_out):
        if not (held_out and problem["prompt"] in seen):
            seen.add(problem["prompt"])
            made.append(problem)
        if len(made) == count:
            return made


def correct(problem: dict, answer: str) -> float:
    """The reward of the built-in problems: 1 if the last number of the answer, or else all of it, is the right one."""
    if problem["answer"].isdigit():
        return float(re.findall(r"\d+", answer)[-1:] == [problem["answer"]])
    return float(answer.strip() == problem["answer"])


# ---- jsonl ----------------------------------------------------------------------------------------------------

FORMS = {  # what a line must hold, in words
    "sft": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "dpo": '{"prompt": "...", "chosen": "...", "rejected": "..."}, each a text or a list of {"role", "content"}',
    "grpo": '{"prompt": "...", ...}, the prompt a text or a list of {"role", "content"}',
}


def turns(said, role: str) -> list[dict]:
    """A text as a conversation of one turn; a conversation as it is."""
    said = [{"role": role, "content": said}] if isinstance(said, str) else said
    good = isinstance(said, list) and said and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in said)
    if not good:
        raise ValueError
    return said


def parse_row(row: dict, form: str) -> dict:
    """A line's object with its conversations checked and written out; ValueError, KeyError or TypeError if it is none.

    A preference may repeat the prompt in front of both answers, and then needs no "prompt" (Hugging Face's two forms).
    """
    if form == "sft":
        messages = turns(row["messages"], "user")
        if not any(m["role"] == "assistant" for m in messages):
            raise ValueError
        return {"messages": messages}
    if form == "grpo":
        return row | {"prompt": turns(row["prompt"], "user")}
    chosen, rejected = turns(row["chosen"], "assistant"), turns(row["rejected"], "assistant")
    if "prompt" in row:
        prompt = turns(row["prompt"], "user")
    else:
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), 0)
        prompt = turns(chosen[:same], "user")
    chosen, rejected = (m[len(prompt):] if m[:len(prompt)] == prompt else m for m in (chosen, rejected))
    if [m["role"] for m in chosen + rejected] != ["assistant"] * 2:
        raise ValueError
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_rows(files: str, form: str) -> list[dict]:
    """The lines of jsonl files, separated by commas; a line that is not of the form is a UserError with file and line."""
    rows = []
    for name in files.split(","):
        if not Path(name).is_file():
            raise UserError(f"--data {name} is no file; give jsonl with lines such as {FORMS[form]}")
        with opened(Path(name)) as (stream, _):
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        rows.append(parse_row(json.loads(line), form))
                    except (ValueError, KeyError, TypeError, RecursionError):
                        raise UserError(f"{name} line {number} is not {FORMS[form]}; correct or remove it") from None
    return rows


def held_out_rows(rows: list[dict], where: str) -> tuple[list[dict], list[dict]]:
    """(train, held out) by the hash of what is asked, so that no question is on both sides; at least one on each."""
    def key(row):
        return uniform(json.dumps(row["prompt"] if "prompt" in row else row["messages"][0]))

    if len({key(row) for row in rows}) < 2:
        raise UserError(f"{where} has {len(rows)} line(s) with fewer than 2 different prompts, and one must be held out; "
                        "give more")
    limit = max(HELD_OUT, np.nextafter(min(map(key, rows)), 1))
    return [row for row in rows if key(row) >= limit], [row for row in rows if key(row) < limit]


# ---- conversations as sequences -------------------------------------------------------------------------------


def fit_conversations(conversations: Iterator[tuple[list[int], list[int]]], context: int, too_long: str,
                      what: str) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) pairs of at most `context` tokens: longer ones are skipped or cut, as asked, and counted aloud.

    What has no token to train on, as when all of the reply is cut off, is left out too.
    """
    kept, long, empty = [], 0, 0
    for ids, mask in conversations:
        if len(ids) > context:
            long += 1
            if too_long == "skip":
                continue
            ids, mask = ids[:context], mask[:context]
        if any(mask):
            kept.append((ids, mask))
        else:
            empty += 1
    if long:
        print(f"long      {long:,} of {what} have more than {context} tokens and are "
              + ("left out; --too-long cut keeps their beginnings" if too_long == "skip" else "cut"))
    if empty:
        print(f"empty     {empty:,} of {what} have nothing to train on and are left out")
    return kept


def conversation_split(name: str, conversations: list[tuple[list[int], list[int]]], tokenizer: Tokenizer) -> Split:
    """(ids, mask) pairs as a split of documents whose targets are the masked tokens only; data.py packs them."""
    ids = np.concatenate([np.array(i, np.int64) for i, _ in conversations])
    mask = np.concatenate([np.array(m, bool) for _, m in conversations])
    labels = np.where(mask, ids, -100)
    sizes = np.array(tokenizer.token_bytes)[ids[mask]]
    return Split(name, Tokens([ids]), np.cumsum([0, *(len(i) for i, _ in conversations)]), int(sizes.sum()),
                 hashlib.sha256(ids.tobytes() + labels.tobytes()).hexdigest(), Tokens([labels]))


def trained_targets(packing: data_.Packing, row: int) -> int:
    """How many targets of a packed row count."""
    labels, end = packing.split.labels, len(packing.split.tokens)
    return sum(int((labels[begin + 1:min(begin + length + 1, end)] >= 0).sum()) for begin, length in packing.pieces(row))


def pad(sequences: list[tuple[list[int], list[int]]], device: str) -> tuple[Tensor, Tensor]:
    """(ids, mask) pairs as tokens [B, T] and targets [B, T], one sequence a row, padded on the right with -100 targets.

    Attention is causal, so padding behind a sequence changes nothing in it.
    """
    longest = max(len(ids) for ids, _ in sequences) - 1
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    targets = torch.full((len(sequences), longest), -100)
    for row, (ids, mask) in enumerate(sequences):
        ids, mask = torch.tensor(ids), torch.tensor(mask, dtype=torch.bool)
        tokens[row, :len(ids) - 1] = ids[:-1]
        targets[row, :len(ids) - 1] = torch.where(mask, ids, -100)[1:]
    return tokens.to(device), targets.to(device)


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) in fp32, [B, T]; 0 where the target is -100."""
    rows = (F.cross_entropy(l.float(), t, reduction="none") for l, t in zip(logits, targets))  # the fp32 copy of one row
    return -torch.stack(list(rows))


# ---- preferences ----------------------------------------------------------------------------------------------


def preference_loss(kind: str, policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of whole answers [2, B], chosen and rejected, to (loss [B], implicit rewards [2, B]).

    The implicit reward is r = beta * log(policy / reference). DPO (Rafailov et al. 2023): -log sigmoid(r_c - r_r), in which
    only the difference counts: both may fall. APO-zero (D'Oosterlinck et al. 2024): 1 - sigmoid(r_c) + sigmoid(r_r): the
    chosen one shall rise above the reference and the rejected one fall below it.
    """
    rewards = beta * (policy - reference)
    if kind == "dpo":
        return -F.logsigmoid(rewards[0] - rewards[1]), rewards.detach()
    return 1 - rewards[0].sigmoid() + rewards[1].sigmoid(), rewards.detach()


# ---- reinforcement learning -----------------------------------------------------------------------------------

NORMALIZATIONS = ("grpo", "dapo", "dr_grpo")


def advantages(rewards: Tensor, normalization: str) -> Tensor:
    """Rewards [groups, samples] to how much better each sample is than its group.

    GRPO (Shao et al. 2024) and DAPO divide by the group's standard deviation, which gives questions that are nearly always or
    nearly never answered more weight; Dr. GRPO (Liu et al. 2025) does not.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred if normalization == "dr_grpo" else centred / (rewards.std(1, keepdim=True) + 1e-4)


def token_weights(mask: Tensor, normalization: str, samples: int, tokens: int, longest: int) -> Tensor:
    """What each sampled token counts in the loss: mask [B, T] of the tokens, of `samples` with `tokens` in all.

    grpo: the mean of the samples' means, in which a token of a long answer counts less, so that long wrong answers are cheap;
    dapo: the mean over all tokens; dr_grpo: the sum over a constant, the only one without a bias by length.
    """
    share = {"grpo": samples * mask.sum(1, keepdim=True).clamp(min=1), "dapo": tokens, "dr_grpo": samples * longest}
    return mask / share[normalization]


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """The clipped loss (PPO, Schulman et al. 2017) of each token: log-probabilities [B, T] now and when it was sampled,
    advantage [B, 1]. -min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = new / old: the gradient ends where a token
    has already become that much likelier or unlikelier. A higher clip_high leaves rare tokens room to rise (DAPO)."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_k3(new: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) from a sampled token: d = reference - new, e^d - d - 1 >= 0."""
    difference = reference - new
    return difference.exp() - difference - 1


def overlong_penalty(length: int, longest: int, margin: int) -> float:
    """0 up to longest - margin tokens, then falling to -1 at `longest` and beyond (DAPO, and the playbook)."""
    if margin <= 0 or length <= longest - margin:
        return 0.0 if length <= longest else -1.0
    return max(-1.0, (longest - margin - length) / margin)


def load_reward(where: str) -> Callable[[dict, str], float]:
    """FILE.py:FUNCTION as a function of (problem, answer)."""
    file, _, name = where.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("reward", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:  # whatever a user's file may do
        raise UserError(f"--reward {where} cannot be loaded ({type(error).__name__}: {error}); give FILE.py:FUNCTION, such as "
                        "my_reward.py:score with def score(problem, answer)") from None


def reward_of(reward: Callable[[dict, str], float], problem: dict, answer: str) -> float:
    """The reward of an answer; UserError with the sample if the function raises or returns no finite number."""
    try:
        value = float(reward(problem, answer))
        if not math.isfinite(value):
            raise ValueError(f"it returned {value}")
        return value
    except Exception as error:
        raise UserError(f"the reward function failed ({type(error).__name__}: {error}) on the answer {answer!r} to "
                        f"{problem!r}; correct it and go on with --resume") from None


# ---- merging --------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(folders: list[str], weights: list[float]) -> GPT:
    """The weighted mean of models (a soup with equal weights; Wortsman et al. 2022), parameter by parameter, in fp32.

    SmolLM3: a soup of APO checkpoints, then 0.9 of it and 0.1 of the mid-training checkpoint, which brought back long-context
    recall. One model is in memory besides the sum. Integers and buffers come from the first.
    """
    merged = from_pretrained(folders[0])
    hashes = {Tokenizer.load(folder).hash for folder in folders}
    if len(hashes) > 1:
        raise UserError(f"{' and '.join(folders)} have different tokenizers; merge checkpoints that come from one model")
    state = {name: weights[0] * tensor for name, tensor in merged.state_dict().items()}
    for folder, weight in zip(folders[1:], weights[1:]):
        model = from_pretrained(folder)
        if model.config != merged.config:
            ours, theirs = asdict(merged.config), asdict(model.config)
            name = next(name for name in ours if ours[name] != theirs[name])
            raise UserError(f"{folder} has {name} {theirs[name]} and {folders[0]} {ours[name]}; merge checkpoints that come "
                            "from one model")
        for name, tensor in model.state_dict().items():
            state[name] += weight * tensor
    merged.load_state_dict(state)
    return merged
