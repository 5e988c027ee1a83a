"""The decoder: what Llama 3, Qwen3, SmolLM3, gpt-oss, DeepSeek, Kimi and Qwen3-Next are made of, in one file.

The playbook's advice for a small dense model is to start from a proven one: pre-norm decoder, RMSNorm, SwiGLU,
RoPE, grouped-query attention. Its ablations (1B, 45B tokens, differences under 0.012 are noise): GQA with 2 to 8
query heads per KV head equals MHA (2.195-2.197 against 2.204), MQA is clearly worse (2.236); tying the embeddings
saves a fifth of a small model for nothing (tied 2.198, untied at equal size 2.243); NoPE in every 4th layer and
document masking cost nothing in short context (2.195) and pay in long context. Mixtures of experts where memory is
no limit, hybrids for very long context; everything else in this file is for those two.

    python model.py                       # the presets and their parameter counts
    python model.py export runs/laptop hf # a folder that transformers loads, checked against it
    >>> logits = GPT(PRESETS["qwen3-0.6b"])(tokens)      # [B, T] int64 -> [B, T, vocab_size]
    >>> model = from_pretrained("Qwen3-0.6B")            # a folder in Hugging Face's format, or one of our runs

Only Llama? Read ModelConfig, document_attention, attention, rope_frequencies, Attention, MLP, Block and GPT; skip the rest.
The second half of the file is weights in and out.

Modules and parameters carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), so that loading a
published checkpoint is a strict `load_state_dict`. Parameters are fp32 unless `from_pretrained` is told otherwise;
`GPT.compute_dtype` sets what the matrix products run in.
Shapes in comments: B batch, T sequence, S keys, N = B*T, C hidden_size, H query heads, G key/value
heads, D head_dim, V vocab_size, E experts, K experts a token, M width of an MLP.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from tokenizer import UserError, run


POSITIONS = ("rope", "llama3", "yarn", "dual_chunk", "none", "learned", "relative", "alibi")
LAYER_TYPES = ("full", "sliding", "chunked", "linear")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder; the names are those of Hugging Face's config.json where it has them."""

    vocab_size: int = 4096  # the tokenizer decides; of the one that is trained for data/laptop
    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 768  # width of the SwiGLU MLP
    num_hidden_layers: int = 4  # blocks
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 2  # = query heads: MHA; 1: MQA; between: GQA, whose KV cache is smaller
    head_dim: int = 0  # width of one head; 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 256  # context length trained on, in tokens
    tie_word_embeddings: bool = True  # one matrix for input embedding and output head
    rms_norm_eps: float = 1e-6  # added to the mean square before its root
    initializer_range: float = 0.02  # deviation of every matrix at the start (OLMo 2); 0: 1/sqrt(hidden_size) (SmolLM2)
    # attention
    layer_types: str = "full"  # full, sliding, chunked or linear, repeated over the layers: "sliding,full" (gpt-oss)
    sliding_window: int = 0  # tokens that a sliding layer sees, itself included
    attention_chunk_size: int = 0  # tokens of the chunk that a chunked layer stays in (Llama 4: 8192)
    attention_sinks: bool = False  # a learned logit per head that takes probability from the tokens (gpt-oss)
    attn_output_gate: bool = False  # a sigmoid gate on every head's output (Qwen3-Next)
    attention_bias: bool = False  # on the q, k, v and o projections (gpt-oss)
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE (Qwen3)
    # positions
    position: str = "rope"  # rope, llama3 or yarn (RoPE rescaled), dual_chunk, none, learned, relative or alibi
    rope_theta: float = 10_000.0  # RoPE's base; raised for longer contexts
    partial_rotary_factor: float = 1.0  # share of each head that RoPE turns (Qwen3-Next: 0.25)
    no_rope_layer_interval: int = 0  # n: every n-th layer has no RoPE (RNoPE, SmolLM3: 4); 0: never
    rope_factor: float = 1.0  # how much longer llama3 and yarn make the context
    original_max_position_embeddings: int = 8192  # the context before llama3, yarn or dual_chunk extended it
    yarn_beta_fast: float = 32.0  # pairs that turn more often than this in the original context are kept
    yarn_beta_slow: float = 1.0  # pairs that turn less often than this are slowed by rope_factor
    yarn_truncate: bool = True  # round those two borders to whole pairs (gpt-oss: false)
    yarn_mscale_all_dim: float = 0.0  # MLA: YaRN's temperature on the whole head, not its turned part (DeepSeek: 1)
    # multi-head latent attention (DeepSeek, Kimi)
    kv_lora_rank: int = 0  # width of the latent that keys and values are made from, and of its cache; 0: no MLA
    q_lora_rank: int = 0  # the same for queries; 0: queries straight from the residual stream
    qk_nope_head_dim: int = 0  # part of a query and key head without position
    qk_rope_head_dim: int = 0  # part of it with RoPE, whose key all heads share
    v_head_dim: int = 0  # width of a value head
    # Gated DeltaNet, the linear layers (Qwen3-Next)
    linear_num_key_heads: int = 0  # 0: num_key_value_heads
    linear_num_value_heads: int = 0  # 0: num_attention_heads
    linear_key_head_dim: int = 0  # 0: head_dim
    linear_value_head_dim: int = 0  # 0: head_dim
    linear_conv_kernel_dim: int = 4  # tokens that the short convolution sees
    # mixture of experts
    num_experts: int = 0  # routed experts of a layer; 0: a dense model
    num_experts_per_tok: int = 2  # of them, how many a token goes through
    moe_intermediate_size: int = 0  # width of one expert; 0: intermediate_size / num_experts_per_tok
    n_shared_experts: int = 0  # experts that every token goes through
    shared_expert_gate: bool = False  # a sigmoid gate on the shared experts (Qwen3-Next)
    first_k_dense_replace: int = 0  # leading layers that stay dense
    scoring_func: str = "softmax"  # or sigmoid (DeepSeek): the router's scores
    norm_topk_prob: bool = True  # the chosen experts' scores are made to sum to 1
    routed_scaling_factor: float = 1.0  # and multiplied by this (DeepSeek)
    n_group: int = 1  # groups of experts, of which a token may use topk_group (DeepSeek-V3)
    topk_group: int = 1  # see n_group
    router_aux_loss_coef: float = 0.01  # weight of the load-balancing loss, over the global batch
    router_bias_update_rate: float = 0.0  # step of the bias that balances without a loss (DeepSeek-V3: 0.001)
    router_z_loss_coef: float = 0.0  # weight of the router's squared log-partition (ST-MoE: 0.001)
    # details
    mlp_bias: bool = False  # on MLPs, experts and router (gpt-oss)
    swiglu_limit: float = 0.0  # gpt-oss' clamped SwiGLU: 7; 0: the usual one
    norm_zero_centered: bool = False  # RMSNorm's gain is 1 + weight (Qwen3-Next)
    final_logit_softcapping: float = 0.0  # logits stay within this, c tanh(x / c) (Gemma 2: 30); 0: off

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps", "rope_factor",
                     "original_max_position_embeddings", "num_experts_per_tok", "linear_conv_kernel_dim", "n_group",
                     "topk_group"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)} must be greater than 0")
        for field in fields(self):
            if field.type in (int, float) and not getattr(self, field.name) >= 0:
                raise UserError(f"{field.name} {getattr(self, field.name)} must not be negative")
        kinds, heads, groups = set(self.layer_types.split(",")), self.num_attention_heads, self.num_key_value_heads
        latent, unusual = self.kv_lora_rank, self.position in ("alibi", "relative", "dual_chunk")
        head_dim = self.head_dim or self.hidden_size // heads
        if latent:
            head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        derived = {"head_dim": head_dim}
        if "linear" in kinds:
            derived |= {"linear_num_key_heads": self.linear_num_key_heads or groups,
                        "linear_num_value_heads": self.linear_num_value_heads or heads,
                        "linear_key_head_dim": self.linear_key_head_dim or head_dim,
                        "linear_value_head_dim": self.linear_value_head_dim or head_dim}
        if self.num_experts:
            share = max(1, self.intermediate_size // self.num_experts_per_tok)  # together as wide as the dense MLP
            derived["moe_intermediate_size"] = self.moe_intermediate_size or share
        for wrong, sentence in (
            (heads % groups, f"num_key_value_heads {groups} must divide num_attention_heads {heads}: take one of "
                             f"{[g for g in range(1, heads + 1) if heads % g == 0]}"),
            (not latent and not self.head_dim and self.hidden_size % heads,
             f"hidden_size {self.hidden_size} does not divide by {heads} heads: change one of them or give head_dim"),
            (self.position not in POSITIONS, f"position {self.position} is not one of {', '.join(POSITIONS)}"),
            (self.scoring_func not in ("softmax", "sigmoid"),
             f"scoring_func {self.scoring_func} is neither softmax nor sigmoid"),
            (kinds - set(LAYER_TYPES),
             f"layer_types {self.layer_types} may hold {', '.join(LAYER_TYPES)}, with commas between"),
            ("sliding" in kinds and not self.sliding_window, "sliding layers need --sliding_window, a number of tokens"),
            ("chunked" in kinds and not self.attention_chunk_size, "chunked layers need --attention_chunk_size, in tokens"),
            (unusual and ("chunked" in kinds or latent),
             f"position {self.position} goes with neither chunked layers nor kv_lora_rank; take rope"),
            (self.position == "dual_chunk" and ("sliding" in kinds or self.attention_sinks),
             "position dual_chunk goes with neither sliding layers nor sinks; take yarn"),
            (latent and (kinds != {"full"} or self.attention_sinks or self.attn_output_gate or self.qk_norm),
             "kv_lora_rank (MLA) goes with full layers without sinks, gate and qk_norm; leave those out"),
            (latent and not (self.qk_nope_head_dim and self.qk_rope_head_dim and self.v_head_dim),
             "kv_lora_rank (MLA) needs --qk_nope_head_dim, --qk_rope_head_dim and --v_head_dim"),
            (latent and self.v_head_dim > head_dim, f"v_head_dim {self.v_head_dim} must not exceed the {head_dim} of a key"),
            ("linear" in kinds and derived.get("linear_num_value_heads", 0) % derived.get("linear_num_key_heads", 1),
             "linear_num_key_heads must divide linear_num_value_heads"),
            (self.num_experts % self.n_group or self.topk_group > self.n_group or 1 < self.n_group > self.num_experts // 2,
             f"n_group {self.n_group} must divide num_experts {self.num_experts} into 2 or more and be at least topk_group"),
            (not 0 < self.partial_rotary_factor <= 1,
             f"partial_rotary_factor {self.partial_rotary_factor} is no share of a head"),
            (self.yarn_mscale_all_dim and not latent, "yarn_mscale_all_dim goes with kv_lora_rank (MLA) only; leave it out"),
            (self.num_experts and self.num_experts_per_tok > self.num_experts // self.n_group * self.topk_group,
             f"num_experts_per_tok {self.num_experts_per_tok} is more than a token may choose from; raise num_experts"),
        ):
            if wrong:
                raise UserError(sentence)
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if self.position in ("rope", "llama3", "yarn", "dual_chunk") and (self.rotary_dim % 2 or not self.rotary_dim):
            raise UserError(f"head_dim {self.head_dim} must be even, and the {self.rotary_dim} that RoPE turns of it "
                             "too, because it turns pairs")

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head RoPE turns."""
        return self.qk_rope_head_dim if self.kv_lora_rank else int(self.head_dim * self.partial_rotary_factor)

    def layer_type(self, layer: int) -> str:
        kinds = self.layer_types.split(",")
        return kinds[layer % len(kinds)]

    def uses_rope(self, layer: int) -> bool:
        skipped = self.no_rope_layer_interval and (layer + 1) % self.no_rope_layer_interval == 0
        return self.position in ("rope", "llama3", "yarn", "dual_chunk") and not skipped

    def change(self, **fields) -> "ModelConfig":
        """A copy with other fields; a head_dim that followed from width and heads follows the new ones."""
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            fields = {"head_dim": 0} | fields
        return replace(self, **fields)


def _llama(layers, hidden, heads, kv_heads, ff, vocab, theta, context, **more) -> ModelConfig:
    return ModelConfig(vocab, hidden, ff, layers, heads, kv_heads, rope_theta=theta,
                       max_position_embeddings=context, **more)


_LLAMA3 = {"position": "llama3", "original_max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
_DEEPSEEK = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
             "first_k_dense_replace": 1, "scoring_func": "sigmoid", "router_aux_loss_coef": 0.0,
             "router_bias_update_rate": 0.001, "tie_word_embeddings": False}

# Published dimensions, after the one that a laptop trains in minutes; tests hold the published counts.
PRESETS = {
    "laptop": ModelConfig(8192, 128, 384, 4, 2, 1, max_position_embeddings=128, initializer_range=0.05),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 1e4, 4096, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, 5e5, 131072, **_LLAMA3, rope_factor=8.0,
                           tie_word_embeddings=False),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, 5e5, 131072, **_LLAMA3, rope_factor=32.0),
    "qwen3-0.6b": _llama(28, 1024, 16, 8, 3072, 151936, 1e6, 40960, head_dim=128, qk_norm=True),
    "qwen3-1.7b": _llama(28, 2048, 16, 8, 6144, 151936, 1e6, 40960, head_dim=128, qk_norm=True),
    "qwen3-4b": _llama(36, 2560, 32, 8, 9728, 151936, 1e6, 40960, head_dim=128, qk_norm=True),
    "qwen3-8b": _llama(36, 4096, 32, 8, 12288, 151936, 1e6, 40960, head_dim=128, qk_norm=True,
                       tie_word_embeddings=False),
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, 49152, 1e5, 8192, rms_norm_eps=1e-5, initializer_range=0.0),
    "smollm2-360m": _llama(32, 960, 15, 5, 2560, 49152, 1e5, 8192, rms_norm_eps=1e-5, initializer_range=0.0),
    "smollm3-3b": _llama(36, 2048, 16, 4, 11008, 128256, 5e6, 65536, no_rope_layer_interval=4),
    "gpt-oss-20b": _llama(24, 2880, 64, 8, 2880, 201088, 150_000.0, 131072, head_dim=64, layer_types="sliding,full",
                          sliding_window=128, attention_sinks=True, attention_bias=True, position="yarn", rope_factor=32.0,
                          original_max_position_embeddings=4096, yarn_truncate=False, num_experts=32,
                          num_experts_per_tok=4, moe_intermediate_size=2880, mlp_bias=True, swiglu_limit=7.0,
                          rms_norm_eps=1e-5, tie_word_embeddings=False),
    "qwen3-next-80b-a3b": _llama(48, 2048, 16, 2, 5632, 151936, 1e7, 262144, head_dim=256, qk_norm=True,
                                 layer_types="linear,linear,linear,full", attn_output_gate=True, partial_rotary_factor=0.25,
                                 linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
                                 linear_value_head_dim=128, num_experts=512, num_experts_per_tok=10,
                                 moe_intermediate_size=512, n_shared_experts=1, shared_expert_gate=True,
                                 norm_zero_centered=True, tie_word_embeddings=False),
    "moonlight-16b-a3b": _llama(27, 2048, 16, 16, 11264, 163840, 5e4, 8192, **_DEEPSEEK, num_experts=64,
                                num_experts_per_tok=6, moe_intermediate_size=1408, n_shared_experts=2,
                                routed_scaling_factor=2.446, rms_norm_eps=1e-5),
    "kimi-k2": _llama(61, 7168, 64, 64, 18432, 163840, 5e4, 131072, **_DEEPSEEK, q_lora_rank=1536, num_experts=384,
                      num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1, routed_scaling_factor=2.827,
                      position="yarn", rope_factor=32.0, original_max_position_embeddings=4096, yarn_beta_fast=1.0,
                      yarn_mscale_all_dim=1.0),
}


# ---- attention ------------------------------------------------------------------------------------------------
# Packed sequences hold several documents, and attention must not cross from one to the next. `cu_seqlens` (int32,
# [M]) are the document starts in the flattened batch, padded with N to a fixed length so that nothing recompiles.
# Work then goes as the sum of squared document lengths instead of B*T^2. One operator, two routes: CUDA's
# variable-length flash kernel and the CPU's flash kernel once per document; a dense mask anywhere else.
#
# A window keeps the last W keys, itself included. A sink (gpt-oss) is a learned logit s per head that joins the
# softmax and is then dropped: with lse' = logaddexp(lse, s) the output is out * exp(lse - lse'). Handing out' and lse'
# to the flash backward gives exact dq, dk, dv, because it recomputes P = exp(score - lse') and delta = rowsum(dO * out');
# what is left is ds = -sum_t exp(s - lse'_t) delta_t. Gating the output with sigmoid(lse - s) and forgetting lse's own
# gradient, as is often done, gets dq and dk wrong by a tenth and more.


def visible_keys(positions: Tensor, key_positions: Tensor, window: int = 0, chunk: int = 0,
                 documents: Tensor | None = None) -> Tensor:
    """Which keys a query sees, bool [B, 1, T, S]: those before it and itself, in its window, chunk and document.

    positions [B or 1, T], key_positions [B or 1, S]; documents [B, T] numbers the document of every token (S = T).
    """
    i, j = positions[:, :, None], key_positions[:, None, :]
    mask = j <= i
    if window:
        mask = mask & (i - j < window)
    if chunk:
        mask = mask & (i // chunk == j // chunk)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return mask[:, None]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | None = None,
                    sink: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v over the visible keys: any device and dtype, slow; the definition.

    q [B, T, H, D], k [B, S, G, D], v [B, S, G, Dv], visible [B or 1, 1, T, S], bias [B or 1, H, T, S], sink [H].
    """
    B, T, H, _ = q.shape
    if bias is None and sink is None:
        mask = visible
    else:
        mask = torch.where(visible, 0.0 if bias is None else bias, -torch.inf).to(q.dtype)
        if sink is not None:  # one more key, zero, whose score is the sink and whose value is zero
            column = sink.to(q.dtype).view(1, H, 1, 1).expand(mask.shape[0], H, T, 1)
            mask = torch.cat((mask.expand(-1, H, -1, -1), column), -1)
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def dense_document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, window: int = 0,
                             sink: Tensor | None = None) -> Tensor:
    """The same as `document_attention` by `dense_attention`.

    Here the batch must be rows of `max_length` tokens whose starts are all in cu_seqlens, as `data.py` makes them.
    """
    index = torch.arange(q.shape[0], device=q.device)
    documents = torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True).view(-1, max_length)  # [B, T]
    rows = index.view(-1, max_length)
    q, k, v = (x.unflatten(0, (-1, max_length)) for x in (q, k, v))
    return dense_attention(q, k, v, visible_keys(rows, rows, window, documents=documents), sink=sink).flatten(0, 1)


