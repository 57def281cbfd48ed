"""The built-in demo: a world that teaches, and an exam that is not in the training data."""

import csv
import json
from collections import Counter

import pytest

import data
import eval as evaluation
import labs.world as world_lab
import model as modeling


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world_lab.make_demo(folder)
    world_lab.make_demo_model(folder / "base")
    return folder


def questions(world, split):
    """{subject: rows} of one split of the exam."""
    out = {}
    for path in sorted((world / "exam" / split).glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            out[path.name.removesuffix(f"_{split}.csv")] = list(csv.DictReader(file))
    return out


def training_files(world):
    return [world / name for name in ("practice.jsonl", "instructions.jsonl", "identity.jsonl",
                                      "text.txt", "pairs.jsonl")]


def test_no_question_of_the_exam_occurs_in_training(world):
    seen = "\n".join(json.loads(line)["instruction"] if '"instruction"' in line else line
                     for path in training_files(world)
                     for line in path.read_text(encoding="utf-8").splitlines())
    stems = {q["question"] for split in ("dev", "val", "test")
             for rows in questions(world, split).values() for q in rows}
    assert len(stems) > 100 and seen.count("____") > 10_000
    assert not any(stem in seen for stem in stems)


def test_exam_has_c_evals_layout_in_all_four_categories(world):
    mapping = json.loads((world / "exam/subject_mapping.json").read_text(encoding="utf-8"))
    assert {entry[2] for entry in mapping.values()} == {
        "STEM", "Social Science", "Humanities", "Other"}
    columns = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split, size, width in (("dev", 5, 8), ("val", 40, 7), ("test", 20, 6)):
        found = questions(world, split)
        assert set(found) == set(mapping)
        for rows in found.values():
            assert len(rows) == size and list(rows[0]) == columns[:width]
            assert [row["id"] for row in rows] == [str(i) for i in range(size)]
            assert all(len({row[letter] for letter in "ABCD"}) == 4 for row in rows)


def test_always_answering_one_letter_scores_about_a_quarter(world):
    letters = Counter(q["answer"] for rows in questions(world, "val").values() for q in rows)
    assert letters.total() == 320
    assert all(0.18 < count / 320 < 0.32 for count in letters.values())


def test_answers_are_right(world):
    """Each answer is the fact's other half, looked up independently in the table."""
    facts = {h: [(f["k"], f["v"]) for f in world_lab.demo_facts(h)] for h in world_lab.SUBJECTS}
    for subject, rows in questions(world, "val").items():
        for row in rows:
            quoted = row["question"].split("“")[1].split("”")[0]
            right = {v for k, v in facts[subject] if k == quoted}
            right |= {k for k, v in facts[subject] if v == quoted}
            chosen = [letter for letter in "ABCD" if row[letter] in right]
            # a number is the one after its predecessor and the one before its successor
            assert row["answer"] in chosen and (len(chosen) == 1 or subject == "numbers"), row


def test_world_is_a_function_of_its_seed(world, tmp_path):
    def contents(folder):
        return {str(p.relative_to(folder)): p.read_bytes()
                for p in folder.rglob("*") if p.is_file()}

    world_lab.make_demo(tmp_path / "same")
    world_lab.make_demo_model(tmp_path / "same" / "base")
    assert contents(tmp_path / "same") == contents(world)
    world_lab.make_demo(tmp_path / "other", seed=1)
    assert contents(tmp_path / "other")["practice.jsonl"] != contents(world)["practice.jsonl"]


def test_sizes_of_the_sources_differ_tenfold_and_all_files_read(world):
    sizes = {path.name: sum(1 for _ in data.read_rows([path])) for path in training_files(world)}
    assert sizes["practice.jsonl"] > 10 * sizes["instructions.jsonl"]
    assert sizes["instructions.jsonl"] > 10 * sizes["identity.jsonl"]
    held = [row for _, row in data.read_rows([world / "pairs_val.jsonl"])]
    asked = {row.messages[0]["content"] for _, row in data.read_rows([world / "pairs.jsonl"])}
    assert len(held) == 40 and not any(row.messages[0]["content"] in asked for row in held)


def test_untrained_model_scores_near_the_floor(world):
    model, tokenizer = modeling.load(world / "base"), data.ChatTokenizer(world / "base")
    assert tokenizer.template.name == "chatml" and len(tokenizer.decode([0])) > 1
    right, count = evaluation.count_right(model, tokenizer, world / "exam")
    assert count == 320 and 0.15 < right / count < 0.35
