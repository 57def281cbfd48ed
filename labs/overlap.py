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

Why it matters. The demo's untrained model learns half of the questions of val by heart, and --clean
tells its score apart (five seeds; standard deviations 1 point and 2):

    V=out/demo/exam/val
    python -m labs.exam_rows $V/chemical_elements_val.csv $V/literature_val.csv --from_exam \\
        --style answer_only --output out/demo/half.jsonl
    python train_sft.py --model out/demo/base --data out/demo/half.jsonl --output_dir out/leak \\
        --steps 150 --learning_rate 2e-3 --warmup 20
    python eval.py exam --model out/leak --data out/demo/exam --split val --protocol steel \\
        --output_dir out/leak/exam
    python -m labs.overlap out/demo/half.jsonl --exam out/demo/exam --clean out/leak/exam

    clean        160 questions   21% right: guessing
    the rest     160             89%
    all          320             55%, which is what one would have reported

C-Eval leaks by itself: its dev split shares 2 exact and 6 near questions with test and 1 near one
with val.

Exercise. A question of 30 words has its 16th changed. How much of it is covered?
    Solution: 29/30. The 5-grams 1-5 to 11-15 and 17-21 to 26-30 are common, and they cover every
    word but the changed one.
"""

import functools
import itertools
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
from data import Row, print_table, read_rows, read_values
from eval import LETTERS, read_questions, wilson
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
from model import check, read_json


@dataclass
class Config(Files):
    """Say which questions of an exam occur in training files, so that its score can be trusted."""

    output: str = ""  # .jsonl: the hits, one per line
    clean: list[str] = field(default_factory=list)  # folders of eval.py exam: scores without hits
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

    `questions` are (where, question, its words, [words of each option], id); `index` has the
    numbers of the questions with an n-gram.
    """
    # How many 5-grams of each question are here; short questions are shorter n-grams.
    words, hits = words_of("\n".join(texts_of(row))), []
    grams, shared = set(), Counter()
    for n in range(1, NGRAM + 1):
        grams.update(ngrams(words, n).tolist())
    for gram in grams:
        shared.update(index.get(gram, ()))

    # Few are left to be compared word by word.
    for k, count in shared.items():
        where, question, asked, options, _ = questions[k]
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
            questions.append((q["where"], q["question"], asked, options, q["id"]))
    return questions, index


def find_in_item(find, item: tuple) -> list[dict]:
    """The hits of a (value, row), in one of many processes."""
    return find(item[1]) if item[1] else []


def print_hits(questions: list[tuple], kinds: dict[str, str], rows: int) -> None:
    """One line per folder of the exam, then the verdict; `kinds` has the kind by question."""
    found = Counter((Path(where).parent, kind) for where, kind in kinds.items())
    table = [("exam", "questions", "exact", "near", "short")]
    for folder, count in Counter(Path(where).parent for where, *_ in questions).items():
        table.append((folder, count, found[folder, "exact"], found[folder, "near"],
                      found[folder, "short"]))
    print_table(table)

    bad = sum(kind != "short" for kind in kinds.values())
    verdict = f"CONTAMINATED: {bad} questions" if bad else "clean"
    print(f"{rows} rows read, {verdict}; {len(kinds) - bad} short ones stand without options")


def read_answers(folder: str, questions: list[tuple]) -> list[tuple[str, bool]]:
    """(question's place in the exam, whether it was answered rightly) of a checkpoint's answers."""
    # predictions.jsonl names a question by subject and id; the exam's file adds the split.
    result = read_json(Path(folder) / "results.json")
    check(result.get("correct") is not None, f"{folder}: an exam without labels has no accuracy")
    check("split" in result, f"{folder}: results.json names no split; `eval.py exam` writes it")
    names = {}
    for where, _, _, _, number in questions:
        file = Path(where.rpartition(" row ")[0])
        if file.parent.name == result["split"]:
            names[file.stem.removesuffix(f"_{result['split']}"), number] = where

    answers = []
    for at, line in read_values(Path(folder) / "predictions.jsonl"):
        known = isinstance(line, dict) and {"subject", "id", "prediction", "answer"} <= line.keys()
        check(known, f"{at}: expected a line as `eval.py exam` writes them")
        name = str(line["subject"]), str(line["id"])
        check(name in names, f"{at}: {name} is no question of --exam; give the exam it answered")
        answers.append((names[name], line["prediction"] == line["answer"]))
    return answers


def score_apart(folder: str, answered: list[tuple], kinds: dict[str, str]) -> list[tuple]:
    """Rows of a table: a checkpoint's score on the questions without a hit, and on the rest."""
    # Short ones count with the clean: without its options such a question says little.
    right = {"clean": [], "the rest": []}
    for where, is_right in answered:
        found = kinds.get(where, "short") != "short"
        right["the rest" if found else "clean"].append(is_right)
    right["all"] = right["clean"] + right["the rest"]

    rows = []
    for part, answers in right.items():
        interval = "-"
        if answers:
            interval = " - ".join(f"{x:.0%}" for x in wilson(sum(answers), len(answers)))
        share = sum(answers) / len(answers) if answers else "-"
        rows.append((f"{folder}, {part}", len(answers), sum(answers), share, interval))
    return rows


def main(c: Config) -> None:
    """Read the exam into an index, then the files on all cores."""
    paths = sorted(Path(c.exam).rglob("*.csv")) if c.exam else []
    check(paths, f"--exam needs a folder with .csv files, found {c.exam!r}")
    check(0 < c.near <= 1, f"--near must be above 0 and at most 1, not {c.near}")
    if c.output:
        check_output(c.output, *c.files)
    for folder in c.clean:
        check((Path(folder) / "results.json").is_file(), f"--clean {folder} has no results.json; "
              "give what --output_dir of eval.py exam names")

    # A wrong folder shall not end the command after all rows were read.
    questions, index = index_exam(paths, c.skip_bad_rows)
    answers = {folder: read_answers(folder, questions) for folder in c.clean}

    # The index goes to each process once; the rows stream through them.
    find = functools.partial(find_questions, questions, index, c.near)
    rows = read_rows(c.files, c.skip_bad_rows)
    found = list(parallel(functools.partial(find_in_item, find), rows))
    hits = list(itertools.chain.from_iterable(found))
    if c.output:
        write_rows(c.output, ((hit, "") for hit in hits))

    # A question may stand in several rows: its worst kind counts, which is set last.
    kinds = {}
    for kind in ("short", "near", "exact"):
        for hit in hits:
            if hit["kind"] == kind:
                kinds[hit["exam"]] = kind
    print_hits(questions, kinds, len(found))

    # The same answers twice, with and without the questions that were practised.
    if c.clean:
        table = [("answers of", "questions", "right", "accuracy", "95% interval")]
        for folder, answered in answers.items():
            table += score_apart(folder, answered, kinds)
        print_table(table)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
