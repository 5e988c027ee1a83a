"""model.py against brute force, hand-worked cases, and itself without cache, packing and compilation."""

import argparse
import inspect
import math
import re
from dataclasses import fields

import pytest
import torch

import model as model_
from model import (
    ACTIVATIONS,
    GPT,
    KVCache,
    Linear,
    MoE,
    ModelConfig,
    PRESETS,
    alibi,
    apply_rope,
    attention_extremes,
    cache_bytes,
    count_parameters,
    dense_attention,
    distance_bucket,
    distances,
    document_attention,
    document_positions,
    dual_chunk_attention,
    gated_delta_rule,
    rope_frequencies,
    losses_and_slope,
    visible_keys,
    rope_reach,
    watch_attention,
)
from conftest import call
from tokenizer import UserError

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm3-3b": 3_075_098_624,
}
NON_EMBEDDING = {
    "llama-2-7b": 6.476,
    "llama-3.1-8b": 6.980,
    "llama-3.2-1b": 0.973,
    "qwen3-0.6b": 0.440,
    "qwen3-4b": 3.634,
    "smollm3-3b": 2.812,
}  # billions
PUBLISHED_BILLIONS = {
    "gpt-oss-20b": (20.915, 3.61),
    "qwen3-next-80b-a3b": (79.67, 3.88),
    "moonlight-16b-a3b": (15.96, 2.24),
    "kimi-k2": (1026, 32.9),
}  # total, active as published: see the test
ODD = ModelConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    max_position_embeddings=64,
    no_rope_layer_interval=4,
)
PLAIN = ODD.change(no_rope_layer_interval=0)
LATENT = {"kv_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10}
VARIANTS = {  # windows, chunks and trained contexts shorter than the sequences of the tests
    "gqa-rnope": ODD,
    "mha": PLAIN.change(num_key_value_heads=6),
    "mqa": PLAIN.change(num_key_value_heads=1),
    "qk-norm": PLAIN.change(qk_norm=True),
    "post-norm": PLAIN.change(norm_position="post", qk_norm=True, qk_norm_across_heads=True, attn_output_gate=True),
    "sandwich": PLAIN.change(norm_position="sandwich"),
    "nope": PLAIN.change(position="none"),
    "sliding-3:1": PLAIN.change(layer_types="sliding,sliding,sliding,full", sliding_window=5),
    "sliding-1": PLAIN.change(layer_types="sliding", sliding_window=1),
    "llama-4": ODD.change(layer_types="chunked,chunked,chunked,full", attention_chunk_size=7),
    "sinks": PLAIN.change(layer_types="sliding,full", sliding_window=6, attention_sinks=True, attention_bias=True),
    "gated": PLAIN.change(attn_output_gate=True, head_dim=12, partial_rotary_factor=0.5),
    "mla": PLAIN.change(**LATENT),
    "mla-queries": PLAIN.change(**LATENT, q_lora_rank=9),
    "learned": PLAIN.change(position="learned"),
    "relative": PLAIN.change(position="relative"),
    "alibi": PLAIN.change(position="alibi", layer_types="sliding,full", sliding_window=9),
    "alibi-chunked": PLAIN.change(position="alibi", layer_types="chunked,full", attention_chunk_size=9),
    "llama3": PLAIN.change(position="llama3", rope_factor=8.0, original_max_position_embeddings=32),
    "yarn": PLAIN.change(position="yarn", rope_factor=4.0, original_max_position_embeddings=16),
    "dual-chunk": PLAIN.change(position="dual_chunk", original_max_position_embeddings=12),
    "deltanet": PLAIN.change(layer_types="linear,linear,linear,full", linear_num_key_heads=2, linear_num_value_heads=4),
    "soft-cap": PLAIN.change(final_logit_softcapping=2.0),
    "moe": PLAIN.change(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1),
    "moe-sigmoid": PLAIN.change(
        num_experts=6,
        num_experts_per_tok=3,
        scoring_func="sigmoid",
        first_k_dense_replace=2,
        n_group=3,
        topk_group=2,
        moe_intermediate_size=20,
        swiglu_limit=7.0,
        mlp_bias=True,
    ),
}


def build(config: ModelConfig) -> GPT:
    """A model in evaluation whose sinks, biases and gains are no zeros and ones, which would hide mistakes."""
    torch.manual_seed(0)
    model = GPT(config.change(initializer_range=0.15)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def lengths_to_cu(lengths: list[int], size: int) -> torch.Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(size - len(ends))]).int()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    count = count_parameters(PRESETS[name])
    assert count["total"] == count["active"] == PUBLISHED[name]
    if name in NON_EMBEDDING:
        assert count["non_embedding"] / 1e9 == pytest.approx(NON_EMBEDDING[name], abs=6e-4)


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_mixtures_count_what_was_published(name):
    """Active parameters are published with both embeddings, with the output one, or with none."""
    count, (total, active) = count_parameters(PRESETS[name]), PUBLISHED_BILLIONS[name]
    less = {"gpt-oss-20b": count["embedding"] / 2, "moonlight-16b-a3b": count["embedding"]}.get(name, 0)
    assert count["total"] / 1e9 == pytest.approx(total, rel=5e-4)
    assert (count["active"] - less) / 1e9 == pytest.approx(active, rel=2e-3)


