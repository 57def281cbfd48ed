"""labs/filter.py: why rows are dropped."""

import json
import random

import numpy as np
import pytest
from conftest import (
    CHARACTERS,
    asked,
    assistant,
    command,
    jsonl,
    read,
    run_lab,
    sentence,
    system,
    user,
)

import data
from labs import filter
from labs.text import signature


def test_planted_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(2)
    texts, planted = [list(sentence(rng, 200)) for _ in range(1500)], []
    for k in range(300):  # 3 of 200 words changed: 15 of 196 n-grams, similarity about 0.86
        copy = texts[k].copy()
        for place in rng.sample(range(200), 3):
            copy[place] = rng.choice(CHARACTERS)
        planted.append(copy)
    for k in range(300, 600):  # half of the text is the same: similarity about 0.33
        planted.append(texts[k][:100] + list(sentence(rng, 100)))
    signatures = np.stack([signature(t) for t in texts + planted])
    found = filter.near_duplicates(signatures, 0.7)
    assert not found[:1500].any(), "a row is a duplicate of an earlier one only"
    assert found[1500:1800].mean() >= 0.99 and not found[1800:].any()


def test_a_near_duplicate_is_dropped_wherever_its_original_stands():
    rng = random.Random(3)
    text = list(sentence(rng, 100))
    rows = [list(sentence(rng, 100)), text, list(sentence(rng, 100)), text, text]
    found = filter.near_duplicates(np.stack([signature(r) for r in rows]), 1.0)
    assert found.tolist() == [False, False, False, True, True]


def test_filter_writes_rows_of_every_format_back_as_they_were(tmp_path):
    rows = [asked("问", "答", id=7, nested={"a": [1, None]}), {"instruction": "i", "output": "o"},
            {"conversations": [{"from": "human", "value": "q"}],
             "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
            {"text": "raw"}, {"input": "x", "target": "y", "kind": "\ud800"},
            {"prompt": "p", "completion": "c", "label": True}]
    kept, out = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)])
    assert kept == rows and "kept 6 of 6 rows" in out


def test_languages_are_told_apart_by_their_characters(tmp_path):
    zh, en, mixed = asked("什么是Python？", "一种编程语言。"), asked("What?", "A thing."), asked(
        "Translate: I like to eat apples and pears every day", "我爱吃")
    path = jsonl(tmp_path / "a.jsonl", zh, en, mixed)
    assert run_lab("filter", [path], "--language", "zh")[0] == [zh]
    kept, out = run_lab("filter", [path], "--language", "en")
    assert kept == [en] and "dropped 2: not English" in out


