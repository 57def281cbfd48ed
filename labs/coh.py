"""Chain of Hindsight: preference pairs as conversations in which feedback names each answer.

    python -m labs.coh FILE... --output FILE.jsonl
"""

import random
import re
import sys
from dataclasses import dataclass

import data
from data import Row, parse_row
from labs.text import HAN, Files, rewrite
from model import check
from train_dpo import why_no_pair


@dataclass
class Config(Files):
    """Chain of Hindsight: preference pairs as conversations in which feedback names each answer."""

    output: str = ""  # .jsonl that train_sft.py trains on
    mask_past: float = 0.0  # hide up to this share of the first answer's words from the second
    seed: int = 0  # of which answer comes first, and of what is hidden


FEEDBACK = {"en": {True: "A good answer:", False: "A bad answer:"},
            "zh": {True: "好的回答：", False: "不好的回答："}}
WORD = re.compile(rf"\s*(?:[{HAN}]|[^\s{HAN}]+|$)")  # a Chinese character is a word


def hindsight(row: Row, mask_past: float, rng: random.Random) -> list[list[dict]]:
    """The conversations of a pair (Chain of Hindsight, arXiv:2302.02676, section 2).

    The feedback words stand in the user's turns, so that the loss is on both answers and on nothing
    else. The paper hides up to 5% of the past tokens in attention, against copying; here words of
    the first answer are left out, in a second conversation where only the second answer counts.
    """
    *history, question = [{**m, "train": False} for m in row.messages]
    words = FEEDBACK["zh" if re.search(f"[{HAN}]", question["content"]) else "en"]
    order = [(True, row.chosen[0]), (False, row.rejected[0])]
    rng.shuffle(order)
    (first, past), (second, answer) = order
    start = [*history, {"role": "user", "content": f"{question['content']}\n{words[first]}"}]
    end = [{"role": "user", "content": words[second]}, answer]
    if not mask_past:
        return [[*start, past, *end]]
    rate = rng.uniform(0, mask_past)
    seen = "".join(w for w in WORD.findall(past["content"]) if rng.random() >= rate)
    return [[*start, past], [*start, {**past, "content": seen, "train": False}, *end]]


def main(c: Config) -> None:
    """`data.py coh`."""
    check(0 <= c.mask_past < 1, f"--mask_past must be in [0, 1), not {c.mask_past}")
    rng = random.Random(c.seed)

    def convert(where: str, value) -> list[tuple]:
        row = parse_row(where, value)
        asked = not row.messages or row.messages[-1]["role"] == "user"
        check(row.chosen and asked, f"{where}: expected a question, chosen and rejected answers")
        why = why_no_pair(row)
        found = [None] if why else hindsight(row, c.mask_past, rng)
        return [({"messages": messages}, why) for messages in found]

    rewrite(c, convert)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
