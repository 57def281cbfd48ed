"""A reward model: a number for every answer, learnt from which of two people liked better.

Idea. Nobody can say how good an answer is on a scale, but anybody can compare two. Bradley and
Terry (1952) take it that c is preferred to r with probability s(r_c - r_r), s the logistic
function. The scores that make the comparisons likeliest have the least

    loss = -ln s(r(chosen) - r(rejected))        (arXiv:2203.02155, eq. 1)

r is read off the state of an answer's last token by a vector in place of the LM head. Only
differences are learnt: r + 5 is as good a reward as r. DPO's loss is the same, with a policy's
beta (ln p - ln ref) for r; so what trains here is train_dpo.py's own loop, with another head.

    python -m labs.reward_model               # the demo, after `python train_sft.py`
    python -m labs.reward_model --model out/sft --data pairs.json --output_dir out/reward

Out comes Hugging Face's sequence classifier with one label, for labs/ppo.py, or to choose the best
of n samples by (rejection sampling).

What you should see: all 40 held-out pairs in the right order; r is -0.01 in the mean of samples,
and 0.47 of the best of 8: all that PPO reaches.

Exercise. r is 1.2 and 0.4. The loss, its slope in r(chosen)? Both scores grow by 1: the loss?
    Solution: 0.3711, -0.3100; the same.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import data
import model as modeling
import train_dpo
import train_sft
from data import Example
from labs.rewards import sample_answers, sum_logprobs
from model import check
from train_dpo import Preference
from train_sft import Hardware


@dataclass
class Config(train_dpo.Config):
    """Learn a reward model from preference pairs."""

    output_dir: str = "out/reward"  # where the classifier, metrics and state go
    batch_size: int = 32  # pairs per optimizer step
    loss: Literal["sigmoid"] = "sigmoid"  # Bradley-Terry's; cDPO's with --label_smoothing
    beta: float = 1.0  # the loss is -ln s(beta (r_c - r_r)): with a larger one r is smaller
    max_new_tokens: int = 64  # of the samples that are scored in the end


DEMO = {"model": "out/sft", "data": ["out/demo/pairs.jsonl"], "learning_rate": 3e-4,
        "val_data": ["out/demo/pairs_val.jsonl"], "epochs": 3, "log_every": 10}

# ==== read: a model with one number per state =====================================================


class Scalar(modeling.Llama):
    """A model that gives one number per state in place of V: a reward model, or PPO's critic."""

    def __init__(self, config: modeling.ModelConfig):
        super().__init__(config)
        self.lm_head, self.score = None, nn.Linear(config.hidden_size, 1, bias=False)

    def values(self, ids, lengths, places, *more, **noise) -> Tensor:
        """w h of the states h at flat indices `places` [N]: [N]."""
        states, _ = self.hidden(ids, lengths, *more, wanted=places, **noise)  # [N, D]
        return self.score(states)[:, 0].float()  # [N]

    def forward(self, ids, lengths, targets, *more, **noise) -> Tensor:
        """The reward of each token at `targets` [N]: r at the last of an example, else 0.

        Their sum over an answer is r, as that of a policy is ln p: so train_dpo.py takes this model
        for a policy. With beta 1 and a reference of 0 its loss is Bradley-Terry's.
        """
        last = modeling.send(torch.tensor(lengths).cumsum(0) - 1, ids.device)  # [B]
        return self.values(ids, lengths, targets, *more, **noise) * torch.isin(targets, last)


def learn(c: train_dpo.Config, tokenizer, run, facts: dict, start_step: int,
          hardware: Hardware) -> tuple[list[dict], int]:
    """Train on the pairs in the loop of train_dpo.py; its records and exit status."""
    model = load_scalar(c.model, hardware.device, new_head=True)
    model.set_dropout(c.dropout[0], c.dropout[-1])
    model.checkpoint_activations = c.checkpoint_activations
    pad = describe_classifier(model, tokenizer)
    zeros = [torch.zeros(len(run.train), 2), torch.zeros(len(run.validation), 2)]
    train_sft.start_run(c, run.steps, facts, hardware)
    records, status = train_dpo.train(c, tokenizer, run, zeros, start_step, model, model, hardware)

    # The tokenizer must pad with the token that config.json names. Old ones have it in two files.
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(c.output_dir) / name
        if path.exists():
            modeling.write_json(path, {**modeling.read_json(path), "pad_token": pad})
    return records, status


