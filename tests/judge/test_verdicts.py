"""A verdict is data: its fields, the sentence that is made of them, and what counts as alike."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from nsa_ref.semantics import PAPER
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.choices import Reason
from nsa_ref.testing.findings import broken_data, grouped, told_by
from nsa_ref.testing.options import Options
from nsa_ref.testing.pictures import excerpt
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import (
    Broken,
    Convention,
    Failure,
    Fault,
    Record,
    RemarkName,
    WrongChoice,
    WrongElement,
    WrongFactor,
    WrongMask,
    WrongReader,
)
from nsa_ref.testing.wording import REMARKS, convention, describe, remark, sentence, without_arrays
from port_zoo import OneKeyFewer

ELEMENT: dict[str, Any] = {"tensor": "sliding out", "index": (0, 1), "actual": 3.0, "expected": 1.0}
BOUND: dict[str, Any] = {"bound": 0.5, "budget_used": 4.0}
MASK: dict[str, Any] = {
    "tensor": "compress mask",
    "reading": "compress_mask as exposed",
    "batch": 1,
    "query_head": 2,
    "row": 3,
    "position": 5,
    "column": 4,
    "columns": 7,
}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (WrongElement(**ELEMENT), "sliding out[0, 1] is 3 and must be exactly 1"),
        (
            WrongElement(**ELEMENT | {"actual": 1 + 2.0**-52}, part="again", why="so it was"),
            "sliding out[0, 1] again is 1.0000000000000002 and must be exactly 1.0: so it was",
        ),
        (
            WrongElement(**ELEMENT, **BOUND, form="deterministic", source="the same call"),
            "sliding out[0, 1] is 3, the same call says 1: off by 2, bound 0.5, 4 times the budget",
        ),
        (
            WrongElement(**ELEMENT | {"actual": math.nan}, bound=0.5, form="deterministic"),
            "sliding out[0, 1] is nan, the definition says 1",
        ),
        (
            WrongFactor(tensor="sliding out", slope=2.0**-40, limit=2.0**-50),
            "sliding out is off by a factor of about 1 + 9.09e-13 throughout: slope 9.09e-13, "
            "limit 8.88e-16",
        ),
        (
            WrongMask(**MASK, expected=1, actual=-2),
            "compress_mask as exposed: batch 1, query head 2, row t=3 (p=5) is NaN where it must "
            "see column 4",
        ),
        (
            WrongMask(**MASK, expected=1, actual=0, block=2),
            "compress_mask as exposed: batch 1, query head 2, row t=3 (p=5) misses column 4 "
            "(block 2)",
        ),
        (
            WrongMask(**MASK, expected=1, actual=2),
            "compress_mask as exposed: batch 1, query head 2, row t=3 (p=5) counts column 4 2 "
            "times, the definition 1 times",
        ),
        (
            WrongMask(**MASK, expected=1, actual=-1),
            "compress_mask as exposed: batch 1, query head 2, row t=3 (p=5) reads more than the 7 "
            "columns that there are",
        ),
        (
            WrongMask(**MASK, expected=0, actual=1, gradient="dv", but="the forward is right"),
            "compress_mask as exposed: dv reads the pair of row t=3 and column 4 (batch 1, query "
            "head 2), though the forward is right",
        ),
        (
            WrongReader(tensor="fine", reader=("query head", 3), read=("kv head", 1), reads=False),
            "fine: query head 3 does not read kv head 1",
        ),
        (
            Failure(kind="exception", tensor="fine", what="OSError: no", where=("a.py:1", "b:2")),
            "the implementation failed: OSError: no\n  at a.py:1\n  at b:2",
        ),
    ],
)
def test_every_fault_has_its_sentence(fault: Fault, words: str) -> None:
    assert sentence(fault) == words
    described = Broken("A1", fault, notes=(("fresh seeds", 3),))
    assert describe(described) == f"{words}\nWith 3 fresh seeds it is the same."
    json.dumps(broken_data(described), allow_nan=False)


def test_scores_that_differ_look_different() -> None:
    """By the last bit of float64."""
    chosen: dict[str, Any] = {"batch": 0, "head": 0, "row": 0, "position": 0, "chosen": (1,)}
    reason = Reason(rule="named once", block=1, count=2)
    for more, told in ((0.5, "0: 1, 1: 1.5"), (2.0**-52, "0: 1, 1: 1.0000000000000002")):
        fault = WrongChoice(**chosen, reason=reason, scores=((0, 1.0), (1, 1.0 + more)))
        assert sentence(fault).endswith(f"scores around the cutoff, by block: {told}")


def test_every_remark_has_its_sentence() -> None:
    assert set(REMARKS) == set(get_args(RemarkName))
    assert remark(("narrow model", 7)) == "model_dim=7 is no feature for each token and head"
    one_gate = "with one gate open at a time, fine is wrong, compress and sliding are right"
    gates: Any = ("gates", ["fine"], ["compress", "sliding"])
    assert remark((*gates, None)) == one_gate
    handed = f"{one_gate}; with the choice of blocks handed in, it is wrong as well"
    assert remark((*gates, False)) == handed


def test_a_record_keeps_its_remarks_on_its_way_to_another_process() -> None:
    record = Record(name="W1", clause="W1")
    record.inconclusive["narrow model", 7] += 2
    record.not_offered["lse"] += 1
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("explains", "words"),
    [
        (Convention("window_closed", False), "window_closed=False would explain it. If it is "),
        (Convention("preset", "FLA"), "this is what the preset FLA does. If it is meant, declare "),
        (Convention("empty_lse"), "see empty_lse."),
    ],
)
def test_a_convention_is_a_switch_and_its_value(explains: Convention, words: str) -> None:
    said = convention(explains)
    assert said.startswith(f"This may be a difference of convention: {words}")


def test_a_finding_keeps_the_fields(tmp_path: Path) -> None:
    """As JSON, in memory and in its file."""
    prop = PROPERTIES["W1_sliding_mask_as_exposed"]
    found = run_property(prop, OneKeyFewer(), Options(findings=tmp_path)).finding
    assert found is not None
    assert (found["clause"], found["kind"], found["tensor"]) == ("W1", "wrong mask", "sliding mask")
    place = [found["fault"][name] for name in ("batch", "query_head", "row", "position", "column")]
    assert place == [0, 0, 0, 0, 0]
    assert found["fault"]["masks"] == {"top": 0, "left": 0, "expected": ["#"], "actual": ["-"]}
    assert found["convention"] == {"name": "window_closed", "value": False}
    assert json.loads(Path(found["file"]).read_text()) == found


def test_findings_are_alike_whose_fields_are() -> None:
    """Whatever numbers they show; not of another tensor, kind, clause or implementation.

    The one with the smallest case stands for all.
    """

    def found(
        clause: str, fault: Fault, implementation: str = "port", tokens: int = 1
    ) -> dict[str, Any]:
        case = Case(q_len=tokens, kv_len=tokens).to_json()
        return broken_data(Broken(clause, fault)) | {"implementation": implementation, "case": case}

    one = found("A1", WrongElement(**ELEMENT), tokens=240)
    same = found("A1", WrongElement(**ELEMENT | {"index": (7, 7), "actual": -2.5}))
    others = [
        found("A1", WrongElement(**ELEMENT | {"tensor": "fine out"})),
        found("A1", WrongFactor(tensor="sliding out", slope=0.5, limit=0.25)),
        found("A3", WrongElement(**ELEMENT)),
        found("A1", WrongElement(**ELEMENT), "another port"),
    ]
    assert grouped([one, *others, same]) == [[same, one], *([other] for other in others)]


def test_a_finding_leads_to_the_one_that_tells_its_cause(tmp_path: Path) -> None:
    first, later, alone = (tmp_path / f"{name}.json" for name in ("first", "later", "alone"))
    first.touch()
    assert told_by(later, {"cause": "findings/first.json"}) == first
    assert told_by(first, {"cause": "findings/first.json"}) == first
    assert told_by(later, {"cause": "findings/gone.json"}) == later
    assert told_by(alone, {}) == alone


class ChoosesTheWorst(OracleImplementation):
    """The n last candidates by score, of very many."""

    semantics = (PAPER,)
    limits = {"num_selected_blocks": (35,), "selection_block_size": (4,), "kv_len": (400,)}  # noqa: RUF012

    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        return np.asarray(super().select(case, -np.asarray(q), k_cmp, mem_k))


def test_a_finding_never_prints_an_array(tmp_path: Path) -> None:
    """Of more than a dozen numbers: of 35 chosen blocks, and the scores of 100."""
    options = Options(findings=tmp_path, shrink=False)
    found = run_property(PROPERTIES["I4_selection"], ChoosesTheWorst(), options).finding
    assert found is not None and found["kind"] == "wrong choice"
    lines = found["text"].splitlines()
    for listed in [*re.findall(r"\[(.*?)\]", lines[0]), lines[1].partition("block: ")[2]]:
        assert listed.count(",") <= 12, listed
    assert len(found["fault"]["scores"]) == 12


@pytest.mark.parametrize(
    "of",
    [np.arange(40), -np.eye(7), np.ones((5, 8), bool), np.arange(20) * 1.5j, np.full(40, np.nan)],
    ids=["i", "f", "b", "c", "nan"],
)
def test_an_exception_shows_no_array(of: np.ndarray) -> None:
    """As NumPy or PyTorch prints it, a list, or a dict; what stands around it is kept."""
    listed = of.ravel().tolist()
    on_device = ", ".join(f"tensor({x}, device='cuda:0')" for x in listed)
    for printed in (repr(of), str(of), repr(of.tolist()), str(list(of)), str(list(of.ravel()))):
        assert_cut(printed)
    for printed in (str(dict(enumerate(listed))), "; ".join(map(str, listed)), on_device):
        assert_cut(printed)


def assert_cut(printed: str) -> None:
    """Six numbers are shown before the cut and six behind it."""
    number = re.compile(r"(?<![\w.+:])\d|True|nan")  # where each begins
    what = f"IndexError: at {printed}: no row 9 at (1, 2)"
    shown = sentence(Failure(kind="exception", tensor="fine", what=what))
    listed = shown.removeprefix("the implementation failed: IndexError: at ")
    listed = listed.removesuffix(": no row 9 at (1, 2)")
    before, more, after = re.split(r" \.\.\. (\d+) more \.\.\. ", listed)
    assert [len(number.findall(part)) for part in (before, after)] == [6, 6], shown
    assert int(more) == len(number.findall(printed)) - 12


def test_an_exception_of_a_dozen_numbers_is_kept() -> None:
    short = f"ValueError: {list(range(12))} and 1e-5, 7 words"
    assert without_arrays(short) == short


def test_a_picture_shows_where_the_masks_differ() -> None:
    """Of large masks the rows and columns around the first difference, as many as fit."""
    expected = np.ones((300, 400), np.int64)
    actual = expected.copy()
    actual[200, 300], actual[201, 300] = 0, 2
    shown = excerpt(expected, actual)
    row, column = 200 - shown.top, 300 - shown.left
    assert shown.actual[row][column] == "-" and shown.actual[row + 1][column] == "2"
    assert set(shown.expected[row]) == {"#"}
