"""What one wants to know of a new GPU in ten minutes: tests, speed, waits, kernels, graphs.

    python -m labs.bench_gpu                # all of it, in at most ten minutes
    python -m labs.bench_gpu --only large   # 1.1B parameters at length 2048, eager and compiled
    python -m labs.bench_gpu --only profile # where an SFT step waits for the device; its kernels

MFU, model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B), is the share of a card's peak
that the products of the model use:

    MFU = (6 N + 6 n_layers D L) * tokens per second / peak FLOPs

6 N for the N weights in matrix products, forward and backward, and 12 n_layers D L / 2 for causal
attention over L tokens. Work that is done twice (recomputed layers) does not count. What one should
see: 40% or more on an H100 in 16 bit, compiled ahead of eager, and a handful of waits per step.
No figure stands here yet: nothing was run on a GPU.

Exercise. Why is MFU low for a small model?
    Solution: its kernels are shorter than the time it takes to start them.
"""

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
from torch.profiler import ProfilerActivity, profile

import data
import train_sft
from model import check

LARGE = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
         "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "max_position_embeddings": 2048}  # TinyLlama's shape
TINY = {**LARGE, "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "T4": 65e12}  # dense, 16 bit
SECONDS = 590  # of all commands together


@dataclass
class Config:
    """Measure the training step on a GPU."""

    only: Literal["", "large", "profile"] = ""  # one part; empty: all, and the tests for CUDA
    steps: int = 8  # timed steps
    length: int = 2048  # tokens per row of large; 8 rows per step
    tiny: bool = False  # a toy model, to try --only profile on a CPU


# ==== read: tokens per second and MFU =============================================================


class Step:
    """The project's SFT step on one device, with random weights."""

    def __init__(self, settings: dict, compiled: bool = False):
        self.hardware = train_sft.setup_hardware("auto")
        self.model = modeling.Llama(modeling.read_config(settings))
        self.model.initialize(0)
        self.model.to(self.hardware.device).train()
        self.config = train_sft.Config(learning_rate=1e-5)
        self.optimizer = train_sft.make_optimizer(self.model, self.config)
        if compiled:
            self.model.compile_layers()

    def __call__(self, examples: list[data.Example]) -> None:
        """Forward, backward, clip, update."""
        mixer, scaler = data.Mixer([len(examples)], np.ones(1), 0), self.hardware.make_scaler()
        run = train_sft.RunData(examples, [], mixer, len(examples), 1)
        rest = self.model, run, 1, self.config, self.hardware, scaler
        loss, _ = train_sft.backward_step(*rest)
        train_sft.clip_and_step(self.model, self.optimizer, scaler, self.config, loss, run, 1)


def random_rows(lengths: list[int], vocabulary: int) -> list[data.Example]:
    """Examples of random tokens, all of them supervised."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(vocabulary, size=n, dtype=np.int32) for n in lengths]
    return [data.Example(row, ((1, len(row), 1.0),)) for row in ids]


def flops_per_token(settings: dict, weights: int, length: int) -> int:
    """What the products of a token need, forward and backward: the formula above."""
    return 6 * weights + 6 * settings["num_hidden_layers"] * settings["hidden_size"] * length


def large(c: Config) -> None:
    """1.1B parameters, 8 rows per step, eager and compiled."""
    examples, card = random_rows([c.length] * 8, LARGE["vocab_size"]), torch.cuda.get_device_name()
    peak = next((value for name, value in PEAK_FLOPS.items() if name in card), None)
    for compiled in (False, True):
        torch.cuda.reset_peak_memory_stats()
        step, seconds = Step(LARGE, compiled), []
        for k in range(2 + c.steps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(examples)
            torch.cuda.synchronize()
            if k >= 2:  # the first ones warm up and compile
                seconds.append(time.perf_counter() - began)

        # The embedding is looked up, not multiplied.
        speed = 8 * c.length / statistics.median(seconds)
        count = sum(p.numel() for p in step.model.parameters())
        weights = count - LARGE["vocab_size"] * LARGE["hidden_size"]
        share = "unknown peak FLOPs of this card"
        if peak:
            share = f"MFU {flops_per_token(LARGE, weights, c.length) * speed / peak:.1%}"
        print(f"{card}, {count / 1e9:.2f}B parameters, L {c.length}, "
              f"{'compiled' if compiled else 'eager'}: {speed:.0f} tokens per second, {share}, "
              f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
        del step
        torch.cuda.empty_cache()


# ==== read: waits and kernels =====================================================================


def profile_step(c: Config) -> None:
    """Warn of every wait for the device in a step, and list what takes its time."""
    settings = TINY if c.tiny else {**LARGE, "num_hidden_layers": 4}
    examples = random_rows([60, 200, 350, 700] * 2, settings["vocab_size"])
    step, cuda = Step(settings), torch.cuda.is_available()
    step(examples)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    # Torch itself says where the host waits.
    if cuda:
        torch.cuda.set_sync_debug_mode("warn")
    with profile(activities=activities) as recorded:
        step(examples)
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=12))


def first_minutes() -> None:
    """Each part as a command of its own: what fails or hangs stops none of the others."""
    began = time.perf_counter()
    for title, command, variables in (
            ("tests that need CUDA", "pytest -q -k cuda tests/test_model.py", {}),
            ("speed of 1.1B", "labs.bench_gpu --only large", {}),
            ("waits and kernels", "labs.bench_gpu --only profile", {}),
            ("recompilations", "labs.bench_gpu --only large --steps 2 --length 1000",
             {"TORCH_LOGS": "recompiles"}),
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
    cuda = torch.cuda.is_available()
    check(cuda or (c.only == "profile" and c.tiny), "there is no CUDA device here; on a CPU only "
          "--only profile --tiny runs")
    {"": first_minutes, "large": large, "profile": profile_step}[c.only](*([c] if c.only else []))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
