"""Heads on frozen features: numbers by hand, what is kept of old groups, who forgets."""

import random

import families
import numpy as np
import pytest
import torch
from conftest import command

import data
import model as modeling
from labs import classify

C = classify.Config()
H = torch.tensor([[1.0, 0, 2], [0, 1, 1], [1, 1, 0], [2, 0, 1]])
Y = torch.tensor([0, 1, 1, 0])
ONES = torch.ones(1, 3)


@pytest.fixture(scope="module")
def groups():
    """Six Gaussian classes in three groups, well apart."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 8, generator=generator)
    y = torch.arange(6).repeat_interleave(20)
    x = centres[y] + torch.randn(120, 8, generator=generator)
    return list(zip(x.split(40), y.split(40), strict=True))


def share_right(make, groups, of):
    torch.manual_seed(0)
    (x, y), head = of, make(groups, C)
    return (head(x).argmax(1) == y).float().mean().item()


def test_ridge_weights_and_scores_by_hand():
    W = classify.ridge_weights(H, torch.eye(2)[Y], 0.5)
    expected = torch.tensor([[0.309278, 0.020619], [-0.247423, 0.783505], [0.309278, 0.020619]])
    assert torch.allclose(W, expected, atol=1e-6)
    assert (ONES @ W)[0].tolist() == pytest.approx([0.371134, 0.824742], abs=1e-6)


def test_prototypes_and_their_cosines_by_hand():
    means = classify.prototypes(H, Y)
    assert means.tolist() == [[1.5, 0, 1.5], [0.5, 1, 0.5]]
    near = classify.simple_cil([(H, Y)], C)(ONES)[0]
    assert near.tolist() == pytest.approx([0.816497, 0.942809], abs=1e-6)


def test_simple_cil_gives_old_classes_the_same_scores_when_new_ones_come(groups):
    x = groups[0][0]
    two, three = (classify.simple_cil(groups[:n], C)(x) for n in (2, 3))
    assert torch.equal(two, three[:, :4])


def test_ranpac_needs_only_sums_over_the_groups(groups):
    torch.manual_seed(0)
    R, gram, cross = torch.randn(8, 1000), 0, 0
    for x, y in groups:
        hidden = (x @ R).relu().double()
        gram = gram + hidden.T @ hidden
        cross = cross + hidden.T @ torch.eye(6).double()[y]
    x = groups[1][0]
    expected = (x @ R).relu() @ (gram + torch.eye(1000)).inverse().matmul(cross).float()
    torch.manual_seed(0)
    assert torch.allclose(classify.ranpac(groups, C)(x), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["simplecil", "ranpac", "slca", "esn", "trained at once"])
def test_what_was_learnt_first_is_known_in_the_end(groups, name):
    assert share_right(classify.HEADS[name], groups, groups[0]) > 0.9


def test_a_head_trained_in_turn_forgets_what_was_learnt_first(groups):
    assert share_right(classify.in_turn, groups, groups[0]) < 0.5
    assert share_right(classify.in_turn, groups, groups[2]) > 0.9


def test_slca_draws_from_its_gaussians_and_sees_no_old_row(groups, monkeypatch):
    seen, real = [], classify.train_head
    monkeypatch.setattr(classify, "train_head", lambda head, x, y, **k: seen.append(x) or real(
        head, x, y, **k))
    torch.manual_seed(0)
    classify.slca(groups, C)
    rows = {tuple(row) for x, _ in groups for row in x.tolist()}
    assert not rows & set(map(tuple, seen[-1].tolist())) and len(seen[-1]) == 6 * C.rows
    assert (seen[-1].mean(0) - torch.cat([x for x, _ in groups]).mean(0)).abs().max() < 0.5


def test_esns_anchor_makes_the_heads_equally_loud(groups):
    x, y = groups[0]
    torch.manual_seed(0)
    for anchor in (3.0, 10.0):
        head = classify.train_head(torch.nn.Linear(8, 2), x, y, anchor=anchor)
        assert head(x).logsumexp(1).mean().item() == pytest.approx(anchor, abs=1.0)


@pytest.mark.parametrize("flag,value", [("--groups", 3), ("--rows", 1), ("--model", "nowhere")])
def test_bad_flags_end_with_one_line(flag, value):
    status, _, err = command("labs/classify.py", flag, value)
    assert status == 2 and err.count("\n") == 1


def test_slca_draws_rows_that_spread_as_the_class_did(groups, monkeypatch):
    drawn = []
    monkeypatch.setattr(classify, "train_head", lambda head, x, y: drawn.append((x, y)) or head)
    torch.manual_seed(0)
    classify.slca(groups, classify.Config(rows=4000))
    (x, y), (own, classes) = drawn[-1], groups[0]
    found, expected = x[y == 1].T.cov(), own[classes == 1].T.cov()
    # A covariance of 4,000 draws strays by sqrt(2 / 4000) = 2.2% of itself; the largest of 64 more.
    assert (found - expected).abs().max() < 0.1 * expected.diag().max()


def test_esn_takes_the_vote_of_five_temperatures(groups, monkeypatch):
    """T ln sum e^(s / T) of (1, -10) is 1, of (0.9, 0.9) 0.9 + T ln 2: more from T = 0.144 on."""
    given = iter([torch.tensor([1.0, -10.0]), torch.tensor([0.9, 0.9])])

    def head(scores):
        return lambda x: scores.expand(len(x), 2)

    monkeypatch.setattr(classify, "train_head", lambda *_, **__: head(next(given)))
    scores = classify.esn(groups[:2], C)(torch.zeros(1, 8))[0]
    assert scores.tolist() == pytest.approx([3.0, 2.0, 3.5, 3.5], abs=1e-3)


def test_adam_tunes_a_copy_that_tells_the_first_group_apart(tmp_path):
    families.make_checkpoint(tmp_path, "qwen2")
    model, draw = modeling.load(tmp_path).requires_grad_(False), np.random.default_rng(0)
    rows = [data.Example(draw.integers(3, 20, 6).astype(np.int32), ((4, 6, 1.0),))
            for _ in range(8)]
    y = torch.arange(8) % 2  # of random rows: only training can tell the classes apart
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    tuned = classify.adapt(model, rows, y, random.Random(0))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in tuned.parameters())

    apart = []
    for one in (model, tuned):
        x = classify.features(one, rows)
        means = classify.prototypes(x, y)
        apart.append(((means[0] - means[1]).norm() / (x - means[y]).norm()).item())
    assert apart[1] > 1.5 * apart[0]
