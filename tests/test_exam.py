"""What `eval.py exam` promises: prompts to the character, scores that can be recomputed by hand."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import NO_EFFECT, REPO, SHARED, TOLERANCE, command, jsonl, read
from exam_files import (
    SIZES,
    asked,
    exam,
    first_prompt,
    make_constant,
    make_model,
    rows,
    text_of,
    write_ceval,
    write_cmmlu,
    write_csv,
)
from families import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

import data
import eval as evaluation
import model as modeling
from data import InputError
from labs import scores, world

CEVAL = SHARED / "data/ceval"
real = pytest.mark.skipif(not CEVAL.exists(), reason="needs the real exams in ../shared")


def normalized(source, folder, pattern, content):
    """A copy of a checkpoint whose tokenizer replaces a pattern before it encodes."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: exams ceval, cmmlu; checkpoints one, two, small."""
    folder = tmp_path_factory.mktemp("exam")
    write_ceval(folder / "ceval")
    write_cmmlu(folder / "cmmlu")
    make_model(folder / "one")
    make_model(folder / "two", seed=1)
    make_model(folder / "small", positions=400)
    normalized(folder / "one", folder / "blind", "[A-D]", "A")
    return folder


# -------------------------------------------------------------------------------------- the prompts

# the last of law's three questions, and the two solved ones before it
Q = " law val 第2题长长____。\nA. A2选\nB. B2选\nC. C2选\nD. D2选"
S = (" law dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选",
     " law dev 第1题长____。\nA. A1选\nB. B1选\nC. C1选\nD. D1选")
HEAD = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
T = " agronomy test 第5题长长长长长____。\nA. A5选\nB. B5选\nC. C5选\nD. D5选"
D = " agronomy dev 第0题____。\nA. A0选\nB. B0选\nC. C0选\nD. D0选"
PROMPTS = {
    ("official", "ceval"):
        f"{HEAD}{S[0]}\n答案：A\n\n{S[1]}\n答案：C\n\n{Q}\n答案：",
    ("lm_eval", "ceval"):
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        f"{S[0][1:]}\n答案： A\n\n{S[1][1:]}\n答案： C\n\n{Q[1:]}\n答案：",
    ("official", "cmmlu"):
        f"以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n题目：{D}\n答案是：A\n\n"
        f"题目：{T}\n答案是：",
    ("lm_eval", "cmmlu"):
        f"以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n{D[1:]}\n答案： A\n\n"
        f"{T[1:]}\n答案：",
}


@pytest.mark.parametrize("protocol,suite", PROMPTS)
def test_prompts_of_both_protocols_to_the_character(protocol, suite, place):
    shots = {"ceval": 2, "cmmlu": 1}[suite]
    tokenizer = data.ChatTokenizer(place / "one")
    found = first_prompt(tokenizer, place / suite, 1, protocol=protocol, shots=shots)
    assert found == PROMPTS[protocol, suite]


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


def test_demo_asks_in_training_as_its_exam_asks(place):
    tokenizer = data.ChatTokenizer(place / "one")
    question = rows("law", "val", 3)[-1]
    prompt = world.EXAM_PROMPT.format(subject="法学", **question)
    found = first_prompt(tokenizer, place / "ceval", 1, shots=0, chat=True)
    assert found == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


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


def test_an_option_has_the_space_that_a_chat_template_writes_before_answers(place, tmp_path):
    source = data.TEMPLATES["chatml"].replace("\\n", " ")
    (tmp_path / "spaces.jinja").write_text(source, encoding="utf-8")
    tokenizer = data.ChatTokenizer(place / "one", str(tmp_path / "spaces.jinja"))
    c, subjects, _ = asked(place / "ceval", protocol="lm_eval", shots=0, chat=True)
    sheet = evaluation.make_sheet(tokenizer, subjects[0], c, 10**6)
    assert [tokenizer.decode(ids) for ids in sheet.options] == [" A", " B", " C", " D"]


@real
def test_real_prompt_keeps_the_line_ends_of_its_cells():
    c, subjects, p = asked(CEVAL, shots=5)
    text = "\n".join(q["question"] for s in subjects for q in s.questions)
    assert "\r\n" in text
    names = {s.handle: s for s in subjects}
    assert len(names) == 52 and names["accountant"].name == "注册会计师"


