"""Prefix tuning: PEFT's file and numbers, a frozen model, what a prefix can learn."""

import families
import peft
import pytest
import torch
from conftest import command, jsonl
from transformers import AutoModelForCausalLM

import data
import model as modeling
from labs import prefix

ROWS = [{"prompt": "the sea", "response": text} for text in ("river runs", "moon on people")]
FAMILIES = ["smollm2", "qwen2", "qwen3"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("prefix") / request.param
    families.make_checkpoint(path, request.param)
    return path


def examples(folder):
    return data.load_examples([str(jsonl(folder.parent / "rows.jsonl", *ROWS))],
                              data.ChatTokenizer(folder))[0]


def test_saved_prefix_gives_pefts_logits(folder, tmp_path):
    model = modeling.load(folder)
    tuned = prefix.PrefixTuning(model.config, 5)
    prefix.save_prefix(tuned, str(folder), tmp_path)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    ids = torch.arange(3, 12)
    states, _ = model.hidden(ids, [9], tuned.prefix(1))
    expected = theirs(ids[None]).logits[0]
    plain, _ = model.hidden(ids, [9])
    assert (model.next_logits(states) - expected).abs().max() < 1e-5
    assert (model.next_logits(plain) - expected).abs().max() > 1e-3


def test_gradient_of_the_table_is_pefts(folder):
    model, some = modeling.load(folder).requires_grad_(False), examples(folder)
    tuned = prefix.PrefixTuning(model.config, 4)
    prefix.backward(model, tuned, some, micro_tokens=1)  # an example at a time

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    (table,) = (p for p in theirs.parameters() if p.requires_grad)
    table.data.copy_(tuned.table().data)
    total = sum(e.targets for e in some)
    for e in some:
        (start, end, _), = e.spans
        ids = torch.from_numpy(e.ids).long()[None]
        logp = theirs(ids).logits[0, start - 1 : end - 1].log_softmax(-1)
        (-logp.gather(1, ids[0, start:end, None]).sum() / total).backward()
    assert (tuned.embeddings.grad - table.grad).norm() < 1e-4 * table.grad.norm()


def test_words_as_a_prefix_are_the_words_themselves(folder):
    model, ids = modeling.load(folder), torch.arange(3, 15)
    tuned = prefix.PrefixTuning(model.config, 7)
    tuned.embeddings.data = prefix.words_table(model, ids[:7])
    whole, _ = model.hidden(ids, [12])
    rest, _ = model.hidden(ids[7:], [5], tuned.prefix(1))
    assert torch.allclose(rest, whole[7:], atol=1e-5)


@pytest.mark.parametrize("start", ["random", "words", "mlp"])
def test_the_loss_falls_and_the_model_stays_as_it_was(folder, start):
    model, some = modeling.load(folder), examples(folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    c = prefix.Config(steps=60, tokens=4)
    loss = prefix.backward(model, None, some, 100)
    tuned = prefix.learn(model, some, start, c, seed=0)
    assert prefix.backward(model, tuned, some, 100) < loss - 0.2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_greedy_decoding_repeats_what_is_counted_as_right(folder):
    model, some = modeling.load(folder), examples(folder)[:1]
    assert prefix.right(model, None, some, 100) == 0.0
    prefix.learn(model, some, "full", prefix.Config(steps=60, learning_rate=3e-3), seed=0)
    (start, end, _), = some[0].spans
    new = modeling.generate(model.eval(), [some[0].ids[:start].tolist()], end - start)[0]
    assert prefix.right(model, None, some, 100) == 1.0 and new == some[0].ids[start:end].tolist()


def test_a_file_becomes_an_adapter_and_what_stands_there_is_refused(folder, tmp_path):
    examples(folder)
    flags = ["--model", folder, "--data", folder.parent / "rows.jsonl", "--steps", 2,
             "--output_dir", tmp_path / "out"]
    status, out, err = command("labs/prefix.py", *flags)
    assert status == 0 and "repeated greedily" in out, err
    status, _, err = command("labs/prefix.py", *flags)
    assert status == 2 and "holds a checkpoint" in err and err.count("\n") == 1


def test_start_words_begins_with_the_first_rows_tokens(folder):
    model, some = modeling.load(folder), examples(folder)
    tuned = prefix.learn(model, some, "words", prefix.Config(steps=0, tokens=4), seed=0)
    ids = torch.tensor(some[0].ids[:4]).long()
    assert torch.equal(tuned.table(), prefix.words_table(model, ids))


@pytest.mark.parametrize("flag,value", [("--learning_rate", "nan"), ("--learning_rate", -3),
                                        ("--steps", -1), ("--seeds", 2)])
def test_bad_numbers_end_with_one_line_and_leave_no_prefix(folder, tmp_path, flag, value):
    examples(folder)
    status, _, err = command("labs/prefix.py", "--model", folder, "--data", folder.parent /
                             "rows.jsonl", "--output_dir", tmp_path / "out", flag, value)
    assert status == 2 and flag in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag,value", [("--tokens", 0), ("--model", "nowhere"), ("--steps", -1),
                                        ("--start", "zeros"), ("--start", "words"),
                                        ("--output_dir", "elsewhere")])
def test_bad_flags_end_with_one_line(flag, value):
    status, _, err = command("labs/prefix.py", flag, value)
    assert status == 2 and err.count("\n") == 1
