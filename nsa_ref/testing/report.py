"""From records to a verdict per clause: the JSON report and the table in the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_ref.testing.clauses import CLAUSES, SPEC_VERSION
from nsa_ref.testing.findings import finite, grouped
from nsa_ref.testing.lattice import excused_edges, unmet_edges
from nsa_ref.testing.wording import message, reasons

SCHEMA = "nsa-ref-report-1"

#: What the report of `--json` has of a finding.
REPORTED = ("clause", "case", "kind", "fault", "worst", "convention", "notes", "replay", "text")

COLOURS = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "ambiguous": "yellow",
    "not_offered": "dim",
}


@dataclass
class Clause:
    """A clause's verdict.

    cases, budget_used, inconclusive, ambiguous, undecided, not_offered, not_tried : as in a
        `Record`, over all properties
    missing : properties that were asked for and came to no end, of `asked_for`
    """

    id: str
    cases: int = 0
    budget_used: float | None = None
    inconclusive: Counter[str] = field(default_factory=Counter)
    ambiguous: int = 0
    undecided: int = 0
    not_offered: Counter[str] = field(default_factory=Counter)
    not_tried: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    asked_for: int = 0
    broken: bool = False

    @property
    def verdict(self) -> str:
        """pass | fail | inconclusive | ambiguous | not_offered; only the first is a pass."""
        if self.broken:
            return "fail"
        if self.missing:
            return "inconclusive"
        if self.cases:
            return "pass"
        if self.inconclusive:
            return "inconclusive"
        return "ambiguous" if self.ambiguous else "not_offered"

    def to_json(self) -> dict[str, Any]:
        """One row of `clauses` in the report."""
        return {
            "id": self.id,
            "verdict": self.verdict,
            "cases": self.cases,
            "budget_used": self.budget_used,
            "inconclusive": self.inconclusive.total(),
            "ambiguous": self.ambiguous,
            "not_offered": self.refused,
            "reason": "; ".join([*self.unfinished, *reasons(vars(self))]),
        }

    @property
    def refused(self) -> int:
        """Cases, or whole properties, that were not offered or not tried."""
        return self.not_offered.total() + self.not_tried.total()

    @property
    def unfinished(self) -> list[str]:
        """A sentence about the missing properties, if there are any."""
        if not self.missing:
            return []
        return [f"{self.missing} of {self.asked_for} properties came to no end"]


def clauses(
    records: list[dict[str, Any]],
    findings: list[dict[str, Any]],
    asked_for: Mapping[str, int] | None = None,
) -> list[Clause]:
    """Verdicts in the order of the specification, of the clauses that were asked about.

    asked_for : clause -> number of records that a complete run has; fewer are no pass
    """
    asked_for = asked_for or {}
    names = {record["clause"] for record in records} | set(asked_for)
    asked = {name: Clause(name) for name in CLAUSES if name in names}
    for finding in findings:
        asked.setdefault(finding["clause"], Clause(finding["clause"])).broken = True
    for name, count in asked_for.items():
        ended = [r for r in records if r["clause"] == name and not r.get("lost")]
        asked[name].asked_for, asked[name].missing = count, count - len(ended)
    for record in records:
        clause = asked[record["clause"]]
        found = record["finding"]
        # what another clause is to blame for says nothing about this one
        elsewhere = found is not None and found["clause"] != clause.id
        clause.cases += 0 if elsewhere else record["cases"]
        clause.ambiguous += record["ambiguous"]
        clause.undecided += record["undecided"]
        clause.inconclusive.update(record["inconclusive"])
        clause.not_offered.update(record["not_offered"])
        clause.not_tried.update(record["not_tried"])
        if elsewhere:
            clause.inconclusive[f"{record['name']}: see {found['clause']}"] += 1
        if record["budget_used"] is not None and not elsewhere:
            clause.budget_used = max(clause.budget_used or 0.0, record["budget_used"])
    for finding in findings:
        # what broke the clause used more than all that did not; no number if it has no bound
        worst = float(finding["worst"].get("budget_used", math.inf))
        clause = asked[finding["clause"]]
        most = max(clause.budget_used or 0.0, worst)
        clause.budget_used = most if math.isfinite(most) else None
    return [asked[name] for name in CLAUSES if name in asked]


def to_json(
    records: list[dict[str, Any]],
    findings: list[dict[str, Any]],
    *,
    implementation: str,
    device: str,
    device_name: str = "",
    warmed: Collection[dict[str, Any]] = (),
    versions: dict[str, str],
    seed: int,
    level: str,
    seconds: float,
    complete: bool = True,
    asked_for: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The report of `--json`: JSON values only, numbers that are not finite as strings."""
    report = {
        "schema": SCHEMA,
        "spec_version": SPEC_VERSION,
        "implementation": implementation,
        "device": device,
        "device_name": device_name,
        "versions": versions,
        "seed": seed,
        "level": level,
        "seconds": round(seconds, 1),
        "complete": complete,
        "clauses": [clause.to_json() for clause in clauses(records, findings, asked_for)],
        "findings": [{name: f[name] for name in REPORTED} for f in findings],
        "unmet_edges": unmet_edges(records),
        "compiled": {name: dict(counts) for name, counts in compiled(records).items()},
        "warmed": {name: dict(counts) for name, counts in compiled(warmed).items()},
    }
    as_json: dict[str, Any] = finite(report)
    return as_json


