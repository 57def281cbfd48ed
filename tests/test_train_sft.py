"""The training loop: what it computes, and that no knob of the hardware changes it."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import conftest
import families
import pytest
import torch
import transformers
from conftest import WORDS, assistant, curve, interrupt, jsonl, launcher, read, train, user, weights
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import model as modeling
import train_dpo
import train_sft


def write_rows(path, count, seed=0):
    """Conversations of very different lengths, some with several turns."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        messages = []
        for _ in range(rng.choice([1, 1, 2])):
            question, answer = (conftest.some_words(rng, n) for n in (12, 3 + i % 20))
            messages += [user(question), assistant(answer)]
        rows.append({"messages": messages})
    jsonl(path, *rows)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny Qwen2 checkpoint and files to train on."""
    folder = tmp_path_factory.mktemp("sft")
    families.make_checkpoint(folder / "base", "qwen2")
    write_rows(folder / "rows.jsonl", 24)
    write_rows(folder / "more.jsonl", 7, seed=1)
    write_rows(folder / "val.jsonl", 5, seed=2)
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS[i:]) for i in range(6)))
    return folder


BASIC = ["--steps", "5", "--batch_size", "8", "--learning_rate", "1e-3", "--neftune_alpha", "5",
         "--dropout", "0", "0.1", "--log_every", "1"]


def inputs(work, *files):
    return ["--model", work / "base", "--data", *(work / f for f in files or ["rows.jsonl"])]


@pytest.fixture(scope="module")
def reference(work):
    """The run that the others are compared with: one rank, one micro-batch a step."""
    return train(work, "reference", *inputs(work), *BASIC)


@pytest.fixture(scope="module")
def killed(work):
    """A function that copies a run which was killed after it had saved step 2."""
    interrupt(work, "killed_at_3", *inputs(work), *BASIC, "--save_every", 2, at="step 3/")
    return lambda name: shutil.copytree(work / "killed_at_3", work / name)


# ------------------------------------------------------------------------------------ the loss


def test_message_weights_weigh_the_token_mean(work):
    rows = work / "weighted.jsonl"
    jsonl(rows, {"messages": [user("a"), assistant("b c", weight=0.25), user("a"),
                              assistant("the sea")]})
    records, _ = train(work, "weighted", "--model", work / "base", "--data", rows, "--steps", 1)
    tokenizer = data.ChatTokenizer(work / "base")
    examples, _ = data.load_examples([str(rows)], tokenizer)
    batch = data.collate(examples)
    logp = modeling.load(work / "base")(batch.ids, batch.lengths, batch.targets)
    assert set(batch.weights.tolist()) == {0.25, 1.0}
    expected = -(logp * batch.weights).sum() / batch.weights.sum()
    assert records[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama3", "smollm2", "mistral", "qwen2", "qwen3"])
def test_three_steps_equal_a_plain_transformers_loop(tmp_path, family):
    theirs = families.make_checkpoint(tmp_path / "base", family).train()
    # SmolLM2 pads with the token that ends a turn; transformers then drops that row's gradient
    theirs.model.embed_tokens.padding_idx = None
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    tokenizer = data.ChatTokenizer(tmp_path / "base")
    examples, _ = data.load_examples([str(rows)], tokenizer)
    count = len(examples)  # Qwen3's template rewrites earlier turns: a row can be two examples
    flags = ["--batch_size", count, "--steps", 3, "--learning_rate", 1e-3, "--weight_decay", 0.1,
             "--schedule", "constant", "--warmup", 0, "--max_grad_norm", 1, "--micro_tokens", 100,
             "--adam_epsilon", 1e-6]  # with less, Adam makes a step of a gradient that is rounding
    records, _ = train(tmp_path, "out", "--model", tmp_path / "base", "--data", rows, *flags)

    length = max(len(e.ids) for e in examples)
    ids = torch.zeros(count, length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = torch.from_numpy(e.ids).long()
        mask[row, : len(e.ids)] = 1
        for first, end, _ in e.spans:
            labels[row, first:end] = ids[row, first:end]
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for record in records:
        logits = theirs(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        # From the second step on the rounding of a norm's sums shows: we add in another order.
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=3e-5)
        optimizer.step()
        optimizer.zero_grad()
    ours = modeling.load(tmp_path / "out")
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        # Adam scales each gradient by its own size, so where it is near rounding some percent of
        # a step (1e-3) may differ; a key's bias shifts all scores alike, its gradient is rounding
        assert (p - wanted[name]).abs().max() < (3e-3 if "k_proj.bias" in name else 5e-5), name


def test_checkpoint_reloads_in_transformers_with_the_same_logits(work, reference):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(work / "reference").eval()
    ours = modeling.load(work / "reference")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "reference")
    messages = [user("你好"), assistant("the sea")]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    our_tokenizer = data.ChatTokenizer(work / "reference")
    assert ids == our_tokenizer.encode(our_tokenizer.conversation(messages))[0][0].tolist()
    with torch.no_grad():
        states, _ = ours.hidden(torch.tensor(ids), [len(ids)])
        expected = theirs(torch.tensor([ids])).logits[0]  # [L, V]
    # The rounding of fp32, 1.2e-7 of the largest logit, over all layers.
    torch.testing.assert_close(ours.next_logits(states), expected, rtol=0,
                               atol=4e-6 * expected.abs().max().item())
    stops = transformers.GenerationConfig.from_pretrained(work / "reference").eos_token_id
    assert our_tokenizer.stop_id in stops and our_tokenizer.eos_id in stops


# ------------------------------------------------------------------ what must not change the curve


@pytest.mark.parametrize("flags", [
    ["--micro_tokens", 64], ["--micro_tokens", 1], ["--checkpoint_activations"]])
def test_curve_does_not_depend_on_micro_batches_or_recomputation(work, reference, flags):
    records, _ = train(work, "_".join(map(str, flags)), *inputs(work), *BASIC, *flags)
    assert curve(records) == pytest.approx(curve(reference[0]), abs=1e-5)
    norms = [[r["grad_norm"] for r in rs] for rs in (records, reference[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("flags", [
    BASIC, ["--steps", 2, "--batch_size", 1, "--learning_rate", 1e-3]])
def test_curve_does_not_depend_on_the_number_of_ranks_even_if_one_is_idle(work, flags):
    name = f"batch{flags[3]}"
    one, _ = train(work, name, *inputs(work), *flags)
    two, _ = train(work, name + "x2", *inputs(work), *flags, ranks=2)
    assert curve(two) == pytest.approx(curve(one), abs=1e-5)
    assert [r["tokens"] for r in two] == [r["tokens"] for r in one]


def assert_same(work, one, two):
    """Losses and weights of two runs agree bit for bit."""
    assert curve(conftest.steps(work / one)) == curve(conftest.steps(work / two))
    found = weights(work / two)
    assert all(torch.equal(value, found[name]) for name, value in weights(work / one).items())


def test_resumed_run_equals_uninterrupted_run_bitwise(work, reference):
    """Stopped by SIGTERM somewhere in the middle, then resumed with no flag but --resume."""
    output, status = interrupt(work, "stopped", *inputs(work), *BASIC, at="step 2/",
                               number=signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert f"python train_sft.py --resume --output_dir {work / 'stopped'}" in output
    _, text = train(work, "stopped", *inputs(work), status=2)
    assert "--resume" in text and text.count("\n") == 1  # not overwritten by mistake
    train(work, "stopped", "--resume")
    assert_same(work, "reference", "stopped")


def test_run_killed_at_any_moment_resumes_bitwise(work, reference):
    """Somewhere in a step or in the middle of saving, twice in a row."""
    rng = random.Random(0)
    for attempt in range(2):
        extra = ["--resume"] if attempt else [*inputs(work), *BASIC, "--save_every", 1]
        interrupt(work, "killed", *extra, at="step ", delay=rng.random() / 50)
    records, _ = train(work, "killed", "--resume")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert_same(work, "reference", "killed")


@pytest.mark.parametrize("flags,device,dtype,wanted", [
    ({}, "cuda", torch.bfloat16, True), ({}, "cuda", torch.float16, False),
    ({}, "cpu", torch.bfloat16, False), ({"lora_rank": 4}, "cuda", torch.bfloat16, True),
    ({"compile": False}, "cuda", torch.bfloat16, False),
    ({"compile": True}, "cpu", torch.float32, True)])
def test_layers_are_compiled_on_a_gpu_in_bf16_or_where_asked(monkeypatch, flags, device, dtype,
                                                            wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hardware = train_sft.Hardware(0, 1, torch.device(device), dtype)
    assert train_sft.compiles(train_sft.Config(**flags), hardware) is wanted


def test_a_run_that_has_lost_its_metrics_goes_on_with_its_weights(work, reference, killed):
    killed("no_metrics")
    (work / "no_metrics/metrics.jsonl").unlink()
    records, _ = train(work, "no_metrics", "--resume")
    assert curve(records) == curve(reference[0])[-len(records):]
    assert all(torch.equal(value, weights(work / "reference")[name])
               for name, value in weights(work / "no_metrics").items())
    (work / "no_metrics/metrics.jsonl").unlink()
    assert "is complete" in train(work, "no_metrics", "--resume")[1]


def test_resume_with_another_number_of_ranks_continues_the_curve(work, reference, killed):
    killed("ranks")
    records, _ = train(work, "ranks", "--resume", ranks=2)
    assert curve(records) == pytest.approx(curve(reference[0]), abs=1e-5)


def test_fp16_scaler_state_survives_resume(work):
    flags = [*inputs(work), *BASIC, "--dtype", "fp16"]
    whole, _ = train(work, "half", *flags)
    interrupt(work, "half2", *flags, "--save_every", 2, at="step 3/")
    again, _ = train(work, "half2", "--resume")
    assert curve(again) == curve(whole)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(work, reference, dtype):
    records, _ = train(work, dtype, *inputs(work), *BASIC, "--dtype", dtype)
    assert curve(records) != curve(reference[0])
    assert curve(records)[:2] == pytest.approx(curve(reference[0])[:2], rel=2e-2)


def test_norm_of_fp16_gradients_is_that_of_fp32(work, reference):
    """The scaler makes them 65536 times as large, and clipping must not see that."""
    records, _ = train(work, "norms", *inputs(work), *BASIC, "--dtype", "fp16", "--steps", 1)
    assert records[0]["grad_norm"] == pytest.approx(reference[0][0]["grad_norm"], rel=2e-2)


# ----------------------------------------------------------------------------- data, validation


def test_validation_loss_is_that_of_rows_not_trained_on_without_noise(work, reference):
    flags = ["--val_data", work / "val.jsonl", "--eval_every", 2]
    records, text = train(work, "validated", *inputs(work), *BASIC, *flags)
    assert curve(records) == curve(reference[0])  # validation does not touch the curve
    measured = {r["step"]: r for r in read(work / "validated/metrics.jsonl") if "val_loss" in r}
    assert list(measured) == [0, 2, 4, 5]
    assert set(measured[0]) == {"step", "epoch", "val_loss", "val_loss_by_source"}
    tokenizer = data.ChatTokenizer(work / "validated")
    examples, _ = data.load_examples([str(work / "val.jsonl")], tokenizer)
    batch = data.collate(examples)
    for step, folder in ((0, "base"), (5, "validated")):
        loss = -modeling.load(work / folder)(batch.ids, batch.lengths, batch.targets).mean()
        assert measured[step]["val_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert f"validation loss {measured[0]['val_loss']:.4f} -> {loss:.4f}" in text


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_loss_of_every_file_is_what_that_file_alone_would_give(work, ranks):
    files = [work / "val.jsonl", work / "more.jsonl"]
    (record, *_), text = train(work, f"both{ranks}", *inputs(work), *BASIC, "--steps", 1,
                               "--val_data", *files, ranks=ranks)
    alone, tokens = {}, {}
    for path in files:
        (last, *_), _ = train(work, path.stem, *inputs(work), *BASIC, "--steps", 1, "--val_data",
                              path, "--overwrite")
        alone[path.stem] = last["val_loss"]
        examples, _ = data.load_examples([str(path)], data.ChatTokenizer(work / "base"))
        tokens[path.stem] = sum(e.targets for e in examples)
        assert f"  {path.stem} " in text
    assert record["val_loss_by_source"] == pytest.approx(alone, abs=1e-5)
    whole = sum(alone[name] * tokens[name] for name in alone) / sum(tokens.values())
    assert record["val_loss"] == pytest.approx(whole, abs=1e-5)


def test_noise_is_another_with_another_seed_and_whenever_an_example_comes_again(work):
    jsonl(work / "one.jsonl", {"messages": [user("the sea"), assistant("a b c")]})
    flags = [*inputs(work, "one.jsonl"), "--steps", 2, "--batch_size", 1, "--overwrite",
             "--neftune_alpha", 5, "--learning_rate", 1e-20]  # nothing else changes the loss
    one, other = (curve(train(work, "noise", *flags, "--seed", seed)[0]) for seed in (1, 2))
    assert len({*one, *other}) == 4


def test_exams_do_not_touch_the_curve(work, reference):
    conftest.write_exam(work / "exam")
    flags = ["--exam_data", work / "exam", "--exam_every", 2]
    records, _ = train(work, "examined", *inputs(work), *BASIC, *flags)
    assert curve(records) == curve(reference[0]) and "exam_accuracy" in records[1]


def test_system_text_stands_where_a_conversation_has_none(work):
    """The same rows with the message written out give the same steps."""
    jsonl(work / "told.jsonl", *(
        {"messages": [{"role": "system", "content": "You are Tiao."}, *row["messages"]]}
        for row in read(work / "rows.jsonl")))
    flag, _ = train(work, "flag", *inputs(work), *BASIC, "--system", "You are Tiao.")
    written, _ = train(work, "written", *inputs(work, "told.jsonl"), *BASIC)
    assert curve(flag) == curve(written)
    assert [r["tokens"] for r in flag] == [r["tokens"] for r in written]


@pytest.mark.parametrize("flag, count", [
    (["--max_length", 16], "tokens"), (["--train_on", "last"], "target_tokens")])
def test_rows_are_read_as_max_length_and_train_on_say(work, flag, count):
    flags = [*inputs(work), "--steps", 1, "--batch_size", 24, "--overwrite"]
    (whole,), (less,) = (train(work, "read", *flags, *extra)[0] for extra in ([], flag))
    assert 0 < less[count] < whole[count]


def test_raw_text_and_conversations_train_together(work):
    records, text = train(work, "mixed", *inputs(work, "rows.jsonl", "text.txt"), "--epochs", 1,
                        "--mix", "equal", "--batch_size", 10)
    facts = json.loads((work / "mixed" / "run.json").read_text())
    assert {name: row["examples"] for name, row in facts["mix"].items()} == {"rows": 15, "text": 15}
    assert facts["mix"]["rows"]["rate"] == 0.5
    assert len(facts["data_hashes"]) == 3  # two files, and what the tokenizer makes of them
    assert "of supervised tokens" in text
    assert len(records) == 3 and records[-1]["epoch"] == 1.0


def test_last_step_of_an_epoch_takes_the_examples_that_are_left(work):
    records, _ = train(work, "left", *inputs(work), "--epochs", 1, "--batch_size", 10)
    assert [r["epoch"] for r in records] == [0.4167, 0.8333, 1.0]  # 24 rows


def test_output_folder_holds_a_checkpoint_and_the_metrics_that_the_readme_explains(work, reference):
    wanted = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens",
              "tokens_per_second"}
    assert all(set(record) == wanted for record in reference[0])
    names = {p.name for p in (work / "reference").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "generation_config.json", "metrics.jsonl", "run.json", "state"} <= names
    assert not any(name.startswith(".") for name in names)  # nothing temporary is left


# --------------------------------------------------------------------- schedule, optimizer, recipes


def test_schedules_warm_up_and_reach_their_floor():
    def rates(**flags):
        c = train_sft.Config(learning_rate=1.0, **flags)
        return [train_sft.learning_rate_at(step, 10, c) for step in range(1, 11)]

    assert rates(schedule="constant", warmup=0) == [1.0] * 10
    assert rates(schedule="constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="constant", warmup=0.4) == rates(schedule="constant", warmup=4)
    linear = rates(schedule="linear", warmup=0, min_learning_rate=0.5)
    assert linear == pytest.approx([1 - 0.05 * s for s in range(10)])
    cosine = rates(schedule="cosine", warmup=0, min_learning_rate=0.2)
    wanted = [0.2 + 0.4 * (1 + math.cos(math.pi * s / 10)) for s in range(10)]
    assert cosine == pytest.approx(wanted)


def test_warmup_of_1_is_one_step():
    c = train_sft.Config(learning_rate=1.0, schedule="constant", warmup=1)
    assert train_sft.learning_rate_at(1, 10, c) == 1.0


def test_optimizer_takes_the_flags_of_adam(work):
    c = train_sft.Config(adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-5, weight_decay=0.3)
    matrices, _ = train_sft.make_optimizer(modeling.load(work / "base"), c).param_groups
    found = [matrices[key] for key in ("betas", "eps", "weight_decay")]
    assert found == [(0.8, 0.99), 1e-5, 0.3]


def test_two_dropout_rates_are_those_of_the_bottom_and_the_top_layer(work):
    c = train_sft.Config(model=str(work / "base"), dropout=[0.0, 0.2])
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    model, _ = train_sft.load_trainable(c, hardware)
    assert [layer.dropout for layer in model.model.layers] == [0.0, 0.1, 0.2]


def test_norms_and_biases_are_not_decayed(work):
    model = modeling.load(work / "base")
    matrices, vectors = train_sft.make_optimizer(model, train_sft.Config()).param_groups
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(names)


def test_default_learning_rate_goes_as_one_over_width(work):
    records, _ = train(work, "rate", *inputs(work), "--steps", 1, "--warmup", 0)
    assert records[0]["learning_rate"] == pytest.approx(2e-5 * 4096 / 64)


def resolve(*argv):
    return train_sft.resolve_config(train_sft.Config, ["--model", "m", "--data", "d", *argv],
                                    train_sft.RECIPES, {})


RECIPES = {
    "llama2": {"learning_rate": 2e-5, "schedule": "cosine", "weight_decay": 0.1, "batch_size": 64,
               "max_length": 4096, "epochs": 2},
    "lima": {"learning_rate": 1e-5, "min_learning_rate": 1e-6, "schedule": "linear", "warmup": 0,
             "dropout": [0.0, 0.3], "epochs": 15, "batch_size": 32},
    "qwen": {"learning_rate": 2e-6, "warmup": 1430, "steps": 4000, "batch_size": 128,
             "dropout": [0.1]},
    "deepseek-7b": {"learning_rate": 1e-5, "epochs": 4},
    "deepseek-67b": {"learning_rate": 5e-6, "epochs": 2},
    "yi-6b": {"neftune_alpha": 5, "schedule": "constant", "adam_beta2": 0.999},
    "yi-34b": {"neftune_alpha": 45, "schedule": "constant", "adam_beta2": 0.999},
    "lima-small": {"learning_rate": 1e-5, "dropout": [0.0, 0.2], "epochs": 15, "batch_size": 64},
    "steel-llm": {"learning_rate": 2e-5, "weight_decay": 0, "batch_size": 64, "epochs": 3},
    "steel-llm-paper": {"learning_rate": 2e-5, "schedule": "cosine", "batch_size": 256,
                        "epochs": 4},
    "telechat-8k": {"learning_rate": 3e-4, "steps": 3000, "context": 8192, "max_length": 8192},
    "telechat-16k": {"learning_rate": 4e-5, "steps": 1000, "context": 16384, "max_length": 16384},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_the_published_values(name):
    """The papers are named beside the table."""
    config = resolve("--recipe", name)
    for key, value in RECIPES[name].items():
        assert getattr(config, key) == value, key


def test_explicit_flags_win_over_a_recipe():
    c = resolve("--recipe", "qwen", "--epochs", "2", "--learning_rate", "3e-6")
    assert (c.steps, c.epochs, c.learning_rate, c.batch_size) == (0, 2.0, 3e-6, 128)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags,said", [
    (["--learning_rat", "1"], "did you mean --learning_rate?"),
    (["--epochs", "many"], "--epochs"), (["--mix", "random"], "--mix"),
    (["--batch_size", "0"], "--batch_size must be 1 or more"),
    (["--learning_rate", "inf"], "--learning_rate must be below 2^63, is inf"),
    (["--seed", 2**63], f"--seed must be below 2^63, is {2**63}"),
    (["--micro_tokens", 10**30], "--micro_tokens must be below 2^63"),
    (["--recipe", "gpt"], "known are llama2"), (["--steps", "3", "--epochs", "2"], "exclude"),
    (["--cap", "5"], "--mix temperature"), (["--weights", "1"], "--mix weights"),
    (["--mix", "weights", "--weights", "1", "2"], "each of the 1 files"),
    (["--dropout", "1.5"], "--dropout"), (["--template", "gpt"], "expected chatml, plain"),
    (["--val_fraction", "0.1", "--val_data", "x.json"], "give one"),
    (["--data", "absent.json"], "absent.json does not exist"),
    (["--model", "absent"], "absent"),
    (["--template", "llama3"], "<|eot_id|>"), (["--max_length", "1"], "--max_length"),
    (["--context", "99"], "--context 99 must be above the 128 positions"),
    (["--context", "256", "--rope_scaling", "yarn", "--rope_factor", "2"], "give one of them"),
    (["--rope_scaling", "yarn"], "goes with --rope_factor F above 1"),
    (["--rope_factor", "2"], "--rope_scaling goes with --rope_factor"),
    (["--rope_scaling", "ntk", "--rope_factor", "2"], "--rope_scaling"),
    (["--context", "256", "--lora_rank", "2"], "need --lora_merge"),
])
def test_bad_flags_end_with_one_line_and_touch_nothing(work, flags, said):
    _, text = train(work, "bad", *inputs(work), *flags, status=2)
    assert said in text and text.count("\n") == 1 and "Traceback" not in text
    assert not (work / "bad").exists()


def test_sharding_is_refused_where_torch_sums_its_gradients_wrongly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    c = train_sft.Config(model="base", data=["rows.jsonl"], shard=True)
    version = torch.torch_version.TorchVersion
    monkeypatch.setattr(torch, "__version__", version("2.11.0+cpu"))
    train_sft.check_config(c)
    monkeypatch.setattr(torch, "__version__", version("2.10.1"))
    with pytest.raises(modeling.InputError, match="needs torch 2.11 or later, here is 2.10.1"):
        train_sft.check_config(c)


def test_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(work):
    flags = [*inputs(work), "--batch_size", 4, "--steps", 9, "--save_every", 1, "--warmup", 0,
             "--schedule", "constant", "--max_grad_norm", 0, "--learning_rate", 1e18]
    records, text = train(work, "broken", *flags, status=2)
    assert f"step {len(records) + 1}: loss" in text and "rows.jsonl line" in text
    assert all(math.isfinite(record["loss"]) for record in records)
    saved = weights(work / "broken")  # the last good checkpoint is still there
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_resume_refuses_changed_flags_and_changed_data(work):
    rows = work / "changing.jsonl"
    write_rows(rows, 4)
    train(work, "changing", "--model", work / "base", "--data", rows, "--steps", 2)
    _, text = train(work, "changing", "--resume", "--seed", 5, status=2)
    assert "--seed was 0, not 5" in text
    write_rows(rows, 4, seed=9)
    _, text = train(work, "changing", "--resume", status=2)
    assert "changing.jsonl has changed" in text


@pytest.mark.parametrize("flags", [["--recipe", "llama2"], ["--epochs", 3]])
def test_flags_that_are_given_again_leave_a_resumed_run_as_it_was(work, flags):
    """The recipe says 2 epochs and a batch of 64; what the run began with won over it."""
    begun = flags[:2] if flags[0] == "--recipe" else []
    train(work, "again", *inputs(work), *begun, "--steps", 2, "--batch_size", 4, "--overwrite")
    before = json.loads((work / "again/run.json").read_text())
    _, text = train(work, "again", "--resume", *flags)
    assert json.loads((work / "again/run.json").read_text()) == before and "all 2 steps" in text


def test_resume_refuses_another_template_and_other_frozen_weights(work, tmp_path):
    shutil.copytree(work / "base", tmp_path / "base")
    form, same = tmp_path / "t.jinja", ["--data", work / "rows.jsonl", "--steps", 1]
    form.write_text(data.TEMPLATES["chatml"])
    train(tmp_path, "run", "--model", tmp_path / "base", *same, "--template", form)
    train(tmp_path, "lora", "--model", tmp_path / "base", *same, "--lora_rank", 2)
    form.write_text("{{ '<|im_start|>' }}" + data.TEMPLATES["chatml"])
    _, text = train(tmp_path, "run", "--resume", status=2)
    assert "the template or the tokenizer has changed" in text

    conftest.perturbed(tmp_path / "base", tmp_path / "other")
    shutil.copyfile(tmp_path / "other/model.safetensors", tmp_path / "base/model.safetensors")
    _, text = train(tmp_path, "lora", "--resume", status=2)
    assert "model.safetensors has changed since the run began" in text


def test_weights_that_changed_in_one_layer_of_a_large_file_are_noticed(tmp_path):
    """Most tools write the embedding first, which many trainings leave as it was."""
    content = bytearray(40 * 2**20)
    (tmp_path / "a").write_bytes(content)
    before = train_sft.hash_samples(tmp_path / "a")
    for first in (0, 2**24, 37 * 2**20):
        content[first : first + 2**20] = b"x" * 2**20
        (tmp_path / "a").write_bytes(content)
        before, last = train_sft.hash_samples(tmp_path / "a"), before
        assert before != last


def test_folder_that_another_run_made_and_finished_meanwhile_is_looked_at_once_more(work):
    c = train_sft.Config(model=str(work / "base"), output_dir=str(work / "late"))
    assert train_sft.find_start_step(c) == 0
    train(work, "late", *inputs(work), "--steps", 1)
    before = contents(work / "late")
    with pytest.raises(modeling.InputError, match="holds a finished run"):
        train_sft.start_run(c, 2, {}, train_sft.Hardware(0, 1, "cpu", torch.float32))
    assert contents(work / "late") == before
    os.close(train_sft.LOCKED.popitem()[1])


def test_two_commands_do_not_train_into_one_folder(work):
    """The first has saved nothing yet: nothing but its lock tells the second of it."""
    flags = [*inputs(work), "--steps", 500, "--batch_size", 2, "--log_every", 1]
    first = subprocess.Popen(launcher(work, "both", *flags), stdout=subprocess.PIPE, text=True,
                             cwd=work, env=conftest.environment(), stderr=subprocess.DEVNULL)
    while not first.stdout.readline().startswith("step 1/"):
        assert first.poll() is None
    before = (work / "both/run.json").read_text()
    _, text = train(work, "both", *inputs(work), "--steps", 1, status=2)
    first.kill()
    first.communicate()
    assert "another command trains into" in text and text.count("\n") == 1
    assert (work / "both/run.json").read_text() == before

    # A lock ends with its process, however that ends.
    assert [r["step"] for r in train(work, "both", *inputs(work), "--steps", 1)[0]] == [1]


def test_new_run_removes_an_old_state_from_behind_a_link_before_it_trains(work, tmp_path,
                                                                          monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/state").symlink_to(tmp_path / "disk")
    train(tmp_path, "run", *inputs(work), "--steps", 3)
    assert (tmp_path / "disk/step-00003").exists()
    monkeypatch.setattr(train_sft, "save_run", lambda *_: None)
    train(tmp_path, "run", *inputs(work), "--steps", 1, "--overwrite")
    assert not list((tmp_path / "disk").iterdir())


def test_bad_rows_stop_or_are_skipped_and_listed(work):
    rows = work / "broken.jsonl"
    rows.write_text((work / "rows.jsonl").read_text() + '{"messages": 3}\n{"oops"\n')
    flags = ["--model", work / "base", "--data", rows, "--steps", 1]
    _, text = train(work, "rows", *flags, status=2)
    assert "broken.jsonl line 25" in text and "--skip_bad_rows" in text
    _, text = train(work, "rows", *flags, "--skip_bad_rows")
    assert "dropped: bad row: 2" in text and "line 26" in text


# -------------------------------------------------------------------------------- the real thing


@pytest.mark.skipif(not (conftest.SHARED / "models" / "story").exists(), reason="needs ../shared")
def test_story_learns_alpaca_and_still_loads_everywhere(tmp_path):
    rows = conftest.SHARED / "data/alpaca_en_demo.json"
    flags = ["--model", conftest.SHARED / "models/story", "--data", rows, "--steps", 12,
             "--max_length", 128, "--warmup", 0]
    records, _ = train(tmp_path, "out", *flags)
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, tokenizer = modeling.load(tmp_path / "out"), data.ChatTokenizer(tmp_path / "out")
    rows = [data.parse_row("", {"prompt": "hi", "completion": "hello"})]
    example = data.to_examples(rows, 0, data.Counter(), tokenizer, "all", 128)
    ((_, logp),) = evaluation.example_logprobs(model, example, 128)
    assert torch.isfinite(logp).all()


# ------------------------------------------------------------------------------ the core by itself


def isolated(work, code):
    """(exit status, output) of Python code in a copy of the project without labs/."""
    core = work / "core"
    if not core.exists():
        core.mkdir()
        for path in conftest.REPO.glob("*.py"):
            shutil.copyfile(path, core / path.name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=core)
    return done.returncode, done.stdout + done.stderr


def start(script, *flags):
    """Code that runs a script of the core as the command line does, and prints how it ends."""
    return f"""
