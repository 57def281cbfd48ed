"""LoRA: the arithmetic and the files are PEFT's, the loop is ours."""

import json
import random
import shutil

import families
import peft
import pytest
import torch
import transformers
from conftest import (
    PLAIN,
    asked,
    command,
    curve,
    interrupt,
    jsonl,
    padded_logprobs,
    read,
    some_words,
    train,
    weights,
    whole_rows,
    write_exam,
    write_pairs,
)
from safetensors.torch import load_file

import data
import model as M
import train_dpo
import train_sft

IDS = torch.arange(40) * 7 % 290
LORA = ["--lora_rank", 4, "--learning_rate", 1e-2, "--steps", 4, "--log_every", 1]
NOISY = [*LORA, "--lora_dropout", 0.3, "--neftune_alpha", 5, "--dropout", 0.1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny Qwen2 checkpoint, files to train on, and an adapter that was trained on one."""
    folder, rng = tmp_path_factory.mktemp("lora"), random.Random(0)
    families.make_checkpoint(folder / "base", "qwen2")
    jsonl(folder / "rows.jsonl", *(
        asked(some_words(rng, 9), some_words(rng, 3 + i % 20)) for i in range(24)))
    write_pairs(folder / "pairs.jsonl", 12)
    train(folder, "adapter", *inputs(folder), *NOISY)
    train(folder, "merged", *inputs(folder), *NOISY, "--lora_merge")
    return folder


def inputs(work, file="rows.jsonl", model="base"):
    return ["--model", work / model, "--data", work / file]


def logits(model):
    """Of our model or one of transformers, [40, V]."""
    with torch.no_grad():
        if isinstance(model, M.Llama):
            return model.next_logits(model.hidden(IDS, [40])[0])
        return model(IDS[None]).logits[0]


def hugging_face(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return peft.PeftModel.from_pretrained(model, adapter).eval() if adapter else model


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(ours, theirs, rounding=4e-6):
    """But for the order of sums in fp32: each side's norm has its own."""
    assert (ours - theirs).abs().max() < rounding * theirs.abs().max()


def assert_same_adapter(one, two):
    found = adapter_of(two)
    assert all(torch.equal(value, found[name]) for name, value in adapter_of(one).items())


# ----------------------------------------------------------------------------------- the arithmetic


def test_adapter_adds_alpha_over_r_times_b_a_x_and_merges_into_the_weight():
    p = M.Projection(2, 3, bias=False).requires_grad_(False)
    p.lora_A, p.lora_B = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 3, bias=False)
    p.lora_dropout, p.site, p.scale = 0.0, 2, 2 / 1
    p.weight.copy_(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    with torch.no_grad():
        p.lora_A.weight.copy_(torch.tensor([[0.5, -1]]))
        p.lora_B.weight.copy_(torch.tensor([[1.0], [0], [-2]]))
    assert p(torch.tensor([[1.0, 2]])).tolist() == [[2, 11, 23]]
    assert p.merged().tolist() == [[2, 0], [3, 4], [3, 10]]


@pytest.mark.parametrize("family, targets", [
    ("qwen2", []), ("smollm2", []), ("qwen3", ["q_proj", "down_proj"])])
def test_three_steps_equal_those_of_peft(tmp_path, family, targets):
    theirs = families.make_checkpoint(tmp_path / "base", family)
    theirs.model.embed_tokens.padding_idx = None
    rng = random.Random(1)
    file = jsonl(tmp_path / "rows.jsonl", *(
        asked(some_words(rng, 9), some_words(rng, 3 + 2 * i)) for i in range(6)))
    flags = [*PLAIN, "--batch_size", 6, "--lora_rank", 4, "--lora_alpha", 12, "--seed", 3]
    flags += ["--lora_targets", *targets] if targets else []
    records, _ = train(tmp_path, "out", "--model", tmp_path / "base", "--data", file, *flags)

    # theirs begins with the numbers that ours began with
    keys = M.read_adapter(tmp_path / "out")[1]
    assert sorted(keys["target_modules"]) == sorted(targets or M.PROJECTIONS)
    start = M.load(tmp_path / "base", None, adapter=keys, seed=3)
    first = {M.WRAPPER + name: p for name, p in start.named_parameters() if M.LORA in name}
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets or "all-linear")
    theirs = peft.get_peft_model(theirs, config).train()
    peft.set_peft_model_state_dict(theirs, first)

    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == len(first)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for record in records:
        logp, count = padded_logprobs(theirs, whole_rows(file, tmp_path / "base"))
        loss = -logp.sum() / count.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    wanted, found = peft.get_peft_model_state_dict(theirs), adapter_of(tmp_path / "out")
    assert wanted.keys() == found.keys()
    for name, value in found.items():
        assert (value - wanted[name]).abs().max() < 5e-5, name


