"""Prompt pools: choices by hand, what is learnt and what stays, prefixes of their own."""

import random

import families
import numpy as np
import pytest
import torch
from conftest import command

import data
import model as modeling
from labs import pools

Q = torch.tensor([[1.0, 2, 2]])
KEYS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [2, 4, 4], [-1, 0, 0]])
WAYS = [pools.own, pools.l2p, pools.dualprompt, pools.coda, pools.dap]


@pytest.fixture
def pool():
    """Four prompts for a model whose tokens have 8 numbers of keys and values."""
    torch.manual_seed(0)
    made = pools.Pool(4, 3, 8, layers=2)
    made.keys.data = KEYS.clone()
    return made


def test_l2p_joins_the_two_nearest_prompts_and_pulls_their_keys_by_hand(pool):
    prompts, pull, chosen = pools.l2p(pool, Q)
    assert chosen.tolist() == [[2, 1]]  # cosines 1/3, 0.942809, 1, -1/3
    assert pull.item() == pytest.approx(pools.PULL * 0.057191, abs=1e-6)
    assert torch.equal(prompts[0], torch.cat([pool.prompts[2], pool.prompts[1]]))


def test_l2p_teaches_only_what_it_chose(pool):
    prompts, pull, _ = pools.l2p(pool, Q)
    (prompts.sum() + pull).backward()
    touched = pool.prompts.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [False, True, True, False]


def test_in_training_the_told_task_wins_over_the_nearest_key(pool):
    assert pools.own(pool, Q)[2].tolist() == [[2]]
    prompts, pull, chosen = pools.own(pool, Q, task=3)
    assert chosen.tolist() == [[3]] and torch.equal(prompts[0], pool.prompts[3])
    assert pull.item() == pytest.approx(pools.PULL * 4 / 3)


def test_dualprompt_has_the_general_prompt_in_the_lower_half_of_the_layers(pool):
    prompts = pools.dualprompt(pool, Q)[0][0]
    assert torch.equal(prompts[:, :4], pool.general[:, :4])
    assert torch.equal(prompts[:, 4:], pool.prompts[2][:, 4:])


def test_coda_weights_each_prompt_by_its_cosine(pool):
    pools.coda(pool, Q, task=3)  # all four are in use
    prompts, _, order = pools.coda(pool, Q)
    expected = sum(w * p for w, p in zip([1 / 3, 0.942809, 1, -1 / 3], pool.prompts, strict=True))
    assert torch.allclose(prompts[0], expected, atol=1e-5) and order[0, :2].tolist() == [2, 1]


def test_coda_leaves_the_prompts_of_earlier_tasks_as_they_are(pool):
    prompts, apart, _ = pools.coda(pool, Q, task=1)
    (prompts.square().sum() + apart).backward()
    for part in (pool.prompts, pool.keys, pool.A):
        touched = part.grad.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [False, True, False, False]


def test_dap_makes_another_prompt_for_another_question_of_the_same_task(pool):
    one, two = (pools.dap(pool, q, task=0)[0] for q in (Q, -Q))
    assert one.shape == (1, pools.TOKENS, 8) and not torch.allclose(one, two)


def test_dap_scales_and_shifts_what_the_question_makes_by_what_its_task_learnt(pool):
    with torch.no_grad():
        pool.V.weight.copy_(torch.arange(24.0).view(8, 3))
        pool.w.copy_(torch.tensor([[1.0], [2], [3], [4]]))
        pool.film.weight.zero_()
        pool.film.bias.copy_(torch.cat((torch.full((8,), 2.0), torch.full((8,), 5.0))))
    made = pools.dap(pool, Q, task=0)[0][0]  # [tokens, W]
    normed = torch.tensor([-2.0, 1, 1]) / 3 / (2 / 9 + 1e-5) ** 0.5  # (1, 2, 2) and LN's epsilon
    expected = 2 * pool.w * (pool.V.weight @ normed) + 5
    assert torch.allclose(made, expected, rtol=1e-5)


def test_coda_asks_for_parts_that_are_orthogonal(pool):
    apart = pools.coda(pool, Q, task=3)[1]
    expected = 0.0
    for part in (pool.A, pool.keys, pool.prompts.flatten(1)):
        unit = part / part.norm(dim=1, keepdim=True)
        expected += (unit @ unit.T).triu(1).square().sum() / 16
    assert apart.item() == pytest.approx(expected.item(), rel=1e-5) and apart > 0.1


