"""Write the rows that a method thinks worth most; compare with --method random.

    python -m labs.select FILE... --output FILE.jsonl --method kcenter --share 0.005 --model DIR
"""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

import data
from data import is_text, parse_row, read_rows
from labs.text import Modelled, check_output, run_model, write_kept
from model import check


@dataclass
class Config(Modelled):
    """Write the rows that a method thinks worth most; compare with --method random."""

    method: Literal["kcenter", "ifd", "tags", "random"] = "random"  # how to choose
    n: int = 0  # rows to choose
    share: float = 0.0  # or this share of the rows
    clusters: int = 10  # of k-means, for kcenter
    seed: int = 0  # of k-means, and of random


def kmeans(x: np.ndarray, k: int, seed: int, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(centres [k, D], cluster of each row [R]): Lloyd's algorithm from random rows."""
    centres = np.random.default_rng(seed).choice(x, min(k, len(x)), replace=False)
    for _ in range(rounds):
        cluster = (x @ centres.T - np.square(centres).sum(1) / 2).argmax(1)  # [R], from [R, k]
        for j in np.unique(cluster):
            centres[j] = x[cluster == j].mean(0)
    return centres, cluster


def k_center(x: np.ndarray, first: int, n: int) -> tuple[list[int], float]:
    """k-center greedy (arXiv:1708.00489, algorithm 1) on unit vectors [R, D]: (rows, radius).

    From row `first` on repeat argmax_i min_{s chosen} d(i, s), d = 1 - cos. The radius is the
    largest distance from a row to the nearest chosen one.
    """
    chosen, nearest = [first], 1 - x @ x[first]  # [R]
    while len(chosen) < n:
        nearest[chosen[-1]] = -np.inf
        chosen.append(int(nearest.argmax()))
        np.minimum(nearest, 1 - x @ x[chosen[-1]], out=nearest)
    return chosen, max(float(nearest.max()), 0.0)


def core_set(states: np.ndarray, n: int, clusters: int, seed: int) -> list[int]:
    """n rows by their embeddings [R, D] (arXiv:2305.09246, section 3): L2 norm, k-means, k-center.

    k-center starts at the task's core sample: the row nearest to the centre of the cluster that
    most rows fall in.
    """
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    check(np.isfinite(norms).all() and norms.min() > 0, "hidden states of --model are zero or NaN")
    x = states / norms
    centres, cluster = kmeans(x, clusters, seed)
    core = np.square(x - centres[np.bincount(cluster).argmax()]).sum(1).argmin()
    chosen, radius = k_center(x, int(core), n)
    print(f"k-center radius {radius:.4f} (1 - cos)")
    return chosen


def cover_tags(tags: list[set], n: int) -> list[int]:
    """n rows by complexity-first diverse sampling (InsTag, arXiv:2308.07074, algorithm 1).

    In rounds, rows with most tags first: a row is taken that adds a tag to those of the round.
    """
    left, chosen = sorted(range(len(tags)), key=lambda i: -len(tags[i])), []
    while left:
        seen, passed = set(), []
        for i in left:
            (passed if tags[i] <= seen else chosen).append(i)
            seen |= tags[i]
        left = passed
    return chosen[:n]


def main(c: Config) -> None:
    """`data.py select`."""
    check_output(c)
    check(bool(c.n) != bool(c.share) and c.n >= 0 and 0 <= c.share <= 1,
         "give --n above 0, or --share above 0 and at most 1")
    check(c.model or c.method in ("tags", "random"), f"--method {c.method} needs --model DIR")

    def parse(where: str, value) -> tuple[set, str]:
        row, tags = parse_row(where, value), value.get("tags") or []
        roles = [m["role"] for m in [*row.messages, *(row.chosen or [])]]
        if c.method == "ifd" and ("user" not in roles or roles[-1] != "assistant"):
            return set(), "no question and answer"
        if c.method != "tags":
            return set(), ""
        check(isinstance(tags, list) and all(map(is_text, tags)),
             f"{where}: expected a list of texts as tags, found {tags!r:.40}")
        return set(tags), "" if tags else "no tags"

    found = read_rows(c.files, c.skip_bad_rows, parse=parse)
    found = [pair or (set(), "bad row") for _, pair in found]  # (tags, why it cannot be chosen)
    tags, reasons = [tags for tags, _ in found], [reason for _, reason in found]
    rows = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=int)
    check(len(rows), f"no row to choose from: {dict(Counter(reasons))}")
    n = c.n or max(1, int(c.share * len(rows) + 0.5))
    check(n <= len(rows), f"--n {n} is more than the {len(rows)} rows there are to choose from")
    if c.method == "ifd":
        # mean NLL(answer | question) / mean NLL(answer), arXiv:2308.12032, eq. 3
        asked, alone = (run_model(c, reasons, "loss", part) for part in ("last", "alone"))
        scores = {i: asked[i] / alone[i] for i in asked}
        for i, score in scores.items():
            reasons[i] = ("" if score <= 1 else "IFD above 1" if score > 1 else
                          "nothing to score, or above --max_length")
        chosen = sorted((i for i in scores if not reasons[i]), key=lambda i: -scores[i])[:n]
    elif c.method == "kcenter":
        states = run_model(c, reasons, "states")
        chosen = rows[core_set(np.stack([states[i] for i in rows]), n, c.clusters, c.seed)]
    elif c.method == "tags":
        chosen = rows[cover_tags([tags[i] for i in rows], n)]
    else:
        chosen = np.random.default_rng(c.seed).permutation(rows)[:n]
    for i in set(rows.tolist()).difference(map(int, chosen)):
        reasons[i] = reasons[i] or "not chosen"
    write_kept(c, reasons)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
