"""Post-training: a base model learns to answer (SFT), which of two answers is better (DPO, APO), and what a program
can check (GRPO).

The playbook's order for SmolLM3: SFT, then APO-zero, then a merge of checkpoints; it was released without RL, and GRPO
came later. From a run or a Hugging Face folder:

    python posttrain.py sft runs/laptop                    # -> runs/laptop-sft; built-in problems, no network
    python posttrain.py sft SmolLM3-3B --data chats.jsonl --learning_rate 1e-5
    python posttrain.py apo runs/laptop-sft                # -> runs/laptop-apo; or dpo
    python posttrain.py grpo runs/laptop-sft --reward my_reward.py:score --data problems.jsonl
    python posttrain.py merge runs/laptop-apo runs/laptop-sft --weights .9 .1 --out runs/merged
    python posttrain.py --resume runs/laptop-sft
    python sample.py runs/laptop-sft --chat --prompt "What is 12 + 30?"

Data is jsonl (.gz too), one object a line, a conversation a list of {"role", "content"}:
    sft   {"messages": conversation}
    dpo   {"prompt": text or conversation, "chosen": text or messages, "rejected": text or messages}
    grpo  {"prompt": text or conversation, ...}; the whole object goes to the reward: score(problem, answer) -> number
Any of them may have "tools", and messages "tool_calls", for models whose chat template shows them.

What the playbook found. SFT: a rate of 3e-6 to 1e-5 was best (SmolLM3's recipe has 2e-5), batches of 128 sequences, 4
to 5 epochs of some 8B tokens, loss on the assistant's turns only (a small gain, mostly in following instructions),
sources balanced by tokens. Packing is 3.8 to 5.3 times as fast, but on small data 128 packed rows are few updates:
IFEval lost 12 points, so lower --batch_tokens there. Preferences: APO-zero did best; a rate some 10 times below SFT's
(scan 5 to 20), beta 0.1 (0.01 to 0.5; SmolLM3 0.05), one epoch; a high beta stays close to the start (the playbook's
text once says the opposite). RL: without an overlong penalty the answers' length exploded.

Each method prepares its data (`prepare_sft`, `prepare_preferences`, `prepare_grpo`) and hands its losses to the loop in
train.py: SFT those of pre-training, the others `preference_losses` and `grpo_losses`.
"""

import argparse
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cost
import data as data_
import train
from checkpoint import (copy_chat_format, find_checkpoint, from_pretrained, is_hugging_face, load_config,
                        new_run_folder, newest_checkpoint, save_pretrained, save_weights)
from data import HELD_OUT, Curriculum, Packing, Split, Stage, Tokens, uniform
from evals import Score
from model import GPT, count_parameters
from sample import continue_all
from schedule import rate_share
from tokenizer import (ChatFormat, Parser, Tokenizer, UserError, add_options, given_options, option, parse_options,
                       reading)
from tokenizer import run as run_command

Sequence = tuple[list[int], list[int]]  # ids and, as long, a mask: 1 on the tokens to train on
Example = list[Sequence]  # a conversation, or a chosen and a rejected answer

# ---- built-in problems ----------------------------------------------------------------------------------------
# A problem's hash decides whether it is held out, for arithmetic the same hash as in the pre-training data: no held-out
# sum was ever trained on, in any stage. (A base model reads the functions of `instruction_problems` in its code; it does
# not read the orders about the held-out ones.)


def arithmetic_problems(seed: int) -> Iterator[tuple[str, str, str]]:
    """The math source's worked problems on numbers below 100: (what it asks without its story, question, reply)."""
    for about, text in data_.generated_math(10**9, seed):
        question, reply = text.removeprefix("Question: ").strip().split("\nAnswer: ")
        if max(map(int, re.findall(r"\d+", question))) < 100:
            yield about, question, reply


def lookup_problems(seed: int) -> Iterator[tuple[str, str, str]]:
    """A passage, and a question whose answer stands in it."""
    rng = random.Random(seed)
    while True:
        rows = list(zip(rng.sample(data_.PEOPLE, 3), rng.sample(range(2, 100), 3), rng.sample(data_.THINGS, 3)))
        passage, (who, many, what) = " ".join(f"{p} has {n} {t}." for p, n, t in rows), rng.choice(rows)
        yield passage, f"{passage} How many {what} does {who} have?", f"{who} has {many} {what}."


def instruction_problems(seed: int) -> Iterator[tuple[str, str, str]]:
    """Short orders about the functions of the embedded code."""
    rng, code = random.Random(seed), "\n".join(text for _, text in data_.embedded_code())
    pattern = r"^ *(def ([a-z]\w*)\(([a-z_]\w*(?:, [a-z_]\w*){0,2})\):)"
    functions = sorted(set(re.findall(pattern, code, re.MULTILINE)))
    while True:
        line, name, arguments = rng.choice(functions)
        listed = arguments.replace(", ", " and ")
        yield name, *rng.choice([
            (f"Write the first line of a Python function {name} with the arguments {listed}.", line),
            (f"Which arguments does this function take? {line}", listed),
            (f"What is the name of this function? {line}", name)])


SFT_PROBLEMS = 16_000  # of arithmetic; a fifth as many of each other kind
PROBLEMS = {"arithmetic": arithmetic_problems, "lookup": lookup_problems, "instruction": instruction_problems}


def problems(kind: str, count: int, seed: int, held_out: bool = False, without: Iterable[str] = ()) -> list[dict]:
    """`count` built-in problems, none of the prompts `without`; held-out ones are all different."""
    made, seen = [], set(without)
    for about, prompt, reply in PROBLEMS[kind](seed):
        if (uniform(about) < HELD_OUT) == held_out and prompt not in seen:
            made.append({"kind": kind, "about": about, "prompt": prompt, "reply": reply})
            seen |= {prompt} if held_out else set()
        if len(made) == count:
            return made


def fresh_problems(count: int) -> list[dict]:
    """Arithmetic for preferences and RL that SFT has not trained on: the model knows half of what it has seen by heart,
    and learning from that changes nothing on other problems."""
    return problems("arithmetic", count, 3, without={row["prompt"] for row in problems("arithmetic", SFT_PROBLEMS, 2)})