def _spans(cu_seqlens: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, the keys they see, mask) of a flattened batch: whole documents, causal where the mask is None; with a
    window, bands of a document, so that work goes as length times window."""
    starts = cu_seqlens.tolist()
    for start, end in zip(starts, starts[1:]):
        band = max(window, 128) if window else max(1, end - start)
        for first in range(start, end, band):  # none in the empty documents that pad cu_seqlens
            last, oldest = min(first + band, end), max(start, first - window + 1) if window else start
            mask = None
            if window and last - oldest > window:
                distance = torch.arange(first, last)[:, None] - torch.arange(oldest, last)
                mask = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= window), -torch.inf)
            yield slice(first, last), slice(oldest, last), mask


def _grouped(x: Tensor, groups: int, ratio: int) -> Tensor:
    """One document's [L, H or G, D] as the CPU kernel's [G, ratio, L, D]: each KV head under its query heads, without
    a copy. In fp32, which that kernel is faster in."""
    x = x.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    return x.expand(-1, ratio, -1, -1)


@torch.library.custom_op("nanoplaybook::document_attention", mutates_args=())
def _document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, window: int,
                        sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and the logarithm of each softmax's sum [H, N], fp32."""
    if q.is_cuda:  # window_size_left counts the tokens before the query
        out, lse = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, False,
            **({"window_size_left": window - 1, "window_size_right": 0} if window else {}))[:2]
    else:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        groups, ratio = k.shape[1], q.shape[1] // k.shape[1]
        for queries, keys, mask in _spans(cu_seqlens, window):
            out_span, lse_span = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_grouped(x, groups, ratio) for x in (q[queries], k[keys], v[keys])), 0.0, mask is None, attn_mask=mask)
            out[queries], lse[:, queries] = out_span.permute(2, 0, 1, 3).flatten(1, 2), lse_span.flatten(0, 1)
    if sink is not None:
        lse_with_sink = torch.logaddexp(lse, sink.float()[:, None])
        out = out * (lse - lse_with_sink).exp().t()[..., None].to(out.dtype)
        lse = lse_with_sink
    return out, lse


