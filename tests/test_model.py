"""What model.py claims, one claim a test: the names are the list of what the model promises.

The reference for numbers is transformers in fp32, on tiny random checkpoints of every family
(families.py); where there is no such reference, a plain formula in fp64, or the same computation by
the plain path: no cache, no chunks, one example at a time. In order: attention, log-probabilities,
RoPE, micro-batches, prefixes, the LM head, noise, generation, load and save, compile, CUDA.
"""

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_checkpoint
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import data
import model as M

# Two orders of summation in fp32, over three layers and a vocabulary of 700: log-probabilities are
# about -10, where one unit in the last place is 1e-6, and differ by at most 7e-6 where this was
# written. 1e-4 is what the project promises for real checkpoints.
TOLERANCE = 2e-5
LENGTHS = [5, 21, 40, 1, 13]  # beyond the windows of 8 tokens and the 32 of the dynamic RoPE
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, transformers model) of a family; written once, so to be changed only in a copy."""
    made = {}

    def make(family, style="new", dtype=torch.float32, shards=False):
        key = family, style, dtype, shards
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = folder, make_checkpoint(folder, family, style, dtype, shards=shards)
        return made[key]

    return make


def draw(lengths, vocab, seed=0):
    """Examples of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def flat(examples):
    """(ids, lengths, targets): examples laid end to end, every token but the first a target."""
    lengths = [len(e) for e in examples]
    starts = [0, *itertools.accumulate(lengths)]
    targets = [torch.arange(s + 1, s + n) for s, n in zip(starts, lengths, strict=False)]
    return torch.cat(examples), lengths, torch.cat(targets)


def logprobs(model, examples, **noise):
    """ln p of every token but the first, one tensor an example."""
    ids, lengths, targets = flat(examples)
    out = model(ids.to(model.device), lengths, targets.to(model.device), **noise)
    return out.split([n - 1 for n in lengths])


def theirs(hf, examples):
    """The same by transformers, one example at a time."""
    out = []
    with torch.no_grad():
        for ids in examples:
            scores = hf(ids[None]).logits[0, :-1].log_softmax(-1)  # [L - 1, V]
            out.append(scores.gather(1, ids[1:, None])[:, 0])
    return out


def assert_close(ours, reference, tolerance=TOLERANCE):
    """Two lists of tensors agree within an absolute tolerance."""
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.float().cpu(), b.float().cpu(), rtol=0, atol=tolerance)


def assert_same(ours, reference):
    """Two lists of tensors agree to the last bit."""
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a, b)


def assert_gradients_close(model, reference, tolerance=1e-5):
    """Every weight's gradient agrees, relative to its norm (fp32 sums of some hundred terms)."""
    assert set(reference) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        error = (parameter.grad - reference[name]).norm() / reference[name].norm()
        assert error < tolerance, (name, error)


def gradients(model):
    """Copies of all gradients, which are then cleared."""
    out = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return out


SETTINGS = dict(model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=24,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=64, initializer_range=0.4)


def small(seed=0, **settings):
    """A model of a few thousand random weights, without a checkpoint."""
    model = M.Llama(M.read_config({**SETTINGS, **settings}))
    model.initialize(seed)
    return model.eval()


# --------------------------------------------------------------------------------------- attention


def random_heads(tokens, heads, Dh=16):
    """Queries, keys or values [tokens, heads, Dh] that ask for a gradient."""
    return torch.randn(tokens, heads, Dh, requires_grad=True)


def reference_varlen(q, k, v, query_ends, key_ends, *_, window_size=(-1, -1), enable_gqa=False):
    """What torch's kernel for flat tokens computes, one example at a time."""
    window = None if window_size[0] < 0 else window_size[0] + 1
    ends = (itertools.pairwise(x.tolist()) for x in (query_ends, key_ends))
    return torch.cat([M.plain_attention(q[a:b], k[c:d], v[c:d], window)
                      for (a, b), (c, d) in zip(*ends, strict=True)])


@pytest.mark.parametrize("L", [7, 250])
def test_few_queries_take_the_fp32_kernel_for_gradients_under_autocast_too(L):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(function):
                kinds.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    q, kinds = torch.randn(1, L, 4, 8, dtype=torch.bfloat16, requires_grad=True), []
    with Seen(), torch.autocast("cpu", torch.bfloat16):
        out = M.attend(q, q, q, None)
    assert kinds == [torch.float32 if L < M.FEW_QUERIES else torch.bfloat16]
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("L,S", [(7, 7), (7, 40), (250, 250)])
def test_attention_in_16_bits_rounds_what_goes_in_and_what_comes_out(L, S):
    """Few queries are computed in fp32: what is left of the error are the roundings to bf16."""
    q, k, v = (random_heads(n, heads).to(torch.bfloat16)[None].detach().requires_grad_()
               for n, heads in ((L, 4), (S, 2), (S, 2)))
    mask = None
    if L < S:
        seen = M.visible(torch.arange(S - L, S), S, None)
        mask = torch.zeros(L, S, dtype=torch.bfloat16).masked_fill(~seen, -torch.inf)
    out = M.attend(q, k, v, mask)
    exact = [x[0].detach().double().requires_grad_() for x in (q, k, v)]
    wanted = M.plain_attention(*exact)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    limit = 3e-3 if L < M.FEW_QUERIES else 1e-2  # one rounding is 2^-9 at most, 2e-3
    assert out.dtype == torch.bfloat16 and (out[0] - wanted).norm() < limit * wanted.norm()
    for a, b in zip(found, torch.autograd.grad(wanted.sum(), exact), strict=True):
        assert a.dtype == torch.bfloat16 and (a[0] - b).norm() < limit * b.norm()


def use_varlen(monkeypatch):
    """Take CUDA's path on a CPU, with a plain reference in the place of CUDA's kernel."""
    monkeypatch.setattr(M, "varlen_fits", lambda config, device, dtype: True)
    monkeypatch.setattr(M, "find_varlen", lambda: (reference_varlen, ("window_size", "enable_gqa")))


