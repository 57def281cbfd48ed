"""From files to token ids, masks and batches.

From small to large: rows of every format, chat templates, tokens and their spans, examples, the
mixer, micro-batches; then `show`, and the flags of all scripts.

    python data.py show FILE... --model DIR    # what a trainer sees: tokens, mask, lengths, shares
"""

import argparse
import datetime
import difflib
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import tempfile
import typing
import unicodedata
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2
import numpy as np
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

import model as modeling
from model import InputError, check, checkpoint_file, write_atomic, write_json

# ==== read: rows of every format ==================================================================

# What the keys of a row and of a message mean. To read one more format, add its keys here.
# Keys that stand in no line, such as `id`, are not used: read_rows names them once per file.
KEYS = (  # meaning, how its value is read (a role: texts of that role), keys of a row, of a message
    ("messages", "user", "messages conversations conversation", ""),
    ("system", "system", "system system_prompt", ""),
    ("history", "user", "history", ""),
    ("question", "user", "instruction prompt question query", ""),
    ("input", "user", "input context", ""),  # stands below the question, or is the question
    ("answer", "assistant", "output response completion answer target", ""),
    ("chosen", "assistant", "chosen chosen_response", ""),
    ("rejected", "assistant", "rejected rejected_response", ""),
    ("label", "truth", "label kto_tag", ""),
    ("text", "text", "text", ""),
    ("tools", "functions", "tools functions", ""),
    ("role", "text", "", "role from"),
    ("content", "content", "", "content value"),
    ("reasoning_content", "text", "", "reasoning_content reasoning thinking"),
    ("tool_calls", "functions", "", "tool_calls function_call"),
    ("tool_call_id", "text", "", "tool_call_id"),
    ("name", "text", "", "name"),
    ("train", "truth", "", "train loss"),
    ("weight", "number", "", "weight"),
    # what would change the prompt or the loss, and is not read
    ("refused", "", "image images video videos audio audios objects documents reasoning "
     "reasoning_content thinking rationale tool_calls function_call train loss weight loss_mask "
     "loss_weight loss_scale mask completion_mask input_ids labels",
     "image images video videos audio audios documents loss_mask loss_weight loss_scale mask "
     "tools functions"),
)
ROW_KEYS = {key: (meaning, kind) for meaning, kind, keys, _ in KEYS for key in keys.split()}
MESSAGE_KEYS = {key: (meaning, kind) for meaning, kind, _, keys in KEYS for key in keys.split()}
MAY_BE_EMPTY = ("question", "input", "answer", "text", "content")  # elsewhere "" is absent
ROLES = {  # in the order in which they speak
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "ai": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}
KNOWN = {*MESSAGE_KEYS, *ROLES}  # in a message, or in Firefly's {human, assistant}


class Row(NamedTuple):
    """One row of a file, whatever its format was; `where` names its file and line."""

    where: str
    messages: list[dict]  # of a pair: what both conversations begin with
    text: str | None = None  # raw text, instead of messages
    chosen: list[dict] | None = None  # a preference pair's two continuations of `messages`
    rejected: list[dict] | None = None
    label: bool | None = None  # an unpaired preference: is the answer liked?
    tools: list[dict] | None = None  # functions that the assistant may call, in OpenAI's form


def parse_row(where: str, row, ask: bool = False) -> Row:
    """Tell the format of a row by its keys and bring it to a Row.

    A message is {role, content}, maybe with reasoning_content, tool_calls, tool_call_id, name,
    train and weight. A row without an answer is refused unless `ask`. Raises InputError.
    """
    try:
        if isinstance(row, Exception):  # a line that could not be read
            raise InputError(str(row))
        row = {"messages": row} if isinstance(row, list) else row
        if not isinstance(row, dict):
            raise InputError(f"expected an object, found {row!r:.80}")
        return Row(where, **read_row(row, ask))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def read_row(row: dict, ask: bool) -> dict:
    """The fields of a Row: those of a preference pair, of a conversation, or of raw text."""
    values, keys = parts_of(row, ROW_KEYS)
    label, tools = values.get("label"), values.get("tools")

    # A preference pair: two answers, or two conversations.
    if "chosen" in values or "rejected" in values:
        check(label is None, "'label' beside chosen and rejected")
        return {**read_pair(values, keys), "tools": tools}

    # A conversation; with a label, an unpaired preference.
    if values.keys() & {"messages", "question", "input"}:
        if not ask and not values.keys() & {"messages", "answer"}:
            answers = [key for key, (meaning, _) in ROW_KEYS.items() if meaning == "answer"]
            null = [f"{key} (null)" for key in answers if key in row]
            found = f"; found {', '.join(map(str, row))[:60]}"
            raise InputError(f"expected an answer under {', '.join(null or answers)}{found}")
        messages = read_question(values, keys)
        if "messages" not in values or messages[-1]["role"] != "assistant":
            messages = messages + values.pop("answer", [])
        check_beside(values, keys, {"answer", "text"}, messages)
        if label is not None:
            check_unweighted(messages[-1:])
        return {"messages": messages, "label": label, "tools": tools}

    # Raw text: nothing beside it asks a question. A completion alone is one, too.
    if "text" not in values and keys.get("answer") == "completion":
        values["text"], keys["text"] = as_text(row["completion"]), keys.pop("answer")
    check("text" in values, "expected messages, a question and an answer, chosen and rejected, or "
          f"text; found the keys {', '.join(row) or '(none)'}")
    check(label is None and not tools, "'label' and 'tools' go with answers only")
    beside = [key for meaning, key in keys.items() if meaning != "text"]
    check(not beside, f"{', '.join(beside)} beside {keys['text']!r}, which is raw text and learnt "
          "as a whole: name a question 'question' and an answer 'answer', or remove the others")
    return {"messages": [], "text": values["text"]}


# ---- skip on a first reading: what stands under a key --------------------------------------------


def parts_of(row: dict, table: dict) -> tuple[dict, dict]:
    """{meaning: value} and {meaning: key} of a row or a message, read as KEYS says.

    Where KEYS names a role, the value is a list of messages. null is absent.
    """
    values, keys = {}, {}
    for key, value in row.items():
        # Tables with a fixed set of columns leave most of them empty.
        meaning, kind = table.get(key.lower(), ("", ""))
        if not meaning or value in (None, [], {}) or (value == "" and meaning not in MAY_BE_EMPTY):
            continue
        check(meaning != "refused", f"{key!r} would change what is trained, and is not read: "
              "remove the key, or the row")

        # Of two keys that mean the same, one may be empty; else they must agree.
        before = row[keys[meaning]] if meaning in keys else ""
        check("" in (value, before) or value == before,
              f"{key!r} and {keys.get(meaning)!r} both give the {meaning}")
        if before != "":
            continue
        try:
            value = READERS[kind](value) if kind in READERS else as_messages(value, kind, meaning)
        except InputError as error:
            raise InputError(f"{key!r}: {error}") from None
        if value != []:  # "[]" is one, too
            values[meaning], keys[meaning] = value, key
    return values, keys


def read_question(values: dict, keys: dict) -> list[dict]:
    """What comes before an answer: system text, history or messages, question with its input."""
    system, messages = values.get("system", []), values.get("messages")
    if messages:
        check_beside(values, keys, {"history", "question", "input"}, messages)
        return messages if messages[:1] == system else system + messages

    # Alpaca's `input` and dolly's `context` stand below the question; either may be empty.
    question, below = values.get("question", []), values.get("input", [])
    if not question or question[-1]["content"] == "":
        question = below or question
    elif below and below[-1]["content"]:
        check(len(below) == 1 and question[-1]["role"] == below[0]["role"],
              f"{keys['input']!r} does not go on with the text of {keys['question']!r}: write both "
              "as messages")
        joined = question[-1]["content"] + "\n" + below[-1]["content"]
        question = [*question[:-1], {**question[-1], "content": joined}]
    return system + values.get("history", []) + question