# ==== read: answers, and what they are worth ======================================================


def sample(policy, pairs: list[Preference], first: int, seed: int, c, stop_ids: list[int],
           hardware: Hardware) -> list[Example]:
    """An answer to each pair's prompt; answer i is a function of the policy, seed and first + i."""
    # The answers of a pair begin with the prompt's last token.
    prompts = [[*p.prompt.tolist(), int(p.answers[0][0][0])] for p in pairs]
    numbers, how = range(first, first + len(pairs)), modeling.Sampling(1.0, seed=seed)
    found = sample_answers(policy, prompts, numbers, how, c, stop_ids, hardware)
    return [found[i] for i in range(len(pairs))]


def rewards_of(model: Scalar, examples: list[Example], c, stop_ids: list[int],
               hardware: Hardware) -> Tensor:
    """r [answers]; an answer without an end counts as the worst of those that have one.

    No pair has shown the model an answer that stops in the middle: its r would mean nothing.
    """
    r = sum_logprobs(model, examples, c, hardware)
    ended = torch.tensor([int(e.ids[-1]) in stop_ids for e in examples])
    return torch.where(ended, r, r[ended].min() if ended.any() else 0.0)


def compare(folders: list[str], model: Scalar, run, c, tokenizer, hardware: Hardware) -> None:
    """Print what checkpoints do on held-out pairs; the first is what KL is measured to.

    reward is the mean r of samples, order the share of pairs whose chosen answer is likelier, KL
    the mean of ln p - ln ref of a sample in nats, seconds what the steps of a run took.
    """
    table, reference = [("held out", "reward", "order", "exam", "KL", "seconds")], None
    for folder in folders:
        policy = modeling.load(folder, torch.float32, hardware.device)
        reference = reference or policy

        # What it knows of answers that are given, then what it writes itself.
        logp = train_dpo.all_logprobs(policy, run.validation, c, hardware)  # [pairs, 2]
        order = (logp[:, 0] > logp[:, 1]).double().mean().item()
        exam = train_sft.exam_metrics(policy, tokenizer, run, c, hardware) if c.exam_data else {}
        answers = sample(policy, run.validation * SAMPLES, 0, c.seed + 1, c, tokenizer.stop_ids,
                         hardware)
        r = rewards_of(model, answers, c, tokenizer.stop_ids, hardware)

        # What a sample gained in likelihood, in the mean over the policy's own samples.
        gain = (sum_logprobs(policy, answers, c, hardware)
                - sum_logprobs(reference, answers, c, hardware)).mean()

        # Only a folder that a run wrote says how long its steps took.
        log, seconds = Path(folder) / "metrics.jsonl", 0.0
        for _, record in data.read_values(log) if log.exists() else []:
            seconds += record["tokens"] / record["tokens_per_second"] if record["step"] else 0.0
        table.append((folder, f"{r.mean():.2f}", order, exam.get("exam_accuracy", "-"),
                      f"{gain:.2f}", f"{seconds:.0f}"))
    data.print_table(table)


# ---- skip on a first reading: Hugging Face's files -----------------------------------------------


