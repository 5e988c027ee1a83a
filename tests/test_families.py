"""Hugging Face folders in and out against transformers (4.57 or 5): tiny random models of every family, odd sizes,
longer than windows, chunks and trained contexts."""

import json
import shutil

import pytest
import torch

import checkpoint
from checkpoint import (
    config_from_hugging_face,
    config_to_hugging_face,
    from_pretrained,
    load_config,
    save_pretrained,
    their_tensors,
)
from conftest import call
from model import GPT, KVCache, ModelConfig, PRESETS, count_parameters
from tokenizer import ChatFormat, Tokenizer, UserError, train_bpe

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BASE = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def rope(theta=1e4, **scaling):
    """The arguments of a config class in both versions."""
    if transformers.__version__ >= "5":
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}
    share = scaling.pop("partial_rotary_factor", None)
    return {"rope_theta": theta, "rope_scaling": scaling or None} | ({"partial_rotary_factor": share} if share else {})


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=1.0)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LATENT = dict(
    num_key_value_heads=6,
    kv_lora_rank=20,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=12,
    moe_intermediate_size=20,
    first_k_dense_replace=1,
    num_experts_per_tok=3,
)
SLIDING = dict(
    use_sliding_window=True,
    sliding_window=7,
    max_window_layers=0,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
MODELS = {  # name: (class, its config)
    "llama": ("Llama", dict(head_dim=10)),
    "llama-mha-tied": ("Llama", dict(num_key_value_heads=6, tie_word_embeddings=True)),
    "llama-mqa-biased": ("Llama", dict(head_dim=10, num_key_value_heads=1, attention_bias=True)),
    "llama3": ("Llama", dict(head_dim=10, **rope(5e5, **LLAMA3))),
    "llama-yarn": ("Llama", dict(head_dim=10, **rope(5e5, **YARN))),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2)),
    "mistral": ("Mistral", dict(head_dim=10, sliding_window=None)),
    "mistral-window": ("Mistral", dict(head_dim=10, sliding_window=7)),
    "qwen3": ("Qwen3", dict(head_dim=10, **rope(1e6))),
    "qwen3-sliding": ("Qwen3", dict(head_dim=10, **SLIDING)),
    "smollm3": ("SmolLM3", dict(tie_word_embeddings=True, **rope(5e6))),
    "smollm3-sliding": ("SmolLM3", SLIDING),
    "olmo2": ("Olmo2", rope(5e5)),
    "mixtral": ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=None)),
    "mixtral-window": ("Mixtral", dict(head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=7)),
    "qwen3-moe": (
        "Qwen3Moe",
        dict(head_dim=10, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True),
    ),
    "gpt-oss": (
        "GptOss",
        dict(
            head_dim=10,
            sliding_window=7,
            num_local_experts=5,
            num_experts_per_tok=2,
            **rope(150_000.0, **YARN, truncate=False),
        ),
    ),
    "deepseek-v2": (
        "DeepseekV2",
        LATENT
        | dict(q_lora_rank=None, n_routed_experts=6, n_shared_experts=2, topk_method="greedy", norm_topk_prob=False),
    ),
    "moonlight": (
        "DeepseekV3",
        LATENT
        | dict(
            q_lora_rank=None,
            n_routed_experts=6,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.446,
        ),
    ),
    "deepseek-v3": (
        "DeepseekV3",
        LATENT
        | dict(
            q_lora_rank=14,
            attention_bias=True,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            **rope(**YARN, mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    "qwen3-next": (
        "Qwen3Next",
        dict(
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=20,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=12,
            linear_value_head_dim=10,
            **rope(partial_rotary_factor=0.25),
        ),
    ),
}
LENGTH = {"qwen3-next": 130}  # more than two of the delta rule's chunks


def make(kind, changes, folder, std=0.2, **options):
    """A random model of transformers, written as it writes it."""
    torch.manual_seed(1)
    architecture = getattr(transformers, kind + "ForCausalLM")
    theirs = architecture(architecture.config_class(**(BASE | rope() | changes))).float()
    for part, parameter in theirs.named_parameters():  # norms of one and small weights would hide mistakes
        if "A_log" not in part:
            torch.nn.init.normal_(parameter, std=std)
    for buffer in (b for part, b in theirs.named_buffers() if "correction_bias" in part):
        torch.nn.init.normal_(buffer, std=0.1)
    theirs.save_pretrained(folder, **options)
    return architecture.from_pretrained(folder).float().eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(name, their model, ours loaded from the folder that they wrote, the folder)."""
    name, (kind, changes) = request.param, MODELS[request.param]
    theirs = make(kind, changes, folder := tmp_path_factory.mktemp(name), max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return name, theirs, from_pretrained(folder).eval(), folder


def test_logits_equal_transformers(pair):
    name, theirs, ours, _ = pair
    tokens = torch.randint(61, (3, LENGTH.get(name, 37)))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_gradients_equal_transformers(pair):
    name, theirs, ours, _ = pair
    tokens = torch.randint(61, (2, LENGTH.get(name, 37)))
    grad = torch.randn(*tokens.shape, 61)
    ours.zero_grad(), theirs.zero_grad()
    ours(tokens).backward(grad)
    theirs(tokens).logits.backward(grad)
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    for part, parameter in ours.named_parameters():
        if name == "qwen2" and part.endswith("o_proj.bias"):
            continue
        if part in expected and expected[part].shape == parameter.shape and name != "gpt-oss":
            found = {part: parameter.grad}
        else:  # experts, whose form in memory is not that in the file, and other names
            found = their_tensors({part: parameter.grad}, ours.config, theirs.config.model_type)
        for n, g in found.items():
            g = g.flatten(-2) if "gate_up" in n and name == "gpt-oss" else g
            assert (g - expected[n]).norm() <= 1e-3 * expected[n].norm(), n
            del expected[n]
    assert not expected


def test_32_greedy_tokens_equal_transformers(pair):
    from sample import generate

    name, theirs, ours, _ = pair
    prompt = torch.randint(61, (1, 9))
    with torch.no_grad():
        expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False, use_cache=True)[0, 9:].tolist()
    assert [ids[0] for ids in generate(ours, prompt[0].tolist(), 32, temperature=0)] == expected


def test_export_loads_in_transformers_and_comes_back(pair, tmp_path):
    """transformers' own loader is the judge: it must find every tensor and give the logits of the model before."""
    name, theirs, ours, _ = pair
    assert "loads it" in save_pretrained(ours, tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(61, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(again.float().eval()(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    back = from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values()))
    assert back.config == ours.config


def test_exports_carry_both_versions_rope_fields(pair, tmp_path):
    """transformers 4 reads the fields at the top, 5 rope_parameters; without the first, 4 computes with theta 10000."""
    _, theirs, ours, _ = pair
    hf = config_to_hugging_face(ours.config)
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == ours.config.rope_theta
    assert (hf["rope_scaling"] is None) == (ours.config.position == "rope")
    for lost in ("rope_parameters", "rope_scaling"):
        if lost == "rope_parameters" or ours.config.position == "rope":
            assert config_from_hugging_face({k: v for k, v in hf.items() if k != lost}) == load_config_of(hf)


def load_config_of(hf):
    return config_from_hugging_face(json.loads(json.dumps(hf)))


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "laptop"])
def test_presets_count_what_transformers_counts(name):
    hf = config_to_hugging_face(PRESETS[name])
    kind = getattr(transformers, hf["architectures"][0])
    with torch.device("meta"):
        theirs = kind(kind.config_class(**{k: v for k, v in hf.items() if k not in ("model_type", "architectures")}))
    assert count_parameters(PRESETS[name])["total"] == sum(p.numel() for p in theirs.parameters())
    untrained = dict(initializer_range=0.02, router_aux_loss_coef=0.0, router_bias_update_rate=0.0)
    untrained["shared_expert_intermediate_size"] = 0  # that of n_shared_experts
    assert load_config_of(hf).change(**untrained) == PRESETS[name].change(**untrained)


def test_sandwich_norms_are_gemma_2s():
    """Its weights load by their names; what else Gemma 2 does (a larger embedding, GELU, soft caps) is switched off."""
    torch.manual_seed(1)
    sizes = {name: size for name, size in BASE.items() if not name.endswith("_id")} | {"head_dim": 8}
    theirs = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        **sizes, hidden_activation="silu", query_pre_attn_scalar=8, attn_logit_softcapping=None,
        final_logit_softcapping=None, layer_types=["full_attention"] * 4)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = GPT(ModelConfig(**sizes, norm_position="sandwich", norm_zero_centered=True)).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(61, (2, 30))
    with torch.no_grad():
        ours.model.embed_tokens.weight *= 48**0.5
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_deepseek_exports_name_the_router():
    """Without these two, llama.cpp takes softmax."""
    hf = config_to_hugging_face(PRESETS["moonlight-16b-a3b"])
    assert hf["scoring_func"] == "sigmoid" and hf["topk_method"] == "noaux_tc"


TINY = ModelConfig(61, 32, 24, 2, 2, 1)
WINDOW = {"layer_types": "sliding,full", "sliding_window": 8}
OLMO2 = {"norm_position": "post", "qk_norm": True, "qk_norm_across_heads": True}


@pytest.mark.parametrize(
    "change, family",
    [
        ({}, "llama"),
        ({"num_experts": 8}, "mixtral"),
        ({"num_experts": 8, "qk_norm": True}, "qwen3_moe"),
        (WINDOW, "smollm3"),
        (WINDOW | {"qk_norm": True}, "qwen3"),
        (WINDOW | {"layer_types": "sliding"}, "mistral"),
        (WINDOW | {"layer_types": "sliding", "num_experts": 4}, "mixtral"),
        (WINDOW | {"attention_bias": True}, "smollm3"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "llama"),
        ({"hidden_act": "relu2", "num_experts": 4}, "mixtral"),
        ({"no_rope_layer_interval": 2, "tie_word_embeddings": False}, "smollm3"),
        ({"attention_bias": True}, "llama"),
        (OLMO2, "olmo2"),
    ],
)
def test_shapes_that_train_py_makes_are_exported(change, family, tmp_path):
    model = GPT(TINY.change(num_hidden_layers=4, initializer_range=0.2, **change))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    assert "loads it" in save_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == family
    back = from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "change, word",
    [
        ({"layer_types": "chunked,full", "attention_chunk_size": 8}, "layer_types"),
        ({"position": "alibi"}, "alibi"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_output_gate": True}, "attn_output_gate"),
        ({"num_experts": 4, "n_shared_experts": 1}, "n_shared_experts"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"norm_position": "post", "num_experts": 4}, "norm_position"),
        ({"norm_position": "sandwich"}, "norm_position"),
        ({"num_experts": 4, "layer_types": "sliding,full", "sliding_window": 8}, "layer_types"),
    ],
)
def test_what_no_family_has_is_not_exported(change, word, tmp_path):
    with pytest.raises(UserError, match=word):
        save_pretrained(GPT(TINY.change(**change)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    right = config_to_hugging_face
    monkeypatch.setattr(
        checkpoint,
        "config_to_hugging_face",
        lambda config: (
            right(config) | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 7.0}
        ),
    )
    for experts in (0, 4):
        model = GPT(TINY.change(initializer_range=0.3, num_experts=experts))
        with pytest.raises(UserError, match="other logits"):
            save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="already there"):
        save_pretrained(model, tmp_path / "there")


