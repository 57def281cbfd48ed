"""Speed of the training steps and of the exam, each beside a bare loop.

    python -m labs.bench                    # SFT, DPO and the exam, ours and the bare loop in turn
    python -m labs.bench --only dpo         # one of them: sft, dpo, exam
    python -m labs.bench --dtype bf16       # the products of both loops in 16 bit
    python -m labs.bench --tiny --steps 1   # a toy model, only to try the commands

A speed means little without another beside it. The other is what a careful engineer writes around
transformers' Llama in an evening: examples end to end, one attention call per example, the LM head
at supervised positions only, a prompt encoded once for both answers (an exam's shots once for all
questions), a reference that was computed before. Both run the same random model on the same
random tokens, in lengths as chat data has them: many short ones, a few long ones. Speed counts
tokens, and a prompt once. What a step takes of memory, labs/memory.py says.

Two x86-64 cores, --dtype bf16 --steps 6, 50M parameters (of the exam 3M too), ours over bare:

    SFT 1.05    DPO 1.03    exam 1.13 (3M), 1.10 (50M)    in fp32 the exam 1.22 and 1.08

Exercise. Both loops use the same kernels. Where can ours be faster?
    Solution: only by doing less. Fewer casts and passes over the logits, norms in half the passes.
"""

import random
import sys
import time
from dataclasses import dataclass
from typing import Literal

import model as modeling  # isort: skip  # before torch: it says how threads wait
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import data
import eval as evaluation
import train_dpo
import train_sft
from model import check

BETA = 0.01  # of DPO, whose margins are large here
SIZE = {"sft": 8, "dpo": 4, "exam": 1}  # rows, pairs or subjects per step
LETTERS = (5, 6, 7, 8)  # token ids of an exam's options
LARGE = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
SMALL = {**LARGE, "vocab_size": 6400, "hidden_size": 192, "num_attention_heads": 6,
         "intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 3}
TINY = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
        "num_key_value_heads": 1}


@dataclass
class Config:
    """Compare the speed of the training steps and of the exam with that of bare loops."""

    only: Literal["", "sft", "dpo", "exam"] = ""  # one comparison instead of all
    steps: int = 8  # timed steps of each loop
    micro_tokens: int = 2048  # tokens per forward pass of both loops
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products
    tiny: bool = False  # a toy model, to try the commands


# ==== read: the two loops =========================================================================


def new_model(settings: dict, device) -> modeling.Llama:
    """A random model, the same every time."""
    model = modeling.Llama(modeling.read_config(settings))
    model.initialize(0)
    return model.to(device).train()


class Ours:
    """The project's own step: `backward_step` and `clip_and_step` of its trainers."""

    def __init__(self, settings: dict, task: str, c: Config, hardware: train_sft.Hardware):
        self.hardware, self.model = hardware, new_model(settings, hardware.device)
        kind = train_dpo.Config if task == "dpo" else train_sft.Config
        self.task, self.config = task, kind(micro_tokens=c.micro_tokens, learning_rate=1e-4)
        self.config.beta = BETA
        self.optimizer = train_sft.make_optimizer(self.model, self.config)
        self.scaler = hardware.make_scaler()

    def step(self, items: list) -> float:
        """One optimizer step; returns the loss. Or a subject's questions; returns a mean ln p."""
        if self.task == "exam":
            return self.score(*items)
        mixer = data.Mixer([len(items)], np.ones(1), 0)
        run = train_sft.RunData(items, [], mixer, len(items), 1)
        rest = 1, self.config, self.hardware, self.scaler
        if self.task == "sft":
            loss, _ = train_sft.backward_step(self.model, run, *rest)
        else:
            zeros = torch.zeros(len(items), 2)  # in the reference's place
            loss = train_dpo.backward_step(self.model, run, zeros, *rest)["loss"]
        train_sft.clip_and_step(self.model, self.optimizer, self.scaler, self.config, loss, run, 1)
        return loss

    @torch.no_grad()
    def score(self, subject: train_dpo.Preference) -> float:
        """The mean ln p of the letters, as eval.py computes them."""
        shots = subject.prompt.tolist()
        prompts = [shots + question.tolist() for question, _ in subject.answers]
        options = [(letter,) for letter in LETTERS]
        with self.hardware.autocast():
            scores = evaluation.score_options(self.model.eval(), prompts, options, 8192)
        return scores.mean().item()


