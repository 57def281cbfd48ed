"""Words, n-grams, MinHash and ROUGE-L: how the labs compare texts; and what else they share.

Two texts are alike as sets. A text counts as the set of its 5-grams of words, and two texts are
alike as far as these sets overlap (Jaccard): J(A, B) = |A and B| / |A or B|. MinHash (Broder, 1997;
for training data arXiv:2107.06499, section 4.2) hashes all n-grams and keeps the least hash: that
of A equals that of B with probability J. Under 64 hash functions a text leaves 64 numbers, its
*signature*. The share in which two signatures agree estimates J, with a standard error of
sqrt(J (1 - J) / 64). `labs.filter` drops near duplicates by it.

Two texts are alike as sequences. The longest common subsequence (LCS) is the most words that both
have in the same order, gaps allowed. ROUGE-L (Lin, 2004) is the F-measure of its shares in both
texts, of m and n words: F = 2 P R / (P + R) with P = LCS / m, R = LCS / n; that is 2 LCS / (m + n).
Self-Instruct (arXiv:2212.10560) keeps an instruction under 0.7 to all it has kept: `labs.evolve`.

Exercise. One word of a text of 100 words is changed. What are J and ROUGE-L?
    Solution: of 96 5-grams 5 hold it: J = 91 / 101 = 0.90. LCS = 99: ROUGE-L = 198 / 200 = 0.99.
"""

import functools
import hashlib
import json
import multiprocessing
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import data
import model as modeling
from data import ChatTokenizer, Example, Row, read_rows, read_values
from model import check

# ==== read: words and n-grams =====================================================================

HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
KANA = "\u3040-\u30ff"  # Japanese ones
WORDS = re.compile(rf"[{HAN}{KANA}]|[^\W_{HAN}{KANA}]+|[-+*/=<>^%×÷√≤≥≠]")
MAIN, OTHER = 0.5, 0.05  # least and most share of the words in the main and in another script
NGRAM = 5  # words


def words_of(text: str) -> list[str]:
    """Words in lower case and NFKC; a CJK character is a word, so is + or =; no punctuation."""
    return WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def word_share(characters: str, words: list[str]) -> float:
    """Share of the words that begin with one of some characters, given as in a regex's [ ]."""
    begins = re.compile(f"[{characters}]")
    return sum(begins.match(word) is not None for word in words) / max(len(words), 1)


def language_of(words: list[str]) -> str:
    """zh, en, or nothing: the script of most words, if few words are in another one."""
    if word_share(HAN, words) >= MAIN and word_share(KANA, words) <= OTHER:
        return "zh"
    if word_share("a-z", words) >= MAIN and word_share(HAN + KANA, words) <= OTHER:
        return "en"
    return ""


def hash64(text: str) -> int:
    """A 64-bit hash that is the same in every process (Python's own is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


word_hash = functools.lru_cache(2**18)(hash64)  # words come again and again


def ngrams(words: list[str], n: int = NGRAM) -> np.ndarray:
    """Hashes sum_j w_j B^(n-1-j) mod 2^64 of all n-grams in order; a shorter text is one n-gram."""
    # A polynomial in B, so that the order of the words counts; Horner's rule for all n-grams.
    hashes = np.fromiter(map(word_hash, words), np.uint64, len(words))
    n = min(n, len(hashes))
    out = np.zeros(len(hashes) - n + 1 if n else 0, np.uint64)
    for j in range(n):
        out = out * np.uint64(0x9E3779B97F4A7C15) + hashes[j : j + len(out)]
    return out


def repetition(text: str) -> float:
    """Share of the n-grams of a text that stood in it before."""
    grams = ngrams(words_of(text))
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


# ==== read: MinHash ===============================================================================

MINHASHES = 64  # numbers in a signature


def signature(words: list[str]) -> np.ndarray:
    """MinHash: the least n-gram under each of many hash functions [MINHASHES] uint32.

    Two texts agree in each number with probability |A and B| / |A or B|, A and B their n-grams.
    """
    # Multiplying by a random odd number mod 2^64 is a hash function; its upper half is the best.
    factors = np.random.default_rng(0).integers(2**63, size=MINHASHES, dtype=np.uint64) * 2 + 1
    hashes = ngrams(words)[:, None] * factors >> 32  # [n-grams, MINHASHES]
    return hashes.min(0, initial=2**32 - 1).astype(np.uint32)


# ==== read: ROUGE-L ===============================================================================


def rouge_l(words: list[str], others: Iterable[list[str]]) -> Iterator[float]:
    """ROUGE-L's F-measure 2 LCS / (m + n) of a text of m words with each of some others."""
    # Where each word stands in the text, as the bits of a number.
    places, every = {}, (1 << len(words)) - 1
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i

    # A row of the table of dynamic programming grows by 0 or 1 from cell to cell. It is one number
    # too, with a 0 where it grows; an addition makes the next row (Crochemore et al., 2001).
    for other in others:
        row = every
        for word in other:
            common = row & places.get(word, 0)
            row = (row + common | row - common) & every
        yield 2 * (every ^ row).bit_count() / max(len(words) + len(other), 1)


