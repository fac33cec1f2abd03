"""Verdicts in words: the sentences that the terminal, pytest and the files of findings show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.pictures import side_by_side
from nsa_ref.testing.verdicts import (
    Broken,
    Convention,
    Failure,
    Fault,
    Record,
    WrongChoice,
    WrongElement,
    WrongFactor,
    WrongMask,
    WrongReader,
)

#: A longer text of the implementation's is cut in its middle; the file of the finding has it whole.
LONGEST_TEXT = 6000

#: A sentence names at most so many numbers of a list.
MOST_NUMBERS = 12


def message(finding: Mapping[str, Any]) -> str:
    """A finding: the clause, the smallest case, what was seen, how to see it again."""
    seen = finding["text"]
    if len(seen) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        cut = len(seen) - 2 * half
        seen = f"{seen[:half]}\n... {cut} characters, in {finding['file']} ...\n{seen[-half:]}"
    # what takes its process down cannot be made smaller in it
    size = "case" if "ended" in finding else "smallest case"
    lines = [
        f"{finding['clause']} is broken by {finding['implementation']} on {finding['device']}",
        f"{finding['clause']}: {CLAUSES[finding['clause']]}",
        f"{size}: {Case.from_json(finding['case'])}",
        seen,
        f"replay: {finding['replay']}",
    ]
    if finding["convention"] is not None:
        # last, because it is read only if the rest is no surprise
        lines.append(convention(Convention(**finding["convention"])))
    return "\n".join(lines)


def convention(explains: Convention) -> str:
    """Which switch or preset would explain a fault."""
    name, value = explains.name, explains.value
    if value is None:
        how = f"see {name}."
    elif name == "preset":
        how = f"this is what the preset {value} does. If it is meant, declare it in `semantics`."
    else:
        how = f"{name}={value!r} would explain it. If it is meant, declare it in `semantics`."
    return f"This may be a difference of convention: {how}"


def describe(broken: Broken) -> str:
    """What was seen: the fault and the notes."""
    return "\n".join([sentence(broken.fault), *broken.notes])


def sentence(fault: Fault) -> str:
    """What is wrong, in one line; masks and places in a program in more lines below it."""
    match fault:
        case WrongElement():
            return _wrong_element(fault)
        case WrongFactor():
            return (
                f"{fault.tensor} is off by a factor of about {1 + fault.slope:.6g} throughout: "
                f"slope {fault.slope:.3g}, limit {fault.limit:.3g}"
            )
        case WrongMask():
            return _wrong_mask(fault)
        case WrongReader():
            deed = "reads" if fault.reads else "does not read"
            reader, read = (" ".join(map(str, pair)) for pair in (fault.reader, fault.read))
            return f"{fault.tensor}: {reader} {deed} {read}" + (
                f"; {fault.why}" if fault.why else ""
            )
        case WrongChoice():
            scores = ", ".join(f"{block}: {score:.5g}" for block, score in fault.scores)
            return (
                f"select at batch {fault.batch}, head {fault.head}, row t={fault.row} "
                f"(p={fault.position}) chose {numbers(fault.chosen)}: {fault.reason}\n"
                f"scores around the cutoff, by block: {scores}"
            )
        case Failure():
            lines = [f"the implementation failed: {fault.what}"]
            return "\n  at ".join([*lines, *fault.where])


def _wrong_element(fault: WrongElement) -> str:
    actual, expected = (f"{value:.9g}" for value in (fault.actual, fault.expected))
    if actual == expected:
        actual, expected = repr(fault.actual), repr(fault.expected)
    line = f"{fault.tensor}{list(fault.index)}{f' {fault.part}' if fault.part else ''} is {actual}"
    if fault.form == "exact":
        line += f" and must be exactly {expected}"
    else:
        line += (
            f", {fault.source} says {expected}: off by {abs(fault.actual - fault.expected):.3g}, "
            f"bound {fault.bound:.3g}, {fault.budget_used:.3g} times the budget"
        )
    if fault.form == "statistical":
        line += " of the statistical bound"
    return line + (f": {fault.why}" if fault.why else "")


def _wrong_mask(fault: WrongMask) -> str:
    deed, column = "misses" if fault.expected else "reads", f"column {fault.column}"
    if fault.actual < 0:
        deed, column = "reads more than", f"the {fault.columns} columns that there are"
    elif fault.expected and fault.actual:
        deed = "counts"
        column += f" {fault.actual} times, the definition {fault.expected} times"
    if fault.block is not None:
        column += f" (block {fault.block})"
    row, head = f"row t={fault.row}", f"batch {fault.batch}, query head {fault.query_head}"
    if fault.gradient:
        what = f"{fault.gradient} {deed} the pair of {row} and {column} ({head})"
    else:
        what = f"{head}, {row} (p={fault.position}) {deed} {column}"
    line = f"{fault.reading}: {what}"
    if fault.but:
        line += f", though {fault.but}"
    return line if fault.masks is None else f"{line}\n{side_by_side(fault.masks)}"


def numbers(listed: Sequence[int]) -> str:
    """A list, of which no more is shown than a reader looks at."""
    shown = ", ".join(map(str, listed[:MOST_NUMBERS]))
    more = len(listed) - MOST_NUMBERS
    return f"[{shown}, and {more} more]" if more > 0 else f"[{shown}]"


def reasons(record: Record) -> list[str]:
    """Why cases were not decided."""
    return [
        *(f"not offered: {what}" for what in record.not_offered),
        *(f"not tried: {why}" for why in record.not_tried),
        *(f"inconclusive: {why}" for why in record.inconclusive),
        *(["ambiguous: every row may be chosen either way"] if record.undecided else []),
    ]
