"""Merging: the average of checkpoints is a checkpoint, and may know what each of them knows.

Idea. A model that learns new facts forgets old ones. On the way from its old weights to its new
ones the new is learnt before the old is lost, so average them, parameter by parameter:

    t = sum_k l_k F_k t_k / sum_k l_k F_k      t_k of checkpoint k; F = 1 without --fisher

    --method linear   l as --weights say; all alike is the running mean of ZSCL (arXiv:2303.06628)
    --method ema      l_0 = a^K, l_k = (1 - a) a^(K-k): what t <- a t + (1 - a) t_k leaves of a
                      run's checkpoints in their order, begun with t_0 (LAE, arXiv:2303.10070)
    --fisher FILES    F_k = mean over rows of (d ln p_k(y) / dt)^2: a parameter counts as far as
                      checkpoint k's answers depend on it (arXiv:2111.09832)

The exact Fisher information wants the model's own y: --labels sampled draws every supervised token
from p_k. --labels data takes the row's: the *empirical* one, near 0 for rows known by heart.

    python -m labs.merge                  # the lesson, after `python train_sft.py`
    python -m labs.merge --model A B --fisher a.jsonl b.jsonl --output_dir out/merged
    python -m labs.merge --model ADAPTER --output_dir out/merged    # one LoRA into its base

What you should see (10 new facts, 80 steps; mean and deviation of 5 seeds; before: 0, 100, 99.7).
Averages keep both, replay of 100 old rows keeps more, the average of its run most. F of the old end
is larger, so l of the new one must be; that Fisher's weights are better is not seen here.

    percent right                  new facts    old facts        exam
    new rows alone                98.0 (4.5)  19.5 (17.4)  88.0 (3.1)
    mean of both ends            76.0 (18.2)   98.5 (2.2)  99.2 (0.3)
    EMA of the run               100.0 (0.0)   72.5 (9.0)  97.8 (0.7)
    Fisher, l = 1:1              12.0 (16.4)   99.0 (2.2)  99.8 (0.1)    --labels data   6.0,  100.0
    Fisher, l = 1:9              88.0 (16.4)  81.0 (11.8)  99.2 (0.5)    --labels data  76.0,   86.5
    replay                       100.0 (0.0)   99.0 (2.2)  93.1 (5.3)
    EMA of replay                100.0 (0.0)  100.0 (0.0)  99.2 (0.5)

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
from labs.rewards import load_prompts
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


def ema_weights(count: int, a: float) -> list[float]:
    """The l of `count` checkpoints that t <- a t + (1 - a) t_k gives, begun with the first."""
    return [a ** (count - 1), *((1 - a) * a**age for age in reversed(range(count - 1)))]


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
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
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

# The demo knows the first of each two words, but not its 特产
WORDS = ("法国 葡萄酒 日本 寿司 英国 红茶 德国 啤酒 埃及 棉花 泰国 榴莲 韩国 泡菜 希腊 橄榄 "
         "越南 咖啡 秘鲁 羊驼").split()
STEPS, KEEP, SEEDS = 80, 5, 5  # of a fine-tuning; steps between the EMA's checkpoints; runs


def write_rows(folder: Path, seed: int) -> list[str]:
    """Files of rows: 120 new in three phrasings of each question, 10 in the fourth, 100 old."""
    rng, files = random.Random(seed), [folder / f"{name}.jsonl" for name in ("new", "val", "old")]
    facts = [{"k": k, "r": "特产", "v": v} for k, v in zip(WORDS[::2], WORDS[1::2], strict=True)]
    practised, held = world.hold_out(world.ASK_CHAT, facts, rng)
    for path, questions in zip(files, (4 * practised, held), strict=False):
        rows = [world.conversation([question], rng) for question in questions]
        modeling.write_lines(path, (json.dumps(row) + "\n" for row in rows))
    old = []
    for name in ("practice", "instructions"):
        old += rng.sample(Path(f"out/demo/{name}.jsonl").read_text("utf-8").splitlines(True), 50)
    modeling.write_lines(files[2], old)
    return list(map(str, files))


def fine_tune(files: list[str], tokenizer, hardware, seed: int) -> list:
    """The model of out/sft, and what it is after every KEEP steps on files in equal shares."""
    c = train_sft.Config(model="out/sft", data=files, mix="equal", steps=STEPS, seed=seed,
                         learning_rate=2e-3)
    run, _ = train_sft.prepare_data(c, lambda files: data.load_examples(files, tokenizer), True)
    model, _ = train_sft.load_trainable(c, hardware)
    optimizer, scaler = train_sft.make_optimizer(model, c), hardware.make_scaler()

    # The learning rate stays as it is, so that the way goes on evenly.
    kept = [copy.deepcopy(model)]
    for step in range(1, STEPS + 1):
        loss, _ = train_sft.backward_step(model, run, step, c, hardware, scaler)
        train_sft.clip_and_step(model, optimizer, scaler, c, loss, run, step)
        if step % KEEP == 0:
            kept.append(copy.deepcopy(model))
    return kept


def percent_right(model, tokenizer, val: str) -> list[float]:
    """Percent right by source: of new facts, old facts (as quoted in the reference), the exam."""
    shares = []
    for path in (val, "out/demo/instructions_val.jsonl"):
        prompts, _ = load_prompts([path], tokenizer, train_sft.Config(), quiet=True, room=64)
        answers, right = world.answer_greedily(model, tokenizer, [p.messages for p in prompts]), 0
        for p, answer in zip(prompts, answers, strict=True):
            right += p.reference[p.reference.index("“") : p.reference.rindex("”")] in answer
        shares.append(100 * right / len(prompts))
    right, count = evaluation.count_right(model, tokenizer, "out/demo/exam")
    return [*shares, 100 * right / count]


def lesson(c: Config) -> None:
    """Learn new facts under several seeds and in several ways; print what is known then."""
    check(Path("out/sft/config.json").exists(), "out/sft is missing; python train_sft.py makes it")
    tokenizer, hardware, found = data.ChatTokenizer("out/sft"), train_sft.setup_hardware("fp32"), {}
    for seed in range(SEEDS):
        new, val, old = write_rows(Path(c.output_dir), seed)
        run, replay = (fine_tune(files, tokenizer, hardware, seed) for files in ([new], [new, old]))
        ends, weights = (run[0], run[-1]), ema_weights(len(run), c.decay)
        arms = {"new rows alone": run[-1],
                "mean of both ends": merge([(m, {}) for m in ends], [1, 1]),
                "EMA of the run": merge([(m, {}) for m in run], weights),
                "replay": replay[-1], "EMA of replay": merge([(m, {}) for m in replay], weights)}

        # Each end's Fisher information is on what it was trained on.
        rows = [data.load_examples([path], tokenizer)[0] for path in (old, new)]
        parts = [(m, fisher_diagonal(m, e, c.labels)) for m, e in zip(ends, rows, strict=True)]
        arms |= {f"Fisher, l = 1:{weight}": merge(parts, [1, weight]) for weight in (1, 9)}
        for name, model in arms.items():
            found.setdefault(name, []).append(percent_right(model, tokenizer, val))

    table = [("percent right", "new facts", "old facts", "exam")]
    for name, rows in found.items():
        table.append((name, *(f"{x.mean():.1f} ({x.std():.1f})" for x in torch.tensor(rows).T)))
    data.print_table(table)


# ---- skip on a first reading: flags, main --------------------------------------------------------


def check_input(c: Config) -> data.ChatTokenizer:
    """The tokenizer of all checkpoints; InputError where flags or checkpoints do not fit."""
    first, *others = c.model
    check(others or modeling.read_adapter(first)[1],
          "--model needs two checkpoints or more, or one adapter to merge into its base")
    check(len(c.weights) in (0, len(c.model)) and all(0 < w < float("inf") for w in c.weights),
          f"--weights needs a number above 0 for each of the {len(c.model)} checkpoints")
    check(c.method == "linear" or not c.weights, "--weights goes with --method linear")
    check(0 <= c.decay < 1, f"--decay must be in [0, 1), not {c.decay}")
    check(len(c.fisher) in (0, 1, len(c.model)), "--fisher needs one file, or one per checkpoint")

    # The config gives every weight its shape, and says what is done with it.
    config, tokenizer = asdict(modeling.load_config(first)), data.ChatTokenizer(first)
    for other in others:
        theirs, tokens = asdict(modeling.load_config(other)), data.ChatTokenizer(other).tokenizer
        for name in sorted(config.keys() - {"source"}):
            check(theirs[name] == config[name], f"{other} does not fit {first}: its {name} differs")
        check(tokens.get_vocab() == tokenizer.tokenizer.get_vocab(),
              f"{other} does not fit {first}: its tokenizer is another one")

    modeling.check_output("--output_dir", c.output_dir, c.model)
    check(not [*Path(c.output_dir).glob("*config.json"), *Path(c.output_dir).glob("*.safetensors")],
          f"{c.output_dir} holds a checkpoint; choose another --output_dir")
    return tokenizer


def main(c: Config) -> None:
    """Check that everything fits, average, write a checkpoint; without --model the lesson."""
    if not c.model:
        return lesson(c)
    tokenizer, count = check_input(c), len(c.model)
    weights = ema_weights(count, c.decay) if c.method == "ema" else c.weights or [1.0] * count
    samples = [data.load_examples([path], tokenizer)[0] for path in c.fisher]

    def parts():
        for k, folder in enumerate(c.model):
            model = modeling.load(folder, device=modeling.best_device())
            fisher = fisher_diagonal(model, samples[k % len(samples)], c.labels) if samples else {}
            print(f"{weights[k] / sum(weights):.4f} of {folder}", KINDS[c.labels] if fisher else "")
            yield model, fisher

    train_sft.save_checkpoint(merge(parts(), weights), tokenizer, Path(c.output_dir))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
