"""Weights in and out of model.py against transformers: tiny random models of every family, odd sizes, longer than
windows, chunks and trained contexts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as model_
from checkpoint import FAMILIES, config_from_hugging_face, config_to_hugging_face, from_pretrained, save_pretrained
from model import GPT, KVCache, ModelConfig, PRESETS, count_parameters
from tokenizer import UserError


transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BASE = dict(vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
            pad_token_id=None, bos_token_id=None, eos_token_id=None)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 1.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 32}
LATENT = dict(num_key_value_heads=6, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=12,
              moe_intermediate_size=20, first_k_dense_replace=1, num_experts_per_tok=3)
MODELS = {  # name: (class, its config)
    "llama": ("Llama", dict(head_dim=10, rope_parameters=ROPE)),
    "llama-mha-tied": ("Llama", dict(num_key_value_heads=6, rope_parameters=ROPE, tie_word_embeddings=True)),
    "llama-mqa-biased": ("Llama", dict(head_dim=10, num_key_value_heads=1, rope_parameters=ROPE, attention_bias=True)),
    "llama3": ("Llama", dict(head_dim=10, rope_parameters=LLAMA3)),
    "llama-yarn": ("Llama", dict(head_dim=10, rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=10, rope_parameters=ROPE | {"rope_theta": 1e6})),
    "smollm3": ("SmolLM3", dict(head_dim=10, rope_parameters=ROPE, tie_word_embeddings=True)),
    "gpt-oss": ("GptOss", dict(head_dim=10, sliding_window=7, num_local_experts=5, num_experts_per_tok=2,
                               rope_parameters=YARN | {"truncate": False})),
    "moonlight": ("DeepseekV3", LATENT | dict(q_lora_rank=None, n_routed_experts=6, n_shared_experts=2, n_group=1,
                                              topk_group=1, routed_scaling_factor=2.446, rope_parameters=ROPE)),
    "deepseek-v3": ("DeepseekV3", LATENT | dict(q_lora_rank=14, n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2,
                                                rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})),
    "qwen3-next": ("Qwen3Next", dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
                                     shared_expert_intermediate_size=20, linear_num_key_heads=2, linear_num_value_heads=4,
                                     linear_key_head_dim=12, linear_value_head_dim=10,
                                     rope_parameters=ROPE | {"partial_rotary_factor": 0.25})),
}
LENGTH = {"qwen3-next": 130}  # more than two of the delta rule's chunks


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(name, their model, ours loaded from the folder that they wrote, the folder)."""
    torch.manual_seed(1)
    name, (kind, changes) = request.param, MODELS[request.param]
    architecture = getattr(transformers, kind + "ForCausalLM")
    theirs = architecture(architecture.config_class(**(BASE | changes))).float()
    for part, parameter in theirs.named_parameters():  # norms of one and small weights would hide mistakes
        if "A_log" not in part:
            torch.nn.init.normal_(parameter, std=0.2)
    for buffer in (b for part, b in theirs.named_buffers() if "correction_bias" in part):
        torch.nn.init.normal_(buffer, std=0.1)
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs = architecture.from_pretrained(folder).float().eval()
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
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for part, parameter in ours.named_parameters():
        if part in expected and expected[part].shape == parameter.shape and name != "gpt-oss":
            found = {part: parameter.grad}
        else:  # gpt-oss' experts and other names
            found = dict(model_._their_tensors(part, parameter.grad, ours.config))
        for n, g in found.items():
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
    """transformers' own loader is the judge: it must find every tensor and give the logits of the model it came from."""
    name, theirs, ours, _ = pair
    assert "loads it" in save_pretrained(ours, tmp_path / "out", shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(61, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(again.float().eval()(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    back = from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values()))
    assert back.config == ours.config


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "laptop"])
def test_presets_count_what_transformers_counts(name):
    hf = config_to_hugging_face(PRESETS[name])
    kind = getattr(transformers, FAMILIES[hf["model_type"]][0])
    with torch.device("meta"):
        theirs = kind(kind.config_class(**{k: v for k, v in hf.items() if k not in ("model_type", "architectures")}))
    assert count_parameters(PRESETS[name])["total"] == sum(p.numel() for p in theirs.parameters())
    assert config_from_hugging_face(hf).change(initializer_range=0.02, router_aux_loss_coef=0.0, router_bias_update_rate=0.0) == \
        PRESETS[name].change(initializer_range=0.02, router_aux_loss_coef=0.0, router_bias_update_rate=0.0)


