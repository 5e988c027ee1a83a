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
import itertools
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cost
import data as data_
import schedule as schedule_
import train
from data import Split, Tokens
from evals import Score
from checkpoint import from_pretrained, is_hugging_face, load_config, newest_checkpoint, save_pretrained
from data import HELD_OUT, opened, uniform
from model import GPT, cross_entropy
from sample import continue_all
from tokenizer import ChatFormat, Parser, Tokenizer, UserError, run

# ---- built-in problems ----------------------------------------------------------------------------------------
# {"kind", "prompt", "reply", "answer"}. What is held out is decided by the hash of the problem itself, for arithmetic the
# same one that the pre-training data goes by: no held-out sum was ever trained on, in any stage. (The functions of
# `instructions` stand in the code that a base model reads; the orders about the held-out ones do not.) "about": what a
# problem asks without its story, since the same sum in other words is no independent question.


def arithmetic(seed: int, held_out: bool) -> Iterator[dict]:
    """The math source's worked problems on numbers below 100, as question and reply."""
    for key, text in data_.generated_math(10**9, seed):
        question, reply = text.removeprefix("Question: ").strip().split("\nAnswer: ")
        if (uniform(key) < HELD_OUT) == held_out and max(map(int, re.findall(r"\d+", question))) < 100:
            yield {"kind": "arithmetic", "prompt": question, "reply": reply, "answer": re.findall(r"\d+", reply)[-1],
                   "about": key}


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
                   "reply": f"{who} has {many} {what}.", "answer": str(many), "about": passage}


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
        yield {"kind": "instruction", "prompt": prompt, "reply": reply, "answer": reply, "about": name}


SFT_PROBLEMS = 16_000  # of arithmetic; a fifth as many of each other kind
PROBLEMS = {"arithmetic": arithmetic, "lookup": lookups, "instruction": instructions}


def problems(kind: str, count: int, seed: int, held_out: bool = False, without: Iterable[str] = ()) -> list[dict]:
    """`count` built-in problems, none of the prompts `without`; held-out ones are all different."""
    made, seen = [], set(without)
    for problem in PROBLEMS[kind](seed, held_out):
        if problem["prompt"] not in seen:
            made.append(problem)
            if held_out:
                seen.add(problem["prompt"])
        if len(made) == count:
            return made


