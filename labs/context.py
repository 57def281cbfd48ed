"""Long context in stages: stretch RoPE a little, train a little, and again.

Idea. A model that has seen 128 positions has never met the angles of the 129th: its loss rises from
there on. RoPE turns pair i by m theta^(-2i/Dh) at position m. NTK-aware scaling raises theta,

    theta <- theta * s^(Dh / (Dh - 2))      s: how many times as many positions

so that the slowest pair turns s times slower and the new positions lie within angles that are
known, while the fastest pair still tells neighbours apart. What remains a short training on long
texts repairs. TeleChat (arXiv:2401.03804) goes on for 3,000 steps at 8k, then for 1,000 at 16k:
--recipe telechat-8k and telechat-16k. Here the same at 1/64 of the size:

    python -m labs.context                     # base at 128, --context 256, --context 512; figure

A text is a list of facts of the demo's world, and the same list again. In the second half each word
is known to whoever can look back half a text: what a model does not reach, it must guess.

What you should see (nats per token by position, 40 texts held out, one seed). The base fails from
its 129th position on. Stretched to 512 and not trained, it still knows something as far as 256. A
stage learns the positions that it was shown, 256 and then 512:

    up to position    base  only stretched  stage1  stage2
    64                0.53            0.54    0.53    0.53
    128               2.06            1.14    0.59    0.57
    192               3.53            1.44    0.61    0.52
    256               3.41            1.66    0.71    0.50
    320               3.36            2.94    1.26    0.45
    384               3.33            3.22    1.01    0.44
    512               3.29            3.29    1.25    0.45

Exercise. Dh = 16, theta 10,000, s = 4: the new theta? How far does the slowest pair turn within the
new context, as a share of a turn within the old one before?
    Solution: 10,000 * 4^(16/14) = 48,760; f = theta^(-14/16), so s^(-1) as fast over s times as
    many positions: exactly as far.
"""

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import eval as evaluation
import model as modeling
import train_sft
from labs import world
from model import check, check_output


@dataclass
class Config:
    """Train the demo's model on short texts, stretch it twice, show the loss by position."""

    output_dir: str = "out/context"  # files, checkpoints base, stage1, stage2, and positions.png
    positions: int = 128  # of the base; the stages have two and four times as many
    steps: int = 600  # of the base; every stage has a quarter of them
    bucket: int = 64  # positions that one number is the mean of
    texts: int = 40  # held out
    seed: int = 0  # of texts, weights and order


TEXTS = 2000  # to train a stage on, at most

# ==== read: the loss by position ==================================================================