import runpy, sys
sys.argv = {[script, *map(str, flags)]}
try:
    runpy.run_path('{script}', run_name='__main__')
    print('{script} ends')
except SystemExit as stop:
    print('{script} exits with', stop.code or 0)
"""


def test_core_imports_neither_labs_nor_eval_when_it_starts(work):
    code = "import sys, train_dpo; print(sorted({'labs', 'eval'} & set(sys.modules)))"
    assert isolated(work, code) == (0, "[]\n")


def test_torchs_compiler_which_takes_seconds_to_import_is_left_to_training(work):
    """A wrong flag, an exam or a chat must not wait for it."""
    code = f"import sys, train_dpo, eval, model; m = model.load({str(work / 'base')!r}); "
    code += "model.generate(m, [[1, 2]], 3); print('torch._dynamo' in sys.modules)"
    assert isolated(work, code) == (0, "False\n")


def test_without_labs_everything_works_but_the_demo_which_says_what_is_missing(work):
    sft = ["--model", work / "base", "--data", work / "rows.jsonl", "--steps", 1,
           "--output_dir", work / "alone"]
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (work / "pair.jsonl").write_text(json.dumps(pair) + "\n")
    dpo = ["--model", work / "alone", "--data", work / "pair.jsonl", "--steps", 1,
           "--output_dir", work / "aligned"]
    logprobs = ["logprobs", "--model", work / "aligned", "--data", work / "rows.jsonl",
                "--output", work / "logp.jsonl"]
    scripts = (("train_sft.py", *sft), ("train_dpo.py", *dpo), ("eval.py", *logprobs),
               ("data.py", "show", work / "rows.jsonl"), ("train_sft.py",), ("train_dpo.py",))
    status, text = isolated(work, "".join(start(*script) for script in scripts))
    assert status == 0, text
    ends = [line for line in text.splitlines() if re.match(r"\w+\.py (ends|exits)", line)]
    assert ends == ["train_sft.py exits with 0", "train_dpo.py exits with 0", "eval.py ends",
                    "data.py ends", "train_sft.py exits with 2", "train_dpo.py exits with 2"]
    assert text.count("labs/world.py, which is missing") == 2


# ---------------------------------------------------------------------------------- nothing is lost


def contents(folder):
    """Every file below a folder, byte for byte."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_output_dir_that_is_empty_is_refused():
    with pytest.raises(modeling.InputError, match="--output_dir is empty"):
        train_sft.find_start_step(train_sft.Config(output_dir=""))


