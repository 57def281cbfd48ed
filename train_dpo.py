"""Preference optimisation: DPO, cDPO, IPO, hinge and SimPO in one loop you can read.

    python train_dpo.py                                  # continues the demo of train_sft.py
    python train_dpo.py --model out/sft --data pairs.json --output_dir out/dpo
    torchrun --nproc_per_node=8 train_dpo.py --model out/sft --data pairs.json --loss ipo
    python train_dpo.py --resume --output_dir out/dpo    # go on after a stop or a crash

What differs from train_sft.py: an example is a prompt with a chosen and a rejected answer; its loss
looks at how much likelier than before the answers became. "Before" is the reference model: its
log-probabilities are computed once, then one model is in memory. A prompt is encoded once, both
answers continue it. The loss of a step is the mean over the pairs of the whole global step,
whatever the micro-batches and ranks. For single answers with a label there is labs/kto.py.
"""

import hashlib
import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import model as modeling  # isort: skip  # before torch: it says how threads wait
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import data
import train_sft
from data import ChatTokenizer, Row, common_prefix, cut, render_rows
from model import check
from train_sft import Hardware, RunData

# ---- skip on a first reading: config -------------------------------------------------------------


@dataclass
class Config(train_sft.Config):
    """Align a checkpoint with preferences: pairs of a chosen and a rejected answer."""

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
    loss: Literal["sigmoid", "ipo", "hinge", "simpo"] = "sigmoid"  # sigmoid is DPO
    beta: float = 0.0  # larger: stay closer to the reference; 0: 0.1, simpo 2, per-token sigmoid 5
    label_smoothing: float = 0.0  # of sigmoid: share of pairs that may be the wrong way (cDPO)
    length_normalize: bool = None  # means per token, not sums; not given: for ipo and simpo only
    simpo_gamma: float = 0.5  # margin that SimPO asks for
    nll_weight: float = 0.0  # adds this times the chosen answer's mean nats per token


# ==== read: preference pairs ======================================================================


class Preference(NamedTuple):
    """A prompt and its answers: the chosen one, then the rejected one.

    An answer begins with the last token of the prompt, from which its own first one is predicted.
    """

    prompt: np.ndarray  # [tokens] int32, without its last token
    answers: tuple  # of (ids, spans): the last token of the prompt, the response, its end of turn
    source: int = 0  # index of its file
    where: str = ""  # file and line
    label: bool | None = None  # of a single answer: whether it was liked (labs/kto.py)

    @property
    def answer_tokens(self) -> list[int]:
        """Number of supervised tokens of each answer, its end of turn included."""
        return [data.Example(*answer).targets for answer in self.answers]

    @property
    def targets(self) -> int:
        """Number of supervised tokens."""
        return sum(self.answer_tokens)

    @property
    def tokens(self) -> int:
        """Number of tokens the model sees: the prompt counts once."""
        return len(self.prompt) + sum(len(ids) for ids, _ in self.answers)

    @property
    def key(self) -> bytes:
        """What makes two preferences copies of each other: the prompt."""
        return self.prompt.tobytes() + self.answers[0][0][:1].tobytes()


# ==== read: losses ================================================================================
#
# margin = (pc - rc) - (pr - rr) in nats: p policy, r reference, c chosen, r rejected, each the sum
# of an answer's log-probabilities, or with --length_normalize their mean. All take and give [B].


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv:2305.18290, eq. 7): -ln s(beta margin), s the logistic function.

    cDPO (Mitchell 2023) takes a share e (label_smoothing) of the pairs to be the wrong way round:
    -(1-e) ln s(beta margin) - e ln s(-beta margin). Under a larger beta the gradient fades at a
    smaller margin: the policy stays closer to the reference.
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


