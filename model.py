"""Chapter 2: the decoder. Llama 3, Qwen3, SmolLM3, gpt-oss, DeepSeek, Kimi and Qwen3-Next in one file.

The playbook starts from a proven dense model: pre-norm decoder, RMSNorm, SwiGLU, RoPE, grouped-query attention. Its
ablations (1B, 45B tokens, differences under 0.012 are noise): GQA with 2 to 8 query heads per KV head equals MHA
(2.195-2.197 against 2.204), MQA is clearly worse (2.236); tied embeddings save a fifth of a small model for nothing
(2.198, untied at equal size 2.243); NoPE in every 4th layer and document masking cost nothing in short context (2.195)
and pay in long context. Take a mixture of experts where memory is no limit, a hybrid for very long context.

    python model.py                                      # the presets: parameters, KV cache, RoPE, experts
    >>> logits = GPT(PRESETS["qwen3-0.6b"])(tokens)      # [B, T] int64 -> [B, T, vocab_size]

Only Llama? Read ModelConfig, dense_attention, document_attention, attention, rope_frequencies, Attention to GPT.
Modules and parameters have Hugging Face's names: published checkpoints load by a strict `load_state_dict`. Parameters
are fp32; `GPT.compute_dtype` is the dtype of activations and matrix products. Shapes: B batch, T sequence, S keys,
N = B*T, C hidden_size, H query heads, G key/value heads, D head_dim, V vocab_size, E experts, K experts per token, M
width of an MLP.
"""

import contextlib
import functools
import math
from collections import namedtuple
from dataclasses import dataclass, replace

from tokenizer import UserError, check_options, option, run

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint


ROPE = ("rope", "llama3", "yarn", "dual_chunk")
recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing random is drawn
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}  # SwiGLU, GEGLU, ReLU squared


