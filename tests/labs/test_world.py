"""The built-in demo: a world that teaches, and an exam that is not in the training data."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import REPO

import data
import eval as evaluation
import labs.world as world_lab
import model as modeling

TRAINING = ("practice.jsonl", "instructions.jsonl", "identity.jsonl", "text.txt", "pairs.jsonl")
HELD_OUT = ("practice_val.jsonl", "instructions_val.jsonl", "pairs_val.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world_lab.make_demo(folder)
    world_lab.make_demo_model(folder / "base")
    return folder


def exam_questions(world, split):
    """{subject: rows} of one split of the exam."""
    out = {}
    for path in sorted((world / "exam" / split).glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            out[path.name.removesuffix(f"_{split}.csv")] = list(csv.DictReader(file))
    return out


def json_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def user_texts(path):
    """Everything a user says in a file."""
    return [m["content"] for _, row in data.read_rows([path]) for m in row.messages
            if m["role"] == "user"]


def test_no_question_of_the_exam_and_no_held_out_question_occurs_in_training(world):
    asked = [text for name in TRAINING for text in user_texts(world / name)]
    whole = "\n".join(asked)
    exam = {q["question"] for split in ("dev", "val", "test")
            for rows in exam_questions(world, split).values() for q in rows}
    assert len(exam) == 80 and whole.count("____") == 10_000
    assert not any(question in whole for question in exam)
    for name in HELD_OUT:
        assert not set(user_texts(world / name)) & set(asked), name


def test_validation_asks_the_exams_questions_with_options_drawn_anew(world):
    exam = [q["question"] for rows in exam_questions(world, "val").values() for q in rows]
    validation = user_texts(world / "practice_val.jsonl")
    assert len(validation) == 400
    assert all(any(question in text for question in set(exam)) for text in validation)


def test_every_fact_of_the_exam_is_practised_in_other_words(world):
    practised = "\n".join(user_texts(world / "practice.jsonl"))
    for handle in world_lab.SUBJECTS:
        for fact in world_lab.facts_of(handle):
            for ways in (world_lab.ASK_VALUE, world_lab.ASK_KEY):
                seen = [way for way in ways if way.format(**fact) in practised]
                assert len(seen) == len(ways) - 1, fact


def test_exam_has_c_evals_layout_in_all_four_categories(world):
    mapping = json.loads((world / "exam/subject_mapping.json").read_text(encoding="utf-8"))
    assert {entry[2] for entry in mapping.values()} == {
        "STEM", "Social Science", "Humanities", "Other"}
    columns = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split, size, width in (("dev", 5, 8), ("val", 80, 7), ("test", 20, 6)):
        found = exam_questions(world, split)
        assert set(found) == set(mapping)
        for rows in found.values():
            assert len(rows) == size and list(rows[0]) == columns[:width]
            assert [row["id"] for row in rows] == [str(i) for i in range(size)]
            assert all(len({row[letter] for letter in "ABCD"}) == 4 for row in rows)


def test_always_answering_one_letter_scores_about_a_quarter(world):
    letters = Counter(q["answer"] for rows in exam_questions(world, "val").values() for q in rows)
    assert letters.total() == 320
    assert all(0.18 < count / 320 < 0.32 for count in letters.values())


def test_the_answer_of_a_question_is_the_other_half_of_its_fact(world):
    facts = {h: [(f["k"], f["v"]) for f in world_lab.facts_of(h)] for h in world_lab.SUBJECTS}
    for subject, rows in exam_questions(world, "val").items():
        for row in rows:
            quoted = row["question"].split("“")[1].split("”")[0]
            right = {v for k, v in facts[subject] if k == quoted}
            right |= {k for k, v in facts[subject] if v == quoted}
            assert [row["answer"]] == [x for x in "ABCD" if row[x] in right], row


def test_a_practised_answer_is_the_letter_and_the_text_of_its_option(world):
    for row in json_rows(world / "practice.jsonl")[:500]:
        letter = row["output"][0]
        assert f"\n{row['output']}\n" in row["instruction"] and letter in "ABCD"


def test_nearly_every_fact_is_asked_at_the_first_and_at_the_third_turn_of_training(world):
    chats = [row["messages"] for row in json_rows(world / "instructions.jsonl")]
    assert Counter(len(chat) // 2 for chat in chats).keys() == {1, 2, 3, 4}
    keys = {fact["k"] for handle in world_lab.SUBJECTS for fact in world_lab.facts_of(handle)}
    for turn in (0, 2):
        asked = [chat[2 * turn]["content"] for chat in chats if len(chat) > 2 * turn]
        assert len(keys & {text.split("“")[1].split("”")[0] for text in asked}) >= 36


def test_each_word_of_the_world_is_one_token(world):
    tokenizer = data.ChatTokenizer(world / "base")
    words = [f[half] for h in world_lab.SUBJECTS for f in world_lab.facts_of(h) for half in "kv"]
    assert all(len(tokenizer.tokenizer.encode(word).ids) == 1 for word in words)


def test_world_is_a_function_of_its_seed(world, tmp_path):
    def contents(folder):
        return {str(p.relative_to(folder)): p.read_bytes()
                for p in folder.rglob("*") if p.is_file()}

    world_lab.make_demo(tmp_path / "same")
    world_lab.make_demo_model(tmp_path / "same" / "base")
    assert contents(tmp_path / "same") == contents(world)
    world_lab.make_demo(tmp_path / "other", seed=1)
    assert contents(tmp_path / "other")["practice.jsonl"] != contents(world)["practice.jsonl"]


def test_sizes_of_the_sources_differ_tenfold(world):
    sizes = {name: sum(1 for _ in data.read_rows([world / name])) for name in TRAINING}
    assert sizes["practice.jsonl"] > 10 * sizes["instructions.jsonl"]
    assert sizes["instructions.jsonl"] > 10 * sizes["identity.jsonl"]
    assert sizes["pairs.jsonl"] == 240 and len(json_rows(world / "pairs_val.jsonl")) == 40


def test_untrained_model_scores_near_the_floor(world):
    model, tokenizer = modeling.load(world / "base"), data.ChatTokenizer(world / "base")
    right, count = evaluation.count_right(model, tokenizer, world / "exam")
    assert count == 320 and 0.15 < right / count < 0.35


def test_right_by_turn_asks_every_held_out_question_once_at_each_turn(world, monkeypatch):
    """A stand-in that knows all the facts, but only at the first two turns."""
    known = {row.messages[0]["content"]: row.messages[1]["content"]
             for _, row in data.read_rows([world / "instructions_val.jsonl"])}
    asked = [Counter() for _ in range(4)]

    def answer(model, tokenizer, talks):
        turn = len(talks[0]) // 2
        asked[turn].update(talk[-1]["content"] for talk in talks)
        assert all(len({m["content"] for m in talk[::2]}) == turn + 1 for talk in talks)
        return [known[talk[-1]["content"]] if turn < 2 else "不知道。" for talk in talks]

    monkeypatch.setattr(world_lab, "answer_greedily", answer)
    right, count = world_lab.right_by_turn(SimpleNamespace(), None, world)
    assert (right, count) == ([40, 40, 0, 0], 40)
    assert all(set(a) == set(known) and set(a.values()) == {1} for a in asked)


STOP_AT_TORCH = """
import os, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Stop())
import {module}
"""


@pytest.mark.parametrize("module", ["train_sft", "train_dpo", "eval", "labs.bench", "labs.kto"])
@pytest.mark.parametrize("given,found", [
    ({}, "3000"), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_how_threads_wait_is_set_before_torch_is_imported_unless_the_user_did(module, given, found):
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", STOP_AT_TORCH.format(module=module)],
                          env={**clean, **given}, cwd=REPO, capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == (found, "")
