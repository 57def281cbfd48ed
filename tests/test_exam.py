"""What `eval.py exam` promises: prompts to the character, scores that can be recomputed by hand."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import NO_EFFECT, REPO, SHARED, TOLERANCE, command, read
from families import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import data
import eval as evaluation
import model as modeling
from data import InputError
from labs import world

CEVAL, CMMLU = SHARED / "data/ceval", SHARED / "data/cmmlu"
real = pytest.mark.skipif(not CEVAL.exists(), reason="needs the real exams in ../shared")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where a GPU is at hand `--dtype auto` would mean bf16 there."""
    monkeypatch.setattr(modeling, "best_device", lambda local=0: torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# ----------------------------------------------------------------------------- small exams, models

MAPPING = {"accountant": ["Accountant", "注册会计师", "Other"],
           "law": ["Law", "法学", "Humanities"], "logic": ["Logic", "逻辑学", "Humanities"],
           "high_school_physics": ["High School Physics", "高中物理", "STEM"]}
SIZES = {"accountant": 7, "law": 3, "logic": 5, "high_school_physics": 4}


def rows(handle, split, count):
    """Questions of different lengths; answers go A, C, D, A, C, D, A, ..."""
    return [{"id": str(i), "question": f" {handle} {split} 第{i}题" + "长" * i + "____。",
             **{x: f"{x}{i}选" for x in "ABCD"}, "answer": "ACD"[i % 3],
             "explanation": f"1. 因为{i}。\r\n2. 所以。"} for i in range(count)]


def write_csv(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(table)


def write_ceval(folder):
    """An exam in C-Eval's layout; a Path."""
    for handle, size in SIZES.items():
        for split, count, names in (("dev", 5, 8), ("val", size, 7), ("test", 2, 6)):
            table = rows(handle, split, count)
            write_csv(folder / split / f"{handle}_{split}.csv",
                      [list(table[0])[:names], *(list(r.values())[:names] for r in table)])
    (folder / "subject_mapping.json").write_text(json.dumps(MAPPING), encoding="utf-8")
    return folder


def write_cmmlu(folder, handles=("agronomy", "arts")):
    for handle in handles:
        for split, count in (("dev", 5), ("test", 6)):
            body = [list(r.values())[:7] for r in rows(handle, split, count)]
            write_csv(folder / split / f"{handle}.csv",
                      [["", "Question", *"ABCD", "Answer"], *body])
    return folder


def write_mmlu(folder, handles=("abstract_algebra", "us_foreign_policy")):
    for handle in handles:
        for split, count in (("dev", 5), ("test", 6)):
            write_csv(folder / split / f"{handle}_{split}.csv",
                      [list(r.values())[1:7] for r in rows(handle, split, count)])
    return folder


def make_model(folder, seed=0, positions=4096):
    """A random checkpoint whose tokens are bytes."""
    data.byte_tokenizer(folder)
    tokenizer = data.ChatTokenizer(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        max_position_embeddings=positions, eos_token_id=tokenizer.stop_id, bos_token_id=None,
    )).eval().save_pretrained(folder)
    return folder


def make_constant(folder, source, letter):
    """A checkpoint with the tokenizer of `source` that says `letter` whatever it is asked.

    Every embedding is all ones and the blocks add nothing, so that the last state is all ones; of
    the LM head only the letter's row is not 0.
    """
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    tokenizer = data.ChatTokenizer(folder)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.tokenizer.get_vocab_size(), hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=4096,
        eos_token_id=tokenizer.stop_id, bos_token_id=None))
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
    (token,) = tokenizer.tokenizer.encode(letter, add_special_tokens=False).ids
    model.lm_head.weight.data[token] = 1.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: exams ceval, cmmlu, mmlu; checkpoints one, two, small, D."""
    folder = tmp_path_factory.mktemp("exam")
    write_ceval(folder / "ceval")
    write_cmmlu(folder / "cmmlu")
    write_mmlu(folder / "mmlu")
    make_model(folder / "one")
    make_model(folder / "two", seed=1)
    make_model(folder / "small", positions=400)
    make_constant(folder / "D", folder / "one", "D")
    return folder


def exam(output, *flags):
    """(results, predictions, printed) of a run that succeeds."""
    status, out, err = command("eval.py", "exam", "--output_dir", output, *flags)
    assert (status, err) == (0, ""), err
    if (output / "results.json").exists():
        return modeling.read_json(output / "results.json"), read(output / "predictions.jsonl"), out
    return None, None, out


def asked(folder, **flags):
    """(Exam, its subjects, Protocol) of flags."""
    c = evaluation.resolve_exam(evaluation.Exam(data=str(folder), **flags))
    return c, evaluation.read_exam(c), evaluation.PROTOCOLS[c.protocol][c.benchmark]


def text_of(pieces, tokenizer):
    return "".join(x if isinstance(x, str) else tokenizer.decode([x]) for x, _ in pieces)


def first_prompt(tokenizer, folder, index=0, **flags):
    """The prompt of a subject's last question as text."""
    c, subjects, p = asked(folder, **flags)
    pieces = evaluation.prompt_pieces(tokenizer, subjects[index], subjects[index].questions[-1],
                                      c.shots, p, c.chat)
    return text_of(pieces, tokenizer)


# -------------------------------------------------------------------------------------- the prompts

# the last of law's three questions, and the two solved ones before it
Q = " law val 第2题长长____。\nA. A2选\nB. B2选\nC. C2选\nD. D2选"
S = (" law dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选",
     " law dev 第1题长____。\nA. A1选\nB. B1选\nC. C1选\nD. D1选")
