"""Is a tensor right? Computed bounds, the slope test, exact patterns, and how much was used.

`budget` is max |error| / bound: 0 is exact, 1 the last admissible value. The deterministic bound
and the exact patterns are final. An exceedance of the statistical bound or of the slope alone is
possible for a right implementation (about 3e-8 per element), so it is reported as a *suspicion*,
which counts only if fresh seeds show it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsa_ref.bounds import slope_test
from nsa_ref.testing.branches import Broken


@dataclass(frozen=True)
class Comparison:
    """budget : of the deterministic bound, or of the smaller one where both apply
    suspicion : what only the statistical form says against it, "" if nothing
    powerless : the bound admits everything that this tensor could sensibly hold
    """

    budget: float
    suspicion: str
    powerless: bool


def compare(
    clause: str,
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    deterministic: np.ndarray,
    statistical: np.ndarray | None = None,
    shared: np.ndarray | None = None,
) -> Comparison:
    """Compare float64 arrays of one shape; non-finite expected values must be met exactly.

    A bound that is not finite admits everything, NaN included.

    statistical, shared : bounds of those forms, or None on structured data, where roundings are
        not independent

    Raises
    ------
    Broken : with `clause`, the worst element, its value, bound and budget used
    """
    if expected.size == 0:
        return Comparison(0.0, "", False)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    must_match = ~np.isfinite(expected)
    wrong = must_match & ~same
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise Broken(
            clause,
            f"{name}{list(index)} is {actual[index]:.9g} and must be exactly {expected[index]:.9g}",
            worst=_worst(name, index, actual[index], expected[index], 0.0, np.inf),
        )

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(actual - expected))
        error = np.where(np.isnan(error), np.inf, error)

        def used(bound: np.ndarray) -> np.ndarray:
            return np.where((error == 0) | ~np.isfinite(bound), 0.0, error / bound)

        hard = used(deterministic)
    hard = np.where(must_match, 0.0, hard)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(hard), hard.shape))
    if hard[index] > 1:
        raise Broken(
            clause,
            element(name, index, actual[index], expected[index], deterministic[index], hard[index]),
            worst=_worst(
                name, index, actual[index], expected[index], deterministic[index], hard[index]
            ),
        )

    budget, suspicion = float(hard[index]), ""
    free = ~must_match
    spread = float(np.abs(expected[free]).max(initial=0.0))
    powerless = bool(free.any() and spread > 0 and not (deterministic[free] < spread).any())
    if statistical is not None and shared is not None:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            soft = np.where(must_match, 0.0, used(np.minimum(deterministic, statistical)))
        index = tuple(int(i) for i in np.unravel_index(np.argmax(soft), soft.shape))
        budget = float(soft[index])
        if budget > 1:
            suspicion = (
                element(name, index, actual[index], expected[index], statistical[index], budget)
                + " of the statistical bound"
            )
        else:
            tensors = (actual, expected, statistical, shared)
            actual, expected, *limits = (np.where(must_match, 0.0, x) for x in tensors)
            slope, limit = slope_test(actual - expected, expected, *limits)
            if slope > limit:
                suspicion = (
                    f"{name} is off by a factor of about {1 + slope:.6g} throughout: slope "
                    f"{slope:.3g}, limit {limit:.3g}"
                )
    return Comparison(budget, suspicion, powerless)


def element(
    name: str, index: tuple[int, ...], actual: float, expected: float, bound: float, used: float
) -> str:
    """One line about the worst element."""
    return (
        f"{name}{list(index)} is {actual:.9g}, the definition says {expected:.9g}: off by "
        f"{abs(actual - expected):.3g}, bound {bound:.3g}, {used:.3g} times the budget"
    )


def _worst(
    name: str, index: tuple[int, ...], actual: float, expected: float, bound: float, used: float
) -> dict[str, object]:
    """The same as data; non-finite numbers as strings, so that it is JSON."""

    def number(value: float) -> float | str:
        return float(value) if np.isfinite(value) else str(value)

    return {
        "tensor": name,
        "index": list(index),
        "actual": number(actual),
        "expected": number(expected),
        "bound": number(bound),
        "budget_used": number(used),
    }
