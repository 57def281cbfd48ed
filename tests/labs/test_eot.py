"""train_sft.py --eot: a token of its own that ends an answer."""

from types import SimpleNamespace

import pytest
import torch
from conftest import asked, assistant, command, jsonl, user
from families import make_checkpoint
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import model as modeling
import train_sft
from model import InputError


@pytest.mark.parametrize("family", ["llama2", "qwen3"])  # plain head and tied one
def test_new_turn_end_begins_as_eos_and_ends_the_answer(family, tmp_path):
    make_checkpoint(tmp_path / "base", family)
    path = jsonl(tmp_path / "a.jsonl", *(asked(f"q{k}", "an answer") for k in range(4)))
    flags = ["--model", tmp_path / "base", "--data", path, "--output_dir", tmp_path / "out",
             "--eot", "<|end|>", "--steps", 1, "--learning_rate", 1e-30, "--weight_decay", 0]
    status, _, err = command("train_sft.py", *flags)
    assert status in (0, None), err
    before, after = data.ChatTokenizer(tmp_path / "base"), data.ChatTokenizer(tmp_path / "out")
    old, new = modeling.load(tmp_path / "base"), modeling.load(tmp_path / "out")
    end, eos = after.stop_id, before.eos_id
    stored = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert end == stored.token_to_id("<|end|>") != eos == after.eos_id
    for a, b in ((old.model.embed_tokens.weight, new.model.embed_tokens.weight),
                 (old.head, new.head)):
        assert torch.equal(b[end], a[eos]) and torch.equal(b[:end], a[:end])
        assert torch.equal(b[end + 1 :], a[end + 1 :])
    messages = [user("q"), assistant("an answer")]
    ids, spans = after.encode(after.conversation(messages))[0]
    assert ids[spans[-1][1] - 1] == end
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(messages, return_dict=False) == ids.tolist()
    their_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert end in their_model.generation_config.eos_token_id
    assert their_model.config.vocab_size == len(new.model.embed_tokens.weight) > end


def test_training_on_with_the_same_turn_end_keeps_what_it_learnt(tmp_path):
    make_checkpoint(tmp_path / "base", "llama2")
    path = jsonl(tmp_path / "a.jsonl", *(asked(f"q{k}", "an answer") for k in range(4)))

    def train(model, out, *flags):
        status, _, err = command("train_sft.py", "--model", model, "--data", path, "--steps", 2,
                                 "--output_dir", out, "--learning_rate", 1e-2, *flags)
        assert status in (0, None), err
        return modeling.load(out)

    first = train(tmp_path / "base", tmp_path / "one", "--eot", "<|end|>")
    tokenizer = data.ChatTokenizer(tmp_path / "one")
    row = first.head[tokenizer.stop_id]
    assert not torch.equal(row, first.head[tokenizer.eos_id])
    c = SimpleNamespace(model=tmp_path / "one", dropout=[0.0], checkpoint_activations=False,
                        compile=False)
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    again = data.ChatTokenizer(tmp_path / "one", eot="<|end|>")
    loaded, _ = train_sft.load_trainable(c, hardware, again)
    assert torch.equal(loaded.head[again.stop_id], row)
    train(tmp_path / "one", tmp_path / "two")  # without the flag the checkpoint remembers it
    assert data.ChatTokenizer(tmp_path / "two").stop_id == tokenizer.stop_id


@pytest.mark.parametrize("token", ["<|im_start|>", "<|endoftext|>"])
def test_a_token_the_checkpoint_knows_keeps_its_row_or_is_refused_as_turn_end(token, tmp_path):
    make_checkpoint(tmp_path / "base", "qwen2")
    if token == "<|im_start|>":  # the template begins turns with it
        with pytest.raises(InputError, match="writes <.im_start.> elsewhere too"):
            data.ChatTokenizer(tmp_path / "base", eot=token)
        return
    tokenizer = data.ChatTokenizer(tmp_path / "base", eot=token)
    c = SimpleNamespace(model=tmp_path / "base", dropout=[0.0], checkpoint_activations=False,
                        compile=False)
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    loaded, _ = train_sft.load_trainable(c, hardware, tokenizer)
    row = modeling.load(tmp_path / "base").model.embed_tokens.weight[tokenizer.stop_id]
    assert torch.equal(loaded.model.embed_tokens.weight[tokenizer.stop_id], row)


@pytest.mark.parametrize("token", ["end", "</s>"])
def test_a_turn_end_must_look_like_a_token_and_not_be_eos(token, tmp_path):
    make_checkpoint(tmp_path / "base", "llama2")
    with pytest.raises(InputError, match="--eot: expected a token"):
        data.ChatTokenizer(tmp_path / "base", eot=token)
