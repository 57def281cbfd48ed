"""labs/identity.py: names filled in."""

from conftest import asked, assistant, command, jsonl, run_lab, user


def test_placeholders_are_filled_in_every_string_once_and_half_ones_refused(tmp_path):
    row = {"prompt": [user("{{name}}?")], "completion": [assistant("{{name}}, {{author}}")],
           "note": {"deep": ["{{author}}"], "n": 3}}
    path = jsonl(tmp_path / "a.jsonl", row)
    kept, _ = run_lab("identity", [path], "--name", "{{author}}", "--author", "A")
    assert kept == [{"prompt": [user("{{author}}?")], "completion": [assistant("{{author}}, A")],
                     "note": {"deep": ["A"], "n": 3}}]
    path = jsonl(tmp_path / "b.jsonl", asked("q", "I am {{name"))
    status, _, err = command("labs/identity.py", path, "--name", "n", "--author", "a",
                             "--output", tmp_path / "o.jsonl")
    assert status == 2 and "placeholder {{name is left over" in err


def test_identity_fills_names_in_and_refuses_what_is_left(tmp_path):
    rows = [asked("who?", "I am {{name}} by {{author}}; {x} {{name}}"), asked("你是？", "{{name}}")]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    kept, _ = run_lab("identity", [path], "--name", '小"调\\', "--author", "甲")
    assert kept == [asked("who?", 'I am 小"调\\ by 甲; {x} 小"调\\'), asked("你是？", '小"调\\')]
    path = jsonl(tmp_path / "b.jsonl", rows[0], asked("q", "by {{ company }}"))
    out = tmp_path / "o.jsonl"
    status, _, err = command("labs/identity.py", path, "--name", "n", "--author", "a",
                             "--output", out)
    assert status == 2 and "line 2: the placeholder {{ company }} is left over" in err
    assert not out.exists()
    status, _, err = command("labs/identity.py", path, "--name", "n", "--output", out)
    assert status == 2 and "--author" in err
