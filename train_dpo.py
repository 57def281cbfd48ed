"""Preference optimisation: DPO, cDPO, IPO, hinge, SimPO and KTO in one loop you can read.

    torchrun train_dpo.py                                # continues the demo of train_sft.py
    torchrun train_dpo.py --model out/sft --data pairs.json --output_dir out/dpo
    torchrun train_dpo.py --model out/sft --data labels.json --loss kto
    torchrun train_dpo.py --resume --output_dir out/dpo  # go on after a stop or a crash

What differs from train_sft.py: an example is a prompt with a chosen and a rejected answer (with
--loss kto, one answer and whether it was liked); its loss looks at how much likelier than before
the answers became. "Before" is the reference model: its log-probabilities are computed once, then
one model is in memory. A prompt is encoded once, both answers continue it. The loss of a step is
the mean over the pairs of the whole global step, whatever the micro-batches and ranks.
"""

import contextlib
import hashlib
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import data
import model as modeling
import train_sft
from data import ChatTokenizer, Row, common_prefix, conversations, cut
from model import InputError, check
from train_sft import Hardware

# ------------------------------------------------------------------------------------------- config


@dataclass
class Config(train_sft.Config):
    """Align a checkpoint with preferences: pairs of answers, or single answers with a label."""

    data: list[str] = field(default_factory=list)  # preference files: .json, .jsonl, also .gz
    output_dir: str = "out/dpo"  # where checkpoint, metrics, reference and state go
    recipe: str = ""  # a paper's preset: deepseek, steel-llm, tulu3; explicit flags win over it
    train_on: Literal["last"] = "last"  # preferences are about the last answer only
    epochs: float = 1.0  # passes over the data
    learning_rate: float = 0.0  # peak; 0: 5e-6 * 4096 / hidden_size
    weight_decay: float = 0.0  # on matrices only
    warmup: float = 0.1  # below 1 a fraction of the steps, else steps
    # what differs from train_sft.py
    reference: str = ""  # checkpoint the answers' likelihood is compared with; empty: --model
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "kto"] = "sigmoid"  # sigmoid is DPO
    beta: float = 0.0  # larger: stay closer to the reference; 0: 0.1, simpo 2, per-token sigmoid 5
    label_smoothing: float = 0.0  # of sigmoid: share of pairs that may be the wrong way (cDPO)
    length_normalize: bool = None  # means per token, not sums; not given: for ipo and simpo only
    simpo_gamma: float = 0.5  # margin that SimPO asks for
    nll_weight: float = 0.0  # adds this times the chosen answer's mean nats per token
    desirable_weight: float = 1.0  # of KTO's liked answers
    undesirable_weight: float = 1.0  # of KTO's disliked answers


# What each paper publishes; what it does not keeps the default.
RECIPES = {
    # DeepSeek LLM (arXiv:2401.02954), which also warms up, it does not say how long
    "deepseek": {"learning_rate": 5e-6, "schedule": "cosine", "batch_size": 512, "epochs": 1},
    # Steel-LLM (arXiv:2502.06635)
    "steel-llm": {"beta": 0.1, "learning_rate": 5e-6, "batch_size": 128, "epochs": 3,
                  "warmup": 0.1},
    # Tulu 3 8B (arXiv:2411.15124), and the command its authors document in open-instruct
    "tulu3": {"length_normalize": True, "beta": 5.0, "learning_rate": 5e-7, "schedule": "linear",
              "warmup": 0.1, "weight_decay": 0.0, "batch_size": 128, "epochs": 1,
              "max_length": 2048},
}



