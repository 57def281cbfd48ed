"""Bad input of the labs that write rows."""

from pathlib import Path

import pytest
from conftest import asked, command, jsonl, run_lab

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
    flags = [*flags, "--skip_bad_rows"]
    kept, out = run_lab(flags[0], [path], *flags[1:], output=tmp_path / "o.jsonl")
    assert kept == [{"text": "a"}] and "dropped 2: bad row" in out
    assert f"dropped {path} line 1" in out and f"dropped {path} line 3" in out


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
