"""What a score is worth: the table of an exam, McNemar's test, a figure.

The idea: a score says nothing without three numbers beside it. The *floor* is what the letter gets
that is right most often: on C-Eval's val split 26.30%, not 25%. The *interval* is what chance does
to n questions: about 2.3 points either way for 1,346 (Wilson 1927). And two checkpoints that took
the same exam differ only on the questions that one of them alone has right; of these n each side
has half by chance (McNemar 1947):

    p = 2 sum_(k <= min(lost, won)) C(n, k) / 2^n

    python eval.py exam --model out/sft out/dpo    # prints this table by itself
    python -m labs.scores out/exam out/other       # again, and of exams that ran one by one

What you should see: the demo's DPO loses about as many questions as it wins, p far above 0.05.

Exercise. A checkpoint loses 1 question and wins 9. Is it better?
    Solution: p = 2 (C(10, 0) + C(10, 1)) / 2^10 = 22 / 1024 = 0.02: most likely.
"""

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

import data
import model as modeling
from eval import LETTERS, Sheet, short_name
from model import check


@dataclass
class Config:
    """Print the table of exams that have been taken, and compare them in turn."""

    folders: list[str]  # output folders of `eval.py exam`
    output: str = ""  # folder of comparison.json and accuracy.png; empty: none


# ==== read: two checkpoints on the same questions =================================================


def mcnemar(lost: int, won: int) -> float:
    """p-value of two scores on the same questions being alike (McNemar 1947), two-sided.

    Of the n questions that one of the two alone has right, each side's share is binomial with 1/2:
    exact for n < 25, else chi-square with one degree of freedom and continuity correction.
    """
    n = lost + won
    if n < 25:
        # An even split is counted from both sides, hence the limit.
        outcomes = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
        return min(1.0, 2 * outcomes / 2**n)
    return math.erfc(math.sqrt(max(abs(lost - won) - 1, 0) ** 2 / n / 2))


def compare(before: list[dict], after: list[dict]) -> dict:
    """Questions that a second checkpoint lost and won against a first, and McNemar's p."""
    lost = won = 0
    for a, b in zip(before, after, strict=True):
        was, now = a["prediction"] == a["answer"], b["prediction"] == b["answer"]
        lost += was and not now
        won += now and not was
    return {"lost": lost, "won": won, "p": mcnemar(lost, won)}


# ==== read: the table, and what a tokenizer loses =================================================


def score_lines(r: dict) -> dict[str, tuple]:
    """The table's column of a checkpoint: {label: (questions, cell)}, shares in percent."""

    def percent(*shares, sign: str = "/") -> str:
        return sign.join("-" if x is None else f"{100 * x:.1f}" for x in shares)

    # Subjects first, then their categories, last all together. Four columns fit a terminal of 80.
    lines = {"accuracy in %" if r["floor"] else "no labels": ("n", short_name(r["model"]))}
    for handle, row in r["subjects"].items():
        lines[handle] = row["questions"], percent(row["accuracy"])
    for name, row in {**r["categories"], "all": r}.items():
        lines[f"{name}:"] = row["questions"], percent(row["macro"], row["micro"])

    # What the score is worth; without labels there is none.
    if floor := r["floor"]:
        lines["95% interval"] = "", percent(*r["interval"], sign="-")
        lines[f"floor: always {floor['letter']}"] = "", percent(floor["micro"])
    return lines


def print_scores(results: list[dict], comparisons: list[dict]) -> None:
    """One line per subject, one column per checkpoint; then what a reader must know."""
    print("n: questions; macro/micro: mean of subjects/of questions, interval of micro")
    table, answered = {}, [("answered", *LETTERS, "invalid", "seconds")]
    for r in results:
        for label, (count, cell) in score_lines(r).items():
            table.setdefault(label, [label, count]).append(cell)
        answered.append((short_name(r["model"]), *r["letters"].values(), r["invalid"],
                         f"{r['seconds']:.1f}"))
    data.print_table(list(table.values()))
    print()
    data.print_table(answered)

    # What makes a score mean less than it seems.
    for r in results:
        name = short_name(r["model"])
        if r["shortened"] or r["too_long"]:
            print(f"{name}: {r['shortened']} prompts longer than the context lost shots; "
                  f"{r['too_long']} questions do not fit even alone and count as wrong")
        if r["thinking"]:
            print(f"{name}: reasons before it answers; {r['unfinished']} answers did not come to "
                  "an end (--thinking_tokens)")
        if r["characters_lost"]:
            print(f"{name}: the tokenizer loses {r['characters_lost']:.1%} of the characters of "
                  "the questions; the score means nothing")

    # Of two checkpoints on the same questions only the changed answers count.
    for row in comparisons:
        noise = "which may be noise" if row["lost"] + row["won"] else "no difference"
        verdict = "a difference" if row["p"] < 0.05 else noise
        print(f"{row['first']} -> {row['second']}: {row['lost']} questions lost, "
              f"{row['won']} won;\n  McNemar p = {row['p']:.2g}, {verdict}")