def read_pair(values: dict, keys: dict) -> dict:
    """The fields of a pair: two answers, and the messages with which both conversations begin."""
    messages, beside = read_question(values, keys), {"answer", "text"}

    # ms-swift writes `rejected_response` beside an ordinary answer, or beside messages with one.
    chosen = values.get("chosen") or values.get("answer")
    rejected = values.get("rejected")
    if not chosen and messages and messages[-1]["role"] == "assistant":
        chosen = messages[-1:]
    check(chosen and rejected, "expected both chosen and rejected, neither empty")
    check(chosen[-1]["role"] == rejected[-1]["role"] == "assistant",
          "chosen and rejected must end with an answer")
    begins = ("system", "user")  # an answer begins with neither
    whole = chosen[0]["role"] in begins
    check(whole == (rejected[0]["role"] in begins),
          "one of chosen and rejected is a whole conversation, the other an answer")

    # Whole conversations win over a prompt beside them, which may differ by a space: only a system
    # text that they do not have is kept of it.
    if whole:
        beside |= {"system", "history", "messages", "input"}
        beside |= {"question"} if len(values.get("question", [])) > 1 else set()
        kept = messages[:1] if chosen[0]["role"] != "system" else []
        messages = kept if kept and kept[0]["role"] == "system" else []
    elif messages and messages[-1]["role"] == "assistant":
        check(messages[-1] in chosen + rejected,
              "the messages before chosen and rejected end with an answer of their own")
        messages = messages[:-1]

    # What both sides share comes before the answers, but for the last message of each.
    shared = common_prefix([chosen[:-1], rejected[:-1]])
    messages = messages + chosen[:shared]
    check(whole or any(m["role"] != "system" for m in messages),
          "expected a prompt beside chosen and rejected")
    check_beside(values, keys, beside, messages + chosen[shared:])
    check_unweighted(chosen[shared:] + rejected[shared:])
    return {"messages": messages, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def check_beside(values: dict, keys: dict, beside: set, messages: list[dict]) -> None:
    """Refuse what stands beside a conversation unless it repeats it, whole or in part."""
    for meaning in beside & values.keys():
        value = values[meaning]
        for m in value if meaning != "text" else [{"content": value}]:
            # White space does not count: the same text is often stripped in one place only.
            words = " ".join(m["content"].split())
            texts = [" ".join(said["content"].split()) for said in messages]
            repeated = words in " ".join(texts) or all(text in words for text in texts)
            check(repeated, f"{keys[meaning]!r} says what the conversation beside it does not: "
                  "remove one of the two")


def check_unweighted(answers: list[dict]) -> None:
    """Refuse weights where a preference is learnt: it has one for all of its tokens."""
    for m in answers:
        check(m.get("weight", 1) == 1 and m.get("train", True),
              "'weight' and 'train' are not read in the answers of a preference: remove them")


def as_messages(value, role: str, meaning: str) -> list[dict]:
    """Messages from a text of `role`, a dialogue, a message, or a list of messages or of turns."""
    # Cells of tables are texts: a conversation is JSON there.
    if isinstance(value, str) and value[:1] == "[" and meaning in ("messages", "history"):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, str):
        # HH-RLHF's pairs are dialogues, and so are prompts that end with "Assistant:".
        asks = meaning == "question" and value.rstrip().endswith("Assistant:")
        whole = asks or meaning in ("messages", "chosen", "rejected")
        said = dialogue(as_text(value)) if whole else []
        return said or [{"role": role, "content": as_text(value)}]
    check(isinstance(value, dict | list), f"expected a text or messages, found {value!r:.60}")
    messages = []
    for turn in [value] if isinstance(value, dict) else value:
        # history's [question, answer], or LangChain's [role, text]
        if isinstance(turn, list) and len(turn) == 2:
            first, second = turn
            named = isinstance(first, str) and first in ROLES
            turn = {first: second} if named else {"user": first, "assistant": second}
        if not isinstance(turn, dict):
            raise InputError(f"expected messages or pairs [question, answer], found {turn!r:.60}")

        # Firefly's {human, assistant}, whose keys some tools sort, or a message
        if turn and turn.keys() <= ROLES.keys():
            for name in sorted(turn, key=list(ROLES).index):
                if turn[name] is not None:
                    messages.append({"role": ROLES[name], "content": as_text(turn[name])})
        else:
            messages.append(read_message(turn))
    return messages


def read_message(message: dict) -> dict:
    """A message in OpenAI's or ShareGPT's keys, as `parse_row` describes it."""
    said, _ = parts_of(message, MESSAGE_KEYS)
    name = said.pop("role", "").lower()
    if name not in ROLES:
        raise InputError("expected a 'role' such as system, user, assistant or tool, found "
                         f"{message!r:.60}")
    if "content" not in said and "tool_calls" not in said:
        raise InputError(f"expected a text under 'content', found {message!r:.60}")
    taught = said.get("weight", 0) > 0 or said.get("train", False)
    check(ROLES[name] == "assistant" or not taught,
          f"'weight' and 'train' teach answers: remove them from what the {ROLES[name]} says")
    if name == "function_call":  # LLaMA-Factory: the content is the call
        said["tool_calls"] = functions(said.pop("content", ""))
    return {"role": ROLES[name], "content": "", **said}


def dialogue(text: str) -> list[dict]:
    """The messages of HH-RLHF's "\n\nHuman: ... \n\nAssistant: ...", or none of another text."""
    # Splitting at a group keeps it: name, text, name, text, ... behind what comes first.
    start, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if start.strip() or turns[:1] != ["Human"] or "Assistant" not in turns[::2]:
        return []
    messages = [{"role": ROLES[name.lower()], "content": said.strip()}
                for name, said in zip(turns[::2], turns[1::2], strict=True)]
    asks = messages[-1] == {"role": "assistant", "content": ""}  # a prompt ends with "Assistant:"
    return messages[:-1] if asks else messages


def join_parts(value) -> str:
    """The text of a message, which may come in parts {type: text, text}."""
    texts = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        texts.append(as_text(part))
    return "".join(texts)


def functions(value) -> list[dict]:
    """Tools or calls as [{type, function}]; rows have that, its inner part, or JSON text of it."""
    # In tables, whose cells are texts, both are JSON in a text.
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        pass  # said below
    out = []
    for item in value if isinstance(value, list) else [value]:
        inner = item.get("function", item) if isinstance(item, dict) else None
        check(isinstance(inner, dict) and is_text(inner.get("name")),
              f"expected functions with a name, found {value!r:.60}")
        as_text(json.dumps(item, ensure_ascii=False))
        out.append(item if "function" in item else {"type": "function", "function": item})
    return out


def is_text(value) -> bool:
    """A string that UTF-8 can hold (JSON allows lone surrogates)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def as_text(value) -> str:
    """A text."""
    if not is_text(value):  # `check` would write its message for every text that is one
        raise InputError(f"expected a text, found {value!r:.60}")
    return value


def as_truth(value) -> bool:
    """True, false, 1 or 0; exports of tables write 1.0 for 1."""
    check(value in (0, 1), f"expected true or false, found {value!r:.40}")
    return bool(value)


def as_weight(value) -> float:
    """How much a message counts in the loss."""
    known = type(value) in (int, float) and (value == 0 or 2**-53 < value < 2**53)
    check(known, f"expected a number, 0 or between 2^-53 and 2^53, found {value!r:.40}")
    return value


READERS = {"text": as_text, "content": join_parts, "truth": as_truth, "number": as_weight,
           "functions": functions}


def common_prefix(lists: list[list]) -> int:
    """How many leading items all lists share."""
    for shared, items in enumerate(zip(*lists, strict=False)):
        if any(item != items[0] for item in items):
            return shared
    return min(map(len, lists))


def unused_keys(row) -> set[str]:
    """Keys of a row, and of the messages in it, that KEYS does not know."""
    unused = set()
    for key, value in row.items() if isinstance(row, dict) else [("messages", row)]:
        if key.lower() not in ROW_KEYS:
            unused |= {key} if value is not None else set()
            continue

        # Tools are objects in a list as well, but no messages.
        meaning, _ = ROW_KEYS[key.lower()]
        for message in value if isinstance(value, list) and meaning != "tools" else ():
            if isinstance(message, dict):
                unused |= {name for name in message if name.lower() not in KNOWN}
    return unused


def read_rows(files, skip_bad_rows: bool | None = None, quiet: bool = False, parse=parse_row,
              read=None) -> Iterator[tuple]:
    """(value, parse(where, value)) of every row of some files.

    A bad row raises InputError. With `skip_bad_rows` it gives None, and is listed unless `quiet`.
    """
    for path in map(Path, files):
        unused = set()
        for where, value in (read or read_values)(path):
            try:
                row = parse(where, value)
                unused |= unused_keys(value) if isinstance(row, Row) else set()
            except InputError as error:
                # A dropped row is yielded too: who counts rows counts it.
                refuse_unless(skip_bad_rows, error)
                row = None
                if not quiet:
                    tqdm.write(f"dropped {error}")
            yield value, row
        if unused and not quiet:
            names = ", ".join(sorted(unused)).encode(errors="backslashreplace").decode()
            tqdm.write(f"{path}: not used: {names}")


def refuse_unless(skip_bad_rows: bool | None, error: InputError) -> None:
    """Raise the error of a bad row unless it may be skipped; None: the command has no such flag."""
    hint = "" if skip_bad_rows is None else " (--skip_bad_rows leaves it out)"
    check(skip_bad_rows, f"{error}{hint}")


# ---- skip on a first reading: chat templates -----------------------------------------------------

# For checkpoints without a template, and for --template; more of them stand in labs/templates.
TEMPLATES = {
    "chatml": r"""
{%- for m in messages -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "plain": r"""
{{- bos_token -}}
{%- for m in messages -%}
    {%- set name = {'user': 'User:\n', 'assistant': 'Assistant:\n'}.get(m.role, '') -%}
    {{- name ~ m.content ~ (eos_token if m.role == 'assistant' else '') ~ '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}""",
}

