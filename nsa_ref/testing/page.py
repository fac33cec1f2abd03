"""The report as one page: everything that `--json` holds, for a browser, a phone and a printer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.findings import Finding, grouped
from nsa_ref.testing.ledger import to_toml
from nsa_ref.testing.narrowing import entry_of
from nsa_ref.testing.pictures import UNCOUNTED, Excerpt, side_by_side
from nsa_ref.testing.report import rows_named, same_as, share, summary
from nsa_ref.testing.verdicts import Convention
from nsa_ref.testing.wording import convention, printable, shortened

TEMPLATES = Path(__file__).parent / "templates"

#: Numbers of a clause, and what they are called above their column.
COLUMNS = (
    ("cases", "cases"),
    ("known", "known"),
    ("inconclusive", "inconclusive"),
    ("ambiguous", "ambiguous rows"),
    ("not_offered", "not offered"),
)

#: A verdict is a sign and a word, not a colour alone.
SIGNS = {"pass": "✓", "fail": "✗"}

#: The side of a cell, and the room for the numbers of rows and columns, in pixels.
CELL, LEFT, TOP = 12, 30, 14


def to_html(report: Mapping[str, Any]) -> str:
    """The page of a report, as `report.to_json` gives it.

    Nothing in it is loaded from elsewhere, and nothing runs: names and texts of an implementation
    are escaped, and what no screen can show is written out.

    Raises
    ------
    ImportError : jinja2 is not installed
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    verdicts = {clause["verdict"] for clause in report["clauses"]}
    known = any(clause["known"] for clause in report["clauses"])
    return environment.get_template("report.html").render(
        report=report,
        rows_named=rows_named,
        share=share,
        summary=summary(report["clauses"], report["seconds"]),
        result="fail" if report["findings"] else "pass" if verdicts == {"pass"} else "",
        sentences=CLAUSES,
        columns=[column for column in COLUMNS if column[0] != "known" or known],
        signs=SIGNS,
        findings=[_finding(group) for group in grouped(report["findings"])],
        edges=[*report["edges"].items(), *((edge, 0) for edge in report["unmet_edges"])],
    )


def _finding(group: Sequence[Finding]) -> dict[str, Any]:
    """What the page says of findings that are likely to have one cause."""
    finding, *others = group
    fault, text = dict(finding["fault"]), finding["text"]
    if fault.get("reading") and fault["actual"] < 0:
        fault["actual"] = UNCOUNTED
    pictures: list[Picture] = []
    uncounted = ""
    if masks := fault.pop("masks", None):
        excerpt = Excerpt(**masks)
        text = text.replace(f"\n{side_by_side(excerpt)}", "")
        uncounted = UNCOUNTED if "?" in "".join(excerpt.actual) else ""
        pictures = [_picture("expected", excerpt), _picture("actual", excerpt)]
    explains = finding["convention"]
    return {
        "clause": finding["clause"],
        "implementation": finding["implementation"],
        "seen": shortened(text, finding["file"]),
        "pictures": pictures,
        "uncounted": uncounted,
        "numbers": list(_numbers(fault)),
        "convention": explains and convention(Convention(**explains)),
        "case": str(Case.from_json(finding["case"])),
        "replay": finding["replay"],
        "add": f"nsa-ref ledger add {shlex.quote(finding['file'])}",
        "entry": to_toml(entry_of([finding], ())),
        "same": same_as(finding, others),
        "others": others,
    }


def _numbers(fault: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields of a fault that say something."""
    for name, value in fault.items():
        if value is not None and value != "" and value != []:
            yield (
                name.replace("_", " "),
                ", ".join(map(str, value)) if isinstance(value, list) else str(value),
            )


@dataclass(frozen=True)
class Text:
    """Words in a picture; kind : "row", "column" or "times"."""

    kind: str
    x: float
    y: float
    words: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A mask as the paths of an SVG: one for the cells of each kind, one for the signs on them."""

    title: str
    label: str
    width: int
    height: int
    none: str
    both: str
    extra: str
    missing: str
    counted: str
    pluses: str
    minuses: str
    texts: tuple[Text, ...]


#: Character of an `Excerpt` -> the kind of cell; any other one is a number.
KINDS = {".": "none", "#": "both", "+": "extra", "-": "missing"}


def _picture(title: str, masks: Excerpt) -> Picture:
    """One of the two masks."""
    rows: Sequence[str] = getattr(masks, title)
    width = len(rows[0]) if rows else 0
    cells = [
        (KINDS.get(sign, "counted"), sign, LEFT + CELL * column, TOP + CELL * row)
        for row, line in enumerate(rows)
        for column, sign in enumerate(line)
    ]

    def path(kind: str, drawn: str) -> str:
        """Draw the same in every cell of a kind, from its upper left corner."""
        return "".join(f"M{x} {y}{drawn}" for which, _, x, y in cells if which == kind)

    square = "m1 1h10v10h-10z"
    numbered = [masks.left + c for c in range(width) if (masks.left + c) % 5 == 0 or not c]
    texts = [
        *(
            Text("column", LEFT + CELL * (column - masks.left) + CELL / 2, TOP - 4, str(column))
            for column in numbered
        ),
        *(
            Text("row", LEFT - 4, TOP + CELL * row + 9, str(masks.top + row))
            for row in range(len(rows))
        ),
        *(Text("times", x + CELL / 2, y + 9, s) for kind, s, x, y in cells if kind == "counted"),
    ]
    last_row, last_column = masks.top + len(rows) - 1, masks.left + width - 1
    return Picture(
        title=title,
        label=f"{title} mask, rows {masks.top} to {last_row}, columns {masks.left} to "
        f"{last_column}: {', '.join(rows)}",
        width=LEFT + CELL * max(width, 2),
        height=TOP + CELL * len(rows),
        none=path("none", square),
        both=path("both", square),
        extra=path("extra", square),
        missing=path("missing", square),
        counted=path("counted", square),
        pluses=path("extra", "m3 6h6m-3 -3v6"),
        minuses=path("missing", "m3 6h6"),
        texts=tuple(texts),
    )
