"""What data.py promises: files to messages, messages to tokens and spans, mixing, micro-batches."""

import contextlib
import gzip
import itertools
import json
import os
import pty
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import (
    HI,
    NO,
    PAIRS,
    REPO,
    SHARED,
    TALK,
    YO,
    assistant,
    command,
    jsonl,
    render,
    supervised,
    user,
)

import data
import model as modeling
import train_dpo
from data import Example, InputError, Mixer, mixing_rates

DROPPED = "dropped: nothing to supervise"


def parsed(path, **options):
    """The rows of a file."""
    return [row for _, row in data.read_rows([path], **options)]


# -------------------------------------------------------------------------------------------- flags


@dataclass
class Flags:
    """Some flags."""

    files: list[str]  # input
    batch_size: int = 8  # examples a step
    learning_rate: float = 0.1  # peak
    mix: Literal["equal", "weights"] = "equal"  # how
    weights: list[float] = field(default_factory=list)  # one per file
    compile: bool = False  # faster


def test_flags_are_the_fields_of_the_dataclass_and_only_the_given_ones_are_returned():
    argv = "a b --batch_size 4 --learning_rate 1e-3 --mix weights --weights 1 0.5 --compile".split()
    assert data.parse_flags(Flags, argv, "files") == {
        "files": ["a", "b"], "batch_size": 4, "learning_rate": 1e-3, "mix": "weights",
        "weights": [1.0, 0.5], "compile": True}
    assert data.parse_flags(Flags, ["a", "--no-compile"], "files") == {
        "files": ["a"], "compile": False}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("a --batch-size=4", ["--batch-size", "--batch_size"]),
        ("a --batch 4", ["--batch"]),  # no abbreviations
        ("a --batch_size 1.5", ["batch_size", "1.5"]),
        ("a --batch_size", ["batch_size"]),
        ("a --mix both", ["mix", "both", "equal", "weights"]),
        ("--mix equal", ["files"]),
    ],
)
def test_wrong_flag_is_named_in_one_line_with_what_is_possible(argv, said):
    with pytest.raises(InputError) as error:
        data.parse_flags(Flags, argv.split(), "files")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in said)


# --------------------------------------------------------------------------------------- truncation


def load_one(tmp_path, tokenizer, row, max_length, **options):
    """The examples and counts of a file with one row."""
    path = jsonl(tmp_path / "one.jsonl", row)
    return data.load_examples([path], tokenizer, max_length=max_length, **options)


def test_long_prompt_gives_way_to_the_answer_but_keeps_half_of_the_window(tmp_path, letters):
    row = {"prompt": "p" * 500, "completion": "short answer"}
    (example,), counts = load_one(tmp_path, letters, row, 100)
    assert supervised(letters, example) == ["short answer<|im_end|>"]
    assert len(example.ids) == 100 and counts["truncated"] == 1
    row = {"prompt": "p" * 500, "completion": "a" * 500}
    (example,), _ = load_one(tmp_path, letters, row, 100)
    assert len(example.ids) == 100 and 40 <= example.targets <= 60
    assert supervised(letters, example) == ["a" * example.targets]


def test_row_that_just_fits_is_not_counted_as_truncated(tmp_path, letters):
    row = {"prompt": "p", "completion": "answer"}
    (example,), _ = load_one(tmp_path, letters, row, 100)
    assert load_one(tmp_path, letters, row, len(example.ids))[1]["truncated"] == 0
    assert load_one(tmp_path, letters, row, len(example.ids) - 1)[1]["truncated"] == 1


def test_short_prompt_with_a_long_answer_keeps_the_prompt(tmp_path, letters):
    row = {"prompt": "short prompt", "completion": "a" * 500}
    (example,), _ = load_one(tmp_path, letters, row, 100)
    start = "<|im_start|>user\nshort prompt<|im_end|>\n<|im_start|>assistant\n"
    assert letters.decode(example.ids) == start + "a" * (100 - example.spans[0][0])
    assert len(example.ids) == example.spans[-1][1] == 100


@pytest.mark.parametrize("max_length", [2, 3, 20, 60])
def test_truncation_keeps_supervised_tokens_and_its_spans_stay_on_the_same_tokens(max_length):
    rng = random.Random(max_length)
    for _ in range(300):
        size, spans, end = rng.randint(2, 120), [], 0
        while (first := max(end + rng.randint(0, 50), 1)) < size and len(spans) < 4:
            end = min(first + rng.randint(1, 50), size)
            spans.append((first, end, rng.choice([0.5, 1.0, 2.0])))
        weight = {i: w for first, last, w in spans for i in range(first, last)}
        ids, kept = data.fit(np.arange(size, dtype=np.int32), tuple(spans), max_length)
        assert len(ids) == min(size, max_length)
        assert np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids)))
        found = {int(ids[i]): w for first, last, w in kept for i in range(first, last)}
        assert found == {i: w for i, w in weight.items() if ids[0] < i <= ids[-1]}
        assert bool(found) == bool(spans)


