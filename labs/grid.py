"""A grid over the weight of one source: how much of it may stand beside the others?

Idea. Yi (arXiv:2403.04652, section 3.1) weighs its fine-tuning data ability by ability: from
{1, 1/2, 1/4, ..., 1/64} it takes what serves an ability without hurting the others. The mean of all
validation losses would hide that one rises while another falls, so each file has its own:

    for w in 1, 1/2, ..., 1/64:   train on the mix (1, ..., 1, w);  loss of every validation file

    python -m labs.grid                          # the demo, after `python train_sft.py`
    python -m labs.grid --model DIR --data chats.json code.json --val_data chats_val.json \\
        code_val.json --steps 200                # the weight of code.json, the last of --data

What you should see (random weights, 50 steps, five seeds). Seen: below 1/8 exam practice is lost,
and the conversations hardly gain. From 1 to 1/8 each gives something up for the other: the grid
shows the prices, the choice is yours. Not seen: a weight that is best for both. Cannot be seen:
which weight a long run wants.

    loss in nats per token, mean (deviation) of 5 seeds
    weight of practice    instructions_val   practice_val
    1/1                      1.043 (0.034)  1.639 (0.015)
    1/2                      0.980 (0.029)  1.706 (0.014)
    1/4                      0.925 (0.031)  1.846 (0.030)
    1/8                      0.905 (0.035)  2.264 (0.186)
    1/16                     0.892 (0.034)  3.454 (0.537)
    1/32                     0.879 (0.025)  5.141 (0.720)
    1/64                     0.870 (0.029)  6.722 (0.348)

Exercise. Which weight would proportional mixing take here, of 300 and 10,000 rows?
    Solution: 10,000 / 300 = 33, far outside of the grid: sizes say nothing about worth.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from typing import Literal

import data
import model as modeling
import train_sft
from model import check

WEIGHTS = [2.0**-k for k in range(7)]  # 1, 1/2, ..., 1/64
DEMO = {"model": "out/demo/base", "learning_rate": 2e-3, "steps": 50, "warmup": 10,
        "data": ["out/demo/instructions.jsonl", "out/demo/practice.jsonl"],
        "val_data": ["out/demo/instructions_val.jsonl", "out/demo/practice_val.jsonl"]}


@dataclass
class Config(train_sft.Config):
    """Train on files of weight 1 and a last one of weight 1, 1/2, ..., 1/64; compare by file."""

    output_dir: str = ""  # nothing is written
    recipe: Literal[""] = ""  # there is none
    mix: Literal["proportional"] = "proportional"  # the grid takes its place
    seeds: int = 5  # runs of each weight, from --seed on


# ==== read: the idea ==============================================================================


def losses_after(c: Config, load, hardware) -> dict[str, float]:
    """Train as train_sft.py does, without its logs and files; the loss of every validation file."""
    run, _ = train_sft.prepare_data(c, load, True)

    # Every run begins with the same weights.
    model, _ = train_sft.load_trainable(c, hardware)
    optimizer, scaler = train_sft.make_optimizer(model, c), hardware.make_scaler()
    for step in range(1, run.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = train_sft.learning_rate_at(step, run.steps, c)
        loss, _ = train_sft.backward_step(model, run, step, c, hardware, scaler)
        train_sft.clip_and_step(model, optimizer, scaler, c, loss, run, step)

    return train_sft.validation_loss(model, run.validation, c, hardware)["val_loss_by_source"]


def main() -> None:
    """One row per weight: the loss of every file, mean and deviation over the seeds."""
    c = train_sft.resolve_config(Config, sys.argv[1:], {}, lambda: DEMO)
    check(len(c.data) > 1 and c.val_data, "--data needs two files or more, --val_data some too")
    check(c.seeds > 1, f"--seeds must be at least 2, to show a spread, not {c.seeds}")
    check(not (c.eot or c.lora_rank), "--eot and --lora_rank are for train_sft.py")

    # Runs here are short, and nothing of them stays.
    for name in ("output_dir", "resume", "overwrite", "save_every", "keep", "lora_merge",
                 "log_every", "eval_every", "exam_data", "exam_every", "temperature"):
        check(getattr(c, name) == getattr(Config(), name), f"--{name} means nothing here: the grid "
              "sets the weights, writes nothing, and measures losses at the end")
    tokenizer = data.ChatTokenizer(c.model, c.template, system=c.system)
    hardware = train_sft.setup_hardware(c.dtype)
    check(hardware.world == 1, "labs.grid runs in one process")
    width = modeling.load_config(c.model).hidden_size
    c.mix, c.learning_rate = "weights", c.learning_rate or 2e-5 * 4096 / width  # as train_sft.py

    # All runs are on the same rows: these are read once.
    examples = {}
    for files in (c.data, c.val_data):
        examples[tuple(files)] = train_sft.load_rows(files, tokenizer, c, quiet=True)

    print(f"loss in nats per token, mean (deviation) of {c.seeds} seeds")
    table = [(f"weight of {data.source_names(c.data)[-1]}", *data.source_names(c.val_data))]
    for weight in WEIGHTS:
        c.weights, found = [*[1.0] * (len(c.data) - 1), weight], {}
        for seed in range(c.seeds):
            run = replace(c, seed=c.seed + seed)
            losses = losses_after(run, lambda files: examples[tuple(files)], hardware)
            for name, loss in losses.items():
                found.setdefault(name, []).append(loss)

        # By file, since a mean would hide the one that gets worse.
        cells = [f"{statistics.mean(x):.3f} ({statistics.stdev(x):.3f})" for x in found.values()]
        table.append((f"1/{1 / weight:.0f}", *cells))
    data.print_table(table)


if __name__ == "__main__":
    with data.one_line_errors():
        main()
