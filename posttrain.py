"""Post-training: a base model learns to answer (SFT), which of two answers is better (DPO, APO), and what a program
can check (GRPO). From a run or a Hugging Face folder:

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
All may have "tools", and messages "tool_calls", for models whose chat template shows them.

What the playbook found. SmolLM3 is SFT, then APO-zero, then a merge of checkpoints; GRPO came later. SFT: a rate of
3e-6 to 1e-5 was best (SmolLM3's recipe has 2e-5), batches of 128 sequences, 4 to 5 epochs of some 8B tokens, loss on
the assistant's turns only (a small gain, mostly in following instructions), sources balanced by tokens. Packing is 3.8
to 5.3 times as fast, but on small data 128 packed rows are few updates: IFEval lost 12 points, so lower --batch_tokens
there. Preferences: APO-zero did best; a rate 5 to 20 times below SFT's, beta 0.1 (0.01 to 0.5; SmolLM3 0.05), one
epoch; a high beta stays close to the start (the playbook's text once says the opposite). RL: without an overlong
penalty the answers' length exploded.

Each method prepares its data (`prepare_sft` and so on) and hands its losses to the loop in train.py.
"""

import argparse
import functools
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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
from data import HELD_OUT, Curriculum, Packing, Split, Stage, permute, uniform
from evals import Score
from model import GPT, count_parameters
from sample import continue_all
from schedule import rate_share
from tokenizer import (ChatFormat, Parser, Tokenizer, UserError, add_options, given_options, option, parse_options,
                       reading)
from tokenizer import run as run_command

Ids = list[int]
Sequence = tuple[Ids, Ids]  # ids and, as long, a mask: 1 on the tokens to train on
Example = list[Sequence]  # a conversation, or a chosen and a rejected answer
Rows = list[dict]  # lines of jsonl, or built-in problems

# ---- built-in problems ----------------------------------------------------------------------------------------

SFT_PROBLEMS = 16_000


def problems(count: int, seed: int, held_out: bool = False, without: Iterable[str] = ()) -> Rows:
    """`count` of the math source's worked problems on numbers below 100, none of the prompts `without`; held-out ones
    are all different. "about" is what a problem asks without its story: its hash decides whether it is held out, as in
    the pre-training data, so no held-out sum was ever trained on, in any stage."""
    made, seen = [], set(without)
    for about, text in data_.generated_math(10**9, seed):
        prompt, reply = text.removeprefix("Question: ").strip().split("\nAnswer: ")
        small = max(map(int, re.findall(r"\d+", prompt))) < 100
        if small and prompt not in seen and (uniform(about) < HELD_OUT) == held_out:
            made.append({"about": about, "prompt": prompt, "reply": reply})
            seen |= {prompt} if held_out else set()
        if len(made) == count:
            return made


def fresh_problems(count: int) -> Rows:
    """Problems that SFT has not trained on, for preferences and RL: the model knows half of those by heart, and
    learning from them changes nothing on other problems."""
    return problems(count, 3, without={row["prompt"] for row in problems(SFT_PROBLEMS, 2)})


def correct(problem: dict, answer: str) -> float:
    """The reward of the built-in problems: 1 if the last number of the answer's first line is the reply's."""
    said, right = (re.findall(r"\d+", text.strip().split("\n")[0])[-1:] for text in (answer, problem["reply"]))
    return float(said == right)


# ---- data -----------------------------------------------------------------------------------------------------

FORMS = {  # what a line of --data must hold, in words
    "sft": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "dpo": '{"prompt": "...", "chosen": "...", "rejected": "..."}, each a text or a list of {"role", "content"}',
    "grpo": '{"prompt": "...", ...}, the prompt a text or a list of {"role", "content"}',
}
FORMS["apo_zero"] = FORMS["dpo"]


