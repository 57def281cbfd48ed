"""Ensembles: several checkpoints answer an exam together.

Idea. Checkpoints that fail on different questions can correct one another. Each gives every letter
x a log-probability; s_k(x) = ln p_k(x) - ln sum_y p_k(y) are those of checkpoint k, as if the
letters were all there is. Together they answer

    mean   argmax_x sum_k s_k(x) / K                 who is sure counts more, for and against
    max    argmax_x max_k s_k(x)                     the surest speaks (LAE, arXiv:2303.10070)
    vote   argmax_x #{k: x = argmax_y s_k(y)}        one voice each; the mean breaks ties

The best single one was picked by the very questions it is compared on: it looks a little better
than it is, so an ensemble that beats it (McNemar's test, labs/scores.py) does so in earnest.

    for S in 0 1 2 3 4; do python train_sft.py --steps 900 --seed $S --output_dir out/some/$S; done
    python eval.py exam --model out/some/? --output_dir out/some/exam
    python -m labs.ensemble out/some/exam

What you should see (one thread): five checkpoints caught before or after the exam's skill appears
(seeds 0 and 1 have it, 3 in part). Seen: a vote listens to the many who guess; mean and maximum to
those who are sure. Not seen: that either beats the best one, or the other, by more than noise.
Cannot be seen: checkpoints that know different things, since all learnt from the same rows.

                  accuracy  lost  won      McNemar's p
    out-some-0       98.4%     5    4                1
    out-some-1       98.8%     0    0  best single one
    out-some-2       59.4%   127    1          2.2e-28
    out-some-3       82.5%    55    3          2.1e-11
    out-some-4       60.9%   122    1          2.8e-27
    mean             99.7%     1    4             0.38
    max             100.0%     0    4             0.12
    vote             96.6%     8    1            0.039

    every 3 of 5    points gained  deviation  least  most
    mean                     -0.1        0.9   -1.6   1.2
    max                       0.2        0.7   -0.6   1.2
    vote                     -5.4        4.6  -12.2   0.6

Exercise. For which rules does it matter that s is normalised over the letters?
    Solution: for max. In the mean a checkpoint's constant shifts all letters alike, and a vote asks
    only for its best letter; but one that gives letters little of its mass would never be surest.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
import eval as evaluation
from eval import LETTERS
from model import check


@dataclass
class Config:
    """Let checkpoints that took the same exam answer it together; compare with the best of them."""

    folders: list[str]  # output folders of `eval.py exam`, of one checkpoint or of several
    size: int = 3  # of smaller ensembles, whose gains are shown with their spread


# ==== read: the idea ==============================================================================

RULES = ("mean", "max", "vote")


def normalize(answers: list[dict]) -> np.ndarray:
    """s [questions, letters] of the lines of predictions.jsonl; without scores all are alike."""
    s = np.zeros((len(answers), len(LETTERS)))  # [Q, 4]
    for row, a in zip(s, answers, strict=True):
        if a["logprobs"]:
            row[:] = list(a["logprobs"].values())

    # Of a letter's probability the share among the letters counts.
    return s - np.logaddexp.reduce(s, axis=1, keepdims=True)


def combine(s: np.ndarray, rule: str) -> np.ndarray:
    """The score of every letter [Q, 4] by a rule, of s [K, Q, 4]; the highest is the answer."""
    mean = s.mean(0)  # [Q, 4]
    if rule == "mean":
        return mean
    if rule == "max":
        return s.max(0)

    # A checkpoint without an opinion votes for all letters. e^mean is below 1: it only breaks ties.
    votes = (s == s.max(2, keepdims=True)).sum(0)  # [Q, 4]
    return votes + np.exp(mean)


def answer_together(answers: list[list[dict]], rule: str) -> list[dict]:
    """Lines as in predictions.jsonl, with the letters that checkpoints give together."""
    scores = combine(np.stack([normalize(lines) for lines in answers]), rule)  # [Q, 4]
    together = []
    for lines, best in zip(zip(*answers, strict=True), scores.argmax(1).tolist(), strict=True):
        # A question that fits no checkpoint's context stays unanswered.
        known = any(line["logprobs"] for line in lines)
        together.append({**lines[0], "prediction": LETTERS[best] if known else None})
    return together


def accuracy(lines: list[dict]) -> float:
    """Share of the questions answered rightly."""
    return np.mean([line["prediction"] == line["answer"] for line in lines])


# ==== read: is it better than the best of them ====================================================


def report(names: list[str], answers: list[list[dict]]) -> None:
    """Every checkpoint and every rule beside the best single one."""
    scores = evaluation.lab("scores", "McNemar's test")
    best = max(answers, key=accuracy)
    table = [("", "accuracy", "lost", "won", "McNemar's p")]
    rows = list(zip(names, answers, strict=True))
    for rule in RULES:
        rows.append((rule, answer_together(answers, rule)))

    # Only questions that one of two has right and the other has not can tell them apart.
    for name, lines in rows:
        found = scores.compare(best, lines)
        p = "best single one" if lines is best else f"{found['p']:.2g}"
        table.append((name, accuracy(lines), found["lost"], found["won"], p))
    data.print_table(table)


def gains(answers: list[list[dict]], size: int) -> None:
    """What smaller ensembles gain over the best of their own members, mean and spread."""
    table = [(f"every {size} of {len(answers)}", "points gained", "deviation", "least", "most")]
    for rule in RULES:
        gained = []
        for chosen in itertools.combinations(answers, size):
            best = max(map(accuracy, chosen))
            gained.append(100 * (accuracy(answer_together(list(chosen), rule)) - best))

        # Ensembles share members, so the deviation is of no independent draws.
        found = np.mean(gained), np.std(gained, ddof=1), min(gained), max(gained)
        table.append((rule, *map("{:.1f}".format, found)))
    data.print_table(table)


# ---- skip on a first reading: files --------------------------------------------------------------


def parse_line(where: str, value) -> dict:
    """A line of predictions.jsonl; InputError for others."""
    wanted = {"subject", "id", "answer", "prediction", "logprobs"}
    check(isinstance(value, dict) and wanted <= value.keys(), f"{where}: expected a line as "
          "`eval.py exam` writes them")

    # None where nothing was scored, else a ln p per letter.
    scores = value["logprobs"]
    known = isinstance(scores, dict) and list(scores) == list(LETTERS)
    known = known and all(type(x) in (float, int) and np.isfinite(x) for x in scores.values())
    check(scores is None or known,
          f"{where}: expected four log-probabilities, found {scores!r:.80}")
    return value


def read_answers(folders: list[str]) -> tuple[list[str], list[list[dict]]]:
    """(names, lines) of the predictions in some folders; InputError where they do not fit."""
    names, answers, asked = [], [], []
    for folder in map(Path, folders):
        # An exam of several checkpoints has a folder for each of them.
        files = sorted([*folder.glob("predictions.jsonl"), *folder.glob("*/predictions.jsonl")])
        check(files, f"{folder} holds no predictions.jsonl of `eval.py exam`")
        for path in files:
            lines, questions, scored = [], [], 0
            for _, a in data.read_rows([path], quiet=True, parse=parse_line):
                check(a["answer"], f"{path}: its questions have no right answers")
                lines.append(a)
                questions.append((a["subject"], a["id"]))
                scored += a["logprobs"] is not None
            check(scored, f"{path} has no log-probabilities: answers in words have none; ask for "
                  "letters")
            names.append(path.parent.name)
            answers.append(lines)
            asked.append(questions)

    # Scores on different questions cannot be combined.
    check(asked.count(asked[0]) == len(asked), "the folders are of different exams")
    check(len(answers) > 1, "an ensemble needs two checkpoints or more")
    return names, answers


def main(c: Config) -> None:
    """Read the predictions, combine them, compare."""
    names, answers = read_answers(c.folders)
    check(c.size > 1, f"--size must be at least 2, not {c.size}")
    report(names, answers)
    if len(answers) > c.size:
        gains(answers, c.size)
    else:
        print(f"ensembles of {c.size} want more than {len(answers)} checkpoints")


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "folders")))