def test_active_parameters_are_those_that_get_a_gradient_from_one_token():
    model = GPT(VARIANTS["moe"].change(tie_word_embeddings=False))
    model(torch.tensor([[3]])).sum().backward()
    used = 0
    for name, parameter in model.named_parameters():
        parts = parameter.grad if "experts." in name and parameter.ndim == 3 else [parameter.grad]
        used += sum(part.numel() for part in parts if part.any() or "experts" not in name)
    assert count_parameters(model.config)["active"] == used


def test_count_is_what_a_model_holds():
    model = GPT(ODD)
    count = count_parameters(ODD)
    assert count["total"] == sum(p.numel() for p in model.parameters())
    used = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert count["matmul"] == used + model.model.embed_tokens.weight.numel()  # tied: the embedding is the head


def brute_force_attention(q, k, v, lengths, window=0, sink=None):
    """One query at a time, in double precision."""
    out, start = [], 0
    ratio = q.shape[1] // k.shape[1]
    for length in lengths:
        for i in range(start, start + length):
            first = max(start, i - window + 1) if window else start
            for h in range(q.shape[1]):
                scores = k[first : i + 1, h // ratio] @ q[i, h] / q.shape[-1] ** 0.5
                if sink is not None:
                    scores = torch.cat((scores, sink[h : h + 1]))
                out.append(scores.softmax(0)[: i + 1 - first] @ v[first : i + 1, h // ratio])
        start += length
    return torch.stack(out).view_as(q)


def dense_document_attention(q, k, v, cu_seqlens, max_length, window=0, sink=None):
    """`document_attention` by its definition, where all documents stand in one row."""
    visible = visible_keys(
        distances(max_length, max_length, q.device), document_positions(cu_seqlens, max_length)[None], window
    )
    return dense_attention(q[None], k[None], v[None], visible, sink=sink)[0]


def test_the_mask_by_brute_force():
    lengths, window, chunk = [9, 1, 20], 6, 4
    document = [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    positions = document_positions(lengths_to_cu(lengths, 6), 30)
    assert positions.tolist() == [i for _, i in document]
    for w, c in ((0, 0), (window, 0), (0, chunk), (1, 0)):
        seen = visible_keys(distances(30, 30, "cpu"), positions[None], w, c)[0, 0]
        for i, (d, at) in enumerate(document):
            for j, (e, key) in enumerate(document):
                inside = (not w or i - j < w) and (not c or at // c == key // c)
                assert seen[i, j] == (d == e and j <= i and inside)


def test_the_definition_with_a_sink_of_no_weight_is_the_fused_kernel():
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 5)
    visible = visible_keys(distances(9, 12, "cpu"), torch.arange(3, 12)[None], 6)
    bias = torch.randn(4, 9, 12)
    torch.testing.assert_close(
        dense_attention(q, k, v, visible, bias, torch.full((4,), -torch.inf)), dense_attention(q, k, v, visible, bias)
    )


@pytest.mark.parametrize("kernel", [document_attention, dense_document_attention])
@pytest.mark.parametrize("window, sinks", [(0, False), (0, True), (1, False), (3, True), (40, False)])
def test_attention_equals_brute_force(kernel, window, sinks):
    lengths = [9, 1, 20]
    q, k, v = torch.randn(30, 4, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    sink = torch.randn(4) if sinks else None
    inputs = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
    out = kernel(q, k, v, lengths_to_cu(lengths, 6), 30, window, sink)
    double = [x.detach().double().requires_grad_() for x in inputs]
    expected = brute_force_attention(*double[:3], lengths, window, *double[3:])
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-4)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, double, grad.double())):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[300, 1, 199, 12], [512], [30] * 16 + [32]])
@pytest.mark.parametrize("window, sinks", [(0, False), (0, True), (50, False), (129, True)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_document_attention_equals_dense_mask(lengths, window, sinks, kv_heads):
    q = torch.randn(512, 6, 16, requires_grad=True)
    k, v = (torch.randn(512, kv_heads, 16, requires_grad=True) for _ in range(2))
    sink = torch.randn(6, requires_grad=True) if sinks else None
    cu, grad, inputs = (
        lengths_to_cu(lengths, 20),
        torch.randn(512, 6, 16),
        [x for x in (q, k, v, sink) if x is not None],
    )
    out, expected = (f(q, k, v, cu, 512, window, sink) for f in (document_attention, dense_document_attention))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-4)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("sinks", [False, True])
def test_operator_is_well_formed(sinks):
    q, k = torch.randn(32, 4, 16, requires_grad=True), torch.randn(32, 2, 16, requires_grad=True)
    torch.library.opcheck(
        torch.ops.nanoplaybook.document_attention.default,
        (q, k, k, lengths_to_cu([10, 22], 5), 32, 4, torch.randn(4, requires_grad=True) if sinks else None),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_editing_one_document_leaves_the_others(name):
    """Bit for bit; where experts share a matrix product the number of its rows changes, and so does the rounding."""
    model, tokens = build(VARIANTS[name]), torch.randint(61, (2, 32))
    cu = lengths_to_cu([20, 12, 5, 27], 10)
    before = model(tokens, cu)
    tokens[0, :20] = torch.randint(61, (20,))  # document A: row 0, positions 0 to 19
    after = model(tokens, cu)
    equal = torch.equal if "moe" not in name else lambda a, b: torch.allclose(a, b, atol=1e-5)
    assert equal(before[0, 20:], after[0, 20:]) and equal(before[1], after[1])
    assert not torch.allclose(before[0, :20], after[0, :20], atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_document_alone_gives_the_same_logits_as_packed(name):
    model, tokens = build(VARIANTS[name]), torch.randint(61, (2, 40))
    packed = model(tokens, lengths_to_cu([18, 22, 40], 6))
    torch.testing.assert_close(packed[:1, 18:], model(tokens[:1, 18:]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[1:], model(tokens[1:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_equal_uncached(name):
    model, tokens = build(VARIANTS[name]), torch.randint(61, (2, 40))
    with torch.inference_mode():
        full, cache = model(tokens), KVCache(64)
        parts = [model(tokens[:, :9], cache=cache), model(tokens[:, 9:14], cache=cache)]  # a prompt, and more of it
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(14, 40)]
        assert cache.length == 40
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-4)
        one = KVCache(64)
        rows = [model(tokens[:1, i : i + 1], cache=one) for i in range(40)]
    torch.testing.assert_close(torch.cat(rows, 1), full[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, seen", [("sliding-3:1", 5), ("llama-4", 7)])
def test_how_far_a_layer_sees(name, seen):
    """One layer, brute force: which inputs move the last logits."""
    model = build(VARIANTS[name].change(num_hidden_layers=1))
    tokens = torch.randint(1, 61, (1, 20))  # chunks of 7: the last token, 19, shares its chunk with 14 to 18
    before = model(tokens)[0, -1]
    moved = []
    for i in range(20):
        other = tokens.clone()
        other[0, i] = 0
        moved.append(not torch.allclose(model(other)[0, -1], before, atol=1e-6))
    first = 20 - seen if "sliding" in name else 14
    assert moved == [i >= first for i in range(20)]
    cache = KVCache(64)
    model(tokens, cache=cache)
    assert cache.layers[0][0].shape[1] == seen - 1  # no more is kept than a later token can see


def test_rope_turns_pair_zero_fastest_and_depends_on_distance_alone():
    frequencies = rope_frequencies(ModelConfig(head_dim=64))
    assert frequencies[0] == 1.0 and (frequencies.diff() < 0).all()
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(i, j):
        angle = torch.tensor([i, j])[:, None] * frequencies
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        return (apply_rope(q, cos[0], sin[0]) * apply_rope(k, cos[1], sin[1])).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(score(7, 3), score(8, 3))


def test_nope_layers_ignore_the_order_of_earlier_tokens():
    tokens = torch.randint(61, (1, 9))
    swapped = tokens[:, [1, 0, 3, 2, 5, 4, 7, 6, 8]]
    for how in ({"no_rope_layer_interval": 1}, {"position": "none"}, {}):
        model = GPT(ModelConfig(61, 32, 32, 1, 2, 1, **how))
        assert torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-6) == bool(how)


def test_alibi_by_hand():
    bias = alibi(8, distances(3, 3, "cpu"))
    assert torch.equal(bias[0, 2], torch.tensor([-1.0, -0.5, 0.0]))  # head 1 of 8 loses 1/2 a token
    assert bias[7, 2, 0] == -2 / 256


def test_relative_buckets_are_those_of_t5():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(300)
    expected = t5.T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=32, max_distance=128
    )
    assert torch.equal(distance_bucket(distance), expected)


def test_dual_chunk_distances_by_hand():
    """Trained context 8, so chunks of 6: with scores that tell the distance, every query must see DCA's."""
    frequency = torch.tensor([0.05])  # one pair: q . k = cos(distance * frequency), one to one below 60
    place, T = torch.arange(20), 20
    q = torch.tensor([1.0, 0.0]).expand(1, T, 1, 2)
    angles = (place % 6)[:, None, None] * frequency
    k = apply_rope(q, angles.cos(), angles.sin())
    v = torch.eye(T).view(1, T, 1, T)
    p = dual_chunk_attention(q, k, v, place[None], frequency, 8)[0, :, 0]  # [T, T] probabilities
    for i in range(T):
        same = [
            i - j if j // 6 == i // 6 else min(6 + i % 6, 7) - j % 6 if j // 6 == i // 6 - 1 else 7 - j % 6
            for j in range(i + 1)
        ]
        assert max(same) <= 7  # never farther than in training
        expected = (torch.tensor(same) * frequency).cos().div(2**0.5).softmax(0)
        torch.testing.assert_close(p[i, : i + 1], expected)


def test_dual_chunk_is_plain_rope_within_its_first_chunk():
    config = PLAIN.change(position="dual_chunk", original_max_position_embeddings=32)
    dual, plain = build(config), build(PLAIN)
    tokens = torch.randint(61, (2, 40))
    torch.testing.assert_close(dual(tokens[:, :24]), plain(tokens[:, :24]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dual(tokens), plain(tokens), atol=1e-3)


def delta_rule_token_by_token(q, k, v, decay, beta, state):
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("lengths", [[200], [1, 63, 70, 66], [64, 136], [3] * 66 + [2]])
def test_gated_delta_rule_equals_the_recurrence(lengths):
    B, T, H = 2, 200, 3
    q, k, v = (
        torch.randn(B, T, H, 8),
        torch.nn.functional.normalize(torch.randn(B, T, H, 8), dim=-1),
        torch.randn(B, T, H, 5),
    )
    decay, beta = -torch.rand(B, T, H), torch.rand(B, T, H)
    state = torch.randn(B, H, 8, 5)
    starts = torch.tensor([0, *lengths]).cumsum(0)[1:-1]
    decay[:, starts] = -1e4  # all but the first document find an empty state
    out, last = gated_delta_rule(q, k, v, decay, beta, state)
    expected, expected_last = delta_rule_token_by_token(*(x.double() for x in (q, k, v, decay, beta, state)))
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, expected_last.float(), atol=1e-5, rtol=1e-4)
    if len(starts):  # exactly: what came before may be anything
        first = int(starts[0])
        assert torch.equal(gated_delta_rule(q, k, v, decay, beta, state * 7)[0][:, first:], out[:, first:])


def moe_one_token_at_a_time(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    config, experts, out = moe.gate.config, moe.experts, []
    for row in x.flatten(0, 1):
        scores = (moe.gate.weight @ row).softmax(0)
        y = 0
        for e in (scores + moe.gate.e_score_correction_bias).topk(config.num_experts_per_tok).indices:
            gate, up = (experts.gate_up_proj[e] @ row).chunk(2)
            chosen = (scores + moe.gate.e_score_correction_bias).topk(config.num_experts_per_tok).indices
            y = y + scores[e] / scores[chosen].sum() * (experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("width", [12, 13])  # 13: not what grouped_mm takes
def test_moe_equals_one_token_at_a_time(width):
    moe = MoE(ModelConfig(61, 16, 24, 1, 2, 1, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=width))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.gate.e_score_correction_bias[2] = -9.0  # an expert without tokens
    moe.gate.e_score_correction_bias[5] = 9.0  # and one that has them all
    x = torch.randn(2, 9, 16, requires_grad=True)
    out, expected = moe(x), moe_one_token_at_a_time(moe, x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    inputs, grad = [x, *moe.parameters()], torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert moe.routing[1].tolist()[2] == 0 and moe.routing[1].tolist()[5] == 18


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_mlps_and_experts(name):
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu2": lambda x: x.clamp(min=0) ** 2}[
        name
    ]
    config, x = PLAIN.change(hidden_act=name), torch.randn(3, 48)
    mlp = build(config).model.layers[0].mlp
    torch.testing.assert_close(mlp(x), mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x)))
    moe = build(config.change(num_experts=1, num_experts_per_tok=1)).model.layers[0].mlp  # one expert: an MLP
    gate, up = (moe.experts.gate_up_proj[0] @ x.t()).chunk(2)
    torch.testing.assert_close(moe(x[None])[0], (moe.experts.down_proj[0] @ (act(gate) * up)).t(), atol=1e-5, rtol=1e-4)


def test_expert_biases_equal_a_look_up():
    model = build(VARIANTS["moe"].change(mlp_bias=True))
    moe, x = model.model.layers[0].mlp, torch.randn(1, 9, 48)
    weights, index, _, _ = moe.gate(x[0])
    with torch.no_grad():
        before = moe(x)
        moe.experts.down_proj_bias += 1.5
        moved = weights.sum(1, keepdim=True) * 1.5
        torch.testing.assert_close(moe(x) - before, moved.expand(1, 9, 48), atol=1e-5, rtol=1e-4)
        moe.experts.down_proj_bias[index[3, 0]] += 1.0
        torch.testing.assert_close((moe(x) - before - moved)[0, 3], weights[3, 0].expand(48), atol=1e-5, rtol=1e-4)


def test_routing_loss_by_hand_and_over_micro_batches():
    config = ModelConfig(
        61, 16, 24, 1, 2, 1, num_experts=4, num_experts_per_tok=1, router_aux_loss_coef=0.5, router_z_loss_coef=2.0
    )
    model = GPT(config)
    moe = model.model.layers[0].mlp
    uniform = torch.full((4,), 0.25)
    moe.routing = uniform, torch.tensor([3.0, 0, 0, 0]), torch.tensor(0.1)
    assert model.routing_loss().item() == pytest.approx(0.5 * 1 + 2.0 * 0.1)  # even scores: 1, however uneven the load
    moe.routing = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.0, 3, 0, 0]), torch.tensor(0.0)
    # the micro-batches together: half of the tokens to expert 0, half to expert 1
    assert model.routing_loss().item() == pytest.approx(0.5 * 4 * (0.5 * 0.7 + 0.5 * 0.1))
    assert model.balance_experts() == [2.0] and moe.load is None
    assert build(PLAIN).train().routing_loss() == 0


def test_bias_update_moves_towards_even_load():
    model = GPT(ModelConfig(61, 16, 24, 1, 2, 1, num_experts=4, num_experts_per_tok=1, router_bias_update_rate=0.01))
    moe = model.model.layers[0].mlp
    moe.routing = torch.full((4,), 0.25), torch.tensor([5.0, 2.0, 1.0, 0.0]), torch.tensor(0.0)
    model.routing_loss(), model.balance_experts()
    torch.testing.assert_close(moe.gate.e_score_correction_bias, torch.tensor([-0.01, 0, 0.01, 0.01]))


BALANCE = {
    "loss": {"router_aux_loss_coef": 0.02},
    "bias": {"scoring_func": "sigmoid", "router_bias_update_rate": 0.02},
    "off": {},
}


def test_balancing_keeps_experts_in_use_and_without_it_they_collapse():
    """A short real training: bytes of a module, 8 experts, two a token. The mean of the last steps counts."""
    text, threads = torch.tensor(list(inspect.getsource(argparse).encode())), torch.get_num_threads()
    torch.set_num_threads(1)  # such small products only wait for each other
    worst = {}
    for name, how in BALANCE.items():
        torch.manual_seed(0)
        model = GPT(
            ModelConfig(
                256,
                32,
                64,
                2,
                2,
                1,
                num_experts=8,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                **{"router_aux_loss_coef": 0.0} | how,
            )
        )
        optimizer, uneven = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for step in range(350):
            rows = torch.randint(len(text) - 65, (8,))[:, None] + torch.arange(65)
            loss = model(text[rows[:, :-1]], targets=text[rows[:, 1:]])[0] / 512 + model.routing_loss()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            uneven.append(max(model.balance_experts()))
        worst[name] = sum(uneven[-50:]) / 50
    torch.set_num_threads(threads)
    assert worst["loss"] < 2 and worst["bias"] < 2 and worst["off"] > 3, worst


def plain_loss(model, tokens, targets, z):
    """Nats plus z log(Z)^2 of whole logits, by torch's own functions."""
    logits = model(tokens).flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counts = targets.flatten() >= 0
    nats = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return (nats + z * logits.logsumexp(-1).square() * counts).sum(), nats.view_as(targets)


@pytest.mark.parametrize("cap, z, tied", [(0.0, 0.0, True), (2.0, 1e-3, True), (0.0, 1e-2, False), (2.0, 0.0, False)])
def test_loss_and_gradients_equal_the_plain_ones(cap, z, tied):
    """600 tokens: a whole piece and a ragged one, a fifth of which do not count. In bf16 they are no
    further from the same model in fp64 than the plain ones are."""
    config = PLAIN.change(final_logit_softcapping=cap, tie_word_embeddings=tied)
    tokens, targets = torch.randint(61, (12, 50)), torch.randint(61, (12, 50))
    targets[torch.rand(12, 50) < 0.2] = -100

    def found(loss, dtype):
        model = build(config).to(torch.float64 if dtype == torch.float64 else torch.float32)
        model.compute_dtype = dtype
        minimised, nats = loss(model)
        (minimised / 480).backward()
        return [minimised.detach(), nats.detach(), *(p.grad for p in model.parameters())]

    def fused(model):
        minimised, nats = model(tokens, targets=targets, z_loss=z)
        assert nats.dtype == torch.float32 and not nats.requires_grad
        return minimised, nats

    def plain(model):
        return plain_loss(model, tokens, targets, z)

    def distances(values):
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(values, exact)]

    exact = found(plain, torch.float64)
    assert max(distances(found(fused, torch.float32))) < 1e-5
    ours, theirs = (distances(found(loss, torch.bfloat16)) for loss in (fused, plain))
    assert sum(ours) < 1.03 * sum(theirs), (ours, theirs)


def test_loss_of_a_hopeless_token_by_hand():
    """Logits 200, 0, 0: where fp32 has no probability left, the loss is 200 nats, and its z-loss 200^2."""
    model = build(PLAIN)
    model.model.norm.forward = lambda x: torch.zeros_like(x).index_fill(-1, torch.tensor([0]), 1.0)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()[3, 0] = 200.0
    tokens, targets = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[3, 5, -100]])
    minimised, nats = model(tokens, targets=targets, z_loss=0.5)
    torch.testing.assert_close(nats, torch.tensor([[0.0, 200.0, 0.0]]))
    assert minimised.item() == pytest.approx(200 + 0.5 * 2 * 200**2)
    minimised.backward()
    grad = model.model.embed_tokens.weight.grad[:, 0]
    assert grad[3].item() == pytest.approx(1 + 2 * 200) and grad[5].item() == -1  # p + 2 z log(Z) p, p - 1


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made(temperature):
    """Losses with gradients, by sum or one by one, and without, of 2,048 tokens: at most one piece of logits at a time,
    or the head's own gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(out):
                if torch.is_tensor(value):
                    self.most = max(self.most, value.numel())
            return out

    model = build(PLAIN.change(vocab_size=6000, final_logit_softcapping=9.0))
    tokens = torch.randint(6000, (8, 256))
    with Largest() as seen:
        minimised, nats = model(tokens, targets=tokens, z_loss=1e-4, temperature=temperature)
        (minimised if temperature is None else nats[0].sum()).backward()
        with torch.no_grad():
            model(tokens, targets=tokens)
    assert seen.most == 512 * 6000


def test_gradients_of_single_losses_at_a_temperature():
    """What DPO and GRPO weigh, against whole logits divided by the temperature, soft-cap included."""
    model = build(PLAIN.change(final_logit_softcapping=2.0))
    tokens, weights = torch.randint(61, (4, 150)), torch.randn(4, 150)
    targets = torch.where(torch.rand(4, 150) < 0.3, -100, tokens)
    logits = model(tokens).transpose(1, 2) / 0.7
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    _, found = model(tokens, targets=targets, temperature=0.7)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), parameters) for x in (found, expected))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_compiled_loss_stores_no_logits_in_fp32():
    """Inductor's program for a piece has two large buffers, bf16 logits and their gradient, and computes the same."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    x, weight, targets = torch.randn(64, 16).bfloat16(), torch.randn(700, 16).bfloat16(), torch.randint(700, (64,))
    compiled = torch.compile(losses_and_slope, dynamic=False)
    found, (code,) = run_and_get_code(compiled, x, weight, targets, 0.0, 1e-4)
    for a, b in zip(found, losses_and_slope(x, weight, targets, 0.0, 1e-4)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2e-2)
    assert re.findall(r"empty_strided_cpu\(\(64, 700\), .*?, torch\.(\w+)\)", code) == 2 * ["bfloat16"]


