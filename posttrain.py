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

The playbook: SmolLM3 is SFT, then APO-zero, then a merge of checkpoints; GRPO came later. SFT: a rate of 3e-6 to 1e-5
was best (SmolLM3's recipe has 2e-5), batches of 128 sequences, 4 to 5 epochs of some 8B tokens, loss on the
assistant's turns only (a small gain), sources balanced by tokens. Packing is 3.8 to 5.3 times as fast, but makes few
updates of small data: IFEval lost 12 points, so lower --batch_tokens there. Preferences: APO-zero did best; a rate 5 to
20 times below SFT's, beta 0.1 (0.01 to 0.5; SmolLM3 0.05; high is close to the start, though the playbook's text once
says the opposite), one epoch. RL: without an overlong penalty the answers' length exploded.

The loop is train.py's. A sequence is (ids, mask), 1 on the tokens to train on; an example is a list of sequences: a
conversation, or a chosen and a rejected answer.
"""

import io
import json
import math
import os
import random
import re
import runpy
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tokenizer import (ChatFormat, Parser, Tokenizer, UserError, add_options, given_options, option, parse_options,
                       reading, run as run_command)

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cost
import train
from checkpoint import (copy_chat_format, find_checkpoint, from_pretrained, is_hugging_face, load_config,
                        new_run_folder, save_weights)
from data import (HELD_OUT, PEOPLE, THINGS, Curriculum, Packing, Split, Stage, generated_math, permute, uniform,
                  unpacked)
from evals import Score
from model import count_parameters
from sample import continue_all
from schedule import SCHEDULES

# ---- built-in problems ----------------------------------------------------------------------------------------
def sums(seed):
    """The math source's worked problems on numbers below 100, as (what is asked without its story, prompt, reply)."""
    for about, text in generated_math(10**9, seed):
        prompt, reply = text.removeprefix("Question: ").strip().split("\nAnswer: ")
        if max(map(int, re.findall(r"\d+", prompt))) < 100:
            yield about, prompt, reply


def lookups(seed):
    """A passage, and a question whose answer is in it."""
    rng = random.Random(seed)
    while True:
        people, things = rng.sample(PEOPLE, 3), rng.sample(THINGS, 3)
        facts = [f"{who} has {rng.randrange(2, 100)} {what}." for who, what in zip(people, things)]
        passage, i = " ".join(facts), rng.randrange(3)
        yield passage, f"{passage} How many {things[i]} does {people[i]} have?", facts[i]


def orders(seed):
    """Short orders about the functions of the standard library."""
    rng, code = random.Random(seed), "".join(path.read_text("utf-8") for path in Path(os.__file__).parent.glob("*.py"))
    functions = sorted(set(re.findall(r"^ *def ([a-z]\w*)\(([a-z_]\w*(?:, [a-z_]\w*){0,2})\):", code, re.MULTILINE)))
    while True:
        name, arguments = rng.choice(functions)
        line, listed = f"def {name}({arguments}):", arguments.replace(", ", " and ")
        yield name, *rng.choice([
            (f"Write the first line of a Python function {name} with the arguments {listed}.", line),
            (f"Which arguments does this function take? {line}", listed),
            (f"What is the name of this function? {line}", name)])


SFT_PROBLEMS = 16_000
PROBLEMS = {"arithmetic": sums, "lookups": lookups, "orders": orders}


def problems(kind, count, seed, held_out=False, without=()):
    """`count` problems, none of the prompts `without`; held-out ones are all different. The hash of what is asked
    decides what is held out, as in the pre-training data: no held-out sum was ever trained on, in any stage."""
    made, seen = [], set(without)
    for about, prompt, reply in PROBLEMS[kind](seed):
        if prompt not in seen and (uniform(about) < HELD_OUT) == held_out:
            made.append({"about": about, "prompt": prompt, "reply": reply,
                         "messages": turns(prompt) + turns(reply, "assistant")})
            if held_out:
                seen.add(prompt)
        if len(made) == count:
            return made


def fresh_problems(count):
    """Arithmetic for preferences and RL that SFT has not trained on, since a model half remembers what it has."""
    return problems("arithmetic", count, 3, without={row["prompt"] for row in problems("arithmetic", SFT_PROBLEMS, 2)})


def correct(problem, answer):
    """The built-in reward: 1 if the first lines have the same last number, or, without numbers, are the same."""
    lines = [text.strip().split("\n")[0] for text in (answer, problem["reply"])]
    said, right = (re.findall(r"\b\d+\b", line)[-1:] or line for line in lines)
    return float(said == right)


# ---- data -----------------------------------------------------------------------------------------------------
def turns(said, role="user"):
    """A text as a conversation of one turn; a conversation as it is; an exception if it is neither."""
    said = [{"role": role, "content": said}] if isinstance(said, str) else said
    said = [m | {"content": m.get("content") or ""} if m.get("tool_calls") else m for m in said]
    if not "".join(m["role"] + m["content"] for m in said):  # an exception where one is not text
        raise ValueError("it is empty")
    return said


