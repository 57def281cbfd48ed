"""labs/tags.py: tags are cleaned, and rows cover them."""

import random
from pathlib import Path

from conftest import asked, command, jsonl, run_lab

from labs import tags


def test_tags_are_covered_in_rounds_with_the_richest_rows_first():
    own = [{"a"}, {"a", "b", "c"}, {"d"}, {"c", "d"}, {"a", "b"}]
    # round 1: 1 (a b c), 3 (adds d); round 2: 4 (a b), 2 (adds d); round 3: 0
    assert tags.cover_tags(own, 5) == [1, 3, 4, 2, 0] and tags.cover_tags(own, 2) == [1, 3]
    rng = random.Random(0)
    own = [set(rng.sample(range(40), rng.randint(1, 4))) for _ in range(200)]
    assert set.union(*(own[i] for i in tags.cover_tags(own, 40))) == set.union(*own)
    assert len(set(tags.cover_tags(own, 200))) == 200


def test_tags_that_differ_by_case_and_signs_are_one_and_rare_ones_are_none():
    rows = [["Poetry", "poetry ", "Odd"], ["POETRY", "code_review"], ["code-review", "!"], []]
    assert tags.frequent_tags(rows, 2) == [{"poetry"}, {"poetry", "code review"}, {"code review"},
                                           set()]
    assert tags.frequent_tags(rows, 1)[0] == {"poetry", "odd"}
    assert tags.frequent_tags(rows, 3) == [set()] * 4


def test_rows_are_chosen_by_frequent_tags_and_the_others_say_why_not(tmp_path):
    rows = [asked("q", "1", tags=["A", "b"]), asked("q", "2", tags=["a"]), asked("q", "3"),
            asked("q", "4", tags=["B", "rare"]), asked("q", "5", tags=["only here"])]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    kept, out = run_lab("tags", [path], "--n", 1, "--least", 2)
    assert kept == rows[:1] and "dropped 2: no tags" in out and "dropped 2: not chosen" in out
    assert "6 tags, 2 when merged and in 2 rows or more" in out
    kept, out = run_lab("tags", [path], "--n", 9)
    assert len(kept) == 4 and "--n 9 is more than there is: only 4 rows" in out


def test_the_demo_says_what_comes_next(tmp_path, capsys):
    source = jsonl(tmp_path / "a.jsonl", asked("q", "“铁”的元素符号是“Fe”。"))
    tags.make_demo(tmp_path, Path(source))
    assert f"python -m labs.tags {tmp_path}/rows.jsonl" in capsys.readouterr().out


def test_tags_must_be_a_list_of_texts_and_some_must_be_left(tmp_path):
    rows = [asked("q", "a", tags=["x"]), asked("q", "b", tags="x")]
    path, output = jsonl(tmp_path / "a.jsonl", *rows), tmp_path / "o.jsonl"
    for flags, said in ((["--n", 1], "line 2: expected a list of texts as tags"),
                        (["--n", 1, "--skip_bad_rows", "--least", 2], "no row has a tag"),
                        (["--n", 0], "--n and --least must be above 0")):
        status, _, err = command("labs/tags.py", path, "--output", output, *flags)
        assert status == 2 and said in err and not output.exists()
    kept, out = run_lab("tags", [path], "--n", 1, "--skip_bad_rows")
    assert kept == rows[:1] and "dropped 1: bad row" in out
