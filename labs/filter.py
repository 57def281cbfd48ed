"""Write the rows that pass every test.

    python -m labs.filter FILE... --output FILE.jsonl --language zh --duplicates near
"""

import functools
import math
import re
import sys
import unicodedata
from dataclasses import dataclass
from typing import Literal

import numpy as np

import data
from data import ChatTokenizer, is_text, read_rows
from labs.text import (
    HAN,
    KANA,
    Modelled,
    check_output,
    hash64,
    near_duplicates,
    parallel,
    pieces_of,
    repetition,
    run_model,
    signature,
    texts_of,
    word_share,
    words_of,
    write_kept,
)
from model import check


@dataclass
class Config(Modelled):
    """Write the rows that pass every test."""

    language: Literal["any", "zh", "en"] = "any"  # keep Chinese, or Latin letters; by their share
    min_chars: int = 0  # least characters of a row's answers together
    max_chars: float = math.inf  # most of them
    min_tokens: int = 0  # least tokens of a row, rendered for --model
    max_tokens: float = math.inf  # most of them
    lima: bool = False  # LIMA's tests: 1200 to 4096 characters, no "I", no other answers, score 10
    max_repetition: float = 1.0  # most of the 5-grams of an answer that stood in it before
    min_perplexity: float = 0.0  # least perplexity of the answers under --model
    max_perplexity: float = math.inf  # most of it
    duplicates: Literal["keep", "exact", "near"] = "keep"  # near: drop exact and near duplicates
    near: float = 0.8  # 5-grams in common that make near duplicates; below 0.7 some are missed
    no_system: bool = False  # write the rows without their system messages: what they asked distils
    answer_matches: bool = False  # keep samples of eval.py generate whose final answer is right


MAIN, OTHER = 0.5, 0.05  # at least, at most this share of words in a script
# LIMA (arXiv:2305.11206, section 2.1) names "I", "my", "as mentioned", "stack exchange"
FIRST_PERSON = re.compile(r"\b(I|[Mm]y)\b|(?<!自)我(?![们国])")
OTHER_ANSWERS = re.compile(r"(?i)as mentioned|stack ?exchange|other answers|如上所述|其他回答|楼上")
FINAL_ANSWERS = (r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", r"####\s*(.+)",
    r"(?:答案(?:应该|应当)?[是为选：:]+|(?:所以|故|因此)选|[Aa]nswer(?: is|:)+)\s*"
    r"(.+?)(?=[，。；\n]|[.,;](?:\s|$)|$)", r"^\s*\(?([A-E])\)?\s*(?:[.、。:：)]|$)")


def final_answer(text: str) -> str:
    """The last \\boxed{}, "#### x", "答案是x", "answer is x"; a leading letter; or all.

    An option is its letter, and a number the same however it is written.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})|\*\*|\$", "", text)  # 1,234, **bold**, $formula$
    found = next((f for pattern in FINAL_ANSWERS if (f := re.findall(pattern, text))), [text])
    answer = unicodedata.normalize("NFKC", found[-1]).replace("\u2212", "-").lower()
    answer = "".join(answer.split()).strip(".。,;")
    if letter := re.match(r"\(?([a-e])(?:[).、:]|$)", answer):
        return letter[1]
    return f"{float(answer):.15g}" if re.fullmatch(r"-?\d+(\.\d+)?", answer) else answer


def judge(c: Config, tokenizer: ChatTokenizer | None, item: tuple) -> tuple:
    """(why a row is dropped or nothing, its hash, its signature), by the tests without a model."""
    value, row = item
    if row is None:
        return "bad row", 0, None
    answers, text = texts_of(row._replace(rejected=None), "assistant"), "\n".join(texts_of(row))
    words, chars = words_of(text), len("\n".join(answers))
    score, reference = value.get("score"), value.get("reference")
    failed = {
        "not Chinese": c.language == "zh" and (
            word_share(HAN, words) < MAIN or word_share(KANA, words) > OTHER),
        "not English": c.language == "en" and (
            word_share("a-z", words) < MAIN or word_share(HAN + KANA, words) > OTHER),
        "length in characters": not c.min_chars <= chars <= c.max_chars,
        "length in tokens": tokenizer and not c.min_tokens <= len(
            tokenizer.encode([pieces_of(row, tokenizer)])[0][0]) <= c.max_tokens,
        "LIMA: length": c.lima and not 1200 <= chars <= 4096,
        "LIMA: first person": c.lima and any(map(FIRST_PERSON.search, answers)),
        "LIMA: other answers": c.lima and any(map(OTHER_ANSWERS.search, answers)),
        "LIMA: score": c.lima and isinstance(score, int | float) and score < 10,
        "repetition": c.max_repetition < 1 and any(
            repetition(answer) > c.max_repetition for answer in answers),
        "no reference": c.answer_matches and not (is_text(reference) and reference and answers),
        "another final answer": c.answer_matches and is_text(reference) and answers
        and final_answer(answers[-1]) != final_answer(reference),
        "only a system message": c.no_system and not row.chosen
        and row.text is None and all(m["role"] == "system" for m in row.messages),
    }
    reason = next((name for name, bad in failed.items() if bad), "")
    marks = signature(words or list(text)) if c.duplicates == "near" else None
    return reason, hash64(repr(row[1:])), marks


def without_system(value: dict) -> dict:
    """A row of any format without its system messages (context distillation, arXiv:2112.00861)."""
    out = {key: part for key, part in value.items() if key != "system"}
    for key in ("messages", "conversations", "prompt", "input", "completion", "chosen", "rejected"):
        part = [out[key]] if isinstance(out.get(key), dict) else out.get(key)
        if isinstance(part, list):
            out[key] = [m for m in part if "system" not in (m.get("role"), m.get("from"))]
    return out


def main(c: Config) -> None:
    """`data.py filter`."""
    by_tokens = (c.min_tokens, c.max_tokens) != (0, math.inf)
    by_loss = (c.min_perplexity, c.max_perplexity) != (0, math.inf)
    check_output(c)
    check(c.model or not (by_tokens or by_loss), "tests of tokens and perplexity need --model DIR")
    for name in ("chars", "tokens", "perplexity"):
        check(0 <= getattr(c, f"min_{name}") <= getattr(c, f"max_{name}"),
             f"--min_{name} is negative, or above --max_{name}: no row would pass")
    check(0 < c.near <= 1, f"--near must be above 0 and at most 1, not {c.near}")
    check(0 <= c.max_repetition <= 1, f"--max_repetition is a share, not {c.max_repetition}")
    tokenizer = ChatTokenizer(c.model, c.template) if by_tokens else None
    rows = read_rows(c.files, c.skip_bad_rows)
    found = list(parallel(functools.partial(judge, c, tokenizer), rows))
    reasons = [reason for reason, _, _ in found]
    if by_loss:
        for i, loss in run_model(c, reasons, "loss").items():
            inside = c.min_perplexity <= np.exp(loss) <= c.max_perplexity  # False for NaN
            reasons[i] = "" if inside else "perplexity"
    kept = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=int)
    if c.duplicates != "keep" and len(kept):
        first = np.unique([found[i][1] for i in kept], return_index=True)[1]
        exact = near = np.isin(np.arange(len(kept)), first, invert=True)
        if c.duplicates == "near":
            near = near_duplicates(np.stack([found[i][2] for i in kept]), c.near)
        for i in np.flatnonzero(exact | near):
            reasons[kept[i]] = "exact duplicate" if exact[i] else "near duplicate"
    write_kept(c, reasons, without_system if c.no_system else dict)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
