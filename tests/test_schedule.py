"""schedule.py against hand-worked values and torch's optimizer."""

import math

import pytest
import torch

from model import GPT, ModelConfig
from schedule import build_optimizer, cosine, multistep, parameter_groups, rate_share, warmup, wsd


def test_warmup_never_zero_and_ends_at_the_peak():
    assert [warmup(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_wsd_by_hand():
    """10 steps, 2 of warmup, 4 of decay: 1/2 1 | 1 1 1 1 | 3/4 1/2 1/4 0."""
    assert [wsd(s, 10, 2, 4) for s in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [wsd(s, 10, 2, 4, "sqrt") for s in range(6, 10)] == [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]


@pytest.mark.parametrize("decay", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("total, decay_steps", [(7, 2), (1000, 110), (4_720_000, 522_000)])
def test_last_step_has_exactly_the_final_rate(decay, total, decay_steps):
    assert wsd(total - 1, total, 2, decay_steps, decay, 0.1) == pytest.approx(0.1, abs=1e-12)
    assert wsd(total - decay_steps - 1, total, 2, decay_steps, decay, 0.1) == 1  # the last before the decay


def test_cosine_by_hand():
    """Half-way between the end of the warmup and the last step the rate is the mean of peak and final."""
    assert cosine(0, 101, 1, 0.1) == 1
    assert cosine(50, 101, 1, 0.1) == pytest.approx(0.55)
    assert cosine(100, 101, 1, 0.1) == pytest.approx(0.1)


def test_multistep_drops_at_80_and_90_percent():
    shares = [multistep(s, 100, 1) for s in range(100)]
    assert shares[:80] == [1] * 80
    assert shares[80:90] == pytest.approx([0.31623] * 10, abs=1e-5) and shares[90:] == pytest.approx([0.1] * 10)


def test_rate_share_chooses():
    assert rate_share("wsd", 9, 10, 2, 4, "linear", 0.0) == 0
    assert rate_share("cosine", 9, 10, 2, 4, "linear", 0.2) == pytest.approx(0.2)
    assert rate_share("multistep", 9, 10, 2, 4, "linear", 0.0) == pytest.approx(0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_in_one_group_and_the_embedding_undecayed(tied):
    model = GPT(ModelConfig(qk_norm=True, tie_word_embeddings=tied))
    groups = {g["name"]: g for g in parameter_groups(model, 0.1)}
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert [id(p) for p in groups["embedding"]["params"]] == [id(model.model.embed_tokens.weight)]
    assert groups["embedding"]["weight_decay"] == 0 and groups["matrix"]["weight_decay"] == 0.1
    assert groups["gain"]["weight_decay"] == 0.1  # SmolLM3 decays its norms
    assert all(p.ndim == 1 for p in groups["gain"]["params"])


def test_optimizer_step_equals_adamw_by_hand():
    """One step from zero moments: w <- w (1 - lr wd) - lr g / (|g| + eps)."""
    model = GPT(ModelConfig(61, 16, 16, 1, 2, 1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, 0.01, weight_decay=0.5)
    model(torch.randint(61, (2, 8))).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0 if "embed" in name else 0.5
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-5, msg=name)
