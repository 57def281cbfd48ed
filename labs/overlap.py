"""Say which questions of an exam occur in training files, so that its score can be trusted.

Idea. A question whose words stand in a training row was practised, not answered. Every row is
looked through for all questions at once: an index holds the 5-grams of the questions, and only
questions that share one with the row are compared. With q the words of a question,

    covered(q, row) = share of q's words that lie in a 5-gram of q which the row has too.

"exact": the words stand in the row unbroken. "near": covered >= --near. Questions under 20 words
("which of the following is right?") say too little: without their options they are only "short".

    python -m labs.exam_rows out/demo/exam/val/*.csv --from_exam --output out/demo/leak.jsonl
    python -m labs.overlap out/demo/leak.jsonl --exam out/demo/exam

What you should see: all 320 questions of val are found, and 12 of dev and test whose words stand
among them.

Why it matters. The demo's model was trained for 100 steps on 100 of CMMLU's questions and asked
them again: 100, 99, 100 right with three seeds; trained on other questions 23, 25, 27. C-Eval leaks
by itself: its dev split shares 2 exact and 6 near questions with test and 1 near one with val.

Exercise. A question of 30 words has its 16th changed. How much of it is covered?
    Solution: 29/30. The 5-grams 1-5 to 11-15 and 17-21 to 26-30 are common, and they cover every
    word but the changed one.
"""

import functools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from data import Row, print_table, read_rows
from eval import LETTERS, read_questions
from labs.text import (
    NGRAM,
    Files,
    check_output,
    ngrams,
    parallel,
    texts_of,
    words_of,
    write_rows,
)
from model import check


@dataclass
class Config(Files):
    """Say which questions of an exam occur in training files, so that its score can be trusted."""

    output: str = ""  # .jsonl: the hits, one per line
    exam: str = ""  # folder with the .csv files of C-Eval, CMMLU or MMLU
    near: float = 0.8  # share of a question's words in 5-grams of the row that makes a near hit


# ==== read: the questions that a row holds ========================================================

SHORT = 20  # words: a shorter question alone says too little, its options must be there too


def coverage(part: list[str], words: list[str]) -> float:
    """Share of the words of `part` that lie in an n-gram which `words` has too."""
    n = min(NGRAM, len(part))
    if n == 0:
        return 0.0
    same = np.isin(ngrams(part, n), ngrams(words, n))  # [n-grams of part]
    covering = np.convolve(same, np.ones(n))  # [words of part] common n-grams over each word
    return float((covering > 0).mean())


def find_questions(questions: list[tuple], index: dict, near: float, row: Row) -> list[dict]:
    """The exam questions that one training row holds.

    `questions` are (where, question, its words, [words of each option]); `index` has the numbers of
    the questions with an n-gram.
    """
    # How many 5-grams of each question are here; short questions are shorter n-grams.
    words, hits = words_of("\n".join(texts_of(row))), []
    grams = {gram for n in range(1, NGRAM + 1) for gram in ngrams(words, n).tolist()}
    shared = Counter(k for gram in grams for k in index.get(gram, ()))
    for k, count in shared.items():
        where, question, asked, options = questions[k]
        if count * NGRAM < near * len(asked):  # an n-gram covers NGRAM words at most
            continue

        # Is the question there, and are its options, each counted by its length?
        covered, size = coverage(asked, words), max(sum(map(len, options)), 1)
        others = sum(coverage(option, words) * len(option) for option in options) / size
        exact = f" {' '.join(asked)} " in f" {' '.join(words)} "
        if not exact and covered < near:
            continue
        kind = "exact" if exact else "near"
        if len(asked) < SHORT and others < near:
            kind = "short"
        hits.append({"kind": kind, "exam": where, "row": row.where, "covered": covered,
                     "options_covered": others, "question": question})
    return hits


# ---- skip on a first reading: the command --------------------------------------------------------


def index_exam(paths: list[Path], skip_bad_rows: bool) -> tuple[list[tuple], dict]:
    """(questions, index) of an exam's files, as `find_questions` takes them."""
    questions, index = [], {}
    # From every 5-gram to the questions that hold it.
    for path in paths:
        for q in read_questions(path, ["question", *LETTERS], skip_bad_rows):
            asked = words_of(q["question"])
            for gram in ngrams(asked).tolist():
                index.setdefault(gram, []).append(len(questions))
            options = [words_of(q[letter]) for letter in LETTERS]
            questions.append((q["where"], q["question"], asked, options))
    return questions, index


def find_in_item(find, item: tuple) -> list[dict]:
    """The hits of a (value, row), in one of many processes."""
    return find(item[1]) if item[1] else []


def print_hits(questions: list[tuple], kinds: dict[str, str], rows: int) -> None:
    """One line per folder of the exam, then the verdict; `kinds` has the kind by question."""
    found = Counter((Path(where).parent, kind) for where, kind in kinds.items())
    table = [("exam", "questions", "exact", "near", "short")]
    for folder, count in Counter(Path(where).parent for where, *_ in questions).items():
        numbers = [found[folder, kind] for kind in ("exact", "near", "short")]
        table.append((folder, count, *numbers))
    print_table(table)

    bad = sum(kind != "short" for kind in kinds.values())
    verdict = f"CONTAMINATED: {bad} questions" if bad else "clean"
    print(f"{rows} rows read, {verdict}; {len(kinds) - bad} short ones stand without options")


def main(c: Config) -> None:
    """Read the exam into an index, then the files on all cores."""
    paths = sorted(Path(c.exam).rglob("*.csv")) if c.exam else []
    check(paths, f"--exam needs a folder with .csv files, found {c.exam!r}")
    check(0 < c.near <= 1, f"--near must be above 0 and at most 1, not {c.near}")
    if c.output:
        check_output(c.output, *c.files)

    # The index goes to each process once; the rows stream through them.
    questions, index = index_exam(paths, c.skip_bad_rows)
    find = functools.partial(find_questions, questions, index, c.near)
    rows = read_rows(c.files, c.skip_bad_rows)
    found = list(parallel(functools.partial(find_in_item, find), rows))
    hits = [hit for of_row in found for hit in of_row]
    if c.output:
        write_rows(c.output, ((hit, "") for hit in hits))

    # A question may stand in several rows: its worst kind counts.
    kinds = {}
    for kind in ("short", "near", "exact"):
        kinds |= {hit["exam"]: kind for hit in hits if hit["kind"] == kind}
    print_hits(questions, kinds, len(found))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
