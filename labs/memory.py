"""Memory: what a run will take on each device, term by term, before it starts.

Idea. Every number that is kept has a reason and a size. P parameters, P' of them trained; T tokens
and N supervised ones in the largest forward pass; products of e bytes (bf16: 2):

    weights       4 P                    fp32, because small steps would be lost in 16 bits
    gradients     4 P'
    moments       8 P'                   Adam's two means
    16-bit copies e P                    of the layers' matrices, as long as the backward pass needs
    activations   T L (a D + b I + ...)  what autograd keeps of every token in every layer
    logits        10 B x a chunk         never all N V at once

--checkpoint_activations (arXiv:1604.06174) keeps 4 D per token and layer, and computes the layer
again. LoRA (arXiv:2106.09685) leaves P' near 0, weights in the 16 bits they are stored in. --shard
(ZeRO-3, arXiv:1910.02054) divides the first three by the devices. Both trainers print this first.

    python -m labs.memory                                    # sizes against ways, in GiB
    python -m labs.memory --model DIR --micro_tokens 4096    # one model, term by term

What you should see, at 4,096 tokens of which half are supervised, in GiB per device:

    GiB per device     all  ckpt  8 x shard  lora  lora ckpt  8 x lora shard
    Llama-3.2-1B        29    22          6     9          4               3
    Llama-3.2-3B        69    53         11    20          9               5
    Llama-2-7B         134   105         18    34         16               6
    Llama-3-70B       1297  1071        155   246        147              36

("ckpt" is --checkpoint_activations, as in the last two columns and that of 8 devices.) Measured on
one H200, in the order all, ckpt, lora, lora ckpt: the 1B model 28.3, 22.5, 9.7, 4.3 GiB; the 3B one
68.4, 56.5, 20.0, 9.0; the 7B one from ckpt on 115.4, 34.4, 15.7. Estimates are 0.91 to 1.05 of it.

Estimated and measured peak of a CPU process in MiB, the 50M model of labs/bench.py: fp32 at 1,280
tokens 1,864 and 1,879; bf16 at 4,096 2,499 and 2,207, at 1,280 1,925 and 1,907, with recomputed
layers 1,700 and 1,689; DPO in bf16 2,294 and 2,005. MALLOC_MMAP_THRESHOLD_=1000000 was set: without
it the C library keeps freed blocks, and the peaks of SFT are 11 to 20% higher.

Exercise. 7B parameters, AdamW in fp32, one device. Where does 24 GB end? With LoRA in bf16?
    Solution: 16 B x 7e9 = 112 GB before the first token; 2 B x 7e9 = 14 GB leave 10 for tokens.
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

import data
import model as modeling
import train_sft
from model import ModelConfig, check


@dataclass
class Config:
    """Print what training will take per device."""

    model: str = ""  # checkpoint folder, of which config.json is read; empty: a table of sizes
    micro_tokens: int = 4096  # T, tokens of a forward pass; half of them count as supervised
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of matrix products
    lora_rank: int = 0  # of an adapter; 0: all weights are trained
    lora_dropout: float = 0.0  # of the adapter's input
    dropout: list[float] = field(default_factory=lambda: [0.0])  # of the residual branches
    checkpoint_activations: bool = False  # recompute layers in the backward pass
    shard: bool = False  # divide weights, gradients and moments among the devices
    devices: int = 1  # how many


class Work(NamedTuple):
    """The largest forward pass of a run."""

    tokens: int  # T
    targets: int  # N, supervised
    passes: int  # per step and device, at most
    world: int  # devices
    dtype: torch.dtype  # of matrix products
    device: torch.device


# ==== read: the terms =============================================================================


def parameters(config: ModelConfig, rank: int) -> tuple[int, int, int, int]:
    """How many there are: in the layers' matrices, in embedding and head, in all, in an adapter."""
    D, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers  # noqa: E741
    all_q = config.num_attention_heads * config.head_dim
    all_kv = config.num_key_value_heads * config.head_dim
    matrices = L * (2 * D * all_q + 2 * D * all_kv + 3 * D * I)
    heads = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)

    # LoRA's A and B have rank (in + out) numbers beside a matrix [out, in].
    adapter = rank * L * (2 * (D + all_q) + 2 * (D + all_kv) + 3 * (D + I))
    return matrices, heads, matrices + heads + (2 * L + 1) * D, adapter


