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
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import train_dpo
import train_sft
from data import ChatTokenizer, Row
from model import check
from train_dpo import Noise, Preference, answer_logprobs
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


class Labelled(NamedTuple):
    """A prompt, an answer and whether it was liked; then, as second answer, a mismatched one."""

    prompt: np.ndarray  # [tokens] int32, without its last token
    answers: tuple  # of (ids, spans), as in train_dpo.Preference
    source: int
    where: str
    label: bool
    lengths = Preference.lengths
    targets = Preference.targets
    tokens = Preference.tokens
    key = Preference.key


def kto_loss(ratio: Tensor, liked: Tensor, z: float | Tensor, beta: float,
             desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO (arXiv:2402.01306, eq. 8) of single answers [B], ratio = p - r of each, z as above.

    A larger beta saturates earlier: closer to the reference.
    """
    good = desirable_weight * (1 - torch.sigmoid(beta * (ratio - z)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (z - ratio)))
    return torch.where(liked, good, bad)


def add_mismatched(items: list[Labelled], max_length: int) -> list[Labelled]:
    """Give every item, as a second answer, that of its neighbour with another prompt.

    Pairs come as a liked row followed by a disliked one. Looking only forward, every item would
    borrow a *liked* answer; so disliked items look back. Others shift the answers within a batch,
    where neighbours may share a prompt and z depends on how batches were cut.
    """
    out = []
    for i, item in enumerate(items):
        # The next answer to another prompt, or the one before.
        way = 1 if item.label else -1
        neighbours = (items[(i + way * k) % len(items)] for k in range(1, len(items)))
        other = next((p for p in neighbours if p.key != item.key), None)
        check(other, f"{item.where}: KTO needs at least two prompts, among the training rows and "
              "among the validation rows")

        # An answer begins with the last token of its prompt, now of its new one.
        ids, spans = other.answers[0]
        ids = ids.copy()
        ids[0] = item.answers[0][0][0]
        room = max(max_length - len(item.prompt), spans[0][0] + 1)
        out.append(item._replace(answers=(*item.answers, data.cut(ids, spans, 0, room))))
    return out


@torch.no_grad()
def kl_point(model, items: list[Labelled], reference: Tensor, c: Config,
             hardware: Hardware) -> float:
    """z = max(0, mean of p - r over the mismatched answers of the global step), in nats."""
    strangers = [p._replace(answers=p.answers[1:]) for p in items]
    sizes, total = [p.tokens for p in strangers], 0.0
    for chunk, weight in train_sft.my_passes(sizes, c, hardware):
        with hardware.autocast():
            policy = answer_logprobs(model, [strangers[i] for i in chunk])[:, 0].cpu()  # [B]
        total += weight * (policy - reference[chunk, 1]).sum().item()

    # One z for the whole step: it must not depend on how the step is cut and dealt.
    return max(0.0, hardware.sum(total)[0] / len(items))


def objective(c: Config, policy: Tensor, reference: Tensor, length: Tensor, liked: Tensor,
              z: float) -> tuple[Tensor, Tensor]:
    """(loss, rewards) [B] of answers, from their sums of log-probabilities and token counts [B]."""
    ratio = policy - reference  # [B]
    loss = kto_loss(ratio, liked, z, c.beta, c.desirable_weight, c.undesirable_weight)
    nll = -policy / length * liked  # [B] nats per token of a liked answer
    return loss + c.nll_weight * nll, c.beta * ratio.detach()


# ==== read: the step, in the loop of train_dpo.py =================================================


def backward_step(model, wrapped, run: RunData, reference: Tensor, step: int, c: Config,
                  hardware: Hardware, scaler) -> dict:
    """Gradients of one optimizer step, the mean over its items; returns its metrics."""
    indices, visits = zip(*run.step(step, c.batch_size), strict=True)
    items, reference = [run.train[i] for i in indices], reference[list(indices)]  # [items, 2]
    length, liked = lengths_and_likes(items)  # [items]

    # The mismatched answers do their work in z; only the own ones are trained.
    z = kl_point(model, items, reference, c, hardware)
    own = [p._replace(answers=p.answers[:1]) for p in items]

    def losses(policy: Tensor, chunk: list[int]) -> Tensor:
        """[B] from the log-probabilities [B, 1] of a micro-batch."""
        known = [x[chunk].to(hardware.device) for x in (reference[:, 0], length, liked)]
        return objective(c, policy[:, 0], *known, z)[0]

    noise = Noise(c.seed, visits, indices, c.neftune_alpha)
    policy = train_dpo.backward_passes(wrapped, own, noise, losses, c, hardware, scaler)
    metrics = measure(c, policy[:, 0], reference[:, 0], length, liked, z)
    return {**metrics, "kl": z, "tokens": sum(p.tokens for p in items),
            "target_tokens": int(length.sum())}


def lengths_and_likes(items: list[Labelled]) -> tuple[Tensor, Tensor]:
    """(supervised tokens, whether it was liked) of every item's own answer: [items] each."""
    return torch.tensor([p.lengths[0] for p in items]).float(), torch.tensor(
        [p.label for p in items])


def measure(c: Config, policy: Tensor, reference: Tensor, length: Tensor, liked: Tensor,
            z: float) -> dict:
    """The metrics of all items of a step, as means; None for a side that is empty."""
    loss, rewards = objective(c, policy, reference, length, liked, z)
    out = {"loss": loss.mean().item()}
    for name, values in (("reward", rewards), ("logp", policy), ("length", length)):
        for side, mask in (("chosen", liked), ("rejected", ~liked)):
            out[f"{name}_{side}"] = values[mask].mean().item() if mask.any() else None

    # A margin needs both sides; a short step may have only one.
    if None not in out.values():
        out["reward_margin"] = out["reward_chosen"] - out["reward_rejected"]
    if c.nll_weight:
        out["nll"] = -(policy / length * liked).mean().item()

    # Right is the right side of the reference point.
    above = rewards - c.beta * z
    right = torch.where(liked, above > 0, above < 0)
    return {**out, "reward_accuracy": right.double().mean().item()}


def validation(model, items: list[Labelled], reference: Tensor, c: Config, hardware: Hardware):
    """Loss, reward accuracy and margin of held-out answers, with their own reference point."""
    policy = train_dpo.all_logprobs(model, items, c, hardware)  # [items, 2]
    z = max(0.0, (policy - reference)[:, 1].mean().item())
    metrics = measure(c, policy[:, 0], reference[:, 0], *lengths_and_likes(items), z)
    names = ("loss", "reward_accuracy", "reward_margin")
    return {f"val_{name}": metrics[name] for name in names if name in metrics}


# ---- skip on a first reading: rows, balance, main ------------------------------------------------


def load_labelled(files: list[str], tokenizer: ChatTokenizer, max_length: int,
                  skip_bad_rows: bool | None = None, quiet: bool = True):
    """(labelled answers of some files, what was cut or dropped by reason); a pair makes two."""

    def convert(rows: list[Row], source: int, counts: Counter) -> list[Labelled]:
        for row in rows:
            answered = row.label is not None and row.messages[-1]["role"] == "assistant"
            check(row.chosen or answered, f"{row.where}: expected a label and an answer, or chosen "
                  "and rejected (train_sft.py trains on rows without preferences)")

        # One item per answer: a pair shares its prompt.
        out = []
        for row, p in train_dpo.fit_answers(rows, source, counts, tokenizer, max_length,
                                            skip_bad_rows):
            labels = [True, False] if row.chosen else [row.label]
            for answer, label in zip(p.answers, labels, strict=True):
                out.append(Labelled(p.prompt, (answer,), source, row.where, label))
        return out

    return data.convert_files(files, convert, skip_bad_rows, quiet)


def report_balance(c: Config, items: list[Labelled]) -> None:
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