def lay_out(trees: list[list]) -> tuple[list, list, list, list]:
    """ids and positions of texts end to end, attention's spans, where every part begins.

    A tree is a trunk and its branches. The first branch goes on with the trunk as one text; each
    other one sees the trunk and itself: span (slice of the trunk or None, its own slice).
    """
    ids, positions, spans, starts = [], [], [], []
    for trunk, *branches in trees:
        root, size = len(ids), len(trunk)
        for k, part in enumerate([trunk, *branches]):
            starts.append(len(ids))
            ids += part
            positions += range(size if k else 0, size + len(part) if k else size)
            if k > 1:
                spans.append((slice(root, root + size), slice(starts[-1], len(ids))))
            elif k or not branches:
                spans.append((None, slice(root, len(ids))))
    return ids, positions, spans, starts


def attend_spans(module, q, k, v, mask, scaling=None, spans=(), **_):
    """One attention call per span, for transformers' models: [1, heads, T, Dh] each."""
    out = []
    for before, own in spans:
        seen = [t[:, :, own] for t in (k, v)]
        mask, length = None, own.stop - own.start
        if before is not None:
            seen = [torch.cat((t[:, :, before], x), 2) for t, x in zip((k, v), seen, strict=True)]
            size = seen[0].shape[2]
            mask = torch.ones(length, size, dtype=torch.bool, device=q.device).tril(size - length)
        out.append(F.scaled_dot_product_attention(
            q[:, :, own], *seen, attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2), None


class Bare:
    """transformers' model on examples end to end, the LM head where a token is wanted."""

    def __init__(self, settings: dict, task: str, c: Config, hardware: train_sft.Hardware):
        from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register("spans", attend_spans)
        AttentionMaskInterface.register("spans", lambda *_, **__: None)
        named = {**{k: v for k, v in settings.items() if k != "model_type"},
                 "attn_implementation": "spans", "tie_word_embeddings": False}
        self.task, self.hardware, self.micro_tokens = task, hardware, c.micro_tokens
        self.model = LlamaForCausalLM(LlamaConfig(**named)).to(hardware.device).train()
        self.model.load_state_dict(new_model(settings, hardware.device).state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)

    def logits(self, trees: list[list], asked: list[list]) -> Tensor:
        """Scores in fp32 [N, V] of what follows the tokens `asked` of every part."""
        *flat, spans, starts = lay_out(trees)
        at = [start + t for start, own in zip(starts, asked, strict=True) for t in own]
        ids, positions = (torch.tensor([x], device=self.hardware.device) for x in flat)
        with self.hardware.autocast():
            states = self.model.model(input_ids=ids, position_ids=positions, use_cache=False,
                                      spans=spans).last_hidden_state[0]  # [T, D]
            return self.model.lm_head(states[at]).float()

    def logprobs(self, items: list) -> Tensor:
        """ln p of the supervised tokens of all items [N]."""
        trees, asked, targets = [], [], []
        for item in items:
            parts = [(item.prompt, ()), *item.answers] if self.task == "dpo" else [item[:2]]
            trees.append([ids.tolist() for ids, _ in parts])
            for ids, spans in parts:
                places = [t for first, end, _ in spans for t in range(first, end)]
                asked.append([t - 1 for t in places])
                targets += ids[places].tolist()
        logits = self.logits(trees, asked)
        targets = torch.tensor(targets, device=logits.device)
        return -F.cross_entropy(logits, targets, reduction="none")

    @torch.no_grad()
    def score(self, subject: train_dpo.Preference) -> float:
        """The mean ln p of the letters: every question is a branch of the shots."""
        tree = [subject.prompt.tolist(), *(question.tolist() for question, _ in subject.answers)]
        last = [[len(question) - 1] for question in tree[1:]]
        logits = self.logits([tree], [[], *last])  # [questions, V]
        return logits.log_softmax(-1)[:, LETTERS].mean().item()

    def step(self, items: list) -> float:
        """As that of `Ours`."""
        if self.task == "exam":
            return self.score(*items)
        total, targets = 0.0, sum(e.targets for e in items)
        for chunk in data.micro_batches(list(map(tokens, items)), self.micro_tokens)[0]:
            some = [items[i] for i in chunk]
            logp = self.logprobs(some)  # [N]
            if self.task == "sft":
                loss = -logp.sum() / targets
            else:
                counts = [n for p in some for n in p.answer_tokens]
                sums = [part.sum() for part in logp.split(counts)]
                chosen, rejected = torch.stack(sums).view(-1, 2).T  # [B] each
                loss = -F.logsigmoid(BETA * (chosen - rejected)).sum() / len(items)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


# ==== read: the comparison ========================================================================


def tokens(item) -> int:
    """Tokens of an example, or of a prompt with its branches."""
    return len(item.ids) if isinstance(item, data.Example) else item.tokens


def rows(task: str, vocabulary: int, count: int) -> list:
    """So many rows of random tokens: examples, preference pairs, or shots with 24 questions."""
    rng, out = random.Random(0), []
    for _ in range(count):
        sizes = [800, *(rng.randint(40, 160) for _ in range(24))]
        if task != "exam":
            sizes = [min(int(rng.lognormvariate(4.7, 0.8)) + 4, 500) for _ in range(3)]
        ids = [np.array(rng.choices(range(vocabulary), k=n), dtype=np.int32) for n in sizes]
        if task == "sft":
            out.append(data.Example(ids[0], ((len(ids[0]) // 4, len(ids[0]), 1.0),)))
        else:
            answers = tuple((part, ((1, len(part), 1.0),)) for part in ids[1:])
            out.append(train_dpo.Preference(ids[0], answers))
    return out


def now() -> float:
    """The time, when the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(task: str, settings: dict, c: Config, hardware: train_sft.Hardware) -> None:
    """Print the speed of both loops, in turn; the first step warms up."""
    size = SIZE[task]
    items = rows(task, settings["vocab_size"], size * (c.steps + 1))
    loops = {"ours": Ours(settings, task, c, hardware), "bare": Bare(settings, task, c, hardware)}
    seconds, total = {name: 0.0 for name in loops}, sum(map(tokens, items[size:]))
    for first in range(0, len(items), size):
        found = []
        for name, loop in loops.items():
            began = now()
            found.append(loop.step(items[first : first + size]))
            seconds[name] += (now() - began) * (first > 0)
        limit = 1e-3 if hardware.dtype == torch.float32 else 0.05
        check(abs(found[0] - found[1]) < limit * abs(found[1]), f"the loops differ: {found}")

    count = sum(p.numel() for p in loops["ours"].model.parameters()) / 1e6
    print(f"{task}, {c.steps} steps of {size}: {count:.1f}M parameters, {hardware.dtype}, "
          f"{hardware.device}, {torch.get_num_threads()} threads")
    for name, spent in seconds.items():
        print(f"  {name:8}{total / spent:9.0f} tokens per second")
    print(f"  ours is {seconds['bare'] / seconds['ours']:.2f} times as fast", flush=True)


def main(c: Config) -> None:
    """The comparisons that are asked for."""
    check(c.steps > 0 and c.micro_tokens > 0, "--steps and --micro_tokens must be 1 or more")
    hardware = train_sft.setup_hardware(c.dtype)
    for task, settings in (("sft", LARGE), ("dpo", LARGE), ("exam", SMALL), ("exam", LARGE)):
        if c.only in ("", task):
            compare(task, TINY if c.tiny else settings, c, hardware)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:])))
