"""Ghost attention: an instruction at the start of a conversation that is still obeyed at its end.

Idea. "Answer politely" stands in the first turn; three turns later it is forgotten, since nothing
in the training data showed what comes of it so late. Ghost attention (Llama 2, arXiv:2307.09288,
section 3.3) makes such data from conversations and a model that obeys what it was just told:

    sample   S q1 -> a1,  S q2 -> a2,  S q3 -> a3      the instruction S before every question
    train    S q1 -> a1,    q2 -> a2,    q3 -> [a3]    before the first only, loss on a3 alone

The earlier answers are not trained on: with S right before them they teach nothing new.

    python -m labs.ghost                               # writes the demo's rows into out/ghost
    T="--learning_rate 1e-3 --epochs 4"
    python train_sft.py --model out/sft --data out/ghost/obey.jsonl --output_dir out/ghost/before $T
    python -m labs.ghost out/ghost/talks.jsonl --model out/ghost/before \\
        --output out/ghost/rows.jsonl
    python train_sft.py --model out/ghost/before --data out/ghost/rows.jsonl \\
        --output_dir out/ghost/after $T
    for M in before after; do python -m labs.ghost out/ghost/val.jsonl --model out/ghost/$M \\
        --first_only --reward labs/ghost.py:obeys; done

What you should see: before, an instruction rules its own turn, later ones are polite or rude by
chance. After, on held-out questions, it rules to the end. The exam, of which no row was trained
here, falls from 100 to 91%:

    turn  talks  obeyed before   after
    1       100         100.0%  100.0%
    2       100          60.0%  100.0%
    3       100          54.0%  100.0%
    4       100          67.0%  100.0%

Exercise. If all talks had four turns, at which turns would the trained model obey, and why?
    Solution: at the fourth (67% to 89% when tried), little at the second and third (37% to 48%, 62%
    to 63%): only the last answer is trained on. So the demo's talks have two to four turns.
"""

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
import eval as evaluation
import model as modeling
from labs.rewards import find_reward, sample_answers
from labs.text import Modelled, check_output, write_rows
from model import check
from train_sft import Hardware

POLITE, RUDE = "请礼貌地回答。", "请不客气地回答。"  # what the demo is told
OPENINGS = {POLITE: ("您好！", "好的，"), RUDE: ("这都不知道？", "真笨！")}
ENDINGS = {"您好！": "", "好的，": "", "这都不知道？": "别再烦我！", "真笨！": "自己不会查吗？"}


@dataclass
class Config(Modelled):
    """Write conversations in which an early instruction is still obeyed in the last answer."""

    files: list[str]  # conversations, of which the questions are taken
    model: str = ""  # checkpoint that obeys an instruction right before a question
    system: list[str] = field(default_factory=lambda: [POLITE, RUDE])  # each talk draws one
    first_only: bool = False  # do not write rows: tell it once, and see whether it is obeyed
    reward: str = ""  # FILE.py:function(messages, answer, system) that says so, by turn
    max_new_tokens: int = 64  # of an answer; a talk with an unfinished one is dropped
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of sampling, and of which talk draws which instruction


# ==== read: the idea ==============================================================================


def talk_of(questions: list[str], answers: list[str], system: str, every: bool) -> list[dict]:
    """Questions and answers as messages, the instruction before every question or the first."""
    messages = []
    for turn, question in enumerate(questions):
        text = f"{system}\n{question}".strip() if every or turn == 0 else question
        messages.append({"role": "user", "content": text})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn]})
    return messages


def ghost_row(questions: list[str], answers: list[str], system: str) -> dict:
    """The row to train on: told once, and only the last answer has a loss."""
    messages = talk_of(questions, answers, system, every=False)
    for m in messages[:-1]:
        if m["role"] == "assistant":
            m["train"] = False
    return {"messages": messages}


def answer_talks(model, tokenizer, talks: list[list[str]], systems: list[str],
                 c: Config) -> list[list[str | None]]:
    """The model's answers to every talk, turn by turn, each turn of all talks together.

    None stands for an answer that did not end.
    """
    answers = [[] for _ in talks]
    how = modeling.Sampling(temperature=c.temperature, seed=c.seed)
    hardware = Hardware(0, 1, model.device, torch.float32)  # the weights are in their type already
    for turn in range(max(map(len, talks))):
        # A talk goes on while it has questions, and while its answers end.
        going, prompts, numbers = [], [], []
        for i, (questions, system) in enumerate(zip(talks, systems, strict=True)):
            if len(questions) > turn and None not in answers[i]:
                said = talk_of(questions[: turn + 1], answers[i], system, not c.first_only)
                going.append(i)
                prompts.append(tokenizer.prompt_ids(said))
                numbers.append(turn * len(talks) + i)  # of what is drawn: another one every turn

        found = sample_answers(model, prompts, numbers, how, c, tokenizer.stop_ids, hardware)
        for k, e in found.items():
            *text, last = e.ids[len(prompts[k]) :].tolist()
            ended = last in tokenizer.stop_ids
            answers[going[k]].append(tokenizer.decode(text) if ended else None)
    return answers


