"""Examine a checkpoint: exams, log-probabilities of a file, answers, a conversation.

    python eval.py exam --model DIR... --data DIR --output_dir out/ceval   # C-Eval, CMMLU
    torchrun --nproc_per_node=8 eval.py exam --model DIR --data DIR --protocol lm_eval
    python eval.py logprobs --model DIR --data FILE --output FILE.jsonl    # loss and perplexity
    python eval.py generate --model DIR --data FILE --output FILE.jsonl --n 4 --temperature 0.8
    python eval.py chat --model DIR

An exam asks which of four letters has the highest log-probability after a prompt. First comes how
it asks, how an answer scores and what a score is worth; then the other three commands; then files,
and flags. labs/exams.py adds MMLU, more protocols and answers in words, labs/scores.py the table.
Without flags a command takes the checkpoint and the exam that the demo leaves.
"""

import contextlib
import csv
import hashlib
import importlib
import json
import math
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import model as modeling  # isort: skip  # before torch: it says how threads wait
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import InputError, check


@dataclass
class Common:
    """What every command that loads a model takes."""

    model: str = "out/sft"  # checkpoint folder in Hugging Face layout
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out
    template: str = ""  # chatml, plain, a name of labs/templates, a .jinja file; empty: its own


@dataclass
class Exam(Common):
    """Score checkpoints on the multiple-choice questions of C-Eval, CMMLU or MMLU."""

    model: list[str] = field(default_factory=list)  # checkpoints; empty: the demo's last
    data: str = ""  # folder of CSV files; empty: the demo's exam, --chat --shots 0
    benchmark: Literal["", "ceval", "cmmlu", "mmlu"] = ""  # layout of the files; empty: recognised
    split: Literal["", "val", "test"] = ""  # empty: val of C-Eval, test of the others
    subjects: list[str] = field(default_factory=list)  # some of them; empty: all
    shots: int = -1  # solved questions of dev before each one, 0 to 5; -1: 5, with steel 0
    protocol: Literal["official", "lm_eval", "qwen", "cot", "steel"] = "official"  # PROTOCOLS
    subject_names: Literal["zh", "handle"] = "zh"  # in C-Eval's header; its code writes the handle
    chat: bool = False  # ask in the checkpoint's chat template, shots as earlier turns
    thinking: Literal["auto", "on", "off"] = "auto"  # reason before the letter; auto: as it does
    thinking_tokens: int = 2048  # of reasoning and answer; at most half of the context
    skip_bad_rows: bool = False  # list and leave out questions that cannot be read
    output_dir: str = "out/exam"  # results.json, predictions.jsonl, accuracy.png


# ==== read: how an exam asks ======================================================================

LETTERS = "ABCD"


class Subject(NamedTuple):
    """The part of an exam that shares a header and shots."""

    handle: str
    name: str  # in the header
    category: str
    shots: list[dict]  # solved questions
    questions: list[dict]


class Protocol(NamedTuple):
    """How a benchmark is asked; {stripped} is the question without outer white space.

        prompt = header + shots + question + ending + begin
        shot   = question + ending + answer + two line ends
    """

    header: str
    question: str
    ending: str
    answer: str  # {answer} is a letter; filled in with A, B, C, D these are the scored options
    scored: Literal["next token", "sum", "text"] = "next token"  # argmax of ln p, or words
    begin: str = ""  # of the answer: it stands in the prompt already; not in a chat template
    tokens: int = 0  # of an answer in words


FOUR = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
CEVAL = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
CEVAL_LM_EVAL = "以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n"
CMMLU = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n"
PROTOCOLS = {  # labs/exams.py adds to them
    "official": {  # code of the benchmarks' authors
        "ceval": Protocol(CEVAL, "{question}" + FOUR, "\n答案：", "{answer}"),
        "cmmlu": Protocol(CMMLU, "题目：{question}" + FOUR, "\n答案是：", "{answer}")},
    "lm_eval": {  # EleutherAI's harness; it would move a space at a prompt's end to the options
        "ceval": Protocol(CEVAL_LM_EVAL, "{stripped}" + FOUR, "\n答案：", " {answer}", "sum"),
        "cmmlu": Protocol(CMMLU, "{stripped}" + FOUR, "\n答案：", " {answer}", "sum")},
}


def prompt_plan(tokenizer: data.ChatTokenizer, subject: Subject, question: dict, shots: int,
                p: Protocol, chat: bool) -> tuple[data.Plan, str]:
    """(a question after the last `shots` solved ones, the space that an answer begins with)."""
    solved = subject.shots[len(subject.shots) - shots :]
    answers = [p.answer.format(**row) for row in solved]
    asked = [(p.question + p.ending).format(**row) for row in (*solved, question)]
    asked[0] = p.header.format(subject=subject.name) + asked[0]

    # A base model reads one text, in which solved questions stand before the open one.
    if not chat:
        text = ""
        for shot, answer in zip(asked, answers, strict=False):
            text += f"{shot}{answer}\n\n"
        return tokenizer.text(text + asked[-1] + p.begin, end=False), ""

    # In a chat template each shot is a turn, as in C-Eval's code for chat models.
    messages = [{"role": "user", "content": asked[0]}]
    for answer, text in zip(answers, asked[1:], strict=True):
        messages.append({"role": "assistant", "content": answer.strip()})
        messages.append({"role": "user", "content": text})

    # A letter is scored where an answer without reasoning begins. Words may begin with reasoning.
    if p.scored == "text":
        return tokenizer.prompt(messages), ""
    return tokenizer.answer_prompt(messages)


