"""How rows are read: what each key means, what is refused by name, files and their encodings."""

import gzip
import json

import pytest
from conftest import HI, NO, PAIRS, YO, assistant, command, jsonl, system, user

import data
from data import InputError, Row

HUMAN = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
TALK = [user("a"), assistant("b"), user("c"), assistant("d")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}


def parsed(path, **options):
    """The rows of a file."""
    return [row for _, row in data.read_rows([path], **options)]


# ---------------------------------------------------------------------------- what the keys mean

CONVERSATIONS = {
    "messages": ({"messages": [system("s"), HI, YO]}, [system("s"), HI, YO]),
    "a bare list of messages": ([HI, YO], [HI, YO]),
    "the system text beside messages": ({"messages": [HI, YO], "system": "s"},
                                        [system("s"), HI, YO]),
    "the system text beside messages that hold it": (
        {"messages": [system("s"), HI, YO], "system": "s"}, [system("s"), HI, YO]),
    "messages and the answer beside them": ({"messages": [HI], "response": "yo"}, [HI, YO]),
    "messages and their first question": ({"prompt": "hi ", "messages": [HI, YO]}, [HI, YO]),
    "messages and their answer": ({"messages": [HI, YO], "answer": "yo"}, [HI, YO]),
    "weights": ({"messages": [HI, assistant("a", weight=0.5), HI, assistant("b", train=0)]},
                [HI, assistant("a", weight=0.5), HI, assistant("b", train=False)]),
    "loss": ({"messages": [HI, assistant("a", loss=False), HI, assistant("b", loss=True)]},
             [HI, assistant("a", train=False), HI, assistant("b", train=True)]),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "hi"},
                                    {"from": "gpt", "value": "yo"}]}, [HI, YO]),
    "ShareGPT's system text": ({"system": "s", "conversations": [
        {"from": "user", "value": "hi"}, {"from": "assistant", "value": "yo"}]},
        [system("s"), HI, YO]),
    "roles in other letters": ({"messages": [
        {"role": "Developer", "content": "s"}, {"role": "PROMPTER", "content": "hi"},
        {"role": "Bot", "content": "yo"}]}, [system("s"), HI, YO]),
    "Firefly": ({"conversation": [{"human": "a", "assistant": "b"},
                                  {"human": "c", "assistant": "d"}]}, TALK),
    "Firefly with a system text and a null": ({"conversation": [
        {"system": "s", "human": "hi", "assistant": "yo"},
        {"system": None, "human": "hi", "assistant": "no"}]}, [system("s"), HI, YO, HI, NO]),
    "Firefly with sorted keys": ({"conversation": [{"assistant": "b", "human": "a"},
                                                   {"assistant": "d", "human": "c"}]}, TALK),
    "LangChain's pairs of role and text": (
        {"messages": [["system", "s"], ["human", "hi"], ["ai", "yo"]]}, [system("s"), HI, YO]),
    "history and messages as JSON in a text": (
        {"history": "[]", "messages": '[{"role": "user", "content": "hi"}]', "answer": "yo"},
        [HI, YO]),
    "a dialogue as input, as answer and as system text": (
        {"system": HUMAN + " x", "instruction": "What mood?", "input": HUMAN + " y",
         "output": HUMAN + " z"},
        [system(HUMAN + " x"), user("What mood?\n" + HUMAN + " y"), assistant(HUMAN + " z")]),
    "weights of 0 on a question": ({"messages": [user("hi", weight=0), YO]},
                                   [user("hi", weight=0), YO]),
    "content in parts": ({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]},
        {"role": "assistant", "content": ["yo"]}]}, [HI, YO]),
    "Alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, [HI, YO]),
    "Alpaca with input": ({"instruction": "add", "input": "1 2", "output": "3"},
                          [user("add\n1 2"), assistant("3")]),
    "Alpaca with its rendered text": (
        {"instruction": "hi", "input": "", "output": "yo",
         "text": "Below is an instruction.\n\n### Instruction:\nhi\n\n### Response:\nyo"},
        [HI, YO]),
    "Alpaca with nulls": (
        {"instruction": "hi", "input": None, "output": "yo", "system": None, "history": None},
        [HI, YO]),
    "Alpaca with system and history": (
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
        [system("s"), *TALK]),
    "history as messages": ({"query": "c", "response": "d", "history": TALK[:2]}, TALK),
    "an empty history": ({"query": "hi", "response": "yo", "history": [], "system": ""}, [HI, YO]),
    "an instruction that is empty": ({"instruction": "", "input": "hi", "output": "yo"}, [HI, YO]),
    "dolly": ({"instruction": "add", "context": "1 2", "response": "3", "category": "qa"},
              [user("add\n1 2"), assistant("3")]),
    "a question about a context": ({"context": "1 2", "question": "add", "answer": "3"},
                                   [user("add\n1 2"), assistant("3")]),
    "prompt and completion": ({"prompt": "hi", "completion": "yo"}, [HI, YO]),
    "prompt and completion as messages": ({"prompt": [system("s"), HI], "completion": [YO]},
                                          [system("s"), HI, YO]),
    "prompt as messages, completion as text": ({"prompt": [HI], "completion": "yo"}, [HI, YO]),
    "input and target": ({"kind": "NLI", "input": "hi", "target": "yo"}, [HI, YO]),
    "keys in capitals": ({"Question": "hi", "Answer": "yo"}, [HI, YO]),
    "two keys for one answer, of which one is empty": (
        {"question": "hi", "output": "", "answer": "yo"}, [HI, YO]),
    "Human and Assistant in a prompt": (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "response": "d"},
        TALK),
    "a text that only speaks of Human:": ({"prompt": "Human: a", "completion": "d"},
                                          [user("Human: a"), assistant("d")]),
    "an empty answer": ({"prompt": "hi", "completion": ""}, [HI, assistant("")]),
    "reasoning beside the answer": (
        {"messages": [HI, assistant("yo", reasoning="hm")]},
        [HI, assistant("yo", reasoning_content="hm")]),
    "a call and what the tool said": (
        {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "content": "1", "name": "f", "tool_call_id": "x"}, YO]},
        [HI, assistant("", tool_calls=[CALL]),
         {"role": "tool", "content": "1", "name": "f", "tool_call_id": "x"}, YO]),
    "OpenAI's former function_call": (
        {"messages": [HI, {"role": "assistant", "content": None,
                           "function_call": CALL["function"]},
                      {"role": "function", "name": "f", "content": "1"}, YO]},
        [HI, assistant("", tool_calls=[CALL]), {"role": "tool", "name": "f", "content": "1"}, YO]),
    "LLaMA-Factory's roles for calls": (
        {"conversations": [{"from": "human", "value": "hi"},
                           {"from": "function_call", "value": json.dumps(CALL["function"])},
                           {"from": "observation", "value": "1"}, {"from": "gpt", "value": "yo"}]},
        [HI, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "1"}, YO]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_row_of_each_conversation_format_gives_its_messages(name):
    row, messages = CONVERSATIONS[name]
    assert data.parse_row("here", row) == Row("here", messages)


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL])])
def test_tools_are_kept_in_openais_form_however_they_are_written(tools):
    row = data.parse_row("here", {"messages": [HI, YO], "tools": tools})
    assert row == Row("here", [HI, YO], tools=[TOOL])