def test_data_that_bears_a_name_of_the_run_is_refused(work):
    rows = (work / "rows.jsonl").read_text()
    (work / "own").mkdir()
    (work / "own/run.json").write_text(rows)
    _, text = train(work, "own", "--model", work / "base", "--data", work / "own/run.json",
                    status=2)
    assert "is an input" in text and (work / "own/run.json").read_text() == rows


def test_resume_without_a_state_does_not_begin_over_a_checkpoint(work):
    train(work, "stateless", *inputs(work), "--steps", 1)
    shutil.rmtree(work / "stateless/state")
    before = contents(work / "stateless")
    _, text = train(work, "stateless", "--resume", status=2)
    assert "no state to go on from" in text and contents(work / "stateless") == before

    # But so looks a run that was killed while it saved for the first time: that one begins again.
    (work / "stateless/state/new").mkdir(parents=True)
    records, _ = train(work, "stateless", "--resume")
    assert [record["step"] for record in records] == [1]


@pytest.mark.parametrize("lost", [b"\xff\xfe\n", b"5\n", b"{}\n", b"null\n"])
def test_metrics_that_hold_something_else_do_not_stop_a_resumed_run(work, reference, killed,
                                                                    lost):
    killed("odd")
    with open(work / "odd/metrics.jsonl", "ab") as file:
        file.write(lost)
    records, _ = train(work, "odd", "--resume")
    assert curve(records) == curve(reference[0])
    shutil.rmtree(work / "odd")