# ---- skip on a first reading: the prompts of a subject -------------------------------------------


def option_ids(tokenizer: data.ChatTokenizer, prompt: data.Plan, space: str, p: Protocol,
               chat: bool) -> list[tuple]:
    """The ids of the four options after a prompt: encode(prompt + option)[len(encode(prompt)):].

    Raises InputError if the options are not four different ones: every answer would be A.
    """
    # Encoded alone a letter may get a BOS or a space before it, so each stands behind the prompt.
    form = space + "{answer}" if chat else p.answer
    texts, plans, options = [], [], []
    for letter in LETTERS:
        texts.append(form.format(answer=letter))
        whole = prompt.text + texts[-1]
        plans.append(prompt._replace(text=whole, places=((len(prompt.text), len(whole), 1.0),)))

    # The span says at which token the option begins; no span: the tokenizer dropped it.
    for ids, spans in tokenizer.encode(plans):
        option = tuple(ids[spans[0][0] :].tolist()) if spans else ()
        options.append(option[:1] if p.scored == "next token" else option)

    if len(set(options)) < 4 or not all(options):
        hint = "" if chat else " (--protocol lm_eval takes several tokens)"
        raise InputError(f"{tokenizer.folder}: after a prompt {texts} have the ids {options}: "
                         f"not four different options{hint}")
    return options


class Sheet(NamedTuple):
    """A subject in a checkpoint's tokens."""

    subject: Subject
    protocol: Protocol
    prompts: list  # ids of each question's prompt; None where it does not fit even alone
    shots: list  # how many of the shots are in it, or None
    options: list[tuple]  # ids of A, B, C, D after a prompt; none where the answer is words
    first: str  # the first prompt as text