def write(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    config = json.loads(json.dumps(config_to_hugging_face(TINY))) | changes
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder


TINY = ModelConfig(61, 32, 24, 2, 2, 1)


@pytest.mark.parametrize("change, sentence", [
    ({"model_type": "mamba"}, "mamba is not one of llama"), ({"hidden_act": "gelu"}, "hidden_act = gelu"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"), ({"num_attention_heads": None}, "lacks"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "damaged.*factor"), ({"model_type": "deepseek_v3"}, "lacks num_experts_per_tok"), ({"mlp_bias": True}, "mlp_bias = True")])
def test_what_is_not_supported_is_named(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        from_pretrained(write(tmp_path, GPT(TINY).state_dict(), **change))


def test_wrong_tensors_are_named(tmp_path):
    weights = {k: v.clone() for k, v in GPT(TINY).state_dict().items()}
    lost = {k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}
    with pytest.raises(UserError, match="lacks model.layers.1.mlp.up_proj.weight"):
        from_pretrained(write(tmp_path, lost))
    with pytest.raises(UserError, match="model.extra.weight, which a llama"):
        from_pretrained(write(tmp_path, weights | {"model.extra.weight": torch.ones(2)}))
    with pytest.raises(UserError, match=r"model.norm.weight with shape \[33\]"):
        from_pretrained(write(tmp_path, weights | {"model.norm.weight": torch.ones(33)}))
    torn = write(tmp_path, weights) / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(UserError, match="incomplete"):
        from_pretrained(tmp_path)
    torn.unlink()
    with pytest.raises(UserError, match="no .safetensors"):
        from_pretrained(tmp_path)


def test_a_tied_head_and_foreign_extras_in_the_file_are_passed_over(tmp_path):
    weights = {k: v.clone() for k, v in GPT(TINY).state_dict().items()}
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.layers.2.mlp.up_proj.weight": torch.ones(3)}
    loaded = from_pretrained(write(tmp_path, weights | extra, num_nextn_predict_layers=1)).state_dict()
    with pytest.raises(UserError, match="layers.2"):  # a config that is shorter than the model
        from_pretrained(write(tmp_path, weights | extra))
    with pytest.raises(UserError, match="lm_head"):
        from_pretrained(write(tmp_path, weights | {"lm_head.weight": torch.ones(61, 32)}))
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("change, word", [
    ({"layer_types": "sliding,full", "sliding_window": 8}, "layer_types"), ({"position": "alibi"}, "alibi"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"), ({"attn_output_gate": True}, "attn_output_gate"),
    ({"num_experts": 4}, "num_experts"), ({"attention_sinks": True}, "num_experts = 0")])
def test_what_no_family_has_is_not_exported(change, word, tmp_path):
    with pytest.raises(UserError, match=word):
        save_pretrained(GPT(TINY.change(**change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    right = config_to_hugging_face
    monkeypatch.setattr(model_, "config_to_hugging_face", lambda config: right(config) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    model = GPT(TINY.change(initializer_range=0.3))
    with pytest.raises(UserError, match="other logits"):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="already there"):
        save_pretrained(model, tmp_path / "there")


def test_gpt_oss_four_bit_weights_unpack_as_in_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    blocks = torch.randint(256, (3, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 6, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    ours = model_._mxfp4(blocks, scales)
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
    cache = KVCache(10)
    GPT(config).eval()(torch.randint(61, (2, 5)), cache=cache)
    assert sum(x[0, 0].numel() for x in cache.layers[0]) == 12 + 4  # MHA would hold 4 heads x (12 + 8)


def test_export_of_a_run_brings_its_tokenizer(tmp_path):
    from tokenizer import ChatFormat, train_bpe
    tokenizer = train_bpe(["the cat sat on the mat, and the dog sat on the cat"] * 3, 275)
    tokenizer.save(tmp_path / "run")
    ours = ChatFormat(tmp_path / "run", tokenizer)
    model = GPT(TINY.change(vocab_size=tokenizer.vocab_size))
    save_pretrained(model, tmp_path / "out", tokenizer_from=tmp_path / "run")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the mat and <|im_end|> the dog"
    assert theirs(text.replace("<|im_end|>", ""))["input_ids"] == tokenizer.encode(text.replace("<|im_end|>", ""))
    messages = [{"role": "user", "content": "the cat?"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert rendered == ours.prompt(messages)[1:]
    assert theirs.eos_token_id == tokenizer.eos_id

    from sample import load
    from tokenizer import ChatFormat
    prompter = ChatFormat(tmp_path / "out", load(tmp_path / "out")[1])
    assert prompter.prompt(messages) == rendered and prompter.text("the cat") == [0, *tokenizer.encode("the cat")]
    assert prompter.stop == {0, 3}
    tricky = [{"role": "user", "content": "the <|im_end|> cat"}]  # control tokens in a message are ordinary text
    assert prompter.prompt(tricky) == ours.prompt(tricky)[1:]
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content | trim }}"
                                                          "{% endfor %}{{ raise_exception('no') if messages[1:] }}")
    prompter = ChatFormat(tmp_path / "out", tokenizer)
    assert prompter.stop == {0, 3} and prompter.prompt([{"role": "user", "content": " the "}]) == [0, *tokenizer.encode("the")]
    with pytest.raises(UserError, match="refuses"):
        prompter.prompt(messages * 2)
    (tmp_path / "out" / "chat_template.jinja").write_text(  # as SmolLM3's and Qwen3's are built
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>{{ m.content.split('<|pad|>')[-1] }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}")
    talk = [{"role": "user", "content": "the <|pad|> cat"}, {"role": "assistant", "content": "a dog <|pad|>the mat"}]
    expected = [*tokenizer.encode("the <|pad|> cat"), tokenizer.control("<|im_start|>"), *tokenizer.encode("the mat")]
    assert ChatFormat(tmp_path / "out", tokenizer).prompt(talk) == expected


def test_sample_chats_with_a_hugging_face_folder(tmp_path):
    from tokenizer import train_bpe
    tokenizer = train_bpe(["the cat sat on the mat, and the dog sat on the cat"] * 3, 275)
    tokenizer.save(tmp_path / "run")
    save_pretrained(GPT(TINY.change(vocab_size=tokenizer.vocab_size)), tmp_path / "out", tokenizer_from=tmp_path / "run")
    for flags, said in (([], "the cat?\n\nthe dog?\n"), (["--chat", "--prompt", "the cat?"], ""), (["--prompt", "the"], "")):
        done = subprocess.run([sys.executable, "sample.py", str(tmp_path / "out"), "--max-tokens", "8", *flags], input=said,
                              cwd=Path(model_.__file__).parent, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert done.stdout.count("> ") >= said.count("?") and len(done.stdout) > 3
    assert re.search('"eos_token_id": 0', (tmp_path / "out" / "config.json").read_text())
