"""Choose the rows that a method thinks worth most; always beside a random arm of the same size.

Ideas, each in one function.

- kcenter ("Maybe only 0.5% data is needed", arXiv:2305.09246, section 3): embed a row as the mean
  of a model's last hidden states. k-means over the pool of all tasks (--pool) shows what the task
  is about: the centre of the cluster that most of its rows fall in. From the row nearest to it
  repeat argmax_i min_{s chosen} d(i, s), d = 1 - cos: every row of the task ends near to a chosen
  one (arXiv:1708.00489, algorithm 1).
- ifd (arXiv:2308.12032, eq. 3): IFD = loss(answer | question) / loss(answer). Near 1 the question
  hardly helps: hard rows, taken first. Above 1 it misleads: dropped.
- random: what the others must beat. (By tags: `labs.tags`.)

--per KEY chooses --n rows of each value of a key, as many of every category (Baichuan 2,
arXiv:2309.10305, balances its data so), with any method; for kcenter each value is a task.

    python -m labs.select out/demo/instructions.jsonl --output out/demo/few.jsonl --method ifd \\
        --n 30 --model out/sft --rest out/demo/rest.jsonl
    python -m labs.select out/demo/identity.jsonl --pool out/demo/instructions.jsonl --n 6 \\
        --output out/demo/core.jsonl --method kcenter --clusters 3 --model out/sft

What you should see: 30 of 300 rows. 11 of them have a single question, as 84 of the 300 have: with
earlier turns an answer leans on what stands before it, and its IFD is low. Then six of the 24
questions about the model itself, with every kind of answer among them.

Cannot be seen at this size: which choice trains better. A model that small learns from any rows.

Exercise. What does k-center take after the core, and why may that be a bad choice?
    Solution: the rows farthest from all chosen ones: outliers, and rows too short to say anything.
"""

import functools
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import eval as evaluation
from data import ChatTokenizer, Row, parse_row, read_rows
from labs.text import Modelled, check_output, example_of, kept_rows, write_rows
from model import check


@dataclass
class Config(Modelled):
    """Choose the rows that a method thinks worth most; compare with --method random."""

    method: Literal["kcenter", "ifd", "random"] = "random"  # how to choose
    n: int = 0  # rows to choose, with --per of each value
    share: float = 0.0  # or this share of them
    per: str = ""  # key of the rows: as many of each of its values
    pool: list[str] = field(default_factory=list)  # files of the other tasks, for kcenter's k-means
    clusters: int = 10  # of k-means, for kcenter
    seed: int = 0  # of k-means, and of random
    rest: str = ""  # .jsonl for the rows that could have been chosen and were not; empty: none


# ==== read: k-means and k-center ==================================================================


