"""Figures: the curves of a training run, and the two pictures of the README.

    python train_sft.py && python -m labs.draw

A run draws its curves by `draw_run`, with matplotlib, at every validation and save. The README's
first picture is what `python data.py show` prints: every box is a token, the green ones are
supervised. It is an SVG written by hand, so that it stays small and sharp. The second is drawn from
the demo's metrics.jsonl.

What one should see: the assistant's words and the token that ends its turn are green, in both
turns; what the user and the template say is not. The validation loss follows the training loss.

Exercise: draw the same conversation with `train_on="last"`. Which boxes lose their colour, and do
the ids change?
"""

import html
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import data
import model as modeling


@dataclass
class Config:
    """Draw the two pictures of the README into labs/figures; there are no flags."""


# ==== read: the curves of a run ===================================================================


def draw_run(folder: Path, records: list[dict], figure) -> None:
    """Draw the curves of `figure` (train_sft.Figure), and those of exams, where there are points.

    Raises ImportError without matplotlib.
    """
    draw_figure(folder / figure.name, records, figure.curves, figure.unit)

    # Every exam is a curve of its own.
    curves, scores = {}, []
    for r in records:
        scores.append(dict(r))
        for name, exam in r.get("exams", {}).items():
            curves[f"exam {name}"] = name
            scores[-1][f"exam {name}"] = exam["accuracy"]
    draw_figure(folder / "exam.png", scores, curves, "share right")


def draw_figure(path: Path, records: list[dict], curves: dict[str, str], unit: str) -> None:
    """Metrics over steps, below them the learning rate; `curves` says metric: label."""
    from matplotlib.figure import Figure

    # A metric is measured at some steps only, and may be None: no side of KTO's in a short step.
    points = {key: [] for key in curves}
    for r in records:
        for key in curves:
            if r.get(key) is not None:
                points[key].append((r["step"], r[key]))
    if not any(points.values()):
        return

    # A few points are shown as points, many as a line.
    canvas = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for key, found in points.items():
        if found:
            marker = "." if len(found) < 50 else ""
            top.plot(*zip(*found, strict=True), label=curves[key], marker=marker)
    if next(iter(curves)).startswith("exam "):
        draw_intervals(top, records, curves.values())

    # The second half of a loss that falls by more than ten is seen on a logarithmic axis only.
    values = [value for _, value in chain(*points.values())]
    if min(values) > 0 and max(values) > 20 * min(values):
        top.set_yscale("log")
    top.set_ylabel(unit)
    top.legend()

    # Step 0 is before training and has no learning rate.
    rates = [(r["step"], r["learning_rate"]) for r in records if r["step"] > 0]
    if rates:
        bottom.plot(*zip(*rates, strict=True), "tab:gray")
    bottom.set(ylabel="learning rate", xlabel="step")
    modeling.write_atomic(path, lambda temporary: canvas.savefig(temporary, format="png"))


def draw_intervals(axes, records: list[dict], exams: Iterable[str]) -> None:
    """A score means something beside its interval, and beside the best constant answer."""
    for k, name in enumerate(exams):
        band, floor = [], 0.0
        for r in records:
            if exam := r.get("exams", {}).get(name):
                band.append((r["step"], *exam["interval"]))
                floor = exam["floor"]  # the same at every step
        axes.fill_between(*zip(*band, strict=True), alpha=0.2, color=f"C{k}",
                          label=f"{name}: 95% interval")
        axes.axhline(floor, color=f"C{k}", linestyle="--", label=f"{name}: floor")


# ==== read: a conversation as tokens ==============================================================

FIGURES = Path(__file__).parent / "figures"
CONVERSATION = [
    {"role": "system", "content": "You are a friendly teacher."},
    {"role": "user", "content": "What does fine-tuning teach a model?"},
    {"role": "assistant", "content": "To write what the assistant writes."},
    {"role": "user", "content": "Also to stop?"},
    {"role": "assistant", "content": "Yes: the token that ends a turn is supervised too."},
]
WIDTH, LINE, CHARACTER = 760, 26, 8.4  # pixels: of the picture, of a line, of a letter


def conversation_tokens() -> list[tuple[str, bool]]:
    """(text, supervised) of every token of CONVERSATION, by a tokenizer made of our own README."""
    from labs import world  # here, because a training run that draws has no use for it

    # The picture's own words come often enough to become whole tokens.
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    texts = readme.splitlines()
    for message in CONVERSATION:
        texts += [message["role"] + "\n", message["content"] + "\n"] * 50
    with tempfile.TemporaryDirectory() as folder:
        world.make_tokenizer(Path(folder), texts, 1500)
        tokenizer = data.ChatTokenizer(folder)

    # A span says from which token to which the loss counts: those are the green boxes.
    row = data.Row("picture", CONVERSATION)
    (example,) = data.to_examples([row], 0, Counter(), tokenizer)
    green = set()
    for first, end, _ in example.spans:
        green.update(range(first, end))
    return [(tokenizer.decode([token]), i in green) for i, token in enumerate(example.ids.tolist())]


def draw_conversation(path: Path) -> None:
    """Boxes from left to right, a new line after every line end and where a line is full."""
    boxes, x, y = [], 10.0, 12
    for text, supervised in conversation_tokens():
        # Characters that nobody sees are shown by signs for them.
        shown = text.replace("\n", "\u21b5").replace(" ", "\u2423")
        width = CHARACTER * len(shown) + 6
        if x + width > WIDTH - 10:
            x, y = 10.0, y + LINE
        fill = "#b7e4c7" if supervised else "#eeeeee"
        boxes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 5}" rx="4" '
                     f'fill="{fill}"/>'
                     f'<text x="{x + 3:.1f}" y="{y + 15}">{html.escape(shown)}</text>')

        # A line of the picture ends where one of the conversation does.
        x += width + 3
        if text.endswith("\n"):
            x, y = 10.0, y + LINE

    height = y + LINE + 8
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="monospace" font-size="14">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(boxes) + "\n</svg>\n", encoding="utf-8")


def main(c: Config) -> None:
    """Write labs/figures/conversation.svg, and loss.png if the demo has run."""
    FIGURES.mkdir(exist_ok=True)
    draw_conversation(FIGURES / "conversation.svg")
    metrics = Path("out/sft/metrics.jsonl")
    if metrics.exists():
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        curves = {"loss": "training", "val_loss": "validation"}
        draw_figure(FIGURES / "loss.png", records, curves, "nats per supervised token")
    print(f"drawn in {FIGURES}")


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