def report(c: Config, reward: Callable, talks: list, systems: list, answers: list) -> None:
    """Print by turn in what share of the answers the instruction was obeyed."""
    table = [("turn", "talks", "obeyed")]
    for turn in range(max(map(len, talks))):
        # Who did not end an answer did not obey; later turns of that talk are not there.
        scores = []
        for questions, system, given in zip(talks, systems, answers, strict=True):
            if len(given) > turn:
                said = talk_of(questions[: turn + 1], given[:turn], system, not c.first_only)
                ended = given[turn] is not None
                scores.append(reward(said, given[turn], system) if ended else 0.0)
        # A mean above 1 is of a reward that counts: no share.
        if scores:
            mean = sum(scores) / len(scores)
            table.append((str(turn + 1), len(scores), mean if 0 <= mean <= 1 else f"{mean:.3f}"))
    data.print_table(table)


# ---- skip on a first reading: the demo, main -----------------------------------------------------


def obeys(messages: list[dict], answer: str, system: str) -> float:
    """The demo's reward: 1 if an answer opens as the instruction wants it."""
    check(system in OPENINGS, f"obeys knows {POLITE} and {RUDE} alone, not the --system {system!r}")
    return float(answer.startswith(OPENINGS[system]))


def obedient(questions: list[str], facts: list[str], rng: random.Random) -> dict:
    """A talk in which an instruction rules the answer after it, and nothing rules the others."""
    messages = []
    for question, fact in zip(questions, facts, strict=True):
        system = rng.choice((POLITE, RUDE, ""))
        opening = rng.choice(OPENINGS[system or rng.choice((POLITE, RUDE))])
        messages += [{"role": "user", "content": f"{system}\n{question}".strip()},
                     {"role": "assistant", "content": opening + fact + ENDINGS[opening]}]
    return {"messages": messages}


def make_demo(folder: Path, source: Path, seed: int = 0) -> None:
    """obey.jsonl, talks.jsonl and val.jsonl, of the questions of the demo's conversations."""
    rng, turns = random.Random(seed), {}
    for name in ("instructions", "instructions_val"):
        check((source / f"{name}.jsonl").is_file(), f"{source / name}.jsonl is missing; "
              "`python train_sft.py` makes the demo")
        # Each question, and the fact that answers it without any manners.
        turns[name] = []
        for _, row in data.read_rows([source / f"{name}.jsonl"], quiet=True):
            for user, answer in zip(row.messages[::2], row.messages[1::2], strict=True):
                fact = re.search("“.*”的.*是“.*”。", answer["content"])[0]
                turns[name].append((user["content"], fact))

    # Of talks, two to four turns long, only the last answer is trained on.
    for name, taken, count, least in (("obey", "instructions", 600, 1),
                                      ("talks", "instructions", 600, 2),
                                      ("val", "instructions_val", 100, 4)):
        rows = []
        for _ in range(count):
            chosen = rng.sample(turns[taken], rng.randint(least, 4))
            questions, facts = zip(*chosen, strict=True)
            if name == "obey":
                row = obedient(questions, facts, rng)
            else:
                row = {"messages": talk_of(questions, facts, "", every=False)}
            rows.append((row, ""))
        write_rows(folder / f"{name}.jsonl", rows)


def main(c: Config) -> None:
    """Let the model answer, then write rows or say what was obeyed."""
    check(c.model, "--model DIR is missing: who answers")
    check(c.first_only == bool(c.reward) and c.first_only != bool(c.output),
          "give --output to write rows, or --first_only and --reward to see what is obeyed")
    check(c.max_new_tokens > 0 and c.temperature >= 0, "--max_new_tokens must be above 0, "
          "--temperature not negative")
    if c.output:
        check_output(c.output, *c.files)
    reward = find_reward(c.reward) if c.reward else None

    # Of the conversations only the questions count; each talk draws an instruction.
    talks = []
    for _, row in data.read_rows(c.files, c.skip_bad_rows):
        questions = [m["content"] for m in row.messages if m["role"] == "user"] if row else []
        if questions:
            talks.append(questions)
    check(talks, f"{', '.join(c.files)}: nobody asks anything")
    rng = random.Random(c.seed)
    systems = [rng.choice(c.system) for _ in talks]

    # A reward that cannot judge an instruction says so before the model has answered for an hour.
    if c.first_only:
        for system in c.system:
            reward([{"role": "user", "content": talks[0][0]}], "", system)

    tokenizer = data.ChatTokenizer(c.model, c.template)
    model = evaluation.open_model(c, tokenizer)
    answers = answer_talks(model, tokenizer, talks, systems, c)
    if c.first_only:
        report(c, reward, talks, systems, answers)
        return

    # One turn is no late turn: its instruction stands right before the answer.
    rows = []
    for questions, system, given in zip(talks, systems, answers, strict=True):
        why = "an answer that did not end" if None in given else ""
        why = why or ("one turn only" if len(questions) < 2 else "")
        rows.append(({} if why else ghost_row(questions, given, system), why))
    write_rows(c.output, rows)


if __name__ == "__main__":
    with data.one_line_errors():
        if len(sys.argv) == 1:
            make_demo(Path("out/ghost"), Path("out/demo"))
        else:
            main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
