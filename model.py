"""The decoder: what Llama 3, Qwen3 and SmolLM3 are made of, in one file.

The playbook's advice for a small dense model is to start from a proven one: pre-norm decoder, RMSNorm, SwiGLU,
RoPE, grouped-query attention. Its ablations (1B, 45B tokens, differences under 0.012 are noise): GQA with 2 to 8
query heads per KV head equals MHA (2.195-2.197 against 2.204), MQA is clearly worse (2.236); tying the embeddings
saves a fifth of a small model for nothing (tied 2.198, untied at equal size 2.243); NoPE in every 4th layer and
document masking cost nothing in short context (2.195) and pay in long context.

    python model.py                       # the presets and their parameter counts
    >>> logits = GPT(PRESETS["qwen3-0.6b"])(tokens)      # [B, T] int64 -> [B, T, vocab_size]

Modules and parameters carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), so that loading a
published checkpoint is a strict `load_state_dict`. Parameters stay fp32; `GPT.compute_dtype` sets what the matrix
products run in. Shapes in comments: B batch, T sequence, N = B*T, C hidden_size, H query heads, G key/value heads,
D head_dim, V vocab_size.
"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class ModelError(ValueError):
    """A user's mistake in a sentence that says what to do instead."""


@dataclass(frozen=True)
class ModelConfig:
    """One decoder; the names are those of Hugging Face's config.json."""

    vocab_size: int = 4096  # the tokenizer decides; of the one that is trained for data/laptop
    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 768  # width of the SwiGLU MLP
    num_hidden_layers: int = 4  # blocks
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 2  # = query heads: MHA; 1: MQA; between: GQA, whose KV cache is smaller
    head_dim: int = 0  # width of one head; 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 256  # context length trained on, in tokens
    rope_theta: float = 10_000.0  # RoPE's base; raised for longer contexts
    rope_llama3_factor: float = 0.0  # Llama 3.1/3.2's frequency scaling; 0: off
    no_rope_layer_interval: int = 0  # n: every n-th layer has no RoPE (NoPE); SmolLM3: 4; 0: never
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE (Qwen3)
    tie_word_embeddings: bool = True  # one matrix for input embedding and output head
    rms_norm_eps: float = 1e-6  # added to the mean square before its root
    initializer_range: float = 0.02  # standard deviation of every matrix at the start

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} {getattr(self, name)} must be greater than 0")
        for name in ("head_dim", "rope_llama3_factor", "no_rope_layer_interval", "initializer_range"):
            if not getattr(self, name) >= 0:
                raise ModelError(f"{name} {getattr(self, name)} must not be negative")
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [g for g in range(1, self.num_attention_heads + 1) if self.num_attention_heads % g == 0]
            raise ModelError(f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads "
                             f"{self.num_attention_heads}: take one of {divisors}")
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ModelError(f"hidden_size {self.hidden_size} does not divide by {self.num_attention_heads} "
                                 "heads: change one of them or give head_dim")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} must be even, because RoPE turns pairs of numbers")

    def change(self, **fields) -> "ModelConfig":
        """A copy with other fields; a head_dim that followed from width and heads follows the new ones."""
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            fields = {"head_dim": 0} | fields
        return replace(self, **fields)


def _llama(layers, hidden, heads, kv_heads, ff, vocab, theta, context, **more) -> ModelConfig:
    return ModelConfig(vocab, hidden, ff, layers, heads, kv_heads, rope_theta=theta,
                       max_position_embeddings=context, **more)


