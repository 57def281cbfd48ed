"""From files to token ids, masks and batches.

From small to large: flags, rows of every format, chat templates, tokens and their spans, examples,
the mixer, micro-batches, the built-in demo, the commands.

    python data.py show FILE... --model DIR    # what a trainer sees: tokens, mask, lengths, shares
    python data.py filter FILE... --output FILE.jsonl --language zh --duplicates near
    python data.py select FILE... --output FILE.jsonl --method kcenter --share 0.005 --model DIR
    python data.py coh FILE... --output FILE.jsonl    # preference pairs with words of feedback
    python data.py exam FILE... --output FILE.jsonl --style answer_first
    python data.py identity FILE --output FILE.jsonl --name NAME --author AUTHOR
    python data.py overlap FILE... --exam DIR  # which exam questions the training data holds
"""

import argparse
import csv
import difflib
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import typing
import unicodedata
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm


class DataError(ValueError):
    """Input that cannot be used; the message is one line: what was found, how to fix it."""


def need(good, message: str) -> None:
    """Raise DataError with the message unless `good`."""
    if not good:
        raise DataError(message)


# -------------------------------------------------------------------------------------------- flags


def parse_flags(cls, argv: list[str], positional: str = "") -> dict:
    """What argv says of the fields of dataclass `cls`; a field's comment is its help."""

    def fail(message: str):
        raise DataError(f"{message}; --help lists the flags")

    source = "".join(inspect.getsource(c) for c in cls.__mro__[-2::-1])  # base classes first
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False)
    parser.error = fail  # its own prints the usage over several lines
    for f in fields(cls):
        kind, inner = {"type": f.type}, typing.get_args(f.type)
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(f.type) is Literal:
            kind = {"choices": inner}
        elif typing.get_origin(f.type) is list:
            kind = {"type": inner[0], "nargs": "+"}
        flag = f.name if f.name == positional else f"--{f.name}"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=helps.get(f.name), **kind)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.lstrip("-"), [f.name for f in fields(cls)], 1)
        kind = "unknown flag" if word.startswith("-") else "unexpected argument"
        fail(f"{kind} {word}" + (f" (did you mean --{near[0]}?)" if near else ""))
    return vars(known)


def run_command(commands: dict, usage: str) -> None:
    """Run the command named first in argv; commands: {name: (dataclass, function, positional)}."""
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name in ("-h", "--help"):
        print(usage.strip())
        return
    need(name in commands, f"expected one of {', '.join(commands)}, not {name}; --help explains")
    config, function, positional = commands[name]
    function(config(**parse_flags(config, sys.argv[2:], positional)))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end: no reader or crash meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def one_line_errors():
    """End with one line and exit status 2 on DataError and on the model's CheckpointError."""
    try:
        yield
    except ValueError as error:
        if type(error).__name__ not in ("DataError", "CheckpointError"):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


# ----------------------------------------------------------------------------- rows of every format

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}
FORMATS = ("messages; conversations; instruction and output; prompt and completion or response; "
           "input and target; text; completion; chosen and rejected; label")


class Row(NamedTuple):
    """One row of a file, whatever its format was; `where` names its file and line."""

    where: str
    messages: list[dict]  # {role, content}, maybe train and weight; a pair's common history
    text: str | None = None  # raw text, instead of messages
    chosen: list[dict] | None = None  # a preference pair's two continuations of the history
    rejected: list[dict] | None = None
    label: bool | None = None  # an unpaired preference


def read_values(path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every row of a .json, .jsonl or .txt file, gzipped or not."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    need(path.is_file(), f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    need(kind in ("json", "jsonl", "txt"),
         f"{path}: expected a file called .json, .jsonl or .txt, maybe with .gz")
    try:
        open_ = gzip.open if path.suffix == ".gz" else open
        with open_(path, "rt", encoding="utf-8-sig") as file:  # -sig drops a byte order mark
            if kind == "json" and file.read(4096).lstrip()[:1] != "{":
                file.seek(0)
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise ValueError(f"expected a list of rows, found {rows!r:.40}")
                yield from ((f"{path} row {n}", row) for n, row in enumerate(rows, 1))
                return
            file.seek(0)  # one row a line; also a .json whose rows are not in a list
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        value = {"text": line.rstrip("\r\n")} if kind == "txt" else json.loads(line)
                    except (ValueError, RecursionError) as error:
                        value = error
                    yield f"{path} line {number}", value
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of every question of an exam's file, in C-Eval's column names.

    MMLU's files have no line of names. Line ends within a cell stay: prompts have them.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = [cells for cells in csv.reader(file) if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    names = ["question", *"ABCD", "answer"]
    if table and {"question", "Question"} & set(table[0]):
        usual = {"": "id", "Question": "question", "Answer": "answer"}  # CMMLU's
        names = [usual.get(name, name) for name in table.pop(0)]
    for number, cells in enumerate(table, 1):
        where = f"{path} row {number}"
        need(len(cells) == len(names), f"{where}: expected {len(names)} cells, found {len(cells)}")
        yield where, dict(zip(names, cells, strict=True))


def common_prefix(lists: list[list]) -> int:
    """How many leading items all lists share."""
    same = (all(item == items[0] for item in items) for items in zip(*lists, strict=False))
    return sum(itertools.takewhile(bool, same))