def test_a_new_adapter_changes_nothing_and_is_drawn_as_peft_draws_it(work):
    keys = M.read_adapter(work / "adapter")[1]
    model = M.load(work / "base", None, adapter=keys, seed=1)
    assert torch.equal(logits(model), logits(M.load(work / "base")))
    for module in M.adapted(model).values():
        A, bound = module.lora_A.weight, module.in_features**-0.5
        assert 0.9 * bound < A.abs().max() <= bound and abs(A.mean()) < 0.1 * bound
        assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_alpha_is_twice_the_rank_where_no_flag_says_it(work):
    keys = M.read_adapter(work / "adapter")[1]
    assert (keys["r"], keys["lora_alpha"]) == (4, 8)


def test_default_learning_rate_of_an_adapter_is_ten_times_that_of_all_weights(work):
    flags = ["--lora_rank", 4, "--steps", 1, "--warmup", 0]
    records, _ = train(work, "rate", *inputs(work), *flags)
    assert records[0]["learning_rate"] == pytest.approx(10 * 2e-5 * 4096 / 64)


def test_only_the_adapter_is_trained_and_saved_as_state(work):
    (folder,) = train_sft.step_folders(work / "adapter/state")
    state = load_file(folder / "state.safetensors")
    assert len(state) == 4 * len(adapter_of(work / "adapter")) == 4 * 2 * 7 * 3
    assert all(".lora_" in name for name in state)


def test_base_stays_in_the_precision_it_is_stored_in(tmp_path):
    """What is computed with it is --dtype all the same: the loss is that of the fp32 copy."""
    families.make_checkpoint(tmp_path / "half", "smollm2", dtype=torch.bfloat16)
    M.save(M.load(tmp_path / "half"), tmp_path / "whole")
    data.ChatTokenizer(tmp_path / "half").save(tmp_path / "whole")
    jsonl(tmp_path / "rows.jsonl", asked("the sea", "a b c"))
    one, two = (train(tmp_path, f"to_{name}", *inputs(tmp_path, model=name), *LORA)[0]
                for name in ("half", "whole"))
    assert curve(one) == curve(two)
    c = train_sft.Config(model=str(tmp_path / "half"), lora_rank=4)
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    model, _ = train_sft.load_trainable(c, hardware)
    kinds = {p.requires_grad: set() for p in model.parameters()}
    for p in model.parameters():
        if p.dim() > 1:
            kinds[p.requires_grad].add(p.dtype)
    assert kinds == {False: {torch.bfloat16}, True: {torch.float32}}

    # and what is written merged is in it again
    train(tmp_path, "out", *inputs(tmp_path, model="half"), *LORA, "--lora_merge")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------- the files


