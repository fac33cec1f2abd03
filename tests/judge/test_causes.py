"""One cause, one finding: what the cases of other findings say of a finding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from nsa_ref.semantics import PAPER
from nsa_ref.testing import OracleImplementation
from nsa_ref.testing.case import Case
from nsa_ref.testing.causes import Question, by_weight, fold, questions
from nsa_ref.testing.findings import Finding, grouped
from nsa_ref.testing.mutants.masks import (
    Duplicates,
    MinusOneIsZero,
    NoWindow,
    OwnBlockDropped,
    PartialBlockDropped,
    WindowPlusOne,
)
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.report import clauses, same_as
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
    semantics = (PAPER,)
    numerics = MappingProxyType({"float32": "fp32"})

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


class SharedHelper(OracleImplementation):
    """Attention of all branches goes through one function, which scales and maps heads."""

    name = "shared"
    semantics = (PAPER,)
    numerics = MappingProxyType({"float32": "fp32"})

    def mistake(self, case: Case, branch: str, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q, k, v

    def attend(self, case: Case, branch: str, mask: Any, *tensors: Any) -> Any:
        return super().attend(case, branch, mask, *self.mistake(case, branch, *tensors))


class WrongScale(SharedHelper):
    def mistake(self, case: Case, branch: str, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q * np.sqrt(case.head_dim).astype(q.dtype), k, v


class FixedBlocks(WrongScale):
    """As kernels are that are made for one size of blocks."""

    limits = MappingProxyType(
        {
            "compress_block_size": (32,),
            "compress_block_sliding_stride": (16,),
            "selection_block_size": (16,),
            "num_selected_blocks": (4,),
        }
    )


class WrongHeads(SharedHelper):
    def mistake(self, case: Case, branch: str, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q, np.roll(k, 1, axis=1), np.roll(v, 1, axis=1)


class NanForEmptyRows(SharedHelper):
    def attend(self, case: Case, branch: str, mask: Any, *tensors: Any) -> Any:
        found = super().attend(case, branch, mask, *tensors)
        empty = np.asarray(mask).sum(-1, keepdims=True) == 0
        return found._replace(out=np.where(empty, np.nan, found.out))


class GradientWithoutScale(SharedHelper):
    def attend_vjp(self, case: Case, branch: str, mask: Any, *tensors: Any) -> Any:
        dq, dk, dv = super().attend_vjp(case, branch, mask, *tensors)
        return dq / case.scale, dk, dv


class TwoScales(SharedHelper):
    """The same clause, the same kind: with one key both are wrong by their factor alone."""

    def mistake(self, case: Case, branch: str, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q * {"compress": 1, "fine": 2, "sliding": 3}[branch], k, v


class ScaleAndLse(SharedHelper):
    """With one key lse is the one logit: a scale twice as large and lse twice as large agree."""

    def mistake(self, case: Case, branch: str, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q * (2 if branch == "sliding" else 1), k, v

    def fine(self, case: Case, *arrays: Any) -> Any:
        found = super().fine(case, *arrays)
        return found._replace(lse=found.lse * 2)


class ScaleAndFewBlocks(SharedHelper):
    """The helper is wrong, and the fine branch by itself where not all blocks are chosen."""

    def mistake(self, case: Case, branch: str, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q * (1 if branch == "fine" and self._by_itself(case) else 2), k, v

    def _by_itself(self, case: Case) -> bool:
        return case.num_selected_blocks < case.num_selection_blocks

    def fine(self, case: Case, *arrays: Any) -> Any:
        found = super().fine(case, *arrays)
        return found._replace(out=found.out * 2) if self._by_itself(case) else found


def judged(port: OracleImplementation, place: Path, names: tuple[str, ...]) -> list[Record]:
    options = Options(findings=place, shrink=False)
    return [run_property(PROPERTIES[name], port, options) for name in names]


def broken_on(port: OracleImplementation, place: Path, cases: dict[str, Case]) -> list[Record]:
    """Of properties that each break on the case that is given."""
    options = Options(findings=place)
    records = [
        run_property(PROPERTIES[name], port, dataclasses.replace(options, case=case))
        for name, case in cases.items()
    ]
    assert all(record.finding is not None for record in records)
    return records


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


PARTS = ("compress", "fine", "sliding")
SMALLEST = Case(dtype="float32", head_dim=8, value_dim=8)
HEADS = Case(dtype="float32", q_heads=4, kv_heads=2, q_len=2, kv_len=2, head_dim=16, value_dim=16)
GRADIENTS = dataclasses.replace(
    HEADS, q_len=3, kv_len=3, sliding_window_size=1, num_selected_blocks=2
)
EMPTY_ROW = dataclasses.replace(SMALLEST, q_len=3, kv_len=2)
BLOCKS = dataclasses.replace(
    HEADS,
    q_len=3,
    kv_len=3,
    sliding_window_size=1,
    **{name: size for name, (size,) in FixedBlocks.limits.items()},
)
MEMORY = dataclasses.replace(SMALLEST, num_mem_kv=1)
FEW_BLOCKS = dataclasses.replace(SMALLEST, q_len=4, kv_len=4, sliding_window_size=4)


@pytest.mark.parametrize(
    ("port", "cases"),
    [
        (
            WrongScale(),
            {f"A1_{part}_lse": SMALLEST for part in PARTS} | {"A1_compress_output": MEMORY},
        ),
        (WrongHeads(), {f"A1_{part}_{what}": HEADS for part in PARTS for what in ("heads", "lse")}),
        (GradientWithoutScale(), {f"A3_{part}_gradients": GRADIENTS for part in PARTS}),
        (FixedBlocks(), {f"A1_{part}_output": BLOCKS for part in ("fine", "sliding")}),
        (NanForEmptyRows(), {f"A2_{part}_empty_rows": EMPTY_ROW for part in PARTS}),
    ],
)
def test_what_branches_share_is_one_finding(
    port: OracleImplementation, cases: dict[str, Case], tmp_path: Path
) -> None:
    (group,) = found_by_cause(port, broken_on(port, tmp_path, cases))
    assert {finding["property"] for finding in group} == set(cases)
    asked = {PROPERTIES[name].part for name in cases}
    elsewhere = [part for part in PARTS if part in asked and part not in group[0]["property"]]
    assert same_as(group[0], group[1:])[0] == f"the same in: {', '.join(elsewhere)}"


@pytest.mark.parametrize(
    ("port", "cases"),
    [
        (TwoScales(), {"A1_fine_lse": SMALLEST, "A1_sliding_lse": SMALLEST}),
        (ScaleAndLse(), {"A1_fine_lse": SMALLEST, "A1_sliding_lse": SMALLEST}),
        (ScaleAndFewBlocks(), {"A1_fine_output": FEW_BLOCKS, "A1_sliding_output": FEW_BLOCKS}),
    ],
)
def test_two_mistakes_in_two_branches_are_two_findings(
    port: OracleImplementation, cases: dict[str, Case], tmp_path: Path
) -> None:
    assert len(found_by_cause(port, broken_on(port, tmp_path, cases))) == 2


WINDOWS = ("W1_sliding_mask_as_read", "W3_sliding_mask_as_exposed")
BLOCKS = tuple(f"{clause}_fine_mask_as_exposed" for clause in ("F1", "F2", "F3", "I6"))


@pytest.mark.parametrize(
    ("port", "names", "clause"),
    [
        (PartialBlockDropped, BLOCKS, "F2"),
        (MinusOneIsZero, BLOCKS, "I6"),
        (Duplicates, BLOCKS, "F3"),
        (OwnBlockDropped, BLOCKS, "F1"),
        (NoWindow, WINDOWS, "W3"),
        (WindowPlusOne, WINDOWS, "W1"),
    ],
)
def test_the_clause_that_says_it_most_closely_is_told_first(
    port: type[OracleImplementation], names: tuple[str, ...], clause: str, tmp_path: Path
) -> None:
    """The general one is broken as well, but on the edges of the special one alone."""
    asked = port()
    asked.semantics = (PAPER,)
    asked.numerics = {"float32": "fp32"}
    options = Options(findings=tmp_path)
    records = [run_property(PROPERTIES[name], asked, options) for name in names]
    (first, *_), *others = found_by_cause(asked, records)
    assert first["clause"] == clause, first["text"]
    assert not others


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


def finding_of(number: int, clause: str, prop: str, convention: str = "") -> Finding:
    """As data: a wrong mask, and what would explain it."""
    named = {"name": convention, "value": True} if convention else None
    case = dataclasses.replace(SMALLEST, seed=number).to_json()
    return {
        "file": f"{number}.json",
        "implementation": "port",
        "clause": clause,
        "property": prop,
        "kind": "wrong mask",
        "tensor": f"{prop.split('_')[1]} mask",
        "fault": {},
        "case": case,
        "convention": named,
    }


def folded(findings: list[Finding], gone: set[int]) -> list[str]:
    """The cause of each, if the convention of another explains those in `gone` and no more."""
    asked = questions(findings)
    answers = {
        number: ("" if q.finding in gone else findings[q.finding]["clause"])
        for number, q in enumerate(asked)
        if q.convention
    }
    fold(findings, asked, answers)
    return [finding["cause"] for finding in findings]


def test_findings_that_one_switch_explains_are_one() -> None:
    """Under whatever clause they are told, and in whatever branch."""
    names = (
        ("F1", "F1_fine_mask_as_read"),
        ("I6", "I6_fine_mask_as_read"),
        ("W1", "W1_sliding_mask_as_read"),
    )
    findings = [finding_of(n, *names[n], convention="own_block_extra") for n in range(3)]
    assert folded(findings, {0, 1, 2}) == ["0.json"] * 3
    other = [*findings[:2], findings[2] | {"convention": {"name": "causal", "value": True}}]
    assert folded(other, {0, 1, 2}) == ["0.json", "0.json", "2.json"]


def test_a_switch_that_explains_none_of_those_that_are_alike_is_a_coincidence() -> None:
    def alike(convention: str) -> list[Finding]:
        first = finding_of(0, "I6", "A1_fine_output", convention)
        return [first, *(finding_of(n, "I6", "I6_fine_mask_as_read") for n in (1, 2, 3))]

    findings = alike("own_block_extra")
    assert folded(findings, gone=set()) == ["0.json"] * 4
    assert findings[0]["convention"] is None and "gone" not in findings[0]
    findings = alike("own_block_extra")
    assert folded(findings, gone={1}) == ["0.json", "0.json", "2.json", "2.json"]
    assert findings[0]["gone"] == [2, 4]


def test_what_a_convention_leaves_of_findings_that_are_alike_is_told_once() -> None:
    """And without the convention, under which it is there all the same."""
    findings = [finding_of(n, "W1", "A1_sliding_output", "causal") for n in range(5)]
    assert folded(findings, gone={1}) == ["0.json", "0.json", "2.json", "2.json", "2.json"]
    named = [finding["convention"] is not None for finding in findings]
    assert named == [True, True, False, False, False]