# ==== read: rows as texts and as examples =========================================================


def texts_of(row: Row, role: str = "") -> list[str]:
    """The contents of a row's messages, or of `role` alone; raw text counts as an answer."""
    if row.text is not None:
        return [row.text]
    messages = [*row.messages, *(row.chosen or []), *(row.rejected or [])]
    return [m["content"] for m in messages if role in ("", m["role"])]


def example_of(row: Row, tokenizer: ChatTokenizer, part: str = "all",
               max_length: int = sys.maxsize) -> Example:
    """A row as one example, cut to --max_length; of a pair its chosen side.

    `part` says what is supervised: all answers, the last one, or the last one without its question.
    """
    # A question is all that stands before the last answer.
    messages = row.messages + (row.chosen or [])
    if part == "alone":
        messages = messages[-1:]
    talk = row._replace(messages=messages, chosen=None, rejected=None)
    train_on = "all" if part == "all" else "last"
    found = data.to_examples([talk], 0, Counter(), tokenizer, train_on, max_length, keep_all=True)
    return found[-1]  # the last holds the whole conversation


# ---- skip on a first reading: flags, rows in, rows out -------------------------------------------

LEAST = {"max_length": 2, "micro_tokens": 1, "clusters": 1, "seed": 0}  # of flags by these names


@dataclass
class Files:
    """The flags of every lab that reads rows."""

    files: list[str]  # files of any format, preference pairs included
    skip_bad_rows: bool = False  # count and list rows that cannot be read instead of stopping

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name, least)
            check(value >= least, f"--{name} must be at least {least}, not {value}")


@dataclass
class Modelled(Files):
    """The flags of a lab that may run a model over the rows."""

    model: str = ""  # checkpoint that scores or embeds the rows, or counts their tokens
    template: str = ""  # chatml, plain, a name of labs/templates, a .jinja file; empty: its own
    max_length: int = 2048  # tokens per example; longer ones are cut, by ifd dropped
    output: str = ""  # .jsonl to write
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the model's weights
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out


def check_output(path: str, *inputs: str, name: str = "output") -> None:
    """Raise InputError unless `path`, the value of flag `name`, can be written and is no input."""
    # Tried now: an hour of a model's work must not end in a folder that cannot be written.
    check(path.endswith(".jsonl"), f"--{name} must be given as FILE.jsonl, not {path!r}")
    modeling.check_output(f"--{name}", path, inputs)


def write_rows(path: str | Path, rows: Iterable[tuple[object, str]]) -> None:
    """Write the values of (value, reason) that have no reason; print what was kept and dropped."""
    counts = Counter()

    def lines() -> Iterator[str]:
        for value, reason in rows:
            counts[reason] += 1
            if not reason:
                yield json.dumps(value, ensure_ascii=False) + "\n"

    modeling.write_lines(Path(path), lines())
    kept = counts.pop("", 0)
    print(f"{path}: kept {kept} of {kept + counts.total()} rows")
    for reason, count in counts.most_common():
        print(f"  dropped {count}: {reason}")


def kept_rows(c: Modelled, reasons: list[str], change=None) -> Iterator[tuple[object, str]]:
    """(row, reason) of all rows, those without a reason changed; reads the files again."""
    again = read_rows(c.files, parse=lambda where, value: None)
    for (value, _), reason in zip(again, reasons, strict=True):
        yield change(value) if change and not reason else value, reason


def drop_alike(c, reasons: list[str]) -> None:
    """Give a reason to rows whose questions are too like a kept row's: ROUGE-L of --max_rouge."""
    kept = []
    again = read_rows(c.files, c.skip_bad_rows, quiet=True) if c.max_rouge < 1 else []
    for i, (_, row) in enumerate(again):
        if not reasons[i]:
            words = words_of("\n".join(texts_of(row, "user") or texts_of(row)))
            if any(score >= c.max_rouge for score in rouge_l(words, kept)):
                reasons[i] = f"ROUGE-L of {c.max_rouge} or more"
            else:
                kept.append(words)


def rewrite(c, convert, read=read_values) -> None:
    """Write what convert(where, value) makes of every row: a list of (new value, reason)."""
    check_output(c.output, *c.files)
    rows = read_rows(c.files, c.skip_bad_rows, parse=convert, read=read)
    write_rows(c.output, (pair for _, new in rows for pair in new or [(None, "bad row")]))


def parallel(function, items: Iterable) -> Iterator:
    """function(item) of every item in order, on all cores, few items in memory at a time."""
    # Every process gets the function once, when it starts: it need not travel with each item.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(initializer=setattr, initargs=(run_job, "function", function)) as pool:
        results = pool.imap(run_job, items, chunksize=64)
        yield from tqdm(results, unit=" rows", ncols=76, disable=not sys.stderr.isatty())


def run_job(item):
    """function(item) of `parallel`: a name that every process can find."""
    return run_job.function(item)


if __name__ == "__main__":
    print(__doc__)
