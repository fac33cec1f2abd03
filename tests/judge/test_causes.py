"""One cause, one finding: what the cases of other findings say of a finding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from nsa_ref.testing import OracleImplementation
from nsa_ref.testing.case import Case
from nsa_ref.testing.causes import Question, by_weight, fold, questions
from nsa_ref.testing.findings import Finding, grouped
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.report import clauses
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import message

NAMES = (
    "W1_sliding_mask_as_exposed",
    "W1_sliding_mask_as_read",
    "W3_sliding_mask_as_read",
    "A1_sliding_output",
    "A3_sliding_gradients",
    "W1_sliding_mask_of_long_sequences",
)


class ShortWindow(OracleImplementation):
    """w keys in the window, in all that it does; and nothing is said of it."""

    name = "short"

    def _as_it_is(self, case: Case) -> Case:
        semantics = dataclasses.replace(case.semantics, window_closed=False)
        return dataclasses.replace(case, semantics=semantics)

    def sliding_mask(self, case: Case) -> Any:
        return super().sliding_mask(self._as_it_is(case))

    def sliding(self, case: Case, *arrays: Any) -> Any:
        return super().sliding(self._as_it_is(case), *arrays)

    def sliding_vjp(self, case: Case, *arrays: Any) -> Any:
        return super().sliding_vjp(self._as_it_is(case), *arrays)


class ShortWindowAndGate(ShortWindow):
    """And with values that are too large, which is another cause."""

    def sliding(self, case: Case, *arrays: Any) -> Any:
        found = super().sliding(case, *arrays)
        return found._replace(out=found.out * 2)


class Raises(OracleImplementation):
    def sliding(self, case: Case, *arrays: Any) -> Any:
        raise RuntimeError(f"no kernel for {case.q_len} rows")


def judged(port: OracleImplementation, place: Path, names: tuple[str, ...]) -> list[Record]:
    options = Options(findings=place)
    return [run_property(PROPERTIES[name], port, options) for name in names]


def found_by_cause(port: OracleImplementation, records: list[Record]) -> list[list[Finding]]:
    """As `nsa-ref verify` does it, in one process."""
    findings = by_weight(record.finding for record in records if record.finding is not None)
    asked = [Question.from_json(question.to_json()) for question in questions(findings)]
    answers = {number: q.answered(port, Options()) for number, q in enumerate(asked)}
    fold(findings, asked, answers)
    return grouped(findings)


def test_a_convention_is_one_finding_whatever_it_breaks(tmp_path: Path) -> None:
    port = ShortWindow()
    records = judged(port, tmp_path, NAMES)
    assert all(record.finding is not None for record in records)
    (group,) = found_by_cause(port, records)
    first = group[0]
    assert first["clause"] == "W1" and first["convention"]["name"] == "window_closed"
    gone, of = first["gone"]
    assert gone == of > 2
    assert f"With that declared, {gone} of {of} findings are gone." in message(first)


def test_what_the_convention_does_not_explain_is_a_finding_of_its_own(tmp_path: Path) -> None:
    port = ShortWindowAndGate()
    records = judged(port, tmp_path, NAMES[:1] + NAMES[3:4])
    groups = found_by_cause(port, records)
    assert [finding["property"] for finding, *_ in groups] == [NAMES[0], NAMES[3]]
    assert groups[0][0]["gone"] == [1, 2]


def test_what_raises_is_told_once(tmp_path: Path) -> None:
    """The clauses that it leaves open are no pass and no finding."""
    port = Raises()
    records = judged(port, tmp_path, ("A1_sliding_output", "A1_sliding_lse", "A5_sliding_canary"))
    broken = [record for record in records if record.finding is not None]
    groups = found_by_cause(port, records)
    assert len(groups) == 1 and len(groups[0]) == len(broken)
    verdicts = {c.id: c.verdict for c in clauses(records, [f for group in groups for f in group])}
    assert list(verdicts.values()).count("fail") == 1 and "pass" not in verdicts.values()


def test_a_switch_that_explains_the_smallest_case_alone_is_not_named(tmp_path: Path) -> None:
    """With one token, a window that lies one key too far back looks like one that is not closed."""

    class OneTooFar(OracleImplementation):
        def sliding_mask(self, case: Case) -> Any:
            mask = super().sliding_mask(case)
            moved = np.zeros_like(mask)
            moved[..., :-1] = mask[..., 1:]
            return moved

    (record,) = judged(OneTooFar(), tmp_path, NAMES[:1])
    assert record.finding is not None and record.finding["convention"] is None
