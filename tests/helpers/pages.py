"""Helper: the pages of the repository as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

import nsa_ref

ROOT = Path(nsa_ref.__file__).parents[1]


def page(name: str) -> str:
    """The text of a page, named from the root of the repository."""
    return (ROOT / name).read_text()


def headings(name: str) -> dict[str, str]:
    """Title -> what stands below it; of "2. Bounds" the title is 2."""
    parts = re.split(r"^#+ (\d(?=\. )|.+)(?:\. .+)?\n", page(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def table(name: str, first: str) -> list[list[str]]:
    """The rows of the table whose head begins with `first`: the head, and what follows its rule."""
    text = page(name)
    head, _, *rows = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split(" |")] for line in (head, *rows)]
