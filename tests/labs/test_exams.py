"""What labs/exams.py adds: MMLU, protocols, answers in words, checkpoints that reason."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import REPO, SHARED, command, jsonl, read, train
from exam_files import (
    asked,
    exam,
    first_prompt,
    make_constant,
    make_model,
    write_ceval,
    write_cmmlu,
    write_csv,
    write_mmlu,
)
from families import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import data
import eval as evaluation
import model as modeling
from labs import exams


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: exams ceval, cmmlu, mmlu; checkpoints one, D."""
    folder = tmp_path_factory.mktemp("exam")
    write_ceval(folder / "ceval")
    write_cmmlu(folder / "cmmlu")
    write_mmlu(folder / "mmlu")
    make_model(folder / "one")
    make_constant(folder / "D", folder / "one", "D")
    return folder


# --------------------------------------------------------------------------- protocols and subjects

# the last of law's three questions, and the two solved ones before it
Q = " law val 第2题长长____。\nA. A2选\nB. B2选\nC. C2选\nD. D2选"
S = (" law dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选",
     " law dev 第1题长____。\nA. A1选\nB. B1选\nC. C1选\nD. D1选")
T = " agronomy test 第5题长长长长长____。\nA. A5选\nB. B5选\nC. C5选\nD. D5选"
D = " agronomy dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选"
M = " abstract_algebra test 第5题长长长长长____。\nA. A5选\nB. B5选\nC. C5选\nD. D5选"
N = " abstract_algebra dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选"
HEAD = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
ALGEBRA = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
PROMPTS = {
    ("qwen", "ceval"):
        f"问题：{S[0]}\n答案：A\n\n问题：{S[1]}\n答案：C\n\n问题：{Q}\n答案：",
    ("cot", "ceval"):
        f"{HEAD}{S[0]}\n答案：让我们一步一步思考，\n1. 因为0。\r\n2. 所以。\n所以答案是A。\n\n"
        f"{S[1]}\n答案：让我们一步一步思考，\n1. 因为1。\r\n2. 所以。\n所以答案是C。\n\n"
        f"{Q}\n答案：让我们一步一步思考，\n1.",
    ("steel", "ceval"):
        "<|im_start|>user\n以下是一道单选题:\n law val 第2题长长____。\n\nA. A2选\nB. B2选\n"
        "C. C2选\nD. D2选\n请给出答案。\n<|im_end|>\n<|im_start|>assistant\n",
    ("qwen", "cmmlu"): f"问题：{D}\n答案：A\n\n问题：{T}\n答案：",
    ("official", "mmlu"):
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        f"{N}\nAnswer: A\n\n{M}\nAnswer:",
    ("lm_eval", "mmlu"): f"{ALGEBRA}{N[1:]}\nAnswer: A\n\n{M[1:]}\nAnswer:",
    ("qwen", "mmlu"): f"{ALGEBRA}Question: {N}\nAnswer: A\n\nQuestion: {M}\nAnswer:",
}


@pytest.mark.parametrize("protocol,suite", PROMPTS)
def test_prompts_of_the_other_protocols_to_the_character(protocol, suite, place):
    shots = 0 if protocol == "steel" else {"ceval": 2}.get(suite, 1)
    found = first_prompt(data.ChatTokenizer(place / "one"), place / suite,
                         0 if suite == "mmlu" else 1, protocol=protocol, shots=shots)
    assert found == PROMPTS[protocol, suite]


def test_no_scored_prompt_ends_in_white_space_which_lm_eval_would_move():
    table = {name: dict(row) for name, row in evaluation.PROTOCOLS.items()}
    exams.add_protocols(table)
    assert {(name, suite) for name, row in table.items() for suite in row} == {
        *PROMPTS, ("steel", "cmmlu"), *((name, exam) for name in ("official", "lm_eval")
                                        for exam in ("ceval", "cmmlu"))}
    for name, row in table.items():
        for benchmark, p in row.items():
            end = p.ending + p.begin
            assert end == end.rstrip() or name == "steel", (name, benchmark)


def test_turns_of_a_chat_begin_without_a_space_and_hold_explanations(place):
    tokenizer = data.ChatTokenizer(place / "one")
    user, assistant = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n"
    found = first_prompt(tokenizer, place / "mmlu", 0, shots=1, chat=True, protocol="lm_eval")
    assert assistant.format("A") in found
    found = first_prompt(tokenizer, place / "ceval", 1, shots=1, chat=True, protocol="cot")
    assert found == (
        user.format(f"{HEAD}{S[0]}\n答案：")
        + assistant.format("让我们一步一步思考，\n1. 因为0。\r\n2. 所以。\n所以答案是A。")
        + user.format(f"{Q}\n答案：") + "<|im_start|>assistant\n")


@pytest.mark.parametrize("suite,sizes,handle,name,category", [
    ("mmlu", [19, 12, 13, 13], "us_foreign_policy", "us foreign policy", "Social Science"),
    ("cmmlu", [17, 22, 13, 15], "college_engineering_hydrology", "大学工程水文学", "STEM")])
