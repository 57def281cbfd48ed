"""Words, n-grams, signatures, ROUGE-L, work on all cores."""

import functools
import itertools
import random

import numpy as np
import pytest
from conftest import CHARACTERS, command, sentence

from labs import text as texts
from model import InputError


@pytest.mark.parametrize("name", ["exams", "text", "world"])
def test_a_lab_without_a_command_says_what_it_is(name):
    status, out, err = command(f"labs/{name}.py", "--help")
    assert (status, err) == (0, "") and out.count("\n") > 9


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


def test_rouge_l_is_the_longest_common_subsequence_over_both_lengths():
    @functools.cache
    def longest(a, b):
        """The definition: the first words are common, or one of them is passed over."""
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + longest(a[1:], b[1:])
        return max(longest(a[1:], b), longest(a, b[1:]))

    rng = random.Random(2)
    a, *others = ["".join(rng.choices("abcd", k=rng.randint(0, 90))) for _ in range(60)]
    others.append("xyz")
    expected = [2 * longest(a, b) / (len(a) + len(b)) for b in others]
    assert list(texts.rouge_l(list(a), map(list, others))) == expected and min(expected) == 0


def test_rouge_l_vectors():
    police = "police killed the gunman".split()  # Lin (2004), section 3.1: P = R = 3/4 and 2/4
    one, two = "police kill the gunman".split(), "the gunman kill police".split()
    assert list(texts.rouge_l(police, [one, two, police, []])) == [0.75, 0.5, 1.0, 0.0]
    assert list(texts.rouge_l([], [[], ["a"]])) == [0, 0]
    hundred = [str(i) for i in range(100)]
    assert list(texts.rouge_l(hundred, [["x", *hundred[1:]]])) == [0.99]


def test_work_on_all_cores_keeps_the_order_and_passes_errors_on():
    def square(x):
        if x == 700:
            raise InputError("seven hundred")
        return x * x

    assert list(texts.parallel(square, iter(range(600)))) == [x * x for x in range(600)]
    with pytest.raises(InputError, match="seven hundred"):
        list(texts.parallel(square, range(1000)))