@pytest.mark.parametrize("output,said", [
    ("base", "is the input"), ("./nowhere/../base", "is the input"), ("link", "is the input"),
    ("finished", "holds a finished run; choose another --output_dir, or add --overwrite"),
    ("lost", "holds the state of a run, at step 1, but no run.json"),
    ("strange", "holds a run that stopped at step 1 of ? (--resume"),
    ("foreign", "holds a checkpoint (config.json)"), ("adapter", "holds a checkpoint (adapter_con"),
    ("shards", "holds a checkpoint (w.safe"), ("rows.jsonl", "is a file"),
    ("rows.jsonl/below", "is a file"), ("/proc/here", "cannot be written"),
    ("notes", "notes/state is not the state of a run"),
])
def test_output_that_would_replace_something_or_has_no_place_is_refused(work, output, said):
    if not (work / "link").exists():
        (work / "link").symlink_to(work / "base")
        shutil.copytree(work / "base", work / "foreign")
        for name, file in (("adapter", "adapter_config.json"), ("shards", "w.safetensors")):
            (work / name).mkdir()
            (work / name / file).write_text("{}")
        train(work, "finished", *inputs(work), "--steps", 1)
        shutil.copytree(work / "finished", work / "lost")
        (work / "lost/run.json").unlink()
        shutil.copytree(work / "finished", work / "strange")
        (work / "strange/run.json").write_text("{}")
        (work / "notes/state").mkdir(parents=True)
        (work / "notes/state/precious.txt").write_text("mine")
    before = contents(work)
    _, text = train(work, output, *inputs(work), "--steps", 1, status=2)
    assert said in text and text.count("\n") == 1 and contents(work) == before


