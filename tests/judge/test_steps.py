"""From one broken case to another: which are one mistake, and how small one becomes."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, ClassVar

import numpy as np
import pytest

from nsa_ref.semantics import PAPER
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.fuzz_causes import Cause
from nsa_ref.testing.handing_over import own_settings
from nsa_ref.testing.narrowing import Sample
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.steps import fault_of, is_like, leads_to, made_smaller


class Faint(OracleImplementation):
    """Keeps indices in seven bits; reads a short last block for two empty slots."""

    semantics = (PAPER,)

    def fine(self, case: Case, q: Any, k: Any, v: Any, block_indices: Any) -> Any:
        indices = np.where(block_indices >= 128, block_indices - 128, block_indices)
        if case.kv_len % case.selection_block_size:
            last = case.kv_len // case.selection_block_size
            empty = ((indices == -1).sum(-1) > 1) & (indices[..., -1] == -1)
            indices[..., -1] = np.where(empty, last, indices[..., -1])
        return super().fine(case, q, k, v, indices)


#: Cases that break by the one mistake, and by the other.
MANY = Case(q_len=17, kv_len=129)
MANY_SAME = Case(kv_len=140, q_len=3, num_selected_blocks=3, indices="same", seed=1241)
EMPTY = Case(q_len=2, kv_len=2, selection_block_size=3, num_selected_blocks=2, indices="none")
EMPTY_LONG = dataclasses.replace(EMPTY, q_len=23, kv_len=23, selection_block_size=2)
#: One column, which says nothing of masks: another clause is broken, by the same mistake.
ONE_COLUMN = dataclasses.replace(EMPTY, q_len=1, kv_len=1, selection_block_size=2)
#: By either mistake, whatever its seed.
BOTH = Case(q_len=40, kv_len=259, selection_block_size=2, num_selected_blocks=4, indices="mixed")

VALUES = PROPERTIES["A1_fine_output"]


def leads(start: Case, goal: Case) -> bool:
    with own_settings():
        return leads_to(VALUES, Faint(), start, goal, time.monotonic() + 20)


@pytest.mark.parametrize(
    ("start", "goal", "is_one"),
    [
        (MANY_SAME, MANY, True),
        (EMPTY_LONG, EMPTY, True),
        (ONE_COLUMN, EMPTY, True),
        (MANY, EMPTY, False),
        (EMPTY, MANY, False),
        (MANY_SAME, EMPTY, False),
        (ONE_COLUMN, MANY, False),
        (Case(kv_len=9), MANY, False),
    ],
)
def test_cases_of_one_mistake_lead_to_each_other(start: Case, goal: Case, is_one: bool) -> None:
    assert leads(start, goal) is is_one


def test_the_clauses_of_one_mistake_differ() -> None:
    """So that what is broken does not say which cases belong together."""
    found = [fault_of(VALUES, Faint(), case) for case in (MANY, EMPTY, ONE_COLUMN, MANY_SAME)]
    assert [fault and fault[0] for fault in found] == ["F1", "I6", "A2", "F3"]


def test_what_breaks_for_two_reasons_is_no_sample_of_one() -> None:
    assert fault_of(VALUES, Faint(), BOTH) and not is_like(VALUES, Faint(), BOTH, EMPTY, math.inf)
    assert is_like(VALUES, Faint(), EMPTY_LONG, EMPTY, math.inf)


def test_a_case_becomes_as_small_as_it_can_and_stays_the_same_mistake() -> None:
    large = dataclasses.replace(
        EMPTY_LONG, dtype="float32", batch=2, q_heads=4, kv_heads=2, head_dim=24, layout="strided"
    )
    small = made_smaller(VALUES, Faint(), large, time.monotonic() + 20)
    assert fault_of(VALUES, Faint(), small) == fault_of(VALUES, Faint(), large)
    assert small.kv_len <= 3 and small.q_heads == small.batch == 1 and small.dtype == "float64"

    many = made_smaller(
        VALUES, Faint(), dataclasses.replace(MANY, kv_len=300), time.monotonic() + 5
    )
    assert many.num_selection_blocks > 128 and many.kv_len < 200


def test_a_case_becomes_no_other_than_what_is_declared() -> None:
    class Limited(Faint):
        limits: ClassVar[dict[str, Any]] = {"head_dim": (8, 16), "kv_len": ">= 5"}

    large = dataclasses.replace(EMPTY_LONG, head_dim=16, value_dim=16)
    small = made_smaller(VALUES, Limited(), large, time.monotonic() + 20)
    assert small.kv_len == 5 and small.head_dim == 8 and small.value_dim == 1


def test_what_is_right_is_not_made_smaller() -> None:
    assert made_smaller(VALUES, OracleImplementation(), EMPTY, time.monotonic() + 5) == EMPTY
    assert made_smaller(VALUES, Faint(), EMPTY, 0.0) == EMPTY


def test_a_cause_covers_what_lies_where_it_is_known_to_break() -> None:
    finding = {"file": "a.json", "property": VALUES.name, "clause": "F1"}
    passed = [Case(kv_len=number, q_len=1 + number % 20) for number in range(1, 120)]
    many = [dataclasses.replace(MANY, q_len=n, kv_len=128 + n) for n in (1, 3, 17)]
    cause = Cause(finding, "many", Sample(many, passed))
    assert cause.covers(dataclasses.replace(MANY, kv_len=150)) and not cause.covers(EMPTY)
    few = Cause(finding, "few", Sample(many[:2], passed))
    assert few.covers(many[0]) and not few.covers(many[2])
    assert not Cause(finding, "any", Sample(passed[::20], passed)).covers(passed[7])