def fresh_problems(count: int) -> list[dict]:
    """Arithmetic for preferences and RL that SFT has not trained on: of what it has seen, the model knows half by heart, and
    learning from that changes nothing on other problems."""
    return problems("arithmetic", count, 3, without={row["prompt"] for row in problems("arithmetic", SFT_PROBLEMS, 2)})


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
        turns(row["prompt"], "user")  # checked; the reward sees the line as it is
        return row
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
    """(train, held out) by the hash of what is asked, so that no question is on both sides: HELD_OUT of them, and of few at
    least 30, or a fifth, or one."""
    def key(row):
        asked = itertools.takewhile(lambda message: message["role"] != "assistant", row.get("messages", ()))
        return uniform(json.dumps(row["prompt"] if "prompt" in row else list(asked)))

    keys = sorted({key(row) for row in rows})
    if len(keys) < 2:
        raise UserError(f"{where} has {len(rows)} line(s) with fewer than 2 different prompts, and one must be held out; "
                        "give more")
    limit = max(HELD_OUT, np.nextafter(keys[max(1, min(30, len(keys) // 5)) - 1], 1))
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


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) in fp32, [B, T], of the policy that samples at a temperature; 0 where the target is -100."""
    rows = (F.cross_entropy(l.float() / temperature, t, reduction="none") for l, t in zip(logits, targets))
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

    GRPO (Shao et al. 2024) and DAPO divide by the group's standard deviation, which gives more weight to questions that are
    nearly always or nearly never answered; Dr. GRPO (Liu et al. 2025) does not.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred if normalization == "dr_grpo" else centred / (rewards.std(1, keepdim=True) + 1e-4)


def token_weights(mask: Tensor, normalization: str, samples: int, tokens: int, longest: int) -> Tensor:
    """What each sampled token counts in the loss: mask [B, T] of the tokens, of `samples` with `tokens` in all.

    grpo: the mean of the samples' means, in which a token of a long answer counts less: long wrong answers are cheap;
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
        raise UserError(f"--reward {where} cannot be loaded ({type(error).__name__}: {error}); give FILE.py:FUNCTION, such "
                        "as my_reward.py:score with def score(problem, answer)") from None


def reward_of(reward: Callable[[dict, str], float], problem: dict, answer: str) -> float:
    """The reward of an answer; UserError with the sample if the function raises or returns no finite number."""
    try:
        value = float(reward(problem, answer))
        if not math.isfinite(value):
            raise ValueError(f"it returned {value}")
        return value
    except Exception as error:
        raise UserError(f"the reward function failed ({type(error).__name__}: {error}) on the answer {answer!r} to "
                        f"{problem!r}; correct it and start again, or go on with --resume where the run has a checkpoint") from None


# ---- merging --------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(folders: list[str], weights: list[float]) -> GPT:
    """The weighted mean of models (a soup with equal weights; Wortsman et al. 2022), parameter by parameter, in fp32.

    SmolLM3: a soup of APO checkpoints, then 0.9 of it and 0.1 of the mid-training checkpoint, which brought back recall in
    long context. One model is in memory besides the sum.
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


def write_checkpoint(model: GPT, tokenizer: Tokenizer, out: Path, format_of: Path) -> None:
    """Weights alone as a checkpoint folder, with the chat format of the folder `format_of`."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(model.state_dict(), partial / "model.pt")
    (partial / "config.json").write_text(json.dumps(asdict(model.config), indent=1), "utf-8")
    (partial / "guard.json").write_text(json.dumps({"step": 0, "moments": False}), "utf-8")  # so that training can start here
    tokenizer.save(partial)
    copy_chat_format(format_of, partial)
    files = train.hash_files(partial.iterdir(), partial)
    (partial / "manifest.json").write_text(json.dumps({"step": 0, "files": files}, indent=1), "utf-8")
    partial.rename(out)


# ---- recipes --------------------------------------------------------------------------------------------------

METHODS = ("sft", "dpo", "apo_zero", "grpo")


@dataclass(frozen=True)
class PostRecipe(train.Recipe):
    """A training run that starts from a model. Tokens, pairs and prompts of an update are counted over all processes."""

    data: str = ""  # jsonl files, separated by commas; none: the built-in problems
    method: str = "sft"  # sft, dpo, apo_zero or grpo
    packing: str = "best-fit"
    schedule: str = "cosine"  # wsd, cosine or multistep
    warmup_steps: int = 20  # steps until the peak rate
    final_share: float = 0.1  # of the peak rate, at the last step
    weight_decay: float = 0.0  # not on the embedding
    eval_every: int = 10**9  # steps between evaluations; there is one before the first and one after the last
    epochs: float = 1.0  # sft, dpo: how often the data is gone through
    context: int = 0  # tokens of a sequence; 0: as many as the model was trained on, at most 8192
    too_long: str = "skip"  # skip or cut conversations of more tokens
    assistant_only: bool = True  # sft: loss on what the assistant says only
    problems: int = SFT_PROBLEMS  # built-in: arithmetic problems; sft adds a fifth as many of each other kind
    eval_problems: int = 1000  # built-in: held-out arithmetic problems of an evaluation
    pairs: int = 32  # dpo: preferences of an update
    beta: float = 0.1  # dpo: how close to stay to the start; high is close
    nll: float = 0.0  # dpo: weight of the chosen answer's own loss, in nats a token (Pang et al. 2024)
    prompts: int = 32  # grpo: prompts of a step
    samples: int = 8  # grpo: answers to each, which are compared with one another; dpo: drawn to find built-in pairs
    updates: int = 1  # grpo: how many updates a step's samples are divided into
    max_tokens: int = 56  # of a sampled answer
    temperature: float = 1.0  # of the sampling
    normalization: str = "dapo"  # grpo: of advantages and lengths: grpo, dapo or dr_grpo
    clip_low: float = 0.2  # grpo: how far a token's probability may fall in a step
    clip_high: float = 0.28  # grpo: and rise
    kl: float = 0.0  # grpo: weight of the divergence from the start; 0: none, and no second model in memory
    overlong: int = 0  # grpo: tokens before --max-tokens over which the penalty for length grows to 1
    reward: str = ""  # grpo: FILE.py:FUNCTION; none: whether the built-in answer is right

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("method", METHODS), ("too_long", ("skip", "cut")), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} {getattr(self, name)} is not one of {', '.join(allowed)}")
        for name, least, most in (
                ("epochs", 1e-9, 1e6), ("context", 0, 2**30), ("problems", 100, 10**9), ("eval_problems", 2, 5000),
                ("pairs", 1, 10**9), ("beta", 1e-9, 1e9), ("prompts", 1, 10**9), ("samples", 2, 10**6),
                ("updates", 1, 10**6), ("max_tokens", 1, 2**30), ("temperature", 1e-6, 1e6), ("clip_low", 0, 1),
                ("clip_high", 0, 1e6), ("nll", 0, 1e6), ("kl", 0, 1e6), ("overlong", 0, 2**30)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)} is not between {least:g} and {most:g}")
        if self.method == "grpo" and bool(self.data) != bool(self.reward):
            raise UserError("--data and --reward belong together in grpo: give both, or neither for the built-in problems")


# For the laptop's 1.8M parameters, by measuring; AT_SCALE is what changes above 50M: SmolLM3's values, GRPO's from TRL.
RECIPES = {
    "sft": PostRecipe(optimizer="muon", learning_rate=4e-3, batch_tokens=2048),
    "dpo": PostRecipe(method="dpo", learning_rate=1e-5, nll=2.0, samples=6, problems=2500, epochs=4, eval_problems=3000),
    "apo": PostRecipe(method="apo_zero", learning_rate=1e-5, nll=2.0, samples=6, problems=2500, epochs=4, eval_problems=3000),
    "grpo": PostRecipe(method="grpo", learning_rate=1.5e-4, warmup_steps=5, tokens=40, prompts=64, problems=4000,
                       eval_problems=3000),
}
AT_SCALE = {
    "sft": dict(optimizer="adamw", learning_rate=2e-5, batch_tokens=2**20, clip=0.2, epochs=4),
    "dpo": dict(learning_rate=1e-6, nll=0.0, epochs=1), "apo": dict(learning_rate=1e-6, beta=0.05, nll=0.0, epochs=1),
    "grpo": dict(learning_rate=1e-6, tokens=500, max_tokens=2500, overlong=500),
}
FLAGS = {name: kind for name, kind in {f.name: f.type for f in fields(PostRecipe)}.items() if name not in (
    "model", "stages", "method", "packing", "start", "batch_doublings", "noise_every", "sample_prompt", "eval_tokens",
    "eval_tasks", "z_loss", "document_mask")}
RESUMABLE = train.RESUMABLE & set(FLAGS) | {"reward"}


# ---- jobs -----------------------------------------------------------------------------------------------------


def copy_chat_format(source: Path, folder: Path) -> None:
    """Keeps a Hugging Face model's template and stop tokens beside what was trained from it, for tokenizer.ChatFormat."""
    if not (source / "tokenizer_config.json").exists():
        return
    for name in train.CHAT_FORMAT[:2]:
        if (source / name).exists():
            shutil.copy(source / name, folder)
    ends = sorted(ChatFormat(source, Tokenizer.load(source)).stop)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), "utf-8")


