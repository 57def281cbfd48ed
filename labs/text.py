"""Words, n-grams and MinHash, and what the labs that read and write rows share.

    python -m labs.text FILE... --model DIR    # duplicates, languages, repetition, lengths
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as modeling
from data import (
    ChatTokenizer,
    Example,
    Row,
    collate,
    fit,
    is_text,
    micro_batches,
    read_rows,
    read_values,
)
from model import check, write_lines

# -------------------------------------------------------------------------------- words and n-grams

HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
KANA = "\u3040-\u30ff"  # Japanese ones
WORDS = re.compile(rf"[{HAN}{KANA}]|[^\W_{HAN}{KANA}]+|[-+*/=<>^%×÷√≤≥≠]")
NGRAM = 5  # words, as in the search for near-duplicates of arXiv:2107.06499, section 4.2
MINHASHES, BAND = 64, 4  # numbers in a signature; how many of them a bucket needs alike


def words_of(text: str) -> list[str]:
    """Words in lower case and NFKC; a CJK character is a word, so is + or =; no punctuation."""
    return WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def hash64(text: str) -> int:
    """A hash that is alike in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


word_hash = functools.lru_cache(2**18)(hash64)


def ngrams(words: list[str], n: int = NGRAM) -> np.ndarray:
    """Hashes sum_j w_j B^(n-1-j) mod 2^64 of all n-grams in order; a shorter text is one n-gram."""
    keys = np.fromiter(map(word_hash, words), np.uint64, len(words))
    n = min(n, len(keys))
    out = np.zeros(len(keys) - n + 1 if n else 0, np.uint64)
    for j in range(n):
        out = out * np.uint64(0x9E3779B97F4A7C15) + keys[j : j + len(out)]
    return out


def repetition(text: str) -> float:
    """Share of the n-grams of a text that stood in it before."""
    grams = ngrams(words_of(text))
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def coverage(part: list[str], words: list[str]) -> float:
    """Share of the words of `part` that lie in an n-gram which `words` has too."""
    n = min(NGRAM, len(part))
    same = np.isin(ngrams(part, n), ngrams(words, n))
    return float((np.convolve(same, np.ones(n)) > 0).mean()) if n else 0.0


def signature(words: list[str]) -> np.ndarray:
    """MinHash (Broder, 1997): the least of the n-grams under many hashes [MINHASHES] uint32.

    Two texts agree in each number with probability |A and B| / |A or B|, A and B their n-grams.
    """
    factors = np.random.default_rng(0).integers(2**63, size=MINHASHES, dtype=np.uint64) * 2 + 1
    hashes = ngrams(words)[:, None] * factors >> 32  # [n-grams, MINHASHES]
    return hashes.min(0, initial=2**32 - 1).astype(np.uint32)


def near_duplicates(signatures: np.ndarray, near: float) -> np.ndarray:
    """True for rows [R] that agree with an earlier one in `near` of the signature [R, MINHASHES].

    A row is compared with the first and the latest earlier row of its buckets: those alike in BAND
    neighbouring numbers. At similarity s a pair shares no bucket with probability
    (1 - s^BAND)^(MINHASHES / BAND), 0.0002 at 0.8.
    """
    duplicate = np.zeros(len(signatures), dtype=bool)
    for place in range(0, MINHASHES, BAND):
        _, bucket = np.unique(signatures[:, place : place + BAND], axis=0, return_inverse=True)
        order = np.argsort(bucket.ravel(), kind="stable")
        bucket = bucket.ravel()[order]
        later = np.flatnonzero(bucket[1:] == bucket[:-1]) + 1  # all of a bucket but its first row
        for earlier in (np.searchsorted(bucket, bucket[later]), later - 1):
            a, b = signatures[order[earlier]], signatures[order[later]]  # [pairs, MINHASHES]
            duplicate[order[later]] |= (a == b).mean(1) >= near
    return duplicate


def run_job(item):
    """The function of `parallel`, in one of its processes."""
    return run_job.function(item)


