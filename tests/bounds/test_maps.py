"""`nsa_ref.map_bounds`: no right compression map exceeds its bounds, every wrong one does.

Right maps and wrong ones (`nsa_ref.testing.mutants.compression`) round as a row of numerics says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from attention_inputs import ORDERS, ROWS, Generator, generator, rounded
from budgets import Array, Budgets, budget_used
from nsa_ref.compress import pool_weight_shapes
from nsa_ref.map_bounds import pool_bounds, rounded_pool
from nsa_ref.numerics import NUMERICS
from nsa_ref.rounded import Rounded
from nsa_ref.semantics import Semantics
from nsa_ref.sizes import COMPRESS_MAPS, Sizes
from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants import compression
from nsa_ref.testing.mutants.compression import CompressionMap
from nsa_ref.testing.mutants.rounding import Way


def pooled(
    row: str,
    rng: Generator,
    compress_map: str,
    wrong: type[CompressionMap] | None = None,
    off: float = 0.0,
) -> dict[str, tuple[Array, Array, Array]]:
    """(computed, reference, bound) of every tensor of one random map.

    off : how far the tokens and the gradient of the blocks are from those of the reference
    """
    length, stride = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    kv_len, dim, alignment = int(rng.integers(0, 20)), int(rng.integers(1, 5)), "end"
    if wrong:
        length, stride, kv_len = 4, 2, 18
    elif rng.random() < 0.5:
        alignment = "start"
    case = Case(
        q_heads=2,
        kv_heads=2,
        kv_len=kv_len,
        compress_block_size=length,
        compress_block_sliding_stride=stride,
        selection_block_size=stride,
        compress_map=compress_map,
        compress_positions=bool(wrong or rng.random() < 0.7),
        semantics=Semantics(compress_alignment=alignment),
    )

    def normal(*shape: int) -> Array:
        return rounded(rng.standard_normal(shape), row)

    weights = {name: normal(*shape) for name, shape in pool_weight_shapes(case, dim).items()}
    exact = normal(2, 2, kv_len, dim), normal(2, 2, case.num_compress_blocks, dim)
    moved = [rounded(y * (1.0 + off * rng.choice([-1.0, 1.0], y.shape)), row) for y in exact]

    def computed(row: str, order: str, x: Array, d_out: Array, kind: type) -> dict[str, Array]:
        of_row = dataclasses.replace(case, dtype=NUMERICS[row].dtype)
        computes = kind(Way(order=order, backward_order=order), row)
        dx, dweights = computes.pool_vjp(of_row, x, weights, d_out)
        found = {"out": computes.pool(of_row, x, weights), "dx": dx, **dweights}
        return {name: y.astype(np.float64) for name, y in found.items()}

    if off:
        x, d_out = (Rounded(y, np.abs(z - y)) for y, z in zip(exact, moved))
        found = rounded_pool(x, weights, d_out, case, case.semantics, NUMERICS[row])
        assert found.dx is not None
        errors = {name: each.error for name, each in found.dweights.items()}
        limits = {"out": found.out.error, "dx": found.dx.error, **errors}
    else:
        how: dict[str, Any] = {"sizes": case, "semantics": case.semantics, "numerics": row}
        out, dx, dweights = pool_bounds(exact[0], weights, exact[1], **how)
        assert dx is not None and dweights is not None
        limits = {"out": out, "dx": dx, **dweights}
    got = computed(row, str(rng.choice(ORDERS)), *moved, wrong or CompressionMap)
    right = computed("fp64", "sequential", *exact, CompressionMap)
    return {name: (got[name], right[name], limits[name]) for name in limits}


@pytest.mark.parametrize("compress_map", COMPRESS_MAPS)
@pytest.mark.parametrize("row", ["fp64", "fp32", "tf32", "bf16", "fp16"])
def test_right_maps_stay_within_their_bounds(row: str, compress_map: str) -> None:
    """C1, C4, layer by layer, windows at both alignments, with and without positions."""
    budgets = Budgets()
    for seed in range(60):
        rng = generator(20, ROWS.index(row), seed)
        for name, each in pooled(row, rng, compress_map).items():
            budgets.add(name, *each, where=f"seed {seed}")
    budgets.print(f"right compression maps, {row}, {compress_map}")


@pytest.mark.parametrize("compress_map", COMPRESS_MAPS)
@pytest.mark.parametrize("row", ["fp64", "fp32", "bf16", "fp16"])
def test_maps_of_tokens_that_are_off_stay_within_their_bounds(row: str, compress_map: str) -> None:
    """The tokens and the gradient of the blocks are both off, units of the MLP may flip."""
    budgets = Budgets()
    for seed in range(30):
        rng = generator(53, ROWS.index(row), seed)
        for name, each in pooled(row, rng, compress_map, off=0.1).items():
            budgets.add(name, *each, where=f"seed {seed}")
    assert max(budgets.largest.values()) > 1 / 2


@pytest.mark.parametrize("row", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("compress_map", "wrong"),
    [
        ("mean", compression.MeanOfRealTokens),
        ("linear", compression.NoPositions),
        ("linear_per_head", compression.FirstHeadsMap),
        ("mlp", compression.ReluPassesAll),
    ],
)
def test_wrong_maps_exceed_their_bounds(
    compress_map: str, wrong: type[CompressionMap], row: str
) -> None:
    for seed in range(12):
        results = pooled(row, generator(21, ROWS.index(row), seed), compress_map, wrong)
        assert max(budget_used(*each) for each in results.values()) > 1


def test_bad_arguments_are_named() -> None:
    """As by `pool`, which has the same checks."""
    x, sizes = np.zeros((1, 1, 5, 4)), Sizes(compress_block_size=2, compress_map="linear")
    with pytest.raises(ValueError, match="numerics='fp8' must be one of 'fp64', 'fp32'"):
        pool_bounds(x, {}, sizes=sizes, numerics="fp8")
    with pytest.raises(ValueError, match=r"weights lacks \['weight'\]"):
        pool_bounds(x, {"bias": np.zeros(4)}, sizes=sizes, numerics="fp32")
    weights = {"weight": np.zeros((4, 8)), "bias": np.zeros(4)}
    with pytest.raises(ValueError, match=r"d_out has shape \(1, 1, 3, 4\)"):
        pool_bounds(x, weights, np.zeros((1, 1, 3, 4)), sizes=sizes, numerics="fp32")
