"""Two reports of `--json` side by side: what became better, what became worse, what only moved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_ref.testing.files import read_text
from nsa_ref.testing.loading import CannotRun
from nsa_ref.testing.report import COLOURS, SCHEMA, share
from nsa_ref.testing.wording import printable

#: What makes two runs comparable: where one of these differs, it is said.
CIRCUMSTANCES = (
    *("implementation", "device", "device_name", "numerics", "spec_version", "seed", "level"),
)

#: The verdicts that say something; all others stand between them, none better than another.
RANKS = {"fail": 0, "pass": 2}


@dataclass(frozen=True)
class Difference:
    """What differs between two reports.

    circumstances : (name, old, new)
    clauses : (id, old, new) of those that are not the same, None where a report has no such clause
    new, gone : causes, each a list of findings of which the other report has none like it
    """

    circumstances: list[tuple[str, Any, Any]]
    clauses: list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]
    new: list[list[dict[str, Any]]]
    gone: list[list[dict[str, Any]]]

    @property
    def is_worse(self) -> bool:
        """True if a clause fell, or a cause is new."""
        return bool(self.new) or any(_rank(old) > _rank(new) for _, old, new in self.clauses)


def read_report(path: Path) -> dict[str, Any]:
    """A report of `nsa-ref verify --json`.

    Raises
    ------
    CannotRun : in one line
    """
    try:
        report = json.loads(read_text(path))
    except FileNotFoundError:
        raise CannotRun(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CannotRun(f"{path} holds no report: {error}") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise CannotRun(
            f"{path} holds no report: its schema is {schema!r}, not {SCHEMA!r}. Reports are made "
            "by nsa-ref verify --json FILE"
        )
    try:
        _check(report)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CannotRun(f"{path} holds no report: {what}") from None
    return dict(report)


def _check(report: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or AttributeError if it has not what is read below."""
    dict(report["versions"])
    for name in CIRCUMSTANCES:
        str(report[name])
    for clause in report["clauses"]:
        hash((clause["id"], clause["verdict"]))
        clause["cases"] + 0
        if clause["budget_used"] is not None:
            clause["budget_used"] + 0.0
    for finding in report["findings"]:
        hash((_identity(finding), finding.get("cause")))
        finding["text"].partition("\n")


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    """What differs between an older report and a newer one."""
    versions = dict.fromkeys([*old["versions"], *new["versions"]])
    circumstances = [
        *((name, old[name], new[name]) for name in CIRCUMSTANCES),
        *((name, old["versions"].get(name), new["versions"].get(name)) for name in versions),
        ("complete", old.get("complete"), new.get("complete")),
    ]
    before, after = ({clause["id"]: clause for clause in r["clauses"]} for r in (old, new))
    moved = ("verdict", "cases", "budget_used")
    clauses = [
        (name, before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])
    ]
    return Difference(
        [each for each in circumstances if each[1] != each[2]],
        [
            (name, was, now)
            for name, was, now in clauses
            if was is None or now is None or any(was[m] != now[m] for m in moved)
        ],
        _without(new["findings"], old["findings"]),
        _without(old["findings"], new["findings"]),
    )


def _without(findings: Sequence[Any], others: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """The causes of which the others have no finding."""
    causes: dict[Any, list[dict[str, Any]]] = {}
    for finding in findings:
        causes.setdefault(finding.get("cause") or _identity(finding), []).append(finding)
    known = {_identity(finding) for finding in others}
    return [cause for cause in causes.values() if known.isdisjoint(map(_identity, cause))]


def _identity(finding: Mapping[str, Any]) -> tuple[Any, ...]:
    """Place and numbers of a finding change from run to run, and the case with the seed."""
    names = ("implementation", "clause", "property", "kind", "tensor")
    return tuple(finding[name] for name in names)


def _rank(clause: Mapping[str, Any] | None) -> int:
    return 1 if clause is None else RANKS.get(clause["verdict"], 1)


def show_difference(console: Console, difference: Difference) -> None:
    """What changed, or that nothing did."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style), soft_wrap=True)

    for name, was, now in difference.circumstances:
        say(f"{name}: {_shown(was)} -> {_shown(now)}")
    if difference.clauses:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("clause", no_wrap=True)
        for heading in ("verdict", "cases", "budget used"):
            table.add_column(heading)
        for name, old, new in difference.clauses:
            cells = [_moved(old, new, what) for what in ("verdict", "cases", "budget_used")]
            sign = _rank(new) - _rank(old)
            style = COLOURS["fail"] if sign < 0 else COLOURS["pass"] if sign else ""
            table.add_row(
                Text(printable(str(name))), Text(cells[0], style=style), *map(Text, cells[1:])
            )
        console.print(table)
    for called, style, causes in (
        ("new", COLOURS["fail"], difference.new),
        ("gone", COLOURS["pass"], difference.gone),
    ):
        for first, *others in causes:
            seen = first["text"].partition("\n")[0]
            more = f" (and {len(others)} more of this cause)" if others else ""
            say(f"{called}: {first['clause']} by {first['property']}: {seen}{more}", style)
    if not (difference.clauses or difference.new or difference.gone):
        say("the same verdicts, cases and budgets")
    else:
        say("worse" if difference.is_worse else "equal or better")


def _shown(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)


def _moved(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, what: str) -> str:
    """What a clause has now, and what it had if that was something else."""
    was, now = (
        "none"
        if c is None
        else ""
        if c[what] is None
        else share(c[what])
        if isinstance(c[what], float)
        else printable(str(c[what])).replace("_", " ")
        for c in (old, new)
    )
    return now if was == now else f"{was or 'none'} -> {now or 'none'}"
