"""labs/select.py: k-means, k-center, IFD, a random arm."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import asked, assistant, command, jsonl, read, run_lab, sentence, system, user
from transformers import AutoModelForCausalLM

import data
from labs import select
from model import InputError


def brute_force_k_center(x, first, n):
    """Every distance anew in every step."""
    chosen = [first]
    while len(chosen) < n:
        best = [-1 if i in chosen else min(1 - x[i] @ x[s] for s in chosen) for i in range(len(x))]
        chosen.append(int(np.argmax(best)))
    return chosen, max(min(1 - x[i] @ x[s] for s in chosen) for i in range(len(x)))


def test_k_center_vector_of_the_plane():
    x = np.array([(1, 0), (.96, .28), (0, 1), (-1, 0), (.6, .8), (0, -1)], dtype=np.float32)
    order, radius = select.k_center(x, 0, 4)
    assert order == [0, 3, 2, 5] and radius == pytest.approx(0.2, abs=1e-6)


def test_k_center_equals_brute_force_and_never_takes_a_row_twice():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[30:] = x[:30]  # copies
    ours, radius = select.k_center(x, 7, 25)
    theirs, true_radius = brute_force_k_center(x, 7, 25)
    assert ours == theirs and radius == pytest.approx(true_radius, abs=1e-9)
    assert sorted(select.k_center(x, 7, 60)[0]) == list(range(60))


def test_kmeans_ends_where_every_row_is_in_the_cluster_of_the_nearest_centre():
    x = np.random.default_rng(2).normal(size=(300, 3)) * (1, 2, 3) + 1
    centres, cluster = select.kmeans(x, 5, 0, rounds=200)
    assert (np.square(x[:, None] - centres).sum(2).argmin(1) == cluster).all()
    for j in range(5):
        np.testing.assert_allclose(centres[j], x[cluster == j].mean(0))


def test_kmeans_finds_the_groups_and_the_core_sample_lies_in_the_largest():
    rng = np.random.default_rng(1)
    means = np.eye(4)[:, :3] * 1.0
    means[3] = (-1, -1, -1)
    sizes = (20, 50, 30, 10)
    x = np.repeat(means, sizes, 0) + 0.01 * rng.normal(size=(sum(sizes), 3))
    groups = [set(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(4)]
    for seed in range(20):
        centres, cluster = select.kmeans(x, 4, seed)
        loss = np.square(x - centres[cluster]).sum()
        if loss < 1:  # Lloyd's algorithm may end in a worse optimum from some seeds
            assert {frozenset(np.flatnonzero(cluster == j).tolist()) for j in range(4)} == set(
                map(frozenset, groups))
            chosen = select.k_center(x, select.core_row(x, centres, cluster), 4)[0]
            assert chosen[0] in groups[1]
            assert all(any(c in group for c in chosen) for group in groups)
            return
    raise AssertionError("no seed finds the groups")


def test_states_are_the_mean_of_the_last_hidden_states(checkpoint):
    rows = [asked("问" * n, "答" * (9 - n)) for n in range(1, 9)]
    c = select.Config([], model=str(checkpoint), micro_tokens=40)
    ours = select.embed(c, [data.parse_row("", row) for row in rows])
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = data.ChatTokenizer(checkpoint)
    for i in range(8):
        ids = tokenizer.encode(tokenizer.conversation(rows[i]["messages"]))[0][0]
        with torch.no_grad():
            states = theirs(torch.tensor(ids.astype(int))[None], output_hidden_states=True)
        mean = states.hidden_states[-1][0].mean(0)
        torch.testing.assert_close(torch.from_numpy(ours[i]), mean, atol=1e-5, rtol=1e-4)


def test_kcenter_selects_from_groups_that_random_rows_would_miss(tmp_path, checkpoint):
    rows = [asked("天气好吗", f"好{k % 10}") for k in range(60)]
    rows.append(asked("What is it?", "A very odd one"))
    kept, out = run_lab("select", [jsonl(tmp_path / "a.jsonl", *rows)], "--method", "kcenter",
                        "--n", 3, "--model", checkpoint)
    assert len(kept) == 3 and rows[-1] in kept and "radius" in out


def test_ifd_is_the_ratio_of_mean_losses_with_and_without_the_question(tmp_path, checkpoint):
    rng = random.Random(6)
    rows = [asked(sentence(rng, 3), sentence(rng, rng.randint(2, 12))) for _ in range(20)]
    rows[3]["messages"].insert(0, system("be brief"))
    rows[4]["messages"] += [user("more"), assistant("yes")]
    rows += [{"text": "raw"}, {"messages": [assistant("hello")]}]
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = data.ChatTokenizer(checkpoint)

    def loss(messages):
        """Mean NLL of the last answer and its end."""
        ids, spans = tokenizer.encode(tokenizer.conversation(messages, train_on="last"))[0]
        ids, (first, end, _) = torch.tensor(ids.astype(int)), spans[-1]
        with torch.no_grad():
            logp = theirs(ids[None]).logits[0].log_softmax(-1)
        return -logp[torch.arange(first - 1, end - 1), ids[first:end]].mean().item()

    ifd = [loss(r["messages"]) / loss(r["messages"][-1:]) for r in rows[:20]]
    below = [i for i in np.argsort(ifd)[::-1] if ifd[i] <= 1]
    assert 6 < len(below) < 20
    path = jsonl(tmp_path / "a.jsonl", *rows)
    c = select.Config([path], model=str(checkpoint))
    ours = select.ifd_scores(c, [data.parse_row("", row) for row in rows[:20]])
    assert ours == pytest.approx(ifd, rel=1e-4)
    kept, out = run_lab("select", [path], "--method", "ifd", "--n", 5, "--model", checkpoint)
    assert kept == [rows[i] for i in sorted(below[:5])]
    assert f"dropped {20 - len(below)}: IFD above 1" in out
    assert "dropped 2: no question and answer" in out
    assert f"dropped {len(below) - 5}: not chosen" in out


def test_ifd_compares_the_same_tokens_so_rows_that_do_not_fit_have_none(tmp_path, checkpoint):
    rows = [asked("q" * 30, "an answer"), asked("q", "yes")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    tokenizer = data.ChatTokenizer(checkpoint)
    size = len(tokenizer.encode(tokenizer.conversation(rows[1]["messages"]))[0][0])
    flags = ["--method", "ifd", "--model", checkpoint, "--n", 2, "--max_length", size]
    kept, out = run_lab("select", [path], *flags)
    assert rows[0] not in kept and "dropped 1: nothing to score, or above --max_length" in out


@pytest.mark.parametrize("value", [0, np.nan])
def test_states_without_a_direction_are_an_error(value):
    x = np.random.default_rng(0).normal(size=(20, 4))
    x[5] = value
    with pytest.raises(InputError, match="zero or NaN"):
        select.unit_vectors(x)


def test_the_core_is_that_of_the_cluster_which_the_pool_shows():
    """Of a task's four rows one falls into the cluster of another task."""
    rng = np.random.default_rng(3)
    task = np.array([[1.0, 0.05], [1.0, -0.05], [1.0, 0.1], [0.0, 1.0]])
    pool = np.array([[-1.0, 0.0], [0.0, 1.0]]).repeat(50, 0)
    x = np.concatenate((task, pool)) + 0.001 * rng.normal(size=(104, 2))
    x = select.unit_vectors(x)
    for seed in range(30):
        centres, cluster = select.kmeans(x, 3, seed)
        if len(set(cluster[[0, 4, 54]])) == 3:  # from some rows Lloyd's algorithm ends elsewhere
            assert select.core_row(x[:4], centres, cluster[:4]) == 0
            assert cluster[3] == cluster[54] != cluster[0]
            return
    raise AssertionError("no seed finds the clusters")


