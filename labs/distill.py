"""Distillation: a small model learns a large one's whole distribution, not only its choice.

Idea. A row says which token came next. A teacher says of every token how likely it was, and so
what would have been nearly right. At each supervised position, with p the teacher's and q the
student's probabilities after division of the logits by T (arXiv:1503.02531):

    loss = a (-ln q_1(token)) + (1 - a) T^2 D(p, q)      T^2 keeps the gradient's size: T (q - p)

    --divergence forward   KL(p || q)    q must cover all that p finds possible
    --divergence reverse   KL(q || p)    q may settle on one of p's habits (MiniLLM, 2306.08543)
    --divergence jsd       b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = --beta
                           between the two (GKD, arXiv:2306.13649, eq. 1)

A student that only ever sees the rows' answers never learns to go on after its own mistakes:
--own 0.5 replaces the answers of half of the examples by the student's own samples (GKD), which
the teacher then judges token by token. Teacher and student stand side by side a chunk of positions
at a time, and the backward pass computes the chunk again: never is there a whole [N, V].

    python -m labs.distill                     # the demo: a student of half the teacher's width
    F="--model out/demo/student --data out/demo/few.jsonl --steps 300 --batch_size 32 --warmup 20 \\
        --val_data out/demo/instructions_val.jsonl --learning_rate 3e-3"
    python -m labs.distill $F --teacher out/sft --divergence jsd --output_dir out/jsd  # or reverse
    python -m labs.distill $F --teacher out/sft --own 0.5 --output_dir out/own
    python train_sft.py $F --output_dir out/few

What you should see: a random student, 60 conversations, 300 steps; 40 questions in words held out.
SFT learns by heart which opening stood in a row, the student of --divergence forward that any may;
judged on its own samples too it learns most. From random weights reverse and jsd begin slowly:
where the student sees no chance of a token, they hardly ask for it. (Five --seed, mean, deviation.)

                                SFT  forward  own 0.5    jsd  reverse
    nats per token, held out  0.582    0.365    0.244  0.901    1.197
                              0.008    0.008    0.025  0.027    0.127

Exercise. An answer opens in one of four ways, by chance, and has 10 tokens. What is the least loss?
    Solution: ln 4 / 10 = 0.14 nats per token, of whoever knows all facts.
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import data
import model as modeling
import train_sft
from data import Example
from labs.rewards import sample_answers
from model import check
from train_sft import Hardware

LOGIT_ELEMENTS = 2**23  # logits of each model alive at once


@dataclass
class Config(train_sft.Config):
    """Train a student on the probabilities that a teacher gives every token."""

    model: str = ""  # the student; empty: the built-in demo
    output_dir: str = "out/distill"  # where checkpoint, metrics and state go
    recipe: Literal[""] = ""  # there is none
    mix: Literal["proportional"] = "proportional"  # of the files
    # what differs from train_sft.py
    teacher: str = ""  # checkpoint with the same tokenizer
    divergence: Literal["forward", "reverse", "jsd"] = "forward"  # between teacher and student
    beta: float = 0.5  # of jsd: near 0 like beta * forward, near 1 like (1 - beta) * reverse
    temperature: float = 1.0  # T, of both; above 1 unlikely tokens count for more
    alpha: float = 0.0  # a, the share of the ordinary loss
    own: float = 0.0  # share of the examples whose last answer the student samples itself
    max_new_tokens: int = 64  # of such an answer


# ==== read: the idea ==============================================================================


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) in nats, of log-probabilities [rows, V]: [rows]."""
    return (a.exp() * (a - b)).sum(-1)


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5,
               temperature: float = 1.0) -> Tensor:
    """D(p, q) [rows] of logits [rows, V] / T, p the teacher's and q the student's probabilities."""
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    # In logarithms, for a sum of two tiny probabilities must not become ln 0.
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))  # [rows, V]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def chunk_loss(mine: Tensor, my_head: Tensor, theirs: Tensor, their_head: Tensor, targets: Tensor,
               c: Config) -> Tensor:
    """The loss of each of some positions [rows], from states [rows, D] and [rows, teacher's D]."""
    student = (mine @ my_head.to(mine.dtype).T).float()  # [rows, V]
    teacher = (theirs @ their_head.to(theirs.dtype).T).float()  # [rows, V]
    soft = divergence(student, teacher, c.divergence, c.beta, c.temperature)
    hard = -student.log_softmax(-1).gather(1, targets[:, None])[:, 0]  # [rows]
    return c.alpha * hard + (1 - c.alpha) * c.temperature**2 * soft


