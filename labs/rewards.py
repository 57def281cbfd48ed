"""Rewards: a program that says how good an answer is; and the prompts and answers it is about.

Idea. Learning from rewards needs no better text than the model's own, only a number for it:

    reward(messages, answer, reference) -> float     of a talk, an answer to it, the row's answer

`match` (the whole answer is right), `final` (what it comes to is) and `exam` (its letter is) stand
here, others in any FILE.py. Look at a reward before you train on it: where all answers to a prompt
score alike there is nothing to learn, and the best of n samples is what choosing alone can bring.

    python eval.py generate --model out/sft --data out/demo/pairs.jsonl --n 8 --temperature 1 \\
        --max_new_tokens 64 --output out/samples.jsonl
    python -m labs.rewards out/samples.jsonl --reward labs/rl.py:polite

What you should see: four of 120 questions have nothing to teach. (The file asks each one twice.)

    prompts  answers  mean reward  best of n  all alike
    120         1920        0.475      0.983          4

Exercise. Each answer to a prompt is right with probability p. What is the best of n worth?
    Solution: 1 - (1 - p)^n; with p = 0.3 and n = 8 it is 0.94.
"""

import functools
import json
import math
import re
import runpy
import sys
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import eval as evaluation
import model as modeling
from data import ChatTokenizer, Example, Row, print_table, read_rows
from labs.text import Files
from model import InputError, Sampling, check
from train_sft import Hardware


@dataclass
class Config(Files):
    """Say what a reward thinks of the samples that `eval.py generate` wrote."""

    files: list[str]  # samples with their references, as eval.py generate writes them
    reward: str = "match"  # exam (the letter), final (answer), match (all), or FILE.py:function


# ==== read: rewards ===============================================================================


def same(key: Callable, messages: list[dict], answer: str, reference: str) -> float:
    """1 if `key` finds the same in an answer as in the reference; else 0."""
    wanted = key(reference)

    # Nothing is like nothing: an empty answer would be right.
    check(wanted, f"the row has no reference to compare an answer with, only {reference!r:.40}")
    return float(key(answer) == wanted)


def find_reward(name: str) -> Callable[..., float]:
    """reward(messages, answer, reference, where) called match, exam, final or FILE.py:function."""
    keys = {"match": str.strip, "final": final_answer}
    if name == "exam":
        keys["exam"] = evaluation.lab("exams", "--reward exam").extract
    if name in keys:
        return functools.partial(score, functools.partial(same, keys[name]), name)
    path, _, function = name.rpartition(":")
    check(path.endswith(".py") and Path(path).is_file(),
          f"--reward: expected final, exam, match or FILE.py:function, found {name!r}")
    found = attempt(f"--reward: {path}", runpy.run_path, path)
    check(callable(found.get(function)), f"--reward: {path} has no function {function!r}")
    return functools.partial(score, found[function], name)


def score(reward: Callable, name: str, messages, answer: str, reference: str, where="") -> float:
    """What a reward says of an answer, a finite number; `where` is the row, if there is one."""
    place = f"--reward {name}, {where}".removesuffix(", ")
    found = attempt(place, reward, messages, answer, reference)
    # A number of numpy or torch will do. A text will not, though float() might read it.
    value = attempt(place, float, found) if hasattr(found, "__float__") else math.nan
    check(math.isfinite(value), f"{place}: expected a finite number, found {found!r:.60}")
    return value


