"""Turn multiple-choice rows into conversations that train.

    python -m labs.exam_rows FILE... --output FILE.jsonl --style answer_first
"""

import functools
import re
import sys
from dataclasses import dataclass
from typing import Literal

import data
from data import read_values
from eval import read_csv
from labs.text import Files, parse_question, rewrite
from model import check


@dataclass
class Config(Files):
    """Turn multiple-choice rows, with Wanjuan's keys or C-Eval's, into conversations."""

    output: str = ""  # .jsonl to write
    style: Literal["answer_first", "explanation_first"] = "answer_first"  # Steel-LLM's formats
    from_exam: bool = False  # take .csv files of C-Eval or CMMLU too: this CONTAMINATES the exam


def exam_row(style: str, where: str, value) -> list[tuple[dict, str]]:
    """A question in one of Steel-LLM's formats (arXiv:2502.06635; its data preparation).

    Without an answer, or with an explanation under 10 characters, answer_first in either style.
    """
    q = parse_question(where, value)
    why = q["explanation"]
    choice = q["question"] + "\n" + "".join(f"{k}. {text}\n" for k, text in q["options"].items())
    asked = f"以下是一道单选题:\n{choice}请给出答案。\n"
    answer = f"{q['answer']}。{why}" if q["answer"] else why
    if style == "explanation_first" and q["answer"] and len(why) >= 10:
        asked = f"以下是一道{q['q_type'] or '单选题'}:\n{choice}请先给出解释再给出答案。\n"
        answer = re.sub("(?s)故选.*", "", why) + f"答案为{q['answer']}"
    return [({"messages": [{"role": "user", "content": asked},
                           {"role": "assistant", "content": answer}]},
             "" if answer else "no answer")]


def main(c: Config) -> None:
    """`data.py exam`."""
    check(c.from_exam or not any(path.endswith(".csv") for path in c.files),
         "training on the .csv files of an exam contaminates it; --from_exam does so all the same")
    rewrite(c, functools.partial(exam_row, c.style),
            lambda path: (read_csv if path.suffix == ".csv" else read_values)(path))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