def test_subjects_have_names_and_one_of_four_categories(
        suite, sizes, handle, name, category):
    table = exams.named_subjects(suite)
    found = Counter(category for _, category in table.values())
    assert [found[c] for c in evaluation.CATEGORIES] == sizes
    assert table[handle] == (name, category)


@pytest.mark.skipif(not (SHARED / "data/ceval").exists(), reason="needs C-Eval in ../shared")
def test_the_table_for_folders_without_a_mapping_is_that_of_c_eval():
    mapping = modeling.read_json(SHARED / "data/ceval/subject_mapping.json")
    assert exams.named_subjects("ceval") == {
        handle: (name, category) for handle, (_, name, category) in mapping.items()}


def test_mmlu_is_read_without_header_and_scores_a_letter_with_its_space(place, tmp_path):
    """After "Answer:" a byte model says a space first, whatever it answers: next token fails."""
    flags = ["--model", place / "one", "--data", place / "mmlu", "--shots", 5]
    results, predictions, out = exam(tmp_path / "out", *flags, "--protocol", "lm_eval")
    assert results["benchmark"] == "mmlu" and results["questions"] == 12
    assert [a["id"] for a in predictions[:6]] == list("012345")
    assert "12 questions in 2 of 57 subjects" in out
    byte = data.ChatTokenizer(place / "one").tokenizer.token_to_id
    assert str([[byte("Ġ"), byte(x)] for x in "ABCD"]) in out
    status, _, err = command("eval.py", "exam", *flags, "--output_dir", tmp_path / "official")
    assert status == 2 and "--protocol lm_eval" in err and not (tmp_path / "official").exists()


RUNS = """
import json, runpy, sys
for flags in json.loads(sys.argv[1]):
    sys.argv = ["eval.py", "exam", *flags]
    try:
        runpy.run_path("eval.py", run_name="__main__")
        print("status 0")
    except SystemExit as error:
        print("status", error.code)
"""