def turns(said: str | Rows, role: str = "user") -> Rows:
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
    if form == "sft":
        talk = turns(row["messages"])
        [m["role"] for m in talk].index("assistant")  # an exception if there is none
        return row | {"messages": talk}
    if form == "grpo":
        turns(row["prompt"])  # checked; the reward sees the line as it is
        return row
    pair = [turns(row[side], "assistant") for side in ("chosen", "rejected")]
    prompt = turns(row.get("prompt", pair[0][:-1]))
    (chosen,), (rejected,) = (said[len(prompt):] if said[:len(prompt)] == prompt else said for said in pair)
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        raise ValueError
    return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_rows(name: str, form: str) -> Rows:
    """The lines of a jsonl file; UserError with file and line for one that is not of the form."""
    rows = []
    with reading(name), (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows += [parse_row(json.loads(line), form)] if line.strip() else []
            except Exception:
                raise UserError(f"{name} line {number} is not {FORMS[form]}; correct or remove it") from None
    return rows


def held_out_rows(rows: Rows, where: str) -> tuple[Rows, Rows]:
    """(train, held out): about HELD_OUT of the rows, of few up to 10, by the hash of what is asked, so that no question
    is on both sides; by the hash of the whole row where there are fewer than 30 questions."""
    def asked(row: dict) -> str:  # a conversation's, up to its first question: the assistant may greet before
        talk = row.get("messages", [])
        roles = [m["role"] for m in talk] + ["user"]
        return json.dumps(row.get("prompt", talk[:roles.index("user") + 1]))

    for key in (asked, json.dumps):
        counts = Counter(map(key, rows))
        if len(counts) >= 30:
            break
    if len(counts) < 2:
        raise UserError(f"{where} has fewer than 2 different lines, and one must be held out; give more")
    most, held = max(HELD_OUT * len(rows), min(10, len(rows) / 5)), set()
    room = most
    for question in sorted(counts, key=lambda question: (counts[question] > most, uniform(question))):
        if not held or counts[question] <= room:
            held.add(question)
            room -= counts[question]
    return [row for row in rows if key(row) not in held], [row for row in rows if key(row) in held]


# ---- losses ---------------------------------------------------------------------------------------------------

NORMALIZATIONS = ("grpo", "dapo", "dr_grpo")


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
    token is already that much likelier or less likely. A higher clip_high leaves rare tokens room to rise (DAPO)."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_k3(new: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) from a sampled token: d = reference - new, e^d - d - 1 >= 0."""
    difference = reference - new
    return difference.exp() - difference - 1


def kl_loss(new: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """`kl_k3` times the ratio new / old: its mean gradient is that of KL(policy || reference) (DeepSeek-V3.2, TRL). k3
    alone has that of KL(reference || policy): it ignores that the policy draws other tokens as it moves."""
    return (new - old).exp() * kl_k3(new, reference)


def overlong_penalty(length: int, longest: int, margin: int) -> float:
    """0 up to longest - margin tokens, then falling to -1 at `longest` and beyond (DAPO, and the playbook)."""
    return min(0.0, max(-1.0, (longest - margin - length) / max(margin, 1e-9)))


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
    model, tokenizer, state = from_pretrained(folders[0]), Tokenizer.load(folders[0]), {}
    for folder, weight in zip(folders, weights):
        other = from_pretrained(folder)
        if other.config != model.config or Tokenizer.load(folder).hash != tokenizer.hash:
            raise UserError(f"{folder} has another config or tokenizer than {folders[0]}; merge checkpoints of one "
                            "model")
        for name, tensor in other.state_dict().items():
            state[name] = state.get(name, 0) + weight * tensor
    model.load_state_dict(state)
    return model


# ---- recipes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PostRecipe(train.Recipe):
    """A training run that starts from a model. Tokens, pairs and prompts of an update are those of all processes."""

    method: str = option("sft", "what to train for", choices=("sft", "dpo", "apo_zero", "grpo"))
    data: str = option("", "jsonl files, separated by commas; none: the built-in problems")
    steps: int = option(0, "updates, of grpo steps of sampling and training; 0: as --epochs says", 0)
    epochs: float = option(1.0, "how often to go through the data", 1e-9, 1e6)
    context: int = option(0, "tokens of a sequence; 0: as many as the model was trained on, at most 8192", 0)
    too_long: str = option("skip", "what to do with conversations of more tokens", choices=("skip", "cut"))
    assistant_only: bool = option(True, "sft: loss on what the assistant says only")
    problems: int = option(SFT_PROBLEMS, "built-in problems to train on", 100)
    eval_problems: int = option(1000, "held-out problems, or conversations, of an evaluation", 2, 5000)
    pairs: int = option(32, "dpo: preferences of an update", 1)
    beta: float = option(0.1, "dpo: how close to stay to the start; high is close", 1e-9)
    nll: float = option(0.0, "dpo: weight of the chosen answer's own loss, nats per token (Pang et al. 2024)", 0)
    prompts: int = option(32, "grpo: prompts of a step", 1)
    samples: int = option(8, "grpo: answers to each, which are compared; dpo: drawn to find built-in pairs", 2)
    updates: int = option(1, "grpo: how many updates a step's samples are divided into", 1)
    max_tokens: int = option(56, "of a sampled answer", 1)
    temperature: float = option(1.0, "of the sampling", 1e-6)
    normalization: str = option("dapo", "grpo: of advantages and lengths", choices=NORMALIZATIONS)
    clip_low: float = option(0.2, "grpo: how far a token's probability may fall in a step", 0, 1)
    clip_high: float = option(0.28, "grpo: and rise", 0)
    kl: float = option(0.0, "grpo: weight of the divergence from the start; 0: no second model in memory", 0)
    overlong: int = option(0, "grpo: tokens before --max_tokens over which the penalty for length grows to 1", 0)
    reward: str = option("", "grpo: FILE.py:FUNCTION; none: whether the built-in answer is right")


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
    tests: dict = field(default_factory=dict)  # {kind: held-out problems with their prompts' ids}
    held: dict = field(default_factory=dict)  # {file: conversations} or {"pairs": as `examples`}, held out
    before: dict = field(default_factory=dict)  # {score: the start's, one number for each held-out example}
    reward: Callable[[dict, str], float] = correct
    examples: list = field(default_factory=list)  # dpo: (pair, the start's log-probabilities); grpo: (problem, ids)
    reference: GPT | None = None  # grpo: the start, for --kl


def batches(items, size: int) -> list:
    return [items[i:i + size] for i in range(0, len(items), size)]


def fit(run: PostRun, rows: Rows, encode: Callable, what: str) -> list[Example]:
    """The examples that `encode(run, row)` makes of rows, in at most --context tokens: longer ones are left out or cut,
    as --too_long says. A sequence without a token to train on and a pair of equal answers, which may be what a cut
    leaves, are left out too. Prints how many."""
    kept, long, same, context = [], 0, 0, run.recipe.model.max_position_embeddings
    cut = run.recipe.too_long == "cut"
    for whole in (example for row in tqdm(rows, what, leave=False, delay=1) for example in encode(run, row)):
        example = [(ids[:context], mask[:context]) for ids, mask in whole]
        long += example != whole
        if cut or example == whole:
            teaches = all(any(mask) for _, mask in example) and example[1:] != example[:1]
            kept += [example] * teaches
            same += not teaches
    if long:
        print(f"long      {long:,} of {what} have more than {context} tokens and are "
              + ("cut" if cut else "left out; --too_long cut keeps their beginnings"))
    if same:
        print(f"left out  {same:,} of {what} have no token to train on, or the same tokens chosen and rejected")
    if not kept:
        raise UserError(f"nothing is left of {what} in {context} tokens; give other data or a larger --context")
    return kept


def askable(run: PostRun, rows: Rows) -> list[tuple[dict, Ids]]:
    """The problems whose prompts leave room for --max_tokens, with the prompts' ids."""
    room = run.recipe.model.max_position_embeddings - run.recipe.max_tokens
    found = [(row, run.chat_format.prompt(turns(row["prompt"]), row.get("tools"))) for row in rows]
    kept = [pair for pair in found if len(pair[1]) <= room]
    if len(kept) < len(found):
        print(f"long      {len(found) - len(kept):,} of {len(found):,} prompts have more than {room:,} tokens, which "
              "leaves fewer than --max_tokens to answer, and are left out")
    if not kept:
        raise UserError("no prompt is left; take a smaller --max_tokens")
    return kept


def answers(run: PostRun, asked: list[tuple[dict, Ids]], samples: int = 1, **options) -> list[list[tuple[Ids, float]]]:
    """[problems][samples] of what the model answers, at most --max_tokens ids, and its reward."""
    rows, prompts = zip(*asked)
    options = {"stop": run.chat_format.stop | {run.end}, "vocab_size": run.tokenizer.vocab_size} | options
    made = continue_all(run.model, prompts, run.recipe.max_tokens, samples, at_once=256, **options)
    return [[(ids, reward_of(run.reward, row, run.tokenizer.decode(ids))) for ids in group]
            for row, group in zip(rows, made)]


def logprobs(run: PostRun, model, sequences: list[Sequence], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the trained tokens, of the policy that samples at a temperature, and their mask, [B, T] in
    fp32; both 0 for the other tokens.

    A row holds one sequence, padded on the right: attention is causal, so padding behind a sequence changes nothing in
    it. A compiled model compiles again for each new shape, so it always gets as many rows, and a multiple of 64 tokens.
    """
    both = torch.stack([pad_sequence([torch.tensor(part) for part in parts], batch_first=True)
                        for parts in zip(*sequences)])  # ids and mask, [2, B, T]
    if run.machine.compile:
        both = F.pad(both, (0, (1 - both.shape[2]) % 64, 0, max(0, run.rows[0] - len(sequences))))
    ids, mask = both.to(run.machine.device)
    targets = torch.where(mask > 0, ids, -100)[:, 1:]
    found = torch.stack([F.cross_entropy(row.float() / temperature, target, reduction="none")
                         for row, target in zip(model(ids[:, :-1]), targets)])  # row by row: a batch in fp32 is large
    return -found[:len(sequences)], mask[:len(sequences), 1:].float()


def sums_of(run: PostRun, model, examples: list[Example]) -> Tensor:
    """Log-probabilities of whole answers, [sides, examples]."""
    return logprobs(run, model, [side for half in zip(*examples) for side in half])[0].sum(1).view(-1, len(examples))


@torch.no_grad()
def all_sums(run: PostRun, examples: list[Example]) -> Tensor:
    """`sums_of` any number of examples, on the CPU; the processes share the work."""
    size, total = run.world.size, len(examples)
    mine = (examples * size)[run.world.rank:-(-total // size) * size:size]  # as many in each process: FSDP needs that
    pieces = tqdm(batches(mine, max(1, run.rows[0] // 2)), "scoring", leave=False, delay=1)
    sums = run.world.gather(torch.cat([sums_of(run, run.model, piece).cpu() for piece in pieces], 1))
    return torch.stack(sums, 2).flatten(1)[:, :total]


def batch_of(run: PostRun, step: int, count: int) -> list:
    """The `count` examples of a step, of all processes: an endless stream of shuffled epochs."""
    n, seed = len(run.examples), run.recipe.seed
    order = (int(permute(np.array([i % n]), n, [seed, i // n])[0]) for i in range(step * count, (step + 1) * count))
    return [run.examples[i] for i in order]


def add_found(run: PostRun, **values: Tensor) -> None:
    """Adds to what the log says of an update; summed over pieces and processes."""
    for name, value in values.items():
        run.found[name] = run.found.get(name, 0) + value.detach()


# ---- SFT ------------------------------------------------------------------------------------------------------


def conversation(run: PostRun, row: dict) -> list[Example]:
    """The samples of a jsonl row, or of a built-in problem with its reply."""
    talk = row.get("messages") or turns(row["prompt"]) + turns(row["reply"], "assistant")
    samples = run.chat_format.samples(talk, row.get("tools"))
    if not run.recipe.assistant_only:
        samples = [(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in samples[-1:]]
    return batches(samples, 1)


def conversation_split(name: str, conversations: list[Example]) -> Split:
    """Conversations as a split of documents whose targets are the masked tokens only; data.py packs them."""
    ids, mask = (np.concatenate([talk[i] for talk, in conversations]) for i in range(2))
    starts = np.cumsum([0, *(len(ids) for (ids, _), in conversations)])
    return Split(name, ids, starts, 0, "", np.where(mask, ids, -100))


def prepare_sft(run: PostRun, given: dict[str, Rows], resume: bool) -> tuple[int, float]:
    """Packs conversations into rows for `train.pretraining_losses`."""
    recipe, context, splits = run.recipe, run.recipe.model.max_position_embeddings, []
    for file, rows in (given or {"arithmetic": problems(recipe.problems, 2)}).items():
        rows, held = held_out_rows(rows, file)
        name = Path(file).stem
        splits.append(conversation_split(name, fit(run, rows, conversation, name)))
        run.held[name] = fit(run, held[:recipe.eval_problems], conversation, f"held-out {name}")
    rows = sum(Packing(split, context, recipe.packing).count for split in splits)
    run.steps = recipe.steps or math.ceil(recipe.epochs * rows * context / recipe.batch_tokens - 1e-9)
    run.recipe = replace(recipe, stages=(Stage("sft", run.steps * recipe.batch_tokens, {}),))
    run.rows = run.world.agree(cost.stage_rows(run.recipe, run.world.size, run.machine.device))
    run.curriculum = Curriculum(splits, run.recipe.stages, context, recipe.batch_tokens, recipe.seed, recipe.packing)
    run.loader = train.Loader(run.curriculum, run.machine.device)
    talks = {split.name: len(split.starts) - 1 for split in splits}
    print(f"data      {talks} conversations in {rows:,} rows of {context} tokens, {run.steps:,} steps")
    return 0, sum(len(split.tokens) for split in splits) / sum(talks.values())


# ---- DPO and APO ----------------------------------------------------------------------------------------------


def prepare_preferences(run: PostRun, given: dict[str, Rows], resume: bool) -> tuple[int, float]:
    """Pairs as sequences, and the start's log-probabilities of them, computed once, so that no second model is kept; a
    resumed run has what was drawn and computed in its folder."""
    recipe, file = run.recipe, run.folder / "reference.pt"
    if resume:
        with reading(file):
            own, reference = torch.load(file, weights_only=True)
    else:
        own = [] if given else draw_pairs(run)
    rows = sum(given.values(), own)
    sides = zip(held_out_rows(rows, recipe.data or "what the start drew"), ("pairs", "held-out pairs"))
    pairs, held = (fit(run, side, answer_pair, what) for side, what in sides)
    if not resume:
        reference = all_sums(run, pairs + held)
        if run.world.leader:
            run.folder.mkdir(parents=True, exist_ok=True)
            torch.save((own, reference), file)
    both = list(zip(pairs + held, reference.T))
    run.examples, run.held["pairs"] = both[:len(pairs)], both[len(pairs):]
    run.steps = recipe.steps or math.ceil(recipe.epochs * len(pairs) / recipe.pairs)
    print(f"data      {len(pairs):,} pairs, {len(held):,} held out, {run.steps:,} steps of {recipe.pairs}")
    return 2 * recipe.pairs, np.mean([len(ids) for pair in pairs for ids, _ in pair])


def draw_pairs(run: PostRun) -> Rows:
    """Problems of which the start answers some right and some wrong: its own answers, judged by the checker. Every
    process draws all of them: FSDP needs all."""
    recipe, found, asked = run.recipe, [], askable(run, fresh_problems(run.recipe.problems))
    print(f"pairs     drawing {recipe.samples} answers to each of {len(asked):,} training problems", flush=True)
    drawn = answers(run, asked, recipe.samples, temperature=recipe.temperature, seed=recipe.seed)
    for (row, _), group in zip(asked, drawn):
        texts = {run.tokenizer.decode(ids): reward for ids, reward in group if 0 < len(ids) < recipe.max_tokens}
        right, wrong = ([text for text in texts if texts[text] == value] for value in (1, 0))
        found += [parse_row({"prompt": row["prompt"], "chosen": a, "rejected": b}, "dpo") for a, b in zip(right, wrong)]
    if len(found) < 2:
        raise UserError("the start answers no two problems both rightly and wrongly, so there are no pairs to prefer; "
                        "begin with a model that has seen SFT: python posttrain.py sft RUN")
    return found


def answer_pair(run: PostRun, row: dict) -> list[Example]:
    """The chosen and the rejected answer behind the prompt; only what follows the prompt counts."""
    pair, tools = [], row.get("tools")
    prompt = run.chat_format.prompt(row["prompt"], tools)
    for answer in (row["chosen"], row["rejected"]):
        ids, mask = run.chat_format.samples([*row["prompt"], answer], tools)[-1]
        same = len(os.path.commonprefix([ids, prompt]))
        pair.append((ids, [0] * same + mask[same:]))
    return [pair]


def preference_losses(run: PostRun, step: int) -> list[Callable]:
    """The losses of this process's pairs of a step.

    An unlikely token of a rejected answer has a far larger gradient than the likely ones of the chosen answer, so that
    both can fall and the model with them (Ren & Sutherland 2024); --nll also trains the chosen one as SFT does.
    """
    recipe, world, share = run.recipe, run.world, 1 / run.recipe.pairs

    def loss_of(piece):
        pairs, reference = zip(*piece)
        policy = sums_of(run, run.parallel, pairs)
        reference = torch.stack(reference, 1).to(policy.device)
        loss, rewards = preference_loss(recipe.method, policy, reference, recipe.beta)
        loss = loss - recipe.nll * policy[0] / torch.tensor([sum(mask) for (_, mask), _ in pairs], device=loss.device)
        chosen, rejected = rewards * share
        add_found(run, accuracy=(chosen > rejected).sum() * share, margin=(chosen - rejected).sum(),
                  chosen_reward=chosen.sum(), rejected_reward=rejected.sum())
        return loss.sum() * share, run.model.routing_loss() * (len(pairs) * share)

    mine = batch_of(run, step, recipe.pairs)[world.rank::world.size]
    return [functools.partial(loss_of, piece) for piece in batches(mine, max(1, run.rows[0] // 2))]


# ---- GRPO -----------------------------------------------------------------------------------------------------


def prepare_grpo(run: PostRun, given: dict[str, Rows], resume: bool) -> tuple[int, float]:
    """Problems to draw answers to."""
    recipe = run.recipe
    if given or recipe.reward:
        run.reward = load_reward(recipe.reward)
    if given:
        rows, held = held_out_rows(sum(given.values(), []), recipe.data)
        run.tests["reward"] = askable(run, held[:recipe.eval_problems])
    run.examples = askable(run, rows if given else fresh_problems(recipe.problems))
    run.steps = recipe.steps or math.ceil(recipe.epochs * len(run.examples) / recipe.prompts)
    if recipe.kl:
        run.reference = from_pretrained(recipe.start).to(run.machine.device)
        run.reference.compute_dtype = run.machine.dtype
    print(f"data      {len(run.examples):,} problems, {run.steps:,} steps of {recipe.prompts} prompts with "
          f"{recipe.samples} answers each")
    return recipe.prompts * recipe.samples, np.mean([len(ids) for _, ids in run.examples]) + recipe.max_tokens / 2


def roll_out(run: PostRun, step: int) -> tuple[list, list[float], dict[str, Tensor]]:
    """[(sequence, advantage)] of this process's samples of a step, drawn with a generator of (seed, step); the tokens
    of each update's samples over all processes; what to log."""
    recipe, world = run.recipe, run.world
    shares = batches(batch_of(run, step, recipe.prompts), recipe.prompts // recipe.updates)
    asked = [one for share in shares for one in share[world.rank::world.size]]  # of each update, this process's share
    seed = int(2**48 * uniform(f"{recipe.seed} {step} {world.rank}"))
    drawn = answers(run, asked, recipe.samples, temperature=recipe.temperature, seed=seed, stop=run.end)
    sequences, table = [], []
    for (_, prompt), group in zip(asked, drawn):
        for ids, reward in group:
            ended = len(ids) < recipe.max_tokens
            ids = ids + [run.end] * ended  # one that was cut off did not end itself
            sequences.append((prompt + ids, [0] * len(prompt) + [1] * len(ids)))
            table.append((reward, overlong_penalty(len(ids), recipe.max_tokens, recipe.overlong), len(ids), not ended))
    table = torch.tensor(table, dtype=torch.float32).T
    total = (table[0] + table[1]).view(-1, recipe.samples)
    mixed = (total.amax(1) > total.amin(1)).float()  # a group that agrees teaches nothing, not even by rounding
    advantage = advantages(total, recipe.normalization) * mixed[:, None]
    tokens = world.sum(table[2].view(recipe.updates, -1).sum(1))
    found = zip(("reward", "penalty", "length", "cut_off", "mixed_groups"), [*table, mixed])
    return list(zip(sequences, advantage.flatten().tolist())), tokens.tolist(), {
        name: values.mean() / world.size for name, values in found}


def grpo_losses(run: PostRun, step: int) -> list[Callable]:
    """Draws and rewards answers, compares them within their group, and makes all updates of the step but the last;
    returns the losses of the last one, which make good answers likelier and bad ones less likely."""
    recipe, samples = run.recipe, run.recipe.prompts * run.recipe.samples // run.recipe.updates
    sampled, tokens, drawn = roll_out(run, step)

    def policy(model, piece):
        return logprobs(run, model, [sequence for sequence, _ in piece], recipe.temperature)

    def loss_of(piece, old, total, part):
        new, mask = policy(run.parallel, piece)
        old = new.detach() if old is None else old
        advantage = torch.tensor([value for _, value in piece], device=new.device)[:, None]
        loss = policy_loss(new, old, advantage, recipe.clip_low, recipe.clip_high)
        clipped = mask * (loss != -(new - old).exp() * advantage)
        add_found(run, clipped=clipped.sum() / total, **{name: value * part for name, value in drawn.items()})
        if run.reference:
            reference, _ = frozen(run.reference, piece)
            add_found(run, kl=(mask * kl_k3(new, reference)).sum() / total)
            loss = loss + recipe.kl * kl_loss(new, old, reference)
        weights = token_weights(mask, recipe.normalization, samples, total, recipe.max_tokens)
        return (weights * loss).sum(), run.model.routing_loss() * (len(piece) / samples)

    frozen = torch.no_grad()(policy)
    everything = recipe.kl or run.world.size > 1  # else what agrees with its group, and teaches nothing, is left out
    shares = [batches([one for one in share if one[1] or everything] or share[:1], run.rows[0])
              for share in batches(sampled, len(sampled) // recipe.updates)]
    olds = [[frozen(run.model, piece)[0] if recipe.updates > 1 else None  # with one update it is the policy that drew
             for piece in pieces] for pieces in shares]
    for pieces, old, total in zip(shares, olds, tokens):
        losses = [functools.partial(loss_of, piece, before, total, 1 / len(pieces))
                  for piece, before in zip(pieces, old)]
        if pieces is not shares[-1]:
            train.update(run, losses, run.rate(step))
    return losses


# ---- scores before and after ----------------------------------------------------------------------------------


def scores_now(run: PostRun) -> dict[str, list[float]]:
    """One number for each held-out example: the reward of a greedy answer and of one drawn at --temperature, which is
    what RL rewards; the loss of conversations; the margin of pairs, once there is a difference from the start."""
    found, recipe = {}, run.recipe
    for kind, tests in run.tests.items():
        if run.step == 0 and recipe.method == "sft":  # a base model has seen no chat: in the form of its training data
            tests = [(row, run.chat_format.text(f"Question: {row['prompt']}\nAnswer:")) for row, _ in tests]
        for name, temperature in ((kind, 0.0), (f"{kind}, sampled", recipe.temperature)):
            drawn = answers(run, tests, temperature=temperature, seed=1)
            found[name] = [reward for ((_, reward),) in drawn]
    for name, examples in run.held.items():
        if recipe.method == "sft":
            sums = all_sums(run, examples)[0].tolist()
            found[f"{name}, nats per token"] = [-nats / sum(mask) for nats, ((_, mask),) in zip(sums, examples)]
        elif run.step:
            pairs, reference = zip(*examples)
            _, (chosen, rejected) = preference_loss(
                recipe.method, all_sums(run, pairs), torch.stack(reference, 1), recipe.beta)
            found |= {"held-out pairs right": (chosen > rejected).tolist(),
                      "held-out margin": (chosen - rejected).tolist()}
    return found


def evaluate_answers(run: PostRun, last: bool) -> dict:
    """Prints how the model does on what is held out, and what has changed; returns means and errors for the log."""
    if run.step == 1 and not last:
        return {}  # the loop asks after the first update, and the start was just scored
    found, lines, entry = scores_now(run), [f"step {run.step:,}, held out:"], {"val": {}, "stderr": {}}
    for name, values in found.items():
        tests = run.tests.get(name.removesuffix(", sampled"), ())
        about = [row.get("about") or json.dumps(row["prompt"]) for row, _ in tests]
        then = run.before.get(name, values)
        parts = values, then, np.subtract(values, then, dtype=float)
        now, before, change = (Score.of(part, groups=about) for part in parts)
        entry["val"][name], entry["stderr"][name] = now.mean, now.stderr
        more = f"   before {before.mean:.3f} ± {before.stderr:.3f}   change {change.mean:+.3f} ± {change.stderr:.3f}"
        lines.append(f"  {name:20} {now}" + more * (name in run.before))
    lines += ["  (± is one standard error, in which questions about the same thing count as one; that of a change is "
              "paired: the same questions before and after)"] * bool(run.before)
    run.before = run.before or found
    train.say("\n".join(lines) + "\n")
    return entry


# ---- command line ---------------------------------------------------------------------------------------------

METHODS = {"sft": (prepare_sft, train.pretraining_losses, "batch_tokens"),  # the last must divide by the processes
           "dpo": (prepare_preferences, preference_losses, "pairs"), "grpo": (prepare_grpo, grpo_losses, "prompts")}
METHODS["apo_zero"] = METHODS["dpo"]


def set_up(recipe: PostRecipe, folder: Path, world: train.World, resume: bool) -> PostRun:
    """Reads the data, loads the start or the checkpoint to resume, and prepares what the method trains on."""
    prepare, _, size = METHODS[recipe.method]
    if getattr(recipe, size) % (unit := world.size * recipe.updates):
        raise UserError(f"--{size} {getattr(recipe, size)} does not divide by {unit}, the number of processes times "
                        "--updates; take a multiple")
    given = {file: read_rows(file, recipe.method) for file in recipe.data.split(",") if file}
    fingerprint = {Path(file).name: hashlib.sha256(json.dumps(rows).encode()).hexdigest()
                   for file, rows in given.items()}
    if resume and train.read_recipe(folder, PostRecipe)[1] != fingerprint:
        raise UserError(f"the data is not what {folder} began with; put that back or start a new run")
    begun, machine = newest_checkpoint(folder) if resume else None, world.agree(cost.choose_machine(recipe))
    context, source = recipe.model.max_position_embeddings, begun or recipe.start
    recipe = cost.settle(recipe, machine, world.size, context)
    if recipe.method == "grpo" and recipe.parallel == "fsdp":
        raise UserError("grpo draws answers from whole weights, which FSDP does not keep; take --parallel ddp")
    torch.manual_seed(recipe.seed)
    tokenizer, model = Tokenizer.load(source), from_pretrained(source)
    model.config = recipe.model
    run = train.make_run(recipe, folder, world, machine, tokenizer, model, 0, None, begun, resume,
                         fingerprint=fingerprint, command="python posttrain.py")
    run = PostRun(**vars(run), chat_format=ChatFormat(source, tokenizer))
    ids, mask = run.chat_format.samples(turns("?") + turns("!", "assistant"))[-1]
    said = [i for i, trained in zip(ids, mask) if trained and i in tokenizer.special.values()]
    run.end = (said or sorted(run.chat_format.stop))[-1]
    fitting = (2**i for i in range(8, 0, -1) if cost.fits(recipe, 2**i, context, world.size, machine.device))
    run.rows = world.agree([recipe.micro_batch or next(fitting, 1)])  # sequences computed at once
    if not given:
        run.tests["arithmetic"] = askable(run, problems(recipe.eval_problems, 1, held_out=True))
    sequences, length = prepare(run, given, resume)
    run.tokens_per_step, run.flops = round(sequences * length), cost.flops_per_token(recipe.model, length)
    run.rate = lambda step: recipe.learning_rate * rate_share(
        recipe.schedule, step, run.steps, recipe.warmup_steps, round(max(0.0, recipe.decay_share) * run.steps),
        recipe.decay_shape, recipe.final_share)
    print(f"start     {recipe.start}: {count_parameters(recipe.model)['total']:,} parameters, sequences of up to "
          f"{context:,} tokens; {recipe.optimizer} at {recipe.learning_rate:g}, {recipe.method}; {machine.reason}")
    return run


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
        print(f"Nothing was learned: in all {len(drawn):,} steps every answer to a prompt had the same reward (on "
              f"average {np.mean([entry['reward'] for entry in drawn]):g}); take prompts that the start answers "
              "sometimes well and sometimes badly, a finer --reward or more --samples")
    else:
        print(f'Done: {folder}. Ask it with: python sample.py {folder} --chat --prompt "What is 12 + 30?"')
    return scores


def parse(argv: list[str]) -> tuple[argparse.Namespace, PostRecipe | None]:
    """The command line, and the recipe that it names with the flags applied; None for a merge."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help=", ".join([*POST_RECIPES, "merge"]))
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="merge: one a RUN (default: equal)")
    parser.add_argument("--out", help="merge: the new folder")
    parser.add_argument("--name", help="of the folder in runs/ (default: the start's and the task)")
    parser.add_argument("--resume", help="continue this run folder from its newest checkpoint")
    add_options(parser, PostRecipe, without="""tokens method packing start sample_prompt eval_tokens eval_tasks z_loss
        document_mask""".split())
    args = parse_options(parser, argv)
    given = given_options(args, PostRecipe)
    for name in {"data", "reward"} & set(given):  # mean the same in every folder: a run may be resumed from another
        given[name] = ",".join(str(Path(path).resolve()) for path in given[name].split(","))
    if args.resume:
        others, allowed = ["a task"] * bool(args.task), train.RESUMABLE | {"reward"}
        return args, train.resumed(args, given, others, PostRecipe, allowed)
    if args.task == "merge":
        return args, None
    if args.task not in POST_RECIPES or len(args.runs) != 1:
        raise UserError("give a method and a model, such as: python posttrain.py sft runs/laptop (or dpo, apo, grpo, "
                        "merge)")
    start = Path(args.runs[0]).resolve()
    if not is_hugging_face(start):
        start = find_checkpoint(start)  # a checkpoint: what the run does later changes nothing here
    config = load_config(start)
    context = given.get("context") or min(config.max_position_embeddings, 8192)
    if context > config.max_position_embeddings:
        raise UserError(f"--context {context} is more than the {config.max_position_embeddings} that {start} was "
                        "trained on; stretch it first by a stage of train.py")
    scale = AT_SCALE[args.task] if count_parameters(config)["total"] > 5e7 else {}
    return args, replace(POST_RECIPES[args.task], **scale | given, start=str(start),
                         model=config.change(max_position_embeddings=context))


def merge_command(runs: list[str], weights: list[float], out: str) -> None:
    if len(runs) < 2 or not out or len(weights) != len(runs) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError("merge takes two models or more, a weight for each that sum to 1, and a new folder: "
                        "python posttrain.py merge A B --weights .9 .1 --out DIR")
    if Path(out).exists():
        raise UserError(f"{out} is already there; give a new folder with --out")
    model, first = merge(runs, weights), runs[0]
    if is_hugging_face(first):
        print(save_pretrained(model, out, tokenizer_from=first))
    else:
        save_weights(model, Tokenizer.load(first), out, chat_from=first)
    print(f"{out} is written; ask it with: python sample.py {out} --chat")


def begin(world: train.World) -> None:
    args, recipe = parse(sys.argv[1:])
    if recipe is None:
        return merge_command(args.runs, args.weights or [1 / max(1, len(args.runs))] * len(args.runs), args.out)
    stem = re.sub(r"-(sft|dpo|apo|grpo)(-\d+)?$", "", Path((args.runs or ["."])[0]).name)
    folder = args.resume or world.agree(new_run_folder(args.name or f"{stem}-{args.task}"))
    post_train(recipe, Path(folder), bool(args.resume), world)


def main() -> None:
    train.command_line(begin)


if __name__ == "__main__":
    run_command(main)