HEAD = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
T = " agronomy test 第5题长长长长长____。\nA. A5选\nB. B5选\nC. C5选\nD. D5选"
D = " agronomy dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选"
M = " abstract_algebra test 第5题长长长长长____。\nA. A5选\nB. B5选\nC. C5选\nD. D5选"
N = " abstract_algebra dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选"
ALGEBRA = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
PROMPTS = {
    ("official", "ceval"):
        f"{HEAD}{S[0]}\n答案：A\n\n{S[1]}\n答案：C\n\n{Q}\n答案：",
    ("lm_eval", "ceval"):
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        f"{S[0][1:]}\n答案： A\n\n{S[1][1:]}\n答案： C\n\n{Q[1:]}\n答案：",
    ("qwen", "ceval"):
        f"问题：{S[0]}\n答案：A\n\n问题：{S[1]}\n答案：C\n\n问题：{Q}\n答案：",
    ("cot", "ceval"):
        f"{HEAD}{S[0]}\n答案：让我们一步一步思考，\n1. 因为0。\r\n2. 所以。\n所以答案是A。\n\n"
        f"{S[1]}\n答案：让我们一步一步思考，\n1. 因为1。\r\n2. 所以。\n所以答案是C。\n\n"
        f"{Q}\n答案：让我们一步一步思考，\n1.",
    ("official", "cmmlu"):
        f"以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n题目：{D}\n答案是：A\n\n"
        f"题目：{T}\n答案是：",
    ("lm_eval", "cmmlu"):
        f"以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n{D[1:]}\n答案： A\n\n"
        f"{T[1:]}\n答案：",
    ("qwen", "cmmlu"): f"问题：{D}\n答案：A\n\n问题：{T}\n答案：",
    ("official", "mmlu"):
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        f"{N}\nAnswer: A\n\n{M}\nAnswer:",
    ("lm_eval", "mmlu"): f"{ALGEBRA}{N[1:]}\nAnswer: A\n\n{M[1:]}\nAnswer:",
    ("qwen", "mmlu"): f"{ALGEBRA}Question: {N}\nAnswer: A\n\nQuestion: {M}\nAnswer:",
}
STEEL = ("<|im_start|>user\n以下是一道单选题:\n{}\n\nA. {}\nB. {}\nC. {}\nD. {}\n请给出答案。\n"
         "<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_of_every_protocol_to_the_character(place):
    tokenizer = data.ChatTokenizer(place / "one")
    for (protocol, benchmark), expected in PROMPTS.items():
        index, shots = (0, 1) if benchmark == "mmlu" else (1, 2 if benchmark == "ceval" else 1)
        found = first_prompt(tokenizer, place / benchmark, index, protocol=protocol, shots=shots)
        assert found == expected, (protocol, benchmark)
    found = first_prompt(tokenizer, place / "ceval", 1, protocol="steel")
    assert found == STEEL.format(" law val 第2题长长____。", *("A2选", "B2选", "C2选", "D2选"))
    table = {(protocol, benchmark) for protocol, row in evaluation.PROTOCOLS.items()
             for benchmark in row}
    assert table == {*PROMPTS, ("steel", "ceval"), ("steel", "cmmlu")}


def test_no_scored_prompt_ends_in_white_space_which_lm_eval_would_move(place):
    for protocol, row in evaluation.PROTOCOLS.items():
        for benchmark, p in row.items():
            end = p.ending + p.begin
            assert end == end.rstrip() or protocol == "steel", (protocol, benchmark)


def test_without_shots_a_prompt_is_header_and_question(place):
    tokenizer = data.ChatTokenizer(place / "one")
    found = first_prompt(tokenizer, place / "ceval", 1, shots=0)
    assert found == f"{HEAD}{Q}\n答案："
    found = first_prompt(tokenizer, place / "ceval", 1, shots=0, subject_names="handle")
    assert found == f"{HEAD}{Q}\n答案：".replace("法学", "law")


def test_in_a_chat_template_shots_are_turns_and_the_question_is_the_last(place):
    tokenizer = data.ChatTokenizer(place / "one")
    user, assistant = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n"
    found = first_prompt(tokenizer, place / "ceval", 1, shots=2, chat=True)
    assert found == (
        user.format(f"{HEAD}{S[0]}\n答案：") + assistant.format("A")
        + user.format(f"{S[1]}\n答案：") + assistant.format("C")
        + user.format(f"{Q}\n答案：") + "<|im_start|>assistant\n")
    found = first_prompt(tokenizer, place / "mmlu", 0, shots=1, chat=True, protocol="lm_eval")
    assert assistant.format("A") in found  # a turn does not begin with a space
    found = first_prompt(tokenizer, place / "ceval", 1, shots=1, chat=True, protocol="cot")
    assert found == (
        user.format(f"{HEAD}{S[0]}\n答案：")
        + assistant.format("让我们一步一步思考，\n1. 因为0。\r\n2. 所以。\n所以答案是A。")
        + user.format(f"{Q}\n答案：") + "<|im_start|>assistant\n")


def test_demo_asks_in_training_as_its_exam_asks(place):
    tokenizer = data.ChatTokenizer(place / "one")
    question = rows("law", "val", 3)[-1]
    prompt = world.EXAM_PROMPT.format(subject="法学", **question)
    found = first_prompt(tokenizer, place / "ceval", 1, shots=0, chat=True)
    assert found == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_first_prompt_is_printed_with_visible_line_ends(place, tmp_path):
    _, _, out = exam(tmp_path / "out", "--model", place / "one", "--data", place / "ceval",
                     "--subjects", "law", "--shots", 1, "--protocol", "cot")
    assert "2. 所以。\\n\n所以答案是A。\\n\n\\n\n" in out
    assert "因为0。\\r\\n\n" in out
    assert out.index("以下是中国关于法学考试") < out.index("accuracy in %")


def test_ids_are_those_of_the_whole_string_with_the_tokenizers_own_bos(tmp_path):
    folder, compared = write_ceval(tmp_path / "exam"), 0
    for family in ("llama2", "llama3", "qwen2_0", "deepseek"):
        make_checkpoint(tmp_path / family, family)
        tokenizer = data.ChatTokenizer(tmp_path / family)
        theirs = AutoTokenizer.from_pretrained(tmp_path / family)
        for protocol in ("official", "lm_eval"):
            c, subjects, p = asked(folder, protocol=protocol, shots=2)
            sheet = evaluation.make_sheet(tokenizer, subjects[1], c, 10**6)
            expected = PROMPTS[protocol, "ceval"]
            assert sheet.prompts[2] == theirs.encode(expected)
            # lm-eval's rule, for the letters of either protocol
            before = theirs.encode(expected)
            for letter, ids in zip("ABCD", sheet.options, strict=True):
                whole = theirs.encode(expected + p.answer.format(answer=letter))
                after = tuple(whole[len(before):])
                if whole[: len(before)] == before:  # else a token would straddle the border
                    assert ids == (after if p.scored == "sum" else after[:1])
                    compared += 1
    assert compared >= 24


@real
def test_real_prompt_keeps_the_line_ends_of_its_cells():
    c, subjects, p = asked(CEVAL, shots=5)
    text = "\n".join(q["question"] for s in subjects for q in s.questions)
    assert "\r\n" in text
    names = {s.handle: s for s in subjects}
    assert len(names) == 52 and names["accountant"].name == "注册会计师"


# ----------------------------------------------------------------------- against the reference code


def lm_eval_task(benchmark, handle, folder):
    """lm-eval's own task on local files, and the directory of its package."""
    task = pytest.importorskip("lm_eval.api.task")
    import yaml

    base = Path(task.__file__).parent.parent / "tasks" / benchmark
    shared = base / {"ceval": "_default_ceval_yaml", "cmmlu": "_default_template_yaml"}[benchmark]
    name = {"ceval": "ceval-valid", "cmmlu": "cmmlu"}[benchmark]
    config = yaml.safe_load(shared.read_text(encoding="utf-8"))
    config |= yaml.safe_load((base / f"{name}_{handle}.yaml").read_text(encoding="utf-8"))
    splits = {"ceval": ("dev", "val"), "cmmlu": ("dev", "test")}[benchmark]
    files = {s: str(folder / s / (f"{handle}_{s}.csv" if benchmark == "ceval" else f"{handle}.csv"))
             for s in splits}
    for key in ("include", "dataset_name", "metadata"):
        config.pop(key, None)
    return task.ConfigurableTask(config={**config, "dataset_path": "csv",
                                         "dataset_kwargs": {"data_files": files}})


@real
@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("benchmark,handle", [
    ("ceval", "high_school_physics"), ("cmmlu", "anatomy")])
def test_prompts_scores_and_predictions_are_those_of_lm_eval(
        benchmark, handle, shots, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = SHARED / "data" / benchmark
    folder = make_model(tmp_path / "model")
    task, lm = lm_eval_task(benchmark, handle, source), HFLM(str(folder), device="cpu")
    task.set_config("num_fewshot", shots)
    c, (subject,), p = asked(source, protocol="lm_eval", shots=shots, subjects=[handle])
    tokenizer = data.ChatTokenizer(folder)
    sheet = evaluation.make_sheet(tokenizer, subject, c, 10**6)
    found = evaluation.answer_sheet(modeling.load(folder), tokenizer, sheet, p, 8192)
    requests = []
    for doc, question in zip(task.eval_docs, subject.questions, strict=True):
        context = task.fewshot_context(doc, shots)
        assert context == text_of(evaluation.prompt_pieces(
            tokenizer, subject, question, shots, p, False), tokenizer)
        requests += task.construct_requests(doc, context)
    scores = torch.tensor([r[0] for r in lm.loglikelihood(requests, disable_tqdm=True)]).view(-1, 4)
    ours = torch.tensor([list(a["logprobs"].values()) for a in found])
    assert torch.allclose(ours, scores, rtol=0, atol=1e-3)
    assert [a["prediction"] for a in found] == ["ABCD"[i] for i in scores.argmax(1)]


# --------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("protocol,shots", [("official", 5), ("lm_eval", 2), ("qwen", 0)])
def test_scores_on_a_prefix_are_those_of_full_prompts_by_transformers(
        protocol, shots, place, tmp_path):
    reference = LlamaForCausalLM.from_pretrained(place / "one").eval()
    tokenizer = data.ChatTokenizer(place / "one")
    _, predictions, _ = exam(tmp_path / "out", "--model", place / "one", "--data", place / "ceval",
                             "--protocol", protocol, "--shots", shots)
    c, subjects, p = asked(place / "ceval", protocol=protocol, shots=shots)
    by_id = {(a["subject"], a["id"]): a for a in predictions}
    assert len(by_id) == len(predictions) == sum(SIZES.values())
    for subject in subjects:
        for question in subject.questions:
            prompt = text_of(evaluation.prompt_pieces(
                tokenizer, subject, question, shots, p, False), tokenizer)
            before = tokenizer.tokenizer.encode(prompt).ids
            expected = {}
            for letter in "ABCD":
                ids = tokenizer.tokenizer.encode(prompt + p.answer.format(answer=letter)).ids
                with torch.no_grad():
                    logp = reference(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                expected[letter] = sum(logp[i - 1, ids[i]].item()
                                       for i in range(len(before), len(ids)))
            found = by_id[subject.handle, question["id"]]
            assert found["logprobs"] == pytest.approx(expected, abs=TOLERANCE)
            assert found["prediction"] == max(expected, key=expected.get)


def test_options_of_several_tokens_score_as_their_sum(place):
    """A space and a letter are two tokens where tokens are bytes; other lengths mix."""
    model = modeling.load(place / "one")
    reference = LlamaForCausalLM.from_pretrained(place / "one").eval()
    prompts = [[5, 6, 7, 8, *range(20, 20 + n)] for n in (1, 9, 3)]
    options = [(40, 41), (40, 42), (43,), (44, 45, 46)]
    for micro_tokens in (1, 30, 8192):
        scores = evaluation.score_options(model, prompts, options, micro_tokens)
        for prompt, row in zip(prompts, scores.tolist(), strict=True):
            for option, score in zip(options, row, strict=True):
                with torch.no_grad():
                    logits = reference(torch.tensor([[*prompt, *option]])).logits[0]
                logp = logits.double().log_softmax(-1)
                expected = sum(logp[len(prompt) + j - 1, o].item() for j, o in enumerate(option))
                assert score == pytest.approx(expected, abs=TOLERANCE)


def test_scores_do_not_depend_on_micro_tokens_or_on_the_other_questions(place, tmp_path):
    flags = ["--model", place / "one", "--data", place / "ceval", "--protocol", "lm_eval"]
    _, whole, _ = exam(tmp_path / "a", *flags)
    _, small, _ = exam(tmp_path / "b", *flags, "--micro_tokens", 1)
    _, some, _ = exam(tmp_path / "c", *flags, "--subjects", "logic", "law")
    values = [[x for a in lines for x in a["logprobs"].values()] for lines in (whole, small)]
    assert values[0] == pytest.approx(values[1], abs=NO_EFFECT)
    assert [a["subject"] for a in some] == ["logic"] * 5 + ["law"] * 3
    assert some == sorted((a for a in whole if a["subject"] in ("logic", "law")),
                          key=lambda a: a["subject"] == "law")


def test_averages_floor_letters_and_interval_by_hand(place, tmp_path):
    results, predictions, out = exam(tmp_path / "out", "--model", place / "one", "--data",
                                     place / "ceval", "--shots", 1)
    right = {h: [a["prediction"] == a["answer"] for a in predictions if a["subject"] == h]
             for h in SIZES}
    shares = {h: sum(r) / len(r) for h, r in right.items()}
    total = sum(map(sum, right.values()))
    assert results["questions"] == 19 and results["correct"] == total
    assert results["micro"] == pytest.approx(total / 19)
    assert results["macro"] == pytest.approx(sum(shares.values()) / 4)
    assert {h: s["accuracy"] for h, s in results["subjects"].items()} == shares
    humanities = results["categories"]["Humanities"]
    assert humanities["micro"] == pytest.approx(sum(right["law"] + right["logic"]) / 8)
    assert humanities["macro"] == pytest.approx((shares["law"] + shares["logic"]) / 2)
    assert results["categories"]["C-Eval Hard"]["micro"] == shares["high_school_physics"]
    assert list(results["categories"]) == ["STEM", "Humanities", "Other", "C-Eval Hard"]
    # A C D A C D A, A C D, A C D A C, A C D A: A 8 times of 19
    assert results["floor"] == {"letter": "A", "micro": pytest.approx(8 / 19)}
    said = Counter(a["prediction"] for a in predictions)
    assert results["letters"] == {x: pytest.approx(said[x] / 19) for x in "ABCD"}
    low, high = results["interval"]  # the bounds solve Wilson's equation
    for p in (low, high):
        assert abs(total / 19 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 19))
    for value in (results["micro"], results["macro"], 8 / 19):
        assert f"{100 * value:.2f}" in out
    assert results["invalid"] == results["characters_lost"] == 0


def test_files_have_the_promised_keys(place, tmp_path):
    folder = write_cmmlu(tmp_path / "cmmlu", ("agronomy", "high_school_physics"))
    results, predictions, _ = exam(tmp_path / "out", "--model", place / "one", "--data", folder,
                                   "--shots", 2)
    assert {"model", "benchmark", "split", "protocol", "shots", "chat", "questions", "correct",
            "micro", "macro", "interval", "floor", "letters", "invalid", "seconds", "categories",
            "subjects", "shortened", "too_long", "characters_lost"} <= set(results)
    assert (results["benchmark"], results["split"]) == ("cmmlu", "test")
    assert [(a["subject"], a["id"]) for a in predictions] == [
        (h, str(i)) for h in ("high_school_physics", "agronomy") for i in range(6)]
    for a in predictions:
        assert list(a)[:5] == ["subject", "id", "answer", "prediction", "logprobs"]
        assert list(a["logprobs"]) == list("ABCD")
        assert a["prediction"] == max(a["logprobs"], key=a["logprobs"].get)
    assert "C-Eval Hard" not in results["categories"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out/accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_cmmlu_and_mmlu_have_their_subjects_and_categories():
    for benchmark, counts in (("cmmlu", [17, 22, 13, 15]), ("mmlu", [19, 12, 13, 13])):
        table = evaluation.subject_table(evaluation.Exam(benchmark=benchmark))
        found = Counter(category for _, category in table.values())
        assert [found[c] for c in evaluation.CATEGORIES] == counts
        assert len({name for name, _ in table.values()}) == sum(counts)
    assert table["us_foreign_policy"] == ("us foreign policy", "Social Science")
    table = evaluation.subject_table(evaluation.Exam(benchmark="cmmlu"))
    assert table["college_engineering_hydrology"] == ("大学工程水文学", "STEM")
    assert all(re.fullmatch("[\u4e00-\u9fff]+", name) for name, _ in table.values())


def test_mmlu_is_read_without_header_and_scores_a_letter_with_its_space(place, tmp_path):
    results, predictions, out = exam(tmp_path / "out", "--model", place / "one", "--data",
                                     place / "mmlu", "--protocol", "lm_eval", "--shots", 5)
    assert results["benchmark"] == "mmlu" and results["questions"] == 12
    assert [a["id"] for a in predictions[:6]] == list("012345")
    assert "12 questions in 2 of its 57 subjects" in out
    byte = data.ChatTokenizer(place / "one").tokenizer.token_to_id
    assert str([[byte("Ġ"), byte(x)] for x in "ABCD"]) in out


@real
def test_constant_answers_score_the_floors_of_c_eval(tmp_path):
    folders = [make_constant(tmp_path / x, SHARED / "models/minimind-tokenizer", x) for x in "ABCD"]
    exam(tmp_path / "out", "--model", *folders, "--data", CEVAL, "--shots", 0)
    found = [modeling.read_json(tmp_path / "out" / evaluation.short_name(str(f)) / "results.json")
             for f in folders]
    assert [round(100 * r["micro"], 2) for r in found] == [23.03, 25.11, 25.56, 26.30]
    for letter, r in zip("ABCD", found, strict=True):
        assert r["letters"][letter] == 1 and r["questions"] == 1346 and r["characters_lost"] == 0
        assert r["floor"]["letter"] == "D" and round(100 * r["floor"]["micro"], 2) == 26.30
    sizes = {name: row["subjects"] for name, row in found[0]["categories"].items()}
    assert sizes == {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11,
                     "C-Eval Hard": 8}
    low, high = evaluation.wilson(round(0.25 * 1346), 1346)
    assert (high - low) / 2 == pytest.approx(0.023, abs=5e-4)


# ----------------------------------------------------------------------------- the answers in words

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
    assert evaluation.extract(text) == ANSWERS[text]


def test_generated_answers_without_a_letter_are_invalid_and_wrong(place, tmp_path, monkeypatch):
    texts = iter(["所以答案是A。", "不知道", "选C", "A和B都有可能"] * 9)
    monkeypatch.setattr(modeling, "generate",
                        lambda model, prompts, count, stop_ids: [[0]] * len(prompts))
    monkeypatch.setattr(data.ChatTokenizer, "decode", lambda self, ids, special=True: next(texts))
    c, subjects, p = asked(place / "ceval", protocol="cot", shots=1)
    tokenizer, answers = data.ChatTokenizer(place / "one"), []
    for subject in subjects:
        sheet = evaluation.make_sheet(tokenizer, subject, c, 4096)._replace(first="")
        answers += evaluation.answer_sheet(None, tokenizer, sheet, p, 8192)
    assert {a["text"]: a["prediction"] for a in answers} == {
        "所以答案是A。": "A", "不知道": None, "选C": "C", "A和B都有可能": None}
    results = evaluation.summarize("ceval", subjects, answers)
    invalid = sum(a["prediction"] is None for a in answers)
    assert results["invalid"] == invalid / 19 > 0.4
    assert results["correct"] == sum(a["prediction"] == a["answer"] for a in answers)


def test_answers_in_words_of_a_model_that_says_d(place, tmp_path):
    for protocol, tokens in (("cot", 512), ("steel", 64)):
        results, predictions, _ = exam(tmp_path / protocol, "--model", place / "D", "--data",
                                       place / "ceval", "--protocol", protocol, "--subjects", "law")
        assert results["letters"]["D"] == 1 and results["shots"] == (5 if protocol == "cot" else 0)
        assert all(a["text"] == "D" * tokens and a["logprobs"] is None for a in predictions)
        assert results["chat"] == (protocol == "steel")


# ------------------------------------------------------------------ what does not fit, what is lost


def test_long_prompts_lose_whole_shots_oldest_first(place, tmp_path):
    c, subjects, p = asked(place / "ceval", shots=5)
    tokenizer, law = data.ChatTokenizer(place / "one"), subjects[1]

    def length(question, shots):
        pieces = evaluation.prompt_pieces(tokenizer, law, question, shots, p, False)
        return len(text_of(pieces, tokenizer).encode())

    context = length(law.questions[0], 3)  # others are longer
    sheet = evaluation.make_sheet(tokenizer, law, c, context)
    assert sheet.shots == [3, 2, 2]
    text = tokenizer.decode(sheet.prompts[0])
    assert text.startswith(HEAD + " law dev 第2题") and "law dev 第4题" in text
    assert [len(ids) <= context for ids in sheet.prompts] == [True] * 3
    context = length(law.questions[1], 0)
    sheet = evaluation.make_sheet(tokenizer, law, c, context)
    assert sheet.shots == [0, 0, None] and sheet.prompts[2] is None
    answers = evaluation.answer_sheet(modeling.load(place / "one"), tokenizer, sheet, p, 8192)
    assert answers[2]["prediction"] is None and answers[0]["prediction"]
    results = evaluation.summarize("ceval", [law], answers)
    assert (results["shortened"], results["too_long"], results["invalid"]) == (2, 1, 1 / 3)
    _, predictions, out = exam(tmp_path / "out", "--model", place / "small", "--data",
                               place / "ceval")
    assert {a["shots"] for a in predictions} < {0, 1, 2, 3, 4, None}
    assert "19 prompts longer than the context lost shots" in out


def test_prompts_with_fewer_shots_score_as_alone(place):
    """Questions of one subject that kept different numbers of shots share no prefix by mistake."""
    c, subjects, p = asked(place / "ceval", shots=5)
    tokenizer, model = data.ChatTokenizer(place / "one"), modeling.load(place / "one")
    whole = evaluation.make_sheet(tokenizer, subjects[0], c, 4096)
    sheet = evaluation.make_sheet(tokenizer, subjects[0], c, len(whole.prompts[3]))
    assert set(sheet.shots) == {4, 5}
    answers = evaluation.answer_sheet(model, tokenizer, sheet, p, 8192)
    for ids, answer in zip(sheet.prompts, answers, strict=True):
        alone = evaluation.score_options(model, [ids], sheet.options, 8192)[0].tolist()
        assert list(answer["logprobs"].values()) == pytest.approx(alone, abs=NO_EFFECT)


def normalized(source, folder, pattern, content):
    """A copy of a checkpoint whose tokenizer replaces a pattern before it encodes."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def test_characters_that_the_tokenizer_drops_are_reported(place, tmp_path):
    folder = normalized(place / "one", tmp_path / "deaf", "[选长第题]", "")
    results, _, out = exam(tmp_path / "out", "--model", folder, "--data", place / "ceval",
                           "--shots", 0)
    text = "".join(r[x] for h, n in SIZES.items() for r in rows(h, "val", n)
                   for x in ("question", *"ABCD"))
    share = sum(text.count(c) for c in "选长第题") / len(text)
    assert results["characters_lost"] == pytest.approx(share)
    assert f"loses {share:.1%} of the characters" in out


@real
def test_story_model_is_told_that_its_c_eval_score_means_nothing(tmp_path):
    results, _, out = exam(tmp_path / "out", "--model", SHARED / "models/story", "--data", CEVAL,
                           "--shots", 0, "--subjects", "law")
    assert results["characters_lost"] > 0.9 and "the score means nothing" in out


def test_options_that_are_one_token_are_refused(place, tmp_path):
    folder = normalized(place / "one", tmp_path / "blind", "[A-D]", "A")
    status, _, err = command("eval.py", "exam", "--model", folder, "--data", place / "ceval",
                             "--output_dir", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert "not four different options" in err and not (tmp_path / "out").exists()


def test_option_of_two_tokens_has_a_sum_but_no_next_token(place, tmp_path):
    """After "Answer:" a byte model says a space first, whatever it answers."""
    flags = ["eval.py", "exam", "--model", place / "one", "--data", place / "mmlu", "--shots", 0,
             "--output_dir", tmp_path / "out"]
    status, _, err = command(*flags)
    assert status == 2 and "--protocol lm_eval" in err and not (tmp_path / "out").exists()
    assert command(*flags, "--protocol", "lm_eval")[0] == 0


def test_broken_checkpoint_answers_nothing(place, tmp_path):
    shutil.copytree(place / "one", tmp_path / "nan")
    weights = load_file(tmp_path / "nan/model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, tmp_path / "nan/model.safetensors", {"format": "pt"})
    results, _, _ = exam(tmp_path / "out", "--model", tmp_path / "nan", "--data", place / "ceval",
                         "--shots", 0)
    assert results["invalid"] == 1 and results["correct"] == 0
    exam(tmp_path / "test", "--model", tmp_path / "nan", "--data", place / "ceval", "--split",
         "test", "--shots", 0)
    form = modeling.read_json(tmp_path / "test/submission.json")
    assert set(form) == set(SIZES) and all(f == {"0": "", "1": ""} for f in form.values())


# ----------------------------------------------------------------------- several checkpoints, ranks


@pytest.mark.parametrize("lost,won,p", [
    (0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 6, 2 / 64),
    (10, 20, 0.100348), (20, 10, 0.100348), (12, 12, 1.0), (60, 30, 0.002237), (15, 15, 1.0),
    (15, 16, 1.0)])
def test_mcnemar_by_known_values(lost, won, p):
    """Exact below 25; 10 and 20: chi-square (10 - 1)^2 / 30 = 2.7; 60, 30: 29^2 / 90."""
    assert evaluation.mcnemar(lost, won) == pytest.approx(p, abs=1e-6)


def test_wilson_by_a_known_value():
    assert evaluation.wilson(10, 100) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert evaluation.wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def test_checkpoints_of_one_run_are_columns_with_a_paired_test_and_a_curve(place, tmp_path):
    folders = [tmp_path / f"run/checkpoint-{n}" for n in (1, 2)]
    for source, folder in zip(("one", "two"), folders, strict=True):
        shutil.copytree(place / source, folder)
    _, _, out = exam(tmp_path / "out", "--model", *folders, "--data", place / "ceval",
                     "--shots", 0)
    names = [evaluation.short_name(str(f)) for f in folders]
    (row,) = modeling.read_json(tmp_path / "out/comparison.json")["mcnemar"]
    files = [tmp_path / "out" / name / "predictions.jsonl" for name in names]
    right = [[a["prediction"] == a["answer"] for a in read(file)] for file in files]
    lost = sum(a and not b for a, b in zip(*right, strict=True))
    won = sum(b and not a for a, b in zip(*right, strict=True))
    assert row == {"first": names[0], "second": names[1], "lost": lost, "won": won,
                   "p": evaluation.mcnemar(lost, won)}
    assert lost + won > 0 and f"{lost} questions lost, {won} won" in out
    assert out.count("first prompt of") == 1  # both get the same
    header = next(line for line in out.splitlines() if line.startswith("accuracy in %"))
    assert header.split()[-2:] == names
    alone, _, _ = exam(tmp_path / "alone", "--model", folders[1], "--data", place / "ceval",
                       "--shots", 0)
    second = modeling.read_json(tmp_path / "out" / names[1] / "results.json")
    assert {k: v for k, v in alone.items() if k != "seconds"} == {
        k: v for k, v in second.items() if k != "seconds"}
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out/accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_curve_is_drawn_only_for_names_that_end_in_steps(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    shown = []
    monkeypatch.setattr(figure.Figure, "savefig",
                        lambda self, path, format: [shown.append(self), Path(path).touch()])
    scores = {"law": {"accuracy": 0.5}}
    for names in (["run/step-100", "run/step-20"], ["out/run1", "out/run2"],
                  ["a/step-100", "b/step-20"], ["run/step-100"]):
        evaluation.draw_exam(tmp_path / "x.png", [
            {"model": n, "micro": 0.5, "interval": [0.4, 0.6], "subjects": scores,
             "floor": {"micro": 0.26}} for n in names])
    assert [f.axes[0].get_xlabel() == "step" for f in shown] == [True, False, False, False]
    assert list(shown[0].axes[0].lines[0].get_xdata()) == [20, 100]


def test_ranks_share_the_subjects_and_give_the_same_files(place, tmp_path):
    flags = ["exam", "--model", place / "one", place / "two", "--data", place / "ceval",
             "--shots", "2"]
    exam(tmp_path / "one", *flags[1:])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--master_port=0",
         "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", REPO / "eval.py", *map(str, flags),
         "--output_dir", tmp_path / "three"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy in %") == 1
    for name in map(evaluation.short_name, map(str, flags[2:4])):
        pair = [tmp_path / run / name for run in ("one", "three")]
        assert len({(p / "predictions.jsonl").read_bytes() for p in pair}) == 1
        a, b = (modeling.read_json(p / "results.json") for p in pair)
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_split_without_labels_gives_a_submission_and_no_accuracy(place, tmp_path):
    results, predictions, out = exam(tmp_path / "out", "--model", place / "one", "--data",
                                     place / "ceval", "--split", "test", "--shots", 1)
    for key in ("correct", "micro", "macro", "interval", "floor"):
        assert results[key] is None
    assert {a["answer"] for a in predictions} == {None}
    form = modeling.read_json(tmp_path / "out/submission.json")
    assert form == {h: {str(i): next(a["prediction"] for a in predictions
                                     if (a["subject"], a["id"]) == (h, str(i)))
                        for i in range(2)} for h in SIZES}
    assert "no accuracy" in out and not (tmp_path / "out/accuracy.png").exists()


# -------------------------------------------------------------------------------- demo and training


def test_exam_alone_scores_the_demos_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world.make_demo(Path("out/demo"))
    world.make_demo_model(Path("out/demo/base"))
    for name, seed in (("sft", 1), ("dpo", 2)):
        shutil.copytree("out/demo/base", f"out/{name}")
        model = modeling.load("out/demo/base")
        model.initialize(seed)
        modeling.save(model, f"out/{name}")
        results, predictions, _ = exam(tmp_path / "out/exam")
        assert command("eval.py", "exam")[0] == 0  # its own place is out/exam
        assert results["model"] == f"out/{name}" and results["questions"] == 320
        tokenizer = data.ChatTokenizer(f"out/{name}")
        right = evaluation.exam_accuracy(modeling.load(f"out/{name}"), tokenizer, "out/demo/exam")
        assert right == (results["correct"], 320)
        assert (results["chat"], results["shots"]) == (True, 0)


def test_each_rank_counts_its_own_subjects_in_training(place):
    model, tokenizer = modeling.load(place / "one"), data.ChatTokenizer(place / "one")
    whole = evaluation.exam_accuracy(model, tokenizer, place / "ceval")
    parts = [evaluation.exam_accuracy(model, tokenizer, place / "ceval", rank=rank, world=5)
             for rank in range(5)]
    assert whole == tuple(map(sum, zip(*parts, strict=True)))
    assert [count for _, count in parts] == [*SIZES.values(), 0]


def test_exam_during_training_is_the_exam_afterwards(place, tmp_path):
    rows_ = tmp_path / "rows.jsonl"
    rows_.write_text(json.dumps({"prompt": "hi", "completion": "A"}) + "\n", encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
             "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run(
        [*start, REPO / "train_sft.py", "--model", place / "one", "--data", rows_, "--steps", "4",
         "--learning_rate", "1e-2", "--output_dir", tmp_path / "run", "--exam_data",
         place / "ceval", "--exam_every", "3"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    records = read(tmp_path / "run/metrics.jsonl")
    assert ["exam_accuracy" in r for r in records] == [False, False, True, True]
    results, _, _ = exam(tmp_path / "out", "--model", tmp_path / "run", "--data", place / "ceval",
                         "--chat", "--shots", 0)
    assert records[-1]["exam_accuracy"] == results["micro"]
    assert "exam accuracy" in done.stdout


# ---------------------------------------------------------------------------------------- bad input


def edited(path, edit):
    """Apply edit(rows of cells) to a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    edit(table)
    write_csv(path, table)


def cell(row, column, value):
    def edit(table):
        table[row][column] = value
    return edit


LAW = "val/law_val.csv"
BROKEN = {  # name: (file, what is done to it, what the message says)
    "missing subject": (LAW, None, [LAW]),
    "missing shots": ("dev/law_dev.csv", None, ["dev/law_dev.csv"]),
    "missing column": (LAW, lambda t: [r.pop(3) for r in t], [LAW, "B missing"]),
    "missing answers of shots": ("dev/law_dev.csv", lambda t: [r.pop(6) for r in t],
                                 ["dev/law_dev.csv", "answer missing"]),
    "missing answers of one subject": (LAW, lambda t: [r.pop(6) for r in t], ["val", "answer"]),
    "duplicate id": (LAW, cell(3, 0, "1"), [LAW, "row 3", "id 1", "row 2"]),
    "empty cell": (LAW, cell(2, 4, " "), [LAW, "row 2", "column C"]),
    "empty question": (LAW, cell(1, 1, ""), [LAW, "row 1", "column question"]),
    "empty answer": (LAW, cell(1, 6, ""), [LAW, "row 1", "column answer"]),
    "wrong answer": (LAW, cell(1, 6, "E"), [LAW, "row 1", "'E'"]),
    "cells too few": (LAW, lambda t: t[2].pop(), [LAW, "row 2", "7 cells", "found 6"]),
    "no question": (LAW, lambda t: t.__delitem__(slice(1, None)), [LAW, "no question"]),
    "no row": (LAW, lambda t: t.clear(), [LAW, "no question"]),
    "shots too few": ("dev/law_dev.csv", lambda t: t.pop(), ["dev/law_dev.csv", "4 rows"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_exam_is_named_by_file_and_row(name, place, tmp_path):
    file, edit, said = BROKEN[name]
    folder = tmp_path / "ceval"
    shutil.copytree(place / "ceval", folder)
    (folder / file).unlink() if edit is None else edited(folder / file, edit)
    refused(tmp_path, said, "--data", folder, "--model", place / "one")


def refused(tmp_path, said, *flags):
    """Status 2, one line that says this, nothing written."""
    status, out, err = command("eval.py", "exam", "--output_dir", tmp_path / "out", *flags)
    assert (status, err.count("\n"), out) == (2, 1, ""), err
    assert err.startswith("eval.py: ")
    assert all(part in err for part in said), err
    assert not (tmp_path / "out").exists()


BAD = {
    "no folder": (["--data", "nowhere"], ["nowhere"]),
    "no exam in it": (["--data", "one"], ["one"]),
    "another benchmark": (["--data", "cmmlu", "--benchmark", "ceval"], ["subject_mapping.json"]),
    "no such split": (["--data", "cmmlu", "--split", "val"], ["cmmlu"]),
    "unknown subject": (["--data", "ceval", "--subjects", "law", "lau"], ["lau", "logic"]),
    "absent subject": (["--data", "cmmlu", "--subjects", "nutrition"], ["nutrition.csv"]),
    "six shots": (["--data", "ceval", "--shots", "6"], ["--shots 6", "5"]),
    "negative shots": (["--data", "ceval", "--shots", "-2"], ["--shots -2", "5"]),
    "shots with steel": (["--data", "ceval", "--protocol", "steel", "--shots", "1"], ["--shots 1"]),
    "cot of cmmlu": (["--data", "cmmlu", "--protocol", "cot"], ["cot", "ceval"]),
    "unknown protocol": (["--data", "ceval", "--protocol", "best"], ["official"]),
    "no model": (["--data", "ceval", "--model", "nowhere"], ["nowhere"]),
    "one model twice": (["--data", "ceval", "--model", "one", "one"], ["twice"]),
    "micro_tokens": (["--data", "ceval", "--micro_tokens", "0"], ["--micro_tokens"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_end_with_one_line_and_status_2(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    flags, said = BAD[name]
    model = [] if "--model" in flags else ["--model", "one"]
    refused(tmp_path, said, *flags, *model)


def test_bytes_that_are_no_utf8_and_a_bad_mapping_are_named(place, tmp_path):
    folder = tmp_path / "ceval"
    shutil.copytree(place / "ceval", folder)
    (folder / LAW).write_bytes("题".encode("gbk"))
    refused(tmp_path, [LAW], "--data", folder, "--model", place / "one")
    (folder / "subject_mapping.json").write_text('{"law": ["Law"]}', encoding="utf-8")
    refused(tmp_path, ["subject_mapping.json"], "--data", folder, "--model", place / "one")


def test_output_dir_that_is_a_file_is_refused_before_anything_runs(place, tmp_path):
    (tmp_path / "file").write_text("old")
    for target in (tmp_path / "file", tmp_path / "file/below"):
        status, _, err = command("eval.py", "exam", "--model", place / "one", "--data",
                                 place / "ceval", "--output_dir", target)
        assert (status, err.count("\n")) == (2, 1) and "--output_dir" in err
    assert (tmp_path / "file").read_text() == "old"


def test_training_refuses_an_exam_it_cannot_score(place, tmp_path):
    rows_ = tmp_path / "rows.jsonl"
    rows_.write_text(json.dumps({"prompt": "hi", "completion": "A"}) + "\n", encoding="utf-8")
    flags = ["--model", place / "one", "--data", rows_, "--output_dir", tmp_path / "run"]
    for extra in (["--exam_data", tmp_path], ["--exam_every", 2]):
        status, _, err = command("train_sft.py", *flags, *extra)
        assert (status, err.count("\n")) == (2, 1) and "exam" in err
    with pytest.raises(InputError, match="no column answer"):
        evaluation.training_exam(data.ChatTokenizer(place / "one"), place / "ceval", 4096, "test")
    assert not (tmp_path / "run").exists()