@pytest.mark.parametrize("max_length", [2, 5, 151, 152])
def test_long_raw_text_is_split_so_that_each_token_but_the_first_is_supervised_once(
    max_length, tmp_path, chat
):
    text = "".join(chr(33 + i * 7 % 90) for i in range(150))
    tokenizer = chat("llama3")
    (whole,), _ = load_one(tmp_path, tokenizer, {"text": text}, 10_000)
    parts, _ = load_one(tmp_path, tokenizer, {"text": text}, max_length)
    assert all(len(part.ids) <= max_length for part in parts)
    targets = [i for p in parts for first, end, _ in p.spans for i in p.ids[first:end].tolist()]
    assert targets == whole.ids[1:].tolist()
    for before, after in itertools.pairwise(parts):
        assert before.ids[-1] == after.ids[0]  # what the first target of a piece is predicted from


def test_rows_with_nothing_to_supervise_are_dropped_and_counted(tmp_path, letters):
    path = jsonl(
        tmp_path / "a.jsonl", {"messages": [HI]}, {"prompt": "hi", "completion": "yo"},
        {"messages": [HI, assistant("a", train=False)]}, {"text": ""},
        {"messages": [HI, assistant("a", weight=0)]},
        {"messages": [HI, assistant("a"), HI, assistant("b", train=False)]},
    )
    examples, counts = data.load_examples([path], letters)
    assert [e.where.split()[-1] for e in examples] == ["2", "6"] and counts[DROPPED] == 4
    examples, counts = data.load_examples([path], letters, train_on="last")
    assert [e.where.split()[-1] for e in examples] == ["2"] and counts[DROPPED] == 5
    assert len(data.load_examples([path], letters, keep_all=True)[0]) == 6
    with pytest.raises(InputError, match=r"b.jsonl: no row "):
        data.load_examples([jsonl(tmp_path / "b.jsonl", {"messages": [HI]})], letters)


# ---------------------------------------------------------------------------------- preferences

TURNS = [user("a"), assistant("b"), user("c")]


def preferences(path, tokenizer, *rows, max_length=2048):
    """(preferences, counts) of a file with these rows."""
    path = jsonl(path / "pairs.jsonl", *rows)
    return train_dpo.load_preferences([path], tokenizer, max_length)


def test_pair_is_one_prompt_and_two_answers_with_their_end_of_turn(tmp_path, letters):
    row = {"prompt": TURNS, "chosen": "yo", "rejected": "no"}
    (item,), counts = preferences(tmp_path, letters, row)
    assert item.answer_tokens == [3, 3] and not counts
    for (ids, spans), answer in zip(item.answers, (YO, NO), strict=True):
        whole = item.prompt.tolist() + ids.tolist()
        rendered, marks = render(letters, [*TURNS, answer])
        assert whole == rendered[: marks[-1][1]]  # nothing after the end of turn
        assert whole[: len(item.prompt) + 1] == letters.prompt_ids(TURNS)
        assert supervised(letters, (ids, spans)) == [answer["content"] + "<|im_end|>"]


def test_pairs_that_teach_nothing_are_dropped_and_counted_by_reason(tmp_path, folder_of):
    """A thought is answer, the empty block of MiniMind's template is prompt: here they differ."""
    tokenizer = data.ChatTokenizer(folder_of("minimind"))
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"},
            {"prompt": "q", "chosen": "same", "rejected": "same"},
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
            {"chosen": [HI, NO, HI, YO], "rejected": [HI, YO, HI, NO]},
            {"prompt": "q", "chosen": "<think>t</think>b", "rejected": "a"},
            {"prompt": "q", "chosen": "bbbb" * 9 + "yes", "rejected": "bbbb" * 9 + "no"}]
    items, counts = preferences(tmp_path, tokenizer, *rows, max_length=400)
    assert [p.where.split()[-1] for p in items] == ["1", "5", "6"]
    assert counts == {"dropped: chosen equals rejected": 1, "dropped: histories differ": 2}
    items, counts = preferences(tmp_path, tokenizer, *rows, max_length=4)
    assert [p.where.split()[-1] for p in items] == ["1"]
    assert counts == {
        "dropped: chosen equals rejected": 1, "dropped: histories differ": 2, "truncated": 1,
        "dropped: a response lost to truncation": 1, "dropped: alike once truncated": 1}