@pytest.mark.parametrize("experts", [0, 4])
def test_a_router_that_ties_is_no_fault(tmp_path, experts):
    """Rounding chooses between experts that tie, and one such token changes the rest of its row: of a mixture of
    experts one row has to agree, of a dense model all."""
    model = GPT(TINY.change(num_experts=experts, initializer_range=0.3))

    def flip(module, inputs, output):
        output[0, 5] += 1.0

    model.model.layers[0].mlp.register_forward_hook(flip)
    if experts:
        assert "loads it" in save_pretrained(model, tmp_path / "out")
    else:
        with pytest.raises(UserError, match="other logits"):
            save_pretrained(model, tmp_path / "out")


# ---- folders that are not as they should be ----------------------------------------------------------------------


def write(folder, tensors, config=TINY, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hugging_face(config) | changes))
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder


def weights_of(config=TINY):
    return {k: v.clone() for k, v in GPT(config).state_dict().items()}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"model_type": "mamba"}, "mamba is not one of llama"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"num_attention_heads": None}, "num_attention"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"model_type": "deepseek_v3"}, "lacks num_experts_per_tok"),
        ({"mlp_bias": True}, "lacks model.layers.0.mlp.down_proj.bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale_all_dim": 1.0}}, "mscale = 0"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method = gptq"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method = mxfp4"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size = "),
        ({"vocab_size": 2**31}, "more than its files hold|cannot be read|is not between"),
        ({"num_attention_heads": 10**9}, "num_attention_heads 1000000000 is not between"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not between"),
        ({"hidden_size": "32"}, "cannot be read|hidden_size"),
        ({"rope_parameters": [1]}, "cannot be read"),
        ({"model_type": ["llama"]}, "cannot be read"),
    ],
)
def test_what_is_not_supported_is_named(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as error:
        from_pretrained(write(tmp_path, weights_of(), **change))
    assert "\n" not in str(error.value)


def test_fp8_blocks_load(tmp_path):
    weights = weights_of(wide := TINY.change(hidden_size=160, vocab_size=300))
    name, scales = "model.layers.0.mlp.up_proj.weight", torch.tensor([[0.5, 2.0]])
    packed = weights[name].to(torch.float8_e4m3fn)
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = write(tmp_path, weights | {name: packed, name + "_scale_inv": scales}, wide, quantization_config=quantized)
    expected = packed.float() * torch.cat((torch.full((128,), 0.5), torch.full((32,), 2.0)))
    assert torch.equal(from_pretrained(folder).state_dict()[name], expected)


def test_qwen3_next_folders(tmp_path):
    kind, changes = MODELS["qwen3-next"]
    theirs, tokens = make(kind, changes | {"shared_expert_intermediate_size": 30}, tmp_path / "wide"), torch.arange(40)
    with torch.no_grad():
        ours = from_pretrained(tmp_path / "wide")(tokens[None])
        torch.testing.assert_close(ours, theirs(tokens[None]).logits, atol=1e-4, rtol=1e-4)
    make(kind, changes | {"layer_types": ["linear_attention", "full_attention"] * 2}, tmp_path / "half")
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert load_config(tmp_path / "half").layer_types == "linear,full"
    del config["layer_types"]
    (tmp_path / "half/config.json").write_text(json.dumps(config | {"full_attention_interval": 2}))
    with pytest.raises(UserError, match="full_attention_interval = 2"):
        from_pretrained(tmp_path / "half")


def test_smollm3_slides_where_its_layer_types_say_so(tmp_path):
    theirs = make("SmolLM3", SLIDING | {"use_sliding_window": False}, tmp_path)
    tokens = torch.randint(61, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": None, "use_sliding_window": True}))
    with pytest.raises(UserError, match="use_sliding_window = True"):
        load_config(tmp_path)


def test_wrong_tensors_are_named(tmp_path):
    weights = weights_of()
    lost = {k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}
    for tensors, sentence in (
        (lost, "lacks model.layers.1.mlp.up_proj.weight"),
        (weights | {"model.extra.weight": torch.ones(2)}, "asks for no model.extra.weight"),
        (weights | {"model.norm.weight": torch.ones(33)}, r"model.norm.weight of \[33\]"),
        (weights | {"model.norm.weight": torch.ones(32).int()}, "model.norm.weight .*int32"),
    ):
        with pytest.raises(UserError, match=sentence):
            from_pretrained(write(tmp_path, tensors))
    torn = write(tmp_path, weights) / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        from_pretrained(tmp_path)
    torn.unlink()
    with pytest.raises(UserError, match="more weights than its .safetensors"):
        from_pretrained(tmp_path)


def test_a_tied_head_and_foreign_extras_in_the_file_are_skipped(tmp_path):
    weights = weights_of()
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.2.mlp.up_proj.weight": torch.ones(3),
    }
    loaded = from_pretrained(write(tmp_path, weights | extra, num_nextn_predict_layers=1)).state_dict()
    with pytest.raises(UserError, match="layers.2"):  # a config that is shorter than the model
        from_pretrained(write(tmp_path, weights | extra))
    with pytest.raises(UserError, match="lm_head"):
        from_pretrained(write(tmp_path, weights | {"lm_head.weight": torch.ones(61, 32)}))
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_which_files_the_weights_come_from(tmp_path):
    """The index decides tensor by tensor; what disagrees is refused; adapters and Mistral's own file lie beside."""
    weights = weights_of()
    names, other = sorted(weights), {name: w + 1 for name, w in weights.items()}
    folder = write(tmp_path / "both", weights)
    for beside in ("adapter_model", "consolidated"):
        safetensors.save_file(other, folder / f"{beside}.safetensors")
    assert torch.equal(from_pretrained(folder).state_dict()[names[0]], weights[names[0]])
    safetensors.save_file(other, folder / "optimizer_copy.safetensors")
    with pytest.raises(UserError, match="tensors of the same name"):
        from_pretrained(folder)
    (folder / "optimizer_copy.safetensors").unlink()

    folder = write(tmp_path / "index", weights)
    (folder / "model.safetensors").unlink()
    safetensors.save_file(weights, folder / "a.safetensors")
    safetensors.save_file(other, folder / "b.safetensors")
    chosen = {name: "ab"[number % 2] for number, name in enumerate(names)}
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in chosen.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], (weights if file == "a" else other)[name]) for name, file in chosen.items())
    safetensors.save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors and an index"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "index",
    [
        b"\xff",
        b"[]",
        b"{",
        b'{"weight_map": 3}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"model.norm.weight": "../../etc/passwd"}}',
        b'{"weight_map": {"model.norm.weight": "none.safetensors"}}',
        b'{"weight_map": {}}',
    ],
)
def test_a_damaged_index_is_one_sentence(index, tmp_path):
    write(tmp_path, weights_of())
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UserError) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_configs_and_weights_are_one_sentence(tmp_path):
    """A value of another type, or an absurd one, in every field; a flipped byte in the header of the weights."""
    config = ModelConfig(61, 32, 24, 2, 2, 1, num_experts=4, qk_norm=True)
    write(tmp_path, their_tensors(weights_of(config), config, "qwen3_moe") | {}, config)
    good, header = json.loads((tmp_path / "config.json").read_text()), (tmp_path / "model.safetensors").read_bytes()

    def attempt():
        try:
            from_pretrained(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)

    for name in good:
        for value in (None, -1, 0, 3, 10**12, 2.5, "x", [], {}, [0], True, 1e300):
            (tmp_path / "config.json").write_text(json.dumps(good | {name: value}))
            attempt()
    (tmp_path / "config.json").write_text(json.dumps(good))
    for place in range(0, 3000, 29):
        (tmp_path / "model.safetensors").write_bytes(header[:place] + bytes([header[place] ^ 5]) + header[place + 1 :])
        attempt()


