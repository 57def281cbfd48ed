"""Write the rows that pass every test: language, length, repetition, duplicates, right answers.

Idea. Few good rows teach more than many mixed ones: Steel-LLM (arXiv:2502.06635) reports C-Eval
38.57 for its Chinese rows only, 32.35 for all. A row is dropped for the first test that it fails.

Near duplicates: two rows share each of the 64 numbers of their signatures (`labs.text`) with the
probability J, the overlap of their 5-grams. Compared are rows that agree in one of 16 bands of 4
numbers: a pair is missed with probability (1 - J^4)^16, 0.0002 at J = 0.8, 0.36 at J = 0.5.

New facts are learnt last, and teach to make up others (arXiv:2405.05904; Yi, arXiv:2403.04652, says
so too): --known SAMPLES --min_known 0.1 drops what a model's own samples hardly ever answer right.

    python -m labs.filter out/demo/practice.jsonl --output out/demo/few.jsonl --duplicates near
    python -m labs.filter out/demo/pairs.jsonl --output out/demo/known.jsonl --min_known 0.1 \\
        --known out/samples.jsonl    # samples as in the docstring of labs/rewards.py

What you should see: 8,920 of 10,000 rows are kept, 1,009 near and 71 exact duplicates dropped; then
58 of 240 dropped, whose answer at most one of 16 samples gives.

Exercise. With bands of 8 numbers instead of 4, how many pairs at J = 0.8 are missed?
    Solution: (1 - 0.8^8)^8 = 0.23. Longer bands compare fewer pairs and miss more.
"""

import functools
import math
import re
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

import data
import eval as evaluation
from data import ChatTokenizer, Row, is_text, read_rows
from labs import text as texts
from labs.rewards import final_answer, find_reward, prompt_key, scores_by_prompt
from labs.text import MINHASHES, Modelled, texts_of, words_of
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
    max_repetition: float = 1.0  # most 5-grams of an answer that stood in it, or in earlier ones
    min_perplexity: float = 0.0  # least perplexity of the answers under --model
    max_perplexity: float = math.inf  # most of it
    duplicates: Literal["keep", "exact", "near"] = "keep"  # near: drop exact and near duplicates
    max_rouge: float = 1.0  # ROUGE-L of a row's questions to those of all rows kept is below this
    near: float = 0.8  # 5-grams in common that make near duplicates; below 0.7 some are missed
    no_system: bool = False  # write the rows without their system messages: what they asked distils
    answer_matches: bool = False  # keep samples of eval.py generate whose final answer is right
    known: str = ""  # samples of eval.py generate on these rows: how many are right, by question
    min_known: float = 0.0  # least share of a question's samples that are right
    max_known: float = 1.0  # most of them


# ==== read: why a row is dropped ==================================================================

# LIMA (section 2.1) names "I", "my", "as mentioned", "stack exchange"; the Chinese ones are ours
FIRST_PERSON = re.compile(r"\b(I|[Mm]y)\b|(?<!自)我(?![们国])")
OTHER_ANSWERS = re.compile(r"(?i)as mentioned|stack ?exchange|other answers|如上所述|其他回答|楼上")


def lima_reason(value: dict, answers: list[str], chars: int) -> str:
    """Why LIMA would not take a community answer (arXiv:2305.11206, section 2.1), or nothing."""
    if not 1200 <= chars <= 4096:
        return "LIMA: length"
    for name, pattern in (("first person", FIRST_PERSON), ("other answers", OTHER_ANSWERS)):
        if any(map(pattern.search, answers)):
            return f"LIMA: {name}"
    if isinstance(score := value.get("score"), int | float) and score < 10:
        return "LIMA: score"
    return ""


