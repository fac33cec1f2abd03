"""Is a tensor right? Computed bounds, the slope test, exact patterns, and how much was used.

`budget` is max |error| / bound: 0 is exact, 1 the last admissible value. The deterministic bound
and the exact patterns are final. An exceedance of the statistical bound or of the slope alone is
possible for a right implementation (about 3e-8 per element), so it is reported as a *suspicion*,
which counts only if fresh seeds show it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nsa_ref.bounds import slope_test
from nsa_ref.testing.verdicts import Broken, Convention, WrongElement, WrongFactor


@dataclass(frozen=True)
class Comparison:
    """budget : of the deterministic bound, or of the smaller one where both apply
    suspicion : what only the statistical form says against it
    powerless : the bound admits everything that this tensor could sensibly hold
    elements : how many were compared; not those whose bound is inf
    """

    budget: float
    suspicion: WrongElement | WrongFactor | None
    powerless: bool
    elements: int = 0


def compare(
    clause: str,
    tensor: str,
    actual: np.ndarray,
    expected: np.ndarray,
    deterministic: np.ndarray,
    statistical: np.ndarray | None = None,
    shared: np.ndarray | None = None,
    *,
    part: str = "",
    source: str = "the definition",
    why: str = "",
    rows: Sequence[int] | None = None,
) -> Comparison:
    """Compare float64 arrays of one shape; non-finite expected values must be met exactly.

    A bound that is not finite admits everything, NaN included.

    statistical, shared : bounds of those forms, or None on structured data, where roundings are
        not independent
    tensor, part, source, why : as in `WrongElement`
    rows : where the rows (axis 2) stand in the whole tensor, if these are some of them

    Raises
    ------
    Broken : with `clause`, the worst element, its value, bound and budget used
    """
    if expected.size == 0:
        return Comparison(0.0, None, False)

    def wrong(
        at: tuple[int, ...], form: str, bound: float = 0, used: float = np.inf
    ) -> WrongElement:
        place = at if rows is None else (*at[:2], rows[at[2]], *at[3:])
        return WrongElement(
            tensor=tensor,
            part=part,
            index=place,
            actual=float(actual[at]),
            expected=float(expected[at]),
            bound=float(bound),
            budget_used=float(used),
            form=form,
            source=source,
            why=why,
        )

    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    must_match = ~np.isfinite(expected)
    if (must_match & ~same).any():
        raise Broken(clause, wrong(first_at(must_match & ~same), "exact"))

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(actual - expected))
        error = np.where(np.isnan(error), np.inf, error)

        def used(bound: np.ndarray) -> np.ndarray:
            return np.where((error == 0) | ~np.isfinite(bound), 0.0, error / bound)

        hard = used(deterministic)
    hard = np.where(must_match, 0.0, hard)
    index = _largest(hard)
    if hard[index] > 1:
        raise Broken(clause, wrong(index, "deterministic", deterministic[index], hard[index]))

    budget = float(hard[index])
    suspicion: WrongElement | WrongFactor | None = None
    free = ~must_match
    spread = float(np.abs(expected[free]).max(initial=0.0))
    powerless = bool(free.any() and spread > 0 and not (deterministic[free] < spread).any())
    if statistical is not None and shared is not None:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            soft = np.where(must_match, 0.0, used(np.minimum(deterministic, statistical)))
        index = _largest(soft)
        budget = float(soft[index])
        if budget > 1:
            suspicion = wrong(index, "statistical", statistical[index], budget)
        else:
            tensors = (actual, expected, statistical, shared)
            have, want, *limits = (np.where(must_match, 0.0, x) for x in tensors)
            slope, limit = slope_test(have - want, want, *limits)
            if slope > limit:
                suspicion = WrongFactor(tensor=tensor, slope=float(slope), limit=float(limit))
    elements = int((must_match | np.isfinite(deterministic)).sum())
    return Comparison(budget, suspicion, powerless, elements)


def wrong_element(
    tensor: str,
    at: tuple[int, ...],
    actual: np.ndarray,
    expected: np.ndarray,
    *,
    part: str = "",
    why: str = "",
) -> WrongElement:
    """The element at an index of both arrays, which must be equal there."""
    have, want = float(actual[at]), float(expected[at])
    return WrongElement(tensor=tensor, part=part, index=at, actual=have, expected=want, why=why)


def first_at(wrong: np.ndarray) -> tuple[int, ...]:
    """The index of the first True."""
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _largest(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.argmax(array), array.shape))


def check_exact(
    clause: str,
    tensor: str,
    actual: np.ndarray,
    expected: np.ndarray | float,
    where: np.ndarray | bool = True,
    *,
    why: str,
    convention: Convention | None = None,
) -> int:
    """Compare elements that nothing may change, not even rounding; NaN is equal to NaN.

    Returns how many there were.

    Shapes
    ------
    expected, where : broadcast to the shape of `actual`

    Raises
    ------
    Broken : with `clause`, the first element that differs, and why it must not
    """
    expected = np.broadcast_to(expected, actual.shape)
    wrong = where & (actual != expected) & ~(np.isnan(actual) & np.isnan(expected))
    if wrong.any():
        fault = wrong_element(tensor, first_at(wrong), actual, expected, why=why)
        raise Broken(clause, fault, convention=convention)
    return int(np.broadcast_to(where, actual.shape).sum())


def check_bits(
    clause: str,
    tensor: str,
    actual: np.ndarray,
    expected: np.ndarray,
    *,
    part: str = "",
    why: str = "",
) -> None:
    """Compare float64 arrays bit by bit: zeros of both signs differ, and NaN is itself.

    Raises
    ------
    Broken : with `clause`, the first element that differs, how many do, and why none must
    """
    differs = actual.view(np.int64) != expected.view(np.int64)
    if differs.any():
        many = f"{why}, and {differs.sum()} of {differs.size} elements differ"
        at = first_at(differs)
        raise Broken(clause, wrong_element(tensor, at, actual, expected, part=part, why=many))
