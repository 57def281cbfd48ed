"""A Llama-family model by hand: Llama, TinyLlama, SmolLM2, Yi, DeepSeek-LLM, Mistral, Qwen2/2.5/3.

First the mathematics: the model from its norm to its last hidden state, attention over examples of
any length, noise, log-probabilities, generation. Then what one looks up: RoPE's variants, what the
keys of config.json mean, loading and saving. Three things differ from most such files:

  flat tokens   a micro-batch is a vector of T tokens and the lengths of the examples in it; nothing
                is padded, not even inside attention
  prefix        attention can continue kept keys and values, and gradients flow into them
  log-probs     the LM head sees only positions whose next token is wanted, a chunk at a time

Shapes in the comments: T tokens in a micro-batch, B examples, L tokens of one example, P tokens of
its prefix, S = P + L keys it sees, D hidden size, H query heads, K key/value heads, Dh head size,
V vocabulary, N supervised tokens, G stored prefixes. [T, H, Dh] is a tensor of that shape.
"""

import inspect
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# The threads of a small model wait for each other thousands of times a second. GNU OpenMP lets a
# thread spin for 300,000 rounds before it sleeps: fast on an idle machine, but beside one busy
# process the thread that is waited for has lost its core, and the spinning lasts. OpenMP reads
# this when torch is imported, so the scripts import this file first. What the user set wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from torch.nn.attention.varlen import varlen_attn  # flat tokens on CUDA, in newer torch
except ImportError:
    varlen_attn = None

# ==== read: the model =============================================================================


@dataclass
class ModelConfig:
    """The keys of a Hugging Face config.json that shape the computation."""

    source: dict  # the config.json this was read from, kept for saving
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: dict  # rope_type, rope_theta and what the type needs
    windows: list  # per layer: keys a query sees, itself included; None: all
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o; qwen2 has it on q, k, v whatever this says
    mlp_bias: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, source: dict) -> "ModelConfig":
        """Read a config.json; `read_config` says how."""
        return read_config(source)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467, eq. 4), computed in the weight's type.

    What comes out is read by matrix products alone, so it is cast to their type here, once.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, self.eps)
        return y.to(product_dtype(y))


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products of x are computed: autocast's, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+Dh/2}) by its angle: the pairing of Hugging Face checkpoints.

    RoFormer (arXiv:2104.09864, eq. 15): at position m pair i turns by m theta^(-2i/Dh), so that a
    query and a key only feel how far apart they stand.
    """
    a, b = x.float().chunk(2, dim=-1)  # [T, heads, Dh/2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Rotation(torch.autograd.Function):
    """`rotate`, whose gradient is the rotation back: it needs to keep nothing but the angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return rotate(g, cos, -sin), None, None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """What attention is, for one example: softmax(q k^T / sqrt(Dh)) v over the keys a query sees.

    The queries [L, H, Dh] belong to the last L of the S tokens whose keys and values [S, K, Dh] are
    given. A token sees itself and those before it, with a window only the last `window` of them.
    Read this; `attention` is what runs.
    """
    (L, H, Dh), (S, K, _) = q.shape, k.shape
    k = k.repeat_interleave(H // K, 1)  # [S, H, Dh]
    v = v.repeat_interleave(H // K, 1)  # [S, H, Dh]
    scores = torch.einsum("lhd,shd->hls", q, k) / math.sqrt(Dh)  # [H, L, S]
    unseen = ~visible(torch.arange(S - L, S, device=q.device), S, window)  # [L, S]
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)  # [H, L, S]
    return torch.einsum("hls,shd->lhd", weights, v)  # [L, H, Dh]


def visible(position: Tensor, S: int, window: int | None) -> Tensor:
    """Which of the keys 0 to S - 1 the queries at these positions [L] see: [L, S]."""
    age = position[:, None] - torch.arange(S, device=position.device)  # [L, S] tokens in between
    return (age >= 0) & (age < (window or S))


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245): H query heads share K key/value heads.

        query heads   0 1 2 3   4 5 6 7
        key/value     ---0---   ---1---
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.H, self.K, self.Dh = (config.num_attention_heads, config.num_key_value_heads,
                                   config.head_dim)
        D, bias = config.hidden_size, config.attention_bias
        qkv_bias = bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, self.H * self.Dh, bias=qkv_bias)
        self.k_proj = nn.Linear(D, self.K * self.Dh, bias=qkv_bias)
        self.v_proj = nn.Linear(D, self.K * self.Dh, bias=qkv_bias)
        self.o_proj = nn.Linear(self.H * self.Dh, D, bias=bias and config.model_type != "qwen2")

        # Qwen3 normalises every head of q and k before they are rotated.
        qwen3 = config.model_type == "qwen3"
        self.q_norm = RMSNorm(self.Dh, config.rms_norm_eps) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(self.Dh, config.rms_norm_eps) if qwen3 else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, Dh], keys and values [T, K, Dh] of states x [T, D]."""
        q = self.q_norm(self.q_proj(x).view(-1, self.H, self.Dh))  # [T, H, Dh]
        k = self.k_norm(self.k_proj(x).view(-1, self.K, self.Dh))  # [T, K, Dh]
        v = self.v_proj(x).view(-1, self.K, self.Dh)  # [T, K, Dh]
        return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202, eq. 6): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, hidden, bias=bias)
        self.up_proj = nn.Linear(D, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both residual branches.

    Tokens meet in `attention` alone. What stands before and after it treats every token by itself,
    knows neither examples nor the layer's number, and so compiles once for all layers and lengths.
    """

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        self.window, self.dropout = window, 0.0
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention needs of the residual stream x [T, D]."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor, noise: Tensor | None) -> Tensor:
        """Add what attention found [T, H, Dh], and what the MLP makes of the sum: [T, D]."""
        found = self.self_attn.o_proj(attended.flatten(1))  # [T, D], from [T, H * Dh]
        x = x + dropout(found, self.dropout, noise, 0)
        changed = self.mlp(self.post_attention_layernorm(x))  # [T, D]
        return x + dropout(changed, self.dropout, noise, 1)

    def forward(self, x: Tensor, layout: "Layout", past, keep_kv: bool, noise: Tensor | None,
                wanted: Tensor | None = None):
        """x [T, D] -> [T, D], and with `keep_kv` this layer's (keys, values) [T, K, Dh].

        Of the tokens `wanted` [N] alone, if given: the others are then but keys and values.
        """
        q, k, v = self.before(x, layout.cos, layout.sin)
        attended = attention(q, k, v, past, layout, self.window)  # [T, H, Dh]
        if wanted is not None:
            x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)  # [N, ...]
            noise = None if noise is None else noise.index_select(0, wanted)  # [N]
        return self.after(x, attended, noise), (k, v) if keep_kv else None