@pytest.mark.parametrize("row", [
    {"text": "once"}, {"completion": "once"}, {"text": "once", "id": 1}])
def test_row_of_raw_text_has_no_messages(row):
    assert data.parse_row("here", row) == Row("here", [], text="once")


@pytest.mark.parametrize("key,value,label", [
    ("label", True, True), ("label", 0, False), ("label", 1.0, True), ("kto_tag", False, False)])
def test_unpaired_preference_keeps_its_label(key, value, label):
    for row in ({"messages": [HI, YO]}, {"prompt": "hi", "completion": "yo"}):
        assert data.parse_row("here", {**row, key: value}) == Row("here", [HI, YO], label=label)


def test_prompt_without_answer_is_accepted_only_where_answers_are_generated():
    for row in ({"prompt": "hi"}, {"prompt": "hi", "response": None}):
        assert data.parse_row("here", row, ask=True).messages == [HI]
        with pytest.raises(InputError, match=r"here: expected an answer under .*response"):
            data.parse_row("here", row)


# ------------------------------------------------------------------------------ preference pairs

LONG_PAIRS = {  # all of them: TALK's question c, then d or e
    "whole conversations": {"chosen": TALK, "rejected": [*TALK[:3], assistant("e")]},
    "a prompt of messages": {"prompt": TALK[:3], "chosen": "d", "rejected": "e"},
    "a prompt with a space more": {"prompt": " c\n", "chosen": TALK,
                                   "rejected": [*TALK[:3], assistant("e")]},
    "a prompt written otherwise": {"prompt": "C?", "chosen": TALK,
                                   "rejected": [*TALK[:3], assistant("e")]},
    "messages that repeat the chosen conversation": {
        "messages": TALK, "chosen": TALK, "rejected": [*TALK[:3], assistant("e")]},
    "messages that repeat the chosen answer": {"messages": TALK, "chosen": "d", "rejected": "e"},
    "messages and a rejected response": {"messages": TALK, "rejected_response": "e"},
    "response and rejected response": {"query": "c", "history": [["a", "b"]], "response": "d",
                                       "rejected_response": "e"},
    "the chosen answer once more": {"prompt": TALK[:3], "response": "d", "chosen": "d",
                                    "rejected": "e"},
    "dialogues": {"chosen": HUMAN + " d", "rejected": HUMAN + " e"},
    "a dialogue as prompt": {"prompt": HUMAN, "chosen": "d", "rejected": "e"},
    "a dialogue as prompt of whole ones": {"prompt": HUMAN, "chosen": HUMAN + " d",
                                           "rejected": HUMAN + " e"},
    "Alpaca": {"instruction": "c", "input": "", "history": [["a", "b"]], "chosen": "d",
               "rejected": "e"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                   {"from": "human", "value": "c"}],
                 "chosen": {"from": "gpt", "value": "d"},
                 "rejected": {"from": "gpt", "value": "e"}},
}


