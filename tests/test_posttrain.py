"""posttrain.py: masks, packing, losses and rewards against hand-worked cases, enumeration and TRL's formulas; runs."""

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as d
import posttrain as p
import sample
import train
from checkpoint import from_pretrained, find_checkpoint, save_pretrained, save_weights
from conftest import ROOT, call, torchrun
from data import HELD_OUT, uniform
from model import GPT, ModelConfig
from tokenizer import ChatFormat, Tokenizer, UserError, train_bpe

TALK = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5."},
        {"role": "user", "content": "and <|im_end|>?"}, {"role": "assistant", "content": "no."}]
TOKENIZER = train_bpe(["What is the sum of these two small numbers? The answer is seven."], 280)


def tiny(vocab: int = 280, context: int = 64, **more) -> GPT:
    return GPT(ModelConfig(vocab, 32, 48, 2, 2, 1, max_position_embeddings=context, initializer_range=0.2, **more))


# ---- SFT ------------------------------------------------------------------------------------------------------


def test_mask_covers_exactly_what_the_assistant_says_and_its_end(tmp_path):
    (ids, mask), = ChatFormat(tmp_path, TOKENIZER).samples(TALK)
    start, end = TOKENIZER.control("<|im_start|>"), TOKENIZER.control("<|im_end|>")

    def turn(role, text):
        return [start, *TOKENIZER.encode(role + "\n")], [*TOKENIZER.encode(text), end], TOKENIZER.encode("\n")

    expected = [(TOKENIZER.eos_id, 0)]
    for message in TALK:
        header, body, tail = turn(message["role"], message["content"])
        trained = int(message["role"] == "assistant")
        expected += [(i, 0) for i in header] + [(i, trained) for i in body] + [(i, 0) for i in tail]
    assert list(zip(ids, mask)) == expected
    said = [i for i, m in zip(ids, mask) if m]
    assert said == [*TOKENIZER.encode("5."), end, *TOKENIZER.encode("no."), end]


def talks_of(count=12):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        n = int(rng.integers(4, 30))
        made.append((rng.integers(4, 280, n).tolist(), [0, *rng.integers(0, 2, n - 2).tolist(), 1]))
    return made


def test_packed_conversations_equal_separate_ones_and_ragged_pieces_one_batch():
    """Loss and gradients of conversations packed into rows, cut into uneven micro-batches, against one at a time;
    padding and prompts are no targets, and the divisor is the whole batch's number of trained tokens."""
    model, talks = tiny(), talks_of()
    split = p.packed([[talk] for talk in talks])
    rows = d.Packing(split, 64, "best-fit").count
    assert rows < len(talks)
    curriculum = d.Curriculum([split], [d.Stage("sft", rows * 64, {})], 64, rows * 64, packing="best-fit")
    trained = sum(sum(mask) for _, mask in talks)
    assert curriculum.steps == 1 and curriculum.targets(0) == trained == (curriculum.batch(0).targets >= 0).sum()
    for first, count in ((0, 1), (1, rows - 1)):  # pieces with different numbers of trained tokens
        batch = curriculum.batch(0, first, count)
        tokens, targets, starts = map(torch.from_numpy, (batch.tokens, batch.targets, batch.cu_seqlens))
        (model(tokens, starts, targets=targets)[0] / trained).backward()
    packed = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for ids, mask in talks:
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
        total = total - sum(logprobs[i, ids[i + 1]] for i in range(len(ids) - 1) if mask[i + 1])
    (total / trained).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, atol=2e-6, rtol=1e-4)


def fit(examples, too_long):
    """`p.encode_rows` of examples as they are, in 10 tokens."""
    recipe = SimpleNamespace(model=SimpleNamespace(max_position_embeddings=10), too_long=too_long)
    return p.encode_rows(SimpleNamespace(recipe=recipe), examples, lambda run, example: [example], "file")


def test_too_long_is_skipped_or_cut_and_counted(capsys):
    talks = [[([1] * 9, [0] * 4 + [1] * 5)], [([2] * 20, [0] * 5 + [1] * 15)], [([3] * 20, [0] * 12 + [1] * 8)]]
    assert fit(talks, "skip") == talks[:1]
    assert "1 file; 2 have more than 10 tokens" in (said := capsys.readouterr().out) and "--too_long cut" in said
    assert fit(talks, "cut") == [talks[0], [([2] * 10, [0] * 5 + [1] * 5)]]
    said = capsys.readouterr().out
    assert "2 have more" in said and "1 have no token to train on" in said and "--too_long" not in said
    with pytest.raises(UserError) as error:
        fit(talks[2:], "cut")
    assert "--too_long" not in str(error.value)