class Llama(nn.Module):
    """The causal language model: `forward` gives log-probabilities, `hidden` the states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.stop_ids = ()  # the tokens that end an answer; `load` fills them in
        self.model = nn.ModuleDict({  # the checkpoint's names of these weights begin with `model.`
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, window) for window in config.windows),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, ids, lengths, prefix: "Prefix | Cache | None" = None, keep_kv: bool = False,
               noise: Tensor | None = None, neftune_alpha: float = 0.0, full_lengths=None,
               wanted: Tensor | None = None):
        """Last hidden states [T, D], after the last norm, of B examples end to end in `ids` [T].

        Examples do not see each other. `prefix` (B rows) stands before them. `noise` [T] from
        `noise_keys` switches on NEFTune and dropout, in training mode only; `full_lengths` [B] are
        then the lengths of the examples if these tokens are but a part of them. `wanted` [N] are
        the flat indices of the tokens whose states are asked for: the last layer spares itself the
        others. Returns the states, and with `keep_kv` a Prefix of these tokens, else None.
        """
        x = self.model.embed_tokens(ids)  # [T, D]
        layout = Layout(self.config, lengths, prefix, x.device, product_dtype(x))

        # Noise is for training. In evaluation it is ignored, whoever passes it.
        noise = noise if self.training else None
        if noise is not None and neftune_alpha > 0:
            added = neftune_noise(noise, lengths, x.shape[1], neftune_alpha, full_lengths)
            x = x + added.to(x.dtype)

        kept = []
        last = len(self.model.layers) - 1
        for i, layer in enumerate(self.model.layers):
            past = prefix.layers[i] if prefix is not None else None
            drops = noise is not None and layer.dropout > 0
            mine = combine(noise, i + 1) if drops else None  # [T] each layer draws its own
            arguments = x, layout, past, keep_kv, mine, wanted if i == last else None
            if self.checkpoint_activations and self.training:  # noise needs no RNG state to replay
                x, kv = checkpoint(layer, *arguments, use_reentrant=False,
                                   preserve_rng_state=False)
            else:
                x, kv = layer(*arguments)  # [T, D]
            kept.append(kv)
        return self.model.norm(x), Prefix(kept, list(lengths)) if keep_kv else None

    def forward(self, ids, lengths, targets, prefix=None, noise=None, neftune_alpha=0.0,
                full_lengths=None, equal_weights=False) -> Tensor:
        """ln p(token | those before it) [N] in nats, of the tokens at flat indices `targets` [N].

        A target is predicted from the state just before it, so an example's first token is none.
        """
        states, _ = self.hidden(ids, lengths, prefix, False, noise, neftune_alpha, full_lengths,
                                wanted=targets - 1)  # [N, D]
        return token_logprobs(states, self.head, ids[targets], equal_weights)

    def next_logits(self, states: Tensor) -> Tensor:
        """Scores of every next token in fp32, for generation and exams: [B, D] -> [B, V]."""
        return (states @ self.head.to(states.dtype).T).float()

    @property
    def head(self) -> Tensor:
        """The LM head's weight [V, D]; the embedding itself when they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    def set_dropout(self, bottom: float, top: float) -> None:
        """Residual dropout, linear from the first layer to the last (LIMA: 0 to 0.3)."""
        for i, layer in enumerate(self.model.layers):
            layer.dropout = bottom + (top - bottom) * i / max(len(self.model.layers) - 1, 1)

    def compile_layers(self, **options) -> None:
        """Compile what layers do to single tokens: a graph serves every layer and every length."""
        torch._dynamo.config.recompile_limit = 64  # with and without noise, gradients
        for layer in self.model.layers:
            layer.before = torch.compile(layer.before, dynamic=True, fullgraph=True, **options)
            layer.after = torch.compile(layer.after, dynamic=True, fullgraph=True, **options)

    def initialize(self, seed: int) -> None:
        """Random weights of a new model: matrices normal (`initializer_range`), biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


# ==== read: attention over flat tokens ============================================================


@dataclass
class Prefix:
    """Keys and values of tokens that later tokens continue; gradients flow into them.

    Keys are stored rotated. Under dynamic RoPE past the pretraining length the angles change with
    every token, so that a prefix is then an approximation; `generate` does without it there.
    """

    layers: list[tuple[Tensor, Tensor]]  # a layer's keys and values, [S, K, Dh]: G end to end
    lengths: list[int]  # [G] tokens of each
    rows: list[int] | None = None  # [B] which of the G each example continues; None: its own

    def select(self, rows: Iterable[int]) -> "Prefix":
        """The prefixes that B examples continue: `rows` [B] of the G stored ones."""
        return Prefix(self.layers, self.lengths, [int(row) for row in rows])


class Layout:
    """Where each of the T flat tokens stands, and which keys its example sees.

    All of it is known from the lengths alone, so it is worked out on the CPU and sent once.
    """

    def __init__(self, config: ModelConfig, lengths: list[int], prefix: "Prefix | Cache | None",
                 device: torch.device, dtype: torch.dtype):
        B, T = len(lengths), sum(lengths)
        self.prefix, self.masks, rows, before = prefix, {}, [None] * B, [0] * B
        if prefix is not None:
            rows = prefix.rows or list(range(B))
            before = [prefix.lengths[row] for row in rows]

        # Positions restart with every example and go on where its prefix ends.
        count, start = torch.tensor(lengths), torch.tensor(before)  # [B]
        first = count.cumsum(0) - count  # [B] flat index of each example's first token
        example = torch.arange(B).repeat_interleave(count)  # [T]
        position = torch.arange(T) + (start - first)[example]  # [T]
        frequencies, factor = rope_frequencies(config, start + count)  # [B or 1, Dh/2]
        angles = position[:, None] * frequencies.expand(B, -1)[example]  # [T, Dh/2]
        turns = factor * torch.stack((angles.cos(), angles.sin()))  # [2, T, Dh/2]
        self.cos, self.sin = send(turns[:, :, None], device)  # [T, 1, Dh/2] each

        # Neighbours that are equally long and continue the same prefix share one call.
        alike = itertools.groupby(zip(rows, lengths, strict=True))
        self.groups = [(row, length, len(list(members))) for (row, length), members in alike]
        self.varlen = varlen_fits(device, dtype)
        if isinstance(prefix, Cache):
            self.place = send(torch.stack((torch.arange(B), start)), device)  # [2, B] row, column
        elif self.varlen:
            self.plan_varlen(count, start, rows, device)

    def mask(self, L: int, S: int, window: int | None, q: Tensor) -> Tensor:
        """[L, S] what to add to the scores of the last L of S tokens: 0, or -inf where unseen."""
        key = L, S, window, q.dtype
        if key not in self.masks:  # worked out in the first layer, used by all
            seen = visible(torch.arange(S - L, S, device=q.device), S, window)  # [L, S]
            self.masks[key] = q.new_zeros(L, S).masked_fill(~seen, -torch.inf)
        return self.masks[key]

    def plan_varlen(self, count: Tensor, start: Tensor, rows: list, device) -> None:
        """What `varlen_attn` asks: where examples end among the queries and among the keys."""
        zero, seen = torch.zeros(1, dtype=torch.long), start + count  # [B] keys of each example
        ends = torch.cat((zero, count.cumsum(0), zero, seen.cumsum(0))).int()  # [2 (B + 1)]
        self.query_ends, self.key_ends = send(ends, device).chunk(2)  # [B + 1] each
        self.longest = int(count.max()), int(seen.max())
        if self.prefix is not None:  # where each example's keys lie: its prefix's, then its own
            sizes = [*self.prefix.lengths, *count.tolist()]
            *stored, own = torch.arange(sum(sizes)).split([*self.prefix.lengths, int(count.sum())])
            pairs = zip(rows, own.split(count.tolist()), strict=True)
            order = torch.cat([part for row, mine in pairs for part in (stored[row], mine)])
            self.order = send(order, device)  # [sum of S]


SHORT = 192  # tokens below which a CPU's backward pass of attention is faster in fp32 than in bf16


def attention(q: Tensor, k: Tensor, v: Tensor, past, layout: Layout, window: int | None) -> Tensor:
    """`plain_attention` of every example: queries [T, H, Dh], keys and values [T, K, Dh].

    `past` are the keys and values that stand before them, or None. One call per group of equally
    long neighbours: nothing is padded, so no work is wasted.
    """
    if isinstance(layout.prefix, Cache):
        return attend_cached(q, k, v, past, layout, window)
    if layout.varlen:
        return attend_varlen(q, k, v, past, layout, window)

    out, sizes = [], [length * members for _, length, members in layout.groups]
    if past is not None:
        past_k, past_v = (t.split(layout.prefix.lengths) for t in past)  # G of [P, K, Dh]
    parts = zip(layout.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    for (row, L, b), q_, k_, v_ in parts:
        q_, k_, v_ = (t.unflatten(0, (b, L)) for t in (q_, k_, v_))  # [b, L, heads, Dh]
        if past is not None:
            k_ = torch.cat((past_k[row].expand(b, -1, -1, -1), k_), 1)  # [b, S, K, Dh]
            v_ = torch.cat((past_v[row].expand(b, -1, -1, -1), v_), 1)
        S, mask = k_.shape[1], None
        if L < SHORT and q.device.type == "cpu":
            q_, k_, v_ = (t.float() for t in (q_, k_, v_))
        if (window or S) < S or L < S - L:
            mask = layout.mask(L, S, window, q_)  # [L, S]
        elif L < S:  # a causal kernel skips what a mask would hide: worth some empty queries
            q_ = F.pad(q_, (0, 0, 0, 0, S - L, 0))  # [b, S, H, Dh]
        found = attend(q_, k_, v_, mask)[:, -L:]  # [b, L, H, Dh]
        out.append(found.flatten(0, 1).to(v.dtype))  # [b * L, H, Dh]
    return torch.cat(out)  # [T, H, Dh]


def attend_cached(q, k, v, past, layout, window) -> Tensor:
    """One new token per row: it joins its row's cache [B, room, K, Dh], and looks at all of it."""
    row, column = layout.place  # [B] each
    for stored, new in zip(past, (k, v), strict=True):
        stored[row, column] = new
    S = max(layout.prefix.lengths) + 1
    mask = visible(column, S, window)[:, None, None]  # [B, 1, 1, S]
    return attend(q[:, None], past[0][:, :S], past[1][:, :S], mask)[:, 0]  # [B, H, Dh]


