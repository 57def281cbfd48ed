"""labs/rewards.py: what a reward thinks of some samples."""

import pytest
from conftest import asked, command, jsonl

from labs import rewards
from model import InputError


def test_a_reward_is_summed_up_by_prompt(tmp_path):
    rows = [asked(q, a, reference="yes") for q, a in (
        ("p", "yes"), ("p", "no"), ("p", " yes "), ("q", "no"), ("q", "no"), ("r", "yes"))]
    status, out, _ = command("labs/rewards.py", jsonl(tmp_path / "a.jsonl", *rows))
    assert status == 0 and out.splitlines()[-1].split() == ["3", "6", "0.500", "0.667", "2"]


def test_prompts_are_one_if_they_say_and_call_the_same():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    other = {**call, "tool_calls": [{"function": {"name": "sub"}}]}
    question = {"role": "user", "content": "3 and 4"}
    keys = [rewards.prompt_key([question, message])
            for message in (call, other, {**call, "weight": 0.0})]
    assert keys[0] == keys[2] != keys[1]
    assert rewards.prompt_key([question, call], [call["tool_calls"]]) != keys[0]


def test_an_exam_answer_counts_by_its_letter_and_another_one_as_a_whole():
    assert rewards.find_reward("exam")([], "答案是B。", "B") == 1
    assert rewards.find_reward("match")([], "答案是B。", "B") == 0
    assert rewards.find_reward("exam")([], "不知道", "B") == 0


def test_a_function_of_a_file_is_a_reward_and_anything_else_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def length(messages, answer, reference):\n    return len(answer)\n")
    assert rewards.find_reward(f"{path}:length")([], "four", "") == 4
    for name in ("best", f"{path}:other", "none.py:length"):
        with pytest.raises(InputError, match="--reward: "):
            rewards.find_reward(name)
    path.write_text("import numpy\ndef half(*_):\n    return numpy.float32(0.5)\n")
    assert rewards.find_reward(f"{path}:half")([], "", "") == 0.5


@pytest.mark.parametrize("body,words", [
    ("raise KeyError('x')", "line 2: KeyError: 'x'"), ("raise IOError('a\\nb')", "OSError: a b"),
    ("raise SystemExit(3)", "SystemExit: 3"), ("return None", "a finite number, found None"),
    ("return '1'", "a finite number, found '1'"), ("return float('nan')", "number, found nan"),
    ("return float('inf')", "finite number, found inf"), ("return [1.0]", "number, found [1.0]")])
def test_what_a_reward_does_wrong_is_told_in_one_line_with_the_row(tmp_path, body, words):
    (tmp_path / "mine.py").write_text(f"def f(messages, answer, reference):\n    {body}\n")
    name, path = f"{tmp_path / 'mine.py'}:f", jsonl(tmp_path / "a.jsonl", asked("p", "a"))
    status, _, err = command("labs/rewards.py", path, "--reward", name)
    assert status == 2 and err.count("\n") == 1
    assert f"--reward {name}, {path} line 1: " in err and words in err


@pytest.mark.parametrize("text,words", [
    ("def f(messages, answer):\n    return 1\n", "TypeError: f() takes 2 positional arguments"),
    ("def f(:\n", "SyntaxError: "), ("\nimport nowhere_at_all\n", "line 2: ModuleNotFoundError: "),
    ("import sys\nsys.exit(0)\n", "SystemExit: 0"), ("f = 1\n", "has no function 'f'")])
def test_a_file_that_holds_no_reward_is_named_in_one_line(tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    path = jsonl(tmp_path / "a.jsonl", asked("p", "a"))
    status, _, err = command("labs/rewards.py", path, "--reward", f"{tmp_path / 'mine.py'}:f")
    assert status == 2 and err.count("\n") == 1
    assert f"{tmp_path / 'mine.py'}" in err and words in err


@pytest.mark.parametrize("name,reference", [
    ("match", None), ("match", " "), ("final", None), ("final", "<think>B"), ("exam", None),
    ("exam", "no letter")])
def test_a_row_that_has_nothing_to_compare_with_is_refused(tmp_path, name, reference):
    """An empty answer would be like it."""
    path = jsonl(tmp_path / "a.jsonl", asked("p", "", reference=reference))
    status, _, err = command("labs/rewards.py", path, "--reward", name)
    assert status == 2 and err.count("\n") == 1
    assert f"--reward {name}, {path} line 1: the row has no reference" in err


@pytest.mark.parametrize("reference", [4, ["4"], False, 0, "\ud800"])
def test_a_reference_that_is_no_text_is_refused_in_one_line(tmp_path, reference):
    path = jsonl(tmp_path / "a.jsonl", asked("p", "4", reference=reference))
    for script, more in (("rewards", []), ("pairs", ["--output", tmp_path / "o.jsonl"]), (
            "filter", ["--output", tmp_path / "o.jsonl", "--known", path, "--min_known", 0.1])):
        status, _, err = command(f"labs/{script}.py", path, *more)
        assert status == 2 and err.count("\n") == 1
        assert "a.jsonl line 1: `reference` is no text" in err


def test_a_row_without_an_answer_is_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    status, _, err = command("labs/rewards.py", path)
    assert status == 2 and "line 1: expected a question and an answer" in err
    path = jsonl(tmp_path / "list.jsonl", [{"role": "user", "content": "q"},
                                           {"role": "assistant", "content": "a"}])
    status, _, err = command("labs/rewards.py", path)
    assert status == 2 and "line 1: expected a question and an answer" in err