def amount(default, help, low=0, high=1e6, group=""):
    """The option of a number; bounds keep absurd sizes from being allocated."""
    return option(default, help, low, high, group=group)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. Names are those of Hugging Face's config.json where it has them; a 0 often means "derive it"."""
    vocab_size: int = amount(4096, "number of tokens; the tokenizer decides", 1, 4e6, group="the model's size")
    hidden_size: int = amount(256, "width of the residual stream", 1)
    intermediate_size: int = amount(768, "width of the MLP", 1)
    num_hidden_layers: int = amount(4, "number of blocks", 1, 1000)
    num_attention_heads: int = amount(4, "query heads", 1, 4096)
    num_key_value_heads: int = amount(2, "as many as query heads: MHA; 1: MQA; between: GQA, a small KV cache", 1, 4096)
    head_dim: int = amount(0, "width of one head; 0: hidden_size / num_attention_heads")
    max_position_embeddings: int = amount(256, "context length trained on, in tokens", 1, 1e8)
    tie_word_embeddings: bool = option(True, "one matrix for input embedding and output head")
    rms_norm_eps: float = amount(1e-6, "added to the mean square before its root", 1e-12)
    initializer_range: float = amount(0.02, "deviation of matrices at the start; 0: 1/sqrt(hidden_size) (SmolLM2)")
    initializer: str = option("normal", "scaled: residual writes / sqrt(2 layers)", choices=("normal", "scaled"))
    layer_types: str = option("full", "full, sliding, chunked, linear, in turn: sliding,full", group="attention")
    sliding_window: int = amount(0, "tokens that a sliding layer sees, itself included")
    attention_chunk_size: int = amount(0, "tokens of the chunk that a chunked layer sees (Llama 4: 8192)")
    attention_sinks: bool = option(False, "a learned logit per head that takes probability from the tokens (gpt-oss)")
    attn_output_gate: bool = option(False, "a sigmoid gate on every head's output (Qwen3-Next)")
    attention_bias: bool = option(False, "biases on the q, k, v and o projections (gpt-oss)")
    qk_norm: bool = option(False, "RMSNorm of every query and key head before RoPE (Qwen3)")
    qk_norm_across_heads: bool = option(False, "that norm over all heads of a layer at once (OLMo 2)")
    rope_theta: float = amount(1e4, "RoPE's base; raise it for longer contexts", 2, 1e12, group="positions")
    position: str = option("rope", "llama3, yarn: rescaled", choices=(*ROPE, "none", "learned", "relative", "alibi"))
    partial_rotary_factor: float = amount(1.0, "share of each head that RoPE rotates (Qwen3-Next: 0.25)", 0, 1)
    no_rope_layer_interval: int = amount(0, "n: every n-th layer has no RoPE (RNoPE, SmolLM3: 4); 0: never")
    rope_factor: float = amount(1.0, "how many times longer llama3 and yarn make the context", 1)
    original_max_position_embeddings: int = amount(8192, "the context before llama3, yarn or dual_chunk extended it", 1)
    yarn_beta_fast: float = amount(32.0, "pairs that rotate more often in the original context are kept", 0.001)
    yarn_beta_slow: float = amount(1.0, "pairs that rotate less often than this are slowed by rope_factor", 0.001)
    yarn_truncate: bool = option(True, "round those two borders to whole pairs (gpt-oss: false)")
    yarn_mscale_all_dim: float = amount(0.0, "MLA: YaRN's temperature, on the whole head (DeepSeek: 1)")
    kv_lora_rank: int = amount(0, "width of the latent, which is cached; 0: no MLA", group="MLA (DeepSeek, Kimi)")
    q_lora_rank: int = amount(0, "the same for queries; 0: queries straight from the residual stream")
    qk_nope_head_dim: int = amount(0, "part of a query and key head without position")
    qk_rope_head_dim: int = amount(0, "part of it with RoPE, whose key all heads share")
    v_head_dim: int = amount(0, "width of a value head")
    linear_num_key_heads: int = amount(0, "0: num_key_value_heads", group="linear layers: Gated DeltaNet (Qwen3-Next)")
    linear_num_value_heads: int = amount(0, "0: num_attention_heads")
    linear_key_head_dim: int = amount(0, "0: head_dim")
    linear_value_head_dim: int = amount(0, "0: head_dim")
    linear_conv_kernel_dim: int = amount(4, "tokens that the short convolution sees", 1)
    num_experts: int = amount(0, "routed experts per layer; 0: a dense model", group="mixture of experts")
    num_experts_per_tok: int = amount(2, "experts that each token visits", 1)
    moe_intermediate_size: int = amount(0, "width of one expert; 0: intermediate_size / num_experts_per_tok")
    n_shared_experts: int = amount(0, "experts that every token visits")
    shared_expert_intermediate_size: int = amount(0, "their width together; 0: n_shared_experts of an expert's")
    shared_expert_gate: bool = option(False, "a sigmoid gate on the shared experts (Qwen3-Next)")
    first_k_dense_replace: int = amount(0, "leading layers that stay dense")
    scoring_func: str = option("softmax", "the router's scores (DeepSeek: sigmoid)", choices=("softmax", "sigmoid"))
    norm_topk_prob: bool = option(True, "scale the chosen experts' scores to a sum of 1")
    routed_scaling_factor: float = amount(1.0, "factor on those scores (DeepSeek)")
    n_group: int = amount(1, "groups of experts; a token uses experts of topk_group of them (DeepSeek-V3)", 1)
    topk_group: int = amount(1, "see n_group", 1)
    router_aux_loss_coef: float = amount(0.01, "weight of the load-balancing loss, over the global batch")
    router_bias_update_rate: float = amount(0.0, "step of the bias that balances without a loss (DeepSeek-V3: 0.001)")
    router_z_loss_coef: float = amount(0.0, "weight of the router's squared log-partition (ST-MoE: 0.001)")
    hidden_act: str = option("silu", "activation of the MLPs' gate", choices=ACTIVATIONS, group="details of the model")
    norm_position: str = option("pre", "post: OLMo 2; sandwich: both", choices=("pre", "post", "sandwich"))
    mlp_bias: bool = option(False, "biases on MLPs, experts and router (gpt-oss)")
    swiglu_limit: float = amount(0.0, "clamp of gpt-oss' SwiGLU (7); 0: the usual SwiGLU")
    norm_zero_centered: bool = option(False, "RMSNorm's gain is 1 + weight (Qwen3-Next)")
    final_logit_softcapping: float = amount(0.0, "c keeps logits below it by c tanh(x / c) (Gemma 2: 30); 0: off")

    def __post_init__(self):
        check_options(self)
        kinds, heads, groups = set(self.layer_types.split(",")), self.num_attention_heads, self.num_key_value_heads
        latent, experts, chosen = self.kv_lora_rank, self.num_experts, self.num_experts_per_tok
        parts = self.qk_nope_head_dim + self.qk_rope_head_dim
        head_dim = parts if latent else self.head_dim or self.hidden_size // heads
        derived = {"head_dim": head_dim, "moe_intermediate_size": max(1, self.intermediate_size // chosen)}
        if "linear" in kinds:
            derived |= {"linear_num_key_heads": groups, "linear_num_value_heads": heads,
                        "linear_key_head_dim": head_dim, "linear_value_head_dim": head_dim}
        derived = {name: value for name, value in derived.items()
                   if not getattr(self, name) or latent and name == "head_dim"}
        vars(self).update(derived, _derived=derived)  # a frozen class forbids only to write self.head_dim = ...
        for wrong, sentence in (
            (heads % groups, "num_key_value_heads must divide num_attention_heads: take one of "
             f"{[g for g in range(1, heads + 1) if heads % g == 0]}"),
            (not latent and "head_dim" in derived and self.hidden_size % heads,
             "hidden_size does not divide by num_attention_heads: change one of them or give head_dim"),
            (kinds - {"full", "sliding", "chunked", "linear"}, "layer_types may list full, sliding, chunked, linear"),
            ("sliding" in kinds and not self.sliding_window or "chunked" in kinds and not self.attention_chunk_size,
             "sliding layers need --sliding_window and chunked layers --attention_chunk_size, in tokens"),
            (self.position == "dual_chunk" and (self.attention_sinks or kinds & {"sliding", "chunked"}),
             "position dual_chunk works with neither sliding nor chunked layers nor sinks; take yarn"),
            (latent and (kinds != {"full"} or self.position in ("alibi", "relative", "dual_chunk") or self.qk_norm
                         or self.attention_sinks or self.attn_output_gate or not 0 < self.v_head_dim <= head_dim),
             "kv_lora_rank (MLA) works with full layers and rope, llama3 or yarn, without sinks, gate and qk_norm, and "
             "needs --qk_nope_head_dim, --qk_rope_head_dim and a --v_head_dim of at most their sum"),
            ("linear" in kinds and self.linear_num_value_heads % self.linear_num_key_heads,
             "linear_num_key_heads must divide linear_num_value_heads"),
            (experts % self.n_group or self.topk_group > self.n_group or 1 < self.n_group > experts // 2
             or experts and chosen > experts // self.n_group * self.topk_group,
             "n_group must cut num_experts into groups of 2 or more, of which a token has topk_group to choose from"),
            (self.qk_norm_across_heads and not self.qk_norm, "qk_norm_across_heads needs --qk_norm true"),
            (self.yarn_mscale_all_dim and not latent, "yarn_mscale_all_dim needs kv_lora_rank (MLA); leave it out"),
            (self.swiglu_limit and self.hidden_act != "silu", "swiglu_limit needs --hidden_act silu"),
            (self.position in ROPE and (self.rotary_dim % 2 or not self.rotary_dim),
             "RoPE rotates pairs: take an even head_dim (or qk_rope_head_dim) and partial_rotary_factor"),
        ):
            if wrong:
                raise UserError(sentence)

    @property
    def rotary_dim(self):
        """How many numbers of a head RoPE rotates."""
        return self.qk_rope_head_dim if self.kv_lora_rank else int(self.head_dim * self.partial_rotary_factor)

    def layer_type(self, layer):
        kinds = self.layer_types.split(",")
        return kinds[layer % len(kinds)]

    def uses_rope(self, layer):
        skipped = self.no_rope_layer_interval and (layer + 1) % self.no_rope_layer_interval == 0
        return self.position in ROPE and not skipped

    def change(self, **fields):
        """A copy with other fields; what was derived, such as head_dim, is derived again."""
        return replace(self, **dict.fromkeys(self._derived, 0) | fields)


_LLAMA3 = {"position": "llama3", "rope_theta": 5e5, "rms_norm_eps": 1e-5}
_SMOLLM2 = {"rope_theta": 1e5, "rms_norm_eps": 1e-5, "initializer_range": 0.0}
_QWEN3 = {"rope_theta": 1e6, "qk_norm": True}
_DEEPSEEK = {"rope_theta": 5e4, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
             "first_k_dense_replace": 1, "scoring_func": "sigmoid", "router_aux_loss_coef": 0.0,
             "router_bias_update_rate": 0.001}

# In order: vocabulary, width, MLP, layers, query heads, KV heads, head_dim (0: derived), context, tied embeddings.
PRESETS = {
    "laptop": ModelConfig(8192, 128, 384, 4, 2, 1, 0, 128, initializer_range=0.05),
    "llama-2-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 0, 4096, False, 1e-5),
    "llama-3.1-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 0, 131072, False, **_LLAMA3, rope_factor=8.0),
    "llama-3.2-1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 0, 131072, **_LLAMA3, rope_factor=32.0),
    "qwen3-0.6b": ModelConfig(151936, 1024, 3072, 28, 16, 8, 128, 40960, **_QWEN3),
    "qwen3-4b": ModelConfig(151936, 2560, 9728, 36, 32, 8, 128, 40960, **_QWEN3),
    "smollm2-135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 0, 8192, **_SMOLLM2),
    "smollm2-360m": ModelConfig(49152, 960, 2560, 32, 15, 5, 0, 8192, **_SMOLLM2),
    "smollm3-3b": ModelConfig(128256, 2048, 11008, 36, 16, 4, 0, 65536, rope_theta=5e6, no_rope_layer_interval=4),
    "gpt-oss-20b": ModelConfig(
        201088, 2880, 2880, 24, 64, 8, 64, 131072, False, 1e-5, layer_types="sliding,full", sliding_window=128,
        attention_sinks=True, attention_bias=True, mlp_bias=True, swiglu_limit=7.0, num_experts=32,
        num_experts_per_tok=4, moe_intermediate_size=2880, position="yarn", rope_theta=1.5e5, rope_factor=32.0,
        original_max_position_embeddings=4096, yarn_truncate=False),
    "qwen3-next-80b-a3b": ModelConfig(
        151936, 2048, 5632, 48, 16, 2, 256, 262144, False, layer_types="linear,linear,linear,full", qk_norm=True,
        attn_output_gate=True, norm_zero_centered=True, rope_theta=1e7, partial_rotary_factor=0.25, num_experts=512,
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
        num_experts_per_tok=10, moe_intermediate_size=512, n_shared_experts=1, shared_expert_gate=True),
    "moonlight-16b-a3b": ModelConfig(
        163840, 2048, 11264, 27, 16, 16, 0, 8192, False, 1e-5, **_DEEPSEEK, num_experts=64, num_experts_per_tok=6,
        moe_intermediate_size=1408, n_shared_experts=2, routed_scaling_factor=2.446),
    "kimi-k2": ModelConfig(
        163840, 7168, 18432, 61, 64, 64, 0, 131072, False, **_DEEPSEEK, q_lora_rank=1536, num_experts=384,
        num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1, routed_scaling_factor=2.827,
        position="yarn", rope_factor=32.0, original_max_position_embeddings=4096, yarn_beta_fast=1.0,
        yarn_mscale_all_dim=1.0),
}


# ---- attention ------------------------------------------------------------------------------------------------
# Packed sequences hold several documents, and attention must not cross from one to the next. `cu_seqlens` (int32, [M])
# lists where documents start in the flattened batch; N, its end, may be repeated to pad the list. The work grows with
# the sum of squared document lengths, not B*T^2. One operator, two routes: CUDA's variable-length flash kernel, and the
# CPU's flash kernel once per document. Elsewhere, and in rows too short for them, a dense mask does it.
#
# A window keeps the last W keys, the query's own included. A sink (gpt-oss) is a learned logit s per head that joins
# the softmax and is then dropped: with lse' = logaddexp(lse, s) the output is out * exp(lse - lse'). Passing out' and
# lse' to the flash backward gives exact dq, dk, dv, because it recomputes P = exp(score - lse') and
# delta = rowsum(dO * out'); what remains is ds = -sum_t exp(s - lse'_t) delta_t. Gating the output with
# sigmoid(lse - s) and ignoring lse's own gradient, as is often done, gets dq and dk wrong by a tenth and more.


def document_positions(cu_seqlens, tokens):
    """The position of each of N tokens in its document, from 0: [N]."""
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]


def distances(T, S, device):
    """How many tokens before a query a key is, negative after it: [T, S]; the queries are the last T of S tokens."""
    return torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)