@_document_attention.register_fake
def _(q, k, v, cu_seqlens, max_length, window, sink):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("nanoplaybook::document_attention_backward", mutates_args=())
def _document_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                                 cu_seqlens: Tensor, max_length: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        no_dropout = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)  # the state that dropout would need
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, *no_dropout,
            **({"window_size_left": window - 1, "window_size_right": 0} if window else {}))
    new = torch.zeros_like if window else torch.empty_like
    dq, dk, dv = torch.empty_like(q), new(k), new(v)
    store = Tensor.add_ if window else Tensor.copy_  # bands overlap in the keys that they see, documents do not
    groups, ratio = k.shape[1], q.shape[1] // k.shape[1]
    for queries, keys, mask in _spans(cu_seqlens, window):
        dq_span, dk_span, dv_span = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_grouped(x, groups, ratio) for x in (grad[queries], q[queries], k[keys], v[keys], out[queries])),
            lse[:, queries].unflatten(0, (groups, ratio)), 0.0, mask is None, attn_mask=mask)
        dq[queries] = dq_span.permute(2, 0, 1, 3).flatten(1, 2)
        store(dk[keys], dk_span.sum(1).transpose(0, 1))  # over a KV head's query heads
        store(dv[keys], dv_span.sum(1).transpose(0, 1))
    return dq, dk, dv


