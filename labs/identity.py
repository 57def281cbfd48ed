"""Fill in {{name}} and {{author}} of self-identity templates.

    python -m labs.identity FILE --output FILE.jsonl --name NAME --author AUTHOR
"""

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


def main(c: Config) -> None:
    """`data.py identity`."""
    check(c.name and c.author, "--name and --author are both needed")

    def fill(where: str, value):
        if isinstance(value, list):
            return [fill(where, item) for item in value]
        if isinstance(value, dict):
            return {key: fill(where, item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        left = re.search(r"\{\{(?!(name|author)\}\}).{0,30}", value)
        check(not left, f"{where}: the placeholder {left and left[0]} is left over")
        return re.sub(r"\{\{(name|author)\}\}", lambda key: getattr(c, key[1]), value)

    def convert(where: str, value) -> list[tuple]:
        parse_row(where, value)
        return [(fill(where, value), "")]

    rewrite(c, convert)


if __name__ == "__main__":
    with data.one_line_errors():
        main(Config(**data.parse_flags(Config, sys.argv[1:], "files")))