def visible_keys(distance, positions, window=0, chunk=0):
    """bool [B or 1, 1, T, S]: a query sees itself and the keys before it in its document, its window, its chunk.
    `distance` [T, S] from the key to the query, `positions` [B or 1, T] of queries in documents."""
    if window:
        positions = positions.clamp(max=window - 1)
    if chunk:
        positions = positions % chunk
    return ((distance >= 0) & (distance <= positions[..., None]))[:, None]


def repeated(x, heads):
    """Keys or values [B, S, G, D], one for each query head; CUDA's kernel for fp32 does not share them."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


# The longest rows in which a CPU's batched products are faster than its flash kernel: up to 5 times with bfloat16.
DENSE_ROWS = {torch.bfloat16: 512, torch.float32: 128}


def fused_attention(q, k, v, mask=None, causal=False):
    """PyTorch's kernel for `dense_attention`, without a sink."""
    q, k, v = (x.transpose(1, 2) for x in (q, repeated(k, q.shape[2]), repeated(v, q.shape[2])))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)


def dense_attention(q, k, v, visible, bias=None, sink=None):
    """softmax(q k^T / sqrt(d) + mask) v, the definition of attention (Vaswani et al. 2017): any device and dtype.
    q [B, T, H, D], k [B, S, G, D], v [B, S, G, Dv], visible [B or 1, 1, T, S], bias [H, T, S] -> [B, T, H, Dv]"""
    S, G = k.shape[1:3]
    mask = torch.where(visible, 0.0 if bias is None else bias, -torch.inf).to(q.dtype)  # [B or 1, H or 1, T, S]
    if sink is None and not q.is_cpu:
        return fused_attention(q, k, v, mask)
    q = (q / q.shape[-1] ** 0.5).unflatten(2, (G, -1))  # a KV head g serves n = H / G query heads
    scores = torch.einsum("btgnd,bsgd->bgnts", q, k).flatten(1, 2) + mask  # [B, H, T, S]
    if sink is not None:  # one more score, whose value is zero
        scores = torch.cat((scores, sink.to(q.dtype)[:, None, None].expand_as(scores[..., :1])), -1)
    p = scores.softmax(-1)[..., :S].unflatten(1, (G, -1))
    return torch.einsum("bgnts,bsgd->bgntd", p, v).flatten(1, 2).transpose(1, 2)


def document_attention(q, k, v, cu_seqlens, max_length, window=0, sink=None):
    """softmax(q k^T / sqrt(d) + mask) v, causal in each document of a flattened batch; CPU, or bf16 and fp16 on CUDA.
    q [N, H, D], k and v [N, G, D], G divides H; cu_seqlens int32 [M] ascending from 0, padded with N; max_length:
    no document is longer (a constant in compiled code); window: see so many tokens, 0: all; sink [H]. [N, H, D]"""
    return _document_attention(q, k, v, cu_seqlens, max_length, window, sink)[0]


def _spans(cu_seqlens, window):
    """(queries, keys, mask) of whole documents, causal where the mask is None; with a window, of bands of them, so that
    the work grows as length times window."""
    starts = cu_seqlens.tolist()
    for start, end in zip(starts, starts[1:]):
        band = max(window, 128) if window else max(1, end - start)
        for first in range(start, end, band):  # none in the empty documents that pad cu_seqlens
            last, oldest = min(first + band, end), max(start, first - window + 1) if window else start
            mask = None
            if window and last - oldest > window:
                distance = distances(last - first, last - oldest, "cpu")
                mask = torch.where((distance >= 0) & (distance < window), 0.0, -torch.inf)
            yield slice(first, last), slice(oldest, last), mask


def _grouped(x, q, k, queries):
    """One document's [L, H or G, D] as the CPU kernel's [G, H/G, L, D], without a copy; short ones in fp32, which is
    faster there: up to 2 times at 100 tokens, 0.7 times at 1,000."""
    x = x if queries.stop - queries.start >= 512 else x.float()
    return x.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).expand(-1, q.shape[1] // k.shape[1], -1, -1)


@torch.library.custom_op("nanoplaybook::document_attention", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_length, SymInt window, Tensor? sink)"
    " -> (Tensor, Tensor)"))
def _document_attention(q, k, v, cu_seqlens, max_length, window, sink):
    """Output [N, H, D] and the logarithm of each softmax's sum [H, N], fp32."""
    if q.is_cuda:  # window_size_left counts the tokens before the query; -1: all of them
        out, lse = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, False,
            window_size_left=window - 1, window_size_right=0)[:2]
    else:
        out, lse = _empty_outputs(q)
        for queries, keys, mask in _spans(cu_seqlens, window):
            out_span, lse_span = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_grouped(x, q, k, queries) for x in (q[queries], k[keys], v[keys])),
                0.0, mask is None, attn_mask=mask)
            out[queries], lse[:, queries] = out_span.permute(2, 0, 1, 3).flatten(1, 2), lse_span.flatten(0, 1)
    if sink is not None:
        lse_with_sink = torch.logaddexp(lse, sink.float()[:, None])
        out = out * (lse - lse_with_sink).exp().t()[..., None].to(out.dtype)
        lse = lse_with_sink
    return out, lse


@_document_attention.register_fake
def _empty_outputs(q, *rest):
    return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


@torch.library.custom_op("nanoplaybook::document_attention_backward", mutates_args=(), schema=(
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_length, "
    "SymInt window) -> (Tensor, Tensor, Tensor)"))
def _document_attention_backward(grad, q, k, v, out, lse, cu_seqlens, max_length, window):
    if q.is_cuda:
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True,
            q.new_zeros(2, dtype=torch.uint64), q.new_empty(0),  # the state that dropout would need
            window_size_left=window - 1, window_size_right=0)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for queries, keys, mask in _spans(cu_seqlens, window):
        dq_span, dk_span, dv_span = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_grouped(x, q, k, queries) for x in (grad[queries], q[queries], k[keys], v[keys], out[queries])),
            lse[:, queries].unflatten(0, (k.shape[1], -1)), 0.0, mask is None, attn_mask=mask)
        dq[queries] = dq_span.permute(2, 0, 1, 3).flatten(1, 2)
        dk[keys].add_(dk_span.sum(1).transpose(0, 1))  # over a KV head's query heads; bands overlap in keys
        dv[keys].add_(dv_span.sum(1).transpose(0, 1))
    return dq, dk, dv


_document_attention_backward.register_fake(lambda grad, *qkv_and_rest: tuple(map(torch.empty_like, qkv_and_rest[:3])))


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.max_length, ctx.window, sink = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, sink)


def _backward(ctx, grad, _):
    q, k, v, out, lse, cu_seqlens, sink = ctx.saved_tensors
    dq, dk, dv = _document_attention_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.max_length, ctx.window)
    dsink = None
    if sink is not None:
        delta = (grad.float() * out.float()).sum(-1).t()  # [H, N]
        dsink = -((sink.float()[:, None] - lse).exp() * delta).sum(1).to(sink.dtype)
    return dq, dk, dv, None, None, None, dsink


_document_attention.register_autograd(_backward, setup_context=_save_for_backward)


# Where the tokens of a pass are, for all layers. end: tokens of a row, this pass included; positions [B or 1, T] in the
# document; rope: cos and sin of RoPE's angles, [T, 1, R/2] each; cu_seqlens: document starts; chunks: those of chunked
# layers; distance [T, capacity]: from all that a compiled step's cache has room for. The last four may be None.
Layout = namedtuple("Layout", "end positions rope cu_seqlens chunks distance")


