"""Merging: the average of checkpoints is a checkpoint, and may know what each of them knows.

Idea. A model that learns new facts forgets old ones. On the way from its old weights to its new
ones the new is learnt before the old is lost, so average them, parameter by parameter:

    t = sum_k l_k F_k t_k / sum_k l_k F_k      t_k of checkpoint k; F = 1 without --fisher

    --method linear   l as --weights say; all alike is the running mean of ZSCL (arXiv:2303.06628)
    --method ema      l_0 = a^K, l_k = (1 - a) a^(K-k): what t <- a t + (1 - a) t_k leaves of a
                      run's checkpoints in their order, begun with t_0 (LAE, arXiv:2303.10070)
    --fisher FILES    F_k = mean over rows of (d ln p_k(y) / dt)^2, how far k's answers depend on t
                      (arXiv:2111.09832); y is drawn from p_k (--labels sampled: exact), or it is
                      the row's (data: *empirical*, near 0 for rows known by heart)

    python -m labs.merge                  # the lesson, after `python train_sft.py`
    python -m labs.merge --model A B --fisher a.jsonl b.jsonl --output_dir out/merged
    python -m labs.merge --model ADAPTER --output_dir out/merged    # one LoRA into its base
    python train_sft.py --save_every 50 --keep 6 --output_dir out/run    # its moving average:
    python -m labs.merge --method ema --model out/run/step-*

What you should see (10 new facts, 80 steps; mean and deviation of 5 seeds; before: 0, 100, 100).
Seen: averages keep old facts, with replay of 100 old rows all. Not seen: that Fisher's mean is
better than a plain one (l = 1:2). Cannot be seen: many tasks in a row, large models. (LAE's
warm-up of a is left out: it would leave nothing of t_0.)

    percent right             new facts     old facts         exam
    new rows alone          100.0 (0.0)     8.0 (4.8)  68.1 (11.7)
    mean of both ends       42.0 (17.9)    99.0 (1.4)   99.0 (1.2)
    mean, l = 1:2           100.0 (0.0)    84.0 (3.8)   96.5 (2.4)
    EMA of the run          100.0 (0.0)    69.5 (2.1)   96.1 (1.3)
    Fisher, l = 1:1           2.0 (4.5)   100.0 (0.0)  100.0 (0.0)
    Fisher, l = 1:9          88.0 (8.4)   82.0 (12.9)   98.6 (1.5)
    replay                  100.0 (0.0)    99.5 (1.1)   89.6 (7.1)
    EMA of replay           100.0 (0.0)   100.0 (0.0)   99.2 (0.5)

Exercise. Which l_k has the newest of 17 checkpoints under a = 0.9, which the oldest?
    Solution: 0.1 and 0.9^16 = 0.19: more, since t was the oldest alone to begin with.
"""

import copy
import json
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

import data
import eval as evaluation
import model as modeling
import train_sft
from labs import world
from model import check


@dataclass
class Config:
    """Average checkpoints of one shape and one tokenizer."""

    model: list[str] = field(default_factory=list)  # checkpoints, in order; empty: the lesson
    output_dir: str = "out/merge"  # where the average goes; of the lesson, its rows
    method: Literal["linear", "ema"] = "linear"  # what the l_k are
    weights: list[float] = field(default_factory=list)  # l_k of linear; empty: all alike
    decay: float = 0.9  # a of ema
    fisher: list[str] = field(default_factory=list)  # rows that F is of: a file each, or one
    labels: Literal["sampled", "data"] = "sampled"  # y of F: the exact Fisher's, or the empirical's


# ==== read: the idea ==============================================================================

KINDS = {"sampled": "(exact Fisher information, sampled)", "data": "(empirical Fisher information)"}
FLOOR = 1e-30  # is added to every F: where all are 0, the mean by l is left


def ema_weights(K: int, a: float) -> list[float]:
    """l_0 to l_K, which t <- a t + (1 - a) t_k gives of t_1 to t_K when it begins with t_0."""
    return [a**K, *((1 - a) * a ** (K - k) for k in range(1, K + 1))]


@torch.no_grad()
def merge(parts, weights: list[float]):
    """The model with t = sum_k l_k F_k t_k / sum_k l_k F_k, of (model, F); no F stands for 1."""
    # `parts` may load one model at a time: beside it there are two sums in memory.
    top, bottom = {}, {}
    for weight, (model, fisher) in zip(weights, parts, strict=True):
        for name, t in model.named_parameters():
            share = weight * (fisher[name] + FLOOR) if fisher else weight
            top[name] = top.get(name, 0) + share * t
            bottom[name] = bottom.get(name, 0) + share

    merged = copy.deepcopy(model)  # the caller may still need the models themselves
    for name, t in merged.named_parameters():
        t.copy_(top[name] / bottom[name])
    return merged