def load_scalar(folder: str | Path, device, new_head: bool = False) -> Scalar:
    """A sequence classifier with one label, or with `new_head` a causal model under zeros.

    Zeros make all answers alike, so the first loss is ln 2, whatever the data.
    """
    with torch.device("meta"):
        model = Scalar(modeling.load_config(folder))
    weights = {}
    for path in modeling.weight_files(Path(folder)):
        with modeling.open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                weights[name] = file.get_tensor(name)

    # It is saved in the type that it came in; an adapter's own folder holds no whole model.
    model.stored_dtype = next(iter(weights.values())).dtype
    if new_head:  # an adapter is merged first
        weights |= dict(modeling.load(folder).named_parameters())
        weights["score.weight"] = torch.zeros(1, model.config.hidden_size)

    # Everything but the LM head is used, and must be there.
    found = {}
    for name, p in model.named_parameters():
        check(name in weights and weights[name].shape == p.shape,
              f"{folder}: weight {name} is missing, or not of shape {list(p.shape)}")
        found[name] = weights[name].to(device, torch.float32)
    model.load_state_dict(found, assign=True)
    return model


def describe_classifier(model: Scalar, tokenizer: data.ChatTokenizer) -> str:
    """Make config.json that of Hugging Face's sequence classifier; returns its pad token.

    There r is read off the last token that is no padding. Many checkpoints pad with the token that
    ends an answer: then r would be read one token too early.
    """
    # Any added token that ends no answer will do, but not the one that ChatTokenizer adds itself.
    special = tokenizer.tokenizer.get_added_tokens_decoder()
    unfit = {tokenizer.border_id, *tokenizer.stop_ids}
    able = [i for i in special if i not in unfit and i < model.config.vocab_size]
    check(able, f"{tokenizer.folder}: no added token is left to pad with; all end an answer")

    # Some tools read r before the first pad of a text, so best is one that no text holds.
    asked = tokenizer.prompt_ids([{"role": "user", "content": "?"}])
    held, own = tokenizer.source + tokenizer.decode(asked), tokenizer.names.get("pad_token")
    # False comes first: in no text, then the checkpoint's own, then the smallest id.
    pad = min(able, key=lambda i: (special[i].content in held, special[i].content != own, i))
    kind = f"{model.config.model_type.capitalize()}ForSequenceClassification"
    model.config.source |= {"architectures": [kind], "pad_token_id": pad,
                            "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return special[pad].content


# ---- skip on a first reading: flags, main --------------------------------------------------------

SAMPLES = 8  # answers per held-out prompt


def load_pairs(files: list[str], tokenizer, c, quiet: bool):
    """What train_dpo.py makes of the files."""
    return train_dpo.load_preferences(files, tokenizer, c.max_length, c.skip_bad_rows, quiet)


def main() -> None:
    """Read the flags, prepare, train, look at samples."""
    c = train_sft.resolve_config(Config, sys.argv[1:], {}, lambda: DEMO)
    start_step, hardware = train_sft.find_start_step(c), train_sft.setup_hardware(c.dtype)
    train_dpo.check_preferences(c)
    check(hardware.world == 1, "labs.reward_model runs in one process, without torchrun")
    unread = c.nll_weight, c.length_normalize, c.reference, c.exam_data, c.lora_rank, c.compile
    check(not any(unread), "--nll_weight, --length_normalize, --reference, --exam_data, "
          "--lora_rank and --compile are for policies")
    train_dpo.find_demo(c)
    tokenizer, run, facts = train_dpo.prepare(c, load_pairs, hardware)

    # The loop is that of train_dpo.py; afterwards the model says what its samples are worth.
    records, status = learn(c, tokenizer, run, facts, start_step, hardware)
    early = train_sft.ended_early("-m labs.reward_model", c, start_step, run.steps, records,
                                  hardware)
    if not early and run.validation:
        # What choosing by r would bring, without any training of the policy.
        rest = c, tokenizer.stop_ids, hardware
        answers = sample(modeling.load(c.model, torch.float32, hardware.device),
                         run.validation * SAMPLES, 0, c.seed, *rest)
        r = rewards_of(load_scalar(c.output_dir, hardware.device), answers, *rest)
        best = r.view(SAMPLES, -1).amax(0)  # [prompts]
        data.print_table([("held out", "right order", "one sample", f"best of {SAMPLES}"),
                          ("reward model", records[-1]["val_reward_accuracy"],
                           f"r {r.mean():.2f}", f"r {best.mean():.2f}")])
    hardware.leave(status)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