def parallel(function, items: Iterable) -> Iterator:
    """function(item) of every item in order, on all cores, few items in memory at a time."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(initializer=setattr, initargs=(run_job, "function", function)) as pool:
        yield from tqdm(pool.imap(run_job, items, chunksize=64), unit=" rows",
                        disable=not sys.stderr.isatty())


# ----------------------------------------------------------------------------------------- commands

LEAST = {"max_length": 2, "micro_tokens": 1, "batch_size": 1, "clusters": 1, "rows": 0, "cap": 0,
         "steps": 0, "seed": 0}  # what these flags of the commands must be at least


@dataclass
class Files:
    """What every command takes."""

    files: list[str]  # files of any format, preference pairs included
    skip_bad_rows: bool = False  # count and list rows that cannot be read instead of stopping

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name, least)
            check(value >= least, f"--{name} must be at least {least}, not {value}")


@dataclass
class Modelled(Files):
    """What a command takes that may run a model over the rows."""

    output: str = ""  # .jsonl to write
    model: str = ""  # checkpoint that scores or embeds the rows, or counts their tokens
    template: str = ""  # chatml, llama2, llama3, mistral, deepseek, plain; empty: recognised
    max_length: int = 2048  # tokens of a row the model sees; longer ones are cut, by ifd dropped
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out


def check_output(c) -> None:
    """Raise InputError unless --output can be written."""
    output = Path(c.output)
    check(output.suffix == ".jsonl" and not output.is_dir(),
         f"--output must be given as FILE.jsonl, not {c.output!r}")
    own = output.resolve() in [Path(path).resolve() for path in c.files]
    check(not own, f"--output {output} would overwrite what is read")
    folder = next(folder for folder in output.parents if folder.exists())
    check(folder.is_dir() and os.access(folder, os.W_OK), f"--output {output} cannot be written")


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


def write_kept(c: Modelled, reasons: list[str], change=dict) -> None:
    """Read the files again and write change(row) of the rows that have no reason, or a copy."""
    rows = zip(read_rows(c.files, parse=lambda where, value: None), reasons, strict=True)
    write_rows(c.output, ((None if why else change(value), why) for (value, _), why in rows))


def rewrite(c, convert, read=read_values) -> None:
    """Write what convert(where, value) makes of every row: a list of (new value, reason)."""
    check_output(c)
    rows = read_rows(c.files, c.skip_bad_rows, parse=convert, read=read)
    write_rows(c.output, (pair for _, new in rows for pair in new or [(None, "bad row")]))


def texts_of(row: Row, role: str = "") -> list[str]:
    """What a row, or `role` in it, says; raw text is an answer."""
    if row.text is not None:
        return [row.text]
    messages = [*row.messages, *(row.chosen or []), *(row.rejected or [])]
    return [m["content"] for m in messages if role in ("", m["role"])]


def word_share(characters: str, words: list[str]) -> float:
    """Share of words that begin with one of some characters; a Chinese character is a word."""
    found = re.findall(rf"(?<!\S)[{characters}]", " ".join(words))
    return len(found) / max(len(words), 1)


def pieces_of(row: Row, tokenizer: ChatTokenizer, part: str = "all") -> list[tuple]:
    """A row, of a pair its better half: all answers supervised, the last, or it alone."""
    messages = [*row.messages, *(row.chosen or [])][-1 if part == "alone" else 0 :]
    if row.text is not None:
        return tokenizer.text_pieces(row.text)
    return tokenizer.pieces(messages, "all" if part == "all" else "last")


@torch.no_grad()
def run_model(c: Modelled, reasons: list[str], what: str, part: str = "all") -> dict:
    """{row number: mean of the last hidden states [D], or loss in nats}, of rows without a reason.

    `what` is states or loss; the loss is the mean over what `pieces_of` supervises, NaN for nothing
    and, unless `part` is all, for rows above --max_length.
    """
    tokenizer, device, out = ChatTokenizer(c.model, c.template), modeling.best_device(), {}
    tokenizer.check_size(modeling.load_config(c.model).vocab_size)
    model = modeling.load(c.model, modeling.best_dtype("auto", device), device)
    again = read_rows(c.files, c.skip_bad_rows, quiet=True)
    rows = ((i, row) for i, (_, row) in enumerate(again) if not reasons[i])
    while some := list(itertools.islice(rows, 2000)):  # enough for every thread, little memory
        plans = tokenizer.encode([pieces_of(row, tokenizer, part) for _, row in some])
        examples = [Example(*fit(*plan, c.max_length)) for plan in plans]
        if part != "all":  # a ratio of two losses needs the same tokens in both
            examples = [e if len(ids) <= c.max_length else e._replace(spans=())
                        for e, (ids, _) in zip(examples, plans, strict=True)]
        for chunk in micro_batches([len(e.ids) for e in examples], c.micro_tokens)[0]:
            batch = collate([examples[k] for k in chunk], device)
            if what == "states":
                values, sizes = model.hidden(batch.ids, batch.lengths)[0], batch.lengths  # [T, D]
            else:
                values = -model(batch.ids, batch.lengths, batch.targets)  # [N]
                sizes = [examples[k].targets for k in chunk]
            means = torch.stack([x.mean(0) for x in values.float().split(sizes)])  # [B, D] or [B]
            out |= zip((some[k][0] for k in chunk), means.cpu().numpy(), strict=True)
    return out


# -------------------------------------------------------------------------------- exam questions

KEYS = {"q_main": "question", "std_ans": "answer", "answer_detail": "explanation",
        **{f"option_{letter}": letter for letter in "abcde"}}  # what Wanjuan calls C-Eval's columns


def parse_question(where: str, value) -> dict:
    """A question with C-Eval's keys or with Wanjuan's; its options, {letter: text}, not empty."""
    row = value if isinstance(value, dict) else {}
    row = {KEYS.get(key.lower(), key.lower()): cell or "" for key, cell in row.items()}
    q = {key: row.get(key, "") for key in ("question", "answer", "explanation", "q_type", *"abcde")}
    good = all(map(is_text, q.values())) and q["question"]
    q["answer"] = re.sub(r"[\s,，、]", "", str(q["answer"])).upper()
    options = {letter: q[letter.lower()] for letter in "ABCDE" if q[letter.lower()]}
    check(good and len(options) > 1 and set(q["answer"]) <= set(options),
         f"{where}: expected a question, options, an answer among them, found {value!r:.80}")
    return {**q, "where": where, "options": options}


# ------------------------------------------------------------------------- statistics of a file


@dataclass
class Config(Files):
    """Say what a file holds: duplicates, answers, languages, repetition, lengths."""

    model: str = ""  # checkpoint whose tokenizer and template to use; empty: bytes and ChatML
    template: str = ""  # chatml, llama2, llama3, mistral, deepseek, plain; empty: recognised
    max_length: int = 2048  # tokens an example; longer ones are truncated, raw text is split


def row_facts(tokenize, item: tuple) -> tuple:
    """(hash, tokens of each example, counters) of a row."""
    row, counts = item[1], Counter()
    if row is None:
        return None, [], Counter({"dropped: bad row": 1})
    sizes = [len(e.ids) for e in tokenize([row], 0, counts)]
    words, answers = words_of("\n".join(texts_of(row))), texts_of(row, "assistant")
    counts.update(rows=1, answers=len(answers), empty=sum(not a.strip() for a in answers),
                  words=len(words), han=len(words) * word_share(HAN, words),
                  repeated=sum(map(repetition, answers)))
    return hash64(repr(row[1:])), sizes, counts


def print_facts(counts: Counter, distinct: int, most: int, lengths: np.ndarray) -> None:
    """What a person wants to know of rows, `most` answers in one of them."""
    rows, answers, empty, words, han, repeated = map(
        counts.pop, ("rows", "answers", "empty", "words", "han", "repeated"))
    print(f"{rows} rows, {rows - distinct} of them exact duplicates\n"
          f"{answers / rows:.2f} answers per row, at most {most}; {empty} are empty\n"
          f"Chinese characters: {han / max(words, 1):.1%} of the words\n"
          f"repetition: {repeated / max(answers, 1):.1%} of an answer's {NGRAM}-grams\n"
          "tokens of an example, by percentiles:",
          *(f"{p}%: {np.percentile(lengths, p):.0f} " for p in (1, 5, 25, 50, 75, 95, 99, 100)))
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
    rows = read_rows(c.files, c.skip_bad_rows)
    hashes, most, lengths, counts = set(), 0, [], Counter()
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
