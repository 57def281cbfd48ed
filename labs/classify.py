"""Classes that arrive in groups: a frozen model, and a head that is solved instead of trained.

Idea. What a frozen model says of a text cannot be forgotten: only the head on top forgets. A head
made of sums over rows (means, H^T H, H^T Y) is the same whenever they came, and no row is kept.

    python -m labs.classify --seeds 5      # after `python train_sft.py`; 20 s of one core per seed

What you should see: which of 40 facts does a choice question ask for, in ways of asking that were
held out? Facts come in tens. Shares of those so far that are named rightly, five seeds, spread of
the last; `random` is the last column on random weights, --model out/demo/base.

                        10     20     30     40  spread  random
    trained in turn  99.6%  69.9%  50.4%  41.4%    2.4%   22.9%
    trained at once  99.6%  99.4%  99.5%  99.4%    0.5%   70.6%
    simplecil        96.6%  95.3%  93.5%  92.6%    1.3%   65.1%
    adam            100.0%  97.8%  96.3%  96.2%    1.5%   70.6%
    ranpac           99.8%  99.9%  99.9%  99.3%    0.4%   41.7%
    slca             99.4%  98.6%  98.5%  97.2%    1.1%   61.7%
    esn             100.0%  99.3%  98.9%  98.3%    0.5%   52.8%

Seen: training in turn forgets, class means hold, ADAM's tuned copy helps them, RanPAC is level with
all rows at once, but not on random weights. Cannot be seen: long sequences, a tuned model (SLCA).

Exercise. Why does RanPAC not care in which order groups come, and a head trained in turn does?
    Solution: it is solved from H^T H and H^T Y, sums over rows; the last steps outweigh the first.
"""

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import model as modeling
from labs import world
from model import check


@dataclass
class Config:
    """Say which of the demo's 40 facts a choice question asks for; the facts arrive in groups."""

    model: str = "out/sft"  # checkpoint whose states are the features
    groups: int = 4  # in which the facts arrive
    rows: int = 20  # questions per fact to learn from; half as many are held out
    seeds: int = 1  # runs per row of the table: order of the facts, questions, random numbers


# ==== read: heads, and the features that they see =================================================

# A group is (x, y): features [rows, D] and classes [rows], numbered in the order of arrival. A head
# is made from the groups until now, and gives scores [B, C] of the C classes among them.


def prototypes(x: Tensor, y: Tensor) -> Tensor:
    """The mean of the features [rows, D] of each class [rows]: [C, D]."""
    Y = F.one_hot(y).float()  # [rows, C]
    return Y.T @ x / Y.sum(0)[:, None]


def simple_cil(groups: list, c: Config) -> Callable:
    """SimpleCIL (arXiv:2303.07338, eq. 4): the class whose mean is nearest by cosine."""
    means = torch.cat([prototypes(x, y - y.min()) for x, y in groups])  # [C, D]
    return lambda x: F.cosine_similarity(x[:, None], means, dim=2)  # [B, C]


def ridge_weights(H: Tensor, Y: Tensor, ridge: float) -> Tensor:
    """W = (H^T H + l I)^-1 H^T Y [M, C] of H [rows, M] and Y [rows, C] (arXiv:2307.02251)."""
    # In fp64: H^T H has the square of the condition of H.
    H, Y = H.double(), Y.double()
    return torch.linalg.solve(H.T @ H + ridge * torch.eye(H.shape[1]), H.T @ Y).float()


def ranpac(groups: list, c: Config) -> Callable:
    """RanPAC: h = relu(f R) with R fixed and random, then ridge regression onto the classes."""
    x, y = (torch.cat(part) for part in zip(*groups, strict=True))
    R = torch.randn(x.shape[1], 1000)  # [D, M]
    W = ridge_weights((x @ R).relu(), F.one_hot(y).float(), 1.0)  # [M, C]
    return lambda x: (x @ R).relu() @ W


def train_head(head: nn.Linear, x: Tensor, y: Tensor, anchor: float = 0.0) -> nn.Linear:
    """Cross-entropy of a linear head; an `anchor` draws ln sum e^score of all rows to it (ESN)."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.03, weight_decay=0.0)
    for _ in range(200):
        scores = head(x)  # [rows, C]
        loss = F.cross_entropy(scores, y)
        if anchor:
            loss = loss + 0.1 * (scores.logsumexp(1) - anchor).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


def in_turn(groups: list, c: Config) -> Callable:
    """What must be beaten: a head that is trained on each group in turn, on nothing else."""
    head = nn.Linear(groups[0][0].shape[1], int(groups[-1][1].max()) + 1)
    for x, y in groups:
        train_head(head, x, y)
    return head


def at_once(groups: list, c: Config) -> Callable:
    """What can hardly be beaten: a head that is trained on all rows of all groups."""
    return in_turn([[torch.cat(part) for part in zip(*groups, strict=True)]], c)


def slca(groups: list, c: Config) -> Callable:
    """SLCA's replay (arXiv:2303.05118): of a class only N(mean, covariance) is kept, and drawn."""
    draws, classes = [], []
    for x, y in groups:
        for k in y.unique():
            # A little is added to the spread: few rows leave directions in which there is none.
            mine = x[y == k]
            spread = mine.T.cov() + 1e-3 * torch.eye(x.shape[1])  # [D, D]
            normal = torch.distributions.MultivariateNormal(mine.mean(0), spread)
            draws.append(normal.sample((c.rows,)))  # [rows, D]
            classes.append(k.expand(c.rows))
    return train_head(in_turn(groups, c), torch.cat(draws), torch.cat(classes))