# Published dimensions, after the one that a laptop trains in minutes; tests/test_model.py holds the published parameter counts.
PRESETS = {
    "laptop": ModelConfig(8192, 128, 384, 4, 2, 1, max_position_embeddings=128, initializer_range=0.05),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000, 1e4, 4096, rms_norm_eps=1e-5, tie_word_embeddings=False),
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, 5e5, 131072, rms_norm_eps=1e-5, rope_llama3_factor=8.0,
                           tie_word_embeddings=False),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, 5e5, 131072, rms_norm_eps=1e-5, rope_llama3_factor=32.0),
    "qwen3-0.6b": _llama(28, 1024, 16, 8, 3072, 151936, 1e6, 40960, head_dim=128, qk_norm=True),
    "qwen3-1.7b": _llama(28, 2048, 16, 8, 6144, 151936, 1e6, 40960, head_dim=128, qk_norm=True),
    "qwen3-4b": _llama(36, 2560, 32, 8, 9728, 151936, 1e6, 40960, head_dim=128, qk_norm=True),
    "qwen3-8b": _llama(36, 4096, 32, 8, 12288, 151936, 1e6, 40960, head_dim=128, qk_norm=True,
                       tie_word_embeddings=False),
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, 49152, 1e5, 8192, rms_norm_eps=1e-5, initializer_range=0.0417),
    "smollm2-360m": _llama(32, 960, 15, 5, 2560, 49152, 1e5, 8192, rms_norm_eps=1e-5, initializer_range=0.0323),
    "smollm3-3b": _llama(36, 2048, 16, 4, 11008, 128256, 5e6, 65536, no_rope_layer_interval=4),
}


# ---- attention ------------------------------------------------------------------------------------------------
# Packed sequences hold several documents, and attention must not cross from one to the next. `cu_seqlens` (int32,
# [M]) are the document starts in the flattened batch, padded with N to a fixed length so that nothing recompiles.
# Work then goes as the sum of squared document lengths instead of B*T^2. One operator, three routes: CUDA's
# variable-length flash kernel, the CPU's flash kernel once per document, a dense mask anywhere else.


def dense_document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """The same as `document_attention` with an explicit mask of each row: any device and dtype, slow; the definition.

    Here the batch must be rows of `max_length` tokens whose starts are all in cu_seqlens, as `data.py` makes them.
    """
    index = torch.arange(q.shape[0], device=q.device)
    document = torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True).view(-1, max_length)  # [B, T]
    causal = torch.ones(max_length, max_length, dtype=torch.bool, device=q.device).tril()
    mask = (document[:, None, :, None] == document[:, None, None, :]) & causal  # [B, 1, T, T]
    q, k, v = (x.unflatten(0, (-1, max_length)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def _documents(cu_seqlens: Tensor) -> list[slice]:
    """The documents of a flattened batch, without the empty ones that pad `cu_seqlens`."""
    starts = cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(starts, starts[1:]) if end > start]


def _grouped(x: Tensor, groups: int, ratio: int) -> Tensor:
    """One document's [L, H or G, D] as the CPU kernel's [G, ratio, L, D]: each KV head under its query heads, without
    a copy. In fp32, which that kernel is faster in."""
    x = x.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    return x.expand(-1, ratio, -1, -1)


@torch.library.custom_op("nanoplaybook::document_attention", mutates_args=())
def _document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] and the logarithm of each softmax's sum [H, N], fp32."""
    if q.is_cuda:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, False)[:2]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    groups, ratio = k.shape[1], q.shape[1] // k.shape[1]
    for doc in _documents(cu_seqlens):
        out_doc, lse_doc = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_grouped(x[doc], groups, ratio) for x in (q, k, v)), 0.0, True)
        out[doc], lse[:, doc] = out_doc.permute(2, 0, 1, 3).flatten(1, 2), lse_doc.flatten(0, 1)
    return out, lse


@_document_attention.register_fake
def _(q, k, v, cu_seqlens, max_length):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("nanoplaybook::document_attention_backward", mutates_args=())
def _document_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                                 cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        no_dropout = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)  # the state that dropout would need
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, True, *no_dropout)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups, ratio = k.shape[1], q.shape[1] // k.shape[1]
    for doc in _documents(cu_seqlens):
        dq_doc, dk_doc, dv_doc = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_grouped(x[doc], groups, ratio) for x in (grad, q, k, v, out)), lse[:, doc].unflatten(0, (groups, ratio)),
            0.0, True)
        dq[doc] = dq_doc.permute(2, 0, 1, 3).flatten(1, 2)
        dk[doc], dv[doc] = dk_doc.sum(1).transpose(0, 1), dv_doc.sum(1).transpose(0, 1)  # over a KV head's query heads
    return dq, dk, dv