def attention(q, k, v, layout, window=0, chunk=0, sink=None, bias=None):
    """`dense_attention` by the cheapest kernel: q [B, T, H, D] are the last T tokens of k and v [B, S, G, D]; without a
    cache S = T. `bias` maps distances [T, S] to what is added to the scores, [H, T, S]. Returns [B, T, H, D]."""
    T, S = q.shape[1], k.shape[1]
    if _watched is not None and layout.end == T:
        _watched[0].append(attention_extremes(q, k, layout.positions, window, chunk))
    starts = layout.chunks if chunk else layout.cu_seqlens
    short = q.is_cpu and sink is None and 1 < T == S <= DENSE_ROWS.get(q.dtype, 0)
    if bias is None and starts is not None and not short:
        if q.is_cpu or q.is_cuda and q.element_size() == 2 and q.shape[-1] % 8 == 0:  # what the kernels support
            return document_attention(*(x.flatten(0, 1) for x in (q, k, v)), starts, T, window, sink).view_as(q)
    one = T == 1 and bias is sink is None
    if one:  # a KV head's H / G query heads become its queries, so that keys and values are read once
        q = q[:, 0].unflatten(1, (k.shape[2], -1)).transpose(1, 2)  # [B, H / G, G, D]
    if starts is layout.distance is bias is sink is None and not chunk and not short and (one or S == T and not window):
        y = fused_attention(q, k, v, causal=not one)
    else:
        distance = distances(T, S, q.device) if layout.distance is None else layout.distance
        visible = visible_keys(distance, layout.positions, window, chunk)
        y = dense_attention(q, k, v, visible, bias and bias(distance), sink)
    return y.transpose(1, 2).flatten(1, 2)[:, None] if one else y


_watched = None


@contextlib.contextmanager
def watch_attention():
    """Inside, passes are eager: each softmax attention appends its `attention_extremes` to the first list, and each
    piece of `token_nats` its largest absolute logit to the second."""
    global _watched
    _watched = [], []
    try:
        yield _watched
    finally:
        _watched = None


@torch.no_grad()
def attention_extremes(q, k, positions, window, chunk):
    """Of the first row's last queries (128 at most): [largest score, smallest and largest entropy of a head in nats,
    mean share of attention that goes to the first token of the document, by those later ones that see it].
    Growing scores and entropies that fall to 0 come before a divergence (Zhai et al. 2023). Much on a first token of
    any content is a sink (Xiao et al. 2024): a head must look somewhere and has nothing to find."""
    q, k = q[0, -128:].float(), repeated(k, q.shape[2])[0].float()  # [t, H, D], [T, H, D]
    distance, positions = distances(len(q), len(k), q.device), positions[:1, -128:]
    visible = visible_keys(distance, positions, window, chunk)[0]  # [1, t, T]
    scores = (torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1)  # [H, t, T]
    entropy = torch.special.entr(p).sum(-1).mean(-1)  # [H]
    first = visible & (distance > 0) & (distance == positions[..., None])  # [1, t, T]
    return torch.stack((scores.max(), entropy.min(), entropy.max(), (p.mean(0) * first).sum() / first.sum()))


# ---- positions ------------------------------------------------------------------------------------------------
def rope_frequencies(config, device="cpu"):
    """RoPE (Su et al. 2021): pair i of R numbers rotates by theta^(-2i/R) radians a token. [R/2]
    The base theta belongs to the context (`rope_reach`): SmolLM3 took 50k for 4k tokens, 2M for 32k and 5M for 64k.
    `llama3` and `yarn` slow the pairs that rotate seldom in the original context down by `rope_factor`. Llama 3.1
    blends by rotations, from 1 to 4; YaRN (Peng et al. 2023) by the pair, from yarn_beta_slow to yarn_beta_fast."""
    R, theta, context = config.rotary_dim, config.rope_theta, config.original_max_position_embeddings
    pairs, keep = torch.arange(R // 2, device=device).float(), 1.0
    frequencies = theta ** (-2 * pairs / R)
    if config.position == "llama3":
        keep = ((context * frequencies / math.tau - 1) / 3).clamp(0, 1)
    elif config.position == "yarn":  # the numbers of the pairs that rotate so often in the original context
        low, high = (R * math.log(context / (math.tau * rotations)) / (2 * math.log(theta))
                     for rotations in (config.yarn_beta_fast, config.yarn_beta_slow))
        if config.yarn_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        keep = 1 - ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / config.rope_factor)


def rope_reach(config):
    """The longest context, 2^18 tokens at most, at every distance m of which RoPE makes a query score a key like itself
    higher, on average, than a random one: sum_i cos(m f_i) >= 0 for the frequencies f (Men et al. 2024)."""
    angles = torch.outer(torch.arange(2.0**18), rope_frequencies(config))
    return int((angles.cos().sum(1) >= 0).int().cumprod(0).sum())  # how many before the first negative one


def yarn_temperature(config):
    """YaRN's factor on the part of queries and keys that RoPE rotates; with yarn_mscale_all_dim on whole heads."""
    if config.position != "yarn":
        return 1.0
    return 0.1 * (config.yarn_mscale_all_dim or 1) * math.log(config.rope_factor) + 1


def apply_rope(x, cos, sin):
    """RoPE (Su et al. 2021): rotates the pairs (x[i], x[i + R/2]) of x [B, T, H, D] by angles whose cosines and sines
    are given, [T, 1, R/2]; numbers from R on, the rotated part of a head, stay."""
    half = cos.shape[-1]
    x, rest = x.split((2 * half, x.shape[-1] - 2 * half), -1)
    y = x * torch.cat((cos, cos), -1) + torch.cat(x.split(half, -1)[::-1], -1) * torch.cat((-sin, sin), -1)
    return torch.cat((y, rest), -1) if rest.numel() else y


def alibi(heads, distance):
    """ALiBi (Press et al. 2021): head h of H loses 2^(-8h/H) per token of distance [T, S]. Returns [H, T, S]."""
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device=distance.device) / heads)
    return slopes[:, None, None] * -distance


def distance_bucket(distance):
    """T5's relative positions (Raffel et al. 2020), causal, in 32 buckets: 16 exact, 16 logarithmic up to 128."""
    log = 16 + ((distance.clamp(min=1) / 16).log() / math.log(8) * 16).long()
    return torch.where(distance < 16, distance.clamp(min=0), log.clamp(max=31))


