"""Merging: weights by hand, torch's averages, Fisher information by enumeration."""

import json
import shutil

import families
import numpy as np
import peft
import pytest
import torch
from conftest import TOLERANCE, command, jsonl, weights
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

import data
import model as modeling
from labs import merge

ROWS = [{"prompt": "the sea", "response": text} for text in ("river runs", "moon on people", "光")]


class Point(torch.nn.Module):
    """A model that is one parameter."""

    def __init__(self, *values):
        super().__init__()
        self.t = torch.nn.Parameter(torch.tensor(values))


def merged(points, weights, fishers=None):
    fishers = [{"t": torch.tensor(f)} for f in fishers] if fishers else [{}] * len(points)
    return merge.merge(zip(points, fishers, strict=True), weights).t.tolist()


A, B = Point(1.0, 2.0), Point(3.0, -2.0)


@pytest.mark.parametrize("weights,fishers,expected", [
    ([1, 1], None, (2, 0)), ([0.25, 0.75], None, (2.5, -1)),
    ([1, 1], ((4.0, 1.0), (1.0, 3.0)), (1.4, -1)),
    ([0.25, 0.75], ((4.0, 1.0), (1.0, 3.0)), (1.857143, -1.6))])
def test_average_of_two_points_by_hand(weights, fishers, expected):
    assert merged([A, B], weights, fishers) == pytest.approx(expected, abs=1e-6)


def test_where_no_checkpoint_has_information_the_mean_is_taken():
    fishers = (0.0, 1e-12), (0.0, 3e-12)
    assert merged([A, B], [1, 3], fishers) == pytest.approx((2.5, -1.6), abs=1e-6)


def test_average_leaves_the_checkpoints_as_they_were():
    merged([A, B], [1, 1])
    assert A.t.tolist() == [1, 2] and B.t.tolist() == [3, -2]


