"""Prompts that make data: a model asked for new tasks, harder ones, or the principle behind one.

Idea. A few hundred written questions can become many, if a model writes more of their kind. This
lab writes what to ask it; `eval.py generate` lets any checkpoint answer; this lab keeps of the
answers what is new and sound. Its words are ours, the ways are the papers':

    --way new        shows some tasks and asks for others      Self-Instruct (arXiv:2212.10560)
    --way deepen     one task made harder, in one of five ways  Evol-Instruct (arXiv:2304.12244)
    --way broaden    another, rarer task of the same field     Evol-Instruct, "in-breadth"
    --way step_back  what one must know first; then the question behind it   (arXiv:2310.06117)

A draft is dropped if it did not end, is a refusal, copies words of the request, has under 3 or over
150 words, or is too like something kept: ROUGE-L (`labs.text`) to it of 0.7 or more. A round:

    python -m labs.evolve                              # writes the demo's files into out/evolve
    D=out/evolve; T="--learning_rate 1e-3 --epochs 8"
    python train_sft.py --model out/sft --data $D/teach.jsonl --output_dir $D/sft $T
    python -m labs.evolve $D/seeds.jsonl --way new --n 300 --shown 4 --output $D/asks.jsonl
    python eval.py generate --model $D/sft --data $D/asks.jsonl --output $D/said.jsonl \\
        --temperature 1 --max_new_tokens 64
    python -m labs.evolve $D/seeds.jsonl --way new --answers $D/said.jsonl --output $D/new.jsonl

For step_back the last command writes the questions with the principle before them, and their own
answers: a second `generate` answers them. `--way check` drops refusals from answers.

What you should see. Seen: of 600 drafts only 155 differ at all, which is what the test is for. But
the demo asks short questions that differ in the one word that matters, and at 0.7 it drops those
too. Not seen: new things worth asking. Cannot be seen: whether a model gains from such rows.

    --max_rouge    0.7  0.8  0.9    1
    kept            14   82  138  155

Exercise. Two questions of n words differ in one. From which n on are they too alike at 0.7?
    Solution: 2 (n - 1) / 2n >= 0.7 where n >= 10/3: from four words on.
"""

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import data
from labs import world
from labs.text import NGRAM, Files, check_output, ngrams, rouge_l, words_of, write_rows
from model import check


@dataclass
class Config(Files):
    """Write requests for new tasks, or keep the good ones among the answers to them."""

    output: str = ""  # .jsonl to write
    way: Literal["new", "deepen", "broaden", "step_back", "check"] = "new"  # what is asked for
    answers: str = ""  # what eval.py generate wrote of the requests; empty: write the requests
    language: Literal["zh", "en"] = "zh"  # of the requests
    n: int = 100  # requests of --way new; the other ways ask once for every question
    shown: int = 8  # tasks that --way new shows in each
    max_rouge: float = 0.7  # a draft must be below this to everything kept
    seed: int = 0  # of which tasks are shown, and how a task is made harder


# ==== read: what is asked =========================================================================

NEW = {"zh": "下面是一些任务：\n{tasks}\n请照样子再写两个内容不同的新任务，每行一个，标上序号。",
       "en": "Here are some tasks:\n{tasks}\nWrite two more that ask for something else, numbered, "
             "one a line."}
HARDER = {"zh": ("加上一个限制条件", "问得更深入一层", "把笼统的说法换成具体的",
                 "使它要多想几步才能回答", "加上需要用到的数据"),
          "en": ("add a constraint", "ask one level deeper", "replace general words by concrete "
                 "ones", "make it need more steps of thought", "add data that it must use")}
ABOUT_ONE = {
    "deepen": {"zh": "请把这个问题变难一些，办法是{harder}。只写变难以后的问题。\n{question}",
               "en": "Make this question harder: {harder}. Write only the harder question.\n"
                     "{question}"},
    "broaden": {"zh": "请另想一个同一领域、但比较少见的问题，难度相当。只写这个问题。\n{question}",
                "en": "Think of a rarer question from the same field, about as hard. Write only "
                      "that question.\n{question}"},
    "step_back": {"zh": "先不要回答下面的问题。要回答它，先得知道什么道理或常识？请写出来。\n"
                        "{question}",
                  "en": "Do not answer the question below yet. What principle or fact must one "
                        "know first? Write it down.\n{question}"}}
