"""What one wants to know of a new GPU in ten minutes: tests, speed, waits, kernels, graphs.

    python -m labs.bench_gpu                # all of it, in at most ten minutes
    python -m labs.bench_gpu --only large   # 1.1B parameters at length 2048, eager and compiled
    python -m labs.bench_gpu --only profile # where an SFT step waits for the device; its kernels

MFU, model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B), is the share of a card's peak
that the products of the model use:

    MFU = (6 N + 6 n_layers D L) * tokens per second / peak FLOPs

6 N for the N weights in matrix products, forward and backward, and 12 n_layers D L / 2 for causal
attention over L tokens. Work that is done twice (recomputed layers) does not count. One H100, torch
2.11, 1.1B parameters in bf16, 16,384 tokens per forward pass, beside transformers' model and loss:

    tokens per second       8 rows of 2,048            64 rows of 15 to 1,219
    ours, eager             49,725   MFU 34.0%         52,558   MFU 33.6%
    ours, compiled          60,238   MFU 41.2%         64,393   MFU 41.1%
    transformers, eager     43,109   MFU 29.5%
    transformers, compiled  55,045   MFU 37.6%

Peak memory in the first column: 42.8, 37.8, 56.6, 42.5 GiB. Layers compile to 4 graphs. On an H200
products take 43% of an eager step, attention 17%, elementwise passes 16%, casts and copies 11%.

Exercise. Why is MFU low for a small model?
    Solution: its kernels are shorter than the time it takes to start them.
"""

import gc
import itertools
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import model as modeling  # isort: skip  # before torch: it says how threads wait
import numpy as np
import torch
from torch.profiler import profile

import data
import train_sft
from model import check

LARGE = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
         "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
         "max_position_embeddings": 2048}  # TinyLlama's shape
TINY = {**LARGE, "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "T4": 65e12}  # dense, 16 bit
SECONDS = 590  # of all commands together


@dataclass
class Config:
    """Measure the training step on a GPU."""

    only: Literal["", "large", "profile"] = ""  # one part; empty: all, and the tests for CUDA
    steps: int = 6  # timed steps
    length: int = 2048  # tokens per row of large; 8 rows per step
    micro_tokens: int = 16384  # tokens per forward pass
    tiny: bool = False  # a toy model, to try --only large or profile on a CPU


# ==== read: tokens per second and MFU =============================================================


def new_model(settings: dict) -> modeling.Llama:
    """A random model, the same every time."""
    model = modeling.Llama(modeling.read_config({"model_type": "llama", **settings}))
    model.initialize(0)
    return model


class Ours:
    """The project's SFT step on one device, with random weights."""

    def __init__(self, settings: dict, c: Config, compiled: bool = False):
        self.hardware = train_sft.setup_hardware("auto")
        self.model = new_model(settings).to(self.hardware.device).train()
        self.config = train_sft.Config(learning_rate=1e-5, micro_tokens=c.micro_tokens)
        self.optimizer = train_sft.make_optimizer(self.model, self.config)
        if compiled:
            self.model.compile_layers()

    def step(self, examples: list[data.Example]) -> float:
        """Forward, backward, clip, update; returns the loss."""
        # A run of one step, which draws every example once.
        self.config.batch_size = len(examples)
        mixer, scaler = data.Mixer([len(examples)], np.ones(1), 0), self.hardware.make_scaler()
        run = train_sft.RunData(examples, [], mixer, len(examples), 1)
        loss, _ = train_sft.backward_step(self.model, run, 1, self.config, self.hardware, scaler)
        train_sft.clip_and_step(self.model, self.optimizer, scaler, self.config, loss, run, 1)
        return loss


class Bare:
    """transformers' model and loss, on rows that need no padding: where it is fastest."""

    def __init__(self, settings: dict, c: Config, compiled: bool = False):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.hardware, self.micro_tokens = train_sft.setup_hardware("auto"), c.micro_tokens
        with self.hardware.device:
            self.model = LlamaForCausalLM(LlamaConfig(**settings)).train()
        self.model.load_state_dict(new_model(settings).state_dict())
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, examples: list[data.Example]) -> float:
        """As that of `Ours`, of rows of one length."""
        ids = torch.from_numpy(np.stack([e.ids for e in examples])).long()  # [B, L]
        ids, loss_sum = ids.to(self.hardware.device), 0.0
        for part in ids.split(max(1, self.micro_tokens // ids.shape[1])):
            with self.hardware.autocast():
                loss = self.run(input_ids=part, labels=part, use_cache=False).loss

            # The model's loss is a mean over the pass, the step's one over all its tokens.
            loss = loss * len(part) / len(ids)
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss_sum)


def random_rows(lengths: list[int], vocabulary: int) -> list[data.Example]:
    """Examples of random tokens, all of them supervised."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(vocabulary, size=n, dtype=np.int32) for n in lengths]
    return [data.Example(row, ((1, len(row), 1.0),)) for row in ids]


def flops_per_token(settings: dict, weights: int, length: float) -> float:
    """What the products of a token need, forward and backward: the formula above."""
    return 6 * weights + 6 * settings["num_hidden_layers"] * settings["hidden_size"] * length


def now() -> float:
    """The time, when the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def large(c: Config) -> None:
    """1.1B parameters, rows of one length and rows as chats are; ours and transformers."""
    cuda, settings = torch.cuda.is_available(), TINY if c.tiny else LARGE
    card = torch.cuda.get_device_name() if cuda else "CPU"
    sizes = np.random.default_rng(1).lognormal(5.2, 0.9, 64).clip(8, c.length).astype(int).tolist()
    equal = random_rows([c.length] * 8, settings["vocab_size"])
    unlike = random_rows(sizes, settings["vocab_size"])
    print(f"{card}, {c.micro_tokens} tokens per forward pass at most", flush=True)
    for kind, compiled in itertools.product((Ours, Bare), (False, True)):
        name = f"{kind.__name__.lower()}, {'compiled' if compiled else 'eager'}"
        loop = kind(settings, c, compiled)
        measure(loop, equal, c, settings, f"{name}, 8 rows of {c.length}")
        if kind is Ours:
            measure(loop, unlike, c, settings, f"{name}, 64 rows of {min(sizes)} to {max(sizes)}")
        del loop
        gc.collect()  # compiled layers hold themselves
        if cuda:
            torch.cuda.empty_cache()


def measure(loop, examples: list[data.Example], c: Config, settings: dict, title: str) -> None:
    """Print the speed of a loop's step, on a GPU with MFU and peak memory."""
    cuda, seconds, share = torch.cuda.is_available(), [], ""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2 + c.steps):  # the first two warm up and compile
        began = now()
        try:
            loop.step(examples)
        except torch.OutOfMemoryError:
            loop.optimizer.zero_grad()
            return print(f"  {title:44}out of memory", flush=True)
        seconds.append(now() - began)
    sizes = np.array([len(e.ids) for e in examples])
    speed = sizes.sum() / statistics.median(seconds[2:])

    # The embedding is looked up, not multiplied. L is an average over tokens.
    count = sum(p.numel() for p in loop.model.parameters())
    weights = count - settings["vocab_size"] * settings["hidden_size"]
    flops = flops_per_token(settings, weights, (sizes**2).sum() / sizes.sum())
    for name, peak in PEAK_FLOPS.items():
        if cuda and name in torch.cuda.get_device_name():
            share = f"MFU {flops * speed / peak:.1%}, "
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, " if cuda else ""
    print(f"  {title:44}{speed:8.0f} tokens per second, {share}{memory}{seconds[0]:.0f} s to start",
          flush=True)