def test_soft_cap_by_hand():
    model = build(PLAIN.change(final_logit_softcapping=2.0))
    plain = build(PLAIN)(tokens := torch.randint(61, (1, 5)))
    torch.testing.assert_close(model(tokens), 2 * (plain / 2).tanh())


@pytest.mark.parametrize("given, deviation", [(0.05, 0.05), (0.02, 0.02), (0.0, 1 / 16)])  # 0: SmolLM2's, 1/sqrt(256)
def test_initialisation_is_normal_with_the_configured_deviation(given, deviation):
    torch.manual_seed(0)
    model = GPT(ModelConfig(initializer_range=given))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() - deviation) < 0.002 and abs(parameter.mean().item()) < 0.002, name
        else:
            assert (parameter == 1).all(), name


def test_scaled_initialisation_by_hand():
    """GPT-2: with 2 layers, four matrices write to the residual stream, each at half the deviation."""
    config = ModelConfig(64, 256, 256, 2, 2, 1, initializer_range=0.08, initializer="scaled")
    for more in ({}, {"num_experts": 2}, {"layer_types": "linear"}):
        for name, parameter in GPT(config.change(**more)).named_parameters():
            if parameter.ndim >= 2 and "conv1d" not in name:
                writes = any(part in name for part in ("self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj",
                                                       "experts.down_proj"))
                assert parameter.std().item() == pytest.approx(0.04 if writes else 0.08, rel=0.1), name


