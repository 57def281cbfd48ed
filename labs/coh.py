"""Chain of Hindsight: preference pairs as conversations in which feedback names each answer.

Idea (arXiv:2302.02676, section 2). A model that reads "a bad answer: ... a good answer: ..." learns
what makes an answer good, with nothing but the loss of SFT:

    loss = -sum ln p(good answer | question, feedback, bad answer) - sum ln p(bad answer | ...)

The feedback words stand in the user's turns, so that the loss is on both answers and on nothing
else. Which answer comes first is drawn. The paper hides up to 5% of the past tokens in attention,
against copying; here (--mask_past) words of the first answer are left out instead, in a second
conversation where only the second answer counts.

    python -m labs.coh out/demo/pairs.jsonl --output out/demo/hindsight.jsonl
    python train_sft.py --model out/sft --data out/demo/hindsight.jsonl --output_dir out/coh \\
        --steps 60 --learning_rate 7e-4

What you should see: the demo's pairs prefer polite answers to rude ones. Of the 40 questions of
out/demo/pairs_val.jsonl the trained model answers none rudely with "好的回答：" (a good answer)
below them, and all 40 with "不好的回答：" (a bad one); out/sft, asked plainly, 24.

Exercise. Ask the trained model and add "A bad answer:". What should it do, and what does it mean
if nothing changes?
    Solution: it should answer worse. If nothing changes it has learnt to ignore the feedback.
"""

import functools
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


# ==== read: a pair as a conversation ==============================================================

FEEDBACK = {"en": {True: "A good answer:", False: "A bad answer:"},
            "zh": {True: "好的回答：", False: "不好的回答："}}
WORD = re.compile(rf"\s*(?:[{HAN}]|[^\s{HAN}]+|$)")  # a Chinese character is a word


def feedback_conversations(row: Row, mask_past: float, rng: random.Random) -> list[list[dict]]:
    """The conversations of a pair: one, or with `mask_past` one for each of the two answers."""
    *history, question = [{**m, "train": False} for m in row.messages]
    words = FEEDBACK["zh" if re.search(f"[{HAN}]", question["content"]) else "en"]
    order = [(True, row.chosen[0]), (False, row.rejected[0])]
    rng.shuffle(order)
    (first, past), (second, answer) = order

    # "question + feedback" and the first answer, then feedback alone and the second one.
    start = [*history, {"role": "user", "content": f"{question['content']}\n{words[first]}"}]
    end = [{"role": "user", "content": words[second]}, answer]
    if not mask_past:
        return [[*start, past, *end]]

    # The first answer is learnt whole; the second one sees it with words left out.
    rate = rng.uniform(0, mask_past)
    seen = "".join(word for word in WORD.findall(past["content"]) if rng.random() >= rate)
    return [[*start, past], [*start, {**past, "content": seen, "train": False}, *end]]


def hindsight_rows(mask_past: float, rng: random.Random, where: str, value) -> list[tuple]:
    """[(conversation, why it is dropped)] of a preference pair."""
    row = parse_row(where, value)
    asked = not row.messages or row.messages[-1]["role"] == "user"
    check(row.chosen and asked, f"{where}: expected a question, chosen and rejected answers")
    if why := why_no_pair(row):
        return [(None, why)]
    rows, tools = [], {"tools": row.tools} if row.tools else {}
    for messages in feedback_conversations(row, mask_past, rng):
        rows.append(({"messages": messages, **tools}, ""))
    return rows


def main(c: Config) -> None:
    """Write the conversations of every pair."""
    check(0 <= c.mask_past < 1, f"--mask_past must be in [0, 1), not {c.mask_past}")
    rewrite(c, functools.partial(hindsight_rows, c.mask_past, random.Random(c.seed)))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