def dual_chunk_attention(q, k, v, positions, frequencies, context, distance=None):
    """Dual chunk attention (An et al. 2024): reads beyond the trained context c without training. For inference only.
    Keys are rotated by their place in their piece of s = 3c/4 positions. So are queries for keys of their own piece;
    for the piece before, queries count on from s, up to c - 1, which keeps the c - s nearest distances true; for all
    others they stand at c - 1. q [B, T, H, D] is not rotated yet and ends with k, v [B, S, G, D]."""
    size = max(1, 3 * context // 4)
    distance = distances(q.shape[1], k.shape[1], q.device) if distance is None else distance
    k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
    place = positions % size
    at = torch.stack((place, (place + size).clamp(max=context - 1), torch.full_like(place, context - 1)))
    angles = (at[..., None] * frequencies)[..., None, :]  # [3, B or 1, T, 1, R/2]
    q = apply_rope(q.expand(3, -1, -1, -1, -1), angles.cos().to(q.dtype), angles.sin().to(q.dtype))
    scores = torch.einsum("nbthd,bshd->nbhts", q, k).float() / q.shape[-1] ** 0.5
    at = positions[:, None, :, None]
    apart = (at // size - (at - distance) // size).clamp(0, 2)  # [B or 1, 1, T, S], in pieces
    scores = scores.gather(0, apart.expand(1, *scores.shape[1:]))[0]
    p = scores.masked_fill(~visible_keys(distance, positions), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", p.to(v.dtype), v)


class KVCache:
    """What each layer keeps of `length` tokens. Full attention: keys and values [B, capacity, G, D]; MLA: latent and
    the shared key's RoPE part; sliding and chunked: what a later token can see; linear: a fixed state.
    With `rows` it is static: no shape or address depends on `length`, then a tensor, so that one compiled step makes
    every token. All layers keep all tokens; masks hide what is not written yet."""
    def __init__(self, capacity, rows=0):
        self.capacity, self.rows = capacity, rows
        self.length, self.layers = 0, {}  # length in tokens; `GPT.forward` increases it

    def append(self, layer, *new, sees=0):
        """Stores new [B, T, ...] and returns all that is stored. `sees`: so many tokens a query sees; 0: all."""
        sees = 0 if self.rows else sees
        if layer not in self.layers:  # zeros, because a masked key still multiplies its value, by 0
            self.layers[layer] = [x.new_zeros(len(x), 0 if sees else self.capacity, *x.shape[2:]) for x in new]
        old = self.layers[layer]
        if torch.is_tensor(self.length):
            return [stored.index_copy_(1, self.length, x) for stored, x in zip(old, new)]
        if sees:
            seen = [torch.cat(pair, 1) for pair in zip(old, new)]
            self.layers[layer] = [x[:, max(0, x.shape[1] - sees + 1):] for x in seen]
            return seen
        end = self.length + new[0].shape[1]
        for stored, x in zip(old, new):
            stored[:, self.length:end] = x
        return [stored[:, :end] for stored in old]


# ---- the modules ----------------------------------------------------------------------------------------------
def multiply(x, weight, bias=None):
    """x @ weight.T + bias in the dtype of x: the casts that autocast hides. Most CPUs take hundreds of times longer in
    float16: there the products are float32's, rounded. They multiply few fp32 rows slowly: those stand on the right, a
    single one with a row of zeros, or one thread would compute it."""
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return multiply(x.float(), weight.half().float(), bias).half()
    weight, rows = weight.to(x.dtype), x.numel() // x.shape[-1]
    if bias is None and x.is_cpu and x.dtype == torch.float32 and rows <= 32:
        right = F.pad(x.flatten(0, -2), (0, 0, 0, int(rows == 1)))
        return F.linear(weight, right)[:, :rows].t().unflatten(0, x.shape[:-1])
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """`multiply` with a weight of its own."""
    def forward(self, x):
        return multiply(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), or * (1 + weight); the mean in fp32."""
    def __init__(self, config, size, eps=None):
        super().__init__(size, eps or config.rms_norm_eps)
        self.zero_centered = config.norm_zero_centered  # so that weight decay pulls the gain to 1 instead of 0
        if self.zero_centered:
            nn.init.zeros_(self.weight)

    def forward(self, x):
        if self.zero_centered:  # in fp32, because 1 + a small weight is 1 in bf16
            return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1, self.eps).to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), with MHA and MQA as its ends; full, sliding or chunked."""
    def __init__(self, config, layer):
        super().__init__()
        C, H, G, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        kind, bias = config.layer_type(layer), config.attention_bias
        self.config, self.layer, self.uses_rope = config, layer, config.uses_rope(layer)
        self.window = config.sliding_window * (kind == "sliding")
        self.chunk = config.attention_chunk_size * (kind == "chunked")
        self.q_proj = Linear(C, H * D * (1 + config.attn_output_gate), bias)
        self.k_proj, self.v_proj = Linear(C, G * D, bias), Linear(C, G * D, bias)
        self.o_proj = Linear(H * D, C, bias)
        if config.qk_norm:
            heads = (H, G) if config.qk_norm_across_heads else (1, 1)
            self.q_norm, self.k_norm = (RMSNorm(config, n * D) for n in heads)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None
        self.relative_bias = nn.Embedding(32, H) if config.position == "relative" else None

    def bias(self, distance):
        """What the scores gain where positions are not RoPE's: distance [T, S] -> [H, T, S]."""
        if self.relative_bias is None:
            return alibi(self.config.num_attention_heads, distance)
        return self.relative_bias(distance_bucket(distance)).permute(2, 0, 1)

    def forward(self, x, layout, cache):
        B, T, _ = x.shape
        c, D = self.config, self.config.head_dim
        q = self.q_proj(x).view(B, T, c.num_attention_heads, -1)  # [B, T, H, D]
        q, *gate = q.split(D, -1)
        k, v = self.k_proj(x).view(B, T, -1, D), self.v_proj(x).view(B, T, -1, D)  # [B, T, G, D]
        if c.qk_norm:
            q, k = (norm(y.reshape(B, T, -1, *norm.normalized_shape)).view_as(y)
                    for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if self.uses_rope:
            k = apply_rope(k, *layout.rope)
        if cache:
            k, v = cache.append(self.layer, k, v, sees=self.window or self.chunk)
        if self.uses_rope and c.position == "dual_chunk":
            y = dual_chunk_attention(q, k, v, layout.positions, rope_frequencies(c, x.device),
                                     c.original_max_position_embeddings, layout.distance)
        else:
            q = apply_rope(q, *layout.rope) if self.uses_rope else q
            bias = self.bias if c.position in ("alibi", "relative") else None
            y = attention(q, k, v, layout, self.window, self.chunk, self.sinks, bias)
        if gate:
            y = y * gate[0].sigmoid()
        return self.o_proj(y.flatten(2))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads come from one small latent.
    The cache holds that latent and the one key part with position. For a new token, kv_b_proj is not applied to old
    ones but moved into the query, (q_nope W_k) . latent, and behind the weighted sum: all heads then share one key."""
    def __init__(self, config, layer):
        super().__init__()
        C, H, R, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
        self.config, self.layer = config, layer
        if rank:
            self.q_a_proj = Linear(C, rank, config.attention_bias)
            self.q_a_layernorm = RMSNorm(config, rank, 1e-6)  # 1e-6 whatever rms_norm_eps is, as published
            self.q_b_proj = Linear(rank, H * config.head_dim, False)
        else:
            self.q_proj = Linear(C, H * config.head_dim, False)
        self.kv_a_proj_with_mqa = Linear(C, R + config.qk_rope_head_dim, config.attention_bias)
        self.kv_a_layernorm = RMSNorm(config, R, 1e-6)
        self.kv_b_proj = Linear(R, H * (config.qk_nope_head_dim + config.v_head_dim), False)
        self.o_proj = Linear(H * config.v_head_dim, C, config.attention_bias)

    def rotate(self, x, layout):
        """RoPE on x [B, T, heads, qk_rope_head_dim], whose pairs are neighbours in DeepSeek: (x[0], x[1]) ..."""
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return apply_rope(x, *layout.rope) if self.config.uses_rope(self.layer) else x

    def forward(self, x, layout, cache):
        B, T, _ = x.shape
        c, H, R = self.config, self.config.num_attention_heads, self.config.kv_lora_rank
        value_parts = [c.qk_nope_head_dim, c.v_head_dim]
        temperature = yarn_temperature(c) ** 2 if c.yarn_mscale_all_dim else 1.0
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = (q * temperature).view(B, T, H, -1).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([R, c.qk_rope_head_dim], -1)
        q_rope, k_rope = self.rotate(q_rope, layout), self.rotate(k_rope[:, :, None], layout)  # [B, T, H or 1, Dr]
        latent = self.kv_a_layernorm(latent)  # [B, T, R]
        if cache:
            latent, k_rope = cache.append(self.layer, latent, k_rope)
        if cache and T == 1:
            w_k, w_v = self.kv_b_proj.weight.to(x.dtype).view(H, -1, R).split(value_parts, 1)
            q = torch.cat((torch.einsum("bthd,hdr->bthr", q_nope, w_k), q_rope), -1)  # [B, 1, H, R + Dr]
            k = torch.cat((latent[:, :, None], k_rope), -1)  # [B, S, 1, R + Dr]
            y = attention(q * (k.shape[-1] / c.head_dim) ** 0.5, k, latent[:, :, None], layout)
            y = torch.einsum("bthr,hdr->bthd", y, w_v)
        else:
            k_nope, v = self.kv_b_proj(latent).view(B, -1, H, sum(value_parts)).split(value_parts, -1)
            q = torch.cat((q_nope, q_rope), -1)
            k = torch.cat((k_nope, k_rope.expand(-1, -1, H, -1)), -1)
            v = F.pad(v, (0, c.head_dim - c.v_head_dim))  # flash kernels want values as wide as keys
            y = attention(q, k, v, layout)[..., :c.v_head_dim]
        return self.o_proj(y.flatten(2))


def gated_delta_rule(q, k, v, decay, beta, state):
    """Gated DeltaNet's recurrence (Yang et al. 2024) in chunks of 64: outputs [B, T, H, Dv] and the last state, fp32.
    Token by token: S <- e^decay S; S <- S + k (beta (v - S^T k))^T; o = S^T q. q, k [B, T, H, Dk], v [B, T, H, Dv],
    decay <= 0 and beta [B, T, H], state S [B, H, Dk, Dv]. The corrections of a chunk's tokens solve one triangular
    system (the UT transform); only S passes from chunk to chunk. A decay of -10,000 forgets exactly: e^-10000 is 0."""
    T, size = q.shape[1], min(64, q.shape[1])

    def chunks(x):  # [B, T, H, ...] -> [B, H, chunks, size, ...], padded with zeros, which change no state
        return F.pad(x.float().movedim(1, -1), (0, -T % size)).unflatten(-1, (-1, size)).movedim((-2, -1), (2, 3))

    q, k, v, decay, beta = (chunks(x) for x in (q, k, v, decay, beta[..., None]))
    causal = torch.ones(size, size, device=q.device).tril()
    # sums[i, j]: the decays after j up to i, and no earlier one; CUDA's cumsum of floats is not deterministic
    sums = causal @ (causal.tril(-1) * decay[..., :, None])
    between = sums.exp() * causal
    reach = (sums[..., :1] + decay[..., :1, None]).exp()  # from the chunk's start to i
    new, seen = torch.linalg.solve_triangular(  # what to write, and what the old state already holds
        (k * beta @ k.transpose(-1, -2)) * between, beta * torch.cat((v, k * reach), -1), upper=False,
        unitriangular=True).split([v.shape[-1], k.shape[-1]], -1)
    scores, q, k = (q @ k.transpose(-1, -2)) * between, q * reach, k * between[..., -1, :, None]
    outputs = []
    for n in range(q.shape[2]):
        write = new[:, :, n] - seen[:, :, n] @ state
        outputs.append(q[:, :, n] @ state + scores[:, :, n] @ write)
        state = state * reach[:, :, n, -1:] + k[:, :, n].transpose(-1, -2) @ write
    return torch.cat(outputs, 2)[:, :, :T].transpose(1, 2), state


class GatedDeltaNet(nn.Module):
    """Linear attention with a gated delta rule (Qwen3-Next's linear layers); its memory does not grow with the text."""
    def __init__(self, config, layer):
        super().__init__()
        C, G, H = config.hidden_size, config.linear_num_key_heads, config.linear_num_value_heads
        D, V = config.linear_key_head_dim, config.linear_value_head_dim
        self.layer, self.sizes, channels = layer, (G, H, D, V), 2 * G * D + H * V
        self.in_proj_qkvz = Linear(C, channels + H * V, False)
        self.in_proj_ba = Linear(C, 2 * H, False)
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(0.01, 16).log())
        self.norm = RMSNorm(config.change(norm_zero_centered=False), V)
        self.out_proj = Linear(H * V, C, False)

    def forward(self, x, layout, cache):
        (B, T, _), (G, H, D, V) = x.shape, self.sizes
        *qkv, z = self.in_proj_qkvz(x).view(B, T, G, -1).split([D, D, H // G * V, H // G * V], -1)  # by key head
        b, a = (y.reshape(B, T, H).float() for y in self.in_proj_ba(x).view(B, T, G, -1).chunk(2, -1))
        mixed = torch.cat([y.flatten(2) for y in qkv], -1)  # [B, T, channels]
        kernel, y = self.conv1d.weight[:, 0].t().to(x.dtype), 0  # [kernel, channels]
        tail, state = cache and cache.layers.get(self.layer) or (
            mixed.new_zeros(B, len(kernel) - 1, mixed.shape[-1]), torch.zeros(B, H, D, V, device=x.device))
        mixed = torch.cat((tail, mixed), 1)
        for start, weight in enumerate(kernel):  # a causal convolution inside documents
            inside = layout.positions >= len(kernel) - 1 - start  # [B or 1, T]
            y = y + mixed[:, start:start + T] * inside[..., None] * weight
        q, k, v = F.silu(y).split([G * D, G * D, H * V], -1)
        q, k = (repeated(y.float().view(B, T, G, D), H) for y in (q, k))
        q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
        decay = -self.A_log.float().exp() * F.softplus(a + self.dt_bias)
        decay = decay.masked_fill((layout.positions == 0)[..., None], -1e4)  # a document starts with an empty state
        y, after = gated_delta_rule(q * D ** -0.5, k, v.reshape(B, T, H, V), decay, b.sigmoid(), state)
        if cache:  # in place: a compiled step knows the addresses
            cache.layers.setdefault(self.layer, (tail, state))
            tail.copy_(mixed[:, T:])
            state.copy_(after)
        y = self.norm(y.to(x.dtype)) * F.silu(z.reshape(B, T, H, V))
        return self.out_proj(y.flatten(2))


def gated(gate, up, config):
    """act(gate) * up (Shazeer 2020); with swiglu_limit gpt-oss' variant: clamped, 1.702 steep, and up raised by one."""
    if limit := config.swiglu_limit:
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-limit, limit) + 1)
    return ACTIVATIONS[config.hidden_act](gate) * up


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""
    def __init__(self, config, width):
        super().__init__()
        self.config = config
        self.gate_proj = Linear(config.hidden_size, width, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, width, config.mlp_bias)
        self.down_proj = Linear(width, config.hidden_size, config.mlp_bias)

    def forward(self, x):
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.config))


class Router(Linear):
    """Scores every expert and picks K of them for each token."""
    def __init__(self, config):
        super().__init__(config.hidden_size, config.num_experts, config.mlp_bias)
        self.config = config
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))  # moved by `balance_experts`

    def forward(self, x):
        """x [N, C] -> weights and indices of the chosen experts [N, K], all scores and logits [N, E]; in fp32."""
        c = self.config
        logits = super().forward(x.float())
        scores = logits.softmax(-1) if c.scoring_func == "softmax" else logits.sigmoid()
        choice = scores.detach() + self.e_score_correction_bias.float()  # the bias decides who, not how much
        if c.n_group > 1:  # DeepSeek-V3: only the groups whose two best experts are best
            groups = choice.view(len(x), c.n_group, -1)
            best = groups.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices  # [N, topk_group]
            choice = (groups + torch.full_like(groups[..., 0], -torch.inf).scatter(1, best, 0.0)[..., None]).flatten(1)
        index = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(1, index)
        if c.norm_topk_prob:  # of a softmax, this is the softmax over the chosen experts
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
    def __init__(self, config):
        super().__init__()
        C, E, M = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.config = config
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * M, C))  # gate first, then up
        self.down_proj = nn.Parameter(torch.empty(E, C, M))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * M)) if config.mlp_bias else None
        self.down_proj_bias = nn.Parameter(torch.zeros(E, C)) if config.mlp_bias else None

    def forward(self, x, weights, index, counts):
        """x [N, C], weights and index [N, K], counts [E] of the tokens of each expert -> [N, C]."""
        expert, order = index.flatten().sort(stable=True)  # [N*K], expert after expert
        inverse, ends = order.argsort(), counts.int().cumsum(0, dtype=torch.int32)
        rows = _Reorder.apply(x.repeat_interleave(index.shape[1], 0), order, inverse)  # [N*K, C]

        def product(x, weight, bias):  # row n times the weight [E, out, in] of its expert
            weight = weight.to(x.dtype)
            if all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):  # what grouped_mm requires of rows
                y = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
            else:
                y = torch.cat([F.linear(part, w) for part, w in zip(x.split(counts.int().tolist()), weight)])
            if bias is not None:  # bias[expert] as a product, whose backward needs no atomics
                y = y + F.one_hot(expert, len(bias)).to(x.dtype) @ bias.to(x.dtype)
            return y

        gate, up = product(rows, self.gate_up_proj, self.gate_up_proj_bias).chunk(2, -1)
        y = product(gated(gate, up, self.config), self.down_proj, self.down_proj_bias)
        y = _Reorder.apply(y, inverse, order).view(*index.shape, -1)
        return (y * weights.to(y.dtype)[..., None]).sum(1)