def kept_per_token(config: ModelConfig, c, work: Work) -> tuple[int, int]:
    """Bytes that a layer keeps of each token for the backward pass: (up to attention, behind it).

    The norm's input is fp32, its output e. Attention keeps q, k, v, its output (on a CPU in fp32:
    `attend` in model.py) and a logarithm per head; the MLP four vectors. Old torch keeps more.
    """
    D, I, e = config.hidden_size, config.intermediate_size, work.dtype.itemsize  # noqa: E741
    H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cuda, r = work.device.type == "cuda", c.lora_rank
    norm = (4 + e) * D + 4  # what it is of, what it gives, and 1 / rms(x)
    before = norm + (e if cuda else 4) * (2 * H + 2 * K) * Dh + 4 * H
    after = norm + e * 4 * I + (0 if cuda else e * H * Dh)  # groups of examples are put together
    if config.model_type == "qwen3":
        before += 4 * (H + K) * Dh

    # An adapter keeps A x. With dropout it keeps what is left of each of seven inputs, in place of
    # the input, and a byte per number that says what is left.
    before, after = before + 3 * e * r, after + 4 * e * r
    if r and c.lora_dropout:
        before += (2 * e + 3) * D
        after += H * Dh + (e + 2) * D + I + (e * H * Dh if cuda else 0)
    return before, after + (2 * D if max(c.dropout) else 0)


def terms(config: ModelConfig, c, work: Work) -> dict[str, tuple[float, str]]:
    """{term: (bytes on each device at the peak, its formula)}; `c` has the flags of Config."""
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    T, N, e = work.tokens, work.targets, work.dtype.itemsize
    matrices, heads, total, adapter = parameters(config, c.lora_rank)
    kind = config.source.get("dtype") or config.source.get("torch_dtype") or "float32"
    trained, stored = (adapter, getattr(torch, kind).itemsize) if adapter else (total, 4)
    parts = work.world if getattr(c, "shard", False) else 1

    # Behind attention the last layer goes on with N tokens.
    before, after = kept_per_token(config, c, work)
    kept = L * T * before + ((L - 1) * T + N) * after
    kept -= T * 4 * D if adapter else 0  # nothing before the first adapter needs a gradient
    formula = f"T {L} layers x ({before} + {after} B)"

    # Products read weights in their own type: a copy, or what was gathered from all devices.
    copies, why = e * matrices if e != stored else 0, f"{e} B x the layers' matrices"

    # With its layers recomputed a token leaves 4 D in each, and all of it in one at a time.
    if c.checkpoint_activations:
        kept = L * T * 4 * D + T * (before + after)
        formula = f"T {L} layers x 4 D, T x one layer of {before + after} B"
        copies, why = copies / L, f"{why}, of one layer"
    if parts > 1:
        copies, why = e * (2 * matrices / L + heads), f"{e} B x two layers, embedding and head"

    # Logits: a chunk and the next one, or all of them; few at a time in fp32, and their softmax.
    most, few = modeling.logit_sizes(work.device)
    chunks, few = min(e * N * V, 2 * most), min(N * V, few)
    head = (0 if adapter else 4 * V * D) + (e * V * D if e != stored and parts == 1 else 0)

    # Measured on a CPU: oneDNN builds a kernel per shape, in 16 bits larger ones.
    cpu, kernels = work.device.type != "cuda", 2**28 if e == 2 else 2**26
    process = train_sft.peak_memory(work.device) * 2**30 + kernels if cpu else 0
    return {
        "weights": ((stored * total + 4 * adapter) / parts, f"{stored} B x {total / 1e6:.1f}M"),
        "gradients": (4 * trained / parts, f"4 B x {trained / 1e6:.1f}M trained"),
        "moments": (8 * trained / parts, f"8 B x {trained / 1e6:.1f}M trained"),
        "copies": (copies, why),
        "activations": (kept + N * (2 * e + 4) * D, formula),
        "logits": (chunks + 8 * few, f"{e} B x {chunks // e} logits, 8 B x {few} of them"),
        "head": (head, "its gradient in fp32, its copy"),
        "process": (process, "Python, torch and its kernels")}