def test_overwrite_replaces_a_finished_run_and_leaves_what_is_not_its_own(work):
    train(work, "old", *inputs(work), "--steps", 2)
    stranger = work / "old" / "model_ema.safetensors"
    stranger.write_text("somebody's")
    records, _ = train(work, "old", *inputs(work), "--steps", 1, "--overwrite")
    assert len(records) == 1 and stranger.read_text() == "somebody's"


def test_checkpoint_in_the_demos_place_is_not_made_anew_for_other_data(work, monkeypatch):
    (work / "place").mkdir()
    monkeypatch.chdir(work / "place")
    shutil.copytree(work / "base", "out/demo/base")
    shutil.copyfile(work / "rows.jsonl", "out/demo/mine.jsonl")
    before = contents(work / "place")
    train(work, "placed", "--model", "out/demo/base", "--data", "out/demo/mine.jsonl", "--steps", 1)
    assert contents(work / "place") == before


def test_disk_that_is_full_is_said_in_one_line(work):
    """A limit on the size of files stands for it: small ones fit, the weights do not."""
    code = ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (99_000, 99_000)); "
            + start("train_sft.py", *inputs(work), "--steps", 1, "--output_dir", work / "full"))
    _, text = isolated(work, code)
    assert "exits with 2" in text and "cannot be written: " in text.splitlines()[-1]
    assert "Traceback" not in text and not (work / "full/model.safetensors").exists()