@pytest.mark.parametrize("name", LONG_PAIRS)
def test_pair_of_each_form_gives_its_history_once_and_no_answer_in_it(name):
    row = data.parse_row("here", LONG_PAIRS[name])
    assert row == Row("here", TALK[:3], chosen=TALK[3:], rejected=[assistant("e")])


@pytest.mark.parametrize("name", PAIRS)
def test_pair_of_one_question_gives_it_and_two_answers(name):
    row = data.parse_row("here", PAIRS[name])
    assert row == Row("here", [HI], chosen=[YO], rejected=[NO])


def test_system_text_of_a_pair_is_kept_once_wherever_it_stands():
    both = {"chosen": [system("s"), HI, YO], "rejected": [system("s"), HI, NO]}
    bare = {"chosen": [HI, YO], "rejected": [HI, NO]}
    for row in (both, {**both, "prompt": "hi"}, {**both, "system": "s"}, {**bare, "system": "s"},
                {**both, "prompt": [system("s"), HI]}, {**bare, "prompt": [system("s"), HI]},
                {"system_prompt": "s", "question": "hi", "chosen": "yo", "rejected": "no"}):
        assert data.parse_row("here", row).messages == [system("s"), HI]


def test_conversations_of_a_pair_that_are_alike_share_all_but_the_last_answer():
    row = data.parse_row("here", {"chosen": [HI, YO], "rejected": [HI, YO]})
    assert (row.messages, row.chosen, row.rejected) == ([HI], [YO], [YO])


# -------------------------------------------------------------------------------------- refusals