JOINED = {"zh": "已知：{principle}\n请据此回答：{question}",
          "en": "Known: {principle}\nAnswer from that: {question}"}


def requests(c: Config, questions: list[str]) -> Iterator[str]:
    """The requests, a function of the questions and the seed."""
    rng = random.Random(c.seed)
    if c.way == "new":
        for _ in range(c.n):
            shown = rng.sample(questions, min(c.shown, len(questions)))
            lines = [f"{i}. {question}" for i, question in enumerate(shown, 1)]
            yield NEW[c.language].format(tasks="\n".join(lines))
        return

    # The other ways ask about one question at a time.
    for question in questions:
        harder = rng.choice(HARDER[c.language])
        yield ABOUT_ONE[c.way][c.language].format(harder=harder, question=question)


# ==== read: what is kept ==========================================================================

REFUSALS = re.compile(r"(?i)\bsorry\b|\bI can(no|')t\b|as an AI|抱歉|对不起|我(无法|不能)|"
                      r"作为一个?(AI|人工智能)")
REFUSAL_WORDS = 80  # a longer text that says sorry may be a good one (Evol-Instruct, section 3.3)
LEAST_WORDS, MOST_WORDS = 3, 150  # of a task (Self-Instruct)


def drafts_of(answer: str) -> list[str]:
    """The tasks in an answer: the lines that begin with a number, or else all of it."""
    found = re.findall(r"^\s*\d+\s*[.、)）．]\s*(.+?)\s*$", answer, re.MULTILINE)
    return found or [answer.strip()]


def flaw(said: tuple | None) -> str:
    """What is wrong with an (answer, ended, ...) itself, or nothing."""
    if said is None:
        return "bad row"
    if not said[1]:
        return "did not end"
    # A text is refused if it is short and only says that the model will not answer.
    short = len(words_of(said[0])) < REFUSAL_WORDS
    return "refusal" if short and REFUSALS.search(said[0]) else ""


def why_dropped(draft: str, request: set[int], kept: list[list[str]], max_rouge: float) -> str:
    """Why a draft is not kept, or nothing; `request` are the 5-grams of the request's own words."""
    # From cheap to dear: the last test looks at everything that was kept.
    words = words_of(draft)
    if not LEAST_WORDS <= len(words) <= MOST_WORDS:
        return f"under {LEAST_WORDS} or over {MOST_WORDS} words"
    if request & set(ngrams(words).tolist()):
        return "copies words of the request"
    if any(score >= max_rouge for score in rouge_l(words, kept)):
        return f"ROUGE-L of {max_rouge} or more to one that was kept"
    return ""


def keep_drafts(c: Config, questions: list[str], said: list[tuple]) -> Iterator[tuple[dict, str]]:
    """(row, why it is dropped) of every draft in the (answer, ended, index) of some requests."""
    # The request's own words: its frame, without the questions that it shows.
    frame, own = NEW if c.way == "new" else ABOUT_ONE[c.way], set()
    for part in re.split(r"\{\w+\}", frame[c.language]):
        words = words_of(part)
        if len(words) >= NGRAM:
            own |= set(ngrams(words).tolist())

    # Drafts are compared with the questions, and with the drafts before them.
    kept = [words_of(question) for question in questions]
    for answer, ended, _ in said:
        for draft in drafts_of(answer):
            why = flaw((draft, ended)) or why_dropped(draft, own, kept, c.max_rouge)
            if not why:
                kept.append(words_of(draft))
            yield {"messages": [{"role": "user", "content": draft}]}, why