def make_sheet(tokenizer: data.ChatTokenizer, subject: Subject, c: Exam, context: int) -> Sheet:
    """Encode every prompt whole; one longer than the context loses whole shots, oldest first."""
    p = PROTOCOLS[c.protocol][c.benchmark]
    if c.thinking == "on":
        p = p._replace(scored="text", tokens=min(c.thinking_tokens, context // 2))
    plans = []
    for question in subject.questions:
        plan, space = prompt_plan(tokenizer, subject, question, c.shots, p, c.chat)
        plans.append(plan)

    # Behind a prompt there must be room for words, or for the longest option but its last token.
    options = [] if p.scored == "text" else option_ids(tokenizer, plans[0], space, p, c.chat)
    room = context - (p.tokens or max(map(len, options)) - 1)

    # Whole shots go, since half a shot would teach the wrong form.
    prompts, kept, first = [], [], ""
    encoded = tokenizer.encode(plans)
    for question, plan, (ids, _) in zip(subject.questions, plans, encoded, strict=True):
        shots = c.shots
        while len(ids) > room and shots > 0:
            shots -= 1
            plan, _ = prompt_plan(tokenizer, subject, question, shots, p, c.chat)
            ids = tokenizer.encode([plan])[0][0]
        fits = len(ids) <= room
        prompts.append(ids.tolist() if fits else None)
        kept.append(shots if fits else None)
        first = first or tokenizer.decode(plan.start) + plan.text
    return Sheet(subject, p, prompts, kept, options, first)


# ==== read: how an answer scores ==================================================================


@torch.no_grad()
def score_options(model, prompts: list[list[int]], options: list[tuple], micro_tokens: int):
    """ln p(option | prompt) in nats of every option after every prompt: [prompts, options].

    ln p(o_1 .. o_m | prompt) = sum_j ln p(o_j | prompt, o_1 .. o_(j-1)). What all prompts begin
    with (an exam's header and shots) is encoded once; every prompt continues that prefix.
    """
    # A prompt keeps a token of its own: the state of its last token predicts the option.
    shared = min(data.common_prefix(prompts), len(min(prompts, key=len)) - 1)
    rests = [ids[shared:] for ids in prompts]
    prefix = None
    if shared:
        ids = torch.tensor(prompts[0][:shared], device=model.device)
        _, prefix = model.hidden(ids, [shared], keep_kv=True, wanted=ids[:0])  # no states

    # All prompts of a chunk continue the one prefix, number 0.
    score = score_letters if max(map(len, options)) == 1 else score_texts
    scores = torch.empty(len(prompts), len(options))
    for chunk in data.micro_batches(list(map(len, rests)), micro_tokens)[0]:
        before = prefix.select([0] * len(chunk)) if shared else None
        scores[chunk] = score(model, [rests[i] for i in chunk], options, before).cpu()
    return scores


def score_letters(model, rests: list[list[int]], options: list[tuple], prefix) -> torch.Tensor:
    """Options of one token: one pass, each option read off the next token's distribution."""
    lengths = list(map(len, rests))
    ids = torch.tensor(list(chain(*rests)))  # [T]

    # Only the state of a prompt's last token is wanted.
    last = modeling.send(torch.tensor(lengths).cumsum(0) - 1, model.device)  # [B]
    states, _ = model.hidden(modeling.send(ids, model.device), lengths, prefix, wanted=last)
    logp = model.next_logits(states).log_softmax(-1)  # [B, V]
    return logp[:, list(chain(*options))]  # [B, options]


# ---- skip on a first reading: options of several tokens, the answers of a subject ----------------


def score_texts(model, rests: list[list[int]], options: list[tuple], prefix) -> torch.Tensor:
    """Options of several tokens: one pass per option, which stands behind every prompt."""
    columns = []
    for option in options:
        wholes = [[*rest, *option] for rest in rests]
        lengths = list(map(len, wholes))
        ids = torch.tensor(list(chain(*wholes)), device=model.device)  # [T]

        # The option is the last m tokens of every example.
        ends = torch.tensor(lengths, device=model.device).cumsum(0)  # [B]
        places = torch.arange(-len(option), 0, device=model.device)  # [m]
        targets = (ends[:, None] + places).flatten()  # [B * m] flat indices of the option's tokens
        logp = model(ids, lengths, targets, prefix)  # [B * m]
        columns.append(logp.view(len(rests), len(option)).sum(1))  # [B]
    return torch.stack(columns, 1)  # [B, options]


def answer_sheet(model, tokenizer: data.ChatTokenizer, sheet: Sheet,
                 micro_tokens: int) -> list[dict]:
    """The lines of predictions.jsonl of a subject."""
    lines, groups = [], {}
    for i, (question, shots) in enumerate(zip(sheet.subject.questions, sheet.shots, strict=True)):
        lines.append({"subject": sheet.subject.handle, "id": question["id"],
                      "answer": question.get("answer"), "prediction": None, "logprobs": None,
                      "shots": shots})
        groups.setdefault(shots, []).append(i)

    # Prompts that kept the same shots begin alike, and so share a long prefix. A question that
    # does not fit the context at all stays without an answer.
    groups.pop(None, None)
    for places in groups.values():
        prompts = [sheet.prompts[i] for i in places]
        if sheet.protocol.scored == "text":
            words = lab("exams", "an answer in words")
            found = words.answer_in_words(model, tokenizer, prompts, sheet.protocol, micro_tokens)
        else:
            with modeling.eager():  # lengths are new each time
                scores = score_options(model, prompts, sheet.options, micro_tokens)
            found = map(choose_letter, scores)
        for i, answer in zip(places, found, strict=True):
            lines[i] |= answer
    return lines


def choose_letter(scores: torch.Tensor) -> dict:
    """The likeliest letter as a prediction; none if a checkpoint is broken and gives NaN."""
    logprobs = dict(zip(LETTERS, scores.tolist(), strict=True))
    if not scores.isfinite().all():
        return {}
    return {"prediction": max(LETTERS, key=logprobs.get), "logprobs": logprobs}


def let_think(model, tokenizer: data.ChatTokenizer, c: Exam, sheets: list[Sheet]) -> list[Sheet]:
    """Other sheets for a checkpoint that reasons before it answers: with prompts that let it."""
    exams = lab("exams") if c.thinking == "auto" and c.chat else None
    if exams is None or not exams.thinks(model, tokenizer, sheets):
        return sheets

    # Behind an empty block of reasoning, where letters are scored, it would answer something else.
    c, context = replace(c, thinking="on"), model.config.max_position_embeddings
    return [make_sheet(tokenizer, sheet.subject, c, context) for sheet in sheets]


def training_exam(tokenizer: data.ChatTokenizer, folder: str | Path, context: int,
                  quiet: bool = True) -> tuple[Exam, list[Sheet]]:
    """How an exam is asked during training: in the chat template, without shots."""
    c = resolve_exam(Exam(data=str(folder), shots=0, chat=True))
    sheets = [make_sheet(tokenizer, subject, c, context) for subject in read_exam(c)]
    check("answer" in sheets[0].subject.questions[0], f"{folder}/{c.split}: no column answer")

    # What makes the curve mean less is said before training.
    if not quiet and (scores := lab("scores")):
        scores.say_what_is_lost(tokenizer, sheets)
    return c, sheets


def count_right(model, tokenizer: data.ChatTokenizer, folder: str | Path,
                micro_tokens: int = 8192, rank: int = 0, world: int = 1) -> tuple[int, int]:
    """(right, questions) of a training_exam; of several ranks each asks its share of subjects."""
    context, lines = model.config.max_position_embeddings, []
    sheets = let_think(model, tokenizer, *training_exam(tokenizer, folder, context))
    for sheet in sheets[rank::world]:
        lines += answer_sheet(model, tokenizer, sheet, micro_tokens)
    return sum(line["prediction"] == line["answer"] for line in lines), len(lines)


# ==== read: what a score is worth =================================================================


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share, n = count (Wilson 1927): |right/n - p| <= z sqrt(p (1-p) / n)."""
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)  # against rounding


# ---- skip on a first reading: results.json -------------------------------------------------------


CATEGORIES = ("STEM", "Social Science", "Humanities", "Other")
HARD = ("advanced_mathematics discrete_mathematics probability_and_statistics college_chemistry "
        "college_physics high_school_mathematics high_school_chemistry high_school_physics").split()


def summarize(benchmark: str, subjects: list[Subject], answers: list[dict]) -> dict:
    """What results.json says of a checkpoint's answers; null where the split has no labels.

    micro is the share of questions answered rightly, macro the mean of the subjects' shares, floor
    the share of the letter that is right most often: what a checkpoint gets that knows nothing.
    """
    labelled, n = "answer" in subjects[0].questions[0], len(answers)
    right = {s.handle: [] for s in subjects}
    for a in answers:
        right[a["subject"]].append(a["prediction"] == a["answer"])

    def mean(values: list) -> float | None:
        return sum(values) / len(values) if labelled else None

    def averages(handles: list[str]) -> dict:
        together = list(chain(*map(right.get, handles)))
        return {"subjects": len(handles), "questions": len(together),
                "correct": sum(together) if labelled else None,
                "macro": mean([mean(right[h]) for h in handles]), "micro": mean(together)}

    # The subjects one by one, then all, those of each category, and of C-Eval its eight hard ones.
    scores, groups = {}, {name: [] for name in CATEGORIES}
    for s in subjects:
        scores[s.handle] = {"category": s.category, "questions": len(right[s.handle]),
                            "accuracy": mean(right[s.handle])}
        groups[s.category].append(s.handle)
    groups["C-Eval Hard"] = [h for h in right if h in HARD and benchmark == "ceval"]
    total = averages(list(right))

    # A score is worth nothing without its floor and interval, or if shots were lost.
    letters, shots = Counter(a["prediction"] for a in answers), Counter(a["shots"] for a in answers)
    best, times = Counter(a["answer"] for a in answers).most_common(1)[0]
    return {
        **total, "interval": wilson(total["correct"], n) if labelled else None,
        "floor": {"letter": best, "micro": times / n} if labelled else None,
        "letters": {x: letters[x] / n for x in LETTERS}, "invalid": letters[None] / n,
        "unfinished": sum(a.get("unfinished", False) for a in answers),
        "shortened": n - shots[len(subjects[0].shots)] - shots[None], "too_long": shots[None],
        "categories": {name: averages(handles) for name, handles in groups.items() if handles},
        "subjects": scores}


# ---- skip on a first reading: log-probabilities of a file ----------------------------------------


@dataclass
class Logprobs(Common):
    """Write ln p of every supervised token of some files; print their mean loss and perplexity."""

    data: list[str] = field(default_factory=list)  # files of any training format
    output: str = ""  # .jsonl: token_ids and logprobs of every example, in order; empty: none
    train_on: Literal["all", "last"] = "all"  # answers of a conversation that are supervised
    max_length: int = 2048  # tokens of an example; longer ones are truncated, raw text is split


@torch.no_grad()
def example_logprobs(model, examples: list[data.Example], micro_tokens: int):
    """Yield (index, ln p of its supervised tokens, in nats) for every example, short ones first."""
    chunks = data.micro_batches([len(e.ids) for e in examples], micro_tokens)[0]
    for chunk in tqdm(chunks, desc="log-probabilities", unit=" batches", disable=None):
        # Examples end to end: no padding, one head pass at the supervised positions.
        part = [examples[i] for i in chunk]
        batch = data.collate(part, model.device)
        logp = model(batch.ids, batch.lengths, batch.targets).cpu()  # [N]
        yield from zip(chunk, logp.split([e.targets for e in part]), strict=True)


def logprobs_command(c: Logprobs) -> None:
    """`eval.py logprobs`."""
    check_flags(c)
    # All that can be wrong with the input is said before the weights are read.
    tokenizer = data.ChatTokenizer(c.model, c.template)
    examples, counts = data.load_examples(c.data, tokenizer, c.train_on, c.max_length, quiet=False,
                                          keep_all=True)
    model = open_model(c, tokenizer)

    # The loss is the weighted mean over all supervised tokens, as in training.
    counts["supervised tokens"] = 0
    lines, total, weights = [""] * len(examples), 0.0, 0.0
    for i, logp in example_logprobs(model, examples, c.micro_tokens):
        values, line = logp.tolist(), [None] * len(examples[i].ids)
        counts["supervised tokens"] += len(values)
        for first, end, weight in examples[i].spans:
            line[first:end], values = values[: end - first], values[end - first :]
            total -= weight * sum(line[first:end])
            weights += weight * (end - first)
        lines[i] = json.dumps({"token_ids": examples[i].ids.tolist(), "logprobs": line}) + "\n"
    if c.output:
        modeling.write_lines(Path(c.output), lines)

    # A file without supervised tokens has no loss. Past 709 nats math.exp would raise an error.
    print(f"{len(examples)} examples", *(f"{n} {what}" for what, n in counts.items()), sep=", ")
    loss = torch.tensor(total / weights if weights else math.nan, dtype=torch.float64)
    print(f"loss {loss:.6f} nats per supervised token, perplexity {loss.exp():.4f}")


# ---- skip on a first reading: answers, and a conversation ----------------------------------------


@dataclass
class Chat(Common, modeling.Sampling):
    """Talk to a checkpoint: /reset forgets the conversation, /quit (or Ctrl-D) ends it."""

    max_new_tokens: int = 512  # stop after this many tokens
    system: str = ""  # system message of conversations that have none


@dataclass
class Generate(Chat):
    """Answer every row of some files: prompts, or conversations whose last answer is left out."""

    data: list[str] = field(default_factory=list)  # files of prompts or conversations
    output: str = ""  # .jsonl: one object per sample, with messages, reference and finish
    n: int = 1  # samples per row


def ask_row(row: data.Row, tokenizer: data.ChatTokenizer, system: str) -> tuple[dict, data.Plan]:
    """(what a row asks: text, or messages and reference; its prompt); InputError if nobody asks."""
    if row.text is not None:
        return {"text": row.text}, tokenizer.text(row.text, end=False)

    # An answer that the row holds is left out of the prompt, and kept to be compared with.
    messages, reference = list(row.messages), None
    if row.chosen:
        reference = row.chosen[-1]["content"]
    elif messages and messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"]
    check(messages and messages[-1]["role"] in ("user", "tool"),
          f"{row.where}: expected a conversation in which the user asks last")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    asked = {"messages": messages, "reference": reference}
    if row.tools:
        asked["tools"] = row.tools
    return asked, tokenizer.prompt(messages, row.tools)


def repetition(ids: list[int]) -> float:
    """The share of an answer's 5-grams of tokens that stood in it before."""
    grams = [tuple(ids[i : i + 5]) for i in range(len(ids) - 4)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answer_line(tokenizer: data.ChatTokenizer, asked: dict, k: int, n: int, ids: list[int]) -> str:
    """A line of the output: sample k, as a row that can be trained on again."""
    stopped = bool(ids) and ids[-1] in tokenizer.stop_ids
    text = tokenizer.decode(ids[:-1] if stopped else ids)
    line = {"row": k // n, "sample": k % n, "finish": "stop" if stopped else "length",
            "tokens": len(ids), "repetition": repetition(ids), **asked}
    if "text" in asked:
        line["text"] += text
    else:
        line["messages"] = [*asked["messages"], {"role": "assistant", "content": text}]
    return json.dumps(line, ensure_ascii=False) + "\n"


def generate_command(c: Generate) -> None:
    """`eval.py generate`. Sample k is of row k // n; what is drawn for it depends on k alone."""
    check_flags(c)
    check(os.environ.get("WORLD_SIZE", "1") == "1",
          "generate runs in one process: start it with python, not with torchrun")
    tokenizer = data.ChatTokenizer(c.model, c.template)
    asked, prompts, lengths = [], [], []
    # Rows may lack an answer here.
    for _, row in data.read_rows(c.data, parse=partial(data.parse_row, ask=True)):
        question, plan = ask_row(row, tokenizer, c.system)
        ids = tokenizer.encode([plan])[0][0]
        check(len(ids), f"{row.where}: expected some text to go on from")
        asked.append(question)
        prompts.append(ids.tolist())
        lengths += [len(ids) + c.max_new_tokens] * c.n

    # Lines are written as they come, beside the output's place. After a stop the same command goes
    # on behind them.
    check(lengths, f"{', '.join(c.data)}: no row to answer")
    path, done = partial_output(c, prompts)
    model = open_model(c, tokenizer)
    warn_of_context(model, max(lengths), f"with --max_new_tokens {c.max_new_tokens} a row")
    with tqdm(total=len(lengths), initial=done, unit=" samples", disable=None) as bar:
        try:
            # Every chunk of samples that fits one forward pass is written before the next is drawn.
            for samples in data.cut_at(c.micro_tokens, range(done, len(lengths)), lengths):
                answers = modeling.generate(model, [prompts[k // c.n] for k in samples],
                                            c.max_new_tokens, stop_ids=tokenizer.stop_ids,
                                            sampling=c, samples=samples)
                with open(path, "a", encoding="utf-8") as file:
                    for k, ids in zip(samples, answers, strict=True):
                        file.write(answer_line(tokenizer, asked[k // c.n], k, c.n, ids))
                done += len(samples)
                bar.update(len(samples))
        except KeyboardInterrupt:
            print(f"\nstopped after {done} of {len(lengths)} samples; the same command goes on")
            sys.exit(130)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None

    # Only a whole output gets its name.
    found = Counter()
    for line in map(json.loads, whole_lines(path, c.n)):
        found.update(lines=1, ended=line["finish"] == "stop", tokens=line["tokens"],
                     repeated=line["repetition"])
    check(found["lines"] == done, f"{path}: two commands wrote it at once; run one of them again, "
          "alone: it goes on behind the lines that are in order")
    modeling.write_lines(Path(c.output), whole_lines(path, c.n))
    path.unlink()
    print(f"{done} samples of {len(prompts)} rows in {c.output}: {found['ended'] / done:.1%} ended "
          f"themselves, {found['tokens'] / done:.1f} tokens and {found['repeated'] / done:.1%} "
          "repetition in the mean")


def partial_output(c: Generate, prompts: list[list[int]]) -> tuple[Path, int]:
    """(the file that grows until the output is whole, how many lines an earlier run left in it)."""
    # Other flags, prompts or weights give it another name: no answers of theirs stand in it.
    times = [path.stat().st_mtime_ns for path in modeling.weight_files(Path(c.model))]
    job = repr((replace(c, output="", micro_tokens=1), prompts, times))
    key, output = hashlib.sha256(job.encode()).hexdigest()[:12], Path(c.output)
    path = output.with_name(f".{output.name}.{key}.partial")

    # A stop may have cut the last line.
    modeling.write_lines(path, whole_lines(path, c.n) if path.exists() else [])
    return path, sum(1 for _ in whole_lines(path, c.n))


def whole_lines(path: Path, n: int) -> Iterator[str]:
    """The lines of a partial output up to the first that is not whole, or not the next sample."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
                place = row["row"], row["sample"]
            except (ValueError, TypeError, KeyError):
                return

            # Two commands at once write every sample twice.
            if place != divmod(number, n) or not line.endswith("\n"):
                return
            yield line


def warn_of_context(model, tokens: int, what: str) -> None:
    """Say that a text may be longer than what the checkpoint was trained for."""
    context = model.config.max_position_embeddings
    if tokens > context:
        print(f"{what} may reach {tokens} tokens; answers beyond {context} are unreliable")


def stream_answer(model, tokenizer: data.ChatTokenizer, prompt: list[int], c: Chat) -> str:
    """Generate one answer, printing it as it grows."""
    ids, shown = [], ""
    for (token,) in modeling.generate_steps(model, [prompt], c.max_new_tokens,
                                            tokenizer.stop_ids, sampling=c):
        if token in tokenizer.stop_ids:
            break
        ids.append(token)

        # All tokens are decoded anew: the last may end in half a UTF-8 character, which waits.
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(ids)
    print(text[len(shown) :], end="", flush=True)
    return text


def chat_command(c: Chat) -> None:
    """`eval.py chat`."""
    check_flags(c)
    tokenizer = data.ChatTokenizer(c.model, c.template, system=c.system)
    model, messages = open_model(c, tokenizer), []
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then has line editing and a history)
    with contextlib.suppress(AttributeError):  # what is no UTF-8 is read all the same
        sys.stdin.reconfigure(errors="surrogateescape")
    print(f"{c.model}, template {tokenizer.template}; /reset forgets, /quit ends")

    while True:
        try:
            question = input("> ")
            # The lines of a pasted text come at once: they are one question.
            while sys.stdin.isatty() and os.name == "posix" and select.select([0], [], [], 0.05)[0]:
                question += "\n" + input()
        except (EOFError, KeyboardInterrupt):
            question = "/quit"

        # What begins with a slash is a command, not a question.
        question = question.strip()
        if not data.is_text(question):
            print("that is not UTF-8, which the terminal should be set to")
        elif question == "/quit":
            print()
            return
        elif question == "/reset":
            messages = []
            print("forgotten")
        elif question.startswith("/"):
            print(f"unknown command {question}; /reset forgets, /quit ends")
        elif question:
            asked = [*messages, {"role": "user", "content": question}]
            prompt = tokenizer.prompt_ids(asked)
            warn_of_context(model, len(prompt) + 1, "the conversation (/reset forgets it)")

            # Ctrl-C ends this answer, not the conversation, which then goes on without it.
            with contextlib.suppress(KeyboardInterrupt):
                answer = stream_answer(model, tokenizer, prompt, c)
                messages = [*asked, {"role": "assistant", "content": answer}]
            print()


# ---- skip on a first reading: the files of an exam -----------------------------------------------

MAPPING = "subject_mapping.json"  # {handle: [English name, Chinese name, category]}


def lab(name: str, wanted: str = ""):
    """labs/NAME.py; where it is missing None, or InputError if something `wanted` needs it."""
    try:
        return importlib.import_module(f"labs.{name}")
    except ImportError:
        check(not wanted, f"{wanted} needs labs/{name}.py, which is missing here")
        return None


def exam_file(c: Exam, split: str, handle: str) -> Path:
    """Where an exam keeps a subject's questions of a split."""
    ending = "" if c.benchmark == "cmmlu" else f"_{split}"
    return Path(c.data) / split / f"{handle}{ending}.csv"


def subject_table(c: Exam) -> dict[str, tuple[str, str]]:
    """{handle: (name in the header, category)} of an exam; C-Eval may bring its own table."""
    path, table = Path(c.data) / MAPPING, {}
    by_name = c.subject_names == "zh"
    if c.benchmark == "ceval" and path.exists():
        for handle, entry in modeling.read_json(path).items():
            check(isinstance(entry, list) and len(entry) == 3 and entry[2] in CATEGORIES,
                  f"{path}: expected names and one of {', '.join(CATEGORIES)} for {handle}, "
                  f"found {entry}")
            table[handle] = entry[1], entry[2]

    # Other names stand in the lab. Without it the files say which subjects there are.
    elif exams := lab("exams", "a header with subjects' names (or --subject_names handle)"
                      if by_name else ""):
        table = exams.named_subjects(c.benchmark)
    else:
        for file in sorted(Path(c.data).glob(f"{c.split}/*.csv")):
            table[file.stem.removesuffix(f"_{c.split}")] = "", "Other"

    if by_name:
        return table
    return {handle: (handle, category) for handle, (_, category) in table.items()}


def read_csv(path: Path) -> Iterator[tuple]:
    """(where, row) of every question of an exam's file, in C-Eval's column names.

    MMLU's files have no line of names. Line ends within a cell stay: prompts have them. A row that
    cannot be read is a ValueError: the other rows can still be used.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            table = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None

    # Every benchmark names its columns in its own way, or not at all.
    names = ["question", *LETTERS, "answer"]
    if table and {"question", "Question"} & set(table[0][1]):
        usual = {"": "id", "Question": "question", "Answer": "answer"}  # CMMLU's
        names = [usual.get(name, name) for name in table.pop(0)[1]]
        twice = {name for name in names if names.count(name) > 1} - {"id"}
        check(not twice, f"{path}: two columns are called {', '.join(sorted(twice))}: remove one")

    for number, (line, cells) in enumerate(table, 1):
        row = {"id": str(number - 1), **dict(zip(names, cells, strict=False))}
        # Bytes that are no UTF-8 were read as surrogates.
        if not data.is_text("".join(cells)):
            row = ValueError(f"line {line} is not UTF-8; convert the file, if it is GBK by "
                             "iconv -f GB18030 -t UTF-8")
        elif len(cells) != len(names):
            row = ValueError(f"expected {len(names)} cells, found {len(cells)}")
        yield f"{path} row {number}", row


def parse_question(columns: list[str], where: str, row) -> dict:
    """A question whose `columns` are filled; the whole column `answer` may be missing."""
    check(not isinstance(row, Exception), f"{where}: {row}")
    for name in (*columns, "answer"):
        check(name in row or name not in columns,
              f"{where}: column {name} missing, found {', '.join(row)}")
        check(row.get(name, "x").strip(), f"{where}: column {name} is empty")
    check(row.get("answer", "A") in tuple(LETTERS),
          f"{where}: expected an answer A to D, found {row.get('answer')!r}")
    return {**row, "stripped": row["question"].strip(), "where": where}


def read_questions(path: Path, columns: list[str], skip_bad_rows: bool) -> list[dict]:
    """The questions of a CSV file."""
    questions = {}
    parse = partial(parse_question, columns)
    for _, question in data.read_rows([path], skip_bad_rows, parse=parse, read=read_csv):
        if question:
            # Answers are joined to questions by subject and id: an id must be one question.
            other = questions.setdefault(question["id"], question)
            check(other is question, f"{question['where']}: id {question['id']} is that of "
                  f"{other['where']} too")
    check(questions, f"{path} holds no question")
    return list(questions.values())


def recognize_benchmark(folder: Path) -> str:
    """Whose layout a folder has: C-Eval's files name their columns, MMLU's do not."""
    if (folder / MAPPING).exists():
        return "ceval"
    for path in (*folder.glob("val/*_val.csv"), *folder.glob("test/*_test.csv")):
        return "ceval" if b"question" in path.read_bytes().partition(b"\n")[0] else "mmlu"
    return "cmmlu"


def resolve_exam(c: Exam) -> Exam:
    """Fill in what was left open; InputError for what makes no sense."""
    check_flags(c)
    # The demo learned to answer in its chat template, without shots.
    if not c.data:
        c = replace(c, data="out/demo/exam", chat=True, shots=max(c.shots, 0))
    folder, steel = Path(c.data), c.protocol == "steel"
    check(folder.is_dir(), f"no folder {folder}; labs/README.md says how to get an exam")

    benchmark = c.benchmark or recognize_benchmark(folder)
    last = "out/dpo" if Path("out/dpo/tokenizer.json").exists() else "out/sft"
    most = 0 if steel else 5
    c = replace(c, model=c.model or [last], benchmark=benchmark, chat=c.chat or steel,
                shots=most if c.shots == -1 else c.shots,
                split=c.split or ("val" if benchmark == "ceval" else "test"))

    # The lab adds its protocols to the table; a flag that needs them says so where it is missing.
    if c.benchmark not in PROTOCOLS.get(c.protocol, {}):
        lab("exams", f"--protocol {c.protocol} with {c.benchmark}").add_protocols(PROTOCOLS)
    known = PROTOCOLS[c.protocol]
    check(c.benchmark in known, f"--protocol {c.protocol} is for {', '.join(known)} only")
    check(0 <= c.shots <= most, f"--shots {c.shots}: with --protocol {c.protocol} at most {most}")
    check(c.chat or c.thinking != "on", "--thinking on needs --chat")
    check(len(set(map(short_name, c.model))) == len(c.model),
          "--model names one twice, or two that differ in leading dots and slashes only")
    return c


def read_exam(c: Exam) -> list[Subject]:
    """The subjects of a resolved Exam, with its shots."""
    table, folder = subject_table(c), Path(c.data)
    unknown = sorted(set(c.subjects) - set(table))
    check(not unknown, f"{', '.join(unknown)}: no subject of {c.benchmark}; it has "
          f"{', '.join(table)}")

    # A table in the folder says which files must be there; else any subjects are an exam.
    whole = c.benchmark == "ceval" and (folder / MAPPING).exists()
    there = [handle for handle in table if whole or exam_file(c, c.split, handle).exists()]
    check(there, f"{folder / c.split} has no file of {c.benchmark}, such as "
          f"{exam_file(c, c.split, next(iter(table), 'SUBJECT')).name}")

    # What a question needs; a solved one needs its answer too.
    columns = ["question", *LETTERS] if c.benchmark == "mmlu" else ["id", "question", *LETTERS]
    solved = [*columns, "answer", *(["explanation"] if c.protocol == "cot" else [])]
    subjects, labelled = [], set()
    for handle in dict.fromkeys(c.subjects or there):
        shots, dev = [], exam_file(c, "dev", handle)
        if c.shots:
            shots = read_questions(dev, solved, c.skip_bad_rows)[: c.shots]
            check(len(shots) == c.shots, f"{dev}: only {len(shots)} rows for {c.shots} shots")
        questions = read_questions(exam_file(c, c.split, handle), columns, c.skip_bad_rows)
        labelled.update("answer" in question for question in questions)
        subjects.append(Subject(handle, *table[handle], shots, questions))

    # A test split has no answers at all; one that has some is broken.
    check(len(labelled) == 1, f"{folder / c.split}: some files have a column answer, some do not")
    return subjects


# ---- skip on a first reading: the report of an exam ----------------------------------------------


def short_name(folder: str) -> str:
    """A checkpoint's name in tables and as a folder of results."""
    return str(Path(folder)).strip("./").replace("/", "-") or "model"


def start_exam(c: Exam, subjects: list[Subject], asked: list[tuple]) -> None:
    """Say exactly what is asked; `asked` has (checkpoint, tokenizer, sheets)."""
    count = sum(len(s.questions) for s in subjects)
    chat = ", in the chat template" if c.chat else ""
    print(f"{c.benchmark} {c.split}: {count} questions in {len(subjects)} of "
          f"{len(subject_table(c))} subjects; protocol {c.protocol}, {c.shots} shots{chat}")
    known = map(partial(exam_file, c, c.split), subject_table(c))
    if others := set(Path(c.data, c.split).glob("*.csv")) - set(known):
        print(f"not asked, for {c.benchmark} has no such subject:", *sorted(map(str, others)))

    # Checkpoints with one tokenizer get one prompt: it is printed once.
    shown = {}  # first prompt and options: the checkpoints that get them
    for name, _, (first, *_) in asked:
        options = f", ids of the options {[*map(list, first.options)]}" if first.options else ""
        shown.setdefault((first.first, options), []).append(name)
    for (prompt, options), names in shown.items():
        print(f"first prompt of {', '.join(names)}{options}:")
        print(prompt.replace("\r", "\\r").replace("\n", "\\n\n"), flush=True)


def finish_exam(c: Exam, results: list[dict], answers: list[list[dict]]) -> None:
    """Print and write what was found; several checkpoints get a folder each."""
    output = Path(c.output_dir)
    for r, lines in zip(results, answers, strict=True):
        folder = output / short_name(r["model"]) if len(results) > 1 else output
        modeling.write_json(folder / "results.json", r)
        modeling.write_lines(folder / "predictions.jsonl",
                             (json.dumps(a, ensure_ascii=False) + "\n" for a in lines))

    # The table, the comparison and the figure are the lab's.
    if scores := lab("scores"):
        scores.report(output, results, answers)
    else:
        for r in results:
            print(f"{short_name(r['model'])}: {r['correct']} of {r['questions']} questions right; "
                  f"interval {r['interval']}, floor {r['floor']}")
    print(f"results in {output}")


def score_checkpoint(c: Exam, tokenizer: data.ChatTokenizer, sheets: list[Sheet], rank: int,
                     world: int) -> tuple[list[dict], dict]:
    """(answers in order, what results.json says); every rank answers some of the subjects."""
    # One checkpoint at a time is in memory.
    model, began = open_model(c, tokenizer), time.perf_counter()
    sheets = let_think(model, tokenizer, c, sheets)
    bar = tqdm(sheets[rank::world], desc=str(tokenizer.checkpoint), unit=" subjects",
               disable=rank > 0 or None)
    mine = [answer_sheet(model, tokenizer, sheet, c.micro_tokens) for sheet in bar]

    # Only the answers travel: subject i was asked by rank i % world, as its number i // world.
    parts, answers = [mine] * world, []
    if world > 1:
        dist.all_gather_object(parts, mine)
    for i in range(len(sheets)):
        answers += parts[i % world][i // world]

    # How it was asked, and what was found.
    asked = {name: getattr(c, name) for name in (
        "data", "benchmark", "split", "protocol", "shots", "chat", "subject_names")}
    scores = lab("scores")
    return answers, {
        **asked, "thinking": sheets[0].protocol != PROTOCOLS[c.protocol][c.benchmark],
        "dtype": str(model.head.dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - began,
        "characters_lost": scores and scores.characters_lost(tokenizer, sheets),
        **summarize(c.benchmark, [sheet.subject for sheet in sheets], answers)}


def exam_command(c: Exam) -> None:
    """`eval.py exam`."""
    c = resolve_exam(c)
    subjects, asked = read_exam(c), []
    # Every prompt of every checkpoint is encoded first, so that nothing fails in the middle.
    for folder in c.model:
        tokenizer = data.ChatTokenizer(folder, c.template)
        config = modeling.load_config(tokenizer.checkpoint)
        tokenizer.check_size(config.vocab_size)
        sheets = [make_sheet(tokenizer, s, c, config.max_position_embeddings) for s in subjects]
        asked.append((folder, tokenizer, sheets))

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        start_exam(c, subjects, asked)
    if world > 1:
        dist.init_process_group("gloo")
    results, answers = [], []
    for name, tokenizer, sheets in asked:
        lines, result = score_checkpoint(c, tokenizer, sheets, rank, world)
        results.append({"model": name, **result})
        answers.append(lines)

    # The first rank alone writes; gloo aborts where one rank is gone before the rest.
    if rank == 0:
        finish_exam(c, results, answers)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---- skip on a first reading: plumbing -----------------------------------------------------------


def check_flags(c) -> None:
    """Raise InputError for values that make no sense, before anything is loaded."""
    # A flag that this command does not have passes.
    check(0 < getattr(c, "top_p", 1) <= 1, "--top_p must be above 0 and at most 1")
    check(getattr(c, "repetition_penalty", 1) > 0, "--repetition_penalty must be above 0")

    # Input and output.
    inputs = getattr(c, "data", "")
    check(inputs != [], "--data FILE... is missing")
    # The checkpoint's files are inputs as well. An exam's data is a folder.
    inputs = [] if isinstance(inputs, str) else [*inputs, *Path(c.model).glob("*")]
    if isinstance(c, Generate):
        check(c.output, "--output FILE.jsonl is missing")
        check(c.n == 1 or c.temperature > 0,
              "--n above 1 needs --temperature above 0: greedy samples are all alike")
    for flag in ("output", "output_dir"):
        if output := getattr(c, flag, ""):
            modeling.check_output(f"--{flag}", output, inputs)


def open_model(c: Common, tokenizer: data.ChatTokenizer) -> modeling.Llama:
    """The tokenizer's checkpoint in its evaluation precision, on the device at hand."""
    device = modeling.best_device(int(os.environ.get("LOCAL_RANK", 0)))
    model = modeling.load(tokenizer.checkpoint, modeling.best_dtype(c.dtype, device), device)
    tokenizer.check_size(model.config.vocab_size)
    return model


COMMANDS = {"exam": (Exam, exam_command, ""), "logprobs": (Logprobs, logprobs_command, ""),
            "generate": (Generate, generate_command, ""), "chat": (Chat, chat_command, "")}

if __name__ == "__main__":
    with data.one_line_errors():
        data.run_command(COMMANDS, __doc__)
