"""Words, n-grams, signatures, the statistics of a file."""

import itertools
import random

import numpy as np
import pytest
from conftest import CHARACTERS, asked, assistant, command, jsonl, sentence, user

import data
from labs import text as texts
from model import InputError


def test_words_ignore_case_width_and_punctuation_but_keep_signs():
    assert texts.words_of("Ｈello, World！你好。3+5=８") == [
        "hello", "world", "你", "好", "3", "+", "5", "=", "8"]
    assert texts.words_of("3+5") != texts.words_of("3-5") and texts.words_of("____。") == []


def test_ngrams_are_equal_exactly_where_the_words_are():
    rng = random.Random(0)
    a, b = ([rng.choice("abc") for _ in range(300)] for _ in range(2))
    for n in (1, 2, 5):
        ours = [x for x in texts.ngrams(a, n)], [x for x in texts.ngrams(b, n)]
        plain = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in (a, b)]
        table = {}
        for hashed, gram in zip(itertools.chain(*ours), itertools.chain(*plain), strict=True):
            assert table.setdefault(hashed, gram) == gram
        assert len(table) == len(set(map(tuple, itertools.chain(*plain))))
    assert len(texts.ngrams(["x", "y"])) == 1 and len(texts.ngrams([])) == 0


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert texts.repetition("一二三四五六七八九") == 0
    assert texts.repetition("好" * 14) == pytest.approx(9 / 10)  # ten 5-grams, all alike
    assert texts.repetition("短") == texts.repetition("") == 0


def test_signatures_agree_as_often_as_the_texts_share_ngrams():
    rng = random.Random(1)
    for changes in (0, 2, 8, 30):
        estimates, truths = [], []
        for _ in range(30):
            a = list(sentence(rng, 300))
            b = a.copy()
            for place in rng.sample(range(300), changes):
                b[place] = rng.choice(CHARACTERS)
            one, two = set(texts.ngrams(a).tolist()), set(texts.ngrams(b).tolist())
            truths.append(len(one & two) / len(one | two))
            estimates.append((texts.signature(a) == texts.signature(b)).mean())
        # 30 pairs of 64 numbers: a standard error of at most 0.5 / sqrt(1920) = 0.011
        assert np.mean(estimates) == pytest.approx(np.mean(truths), abs=0.04)


def test_work_on_all_cores_keeps_the_order_and_passes_errors_on():
    def square(x):
        if x == 700:
            raise InputError("seven hundred")
        return x * x

    assert list(texts.parallel(square, iter(range(600)))) == [x * x for x in range(600)]
    with pytest.raises(InputError, match="seven hundred"):
        list(texts.parallel(square, range(1000)))


def test_text_tells_lengths_duplicates_and_odd_answers(tmp_path):
    rows = [asked("问题", "好。答案在这里。"), asked("问题", "好。答案在这里。"), asked("q", ""),
            asked("q", "A sentence. And then,"), asked("q", "好" * 14),
            {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    status, out, err = command("labs/text.py", path)
    assert status == 0, err
    for line in ("6 rows, 1 of them exact duplicates",
                 "1.17 answers per row, at most 2; 1 are empty",
                 f"repetition: {0.9 / 7:.1%} of an answer's 5-grams"):
        assert line in out, line
    words = [*["han"] * (2 * 8 + 14), *["latin"] * (1 + 5 + 1 + 4)]
    assert f"Chinese characters: {words.count('han') / len(words):.1%} of the words" in out
    data.byte_tokenizer(tmp_path / "bytes")  # what is taken without --model
    examples = data.load_examples([path], data.ChatTokenizer(tmp_path / "bytes"), keep_all=True)[0]
    lengths = [len(e.ids) for e in examples]
    assert f"50%: {np.percentile(lengths, 50):.0f} " in out and f"100%: {max(lengths)}" in out
    bars = [int(line.split()[-1]) for line in out.splitlines() if " to " in line]
    assert sum(bars) == len(examples)