def test_pairs_of_the_same_tokens_are_left_out_also_after_cutting(capsys):
    same, late = ([1, 2, 3], [0, 1, 1]), [([1] * 12 + [n], [0] + [1] * 12) for n in (5, 6)]
    other = [([1, 2, 3], [0, 1, 1]), ([1, 2, 4], [0, 1, 1])]
    assert fit([[same, same], late, other], "cut") == [other]
    assert "; 2 have no token to train on, or the same" in capsys.readouterr().out


# ---- preferences ----------------------------------------------------------------------------------------------


TRL = {  # kind -> losses and their gradient by the policy's log-probabilities
    "dpo": ([0.493248945997, 1.701413277983, 0.554355244469],
            [[-0.116808229815, -0.245272342858, -0.127667244957], [0.116808229815, 0.245272342858, 0.127667244957]]),
    "apo_zero": ([0.888127637845, 1.356605808851, 0.925140309313],
                 [[-0.073337493507, -0.068635272137, -0.074579702003],
                  [0.074579702003, 0.061650092203, 0.074579702003]]),
}


def test_preference_losses_and_gradients_equal_trls():
    """The fixed numbers come from TRL 0.12.2's DPOTrainer.dpo_loss and autograd, in float64, beta 0.3."""
    policy = torch.tensor([[-10.0, -20.0, -5.0], [-12.0, -15.0, -6.5]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-11.0, -18.0, -5.5], [-11.5, -18.0, -6.0]], dtype=torch.float64)
    for kind, (losses, gradient) in TRL.items():
        loss, rewards = p.preference_loss(kind, policy, reference, 0.3)
        torch.testing.assert_close(loss, torch.tensor(losses, dtype=torch.float64), atol=1e-9, rtol=0)
        found, = torch.autograd.grad(loss.sum(), policy)
        torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(rewards, 0.3 * (policy.detach() - reference))


def test_nll_adds_the_chosen_answers_loss_a_token(monkeypatch):
    """6 nats of 3 trained tokens, twice: 4 more than DPO's loss."""
    monkeypatch.setattr(p, "sums_of", lambda *_: torch.tensor([[-6.0], [-9.0]]))
    pair = [([1] * 4, [0, 1, 1, 1]), ([1] * 4, [0, 1, 1, 1])]
    recipe = SimpleNamespace(method="dpo", beta=0.1, nll=2.0, pairs=1, seed=0)
    run = SimpleNamespace(recipe=recipe, parallel=None, rows=[2], world=train.World(), found={},
                          examples=[(pair, torch.zeros(2))], model=SimpleNamespace(routing_loss=lambda: 0.0))
    (loss_of,) = p.preference_losses(run, 0)
    torch.testing.assert_close(loss_of()[0], 4 - torch.tensor(0.3).sigmoid().log())


def test_logprobs_of_padded_answers_equal_those_of_each_alone():
    """Also where shapes are rounded up, for a compiled model."""
    model, talks, shapes = tiny(), talks_of(5), []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    for compiled in (False, True):
        machine = SimpleNamespace(compile=compiled, device="cpu")
        found, mask = p.logprobs(SimpleNamespace(machine=machine, rows=[8], model=model), model, talks)
        assert len(found) == len(mask) == 5
        for (ids, trained), row in zip(talks, found):
            logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
            expected = sum(logprobs[i, ids[i + 1]] for i in range(len(ids) - 1) if trained[i + 1])
            torch.testing.assert_close(row.sum(), expected, atol=1e-4, rtol=1e-5)
    assert shapes[6] == (8, 64)


# ---- reinforcement learning -----------------------------------------------------------------------------------


def test_advantages_penalty_and_weights_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0]])
    std = math.sqrt(1 / 3)  # of 1, 0, 0, 1 with three degrees of freedom
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [2.25, -0.75, -0.75, -0.75]])
    torch.testing.assert_close(p.advantages(rewards, "dr_grpo"), expected)
    divided = expected / torch.tensor([[std], [1.0], [1.5]])
    for kind in ("grpo", "dapo"):
        torch.testing.assert_close(p.advantages(rewards, kind), divided, atol=1e-3, rtol=1e-3)
    assert [p.overlong_penalty(n, 100, 20) for n in (1, 80, 85, 90, 100, 130)] == [0, 0, -0.25, -0.5, -1, -1]
    assert [p.overlong_penalty(n, 100, 0) for n in (100, 101)] == [0, -1]
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    for kind, weights in (("grpo", (1 / 8, 1 / 2)), ("dapo", (1 / 5, 1 / 5)), ("dr_grpo", (1 / 16, 1 / 16))):
        found = p.token_weights(mask, kind, samples=2, tokens=5, longest=8)
        torch.testing.assert_close(found, mask * torch.tensor(weights)[:, None])