def test_our_adapter_loads_in_peft_with_equal_logits(work):
    theirs = logits(hugging_face(work / "base", work / "adapter"))
    assert_equal(logits(M.load(work / "adapter", None)), theirs)
    assert (theirs - logits(hugging_face(work / "base"))).abs().max() > 0.1
    names = {path.name for path in (work / "adapter").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not {"config.json", "model.safetensors"} & names


@pytest.mark.parametrize("flags", [
    {}, {"use_rslora": True}, {"target_modules": ["layers.1.self_attn.v_proj", "up_proj"]}])
def test_an_adapter_of_peft_loads_here_with_equal_logits(work, tmp_path, flags):
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": "all-linear",
                                "init_lora_weights": False, **flags})
    theirs = peft.get_peft_model(hugging_face(work / "base"), config).eval()
    theirs.save_pretrained(tmp_path)
    assert_equal(logits(M.load(tmp_path, None)), logits(theirs))
    assert_equal(logits(M.load(tmp_path)), logits(theirs), 2e-5)  # merged: other sums throughout
    assert data.ChatTokenizer(tmp_path).folder == work / "base"  # it has no tokenizer of its own


def test_merged_weights_do_what_weights_and_adapter_do(work):
    """In fp64 no digit hides behind rounding of the layers between."""
    plain, beside = M.load(work / "adapter").double(), M.load(work / "adapter", None).double()
    assert not M.adapted(plain) and M.adapted(beside)
    assert (logits(plain) - logits(beside)).abs().max() < 1e-6 * logits(plain).abs().max()
    for name, p in M.load(work / "merged").named_parameters():
        assert torch.equal(p.double(), plain.get_parameter(name)), name
    theirs = hugging_face(work / "base", work / "adapter").merge_and_unload()
    for name, p in theirs.named_parameters():
        assert (p - plain.get_parameter(name)).abs().max() < 1e-6


def test_a_folder_never_holds_a_checkpoint_and_an_adapter(work):
    shutil.copytree(work / "merged", work / "turns")
    for flags, kept in (([], False), (["--lora_merge"], True)):
        train(work, "turns", *inputs(work), *LORA, "--overwrite", *flags)
        names = {path.name for path in (work / "turns").iterdir()}
        assert ({"config.json", "model.safetensors"} <= names) == kept
        assert ({"adapter_config.json", "adapter_model.safetensors"} & names == set()) == kept


def test_every_command_takes_an_adapter_folder(work, monkeypatch):
    monkeypatch.chdir(work)
    write_exam(work / "exam")
    found = []
    for folder in ("adapter", "merged"):
        jsonl(work / "asked.jsonl", {"prompt": "the river"})
        model = ["--model", work / folder]
        runs = [["eval.py", "logprobs", *model, "--data", "rows.jsonl", "--output", "p.jsonl"],
                ["eval.py", "generate", *model, "--data", "asked.jsonl", "--output", "g.jsonl"],
                ["eval.py", "exam", *model, "--data", "exam", "--split", "val", "--shots", "0",
                 "--chat", "--output_dir", "results"],
                ["data.py", "show", "rows.jsonl", *model]]
        for run in runs:
            status, out, err = command(*run)
            assert status == 0, err
        chat = command("eval.py", "chat", *model, "--max_new_tokens", 5, stdin="hi\n")[1]
        losses = [x for line in read("p.jsonl") for x in line["logprobs"] if x is not None]
        found.append((losses, read("g.jsonl"), read("results/predictions.jsonl"),
                      chat.replace(str(work / folder), "")))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert found[0][1] == found[1][1] and found[0][3] == found[1][3]
    assert [a["prediction"] for a in found[0][2]] == [a["prediction"] for a in found[1][2]]


def test_without_a_rank_an_adapter_folder_is_merged_and_trained_whole(work):
    flags = ["--steps", 2, "--learning_rate", 1e-3]
    one, two = (train(work, f"all_of_{name}", *inputs(work, model=name), *flags)[0]
                for name in ("adapter", "merged"))
    assert curve(one) == curve(two)
    assert (work / "all_of_adapter/config.json").exists()


def test_an_adapter_is_trained_further_beside_the_same_base(work):
    records, _ = train(work, "further", *inputs(work, model="adapter"), *LORA)
    merged, _ = train(work, "new", *inputs(work, model="merged"), *LORA)
    assert records[0]["loss"] == pytest.approx(merged[0]["loss"], abs=1e-5)  # both start there
    before, after = (json.loads((work / name / "adapter_config.json").read_text())
                     for name in ("adapter", "further"))
    assert after == {**before, "lora_dropout": 0.0}
    assert not torch.equal(*(logits(M.load(work / name)) for name in ("adapter", "further")))


