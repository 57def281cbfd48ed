"""Figures: the curves of a run, and the picture of a conversation."""

import pytest

from labs import draw


def test_exam_curve_has_its_interval_and_floor():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    draw.draw_interval(axes, [{"step": step, "exam_accuracy": 0.5, "exam_interval": [0.4, 0.6],
                               "exam_floor": 0.3} for step in (0, 9)])
    (band,), (floor,) = axes.collections, axes.lines
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [0.4, 0.6]
    assert floor.get_ydata() == [0.3, 0.3]


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