def attend_varlen(q, k, v, past, layout, window) -> Tensor:
    """CUDA's kernel for examples end to end; its mask is causal, aligned at the last tokens."""
    if past is not None:
        k, v = (torch.cat((p, own)).index_select(0, layout.order)  # [sum of S, K, Dh]
                for p, own in zip(past, (k, v), strict=True))
    left = -1 if window is None else window - 1
    return varlen_attn(q, k, v, layout.query_ends, layout.key_ends, *layout.longest,
                       window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1])


def varlen_fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen_attn` is there, with the arguments we need, for this device and type."""
    if device.type != "cuda" or dtype == torch.float32 or not torch.cuda.is_available():
        return False
    known = varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters
    return bool(known) and torch.cuda.get_device_capability(device)[0] >= 8


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention of [B, L, H, Dh] queries over [B, S, K, Dh] keys; no mask: causal."""
    shared = q.shape[2] != k.shape[2]  # query head h reads key/value head h // (H / K)
    if shared and mask is not None and q.device.type != "cpu":
        # CUDA's kernels take a mask or shared heads: with both, all scores would be written out.
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
        shared = False
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, tokens, Dh]
    causal = mask is None
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)
    return out.transpose(1, 2)  # [B, L, H, Dh]


# ==== read: noise as a pure function ==============================================================


def combine(key: Tensor, value: Tensor | int) -> Tensor:
    """A 32-bit hash of `value` under `key`, non-negative integers below 2^31 and 2^32.

    The mixer is of Wellons' hash prospector; multipliers below 2^31 keep int64 from overflow.
    """
    x = (key + value * 0x9E3779B1) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def noise_keys(seed: int, epochs: list, examples: list, lengths: list, device="cpu") -> Tensor:
    """One 32-bit key per token [T], a function of (seed, epoch, example, position) alone.

    NEFTune, dropout and sampling draw from it, so that neither the micro-batch, nor the rank, nor
    the device changes what a token gets.
    """
    count = torch.tensor(lengths)  # [B]
    key = combine(torch.tensor(seed % 2**31 + 1), 0)  # the hash of 0 would be 0
    key = combine(combine(key, torch.tensor(epochs)), torch.tensor(examples))  # [B]
    starts = (count.cumsum(0) - count).repeat_interleave(count)  # [T]
    position = torch.arange(len(starts)) - starts  # [T]
    return send(combine(key.repeat_interleave(count), position), device)


def uniform(keys: Tensor, size: int) -> Tensor:
    """`size` uniform numbers in (0, 1) for each key: [T] -> [T, size], alike on every device."""
    bits = combine(keys[:, None], torch.arange(size, device=keys.device)) >> 9  # [T, size]
    return (bits.float() + 0.5) / 2**23  # 23 bits and a half are exact in fp32


def neftune_noise(keys: Tensor, lengths: list[int], size: int, alpha: float,
                  full_lengths=None) -> Tensor:
    """NEFTune (arXiv:2310.05914, algorithm 1): U(-1, 1) * alpha / sqrt(L d), for embeddings [T, d].

    L is the true number of tokens of each example, prompt and answer, as in the authors' code.
    Their README and the Hugging Face hook take the padded width instead, which makes the noise
    depend on the neighbours. `full_lengths` gives L where `lengths` [B] are but parts of the
    examples.
    """
    L = torch.tensor(full_lengths or lengths)  # [B]
    scale = alpha / (L * size).float().sqrt()  # [B]
    scale = send(scale.repeat_interleave(torch.tensor(lengths)), keys.device)  # [T]
    return (2 * uniform(keys, size) - 1) * scale[:, None]


def dropout(x: Tensor, p: float, noise: Tensor | None, site: int) -> Tensor:
    """Zero each element with probability p, scale the rest by 1/(1-p); no `noise`: evaluation."""
    if p == 0.0 or noise is None:
        return x
    kept = uniform(combine(noise, site + 1), x.shape[-1]) >= p  # [T, D]
    return x * kept / (1 - p)


# ==== read: log-probabilities =====================================================================


def plain_logprobs(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """What `token_logprobs` computes, with all N * V logits at once: read this, run the other."""
    logits = states @ head.to(states.dtype).T  # [N, V]
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]  # [N]


def token_logprobs(states: Tensor, head: Tensor, targets: Tensor,
                   equal_weights: bool = False) -> Tensor:
    """ln p(target) in nats [N] from states [N, D], the head's weight [V, D] and target ids [N].

    The one place where hidden states become log-probabilities: training and evaluation come here.
    Set `equal_weights` if the loss gives every target the same weight (SFT does). It is a hint: if
    it is wrong the result is still right, only slower.
    """
    return TokenLogprobs.apply(states, head, targets, equal_weights)


LOGIT_ELEMENTS = 2**23  # logits alive at once in `token_logprobs` (32 MB in fp32)
CUDA_LOGIT_ELEMENTS = 2**28  # 1 GiB: small chunks would read and write the whole head too often


def logit_elements(device: torch.device) -> int:
    """How many logits may be alive at once."""
    return CUDA_LOGIT_ELEMENTS if device.type == "cuda" else LOGIT_ELEMENTS


def head_pass(states, head, targets, dtype, grad_states, grad_head, g=None, kept=None) -> Tensor:
    """ln softmax(h W^T)[target] [N], a chunk of rows at a time: never all N * V logits at once.

    With p_i = softmax(h_i W^T) and the residual r_i = p_i - onehot(target_i), whose negative is the
    gradient of ln p_i[target_i] by the logits, fills where they are not None
        kept         [N, V] with r_i,
        grad_states  [N, D] with -r_i W,
        grad_head    [V, D] with -sum_i g_i r_i^T h_i (g_i = 1 where no g is given).
    """
    weight = head.to(dtype)  # [V, D]
    size = max(1, logit_elements(states.device) // len(head))
    logp = states.new_empty(len(states), dtype=torch.float32)  # [N]
    for first in range(0, len(states), size):
        rows = slice(first, first + size)
        h, target = states[rows].to(dtype), targets[rows, None]  # [rows, D], [rows, 1]
        logits = (h @ weight.T).float().log_softmax(-1)  # [rows, V] normalised
        logp[rows] = logits.gather(1, target)[:, 0]
        if kept is None and grad_states is None and grad_head is None:
            continue

        # In the memory of the logits: softmax, less 1 at the target.
        residual = logits.exp_()  # [rows, V]
        residual.scatter_add_(1, target, residual.new_full(target.shape, -1.0))
        if kept is not None:
            kept[rows] = residual
        residual = residual.to(dtype) if kept is None else kept[rows]
        if grad_states is not None:
            grad_states[rows] = -(residual @ weight)  # [rows, D]
        if grad_head is not None:  # [V, D] summed in fp32, whatever the products' type
            h = h if g is None else (h * g[rows, None]).to(dtype)
            grad_head.sub_(residual.T @ h)
    return logp


class TokenLogprobs(torch.autograd.Function):
    """The gradient of `head_pass`, for arriving gradients g_i of the log-probabilities.

    dL/dh_i = -g_i r_i W is only [N, D], so the forward pass keeps -r_i W. dL/dW mixes the g_i,
    which are not known yet: the residuals are kept for it, if they are few. If not, `equal_weights`
    (the token mean of SFT) lets the forward pass sum dL/dW for g = 1, which only has to be scaled
    if the g_i prove equal; else the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, states, head, targets, equal_weights):
        ctx.dtype = product_dtype(states)

        # Under no_grad the head still has requires_grad=True. The states tell whether a gradient
        # is wanted.
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_head = kept = None
        bytes_kept = len(states) * len(head) * ctx.dtype.itemsize
        if all(ctx.needs_input_grad[:2]) and bytes_kept <= 16 * logit_elements(states.device):
            kept = states.new_empty(len(states), len(head), dtype=ctx.dtype)  # [N, V]
        elif ctx.needs_input_grad[1] and equal_weights:
            grad_head = torch.zeros_like(head, dtype=torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            logp = head_pass(states, head, targets, ctx.dtype, grad_states, grad_head, None, kept)
        ctx.save_for_backward(states, head, targets, grad_states, grad_head, kept)
        return logp

    @staticmethod
    def backward(ctx, g):
        states, head, targets, grad_states, grad_head, kept = ctx.saved_tensors
        if grad_states is not None:
            grad_states = grad_states * g[:, None].to(grad_states.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_states, None, None, None

        with torch.autocast(states.device.type, enabled=False):
            if kept is not None:
                weighted = (states * -g[:, None]).to(ctx.dtype)  # [N, D]
                grad_head = kept.T @ weighted  # [V, D]
            elif grad_head is not None and bool((g == g[0]).all()):  # the hint is checked
                grad_head = grad_head.mul_(g[0])
            else:
                grad_head = torch.zeros_like(head, dtype=torch.float32)
                head_pass(states, head, targets, ctx.dtype, None, grad_head, g)
        return grad_states, grad_head.to(head.dtype), None, None


# ==== read: generation ============================================================================

CACHE_BLOCK = 64  # tokens by which the cache grows, so that it is not copied for every token


class Cache:
    """Keys and values of texts that grow by one token per step: rows of like room, filled in place.

    `layers` hold [B, room, K, Dh] each; of row b the first `lengths[b]` tokens are there.
    """

    rows = None  # every row continues itself

    def __init__(self, prefix: Prefix):
        self.lengths = [prefix.lengths[row] - 1 for row in prefix.rows]  # [B]
        self.layers = []
        for pair in prefix.layers:
            padded = [nn.utils.rnn.pad_sequence(t.split(prefix.lengths), True) for t in pair]
            self.layers.append([t[prefix.rows] for t in padded])  # [B, longest, K, Dh]
        self.advance()

    def advance(self) -> None:
        """Count one more token in every row, and make room for the next."""
        self.lengths = [length + 1 for length in self.lengths]
        if max(self.lengths) == self.layers[0][0].shape[1]:
            grown = (0, 0, 0, 0, 0, CACHE_BLOCK)  # behind the last token, of [B, room, K, Dh]
            self.layers = [[F.pad(t, grown) for t in pair] for pair in self.layers]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        self.layers = [[t[rows] for t in pair] for pair in self.layers]


@dataclass
class Sampling:
    """How the next token is drawn from the scores."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # draw among this many likeliest tokens; 0: all
    top_p: float = 1.0  # draw among the likeliest tokens that reach this probability together
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    seed: int = 0  # of what is drawn


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL (arXiv:1909.05858, eq. 2): scores of `seen` [B, V] / penalty if positive, else *."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k highest scores of each row."""
    floor = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < floor, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus (arXiv:1904.09751): -inf outside the smallest set of tokens that reaches p."""
    ordered, index = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the likelier tokens
    return logits.masked_fill((before >= p).gather(1, index.argsort()), -torch.inf)


def next_token(logits, seen, how: Sampling, samples: list[int], step: int) -> Tensor:
    """Draw from scores [B, V] one token per row [B].

    Sampling is Gumbel's argmax(logits + g), its noise keyed by (seed, sample, step): what is drawn
    for a prompt does not depend on the batch it is in.
    """
    if how.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, how.repetition_penalty)
    if how.temperature > 0:
        logits = logits / how.temperature
        logits = keep_top_k(logits, how.top_k) if how.top_k else logits
        logits = keep_top_p(logits, how.top_p) if how.top_p < 1 else logits
        ones = [1] * len(samples)
        keys = noise_keys(how.seed, samples, [step] * len(samples), ones, logits.device)  # [B]
        logits = logits - (-uniform(keys, logits.shape[1]).log()).log()
    return logits.argmax(-1)


def read_prompts(model: Llama, texts: list[list[int]]) -> tuple[Tensor, Cache]:
    """The last state [B, D] of each text, and their cache; equal texts are encoded once."""
    different = list(dict.fromkeys(map(tuple, texts)))
    rows = [different.index(tuple(text)) for text in texts]  # [B]
    lengths = [len(text) for text in different]
    ids = torch.tensor(list(itertools.chain(*different)), device=model.device)  # [T]
    last = send(torch.tensor(lengths).cumsum(0) - 1, model.device)  # [G]
    states, prefix = model.hidden(ids, lengths, keep_kv=True, wanted=last)  # [G, D]
    return states[rows], Cache(prefix.select(rows))


@torch.no_grad()
def generate_steps(model: Llama, prompts: list[list[int]], max_new_tokens: int, stop_ids=None,
                   temperature: float = 0.0, sampling: Sampling | None = None,
                   samples=()) -> Iterator[list[int | None]]:
    """Yield a token for each prompt per step; after its stop id a prompt gets None.

    `stop_ids` are the checkpoint's own by default. `sampling` says more than a temperature.
    `samples` names the prompts for the noise of sampling; by default they are numbered.
    """
    how, rope = sampling or Sampling(temperature), model.config.rope
    stop_ids = model.stop_ids if stop_ids is None else stop_ids
    samples = list(samples or range(len(prompts)))
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=model.device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=model.device)] = True

    texts, cache, token = [list(prompt) for prompt in prompts], None, None
    alive = list(range(len(prompts)))  # the prompts that still go on: the rows of seen and cache
    for step in range(max_new_tokens):
        with torch.compiler.set_stance("force_eager"):  # every step has a new length
            if cache is None:
                states, cache = read_prompts(model, [texts[i] for i in alive])
            else:
                states, _ = model.hidden(token, [1] * len(token), cache)  # [B, D]
                cache.advance()
        logits = model.next_logits(states)  # [B, V]
        token = next_token(logits, seen, how, [samples[i] for i in alive], step)  # [B]
        seen.scatter_(1, token[:, None], True)

        drawn = dict(zip(alive, token.tolist(), strict=True))
        for i, t in drawn.items():
            texts[i].append(t)
        yield [drawn.get(i) for i in range(len(prompts))]

        # Whoever has ended leaves the batch.
        going = [row for row, i in enumerate(alive) if drawn[i] not in stop_ids]
        if not going:
            return
        if len(going) < len(alive):
            alive, seen, token = [alive[row] for row in going], seen[going], token[going]
            cache.keep(going)

        # Past its length dynamic RoPE turns all tokens by other angles: read the texts again.
        longest = max(len(texts[i]) for i in alive)
        if rope["rope_type"] == "dynamic" and longest > rope["original_max_position_embeddings"]:
            cache = None


def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int, **how) -> list[list[int]]:
    """The continuation of each prompt, its stop id included (arguments of `generate_steps`)."""
    steps = list(generate_steps(model, prompts, max_new_tokens, **how)) if prompts else []
    return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]


# ---- skip on a first reading: RoPE's variants ----------------------------------------------------


def rope_frequencies(config: ModelConfig, lengths: Tensor) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions (RoFormer, arXiv:2104.09864, eq. 15), scaled.

    f_i = theta^(-2i/Dh); with factor s and pretraining length L0
      linear   f / s
      dynamic  theta <- theta * (s L/L0 - (s-1))^(Dh/(Dh-2)), L = max(length of the example, L0)
      llama3   by wavelength w = 2 pi/f: f/s if w > L0/low, f if w < L0/high, a blend between
      yarn     (arXiv:2309.00071, eq. 19-23) f/s and f blended over i; cos, sin times 0.1 ln s + 1

    `lengths` [B] are the examples' whole lengths in tokens. Returns frequencies [B or 1, Dh/2] and
    the factor for cos and sin. For dynamic, transformers takes the longest length of the padded
    batch; we take each example's own, so that its neighbours do not change it.
    """
    rope, d = config.rope, config.head_dim
    kind, s = rope["rope_type"], rope.get("factor")
    original = rope["original_max_position_embeddings"]
    theta = torch.full((1, 1), float(rope["rope_theta"]), device=lengths.device)
    if kind == "dynamic":
        length = lengths.clamp(min=original).float()[:, None]  # [B, 1]
        theta = theta * (s * length / original - (s - 1)) ** (d / (d - 2))
    f = 1.0 / theta ** (torch.arange(0, d, 2, device=lengths.device).float() / d)  # [B or 1, Dh/2]
    if kind == "linear":
        f = f / s
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        f = (1 - blend) * f / s + blend * f
    if kind != "yarn":
        return f, 1.0

    def dimension(turns: float) -> float:  # the i that turns so often within the pretraining length
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = ((torch.arange(d // 2, device=f.device) - low) / max(high - low, 0.001)).clamp(0, 1)

    grow, over, under = 0.1 * math.log(max(s, 1)), rope.get("mscale"), rope.get("mscale_all_dim")
    factor = (grow * over + 1) / (grow * under + 1) if over and under else grow + 1
    return f / s * ramp + f * (1 - ramp), rope.get("attention_factor") or factor


# ---- skip on a first reading: config.json --------------------------------------------------------

# what a missing key of config.json means in transformers 5; Yi, DeepSeek-LLM, SmolLM2 are "llama"
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
ROPE_NEEDS = {  # the parameters without which a RoPE type means nothing
    "default": [], "linear": ["factor"], "dynamic": ["factor"],
    "yarn": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
}


def read_config(source: dict) -> ModelConfig:
    """The ModelConfig of a config.json, in the old or the new style of RoPE keys.

    Raises InputError for what is not supported, KeyError for a key that is missing.
    """
    family = source.get("model_type")
    check(family in FAMILIES,
          f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    act = source.get("hidden_act", "silu")
    check(act == "silu", f"hidden_act {act} is not supported, only silu")

    # What is missing means what it means in transformers.
    values = {"max_position_embeddings": ModelConfig.max_position_embeddings, **FAMILIES[family]}
    values |= {**source, "source": source}
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        values[name] = int(source[name])  # a KeyError names what is missing
    heads = int(source["num_attention_heads"])
    values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
    values["windows"], values["rope"] = read_windows(values), read_rope(values)
    fields = ModelConfig.__dataclass_fields__
    return ModelConfig(**{name: values[name] for name in fields if name in values})


def read_windows(values: dict) -> list[int | None]:
    """Sliding window per layer: Mistral everywhere, Qwen from `max_window_layers` on, if at all."""
    family, layers = values["model_type"], values["num_hidden_layers"]
    window = values.get("sliding_window")
    if family == "mistral":
        return [window] * layers
    if family == "llama" or not values.get("use_sliding_window", False):
        return [None] * layers
    slides = [i >= values.get("max_window_layers", 28) for i in range(layers)]
    if values.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in values["layer_types"]]
    return [window if s else None for s in slides]


def read_rope(values: dict) -> dict:
    """The RoPE parameters: new style `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    check(kind in ROPE_NEEDS,
          f"RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_NEEDS)}")
    for key in ROPE_NEEDS[kind]:
        check(key in rope, f"RoPE type {kind} needs {key!r}")
    part = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    check(part == 1.0, "partial_rotary_factor other than 1 is not supported")

    key, length = "original_max_position_embeddings", values["max_position_embeddings"]
    if kind != "dynamic":  # which grows from max_position_embeddings, not from pretraining's length
        length = values.get(key) or rope.get(key) or length
    rope[key] = length
    return rope