def test_lengths_in_characters_are_those_of_the_answers(tmp_path):
    rows = [asked("q" * 50, "a" * n) for n in (4, 5, 9, 10)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    kept, _ = run_lab("filter", [path], "--min_chars", 5, "--max_chars", 9)
    assert kept == rows[1:3]


def test_tests_of_answers_look_at_the_better_one_of_a_pair(tmp_path):
    rows = [{"prompt": "q", "chosen": "答案是7", "rejected": bad, "reference": "7"}
            for bad in ("答案是8", "答案是" + "8" * 99)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run_lab("filter", [path], "--answer_matches", "--max_chars", 9)[0] == rows


def test_rows_in_other_scripts_are_neither_chinese_nor_english(tmp_path):
    rows = [asked("한국의 수도는 어디입니까", "서울입니다"), asked("Столица?", "Москва"),
            asked("日本の首都は", "東京です"), asked("😀", "!")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run_lab("filter", [path], "--language", "en")[0] == []
    assert run_lab("filter", [path], "--language", "zh")[0] == []


def test_lengths_in_tokens_are_those_of_the_rendered_row(tmp_path, checkpoint):
    rows = [asked("q", "a" * n) for n in (1, 5, 9, 30)]
    rows.append({"text": "a"})
    path = jsonl(tmp_path / "a.jsonl", *rows)
    tokenizer = data.ChatTokenizer(checkpoint)
    sizes = [len(e.ids) for e in data.load_examples([path], tokenizer)[0]]
    low, high = sorted(sizes)[1], sorted(sizes)[3]
    kept, _ = run_lab("filter", [path], "--model", checkpoint, "--min_tokens", low,
                  "--max_tokens", high)
    assert kept == [r for r, n in zip(rows, sizes, strict=True) if low <= n <= high]


def test_lima_preset_keeps_long_impersonal_answers_that_stand_alone(tmp_path):
    good = "Water boils at one hundred degrees. " * 50
    rows = [asked("q", text) for text in (
        good, "short", good * 9, good + "I think so.", good + "我觉得", good + "我们知道",
        good + "As mentioned above.", good + "See Stack Exchange.")]
    rows += [asked("q", good, score=9), asked("q", good, score=10), asked("q", "x My y " + good)]
    kept, out = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--lima")
    assert kept == [rows[0], rows[5], rows[9]]
    for line in ("2: LIMA: length", "3: LIMA: first person", "2: LIMA: other", "1: LIMA: score"):
        assert f"dropped {line}" in out


def test_repetitive_answers_go(tmp_path):
    rows = [asked("q", "今天天气很好我们去公园玩吧"), asked("q", "复读复读复读复读复读复读")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run_lab("filter", [path], "--max_repetition", 0.3)[0] == rows[:1]


def test_an_answer_that_repeats_an_earlier_turn_goes(tmp_path):
    """Each answer alone is fine. Short ones, such as a thank you, may come again."""
    long, other = "今天天气很好我们去公园玩吧", "明天会下雨所以最好留在家里"
    talks = [[user("q"), assistant(long), user("r"), assistant(answer)]
             for answer in (long, other, "好的。", long[:8] + other[:8])]
    talks.append([user("q"), assistant("好的。"), user(long), assistant("好的。")])
    rows = [{"messages": talk} for talk in talks]
    kept, out = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--max_repetition", 0.3)
    assert kept == [rows[1], rows[2], rows[4]] and "dropped 2: repetition" in out


def test_share_of_repeated_ngrams_is_that_of_plain_sets():
    rng = random.Random(7)
    answers = [sentence(rng, 20) for _ in range(3)]
    answers += [answers[0][:12] + answers[1][3:15], answers[2] + answers[2]]
    most, before = 0.0, []
    for answer in answers:
        grams = [answer[i : i + 5] for i in range(len(answer) - 4)]
        repeated = 0
        for i, gram in enumerate(grams):
            repeated += gram in grams[:i] or gram in before
        before += grams
        most = max(most, repeated / len(grams))
    assert filter.repetition(answers) == pytest.approx(most) and most > 0.5
    assert filter.repetition(answers[:3]) == 0


def test_questions_are_kept_or_dropped_by_the_share_of_samples_that_are_right(tmp_path):
    """Two samples of each: both right, one, none; the last question was not sampled."""
    rows = [asked(question, "答案是B") for question in ("1", "2", "3", "4")]
    rows[1]["messages"].insert(0, system("s"))
    samples = []
    for row, answers in zip(rows, (("B", "答案是B。因为"), ("B", "C"), ("A", "D")), strict=False):
        samples += [{"messages": [*row["messages"][:-1], assistant(answer)], "reference": "答案是B"}
                    for answer in answers]
    path, known = jsonl(tmp_path / "a.jsonl", *rows), jsonl(tmp_path / "s.jsonl", *samples)
    kept, out = run_lab("filter", [path], "--known", known, "--min_known", 0.5)
    assert kept == rows[:2] and "dropped 1: share of right samples" in out
    assert "dropped 1: no samples of its question" in out
    assert run_lab("filter", [path], "--known", known, "--max_known", 0.5)[0] == rows[1:3]
    pair = {"prompt": [user("1")], "chosen": "B", "rejected": "C"}
    path = jsonl(tmp_path / "p.jsonl", pair, {**pair, "prompt": [user("3")]})
    assert run_lab("filter", [path], "--known", known, "--min_known", 0.5)[0] == [pair]


@pytest.mark.parametrize("flags,words", [
    (["--min_known", 0.5], "--known SAMPLES goes with"), (["--known", "S"], "goes with"),
    (["--known", "S", "--min_known", 0.8, "--max_known", 0.2], "--min_known is negative, or above"),
    (["--known", "S", "--min_known", 0.5], "no reference to compare")])
def test_flags_of_known_that_make_no_sense_are_refused_in_one_line(tmp_path, flags, words):
    path = jsonl(tmp_path / "a.jsonl", asked("q", "a"))
    flags = [path if flag == "S" else flag for flag in flags]
    status, _, err = command("labs/filter.py", path, "--output", tmp_path / "o.jsonl", *flags)
    assert status == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_exact_duplicates_are_those_of_dropped_rows_no_more(tmp_path):
    a, long = asked("q", "a"), asked("q", "a", source="copy with other keys")
    kept, out = run_lab("filter", [jsonl(tmp_path / "a.jsonl", a, asked("q", "A"), long, a)],
                    "--duplicates", "exact")
    assert kept == [a, asked("q", "A")] and "dropped 2: exact duplicate" in out
    # a copy of a row that another test drops is no duplicate; here the first is too long
    first = {"prompt": "q", "completion": "a", "score": 1}
    good = "Water boils at one hundred degrees. " * 50
    rows = [asked("q", good, score=1), asked("q", good, score=11), first]
    assert run_lab("filter", [jsonl(tmp_path / "b.jsonl", *rows)], "--lima",
               "--duplicates", "near")[0] == rows[1:2]


def test_near_duplicates_go_and_their_first_stays(tmp_path):
    rng = random.Random(4)
    text = sentence(rng, 150)
    rows = [asked("问题", text), asked("别的", sentence(rng, 150)), asked("问题", text + "。！"),
            asked("问题", text[:-1] + "改")]
    kept, out = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--duplicates", "near")
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
    kept, out = run_lab("filter", [path], "--model", checkpoint, "--min_perplexity", low,
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
    ("答案是A。不，答案是D", "d"), ("<think>\n答案是A\n</think>\n\nB", "b"),
    ("maybe \\boxed{3}?</think>\n答案是4", "4"), ("<think>\n答案是A，或者", ""),
    ("so \\boxed{\\sqrt{\\frac{\\sqrt{a^{2}}}{b}}}.", "\\sqrt{\\frac{\\sqrt{a^{2}}}{b}}"),
    ("\\boxed{\\text{E}}", "e"), ("\\boxed{\\mathrm{(B)}}", "b"), ("\\boxed{12{,}345}", "12345"),
    ("\\boxed{70\\%}", "70%"), ("#### .5", "0.5"), ("答案是-0", "0"), ("答案是+5", "5")])
def test_final_answer_is_found(text, final):
    assert filter.final_answer(text) == final


def test_samples_stay_whose_final_answer_is_the_reference(tmp_path):
    def sample(text, reference):
        return {"row": 0, "sample": 0, "finish": "stop", **asked("q", text), "reference": reference}

    rows = [sample("3+4=7。答案是7。", "答案是7"), sample("答案是8", "答案是7"),
            sample("C。因为", "C"), sample("想不出", "C"), sample("C", None), asked("q", "C"),
            sample("<think>\n答案是A\n</think>\n\nB", "<think>\nC?\n</think>\n\nB"),
            sample("<think>\n答案是B，但是", "B")]
    rows.append({"messages": [user("q"), assistant("B", reasoning_content="A?")], "reference": "B"})
    kept, out = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--answer_matches")
    assert kept == [rows[0], rows[2], rows[6], rows[8]]
    assert "not used" not in out  # a filter reads keys that training does not
    assert "dropped 3: another final answer" in out and "dropped 2: no reference" in out


def test_system_messages_are_left_out_of_every_format_on_request(tmp_path):
    plain = [asked("q", "a"), {"conversations": [user("q"), {"from": "gpt", "value": "a"}]},
             {"instruction": "i", "output": "o"}, {"text": "raw"}]
    rows = [asked("q", "a"), {"conversations": [{"from": "system", "value": "s"},
            *plain[1]["conversations"]]}, {"system": "s", **plain[2]}, plain[3]]
    rows[0]["messages"].insert(0, system("be safe"))
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert run_lab("filter", [path], "--no_system")[0] == plain
    assert run_lab("filter", [path])[0] == rows


def test_final_answers_of_signs_percents_and_nested_braces_are_told_apart(tmp_path):
    rows = [asked("q", answer, reference=reference) for answer, reference in (
        ("答案：√", "×"), ("答案是50%", "50"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("答案：×", "×"))]
    kept, _ = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--answer_matches")
    assert kept == rows[2:]


def test_rows_without_words_are_duplicates_only_if_they_are_alike(tmp_path):
    rows = [asked("😀", "🎉"), asked("……", "！！！"), asked("3×4=?", "?"), asked("3÷4=?", "!"),
            asked("😀", "🎉")]
    kept, _ = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--duplicates", "near")
    assert kept == rows[:4]


def test_system_messages_go_from_every_form_of_row(tmp_path):
    rows = [{"prompt": [system("s"), user("q")], "completion": "a"},
            {"chosen": [system("s"), user("q"), assistant("a")],
             "rejected": [system("s"), user("q"), assistant("b")]}]
    rows += [{"prompt": system("s"), "completion": "a"}, {"messages": [system("s")]},
             {"system_prompt": "system", "query": "q", "response": "a"},
             {"conversation": [{"role": "System", "content": "s"}, user("q"), assistant("a")]}]
    kept, out = run_lab("filter", [jsonl(tmp_path / "a.jsonl", *rows)], "--no_system")
    assert "system" not in json.dumps(kept).lower() and len(kept) == 5
    assert "dropped 1: only a system message" in out


def test_max_rouge_keeps_questions_that_are_unlike_all_kept_before(tmp_path):
    rows = [asked("name the rivers of France", "a"), asked("name the rivers of Spain", "b"),
            asked("why is the sky blue", "c"), {"text": "name the rivers of France"},
            asked("Name the rivers of France!", "another answer")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    kept, out = run_lab("filter", [path], "--max_rouge", 0.8)
    assert kept == [rows[0], rows[2]] and "dropped 3: ROUGE-L of 0.8 or more" in out
    assert run_lab("filter", [path], "--max_rouge", 0.81)[0] == [rows[0], rows[1], rows[2]]
    assert run_lab("filter", [path])[0] == rows
