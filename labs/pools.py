"""Prompt pools: tasks arrive one after another, and each question chooses the prefix it needs.

Idea. A new task overwrites the weights that old ones need. So keep the model, learn several
prefixes, and let a question choose by its query q, the frozen model's mean last state over it.

    python -m labs.pools --seeds 5    # after `python train_sft.py`; 30 s of one core per seed

The demo's subjects arrive one by one, each with a manner of answering that out/sft knows: 20 rows
are learnt, 20 others asked. Right answers to all so far (five seeds; spread of the last), prompts
that are ever chosen, how often the first of them tells the subject.

    right after         1      2      3      4  spread  chosen   told
    full           100.0%  50.0%  33.3%  25.0%    0.0%       -      -
    replay         100.0%  99.0%  86.3%  84.3%    7.7%       -      -
    one prefix     100.0%  50.0%  33.3%  25.0%    0.0%     1.0  25.0%
    own prefix     100.0%  94.5%  90.7%  88.0%    2.9%     4.0  88.0%
    l2p            100.0%  50.0%  33.0%  25.0%    0.0%     3.8  38.0%
    dualprompt     100.0%  81.5%  75.0%  67.8%   18.0%     4.0  88.0%
    coda           100.0%  50.0%  33.3%  25.0%    0.0%     4.0  36.3%
    dap            100.0%  85.0%  74.7%  77.5%    5.7%     4.0  87.5%

Seen: full forgets, replay helps, L2P's subjects share prompts. Not seen: that a pool beats a prefix
per subject, that a larger one helps (L2P with --pool 32: 26.7%, 5.8 ever chosen), or queries less
their mean (--centre: 23.5%, all 8 chosen).

Exercise. Why do L2P's tasks share prompts? Solution: only keys that were chosen come nearer.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import data
import model as modeling
from labs import world
from model import Prefix, check


@dataclass
class Config:
    """Learn the demo's four subjects one after another, each with a manner of its own."""

    model: str = "out/sft"  # the demo's checkpoint; frozen but for full fine-tuning and replay
    arm: str = ""  # one row of the table, such as l2p; empty: all
    seeds: int = 1  # runs per arm, each with its own order, manners, rows and first weights
    centre: bool = False  # take the mean query of the model's own training data off every query
    pool: int = 8  # M, prompts of l2p and coda; the others have one per task
    steps: int = 30  # optimizer steps per task, of 16 rows each


TASKS, TOKENS, TOP = len(world.SUBJECTS), 4, 2  # p, tokens per prompt; N, prompts that l2p takes
PULL, MEMORY = 0.5, 5  # l, weight of what draws keys to queries; rows per task that replay keeps

# ==== read: ways to choose, and learning tasks one after another ==================================

# Of queries q [B, D], in training the task: (prefixes [B, P, W], added loss, choices [B, n]).


class Pool(nn.Module):
    """M prompts with their keys, and what else a way to choose may learn."""

    def __init__(self, M: int, D: int, W: int, layers: int):
        super().__init__()
        self.lower = W // layers * (layers // 2)  # columns of the lower layers, of dualprompt
        self.keys = nn.Parameter(torch.randn(M, D) / 10)
        self.prompts = nn.Parameter(torch.randn(M, TOKENS, W) / 10)
        self.general = nn.Parameter(torch.randn(TOKENS, W) / 10)  # dualprompt
        self.A, self.learnt = nn.Parameter(torch.ones(M, D)), 0  # coda
        self.tasks, self.w = nn.Embedding(M, 16), nn.Parameter(torch.randn(TOKENS, 1) / 10)  # dap
        self.film, self.V = nn.Linear(16, 2 * W), nn.Linear(D, W, bias=False)  # dap


def own(pool: Pool, q: Tensor, task: int | None = None):
    """A prompt per task, found by its key; with M = 1 one prompt for all."""
    near = torch.cosine_similarity(q[:, None], pool.keys, dim=2)  # [B, M]
    chosen = near.argmax(1)  # [B]
    if task is not None:
        chosen = torch.full_like(chosen, min(task, len(pool.keys) - 1))
    pull = PULL * (1 - near.gather(1, chosen[:, None])).mean()
    return pool.prompts[chosen], pull, chosen[:, None]  # [B, p, W]