def test_gpt_oss_four_bit_weights_unpack_as_in_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(256, (3, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 6, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    ours = checkpoint._mxfp4(blocks, scales)
    assert ours.shape == (3, 64, 6)
    torch.testing.assert_close(ours, expected if expected.shape == ours.shape else expected.transpose(1, 2))


def test_loading_in_bf16_keeps_what_chooses_experts(pair):
    name, _, ours, folder = pair
    half = from_pretrained(folder, torch.bfloat16)
    for part, tensor in half.state_dict().items():
        exact = part.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16)
        assert torch.equal(tensor, ours.state_dict()[part].to(tensor.dtype))
    half.compute_dtype = torch.bfloat16
    assert torch.isfinite(half(torch.randint(61, (2, 20)))).all()


def test_the_latent_cache_is_small():
    config = ModelConfig(61, 32, 24, 1, 4, 4, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    cache = KVCache(64)
    GPT(config).eval()(torch.randint(61, (2, 5)), cache=cache)
    assert sum(x[0, 0].numel() for x in cache.layers[0]) == 12 + 4  # MHA would hold 4 heads x (12 + 8)


# ---- tokenizers and chats ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a run's tokenizer, its folder, the exported folder)."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train_bpe(["the cat sat on the mat, and the dog sat on the cat"] * 3, 275)
    tokenizer.save(folder / "run")
    model = GPT(TINY.change(vocab_size=tokenizer.vocab_size))
    assert "loads it" in save_pretrained(model, folder / "out", tokenizer_from=folder / "run")
    return tokenizer, folder / "run", folder / "out"


def test_export_of_a_run_opens_chats_and_stops_as_the_run(exported):
    """The ids of transformers and of our own reader of the exported folder are those of the run."""
    tokenizer, run, out = exported
    theirs, messages = transformers.AutoTokenizer.from_pretrained(out), [{"role": "user", "content": "the cat?"}]
    ours, again = ChatFormat(run, tokenizer), ChatFormat(out, Tokenizer.load(out))
    assert theirs("the mat")["input_ids"] == again.text("the mat") == ours.text("the mat")
    assert ours.text("the mat")[0] == tokenizer.eos_id
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat == again.prompt(messages) == ours.prompt(messages)
    assert theirs.eos_token_id == tokenizer.eos_id and ours.stop == again.stop
    assert set(json.loads((out / "generation_config.json").read_text())["eos_token_id"]) == ours.stop


def test_an_export_whose_ids_differ_is_refused(exported, tmp_path, monkeypatch):
    tokenizer, run, _ = exported
    monkeypatch.setattr(checkpoint, "CHAT_TEMPLATE", checkpoint.CHAT_TEMPLATE.replace("assistant", "helper"))
    with pytest.raises(UserError, match="reads the ids"):
        save_pretrained(GPT(TINY.change(vocab_size=tokenizer.vocab_size)), tmp_path / "out", tokenizer_from=run)


def test_the_trained_end_of_a_turn_joins_the_stops(exported, tmp_path):
    """A base model's files end texts only; what is trained from it with its template ends turns too. Its opening token
    stays, although the tokenizer.json that we write has no post-processor."""
    tokenizer, _, out = exported
    base = tmp_path / "base"
    shutil.copytree(out, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_id}))
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run")
    checkpoint.copy_chat_format(base, tmp_path / "run", tokenizer)
    chat = ChatFormat(tmp_path / "run", tokenizer)
    assert chat.stop == {tokenizer.eos_id, tokenizer.control("<|im_end|>")} and chat.opening == [tokenizer.eos_id]
    save_pretrained(from_pretrained(out), tmp_path / "out", tokenizer_from=tmp_path / "run")
    assert ChatFormat(tmp_path / "out", tokenizer).stop == chat.stop
    checkpoint.copy_chat_format(tmp_path / "run", tmp_path / "out", tokenizer)  # twice changes nothing
    assert ChatFormat(tmp_path / "out", tokenizer).stop == chat.stop


