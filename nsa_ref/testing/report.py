"""From records to a verdict per clause: the JSON report and the table in the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_ref.numerics import NUMERICS
from nsa_ref.testing.case import DTYPES
from nsa_ref.testing.clauses import CLAUSES, SPEC_VERSION
from nsa_ref.testing.evidence import Evidence
from nsa_ref.testing.findings import Finding, finite, grouped, seen_under
from nsa_ref.testing.lattice import (
    EDGES,
    excused_edges,
    meetable_pairs,
    met_pairs,
    unmet_edges,
    unmet_pairs,
)
from nsa_ref.testing.ledger import Entry, wrong_entries
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import few, message, printable, reasons, remark, undecided

SCHEMA = "nsa-ref-report-2"

#: What the report of `--json` has of a finding; `ended`, if it took its process down; `unsaved`, if
#: its file could not be written; `cause` and `gone`, if others' cases were tried (see `causes`).
REPORTED = (
    *("clause", "property", "implementation", "case", "kind", "tensor", "fault", "worst"),
    *("convention", "notes", "seed", "file", "replay", "text", "ended", "unsaved"),
    *("cause", "gone"),
)

COLOURS = {
    "pass": "green",
    "known": "cyan",
    "fail": "bold red",
    "thin": "yellow",
    "inconclusive": "yellow",
    "ambiguous": "yellow",
    "not_offered": "dim",
}


@dataclass(frozen=True)
class Clause:
    """A clause's verdict.

    total : the records of its properties in one
    findings : cases that broke it, by whichever property
    asked_for, missing : how many properties were asked for, and how many of them came to no end
    untold : properties that could not judge it for a failure that another clause's finding tells
    evidence : what speaks against a pass of what is not broken
    """

    id: str
    total: Record
    findings: list[Finding]
    asked_for: int
    missing: int
    untold: int = 0
    evidence: Evidence = Evidence()

    @property
    def verdict(self) -> str:
        """pass | known | fail | thin | inconclusive | ambiguous | not_offered; only one is a pass.

        known : all that fails is in the ledger
        thin : nothing fails, and too few cases were decided, or none on an edge that it is about
        """
        if self.findings:
            return "fail"
        if self.missing or self.untold:
            return "inconclusive"
        if self.known:
            return "known"
        if self.evidence.outside:
            return "not_offered"
        if self.total.cases:
            return "thin" if self.evidence.thin else "pass"
        if self.total.inconclusive or self.total.unreached:
            return "inconclusive"
        return "ambiguous" if self.total.ambiguous else "not_offered"

    @property
    def is_undecided(self) -> bool:
        """True if it is offered, and neither broken nor a pass."""
        return self.verdict in ("thin", "inconclusive", "ambiguous")

    @property
    def against(self) -> list[str]:
        """Why it is thin, or lies outside of what is declared."""
        return [remark(why) for why in (*self.evidence.thin, *self.evidence.outside)]

    @property
    def known(self) -> int:
        """Cases that failed as the ledger says, or were not launched because of it."""
        return self.total.known.total() + self.total.spared.total()

    @property
    def budget_used(self) -> float | None:
        """The largest share of a bound that was used, by findings and by what passed.

        None if a finding has no bound, or if nothing was compared with one.
        """
        used = [float(finding["worst"].get("budget_used", math.inf)) for finding in self.findings]
        if self.total.budget_used is not None:
            used.append(self.total.budget_used)
        most = max(used, default=math.inf)
        return most if math.isfinite(most) else None

    @property
    def unfinished(self) -> list[str]:
        """A sentence about the missing properties, if there are any."""
        if not self.missing:
            return []
        return [f"{self.missing} of {self.asked_for} properties came to no end"]

    def to_json(self) -> dict[str, Any]:
        """One row of `clauses` in the report."""
        return {
            "id": self.id,
            "verdict": self.verdict,
            "cases": self.total.cases,
            "asked": self.total.asked,
            "unreached": self.total.unreached,
            "known": self.known,
            "budget_used": self.budget_used,
            "inconclusive": self.total.inconclusive.total(),
            "ambiguous": self.total.ambiguous,
            "not_offered": self.total.not_offered.total() + self.total.not_tried.total(),
            "reason": "; ".join([*self.unfinished, *self.against, *reasons(self.total)]),
        }


def clauses(
    records: Sequence[Record],
    findings: Sequence[Finding],
    asked_for: Mapping[str, int] | None = None,
    evidence: Mapping[str, Evidence] | None = None,
) -> list[Clause]:
    """Verdicts in the order of the specification, of the clauses that were asked about.

    asked_for : clause -> number of records that a complete run has; fewer are no pass
    evidence : as `weighed` gives it, where cases were drawn
    """
    asked_for, told = asked_for or {}, seen_under(findings)
    evidence = evidence or {}
    names = {r.clause for r in records} | {f["clause"] for f in findings} | set(asked_for)
    verdicts = []
    for name in CLAUSES:
        if name not in names:
            continue
        own = [record for record in records if record.clause == name]
        ended = sum(not record.lost for record in own)
        asked = asked_for.get(name, ended)
        all_broken = [finding for finding in findings if finding["clause"] == name]
        broken = [finding for finding in all_broken if finding["file"] not in told]
        untold = len(all_broken) - len(broken)
        total = _total(name, own, told)
        against = evidence.get(name, Evidence())
        verdicts.append(Clause(name, total, broken, asked, asked - ended, untold, against))
    return verdicts


def _total(clause: str, records: Sequence[Record], told: Mapping[str, str]) -> Record:
    """The records of a clause in one; told : as `seen_under` gives it."""
    total = Record(name="", clause=clause)
    for record in records:
        total.ambiguous += record.ambiguous
        total.undecided += record.undecided
        total.inconclusive += record.inconclusive
        total.not_offered += record.not_offered
        total.not_tried += record.not_tried
        total.known += record.known
        total.spared += record.spared
        finding = record.finding
        blamed = clause if finding is None else told.get(finding["file"], finding["clause"])
        if blamed != clause:
            # what another clause is to blame for says nothing about this one
            total.inconclusive["of another clause", record.name, blamed] += 1
            continue
        total.cases += record.cases
        total.asked += record.asked
        total.unreached += record.unreached
        if record.budget_used is not None:
            total.budget_used = max(total.budget_used or 0.0, record.budget_used)
    return total


def to_json(
    about: Mapping[str, Any],
    records: Sequence[Record],
    findings: Sequence[Finding],
    *,
    warmed: Sequence[Record] = (),
    asked_for: Mapping[str, int] | None = None,
    evidence: Mapping[str, Evidence] | None = None,
    entries: Sequence[Entry] = (),
) -> dict[str, Any]:
    """The report of `--json`: JSON values only, numbers that are not finite as strings.

    about : what else is known of the run: who was judged, where and how
    entries : as `wrong_entries` takes them
    """
    report = {
        "schema": SCHEMA,
        "spec_version": SPEC_VERSION,
        **about,
        "clauses": [row.to_json() for row in clauses(records, findings, asked_for, evidence)],
        "findings": [{name: f[name] for name in REPORTED if name in f} for f in findings],
        "ledger": {
            "failed": sum((record.known for record in records), Counter[str]()),
            "spared": sum((record.spared for record in records), Counter[str]()),
            "wrong": wrong_entries(records, entries),
        },
        "edges": _met_edges(records),
        "unmet_edges": unmet_edges(records),
        "pairs": _pairs(records),
        "compiled": compiled(records),
        "warmed": compiled(warmed),
    }
    as_json: dict[str, Any] = finite(report)
    return as_json


def _met_edges(records: Sequence[Record]) -> dict[str, int]:
    """Edge -> how many decided cases stood on it, in the order of the lattice."""
    met = sum((record.edges for record in records), Counter[str]())
    return {edge: met[edge] for edge in EDGES if edge in met}


def _pairs(records: Sequence[Record]) -> dict[str, Any]:
    """How many pairs of edges were met, how many can be, and which of these were not.

    What can be met is known where it was asked for, at thorough; else `meetable` is None.
    """
    asked = any(record.built for record in records)
    meetable = len(meetable_pairs(records)) if asked else None
    met = len(met_pairs(records))
    return {"met": met, "meetable": meetable, "unmet": unmet_pairs(records)}


def _pairs_line(pairs: Mapping[str, Any]) -> str:
    """The same in a line of the table's foot."""
    if pairs["meetable"] is None:
        return f"pairs of edges met: {pairs['met']}"
    return f"pairs of edges met: {pairs['met']} of {pairs['meetable']} that can be met"