def correct(problem: dict, answer: str) -> float:
    """The reward of the built-in problems: 1 if the answer's last number is the reply's; an instruction's whole answer
    has to be the reply."""
    said, right = ([text.strip()] if problem["kind"] == "instruction" else re.findall(r"\d+", text)[-1:]
                   for text in (answer, problem["reply"]))
    return float(said == right)


# ---- jsonl ----------------------------------------------------------------------------------------------------

FORMS = {  # what a line of --data must hold, in words
    "sft": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "dpo": '{"prompt": "...", "chosen": "...", "rejected": "..."}, each a text or a list of {"role", "content"}',
    "grpo": '{"prompt": "...", ...}, the prompt a text or a list of {"role", "content"}',
}
FORMS["apo_zero"] = FORMS["dpo"]


def turns(said, role: str) -> list[dict]:
    """A text as a conversation of one turn; a conversation as it is; an exception if it is neither."""
    said = [{"role": role, "content": said}] if isinstance(said, str) else said
    said = [m | {"content": m.get("content") or ""} if m.get("tool_calls") else m for m in said]
    if not said or not all(isinstance(m[name], str) for m in said for name in ("role", "content")):
        raise ValueError
    return said


def parse_row(row: dict, form: str) -> dict:
    """A line's object with its conversations checked and written out; an exception if it is not of the form.

    A preference may repeat the prompt in front of both answers, and then needs no "prompt" (Hugging Face's two forms).
    """
    if form == "grpo":
        turns(row["prompt"], "user")  # checked; the reward sees the line as it is
        return row
    if form == "sft":
        messages = turns(row["messages"], "user")
        [m["role"] for m in messages].index("assistant")  # an exception if there is none
        return {"messages": messages, "tools": row.get("tools")}
    pair = [turns(row[side], "assistant") for side in ("chosen", "rejected")]
    prompt = turns(row.get("prompt", pair[0][:-1]), "user")
    pair = [said[len(prompt):] if said[:len(prompt)] == prompt else said for said in pair]
    (chosen,), (rejected,) = pair
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        raise ValueError
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": row.get("tools")}


