"""The pages of the repository as tests read them."""

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
    titles = parts[1::2]
    assert len(titles) == len(set(titles)), f"two headings of {name} are the same"
    return dict(zip(titles, parts[2::2]))


def anchors(name: str) -> list[str]:
    """What a link to a heading of a page names after its `#`: heading by heading."""
    text = re.sub(r"^```.*?^```", "", page(name), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def table(name: str, first: str) -> list[list[str]]:
    """The rows of the table whose head begins with `first`: the head, and what follows its rule."""
    text = page(name)
    head, _, *rows = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split(" |")] for line in (head, *rows)]