def test_float16_on_a_cpu_rounds_what_float32_computes():
    """Values against torch's own float16, and gradients that are too small for it: they are gone."""
    x, layer = torch.randn(8, 16).half().requires_grad_(), Linear(16, 4, True)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight.half(), layer.bias.half()))
    y.backward(torch.full_like(y, 1e-4))
    assert x.grad.dtype == torch.float16 and layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()
    layer.zero_grad()
    (1e-9 * layer(x).float()).sum().backward()
    assert not layer.weight.grad.any()


COMPILED = {
    "dense": (PLAIN, 1),
    "rnope": (ODD, 2),
    "sliding-sinks": (VARIANTS["sinks"], 2),
    "chunked": (VARIANTS["llama-4"], 2),
    "moe": (PLAIN.change(num_experts=4, moe_intermediate_size=16, mlp_bias=True), 1),
    "mla": (VARIANTS["mla"], 1),
    "deltanet": (VARIANTS["deltanet"], 1),
}  # kinds of layers with a graph; a linear layer has none


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_are_one_graph_for_every_document_layout(name):
    """Whatever the documents and their number; without gradients or with a cache blocks are not compiled."""
    import torch._dynamo as dynamo
    import torch._dynamo.testing

    dynamo.reset()
    config, kinds = COMPILED[name]
    model = GPT(config)
    model.compute_dtype = torch.bfloat16  # compiled grouped_mm knows no fp32
    counter = dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=counter)
    tokens = torch.randint(61, (2, 32))
    with torch.no_grad():
        for length in (5, 6, 7):
            model(tokens[:, :length]), model(tokens[:, :length], cache=KVCache(64))
    model(tokens[:, :3], cache=KVCache(64))
    with watch_attention():
        model(tokens)
    assert counter.frame_count == 0
    for lengths in ([64], [20, 12, 5, 27], [1, 63], [9] * 7 + [1], [4] * 16):
        cu = lengths_to_cu(lengths, len(lengths) + 1)
        out = model(tokens, cu)
        torch.testing.assert_close(out, eager(model, tokens, cu), atol=2e-2, rtol=2e-2)
        (out.float().square().mean() + model.routing_loss()).backward()
    assert counter.frame_count == kinds  # one for each kind of layer
    assert not config.num_experts or model.balance_experts()
    model.compiled = False
    model(tokens[:, :11]).sum().backward()
    assert counter.frame_count == kinds


