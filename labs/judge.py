"""A model as the judge of two files of answers, asked in both orders.

Idea. To know whether training helped, let a model read a question and two answers, and say which is
better (arXiv:2306.05685). Judges are biased to a place: many prefer whatever stands first. So every
pair is judged twice, the second time with the answers swapped. An answer wins if it wins in both
orders; where the orders disagree the pair is a tie, and says something about the judge only:

    win rate = (wins + ties / 2) / n         its 95% interval is Wilson's, of the decided pairs
    bias     = share of verdicts for the answer that stands first; 50% for a fair judge

A judge must have learned to judge. --train writes rows for that from preference pairs: each pair
in both orders, answered by the letter. (Trained in one order, it learns the letter alone.)

    python -m labs.judge out/demo/pairs.jsonl --train --output out/judge/rows.jsonl
    python train_sft.py --model out/sft --data out/judge/rows.jsonl --output_dir out/judge/sft \\
        --learning_rate 1e-3 --epochs 8
    python -m labs.judge out/judge/before.jsonl out/judge/after.jsonl --model out/judge/sft

The two files are of `eval.py generate`: before with --model out/sft, after with --model out/dpo,
both with --data out/demo/pairs_val.jsonl --max_new_tokens 64.

What you should see: 24 of the 40 answers before DPO are rude, and lose to the polite ones after it.
The other 16 pairs are polite on both sides: ties. Before it was trained, out/sft as the judge of
the same files disagreed with itself in 28 of 40 pairs.

                                 out/sft   out/judge/sft
    wins / losses / ties     2 / 10 / 28     0 / 24 / 16
    win rate                       40.0%           20.0%
    wins of decided, 95%        5% - 45%        0% - 14%
    verdicts for the first         37.5%           30.0%

Exercise. What do win rate and bias say of a judge that answers A whatever it reads?
    Solution: all pairs are ties and the win rate is 50%: fair at a glance. The bias is 100%.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import data
import eval as evaluation
import model as modeling
from data import Row
from labs.text import Modelled, check_output, write_rows
from model import check


@dataclass
class Config(Modelled):
    """Let a model compare the answers of two files, or write rows that teach it to."""

    files: list[str]  # two files of answers to the same questions; with --train, pairs
    model: str = ""  # checkpoint that judges
    output: str = ""  # .jsonl: every verdict, or with --train the rows
    train: bool = False  # write rows to train a judge on, from the preference pairs of the files


ASK = "问题：{question}\nA. {A}\nB. {B}\n哪个回答更好？"


# ==== read: the idea ==============================================================================


def ask(messages: list[dict], first: str, second: str) -> str:
    """What the judge reads: the conversation, and two answers as A and B."""
    question = messages[0]["content"]
    if len(messages) > 1:
        question = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return ASK.format(question=question, A=first, B=second)


def verdict(order: float, swapped: float) -> str:
    """win, loss or tie of the left answer, from ln p(A) - ln p(B) in either order.

    In the first order the left answer is A, in the second it is B.
    """
    if order > 0 > swapped:
        return "win"
    if order < 0 < swapped:
        return "loss"
    return "tie"


def judge(model, tokenizer: data.ChatTokenizer, pairs: list[tuple], micro_tokens: int):
    """ln p(A) - ln p(B) of each pair (messages, left, right) in both orders: two lists, in nats."""
    margins, options = [], [letter_ids(tokenizer, letter) for letter in "AB"]
    for swap in (False, True):
        # The judge reads the right answer as A when it is asked again.
        prompts = []
        for messages, left, right in pairs:
            text = ask(messages, right, left) if swap else ask(messages, left, right)
            prompts.append(tokenizer.prompt_ids([{"role": "user", "content": text}]))

        # A margin above 0 is a verdict for the answer that stands first.
        scores = evaluation.score_options(model, prompts, options, micro_tokens)  # [pairs, 2]
        margins.append((scores[:, 0] - scores[:, 1]).tolist())
    return margins


def summarize(order: list[float], swapped: list[float]) -> dict:
    """What the verdicts come to; the left answers' win rate and its interval, and the bias."""
    counts = Counter(map(verdict, order, swapped))
    first = sum(margin > 0 for margin in order + swapped)

    # A tie says nothing about the answers, so the interval is of the decided pairs.
    decided = counts["win"] + counts["loss"]
    low, high = evaluation.wilson(counts["win"], decided) if decided else (0.0, 1.0)
    return {"wins": counts["win"], "losses": counts["loss"], "ties": counts["tie"],
            "win rate": (counts["win"] + counts["tie"] / 2) / len(order),
            "wins of decided": counts["win"] / decided if decided else 0.5, "low": low,
            "high": high, "verdicts for the first": first / (2 * len(order))}


