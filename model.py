"""A Llama-family model by hand: Llama, TinyLlama, SmolLM2, Yi, DeepSeek-LLM, Mistral, Qwen2/2.5/3.

From small to large: configuration, rotary embedding, noise, attention, the model,
log-probabilities, generation, loading and saving in the Hugging Face layout. Three things differ
from most such files:

  flat tokens   a micro-batch is a vector of T tokens and the lengths of the examples in it; nothing
                is padded except inside attention
  prefix        attention can continue cached keys and values, and gradients flow into them
  log-probs     the LM head sees only positions whose next token is wanted, a chunk at a time

Shapes in the comments: T tokens in a micro-batch, B examples, L longest example, P prefix length,
D hidden size, H query heads, K key/value heads, Dh head size, V vocabulary, N supervised tokens.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SHARD_BYTES = 5 * 10**9  # largest weight file we write, as in the Hugging Face layout
INDEX = "model.safetensors.index.json"  # which file holds which weight, where there are several
LOGIT_ELEMENTS = 2**23  # logits alive at once in `token_logprobs` (32 MB in fp32)
HOLE = 2**30  # position of a padding slot: later than any query, so that no real token sees it


class InputError(ValueError):
    """Input that cannot be used; the message is one line: what was found, how to fix it."""


def check(condition, message: str) -> None:
    """Raise InputError with the message unless `condition` holds."""
    if not condition:
        raise InputError(message)


# ------------------------------------------------------------------------------------ configuration

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
        """Read a config.json of any of the families, in the old or the new style of RoPE keys."""
        family = source.get("model_type")
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise InputError(f"model_type {family!r} is not supported; supported are {known}")
        if source.get("hidden_act", "silu") != "silu":
            raise InputError(f"hidden_act {source['hidden_act']} is not supported, only silu")
        values = {"max_position_embeddings": cls.max_position_embeddings, **FAMILIES[family]}
        values |= {**source, "source": source}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            values[name] = int(source[name])  # a KeyError names what is missing
        heads = source["num_attention_heads"]
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
        values["windows"], values["rope"] = read_windows(values), read_rope(values)
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


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
    if kind not in ROPE_NEEDS:
        known = ", ".join(ROPE_NEEDS)
        raise InputError(f"RoPE type {kind!r} is not supported; supported are {known}")
    for key in ROPE_NEEDS[kind]:
        if key not in rope:
            raise InputError(f"RoPE type {kind} needs {key!r}")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError("partial_rotary_factor other than 1 is not supported")
    key, length = "original_max_position_embeddings", values["max_position_embeddings"]
    if kind != "dynamic":  # which grows from max_position_embeddings, not from pretraining's length
        length = values.get(key) or rope.get(key) or length
    rope[key] = length
    return rope


# --------------------------------------------------------------------------------- rotary embedding


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+Dh/2}) by its angle: the pairing of Hugging Face checkpoints."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ------------------------------------------------------------------------- noise as a pure function


def combine(key: Tensor, value: Tensor | int) -> Tensor:
    """A 32-bit hash of `value` under `key`, non-negative integers below 2^31 and 2^32.

    The mixer is of Wellons' hash prospector; multipliers below 2^31 keep int64 from overflow.
    """
    x = key + value * 0x9E3779B1 & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


def noise_keys(seed: int, epochs: list, examples: list, lengths: list, device="cpu") -> Tensor:
    """One 32-bit key a token [T], a function of (seed, epoch, example, position) and nothing else.

    NEFTune, dropout and sampling draw from it, so that neither the micro-batch, nor the rank, nor
    the device changes what a token gets.
    """
    epochs, examples, count = (torch.tensor(x, device=device) for x in (epochs, examples, lengths))
    key = combine(torch.tensor(seed % 2**31 + 1, device=device), 0)  # the hash of 0 would be 0
    key = combine(combine(key, epochs), examples)  # [B]
    starts = (count.cumsum(0) - count).repeat_interleave(count)  # [T]
    return combine(key.repeat_interleave(count), torch.arange(len(starts), device=device) - starts)


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
    count, L = (torch.tensor(x, device=keys.device) for x in (lengths, full_lengths or lengths))
    scale = alpha / (L * size).float().sqrt().repeat_interleave(count)  # [T]
    return (2 * uniform(keys, size) - 1) * scale[:, None]


def dropout(x: Tensor, p: float, noise: Tensor | None, site: int) -> Tensor:
    """Zero each element with probability p, scale the rest by 1/(1-p); no `noise`: evaluation."""
    if p == 0.0 or noise is None:
        return x
    kept = uniform(combine(noise, site + 1), x.shape[-1]) >= p  # [T, D]
    return x * kept / (1 - p)


# --------------------------------------------------------------------------- flat tokens, attention


@dataclass
class Prefix:
    """Keys and values of tokens that later tokens continue; gradients flow into them.

    Keys are stored rotated. Under dynamic RoPE past the pretraining length the angles change with
    every token, so that a prefix is then an approximation; `generate` does without it there.
    """

    layers: list[tuple[Tensor, Tensor]]  # a layer's keys and values, [G, K, P, Dh] each
    positions: Tensor  # [G, P]; HOLE where there is no token
    lengths: Tensor  # [G] tokens

    def select(self, rows: Tensor) -> "Prefix":
        """The prefix each of B examples continues: rows [B] of the G stored ones."""
        layers = [(k[rows], v[rows]) for k, v in self.layers]
        return Prefix(layers, self.positions[rows], self.lengths[rows])

    def extend(self, new: "Prefix") -> "Prefix":
        """Self followed by the tokens of `new`, which were computed after it."""
        pairs = zip(self.layers, new.layers, strict=True)
        layers = [(torch.cat((k, k2), 2), torch.cat((v, v2), 2)) for (k, v), (k2, v2) in pairs]
        return Prefix(layers, torch.cat((self.positions, new.positions), 1), new.lengths)


class Layout:
    """Where each of the T flat tokens stands: example, position, angles, and what it may see."""

    def __init__(self, config: ModelConfig, lengths: list[int], prefix: Prefix | None, device):
        count = torch.tensor(lengths, device=device)  # [B]
        self.B, self.L, T = len(lengths), max(lengths), sum(lengths)
        first = count.cumsum(0) - count  # [B] flat index of each example's first token
        column = torch.arange(T, device=device) - first.repeat_interleave(count)  # [T]
        row = torch.arange(self.B, device=device).repeat_interleave(count)  # [T]
        self.slot = row * self.L + column  # [T] index into the padded [B * L]
        self.dense = T == self.B * self.L
        start = prefix.lengths if prefix is not None else torch.zeros_like(count)  # [B]
        self.lengths = start + count  # [B] prefix included
        position = column + start[row]  # [T]
        self.positions = torch.full((self.B * self.L,), HOLE, device=device)
        self.positions = self.positions.index_copy(0, self.slot, position).view(self.B, self.L)

        frequencies, factor = rope_frequencies(config, self.lengths)  # [B or 1, Dh/2]
        angles = position[:, None] * frequencies.expand(self.B, -1)[row]  # [T, Dh/2]
        self.cos = factor * angles.cos()[:, None]  # [T, 1, Dh/2]
        self.sin = factor * angles.sin()[:, None]  # [T, 1, Dh/2]
        keys = self.positions
        if prefix is not None:
            keys = torch.cat((prefix.positions, keys), 1)  # [B, P + L]
        self.masks = {w: self.mask(keys, w, prefix is None) for w in set(config.windows)}

    def mask(self, keys: Tensor, window: int | None, causal_is_enough: bool) -> Tensor | None:
        """[B, 1, L, keys] True where a query sees a key: key <= query, and key > query - window."""
        if causal_is_enough and (window is None or window >= self.L):
            return None
        query, key = self.positions[:, None, :, None], keys[:, None, None, :]
        visible = key <= query  # a HOLE sees all, so that its softmax is not empty; nobody reads it
        return visible if window is None else visible & (key > query - window)

    def pad(self, x: Tensor) -> Tensor:
        """[T, heads, Dh] -> [B, heads, L, Dh]; padding stands right, after every real token."""
        if not self.dense:
            x = x.new_zeros(self.B * self.L, *x.shape[1:]).index_copy(0, self.slot, x)
        return x.view(self.B, self.L, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, heads, L, Dh] -> [T, heads * Dh]"""
        x = x.transpose(1, 2).reshape(self.B * self.L, -1)
        return x if self.dense else x[self.slot]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467, eq. 4), computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245): H query heads share K key/value heads.

        query heads   0 1 2 3   4 5 6 7
        key/value     ---0---   ---1---
    """

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        self.H, self.K = config.num_attention_heads, config.num_key_value_heads
        self.Dh, self.window = config.head_dim, window
        D, bias = config.hidden_size, config.attention_bias
        qkv_bias = bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, self.H * self.Dh, bias=qkv_bias)
        self.k_proj = nn.Linear(D, self.K * self.Dh, bias=qkv_bias)
        self.v_proj = nn.Linear(D, self.K * self.Dh, bias=qkv_bias)
        self.o_proj = nn.Linear(self.H * self.Dh, D, bias=bias and config.model_type != "qwen2")
        qwen3 = config.model_type == "qwen3"  # normalises every head of q and k, before RoPE
        self.q_norm = RMSNorm(self.Dh, config.rms_norm_eps) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(self.Dh, config.rms_norm_eps) if qwen3 else nn.Identity()

    def forward(self, x: Tensor, layout: Layout, past: tuple[Tensor, Tensor] | None, keep_kv: bool):
        """x [T, D] -> [T, D], and with `keep_kv` this layer's (keys, values) [B, K, L, Dh]."""
        q = self.q_norm(self.q_proj(x).view(-1, self.H, self.Dh))  # [T, H, Dh]
        k = self.k_norm(self.k_proj(x).view(-1, self.K, self.Dh))  # [T, K, Dh]
        v = layout.pad(self.v_proj(x).view(-1, self.K, self.Dh))  # [B, K, L, Dh]
        # under autocast q_norm and k_norm give fp32, the projections 16 bit
        q = layout.pad(rotate(q, layout.cos, layout.sin).to(v.dtype))  # [B, H, L, Dh]
        k = layout.pad(rotate(k, layout.cos, layout.sin).to(v.dtype))  # [B, K, L, Dh]
        kept = (k, v) if keep_kv else None
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # [B, K, P + L, Dh]
        if self.H != self.K:  # query head h reads key/value head h // (H / K)
            k, v = (t.repeat_interleave(self.H // self.K, 1) for t in (k, v))  # [B, H, P + L, Dh]
        mask = layout.masks[self.window]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(layout.unpad(out)), kept  # [T, D], from [B, H, L, Dh]


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
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both residual branches."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.dropout = index, 0.0
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.windows[index])
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: Layout, past, keep_kv: bool, noise: Tensor | None):
        attended, kept = self.self_attn(self.input_layernorm(x), layout, past, keep_kv)
        x = x + dropout(attended, self.dropout, noise, 2 * self.index)  # [T, D]
        changed = self.mlp(self.post_attention_layernorm(x))
        return x + dropout(changed, self.dropout, noise, 2 * self.index + 1), kept


