"""Say what a file of training data holds before you train on it.

Idea. Most of what goes wrong with data shows in a few numbers: how many rows are copies, how many
answers are empty or repeat themselves, which language the words are in, and how long an example is
in the model's own tokens (what lies above --max_length is cut). Nothing is judged here:
`labs.filter` drops what one does not like.

    repetition = 1 - different 5-grams of an answer / all of them

    python -m labs.stats out/demo/instructions.jsonl --model out/demo/base

What you should see: 8 of the 300 rows are exact duplicates, 98.8% of the words are Chinese, no
answer repeats itself, half of the rows have at most 52 tokens and the longest 104.

Exercise. A broken model answers with one character, 100 times. What is the answer's repetition?
    Solution: 96 5-grams, all alike: 1 - 1/96 = 99%.
"""

import functools
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from data import ChatTokenizer, read_rows
from labs.text import (
    HAN,
    NGRAM,
    Files,
    hash64,
    parallel,
    repetition,
    texts_of,
    word_share,
    words_of,
)
from model import check


@dataclass
class Config(Files):
    """Say what a file holds: duplicates, answers, languages, repetition, lengths."""

    model: str = ""  # checkpoint whose tokenizer and template to use; empty: bytes and ChatML
    template: str = ""  # chatml, plain, a name of labs/templates, a .jinja file; empty: its own
    max_length: int = 2048  # tokens per example; longer ones are cut


# ==== read: what a row holds ======================================================================


def row_facts(tokenize, item: tuple) -> tuple:
    """(hash, tokens of each example, counters) of a (value, row)."""
    row, counts = item[1], Counter()
    if row is None:
        return None, [], Counter({"dropped: bad row": 1})
    # Lengths in tokens as a trainer sees them, all else in words.
    sizes = [len(e.ids) for e in tokenize([row], 0, counts)]
    words, answers = words_of("\n".join(texts_of(row))), texts_of(row, "assistant")
    counts.update(rows=1, answers=len(answers), empty=sum(not a.strip() for a in answers),
                  words=len(words), han=len(words) * word_share(HAN, words),
                  repeated=sum(map(repetition, answers)))
    return hash64(repr(row[1:])), sizes, counts


def print_facts(counts: Counter, distinct: int, most: int, lengths: np.ndarray) -> None:
    """What a person wants to know of some rows, with at most `most` answers in one of them."""
    names = ("rows", "answers", "empty", "words", "han", "repeated")
    rows, answers, empty, words, han, repeated = map(counts.pop, names)
    print(f"{rows} rows, {rows - distinct} of them exact duplicates\n"
          f"{answers / rows:.2f} answers per row, at most {most}; {empty} are empty\n"
          f"Chinese characters: {han / max(words, 1):.1%} of the words\n"
          f"repetition: {repeated / max(answers, 1):.1%} of an answer's {NGRAM}-grams\n"
          "tokens of an example, by percentiles:\n ",
          *(f"{p}%: {np.percentile(lengths, p):.0f} " for p in (5, 25, 50, 75, 95, 100)))

    # A histogram whose bars double in width: lengths spread over two orders of magnitude.
    for k, count in sorted(Counter(np.log2(lengths).astype(int).tolist()).items()):
        bar = "#" * round(50 * count / len(lengths))
        print(f"{2**k:>8} to {2 ** (k + 1) - 1:<8}{bar} {count}")
    for reason, count in (+counts).items():
        print(f"{reason}: {count}")


def main(c: Config) -> None:
    """Read the files on all cores; a few numbers per row stay in memory."""
    with tempfile.TemporaryDirectory() as folder:
        if not c.model:
            data.byte_tokenizer(Path(folder))
            print("no --model: tokens are bytes, the template is ChatML")
        tokenizer = ChatTokenizer(c.model or folder, c.template)
    tokenize = functools.partial(data.to_examples, tokenizer=tokenizer, max_length=c.max_length,
                                 keep_all=True)

    hashes, most, lengths, counts = set(), 0, [], Counter()
    rows = read_rows(c.files, c.skip_bad_rows)
    for hashed, sizes, found in parallel(functools.partial(row_facts, tokenize), rows):
        hashes.add(hashed)
        most = max(most, found["answers"])
        lengths += sizes
        counts.update(found)
    check(lengths, f"{', '.join(c.files)}: no row to read")
    print_facts(counts, len(hashes - {None}), most, np.array(lengths))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