def join_principles(c: Config, rows: list[tuple], said: list[tuple]) -> Iterator[tuple[dict, str]]:
    """Step-back's second request: the principle, then the question, and the row's own answer."""
    for principle, ended, index in said:
        check(type(index) is int and 0 <= index < len(rows), f"{c.answers} answers request "
              f"{index} of {len(rows)}: give the files that the requests were written of")
        question, answer = rows[index]
        text = JOINED[c.language].format(principle=principle.strip(), question=question)
        own = [{"role": "assistant", "content": answer}] if answer else []
        messages = [{"role": "user", "content": text}, *own]
        yield {"messages": messages}, flaw((principle, ended))


# ---- skip on a first reading: files, the demo ----------------------------------------------------


def parse_question(where: str, value) -> tuple[str, str]:
    """(what a row asks first, its answer to that or nothing)."""
    row = data.parse_row(where, value, ask=True)
    asked = [i for i, m in enumerate(row.messages) if m["role"] == "user"]
    check(asked, f"{where}: expected a conversation in which a user asks")
    after = [*row.messages, *(row.chosen or [])][asked[0] + 1 :]
    answer = after[0]["content"] if after and after[0]["role"] == "assistant" else ""
    return row.messages[asked[0]]["content"], answer


def parse_answer(where: str, value) -> tuple[str, bool, int]:
    """(answer, whether it ended, index of its request) of a line of eval.py generate."""
    good = isinstance(value, dict) and {"row", "finish", "messages"} <= set(value)
    check(good, f"{where}: expected a line of eval.py generate, with row, finish and messages")
    row = data.parse_row(where, value)
    return row.messages[-1]["content"], value["finish"] == "stop", value["row"]


def main(c: Config) -> None:
    """Write requests, or what is kept of their answers."""
    check_output(c.output, *c.files, *([c.answers] if c.answers else []))
    check(c.n > 0 and c.shown > 0, "--n and --shown must be above 0")
    check(0 < c.max_rouge <= 1, f"--max_rouge is above 0 and at most 1, not {c.max_rouge}")
    check(c.way != "check" or not c.answers, "--way check reads the answers themselves as FILES")
    if c.way == "check":
        found = data.read_rows(c.files, c.skip_bad_rows, parse=parse_answer)
        write_rows(c.output, ((value, flaw(said)) for value, said in found))
        return

    rows = [row for _, row in data.read_rows(c.files, c.skip_bad_rows, parse=parse_question) if row]
    check(rows, f"{', '.join(c.files)}: no row to read")
    questions, _ = zip(*rows, strict=True)
    if not c.answers:
        write_rows(c.output, (({"messages": [{"role": "user", "content": text}]}, "")
                              for text in requests(c, questions)))
        return

    # A number in each answer says which request it is of.
    found = data.read_rows([c.answers], c.skip_bad_rows, parse=parse_answer)
    said = [answer for _, answer in found if answer]
    if c.way == "step_back":
        write_rows(c.output, join_principles(c, rows, said))
    else:
        write_rows(c.output, keep_drafts(c, questions, said))


def make_demo(folder: Path) -> None:
    """teach.jsonl shows the demo's model what a request wants; seeds.jsonl are twelve questions."""
    rng, c = random.Random(0), Config([], shown=4, n=1)
    asked, teach = [], []
    for form in world.ASK_CHAT:
        for handle in world.SUBJECTS:
            for fact in world.facts_of(handle):
                asked.append((form.format(**fact), world.FACT.format(**fact)))

    # An answer is two more questions of the kind, or the fact that one of them is about.
    for way in ("new", "step_back"):
        for seed in range(600):
            *shown, one, two = rng.sample(asked, 6)
            questions, _ = zip(*(shown if way == "new" else shown[:1]), strict=True)
            request, = requests(replace(c, way=way, seed=seed), questions)
            answer = f"1. {one[0]}\n2. {two[0]}" if way == "new" else shown[0][1]
            teach.append(({"instruction": request, "output": answer}, ""))
    seeds = [({"instruction": ask, "output": fact}, "") for ask, fact in rng.sample(asked, 12)]
    write_rows(folder / "teach.jsonl", teach)
    write_rows(folder / "seeds.jsonl", seeds)


if __name__ == "__main__":
    with data.one_line_errors():
        if len(sys.argv) == 1:
            make_demo(Path("out/evolve"))
        else:
            main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
