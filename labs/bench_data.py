"""Time and memory of the data commands on a large file that this script makes.

    python -m labs.bench_data              # 200,000 rows; --rows N for another number

The rows are random Chinese and English sentences over a Zipfian vocabulary; one in fifty repeats an
earlier row, half of those with a word changed. Memory is the peak of the command's main process;
cores is the processor time of all its processes divided by the wall time. Selection is timed on
random embeddings, without a model.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np

from labs import world

ROOT = Path(__file__).resolve().parent.parent


def make_rows(path: Path, count: int, seed: int = 0) -> int:
    """Write the file; returns the number of planted duplicates."""
    # Two languages, each with a vocabulary whose frequencies fall as 1 / rank.
    rng = random.Random(seed)
    characters = list(map(chr, range(0x4E00, 0x4E00 + 3000)))
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    pools = []
    for pool in (characters, words):
        falling = itertools.accumulate(1 / (k + 10) for k in range(len(pool)))
        pools.append((pool, list(falling)))

    # A row repeats an earlier one, every second time with a word changed, or it is a new one.
    planted, kept = 0, deque(maxlen=1000)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            if kept and rng.random() < 0.02:
                row, planted = list(rng.choice(kept)), planted + 1
                if rng.random() < 0.5:
                    row[rng.randrange(len(row))] = "改"
            else:
                side = rng.random() < 0.5
                pool, weights = pools[side]
                row = rng.choices(pool, cum_weights=weights, k=rng.randint(60, 300))
                row = [w + " " * side for w in row]
                kept.append(row)

            # The first fifth asks, the rest answers.
            cut = len(row) // 5
            messages = [{"role": "user", "content": "".join(row[:cut])},
                        {"role": "assistant", "content": "".join(row[cut:])}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return planted


def measure(folder: Path, last: int, *arguments) -> None:
    """Run a lab in a folder; print what it took and the last lines it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", f"labs.{arguments[0]}", *map(str, arguments[1:])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})

    # The peak of the main process stands in /proc as long as it runs.
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.05)

    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / wall
    said = " | ".join(map(str.strip, process.stdout.read().splitlines()[-last:]))
    print(f"{arguments[0]:10}{wall:8.1f} s{cores:8.2f} cores{peak / 2**20:8.2f} GiB   {said}",
          flush=True)


def main() -> None:
    """Make the file, run the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        planted = make_rows(folder / "rows.jsonl", rows)
        size = (folder / "rows.jsonl").stat().st_size / 2**20
        print(f"{rows} rows, {size:.0f} MiB, {planted} planted duplicates")

        # Every command reads all rows; an exam to compare them with comes from the demo.
        world.make_demo(folder / "demo")
        write = ("rows.jsonl", "--output", "out.jsonl")
        measure(folder, 2, "filter", *write, "--language", "zh")
        measure(folder, 3, "filter", *write, "--duplicates", "near")
        measure(folder, 2, "select", *write, "--share", 0.005)
        measure(folder, 1, "overlap", "rows.jsonl", "--exam", "demo/exam")
        measure(folder, 2, "stats", "rows.jsonl")

    # 50,000 rows of a model's states are slow to get, and random ones as slow to select from.
    x = np.random.default_rng(0).normal(size=(50_000, 256)).astype(np.float32)
    from labs import select  # the lab that is measured

    began = time.perf_counter()
    x = select.unit_vectors(x)
    centres, cluster = select.kmeans(x, 10, 0)
    select.k_center(x, select.core_row(x, centres, cluster), 500)
    print(f"k-center: 500 of 50,000 embeddings of 256 dimensions in "
          f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
