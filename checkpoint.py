"""What is on disk: Hugging Face's folders in and out, and our own checkpoints.

    python checkpoint.py export runs/laptop exported     # a folder that transformers loads, checked against it
    >>> model = from_pretrained("Qwen3-0.6B")            # a folder in Hugging Face's format, or one of our runs
"""

import hashlib
import json
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, ModelConfig
from tokenizer import UserError, run

# ---- weights in and out: our checkpoints, and Hugging Face's folders --------------------------------------------
# Only experts differ from Hugging Face's tensors (one each there, stacked here; gpt-oss interleaves gate and up), and
# two names. Tensors must match exactly both ways; a config that cannot be written and read back unchanged is refused.

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
          "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "initializer_range",
          "attention_bias")
_MOE = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")
# model_type: (class, fields read and written under our names, {our name: theirs}, what the family implies,
#              {their field: the values that this file can compute})
FAMILIES = {
    "llama": ("LlamaForCausalLM", _SIZES, {}, {"tie_word_embeddings": False}, {"mlp_bias": (False,)}),
    "qwen3": ("Qwen3ForCausalLM", _SIZES, {}, {"qk_norm": True, "tie_word_embeddings": False, "head_dim": 128},
              {"use_sliding_window": (False,)}),
    "smollm3": ("SmolLM3ForCausalLM", _SIZES, {}, {"no_rope_layer_interval": 4}, {"use_sliding_window": (False,),
                                                                                 "mlp_bias": (False,)}),
    "gpt_oss": ("GptOssForCausalLM",
                (*_SIZES, "num_experts_per_tok", "sliding_window", "swiglu_limit", "router_aux_loss_coef"),
                {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
                {"attention_sinks": True, "attention_bias": True, "mlp_bias": True, "swiglu_limit": 7.0, "head_dim": 64,
                 "layer_types": "sliding,full", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
                {"swiglu_alpha": (1.702,)}),
    "deepseek_v3": ("DeepseekV3ForCausalLM",
                    (*_SIZES, *_MOE, "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                     "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group"),
                    {"num_experts": "n_routed_experts"},
                    {"scoring_func": "sigmoid", "tie_word_embeddings": False, "router_aux_loss_coef": 0.0},
                    {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,),
                     "rope_interleave": (True,), "attention_bias": (False,)}),
    "qwen3_next": ("Qwen3NextForCausalLM",
                   (*_SIZES, *_MOE, "num_experts", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
                    "linear_value_head_dim", "linear_conv_kernel_dim"), {},
                   {"qk_norm": True, "attn_output_gate": True, "norm_zero_centered": True, "shared_expert_gate": True,
                    "layer_types": "linear,linear,linear,full", "partial_rotary_factor": 0.25,
                    "tie_word_embeddings": False}, {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}),
}
_OPTIONAL = ("head_dim", "num_key_value_heads", "initializer_range", "attention_bias", "q_lora_rank", "router_aux_loss_coef",
             "tie_word_embeddings")
_TRAINING = ("initializer_range", "router_aux_loss_coef", "router_bias_update_rate", "router_z_loss_coef")


def _pattern(items: list) -> list:
    """The shortest list whose repetition gives `items`."""
    return next(items[:n] for n in range(1, len(items) + 1) if all(x == items[i % n] for i, x in enumerate(items)))


def config_from_hugging_face(hf: dict) -> ModelConfig:
    """config.json as a dictionary -> our config. Raises UserError for what this file does not compute."""
    kind = {"kimi_k2": "deepseek_v3"}.get(hf.get("model_type"), hf.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"the architecture {kind or hf.get('architectures')} is not one of {', '.join(FAMILIES)}")
    _, names, renamed, implied, computed = FAMILIES[kind]
    for key, allowed in {"hidden_act": ("silu", "swish"), **computed}.items():
        if hf.get(key) is not None and hf[key] not in allowed:
            raise UserError(f"config.json has {key} = {hf[key]}, of which model.py has only {allowed[0]}")
    for name in names:
        if hf.get(renamed.get(name, name)) is None and name not in implied and name not in _OPTIONAL:
            raise UserError(f"config.json lacks {name}, which a {kind} cannot do without")
    values = implied | {name: hf[name] for name in names if hf.get(name) is not None}
    values |= {ours: hf[theirs] for ours, theirs in renamed.items() if hf.get(theirs) is not None}
    rope = {"rope_theta": hf.get("rope_theta")} | (hf.get("rope_parameters") or {}) | (hf.get("rope_scaling") or {})
    if "rope_scaling" in hf and hf["rope_scaling"]:  # the older name, which people still add to switch YaRN on
        rope["rope_type"] = hf["rope_scaling"].get("rope_type", hf["rope_scaling"].get("type", "default"))
    position = rope.get("rope_type", rope.get("type", "default"))
    position = {"default": "rope"}.get(position, position)
    if position not in ("rope", "llama3", "yarn"):
        raise UserError(f"config.json has RoPE of type {position}, of which model.py has default, llama3 and yarn")
    values |= {"position": position, "rope_theta": rope.get("rope_theta") or (150_000.0 if kind == "gpt_oss" else 10_000.0)}
    if position != "rope":
        values |= {"rope_factor": rope["factor"], "original_max_position_embeddings":
                   rope.get("original_max_position_embeddings") or values["max_position_embeddings"]}
    if position == "llama3" and (rope["low_freq_factor"], rope["high_freq_factor"]) != (1, 4):
        raise UserError("config.json has llama3 RoPE with other borders than 1 and 4 turns, which model.py has not")
    if position == "yarn":
        whole = rope.get("mscale_all_dim") or 0.0
        if rope.get("attention_factor") or (rope.get("mscale") or 0.0) != whole:
            raise UserError("config.json has YaRN with a temperature (mscale, attention_factor) that model.py has not")
        values |= {"yarn_beta_fast": rope.get("beta_fast") or 32.0, "yarn_beta_slow": rope.get("beta_slow") or 1.0,
                   "yarn_truncate": rope.get("truncate", True), "yarn_mscale_all_dim": whole}
    share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    values |= {} if share is None or kind == "deepseek_v3" else {"partial_rotary_factor": share}
    if kind == "smollm3":
        every = hf.get("no_rope_layer_interval") or 4
        layers = hf.get("no_rope_layers") or [1] * (every - 1) + [0]
        pattern = _pattern(layers)
        values["no_rope_layer_interval"] = len(pattern) if 0 in pattern else 0
        if 0 in pattern and pattern != [1] * (len(pattern) - 1) + [0]:
            raise UserError(f"config.json has no_rope_layers {layers}, of which model.py has only every n-th layer")
    if "layer_types" in implied and hf.get("layer_types"):
        values["layer_types"] = ",".join(name.removesuffix("_attention") for name in _pattern(hf["layer_types"]))
    if kind == "qwen3_next":
        values["n_shared_experts"] = hf.get("shared_expert_intermediate_size", 512) // values["moe_intermediate_size"]
    if kind == "deepseek_v3":
        values["num_key_value_heads"] = values["num_attention_heads"]
        values.pop("head_dim", None)
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    return ModelConfig(**values)


def config_to_hugging_face(config: ModelConfig) -> dict:
    """Our config -> config.json as a dictionary. Raises UserError naming what no family there has."""
    kind = ("deepseek_v3" if config.kv_lora_rank else "qwen3_next" if "linear" in config.layer_types
            else "gpt_oss" if config.attention_sinks else "smollm3" if config.no_rope_layer_interval
            else "qwen3" if config.qk_norm else "llama")
    architecture, names, renamed, _, _ = FAMILIES[kind]
    if kind in ("deepseek_v3", "gpt_oss", "qwen3_next") and not config.num_experts:
        raise UserError(f"no Hugging Face architecture is {kind} with num_experts = 0; keep the run's own checkpoint")
    hf = {"model_type": kind, "architectures": [architecture], "hidden_act": "silu", "use_cache": True,
          "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    hf |= {name: getattr(config, name) for name in names}
    hf |= {theirs: getattr(config, ours) for ours, theirs in renamed.items()}
    hf["initializer_range"] = config.initializer_range or config.hidden_size ** -0.5
    rope = {"rope_type": {"rope": "default"}.get(config.position, config.position), "rope_theta": config.rope_theta}
    if config.position in ("llama3", "yarn"):
        rope |= {"factor": config.rope_factor, "original_max_position_embeddings": config.original_max_position_embeddings}
    if config.position == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if config.position == "yarn":
        rope |= {"beta_fast": config.yarn_beta_fast, "beta_slow": config.yarn_beta_slow, "truncate": config.yarn_truncate}
        if config.yarn_mscale_all_dim:
            rope |= {"mscale": config.yarn_mscale_all_dim, "mscale_all_dim": config.yarn_mscale_all_dim}
    if kind == "qwen3_next":
        rope["partial_rotary_factor"] = config.partial_rotary_factor
        hf["shared_expert_intermediate_size"] = config.n_shared_experts * config.moe_intermediate_size
    if kind == "deepseek_v3":
        hf["head_dim"], hf["q_lora_rank"] = config.qk_rope_head_dim, config.q_lora_rank or None
    if kind in ("gpt_oss", "qwen3_next"):
        hf["layer_types"] = [config.layer_type(i) + "_attention" for i in range(config.num_hidden_layers)]
    if kind == "smollm3":
        hf["no_rope_layer_interval"] = config.no_rope_layer_interval
        hf["no_rope_layers"] = [int(config.uses_rope(i)) for i in range(config.num_hidden_layers)]
    hf["rope_parameters"] = rope
    back, given = asdict(_read_back(hf, kind)), asdict(config)
    if not config.num_experts or not config.n_shared_experts:
        back["shared_expert_gate"] = given["shared_expert_gate"]
    lost = [name for name, value in back.items() if value != given[name] and name not in _TRAINING
            and not (name in ("original_max_position_embeddings", "rope_factor") and config.position == "rope")
            and not (not config.num_experts and name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"))
            and not (name == "intermediate_size" and kind == "gpt_oss")]
    if lost:
        raise UserError(f"no Hugging Face architecture is {kind} with {', '.join(f'{n} = {given[n]}' for n in lost)}; "
                         "keep the run's own checkpoint")
    return hf


def _read_back(hf: dict, kind: str) -> ModelConfig:
    try:
        return config_from_hugging_face(hf)
    except UserError as error:
        raise UserError(f"no Hugging Face architecture is {kind} with this config ({error}); keep the run's own "
                         "checkpoint") from None


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """gpt-oss' 4-bit weights: blocks [E, rows, C/32, 16] of two values a byte, scales [E, rows, C/32] -> [E, C, rows]."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    def expert(block, scale):
        values = table[torch.stack((block & 15, block >> 4), -1).int()].flatten(-2)  # [rows, C/32, 32]
        return torch.ldexp(values, scale.int()[..., None] - 127).flatten(-2).t()
    return torch.stack([expert(b, s) for b, s in zip(blocks, scales)])


def _import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("Hugging Face's weight files need the package safetensors: pip install safetensors") from None
    return safetensors


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files under Hugging Face's name; MXFP4 and block-FP8 are unpacked."""
    safetensors = _import_safetensors()
    files = sorted(folder.glob("*.safetensors"))
    if (index := folder / "model.safetensors.index.json").exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    if not files:
        raise UserError(f"{folder} has no .safetensors files; download the model's safetensors version")
    try:
        opened = [safetensors.safe_open(file, framework="pt") for file in files]
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"the weights of {folder} are incomplete ({error}); download them again") from None
    where = {name: file for file in opened for name in file.keys()}
    for name, file in where.items():
        scales = name.removesuffix("_blocks") + "_scales" if name.endswith("_blocks") else name + "_scale_inv"
        if name.endswith(("_scales", "_scale_inv")):
            continue
        tensor = file.get_tensor(name)
        if scales in where:
            scale = where[scales].get_tensor(scales)
            if name.endswith("_blocks"):
                name, tensor = name.removesuffix("_blocks"), _mxfp4(tensor, scale)
            else:  # DeepSeek's FP8: one scale for each square of 128 x 128
                if list(scale.shape) != [-(-size // 128) for size in tensor.shape]:
                    raise UserError(f"{folder} has FP8 weights in other blocks than 128 x 128 ({name}); take bf16")
                scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                tensor = tensor.float() * scale[:tensor.shape[0], :tensor.shape[1]]
        yield name, tensor


def _load_hugging_face(folder: Path, hf: dict, dtype: torch.dtype) -> GPT:
    try:
        config = config_from_hugging_face(hf)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json is damaged ({type(error).__name__}: {error})") from None
    with torch.device("meta"):
        model = GPT(config)
    expected = model.state_dict()
    weights, head = {}, None
    missing = {name: tensor.numel() for name, tensor in expected.items()}  # numbers still to come
    for name, tensor in _read_tensors(folder):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if (name.endswith("rotary_emb.inv_freq") or name.startswith("mtp.")
                or layer and 0 <= int(layer[1]) - config.num_hidden_layers < (hf.get("num_nextn_predict_layers") or 0)):
            continue  # multi-token prediction is not run here
        if name == "lm_head.weight" and config.tie_word_embeddings:
            head = tensor
            continue
        ours, part = name.replace(".mlp.router.", ".mlp.gate.").replace(".mlp.shared_expert.", ".mlp.shared_experts."), ...
        if one := re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            M, e = config.moe_intermediate_size, int(one[2])
            ours = one[1] + (".down_proj" if one[3] == "down" else ".gate_up_proj")
            part = {"gate": (e, slice(0, M)), "up": (e, slice(M, 2 * M)), "down": (e,)}[one[3]]
        elif config.swiglu_limit and "experts.gate_up_proj" in name:  # gpt-oss: gate and up take turns
            tensor = torch.cat((tensor[..., ::2], tensor[..., 1::2]), -1)
        if config.swiglu_limit and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensor = tensor.transpose(1, 2)  # gpt-oss: [E, in, out]
        if ours not in expected:
            raise UserError(f"{folder} has the tensor {name}, which a {hf['model_type']} of this config has not")
        if ours not in weights:
            keep = ours.endswith("e_score_correction_bias")  # decides who is chosen: bf16 would choose others
            weights[ours] = torch.empty(expected[ours].shape, dtype=torch.float32 if keep else dtype)
        try:
            fits = weights[ours][part].shape == tensor.shape
        except IndexError:
            fits = False
        if not fits:
            raise UserError(f"{folder} has {name} with shape {list(tensor.shape)}, but config.json asks for "
                             f"{list(expected[ours].shape)} in all")
        weights[ours][part] = tensor.to(weights[ours].dtype)
        missing[ours] -= tensor.numel()
    if head is not None and not torch.equal(head.to(dtype), weights["model.embed_tokens.weight"]):
        raise UserError(f"{folder} has an lm_head.weight of its own, but config.json says tie_word_embeddings")
    for name, tensor in expected.items():
        if name.endswith("e_score_correction_bias") and missing[name] and config.scoring_func == "softmax":
            weights[name], missing[name] = torch.zeros(tensor.shape), 0
    if lacking := [name for name, numbers in missing.items() if numbers]:
        raise UserError(f"{folder} lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else "")
                         + "; download it again")
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def _their_tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensor as Hugging Face's, one or many."""
    if name.endswith("e_score_correction_bias") and config.scoring_func == "softmax":
        if tensor.any():
            raise UserError("no Hugging Face architecture has a softmax router with router_bias_update_rate; keep the "
                             "run's own checkpoint")
    elif config.swiglu_limit and ".experts." in name:
        if "gate_up_proj" in name:
            gate, up = tensor.chunk(2, 1)
            tensor = torch.stack((gate, up), 2).flatten(1, 2)  # take turns along the rows
        yield name, tensor if name.endswith("_bias") else tensor.transpose(1, 2)
    elif match := re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up|down)_proj", name):
        for e, weight in enumerate(tensor):
            parts = {"down_proj": weight} if match[2] == "down" else dict(zip(("gate_proj", "up_proj"), weight.chunk(2)))
            for part, piece in parts.items():
                yield f"{match[1]}.{e}.{part}.weight", piece
    elif config.swiglu_limit:
        yield name.replace(".mlp.gate.", ".mlp.router."), tensor
    else:
        qwen = "linear" in config.layer_types
        yield name.replace(".mlp.shared_experts.", ".mlp.shared_expert.") if qwen else name, tensor


CHAT_TEMPLATE = ("{% for message in messages %}"
                 "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                    "generation_config.json", "tiktoken.model")


@torch.no_grad()
def save_pretrained(model: GPT, folder: str | Path, tokenizer_from: str | Path | None = None,
                    shard_bytes: float = 5e9) -> str:
    """Writes a new folder that `transformers` loads: config.json, safetensors of at most `shard_bytes`, and the
    tokenizer of the folder `tokenizer_from`. Returns what was checked: logits against transformers, where installed."""
    safetensors, folder = _import_safetensors(), Path(folder)
    if folder.exists():
        raise UserError(f"{folder} is already there; give a new folder")
    hf, partial = config_to_hugging_face(model.config), folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards, shard, size = [], {}, 0

    def write():
        safetensors.torch.save_file(shard, partial / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.numel() * tensor.element_size() for name, tensor in shard.items()})

    for ours, weights in model.state_dict().items():
        for name, tensor in _their_tensors(ours, weights, model.config):
            if shard and size + tensor.numel() * tensor.element_size() > shard_bytes:
                write()
                shard, size = {}, 0
            shard[name] = tensor.clone(memory_format=torch.contiguous_format)
            size += tensor.numel() * tensor.element_size()
    write()
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if shards[1:] else "model.safetensors"
        (partial / f"shard-{number}").rename(partial / file)
        weight_map |= dict.fromkeys(names, file)
    if shards[1:]:
        total = sum(sum(names.values()) for names in shards)
        (partial / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1), "utf-8")
    hf["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    for name in _TOKENIZER_FILES if tokenizer_from else ():
        if (Path(tokenizer_from) / name).exists():
            shutil.copy(Path(tokenizer_from) / name, partial)
    if (partial / "tokenizer.json").exists() and not (partial / "tokenizer_config.json").exists():
        added = json.loads((partial / "tokenizer.json").read_text("utf-8")).get("added_tokens", [])
        ids = {token["content"]: token["id"] for token in added}
        if "<|endoftext|>" in ids:  # ours: the token that opens every document also ends it
            eos = ids["<|endoftext|>"]
            hf |= {"eos_token_id": eos, "bos_token_id": eos, "pad_token_id": ids.get("<|pad|>")}
            stops = [ids[name] for name in ("<|endoftext|>", "<|im_end|>") if name in ids]  # of a text, of a turn
            generation = {"eos_token_id": stops, "bos_token_id": eos}
            (partial / "generation_config.json").write_text(json.dumps(generation), "utf-8")
            (partial / "tokenizer_config.json").write_text(json.dumps({
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>",
                "add_bos_token": True, "pad_token": "<|pad|>" if "<|pad|>" in ids else None,
                "model_max_length": hf["max_position_embeddings"], "chat_template": CHAT_TEMPLATE}, indent=1), "utf-8")
    (partial / "config.json").write_text(json.dumps(hf, indent=1), "utf-8")
    try:
        checked = _compare_with_transformers(model, partial)
    except UserError:
        shutil.rmtree(partial)
        raise
    partial.rename(folder)
    return checked


def _compare_with_transformers(model: GPT, folder: Path) -> str:
    """Loads the folder with transformers and compares logits; raises UserError where they differ."""
    try:
        import transformers
    except ImportError:
        return "not checked: transformers is not installed (pip install transformers)"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    weights, generator = next(model.parameters()), torch.Generator().manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weights.dtype).eval().to(weights.device)
    length = min(200, model.config.max_position_embeddings)  # longer than gpt-oss' window
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=generator).to(weights.device)
    dtype, model.compute_dtype, training = model.compute_dtype, weights.dtype, model.training
    ours, expected = model.eval()(tokens).float(), theirs(tokens).logits.float()
    model.train(training).compute_dtype = dtype
    worst, scale = (ours - expected).abs().max().item(), expected.abs().max().item()
    if not worst <= (1e-3 if weights.dtype == torch.float32 else 5e-2) * max(1.0, scale):
        raise UserError(f"transformers {transformers.__version__} gives other logits for {folder} (largest difference "
                         f"{worst:.1e}); please report this")
    return f"transformers {transformers.__version__} loads it; largest difference of a logit {worst:.1e}"


def check_manifest(checkpoint: Path) -> None:
    """Raises UserError unless every file is as large and as hashed as manifest.json, written last, says."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text("utf-8"))["files"]
        for name, sha256 in files.items():
            with open(checkpoint / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256:
                raise UserError(f"{checkpoint / name} is not what was saved (its sha256 differs)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint ({error})") from None


def newest_checkpoint(run: str | Path) -> Path:
    """The last checkpoint of a run folder that is whole; a damaged one is named on stderr and passed over."""
    for checkpoint in sorted(Path(run).glob("checkpoints/step-????????"), reverse=True):
        try:
            check_manifest(checkpoint)
            return checkpoint
        except UserError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    raise UserError(f"{run} holds no whole checkpoint; give a run folder such as runs/laptop or train one with "
                     "`python train.py`")


class _TensorsOnly(pickle.Unpickler):
    """Reads the index of a sharded checkpoint and nothing that could run code: classes that hold numbers and names."""

    ALLOWED = {("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
               ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
               *(("torch", str(kind)[6:]) for kind in (torch.float32, torch.bfloat16, torch.float16, torch.int64)),
               *(("torch.distributed.checkpoint.metadata", name) for name in (
                   "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                   "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"))}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise UserError(f"the checkpoint's index names {module}.{name}, which no tensor needs; it is not loaded")
        return super().find_class(module, name)


def read_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors, sharded (DTensor) or whole, from what torch.distributed.checkpoint wrote, however many
    processes wrote it."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(folder / ".metadata", "rb") as file:
                index = _TensorsOnly(file).load()
            index.storage_meta.load_id = self.load_id
            return index

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a single process reads it is meant
        try:
            dcp.load(tensors, storage_reader=Reader(folder))
        except dcp.CheckpointException as error:
            raise UserError(f"{folder} is not loaded ({str(error).strip().splitlines()[-1][:300]})") from None


def is_hugging_face(folder: str | Path) -> bool:
    """Whether a folder holds a model in Hugging Face's format."""
    return "model_type" in _read_config(Path(folder)) if (Path(folder) / "config.json").exists() else False


def _read_config(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({error})") from None


def load_config(folder: str | Path) -> ModelConfig:
    """The config of a folder in Hugging Face's format or of one of our checkpoint folders."""
    saved = _read_config(Path(folder))
    if is_hugging_face(folder):
        return config_from_hugging_face(saved)
    try:
        return ModelConfig(**saved)
    except TypeError as error:
        raise UserError(f"{folder} was written by another version of this project ({error}); train it again") from None


def from_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a folder in Hugging Face's format, of a run folder (its newest whole checkpoint) or of one
    checkpoint folder, on the CPU."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give a run folder such as runs/laptop or a downloaded model's folder")
    if is_hugging_face(folder):
        return _load_hugging_face(folder, _read_config(folder), dtype)
    if (folder / "manifest.json").exists():
        check_manifest(folder)
    else:
        folder = newest_checkpoint(folder)
    with torch.device("meta"):
        model = GPT(load_config(folder))
    if (folder / "sharded").exists():  # written by FSDP
        weights = {name: torch.empty_like(w, device="cpu") for name, w in model.state_dict().items()}
        read_sharded(folder / "sharded", shards := {f"model.{name}": w for name, w in weights.items()})
        weights = {name[6:]: w for name, w in shards.items()}
    else:
        weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True, mmap=True)
    weights = {name: w if name.endswith("e_score_correction_bias") else w.to(dtype) for name, w in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == ["export"] and len(argv) == 3:
        checked = save_pretrained(from_pretrained(argv[1]), argv[2], tokenizer_from=argv[1])
        print(f"{argv[2]} is written; {checked}")
    else:
        raise UserError("give a run and a new folder: python checkpoint.py export runs/laptop exported")


if __name__ == "__main__":
    run(main)