def test_a_pool_moves_the_core_and_is_never_chosen_from(tmp_path, checkpoint):
    rng = random.Random(4)
    rows = [asked(sentence(rng, 4), sentence(rng, 9)) for _ in range(12)]
    others = [asked("what is it", "a river") for _ in range(20)]
    path, pool = jsonl(tmp_path / "a.jsonl", *rows), jsonl(tmp_path / "b.jsonl", *others)
    flags = ["--method", "kcenter", "--n", 3, "--model", checkpoint, "--clusters", 2]
    kept, _ = run_lab("select", [path], *flags, "--pool", pool)
    assert len(kept) == 3 and all(row in rows for row in kept)

    # With one cluster the core is the row that stands where the pool is crowded.
    for k in (2, 7):
        jsonl(tmp_path / "b.jsonl", *[rows[k]] * 300)
        core, _ = run_lab("select", [path], "--method", "kcenter", "--n", 1, "--model", checkpoint,
                          "--clusters", 1, "--pool", pool)
        assert core == [rows[k]]
    status, _, err = command("labs/select.py", path, "--n", 3, "--pool", pool, "--output",
                             tmp_path / "o.jsonl")
    assert status == 2 and "--pool is for --method kcenter" in err


@pytest.mark.parametrize("method", ["random", "kcenter"])
def test_per_takes_as_many_of_each_value_and_says_where_there_are_fewer(tmp_path, checkpoint,
                                                                        method):
    kinds = ["a"] * 12 + ["b"] * 6 + ["c"]
    rows = [asked("q", f"answer {i}", kind=kind) for i, kind in enumerate(kinds)]
    path = jsonl(tmp_path / "a.jsonl", *rows, asked("q", "x"), [user("q"), assistant("bare")])
    kept, out = run_lab("select", [path], "--per", "kind", "--n", 4, "--method", method, "--model",
                        checkpoint)
    assert [row["kind"] for row in kept] == ["a"] * 4 + ["b"] * 4 + ["c"]
    assert "4 rows with kind c were wanted, only 1 could be chosen" in out
    assert "dropped 2: no kind" in out and "kind a were" not in out