@pytest.mark.parametrize("max_length", [4, 30, 100])
def test_truncation_cuts_both_answers_of_a_shared_history_at_the_same_point(
    max_length, tmp_path, letters
):
    rng = random.Random(max_length)
    rows = [{"prompt": [user("p" * rng.randint(1, 120)), assistant("h"), user("q")],
             "chosen": "a" + "c" * rng.randint(0, 90), "rejected": "b" + "r" * rng.randint(0, 90)}
            for _ in range(100)]
    items, counts = preferences(tmp_path, letters, *rows, max_length=max_length)
    cut = 0
    for item, row in zip(items, rows, strict=True):
        full = letters.prompt_ids(row["prompt"])
        kept = item.prompt.tolist() + item.answers[0][0][:1].tolist()
        assert kept == full[len(full) - len(kept) :] and len(kept) > 1  # one suffix for both
        assert len(kept) == len(full) or len(kept) >= max_length // 2  # no more than is needed
        for (ids, spans), side in zip(item.answers, ("chosen", "rejected"), strict=True):
            whole = render(letters, [*row["prompt"], assistant(row[side])])[0][len(full) :]
            assert ids[0] == kept[-1] and ids[1:].tolist() == whole[: len(ids) - 1]
            assert len(item.prompt) + len(ids) <= max_length
            assert spans == ((1, min(len(ids), len(row[side]) + 2), 1.0),)
        cut += max(map(len, (row["chosen"], row["rejected"]))) + 1 + len(full) > max_length
    assert counts["truncated"] == cut and len(items) == 100


def test_long_prompt_gives_way_to_the_longer_answer_of_a_pair(tmp_path, letters):
    row = {"prompt": "p" * 200, "chosen": "yes", "rejected": "n" * 30}
    (item,), _ = preferences(tmp_path, letters, row, max_length=100)
    texts = [supervised(letters, answer) for answer in item.answers]
    assert texts == [["yes<|im_end|>"], ["n" * 30 + "<|im_end|>"]]


@pytest.mark.parametrize("row,said", [
    ({"prompt": "a", "completion": "b"}, "expected chosen and rejected"),
    ({"prompt": "a", "completion": "b", "label": True}, "labels are for labs/kto.py"),
    ({"text": "a"}, "expected chosen and rejected"),
])
def test_row_that_is_no_pair_is_refused_in_one_line(row, said, tmp_path, letters):
    with pytest.raises(InputError, match="pairs.jsonl line 2: ") as error:
        preferences(tmp_path, letters, PAIRS["instruction"], row)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_validation_split_keeps_all_answers_to_a_prompt_on_one_side(tmp_path, letters):
    rows = [{"prompt": f"q{i % 10}", "chosen": f"y{i}", "rejected": "n"} for i in range(40)]
    items, _ = preferences(tmp_path, letters, *rows)
    sides = [{p.key for p in side} for side in data.split_validation(items, 0.3, 0)]
    assert [len(keys) for keys in sides] == [7, 3] and not sides[0] & sides[1]


# ------------------------------------------------------------------------------- validation, mixing


