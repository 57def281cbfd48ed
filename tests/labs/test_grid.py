"""The grid over a source's weight: its rows are runs of train_sft.py."""

import families
import pytest
from conftest import command, jsonl, train

FLAGS = ["--steps", 3, "--batch_size", 4, "--warmup", 1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    families.make_checkpoint(folder / "model", "smollm2")
    for name, answer in (("sea", "river runs"), ("moon", "people on moon")):
        rows = [{"prompt": f"{name} {k}", "response": f"{answer} {k}"} for k in range(12)]
        jsonl(folder / f"{name}.jsonl", *rows[:8])
        jsonl(folder / f"{name}_val.jsonl", *rows[8:])
    return folder


def files(work, *names):
    return [work / f"{name}.jsonl" for name in names]


def flags(work):
    return ["--model", work / "model", "--data", *files(work, "sea", "moon"),
            "--val_data", *files(work, "sea_val", "moon_val"), *FLAGS]


def test_row_of_the_grid_is_what_train_sft_finds_with_these_weights(work):
    status, out, err = command("labs/grid.py", *flags(work), "--seeds", 2)
    assert status == 0, err
    head, *rows = [line.split() for line in out.splitlines()[1:]]
    assert head == ["weight", "of", "moon", "sea_val", "moon_val"]
    assert [row[0] for row in rows] == [f"1/{2**k}" for k in range(7)]

    # 1/4 under both seeds, with the files that a run writes.
    losses = []
    for seed in (0, 1):
        records, _ = train(work, f"seed{seed}", *flags(work), "--seed", seed, "--mix", "weights",
                           "--weights", 1, 0.25)
        losses.append(records[-1]["val_loss_by_source"])
    for column, name in ((1, "sea_val"), (3, "moon_val")):
        a, b = (loss[name] for loss in losses)
        mean, spread = float(rows[2][column]), float(rows[2][column + 1].strip("()"))
        assert mean == pytest.approx((a + b) / 2, abs=6e-4)
        assert spread == pytest.approx(abs(a - b) / 2**0.5, abs=6e-4)


@pytest.mark.parametrize("change,words", [
    (("--seeds", "1"), "--seeds must be at least 2"), (("--mix", "equal"), "--mix"),
    (("--data", "sea.jsonl"), "--data needs two files"), (("--steps", "-1"), "--steps"),
    *((pair, f"{pair[0]} means nothing here") for pair in (
        ("--eval_every", "5"), ("--keep", "1"), ("--save_every", "5"), ("--overwrite",),
        ("--temperature", "3"), ("--output_dir", "elsewhere"), ("--log_every", "5")))])
def test_bad_flags_end_with_one_line(work, change, words):
    change = [work / word if word.endswith(".jsonl") else word for word in change]
    status, _, err = command("labs/grid.py", *flags(work), *change)
    assert status == 2 and words in err and err.count("\n") == 1