@torch.enable_grad()  # `merge`, which goes without gradients, may ask for F on its way
def fisher_diagonal(model, examples: list[data.Example], labels: str) -> dict:
    """Mean over examples of (d ln p(y) / dt)^2 by parameter, y the supervised tokens."""
    generator = torch.Generator(model.device).manual_seed(0)
    parameters = dict(model.named_parameters())
    total = dict.fromkeys(parameters, 0.0)
    for e in examples:
        batch = data.collate([e], model.device)
        states, _ = model.hidden(batch.ids, batch.lengths, wanted=batch.targets - 1)  # [N, D]

        # A drawn token takes the place of the row's as a label only: the text stays.
        y = batch.ids[batch.targets]  # [N]
        if labels == "sampled":
            p = model.next_logits(states).softmax(-1).detach()  # [N, V]
            y = torch.multinomial(p, 1, generator=generator)[:, 0]

        # An example's tokens are summed before the square: y is the answer as a whole.
        logp = modeling.token_logprobs(states, model.head, y).sum()
        for name, g in zip(total, torch.autograd.grad(logp, parameters.values()), strict=True):
            total[name] += g.square() / len(examples)
    return total


# ==== read: the lesson ============================================================================

WORDS = ("法国 葡萄酒 日本 寿司 英国 红茶 德国 啤酒 埃及 棉花 泰国 榴莲 韩国 泡菜 希腊 橄榄 "
         "越南 咖啡 秘鲁 羊驼").split()  # pairs: the demo knows the first word, not its 特产
STEPS, KEEP, SEEDS = 80, 5, 5  # of a fine-tuning; steps between the EMA's checkpoints; runs


def make_files(folder: Path, seed: int) -> tuple[str, str]:
    """(120 new rows in three phrasings of each question, 100 old rows); 10 of the fourth beside."""
    rng, old = random.Random(seed), []
    facts = [{"k": k, "r": "特产", "v": v} for k, v in zip(WORDS[::2], WORDS[1::2], strict=True)]
    practised, held = world.hold_out(world.ASK_CHAT, facts, rng)

    # Four rows per question, each with a manner drawn anew. `right_by_turn` asks what is held out.
    for name, questions in (("new", 4 * practised), ("instructions_val", held)):
        rows = [world.conversation([question], rng) for question in questions]
        modeling.write_lines(folder / f"{name}.jsonl", (json.dumps(row) + "\n" for row in rows))

    # Old rows are of both kinds: choices, as in the exam, and conversations.
    for name in ("practice", "instructions"):
        old += rng.sample(Path(f"out/demo/{name}.jsonl").read_text("utf-8").splitlines(True), 50)
    modeling.write_lines(folder / "old.jsonl", old)
    return str(folder / "new.jsonl"), str(folder / "old.jsonl")


def fine_tune(files: list[str], tokenizer, hardware, seed: int) -> list[tuple]:
    """out/sft, and what it becomes, after every KEEP steps on files in equal shares; with no F."""
    c = train_sft.Config(model="out/sft", data=files, mix="equal", steps=STEPS, seed=seed,
                         learning_rate=2e-3)
    run, _ = train_sft.prepare_data(c, lambda files: data.load_examples(files, tokenizer), True)
    model, _ = train_sft.load_trainable(c, hardware)
    optimizer, scaler = train_sft.make_optimizer(model, c), hardware.make_scaler()

    # The learning rate stays as it is, so that the way goes on evenly.
    kept = [(copy.deepcopy(model), {})]
    for step in range(1, STEPS + 1):
        loss, _ = train_sft.backward_step(model, run, step, c, hardware, scaler)
        train_sft.clip_and_step(model, optimizer, scaler, c, loss, run, step)
        if step % KEEP == 0:
            kept.append((copy.deepcopy(model), {}))
    return kept


def percent_right(model, tokenizer, folder: Path) -> list[float]:
    """Percent right of the new facts, whose questions are in `folder`, old facts, and the exam."""
    percent = []
    for questions in (folder, Path("out/demo")):
        right, count = world.right_by_turn(model, tokenizer, questions, turns=1)
        percent.append(100 * right[0] / count)
    right, count = evaluation.count_right(model, tokenizer, "out/demo/exam")
    return [*percent, 100 * right / count]