def test_clipping_and_kl_by_hand():
    """A ratio beyond the clip has no gradient, but only on the side that the advantage pushes to."""
    ratio, advantage = torch.tensor([[0.5, 0.9, 1.5, 0.5, 1.1, 1.5]]), torch.tensor([[1.0, 1, 1, -1, -1, -1]])
    new = ratio.log().requires_grad_()
    loss = p.policy_loss(new, torch.zeros(1, 6), advantage, 0.2, 0.28)
    torch.testing.assert_close(loss, -torch.tensor([[0.5, 0.9, 1.28, -0.8, -1.1, -1.5]]))
    loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-0.5, -0.9, 0, 0, 1.1, 1.5]]))
    policy, other = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    k3 = p.kl_k3(policy.log(), other.log())
    assert (k3 >= 0).all()
    torch.testing.assert_close((policy * k3).sum(), (policy * (policy / other).log()).sum())  # unbiased


def test_grpo_gradient_equals_the_enumerated_policy_gradient():
    """A policy over 3 tokens and answers of at most 2 (token 0 ends one): every group of 2 samples, weighed by its
    probability, gives (G - 1) / G of the exact gradient of the expected reward over the length."""
    torch.manual_seed(1)
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)  # logits after nothing, and after 0, 1, 2
    answers = [(0,), *((a, b) for a in (1, 2) for b in range(3))]
    rewards = {answer: float(np.random.default_rng(i).normal()) for i, answer in enumerate(answers)}

    def logprobs(answer):  # [2], 0 where the answer has ended
        steps = [table[0].log_softmax(0)[answer[0]]]
        steps.append(table[1 + answer[0]].log_softmax(0)[answer[1]] if len(answer) > 1 else table.new_zeros(()))
        return torch.stack(steps)

    expected = sum(logprobs(a).sum().exp() * rewards[a] for a in answers)
    exact, = torch.autograd.grad(expected, table)
    found = torch.zeros_like(table)
    for group in itertools.product(answers, repeat=2):
        new = torch.stack([logprobs(a) for a in group])
        mask = torch.tensor([[1.0, len(a) > 1] for a in group], dtype=torch.float64)
        advantage = p.advantages(torch.tensor([[rewards[a] for a in group]], dtype=torch.float64), "dr_grpo")
        weights = p.token_weights(mask, "dr_grpo", samples=2, tokens=int(mask.sum()), longest=2)
        loss = (weights * p.policy_loss(new, new.detach(), advantage.view(2, 1), 0.2, 0.28)).sum()
        gradient, = torch.autograd.grad(loss, table)
        found -= new.detach().sum().exp() * gradient
    torch.testing.assert_close(found, exact * (1 / 2) / 2, atol=1e-12, rtol=1e-9)


def test_the_gradient_of_kl_is_that_of_the_reverse_divergence():
    """Over 6 tokens, each weighed by its probability. k3 alone has the gradient of KL(reference || policy)."""
    new = torch.tensor([0.9, -0.3, 0.2, 0.0, -1.1, 0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.4, 0.6, 0.1, 0.8, -0.2, -0.7], dtype=torch.float64).log_softmax(0)
    policy = new.log_softmax(0)
    drawn = policy.detach()

    def gradient(of):
        return torch.autograd.grad(of.sum(), new, retain_graph=True)[0]

    reverse = gradient(policy.exp() * (policy - reference))
    forward = gradient(reference.exp() * (reference - policy))
    for estimate, expected in ((p.kl_loss(policy, drawn, reference), reverse), (p.kl_k3(policy, reference), forward)):
        torch.testing.assert_close(gradient(drawn.exp() * estimate), expected, atol=1e-12, rtol=1e-9)


def test_a_reward_that_raises_shows_the_sample():
    def score(problem, answer):
        return 1 / (len(answer) - 2)

    assert p.reward_of(score, {"prompt": "?"}, "four") == 0.5
    with pytest.raises(UserError, match="'no'.*'prompt'.*ZeroDivisionError"):
        p.reward_of(score, {"prompt": "?"}, "no")
    with pytest.raises(UserError, match="nan"):
        p.reward_of(lambda *_: math.nan, {}, "")


