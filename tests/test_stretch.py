"""Longer context: how RoPE is stretched, and that other tools read what is written."""

import json

import pytest
import torch
from conftest import TOLERANCE, asked, jsonl, train
from families import make_checkpoint
from transformers import AutoModelForCausalLM

import model as modeling

SHAPE = {"model_type": "llama", "vocab_size": 9, "hidden_size": 128, "intermediate_size": 9,
         "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 16}


@pytest.mark.parametrize("times,theta", [
    (2, 20221.26), (4, 40889.94), (6, 61730.94), (8, 82684.62), (24, 252417.44)])
def test_ntk_aware_theta_worked_out_by_hand_and_two_stages_are_one(times, theta):
    config = modeling.read_config(SHAPE)
    once = modeling.stretch(config, 16 * times, "", 0)
    assert once.rope["rope_theta"] == pytest.approx(theta, abs=5e-3)
    twice = modeling.stretch(modeling.stretch(config, 20, "", 0), 16 * times, "", 0)
    assert twice.rope["rope_theta"] == pytest.approx(theta, abs=5e-3)
    assert (once.rope["rope_type"], once.max_position_embeddings) == ("default", 16 * times)


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("flags", [
    "--context 512", "--rope_scaling linear --rope_factor 4", "--rope_scaling yarn --rope_factor 4",
    "--rope_scaling dynamic --rope_factor 4", "--rope_scaling llama3 --rope_factor 4"])
def test_stretched_checkpoint_has_the_same_logits_in_transformers(flags, style, tmp_path):
    make_checkpoint(tmp_path / "base", "llama2", style)
    rows = jsonl(tmp_path / "a.jsonl", *(asked(f"q{k}", "yes") for k in range(4)))
    train(tmp_path, "out", "--model", tmp_path / "base", "--data", rows, "--steps", 1,
          *flags.split())
    ids = torch.randint(100, (300,), generator=torch.Generator().manual_seed(0))
    ours = modeling.load(tmp_path / "out")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids[None]).logits[0]
        states, _ = ours.hidden(ids, [300])
        before, _ = modeling.load(tmp_path / "base").hidden(ids, [300])
    assert (ours.next_logits(states) - wanted).abs().max() < TOLERANCE
    assert (states - before).abs().max() > 0.1
    positions = json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"]
    assert positions == (128 if "dynamic" in flags else 512)


def test_llama3_scaling_has_the_bounds_of_llama_3_1():
    rope = modeling.stretch(modeling.read_config(SHAPE), 0, "llama3", 8.0).rope
    assert (rope["low_freq_factor"], rope["high_freq_factor"]) == (1.0, 4.0)


def test_rope_that_is_scaled_already_is_not_stretched_again(tmp_path):
    make_checkpoint(tmp_path / "base", "llama3")
    rows = jsonl(tmp_path / "a.jsonl", asked("q", "a"))
    _, text = train(tmp_path, "out", "--model", tmp_path / "base", "--data", rows, "--context", 512,
                    status=2)
    assert "RoPE is scaled already (llama3)" in text and text.count("\n") == 1
