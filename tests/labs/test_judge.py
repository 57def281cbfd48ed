"""A model as judge: verdicts in both orders, their counts, and the rows that teach it."""

import families
import pytest
import torch
from conftest import assistant, command, jsonl, read, user
from transformers import AutoModelForCausalLM

import data
import model as modeling
from labs import judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    families.make_checkpoint(folder / "base", "llama3")
    return folder


def answers(path, *texts):
    return jsonl(path, *({"messages": [user(f"question {i}"), assistant(text)]}
                         for i, text in enumerate(texts)))


@pytest.mark.parametrize("order,swapped,expected", [
    (1.0, -1.0, "win"), (-1.0, 1.0, "loss"), (1.0, 1.0, "tie"), (-1.0, -1.0, "tie"),
    (0.0, -1.0, "tie")])
def test_answer_wins_only_if_it_wins_in_both_orders(order, swapped, expected):
    assert judge.verdict(order, swapped) == expected


def test_judge_that_prefers_the_first_answer_decides_nothing_and_is_found_out():
    found = judge.summarize([2.0] * 5, [3.0] * 5)
    assert (found["wins"], found["losses"], found["ties"]) == (0, 0, 5)
    assert found["win rate"] == 0.5 and found["verdicts for the first"] == 1.0


def test_win_rate_counts_a_tie_as_half_and_wilsons_interval_is_of_the_decided():
    found = judge.summarize([1, 1, 1, -1, 1], [-1, -1, -1, 1, 1])
    assert (found["wins"], found["losses"], found["ties"]) == (3, 1, 1)
    assert found["win rate"] == pytest.approx(0.7)
    assert found["wins of decided"] == 0.75 and found["verdicts for the first"] == 0.6
    # Wilson (1927) for 3 of 4, by hand: z = 1.96
    assert (found["low"], found["high"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)


def test_margins_are_those_of_transformers_in_both_orders(folder):
    model, tokenizer = modeling.load(folder / "base"), data.ChatTokenizer(folder / "base")
    pairs = [([user("the sea")], "moon", "the river runs"), ([user("光")], "a", "b c")]
    order, swapped = judge.judge(model, tokenizer, pairs, 100)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base").float()
    a, b = (tokenizer.tokenizer.token_to_id(letter) for letter in "AB")
    for (messages, left, right), *found in zip(pairs, order, swapped, strict=True):
        for first, second, margin in ((left, right, found[0]), (right, left, found[1])):
            prompt = tokenizer.prompt_ids([user(judge.ask(messages, first, second))])
            logp = theirs(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            assert margin == pytest.approx((logp[a] - logp[b]).item(), abs=1e-4)


def test_swapping_the_files_swaps_wins_and_losses(folder, tmp_path):
    texts = ("moon", "the river", "people", "sea on sea"), ("a", "b", "光光", "on")
    left, right = (answers(tmp_path / f"{k}.jsonl", *side) for k, side in enumerate(texts))
    model, tokenizer = modeling.load(folder / "base"), data.ChatTokenizer(folder / "base")
    found = []
    for files in ([left, right], [right, left]):
        pairs = judge.read_answers(judge.Config(files=files))
        found.append(judge.summarize(*judge.judge(model, tokenizer, pairs, 1000)))
    assert found[0]["wins"] == found[1]["losses"] and found[0]["losses"] == found[1]["wins"]
    assert found[0]["ties"] == found[1]["ties"]


def test_command_prints_the_table_and_writes_every_verdict(folder, tmp_path):
    left, right = (answers(tmp_path / f"{name}.jsonl", "moon", name) for name in "ab")
    status, out, err = command("labs/judge.py", left, right, "--model", folder / "base",
                               "--output", tmp_path / "verdicts.jsonl")
    assert status == 0, err
    rows = read(tmp_path / "verdicts.jsonl")
    assert [row["left"] for row in rows] == ["moon", "a"]
    assert rows[0]["verdict"] == "tie"  # the same answer twice
    assert "of 2 pairs, judged by" in out and "value" not in out
    assert "win rate" in out and "verdicts for the first" in out


def test_training_rows_hold_each_pair_in_both_orders(tmp_path):
    path = jsonl(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "good", "rejected": "bad"})
    status, _, err = command("labs/judge.py", path, "--train", "--output", tmp_path / "rows.jsonl")
    assert status == 0, err
    one, two = read(tmp_path / "rows.jsonl")
    assert one == {"prompt": judge.ask([user("q")], "good", "bad"), "response": "A"}
    assert two == {"prompt": judge.ask([user("q")], "bad", "good"), "response": "B"}


def test_bad_input_ends_with_one_line(folder, tmp_path):
    one, two = answers(tmp_path / "one.jsonl", "a"), answers(tmp_path / "two.jsonl", "a", "b")
    other = jsonl(tmp_path / "other.jsonl", {"messages": [user("else"), assistant("a")]})
    model = ["--model", folder / "base"]
    for arguments, words in (
            ([one, *model], "expected two files of answers, found 1"),
            ([one, two, *model], "they must answer the same questions"),
            ([one, other, *model], "answer different questions"), ([one, one], "--model DIR"),
            ([one, "--train", "--output", tmp_path / "x.jsonl"], "expected a preference pair"),
            ([one, "--train", "--output", tmp_path / "x.jsonl", *model], "leave --model out"),
            ([one, "--train"], "--output must be given")):
        status, _, error = command("labs/judge.py", *arguments)
        assert status == 2 and words in error and error.count("\n") == 1, error
