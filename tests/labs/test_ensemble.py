"""Ensembles: the three rules by hand and by torch, the comparison, the files they read."""

import json

import numpy as np
import pytest
import torch
from conftest import command, jsonl

from labs import ensemble

# Three checkpoints, one question. The first two lean to B, the third is sure of A.
LEAN, SURE = (0.2, 0.6, 0.1, 0.1), (0.97, 0.01, 0.01, 0.01)


def line(probabilities, number=0, answer="A", shift=0.0):
    """A line of predictions.jsonl; a shift is mass that went to no letter."""
    logprobs = None
    if probabilities:
        logprobs = dict(zip("ABCD", (np.log(probabilities) + shift).tolist(), strict=True))
    best = max(logprobs, key=logprobs.get) if logprobs else None
    return {"subject": "s", "id": str(number), "answer": answer, "prediction": best,
            "logprobs": logprobs, "shots": 0}


def answers_of(*probabilities, rule):
    together = ensemble.answer_together([[line(p)] for p in probabilities], rule)
    return together[0]["prediction"]


@pytest.mark.parametrize("rule,letter", [("mean", "A"), ("max", "A"), ("vote", "B")])
def test_two_who_lean_outvote_one_who_is_sure_but_not_in_mean_or_maximum(rule, letter):
    assert answers_of(LEAN, LEAN, SURE, rule=rule) == letter


def test_surest_one_speaks_where_the_mean_says_otherwise():
    lean = (0.0005, 0.9, 0.05, 0.0495)
    assert answers_of(lean, lean, SURE, rule="mean") == "B"
    assert answers_of(lean, lean, SURE, rule="max") == "A"


def test_tie_of_votes_goes_to_the_mean():
    assert answers_of(LEAN, SURE, rule="vote") == "A"
    assert answers_of((0.49, 0.51, 1e-9, 1e-9), (0.4, 0.2, 0.2, 0.2), rule="vote") == "A"


def test_checkpoint_without_scores_has_no_say():
    for rule in ensemble.RULES:
        assert answers_of(None, LEAN, rule=rule) == "B"
        assert answers_of(SURE, None, None, rule=rule) == "A"


def test_question_that_nobody_could_answer_stays_without_an_answer():
    assert answers_of(None, None, rule="mean") is None


def test_mass_that_went_to_no_letter_does_not_count():
    """A checkpoint in whose distribution letters are rare is as sure among them as any other."""
    answers = [[line(LEAN)], [line(SURE, shift=-20.0)]]
    assert ensemble.answer_together(answers, "max")[0]["prediction"] == "A"


def test_rules_are_those_of_torch_on_random_scores():
    logits = torch.randn(5, 200, 4, generator=torch.Generator().manual_seed(0))
    s = logits.log_softmax(-1)
    raw = [[{"logprobs": dict(zip("ABCD", row, strict=True))} for row in rows]
           for rows in logits.tolist()]
    found = np.stack([ensemble.normalize(rows) for rows in raw])
    assert np.allclose(found, s.numpy(), atol=1e-6)
    assert (ensemble.combine(found, "mean").argmax(1) == s.sum(0).argmax(1).numpy()).all()
    assert (ensemble.combine(found, "max").argmax(1) == s.exp().amax(0).argmax(1).numpy()).all()

    # torch.mode takes the least of several winners: only clear votes are compared.
    voices = s.argmax(-1)  # [5, 200]
    counts = torch.nn.functional.one_hot(voices, 4).sum(0).sort(descending=True).values
    clear = (counts[:, 0] > counts[:, 1]).numpy()
    winner = ensemble.combine(found, "vote").argmax(1)
    assert clear.sum() > 100 and (winner == voices.mode(0).values.numpy())[clear].all()


# ------------------------------------------------------------------------------------- the command


def write(folder, lines):
    folder.mkdir(parents=True)
    jsonl(folder / "predictions.jsonl", *lines)
    return folder


def run(*argv, status=0):
    code, out, err = command("labs/ensemble.py", *argv)
    assert code == status, out + err
    return out if status == 0 else err


def test_ensemble_is_compared_with_the_best_single_checkpoint(tmp_path):
    """Of ten questions one has 8 right and the other 7, and together they have all."""
    right, wrong, unsure = SURE, LEAN, (0.3, 0.4, 0.2, 0.1)
    answers = {"best": [right] * 8 + [unsure] * 2,
               "other": [right] * 5 + [unsure] * 3 + [right] * 2}
    answers["best"][0] = wrong
    answers["best"][8] = right
    for name, rows in answers.items():
        write(tmp_path / "exam" / name, [line(p, i) for i, p in enumerate(rows)])
    table = {row.split()[0]: row.split()[1:] for row in run(tmp_path / "exam").splitlines()[1:]}
    assert table["best"] == ["80.0%", "0", "0", "best", "single", "one"]
    assert table["other"][:3] == ["70.0%", "3", "2"]
    assert table["mean"] == ["100.0%", "0", "2", "0.5"]  # 2 / 2^2: won twice by chance


def test_smaller_ensembles_are_all_of_their_size(tmp_path):
    for k in range(4):
        write(tmp_path / "exam" / str(k), [line(SURE if i == k else LEAN, i) for i in range(4)])
    out = run(tmp_path / "exam", "--size", 2)
    assert "every 2 of 4" in out

    # Of any two each has one question right, and in the mean the sure one wins both.
    assert out.splitlines()[-3].split() == ["mean", "25.0", "0.0", "25.0", "25.0"]


SCORES = {"three": dict.fromkeys("ABC", -1.0), "five": dict.fromkeys("ABCDE", -1.0),
          "text": "-1", "list": [-1.0] * 4, "strings": dict.fromkeys("ABCD", "-1"),
          "nan": {**dict.fromkeys("ABC", -1.0), "D": np.nan},
          "nothing likely": dict.fromkeys("ABCD", -np.inf)}


@pytest.mark.parametrize("case,words", [
    ("nothing", "holds no predictions.jsonl"), ("alone", "needs two checkpoints"),
    ("words", "has no log-probabilities"), ("unlabelled", "no right answers"),
    ("others", "different exams"), ("broken", "line 2"), ("size", "--size must be at least 2"),
    *((case, "four log-probabilities") for case in SCORES)])
def test_what_cannot_be_combined_is_refused_with_one_line(tmp_path, case, words):
    good = write(tmp_path / "good", [line(SURE), line(LEAN, 1)])
    rows = {"words": [line(None), line(None, 1)], "others": [line(SURE), line(LEAN, 2)],
            "unlabelled": [line(SURE, answer=None), line(LEAN, 1, answer=None)]}
    other = write(tmp_path / "other", rows.get(case, [line(SURE), line(LEAN, 1)]))
    if case in SCORES:
        jsonl(other / "predictions.jsonl", {**line(SURE), "logprobs": SCORES[case]})
    if case == "broken":
        text = json.dumps(line(SURE)) + '\n{"subject": \n'
        (other / "predictions.jsonl").write_text(text, encoding="utf-8")
    argv = {"nothing": [tmp_path / "none"], "alone": [good], "size": [good, other, "--size", 1]}
    error = run(*argv.get(case, [good, other]), status=2)
    assert words in error and error.count("\n") == 1