def tiny(folder):
    """(model, four examples) for the functions that train and examine."""
    families.make_checkpoint(folder, "qwen2")
    rows = [data.Example(np.arange(3 + k, 11 + k, dtype=np.int32), ((4, 8, 1.0),))
            for k in range(4)]
    return modeling.load(folder), rows


def test_query_is_the_mean_state_over_the_question_alone(tmp_path):
    model, rows = tiny(tmp_path)
    states, _ = model.hidden(torch.tensor(rows[1].ids[:4]).long(), [4])
    assert torch.allclose(pools.queries(model, rows)[1], states.mean(0), atol=1e-5)


def test_an_answer_is_right_only_if_all_its_tokens_are(tmp_path):
    model, rows = tiny(tmp_path)
    new = modeling.generate(model, [e.ids[:4].tolist() for e in rows], 4, stop_ids=[])
    true = [e._replace(ids=np.array([*e.ids[:4], *ids], np.int32))
            for e, ids in zip(rows, new, strict=True)]
    true[2].ids[7] = (true[2].ids[7] + 1) % model.config.vocab_size
    right, _ = pools.examine(model, None, None, true, torch.zeros(4, 1))
    assert right.tolist() == [True, True, False, True]


def test_kept_rows_are_half_of_a_batch(tmp_path, monkeypatch):
    model, rows = tiny(tmp_path)
    batches, collate = [], data.collate
    monkeypatch.setattr(data, "collate", lambda some: batches.append(some) or collate(some))
    kept = [rows[3]]
    pools.learn(model, None, None, rows[:1] * 16, torch.zeros(16, 1), 1, kept,
                pools.Config(steps=1), random.Random(0))
    assert sum(e is rows[3] for e in batches[0]) == 8 == len(batches[0]) / 2


@pytest.mark.parametrize("arm,sizes", [("replay", [0, 5, 10, 15]), ("full", [0, 0, 0, 0])])
def test_replay_alone_keeps_rows_of_every_task(tmp_path, monkeypatch, arm, sizes):
    model, _ = tiny(tmp_path)
    tasks, found = [(list(range(20 * k, 20 * k + 20)), torch.zeros(1, 1)) for k in range(4)], []
    monkeypatch.setattr(pools, "make_tasks", lambda *_: (tasks, tasks))
    monkeypatch.setattr(pools, "learn", lambda *given: found.append(list(given[6])))
    monkeypatch.setattr(pools, "examine", lambda *_: (torch.ones(1), torch.zeros(1, 1).long()))
    pools.run_arm(arm, 0, pools.Config(model=str(tmp_path)))
    assert [len(kept) for kept in found] == sizes
    assert arm == "full" or sorted(row // 20 for row in found[3]) == [0] * 5 + [1] * 5 + [2] * 5


def test_arms_without_prompts_show_none_as_chosen(monkeypatch, capsys):
    monkeypatch.setattr(pools, "run_arm", lambda *_: [1.0, 0.5, 0.5, 0.25, 1, 0.25])
    monkeypatch.setattr("sys.argv", ["pools.py"])
    pools.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[-2:] == ["-", "-"] for row in table] == [True, True] + [False] * 6


def test_an_odd_number_of_layers_is_cut_between_two_of_them():
    assert pools.Pool(4, 3, 12, layers=3).lower == 4


@pytest.mark.parametrize("way", WAYS)
def test_each_question_gets_its_own_prefix_whoever_stands_beside_it(way, tmp_path):
    families.make_checkpoint(tmp_path, "qwen2")
    model = modeling.load(tmp_path)
    config, generator = model.config, torch.Generator().manual_seed(0)
    W = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    torch.manual_seed(0)
    pool, q = pools.Pool(4, 6, W, 2), torch.randn(3, 6, generator=generator)
    pool.learnt = 4
    lengths, ids = [5, 5, 7], torch.arange(3, 20)
    prompts = way(pool, q)[0]
    together, _ = model.hidden(ids, lengths, pools.as_prefix(prompts, config))
    for k, part in enumerate(ids.split(lengths)):
        alone, _ = model.hidden(part, [len(part)], pools.as_prefix(prompts[k : k + 1], config))
        assert torch.allclose(alone, together.split(lengths)[k], atol=1e-5)
        plain, _ = model.hidden(part, [len(part)])
        assert not torch.allclose(alone, plain, atol=1e-4)


@pytest.mark.parametrize("flag,value", [("--arm", "l3p"), ("--pool", 3), ("--steps", 0)])
def test_bad_flags_end_with_one_line(flag, value):
    status, _, err = command("labs/pools.py", flag, value)
    assert status == 2 and err.count("\n") == 1
