"""Choose rows by their tags: what a row asks for, in a model's words; more tags, harder rows.

Idea. Let a model name the intentions of every question ("translation", "poetry"). A row with many
tags is complex, and rows whose tags cover all of them are diverse (InsTag, arXiv:2308.07074). Tags
that a model makes up as it goes must be cleaned first (section 3.1):

    merge   Poetry, poetry and "poetry-writing" differ by case and signs: all become small letters
            and single spaces
    filter  a tag of fewer than --least rows is an accident; InsTag drops tags below 20

Then *complexity-first diverse sampling* (algorithm 1): in rounds, rows with most tags first, each
taken if it adds a tag to those of its round. Rows bring their tags under the key `tags`.

    python -m labs.tags                                   # the demo's conversations, with tags
    python -m labs.tags out/tags/rows.jsonl --n 30 --output out/tags/few.jsonl

What you should see: the demo's tags say which relations and which things a conversation asks about.

    rows      tags  of all  tags per row
    chosen      44  100.0%          7.30
    random      40   90.9%          4.47     42, 36, 38, 37 tags with --seed 1 to 4: 39 +- 2

All tags in a tenth of the rows; but rows with most tags are the longest ones, so compare what is
trained on them with random rows of as many tokens.

Exercise. Every row has one tag, and there are k tags. Which rows are the first k?
    Solution: one of each tag. Nothing adds a second row of a tag in the same round.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from data import is_text, parse_row, print_table, read_rows
from labs.text import Files, check_output, kept_rows, write_rows
from model import check


@dataclass
class Config(Files):
    """Choose rows that have many tags and cover all of them."""

    output: str = ""  # .jsonl to write
    n: int = 0  # rows to choose
    least: int = 1  # rows that a tag must stand in, or it is no tag; InsTag's 20 for large files
    seed: int = 0  # of the random rows that the choice is compared with


# ==== read: tags ==================================================================================


def merge_tag(tag: str) -> str:
    """A tag in small letters, with single spaces in the place of signs."""
    return " ".join(re.findall(r"\w+", tag.lower().replace("_", " ")))


def frequent_tags(rows: list[list[str]], least: int) -> list[set[str]]:
    """The tags of each row, merged, without those that fewer than `least` rows have."""
    # A row counts once for a tag, however often and in whatever spelling it names it.
    merged, counts = [], Counter()
    for tags in rows:
        own = set(map(merge_tag, tags)) - {""}
        merged.append(own)
        counts.update(own)

    frequent = {tag for tag, count in counts.items() if count >= least}
    return [own & frequent for own in merged]


def cover_tags(tags: list[set[str]], n: int) -> list[int]:
    """n rows by complexity-first diverse sampling (InsTag, arXiv:2308.07074, algorithm 1).

    In rounds, rows with most tags first: a row is taken that adds a tag to those of the round.
    """
    # A row passed over in one round gets its chance in the next; one without tags never.
    left = sorted((i for i, own in enumerate(tags) if own), key=lambda i: -len(tags[i]))
    chosen = []
    while left:
        seen, passed = set(), []
        for i in left:
            if tags[i] <= seen:
                passed.append(i)
            else:
                chosen.append(i)
                seen |= tags[i]
        left = passed
    return chosen[:n]


# ---- skip on a first reading: the command, the demo ----------------------------------------------


def parse_tags(where: str, value) -> list[str]:
    """The tags of a row; none if it has none."""
    parse_row(where, value)
    tags = (value.get("tags") if isinstance(value, dict) else None) or []
    check(isinstance(tags, list) and all(map(is_text, tags)),
          f"{where}: expected a list of texts as tags, found {tags!r:.40}")
    return tags


def main(c: Config) -> None:
    """Choose, write, and compare with as many random rows."""
    check_output(c.output, *c.files)
    check(c.n > 0 and c.least > 0, "--n and --least must be above 0")
    found, reasons, raw = [], [], set()
    for _, own in read_rows(c.files, c.skip_bad_rows, parse=parse_tags):
        found.append(own or [])
        reasons.append("bad row" if own is None else "no tags")
        raw.update(found[-1])
    tags = frequent_tags(found, c.least)
    there = [i for i, own in enumerate(tags) if own]
    check(there, f"{', '.join(c.files)}: no row has a tag that {c.least} rows have")

    # Every row that is not written has a reason.
    chosen = cover_tags(tags, c.n)
    for i in there:
        reasons[i] = "not chosen"
    for i in chosen:
        reasons[i] = ""
    write_rows(c.output, kept_rows(c, reasons))
    if len(chosen) < c.n:
        print(f"--n {c.n} is more than there is: only {len(chosen)} rows have tags")

    # What chance alone covers.
    every = set().union(*tags)
    random = np.random.default_rng(c.seed).permutation(there)[: len(chosen)]
    table = [("rows", "tags", "of all", "tags per row")]
    for name, rows in (("chosen", chosen), ("random", random)):
        own = [tags[i] for i in rows]
        covered = set().union(*own)
        table.append((name, len(covered), len(covered) / len(every),
                      f"{sum(map(len, own)) / len(rows):.2f}"))
    print(f"{len(raw)} tags, {len(every)} when merged and in {c.least} rows or more")
    print_table(table)


def make_demo(folder: Path, source: Path) -> None:
    """The demo's conversations, tagged by what they ask: each relation, each thing asked about."""
    check(source.is_file(), f"{source} is missing; `python train_sft.py` makes the demo")

    tagged = []
    for value, row in read_rows([str(source)], quiet=True):
        # A fact of the demo reads: the RELATION of "THING" is "...".
        tags = []
        for message in row.messages:
            for thing, relation in re.findall("“(.*?)”的(.*?)是“", message["content"]):
                tags += [f" {thing} ", f" {relation} "]
        tagged.append(({**value, "tags": tags}, ""))
    write_rows(folder / "rows.jsonl", tagged)
    print(f"next, choose a tenth of them:\n  python -m labs.tags {folder}/rows.jsonl --n 30 "
          f"--output {folder}/few.jsonl")


if __name__ == "__main__":
    with data.one_line_errors():
        if len(sys.argv) == 1:
            make_demo(Path("out/tags"), Path("out/demo/instructions.jsonl"))
        else:
            main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
