"""KTO: align a checkpoint with single answers that were liked or not, no pairs needed.

Idea. A thumb up or down is easier to collect than a comparison. Kahneman and Tversky found that
people judge an outcome by its distance to a reference point, and losses and gains saturate. KTO
(arXiv:2402.01306, eq. 8) takes that as the loss of an answer:

    ratio = ln p(answer) - ln r(answer)                   p the policy, r the reference, in nats
    liked      desirable_weight   * (1 - s(beta (ratio - z)))       s the logistic function
    disliked   undesirable_weight * (1 - s(beta (z - ratio)))

The reference point z is how far the policy has moved from the reference altogether: its KL
divergence, estimated as max(0, mean of p - r) on *mismatched* answers, those of other prompts.

    python -m labs.kto --model out/sft --data labels.json --output_dir out/kto
    torchrun --nproc_per_node=2 -m labs.kto --model out/sft --data pairs.json

A row has a `label`; a pair becomes a liked and a disliked row. What to see: `kl` (z) grows slowly,
reward_chosen (of liked answers) rises above reward_rejected. What differs from train_dpo.py: an
item is one answer, and every step first needs z, from a pass without gradients.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

import data
import train_dpo
import train_sft
from data import ChatTokenizer, Row
from model import check
from train_dpo import Preference
from train_sft import Hardware, RunData

# ==== read: config ================================================================================


@dataclass
class Config(train_sft.Config):
    """Align a checkpoint with single answers and their labels by KTO."""

    data: list[str] = field(default_factory=list)  # rows with a label, or pairs
    output_dir: str = "out/kto"  # where checkpoint, metrics, reference and state go
    recipe: Literal[""] = ""  # there is none
    train_on: Literal["last"] = "last"  # preferences are about the last answer only
    epochs: float = 1.0  # passes over the data
    learning_rate: float = 0.0  # peak; 0: 5e-6 * 4096 / hidden_size
    weight_decay: float = 0.0  # on matrices only
    warmup: float = 0.1  # below 1 a fraction of the steps, else steps
    # what differs from train_sft.py
    reference: str = ""  # checkpoint the answers' likelihood is compared with; empty: --model
    beta: float = 0.1  # larger: the loss saturates earlier, closer to the reference
    desirable_weight: float = 1.0  # of liked answers
    undesirable_weight: float = 1.0  # of disliked answers
    nll_weight: float = 0.0  # adds this times a liked answer's mean nats per token


# ==== read: the loss and its reference point ======================================================


def kto_loss(c: Config, ratio: Tensor, liked: Tensor, z: float) -> Tensor:
    """KTO (arXiv:2402.01306, eq. 8) of single answers [B, 1], ratio = p - r of each, z as above.

    A larger beta saturates earlier: closer to the reference.
    """
    good = c.desirable_weight * (1 - torch.sigmoid(c.beta * (ratio - z)))
    bad = c.undesirable_weight * (1 - torch.sigmoid(c.beta * (z - ratio)))
    return torch.where(liked, good, bad)


def add_mismatched(items: list[Preference], max_length: int) -> list[Preference]:
    """Give every item, as a second answer, that of its neighbour with another prompt.

    Pairs come as a liked row followed by a disliked one. Looking only forward, every item would
    borrow a *liked* answer; so disliked items look back. Others shift the answers within a batch,
    where neighbours may share a prompt and z depends on how batches were cut.
    """
    out = []
    for i, item in enumerate(items):
        # From a liked one ahead, from a disliked one back, until the prompt is another.
        way = 1 if item.label else -1
        there = i + way
        while items[there % len(items)].key == item.key and abs(there - i) < len(items):
            there += way
        other = items[there % len(items)]
        check(other.key != item.key, f"{item.where}: KTO needs at least two prompts, among the "
              "training rows and among the validation rows")

        # An answer begins with the last token of its prompt, now of its new one.
        ids, spans = other.answers[0]
        ids = ids.copy()
        ids[0] = item.answers[0][0][0]
        room = max(max_length - len(item.prompt), spans[0][0] + 1)
        out.append(item._replace(answers=(*item.answers, data.cut(ids, spans, 0, room))))
    return out


def kl_point(policy: Tensor, reference: Tensor) -> float:
    """z = max(0, mean of p - r), in nats, over all mismatched answers of the global step."""
    return max(0.0, (policy - reference).double().mean().item())


def objective(c: Config, policy: Tensor, reference: Tensor, length: Tensor, liked: Tensor,
              z: float) -> tuple[Tensor, Tensor]:
    """(loss, rewards) of answers, from their sums of log-probabilities and token counts: [B, 1]."""
    ratio = policy - reference  # [B, 1]
    loss = kto_loss(c, ratio, liked, z)
    nll = -policy / length * liked  # [B, 1] nats per token of a liked answer
    return loss + c.nll_weight * nll, c.beta * ratio.detach()


# ==== read: the step, in the loop of train_dpo.py =================================================


def backward_step(model, run: RunData, reference: Tensor, step: int, c: Config,
                  hardware: Hardware, scaler) -> dict:
    """Gradients of one optimizer step, the mean over its items; returns its metrics."""
    draws = run.step(step, c.batch_size)
    items, mine = [run.train[i] for i, _ in draws], reference[torch.tensor(draws)[:, 0]]

    # The mismatched answers do their work in z: one of the whole step, however it is cut and dealt.
    strangers = train_dpo.all_logprobs(model, only(1, items), c, hardware)  # [items, 1]
    z = kl_point(strangers, mine[:, 1:])

    # Only the own answers are trained.
    own = only(0, items)
    tables = mine[:, :1], train_dpo.count_tokens(own), likes(items)  # [items, 1] each
    policy = train_dpo.backward_passes(model, own, draws, partial(objective, z=z), tables, c,
                                       hardware, scaler)
    return {**measure(c, policy, *tables, z), "kl": z, "tokens": sum(p.tokens for p in items),
            "target_tokens": sum(p.targets for p in own)}


def only(k: int, items: list[Preference]) -> list[Preference]:
    """The items with their answer k alone: 0 the own, 1 the mismatched one."""
    return [p._replace(answers=p.answers[k : k + 1]) for p in items]


def likes(items: list[Preference]) -> Tensor:
    """Whether each item's own answer was liked, [items, 1]."""
    return torch.tensor([[p.label] for p in items])