@_document_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens, max_length, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens, max_length, window, sink = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, sink)
    ctx.max_length, ctx.window = max_length, window
    ctx.set_materialize_grads(False)  # the sums have none


def _backward(ctx, grad, _):
    q, k, v, out, lse, cu_seqlens, sink = ctx.saved_tensors
    dq, dk, dv = _document_attention_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.max_length, ctx.window)
    dsink = None
    if sink is not None:
        delta = (grad.float() * out.float()).sum(-1).t()  # [H, N]
        dsink = -((sink.float()[:, None] - lse).exp() * delta).sum(1).to(sink.dtype)
    return dq, dk, dv, None, None, None, dsink


_document_attention.register_autograd(_backward, setup_context=_save_for_backward)


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, window: int = 0,
                       sink: Tensor | None = None) -> Tensor:
    """Causal attention inside each document of a flattened batch.

    q [N, H, D], k and v [N, G, D], G divides H; cu_seqlens int32 [M] ascending from 0, padded with N; max_length:
    no document is longer (a constant, it compiles in); window: see the last `window` tokens, 0: all; sink [H].
    Returns [N, H, D].
    """
    flash = q.is_cuda and q.element_size() == 2 and q.shape[-1] % 8 == 0  # what the CUDA kernel is made for
    if flash or q.device.type == "cpu":
        return _document_attention(q, k, v, cu_seqlens, max_length, window, sink)[0]
    return dense_document_attention(q, k, v, cu_seqlens, max_length, window, sink)


class Layout(NamedTuple):
    """Where the tokens of a forward pass stand, worked out once for all layers; None: not needed."""

    rope: tuple[Tensor, Tensor] | None  # cos and sin of RoPE's angles, [T, 1, R/2] each
    cu_seqlens: Tensor | None  # document starts
    chunks: Tensor | None  # the same with the starts of the chunks that chunked layers stay in
    documents: Tensor | None  # [B, T] which document a token belongs to
    positions: Tensor | None  # [B or 1, T] its place in the document


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, end: int, window: int = 0, chunk: int = 0,
              sink: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """q [B, T, H, D] are the last T tokens of k, v [B, S, G, D], the last S of `end` so far. Returns [B, T, H, D].

    Without a cache S = T = end. Picks the cheapest kernel that can do it.
    """
    T, S = q.shape[1], k.shape[1]
    if _watched is not None and end == T:
        _watched.append(attention_extremes(q, k, layout.cu_seqlens, window, chunk, scale or q.shape[-1] ** -0.5))
    starts = layout.chunks if chunk else layout.cu_seqlens
    if end == T and bias is None and starts is not None:
        y = document_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, T, window, sink)
        return y.unflatten(0, (-1, T))
    if bias is None and sink is None and not chunk and (T == 1 or S == T and not window):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale, enable_gqa=True).transpose(1, 2)
    positions = torch.arange(end - S, end, device=q.device)[None]
    visible = visible_keys(positions[:, S - T:], positions, window, chunk, layout.documents if end == T else None)
    return dense_attention(q, k, v, visible, bias, sink, scale)


_watched: list[Tensor] | None = None


