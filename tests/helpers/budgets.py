"""How much of a bound an error uses: what the tests of bounds share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Mapping[str, Array]


def budget_used(got: Array, right: Array, bound: Array) -> float:
    """The largest |error| / bound; an exact agreement uses nothing, not even of a bound of 0."""
    assert bound.shape == right.shape == got.shape
    assert not np.isnan(bound).any()
    with np.errstate(divide="ignore", invalid="ignore"):
        used = np.abs(got - right) / bound
    used = np.where(np.isnan(used) | np.isnan(got), np.inf, used)  # 0 / 0 is settled below
    return float(np.max(np.where((got == right) | np.isinf(bound), 0.0, used), initial=0.0))


class Budgets:
    """The largest budget used of every tensor, over many right results: none exceeds its bound."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def add(self, name: str, got: Array, right: Array, bound: Array, where: object = "") -> None:
        used = budget_used(got, right, bound)
        assert used <= 1, f"{where}: {name} uses {used}"
        self.largest[name] = max(used, self.largest.get(name, 0.0))

    def add_all(self, got: Tensors, right: Tensors, bounds: Tensors, where: object = "") -> None:
        for name, bound in bounds.items():
            self.add(name, got[name], right[name], bound, where)

    def print(self, whose: str) -> None:
        """See it with ``-s``, or with ``-rP`` under pytest-xdist."""
        cells = "  ".join(f"{name} {used:.3f}" for name, used in self.largest.items())
        print(f"\nbudget used by {whose}: {cells}")