class Llama(nn.Module):
    """The causal language model: `forward` gives log-probabilities, `hidden` the states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.model = nn.ModuleDict({  # the checkpoint's names of these weights begin with `model.`
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

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

    def initialize(self, seed: int) -> None:
        """Random weights of a new model: matrices normal (`initializer_range`), biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, ids, lengths, prefix: Prefix | None = None, keep_kv: bool = False,
               noise: Tensor | None = None, neftune_alpha: float = 0.0, full_lengths=None):
        """Last hidden states [T, D], after the last norm, of B examples end to end in `ids` [T].

        Examples do not see each other. `prefix` (B rows) stands before them. `noise` [T] from
        `noise_keys` switches on NEFTune and dropout, in training mode only; `full_lengths` [B] are
        then the lengths of the examples if these tokens are but a part of them. Returns the states,
        and with `keep_kv` a Prefix of these tokens, else None.
        """
        layout = Layout(self.config, lengths, prefix, ids.device)
        x = self.model.embed_tokens(ids)  # [T, D]
        noise = noise if self.training else None
        if noise is not None and neftune_alpha > 0:
            added = neftune_noise(noise, lengths, x.shape[1], neftune_alpha, full_lengths)
            x = x + added.to(x.dtype)
        kept = []
        for i, layer in enumerate(self.model.layers):
            past = prefix.layers[i] if prefix is not None else None
            if self.checkpoint_activations and self.training:  # noise needs no RNG state to replay
                x, kv = checkpoint(layer, x, layout, past, keep_kv, noise, use_reentrant=False,
                                   preserve_rng_state=False)
            else:
                x, kv = layer(x, layout, past, keep_kv, noise)  # [T, D]
            kept.append(kv)
        new = Prefix(kept, layout.positions, layout.lengths) if keep_kv else None
        return self.model.norm(x), new

    def forward(self, ids, lengths, targets, prefix=None, noise=None, neftune_alpha=0.0,
                full_lengths=None, equal_weights=False) -> Tensor:
        """ln p(token | those before it) [N] in nats, of the tokens at flat indices `targets` [N].

        A target is predicted from the state just before it, so an example's first token is none.
        """
        states, _ = self.hidden(ids, lengths, prefix, False, noise, neftune_alpha,
                                full_lengths)
        return token_logprobs(states[targets - 1], self.head, ids[targets], equal_weights)

    def next_logits(self, states: Tensor) -> Tensor:
        """Scores of every next token in fp32, for generation and exams: [B, D] -> [B, V]."""
        return (states @ self.head.to(states.dtype).T).float()