def test_a_tuned_base_without_a_template_is_exported_with_the_one_it_was_tuned_in(exported, tmp_path):
    tokenizer, run, out = exported
    shutil.copytree(out, tmp_path / "base")
    settings = json.loads((out / "tokenizer_config.json").read_text()) | {"chat_template": None}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(settings))
    save_pretrained(from_pretrained(out), tmp_path / "out", tokenizer_from=tmp_path / "base")
    theirs, messages = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), [{"role": "user", "content": "a?"}]
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat == ChatFormat(run, tokenizer).prompt(messages)


def test_more_tokens_than_embedding_rows(exported, tmp_path):
    tokenizer, run, _ = exported
    short = TINY.change(vocab_size=tokenizer.vocab_size - 2)
    write(tmp_path, weights_of(short), short)
    shutil.copy(run / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=f"more tokens than the model has embedding rows, {tokenizer.vocab_size - 2}"):
        from_pretrained(tmp_path)


def test_sample_chats_with_a_hugging_face_folder(exported):
    import sample

    for flags in (["--chat", "--prompt", "the cat?"], ["--prompt", "the"]):
        done = call(sample.main, exported[2], "--max-tokens", "8", *flags)
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_command_exports_a_run(exported, tmp_path):
    tokenizer, run, out = exported
    checkpoint.save_weights(from_pretrained(out), tokenizer, tmp_path / "checkpoints/step-00000003", run)
    done = call(checkpoint.main, "export", tmp_path / "checkpoints/step-00000003", tmp_path / "out")
    assert done.returncode == 0 and "loads it" in done.stdout, done.stderr
    assert call(checkpoint.main, "export").returncode == 2