def l2p(pool: Pool, q: Tensor, task: int | None = None):
    """The N prompts with the nearest keys, end to end (arXiv:2112.08654, eq. 3 and 5)."""
    near, chosen = torch.cosine_similarity(q[:, None], pool.keys, dim=2).topk(TOP)  # [B, N]
    pull = PULL * (1 - near).sum(1).mean()
    return pool.prompts[chosen].flatten(1, 2), pull, chosen  # [B, N * p, W]


def dualprompt(pool: Pool, q: Tensor, task: int | None = None):
    """The task's own prompt in the upper layers, a general one in the lower (arXiv:2204.04799)."""
    mine, pull, chosen = own(pool, q, task)
    lower = torch.arange(mine.shape[2]) < pool.lower  # [W]
    return torch.where(lower, pool.general, mine), pull, chosen  # [B, p, W]


def coda(pool: Pool, q: Tensor, task: int | None = None):
    """P = sum_m cos(q * A_m, K_m) P_m, so no choice is hard (arXiv:2211.13218, eq. 4 to 6)."""
    # A task adds prompts of its own; those of earlier tasks serve it, but stay as they are.
    each, old = len(pool.keys) // TASKS, pool.learnt
    if task is not None:
        old, pool.learnt = task * each, (task + 1) * each
    A, K, P = (torch.cat((part[:old].detach(), part[old : pool.learnt]))
               for part in (pool.A, pool.keys, pool.prompts))  # [m, D], [m, D], [m, p, W]
    share = torch.cosine_similarity(q[:, None] * A, K, dim=2)  # [B, m], from [B, m, D]

    # New parts should be orthogonal to all others, to disturb none.
    apart = 0.0
    for part in (A, K, P.flatten(1)):
        apart = apart + torch.cosine_similarity(part[:, None], part, dim=2).triu(1).square().mean()
    prompts = torch.einsum("bm,mpw->bpw", share, P)  # [B, p, W]
    return prompts, apart, share.abs().argsort(1, descending=True)


def dap(pool: Pool, q: Tensor, task: int | None = None):
    """P = gamma_t * w LN(q) V + beta_t (Jung et al., ICCV 2023, of all patches in place of q)."""
    _, pull, chosen = own(pool, q, task)
    gamma, beta = pool.film(pool.tasks(chosen)).chunk(2, -1)  # [B, 1, W] each
    mine = pool.V(nn.functional.layer_norm(q, q.shape[1:]))[:, None]  # [B, 1, W]
    return gamma * pool.w * mine + beta, pull, chosen  # [B, p, W]


ARMS = {"full": None, "replay": None, "one prefix": own, "own prefix": own, "l2p": l2p,
        "dualprompt": dualprompt, "coda": coda, "dap": dap}


@torch.no_grad()
def queries(model, examples: list[data.Example]) -> Tensor:
    """q(x): the frozen model's mean last state over a question, [examples, D]."""
    batch = data.collate([e._replace(ids=e.ids[: e.spans[0][0]], spans=()) for e in examples])
    states, _ = model.hidden(batch.ids, batch.lengths)  # [T, D]
    return torch.stack([one.mean(0) for one in states.split(batch.lengths)])


def as_prefix(prompts: Tensor, config: modeling.ModelConfig) -> Prefix:
    """Prefixes [B, P, W] as the model takes them; W holds keys and values of all layers."""
    shape = config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim
    layers = prompts.flatten(0, 1).unflatten(1, shape).unbind(1)  # of [B * P, 2, K, Dh]
    return Prefix([layer.unbind(1) for layer in layers], [prompts.shape[1]] * len(prompts))