def characters_lost(tokenizer: data.ChatTokenizer, sheets: list[Sheet]) -> float:
    """Share of the questions' characters that the tokenizer drops or has no token for."""
    count = Counter()
    for sheet in sheets:
        for row in (*sheet.subject.shots, *sheet.subject.questions):
            count.update("".join(map(row.get, ("question", *LETTERS))))

    # Each character alone, once: a tokenizer that drops it drops it everywhere.
    lost, unknown = 0, tokenizer.names.get("unk_token")
    for character in filter(str.strip, count):
        ids = tokenizer.tokenizer.encode(character, add_special_tokens=False).ids
        text = tokenizer.decode(ids, special=False).strip()
        lost += count[character] * (text in ("", unknown) or "\ufffd" in text)
    return lost / count.total()


def say_what_is_lost(tokenizer: data.ChatTokenizer, sheets: list[Sheet]) -> None:
    """Print what makes the curve of an exam during training mean less than it seems."""
    lost = characters_lost(tokenizer, sheets)
    long = sum(sheet.prompts.count(None) for sheet in sheets)
    if lost or long:
        print(f"exam: the tokenizer loses {lost:.1%} of its text, {long} questions do not fit")


# ---- skip on a first reading: the figure, files --------------------------------------------------


def draw_exam(path: Path, results: list[dict]) -> None:
    """Bars by subject, of one run's checkpoints a curve; without the extra matplotlib, nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes, floor = figure.subplots(), 100 * results[0]["floor"]["micro"]

    # A run's accuracy over its steps stands in the band of its interval.
    if points := run_points(results):
        steps, micro, low, high = np.array(points).T
        axes.plot(steps, 100 * micro, marker=".")
        axes.fill_between(steps, 100 * low, 100 * high, alpha=0.2)
        axes.axhline(floor, color="gray", linestyle="--")
        axes.set(xlabel="step", ylabel="accuracy in %, with its 95% interval")

    # Anything else is bars: the first subject on top, its name at the middle of its bars.
    else:
        handles, thick = list(results[0]["subjects"]), 0.8 / len(results)
        rows = np.arange(len(handles))
        for k, r in enumerate(results):
            shares = [100 * r["subjects"][handle]["accuracy"] for handle in handles]
            axes.barh(rows + k * thick, shares, thick, align="edge", label=short_name(r["model"]))
        axes.axvline(floor, color="gray", linestyle="--", label="floor")
        axes.set_yticks(rows + 0.4, handles, fontsize=7)
        axes.set_xlabel("accuracy in %")
        axes.invert_yaxis()
        figure.set_figheight(2 + 0.2 * len(handles))
        figure.legend(loc="outside lower center", ncols=3)
    modeling.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def run_points(results: list[dict]) -> list[tuple]:
    """(step, micro, low, high) of checkpoints whose names differ in their steps alone; or none."""
    runs, points = set(), []
    for r in results:
        end = re.fullmatch(r"(.*(?:step|checkpoint)\D?)(\d+)", short_name(r["model"]))
        if end is None:
            return []
        runs.add(end[1])
        points.append((int(end[2]), r["micro"], *r["interval"]))
    return sorted(points) if len(runs) == 1 < len(points) else []


def report(output: Path | None, results: list[dict], answers: list[list[dict]]) -> None:
    """Print the table; write what goes with it into `output`."""
    # Each checkpoint is compared with the one before it, unless nobody knows what is right.
    comparisons, labelled = [], results[0]["floor"] is not None
    for (r, before), (s, after) in pairwise(zip(results, answers, strict=True)):
        if labelled:
            names = {"first": short_name(r["model"]), "second": short_name(s["model"])}
            comparisons.append(names | compare(before, after))
    print_scores(results, comparisons)
    if output is None:
        return

    # Files of an earlier exam would stand beside this one's as if they were its own.
    for name in ("accuracy.png", "comparison.json", "submission.json"):
        (output / name).unlink(missing_ok=True)
    if comparisons:
        modeling.write_json(output / "comparison.json", {"mcnemar": comparisons})
    if labelled:
        draw_exam(output / "accuracy.png", results)
        return

    # The answers take the form that C-Eval's site takes and scores.
    print("the split has no labels: no accuracy, but a submission.json")
    for r, lines in zip(results, answers, strict=True):
        form = {handle: {} for handle in r["subjects"]}
        for a in lines:
            form[a["subject"]][a["id"]] = a["prediction"] or ""
        folder = output / short_name(r["model"]) if len(results) > 1 else output
        modeling.write_json(folder / "submission.json", form)


def main(c: Config) -> None:
    """`python -m labs.scores`."""
    results, answers, asked = [], [], []
    # An exam of several checkpoints has a folder for each of them.
    for folder in map(Path, c.folders):
        files = sorted([*folder.glob("results.json"), *folder.glob("*/results.json")])
        check(files, f"{folder} holds no results.json of `eval.py exam`")
        for path in files:
            results.append(modeling.read_json(path))
            answers.append([a for _, a in data.read_values(path.with_name("predictions.jsonl"))])
            asked.append([(a["subject"], a["id"]) for a in answers[-1]])

    # Scores on different questions cannot be compared.
    check(asked.count(asked[0]) == len(asked), "the folders are of different exams")
    report(Path(c.output) if c.output else None, results, answers)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "folders")))
