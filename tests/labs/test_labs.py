"""The data commands: n-grams, filter, select, exam, identity, overlap, show; train_sft's --eot."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, assistant, command, jsonl, system, user
from families import make_checkpoint
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import eval as evaluation
import model as modeling
import train_sft
from labs import filter, select
from labs import text as words
from model import InputError

WORDS = [chr(0x4E00 + k) for k in range(2000)]


def sentence(rng, size):
    """Random Chinese characters."""
    return "".join(rng.choice(WORDS) for _ in range(size))


def read(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def asked(question, answer, **extra):
    """A row."""
    return {"messages": [user(question), assistant(answer)], **extra}


def run(name, files, *flags, output=None):
    """(rows written, stdout) of a command that must succeed."""
    output = output or Path(files[0]).with_name(f"{name}.out.jsonl")
    status, out, err = command(f"labs/{name}.py", *files, "--output", output, *flags)
    assert (status, err) == (0, ""), err
    return read(output), out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random Qwen2 checkpoint."""
    folder = tmp_path_factory.mktemp("qwen")
    make_checkpoint(folder, "qwen2")
    return folder


# -------------------------------------------------------------------------------- words and n-grams


def test_words_ignore_case_width_and_punctuation_but_keep_signs():
    assert words.words_of("Ｈello, World！你好。3+5=８") == [
        "hello", "world", "你", "好", "3", "+", "5", "=", "8"]
    assert words.words_of("3+5") != words.words_of("3-5") and words.words_of("____。") == []


def test_ngrams_are_equal_exactly_where_the_words_are():
    rng = random.Random(0)
    a, b = ([rng.choice("abc") for _ in range(300)] for _ in range(2))
    for n in (1, 2, 5):
        ours = [x for x in words.ngrams(a, n)], [x for x in words.ngrams(b, n)]
        plain = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in (a, b)]
        table = {}
        for hashed, gram in zip(itertools.chain(*ours), itertools.chain(*plain), strict=True):
            assert table.setdefault(hashed, gram) == gram
        assert len(table) == len(set(map(tuple, itertools.chain(*plain))))
    assert len(words.ngrams(["x", "y"])) == 1 and len(words.ngrams([])) == 0


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert words.repetition("一二三四五六七八九") == 0
    assert words.repetition("好" * 14) == pytest.approx(9 / 10)  # ten 5-grams, all alike
    assert words.repetition("短") == words.repetition("") == 0


def test_coverage_counts_words_that_lie_in_a_common_ngram():
    text = words.words_of("春眠不觉晓处处闻啼鸟夜来风雨声花落知多少")
    assert words.coverage(text, words.words_of("诗云" + "".join(text) + "也")) == 1
    changed = [*text[:10], "风", *text[11:]]
    assert words.coverage(text, changed) == 19 / 20
    assert words.coverage(text, text[::-1]) == 0 and words.coverage([], text) == 0
    assert words.coverage(["铁"], ["金", "铁"]) == 1  # shorter than an n-gram: all of it


def test_signatures_agree_as_often_as_the_texts_share_ngrams():
    rng = random.Random(1)
    for changes in (0, 2, 8, 30):
        estimates, truths = [], []
        for _ in range(30):
            a = list(sentence(rng, 300))
            b = a.copy()
            for place in rng.sample(range(300), changes):
                b[place] = rng.choice(WORDS)
            one, two = set(words.ngrams(a).tolist()), set(words.ngrams(b).tolist())
            truths.append(len(one & two) / len(one | two))
            estimates.append((words.signature(a) == words.signature(b)).mean())
        # 30 pairs of 64 numbers: a standard error of at most 0.5 / sqrt(1920) = 0.011
        assert np.mean(estimates) == pytest.approx(np.mean(truths), abs=0.04)


def test_planted_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(2)
    texts, planted = [list(sentence(rng, 200)) for _ in range(1500)], []
    for k in range(300):  # 3 of 200 words changed: 15 of 196 n-grams, similarity about 0.86
        copy = texts[k].copy()
        for place in rng.sample(range(200), 3):
            copy[place] = rng.choice(WORDS)
        planted.append(copy)
    for k in range(300, 600):  # half of the text is the same: similarity about 0.33
        planted.append(texts[k][:100] + list(sentence(rng, 100)))
    signatures = np.stack([words.signature(t) for t in texts + planted])
    found = words.near_duplicates(signatures, 0.7)
    assert not found[:1500].any(), "a row is a duplicate of an earlier one only"
    assert found[1500:1800].mean() >= 0.99 and not found[1800:].any()


def test_a_near_duplicate_is_dropped_wherever_its_original_stands():
    rng = random.Random(3)
    text = list(sentence(rng, 100))
    rows = [list(sentence(rng, 100)), text, list(sentence(rng, 100)), text, text]
    found = words.near_duplicates(np.stack([words.signature(r) for r in rows]), 1.0)
    assert found.tolist() == [False, False, False, True, True]


def test_work_on_all_cores_keeps_the_order_and_passes_errors_on():
    def square(x):
        if x == 700:
            raise InputError("seven hundred")
        return x * x

    assert list(words.parallel(square, iter(range(600)))) == [x * x for x in range(600)]
    with pytest.raises(InputError, match="seven hundred"):
        list(words.parallel(square, range(1000)))


# -------------------------------------------------------------------------------------- data filter