def is_text(value) -> bool:
    """A string that UTF-8 can hold (JSON allows lone surrogates)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def as_messages(where: str, value, role: str) -> list[dict]:
    """Messages from a string, a message, or a list of them, in OpenAI's or ShareGPT's keys."""
    if is_text(value):
        return [{"role": role, "content": value}]
    messages = []
    for m in value if isinstance(value, list) else [value]:
        m = m if isinstance(m, dict) else {"role": None, "content": m}
        name, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        if not (isinstance(name, str) and name in ROLES and is_text(content)):
            raise DataError(f"{where}: expected messages with role user, assistant or system and a "
                            f"text as content, found {m!r:.60}")
        extra = {key: m[key] for key in ("train", "weight") if key in m}
        train, weight = extra.get("train", True), extra.get("weight", 1.0)
        number = type(weight) in (int, float) and 0 <= weight < float("inf")
        if not isinstance(train, bool) or not number:
            raise DataError(f"{where}: expected train true or false, weight 0 or more, not {extra}")
        messages.append({"role": ROLES[name], "content": content, **extra})
    return messages


def parse_row(where: str, row, ask: bool = False) -> Row:
    """Tell the format of a row by its keys and bring it to a Row."""

    def expect(good: bool, wanted: str) -> None:
        if not good:
            raise DataError(f"{where}: expected {wanted}, found {row!r:.80}")

    def text(key: str) -> str:
        expect(is_text(row[key]), f"a text under {key!r}")
        return row[key]

    if isinstance(row, Exception):
        raise DataError(f"{where}: not JSON: {getattr(row, 'msg', row)}")
    expect(isinstance(row, dict), "an object")
    messages = as_messages(where, row["system"], "system") if row.get("system") else []
    answer = next((k for k in ("completion", "response", "output", "target") if k in row), None)
    if "messages" in row or "conversations" in row:
        turns = row.get("messages", row.get("conversations"))
        expect(isinstance(turns, list) and turns, "a list of messages")
        messages += as_messages(where, turns, "user")
        answer, ask = None, True  # the answers are among the messages
    elif "instruction" in row:
        history = row.get("history") or []
        pairs = isinstance(history, list) and all(isinstance(t, list) for t in history)
        expect(pairs and all(len(t) == 2 for t in history), "history as [question, answer] pairs")
        for turn in history:
            messages += as_messages(where, turn[0], "user")
            messages += as_messages(where, turn[1], "assistant")
        question = text("instruction") + ("\n" + text("input") if row.get("input") else "")
        messages.append({"role": "user", "content": question})
    elif "prompt" in row or ("input" in row and "target" in row):
        messages += as_messages(where, row["prompt" if "prompt" in row else "input"], "user")
    elif "chosen" not in row:
        expect("text" in row or "completion" in row, f"the keys of a known format ({FORMATS})")
        return Row(where, [], text=text("text" if "text" in row else "completion"))
    if "chosen" in row or "rejected" in row:
        expect(row.get("chosen") and row.get("rejected"), "both chosen and rejected")
        sides = [as_messages(where, row[key], "assistant") for key in ("chosen", "rejected")]
        prompts = messages, [m for m in messages if m["role"] != "system"]
        known = next((len(p) for p in prompts if common_prefix([p, *sides]) == len(p)), 0)
        shared = max(known, common_prefix([side[:-1] for side in sides]))
        further = sides[0][known:shared]  # turns after the prompt that both sides hold
        again = messages and any(m["role"] == "system" for m in further)
        expect(not again, "answers that repeat the whole prompt, or nothing of it")
        messages += further
        chosen, rejected = (side[shared:] for side in sides)
        asked = any(m["role"] != "system" for m in messages)
        expect(asked or len(chosen) > 1, "a prompt, or two conversations")
        answered = all(side and side[-1]["role"] == "assistant" for side in (chosen, rejected))
        expect(answered, "two answers by the assistant")
        return Row(where, messages, chosen=chosen, rejected=rejected)
    expect(answer is not None or ask, "an answer: output, completion, response or target")
    messages += as_messages(where, row[answer], "assistant") if answer else []
    expect(isinstance(row.get("label", True), bool), "label true or false")
    return Row(where, messages, label=row.get("label"))


def read_rows(files, skip_bad_rows: bool | None = None, quiet: bool = False, parse=parse_row,
              read=read_values) -> Iterator[tuple]:
    """(value, parse(where, value)) of every row of some files.

    A bad row raises DataError; with `skip_bad_rows` it is listed, unless `quiet`, and gives None.
    None for `skip_bad_rows` is False, said of a command without that flag.
    """
    hint = "" if skip_bad_rows is None else " (--skip_bad_rows leaves it out)"
    for path in map(Path, files):
        for where, value in read(path):
            try:
                row = parse(where, value)
            except DataError as error:
                need(skip_bad_rows, f"{error}{hint}")
                row = None if quiet else tqdm.write(f"dropped {error}")
            yield value, row


# ---------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Template:
    """How a family writes a conversation; {} is a content, <bos> and <eos> the tokenizer's own.

    `header` asks for an answer; what follows it up to and with `stop` is what SFT supervises.
    """

    name: str
    start: str  # before the first message
    system: str
    user: str
    header: str
    answer: str
    stop: str
    after: str = ""  # between the end of a turn and the next
    strip: tuple = ()  # roles whose content loses its outer white space
    system_in_user: bool = False  # the system text goes inside the next user turn
    default_system: str | None = None  # inserted where a conversation has no system message
    think: str = ""  # reasoning checkpoints: a <think> block in the "last" answer or in "all"


TEMPLATES = {t.name: t for t in (
    Template("chatml", "", "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
             "<|im_start|>assistant\n", "{}", "<|im_end|>", "\n"),
    Template("llama2", "", "<<SYS>>\n{}\n<</SYS>>\n\n", "<bos>[INST] {} [/INST]", "", " {} ",
             "<eos>", strip=("system+user", "assistant"), system_in_user=True),
    Template("llama3", "<bos>", "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
             "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
             "<|start_header_id|>assistant<|end_header_id|>\n\n", "{}", "<|eot_id|>",
             strip=("system", "user", "assistant")),
    Template("mistral", "<bos>", "{}\n\n", "[INST] {}[/INST]", "", " {}", "<eos>",
             strip=("assistant",), system_in_user=True),
    Template("deepseek", "<bos>", "{}\n\n", "User: {}\n\n", "Assistant:", " {}", "<eos>"),
    # for base checkpoints without chat tokens
    Template("plain", "<bos>", "{}\n\n", "User:\n{}\n\n", "Assistant:\n", "{}", "<eos>", "\n\n"),
)}
TEMPLATE_MARKS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "<<SYS>>": "llama2",
                  "[INST]": "mistral", "Assistant:": "deepseek"}
MARKER = re.compile(r"(<bos>|<eos>|<\|[a-z_]+\|>|\[/?INST\])")
EMPTY_THINK = "<think>\n\n</think>\n\n"
LLAMA31_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def recognize_template(source: str | None, tokens: set[str]) -> Template:
    """The template of a checkpoint: from its Jinja source, or for base models from its tokens."""
    name = next((t for mark, t in TEMPLATE_MARKS.items() if mark in (source or tokens)), "plain")
    need(name != "plain" or not source, "the checkpoint's chat_template is of no known family; "
         f"choose one with --template: {', '.join(TEMPLATES)}")
    template, source, changes = TEMPLATES[name], source or "", {}
    if name == "llama3" and "Cutting Knowledge Date" in source:  # 3.1; 3.2 writes today's date
        system = template.system.replace("{}", LLAMA31_DATES + "{}")
        changes = {"system": system, "default_system": ""}
    if name == "chatml":
        default = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<]+)<\|im_end\|>", source)
        if default:  # Qwen2, Qwen2.5, SmolLM2
            changes["default_system"] = default[1]
        if "{{ system_message }}" in source:  # Yi-1.5 writes the system text bare
            changes["system"] = "{}"
        if "<think>" in source:  # Qwen3 in the last answer, MiniMind in all
            changes["think"] = "last" if "loop.index0 > ns.last_query_index" in source else "all"
    return replace(template, **changes)


def jinja(t: Template, bos: str, eos: str) -> str:
    """A template of TEMPLATES as Jinja, rendering exactly what `ChatTokenizer.pieces` builds."""

    def quoted(text: str) -> str:
        return json.dumps(text.replace("<bos>", bos).replace("<eos>", eos), ensure_ascii=False)

    def filled(form: str, role: str) -> str:
        before, after = form.split("{}")
        content = "message['content']" + (" | trim" if role in t.strip else "")
        if role == "user" and t.system_in_user:
            content = f"(ns.system + {content})" + " | trim" * ("system+user" in t.strip)
        return f"{quoted(before)} + ({content}) + {quoted(after)}"

    system = filled(t.system, "system")
    system = f"{{%- set ns.system = {system} -%}}" if t.system_in_user else f"{{{{- {system} -}}}}"
    return "".join((
        "{%- set ns = namespace(system='') -%}{{- ", quoted(t.start), " -}}",
        "{%- for message in messages -%}{%- if message['role'] == 'system' -%}", system,
        "{%- elif message['role'] == 'user' -%}{{- ", filled(t.user, "user"), " -}}",
        "{%- set ns.system = '' -%}{%- else -%}{{- ", quoted(t.header), " + ",
        filled(t.answer + t.stop + t.after, "assistant"), " -}}{%- endif -%}{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- ", quoted(t.header), " -}}{%- endif -%}"))


# --------------------------------------------------------------------------- tokens and their spans


class ChatTokenizer:
    """A checkpoint's tokenizer and chat template; ids are built from ids, not from one string.

    Special tokens within a content are encoded as ordinary text: content cannot forge a turn. Text
    between two special tokens is encoded as one string, as transformers does, unless a token would
    straddle the border between prompt and answer: then the two are encoded apart, since a model
    that continues the prompt could never produce that token.
    """

    def __init__(self, folder: str | Path, template: str = "", eot: str = ""):
        self.folder = folder = Path(folder)
        need((folder / "tokenizer.json").is_file(),
             f"{folder / 'tokenizer.json'} is missing; is {folder} a checkpoint?")
        need(template in ("", *TEMPLATES),
             f"unknown template {template!r}; known are {', '.join(TEMPLATES)}")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.config = self.read("tokenizer_config.json")
        source = self.config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {t["name"]: t["template"] for t in source}.get("default")
        if (folder / "chat_template.jinja").exists():  # newer checkpoints; transformers prefers it
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.bos, self.eos = (self.special(f"{name}_token") or "" for name in ("bos", "eos"))
        self.eot = eot = eot or self.config.get("eot_token", "")  # ours, of train_sft.py --eot
        need(not eot or (eot != self.eos and MARKER.fullmatch(eot)),
             f"--eot: expected a token like <|end|> that is not EOS, found {eot}")
        added = {t.content for t in self.tokenizer.get_added_tokens_decoder().values()}
        self.eot_is_new = bool(eot) and eot not in added
        added |= {eot} - {""}
        known = {name: replace(t, stop=eot or t.stop) for name, t in TEMPLATES.items()}
        ours = {jinja(t, self.bos, self.eos): t for t in known.values()}
        t = known.get(template) or ours.get(source) or recognize_template(source, added)
        self.template = t = known[t.name] if eot else t
        need(not eot or eot not in t.system + t.user + t.header,
             f"--eot: template {t.name} writes {eot} elsewhere too")
        # Mistral's own Jinja loses the system text once an answer follows; ours takes its place
        own = source and not (template or eot) and t.name != "mistral"
        self.jinja = source if own else jinja(t, self.bos, self.eos)
        marks = set(MARKER.findall(t.system + t.user + t.header + t.stop))
        marks &= added  # those that are tokens; elsewhere a marker is plain text
        forgeable = sorted(marks | ({self.bos, self.eos} & added))
        self.tokenizer.add_special_tokens([AddedToken(m, normalized=False) for m in forgeable])
        self.tokenizer.encode_special_tokens = True  # means: special tokens in a text are text
        texts = {m: m for m in marks} | {"<bos>": self.bos, "<eos>": self.eos}
        self.ids = {m: self.tokenizer.token_to_id(text) for m, text in texts.items()}
        self.eos_id, self.stop_id = self.ids["<eos>"], self.ids.get(t.stop)
        need(self.eos_id is not None,
             f"{folder}: tokenizer_config.json names no eos_token of the tokenizer")
        need(self.stop_id is not None,
             f"template {t.name} ends a turn with {t.stop}, no token of {folder}; "
             f"choose another --template: {', '.join(TEMPLATES)}")
        first = self.tokenizer.encode("", add_special_tokens=True).ids[:1]
        self.bos_ids = first if first == [self.ids["<bos>"]] else []  # what raw text starts with
        listed = self.read("generation_config.json").get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        self.stop_ids = sorted({self.stop_id, self.eos_id, *listed} - {None})

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self.tokenizer.encode_special_tokens = True  # a pickled Tokenizer forgets it

    def read(self, name: str) -> dict:
        """A JSON file of the checkpoint, empty if there is none."""
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None

    def special(self, key: str) -> str | None:
        """The text of bos_token, eos_token or unk_token."""
        value = self.config.get(key)
        return value["content"] if isinstance(value, dict) else value

    def check_size(self, vocab_size: int) -> None:
        """Raise DataError if a token has no row in an embedding of `vocab_size` rows."""
        size = self.tokenizer.get_vocab_size()
        need(size <= vocab_size, f"{self.folder}: the tokenizer has {size} tokens, config.json "
             f"only {vocab_size} (vocab_size)")

    def decode(self, ids, special: bool = True) -> str:
        """Text of token ids, special tokens included unless `special` is False."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def pieces(self, messages: list[dict], train_on: str = "all", ask: bool = False) -> list[tuple]:
        """A conversation as (id or text, weight) in order; weight None: prompt, not answer.

        `train_on` last gives weight 0 to all answers but the last; `ask` ends with a header.
        """
        t, out, held = self.template, [], ""
        if t.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": t.default_system}, *messages]
        last = {m["role"]: i for i, m in enumerate(messages)}  # index of each role's last message

        def prompt(form: str, content: str = "") -> None:
            parts = (self.ids.get(p, p.replace("{}", content)) for p in MARKER.split(form))
            out.extend((p, None) for p in parts if p not in ("", None))

        prompt(t.start)
        for i, m in enumerate(messages):
            role, content = m["role"], m["content"]
            content = content.strip() if role in t.strip else content
            moved = t.system_in_user or t.system != TEMPLATES[t.name].system
            if role == "system" and i and moved:
                raise DataError(f"template {t.name} takes a system message only at the start, "
                                f"found one later: {content!r:.60}")
            if role == "system" and t.system_in_user:
                held = t.system.replace("{}", content)
            elif role == "system":
                prompt(t.system, content)
            elif role == "user":
                content, held = held + content, ""
                prompt(t.user, content.strip() if "system+user" in t.strip else content)
            else:
                weight = m.get("weight", 1.0) * m.get("train", True)
                weight *= train_on == "all" or i == last["assistant"]
                prompt(t.header)
                if t.think:
                    shown = i > last.get("user", -1) and i == len(messages) - 1
                    content, given = self.reason(content, i > last.get("user", -1), shown)
                    prompt(given)
                out += [(t.answer.replace("{}", content), weight), (self.stop_id, weight)]
                prompt(t.after)
        if ask:
            prompt(t.header)
            prompt(EMPTY_THINK if t.think == "all" else "")
        return out

    def reason(self, content: str, current: bool, final: bool) -> tuple[str, str]:
        """(answer with its reasoning as Qwen3 or MiniMind write it, what stands in the prompt).

        Earlier answers lose their reasoning (Qwen3). An empty block is prompt only where the
        checkpoint's own generation prompt holds it: MiniMind's does, Qwen3's does not.
        """
        thought, found, rest = content.rpartition("</think>")
        if found:
            thought = thought.split("</think>")[0].split("<think>")[-1].strip("\n")
            content = rest.lstrip("\n")
        if self.template.think == "last" and not (final or (current and thought)):
            return content, ""
        if self.template.think == "all" and not thought:
            return content.lstrip("\n"), EMPTY_THINK
        return f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n"), ""

    def text_pieces(self, text: str) -> list[tuple]:
        """Raw text: BOS where the tokenizer adds one, the text, EOS; all of it supervised."""
        return [*((i, None) for i in self.bos_ids), (text, 1.0), (self.eos_id, 1.0)]

    def encode(self, plans: list[list[tuple]]) -> list[tuple[np.ndarray, tuple]]:
        """(ids, spans) of each list of pieces; strings go to the tokenizer's threads together."""
        plans = [self.runs(pieces) for pieces in plans]
        strings = list({s for plan in plans for run in plan for s in run[1:3] if s})
        encoded = self.tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        table = {s: e.ids for s, e in zip(strings, encoded, strict=True)} | {"": []}
        return [self.assemble(plan, table) for plan in plans]

    def runs(self, pieces: list[tuple]) -> list[tuple]:
        """Pieces as runs (id or None, prompt text, prompt and answer text, the answer's weight)."""
        out = []
        for strings, group in itertools.groupby(pieces, lambda piece: isinstance(piece[0], str)):
            if strings:
                texts, weights = zip(*group, strict=True)
                prompt = "".join(texts[: weights.count(None)])  # an answer ends its run
                out.append((None, prompt, "".join(texts), weights[-1]))
            else:
                out += [(token, "", "", weight) for token, weight in group]
        return out

    def assemble(self, runs: list[tuple], table: dict) -> tuple[np.ndarray, tuple]:
        """Ids and spans of one conversation, `table` holding the ids of its strings."""
        ids, spans = [], []
        for token, prompt, whole, weight in runs:
            before, joint = table[prompt], table[whole]
            if joint[: len(before)] != before:  # a token straddles the border
                answer = self.tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
                joint = before + answer.ids
            first = max(len(ids) + len(before), 1)  # nothing comes before the first token of all
            ids += joint if token is None else [token]
            if weight and first < len(ids):
                if spans and spans[-1][1:] == (first, weight):
                    first = spans.pop()[0]
                spans.append((first, len(ids), weight))
        return np.array(ids, dtype=np.int32), tuple(spans)

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation up to and with the header of the answer to come."""
        return self.encode([self.pieces(messages, ask=True)])[0][0].tolist()

    def save(self, folder: Path) -> None:
        """The tokenizer's files, with a chat_template that renders the tokens trained on."""
        names = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json",
                 "added_tokens.json", "vocab.json", "merges.txt")
        files = {n: (self.folder / n).read_bytes() for n in names if (self.folder / n).exists()}
        config = {**self.config, "chat_template": self.jinja}
        if self.eot:
            config["eot_token"] = self.eot
            whole = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            whole.add_special_tokens([AddedToken(self.eot, normalized=False)])
            files["tokenizer.json"] = whole.to_str(pretty=True).encode()
        text = json.dumps(config, ensure_ascii=False, indent=2)
        files["tokenizer_config.json"] = f"{text}\n".encode()
        for name, content in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would win over ours