# ---- data -----------------------------------------------------------------------------------------------------


def test_held_out_problems_are_in_no_training_data():
    """In neither the problems nor the pre-training corpus; an answer counts by its first line's last number."""
    for kind in p.PROBLEMS:
        held = {q["about"] for q in p.problems(kind, 100, 1, held_out=True)}
        assert not held & {q["about"] for q in p.problems(kind, 3000, 2)}
        for problem in p.problems(kind, 50, 3):
            right = problem["reply"]
            assert p.correct(problem, right + "\nQuestion: 4?") and not p.correct(problem, right + " 707")
            assert not p.correct(problem, "") and not p.correct(problem, "a word")
    assert not p.correct({"reply": "def log2(x):"}, "def exp2(x):")  # a name's digit is no number
    held = {q["prompt"] for q in p.problems("arithmetic", 300, 1, held_out=True)}
    assert len(held) == 300
    trained = {text.split("\n")[0].removeprefix("Question: ") for key, text in d.generated_math(20_000)
               if uniform(key) >= HELD_OUT}
    assert not held & trained
    assert not {q["prompt"] for q in p.fresh_problems(100)} & {
        q["prompt"] for q in p.problems("arithmetic", p.SFT_PROBLEMS, 2)}


@pytest.mark.parametrize("form, line", [
    ("sft", '{"messages": [{"role": "user"}]}'), ("sft", '{"messages": "hello"}'), ("sft", "{"),
    ("sft", '{"messages": []}'),
    ("dpo", '{"prompt": "a", "chosen": "b"}'),
    ("dpo", '{"prompt": "a", "chosen": "b", "rejected": 3}'), ("grpo", '{"question": "a"}'), ("grpo", "[]")])
def test_malformed_jsonl_names_file_and_line(tmp_path, form, line):
    good = {"sft": {"messages": TALK}, "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"}, "grpo": {"prompt": "a"}}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(good[form]) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl line 3 cannot be read .*--help") as error:
        p.read_rows(str(file), form)
    assert "\n" not in str(error.value)
    file.write_text(json.dumps(good[form]) + "\n")
    assert len(p.read_rows(str(file), form)) == 1


def test_preferences_with_the_prompt_in_front_of_both_answers():
    """Hugging Face's two forms, explicit and implicit prompt, texts and conversations, are the same."""
    prompt, chosen, rejected = TALK[:1], {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"prompt": "2 + 3?", "chosen": "a", "rejected": "b"},
            {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
            {"prompt": prompt, "chosen": [*prompt, chosen], "rejected": [rejected]}]
    for row in rows:
        assert p.parse_row(row, "dpo") == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(*said: str) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in zip(("assistant", "user") * 9, said)]}


def test_about_three_percent_of_the_questions_are_held_out():
    """Also where the assistant greets first, and of whole conversations where there are few questions."""
    greetings = [chat("Welcome!", f"q{i}", f"a{i}") for i in range(1000)]
    few = [{"prompt": f"p{i % 2}", "chosen": f"c{i}", "rejected": "r"} for i in range(1000)]
    uneven = [{"prompt": f"p{i}" if i < 500 else "p", "answer": i} for i in range(1000)]
    for rows in (greetings, few, uneven):
        rest, held = p.held_out_rows(rows)
        assert 20 <= len(held) <= 30 and len(rest) + len(held) == 1000
    questions = [[row["prompt"] for row in side] for side in p.held_out_rows(uneven)]
    assert not set(questions[0]) & set(questions[1])
    assert len(p.held_out_rows(greetings[:60])[1]) == 10 and len(p.held_out_rows(greetings[:2])[1]) == 1
    for rows, count in ((few[:2] * 5, 5), ([{"prompt": f"p{i % 30}", "n": i} for i in range(1000)], 33)):
        rest, held = p.held_out_rows(rows)  # one question that is more than 3 % is still held out as a whole
        assert len(held) == count and not {row["prompt"] for row in rest} & {row["prompt"] for row in held}
    with pytest.raises(UserError, match="fewer than 2 different"):
        p.held_out_rows(few[:1] * 9)


@pytest.fixture
def template(tmp_path) -> ChatFormat:
    """A folder whose chat template shows tools and changes earlier turns, as Qwen3's does."""
    pytest.importorskip("jinja2")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% if loop.last %}!{% endif %}{% generation %}"
        "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.name }}{% endfor %}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]!{% endif %}")
    return ChatFormat(tmp_path, TOKENIZER)


def said(example):
    return [TOKENIZER.decode(i for i, m in zip(*sequence) if m) for sequence in example]