def numbered(count, copies=1):
    """Examples of distinct tokens, each so many times."""
    ids = [np.array([1, i, i + 1], dtype=np.int32) for i in range(count)]
    return [Example(x, ((1, 3, 1.0),)) for _ in range(copies) for x in ids]


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_no_validation_example_is_trained_on_not_even_its_copy(fraction):
    examples = numbered(500, copies=3)
    train, validation = data.split_validation(examples, fraction, seed=3)
    sides = [{e.ids.tobytes() for e in side} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert len(train) + len(validation) == 1500
    assert 0.8 * fraction <= len(validation) / 1500 <= 1.2 * fraction


def test_examples_of_one_conversation_and_their_copies_fall_on_one_side():
    """A template that rewrites past answers makes several examples of a conversation."""
    examples = []
    for row in range(60):
        for part in range(3):  # the last is also the first of the next row, in every other row
            number = 10 * row + (10 if part == 2 and row % 2 == 0 else part)
            ids = np.array([1, number, 2], dtype=np.int32)
            examples.append(Example(ids, ((1, 3, 1.0),), 0, f"a.json row {row}"))
    for seed in range(5):
        sides = data.split_validation(examples, 0.3, seed)
        rows, copies = ([{name(e) for e in side} for side in sides]
                        for name in (lambda e: e.where, lambda e: e.key))
        assert not rows[0] & rows[1] and not copies[0] & copies[1]
        assert len(rows[1]) == 18  # of 60: 9 of 30 groups


def test_validation_split_is_a_function_of_the_seed():
    def held(seed):
        return [e.ids[1] for e in data.split_validation(numbered(100), 0.1, seed)[1]]

    assert held(0) == held(0) and held(0) != held(1)
    few = data.split_validation(numbered(3), 0.01, 0)
    assert [len(side) for side in few] == [2, 1]  # at least one is held


def test_validation_rows_that_are_trained_on_are_counted():
    examples = numbered(10)
    assert data.overlap_count(examples[:6], examples[4:] + examples[4:5]) == 3
    assert data.overlap_count(examples[:6], examples[6:]) == 0


@pytest.mark.parametrize(
    ("sizes", "temperature", "cap", "rates"),
    [
        ((10**6, 10**5, 10**4), 1, 0, (0.900901, 0.090090, 0.009009)),
        ((10**6, 10**5, 10**4), 4, 0, (0.532320, 0.299346, 0.168334)),
        ((10**6, 10**5, 10**4), 2, 2**16, (0.418301, 0.418301, 0.163399)),
        ((16, 4, 1), 2, 0, (4 / 7, 2 / 7, 1 / 7)),
    ],
)
def test_temperature_mixing_rates_are_t5s_with_the_cap_before_the_temperature(
    sizes, temperature, cap, rates
):
    found = mixing_rates(list(sizes), "temperature", temperature, cap)
    assert found == pytest.approx(rates, abs=1e-6)


def test_proportional_equal_and_weights_ignore_temperature_and_cap():
    sizes = [8, 1, 1]  # and equal is the limit of a high temperature
    assert mixing_rates(sizes, "temperature", 1e7) == pytest.approx([1 / 3] * 3)
    assert mixing_rates([9, 9, 1], "temperature", 1e-4) == pytest.approx([0.5, 0.5, 0])
    assert mixing_rates(sizes, "proportional", 2.0, 1) == pytest.approx([0.8, 0.1, 0.1])
    assert mixing_rates(sizes, "equal", 2.0, 1) == pytest.approx([1 / 3] * 3)
    assert mixing_rates(sizes, "weights", 2.0, 1, [2, 1, 1]) == pytest.approx([0.5, 0.25, 0.25])


MIXES = {
    "proportional": ([50, 7, 23], mixing_rates([50, 7, 23], "proportional")),
    "equal": ([50, 7, 23], mixing_rates([50, 7, 23], "equal")),
    "weights": ([50, 7, 23], mixing_rates([50, 7, 23], "weights", weights=[0.1, 0.77, 0.13])),
    "one": ([5], mixing_rates([5], "equal")),
    "none of one": ([5, 4], mixing_rates([5, 4], "weights", weights=[1, 0])),
}


def test_proportional_mixing_sees_every_example_once_an_epoch():
    mixer = Mixer(*MIXES["proportional"], seed=1)
    for epoch in range(3):
        draws = mixer.draws(80 * epoch, 80 * (epoch + 1))
        assert sorted(draws) == [(i, epoch) for i in range(80)] != draws


@pytest.mark.parametrize("name", MIXES)
def test_each_epoch_realises_the_rates_rounded_by_largest_remainder(name):
    sizes, rates = MIXES[name]
    size, ends = sum(sizes), np.cumsum(sizes)
    exact = rates * size
    for epoch in range(3):
        drawn = [i for i, _ in Mixer(sizes, rates, 0).draws(size * epoch, size * (epoch + 1))]
        counts = np.bincount(np.searchsorted(ends, drawn, side="right"), minlength=len(sizes))
        assert counts.sum() == size and np.all(np.abs(counts - exact) < 1)
        up = counts > exact
        if up.any() and not up.all():
            assert (exact - np.floor(exact))[up].min() >= (exact - np.floor(exact))[~up].max()


@pytest.mark.parametrize("name", MIXES)
def test_source_repeats_only_after_all_of_it_was_seen(name):
    sizes, rates = MIXES[name]
    size, starts = sum(sizes), np.cumsum([0, *sizes])
    mixer, seen = Mixer(sizes, rates, 5), Counter()
    for epoch in range(4):
        draws = mixer.draws(size * epoch, size * (epoch + 1))
        for example, visit in sorted(draws, key=lambda draw: draw[1]):
            assert visit == seen[example]  # visits count up from 0, one by one
            seen[example] += 1
        for start, end in itertools.pairwise(starts):
            counts = [seen[i] for i in range(start, end)]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", MIXES)
def test_draws_are_a_function_of_seed_and_position_alone(name):
    sizes, rates = MIXES[name]
    end = 3 * sum(sizes) + 2
    whole = Mixer(sizes, rates, 7).draws(0, end)
    assert len(whole) == end
    used = Mixer(sizes, rates, 7)
    for step in (1, 3, 11, sum(sizes), sum(sizes) + 1):
        slices = [used.draws(i, min(i + step, end)) for i in range(0, end, step)]
        assert list(itertools.chain(*slices)) == whole
    assert Mixer(sizes, rates, 7).draws(end - 5, end) == whole[-5:]  # without what came before
    assert used.draws(2, 2) == []
    if len(sizes) > 1:
        assert Mixer(sizes, rates, 8).draws(0, end) != whole


def test_sources_of_one_size_are_shuffled_each_in_its_own_way():
    mixer = Mixer([30, 30], mixing_rates([30, 30], "equal"), seed=0)
    one, other = (mixer.source(m, 0, 30)[:, 0] - 30 * m for m in (0, 1))
    assert (one != other).sum() > 15


def test_source_is_shuffled_anew_on_every_visit():
    mixer = Mixer([10, 30], mixing_rates([10, 30], "equal"), seed=0)  # 20 draws an epoch of each
    first = {i for i, visit in mixer.draws(0, 40) if i >= 10}
    second = {i for i, visit in mixer.draws(40, 80) if i >= 10 and visit == 1}
    assert (len(first), len(second)) == (20, 10)
    assert not second <= first


def test_sources_take_turns_in_another_order_in_every_epoch():
    mixer = Mixer([30, 30], mixing_rates([30, 30], "equal"), seed=0)
    one, other = ([i < 30 for i, _ in mixer.draws(60 * e, 60 * e + 60)] for e in (0, 1))
    assert one != other


# ------------------------------------------------------------------------------------ micro-batches


def cases(count):
    """Random (lengths, micro_tokens, ranks)."""
    rng = random.Random(0)
    for _ in range(count):
        ranks = rng.choice([1, 2, 3, 4, 8])
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 60))]
        yield lengths, rng.choice([20, 100, 300, 1000]), ranks