def compiled(records: Sequence[Record]) -> dict[str, Counter[str]]:
    """What each implementation compiled, over all processes that ran it and came to an end."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        if record.compiled:
            found.setdefault(record.implementation, Counter()).update(record.compiled)
    return found


def rows_named(numerics: Mapping[str, str]) -> str:
    """The row of bounds of each dtype, and which of them is coarser than the dtype."""

    def named(dtype: str, row: str) -> str:
        coarser = NUMERICS[row].coarsest > float(ml_dtypes.finfo(DTYPES[dtype]).eps) / 2
        return f"{dtype} as {row}" + (f" (coarser than {dtype})" if coarser else "")

    return ", ".join(named(dtype, row) for dtype, row in numerics.items())


def share(budget: float | None) -> str:
    """How much of a bound was used, in few characters however much it is."""
    return "" if budget is None else f"{budget:.3f}" if budget < 1000 else f"{budget:.2e}"


def graphs(counts: Mapping[str, int]) -> str:
    """Counts of `devices.compile_counts`, or of a port's own, in words."""
    listed = ", ".join(f"{kind}: {number}" for kind, number in counts.items() if number)
    return listed or "nothing was compiled"


def show(
    console: Console,
    records: Sequence[Record],
    findings: Sequence[Finding],
    *,
    title: str,
    seconds: float,
    asked_for: Mapping[str, int] | None = None,
    evidence: Mapping[str, Evidence] | None = None,
    entries: Sequence[Entry] = (),
    numerics: Mapping[str, Mapping[str, str]] | None = None,
    edges: bool = True,
) -> None:
    """The table; rows of bounds; what was not offered or reached; each finding with what is needed
    to see it again; then one line, which is what a screen full of findings still shows.

    entries : as `wrong_entries` takes them
    numerics : implementation -> dtype -> row, where these are known
    """
    # 80 columns hold the longest words, if nothing is spent on vertical lines
    table = Table(
        title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("clause", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    rows = clauses(records, findings, asked_for, evidence)
    known = ["known"] if any(clause.known for clause in rows) else []
    headings = ("budget\nused", "inconcl.", "ambig.\nrows", "not\noffered")
    for heading in ("cases", *known, *headings):
        table.add_column(heading, justify="right")
    for clause in rows:
        row = clause.to_json()
        budget = share(row["budget_used"])
        verdict = Text(clause.verdict.replace("_", " "), style=COLOURS[clause.verdict])
        counts = (str(row[name] or "") for name in ("inconclusive", "ambiguous", "not_offered"))
        failed = [str(row[name] or "") for name in known]
        of = f" of {row['asked']}" if clause.verdict == "thin" else ""
        table.add_row(clause.id, verdict, f"{row['cases']}{of}", *failed, budget, *counts)
    console.print()
    console.print(table)
    lines = [f"bounds of {name}: {rows_named(held)}" for name, held in (numerics or {}).items()]
    lines += _remarks(records, rows, entries)
    if edges:
        excused = excused_edges(records)
        missing = [edge for edge in unmet_edges(records) if edge not in excused]
        lines += ["edges not reached: " + ", ".join(missing)] if missing else []
        lines.append(_pairs_line(_pairs(records)))
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
    groups = grouped(findings)
    for number, (first, *others) in enumerate(groups, 1):
        console.print()
        console.rule(Text(f"finding {number} of {len(groups)}"), style="red")
        console.print(Text(message(first)), soft_wrap=True)
        for line in same_as(first, others):
            console.print(Text(printable(line)), soft_wrap=True)
    console.print()
    console.print(Text(summary([clause.to_json() for clause in rows], seconds)), soft_wrap=True)


def same_as(first: Finding, others: Sequence[Finding]) -> list[str]:
    """In which other branches the cause of a finding was seen, and by which other properties."""
    # what answers to golden vectors break is no property of these
    asked = (PROPERTIES.get(finding["property"]) for finding in (first, *others))
    _, *parts = dict.fromkeys([prop.part for prop in asked if prop] or [""])
    names = dict.fromkeys(finding["property"] for finding in others)
    lines = [f"the same in: {', '.join(sorted(parts))}"] if parts else []
    return lines + ([f"the same by: {', '.join(names)}"] if names else [])


def summary(rows: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """How many clauses have which verdict; rows : `clauses` of the report."""
    verdicts = Counter(row["verdict"].replace("_", " ") for row in rows)
    counted = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())
    cases = sum(row["cases"] for row in rows)
    return f"{len(rows)} clauses: {counted}; {cases} cases in {seconds:.0f} s"


def _remarks(
    records: Sequence[Record], rows: Sequence[Clause], entries: Sequence[Entry]
) -> list[str]:
    """Who does not offer what, and why a clause could not be decided."""
    lines = []
    for name in dict.fromkeys(record.implementation for record in records):
        own = [record for record in records if record.implementation == name]
        absent = sum((record.not_offered for record in own), Counter[str]())
        whole = {what for record in own if not record.cases for what in record.not_offered}
        if absent:
            counted = [
                what if what in whole else f"{what} ({count} cases)"
                for what, count in sorted(absent.items())
            ]
            lines.append(f"not offered by {name}: {'; '.join(few(counted))}")
        if untried := dict.fromkeys(remark(why) for record in own for why in record.not_tried):
            lines.append(f"not tried with {name}: {'; '.join(untried)}")
    totals = ((clause.id, clause.total.unreached, clause.total.asked) for clause in rows)
    late = [f"{name} ({count} of {asked} cases)" for name, count, asked in totals if count]
    if late:
        lines.append(f"not reached before the time was up: {', '.join(late)}")
    lines += [f"in the ledger: {remark(wrong)}" for wrong in wrong_entries(records, entries)]
    for name, counts in compiled(records).items():
        lines.append(f"compiled by {name}: {graphs(counts)}")
    for clause in rows:
        if clause.is_undecided:
            why = "; ".join([*clause.unfinished, *clause.against, *undecided(clause.total)])
            lines.append(f"{clause.id} {clause.verdict}: {why}")
        elif clause.verdict == "not_offered" and clause.against:
            lines.append(f"{clause.id} not offered: {'; '.join(clause.against)}")
    return lines