# ------------------------------------------------------------------- what must not change the curve


@pytest.mark.parametrize("flags", [
    ["--micro_tokens", 40], ["--checkpoint_activations", "--dtype", "fp32"]])
def test_dropout_of_the_adapter_depends_on_seed_visit_example_and_position_alone(work, flags):
    reference = curve(read(work / "adapter/metrics.jsonl"))
    other, _ = train(work, "_".join(map(str, flags)), *inputs(work), *NOISY, *flags)
    assert curve(other) == pytest.approx(reference, abs=1e-5)


def test_every_projection_drops_its_own_inputs(work):
    """The same x goes into q, k and v, and each layer draws anew."""
    keys = {**M.read_adapter(work / "adapter")[1], "lora_dropout": 0.5}
    model, seen = M.load(work / "base", None, adapter=keys).train(), []
    for module in M.adapted(model).values():
        module.lora_A.register_forward_hook(lambda m, x, y: seen.append(x[0] == 0))
    with torch.no_grad():
        model.hidden(IDS, [40], noise=M.noise_keys(0, [0], [0], [40]))
    assert all(0.4 < dropped.float().mean() < 0.6 for dropped in seen)
    alike = [dropped for dropped in seen if dropped.shape == (40, 64)]
    assert len(alike) == 6 * 3 and len({tuple(x.flatten().tolist()) for x in alike}) == 18
    seen.clear()
    with torch.no_grad():
        model.eval().hidden(IDS, [40], noise=M.noise_keys(0, [0], [0], [40]))
    assert all(dropped.float().mean() < 0.01 for dropped in seen)


def test_killed_and_resumed_run_equals_the_uninterrupted_one_bitwise(work):
    interrupt(work, "killed", *inputs(work), *NOISY, "--save_every", 1, at="step 2/")
    train(work, "killed", "--resume")
    assert_same_adapter(work / "adapter", work / "killed")
    assert curve(read(work / "killed/metrics.jsonl")) == curve(read(work / "adapter/metrics.jsonl"))


def test_two_ranks_train_the_adapter_that_one_trains(work):
    two, _ = train(work, "ranks", *inputs(work), *NOISY, ranks=2)
    assert curve(two) == pytest.approx(curve(read(work / "adapter/metrics.jsonl")), abs=1e-5)


def test_compiled_layers_compute_the_same_with_few_graphs(work):
    model, graphs = M.load(work / "adapter", None).train(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    noise = M.noise_keys(0, [0], [0], [40])
    torch._dynamo.reset()
    plain = model.hidden(IDS, [40], noise=noise)[0]
    model.compile_layers(backend=backend)
    assert_equal(model.hidden(IDS, [40], noise=noise)[0], plain)
    assert len(graphs) <= 4  # before and after attention; the first layer's x needs no gradient


# ---------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_reference_of_dpo_is_what_the_policy_starts_from(work, start):
    """The base where the adapter is new; base and adapter where it is trained further."""
    records, text = train(work, f"dpo_{start}", *inputs(work, "pairs.jsonl", start), *LORA,
                          script=train_dpo)
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and "warning" not in text
    assert records[-1]["loss"] < 0.6 and (work / f"dpo_{start}/adapter_config.json").exists()
    tokenizer = data.ChatTokenizer(work / start)
    items, _ = train_dpo.load_preferences([str(work / "pairs.jsonl")], tokenizer, 2048)
    with torch.no_grad():
        wanted = train_dpo.answer_logprobs(M.load(work / start), items)
    (kept,) = (work / f"dpo_{start}/reference").iterdir()
    assert torch.allclose(load_file(kept)["training"], wanted, atol=1e-4)


def test_reference_is_another_where_the_scale_of_its_adapter_is(work, tmp_path):
    folder = shutil.copytree(work / "adapter", tmp_path / "scaled")
    before, path = train_dpo.fingerprint(folder, {}), folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 3}))
    assert train_dpo.fingerprint(folder, {}) != before