def read_rows(name: str, form: str) -> list[dict]:
    """The lines of a jsonl file; UserError with file and line for one that is not of the form."""
    rows = []
    if not Path(name).is_file():
        raise UserError(f"--data {name} is no file; give jsonl with lines such as {FORMS[form]}")
    with reading(name), (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows += [parse_row(json.loads(line), form)] if line.strip() else []
            except Exception:
                raise UserError(f"{name} line {number} is not {FORMS[form]}; correct or remove it") from None
    return rows


def held_out_rows(rows: list[dict], where: str) -> tuple[list[dict], list[dict]]:
    """(train, held out): about HELD_OUT of the rows, of few up to 10, by the hash of what is asked, so that no question
    is on both sides; by the hash of the whole row where there are fewer than 30 questions."""
    def asked(row: dict) -> str:  # a conversation's, up to its first question: the assistant may greet before
        talk = row.get("messages", ())
        roles = [message["role"] for message in talk]
        return json.dumps(row.get("prompt", talk[:roles.index("user") + 1 if "user" in roles else None]))

    for key in (asked, json.dumps):
        counts = Counter(map(key, rows))
        if len(counts) >= 30:
            break
    if len(counts) < 2:
        raise UserError(f"{where} has fewer than 2 different lines, and one must be held out; give more")
    room = max(HELD_OUT * len(rows), min(10, len(rows) / 5))
    order = sorted(counts, key=lambda question: (counts[question] > room, uniform(question)))
    sizes = itertools.accumulate(counts[question] for question in order)
    held = {question for question, size in zip(order, sizes) if size <= room} or {order[0]}
    return [row for row in rows if key(row) not in held], [row for row in rows if key(row) in held]


# ---- conversations as sequences -------------------------------------------------------------------------------


def fit(examples: Iterable[Example], context: int, too_long: str, what: str) -> list[Example]:
    """Examples in at most `context` tokens: longer ones are skipped or cut, as `too_long` says. Left out too is what
    teaches nothing: a sequence without a token to train on, as when all of the reply is cut off, and a pair of equal
    answers. Prints how many."""
    kept, long, same = [], 0, 0
    for whole in examples:
        example = [(ids[:context], mask[:context]) for ids, mask in whole]
        long += example != whole
        if example == whole or too_long == "cut":
            teaches = all(any(mask) for _, mask in example) and example[1:] != example[:1]
            kept += [example] * teaches
            same += not teaches
    if long:
        print(f"long      {long:,} of {what} have more than {context} tokens and are "
              + ("cut" if too_long == "cut" else "left out; --too_long cut keeps their beginnings"))
    if same:
        print(f"left out  {same:,} of {what} have no token to train on, or the same tokens chosen and rejected")
    if not kept:
        raise UserError(f"nothing is left of {what} in {context} tokens; give other data or a larger --context")
    return kept


def conversation_split(name: str, conversations: list[Example]) -> Split:
    """Conversations as a split of documents whose targets are the masked tokens only; data.py packs them."""
    ids, mask = (np.concatenate([np.array(sequence[i], np.int64) for sequence, in conversations]) for i in range(2))
    starts = np.cumsum([0, *(len(ids) for (ids, _), in conversations)])
    return Split(name, Tokens([ids]), starts, 0, "", Tokens([np.where(mask, ids, -100)]))


def pad(sequences: list[Sequence], rows: int = 0, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Sequences as tokens [B, T] and targets [B, T], one a row, padded on the right with targets of -100; B is at least
    `rows` and T a multiple of `multiple`: a compiled model compiles again for each new shape.

    Attention is causal, so padding behind a sequence changes nothing in it.
    """
    ids, mask = (pad_sequence([torch.tensor(part) for part in parts], batch_first=True) for parts in zip(*sequences))
    space = (0, (1 - ids.shape[1]) % multiple, 0, max(0, rows - len(ids)))
    return F.pad(ids[:, :-1], space), F.pad(torch.where(mask > 0, ids, -100)[:, 1:], space, value=-100)


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) in fp32, [B, T], of the policy that samples at a temperature; 0 where the target is -100."""
    return -torch.stack([F.cross_entropy(row.float() / temperature, target, reduction="none")
                         for row, target in zip(logits, targets)])


# ---- preferences ----------------------------------------------------------------------------------------------


def preference_loss(kind: str, policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of whole answers [2, B], chosen and rejected, to (loss [B], implicit rewards [2, B]).

    The implicit reward is r = beta * log(policy / reference). DPO (Rafailov et al. 2023): -log sigmoid(r_c - r_r), in
    which only the difference counts: both may fall. APO-zero (D'Oosterlinck et al. 2024): 1 - sigmoid(r_c) +
    sigmoid(r_r): the chosen one shall rise above the reference and the rejected one fall below it.
    """
    rewards = beta * (policy - reference)
    if kind == "dpo":
        return -F.logsigmoid(rewards[0] - rewards[1]), rewards.detach()
    return 1 - rewards[0].sigmoid() + rewards[1].sigmoid(), rewards.detach()


# ---- reinforcement learning -----------------------------------------------------------------------------------

NORMALIZATIONS = ("grpo", "dapo", "dr_grpo")


def advantages(rewards: Tensor, normalization: str) -> Tensor:
    """Rewards [groups, samples] to how much better each sample is than its group.

    GRPO (Shao et al. 2024) and DAPO divide by the group's standard deviation, which gives more weight to questions that
    are nearly always or nearly never answered; Dr. GRPO (Liu et al. 2025) does not.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred if normalization == "dr_grpo" else centred / (rewards.std(1, keepdim=True) + 1e-4)


def token_weights(mask: Tensor, normalization: str, samples: int, tokens: float, longest: int) -> Tensor:
    """What each sampled token counts in the loss: mask [B, T] of the tokens, of `samples` with `tokens` in all.

    grpo: the mean of the samples' means, in which a token of a long answer counts less: long wrong answers are cheap;
    dapo: the mean over all tokens; dr_grpo: the sum over a constant, the only one without a bias by length.
    """
    share = {"grpo": samples * mask.sum(1, keepdim=True).clamp(min=1), "dapo": tokens, "dr_grpo": samples * longest}
    return mask / share[normalization]


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """The clipped loss (PPO, Schulman et al. 2017) of each token: log-probabilities [B, T] now and when it was sampled,
    advantage [B, 1]. -min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = new / old: the gradient ends where a
    token has already become that much likelier or unlikelier. A higher clip_high leaves rare tokens room to rise
    (DAPO)."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_k3(new: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) from a sampled token: d = reference - new, e^d - d - 1 >= 0."""
    difference = reference - new
    return difference.exp() - difference - 1


def kl_loss(new: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """`kl_k3` times the ratio new / old, whose gradient is, on average, that of KL(policy || reference) (DeepSeek-V3.2,
    TRL). k3 alone has that of KL(reference || policy): it does not know that the policy draws other tokens as it moves.
    """
    return (new - old).exp() * kl_k3(new, reference)


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
        raise UserError(f"--reward {where} cannot be loaded ({type(error).__name__}: {error}); give FILE.py:FUNCTION, "
                        "such as my_reward.py:score with def score(problem, answer)") from None


def reward_of(reward: Callable[[dict, str], float], problem: dict, answer: str) -> float:
    """The reward of an answer; UserError with the sample if the function raises or returns no finite number."""
    try:
        value = float(reward(problem, answer))
        if not math.isfinite(value):
            raise ValueError(f"it returned {value}")
        return value
    except Exception as error:
        raise UserError(f"the reward function failed ({type(error).__name__}: {error}) on the answer {answer!r} to "
                        f"{problem!r}; correct it and start again, or --resume a run with a checkpoint") from None


# ---- merging --------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(folders: list[str], weights: list[float]) -> GPT:
    """The weighted mean of models (a soup with equal weights; Wortsman et al. 2022), parameter by parameter, in fp32.

    SmolLM3: a soup of APO checkpoints, then 0.9 of it and 0.1 of the mid-training checkpoint, which brought back recall
    in long context. One model is in memory besides the sum.
    """
    merged = from_pretrained(folders[0])
    if len({Tokenizer.load(folder).hash for folder in folders}) > 1:
        raise UserError(f"{' and '.join(folders)} have different tokenizers; merge checkpoints of one model")
    state = {name: weights[0] * tensor for name, tensor in merged.state_dict().items()}
    for folder, weight in zip(folders[1:], weights[1:]):
        model = from_pretrained(folder)
        ours, theirs = asdict(merged.config), asdict(model.config)
        if wrong := [name for name in ours if ours[name] != theirs[name]]:
            raise UserError(f"{folder} has {wrong[0]} {theirs[wrong[0]]} and {folders[0]} {ours[wrong[0]]}; merge "
                            "checkpoints of one model")
        for name, tensor in model.state_dict().items():
            state[name] += weight * tensor
    merged.load_state_dict(state)
    return merged


# ---- recipes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PostRecipe(train.Recipe):
    """A training run that starts from a model. Tokens, pairs and prompts of an update are those of all processes."""

    method: str = option("sft", "what to train for", choices=("sft", "dpo", "apo_zero", "grpo"))
    data: str = option("", "jsonl files, separated by commas; none: the built-in problems")
    steps: int = option(0, "updates, of grpo steps of sampling and training; 0: as --epochs says", 0, 10**12)
    epochs: float = option(1.0, "how often to go through the data", 1e-9, 1e6)
    context: int = option(0, "tokens of a sequence; 0: as many as the model was trained on, at most 8192", 0, 2**30)
    too_long: str = option("skip", "what to do with conversations of more tokens", choices=("skip", "cut"))
    assistant_only: bool = option(True, "sft: loss on what the assistant says only")
    problems: int = option(SFT_PROBLEMS, "built-in: arithmetic problems; sft adds a fifth as many of each other kind",
                           100, 10**9)
    eval_problems: int = option(1000, "held-out problems, or conversations, of an evaluation", 2, 5000)
    pairs: int = option(32, "dpo: preferences of an update", 1, 10**9)
    beta: float = option(0.1, "dpo: how close to stay to the start; high is close", 1e-9, 1e9)
    nll: float = option(0.0, "dpo: weight of the chosen answer's own loss, nats per token (Pang et al. 2024)", 0, 1e6)
    prompts: int = option(32, "grpo: prompts of a step", 1, 10**9)
    samples: int = option(8, "grpo: answers to each, which are compared; dpo: drawn to find built-in pairs", 2, 10**6)
    updates: int = option(1, "grpo: how many updates a step's samples are divided into", 1, 10**6)
    max_tokens: int = option(56, "of a sampled answer", 1, 2**30)
    temperature: float = option(1.0, "of the sampling", 1e-6, 1e6)
    normalization: str = option("dapo", "grpo: of advantages and lengths", choices=NORMALIZATIONS)
    clip_low: float = option(0.2, "grpo: how far a token's probability may fall in a step", 0, 1)
    clip_high: float = option(0.28, "grpo: and rise", 0, 1e6)
    kl: float = option(0.0, "grpo: weight of the divergence from the start; 0: no second model in memory", 0, 1e6)
    overlong: int = option(0, "grpo: tokens before --max_tokens over which the penalty for length grows to 1", 0, 2**30)
    reward: str = option("", "grpo: FILE.py:FUNCTION; none: whether the built-in answer is right")

    def __post_init__(self):
        super().__post_init__()
        if self.method == "grpo" and bool(self.data) != bool(self.reward):
            raise UserError("--data and --reward belong together in grpo: give both, or neither for built-in problems")


# For the laptop's 1.8M parameters, by measuring; AT_SCALE is what changes above 50M: SmolLM3's values, GRPO's from TRL.
SFT_RECIPE = PostRecipe(optimizer="muon", learning_rate=4e-3, batch_tokens=2048, packing="best-fit", schedule="cosine",
                        warmup_steps=20, final_share=0.1, weight_decay=0.0, eval_every=10**9)
DPO_RECIPE = replace(SFT_RECIPE, method="dpo", optimizer="adamw", learning_rate=1e-5, nll=2.0, samples=6, problems=2500,
                     epochs=4, eval_problems=3000)
POST_RECIPES = {
    "sft": SFT_RECIPE, "dpo": DPO_RECIPE, "apo": replace(DPO_RECIPE, method="apo_zero"),
    "grpo": replace(SFT_RECIPE, method="grpo", optimizer="adamw", learning_rate=1.5e-4, warmup_steps=5, steps=40,
                    prompts=64, problems=4000, eval_problems=3000),
}
AT_SCALE = {
    "sft": dict(optimizer="adamw", learning_rate=2e-5, batch_tokens=2**20, clip=0.2, epochs=4),
    "dpo": dict(learning_rate=1e-6, nll=0.0, epochs=1), "apo": dict(learning_rate=1e-6, beta=0.05, nll=0.0, epochs=1),
    "grpo": dict(learning_rate=1e-6, steps=500, max_tokens=2500, overlong=500),
}


# ---- a run ----------------------------------------------------------------------------------------------------


@dataclass
class PostRun(train.Run):
    """A training run that starts from a model and asks it questions."""

    chat_format: ChatFormat | None = None
    end: int = 0  # the token that ends the assistant's turn
    tests: dict[str, list] = field(default_factory=dict)  # held-out problems with their prompts' ids, by kind
    held: dict[str, list[Example]] = field(default_factory=dict)  # held-out conversations by file, or "pairs"
    before: dict[str, list[float]] = field(default_factory=dict)  # the start's scores, one for each held-out example
    reward: Callable[[dict, str], float] = correct
    examples: list = field(default_factory=list)  # dpo: pairs; grpo: problems with their prompts' ids
    reference: Tensor | GPT | None = None  # dpo: [2, pairs and held-out pairs], log-probabilities; grpo: the start


def batches(items, size: int) -> list:
    return [items[i:i + size] for i in range(0, len(items), size)]


def prompt_of(run: PostRun, row: dict) -> list[int]:
    return run.chat_format.prompt(turns(row["prompt"], "user"), row.get("tools"))


def askable(run: PostRun, rows: list[dict]) -> list[tuple[dict, list[int]]]:
    """The problems whose prompts leave room for --max_tokens, with the prompts' ids, the shortest first: prompts of
    equal length are drawn together (sample.continue_all), so neighbours by length share a step."""
    found = sorted(((row, prompt_of(run, row)) for row in rows), key=lambda pair: len(pair[1]))
    room = run.recipe.model.max_position_embeddings - run.recipe.max_tokens
    kept = [pair for pair in found if len(pair[1]) <= room]
    if not kept:
        raise UserError(f"every prompt has more than {room:,} tokens; take a smaller --max_tokens or shorter prompts")
    if len(kept) < len(found):
        print(f"long      {len(found) - len(kept):,} of {len(found):,} prompts have more than {room:,} tokens, which leaves "
              "fewer than --max_tokens to answer, and are left out")
    return kept


def draw_answers(run: PostRun, prompts: list[list[int]], samples: int = 1, **options) -> list[list[list[int]]]:
    """ids [prompts][samples][at most max_tokens] of what the model answers; the longest were cut off."""
    made = continue_all(run.model.eval(), prompts, run.recipe.max_tokens, samples, **{
        "stop": run.chat_format.stop | {run.end}, "vocab_size": run.tokenizer.vocab_size, "at_once": 256, **options})
    run.model.train()
    return made


def logprobs(run: PostRun, model, sequences: list[Sequence], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the trained tokens and their mask, [sequences, T]; both 0 for the other tokens."""
    shape = (run.rows[0], 64) if run.machine.compile else ()
    tokens, targets = (x.to(run.machine.device) for x in pad(sequences, *shape))
    found = token_logprobs(model(tokens), targets, temperature)
    return found[:len(sequences)], (targets >= 0).float()[:len(sequences)]


def sums_of(run: PostRun, model, examples: list[Example]) -> Tensor:
    """Log-probabilities of whole answers, [sides, examples]."""
    return logprobs(run, model, [side for half in zip(*examples) for side in half])[0].sum(1).view(-1, len(examples))


@torch.no_grad()
def all_sums(run: PostRun, examples: list[Example]) -> Tensor:
    """`sums_of` any number of examples, on the CPU; the processes share the work."""
    size, total = run.world.size, len(examples)
    mine = [examples[i % total] for i in range(run.world.rank, -(-total // size) * size, size)]  # FSDP: all equally many
    run.model.eval()
    sums = torch.cat([sums_of(run, run.model, piece).cpu() for piece in tqdm(
        batches(mine, max(1, run.rows[0] // len(mine[0]))), "scoring", leave=False, delay=1)], 1)
    run.model.train()
    return torch.stack(run.world.gather(sums), 2).flatten(1)[:, :total]


def shuffled(first: int, count: int, n: int, seed: int) -> np.ndarray:
    """The items first .. first + count of an endless stream of shuffled epochs of range(n)."""
    index = np.arange(first, first + count)
    return np.concatenate([data_.permute(index[index // n == epoch] % n, n, [seed, int(epoch)])
                           for epoch in np.unique(index // n)])


def note(run: PostRun, **values: Tensor) -> None:
    """Adds to what the log says of an update; summed over pieces and processes."""
    for name, value in values.items():
        run.found[name] = run.found.get(name, 0) + value.detach()


# ---- SFT ------------------------------------------------------------------------------------------------------


def conversations(run: PostRun, rows: Iterable[dict]) -> Iterator[Example]:
    """The samples of jsonl rows, or of built-in problems with their replies."""
    for row in rows:
        talk = row.get("messages") or turns(row["prompt"], "user") + turns(row["reply"], "assistant")
        samples = run.chat_format.samples(talk, row.get("tools"))
        if not run.recipe.assistant_only:
            samples = [(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in samples[-1:]]
        yield from batches(samples, 1)


def prepare_sft(run: PostRun, given: dict[str, list[dict]], resume: bool) -> tuple[int, float]:
    """Packs conversations into rows for `train.pretraining_losses`."""
    recipe, context, splits = run.recipe, run.recipe.model.max_position_embeddings, []
    sides = {Path(file).stem: held_out_rows(rows, file) for file, rows in given.items()} or {
        kind: (problems(kind, recipe.problems // (1 if kind == "arithmetic" else 5), 2), []) for kind in PROBLEMS}
    for name, (rows, held) in sides.items():
        talks = conversations(run, tqdm(rows, name, leave=False, delay=1))
        splits.append(conversation_split(name, fit(talks, context, recipe.too_long, name)))
        if held:
            talks = conversations(run, held[:recipe.eval_problems])
            run.held[name] = fit(talks, context, recipe.too_long, f"held-out {name}")
    rows = sum(Packing(split, context, recipe.packing).count for split in splits)
    run.steps = recipe.steps or math.ceil(recipe.epochs * rows * context / recipe.batch_tokens - 1e-9)
    run.recipe = replace(recipe, stages=(Stage("sft", run.steps * recipe.batch_tokens, {}),))
    run.rows = run.world.agree(cost.stage_rows(run.recipe, run.world.size, run.machine.device))
    run.curriculum = Curriculum(splits, run.recipe.stages, context, recipe.batch_tokens, recipe.seed, recipe.packing)
    run.loader = train.Loader(run.curriculum, run.machine.device)
    lengths = {split.name: np.diff(split.starts) for split in splits}
    print("data      " + ", ".join(f"{name} {len(sizes):,} conversations" for name, sizes in lengths.items())
          + f" in {rows:,} rows of {context} tokens, {run.steps:,} steps")
    return 0, np.concatenate([*lengths.values()]).mean()


# ---- DPO and APO ----------------------------------------------------------------------------------------------


def prepare_preferences(run: PostRun, given: dict[str, list[dict]], resume: bool) -> tuple[int, float]:
    """Pairs as sequences, and the start's log-probabilities of them, computed once, so that no second model is kept; a
    resumed run has what was drawn and computed in its folder."""
    recipe, context, own = run.recipe, run.recipe.model.max_position_embeddings, run.folder / "pairs.jsonl"
    rows = sum(given.values(), []) or (read_rows(str(own), "dpo") if resume else draw_pairs(run))
    run.examples, run.held["pairs"] = (
        fit((answer_pair(run, row) for row in tqdm(side, what, leave=False, delay=1)), context, recipe.too_long, what)
        for side, what in zip(held_out_rows(rows, recipe.data or "what the start drew"), ("pairs", "held-out pairs")))
    with reading(file := run.folder / "reference.pt"):
        run.reference = torch.load(file, weights_only=True) if resume else all_sums(run, run.examples + run.held["pairs"])
        if run.world.leader and not resume:
            run.folder.mkdir(parents=True, exist_ok=True)
            torch.save(run.reference, file)
            own.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run.steps = recipe.steps or math.ceil(recipe.epochs * len(run.examples) / recipe.pairs)
    print(f"data      {len(run.examples):,} pairs and {len(run.held['pairs']):,} held out, {run.steps:,} steps of "
          f"{recipe.pairs}")
    return 2 * recipe.pairs, np.mean([len(ids) for pair in run.examples for ids, _ in pair])


def draw_pairs(run: PostRun) -> list[dict]:
    """Problems of which the start answers some right and some wrong: its own answers, judged by the checker. Every
    process draws all of them: FSDP needs all."""
    recipe, found = run.recipe, []
    rows, prompts = zip(*askable(run, fresh_problems(recipe.problems)))
    print(f"pairs     drawing {recipe.samples} answers to each of {len(rows):,} training problems", flush=True)
    made = draw_answers(run, prompts, recipe.samples, temperature=recipe.temperature, seed=recipe.seed)
    for row, samples in zip(rows, made):
        texts = dict.fromkeys(run.tokenizer.decode(ids) for ids in samples if 0 < len(ids) < recipe.max_tokens)
        right, wrong = ([text for text in texts if correct(row, text) == value] for value in (1, 0))
        found += [parse_row({"prompt": row["prompt"], "chosen": a, "rejected": b}, "dpo") for a, b in zip(right, wrong)]
    if len(found) < 2:
        raise UserError("the start answers no two problems both rightly and wrongly, so there are no pairs to prefer; "
                        "begin with a model that has seen SFT: python posttrain.py sft RUN")
    return found


def answer_pair(run: PostRun, row: dict) -> Example:
    """The chosen and the rejected answer behind the prompt; only what follows the prompt counts."""
    prompt, pair = prompt_of(run, row), []
    for answer in (row["chosen"], row["rejected"]):
        ids, mask = run.chat_format.samples([*row["prompt"], answer], row["tools"])[-1]
        same = next((i for i, (a, b) in enumerate(zip(ids, prompt)) if a != b), len(prompt))
        pair.append((ids, [0] * same + mask[same:]))
    return pair


def preference_losses(run: PostRun, step: int) -> list[Callable]:
    """The losses of this process's pairs of a step.

    An unlikely token of a rejected answer has a far larger gradient than the likely ones of the chosen answer, so that
    both can fall and the model with them (Ren & Sutherland 2024); --nll also trains the chosen one as SFT does.
    """
    recipe, share = run.recipe, 1 / run.recipe.pairs

    def loss_of(piece: np.ndarray) -> tuple[Tensor, Tensor | float]:
        pairs = [run.examples[i] for i in piece]
        policy = sums_of(run, run.parallel, pairs)
        loss, rewards = preference_loss(recipe.method, policy, run.reference[:, piece].to(policy.device), recipe.beta)
        loss = loss - recipe.nll * policy[0] / torch.tensor([sum(mask) for (_, mask), _ in pairs], device=loss.device)
        chosen, rejected = rewards * share
        note(run, accuracy=(chosen > rejected).sum() * share, margin=(chosen - rejected).sum(),
             chosen_reward=chosen.sum(), rejected_reward=rejected.sum())
        return loss.sum() * share, run.model.routing_loss() * (len(pairs) * share)

    mine = shuffled(step * recipe.pairs, recipe.pairs, len(run.examples), recipe.seed)[run.world.rank::run.world.size]
    return [functools.partial(loss_of, piece) for piece in batches(mine, max(1, run.rows[0] // 2))]


# ---- GRPO -----------------------------------------------------------------------------------------------------


def prepare_grpo(run: PostRun, given: dict[str, list[dict]], resume: bool) -> tuple[int, float]:
    """Problems to draw answers to."""
    recipe = run.recipe
    if given:
        rows, held = held_out_rows(sum(given.values(), []), recipe.data)
        run.reward, run.tests["reward"] = load_reward(recipe.reward), askable(run, held[:recipe.eval_problems])
    run.examples = askable(run, rows if given else fresh_problems(recipe.problems))
    run.steps = recipe.steps or math.ceil(recipe.epochs * len(run.examples) / recipe.prompts)
    if recipe.kl:
        run.reference = from_pretrained(recipe.start).eval().to(run.machine.device)
        run.reference.compute_dtype = run.machine.dtype
    print(f"data      {len(run.examples):,} problems, {run.steps:,} steps of {recipe.prompts} prompts with "
          f"{recipe.samples} answers each")
    return recipe.prompts * recipe.samples, np.mean([len(ids) for _, ids in run.examples]) + recipe.max_tokens / 2


def roll_out(run: PostRun, step: int) -> tuple[list[tuple[Sequence, float]], list[float], dict[str, Tensor]]:
    """This process's samples of a step, drawn with a generator of (seed, step), each with its advantage; the tokens of
    each update's samples over all processes; what to log."""
    recipe, world, n, bunch = run.recipe, run.world, len(run.examples), math.gcd(run.recipe.prompts, 8)
    count = recipe.prompts // bunch  # bunches of neighbours in a step, whichever process has which prompt
    bunches = shuffled(step * count, count, -(-n // bunch), recipe.seed)[:, None] * bunch + np.arange(bunch)
    mine = bunches.reshape(recipe.updates, world.size, -1)[:, world.rank].ravel() % n  # of each update, its share
    rows, prompts = zip(*(run.examples[i] for i in mine))
    seed = int(np.random.SeedSequence([recipe.seed, step, world.rank]).generate_state(1)[0])
    made = draw_answers(run, prompts, recipe.samples, temperature=recipe.temperature, seed=seed, stop=run.end)
    sequences, table = [], []
    for row, prompt, group in zip(rows, prompts, made):
        for ids in group:
            reward, ended = reward_of(run.reward, row, run.tokenizer.decode(ids)), len(ids) < recipe.max_tokens
            ids = ids + [run.end] * ended  # one that was cut off did not end itself
            sequences.append((prompt + ids, [0] * len(prompt) + [1] * len(ids)))
            table.append((reward, overlong_penalty(len(ids), recipe.max_tokens, recipe.overlong), len(ids), not ended))
    reward, penalty, length, cut_off = torch.tensor(table, dtype=torch.float32).T  # [samples]
    total = (reward + penalty).view(-1, recipe.samples)
    mixed = (total.amax(1) > total.amin(1)).float()  # a group that agrees teaches nothing, not even by rounding
    advantage = advantages(total, recipe.normalization) * mixed[:, None]
    found = {"reward": reward, "length": length, "cut_off": cut_off, "mixed_groups": mixed, "penalty": penalty}
    return (list(zip(sequences, advantage.flatten().tolist())),
            world.sum(length.view(recipe.updates, -1).sum(1)).tolist(),
            {name: values.mean() / world.size for name, values in found.items()})


def grpo_losses(run: PostRun, step: int) -> list[Callable]:
    """Draws and rewards answers, compares them within their group, and makes all updates of the step but the last;
    returns the losses of the last one, which make good answers likelier and bad ones less likely."""
    recipe, samples = run.recipe, run.recipe.prompts * run.recipe.samples // run.recipe.updates
    sampled, tokens, drawn = roll_out(run, step)

    def policy(model, piece: list[tuple[Sequence, float]]) -> tuple[Tensor, Tensor]:
        return logprobs(run, model, [sequence for sequence, _ in piece], recipe.temperature)

    def loss_of(piece: list[tuple[Sequence, float]], old: Tensor | None, total: float, part: float):
        new, mask = policy(run.parallel, piece)
        old = new.detach() if old is None else old
        advantage = torch.tensor([value for _, value in piece], device=new.device)[:, None]
        loss = policy_loss(new, old, advantage, recipe.clip_low, recipe.clip_high)
        clipped = mask * (loss != -(new - old).exp() * advantage)
        note(run, clipped=clipped.sum() / total, **{name: value * part for name, value in drawn.items()})
        if run.reference:
            reference, _ = frozen(run.reference, piece)
            note(run, kl=(mask * kl_k3(new, reference)).sum() / total)
            loss = loss + recipe.kl * kl_loss(new, old, reference)
        weights = token_weights(mask, recipe.normalization, samples, total, recipe.max_tokens)
        return (weights * loss).sum(), run.model.routing_loss() * (len(piece) / samples)

    frozen = torch.no_grad()(policy)
    shares = [batches([one for one in share if one[1] or recipe.kl] or share[:1], run.rows[0])
              for share in batches(sampled, len(sampled) // recipe.updates)]
    olds = [[frozen(run.model, piece)[0] if recipe.updates > 1 else None  # with one update it is the policy that drew
             for piece in pieces] for pieces in shares]
    for pieces, old, total in zip(shares, olds, tokens):
        losses = [functools.partial(loss_of, piece, before, total, 1 / len(pieces)) for piece, before in zip(pieces, old)]
        if pieces is not shares[-1]:
            train.update(run, losses, run.rate(step))
    return losses


# ---- scores before and after ----------------------------------------------------------------------------------


def scores_now(run: PostRun) -> dict[str, list[float]]:
    """One number for each held-out example: the reward of a greedy answer and of one drawn at --temperature, which is
    what RL rewards; the loss of conversations; the margin of pairs, once there is a difference from the start."""
    found, recipe, plain = {}, run.recipe, run.step == 0 and run.recipe.method == "sft"
    for kind, tests in run.tests.items():
        rows, prompts = zip(*tests)
        if plain:  # a base model has never seen a chat: as text to continue, in the form of the pre-training data
            prompts = [run.chat_format.text(f"Question: {row['prompt']}\nAnswer:") for row in rows]
        for name, temperature in ((kind, 0.0), (f"{kind}, sampled", recipe.temperature)):
            texts = [run.tokenizer.decode(ids) for ids, in draw_answers(run, prompts, temperature=temperature, seed=1)]
            found[name] = [reward_of(run.reward, row, text.split("\n")[0] if plain else text)
                           for row, text in zip(rows, texts)]
    for name, examples in run.held.items():
        sums = all_sums(run, examples)
        if recipe.method == "sft":
            found[f"{name}, nats per token"] = [-nats / sum(mask) for nats, ((_, mask),) in zip(sums[0].tolist(), examples)]
        elif run.step:
            _, (chosen, rejected) = preference_loss(recipe.method, sums, run.reference[:, -len(examples):], recipe.beta)
            found |= {"held-out pairs right": (chosen > rejected).double().tolist(),
                      "held-out margin": (chosen - rejected).tolist()}
    return found


def evaluate_answers(run: PostRun, last: bool) -> dict:
    """Prints how the model does on what is held out, and what has changed; returns means and errors for the log."""
    if run.step == 1 and not last:
        return {}  # the loop asks after the first update, and the start was just scored
    found, lines, entry = scores_now(run), [f"step {run.step:,}, held out:"], {"val": {}, "stderr": {}}
    for name, values in found.items():
        about = [row.get("about") or json.dumps(row["prompt"]) for row, _ in run.tests.get(name.split(",")[0], ())]
        now, then = Score.of(values, groups=about), run.before.get(name)
        entry["val"][name], entry["stderr"][name] = now.mean, now.stderr
        lines.append(f"  {name:20} {now}")
        if then:
            then, change = (Score.of(part, groups=about) for part in (then, np.subtract(values, then)))
            lines[-1] += f"   before {then.mean:.3f} ± {then.stderr:.3f}   change {change.mean:+.3f} ± {change.stderr:.3f}"
    if run.before:
        lines.append("  (± is one standard error, in which questions about the same thing count as one; that of a change "
                     "is paired: the same questions before and after)")
    run.before = run.before or found
    train.say("\n".join(lines) + "\n")
    return entry


# ---- command line ---------------------------------------------------------------------------------------------

METHODS = {"sft": (prepare_sft, train.pretraining_losses), "dpo": (prepare_preferences, preference_losses),
           "apo_zero": (prepare_preferences, preference_losses), "grpo": (prepare_grpo, grpo_losses)}


def set_up(recipe: PostRecipe, folder: Path, world: train.World, resume: bool) -> PostRun:
    """Reads the data, loads the start or the checkpoint to resume, and prepares what the method trains on."""
    size, unit = {"sft": "batch_tokens", "grpo": "prompts"}.get(recipe.method, "pairs"), world.size * recipe.updates
    if getattr(recipe, size) % unit:
        raise UserError(f"--{size} {getattr(recipe, size)} does not divide by {world.size} process(es) times --updates "
                        f"{recipe.updates}; take a multiple of {unit}")
    if recipe.method == "grpo":
        if recipe.parallel == "fsdp":
            raise UserError("grpo draws answers from whole weights, which FSDP does not keep; take --parallel ddp")
        recipe = replace(recipe, parallel="ddp")
    given = {file: read_rows(file, recipe.method) for file in recipe.data.split(",") if file}
    fingerprint = {file: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for file, rows in given.items()}
    if resume and list(train.read_recipe(folder, PostRecipe)[1].values()) != list(fingerprint.values()):
        raise UserError(f"the data is not what {folder} began with; put that back or start a new run")
    begun, machine = newest_checkpoint(folder) if resume else None, world.agree(cost.choose_machine(recipe))
    context, source = recipe.model.max_position_embeddings, begun or recipe.start
    recipe = cost.settle(recipe, machine, world.size, context)
    torch.manual_seed(recipe.seed)
    tokenizer, model = Tokenizer.load(source), from_pretrained(source)
    model.config = recipe.model
    run = PostRun(**vars(train.make_run(
        recipe, folder, world, machine, tokenizer, model, 0, None, begun, resume, fingerprint=fingerprint,
        command="python posttrain.py")), chat_format=ChatFormat(source, tokenizer))
    run.end = last_token(run.chat_format)
    fitting = (n for n in (256, 128, 64, 32, 16, 8, 4, 2) if cost.fits(recipe, n, context, world.size, machine.device))
    run.rows = world.agree([recipe.micro_batch or next(fitting, 1)])  # sequences computed at once
    for kind in () if given else PROBLEMS if recipe.method == "sft" else ("arithmetic",):
        count = recipe.eval_problems if kind == "arithmetic" else 100
        run.tests[kind] = askable(run, problems(kind, count, 1, held_out=True))
    sequences, length = METHODS[recipe.method][0](run, given, resume)
    run.tokens_per_step, run.flops = round(sequences * length), cost.flops_per_token(recipe.model, length)
    run.rate = lambda step: recipe.learning_rate * rate_share(
        recipe.schedule, step, run.steps, recipe.warmup_steps, round(max(0.0, recipe.decay_share) * run.steps),
        recipe.decay_shape, recipe.final_share)
    print(f"start     {recipe.start}: {count_parameters(recipe.model)['total']:,} parameters, sequences of up to "
          f"{context:,} tokens; {recipe.optimizer} at {recipe.learning_rate:g}, {recipe.method}; {machine.reason}")
    return run


def last_token(chat_format: ChatFormat) -> int:
    """The control token that ends an assistant's turn in training, or else one at which the model stops."""
    ids, mask = chat_format.samples([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])[-1]
    said = [i for i, trained in zip(ids, mask) if trained and i in chat_format.tokenizer.special.values()]
    return (said or sorted(chat_format.stop))[-1]


def post_train(recipe: PostRecipe, folder: Path, resume: bool = False, world: train.World | None = None) -> dict:
    """Runs or resumes a recipe in a run folder; returns the last evaluation."""
    run = train.connect(set_up(recipe, folder, world or train.World(), resume))
    if resume:
        run.before = next((entry["before"] for entry in run.log.entries() if "before" in entry), {}) if run.log else {}
    else:
        scores = evaluate_answers(run, False)
        if run.log:
            copy_chat_format(recipe.start, folder, run.tokenizer)
            run.log.write(step=0, tokens=0, **scores, before=run.before)
    scores = train.train(run, METHODS[recipe.method][1], evaluate_answers)
    drawn = [entry for entry in run.log.entries() if "mixed_groups" in entry] if run.log else []
    if drawn and not any(entry["mixed_groups"] for entry in drawn):
        print(f"Nothing was learned: in all {len(drawn):,} steps every answer to a prompt had the same reward (on average "
              f"{np.mean([entry['reward'] for entry in drawn]):g}); take prompts that the start answers sometimes well and "
              "sometimes badly, a finer --reward or more --samples")
    else:
        print(f'Done: {folder}. Ask it with: python sample.py {folder} --chat --prompt "What is 12 + 30?"')
    return scores


def absolute(paths: str) -> str:
    """Paths, separated by commas, that mean the same in every folder: a run may be resumed from another one."""
    return ",".join(str(Path(path).resolve()) for path in paths.split(",") if path)


def parse(argv: list[str]) -> tuple[argparse.Namespace, PostRecipe | None]:
    """The command line, and the recipe that it names with the flags applied; None for a merge."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help=", ".join([*POST_RECIPES, "merge"]))
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--resume", metavar="RUN", help="continue this run folder from its newest checkpoint")
    parser.add_argument("--name", metavar="NAME", help="of the folder in runs/ (default: the start's and the method)")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="merge: one a RUN (default: equal)")
    parser.add_argument("--out", metavar="DIR", help="merge: the new folder")
    add_options(parser, PostRecipe, without="""tokens method packing start sample_prompt eval_tokens eval_tasks z_loss
        document_mask""".split())
    args = parse_options(parser, argv)
    given, method = given_options(args, PostRecipe), args.task
    given |= {name: absolute(given[name]) for name in ("data", "reward") if name in given}
    if args.resume:
        return args, train.resumed(args, given, ["the method"] * bool(method), PostRecipe, train.RESUMABLE | {"reward"})
    if method == "merge":
        return args, None
    if method not in POST_RECIPES or len(args.runs) != 1:
        raise UserError("give a method and a model, such as: python posttrain.py sft runs/laptop (or dpo, apo, "
                        "grpo, merge)")
    start = args.runs[0] if is_hugging_face(args.runs[0]) else find_checkpoint(args.runs[0])  # not what the run does later
    config = load_config(start)
    trained = config.max_position_embeddings
    context = given.get("context") or min(trained, 8192)
    if context > trained:
        raise UserError(f"--context {context} is more than the {trained} that {start} was trained on; stretch it first "
                        "by a stage of train.py")
    scale = AT_SCALE[method] if count_parameters(config)["total"] > 5e7 else {}
    return args, replace(POST_RECIPES[method], **{
        **scale, "model": config.change(max_position_embeddings=context), "start": absolute(str(start)), **given})


def merge_command(runs: list[str], weights: list[float], out: str) -> None:
    if len(runs) < 2 or not out or len(weights) != len(runs) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError("merge takes two models or more, a weight for each that sum to 1, and a new folder: "
                        "python posttrain.py merge A B --weights .9 .1 --out DIR")
    if Path(out).exists():
        raise UserError(f"{out} is already there; give a new folder with --out")
    model = merge(runs, weights)
    if is_hugging_face(runs[0]):
        print(save_pretrained(model, out, tokenizer_from=runs[0]))
    else:
        save_weights(model, Tokenizer.load(runs[0]), out, chat_from=runs[0])
    print(f"{out}: " + " + ".join(f"{weight:g} {folder}" for weight, folder in zip(weights, runs))
          + f"; ask it with: python sample.py {out} --chat")


def begin(world: train.World) -> None:
    args, recipe = parse(sys.argv[1:])
    if recipe is None:
        return merge_command(args.runs, args.weights or [1 / max(1, len(args.runs))] * len(args.runs), args.out)
    if args.resume:
        folder = Path(args.resume)
    else:
        stem = re.sub(r"-(sft|dpo|apo|grpo)(-\d+)?$", "", Path(args.runs[0]).name)
        folder = world.agree(new_run_folder(args.name or f"{stem}-{args.task}"))
    post_train(recipe, folder, bool(args.resume), world)


def main() -> None:
    train.command_line(begin)


if __name__ == "__main__":
    run_command(main)