def attempt(place: str, function: Callable, *arguments):
    """function(*arguments); what somebody else's code raises becomes an InputError in one line."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"{f.filename} line {f.lineno}: " for f in frames if f.filename in place]
        told = " ".join(str(error).split())
        raise InputError(f"{place}: {''.join(lines[-1:])}{kind}{told}") from None


# ==== read: the final answer of a text ============================================================

# What may stand between two braces: pairs of braces, in these others, and so on, eight deep. (A
# regular expression cannot count.)
BRACES = "[^{}]*"
for _ in range(8):
    BRACES = rf"[^{{}}]*(?:\{{{BRACES}\}}[^{{}}]*)*"
FINAL_ANSWERS = (
    rf"\\boxed\{{({BRACES})\}}",  # \boxed{x}
    r"####\s*(.+)",  # GSM8K's mark
    r"(?:答案(?:应该|应当)?[是为选：:]+|(?:所以|故|因此)选|[Aa]nswer(?: is|:)+)\s*"
    r"(.+?)(?=[，。；\n]|[.,;](?:\s|$)|$)",
    r"^\s*\(?([A-E])\)?\s*(?:[.、。:：)]|$)",  # an answer that begins with its letter
)


def final_answer(text: str) -> str:
    """The last \\boxed{}, "#### x", "答案是x", "answer is x"; a leading letter; or all.

    Reasoning does not count; an option is its letter; a number is the same however it is written.
    """
    # What stands behind the reasoning: nothing, if it never ends. Then 1,234, **bold**, \text{x}.
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    text = re.sub(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3})|\*\*|\$|\\(?=%)", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)

    # The surest mark that stands there counts, and of that mark the last.
    answer = text
    for pattern in reversed(FINAL_ANSWERS):
        found = re.findall(pattern, text)
        answer = found[-1] if found else answer

    # One spelling for each answer: width, minus signs, white space, the mark behind a letter.
    answer = unicodedata.normalize("NFKC", answer).replace("\u2212", "-").lower()
    answer = "".join(answer.split()).lstrip("。,;").rstrip(".。,;")
    if letter := re.match(r"\(?([a-e])(?:[).、:]|$)", answer):
        return letter[1]
    is_number = re.fullmatch(r"[+-]?(\d+(\.\d+)?|\.\d+)", answer)
    return f"{float(answer) + 0:.15g}" if is_number else answer  # + 0 makes 0 of -0


# ==== read: prompts, and answers to them ==========================================================


class Prompt(NamedTuple):
    """A question, up to where its answer begins, and the answer that its row has."""

    ids: list[int]
    messages: list[dict]
    reference: str
    source: int  # index of its file
    where: str  # file and line
    key: str  # what makes two prompts copies of each other
    targets: int = 1  # the mixer counts tokens


def load_prompts(files: list[str], tokenizer: ChatTokenizer, c, quiet: bool, room: int):
    """What the rows of some files ask, all whole, with `room` tokens left for an answer to each."""
    prompts, parse = [], functools.partial(data.parse_row, ask=True)
    for source, path in enumerate(files):
        for _, row in read_rows([path], c.skip_bad_rows, quiet, parse):
            if row is None:
                continue
            check(row.text is None, f"{row.where}: raw text asks nothing")
            asked, plan = evaluation.ask_row(row, tokenizer, "")
            messages, reference = asked["messages"], asked["reference"] or ""
            if ":" not in c.reward:  # a reward of ours, which refuses a row without an answer
                find_reward(c.reward)(messages, "", reference, row.where)
            ids = tokenizer.encode([plan])[0][0].tolist()
            check(len(ids) + room <= c.max_length, f"{row.where}: {len(ids)} tokens leave no "
                  f"room for an answer of {room} in --max_length {c.max_length}")
            prompts.append(Prompt(ids, messages, reference, source, row.where, str(ids)))
    return prompts, Counter()


def sample_answers(model, prompts: list[list[int]], numbers, how: Sampling, c, stop_ids: list[int],
                   hardware: Hardware) -> dict[int, Example]:
    """{i: prompts[i] and an answer to it, which alone is supervised}, of this rank's share.

    What is drawn for prompt i depends on the seed and numbers[i], not on its batch or its rank.
    """
    lengths, found = [len(ids) + c.max_new_tokens for ids in prompts], {}
    for chunk in data.micro_batches(lengths, c.micro_tokens, hardware.world)[hardware.rank]:
        with hardware.autocast():
            answers = modeling.generate(
                model, [prompts[i] for i in chunk], c.max_new_tokens, stop_ids=stop_ids,
                sampling=how, samples=[numbers[i] for i in chunk])

        # The answer's tokens are the span that is scored, and perhaps trained, with weight 1.
        for i, answer in zip(chunk, answers, strict=True):
            ids = np.array(prompts[i] + answer, dtype=np.int32)
            found[i] = Example(ids, ((len(prompts[i]), len(ids), 1.0),))
    return found


@torch.no_grad()
def sum_logprobs(model, examples: list[Example], c, hardware: Hardware) -> Tensor:
    """ln p of each answer, in nats: the sum over its tokens, [answers]; of a reward model its r."""
    out, lengths = torch.zeros(len(examples)), [len(e.ids) for e in examples]
    for chunk in data.micro_batches(lengths, c.micro_tokens, hardware.world)[hardware.rank]:
        batch = data.collate([examples[i] for i in chunk], hardware.device)
        with hardware.autocast():
            logp = model(batch.ids, batch.lengths, batch.targets).cpu()  # [N]

        # Every rank fills in its own answers; the sum of the ranks' tables has all of them.
        counts = [examples[i].targets for i in chunk]
        for i, of_answer in zip(chunk, logp.split(counts), strict=True):
            out[i] = of_answer.sum()
    return hardware.sum_tensor(out)


# ---- skip on a first reading: the command --------------------------------------------------------


def parse_answer(where: str, value) -> tuple[Row, str]:
    """(row, reference) of a row of `eval.py generate`; InputError for others."""
    row = data.parse_row(where, value)
    answered = len(row.messages) > 1 and row.messages[-1]["role"] == "assistant"
    check(isinstance(value, dict) and answered and not row.chosen,
          f"{where}: expected a question and an answer, as `eval.py generate` writes them")
    reference = value.get("reference")
    check(reference is None or data.is_text(reference), f"{where}: `reference` is no text")
    return row, reference or ""


def prompt_key(messages: list[dict], tools: list | None = None) -> str:
    """A conversation as a key: calls and reasoning are part of it, weights in training are not."""
    said = [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in messages]
    return json.dumps([said, tools], ensure_ascii=False, sort_keys=True)


def scores_by_prompt(files, reward: Callable, skip_bad_rows=None) -> dict[str, list[float]]:
    """The scores of all answers to each prompt, by `prompt_key`."""
    groups = {}
    for _, parsed in read_rows(files, skip_bad_rows, parse=parse_answer):
        if parsed:
            row, reference = parsed
            *asked, answer = row.messages
            group = groups.setdefault(prompt_key(asked, row.tools), [])
            group.append(reward(asked, answer["content"], reference, row.where))
    check(groups, f"{', '.join(files)}: no row to read")
    return groups


def main(c: Config) -> None:
    """Score every answer. Only a prompt whose answers differ can teach which of them is better."""
    groups = scores_by_prompt(c.files, find_reward(c.reward), c.skip_bad_rows)
    scores = [found for group in groups.values() for found in group]
    top = [max(group) for group in groups.values()]
    tied = sum(len(set(group)) == 1 for group in groups.values())
    print_table([("prompts", "answers", "mean reward", "best of n", "all alike"),
                 (len(groups), len(scores), f"{np.mean(scores):.3f}", f"{np.mean(top):.3f}", tied)])


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
