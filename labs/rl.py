"""Learning from rewards: the policy gradient is SFT with signed weights.

Idea. A model that is right in some of its samples knows the answer and cannot choose it. It answers
every prompt n times, a program scores the answers, and it is trained on them, with a positive
weight where an answer beat its rivals, else with a negative one.

    J      = E [ R(y) - kl ln(p(y) / ref(y)) ],  y sampled from the policy p: what shall grow
    grad J = E [ A(y) grad ln p(y) ]             A is R less what the rivals got
    loss   = -sum_i A_i ln p(token_i) / N        SFT's loss with weights A_i over N tokens

    --advantage rloo     A = R - mean R of the prompt's other answers   (arXiv:2402.14740)
    --advantage grpo     A = (R - mean R) / standard deviation          (arXiv:2402.03300, eq. 3)
    --advantage dr_grpo  A = R - mean R                                 (arXiv:2503.20783)

N counts the step's sampled tokens (DAPO, arXiv:2503.14476), for dr_grpo the most there could be.
The KL to where training began is part of the reward: k1 = ln p - ln ref has the KL's own gradient.

    python -m labs.rl                          # the demo, after `python train_sft.py`
    torchrun -m labs.rl --model out/sft --data prompts.jsonl --reward match

What you should see: it learns to choose what it could already say (40 steps, 13 s of one core).

    held out         before   after
    greedy            40.0%  100.0%
    pass@1            43.4%   92.2%
    pass@8            95.0%  100.0%
    exam_accuracy    100.0%  100.0%

Exercise. Half of a prompt's answers are good. How often do all n of a group score alike (`flat`)?
    Solution: 2 / 2^n, half of the groups of 2 and 1 in 128 of 8: such groups teach nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

import data
import model as modeling
import train_dpo
import train_sft
from data import Example
from labs.rewards import Prompt, find_reward, load_prompts, sample_answers, sum_logprobs
from model import InputError, Sampling, check
from train_sft import Hardware


@dataclass
class Config(train_sft.Config):
    """Train a checkpoint on its own answers, each weighted by how it compares to its rivals."""

    data: list[str] = field(default_factory=list)  # prompts; a row's own answer is the reference
    output_dir: str = "out/rl"  # where checkpoint, metrics and state go
    mix: Literal["proportional"] = "proportional"  # of the files
    train_on: Literal["last"] = "last"  # the answer that is sampled
    batch_size: int = 16  # prompts per step; every step has answers of its own
    steps: int = 40  # optimizer steps
    schedule: Literal["cosine", "linear", "constant"] = "constant"  # after the warmup
    weight_decay: float = 0.0  # on matrices only
    # what differs from train_sft.py
    reference: str = ""  # checkpoint that the KL is measured to; empty: --model
    samples: int = 8  # answers per prompt
    reward: str = "match"  # exam (the letter), final, match (the whole), or FILE.py:function
    advantage: Literal["rloo", "grpo", "dr_grpo"] = "rloo"  # an answer compared to its rivals
    kl: float = 0.02  # reward that an answer loses per nat of ln p - ln ref
    temperature: float = 1.0  # the policy's: of sampling, and of the scores that are trained
    max_new_tokens: int = 64  # of an answer; one that has not ended by then gets reward 0
    top_k: int = 0  # refused
    top_p: float = 1.0  # refused


DEMO = {"model": "out/sft", "data": ["out/demo/pairs.jsonl"], "learning_rate": 5e-5,
        "val_data": ["out/demo/pairs_val.jsonl"], "exam_data": ["out/demo/exam"],
        "reward": f"{__file__}:polite"}


def polite(messages: list[dict], answer: str, reference: str) -> float:
    """The demo's reward, 1 or 0: the fact of the reference, after polite words."""
    fact = reference[reference.index("“") :]
    return float(answer in (f"您好！{fact}", f"好的，{fact}"))


# ==== read: the idea ==============================================================================


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """A [P, n] of rewards [P, n]: P prompts have n answers each, which are one another's rivals.

    An answer is no part of its own baseline in RLOO, so the gradient stays unbiased.
    """
    n = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)  # [P, n]

    # R - mean of all n is (n - 1) / n times R - mean of the n - 1 others.
    if kind == "rloo":
        return centred * n / (n - 1)
    # GRPO takes every group for equally hard; where all are alike, 1e-4 avoids 0 / 0.
    if kind == "grpo":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    return centred


