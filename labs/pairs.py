"""Preference pairs from a model's own samples: the best answer against the worst.

Idea. Preference data of other models goes stale: it teaches to prefer answers that this model would
never give. So let the model answer every prompt n times, score the answers, and make of the best
and the worst one a pair (as in Llama 3, arXiv:2407.21783, section 4.1.2). Prompts whose answers
score alike teach nothing: they are dropped, and counted. To train with train_dpo.py on the pairs
and begin again is *iterative DPO*:

    M=out/sft; for k in 1 2 3; do
        python eval.py generate --model $M --data out/demo/pairs.jsonl --n 8 --temperature 1 \\
            --seed $k --max_new_tokens 64 --output out/pairs/samples$k.jsonl
        python -m labs.pairs out/pairs/samples$k.jsonl --by reward --reward labs/rl.py:polite \\
            --output out/pairs/pairs$k.jsonl
        python train_dpo.py --model $M --data out/pairs/pairs$k.jsonl --output_dir out/pairs/$k \\
            --learning_rate 5e-5 --epochs 3; M=out/pairs/$k
    done

--by says what makes an answer better: match, it is the row's reference; reward, what a function
says; length, it is shorter (against a judge, human or not, that liked long answers); logprob, it
has more ln p per token under --model; label, somebody liked it.

What you should see: polite and right answers to the 40 held-out questions of out/demo/pairs_val
(generate and this lab on its samples, --seed 9), and the exam. Each round has fewer pairs: the
better the model, the more groups tie.

    round                  0      1      2      3
    pairs                       117    116     97   of 120 prompts
    greedy              45.0   87.5  100.0  100.0
    mean of 8 samples   42.8   66.9   85.0   92.2
    best of 8           97.5  100.0  100.0  100.0
    exam               100.0  100.0  100.0  100.0

Exercise. 30% of a prompt's answers are right. How often do 8 samples give no pair, how often do 2?
    Solution: 0.3^8 + 0.7^8 = 6%, 0.3^2 + 0.7^2 = 58%.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import data
import eval as evaluation
import model as modeling
from data import Row
from labs.rewards import find_reward
from labs.text import Modelled, check_output, example_of, write_rows
from model import check


@dataclass
class Config(Modelled):
    """Make preference pairs of the best and the worst answer to each prompt."""

    by: Literal["match", "reward", "length", "logprob", "label"] = "match"  # what is better
    reward: str = ""  # FILE.py:function, of --by reward


# ==== read: from answers to pairs =================================================================


def best_and_worst(answers: list[tuple[str, float]]) -> tuple[dict, str]:
    """The pair in the (text, score) of all answers to a prompt, or why there is none."""
    if len(answers) < 2:
        return {}, "prompts with one answer"
    chosen, best = max(answers, key=lambda answer: answer[1])
    rejected, worst = min(answers, key=lambda answer: answer[1])
    if best == worst:
        return {}, "prompts whose answers score alike"
    return {"chosen": chosen, "rejected": rejected}, ""


def score_answers(c: Config, rows: list[Row], values: list[dict]) -> list[float]:
    """How good each row's last answer is; one that did not end is worse than all that did."""
    if c.by == "logprob":
        scores = mean_logprobs(c, rows)
    elif c.by == "length":
        scores = [-float(len(row.messages[-1]["content"])) for row in rows]
    elif c.by == "label":
        scores = [float(row.label) for row in rows]
    else:
        reward, scores = find_reward("match" if c.by == "match" else c.reward), []
        for row, value in zip(rows, values, strict=True):
            *prompt, answer = row.messages
            scores.append(float(reward(prompt, answer["content"], value.get("reference") or "")))
    lowest = min(scores) - 1
    return [lowest if value.get("finish") == "length" else score
            for score, value in zip(scores, values, strict=True)]


def mean_logprobs(c: Config, rows: list[Row]) -> list[float]:
    """Mean ln p per token, in nats, of each row's last answer under --model."""
    tokenizer = data.ChatTokenizer(c.model, c.template)
    model = modeling.load(c.model, modeling.best_dtype(c.dtype, modeling.best_device()),
                          modeling.best_device())
    examples = [example_of(row, tokenizer, "last", c.max_length) for row in rows]
    scores = [0.0] * len(rows)
    for i, logp in evaluation.example_logprobs(model, examples, c.micro_tokens):
        scores[i] = logp.mean().item()
    return scores


# ---- skip on a first reading: rows ---------------------------------------------------------------


def parse_sample(c: Config, where: str, value) -> tuple[Row, dict]:
    """A row that --by can score, and its keys; InputError for others."""
    row = data.parse_row(where, value)
    answered = len(row.messages) > 1 and row.messages[-1]["role"] == "assistant"
    check(answered and not row.chosen, f"{where}: expected a question and an answer, as `eval.py "
          "generate` writes them")
    check(c.by != "label" or row.label is not None, f"{where}: --by label needs a label")
    check(c.by != "match" or data.is_text(value.get("reference")),
          f"{where}: --by match needs a text as `reference` to compare with")
    return row, value


def main(c: Config) -> None:
    """Read, score, group by prompt, write the pairs, say how good the answers were."""
    check_output(c.output, *c.files)
    check((c.by == "reward") == bool(c.reward), "--by reward and --reward go together")
    check((c.by == "logprob") == bool(c.model), "--by logprob and --model go together")
    found = data.read_rows(c.files, c.skip_bad_rows, parse=partial(parse_sample, c))
    samples = [sample for _, sample in found if sample]
    check(samples, f"{', '.join(c.files)}: no row to read")
    rows, values = zip(*samples, strict=True)

    # All answers to the same prompt are one another's rivals, from whatever file they come.
    scores, groups = score_answers(c, rows, values), {}
    for row, score in zip(rows, scores, strict=True):
        prompt = json.dumps(row.messages[:-1], ensure_ascii=False)
        groups.setdefault(prompt, []).append((row.messages[-1]["content"], score))
    pairs = [(json.loads(prompt), *best_and_worst(group)) for prompt, group in groups.items()]
    write_rows(c.output, [({"prompt": prompt, **pair}, why) for prompt, pair, why in pairs])

    best = [max(score for _, score in group) for group in groups.values()]
    sizes = Counter(map(len, groups.values()))
    print(f"{len(rows)} answers to {len(groups)} prompts, {max(sizes)} each at most; --by {c.by}: "
          f"mean {sum(scores) / len(scores):.3f}, of the best answers {sum(best) / len(best):.3f}")


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