# -------------------------------------------------------------------------------- log-probabilities


def head_pass(states, head, targets, dtype, grad_states, grad_head, g=None) -> Tensor:
    """ln softmax(h W^T)[target] [N], a chunk of rows at a time: never all N * V logits at once.

    With p_i = softmax(h_i W^T) and d_i = onehot(target_i) - p_i, fills where they are not None
        grad_states  [N, D] with d_i W,
        grad_head    [V, D] with sum_i g_i d_i^T h_i (g_i = 1 where no g is given).
    """
    weight = head.to(dtype)  # [V, D]
    size = max(1, LOGIT_ELEMENTS // len(head))
    logp = states.new_empty(len(states), dtype=torch.float32)  # [N]
    for rows in (slice(i, i + size) for i in range(0, len(states), size)):
        h, target = states[rows].to(dtype), targets[rows, None]  # [rows, D], [rows, 1]
        d = (h @ weight.T).float()  # [rows, V] logits
        total = d.logsumexp(-1, keepdim=True)
        logp[rows] = (d.gather(1, target) - total)[:, 0]
        if grad_states is None and grad_head is None:
            continue
        d = d.sub_(total).exp_().neg_()  # in the memory of the logits
        d.scatter_add_(1, target, torch.ones_like(total))
        d = (d if g is None else d.mul_(g[rows, None])).to(dtype)
        if grad_states is not None:
            grad_states[rows] = (d @ weight).to(states.dtype)
        if grad_head is not None and grad_head.dtype == dtype:
            grad_head.addmm_(d.T, h)
        elif grad_head is not None:  # the sum is kept in the precision of the weights
            grad_head += d.T @ h
    return logp


class TokenLogprobs(torch.autograd.Function):
    """The gradient of `head_pass`: d/dh = g_i d_i W, d/dW = sum_i g_i d_i^T h_i for arriving g_i.

    d_i W is [N, D], so the forward keeps it. d/dW needs g_i: with `equal_weights` the forward sums
    it for g = 1, right if all g_i prove equal (the token mean of SFT); else the backward computes
    the logits again, chunk by chunk.
    """

    @staticmethod
    def forward(ctx, states, head, targets, equal_weights):
        kind = states.device.type
        autocast = torch.is_autocast_enabled(kind)
        ctx.dtype = torch.get_autocast_dtype(kind) if autocast else states.dtype
        # under no_grad the head, a parameter, still says that it needs a gradient; states do not
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] and equal_weights else None
        with torch.autocast(kind, enabled=False):
            logp = head_pass(states, head, targets, ctx.dtype, grad_states, grad_head)
        ctx.save_for_backward(states, head, targets, grad_states, grad_head)
        return logp

    @staticmethod
    def backward(ctx, g):
        states, head, targets, grad_states, grad_head = ctx.saved_tensors
        if grad_states is not None:
            grad_states = grad_states * g[:, None].to(grad_states.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_states, None, None, None
        if grad_head is not None and len(g) and bool((g == g[0]).all()):
            return grad_states, grad_head.mul_(g[0]), None, None
        grad_head = torch.zeros_like(head)
        with torch.autocast(states.device.type, enabled=False):
            head_pass(states, head, targets, ctx.dtype, None, grad_head, g)
        return grad_states, grad_head, None, None


def token_logprobs(states: Tensor, head: Tensor, targets: Tensor,
                   equal_weights: bool = False) -> Tensor:
    """ln p(target) in nats [N] from states [N, D], the head's weight [V, D] and target ids [N].

    The one place where hidden states become log-probabilities: training and evaluation come here.
    Set `equal_weights` if the loss gives every target the same weight (SFT does). It is a hint: if
    it is wrong the result is still right, only slower.
    """
    return TokenLogprobs.apply(states, head, targets, equal_weights)


# --------------------------------------------------------------------------------------- generation


@dataclass
class Sampling:
    """How the next token is drawn from the scores."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # draw among this many likeliest tokens; 0: all
    top_p: float = 1.0  # draw among the likeliest tokens that reach this probability together
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    seed: int = 0


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
    """Draw from scores [B, V] one token a row [B].

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


@torch.no_grad()
def generate_steps(model: Llama, prompts: list[list[int]], max_new_tokens: int, stop_ids=(),
                   sampling: Sampling | None = None, samples=()) -> Iterator[list[int | None]]:
    """Yield a token for each prompt a step; after its stop id a prompt gets None.

    `samples` names the prompts for the noise of sampling; by default they are numbered.
    """
    device, how, rope = model.device, sampling or Sampling(), model.config.rope
    samples = list(samples or range(len(prompts)))
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=device)] = True
    texts = new = prompts  # `new`: what the prefix does not hold yet
    alive, prefix = [True] * len(texts), None
    for step in range(max_new_tokens):
        lengths = [len(ids) for ids in new]
        ids = torch.tensor([t for ids in new for t in ids], device=device)  # [T]
        states, kept = model.hidden(ids, lengths, prefix, keep_kv=True)  # [T, D]
        prefix = kept if prefix is None else prefix.extend(kept)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1  # [B]
        token = next_token(model.next_logits(states[last]), seen, how, samples, step)  # [B]
        seen.scatter_(1, token[:, None], True)
        drawn = token.tolist()
        yield [t if go else None for t, go in zip(drawn, alive, strict=True)]
        alive = [go and t not in stop_ids for t, go in zip(drawn, alive, strict=True)]
        if not any(alive):
            return
        new = [[t] for t in drawn]
        texts = [[*text, t] for text, t in zip(texts, drawn, strict=True)]
        outgrown = max(map(len, texts)) > rope["original_max_position_embeddings"]
        if rope["rope_type"] == "dynamic" and outgrown:  # its angles have changed
            prefix, new = None, texts


def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int, **how) -> list[list[int]]:
    """The continuation of each prompt, its stop id included (arguments of `generate_steps`)."""
    steps = list(generate_steps(model, prompts, max_new_tokens, **how)) if prompts else []
    return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]


# ------------------------------------------------------------------------------------ load and save


def best_device(local: int = 0) -> torch.device:
    """CUDA, else MPS, else the CPU; `local` is the rank on this machine."""
    if torch.cuda.is_available():
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
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, found {type(value).__name__}")
        return value
    except FileNotFoundError:
        raise InputError(f"{path} is missing; is that a Hugging Face checkpoint?") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file of a checkpoint, or its shards."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        raise InputError(f"no model.safetensors or {INDEX} in {folder} "
                              "(weights in .bin files must be converted to safetensors first)")
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"{folder / INDEX} has no weight_map")
    return [folder / name for name in sorted(set(files.values()))]


def load_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder; InputError if it is missing or not supported."""
    path = Path(folder) / "config.json"
    source = read_json(path)
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
    if missing:
        first = next(iter(missing))
        raise InputError(f"{folder}: {len(missing)} weights are missing, the first is {first}")
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
        if name == "model.embed_tokens.weight":
            raise InputError(f"{path}: tie_word_embeddings is set, but lm_head.weight and "
                                  "model.embed_tokens.weight differ")
        raise InputError(f"{path}: config.json leaves no place for weight {name}")
    want, shape = list(missing.pop(name).shape), list(tensor.shape)
    if want != shape:
        raise InputError(f"{path}: weight {name} has shape {shape}, expected {want}")
    model.stored_dtype = tensor.dtype
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype)))


def add_token(model: Llama, token: int, like: int) -> None:
    """Copy row `like` of the embedding and the LM head to row `token`, maybe a new last one."""
    head = [] if model.config.tie_word_embeddings else [model.lm_head]
    for module in [model.model.embed_tokens, *head]:
        old = module.weight.data  # [V, D]
        rows = torch.cat((old[:token], old[like : like + 1], old[token + 1 :]))
        module.weight = nn.Parameter(rows)
    model.config.vocab_size = len(rows)
    model.config.source = {**model.config.source, "vocab_size": len(rows)}


def write_atomic(path: Path, write) -> None:
    """Call write(temporary path), then rename: no reader or crash ever meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors leaves its files readable by their owner only
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
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
    weight_map = {}
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: p.detach().to("cpu", dtype).contiguous() for key, p in shard.items()}
        write_atomic(folder / name, lambda path, t=tensors: save_file(t, path, {"format": "pt"}))
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(p.numel() * dtype.itemsize for p in model.parameters())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(INDEX)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    config = {k: v for k, v in model.config.source.items() if k not in ("torch_dtype", "dtype")}
    write_json(folder / "config.json", {**config, "torch_dtype": str(dtype).removeprefix("torch.")})
