"""Long context in stages: the loss by position, and the run as a whole."""

import json

import pytest
import torch
from conftest import command, jsonl

import data
import model as modeling
from labs import context


def test_loss_by_position_is_the_mean_over_the_texts_that_reach_there(letters):
    config = modeling.read_config({
        "model_type": "llama", "vocab_size": letters.vocab_size, "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    model = modeling.Llama(config)
    model.initialize(0)
    encoded = letters.encode([letters.text("a" * 9), letters.text("b" * 4)])
    examples = [data.Example(*pair) for pair in encoded]
    found = context.loss_by_position(model, examples, 4)
    by_hand = [[] for _ in found]
    for e in examples:
        ids = torch.tensor(e.ids, dtype=torch.long)
        logp = modeling.plain_logprobs(model.hidden(ids, [len(ids)])[0][:-1], model.head, ids[1:])
        for position, value in enumerate(logp.tolist(), 1):
            by_hand[position // 4].append(-value)
    assert found == pytest.approx([sum(x) / len(x) for x in by_hand], abs=1e-5)


def test_two_stages_leave_three_checkpoints_a_table_and_longer_positions(tmp_path):
    out = tmp_path / "out"
    status, text, err = command("labs/context.py", "--output_dir", out, "--positions", 32,
                                "--steps", 4, "--texts", 3, "--bucket", 32)
    assert (status, err) == (0, ""), err
    found = {}
    for name in ("base", "stage1", "stage2"):
        config = json.loads((out / name / "config.json").read_text())
        found[config["max_position_embeddings"]] = config["rope_theta"]
    assert list(found) == [32, 64, 128] and sorted(found.values()) == list(found.values())
    table = text.splitlines()[-5:]
    assert table[0].split() == "up to position base only stretched stage1 stage2".split()
    assert [line.split()[0] for line in table[1:]] == ["32", "64", "96", "128"]


def test_bad_flags_end_with_one_line_and_write_nothing(tmp_path):
    jsonl(tmp_path / "config.json", {})
    for flags, said in ((["--positions", 8], "--positions must be 32"),
                        (["--output_dir", tmp_path], "holds a checkpoint")):
        status, _, err = command("labs/context.py", *flags)
        assert status == 2 and err.count("\n") == 1 and said in err