# ==== read: waits and kernels =====================================================================


def profile_step(c: Config) -> None:
    """Warn of every wait for the device in a step, and list what takes its time."""
    settings = TINY if c.tiny else LARGE
    examples = random_rows([60, 200, 350, 700] * 8, settings["vocab_size"])
    loop, cuda = Ours(settings, c), torch.cuda.is_available()
    loop.step(examples)

    # Torch itself says where the host waits.
    if cuda:
        torch.cuda.set_sync_debug_mode("warn")
    with profile() as recorded:  # of all devices that are there
        loop.step(examples)
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=12))


def first_minutes() -> None:
    """Each part as a command of its own: what fails or hangs stops none of the others."""
    began = time.perf_counter()
    for title, command, variables in (
            ("tests that need CUDA", "pytest -k cuda tests/test_model.py", {}),
            ("speed of 1.1B; why layers compile anew", "labs.bench_gpu --only large",
             {"TORCH_LOGS": "recompiles"}),
            ("waits and kernels", "labs.bench_gpu --only profile", {}),
            ("beside a bare loop", "labs.bench --dtype bf16", {})):
        print(f"--- {title}: python -m {command}", flush=True)
        left = max(SECONDS - (time.perf_counter() - began), 1)
        try:
            done = subprocess.run([sys.executable, "-m", *command.split()], text=True, timeout=left,
                                  env={**os.environ, **variables}, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            print(*done.stdout.splitlines()[-25:], sep="\n", flush=True)
        except subprocess.TimeoutExpired:
            print("no time left")


def main(c: Config) -> None:
    """The parts that are asked for."""
    check(c.steps > 0 and c.length > 1, "--steps must be 1 or more, --length 2")
    check(c.only or c == Config(), "the other flags go with --only")
    check(torch.cuda.is_available() or (c.only and c.tiny), "there is no CUDA device here; on a "
          "CPU only --only large --tiny and --only profile --tiny run")
    {"": first_minutes, "large": large, "profile": profile_step}[c.only](*([c] if c.only else []))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
