"""Causes of what fuzzing finds: the first finding of each, where it breaks, its ledger's entry."""

from __future__ import annotations

import dataclasses
import glob
from dataclasses import dataclass, field
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.ledger import Entry
from nsa_ref.testing.narrowing import Sample, entry_of, narrowed

#: A rule tells where something breaks if it was made of so many cases that break, and covers no
#: larger share of those that pass.
FEWEST_BROKEN, MOST_PASSING = 3, 1 / 8


@dataclass
class Cause:
    """What is known of one cause.

    finding : the first that it was found by, in its file
    id : of its entry in the ledger
    sample : cases of that finding's property, and the cases of all findings
    others : property and clause of what else it breaks
    times : how often it was found
    found_as : the file that its finding had in the round in which it was found
    """

    finding: Finding
    id: str
    sample: Sample
    others: list[dict[str, str]] = field(default_factory=list)
    times: int = 1
    found_as: str = ""

    def __post_init__(self) -> None:
        self.found_as = self.found_as or self.finding["file"]

    def entry(self, of_several: bool) -> Entry:
        """What calls it known, where it breaks.

        of_several : the ledger is about other implementations as well
        """
        entry = entry_of([self.finding, *self.others], narrowed(self.sample))
        name = glob.escape(self.finding["implementation"]) if of_several else ""
        return dataclasses.replace(entry, id=self.id, implementation=name)

    def covers(self, case: Case) -> bool:
        """Whether a case is one that broke, or lies where this breaks as far as the sample tells.

        Few rows of a long sequence may show a mistake, and then no case between two others does.
        """
        if case in self.sample.broken:
            return True
        conditions = narrowed(self.sample)
        few = len(set(self.sample.broken)) < FEWEST_BROKEN
        if few or not conditions or not all(condition.holds(case) for condition in conditions):
            return False
        passed = self.sample.passed
        covered = sum(all(c.holds(one) for c in conditions) for one in passed)
        return covered <= MOST_PASSING * len(passed)

    def add(self, finding: Finding) -> None:
        """Count a finding that has this cause."""
        case = Case.from_json(finding["case"])
        self.sample = Sample([*self.sample.broken, case], self.sample.passed)
        self.add_clause(finding["property"], finding["clause"])
        self.times += 1

    def add_clause(self, prop: str, clause: str) -> None:
        """Note that it breaks this clause, as the property finds."""
        known = [(one["property"], one["clause"]) for one in (self.finding, *self.others)]
        if (prop, clause) not in known:
            self.others.append({"property": prop, "clause": clause})

    def to_json(self) -> dict[str, Any]:
        """JSON values, but for the finding, which has a file of its own."""
        return {
            "id": self.id,
            "broken": [case.to_json() for case in dict.fromkeys(self.sample.broken)],
            "passed": [case.to_json() for case in self.sample.passed],
            "others": self.others,
            "times": self.times,
        }

    @classmethod
    def from_json(cls, finding: Finding, data: dict[str, Any]) -> Cause:
        """The inverse of `to_json`."""
        broken, passed = ([Case.from_json(one) for one in data[n]] for n in ("broken", "passed"))
        return cls(finding, data["id"], Sample(broken, passed), data["others"], data["times"])