def measure(c: Config, policy: Tensor, reference: Tensor, length: Tensor, liked: Tensor,
            z: float) -> dict:
    """The metrics of all items of a step, as means; None for a side that is empty."""
    # Chosen are the liked ones, rejected the disliked ones.
    loss, rewards = objective(c, policy, reference, length, liked, z)
    out = {"loss": loss.mean().item(), **train_dpo.mean_by_side(
        (rewards[liked], rewards[~liked]), (policy[liked], policy[~liked]),
        (length[liked], length[~liked]))}
    if c.nll_weight:
        out["nll"] = -(policy / length * liked).mean().item()

    # Right is the right side of the reference point.
    above = rewards - c.beta * z
    right = torch.where(liked, above > 0, above < 0)
    return {**out, "reward_accuracy": right.double().mean().item()}


def validation(model, items: list[Preference], reference: Tensor, c: Config, hardware: Hardware):
    """Loss, reward accuracy and margin of held-out answers, with their own reference point."""
    policy = train_dpo.all_logprobs(model, items, c, hardware)  # [items, 2]
    length, z = train_dpo.count_tokens(items)[:, :1], kl_point(policy[:, 1], reference[:, 1])
    metrics = measure(c, policy[:, :1], reference[:, :1], length, likes(items), z)
    names = ("loss", "reward_accuracy", "reward_margin")
    return {f"val_{name}": metrics[name] for name in names if name in metrics}


# ---- skip on a first reading: rows, balance, main ------------------------------------------------


def load_labelled(files: list[str], tokenizer: ChatTokenizer, max_length: int,
                  skip_bad_rows: bool | None = None, quiet: bool = True):
    """(labelled answers of some files, what was cut or dropped by reason); a pair makes two."""

    def convert(rows: list[Row], source: int, counts: Counter) -> list[Preference]:
        for row in rows:
            answered = row.label is not None and row.messages[-1]["role"] == "assistant"
            check(row.chosen or answered, f"{row.where}: expected a label and an answer, or chosen "
                  "and rejected (train_sft.py trains on rows without preferences)")

        # One item per answer: a pair shares its prompt.
        out = []
        for p in train_dpo.fit_answers(rows, source, counts, tokenizer, max_length, skip_bad_rows):
            labels = [True, False] if len(p.answers) > 1 else [p.label]
            for answer, label in zip(p.answers, labels, strict=True):
                out.append(p._replace(answers=(answer,), label=label))
        return out

    return data.convert_files(files, convert, skip_bad_rows, quiet)


def report_balance(c: Config, items: list[Preference]) -> None:
    """Print how many answers are liked, and what KTO's authors advise on their weights."""
    liked = sum(p.label for p in items)
    disliked = len(items) - liked
    good, bad = c.desirable_weight * liked, c.undesirable_weight * disliked
    if not good or not bad:
        side = "liked" if good else "disliked"
        print(f"warning: {liked} liked, {disliked} disliked answers; only {side} ones count, so "
              "nothing says what sets the others apart")
        return

    # In between nothing needs to be changed.
    advice = "" if 1 <= good / bad <= 4 / 3 else (
        " (KTO's authors advise 1 to 1.33: set --desirable_weight or --undesirable_weight)")
    print(f"{liked} liked, {disliked} disliked answers; with their weights {good / bad:.2f} : 1"
          f"{advice}")


def main() -> None:
    """Read the flags, prepare, compute the reference, train, report."""
    c = train_sft.resolve_config(Config, sys.argv[1:], {},
                                 lambda: train_sft.import_world().DPO_DEMO)
    train_dpo.check_common(c)
    check(c.beta > 0, f"--beta must be above 0, is {c.beta}")
    train_dpo.find_demo(c)
    start_step, hardware = train_sft.find_start_step(c), train_sft.setup_hardware(c.dtype)
    tokenizer, run, facts = train_dpo.prepare(c, lambda files, tokenizer, c, quiet: load_labelled(
        files, tokenizer, c.max_length, c.skip_bad_rows, quiet), hardware)
    run = run._replace(train=add_mismatched(run.train, c.max_length),
                       validation=add_mismatched(run.validation, c.max_length))
    if hardware.rank == 0:
        report_balance(c, run.train)
    train_dpo.finish("-m labs.kto", c, tokenizer, run, facts, start_step, hardware, backward_step,
                     validation)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