def repetition(answers: list[str]) -> float:
    """The largest share of an answer's 5-grams that stood before, in it or in an earlier answer.

    A chat model may fall back on its last answer, which looks fine alone (Yi, arXiv:2403.04652).
    Answers shorter than a 5-gram, such as "yes", may come again.
    """
    seen, most = set(), 0.0
    for answer in answers:
        words = words_of(answer)
        if len(words) >= texts.NGRAM:
            grams = texts.ngrams(words).tolist()
            most = max(most, 1 - len(set(grams) - seen) / len(grams))
            seen |= set(grams)
    return most


def reject_reason(c: Config, tokenizer: ChatTokenizer | None, known: dict, value: dict,
                  row: Row) -> str:
    """Why a row is dropped, or nothing; all tests but those of perplexity and of duplicates."""
    answers = texts_of(row._replace(rejected=None), "assistant")  # a pair stands by its better one
    chars = len("\n".join(answers))
    if c.language != "any" and texts.language_of(words_of("\n".join(texts_of(row)))) != c.language:
        return {"zh": "not Chinese", "en": "not English"}[c.language]

    # How long, and in what manner.
    if not c.min_chars <= chars <= c.max_chars:
        return "length in characters"
    if tokenizer and not c.min_tokens <= len(texts.example_of(row, tokenizer).ids) <= c.max_tokens:
        return "length in tokens"
    if c.lima and (reason := lima_reason(value, answers, chars)):
        return reason
    if c.max_repetition < 1 and repetition(answers) > c.max_repetition:
        return "repetition"

    # Whether the last answer is right (rejection sampling), and what is left without the system.
    reference = value.get("reference")
    if c.answer_matches and not (is_text(reference) and reference and answers):
        return "no reference"
    if c.answer_matches and final_answer(answers[-1]) != final_answer(reference):
        return "another final answer"
    question = row.messages if row.chosen else row.messages[:-1]
    right = known.get(prompt_key(question, row.tools), [-1.0])
    if c.known and not c.min_known <= sum(right) / len(right) <= c.max_known:
        return "no samples of its question" if right == [-1.0] else "share of right samples"
    said = row.chosen or row.text is not None or any(m["role"] != "system" for m in row.messages)
    return "only a system message" if c.no_system and not said else ""


# ==== read: near duplicates =======================================================================

BAND = 4  # neighbouring numbers of a signature that two rows must share to be compared


def near_duplicates(signatures: np.ndarray, near: float) -> np.ndarray:
    """True for rows [R] that agree with an earlier one in `near` of their signatures [R, 64]."""
    duplicate = np.zeros(len(signatures), dtype=bool)
    for place in range(0, MINHASHES, BAND):
        band = signatures[:, place : place + BAND]  # [R, BAND]
        bucket = np.unique(band, axis=0, return_inverse=True)[1].ravel()  # [R]

        # Rows with equal bands share a bucket: sorted, they are neighbours. A row is compared with
        # the first row of its bucket and with the one before it.
        order = np.argsort(bucket, kind="stable")
        bucket = bucket[order]
        later = np.flatnonzero(bucket[1:] == bucket[:-1]) + 1  # all of a bucket but its first row
        for earlier in (np.searchsorted(bucket, bucket[later]), later - 1):
            a, b = signatures[order[earlier]], signatures[order[later]]  # [pairs, 64]
            duplicate[order[later]] |= (a == b).mean(1) >= near
    return duplicate


# ---- skip on a first reading: the command --------------------------------------------------------


def parse_both(where: str, value) -> tuple[dict, Row]:
    """(the keys of a row, what data.py makes of it): a filter looks at both."""
    row = data.parse_row(where, value)
    return value if isinstance(value, dict) else {}, row


def judge(c: Config, tokenizer: ChatTokenizer | None, known: dict, item: tuple) -> tuple:
    """(reason, hash, signature for --duplicates near) of a row, in one of many processes."""
    # What looks at one row alone can be done on all cores at once.
    if item[1] is None:
        return "bad row", 0, None
    (value, row), signature = item[1], None
    if c.duplicates == "near":
        text = "\n".join(texts_of(row))
        signature = texts.signature(words_of(text) or list(text))  # emoji alone: each is a word
    return reject_reason(c, tokenizer, known, value, row), texts.hash64(repr(row[1:])), signature


