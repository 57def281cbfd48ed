"""Chain of Hindsight."""

import json
import shutil

import pytest
from conftest import NO, PAIRS, YO, assistant, command, jsonl, run_here, supervised, system, user

import data
from labs import world


def hindsight(tmp_path, tokenizer, *rows, flags=()):
    """(decoded text, supervised texts) of every conversation that labs/coh.py makes of rows."""
    path, output = jsonl(tmp_path / "pairs.jsonl", *rows), tmp_path / "coh.jsonl"
    status, out, err = command("labs/coh.py", path, "--output", output, *flags)
    assert (status, err) == (0, "")
    examples, _ = data.load_examples([str(output)], tokenizer)
    return [(tokenizer.decode(e.ids, False), supervised(tokenizer, e)) for e in examples], out


@pytest.mark.parametrize("question,good,bad", [
    ("Why?", "A good answer:", "A bad answer:"), ("为何？", "好的回答：", "不好的回答：")])
def test_chain_of_hindsight_supervises_both_answers_and_no_feedback_word(
    question, good, bad, tmp_path, letters
):
    row = {"prompt": [system("s"), user("a"), assistant("b"), user(question)], "chosen": "yo",
           "rejected": "no"}
    seen = set()
    for seed in range(8):  # which answer comes first is drawn
        ((text, answers),), _ = hindsight(tmp_path, letters, row, flags=["--seed", seed])
        order = [(good, "yo"), (bad, "no")][:: 1 if answers[0] == "yo<|im_end|>" else -1]
        seen.add(order[0])
        assert answers == [answer + "<|im_end|>" for _, answer in order]
        (first, one), (second, two) = order
        assert text.splitlines() == [
            "system", "s", "user", "a", "assistant", "b", "user", question, first, "assistant",
            one, "user", second, "assistant", two]
    assert len(seen) == 2


def test_chain_of_hindsight_hides_words_only_from_the_second_answers_view_of_the_first(
    tmp_path, letters
):
    words = [f"w{i}" for i in range(200)]
    rows = [{"prompt": "q", "chosen": " ".join(words), "rejected": "春眠不觉晓" * 40}] * 20
    found, _ = hindsight(tmp_path, letters, *rows, flags=["--mask_past", 0.5])
    shares = []
    for (whole, first), (masked, second) in zip(found[::2], found[1::2], strict=True):
        past, (answer,) = first[0].removesuffix("<|im_end|>"), second
        assert len(first) == 1 and past in whole and answer != first[0]
        seen = masked.splitlines()[5 - 1]
        split = str.split if past.startswith("w") else list
        kept = iter(split(past))
        assert all(word in kept for word in split(seen))  # in their order, some are left out
        shares.append(len(split(seen)) / len(split(past)))
        assert answer.removesuffix("<|im_end|>") in (rows[0]["chosen"], rows[0]["rejected"])
    assert 0.4 < min(shares) < max(shares) <= 1 and 0.6 < sum(shares) / 20 < 0.9


def test_chain_of_hindsight_is_a_function_of_its_seed_counts_drops_and_trains_with_sft(
    tmp_path, letters
):
    rows = [*[{"prompt": f"q{i}", "chosen": "yo", "rejected": "no"} for i in range(20)],
            {"prompt": "q", "chosen": "same", "rejected": "same"}]
    flags = ["--mask_past", 0.05]
    one, out = hindsight(tmp_path, letters, *rows, flags=flags)
    assert "kept 40 of 41 rows" in out and "dropped 1: chosen equals rejected" in out
    assert hindsight(tmp_path, letters, *rows, flags=flags)[0] == one
    assert hindsight(tmp_path, letters, *rows, flags=[*flags, "--seed", 1])[0] != one
    shutil.copytree(letters.folder, tmp_path / "model")
    world.make_demo_model(tmp_path / "model")
    status, out = run_here(["train_sft.py", "--model", str(tmp_path / "model"), "--data",
                           str(tmp_path / "coh.jsonl"), "--steps", "1", "--output_dir",
                           str(tmp_path / "out")])
    assert not status and "loss" in out


def test_chain_of_hindsight_keeps_the_tools_of_a_row(tmp_path):
    row = {"prompt": "q", "chosen": "yo", "rejected": "no", "tools": [{"name": "add"}]}
    path, output = jsonl(tmp_path / "pairs.jsonl", row), tmp_path / "coh.jsonl"
    command("labs/coh.py", path, "--output", output, "--mask_past", 0.5)
    for line in output.read_text().splitlines():
        assert json.loads(line)["tools"] == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("rows,flags,said", [
    ([PAIRS["instruction"]], ["--mask_past", 1], "--mask_past"), ([], [], "--output"),
    ([PAIRS["instruction"]], ["--output", "PAIRS"], "is the input"),
    ([{"prompt": "a", "completion": "b"}], [], "line 1: expected a question, chosen and"),
    ([{"chosen": [YO, YO], "rejected": [YO, NO]}], [], "line 1: expected a question, chosen")])
def test_chain_of_hindsight_refuses_bad_input_in_one_line(rows, flags, said, tmp_path):
    path = jsonl(tmp_path / "pairs.jsonl", *rows)
    output = ["--output", tmp_path / "coh.jsonl"] if rows else []
    flags = [path if flag == "PAIRS" else flag for flag in flags]
    status, _, err = command("labs/coh.py", path, *output, *flags)
    assert status == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "coh.jsonl").exists()
    assert (tmp_path / "pairs.jsonl").read_text() == "".join(json.dumps(r) + "\n" for r in rows)