def compiled(records: Collection[dict[str, Any]]) -> dict[str, Counter[str]]:
    """What each implementation compiled, over all processes that ran it and came to an end."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        if counts := record.get("compiled"):
            found.setdefault(record["implementation"], Counter()).update(counts)
    return found


def graphs(counts: Mapping[str, int]) -> str:
    """Counts of `devices.compile_counts`, or of a port's own, in words."""
    listed = ", ".join(f"{kind}: {number}" for kind, number in counts.items() if number)
    return listed or "nothing was compiled"


def show(
    console: Console,
    records: list[dict[str, Any]],
    findings: list[dict[str, Any]],
    *,
    title: str,
    seconds: float,
    asked_for: Mapping[str, int] | None = None,
    edges: bool = True,
) -> None:
    """The table; what was not offered or reached; each finding with what is needed to see it
    again; then one line, which is what a screen full of findings still shows.
    """
    # 80 columns hold the longest words, if nothing is spent on vertical lines
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("clause", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for heading in ("cases", "budget\nused", "inconclusive", "ambiguous\nrows", "not\noffered"):
        table.add_column(heading, justify="right")
    rows = clauses(records, findings, asked_for)
    for clause in rows:
        table.add_row(
            clause.id,
            Text(clause.verdict.replace("_", " "), style=COLOURS[clause.verdict]),
            str(clause.cases),
            "" if clause.budget_used is None else f"{clause.budget_used:.3f}",
            str(clause.inconclusive.total() or ""),
            str(clause.ambiguous or ""),
            str(clause.refused or ""),
        )
    console.print()
    console.print(table)
    lines = _remarks(records, rows)
    if edges:
        excused = excused_edges(records, ())
        missing = [edge for edge in unmet_edges(records) if edge not in excused]
        lines += ["edges not reached: " + ", ".join(missing)] if missing else []
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    groups = grouped(findings)
    for number, (first, *others) in enumerate(groups, 1):
        console.print()
        console.rule(Text(f"finding {number} of {len(groups)}"), style="red")
        console.print(Text(message(first)), soft_wrap=True)
        for other in others:
            console.print(
                Text(f"the same by {other['property']}: {other['replay']}"), soft_wrap=True
            )
    counts = Counter(clause.verdict for clause in rows)
    cases = sum(clause.cases for clause in rows)
    summary = ", ".join(f"{n} {verdict.replace('_', ' ')}" for verdict, n in counts.items())
    console.print()
    console.print(
        Text(f"{len(rows)} clauses: {summary}; {cases} cases in {seconds:.0f} s"), soft_wrap=True
    )


def _remarks(records: list[dict[str, Any]], rows: list[Clause]) -> list[str]:
    """Who does not offer what, and why a clause could not be decided."""
    lines = []
    for name in dict.fromkeys(record["implementation"] for record in records):
        own = [record for record in records if record["implementation"] == name]
        absent = sum((Counter(record["not_offered"]) for record in own), Counter[str]())
        whole = {what for record in own if not record["cases"] for what in record["not_offered"]}
        if absent:
            counted = (
                what if what in whole else f"{what} ({count} cases)"
                for what, count in sorted(absent.items())
            )
            lines.append(f"not offered by {name}: {'; '.join(counted)}")
        if untried := dict.fromkeys(why for record in own for why in record["not_tried"]):
            lines.append(f"not tried with {name}: {'; '.join(untried)}")
    for name, counts in compiled(records).items():
        lines.append(f"compiled by {name}: {graphs(counts)}")
    for clause in rows:
        if clause.verdict == "inconclusive":
            why = "; ".join([*clause.unfinished, *clause.inconclusive])
            lines.append(f"{clause.id} inconclusive: {why}")
    return lines