def kmeans(x: np.ndarray, k: int, seed: int, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(centres [k, D], cluster of each row [R]): Lloyd's algorithm from random rows."""
    centres = np.random.default_rng(seed).choice(x, min(k, len(x)), replace=False)
    for _ in range(rounds):
        # The nearest centre c has the least |x - c|^2, that is the largest x.c - |c|^2 / 2.
        cluster = (x @ centres.T - np.square(centres).sum(1) / 2).argmax(1)  # [R], from [R, k]
        for j in np.unique(cluster):
            centres[j] = x[cluster == j].mean(0)
    return centres, cluster


def core_row(x: np.ndarray, centres: np.ndarray, cluster: np.ndarray) -> int:
    """The row of a task [R, D] nearest to the centre of the cluster that holds most of its rows."""
    # The clusters may be those of a larger pool: `cluster` [R] are the task's own rows in it.
    middle = centres[np.bincount(cluster).argmax()]  # [D]
    return int(np.square(x - middle).sum(1).argmin())


def k_center(x: np.ndarray, first: int, n: int) -> tuple[list[int], float]:
    """k-center greedy (arXiv:1708.00489, algorithm 1) on unit vectors [R, D]: (rows, radius).

    The next row is argmax_i min_{s chosen} d(i, s), d = 1 - cos; the radius is the d of one more.
    """
    chosen, nearest = [first], 1 - x @ x[first]  # [R] distance to the nearest chosen row
    while len(chosen) < min(n, len(x)):
        nearest[chosen[-1]] = -np.inf  # no row twice
        chosen.append(int(nearest.argmax()))
        np.minimum(nearest, 1 - x @ x[chosen[-1]], out=nearest)
    return chosen, max(float(nearest.max()), 0.0)


def unit_vectors(states: np.ndarray) -> np.ndarray:
    """Embeddings [R, D] divided by their lengths."""
    # Zero or NaN has no direction: a broken checkpoint, not a far-away row.
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    check(np.isfinite(norms).all() and norms.min() > 0, "hidden states of --model are zero or NaN")
    return states / norms


# ==== read: IFD ===================================================================================


def ifd_scores(c: Config, rows: list[Row]) -> list[float]:
    """loss(answer | question) / loss(answer) of each row's last answer; NaN above --max_length."""
    # With the question, and alone. Of a row that is cut they would be of different tokens.
    tokenizer = ChatTokenizer(c.model, c.template)
    fits, asked, alone = [], [], []
    for i, row in enumerate(rows):
        e = example_of(row, tokenizer, "last")
        if len(e.ids) <= c.max_length:
            fits.append(i)
            asked.append(e)
            alone.append(example_of(row, tokenizer, "alone"))
    model = evaluation.open_model(c, tokenizer)

    def losses(examples: list) -> np.ndarray:
        """Mean loss of each example's supervised tokens."""
        out = np.full(len(examples), np.nan)
        for i, logp in evaluation.example_logprobs(model, examples, c.micro_tokens):
            out[i] = -logp.mean()
        return out

    scores = np.full(len(rows), np.nan)
    scores[fits] = losses(asked) / losses(alone)
    return scores.tolist()


# ---- skip on a first reading: the command --------------------------------------------------------


def embed(c: Config, rows: list[Row]) -> np.ndarray:
    """The mean of the last hidden states of each row [R, D]."""
    tokenizer = ChatTokenizer(c.model, c.template)
    examples = [example_of(row, tokenizer, max_length=c.max_length) for row in rows]

    # Rows of like length share a forward pass; padding none of them.
    model, out = evaluation.open_model(c, tokenizer), [None] * len(rows)
    for chunk in data.micro_batches([len(e.ids) for e in examples], c.micro_tokens)[0]:
        batch = data.collate([examples[i] for i in chunk], model.device)
        with torch.no_grad():
            states, _ = model.hidden(batch.ids, batch.lengths)  # [T, D]
        for i, of_row in zip(chunk, states.float().split(batch.lengths), strict=True):
            out[i] = of_row.mean(0).cpu().numpy()  # [D]
    return np.stack(out)


def candidate(c: Config, where: str, value) -> tuple[str, str]:
    """(value of --per, why it cannot be chosen) of a row."""
    row = parse_row(where, value)
    roles = [m["role"] for m in [*row.messages, *(row.chosen or [])]]
    if c.method == "ifd" and not ("user" in roles and roles[-1] == "assistant"):
        return "", "no question and answer"
    if not c.per:
        return "", ""
    group = value.get(c.per) if isinstance(value, dict) else None
    return str(group), f"no {c.per}" if group is None else ""


def order_of(c: Config, reasons: list[str]):
    """A function (rows' numbers, n) -> those chosen; ifd gives reasons to rows that it drops."""
    if c.method == "random":
        rng = np.random.default_rng(c.seed)
        return lambda numbers, n: rng.permutation(numbers)[:n].tolist()

    # The others look at the rows themselves, which are read again and not kept meanwhile.
    rows, places = [], {}  # from a row's number to its place among those that could be chosen
    for i, (_, row) in enumerate(read_rows(c.files, c.skip_bad_rows, quiet=True)):
        if not reasons[i]:
            places[i] = len(rows)
            rows.append(row)
    if c.method == "kcenter":
        others = [row for _, row in read_rows(c.pool, c.skip_bad_rows, quiet=True) if row]
        x = unit_vectors(embed(c, rows + others))  # [rows and pool, D]
        centres, cluster = kmeans(x, c.clusters, c.seed)

        def spread(numbers: list[int], n: int) -> list[int]:
            task = [places[i] for i in numbers]
            core = core_row(x[task], centres, cluster[task])
            chosen, radius = k_center(x[task], core, n)
            print(f"k-center radius {radius:.4f} (1 - cos)")
            return [numbers[k] for k in chosen]
        return spread

    # IFD: hard rows first; a row whose question misleads the model teaches nothing.
    scores = ifd_scores(c, rows)
    for i, k in places.items():
        if scores[k] > 1:
            reasons[i] = "IFD above 1"
        elif np.isnan(scores[k]):
            reasons[i] = "nothing to score, or above --max_length"

    def hardest(numbers: list[int], n: int) -> list[int]:
        left = [i for i in numbers if not reasons[i]]
        return sorted(left, key=lambda i: -scores[places[i]])[:n]
    return hardest


def main(c: Config) -> None:
    """Choose rows, and write them and, with --rest, the others as they were."""
    check_output(c.output, *c.files, *c.pool)
    if c.rest:
        check_output(c.rest, *c.files, *c.pool, name="rest")
        check(Path(c.rest) != Path(c.output), "--rest and --output name the same file")
    check(bool(c.n) != bool(c.share) and c.n >= 0 and 0 <= c.share <= 1,
          "give --n above 0, or --share above 0 and at most 1")
    check(c.model or c.method == "random", f"--method {c.method} needs --model DIR")
    check(not c.pool or c.method == "kcenter", "--pool is for --method kcenter")

    # Which rows could be chosen.
    found = read_rows(c.files, c.skip_bad_rows, parse=functools.partial(candidate, c))
    reasons, groups = [], {}
    for i, (_, pair) in enumerate(found):
        group, reason = pair or ("", "bad row")
        reasons.append(reason)
        if not reason:
            groups.setdefault(group, []).append(i)
    check(groups, f"no row to choose from: {dict(Counter(reasons))}")

    # From each group as many as are wanted, or as there are.
    choose, chosen = order_of(c, reasons), set()
    for group, numbers in groups.items():
        n = c.n or max(1, int(c.share * len(numbers) + 0.5))
        picked = choose(numbers, n)
        chosen |= set(picked)
        if len(picked) < n:
            where = f" with {c.per} {group}" if c.per else ""
            print(f"{n} rows{where} were wanted, only {len(picked)} could be chosen")

    # Whatever could be chosen and was not says so, beside the rows that failed before.
    final, rest = [], []
    for i, reason in enumerate(reasons):
        final.append(reason or ("" if i in chosen else "not chosen"))
        rest.append(reason or ("chosen" if i in chosen else ""))
    write_rows(c.output, kept_rows(c, final))
    if c.rest:
        write_rows(c.rest, kept_rows(c, rest))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