@contextlib.contextmanager
def watch_attention() -> Iterator[list[Tensor]]:
    """Inside, forward passes run eagerly and every softmax attention adds its `attention_extremes` to the list."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


@torch.no_grad()
def attention_extremes(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, window: int, chunk: int, scale: float) -> Tensor:
    """[largest score, smallest and largest entropy of a head in nats], of the first row's last queries (128 at most).

    Scores that grow without bound and entropies that fall to 0 come before a divergence (Zhai et al. 2023).
    """
    T, ratio = q.shape[1], q.shape[2] // k.shape[2]
    index = torch.arange(T, device=q.device)
    documents = index * 0 if cu_seqlens is None else torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True)
    last = index[-128:]
    visible = visible_keys(last[None], index[None], window, chunk)[0] & (documents[last][:, None] == documents)  # [1, t, T]
    scores = torch.einsum("thd,shd->hts", q[0, last].float(), k[0].float().repeat_interleave(ratio, 1)) * scale
    log_p = scores.masked_fill(~visible, -torch.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1).mean(-1)  # [H]
    return torch.stack((scores.masked_fill(~visible, -torch.inf).max(), entropy.min(), entropy.max()))


def chunk_starts(cu_seqlens: Tensor, tokens: int, chunk: int) -> Tensor:
    """cu_seqlens of chunked attention (Llama 4): every document cut into chunks; int32 [M + tokens // chunk]."""
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    place = index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
    starts = torch.where(place % chunk == 0, index, tokens).sort().values  # a fixed number, so that nothing recompiles
    return F.pad(starts, (0, 1), value=tokens)[:len(cu_seqlens) + tokens // chunk].int()


# ---- positions ------------------------------------------------------------------------------------------------


def rope_frequencies(config: ModelConfig, device="cpu") -> Tensor:
    """RoPE (Su et al. 2021): pair i of R numbers turns by theta^(-2i/R) radians a token; pair 0 is the fastest. [R/2].

    `llama3` and `yarn` slow pairs `rope_factor` times that turn seldom in the original context, keep those that turn
    often, and blend between. Llama 3.1 blends by turns, from 1 to 4; YaRN (Peng et al. 2023) by the number of the
    pair, from yarn_beta_slow to yarn_beta_fast turns, borders rounded to whole pairs where yarn_truncate.
    """
    R, theta, context = config.rotary_dim, config.rope_theta, config.original_max_position_embeddings
    frequencies = theta ** (-torch.arange(0, R, 2, device=device, dtype=torch.float32) / R)
    if config.position == "llama3":
        keep = ((context * frequencies / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
    elif config.position == "yarn":
        def pair(turns):  # the number of the pair that turns so often in the original context
            return R * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))
        low, high = pair(config.yarn_beta_fast), pair(config.yarn_beta_slow)
        if config.yarn_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        pairs = torch.arange(R // 2, device=device, dtype=torch.float32)
        keep = 1 - ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    else:
        return frequencies
    return frequencies * (keep + (1 - keep) / config.rope_factor)


def yarn_temperature(config: ModelConfig) -> tuple[float, float]:
    """What YaRN multiplies scores' turned part and whole scores with, square roots taken: 0.1 ln(factor) + 1.

    YaRN as published and gpt-oss temper what RoPE turned; DeepSeek and Kimi the whole head (yarn_mscale_all_dim).
    """
    if config.position != "yarn":
        return 1.0, 1.0
    if config.yarn_mscale_all_dim:
        return 1.0, 0.1 * config.yarn_mscale_all_dim * math.log(config.rope_factor) + 1
    return 0.1 * math.log(config.rope_factor) + 1, 1.0


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + R/2]) of x [B, T, H, D] by the angles whose cos and sin are [T, 1, R/2]; numbers
    from R on stay."""
    R = 2 * cos.shape[-1]
    a, b, *rest = x.split([R // 2, R // 2] + [x.shape[-1] - R] * (x.shape[-1] > R), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *rest), dim=-1)


def alibi(heads: int, positions: Tensor, key_positions: Tensor) -> Tensor:
    """ALiBi (Press et al. 2021): head h of H loses 2^(-8h/H) a token of distance. [B or 1, H, T, S]."""
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device=positions.device) / heads)
    return slopes[:, None, None] * (key_positions[:, None, None, :] - positions[:, None, :, None])


def distance_bucket(distance: Tensor, buckets: int = 32, far: int = 128) -> Tensor:
    """T5's relative positions (Raffel et al. 2020), causal: half the buckets exact, half logarithmic up to `far`."""
    exact, distance = buckets // 2, distance.clamp(min=0)
    log = exact + ((distance.clamp(min=1) / exact).log() / math.log(far / exact) * (buckets - exact)).long()
    return torch.where(distance < exact, distance, log.clamp(max=buckets - 1))


def dual_chunk_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor, visible: Tensor,
                         frequencies: Tensor, context: int) -> Tensor:
    """Dual chunk attention (An et al. 2024): reads beyond the trained context c without training. For inference only.

    Positions are cut into chunks of s = 3c/4. Keys, turned already, count from the start of their chunk. So do
    queries for keys of their own chunk; for the chunk before they go on counting, up to c - 1, which keeps the c - s
    nearest distances true; for all others they stand at c - 1. No distance is new to the model.
    q [B, T, H, D] not turned yet, k, v [B, S, G, D], positions [B or 1, T], key_positions [B or 1, S].
    """
    chunk = dual_chunk_size(context)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))

    def scores(at: Tensor) -> Tensor:  # queries at these positions [B or 1, T]
        angles = (at[..., None] * frequencies)[:, :, None]  # [B or 1, T, 1, R/2]
        return torch.einsum("bthd,bshd->bhts", apply_rope(q, angles.cos().to(q.dtype), angles.sin().to(q.dtype)), k)

    place = positions % chunk
    apart = (positions[:, :, None] // chunk - key_positions[:, None, :] // chunk)[:, None]  # [B or 1, 1, T, S], in chunks
    far = scores(torch.full_like(place, context - 1))
    s = torch.where(apart == 0, scores(place), torch.where(apart == 1, scores((place + chunk).clamp(max=context - 1)), far))
    s = (s.float() / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", s.to(v.dtype), v)


def dual_chunk_size(context: int) -> int:
    return max(1, 3 * context // 4)


class KVCache:
    """What a model remembers of the tokens before, layer by layer, for `length` of at most `capacity` tokens.

    Full attention: keys and values [B, capacity, G, D]; MLA: the latent [B, capacity, kv_lora_rank] and the shared
    key's turned part; sliding and chunked layers: only what a later token can see; linear layers: a state of fixed size.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def append(self, layer: int, *new: Tensor, keep: int | None = None) -> tuple[Tensor, ...]:
        """Stores new [B, T, ...] at the end and returns everything stored so far; then forgets all but the last `keep`.

        `length` itself moves once per forward pass, in `GPT.forward`, after the last layer.
        """
        if keep is not None:
            seen = tuple(torch.cat(pair, 1) for pair in zip(self.layers[layer], new)) if layer in self.layers else new
            self.layers[layer] = tuple(x[:, max(0, x.shape[1] - keep):] for x in seen)
            return seen
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_empty(x.shape[0], self.capacity, *x.shape[2:]) for x in new)
        end = self.length + new[0].shape[1]
        for stored, x in zip(self.layers[layer], new):
            stored[:, self.length:end] = x
        return tuple(stored[:, :end] for stored in self.layers[layer])


# ---- the modules ----------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in the dtype of x, whatever the weights' own: the casts that autocast hides, in one place."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.numel() == x.shape[-1] and x.dtype == torch.float32 and x.device.type == "cpu" and weight.numel() < 2**22:
        # One token on a CPU: BLAS' matrix-vector product runs on one thread; this is 2.3 times as fast.
        y = (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """fp32 weights, any compute dtype: see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), or * (1 + weight); the mean in fp32."""

    def __init__(self, size: int, eps: float, zero_centered: bool = False):
        super().__init__(size, eps)
        self.zero_centered = zero_centered  # so that weight decay pulls the gain to 1 instead of 0
        if zero_centered:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centered:  # in fp32, because 1 + a small weight is 1 in bf16
            return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1, self.eps).to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), MHA and MQA its ends; full, sliding or chunked."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, G, D = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        kind, bias = config.layer_type(layer), config.attention_bias
        self.config, self.layer, self.head_dim = config, layer, D
        self.window = config.sliding_window if kind == "sliding" else 0
        self.chunk = config.attention_chunk_size if kind == "chunked" else 0
        self.keep = max(self.window, self.chunk) - 1 if kind != "full" else None  # keys that a later token can see
        self.position = config.position if config.uses_rope(layer) or config.position in ("alibi", "relative") else "none"
        self.q_proj = Linear(C, H * D * (2 if config.attn_output_gate else 1), bias)
        self.k_proj = Linear(C, G * D, bias)
        self.v_proj = Linear(C, G * D, bias)
        self.o_proj = Linear(H * D, C, bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps, config.norm_zero_centered) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps, config.norm_zero_centered) if config.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None
        self.relative_bias = nn.Embedding(32, H) if config.position == "relative" else None

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, gate = self.q_proj(x), None
        if self.config.attn_output_gate:
            q, gate = q.view(B, T, -1, 2 * self.head_dim).chunk(2, -1)
        q = self.q_norm(q.view(B, T, -1, self.head_dim))  # [B, T, H, D]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # [B, T, G, D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if layout.rope is not None and self.position != "none":
            k = apply_rope(k, *layout.rope)
            q = q if self.position == "dual_chunk" else apply_rope(q, *layout.rope)
        end = T
        if cache is not None:
            end += cache.length
            k, v = cache.append(self.layer, k, v, keep=self.keep)
        if self.position in ("alibi", "relative", "dual_chunk"):
            y = self.unusual(q, k, v, layout, end)
        else:
            y = attention(q, k, v, layout, end, self.window, self.chunk, self.sinks)
        if gate is not None:
            y = y * gate.sigmoid()
        return self.o_proj(y.reshape(B, T, -1))

    def unusual(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, end: int) -> Tensor:
        """The positions that flash kernels do not know."""
        T, S = q.shape[1], k.shape[1]
        positions = layout.positions
        keys = positions if end == T else torch.arange(end - S, end, device=q.device)[None]
        if self.position == "alibi":
            return attention(q, k, v, layout, end, self.window, 0, self.sinks, alibi(q.shape[2], positions, keys))
        if self.position == "relative":
            bias = self.relative_bias(distance_bucket(positions[:, :, None] - keys[:, None, :])).permute(0, 3, 1, 2)
            return attention(q, k, v, layout, end, self.window, 0, self.sinks, bias)
        visible = visible_keys(positions, keys, self.window, 0, layout.documents if end == T else None)
        return dual_chunk_attention(q, k, v, positions, keys, visible, rope_frequencies(self.config, q.device),
                                    self.config.original_max_position_embeddings)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads come from one small latent.

    The cache holds that latent and the one key part with position, kv_lora_rank + qk_rope_head_dim numbers a token.
    Reading it, kv_b_proj is not applied to every old token but moved to the other side: into the query
    (q_nope W_k) . latent, and behind the weighted sum. The heads then share one key, as in MQA.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H = config.hidden_size, config.num_attention_heads
        self.layer, self.heads, self.latent = layer, H, config.kv_lora_rank
        self.nope, self.turned, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.uses_rope, self.temperature = config.uses_rope(layer), yarn_temperature(config)[1] ** 2
        if config.q_lora_rank:
            self.q_a_proj = Linear(C, config.q_lora_rank, config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # 1e-6 whatever rms_norm_eps is, as published
            self.q_b_proj = Linear(config.q_lora_rank, H * config.head_dim, bias=False)
        else:
            self.q_proj = Linear(C, H * config.head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(C, self.latent + self.turned, config.attention_bias)
        self.kv_a_layernorm = RMSNorm(self.latent, 1e-6)
        self.kv_b_proj = Linear(self.latent, H * (self.nope + self.value), bias=False)
        self.o_proj = Linear(H * self.value, C, config.attention_bias)

    def turn(self, x: Tensor, layout: Layout) -> Tensor:
        """RoPE on x [B, T, heads, qk_rope_head_dim], whose pairs lie side by side in DeepSeek: (x[0], x[1]) ..."""
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return apply_rope(x, *layout.rope) if self.uses_rope else x

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if hasattr(self, "q_a_proj") else self.q_proj(x)
        q_nope, q_rope = q.view(B, T, self.heads, -1).split([self.nope, self.turned], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.turned], -1)
        latent, k_rope = self.kv_a_layernorm(latent), self.turn(k_rope[:, :, None], layout)  # [B, T, R], [B, T, 1, Dr]
        q_rope, end = self.turn(q_rope, layout), T
        if cache is not None:
            end += cache.length
            latent, k_rope = cache.append(self.layer, latent, k_rope)
        scale = self.temperature * (self.nope + self.turned) ** -0.5
        if end > T:
            w_k, w_v = self.kv_b_proj.weight.to(x.dtype).view(self.heads, -1, self.latent).split([self.nope, self.value], 1)
            q = torch.cat((torch.einsum("bthd,hdr->bthr", q_nope, w_k), q_rope), -1)
            k = torch.cat((latent[:, :, None], k_rope), -1)  # [B, S, 1, R + Dr]
            if T == 1:  # all heads share one key, so they stand as the queries of one head
                y = F.scaled_dot_product_attention(q, k.transpose(1, 2), latent[:, None], scale=scale)  # [B, 1, H, R]
            else:
                y = attention(q, k, latent[:, :, None], layout, end, scale=scale)  # [B, T, H, R]
            y = torch.einsum("bthr,hdr->bthd", y, w_v)
        else:
            k_nope, v = self.kv_b_proj(latent).view(B, T, self.heads, -1).split([self.nope, self.value], -1)
            q = torch.cat((q_nope, q_rope), -1) * self.temperature
            k = torch.cat((k_nope, k_rope.expand(-1, -1, self.heads, -1)), -1)
            v = F.pad(v, (0, q.shape[-1] - self.value))  # flash kernels want values as wide as keys
            y = attention(q, k, v, layout, end)[..., :self.value]
        return self.o_proj(y.reshape(B, T, -1))


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, documents: Tensor,
                     state: Tensor) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet's recurrence (Yang et al. 2024) in chunks of 64: outputs [B, T, H, Dv] and the last state, fp32.

    Token by token: S <- e^decay S; S <- S + k (beta (v - S^T k))^T; o = S^T q. q, k [B, T, H, Dk], v [B, T, H, Dv],
    decay <= 0 and beta [B, T, H], documents [B, T], state S [B, H, Dk, Dv]. Inside a chunk the corrections of
    all tokens solve one triangular system (the UT transform); between chunks only S is handed on. With T = 1 this is
    the recurrence itself. A token that belongs to another document is cut off by a mask, exactly.
    """
    B, T, H, _ = q.shape
    size = min(64, T)
    rest = -T % size

    def chunks(x):  # [B, T, H, ...] -> [B, H, chunks, size, ...], padded with zeros, which change no state
        return F.pad(x.float().movedim(1, -1), (0, rest)).unflatten(-1, (-1, size)).movedim((-2, -1), (2, 3))

    q, k, v, decay, beta = (chunks(x) for x in (q, k, v, decay, beta))
    documents = F.pad(documents, (0, rest), mode="replicate").unflatten(-1, (-1, size))[:, None]  # [B, 1, chunks, size]
    last = documents[..., -1:]
    before = torch.cat((documents[..., :1, :1], last[..., :-1, :]), -2)  # whose state a chunk finds
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    same = (documents[..., :, None] == documents[..., None, :]) & causal
    # between[i, j] = e^(decay of the tokens after j up to i); summed from j on, so no other document's decays enter
    between = torch.where(causal.tril(-1), decay[..., :, None], 0.0).cumsum(-2)
    between = torch.where(same, between.exp(), 0.0)
    reach = torch.where(documents == before, decay.cumsum(-1).exp(), 0.0)[..., None]  # from the chunk's start to i
    leave = between[..., -1, :, None]  # from j to the chunk's end

    k_beta = k * beta[..., None]
    system = (k_beta @ k.transpose(-1, -2)) * between  # its diagonal is taken as ones
    solved = torch.linalg.solve_triangular(system, torch.cat((v * beta[..., None], k_beta * reach), -1), upper=False,
                                           unitriangular=True)
    new, seen = solved.split([v.shape[-1], k.shape[-1]], -1)  # what to write, and what the old state already says
    scores, q, k = (q @ k.transpose(-1, -2)) * between, q * reach, k * leave
    outputs = []
    for n in range(q.shape[2]):
        write = new[:, :, n] - seen[:, :, n] @ state
        outputs.append(q[:, :, n] @ state + scores[:, :, n] @ write)
        state = state * reach[:, :, n, -1:] + k[:, :, n].transpose(-1, -2) @ write
    return torch.cat(outputs, 2)[:, :, :T].transpose(1, 2), state


class GatedDeltaNet(nn.Module):
    """Linear attention with a gated delta rule (Qwen3-Next's linear layers); its memory does not grow with the text."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.key_heads, self.value_heads = layer, config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.ratio = self.value_heads // self.key_heads
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.in_proj_qkvz = Linear(config.hidden_size, 2 * keys + 2 * values, bias=False)
        self.in_proj_ba = Linear(config.hidden_size, 2 * self.value_heads, bias=False)
        channels = 2 * keys + values
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(0.01, 16).log())
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = Linear(values, config.hidden_size, bias=False)

    def short_convolution(self, x: Tensor, tail: Tensor, documents: Tensor | None) -> Tensor:
        """Causal convolution of x [B, T, channels] after `tail` [B, kernel - 1, channels], inside documents."""
        T, kernel = x.shape[1], self.conv1d.weight[:, 0].t().to(x.dtype)  # [kernel, channels]
        x, y = torch.cat((tail, x), 1), 0
        for back in range(len(kernel)):
            start = len(kernel) - 1 - back
            shifted = x[:, start:start + T]
            if back and documents is not None:
                shifted = shifted * (F.pad(documents, (back, 0))[:, :T] == documents)[..., None]
            y = y + shifted * kernel[start]
        return y

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        wide = self.ratio * self.value_dim
        q, k, v, z = (self.in_proj_qkvz(x).view(B, T, self.key_heads, -1)
                      .split([self.key_dim, self.key_dim, wide, wide], -1))  # [B, T, key heads, ...]
        b, a = (y.reshape(B, T, -1) for y in self.in_proj_ba(x).view(B, T, self.key_heads, -1).chunk(2, -1))
        mixed = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), -1)  # [B, T, channels]
        if cache is not None and self.layer in cache.layers:
            tail, state = cache.layers[self.layer]
        else:
            tail = mixed.new_zeros(B, self.conv1d.kernel_size[0] - 1, mixed.shape[-1])
            state = torch.zeros(B, self.value_heads, self.key_dim, self.value_dim, device=x.device)
        documents = layout.documents
        y = F.silu(self.short_convolution(mixed, tail, documents))
        q, k, v = y.split([q.flatten(2).shape[-1], k.flatten(2).shape[-1], v.flatten(2).shape[-1]], -1)
        q, k = (y.float().reshape(B, T, self.key_heads, -1).repeat_interleave(self.ratio, 2) for y in (q, k))
        q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
        if documents is None:
            documents = torch.zeros(B, T, dtype=torch.int64, device=x.device)
        y, state = gated_delta_rule(q * self.key_dim ** -0.5, k, v.reshape(B, T, self.value_heads, -1), decay,
                                    b.float().sigmoid(), documents, state)
        if cache is not None:
            cache.layers[self.layer] = torch.cat((tail, mixed), 1)[:, T:], state
        y = self.norm(y.to(x.dtype)) * F.silu(z.reshape(B, T, self.value_heads, -1))
        return self.out_proj(y.flatten(2))


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up (Shazeer 2020); with a limit gpt-oss' variant, clamped, 1.702 steep, and up raised by one."""
    if not limit:
        return F.silu(gate) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-limit, limit) + 1)