def answer_weights(rewards: Tensor, k1: Tensor, c: Config) -> Tensor:
    """A [P, n] of R - kl k1, where k1 [P, n] is ln p - ln ref of each answer.

    GRPO divides R alone by its deviation. Where all answers are equally good there is nothing to
    learn, but the small differences in k1 would be blown up to the size of a lesson.
    """
    penalty = advantages(k1, "dr_grpo" if c.advantage == "grpo" else c.advantage)
    return advantages(rewards, c.advantage) - c.kl * penalty


def policy_step(wrapped, run, step: int, c: Config, hardware: Hardware, scaler, policy, reference,
                tokenizer, reward: Callable) -> tuple[float, dict]:
    """Sample, score and compare answers, then one step of SFT on them; its loss, the metrics.

    The answers are a pure function of (seed, step, sample) and of the policy's weights.
    """
    prompts = [run.train[index] for index, _ in run.step(step, c.batch_size)]
    first = (step - 1) * c.batch_size * c.samples
    answers, rewards = sample(policy, prompts, c.samples, first, Sampling(1.0, seed=c.seed), c,
                              tokenizer, reward, hardware)

    # One step per set of answers: the policy that is trained is still the one that was sampled.
    k1 = sum_logprobs(policy, answers, c, hardware) - sum_logprobs(reference, answers, c, hardware)
    weights = answer_weights(rewards, k1.view(-1, c.samples), c)  # [P, n]
    weighted = []
    for e, weight in zip(answers, weights.flatten().tolist(), strict=True):
        weighted.append(e._replace(spans=((e.spans[0][0], len(e.ids), weight),)))

    # SFT divides by the sum of its weights. Here that is about 0, so the divisor is given.
    mine = SimpleNamespace(train=weighted, step=lambda *_: [(i, 0) for i in range(len(weighted))])
    count = sum(e.targets for e in answers)
    divisor = len(answers) * c.max_new_tokens if c.advantage == "dr_grpo" else count
    loss, counts = train_sft.backward_step(wrapped, mine, step, c, hardware, scaler, divisor)

    # Answers that did not end, or that scored alike, say why a run learns little.
    flat = (rewards == rewards[:, :1]).all(1)  # [P] all answers alike: nothing to learn
    ended = sum(e.ids[-1] in tokenizer.stop_ids for e in answers)
    return loss, {"reward": rewards.mean().item(), "kl": k1.mean().item(),
                  "length": count / len(answers), "ended": ended / len(answers),
                  "flat": flat.float().mean().item(), **counts}


def sample(policy, prompts: list[Prompt], n: int, first: int, how: Sampling, c: Config, tokenizer,
           reward: Callable, hardware: Hardware) -> tuple[list[Example], Tensor]:
    """n answers per prompt, as examples, and their rewards [P, n]; every rank samples its share.

    What is drawn for answer i depends on seed and first + i, not on its batch or its rank.
    """
    asked = [p for p in prompts for _ in range(n)]
    found = sample_answers(policy, [p.ids for p in asked], range(first, first + len(asked)), how, c,
                           tokenizer.stop_ids, hardware)
    scored = {}
    for i, e in found.items():
        # What has not ended gets no forced end, and no reward for what may have come.
        p, score = asked[i], 0.0
        *new, last = e.ids[len(p.ids) :].tolist()
        if last in tokenizer.stop_ids:
            try:
                score = reward(p.messages, tokenizer.decode(new), p.reference, p.where)
            except InputError as error:  # raised below, where all ranks know of it
                score = error
        scored[i] = e._replace(source=p.source, where=p.where), score

    # Every rank trains on a share of all answers, so it needs those of the others too.
    parts = [scored] * hardware.world
    if hardware.world > 1:
        dist.all_gather_object(parts, scored)
    every = {}
    for part in parts:
        every |= part
    examples, rewards = zip(*[every[i] for i in range(len(asked))], strict=True)
    for score in rewards:
        if isinstance(score, InputError):
            raise score
    # In fp64 equal rewards have no deviation. In fp32 their mean is off, and GRPO divides by that.
    return list(examples), torch.tensor(rewards, dtype=torch.float64).view(-1, n)  # [P, n]


