"""labs/exam_rows.py: questions as conversations."""

import pytest
from conftest import command, jsonl, run_lab, write_exam

WANJUAN = {"q_type": "单选题", "q_main": "油锅着火怎么办( )", "option_a": "盖上锅盖",
           "option_b": "用水", "option_c": "开窗", "option_d": "逃跑", "option_e": "",
           "std_ans": "A",
           "answer_detail": "盖上锅盖可以隔绝空气，故A正确。\n故选：A．\n谢谢"}
CHOICE = "油锅着火怎么办( )\nA. 盖上锅盖\nB. 用水\nC. 开窗\nD. 逃跑\n"


def conversation(row):
    """(prompt, answer) of a row of one turn."""
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    return tuple(m["content"] for m in row["messages"])


def test_exam_formats_are_those_of_steel_llm_to_the_character(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", WANJUAN)
    (first,), _ = run_lab("exam_rows", [path])
    assert conversation(first) == (f"以下是一道单选题:\n{CHOICE}请给出答案。\n",
                                   "A。盖上锅盖可以隔绝空气，故A正确。\n故选：A．\n谢谢")
    (last,), _ = run_lab("exam_rows", [path], "--style", "explanation_first")
    assert conversation(last) == (f"以下是一道单选题:\n{CHOICE}请先给出解释再给出答案。\n",
                                  "盖上锅盖可以隔绝空气，故A正确。\n答案为A")


def test_short_or_missing_explanations_fall_back_to_answer_first(tmp_path):
    rows = [{**WANJUAN, "answer_detail": "九个字的解释不够长"},
            {**WANJUAN, "answer_detail": "十个字的解释正好够长"}, {**WANJUAN, "std_ans": ""},
            {**WANJUAN, "std_ans": "", "answer_detail": None}]
    assert [len(r["answer_detail"] or "") for r in rows[:2]] == [9, 10]
    kept, out = run_lab("exam_rows", [jsonl(tmp_path / "a.jsonl", *rows)], "--style",
                    "explanation_first")
    assert [conversation(r)[1] for r in kept] == [
        "A。九个字的解释不够长", "十个字的解释正好够长答案为A", WANJUAN["answer_detail"]]
    assert "请给出答案" in conversation(kept[0])[0] and "请给出答案" in conversation(kept[2])[0]
    assert "dropped 1: no answer" in out


def test_elided_rows_are_dropped_and_the_arms_hold_the_same_questions(tmp_path):
    rows = [WANJUAN, {**WANJUAN, "answer_detail": "解：略。"}, {**WANJUAN, "answer_detail": ""}]
    arms = {}
    for style in ("answer_first", "explanation_first", "answer_only"):
        arms[style], out = run_lab("exam_rows", [jsonl(tmp_path / "a.jsonl", *rows)], "--style",
                                   style, output=tmp_path / f"{style}.jsonl")
        assert len(arms[style]) == 2 and "dropped 1: elided: has 略" in out
    assert [conversation(row)[1] for row in arms["answer_only"]] == ["A。", "A。"]
    for first, only in zip(arms["answer_first"], arms["answer_only"], strict=True):
        assert conversation(first)[0] == conversation(only)[0]


def test_exam_files_are_read_only_behind_the_flag_that_names_the_harm(tmp_path):
    write_exam(tmp_path)
    path, out = tmp_path / "val/law_val.csv", tmp_path / "o.jsonl"
    status, _, err = command("labs/exam_rows.py", path, "--output", out)
    assert status == 2 and "contaminates" in err and "--from_exam" in err and not out.exists()
    status, text, _ = command("labs/exam_rows.py", "--help")
    assert "CONTAMINATES" in text and "see above" not in text and "pairs" not in text
    kept, _ = run_lab("exam_rows", [path], "--from_exam")
    assert len(kept) == 10 and all(conversation(row)[1] == "B。" for row in kept)


def test_mmlu_files_have_no_line_of_names_and_cmmlu_ones_an_index(tmp_path):
    mmlu, cmmlu = tmp_path / "law_test.csv", tmp_path / "agronomy.csv"
    mmlu.write_text('"Why, ""so""?",w,x,y,z,C\n', encoding="utf-8")
    cmmlu.write_text(",Question,A,B,C,D,Answer\n0,为何,甲,乙,丙,丁,D\n", encoding="utf-8-sig")
    (one, two), _ = run_lab("exam_rows", [mmlu, cmmlu], "--from_exam", output=tmp_path / "o.jsonl")
    assert conversation(one)[0].startswith('以下是一道单选题:\nWhy, "so"?\nA. w\n')
    assert conversation(one)[1] == "C。" and conversation(two)[1] == "D。"


@pytest.mark.parametrize("row", [
    {**WANJUAN, "std_ans": "F"}, {**WANJUAN, "q_main": ""}, {"q_main": "q", "option_a": "one"},
    {**WANJUAN, "option_b": ["list"]}, ["no object"]])
def test_a_broken_question_is_named(tmp_path, row):
    path, out = jsonl(tmp_path / "a.jsonl", WANJUAN, row), tmp_path / "o.jsonl"
    status, _, err = command("labs/exam_rows.py", path, "--output", out)
    assert status == 2 and "a.jsonl line 2: expected a question" in err and not out.exists()
    kept, text = run_lab("exam_rows", [path], "--skip_bad_rows")
    assert len(kept) == 1 and "dropped 1: bad row" in text and "dropped " + path in text


def test_a_short_line_of_an_exam_file_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,question,A,B,C,D,answer\n0,q,w,x,y,z,A\n1,q,w,x\n", encoding="utf-8")
    status, _, err = command("labs/exam_rows.py", path, "--from_exam", "--output",
                             tmp_path / "o.jsonl")
    assert status == 2 and "a.csv row 2: expected" in err