def loss_by_position(model, examples: list[data.Example], bucket: int) -> list[float]:
    """Mean nats per token of positions 0 to bucket - 1, of the next `bucket`, and so on."""
    longest = max(len(e.ids) for e in examples)
    sums = torch.zeros(2, -(-longest // bucket))  # of losses, of tokens

    # A text may be shorter than the others: every bucket counts its own tokens.
    for i, logp in evaluation.example_logprobs(model, examples, 4096):
        first = examples[i].spans[0][0]
        place = torch.arange(first, first + len(logp)) // bucket  # [N]
        sums[0].index_add_(0, place, -logp.float().cpu())
        sums[1].index_add_(0, place, torch.ones(len(logp)))
    return (sums[0] / sums[1]).tolist()


def all_facts(tokenizer: data.ChatTokenizer) -> list[tuple[str, int]]:
    """(fact, its tokens) of the demo's world."""
    facts = []
    for handle in world.SUBJECTS:
        for fact in world.facts_of(handle):
            text = world.FACT.format(**fact)
            facts.append((text, len(tokenizer.tokenizer.encode(text).ids)))
    return facts


def list_twice(facts: list[tuple[str, int]], length: int, rng: random.Random) -> str:
    """Facts in a random order, then the same again: as many as fit into `length` tokens."""
    text, size = "", 1  # the end of the text
    for fact, tokens in rng.sample(facts, len(facts)):
        size += 2 * tokens
        if size > length:
            break
        text += fact
    return text + text


def stages(c: Config) -> list[tuple[str, int, int, list[str]]]:
    """(name, longest text in tokens, steps, flags) of the base and of the two stages."""
    out = c.output_dir
    found = [("base", c.positions, c.steps, ["--model", f"{out}/new", "--learning_rate", "2e-3"])]

    # A stage goes on from the one before it, with twice as many positions.
    for before, name, times in (("base", "stage1", 2), ("stage1", "stage2", 4)):
        flags = ["--model", f"{out}/{before}", "--learning_rate", "1e-3",
                 "--context", str(times * c.positions)]
        found.append((name, times * c.positions, c.steps // 4, flags))
    return found


def run_stage(c: Config, name: str, length: int, steps: int, flags: list[str], facts) -> None:
    """Write a stage's texts and train on them, as anybody would from the command line."""
    # A step of every stage has as many tokens.
    size = 4096 // length
    rng, path = random.Random(f"{c.seed} {name}"), f"{c.output_dir}/{name}.jsonl"
    rows = [{"text": list_twice(facts, length, rng)} for _ in range(min(TEXTS, steps * size))]
    modeling.write_lines(Path(path), (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # The command is shown and run, so that a reader can repeat a stage by hand.
    command = ["train_sft.py", "--data", path, "--output_dir", f"{c.output_dir}/{name}", *flags,
               "--steps", str(steps), "--max_length", str(length), "--batch_size", str(size),
               "--seed", str(c.seed), "--adam_beta2", "0.98", "--log_every", "200", "--overwrite"]
    print("python", *command, flush=True)
    subprocess.run([sys.executable, Path(train_sft.__file__).parent / command[0], *command[1:]],
                   check=True, stdout=subprocess.DEVNULL)


# ---- skip on a first reading: the new model, the figure, main ------------------------------------


def make_new(c: Config) -> None:
    """The demo's tokenizer and untrained model, for fewer positions."""
    folder = Path(c.output_dir)
    world.make_demo(folder / "demo", c.seed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / "demo/base" / name).read_bytes()
        modeling.write_atomic(folder / "new" / name, lambda path, x=content: path.write_bytes(x))

    # RoPE has no weights: fewer positions are one number of the config.
    world.make_demo_model(folder / "new", c.seed)
    config = modeling.read_json(folder / "new/config.json")
    modeling.write_json(folder / "new/config.json",
                        {**config, "max_position_embeddings": c.positions})


def draw(path: Path, curves: dict[str, list[float]], bucket: int) -> None:
    """The loss by position of every model; without matplotlib, nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return

    # A number stands in the middle of its bucket.
    canvas = Figure(figsize=(8, 4), layout="constrained")
    axes = canvas.subplots()
    for name, losses in curves.items():
        middles = bucket * (torch.arange(len(losses)) + 0.5)
        axes.plot(middles, losses, marker=".", label=name)
    axes.set(xlabel="position", ylabel="nats per token")
    axes.legend()
    modeling.write_atomic(path, lambda temporary: canvas.savefig(temporary, format="png"))


def main(c: Config) -> None:
    """Train the three, measure four, print and draw."""
    data.check_numbers(c)
    check(c.positions >= 32 and c.steps >= 4 and c.bucket > 0 and c.texts > 0,
          "--positions must be 32 or more, --steps 4 or more, --bucket and --texts 1 or more")
    check_output("--output_dir", c.output_dir)
    held = modeling.checkpoint_in(Path(c.output_dir))
    check(not held, f"{c.output_dir} holds a checkpoint ({held}); choose another --output_dir")

    # Every stage is a run of train_sft.py, on its own texts.
    make_new(c)
    tokenizer = data.ChatTokenizer(f"{c.output_dir}/new")
    facts = all_facts(tokenizer)
    for name, length, steps, flags in stages(c):
        run_stage(c, name, length, steps, flags, facts)

    # Texts of the longest kind, in orders that nobody was trained on.
    rng = random.Random(f"{c.seed} held out")
    plans = [tokenizer.text(list_twice(facts, 4 * c.positions, rng)) for _ in range(c.texts)]
    examples = [data.Example(*encoded) for encoded in tokenizer.encode(plans)]

    # Beside the three stands the base, stretched and not trained.
    curves = {}
    for label, name in (("base", "base"), ("only stretched", "base"), ("stage1", "stage1"),
                        ("stage2", "stage2")):
        model = modeling.load(f"{c.output_dir}/{name}")
        if label == "only stretched":
            model.config = modeling.stretch(model.config, 4 * c.positions, "", 0)
        curves[label] = loss_by_position(model, examples, c.bucket)

    rows = [("up to position", *curves)]
    for k, losses in enumerate(zip(*curves.values(), strict=True), 1):
        rows.append((str(k * c.bucket), *map("{:.2f}".format, losses)))
    data.print_table(rows)
    draw(Path(c.output_dir) / "positions.png", curves, c.bucket)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
