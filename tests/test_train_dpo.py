"""Preference optimisation: the losses, shared prompts, the loop, and what must not change it."""

import copy
import functools
import json
import math
import shutil
import sys
import weakref
from pathlib import Path

import conftest
import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import PLAIN, assert_same_run, curve, jsonl, perturbed, read, whole_rows, write_pairs
from safetensors.torch import load_file, save_file

import data
import model as modeling
import train_dpo
import train_sft
from labs import world
from train_dpo import Preference


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny Qwen2 checkpoint, a reference a little different, and preferences."""
    folder = tmp_path_factory.mktemp("dpo")
    families.make_checkpoint(folder / "base", "qwen2")
    perturbed(folder / "base", folder / "other")
    write_pairs(folder / "pairs.jsonl", 16)
    write_pairs(folder / "more.jsonl", 4, seed=1)
    write_pairs(folder / "val.jsonl", 5, seed=2)
    return folder


BASIC = ["--steps", 4, "--batch_size", 6, "--learning_rate", 1e-3, "--neftune_alpha", 5,
         "--dropout", 0, 0.1, "--log_every", 1]


interrupt = functools.partial(conftest.interrupt, script=train_dpo)
run = functools.partial(conftest.train, script=train_dpo)


def inputs(work, *files):
    return ["--model", work / "base", "--data", *(work / f for f in files or ["pairs.jsonl"])]


@pytest.fixture(scope="module")
def reference(work):
    """The run that the others are compared with: one rank, one micro-batch a step."""
    return run(work, "reference", *inputs(work), *BASIC)


# ---------------------------------------------------------------------------------------- losses

A = (-10.0, -12.0, -11.0, -11.0, 5.0, 6.0)  # pc, pr, rc, rr in nats, tokens of chosen and rejected
B = (-20.0, -15.0, -18.0, -16.0, 10.0, 5.0)
SIMPO = {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.5}
SUMS = {"loss": "ipo", "beta": 0.1, "length_normalize": False}
LOSSES = [  # vector, flags, loss
    (A, {}, 0.5981388694), (A, {"label_smoothing": 0.1}, 0.6181388694),
    (A, {"loss": "hinge"}, 0.8), (A, {"loss": "hinge", "beta": 0.6}, 0.0), (A, SUMS, 9.0),
    (A, {"loss": "ipo"}, 21.4677777778),
    (A, {"length_normalize": True, "beta": 0.1}, 0.6749818934),
    (A, {"length_normalize": True}, 0.1483163326), (A, SIMPO, 0.9740769842),
    (A, {"nll_weight": 1.0}, 2.5981388694),
    (B, {}, 0.8543552445), (B, {"label_smoothing": 0.1}, 0.8243552445), (B, SUMS, 64.0),
    (B, {"loss": "ipo"}, 29.16), (B, {"loss": "hinge"}, 1.3), (B, SIMPO, 0.2014132780),
]


def settle(**flags):
    """A Config with its defaults filled in."""
    c = train_dpo.Config(**flags)
    train_dpo.check_preferences(c)
    return c


def objective(vector, flags):
    """(loss, [d loss/d pc, d loss/d pr]) of a vector; SimPO is given no reference."""
    pc, pr, rc, rr, nc, nr = torch.tensor(vector, dtype=torch.float64)
    if flags.get("loss") == "simpo":
        rc = rr = torch.zeros_like(pc)
    policy = torch.stack((pc, pr))[None].requires_grad_()  # [1, 2]
    loss, _ = train_dpo.objective(settle(**flags), policy, torch.stack((rc, rr))[None],
                                  torch.stack((nc, nr))[None])
    loss.sum().backward()
    return loss.item(), policy.grad[0].tolist()


def logistic(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("vector,flags,loss", LOSSES)
def test_losses_have_their_published_values(vector, flags, loss):
    assert objective(vector, flags)[0] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("vector,flags", [case[:2] for case in LOSSES])
def test_gradients_of_the_losses_are_those_worked_out_by_hand(vector, flags):
    """Each is d loss/d margin, times d margin/d pc = 1 or 1/|c|, d margin/d pr = -1 or -1/|r|."""
    pc, pr, rc, rr, nc, nr = vector
    kind, e, a = (flags.get(key, default) for key, default in (
        ("loss", "sigmoid"), ("label_smoothing", 0.0), ("nll_weight", 0.0)))
    mean = flags.get("length_normalize", kind in ("ipo", "simpo"))
    beta = flags.get("beta", 5.0 if mean and kind == "sigmoid" else 0.1)
    if not mean:
        nc = nr = 1.0
    margin = (pc - rc) / nc - (pr - rr) / nr
    if kind == "sigmoid":
        slope = -(1 - e) * beta * logistic(-beta * margin) + e * beta * logistic(beta * margin)
    elif kind == "ipo":
        slope = 2 * (margin - 1 / (2 * beta))
    elif kind == "hinge":
        slope = -beta if beta * margin < 1 else 0.0
    else:
        slope = -beta * logistic(0.5 - beta * (pc / nc - pr / nr))
    wanted = [slope / nc - a / vector[4], -slope / nr]
    assert objective(vector, flags)[1] == pytest.approx(wanted, abs=1e-9)


def test_dpo_loss_is_ln_2_and_accuracy_0_when_policy_is_reference():
    logp = torch.tensor([[-3.0, -4.0], [-9.0, -2.0]])
    found = train_dpo.measure(settle(), logp, logp.clone(), torch.ones(2, 2))
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (found["reward_accuracy"], found["reward_margin"]) == (0.0, 0.0)
    assert (found["logp_chosen"], found["logp_rejected"]) == (-6.0, -3.0)


def test_loss_that_nobody_wrote_raises_instead_of_training_another():
    c = settle()
    c.loss = "mine"
    with pytest.raises(ValueError, match="no loss is called 'mine'"):
        train_dpo.objective(c, *torch.zeros(2, 1, 2), torch.ones(1, 2))


def test_recipes_hold_the_published_values():
    def resolve(name):
        argv = ["--model", "m", "--data", "d", "--recipe", name]
        c = train_sft.resolve_config(train_dpo.Config, argv, train_dpo.RECIPES, {})
        train_dpo.check_preferences(c)
        return c

    c = resolve("deepseek")
    assert (c.learning_rate, c.batch_size, c.epochs, c.schedule) == (5e-6, 512, 1, "cosine")
    c = resolve("steel-llm")
    assert (c.learning_rate, c.batch_size, c.epochs, c.beta, c.warmup) == (5e-6, 128, 3, 0.1, 0.1)
    c = resolve("tulu3")
    assert (c.length_normalize, c.beta, c.learning_rate, c.loss) == (True, 5.0, 5e-7, "sigmoid")


def test_default_learning_rate_is_a_quarter_of_that_of_fine_tuning(work):
    records, _ = run(work, "rate", *inputs(work), "--steps", 1, "--warmup", 0)
    assert records[0]["learning_rate"] == pytest.approx(5e-6 * 4096 / 64)


# ------------------------------------------------------------------------- log-probabilities


def random_items(vocab, count=6, seed=0):
    """Preferences of random ids, with prompts of 2 to 60 tokens and answers of 1 to 20."""
    rng = np.random.default_rng(seed)
    items = []
    for n in np.linspace(2, 60, count).astype(int):
        prompt = rng.integers(5, vocab, n).astype(np.int32)
        answers = [np.concatenate((prompt[-1:], rng.integers(5, vocab, k).astype(np.int32)))
                   for k in rng.integers(1, 20, 2)]
        items.append(Preference(prompt[:-1], tuple((a, ((1, len(a), 1.0),)) for a in answers)))
    return items


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "llama_yarn"])
def test_answers_after_a_shared_prompt_equal_two_full_passes_and_so_do_the_gradients(
        tmp_path, family, recompute):
    """Mistral's window is 8 tokens, most prompts are longer."""
    families.make_checkpoint(tmp_path, family)
    model = modeling.load(tmp_path).train()
    model.checkpoint_activations = recompute
    items = random_items(model.config.vocab_size)
    factors = torch.linspace(-1, 2, 12).view(6, 2)  # another weight for every answer
    shared = train_dpo.answer_logprobs(model, items)
    (factors * shared).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpoint_activations = False
    rows = []
    for item in items:  # one full pass for each sequence, nothing shared
        for answer, _ in item.answers:
            ids = torch.from_numpy(np.concatenate((item.prompt, answer))).long()
            targets = torch.arange(len(item.prompt) + 1, len(ids))
            rows.append(model(ids, [len(ids)], targets).sum())
    whole = torch.stack(rows).view(6, 2)
    (factors * whole).sum().backward()
    torch.testing.assert_close(shared, whole, atol=2e-4, rtol=1e-6)
    for name, p in model.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(found[name], p.grad, atol=2e-5 * scale + 1e-5, rtol=0)