class MLP(nn.Module):
    """down(swiglu(gate(x), up(x)))."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.limit = config.swiglu_limit
        self.gate_proj = Linear(config.hidden_size, width, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, width, config.mlp_bias)
        self.down_proj = Linear(width, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Router(Linear):
    """Scores every expert and picks K of them for each token."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.num_experts, config.mlp_bias)
        self.config = config
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))  # moved by `balance_experts`

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [N, C] -> weights and indices of the chosen experts [N, K], all scores and logits [N, E]; in fp32."""
        c = self.config
        logits = super().forward(x.float())
        scores = logits.softmax(-1) if c.scoring_func == "softmax" else logits.sigmoid()
        choice = scores.detach() + self.e_score_correction_bias.float()  # the bias decides who, not how much
        if c.n_group > 1:  # DeepSeek-V3: only the groups whose two best experts are best
            groups = choice.view(len(x), c.n_group, -1)
            best = groups.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices  # [N, topk_group]
            allowed = torch.zeros_like(groups[..., 0]).scatter(1, best, 1.0).bool()
            choice = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        index = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(1, index)
        if c.norm_topk_prob:  # of a softmax, this is the softmax over the chosen ones
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, index, scores, logits


class _Reorder(torch.autograd.Function):
    """x[order], whose backward is grad[inverse]: a gather both ways, no atomics, so it is fast and deterministic."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class Experts(nn.Module):
    """The routed MLPs of a layer, dropless: each token visits all of its experts, however uneven that makes them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, E, M = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * M, C))  # gate first, then up
        self.down_proj = nn.Parameter(torch.empty(E, C, M))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * M)) if config.mlp_bias else None
        self.down_proj_bias = nn.Parameter(torch.zeros(E, C)) if config.mlp_bias else None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor, ends: Tensor) -> Tensor:
        """Row n of x [N*K, in] times the weight [E, out, in] of its expert; rows are sorted, `ends` where each stops."""
        weight = weight.to(x.dtype)
        if all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):  # what grouped_mm asks of rows
            y = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
        else:
            counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
            y = torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight)])
        return y if bias is None else y + bias.to(x.dtype)[expert]

    def forward(self, x: Tensor, weights: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        """x [N, C], weights and index [N, K], counts [E] of the tokens of each expert -> [N, C]."""
        N, K = index.shape
        expert, order = index.flatten().sort(stable=True)  # [N*K], expert after expert
        inverse, ends = order.argsort(), counts.int().cumsum(0, dtype=torch.int32)  # floats have no strict form on CUDA
        rows = _Reorder.apply(x[:, None].expand(-1, K, -1).reshape(N * K, -1), order, inverse)  # [N*K, C]
        gate, up = self.product(rows, self.gate_up_proj, self.gate_up_proj_bias, expert, ends).chunk(2, -1)
        y = self.product(swiglu(gate, up, self.limit), self.down_proj, self.down_proj_bias, expert, ends)
        y = _Reorder.apply(y, inverse, order).view(N, K, -1)
        return (y * weights.to(y.dtype)[..., None]).sum(1)


class MoE(nn.Module):
    """Mixture of experts: a router, its experts, and shared experts for everybody (DeepSeekMoE, Dai et al. 2024).

    After a forward pass in training, `routing` holds (share of the scores [E], tokens of each expert [E], mean
    squared log-partition) for `GPT.routing_loss`, and `load` the tokens of each expert in this step so far.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config, width) if width else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if width and config.shared_expert_gate else None
        self.routing, self.load = None, None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # [N, C]
        weights, index, scores, logits = self.gate(flat)
        counts = torch.zeros_like(scores[0]).index_add(0, index.flatten(), torch.ones_like(weights).flatten())
        if self.training:
            self.routing = (scores / scores.sum(-1, keepdim=True)).mean(0), counts, logits.logsumexp(-1).square().mean()
        y = self.experts(flat, weights, index, counts)
        if self.shared_experts is not None:
            shared = self.shared_experts(flat)
            y = y + (shared if self.shared_expert_gate is None else shared * self.shared_expert_gate(flat).sigmoid())
        return y.view_as(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). A linear layer has `linear_attn` instead of `self_attn`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_zero_centered)
        if config.layer_type(layer) == "linear":
            self.linear_attn = GatedDeltaNet(config, layer)
        else:
            self.self_attn = (LatentAttention if config.kv_lora_rank else Attention)(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_zero_centered)
        sparse = config.num_experts and layer >= config.first_k_dense_replace
        self.mlp = MoE(config) if sparse else MLP(config, config.intermediate_size)

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        x = x + mixer(self.input_layernorm(x), layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":  # absolute positions (Vaswani et al. 2017, GPT-2), counted in each document
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_zero_centered)


