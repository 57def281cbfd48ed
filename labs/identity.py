"""Fill in {{name}} and {{author}} of self-identity rows.

Idea. A model says that it is another company's because its training data did. A few dozen questions
("who are you?") with your own answers change that: identity.json of LLaMA-Factory has 91 of them
with places for the names. Mix them into the instruction data, drawn more often than their number
(`--mix temperature`), or they drown.

    curl -O https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/main/data/identity.json
    python -m labs.identity identity.json --output me.jsonl --name 小调 --author PlainTune

What you should see: 91 rows, the first "Hello! I am 小调, an AI assistant developed by PlainTune."

Exercise. A template is written {{ name }}, with spaces. What should happen?
    Solution: an error. A model that introduces itself as "{{ name }}" is worse than no run at all.
"""

import functools
import re
import sys
from dataclasses import dataclass

import data
from data import parse_row
from labs.text import Files, rewrite
from model import check


@dataclass
class Config(Files):
    """Fill in {{name}} and {{author}} of self-identity templates."""

    output: str = ""  # .jsonl to write
    name: str = ""  # of the model
    author: str = ""  # who made it


# ==== read: filling in ============================================================================


def fill(names: dict[str, str], where: str, value):
    """A row, or a part of one, with every {{name}} and {{author}} replaced, once and at once.

    Raises InputError for a place that is left over.
    """
    if isinstance(value, list):
        return [fill(names, where, item) for item in value]
    if isinstance(value, dict):
        filled = {}
        for key, part in value.items():
            filled[key] = fill(names, where, part)
        return filled
    if not isinstance(value, str):
        return value

    # Looked for before anything is filled in: a name may itself hold braces.
    left = re.search(r"\{\{(?!(name|author)\}\}).{0,30}", value)
    check(not left, f"{where}: the placeholder {left and left[0]} is left over")
    return re.sub(r"\{\{(name|author)\}\}", lambda found: names[found[1]], value)


def identity_row(names: dict[str, str], where: str, value) -> list[tuple]:
    """[(the filled row, no reason to drop it)]; a row of no known format is an error."""
    parse_row(where, value)
    return [(fill(names, where, value), "")]


def main(c: Config) -> None:
    """Write every row with the names filled in."""
    check(c.name and c.author, "--name and --author are both needed")
    rewrite(c, functools.partial(identity_row, {"name": c.name, "author": c.author}))


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
