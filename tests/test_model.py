"""model.py against transformers, against a dense mask, and against itself without the cache."""

import pytest
import torch

from model import (PRESETS, GPT, KVCache, ModelConfig, ModelError, apply_rope, causal_attention, count_parameters,
                   cross_entropy, dense_document_attention, document_attention, rope_frequencies)

PUBLISHED = {"llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400,
             "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
             "qwen3-8b": 8_190_735_360, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
             "smollm3-3b": 3_075_098_624}
ODD = ModelConfig(vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6,
                  num_key_value_heads=3, head_dim=10, max_position_embeddings=64, no_rope_layer_interval=4)
FAMILIES = {
    "llama": (ODD, "LlamaForCausalLM", {"no_rope_layer_interval": 0}),
    "llama3": (ODD, "LlamaForCausalLM", {"no_rope_layer_interval": 0, "rope_llama3_factor": 8.0, "rope_theta": 5e5}),
    "llama-mha-untied": (ODD, "LlamaForCausalLM", {"no_rope_layer_interval": 0, "num_key_value_heads": 6,
                                                    "tie_word_embeddings": False}),
    "llama-mqa": (ODD, "LlamaForCausalLM", {"no_rope_layer_interval": 0, "num_key_value_heads": 1}),
    "qwen3": (ODD, "Qwen3ForCausalLM", {"no_rope_layer_interval": 0, "qk_norm": True}),
    "smollm3": (ODD, "SmolLM3ForCausalLM", {}),
}


def lengths_to_cu(lengths: list[int], size: int) -> torch.Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(size - len(ends))]).int()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert count_parameters(PRESETS[name])["total"] == PUBLISHED[name]


def test_count_is_what_a_model_holds():
    model = GPT(ODD)
    count = count_parameters(ODD)
    assert count["total"] == sum(p.numel() for p in model.parameters())
    used = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert count["matmul"] == used + model.model.embed_tokens.weight.numel()  # tied: the embedding is the head


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family):
    transformers = pytest.importorskip("transformers")
    from dataclasses import replace
    config, architecture, changes = FAMILIES[family]
    config = replace(config, **changes)
    kind = getattr(transformers, architecture)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_llama3_factor:
        rope |= {"rope_type": "llama3", "factor": config.rope_llama3_factor, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = kind(kind.config_class(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings, tie_word_embeddings=config.tie_word_embeddings,
        rms_norm_eps=config.rms_norm_eps, pad_token_id=None, bos_token_id=None, eos_token_id=None)).float()
    for parameter in theirs.parameters():  # norms of one and small weights would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    ours = GPT(config)
    weights = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight" or not config.tie_word_embeddings}
    ours.load_state_dict(weights, strict=True)
    tokens = torch.randint(config.vocab_size, (3, 37))
    out, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(out)
    ours_grads = torch.autograd.grad(out, list(ours.parameters()), grad)
    named = dict(theirs.named_parameters())
    theirs_grads = torch.autograd.grad(expected, [named[n] for n, _ in ours.named_parameters()], grad)
    for (name, _), a, b in zip(ours.named_parameters(), ours_grads, theirs_grads):
        assert (a - b).norm() <= 1e-3 * b.norm(), name


@pytest.mark.parametrize("lengths", [[100, 1, 99, 56], [256], [30] * 8 + [16]])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_document_attention_equals_dense_mask(lengths, kv_heads):
    q = torch.randn(256, 6, 16, requires_grad=True)
    k, v = (torch.randn(256, kv_heads, 16, requires_grad=True) for _ in range(2))
    cu, grad = lengths_to_cu(lengths, 12), torch.randn(256, 6, 16)
    out, expected = document_attention(q, k, v, cu, 256), dense_document_attention(q, k, v, cu, 256)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-4)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_dense_mask_is_causal_attention_per_document():
    """The reference itself, against one call a document."""
    q, k, v = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    out = dense_document_attention(q, k, v, lengths_to_cu([7, 13], 5), 20)
    for part in (slice(0, 7), slice(7, 20)):
        alone = causal_attention(q[None, part], k[None, part], v[None, part])[0]
        torch.testing.assert_close(out[part], alone)