def peak(found: dict[str, tuple[float, str]], passes: int) -> float:
    """Bytes at the worst moment of a step: the sum, if there are several forward passes in it.

    With a single one gradients grow while activations go: the larger of the two counts.
    """
    work = sum(found[name][0] for name in ("copies", "activations", "logits", "head"))
    rest = sum(found[name][0] for name in ("weights", "moments", "process"))
    both = found["gradients"][0], work
    return rest + (max(both) if passes == 1 else sum(both))


# ---- skip on a first reading: a run, the table ---------------------------------------------------


def report(c, run, hardware) -> None:
    """Print the terms of a run, and what helps where a GPU is too small for them."""
    # T, N and the number of passes, as the first 64 steps deal them.
    T = N = passes = 0
    for step in range(1, min(64, run.steps) + 1):
        items = [run.train[index] for index, _ in run.step(step, c.batch_size)]
        sizes = [len(e.ids) if hasattr(e, "ids") else e.tokens for e in items]
        for mine in data.micro_batches(sizes, c.micro_tokens, hardware.world):
            passes = max(passes, len(mine))
            for chunk in mine:
                T = max(T, sum(sizes[i] for i in chunk))
                N = max(N, sum(items[i].targets for i in chunk))
    work = Work(T, N, passes, hardware.world, hardware.dtype, hardware.device)
    whole = print_terms(c, work, least=0.01)
    if hardware.device.type == "cuda" and torch.cuda.is_available():
        room = torch.cuda.get_device_properties(hardware.device).total_memory
        if whole > room:
            print(f"warning: this GPU has {room / 2**30:.1f} GiB; lower --micro_tokens,\n  or add "
                  "--checkpoint_activations, --lora_rank 16, --shard")


def print_terms(c, work: Work, least: float = 0.0) -> float:
    """The sum, which is returned, and a line for every term of `least` GiB or more."""
    found = terms(modeling.load_config(c.model), c, work)
    whole = peak(found, work.passes)
    print(f"memory per device, estimate: {whole / 2**30:.2f} GiB at the peak\n  passes per step: "
          f"{work.passes}, of at most T {work.tokens} tokens, N {work.targets} of them supervised")
    for name, (size, formula) in found.items():
        if size >= least * 2**30:
            print(f"  {name:12}{size / 2**30:7.2f} GiB  {formula}")
    return whole


KEYS = ("hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size tie_word_embeddings").split()
SHAPES = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256, False),
}
CKPT, LORA = {"checkpoint_activations": True}, {"lora_rank": 16}
EIGHT = {**CKPT, "shard": True, "devices": 8}
WAYS = {"all": {}, "ckpt": CKPT, "8 x shard": EIGHT, "lora": LORA, "lora ckpt": {**LORA, **CKPT},
        "8 x lora shard": {**LORA, **EIGHT}}  # the flags of a column


def main(c: Config) -> None:
    """One model term by term, or the table."""
    data.check_numbers(c)
    check(c.micro_tokens > 1 and c.devices > 0, "--micro_tokens must be 2 or more, --devices 1")
    device = torch.device("cuda")  # only the formula asks which
    dtype = modeling.best_dtype(c.dtype, device)
    work = Work(c.micro_tokens, c.micro_tokens // 2, 2, c.devices, dtype, device)
    if c.model:
        print_terms(c, work)
        return

    rows = [("GiB per device", *WAYS)]
    for name, numbers in SHAPES.items():
        values = dict(zip(KEYS, numbers, strict=True))
        config = modeling.read_config({"model_type": "llama", "dtype": "bfloat16", **values})
        rows.append([name])
        for flags in WAYS.values():
            way = replace(c, **flags)
            found = terms(config, way, work._replace(world=way.devices))
            rows[-1].append(f"{peak(found, work.passes) / 2**30:.0f}")
    data.print_table(rows)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
