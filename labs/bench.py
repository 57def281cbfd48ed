"""Speed of the training steps and of the exam, each beside a bare loop.

    python -m labs.bench                    # SFT, DPO and the exam, ours and the bare loop in turn
    python -m labs.bench --only dpo         # one of them: sft, dpo, exam
    python -m labs.bench --dtype bf16       # the products of both loops in 16 bit
    python -m labs.bench --tiny --steps 1   # a small model, only to try the commands

Beside each stands what a careful engineer writes around transformers' Llama: examples end to end,
one attention call per example, the LM head at supervised positions only, a prompt encoded once for
both answers (an exam's shots once for all questions), a reference known before. Both run the same
random model on the same random tokens, in lengths as chats have them. Speed counts a prompt once.

Two x86-64 cores, --dtype bf16, 50M parameters (of the exam 3M too), ours over bare:

    SFT 1.23, 1.24, 1.28    DPO 1.20, 1.12, 1.17    exam 1.17, 1.41 (3M), 1.18, 1.23 (50M)

Exercise. Both loops use torch's kernels. Where can ours be faster?
    Solution: fewer casts, passes over logits and norms; fp32 attention where 16 bits are slower.
"""

import random
import sys
import time
from dataclasses import dataclass
from typing import Literal

import model as modeling  # isort: skip  # before torch: it says how threads wait
import numpy as np
import torch
from torch.nn import functional as F

import data
import eval as evaluation
import train_dpo
import train_sft
from model import check

