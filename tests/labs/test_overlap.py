"""labs/overlap.py: exam questions in training rows."""

import random

import pytest
from conftest import (
    SHARED,
    asked,
    assistant,
    command,
    jsonl,
    read,
    run_lab,
    sentence,
    user,
    write_exam,
)

import eval as evaluation
from labs import overlap
from labs import text as texts


def test_coverage_counts_words_that_lie_in_a_common_ngram():
    text = texts.words_of("春眠不觉晓处处闻啼鸟夜来风雨声花落知多少")
    assert overlap.coverage(text, texts.words_of("诗云" + "".join(text) + "也")) == 1
    changed = [*text[:10], "风", *text[11:]]
    assert overlap.coverage(text, changed) == 19 / 20
    assert overlap.coverage(text, text[::-1]) == 0 and overlap.coverage([], text) == 0
    assert overlap.coverage(["铁"], ["金", "铁"]) == 1  # shorter than an n-gram: all of it


def test_leaked_questions_are_found_in_whatever_form_and_no_others(tmp_path):
    rng, rows = random.Random(8), write_exam(tmp_path / "exam")
    leaks, (text, options) = [], rows[0]
    listed = "".join(f"\n({k}) {o}" for k, o in zip("ABCD", options, strict=True))
    leaks.append(asked(f"请回答：{text}，____？{listed}", "B"))
    leaks.append({"text": "前言" + rows[1][0] + "后语"})
    changed = rows[12][0][:15] + "改" + rows[12][0][16:]
    leaks.append({"instruction": "选", "input": changed, "output": ""})
    leaks.append({"conversations": [user(sentence(rng, 9))], "chosen": assistant(rows[13][0]),
                  "rejected": assistant("no")})
    clean = [asked(sentence(rng, 50), rows[5][0][:14]) for _ in range(200)]
    train = jsonl(tmp_path / "train.jsonl", *clean[:100], *leaks, *clean[100:])
    hits, out = run_lab("overlap", [train], "--exam", tmp_path / "exam",
                        output=tmp_path / "hits.jsonl")
    assert [(h["kind"], h["exam"].split("/")[-1], h["row"].split()[-1]) for h in hits] == [
        ("exact", "law_val.csv row 1", "101"), ("exact", "law_val.csv row 2", "102"),
        ("near", "law_test.csv row 3", "103"), ("exact", "law_test.csv row 4", "104")]
    assert hits[2]["covered"] == pytest.approx(29 / 30) and hits[0]["options_covered"] == 1
    table = {line.split()[0][-4:]: line.split()[1:] for line in out.splitlines() if "exam/" in line}
    assert table["/val"] == ["10", "2", "0", "0"] and table["test"] == ["10", "1", "1", "0"]
    assert "CONTAMINATED: 4 questions" in out


