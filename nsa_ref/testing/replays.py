"""Kept cases, to be run again: a file, or a folder of them, which is a regression suite."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa_ref.testing.case import Case
from nsa_ref.testing.findings import Finding, read_finding
from nsa_ref.testing.loading import DEVICES, CannotRun, own_version
from nsa_ref.testing.options import parse_seconds
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.report import COLOURS
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import few, printable, reasons


@dataclass(frozen=True)
class Kept:
    """A kept case, and how it is run again.

    property, implementation : what it was found by and in; nothing if it was written by hand
    spec, device, timeout : how the implementation is named, on what it runs, seconds that it has
    """

    path: Path
    case: Case
    property: str
    implementation: str
    spec: str
    device: str
    timeout: float


def read_case_file(path: Path) -> tuple[Case, Finding]:
    """A case and what its file says besides.

    Raises
    ------
    CannotRun : the file is none or holds none
    """
    try:
        return read_finding(path)
    except FileNotFoundError:
        raise CannotRun(f"there is no file {path}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CannotRun(f"{path} holds no case: {error}") from None


def read_kept(path: Path, spec: str | None, device: str | None) -> Kept:
    """The case of a file; `spec` and `device` come before what the file says.

    Raises
    ------
    CannotRun : it cannot be run, and why
    """
    case, data = read_case_file(path)
    spec = spec or data.get("spec")
    if not spec:
        raise CannotRun(
            f"{path} does not say what it was found in. Try nsa-ref replay {path} MODULE:OBJECT"
        )
    name = data.get("property", "")
    if name and name not in PROPERTIES:
        raise CannotRun(
            f"{path} was found by {name!r}, which is no property of this version, "
            f"{own_version()}. Try the version that found it"
        )
    try:
        timeout = parse_seconds(data.get("timeout", 120.0))
    except argparse.ArgumentTypeError as error:
        raise CannotRun(f"{path}: timeout={error}") from None
    # an instance that chose "cuda:1" chooses it again
    kind = data.get("device", "auto").partition(":")[0]
    device = device or (kind if kind in DEVICES else "auto")
    return Kept(path, case, name, data.get("implementation", ""), spec, device, timeout)


@dataclass(frozen=True)
class Replayed:
    """What became of a kept case.

    verdict : "pass", "fail" or "not judged"; only the first is a pass
    why : it is no pass, in one line
    """

    path: Path
    verdict: str
    why: str = ""


def replayed(kept: Kept, records: Sequence[Record]) -> Replayed:
    """The verdict of the records of a case, which are several if it was written by hand."""
    for record in records:
        if record.finding is not None:
            first = record.finding["text"].partition("\n")[0]
            why = f"{record.finding['clause']}: {first}"
            return Replayed(kept.path, "fail", why)
    if any(record.cases for record in records):
        return Replayed(kept.path, "pass")
    why = "; ".join(few([*dict.fromkeys(r for record in records for r in reasons(record))]))
    return Replayed(kept.path, "not judged", why or "it came to no end")


def show_replays(console: Console, rows: Sequence[Replayed], seconds: float) -> None:
    """One table, a line for everything that is no pass, and the sums."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        verdict = Text(row.verdict, style=COLOURS.get(row.verdict, "yellow"))
        table.add_row(Text(printable(row.path.name)), verdict)
    console.print()
    console.print(table)
    for row in rows:
        if row.why:
            why = " ".join(row.why.split())
            line = why if str(row.path) in why else f"{row.path.name}: {why}"
            console.print(Text(printable(line)), soft_wrap=True)
    counts = Counter(row.verdict for row in rows)
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    console.print(Text(f"{len(rows)} cases: {summary}; {seconds:.0f} s"), soft_wrap=True)