def test_what_the_system_refuses_is_said_in_one_line(work, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "step-new")

    monkeypatch.setattr(train_sft, "keep_checkpoint", full)
    _, text = train(work, "spaceless", *inputs(work), "--steps", 1, "--keep", 1, status=2)
    assert text.endswith("No space left on device: 'step-new'\n") and "Traceback" not in text


def test_generation_config_names_the_token_that_begins_a_text(tmp_path):
    families.make_checkpoint(tmp_path / "base", "llama2")
    (tmp_path / "base/generation_config.json").unlink()
    tokenizer, model = data.ChatTokenizer(tmp_path / "base"), modeling.load(tmp_path / "base")
    train_sft.save_checkpoint(model, tokenizer, tmp_path / "out")
    saved = modeling.read_json(tmp_path / "out/generation_config.json")
    assert [saved["bos_token_id"]] == tokenizer.bos_ids


def test_generation_config_keeps_the_sources_sampling_defaults_but_not_its_stop_ids(work):
    shutil.copytree(work / "base", work / "sampled")
    source = {"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": 3}
    modeling.write_json(work / "sampled/generation_config.json", source)
    train(work, "keeps", "--model", work / "sampled", "--data", work / "rows.jsonl", "--steps", 1)
    written = modeling.read_json(work / "keeps/generation_config.json")
    tokenizer = data.ChatTokenizer(work / "keeps")
    assert {**written, "eos_token_id": 3, "bos_token_id": 0} == {**source, "bos_token_id": 0}
    assert tokenizer.stop_id in written["eos_token_id"] and 3 in written["eos_token_id"]


