"""RLHF whole: a reward model from pairs, a critic, PPO against the reward; and DPO beside it.

Idea. labs/reward_model.py learns from comparisons a score r of an answer. A policy is trained to
get high scores without moving far from where it began, the reference:

    token rewards  r_t = -kl (ln p_t - ln ref_t), and r(answer) on top at the last token
    critic         V_t guesses what is still to come;  d_t = r_t + gamma V_(t+1) - V_t
    advantage      A_t = sum_l (gamma lambda)^l d_(t+l)    GAE (arXiv:1506.02438, eq. 16)
    policy         loss = mean of -min(ratio A, clip(ratio, 1 - e, 1 + e) A), ratio = p_t / old p_t

labs/rl.py takes one step per set of answers. PPO (arXiv:1707.06347) takes several. By them the
policy leaves the one that was sampled: the ratio corrects for that, the clip ends what a token can
teach. The critic says *which* token was good. Four models in all; DPO has two, and samples nothing.

    python -m labs.reward_model; python -m labs.ppo     # the demo, after train_sft.py, train_dpo.py
    python -m labs.ppo --model out/sft --data pairs.json --beside out/dpo

What you should see: PPO gets more of the reward for more KL (means of five --seed of both, with one
reward model; their deviations are at most 0.01 in reward, 0.03 in KL).

    held out    reward   order    exam    KL  seconds of training
    out/sft      -0.03   52.5%  100.0%  0.00
    out/ppo       0.46  100.0%  100.0%  0.81  19
    out/dpo       0.37   97.5%  100.0%  0.53   2

Exercise. Let gamma be 1. What is A_t at lambda = 1, what at lambda = 0?
    Solution: all rewards from t on less V_t, the critic a mere baseline; d_t, the critic believed.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import data
import model as modeling
import train_dpo
import train_sft
from labs import reward_model
from model import check
from train_sft import Hardware


@dataclass
class Config(train_sft.Config):
    """Train a policy by PPO against a reward model."""

    data: list[str] = field(default_factory=list)  # preference files, whose prompts are answered
    output_dir: str = "out/ppo"  # where checkpoint, metrics and state go
    train_on: Literal["last"] = "last"  # the answer that is sampled
    batch_size: int = 64  # prompts per step; every step has answers of its own
    steps: int = 30  # sets of answers
    schedule: Literal["cosine", "linear", "constant"] = "constant"  # after the warmup
    weight_decay: float = 0.0  # on matrices only
    # what differs from train_sft.py
    reward_model: str = "out/reward"  # a sequence classifier with one label: labs/reward_model.py
    passes: int = 4  # optimizer steps on each set of answers
    clip: float = 0.2  # e, how far a ratio may move before its token teaches nothing more
    kl: float = 0.05  # reward that a token loses per nat of ln p - ln ref
    gamma: float = 1.0  # what a reward is worth one token earlier
    gae_lambda: float = 0.95  # 1: rewards as they came; 0: all but the next is the critic's word
    critic_weight: float = 0.1  # of the critic's loss beside the policy's
    max_new_tokens: int = 64  # of an answer; one that has not ended counts as the set's worst
    beside: list[str] = field(default_factory=list)  # checkpoints to compare with, such as DPO's


DEMO = {"model": "out/sft", "data": ["out/demo/pairs.jsonl"], "learning_rate": 5e-5,
        "val_data": ["out/demo/pairs_val.jsonl"], "exam_data": ["out/demo/exam"],
        "beside": ["out/dpo"]}

# ==== read: PPO ===================================================================================


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """A [n] of an answer's n tokens from rewards and values [n] (arXiv:1506.02438, eq. 16)."""
    later = torch.cat((values[1:], values.new_zeros(1)))  # [n] V_(t+1); after the end comes nothing
    out = rewards + gamma * later - values  # [n] d_t
    # The sum over l, from the last token backwards: A_t = d_t + gamma lambda A_(t+1).
    for t in reversed(range(len(out) - 1)):
        out[t] += gamma * lam * out[t + 1]
    return out


