"""Words, n-grams and MinHash: how the labs compare texts; and what else they share.

Idea. A text counts as the set of its 5-grams of words. Two texts are alike as far as these sets
overlap (Jaccard): J(A, B) = |A and B| / |A or B|. MinHash (Broder, 1997; for training data
arXiv:2107.06499, section 4.2) hashes all n-grams and keeps the least hash: that of A equals that of
B with probability J. Under 64 hash functions a text leaves 64 numbers, its *signature*. The share
in which two signatures agree estimates J, with a standard error of sqrt(J (1 - J) / 64).

    python -m labs.text out/demo/instructions.jsonl --model out/demo/base

What you should see: 8 of the 300 rows are exact duplicates, 98.8% of the words are Chinese, no
answer repeats itself, half of the rows have at most 52 tokens and the longest 104.

Exercise. One word of a text of 100 words is changed. What is J? (A 5-gram holds five words.)
    Solution: of 96 5-grams 5 change, so J = 91 / 101 = 0.90.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

import data
import eval as evaluation
from data import ChatTokenizer, Example, Row, read_rows, read_values
from model import check, write_lines

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
class Config(Files):
    """Say what a file holds: duplicates, answers, languages, repetition, lengths."""

    model: str = ""  # checkpoint whose tokenizer and template to use; empty: bytes and ChatML
    template: str = ""  # chatml, plain, a name of labs/templates, a .jinja file; empty: its own
    max_length: int = 2048  # tokens per example; longer ones are cut, by ifd dropped


@dataclass
class Modelled(Config):
    """The flags of a lab that may run a model over the rows."""

    model: str = ""  # checkpoint that scores or embeds the rows, or counts their tokens
    output: str = ""  # .jsonl to write
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the model's weights
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out


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


# ==== read: what a file holds =====================================================================


def texts_of(row: Row, role: str = "") -> list[str]:
    """The contents of a row's messages, or of `role` alone; raw text counts as an answer."""
    if row.text is not None:
        return [row.text]
    messages = [*row.messages, *(row.chosen or []), *(row.rejected or [])]
    return [m["content"] for m in messages if role in ("", m["role"])]


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
          "tokens of an example, by percentiles:",
          *(f"{p}%: {np.percentile(lengths, p):.0f} " for p in (1, 5, 25, 50, 75, 95, 99, 100)))

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


# ---- skip on a first reading: many processes -----------------------------------------------------

job = None  # in a process of `parallel`: the function that it runs on every item


def start_process(function) -> None:
    """Keep the function: sent once per process, it need not travel with every item."""
    global job
    job = function


def run_job(item):
    """job(item): a name that every process can find."""
    return job(item)


def parallel(function, items: Iterable) -> Iterator:
    """function(item) of every item in order, on all cores, few items in memory at a time."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(initializer=start_process, initargs=(function,)) as pool:
        results = pool.imap(run_job, items, chunksize=64)
        yield from tqdm(results, unit=" rows", disable=not sys.stderr.isatty())


# ---- skip on a first reading: rows in, rows out --------------------------------------------------


def check_output(path: str, *inputs: str, name: str = "output") -> None:
    """Raise InputError unless `path`, the value of flag `name`, can be written and is no input."""
    # Tried now: an hour of a model's work must not end in a folder that cannot be written.
    output = Path(path)
    check(output.suffix == ".jsonl" and not output.is_dir(),
          f"--{name} must be given as FILE.jsonl, not {path!r}")
    own = output.resolve() in [Path(file).resolve() for file in inputs]
    check(not own, f"--{name} {output} would overwrite what is read")
    folder = next(folder for folder in output.parents if folder.exists())
    check(folder.is_dir() and os.access(folder, os.W_OK), f"--{name} {output} cannot be written")


def write_rows(path: str, rows: Iterable[tuple[object, str]]) -> None:
    """Write the values of (value, reason) that have no reason; print what was kept and dropped."""
    counts = Counter()

    def lines() -> Iterator[str]:
        for value, reason in rows:
            counts[reason] += 1
            if not reason:
                yield json.dumps(value, ensure_ascii=False) + "\n"

    write_lines(Path(path), lines())
    kept = counts.pop("", 0)
    print(f"{path}: kept {kept} of {kept + counts.total()} rows")
    for reason, count in counts.most_common():
        print(f"  dropped {count}: {reason}")


def kept_rows(c: Modelled, reasons: list[str], change=None) -> Iterator[tuple[object, str]]:
    """(row, reason) of all rows, those without a reason changed; reads the files again."""
    again = read_rows(c.files, parse=lambda where, value: None)
    for (value, _), reason in zip(again, reasons, strict=True):
        yield change(value) if change and not reason else value, reason


def rewrite(c, convert, read=read_values) -> None:
    """Write what convert(where, value) makes of every row: a list of (new value, reason)."""
    check_output(c.output, *c.files)
    rows = read_rows(c.files, c.skip_bad_rows, parse=convert, read=read)
    write_rows(c.output, (pair for _, new in rows for pair in new or [(None, "bad row")]))


# ---- skip on a first reading: rows for a model ---------------------------------------------------


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


# ---- skip on a first reading: prompts and rewards ------------------------------------------------


class Prompt(NamedTuple):
    """A question, up to where its answer begins, and the answer that its row has."""

    ids: list[int]
    messages: list[dict]
    reference: str
    source: int  # index of its file
    where: str  # file and line
    key: str  # what makes two prompts copies of each other
    targets: int = 1  # the mixer counts tokens


def load_prompts(files: list[str], tokenizer: ChatTokenizer, c, quiet: bool,
                 room: int) -> tuple[list[Prompt], Counter]:
    """(what the rows of some files ask, none dropped), with `room` tokens left for an answer."""
    prompts, parse = [], functools.partial(data.parse_row, ask=True)
    for source, path in enumerate(files):
        for _, row in read_rows([path], c.skip_bad_rows, quiet, parse):
            if row:
                check(row.text is None, f"{row.where}: raw text asks nothing")
                _, messages, reference, _ = evaluation.ask_row(row, tokenizer, "")
                ids = tokenizer.prompt_ids(messages)
                check(len(ids) + room <= c.max_length, f"{row.where}: {len(ids)} tokens leave no "
                      f"room for an answer of {room} in --max_length {c.max_length}")
                prompts.append(Prompt(ids, messages, reference or "", source, row.where, str(ids)))
    return prompts, Counter()


def match(messages: list[dict], answer: str, reference: str) -> float:
    """1 if the answer is the reference, outer white space aside; else 0."""
    return float(answer.strip() == reference.strip())


def exam(messages: list[dict], answer: str, reference: str) -> float:
    """1 if the answer, in words or alone, gives the reference's letter; else 0."""
    extract = evaluation.lab("exams", "--reward exam").extract
    letter = extract(answer)
    return float(letter is not None and letter == extract(reference))


def find_reward(name: str) -> Callable[[list[dict], str, str], float]:
    """reward(messages, answer, reference) called match or exam, or a FILE.py:function."""
    if name in ("exam", "match"):
        return {"exam": exam, "match": match}[name]
    path, _, function = name.rpartition(":")
    check(path.endswith(".py") and Path(path).is_file(),
          f"--reward: expected exam, match or FILE.py:function, found {name!r}")
    found = runpy.run_path(path)
    check(callable(found.get(function)), f"--reward: {path} has no function {function!r}")
    return found[function]


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