def test_noise_of_a_preference_is_scaled_by_the_length_of_prompt_and_answer(work, monkeypatch):
    """NEFTune's L; the prompt is shared and takes that of the longer answer. No two keys agree."""
    model, seen = modeling.load(work / "base").train(), []
    items = random_items(model.config.vocab_size, 3)
    monkeypatch.setattr(modeling, "neftune_noise", lambda keys, lengths, size, alpha, whole: (
        seen.append((keys, whole)) or torch.zeros(len(keys), size)))
    train_dpo.answer_logprobs(model, items, [(4, 0), (4, 1), (7, 0)], neftune_alpha=5.0)
    lengths = [[len(p.prompt) + len(ids) for ids, _ in p.answers] for p in items]
    (keys, whole), = seen
    assert whole == sum(([max(pair), *pair] for pair in lengths), [])
    assert len(set(keys.tolist())) == len(keys)


# --------------------------------------------------------------------- a plain transformers loop


def apart(x):
    return x[:, 0] - x[:, 1]


def written_out(p, r, n):
    """DPO's loss and metrics in another way: rows are chosen, rejected, chosen, ..."""
    p, r, n = p.view(-1, 2), r.view(-1, 2), n.view(-1, 2).float()
    rewards = 0.1 * (p - r)
    sides = {f"{name}_{side}": values[:, k].mean() for k, side in enumerate(("chosen", "rejected"))
             for name, values in (("reward", rewards), ("logp", p), ("length", n))}
    return F.softplus(-apart(rewards)).mean(), {
        **sides, "reward_margin": apart(rewards).mean(),
        "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).float().mean()}


@pytest.mark.parametrize("family", ["llama3", "smollm2", "mistral", "qwen2", "qwen3"])
def test_three_steps_equal_a_plain_transformers_loop_with_a_live_reference(tmp_path, family):
    theirs = families.make_checkpoint(tmp_path / "base", family)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6)
    records, _ = run(tmp_path, "out", "--model", tmp_path / "base", "--data", pairs, *PLAIN,
                     "--batch_size", 6)
    conftest.compare_with_plain_loop(records, theirs, copy.deepcopy(theirs), whole_rows(
        pairs, tmp_path / "base"), written_out, tmp_path / "out")


