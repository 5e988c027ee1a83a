"""sample.py: filters by hand, batches, streaming, bad input."""

import pytest
import torch

import sample
from conftest import call
from model import GPT, ModelConfig
from sample import filter_logits, generate

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def kept(**options) -> list[int]:
    return torch.isfinite(filter_logits(LOGITS, **options))[0].nonzero().flatten().tolist()


def test_filters_by_hand():
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.5) == [0] and kept(top_p=0.51) == [0, 1] and kept(top_p=1e-9) == [0]
    assert kept(min_p=0.25) == [0, 1, 2] and kept(min_p=1.0) == [0]
    torch.testing.assert_close(filter_logits(LOGITS, temperature=0.5).softmax(-1), (LOGITS * 2).softmax(-1))


def test_filters_work_row_by_row():
    logits = torch.tensor([[0.0, 5.0, 1.0], [5.0, 1.0, 0.0]])
    assert torch.isfinite(filter_logits(logits, top_p=0.5)).tolist() == [[False, True, False], [True, False, False]]


def test_greedy_equals_the_uncached_argmax():
    model, ids = GPT(ModelConfig(61, 32, 32, 2, 2, 1)).eval(), [3, 4, 5]
    made = [step[0] for step in generate(model, ids, 20, temperature=0)]
    for id in made:
        assert id == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = [*ids, id]


def test_seed_decides_and_samples_differ():
    model = GPT(ModelConfig(61, 32, 32, 2, 2, 1)).eval()
    a, b = (list(generate(model, [1], 10, 3, seed=7)) for _ in range(2))
    assert a == b and a != list(generate(model, [1], 10, 3, seed=8))
    assert len({tuple(sample) for sample in zip(*a)}) == 3


def test_samples_follow_the_probabilities():
    """2000 first tokens against softmax of the logits: chi-squared under its 99.9 % quantile for 60 degrees."""
    model = GPT(ModelConfig(61, 32, 32, 2, 2, 1, initializer_range=0.2)).eval()
    drawn = torch.tensor(next(generate(model, [1, 2], 1, 2000, temperature=1.0)))
    expected = 2000 * model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
    observed = torch.bincount(drawn, minlength=61)
    assert ((observed - expected) ** 2 / expected).sum() < 99.6


def test_a_sample_ends_at_stop_and_the_others_go_on():
    model = GPT(ModelConfig(5, 32, 32, 2, 2, 1)).eval()
    steps = list(generate(model, [1], 40, 4, stop=0, temperature=1.0))
    for drawn in zip(*steps):
        ended = drawn.index(None) if None in drawn else len(drawn)
        assert 0 not in drawn and all(id is None for id in drawn[ended:])
    assert all(any(id is not None for id in step) for step in steps)


def test_padded_rows_of_the_vocabulary_are_never_drawn():
    model = GPT(ModelConfig(61, 32, 32, 2, 2, 1)).eval()
    assert max(id for step in generate(model, [1], 20, 8, vocab_size=5) for id in step) < 5


@pytest.mark.parametrize("flags, words", [([], "python train.py"), (["runs/none"], "does not exist"),
                                          (["--top-p", "7"], "--top-p 7.0")])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    done = call(sample.main, *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