# ---- skip on a first reading: load and save ------------------------------------------------------

SHARD_BYTES = 5 * 10**9  # largest weight file we write, as in the Hugging Face layout
INDEX = "model.safetensors.index.json"  # which file holds which weight, where there are several


class InputError(ValueError):
    """Input that cannot be used; the message is one line: what was found, how to fix it."""


def check(condition, message: str) -> None:
    """Raise InputError with the message unless `condition` holds."""
    if not condition:
        raise InputError(message)


def send(tensor: Tensor, device) -> Tensor:
    """A CPU tensor on the device, behind the work that is queued there: the host does not wait."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # the copy of pageable memory would wait
    return tensor.to(device, non_blocking=True)


def best_device(local: int = 0) -> torch.device:
    """CUDA, else MPS, else the CPU; `local` is the rank on this machine."""
    if torch.cuda.is_available():
        # Batches of ever new sizes would leave holes in the memory of the default allocator.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(local)  # else every rank would also open a context on GPU 0
        return torch.device("cuda", local)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def best_dtype(name: str, device: torch.device) -> torch.dtype:
    """fp32, bf16 or fp16; auto is fp32, on CUDA bf16, fp16 before Ampere (a T4 emulates bf16)."""
    if name == "auto":
        name = "fp32"
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def read_json(path: Path) -> dict:
    """The object of a JSON file, or an InputError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, found {type(value).__name__}")
        return value
    except FileNotFoundError:
        raise InputError(f"{path} is missing; is that a Hugging Face checkpoint?") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def checkpoint_file(folder: Path, name: str) -> Path:
    """The path of a checkpoint's file; where it is missing, InputError says what the folder is."""
    path = folder / name
    if path.is_file():
        with open(path, "rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
        check(not pointer, f"{path} is only a pointer of git-lfs; `git lfs pull` fetches the file")
        return path

    cached, inner = sorted(folder.glob("snapshots/*/config.json")), sorted(folder.glob(f"*/{name}"))
    if cached:
        raise InputError(f"{folder} is a cache of the hub; its checkpoint is {cached[-1].parent}")
    check(not (folder / "adapter_config.json").exists(), f"{folder} is an adapter, not a model; "
          "merge it into its base first (peft: merge_and_unload(), then save_pretrained)")
    check(folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)), f"no folder "
          f"{folder}; a model of the hub comes with `hf download {folder} --local-dir DIR`")
    check(name != "tokenizer.json" or not (folder / "tokenizer.model").exists(), f"{folder} has "
          "only tokenizer.model; AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of "
          "transformers writes tokenizer.json")
    hint = f"give {inner[0].parent}" if inner else "is that a Hugging Face checkpoint?"
    raise InputError(f"{path} is missing; {hint}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file of a checkpoint, or its shards."""
    if (folder / "model.safetensors").exists():
        return [checkpoint_file(folder, "model.safetensors")]
    check((folder / INDEX).exists(), f"no model.safetensors or {INDEX} in {folder} "
          "(weights in .bin files must be converted to safetensors first)")
    files = read_json(checkpoint_file(folder, INDEX)).get("weight_map")
    check(isinstance(files, dict), f"{folder / INDEX} has no weight_map")
    return [checkpoint_file(folder, name) for name in sorted(set(files.values()))]


def load_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder; InputError if it is missing or not supported."""
    path = checkpoint_file(Path(folder), "config.json")
    source = read_json(path)
    kind = (source.get("quantization_config") or {}).get("quant_method")
    check(not kind, f"{path}: the weights are quantised ({kind}); take the checkpoint in 16 bits")
    try:
        return ModelConfig.from_dict(source)
    except KeyError as error:
        raise InputError(f"{path}: key {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Llama:
    """The model of a folder in Hugging Face layout, in eval mode.

    It is built without storage and filled tensor by tensor: memory stays near the model's own size.
    Raises InputError for missing, left-over or misshapen weights or an unsupported config.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Llama(load_config(folder))
    missing = dict(model.named_parameters())
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    place(model, missing, name, file.get_tensor(name), dtype, device, path)
        except (SafetensorError, FileNotFoundError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
    first = next(iter(missing), None)
    check(not missing, f"{folder}: {len(missing)} weights are missing, the first is {first}")

    # What ends an answer by the checkpoint's own word: one id or a list of them.
    path = folder / "generation_config.json"
    settings = {**model.config.source, **(read_json(path) if path.exists() else {})}
    stop = settings.get("eos_token_id")
    model.stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
    return model.eval()


def place(model: Llama, missing: dict, name: str, tensor: Tensor, dtype, device, path) -> None:
    """Put a stored tensor where its name says and take it off the list of what is missing."""
    if name.endswith("rotary_emb.inv_freq"):  # stored by old conversions, derived here
        return
    if name == "lm_head.weight" and model.config.tie_word_embeddings:
        name = "model.embed_tokens.weight"  # tied: either name may be stored, or both
    if name not in missing:
        if name == "model.embed_tokens.weight" and torch.equal(model.head, tensor.to(model.head)):
            return
        check(name != "model.embed_tokens.weight", f"{path}: tie_word_embeddings is set, but "
              "lm_head.weight and model.embed_tokens.weight differ")
        quantised = name.endswith(("qweight", "qzeros", "absmax", "weight_scale", "scale_inv"))
        check(not quantised, f"{path}: the weights are quantised ({name}); take those in 16 bits")
        raise InputError(f"{path}: config.json leaves no place for weight {name}")
    check(tensor.is_floating_point() and tensor.itemsize > 1, f"{path}: weight {name} is stored as "
          f"{tensor.dtype}: quantised; take the checkpoint in 16 bits")
    want, shape = list(missing.pop(name).shape), list(tensor.shape)
    check(want == shape, f"{path}: weight {name} has shape {shape}, expected {want}")

    # First to the device, then to the type: 16 bits per weight travel, not 32.
    model.stored_dtype = tensor.dtype
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device).to(dtype)))