def spoil(folder, case):
    """Make of a good checkpoint one of the folders that people give instead."""
    config = modeling.read_json(folder / "config.json")
    if case == "pointer":
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        (folder / "model.safetensors").write_text(text)
    elif case == "tokenizer pointer":
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    elif case in ("gptq", "fp8", "bitsandbytes"):
        config["quantization_config"] = {"quant_method": case}
        modeling.write_json(folder / "config.json", config)
    elif case in ("float8", "packed"):
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        if case == "packed":
            tensors["model.layers.0.mlp.up_proj.qweight"] = tensors.pop(name)
        else:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, folder / "model.safetensors")
    elif case == "adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
        (folder / "tokenizer.json").unlink()
    elif case == "cache":
        inner = folder / "snapshots" / "0123abc"
        inner.mkdir(parents=True)
        for path in [p for p in folder.iterdir() if p.is_file()]:
            path.rename(inner / path.name)
    elif case == "parent":
        (folder / "inner").mkdir()
        for path in [p for p in folder.iterdir() if p.is_file()]:
            path.rename(folder / "inner" / path.name)
    elif case == "sentencepiece":
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    elif case == "format":
        (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "New"}}')


@pytest.mark.parametrize("case,said", [
    ("pointer", "model.safetensors is only a pointer of git-lfs; `git lfs pull`"),
    ("gptq", "quantised (gptq); take the checkpoint in 16 bits"), ("fp8", "quantised (fp8)"),
    ("bitsandbytes", "quantised (bitsandbytes)"), ("float8", "stored as torch.float8_e4m3fn"),
    ("packed", "quantised (model.layers.0.mlp.up_proj.qweight)"),
    ("adapter", "adapter_config.json: None is not supported, only plain LoRA"),
    ("cache", "its checkpoint is {folder}/snapshots/0123abc"),
    ("parent", "give {folder}/inner"), ("sentencepiece", "has only tokenizer.model; AutoTokenizer"),
    ("tokenizer pointer", "tokenizer.json is only a pointer of git-lfs"),
    ("format", "tokenizer.json cannot be read by tokenizers"),
])
def test_folder_that_is_no_plain_checkpoint_is_named_with_the_fix(work, tmp_path, case, said):
    folder = tmp_path / "given"
    shutil.copytree(work / "base", folder)
    spoil(folder, case)
    _, text = train(tmp_path, "out", "--model", folder, "--data", work / "rows.jsonl", "--steps", 1,
                    status=2)
    assert said.format(folder=folder) in text.splitlines()[-1] and "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name,said", [
    ("Qwen/Qwen3-0.6B", "`hf download Qwen/Qwen3-0.6B --local-dir DIR`"),
    ("out/reward", "train it first (train_sft.py writes out/sft,")])