def test_tool_calls_are_trained_and_every_turn_of_a_template_that_changes_earlier_ones(template, tmp_path):
    call = [{"name": "weather"}]
    talk = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": call},
                         {"role": "tool", "content": "3"}, {"role": "assistant", "content": "it is 3"}], "tools": call}
    run = SimpleNamespace(chat_format=template, recipe=SimpleNamespace(assistant_only=True))
    samples = p.conversation(run, p.parse_row(talk, "sft"))
    assert [said(sample) for sample in samples] == [["weather"], ["it is 3"]]
    assert all('"weather"' in TOKENIZER.decode(ids) for (ids, _), in samples)
    run.recipe.assistant_only = False
    assert len(p.conversation(run, p.parse_row(talk, "sft"))) == 1
    run.chat_format = ChatFormat(tmp_path / "absent", TOKENIZER)  # our own format cannot show tools
    with pytest.raises(UserError, match="tools"):
        p.conversation(run, p.parse_row(talk, "sft"))


def test_only_the_answer_counts_and_an_empty_one_is_left_out(template, capsys):
    run = SimpleNamespace(chat_format=template)
    row = {"prompt": TALK[:3], "chosen": "seven", "rejected": ""}
    pair = p.answer_pair(run, p.parse_row(row, "dpo"))[0]
    assert said(pair) == ["seven", ""]  # not the "5." before
    ours = SimpleNamespace(chat_format=ChatFormat("absent", TOKENIZER))
    assert said(p.answer_pair(ours, p.parse_row(row, "dpo"))[0]) == ["seven<|im_end|>", "<|im_end|>"]
    other = p.answer_pair(run, p.parse_row(row | {"rejected": "the"}, "dpo"))[0]
    run.recipe = SimpleNamespace(model=SimpleNamespace(max_position_embeddings=99), too_long="skip")
    assert p.encode_rows(run, [pair, other], lambda run, pair: [pair], "pairs") == [other]
    assert "1 have no token" in capsys.readouterr().out


