"""What the two README pages point at is there, and the files import each other one way."""

import ast
import re
from pathlib import Path

import pytest
from conftest import REPO

PAGES = ["README.md", "labs/README.md"]


def links(page):
    """(text, target) of every link of a page to a file of the project."""
    text = (REPO / page).read_text(encoding="utf-8")
    return [(name, target) for name, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", text)
            if not target.startswith("http")]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_named_line_to_its_definition(page):
    for name, target in links(page):
        path, _, line = target.partition("#L")
        file = (REPO / page).parent / path
        assert file.exists(), target
        if line:
            lines = file.read_text(encoding="utf-8").splitlines()
            wanted = re.compile(rf"\s*((def|class) {name}\b|{name}\b.* = )")
            here = [n for n, text in enumerate(lines, 1) if wanted.match(text)]
            assert int(line) in here, f"{name} is at {path}#L{here[:1]}, not #L{line}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_folder_that_a_reader_lacks(page):
    assert "../shared" not in (REPO / page).read_text(encoding="utf-8")


def test_the_core_imports_no_lab_and_labs_import_only_shared_ones():
    for path in [*REPO.glob("*.py"), *Path(REPO / "labs").glob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the start of the file
            names = [alias.name for alias in getattr(node, "names", [])]
            module = getattr(node, "module", None)
            if module == "labs":
                names = [f"labs.{name}" for name in names]
            elif module:
                names = [module]
            labs = {name for name in names if name.startswith("labs")}
            assert path.parent.name == "labs" or not labs, path
            shared = {"labs.text", "labs.rewards", "labs.reward_model", "labs.world"}
            assert labs <= shared, (path, labs)


def test_commands_in_docstrings_are_shown_as_they_are_typed():
    """A single backslash at a line's end would join two lines of a docstring into a longer one."""
    for path in [*REPO.glob("*.py"), *Path(REPO / "labs").glob("*.py")]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert max(map(len, text.splitlines())) <= 100, path
