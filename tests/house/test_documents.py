"""The documents and the code say the same: what one cites, the other has."""

from __future__ import annotations

import dataclasses
import re
import tokenize
import zlib
from pathlib import Path

import pytest

from nsa_ref.numerics import NUMERICS
from nsa_ref.semantics import PRESETS, Semantics
from nsa_ref.testing.clauses import CLAUSES, SPEC_VERSION
from pages import ROOT, anchors, headings, page, table

SOURCES = [
    path for room in ("nsa_ref", "nsa_fast", "tests") for path in (ROOT / room).rglob("*.py")
]
#: Without what stands in folders that git does not look into, such as mutmut's copy of all this.
PAGES = [
    path
    for path in ROOT.rglob("*.md")
    if not (top := path.relative_to(ROOT).parts[0]).startswith(".")
    and f"{top}/" not in page(".gitignore").split()
]

#: The version, and what has it: both change when a sentence or a switch does.
SPECIFICATION = "6", 0x72B71730

EQUATION = r"(?<!2104\.09864, )\beq\. \d+(?:(?:,| and| to) \d+)*"
#: What comments and docstrings cite: W1, eq. 9, section 3.2; NUMERICS 2, "Selection".
CITED = {
    "docs/semantics.md": rf"\b[ACFGIW]\d\b|{EQUATION}|section [\d.]+\d",
    "docs/numerics.md": r'NUMERICS \d(?:,? "[^"]+"(?: and "[^"]+")*|, acc\(n\))?',
}


@pytest.mark.parametrize("page", CITED)
def test_what_is_cited_has_a_heading(page: str) -> None:
    titles = headings(page)
    for path in SOURCES:
        tokens = tokenize.generate_tokens(path.open().readline)
        prose = [t.string for t in tokens if t.type == tokenize.COMMENT or t.string[:3] == '"""']
        for citation in re.findall(CITED[page], " ".join(" ".join(prose).split())):
            titled = re.findall(r'(?<=")[A-Z][^"]*|acc\(n\)|(?<=NUMERICS )\d', citation)
            numbered = [f"eq. {n}" for n in re.findall(r"\d+", citation) if citation[0] == "e"]
            for title in titled or numbered or [citation]:
                assert title in titles, f"{path.name} cites {citation}; {page} has none"


def test_every_clause_has_a_heading_its_sentence_and_a_definition() -> None:
    found = headings("docs/semantics.md")
    definition = "".join(path.read_text() for path in (ROOT / "nsa_ref").glob("*.py"))
    assert [title for title in found if re.fullmatch(r"[A-Z]\d", title)] == list(CLAUSES)
    for clause, sentence in CLAUSES.items():
        assert f"> {sentence}\n" in found[clause], f"docs/semantics.md says {clause} otherwise"
        assert re.search(rf"\b{clause}\b", definition), f"nsa_ref never cites {clause}"


def test_another_specification_has_another_version() -> None:
    switches = [field.name for field in dataclasses.fields(Semantics)]
    assert (SPEC_VERSION, zlib.crc32(repr((CLAUSES, switches)).encode())) == SPECIFICATION


def test_every_switch_preset_and_row_is_listed() -> None:
    switches = [field.name for field in dataclasses.fields(Semantics)]
    assert [row[0] for row in table("docs/semantics.md", "switch")[1:]] == switches
    assert table("docs/presets.md", "switch")[0][2:] == list(PRESETS)
    head, *rows = table("docs/numerics.md", "row")
    assert [row[0] for row in rows] == list(NUMERICS)
    for name, *cells in rows:
        for field, cell in zip(head[1:], cells):
            number = sum(2.0 ** int(power) for power in re.findall(r"2\^(-\d+)", cell))
            number += cell == "yes"
            assert getattr(NUMERICS[name], field) == number, f"{name}: {field} is {cell} there"


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_page_and_place_that_is_cited_exists(path: Path) -> None:
    """Pages anywhere; on a page its links, `folder/file.py` and `test_file.py::test_name`."""
    text = path.read_text()
    for name in re.findall(r"[\w./-]*\w\.md\b|\.\./shared\b", text):
        places = (path.parent / name, ROOT / name, ROOT / "docs" / name)
        assert any(place.exists() for place in places), f"{name} does not exist"
    if path.suffix == ".md":
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            place = path.parent / target if target else path
            assert place.exists(), target
            if anchor:
                found = anchors(str(place))
                assert found.count(anchor) == 1, f"{target}#{anchor} is no heading, or two"
        for place in re.findall(r"`([\w/]+/[\w/.]*)`", text):
            assert (ROOT / place).exists(), place
        for file, test in re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", text):
            found = [source.read_text() for source in SOURCES if source.match(file)]
            assert len(found) == 1, f"{file} is no file, or there are several"
            assert not test or f"def {test}(" in found[0], f"{file}::{test}"


def test_the_map_of_the_house_has_every_room() -> None:
    """A file has a line in CONTRIBUTING.md, or its folder has."""
    places = re.findall(r"`([\w/]+/[\w/.]*)`", page("CONTRIBUTING.md"))
    for path in SOURCES:
        room = str(path.relative_to(ROOT))
        mapped = (room.startswith(place) if place[-1] == "/" else room == place for place in places)
        assert any(mapped) or path.name == "__init__.py", f"{room} is not on the map"


def test_every_file_of_tests_has_its_line() -> None:
    """It is the first line of the docstring; a file is gone when its line is, and the reverse."""
    listed = dict(re.findall(r"^\| `(\S+\.py)` \| (.*) \|$", page("tests/README.md"), re.MULTILINE))
    found = {
        str(path.relative_to(ROOT)): path.read_text()[3:].split("\n")[0].removesuffix('"""')
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert listed == found