def add_token(model: Llama, token: int, like: int) -> None:
    """Copy row `like` of the embedding and the LM head to row `token`, maybe a new last one."""
    head = [] if model.config.tie_word_embeddings else [model.lm_head]
    for module in [model.model.embed_tokens, *head]:
        old = module.weight.data  # [V, D]
        rows = torch.cat((old[:token], old[like : like + 1], old[token + 1 :]))
        module.weight = nn.Parameter(rows)
    model.config.vocab_size = len(rows)
    model.config.source = {**model.config.source, "vocab_size": len(rows)}


def check_output(flag: str, output: str | Path, inputs=(), size: int = 2**20) -> None:
    """Raise InputError where an output is one of the inputs or cannot be written; leaves nothing.

    `flag` is --output for a file or --output_dir for a folder, `size` how many bytes will be
    written at least.
    """
    output = Path(output)
    kind = "folder" if flag == "--output_dir" else "file"
    for path in map(Path, inputs):
        same = path.resolve() == output.resolve()
        same = same or (path.exists() and output.exists() and path.samefile(output))
        check(not same, f"{flag} {output} is the input {path}; choose another place")

    # Tried in the nearest folder there is: what is refused later must leave no folder behind.
    folder = output.absolute()
    while not folder.is_dir():
        fine = not folder.exists() or (folder == output.absolute() and kind == "file")
        check(fine, f"{flag} {output} cannot be written: {folder} is a file")
        folder = folder.parent
    check(kind == "folder" or folder != output.absolute(),
          f"{flag} {output} cannot be written: it is a folder")
    try:
        free = shutil.disk_usage(folder).free
        check(free >= size, f"{flag} {output} cannot be written: {size / 1e9:.1f} GB are needed, "
              f"{free / 1e9:.1f} GB are free")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{flag} {output} cannot be written: {error.strerror}") from None