def drop_by_perplexity(c: Config, reasons: list[str]) -> None:
    """Give a reason to rows whose answers have too low or too high a perplexity under --model."""
    tokenizer, examples = ChatTokenizer(c.model, c.template), {}
    for number, (_, row) in enumerate(read_rows(c.files, c.skip_bad_rows, quiet=True)):
        if not reasons[number]:
            examples[number] = texts.example_of(row, tokenizer, max_length=c.max_length)

    model, numbers = evaluation.open_model(c, tokenizer), list(examples)
    for k, logp in evaluation.example_logprobs(model, list(examples.values()), c.micro_tokens):
        inside = c.min_perplexity <= (-logp.double().mean()).exp() <= c.max_perplexity  # NaN: no
        reasons[numbers[k]] = "" if inside else "perplexity"


def drop_duplicates(c: Config, judged: list[tuple], reasons: list[str]) -> None:
    """Give a reason to the later copies of a row, among the rows that passed all else."""
    kept = [i for i, reason in enumerate(reasons) if not reason]
    near = [False] * len(kept)
    if kept and c.duplicates == "near":
        near = near_duplicates(np.stack([judged[i][2] for i in kept]), c.near)

    seen = set()
    for i, is_near in zip(kept, near, strict=True):
        if judged[i][1] in seen:
            reasons[i] = "exact duplicate"
        elif is_near:
            reasons[i] = "near duplicate"
        seen.add(judged[i][1])


def is_system(message) -> bool:
    """Whether it is a message of the system."""
    role = message.get("role", message.get("from")) if isinstance(message, dict) else ""
    return data.ROLES.get(str(role).lower()) == "system"


def without_system(row: dict | list):
    """A row of any format without its system messages (context distillation, arXiv:2112.00861)."""
    if isinstance(row, list):
        return [message for message in row if not is_system(message)]
    out = {}
    for key, part in row.items():
        if data.ROW_KEYS.get(key.lower(), ("",))[0] != "system":
            is_list = isinstance(part, list) or is_system(part)
            out[key] = without_system([part] if is_system(part) else part) if is_list else part
    return out


def main(c: Config) -> None:
    """Judge the rows on all cores, then those that are left by a model, then drop copies."""
    by_tokens = (c.min_tokens, c.max_tokens) != (0, math.inf)
    by_loss = (c.min_perplexity, c.max_perplexity) != (0, math.inf)
    texts.check_output(c.output, *c.files, c.known)
    check(c.model or not (by_tokens or by_loss), "tests of tokens and perplexity need --model DIR")
    for name in ("chars", "tokens", "perplexity", "known"):
        check(0 <= getattr(c, f"min_{name}") <= getattr(c, f"max_{name}"),
              f"--min_{name} is negative, or above --max_{name}: no row would pass")
    for name in ("near", "max_rouge", "max_repetition"):
        check(0 <= getattr(c, name) <= 1, f"--{name} is a share, not {getattr(c, name)}")
    check(bool(c.known) == ((c.min_known, c.max_known) != (0, 1)),
          "--known SAMPLES goes with --min_known or --max_known")

    # The tests from cheap to dear: by words, by a model, against all other rows.
    tokenizer = ChatTokenizer(c.model, c.template) if by_tokens else None
    rows = read_rows(c.files, c.skip_bad_rows, parse=parse_both)
    known = scores_by_prompt([c.known], find_reward("final")) if c.known else {}
    judged = list(texts.parallel(functools.partial(judge, c, tokenizer, known), rows))
    reasons = [reason for reason, _, _ in judged]
    if by_loss:
        drop_by_perplexity(c, reasons)
    if c.duplicates != "keep":
        drop_duplicates(c, judged, reasons)
    texts.drop_alike(c, reasons)
    texts.write_rows(c.output, texts.kept_rows(c, reasons, without_system if c.no_system else None))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