# What --eot writes before a template that ends answers only.
END_QUESTIONS = r"""{%- set turns = namespace(all=[]) -%}
{%- for m in messages -%}
    {%- set asks = m.role == 'user' and m.content is string -%}
    {%- set turns.all = turns.all + [dict(m, content=m.content ~ EOT) if asks else m] -%}
{%- endfor -%}
{%- set messages = turns.all %}
"""

# Characters that Unicode keeps for a program's own use; where a content holds one, it is left out.
# SIGN breaks up a control token in a content. BORDER keeps two tokens apart. BEGIN and END stand
# where a template has {% generation %} marks, PROBE for an answer, KEPT for an answer's </think>.
SIGN, BORDER, BEGIN, END, PROBE, KEPT = OURS = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5"
UNMARK, DROP_OURS = re.compile(f"[{BEGIN}{END}]").sub, re.compile(f"[{OURS}]").sub
THOUGHT = f"<think>\n{PROBE}\n</think>\n\n{PROBE}"
CONTROL = re.compile(r"<\|[^|\s]+\|>|<｜[^｜\s]+｜>|\[/?[A-Z_]+\]")  # how control tokens look
OTHER = "; --template takes another one: chatml, plain, a name of labs/templates, a .jinja file"


def named_template(name: str) -> str:
    """The source of a template of ours, of labs/templates, or of a .jinja file; none: empty."""
    if not name or name in TEMPLATES:
        return TEMPLATES.get(name, "")
    folder = Path(__file__).parent / "labs/templates"
    path = Path(name) if name.endswith(".jinja") else folder / f"{name}.jinja"
    known = ", ".join([*TEMPLATES, *sorted(p.stem for p in folder.glob("*.jinja"))])
    check(path.is_file(), f"unknown template {name!r}: expected {known}, or a .jinja file")
    return read_template(path)


def read_template(path: Path) -> str:
    """The text of a .jinja file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


@functools.lru_cache
def compile_template(source: str) -> jinja2.Template:
    """A chat template as a program, with the settings, filters and functions of transformers."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["raise_exception"] = functools.partial(check, False)

    # {% generation %}, with which some templates mark what the assistant writes, is no tag of
    # Jinja, but it has one that filters all that stands in it.
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1filter generation", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endfilter", source)
    sandbox.filters["generation"] = lambda marked: BEGIN + marked + END

    # Rows must not change overnight. Without a clock a template writes a date of its own; one that
    # cannot do without gets the day that Llama 3.1's template writes.
    if "strftime_now is defined" not in source:
        sandbox.globals["strftime_now"] = datetime.date(2024, 7, 26).strftime
    return sandbox.from_string(source)


class Plan(NamedTuple):
    """A text to be encoded; the characters of `places` (begin, end, weight) are supervised."""

    text: str
    places: tuple = ()  # an Example's `spans` are the same in tokens
    start: tuple = ()  # ids before the text


class ChatTemplate:
    """A chat template, and what rendering tells about it: where answers begin and end.

    `control` are the texts of the tokens that only the template may write. Where a content holds
    one, it gets a SIGN inside, which the tokenizer drops after it has looked for special tokens.
    So a content cannot forge a turn, and yet the template sees it nearly as it is.
    """

    def __init__(self, source: str, names: dict, control: set, system: str = ""):
        self.source, self.names, self.system = source, names, system
        texts = [re.escape(text) for text in sorted(control, key=len, reverse=True)]
        self.control = re.compile("|".join(texts) or "(?!)")  # without any, what matches nothing

        # The end of a turn is what stands behind a placeholder for an answer, whether a question
        # follows or not (Phi-3 writes one more token where none does); its last token ends turns.
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
        text = self.render([question, answer])
        check(PROBE in text, f"the chat template leaves out a plain answer{OTHER}")
        last = text.rpartition(PROBE)[2]
        middle = self.render([question, answer, question]).rpartition(PROBE)[2]
        find = self.control.findall
        stops = find(os.path.commonprefix([last, middle])) or find(last)[:1]
        check(stops, f"the chat template ends a turn with {last.strip()!r:.40}, no token of the "
              f"tokenizer{OTHER}")
        self.stop = stops[-1]

        # DeepSeek-R1's template drops the reasoning even of the answer that is to be learnt.
        thought = self.render([question, {**answer, "content": THOUGHT}])
        self.drops_thought = thought.count(PROBE) < 2

    def render(self, messages: list[dict], tools: list | None = None, **options) -> str:
        """The text of prepared messages, as transformers renders it."""
        # Templates ask for the special tokens by these names, and whether documents is none.
        options = {"add_generation_prompt": False, **self.names, **options}
        try:
            return compile_template(self.source).render(
                messages=messages, tools=tools, documents=None, **options)
        except Exception as error:  # the checkpoint's program may fail in any way
            raise InputError(f"the chat template refuses this: {error}{OTHER}") from None

    def hide(self, value):
        """A message, or any part of one, with a SIGN inside every text that is a control token."""
        if isinstance(value, str):
            text = DROP_OURS("", value)
            return self.control.sub(lambda found: found[0][0] + SIGN + found[0][1:], text)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def prepare(self, messages: list[dict], tools: list | None) -> tuple[list, list | None]:
        """Messages and tools for `render`; InputError for what the template would pass over."""
        # A template that never says `tools` would drop them without a word.
        calls, roles = any(m.get("tool_calls") for m in messages), {m["role"] for m in messages}
        for key, used in (("tools", tools), ("tool_calls", calls), ("tool", "tool" in roles)):
            check(not used or key in self.source, f"{key}: the chat template writes none{OTHER}")

        # Reasoning goes where the template looks for it: in a key of its own, or in the content.
        prepared = []
        for m in messages:
            m = {key: value for key, value in m.items() if key not in ("train", "weight")}
            thought = m.pop("reasoning_content", None)
            if thought and re.search("reasoning_content|[.'\"]thinking\\b", self.source):
                m |= {"reasoning_content": thought, "thinking": thought}  # gpt-oss's name for it
            elif thought:
                check("</think>" in self.source,
                      f"reasoning_content: the chat template writes none{OTHER}")
                m["content"] = f"<think>\n{thought}\n</think>\n\n{m['content']}"
            prepared.append(self.hide(m))
        if self.system and "system" not in roles:
            prepared.insert(0, {"role": "system", "content": self.hide(self.system)})
        return prepared, self.hide(tools)

    def check_written(self, text: str, messages: list[dict]) -> None:
        """Raise InputError if the text of these messages leaves out something that they say."""
        parts = []
        for i, m in enumerate(messages):
            said = [m.get("content") or "", m.get("reasoning_content") or ""]
            if m["role"] == "assistant" and i < len(messages) - 1:
                # The reasoning of past answers may go: many templates drop it on purpose.
                said = [said[0].rpartition("</think>")[2]]
            for call in m.get("tool_calls") or []:
                said.append(call.get("function", call).get("name") or "")
            parts += [(part.strip(), m["role"]) for part in said]

        # The longest first, each found once: a short one could be a part of others.
        for part, role in sorted(parts, key=lambda pair: -len(pair[0])):
            if part not in text:  # written in another way, as JSON for instance: the words stay
                lost = [word for word in re.findall(r"\w+", part) if word not in text]
                check(not lost, f"content: the chat template leaves out what the {role} says "
                      f"({', '.join(lost)[:60]}){OTHER}")
            text = text.replace(part, PROBE, 1)

    def before_answer(self, messages: list[dict], tools: list | None = None,
                      content: str = PROBE, **options) -> str:
        """What the template writes before the content of an answer to prepared messages."""
        answer = {"role": "assistant", "content": content}
        return UNMARK("", self.render([*messages, answer], tools, **options)).partition(PROBE)[0]

    def openings(self, history: list[dict], tools: list | None) -> Iterator[str]:
        """What may stand before an answer to these messages, the likeliest first."""
        if history:
            yield UNMARK("", self.render(history, tools, add_generation_prompt=True))

        # A finished answer may not keep all of that prompt (R1's ends with <think>): then what
        # stands before a placeholder. A space at its end belongs to the answer.
        yield self.before_answer(history, tools).rstrip(" ")
        yield self.before_answer(history, tools, THOUGHT)

    def answer_place(self, text: str, messages: list[dict], tools: list | None) -> tuple[int, int]:
        """(begin, end) of the last message, an answer, in the text of all these messages."""
        bare, openings = UNMARK("", text), self.openings(messages[:-1], tools)
        begin = next((len(before) for before in openings if bare.startswith(before)), None)
        check(begin is not None, "the chat template writes what stands before an answer "
              f"differently once it is there{OTHER}")

        # The template's own marks win: of the parts that they mark, the first that ends behind this
        # place in the bare text.
        if "endgeneration" in self.source:
            marked = re.finditer(f"{BEGIN}[^{END}]*", text)
            begin = next((part.start() for part in marked
                          if len(UNMARK("", text[: part.end()])) > begin), None)
            check(begin, "the chat template marks no part of an answer with {% generation %}")

        # It ends with the last token that ends turns; a call of tools may end with another token.
        ends = {found[0]: found.end() for found in self.control.finditer(text, begin)}
        check(ends, f"the chat template ends an answer with no token{OTHER}")
        return begin, ends.get(self.stop) or max(ends.values())

    def conversation(self, messages: list[dict], tools: list | None = None,
                     train_on: str = "all") -> list[Plan]:
        """What to train on: every answer, or the last, in the text that a model would have written.

        Usually one plan holds all answers. But Qwen3's template drops the reasoning of an answer
        once a question follows: then that answer gets a plan of its own, which ends with it.
        """
        shown, tools = self.prepare(messages, tools)
        offset = len(shown) - len(messages)  # 1 behind a system message of ours
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        plans = []
        for i, m in enumerate(messages):
            # Only answers, and the end of the conversation, need a rendering of their own.
            weight = 0.0
            if m["role"] == "assistant" and (train_on == "all" or i == last):
                weight = m.get("weight", 1.0) * m.get("train", True)
            if not weight and i < len(messages) - 1:
                continue

            # A template that cuts an answer at </think> does not see one: KEPT stands in its place.
            said = shown[: offset + i + 1]
            if weight and self.drops_thought:
                said[-1] = {**said[-1], "content": said[-1]["content"].replace("</think>", KEPT)}
            text = self.render(said, tools).replace(KEPT, "</think>")
            self.check_written(text, shown[: offset + i + 1])
            places = ((*self.answer_place(text, said, tools), weight),) if weight else ()

            # Answers before it stay supervised if the text up to the end of the last is the same.
            if plans and text.startswith(plans[-1].text[: plans[-1].places[-1][1]]):
                places = plans.pop().places + places
            if places or not plans:
                plans.append(Plan(text, places))
        return plans

    def prompt(self, messages: list[dict], tools: list | None = None, **options) -> Plan:
        """A conversation up to the answer to come; options such as enable_thinking=False."""
        # A prompt loses nothing either: a system text left out would change every answer.
        shown, tools = self.prepare(messages, tools)
        text = self.render(shown, tools, add_generation_prompt=True, **options)
        self.check_written(text, shown)
        return Plan(text)

    def answer_prompt(self, messages: list[dict]) -> tuple[Plan, str]:
        """(what stands before the text of an answer, a space at its end): for exams.

        Without reasoning where the template allows it. The space belongs to the answer.
        """
        text = self.before_answer(self.prepare(messages, None)[0], enable_thinking=False)
        prompt = text.rstrip(" ")
        return Plan(prompt), text[len(prompt) :]