def lesson(c: Config) -> None:
    """Learn new facts under several seeds and in several ways; print what is known then."""
    check(c.method == "linear" and not (c.weights or c.fisher) and 0 <= c.decay < 1,
          "the lesson takes --output_dir, --labels and --decay in [0, 1)")
    check(Path("out/demo/practice.jsonl").exists(), "out/demo is missing; train_sft.py makes it")
    tokenizer, hardware, found = data.ChatTokenizer("out/sft"), train_sft.setup_hardware("fp32"), {}
    modeling.check_output("--output_dir", c.output_dir, ["out/sft", "out/demo"])
    for seed in range(SEEDS):
        new, old = make_files(Path(c.output_dir), seed)
        run, replay = (fine_tune(files, tokenizer, hardware, seed) for files in ([new], [new, old]))

        # Each end's Fisher information is on what it was trained on.
        ends = []
        for (model, _), path in ((run[0], old), (run[-1], new)):
            examples, _ = data.load_examples([path], tokenizer)
            ends.append((model, fisher_diagonal(model, examples, c.labels)))

        # A row of the table is an average: of what, and under which l.
        decayed = ema_weights(len(run) - 1, c.decay)
        for name, parts, weights in (
                ("new rows alone", run[-1:], [1]), ("mean of both ends", (run[0], run[-1]), [1, 1]),
                ("mean, l = 1:2", (run[0], run[-1]), [1, 2]), ("EMA of the run", run, decayed),
                ("Fisher, l = 1:1", ends, [1, 1]), ("Fisher, l = 1:9", ends, [1, 9]),
                ("replay", replay[-1:], [1]), ("EMA of replay", replay, decayed)):
            right = percent_right(merge(parts, weights), tokenizer, Path(c.output_dir))
            found.setdefault(name, []).append(right)

    table = [("percent right", "new facts", "old facts", "exam")]
    for name, rows in found.items():
        table.append((name, *(f"{x.mean():.1f} ({x.std():.1f})" for x in torch.tensor(rows).T)))
    data.print_table(table)


# ---- skip on a first reading: flags, main --------------------------------------------------------


def check_input(c: Config) -> None:
    """InputError where flags or checkpoints do not fit."""
    first, count, place = c.model[0], len(c.model), Path(c.output_dir)
    check(count > 1 or modeling.read_adapter(first)[1],
          "--model needs two checkpoints or more, or one adapter to merge into its base")
    check(len(c.weights) in (0, count) and all(0 < w < float("inf") for w in c.weights),
          f"--weights needs a number above 0 for each of the {count} checkpoints")
    check(c.method == "linear" or not c.weights, "--weights goes with --method linear")
    check(0 <= c.decay < 1, f"--decay must be in [0, 1), not {c.decay}")
    check(len(c.fisher) in (0, 1, count), "--fisher needs one file, or one per checkpoint")
    modeling.check_output("--output_dir", place, c.model)
    held = modeling.checkpoint_in(place)
    check(not held, f"{place} holds a checkpoint ({held}); choose another --output_dir")

    # The config gives every weight its shape, and says what is done with it.
    wanted = {}
    for folder in c.model:
        found = asdict(modeling.load_config(folder))
        found["tokenizer"] = data.ChatTokenizer(folder).tokenizer.get_vocab()
        wanted = wanted or found  # the first one's
        for name in sorted(found.keys() - {"source"}):
            check(found[name] == wanted[name], f"{folder} does not fit {first}: its {name} differs")


def main(c: Config) -> None:
    """Check that everything fits, average, write a checkpoint in the type of the last one."""
    check_input(c)
    tokenizer, count = data.ChatTokenizer(c.model[0]), len(c.model)
    weights = ema_weights(count - 1, c.decay) if c.method == "ema" else c.weights or [1.0] * count
    samples = [data.load_examples([path], tokenizer)[0] for path in c.fisher]

    # One model at a time is loaded, and its F computed.
    def parts():
        for k, folder in enumerate(c.model):
            model = modeling.load(folder, device=modeling.best_device())
            fisher = fisher_diagonal(model, samples[k % len(samples)], c.labels) if samples else {}
            print(f"{weights[k] / sum(weights):.4f} of {folder}", KINDS[c.labels] if fisher else "")
            yield model, fisher

    train_sft.save_checkpoint(merge(parts(), weights), tokenizer, Path(c.output_dir))


if __name__ == "__main__":
    with data.one_line_errors():
        c = Config(**data.parse_flags(Config, sys.argv[1:]))
        main(c) if c.model else lesson(c)