@pytest.mark.parametrize("name", ["dense", "sliding-sinks"])
def test_compiled_gradients_equal_eager_ones(name):
    import torch._dynamo as dynamo

    dynamo.reset()
    model, tokens = build(COMPILED[name][0]), torch.randint(61, (2, 32))
    model.compile_blocks(backend="aot_eager")
    for lengths in ([20, 12, 32], [9, 9, 9, 5, 32]):
        cu = lengths_to_cu(lengths, len(lengths) + 1)
        found = torch.autograd.grad(model(tokens, cu).square().mean(), list(model.parameters()))
        expected = torch.autograd.grad(eager(model, tokens, cu).square().mean(), list(model.parameters()))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def eager(model, tokens, cu):
    with torch._dynamo.config.patch(disable=True):
        return model(tokens, cu)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"num_key_value_heads": 3}, "1, 2, 4"),
        ({"hidden_size": 130}, "heads"),
        ({"head_dim": 7}, "pairs"),
        ({"num_attention_heads": 0}, "between 1"),
        ({"rope_theta": 0.0}, "between 2"),
        ({"no_rope_layer_interval": -1}, "between 0"),
        ({"layer_types": "full,slide"}, "sliding"),
        ({"layer_types": "sliding"}, "sliding_window"),
        ({"layer_types": "chunked"}, "attention_chunk_size"),
        ({"position": "rotary"}, "alibi"),
        ({"kv_lora_rank": 8}, "qk_nope_head_dim"),
        ({"kv_lora_rank": 8, "qk_norm": True}, "without sinks"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "choose from"),
        ({"scoring_func": "tanh"}, "sigmoid"),
        ({"num_experts": 6, "n_group": 4}, "n_group"),
        ({"hidden_act": "swish"}, "relu2"),
        ({"swiglu_limit": 7.0, "hidden_act": "gelu"}, "silu"),
        ({"position": "dual_chunk", "attention_sinks": True}, "sinks"),
        ({"yarn_mscale_all_dim": 1.0}, "MLA"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"num_attention_heads": 2**31, "head_dim": 8}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": float("nan")}, "type"),
        ({"rms_norm_eps": float("nan")}, "between"),
        ({"vocab_size": "61"}, "type"),
        ({"qk_norm": 1}, "type"),
        ({"qk_norm_across_heads": True}, "qk_norm true"),
        ({"norm_position": "after"}, "pre, post"),
    ],
)
def test_impossible_configs_are_a_sentence(wrong, word):
    with pytest.raises(UserError, match=word):
        ModelConfig(**wrong)