def cross_entropy(logits: Tensor, targets: Tensor, rows: int = 512) -> Tensor:
    """Summed negative log-likelihood in nats, fp32: logits [B, T, V] of any dtype, targets [B, T], -100 ignored.

    `rows` at a time: a CPU's cache then holds the fp32 copies of the logits, which makes it about 3 times as fast.
    """
    pairs = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows))
    return sum(F.cross_entropy(l.float(), t, reduction="sum") for l, t in pairs)


def z_loss(logits: Tensor, targets: Tensor, rows: int = 512) -> Tensor:
    """Summed squared log-partition log(Z)^2 of the targets that count (PaLM), which keeps logits from drifting.

    The playbook saw no effect (2.200 without, 2.194 with) and left it out; OLMo 2 trains with 1e-5 times this.
    """
    pairs = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows))
    return sum((l.float().logsumexp(-1).square() * (t >= 0)).sum() for l, t in pairs)


class GPT(nn.Module):
    """tokens [B, T] int64 -> logits [B, T, V]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.recompute = False  # blocks again in the backward pass, instead of keeping what they computed
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        std = config.initializer_range or config.hidden_size ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith((".bias", "_proj_bias")):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2 and "conv1d" not in name:  # OLMo 2 found a plain normal more stable than scaled ones
                nn.init.normal_(parameter, std=std)

    def compile_blocks(self) -> None:
        """torch.compile, block by block: equal blocks share a graph, and the names of the weights stay."""
        torch._dynamo.config.recompile_limit = 64  # a graph for every kind of layer at every context of a curriculum
        for layer in self.model.layers:
            layer.compile(fullgraph=True, dynamic=False)

    def forget_compilation(self) -> bool:
        """Back to eager blocks, where a machine turns out to have no compiler; whether they were compiled."""
        compiled = any(layer._compiled_call_impl for layer in self.model.layers)
        for layer in self.model.layers:
            layer._compiled_call_impl = None
        return compiled

    def layout(self, tokens: Tensor, cu_seqlens: Tensor | None, start: int) -> Layout:
        """Where tokens [B, T] stand that follow `start` others."""
        (B, T), c, device = tokens.shape, self.config, tokens.device
        if cu_seqlens is None and start == 0 and (c.attention_sinks or c.layer_types != "full"):
            cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)  # one document a row
        rope = documents = chunks = None
        row = torch.arange(start, start + T, device=device)
        positions = row[None]
        by_document = "linear" in c.layer_types or c.position in ("learned", "alibi", "relative", "dual_chunk")
        if cu_seqlens is not None and by_document:
            index = torch.arange(B * T, device=device, dtype=cu_seqlens.dtype)
            documents = torch.searchsorted(cu_seqlens, index, right=True)
            positions, documents = (index - cu_seqlens[documents - 1]).view(B, T), documents.view(B, T)
        if cu_seqlens is not None and "chunked" in c.layer_types:
            chunks = chunk_starts(cu_seqlens, B * T, c.attention_chunk_size)
        if c.position in ("rope", "llama3", "yarn", "dual_chunk"):
            at = row if c.position != "dual_chunk" else positions % dual_chunk_size(c.original_max_position_embeddings)
            angles = at[..., None].float() * rope_frequencies(c, device)  # fp32, [T, R/2]; [B or 1, T, R/2] in dual_chunk
            temperature = yarn_temperature(c)[0]
            rope = tuple((f(angles) * temperature)[..., None, :].to(self.compute_dtype) for f in (torch.cos, torch.sin))
        return Layout(rope, cu_seqlens, chunks, documents, positions)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None, cache: KVCache | None = None,
                last_only: bool = False) -> Tensor:
        """Logits in the compute dtype. `cu_seqlens`: see `document_attention`; None: one document a row.

        `cache`: the tokens continue what it holds. `last_only`: logits of the last position, [B, 1, V].
        """
        start = cache.length if cache is not None else 0
        if start and cu_seqlens is not None:
            raise UserError("a cache goes on with the last document of each row; leave cu_seqlens out")
        layout = self.layout(tokens, cu_seqlens, start)
        x = self.model.embed_tokens(tokens)
        if self.config.position == "learned":
            if start + tokens.shape[1] > self.config.max_position_embeddings:
                raise UserError(f"position learned ends at {self.config.max_position_embeddings} tokens; shorten the text")
            x = x + self.model.embed_positions(layout.positions)
        x = x.to(self.compute_dtype)  # [B, T, C]
        eager = cache is not None or _watched is not None  # a cache's length changes every call: past torch.compile
        for layer in self.model.layers:
            call = layer._call_impl if eager else layer
            if self.recompute and torch.is_grad_enabled():  # Chen et al. 2016
                x = recomputed(call, x, layout, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = call(x, layout, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.model.norm(x[:, -1:] if last_only else x)
        tied = self.config.tie_word_embeddings
        logits = linear(x, self.model.embed_tokens.weight if tied else self.lm_head.weight)  # [B, T, V]
        if cap := self.config.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _experts(self) -> list[MoE]:
        return [m for m in self.modules() if isinstance(m, MoE)]

    def routing_loss(self) -> Tensor | float:
        """The routers' losses of the last forward pass in training, to be added to its mean loss; 0 without experts.

        Per layer: coefficient * E * sum_i f_i P_i (Switch Transformer), f the share of tokens that went to expert i,
        P its mean score; 1 when even. f is counted over all processes and the step's micro-batches so far, as the
        playbook advises: balanced only within each, experts could not specialise. Plus the router's z-loss (ST-MoE).
        """
        layers, total = self._experts(), 0.0
        if layers:
            counts = torch.stack([moe.routing[1] for moe in layers])
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(counts)
            for moe, count in zip(layers, counts):
                moe.load = count if moe.load is None else moe.load + count
                balance = len(count) * (moe.load / moe.load.sum() * moe.routing[0]).sum()
                total = total + self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * moe.routing[2]
        return total

    @torch.no_grad()
    def balance_experts(self, applied: Tensor | float = 1.0) -> list[Tensor]:
        """After an optimizer step: how uneven each MoE layer was, the fullest expert's load over the mean load (1: even);
        moves the routers' biases by router_bias_update_rate towards even load (DeepSeek-V3), if it was `applied`."""
        uneven = []
        for moe in self._experts():
            if moe.load is not None:
                towards = (moe.load.mean() - moe.load).sign()
                moe.gate.e_score_correction_bias += applied * self.config.router_bias_update_rate * towards
                uneven.append(moe.load.max() / moe.load.mean())
                moe.load = None
        return uneven