def check_preferences(c: Config) -> None:
    """Raise InputError for preference flags that make no sense; fill in defaults."""
    for name in ("beta", "simpo_gamma", "nll_weight", "desirable_weight", "undesirable_weight"):
        value = getattr(c, name)
        check(0 <= value < math.inf, f"--{name} must be 0 or more, is {value}")
    check(0 <= c.label_smoothing < 0.5, f"--label_smoothing not in [0, 0.5): {c.label_smoothing}")
    for name, loss in (("label_smoothing", "sigmoid"), ("simpo_gamma", "simpo"),
                       ("desirable_weight", "kto"), ("undesirable_weight", "kto")):
        check(c.loss == loss or getattr(c, name) == getattr(Config, name),
             f"--{name} goes with --loss {loss}")
    check(not c.length_normalize or c.loss != "kto", "--length_normalize is not for --loss kto")
    check(c.loss != "simpo" or not c.reference, "--loss simpo takes no --reference")
    check(not c.eot, "--eot is for train_sft.py, which gives the token its meaning")
    check(not c.recipe or c.loss == "sigmoid", f"--recipe {c.recipe} is for --loss sigmoid")
    check(c.max_length >= 4, f"--max_length must be at least 4, not {c.max_length}")
    for folder in (c.model, c.reference or c.model):
        check(Path(folder).resolve() != Path(c.output_dir).resolve(),
              "--output_dir must be another "
              f"folder than {folder}: a resumed run needs the checkpoint that it started from")
    if c.length_normalize is None:
        c.length_normalize = c.loss in ("ipo", "simpo")
    per_token = c.loss == "sigmoid" and c.length_normalize
    c.beta = c.beta or {"simpo": 2.0}.get(c.loss, 5.0 if per_token else 0.1)


# ------------------------------------------------------------------------------- preference pairs


class Preference(NamedTuple):
    """A prompt with a chosen and a rejected answer, or with one answer and whether it was liked.

    Every answer repeats the last token of the prompt, from which its own first one is predicted.
    """

    prompt: np.ndarray  # [tokens] int32, without its last token
    answers: tuple  # of (ids, spans): the last token of the prompt, the response, its end of turn
    source: int = 0  # index of its file
    where: str = ""  # file and line
    label: bool | None = None

    @property
    def lengths(self) -> list[int]:
        """Number of supervised tokens of each answer, its end of turn included."""
        return [sum(end - first for first, end, _ in spans) for _, spans in self.answers]

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return sum(self.lengths)

    @property
    def key(self) -> bytes:
        """What makes two preferences copies of each other: the prompt."""
        return self.prompt.tobytes() + self.answers[0][0][:1].tobytes()

    @property
    def tokens(self) -> int:
        """Number of tokens the model sees: the prompt counts once."""
        return len(self.prompt) + sum(len(ids) for ids, _ in self.answers)


def why_no_pair(row: Row) -> str:
    """Why a preference pair cannot be used, or nothing."""
    if not row.messages or len(row.chosen) > 1 or len(row.rejected) > 1:
        return "histories differ"
    return "chosen equals rejected" if row.chosen == row.rejected else ""