def test_without_the_lab_the_core_scores_and_says_what_needs_it(place, tmp_path):
    """Runs in a process of their own, in a folder that holds the core alone."""
    for name in ("model.py", "data.py", "eval.py"):
        (tmp_path / name).write_bytes((REPO / name).read_bytes())
    runs = [["--data", "cmmlu", "--subject_names", "handle"], ["--data", "ceval"],
            ["--data", "cmmlu"], ["--data", "mmlu"], ["--data", "ceval", "--protocol", "cot"]]
    for flags in runs:
        flags[1] = str(place / flags[1])
        flags += ["--model", str(place / "D")]
    done = subprocess.run([sys.executable, "-u", "-c", RUNS, json.dumps(runs)], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    by_file, own_names, *refused = re.split(r"status (\d)\n", done.stdout)[:-1:2]

    # C-Eval's folder brings names; CMMLU's files are named after their subjects.
    assert re.findall(r"status (\d)", done.stdout) == ["0", "0", "2", "2", "2"]
    assert "D: 4 of 12 questions right" in by_file
    assert "以下是关于agronomy的单项选择题" in by_file and "中国关于注册会计师" in own_names
    for said in refused:
        assert said.count("\n") == 1 and "labs/exams.py" in said


# --------------------------------------------------------------------------------- answers in words

ANSWERS = {
    "…\n所以答案是C。": "C", "所以答案是选项B。": "B", "所以答案是A、C。": None,
    "所以答案是BD。": None, "可以选A或B": None,
    "所以答案是（D）。": "D", "因此答案为B": "B", "答案：A": "A", "答案是：D，因为A不对": "D",
    "正确答案应该是C": "C", "故选D。": "D", "我选择 B": "B", "应选A、B": None, "不选A": None,
    "选项A不正确，所以答案是B。": "B", "选项A错误": None, "B选项是正确的": "B", "C符合题意": "C",
    "The answer is B.": "B", "Answer: (C)": "C", "D": "D", "A. 增量预算": "A", "(B) 零基": "B",
    "DNA复制": None, "Apple": None, "我不知道": None, "": None, "ABCD": None, "DDDD": "D",
    "所以答案是错误的。我选C": "C", "A和B都有可能": None, "选项A和B都不对，选C": "C",
    "选项A：描述的是光合作用，不符合。选项C：正确描述。故选C。": "C",
    "考虑选项D，其值为3。综上，应选择B。": "B", "首先看选项A，它错误。再看选项B，它正确。": None,
    "正确答案是 **B**。": "B", "答案：**B**": "B", "**B**": "B", "正确答案是“B”。": "B",
}


@pytest.mark.parametrize("text", ANSWERS)
def test_letter_is_extracted_or_the_answer_is_invalid(text):
    assert exams.extract(text) == ANSWERS[text]


def test_generated_answers_without_a_letter_are_invalid_and_wrong(place, monkeypatch):
    texts = iter(["所以答案是A。", "不知道", "选C", "A和B都有可能"] * 9)
    monkeypatch.setattr(modeling, "generate",
                        lambda model, prompts, count, stop_ids: [[0]] * len(prompts))
    monkeypatch.setattr(data.ChatTokenizer, "decode",
                        lambda self, ids, special=True: next(texts) if ids == [0] else "")
    c, subjects, p = asked(place / "ceval", protocol="cot", shots=1)
    tokenizer, answers = data.ChatTokenizer(place / "one"), []
    for subject in subjects:
        sheet = evaluation.make_sheet(tokenizer, subject, c, 4096)
        answers += evaluation.answer_sheet(None, tokenizer, sheet, 8192)
    assert {a["text"]: a["prediction"] for a in answers} == {
        "所以答案是A。": "A", "不知道": None, "选C": "C", "A和B都有可能": None}
    results = evaluation.summarize("ceval", subjects, answers)
    assert results["invalid"] == sum(a["prediction"] is None for a in answers) / 19 > 0.4
    assert results["correct"] == sum(a["prediction"] == a["answer"] for a in answers)


@pytest.mark.parametrize("protocol,shots,tokens", [("cot", 5, 512), ("steel", 0, 64)])
def test_answers_in_words_of_a_model_that_says_d(protocol, shots, tokens, place, tmp_path):
    results, predictions, out = exam(
        tmp_path / "out", "--model", place / "D", "--data", place / "ceval", "--protocol", protocol,
        "--subjects", "law")
    assert results["letters"]["D"] == 1 and results["shots"] == shots
    assert all(a["text"] == "D" * tokens and a["logprobs"] is None for a in predictions)
    assert results["chat"] == (protocol == "steel")
    # the first prompt is printed with its line ends visible
    assert protocol == "steel" or "因为0。\\r\\n\n2. 所以。\\n\n所以答案是A。\\n\n\\n\n" in out
    assert out.index("law val 第0题") < out.index("accuracy in %")


# ----------------------------------------------------------------------- checkpoints that reason


def write_quiz(folder):
    """Twelve questions of one subject in C-Eval's layout: their rows."""
    table = [{"id": str(i), "question": f"{'甲乙丙丁戊己庚辛壬癸子丑'[i]}？", "A": "1", "B": "2",
              "C": "3", "D": "4", "answer": "ABDCBADCCDAB"[i]} for i in range(12)]
    write_csv(folder / "val/law_val.csv", [list(table[0]), *(list(q.values()) for q in table)])
    (folder / "subject_mapping.json").write_text('{"law": ["Law", "法学", "Humanities"]}')
    return table


@pytest.mark.parametrize("thought", ["", "B不对，不选C，看A。"])
def test_training_exam_and_filter_agree_with_what_a_checkpoint_of_qwen3_generates(
        thought, tmp_path):
    """It learns twelve answers by heart, behind an empty block of reasoning or a full one.

    The letter was looked for where the block belongs, and letters within the block counted: such a
    checkpoint had 12 of 12 right in what it generated, and a score of 41.7%.
    """
    table = write_quiz(tmp_path / "quiz")
    form = exams.CEVAL.format(subject="法学") + "{question}" + exams.FOUR + "\n答案："
    block = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    rows = [{"prompt": form.format(**q), "completion": block + q["answer"]} for q in table]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    tokenizer = make_tokenizer(tmp_path / "base", "qwen3")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
        initializer_range=0.1, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"))).save_pretrained(tmp_path / "base")

    records, _ = train(
        tmp_path, "run", "--model", tmp_path / "base", "--data", path, "--steps", 100,
        "--batch_size", 12, "--learning_rate", 1e-2, "--warmup", 10, "--exam_data",
        tmp_path / "quiz")
    model = ["--model", tmp_path / "run"]
    quiz = [*model, "--data", tmp_path / "quiz", "--chat", "--shots", 0]
    results, predictions, out = exam(tmp_path / "exam", *quiz)
    command("eval.py", "generate", *model, "--data", path, "--output", tmp_path / "out.jsonl",
            "--max_new_tokens", 60)
    answers = [row["messages"][-1]["content"] for row in read(tmp_path / "out.jsonl")]
    right = sum(a == f"<think>\n{thought}\n</think>\n\n{q['answer']}"
                for a, q in zip(answers, table, strict=True))
    status, kept, err = command("labs/filter.py", tmp_path / "out.jsonl", "--output",
                                tmp_path / "kept.jsonl", "--answer_matches")
    assert (right, results["correct"], round(12 * records[-1]["exam_accuracy"])) == (12, 12, 12)
    assert len(read(tmp_path / "kept.jsonl")) == 12
    assert results["thinking"] == bool(thought) == ("reasons before it answers" in out)

    # Asked to reason it scores the same; with too few tokens it never comes to an answer.
    assert exam(tmp_path / "on", *quiz, "--thinking", "on")[0]["correct"] == 12
    cut, _, out = exam(tmp_path / "cut", *quiz, "--thinking", "on", "--thinking_tokens", 2)
    assert (cut["correct"], cut["unfinished"], cut["invalid"]) == (0, 12, 1)
    assert "12 answers did not come to an end" in out
