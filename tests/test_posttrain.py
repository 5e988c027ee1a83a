"""posttrain.py: masks, packing, losses and rewards against hand-worked cases, enumeration, TRL's formulas, a whole run."""

import itertools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data as d
import posttrain as p
import sample
import train
from conftest import call
from checkpoint import from_pretrained, newest_checkpoint
from model import GPT, ModelConfig, cross_entropy
from tokenizer import ChatFormat, Tokenizer, UserError, train_bpe
from data import HELD_OUT, uniform

TALK = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5."},
        {"role": "user", "content": "and <|im_end|>?"}, {"role": "assistant", "content": "no."}]
TOKENIZER = train_bpe(["What is the sum of these two small numbers? The answer is seven."], 280)


def tiny(vocab: int = 280, context: int = 64, **more) -> GPT:
    return GPT(ModelConfig(vocab, 32, 48, 2, 2, 1, max_position_embeddings=context, initializer_range=0.2, **more)).eval()


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


@pytest.mark.parametrize("tags", [True, False])
def test_mask_of_a_hugging_face_template(tmp_path, tags):
    """With {% generation %} tags, and by what a reply adds to the prompt: the same as ChatML by hand."""
    pytest.importorskip("jinja2")
    TOKENIZER.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    begin, stop = ("{% generation %}", "{% endgeneration %}") if tags else ("", "")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + begin
        + "{{ m.content + '<|im_end|>' }}" + stop + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    prompter = ChatFormat(tmp_path, TOKENIZER)
    ours = ChatFormat(tmp_path / "ours", TOKENIZER)  # opens with EOS, which this template does not write
    assert prompter.samples(TALK) == [(ids[1:], mask[1:]) for ids, mask in ours.samples(TALK)]
    assert prompter.prompt(TALK[:3]) == ours.prompt(TALK[:3])[1:]
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="generation"):
        ChatFormat(tmp_path, TOKENIZER).samples(TALK)


def conversations(count: int = 12) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        n = int(rng.integers(4, 30))
        made.append((rng.integers(4, 280, n).tolist(), [0, *rng.integers(0, 2, n - 2).tolist(), 1]))
    return made


def test_packed_conversations_equal_separate_ones_and_ragged_pieces_one_batch():
    """Loss and gradients of conversations packed into rows, cut into uneven micro-batches, against one at a time;
    padding and prompts are no targets, and the divisor is the whole batch's number of trained tokens."""
    model, talks = tiny(), conversations()
    split = p.conversation_split("talks", talks, TOKENIZER)
    packing = d.Packing(split, 64, "best-fit")
    assert packing.count < len(talks)
    tokens, targets, starts = d.cut_sequences(packing, np.arange(packing.count))
    trained = sum(sum(mask) for _, mask in talks)
    assert (targets >= 0).sum() == trained == sum(packing.targets(row) for row in range(packing.count))
    for first, last in ((0, 1), (1, packing.count)):  # pieces with different numbers of trained tokens
        cu = d.pack_cu_seqlens(starts[first:last], 64, 64 * (last - first))
        logits = model(torch.from_numpy(tokens[first:last]), torch.from_numpy(cu))
        (cross_entropy(logits, torch.from_numpy(targets[first:last])) / trained).backward()
    packed = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for ids, mask in talks:
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
        total = total - sum(logprobs[i, ids[i + 1]] for i in range(len(ids) - 1) if mask[i + 1])
    (total / trained).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, atol=2e-6, rtol=1e-4)


def test_too_long_is_skipped_or_cut_and_counted(capsys):
    talks = [([1] * 9, [0] * 4 + [1] * 5), ([2] * 20, [0] * 5 + [1] * 15), ([3] * 20, [0] * 12 + [1] * 8)]
    assert p.fit_conversations(talks, 10, "skip", "file") == talks[:1]
    assert "2 of file have more than 10 tokens" in capsys.readouterr().out
    cut = p.fit_conversations(talks, 10, "cut", "file")
    assert cut == [talks[0], ([2] * 10, [0] * 5 + [1] * 5)] and "1 of file have nothing" in capsys.readouterr().out


# ---- preferences ----------------------------------------------------------------------------------------------


