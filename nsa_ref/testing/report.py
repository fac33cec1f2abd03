"""From records to a verdict per clause: the JSON report and the table in the terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_ref.testing.clauses import CLAUSES, SPEC_VERSION
from nsa_ref.testing.conformance import message
from nsa_ref.testing.strategies import EDGES

SCHEMA = "nsa-ref-report-1"

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

    cases : decided ones; inconclusive, ambiguous (rows) and not_offered are counted beside them
    """

    id: str
    cases: int = 0
    budget_used: float | None = None
    inconclusive: int = 0
    ambiguous: int = 0
    not_offered: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    broken: bool = False

    @property
    def verdict(self) -> str:
        """pass | fail | inconclusive | ambiguous | not_offered; only the first is a pass."""
        if self.broken:
            return "fail"
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
            "inconclusive": self.inconclusive,
            "ambiguous": self.ambiguous,
            "not_offered": self.not_offered,
            "reason": "; ".join(self.reasons),
        }


def clauses(records: list[dict[str, Any]], findings: list[dict[str, Any]]) -> list[Clause]:
    """Verdicts in the order of the specification, of the clauses that were asked about."""
    asked = {name: Clause(name) for name in CLAUSES if any(r["clause"] == name for r in records)}
    for finding in findings:
        asked.setdefault(finding["clause"], Clause(finding["clause"])).broken = True
    for record in records:
        clause = asked[record["clause"]]
        found = record["finding"]
        # what another clause is to blame for says nothing about this one
        elsewhere = found is not None and found["clause"] != clause.id
        clause.cases += 0 if elsewhere else record["cases"]
        clause.inconclusive += record["inconclusive"] + elsewhere
        clause.ambiguous += record["ambiguous"]
        clause.not_offered += record["not_offered"]
        clause.reasons.update(record["reasons"])
        if elsewhere:
            clause.reasons[f"{record['name']}: see {found['clause']}"] += 1
        if record["budget_used"] is not None:
            clause.budget_used = max(clause.budget_used or 0.0, record["budget_used"])
    return [asked[name] for name in CLAUSES if name in asked]


def unmet_edges(records: list[dict[str, Any]]) -> list[str]:
    """Edges of the lattice on which no decided case stood."""
    met = {edge for record in records for edge in record["edges"]}
    return [edge for edge in EDGES if edge not in met]


def to_json(
    records: list[dict[str, Any]],
    findings: list[dict[str, Any]],
    *,
    implementation: str,
    device: str,
    versions: dict[str, str],
    seed: int,
    level: str,
    seconds: float,
) -> dict[str, Any]:
    """The report of `--json`."""
    return {
        "schema": SCHEMA,
        "spec_version": SPEC_VERSION,
        "implementation": implementation,
        "device": device,
        "versions": versions,
        "seed": seed,
        "level": level,
        "seconds": round(seconds, 1),
        "clauses": [clause.to_json() for clause in clauses(records, findings)],
        "findings": [
            {
                "clause": f["clause"],
                "case": f["case"],
                "worst": f["worst"],
                "replay": f["replay"],
                "text": f["text"],
            }
            for f in findings
        ],
        "unmet_edges": unmet_edges(records),
    }


def show(
    console: Console,
    records: list[dict[str, Any]],
    findings: list[dict[str, Any]],
    *,
    title: str,
    seconds: float,
) -> None:
    """Findings first, each with what is needed to see it again; then the table; then one line."""
    for number, finding in enumerate(findings, 1):
        console.rule(f"finding {number} of {len(findings)}", style="red")
        console.print(Text(message(finding)), soft_wrap=True)
    table = Table(title=title, title_justify="left")
    table.add_column("clause")
    table.add_column("verdict")
    for heading in ("cases", "budget used", "inconclusive", "ambiguous rows", "not offered"):
        table.add_column(heading, justify="right")
    rows = clauses(records, findings)
    for clause in rows:
        table.add_row(
            clause.id,
            Text(clause.verdict.replace("_", " "), style=COLOURS[clause.verdict]),
            str(clause.cases),
            "" if clause.budget_used is None else f"{clause.budget_used:.3f}",
            str(clause.inconclusive or ""),
            str(clause.ambiguous or ""),
            str(clause.not_offered or ""),
        )
    console.print()
    console.print(table)
    absent = sorted(
        {
            reason
            for record in records
            for reason in record["reasons"]
            if "not offered" in reason or "declared" in reason or "only" in reason
        }
    )
    if absent:
        console.print(Text("not offered: " + "; ".join(_plain(r) for r in absent)), soft_wrap=True)
    if missing := unmet_edges(records):
        console.print(Text("edges not reached: " + ", ".join(missing)), soft_wrap=True)
    counts = Counter(clause.verdict for clause in rows)
    cases = sum(clause.cases for clause in rows)
    summary = ", ".join(f"{n} {verdict.replace('_', ' ')}" for verdict, n in counts.items())
    console.print(f"{len(rows)} clauses: {summary}; {cases} cases in {seconds:.0f} s")


def _plain(reason: str) -> str:
    return (
        reason.removeprefix("not offered: ")
        .removesuffix(" is not offered")
        .removesuffix(" are not offered")
    )