BETA = 0.01  # of DPO, whose margins are large here
SIZE = {"sft": 8, "dpo": 4, "exam": 1}  # rows, pairs or subjects per step
LETTERS = (5, 6, 7, 8)  # token ids of an exam's options
LARGE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
SMALL = {**LARGE, "vocab_size": 6400, "hidden_size": 192, "num_attention_heads": 6,
         "intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 3}


@dataclass
class Config:
    """Compare the speed of the training steps and of the exam with that of bare loops."""

    only: Literal["", "sft", "dpo", "exam"] = ""  # one comparison instead of all
    steps: int = 8  # timed steps of each loop
    micro_tokens: int = 2048  # tokens per forward pass of both loops
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products
    tiny: bool = False  # a small model, to try the commands


# ==== read: the two loops =========================================================================
#
# An item is a tree: its trunk and its branches, each (ids, what is asked for there). An example is
# a trunk alone, a pair is a prompt with two answers, a subject is its shots with all questions.


def our_step(items: list, model, optimizer, task: str, config, hardware) -> float:
    """A step of the trainers' own parts; returns its loss, of an exam the letters' mean ln p."""
    if task == "exam":
        (shots, _), *questions = items[0]
        prompts = [[*shots.tolist(), *ids.tolist()] for ids, _ in questions]
        with torch.no_grad(), hardware.autocast():
            scores = evaluation.score_options(model.eval(), prompts, list(zip(LETTERS)), 8192)
        return scores.mean().item()

    # A run of one step, which draws every item once.
    examples = []
    for (ids, spans), *answers in items:
        examples.append(train_dpo.Preference(ids, answers) if answers else data.Example(ids, spans))
    run = train_sft.RunData(examples, [], data.Mixer([len(items)], np.ones(1), 0), len(items), 1)
    scaler, reference = hardware.make_scaler(), torch.zeros(len(items), 2)
    rest = 1, config, hardware, scaler
    if task == "sft":
        loss, _ = train_sft.backward_step(model, run, *rest)
    else:
        loss = train_dpo.backward_step(model, run, reference, *rest)["loss"]
    train_sft.clip_and_step(model, optimizer, scaler, config, loss, run, 1)
    return loss


def lay_out(trees: list[list]) -> tuple[list, list, list, list]:
    """Of texts end to end: ids, positions, attention's spans, from where a token is asked for."""
    ids, positions, spans, asked = [], [], [], []
    for tree in trees:
        root, size = len(ids), len(tree[0][0])
        for k, (part, wanted) in enumerate(tree):
            start, before = len(ids), size if k else 0
            ids += part.tolist()
            positions += range(before, before + len(part))
            for first, end, _ in wanted:
                asked += range(start + first - 1, start + end - 1)

            # The first branch goes on with the trunk as one text; another sees both apart.
            if k > 1:
                spans.append((slice(root, root + size), slice(start, len(ids))))
            elif k or len(tree) == 1:
                spans.append((None, slice(root, len(ids))))
    return ids, positions, spans, asked


def attend_spans(module, q, k, v, mask, scaling=None, spans=(), **_):
    """One attention call per span (slice of the trunk or None, its own), of [1, heads, T, Dh]."""
    out = []
    for trunk, own in spans:
        keys, values, mask, length = k[:, :, own], v[:, :, own], None, own.stop - own.start

        # A branch sees all of its trunk, and of itself what came before.
        if trunk is not None:
            keys = torch.cat((k[:, :, trunk], keys), 2)
            values = torch.cat((v[:, :, trunk], values), 2)
            size = keys.shape[2]
            mask = torch.ones(length, size, dtype=torch.bool, device=q.device).tril(size - length)
        out.append(F.scaled_dot_product_attention(
            q[:, :, own], keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2), None


def bare_model(model, settings: dict):
    """transformers' Llama with the weights of a model of ours, and attention per span."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    # Attention is ours, so the model must be kept from making masks for its own.
    AttentionInterface.register("spans", attend_spans)
    AttentionMaskInterface.register("spans", lambda *_, **__: None)
    config = LlamaConfig(**settings, attn_implementation="spans", tie_word_embeddings=False)
    bare = LlamaForCausalLM(config).to(model.device).train()
    bare.load_state_dict(model.state_dict())
    return bare


def bare_logits(trees: list, model, hardware) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in fp32 [N, V] of all tokens that are asked for, and these tokens [N]."""
    *flat, spans, asked = lay_out(trees)
    ids, positions = torch.tensor(flat, device=hardware.device)[:, None]  # [1, T] each
    with hardware.autocast():
        states = model.model(input_ids=ids, position_ids=positions, use_cache=False,
                             spans=spans).last_hidden_state[0]  # [T, D]
        return model.lm_head(states[asked]).float(), ids[0].roll(-1)[asked]


def bare_step(items: list, model, optimizer, task: str, config, hardware) -> float:
    """As `our_step`."""
    if task == "exam":
        with torch.no_grad():
            logits, _ = bare_logits(items, model, hardware)  # [questions, V]
        return logits.log_softmax(-1)[:, LETTERS].mean().item()

    # SFT's loss is a mean over the tokens of the step, DPO's over its pairs.
    count, total = len(items) if task == "dpo" else len(lay_out(items)[3]), 0.0
    for chunk in data.micro_batches(list(map(tokens, items)), config.micro_tokens)[0]:
        logits, targets = bare_logits([items[i] for i in chunk], model, hardware)
        losses = F.cross_entropy(logits, targets, reduction="none")  # [N]
        if task == "dpo":
            lengths = [len(ids) - 1 for i in chunk for ids, _ in items[i][1:]]
            sums = torch.stack([part.sum() for part in losses.split(lengths)])
            chosen, rejected = sums.view(-1, 2).T  # -ln p, [B] each
            losses = -F.logsigmoid(BETA * (rejected - chosen))
        loss = losses.sum() / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


# ==== read: the comparison ========================================================================


def tokens(tree: list) -> int:
    """Tokens of an item: a trunk counts once."""
    return sum(len(ids) for ids, _ in tree)


def rows(task: str, vocabulary: int, count: int) -> list:
    """So many items of random tokens: examples, preference pairs, or shots with 24 questions."""
    rng, trees = random.Random(0), []
    for _ in range(count):
        sizes = [800, *(rng.randint(40, 160) for _ in range(24))]
        if task != "exam":
            sizes = [min(int(rng.lognormvariate(4.7, 0.8)) + 4, 500) for _ in range(3)]

        # Of an answer all tokens are asked for, of a question the one that would come after it.
        tree = []
        for n in sizes:
            ids = np.array(rng.choices(range(vocabulary), k=n), np.int32)
            wanted = {"sft": (n // 4, n, 1.0), "dpo": (1, n, 1.0), "exam": (n, n + 1, 1.0)}[task]
            tree.append((ids, (wanted,)))
        trees.append(tree[:1] if task == "sft" else [(tree[0][0], ()), *tree[1:]])
    return trees


def compare(task: str, settings: dict, c: Config, hardware: train_sft.Hardware) -> None:
    """Print the speed of both loops, which take their steps in turn."""
    model = modeling.Llama(modeling.read_config({"model_type": "llama", **settings}))
    model.initialize(0)
    bare = bare_model(model.to(hardware.device).train(), settings)
    kind = train_dpo.Config if task == "dpo" else train_sft.Config
    config = kind(micro_tokens=c.micro_tokens, learning_rate=1e-4)
    config.beta = BETA
    adam = torch.optim.AdamW(bare.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.0, fused=True)
    loops = {"ours": (our_step, model, train_sft.make_optimizer(model, config)),
             "bare": (bare_step, bare, adam)}

    size, seconds = SIZE[task], {name: [] for name in loops}
    items = rows(task, settings["vocab_size"], size * (c.steps + 1))
    for first in range(0, len(items), size):
        found = []
        for name, (step, *trained) in loops.items():
            began = time.perf_counter()
            found.append(step(items[first : first + size], *trained, task, config, hardware))
            if hardware.device.type == "cuda":
                torch.cuda.synchronize()  # the GPU has then done its work
            seconds[name].append(time.perf_counter() - began)

        # A speed counts only if both compute the same.
        limit = 1e-3 if hardware.dtype == torch.float32 else 0.05
        check(abs(found[0] - found[1]) < limit * abs(found[1]), f"the loops differ: {found}")

    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{task}, {c.steps} steps of {size}: {count:.1f}M parameters, {hardware.dtype}, "
          f"{hardware.device}, {torch.get_num_threads()} threads")

    # The first step warms up.
    total = sum(map(tokens, items[size:]))
    spent = {name: np.array(times[1:]) for name, times in seconds.items()}
    for name, times in spent.items():
        print(f"  {name:8}{total / times.sum():9.0f} tokens per second")

    # A median of the steps' ratios forgives a moment in which the machine was busy.
    ratio = np.median(spent["bare"] / spent["ours"])
    print(f"  ours is {ratio:.2f} times as fast (median of the steps)", flush=True)


def main(c: Config) -> None:
    """The comparisons that are asked for."""
    check(c.steps > 0 and c.micro_tokens > 0, "--steps and --micro_tokens must be 1 or more")
    hardware = train_sft.setup_hardware(c.dtype)
    for task, settings in (("sft", LARGE), ("dpo", LARGE), ("exam", SMALL), ("exam", LARGE)):
        if c.only in ("", task):
            compare(task, SMALL if c.tiny else settings, c, hardware)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