TRL = {  # kind -> losses and their gradient by the policy's log-probabilities
    "dpo": ([0.493248945997, 1.701413277983, 0.554355244469],
            [[-0.116808229815, -0.245272342858, -0.127667244957], [0.116808229815, 0.245272342858, 0.127667244957]]),
    "apo_zero": ([0.888127637845, 1.356605808851, 0.925140309313],
                 [[-0.073337493507, -0.068635272137, -0.074579702003], [0.074579702003, 0.061650092203, 0.074579702003]]),
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


def test_nll_adds_the_chosen_answers_loss_a_token():
    """6 nats of 3 trained tokens, twice: 4 more than DPO's loss."""
    job = SimpleNamespace(recipe=SimpleNamespace(method="dpo", beta=0.1, nll=2.0, pairs=1), parallel=None,
                          logprobs=lambda *_: torch.tensor([[-6.0], [-9.0]]),
                          model=SimpleNamespace(routing_loss=lambda: 0.0))
    loss, _ = p.Preferences.loss(job, [(([1] * 4, [0, 1, 1, 1]), ([1] * 4, [0, 1, 1, 1]))], torch.zeros(2, 1))
    torch.testing.assert_close(loss, 4 - torch.tensor(0.3).sigmoid().log())


def test_logprobs_of_padded_answers_equal_those_of_each_alone():
    model, talks = tiny(), conversations(5)
    tokens, targets = p.pad(talks, "cpu")
    found = p.token_logprobs(model(tokens), targets).sum(1)
    for (ids, mask), total in zip(talks, found):
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
        expected = sum(logprobs[i, ids[i + 1]] for i in range(len(ids) - 1) if mask[i + 1])
        torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


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


def test_a_reward_that_raises_shows_the_sample(tmp_path):
    (tmp_path / "r.py").write_text("def score(problem, answer):\n    return 1 / (len(answer) - 2)\n")
    reward = p.load_reward(f"{tmp_path}/r.py:score")
    assert p.reward_of(reward, {"prompt": "?"}, "four") == 0.5
    for answer, words in (("no", "ZeroDivisionError.*'no'.*'prompt'"),):
        with pytest.raises(UserError, match=words):
            p.reward_of(reward, {"prompt": "?"}, answer)
    with pytest.raises(UserError, match="nan"):
        p.reward_of(lambda *_: math.nan, {}, "")
    with pytest.raises(UserError, match="FILE.py:FUNCTION"):
        p.load_reward(f"{tmp_path}/r.py:absent")


# ---- data -----------------------------------------------------------------------------------------------------


def test_held_out_problems_are_in_no_training_data():
    """Of arithmetic, in neither the problems nor the pre-training corpus."""
    for kind in p.PROBLEMS:
        held = {q["prompt"] for q in p.problems(kind, 40, 1, held_out=True)}
        assert len(held) == 40 and not held & {q["prompt"] for q in p.problems(kind, 3000, 2)}
        for problem in p.problems(kind, 50, 3):
            assert p.correct(problem, problem["reply"]) and not p.correct(problem, problem["reply"] + " 707")
    held = {tuple(q["prompt"].split()) for q in p.problems("arithmetic", 300, 1, held_out=True)}
    trained = {tuple(text.split("\n")[0].removeprefix("Question: ").split()) for key, text in d.generated_math(20_000)
               if uniform(key) >= HELD_OUT}
    assert not held & trained


@pytest.mark.parametrize("form, line", [
    ("sft", '{"messages": [{"role": "user"}]}'), ("sft", '{"messages": "hello"}'), ("sft", "{"),
    ("sft", '{"messages": [{"role": "user", "content": "no reply"}]}'), ("dpo", '{"prompt": "a", "chosen": "b"}'),
    ("dpo", '{"prompt": "a", "chosen": "b", "rejected": 3}'), ("grpo", '{"question": "a"}'), ("grpo", "[]")])
def test_malformed_jsonl_names_file_and_line(tmp_path, form, line):
    good = {"sft": {"messages": TALK}, "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"}, "grpo": {"prompt": "a"}}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(good[form]) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl line 3 is not \{") as error:
        p.read_rows(str(file), form)
    assert "\n" not in str(error.value)
    file.write_text(json.dumps(good[form]) + "\n")
    assert len(p.read_rows(str(file), form)) == 1


def test_preferences_with_the_prompt_in_front_of_both_answers():
    """Hugging Face's two forms, explicit and implicit prompt, texts and conversations, are the same."""
    prompt, chosen, rejected = TALK[:1], [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows = [{"prompt": "2 + 3?", "chosen": "a", "rejected": "b"}, {"chosen": prompt + chosen, "rejected": prompt + rejected},
            {"prompt": prompt, "chosen": prompt + chosen, "rejected": rejected}]
    for row in rows:
        assert p.parse_row(row, "dpo") == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny model in `base`, data for each method, and a reward that likes the letter a."""
    monkeypatch.chdir(tmp_path)
    p.write_checkpoint(tiny(TOKENIZER.vocab_size), TOKENIZER, tmp_path / "base", tmp_path)
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
         "grpo": ["--data", "ask.jsonl", "--reward", "r.py:score", "--prompts", "4", "--samples", "4", "--max-tokens", "6",
                  "--steps", "8", "--updates", "2", "--kl", "0.1", "--overlong", "3"]}


def recipe(method: str, *more: str) -> p.PostRecipe:
    return p.parse([method, "base", *FLAGS[method], "--learning-rate", "1e-3", "--warmup-steps", "1", "--device", "cpu",
                    "--dtype", "float32", "--micro-batch", "2", *more])[1]


def state(folder: Path) -> list[torch.Tensor]:
    last = newest_checkpoint(folder)
    trees = [torch.load(last / name, weights_only=True) for name in ("model.pt", "optimizer.pt")]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def logged(folder: Path, key: str) -> list:
    return [e[key] for line in (folder / "log.jsonl").read_text().splitlines() if key in (e := json.loads(line))]


@pytest.mark.parametrize("method", list(FLAGS))
def test_interrupted_and_resumed_equals_straight_bit_for_bit(here, method, monkeypatch):
    """Weights, moments and losses; and the reference is computed once, also where a run is resumed."""
    calls, original = [], p.Preferences.logprobs
    monkeypatch.setattr(p.Preferences, "logprobs", lambda self, pairs, model: (
        calls.append(torch.is_grad_enabled()), original(self, pairs, model))[1])
    p.post_train(recipe(method), Path("runs/straight"), False, train.World())
    straight = calls.count(False)
    count, step = 0, torch.optim.AdamW.step

    def interrupt(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(train.Interrupted, match="python posttrain.py --resume runs/stopped"):
        p.post_train(recipe(method), Path("runs/stopped"), False, train.World())
    calls.clear()
    saved = p.parse(["--resume", "runs/stopped"])[1]
    p.post_train(saved, Path("runs/stopped"), True, train.World())
    assert logged(Path("runs/stopped"), "loss") == logged(Path("runs/straight"), "loss")
    assert all(torch.equal(a, b) for a, b in zip(state(Path("runs/stopped")), state(Path("runs/straight")), strict=True))
    if method == "apo":
        assert 0 < calls.count(False) < straight  # only the held-out pairs, not the reference
        assert logged(Path("runs/straight"), "accuracy")[-1] > 0.8 > 0.2 > logged(Path("runs/straight"), "accuracy")[0]
        assert logged(Path("runs/straight"), "margin")[0] == 0 < logged(Path("runs/straight"), "margin")[-1]
    if method == "grpo":
        assert {"reward", "length", "penalty", "kl"} <= set(json.loads(
            (Path("runs/straight") / "log.jsonl").read_text().splitlines()[1]))


def test_pieces_and_one_big_batch_train_the_same(here):
    for method in FLAGS:
        for size in ("1", "2"):
            p.post_train(replace(recipe(method), micro_batch=int(size)), Path(f"runs/{method}-{size}"), False, train.World())
        one, two = (logged(Path(f"runs/{method}-{size}"), "loss") for size in ("1", "2"))
        assert one[:4] == pytest.approx(two[:4], abs=2e-5)


def test_grpo_learns_what_is_rewarded(here):
    p.post_train(recipe("grpo", "--steps", "30", "--prompts", "8", "--samples", "8", "--kl", "0", "--overlong", "0",
                        "--learning-rate", "5e-3"), Path("runs/a"), False, train.World())
    rewards = logged(Path("runs/a"), "reward")
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2


def grpo_job(here, size: int = 1, rank: int = 0, *more: str) -> p.GRPO:
    chosen = recipe("grpo", "--prompts", "8", *more)
    world = SimpleNamespace(size=size, rank=rank, sum=lambda tensor: tensor, agree=lambda value: value)
    return p.GRPO(chosen, world, SimpleNamespace(device="cpu", dtype=torch.float32), Tokenizer.load("base"))


def test_grpo_draws_every_problem_and_the_same_ones_in_any_number_of_processes(here):
    def drawn(job, step):  # [updates][questions]
        said = []

        def answers(asked, samples, *stop, **options):
            said.append([tuple(ids) for ids in asked])
            return [[[5]] * samples] * len(asked)

        job.answers = answers
        job.roll_out(step)
        half = len(said[0]) // 2
        return [said[0][:half], said[0][half:]]

    one, two = grpo_job(here), [grpo_job(here, 2, rank) for rank in range(2)]
    seen = set()
    for step in range(8):  # 64 prompts of 58 problems
        whole, parts = drawn(one, step), [drawn(job, step) for job in two]
        for update in range(2):
            assert sorted(whole[update]) == sorted(parts[0][update] + parts[1][update])
            seen |= set(whole[update])
    assert len(seen) == len(one.problems)


def test_grpo_leaves_out_prompts_without_room_and_counts_them(here, capsys):
    """An answer that the context cuts short would pass for one that ended itself."""
    job = grpo_job(here)
    kept, ask = job.askable([{"prompt": "short"}, {"prompt": "long " * 30}])
    assert [row["prompt"] for row in kept] == ["short"] and len(ask[0]) + 6 <= 64
    assert "1 of 2 prompts leave fewer than --max-tokens 6" in capsys.readouterr().out
    with pytest.raises(UserError, match="smaller --max-tokens"):
        grpo_job(here, 1, 0, "--max-tokens", "60")


def test_grpo_probabilities_are_those_of_the_policy_that_sampled(here):
    job = grpo_job(here, 1, 0, "--temperature", "0.5")
    model, (ids, mask) = tiny(TOKENIZER.vocab_size), conversations(1)[0]
    job.sampled = [(ids, mask)]
    logprobs = (model(torch.tensor([ids])).detach() / 0.5).log_softmax(-1)[0]
    expected = [float(logprobs[i, ids[i + 1]]) * mask[i + 1] for i in range(len(ids) - 1)]
    torch.testing.assert_close(job.logprobs([0], model)[0], torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_a_change_is_judged_by_the_same_questions(here, capsys):
    """1 of 4 questions turns from wrong to right: 0.25 with a standard error of 0.25, not that of two scores apart."""
    job = grpo_job(here)
    job.model, job.tests = tiny(TOKENIZER.vocab_size), {}
    for step, values in ((0, [1.0, 0, 0, 1]), (9, [1.0, 1, 0, 1])):
        job.scores = lambda step: {"reward": values}
        job.evaluate(step, True)
    assert "before 0.500 ± 0.289   change +0.250 ± 0.250 (+1.0 standard errors)" in capsys.readouterr().out


def test_merge_loads_and_refuses_other_configs(here):
    other = tiny(TOKENIZER.vocab_size)
    p.write_checkpoint(other, TOKENIZER, here / "other", here)
    done = call(p.main, "merge", "base", "other", "--weights", ".9", ".1", "--out", "merged")
    assert done.returncode == 0, done.stderr
    merged, base = from_pretrained("merged"), from_pretrained("base")
    for (name, w), a, b in zip(merged.named_parameters(), base.parameters(), other.parameters()):
        torch.testing.assert_close(w, 0.9 * a + 0.1 * b, msg=name)
    soup = p.merge(["base", "other"], [0.5, 0.5])
    torch.testing.assert_close(soup.model.norm.weight, (base.model.norm.weight + other.model.norm.weight) / 2)
    said = call(sample.main, "merged", "--chat", "--prompt", "hi", "--max-tokens", "3")
    assert said.returncode == 0, said.stderr
    p.post_train(p.parse(["sft", "merged", *FLAGS["sft"], "--device", "cpu"])[1], Path("runs/more"), False, train.World())
    p.write_checkpoint(tiny(TOKENIZER.vocab_size, rope_theta=5e4), TOKENIZER, here / "theta", here)
    with pytest.raises(UserError, match="rope_theta"):
        p.merge(["base", "theta"], [0.5, 0.5])


def test_a_run_from_a_hugging_face_folder_keeps_its_template(here):
    pytest.importorskip("safetensors"), pytest.importorskip("jinja2")
    from checkpoint import save_pretrained
    save_pretrained(from_pretrained("base"), "hf", tokenizer_from="base")
    template = ("{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
                "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    (here / "hf/chat_template.jinja").write_text(template)
    p.post_train(replace(p.parse(["sft", "hf", *FLAGS["sft"], "--device", "cpu"])[1], dtype="float32"), Path("runs/hf-sft"),
                 False, train.World())
    prompter = ChatFormat("runs/hf-sft", Tokenizer.load("runs/hf-sft"))
    assert prompter.template == template and TOKENIZER.control("<|im_end|>") in prompter.stop
    assert prompter.prompt(TALK[:1])[:3] == TOKENIZER.encode("[user]2 +")[:3]
    assert call(sample.main, "runs/hf-sft", "--chat", "--prompt", "hi", "--max-tokens", "3").returncode == 0
    start = p.parse(["grpo", "runs/hf-sft"])[1].start  # the next stage's prompts are the template's too
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