def test_reference_may_be_the_base_of_the_adapter_that_is_trained_further(work):
    records, text = train(work, "dpo_other", *inputs(work, "pairs.jsonl", "adapter"), *LORA,
                          "--reference", work / "base", script=train_dpo)
    assert abs(records[0]["loss"] - 0.693147) > 0.01 and "warning: the first step" in text


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, said", [
    (["--lora_rank", -1], "--lora_rank must be 0 or more, is -1"),
    (["--lora_rank", "x"], "argument --lora_rank: invalid int value: 'x'"),
    (["--lora_alpha", 8], "--lora_alpha needs --lora_rank R"),
    (["--lora_dropout", 0.1], "--lora_dropout needs --lora_rank R"),
    (["--lora_targets", "q_proj"], "--lora_targets needs --lora_rank R"),
    (["--lora_merge"], "--lora_merge needs --lora_rank R"),
    (["--lora_rank", 4, "--lora_alpha", -8], "--lora_alpha must be 0 or more, is -8"),
    (["--lora_rank", 4, "--lora_dropout", 1], "--lora_dropout must be in [0, 1), is 1.0"),
    (["--lora_rank", 4, "--lora_targets", "lm_head"],
     "--lora_targets: no projection is called lm_head; there are q_proj, k_proj"),
    (["--lora_rank", 4, "--eot", "<|end|>"], "--eot <|end|> is a new token"),
    (["--lora_rank", 4, "--output_dir", "{work}/base"], "is the input"),
    (["--lora_rank", 5, "--model", "{work}/adapter"], "--lora_rank 4 trains it further"),
    (["--lora_rank", 4, "--lora_alpha", 2, "--model", "{work}/adapter"], "with its own alpha"),
    (["--model", "{work}/adapter", "--output_dir", "{work}/base", "--overwrite"], "is the input"),
])
def test_flags_that_make_no_sense_end_with_one_line(work, tmp_path, flags, said):
    flags = [str(flag).format(work=work) for flag in flags]
    _, text = train(tmp_path, "out", *inputs(work), *flags, status=2)
    assert said in text and text.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, said", [
    ({"base_model_name_or_path": "Qwen/Nowhere"}, "its base Qwen/Nowhere is not there: bring it"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING is not supported, only plain LoRA"),
    ({"use_dora": True}, "['use_dora'] is not supported, only plain LoRA"),
    ({"alpha_pattern": {"q_proj": 3}}, "['alpha_pattern'] is not supported"),
    ({"init_lora_weights": "pissa"}, "['init_lora_weights'] is not supported"),
    ({"r": -4}, "expected r, lora_alpha"), ({"r": 4.0}, "expected r, lora_alpha"),
    ({"lora_alpha": "8"}, "expected r, lora_alpha"),
    ({"r": None}, "expected r, lora_alpha and a list of target_modules"),
    ({"target_modules": ".*_proj"}, "expected r, lora_alpha and a list of target_modules"),
    ({"target_modules": ["q_proj"]}, "no place for weight model.layers.0.mlp.down_proj."),
    ({"r": 8}, "lora_A.weight has shape [4, 96], expected [8, 96]"),
])
def test_adapters_that_cannot_be_used_end_with_one_line(work, tmp_path, changes, said):
    folder = shutil.copytree(work / "adapter", tmp_path / "broken")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    status, _, err = command("eval.py", "logprobs", "--model", folder, "--data",
                             work / "rows.jsonl")
    assert status == 2 and said in err and err.count("\n") == 1


def test_adapter_finds_its_base_from_its_own_folder(work, tmp_path):
    """A path that is relative to the adapter goes with it, wherever the command runs."""
    for name in ("base", "adapter"):
        shutil.copytree(work / name, tmp_path / name)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path":
                                "../base"}))
    assert torch.equal(logits(M.load(tmp_path / "adapter")), logits(M.load(work / "adapter")))
