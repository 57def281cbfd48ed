"""Turn multiple-choice questions into conversations that train.

Idea. An exam asks for a letter, so a model should have met letters as answers. Steel-LLM
(arXiv:2502.06635) writes the questions of Wanjuan's exam corpus as conversations, in two formats;
the third one is here to be compared with:

    answer_first         "B。" and then the explanation
    explanation_first    the explanation and then "答案为B"
    answer_only          "B。": what do the explanations add?

Steel-LLM reports the first slightly better than the second. There a row without an answer, or with
an explanation under ten characters, falls back to the first format. Rows in whose answer or
explanation the character 略 ("omitted") stands are dropped, whatever the format, so that its arms
hold the same rows: of Steel-LLM's 3,997,183 rows 3,837,404 are left, by its notebook's output.

    python -m labs.exam_rows out/demo/exam/val/*.csv --from_exam --output out/demo/letters.jsonl

What you should see: 320 conversations, the first of which asks what has the symbol Ag: "D。"

Cannot be seen at this size: which format trains better. A model that small cannot explain.

Exercise. --from_exam trains on an exam's own files. What does its score mean afterwards?
    Solution: nothing; `labs.overlap` shows how 21% becomes 89%.
Exercise. Which good rows does the test for 略 drop?
    Solution: those that speak of 战略 (strategy), 侵略 (aggression), 忽略 (to overlook).
"""

import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import data
from data import is_text, read_values
from eval import read_csv
from labs.text import Files, rewrite
from model import check

Style = Literal["answer_first", "explanation_first", "answer_only"]


@dataclass
class Config(Files):
    """Turn multiple-choice rows, with Wanjuan's keys or C-Eval's, into conversations."""

    files: list[str]  # files of multiple-choice questions, of any format
    output: str = ""  # .jsonl to write
    style: Style = "answer_first"  # letter and then explanation, the reverse, or letter alone
    from_exam: bool = False  # take .csv files of C-Eval or CMMLU too: this CONTAMINATES the exam


# ==== read: a question as a conversation ==========================================================

ELIDED = "略"  # "omitted": what solutions write that were not copied whole


def exam_row(style: str, where: str, value) -> list[tuple[dict, str]]:
    """[(a question as a conversation, why it is dropped)] in one of Steel-LLM's formats."""
    q = parse_choices(where, value)
    why, choice = q["explanation"], q["question"] + "\n"
    for letter, option in q["options"].items():
        choice += f"{letter}. {option}\n"

    # Answer first, also where there is nothing to explain.
    asked = f"以下是一道单选题:\n{choice}请给出答案。\n"
    answer = f"{q['answer']}。{why}" if q["answer"] else why
    if style == "explanation_first" and q["answer"] and len(why) >= 10:
        asked = f"以下是一道{q['q_type'] or '单选题'}:\n{choice}请先给出解释再给出答案。\n"
        answer = re.sub("(?s)故选.*", "", why) + f"答案为{q['answer']}"

    # Ours, to see what the explanations add.
    if style == "answer_only":
        answer = f"{q['answer']}。" if q["answer"] else ""

    # Steel-LLM's test, on what stands in the row and not on what this format takes of it.
    reason = f"elided: has {ELIDED}" if ELIDED in q["answer"] + why else ""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [({"messages": messages}, reason if answer else "no answer")]


# ---- skip on a first reading: reading questions --------------------------------------------------

# Wanjuan's names: C-Eval's
KEYS = {"q_main": "question", "std_ans": "answer", "answer_detail": "explanation",
        "option_a": "a", "option_b": "b", "option_c": "c", "option_d": "d", "option_e": "e"}
PARTS = ("question", "answer", "explanation", "q_type", *"abcde")


def parse_choices(where: str, value) -> dict:
    """A question with C-Eval's keys or with Wanjuan's; its options, {letter: text}, not empty."""
    check(not isinstance(value, Exception), f"{where}: {value}")
    # Whatever the corpus, by C-Eval's names; an empty option is none.
    row = value if isinstance(value, dict) else {}
    row = {KEYS.get(key.lower(), key.lower()): cell or "" for key, cell in row.items()}
    q = {key: row.get(key, "") for key in PARTS}
    good = q["question"] and all(map(is_text, q.values()))

    # "A, C" and "ac" are the answers A and C.
    q["answer"] = re.sub(r"[\s,，、]", "", str(q["answer"])).upper()
    options = {}
    for letter in "ABCDE":
        if q[letter.lower()]:
            options[letter] = q[letter.lower()]
    check(good and len(options) > 1 and set(q["answer"]) <= set(options),
          f"{where}: expected a question, options, an answer among them, found {value!r:.80}")
    return {**q, "options": options}


def read_any(path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every row of a file, an exam's .csv included."""
    return read_csv(path) if path.suffix == ".csv" else read_values(path)


def main(c: Config) -> None:
    """Write a conversation per question."""
    check(c.from_exam or not any(path.endswith(".csv") for path in c.files),
          "training on the .csv files of an exam contaminates it; --from_exam does so all the same")
    rewrite(c, functools.partial(exam_row, c.style), read_any)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
