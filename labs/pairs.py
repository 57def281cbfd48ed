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
    pairs                       117    115     96   of 120 prompts
    greedy              40.0   92.5  100.0  100.0
    mean of 8 samples   46.3   66.6   83.4   91.6
    best of 8           97.5  100.0  100.0  100.0
    exam               100.0  100.0  100.0  100.0

Exercise. 30% of a prompt's answers are right. How often do 8 samples give no pair, how often do 2?
    Solution: 0.3^8 + 0.7^8 = 6%, 0.3^2 + 0.7^2 = 58%.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import data
import eval as evaluation
from data import Row
from labs.rewards import find_reward, parse_answer, prompt_key
from labs.text import Modelled, check_output, example_of, write_rows
from model import check


@dataclass
class Config(Modelled):
    """Make preference pairs of the best and the worst answer to each prompt."""

    files: list[str]  # samples, as eval.py generate writes them
    by: Literal["match", "reward", "length", "logprob", "label"] = "match"  # what is better
    reward: str = ""  # of --by reward: match, exam, final, or FILE.py:function


# ==== read: from answers to pairs =================================================================


def best_and_worst(answers: list[tuple[str, float]]) -> tuple[dict, str]:
    """The pair in the (text, score) of all answers to a prompt, or why there is none."""
    if len(answers) < 2:
        return {}, "prompts with one answer"

    # Of equally good ones the first, so that the same samples give the same pairs.
    chosen, best = max(answers, key=lambda answer: answer[1])
    rejected, worst = min(answers, key=lambda answer: answer[1])
    if best == worst:
        return {}, "prompts whose answers score alike"
    return {"chosen": chosen, "rejected": rejected}, ""


def score_answers(c: Config, samples: list[tuple]) -> list[float]:
    """How good each sample's last answer is; one that did not end is worse than all that did."""
    # A model scores all of them together, the other ways one by one.
    if c.by == "logprob":
        rows, _, _ = zip(*samples, strict=True)
        scores = mean_logprobs(c, rows)
    else:
        reward = find_reward(c.reward or "match")
        scores = [score_answer(c, reward, row, reference) for row, reference, _ in samples]

    # What an unfinished answer would have come to nobody knows.
    lowest = min(scores) - 1
    for i, (_, _, ended) in enumerate(samples):
        if not ended:
            scores[i] = lowest
    return scores


def score_answer(c: Config, reward: Callable, row: Row, reference: str) -> float:
    """How good a row's last answer is by itself."""
    *prompt, answer = row.messages
    if c.by == "length":
        return -float(len(answer["content"]))
    if c.by == "label":
        return float(row.label)
    return reward(prompt, answer["content"], reference, row.where)


def mean_logprobs(c: Config, rows: list[Row]) -> list[float]:
    """Mean ln p per token, in nats, of each row's last answer under --model."""
    tokenizer = data.ChatTokenizer(c.model, c.template)
    model = evaluation.open_model(c, tokenizer)
    examples = [example_of(row, tokenizer, "last", c.max_length) for row in rows]
    scores = [0.0] * len(rows)
    for i, logp in evaluation.example_logprobs(model, examples, c.micro_tokens):
        scores[i] = logp.mean().item()
    return scores


# ---- skip on a first reading: rows ---------------------------------------------------------------


def parse_sample(c: Config, where: str, value) -> tuple[Row, str, bool]:
    """(row, reference, whether it ended) of a sample that --by can score; InputError for others."""
    row, reference = parse_answer(where, value)
    check(c.by != "label" or row.label is not None, f"{where}: --by label needs a label")
    check(c.by != "match" or reference.strip(),
          f"{where}: --by match needs a text as `reference` to compare with")
    return row, reference, value.get("finish") != "length"


def main(c: Config) -> None:
    """Read, score, group by prompt, write the pairs, say how good the answers were."""
    check_output(c.output, *c.files)
    check((c.by == "reward") == bool(c.reward), "--by reward and --reward go together")
    check((c.by == "logprob") == bool(c.model), "--by logprob and --model go together")
    found = data.read_rows(c.files, c.skip_bad_rows, parse=partial(parse_sample, c))
    samples = [sample for _, sample in found if sample]
    check(samples, f"{', '.join(c.files)}: no row to read")

    # All answers to the same prompt are one another's rivals, from whatever file they come.
    scores, prompts, groups = score_answers(c, samples), {}, {}
    for (row, _, _), score in zip(samples, scores, strict=True):
        *prompt, answer = row.messages
        key = prompt_key(prompt, row.tools)
        prompts[key] = {"prompt": prompt, **({"tools": row.tools} if row.tools else {})}
        groups.setdefault(key, []).append((answer["content"], score))

    # What choosing alone brings is seen from the best answers, with or without a rival.
    pairs, best, most = [], [], 0
    for key, group in groups.items():
        pair, why = best_and_worst(group)
        pairs.append(({**prompts[key], **pair}, why))
        best.append(max(score for _, score in group))
        most = max(most, len(group))
    write_rows(c.output, pairs)
    print(f"{len(samples)} answers to {len(groups)} prompts, {most} each at most; --by {c.by}: "
          f"mean {sum(scores) / len(scores):.3f}, of the best answers {sum(best) / len(best):.3f}")


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