@_document_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens, max_length):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens, max_length = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.max_length = max_length
    ctx.set_materialize_grads(False)  # the sums have none


def _backward(ctx, grad, _):
    return *_document_attention_backward(grad, *ctx.saved_tensors, ctx.max_length), None, None


_document_attention.register_autograd(_backward, setup_context=_save_for_backward)


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """Causal attention inside each document of a flattened batch.

    q [N, H, D], k and v [N, G, D], G divides H; cu_seqlens int32 [M] ascending from 0, padded with N; max_length:
    no document is longer (a constant, it compiles in). Returns [N, H, D].
    """
    flash = q.is_cuda and q.element_size() == 2 and q.shape[-1] % 8 == 0  # what the CUDA kernel is made for
    if flash or q.device.type == "cpu":
        return _document_attention(q, k, v, cu_seqlens, max_length)[0]
    return dense_document_attention(q, k, v, cu_seqlens, max_length)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, T, H, D] are the last T of the S positions of k, v [B, S, G, D]. Returns [B, T, H, D]."""
    T, S = q.shape[1], k.shape[1]
    mask = None
    if 1 < T < S:  # a prompt that continues a cache: query i sees the keys up to S - T + i
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S and T > 1,
                                          enable_gqa=True).transpose(1, 2)


# ---- positions ------------------------------------------------------------------------------------------------


def rope_frequencies(config: ModelConfig, device="cpu") -> Tensor:
    """RoPE (Su et al. 2021): pair i of a head turns by theta^(-2i/D) radians a token; pair 0 is the fastest. [D/2].

    With `rope_llama3_factor` f (Llama 3.1), pairs that turn less than once in 8192 tokens are slowed f times, those
    that turn more than 4 times are kept, and those between are blended.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_llama3_factor:
        turns = 8192 * frequencies / (2 * math.pi)
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / config.rope_llama3_factor)
    return frequencies


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) of x [B, T, H, D] by the angles whose cos and sin are [T, 1, D/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of every layer for `length` of at most `capacity` tokens: [L, B, capacity, G, D] each."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device="cpu", dtype=torch.float32):
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length, self.capacity = 0, capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [B, T, G, D] at the end and returns all keys and values so far, [B, length + T, G, D].

        `length` itself moves once per forward pass, in `GPT.forward`, after the last layer.
        """
        end = self.length + k.shape[1]
        self.keys[layer][:, self.length:end] = k
        self.values[layer][:, self.length:end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]


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
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); the mean in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); MHA and MQA are its ends."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, G, D = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.layer, self.head_dim = layer, D
        interval = config.no_rope_layer_interval
        self.uses_rope = not interval or (layer + 1) % interval != 0
        self.q_proj = Linear(C, H * D, bias=False)
        self.k_proj = Linear(C, G * D, bias=False)
        self.v_proj = Linear(C, G * D, bias=False)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cu_seqlens: Tensor | None,
                cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # [B, T, H, D]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # [B, T, G, D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.uses_rope:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if cu_seqlens is not None:
            y = document_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, T)
        else:
            y = causal_attention(q, k, v)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, M, bias=False)
        self.up_proj = Linear(C, M, bias=False)
        self.down_proj = Linear(M, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, cu_seqlens: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cu_seqlens, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def cross_entropy(logits: Tensor, targets: Tensor, rows: int = 512) -> Tensor:
    """Summed negative log-likelihood in nats, fp32: logits [B, T, V] of any dtype, targets [B, T], -100 ignored.

    `rows` at a time: a CPU's cache then holds the fp32 copies of the logits, which makes it about 3 times as fast.
    """
    pairs = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows))
    return sum(F.cross_entropy(l.float(), t, reduction="sum") for l, t in pairs)


class GPT(nn.Module):
    """tokens [B, T] int64 -> logits [B, T, V]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():  # OLMo 2 found a plain normal more stable than scaled initialisations
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def compile_blocks(self) -> None:
        """torch.compile, block by block: equal blocks share a graph, and the names of the weights stay."""
        for layer in self.model.layers:
            layer.compile(fullgraph=True)

    def forget_compilation(self) -> None:
        """Back to eager blocks, where a machine turns out to have no compiler."""
        for layer in self.model.layers:
            layer._compiled_call_impl = None

    def rope(self, start: int, T: int, device) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at positions start .. start + T - 1, each [T, 1, D/2], angles in fp32."""
        positions = torch.arange(start, start + T, device=device, dtype=torch.float32)
        angles = positions[:, None] * rope_frequencies(self.config, device)
        return angles.cos()[:, None].to(self.compute_dtype), angles.sin()[:, None].to(self.compute_dtype)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None, cache: KVCache | None = None,
                last_only: bool = False) -> Tensor:
        """Logits in the compute dtype. `cu_seqlens`: see `document_attention`; None: one document a row.

        `cache`: the tokens continue what it holds. `last_only`: logits of the last position, [B, 1, V].
        """
        x = self.model.embed_tokens(tokens).to(self.compute_dtype)  # [B, T, C]
        rope = self.rope(cache.length if cache else 0, tokens.shape[1], tokens.device)
        for layer in self.model.layers:  # with a cache, whose length changes every call, past torch.compile
            x = (layer if cache is None else layer.forward)(x, rope, cu_seqlens, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.model.norm(x[:, -1:] if last_only else x)
        if self.config.tie_word_embeddings:
            return linear(x, self.model.embed_tokens.weight)  # [B, T, V]
        return self.lm_head(x)


# ---- counting and loading -------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """{"total", "active", "embedding", "non_embedding", "matmul"} of a config, without allocating any weights.

    `embedding`: input embedding and output head (once if tied). `active`: what one token uses, in a dense model all.
    `matmul`: weights that a token is multiplied with, the head included and the look-up not: 6 x matmul FLOPs train
    a token, attention's scores aside.
    """
    with torch.device("meta"):
        model = GPT(config)
    total = sum(p.numel() for p in model.parameters())
    look_up = config.vocab_size * config.hidden_size
    embedding = look_up * (1 if config.tie_word_embeddings else 2)
    gains = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    return {"total": total, "active": total, "embedding": embedding, "non_embedding": total - embedding,
            "matmul": total - gains - (0 if config.tie_word_embeddings else look_up)}


def check_manifest(checkpoint: Path) -> None:
    """Raises ModelError unless every file is as large and as hashed as manifest.json, written last, says."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text("utf-8"))["files"]
        for name, sha256 in files.items():
            with open(checkpoint / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != sha256:
                raise ModelError(f"{checkpoint / name} is not what was saved (its sha256 differs)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{checkpoint} is not a complete checkpoint ({error})") from None


def newest_checkpoint(run: str | Path) -> Path:
    """The last checkpoint of a run folder that is whole; a damaged one is named on stderr and passed over."""
    for checkpoint in sorted(Path(run).glob("checkpoints/step-*"), reverse=True):
        try:
            check_manifest(checkpoint)
            return checkpoint
        except ModelError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    raise ModelError(f"{run} holds no whole checkpoint; give a run folder such as runs/laptop or train one with "
                     "`python train.py`")


def from_pretrained(folder: str | Path) -> GPT:
    """The model of a run folder (its newest whole checkpoint) or of one checkpoint folder, fp32, on the CPU."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} does not exist; give a run folder such as runs/laptop")
    if (folder / "manifest.json").exists():
        check_manifest(folder)
    else:
        folder = newest_checkpoint(folder)
    with torch.device("meta"):
        model = GPT(ModelConfig(**json.loads((folder / "config.json").read_text("utf-8"))))
    weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True, mmap=True)
    model.load_state_dict(weights, strict=True, assign=True)
    return model


if __name__ == "__main__":
    for name, config in PRESETS.items():
        count = count_parameters(config)
        print(f"{name:14} {count['total']:15,} parameters, {count['non_embedding']:14,} without embeddings")
