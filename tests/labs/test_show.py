"""data.py show: what a mix draws."""

import numpy as np
from conftest import asked, command, jsonl

import data


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