def test_name_that_is_no_folder_is_told_how_to_become_one(work, name, said):
    _, text = train(work, "hub", "--model", name, "--data", work / "rows.jsonl", status=2)
    assert said in text and text.count("\n") == 1


# ---------------------------------------------------------------------------------- at the terminal


def test_figures_are_drawn_at_each_measurement_and_save(work, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_sft, "draw", lambda c, records, figure: drawn.append(
        records[-1]["step"]))
    train(work, "drawn", *inputs(work), *BASIC, "--val_data", work / "val.jsonl", "--eval_every", 4,
          "--save_every", 3)
    assert drawn == [0, 3, 4, 5]


def test_validation_rows_that_are_trained_on_are_said(work):
    flags = ["--val_data", work / "rows.jsonl", "--steps", 1]
    _, text = train(work, "leak", *inputs(work), *flags)
    assert "warning: 24 of the 24 validation examples are trained on too" in text


def test_ctrl_c_under_torchrun_saves_and_says_how_to_go_on(work):
    """As a terminal does: the launcher and all ranks get the signal."""
    argv = launcher(work, "ctrl_c", *inputs(work), *BASIC, "--steps", 999, ranks=2)
    process = subprocess.Popen(argv, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGINT)
    process.wait()
    assert "torchrun --nproc_per_node=2 train_sft.py --resume" in "".join(lines)
    assert train_sft.step_folders(work / "ctrl_c/state")


def test_bar_fits_80_columns(work, monkeypatch):
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    c = train_sft.Config(output_dir=str(work / "bar"))
    log = train_sft.Log(c, 0, 1000, hardware, train_sft.FIGURE)
    log.write({"step": 1, "loss": 2.0, "val_loss": 12.3456, "exam_accuracy": 0.5,
               "learning_rate": 1e-5, "tokens_per_second": 123456.0})
    log.bar.refresh()
    shown = sys.stderr.getvalue().replace("\n", "\r").split("\r")
    log.bar.close()
    assert max(map(len, shown)) <= 80 and "exam 0.5000" in shown[-1]


@pytest.mark.parametrize("case", ["model", "adapter", "reference"])
def test_overwrite_does_not_remove_a_kept_step_that_is_an_input(work, tmp_path, case):
    step = tmp_path / "kept/step-00002"
    shutil.copytree(work / "base", step)
    shutil.copytree(work / "base", tmp_path / "other")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
        "base_model_name_or_path": str(step)}))
    script = train_dpo if case == "reference" else train_sft
    model = {"model": step, "adapter": tmp_path / "adapter", "reference": tmp_path / "other"}[case]
    extra = ["--reference", tmp_path / "adapter"] if case == "reference" else []
    _, text = train(tmp_path, "kept", "--model", model, "--data", work / "rows.jsonl", *extra,
                    "--overwrite", status=2, script=script)
    assert "is the input" in text and text.count("\n") == 1 and (step / "config.json").exists()


@pytest.mark.parametrize("case, said", [
    ("old", "of another version"), ("cut", "cannot be read"), ("part", "files are missing"),
    ("empty", "files are missing")])
def test_resume_of_what_is_not_whole_ends_with_one_line(work, tmp_path, case, said, monkeypatch):
    monkeypatch.setattr(modeling, "SHARD_BYTES", 200_000)
    train(tmp_path, "run", *inputs(work), "--steps", 1)
    state, first, *rest = sorted((tmp_path / "run/state").glob("**/*"))
    assert rest
    if case == "old":
        first.rename(state.parent / "state.safetensors")
        path = tmp_path / "run/run.json"
        path.write_text(path.read_text().replace('"keep": 0', '"kept": 0'))
    if case == "cut":
        first.write_bytes(first.read_bytes()[:5000])
    for path in {"part": [first], "empty": [first, *rest]}.get(case, []):
        path.unlink()
    _, text = train(tmp_path, "run", "--resume", status=2)
    assert said in text.splitlines()[-1]
