"""Ghost attention: what is sampled, what is trained, and the demo's rows."""

import json
from collections import Counter

import families
import pytest
from conftest import assistant, command, jsonl, read, user

import data
import model as modeling
from labs import ghost

QUESTIONS = ["q1", "q2", "q3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of which every third token ends an answer."""
    folder = tmp_path_factory.mktemp("ghost")
    families.make_checkpoint(folder / "base", "smollm2")
    stops = list(range(0, data.ChatTokenizer(folder / "base").tokenizer.get_vocab_size(), 3))
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


def test_instruction_stands_before_every_question_when_sampling():
    found = ghost.talk_of(QUESTIONS, ["a1", "a2"], "S", every=True)
    assert found == [user("S\nq1"), assistant("a1"), user("S\nq2"), assistant("a2"),
                     user("S\nq3")]


def test_instruction_stands_before_the_first_question_when_training():
    found = ghost.ghost_row(QUESTIONS, ["a1", "a2", "a3"], "S")["messages"]
    assert [m["content"] for m in found] == ["S\nq1", "a1", "q2", "a2", "q3", "a3"]


def test_loss_is_on_the_last_answer_alone(letters):
    row = data.parse_row("here", ghost.ghost_row(QUESTIONS, ["a1", "a2", "a3"], "S"))
    (example,) = data.to_examples([row], 0, Counter(), letters)
    (start, end, weight), = example.spans
    assert letters.decode(example.ids[start:end]) == "a3<|im_end|>" and weight == 1


def test_each_answer_is_generated_after_the_answers_before_it(folder):
    model, tokenizer = modeling.load(folder / "base"), data.ChatTokenizer(folder / "base")
    c = ghost.Config(files=["x"], max_new_tokens=40)
    talks = [["the sea", "moon", "光"], ["a b"], ["people", "on the moon"]]
    found = ghost.answer_talks(model, tokenizer, talks, ["S", "T", "S"], c)
    assert [len(answers) for answers in found] == [3, 1, 2]
    for questions, system, answers in zip(talks, ["S", "T", "S"], found, strict=True):
        for turn, answer in enumerate(answers):
            prompt = ghost.talk_of(questions[: turn + 1], answers[:turn], system, True)
            ids = modeling.generate(model, [tokenizer.prompt_ids(prompt)], 40,
                                    stop_ids=tokenizer.stop_ids)[0]
            assert answer == tokenizer.decode(ids[:-1])


def test_talk_with_an_unfinished_answer_is_dropped_and_counted(folder, tmp_path):
    path = jsonl(tmp_path / "talks.jsonl", *[
        {"messages": [user(f"{a} sea"), assistant("x"), user("moon"), assistant("y")]}
        for a in "abcdefgh"], {"messages": [user("alone"), assistant("x")]})
    status, out, err = command(
        "labs/ghost.py", path, "--model", folder / "base", "--output", tmp_path / "rows.jsonl",
        "--max_new_tokens", 2, "--temperature", 1, "--system", "S")
    assert status == 0, err
    rows = read(tmp_path / "rows.jsonl")
    assert 0 < len(rows) < 8 and "an answer that did not end" in out
    for row in rows:
        assert [m.get("train", True) for m in row["messages"]] == [True, False, True, True]
        assert row["messages"][0]["content"].startswith("S\n")


def test_report_says_by_turn_what_was_obeyed(folder, tmp_path):
    (tmp_path / "r.py").write_text("def late(messages, answer, system):\n"
                                   "    return float(len(messages) > 2 and system == 'S')\n"
                                   "def count(messages, answer, system):\n"
                                   "    return 161 - len(messages) // 2\n")
    path = jsonl(tmp_path / "t.jsonl", {"messages": [user("a"), assistant("x"), user("b")]},
                 {"messages": [user("c"), assistant("x")]})
    for name, first, second in (("late", "0.0%", "100.0%"), ("count", "161.000", "160.000")):
        status, out, err = command(
            "labs/ghost.py", path, "--model", folder / "base", "--first_only", "--reward",
            f"{tmp_path / 'r.py'}:{name}", "--system", "S", "--max_new_tokens", 60)
        assert status == 0, err
        assert [line.split() for line in out.splitlines()] == [
            ["turn", "talks", "obeyed"], ["1", "2", first], ["2", "1", second]]


def test_demo_rows_obey_what_stands_right_before_a_question(tmp_path, capsys):
    fact = "“法国”的首都是“巴黎”。"
    talk = {"messages": [user("“法国”的首都是什么？"), assistant("您好！" + fact)]}
    for name in ("instructions", "instructions_val"):
        jsonl(tmp_path / f"{name}.jsonl", *[talk] * 8)
    ghost.make_demo(tmp_path / "out", tmp_path)
    told = {system: 0 for system in ghost.OPENINGS}
    for row in read(tmp_path / "out" / "obey.jsonl"):
        for asked, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            for system in told:
                if asked["content"].startswith(system):
                    told[system] += 1
                    assert ghost.obeys([], answer["content"], system) == 1
    assert min(told.values()) > 300
    assert all(len(row["messages"]) == 8 for row in read(tmp_path / "out" / "val.jsonl"))


@pytest.mark.parametrize("flags,words", [
    ([], "--model DIR is missing"), (["--model", "base"], "give --output to write rows"),
    (["--model", "base", "--first_only", "--output", "x.jsonl"], "give --output to write rows"),
    (["--model", "base", "--first_only", "--reward", f"{ghost.__file__}:obeys", "--system", "S"],
     "obeys knows 请礼貌地回答。 and 请不客气地回答。 alone, not the --system 'S'"),
    (["--model", "base", "--first_only", "--reward", "none.py:f"], "none.py:f"),
    (["--model", "base", "--output", "x.txt"], "--output must be given as FILE.jsonl"),
    (["--model", "base", "--output", "x.jsonl", "--max_new_tokens", 0], "--max_new_tokens")])
def test_bad_flags_end_with_one_line(tmp_path, flags, words):
    path = jsonl(tmp_path / "t.jsonl", {"messages": [user("a"), assistant("x")]})
    status, _, error = command("labs/ghost.py", path, *flags)
    assert status == 2 and words in error and error.count("\n") == 1, error
