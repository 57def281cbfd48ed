"""KTO: its loss, its reference point from mismatched answers, and what must not change it."""

import functools
import json
import random
import shutil

import conftest
import families
import numpy as np
import pytest
import torch
import transformers
from conftest import PLAIN, assistant, curve, jsonl, perturbed, read, some_words, whole_rows

import data
import train_dpo
from labs import kto

run = functools.partial(conftest.train, script=kto)
BASIC = ["--steps", 4, "--batch_size", 6, "--learning_rate", 1e-3, "--neftune_alpha", 5,
         "--dropout", 0, 0.1, "--log_every", 1]


def write_labels(path, count, seed=0):
    """Answers with a label, two to every prompt; two of three are liked."""
    rng = random.Random(seed)
    questions = [f"{i} {some_words(rng, 12)}" for i in range(count // 2)]
    rows = [{"prompt": questions[i // 2], "completion": some_words(rng, 15), "label": i % 3 > 0}
            for i in range(count)]
    return jsonl(path, *rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny Qwen2 checkpoint, a reference a little different, and labels."""
    folder = tmp_path_factory.mktemp("kto")
    families.make_checkpoint(folder / "base", "qwen2")
    perturbed(folder / "base", folder / "other")
    write_labels(folder / "labels.jsonl", 12)
    return folder


def inputs(work, model="base"):
    return ["--model", work / model, "--data", work / "labels.jsonl"]


@pytest.fixture(scope="module")
def reference(work):
    """A run whose policy starts away from the reference, so that z is above 0, and its flags."""
    flags = [*inputs(work), *BASIC, "--reference", work / "other", "--beta", 0.3]
    return *run(work, "reference", *flags), flags


# ---------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("z,liked,loss", [(0.0, True, 0.4750208125), (0.0, False, 0.4750208125),
                                          (2.0, True, 0.5249791875), (2.0, False, 0.4255574832)])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_loss_has_its_published_values_and_its_gradient_moves_towards_the_label(
        z, liked, loss, weight):
    c = kto.Config(**{"desirable_weight" if liked else "undesirable_weight": weight})
    policy = torch.tensor([-10.0 if liked else -12.0], requires_grad=True)
    found, rewards = kto.objective(c, policy, torch.tensor([-11.0]), torch.ones(1),
                                   torch.tensor([liked]), z)
    found.sum().backward()
    assert found.item() == pytest.approx(weight * loss, abs=1e-6)
    assert rewards.item() == pytest.approx(0.1 if liked else -0.1)
    wanted = (-1 if liked else 1) * 0.1 * weight * loss * (1 - loss)  # s' = s (1 - s)
    assert policy.grad.item() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("policy,against", [("base", "other"), ("other", "base")])
def test_three_steps_equal_a_plain_transformers_loop_with_z_from_mismatched_pairs(
        work, tmp_path, policy, against):
    """The mean log-ratio is below 0 the one way round, so that z is 0, and above it the other."""
    labels = write_labels(tmp_path / "labels.jsonl", 8)
    records, _ = run(tmp_path, "out", "--model", work / policy, "--reference", work / against,
                     "--data", labels, *PLAIN, "--batch_size", 8, "--desirable_weight", 0.5,
                     "--undesirable_weight", 1.5, "--nll_weight", 0.1)
    liked = torch.tensor([row["label"] for row in read(tmp_path / "labels.jsonl")])
    rows = whole_rows(labels, work / "base")
    for i in range(8):  # rows 2k and 2k+1 have one prompt: 2k+2 comes after them, 2k-1 before
        ids, first, end = rows[(i // 2 * 2 + (2 if liked[i] else -1)) % 8]
        prompt, start = rows[i][0], rows[i][1]
        rows.append((prompt[:start] + ids[first:end], start, start + end - first))

    def loss_of(p, r, n):
        z = (p - r)[8:].mean().clamp(min=0).detach()
        ratio = (p - r)[:8]
        loss = torch.where(liked, 0.5 * torch.sigmoid(0.1 * (z - ratio)),
                           1.5 * torch.sigmoid(0.1 * (ratio - z)))
        nll = -(p / n)[:8] * liked  # of liked answers only
        return (loss + 0.1 * nll).mean(), {
            "kl": z, "nll": nll.mean(), "reward_chosen": 0.1 * ratio[liked].mean(),
            "logp_rejected": p[:8][~liked].mean(), "reward_accuracy":
            ((ratio > z) == liked).float().mean(), "length_rejected": n[:8][~liked].float().mean()}

    load = transformers.AutoModelForCausalLM.from_pretrained
    conftest.compare_with_plain_loop(records, load(work / policy), load(work / against), rows,
                                     loss_of, tmp_path / "out")
    assert (records[0]["kl"] > 0) == (policy == "other")


def test_loss_equals_that_of_trl(tmp_path):
    """TRL mismatches an answer with that of the row before in the batch, we with the next or the
    last one: of two rows both take the other. Llama 3's template ends with the end of a turn; TRL
    counts whatever follows it (ChatML's newline) to the answer.
    """
    families.make_checkpoint(tmp_path / "base", "llama3")
    perturbed(tmp_path / "base", tmp_path / "policy")
    rows = [{"prompt": [conftest.user(question)], "completion": [assistant(answer)], "label": label}
            for question, answer, label in (("a b the sea", "床前 明月 光 yes", True),
                                            ("你好 the river runs", "people walked no", False))]
    theirs = conftest.trl_loss("KTO", rows, tmp_path / "policy", tmp_path / "base",
                               tmp_path / "trl")
    records, _ = run(tmp_path, "out", "--model", tmp_path / "policy", "--reference",
                     tmp_path / "base", "--data", jsonl(tmp_path / "rows.jsonl", *rows),
                     "--steps", 1, "--batch_size", 2, "--beta", 0.2)
    assert records[0]["loss"] == pytest.approx(theirs, rel=1e-5)
    assert records[0]["kl"] > 0.1


# ----------------------------------------------------------------------------- the reference point


def test_answer_is_mismatched_with_a_prompt_that_is_not_its_own(work):
    tokenizer = data.ChatTokenizer(work / "base")
    items, _ = kto.load_labelled([str(work / "labels.jsonl")], tokenizer, 128)
    assert len({p.key for p in items}) == 6 and len(items) == 12
    for item, mismatched in zip(items, kto.add_mismatched(items, 128), strict=True):
        (ids, _), (other, spans) = mismatched.answers
        assert np.array_equal(ids, item.answers[0][0]) and other[0] == ids[0]
        partners = [p for p in items if np.array_equal(p.answers[0][0][1:], other[1:])]
        assert partners and all(p.key != item.key for p in partners)
        assert spans == partners[0].answers[0][1]
    short = kto.add_mismatched(items, 80)
    assert max(len(p.prompt) + len(ids) for p in short for ids, _ in p.answers[1:]) == 80


@pytest.mark.parametrize("micro_tokens", [1, 64])
def test_reference_point_is_that_of_the_global_step_whatever_the_micro_batches(
        work, reference, micro_tokens):
    before, _, flags = reference
    records, _ = run(work, f"micro{micro_tokens}", *flags, "--micro_tokens", micro_tokens)
    assert max(r["kl"] for r in before) > 0.5
    assert [r["kl"] for r in records] == pytest.approx([r["kl"] for r in before], abs=1e-4)
    assert curve(records) == pytest.approx(curve(before), abs=1e-5)


def test_two_ranks_equal_one_even_with_a_single_answer_in_a_step(work):
    """5 answers, then 1: the second rank has nothing to do, and the step has but one side."""
    flags = [*inputs(work, "other"), "--reference", work / "base", "--epochs", 0.5,
             "--batch_size", 5, "--learning_rate", 1e-3]
    one, text = run(work, "one", *flags)
    two, _ = run(work, "two", *flags, ranks=2)
    for key in ("loss", "kl", "grad_norm"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-4, abs=1e-5)
    assert len(one) == 2 and one[0]["kl"] > 0.01 and "reward_margin" in one[0]
    assert (one[1]["reward_chosen"] is None) != (one[1]["reward_rejected"] is None)
    assert "what they mean" not in text and "nan" not in text  # one step has no before and after


def test_validation_takes_its_reference_point_from_its_own_mismatched_answers(work):
    """The same answers are trained on, once and without moving the weights."""
    (record,), _ = run(work, "still", *inputs(work, "other"), "--reference", work / "base",
                       "--val_data", work / "labels.jsonl", "--batch_size", 12, "--steps", 1,
                       "--learning_rate", 1e-12)
    assert record["kl"] > 0.01
    for name in ("loss", "reward_accuracy", "reward_margin"):
        assert record[f"val_{name}"] == pytest.approx(record[name], abs=1e-5)


# ------------------------------------------------------------------------------------ runs and rows


def test_resumed_run_equals_uninterrupted_run_bitwise_even_without_its_reference_cache(
        work, reference, monkeypatch):
    with monkeypatch.context() as patch:
        conftest.stop_after(patch, 2)  # read in the middle of step 3, which is finished
        _, text = run(work, "stopped", *reference[2], status=143)
    assert f"python -m labs.kto --resume --output_dir {work / 'stopped'}" in text
    shutil.rmtree(work / "stopped" / "reference")
    run(work, "stopped", "--resume")
    conftest.assert_same_run(work / "reference", work / "stopped")


def test_metrics_are_those_of_preferences_and_kl(reference):
    wanted = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens",
              "tokens_per_second", "reward_margin", "reward_accuracy", "kl"}
    wanted |= {f"{name}_{side}" for name in ("reward", "logp", "length")
               for side in ("chosen", "rejected")}
    assert all(set(record) == wanted for record in reference[0])


def test_balance_of_labels_is_reported_with_the_weights_its_authors_advise(work, reference):
    assert "8 liked, 4 disliked answers; with their weights 2.00 : 1 (KTO" in reference[1]
    _, text = run(work, "weighed", *inputs(work), "--steps", 1, "--desirable_weight", 0.6,
                  "--undesirable_weight", 1.2)
    assert "with their weights 1.00 : 1\n" in text
    rows = [{"prompt": letter, "completion": "yes", "label": True} for letter in "ab"]
    _, text = run(work, "likes", "--model", work / "base", "--data",
                  jsonl(work / "likes.jsonl", *rows), "--steps", 1)
    assert "warning: 2 liked, 0 disliked answers; only liked ones count" in text


@pytest.mark.parametrize("flags,said", [
    (["--data", "ONE"], "one.jsonl line 1: KTO needs at least two prompts"),
    (["--val_data", "ONE"], "one.jsonl line 1: KTO needs at least two prompts"),
    (["--data", "PLAIN"], "plain.jsonl line 1: expected a label"),
    (["--data", "ASKED"], "asked.jsonl line 1: expected a label and an answer"),
    (["--length_normalize"], "unknown flag"), (["--label_smoothing", 0.1], "unknown flag"),
    (["--recipe", "tulu3"], "--recipe"), (["--beta", 0], "--beta must be above 0"),
    (["--desirable_weight", -1], "--desirable_weight must be 0 or more"),
])
def test_what_kto_cannot_use_is_refused_in_one_line(work, flags, said):
    one = [{"prompt": "a", "completion": text, "label": text > "c"} for text in "bcd"]
    files = {"ONE": jsonl(work / "one.jsonl", *one),
             "PLAIN": jsonl(work / "plain.jsonl", {"prompt": "a", "completion": "b"}),
             "ASKED": jsonl(work / "asked.jsonl", {"messages": [conftest.HI], "label": 1})}
    _, text = run(work, "bad", *inputs(work), *(files.get(f, f) for f in flags), status=2)
    assert said in text.splitlines()[-1] and "Traceback" not in text
    assert not (work / "bad").exists()


def test_pair_is_a_liked_and_a_disliked_answer_to_one_prompt(work):
    path = jsonl(work / "pair.jsonl", {"prompt": "q", "chosen": "yes", "rejected": "no"})
    tokenizer = data.ChatTokenizer(work / "base")
    liked, disliked = kto.load_labelled([path], tokenizer, 128)[0]
    (pair,), _ = train_dpo.load_preferences([path], tokenizer, 128)
    assert (liked.label, disliked.label) == (True, False) and liked.key == disliked.key == pair.key
    for item, (ids, spans) in zip((liked, disliked), pair.answers, strict=True):
        assert np.array_equal(item.answers[0][0], ids) and item.answers[0][1] == spans


@pytest.mark.skipif(not (conftest.SHARED / "models" / "story").exists(), reason="needs ../shared")
def test_story_learns_real_labels_with_a_rising_margin(tmp_path):
    rows = json.loads((conftest.SHARED / "data/kto_en_demo.json").read_text(encoding="utf-8"))[:16]
    records, _ = run(tmp_path, "out", "--model", conftest.SHARED / "models/story", "--max_length",
                     64, "--data", jsonl(tmp_path / "rows.jsonl", *rows), "--batch_size", 16,
                     "--steps", 4, "--warmup", 0, "--learning_rate", 3e-4)
    margins = [r["reward_margin"] for r in records]
    assert abs(margins[0]) < 1e-4 and margins[-1] > margins[2] > 0.02