def write_atomic(path: Path, write) -> None:
    """Call write(temporary path), then rename: no reader or crash ever meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors leaves its files readable by their owner only
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written: {why}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A text file of lines, written as they come beside its place, then renamed into it."""

    def write(temporary: Path) -> None:
        escape = "backslashreplace"  # a lone surrogate becomes JSON's escape of it
        with open(temporary, "w", encoding="utf-8", errors=escape) as file:
            file.writelines(lines)

    write_atomic(path, write)


def write_json(path: Path, value: dict) -> None:
    """A JSON file, written beside its place and renamed into it."""
    write_lines(path, [json.dumps(value, ensure_ascii=False, indent=2) + "\n"])


def save(model: Llama, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """config.json and the weights, above 5 GB in shards with an index."""
    folder, shards, room = Path(folder), [], 0
    for name, parameter in model.named_parameters():
        if parameter.numel() * dtype.itemsize > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = parameter
        room -= parameter.numel() * dtype.itemsize
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]

    # The files that these replace: those of the folder's own checkpoint, and no stranger's.
    old, weight_map = {"model.safetensors", INDEX}, {}
    if (folder / INDEX).exists():
        listed = read_json(folder / INDEX).get("weight_map", {}).values()
        old |= {name for name in listed if Path(name).name == name}
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: p.detach().to("cpu", dtype).contiguous() for key, p in shard.items()}
        write_atomic(folder / name, lambda path, t=tensors: save_file(t, path, {"format": "pt"}))
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(p.numel() * dtype.itemsize for p in model.parameters())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(INDEX)
    for stale in old - set(names):
        (folder / stale).unlink(missing_ok=True)
    config = {k: v for k, v in model.config.source.items() if k not in ("torch_dtype", "dtype")}
    write_json(folder / "config.json", {**config, "torch_dtype": str(dtype).removeprefix("torch.")})
