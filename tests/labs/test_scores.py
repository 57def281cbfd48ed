"""labs/scores.py: the table of exams, their comparison, the figure."""

import re
from pathlib import Path

import pytest
from conftest import command
from exam_files import exam, make_model, write_cmmlu

from labs import scores


@pytest.mark.parametrize("lost,won,p", [
    (0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 6, 2 / 64),
    (10, 20, 0.100348), (20, 10, 0.100348), (12, 12, 1.0), (60, 30, 0.002237), (15, 15, 1.0),
    (15, 16, 1.0)])
def test_mcnemar_by_known_values(lost, won, p):
    """Exact below 25; 10 and 20: chi-square (10 - 1)^2 / 30 = 2.7; 60, 30: 29^2 / 90."""
    assert scores.mcnemar(lost, won) == pytest.approx(p, abs=1e-6)


def test_table_of_four_checkpoints_fits_a_terminal(capsys):
    subjects = {"chemical_elements": {"questions": 320, "accuracy": 1.0}}
    group = {"questions": 320, "macro": 1.0, "micro": 1.0}
    results = []
    for k in range(4):
        results.append({
            **group, "model": f"out/sft-123{k}", "subjects": subjects, "interval": [1.0, 1.0],
            "categories": {"Social Science": group}, "floor": {"letter": "D", "micro": 0.26},
            "letters": dict.fromkeys("ABCD", 0.25), "invalid": 0.0, "seconds": 1234.5,
            "shortened": 0, "too_long": 0, "thinking": False, "characters_lost": 0.0})
    pair = {"first": "out-sft-1234", "second": "out-sft-1235", "lost": 0, "won": 0, "p": 1.0}
    scores.print_scores(results, [pair])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "p = 1, no difference" in out and "noise" not in out
    assert "seconds" not in out[out.index("accuracy in %") : out.index("answered")]


def test_curve_is_drawn_only_for_names_that_end_in_steps(monkeypatch, tmp_path):
    """It has the interval as a band and the floor as a line."""
    figure = pytest.importorskip("matplotlib.figure")
    shown = []
    monkeypatch.setattr(figure.Figure, "savefig",
                        lambda self, path, format: [shown.append(self), Path(path).touch()])
    subjects = {"law": {"accuracy": 0.5}}
    for names in (["run/step-100", "run/step-20"], ["out/run1", "out/run2"],
                  ["a/step-100", "b/step-20"], ["run/step-100"]):
        scores.draw_exam(tmp_path / "x.png", [
            {"model": n, "micro": 0.5, "interval": [0.4, 0.6], "subjects": subjects,
             "floor": {"micro": 0.26}} for n in names])
    assert [f.axes[0].get_xlabel() == "step" for f in shown] == [True, False, False, False]
    accuracy, floor = shown[0].axes[0].lines
    assert list(accuracy.get_xdata()) == [20, 100] and set(floor.get_ydata()) == {26}
    band = shown[0].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == pytest.approx((40, 60))


def test_exams_that_ran_one_by_one_compare_as_in_one_run(tmp_path):
    write_cmmlu(tmp_path / "exam")
    folders = [make_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    flags = ["--data", tmp_path / "exam", "--shots", 0]
    _, _, together = exam(tmp_path / "both", "--model", *folders, *flags)
    for folder in folders:
        exam(tmp_path / "out" / folder.name, "--model", folder, *flags)
    for where in ([tmp_path / "both"], [tmp_path / "out/one", tmp_path / "out/two"]):
        status, out, err = command("labs/scores.py", *where, "--output", tmp_path / "again")
        assert (status, err) == (0, "")
        table = together[together.index("n: questions") :].splitlines()[:-1]
        # Seconds, the last column of the second table, differ from run to run.
        again, table = ([re.sub(r"%  +[\d.]+$", "%", line) for line in lines]
                        for lines in (out.splitlines(), table))
        assert again == table
    for name in ("comparison.json", "accuracy.png"):
        if name == "comparison.json" or (tmp_path / "both" / name).exists():
            assert (tmp_path / "again" / name).exists()
    assert command("labs/scores.py", tmp_path / "exam")[0] == 2