def to_preferences(rows: list[Row], source: int, counts: Counter, tokenizer: ChatTokenizer,
                   max_length: int, labelled: bool) -> list[Preference]:
    """Tokenise preference rows, counting what is cut or dropped by reason.

    `labelled` makes of a pair two rows, one liked and one not; else rows with a label are refused.
    The conversations of a pair are cut at the same points: as in `fit`, the beginning of the prompt
    goes where it is long, then the end of the answers.
    """
    good, out = [], []
    wanted = "a label and an answer, or chosen" if labelled else "chosen"
    for row in rows:
        answered = row.label is not None and row.messages[-1]["role"] == "assistant"
        check(row.chosen or (labelled and answered), f"{row.where}: expected {wanted} and rejected "
             "(--loss kto takes labels, train_sft.py rows without preferences)")
        if row.chosen and (why := why_no_pair(row)):
            counts[f"dropped: {why}"] += 1
        else:
            good.append((row, conversations(row)))
    plans = [tokenizer.pieces(talk, "last") for _, talks in good for talk in talks]
    encoded = iter(tokenizer.encode(plans))
    for row, talks in good:
        whole = [next(encoded) for _ in talks]  # a template may write on after the end of a turn
        whole = [(ids[: spans[-1][1]] if spans else ids, spans) for ids, spans in whole]
        shared = min(common_prefix([ids.tolist() for ids, _ in whole]),
                     *(spans[0][0] if spans else len(ids) for ids, spans in whole))
        longest = max(len(ids) for ids, _ in whole)
        start = max(0, min(shared - max_length // 2, longest - max_length))
        prompt, long = whole[0][0][start : shared - 1], longest > max_length
        answers = [cut(ids, spans, shared - 1, start + max_length) for ids, spans in whole]
        if not all(spans for _, spans in answers):
            why = "a response lost to truncation" if long else "nothing to supervise"
            counts[f"dropped: {why}"] += 1
        elif len(answers) == 2 and np.array_equal(answers[0][0], answers[1][0]):
            why = "alike once truncated" if long else "chosen equals rejected"
            counts[f"dropped: {why}"] += 1
        else:
            counts["truncated"] += long
            parts = [(answer,) for answer in answers] if labelled else [tuple(answers)]
            labels = [True, False] if labelled and row.chosen else [row.label]
            out += [Preference(prompt, part, source, row.where, label)
                    for part, label in zip(parts, labels, strict=True)]
    return out


def load_preferences(files: list[str], tokenizer: ChatTokenizer, max_length: int, labelled: bool,
                     skip_bad_rows: bool | None = None, quiet: bool = True):
    """(preferences of some files, what was cut or dropped by reason)."""

    def convert(rows: list[Row], source: int, counts: Counter) -> list[Preference]:
        return to_preferences(rows, source, counts, tokenizer, max_length, labelled)

    return data.convert_files(files, convert, skip_bad_rows, quiet)


# ------------------------------------------------------------------------------------------- losses
#
# margin = (pc - rc) - (pr - rr) in nats: p policy, r reference, c chosen, r rejected, each the sum
# of an answer's log-probabilities, or with --length_normalize their mean. All take and give [B].


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv:2305.18290, eq. 7): -ln s(beta margin), s the logistic function.

    cDPO (Mitchell 2023) takes a share e of the labels to be wrong: -(1-e) ln s(beta margin)
    - e ln s(-beta margin). A larger beta is content with a smaller margin: closer to the reference.
    """
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """IPO (arXiv:2310.12036, eq. 17): (margin - 1 / (2 beta))^2, beta the paper's tau.

    The margin is drawn to 1 / (2 beta) and not beyond: a larger beta stays closer to the reference.
    By default margins are of means per token, as its authors told TRL; the first code took sums.
    """
    return (margin - 1 / (2 * beta)) ** 2


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """SLiC-HF (arXiv:2305.10425, eq. 2) on DPO's margin: max(0, 1 - beta margin).

    Pairs with a margin above 1 / beta teach nothing more: a larger beta stops earlier.
    """
    return (1 - beta * margin).clamp(min=0)


def simpo_loss(margin: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv:2405.14734, eq. 6): -ln s(beta margin - gamma), no reference in the margin.

    Nothing holds the policy to where it began; a larger beta makes the loss steeper, so that the
    margin at which it is content, about gamma / beta nats per token, is smaller.
    """
    return -F.logsigmoid(beta * margin - gamma)


def kto_loss(ratio: Tensor, liked: Tensor, z: float | Tensor, beta: float,
             desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO (arXiv:2402.01306, eq. 8) of single answers, ratio = p - r of each, z as in `kl_point`.

    desirable_weight (1 - s(beta (ratio - z))) if liked, else undesirable_weight
    (1 - s(beta (z - ratio))). A larger beta saturates earlier: closer to the reference.
    """
    good = desirable_weight * (1 - torch.sigmoid(beta * (ratio - z)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (z - ratio)))
    return torch.where(liked, good, bad)


def objective(c: Config, policy: Tensor, reference: Tensor, length: Tensor, liked: Tensor,
              z: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss [B], rewards [B, A]) of the sums of log-probabilities [B, A] of answers.

    A is 2 for pairs (chosen, rejected), 1 for KTO. A reward is beta times what enters the margin;
    `length` [B, A] counts tokens, `liked` [B, A] is True for chosen and liked answers.
    """
    ratio = (policy - reference) / (length if c.length_normalize else 1)  # [B, A]
    margin = ratio[:, 0] - ratio[:, -1]  # [B]
    if c.loss == "sigmoid":
        loss = sigmoid_loss(margin, c.beta, c.label_smoothing)
    elif c.loss == "ipo":
        loss = ipo_loss(margin, c.beta)
    elif c.loss == "hinge":
        loss = hinge_loss(margin, c.beta)
    elif c.loss == "simpo":
        loss = simpo_loss(margin, c.beta, c.simpo_gamma)
    else:
        loss = kto_loss(ratio[:, 0], liked[:, 0], z, c.beta, c.desirable_weight,
                        c.undesirable_weight)
    nll = -policy[:, 0] / length[:, 0] * liked[:, 0]  # [B] nats per token of the chosen answer
    return loss + c.nll_weight * nll, c.beta * ratio.detach()


def measure(c: Config, policy: Tensor, reference: Tensor, length: Tensor, liked: Tensor,
            z: float = 0.0) -> dict:
    """The metrics of all preferences of a step, as means; None for a side that is empty."""
    loss, rewards = objective(c, policy, reference, length, liked, z)
    out = {"loss": loss.mean().item()}
    for name, values in (("reward", rewards), ("logp", policy), ("length", length)):
        for side, mask in (("chosen", liked), ("rejected", ~liked)):
            out[f"{name}_{side}"] = values[mask].mean().item() if mask.any() else None
    if None not in out.values():
        out["reward_margin"] = out["reward_chosen"] - out["reward_rejected"]
    if c.nll_weight:
        out["nll"] = -(policy[:, 0] / length[:, 0] * liked[:, 0]).mean().item()
    right = rewards[:, 0] > rewards[:, -1]  # [B] strictly: False where policy = reference
    if c.loss == "kto":  # the right side of the reference point
        above = rewards[:, 0] - c.beta * z
        right = torch.where(liked[:, 0], above > 0, above < 0)
    return {**out, "reward_accuracy": right.double().mean().item()}


# -------------------------------------------------------------------- log-probabilities of answers


class Noise(NamedTuple):
    """What keys the noise of some preferences: dropout's and NEFTune's."""

    seed: int
    visits: list[int]  # [B] how often each was seen before
    indices: list[int]  # [B] which they are
    alpha: float  # NEFTune's


def answer_logprobs(model, items: list[Preference], which=slice(None), forward=None,
                    noise: Noise | None = None) -> Tensor:
    """The sum of ln p, in nats, of the answers `which` of each item: [B, A].

    Every prompt is encoded once; its answers continue its keys and values, through which gradients
    flow back into it. `forward` is the model as DDP wraps it. NEFTune's L is the length of prompt
    and answer; within the prompt, which has one noise for both answers, that of the longer one.
    """
    device = model.device
    prompts = data.collate([data.Example(p.prompt, ()) for p in items], device)
    answers = [data.Example(*answer) for p in items for answer in p.answers[which]]  # [B * A]
    A, batch = len(answers) // len(items), data.collate(answers, device)
    row = [k // A for k in range(len(answers))]  # [B * A] the prompt of each answer
    whole = [prompts.lengths[i] + n for i, n in zip(row, batch.lengths, strict=True)]
    longest = [max(whole[A * i : A * i + A]) for i in range(len(items))]  # [B]
    keys, alpha = [None, None], noise.alpha if noise else 0.0
    if noise:  # prompt and answers are three different examples to it
        examples = [3 * noise.indices[i] + 1 + k % A for k, i in enumerate(row)]
        keys = [modeling.noise_keys(noise.seed, noise.visits, [3 * i for i in noise.indices],
                                    prompts.lengths, device),
                modeling.noise_keys(noise.seed, [noise.visits[i] for i in row], examples,
                                    batch.lengths, device)]
    _, prefix = model.hidden(prompts.ids, prompts.lengths, None, True, keys[0], alpha, longest)
    prefix = prefix.select(torch.tensor(row, device=device))
    logp = (forward or model)(batch.ids, batch.lengths, batch.targets, prefix, keys[1], alpha,
                              whole)  # [N]
    parts = logp.split([e.targets for e in answers])
    return torch.stack([part.sum() for part in parts]).view(-1, A)  # [B, A]


@torch.no_grad()
def all_logprobs(model, items: list[Preference], c: Config, hardware: Hardware) -> Tensor:
    """The sums of `answer_logprobs` without noise, of all items [items, 2] on the CPU."""
    model.eval()
    out = torch.zeros(len(items), len(items[0].answers))
    sizes = [p.tokens for p in items]
    for chunk in data.micro_batches(sizes, c.micro_tokens, hardware.world)[hardware.rank]:
        with hardware.autocast():
            out[chunk] = answer_logprobs(model, [items[i] for i in chunk]).cpu()
    model.train()
    return torch.tensor(hardware.sum(*out.flatten().tolist())).view(out.shape)


def hash_checkpoint(folder: str) -> bytes:
    """A hash of a checkpoint's config and weights."""
    digest = hashlib.sha256()
    for path in [Path(folder) / "config.json", *modeling.weight_files(Path(folder))]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def fingerprint(checkpoint: bytes, items: list[Preference]) -> str:
    """A hash of what log-probabilities depend on: the checkpoint's hash and the tokens.

    The tokens are what data, template, lengths and truncation came to.
    """
    digest = hashlib.sha256(checkpoint)
    for p in items:
        for ids, spans in p.answers:
            digest.update(repr((len(p.prompt), spans)).encode())
            digest.update(p.prompt.tobytes() + ids.tobytes())
    return digest.hexdigest()


def reference_logprobs(c: Config, groups: list[list[Preference]], hardware: Hardware):
    """(log-probabilities [items, 2], hash) of each group under the reference.

    They come from the cache in output_dir, else the reference is loaded, used and gone before the
    policy takes its place. SimPO has no reference: zeros.
    """
    folder, model, out = c.reference or c.model, None, []
    checkpoint = b"" if c.loss == "simpo" else hash_checkpoint(folder)
    for items in groups:
        if c.loss == "simpo" or not items:
            out.append((torch.zeros(len(items), 2), ""))
            continue
        key, kind = fingerprint(checkpoint, items), str(hardware.dtype).removeprefix("torch.")
        path = Path(c.output_dir) / "reference" / f"{key[:16]}-{kind}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                out.append((file.get_tensor("logprobs"), key))
            continue
        began = time.perf_counter()
        model = model or modeling.load(folder, torch.float32, hardware.device)
        values = all_logprobs(model, items, c, hardware)
        hardware.barrier()  # every rank has looked for the file before it is there
        if hardware.rank == 0:
            modeling.write_atomic(path, lambda file, v=values: save_file({"logprobs": v}, file))
            print(f"log-probabilities of {len(items)} preferences under {folder}: "
                  f"{time.perf_counter() - began:.1f} s, kept in {path}")
        hardware.barrier()  # it is there before a rank looks for the next
        out.append((values, key))
    return out


# ---------------------------------------------------------------------------------------- KTO's z


def add_mismatched(items: list[Preference], max_length: int) -> list[Preference]:
    """Give every labelled item, as a second answer, that of the next item with another prompt.

    A disliked item takes it from the item before: of pairs, that are split into a liked and a
    disliked row, both kinds of answers then count. KTO estimates the policy's KL divergence on such
    mismatches. Others shift the answers within a batch, where neighbours may share a prompt and z
    depends on how batches were cut.
    """
    out = []
    for i, item in enumerate(items):
        way = 1 if item.label else -1  # of a pair's rows: on to a liked one, back to a disliked one
        after = (items[(i + way * k) % len(items)] for k in range(1, len(items)))
        other = next((p for p in after if p.key != item.key), None)
        if other is None:
            raise InputError(f"{item.where}: --loss kto needs at least two prompts, among the "
                            "training rows and among the validation rows")
        ids, spans = other.answers[0]
        ids = ids.copy()
        ids[0] = item.answers[0][0][0]  # the last token of its new prompt
        answer = data.cut(ids, spans, 0, max(max_length - len(item.prompt), spans[0][0] + 1))
        out.append(item._replace(answers=(*item.answers, answer)))
    return out


def report_balance(c: Config, items: list[Preference]) -> None:
    """Print how many answers are liked, and what KTO's authors advise on their weights."""
    liked = sum(p.label for p in items)
    disliked = len(items) - liked
    weight = c.undesirable_weight * disliked
    ratio = c.desirable_weight * liked / weight if weight else math.inf
    print(f"{liked} liked, {disliked} disliked answers; with their weights {ratio:.2f} : 1"
          + ("" if 1 <= ratio <= 4 / 3 else " (KTO's authors advise 1 to 1.33: set "
             "--desirable_weight or --undesirable_weight)"))


@torch.no_grad()
def kl_point(model, items, reference: Tensor, mine: list[list[int]], hardware: Hardware) -> float:
    """z = max(0, mean of p - r over the mismatched answers of the global batch), in nats."""
    total = 0.0
    for chunk in mine:
        with hardware.autocast():
            policy = answer_logprobs(model, [items[i] for i in chunk], slice(1, 2))
        total += (policy[:, 0].cpu() - reference[chunk, 1]).sum().item()
    return max(0.0, hardware.sum(total)[0] / len(items))


# ------------------------------------------------------------------------------------- the DPO step


def lengths_and_likes(items: list[Preference]) -> tuple[Tensor, Tensor]:
    """(tokens, whether it is chosen or liked) of every answer that is trained on: [items, A]."""
    likes = [[True, False] if p.label is None else [p.label] for p in items]
    lengths = [p.lengths[: len(row)] for p, row in zip(items, likes, strict=True)]
    return torch.tensor(lengths).float(), torch.tensor(likes)


def backward_step(model, wrapped, run, reference: Tensor, step: int, c: Config, hardware: Hardware,
                  scaler) -> dict:
    """Gradients of one optimizer step; returns its metrics.

    loss = mean over the preferences of the global step. DDP averages gradients over the ranks,
    hence the factor `world`. KTO first needs z, from a pass without gradients.
    """
    draws = run.step(step, c.batch_size)
    indices, visits = zip(*draws, strict=True)
    items, reference = [run.train[i] for i in indices], reference[list(indices)]
    sizes = [p.tokens for p in items]
    mine = data.micro_batches(sizes, c.micro_tokens, hardware.world)[hardware.rank]
    z = kl_point(model, items, reference, mine, hardware) if c.loss == "kto" else 0.0
    length, liked = lengths_and_likes(items)  # [items, A]
    A = liked.shape[1]
    policy, reference = torch.zeros(liked.shape), reference[:, :A]
    share = 1.0 if mine else 0.0  # fewer pairs than ranks: take part in DDP's sum with nothing
    for k, chunk in enumerate(mine or [[0]], 1):
        noise = Noise(c.seed, [visits[i] for i in chunk], [indices[i] for i in chunk],
                      c.neftune_alpha)
        known = (x[chunk].to(hardware.device) for x in (reference, length, liked))  # [B, A]
        synchronize = hardware.world == 1 or k >= len(mine)  # gradients travel once a step
        with contextlib.nullcontext() if synchronize else wrapped.no_sync():
            with hardware.autocast():
                logp = answer_logprobs(model, [items[i] for i in chunk], slice(A), wrapped, noise)
            loss, _ = objective(c, logp, *known, z)
            loss = loss.sum() / len(items) * share
            scaler.scale(loss * hardware.world).backward()
        policy[chunk] += share * logp.detach().cpu()
    policy = torch.tensor(hardware.sum(*policy.flatten().tolist())).view(policy.shape)
    metrics = measure(c, policy, reference, length, liked, z) | ({"kl": z} if A == 1 else {})
    return {**metrics, "tokens": sum(sizes), "target_tokens": int(length.sum())}


def validation(model, items: list[Preference], reference: Tensor, c: Config, hardware: Hardware):
    """Loss, reward accuracy and margin on held-out preferences, and, where the answers are pairs,
    the share in which the policy by itself finds the chosen answer the likelier one."""
    policy = all_logprobs(model, items, c, hardware)  # [items, 2]
    z = max(0.0, (policy - reference)[:, 1].mean().item()) if c.loss == "kto" else 0.0
    length, liked = lengths_and_likes(items)  # [items, A]
    A = liked.shape[1]
    metrics = measure(c, policy[:, :A], reference[:, :A], length, liked, z)
    if A == 2:
        metrics["logp_accuracy"] = (policy[:, 0] > policy[:, 1]).double().mean().item()
    names = ("loss", "reward_accuracy", "reward_margin", "logp_accuracy")
    return {f"val_{name}": metrics[name] for name in names if name in metrics}


def check_first_loss(c: Config, record: dict) -> None:
    """Warn if the first step's loss is not that of policy = reference: ln 2 for sigmoid."""
    if c.loss in ("simpo", "kto"):
        return
    zero, liked = torch.zeros(1, 2), torch.tensor([[True, False]])
    expected = objective(c, zero, zero, torch.ones(1, 2), liked)[0].item()
    found = record["loss"] - c.nll_weight * record.get("nll", 0.0)
    if abs(found - expected) > 0.01 * expected:
        name = f"ln 2 = {expected:.4f}" if c.loss == "sigmoid" else f"{expected:.4f}"
        print(f"warning: the first step's loss is {found:.4f}, not {name}: the reference is not "
              "what the policy started from (or dropout or noise is on)")


def train(c: Config, tokenizer, run, references, start_step: int, model, wrapped,
          hardware: Hardware):
    """The loop: forward and backward, clip, step, log, save. Returns the log and a few facts."""
    optimizer, scaler, signals, log = train_sft.start_training(c, start_step, run.steps, model,
                                                               hardware)
    facts = {"seconds": 0.0, "pairs": 0, "stopped": 0, "before": {}}
    if run.validation and not start_step:
        facts["before"] = validation(model, run.validation, references[1], c, hardware)
    if c.exam_data and not start_step:
        facts["before"]["exam_accuracy"] = train_sft.exam_accuracy(model, tokenizer, c, hardware)
    for step in range(start_step + 1, run.steps + 1):
        began = time.perf_counter()
        rate = train_sft.set_learning_rate(optimizer, step, run.steps, c)
        metrics = backward_step(model, wrapped, run, references[0], step - 1, c, hardware, scaler)
        norm = train_sft.clip_and_step(model, optimizer, scaler, c, metrics["loss"], run, step)
        seconds = time.perf_counter() - began
        facts["seconds"] += seconds
        facts["pairs"] += len(run.step(step - 1, c.batch_size))
        epoch = min(step * c.batch_size, run.draws) / run.mixer.size
        record = {"step": step, "epoch": round(epoch, 4), "loss": metrics.pop("loss"),
                  "learning_rate": rate, "grad_norm": norm, **metrics}
        record["tokens_per_second"] = round(metrics["tokens"] / seconds, 1)
        stop, done = hardware.sum(len(signals))[0], step == run.steps
        if run.validation and (done or (c.eval_every and step % c.eval_every == 0)):
            record |= validation(model, run.validation, references[1], c, hardware)
        if c.exam_data and (done or (c.exam_every and step % c.exam_every == 0)):
            record["exam_accuracy"] = train_sft.exam_accuracy(model, tokenizer, c, hardware)
        if step == 1 and hardware.rank == 0:
            check_first_loss(c, record)
        shown = {"loss": "loss", "reward_margin": "margin", "reward_accuracy": "accuracy"}
        log.write(record, {name: f"{record[key]:.4f}" for key, name in shown.items()
                           if key in record})
        if done or stop or (c.save_every and step % c.save_every == 0):
            train_sft.save_run(c, tokenizer, model, optimizer, scaler, step, hardware)
        if stop and not done:
            facts["stopped"] = 128 + (signals or [signal.SIGTERM])[0]
            break
    log.bar.close()
    return log.records, facts


# ------------------------------------------------------------------------------------ what happened


def mean_of(records: list[dict], key: str) -> float:
    """The mean of a metric over some steps."""
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def explain(records: list[dict]) -> None:
    """Print how each metric moved, from the first tenth of the steps to the last.

    Steps have different pairs, so that sums of log-probabilities do not compare; rewards do, each
    being beta times the change of the same answer's log-probability (SimPO's have no reference).
    """
    records = [r for r in records if "reward_margin" in r]  # a step of KTO's may lack a side
    if len(records) < 2:
        return
    n = max(1, len(records) // 10)
    a, b = ({key: mean_of(part, key) for key in records[-1]} for part in (
        records[:n], records[-n:]))
    up = {key: b[key] - a[key] for key in b}
    print(f"means over the first and the last {n} of {len(records)} steps, and what they mean:")
    for key, good, yes, no in (
        ("reward_margin", b["reward_margin"] > max(0, a["reward_margin"]),
         "chosen answers gained on rejected ones, which is what is trained",
         "it should grow above 0: more steps, or a larger --learning_rate?"),
        ("reward_accuracy", b["reward_accuracy"] < 0.95,
         "the share in the right order; 0.6 to 0.8 is usual on real preferences",
         "nearly all are in the right order; held-out pairs tell whether that is memory"),
        ("reward_chosen", up["reward_chosen"] < 0,
         "the log-probability of chosen answers fell, which is normal: only the difference is "
         "trained (--nll_weight holds it up)",
         "the log-probability of chosen answers rose; often it falls, since only the difference is "
         "trained"),
        ("reward_rejected", up["reward_rejected"] < min(up["reward_chosen"], 0),
         "the log-probability of rejected answers fell, and further, as it should",
         "the log-probability of rejected answers should fall, further than that of chosen ones"),
        ("length_chosen", b["length_chosen"] > 1.2 * b["length_rejected"],
         "longer than rejected ones: a margin that grows while generated answers get ever longer "
         "is no success; try --length_normalize",
         "not much longer than rejected ones; still, a margin that grows while generated answers "
         "get ever longer would be no success"),
    ):
        print(f"  {key} {a[key]:.3f} -> {b[key]:.3f}: {yes if good else no}")


def summary(c: Config, records: list[dict], facts: dict, steps: int) -> None:
    """What a person wants to know when a run ends."""
    folder = Path(c.output_dir)
    train_sft.draw_figure(folder / "rewards.png", records, {
        "reward_chosen": "chosen", "reward_rejected": "rejected", "reward_margin": "margin",
        "val_reward_margin": "margin, held out"}, "reward")
    if train_sft.report_early_end("train_dpo.py", folder, records, facts, steps):
        return
    print(f"{facts['pairs']} preferences in {facts['seconds']:.0f} s, "
          f"{facts['pairs'] / facts['seconds']:.1f} a second")
    explain(records)
    for key, name in (("val_reward_accuracy", "reward accuracy"), ("val_reward_margin", "margin"),
                      ("val_logp_accuracy", "chosen likelier than rejected"),
                      ("exam_accuracy", "exam accuracy")):
        if key in records[-1]:
            before = f"{facts['before'][key]:.3f} -> " if key in facts["before"] else ""
            print(f"held out: {name} {before}{records[-1][key]:.3f}")
    print(f"checkpoint in {folder}; next:\n  python eval.py chat --model {folder}")


# --------------------------------------------------------------------------------------------- main


def main() -> None:
    """Read the flags, prepare, compute the reference, train, report."""
    c = train_sft.resolve_config(Config, sys.argv[1:], RECIPES,
                                 lambda: train_sft.import_world().DPO_DEMO)
    check_preferences(c)
    world = train_sft.import_world() if c.data == ["out/demo/pairs.jsonl"] else None
    if world and not all(Path(p).exists() for p in (f"{c.model}/config.json", *c.data)):
        raise InputError(f"the demo continues from the checkpoint in {c.model}, which is missing; "
                         "`torchrun train_sft.py` makes it in two minutes")
    start_step, hardware = train_sft.find_start_step(c), train_sft.setup_hardware(c.dtype)
    quiet = hardware.rank > 0
    tokenizer = data.ChatTokenizer(c.model, c.template)
    config, other = (modeling.load_config(f) for f in (c.model, c.reference or c.model))
    tokenizer.check_size(min(config.vocab_size, other.vocab_size))
    if c.exam_data:  # an error in it should come now
        import eval as evaluation

        evaluation.training_exam(tokenizer, c.exam_data, config.max_position_embeddings,
                                 quiet=quiet)
    c.learning_rate = c.learning_rate or 5e-6 * 4096 / config.hidden_size  # see train_sft.main
    run, facts = train_sft.prepare_data(c, lambda files: load_preferences(
        files, tokenizer, c.max_length, c.loss == "kto", skip_bad_rows=c.skip_bad_rows,
        quiet=quiet), quiet)
    if c.loss == "kto":
        run = run._replace(train=add_mismatched(run.train, c.max_length),
                           validation=add_mismatched(run.validation, c.max_length))
        if not quiet:
            report_balance(c, run.train)
    references, keys = zip(*reference_logprobs(c, [run.train, run.validation], hardware),
                           strict=True)
    facts["data_hashes"] |= {"the reference of training data": keys[0],
                             "the reference of validation data": keys[1]}
    model, wrapped = train_sft.load_trainable(c, hardware)
    train_sft.start_run(c, run.steps, facts, hardware)
    rows = []
    if hardware.rank == 0:
        train_sft.announce(c, model, tokenizer, run.steps, hardware)
        if world and not start_step:
            rows = [row for _, row in data.read_rows(c.val_data)]
            before = world.try_demo(model, tokenizer, rows)
    records, result = train(c, tokenizer, run, references, start_step, model, wrapped, hardware)
    if hardware.rank == 0:
        summary(c, records, result, run.steps)
        if rows and not result["stopped"]:
            world.report_preferences(before, world.try_demo(model, tokenizer, rows), rows)
    hardware.leave()
    sys.exit(result["stopped"])


if __name__ == "__main__":
    with data.one_line_errors():
        main()
