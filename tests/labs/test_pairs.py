"""Preference pairs from samples: the best answer against the worst."""

import json
from collections import Counter

import families
import pytest
import torch
from conftest import assistant, command, jsonl, read, user
from transformers import AutoModelForCausalLM

import data


def sample(question, answer, **more):
    return {"messages": [user(question), assistant(answer)], "finish": "stop", **more}


def run(tmp_path, rows, *flags, status=0):
    path = jsonl(tmp_path / "samples.jsonl", *rows)
    code, out, err = command("labs/pairs.py", path, "--output", tmp_path / "pairs.jsonl", *flags)
    assert code == status, out + err
    return read(tmp_path / "pairs.jsonl") if not status else err


SAMPLES = [sample("2+2", text, reference="4") for text in ("5", " 4 ", "six")]
TIE = [sample("1+1", text, reference="2") for text in ("2", "2")]


def test_answer_that_is_the_reference_is_chosen_and_ties_are_dropped(tmp_path):
    (row,) = run(tmp_path, SAMPLES + TIE + [sample("alone", "a", reference="a")])
    assert row == {"prompt": [user("2+2")], "chosen": " 4 ", "rejected": "5"}
    parsed = data.parse_row("here", row)
    assert parsed.chosen == [assistant(" 4 ")] and parsed.messages == [user("2+2")]


def test_ties_and_lone_answers_are_counted(tmp_path, capsys):
    path = jsonl(tmp_path / "s.jsonl", *SAMPLES, *TIE, sample("alone", "a", reference="a"))
    _, out, _ = command("labs/pairs.py", path, "--output", tmp_path / "p.jsonl")
    assert "dropped 1: prompts whose answers score alike" in out
    assert "dropped 1: prompts with one answer" in out
    assert "6 answers to 3 prompts" in out and "mean 0.667, of the best answers 1.000" in out


def test_shorter_answer_wins_by_length(tmp_path):
    (row,) = run(tmp_path, SAMPLES, "--by", "length")
    assert (row["chosen"], row["rejected"]) == ("5", " 4 ")


def test_unfinished_answer_loses_to_a_wrong_one(tmp_path):
    rows = [sample("q", "a", reference="a"), sample("q", "b", reference="a")]
    rows[0]["finish"] = "length"
    (row,) = run(tmp_path, rows)
    assert (row["chosen"], row["rejected"]) == ("b", "a")


def test_labelled_answers_to_one_prompt_become_a_pair(tmp_path):
    rows = [{"prompt": "q", "completion": "bad", "label": False},
            {"prompt": "other", "completion": "x", "label": True},
            {"prompt": "q", "completion": "good", "label": True}]
    (row,) = run(tmp_path, rows, "--by", "label")
    assert (row["chosen"], row["rejected"]) == ("good", "bad")


def test_tools_are_part_of_a_prompt(tmp_path):
    """Answers of who could call a function are no rivals of those who could not."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = SAMPLES + [{**row, "tools": tools} for row in SAMPLES[:2]]
    plain, called = run(tmp_path, rows)
    assert called == {**plain, "tools": tools} and "tools" not in plain
    assert data.parse_row("here", called).tools == tools


def test_function_of_a_file_is_the_reward(tmp_path):
    (tmp_path / "r.py").write_text("def b(messages, answer, reference):\n"
                                   "    return answer.count('b') - len(messages)\n")
    rows = [sample("q", text) for text in ("b", "bb", "a")]
    (row,) = run(tmp_path, rows, "--by", "reward", "--reward", f"{tmp_path / 'r.py'}:b")
    assert (row["chosen"], row["rejected"]) == ("bb", "a")


def test_logprob_is_the_mean_per_token_of_transformers(tmp_path):
    families.make_checkpoint(tmp_path / "base", "llama3")
    rows = [sample("the sea", text) for text in ("moon", "the river runs", "people on the moon")]
    (row,) = run(tmp_path, rows, "--by", "logprob", "--model", tmp_path / "base")
    model, means = AutoModelForCausalLM.from_pretrained(tmp_path / "base").float(), {}
    tokenizer = data.ChatTokenizer(tmp_path / "base")
    for r in rows:
        prompt = tokenizer.prompt_ids(r["messages"][:1])
        parsed = [data.parse_row("", r)]
        (example,) = data.to_examples(parsed, 0, Counter(), tokenizer, keep_all=True)
        ids = torch.tensor([example.ids.tolist()])
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        means[r["messages"][1]["content"]] = logp[len(prompt) - 1 :].mean().item()
    assert row["chosen"] == max(means, key=means.get)
    assert row["rejected"] == min(means, key=means.get)


@pytest.mark.parametrize("rows,flags,words", [
    ([sample("q", "a")], [], "line 1: --by match needs a text as `reference`"),
    ([sample("q", "", reference="")], [], "line 1: --by match needs a text as `reference`"),
    ([sample("q", "B", reference="b")], ["--by", "reward", "--reward", "exam"],
     "line 1: the row has no reference to compare"),
    ([sample("q", "a")], ["--by", "label"], "--by label needs a label"),
    ([{"prompt": "q", "chosen": "a", "rejected": "b"}], ["--by", "length"], "expected a question"),
    (SAMPLES, ["--by", "reward"], "--by reward and --reward go together"),
    (SAMPLES, ["--by", "logprob"], "--by logprob and --model go together")])
def test_bad_input_ends_with_one_line(tmp_path, rows, flags, words):
    error = run(tmp_path, rows, *flags, status=2)
    assert words in error and error.count("\n") == 1


def test_output_never_replaces_an_input(tmp_path):
    path = jsonl(tmp_path / "s.jsonl", *SAMPLES)
    before = (tmp_path / "s.jsonl").read_bytes()
    code, _, error = command("labs/pairs.py", path, "--output", path)
    assert code == 2 and "is the input" in error
    assert (tmp_path / "s.jsonl").read_bytes() == before
    assert json.loads(before.splitlines()[0])["reference"] == "4"