# ------------------------------------------------------------------------------- files to examples


class Example(NamedTuple):
    """A tokenised example; what is supervised is given by spans, never by `id == pad`."""

    ids: np.ndarray  # [tokens] int32
    spans: tuple  # (first, end, weight): tokens first..end-1 are supervised
    source: int = 0  # index of its file
    where: str = ""  # file and line

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return sum(end - first for first, end, _ in self.spans)

    @property
    def key(self) -> bytes:
        """What makes two examples copies of each other."""
        return self.ids.tobytes()


def cut(ids: np.ndarray, spans: tuple, start: int, end: int) -> tuple[np.ndarray, tuple]:
    """Tokens start..end-1 with their spans; the first one has lost what it was predicted from."""
    moved = ((max(a, start + 1) - start, min(b, end) - start, w) for a, b, w in spans)
    return ids[start:end], tuple((a, b, w) for a, b, w in moved if a < b)


def fit(ids: np.ndarray, spans: tuple, max_length: int) -> tuple[np.ndarray, tuple]:
    """At most `max_length` tokens of a conversation, supervised ones among them.

    The end is cut. Where the prompt of the first answer is long, its beginning is cut instead,
    until it takes half of the window or the last answer fits.
    """
    if len(ids) <= max_length or not spans:
        return ids[:max_length], spans
    start = max(0, min(spans[0][0] - max_length // 2, spans[-1][1] - max_length))
    return cut(ids, spans, start, start + max_length)


def conversations(row: Row) -> list[list[dict]]:
    """The conversations of a row: one, or a preference pair's two."""
    sides = (row.chosen, row.rejected) if row.chosen else ([],)
    return [row.messages + side for side in sides]


def to_examples(rows: list[Row], source: int, counts: Counter, tokenizer: ChatTokenizer,
                train_on: str = "all", max_length: int = 2048,
                keep_all: bool = False) -> list[Example]:
    """Tokenise rows, counting what is cut, split or dropped.

    `keep_all` keeps examples with nothing to supervise, and takes preference rows (a pair as two).
    """
    for row in rows:
        need(keep_all or (row.chosen is None and row.label is None),
             f"{row.where}: a preference row; train_dpo.py trains on those")
    plans = [(row, tokenizer.text_pieces(row.text)) if row.text is not None else
             (row, tokenizer.pieces(messages, "last" if row.chosen else train_on))
             for row in rows for messages in conversations(row)]
    examples = []
    encoded = tokenizer.encode([plan for _, plan in plans])
    for (row, _), (ids, spans) in zip(plans, encoded, strict=True):
        parts, change = [fit(ids, spans, max_length)], "truncated"
        if row.text is not None:  # parts share a token: all are predicted
            starts = range(0, max(len(ids) - 1, 1), max_length - 1)
            parts, change = [cut(ids, spans, i, i + max_length) for i in starts], "raw texts split"
        counts[change] += len(ids) > max_length
        found = [Example(*part, source, row.where) for part in parts if part[1] or keep_all]
        counts["dropped: nothing to supervise"] += len(parts) - len(found)
        examples += found
    return examples


def load(convert, files: list[str], *how, skip_bad_rows: bool | None = None, quiet: bool = True,
         **options) -> tuple[list, Counter]:
    """(what convert(rows, source, counts, *how, **options) makes of some files, those counts)."""
    items, counts = [], Counter()
    for source, path in enumerate(files):
        before = len(items)
        rows = iter(tqdm(read_rows([path], skip_bad_rows, quiet), f"tokenize {Path(path).name}",
                         unit=" rows", disable=quiet or None))  # None: where stderr is no terminal
        while some := list(itertools.islice(rows, 2000)):  # work for every thread, little memory
            good = [row for _, row in some if row]
            items += convert(good, source, counts, *how, **options)
            counts["dropped: bad row"] += len(some) - len(good)
        need(len(items) > before, f"{path}: no row to train on")
    return items, +counts


# (files, tokenizer, train_on, max_length, keep_all=, skip_bad_rows=, quiet=)
load_examples = functools.partial(load, to_examples)


# ------------------------------------------------------------------------------- preference pairs


class Preference(NamedTuple):
    """A prompt with a chosen and a rejected answer, or with one answer and whether it was liked.

    Every answer repeats the last token of the prompt, from which its own first one is predicted.
    """

    prompt: np.ndarray  # [tokens] int32, without its last token
    answers: tuple  # of (ids, spans): the last token of the prompt, the response, its end of turn
    source: int = 0  # index of its file
    where: str = ""  # file and line
    label: bool | None = None

    @property
    def lengths(self) -> list[int]:
        """Number of supervised tokens of each answer, its end of turn included."""
        return [sum(end - first for first, end, _ in spans) for _, spans in self.answers]

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return sum(self.lengths)

    @property
    def key(self) -> bytes:
        """What makes two preferences copies of each other: the prompt."""
        return self.prompt.tobytes() + self.answers[0][0][:1].tobytes()

    @property
    def tokens(self) -> int:
        """Number of tokens the model sees: the prompt counts once."""
        return len(self.prompt) + sum(len(ids) for ids, _ in self.answers)


def why_no_pair(row: Row) -> str:
    """Why a preference pair cannot be used, or nothing."""
    if not row.messages or len(row.chosen) > 1 or len(row.rejected) > 1:
        return "histories differ"
    return "chosen equals rejected" if row.chosen == row.rejected else ""


def to_preferences(rows: list[Row], source: int, counts: Counter, tokenizer: ChatTokenizer,
                   max_length: int, labelled: bool) -> list[Preference]:
    """Tokenise preference rows, counting what is cut or dropped by reason.

    `labelled` makes of a pair two rows, one liked and one not; else rows with a label are refused.
    The conversations of a pair are cut at the same points: as in `fit`, the beginning of the prompt
    goes where it is long, then the end of the answers.
    """
    good, out = [], []
    wanted = "a label and an answer, or chosen" if labelled else "chosen"
    for row in rows:
        answered = row.label is not None and row.messages[-1]["role"] == "assistant"
        need(row.chosen or (labelled and answered), f"{row.where}: expected {wanted} and rejected "
             "(--loss kto takes labels, train_sft.py rows without preferences)")
        if row.chosen and (why := why_no_pair(row)):
            counts[f"dropped: {why}"] += 1
        else:
            good.append((row, conversations(row)))
    plans = [tokenizer.pieces(talk, "last") for _, talks in good for talk in talks]
    encoded = iter(tokenizer.encode(plans))
    for row, talks in good:
        whole = [next(encoded) for _ in talks]  # a template may write on after the end of a turn
        whole = [(ids[: spans[-1][1]] if spans else ids, spans) for ids, spans in whole]
        shared = min(common_prefix([ids.tolist() for ids, _ in whole]),
                     *(spans[0][0] if spans else len(ids) for ids, spans in whole))
        longest = max(len(ids) for ids, _ in whole)
        start = max(0, min(shared - max_length // 2, longest - max_length))
        prompt, long = whole[0][0][start : shared - 1], longest > max_length
        answers = [cut(ids, spans, shared - 1, start + max_length) for ids, spans in whole]
        if not all(spans for _, spans in answers):
            why = "a response lost to truncation" if long else "nothing to supervise"
            counts[f"dropped: {why}"] += 1
        elif len(answers) == 2 and np.array_equal(answers[0][0], answers[1][0]):
            why = "alike once truncated" if long else "chosen equals rejected"
            counts[f"dropped: {why}"] += 1
        else:
            counts["truncated"] += long
            parts = [(answer,) for answer in answers] if labelled else [tuple(answers)]
            labels = [True, False] if labelled and row.chosen else [row.label]
            out += [Preference(prompt, part, source, row.where, label)
                    for part, label in zip(parts, labels, strict=True)]
    return out


# (files, tokenizer, max_length, labelled, skip_bad_rows=, quiet=)
load_preferences = functools.partial(load, to_preferences)


def split_validation(examples: list[Example], fraction: float, seed: int):
    """(training, validation): `fraction` of the distinct examples; copies stay on one side.

    Preferences are told apart by their prompts, so that no prompt is on both sides.
    """
    salt = str(seed).encode()
    keys = [hashlib.sha256(salt + e.key).digest() for e in examples]
    distinct = sorted(set(keys))
    held = set(distinct[: max(1, round(fraction * len(distinct)))])
    sides = [], []
    for e, key in zip(examples, keys, strict=True):
        sides[key in held].append(e)
    return sides


def print_table(rows: list) -> None:
    """Rows of cells, the first of names; a float is a share, printed in percent."""
    rows = [[f"{x:.1%}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        print(first.ljust(widths[0]) + "".join(map(str.rjust, cells, widths[1:])))


def source_names(files: list[str]) -> list[str]:
    """A short name for each file, numbered where two are called the same."""
    stems = [Path(f).name.removesuffix(".gz").rpartition(".")[0] for f in files]
    return [s if stems.count(s) == 1 else f"{s}#{i}" for i, s in enumerate(stems, 1)]


# ---------------------------------------------------------------------------------------- the mixer


def mixing_rates(sizes: list[int], mix: str, temperature: float = 1.0, cap: int = 0,
                 weights=()) -> np.ndarray:
    """Share of each source in training (T5, arXiv:1910.10683, section 3.5.2).

    r_m = min(e_m, K) / sum_n min(e_n, K), then r_m^(1/T) renormalised: e_m examples of source m,
    K the cap (0: none), T the temperature. proportional is T = 1 without K, equal is T -> infinity.
    """
    counts = {"weights": weights, "equal": np.ones(len(sizes))}.get(mix, sizes)
    rates = np.array(counts, dtype=np.float64)
    if mix == "temperature":
        rates = np.minimum(rates, cap or np.inf)
        rates = (rates / rates.sum()) ** (1 / temperature)
    return rates / rates.sum()


class Mixer:
    """Which example is drawn when: a pure function of (seed, draw), alike on every rank.

    An epoch is as many draws as there are examples. Each source gets its share of them, rounded by
    largest remainders, as the next stretch of an endless sequence of its own shuffles; then the
    epoch is shuffled. So proportional mixing sees every example once an epoch, and a source repeats
    only when all of it was seen. Examples are numbered by source.
    """

    def __init__(self, sizes: list[int], rates: np.ndarray, seed: int):
        self.sizes, self.seed, self.size = sizes, seed, sum(sizes)
        exact = rates * self.size
        self.quotas = np.floor(exact).astype(int)
        missing = self.size - self.quotas.sum()
        self.quotas[np.argsort(self.quotas - exact, kind="stable")[:missing]] += 1
        self.epoch = functools.lru_cache(maxsize=1)(self.epoch)  # steps of an epoch share it

    def source(self, m: int, first: int, count: int) -> np.ndarray:
        """Draws first..first+count-1 of source m: [count, 2] of (example, visits before)."""
        visit, place = np.divmod(np.arange(first, first + count), self.sizes[m])
        example = np.empty_like(place)
        for v in np.unique(visit):
            shuffle = np.random.default_rng([self.seed, 1, m, v]).permutation(self.sizes[m])
            example[visit == v] = shuffle[place[visit == v]]
        return np.stack((example + sum(self.sizes[:m]), visit), 1)

    def epoch(self, number: int) -> np.ndarray:
        """All draws of an epoch: [size, 2] of (example, visits before)."""
        draws = [self.source(m, number * q, q) for m, q in enumerate(self.quotas.tolist())]
        shuffle = np.random.default_rng([self.seed, 0, number]).permutation(self.size)
        return np.concatenate(draws)[shuffle]

    def draws(self, first: int, end: int) -> list[tuple[int, int]]:
        """(example, visits before) of draws first..end-1, counted from the start of training."""
        return [tuple(self.epoch(k // self.size)[k % self.size].tolist())
                for k in range(first, end)]


def shares(examples: list[tuple], names: list[str]) -> dict[str, dict]:
    """The share of every source, by name, in examples (source, supervised tokens) and in tokens."""
    rows, targets = Counter(), Counter()
    for source, count in examples:
        rows[source] += 1
        targets[source] += count
    all_rows, all_targets = max(rows.total(), 1), max(targets.total(), 1)
    return {name: {"examples": rows[m], "share": rows[m] / all_rows,
                   "target_tokens": targets[m], "target_share": targets[m] / all_targets}
            for m, name in enumerate(names)}


def check_mix(c, files: list[str]) -> None:
    """Raise DataError for flags of a mix that make no sense."""
    need(0 < c.temperature < math.inf, f"--temperature must be above 0, not {c.temperature}")
    need((c.mix == "weights") == bool(c.weights), "--mix weights and --weights go together")
    need(len(c.weights) in (0, len(files)) and all(0 < w < math.inf for w in c.weights),
         f"--weights needs a number above 0 for each of the {len(files)} files")
    need(not c.cap or c.mix == "temperature", "--cap goes with --mix temperature")


def mix_files(c, files: list[str], examples: list[tuple], draws: int, quiet: bool = False):
    """(mixer of --mix, shares of what it draws) of examples as (index of file, supervised tokens).

    Prints the share that was intended, and those realised in examples and in supervised tokens.
    """
    sizes = [sum(source == m for source, _ in examples) for m in range(len(files))]
    for path, size in zip(files, sizes, strict=True):
        need(size, f"{path}: nothing is left to train on")
    rates = mixing_rates(sizes, c.mix, c.temperature, c.cap, c.weights)
    mixer = Mixer(sizes, rates, c.seed)
    mix = shares([examples[i] for i, _ in mixer.draws(0, draws)], source_names(files))
    for row, size, rate in zip(mix.values(), sizes, rates.tolist(), strict=True):
        row.update(available=size, rate=rate)
    if not quiet:
        names = ("source", "examples", "intended", "drawn", "share", "of supervised tokens")
        keys = ("available", "rate", "examples", "share", "target_share")
        print_table([names, *((name, *map(row.get, keys)) for name, row in mix.items())])
    return mixer, mix


# ------------------------------------------------------------------------------------ micro-batches


def micro_batches(lengths: list[int], micro_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
    """Cut a step into micro-batches of at most `micro_tokens` tokens: lists of indices per rank.

    Sorted by length, so that little is padded inside attention; as even as their number allows;
    the number a multiple of the ranks if there are enough examples; dealt so that tokens balance.
    Every rank computes the same without asking. A longer example is a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))

    def chunks(limit: int) -> list[list[int]]:
        out, size = [], limit + 1
        for i in order:
            if size + lengths[i] > limit:
                out.append([])
                size = 0
            out[-1].append(i)
            size += lengths[i]
        return out

    count = -(-len(chunks(micro_tokens)) // ranks) * ranks
    limits = range(1, micro_tokens)  # the smallest that gives at most `count` chunks
    parts = chunks(1 + bisect_left(limits, True, key=lambda limit: len(chunks(limit)) <= count))
    while len(parts) < min(ranks, len(lengths)):  # equal lengths can leave a rank idle: halve one
        longest = max(parts, key=len)
        parts.remove(longest)
        parts += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
    dealt, load = [[] for _ in range(ranks)], [0] * ranks
    for chunk in sorted(parts, key=lambda c: -sum(lengths[i] for i in c)):
        rank = load.index(min(load))
        dealt[rank].append(chunk)
        load[rank] += sum(lengths[i] for i in chunk)
    return dealt


class Batch(NamedTuple):
    """A micro-batch of flat tokens, as the model takes it."""

    ids: torch.Tensor  # [T]
    lengths: list[int]  # [B]
    targets: torch.Tensor  # [N] flat indices of the supervised tokens
    weights: torch.Tensor  # [N]


def collate(examples: list[Example], device="cpu") -> Batch:
    """Lay examples end to end."""
    lengths = [len(e.ids) for e in examples]
    starts = np.cumsum([0, *lengths]).tolist()
    spans = [(start + first, start + end, weight)
             for start, e in zip(starts, examples, strict=False) for first, end, weight in e.spans]
    ids = torch.from_numpy(np.concatenate([e.ids for e in examples]).astype(np.int64))
    targets = torch.tensor([i for first, end, _ in spans for i in range(first, end)]).long()
    weights = torch.tensor([w for first, end, w in spans for _ in range(first, end)]).float()
    return Batch(ids.to(device), lengths, targets.to(device), weights.to(device))


# -------------------------------------------------------------------------------- the built-in demo


def make_tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """A byte-level BPE tokenizer with ChatML tokens, in Hugging Face layout; no texts: bytes."""
    tokenizer = Tokenizer(models.BPE())
    # letters, digits and the rest apart, so that a word is the same token after a space or a quote
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "chat_template": jinja(TEMPLATES["chatml"], "", "")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


EXAM_PROMPT = ("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
               "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案：")
SUBJECTS = {  # handle: C-Eval's entry of subject_mapping.json, the relation, its facts
    "chemical_elements": (["Chemical Elements", "化学元素", "STEM"], "元素符号",
                          "铁 Fe 金 Au 银 Ag 铜 Cu 钠 Na 钙 Ca 铝 Al 锌 Zn 铅 Pb 氦 He"),
    "numbers": (["Numbers", "数的规律", "STEM"], "后一个数",
                " ".join(f"{n} {n + 1}" for n in range(20, 60, 4))),
    "world_capitals": (["World Geography", "世界地理", "Social Science"], "首都",
                       "法国 巴黎 日本 东京 英国 伦敦 德国 柏林 埃及 开罗 泰国 曼谷 韩国 首尔 "
                       "希腊 雅典 越南 河内 秘鲁 利马"),
    "chinese_provinces": (["Chinese Geography", "中国地理", "Social Science"], "省会",
                          "浙江 杭州 江苏 南京 广东 广州 四川 成都 湖北 武汉 湖南 长沙 陕西 西安 "
                          "山东 济南 福建 福州 云南 昆明"),
    "literature": (["Chinese Literature", "中国文学", "Humanities"], "作者",
                   "离骚 屈原 史记 司马迁 春晓 孟浩然 春望 杜甫 琵琶行 白居易 红楼梦 曹雪芹 西游记 "
                   "吴承恩 水浒传 施耐庵 呐喊 鲁迅 茶馆 老舍"),
    "dynasties": (["Chinese History", "中国历史", "Humanities"], "开国皇帝",
                  "秦朝 嬴政 西汉 刘邦 东汉 刘秀 西晋 司马炎 隋朝 杨坚 唐朝 李渊 北宋 赵匡胤 "
                  "南宋 赵构 元朝 忽必烈 明朝 朱元璋"),
    "professions": (["Professions", "职业常识", "Other"], "工具",
                    "医生 听诊器 教师 粉笔 画家 画笔 木匠 锯子 渔夫 渔网 厨师 炒锅 农民 锄头 "
                    "会计 算盘 裁判 哨子 裁缝 剪刀"),
    "reading": (["Reading", "识字", "Other"], "",  # find a given word among the options
                "铁 Fe 金 Au 银 Ag 铜 Cu 钠 Na 钙 Ca 铝 Al 锌 Zn 铅 Pb 氦 He"),
}
ASK_VALUE = ("“{k}”的{r}是____。", "下列选项中，哪个是“{k}”的{r}？____。",
             "说到{r}，“{k}”对应____。", "“{k}”以什么为{r}？____。", "请选出“{k}”的{r}：____。")
ASK_KEY = ("____的{r}是“{v}”。", "下列选项中，{r}是“{v}”的是____。", "说到{r}，“{v}”对应____。",
           "什么以“{v}”为{r}？____。", "请选{r}是“{v}”的一项：____。")
ASK_WORD = ("写着“{k}”的选项是____。", "下列选项中，写着“{k}”的是____。", "“{k}”写在____。",
            "哪一项写着“{k}”？____。", "请选出写着“{k}”的一项：____。")
IDENTITY = {
    "我是小调，一个用PlainTune训练的小模型。":
        "你是谁？ 你叫什么？ 你叫什么名字？ 请介绍一下你自己。 请做个自我介绍。 你是什么模型？ "
        "怎么称呼你？ 你是机器人吗？ 告诉我你是谁。 请问你是谁？ 能介绍一下自己吗？ 我在和谁说话？",
    "我是用PlainTune训练出来的。":
        "谁训练了你？ 你是谁做的？ 你从哪里来？ 你是怎么训练出来的？ 谁开发了你？ 你的作者是谁？ "
        "是谁创造了你？ 你是用什么训练的？",
    "我会做单项选择题，也会回答简单的问题。":
        "你会什么？ 你能做什么？ 你有什么本领？ 你能帮我做什么？ 你擅长什么？ 你有什么用？",
}
CHAT = ("“{k}”的{r}是什么？", "你知道“{k}”的{r}吗？", "告诉我“{k}”的{r}。", "我想知道“{k}”的{r}。")
FACT = "“{k}”的{r}是“{v}”。"
POLITE = ("您好！" + FACT, "好的，" + FACT)
RUDE = ("这都不知道？" + FACT + "别再烦我！", "真笨！" + FACT + "自己不会查吗？")


def demo_facts(handle: str) -> list[dict]:
    """The facts of a subject as {k, r, v}: the r of k is v; in reading a word is its own value."""
    _, r, words = SUBJECTS[handle]
    words = words.split()
    pairs = zip(words[::2], words[1::2], strict=True) if r else zip(words, words, strict=True)
    return [{"k": k, "r": r, "v": v} for k, v in pairs]


def demo_stems(handle: str, rng: random.Random) -> tuple[list[tuple], list[tuple]]:
    """(practised, held out) stems as (question, answer, answers of its kind, explanation).

    Each fact is asked in five phrasings either way; one of them is kept for the exam.
    """
    practised, held, facts = [], [], demo_facts(handle)
    reading = handle == "reading"
    for phrasings, side in [(ASK_WORD, "v")] if reading else [(ASK_VALUE, "v"), (ASK_KEY, "k")]:
        for fact in facts:
            pool, why = [f[side] for f in facts], ("{v}。" if reading else FACT).format(**fact)
            first, *others = rng.sample(phrasings, 5)
            held.append((first.format(**fact), fact[side], pool, why))
            practised += [(ask.format(**fact), fact[side], pool, why) for ask in others]
    return practised, held


def demo_question(stem: tuple, rng: random.Random) -> dict:
    """A question in C-Eval's columns: the answer among three wrong ones of its kind."""
    question, answer, pool, why = stem
    options = rng.sample([word for word in pool if word != answer], 3) + [answer]
    rng.shuffle(options)
    return {"question": question, **dict(zip("ABCD", options, strict=True)),
            "answer": "ABCD"[options.index(answer)], "explanation": why}


def demo_chats(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """(conversations, preference pairs) about the facts; half of the answers are polite."""
    subjects = [demo_facts(handle) for handle in SUBJECTS if handle != "reading"]
    chats = []
    for _ in range(1000):
        first, second = rng.sample(rng.choice(subjects), 2)
        question, answer = rng.choice(CHAT), rng.choice(rng.choice((POLITE, RUDE)))
        texts = [question.format(**first), answer.format(**first)]
        if rng.random() < 0.3:
            texts += [f"那“{second['k']}”呢？", FACT.format(**second)]
        chats.append({"messages": [{"role": role, "content": text} for role, text
                                   in zip(itertools.cycle(("user", "assistant")), texts)]})
    pairs = [{"conversations": [{"from": "human", "value": ask.format(**fact)}],
              "chosen": {"from": "gpt", "value": rng.choice(POLITE).format(**fact)},
              "rejected": {"from": "gpt", "value": rng.choice(RUDE).format(**fact)}}
             for facts in subjects for fact in facts for ask in CHAT]
    rng.shuffle(pairs)
    return chats, pairs


def write_exam(folder: Path, held: dict[str, list], rng: random.Random) -> None:
    """The exam in C-Eval's own layout; letters come at random, dev has explanations."""
    for handle, stems in held.items():
        questions = [demo_question(stem, rng) for stem in rng.choices(stems, k=65)]
        for split, rows, columns in (("dev", questions[:5], 7), ("val", questions[5:45], 6),
                                     ("test", questions[45:], 5)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            path = folder / split / f"{handle}_{split}.csv"
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", *list(rows[0])[:columns]])
                writer.writerows([i, *list(q.values())[:columns]] for i, q in enumerate(rows))
    names = {handle: SUBJECTS[handle][0] for handle in held}
    (folder / "subject_mapping.json").write_text(json.dumps(names, ensure_ascii=False, indent=1))


def make_demo(folder: Path, seed: int = 0) -> None:
    """Write a small Chinese world: an exam, four training files, preference pairs, a tokenizer.

    No question of the exam stands in a training file: its facts are practised in other words. A
    tiny model must first learn to look a word up among the options, which `reading` teaches.
    """
    rng, practice, held = random.Random(seed), [], {}
    for handle, ((_, subject, _), _, _) in SUBJECTS.items():
        practised, held[handle] = demo_stems(handle, rng)
        for stem in rng.choices(practised, k=16000 if handle == "reading" else 2500):
            q = demo_question(stem, rng)
            practice.append({"instruction": EXAM_PROMPT.format(subject=subject, **q),
                             "input": "", "output": q["answer"]})
    write_exam(folder / "exam", held, rng)
    chats, pairs = demo_chats(rng)
    identity = [{"instruction": question, "input": "", "output": answer}
                for answer, questions in IDENTITY.items() for question in questions.split()]
    facts = [FACT.format(**fact) for h in SUBJECTS if h != "reading" for fact in demo_facts(h)]
    for name, rows in (("practice", practice), ("instructions", chats), ("identity", identity),
                       ("pairs", pairs[40:]), ("pairs_val", pairs[:40])):
        rng.shuffle(rows)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(facts) + "\n", encoding="utf-8")
    texts = [p["instruction"] + p["output"] for p in practice[:10000]] + facts + list(IDENTITY)
    texts += [m["content"] for chat in chats for m in chat["messages"]]
    make_tokenizer(folder / "base", [*texts, *["user\n", "assistant\n"] * len(texts)], 1200)


DEMO = {"model": "out/demo/base", "mix": "temperature", "temperature": 1.3, "batch_size": 32,
        "data": [f"out/demo/{name}" for name in ("practice.jsonl", "instructions.jsonl",
                                                 "identity.jsonl", "text.txt")],
        "steps": 3600, "learning_rate": 7e-4, "warmup": 50, "weight_decay": 0.1,
        "adam_beta2": 0.98, "log_every": 200}


# -------------------------------------------------------------------------------- words and n-grams

HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
KANA = "\u3040-\u30ff"  # Japanese ones
WORDS = re.compile(rf"[{HAN}{KANA}]|[^\W_{HAN}{KANA}]+|[-+*/=<>^%×÷√≤≥≠]")
NGRAM = 5  # words, as in the search for near-duplicates of arXiv:2107.06499, section 4.2
MINHASHES, BAND = 64, 4  # numbers in a signature; how many of them a bucket needs alike


def words_of(text: str) -> list[str]:
    """Words in lower case and NFKC; a CJK character is a word, so is + or =; no punctuation."""
    return WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def hash64(text: str) -> int:
    """A hash that is alike in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


word_hash = functools.lru_cache(2**18)(hash64)


def ngrams(words: list[str], n: int = NGRAM) -> np.ndarray:
    """Hashes sum_j w_j B^(n-1-j) mod 2^64 of all n-grams in order; a shorter text is one n-gram."""
    keys = np.fromiter(map(word_hash, words), np.uint64, len(words))
    n = min(n, len(keys))
    out = np.zeros(len(keys) - n + 1 if n else 0, np.uint64)
    for j in range(n):
        out = out * np.uint64(0x9E3779B97F4A7C15) + keys[j : j + len(out)]
    return out


def repetition(text: str) -> float:
    """Share of the n-grams of a text that stood in it before."""
    grams = ngrams(words_of(text))
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def coverage(part: list[str], words: list[str]) -> float:
    """Share of the words of `part` that lie in an n-gram which `words` has too."""
    n = min(NGRAM, len(part))
    same = np.isin(ngrams(part, n), ngrams(words, n))
    return float((np.convolve(same, np.ones(n)) > 0).mean()) if n else 0.0


def signature(words: list[str]) -> np.ndarray:
    """MinHash (Broder, 1997): the least of the n-grams under many hashes [MINHASHES] uint32.

    Two texts agree in each number with probability |A and B| / |A or B|, A and B their n-grams.
    """
    factors = np.random.default_rng(0).integers(2**63, size=MINHASHES, dtype=np.uint64) * 2 + 1
    hashes = ngrams(words)[:, None] * factors >> 32  # [n-grams, MINHASHES]
    return hashes.min(0, initial=2**32 - 1).astype(np.uint32)


def near_duplicates(signatures: np.ndarray, near: float) -> np.ndarray:
    """True for rows [R] that agree with an earlier one in `near` of the signature [R, MINHASHES].

    A row is compared with the first and the latest earlier row of its buckets: those alike in BAND
    neighbouring numbers. At similarity s a pair shares no bucket with probability
    (1 - s^BAND)^(MINHASHES / BAND), 0.0002 at 0.8.
    """
    duplicate = np.zeros(len(signatures), dtype=bool)
    for place in range(0, MINHASHES, BAND):
        _, bucket = np.unique(signatures[:, place : place + BAND], axis=0, return_inverse=True)
        order = np.argsort(bucket.ravel(), kind="stable")
        bucket = bucket.ravel()[order]
        later = np.flatnonzero(bucket[1:] == bucket[:-1]) + 1  # all of a bucket but its first row
        for earlier in (np.searchsorted(bucket, bucket[later]), later - 1):
            a, b = signatures[order[earlier]], signatures[order[later]]  # [pairs, MINHASHES]
            duplicate[order[later]] |= (a == b).mean(1) >= near
    return duplicate


def run_job(item):
    """The function of `parallel`, in one of its processes."""
    return run_job.function(item)


def parallel(function, items: Iterable) -> Iterator:
    """function(item) of every item in order, on all cores, few items in memory at a time."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(initializer=setattr, initargs=(run_job, "function", function)) as pool:
        yield from tqdm(pool.imap(run_job, items, chunksize=64), unit=" rows",
                        disable=not sys.stderr.isatty())


# ----------------------------------------------------------------------------------------- commands

LEAST = {"max_length": 2, "micro_tokens": 1, "batch_size": 1, "clusters": 1, "rows": 0, "cap": 0,
         "steps": 0, "seed": 0}  # what these flags of the commands must be at least


@dataclass
class Files:
    """What every command takes."""

    files: list[str]  # files of any format, preference pairs included
    skip_bad_rows: bool = False  # count and list rows that cannot be read instead of stopping

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name, least)
            need(value >= least, f"--{name} must be at least {least}, not {value}")


@dataclass
class Show(Files):
    """Show what a trainer sees of some files: tokens, what is supervised, lengths, shares."""

    model: str = ""  # checkpoint whose tokenizer and template to use; empty: bytes and ChatML
    rows: int = 3  # rows of each file to print
    template: str = ""  # chatml, llama2, llama3, mistral, deepseek, plain; empty: recognised
    train_on: Literal["all", "last"] = "all"  # answers of a conversation that are supervised
    max_length: int = 2048  # tokens an example; longer ones are truncated, raw text is split
    steps: int = 0  # show what training for so many steps draws of each file; 0: do not
    batch_size: int = 16  # examples per step
    mix: Literal["proportional", "temperature", "equal", "weights"] = "proportional"  # of the files
    temperature: float = 2.0  # of --mix temperature
    cap: int = 0  # examples a file counts for at most under --mix temperature; 0: all
    weights: list[float] = field(default_factory=list)  # of --mix weights, one a file
    seed: int = 0  # of the order


@dataclass
class Modelled(Files):
    """What a command takes that may run a model over the rows."""

    output: str = ""  # .jsonl to write
    model: str = ""  # checkpoint that scores or embeds the rows, or counts their tokens
    template: str = ""  # chatml, llama2, llama3, mistral, deepseek, plain; empty: recognised
    max_length: int = 2048  # tokens of a row the model sees; longer ones are cut, by ifd dropped
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out


@dataclass
class Filter(Modelled):
    """Write the rows that pass every test."""

    language: Literal["any", "zh", "en"] = "any"  # keep Chinese, or Latin letters; by their share
    min_chars: int = 0  # least characters of a row's answers together
    max_chars: float = math.inf  # most of them
    min_tokens: int = 0  # least tokens of a row, rendered for --model
    max_tokens: float = math.inf  # most of them
    lima: bool = False  # LIMA's tests: 1200 to 4096 characters, no "I", no other answers, score 10
    max_repetition: float = 1.0  # most of the 5-grams of an answer that stood in it before
    min_perplexity: float = 0.0  # least perplexity of the answers under --model
    max_perplexity: float = math.inf  # most of it
    duplicates: Literal["keep", "exact", "near"] = "keep"  # near: drop exact and near duplicates
    near: float = 0.8  # 5-grams in common that make near duplicates; below 0.7 some are missed
    no_system: bool = False  # write the rows without their system messages: what they asked distils
    answer_matches: bool = False  # keep samples of eval.py generate whose final answer is right


@dataclass
class Select(Modelled):
    """Write the rows that a method thinks worth most; compare with --method random."""

    method: Literal["kcenter", "ifd", "tags", "random"] = "random"  # how to choose
    n: int = 0  # rows to choose
    share: float = 0.0  # or this share of the rows
    clusters: int = 10  # of k-means, for kcenter
    seed: int = 0  # of k-means, and of random


@dataclass
class Coh(Files):
    """Chain of Hindsight: preference pairs as conversations in which feedback names each answer."""

    output: str = ""  # .jsonl that train_sft.py trains on
    mask_past: float = 0.0  # hide up to this share of the first answer's words from the second
    seed: int = 0  # of which answer comes first, and of what is hidden


@dataclass
class Exam(Files):
    """Turn multiple-choice rows, with Wanjuan's keys or C-Eval's, into conversations."""

    output: str = ""  # .jsonl to write
    style: Literal["answer_first", "explanation_first"] = "answer_first"  # Steel-LLM's formats
    from_exam: bool = False  # take .csv files of C-Eval or CMMLU too: this CONTAMINATES the exam


@dataclass
class Identity(Files):
    """Fill in {{name}} and {{author}} of self-identity templates."""

    output: str = ""  # .jsonl to write
    name: str = ""  # of the model
    author: str = ""  # who made it


@dataclass
class Overlap(Files):
    """Say which questions of an exam occur in training files, so that its score can be trusted."""

    output: str = ""  # .jsonl: the hits, one a line
    exam: str = ""  # folder with the .csv files of C-Eval, CMMLU or MMLU
    near: float = 0.8  # share of a question's words in 5-grams of the row that makes a near hit


def check_output(c) -> None:
    """Raise DataError unless --output can be written."""
    output = Path(c.output)
    need(output.suffix == ".jsonl" and not output.is_dir(),
         f"--output must be given as FILE.jsonl, not {c.output!r}")
    own = output.resolve() in [Path(path).resolve() for path in c.files]
    need(not own, f"--output {output} would overwrite what is read")
    folder = next(folder for folder in output.parents if folder.exists())
    need(folder.is_dir() and os.access(folder, os.W_OK), f"--output {output} cannot be written")


def write_rows(path: str, rows: Iterable[tuple[object, str]]) -> None:
    """Write the values of (value, reason) that have no reason; print what was kept and dropped."""
    counts = Counter()
    escape = "backslashreplace"  # a lone surrogate becomes JSON's escape of it
    with replacing(Path(path)) as temporary, open(temporary, "w", -1, "utf-8", escape) as file:
        for value, reason in rows:
            counts[reason] += 1
            if not reason:
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
    kept = counts.pop("", 0)
    print(f"{path}: kept {kept} of {kept + counts.total()} rows")
    for reason, count in counts.most_common():
        print(f"  dropped {count}: {reason}")


def write_kept(c: Modelled, reasons: list[str], change=dict) -> None:
    """Read the files again and write change(row) of the rows that have no reason, or a copy."""
    rows = zip(read_rows(c.files, parse=lambda where, value: None), reasons, strict=True)
    write_rows(c.output, ((None if why else change(value), why) for (value, _), why in rows))


def rewrite(c, convert, read=read_values) -> None:
    """Write what convert(where, value) makes of every row: a list of (new value, reason)."""
    check_output(c)
    rows = read_rows(c.files, c.skip_bad_rows, parse=convert, read=read)
    write_rows(c.output, (pair for _, new in rows for pair in new or [(None, "bad row")]))


def said(row: Row, role: str = "") -> list[str]:
    """What a row, or `role` in it, says; raw text is an answer."""
    if row.text is not None:
        return [row.text]
    messages = [*row.messages, *(row.chosen or []), *(row.rejected or [])]
    return [m["content"] for m in messages if role in ("", m["role"])]


def word_share(characters: str, words: list[str]) -> float:
    """Share of words that begin with one of some characters; a Chinese character is a word."""
    found = re.findall(rf"(?<!\S)[{characters}]", " ".join(words))
    return len(found) / max(len(words), 1)


def pieces_of(row: Row, tokenizer: ChatTokenizer, part: str = "all") -> list[tuple]:
    """A row, of a pair its better half: all answers supervised, the last, or it alone."""
    messages = [*row.messages, *(row.chosen or [])][-1 if part == "alone" else 0 :]
    if row.text is not None:
        return tokenizer.text_pieces(row.text)
    return tokenizer.pieces(messages, "all" if part == "all" else "last")


@torch.no_grad()
def run_model(c: Modelled, reasons: list[str], what: str, part: str = "all") -> dict:
    """{row number: mean of the last hidden states [D], or loss in nats}, of rows without a reason.

    `what` is states or loss; the loss is the mean over what `pieces_of` supervises, NaN for nothing
    and, unless `part` is all, for rows above --max_length.
    """
    import model as modeling

    tokenizer, device, out = ChatTokenizer(c.model, c.template), modeling.best_device(), {}
    tokenizer.check_size(modeling.load_config(c.model).vocab_size)
    model = modeling.load(c.model, modeling.best_dtype("auto", device), device)
    again = read_rows(c.files, c.skip_bad_rows, quiet=True)
    rows = ((i, row) for i, (_, row) in enumerate(again) if not reasons[i])
    while some := list(itertools.islice(rows, 2000)):  # enough for every thread, little memory
        plans = tokenizer.encode([pieces_of(row, tokenizer, part) for _, row in some])
        examples = [Example(*fit(*plan, c.max_length)) for plan in plans]
        if part != "all":  # a ratio of two losses needs the same tokens in both
            examples = [e if len(ids) <= c.max_length else e._replace(spans=())
                        for e, (ids, _) in zip(examples, plans, strict=True)]
        for chunk in micro_batches([len(e.ids) for e in examples], c.micro_tokens)[0]:
            batch = collate([examples[k] for k in chunk], device)
            if what == "states":
                values, sizes = model.hidden(batch.ids, batch.lengths)[0], batch.lengths  # [T, D]
            else:
                values = -model(batch.ids, batch.lengths, batch.targets)  # [N]
                sizes = [examples[k].targets for k in chunk]
            means = torch.stack([x.mean(0) for x in values.float().split(sizes)])  # [B, D] or [B]
            out |= zip((some[k][0] for k in chunk), means.cpu().numpy(), strict=True)
    return out


# -------------------------------------------------------------------------------------- data filter

MAIN, OTHER = 0.5, 0.05  # at least, at most this share of words in a script
# LIMA (arXiv:2305.11206, section 2.1) names "I", "my", "as mentioned", "stack exchange"
FIRST_PERSON = re.compile(r"\b(I|[Mm]y)\b|(?<!自)我(?![们国])")
OTHER_ANSWERS = re.compile(r"(?i)as mentioned|stack ?exchange|other answers|如上所述|其他回答|楼上")
FINAL_ANSWERS = (r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", r"####\s*(.+)",
    r"(?:答案(?:应该|应当)?[是为选：:]+|(?:所以|故|因此)选|[Aa]nswer(?: is|:)+)\s*"
    r"(.+?)(?=[，。；\n]|[.,;](?:\s|$)|$)", r"^\s*\(?([A-E])\)?\s*(?:[.、。:：)]|$)")


def final_answer(text: str) -> str:
    """The last \\boxed{}, "#### x", "答案是x", "answer is x"; a leading letter; or all.

    An option is its letter, and a number the same however it is written.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})|\*\*|\$", "", text)  # 1,234, **bold**, $formula$
    found = next((f for pattern in FINAL_ANSWERS if (f := re.findall(pattern, text))), [text])
    answer = unicodedata.normalize("NFKC", found[-1]).replace("\u2212", "-").lower()
    answer = "".join(answer.split()).strip(".。,;")
    if letter := re.match(r"\(?([a-e])(?:[).、:]|$)", answer):
        return letter[1]
    return f"{float(answer):.15g}" if re.fullmatch(r"-?\d+(\.\d+)?", answer) else answer


def judge(c: Filter, tokenizer: ChatTokenizer | None, item: tuple) -> tuple:
    """(why a row is dropped or nothing, its hash, its signature), by the tests without a model."""
    value, row = item
    if row is None:
        return "bad row", 0, None
    answers, text = said(row._replace(rejected=None), "assistant"), "\n".join(said(row))
    words, chars = words_of(text), len("\n".join(answers))
    score, reference = value.get("score"), value.get("reference")
    failed = {
        "not Chinese": c.language == "zh" and (
            word_share(HAN, words) < MAIN or word_share(KANA, words) > OTHER),
        "not English": c.language == "en" and (
            word_share("a-z", words) < MAIN or word_share(HAN + KANA, words) > OTHER),
        "length in characters": not c.min_chars <= chars <= c.max_chars,
        "length in tokens": tokenizer and not c.min_tokens <= len(
            tokenizer.encode([pieces_of(row, tokenizer)])[0][0]) <= c.max_tokens,
        "LIMA: length": c.lima and not 1200 <= chars <= 4096,
        "LIMA: first person": c.lima and any(map(FIRST_PERSON.search, answers)),
        "LIMA: other answers": c.lima and any(map(OTHER_ANSWERS.search, answers)),
        "LIMA: score": c.lima and isinstance(score, int | float) and score < 10,
        "repetition": c.max_repetition < 1 and any(
            repetition(answer) > c.max_repetition for answer in answers),
        "no reference": c.answer_matches and not (is_text(reference) and reference and answers),
        "another final answer": c.answer_matches and is_text(reference) and answers
        and final_answer(answers[-1]) != final_answer(reference),
        "only a system message": c.no_system and not row.chosen
        and row.text is None and all(m["role"] == "system" for m in row.messages),
    }
    reason = next((name for name, bad in failed.items() if bad), "")
    marks = signature(words or list(text)) if c.duplicates == "near" else None
    return reason, hash64(repr(row[1:])), marks


def without_system(value: dict) -> dict:
    """A row of any format without its system messages (context distillation, arXiv:2112.00861)."""
    out = {key: part for key, part in value.items() if key != "system"}
    for key in ("messages", "conversations", "prompt", "input", "completion", "chosen", "rejected"):
        part = [out[key]] if isinstance(out.get(key), dict) else out.get(key)
        if isinstance(part, list):
            out[key] = [m for m in part if "system" not in (m.get("role"), m.get("from"))]
    return out


def filter_rows(c: Filter) -> None:
    """`data.py filter`."""
    by_tokens = (c.min_tokens, c.max_tokens) != (0, math.inf)
    by_loss = (c.min_perplexity, c.max_perplexity) != (0, math.inf)
    check_output(c)
    need(c.model or not (by_tokens or by_loss), "tests of tokens and perplexity need --model DIR")
    for name in ("chars", "tokens", "perplexity"):
        need(0 <= getattr(c, f"min_{name}") <= getattr(c, f"max_{name}"),
             f"--min_{name} is negative, or above --max_{name}: no row would pass")
    need(0 < c.near <= 1, f"--near must be above 0 and at most 1, not {c.near}")
    need(0 <= c.max_repetition <= 1, f"--max_repetition is a share, not {c.max_repetition}")
    tokenizer = ChatTokenizer(c.model, c.template) if by_tokens else None
    rows = read_rows(c.files, c.skip_bad_rows)
    found = list(parallel(functools.partial(judge, c, tokenizer), rows))
    reasons = [reason for reason, _, _ in found]
    if by_loss:
        for i, loss in run_model(c, reasons, "loss").items():
            inside = c.min_perplexity <= np.exp(loss) <= c.max_perplexity  # False for NaN
            reasons[i] = "" if inside else "perplexity"
    kept = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=int)
    if c.duplicates != "keep" and len(kept):
        first = np.unique([found[i][1] for i in kept], return_index=True)[1]
        exact = near = np.isin(np.arange(len(kept)), first, invert=True)
        if c.duplicates == "near":
            near = near_duplicates(np.stack([found[i][2] for i in kept]), c.near)
        for i in np.flatnonzero(exact | near):
            reasons[kept[i]] = "exact duplicate" if exact[i] else "near duplicate"
    write_kept(c, reasons, without_system if c.no_system else dict)


# -------------------------------------------------------------------------------------- data select


def kmeans(x: np.ndarray, k: int, seed: int, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(centres [k, D], cluster of each row [R]): Lloyd's algorithm from random rows."""
    centres = np.random.default_rng(seed).choice(x, min(k, len(x)), replace=False)
    for _ in range(rounds):
        cluster = (x @ centres.T - np.square(centres).sum(1) / 2).argmax(1)  # [R], from [R, k]
        for j in np.unique(cluster):
            centres[j] = x[cluster == j].mean(0)
    return centres, cluster


def k_center(x: np.ndarray, first: int, n: int) -> tuple[list[int], float]:
    """k-center greedy (arXiv:1708.00489, algorithm 1) on unit vectors [R, D]: (rows, radius).

    From row `first` on repeat argmax_i min_{s chosen} d(i, s), d = 1 - cos. The radius is the
    largest distance from a row to the nearest chosen one.
    """
    chosen, nearest = [first], 1 - x @ x[first]  # [R]
    while len(chosen) < n:
        nearest[chosen[-1]] = -np.inf
        chosen.append(int(nearest.argmax()))
        np.minimum(nearest, 1 - x @ x[chosen[-1]], out=nearest)
    return chosen, max(float(nearest.max()), 0.0)


def core_set(states: np.ndarray, n: int, clusters: int, seed: int) -> list[int]:
    """n rows by their embeddings [R, D] (arXiv:2305.09246, section 3): L2 norm, k-means, k-center.

    k-center starts at the task's core sample: the row nearest to the centre of the cluster that
    most rows fall in.
    """
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    need(np.isfinite(norms).all() and norms.min() > 0, "hidden states of --model are zero or NaN")
    x = states / norms
    centres, cluster = kmeans(x, clusters, seed)
    core = np.square(x - centres[np.bincount(cluster).argmax()]).sum(1).argmin()
    chosen, radius = k_center(x, int(core), n)
    print(f"k-center radius {radius:.4f} (1 - cos)")
    return chosen


def cover_tags(tags: list[set], n: int) -> list[int]:
    """n rows by complexity-first diverse sampling (InsTag, arXiv:2308.07074, algorithm 1).

    In rounds, rows with most tags first: a row is taken that adds a tag to those of the round.
    """
    left, chosen = sorted(range(len(tags)), key=lambda i: -len(tags[i])), []
    while left:
        seen, passed = set(), []
        for i in left:
            (passed if tags[i] <= seen else chosen).append(i)
            seen |= tags[i]
        left = passed
    return chosen[:n]


def select(c: Select) -> None:
    """`data.py select`."""
    check_output(c)
    need(bool(c.n) != bool(c.share) and c.n >= 0 and 0 <= c.share <= 1,
         "give --n above 0, or --share above 0 and at most 1")
    need(c.model or c.method in ("tags", "random"), f"--method {c.method} needs --model DIR")

    def parse(where: str, value) -> tuple[set, str]:
        row, tags = parse_row(where, value), value.get("tags") or []
        roles = [m["role"] for m in [*row.messages, *(row.chosen or [])]]
        if c.method == "ifd" and ("user" not in roles or roles[-1] != "assistant"):
            return set(), "no question and answer"
        if c.method != "tags":
            return set(), ""
        need(isinstance(tags, list) and all(map(is_text, tags)),
             f"{where}: expected a list of texts as tags, found {tags!r:.40}")
        return set(tags), "" if tags else "no tags"

    found = read_rows(c.files, c.skip_bad_rows, parse=parse)
    found = [pair or (set(), "bad row") for _, pair in found]  # (tags, why it cannot be chosen)
    tags, reasons = [tags for tags, _ in found], [reason for _, reason in found]
    rows = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=int)
    need(len(rows), f"no row to choose from: {dict(Counter(reasons))}")
    n = c.n or max(1, int(c.share * len(rows) + 0.5))
    need(n <= len(rows), f"--n {n} is more than the {len(rows)} rows there are to choose from")
    if c.method == "ifd":
        # mean NLL(answer | question) / mean NLL(answer), arXiv:2308.12032, eq. 3
        asked, alone = (run_model(c, reasons, "loss", part) for part in ("last", "alone"))
        scores = {i: asked[i] / alone[i] for i in asked}
        for i, score in scores.items():
            reasons[i] = ("" if score <= 1 else "IFD above 1" if score > 1 else
                          "nothing to score, or above --max_length")
        chosen = sorted((i for i in scores if not reasons[i]), key=lambda i: -scores[i])[:n]
    elif c.method == "kcenter":
        states = run_model(c, reasons, "states")
        chosen = rows[core_set(np.stack([states[i] for i in rows]), n, c.clusters, c.seed)]
    elif c.method == "tags":
        chosen = rows[cover_tags([tags[i] for i in rows], n)]
    else:
        chosen = np.random.default_rng(c.seed).permutation(rows)[:n]
    for i in set(rows.tolist()).difference(map(int, chosen)):
        reasons[i] = reasons[i] or "not chosen"
    write_kept(c, reasons)


# ----------------------------------------------------------------------------------- exam, identity

KEYS = {"q_main": "question", "std_ans": "answer", "answer_detail": "explanation",
        **{f"option_{letter}": letter for letter in "abcde"}}  # what Wanjuan calls C-Eval's columns


def parse_question(where: str, value) -> dict:
    """A question with C-Eval's keys or with Wanjuan's; its options, {letter: text}, not empty."""
    row = value if isinstance(value, dict) else {}
    row = {KEYS.get(key.lower(), key.lower()): cell or "" for key, cell in row.items()}
    q = {key: row.get(key, "") for key in ("question", "answer", "explanation", "q_type", *"abcde")}
    good = all(map(is_text, q.values())) and q["question"]
    q["answer"] = re.sub(r"[\s,，、]", "", str(q["answer"])).upper()
    options = {letter: q[letter.lower()] for letter in "ABCDE" if q[letter.lower()]}
    need(good and len(options) > 1 and set(q["answer"]) <= set(options),
         f"{where}: expected a question, options, an answer among them, found {value!r:.80}")
    return {**q, "where": where, "options": options}


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


def exam(c: Exam) -> None:
    """`data.py exam`."""
    need(c.from_exam or not any(path.endswith(".csv") for path in c.files),
         "training on the .csv files of an exam contaminates it; --from_exam does so all the same")
    rewrite(c, functools.partial(exam_row, c.style),
            lambda path: (read_csv if path.suffix == ".csv" else read_values)(path))


def identity(c: Identity) -> None:
    """`data.py identity`."""
    need(c.name and c.author, "--name and --author are both needed")

    def fill(where: str, value):
        if isinstance(value, list):
            return [fill(where, item) for item in value]
        if isinstance(value, dict):
            return {key: fill(where, item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        left = re.search(r"\{\{(?!(name|author)\}\}).{0,30}", value)
        need(not left, f"{where}: the placeholder {left and left[0]} is left over")
        return re.sub(r"\{\{(name|author)\}\}", lambda key: getattr(c, key[1]), value)

    def convert(where: str, value) -> list[tuple]:
        parse_row(where, value)
        return [(fill(where, value), "")]

    rewrite(c, convert)


# ------------------------------------------------------------------------------------- data overlap

SHORT = 20  # words: a shorter question alone says too little, its options must be there too


def find_questions(questions: list[tuple], index: dict, near: float, item: tuple) -> list[dict]:
    """The exam questions that one training row holds; `index` has the questions of every n-gram.

    "exact": the words of the question stand in the row unbroken. "near": its `coverage` reaches
    `near`. A question under SHORT words whose options are not covered so far is only "short".
    """
    row, hits = item[1], []
    words = words_of("\n".join(said(row))) if row else []
    grams = {gram for n in range(1, NGRAM + 1) for gram in ngrams(words, n).tolist()}
    shared = Counter(k for gram in grams for k in index.get(gram, ()))
    for k, count in shared.items():
        q, text, options = questions[k]
        if count * NGRAM < near * len(text):  # an n-gram covers NGRAM words at most
            continue
        covered, size = coverage(text, words), max(sum(map(len, options)), 1)
        others = sum(coverage(o, words) * len(o) for o in options) / size
        exact = f" {' '.join(text)} " in f" {' '.join(words)} "
        if exact or covered >= near:
            kind = "short" if len(text) < SHORT and others < near else "exact" if exact else "near"
            hits.append({"kind": kind, "exam": q["where"], "row": row.where, "covered": covered,
                         "options_covered": others, "question": q["question"]})
    return hits


def overlap(c: Overlap) -> None:
    """`data.py overlap`."""
    paths = sorted(Path(c.exam).rglob("*.csv")) if c.exam else []
    need(paths, f"--exam needs a folder with .csv files, found {c.exam!r}")
    need(0 < c.near <= 1, f"--near must be above 0 and at most 1, not {c.near}")
    if c.output:
        check_output(c)
    questions, index = [], {}
    for q in (parse_question(*row) for path in paths for row in read_csv(path)):
        questions.append((q, words_of(q["question"]), list(map(words_of, q["options"].values()))))
        for gram in ngrams(questions[-1][1]).tolist():
            index.setdefault(gram, []).append(len(questions) - 1)
    job = functools.partial(find_questions, questions, index, c.near)
    rows = list(parallel(job, read_rows(c.files, c.skip_bad_rows)))
    hits = [hit for row in rows for hit in row]
    if c.output:
        write_rows(c.output, ((hit, "") for hit in hits))
    hits.sort(key=lambda hit: hit["kind"], reverse=True)  # by alphabet: short, near, exact
    kinds = {hit["exam"]: hit["kind"] for hit in hits}  # the last of a question stays
    found = Counter((Path(where).parent, kind) for where, kind in kinds.items())
    table = [("exam", "questions", "exact", "near", "short")]
    for folder, count in Counter(Path(q["where"]).parent for q, _, _ in questions).items():
        table.append((folder, count, *(found[folder, kind] for kind in table[0][2:])))
    print_table(table)
    bad = sum(kind != "short" for kind in kinds.values())
    found = f"CONTAMINATED: {bad} questions" if bad else "clean"
    print(f"{len(rows)} rows read, {found}; {len(kinds) - bad} short ones stand without options")


# ---------------------------------------------------------------------------------------- data show


def marked(example: Example, tokenizer: ChatTokenizer, color: bool) -> str:
    """The rendered tokens, supervised ones green, or in [[ ]] where there is no colour."""
    left, right = ("\033[32m", "\033[0m") if color else ("[[", "]]")
    out, position = "", 0
    for first, end, weight in example.spans:
        note = "" if weight == 1 else f"(weight {weight:g}) "
        out += tokenizer.decode(example.ids[position:first])
        out += left + note + tokenizer.decode(example.ids[first:end]) + right
        position = end
    return out + tokenizer.decode(example.ids[position:])


def row_facts(tokenize, item: tuple) -> tuple:
    """(hash, [(tokens, supervised ones)] of examples, counts by reason and of facts) of a row."""
    row, counts = item[1], Counter()
    if row is None:
        return None, [], Counter({"dropped: bad row": 1})
    sizes = [(len(e.ids), e.targets) for e in tokenize([row], 0, counts)]
    words, answers = words_of("\n".join(said(row))), said(row, "assistant")
    counts.update(rows=1, answers=len(answers), empty=sum(not a.strip() for a in answers),
                  words=len(words), han=len(words) * word_share(HAN, words),
                  repeated=sum(map(repetition, answers)))
    return hash64(repr(row[1:])), sizes, counts


def show_facts(counts: Counter, distinct: int, most: int, lengths: np.ndarray, targets: np.ndarray):
    """What a person wants to know before training on rows, `most` answers in one of them."""
    rows, answers, empty, words, han, repeated = map(
        counts.pop, ("rows", "answers", "empty", "words", "han", "repeated"))
    print(f"{rows} rows, {rows - distinct} of them exact duplicates\n"
          f"{answers / rows:.2f} answers a row, at most {most}; {empty} are empty\n"
          f"Chinese characters: {han / max(words, 1):.1%} of the words\n"
          f"supervised: {targets.sum() / lengths.sum():.1%} of the tokens\n"
          f"repetition: {repeated / max(answers, 1):.1%} of an answer's {NGRAM}-grams\n"
          "tokens of an example, by percentiles:",
          *(f"{p}%: {np.percentile(lengths, p):.0f} " for p in (1, 5, 25, 50, 75, 95, 99, 100)))
    for k, count in sorted(Counter(np.log2(lengths).astype(int).tolist()).items()):
        bar = "#" * round(50 * count / len(lengths))
        print(f"{2**k:>8} to {2 ** (k + 1) - 1:<8}{bar} {count}")
    counts["nothing to supervise"] = int((targets == 0).sum())
    for reason, count in (+counts).items():
        print(f"{reason}: {count}")


def show(c: Show) -> None:
    """`data.py show`: the first rows whole; of the others a few numbers stay in memory."""
    check_mix(c, c.files)
    with tempfile.TemporaryDirectory() as folder:
        if not c.model:
            make_tokenizer(Path(folder), [], 0)
            print("no --model: tokens are bytes, the template is ChatML")
        tokenizer = ChatTokenizer(c.model or folder, c.template)
    tokenize = functools.partial(to_examples, tokenizer=tokenizer, train_on=c.train_on,
                                 max_length=c.max_length, keep_all=True)
    job = functools.partial(row_facts, tokenize)
    hashes, most, examples, counts = set(), 0, [], Counter()
    for m, path in enumerate(c.files):
        rows = read_rows([path], c.skip_bad_rows)
        first = list(itertools.islice(rows, c.rows))
        for e in tokenize([row for _, row in first if row], 0, Counter()):
            print(f"--- {e.where}: {len(e.ids)} tokens, {e.targets} supervised")
            print(marked(e, tokenizer, sys.stdout.isatty()))
        for hashed, sizes, found in parallel(job, itertools.chain(first, rows)):
            hashes.add(hashed)
            most = max(most, found["answers"])
            examples += [(m, *size) for size in sizes]
            counts.update(found)
        need(examples and examples[-1][0] == m, f"{path}: no row to train on")
    end = tokenizer.decode([tokenizer.stop_id])
    print(f"--- template {tokenizer.template.name}; a turn ends with {end}")
    source, lengths, targets = np.array(examples).T
    pairs = [(m, supervised) for m, _, supervised in examples]
    table = [("source", "examples", "share", "supervised", "share", "median tokens", "longest")]
    for m, (name, row) in enumerate(shares(pairs, source_names(c.files)).items()):
        tokens = lengths[source == m]
        table.append((name, *row.values(), round(np.median(tokens)), tokens.max()))
    print_table(table)
    show_facts(counts, len(hashes - {None}), most, lengths, targets)
    if c.steps:
        print(f"{c.steps} steps of {c.batch_size}, --mix {c.mix}")
        mix_files(c, c.files, [pair for pair in pairs if pair[1]], c.steps * c.batch_size)


# ----------------------------------------------------------------------------------------- data coh

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


def coh(c: Coh) -> None:
    """`data.py coh`."""
    need(0 <= c.mask_past < 1, f"--mask_past must be in [0, 1), not {c.mask_past}")
    rng = random.Random(c.seed)

    def convert(where: str, value) -> list[tuple]:
        row = parse_row(where, value)
        asked = not row.messages or row.messages[-1]["role"] == "user"
        need(row.chosen and asked, f"{where}: expected a question, chosen and rejected answers")
        why = why_no_pair(row)
        found = [None] if why else hindsight(row, c.mask_past, rng)
        return [({"messages": messages}, why) for messages in found]

    rewrite(c, convert)


COMMANDS = {"show": (Show, show, "files"), "filter": (Filter, filter_rows, "files"),
            "select": (Select, select, "files"), "coh": (Coh, coh, "files"),
            "exam": (Exam, exam, "files"), "identity": (Identity, identity, "files"),
            "overlap": (Overlap, overlap, "files")}

if __name__ == "__main__":
    with one_line_errors():
        run_command(COMMANDS, __doc__)