def shuffled(first: int, count: int, n: int, seed: int) -> np.ndarray:
    """The items first .. first + count of an endless stream of shuffled epochs of range(n)."""
    index = np.arange(first, first + count)
    return np.concatenate([data_.permute(index[index // n == epoch] % n, n, [seed, int(epoch)])
                           for epoch in np.unique(index // n)])


class PostJob(train.Job):
    """What the three methods share: the start, the rate, and the scores before and after."""

    command, onward = "python posttrain.py", "python posttrain.py apo"

    def __init__(self, recipe: PostRecipe, world: train.World, machine, tokenizer: Tokenizer):
        super().__init__(recipe, world, machine, tokenizer)
        self.chat_format, self.before, self.history = ChatFormat(recipe.start, tokenizer), {}, {}
        self.context = recipe.model.max_position_embeddings
        fit = (n for n in range(1, 257) if train.fits(recipe, n, self.context, world, machine.device))
        self.rows = world.agree(recipe.micro_batch or max(fit, default=1))  # sequences computed at once
        kinds = PROBLEMS if recipe.method == "sft" else ("arithmetic",)
        self.tests = {} if recipe.data else {
            kind: problems(kind, recipe.eval_problems if kind == "arithmetic" else 100, 1, held_out=True) for kind in kinds}

    def rate(self, step: int) -> float:
        r = self.recipe
        decay = round(max(0.0, r.decay_share) * self.steps)
        return r.learning_rate * schedule_.rate_share(r.schedule, step, self.steps, r.warmup_steps, decay, r.decay_shape,
                                                      r.final_share)

    def encode(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        (ids, mask), = self.chat_format.samples(messages)
        return (ids, mask) if self.recipe.assistant_only else (ids, [0] + [1] * (len(ids) - 1))

    def answers(self, prompts: list[list[int]], samples: int = 1, stop=None, **options) -> list[list[list[int]]]:
        """ids [prompts][samples][T] of what the model answers; one of `self.room(prompts)` tokens was cut off."""
        training = self.model.training
        made = continue_all(self.model.eval(), prompts, self.room(prompts), samples, stop=stop or self.chat_format.stop,
                            vocab_size=self.tokenizer.vocab_size, at_once=256, **options)
        self.model.train(training)
        return made

    def room(self, prompts: list[list[int]]) -> int:
        """Tokens that are left to answer any of these prompts."""
        longest, most = max(map(len, prompts)), self.model.config.max_position_embeddings
        if longest >= most:
            raise UserError(f"a prompt of {longest:,} tokens leaves no room to answer in the model's {most:,}; leave it out")
        return min(self.recipe.max_tokens, most - longest)

    def judge(self, rows: list[dict], plain: bool = False, **options) -> list[float]:
        """The rewards of one answer to each problem; `plain`: as text to continue in the form of the pre-training data, for
        a base model, which has never seen a chat."""
        ask = [self.chat_format.text(f"Question: {row['prompt']}\nAnswer:") if plain else
               self.chat_format.prompt(turns(row["prompt"], "user")) for row in rows]
        texts = [self.tokenizer.decode(ids) for ids, in self.answers(ask, **options)]
        return [reward_of(self.reward, row, text.split("\n")[0] if plain else text) for row, text in zip(rows, texts)]

    reward = staticmethod(correct)

    def scores(self, step: int) -> dict[str, list[float]]:
        """One number for each held-out example: of greedy answers, and of one drawn at --temperature, which is what RL
        rewards."""
        plain = step == 0 and self.recipe.method == "sft"
        found = {kind: self.judge(rows, plain, temperature=0.0) for kind, rows in self.tests.items()}
        for kind in set(self.tests) & {"arithmetic", "reward"}:
            found[f"{kind}, sampled"] = self.judge(self.tests[kind], plain, temperature=self.recipe.temperature, seed=1)
        return found

    @torch.no_grad()
    def evaluate(self, step: int, last: bool) -> dict:
        if step == 1 and not last:
            return {"val": {}, "stderr": {}}  # the loop asks after the first update; `begin` has just said it
        self.model.eval()
        found = self.scores(step)
        self.model.train()
        if step == 0:
            self.before = found
        about = {kind: [row.get("about") or json.dumps(row["prompt"]) for row in rows] for kind, rows in self.tests.items()}

        def score(name: str, values) -> Score:
            return Score.of(values, groups=about.get(name.split(",")[0]))

        lines, now = [f"step {step:,}, held out:"], {name: score(name, values) for name, values in found.items()}
        for name, of in now.items():
            line = f"  {name:20} {of.mean:.3f} ± {of.stderr:.3f}   n {of.n:,}"
            if step and name in self.before:
                then, change = (score(name, x) for x in (self.before[name], np.subtract(found[name], self.before[name])))
                line += (f"   before {then.mean:.3f} ± {then.stderr:.3f}   change {change.mean:+.3f} ± {change.stderr:.3f}"
                         + (f" ({change.mean / change.stderr:+.1f} standard errors)" if change.stderr > 0 else ""))
            lines.append(line)
        if step and self.before:
            lines.append("  (± is one standard error, in which questions about the same thing count as one; that of a change "
                         "is paired: the same questions before and after)")
        elif self.recipe.method == "sft" and self.tests:
            lines.append("  (before: as text to continue, 'Question: ... Answer:', the form of the pre-training data)")
        tqdm.write("\n".join(lines) + "\n", file=sys.stdout)
        sys.stdout.flush()
        return {"val": {name: of.mean for name, of in now.items()}, "stderr": {name: of.stderr for name, of in now.items()}}

    def begin(self, log: train.Log | None, resume: bool) -> None:
        if log:
            copy_chat_format(Path(self.recipe.start), self.folder)
        if resume:
            self.before = next((e["before"] for e in log.entries() if "before" in e), {}) if log else {}
            return
        entry = self.evaluate(0, False)
        if log:
            log.write(step=0, tokens=0, train_seconds=0.0, **entry, before=self.before)

    def note(self, step: int, values: dict[str, float]) -> tuple[dict, str]:
        entry = {"stage": self.recipe.method} | self.history.pop(step, {})
        entry |= {name: values[name] for name in self.found}
        return entry, "".join(f" | {name} {entry[name]:.2f}" for name in ("accuracy", "margin", "reward", "length")
                              if name in entry)


class SFT(PostJob):
    """Next-token prediction on conversations, packed into rows whose attention stays inside each."""

    def __init__(self, recipe: PostRecipe, world: train.World, machine, tokenizer: Tokenizer):
        super().__init__(recipe, world, machine, tokenizer)
        files = recipe.data.split(",") if recipe.data else ()
        rows = {Path(name).name.split(".")[0]: held_out_rows(read_rows(name, "sft"), name) for name in files} or {
            kind: (problems(kind, recipe.problems if kind == "arithmetic" else recipe.problems // 5, 2),
                   problems(kind, 100, 1, held_out=True)) for kind in PROBLEMS}
        self.splits = {}
        for name, sides in rows.items():
            made = [fit_conversations((self.encode(conversation(row)) for row in tqdm(side, name, leave=False, delay=1)),
                                      self.context, recipe.too_long, name) for side in sides]
            if not all(made):
                raise UserError(f"{name} has no conversation that fits {self.context} tokens; take --too-long cut or a "
                                "larger --context")
            self.splits[name] = [conversation_split(name, side, tokenizer) for side in made]
        train_splits = [split for split, _ in self.splits.values()]
        tokens = recipe.epochs * sum(len(split.tokens) for split in train_splits)
        self.rows = world.agree(train.micro_batch_rows(recipe, world, machine.device))
        self.curriculum = data_.Curriculum(train_splits, [data_.Stage("sft", tokens, {})], self.context,
                                           recipe.batch_tokens // self.context, recipe.seed, "best-fit")
        self.loader = train.Loader(self.curriculum, machine.device)
        self.steps, self.names = self.curriculum.steps, list(self.splits)
        self.fingerprint = {split.name: split.sha256 for split in train_splits}
        self.length = tokens / recipe.epochs / sum(len(split.starts) - 1 for split in train_splits)
        trained = sum(int((split.labels[:] >= 0).sum()) for split in train_splits)
        print("data      " + ", ".join(f"{s.name} {len(s.starts) - 1:,} conversations" for s in train_splits)
              + f"; {trained:,} tokens to train on, {trained / (tokens / recipe.epochs):.0%} of all")

    def micro_batches(self, step: int, steps: int) -> list[tuple[int, int, int]]:
        """(step, first row, rows) of this process."""
        self.share = 1 / max(1, self.curriculum.targets(step))  # of a trained token in the update's mean loss
        return [(step, first + self.world.rank * self.rows, self.rows)
                for first in range(0, self.curriculum.rows, self.world.size * self.rows)]

    def load(self, piece, following) -> tuple[Tensor, ...]:
        return self.loader.get(piece, following or (piece[0] + 1, self.world.rank * self.rows, self.rows))

    def loss(self, tokens, targets, cu_seqlens) -> tuple[Tensor, Tensor | float]:
        logits = self.parallel(tokens, cu_seqlens)
        return cross_entropy(logits, targets) * self.share, self.model.routing_loss() * (
            tokens.numel() / self.recipe.batch_tokens)

    def scores(self, step: int) -> dict[str, list[float]]:
        if self.tests:
            return super().scores(step)
        return {f"{name}, nats a token": self.held_out_loss(val) for name, (_, val) in self.splits.items()}

    def held_out_loss(self, split: Split) -> list[float]:
        """Mean loss of each held-out conversation's trained tokens."""
        losses = []
        for begin, end in list(zip(split.starts, split.starts[1:]))[:self.recipe.eval_problems]:
            tokens, labels = (torch.from_numpy(x[begin:end])[None].to(self.machine.device)
                              for x in (split.tokens, split.labels))
            losses.append(cross_entropy(self.model(tokens[:, :-1]), labels[:, 1:]).item() / (labels >= 0).sum().item())
        return losses

    def describe(self, piece) -> str:
        return f"rows {piece[1]} to {piece[1] + piece[2] - 1} of the batch of step {piece[0] + 1}"


def conversation(row: dict) -> list[dict]:
    """The messages of a jsonl row, or of a built-in problem with its reply."""
    return row.get("messages") or turns(row["prompt"], "user") + turns(row["reply"], "assistant")


class Preferences(PostJob):
    """DPO and APO-zero: the start's log-probabilities of all answers are computed once, so no second model is kept.

    An unlikely token of a rejected answer has a far larger gradient than the likely ones of the chosen answer, so that both
    can fall and the model with them (Ren & Sutherland 2024); --nll also trains the chosen one as SFT does.
    """

    def __init__(self, recipe: PostRecipe, world: train.World, machine, tokenizer: Tokenizer):
        super().__init__(recipe, world, machine, tokenizer)
        if recipe.pairs % world.size:
            raise UserError(f"--pairs {recipe.pairs} does not divide by {world.size} processes; take a multiple")
        rows = read_rows(recipe.data, "dpo") if recipe.data else None
        self.sides = held_out_rows(rows, recipe.data) if rows else None
        if rows:
            self.fingerprint = {"pairs": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}

    def begin(self, log: train.Log | None, resume: bool) -> None:
        """Makes the built-in pairs, the reference and the number of steps; a resumed run has the first two in its folder."""
        file, world = self.folder / "pairs.jsonl", self.world
        if self.sides is None:
            if world.agree(not file.exists()):
                text = "".join(json.dumps(row) + "\n" for row in self.own_pairs())  # in every process: FSDP needs all of them
                if log:
                    file.with_suffix(".partial").write_text(text, "utf-8")
                    file.with_suffix(".partial").replace(file)
            world.wait_for_first()
            self.sides = held_out_rows(read_rows(str(file), "dpo"), str(file))
        self.pairs, self.held = ([self.sequences(row) for row in tqdm(side, "encode", leave=False, delay=1)]
                                 for side in self.sides)
        counts = len(self.pairs) + len(self.held)
        self.pairs, self.held = ([pair for pair in side if pair] for side in (self.pairs, self.held))
        if lost := counts - len(self.pairs) - len(self.held):
            print(f"long      {lost:,} of {counts:,} pairs have more than {self.context} tokens and are left out"
                  + ("; --too-long cut keeps their beginnings" if self.recipe.too_long == "skip" else ""))
        if not self.pairs or not self.held:
            raise UserError(f"no pair of at most {self.context} tokens is left; take --too-long cut or a larger --context")
        self.steps = max(1, round(self.recipe.epochs * len(self.pairs) / self.recipe.pairs))
        self.length = sum(len(ids) for pair in self.pairs for ids, _ in pair) / len(self.pairs) / 2
        print(f"data      {len(self.pairs):,} pairs and {len(self.held):,} held out, {self.steps:,} steps of "
              f"{self.recipe.pairs}")
        self.reference = self.reference_logprobs(self.folder / "reference.pt")
        super().begin(log, resume)

    def own_pairs(self) -> list[dict]:
        """Problems of which the start answers some right and some wrong: the model's own answers, judged by the checker."""
        rows = fresh_problems(self.recipe.problems)
        prompts = [self.chat_format.prompt(turns(row["prompt"], "user")) for row in rows]
        print(f"pairs     drawing {self.recipe.samples} answers to each of {len(rows):,} training problems", flush=True)
        made = self.answers(prompts, self.recipe.samples, temperature=self.recipe.temperature, seed=self.recipe.seed)
        room, found = self.room(prompts), []
        for row, ids in zip(rows, made):
            ended = (self.tokenizer.decode(sample) for sample in ids if 0 < len(sample) < room)
            texts = list(dict.fromkeys(ended))
            right, wrong = ([text for text in texts if correct(row, text) == value] for value in (1.0, 0.0))
            found += [{"prompt": row["prompt"], "chosen": a, "rejected": b} for a, b in zip(right, wrong)]
        if len({pair["prompt"] for pair in found}) < 2:
            raise UserError("the start answers no two problems both rightly and wrongly, so there are no pairs to prefer; begin "
                            "with a model that has seen SFT: python posttrain.py sft RUN")
        return found

    def sequences(self, row: dict) -> list[tuple[list[int], list[int]]] | None:
        """(ids, mask) of the chosen and of the rejected answer behind the prompt, or None if one is too long; only what
        follows the prompt counts."""
        made = []
        for answer in (row["chosen"], row["rejected"]):
            (ids, mask), = self.chat_format.samples(row["prompt"] + answer)
            last = max(i for i in range(1, len(mask)) if mask[i] and not mask[i - 1])  # where the answer begins
            if len(ids) > self.context and self.recipe.too_long == "skip" or last >= self.context:
                return None
            made.append((ids[:self.context], ([0] * last + mask[last:])[:self.context]))
        return made

    def logprobs(self, pairs: list, model) -> Tensor:
        """Of whole answers, [2, pairs]: chosen and rejected."""
        tokens, targets = pad([side for half in zip(*pairs) for side in half], self.machine.device)
        return token_logprobs(model(tokens), targets).sum(1).view(2, -1)

    @torch.no_grad()
    def reference_logprobs(self, file: Path) -> Tensor:
        """[2, pairs and then held-out pairs] of the start, computed once and kept in the run folder."""
        everything, world = self.pairs + self.held, self.world
        if not file.exists():
            found, times = torch.zeros(2, len(everything)), torch.zeros(len(everything))
            found, times = found.to(self.machine.device), times.to(self.machine.device)
            self.model.eval()
            at_once = max(1, self.rows // 2)
            for first in tqdm(range(0, len(everything), at_once * world.size), "reference", leave=False, delay=1):
                mine = (first + world.rank * at_once + np.arange(at_once)) % len(everything)  # FSDP needs all equally often
                found[:, mine], times[mine] = self.logprobs([everything[i] for i in mine], self.model), 1
            self.model.train()
            found = (world.sum(found) / world.sum(times)).cpu()
            if world.rank == 0:
                torch.save(found, file.with_suffix(".partial"))
                file.with_suffix(".partial").replace(file)
            world.agree(None)
        return torch.load(file, weights_only=True)

    def micro_batches(self, step: int, steps: int) -> list[np.ndarray]:
        chosen = shuffled(step * self.recipe.pairs, self.recipe.pairs, len(self.pairs), self.recipe.seed)
        mine, at_once = chosen[self.world.rank::self.world.size], max(1, self.rows // 2)
        return [mine[i:i + at_once] for i in range(0, len(mine), at_once)]

    def load(self, piece, following) -> tuple:
        return [self.pairs[i] for i in piece], self.reference[:, torch.from_numpy(piece)].to(self.machine.device)

    def loss(self, pairs, reference) -> tuple[Tensor, Tensor | float]:
        policy, share = self.logprobs(pairs, self.parallel), 1 / self.recipe.pairs
        loss, rewards = preference_loss(self.recipe.method, policy, reference, self.recipe.beta)
        lengths = torch.tensor([sum(mask) for (_, mask), _ in pairs], device=policy.device)
        loss = loss - self.recipe.nll * policy[0] / lengths
        self.found = {"accuracy": (rewards[0] > rewards[1]).sum() * share, "margin": (rewards[0] - rewards[1]).sum() * share,
                      "chosen_reward": rewards[0].sum() * share, "rejected_reward": rewards[1].sum() * share}
        return loss.sum() * share, self.model.routing_loss() * (len(pairs) * share)

    def batch_tokens(self, step: int, end: int) -> int:
        return round((end - step) * self.recipe.pairs * 2 * self.length)

    def scores(self, step: int) -> dict[str, list[float]]:
        """The start's implicit rewards are 0: nothing to compare before the first update."""
        found = super().scores(step)
        if step:
            at_once, rewards = max(1, self.rows // 2), []
            for first in range(0, len(self.held), at_once):
                part = self.held[first:first + at_once]
                where = len(self.pairs) + first
                reference = self.reference[:, where:where + len(part)].to(self.machine.device)
                rewards.append(preference_loss(self.recipe.method, self.logprobs(part, self.model), reference,
                                               self.recipe.beta)[1].cpu())
            chosen, rejected = torch.cat(rewards, 1)
            found |= {"held-out pairs right": (chosen > rejected).double().tolist(),
                      "held-out margin": (chosen - rejected).tolist()}
        return found

    def describe(self, piece) -> str:
        return f"pairs {', '.join(map(str, piece[:4]))}"


class GRPO(PostJob):
    """Answers are drawn, rewarded, compared within their group, and made likelier or unlikelier."""

    def __init__(self, recipe: PostRecipe, world: train.World, machine, tokenizer: Tokenizer):
        super().__init__(recipe, world, machine, tokenizer)
        if recipe.parallel == "fsdp":
            raise UserError("grpo draws answers from whole weights, which FSDP does not keep; take --parallel ddp")
        if recipe.prompts % (world.size * recipe.updates):
            raise UserError(f"--prompts {recipe.prompts} does not divide by {world.size} process(es) times {recipe.updates} "
                            "--updates; take a multiple")
        if recipe.data:
            rows = read_rows(recipe.data, "grpo")
            (self.problems, held), self.reward = held_out_rows(rows, recipe.data), load_reward(recipe.reward)
            self.tests = {"reward": self.askable(held)[0][:recipe.eval_problems]}
            self.fingerprint = {"problems": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
        else:
            self.problems = fresh_problems(recipe.problems)
        self.steps = round(recipe.tokens)
        # Prompts of equal length are drawn together (sample.continue_all), so neighbours by length share a step.
        self.problems, self.ask = self.askable(self.problems)
        self.bunch = math.gcd(recipe.prompts, 8)
        last = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        (ids, mask), = self.chat_format.samples(last)
        said = [i for i, m in zip(ids, mask) if m]
        self.end = ([i for i in said if i in self.chat_format.stop] or said)[-1]  # the token that ends a turn
        self.reference_model = from_pretrained(recipe.start).eval().to(machine.device) if recipe.kl else None
        if self.reference_model:
            self.reference_model.compute_dtype = machine.dtype
        self.length = float(np.mean([len(i) for i in self.ask])) + recipe.max_tokens / 2
        print(f"data      {len(self.problems):,} problems; {self.steps} steps of {recipe.prompts} prompts with "
              f"{recipe.samples} answers each")

    def askable(self, rows: list[dict]) -> tuple[list[dict], list[list[int]]]:
        """The problems whose prompts leave room for --max-tokens, and their ids, the shortest first."""
        found = [(row, self.chat_format.prompt(turns(row["prompt"], "user"))) for row in rows]
        fits = sorted(((row, ids) for row, ids in found if len(ids) + self.recipe.max_tokens <= self.context),
                      key=lambda pair: len(pair[1]))
        if len(fits) < len(found):
            print(f"long      {len(found) - len(fits):,} of {len(found):,} prompts leave fewer than --max-tokens "
                  f"{self.recipe.max_tokens} of {self.context:,} tokens to answer and are left out")
        if not fits:
            raise UserError("no prompt is left; take a smaller --max-tokens")
        return [row for row, _ in fits], [ids for _, ids in fits]

    def roll_out(self, step: int) -> None:
        """This process's samples of a step: `sampled`, (ids, mask) of each; `advantage` [samples]; what is logged."""
        recipe, world = self.recipe, self.world
        count = recipe.prompts // self.bunch  # of bunches in a step, whichever process has which prompt
        bunches = shuffled(step * count, count, -(-len(self.problems) // self.bunch), recipe.seed)
        every = (bunches[:, None] * self.bunch + np.arange(self.bunch)) % len(self.problems)
        chosen = every.reshape(recipe.updates, world.size, -1)[:, world.rank].ravel()  # of each update, its share
        seed = int(np.random.SeedSequence([recipe.seed, step, world.rank]).generate_state(1)[0])
        made = self.answers([self.ask[i] for i in chosen], recipe.samples, {self.end}, temperature=recipe.temperature,
                            seed=seed)
        rewards, self.sampled, lengths = torch.zeros(len(chosen), recipe.samples), [], []
        for row, (i, samples) in enumerate(zip(chosen, made)):
            for n, ids in enumerate(samples):
                rewards[row, n] = reward_of(self.reward, self.problems[i], self.tokenizer.decode(ids))
                ids = ids if len(ids) == recipe.max_tokens else [*ids, self.end]  # a cut one did not end itself
                lengths.append(len(ids))
                self.sampled.append((self.ask[i] + ids, [0] * len(self.ask[i]) + [1] * len(ids)))
        penalty = [overlong_penalty(n, recipe.max_tokens, recipe.overlong) if recipe.overlong else 0.0 for n in lengths]
        advantage = advantages(rewards + torch.tensor(penalty).view_as(rewards), recipe.normalization)
        self.advantage = advantage.flatten()
        mixed = (advantage.abs().amax(1) > 1e-6).float().mean()
        per = len(self.sampled) // recipe.updates  # tokens of each update's samples, over all processes
        self.tokens = [sum(lengths[u * per:(u + 1) * per]) for u in range(recipe.updates)]
        cut = np.mean([n == recipe.max_tokens and ids[-1] != self.end for n, (ids, _) in zip(lengths, self.sampled)])
        found = world.sum(torch.tensor([rewards.mean(), np.mean(lengths), cut, mixed, np.mean(penalty), *self.tokens],
                                       dtype=torch.float32, device=self.machine.device)).tolist()
        self.tokens = found[5:]
        names = ("reward", "length", "cut_off", "mixed_groups", "penalty")
        self.history[step] = {name: value / world.size for name, value in zip(names, found)}

    def update(self, step: int, end: int, **options) -> train.Report:
        """Draws with a generator of (seed, step), then makes `updates` updates, each from its share of the groups."""
        self.roll_out(step)
        self.old = None
        if self.recipe.updates > 1:  # with one update the policy that drew is the one that is trained
            with torch.no_grad():
                self.old = [self.logprobs(piece, self.model) for piece in self.pieces(range(len(self.sampled)))]
                self.old = [row for rows in self.old for row in rows]
        for self.turn in range(self.recipe.updates):
            report = train.training_step(self, step, self.rate(step), **options)
        return report

    def pieces(self, samples) -> list[list[int]]:
        return [list(samples[i:i + self.rows]) for i in range(0, len(samples), self.rows)]

    def logprobs(self, piece: list[int], model) -> Tensor:
        tokens, targets = pad([self.sampled[i] for i in piece], self.machine.device)
        return token_logprobs(model(tokens), targets, self.recipe.temperature)

    def micro_batches(self, step: int, steps: int) -> list[list[int]]:
        per = len(self.sampled) // self.recipe.updates
        mine = range(self.turn * per, (self.turn + 1) * per)
        if self.world.size == 1 and not self.recipe.kl:  # a group that agrees teaches nothing
            mine = [i for i in mine if self.advantage[i]] or mine[:1]
        return self.pieces(mine)

    def load(self, piece, following) -> tuple:
        tokens, targets = pad([self.sampled[i] for i in piece], self.machine.device)
        old = None
        if self.old:
            old = torch.nn.utils.rnn.pad_sequence([self.old[i] for i in piece], batch_first=True)[:, :tokens.shape[1]]
            old = F.pad(old, (0, tokens.shape[1] - old.shape[1]))
        reference = None
        if self.reference_model:
            with torch.no_grad():
                reference = token_logprobs(self.reference_model(tokens), targets, self.recipe.temperature)
        return tokens, targets, self.advantage[piece].to(self.machine.device)[:, None], old, reference

    def loss(self, tokens, targets, advantage, old, reference) -> tuple[Tensor, Tensor | float]:
        recipe, mask = self.recipe, (targets >= 0).float()
        new = token_logprobs(self.parallel(tokens), targets, recipe.temperature)
        old = new.detach() if old is None else old
        samples = recipe.prompts * recipe.samples // recipe.updates
        weights = token_weights(mask, recipe.normalization, samples, self.tokens[self.turn], recipe.max_tokens)
        loss = (weights * policy_loss(new, old, advantage, recipe.clip_low, recipe.clip_high)).sum()
        ratio = (new.detach() - old).exp()
        clipped = ((ratio > 1 + recipe.clip_high) & (advantage > 0)) | ((ratio < 1 - recipe.clip_low) & (advantage < 0))
        self.found = {"clipped": (weights * clipped).sum()}
        if reference is not None:
            divergence = (weights * kl_k3(new, reference)).sum()
            self.found["kl"] = divergence.detach()
            loss = loss + recipe.kl * divergence
        return loss, self.model.routing_loss() * (len(tokens) / samples)

    def batch_tokens(self, step: int, end: int) -> int:
        return round(self.recipe.prompts * self.recipe.samples * self.length)

    def describe(self, piece) -> str:
        return f"samples {', '.join(map(str, piece[:4]))}"


JOBS = {"sft": SFT, "dpo": Preferences, "apo_zero": Preferences, "grpo": GRPO}


# ---- command line ---------------------------------------------------------------------------------------------


def post_train(recipe: PostRecipe, run_folder: Path, resume: bool, world: train.World) -> dict:
    """Runs or continues a recipe in a run folder; returns the last evaluation."""
    machine = train.choose_machine(recipe, world)
    recipe = replace(recipe, device=machine.device, compile=str(machine.compile).lower(),
                     dtype=str(machine.dtype).removeprefix("torch."),
                     parallel="ddp" if recipe.parallel == "auto" else recipe.parallel)
    job = JOBS[recipe.method](recipe, world, machine, Tokenizer.load(run_folder if resume else recipe.start))
    if resume and train.read_recipe(run_folder, PostRecipe)[1] != job.fingerprint:
        raise UserError(f"the data is not what {run_folder} began with; put that back or start a new run")
    job.folder = run_folder
    torch.manual_seed(recipe.seed)
    job.equip(from_pretrained(recipe.start), world.from_first(lambda: newest_checkpoint(run_folder) if resume
                                                                else None), resume)
    job.connect()
    job.flops = cost.flops_per_token(recipe.model, getattr(job, "length", job.context))
    print(f"start     {recipe.start}: {cost.count_parameters(recipe.model)['total']:,} parameters, sequences of up to "
          f"{job.context:,} tokens; {recipe.optimizer} at {recipe.learning_rate:g}, {recipe.method}")
    scores = train.run_job(job, run_folder, resume)
    print(f'Done: {run_folder}. Ask it with: python sample.py {run_folder} --chat --prompt "What is 12 + 30?"')
    return scores


def parse(argv: list[str]) -> tuple[argparse.Namespace, PostRecipe | None]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", help=", ".join([*RECIPES, "merge"]))
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--resume", metavar="RUN", help="continue this run folder from its newest checkpoint")
    parser.add_argument("--name", metavar="NAME", help="of the run folder below runs/ (default: the start's and the method)")
    parser.add_argument("--steps", type=int, metavar="N", help="grpo: steps of sampling and training")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="merge: one a RUN (default: equal, a soup)")
    parser.add_argument("--out", metavar="DIR", help="merge: the new folder")
    args, given = train.read_flags(parser, argv, {k: v for k, v in FLAGS.items() if k != "tokens"},
                                   train.field_comments(train.Recipe, PostRecipe) | {"packing": ""})
    if args.steps is not None:
        given["tokens"] = args.steps
    if args.resume:
        if fixed := [f"--{name}" for name in given if name not in RESUMABLE] + ["a method"] * bool(args.method):
            raise UserError(f"a resumed run cannot change {' or '.join(fixed)}; leave it out or start a new run")
        return args, replace(train.read_recipe(Path(args.resume), PostRecipe)[0], **given)
    if args.method == "merge":
        return args, None
    if args.method not in RECIPES or len(args.runs) != 1:
        wrong = f"there is no method {args.method}; " if args.method and args.method not in RECIPES else ""
        raise UserError(wrong + "give a method and a model, such as: python posttrain.py sft runs/laptop "
                        "(or dpo, apo, grpo, merge)")
    if args.steps is not None and (args.method != "grpo" or args.steps < 1):
        raise UserError("--steps takes 1 or more, of grpo; sft and dpo take --epochs")
    start = args.runs[0]
    if not is_hugging_face(start):
        start = str(train.starting_point(start))  # a checkpoint: what the run does later changes nothing here
    config = load_config(start)
    context = given.get("context") or min(config.max_position_embeddings, 8192)
    if context > config.max_position_embeddings:
        raise UserError(f"--context {context} is more than the {config.max_position_embeddings} that {args.runs[0]} was "
                        "trained on; stretch it first by a stage of train.py")
    recipe = RECIPES[args.method]
    if cost.count_parameters(config)["total"] > 5e7:
        recipe = replace(recipe, **AT_SCALE[args.method])
    sizes = {} if context == config.max_position_embeddings else {"max_position_embeddings": context}
    return args, replace(recipe, model=config.change(**sizes), start=start, **given)


def merge_command(args: argparse.Namespace) -> None:
    weights = args.weights or [1 / max(1, len(args.runs))] * len(args.runs)
    whole = len(weights) == len(args.runs) and math.isclose(sum(weights), 1, abs_tol=1e-6)
    if len(args.runs) < 2 or not args.out or not whole:
        raise UserError("merge takes two models or more, a weight for each that sum to 1, and a new folder: "
                        "python posttrain.py merge A B --weights .9 .1 --out DIR")
    first, out = Path(args.runs[0]), Path(args.out)
    if out.exists():
        raise UserError(f"{out} is already there; give a new folder with --out")
    model = merge(args.runs, weights)
    if is_hugging_face(first):
        print(save_pretrained(model, out, tokenizer_from=first))
    else:
        write_checkpoint(model, Tokenizer.load(first), out, first)
    print(f"{args.out}: " + " + ".join(f"{w:g} {run}" for w, run in zip(weights, args.runs))
          + f"; ask it with: python sample.py {args.out} --chat")


def begin(world: train.World) -> None:
    args, recipe = parse(sys.argv[1:])
    if recipe is None:
        return merge_command(args)
    if args.resume:
        folder = Path(args.resume)
    else:
        stem = re.sub(r"-(sft|dpo|apo|grpo)(-\d+)?$", "", Path(args.runs[0].rstrip("/")).name)
        folder = world.agree(train.new_run_folder(args.name or f"{stem}-{args.method}"))
    post_train(recipe, folder, bool(args.resume), world)


def main() -> None:
    train.command_line(begin)


if __name__ == "__main__":
    run(main)
