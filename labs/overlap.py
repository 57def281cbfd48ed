"""Say which questions of an exam occur in training files, so that its score can be trusted.

    python -m labs.overlap FILE... --exam DIR
"""

import functools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import data
from data import print_table, read_rows
from eval import read_csv
from labs.text import (
    NGRAM,
    Files,
    check_output,
    coverage,
    ngrams,
    parallel,
    parse_question,
    texts_of,
    words_of,
    write_rows,
)
from model import check


@dataclass
class Config(Files):
    """Say which questions of an exam occur in training files, so that its score can be trusted."""

    output: str = ""  # .jsonl: the hits, one a line
    exam: str = ""  # folder with the .csv files of C-Eval, CMMLU or MMLU
    near: float = 0.8  # share of a question's words in 5-grams of the row that makes a near hit


SHORT = 20  # words: a shorter question alone says too little, its options must be there too


def find_questions(questions: list[tuple], index: dict, near: float, item: tuple) -> list[dict]:
    """The exam questions that one training row holds; `index` has the questions of every n-gram.

    "exact": the words of the question stand in the row unbroken. "near": its `coverage` reaches
    `near`. A question under SHORT words whose options are not covered so far is only "short".
    """
    row, hits = item[1], []
    words = words_of("\n".join(texts_of(row))) if row else []
    grams = {gram for n in range(1, NGRAM + 1) for gram in ngrams(words, n).tolist()}
    shared = Counter(k for gram in grams for k in index.get(gram, ()))
    for k, count in shared.items():
        q, text, options = questions[k]
        if count * NGRAM < near * len(text):  # an n-gram covers NGRAM words at most
            continue
        covered, size = coverage(text, words), max(sum(map(len, options)), 1)
        others = sum(coverage(o, words) * len(o) for o in options) / size
        exact = f" {' '.join(text)} " in f" {' '.join(words)} "
        if exact or covered >= near:
            kind = "short" if len(text) < SHORT and others < near else "exact" if exact else "near"
            hits.append({"kind": kind, "exam": q["where"], "row": row.where, "covered": covered,
                         "options_covered": others, "question": q["question"]})
    return hits


def main(c: Config) -> None:
    """`data.py overlap`."""
    paths = sorted(Path(c.exam).rglob("*.csv")) if c.exam else []
    check(paths, f"--exam needs a folder with .csv files, found {c.exam!r}")
    check(0 < c.near <= 1, f"--near must be above 0 and at most 1, not {c.near}")
    if c.output:
        check_output(c)
    questions, index = [], {}
    for q in (parse_question(*row) for path in paths for row in read_csv(path)):
        questions.append((q, words_of(q["question"]), list(map(words_of, q["options"].values()))))
        for gram in ngrams(questions[-1][1]).tolist():
            index.setdefault(gram, []).append(len(questions) - 1)
    job = functools.partial(find_questions, questions, index, c.near)
    rows = list(parallel(job, read_rows(c.files, c.skip_bad_rows)))
    hits = [hit for row in rows for hit in row]
    if c.output:
        write_rows(c.output, ((hit, "") for hit in hits))
    hits.sort(key=lambda hit: hit["kind"], reverse=True)  # by alphabet: short, near, exact
    kinds = {hit["exam"]: hit["kind"] for hit in hits}  # the last of a question stays
    found = Counter((Path(where).parent, kind) for where, kind in kinds.items())
    table = [("exam", "questions", "exact", "near", "short")]
    for folder, count in Counter(Path(q["where"]).parent for q, _, _ in questions).items():
        table.append((folder, count, *(found[folder, kind] for kind in table[0][2:])))
    print_table(table)
    bad = sum(kind != "short" for kind in kinds.values())
    found = f"CONTAMINATED: {bad} questions" if bad else "clean"
    print(f"{len(rows)} rows read, {found}; {len(kinds) - bad} short ones stand without options")


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