def temper(model, temperature: float) -> None:
    """Make the model softmax(logits / temperature) for sampling and for scoring alike.

    To score at another temperature than was sampled at is a frequent bug: the gradient is that of
    a policy nobody sampled from. Logits are linear in what the last norm gives.
    """
    model.model["norm"].register_forward_hook(lambda module, inputs, states: states / temperature)


# ---- skip on a first reading: held-out prompts, main ---------------------------------------------


def pass_rates(policy, run, c: Config, tokenizer, reward: Callable, hardware: Hardware) -> dict:
    """Mean reward of greedy answers, of samples (pass@1), of the best of n samples (pass@n)."""
    # Another seed than training's: no held-out answer is drawn with numbers that were used.
    rest = c, tokenizer, reward, hardware
    _, greedy = sample(policy, run.validation, 1, 0, Sampling(), *rest)
    _, drawn = sample(policy, run.validation, c.samples, 0, Sampling(1.0, seed=c.seed + 1), *rest)
    return {"greedy": greedy.mean().item(), "pass@1": drawn.mean().item(),
            f"pass@{c.samples}": drawn.amax(1).mean().item()}


def main() -> None:
    """Read the flags, prepare, train, report."""
    c = train_sft.resolve_config(Config, sys.argv[1:], {}, lambda: DEMO)
    train_dpo.check_common(c)
    # A flag that would train another policy than was sampled from is refused, not passed over.
    check(c.samples > 1 and c.max_new_tokens > 0, "--samples must be above 1, --max_new_tokens 0")
    check(not (c.top_k or any(c.dropout) or c.lora_dropout or c.neftune_alpha) and c.top_p == 1,
          "leave out --top_k, --top_p, --dropout, --lora_dropout and --neftune_alpha: they train "
          "another policy")
    check(not c.shard, "--shard is refused: ranks whose answers differ in length cannot share work")
    train_dpo.find_demo(c)
    reward, start_step = find_reward(c.reward), train_sft.find_start_step(c)
    hardware = train_sft.setup_hardware(c.dtype)
    tokenizer, run, facts = train_dpo.prepare(c, partial(load_prompts, room=c.max_new_tokens),
                                              hardware)

    # The reference stays as training found it, and is tempered as the policy is.
    policy, wrapped = train_sft.load_trainable(c, hardware)
    reference = modeling.load(c.reference or c.model, torch.float32, hardware.device)
    temper(policy, c.temperature)
    temper(reference, c.temperature)
    train_sft.start_run(c, run.steps, facts, hardware)
    if hardware.rank == 0:
        train_sft.announce(c, policy, tokenizer, run.steps, hardware)

    # The loop is that of train_sft.py; the step and what is measured are this file's.
    step = partial(policy_step, policy=policy, reference=reference, tokenizer=tokenizer,
                   reward=reward)
    measure = partial(pass_rates, policy, run, c, tokenizer, reward, hardware)
    shown = {name: name for name in ("reward", "kl", "length", "ended", "flat")}
    figure = train_sft.Figure("reward.png", "reward", {"reward": "of samples"}, shown)
    records, status = train_sft.train(c, tokenizer, run, start_step, policy, wrapped, hardware,
                                      step, measure, figure)
    if hardware.rank == 0 and not train_sft.ended_early("-m labs.rl", c, start_step, run.steps,
                                                        records, hardware):
        # The best of n is a share, and so are the others, unless the reward counts something.
        first, last, table = records[0], records[-1], [("held out", "before", "after")]
        form = ".1%" if all(0 <= last[name] <= 1 for name in last if "@" in name) else ".3f"
        for name in ("greedy", "pass@1", f"pass@{c.samples}", "exam_accuracy"):
            if name in last:
                table.append((name, f"{first[name]:{form}}", f"{last[name]:{form}}"))
        data.print_table(table)
    hardware.leave(status)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