# ---- skip on a first reading: rows, report -------------------------------------------------------


def letter_ids(tokenizer: data.ChatTokenizer, letter: str) -> tuple[int]:
    """The first token of an answer that is this letter."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": letter}]
    (example,) = data.to_examples([Row("a verdict", talk)], 0, Counter(), tokenizer)
    return (int(example.ids[example.spans[0][0]]),)


def training_rows(c: Config) -> Iterator[tuple[dict, str]]:
    """Two rows of every preference pair, one per order, answered by the letter of the chosen."""
    for _, row in data.read_rows(c.files, c.skip_bad_rows):
        if row:
            check(row.chosen, f"{row.where}: expected a preference pair")

            # In one order alone a judge would learn the letter, not the answer.
            texts = [side[-1]["content"] for side in (row.chosen, row.rejected)]
            for letter, sides in (("A", texts), ("B", texts[::-1])):
                yield {"prompt": ask(row.messages, *sides), "response": letter}, ""


def read_answers(c: Config) -> list[tuple]:
    """(messages, left answer, right answer) of every row of two files with the same questions."""
    sides = []
    for path in c.files:
        rows = [row for _, row in data.read_rows([path], c.skip_bad_rows) if row]
        for row in rows:
            answered = len(row.messages) > 1 and row.messages[-1]["role"] == "assistant"
            check(answered, f"{row.where}: expected a question and its answer")
        sides.append(rows)

    # Answers are paired by their place, so both files must ask alike.
    check(len(sides[0]) == len(sides[1]) > 0, f"{c.files[0]} has {len(sides[0])} answers, "
          f"{c.files[1]} {len(sides[1])}; they must answer the same questions")
    pairs = []
    for left, right in zip(*sides, strict=True):
        check(left.messages[:-1] == right.messages[:-1],
              f"{left.where} and {right.where} answer different questions")
        pairs.append((left.messages[:-1], left.messages[-1]["content"],
                      right.messages[-1]["content"]))
    return pairs


def main(c: Config) -> None:
    """Write rows for a judge, or let one judge."""
    if c.output or c.train:
        check_output(c.output, *c.files)
    check(not (c.train and c.model), "--train writes rows and asks no judge: leave --model out")
    if c.train:
        write_rows(c.output, training_rows(c))
        return

    # All that can be wrong with the input is said before the weights are read.
    check(len(c.files) == 2, f"expected two files of answers, found {len(c.files)}")
    check(c.model, "--model DIR is missing: who judges (--train writes rows to train a judge on)")
    pairs, tokenizer = read_answers(c), data.ChatTokenizer(c.model, c.template)
    letters = [letter_ids(tokenizer, letter) for letter in "AB"]
    check(letters[0] != letters[1], f"{c.model}: A and B begin with the same token")
    device = modeling.best_device()
    model = modeling.load(c.model, modeling.best_dtype(c.dtype, device), device)

    # Each verdict is kept with its margins, so that one can read where the judge errs.
    order, swapped = judge(model, tokenizer, pairs, c.micro_tokens)
    if c.output:
        rows = []
        for (messages, left, right), a, b in zip(pairs, order, swapped, strict=True):
            rows.append(({"messages": messages, "left": left, "right": right,
                          "verdict": verdict(a, b), "margins": [a, b]}, ""))
        write_rows(c.output, rows)
    found = summarize(order, swapped)
    judged_by = evaluation.short_name(c.model)
    data.print_table([(f"of {len(pairs)} pairs, judged by", judged_by), *found.items()])
    print(f"{found['wins']} wins of {c.files[0]} over {c.files[1]},\n{found['losses']} losses, "
          f"{found['ties']} ties where the orders disagree")


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