QA = {"question": "q", "answer": "a"}
BAD_ROWS = {  # (row, words of the message)
    "no object": (5, "object"),
    "an answer beside raw text": ({"text": "q", "output": "a"}, "output beside 'text'"),
    "history beside raw text": ({"text": "q", "history": [["a", "b"]]}, "history beside 'text'"),
    "a completion beside raw text": ({"text": "q", "completion": "a"}, "completion beside 'text'"),
    "input below a conversation": ({"prompt": [HI, YO], "input": "x", "output": "o"},
                                   "'input' does not go on with the text of 'prompt'"),
    "weight of a preference": (
        {"prompt": "q", "chosen": [assistant("a", weight=0.5)], "rejected": "b"},
        "not read in the answers of a preference"),
    "weight of an unpaired preference": (
        {"messages": [HI, assistant("a", train=False)], "label": 1}, "of a preference"),
    "a question to be taught": ({"messages": [user("q", train=True), YO]}, "the user says"),
    "turns before whole conversations": (
        {"prompt": TALK[:3], "chosen": [HI, YO], "rejected": [HI, NO]}, "'prompt' says what"),
    "tools in a message": ({"messages": [{**system("s"), "tools": [TOOL]}, HI, YO]}, "'tools'"),
    "a call without a name": ({"messages": [HI, {
        "role": "assistant", "tool_calls": [{"function": {"name": None}}]}]}, "with a name"),
    "half of a surrogate pair in tools": (
        {**QA, "tools": [{"function": {"name": "f", "description": "\ud800"}}]}, "ud800"),
    "a weight beyond all numbers": ({"messages": [HI, assistant("a", weight=10**400)]}, "weight"),
    "unknown keys": ({"frage": "q", "antwort": "a"}, "the keys frage, antwort"),
    "no keys": ({}, "messages"),
    "an answer alone": ({"output": "a"}, "output"),
    "an answer alone, and an empty completion": ({"output": "a", "completion": ""}, "output"),
    "null answer": ({"instruction": "q", "output": None}, "output (null)"),
    "number as answer": ({"prompt": "q", "completion": 5}, "'completion': expected a text"),
    "number as text": ({"text": 5}, "'text': expected a text"),
    "null text": ({"text": None}, "text"),
    "number as question": ({"instruction": 5, "output": "a"}, "'instruction': expected a text"),
    "number as input": ({"instruction": "q", "input": 5, "output": "a"}, "'input': expected"),
    "half of a surrogate pair": ({"prompt": "q\ud800", "completion": "a"}, "ud800"),
    "history without pairs": ({**QA, "history": [["a"]]}, "'history'"),
    "number as history": ({**QA, "history": 5}, "'history'"),
    "no messages": ({"messages": []}, "found the keys messages"),
    "text as message": ({"messages": ["hi"]}, "'messages': expected messages or pairs"),
    "unknown role": ({"messages": [{"role": "judge", "content": "x"}]}, "judge"),
    "no role": ({"messages": [{"content": "x"}]}, "'role'"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, "a text under 'content'"),
    "picture in a content": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
    "train": ({"messages": [user("x", train="no")]}, "'messages': 'train': expected true or false"),
    "weight below 0": ({"messages": [user("x", weight=-1)]}, "'weight': expected a number"),
    "weight as text": ({"messages": [user("x", weight="1")]}, "'weight': expected a number"),
    "weight not finite": ({"messages": [user("x", weight=float("nan"))]}, "nan"),
    "weight that fp32 rounds to 0": ({"messages": [HI, assistant("x", weight=1e-320)]}, "1e-320"),
    "label as text": ({**QA, "label": "good"}, "'label': expected true"),
    "label 2": ({**QA, "label": 2}, "found 2"),
    "label of raw text": ({"text": "x", "label": 1}, "'label'"),
    "label of a pair": ({"prompt": "q", "chosen": "a", "rejected": "b", "label": 1}, "'label'"),
    "tools of another kind": ({**QA, "tools": "search"}, "'tools'"),
    "pair without rejected": ({"prompt": "q", "chosen": "a"}, "chosen and rejected"),
    "pair with a null": ({"prompt": "q", "chosen": "a", "rejected": None}, "chosen and rejected"),
    "pair with an empty answer": ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen"),
    "pair without prompt": ({"chosen": "a", "rejected": "b"}, "a prompt"),
    "pair with a system text only": ({"system": "s", "chosen": "a", "rejected": "b"}, "a prompt"),
    "pair without answers": ({"prompt": "q", "chosen": [HI], "rejected": [HI]}, "end with an"),
    "pair of unlike sides": ({"prompt": "q", "chosen": [HI, YO], "rejected": "b"}, "whole"),
    "pair after an answer": ({"messages": TALK, "chosen": "x", "rejected": "y"}, "of their own"),
    "two questions": ({**QA, "prompt": "p"}, "'prompt' and 'question'"),
    "two answers": ({**QA, "output": "b"}, "'output' and 'answer'"),
    "context beside messages": ({"messages": TALK, "context": "Paris"}, "'context'"),
    "another answer beside messages": ({"messages": TALK, "answer": "Paris"}, "'answer'"),
    "text that a question is about": ({**QA, "text": "Paris"}, "'text'"),
    "another system text beside a pair": (
        {"system": "x", "chosen": [system("s"), HI, YO], "rejected": [system("s"), HI, NO]},
        "'system'"),
    "pictures": ({**QA, "images": ["a.png"]}, "'images'"),
    "picture in a message": ({"messages": [user("q", images=["a.png"]), YO]}, "'images'"),
    "mask": ({**QA, "loss_mask": [0, 1]}, "'loss_mask'"),
    "weight of a row": ({**QA, "weight": 2.0}, "'weight'"),
    "a row that is not to be trained": ({**QA, "images": [], "train": False}, "'train'"),
    "reasoning of a row": ({**QA, "reasoning": "hm"}, "'reasoning'"),
    "token ids": ({"input_ids": [1], "labels": [1], "text": "x"}, "'input_ids'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_refused_by_file_and_line_with_the_key_it_is_about(name, tmp_path):
    row, said = BAD_ROWS[name]
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, row)
    with pytest.raises(InputError) as error:
        parsed(path)
    assert str(error.value).startswith(f"{path} line 2: ") and "\n" not in str(error.value)
    assert said in str(error.value)


def test_keys_that_carry_nothing_are_named_once_per_file(tmp_path, capsys):
    row = {**QA, "source": "web", "id": 1, "empty": None}
    path = jsonl(tmp_path / "a.jsonl", row, row, {"messages": [user("q", time=3), YO]})
    parsed(path)
    assert capsys.readouterr().out == f"{path}: not used: id, source, time\n"
    parsed(path, quiet=True)
    parsed(jsonl(tmp_path / "b.jsonl", QA))
    assert capsys.readouterr().out == ""


def test_skip_bad_rows_leaves_out_counts_and_lists_them(tmp_path, letters, capsys):
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"}, 5, {"text": 7}, {"text": "two"})
    with open(path, "ab") as file:
        file.write(b'{oops}\n{"text": "caf\xe9"}\n')
    rows = parsed(path, skip_bad_rows=True)
    assert [row and row.text for row in rows] == ["one", None, None, "two", None, None]
    lines = capsys.readouterr().out.splitlines()
    assert [s.split(": ")[0] for s in lines] == [f"dropped {path} line {n}" for n in (2, 3, 5, 6)]
    assert parsed(path, skip_bad_rows=True, quiet=True) == rows and not capsys.readouterr().out
    examples, counts = data.load_examples([path], letters, skip_bad_rows=True)
    assert len(examples) == 2 and counts["dropped: bad row"] == 4


def test_skipped_rows_are_listed_where_the_output_is_no_terminal(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"}, 5)
    status, out, err = command("data.py", "show", path, "--skip_bad_rows")
    assert status == 0 and f"{path} line 2" in out + err


def test_preference_rows_are_refused_by_the_loader_of_sft(tmp_path, letters):
    for row in (PAIRS["prompt and strings"], {"messages": [HI, YO], "label": True}):
        with pytest.raises(InputError, match=r"a.jsonl line 1: .*train_dpo.py"):
            data.load_examples([jsonl(tmp_path / "a.jsonl", row)], letters)


# ----------------------------------------------------------------------------------------- files

LINES = '{"prompt": "hi", "completion": "yo"}\n\n  \n{"text": "é中"}\r\n'
LIST = '\n [{"prompt": "hi", "completion": "yo"},\n {"text": "é中"}]'
FILES = {
    "a.jsonl": LINES, "a.ndjson": LINES, "lines.json": LINES, "list.json": LIST,
    "list.jsonl": LIST, "list in a line.jsonl": LIST.replace("\n", ""), "a.jsonl.gz": LINES,
    "list.json.gz": LIST, "lines.json.gz": LINES,
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("name", FILES)
def test_lists_and_lines_are_read_under_any_name_gzipped_or_not_with_bom_or_without(
    name, mark, tmp_path
):
    content = mark + FILES[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = parsed(tmp_path / name)
    assert [(row.messages, row.text) for row in rows] == [([HI, YO], None), ([], "é中")]
    numbers = ["row 1", "row 2"] if "list" in name else ["line 1", "line 4"]
    assert [row.where for row in rows] == [f"{tmp_path / name} {number}" for number in numbers]


def test_lines_that_are_lists_of_messages_are_a_conversation_each(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [HI, YO], [HI, NO])
    assert [row.messages for row in parsed(path)] == [[HI, YO], [HI, NO]]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_file_is_raw_text_a_line_without_empty_lines(name, tmp_path):
    content = "\ufeffone é\n\n {two}\t\r\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [row.text for row in parsed(tmp_path / name)] == ["one é", " {two}\t"]


PACKED = gzip.compress(LINES.encode() * 100)
BAD_FILES = {
    "bad line.jsonl": (b'{"text": "a"}\n\n{oops}\n', "line 3: not JSON"),
    "cut line.jsonl": (b'{"text": "a"}\n{"text":\n\n{"text": "b"}', "line 2: not JSON"),
    "bad list.json": (b'[{"text": "a"},\n{oops}]', "line 2: not JSON"),
    "bad list below blank lines.json": (b'\n\n[\n{"text": "a"},\n{oops}]', "line 5: not JSON"),
    "bad list.jsonl": (b'[\n{"text": "a"},\n{oops}]', "line 3: not JSON"),
    "text.json": (b'"abc"', "object"),
    "table.csv": (b"a,b", ".jsonl"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', "line 2: byte 0xff is not UTF-8"),
    "latin.json": (b'[{"text": "a"},\n{"text": "\xff"}]', "line 2: byte 0xff is not UTF-8"),
    "latin.txt": (b"a\ncaf\xe9", "line 2: byte 0xe9 is not UTF-8: convert the file with iconv"),
    "truncated.jsonl.gz": (PACKED[:-20], "ended before the end"),
    "corrupt.jsonl.gz": (PACKED[:20] + b"\xff" * 20 + PACKED[40:], "cannot be read"),
    "not packed.jsonl.gz": (b'{"text": "a"}', "gzip"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, "line 1"),
    "long number.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1"),
    "empty.jsonl": (b"\n\n", "no row"),
    "empty.json": (b"", ""),
    "empty list.json": (b"[]", "no row"),
    "empty.txt": (b"", "no row"),
    "empty.jsonl.gz": (gzip.compress(b""), "no row"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_name_and_what_was_found(name, tmp_path, letters):
    content, said = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        data.load_examples([str(tmp_path / name)], letters)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    assert said in str(error.value)


def test_missing_file_and_directory_are_refused_with_their_name(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json does not exist"):
        parsed(tmp_path / "nowhere.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder\.json is not a file"):
        parsed(tmp_path / "folder.json")