OTHERS = {
    "cdpo": (["--label_smoothing", 0.1], lambda p, r, n: 0.9 * F.softplus(-0.1 * apart(p - r))
             + 0.1 * F.softplus(0.1 * apart(p - r))),
    "hinge": (["--loss", "hinge", "--beta", 0.5],
              lambda p, r, n: F.relu(1 - 0.5 * apart(p - r))),
    "ipo": (["--loss", "ipo"], lambda p, r, n: (apart((p - r) / n) - 5) ** 2),
    "ipo of sums": (["--loss", "ipo", "--no-length_normalize", "--beta", 0.05],
                    lambda p, r, n: (apart(p - r) - 10) ** 2),
    "length": (["--length_normalize"], lambda p, r, n: F.softplus(-5 * apart((p - r) / n))),
    "simpo": (["--loss", "simpo"], lambda p, r, n: F.softplus(0.5 - 2 * apart(p / n))),
    "nll": (["--nll_weight", 0.2],
            lambda p, r, n: F.softplus(-0.1 * apart(p - r)) - 0.2 * p[:, 0] / n[:, 0]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_three_steps_of_the_other_losses_equal_a_plain_transformers_loop(work, tmp_path, name):
    flags, loss = OTHERS[name]
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6)
    if name != "simpo":
        flags = [*flags, "--reference", work / "other"]
    records, _ = run(tmp_path, "out", "--model", work / "base", "--data", pairs, *PLAIN,
                     "--batch_size", 6, *flags)
    load = transformers.AutoModelForCausalLM.from_pretrained
    conftest.compare_with_plain_loop(
        records, load(work / "base"), load(work / "other"), whole_rows(pairs, work / "base"),
        lambda *rows: (loss(*(x.view(-1, 2) for x in rows)).mean(), {}), tmp_path / "out")


# ---------------------------------------------------------------------------------- TRL's losses


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A policy and its reference in the family whose template ends with the end of a turn: TRL
    counts whatever follows it (ChatML's newline) to the answer."""
    folder = tmp_path_factory.mktemp("llama")
    families.make_checkpoint(folder / "base", "llama3")
    perturbed(folder / "base", folder / "policy")
    return folder


TRL = {"sigmoid": [], "hinge": ["--loss", "hinge"], "ipo": ["--loss", "ipo"],
       "sigmoid_norm": ["--length_normalize"]}


@pytest.mark.parametrize("name", TRL)
def test_loss_equals_that_of_trl(llama, tmp_path, name):
    """Not so cDPO: TRL's sigmoid has label_smoothing as a flag and does not look at it."""
    rows = [{"prompt": row["prompt"], **{side: [conftest.assistant(row[side])]
             for side in ("chosen", "rejected")}}
            for row in read(Path(write_pairs(tmp_path / "a.jsonl", 6)))]
    theirs = conftest.trl_loss("DPO", rows, llama / "policy", llama / "base", tmp_path / "trl",
                               loss_type=name, label_smoothing=0.1)
    records, _ = run(tmp_path, "out", "--model", llama / "policy", "--reference", llama / "base",
                     "--data", jsonl(tmp_path / "rows.jsonl", *rows), "--steps", 1,
                     "--batch_size", 6, "--beta", 0.2, *TRL[name])
    assert records[0]["loss"] == pytest.approx(theirs, rel=1e-5)


# ------------------------------------------------------------------ what must not change the curve


@pytest.mark.parametrize("flags", [
    ["--micro_tokens", 64], ["--micro_tokens", 1], ["--checkpoint_activations"]])
def test_curve_does_not_depend_on_micro_batches_or_recomputation(work, reference, flags):
    records, _ = run(work, "_".join(map(str, flags)), *inputs(work), *BASIC, *flags)
    for key in ("loss", "reward_margin", "logp_chosen"):
        assert [r[key] for r in records] == pytest.approx(
            [r[key] for r in reference[0]], abs=2e-4 if "logp" in key else 2e-5)
    norms = [[r["grad_norm"] for r in rs] for rs in (records, reference[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_curve_does_not_depend_on_the_number_of_ranks(work, reference):
    flags = ["--val_data", work / "val.jsonl"]
    records, text = run(work, "two", *inputs(work), *BASIC, *flags, ranks=2)
    assert curve(records) == pytest.approx(curve(reference[0]), abs=2e-5)
    norms = [[r["grad_norm"] for r in rs] for rs in (records, reference[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert [r["tokens"] for r in records] == [r["tokens"] for r in reference[0]]
    alone, _ = run(work, "validated", *inputs(work), *BASIC, *flags)
    assert records[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], abs=1e-5)
    assert text.count("log-probabilities of 21 preferences") == 1
    assert curve(alone) == curve(reference[0])  # validation does not touch training


def test_resumed_run_equals_uninterrupted_run_bitwise_even_without_its_reference_cache(
        work, reference, monkeypatch):
    with monkeypatch.context() as patch:
        conftest.stop_after(patch, 2)  # read in the middle of step 3, which is finished
        _, text = run(work, "stopped", *inputs(work), *BASIC, status=143)
    assert f"--resume --output_dir {work / 'stopped'}" in text
    _, text = run(work, "stopped", *inputs(work), status=2)
    assert "--resume" in text and text.count("\n") == 1  # not overwritten by mistake
    shutil.copytree(work / "stopped", work / "bare")
    shutil.rmtree(work / "bare" / "reference")
    for name, computed in (("stopped", 0), ("bare", 1)):
        _, text = run(work, name, "--resume")
        assert text.count("log-probabilities of") == computed
        assert_same_run(work / "reference", work / name)


def test_killed_run_resumes_bitwise(work, reference):
    interrupt(work, "killed", *inputs(work), *BASIC, "--save_every", 1, at="step 2")
    run(work, "killed", "--resume")
    assert_same_run(work / "reference", work / "killed")


def test_run_whose_reference_has_changed_is_not_resumed(work, monkeypatch):
    shutil.copytree(work / "base", work / "moving")
    flags = ["--model", work / "moving", "--data", work / "pairs.jsonl", "--steps", 4]
    with monkeypatch.context() as patch:
        conftest.stop_after(patch, 1)
        run(work, "moved", *flags, status=143)
    shutil.copyfile(work / "other/model.safetensors", work / "moving/model.safetensors")
    _, text = run(work, "moved", "--resume", status=2)
    assert "the reference has changed" in text


def test_noise_is_another_with_another_seed(work):
    write_pairs(work / "pair.jsonl", 1)
    flags = [*inputs(work, "pair.jsonl"), "--steps", 1, "--neftune_alpha", 5, "--overwrite"]
    one, other = (curve(run(work, "noise", *flags, "--seed", seed)[0]) for seed in (1, 2))
    assert one != other


# ------------------------------------------------------------------------------ reference cache


def cached(folder):
    return sorted((folder / "reference").iterdir())


def test_cached_reference_is_read_and_equals_a_live_one_bit_for_bit(work):
    flags = [*inputs(work), "--batch_size", 8, "--steps", 3, "--learning_rate", 1e-3,
             "--reference", work / "other"]
    live, text = run(work, "live", *flags)
    assert "log-probabilities of 16 preferences" in text
    shutil.copytree(work / "live" / "reference", work / "again" / "reference")
    records, text = run(work, "again", *flags)
    assert "log-probabilities of" not in text and len(cached(work / "again")) == 1
    assert_same_run(work / "live", work / "again")
    (path,) = cached(work / "again")
    values = load_file(path)
    save_file(values | {"training": values["training"] + torch.tensor([1.0, 0.0])}, path)
    records, _ = run(work, "again", "--overwrite", *flags)
    assert records[0]["reward_margin"] == pytest.approx(live[0]["reward_margin"] - 0.1, abs=1e-5)


def test_reference_is_computed_anew_when_weights_data_lengths_or_template_change(work):
    shutil.copytree(work / "base", work / "grown")
    flags = ["--model", work / "grown", "--data", work / "pairs.jsonl", "--steps", 1]
    text = (work / "pairs.jsonl").read_text(encoding="utf-8")
    (work / "asked.jsonl").write_text(text.replace('"0 ', '"5 ', 1), encoding="utf-8")
    changes = [[], ["--max_length", 60], ["--template", "plain"], ["--data", work / "more.jsonl"],
               ["--reference", work / "other"], ["--data", work / "asked.jsonl"]]
    for count, change in enumerate(changes, 1):
        _, text = run(work, "cache", "--overwrite", *flags, *change)
        assert "log-probabilities of" in text and len(cached(work / "cache")) == count
    flags.append("--overwrite")
    run(work, "cache", *flags, "--learning_rate", 1e-4, "--seed", 3, "--beta", 1)
    assert len(cached(work / "cache")) == 6  # what does not enter them computes nothing
    shutil.copyfile(work / "other/model.safetensors", work / "grown/model.safetensors")
    run(work, "cache", *flags)
    assert len(cached(work / "cache")) == 7


def test_reference_is_another_where_other_tokens_are_supervised(work):
    (item,) = random_items(100, 1)
    fewer = item._replace(answers=tuple((ids, ((2, len(ids), 1.0),)) for ids, _ in item.answers))
    one, other = (train_dpo.fingerprint(work / "base", {"training": [p]}) for p in (item, fewer))
    assert one != other


def test_reference_that_numbers_its_tokens_in_another_way_is_refused(work):
    """It would read other words: as many tokens are not the same tokens."""
    shutil.copytree(work / "base", work / "swapped")
    file = json.loads((work / "swapped/tokenizer.json").read_text())
    vocabulary = file["model"]["vocab"]
    one, two = list(vocabulary)[:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (work / "swapped/tokenizer.json").write_text(json.dumps(file))
    _, text = run(work, "other_tokens", *inputs(work), "--reference", work / "swapped", status=2)
    assert "numbers its tokens in another way" in text and text.count("\n") == 1


def test_reference_in_another_precision_is_computed_anew(work):
    for count, dtype in enumerate(("fp32", "bf16"), 1):
        _, text = run(work, "kinds", *inputs(work), "--steps", 1, "--overwrite", "--dtype", dtype)
        assert "log-probabilities of" in text and len(cached(work / "kinds")) == count


def test_reference_is_gone_before_the_policy_is_loaded_and_simpo_loads_none(work, monkeypatch):
    loaded, load = [], modeling.load

    def watched(folder, *rest):
        assert all(model() is None for _, model in loaded)  # nobody holds the model before
        model = load(folder, *rest)
        loaded.append((str(folder), weakref.ref(model)))
        return model

    monkeypatch.setattr(modeling, "load", watched)
    run(work, "loads", *inputs(work), "--steps", 1, "--reference", work / "other")
    assert [folder for folder, _ in loaded] == [str(work / "other"), str(work / "base")]
    _, text = run(work, "simpo", *inputs(work), "--steps", 1, "--loss", "simpo")
    assert len(loaded) == 3 and "log-probabilities of" not in text
    assert not (work / "simpo" / "reference").exists()


@pytest.mark.parametrize("flags", [[], ["--loss", "ipo"], ["--loss", "hinge"],
                                   ["--nll_weight", 0.5], ["--label_smoothing", 0.1]])
def test_warning_says_when_the_reference_is_not_where_the_policy_started(work, flags):
    same = [*inputs(work), "--steps", 1, *flags]
    records, text = run(work, "same", "--overwrite", *same)
    assert "warning" not in text
    if not flags:
        assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert records[0]["reward_accuracy"] < 1 and abs(records[0]["reward_margin"]) < 1e-5
    _, text = run(work, "warned", "--overwrite", *same, "--reference", work / "other")
    assert "warning: the first step's loss is" in text


# ------------------------------------------------------------------------- metrics and summary

STEP = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens",
        "tokens_per_second", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy",
        "logp_chosen", "logp_rejected", "length_chosen", "length_rejected"}
VAL = {"val_loss", "val_loss_by_source", "val_reward_accuracy", "val_reward_margin",
       "val_logp_accuracy"}


def test_metrics_hold_what_the_readme_explains(work, reference):
    assert all(set(record) == STEP for record in reference[0])
    flags = ["--val_data", work / "val.jsonl", "--eval_every", 3, "--nll_weight", 0.1]
    records, _ = run(work, "keys", *inputs(work), *BASIC, *flags)
    assert [set(r) - STEP - {"nll"} for r in records] == [set(), set(), VAL, VAL]
    assert set(read(work / "keys/metrics.jsonl")[0]) == {"step", "epoch"} | VAL  # before training
    tokenizer = data.ChatTokenizer(work / "base")
    items, _ = train_dpo.load_preferences([str(work / "pairs.jsonl")], tokenizer, 2048)
    drawn = train_sft.RunData(items, [], data.Mixer([16], np.ones(1), 0), 24, 4).step(1, 6)
    first = [items[i] for i, _ in drawn]
    wanted = np.mean([p.answer_tokens[0] for p in first])
    assert reference[0][0]["length_chosen"] == pytest.approx(wanted, abs=1e-5)
    assert reference[0][0]["target_tokens"] == sum(p.targets for p in first)
    assert reference[0][0]["tokens"] == sum(  # a prompt counts once
        len(p.prompt) + sum(len(ids) for ids, _ in p.answers) for p in first)


def test_validation_loss_of_every_file_is_what_that_file_alone_would_give(work):
    flags = [*inputs(work), "--steps", 2, "--learning_rate", 3e-3, "--overwrite", "--val_data"]
    names, alone = ("val", "more"), {}
    for name in names:
        records, _ = run(work, "one_file", *flags, work / f"{name}.jsonl")
        alone[name] = pytest.approx(records[-1]["val_loss"], abs=1e-5)
    records, text = run(work, "two_files", *flags, *(work / f"{name}.jsonl" for name in names))
    assert records[-1]["val_loss_by_source"] == alone and "\n  more 0.6931 -> " in text


def test_validation_before_and_after_equals_a_plain_transformers_pass(work):
    flags = ["--val_data", work / "val.jsonl", "--steps", 4, "--learning_rate", 3e-3]
    records, text = run(work, "held", *inputs(work), *flags)
    rows = whole_rows(work / "val.jsonl", work / "base")
    sums = []
    for folder in ("held", "base"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(work / folder)
        with torch.no_grad():
            sums.append(conftest.padded_logprobs(theirs, rows)[0].view(-1, 2))
    loss, metrics = written_out(*sums, torch.ones(10))
    likelier = (sums[0][:, 0] > sums[0][:, 1]).float().mean().item()
    assert records[-1]["val_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert records[-1]["val_logp_accuracy"] == pytest.approx(likelier)
    for name in ("reward_margin", "reward_accuracy"):
        assert records[-1][f"val_{name}"] == pytest.approx(metrics[name].item(), abs=1e-5)
    before = (sums[1][:, 0] > sums[1][:, 1]).float().mean().item()
    assert f"held out: chosen likelier than rejected {before:.3f} -> {likelier:.3f}" in text
    assert f"held out: reward accuracy 0.000 -> {metrics['reward_accuracy']:.3f}" in text
    assert f"held out: margin 0.000 -> {metrics['reward_margin']:.3f}" in text


def test_summary_says_how_each_metric_moved_and_what_that_means(capsys):
    """From the first tenth of the steps to the last; step 0 has no rewards."""
    records = [{"step": 0, "val_loss": 1.0}]
    for step in range(1, 21):
        records.append({"step": step, **dict.fromkeys(train_dpo.MEANING, float(step))})
    train_dpo.explain(records)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("means over the first and the last 2 of 20 steps")
    assert lines[1] == ("  reward_margin 1.500 -> 19.500: should grow above 0: chosen answers gain "
                        "on rejected ones")
    assert len(lines) == 6 and lines[5].startswith("  length_chosen 1.500 -> 19.500: tokens; if")


def test_figure_of_rewards_is_drawn_with_matplotlib_and_silently_left_out_without(
        work, reference, monkeypatch):
    pytest.importorskip("matplotlib")
    assert (work / "reference" / "rewards.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, text = run(work, "nofigure", *inputs(work), "--steps", 1)
    assert "matplotlib" not in text and not (work / "nofigure" / "rewards.png").exists()


def test_system_text_stands_where_a_prompt_has_none(work):
    rows = [{**row, "system": "You are Tiao."} for row in read(work / "pairs.jsonl")]
    flags = ["--steps", 1, "--loss", "simpo"]
    flag, _ = run(work, "flag", *inputs(work), *flags, "--system", "You are Tiao.")
    told = jsonl(work / "told.jsonl", *rows)
    written, _ = run(work, "written", "--model", work / "base", "--data", told, *flags)
    assert (flag[0]["loss"], flag[0]["tokens"]) == (written[0]["loss"], written[0]["tokens"])


def test_mixer_serves_preferences_too(work):
    records, _ = run(work, "mixed", *inputs(work, "pairs.jsonl", "more.jsonl"), "--mix", "equal",
                     "--epochs", 1, "--batch_size", 10)
    facts = json.loads((work / "mixed" / "run.json").read_text())
    assert {n: r["examples"] for n, r in facts["mix"].items()} == {"pairs": 10, "more": 10}
    assert len(records) == 2 and records[-1]["epoch"] == 1.0


def test_dropped_pairs_are_counted_by_reason_on_screen_and_in_run_json(work):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"},
            {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": 3}]
    flags = ["--model", work / "base", "--data", jsonl(work / "three.jsonl", *rows)]
    _, text = run(work, "bad", *flags, status=2)
    assert "three.jsonl line 3" in text and text.count("\n") == 1
    _, text = run(work, "counted", *flags, "--steps", 1, "--skip_bad_rows")
    assert "1 training, 0 validation examples; dropped: chosen equals rejected: 1; " in text
    counts = json.loads((work / "counted" / "run.json").read_text())["counts"]
    assert counts == {"dropped: chosen equals rejected": 1, "dropped: bad row": 1}


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags,said", [
    (["--loss", "dpo"], "--loss"), (["--beta", "-1"], "--beta must be 0 or more"),
    (["--loss", "ipo", "--label_smoothing", 0.1], "--label_smoothing goes with --loss sigmoid"),
    (["--label_smoothing", 0.5], "in [0, 0.5)"), (["--train_on", "all"], "--train_on"),
    (["--simpo_gamma", 1], "goes with --loss simpo"),
    (["--loss", "simpo", "--reference", "x"], "takes no --reference"),
    (["--max_length", 3], "--max_length must be 4 or more"), (["--recipe", "lima"], "known are"),
    (["--reference", "absent"], "absent"), (["--reference", "SMALL"], "config.json only 10"),
    (["--bet", 1], "did you mean --beta?"),
    (["--loss", "kto"], "--loss"), (["--data", "LABELS"], "labels are for labs/kto.py"),
    (["--data", "PLAIN"], "PLAIN line 1")])
def test_bad_flags_end_with_one_line_and_touch_nothing(work, flags, said):
    row = {"prompt": "a", "completion": "b"}
    jsonl(work / "plain.jsonl", row)
    jsonl(work / "labels.jsonl", {**row, "label": True})
    config = json.loads((work / "base/config.json").read_text())
    modeling.write_json(work / "small/config.json", {**config, "vocab_size": 10})
    files = {"LABELS": work / "labels.jsonl", "PLAIN": work / "plain.jsonl",
             "SMALL": work / "small"}
    _, text = run(work, "bad", *inputs(work), *(files.get(f, f) for f in flags), status=2)
    assert said.replace("PLAIN", "plain.jsonl") in text
    assert text.count("\n") == 1 and "Traceback" not in text and not (work / "bad").exists()


# ------------------------------------------------------------------------------------- the demo


def test_demo_without_the_checkpoint_of_sft_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("other.jsonl", "pairs.jsonl"):  # without the demo's files, and with some of them
        Path("out/demo").mkdir(parents=True, exist_ok=True)
        Path("out/demo", name).touch()
        status, text = conftest.run_here(["train_dpo.py"], train_dpo)
        assert status == 2 and text.count("\n") == 1 and "`python train_sft.py`" in text
        assert not (tmp_path / "out/dpo").exists()


def test_demo_without_flags_reports_accuracy_exam_and_one_prompt_answered_by_both_models(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(world.DPO_DEMO, "epochs", 0.15)
    world.make_demo(Path("out/demo"))
    world.make_demo_model(Path("out/demo/base"))
    shutil.copytree("out/demo/base", "out/sft")  # random weights; the demo's are trained
    status, text = conftest.run_here(["train_dpo.py"], train_dpo)
    assert not status, text
    for pattern in ("held out: reward accuracy 0.000 -> ", "exam: before ", "(", "of 320), after",
                    "polite answers to 40 held-out questions: before", "\n  before: ", "  after: "):
        assert pattern in text, pattern
    assert "warning" not in text


def test_demo_shows_a_question_that_was_answered_rudely_before(capsys):
    rows = [data.Row("", [{"role": "user", "content": text}]) for text in ("甲？", "乙？")]
    before, after = ("95%", ["您好！甲", "真笨！乙"]), ("94%", ["您好！甲", "好的，乙"])
    world.report_preferences(before, after, rows)
    assert capsys.readouterr().out == (
        "polite answers to 2 held-out questions: before 1, after 2\nexam: before 95%, after 94%\n"
        "乙？\n  before: 真笨！乙\n  after:  好的，乙\n")


# ------------------------------------------------------------------------------ the real thing


@pytest.mark.skipif(not (conftest.SHARED / "models" / "story").exists(), reason="needs ../shared")
def test_story_learns_real_preferences_with_a_rising_margin(tmp_path):
    rows = json.loads((conftest.SHARED / "data/dpo_en_demo.json").read_text(encoding="utf-8"))[:16]
    records, _ = run(tmp_path, "out", "--model", conftest.SHARED / "models/story", "--max_length",
                     64, "--data", jsonl(tmp_path / "rows.jsonl", *rows), "--batch_size", 16,
                     "--steps", 4, "--warmup", 0, "--learning_rate", 3e-4)
    margins = [r["reward_margin"] for r in records]
    assert abs(margins[0]) < 1e-4 and margins[-1] > margins[2] > 0.02
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_state_of_a_finished_run_is_none_of_the_next_runs_in_the_same_folder(work):
    flags = [*inputs(work), "--log_every", 1]
    run(work, "replaced", *flags, "--steps", 2)
    interrupt(work, "replaced", *flags, "--steps", 500, "--overwrite", at="step 1/")  # unsaved
    assert not list((work / "replaced/state").iterdir())


def test_ranks_agree_on_the_cache_when_both_groups_are_the_same_preferences(work):
    flags = [*inputs(work), "--val_data", work / "pairs.jsonl", "--steps", 1]
    records, _ = run(work, "both", *flags, ranks=2)
    assert "val_reward_accuracy" in records[0]
    assert len(list((work / "both" / "reference").iterdir())) == 1


def test_a_run_is_resumed_by_the_script_that_began_it(work, reference):
    _, text = conftest.train(work, "reference", "--resume", script=train_sft, status=2)
    assert "of another script" in text and text.count("\n") == 1