def test_operator_is_well_formed():
    q, k = torch.randn(32, 4, 16, requires_grad=True), torch.randn(32, 2, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.nanoplaybook.document_attention.default, (q, k, k, lengths_to_cu([10, 22], 5), 32),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_editing_one_document_leaves_the_others_bit_for_bit():
    torch.manual_seed(0)
    model = GPT(ODD)
    tokens = torch.randint(61, (2, 32))
    cu = lengths_to_cu([20, 12, 5, 27], 10)
    before = model(tokens, cu)
    tokens[0, :20] = torch.randint(61, (20,))  # document A: row 0, positions 0 to 19
    after = model(tokens, cu)
    assert torch.equal(before[0, 20:], after[0, 20:]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[0, :20], after[0, :20])


def test_document_alone_gives_the_same_logits_as_packed():
    model = GPT(ODD)
    tokens = torch.randint(61, (1, 30))
    packed = model(tokens, lengths_to_cu([18, 12], 5))
    torch.testing.assert_close(packed[:, 18:], model(tokens[:, 18:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_logits_equal_uncached(qk_norm):
    from dataclasses import replace
    torch.manual_seed(0)
    config = replace(ODD, qk_norm=qk_norm)
    model, tokens = GPT(config).eval(), torch.randint(61, (2, 40))
    with torch.inference_mode():
        full = model(tokens)
        cache = KVCache(config, 2, 40)
        parts = [model(tokens[:, :9], cache=cache), model(tokens[:, 9:14], cache=cache)]  # a prompt, and more of it
        parts += [model(tokens[:, i:i + 1], cache=cache) for i in range(14, 40)]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-4)
    with torch.inference_mode():  # a single row takes the matrix-vector route
        one = KVCache(config, 1, 40)
        rows = [model(tokens[:1, i:i + 1], cache=one) for i in range(40)]
    torch.testing.assert_close(torch.cat(rows, 1), full[:1], atol=1e-5, rtol=1e-4)


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
    config = ModelConfig(61, 32, 32, 1, 2, 1, no_rope_layer_interval=1)
    model, tokens = GPT(config), torch.randint(61, (1, 9))
    swapped = tokens[:, [1, 0, 3, 2, 5, 4, 7, 6, 8]]
    torch.testing.assert_close(model(tokens)[:, -1], model(swapped)[:, -1])


def test_cross_entropy_equals_torch_and_skips_padding():
    logits, targets = torch.randn(3, 500, 11), torch.randint(11, (3, 500))
    targets[1, 400:] = -100
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_initialisation_is_normal_with_the_configured_deviation():
    torch.manual_seed(0)
    model = GPT(ModelConfig(initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() - 0.05) < 0.002 and abs(parameter.mean().item()) < 0.002, name
        else:
            assert (parameter == 1).all(), name


def test_compiled_block_is_one_graph_for_every_document_layout():
    pytest.importorskip("torch._inductor")
    import torch._dynamo as dynamo
    import torch._dynamo.testing
    dynamo.reset()
    model = GPT(ODD)
    counter = dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    tokens = torch.randint(61, (2, 32))
    for lengths in ([64], [20, 12, 5, 27], [1, 63], [9] * 7 + [1]):
        cu = lengths_to_cu(lengths, 12)
        torch.testing.assert_close(model(tokens, cu), eager(model, tokens, cu), atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 2  # layers with and without RoPE


def eager(model, tokens, cu):
    with torch._dynamo.config.patch(disable=True):
        return model(tokens, cu)


@pytest.mark.parametrize("wrong, word", [({"num_key_value_heads": 3}, "1, 2, 4"), ({"hidden_size": 130}, "heads"),
                                         ({"head_dim": 7}, "even"), ({"num_attention_heads": 0}, "greater"),
                                         ({"rope_theta": 0.0}, "greater"), ({"no_rope_layer_interval": -1}, "negative")])
def test_impossible_configs_are_a_sentence(wrong, word):
    with pytest.raises(ModelError, match=word):
        ModelConfig(**wrong)


def test_changed_width_changes_the_heads_unless_they_were_given():
    assert ModelConfig(hidden_size=256, num_attention_heads=4).change(hidden_size=512).head_dim == 128
    assert PRESETS["qwen3-0.6b"].change(hidden_size=512).head_dim == 128  # 16 heads of 128 on width 1024: its own
    with pytest.raises(ModelError, match="divide"):
        ModelConfig(hidden_size=256, num_attention_heads=4).change(hidden_size=258)


@pytest.mark.cuda
def test_operator_is_well_formed_on_cuda():
    q, k = (torch.randn(32, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2))
    torch.library.opcheck(torch.ops.nanoplaybook.document_attention.default,
                          (q, k, k, lengths_to_cu([10, 22], 5).cuda(), 32),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


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
    cross_entropy(model(tokens, cu), tokens).backward()
    assert len(list(generate(model.eval(), [1, 2], 20))) == 20


@pytest.mark.cuda
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_document_attention_on_cuda_equals_dense_mask(kv_heads):
    q = torch.randn(256, 6, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(256, kv_heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    cu, grad = lengths_to_cu([100, 1, 99, 56], 12).cuda(), torch.randn_like(q)
    out, expected = document_attention(q, k, v, cu, 256), dense_document_attention(q, k, v, cu, 256)
    assert (out - expected).norm() < 1e-2 * expected.norm()
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)):
        assert (a - b).norm() < 1.5e-2 * b.norm()
