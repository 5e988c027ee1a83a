"""evals.py: likelihoods against a loop over single sequences, scores by hand, bad input."""

import json
import math
import random

import numpy as np
import pytest
import torch

import data as d
import evals
from evals import Example, Score, Task
from model import GPT, ModelConfig
from sample import continue_all, generate
from tokenizer import UserError, train_bpe

TEXT = "The quick brown fox jumps over the lazy dog. " * 5
TOKENIZER = train_bpe([TEXT], 290)


def small(**changes) -> GPT:
    torch.manual_seed(1)
    return GPT(ModelConfig(290, 32, 48, 2, 2, 1, max_position_embeddings=64, initializer_range=0.3).change(**changes)).eval()


def alone(model: GPT, before: list[int], after: list[int]) -> tuple[float, bool]:
    """log p(after | before), one token at a time."""
    total, greedy = 0.0, True
    for i, id in enumerate(after):
        with torch.no_grad():
            logits = model(torch.tensor([before + after[:i]]))[0, -1]
        total += logits.log_softmax(-1)[id].item()
        greedy &= logits.argmax().item() == id
    return total, greedy


def ragged(n: int, longest: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(0)
    ids = lambda low, high: [rng.randrange(290) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [(ids(1, longest), ids(1, 6)) for _ in range(n)]


@pytest.mark.parametrize("changes", [{}, {"layer_types": "sliding,full", "sliding_window": 8}, {"position": "learned"}])
def test_packed_likelihoods_equal_one_sequence_at_a_time(changes):
    model, pairs = small(**changes), ragged(40, 50)
    before, _ = pairs[0]
    greedy = [step[0] for step in generate(model, before, 4, temperature=0)]
    pairs.append((before, greedy))  # random continuations are never the likeliest
    found = evals.log_likelihoods(model, pairs)
    for (score, exact), pair in zip(found, pairs):
        expected, likeliest = alone(model, *pair)
        assert abs(score - expected) < 1e-4 and exact == likeliest
    assert found[-1][1] and not found[1][1]


def test_a_likelihood_does_not_depend_on_the_batch(monkeypatch):
    model, pairs = small(), ragged(30, 50)
    together = evals.log_likelihoods(model, pairs)
    monkeypatch.setattr(evals, "LOGITS", 1)  # one row at a time
    for one, other in zip(evals.log_likelihoods(model, pairs[::-1])[::-1], together):
        assert one == pytest.approx(other, rel=1e-5)
    assert evals.log_likelihoods(model, []) == []


def test_what_is_too_long_loses_its_beginning():
    model, ids = small(), [random.Random(3).randrange(290) for _ in range(90)]
    (score, _), = evals.log_likelihoods(model, [(ids[:85], ids[85:])])
    assert score == pytest.approx(alone(model, ids[90 - 65:85], ids[85:])[0], abs=1e-4)
    with pytest.raises(UserError, match="nothing to score"):
        evals.log_likelihoods(model, [([1], [])])


def test_cloze_and_letters_by_hand():
    """The choice with the largest log-likelihood by character, and, shown as letters, the likeliest letter."""
    model, eos = small(), TOKENIZER.eos_id
    examples = [Example(f"The {a}", (b, "lazy dog and fox", "over"), 1) for a in ("quick", "lazy") for b in ("fox", "dog.")]
    scores = evals.evaluate(model, TOKENIZER, [Task("cloze", examples), Task("letters", examples, "letters")])
    right, letters = [], []
    for e in examples:
        sums = [alone(model, [eos, *TOKENIZER.encode(e.context)], TOKENIZER.encode(" " + c))[0] / len(c) for c in e.choices]
        right.append(float(np.argmax(sums) == 1))
        shown = e.context + "".join(f"\n{letter}. {c}" for letter, c in zip("ABC", e.choices)) + "\nAnswer:"
        sums = [alone(model, [eos, *TOKENIZER.encode(shown)], TOKENIZER.encode(" " + letter))[0] for letter in "ABC"]
        letters.append(float(np.argmax(sums) == 1))
    assert scores["cloze"].mean == np.mean(right) and scores["letters"].mean == np.mean(letters)
    assert scores["cloze"].chance == pytest.approx(1 / 3) and scores["cloze"].n == 4
    assert evals.as_letters(Example("Question: Why?\nAnswer:", ("a", "b"), 0)).context == (
        "Question: Why?\nA. a\nB. b\nAnswer:")


def test_standard_errors_by_hand():
    assert Score.of([1, 0, 0, 1])[:3] == pytest.approx((0.5, math.sqrt((4 * 0.25 / 3) / 4), 4))
    assert math.isnan(Score.of([1]).stderr)


def test_batches_of_prompts_of_any_length_equal_one_at_a_time():
    model, rng = small(), random.Random(0)
    prompts = [[rng.randrange(1, 290) for _ in range(rng.choice([2, 3, 5]))] for _ in range(9)]
    made = continue_all(model, prompts, 12, 2, temperature=0, stop=7, at_once=4)
    for prompt, samples in zip(prompts, made):
        expected = [id for (id,) in generate(model, prompt, 12, temperature=0, stop=7)]
        assert samples == [expected, expected]
    drawn = continue_all(model, [[1, 2]] * 4, 12, 3, temperature=1.0, at_once=3)
    assert len({tuple(ids) for samples in drawn for ids in samples}) == 12  # no batch repeats another's draws
    texts = {i: TOKENIZER.decode(samples[0]) for i, samples in enumerate(made)}
    seen = {}
    score = evals.generation_accuracy(model, TOKENIZER, prompts, lambda i, text: seen.setdefault(i, text) == text and i % 2,
                                      12, stop=[7])
    assert seen == texts and score.mean == pytest.approx(4 / 9) and score.n == 9
