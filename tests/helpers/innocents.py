"""Right implementations of every kind: whatever is found in them is a mistake of the judge.

A soak asks them for hours, and goes on where it was cut off: `python -m benchmarks.soak`.
"""

from __future__ import annotations

import numpy as np

import nsa_fast.adapter
from attention_inputs import draw_way
from nsa_ref.numerics import NUMERICS
from nsa_ref.testing import Case, Implementation, OracleImplementation
from nsa_ref.testing.mutants.compression import CompressionMap
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.layer import LayerInSteps, LayerWay
from nsa_ref.testing.mutants.rounding import RoundedImplementation, Rounding, Way
from nsa_ref.testing.mutants.selection import Selector
from unusual_ports import STABLE, FlaTopK, LucidrainsTopK, NormOfTorch, RanksMeans, SigmoidInSteps


class InAnyWay(RoundedImplementation):
    """Every case is computed in a way of its own: blocks, orders of sums, exponentials.

    Sums are added up term by term, in memory: sizes are small.
    """

    limits = {"kv_len": range(200), "batch": (0, 1, 2)}  # noqa: RUF012

    def rounding(self, case: Case, *, backward: bool = False) -> Rounding:
        self.way = draw_way(np.random.default_rng(case.seed), self.numerics[case.dtype])
        return super().rounding(case, backward=backward)


class AnyKernel(InAnyWay, Kernel):
    """Emulates kernels of a row of numerics."""

    # beyond 512, where some indices are kept in too few bits
    limits = {"kv_len": range(700), "batch": (0, 1, 2)}  # noqa: RUF012


class AnyMap(InAnyWay, CompressionMap):
    """Pools as kernels of a row do."""


class AnySelector(InAnyWay, Selector):
    """Chooses as kernels of a row do."""


def implementations(device: str) -> list[Implementation]:
    """Those of a device: on "cpu" the oracle, emulated kernels and layers of every row as well."""
    found = nsa_fast.adapter.implementations(device)
    if device != "cpu":
        return found
    found += [OracleImplementation(), Kernel(), CompressionMap(), Selector(), LayerInSteps()]
    found += [FlaTopK(), LucidrainsTopK(), RanksMeans(), NormOfTorch()]
    found += [SigmoidInSteps(STABLE, row) for row in ("bf16-eager", "fp16-eager")]
    for row, numerics in NUMERICS.items():
        for kind in (AnyKernel, AnyMap, AnySelector):
            one = kind(row=row)
            one.name = f"{kind.name}, {row}, in any way"
            found.append(one)
        eager = numerics.rounds_every_operation
        for reverse in (False, True):
            exponential = "exp2" if reverse else "exp"
            order = "reversed" if reverse else "pairwise"
            way = Way(16, order, order, exponential, fused=not eager, scale_first=reverse and eager)
            layer = LayerInSteps(LayerWay(way, reverse, not reverse, reverse, reverse), row)
            layer.name = f"{layer.name}, {row}, {'reversed' if reverse else 'straight'}"
            found.append(layer)
    return found