class MoE(nn.Module):
    """Mixture of experts: a router, its experts, and shared experts for every token (DeepSeekMoE, Dai et al. 2024).
    After a pass in training, `routing` holds (share of the scores [E], tokens of each expert [E], mean squared
    log-partition) for `GPT.routing_loss`, and `load` the tokens of each expert in this step so far."""
    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.shared_expert_intermediate_size or config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config, width) if width else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, False) if width and config.shared_expert_gate else None
        self.routing, self.load = None, None

    def forward(self, x):
        flat = x.flatten(0, 1)  # [N, C]
        weights, index, scores, logits = self.gate(flat)
        counts = torch.zeros_like(scores[0]).index_add(0, index.flatten(), torch.ones_like(weights).flatten())
        if self.training and torch.is_grad_enabled():
            self.routing = (scores / scores.sum(-1, keepdim=True)).mean(0), counts, logits.logsumexp(-1).square().mean()
        y = self.experts(flat, weights, index, counts)
        if self.shared_experts is not None:
            shared = self.shared_experts(flat)
            y = y + (shared if self.shared_expert_gate is None else shared * self.shared_expert_gate(flat).sigmoid())
        return y.view_as(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm. A linear layer has `linear_attn` instead of `self_attn`.
    `norm_position` post is OLMo 2's x + norm(attention(x)), which keeps a branch's output small; Vaswani et al. (2017)
    normalised the sum. Sandwich is Gemma 2's, before and after. Hugging Face's post_attention_layernorm is the MLP's
    norm in pre-norm models, and attention's in the others."""
    def __init__(self, config, layer):
        super().__init__()
        self.norm_position = config.norm_position

        def norm(*positions):
            return RMSNorm(config, config.hidden_size) if self.norm_position in positions else nn.Identity()

        self.input_layernorm = norm("pre", "sandwich")
        if config.layer_type(layer) == "linear":
            self.linear_attn = GatedDeltaNet(config, layer)
        else:
            self.self_attn = (LatentAttention if config.kv_lora_rank else Attention)(config, layer)
        self.post_attention_layernorm = norm("pre", "post", "sandwich")
        self.pre_feedforward_layernorm = norm("sandwich")
        sparse = config.num_experts and layer >= config.first_k_dense_replace
        self.mlp = MoE(config) if sparse else MLP(config, config.intermediate_size)
        self.post_feedforward_layernorm = norm("post", "sandwich")

    def forward(self, x, layout, cache):
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        y = mixer(self.input_layernorm(x), layout, cache)
        if self.norm_position == "pre":
            x = x + y
            y = self.post_attention_layernorm(x)
        else:
            x = x + self.post_attention_layernorm(y)
            y = self.pre_feedforward_layernorm(x)
        return x + self.post_feedforward_layernorm(self.mlp(y))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":  # absolute positions (Vaswani et al. 2017, GPT-2), counted in each document
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, config.hidden_size)