def token_losses(student, teacher, batch: data.Batch, c: Config) -> Tensor:
    """The loss of each supervised token [N], a chunk of positions at a time."""
    # A token is predicted from the state just before it.
    before = batch.targets - 1
    mine = student.hidden(batch.ids, batch.lengths)[0].index_select(0, before)  # [N, D]
    with torch.no_grad():
        theirs = teacher.hidden(batch.ids, batch.lengths)[0].index_select(0, before)

    # What `checkpoint` wraps is computed again in the backward pass, and not kept until then.
    wanted, losses = batch.ids[batch.targets], []  # [N]
    size = max(1, LOGIT_ELEMENTS // len(student.head))
    for first in range(0, len(wanted), size):
        rows = slice(first, first + size)
        losses.append(checkpoint(chunk_loss, mine[rows], student.head, theirs[rows],
                                 teacher.head.detach(), wanted[rows], c, use_reentrant=False))
    return torch.cat(losses)


def distill_step(student, run, step: int, c: Config, hardware: Hardware, scaler, teacher,
                 stop_ids: list[int]) -> tuple[float, dict]:
    """Gradients of one step: the weighted mean of the loss over all its supervised tokens."""
    examples = {index: run.train[index] for index, _ in run.step(step, c.batch_size)}
    examples |= own_answers(student, examples, step, c, hardware, stop_ids)
    batches = train_sft.my_micro_batches(run._replace(train=examples), step, c, hardware)

    # The loss is divided by the weights of the whole step, however it is cut.
    total, counts = 0.0, {"tokens": 0, "target_tokens": 0}
    for batch, _ in batches:
        total += batch.weights.sum().item()
        counts["tokens"] += sum(batch.lengths)
        counts["target_tokens"] += len(batch.targets)

    # The teacher reads what the student is trained on, its own answers included.
    loss_sum = 0.0
    for batch, _ in batches:
        with hardware.autocast():
            losses = token_losses(student, teacher, batch, c)  # [N]
        loss = (batch.weights * losses).sum() / total
        scaler.scale(loss).backward()
        loss_sum += loss.item()
    return loss_sum, counts


def own_answers(student, examples: dict[int, Example], step: int, c: Config, hardware: Hardware,
                stop_ids: list[int]) -> dict[int, Example]:
    """A share `own` of a step's examples, their last answer sampled: drawn by (seed, step)."""
    lots = np.random.default_rng([c.seed, step]).random(len(examples))
    chosen, prompts = [], []
    for (i, e), lot in zip(examples.items(), lots, strict=True):
        if lot < c.own:
            chosen.append(i)
            prompts.append(e.ids[: e.spans[-1][0]].tolist())  # up to the last answer

    # An answer depends on the example and the step, not on which others are chosen.
    how = modeling.Sampling(temperature=1.0, seed=c.seed + step)
    replaced = {}
    for k, own in sample_answers(student, prompts, chosen, how, c, stop_ids, hardware).items():
        replaced[chosen[k]] = examples[chosen[k]]._replace(ids=own.ids, spans=own.spans)
    return replaced


# ---- skip on a first reading: the demo, flags, main ----------------------------------------------


def make_student(folder: Path, teacher: str) -> None:
    """A random checkpoint of half the teacher's width: half as many heads, of the same size."""
    config = dict(modeling.load_config(teacher).source)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        config[name] = config[name] // 2

    # Token by token the two are compared, so the student has the teacher's tokens.
    student = modeling.Llama(modeling.read_config(config))
    student.initialize(0)
    modeling.save(student, folder)
    data.ChatTokenizer(teacher).save(folder)


def demo() -> dict:
    """60 of the demo's conversations; the teacher, which saw all 300, is in out/sft."""
    rows = Path("out/demo/instructions.jsonl")
    check(Path("out/sft/config.json").exists() and rows.exists(), "the demo's teacher is the "
          "checkpoint in out/sft, which is missing; `python train_sft.py` makes it")

    # So few that how to say a fact is hardly to be learnt from the rows alone.
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    modeling.write_lines(Path("out/demo/few.jsonl"), lines)
    make_student(Path("out/demo/student"), "out/sft")
    return {"model": "out/demo/student", "teacher": "out/sft", "data": ["out/demo/few.jsonl"],
            "val_data": ["out/demo/instructions_val.jsonl"], "batch_size": 32, "steps": 300,
            "learning_rate": 3e-3, "warmup": 20, "log_every": 100}


def check_flags(c: Config) -> None:
    """Raise InputError for flags that make no sense here, or a teacher of other tokens."""
    check(int(os.environ.get("WORLD_SIZE", 1)) == 1, "labs.distill runs in one process")
    check(c.teacher, "--teacher DIR is missing: whose probabilities the student learns")
    check(0 < c.beta < 1, f"--beta must lie between 0 and 1, not {c.beta}: forward and reverse are "
          "the ends")
    check(c.divergence == "jsd" or c.beta == Config.beta, "--beta is for --divergence jsd")
    for name in ("alpha", "own"):
        check(0 <= getattr(c, name) <= 1, f"--{name} must be in [0, 1], not {getattr(c, name)}")
    check(c.max_new_tokens > 0, f"--max_new_tokens must be above 0, not {c.max_new_tokens}")
    check(not (any(c.dropout) or c.lora_dropout or c.neftune_alpha or c.eot),
          "--dropout, --lora_dropout, --neftune_alpha and --eot are for train_sft.py")
    check(not (c.alpha and c.own), "--alpha or --own, not both: what the student wrote is no label")

    # The same tokens by number: p and q are of the same vocabulary.
    mine, theirs = data.ChatTokenizer(c.model).tokenizer, data.ChatTokenizer(c.teacher).tokenizer
    check(mine.get_vocab() == theirs.get_vocab(),
          f"{c.teacher} and {c.model} have different tokens; probabilities compare token by token")
    size, other = (modeling.load_config(folder).vocab_size for folder in (c.model, c.teacher))
    check(size == other, f"{c.model} has {size} rows of tokens, {c.teacher} {other}")


def main() -> None:
    """Read the flags, prepare, train, report."""
    c = train_sft.resolve_config(Config, sys.argv[1:], {}, demo)
    check_flags(c)
    start_step, hardware = train_sft.find_start_step(c), train_sft.setup_hardware(c.dtype)
    tokenizer, run, facts = train_sft.prepare(c, train_sft.load_rows, hardware)

    student, _ = train_sft.load_trainable(c, hardware)
    teacher = modeling.load(c.teacher, torch.float32, hardware.device)
    train_sft.start_run(c, run.steps, facts, hardware)
    train_sft.announce(c, student, tokenizer, run.steps, hardware)

    # The loop is that of train_sft.py; the step is this file's.
    step = partial(distill_step, teacher=teacher, stop_ids=tokenizer.stop_ids)
    records, status = train_sft.train(c, tokenizer, run, start_step, student, student, hardware,
                                      step)
    if not train_sft.ended_early("-m labs.distill", c, start_step, run.steps, records, hardware):
        train_sft.summary(c, records)
    hardware.leave(status)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
