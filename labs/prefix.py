"""Prefix tuning: a frozen model is steered by keys and values that no token ever had.

Idea (arXiv:2101.00190). What a model does depends on what stands before. So learn that: keys and
values of P virtual tokens in every layer. The model stays as it is, and one serves many tasks.

    max over table [P, W] of  sum ln p(answer | table, question),   W = layers * 2 * K * Dh

    --start random    small random numbers
    --start words     the keys and values of the first rows' first P tokens (the paper, 7.4)
    --start mlp       a smaller table and an MLP behind it, dropped in the end (the paper, 4.3)

    python -m labs.prefix --seeds 5        # the demo's table, after `python train_sft.py`
    python -m labs.prefix --data out/demo/identity.jsonl --output_dir out/prefix   # for PEFT

What you should see: out/sft answers in four manners by chance. It gets 60 steps on rows of three
subjects that show one manner. Right greedy answers to new ways to ask, and to the fourth subject
(five seeds, mean and standard deviation); 4,096 numbers are learnt, or all 440,000 of the model.

          rows  old subjects  spread  new subject  spread
before       0         18.7%    7.2%        21.0%   11.5%
random       6         99.7%    0.7%        98.0%    3.3%
words        6         97.0%    4.1%        96.5%    4.9%
mlp          6         99.3%    0.9%        98.0%    3.3%
full         6        100.0%    0.0%       100.0%    0.0%
all four    60        100.0%    0.0%      >= 99.0% <= 2.2%

Seen: to learn 1% of the numbers does as well as to train them all. Not seen: that words are a
better beginning than random numbers, or that a prefix wins where rows are few.

Exercise. How many numbers are 8 virtual tokens for 32 layers with 8 key/value heads of 128?
    Solution: 8 * 32 * 2 * 8 * 128 = 524,288.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import data
import model as modeling
from data import Example
from labs import world
from model import Prefix, check


@dataclass
class Config:
    """Learn a prefix for a frozen checkpoint; without --data compare ways to do it on the demo."""

    model: str = "out/sft"  # checkpoint, which stays as it is
    data: list[str] = field(default_factory=list)  # training files; none: the demo's comparison
    output_dir: str = "out/prefix"  # where the prefix goes, in PEFT's format
    start: Literal["random", "words", "mlp"] = "random"  # numbers, rows' first tokens, an MLP
    tokens: int = 8  # P, virtual tokens
    steps: int = 60  # optimizer steps
    batch_size: int = 16  # examples per step
    learning_rate: float = 0.0  # AdamW's, constant; 0: what suits --start
    micro_tokens: int = 8192  # tokens per forward pass; lower it when memory runs out
    seeds: int = 1  # runs per row of the demo's table: numbers to begin with, rows and their order


RATES = {"random": 0.1, "words": 0.1, "mlp": 3e-3, "full": 5e-4}  # full: the model, no prefix

# ==== read: the idea, measuring and keeping it ====================================================


class PrefixTuning(nn.Module):
    """P virtual tokens: their keys and values in every layer, a table [P, W], are learnt.

    W = layers * 2 * K * Dh, in this order: PEFT's. Keys count as rotated: they belong to no text.
    """

    def __init__(self, config: modeling.ModelConfig, P: int, mlp: bool = False):
        super().__init__()
        self.shape = config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim
        W = torch.Size(self.shape).numel()
        width = config.hidden_size if mlp else W
        self.embeddings = nn.Parameter(0.1 * torch.randn(P, width))

        # The paper learns a smaller table and an MLP behind it, which is not kept in the end.
        self.mlp = nn.Identity()
        if mlp:
            self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, W))

    def table(self) -> Tensor:
        """The numbers that are kept, [P, W]."""
        return self.mlp(self.embeddings)

    def prefix(self, B: int) -> Prefix:
        """What B examples continue: all of them the same P tokens."""
        layers = self.table().unflatten(1, self.shape).unbind(1)  # of [P, 2, K, Dh]
        return Prefix([layer.unbind(1) for layer in layers], [len(self.embeddings)], [0] * B)


@torch.no_grad()
def words_table(model, ids: Tensor) -> Tensor:
    """The keys and values [P, W] that the frozen model computes for real tokens [P]."""
    _, kept = model.hidden(ids, [len(ids)], keep_kv=True)
    flat = sum(kept.layers, ())  # (key, value, key, value, ...) of [P, K, Dh]
    return torch.stack(flat, 1).flatten(1)  # [P, W]


def passes(model, tuned: PrefixTuning | None, examples: list[Example], micro_tokens: int):
    """(batch, its prefix, supervised tokens per example) of each forward pass over examples."""
    for chunk in data.micro_batches([len(e.ids) for e in examples], micro_tokens)[0]:
        some = [examples[i] for i in chunk]
        prefix = tuned and tuned.prefix(len(some))
        yield data.collate(some, model.device), prefix, [e.targets for e in some]


def backward(model, tuned: PrefixTuning | None, examples: list[Example], micro_tokens: int):
    """Gradients of one step; returns its loss, the mean nats per supervised token."""
    total = sum(weight * (end - first) for e in examples for first, end, weight in e.spans)
    loss_sum = 0.0
    for batch, prefix, _ in passes(model, tuned, examples, micro_tokens):
        logp = model(batch.ids, batch.lengths, batch.targets, prefix=prefix)  # [N]
        loss = -(batch.weights * logp).sum() / total
        loss.backward()
        loss_sum += loss.item()
    return loss_sum


def learn(model, examples: list[Example], start: str, c: Config, seed: int) -> PrefixTuning | None:
    """A prefix under which the examples are likelier; start `full` trains the model instead."""
    torch.manual_seed(seed)
    rng, tuned = random.Random(seed), None
    if start != "full":
        tuned = PrefixTuning(model.config, c.tokens, start == "mlp").to(model.device)

    # Real words to begin with: the paper found that they help where rows are few.
    if start == "words":
        ids = data.collate(examples, model.device).ids[: c.tokens]  # [P]
        check(len(ids) == c.tokens, f"--tokens {c.tokens}, but the rows have {len(ids)} in all")
        tuned.embeddings.data = words_table(model, ids)

    # A frozen model's weights get no gradient and are in no optimizer: nothing can change them.
    model.requires_grad_(tuned is None)
    trained = list((tuned or model).parameters())
    optimizer = torch.optim.AdamW(trained, c.learning_rate or RATES[start], weight_decay=0.0)
    for step in range(1, c.steps + 1):
        some = rng.sample(examples, min(c.batch_size, len(examples)))
        loss = backward(model, tuned, some, c.micro_tokens)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if c.data and step % 20 == 0:
            print(f"step {step}/{c.steps}  loss {loss:.4f}", flush=True)
    return tuned


@torch.no_grad()
def right(model, tuned: PrefixTuning | None, examples: list[Example], micro_tokens: int) -> float:
    """Share of the examples whose every token is the likeliest: greedy decoding repeats them."""
    count = 0
    for batch, prefix, targets in passes(model, tuned, examples, micro_tokens):
        states, _ = model.hidden(batch.ids, batch.lengths, prefix, wanted=batch.targets - 1)
        hits = model.next_logits(states).argmax(1) == batch.ids[batch.targets]  # [N]
        for one in hits.split(targets):
            count += one.all().item()
    return count / len(examples)


def save_prefix(tuned: PrefixTuning, base: str, folder: Path) -> None:
    """The table as an adapter of type PREFIX_TUNING, which PEFT loads beside the model `base`."""
    layers, _, K, Dh = tuned.shape
    table = {"prompt_embeddings": tuned.table().detach().cpu().contiguous()}  # [P, W]
    modeling.write_atomic(folder / "adapter_model.safetensors",
                          lambda path: save_file(table, path, metadata={"format": "pt"}))
    modeling.write_json(folder / "adapter_config.json", {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "num_virtual_tokens": len(tuned.embeddings), "num_layers": layers, "num_attention_heads": K,
        "token_dim": K * Dh, "num_transformer_submodules": 1, "prefix_projection": False,
        "encoder_hidden_size": K * Dh, "inference_mode": True})


# ---- skip on a first reading: the demo's comparison, main ----------------------------------------


def demo_examples(tokenizer, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
    """(training, held-out ways to ask, a held-out subject): all answered in one manner."""
    rng, parts = random.Random(seed), ([], [], [])
    subjects, manner = list(world.SUBJECTS), rng.choice(world.POLITE + world.RUDE)
    rng.shuffle(subjects)

    # Two of the four ways to ask are trained, two held out: which ones is drawn for every fact.
    for subject in subjects:
        for fact in world.facts_of(subject):
            for i, ask in enumerate(rng.sample(world.ASK_CHAT, 4)):
                talk = {"prompt": ask.format(**fact), "response": manner.format(**fact)}
                part = 2 if subject == subjects[-1] else i // 2
                parts[part].append(data.parse_row(subject, talk))
    rng.shuffle(parts[0])
    return tuple(data.to_examples(part, 0, Counter(), tokenizer) for part in parts)


def compare(c: Config, tokenizer) -> None:
    """Print the table: each way to learn, from 6 rows and from 60, over the seeds."""
    table = [("", "rows", "old subjects", "spread", "new subject", "spread")]
    for start, rows in (("before", 0), *((s, n) for n in (6, 60) for s in RATES)):
        found = []
        for seed in range(c.seeds):
            train, *held = demo_examples(tokenizer, seed)
            model = modeling.load(c.model)
            tuned = learn(model, train[:rows], start, c, seed) if rows else None
            found.append([right(model, tuned, part, c.micro_tokens) for part in held])

        # Over the seeds, of which one alone has no spread.
        shares = torch.tensor(found)  # [seeds, 2]
        mean, spread = shares.mean(0), shares.std(0, correction=min(c.seeds - 1, 1))  # [2]
        table.append((start, rows, *torch.stack((mean, spread), 1).flatten().tolist()))
    data.print_table(table)


def tune(c: Config, tokenizer) -> None:
    """Learn one prefix from files and keep it."""
    folder = Path(c.output_dir)
    modeling.check_output("--output_dir", folder, [c.model])
    held = modeling.checkpoint_in(folder)
    check(not held, f"{folder} holds a checkpoint ({held}); choose another --output_dir")

    # The learnt rows again, greedily: whether the prefix has learnt them, not what it is good for.
    examples, _ = data.load_examples(c.data, tokenizer, quiet=False)
    model = modeling.load(c.model, torch.float32, modeling.best_device())
    before = right(model, None, examples, c.micro_tokens)
    tuned = learn(model, examples, c.start, c, seed=0)
    save_prefix(tuned, c.model, folder)
    after = right(model, tuned, examples, c.micro_tokens)
    print(f"{before:.1%} -> {after:.1%} of its rows are repeated greedily; {tuned.table().numel()} "
          f"numbers in {folder}, for PeftModel.from_pretrained(MODEL, {c.output_dir!r})")


def main() -> None:
    """Learn one prefix and keep it, or compare on the demo."""
    c = Config(**data.parse_flags(Config, sys.argv[1:]))
    data.check_numbers(c)
    check(min(c.tokens, c.steps, c.seeds) > 0, "--tokens, --steps and --seeds must be 1 or more")
    check(c.data or (c.start, c.output_dir) == (Config.start, Config.output_dir),
          "--start and --output_dir go with --data")
    check(not c.data or c.seeds == 1, "--seeds is for the comparison, without --data")
    (tune if c.data else compare)(c, data.ChatTokenizer(c.model))


if __name__ == "__main__":
    with data.one_line_errors():
        main()