def esn(groups: list, c: Config) -> Callable:
    """ESN (arXiv:2211.15969): a head per group; at several temperatures T the heads are compared.

    Each T votes for the head with the largest T ln sum e^(score / T). Anchored in training, the
    heads speak equally loud. (The authors choose the temperatures by the newest group's rows.)
    """
    heads = []
    for x, y in groups:
        head = nn.Linear(x.shape[1], len(y.unique()))
        heads.append(train_head(head, x, y - y.min(), anchor=10.0))

    def elect(x: Tensor) -> Tensor:
        scores = torch.stack([head(x) for head in heads], 1)  # [B, heads, C / heads]
        votes = torch.zeros(scores.shape[:2])
        for T in (0.01, 0.1, 0.3, 1.0, 3.0):
            energy = T * (scores / T).logsumexp(2)  # [B, heads]
            votes += F.one_hot(energy.argmax(1), len(heads))

        # The elected head's classes come first, by its own probabilities.
        return (votes[:, :, None] + scores.softmax(2)).flatten(1)  # [B, C]

    return elect


HEADS = {"trained in turn": in_turn, "trained at once": at_once, "simplecil": simple_cil,
         "adam": simple_cil, "ranpac": ranpac, "slca": slca, "esn": esn}


def features(model, examples: list[data.Example]) -> Tensor:
    """The mean last state over each row, question and letter: [examples, D]."""
    batch = data.collate(examples)
    states, _ = model.hidden(batch.ids, batch.lengths)  # [T, D]
    return torch.stack([one.mean(0) for one in states.split(batch.lengths)])


def adapt(model, examples: list[data.Example], y: Tensor, rng) -> nn.Module:
    """ADAM (arXiv:2303.07338): a copy tuned on the first group, whose features join the model's."""
    model = copy.deepcopy(model).requires_grad_(True)
    head = nn.Linear(model.config.hidden_size, int(y.max()) + 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=5e-4)
    for _ in range(30):
        rows = rng.sample(range(len(examples)), min(32, len(examples)))
        x = features(model, [examples[i] for i in rows])  # [rows, D]
        F.cross_entropy(head(x), y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


# ---- skip on a first reading: the demo's classes, the table --------------------------------------


def draw_class(tokenizer, fact: dict, facts: list[dict], c: Config, rng) -> list[list]:
    """[training, held out]: choice questions for a fact, among wrong options of its subject."""
    # Of the five ways to ask for its value, and for its key, the last is held out.
    halves = []
    for ways, count in ((slice(0, 4), c.rows), (slice(4, 5), c.rows // 2)):
        rows = []
        for _ in range(count):
            way = rng.choice(world.ASK_VALUE[ways] + world.ASK_KEY[ways])
            choice = world.draw_choice((way, fact), facts, rng)
            talk = world.EXAM_PROMPT.format(subject=fact["r"], **choice)
            rows.append(data.parse_row("", {"prompt": talk, "response": choice["answer"]}))
        halves.append(data.to_examples(rows, 0, Counter(), tokenizer))
    return halves


def run_seed(model, tokenizer, seed: int, c: Config) -> Tensor:
    """Of all heads, after each group: the share of held-out rows so far that it names rightly."""
    rng, drawn, train, held = random.Random(seed), [], [], []
    for facts in map(world.facts_of, world.SUBJECTS):
        drawn += [draw_class(tokenizer, fact, facts, c, rng) for fact in facts]
    rng.shuffle(drawn)
    for mine, others in drawn:
        train += mine
        held += others
    y = torch.arange(len(drawn)).repeat_interleave(c.rows)
    y_test = torch.arange(len(drawn)).repeat_interleave(c.rows // 2)

    # ADAM's head sees the features of a tuned copy beside the model's own.
    torch.manual_seed(seed)
    first = len(y) // c.groups  # rows per group
    tuned = adapt(model, train[:first], y[:first], rng)
    with torch.no_grad():
        x = torch.cat((features(model, train), features(tuned, train)), 1)  # [rows, 2 D]
        x_test = torch.cat((features(model, held), features(tuned, held)), 1)

    # Features are seen in units of the first group's spread: a choice that needs no later group.
    mean, spread = x[:first].mean(0), x[:first].std(0)  # [2 D]
    x, x_test = (x - mean) / spread, (x_test - mean) / spread
    shares = torch.zeros(len(HEADS), c.groups)
    for h, (name, make) in enumerate(HEADS.items()):
        D = x.shape[1] if name == "adam" else model.config.hidden_size
        groups = list(zip(x[:, :D].split(first), y.split(first), strict=True))
        for n in range(1, c.groups + 1):
            torch.manual_seed(seed)
            seen = n * len(y_test) // c.groups
            named = make(groups[:n], c)(x_test[:seen, :D]).argmax(1)
            shares[h, n - 1] = (named == y_test[:seen]).float().mean()
    return shares


def main() -> None:
    """Read the flags, run all heads, print the table."""
    c = Config(**data.parse_flags(Config, sys.argv[1:]))
    check(c.groups > 0 and 40 % c.groups == 0, f"--groups must divide 40, not be {c.groups}")
    check(c.rows > 1 and c.seeds > 0, "--rows must be at least 2, --seeds at least 1")
    tokenizer, model = data.ChatTokenizer(c.model), modeling.load(c.model).requires_grad_(False)

    # Over the seeds, of which one alone has no spread.
    found = torch.stack([run_seed(model, tokenizer, seed, c) for seed in range(c.seeds)])
    mean, spread = found.mean(0), found[:, :, -1].std(0, correction=min(c.seeds - 1, 1))
    table = [("named rightly, of", *range(40 // c.groups, 41, 40 // c.groups), "spread")]
    for name, shares, last in zip(HEADS, mean.tolist(), spread.tolist(), strict=True):
        table.append((name, *shares, last))
    data.print_table(table)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
