"""Look at a checkpoint: log-probabilities of a file, sampled answers, a conversation.

    python eval.py logprobs --model DIR --data FILE --output FILE.jsonl    # loss and perplexity
    python eval.py generate --model DIR --data FILE --output FILE.jsonl --n 4 --temperature 0.8
    python eval.py chat --model DIR

Without --model every command takes the checkpoint the demo leaves (out/sft).
"""

import csv
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import data
import model as modeling
from data import DataError

# ------------------------------------------------------------------------------------------- config


@dataclass
class Common:
    """What every command that loads a model takes."""

    model: str = "out/sft"  # checkpoint folder in Hugging Face layout
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the weights
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out
    template: str = ""  # chatml, llama2, llama3, mistral, deepseek, plain; empty: recognised


@dataclass
class Logprobs(Common):
    """Write ln p of every supervised token of some files; print their mean loss and perplexity."""

    data: list[str] = field(default_factory=list)  # files of any training format
    output: str = ""  # .jsonl: token_ids and logprobs of every example, in order; empty: none
    train_on: Literal["all", "last"] = "all"  # answers of a conversation that are supervised
    max_length: int = 2048  # tokens of an example; longer ones are truncated, raw text is split


@dataclass
class Sampling(Common):
    """How answers are drawn."""

    max_new_tokens: int = 512  # stop after this many tokens
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample among the likeliest tokens that reach this probability together
    top_k: int = 0  # sample among this many likeliest tokens; 0: all
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    seed: int = 0  # of the sampling
    system: str = ""  # system message put before every conversation

    def how(self) -> modeling.Sampling:
        """What `model.generate` takes of it."""
        names = modeling.Sampling.__dataclass_fields__
        return modeling.Sampling(**{name: getattr(self, name) for name in names})


@dataclass
class Generate(Sampling):
    """Answer every row of some files: prompts, or conversations whose last answer is left out."""

    data: list[str] = field(default_factory=list)  # files of prompts or conversations
    output: str = ""  # .jsonl: one object per sample, with messages, reference and finish
    n: int = 1  # samples per row


@dataclass
class Chat(Sampling):
    """Talk to a checkpoint: /reset forgets the conversation, /quit (or Ctrl-D) ends it."""


def check(c) -> None:
    """Raise DataError for values that make no sense."""
    for name in ("micro_tokens", "max_new_tokens", "n", "top_p", "repetition_penalty"):
        if getattr(c, name, 1) <= 0:
            raise DataError(f"--{name} must be above 0, not {getattr(c, name)}")
    for name in ("temperature", "top_k"):
        if getattr(c, name, 0) < 0:
            raise DataError(f"--{name} must not be negative, is {getattr(c, name)}")
    if getattr(c, "max_length", 2) < 2:
        raise DataError(f"--max_length must be at least 2, not {c.max_length}")
    if not getattr(c, "data", True):
        raise DataError("--data FILE... is missing")
    if getattr(c, "top_p", 1) > 1 or not getattr(c, "temperature", 0) < math.inf:
        raise DataError(f"--top_p is at most 1 and --temperature a number, not {c.top_p} and "
                        f"{c.temperature}")
    output = Path(getattr(c, "output", "") or "x")
    if output.is_dir() or not (output.parent.is_dir() or not output.parent.exists()):
        raise DataError(f"--output {output} cannot be written: it is a folder, or lies in a file")
    if isinstance(c, Generate) and not c.output:
        raise DataError("--output FILE.jsonl is missing")
    if isinstance(c, Generate) and c.n > 1 and c.temperature == 0:
        raise DataError("--n above 1 needs --temperature above 0: greedy samples are all alike")


def open_model(c: Common, tokenizer: data.ChatTokenizer) -> modeling.Llama:
    """The checkpoint in its evaluation precision, on the device at hand."""
    device = modeling.best_device()
    model = modeling.load(c.model, modeling.best_dtype(c.dtype, device), device)
    tokenizer.check_size(model.config.vocab_size)
    return model


# -------------------------------------------------------------------------------- log-probabilities


@torch.no_grad()
def example_logprobs(model, examples: list[data.Example], micro_tokens: int):
    """Yield (index, ln p of its supervised tokens, in nats) for every example, short ones first."""
    chunks = data.micro_batches([len(e.ids) for e in examples], micro_tokens)[0]
    hidden = not sys.stderr.isatty()
    for chunk in tqdm(chunks, desc="log-probabilities", unit=" batches", disable=hidden):
        batch = data.collate([examples[i] for i in chunk], model.device)
        logp = model(batch.ids, batch.lengths, batch.targets).cpu()  # [N]
        yield from zip(chunk, logp.split([examples[i].targets for i in chunk]), strict=True)