# ---- skip on a first reading: tokens and their spans ---------------------------------------------


def token_at(encoding, place: int) -> int:
    """Index of the first token that begins at this character of a text, or behind it."""
    # Asked token by token: a list of all places would cost more than this search.
    return bisect_left(range(len(encoding)), place, key=lambda i: encoding.token_to_chars(i)[0])


class ChatTokenizer(ChatTemplate):
    """A checkpoint's chat template and tokenizer: conversations to token ids and spans.

    Text between two special tokens is encoded as one string, as transformers does, unless a token
    would straddle the border between prompt and answer: then the two are encoded apart, since a
    model that continues the prompt could never produce that token.
    """

    def __init__(self, folder: str | Path, template: str = "", eot: str = "", system: str = ""):
        # An adapter may come without a tokenizer: then it is its base's.
        self.checkpoint = folder = Path(folder)
        if not (folder / "tokenizer.json").exists():
            folder, _ = modeling.read_adapter(folder)
        self.folder = folder
        self.tokenizer, self.config = open_tokenizer(folder), self.read("tokenizer_config.json")
        added = {t.content: t for t in self.tokenizer.get_added_tokens_decoder().values()}

        # Special tokens by name, such as eos_token. Old checkpoints keep them in a file apart: for
        # transformers that one wins unless the config lists the added tokens, as newer ones do.
        files, names = [self.config, self.read("special_tokens_map.json")], {}
        if "added_tokens_decoder" in self.config:
            files.reverse()
        for key, value in itertools.chain(*(file.items() for file in files)):
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                names[key] = value

        self.eot_is_new = bool(eot) and eot not in added
        if self.eot_is_new:
            added[eot] = AddedToken(eot)

        # Only the template may write these. (Some tokenizers mark none of them as special.)
        source = named_template(template) or self.own_template() or TEMPLATES["plain"]
        control = {text for text, token in added.items()
                   if token.special or (CONTROL.fullmatch(text) and text in source)}
        control |= added.keys() & {eot, *names.values()}
        control -= {"<think>", "</think>"}  # templates look for these in contents
        try:
            super().__init__(source, names, control, system)
            if eot:
                super().__init__(self.end_turns_with(eot), names, control, system)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        known = {text: name for name, text in TEMPLATES.items()}
        self.template = known.get(self.source, template or "its own")

        # The tokenizer must find every control token in our texts, whatever its file says of them.
        self.tokenizer.add_special_tokens([
            AddedToken(text, lstrip=added[text].lstrip, rstrip=added[text].rstrip, normalized=False)
            for text in sorted(control)])
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.find_ids()
        self.add_own_characters()

    def add_own_characters(self) -> None:
        """Make BORDER a token, and let the other characters of our own vanish from texts.

        The tokenizer finds special tokens first, then drops these characters, then goes on.
        """
        # Without a post-processor offsets hold a token's space too.
        drop = normalizers.Replace(Regex(f"[{SIGN}{BEGIN}{END}]"), "")
        own = [self.tokenizer.normalizer] if self.tokenizer.normalizer else []
        self.tokenizer.normalizer = normalizers.Sequence([drop, *own])
        self.tokenizer.post_processor = None
        self.tokenizer.add_special_tokens([AddedToken(BORDER, normalized=False)])

        # A new token's id is the number of tokens. Where ids leave a gap, another token has it, and
        # would leave all texts as a BORDER.
        ids = self.tokenizer.get_vocab()
        check(len(set(ids.values())) == len(ids),
              f"{self.folder}: the ids of its tokens leave a gap, into which one of ours would "
              "fall: number them from 0 on")
        self.border_id = ids.pop(BORDER)
        self.vocab_size = 1 + max(ids.values())

    def read(self, name: str) -> dict:
        """A JSON file of the checkpoint, empty if there is none."""
        path = self.folder / name
        return modeling.read_json(path) if path.exists() else {}

    def own_template(self) -> str:
        """The checkpoint's chat template, empty if it has none."""
        source = self.config.get("chat_template") or ""
        if isinstance(source, list):  # several, by name
            source = {t["name"]: t["template"] for t in source}.get("default", "")
        path = self.folder / "chat_template.jinja"  # newer checkpoints; transformers prefers it
        return read_template(path) if path.exists() else source

    def end_turns_with(self, eot: str) -> str:
        """The template's source with this token at the end of every turn (--eot).

        It takes the place of the token that ends answers; as in LIMA (arXiv:2305.11206, section 3)
        the user's turns end with it too.
        """
        eos = self.names.get("eos_token")
        check(eot != eos and CONTROL.fullmatch(eot),
              f"--eot: expected a token like <|end|> that is not EOS, found {eot}")
        if eot != self.stop:
            check(eot not in self.source, f"--eot: the chat template writes {eot} elsewhere too")

            # Where EOS ends turns, most templates write it by its name.
            source = self.source.replace(self.stop, eot)
            by_name = self.stop == eos
            self.source = re.sub(r"\beos_token\b", repr(eot), source) if by_name else source

        # Llama 2's and others end the user's turns with no token of their own.
        asked = self.render([{"role": "user", "content": PROBE}], add_generation_prompt=True)
        ended = eot in asked.partition(PROBE)[2]
        return self.source if ended else END_QUESTIONS.replace("EOT", repr(eot)) + self.source

    def find_ids(self) -> None:
        """The ids that end and begin texts: eos_id, stop_id, stop_ids, bos_ids."""
        names, to_id = self.names, self.tokenizer.token_to_id
        self.eos_id, self.stop_id = to_id(names.get("eos_token", "")), to_id(self.stop)
        check(self.eos_id is not None,
              f"{self.folder}: tokenizer_config.json names no eos_token of the tokenizer")

        # Some tokenizers begin a text with BOS, as their models saw it in pre-training.
        first = self.tokenizer.encode("").ids[:1]
        self.bos_ids = first if first == [to_id(names.get("bos_token", ""))] else []

        # Any of these ends an answer: a checkpoint may list more than its template writes. (For
        # transformers config.json counts only where generation_config.json is missing.)
        settings = {**self.read("config.json"), **self.read("generation_config.json")}
        listed = settings.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        check(all(x is None or type(x) is int for x in listed),
              f"{self.folder}: eos_token_id in generation_config.json, or else in config.json, is "
              f"{listed}; expected an id or a list of ids")
        self.stop_ids = sorted({self.stop_id, self.eos_id, *listed} - {None})

    def check_size(self, vocab_size: int) -> None:
        """Raise InputError if a token has no row in an embedding of `vocab_size` rows."""
        check(self.vocab_size <= vocab_size, f"{self.folder}: the tokenizer has {self.vocab_size} "
              f"tokens, config.json only {vocab_size} (vocab_size)")

    def check_reader(self, folder: str | Path) -> None:
        """Raise InputError if a checkpoint that is to read our tokens numbers them otherwise."""
        self.check_size(modeling.load_config(folder).vocab_size)
        if (Path(folder) / "tokenizer.json").exists():
            mine, theirs = self.tokenizer.get_vocab(), open_tokenizer(Path(folder)).get_vocab()
            check(all(mine.get(text, i) == i for text, i in theirs.items()),
                  f"{folder} numbers its tokens in another way than {self.folder}: what reads them "
                  "must come from a checkpoint with the same tokenizer")

    def decode(self, ids, special: bool = True) -> str:
        """Text of token ids, special tokens included unless `special` is False."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def text(self, text: str, end: bool = True) -> Plan:
        """Raw text, all of it supervised: BOS where the tokenizer adds one, the text, EOS."""
        text = self.hide(text) + (self.names["eos_token"] if end else "")
        return Plan(text, ((0, len(text), 1.0),), tuple(self.bos_ids))

    def prompt_ids(self, messages: list[dict], tools: list | None = None, **options) -> list[int]:
        """Token ids of `prompt`: a conversation up to the answer to come."""
        return self.encode([self.prompt(messages, tools, **options)])[0][0].tolist()

    def encode(self, plans: list[Plan]) -> list[tuple[np.ndarray, tuple]]:
        """(ids, spans of supervised tokens) of each plan, on all threads of the tokenizer."""
        texts = [plan.text for plan in plans]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self.assemble(*pair) for pair in zip(plans, encoded, strict=True)]

    def assemble(self, plan: Plan, encoding) -> tuple[np.ndarray, tuple]:
        """Ids and spans of a plan from the encoding of its text."""
        # Where a token straddles the beginning of an answer, a BORDER there keeps the two apart.
        text, apart = plan.text, []
        for begin, _, _ in plan.places:
            first = token_at(encoding, begin)
            if first and encoding.token_to_chars(first - 1)[1] > begin:
                apart.append(begin)
        for begin in reversed(apart):
            text = text[:begin] + BORDER + text[begin:]
        if apart:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)

        # Spans of characters become spans of tokens; then the BORDERs go.
        spans, start = [], len(plan.start)
        for begin, end, weight in plan.places:
            moved = bisect_right(apart, begin)  # by so many BORDERs: characters, then tokens
            first = start + token_at(encoding, begin + moved) - moved
            last = start + token_at(encoding, end + moved) - moved
            first = max(first, 1)  # nothing comes before the first token of all
            if first < last:
                spans.append((first, last, weight))
        ids = np.array([*plan.start, *encoding.ids], dtype=np.int32)
        return ids[ids != self.border_id], tuple(spans)

    def save(self, folder: Path) -> None:
        """The tokenizer's files byte for byte, but for what --template or --eot changed."""
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                 "merges.txt")
        files = {n: (self.folder / n).read_bytes() for n in names if (self.folder / n).exists()}

        # With --template or --eot: the template that was trained with, in one place only.
        if self.source != self.own_template():
            config = json.dumps({**self.config, "chat_template": self.source}, indent=2)
            files["tokenizer_config.json"] = config.encode()
            files.pop("chat_template.jinja", None)

        # The token of --eot gets the id behind all others, as it did in the embedding.
        if self.eot_is_new:
            extended = Tokenizer.from_str(files["tokenizer.json"].decode())
            extended.add_special_tokens([AddedToken(self.stop, normalized=False)])
            files["tokenizer.json"] = extended.to_str(pretty=True).encode()
        for name, content in files.items():
            write_atomic(folder / name, lambda path, content=content: path.write_bytes(content))
        if "chat_template.jinja" not in files:
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would win over ours