def test_moving_average_of_1_2_3_4_is_1_561():
    points, found = [Point(float(x)) for x in (1, 2, 3, 4)], merge.ema_weights(3, 0.9)
    assert found == pytest.approx([0.729, 0.081, 0.09, 0.1])
    assert merged(points, found) == pytest.approx([1.561])


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_averages_are_those_of_torchs_swa_utils(kind):
    torch.manual_seed(0)
    models = [torch.nn.Linear(5, 3) for _ in range(4)]
    rule = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if kind == "ema" else {}
    theirs = AveragedModel(models[0], **rule)
    for model in models:
        theirs.update_parameters(model)
    found = merge.ema_weights(3, 0.9) if kind == "ema" else [1] * 4
    ours = merge.merge(((model, {}) for model in models), found)
    for mine, other in zip(ours.parameters(), theirs.module.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


# ------------------------------------------------------------------------------ Fisher information


def edit(folder, name, file, change):
    """A copy of checkpoint a with another file."""
    shutil.copytree(folder / "a", folder / name)
    content = json.loads((folder / name / file).read_text(encoding="utf-8"))
    change(content)
    (folder / name / file).write_text(json.dumps(content), encoding="utf-8")


def swap(vocabulary, one, two):
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    for name, seed in (("a", 0), ("b", 1)):
        families.make_checkpoint(folder / name, "smollm2", seed=seed)
    families.make_checkpoint(folder / "other", "llama3")
    edit(folder, "wide", "config.json", lambda config: config.update(hidden_size=32))
    edit(folder, "words", "tokenizer.json", lambda t: swap(t["model"]["vocab"], *"ab"))
    jsonl(folder / "rows.jsonl", *ROWS)
    return folder


def examples_of(work):
    return data.load_examples([str(work / "rows.jsonl")], data.ChatTokenizer(work / "a"))[0]


class Softmax(torch.nn.Module):
    """A model whose logits are its head, whatever it reads."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Parameter(torch.tensor([[1.0], [0.0], [-1.0]]))

    def hidden(self, ids, lengths, wanted):
        return torch.ones(len(wanted), 1, requires_grad=True), None

    def next_logits(self, states):
        return states @ self.head.T


def test_exact_fisher_of_a_softmax_is_p_times_1_less_p(monkeypatch):
    """Every token is drawn in turn, and counts as often as the model would draw it."""
    model, example = Softmax(), data.Example(np.array([0, 0]), ((1, 2, 1.0),))
    p, exact = torch.tensor([1.0, 0.0, -1.0]).softmax(0), torch.zeros(3)
    for y in range(3):
        def draw(weights, count, generator, y=y):
            assert torch.allclose(weights, p[None]) and count == 1
            return torch.tensor([[y]])

        monkeypatch.setattr(torch, "multinomial", draw)
        exact += p[y] * merge.fisher_diagonal(model, [example], "sampled")["head"][:, 0]
    assert exact.tolist() == pytest.approx([0.222695, 0.184836, 0.081925], abs=1e-6)
    assert torch.allclose(exact, p * (1 - p), atol=1e-6)

    # The data's token is 0: one square, not a mean over p.
    empirical = merge.fisher_diagonal(model, [example], "data")["head"][:, 0]
    assert torch.allclose(empirical, (torch.tensor([1.0, 0.0, 0.0]) - p).square(), atol=1e-6)


def test_empirical_fisher_is_that_of_transformers(work):
    examples, model = examples_of(work), modeling.load(work / "a")
    found = merge.fisher_diagonal(model, examples, "data")
    theirs = AutoModelForCausalLM.from_pretrained(work / "a").float()
    theirs.model.embed_tokens.padding_idx = None
    expected = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for e in examples:
        ids, ((first, end, _),) = torch.tensor([e.ids.tolist()]), e.spans
        logp = theirs(ids).logits[0, first - 1 : end - 1].log_softmax(-1)
        theirs.zero_grad()
        logp.gather(1, ids[0, first:end, None]).sum().backward()
        for name, p in theirs.named_parameters():
            expected[name] += p.grad.square() / len(examples)
    assert found.keys() == expected.keys()  # a tied matrix stands there once
    for name, value in expected.items():
        assert (found[name] - value).norm() < TOLERANCE * value.norm(), name
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------- the command


def run(work, *flags, status=0):
    code, out, err = command("labs/merge.py", *flags)
    assert code == status, out + err
    return out if status == 0 else err


def test_merged_checkpoint_is_the_mean_and_loads_in_transformers(work, tmp_path):
    out = run(work, "--model", work / "a", work / "b", "--weights", 1, 3, "--output_dir",
              tmp_path / "m")
    assert "0.2500 of" in out and "0.7500 of" in out
    a, b = weights(work / "a"), weights(work / "b")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    for name, value in weights(tmp_path / "m").items():
        assert torch.allclose(value, a[name] / 4 + b[name] * 3 / 4, atol=1e-6), name
        assert torch.equal(theirs[name], value)
    assert (tmp_path / "m/tokenizer.json").exists()


def test_moving_average_of_the_command_weighs_the_oldest_by_its_decay(work, tmp_path):
    out = run(work, "--model", work / "a", work / "b", work / "a", "--method", "ema", "--decay",
              0.5, "--output_dir", tmp_path / "m")
    assert [line.split()[0] for line in out.splitlines() if " of " in line] == [
        "0.2500", "0.2500", "0.5000"]
    a, b = weights(work / "a"), weights(work / "b")
    for name, value in weights(tmp_path / "m").items():
        assert torch.allclose(value, 0.75 * a[name] + 0.25 * b[name], atol=1e-6), name


def test_fisher_merge_of_the_command_is_that_of_its_parts_and_says_its_kind(work, tmp_path):
    rows, m = work / "rows.jsonl", tmp_path / "m"
    out = run(work, "--model", work / "a", work / "b", "--fisher", rows, "--labels", "data",
              "--output_dir", m)
    assert "empirical Fisher" in out
    models, e = [modeling.load(work / name) for name in "ab"], examples_of(work)
    expected = merge.merge([(x, merge.fisher_diagonal(x, e, "data")) for x in models], [1, 1])
    for name, value in expected.named_parameters():
        assert torch.equal(weights(m)[name], value), name


def test_adapter_is_merged_into_its_base_as_peft_does(work, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(work / "a").float()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"],
                             init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    run(work, "--model", tmp_path / "adapter", "--output_dir", tmp_path / "m")
    expected = model.merge_and_unload().state_dict()
    for name, value in weights(tmp_path / "m").items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


@pytest.mark.parametrize("flags", ["--decay 3", "--fisher rows.jsonl", "--weights 1 2",
                                   "--method ema"])
def test_lesson_refuses_what_only_the_command_reads(work, flags):
    error = run(work, *flags.split(), "--output_dir", work / "new", status=2)
    assert "the lesson takes" in error and error.count("\n") == 1 and not (work / "new").exists()


@pytest.mark.parametrize("flags,words", [
    ("--model a", "needs two checkpoints"), ("--model a a --weights 1", "--weights needs a number"),
    ("--model a a --weights 1 -1", "--weights needs a number above 0"),
    ("--model a a --method ema --weights 1 1", "goes with --method linear"),
    ("--model a a --decay 1", "--decay must be in [0, 1)"),
    ("--model a a a --fisher rows.jsonl rows.jsonl", "--fisher needs one file"),
    ("--model a other", "does not fit"), ("--model a wide", "its hidden_size differs"),
    ("--model a words", "its tokenizer differs"), ("--model a none", "there is no folder"),
    ("--model a a --output_dir a", "is the input"),
    ("--model a a --output_dir b", "holds a checkpoint")])
def test_what_does_not_fit_is_refused_with_one_line(work, flags, words):
    argv = [work / word if word[0] not in "-0123456789le" else word for word in flags.split()]
    if "--output_dir" not in argv:
        argv += ["--output_dir", work / "new"]
    before = weights(work / "b")
    error = run(work, *argv, status=2)
    assert words in error and error.count("\n") == 1 and not (work / "new").exists()
    assert all(torch.equal(value, before[name]) for name, value in weights(work / "b").items())