def test_more_rows_than_there_are_is_said(tmp_path):
    rows = [asked("q", str(k)) for k in range(3)]
    kept, out = run_lab("select", [jsonl(tmp_path / "a.jsonl", *rows)], "--n", 9)
    assert kept == rows and "9 rows were wanted, only 3 could be chosen" in out


def test_random_choice_is_a_function_of_the_seed_and_keeps_the_order(tmp_path):
    rows = [asked("q", str(k)) for k in range(100)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    one, again, other = (run_lab("select", [path], "--share", 0.1, "--seed", seed)[0]
                         for seed in (0, 0, 1))
    assert one == again != other and len(one) == len(other) == 10
    assert [int(r["messages"][1]["content"]) for r in one] == sorted(
        int(r["messages"][1]["content"]) for r in one)


def test_the_rest_of_the_rows_goes_to_a_second_file(tmp_path):
    rows = [asked("q", str(k), kind=[None, "x", "y"][k % 3]) for k in range(30)]  # ten have none
    path, rest = jsonl(tmp_path / "a.jsonl", *rows), tmp_path / "rest.jsonl"
    kept, _ = run_lab("select", [path], "--per", "kind", "--n", 2, "--rest", rest)
    others = [row for row in rows if row["kind"] and row not in kept]
    assert len(kept) == 4 and read(rest) == others and len(others) == 16


def test_rows_that_are_bare_lists_of_messages_are_chosen_and_filtered_too(tmp_path):
    row = [system("s"), user("q"), assistant("a")]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    assert run_lab("select", [path], "--n", 1)[0] == [row]
    assert run_lab("filter", [path], "--no_system", "--lima", "--answer_matches")[0] == []
    assert run_lab("filter", [path], "--no_system")[0] == [row[1:]]
