"""Figures: the curves of a run, and the picture of a conversation."""

from types import SimpleNamespace

import pytest
from conftest import REPO, command

from labs import draw


def test_every_exam_has_its_curve_its_interval_and_its_floor(tmp_path, monkeypatch):
    figure, drawn = pytest.importorskip("matplotlib.figure").Figure, []
    exams = {"ceval": {"accuracy": 0.5, "interval": [0.4, 0.6], "floor": 0.3},
             "cmmlu": {"accuracy": 0.8, "interval": [0.7, 0.9], "floor": 0.25}}
    records = [{"step": step, "loss": 1.0, "exams": exams, "learning_rate": 1.0} for step in (1, 9)]
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0]))
    monkeypatch.setattr(draw.modeling, "write_atomic", lambda path, write: write(path))
    draw.draw_run(tmp_path, records, SimpleNamespace(name="loss.png", curves={}, unit=""))
    (axes,) = drawn
    assert [line.get_ydata().tolist() if line.get_label() in exams else line.get_ydata()
            for line in axes.lines] == [[0.5, 0.5], [0.8, 0.8], [0.3, 0.3], [0.25, 0.25]]
    bands = [band.get_paths()[0].get_extents().intervaly.tolist() for band in axes.collections]
    assert bands == [[0.4, 0.6], [0.7, 0.9]]


def test_help_and_a_wrong_word_draw_nothing():
    picture = REPO / "labs/figures/conversation.svg"
    before = picture.stat().st_mtime_ns
    status, out, _ = command("labs/draw.py", "--help")
    assert status == 0 and "python -m labs.draw" in out
    assert command("labs/draw.py", "loss")[0] == 2 and picture.stat().st_mtime_ns == before


def test_figure_without_points_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"step": 0, "val_loss": 2.0}, {"step": 1, "learning_rate": 1.0, "reward": None}]
    draw.draw_figure(tmp_path / "a.png", records, {"reward": "reward"}, "reward")
    draw.draw_figure(tmp_path / "b.png", records, {"val_loss": "validation"}, "nats")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_green_tokens_of_the_picture_are_the_answers_and_their_ends(tmp_path):
    tokens = draw.conversation_tokens()
    assert "".join(text for text, _ in tokens).count("<|im_end|>") == 5
    green = "".join(text for text, supervised in tokens if supervised)
    answers = [m["content"] for m in draw.CONVERSATION if m["role"] == "assistant"]
    assert green == "".join(f"{text}<|im_end|>" for text in answers)

    draw.draw_conversation(tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert picture.count("#b7e4c7") == sum(supervised for _, supervised in tokens)