@pytest.mark.parametrize("path", ["groups", "varlen"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("stored, rows, calls", [
    ([], [None] * 5, 3),  # neighbours of one length share a call
    ([2, 7], [1, 1, 0, 1, 1], 3),  # and so they do after one stored prefix
    ([], [None, 0, 0, None, 3], 3),  # answers to prompts of the same pass; the last is one text
])
def test_attention_equals_plain_attention_of_every_example(monkeypatch, path, window, stored, rows,
                                                           calls):
    if path == "varlen":
        use_varlen(monkeypatch)
    lengths = [3, 3, 9, 1, 1]
    q, k, v = (random_heads(sum(lengths), heads) for heads in (4, 2, 2))
    past = [random_heads(sum(stored), 2) for _ in "kv"] if stored else None
    prefix, parents = (M.Prefix([], stored, rows), None) if stored else (None, rows)
    config = M.read_config({**SETTINGS, "head_dim": 16})
    layout = M.Layout(config, lengths, prefix, parents, q.device, q.dtype)
    assert path == "varlen" or len(layout.calls) == calls
    out = layout.attention(q, k, v, past, layout, window)

    plain, leaves = [], [q, k, v, *(past or [])]
    for row, q_, *own in zip(rows, *(t.split(lengths) for t in (q, k, v)), strict=True):
        if row is not None:
            before = [t.split(stored or lengths)[row] for t in past or (k, v)]
            own = [torch.cat(pair) for pair in zip(before, own, strict=True)]
        plain.append(M.plain_attention(q_, *own, window))
    wanted, weight = torch.cat(plain), torch.randn(out.shape)
    assert_close([out], [wanted], 1e-6)
    grads = (torch.autograd.grad((x * weight).sum(), leaves) for x in (out, wanted))
    assert_close(*grads, 1e-5)


# --------------------------------------------------------------------- log-probabilities and RoPE


STORED = [("old", torch.float32, False), ("new", torch.float32, False),
          ("old", torch.bfloat16, False), ("old", torch.float16, True)]


@pytest.mark.parametrize("style, dtype, shards", STORED)
@every_family
def test_logprobs_of_every_family_equal_those_of_transformers(
        checkpoint, family, style, dtype, shards):
    folder, hf = checkpoint(family, style, dtype, shards)
    assert (len(M.weight_files(folder)) > 1) == shards
    model = M.load(folder)  # in fp32, whatever the file holds
    examples = draw(LENGTHS, model.config.vocab_size)
    assert_close(logprobs(model, examples), theirs(hf, examples))


@pytest.mark.parametrize("length", [20, 32, 33, 50, 64])
def test_dynamic_rope_equals_transformers_below_and_beyond_its_length(checkpoint, length):
    folder, _ = checkpoint("llama_dynamic")
    hf = AutoModelForCausalLM.from_pretrained(folder)  # fresh: it keeps the longest length it saw
    examples = draw([length], hf.config.vocab_size)
    assert_close(logprobs(M.load(folder), examples), theirs(hf, examples))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_missing_keys_of_config_json_mean_what_they_mean_in_transformers(family):
    needed = dict(vocab_size=99, hidden_size=256, intermediate_size=300, num_hidden_layers=40)
    needed["num_attention_heads"] = 32
    used = {"use_sliding_window": True}
    cases = [{}, {"sliding_window": None}, {"sliding_window": 16}, used]
    for keys in (*cases, {**used, "sliding_window": 77, "max_window_layers": 3}):
        ours = M.read_config({"model_type": family, **needed, **keys})
        hf = AutoConfig.for_model(family, **needed, **keys)
        head_dim = getattr(hf, "head_dim", None) or 256 // 32
        assert (ours.head_dim, ours.num_key_value_heads) == (head_dim, hf.num_key_value_heads)
        for key in ("rms_norm_eps", "tie_word_embeddings", "initializer_range"):
            assert getattr(ours, key) == getattr(hf, key)
        assert ours.rope["rope_theta"] == hf.rope_parameters["rope_theta"]
        window = hf.sliding_window if family != "llama" else None
        types = getattr(hf, "layer_types", None) or ["sliding_attention"] * 40
        assert ours.windows == [window if t == "sliding_attention" else None for t in types]


def test_qwen2_has_biases_on_q_k_and_v_whatever_attention_bias_says():
    for attention_bias in (False, True):
        model = small(model_type="qwen2", attention_bias=attention_bias)
        biased = {name.split(".")[-2] for name, _ in model.named_parameters() if "bias" in name}
        assert biased == {"q_proj", "k_proj", "v_proj"}


def test_missing_sliding_window_means_4096_for_mistral_and_null_means_none():
    shape = dict(model_type="mistral", vocab_size=8, hidden_size=4, num_hidden_layers=1)
    shape.update(num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4200)
    ids = torch.zeros(4100, dtype=torch.long)
    changed = ids.clone()
    changed[0] = 1
    for settings, last in ((shape, 4095), ({**shape, "sliding_window": None}, 4099)):
        model = small(**settings).requires_grad_(False)
        (a, _), (b, _) = (model.hidden(x, [4100]) for x in (ids, changed))
        assert (a != b).any(1).nonzero().max() == last


PLAIN = [1, 0.1, 0.01, 0.001]  # theta^(-2i/d) for theta 1e4, d 8
LLAMA3 = dict(kind="llama3", positions=131072, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=8192)


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("name, settings, wanted, factor", [
    ("theta to the minus 2i/d", dict(kind="default"), PLAIN, 1),
    ("linear: all divided", dict(kind="linear", factor=4.0), [0.25, 0.025, 0.0025, 0.00025], 1),
    ("dynamic is plain up to its length", dict(kind="dynamic", length=2048, factor=2.0), PLAIN, 1),
    ("dynamic at twice its length", dict(kind="dynamic", length=4096, factor=2.0),
     [1, 0.0693361, 0.00480750, 0.000333333], 1),
    ("dynamic grows from the largest position, not from the length of pretraining",
     dict(kind="dynamic", length=2048, factor=2.0, original_max_position_embeddings=1024),
     PLAIN, 1),
    ("llama3 keeps short waves, blends, stretches long ones", LLAMA3,
     {0: 1, 28: 0.00321145, 29: 0.00216657, 32: 0.000524846, 36: 7.78466e-5}, 1),
    ("yarn blends on a ramp, scales cos and sin", dict(
        kind="yarn", positions=16384, factor=4.0, original_max_position_embeddings=4096),
     [1, 0.1, 0.00625, 0.00025], 1.138629),
    ("yarn takes the factor for cos and sin that the file names", dict(
        kind="yarn", positions=16384, factor=4.0, original_max_position_embeddings=4096,
        attention_factor=1.5), [1, 0.1, 0.00625, 0.00025], 1.5)])
def test_rope_frequencies_worked_out_by_hand(style, name, settings, wanted, factor):
    parameters = dict(settings)
    kind, length = parameters.pop("kind"), parameters.pop("length", 1)
    theta, d = (5e5, 128) if kind == "llama3" else (1e4, 8)
    heads = dict(num_attention_heads=1, num_key_value_heads=1, hidden_size=d)
    heads["max_position_embeddings"] = parameters.pop("positions", 2048)
    keys = {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}
    if style == "old":
        keys = {"rope_theta": theta, "rope_scaling": {"type": kind, **parameters}}
    config = M.read_config({**SETTINGS, **heads, **keys})
    frequencies, found = M.rope_frequencies(config, torch.tensor([length]))
    for i, value in wanted.items() if isinstance(wanted, dict) else enumerate(wanted):
        assert frequencies[0, i].item() == pytest.approx(value, rel=3e-6), (name, i)
    assert found == pytest.approx(factor, rel=1e-6)


# ----------------------------------------------------------------------------------- micro-batches


ARCHITECTURES = ["llama3", "llama_dynamic", "mistral", "qwen2_window", "qwen3"]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_examples_of_a_micro_batch_cannot_see_each_other(checkpoint, family):
    model = M.load(checkpoint(family)[0])
    examples = draw(LENGTHS, model.config.vocab_size)
    before = logprobs(model, examples)
    for changed in range(len(examples)):
        others = [e if i != changed else e.flip(0) + 1 for i, e in enumerate(examples)]
        others[changed] %= model.config.vocab_size
        after = logprobs(model, others)
        assert_same(*([x for i, x in enumerate(y) if i != changed] for y in (after, before)))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_positions_restart_so_that_an_example_alone_gives_the_same(checkpoint, family):
    model = M.load(checkpoint(family)[0])
    examples = draw(LENGTHS, model.config.vocab_size)
    assert_close(logprobs(model, examples), [logprobs(model, [e])[0] for e in examples])


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_token_does_not_see_later_ones(checkpoint, family):
    model = M.load(checkpoint(family)[0])
    (ids,) = draw([30], model.config.vocab_size)
    changed = ids.clone()
    changed[20:] = ids[20:].flip(0)
    (a,), (b,) = logprobs(model, [ids]), logprobs(model, [changed])
    assert torch.equal(a[:19], b[:19]) and not torch.equal(a[19:], b[19:])


# ---------------------------------------------------------------------------------------- prefixes


def states_of(model, examples, **kwargs):
    """hidden() of examples, one [length, D] each, and what was kept."""
    ids, lengths, _ = flat(examples)
    states, kept = model.hidden(ids, lengths, **kwargs)
    return states.split(lengths), kept


@every_family
def test_hidden_states_after_a_ragged_prefix_equal_the_full_pass(checkpoint, family):
    model = M.load(checkpoint(family)[0]).requires_grad_(False)
    # no sum above 32 tokens, where dynamic RoPE would turn the prefix by other angles
    first, second = (draw(n, model.config.vocab_size, 1) for n in ([7, 12, 3], [5, 2, 9]))
    _, prefix = states_of(model, first, keep_kv=True)
    continued, _ = states_of(model, second, prefix=prefix)
    full, _ = states_of(model, [torch.cat(pair) for pair in zip(first, second, strict=True)])
    assert_close(continued, [x[len(p) :] for x, p in zip(full, first, strict=True)])


@pytest.mark.parametrize("path", ["groups", "varlen"])
@every_family
def test_gradients_through_a_shared_prompt_equal_those_of_the_full_pass(
        checkpoint, monkeypatch, family, path):
    if path == "varlen":
        use_varlen(monkeypatch)
    model = M.load(checkpoint(family)[0]).train()
    prompts, answers = (draw(n, model.config.vocab_size, 5) for n in ([12, 4], [3, 10, 9, 6]))
    rows = [0, 0, 1, 1]
    weight = torch.randn(sum(map(len, answers)), generator=torch.Generator().manual_seed(6))

    # the last token of the prompt predicts the first of the answer, so it goes with the answer
    _, prefix = states_of(model, [p[:-1] for p in prompts], keep_kv=True)
    pieces = [torch.cat((prompts[r][-1:], a)) for r, a in zip(rows, answers, strict=True)]
    ids, lengths, targets = flat(pieces)
    shared = model(ids, lengths, targets, prefix=prefix.select(rows))
    (shared * weight).sum().backward()
    shared_gradients = gradients(model)

    whole = [torch.cat((prompts[r], a)) for r, a in zip(rows, answers, strict=True)]
    full = torch.cat([x[-len(a) :] for x, a in zip(logprobs(model, whole), answers, strict=True)])
    (full * weight).sum().backward()
    assert_close([shared], [full])
    assert_gradients_close(model, shared_gradients)


# --------------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_cpu_and_its_gradients_equal_rms_norm(dtype):
    x, weight = torch.randn(7, 3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    ours = M.CPUNorm.apply(x, weight, 1e-5, dtype)
    exact = torch.nn.functional.rms_norm(x.double(), (16,), weight.double(), 1e-5)
    assert ours.dtype == dtype
    g = torch.randn(7, 3, 16).to(dtype)
    found = [ours, *torch.autograd.grad(ours, (x, weight), g)]
    wanted = [exact.to(dtype), *torch.autograd.grad(exact, (x, weight), g.double())]
    assert_close(found, wanted, 1e-5 if dtype == torch.float32 else 2e-2)


def test_a_norm_of_16_bit_weights_sums_in_fp32():
    norm = M.RMSNorm(512, 1e-5).bfloat16()
    x = torch.randn(50, 512).bfloat16()
    exact = torch.nn.functional.rms_norm(x.float(), (512,), norm.weight.float(), 1e-5)
    assert torch.equal(norm(x), exact.bfloat16())


# -------------------------------------------------------------------------------------- the LM head


@pytest.mark.parametrize("rows", [0, 1, 3, 7, 23, 1000])  # from 23 the residuals are kept
def test_token_logprobs_and_gradients_equal_plain_logprobs(monkeypatch, rows):
    N, V, D = 23, 50, 16
    monkeypatch.setattr(M, "LOGIT_BYTES", 4 * (rows * V + 5))
    monkeypatch.setattr(M, "CACHED_LOGITS", 2 * V)  # a softmax takes two rows at a time
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator).requires_grad_()
    head = torch.randn(V, D, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    weight = torch.randn(N, generator=generator)

    out = M.token_logprobs(states, head, targets)
    (out * weight).sum().backward()
    states64, head64 = (x.detach().double().requires_grad_() for x in (states, head))
    exact = M.plain_logprobs(states64, head64, targets)
    (exact * weight).sum().backward()
    # plain_logprobs ends in fp32; logits up to 15, so an error of 1e-6 each and in their exponents
    assert_close([out, states.grad, head.grad], [exact, states64.grad, head64.grad], 1e-5)


def test_gradient_of_a_head_in_bf16_does_not_depend_on_the_chunks(monkeypatch):
    states, head = torch.randn(256, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets, found = torch.arange(256) % 50, []
    for rows in (256, 1):
        monkeypatch.setattr(M, "LOGIT_BYTES", 2 * rows * 50)
        weight = head.clone().requires_grad_()
        M.token_logprobs(states, weight, targets).sum().backward()
        found.append(weight.grad.float())
    # both sums are fp32 and rounded once; summed in bf16, 256 chunks stray by a few percent
    assert (found[0] - found[1]).norm() < 4e-3 * found[0].norm()


def test_token_logprobs_are_exact_where_the_softmax_would_overflow_and_empty_without_targets():
    states = torch.tensor([[300.0, 0.0], [0.0, 300.0]])
    assert M.token_logprobs(states, torch.eye(2), torch.tensor([0, 0])).tolist() == [0.0, -300.0]
    states, head = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = M.token_logprobs(states, head, torch.zeros(0, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (0,) and not head.grad.any()


@pytest.mark.parametrize("family", ["smollm2", "llama3"])
def test_gradients_equal_those_of_plain_logits_with_tied_and_own_head(checkpoint, family):
    model = M.load(checkpoint(family)[0]).train()
    assert hasattr(model, "lm_head") == (family == "llama3")
    ids, lengths, targets = flat(draw(LENGTHS, model.config.vocab_size))
    targets = targets[::3]
    model(ids, lengths, targets).mean().backward()
    ours = gradients(model)
    states, _ = model.hidden(ids, lengths)
    scores = model.next_logits(states).log_softmax(-1)  # [T, V]
    scores[targets - 1].gather(1, ids[targets][:, None]).mean().backward()
    assert_gradients_close(model, ours)


def test_token_logprobs_under_autocast_multiply_in_bf16_and_sum_in_fp32():
    states, head = (torch.randn(n, 16, requires_grad=True) for n in (9, 50))
    targets = torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        out = M.token_logprobs(states, head, targets)
    rounded = (states.bfloat16() @ head.bfloat16().T).float().log_softmax(-1)
    assert_close([out], [rounded.gather(1, targets[:, None])[:, 0]], 2e-6)


def check_autocast(folder, hf, device):
    """Under bf16 autocast, errors no larger than transformers', and gradients in fp32."""
    model, hf = M.load(folder, device=device).train(), hf.to(device)
    examples = draw(LENGTHS, model.config.vocab_size)
    exact = torch.cat(logprobs(model, examples))
    exact.mean().backward()
    exact_gradients = gradients(model)
    with torch.autocast(device, torch.bfloat16):
        near = torch.cat(logprobs(model, examples))
        their = torch.cat(theirs(hf, [x.to(device) for x in examples]))
    near.mean().backward()
    assert near.dtype == torch.float32
    error, their_error = ((x - exact).detach().norm() for x in (near, their))
    assert 0 < error < 1.2 * their_error
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if not name.endswith("k_proj.bias"):  # but for RoPE it would cancel in the softmax
            wanted = exact_gradients[name].flatten()
            assert torch.cosine_similarity(parameter.grad.flatten(), wanted, 0) > 0.995, name


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_bf16_autocast_strays_from_fp32_no_farther_than_transformers(checkpoint, family):
    check_autocast(*checkpoint(family), "cpu")


def allocations(compute, folder):
    """(largest single allocation, peak of what is alive at once) in bytes while compute() runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    sizes = [e["args"]["Bytes"] for e in events]
    return max(sizes), max(itertools.accumulate(sizes))


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_alive_at_once_are_a_few_chunks(monkeypatch, tmp_path, autocast):
    N, V, D, rows = 1024, 4096, 64, 64
    monkeypatch.setattr(M, "LOGIT_BYTES", 4 * rows * V)
    monkeypatch.setattr(M, "CACHED_LOGITS", rows * V)
    states, head = (torch.randn(n, D, requires_grad=True) for n in (N, V))
    targets = torch.arange(N) % V

    def compute():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = M.token_logprobs(states, head, targets)
        out.sum().backward()

    largest, peak = allocations(compute, tmp_path)
    chunk, heads = rows * V * 4, V * D * 4  # a chunk is as large as the head here
    assert largest < 3 * chunk  # 16 chunks would be all the logits
    # logits, their copy in fp32, exponentials, the last chunk; the head in bf16, its gradient twice
    assert peak < 4 * chunk + 3 * heads + 2 * N * D * 4


def test_no_tensor_of_tokens_by_vocabulary_exists_in_a_training_step(monkeypatch, tmp_path):
    model = small(vocab_size=2000).train()
    monkeypatch.setattr(M, "LOGIT_BYTES", 4 * 4 * 2000)
    ids, lengths, targets = flat(draw([90, 60, 50], 2000))  # attention: [4 heads, 90, 90] at most
    largest, _ = allocations(lambda: model(ids, lengths, targets).sum().backward(), tmp_path)
    assert 4 * 2000 * 4 <= largest < len(targets) * 2000 * 4 / 4


def test_evaluation_spends_nothing_on_gradients(monkeypatch):
    """Under no_grad a weight still says that it requires a gradient."""
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # of the residuals
    head = torch.nn.Parameter(torch.randn(10, 4))
    with torch.no_grad():
        M.token_logprobs(torch.randn(3, 4), head, torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError):  # which training does need
        M.token_logprobs(torch.randn(3, 4).requires_grad_(), head, torch.tensor([1, 2, 3]))


# --------------------------------------------------------------------- noise: NEFTune and dropout


def noise(lengths, size, alpha=5.0, seed=0, epochs=None, examples=None):
    """neftune_noise of examples that are numbered from 0, in epoch 0, unless said."""
    epochs, examples = epochs or [0] * len(lengths), examples or list(range(len(lengths)))
    keys = M.noise_keys(seed, epochs, examples, lengths)
    return M.neftune_noise(keys, lengths, size, alpha)


@pytest.mark.parametrize("length, size, bound", [(512, 4096, 0.003453), (64, 128, 0.055243)])
def test_neftune_noise_has_the_bound_and_spread_of_the_paper(length, size, bound):
    x, std = noise([length], size), bound / 3**0.5
    assert x.shape == (length, size)
    # the numbers are given to 5e-7; the largest of n draws is about bound * (1 - 1/n)
    assert bound * (1 - 20 / x.numel()) - 5e-7 < x.abs().max() < bound + 5e-7
    # the deviation of n draws strays by 0.45/sqrt(n) of itself: five times that
    assert abs(x.std() - std) < 5 * 0.45 * std / x.numel() ** 0.5 + 5e-7


def test_neftune_noise_is_scaled_by_the_examples_own_true_length_and_alpha():
    x = noise([400, 100, 25], 64).split([400, 100, 25])
    for part, length in zip(x, (400, 100, 25), strict=True):
        bound = 5 / (length * 64) ** 0.5
        assert 0.99 * bound < part.abs().max() <= bound
    torch.testing.assert_close(noise([9, 4], 8, alpha=15.0), 3 * noise([9, 4], 8, alpha=5.0))


def test_noise_is_a_function_of_seed_epoch_and_example_and_not_of_the_micro_batch():
    lengths, epochs, examples = [5, 9, 3], [0, 1, 1], [40, 2, 3_000_000]
    together = noise(lengths, 16, epochs=epochs, examples=examples).split(lengths)
    for i in range(3):
        alone = noise([lengths[i]], 16, epochs=[epochs[i]], examples=[examples[i]])
        assert torch.equal(alone, together[i])
    backwards = noise(lengths[::-1], 16, epochs=epochs[::-1], examples=examples[::-1])
    assert_same(backwards.split(lengths[::-1]), together[::-1])

    # all that keys it changes all of it, and epoch and example do not trade places
    first = noise([20], 32, seed=3, epochs=[2], examples=[7])
    for seed, epoch, example in ((4, 2, 7), (3, 3, 7), (3, 2, 8), (3, 7, 2)):
        other = noise([20], 32, seed=seed, epochs=[epoch], examples=[example])
        assert (other != first).float().mean() > 0.99


def test_noise_is_uniform_and_uncorrelated_over_all_that_keys_it():
    bound, x = 5 / (1000 * 64) ** 0.5, noise([1000], 64)
    values, n = (x / bound).flatten().double(), x.numel()
    # each statistic within 5 standard errors of what U(-1, 1) has
    assert abs(values.mean()) < 5 * (1 / 3 / n) ** 0.5
    assert abs(values.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    counts = torch.histc(values, 100, -1, 1)
    assert ((counts - n / 100).square() / (n / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5

    pairs = {
        "dimensions": (x[:, :-1], x[:, 1:]),
        "positions": (x[:-1], x[1:]),
        "diagonals": (x[:-1, :-1], x[1:, 1:]),
        "other diagonals": (x[:-1, 1:], x[1:, :-1]),
        "examples": (x, noise([1000], 64, examples=[1])),
        "epochs": (x, noise([1000], 64, epochs=[1])),
        "seeds": (x, noise([1000], 64, seed=1)),
    }
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(correlation) < 5 / a.numel() ** 0.5, name


def test_uniform_numbers_stay_inside_the_open_interval_from_0_to_1():
    # Keys and columns that give the largest and the smallest 24 bits. At 1, Gumbel noise is
    # infinite, and a token that top-k had excluded would be drawn: once in 2^24 numbers, which is
    # one token in 110 at a vocabulary of 152k.
    for key, column, extreme in ((5074, 933, 1.0), (68236, 885, 1.0), (1306, 560, 0.0)):
        u = M.uniform(torch.tensor([key], dtype=torch.int32), 1000)[0, column].item()
        assert abs(u - extreme) < 1e-6, "the hash has changed: look for the extremes again"
        assert 0 < u < 1


@pytest.mark.parametrize("key, value", [(0, 1), (7, 2**31 - 1), (2**31, 5), (2**32 - 1, 123456)])
def test_hash_in_32_bits_that_wrap_around_is_that_of_whole_numbers(key, value):
    x = (key + value * 0x9E3779B1) % 2**32
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        x = (x ^ x >> shift) * factor % 2**32
    one, other = (torch.tensor(n - (n >> 31 << 32), dtype=torch.int32) for n in (key, value))
    assert M.combine(one, other).item() % 2**32 == x


def keys_for(examples, seed=0):
    """noise_keys of examples numbered from 0, in epoch 0."""
    lengths = [len(e) for e in examples]
    return M.noise_keys(seed, [0] * len(lengths), list(range(len(lengths))), lengths)


def test_neftune_noise_is_added_to_the_embeddings():
    model = small().train()
    examples = draw([5, 9], 50)
    lengths, keys = [5, 9], keys_for(examples)
    noisy, _ = model.hidden(torch.cat(examples), lengths, noise=keys, neftune_alpha=5.0)
    added = M.neftune_noise(keys, lengths, 16, 5.0)
    with torch.no_grad():  # a vocabulary of one row a token, which holds the noisy embeddings
        rows = model.model.embed_tokens(torch.cat(examples)) + added
        model.model.embed_tokens.weight[:14] = rows
    by_hand, _ = model.hidden(torch.arange(14), lengths)
    assert torch.equal(noisy, by_hand)


@pytest.mark.parametrize("alpha, p", [(5.0, 0.0), (0.0, 0.2)])
def test_noise_is_off_in_eval_mode_and_without_keys(alpha, p):
    model, examples = small(), draw([5, 9], 50)
    model.set_dropout(p, p)
    keys = keys_for(examples)
    plain = logprobs(model.eval(), examples)
    assert_same(logprobs(model.eval(), examples, noise=keys, neftune_alpha=alpha), plain)
    assert_same(logprobs(model.train(), examples, neftune_alpha=alpha), plain)
    noisy = logprobs(model.train(), examples, noise=keys, neftune_alpha=alpha)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(noisy, plain, strict=True))


def test_training_noise_does_not_depend_on_the_micro_batch():
    model = small().train()
    model.set_dropout(0.1, 0.3)
    lengths, numbers = [5, 9, 12], [8, 1, 30]
    examples = draw(lengths, 50)

    def run(rows):
        which = ([numbers[i] for i in rows], [lengths[i] for i in rows])
        keys = M.noise_keys(1, [2] * len(rows), *which)
        return logprobs(model, [examples[i] for i in rows], noise=keys, neftune_alpha=5.0)

    together = run([0, 1, 2])
    assert_close([run([i])[0] for i in range(3)], together)
    assert_close(run([2, 0, 1]), [together[i] for i in (2, 0, 1)])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_a_share_p_and_scales_the_rest(p):
    keys = M.noise_keys(0, [0], [0], [400])
    x = torch.randn(400, 256) + 10
    out = M.dropout(x, p, keys, 0)
    dropped = out == 0
    n = x.numel()
    assert dropped.float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)
    torch.testing.assert_close(out[~dropped], x[~dropped] / (1 - p))


def test_dropout_rises_over_the_layers_as_in_lima_and_every_branch_draws_its_own(monkeypatch):
    seen, original = [], M.dropout

    def record(x, p, keys, site):
        seen.append((p, original(torch.ones_like(x), 0.5, keys, site) if keys is not None else x))
        return original(x, p, keys, site)

    monkeypatch.setattr(M, "dropout", record)
    model = small(num_hidden_layers=4).train()
    model.set_dropout(0.0, 0.3)
    examples = draw([400], 50)
    logprobs(model, examples, noise=keys_for(examples))
    assert [p for p, _ in seen] == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    masks = torch.stack([mask[:399].flatten() for p, mask in seen if p])  # the last is no state
    correlation = torch.corrcoef(masks) - torch.eye(6)
    assert correlation.abs().max() < 5 / masks.shape[1] ** 0.5

    single = small(num_hidden_layers=1)
    single.set_dropout(0.2, 0.2)
    assert single.model.layers[0].dropout == 0.2


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
def test_checkpointed_activations_give_the_same_gradients_with_noise_and_through_a_prefix(
        checkpoint, family):
    model = M.load(checkpoint(family)[0]).train()
    model.set_dropout(0.1, 0.3)
    prompts, answers = draw([6], 50, 1), draw(LENGTHS, model.config.vocab_size)
    ids, lengths, targets = flat(answers)
    results, stored = [], []
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        sizes = []

        def count(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            _, prefix = states_of(model, prompts, keep_kv=True)
            out = model(ids, lengths, targets, prefix.select([0] * len(lengths)),
                        noise=keys_for(answers), neftune_alpha=5.0)
        out.mean().backward()
        stored.append(sum(sizes))
        results.append([out.detach(), *gradients(model).values()])
    assert_same(*results)
    assert stored[1] < stored[0] / 2


# -------------------------------------------------------------------------------------- generation


def greedy_without_cache(model, prompt, steps):
    """The whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        states, _ = model.hidden(torch.tensor(ids), [len(ids)])
        ids.append(model.next_logits(states[-1:]).argmax().item())
    return ids[len(prompt) :]


def generate(model, prompts, max_new_tokens, stop_ids=(), samples=(), **how):
    """generate with the fields of Sampling as arguments."""
    how = dict(sampling=M.Sampling(**how), stop_ids=stop_ids, samples=samples)
    return M.generate(model, prompts, max_new_tokens, **how)


def prompts_of(lengths, vocab, seed=0):
    """Prompts as lists of ids."""
    return [p.tolist() for p in draw(lengths, vocab, seed)]


@every_family
def test_generation_with_a_cache_equals_argmax_without_one(checkpoint, family):
    model = M.load(checkpoint(family)[0]).requires_grad_(False)
    prompts = prompts_of([3, 14, 1, 9], model.config.vocab_size)
    wanted = [greedy_without_cache(model, p, 12) for p in prompts]
    assert len(set(wanted[0])) > 3  # a sequence that repeats one token would prove little
    assert generate(model, prompts, 12) == wanted


def test_generation_past_the_length_of_dynamic_rope_turns_all_tokens_by_new_angles(checkpoint):
    model = M.load(checkpoint("llama_dynamic")[0]).requires_grad_(False)
    assert model.config.rope["original_max_position_embeddings"] == 32
    prompts = prompts_of([3, 28, 40], model.config.vocab_size)
    assert generate(model, prompts, 12) == [greedy_without_cache(model, p, 12) for p in prompts]


def test_first_token_beyond_the_length_of_dynamic_rope_turns_all_tokens_anew(checkpoint):
    model = M.load(checkpoint("llama_dynamic")[0]).requires_grad_(False)
    prompts = prompts_of([32] * 40, model.config.vocab_size)
    assert generate(model, prompts, 2) == [greedy_without_cache(model, p, 2) for p in prompts]


def test_greedy_generation_equals_transformers_with_a_repetition_penalty(checkpoint):
    folder, hf = checkpoint("llama3")
    prompts = prompts_of([6, 11], hf.config.vocab_size)
    ours = generate(M.load(folder), prompts, 15, repetition_penalty=1.4)
    for prompt, continuation in zip(prompts, ours, strict=True):
        settings = dict(max_new_tokens=15, do_sample=False, repetition_penalty=1.4)
        ids = torch.tensor([prompt])
        out = hf.generate(ids, eos_token_id=None, pad_token_id=0, **settings)
        assert continuation == out[0, len(prompt) :].tolist()
    assert ours != generate(M.load(folder), prompts, 15)


def test_generation_ends_with_any_stop_id_and_the_finished_leave_the_batch(monkeypatch):
    model, batches, hidden = small(3), [], M.Llama.hidden
    prompts = prompts_of([4, 2, 7], 50)
    free = generate(model, prompts, 12)
    stops = {free[0][4], free[1][2]}
    ends = [next((i + 1 for i, t in enumerate(row) if t in stops), 12) for row in free]
    wanted = [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len(set(ends)) > 1 and max(ends) > 3

    def watched(self, ids, lengths, *rest, **named):
        batches.append(len(lengths))
        return hidden(self, ids, lengths, *rest, **named)

    monkeypatch.setattr(M.Llama, "hidden", watched)
    steps = list(M.generate_steps(model, prompts, 12, stops))
    for row, ids in zip(zip(*steps, strict=True), wanted, strict=True):
        assert list(row) == [*ids, *[None] * (len(steps) - len(ids))]
    assert batches == [sum(end > step for end in ends) for step in range(max(ends))]


@pytest.mark.parametrize("how", [{"repetition_penalty": 1.5}, {"temperature": 1.0}])
def test_a_text_goes_on_as_it_would_alone_when_another_has_ended(how):
    model, prompts = small(3), prompts_of([4, 2, 7], 50)
    stops = {generate(model, prompts, 12, **how)[0][1]}
    alone = [generate(model, [p], 12, stops, samples=[i], **how)[0] for i, p in enumerate(prompts)]
    assert len(alone[0]) == 2 and len(alone[2]) > 4
    assert generate(model, prompts, 12, stops, **how) == alone


def test_samples_of_one_prompt_encode_it_once(monkeypatch):
    model, tokens, hidden = small(), [], M.Llama.hidden
    alone = [generate(model, [[1, 2, 3]], 6, samples=[i], temperature=1.0)[0] for i in range(4)]

    def watched(self, ids, *rest, **named):
        tokens.append(len(ids))
        return hidden(self, ids, *rest, **named)

    monkeypatch.setattr(M.Llama, "hidden", watched)
    assert generate(model, [[1, 2, 3]] * 4, 6, temperature=1.0) == alone
    assert tokens == [3, 4, 4, 4, 4, 4]


def test_the_cache_grows_in_blocks(monkeypatch):
    monkeypatch.setattr(M, "CACHE_BLOCK", 5)
    model, pads, pad = small(), [], M.F.pad
    wanted = [greedy_without_cache(model, p, 12) for p in ([1, 2, 3], [4])]
    monkeypatch.setattr(M.F, "pad", lambda x, size: pads.append(len(x)) or pad(x, size))
    assert generate(model, [[1, 2, 3], [4]], 12) == wanted
    assert len(pads) == 3 * 2 * 2  # for 11 more tokens: three blocks, two layers, keys and values


def test_scores_are_changed_as_transformers_changes_them():
    logits = 3 * torch.randn(8, 40)
    ids = torch.randint(0, 40, (8, 12))
    seen = torch.zeros(8, 40, dtype=torch.bool).scatter(1, ids, True)
    for reference, name, values in (
            (RepetitionPenaltyLogitsProcessor, "repetition_penalty", (0.7, 1.0, 1.3)),
            (TopKLogitsWarper, "top_k", (1, 5, 39, 40, 100)),
            (TopPLogitsWarper, "top_p", (0.01, 0.3, 0.5, 0.9, 0.999))):
        for value in values:
            found = M.adjust_scores(logits, seen, M.Sampling(**{name: value}))
            assert torch.equal(found, reference(value)(ids, logits.clone())), (name, value)


def test_nucleus_is_full_when_it_reaches_top_p_exactly():
    logits, seen = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool)
    assert M.adjust_scores(logits, seen, M.Sampling(top_p=0.5)).isfinite().sum() == 2

    # 0.5 + 0.3 is 0.8 in fp32, but 0.9 - 0.1 is less.
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    assert M.adjust_scores(logits, seen, M.Sampling(top_p=0.8)).isfinite().sum() == 2


def first_tokens(model, prompt, n, **sampling):
    """How often each token was drawn first among n samples."""
    drawn = torch.tensor(generate(model, [prompt] * n, 1, **sampling))[:, 0]
    return drawn.bincount(minlength=model.config.vocab_size).float()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_follow_the_softmax(temperature):
    model = small(vocab_size=13).requires_grad_(False)
    states, _ = model.hidden(torch.tensor([5, 3]), [2])
    p = (model.next_logits(states[-1:])[0] / temperature).softmax(-1)
    n = 20000
    expected = n * p
    counts = first_tokens(model, [5, 3], n, temperature=temperature, seed=1)
    often = expected > 5  # chi-square needs a few expected in each cell: the rest is one cell
    assert often.sum() > 4
    e, o = (torch.cat((x[often], x[~often].sum()[None])) for x in (expected, counts))
    chi2 = ((o - e).square() / e.clamp(min=1)).sum()
    df = len(e) - 1
    assert chi2 < df + 5 * (2 * df) ** 0.5


def test_sampling_keeps_to_top_k_and_top_p():
    model = small(vocab_size=13).requires_grad_(False)
    states, _ = model.hidden(torch.tensor([5, 3]), [2])
    logits = model.next_logits(states[-1:])[0] / 2
    ranked = logits.argsort(descending=True).tolist()
    counts = first_tokens(model, [5, 3], 3000, temperature=2.0, top_k=3)
    assert set(counts.nonzero().flatten().tolist()) == set(ranked[:3])
    mass = logits.softmax(-1)[ranked].cumsum(0)
    p = ((mass[3] + mass[4]) / 2).item()  # between four tokens and five
    counts = first_tokens(model, [5, 3], 6000, temperature=2.0, top_p=p)
    assert set(counts.nonzero().flatten().tolist()) == set(ranked[:5])


def test_samples_depend_on_seed_sample_and_step_and_on_nothing_else():
    model = small()
    prompts = prompts_of([4, 9, 2], 50)

    def run(rows, **change):
        how = {"temperature": 1.0, "seed": 5, "samples": rows, **change}
        torch.manual_seed(len(rows))  # torch's own generator plays no part
        return generate(model, [prompts[i] for i in rows], 10, **how)

    together = run([0, 1, 2])
    assert run([2, 0]) == [together[2], together[0]]
    assert [run([i]) for i in range(3)] == [[row] for row in together]
    assert run([0, 1, 2], seed=6) != together
    assert run([0], samples=[7]) != together[:1]

    model.requires_grad_(False).head.zero_()  # now every token is as likely as any other
    rows = generate(model, [[1], [1]], 40, temperature=1.0)
    # of 50 tokens 40 draws meet about 28 different ones, and repeat the last draw about once
    for row in rows:
        assert len(set(row)) > 18
        assert sum(a == b for a, b in itertools.pairwise(row)) < 6
    assert sum(a == b for a, b in zip(*rows, strict=True)) < 6


def test_temperature_0_is_greedy_whatever_top_k_and_top_p_say():
    model = small()
    prompts = prompts_of([4, 9], 50)
    greedy = generate(model, prompts, 10)
    assert [len(row) for row in greedy] == [10, 10] and generate(model, prompts, 0) == [[], []]
    assert generate(model, prompts, 10, temperature=0.0, top_k=5, top_p=0.5, seed=9) == greedy
    assert generate(model, prompts, 10, temperature=1e-4) == greedy  # its limit


# ------------------------------------------------------------------------------------ load and save


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint of llama3 that may be damaged."""
    return Path(shutil.copytree(checkpoint("llama3")[0], tmp_path / "damaged"))


def weights(change):
    """Apply a change to the dict of weights of a folder."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def configured(**changes):
    """Change keys of config.json; None removes one."""

    def damage(folder):
        config = {**M.read_json(folder / "config.json"), **changes}
        kept = {k: v for k, v in config.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def written(name, content):
    """Replace a file's bytes, or remove it; an index stands in the weights' place."""

    def damage(folder):
        if name == INDEX:
            (folder / WEIGHTS).unlink()
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return damage


def truncated(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED = ["model_type", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_size",
          "intermediate_size"]
BROKEN = [  # (what is done to the folder, what the one line must name)
    (weights(lambda tensors: tensors.pop(UP)), [UP]),
    (weights(lambda tensors: tensors.update({BIAS: torch.zeros(64)})), [BIAS, WEIGHTS]),
    (weights(lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()})),
     [UP, "[64, 96]", "[96, 64]"]),
    (configured(num_hidden_layers=2), ["model.layers.2."]),
    (truncated, ["FOLDER/" + WEIGHTS]),
    (written(WEIGHTS, b""), ["FOLDER/" + WEIGHTS]),
    (written(WEIGHTS, b"half"), ["FOLDER/" + WEIGHTS]),
    (written(INDEX, b"{"), [INDEX]),
    (written(INDEX, b"{}"), [INDEX]),
    (written(INDEX, b"[]"), [INDEX]),
    (written(INDEX, b'{"weight_map": []}'), [INDEX]),
    (written(INDEX, b'{"weight_map": {"a": 5, "b": "c"}}'), [INDEX]),
    (written(INDEX, b'{"weight_map": {"a": "lost.safetensors"}}'), ["FOLDER/lost.safetensors"]),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
     ["FOLDER", ".bin", "safetensors"]),
    (written("config.json", None), ["FOLDER/config.json"]),
    (written("config.json", b""), ["FOLDER/config.json"]),
    (written("config.json", b"{"), ["FOLDER/config.json"]),
    (written("config.json", b"[1]"), ["FOLDER/config.json"]),
    *((configured(**{key: None}), ["config.json", key]) for key in NEEDED),
    (configured(model_type="gpt2"), ["config.json", "'gpt2'", "llama", "qwen2", "qwen3"]),
    (configured(hidden_act="gelu"), ["config.json", "gelu", "silu"]),
    (configured(rope_parameters={"rope_type": "longrope"}), ["config.json", "'longrope'", "yarn"]),
    (configured(rope_parameters={"rope_type": "linear"}), ["config.json", "linear", "factor"]),
    (configured(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
     ["config.json", "llama3", "low_freq_factor"]),
    *((configured(**{key: value}), ["config.json", key]) for key, value in (
        ("num_attention_heads", 0), ("num_key_value_heads", -2), ("head_dim", -16),
        ("vocab_size", -1), ("rms_norm_eps", "1e-5"), ("max_position_embeddings", 0),
        ("tie_word_embeddings", "false"), ("attention_bias", "no"))),
    (configured(quantization_config="gptq"), ["config.json"]),
    *((configured(rope_parameters={"rope_type": "linear", "factor": 2, **wrong}),
       ["config.json", *wrong]) for wrong in ({"rope_theta": "10"}, {"rope_theta": -1},
                                              {"factor": "2"}, {"factor": 0})),
    (configured(model_type="mistral", sliding_window="16"), ["config.json", "sliding_window"]),
    (configured(model_type="qwen3", use_sliding_window=True, layer_types=["full_attention"]),
     ["config.json", "layer_types"]),
    (configured(partial_rotary_factor=0.5), ["config.json", "partial_rotary_factor"]),
    (shutil.rmtree, ["FOLDER"])]


@pytest.mark.parametrize("damage, named", BROKEN)
def test_broken_checkpoint_is_refused_in_one_line_that_names_the_fault(folder, damage, named):
    damage(folder)
    with pytest.raises(M.InputError) as caught:
        M.load(folder)
    message = str(caught.value).replace(str(folder), "FOLDER")  # whose name must not help
    assert "\n" not in message
    for name in named:
        assert name in message, message


def test_length_of_pretraining_beside_the_rope_keys_wins_as_in_transformers(folder):
    configured(original_max_position_embeddings=16)(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    examples = draw([100], hf.config.vocab_size)
    assert_close(logprobs(M.load(folder), examples), theirs(hf, examples))


def test_rotary_buffers_that_old_conversions_stored_are_passed_over(checkpoint, folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights(lambda tensors: tensors.update({name: torch.zeros(8)}))(folder)
    assert_same(M.load(folder).parameters(), M.load(checkpoint("llama3")[0]).parameters())


@pytest.mark.parametrize("head, embedding", [(0, False), (None, True), (0, True), (1.0, True)])
def test_tied_checkpoint_may_store_either_name_or_both_if_equal(
        checkpoint, tmp_path, head, embedding):
    source, _ = checkpoint("smollm2")
    folder = Path(shutil.copytree(source, tmp_path / "copy"))

    def store(tensors):
        matrix = tensors.pop("model.embed_tokens.weight")
        if head is not None:
            tensors["lm_head.weight"] = matrix + head
        if embedding:
            tensors["model.embed_tokens.weight"] = matrix.clone()

    weights(store)(folder)
    if head == 1.0:
        with pytest.raises(M.InputError, match="model.safetensors.*embed_tokens.weight differ"):
            M.load(folder)
    else:
        assert_same(M.load(folder).parameters(), M.load(source).parameters())


def test_what_ends_an_answer_stands_in_generation_config_or_else_in_config_json(folder):
    configured(eos_token_id=3)(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert M.load(folder).stop_ids == (7, 9)
    (folder / "generation_config.json").write_text("{}")
    assert M.load(folder).stop_ids == (3,)


def test_a_new_token_may_take_a_row_that_the_embedding_has_already(folder):
    """As that of Qwen2.5 has: its tokenizer is smaller than its vocabulary."""
    before, after = M.load(folder), M.load(folder, new_token=(20, 5))
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        wanted = old.detach().clone()
        if len(old) == before.config.vocab_size:
            wanted[20] = old[5]
        assert torch.equal(new, wanted)


def test_loaded_model_is_in_eval_mode_and_in_the_dtype_asked_for(checkpoint):
    for dtype in (torch.float32, torch.bfloat16):
        model = M.load(checkpoint("qwen3")[0], dtype)
        assert not model.training and {p.dtype for p in model.parameters()} == {dtype}
        assert all(p.requires_grad for p in model.parameters())
        assert model.stored_dtype == torch.float32


PEAK = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import data
import model as M

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

def touched(folder):  # pages of a mapped file count, too
    model = M.load(folder)
    sum(p.detach().sum() for p in model.parameters())
    return model

touched(sys.argv[2])  # a small one first, so that the code of the libraries is in memory
before = status("VmRSS")
model = touched(sys.argv[3])
print(status("VmHWM") - before, sum(p.numel() * 4 for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("stored, shard_bytes", [
    pytest.param(torch.float32, 2**40, id="one file"),
    pytest.param(torch.bfloat16, 2**25, id="shards in bf16")])
def test_loading_does_not_hold_a_second_copy(monkeypatch, tmp_path, stored, shard_bytes):
    shape = dict(vocab_size=8192, hidden_size=768, intermediate_size=3072, num_hidden_layers=4)
    monkeypatch.setattr(M, "SHARD_BYTES", shard_bytes)
    M.save(small(tie_word_embeddings=True, num_attention_heads=12, **shape), tmp_path, stored)
    M.save(small(), tmp_path / "small")
    folders = [str(Path(M.__file__).parent), str(tmp_path / "small"), str(tmp_path)]
    command = [sys.executable, "-c", PEAK, *folders]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    growth, size = map(int, out.split())
    assert size > 1.5e8
    assert 0.95 * size < growth < 1.3 * size


SAVED = [*((family, torch.float32, 2**40) for family in FAMILIES),
         ("llama3", torch.bfloat16, 2**40), ("llama3", torch.float32, 200_000),
         ("smollm2", torch.float32, 200_000)]


@pytest.mark.parametrize("family, dtype, shard_bytes", SAVED)
def test_saved_checkpoint_says_its_type_and_has_identical_logits_in_transformers(
        monkeypatch, checkpoint, tmp_path, family, dtype, shard_bytes):
    monkeypatch.setattr(M, "SHARD_BYTES", shard_bytes)
    source, hf = checkpoint(family, "old")
    model = M.load(source)
    M.save(model, tmp_path, dtype)
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert reloaded.dtype == dtype
    for name, p in M.load(tmp_path).named_parameters():
        assert torch.equal(p, model.get_parameter(name).to(dtype).float())

    if dtype == torch.float32:
        ids = draw([40], hf.config.vocab_size)[0][None]
        with torch.no_grad():
            assert torch.equal(reloaded(ids).logits, hf(ids).logits)


def test_large_checkpoint_is_saved_in_shards_and_the_files_of_an_earlier_save_are_removed(
        monkeypatch, tmp_path):
    model = small()

    def saved(limit):
        monkeypatch.setattr(M, "SHARD_BYTES", limit)
        M.save(model, tmp_path)
        assert_same(M.load(tmp_path).parameters(), model.parameters())
        return sorted(p.name for p in tmp_path.glob("model*"))

    (tmp_path / "tokenizer.json").write_text("{}")
    many, few = saved(4000), saved(20_000)
    assert len(many) > len(few) > 2
    files, index = M.weight_files(tmp_path), M.read_json(tmp_path / INDEX)
    assert {p.name for p in files} == {*few} - {INDEX}
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for file in files:
        tensors = load_file(file)
        assert all(index["weight_map"].pop(name) == file.name for name in tensors)
        assert len(tensors) == 1 or sum(4 * x.numel() for x in tensors.values()) <= 20_000
    assert not index["weight_map"]
    assert saved(2**30) == [WEIGHTS] and saved(20_000) == few
    assert (tmp_path / "tokenizer.json").exists()


def test_config_keys_that_the_project_does_not_know_survive(folder, tmp_path):
    configured(house_style={"colour": "blue"}, note="grüße")(folder)
    M.save(M.load(folder), tmp_path)
    before, after = (M.read_json(path / "config.json") for path in (folder, tmp_path))
    kinds = [[c.pop(key, None) for key in ("torch_dtype", "dtype")] for c in (before, after)]
    assert after == before and "float32" in kinds[1]


def test_saved_config_names_no_type_but_that_of_the_weights(folder, tmp_path):
    configured(dtype="bfloat16", torch_dtype=None)(folder)
    M.save(M.load(folder), tmp_path)
    config = M.read_json(tmp_path / "config.json")
    assert {config.get(key) for key in ("dtype", "torch_dtype")} == {None, "float32"}


def test_a_folder_may_be_saved_over_itself_and_only_saving_changes_it(folder):
    model = M.load(folder)
    before = (folder / WEIGHTS).read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (folder / WEIGHTS).read_bytes() == before
    kept = [p.detach().clone() for p in model.parameters()]
    M.save(model, folder)
    assert_same(model.parameters(), kept)  # though the loaded file's pages may have been mapped
    assert_same(M.load(folder).parameters(), kept)
    if os.name == "posix":  # and everyone may read it
        assert (folder / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    M.write_atomic(path, lambda temporary: temporary.write_text("old"))

    def crash(temporary):
        temporary.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(M.InputError, match="cannot be written: disk full"):
        M.write_atomic(path, crash)
    assert path.read_text() == "old"
    M.write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_initial_weights_are_normal_matrices_unit_norms_zero_biases_by_the_seed_alone():
    shape = dict(attention_bias=True, mlp_bias=True, hidden_size=64, intermediate_size=96)
    torch.manual_seed(0)
    model = small(1, **shape)
    torch.manual_seed(1)
    assert_same(model.parameters(), small(1, **shape).parameters())
    assert not torch.equal(model.head, small(2, **shape).head)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:  # 5 standard errors
            assert p.std().item() == pytest.approx(0.4, rel=5 / (2 * p.numel()) ** 0.5), name
            assert abs(p.mean()) < 5 * 0.4 / p.numel() ** 0.5, name


# ------------------------------------------------------------------------------ torch.compile, CUDA


def test_twelve_layers_of_ragged_batches_compile_to_four_graphs_without_a_break():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = small(num_hidden_layers=12, model_type="mistral", sliding_window=8,
                  initializer_range=0.1).train()  # larger weights would amplify the rounding
    batches = [draw(lengths, 50) for lengths in ([5, 12], [20], [7, 7, 9], [3, 3, 3])]
    plain = []
    for batch in batches:
        out = torch.cat(logprobs(model, batch))
        out.sum().backward()
        plain.append((out.detach(), gradients(model)))
    model.compile_layers(backend=count)
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        for batch, (wanted, wanted_gradients) in zip(batches, plain, strict=True):
            out = torch.cat(logprobs(model, batch))
            out.sum().backward()
            assert_close([out], [wanted])
            assert_gradients_close(model, wanted_gradients)
            model.zero_grad()
        generate(model, [[1, 2], [3]], 3)  # eager
    assert 2 <= len(graphs) <= 4, len(graphs)


SLOW = os.environ.get("PLAINTUNE_SLOW")  # set it to let Inductor call the C++ compiler


@pytest.mark.skipif(not SLOW or not (shutil.which("g++") or shutil.which("clang++")),
                    reason="a minute of compilation: set PLAINTUNE_SLOW")
def test_layers_compiled_by_inductor_give_the_same_logprobs():
    model = small(num_hidden_layers=2).requires_grad_(False)
    batches = [draw(lengths, 50) for lengths in ([5, 12], [20], [7, 7, 9])]
    plain = [logprobs(model, batch) for batch in batches]
    model.compile_layers()
    for batch, wanted in zip(batches, plain, strict=True):
        assert_close(logprobs(model, batch), wanted)


@pytest.mark.skipif(M.find_varlen()[0] is None, reason="torch without varlen_attn")
@pytest.mark.parametrize("window", [None, 4])
def test_cudas_kernel_for_flat_tokens_takes_what_we_give_it(monkeypatch, window):
    """On the meta device, which checks arguments, shapes and types, and computes nothing."""
    monkeypatch.setattr(M, "varlen_fits", lambda config, device, dtype: True)
    config = M.read_config({**SETTINGS, "head_dim": 16})
    layout = M.Layout(config, [3, 5], M.Prefix([], [2, 7], [1, 0]), None, "meta",
                      torch.bfloat16)
    q, k, v, past_k, past_v = (
        torch.empty(n, heads, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for n, heads in ((8, 4), (8, 2), (8, 2), (9, 2), (9, 2)))
    out = layout.attention(q, k, v, (past_k, past_v), layout, window)
    out.sum().backward()
    assert out.shape == q.shape and past_v.grad.shape == past_v.shape


@needs_cuda
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("continued", ["nothing", "stored texts", "earlier examples"])
def test_cudas_kernel_for_flat_tokens_equals_plain_attention_and_its_gradients(continued, window):
    config = M.read_config({**SETTINGS, "num_attention_heads": 8, "num_key_value_heads": 2,
                            "head_dim": 64})
    lengths, stored, parents = [30, 7, 50, 64], None, None
    if continued == "stored texts":
        stored = M.Prefix([], [20, 9], [0, 1, 0, 1])
    if continued == "earlier examples":
        parents = [None, 0, 0, None]
    layout = M.Layout(config, lengths, stored, parents, torch.device("cuda"), torch.bfloat16)
    assert layout.attention is M.attend_varlen
    torch.manual_seed(0)
    leaves = [torch.randn(n, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
              for n, heads in ((151, 8), (151, 2), (151, 2), (29, 2), (29, 2))][:5 if stored else 3]
    out = layout.attention(*leaves[:3], leaves[3:] or None, layout, window)
    weights = torch.randn_like(out)
    found = [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    q, k, v, *past = exact = [x.detach().double().requires_grad_() for x in leaves]
    parts = []
    for i, (query, *own) in enumerate(zip(*(t.split(lengths) for t in (q, k, v)), strict=True)):
        before = [t.split([20, 9])[stored.rows[i]] for t in past] if stored else []
        if parents and parents[i] is not None:
            before = [t[:30] for t in (k, v)]
        keys, values = map(torch.cat, zip(before, own, strict=True)) if before else own
        parts.append(M.plain_attention(query, keys, values, window))
    plain = torch.cat(parts)
    wanted = [plain, *torch.autograd.grad((plain * weights.double()).sum(), exact)]
    for a, b in zip(found, wanted, strict=True):  # bf16 has 8 bits: 2^-9 per rounding
        assert (a.double() - b).norm() < 6e-3 * b.norm()


@needs_cuda
def test_layers_compiled_for_cuda_draw_the_same_dropout_as_eager_ones():
    model = small(num_hidden_layers=2, hidden_size=256, initializer_range=0.1).cuda().train()
    model.set_dropout(0.3, 0.3)
    lengths = [5, 40, 17]
    batch = [x.cuda() if torch.is_tensor(x) else x for x in flat(draw(lengths, 50))]
    noise = M.noise_keys(1, [0, 0, 2], [4, 5, 6], lengths, "cuda")
    eager = model(*batch, noise=noise, neftune_alpha=5.0)
    model.compile_layers()
    assert_close([model(*batch, noise=noise, neftune_alpha=5.0)], [eager], 1e-4)
    assert (model(*batch) - eager).abs().max() > 0.1


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_on_cuda_equal_those_on_the_cpu(checkpoint, family):
    folder, _ = checkpoint(family)
    examples = draw(LENGTHS, M.load(folder).config.vocab_size)
    with torch.no_grad():
        on_cuda = logprobs(M.load(folder, device="cuda"), examples)
        # fp32 without TF32, which is PyTorch's default
        assert_close(on_cuda, logprobs(M.load(folder), examples), 1e-4)


@needs_cuda
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_bf16_autocast_on_cuda_strays_no_farther_than_transformers(checkpoint, family):
    folder, hf = checkpoint(family)
    check_autocast(folder, copy.deepcopy(hf), "cuda")


@needs_cuda
def test_noise_on_cuda_equals_noise_on_the_cpu():
    lengths = [5, 300, 17]
    there, here = (M.noise_keys(3, [0, 1, 2], [9, 8, 7], lengths, d) for d in ("cuda", "cpu"))
    assert torch.equal(there.cpu(), here)
    assert torch.equal(M.uniform(there, 64).cpu(), M.uniform(here, 64))
    x = torch.ones(len(here), 64)
    dropped = M.dropout(x.cuda(), 0.3, there, 1) == 0
    assert torch.equal(dropped.cpu(), M.dropout(x, 0.3, here, 1) == 0)
    noise = M.neftune_noise(there, lengths, 64, 5.0).cpu()
    # a square root and a division may round differently by a bit
    torch.testing.assert_close(noise, M.neftune_noise(here, lengths, 64, 5.0), rtol=3e-7, atol=0)


@needs_cuda
def test_generation_on_cuda_equals_generation_on_the_cpu(checkpoint):
    folder, _ = checkpoint("qwen3")
    models = [M.load(folder, device=device) for device in ("cuda", "cpu")]
    prompts = prompts_of([3, 14, 1, 9], models[0].config.vocab_size)
    for how in ({}, {"temperature": 1.0, "seed": 4}):
        on_cuda, on_cpu = (generate(model, prompts, 12, **how) for model in models)
        assert on_cuda == on_cpu


PRETEND = Path(M.__file__).parent.parent / "shared/tools/pretend_cuda/run.py"


@pytest.mark.skipif(not PRETEND.exists() or not shutil.which("g++") or torch.version.cuda,
                    reason="needs the pretend device beside the project, a compiler, a CPU build")
@pytest.mark.parametrize("script", ["train_sft", "train_dpo"])
def test_a_step_of_two_micro_batches_waits_for_the_device_at_most_eight_times(tmp_path, script):
    """Two runs of other lengths: what differs is a step's, not the start's or the end's."""
    config = {**SETTINGS, "vocab_size": 259}
    M.save(small(**config), tmp_path / "base")
    data.byte_tokenizer(tmp_path / "base")
    row = {"prompt": "What is it?", "completion": "A river, and it runs to the sea."}
    if script == "train_dpo":
        row = {"prompt": "What is it?", "chosen": row["completion"], "rejected": "No."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    waits = []
    for steps in (2, 4):
        flags = ["--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl", "--dtype", "bf16",
                 "--steps", steps, "--batch_size", 2, "--micro_tokens", 80, "--neftune_alpha", 5,
                 "--dropout", 0.1, "--save_every", 0, "--output_dir", tmp_path / f"out{steps}"]
        done = subprocess.run([sys.executable, PRETEND, script, *map(str, flags)], check=True,
                              capture_output=True, text=True, cwd=Path(M.__file__).parent)
        assert len((tmp_path / f"out{steps}/metrics.jsonl").read_text().splitlines()) == steps
        lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
        waits.append(sum(int(count) for count, what in (x for x in lines if len(x) == 2)
                         if count.isdigit() and ("waits" in what or what.startswith("sync"))))
    assert 0 < waits[1] - waits[0] <= 2 * 8