def test_every_field_is_an_option_whose_default_is_allowed():
    for field in fields(ModelConfig):
        assert field.metadata["help"] and (field.type in (bool, str) or field.metadata["high"] < 1e13), field.name


def test_changed_width_changes_the_heads_unless_they_were_given():
    assert ModelConfig(hidden_size=256, num_attention_heads=4).change(hidden_size=512).head_dim == 128
    assert PRESETS["qwen3-0.6b"].change(hidden_size=512).head_dim == 128  # 16 heads of 128 on width 1024: its own
    moe = ModelConfig(num_experts=8)
    assert (moe.moe_intermediate_size, moe.change(intermediate_size=400).moe_intermediate_size) == (384, 200)
    assert (
        ModelConfig(num_experts=8, moe_intermediate_size=30).change(intermediate_size=400).moe_intermediate_size == 30
    )
    with pytest.raises(UserError, match="divide"):
        ModelConfig(hidden_size=256, num_attention_heads=4).change(hidden_size=258)


@pytest.mark.cuda
def test_operator_is_well_formed_on_cuda():
    q, k = (torch.randn(32, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2))
    torch.library.opcheck(
        torch.ops.nanoplaybook.document_attention.default,
        (q, k, k, lengths_to_cu([10, 22], 5).cuda(), 32, 4, torch.randn(4, device="cuda", requires_grad=True)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_and_sampling_on_cuda(dtype):
    from sample import generate

    model = GPT(ModelConfig(64, 128, 256, 12, 2, 1, max_position_embeddings=32)).cuda()
    model.compute_dtype = dtype
    tokens, cu = torch.randint(64, (2, 32), device="cuda"), lengths_to_cu([20, 12, 5, 27], 10).cuda()
    expected = model(tokens, cu)
    model.compile_blocks()
    torch.testing.assert_close(model(tokens, cu), expected, atol=2e-2, rtol=2e-2)
    model(tokens, cu, targets=tokens)[0].backward()
    assert len(list(generate(model.eval(), [1, 2], 20))) == 20


@pytest.mark.cuda
@pytest.mark.parametrize("window, sinks", [(0, False), (0, True), (50, True)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_document_attention_on_cuda_equals_dense_mask(kv_heads, window, sinks):
    q = torch.randn(256, 6, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(256, kv_heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    sink = torch.randn(6, device="cuda", requires_grad=True) if sinks else None
    cu, grad, inputs = (
        lengths_to_cu([100, 1, 99, 56], 12).cuda(),
        torch.randn_like(q),
        [x for x in (q, k, v, sink) if x is not None],
    )
    out, expected = (f(q, k, v, cu, 256, window, sink) for f in (document_attention, dense_document_attention))
    assert (out - expected).norm() < 1e-2 * expected.norm()
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        assert (a - b).norm() < 1.5e-2 * b.norm()


def test_attention_extremes_by_brute_force():
    q, k = torch.randn(1, 24, 4, 8), torch.randn(1, 24, 2, 8)
    positions, window = torch.cat((torch.arange(10), torch.arange(14)))[None], 6
    scores, entropies, first = [], torch.zeros(4, 24), []
    for head in range(4):
        for at in range(24):
            start = 0 if at < 10 else 10
            begin = max(start, at - window + 1)
            row = q[0, at, head] @ k[0, begin : at + 1, head // 2].T / 8**0.5
            scores.append(float(row.max()))
            entropies[head, at] = torch.distributions.Categorical(logits=row).entropy()
            if begin == start < at:
                first.append(float(row.softmax(0)[0]))
    mean = entropies.mean(1)
    expected = torch.tensor([max(scores), mean.min(), mean.max(), sum(first) / len(first)])
    torch.testing.assert_close(attention_extremes(q, k, positions, window, 0), expected)


def test_a_sink_is_seen():
    """A first key that every query likes best by 20 takes all; of keys that are alike each takes an equal share."""
    k = torch.zeros(1, 5, 2, 4)
    q, positions = torch.ones(1, 5, 2, 4), torch.arange(5)[None]
    assert attention_extremes(q, k, positions, 0, 0)[3] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    k[:, 0] = 10.0
    assert attention_extremes(q, k, positions, 0, 0)[3] == pytest.approx(1)
    assert attention_extremes(q, k, positions, 1, 0)[3].isnan()  # a window of one token sees no first one


@pytest.mark.parametrize("name", ["gqa-rnope", "llama-4", "mla", "relative"])
def test_watching_attention_sees_every_softmax_layer(name):
    model, tokens = build(VARIANTS[name]), torch.randint(61, (2, 32))
    with watch_attention() as (extremes, _):
        model(tokens, lengths_to_cu([20, 12, 32], 8))
    assert len(extremes) == 4
    assert all(0 <= low <= high < 3.5 and 0 <= first <= 1 for _, low, high, first in extremes)  # 3.5: ln 32
    model(tokens)
    assert len(extremes) == 4


@pytest.mark.parametrize("name", ["mha", "gqa-rnope", "mqa", "mla", "sliding-3:1", "sliding-1", "llama-4", "deltanet"])
@pytest.mark.parametrize("length", [3, 40])
def test_cache_bytes_are_those_of_a_cache(name, length):
    model, cache = build(VARIANTS[name]), KVCache(length)
    model.compute_dtype = torch.bfloat16
    with torch.inference_mode():
        model(torch.randint(61, (1, length)), cache=cache)
    assert cache_bytes(model.config, length) == sum(x.nbytes for layer in cache.layers.values() for x in layer)


@pytest.mark.parametrize(
    "name, numbers",  # per token, as the playbook counts: MHA 2 h L dh, GQA 2 g L dh, MLA 4.5 L dh
    [
        ("llama-2-7b", 2 * 32 * 32 * 128),
        ("smollm3-3b", 2 * 4 * 36 * 128),
        ("moonlight-16b-a3b", 4.5 * 27 * 128),
        ("gpt-oss-20b", 2 * 8 * 12 * 64),  # half of the layers see 128 tokens
        ("qwen3-next-80b-a3b", 2 * 2 * 12 * 256),
    ],
)
def test_cache_bytes_by_hand(name, numbers):
    assert cache_bytes(PRESETS[name], 5001) - cache_bytes(PRESETS[name], 5000) == 2 * numbers


def test_the_base_of_rope_bounds_the_context():
    """By brute force, and SmolLM3's three bases, each of which reaches the context that it was taken for."""
    config, m = ModelConfig(head_dim=10, rope_theta=300.0), 0
    while sum(math.cos(m * 300.0 ** (-2 * i / 10)) for i in range(5)) >= 0:
        m += 1
    assert rope_reach(config) == m > 5
    for base, context in ((5e4, 4096), (2e6, 32768), (5e6, 65536)):
        assert context <= rope_reach(ModelConfig(head_dim=128, rope_theta=base)) < 1.5 * context
    assert rope_reach(ModelConfig(head_dim=128, rope_theta=1e12)) == 2**18  # as far as it looks


def test_the_command_prints_every_preset_with_published_sizes():
    """Sparsity as the playbook's table counts it, shared experts among all and active ones; granularity by its formula
    (its text has 0.5 for gpt-oss)."""
    rows = {}
    for line in call(model_.main).stdout.splitlines():
        assert len(line) <= 120
        if line and line.split()[0] in PRESETS:
            rows.setdefault(line.split()[0], []).append(line.split()[1:])
    assert rows.keys() == PRESETS.keys() and all(len(pair) == 2 for pair in rows.values())
    assert rows["moonlight-16b-a3b"][0] == "15,960,108,544 15,289,019,904 2,914,774,528 2,243,685,888 4.2%".split()
    assert rows["llama-2-7b"][1] == ["4,096", "512.0", "2,048.0", "10,000", "1,707"]
    assert rows["gpt-oss-20b"][1][-2:] == ["2.0", "8.0"] and rows["kimi-k2"][1][-1] == "42.8"
    assert rows["qwen3-next-80b-a3b"][1][-1] == "46.6"