def test_filter_writes_rows_of_every_format_back_as_they_were(tmp_path):
    rows = [asked("问", "答", id=7, nested={"a": [1, None]}), {"instruction": "i", "output": "o"},
            {"conversations": [{"from": "human", "value": "q"}],
             "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
            {"text": "raw"}, {"input": "x", "target": "y", "kind": "\ud800"},
            {"prompt": "p", "completion": "c", "label": True}]
    kept, out = run("filter", [jsonl(tmp_path / "a.jsonl", *rows)])
    assert kept == rows and "kept 6 of 6 rows" in out


def test_languages_are_told_apart_by_their_characters(tmp_path):
    zh, en, mixed = asked("什么是Python？", "一种编程语言。"), asked("What?", "A thing."), asked(
        "Translate: I like to eat apples and pears every day", "我爱吃")
    path = jsonl(tmp_path / "a.jsonl", zh, en, mixed)
    assert run("filter", [path], "--language", "zh")[0] == [zh]
    kept, out = run("filter", [path], "--language", "en")
    assert kept == [en] and "dropped 2: not English" in out


def test_lengths_in_characters_are_those_of_the_answers(tmp_path):
    rows = [asked("q" * 50, "a" * n) for n in (4, 5, 9, 10)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    kept, _ = run("filter", [path], "--min_chars", 5, "--max_chars", 9)
    assert kept == rows[1:3]


def test_tests_of_answers_look_at_the_better_one_of_a_pair(tmp_path):
    rows = [{"prompt": "q", "chosen": "答案是7", "rejected": bad, "reference": "7"}
            for bad in ("答案是8", "答案是" + "8" * 99)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run("filter", [path], "--answer_matches", "--max_chars", 9)[0] == rows


def test_rows_in_other_scripts_are_neither_chinese_nor_english(tmp_path):
    rows = [asked("한국의 수도는 어디입니까", "서울입니다"), asked("Столица?", "Москва"),
            asked("日本の首都は", "東京です"), asked("😀", "!")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run("filter", [path], "--language", "en")[0] == []
    assert run("filter", [path], "--language", "zh")[0] == []


def test_lengths_in_tokens_are_those_of_the_rendered_row(tmp_path, checkpoint):
    rows = [asked("q", "a" * n) for n in (1, 5, 9, 30)]
    rows.append({"text": "a"})
    path = jsonl(tmp_path / "a.jsonl", *rows)
    tokenizer = data.ChatTokenizer(checkpoint)
    sizes = [len(e.ids) for e in data.load_examples([path], tokenizer)[0]]
    low, high = sorted(sizes)[1], sorted(sizes)[3]
    kept, _ = run("filter", [path], "--model", checkpoint, "--min_tokens", low,
                  "--max_tokens", high)
    assert kept == [r for r, n in zip(rows, sizes, strict=True) if low <= n <= high]


def test_lima_preset_keeps_long_impersonal_answers_that_stand_alone(tmp_path):
    good = "Water boils at one hundred degrees. " * 50
    rows = [asked("q", text) for text in (
        good, "short", good * 9, good + "I think so.", good + "我觉得", good + "我们知道",
        good + "As mentioned above.", good + "See Stack Exchange.")]
    rows += [asked("q", good, score=9), asked("q", good, score=10), asked("q", "x My y " + good)]
    kept, out = run("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--lima")
    assert kept == [rows[0], rows[5], rows[9]]
    for line in ("2: LIMA: length", "3: LIMA: first person", "2: LIMA: other", "1: LIMA: score"):
        assert f"dropped {line}" in out


def test_repetitive_answers_go(tmp_path):
    rows = [asked("q", "今天天气很好我们去公园玩吧"), asked("q", "复读复读复读复读复读复读")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run("filter", [path], "--max_repetition", 0.3)[0] == rows[:1]


def test_exact_duplicates_are_those_of_dropped_rows_no_more(tmp_path):
    a, long = asked("q", "a"), asked("q", "a", source="copy with other keys")
    kept, out = run("filter", [jsonl(tmp_path / "a.jsonl", a, asked("q", "A"), long, a)],
                    "--duplicates", "exact")
    assert kept == [a, asked("q", "A")] and "dropped 2: exact duplicate" in out
    # a copy of a row that another test drops is no duplicate; here the first is too long
    first = {"prompt": "q", "completion": "a", "score": 1}
    good = "Water boils at one hundred degrees. " * 50
    rows = [asked("q", good, score=1), asked("q", good, score=11), first]
    assert run("filter", [jsonl(tmp_path / "b.jsonl", *rows)], "--lima",
               "--duplicates", "near")[0] == rows[1:2]


def test_near_duplicates_go_and_their_first_stays(tmp_path):
    rng = random.Random(4)
    text = sentence(rng, 150)
    rows = [asked("问题", text), asked("别的", sentence(rng, 150)), asked("问题", text + "。！"),
            asked("问题", text[:-1] + "改")]
    kept, out = run("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--duplicates", "near")
    assert kept == rows[:2] and "dropped 2: near duplicate" in out


def test_perplexity_is_that_of_eval_logprobs(tmp_path, checkpoint):
    rng = random.Random(5)
    rows = [asked(sentence(rng, 4), sentence(rng, rng.randint(1, 20))) for _ in range(12)]
    rows += [{"messages": [user("no answer")]}, {"text": "raw text"}]
    path, scores = jsonl(tmp_path / "a.jsonl", *rows), tmp_path / "scores.jsonl"
    status, _, err = command("eval.py", "logprobs", "--model", checkpoint, "--data", path,
                             "--output", scores)
    assert status == 0, err
    values = [[p for p in row["logprobs"] if p is not None] for row in read(scores)]
    perplexities = [np.exp(-np.mean(v)) if v else np.nan for v in values]
    low, high = np.nanquantile(perplexities, [0.2, 0.7])
    kept, out = run("filter", [path], "--model", checkpoint, "--min_perplexity", low,
                    "--max_perplexity", high, "--micro_tokens", 50)
    assert kept == [r for r, p in zip(rows, perplexities, strict=True) if low <= p <= high]
    assert 0 < len(kept) < len(rows) and f"dropped {len(rows) - len(kept)}: perplexity" in out


@pytest.mark.parametrize("text, final", [
    ("so \\boxed{42} and\nAnswer: 7", "42"), ("1+1=2\n#### 1,234", "1234"),
    ("答案是B。因为A不对", "b"), ("解释。答案为C", "c"), ("答案应该是B", "b"),
    ("A不对，故选B", "b"),
    ("**答案是：B**", "b"), ("So the answer is $42$.", "42"), ("The answer is 3.5.", "3.5"),
    ("The answer is $18.00", "18"), ("The correct answer is (B) Paris.", "b"), ("−５", "-5"),
    ("Answer: yes, since", "yes"), ("3:5", "3:5"), ("(1,2)", "(1,2)"), ("5!", "5!"),
    ("B。因为如此", "b"), ("(A)", "a"), ("D", "d"), ("A cat sat.", "acatsat"), ("巴黎。", "巴黎"),
    ("答案是A。不，答案是D", "d")])
def test_final_answer_is_found(text, final):
    assert filter.final_answer(text) == final


def test_samples_stay_whose_final_answer_is_the_reference(tmp_path):
    def sample(text, reference):
        return {"row": 0, "sample": 0, "finish": "stop", **asked("q", text), "reference": reference}

    rows = [sample("3+4=7。答案是7。", "答案是7"), sample("答案是8", "答案是7"),
            sample("C。因为", "C"), sample("想不出", "C"), sample("C", None), asked("q", "C")]
    kept, out = run("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--answer_matches")
    assert kept == [rows[0], rows[2]]
    assert "dropped 2: another final answer" in out and "dropped 2: no reference" in out


def test_system_messages_are_left_out_of_every_format_on_request(tmp_path):
    plain = [asked("q", "a"), {"conversations": [user("q"), {"from": "gpt", "value": "a"}]},
             {"instruction": "i", "output": "o"}, {"text": "raw"}]
    rows = [asked("q", "a"), {"conversations": [{"from": "system", "value": "s"},
            *plain[1]["conversations"]]}, {"system": "s", **plain[2]}, plain[3]]
    rows[0]["messages"].insert(0, system("be safe"))
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run("filter", [path], "--no_system")[0] == plain
    assert run("filter", [path])[0] == rows


# -------------------------------------------------------------------------------------- data select


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


def test_kmeans_finds_the_groups_and_the_core_sample_lies_in_the_largest(capsys):
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
            chosen = select.core_set(x, 4, 4, seed)
            assert chosen[0] in groups[1]
            assert all(any(c in group for c in chosen) for group in groups)
            return
    raise AssertionError("no seed finds the groups")


def test_states_are_the_mean_of_the_last_hidden_states(tmp_path, checkpoint):
    rows = [asked("问" * n, "答" * (9 - n)) for n in range(1, 9)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    c = select.Config([path], model=str(checkpoint), micro_tokens=40)
    ours = words.run_model(c, [""] * 7 + ["bad row"], "states")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = data.ChatTokenizer(checkpoint)
    assert sorted(ours) == list(range(7))
    for i in ours:
        ids = tokenizer.encode([tokenizer.pieces(rows[i]["messages"])])[0][0]
        with torch.no_grad():
            states = theirs(torch.tensor(ids.astype(int))[None], output_hidden_states=True)
        mean = states.hidden_states[-1][0].mean(0)
        torch.testing.assert_close(torch.from_numpy(ours[i]), mean, atol=1e-5, rtol=1e-4)


def test_kcenter_selects_from_groups_that_random_rows_would_miss(tmp_path, checkpoint):
    rows = [asked("天气好吗", f"好{k % 10}") for k in range(60)]
    rows.append(asked("What is it?", "A very odd one"))
    kept, out = run("select", [jsonl(tmp_path / "a.jsonl", *rows)], "--method", "kcenter", "--n", 3,
                    "--model", checkpoint)
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
        ids, spans = tokenizer.encode([tokenizer.pieces(messages, "last")])[0]
        ids, (first, end, _) = torch.tensor(ids.astype(int)), spans[-1]
        with torch.no_grad():
            logp = theirs(ids[None]).logits[0].log_softmax(-1)
        return -logp[torch.arange(first - 1, end - 1), ids[first:end]].mean().item()

    ifd = [loss(r["messages"]) / loss(r["messages"][-1:]) for r in rows[:20]]
    below = [i for i in np.argsort(ifd)[::-1] if ifd[i] <= 1]
    assert 6 < len(below) < 20
    path = jsonl(tmp_path / "a.jsonl", *rows)
    c, reasons = select.Config([path], model=str(checkpoint)), [""] * 20 + ["not asked"] * 2
    last, alone = (words.run_model(c, reasons, "loss", part) for part in ("last", "alone"))
    assert [last[i] / alone[i] for i in range(20)] == pytest.approx(ifd, rel=1e-4)
    kept, out = run("select", [path], "--method", "ifd", "--n", 5, "--model", checkpoint)
    assert kept == [rows[i] for i in sorted(below[:5])]
    assert f"dropped {20 - len(below)}: IFD above 1" in out
    assert "dropped 2: no question and answer" in out
    assert f"dropped {len(below) - 5}: not chosen" in out


def test_ifd_compares_the_same_tokens_so_rows_that_do_not_fit_have_none(tmp_path, checkpoint):
    rows = [asked("q" * 30, "an answer"), asked("q", "yes")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    tokenizer = data.ChatTokenizer(checkpoint)
    size = len(tokenizer.encode([tokenizer.pieces(rows[1]["messages"])])[0][0])
    flags = ["--method", "ifd", "--model", checkpoint, "--n", 2, "--max_length", size]
    kept, out = run("select", [path], *flags)
    assert rows[0] not in kept and "dropped 1: nothing to score, or above --max_length" in out


@pytest.mark.parametrize("value", [0, np.nan])
def test_states_without_a_direction_are_an_error(value):
    x = np.random.default_rng(0).normal(size=(20, 4))
    x[5] = value
    with pytest.raises(InputError, match="zero or NaN"):
        select.core_set(x, 10, 2, 0)


def test_placeholders_are_filled_in_every_string_once_and_half_ones_refused(tmp_path):
    row = {"prompt": [user("{{name}}?")], "completion": [assistant("{{name}}, {{author}}")],
           "note": {"deep": ["{{author}}"], "n": 3}}
    path = jsonl(tmp_path / "a.jsonl", row)
    kept, _ = run("identity", [path], "--name", "{{author}}", "--author", "A")
    assert kept == [{"prompt": [user("{{author}}?")], "completion": [assistant("{{author}}, A")],
                     "note": {"deep": ["A"], "n": 3}}]
    path = jsonl(tmp_path / "b.jsonl", asked("q", "I am {{name"))
    status, _, err = command("labs/identity.py", path, "--name", "n", "--author", "a",
                             "--output", tmp_path / "o.jsonl")
    assert status == 2 and "placeholder {{name is left over" in err


def test_tags_are_covered_in_rounds_with_the_richest_rows_first():
    tags = [{"a"}, {"a", "b", "c"}, {"d"}, {"c", "d"}, {"a", "b"}]
    # round 1: 1 (a b c), 3 (adds d); round 2: 4 (a b), 2 (adds d); round 3: 0
    assert select.cover_tags(tags, 5) == [1, 3, 4, 2, 0] and select.cover_tags(tags, 2) == [1, 3]
    rng = random.Random(0)
    tags = [set(rng.sample(range(40), rng.randint(1, 4))) for _ in range(200)]
    chosen = select.cover_tags(tags, 40)
    assert set.union(*(tags[i] for i in chosen)) == set.union(*tags)
    assert len(set(select.cover_tags(tags, 200))) == 200


def test_tags_must_be_a_list_of_texts(tmp_path):
    rows = [asked("q", "a", tags=["x"]), asked("q", "b", tags="x")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    status, _, err = command("labs/select.py", path, "--method", "tags", "--n", 1, "--output",
                             tmp_path / "o.jsonl")
    assert status == 2 and "line 2: expected a list of texts as tags" in err
    kept, out = run("select", [path], "--method", "tags", "--n", 1, "--skip_bad_rows")
    assert kept == rows[:1] and "dropped 1: bad row" in out
    path = jsonl(tmp_path / "b.jsonl", rows[0], asked("q", "b", tags=[]))
    kept, out = run("select", [path], "--method", "tags", "--n", 1)
    assert kept == rows[:1] and "dropped 1: no tags" in out
    assert not (tmp_path / "o.jsonl").exists()


def test_random_choice_is_a_function_of_the_seed_and_keeps_the_order(tmp_path):
    rows = [asked("q", str(k)) for k in range(100)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    one, again, other = (run("select", [path], "--share", 0.1, "--seed", seed)[0]
                         for seed in (0, 0, 1))
    assert one == again != other and len(one) == len(other) == 10
    assert [int(r["messages"][1]["content"]) for r in one] == sorted(
        int(r["messages"][1]["content"]) for r in one)


# ---------------------------------------------------------------------------- exam, identity, show

WANJUAN = {"q_type": "单选题", "q_main": "油锅着火怎么办( )", "option_a": "盖上锅盖",
           "option_b": "用水", "option_c": "开窗", "option_d": "逃跑", "option_e": "",
           "std_ans": "A",
           "answer_detail": "盖上锅盖可以隔绝空气，故A正确。\n故选：A．\n谢谢"}
CHOICE = "油锅着火怎么办( )\nA. 盖上锅盖\nB. 用水\nC. 开窗\nD. 逃跑\n"


def conversation(row):
    """(prompt, answer) of a row of one turn."""
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    return tuple(m["content"] for m in row["messages"])


def test_exam_formats_are_those_of_steel_llm_to_the_character(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", WANJUAN)
    (first,), _ = run("exam_rows", [path])
    assert conversation(first) == (f"以下是一道单选题:\n{CHOICE}请给出答案。\n",
                                   "A。盖上锅盖可以隔绝空气，故A正确。\n故选：A．\n谢谢")
    (last,), _ = run("exam_rows", [path], "--style", "explanation_first")
    assert conversation(last) == (f"以下是一道单选题:\n{CHOICE}请先给出解释再给出答案。\n",
                                  "盖上锅盖可以隔绝空气，故A正确。\n答案为A")


def test_short_or_missing_explanations_fall_back_to_answer_first(tmp_path):
    rows = [{**WANJUAN, "answer_detail": "九个字的解释不够长"},
            {**WANJUAN, "answer_detail": "十个字的解释正好够长"}, {**WANJUAN, "std_ans": ""},
            {**WANJUAN, "std_ans": "", "answer_detail": None}]
    assert [len(r["answer_detail"] or "") for r in rows[:2]] == [9, 10]
    kept, out = run("exam_rows", [jsonl(tmp_path / "a.jsonl", *rows)], "--style",
                    "explanation_first")
    assert [conversation(r)[1] for r in kept] == [
        "A。九个字的解释不够长", "十个字的解释正好够长答案为A", WANJUAN["answer_detail"]]
    assert "请给出答案" in conversation(kept[0])[0] and "请给出答案" in conversation(kept[2])[0]
    assert "dropped 1: no answer" in out


def write_exam(folder):
    """Twenty random questions in C-Eval's layout; returns (question, options) of each."""
    rng, rows = random.Random(7), []
    (folder / "val").mkdir(parents=True)
    (folder / "test").mkdir()
    for split, answer in (("val", ",B"), ("test", "")):
        lines = ["id,question,A,B,C,D" + (",answer" if answer else "")]
        for k in range(10):
            text, options = sentence(rng, 30), [sentence(rng, 4) for _ in range(4)]
            lines.append(",".join([str(k), f'"{text}，\r\n____。"', *options]) + answer)
            rows.append((text, options))
        (folder / split / f"law_{split}.csv").write_text("\n".join(lines), encoding="utf-8")
    return rows


def test_exam_files_are_read_only_behind_the_flag_that_names_the_harm(tmp_path):
    write_exam(tmp_path)
    path, out = tmp_path / "val/law_val.csv", tmp_path / "o.jsonl"
    status, _, err = command("labs/exam_rows.py", path, "--output", out)
    assert status == 2 and "contaminates" in err and "--from_exam" in err and not out.exists()
    status, text, _ = command("labs/exam_rows.py", "--help")
    assert "CONTAMINATES" in text
    kept, _ = run("exam_rows", [path], "--from_exam")
    assert len(kept) == 10 and all(conversation(row)[1] == "B。" for row in kept)


def test_mmlu_files_have_no_line_of_names_and_cmmlu_ones_an_index(tmp_path):
    mmlu, cmmlu = tmp_path / "law_test.csv", tmp_path / "agronomy.csv"
    mmlu.write_text('"Why, ""so""?",w,x,y,z,C\n', encoding="utf-8")
    cmmlu.write_text(",Question,A,B,C,D,Answer\n0,为何,甲,乙,丙,丁,D\n", encoding="utf-8-sig")
    (one, two), _ = run("exam_rows", [mmlu, cmmlu], "--from_exam", output=tmp_path / "o.jsonl")
    assert conversation(one)[0].startswith('以下是一道单选题:\nWhy, "so"?\nA. w\n')
    assert conversation(one)[1] == "C。" and conversation(two)[1] == "D。"


@pytest.mark.parametrize("row", [
    {**WANJUAN, "std_ans": "F"}, {**WANJUAN, "q_main": ""}, {"q_main": "q", "option_a": "one"},
    {**WANJUAN, "option_b": ["list"]}, ["no object"]])
def test_a_broken_question_is_named(tmp_path, row):
    path, out = jsonl(tmp_path / "a.jsonl", WANJUAN, row), tmp_path / "o.jsonl"
    status, _, err = command("labs/exam_rows.py", path, "--output", out)
    assert status == 2 and "a.jsonl line 2: expected a question" in err and not out.exists()
    kept, text = run("exam_rows", [path], "--skip_bad_rows")
    assert len(kept) == 1 and "dropped 1: bad row" in text and "dropped " + path in text


def test_a_short_line_of_an_exam_file_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,question,A,B,C,D,answer\n0,q,w,x,y,z,A\n1,q,w,x\n", encoding="utf-8")
    status, _, err = command("labs/exam_rows.py", path, "--from_exam", "--output",
                             tmp_path / "o.jsonl")
    assert status == 2 and "a.csv row 2: expected" in err


def test_identity_fills_names_in_and_refuses_what_is_left(tmp_path):
    rows = [asked("who?", "I am {{name}} by {{author}}; {x} {{name}}"), asked("你是？", "{{name}}")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    kept, _ = run("identity", [path], "--name", '小"调\\', "--author", "甲")
    assert kept == [asked("who?", 'I am 小"调\\ by 甲; {x} 小"调\\'), asked("你是？", '小"调\\')]
    path = jsonl(tmp_path / "b.jsonl", rows[0], asked("q", "by {{ company }}"))
    out = tmp_path / "o.jsonl"
    status, _, err = command("labs/identity.py", path, "--name", "n", "--author", "a",
                             "--output", out)
    assert status == 2 and "line 2: the placeholder {{ company }} is left over" in err
    assert not out.exists()
    status, _, err = command("labs/identity.py", path, "--name", "n", "--output", out)
    assert status == 2 and "--author" in err


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


def test_show_draws_the_mix_that_training_draws(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", *(asked("q", f"a{k}") for k in range(90)))
    b = jsonl(tmp_path / "b.jsonl", *(asked("q", f"b{k}") for k in range(10)))
    flags = ["--steps", 10, "--batch_size", 8, "--mix", "weights", "--weights", 1, 3, "--seed", 5]
    status, out, err = command("data.py", "show", a, b, "--rows", 0, *flags)
    assert status == 0, err
    drawn = data.Mixer([90, 10], np.array([0.25, 0.75]), 5).draws(0, 80)
    count = sum(i < 90 for i, _ in drawn)
    rows = [line.split() for line in out.splitlines() if line.startswith(("a ", "b "))][-2:]
    assert rows[0][:5] == ["a", "90", "25.0%", str(count), f"{count / 80:.1%}"]
    assert rows[1][:4] == ["b", "10", "75.0%", str(80 - count)]
    status, out, _ = command("data.py", "show", a, b, "--rows", 0, "--steps", 30, "--mix",
                             "temperature", "--temperature", 2, "--cap", 40)
    rows = [line.split() for line in out.splitlines() if line.startswith(("a ", "b "))][-2:]
    rates = np.sqrt(np.minimum([90, 10], 40) / 50)
    assert [row[2] for row in rows] == [f"{r:.1%}" for r in rates / rates.sum()]
    assert abs(int(rows[0][3]) / 480 - 2 / 3) < 0.05
    status, _, err = command("data.py", "show", a, b, "--weights", 1, 3)
    assert status == 2 and "--mix weights" in err


# ------------------------------------------------------------------------------------- data overlap


def test_leaked_questions_are_found_in_whatever_form_and_no_others(tmp_path):
    rng, rows = random.Random(8), write_exam(tmp_path / "exam")
    leaks, (text, options) = [], rows[0]
    listed = "".join(f"\n({k}) {o}" for k, o in zip("ABCD", options, strict=True))
    leaks.append(asked(f"请回答：{text}，____？{listed}", "B"))
    leaks.append({"text": "前言" + rows[1][0] + "后语"})
    changed = rows[12][0][:15] + "改" + rows[12][0][16:]
    leaks.append({"instruction": "选", "input": changed, "output": ""})
    leaks.append({"conversations": [user(sentence(rng, 9))], "chosen": assistant(rows[13][0]),
                  "rejected": assistant("no")})
    clean = [asked(sentence(rng, 50), rows[5][0][:14]) for _ in range(200)]
    train = jsonl(tmp_path / "train.jsonl", *clean[:100], *leaks, *clean[100:])
    hits, out = run("overlap", [train], "--exam", tmp_path / "exam", output=tmp_path / "hits.jsonl")
    assert [(h["kind"], h["exam"].split("/")[-1], h["row"].split()[-1]) for h in hits] == [
        ("exact", "law_val.csv row 1", "101"), ("exact", "law_val.csv row 2", "102"),
        ("near", "law_test.csv row 3", "103"), ("exact", "law_test.csv row 4", "104")]
    assert hits[2]["covered"] == pytest.approx(29 / 30) and hits[0]["options_covered"] == 1
    table = {line.split()[0][-4:]: line.split()[1:] for line in out.splitlines() if "exam/" in line}
    assert table["/val"] == ["10", "2", "0", "0"] and table["test"] == ["10", "1", "1", "0"]
    assert "CONTAMINATED: 4 questions" in out


def test_a_common_short_question_counts_only_with_its_options(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val/x_val.csv").write_text(
        "id,question,A,B,C,D,answer\n"
        "0,下列说法正确的是____。,地球是圆的,太阳绕地球转,水不会沸腾,铁是木头,A\n",
        encoding="utf-8")
    rows = [asked("下列说法正确的是\nA. 猫会飞\nB. 狗会说话", "都不对"),
            asked("下列说法正确的是：A、地球是圆的 B、太阳绕地球转 C、水不会沸腾 D、铁是木头",
                  "A")]
    hits, out = run("overlap", [jsonl(tmp_path / "a.jsonl", rows[0])], "--exam", tmp_path)
    assert [h["kind"] for h in hits] == ["short"] and "clean; 1 short" in out
    hits, out = run("overlap", [jsonl(tmp_path / "a.jsonl", *rows)], "--exam", tmp_path)
    assert [h["kind"] for h in hits] == ["short", "exact"] and "CONTAMINATED: 1 questions; 0" in out


def test_clean_files_are_called_clean(tmp_path):
    write_exam(tmp_path / "exam")
    train = jsonl(tmp_path / "train.jsonl", asked("天气如何", "很好"), {"text": ""})
    status, out, _ = command("labs/overlap.py", train, "--exam", tmp_path / "exam")
    assert status == 0 and "clean; 0 short" in out
    status, _, err = command("labs/overlap.py", train, "--exam", tmp_path / "none")
    assert status == 2 and "--exam needs a folder" in err
    for flags in (["--output", train], ["--near", 2]):  # neither may cost the training data
        status, _, err = command("labs/overlap.py", train, "--exam", tmp_path / "exam", *flags)
        assert status == 2 and flags[0] in err and len(read(train)) == 2


@pytest.mark.skipif(not (SHARED / "data/cmmlu").exists(), reason="no ../shared")
def test_every_question_of_cmmlu_is_found_in_training_data_made_from_it(tmp_path):
    files = sorted((SHARED / "data/cmmlu/test").glob("*.csv"))[:3]
    run("exam_rows", files, "--from_exam", output=tmp_path / "leak.jsonl")
    _, out = run("overlap", [tmp_path / "leak.jsonl"], "--exam", SHARED / "data/cmmlu/test",
                 output=tmp_path / "hits.jsonl")
    count = sum(len(list(evaluation.read_csv(path))) for path in files)
    found = int(out.split("CONTAMINATED: ")[1].split()[0])
    assert count <= found <= count + 5  # a question of two subjects may be the same


# --------------------------------------------------------------------------------- flags and errors

BAD = {
    "no output": (["filter", "GOOD"], "--output"),
    "a folder as output": (["exam_rows", "GOOD", "--output", "FOLDER"], "--output"),
    "tokens without a model": (["filter", "GOOD", "--output", "O", "--min_tokens", "3"], "--model"),
    "kcenter without a model": (["select", "GOOD", "--output", "O", "--n", "1", "--method",
                                 "kcenter"], "--model"),
    "n and share": (["select", "GOOD", "--output", "O", "--n", "1", "--share", "0.1"], "--n"),
    "neither": (["select", "GOOD", "--output", "O"], "--n"),
    "n above the rows": (["select", "GOOD", "--output", "O", "--n", "9"], "more than the 1 rows"),
    "bad row": (["filter", "BROKEN", "--output", "O"], "broken.jsonl line 2: not JSON"),
    "bad row of select": (["select", "BROKEN", "--output", "O", "--n", "1"], "line 2: not JSON"),
    "missing file": (["filter", "GOOD", "NONE", "--output", "O"], "does not exist"),
    "output of another kind": (["filter", "GOOD", "--output", "O.txt"], "FILE.jsonl, not 'O.txt'"),
    "output in a file": (["filter", "GOOD", "--output", "GOOD/o.jsonl"], "cannot be written"),
    "no row": (["select", "GOOD", "--output", "O", "--method", "tags", "--share", "0.1"],
               "no row to choose from: {'no tags': 1}"),
    "no checkpoint": (["select", "GOOD", "--output", "O", "--n", "1", "--method", "ifd", "--model",
                       "NONE"], "is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_writes_nothing(name, tmp_path):
    paths = {"GOOD": jsonl(tmp_path / "good.jsonl", asked("q", "a")),
             "O": str(tmp_path / "o.jsonl"), "BROKEN": str(tmp_path / "broken.jsonl"),
             "NONE": str(tmp_path / "none.jsonl"), "FOLDER": str(tmp_path)}
    Path(paths["BROKEN"]).write_text('{"text": "a"}\n{"text": \n{"nothing": 1}\n', encoding="utf-8")
    arguments, message = BAD[name]
    arguments = [a.replace("GOOD/", paths["GOOD"] + "/") for a in arguments]
    name, *arguments = arguments
    status, _, err = command(f"labs/{name}.py", *[paths.get(a, a) for a in arguments])
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.jsonl", "good.jsonl"]


@pytest.mark.parametrize("flags", [["filter", "--duplicates", "near"], ["select", "--n", "1"]])
def test_skipped_rows_are_counted_and_listed(flags, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": \n{"text": "a"}\n{"nothing": 1}\n', encoding="utf-8")
    kept, out = run(flags[0], [path], *flags[1:], "--skip_bad_rows", output=tmp_path / "o.jsonl")
    assert kept == [{"text": "a"}] and "dropped 2: bad row" in out
    assert f"dropped {path} line 1" in out and f"dropped {path} line 3" in out


# --------------------------------------------------------------------------------- a turn-end token


@pytest.mark.parametrize("family", ["llama2", "qwen3"])  # plain head and tied one
def test_new_turn_end_begins_as_eos_and_ends_the_answer(family, tmp_path):
    make_checkpoint(tmp_path / "base", family)
    path = jsonl(tmp_path / "a.jsonl", *(asked(f"q{k}", "an answer") for k in range(4)))
    flags = ["--model", tmp_path / "base", "--data", path, "--output_dir", tmp_path / "out",
             "--eot", "<|end|>", "--steps", 1, "--learning_rate", 1e-30, "--weight_decay", 0]
    status, _, err = command("train_sft.py", *flags)
    assert status in (0, None), err
    before, after = data.ChatTokenizer(tmp_path / "base"), data.ChatTokenizer(tmp_path / "out")
    old, new = modeling.load(tmp_path / "base"), modeling.load(tmp_path / "out")
    end, eos = after.stop_id, before.eos_id
    stored = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert end == stored.token_to_id("<|end|>") != eos == after.eos_id
    for a, b in ((old.model.embed_tokens.weight, new.model.embed_tokens.weight),
                 (old.head, new.head)):
        assert torch.equal(b[end], a[eos]) and torch.equal(b[:end], a[:end])
        assert torch.equal(b[end + 1 :], a[end + 1 :])
    messages = [user("q"), assistant("an answer")]
    ids, spans = after.encode([after.pieces(messages)])[0]
    assert ids[spans[-1][1] - 1] == end
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(messages, return_dict=False) == ids.tolist()
    their_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert end in their_model.generation_config.eos_token_id
    assert their_model.config.vocab_size == len(new.model.embed_tokens.weight) > end


def test_training_on_with_the_same_turn_end_keeps_what_it_learnt(tmp_path):
    make_checkpoint(tmp_path / "base", "llama2")
    path = jsonl(tmp_path / "a.jsonl", *(asked(f"q{k}", "an answer") for k in range(4)))

    def train(model, out, *flags):
        status, _, err = command("train_sft.py", "--model", model, "--data", path, "--steps", 2,
                                 "--output_dir", out, "--learning_rate", 1e-2, *flags)
        assert status in (0, None), err
        return modeling.load(out)

    first = train(tmp_path / "base", tmp_path / "one", "--eot", "<|end|>")
    tokenizer = data.ChatTokenizer(tmp_path / "one")
    row = first.head[tokenizer.stop_id]
    assert not torch.equal(row, first.head[tokenizer.eos_id])
    c = SimpleNamespace(model=tmp_path / "one", dropout=[0.0], checkpoint_activations=False,
                        compile=False)
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    again = data.ChatTokenizer(tmp_path / "one", eot="<|end|>")
    loaded, _ = train_sft.load_trainable(c, hardware, again)
    assert torch.equal(loaded.head[again.stop_id], row)
    train(tmp_path / "one", tmp_path / "two")  # without the flag the checkpoint remembers it
    assert data.ChatTokenizer(tmp_path / "two").stop_id == tokenizer.stop_id


@pytest.mark.parametrize("token", ["<|im_start|>", "<|endoftext|>"])
def test_a_token_the_checkpoint_knows_keeps_its_row_or_is_refused_as_turn_end(token, tmp_path):
    make_checkpoint(tmp_path / "base", "qwen2")
    if token == "<|im_start|>":  # the template begins turns with it
        with pytest.raises(InputError, match="writes <.im_start.> elsewhere too"):
            data.ChatTokenizer(tmp_path / "base", eot=token)
        return
    tokenizer = data.ChatTokenizer(tmp_path / "base", eot=token)
    c = SimpleNamespace(model=tmp_path / "base", dropout=[0.0], checkpoint_activations=False,
                        compile=False)
    hardware = train_sft.Hardware(0, 1, torch.device("cpu"), torch.float32)
    loaded, _ = train_sft.load_trainable(c, hardware, tokenizer)
    row = modeling.load(tmp_path / "base").model.embed_tokens.weight[tokenizer.stop_id]
    assert torch.equal(loaded.model.embed_tokens.weight[tokenizer.stop_id], row)


@pytest.mark.parametrize("token", ["end", "</s>"])
def test_a_turn_end_must_look_like_a_token_and_not_be_eos(token, tmp_path):
    make_checkpoint(tmp_path / "base", "llama2")
    with pytest.raises(InputError, match="--eot: expected a token"):
        data.ChatTokenizer(tmp_path / "base", eot=token)


def test_final_answers_of_signs_percents_and_nested_braces_are_told_apart(tmp_path):
    rows = [asked("q", answer, reference=reference) for answer, reference in (
        ("答案：√", "×"), ("答案是50%", "50"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("答案：×", "×"))]
    kept, _ = run("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--answer_matches")
    assert kept == rows[2:]


def test_rows_without_words_are_duplicates_only_if_they_are_alike(tmp_path):
    rows = [asked("😀", "🎉"), asked("……", "！！！"), asked("3×4=?", "?"), asked("3÷4=?", "!"),
            asked("😀", "🎉")]
    kept, _ = run("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--duplicates", "near")
    assert kept == rows[:4]


def test_system_messages_go_from_every_form_of_row(tmp_path):
    rows = [{"prompt": [system("s"), user("q")], "completion": "a"},
            {"chosen": [system("s"), user("q"), assistant("a")],
             "rejected": [system("s"), user("q"), assistant("b")]}]
    rows += [{"prompt": system("s"), "completion": "a"}, {"messages": [system("s")]}]
    kept, out = run("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--no_system")
    assert "system" not in json.dumps(kept) and len(kept) == 3
    assert "dropped 1: only a system message" in out


@pytest.mark.parametrize("flags,said", [
    (["filter", "--min_chars", "9", "--max_chars", "3"], "above --max_chars: no row"),
    (["filter", "--max_length", "0"], "--max_length"),
    (["filter", "--near", "-1"], "--near"),
    (["filter", "--max_repetition", "nan"], "--max_repetition"),
    (["filter", "--min_chars", "-5"], "--min_chars is negative"),
    (["select", "--n", "-2", "--share", "0.5"], "give --n above 0"),
    (["select", "--n", "1", "--share", "nan"], "give --n above 0"),
    (["select", "--n", "1", "--clusters", "0"], "--clusters"),
    (["select", "--n", "1", "--seed", "-1"], "--seed")])
def test_flags_that_make_no_sense_end_in_one_line(flags, said, tmp_path):
    path, output = jsonl(tmp_path / "a.jsonl", asked("q", "a")), tmp_path / "o.jsonl"
    status, _, err = command(f"labs/{flags[0]}.py", path, "--output", output, *flags[1:])
    assert status == 2 and said in err and err.count("\n") == 1
    status, _, err = command("data.py", "show", path, "--steps", "2", "--mix", "temperature",
                             "--temperature", "0")
    assert status == 2 and "--temperature" in err and err.count("\n") == 1