def test_micro_batches_hold_examples_of_like_length_once_within_the_limit_or_alone():
    for lengths, limit, ranks in cases(300):
        dealt = data.micro_batches(lengths, limit, ranks)
        assert len(dealt) == ranks
        assert sorted(i for r in dealt for chunk in r for i in chunk) == list(range(len(lengths)))
        for chunk in (chunk for rank in dealt for chunk in rank):
            assert len(chunk) == 1 or sum(lengths[i] for i in chunk) <= limit
        assert dealt == data.micro_batches(list(lengths), limit, ranks)

        # They are cut from the examples sorted by length.
        chunks = [c for rank in dealt for c in rank]
        spans = sorted((min(lengths[i] for i in c), max(lengths[i] for i in c)) for c in chunks)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert all([lengths[i] for i in c] == sorted(lengths[i] for i in c) for c in chunks)


def fewest(lengths, limit):
    """Number of micro-batches a greedy cut of the sorted lengths needs."""
    count, room = 0, 0
    for length in sorted(lengths):
        if length > room:
            count, room = count + 1, limit
        room -= length
    return count


def test_number_of_micro_batches_is_the_fewest_that_is_a_multiple_of_the_ranks():
    rng = random.Random(1)
    various = [(rng.sample(range(1, 400), rng.randint(8, 100)), rng.choice([400, 1000, 4000]),
                rng.choice([1, 2, 4])) for _ in range(300)]
    for lengths, limit, ranks in [([10] * 4, 20, 3), *various]:
        count = sum(map(len, data.micro_batches(lengths, limit, ranks)))
        want = -(-fewest(lengths, limit) // ranks) * ranks
        assert count == want or want > len(lengths)


def test_tokens_balance_over_the_ranks():
    rng = random.Random(2)
    lengths = [rng.randint(10, 500) for _ in range(256)]
    for ranks in (2, 4, 8):
        dealt = data.micro_batches(lengths, 4096, ranks)
        loads = [sum(lengths[i] for chunk in rank for i in chunk) for rank in dealt]
        assert max(loads) <= 1.05 * min(loads)
        assert len({len(rank) for rank in dealt}) == 1
    alone = [50, 50, 50, 50, 200]  # the last one is longer than the limit
    assert sorted(data.micro_batches(alone, 100, 2)) == [[[0, 1], [2, 3]], [[4]]]
    for lengths, limit, ranks in cases(100):
        dealt = data.micro_batches(lengths, limit, ranks)
        loads = [sum(lengths[i] for chunk in rank for i in chunk) for rank in dealt]
        largest = max(sum(lengths[i] for i in chunk) for rank in dealt for chunk in rank)
        assert max(loads) - min(loads) <= largest


def test_fewer_examples_than_ranks_leave_ranks_empty():
    assert sorted(data.micro_batches([5, 9], 100, 4)) == [[], [], [[0]], [[1]]]
    assert data.micro_batches([], 100, 2) == [[], []]


def test_collate_lays_examples_end_to_end_as_a_naive_loop_does():
    rng, examples = random.Random(3), []
    for size in (5, 1, 9, 4):
        spans = ((1, 2, 0.5), (3, size, 2.0)) if size > 3 else ()
        ids = np.array([rng.randrange(100) for _ in range(size)], dtype=np.int32)
        examples.append(Example(ids, spans))
    ids, targets, weights = [], [], []
    for example in examples:
        for first, end, weight in example.spans:
            for position in range(first, end):
                targets.append(len(ids) + position)
                weights.append(weight)
        ids += example.ids.tolist()
    batch = data.collate(examples)
    assert (batch.ids.tolist(), batch.lengths) == (ids, [5, 1, 9, 4])
    assert (batch.targets.tolist(), batch.weights.tolist()) == (targets, weights)


def test_types_of_a_batch_do_not_depend_on_its_weights_or_that_it_has_none():
    ids = np.array([1, 2, 3], dtype=np.int32)
    for spans in ((), ((1, 3, 2),), ((1, 3, 0.5),)):
        batch = data.collate([Example(ids, spans)])
        assert (batch.ids.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
        assert batch.weights.dtype == torch.float32


def test_shares_count_examples_and_supervised_tokens_of_each_source():
    ids = np.arange(10, dtype=np.int32)
    examples = [Example(ids, ((1, 4, 1.0),), 0), Example(ids, ((1, 2, 1.0),), 1),
                Example(ids, ((2, 3, 1.0), (5, 8, 1.0)), 1), Example(ids, (), 1)]
    assert data.shares([(e.source, e.targets) for e in examples], ["a", "b"]) == {
        "a": {"examples": 1, "share": 0.25, "target_tokens": 3, "target_share": 3 / 8},
        "b": {"examples": 3, "share": 0.75, "target_tokens": 5, "target_share": 5 / 8},
    }


# --------------------------------------------------------------------------------------------- show

SHOWN = {
    "conversation.jsonl": ([{"messages": TALK}], ["[[It's 47!<|im_end|>]]"]),
    "weight.jsonl": ([{"messages": [HI, assistant("yo", weight=0.5)]}], ["0.5", "yo<|im_end|>]]"]),
    "pairs.jsonl": ([PAIRS["whole conversations"]],
                    ["[[yo<|im_end|>]]", "[[no<|im_end|>]]"]),
    "labels.jsonl": ([{"prompt": "hi", "completion": "yo", "label": True},
                      {"prompt": "hi", "completion": "no", "label": False}],
                     ["[[yo<|im_end|>]]", "[[no<|im_end|>]]"]),
    "text.txt": (["once"], ["o[[nce<|im_end|>]]"]),
    "unanswered.jsonl": ([{"messages": [HI]}, {"messages": [HI, YO]}], ["nothing to supervise: 1"]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", SHOWN)
def test_show_marks_what_is_supervised_in_every_kind_of_file(name, packed, tmp_path, letters):
    rows, said = SHOWN[name]
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    status, out, err = command("data.py", "show", path)
    assert (status, err) == (0, "") and "\033" not in out
    position = 0
    for words in said:
        position = out.index(words, position) + len(words)
    examples, _ = data.load_examples([str(path)], letters, keep_all=True)
    table = [line.split() for line in out.splitlines() if line.startswith(name.split(".")[0])]
    tokens = sum(e.targets for e in examples)
    assert table[0][1:5] == [str(len(examples)), "100.0%", str(tokens), "100.0%"]


def test_show_with_a_model_uses_its_tokenizer_and_template(tmp_path, folder_of, chat):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "Who are you?", "completion": "A model."})
    _, out, _ = command("data.py", "show", path, "--model", folder_of("llama3"))
    assert "<|begin_of_text|><|start_header_id|>user" in out and "[[A model.<|eot_id|>]]" in out
    ids, spans = render(chat("llama3"), [user("Who are you?"), assistant("A model.")])
    assert f"{len(ids)} tokens, {spans[0][1] - spans[0][0]} supervised" in out
    _, out, _ = command(
        "data.py", "show", path, "--model", folder_of("llama3"), "--template", "plain"
    )
    assert "User:\nWho are you?\n\nAssistant:\n[[A model.<|eot_id|>]]" in out


def test_show_prints_the_shares_of_several_files_and_so_many_rows_of_each(tmp_path):
    nine = [{"prompt": f"q{i}", "completion": "yo"} for i in range(9)]
    one = jsonl(tmp_path / "one.jsonl", *nine)
    two = jsonl(tmp_path / "two.jsonl", {"prompt": "q", "completion": "abcdefghijklmnopq"})
    _, out, _ = command("data.py", "show", one, two, "--rows", 2)
    table = [line.split()[:5] for line in out.splitlines() if line.startswith(("one", "two"))]
    assert table == [["one", "9", "90.0%", "27", "60.0%"], ["two", "1", "10.0%", "18", "40.0%"]]
    assert [f"{one} line {i}" in out for i in (1, 2, 3)] == [True, True, False]
    assert "a turn ends with <|im_end|>" in out

    # Scripts find the examples by their heads: no other line begins so and says "supervised".
    heads = [line for line in out.splitlines() if line.startswith("--- ")]
    assert ["supervised" in line for line in heads] == [True] * (len(heads) - 1) + [False]


def test_show_says_how_long_the_examples_of_each_file_are(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", {"text": "x" * 9}, {"text": "x" * 19})
    two = jsonl(tmp_path / "two.jsonl", {"text": "y" * 99})  # a token a byte, and EOS
    _, out, _ = command("data.py", "show", one, two, "--rows", 0)
    table = [line.split() for line in out.splitlines() if line.startswith(("one", "two"))]
    assert [cells[-2:] for cells in table] == [["15", "20"], ["100", "100"]]
    assert " 50%: 20  75%: 60 " in out and " 100%: 100 " in out


def test_show_honours_train_on_and_max_length(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [HI, YO, HI, assistant("b" * 99)]},
                 {"text": "x" * 100}, {"text": "y" * 100})
    _, out, _ = command("data.py", "show", path, "--train_on", "last", "--max_length", 80)
    assert "yo<|im_end|>" in out and "[[yo" not in out and "80 tokens" in out
    assert "truncated: 1" in out and "line 3" in out  # rows count, not the parts of a text


def test_show_says_which_side_of_a_pair_and_which_label_it_prints(tmp_path):
    label = {"prompt": "hi", "completion": "yo"}
    path = jsonl(tmp_path / "a.jsonl", PAIRS["instruction"], {**label, "label": 1},
                 {**label, "label": 0})
    _, out, _ = command("data.py", "show", path)
    heads = [line.split(":")[0].removeprefix(f"--- {path} ") for line in out.splitlines()
             if line.startswith(f"--- {path}")]
    assert heads == ["line 1, chosen", "line 1, rejected", "line 2, liked", "line 3, disliked"]


def test_show_says_what_is_not_used_and_which_answers_are_empty(tmp_path):
    row = {"prompt": "hi", "completion": " ", "id": 7}
    status, out, _ = command("data.py", "show", jsonl(tmp_path / "a.jsonl", row, row))
    assert status == 0 and out.count("not used: id") == 1 and "empty answers: 2" in out


def test_show_tokens_is_a_table_of_one_example_with_ln_p_where_there_is_a_model(
    tmp_path, monkeypatch
):
    row = jsonl(tmp_path / "a.jsonl", {"messages": [HI, assistant("yo", weight=0.5)]})
    data.byte_tokenizer(tmp_path)
    _, out, _ = command("data.py", "show", row, "--tokens", "--model", tmp_path)
    table = [line.split() for line in out.splitlines()[2:]]
    assert [cells[1:] for cells in table[-4:]] == [
        ["'y'", "0.5"], ["'o'", "0.5"], ["'<|im_end|>'", "0.5"], ["'\\n'", "0"]]
    # a model that gives token i of the example ln p = -i
    monkeypatch.setattr(modeling, "load", lambda *_: lambda ids, lengths, targets: -targets.float())
    (tmp_path / "model.safetensors").touch()
    _, out, _ = command("data.py", "show", row, "--tokens", "--model", tmp_path)
    table = [line.split() for line in out.splitlines()[2:]]
    assert [cells[-1] for cells in table[1:]] == [f"{-i:.3f}" for i in range(1, len(table))]


def test_show_draws_the_mix_that_training_draws(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", *({"prompt": "q", "completion": f"a{k}"} for k in range(90)))
    b = jsonl(tmp_path / "b.jsonl", *({"prompt": "q", "completion": f"b{k}"} for k in range(10)))
    flags = ["--steps", 10, "--batch_size", 8, "--mix", "weights", "--weights", 1, 3, "--seed", 5]
    status, out, err = command("data.py", "show", a, b, "--rows", 0, *flags)
    assert status == 0, err
    drawn = data.Mixer([90, 10], np.array([0.25, 0.75]), 5).draws(0, 80)
    count = sum(i < 90 for i, _ in drawn)
    rows = [line.split() for line in out.splitlines() if line.startswith(("a ", "b "))][-2:]
    assert rows[0][:5] == ["a", "90", "25.0%", str(count), f"{count / 80:.1%}"]
    assert rows[1][:4] == ["b", "10", "75.0%", str(80 - count)]
    status, _, err = command("data.py", "show", a, b, "--weights", 1, 3)
    assert status == 2 and "--mix weights" in err


def test_show_ends_quietly_when_its_reader_has_gone(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[{"prompt": "hi" * 999, "completion": "yo"}] * 200)
    run = subprocess.Popen([sys.executable, REPO / "data.py", "show", path, "--rows", "200"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    assert run.wait(timeout=60) == 141 and run.stderr.read() == b""


def test_ctrl_c_ends_with_one_line_and_status_130(capsys):
    with pytest.raises(SystemExit) as stop, data.one_line_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_show_colours_the_supervised_tokens_in_a_terminal(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "hi", "completion": "yo"})
    master, terminal = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, REPO / "data.py", "show", path], stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    out = b""
    with contextlib.suppress(OSError):  # Linux ends a closed terminal with EIO
        while part := os.read(master, 4096):
            out += part
    os.close(master)
    assert run.wait(timeout=60) == 0
    assert b"\033[32myo<|im_end|>\033[0m" in out and b"[[" not in out


@pytest.mark.parametrize(("arguments", "said"), [
    ("", "expected one of show, not nothing"), ("shwo", "expected one of show, not shwo"),
    ("show nowhere.jsonl", "nowhere.jsonl does not exist"), ("show BAD", "line 2"),
    ("show GOOD --model nowhere", "there is no folder"), ("show GOOD --max_length 1", "max_length"),
    ("show GOOD --modle x", "did you mean --model?"), ("show GOOD --train_on some", "last"),
])
def test_bad_command_ends_with_one_line_and_status_2(arguments, said, tmp_path):
    files = {"GOOD": jsonl(tmp_path / "good.jsonl", {"text": "one"}),
             "BAD": jsonl(tmp_path / "bad.jsonl", {"text": "one"}, {"text": 1})}
    status, _, err = command("data.py", *(files.get(a, a) for a in arguments.split()))
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("data.py: ") and said in err


# ------------------------------------------------------------------------------- volume, real files


def test_ten_thousand_rows_at_once_are_encoded_as_one_by_one(tmp_path, chat):
    rows = [{"prompt": f"What is {i} + {i % 7}?", "completion": f"It's {i + i % 7}!"}
            for i in range(10_000)]
    examples, counts = data.load_examples([jsonl(tmp_path / "a.jsonl", *rows)], chat("qwen2_5"))
    assert len(examples) == 10_000 and not counts
    for row, example in zip(rows, examples, strict=True):
        messages = [user(row["prompt"]), assistant(row["completion"])]
        ids, spans = render(chat("qwen2_5"), messages)
        assert example.ids.tolist() == ids and example.spans == spans


REAL = {
    "alpaca_zh_demo.json": 1000, "alpaca_en_demo.json": 999, "identity.json": 91,
    "dpo_zh_demo.json": 300, "dpo_en_demo.json": 300, "kto_en_demo.json": 300,
    "belle_multiturn_sample.jsonl": 1000, "firefly_sample.jsonl": 1000,
    "wiki_zh_sample.json": None, "wiki_en.txt": None,
}
needs_shared = pytest.mark.skipif(
    not (SHARED / "models" / "minimind-tokenizer").is_dir(), reason="no ../shared here"
)


@needs_shared
@pytest.mark.parametrize("model", ["minimind-tokenizer", "story"])
@pytest.mark.parametrize("name", REAL)
def test_real_file_is_read_whole_and_has_something_to_supervise_in_every_row(name, model):
    path = SHARED / "data" / name
    rows = parsed(path)
    assert len(rows) == (REAL[name] or len(rows)) > 0
    tokenizer = data.ChatTokenizer(SHARED / "models" / model)
    examples, _ = data.load_examples([str(path)], tokenizer, max_length=512, keep_all=True)
    assert len({e.where for e in examples}) == len(rows)
    assert all(e.spans and len(e.ids) <= 512 for e in examples)
    pairs = sum(row.chosen is not None for row in rows)
    assert (pairs == len(rows)) == name.startswith("dpo")
    assert all((row.label is not None) == name.startswith("kto") for row in rows)


@needs_shared
def test_real_preferences_have_the_tokens_that_show_prints_and_lose_no_response():
    path = str(SHARED / "data" / "dpo_zh_demo.json")
    tokenizer = data.ChatTokenizer(SHARED / "models" / "minimind-tokenizer")
    items, counts = train_dpo.load_preferences([path], tokenizer, 10**6)
    wholes, _ = data.load_examples([path], tokenizer, max_length=10**6, keep_all=True)
    found = [item.prompt.tolist() + ids.tolist() for item in items for ids, _ in item.answers]
    assert found == [e.ids[: e.spans[-1][1]].tolist() for e in wholes] and not counts
    items, counts = train_dpo.load_preferences([path], tokenizer, 256)
    assert len(items) + counts["dropped: alike once truncated"] == 300
    assert all(len(p.prompt) + len(ids) <= 256 and spans for p in items for ids, spans in p.answers)


def test_show_puts_a_system_message_where_training_with_the_same_flag_would(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"question": "hi", "answer": "yo"})
    _, out, _ = command("data.py", "show", path, "--system", "Be kind.")
    assert "<|im_start|>system\nBe kind.<|im_end|>" in out


def test_tables_align_where_characters_are_two_columns_wide(capsys):
    data.print_table([("text", "n"), ("钙", 1), ("ab", 22)])
    widths = [data.text_width(line) for line in capsys.readouterr().out.splitlines()]
    assert widths == [10, 10, 10]


def test_help_names_the_command_and_every_default():
    status, out, _ = command("eval.py", "generate", "--help")
    assert status == 0 and out.startswith("usage: eval.py generate ")
    assert re.search(r"--max_new_tokens MAX_NEW_TOKENS\s+stop after this many tokens \[512\]", out)
    assert command("labs/stats.py", "--help")[1].startswith("usage: python -m labs.stats ")
