"""labs/evolve.py: requests for new tasks, and what is kept of the answers."""

import json

from conftest import asked, assistant, command, jsonl, read, run_lab, user

from labs import evolve

SEEDS = [asked("Name three rivers in France", "Seine, Loire, Rhone"),
         asked("What is the capital of Peru?", "Lima")]


def said(row, answer, request="ask", finish="stop"):
    """A line of eval.py generate."""
    return {"row": row, "sample": 0, "finish": finish,
            "messages": [user(request), assistant(answer)], "reference": None}


def ask(tmp_path, way, *flags):
    rows, _ = run_lab("evolve", [jsonl(tmp_path / "seeds.jsonl", *SEEDS)], "--way", way, *flags,
                      "--language", "en", output=tmp_path / "asks.jsonl")
    return [row["messages"][0]["content"] for row in rows]


def keep(tmp_path, way, lines, *flags):
    answers = jsonl(tmp_path / "said.jsonl", *lines)
    rows, out = run_lab("evolve", [jsonl(tmp_path / "seeds.jsonl", *SEEDS)], "--way", way, *flags,
                        "--language", "en", "--answers", answers, output=tmp_path / "new.jsonl")
    return rows, out


def test_requests_show_the_tasks_and_are_a_function_of_the_seed(tmp_path):
    new = ask(tmp_path, "new", "--n", 5)
    assert len(new) == 5 and all(f"{i}. " in new[0] for i in (1, 2))
    assert all(row["messages"][0]["content"] in text for text in new for row in SEEDS)
    harder = ask(tmp_path, "deepen")
    assert harder == ask(tmp_path, "deepen") and len(harder) == 2
    assert harder[1].endswith("What is the capital of Peru?")
    assert any(ask(tmp_path, "deepen", "--seed", k) != harder for k in range(1, 5))


def test_numbered_lines_are_drafts_of_their_own():
    assert evolve.drafts_of("1. Draw a cat\n 2) Sing a song \n") == ["Draw a cat", "Sing a song"]
    assert evolve.drafts_of("１．写诗") == ["写诗"] and evolve.drafts_of(" Write. ") == ["Write."]


def test_every_draft_has_its_reason(tmp_path):
    request = ask(tmp_path, "new", "--n", 1)[0]
    lines = [said(0, "1. Tell me how bees make honey\n2. Tell me how bees make their honey"),
             said(1, "What is the capital city of Peru?"), said(2, "Sing!"),
             said(3, "I am sorry, as an AI I have no tasks to give"),
             said(4, "Explain why the sky is", finish="length"),
             said(5, request.splitlines()[-1])]  # what it was asked to do
    rows, out = keep(tmp_path, "new", lines)
    assert [row["messages"][0]["content"] for row in rows] == ["Tell me how bees make honey"]
    for reason in ("2: ROUGE-L of 0.7 or more", "1: under 3 or over 150", "1: refusal",
                   "1: did not end", "1: copies words of the request"):
        assert f"dropped {reason}" in out
    assert len(keep(tmp_path, "new", lines, "--max_rouge", 1)[0]) == 3


def test_what_is_kept_is_unlike_all_that_was_kept_before():
    c = evolve.Config([], language="en")
    drafts = ["count the stars of the night", "count the stars of that night", "bake a bread"]
    found = list(evolve.keep_drafts(c, [], [(text, True, 0) for text in drafts]))
    assert [bool(why) for _, why in found] == [False, True, False]


def test_step_back_joins_the_principle_with_the_question_and_keeps_the_answer(tmp_path):
    assert "Peru" in ask(tmp_path, "step_back")[1]
    rows, out = keep(tmp_path, "step_back", [said(1, "Lima is a capital."), said(0, "Sorry, no.")])
    (row,) = rows
    assert row["messages"] == [user("Known: Lima is a capital.\nAnswer from that: What is the "
                                    "capital of Peru?"), assistant("Lima")]
    assert "dropped 1: refusal" in out
    for index in (7, 2, -1, "1", None):
        far = jsonl(tmp_path / "far.jsonl", said(index, "x"))
        status, _, err = command("labs/evolve.py", tmp_path / "seeds.jsonl", "--way", "step_back",
                                 "--answers", far, "--output", tmp_path / "o.jsonl")
        assert status == 2 and f"answers request {index} of 2" in err and err.count("\n") == 1


def test_broaden_asks_for_a_rarer_question_of_the_same_field(tmp_path):
    found = ask(tmp_path, "broaden")
    assert len(found) == 2 and all("rarer question from the same field" in text for text in found)
    assert found[1].endswith("What is the capital of Peru?")
    copied = "Think of a rarer question from the same field, about as hard."
    rows, out = keep(tmp_path, "broaden", [said(0, "Which lake in Bolivia is highest?"),
                                           said(1, copied)])
    assert [row["messages"][0]["content"] for row in rows] == ["Which lake in Bolivia is highest?"]
    assert "dropped 1: copies words of the request" in out


def test_answers_are_checked_for_refusals_that_are_short(tmp_path):
    lines = [said(0, "Seine, Loire."), said(1, "抱歉，我无法回答。"), said(2, "a", finish="length"),
             said(3, "Sorry is a word " * 30)]
    rows, out = run_lab("evolve", [jsonl(tmp_path / "a.jsonl", *lines)], "--way", "check")
    assert [row["row"] for row in rows] == [0, 3]
    assert "dropped 1: refusal" in out and "dropped 1: did not end" in out


def test_bad_input_ends_with_one_line(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *SEEDS)
    for flags, wanted in ((["--max_rouge", 2], "--max_rouge is above 0"), (["--n", 0], "--n"),
                          (["--answers", path], "expected a line of eval.py generate"),
                          (["--way", "check", "--answers", path], "--way check"),
                          (["--output", path], "is the input")):
        status, _, err = command("labs/evolve.py", path, "--output", tmp_path / "o.jsonl", *flags)
        assert status == 2 and wanted in err and err.count("\n") == 1
    assert read(path) == json.loads(json.dumps(SEEDS)) and not (tmp_path / "o.jsonl").exists()