def clipped_loss(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A) [N] of ln p, new and old (1707.06347, eq. 7)."""
    ratio = (new - old).exp()  # [N]
    # Where a token has moved further than e the right way its gradient is 0; the wrong way, whole.
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class Models(NamedTuple):
    """Policy and critic are trained; the critic begins as the reward model (as InstructGPT's)."""

    policy: modeling.Llama
    critic: reward_model.Scalar
    reward: reward_model.Scalar
    reference: modeling.Llama


class Answers(NamedTuple):
    """A set of n sampled answers of N tokens in all, and what the four models said of them."""

    batches: list[data.Batch]
    counts: list[int]  # [n] tokens of each answer
    old: Tensor  # [N] ln p of the policy that wrote them
    k1: Tensor  # [N] ln p - ln ref
    values: Tensor  # [N] the critic's, before each token
    rewards: Tensor  # [n] r of each answer


@torch.no_grad()
def draw(models: Models, pairs: list, first: int, c, stop_ids, hardware: Hardware) -> Answers:
    """An answer to each pair's prompt, read by all four models."""
    examples = reward_model.sample(models.policy, pairs, first, c.seed, c, stop_ids, hardware)
    rewards = reward_model.rewards_of(models.reward, examples, c, stop_ids, hardware)  # [n]

    # What the others say of each token, in the micro-batches that every pass will use again.
    batches, order, found = [], [], []
    for chunk in data.micro_batches([len(e.ids) for e in examples], c.micro_tokens)[0]:
        b = data.collate([examples[i] for i in chunk], hardware.device)
        with hardware.autocast():
            old = models.policy(b.ids, b.lengths, b.targets)
            ref = models.reference(b.ids, b.lengths, b.targets)
            values = models.critic.values(b.ids, b.lengths, b.targets - 1)
        found.append(torch.stack((old, ref, values)))  # [3, its tokens]
        batches.append(b)
        order += chunk
    old, ref, values = torch.cat(found, 1)  # [N] each
    counts = [examples[i].targets for i in order]
    return Answers(batches, counts, old, old - ref, values, rewards[order].to(old.device))


def lessons(answers: Answers, c: Config) -> tuple[Tensor, Tensor]:
    """(A, V + A) [N]: how good each token was, and what the critic should have said before it."""
    parts = []
    for k1, values, r in zip(answers.k1.split(answers.counts),
                             answers.values.split(answers.counts), answers.rewards, strict=True):
        rewards = -c.kl * k1  # [tokens of the answer]
        rewards[-1] += r
        parts.append(gae(rewards, values, c.gamma, c.gae_lambda))

    # Rewards have any scale. With mean 0 and deviation 1 over the set, a step's size has none.
    a = torch.cat(parts)  # [N]
    deviation = a.std() if len(a) > 1 else 0.0  # of one token alone it would be NaN
    return (a - a.mean()) / (deviation + 1e-8), answers.values + a


def ppo_pass(models: Models, answers: Answers, taught: tuple, c, hardware: Hardware, scaler):
    """Gradients of clipped loss + critic_weight (V - return)^2 / 2; returns both and `clipped`.

    All are means over N; `clipped` is the share of tokens whose ratio left the clip.
    """
    sizes, sums = [len(b.targets) for b in answers.batches], torch.zeros(3)
    columns = torch.stack((answers.old, *taught)).split(sizes, 1)  # [3, N of the micro-batch] each
    for b, (old, advantage, returns) in zip(answers.batches, columns, strict=True):
        with hardware.autocast():
            new = models.policy(b.ids, b.lengths, b.targets)
            values = models.critic.values(b.ids, b.lengths, b.targets - 1)

        # Every token of the set counts alike, in whichever micro-batch it stands.
        policy = clipped_loss(new, old, advantage, c.clip).sum() / sum(sizes)
        critic = ((values - returns) ** 2).sum() / (2 * sum(sizes))
        scaler.scale(policy + c.critic_weight * critic).backward()
        outside = (((new - old).exp() - 1).abs() > c.clip).sum() / sum(sizes)
        sums += torch.stack((policy, critic, outside)).detach().cpu()
    return dict(zip(("loss", "critic_loss", "clipped"), sums.tolist(), strict=True))


def train(c: Config, tokenizer, run, models: Models, start_step: int, hardware: Hardware):
    """The loop: answers, a few passes over them, and again; its records and exit status."""
    both = nn.ModuleDict({"policy": models.policy, "critic": models.critic})
    both.device = hardware.device
    optimizer, scaler = train_sft.make_optimizer(both, c), hardware.make_scaler()
    if start_step:
        train_sft.load_state(Path(c.output_dir) / train_sft.STATE, both, optimizer, scaler)
    log = train_sft.Log(c, start_step, run.steps, hardware, train_sft.Figure(
        "reward.png", "reward", {"reward": "samples"}, {"reward": "reward", "kl": "kl"}))

    signals = train_sft.catch_signals()
    for step in range(start_step + 1, run.steps + 1):
        began, rate = time.perf_counter(), train_sft.learning_rate_at(step, run.steps, c)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pairs = [run.train[i] for i, _ in run.step(step, c.batch_size)]
        answers = draw(models, pairs, (step - 1) * c.batch_size, c, tokenizer.stop_ids, hardware)
        taught = lessons(answers, c)

        # In the first pass every ratio is 1; from then on the clip holds them.
        for _ in range(c.passes):
            losses = ppo_pass(models, answers, taught, c, hardware, scaler)
            norm = train_sft.clip_and_step(both, optimizer, scaler, c, losses["loss"], run, step)
        n, tokens = len(pairs), sum(len(b.ids) for b in answers.batches)
        log.write({"step": step, "epoch": step * c.batch_size / run.mixer.size, **losses,
                   "learning_rate": rate, "grad_norm": norm, "length": len(answers.old) / n,
                   "reward": answers.rewards.mean().item(), "kl": answers.k1.sum().item() / n,
                   "tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - began)})

        # The critic is needed to go on, but is no part of the checkpoint.
        stop = signals[:1]  # what comes later than this is not saved
        if stop or train_sft.is_due(c.save_every, step, run.steps):
            train_sft.save_run(c, tokenizer, models.policy, optimizer, scaler, step, hardware, both)
        if stop and step < run.steps:
            return log.close(), 128 + stop[0]
    train_sft.release_signals()
    return log.close(), 0


# ---- skip on a first reading: main ---------------------------------------------------------------


def main() -> None:
    """Read the flags, prepare, train, compare."""
    c = train_sft.resolve_config(Config, sys.argv[1:], {}, lambda: DEMO)
    train_dpo.check_common(c)
    # What would sample from another policy than is trained is refused, not passed over.
    check(c.passes and max(c.gamma, c.gae_lambda) <= 1,
          "--passes must be at least 1, --gamma and --gae_lambda at most 1")
    unread = c.neftune_alpha, c.exam_every, c.eval_every, c.lora_rank, c.keep
    check(not any((*c.dropout, *unread)), "--dropout, --neftune_alpha, --exam_every, --eval_every, "
          "--lora_rank and --keep are not for labs.ppo")
    train_dpo.find_demo(c)
    modeling.check_output("--output_dir", c.output_dir, train_sft.input_folders(c.beside))
    start_step, hardware = train_sft.find_start_step(c), train_sft.setup_hardware(c.dtype)
    check(hardware.world == 1, "labs.ppo runs in one process, without torchrun")
    tokenizer, run, facts = train_dpo.prepare(c, reward_model.load_pairs, hardware)
    for folder in (c.reward_model, *c.beside):
        tokenizer.check_reader(folder)
    check(run.validation or not c.beside, "--beside needs --val_data, pairs to compare on")

    critic, score = (reward_model.load_scalar(c.reward_model, hardware.device) for _ in range(2))
    policy, _ = train_sft.load_trainable(c, hardware)
    models = Models(policy, critic, score, modeling.load(c.model, torch.float32, hardware.device))
    train_sft.start_run(c, run.steps, facts, hardware)
    train_sft.announce(c, policy, tokenizer, run.steps, hardware)
    records, status = train(c, tokenizer, run, models, start_step, hardware)
    train_sft.ended_early("-m labs.ppo", c, start_step, run.steps, records, hardware)

    if run.validation and not status:
        reward_model.compare([c.model, c.output_dir, *c.beside], score, run, c, tokenizer, hardware)
    hardware.leave(status)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