# ---- skip on a first reading: files to examples --------------------------------------------------


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
    kept = []
    for first, last, weight in spans:
        first, last = max(first, start + 1) - start, min(last, end) - start
        if first < last:
            kept.append((first, last, weight))
    return ids[start:end], tuple(kept)


def fit(ids: np.ndarray, spans: tuple, max_length: int) -> tuple[np.ndarray, tuple]:
    """At most `max_length` tokens of a conversation, supervised ones among them.

    The end is cut. Where the prompt of the first answer is long, its beginning is cut instead,
    until it takes half of the window or the last answer fits.
    """
    first, end = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    start = max(0, min(first - max_length // 2, end - max_length))
    return cut(ids, spans, start, start + max_length)


def render_rows(rows: list[Row], tokenizer: ChatTokenizer, train_on: str, counts: Counter,
                skip_bad_rows: bool | None) -> list[tuple[Row, list[Plan]]]:
    """Each row with its plans; a row that the chat template refuses is a bad row."""
    rendered = []
    for row in rows:
        # Of a pair only the answers are new: nothing of its history is supervised.
        sides = [row.chosen, row.rejected] if row.chosen else [[]]
        part, plans = "last" if row.chosen else train_on, []
        try:
            for side in sides:
                if row.text is None:
                    plans += tokenizer.conversation(row.messages + side, row.tools, part)
                else:
                    plans.append(tokenizer.text(row.text))
            rendered.append((row, plans))
            more = len(plans) - len(sides)
            counts["more examples than conversations: the template rewrites past answers"] += more
        except InputError as error:
            refuse_unless(skip_bad_rows, InputError(f"{row.where}: {error}"))
            counts["dropped: bad row"] += 1
    return rendered


def to_examples(rows: list[Row], source: int, counts: Counter, tokenizer: ChatTokenizer,
                train_on: str = "all", max_length: int = 2048, keep_all: bool = False,
                skip_bad_rows: bool | None = None) -> list[Example]:
    """Tokenise rows, counting what is cut, split or dropped.

    `keep_all` keeps examples with nothing to supervise, and takes preference rows (a pair as two).
    """
    for row in rows:
        check(keep_all or (row.chosen is None and row.label is None),
             f"{row.where}: a preference row; train_dpo.py trains on those")
    owners, plans, examples = [], [], []
    for row, own in render_rows(rows, tokenizer, train_on, counts, skip_bad_rows):
        owners += [row] * len(own)
        plans += own

    # All texts in one call: the tokenizer's threads share them.
    for row, (ids, spans) in zip(owners, tokenizer.encode(plans), strict=True):
        parts, change = [fit(ids, spans, max_length)], "truncated"
        if row.text is not None:
            # Parts share a token, so that the first token of a part is predicted in the one before.
            starts = range(0, max(len(ids) - 1, 1), max_length - 1)
            parts, change = [cut(ids, spans, i, i + max_length) for i in starts], "raw texts split"
        counts[change] += len(ids) > max_length
        for part, kept in parts:
            if kept or keep_all:
                examples.append(Example(part, kept, source, row.where))
            else:
                counts["dropped: nothing to supervise"] += 1
    return examples


# ---- skip on a first reading: the files of a run -------------------------------------------------


def has_empty_answer(row: Row) -> bool:
    """Does the assistant say nothing in one of its turns, not even a call or a thought?"""
    for m in [*row.messages, *(row.chosen or []), *(row.rejected or [])]:
        said = m["content"].strip() or m.get("tool_calls") or m.get("reasoning_content")
        if m["role"] == "assistant" and not said:
            return True
    return False


def convert_files(files: list[str], convert, skip_bad_rows: bool | None = None,
                  quiet: bool = True) -> tuple[list, Counter]:
    """Read some files and convert their rows; also returns how many were cut or dropped, by reason.

    convert(rows, source, counts) gives the items of some rows of file number `source`.
    """
    items, counts = [], Counter()
    for source, path in enumerate(files):
        before = len(items)
        rows = iter(tqdm(read_rows([path], skip_bad_rows, quiet), f"tokenize {Path(path).name}",
                         unit=" rows", disable=quiet or None))  # None: where stderr is no terminal

        # So many rows at once are work for every thread of the tokenizer, and little memory.
        while some := list(itertools.islice(rows, 2000)):
            good = [row for _, row in some if row]
            items += convert(good, source, counts)
            counts["dropped: bad row"] += len(some) - len(good)
            counts["empty answers"] += sum(map(has_empty_answer, good))
        check(len(items) > before, f"{path}: no row that can be used")
    return items, +counts


def load_examples(files: list[str], tokenizer: ChatTokenizer, train_on: str = "all",
                  max_length: int = 2048, keep_all: bool = False,
                  skip_bad_rows: bool | None = None, quiet: bool = True):
    """(examples of some files, what was cut or dropped by reason), as `to_examples` makes them."""
    convert = functools.partial(
        to_examples, tokenizer=tokenizer, train_on=train_on, max_length=max_length,
        keep_all=keep_all, skip_bad_rows=skip_bad_rows)
    return convert_files(files, convert, skip_bad_rows, quiet)


def split_validation(examples: list[Example], fraction: float, seed: int):
    """(training, validation): `fraction` of the distinct rows.

    Copies stay on one side, and so do the examples that a template made of one conversation.
    Preferences are told apart by their prompts, so that no prompt is on both sides.
    """
    # The order of the hashes is a shuffle that does not depend on how often a copy stands where.
    salt = str(seed).encode()
    keys = [hashlib.sha256(salt + e.key).digest() for e in examples]

    # Those who belong together take the lowest hash among them, until nobody finds a lower one.
    names, before = [(e.key, e.where or e.key) for e in examples], None
    while keys != before:
        before, lowest = keys, {}
        for both, key in zip(names, keys, strict=True):
            for name in both:
                lowest[name] = min(key, lowest.get(name, key))
        keys = [min(lowest[copy], lowest[row]) for copy, row in names]
    distinct = sorted(set(keys))
    held = set(distinct[: max(1, round(fraction * len(distinct)))])
    training, validation = [], []
    for e, key in zip(examples, keys, strict=True):
        (validation if key in held else training).append(e)
    return training, validation


def overlap_count(training: list, validation: list) -> int:
    """How many validation examples are copies of training ones (of preferences: by prompt)."""
    known = {e.key for e in training}
    return sum(e.key in known for e in validation)


def source_names(files: list[str]) -> list[str]:
    """A short name for each file or folder, numbered where two are called the same."""
    stems = [Path(Path(f).absolute().name.removesuffix(".gz")).stem for f in files]
    return [s if stems.count(s) == 1 else f"{s}#{i}" for i, s in enumerate(stems, 1)]


# ==== read: the mixer =============================================================================


def mixing_rates(sizes: list[int], mix: str, temperature: float = 1.0, cap: int = 0,
                 weights=()) -> np.ndarray:
    """Share of each source in training (T5, arXiv:1910.10683, section 3.5.2).

    r_m = min(e_m, K) / sum_n min(e_n, K), then r_m^(1/T) renormalised: e_m examples of source m,
    K the cap (0: none), T the temperature. proportional is T = 1 without K, equal is T -> infinity.
    """
    counts = {"weights": weights, "equal": np.ones(len(sizes))}.get(mix, sizes)

    # The cap comes before the temperature, as in the paper.
    rates = np.array(counts, dtype=np.float64)
    if mix == "temperature":
        rates = np.minimum(rates, cap or np.inf)
        rates = (rates / rates.max()) ** (1 / temperature)  # the sum's would all be 0 at a small T
    return rates / rates.sum()


class Mixer:
    """Which example is drawn when: a pure function of (seed, draw), alike on every rank.

    An epoch is as many draws as there are examples. A source is shuffled again and again into one
    endless list; an epoch takes the next of it, as many as the source's share (rounded by largest
    remainders), and shuffles what all sources gave. So proportional mixing sees every example once
    per epoch, and a source repeats only when all of it was seen. Examples are numbered by source.
    """

    def __init__(self, sizes: list[int], rates: np.ndarray, seed: int):
        self.sizes, self.seed, self.size = sizes, seed, sum(sizes)

        # Largest remainders: round all shares down; where most was lost, give one more.
        exact = rates * self.size
        self.quotas = np.floor(exact).astype(int)
        missing = self.size - self.quotas.sum()
        self.quotas[np.argsort(self.quotas - exact, kind="stable")[:missing]] += 1
        self.cached = -1, None  # the latest epoch and its draws: its steps share them

    def source(self, m: int, first: int, count: int) -> np.ndarray:
        """Draws first..first+count-1 of source m: [count, 2] of (example, times seen before)."""
        # Draw k of a source is place k % size of its shuffle number k // size.
        visit, place = np.divmod(np.arange(first, first + count), self.sizes[m])
        example = np.empty_like(place)
        for v in np.unique(visit):
            shuffle = np.random.default_rng([self.seed, 1, m, v]).permutation(self.sizes[m])
            example[visit == v] = shuffle[place[visit == v]]
        return np.stack((example + sum(self.sizes[:m]), visit), 1)

    def epoch(self, number: int) -> np.ndarray:
        """All draws of an epoch: [size, 2] of (example, times seen before)."""
        if self.cached[0] != number:
            draws = [self.source(m, number * q, q) for m, q in enumerate(self.quotas.tolist())]
            shuffle = np.random.default_rng([self.seed, 0, number]).permutation(self.size)
            self.cached = number, np.concatenate(draws)[shuffle]
        return self.cached[1]

    def draws(self, first: int, end: int) -> list[tuple[int, int]]:
        """(example, times seen before) of draws first..end-1, counted from the start."""
        return [tuple(self.epoch(k // self.size)[k % self.size].tolist())
                for k in range(first, end)]


# ---- skip on a first reading: the mix of a run ---------------------------------------------------


def shares(examples: list[tuple], names: list[str]) -> dict[str, dict]:
    """The share of every source, by name, in examples (source, supervised tokens) and in tokens."""
    rows, targets = Counter(), Counter()
    for source, count in examples:
        rows[source] += 1
        targets[source] += count
    out = {}
    for m, name in enumerate(names):
        out[name] = {"examples": rows[m], "share": rows[m] / max(rows.total(), 1),
                     "target_tokens": targets[m],
                     "target_share": targets[m] / max(targets.total(), 1)}
    return out


def check_mix(c, files: list[str]) -> None:
    """Raise InputError for flags of a mix that make no sense."""
    check(0 < c.temperature < math.inf, f"--temperature must be above 0, not {c.temperature}")
    check((c.mix == "weights") == bool(c.weights), "--mix weights and --weights go together")
    check(len(c.weights) in (0, len(files)) and all(0 < w < math.inf for w in c.weights),
         f"--weights needs a number above 0 for each of the {len(files)} files")
    check(not c.cap or c.mix == "temperature", "--cap goes with --mix temperature")


def mix_files(c, files: list[str], examples: list[tuple], draws: int, quiet: bool = False):
    """(mixer of --mix, shares of what it draws) of examples as (index of file, supervised tokens).

    Prints the share that was intended, and those realised in examples and in supervised tokens.
    """
    # A share of nothing cannot be drawn.
    names = source_names(files)
    sizes = [row["examples"] for row in shares(examples, names).values()]
    for path, size in zip(files, sizes, strict=True):
        check(size, f"{path}: nothing is left to train on")

    # Rounding and repetition decide what is drawn: the shares of the draws of this training.
    rates = mixing_rates(sizes, c.mix, c.temperature, c.cap, c.weights)
    mixer = Mixer(sizes, rates, c.seed)
    mix = shares([examples[i] for i, _ in mixer.draws(0, draws)], names)
    table = [("source", "examples", "intended", "drawn", "share", "of supervised tokens")]
    for (name, row), size, rate in zip(mix.items(), sizes, rates.tolist(), strict=True):
        row.update(available=size, rate=rate)
        table.append((name, size, rate, row["examples"], row["share"], row["target_share"]))
    if not quiet:
        print_table(table)
    return mixer, mix


# ==== read: micro-batches =========================================================================


def cut_at(limit: int, order: list[int], lengths: list[int]) -> list[list[int]]:
    """Examples in that order, cut into chunks of at most `limit` tokens; a longer one is alone."""
    chunks, size = [], limit + 1
    for i in order:
        if size + lengths[i] > limit:
            chunks.append([])
            size = 0
        chunks[-1].append(i)
        size += lengths[i]
    return chunks


def micro_batches(lengths: list[int], micro_tokens: int, ranks: int = 1) -> list[list[list[int]]]:
    """Cut a step into micro-batches of at most `micro_tokens` tokens: lists of indices per rank.

    Sorted by length, so that like lengths meet in attention; as even as their number allows; one
    per rank at least if there are enough examples; dealt so that tokens balance. Every rank
    computes the same without asking. A longer example is a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    count = -(-len(cut_at(micro_tokens, order, lengths)) // ranks) * ranks

    # The smallest limit that needs at most `count` chunks makes them even, where `micro_tokens`
    # would leave a small rest. The larger the limit the fewer the chunks: bisection finds it, and
    # tries smaller ones only, because `micro_tokens` is known to be enough.
    limit = 1 + bisect_left(range(1, micro_tokens), True,
                            key=lambda tokens: len(cut_at(tokens, order, lengths)) <= count)
    parts = cut_at(limit, order, lengths)

    # Equal lengths can leave a rank idle: halve the chunk with most examples.
    while len(parts) < min(ranks, len(lengths)):
        longest = max(parts, key=len)
        parts.remove(longest)
        parts += [longest[: len(longest) // 2], longest[len(longest) // 2 :]]

    # Deal the largest first, each to the rank that has least.
    sizes = {part[0]: sum(lengths[i] for i in part) for part in parts}
    dealt, load = [[] for _ in range(ranks)], [0] * ranks
    for part in sorted(parts, key=lambda part: -sizes[part[0]]):
        rank = load.index(min(load))
        dealt[rank].append(part)
        load[rank] += sizes[part[0]]
    return dealt


# ---- skip on a first reading: a batch for the model ----------------------------------------------


class Batch(NamedTuple):
    """A micro-batch of flat tokens, as the model takes it."""

    ids: torch.Tensor  # [T]
    lengths: list[int]  # [B]
    targets: torch.Tensor  # [N] flat indices of the supervised tokens
    weights: torch.Tensor  # [N]


def collate(examples: list[Example], device="cpu") -> Batch:
    """Lay examples end to end."""
    # Spans count from the start of an example, the batch from the start of the first one.
    ids, lengths, targets, weights, start = [], [], [], [], 0
    for e in examples:
        for first, end, weight in e.spans:
            targets += range(start + first, start + end)
            weights += [weight] * (end - first)
        ids.append(e.ids)
        lengths.append(len(e.ids))
        start += len(e.ids)

    ids = np.concatenate(ids).astype(np.int64)
    return Batch(modeling.send(torch.from_numpy(ids), device), lengths,
                 modeling.send(torch.tensor(targets, dtype=torch.int64), device),
                 modeling.send(torch.tensor(weights, dtype=torch.float32), device))


# ---- skip on a first reading: show ---------------------------------------------------------------


@dataclass
class Show:
    """Show what a trainer sees of some files: tokens, what is supervised, lengths, shares."""

    files: list[str]  # files of any format, preference pairs included
    skip_bad_rows: bool = False  # count and list rows that cannot be read instead of stopping
    model: str = ""  # checkpoint whose tokenizer and template to use; empty: bytes and ChatML
    rows: int = 3  # rows of each file to print
    tokens: bool = False  # print one example as a table instead: id, text, supervised, ln p
    template: str = ""  # chatml, plain, a name of labs/templates, a .jinja file; empty: its own
    system: str = ""  # system message put where a conversation has none
    train_on: Literal["all", "last"] = "all"  # answers of a conversation that are supervised
    max_length: int = 2048  # tokens per example; longer ones are truncated, raw text is split
    steps: int = 0  # show what training for so many steps draws of each file; 0: do not
    batch_size: int = 16  # examples per step
    mix: Literal["proportional", "temperature", "equal", "weights"] = "proportional"  # of the files
    temperature: float = 2.0  # of --mix temperature
    cap: int = 0  # examples a file counts for at most under --mix temperature; 0: all
    weights: list[float] = field(default_factory=list)  # of --mix weights, one a file
    seed: int = 0  # of the order


def show(c: Show) -> None:
    """`data.py show`: some examples whole, then lengths, shares, and what is dropped and why."""
    check_mix(c, c.files)
    with tempfile.TemporaryDirectory() as folder:
        if not c.model:
            byte_tokenizer(Path(folder))
            print("no --model: tokens are bytes, the template is ChatML")
        tokenizer = ChatTokenizer(c.model or folder, c.template, system=c.system)

    # All files first: what is wrong with a row is said before anything is shown.
    options = (c.train_on, c.max_length, True, c.skip_bad_rows)
    examples, counts = load_examples(c.files, tokenizer, *options, quiet=False)
    for path in c.files:
        rows = (row for _, row in read_rows([path], c.skip_bad_rows, quiet=True) if row)
        for row in itertools.islice(rows, max(c.rows, c.tokens)):
            sides = {None: [""], True: [", liked"], False: [", disliked"]}[row.label]
            sides = [", chosen", ", rejected"] if row.chosen else sides
            found = to_examples([row], 0, Counter(), tokenizer, *options)
            for side, e in zip(itertools.cycle(sides), found, strict=False):
                print(f"--- {e.where}{side}: {len(e.ids)} tokens, {e.targets} supervised")
                if c.tokens:
                    print_tokens(e, tokenizer, c.model)
                    return
                print(marked(e, tokenizer, sys.stdout.isatty()))

    end = tokenizer.decode([tokenizer.stop_id])
    marks = "green" if sys.stdout.isatty() else "in [[ ]]"
    print(f"--- template {tokenizer.template}; a turn ends with {end}; trained text is {marks}")
    print_sizes(c.files, examples, counts)
    if c.steps:
        print(f"{c.steps} steps of {c.batch_size}, --mix {c.mix}")
        pairs = [(e.source, e.targets) for e in examples if e.targets]
        mix_files(c, c.files, pairs, c.steps * c.batch_size)


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


def print_tokens(example: Example, tokenizer: ChatTokenizer, folder: str) -> None:
    """An example as a table, a line per token; ln p if the folder holds a model's weights."""
    logps = [""] * len(example.ids)
    if folder and any(Path(folder).glob("*.safetensors")):
        model = modeling.load(folder, torch.float32, "cpu")
        batch = collate([example._replace(spans=((1, len(example.ids), 1.0),))])
        with torch.no_grad():  # nothing predicts the first token
            found = model(batch.ids, batch.lengths, batch.targets).tolist()
        logps[1:] = [f"{logp:.3f}" for logp in found]

    weights = [0.0] * len(example.ids)
    for first, end, weight in example.spans:
        weights[first:end] = [weight] * (end - first)
    table = [("id", "text", "supervised", "ln p" if any(logps) else "")]
    for token, weight, logp in zip(example.ids.tolist(), weights, logps, strict=True):
        table.append((token, repr(tokenizer.decode([token])), f"{weight:g}", logp))
    print_table(table)


def print_sizes(files: list[str], examples: list[Example], counts: Counter) -> None:
    """Shares and lengths of the examples of each file, and what was lost."""
    sizes = np.array([(e.source, len(e.ids), e.targets) for e in examples])
    table = [("source", "examples", "share", "supervised", "their share", "median", "longest")]
    rows = shares(sizes[:, ::2].tolist(), source_names(files))
    for m, (name, row) in enumerate(rows.items()):
        lengths = sizes[sizes[:, 0] == m, 1]
        table.append((name, *row.values(), round(np.median(lengths)), lengths.max()))
    print_table(table)

    _, tokens, supervised = sizes.sum(0)
    print(f"supervised: {supervised / tokens:.1%} of the tokens\n"
          "tokens of an example, by percentiles:", end="")
    for percent in (5, 25, 50, 75, 95, 100):
        print(f" {percent}%: {np.percentile(sizes[:, 1], percent):.0f} ", end="")
    print()
    counts["nothing to supervise"] = int((sizes[:, 2] == 0).sum())
    for reason, count in (+counts).items():
        print(f"{reason}: {count}")


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes and ChatML's marks, in Hugging Face layout."""
    # A BPE without merges: each byte stays a token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: k for k, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    write_atomic(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATES["chatml"]}
    write_json(folder / "tokenizer_config.json", config)


# ---- skip on a first reading: files of rows ------------------------------------------------------


def read_values(path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every row of a .json, .jsonl, .ndjson or .txt file, gzipped or not.

    The value of a line that cannot be read is an error: the other lines can still be used.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    check(path.is_file(), f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    check(kind in ("json", "jsonl", "ndjson", "txt"),
          f"{path}: expected a file called .json, .jsonl, .ndjson or .txt, maybe with .gz")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            may_be_list = kind != "txt"
            for number, line in enumerate(file, 1):
                # Some editors begin a file with a byte order mark.
                line = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
                if not line.strip():
                    continue

                # People call a list of rows .jsonl and lines of rows .json: the content decides.
                whole = may_be_list and begins_list(line.strip())
                content = line + b"\n" + file.read() if whole else line
                before, value = decode(content, kind)
                if whole and isinstance(value, list):
                    for place, row in enumerate(value, 1):
                        yield f"{path} row {place}", row
                else:
                    yield f"{path} line {number + before}", value
                may_be_list = False
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def begins_list(line: bytes) -> bool:
    """Is a file with this first line one list of rows? Else it has a row per line.

    Such a row may be a list as well: the messages of a conversation.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(b"[")  # it goes on in the next line
    if row and isinstance(row, list) and isinstance(row[0], dict):
        return not row[0].keys() & {"role", "from"}
    return isinstance(row, list)


def decode(content: bytes, kind: str) -> tuple[int, object]:
    """(0, the value of a line or of a file), or (lines before the one that is wrong, why)."""
    try:
        text = content.decode()
        return 0, {"text": text} if kind == "txt" else json.loads(text)
    except UnicodeDecodeError as error:
        why = (f"byte {error.object[error.start]:#x} is not UTF-8: convert the file with iconv -f "
               "ENCODING -t UTF-8 (GB18030 for Chinese, WINDOWS-1252 for Western texts)")
        return error.object.count(b"\n", 0, error.start), ValueError(why)
    except (ValueError, RecursionError) as error:
        why = f"not JSON: {getattr(error, 'msg', error)}"
        return getattr(error, "lineno", 1) - 1, ValueError(why)


# ---- skip on a first reading: flags and errors on the command line -------------------------------


def parse_flags(cls, argv: list[str], positional: str = "") -> dict:
    """What argv says of the fields of dataclass `cls`; a field's comment is its help."""
    # A help text is the comment behind its field, read from the source: so a flag is described in
    # one place, where who reads the code meets it too, and the two cannot drift apart.
    source = "".join(inspect.getsource(c) for c in cls.__mro__[-2::-1])  # base classes first
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    script = Path(sys.argv[0])
    name = f"python -m labs.{script.stem}" if script.parent.name == "labs" else script.name
    name = " ".join([name, *sys.argv[1 : len(sys.argv) - len(argv)]])  # eval.py exam
    parser = argparse.ArgumentParser(name, description=cls.__doc__, allow_abbrev=False)
    # Its own way to report an error prints the usage over several lines.
    parser.error = lambda message: check(False, f"{message}; --help lists the flags")
    for f in fields(cls):
        kind, inner = {"type": f.type}, typing.get_args(f.type)
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(f.type) is Literal:
            kind = {"choices": inner}
        elif typing.get_origin(f.type) is list:
            kind = {"type": inner[0], "nargs": "+"}
        flag, about = f.name if f.name == positional else f"--{f.name}", helps.get(f.name, "")
        if f.default not in (MISSING, None, "", False):
            about += f" [{f.default}]"
        about = about.replace("%", "%%")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=about, **kind)

    # A wrong flag is most often a right one misspelt.
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.lstrip("-"), [f.name for f in fields(cls)], 1)
        kind = "unknown flag" if word.startswith("-") else "unexpected argument"
        parser.error(f"{kind} {word}" + (f" (did you mean --{near[0]}?)" if near else ""))
    return vars(known)


def run_command(commands: dict, usage: str) -> None:
    """Run the command named first in argv; commands: {name: (dataclass, function, positional)}."""
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name in ("-h", "--help"):
        print(usage.strip())
        return
    check(name in commands, f"expected one of {', '.join(commands)}, not {name}; --help explains")
    config, function, positional = commands[name]
    c = config(**parse_flags(config, sys.argv[2:], positional))
    check_numbers(c)
    function(c)


# No number is below 0, and some are not below these. None reaches 2^63, which torch cannot hold.
LEAST = {"batch_size": 1, "micro_tokens": 1, "log_every": 1, "max_length": 2, "n": 1, "shots": -1,
         "max_new_tokens": 1, "thinking_tokens": 1}


def check_numbers(c) -> None:
    """Raise InputError for a flag whose number is too small, or not finite."""
    for f in fields(c):
        value, least = getattr(c, f.name), LEAST.get(f.name, 0)
        if isinstance(value, int | float):
            check(value < 2**63, f"--{f.name} must be below 2^63, is {value}")
            check(value >= least, f"--{f.name} must be {least} or more, is {value}")


@contextmanager
def one_line_errors():
    """End with one line and status 2 on an InputError, with 130 on Ctrl-C; quietly after `head`."""
    # Of many ranks one speaks, or each message would come many times.
    name = Path(sys.argv[0]).name
    speak = os.environ.get("RANK", "0") == "0"
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        if speak:
            tqdm.write(f"{name}: {error}", sys.stderr)  # not into an open bar
        sys.exit(2)
    except KeyboardInterrupt:
        if speak:
            tqdm.write(f"{name}: interrupted", sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as of any program that Ctrl-C ends
    except (MemoryError, RuntimeError) as error:
        # Any rank may be the one. A CPU's allocator has no error class of its own.
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        print(f"{name}: out of memory: lower --micro_tokens; in training, add "
              "--checkpoint_activations, --lora_rank 16, or --shard on several devices",
              file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Who reads our output has gone (`show FILE | head`). What is still buffered goes nowhere,
        # or Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:  # a disk that is full, a file that may not be read
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's tokenizer.json, or an InputError that says what is wrong."""
    path = checkpoint_file(folder, "tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} cannot be read by tokenizers {tokenizers.__version__}: "
                         f"{str(error)[:80]}; a newer version, or one written anew by "
                         "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)?") from None


def print_table(rows: list) -> None:
    """Rows of cells, the first of names; a float is a share, printed in percent."""
    rows = [[f"{x:.1%}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(text_width, column)) + 2 for column in zip(*rows, strict=True)]
    for row in rows:
        line = ""
        for k, (cell, width) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (width - text_width(cell))
            line += gap + cell if k else cell + gap  # names to the left, numbers to the right
        print(line)


def text_width(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese characters are two wide."""
    return sum(1 + (unicodedata.east_asian_width(x) in "WF") for x in text)


if __name__ == "__main__":
    with one_line_errors():
        run_command({"show": (Show, show, "files")}, __doc__)
