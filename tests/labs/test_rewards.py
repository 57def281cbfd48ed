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


def test_an_exam_answer_counts_by_its_letter_and_another_one_as_a_whole():
    assert rewards.find_reward("exam")([], "答案是B。", "B") == 1
    assert rewards.find_reward("match")([], "答案是B。", "B") == 0
    assert rewards.find_reward("exam")([], "不知道", "B") == 0


@pytest.mark.parametrize("name", ["match", "exam", "final"])
def test_a_row_without_a_reference_is_refused_where_one_is_compared(name, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", asked("q", "a"))
    status, out, err = command("labs/rewards.py", path, "--reward", name)
    assert (status, out) == (2, "") and f"--reward {name}: a row has no reference" in err


def test_a_function_of_a_file_is_a_reward_and_anything_else_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def length(messages, answer, reference):\n    return len(answer)\n")
    assert rewards.find_reward(f"{path}:length")([], "four", "") == 4
    for name in ("best", f"{path}:other", "none.py:length"):
        with pytest.raises(InputError, match="--reward: "):
            rewards.find_reward(name)


def test_a_row_without_an_answer_is_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    status, _, err = command("labs/rewards.py", path)
    assert status == 2 and "line 1: expected a question and an answer" in err
    path = jsonl(tmp_path / "list.jsonl", [{"role": "user", "content": "q"},
                                           {"role": "assistant", "content": "a"}])
    status, _, err = command("labs/rewards.py", path)
    assert status == 2 and "line 1: expected a question and an answer" in err