# ---- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny model in `base`, data for each method, and a reward that likes the letter a."""
    monkeypatch.chdir(tmp_path)
    save_weights(tiny(TOKENIZER.vocab_size), TOKENIZER, tmp_path / "base", tmp_path)
    words = ["seven", "a small number", "the sum", "two and two", "the answer", "numbers"]
    rows = [{"prompt": f"What is {i} and {i * i}?", "chosen": words[i % 6], "rejected": words[i % 5] + "?"}
            for i in range(60)]
    talks = [{"messages": p.turns(r["prompt"], "user") + p.turns(r["chosen"], "assistant")} for r in rows]
    for name, lines in (("sft", talks), ("pairs", rows), ("ask", [{"prompt": r["prompt"]} for r in rows])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.py").write_text("def score(problem, answer):\n    return min(1, answer.count('a') / 3)\n")
    return tmp_path


FLAGS = {"sft": ["--data", "sft.jsonl", "--batch-tokens", "128", "--optimizer", "adamw"],
         "apo": ["--data", "pairs.jsonl", "--pairs", "8", "--epochs", "2", "--nll", "0"],
         "grpo": ["--data", "ask.jsonl", "--reward", "r.py:score", "--prompts", "4", "--samples", "4",
                  "--max-tokens", "6", "--steps", "8", "--updates", "2", "--kl", "0.1", "--overlong", "3"]}


COMMON = ["--learning-rate", "1e-3", "--warmup-steps", "1", "--device", "cpu", "--dtype", "float32"]


def recipe(method: str, *more: str) -> p.PostRecipe:
    return p.read_words([method, "base", *FLAGS[method], *COMMON, "--micro-batch", "2", *more])[1]


def state(folder: Path) -> list[torch.Tensor]:
    last = find_checkpoint(folder)
    trees = [torch.load(last / name, weights_only=True) for name in ("model.pt", "optimizer.pt")]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def logged(folder: Path, key: str) -> list:
    return [e[key] for line in (folder / "log.jsonl").read_text().splitlines() if key in (e := json.loads(line))]


def post_train(folder: str, method: str, *more: str) -> dict:
    return p.post_train(recipe(method, *more), Path("runs") / folder)


@pytest.mark.parametrize("method", list(FLAGS))
def test_interrupted_and_resumed_equals_straight_bit_for_bit(here, method, monkeypatch):
    """Weights, moments, losses and scores, also from another folder; the reference is computed once."""
    calls, original = [], p.all_sums
    monkeypatch.setattr(p, "all_sums", lambda run, examples: calls.append(len(examples)) or original(run, examples))
    straight = post_train("straight", method)
    once = list(calls)
    count, step = 0, torch.optim.AdamW.step

    def interrupt(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(train.Interrupted, match="python posttrain.py --resume runs/stopped"):
        post_train("stopped", method)
    calls.clear()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    resumed = p.post_train(p.read_words(["--resume", "../runs/stopped"])[1], Path("../runs/stopped"), True)
    assert resumed == straight
    monkeypatch.chdir(here)
    stopped, run = Path("runs/stopped"), Path("runs/straight")
    assert logged(stopped, "loss") == logged(run, "loss")
    assert all(torch.equal(a, b) for a, b in zip(state(stopped), state(run), strict=True))
    if method == "sft":
        log = (stopped / "log.jsonl").read_text()
        (stopped / "log.jsonl").write_text(log.replace('"before": {', '"before": {"nats per token": "x"}, "was": {', 1))
        shutil.rmtree(p.find_checkpoint(stopped))  # so that there is something left to do
        with pytest.raises(UserError, match="stopped cannot be read"):
            p.post_train(p.read_words(["--resume", "runs/stopped"])[1], stopped, True)
        (here / "sft.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
        with pytest.raises(UserError, match="the data is not what runs/stopped began with"):
            p.post_train(p.read_words(["--resume", "runs/stopped"])[1], stopped, True)
    if method == "apo":
        assert once == [60, 10, 10] and calls == [10]  # only the held-out pairs, not the reference
        assert logged(run, "accuracy")[-1] > 0.8 > 0.2 > logged(run, "accuracy")[0]
        chosen, rejected = logged(run, "chosen"), logged(run, "rejected")
        assert chosen[0] == rejected[0] == 0 and chosen[-1] > rejected[-1]
    if method == "grpo":
        assert logged(run, "kl")[-1] > 0 and {"reward", "length", "penalty", "clipped"} <= set(
            json.loads((run / "log.jsonl").read_text().splitlines()[1]))


def test_built_in_problems_need_no_data(here):
    save_weights(tiny(TOKENIZER.vocab_size, 256), TOKENIZER, here / "base", here)
    small = ["--problems", "100", "--eval-problems", "4", "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    for method in ("sft", "grpo"):
        scores = p.post_train(p.read_words([method, "base", *small, "--max-tokens", "8"])[1], Path(f"runs/{method}"))
        for kind in p.PROBLEMS if method == "sft" else ["arithmetic"]:  # scored before and after
            assert len(logged(Path(f"runs/{method}"), "before")[0][kind]) == (4 if kind == "arithmetic" else 100)
            assert {kind, f"{kind}, sampled"} <= set(scores["val"])
    with pytest.raises(UserError, match="fewer than 2 .* begin with SFT"):  # it has not learned anything
        p.post_train(p.read_words(["apo", "base", *small, "--max-tokens", "8"])[1], Path("runs/apo"))
    p.answers, original = (lambda run, asked, samples, *_: [
        [(run.tokenizer.encode(f"So {n}")[:7], float(n)) for n in range(2)][:samples] for _ in asked]), p.answers
    try:  # a start that is right in every second answer
        scores = p.post_train(p.read_words(["apo", "base", *small, "--max-tokens", "8"])[1], Path("runs/apo"))
    finally:
        p.answers = original
    assert "pairs right" in scores["val"]
    assert p.post_train(p.read_words(["--resume", "runs/apo"])[1], Path("runs/apo"), True) == {}


def test_pieces_and_one_big_batch_train_the_same(here):
    for method in FLAGS:
        losses = []
        for size in ("1", "2"):
            post_train(f"{method}-{size}", method, "--micro-batch", size, "--steps", "2", "--eval-problems", "2")
            losses.append(logged(Path(f"runs/{method}-{size}"), "loss"))
        assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_two_processes_and_fsdp_train_as_one(here):
    script = here / "both.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import posttrain as p
world = p.train.World.join()
for words in {[[method, "base", *FLAGS[method], *COMMON, "--steps", "3"] for method in ("sft", "apo")]}:
    for kind in ("ddp", "fsdp"):
        p.post_train(p.read_words([*words, "--parallel", kind])[1], p.Path(f"runs/{{words[0]}}-{{kind}}"), False, world)
""")
    done = torchrun(str(script))
    assert done.returncode == 0, done.stderr
    for method in ("sft", "apo"):
        scores = post_train(f"{method}-one", method, "--micro-batch", "0", "--steps", "3")["val"]
        one = logged(Path(f"runs/{method}-one"), "loss")
        for kind in ("ddp", "fsdp"):
            assert logged(Path(f"runs/{method}-{kind}"), "loss") == pytest.approx(one, abs=1e-5)
            assert logged(Path(f"runs/{method}-{kind}"), "val")[-1] == pytest.approx(scores, abs=1e-4)


def test_an_epoch_sees_every_conversation_once(here):
    """Rows carry padding, so an epoch has more rows than tokens over the context; of two files too."""
    talks = [json.dumps({"messages": p.turns("x" * (i % 37)) + p.turns(f"{i}", "assistant")}) for i in range(370)]
    for name, part in (("a", talks[:300]), ("b", talks[300:])):
        (here / f"{name}.jsonl").write_text("\n".join(part))
    run = p.prepare_run(recipe("sft", "--data", "a.jsonl,b.jsonl"), here / "runs/x", train.World(), False)
    seen, packing = [], d.Packing(run.curriculum.sources[0], 64, "best-fit")
    for step in range(run.steps):
        seen += run.curriculum.locate(step, 0, run.curriculum.rows(step))[1].tolist()
    assert set(seen) == set(range(packing.count)) and 0 <= len(seen) - packing.count < 2
    pieces = sorted(begin for row in range(packing.count) for begin, _ in packing.pieces(row))
    assert len(pieces) == 360 and pieces == run.curriculum.sources[0].starts[:-1].tolist()  # 10 of 370 are held out


def test_grpo_learns_what_is_rewarded(here, capsys):
    post_train("a", "grpo", "--steps", "20", "--prompts", "8", "--samples", "8", "--kl", "0", "--overlong", "0",
               "--learning-rate", "5e-3")
    rewards = logged(Path("runs/a"), "reward")
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2
    assert "Done" in capsys.readouterr().out


def test_grpo_whose_groups_never_differ_says_so(here, capsys):
    (here / "flat.py").write_text("def score(problem, answer):\n    return 0.1\n")
    post_train("flat", "grpo", "--reward", "flat.py:score", "--overlong", "0", "--steps", "2", "--kl", "0", "--samples",
               "7")  # whose mean is not 0.1 in float32
    said = capsys.readouterr().out
    assert "Nothing was learned" in said and "on average 0.1" in said and "Done" not in said
    assert logged(Path("runs/flat"), "loss") == [0, 0]


def grpo_run(here, size=1, rank=0, *more):
    world = train.World(rank, size)
    world.sum, world.agree = (lambda value=None: value), (lambda value=None: value)
    return p.prepare_run(recipe("grpo", "--prompts", "8", *more), here / "runs/grpo", world, False)


def test_grpo_draws_every_problem_and_the_same_ones_in_any_number_of_processes(here, monkeypatch):
    said = []

    def draw(run, problems, samples, *options):
        said.append([tuple(ids) for _, ids in problems])
        return [[([5], 1.0)] * samples] * len(problems)

    def drawn(run, step):  # [updates][questions]
        p.roll_out(run, step)
        half = len(said[-1]) // 2
        return said[-1][:half], said[-1][half:]

    monkeypatch.setattr(p, "answers", draw)
    one, two = grpo_run(here), [grpo_run(here, 2, rank) for rank in range(2)]
    seen = set()
    for step in range(8):  # 64 prompts of 50 problems
        whole, parts = drawn(one, step), [drawn(run, step) for run in two]
        for update in range(2):
            assert sorted(whole[update]) == sorted(parts[0][update] + parts[1][update])
            seen |= set(whole[update])
    assert len(seen) == len(one.examples) == 50


def test_grpo_leaves_out_prompts_without_room_and_counts_them(here, capsys):
    """An answer that the context cuts short would pass for one that ended itself."""
    run = grpo_run(here)
    (row, ids), = p.askable(run, [{"prompt": "short"}, {"prompt": "long " * 30}])
    assert row["prompt"] == "short" and len(ids) + 6 <= 64
    assert "1 of 2 prompts are left out: their more than 58 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="smaller --max_tokens"):
        grpo_run(here, 1, 0, "--max-tokens", "60")


def test_grpo_probabilities_are_those_of_the_policy_that_sampled(here):
    run = grpo_run(here, 1, 0, "--temperature", "0.5")
    ids, mask = talks_of(1)[0]
    logprobs = (run.model(torch.tensor([ids])).detach() / 0.5).log_softmax(-1)[0]
    expected = [float(logprobs[i, ids[i + 1]]) * mask[i + 1] for i in range(len(ids) - 1)]
    found, _ = p.logprobs(run, run.model, [(ids, mask)], 0.5)
    torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_a_change_is_judged_by_the_same_questions(here, capsys, monkeypatch):
    """1 of 4 questions turns from wrong to right: 0.25 with a standard error of 0.25, not that of two scores apart."""
    run = grpo_run(here)
    run.tests["reward"] = run.tests["reward"][:4]
    for run.step, values in ((0, [1.0, 0, 0, 1]), (9, [1.0, 1, 0, 1])):
        monkeypatch.setattr(p, "answers", lambda *_: [[([], value)] for value in values])
        p.evaluate_answers(run, True)
    assert "before 0.500 ± 0.289   change +0.250 ± 0.250" in capsys.readouterr().out


def test_merge_loads_and_refuses_other_configs(here):
    other = tiny(TOKENIZER.vocab_size)
    save_weights(other, TOKENIZER, here / "other", here)
    done = call(p.main, "merge", "base", "other", "--weights", ".9", ".1", "--out", "merged")
    assert done.returncode == 0, done.stderr
    merged, base = from_pretrained("merged"), from_pretrained("base")
    for (name, w), a, b in zip(merged.named_parameters(), base.parameters(), other.parameters()):
        torch.testing.assert_close(w, 0.9 * a + 0.1 * b, msg=name)
    p.merge(["base", "other"], None, "soup")
    soup = from_pretrained("soup")
    torch.testing.assert_close(soup.model.norm.weight, (base.model.norm.weight + other.model.norm.weight) / 2)
    said = call(sample.main, "merged", "--chat", "--prompt", "hi", "--max-tokens", "3")
    assert said.returncode == 0, said.stderr
    more = p.read_words(["sft", "merged", *FLAGS["sft"], "--device", "cpu", "--steps", "1"])[1]
    p.post_train(more, Path("runs/more"))
    assert call(p.main, "merge", "runs/more", "merged", "--out", "of-runs").returncode == 0  # of a run folder, too
    again = call(p.main, "merge", "runs/more", "merged", "--out", "of-runs")
    assert again.returncode == 2 and "a new folder" in again.stderr
    save_weights(tiny(TOKENIZER.vocab_size, rope_theta=5e4), TOKENIZER, here / "theta", here)
    with pytest.raises(UserError, match="another config"):
        p.merge(["base", "theta"], None, "no")


def test_a_run_from_a_hugging_face_folder_keeps_its_template(here):
    pytest.importorskip("safetensors"), pytest.importorskip("jinja2")
    save_pretrained(from_pretrained("base"), "hf", tokenizer_from="base")
    template = ("{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
                "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    (here / "hf/chat_template.jinja").write_text(template)
    p.post_train(p.read_words(["sft", "hf", *FLAGS["sft"], *COMMON, "--steps", "1"])[1], Path("runs/hf-sft"))
    prompter = ChatFormat("runs/hf-sft", Tokenizer.load("runs/hf-sft"))
    assert prompter.template == template and TOKENIZER.control("<|im_end|>") in prompter.stop
    assert prompter.prompt(TALK[:1])[:3] == TOKENIZER.encode("[user]2 +")[:3]
    assert call(sample.main, "runs/hf-sft", "--chat", "--prompt", "hi", "--max-tokens", "3").returncode == 0
    start = p.read_words(["grpo", "runs/hf-sft"])[1].start  # the next stage's prompts are the template's too
    assert ChatFormat(start, TOKENIZER).template == template and ChatFormat(start, TOKENIZER).stop == prompter.stop


@pytest.mark.parametrize("words, said", [
    (["sft", "absent"], "absent"), (["sft"], "give a method and a model"), (["sft", "base", "--beta", "x"], "--beta"),
    (["sft", "base", "--learning-rat", "1"], "--learning_rate"), (["grpo", "base", "--data", "ask.jsonl"], "--reward"),
    (["sft", "base", "--data", "bad.jsonl"], "bad.jsonl line 2"), (["merge", "base", "--out", "m"], "merge A B"),
    (["grpo", "base", "--data", "ask.jsonl", "--reward", "boom.py:score", "--max-tokens", "4"], "no idea")])
def test_bad_input_is_one_sentence(here, words, said):
    (here / "bad.jsonl").write_text(json.dumps({"messages": TALK}) + "\nnot json\n")
    (here / "boom.py").write_text("def score(problem, answer):\n    raise RuntimeError('no idea')\n")
    done = call(p.main, *words)
    lines = [line for line in done.stderr.splitlines() if "steps [" not in line]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr
