"""A Llama-family model by hand: Llama, TinyLlama, SmolLM2, Yi, DeepSeek-LLM, Mistral, Qwen2/2.5/3.

First the mathematics: the model from its norm to its last hidden state, attention over examples of
any length, noise, log-probabilities, generation. Then what one looks up: RoPE's variants, what the
keys of config.json mean, loading and saving. Three things differ from most such files:

  flat tokens   a micro-batch is a vector of T tokens and the lengths of the examples in it; nothing
                is padded, not even inside attention
  prefix        attention can continue kept keys and values, and gradients flow into them
  log-probs     the LM head sees only positions whose next token is wanted, a chunk at a time

On a CPU a run repeats, and resumes, bit for bit. CUDA cannot promise that: some of its kernels add
by atomics, in any order. There a resumed run, or one with other hardware settings, agrees with the
first to rounding only.

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
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

# The threads of a small model wait for each other thousands of times a second. GNU OpenMP lets a
# thread spin for 300,000 rounds before it sleeps: fast on an idle machine, but beside one busy
# process the thread that is waited for has lost its core, and the spinning lasts. OpenMP reads
# this when torch is imported, so the scripts import this file first. What the user set wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# oneDNN keeps the kernels of the last 1,024 shapes of 16-bit products. The number of flat tokens is
# new in nearly every micro-batch, so most of them never serve again. With 128 of them 20 steps of a
# 50M model take 2.7 GB instead of 3.4, and the same time to 1%.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ==== read: the model =============================================================================


@dataclass
class ModelConfig:
    """The keys of a Hugging Face config.json that shape the computation; see `read_config`."""

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
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o; qwen2 has it on q, k, v whatever this says
    mlp_bias: bool = False
    initializer_range: float = 0.02


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467, eq. 4), in the wider of their types.

    What comes out is read by matrix products alone, so it is cast to their type here, once.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.promote_types(x.dtype, self.weight.dtype)
        x, weight, narrow = x.to(kind), self.weight.to(kind), product_dtype(self.weight)

        # On a CPU CPUNorm, far below, gives the same with a faster gradient. Squares of 16-bit
        # inputs it would sum in 16 bits.
        by_hand = x.device.type == "cpu" and kind == torch.float32
        if by_hand and not torch.compiler.is_compiling():
            return CPUNorm.apply(x, weight, self.eps, narrow)
        return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(narrow)


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


class Projection(nn.Linear):
    """h = W x + b, and where there is an adapter h = W x + b + (alpha / r) B A dropout(x).

    LoRA (arXiv:2106.09685, eq. 3): W [out, in] is frozen, A [r, in] and B [out, r] are trained, a
    hundredth of its size. B begins with 0, so that training begins with the model as it was. The
    adapter stands beside the weight, so that the checkpoint's names stay what they are.
    """

    def __init__(self, size_in: int, size_out: int, bias: bool):
        super().__init__(size_in, size_out, bias=bias)
        self.lora_A = self.lora_B = None  # from `add_adapter`, with scale, site and lora_dropout

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """[T, in] -> [T, out]; `noise` [T] is what the adapter's dropout draws from."""
        # A frozen weight may be stored in fewer bits than x has.
        weight = self.weight if self.weight.requires_grad else self.weight.to(x.dtype)
        h = F.linear(x, weight, self.bias)  # [T, out]
        if self.lora_A is None:
            return h
        low = self.lora_A(dropout(x, self.lora_dropout, noise, self.site))  # [T, r]
        return h + self.scale * self.lora_B(low)  # [T, out]

    def merged(self) -> Tensor:
        """The weight that alone does the same, W + (alpha / r) B A in fp32: [out, in]."""
        W, A, B = (m.weight.detach().float() for m in (self, self.lora_A, self.lora_B))
        return W + self.scale * B @ A


class Attention(nn.Module):
    """The projections of grouped-query attention (arXiv:2305.13245): H heads share K keys, values.

        query heads   0 1 2 3   4 5 6 7
        key/value     ---0---   ---1---
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.Dh = config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        all_q, all_kv = config.num_attention_heads * self.Dh, config.num_key_value_heads * self.Dh
        qwen2, qwen3 = config.model_type == "qwen2", config.model_type == "qwen3"
        self.q_proj = Projection(D, all_q, bias=bias or qwen2)
        self.k_proj = Projection(D, all_kv, bias=bias or qwen2)
        self.v_proj = Projection(D, all_kv, bias=bias or qwen2)
        self.o_proj = Projection(all_q, D, bias=bias and not qwen2)

        # Qwen3 normalises every head of q and k before they are rotated.
        self.q_norm = RMSNorm(self.Dh, config.rms_norm_eps) if qwen3 else nn.Identity()
        self.k_norm = RMSNorm(self.Dh, config.rms_norm_eps) if qwen3 else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, noise: Tensor | None):
        """Queries [T, H, Dh], keys and values [T, K, Dh] of states x [T, D]."""
        q = self.q_norm(self.q_proj(x, noise).unflatten(1, (-1, self.Dh)))  # [T, H, Dh]
        k = self.k_norm(self.k_proj(x, noise).unflatten(1, (-1, self.Dh)))  # [T, K, Dh]
        v = self.v_proj(x, noise).unflatten(1, (-1, self.Dh))  # [T, K, Dh]
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202, eq. 6): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Projection(D, hidden, bias=bias)
        self.up_proj = Projection(D, hidden, bias=bias)
        self.down_proj = Projection(hidden, D, bias=bias)

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x, noise)) * self.up_proj(x, noise), noise)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both residual branches.

    Tokens meet in `attention` alone. What stands before and after it treats every token by itself,
    knows neither examples nor the layer's number: compiled, it serves all layers and lengths.
    """

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        self.window, self.dropout = window, 0.0
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor, noise: Tensor | None):
        """What attention needs of the residual stream x [T, D]."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin, noise)

    def after(self, x: Tensor, attended: Tensor, noise: Tensor | None) -> Tensor:
        """Add what attention found [T, H, Dh], and what the MLP makes of the sum: [T, D]."""
        found = self.self_attn.o_proj(attended.flatten(1), noise)  # [T, D], from [T, H * Dh]
        x = x + dropout(found, self.dropout, noise, 0)
        changed = self.mlp(self.post_attention_layernorm(x), noise)  # [T, D]
        return x + dropout(changed, self.dropout, noise, 1)

    def forward(self, x: Tensor, layout: "Layout", past, keep_kv: bool, noise: Tensor | None,
                wanted: Tensor | None):
        """x [T, D] -> [T, D] (or [N, D] of the tokens `wanted`), and maybe (keys, values).

        Tokens that are not wanted still serve the others as keys and values.
        """
        q, k, v = self.before(x, layout.cos, layout.sin, noise)

        # The last layer of a prefix, if nobody asks for a state: keys and values are all there is.
        if keep_kv and wanted is not None and len(wanted) == 0:
            return x[:0], (k, v)
        attended = layout.attention(q, k, v, past, layout, self.window)  # [T, H, Dh]

        # From here on tokens are on their own: those that nobody asks for may go.
        if wanted is not None:
            x = x.index_select(0, wanted)  # [N, D]
            attended = attended.index_select(0, wanted)  # [N, H, Dh]
            noise = None if noise is None else noise.index_select(0, wanted)  # [N]
        return self.after(x, attended, noise), (k, v) if keep_kv else None


class Llama(nn.Module):
    """The causal language model: `forward` gives log-probabilities, `hidden` the states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.stop_ids = ()  # the tokens that end an answer; `load` fills them in
        self.adapter = {}  # with LoRA the keys of PEFT's adapter_config.json; see `add_adapter`

        # nn.Embedding(V, D) draws the same numbers, but on the meta device of `load` it would first
        # import torch's compiler, for two seconds.
        embedding = torch.randn(config.vocab_size, config.hidden_size)

        # The names are those of the checkpoint, where these weights begin with `model.`.
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(embedding, freeze=False),
            "layers": nn.ModuleList(Block(config, window) for window in config.windows),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, ids, lengths, prefix: "Prefix | Cache | None" = None, keep_kv: bool = False,
               noise: Tensor | None = None, neftune_alpha: float = 0.0, full_lengths=None,
               wanted: Tensor | None = None, parents: list | None = None):
        """Last hidden states [T, D], after the last norm, of B examples end to end in `ids` [T].

        prefix        what stands before each example (B rows)
        keep_kv       whether the second thing returned is a Prefix of these tokens, or None
        noise         [T] from `noise_keys`: the hashes that NEFTune and dropout draw from, in
                      training mode only; None: neither
        full_lengths  [B] for NEFTune: the lengths of the examples if these tokens are but a part
        wanted        [N] flat indices of the tokens whose states are asked for; None: of all
        parents       [B] in place of a prefix: the earlier example that each one continues, or None
        """
        x = self.model.embed_tokens(ids)  # [T, D]
        x = x.to(self.model.norm.weight.dtype)  # the embedding may be stored in fewer bits
        layout = Layout(self.config, lengths, prefix, parents, x.device, product_dtype(x))

        # Noise is for training. In evaluation it is ignored, whoever passes it.
        noise = noise if self.training else None
        if noise is not None and neftune_alpha > 0:
            added = neftune_noise(noise, lengths, x.shape[1], neftune_alpha, full_lengths)
            x = x + added.to(x.dtype)

        kept, last = [], len(self.model.layers) - 1
        for i, layer in enumerate(self.model.layers):
            past = prefix.layers[i] if prefix is not None else None
            mine = None
            if noise is not None and (layer.dropout or self.adapter.get("lora_dropout")):
                mine = combine(noise, torch.full_like(noise, i + 1))  # [T] each layer draws its own

            # Checkpointing computes the layer again in the backward pass. Our noise is a function
            # of its keys: there is no state of a generator to bring back.
            run = layer
            if self.checkpoint_activations and self.training:
                run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)

            # Only the last layer may spare itself tokens: all others feed the keys of the next.
            x, kv = run(x, layout, past, keep_kv, mine, wanted if i == last else None)  # [T, D]
            kept.append(kv)
        return self.model.norm(x), Prefix(kept, list(lengths)) if keep_kv else None

    def forward(self, ids, lengths, targets, prefix=None, **given) -> Tensor:
        """ln p(token | those before it) [N] in nats, of the tokens at flat indices `targets` [N].

        A target is predicted from the state before it, so an example's first token is never one.
        What else is `given` goes to `hidden`: noise, neftune_alpha, full_lengths, parents.
        """
        states, _ = self.hidden(ids, lengths, prefix, wanted=targets - 1, **given)  # [N, D]
        return token_logprobs(states, self.head, ids[targets])

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
        """Compile what layers do to single tokens: the graphs serve every layer and length."""
        # Noise, gradients, recomputation, a lone token make graphs of their own, up to 24 in all.
        # With fullgraph more than the limit are an error, and by default it is 8 per function.
        torch._dynamo.config.cache_size_limit = 64  # the name that all versions know
        for layer in self.model.layers:
            layer.before = torch.compile(layer.before, dynamic=True, fullgraph=True, **options)
            layer.after = torch.compile(layer.after, dynamic=True, fullgraph=True, **options)

    def initialize(self, seed: int) -> None:
        """Random weights of a new model: matrices normal (`initializer_range`), biases 0."""
        # Norms begin with 1, as they were built.
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


# ==== read: attention over flat tokens ============================================================


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
    age = position[:, None] - torch.arange(S, device=position.device)  # [L, S] how far back
    return (age >= 0) & (age < (window or S))


def attention(q: Tensor, k: Tensor, v: Tensor, past, layout: "Layout", window) -> Tensor:
    """`plain_attention` of every example: queries [T, H, Dh], keys and values [T, K, Dh].

    `past` is this layer's part of the `Prefix` that the examples continue: keys and values of its
    texts, end to end, [stored, K, Dh] each; None without a prefix. There is one call per group of
    equally long neighbours: nothing is padded, so no work is wasted.

    This way works everywhere. Generation and CUDA have their own, which a `Layout` chooses.
    """
    if past is not None:
        k, v = torch.cat((past[0], k)), torch.cat((past[1], v))  # [stored + T, K, Dh] each

    # Cut the queries into calls, and what they may see into pieces, of which a call sees two.
    q = q.split([b * L for b, L, _, _ in layout.calls])
    k, v = k.split(layout.pieces), v.split(layout.pieces)
    found = []
    for query, (b, L, parent, own) in zip(q, layout.calls, strict=True):
        query, key, value = (t.unflatten(0, (b, -1)) for t in (query, k[own], v[own]))

        # The b examples of a call continue the same tokens: keys and values [b, S, K, Dh].
        if parent is not None:
            key = torch.cat((k[parent].expand(b, -1, -1, -1), key), 1)
            value = torch.cat((v[parent].expand(b, -1, -1, -1), value), 1)

        # The causal kernel skips the half of the square [S, S] that a mask would hide.
        S, mask = key.shape[1], None
        if L < S or (window or S) < S:
            mask = layout.mask(L, S, window, q[0])  # [L, S]
        found.append(attend(query, key, value, mask).flatten(0, 1))  # [b * L, H, Dh]
    return torch.cat(found)  # [T, H, Dh]


FEW_QUERIES = 192  # measured; see `attend`


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention of [B, L, H, Dh] queries over [B, S, K, Dh] keys; no mask: causal."""
    kind, shared = q.dtype, q.shape[2] != k.shape[2]  # query head h reads key head h // (H / K)

    # On a CPU the kernel for gradients in 16 bits takes up to 2.6 times as long as that in fp32,
    # when there are few queries.
    few = q.requires_grad and q.device.type == "cpu" and q.shape[1] < FEW_QUERIES
    if few:
        q, k, v, mask = (t if t is None else t.float() for t in (q, k, v, mask))

    # CUDA's kernels take a mask or shared heads: with both, all scores would be written out.
    if shared and mask is not None and q.device.type != "cpu":
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
        shared = False
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, tokens, Dh]
    with torch.autocast("cpu", enabled=False) if few else nullcontext():  # it would undo the cast
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                             enable_gqa=shared)
    return out.transpose(1, 2).to(kind)  # [B, L, H, Dh]


@dataclass
class Prefix:
    """Keys and values of tokens that later tokens continue; gradients flow into them.

    Keys are stored rotated: an approximation under dynamic RoPE past the pretraining length, where
    the angles change with every token. `generate` does without it there.
    """

    layers: list[tuple[Tensor, Tensor]]  # a layer's keys and values, [S, K, Dh]: G end to end
    lengths: list[int]  # [G] tokens of each
    rows: list[int] | None = None  # [B] which of the G each example continues; None: its own

    def select(self, rows: Iterable[int]) -> "Prefix":
        """The prefixes that B examples continue: `rows` [B] of the G stored ones."""
        return Prefix(self.layers, self.lengths, list(rows))


class Layout:
    """Where each of the T flat tokens stands, and which keys its example sees.

    All of it is known from the lengths alone, so it is worked out on the CPU and sent once.
    """

    def __init__(self, config: ModelConfig, lengths: list[int], prefix: "Prefix | Cache | None",
                 parents: list | None, device: torch.device, dtype: torch.dtype):
        B, T = len(lengths), sum(lengths)

        # What each example continues: a stored text, an example of these, or nothing.
        stored, rows = [], parents or [None] * B
        if prefix is not None:
            stored, rows = prefix.lengths, prefix.rows or list(range(B))
        known = stored or lengths
        start = torch.tensor([0 if row is None else known[row] for row in rows])  # [B] tokens

        # Positions restart with every example and go on where what it continues ends.
        count = torch.tensor(lengths)  # [B]
        first = count.cumsum(0) - count  # [B] flat index of each example's first token
        example = torch.arange(B).repeat_interleave(count)  # [T]
        position = torch.arange(T) + (start - first)[example]  # [T]

        # The angles of RoPE, the same for all layers and heads.
        frequencies, factor = rope_frequencies(config, start + count)  # [B or 1, Dh/2]
        angles = position[:, None] * frequencies.expand(B, -1)[example]  # [T, Dh/2]
        turns = factor * torch.stack((angles.cos(), angles.sin()))  # [2, T, Dh/2]
        self.cos, self.sin = send(turns[:, :, None], device)  # [T, 1, Dh/2] each

        # How attention is computed: as above wherever there is nothing faster.
        self.attention = attention
        if isinstance(prefix, Cache):
            self.attention = attend_cached
            self.place = send(torch.stack((torch.arange(B), start)), device)  # [2, B] row, column
        elif varlen_fits(config, device, dtype):
            self.attention = attend_varlen
            plan_varlen(self, torch.stack((count, start + count)), stored, rows, device)
        else:
            self.plan_calls(lengths, stored, rows)

    def plan_calls(self, lengths: list[int], stored: list[int], rows: list) -> None:
        """Which calls `attention` makes: (examples, queries of each, parent's piece, own piece).

        `pieces` are the sizes of what keys are cut into: the stored texts, then a piece per call.
        """
        self.pieces, self.calls, self.masks, i = list(stored), [], {}, 0
        parents, place = set() if stored else set(rows), {}

        # Neighbours that are equally long and continue the same share a call; a parent is alone.
        alone = [i if i in parents else None for i in range(len(rows))]
        alike = itertools.groupby(zip(rows, lengths, alone, strict=True))
        for (row, length, _), members in alike:
            b, place[i] = len(list(members)), len(self.pieces)
            parent, L = row if stored else place.get(row), length

            # Right behind its parent an only child is one text with it: one causal call, no mask,
            # whose queries are of both, and whose keys are the parent's piece and its own.
            if b == 1 and row == i - 1 and not stored:
                L += self.calls.pop()[1]
            self.calls.append((b, L, parent, place[i]))
            self.pieces.append(b * length)
            i += b

    def mask(self, L: int, S: int, window: int | None, q: Tensor) -> Tensor:
        """[L, S] what to add to the scores of the last L of S tokens: 0, or -inf where unseen."""
        # Worked out in the first layer, used by all. `visible` says the same, but slower.
        key = L, S, window, q.dtype
        if key not in self.masks:
            self.masks[key] = q.new_full((L, S), -torch.inf).triu(S - L + 1)  # later tokens
            if window:
                far = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L - window)
                self.masks[key].masked_fill_(far, -torch.inf)
        return self.masks[key]


# ==== read: noise as a pure function ==============================================================


def combine(key: Tensor, value: Tensor) -> Tensor:
    """A 32-bit hash of `value` under `key`, both int32: the mixer of Wellons' hash prospector.

    Sums and products of int32 wrap around, on every device: they are those modulo 2^32.
    """
    x = key + value * -0x61C8864F  # 0x9E3779B1 less 2^32, the same modulo 2^32
    x = (x ^ shift_right(x, 16)) * 0x21F0AAAD
    x = (x ^ shift_right(x, 15)) * 0x735A2D97
    return x ^ shift_right(x, 15)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """The 32 bits of x moved to the right; zeros come in from the left, where >> copies a sign."""
    return (x >> bits) & (2 ** (32 - bits) - 1)


def noise_keys(seed: int, visits: list, examples: list, lengths: list, device="cpu") -> Tensor:
    """One 32-bit key per token [T], a function of (seed, visit, example, position) alone.

    NEFTune, dropout and sampling draw from it, so that neither the micro-batch, nor the rank, nor
    the device changes what a token gets.
    """
    # The seed plus 1, for the hash of 0 would be 0.
    seed, visit, example = (torch.tensor(x, dtype=torch.int32)
                            for x in (seed % 2**31, visits, examples))
    key = combine(seed + 1, torch.zeros_like(seed))
    key = combine(combine(key, visit), example)  # [B]

    # Positions count from the example's own start, not from the micro-batch's.
    count = torch.tensor(lengths)  # [B]
    starts = (count.cumsum(0) - count).repeat_interleave(count)  # [T]
    position = (torch.arange(len(starts)) - starts).int()  # [T]
    return send(combine(key.repeat_interleave(count), position), device)


def uniform(keys: Tensor, size: int) -> Tensor:
    """`size` uniform numbers in (0, 1) for each key: [T] -> [T, size], alike on every device."""
    columns = torch.arange(size, dtype=torch.int32, device=keys.device)
    bits = shift_right(combine(keys[:, None], columns), 9)  # [T, size]
    return (bits.float() + 0.5) / 2**23  # 23 bits, and half of their unit, are exact in fp32


def neftune_noise(keys: Tensor, lengths: list[int], size: int, alpha: float,
                  full_lengths=None) -> Tensor:
    """NEFTune (arXiv:2310.05914, algorithm 1): U(-1, 1) * alpha / sqrt(L d), for embeddings [T, d].

    L is the true number of tokens of each example, prompt and answer, as in the authors' code (the
    Hugging Face hook takes the padded width, which depends on the neighbours). `full_lengths` gives
    L where `lengths` [B] are but parts of the examples.
    """
    L = torch.tensor(full_lengths or lengths)  # [B]
    scale = alpha / (L * size).float().sqrt()  # [B]
    scale = send(scale.repeat_interleave(torch.tensor(lengths)), keys.device)  # [T]
    return (2 * uniform(keys, size) - 1) * scale[:, None]


def dropout(x: Tensor, p: float, noise: Tensor | None, site: int) -> Tensor:
    """Zero each element with probability p, scale the rest by 1/(1-p); no `noise`: evaluation.

    `site` is the number of the place in a layer where this happens, so that every place draws its
    own: 0 after attention, 1 after the MLP, from 2 on before the adapter of each projection.
    """
    if p == 0.0 or noise is None:
        return x
    mine = combine(noise, torch.full_like(noise, site + 1))  # [T]
    kept = uniform(mine, x.shape[-1]) >= p  # [T, D]
    return x * kept / (1 - p)


# ==== read: log-probabilities =====================================================================


def plain_logprobs(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """What `token_logprobs` computes, with all N * V logits at once: read this, run the other."""
    logits = states @ head.to(states.dtype).T  # [N, V]
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]  # [N]


def token_logprobs(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """ln p(target) in nats [N] from states [N, D], the head's weight [V, D] and target ids [N].

    The one place where hidden states become log-probabilities: training and evaluation come here.
    """
    return TokenLogprobs.apply(states, head, targets)


# ---- skip on a first reading: the same, a chunk at a time ----------------------------------------


LOGIT_BYTES = 2**27  # of logits alive at once
CACHED_LOGITS = 2**20  # of them in fp32 at a time: 4 MB stay in a processor's cache
CUDA_LOGITS = 2**31, 2**26  # the same on CUDA: small chunks would read the whole head too often


def logit_sizes(device: torch.device) -> tuple[int, int]:
    """How many bytes of logits are alive at once, and how many of them in fp32 at a time."""
    return CUDA_LOGITS if device.type == "cuda" else (LOGIT_BYTES, CACHED_LOGITS)


def logit_chunks(states: Tensor, weight: Tensor, targets: Tensor, residuals: bool):
    """Yield (rows, ln p(target) [n], logits h W^T [n, V]) of some rows: never all N * V at once.

    With `residuals` the last are r = softmax - onehot(target), in the type of the products.
    """
    most, few = logit_sizes(states.device)
    size = max(1, most // (len(weight) * weight.itemsize))
    for first in range(0, len(states), size):
        rows = slice(first, first + size)
        logits = states[rows].to(weight.dtype) @ weight.T  # [n, V]

        # A softmax reads its row several times: so few rows that the cache holds them.
        logp, few_rows = [], max(1, few // len(weight))
        for part, target in zip(logits.split(few_rows), targets[rows, None].split(few_rows),
                                strict=True):
            log_softmax = part.float().log_softmax(-1)  # [few, V]
            logp.append(log_softmax.gather(1, target)[:, 0])
            if residuals:
                # The residuals, in the memory of the softmax.
                minus = log_softmax.new_full(target.shape, -1.0)  # [few, 1]
                part.copy_(log_softmax.exp_().scatter_add_(1, target, minus))
        yield rows, torch.cat(logp), logits


class TokenLogprobs(torch.autograd.Function):
    """`plain_logprobs` and its gradients, a chunk of rows at a time.

    The gradient of ln p_i by its logits h_i W^T is -r_i, the residual of row i. So for arriving
    gradients g_i

        dL/dh_i = -g_i r_i W           is only [N, D]: the forward pass keeps -r_i W
        dL/dW   = -sum_i g_i r_i^T h_i mixes the g_i, which the forward pass cannot know: it keeps
                                       the r_i of a single chunk, else they are computed again
    """

    @staticmethod
    def forward(ctx, states, head, targets):
        ctx.dtype = product_dtype(states)
        weight = head.to(ctx.dtype)  # [V, D]
        logp = states.new_empty(len(states), dtype=torch.float32)  # [N]

        # Under no_grad the head still has requires_grad=True. The states tell whether a gradient
        # is wanted.
        gradient, head_too = ctx.needs_input_grad[:2]
        grad_states, kept = torch.empty_like(states) if gradient else None, None
        for rows, logp[rows], r in logit_chunks(states, weight, targets, gradient):
            if gradient:
                grad_states[rows] = -(r @ weight)  # [n, D]
            if gradient and head_too and len(r) == len(states):
                kept = r  # [N, V]
        ctx.save_for_backward(states, head, targets, grad_states, kept)
        return logp

    @staticmethod
    def backward(ctx, g):
        states, head, targets, grad_states, kept = ctx.saved_tensors
        if grad_states is not None:
            grad_states = grad_states * g[:, None].to(grad_states.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_states, None, None

        weighted = (states * -g[:, None]).to(ctx.dtype)  # [N, D]
        if kept is not None:
            return grad_states, (kept.T @ weighted).to(head.dtype), None

        # Summed over the chunks in fp32, whatever the type of the products.
        grad_head = torch.zeros_like(head, dtype=torch.float32)  # [V, D]
        for rows, _, r in logit_chunks(states, head.to(ctx.dtype), targets, True):
            grad_head += r.T @ weighted[rows]
        return grad_states, grad_head.to(head.dtype), None


# ---- skip on a first reading: generation ---------------------------------------------------------

CACHE_BLOCK = 64  # tokens by which the cache grows, so that it is not copied for every token


class Cache:
    """Keys and values of texts that grow by one token per step: rows of like room, filled in place.

    `layers` hold [B, room, K, Dh] each; of row b the first `lengths[b]` tokens are there.
    """

    rows = None  # every row continues itself

    def __init__(self, prefix: Prefix):
        # Texts that were encoded once part here: every row gets room of its own.
        self.layers, self.lengths = [], [prefix.lengths[row] for row in prefix.rows]  # [B]
        for pair in prefix.layers:
            padded = [nn.utils.rnn.pad_sequence(t.split(prefix.lengths), True) for t in pair]
            self.layers.append([t[prefix.rows] for t in padded])  # [B, longest, K, Dh]
        self.advance(0)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in every row; where the longest has no room left, add a block."""
        self.lengths = [length + tokens for length in self.lengths]
        room = self.layers[0][0].shape[1]
        if max(self.lengths) == room:
            behind = (0, 0, 0, 0, 0, CACHE_BLOCK - room % CACHE_BLOCK)  # of [B, room, K, Dh]
            self.layers = [[F.pad(t, behind) for t in pair] for pair in self.layers]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        self.layers = [[t[rows] for t in pair] for pair in self.layers]


def attend_cached(q, k, v, past, layout, window) -> Tensor:
    """One new token per row: it joins its row's cache [B, room, K, Dh], and looks at all of it."""
    row, column = layout.place  # [B] each
    for stored, new in zip(past, (k, v), strict=True):
        stored[row, column] = new

    # A mask hides what lies behind the end of each row. To look at all the room there is keeps the
    # shapes the same for many tokens: a GPU looks for a kernel again whenever they change.
    mask = visible(column, past[0].shape[1], window)[:, None, None]  # [B, 1, 1, room]
    return attend(q[:, None], *past, mask)[:, 0]  # [B, H, Dh]


@dataclass
class Sampling:
    """How the next token is drawn from the scores."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # draw among this many likeliest tokens; 0: all
    top_p: float = 1.0  # draw among the likeliest tokens that reach this probability together
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    seed: int = 0  # of what is drawn


def adjust_scores(logits: Tensor, seen: Tensor, how: Sampling) -> Tensor:
    """The scores [B, V] to draw from; `seen` [B, V] are the tokens that stand in each text."""
    if how.repetition_penalty != 1.0:  # CTRL, arXiv:1909.05858, eq. 2
        up, down = logits * how.repetition_penalty, logits / how.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, down, up), logits)
    if how.temperature > 0:
        logits = logits / how.temperature
    if how.top_k:
        floor = logits.topk(min(how.top_k, logits.shape[1])).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < floor, -torch.inf)

    # Nucleus (arXiv:1904.09751): the smallest set of likeliest tokens that reaches top_p.
    if how.top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = F.pad(ordered.softmax(-1).cumsum(-1), (1, -1))  # mass of the likelier tokens
        outside = (before >= how.top_p).gather(1, index.argsort())  # [B, V] in the old order
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def next_token(logits, seen, how: Sampling, samples: list[int], step: int) -> Tensor:
    """Draw from scores [B, V] one token per row [B], the likeliest at temperature 0."""
    logits = adjust_scores(logits, seen, how)

    # Gumbel: argmax(logits + g) is a draw from their softmax. The noise is keyed by seed, sample
    # and step, so that what is drawn for a prompt does not depend on the batch it is in.
    if how.temperature > 0:
        B = len(samples)
        keys = noise_keys(how.seed, samples, [step] * B, [1] * B, logits.device)  # [B]
        logits = logits - (-uniform(keys, logits.shape[1]).log()).log()
    return logits.argmax(-1)


def read_prompts(model: Llama, texts: list[list[int]]) -> tuple[Tensor, Cache]:
    """The last state [B, D] of each text, and their cache; equal texts are encoded once."""
    # Samples of one prompt are equal texts.
    different = list(dict.fromkeys(map(tuple, texts)))
    rows = [different.index(tuple(text)) for text in texts]  # [B]
    lengths = [len(text) for text in different]
    ids = torch.tensor(list(itertools.chain(*different)), device=model.device)  # [T]
    last = send(torch.tensor(lengths).cumsum(0) - 1, model.device)  # [G]
    states, prefix = model.hidden(ids, lengths, keep_kv=True, wanted=last)  # [G, D]
    return states[rows], Cache(prefix.select(rows))


def eager():
    """A context in which compiled layers run as they are written: for ever new lengths."""
    # torch's compiler takes seconds to import. Where it was not imported, nothing is compiled.
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


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

    # Which tokens each text holds, for the repetition penalty.
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=model.device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=model.device)] = True

    texts, cache, token = [list(prompt) for prompt in prompts], None, None
    alive = list(range(len(prompts)))  # the prompts that still go on: the rows of seen and cache
    for step in range(max_new_tokens):
        with eager():  # every step has a new length
            if cache is None:
                states, cache = read_prompts(model, [texts[i] for i in alive])
            else:
                states, _ = model.hidden(token, [1] * len(token), cache)  # [B, D]
                cache.advance(1)
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


# ---- skip on a first reading: a norm's gradient on a CPU -----------------------------------------


class CPUNorm(torch.autograd.Function):
    """F.rms_norm in fp32, its gradient by hand: on a CPU torch puts it together from many passes.

    With n = x / r, r = sqrt(mean(x^2) + eps), y = n * weight and arriving gradients g

        dL/dweight = sum_t g n,    dL/dx = (g weight - n mean(g n weight)) / r
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = (x.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).rsqrt()  # [..., 1] 1 / r
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        n = x * scale  # [..., D]

        # Both gradients need g n. g arrives in the type of the products, n is fp32, and so is this.
        product = g * n  # [..., D]
        mean = (product @ weight)[..., None] / x.shape[-1]  # [..., 1]
        grad_x = (g * weight).addcmul_(n, mean, value=-1).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0), None, None


# ---- skip on a first reading: attention by CUDA's kernel for flat tokens -------------------------


@lru_cache
def find_varlen() -> tuple:
    """torch's `varlen_attn` and the names of its arguments, which grow by version; or (None, ()).

    It is imported only where it is needed, since that takes two seconds.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, ()
    return varlen_attn, tuple(inspect.signature(varlen_attn).parameters)


def varlen_fits(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen_attn` is there, with the arguments we need, for this model and device."""
    if config.head_dim % 8 or config.head_dim > 256:
        return False
    if device.type != "cuda" or dtype == torch.float32 or not torch.cuda.is_available():
        return False
    _, known = find_varlen()
    return "window_size" in known and torch.cuda.get_device_capability(device)[0] >= 8


def plan_varlen(layout: Layout, counts: Tensor, stored: list, rows: list, device) -> None:
    """What `varlen_attn` asks: where the `counts` [2, B] of queries and keys of examples end."""
    # The kernel takes running sums from 0, in int32.
    ends = F.pad(counts.cumsum(1), (1, 0)).int()  # [2, B + 1], from 0
    layout.query_ends, layout.key_ends = send(ends, device)  # [B + 1] each
    layout.longest = counts.max(1).values.tolist()  # of the queries, of the keys

    # Gathered in this order, what an example continues and its own keys lie side by side.
    layout.order = None
    if set(rows) != {None}:
        sizes = [*stored, *counts[0].tolist()]
        pieces, own = torch.arange(sum(sizes)).split(sizes), len(stored)
        order = []
        for i, row in enumerate(rows, own):
            order += [pieces[i]] if row is None else [pieces[row], pieces[i]]
        layout.order = send(torch.cat(order), device)  # [sum of S]


def attend_varlen(q, k, v, past, layout, window) -> Tensor:
    """All examples in one call; the kernel's mask is causal, aligned at the last tokens."""
    if past is not None:
        k, v = torch.cat((past[0], k)), torch.cat((past[1], v))  # [stored + T, K, Dh] each
    if layout.order is not None:
        k, v = k.index_select(0, layout.order), v.index_select(0, layout.order)  # [sum of S, K, Dh]
    varlen_attn, known = find_varlen()
    flags = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in known:  # before torch 2.12 nobody asked for it
        flags["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, layout.query_ends, layout.key_ends, *layout.longest, **flags)


# ---- skip on a first reading: RoPE's variants ----------------------------------------------------


def rope_frequencies(config: ModelConfig, lengths: Tensor) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions (RoFormer, arXiv:2104.09864, eq. 15), scaled.

    f_i = theta^(-2i/Dh) becomes (1 - k_i) f_i / s + k_i f_i; with factor s, pretraining length L0
      linear   k = 0
      dynamic  k = 1, theta <- theta * (s L/L0 - (s-1))^(Dh/(Dh-2)), L = max(length, L0)
      llama3   k rises from 0 to 1 while the turns within L0, L0 f / 2 pi, rise from low to high
      yarn     k falls from 1 to 0 while i rises, see `yarn`; cos and sin grow, too

    `lengths` [B] are the examples' whole lengths in tokens. Returns frequencies [B or 1, Dh/2] and
    the factor for cos and sin. For dynamic, transformers takes the longest length of the padded
    batch; we take each example's own, so that its neighbours do not change it.
    """
    rope, d = config.rope, config.head_dim
    kind, s = rope["rope_type"], rope.get("factor") or 1.0
    L0 = rope["original_max_position_embeddings"]

    # In fp32, the type in which transformers computes the frequencies.
    theta = torch.full((1, 1), float(rope["rope_theta"]))
    if kind == "dynamic":
        L = lengths.clamp(min=L0).float()[:, None]  # [B, 1]
        theta = theta * (s * L / L0 - (s - 1)) ** (d / (d - 2))
    f = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)  # [B or 1, Dh/2]

    # Slow pairs are stretched; fast ones, which tell neighbours apart, are kept.
    kept, factor = float(kind != "linear"), 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((L0 * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # [1, Dh/2]
    if kind == "yarn":
        kept, factor = yarn(rope, d)
    return (1 - kept) * f / s + kept * f, factor


def yarn(rope: dict, d: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, eq. 19-23): k [Dh/2] for Dh = d, and the factor for cos and sin."""
    # From the pair that turns 32 times within the pretraining length to the one that turns once.
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    L0, base = rope["original_max_position_embeddings"], 2 * math.log(rope["rope_theta"])
    low, high = (d * math.log(L0 / (n * 2 * math.pi)) / base for n in turns)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    kept = 1 - ((torch.arange(d // 2) - low) / max(high - low, 0.001)).clamp(0, 1)

    # DeepSeek's config.json names two scales, whose quotient it is then.
    grow = 0.1 * math.log(max(rope["factor"], 1))
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    factor = (grow * over + 1) / (grow * under + 1) if over and under else grow + 1
    return kept, rope.get("attention_factor") or factor


def stretch(config: ModelConfig, context: int, kind: str, factor: float) -> ModelConfig:
    """The config of the same model with more positions: `context` of them, or `factor` as many.

    Without a `kind` of RoPE scaling, NTK-aware: theta * s^(Dh/(Dh-2)), s = context / positions now,
    which turns the slowest pair s times slower and the fastest not at all. It stays RoPE of type
    default, so that every tool loads it. Raises InputError where RoPE is scaled already.
    """
    rope, positions = config.rope, config.max_position_embeddings
    check(rope["rope_type"] == "default", f"the checkpoint's RoPE is scaled already "
          f"({rope['rope_type']}): --context and --rope_scaling need one that is not")
    check(kind or context > positions, f"--context {context} must be above the {positions} "
          "positions that the checkpoint has")

    # Dynamic RoPE grows from the number of positions that stands there, so that number stays.
    theta, new = rope["rope_theta"], {"rope_type": kind or "default"}
    if kind:
        context = positions if kind == "dynamic" else round(positions * factor)
        new["factor"] = factor
    else:
        theta *= (context / positions) ** (config.head_dim / (config.head_dim - 2))
    if kind in ("yarn", "llama3"):
        new["original_max_position_embeddings"] = positions
    if kind == "llama3":
        new |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's

    # Written in the style, old or new, of the file it came from.
    source = {**config.source, "max_position_embeddings": context}
    if "rope_parameters" in source:
        source["rope_parameters"] = {"rope_theta": theta, **new}
    else:
        source |= {"rope_theta": theta, "rope_scaling": new if kind else None}
    return read_config(source)


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
    family, act = source.get("model_type"), source.get("hidden_act", "silu")
    check(family in FAMILIES,
          f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    check(act == "silu", f"hidden_act {act} is not supported, only silu")

    # What is missing means what it means in transformers.
    fields = ModelConfig.__dataclass_fields__.values()
    values = {"max_position_embeddings": 2048, **FAMILIES[family], **source, "source": source}
    heads, width = int(source["num_attention_heads"]), int(source["hidden_size"])
    values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    values["head_dim"] = values.get("head_dim") or width // max(heads, 1)
    for name in (f.name for f in fields if f.type is int):
        given = values[name]  # a KeyError names what is missing
        values[name] = int(given)
        check(values[name] == given, f"expected a whole number as {name}, found {given!r}")
    values["windows"], values["rope"] = read_windows(values), read_rope(values)

    # Keys that do not shape the computation stay in `source` alone.
    config = ModelConfig(**{f.name: values[f.name] for f in fields if f.name in values})
    check_values(config)
    return config


def check_values(config: ModelConfig) -> None:
    """Raise InputError for a text or null where a number belongs, or for a number not above 0."""
    fields, rope = ModelConfig.__dataclass_fields__.values(), config.rope
    needed = "rope_theta", "original_max_position_embeddings", *ROPE_NEEDS[rope["rope_type"]]
    numbers = [(f.name, getattr(config, f.name)) for f in fields if f.type in (int, float)
               and f.name != "initializer_range"]  # which shapes no computation
    numbers += [(name, rope[name]) for name in needed]
    for name, value in numbers:
        check(isinstance(value, int | float) and value > 0,
              f"expected a number above 0 as {name}, found {value!r}")

    for window in set(config.windows) - {None, 0}:
        check(isinstance(window, int) and window > 0,
              f"expected a whole number above 0 as sliding_window, found {window!r}")

    # A text such as "false" would be true.
    for name in (f.name for f in fields if f.type is bool):
        value = getattr(config, name)
        check(value in (True, False, None), f"expected true or false as {name}, found {value!r}")


def read_windows(values: dict) -> list[int | None]:
    """Sliding window per layer: Mistral everywhere, Qwen from `max_window_layers` on, if at all."""
    family, layers = values["model_type"], values["num_hidden_layers"]
    window = values.get("sliding_window")
    if family == "mistral":
        return [window] * layers
    if family == "llama" or not values.get("use_sliding_window", False):
        return [None] * layers

    # Newer files list the layers, older ones say where the windows begin.
    kinds, first = values.get("layer_types"), values.get("max_window_layers", 28)
    check(not kinds or len(kinds) >= layers, f"layer_types names {len(kinds or ())} layers, "
          f"num_hidden_layers is {layers}")
    slides = [kinds[i] == "sliding_attention" if kinds else i >= first for i in range(layers)]
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

    # Dynamic RoPE grows from the largest position, the others from the length of pretraining.
    key, length = "original_max_position_embeddings", values["max_position_embeddings"]
    if kind != "dynamic":
        length = values.get(key) or rope.get(key) or length
    rope[key] = length
    return rope


# ---- skip on a first reading: load and save ------------------------------------------------------

SHARD_BYTES = 5 * 10**9  # largest weight file we write, as in the Hugging Face layout
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one matrix if they are tied
INDEX = "model.safetensors.index.json"  # which file holds which weight, where there are several
QUANTISED = ("qweight", "qzeros", "absmax", "weight_scale", "scale_inv")  # ends of their names


class InputError(ValueError):
    """Input that cannot be used; the message is one line: what was found, how to fix it."""


def check(condition, message: str) -> None:
    """Raise InputError with the message unless `condition` holds."""
    if not condition:
        raise InputError(message)


def send(tensor: Tensor, device) -> Tensor:
    """A CPU tensor on the device, behind the work that is queued there: the host does not wait."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
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
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def read_json(path: Path) -> dict:
    """The object of a JSON file, or an InputError that names it."""
    path = checkpoint_file(path.parent, path.name)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    check(isinstance(value, dict), f"{path}: expected an object, found {type(value).__name__}")
    return value


def checkpoint_file(folder: Path, name: str) -> Path:
    """The path of a checkpoint's file; where it is missing, InputError says what the folder is."""
    path = folder / name
    if path.is_file():
        # A clone without git-lfs holds a line of text in place of every large file.
        with open(path, "rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
        check(not pointer, f"{path} is only a pointer of git-lfs; `git lfs pull` fetches the file")
        return path

    # What people give in place of a checkpoint's folder, and what helps.
    cached = max((p.parent for p in folder.glob("snapshots/*/config.json")), default=None)
    check(not cached, f"{folder} is a cache of the hub; its checkpoint is {cached}")
    check(folder.exists() or folder.parts[:1] != ("out",), f"no folder {folder}: train it first "
          "(train_sft.py writes out/sft, train_dpo.py out/dpo, labs.reward_model out/reward)")
    check(folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)), f"no folder "
          f"{folder}; a model of the hub comes with `hf download {folder} --local-dir DIR`")
    check(folder.is_dir(), f"there is no folder {folder}")
    check(name != "tokenizer.json" or not (folder / "tokenizer.model").exists(),
          f"{folder} has only tokenizer.model; AutoTokenizer.from_pretrained(DIR)."
          "save_pretrained(DIR) of transformers writes tokenizer.json")
    inner = min((p.parent for p in folder.glob(f"*/{name}")), default=None)
    fix = f"give {inner}" if inner else "is that a Hugging Face checkpoint?"
    raise InputError(f"{path} is missing; {fix}")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors file of a checkpoint, or its shards; an adapter's own file comes last."""
    base, adapter = read_adapter(folder)
    names = ["model.safetensors"]
    if not (base / names[0]).exists():
        check((base / INDEX).exists(), f"no {names[0]} or {INDEX} in {base} (weights in .bin files "
              "must be converted to safetensors first)")
        listed = read_json(base / INDEX).get("weight_map")
        check(isinstance(listed, dict) and all(isinstance(name, str) for name in listed.values()),
              f"{base / INDEX} has no weight_map of files' names")
        names = sorted(set(listed.values()))
    paths = [checkpoint_file(base, name) for name in names]
    return [*paths, checkpoint_file(Path(folder), ADAPTER_WEIGHTS)] if adapter else paths


def load_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder; InputError if it is missing or not supported."""
    path = read_adapter(folder)[0] / "config.json"
    source = read_json(path)
    try:
        kind = (source.get("quantization_config") or {}).get("quant_method")
        check(not kind, f"the weights are quantised ({kind}); take the checkpoint in 16 bits")
        return read_config(source)
    except KeyError as error:
        raise InputError(f"{path}: key {error} is missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def load(folder: str | Path, dtype: torch.dtype | None = torch.float32, device="cpu",
         adapter: dict | None = None, seed: int = 0, shard=None,
         new_token: tuple[int, int] | None = None) -> Llama:
    """The model of a folder in Hugging Face layout, or of an adapter's folder, in eval mode.

    All weights get `dtype`, and an adapter is merged. None is for LoRA: matrices stay as they are
    stored, frozen, and beside them stands the folder's adapter, or a new one as `adapter` (the keys
    of adapter_config.json) and `seed` say.

    It is built without storage and filled tensor by tensor: memory stays near the model's own size.
    shard(model) may deal the weights to ranks before they have storage; a rank then reads only its
    own rows. `new_token` (token, like) gives a token, maybe a new last one, the rows of another.
    Raises InputError for missing, left-over or misshapen weights or an unsupported config.
    """
    base, own = read_adapter(folder)
    config, kind = load_config(folder), None if own else dtype
    if new_token:
        config.vocab_size = max(config.vocab_size, new_token[0] + 1)
        config.source = {**config.source, "vocab_size": config.vocab_size}

    # On the meta device a tensor has a shape and no storage.
    with torch.device("meta"):
        model = Llama(config)
        add_adapter(model, adapter or own)
    if shard:
        shard(model)

    # Every stored tensor must find its place, and every place its tensor.
    missing = dict(model.named_parameters())
    for path in weight_files(folder):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                tensor = file.get_tensor(name)  # mapped: read where it is looked at
                if new_token and name in (EMBEDDING, HEAD):
                    token, like = new_token
                    tensor = torch.cat((tensor[:token], tensor[[like]], tensor[token + 1 :]))
                place(model, missing, name, tensor, kind, device, path)

    # A new adapter is stored nowhere yet.
    if not own:
        for name, tensor in new_weights(missing, seed):
            place(model, missing, name, tensor, kind, device, base)
    first = next(iter(missing), None)
    check(not missing, f"{folder}: {len(missing)} weights are missing, the first is {first}")

    # What ends an answer by the checkpoint's own word: one id or a list of them.
    path = base / "generation_config.json"
    settings = {**model.config.source, **(read_json(path) if path.exists() else {})}
    stop = settings.get("eos_token_id")
    model.stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)

    if own and dtype:
        merge_adapter(model, dtype)
    return model.eval()


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, or an InputError that names it."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def place(model: Llama, missing: dict, name: str, tensor: Tensor, dtype, device, path) -> None:
    """Put a stored tensor where its name says and take it off the list of what is missing."""
    # Old conversions stored RoPE's frequencies, which are derived here.
    if name.endswith("rotary_emb.inv_freq"):
        return
    quantised = tensor.itemsize == 1 or not tensor.is_floating_point() or name.endswith(QUANTISED)
    check(not quantised, f"{path}: the weights are quantised ({name}), stored as {tensor.dtype}; "
          "take the checkpoint in 16 bits")

    # With LoRA what is trained, and what is small, is in fp32, and all but the adapter is frozen.
    name, lora, frozen = name.removeprefix(WRAPPER), LORA in name, dtype is None
    dtype = dtype or (torch.float32 if lora or tensor.dim() < 2 else tensor.dtype)

    # A tied matrix may be stored under either name, or both.
    if name == HEAD and model.config.tie_word_embeddings:
        name = EMBEDDING
    if name == EMBEDDING and name not in missing:
        same = torch.equal(model.head, share(tensor, model.head, device, dtype))
        check(same, f"{path}: tie_word_embeddings is set, but {HEAD} and {EMBEDDING} differ")
        return
    check(name in missing, f"{path}: config.json leaves no place for weight {name}")
    empty, shape = missing.pop(name), list(tensor.shape)
    want = list(empty.shape)
    check(want == shape, f"{path}: weight {name} has shape {shape}, expected {want}")

    if not lora:
        model.stored_dtype = tensor.dtype
    owner, _, leaf = name.rpartition(".")
    value = nn.Parameter(share(tensor, empty, device, dtype), requires_grad=lora or not frozen)
    setattr(model.get_submodule(owner), leaf, value)


# A sharded weight is a DTensor of torch: every rank holds some of its rows, the same number but for
# the last ranks. These two leave a plain tensor whole, and so serve both.


def share(tensor: Tensor, like: Tensor, device, dtype: torch.dtype) -> Tensor:
    """A tensor on the device; of one that is sharded as `like` is, the rows of this rank."""
    # First to the device, then to the type: 16 bits per weight travel, not 32.
    if not hasattr(like, "device_mesh"):
        return tensor.to(device).to(dtype)
    from torch.distributed.tensor import DTensor  # takes seconds to import

    count = -(-len(tensor) // like.device_mesh.size())  # rows per rank, rounded up
    first = count * like.device_mesh.get_local_rank()
    mine = tensor[first : first + count].to(device).to(dtype)
    return DTensor.from_local(mine, like.device_mesh, like.placements, run_check=False,
                              shape=tensor.shape, stride=tensor.stride())


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor; every rank must ask for it, because every rank sends its own."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_output(flag: str, output: str | Path, inputs=(), size: int = 2**20) -> None:
    """Raise InputError where an output is one of the inputs or cannot be written; leaves nothing.

    `flag` is --output for a file or --output_dir for a folder, `size` how many bytes will be
    written at least.
    """
    output = Path(output)
    for path in map(Path, inputs):
        same = path.resolve() == output.resolve()
        same = same or (path.exists() and output.exists() and path.samefile(output))
        check(not same, f"{flag} {output} is the input {path}; choose another place")

    # Tried in the nearest folder there is: what is refused later must leave no folder behind.
    place = output.absolute() if flag == "--output_dir" else output.absolute().parent
    folder = next(p for p in (place, *place.parents) if p.exists())
    no = f"{flag} {output} cannot be written:"
    check(folder.is_dir(), f"{no} {folder} is a file")
    check(flag == "--output_dir" or not output.exists() or output.is_file(),
          f"{no} it is a {'folder' if output.is_dir() else 'device or a pipe'}")
    try:
        free = shutil.disk_usage(folder).free
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{no} {error.strerror}") from None
    check(free >= size, f"{no} {size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def checkpoint_in(folder: Path) -> str:
    """The name of a file of the checkpoint that stands in a folder, "" if none does."""
    for name in ("config.json", "adapter_config.json", "tokenizer.json", "*.safetensors"):
        for path in folder.glob(name):
            return path.name
    return ""


def write_atomic(path: Path, write) -> None:
    """Call write(temporary path), then rename: no reader or crash ever meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors leaves its files readable by their owner only
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        # Only the system's own errors have a strerror.
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


def write_tensors(folder: Path, stem: str, tensors: dict[str, Tensor], meta: dict, write: bool,
                  dtype: torch.dtype | None = None, merge=(), limit=None) -> dict[str, str]:
    """Write tensors in files of at most `limit` (SHARD_BYTES); returns the name of each one's file.

    `merge` has the projections of those that get their adapter merged. That, and making a sharded
    tensor whole, waits until its turn comes: one file at most is in memory. Every rank must call
    this, one of them with `write`, since each has its own rows.
    """
    # A new file begins where the next tensor has no room in the last one.
    files, room = [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if size > room:
            files.append([])
            room = limit or SHARD_BYTES
        files[-1].append(name)
        room -= size

    where = {}
    for i, names in enumerate(files, 1):
        number = f"-{i:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file, held = f"{stem}{number}.safetensors", {}
        for name in names:
            tensor = merge[name].merged() if name in merge else tensors[name]
            tensor = whole(tensor).detach()
            if write:
                held[name] = tensor.to("cpu", dtype).contiguous()
        if write:
            write_atomic(folder / file, partial(save_file, held, metadata=meta))
        where |= dict.fromkeys(names, file)
    return where


def save(model: Llama, folder: str | Path, dtype: torch.dtype = torch.float32,
         write: bool = True) -> None:
    """config.json and the weights, above 5 GB in shards with an index; an adapter is merged.

    Of a sharded model all ranks call this, and one has `write`.
    """
    weights = {name: p for name, p in model.named_parameters() if LORA not in name}
    where = write_tensors(Path(folder), "model", weights, {"format": "pt"}, write, dtype,
                          adapted(model))
    config = {**model.config.source, "torch_dtype": str(dtype).removeprefix("torch.")}
    config.pop("dtype", None)  # the same key in newer files
    texts = {"config.json": config}
    if len(set(where.values())) > 1:
        total = sum(p.numel() for p in weights.values()) * dtype.itemsize
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": where}
    if write:
        finish(Path(folder), set(where.values()), texts)


def finish(folder: Path, weights: set[str], texts: dict[str, dict]) -> None:
    """Write the JSON files `texts` beside files of weights; of another checkpoint nothing is left.

    A folder must never hold a checkpoint and an adapter, or shards of two checkpoints.
    """
    known = {"config.json", "model.safetensors", INDEX, ADAPTER, ADAPTER_WEIGHTS}
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX).get("weight_map", {}).values()
        known |= {name for name in shards if Path(name).name == name}
    for name, value in texts.items():
        write_json(folder / name, value)
    for stale in known - weights - set(texts):
        (folder / stale).unlink(missing_ok=True)


# ---- skip on a first reading: adapters -----------------------------------------------------------

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
WRAPPER, LORA = "base_model.model.", ".lora_"  # how PEFT's names begin, what marks an adapter's
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_LORA = ("use_dora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "use_qalora",
            "modules_to_save")  # keys of adapters that compute something else


def read_adapter(folder: str | Path) -> tuple[Path, dict]:
    """(the base's folder, the keys of adapter_config.json); of a checkpoint (its folder, {})."""
    folder = Path(folder)
    if not (folder / ADAPTER).exists():
        return folder, {}
    path, adapter = folder / ADAPTER, read_json(folder / ADAPTER)
    kind, targets = adapter.get("peft_type"), adapter.get("target_modules")
    odd = [key for key in NOT_LORA if adapter.get(key)]
    if adapter.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        odd += ["init_lora_weights"]  # PiSSA and its like begin by changing the base
    check(kind == "LORA" and not odd, f"{path}: {odd or kind} is not supported, only plain LoRA")
    r, alpha = adapter.get("r"), adapter.get("lora_alpha")
    known = isinstance(r, int) and isinstance(alpha, int | float) and isinstance(targets, list)
    check(known and r > 0 and alpha, f"{path}: expected r, lora_alpha and a list of target_modules")

    # Written as seen from where PEFT ran, or from the adapter; often it is a name of the hub.
    base = str(adapter.get("base_model_name_or_path"))
    for place in (Path(base), folder / base):
        if (place / "config.json").is_file():
            return place, adapter
    raise InputError(f"{folder} is an adapter, and its base {base} is not there: bring it (`hf "
                     f"download`), and write its folder into {path} (base_model_name_or_path)")


def add_adapter(model: Llama, adapter: dict) -> None:
    """Put an adapter beside every projection that adapter_config.json names; {}: nothing."""
    model.adapter = adapter
    for name, module in model.named_modules():
        targeted = any(f".{name}".endswith(f".{t}") for t in adapter.get("target_modules", ()))
        if targeted and isinstance(module, Projection):
            r, alpha = adapter["r"], adapter["lora_alpha"]
            module.lora_A = nn.Linear(module.in_features, r, bias=False)
            module.lora_B = nn.Linear(r, module.out_features, bias=False)
            module.scale = alpha / (math.sqrt(r) if adapter.get("use_rslora") else r)
            module.lora_dropout = adapter.get("lora_dropout", 0.0)
            module.site = 2 + PROJECTIONS.index(name.rpartition(".")[2])  # 0, 1 are the block's


def adapted(model: Llama) -> dict[str, Projection]:
    """The projections that have an adapter, by the name of their weight."""
    return {f"{n}.weight": m for n, m in model.named_modules() if getattr(m, "lora_A", None)}


def new_weights(missing: dict, seed: int) -> Iterator[tuple[str, Tensor]]:
    """How adapters begin, by name: A uniform in +-1 / sqrt(in), as PEFT draws it, and B 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in list(missing.items()):
        if LORA in name:
            bound = p.shape[1] ** -0.5 if "lora_A" in name else 0.0  # A [r, in], B [out, r]
            yield name, torch.empty(p.shape).uniform_(-bound, bound, generator=generator)


def merge_adapter(model: Llama, dtype: torch.dtype) -> None:
    """Make a plain model of one with an adapter: summed in fp32, rounded once."""
    for module in adapted(model).values():
        module.weight = nn.Parameter(module.merged().to(dtype))
        module.lora_A = module.lora_B = None
    model.adapter = {}
    model.to(dtype).requires_grad_(True)


def save_adapter(model: Llama, folder: Path, write: bool = True) -> None:
    """The adapter alone, in fp32, as PEFT loads it; of another checkpoint there nothing is left."""
    # In one file, however large: PEFT looks for no other.
    tensors = {WRAPPER + name: p for name, p in model.named_parameters() if LORA in name}
    write_tensors(folder, "adapter_model", tensors, {"format": "pt"}, write, limit=math.inf)
    if write:
        finish(folder, {ADAPTER_WEIGHTS}, {ADAPTER: model.adapter})
