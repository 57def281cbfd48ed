"""Bad input of the labs that write rows: one line, status 2, and nothing written."""


import pytest
from conftest import asked, command, jsonl, run_lab

# A command line (GOOD, BROKEN are files of FOLDER, O is a new one there): what is said.
BAD = {
    "filter GOOD": "--output must be given",
    "exam_rows GOOD --output FOLDER": "--output must be given",
    "filter GOOD --output O.txt": "FILE.jsonl, not",
    "filter GOOD --output GOOD/o.jsonl": "cannot be written",
    "filter GOOD NONE --output O": "does not exist",
    "filter BROKEN --output O": "broken.jsonl line 2: not JSON",
    "select BROKEN --output O --n 1": "line 2: not JSON",
    "filter GOOD --output O --min_tokens 3": "need --model",
    "filter GOOD --output O --min_chars 9 --max_chars 3": "above --max_chars: no row",
    "filter GOOD --output O --min_chars -5": "--min_chars is negative",
    "filter GOOD --output O --max_length 0": "--max_length must be at least 2",
    "filter GOOD --output O --near -1": "--near",
    "filter GOOD --output O --max_repetition nan": "--max_repetition",
    "select GOOD --output O": "give --n above 0",
    "select GOOD --output O --n 1 --share 0.1": "give --n above 0",
    "select GOOD --output O --n -2 --share 0.5": "give --n above 0",
    "select GOOD --output O --n 1 --share nan": "give --n above 0",
    "select GOOD --output O --n 1 --clusters 0": "--clusters",
    "select GOOD --output O --n 1 --seed -1": "--seed",
    "select GOOD --output O --n 1 --method kcenter": "--model",
    "select GOOD --output O --n 1 --method ifd --model NONE": "there is no folder",
    "select GOOD --output O --per kind --share 0.1": "no row to choose from: {'no kind': 1}",
    "select GOOD --output O --n 1 --rest O": "--rest and --output name the same file",
    "select GOOD --output O --n 1 --rest GOOD": "--rest FOLDER/good.jsonl is the input",
    "filter GOOD --output GOOD": "is the input FOLDER/good.jsonl",
    "select GOOD --n 1 --output FOLDER/./good.jsonl": "is the input FOLDER/good.jsonl",
    "exam_rows BROKEN GOOD --output GOOD": "is the input FOLDER/good.jsonl",
    "identity GOOD --name n --author a --output GOOD": "is the input FOLDER/good.jsonl",
    "coh GOOD --output GOOD": "is the input FOLDER/good.jsonl",
    "overlap GOOD --exam FOLDER --output GOOD": "is the input FOLDER/good.jsonl",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_ends_with_one_line_and_writes_nothing(line, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "x_val.csv").write_text("question,A,B,C,D,answer\n", encoding="utf-8")
    jsonl(tmp_path / "good.jsonl", asked("q", "a"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    name, *arguments = line.split()
    for word, file in (("GOOD", "/good.jsonl"), ("BROKEN", "/broken.jsonl"), ("FOLDER", ""),
                       ("NONE", "/none.jsonl"), ("O.txt", "/o.txt")):
        arguments = [argument.replace(word, f"{tmp_path}{file}") for argument in arguments]
    arguments = [f"{tmp_path}/o.jsonl" if argument == "O" else argument for argument in arguments]
    status, _, err = command(f"labs/{name}.py", *arguments)
    assert status == 2 and err.count("\n") == 1
    assert BAD[line].replace("FOLDER", str(tmp_path)) in err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("flags", ["filter --duplicates near", "select --n 1"])
def test_skipped_rows_are_counted_and_listed(flags, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": \n{"text": "a"}\n{"nothing": 1}\n', encoding="utf-8")
    name, *flags = flags.split()
    kept, out = run_lab(name, [path], *flags, "--skip_bad_rows", output=tmp_path / "o.jsonl")
    assert kept == [{"text": "a"}] and "dropped 2: bad row" in out
    assert f"dropped {path} line 1" in out and f"dropped {path} line 3" in out


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_read(tmp_path, monkeypatch):
    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    line = ["labs/filter.py", tmp_path / "none.jsonl", "--output", tmp_path / "new/o.jsonl"]
    status, _, err = command(*line)
    assert status == 2 and "o.jsonl cannot be written" in err and not (tmp_path / "new").exists()