def soft_capped(logits, cap):
    """c tanh(x / c), which keeps logits below c (Gemma 2); the same logits for a c of 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def pieces_of(*tensors):
    """Pieces of tensors [N, ...] whose logits exist at one time: a CPU's cache holds about 512 tokens'."""
    return zip(*(tensor.split(2048 if tensor.is_cuda else 512) for tensor in tensors))


def token_nats(x, targets, weight, cap):
    """The loss: negative log-likelihoods [P] in fp32, in nats, 0 where the target is -100; x [P, C], the head's weight
    [V, C]. Pre-training and SFT compute the same in `HeadLoss`, with the gradients."""
    logits = soft_capped(multiply(x, weight).float(), cap)
    if _watched is not None:
        _watched[1].append(logits.abs().max())
    return F.cross_entropy(logits, targets, reduction="none")


def losses_and_slope(x, weight, targets, cap, z):
    """Of x [P, C], the head's weight [V, C] and targets [P] (-100 counts as 0): nats and log(Z) in fp32, [P, 1] each,
    and the gradient [P, V] of nats + z log(Z)^2 by the logits without their soft-cap, in the dtype of x.
    The squared log-partition (PaLM) keeps logits from drifting. The playbook saw no effect (2.200 without, 2.194 with)
    and left it out; OLMo 2 trains with a z of 1e-5."""
    dtype, logits = x.dtype, soft_capped(F.linear(x, weight).float(), cap)
    at = torch.arange(len(targets), device=targets.device)[:, None], targets[:, None].clamp(min=0)
    if torch.compiler.is_compiling():  # the same twice: this is fused into passes that store nothing but the slope
        log_z = logits.logsumexp(-1, True)
        p = (logits - log_z).exp()
    else:  # eager, this needs a third of the time
        p = logits.softmax(-1)
        log_z = logits.amax(-1, True) - p.amax(-1, True).log()
    nats, factor = log_z - logits[at], 1 + 2 * z * log_z
    slope = (p * factor if z else p).to(dtype)
    slope[at] = (factor * (-nats).exp() - 1).to(dtype)  # rounded once: p of the target may be almost 1
    if cap:
        slope *= 1 - (logits / cap).square()  # the derivative of c tanh(x / c) is 1 - tanh^2
    return nats, log_z, slope


class HeadLoss(torch.autograd.Function):
    """x [N, C], the head's weight [V, C], targets [N] -> (sum of nats + z log(Z)^2, nats [N, 1] without gradient). The
    forward pass makes the gradients, piece by piece: no [N, V] is stored. Backward scales them in place, once."""
    @staticmethod
    def forward(ctx, x, weight, targets, cap, z, of_piece):
        w, grad_w = weight.to(x.dtype), torch.zeros_like(weight, dtype=torch.float32)
        counts, grad_x = (targets >= 0)[:, None], torch.empty_like(x)
        nats, log_z = torch.empty(2, len(x), 1, device=x.device)
        # Results have their places before the loop: made in it, they would split a CPU's heap between large logits.
        for h, t, *places in pieces_of(x * counts, targets, nats, log_z, grad_x):
            *found, slope = of_piece(h, w, t, cap, z)
            for place, value in zip(places, (*found, slope @ w)):
                place.copy_(value)
            grad_w += slope.t() @ h
            del slope  # before the next piece
        nats, log_z, grad_x = (found * counts for found in (nats, log_z, grad_x))
        ctx.save_for_backward(grad_x, grad_w)
        ctx.mark_non_differentiable(nats)
        return (nats + z * log_z.square()).sum(), nats

    @staticmethod
    def backward(ctx, grad, _):
        return *(gradient.mul_(grad) for gradient in ctx.saved_tensors), None, None, None, None


class GPT(nn.Module):
    """tokens [B, T] int64 -> logits [B, T, V]."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype, self.compiled = torch.float32, False  # compiled: False later makes blocks eager again
        self.step, self.cache = None, KVCache(128, 1)  # sample.py's compiled step, False where that fails; see KVCache
        self.recompute = False  # computes blocks again in the backward pass instead of keeping what they computed
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False)
        self.mixtures = [module for module in self.modules() if isinstance(module, MoE)]
        std = config.initializer_range or config.hidden_size ** -0.5
        scale = (2 * config.num_hidden_layers) ** -0.5 if config.initializer == "scaled" else 1.0  # GPT-2
        for name, parameter in self.named_parameters():
            if name.endswith((".bias", "_proj_bias")):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2 and "conv1d" not in name:  # OLMo 2: a plain normal is more stable than scaled ones
                writes = name.removesuffix(".weight").endswith(("o_proj", "out_proj", "down_proj"))
                nn.init.normal_(parameter, std=std * scale if writes else std)

    def compile_blocks(self, backend="inductor"):
        """torch.compile, block by block: equal blocks share a graph, and weights keep their names. DeltaNet's blocks
        stay eager: their loop over chunks would unroll."""
        torch._dynamo.config.recompile_limit = 256  # kinds of layers x lengths, of which posttrain.py has up to 16
        torch._dynamo.config.optimize_ddp = False  # it would split blocks that are compiled one by one
        self.compiled = True
        self.of_piece = torch.compile(losses_and_slope, dynamic=False, backend=backend)
        self.nats_of_piece = torch.compile(token_nats, backend=backend)  # of answers, whose lengths differ
        for layer in self.model.layers:
            if hasattr(layer, "self_attn"):  # FSDP's hooks on parts of a block break its graph
                whole = not any(isinstance(part, FSDPModule) for part in [*layer.modules()][1:])
                layer.compile(fullgraph=whole, dynamic=False, backend=backend)

    def layout(self, tokens, cu_seqlens, cache):
        """The Layout of tokens [B, T] that follow those in the cache, if any."""
        (B, T), c, device, start = tokens.shape, self.config, tokens.device, cache.length if cache else 0
        compiled = torch.is_tensor(start)
        if cu_seqlens is None and not compiled and start == 0 and (c.attention_sinks or c.layer_types != "full"):
            cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)  # one document a row
        rope, chunks, row = None, None, start + torch.arange(T, device=device)
        positions = row[None]
        if cu_seqlens is not None:
            positions = document_positions(cu_seqlens, B * T).view(B, T)
            if "chunked" in c.layer_types:  # Llama 4 cuts every document into chunks
                chunk, N = c.attention_chunk_size, B * T
                starts = torch.where(positions.flatten() % chunk == 0, torch.arange(N, device=device), N).sort().values
                chunks = F.pad(starts, (0, 1), value=N)[:len(cu_seqlens) + N // chunk].int()  # of one length, padded
        if c.position in ROPE:
            at = positions % max(1, 3 * c.original_max_position_embeddings // 4) if c.position == "dual_chunk" else row
            angles = at[..., None].float() * rope_frequencies(c, device)  # fp32 [T, R/2]; dual_chunk: [B or 1, T, R/2]
            temperature = 1.0 if c.yarn_mscale_all_dim else yarn_temperature(c)
            rope = [(f(angles) * temperature)[..., None, :].to(self.compute_dtype) for f in (torch.cos, torch.sin)]
        distance = row[:, None] - torch.arange(cache.capacity, device=device) if compiled else None
        return Layout(start + T, positions, rope, cu_seqlens, chunks, distance)

    def forward(self, tokens, cu_seqlens=None, cache=None, last_only=False, targets=None, z_loss=0.0, temperature=None):
        """Logits in the compute dtype. `cu_seqlens`: see `document_attention`; None: one document a row. `cache`: the
        tokens continue those in it. `last_only`: logits of the last position, [B, 1, V].
        With `targets` [B, T], -100 ignored, returns (what to minimise: the sum of nats and, in training, of `z_loss`
        log(Z)^2; nats [B, T] in fp32 without gradient). With a `temperature`, which divides the logits, nats have a
        gradient, and there is no z-loss."""
        layout = self.layout(tokens, cu_seqlens, cache)
        x = self.model.embed_tokens(tokens)
        if self.config.position == "learned":
            if layout.distance is None and layout.end > self.config.max_position_embeddings:
                raise UserError(f"the learned positions end at {self.config.max_position_embeddings}; shorten the text")
            x = x + self.model.embed_positions(layout.positions)
        x = x.to(self.compute_dtype)  # [B, T, C]
        training = torch.is_grad_enabled()  # only training is compiled: other texts are of a new length every time
        compiled = self.compiled and training and not cache and _watched is None
        for starts in (layout.cu_seqlens, layout.chunks):
            if compiled and starts is not None:
                torch._dynamo.mark_dynamic(starts, 0)  # one graph whatever the number of documents
        for layer in self.model.layers:
            call = layer if compiled else layer._call_impl
            if self.recompute and training:  # Chen et al. 2016
                call = functools.partial(recomputed, call)
            x = call(x, layout, cache)
        if cache:
            cache.length = layout.end
        x = self.model.norm(x[:, -1:] if last_only else x)
        weight = (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight
        x = x.float() if x.is_cpu and x.dtype == torch.float16 else x  # see `multiply`
        cap = self.config.final_logit_softcapping
        if targets is None:
            return soft_capped(multiply(x, weight), cap)  # [B, T, V]
        x, flat = x.flatten(0, 1), targets.flatten()
        if training and temperature is None:
            minimised, nats = HeadLoss.apply(x, weight, flat, cap, z_loss,
                                             self.of_piece if compiled else losses_and_slope)
        else:
            scale = temperature or 1.0
            call = self.nats_of_piece if compiled else token_nats
            if x.is_cuda or 10 * len(x) * len(weight) > 2**30:  # GiB of logits: on a CPU, keeping fewer is faster
                call = functools.partial(recomputed, call)
            nats = torch.cat([call(*piece, weight, cap / scale) for piece in pieces_of(x / scale, flat)])
            minimised = nats.sum()
        return minimised, nats.view_as(targets)

    def routing_loss(self):
        """The routers' losses of the last pass in training, to be added to its mean loss; 0 without experts.
        Per layer: coefficient * E * sum_i f_i P_i (Switch Transformer), P_i expert i's mean score, plus the z-loss
        (ST-MoE). f_i, its share of tokens, is counted over all processes and the step's micro-batches so far, as the
        playbook advises: balanced only within each, experts could not specialise."""
        total, c = 0.0, self.config
        if self.mixtures:
            counts = torch.stack([moe.routing[1] for moe in self.mixtures])
            if dist.is_initialized():
                dist.all_reduce(counts)
            for moe, count in zip(self.mixtures, counts):
                moe.load = count if moe.load is None else moe.load + count
                balance = len(count) * (moe.load / moe.load.sum() * moe.routing[0]).sum()
                total = total + c.router_aux_loss_coef * balance + c.router_z_loss_coef * moe.routing[2]
        return total

    @torch.no_grad()
    def balance_experts(self, applied=1.0):
        """After a step: how uneven each MoE layer was, the fullest expert's load over the mean load (1: even). Moves
        the routers' biases by router_bias_update_rate towards even load (DeepSeek-V3); `applied`: 0: a dropped step."""
        uneven = []
        for moe in self.mixtures:
            if moe.load is not None:
                towards = (moe.load.mean() - moe.load).sign()
                moe.gate.e_score_correction_bias += applied * self.config.router_bias_update_rate * towards
                uneven.append(moe.load.max() / moe.load.mean())
                moe.load = None
        return uneven


@functools.cache
def count_parameters(config):
    """{"total", "active", "embedding", "non_embedding", "matmul"} of a config, without allocating any weights. active:
    all but the experts that a token does not visit. embedding: input and output (once if tied). matmul: weights that a
    token is multiplied with, head included, look-up not: 6 x matmul FLOPs train a token, attention's scores aside."""
    total = active = matmul = 0
    with torch.device("meta"):
        for name, p in GPT(config).named_parameters():
            used = p.numel() // config.num_experts * config.num_experts_per_tok if ".experts." in name else p.numel()
            total, active = total + p.numel(), active + used
            if p.ndim > 1 and "bias" not in name and "embed_" not in name:
                matmul += used
    tied, look_up = config.tie_word_embeddings, config.vocab_size * config.hidden_size
    embedding = look_up * (2 - tied)
    return {"total": total, "active": active, "embedding": embedding, "non_embedding": total - embedding,
            "matmul": matmul + look_up * tied}


def cache_bytes(config, length):
    """Bytes of the KVCache of one sequence of `length` tokens, in bf16. A layer keeps 2 G D numbers a token, MLA its
    latent and one key part, sliding and chunked layers those of tokens that a next one can see, linear layers a state
    in fp32 and the convolution's last inputs."""
    c = config
    token = c.kv_lora_rank + c.qk_rope_head_dim if c.kv_lora_rank else 2 * c.num_key_value_heads * c.head_dim
    seen = {"sliding": c.sliding_window - 1, "chunked": c.attention_chunk_size - 1, "linear": 0}
    D, values = c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    state = 4 * D * values + 2 * (c.linear_conv_kernel_dim - 1) * (2 * c.linear_num_key_heads * D + values)
    return sum(2 * token * min(length, seen.get(kind, length)) + (kind == "linear") * state
               for kind in map(c.layer_type, range(c.num_hidden_layers)))


def main():
    print("Parameters: all, without embeddings, active (of one token), active without embeddings; embeddings' share.\n"
          "Published active counts include both embeddings, the output's alone (gpt-oss) or none (Moonlight).")
    for name, config in PRESETS.items():
        count = count_parameters(config)
        sizes = count["total"], count["non_embedding"], count["active"], count["active"] - count["embedding"]
        print(f"{name:19}" + "".join(f"{size:18,}" for size in sizes) + f"{count['embedding'] / count['total']:9.1%}")
    print("""
KV cache in bf16: a token more, and a whole context. RoPE: its base, and the context that it reaches (`rope_reach`).
Experts: granularity, 2 hidden_size / width of one; sparsity, all / active, both with the shared ones.
                     context  KiB a token  MiB in all   RoPE base   reaches  granularity  sparsity""")
    for name, c in PRESETS.items():
        length = c.max_position_embeddings
        full = cache_bytes(c, length)
        print(f"{name:19}{length:9,}{(full - cache_bytes(c, length - 1)) / 2**10:13,.1f}{full / 2**20:12,.1f}"
              f"{c.rope_theta:12,.0f}{rope_reach(c):10,}" + bool(c.num_experts) * (
                  f"{2 * c.hidden_size / c.moe_intermediate_size:13.1f}"
                  f"{(c.num_experts + c.n_shared_experts) / (c.num_experts_per_tok + c.n_shared_experts):10.1f}"))


if __name__ == "__main__":
    run(main)