def objective(c: Config, policy: Tensor, reference: Tensor,
              length: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [B], rewards [B, 2]); all [B, 2] have a column for chosen and one for rejected.

    `policy` and `reference` (0 for SimPO) are sums of log-probabilities, `length` counts tokens. A
    reward is beta times what enters the margin.
    """
    ratio = policy - reference  # [B, 2]

    # A sum grows with the length of an answer, a mean does not.
    if c.length_normalize:
        ratio = ratio / length  # [B, 2]
    chosen, rejected = ratio[:, 0], ratio[:, 1]  # [B]
    margin = chosen - rejected  # [B]

    if c.loss == "sigmoid":
        loss = sigmoid_loss(margin, c.beta, c.label_smoothing)
    elif c.loss == "ipo":
        loss = ipo_loss(margin, c.beta)
    elif c.loss == "hinge":
        loss = hinge_loss(margin, c.beta)
    elif c.loss == "simpo":
        loss = simpo_loss(margin, c.beta, c.simpo_gamma)
    else:
        raise ValueError(f"no loss is called {c.loss!r}; `objective` is the place to add one")

    nll = -policy[:, 0] / length[:, 0]  # [B] nats per token of the chosen answer
    return loss + c.nll_weight * nll, c.beta * ratio.detach()


# ==== read: log-probabilities of answers ==========================================================


def answer_logprobs(model, items: list[Preference], draws: list[tuple] = (), seed: int = 0,
                    neftune_alpha: float = 0.0) -> Tensor:
    """The sum of ln p, in nats, of the answers of each preference: [B, 2].

    One pass over prompts and answers end to end. A prompt stands there once; its answers continue
    its keys and values, through which gradients flow back into it. NEFTune's L is the length of
    prompt and answer; within the prompt, which has one noise for both answers, that of the longer
    one. In training the noise is a function of the seed and of `draws`: (index among the training
    data, times seen before) of each preference.
    """
    examples, parents, full, counts = [], [], [], []
    for p in items:
        parents += [None] + [len(examples)] * len(p.answers)
        examples += [data.Example(p.prompt, ()), *itertools.starmap(data.Example, p.answers)]
        counts += p.answer_tokens
        lengths = [len(p.prompt) + len(ids) for ids, _ in p.answers]
        full += [max(lengths), *lengths]
    batch, noise = data.collate(examples, model.device), None

    # For the noise, preference i is three examples, so that each draws its own: the prompt is
    # 3i, chosen 3i + 1, rejected 3i + 2.
    if draws:
        visits, numbers = [], []
        for p, (index, visit) in zip(items, draws, strict=True):
            visits += [visit] * (1 + len(p.answers))
            numbers += range(3 * index, 3 * index + 1 + len(p.answers))
        noise = modeling.noise_keys(seed, visits, numbers, batch.lengths, model.device)  # [T]

    logp = model(batch.ids, batch.lengths, batch.targets, parents=parents, noise=noise,
                 neftune_alpha=neftune_alpha, full_lengths=full)  # [N]

    # N counts the supervised tokens of all answers: as many parts as there are answers.
    sums = torch.stack([part.sum() for part in logp.split(counts)])
    return sums.view(len(items), -1)  # [B, 2]


@torch.no_grad()
def all_logprobs(model, items: list[Preference], c: Config, hardware: Hardware) -> Tensor:
    """`answer_logprobs` of all preferences [items, 2], without noise, on the CPU of every rank."""
    if not items:
        return torch.zeros(0, 2)

    # Every rank fills in its own rows; the sum of the ranks' tables has all of them.
    model.eval()
    out = torch.zeros(len(items), len(items[0].answers))
    for chunk, weight in train_sft.my_passes([p.tokens for p in items], c, hardware):
        with hardware.autocast():
            out[chunk] += weight * answer_logprobs(model, [items[i] for i in chunk]).cpu()
    model.train()
    return hardware.sum_tensor(out)


# ==== read: one optimizer step ====================================================================


def backward_step(model, run: RunData, reference: Tensor, step: int, c: Config,
                  hardware: Hardware, scaler) -> dict:
    """Gradients of one optimizer step; returns its metrics.

    loss = mean over the pairs of the global step. `reference` [all pairs, 2] are the model's
    log-probabilities before training. `train`, below, fits this to the loop of train_sft.py.
    """
    draws = run.step(step, c.batch_size)
    items, mine = [run.train[i] for i, _ in draws], reference[torch.tensor(draws)[:, 0]]
    length = count_tokens(items)  # [items, 2], as `mine`
    policy = backward_passes(model, items, draws, objective, (mine, length), c, hardware, scaler)
    metrics = measure(c, policy, mine, length)
    return {**metrics, "tokens": sum(p.tokens for p in items), "target_tokens": int(length.sum())}


def count_tokens(items: list[Preference]) -> Tensor:
    """Supervised tokens of each answer, [items, 2]."""
    return torch.tensor([p.answer_tokens for p in items]).float()


def backward_passes(model, items: list[Preference], draws: list[tuple], objective, tables: tuple,
                    c: Config, hardware: Hardware, scaler) -> Tensor:
    """Forward and backward of a step's preferences, in micro-batches; returns their [items, 2].

    `objective` takes the log-probabilities of a micro-batch, and of each of `tables` its rows.
    """
    passes = train_sft.my_passes([p.tokens for p in items], c, hardware)
    policy = torch.zeros(len(items), len(items[0].answers))
    for k, (chunk, weight) in enumerate(passes, 1):
        # Under DDP gradients travel once per step: with the last micro-batch.
        model.require_backward_grad_sync = k == len(passes)
        with hardware.autocast():
            logp = answer_logprobs(model, [items[i] for i in chunk], [draws[i] for i in chunk],
                                   c.seed, c.neftune_alpha)  # [B, 2]
        rows = [modeling.send(table[chunk], hardware.device) for table in tables]  # [B, 2] each
        loss = weight * objective(c, logp, *rows)[0].sum() / len(items)

        # DDP averages the ranks' gradients, but the step's is their sum: hence times `world`.
        scaler.scale(loss * hardware.world).backward()
        policy[chunk] += weight * logp.detach().cpu()

    # Each rank has filled in its own rows, so the sum is the whole step.
    return hardware.sum_tensor(policy)


# ---- skip on a first reading: metrics and validation ---------------------------------------------


def measure(c: Config, policy: Tensor, reference: Tensor, length: Tensor) -> dict:
    """The metrics of all pairs of a step, as means, from [items, 2] each."""
    loss, rewards = objective(c, policy, reference, length)
    out = {"loss": loss.mean().item(), **mean_by_side(rewards.T, policy.T, length.T)}
    if c.nll_weight:
        out["nll"] = -(policy[:, 0] / length[:, 0]).mean().item()

    right = rewards[:, 0] > rewards[:, 1]  # [items] strictly: False where policy = reference
    return {**out, "reward_accuracy": right.double().mean().item()}


def mean_by_side(rewards, policy, length) -> dict:
    """Means of the chosen and of the rejected answers, each given as (chosen, rejected)."""
    # Both sides of the difference apart: a margin can grow while both fall.
    out = {}
    for name, sides in (("reward", rewards), ("logp", policy), ("length", length)):
        for side, values in zip(("chosen", "rejected"), sides, strict=True):
            out[f"{name}_{side}"] = values.mean().item() if len(values) else None

    # A margin needs both sides; a short step of labs/kto.py may have only one.
    if None not in out.values():
        out["reward_margin"] = out["reward_chosen"] - out["reward_rejected"]
    return out


def validation(model, items: list[Preference], reference: Tensor, c: Config, hardware: Hardware):
    """Loss, reward accuracy and margin of held-out pairs, and `val_logp_accuracy`.

    That is the share of pairs whose chosen answer is likelier under the policy alone.
    """
    policy, length = all_logprobs(model, items, c, hardware), count_tokens(items)  # [items, 2]
    metrics = measure(c, policy, reference, length)
    metrics["logp_accuracy"] = (policy[:, 0] > policy[:, 1]).double().mean().item()

    # One file may get worse while the mean gets better.
    loss, by_source = objective(c, policy, reference, length)[0], {}  # [items]
    for k, name in enumerate(data.source_names(c.val_data or c.data)):
        mine = [i for i, p in enumerate(items) if p.source == k]
        if mine:
            by_source[name] = loss[mine].mean().item()
    metrics["loss_by_source"] = by_source
    names = ("loss", "loss_by_source", "reward_accuracy", "reward_margin", "logp_accuracy")
    return {f"val_{name}": metrics[name] for name in names}


# ---- skip on a first reading: the loop -----------------------------------------------------------

FIGURE = train_sft.Figure(
    "rewards.png", "reward", {"reward_chosen": "chosen", "reward_rejected": "rejected",
                              "reward_margin": "margin", "val_reward_margin": "margin, held out"},
    {"loss": "loss", "reward_margin": "margin", "reward_accuracy": "accuracy"})


def train(c: Config, tokenizer, run: RunData, references: list[Tensor], start_step: int, model,
          wrapped, hardware: Hardware, backward=backward_step,
          validate=validation) -> tuple[list[dict], int]:
    """The loop of train_sft.py with the step and the validation of preferences.

    `references` are the log-probabilities [items, 2] of training and validation data.
    """

    def measured_step(wrapped, run, step, c, hardware, scaler) -> tuple[float, dict]:
        metrics = backward(wrapped, run, references[0], step, c, hardware, scaler)
        if step == 1 and hardware.rank == 0 and backward is backward_step:  # not labs/kto.py's
            check_first_loss(c, metrics)

        # The loop adds up the parts of the ranks, and every rank knows the whole already.
        return metrics["loss"] / hardware.world, metrics

    return train_sft.train(
        c, tokenizer, run, start_step, model, wrapped, hardware, measured_step,
        partial(validate, model, run.validation, references[1], c, hardware), FIGURE)


def check_first_loss(c: Config, record: dict) -> None:
    """Warn if the first step's loss is not that of policy = reference: ln 2 for DPO's.

    Then the reference is not where the policy started, or the policy is noisy.
    """
    # No answer has become likelier: every margin is 0.
    zero = torch.zeros(1, 2)
    expected = objective(c, zero, zero, torch.ones(1, 2))[0].item()
    found = record["loss"] - c.nll_weight * record.get("nll", 0.0)
    if c.loss != "simpo" and abs(found - expected) > 0.01 * expected:  # SimPO has no reference
        name = f"ln 2 = {expected:.4f}" if c.loss == "sigmoid" else f"{expected:.4f}"
        print(f"warning: the first step's loss is {found:.4f}, not {name}: the reference is not "
              "what the policy started from (or dropout or noise is on)")


# ---- skip on a first reading: the reference ------------------------------------------------------


def reference_logprobs(c: Config, run: RunData, hardware: Hardware) -> tuple[list[Tensor], str]:
    """Log-probabilities [items, 2] of training and validation data under the reference; their key.

    They come from the cache in output_dir, else the reference is loaded, used and gone before the
    policy takes its place. It is what the policy starts from: with LoRA on a checkpoint the base
    (B = 0), where --model is an adapter base and adapter together.
    """
    folder, groups = c.reference or c.model, {"training": run.train, "validation": run.validation}
    key, kind = fingerprint(folder, groups), str(hardware.dtype).removeprefix("torch.")
    path = Path(c.output_dir) / "reference" / f"{key[:16]}-{kind}.safetensors"
    if path.exists():
        with modeling.open_tensors(path) as file:
            return [file.get_tensor("training"), file.get_tensor("validation")], key

    began, model = time.perf_counter(), train_sft.load_model(folder, c, hardware)
    values = {"training": all_logprobs(model, run.train, c, hardware),
              "validation": all_logprobs(model, run.validation, c, hardware)}

    # Every rank has looked for the file before it is there.
    hardware.barrier()
    if hardware.rank == 0:
        modeling.write_atomic(path, lambda temporary: save_file(values, temporary))
        print(f"log-probabilities of {len(run.train) + len(run.validation)} preferences under "
              f"{folder}: {time.perf_counter() - began:.1f} s, kept in {path}")
    return list(values.values()), key


def fingerprint(folder: str, groups: dict[str, list[Preference]]) -> str:
    """A hash of what log-probabilities depend on: the checkpoint, and the tokens.

    The tokens are what data, template, lengths and truncation came to.
    """
    made = modeling.load_config(folder).source, modeling.read_adapter(folder)[1]
    digest = hashlib.sha256(repr(made).encode())
    for path in modeling.weight_files(folder):
        digest.update(train_sft.hash_file(path).encode())
    for name, items in groups.items():
        digest.update(name.encode())
        for p in items:
            # The lengths part what would else run together.
            for ids, spans in p.answers:
                digest.update(repr((len(p.prompt), spans)).encode())
                digest.update(p.prompt.tobytes() + ids.tobytes())
    return digest.hexdigest()


# ---- skip on a first reading: from rows to pairs -------------------------------------------------


def load_preferences(files: list[str], tokenizer: ChatTokenizer, max_length: int,
                     skip_bad_rows: bool | None = None, quiet: bool = True):
    """(preferences of some files, what was cut or dropped by reason)."""

    def convert(rows: list[Row], source: int, counts: Counter) -> list[Preference]:
        for row in rows:
            check(row.chosen, f"{row.where}: expected chosen and rejected (labels are for "
                  "labs/kto.py, rows without preferences for train_sft.py)")
        return fit_answers(rows, source, counts, tokenizer, max_length, skip_bad_rows)

    return data.convert_files(files, convert, skip_bad_rows, quiet)


def why_no_pair(row: Row) -> str:
    """Why a preference pair cannot be used, or nothing."""
    if not row.messages or len(row.chosen) > 1 or len(row.rejected) > 1:
        return "histories differ"
    return "chosen equals rejected" if row.chosen == row.rejected else ""


def fit_answers(rows: list[Row], source: int, counts: Counter, tokenizer: ChatTokenizer,
                max_length: int, skip_bad_rows: bool | None = None) -> list[Preference]:
    """Prompt and answers in tokens of every row that keeps something to learn.

    The conversations of a row, two of a pair, are cut at the same points: as in `data.fit`, the
    beginning of the prompt goes where it is long, then the end of the answers.
    """
    # A pair that teaches nothing is counted and left out.
    usable = []
    for row in rows:
        if why := why_no_pair(row) if row.chosen else "":
            counts[f"dropped: {why}"] += 1
        else:
            usable.append(row)
    rendered = render_rows(usable, tokenizer, "last", counts, skip_bad_rows)
    encoded, out = iter(tokenizer.encode([p for _, plans in rendered for p in plans])), []

    for row, plans in rendered:
        # A template may write on after the end of a turn: an answer ends with its last target.
        whole, texts = [], []
        for ids, spans in itertools.islice(encoded, len(plans)):
            ids = ids[: spans[-1][1]] if spans else ids
            whole.append((ids, spans))
            texts.append(ids.tolist())

        # The prompt is what they share before anything is supervised.
        shared, longest = common_prefix(texts), max(map(len, texts))
        for ids, spans in whole:
            shared = min(shared, spans[0][0] if spans else len(ids))

        # What is too long loses the beginning of the prompt, but not more than half the window.
        start = max(0, min(shared - max_length // 2, longest - max_length))
        prompt = whole[0][0][start : shared - 1]
        answers = [cut(ids, spans, shared - 1, start + max_length) for ids, spans in whole]

        # Cutting can take away all that there was to learn.
        truncated, why = longest > max_length, ""
        if not all(spans for _, spans in answers):
            why = "a response lost to truncation" if truncated else "nothing to supervise"
        elif len(answers) == 2 and np.array_equal(answers[0][0], answers[1][0]):
            why = "alike once truncated" if truncated else "chosen equals rejected"
        if why:
            counts[f"dropped: {why}"] += 1
            continue
        counts["truncated"] += truncated
        out.append(Preference(prompt, tuple(answers), source, row.where, row.label))
    return out


# ---- skip on a first reading: what happened ------------------------------------------------------

MEANING = {
    "reward_margin": "should grow above 0: chosen answers gain on rejected ones",
    "reward_accuracy": "share of pairs in the right order; 0.6 to 0.8 is usual on real preferences,"
                       " near 1 only held-out pairs tell whether it is memory",
    "reward_chosen": "often falls with the log-probability of chosen answers, since only the "
                     "difference is trained (--nll_weight holds it up)",
    "reward_rejected": "should fall, further than that of chosen answers",
    "length_chosen": "tokens; if generated answers grow longer with the margin, the model has "
                     "learned length, not quality (try --length_normalize)"}


def explain(records: list[dict]) -> None:
    """Print how each metric moved, from the first tenth of the steps to the last.

    Steps have different pairs, so that sums of log-probabilities do not compare; rewards do, each
    being beta times the change of the same answer's log-probability (SimPO's have no reference).
    """
    records = [r for r in records if "reward_margin" in r]  # not step 0
    if len(records) < 2:
        return

    # A single step is noisy: the mean of a tenth of them tells more.
    n = max(1, len(records) // 10)
    print(f"means over the first and the last {n} of {len(records)} steps, and what they mean:")
    for key, meaning in MEANING.items():
        values = [r[key] for r in records]
        a, b = sum(values[:n]) / n, sum(values[-n:]) / n
        print(f"  {key} {a:.3f} -> {b:.3f}: {meaning}")


def summary(c: Config, run: RunData, records: list[dict]) -> None:
    """What a person wants to know when a run ends."""
    seconds = train_sft.training_seconds(records)
    print(f"{run.draw_count} preferences in {seconds:.0f} s, "
          f"{run.draw_count / seconds:.1f} per second")
    explain(records)

    train_sft.print_held_out(records, (
        ("val_reward_accuracy", "held out: reward accuracy", ".3f"),
        ("val_reward_margin", "held out: margin", ".3f"),
        ("val_logp_accuracy", "held out: chosen likelier than rejected", ".3f"),
        ("val_loss", "held out: loss", ".4f")))
    print(f"checkpoint in {c.output_dir}; next:\n  python eval.py chat --model {c.output_dir}")


# ---- skip on a first reading: recipes, flags and main --------------------------------------------

# The settings each paper reports; anything it leaves out keeps our default.
RECIPES = {
    # DeepSeek LLM (arXiv:2401.02954; it also uses warmup, of unstated length)
    "deepseek": {"learning_rate": 5e-6, "schedule": "cosine", "batch_size": 512, "epochs": 1},
    # Steel-LLM (arXiv:2502.06635); the warmup stands in its repository's yaml only
    "steel-llm": {"beta": 0.1, "learning_rate": 5e-6, "batch_size": 128, "epochs": 3,
                  "warmup": 0.1},
    # Tulu 3 8B (arXiv:2411.15124), and the command its authors document in open-instruct
    "tulu3": {"length_normalize": True, "beta": 5.0, "learning_rate": 5e-7, "schedule": "linear",
              "warmup": 0.1, "weight_decay": 0.0, "batch_size": 128, "epochs": 1,
              "max_length": 2048},
}


def check_preferences(c: Config) -> None:
    """Raise InputError for preference flags that make no sense; fill in defaults."""
    check_common(c)
    check(c.label_smoothing < 0.5, f"--label_smoothing not in [0, 0.5): {c.label_smoothing}")
    for name, loss in (("label_smoothing", "sigmoid"), ("simpo_gamma", "simpo")):
        check(c.loss == loss or getattr(c, name) == getattr(Config, name),
              f"--{name} goes with --loss {loss}")
    check(c.loss != "simpo" or not c.reference, "--loss simpo takes no --reference")
    check(not c.recipe or c.loss == "sigmoid", f"--recipe {c.recipe} is for --loss sigmoid")

    # Each loss has its own scale: a sum is some hundred times a mean.
    if c.length_normalize is None:
        c.length_normalize = c.loss in ("ipo", "simpo")
    per_token = c.loss == "sigmoid" and c.length_normalize
    c.beta = c.beta or {"simpo": 2.0}.get(c.loss, 5.0 if per_token else 0.1)


def check_common(c) -> None:
    """Raise InputError for what makes no sense in the labs that train like this either."""
    check(not c.eot, "--eot is for train_sft.py, which gives the token its meaning")
    check(not (c.context or c.rope_scaling), "--context and --rope_scaling are for train_sft.py")
    check(c.max_length >= 4, f"--max_length must be 4 or more, is {c.max_length}")


def find_demo(c):
    """labs/world.py if this is the built-in demo, whose files must be there; else None."""
    if c.data != ["out/demo/pairs.jsonl"]:
        return None
    world = train_sft.import_world()
    for path in (f"{c.model}/tokenizer.json", *c.data):
        check(Path(path).exists(), f"the demo continues from the checkpoint in {c.model}, but "
              f"{path} is missing; `python train_sft.py` makes both")
    return world


# Preferences want a smaller learning rate.
prepare = partial(train_sft.prepare, rate=5e-6)


def main() -> None:
    """Read the flags, prepare, compute the reference, train, report."""
    c = train_sft.resolve_config(Config, sys.argv[1:], RECIPES,
                                 lambda: train_sft.import_world().DPO_DEMO)
    check_preferences(c)
    find_demo(c)
    start_step, hardware = train_sft.find_start_step(c), train_sft.setup_hardware(c.dtype)
    tokenizer, run, facts = prepare(c, lambda files, tokenizer, c, quiet: load_preferences(
        files, tokenizer, c.max_length, c.skip_bad_rows, quiet), hardware)
    train_sft.forecast(c, run, hardware)
    finish("train_dpo.py", c, tokenizer, run, facts, start_step, hardware)


def finish(script: str, c: Config, tokenizer, run: RunData, facts: dict, start_step: int,
           hardware: Hardware, backward=backward_step, validate=validation) -> None:
    """The second half of `main`, labs/kto.py's too: reference, policy, training, report, exit."""
    if getattr(c, "loss", "") == "simpo":
        # SimPO has no reference: with zeros in its place its margin is the policy's alone.
        references = [torch.zeros(len(run.train), 2), torch.zeros(len(run.validation), 2)]
    else:
        references, key = reference_logprobs(c, run, hardware)
        facts["data_hashes"]["the reference"] = key

    model, wrapped = train_sft.load_trainable(c, hardware)
    train_sft.start_run(c, run.steps, facts, hardware)
    world, first, rows = find_demo(c), hardware.rank == 0, []
    if first:
        train_sft.announce(c, model, tokenizer, run.steps, hardware)

    # The demo answers the held-out questions before and after; a sharded model if all ranks ask.
    if world and not start_step and (first or c.shard):
        rows = [row for _, row in data.read_rows(c.val_data)]
        before = world.try_demo(model, tokenizer, rows)
    records, status = train(c, tokenizer, run, references, start_step, model, wrapped, hardware,
                            backward, validate)
    if first and not train_sft.ended_early(script, c, start_step, run.steps, records, hardware):
        summary(c, run, records)
        if rows:
            model = modeling.load(c.output_dir, device=hardware.device) if c.shard else model
            world.report_preferences(before, world.try_demo(model, tokenizer, rows), rows)
    hardware.leave(status)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