def logprobs_command(c: Logprobs) -> None:
    """`eval.py logprobs`."""
    check(c)
    tokenizer = data.ChatTokenizer(c.model, c.template)
    examples, counts = data.load_examples(c.data, tokenizer, c.train_on, c.max_length, quiet=False,
                                          keep_all=True)
    model = open_model(c, tokenizer)
    results = [[None] * len(e.ids) for e in examples]
    total = weights = 0.0
    for i, logp in example_logprobs(model, examples, c.micro_tokens):
        values = iter(logp.tolist())
        for first, end, weight in examples[i].spans:
            results[i][first:end] = part = [next(values) for _ in range(first, end)]
            total, weights = total - weight * sum(part), weights + weight * len(part)
    if c.output:
        modeling.write_lines(Path(c.output), (
            json.dumps({"token_ids": e.ids.tolist(), "logprobs": r}) + "\n"
            for e, r in zip(examples, results, strict=True)))
    counts["supervised tokens"] = sum(e.targets for e in examples)
    print(f"{len(examples)} examples", *(f"{n} {what}" for what, n in counts.items()), sep=", ")
    loss = total / weights if weights else math.nan
    print(f"loss {loss:.6f} nats per supervised token, perplexity {math.exp(loss):.4f}")


# ----------------------------------------------------------------------------------------- generate


def to_prompt(row: data.Row, system: str) -> tuple[list[dict], str | None]:
    """The messages to answer, and the answer that the row itself holds, if any."""
    messages = [{"role": m["role"], "content": m["content"]} for m in row.messages]
    reference = None
    if messages and messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"]
    if system:
        rest = [m for m in messages if m["role"] != "system"]
        messages = [{"role": "system", "content": system}, *rest]
    if row.text is None and (not messages or messages[-1]["role"] != "user"):
        raise DataError(f"{row.where}: expected a conversation in which the user asks last")
    return messages, reference