@pytest.fixture
def short_exam(tmp_path):
    """An exam of one question that says little without its options."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val/x_val.csv").write_text(
        "id,question,A,B,C,D,answer\n"
        "0,下列说法正确的是____。,地球是圆的,太阳绕地球转,水不会沸腾,铁是木头,A\n",
        encoding="utf-8")
    return tmp_path


def test_a_common_short_question_counts_only_with_its_options(short_exam, tmp_path):
    rows = [asked("下列说法正确的是\nA. 猫会飞\nB. 狗会说话", "都不对"),
            asked("下列说法正确的是：A、地球是圆的 B、太阳绕地球转 C、水不会沸腾 D、铁是木头",
                  "A")]
    hits, out = run_lab("overlap", [jsonl(tmp_path / "a.jsonl", rows[0])], "--exam", tmp_path)
    assert [h["kind"] for h in hits] == ["short"] and "clean; 1 short" in out
    hits, out = run_lab("overlap", [jsonl(tmp_path / "a.jsonl", *rows)], "--exam", tmp_path)
    assert [h["kind"] for h in hits] == ["short", "exact"] and "CONTAMINATED: 1 questions; 0" in out


def test_a_short_question_that_stands_without_options_scores_with_the_clean(short_exam, tmp_path):
    folder = tmp_path / "scores"
    folder.mkdir()
    answer = {"subject": "x", "id": "0", "answer": "A", "prediction": "A"}
    jsonl(folder / "predictions.jsonl", answer)
    (folder / "results.json").write_text('{"split": "val", "correct": 1}')
    row = asked("下列说法正确的是\nA. 猫会飞\nB. 狗会说话", "都不对")
    status, out, err = command("labs/overlap.py", jsonl(tmp_path / "a.jsonl", row), "--exam",
                               tmp_path, "--clean", folder)
    found = [line.removeprefix(f"{folder}, ").split() for line in out.splitlines()
             if line.startswith(f"{folder}, ")]
    assert status == 0 and "clean; 1 short" in out, err
    assert found[0][:3] == ["clean", "1", "1"] and found[1][:4] == ["the", "rest", "0", "0"]


def test_clean_files_are_called_clean(tmp_path):
    write_exam(tmp_path / "exam")
    train = jsonl(tmp_path / "train.jsonl", asked("天气如何", "很好"), {"text": ""})
    status, out, _ = command("labs/overlap.py", train, "--exam", tmp_path / "exam")
    assert status == 0 and "clean; 0 short" in out
    status, _, err = command("labs/overlap.py", train, "--exam", tmp_path / "none")
    assert status == 2 and "--exam needs a folder" in err
    for flags in (["--output", train], ["--near", 2]):  # neither may cost the training data
        status, _, err = command("labs/overlap.py", train, "--exam", tmp_path / "exam", *flags)
        assert status == 2 and flags[0] in err and len(read(train)) == 2


def test_a_score_is_told_apart_by_what_training_held(tmp_path):
    rows = write_exam(tmp_path / "exam")
    train = jsonl(tmp_path / "train.jsonl", *({"text": text} for text, _ in rows[:4]))
    # Right on three of the four leaked questions, and on one of the six others.
    answers = [{"subject": "law", "id": str(k), "answer": "B", "prediction": "B" if k in
                (0, 1, 2, 7) else "A"} for k in range(10)]
    folder = tmp_path / "scores"
    folder.mkdir()
    jsonl(folder / "predictions.jsonl", *answers)
    (folder / "results.json").write_text('{"split": "val", "correct": 4}')
    line = ["labs/overlap.py", train, "--exam", tmp_path / "exam", "--clean", folder]
    status, out, err = command(*line)
    table = [row.split("  ") for row in out.splitlines() if row.startswith(f"{folder}, ")]
    table = [[cell.strip() for cell in row[1:] if cell.strip()] for row in table]
    assert status == 0, err
    assert [row[:3] for row in table] == [["6", "1", "16.7%"], ["4", "3", "75.0%"],
                                          ["10", "4", "40.0%"]]
    assert table[1][3] == "30% - 95%"  # Wilson's interval of 3 of 4

    # What no exam wrote is told in one line.
    for bad, words in (({"subject": "law", "id": "0"}, "expected a line as"),
                       ({**answers[0], "id": [0]}, "is no question of --exam")):
        jsonl(folder / "predictions.jsonl", bad)
        status, out, err = command(*line)
        assert status == 2 and words in err and err.count("\n") == 1 and not out, out
    (folder / "results.json").write_text('{"correct": 4}')
    status, out, err = command(*line)
    assert status == 2 and "names no split" in err and not out
    (folder / "results.json").write_text('{"split": "val", "correct": 4}')

    # The same answers to another exam, or to one without labels, have no such score.
    jsonl(folder / "predictions.jsonl", {**answers[0], "subject": "art"})
    assert "('art', '0') is no question of --exam" in command(*line)[2]
    (folder / "results.json").write_text('{"split": "test", "correct": null}')
    assert "without labels" in command(*line)[2]
    (folder / "results.json").unlink()
    status, _, err = command(*line)
    assert status == 2 and "no results.json" in err


@pytest.mark.skipif(not (SHARED / "data/cmmlu").exists(), reason="no ../shared")
def test_every_question_of_cmmlu_is_found_in_training_data_made_from_it(tmp_path):
    files = sorted((SHARED / "data/cmmlu/test").glob("*.csv"))[:3]
    run_lab("exam_rows", files, "--from_exam", output=tmp_path / "leak.jsonl")
    _, out = run_lab("overlap", [tmp_path / "leak.jsonl"], "--exam", SHARED / "data/cmmlu/test",
                 output=tmp_path / "hits.jsonl")
    count = sum(len(list(evaluation.read_csv(path))) for path in files)
    found = int(out.split("CONTAMINATED: ")[1].split()[0])
    assert count <= found <= count + 5  # a question of two subjects may be the same
