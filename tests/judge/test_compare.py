"""What counts as right: budgets, exact patterns, suspicions, and when a comparison says nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.compare import Comparison, compare
from nsa_ref.testing.findings import broken_data
from nsa_ref.testing.implementation import NotOffered
from nsa_ref.testing.judging import judge
from nsa_ref.testing.properties import PROPERTIES, Outcome, Property
from nsa_ref.testing.verdicts import Broken, Inconclusive, WrongElement, WrongFactor
from nsa_ref.testing.wording import describe, sentence

#: 6 rows of 4: the last axis is the value_dim.
EXPECTED = np.random.default_rng(1).standard_normal((1, 2, 3, 4))
BOUND = np.full(EXPECTED.shape, 2.0**-10)


def off_by(step: float, index: tuple[int, ...] = (0, 1, 2, 3)) -> np.ndarray:
    """EXPECTED with one element changed."""
    actual = EXPECTED.copy()
    actual[index] += step
    return actual


def refused(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> WrongElement:
    """The element for which `compare` breaks the clause."""
    with pytest.raises(Broken) as caught:
        compare("A1", "out", actual, expected, bound)
    assert caught.value.clause == "A1" and isinstance(caught.value.fault, WrongElement)
    json.dumps(broken_data(caught.value), allow_nan=False)
    return caught.value.fault


# --- the deterministic bound ----------------------------------------------------------------------


def test_equal_arrays_use_nothing_of_the_budget() -> None:
    """Nor do empty ones."""
    assert compare("A1", "out", EXPECTED, EXPECTED, BOUND) == Comparison(0.0, None, False, 24)
    assert compare("A1", "out", *[np.zeros((1, 0, 3))] * 5) == Comparison(0.0, None, False)


@given(share=st.floats(2.0**-20, 1))
def test_budget_is_the_largest_share_of_a_bound(share: float) -> None:
    actual = np.array([1.0, 2.0 + share])
    found = compare("A1", "out", actual, np.array([1.0, 2.0]), np.ones(2))
    assert found.budget == actual[1] - 2.0
    assert not found.suspicion


@given(share=st.floats(2.0**-20, 2.0**20))
def test_more_than_the_bound_is_broken(share: float) -> None:
    actual = off_by(2.0**-10 * (1 + share))
    fault = refused(actual, EXPECTED, BOUND)
    assert (fault.tensor, fault.index, fault.form) == ("out", (0, 1, 2, 3), "deterministic")
    assert fault.actual == actual[0, 1, 2, 3] and fault.expected == EXPECTED[0, 1, 2, 3]
    assert fault.bound == 2.0**-10 and fault.budget_used > 1


def test_the_last_admissible_value_is_right() -> None:
    expected, bound = np.zeros((1, 2)), np.ones((1, 2))
    actual = np.array([[1.0, -1.0]])
    assert compare("A1", "out", actual, expected, bound).budget == 1.0
    with pytest.raises(Broken):
        compare("A1", "out", np.nextafter(actual, 2 * actual), expected, bound)


def test_a_bound_of_zero_admits_the_value_alone() -> None:
    zero = np.zeros((1, 1))
    assert compare("A1", "out", zero, zero, zero).budget == 0
    assert refused(zero + 2.0**-1074, zero, zero).budget_used == math.inf


def test_the_worst_element_is_the_one_named() -> None:
    bound = BOUND.copy()
    bound[0, 0, 0, 0] = 2.0**-30  # a small error, but the most of its budget
    actual = off_by(2.0**-9)
    actual[0, 0, 0, 0] += 2.0**-20
    assert refused(actual, EXPECTED, bound).index == (0, 0, 0, 0)


# --- exact patterns -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_must_be_expected(value: float) -> None:
    """NaN and inf in place of a number use all of the budget, whatever the bound."""
    actual = EXPECTED.copy()
    actual[0, 0, 1, 1] = value
    fault = refused(actual, EXPECTED, np.full(EXPECTED.shape, 1e300))
    assert fault.index == (0, 0, 1, 1) and fault.budget_used == math.inf


@pytest.mark.parametrize("want", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("have", [0.0, math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_met_exactly(want: float, have: float) -> None:
    """Whatever the bound there, which has no meaning."""
    expected, actual = EXPECTED.copy(), EXPECTED.copy()
    expected[0, 1, 0, 2], actual[0, 1, 0, 2] = want, have
    for bound in (BOUND, np.full(EXPECTED.shape, math.inf), np.full(EXPECTED.shape, math.nan)):
        if str(want) == str(have):
            assert compare("A1", "lse", actual, expected, bound, bound, bound).budget == 0
            continue
        fault = refused(actual, expected, bound)
        assert (fault.index, fault.form) == ((0, 1, 0, 2), "exact")
        assert sentence(fault) == f"out[0, 1, 0, 2] is {have:g} and must be exactly {want:g}"


# --- bounds without power -------------------------------------------------------------------------


def test_bounds_that_admit_everything_are_powerless() -> None:
    wide = np.full(EXPECTED.shape, np.abs(EXPECTED).max())
    assert compare("A1", "out", EXPECTED, EXPECTED, wide).powerless
    wide[0, 0, 0, 0] = 2.0**-10  # one element that can tell is enough
    assert not compare("A1", "out", EXPECTED, EXPECTED, wide).powerless


def test_a_tensor_of_zeros_is_never_powerless() -> None:
    """Whoever must give 0 and does has shown something."""
    zeros = np.zeros((2, 2))
    assert not compare("A3", "dq", zeros, zeros, np.ones((2, 2))).powerless


@pytest.mark.parametrize("nothing", [math.inf, math.nan])
def test_a_bound_that_is_not_finite_admits_everything(nothing: float) -> None:
    """It is powerless where it stands, and hides nothing elsewhere."""
    bound = np.full(EXPECTED.shape, nothing)
    actual = off_by(math.nan)
    found = compare("A1", "out", actual, EXPECTED, bound)
    assert found.powerless
    assert found.budget == 0
    bound[0, 0, 0, 1] = 2.0**-10
    assert not compare("A1", "out", actual, EXPECTED, bound).powerless
    actual[0, 0, 0, 1] += 1
    assert refused(actual, EXPECTED, bound).index == (0, 0, 0, 1)


# --- suspicions -----------------------------------------------------------------------------------


def test_statistical_bound_alone_is_a_suspicion() -> None:
    """Between the two bounds: possible for a right implementation, about once in 3e7 elements."""
    found = compare("A1", "out", off_by(2.0**-11), EXPECTED, BOUND, BOUND / 4, BOUND / 64)
    assert isinstance(found.suspicion, WrongElement)
    assert found.suspicion.index == (0, 1, 2, 3)
    assert sentence(found.suspicion).endswith("2 times the budget of the statistical bound")
    assert found.budget == 2.0
    within = compare("A1", "out", off_by(2.0**-13), EXPECTED, BOUND, BOUND / 4, BOUND / 64)
    assert not within.suspicion
    assert within.budget == 0.5


def test_a_common_factor_is_a_suspicion() -> None:
    """Off by 2^-11 throughout, each element well within its own bound: only the slope sees it."""
    expected = np.random.default_rng(2).standard_normal((4, 64, 4))
    statistical = np.full(expected.shape, 2.0**-8)
    arrays = (expected, 4 * statistical, statistical, np.zeros(expected.shape))
    assert not compare("A1", "out", expected, *arrays).suspicion
    found = compare("A1", "out", expected * (1 + 2.0**-11), *arrays)
    assert isinstance(found.suspicion, WrongFactor)
    words = sentence(found.suspicion)
    assert words.startswith("out is off by a factor of about 1 + 0.00048")
    assert found.budget < 1
    noise = 2.0**-9 * np.random.default_rng(3).choice([-1.0, 1.0], expected.shape)
    assert not compare("A1", "out", expected + noise, *arrays).suspicion


def test_rows_that_hold_no_number_are_no_part_of_the_slope() -> None:
    expected = np.random.default_rng(2).standard_normal((4, 64, 1))
    expected[0] = -math.inf
    bound = np.full(expected.shape, 2.0**-8)
    bound[0] = math.nan
    arrays = (expected, 4 * bound, bound, np.zeros(expected.shape))
    assert compare("A1", "lse", expected, *arrays) == Comparison(0.0, None, False, 256)
    found = compare("A1", "lse", expected * (1 + 2.0**-11), *arrays)
    assert isinstance(found.suspicion, WrongFactor)


# --- what becomes of a suspicion ------------------------------------------------------------------


def property_that(*answers: Outcome | Exception) -> tuple[Property, list[Case]]:
    """A property of I4 that gives one answer after the other; and the cases that it is asked."""
    asked: list[Case] = []

    def check(_: object, __: object, case: Case) -> Outcome:
        asked.append(case)
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return dataclasses.replace(PROPERTIES["I4_selection"], check=check), asked


@pytest.mark.parametrize("recurs", range(4))
def test_a_suspicion_counts_if_three_fresh_seeds_all_show_it(recurs: int) -> None:
    """It is drawn again with other data; one seed that does not show it, and it is dropped."""
    case = Case(seed=7)
    odd = WrongFactor(tensor="out", slope=1.0, limit=0.5)
    right = Outcome(compared=1, budget=2.0, ambiguous=3)
    suspicious = dataclasses.replace(right, suspicion=odd)
    prop, asked = property_that(*[suspicious] * (1 + recurs), *[right] * (3 - recurs))
    if recurs == 3:
        with pytest.raises(Broken) as caught:
            judge(prop, OracleImplementation(), case)
        assert (caught.value.clause, caught.value.fault) == ("I4", odd)
        assert "With 3 fresh seeds" in describe(caught.value)
    else:
        outcome = judge(prop, OracleImplementation(), case)
        # what a dropped suspicion used of its budget would read as a failure
        assert outcome == Outcome(compared=1, budget=None, ambiguous=3, suspicion=None)
    assert len(asked) == len({fresh.seed for fresh in asked}) == 4
    assert asked[0] == case


def test_any_other_answer_is_drawn_once() -> None:
    hard = Broken("I4", WrongFactor(tensor="out", slope=1.0, limit=0.5))
    for answer in (hard, NotOffered("lse"), Inconclusive("only powerless bounds")):
        prop, asked = property_that(answer)
        with pytest.raises(type(answer)):
            judge(prop, OracleImplementation(), Case())
        assert asked == [Case()]
    prop, asked = property_that(Outcome(compared=1, budget=0.5))
    assert judge(prop, OracleImplementation(), Case()) == Outcome(compared=1, budget=0.5)
    assert asked == [Case()]


def test_a_case_that_is_refused_is_not_offered() -> None:
    class Picky(OracleImplementation):
        def supports(self, case: Case) -> str | None:
            return "no single queries" if case.q_len == 1 else None

    prop, _ = property_that(Outcome(compared=1))
    with pytest.raises(NotOffered, match="no single queries"):
        judge(prop, Picky(), Case())
    assert judge(prop, Picky(), Case(q_len=2)) == Outcome(compared=1)