def generate_command(c: Generate) -> None:
    """`eval.py generate`."""
    check(c)
    tokenizer = data.ChatTokenizer(c.model, c.template)
    rows = [row for path in c.data for row in data.read_rows(path, ask=True)]
    asked = [to_prompt(row, c.system) for row in rows]
    plans = [tokenizer.text_pieces(row.text)[:-1] if row.text is not None
             else tokenizer.pieces(messages, ask=True)
             for row, (messages, _) in zip(rows, asked, strict=True)]
    prompts = [ids.tolist() for ids, _ in tokenizer.encode(plans)]
    if not all(prompts):
        raise DataError(f"{rows[prompts.index([])].where}: expected some text to go on from")
    model = open_model(c, tokenizer)
    # sample k belongs to row k // n; what is drawn for it depends on k, not on its batch
    lengths = [len(p) + c.max_new_tokens for p in prompts for _ in range(c.n)]
    answers = [None] * len(lengths)
    chunks = data.micro_batches(lengths, c.micro_tokens)[0]
    for chunk in tqdm(chunks, desc="generate", unit=" batches", disable=not sys.stderr.isatty()):
        out = modeling.generate(model, [prompts[k // c.n] for k in chunk], c.max_new_tokens,
                                stop_ids=tokenizer.stop_ids, sampling=c.how(), samples=chunk)
        for k, ids in zip(chunk, out, strict=True):
            stopped = bool(ids) and ids[-1] in tokenizer.stop_ids
            text = tokenizer.decode(ids[:-1] if stopped else ids)
            answers[k] = {"row": k // c.n, "sample": k % c.n,
                          "finish": "stop" if stopped else "length"}
            messages, reference = asked[k // c.n]
            if rows[k // c.n].text is not None:
                answers[k]["text"] = rows[k // c.n].text + text
            else:
                answers[k]["messages"] = [*messages, {"role": "assistant", "content": text}]
                answers[k]["reference"] = reference
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    modeling.write_lines(Path(c.output), lines)
    stopped = sum(answer["finish"] == "stop" for answer in answers)
    print(f"{len(answers)} samples of {len(rows)} rows in {c.output}; {stopped} ended themselves")


# --------------------------------------------------------------------------------------------- chat


def stream_answer(model, tokenizer: data.ChatTokenizer, messages: list[dict], c: Sampling, write):
    """Generate one answer, calling write(text) as it grows; half of a UTF-8 character waits."""
    ids, shown = [], ""
    steps = modeling.generate_steps(model, [tokenizer.prompt_ids(messages)], c.max_new_tokens,
                                    stop_ids=tokenizer.stop_ids, sampling=c.how())
    for (token,) in steps:
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # else the rest of the character is still to come
            write(text[len(shown) :])
            shown = text
    text = tokenizer.decode(ids)
    write(text[len(shown) :])
    return text


def chat_command(c: Chat) -> None:
    """`eval.py chat`."""
    check(c)
    tokenizer = data.ChatTokenizer(c.model, c.template)
    model = open_model(c, tokenizer)
    start = [{"role": "system", "content": c.system}] if c.system else []
    messages = list(start)
    print(f"{c.model}, template {tokenizer.template.name}; /reset forgets, /quit ends")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = "/quit"
        if question == "/quit":
            print()
            return
        if question == "/reset":
            messages = list(start)
            print("forgotten")
        elif question.startswith("/"):
            print(f"unknown command {question}; /reset forgets, /quit ends")
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                answer = stream_answer(model, tokenizer, messages, c,
                                       lambda text: print(text, end="", flush=True))
                messages.append({"role": "assistant", "content": answer})
            except KeyboardInterrupt:  # ends this answer, not the conversation
                messages.pop()
            print()


# --------------------------------------------------------------------------------------------- exam


@torch.no_grad()
def score_options(model, prompts: list[list[int]], options: list[int], micro_tokens: int):
    """ln p of each option's token after each prompt: [prompts, options], in nats.

    What all prompts begin with (an exam's header and shots) is encoded once; every prompt runs on
    top of that prefix, and only its last position meets the LM head.
    """
    shared = min(data.common_prefix(prompts), min(len(p) for p in prompts) - 1)
    device, prefix = model.device, None
    if shared:
        ids = torch.tensor(prompts[0][:shared], device=device)
        _, prefix = model.hidden(ids, [shared], keep=True)
    rest = [p[shared:] for p in prompts]
    scores = torch.empty(len(prompts), len(options))
    for chunk in data.micro_batches([len(r) for r in rest], micro_tokens)[0]:
        lengths = [len(rest[i]) for i in chunk]
        ids = torch.tensor([t for i in chunk for t in rest[i]], device=device)  # [T]
        same = torch.zeros(len(chunk), dtype=torch.long, device=device)  # all continue prefix 0
        states, _ = model.hidden(ids, lengths, prefix and prefix.select(same))  # [T, D]
        last = torch.tensor(lengths, device=device).cumsum(0) - 1  # [B]
        logp = model.next_logits(states[last]).log_softmax(-1)  # [B, V]
        scores[chunk] = logp[:, options].cpu()
    return scores


def exam_accuracy(model, tokenizer: data.ChatTokenizer, folder: Path, split: str = "val",
                  micro_tokens: int = 8192) -> tuple[int, int]:
    """(right, questions) of an exam in C-Eval's layout: no shots, asked in the chat template."""
    right = count = 0
    subjects = json.loads((folder / "subject_mapping.json").read_text(encoding="utf-8"))
    for handle, (_, subject, _) in subjects.items():
        with open(folder / split / f"{handle}_{split}.csv", encoding="utf-8", newline="") as file:
            questions = list(csv.DictReader(file))
        asked = [[{"role": "user", "content": data.EXAM_PROMPT.format(subject=subject, **q)}]
                 for q in questions]
        prompts = [tokenizer.prompt_ids(messages) for messages in asked]
        answered = [tokenizer.pieces([*asked[0], {"role": "assistant", "content": letter}])
                    for letter in "ABCD"]
        # a letter's id is taken in context: alone it may be encoded with a BOS or a space
        options = [int(ids[len(prompts[0])]) for ids, _ in tokenizer.encode(answered)]
        if len(set(options)) < 4:
            raise DataError(f"the letters A to D have the ids {options}: not four different ones")
        chosen = score_options(model, prompts, options, micro_tokens).argmax(1).tolist()
        right += sum("ABCD"[k] == q["answer"] for k, q in zip(chosen, questions, strict=True))
        count += len(questions)
    return right, count


COMMANDS = {"logprobs": (Logprobs, logprobs_command, ""), "chat": (Chat, chat_command, ""),
            "generate": (Generate, generate_command, "")}

if __name__ == "__main__":
    with data.one_line_errors():
        data.run_command(COMMANDS, __doc__)