# ---- counting -------------------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """{"total", "active", "embedding", "non_embedding", "matmul"} of a config, without allocating any weights.

    `embedding`: input embedding and output head (once if tied). `active`: what one token uses, all but the experts it
    does not visit. `matmul`: weights that a token is multiplied with, the head included and the look-up not:
    6 x matmul FLOPs train a token, attention's scores aside.
    """
    with torch.device("meta"):
        model = GPT(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    active = total - (experts - experts * config.num_experts_per_tok // config.num_experts if experts else 0)
    look_up = config.vocab_size * config.hidden_size
    embedding = look_up * (1 if config.tie_word_embeddings else 2)
    unused = sum(p.numel() for n, p in model.named_parameters()  # added, not multiplied: gains, biases, positions
                 if p.ndim == 1 or n.endswith("_proj_bias") or "embed_positions" in n or "relative_bias" in n)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj_bias"))
    unused -= biases - biases * config.num_experts_per_tok // config.num_experts if biases else 0
    return {"total": total, "active": active, "embedding": embedding, "non_embedding": total - embedding,
            "matmul": active - unused - (0 if config.tie_word_embeddings else look_up)}


def main() -> None:
    if sys.argv[1:]:
        raise UserError("python model.py takes nothing; weights go out with: python checkpoint.py export RUN FOLDER")
    for name, config in PRESETS.items():
        count = count_parameters(config)
        print(f"{name:19} {count['total']:17,} parameters, {count['active']:14,} active, "
              f"{count['non_embedding']:17,} without embeddings")


if __name__ == "__main__":
    run(main)