def learn(model, pool: Pool, way, train: list, q: Tensor, task: int, kept: list, c: Config, rng):
    """Train on one task alone; rows of earlier tasks that were kept are half of a batch."""
    # A prompt is far from where it begins; what makes prompts of queries learns more slowly.
    trained, groups = pool if way else model, []
    for name, parameter in trained.named_parameters():
        rate = (0.01 if name.startswith(("film", "V")) else 0.1) if way else 5e-4
        groups.append({"params": parameter, "lr": rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(c.steps):
        rows, prefix, extra = rng.sample(range(len(train)), 16), None, 0.0
        examples = [train[i] for i in rows]
        if kept:
            examples = examples[:8] + rng.choices(kept, k=8)
        if way:
            prompts, extra, _ = way(pool, q[rows], task)
            prefix = as_prefix(prompts, model.config)

        # The loss of the answers, and what the way of choosing asks for.
        batch = data.collate(examples)
        loss = extra - model(batch.ids, batch.lengths, batch.targets, prefix=prefix).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def examine(model, pool: Pool, way, examples: list, q: Tensor) -> tuple[Tensor, Tensor]:
    """(right or not [B], chosen prompts [B, n]): right is what greedy decoding would repeat."""
    batch, prefix, chosen = data.collate(examples), None, torch.zeros(len(q), 1).long()
    if way:
        prompts, _, chosen = way(pool, q)
        prefix = as_prefix(prompts, model.config)
    states, _ = model.hidden(batch.ids, batch.lengths, prefix, wanted=batch.targets - 1)  # [N, D]
    hits = model.next_logits(states).argmax(1) == batch.ids[batch.targets]  # [N]
    return torch.stack([one.all() for one in hits.split([e.targets for e in examples])]), chosen


# ---- skip on a first reading: the demo's tasks, the table ----------------------------------------


def make_tasks(model, tokenizer, seed: int, centre: bool) -> tuple[list, list]:
    """(training, tests), of a subject each (examples, queries); two of four ways to ask are new."""
    rng, general, parts = random.Random(seed), 0.0, ([], [])
    if centre:
        rows, _ = data.load_examples(["out/demo/instructions.jsonl"], tokenizer)
        general = queries(model, rows).mean(0)  # [D]

    # Which ways to ask are held out is drawn for every fact.
    manners = rng.sample(world.POLITE + world.RUDE, TASKS)
    for subject, manner in zip(rng.sample(list(world.SUBJECTS), TASKS), manners, strict=True):
        rows = [], []
        for fact in world.facts_of(subject):
            for i, ask in enumerate(rng.sample(world.ASK_CHAT, 4)):
                talk = {"prompt": ask.format(**fact), "response": manner.format(**fact)}
                rows[i // 2].append(data.parse_row(subject, talk))
        for part, half in zip(parts, rows, strict=True):
            examples = data.to_examples(half, 0, Counter(), tokenizer)
            part.append((examples, queries(model, examples) - general))
    return parts


def run_arm(arm: str, seed: int, c: Config) -> list[float]:
    """[right of all tasks seen, after each task; prompts ever chosen; tasks they give away]."""
    way, rng, kept, figures = ARMS[arm], random.Random(seed), [], []
    model = modeling.load(c.model).requires_grad_(way is None)
    training, tests = make_tasks(model, data.ChatTokenizer(c.model), seed, c.centre)
    torch.manual_seed(seed)
    config, M = model.config, {"one prefix": 1, "l2p": c.pool, "coda": c.pool}.get(arm, TASKS)
    W = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    pool = Pool(M, config.hidden_size, W, config.num_hidden_layers)

    # After each task all tasks until then are examined, and none is told which it is.
    for task in range(TASKS):
        learn(model, pool, way, *training[task], task, kept, c, rng)
        found = [examine(model, pool, way, *test) for test in tests[: task + 1]]
        hits, chosen = zip(*found, strict=True)  # of [rows], [rows, n]
        figures.append(torch.cat(hits).float().mean().item())
        if arm == "replay":
            kept += rng.sample(training[task][0], MEMORY)

    # Who sees a question's first choice and guesses the task: how often is that right?
    chosen = torch.stack(chosen)  # [tasks, rows, n]
    counts = nn.functional.one_hot(chosen[..., 0]).sum(1)  # [tasks, M]
    told = counts.amax(0).sum().item() / counts.sum().item()
    return [*figures, len(chosen[..., :TOP].unique()), told]


def main() -> None:
    """Read the flags, run the arms, print the table."""
    c = Config(**data.parse_flags(Config, sys.argv[1:]))
    check(c.arm in ("", *ARMS), f"--arm: expected one of {', '.join(ARMS)}, found {c.arm!r}")
    check(min(c.seeds, c.steps, c.pool - 3) > 0, "--seeds and --steps are 1 or more, --pool 4")

    # Every run of an arm has an order, manners and rows of its own, which all arms share.
    table = [("right after", *range(1, TASKS + 1), "spread", "chosen", "told")]
    for arm in [c.arm] if c.arm else ARMS:
        found = torch.tensor([run_arm(arm, seed, c) for seed in range(c.seeds)])
        *right, ever, told = found.mean(0).tolist()
        spread = found[:, TASKS - 1].std(correction=min(c.seeds - 1, 1)).item()
        chosen = (f"{ever:.1f}", told) if ARMS[arm] else ("-", "-")
        table.append((arm, *right, spread, *chosen))
    data.print_table(table)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