def parse_row(row, form):
    """A line's object, checked, texts made conversations. Instead of "prompt", both answers may begin with it."""
    if form == "sft":
        return row | {"messages": turns(list(row["messages"]))}
    if form == "grpo":
        turns(row["prompt"])  # checked; the reward sees the line as it is
        return row
    prompt = turns(row.get("prompt", row["chosen"][:-1]))
    for side in ("chosen", "rejected"):
        *before, answer = turns(row[side], "assistant")
        if before not in ([], prompt) or answer["role"] != "assistant":
            raise ValueError(f"{side} is not the assistant's answer to the prompt")
        row = row | {side: answer}
    return row | {"prompt": prompt}


def read_rows(name, form):
    """The lines of a jsonl file; UserError with file and line for one that is not of the form."""
    rows = []
    with reading(name), io.TextIOWrapper(unpacked(Path(name)), "utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            with reading(f"{name} line {number}", f"`posttrain.py --help` shows data for {form}; correct or remove it"):
                if line.strip():
                    rows.append(parse_row(json.loads(line), form))
    return rows


def held_out_rows(rows):
    """(train, held out). HELD_OUT of the rows are held out, or of a small file up to 10 rows (a fifth at most), chosen
    by a hash of the question, so that no question is on both sides; under 30 questions, by a hash of the row."""
    def asked(row):
        return json.dumps(row.get("prompt", [m for m in row.get("messages", ()) if m["role"] == "user"][:1]))
    key = asked if len(set(map(asked, rows))) >= 30 else json.dumps
    counts, held = Counter(map(key, rows)), set()
    if len(counts) < 2:
        raise UserError("fewer than 2 different lines, and one must be held out; give more data, or begin with SFT")
    room = max(HELD_OUT * len(rows), min(10, len(rows) / 5), min(counts.values()))
    for question in sorted(counts, key=uniform):
        if counts[question] <= room:
            held.add(question)
            room -= counts[question]
    return [row for row in rows if key(row) not in held], [row for row in rows if key(row) in held]


# ---- losses ---------------------------------------------------------------------------------------------------
def preference_loss(kind, policy, reference, beta):
    """Log-probabilities of whole answers [2, B], chosen and rejected, to (loss [B], rewards [2, B] = beta * log(policy
    / reference)). DPO (Rafailov et al. 2023): -log sigmoid(r_c - r_r), where both may fall. APO-zero (D'Oosterlinck et
    al. 2024): 1 - sigmoid(r_c) + sigmoid(r_r): the chosen one shall rise above the reference, the rejected one fall."""
    chosen, rejected = rewards = beta * (policy - reference)
    loss = -F.logsigmoid(chosen - rejected) if kind == "dpo" else 1 - chosen.sigmoid() + rejected.sigmoid()
    return loss, rewards.detach()


def advantages(rewards, normalization):
    """Rewards [groups, samples] minus their group's mean. GRPO (Shao et al. 2024) and DAPO divide by its deviation, so
    that questions nearly always or nearly never answered count more; Dr. GRPO (Liu et al. 2025) does not."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred if normalization == "dr_grpo" else centred / (rewards.std(1, keepdim=True) + 1e-4)


def token_weights(mask, normalization, samples, tokens, longest):
    """Each token's weight in the loss; the mask [B, T] is part of `samples` answers with `tokens` tokens in all. grpo:
    the mean of means, so that long wrong answers cost little; dapo: of all tokens; dr_grpo: unbiased by length."""
    share = {"grpo": samples * mask.sum(1, keepdim=True).clamp(min=1), "dapo": tokens, "dr_grpo": samples * longest}
    return mask / share[normalization]


def policy_loss(new, old, advantage, clip_low, clip_high):
    """The clipped loss (PPO, Schulman et al. 2017) of each token: log-probabilities [B, T] now and when it was sampled,
    advantage [B, 1]. -min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = new / old: the gradient ends where a
    token is already that much likelier or less likely. A higher clip_high leaves rare tokens room to rise (DAPO)."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_k3(new, reference):
    """Schulman's estimator of KL(policy || reference) from a sampled token: d = reference - new, e^d - d - 1 >= 0."""
    difference = reference - new
    return difference.exp() - difference - 1


def kl_loss(new, old, reference):
    """`kl_k3` times the ratio new / old: its mean gradient is that of KL(policy || reference) (DeepSeek-V3.2, TRL). k3
    alone has that of KL(reference || policy): it ignores that the policy draws other tokens as it moves."""
    return (new - old).exp() * kl_k3(new, reference)


def overlong_penalty(length, longest, margin):
    """0 up to longest - margin tokens, then falling to -1 at `longest` and beyond (DAPO, and the playbook)."""
    return min(0.0, max(-1.0, (longest - margin - length) / max(margin, 1e-9)))


def reward_of(reward, problem, answer):
    """The reward of an answer; UserError with the sample if the function raises or returns no finite number."""
    with reading(f"the reward of {answer!r} to {problem!r}", "correct the function, then start again or --resume"):
        if math.isfinite(value := float(reward(problem, answer))):
            return value
        raise ValueError(f"it is {value}")


@dataclass(frozen=True)
class PostRecipe(train.Recipe):
    """A training run that starts from a model. Tokens, pairs and prompts of an update are those of all processes."""
    method: str = option("sft", "the task decides", choices=("sft", "dpo", "apo_zero", "grpo"), group="post-training")
    data: str = option("", "jsonl files, separated by commas; none: the built-in problems")
    steps: int = option(0, "updates (grpo: rounds of sampling and training); 0: as many as --epochs needs", 0)
    epochs: float = option(1.0, "how often to go through the data", 1e-9, 1e6)
    context: int = option(0, "tokens of a sequence, at most as many as the model was trained on; 0: 8192", 0)
    too_long: str = option("skip", "what to do with conversations of more tokens", choices=("skip", "cut"))
    assistant_only: bool = option(True, "sft: loss on what the assistant says only")
    problems: int = option(SFT_PROBLEMS, "built-in sums to train on; sft adds a fifth as many of other kinds", 100)
    eval_problems: int = option(1000, "held-out problems, or conversations, of an evaluation", 2, 5000)
    pairs: int = option(32, "dpo: preferences of an update", 1)
    beta: float = option(0.1, "dpo: how close to stay to the start; high is close", 1e-9)
    nll: float = option(0.0, "dpo: weight of the chosen answer's own loss, nats per token (Pang et al. 2024)", 0)
    prompts: int = option(32, "grpo: prompts of a step", 1)
    samples: int = option(8, "grpo: answers to each, which are compared; dpo: drawn to find built-in pairs", 2)
    updates: int = option(1, "grpo: how many updates a step's samples are divided into", 1)
    max_tokens: int = option(56, "of a sampled answer", 1)
    temperature: float = option(1.0, "of the sampling", 1e-6)
    normalization: str = option("dapo", "grpo: advantages and lengths", choices=("grpo", "dapo", "dr_grpo"))
    clip_low: float = option(0.2, "grpo: how far a token's probability may fall in a step", 0, 1)
    clip_high: float = option(0.28, "grpo: how far it may rise", 0)
    kl: float = option(0.0, "grpo: weight of the divergence from the start; 0: no second model in memory", 0)
    overlong: int = option(0, "grpo: over the last so many of --max_tokens, a penalty for length grows from 0 to 1", 0)
    reward: str = option("", "grpo: FILE.py:FUNCTION; none: whether the built-in answer is right")


# For the laptop's 1.8M parameters, by measuring; LARGER is what changes above 50M: SmolLM3's values, GRPO's from TRL.
BASE = PostRecipe(batch_tokens=2048, packing="best-fit", schedule="cosine", warmup_steps=20, final_share=0.1,
                  weight_decay=0.0, eval_every=10**9)
DPO = replace(BASE, method="dpo", learning_rate=1e-5, nll=2.0, samples=6, problems=2500, epochs=4, eval_problems=3000)
POST_RECIPES = {
    "sft": replace(BASE, optimizer="muon", learning_rate=4e-3), "dpo": DPO, "apo": replace(DPO, method="apo_zero"),
    "grpo": replace(BASE, method="grpo", learning_rate=1.5e-4, warmup_steps=5, steps=40, prompts=64, problems=4000,
                    eval_problems=3000),
}
LARGER = {
    "sft": dict(optimizer="adamw", learning_rate=2e-5, batch_tokens=2**20, clip=0.2, epochs=4),
    "dpo": dict(learning_rate=1e-6, nll=0.0, epochs=1), "apo": dict(learning_rate=1e-6, nll=0.0, epochs=1, beta=0.05),
    "grpo": dict(learning_rate=1e-6, steps=500, max_tokens=2500, overlong=500),
}


# ---- a run ----------------------------------------------------------------------------------------------------
# prepare_run adds to a train.Run: chat_format; end, the token that ends the assistant's turn; tests, {kind: [(problem,
# prompt's ids)]}; held, held-out conversations or pairs; before, {score: the start's, a number for each example};
# examples, of dpo (pair, the start's log-probabilities), of grpo (problem, prompt's ids); reward; reference, for --kl.

def batches(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


def encode_rows(run, rows, encode, what):
    """The examples that `encode(run, row)` makes of rows, in at most --context tokens, as --too_long says; without
    sequences that have no token to train on and pairs of equal answers, which may be what a cut leaves."""
    context, cut = run.recipe.model.max_position_embeddings, run.recipe.too_long == "cut"
    whole = [example for row in tqdm(rows, what, leave=False, delay=1) for example in encode(run, row)]
    short = [[(ids[:context], mask[:context]) for ids, mask in example] for example in whole]
    long = [a != b for a, b in zip(short, whole)]
    fitting = [example for example, cuts in zip(short, long) if cut or not cuts]
    kept = [example for example in fitting if all(any(mask) for _, mask in example) and example[1:] != example[:1]]
    done, empty = "cut" if cut else "left out (--too_long cut keeps their beginnings)", len(fitting) - len(kept)
    print(f"data      {len(kept):,} {what}"
          + f"; {sum(long):,} have more than {context} tokens and are {done}" * any(long)
          + f"; {empty:,} have no token to train on, or the same ones twice, and are left out" * bool(empty))
    if not kept:
        raise UserError(f"nothing is left of {what} in {context} tokens; give other data or a larger --context")
    return kept


def askable(run, rows):
    """The problems whose prompts leave room for --max_tokens, with the prompts' ids."""
    room = run.recipe.model.max_position_embeddings - run.recipe.max_tokens
    found = [(row, run.chat_format.prompt(turns(row["prompt"]), row.get("tools"))) for row in rows]
    kept = [pair for pair in found if len(pair[1]) <= room]
    if left := len(found) - len(kept):
        print(f"data      {left:,} of {len(found):,} prompts are left out: their more than {room:,} tokens leave fewer "
              "than --max_tokens for an answer")
    if not kept:
        raise UserError("no prompt is left; take a smaller --max_tokens")
    return kept


def answers(run, asked, samples, temperature, seed, stop=None):
    """[problems][samples] of what the model answers, at most --max_tokens ids, and its reward."""
    made = continue_all(run.model, [ids for _, ids in asked], run.recipe.max_tokens, samples, temperature=temperature,
                        seed=seed, stop=stop or run.chat_format.stop | {run.end}, at_once=cost.rows_at_once(run.recipe),
                        vocab_size=run.tokenizer.vocab_size,
                        compile=run.machine.compile and run.machine.device == "cuda" and run.recipe.parallel != "fsdp")
    return [[(ids, reward_of(run.reward, row, run.tokenizer.decode(ids))) for ids in group]
            for (row, _), group in zip(asked, made)]


def logprobs(run, model, sequences, temperature=1.0):
    """Log-probabilities of the trained tokens, of the policy that samples at a temperature, and their mask, [B, T] in
    fp32; both 0 for other tokens. Padding stands on the right, where causal attention does not see it. A compiled model
    compiles again for each new shape, so it gets as many rows, and one of 16 lengths at most (of 64 tokens or more)."""
    both = pad_sequence([torch.tensor(sequence).T for sequence in sequences], batch_first=True)  # [B, T, 2]
    if run.machine.compile:
        unit = max(64, -(-run.model.config.max_position_embeddings // 16))
        both = F.pad(both, (0, 0, 0, (1 - both.shape[1]) % unit, 0, max(0, run.rows[0] - len(sequences))))
    ids, mask = both.to(run.machine.device).unbind(2)
    targets = torch.where(mask > 0, ids, -100)[:, 1:]
    count, (_, nats) = len(sequences), model(ids[:, :-1], targets=targets, temperature=temperature)
    return -nats[:count], mask[:count, 1:].float()


def sums_of(run, model, examples):
    """Log-probabilities of whole answers, [sides, examples]."""
    return logprobs(run, model, sum(zip(*examples), ()))[0].sum(1).view(-1, len(examples))


@torch.no_grad()
def all_sums(run, examples):
    """`sums_of` any number of examples, on the CPU; the processes share the work."""
    size, total = run.world.size, len(examples)
    mine = (examples * size)[run.world.rank:-(-total // size) * size:size]  # as many in each process: FSDP needs that
    pieces = [sums_of(run, run.model, piece).cpu() for piece in batches(mine, run.rows[0] // 2 or 1)]
    return torch.stack(run.world.gather(torch.cat(pieces, 1)), 2).flatten(1)[:, :total]


def batch_of(run, step, count):
    """This process's share of the `count` examples of a step: an endless stream of shuffled epochs."""
    n, first = len(run.examples), step * count
    return [run.examples[permute(np.array([i % n]), n, [run.recipe.seed, i // n]).item()]
            for i in range(first + run.world.rank, first + count, run.world.size)]


def add_found(run, **values):
    """Adds to what the log says of an update; summed over pieces and processes."""
    for name, value in values.items():
        run.found[name] = run.found.get(name, 0) + value.detach()


def evaluate_answers(run, last):
    """Prints and returns how the model does on what is held out: for each example the reward of a greedy answer and of
    one drawn at --temperature, which is what RL rewards; a conversation's loss; whether a pair is ranked right."""
    if run.step == 1 and not last:
        return {}  # the loop asks after the first update, and the start was just scored
    recipe, entry = run.recipe, {"val": {}, "stderr": {}}
    train.say(f"step {run.step:,}, held out (± is one standard error; that of a change compares the same questions):")
    def score(name, values, about=None):
        before = run.before.setdefault(name, values)
        with reading(run.folder):  # its log has the scores before
            change = np.subtract(values, before, dtype=float)
        now, then, change = (Score.of(part, groups=about) for part in (values, before, change))
        entry["val"][name], entry["stderr"][name] = now[:2]
        train.say(f"  {name:20} {now}" + f"   before {then.mean:.3f} ± {then.stderr:.3f}   change {change.mean:+.3f} ± "
                  f"{change.stderr:.3f}" * (run.step > 0))

    for kind, tests in run.tests.items():
        about = [json.dumps(row.get("about", row["prompt"])) for row, _ in tests]
        if run.step == 0 and recipe.method == "sft":  # a base model has seen no chat: in the form of its training data
            tests = [(row, run.chat_format.text(f"Question: {row['prompt']}\nAnswer:")) for row, _ in tests]
        for name, temperature in ((kind, 0.0), (f"{kind}, sampled", recipe.temperature)):
            score(name, [reward for ((_, reward),) in answers(run, tests, 1, temperature, 1)], about)
    if recipe.method == "sft":
        totals = all_sums(run, run.held)[0].tolist()
        score("nats per token", [-nats / sum(mask) for nats, ((_, mask),) in zip(totals, run.held)])
    elif run.held:
        pairs, reference = zip(*run.held)
        _, rewards = preference_loss(recipe.method, all_sums(run, pairs), torch.stack(reference, 1), recipe.beta)
        score("pairs right", (rewards[0] > rewards[1]).tolist())  # at the start they are equal
    return entry


# ---- SFT ------------------------------------------------------------------------------------------------------
def conversation(run, row):
    """The samples of a row, one or, with some templates, one per turn of the assistant."""
    samples = run.chat_format.samples(row["messages"], row.get("tools"))
    if not run.recipe.assistant_only:
        samples = [(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in samples[-1:]]
    return [[sample] for sample in samples]


def packed(conversations):
    """Conversations as a split of documents whose targets are the masked tokens only; data.py packs them."""
    ids, mask = map(np.concatenate, zip(*(talk for talk, in conversations)))
    starts = np.cumsum([0, *(len(ids) for (ids, _), in conversations)])
    return Split("conversations", ids, starts, 0, "", np.where(mask, ids, -100))


def prepare_sft(run, rows):
    """Packs conversations into rows for `train.pretraining_losses`."""
    recipe, context = run.recipe, run.recipe.model.max_position_embeddings
    for kind in () if rows else PROBLEMS:
        rows = rows + problems(kind, recipe.problems // (1 if kind == "arithmetic" else 5), 2)
    rows, held = held_out_rows(rows)
    split = packed(encode_rows(run, rows, conversation, "conversations"))
    run.held = encode_rows(run, held[:recipe.eval_problems], conversation, "held-out conversations")
    count = Packing(split, context, recipe.packing).count
    run.steps = recipe.steps or math.ceil(recipe.epochs * count * context / recipe.batch_tokens)
    run.recipe = replace(recipe, stages=(Stage("sft", run.steps * recipe.batch_tokens, {}),))
    run.rows = run.world.agree(cost.stage_rows(run.recipe, run.world.size, run.machine.device))
    run.curriculum = Curriculum([split], run.recipe.stages, context, recipe.batch_tokens, recipe.seed, recipe.packing)
    run.loader = train.Loader(run.curriculum, run.machine.device)
    return 0, len(split.tokens) / (len(split.starts) - 1)


# ---- DPO and APO ----------------------------------------------------------------------------------------------
def prepare_preferences(run, rows):
    """Pairs, and the start's log-probabilities of them, kept in the folder for a resumed run: no second model stays."""
    file = run.folder / "reference.pt"
    with reading(file):
        rows, reference = torch.load(file, weights_only=True) if file.exists() else (rows, None)
    rows = rows or draw_pairs(run)
    pairs, held = (encode_rows(run, side, answer_pair, "pairs") for side in held_out_rows(rows))
    if reference is None:
        reference = all_sums(run, pairs + held)
        if run.world.leader:
            run.folder.mkdir(parents=True, exist_ok=True)
            torch.save((rows, reference), file)
    run.examples, run.held = list(zip(pairs, reference.T)), list(zip(held, reference.T[len(pairs):]))
    return 2, np.mean([len(ids) for pair in pairs for ids, _ in pair])


def draw_pairs(run):
    """The start's own right and wrong answers, by the checker. Every process draws all: FSDP needs that."""
    recipe, found = run.recipe, []
    asked = askable(run, fresh_problems(recipe.problems))
    print(f"pairs     drawing {recipe.samples} answers to each of {len(asked):,} training problems")
    for (row, _), group in zip(asked, answers(run, asked, recipe.samples, recipe.temperature, recipe.seed)):
        texts = {run.tokenizer.decode(ids): reward for ids, reward in group if 0 < len(ids) < recipe.max_tokens}
        right, wrong = ([text for text in texts if texts[text] == value] for value in (1, 0))
        found += [parse_row(row | {"chosen": a, "rejected": b}, "dpo") for a, b in zip(right, wrong)]
    return found


def answer_pair(run, row):
    """The chosen and the rejected answer behind the prompt; only what follows the prompt counts."""
    pair, tools = [], row.get("tools")
    prompt = run.chat_format.prompt(row["prompt"], tools)
    for answer in (row["chosen"], row["rejected"]):
        ids, mask = run.chat_format.samples([*row["prompt"], answer], tools)[-1]
        same = len(os.path.commonprefix([ids, prompt]))
        pair.append((ids, [0] * same + mask[same:]))
    return [pair]


def preference_losses(run, step):
    """The losses of this process's pairs of a step. Unlikely tokens of a rejected answer have far larger gradients than
    likely ones of the chosen one, so that both can fall (Ren & Sutherland 2024); --nll trains the chosen one too."""
    recipe, share = run.recipe, 1 / run.recipe.pairs
    def loss_of(piece):
        pairs, reference = zip(*piece)
        policy = sums_of(run, run.parallel, pairs)
        reference = torch.stack(reference, 1).to(policy.device)
        loss, rewards = preference_loss(recipe.method, policy, reference, recipe.beta)
        loss = loss - recipe.nll * policy[0] / torch.tensor([sum(mask) for (_, mask), _ in pairs], device=loss.device)
        chosen, rejected = rewards * share
        add_found(run, accuracy=(chosen > rejected).sum() * share, chosen=chosen.sum(), rejected=rejected.sum())
        loss = loss.sum() * share
        return loss + run.model.routing_loss() * (len(pairs) * share), loss

    return [partial(loss_of, piece) for piece in batches(batch_of(run, step, recipe.pairs), run.rows[0] // 2 or 1)]


# ---- GRPO -----------------------------------------------------------------------------------------------------
def prepare_grpo(run, rows):
    """Problems to draw answers to."""
    recipe = run.recipe
    if rows or recipe.reward:
        file, _, name = recipe.reward.rpartition(":")
        with reading(f"--reward {recipe.reward}", "give FILE.py:FUNCTION with def FUNCTION(problem, answer)"):
            run.reward = runpy.run_path(file)[name]
    if rows:
        rows, held = held_out_rows(rows)
        run.tests["reward"] = askable(run, held[:recipe.eval_problems])
    run.examples = askable(run, rows or fresh_problems(recipe.problems))
    if recipe.kl:
        run.reference = from_pretrained(recipe.start).to(run.machine.device)
        run.reference.compute_dtype = run.machine.dtype
    return recipe.samples, np.mean([len(ids) for _, ids in run.examples]) + recipe.max_tokens / 2


def roll_out(run, step):
    """This process's answers of a step: ([(sequence, advantage)], tokens of each update over all processes, means)."""
    recipe, world = run.recipe, run.world
    asked = batch_of(run, step, recipe.prompts)
    drawn = answers(run, asked, recipe.samples, recipe.temperature,
                    int(2**48 * uniform(f"{recipe.seed} {step} {world.rank}")), {run.end})
    sequences, table = [], []
    for (_, prompt), group in zip(asked, drawn):
        for ids, reward in group:
            ended = len(ids) < recipe.max_tokens
            ids = ids + [run.end] * ended  # one that was cut off did not end itself
            sequences.append((prompt + ids, [0] * len(prompt) + [1] * len(ids)))
            table.append((reward, overlong_penalty(len(ids), recipe.max_tokens, recipe.overlong), len(ids), not ended))
    reward, penalty, length, cut_off = torch.tensor(table).T
    total = (reward + penalty).view(-1, recipe.samples)
    advantage = advantages(total - total[:, :1], recipe.normalization)  # exactly 0 in a group that agrees
    tokens = world.sum(length.view(recipe.updates, -1).sum(1))
    found = dict(reward=reward, penalty=penalty, length=length, cut_off=cut_off, mixed_groups=advantage.any(1).float())
    return (list(zip(sequences, advantage.flatten().tolist())), tokens.tolist(),
            {name: values.mean() for name, values in found.items()})


def grpo_losses(run, step):
    """Draws and rewards answers, compares them within their group, and makes all updates of the step but the last;
    returns the losses of the last one, which make good answers likelier and bad ones less likely."""
    recipe, (sampled, tokens, drawn) = run.recipe, roll_out(run, step)
    samples = recipe.prompts * recipe.samples // recipe.updates  # of an update
    def policy(model, piece):
        return logprobs(run, model, [sequence for sequence, _ in piece], recipe.temperature)

    def loss_of(piece, old, total):
        new, mask = policy(run.parallel, piece)
        advantage = torch.tensor([value for _, value in piece], device=new.device)[:, None]
        loss, share = policy_loss(new, old, advantage, recipe.clip_low, recipe.clip_high), len(piece) / samples
        clipped = mask * (loss != -(new - old).exp() * advantage)
        add_found(run, clipped=clipped.sum() / total, **{name: value * share for name, value in drawn.items()})
        if run.reference:
            reference, _ = frozen(run.reference, piece)
            add_found(run, kl=(mask * kl_k3(new, reference)).sum() / total)
            loss = loss + recipe.kl * kl_loss(new, old, reference)
        loss = (token_weights(mask, recipe.normalization, samples, total, recipe.max_tokens) * loss).sum()
        return loss + run.model.routing_loss() * share, loss

    frozen = torch.no_grad()(policy)
    losses = []  # of each update, for pieces of samples of similar length; `old` is by the policy that drew them
    for share, total in zip(batches(sampled, len(sampled) // recipe.updates), tokens):
        pieces = batches(sorted(share, key=lambda one: len(one[0][0])), run.rows[0])
        losses.append([partial(loss_of, piece, frozen(run.model, piece)[0], total) for piece in pieces])
    for earlier in losses[:-1]:
        train.update(run, earlier, run.rate(step))
    return losses[-1]


METHODS = {"sft": (prepare_sft, train.pretraining_losses, "batch_tokens"),  # the last must divide by the processes
           "dpo": (prepare_preferences, preference_losses, "pairs"), "grpo": (prepare_grpo, grpo_losses, "prompts")}
METHODS["apo_zero"] = METHODS["dpo"]


def prepare_run(recipe, folder, world, resume):
    """Reads the data, loads the start or the checkpoint to resume, and prepares what the method trains on."""
    prepare, _, size = METHODS[recipe.method]
    count, unit = getattr(recipe, size), world.size * recipe.updates
    if count % unit:
        raise UserError(f"--{size} {count} is no multiple of {unit}, the number of processes times --updates")
    rows = [row for file in recipe.data.split(",") if file for row in read_rows(file, recipe.method)]
    fingerprint = {"data": uniform(json.dumps(rows))}
    if resume and train.read_recipe(folder, PostRecipe)[1] != fingerprint:
        raise UserError(f"the data is not what {folder} began with; put that back or start a new run")
    source, machine = find_checkpoint(folder) if resume else recipe.start, world.agree(cost.choose_machine(recipe))
    context, compile = recipe.model.max_position_embeddings, recipe.compile
    recipe = cost.settle(recipe, machine, world.size, context)
    if recipe.method == "grpo" and recipe.parallel == "fsdp":
        raise UserError("grpo draws answers from whole weights, which FSDP does not keep; take --parallel ddp")
    tokenizer, model = Tokenizer.load(source), from_pretrained(source)
    model.config = recipe.model
    run = train.make_run(recipe, folder, world, machine, tokenizer, model, 0, None, resume and source, resume,
                         fingerprint=fingerprint, command="python posttrain.py")
    run.chat_format, run.tests, run.before, run.held = ChatFormat(source, tokenizer), {}, {}, []
    run.reward, run.reference = correct, None
    ids, mask = run.chat_format.samples(turns("?") + turns("!", "assistant"))[-1]
    said = [i for i, trained in zip(ids, mask) if trained and i in tokenizer.special.values()]
    run.end = (said or sorted(run.chat_format.stop))[-1]
    run.rows = world.agree([recipe.micro_batch or next(  # sequences computed at once; 10 % is left to cost.rows_at_once
        (n for n in (256, 64, 16, 4) if cost.fits(recipe, n, context, world.size, machine.device, 0.75)), 1)])
    for kind in () if rows else PROBLEMS if recipe.method == "sft" else ["arithmetic"]:
        run.tests[kind] = askable(run, problems(kind, recipe.eval_problems if kind == "arithmetic" else 100, 1, True))
    sequences, length = prepare(run, rows)
    if not run.curriculum:
        run.steps = recipe.steps or math.ceil(recipe.epochs * len(run.examples) / count)
    run.tokens_per_step, run.flops = round(count * sequences * length), cost.flops_per_token(recipe.model, length)
    if recipe.method == "sft":
        train.training_speed(run, compile)
    elif machine.compile:  # finds out now whether the compiler works
        cost.measure_speed(model, torch.zeros(run.rows[0], 64, dtype=torch.long, device=machine.device), None, 0.0)
    run.rate = lambda step: recipe.learning_rate * SCHEDULES[recipe.schedule](
        step, run.steps, recipe.warmup_steps, round(abs(recipe.decay_share) * run.steps),
        recipe.decay_shape, recipe.final_share)
    print(f"start     {recipe.start}: {count_parameters(recipe.model)['total']:,} parameters, context {context:,}; "
          f"{recipe.method}, {run.steps:,} steps of {count:,} {size} at {recipe.learning_rate:g}; {machine.reason}")
    return run


def post_train(recipe, folder, resume=False, world=train.World()):
    """Runs or resumes a recipe in a run folder; returns the last evaluation."""
    run = train.connect(prepare_run(recipe, folder, world, resume))
    for entry in run.log.entries() if run.log else ():
        run.before = entry.get("before", run.before)
    if not resume:
        scores = evaluate_answers(run, False)
        if run.log:
            copy_chat_format(recipe.start, folder, run.tokenizer)
            run.log.write(step=0, tokens=0, **scores, before=run.before)
    scores = train.train(run, METHODS[recipe.method][1], evaluate_answers)
    flat = [entry["reward"] for entry in run.log.entries() if entry.get("mixed_groups") == 0] if run.log else ()
    if len(flat) == run.steps:
        print(f"Nothing was learned: in all {run.steps:,} steps every answer to a prompt had the same reward (on "
              f"average {np.mean(flat):g}); take prompts with good and bad answers, a finer --reward or more --samples")
    else:
        print(f'Done: {folder}. Ask it with: python sample.py {folder} --chat --prompt "What is 12 + 30?"')
    return scores


def merge(folders, weights, out):
    """Writes the weighted mean of models (a soup with equal weights; Wortsman et al. 2022). SmolLM3: a soup of APO
    checkpoints, then 0.9 of it and 0.1 of the mid-training checkpoint, which brought back recall in long context."""
    weights = weights or [1 / len(folders) for _ in folders]
    fair = len(folders) == len(weights) > 1 and abs(sum(weights) - 1) < 1e-6
    if not fair or not out or Path(out).exists():
        raise UserError("merge takes two models or more, a weight for each that sum to 1, and a new folder: "
                        "python posttrain.py merge A B --weights .9 .1 --out DIR")
    model, tokenizer, state = from_pretrained(folders[0]), Tokenizer.load(folders[0]), Counter()
    for folder, weight in zip(folders, weights):
        other = from_pretrained(folder)
        if other.config != model.config or Tokenizer.load(folder).hash != tokenizer.hash:
            raise UserError(f"{folder} has another config or tokenizer than {folders[0]}; merge checkpoints of one")
        for name, tensor in other.state_dict().items():
            state[name] += weight * tensor
    model.load_state_dict(state)
    save_weights(model, tokenizer, out, chat_from=folders[0])
    print(f"{out} is written; ask it with: python sample.py {out} --chat")


def read_words(argv):
    """The command line, and the recipe that it names with the flags applied; None for a merge."""
    parser = Parser(__doc__)
    parser.add_argument("task", nargs="?", help="sft, dpo, apo, grpo or merge")
    parser.add_argument("runs", nargs="*", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--weights", type=float, nargs="+", help="merge: one a RUN (default: equal)")
    parser.add_argument("--out", help="merge: the new folder")
    parser.add_argument("--name", help="of the folder in runs/ (default: the start's and the task)")
    parser.add_argument("--resume", help="continue this run folder from its newest checkpoint")
    add_options(parser, PostRecipe, without="""method mixture tokens packing start sample_prompt eval_tokens eval_tasks
        z_loss document_mask""".split())
    args = parse_options(parser, argv)
    given = given_options(args, PostRecipe)
    for name in {"data", "reward"} & set(given):  # mean the same in every folder: a run may be resumed from another
        given[name] = ",".join(map(os.path.abspath, given[name].split(",")))
    if args.resume:
        return args, train.resumed(args, given, ["a task"] * bool(args.task), PostRecipe, train.RESUMABLE | {"reward"})
    if args.task == "merge":
        return args, None
    if args.task not in POST_RECIPES or len(args.runs) != 1:
        raise UserError("give a method and a model, such as: python posttrain.py sft runs/laptop")
    start = os.path.abspath(args.runs[0])
    args.name = args.name or f"{Path(start).name.removesuffix('-sft')}-{args.task}"
    if not is_hugging_face(start):
        start = str(find_checkpoint(start))  # a checkpoint: what the run does later changes nothing here
    config = load_config(start)
    context = min(given.get("context") or 8192, config.max_position_embeddings)  # more: first a stage of train.py
    scale = LARGER[args.task] if count_parameters(config)["total"] > 5e7 else {}
    return args, replace(POST_RECIPES[args.task], **scale | given, start=start,
                         model=config.change(max_position_embeddings=context))


def begin(world):
    args, recipe = read_words(sys.argv[1:])
    if recipe is None:
        return merge(args.runs, args.weights, args.out)
    post_train(recipe, Path(args.resume or world.agree(new_run_folder(args.name))), args.resume, world)


def main():
    train.command_line(begin)


if __name__ == "__main__":
    run_command(main)
