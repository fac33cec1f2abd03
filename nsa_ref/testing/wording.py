"""A finding in words: what the terminal and pytest show of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.properties.masks import CONVENTION

#: A longer text of the implementation's is cut in its middle; the file of the finding has it whole.
LONGEST_TEXT = 6000


def message(finding: Finding) -> str:
    """The clause, the smallest case, what was seen, how to see it again."""
    case = Case.from_json(finding["case"])
    # last, because it is read only if the rest is no surprise
    seen, hint, convention = finding["text"].partition(CONVENTION)
    if len(seen) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        cut = len(seen) - 2 * half
        seen = f"{seen[:half]}\n... {cut} characters, in {finding['file']} ...\n{seen[-half:]}"
    # what takes its process down cannot be made smaller in it
    size = "case" if "ended" in finding else "smallest case"
    return (
        f"{finding['clause']} is broken by {finding['implementation']} on {finding['device']}\n"
        f"{finding['clause']}: {CLAUSES[finding['clause']]}\n"
        f"{size}: {case}\n"
        f"{seen.rstrip()}\n"
        f"replay: {finding['replay']}" + (f"\n{hint}{convention.rstrip()}" if hint else "")
    )


def reasons(counted: Mapping[str, Any]) -> list[str]:
    """Why cases were not decided, of a record or of all records of a clause."""
    return [
        *(f"not offered: {what}" for what in counted["not_offered"]),
        *(f"not tried: {why}" for why in counted["not_tried"]),
        *(f"inconclusive: {why}" for why in counted["inconclusive"]),
        *(["ambiguous: every row may be chosen either way"] if counted["undecided"] else []),
    ]