# ----------------------------------------------------------------------- against the reference code


def lm_eval_task(suite, handle, folder):
    """lm-eval's own task on local files, and the directory of its package."""
    task = pytest.importorskip("lm_eval.api.task")
    import yaml

    base = Path(task.__file__).parent.parent / "tasks" / suite
    shared = base / {"ceval": "_default_ceval_yaml", "cmmlu": "_default_template_yaml"}[suite]
    name = {"ceval": "ceval-valid", "cmmlu": "cmmlu"}[suite]
    config = yaml.safe_load(shared.read_text(encoding="utf-8"))
    config |= yaml.safe_load((base / f"{name}_{handle}.yaml").read_text(encoding="utf-8"))
    splits = {"ceval": ("dev", "val"), "cmmlu": ("dev", "test")}[suite]
    files = {s: str(folder / s / (f"{handle}_{s}.csv" if suite == "ceval" else f"{handle}.csv"))
             for s in splits}
    for key in ("include", "dataset_name", "metadata"):
        config.pop(key, None)
    return task.ConfigurableTask(config={**config, "dataset_path": "csv",
                                         "dataset_kwargs": {"data_files": files}})


@real
@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("suite,handle", [
    ("ceval", "high_school_physics"), ("cmmlu", "anatomy")])
def test_prompts_scores_and_predictions_are_those_of_lm_eval(
        suite, handle, shots, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = SHARED / "data" / suite
    folder = make_model(tmp_path / "model")
    task, lm = lm_eval_task(suite, handle, source), HFLM(str(folder), device="cpu")
    task.set_config("num_fewshot", shots)
    c, (subject,), p = asked(source, protocol="lm_eval", shots=shots, subjects=[handle])
    tokenizer = data.ChatTokenizer(folder)
    sheet = evaluation.make_sheet(tokenizer, subject, c, 10**6)
    found = evaluation.answer_sheet(modeling.load(folder), tokenizer, sheet, 8192)
    requests = []
    for doc, question in zip(task.eval_docs, subject.questions, strict=True):
        context = task.fewshot_context(doc, shots)
        plan, _ = evaluation.prompt_plan(tokenizer, subject, question, shots, p, False)
        assert context == text_of(plan, tokenizer)
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
            plan, _ = evaluation.prompt_plan(tokenizer, subject, question, shots, p, False)
            prompt = text_of(plan, tokenizer)
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
        assert f"{100 * value:.1f}" in out
    assert results["invalid"] == results["characters_lost"] == 0


def test_files_have_the_promised_keys(place, tmp_path):
    folder = write_cmmlu(tmp_path / "cmmlu", ("agronomy", "high_school_physics"))
    results, predictions, _ = exam(tmp_path / "out", "--model", place / "one", "--data", folder,
                                   "--shots", 2)
    assert set("model benchmark split protocol shots chat questions correct micro macro interval "
               "floor letters invalid seconds categories subjects shortened too_long "
               "characters_lost".split()) <= set(results)
    assert (results["benchmark"], results["split"]) == ("cmmlu", "test")
    assert [(a["subject"], a["id"]) for a in predictions] == [
        (h, str(i)) for h in ("high_school_physics", "agronomy") for i in range(6)]
    for a in predictions:
        assert list(a)[:5] == ["subject", "id", "answer", "prediction", "logprobs"]
        assert list(a["logprobs"]) == list("ABCD")
        assert a["prediction"] == max(a["logprobs"], key=a["logprobs"].get)
    assert "C-Eval Hard" not in results["categories"]


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


# ------------------------------------------------------------------ what does not fit, what is lost


def test_long_prompts_lose_whole_shots_oldest_first(place, tmp_path):
    c, subjects, p = asked(place / "ceval", shots=5)
    tokenizer, law = data.ChatTokenizer(place / "one"), subjects[1]

    def length(question, shots):
        plan, _ = evaluation.prompt_plan(tokenizer, law, question, shots, p, False)
        return len(text_of(plan, tokenizer).encode())

    context = length(law.questions[0], 3)  # others are longer
    sheet = evaluation.make_sheet(tokenizer, law, c, context)
    assert sheet.shots == [3, 2, 2]
    assert sheet.first == tokenizer.decode(sheet.prompts[0])  # what is printed is what is asked
    text = tokenizer.decode(sheet.prompts[0])
    assert text.startswith(HEAD + " law dev 第2题") and "law dev 第4题" in text
    assert [len(ids) <= context for ids in sheet.prompts] == [True] * 3
    context = length(law.questions[1], 0)
    sheet = evaluation.make_sheet(tokenizer, law, c, context)
    assert sheet.shots == [0, 0, None] and sheet.prompts[2] is None
    answers = evaluation.answer_sheet(modeling.load(place / "one"), tokenizer, sheet, 8192)
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
    answers = evaluation.answer_sheet(model, tokenizer, sheet, 8192)
    for ids, answer in zip(sheet.prompts, answers, strict=True):
        alone = evaluation.score_options(model, [ids], sheet.options, 8192)[0].tolist()
        assert list(answer["logprobs"].values()) == pytest.approx(alone, abs=NO_EFFECT)


def test_characters_that_the_tokenizer_drops_are_reported(place, tmp_path):
    folder = normalized(place / "one", tmp_path / "deaf", "[选长第题]", "")
    results, _, out = exam(tmp_path / "out", "--model", folder, "--data", place / "ceval",
                           "--shots", 0)
    text = "".join(r[x] for h, n in SIZES.items() for r in rows(h, "val", n)
                   for x in ("question", *"ABCD"))
    share = sum(text.count(c) for c in "选长第题") / len(text)
    assert results["characters_lost"] == pytest.approx(share)
    assert f"loses {share:.1%} of the characters" in out


def test_broken_checkpoint_answers_nothing(place, tmp_path):
    shutil.copytree(place / "one", tmp_path / "nan")
    weights = load_file(tmp_path / "nan/model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, tmp_path / "nan/model.safetensors", {"format": "pt"})
    flags = ["--model", tmp_path / "nan", "--data", place / "ceval", "--shots", 0]
    results, _, _ = exam(tmp_path / "out", *flags)
    assert results["invalid"] == 1 and results["correct"] == 0
    exam(tmp_path / "test", *flags, "--split", "test")
    form = modeling.read_json(tmp_path / "test/submission.json")
    assert form == {handle: {"0": "", "1": ""} for handle in SIZES}


# ----------------------------------------------------------------------- several checkpoints, ranks


def torchrun(ranks, script, *flags):
    """What a script prints that several processes run to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
         "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", REPO / script,
         *map(str, flags)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_checkpoints_of_one_run_are_columns_with_a_paired_test(place, tmp_path):
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
                   "p": scores.mcnemar(lost, won)}
    assert lost + won > 0 and f"{lost} questions lost, {won} won" in out
    assert out.count("first prompt of") == 1  # both get the same
    header = next(line for line in out.splitlines() if line.startswith("accuracy in %"))
    assert header.split()[-2:] == names


def test_ranks_share_the_subjects_and_give_the_same_files(place, tmp_path):
    flags = ["exam", "--model", place / "one", place / "two", "--data", place / "ceval",
             "--shots", "2"]
    exam(tmp_path / "one", *flags[1:])
    printed = torchrun(3, "eval.py", *flags, "--output_dir", tmp_path / "three")
    assert printed.count("accuracy in %") == 1
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
    assert len(predictions) == sum(map(len, form.values())) == 2 * len(SIZES)
    assert all(form[a["subject"]][a["id"]] == a["prediction"] for a in predictions)
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
        right = evaluation.count_right(modeling.load(f"out/{name}"), tokenizer, "out/demo/exam")
        assert right == (results["correct"], 320)
        assert (results["chat"], results["shots"]) == (True, 0)


def test_each_rank_counts_its_own_subjects_in_training(place):
    model, tokenizer = modeling.load(place / "one"), data.ChatTokenizer(place / "one")
    whole = evaluation.count_right(model, tokenizer, place / "ceval")
    parts = [evaluation.count_right(model, tokenizer, place / "ceval", rank=rank, world=5)
             for rank in range(5)]
    assert whole == tuple(map(sum, zip(*parts, strict=True)))
    assert [count for _, count in parts] == [*SIZES.values(), 0]


def test_each_exam_during_training_is_that_exam_afterwards(place, tmp_path):
    rows_ = jsonl(tmp_path / "rows.jsonl", {"prompt": "hi", "completion": "A"})
    printed = torchrun(2, "train_sft.py", "--model", place / "one", "--data", rows_, "--steps", 4,
                       "--learning_rate", 1e-2, "--output_dir", tmp_path / "run", "--exam_data",
                       place / "ceval", place / "cmmlu", "--exam_every", 3)
    records = read(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records if "exam_accuracy" in r] == [0, 3, 4]
    scores = []
    for name in ("ceval", "cmmlu"):
        results, _, _ = exam(tmp_path / name, "--model", tmp_path / "run", "--data", place / name,
                             "--chat", "--shots", 0)
        found = records[-1]["exams"][name]
        assert (found["accuracy"], found["interval"]) == (results["micro"], results["interval"])
        assert found["floor"] == results["floor"]["micro"] and f"exam {name} " in printed
        scores.append(results["micro"])
    assert records[-1]["exam_accuracy"] == sum(scores) / 2


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


def deleted(row, column):
    def edit(table):
        for cells in table[row:]:
            cells.pop(column)
    return edit


LAW, DEV = "val/law_val.csv", "dev/law_dev.csv"
REFUSED = {  # name: (a file of the exam, what is done to it, flags, what the message says)
    "missing subject": (LAW, None, "", [LAW]),
    "missing shots": (DEV, None, "", [DEV]),
    "missing column": (LAW, deleted(0, 3), "", [LAW, "B missing"]),
    "missing answers of shots": (DEV, deleted(0, 6), "", [DEV, "answer missing"]),
    "missing answers of one subject": (LAW, deleted(0, 6), "", ["val", "answer"]),
    "duplicate id": (LAW, cell(3, 0, "1"), "", [LAW, "row 3", "id 1", "row 2"]),
    "a column twice": (LAW, lambda t: [cells.append(cells[6]) for cells in t], "",
                       [LAW, "two columns are called answer"]),
    "empty cell": (LAW, cell(2, 4, " "), "", [LAW, "row 2", "column C", "--skip_bad_rows"]),
    "empty question": (LAW, cell(1, 1, ""), "", [LAW, "row 1", "column question"]),
    "empty answer": (LAW, cell(1, 6, ""), "", [LAW, "row 1", "column answer"]),
    "wrong answer": (LAW, cell(1, 6, "E"), "", [LAW, "row 1", "'E'"]),
    "cells too few": (LAW, lambda t: t[2].pop(), "", [LAW, "row 2", "7 cells", "found 6"]),
    "no question": (LAW, lambda t: t.__delitem__(slice(1, None)), "", [LAW, "no question"]),
    "no row": (LAW, lambda t: t.clear(), "", [LAW, "no question"]),
    "shots too few": (DEV, lambda t: t.pop(), "", [DEV, "4 rows"]),
    "bytes of another encoding": (LAW, "题".encode("gbk"), "", [LAW, "line 1", "UTF-8"]),
    "a mapping of something else": ("subject_mapping.json", b'{"law": ["Law"]}', "",
                                    ["subject_mapping.json", "law"]),
    "no folder": ("", None, "--data nowhere", ["nowhere"]),
    "no exam in it": ("", None, "--data one", ["one"]),
    "another benchmark": ("", None, "--data cmmlu --benchmark ceval", ["no file of ceval"]),
    "no such split": ("", None, "--data cmmlu --split val", ["cmmlu"]),
    "unknown subject": ("", None, "--subjects law lau", ["lau", "logic"]),
    "absent subject": ("", None, "--data cmmlu --subjects nutrition", ["nutrition.csv"]),
    "six shots": ("", None, "--shots 6", ["--shots 6", "5"]),
    "negative shots": ("", None, "--shots -2", ["--shots", "-2"]),
    "shots with steel": ("", None, "--protocol steel --shots 1", ["--shots 1"]),
    "cot of cmmlu": ("", None, "--data cmmlu --protocol cot", ["cot", "ceval"]),
    "unknown protocol": ("", None, "--protocol best", ["official"]),
    "no model": ("", None, "--model nowhere", ["nowhere"]),
    "one model twice": ("", None, "--model one one", ["twice"]),
    "micro_tokens": ("", None, "--micro_tokens 0", ["--micro_tokens"]),
    "options that are one token": ("", None, "--model blind", ["not four different options"]),
    "output_dir is a file": ("", None, "--output_dir one/config.json", ["--output_dir"]),
    "output_dir below a file": ("", None, "--output_dir one/config.json/x", ["--output_dir"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_ends_with_one_line_and_status_2(name, place, tmp_path, monkeypatch):
    """The line names file and row, or the flag; nothing is written."""
    file, edit, flags, said = REFUSED[name]
    monkeypatch.chdir(place)
    folder = "ceval"
    if file:
        folder = tmp_path / "ceval"
        shutil.copytree(place / "ceval", folder)
        if edit is None:
            (folder / file).unlink()
        elif isinstance(edit, bytes):
            (folder / file).write_bytes(edit)
        else:
            edited(folder / file, edit)
    status, out, err = command("eval.py", "exam", "--data", folder, "--model", "one",
                               "--output_dir", tmp_path / "out", *flags.split())
    assert (status, err.count("\n"), out) == (2, 1, ""), err
    assert err.startswith("eval.py: ")
    assert all(part in err for part in said), err
    assert not (tmp_path / "out").exists()


def test_c_eval_without_its_mapping_or_with_a_byte_order_mark_in_it_is_met_as_it_is(
        place, tmp_path):
    """The zip on the hub has no subject_mapping.json, and Windows editors write the mark."""
    shutil.copytree(place / "ceval", tmp_path / "ceval")
    mapping = tmp_path / "ceval/subject_mapping.json"
    whole = asked(tmp_path / "ceval", shots=5)[1]
    mapping.write_bytes(b"\xef\xbb\xbf" + mapping.read_bytes())
    assert asked(tmp_path / "ceval", shots=5)[1] == whole
    mapping.unlink()
    c, subjects, _ = asked(tmp_path / "ceval", shots=5)
    assert c.benchmark == "ceval"
    assert sorted(subjects) == sorted(whole)


def test_a_bad_question_can_be_left_out(place, tmp_path):
    shutil.copytree(place / "ceval", tmp_path / "ceval")
    edited(tmp_path / "ceval" / LAW, lambda t: t[2].pop())
    status, out, err = command("eval.py", "exam", "--data", tmp_path / "ceval", "--model",
                               place / "one", "--output_dir", tmp_path / "out", "--skip_bad_rows")
    assert (status, err) == (0, "")
    assert "18 questions" in out and f"dropped {tmp_path / 'ceval' / LAW} row 2" in out


def test_files_of_subjects_that_no_table_names_are_said(place, tmp_path):
    shutil.copytree(place / "ceval", tmp_path / "ceval")
    known = next((tmp_path / "ceval/val").glob("*.csv"))
    shutil.copy(known, known.with_name("my_subject_val.csv"))
    _, _, out = exam(tmp_path / "out", "--data", tmp_path / "ceval", "--model", place / "one")
    assert f"no such subject: {known.with_name('my_subject_val.csv')}" in out


def test_training_refuses_an_exam_it_cannot_score(place, tmp_path):
    rows_ = jsonl(tmp_path / "rows.jsonl", {"prompt": "hi", "completion": "A"})
    flags = ["--model", place / "one", "--data", rows_, "--output_dir", tmp_path / "run"]
    for extra in (["--exam_data", place / "ceval", tmp_path], ["--exam_every", 2]):
        status, _, err = command("train_sft.py", *flags, *extra)
        assert (status, err.count("\n")) == (2, 1) and "exam" in err
    (tmp_path / "exam/val").mkdir(parents=True)
    for path in (place / "ceval/test").iterdir():
        (tmp_path / "exam/val" / path.name.replace("_test", "_val")).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="no column answer"):
        evaluation.training_exam(data.ChatTokenizer(place / "one"), tmp_path / "exam", 4096)
    assert not (tmp_path / "run").exists()
