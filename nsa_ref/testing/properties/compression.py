"""Compression: which tokens a window holds (C1), and its map with gradients (C4)."""

from __future__ import annotations

import numpy as np

from nsa_ref.compress import pool, pool_vjp
from nsa_ref.map_bounds import pool_bounds
from nsa_ref.testing import probes
from nsa_ref.testing.branches import (
    Broken,
    Raised,
    as_float64,
    call,
)
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.compare import compare
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Outcome, Property, settle


def _float64(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in weights.items()}


def windows(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """C1: one-hot tokens through the mean show which tokens a window holds, and their weight."""
    weights = case.pool_weights()
    shape = (case.batch, case.kv_heads, case.num_compress_blocks, case.head_dim)
    comparisons = []
    for chunk in probes.chunks(case.kv_len, case.head_dim):
        width = chunk.stop - chunk.start
        x = np.zeros((case.batch, case.kv_heads, case.kv_len, case.head_dim), DTYPES[case.dtype])
        x[:, :, chunk, :width] = np.eye(width, dtype=x.dtype)
        actual = as_float64("pool", call(implementation.run, "pool", case, x, weights), shape)
        expected = pool(x.astype(np.float64), _float64(weights), case, case.semantics)
        bounds = pool_bounds(
            x.astype(np.float64),
            _float64(weights),
            sizes=case,
            semantics=case.semantics,
            numerics=implementation.numerics[case.dtype],
        )
        wrong = (actual != 0) != (expected != 0)
        if wrong.any():
            _, _, i, c = (int(n) for n in np.argwhere(wrong)[0])
            deed = "holds" if actual[wrong][0] != 0 else "misses"
            raise Broken("C1", f"compressed block {i} {deed} token {chunk.start + c}")
        name = f"pool of one-hot tokens {chunk.start}.."
        comparisons.append(compare("C1", name, actual, expected, bounds.out))
    return settle(comparisons)


def pooled(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    def check() -> Outcome:
        x = case.array("x", case.batch, case.kv_heads, case.kv_len, case.head_dim)
        weights = case.pool_weights()
        shape = (case.batch, case.kv_heads, case.num_compress_blocks, case.head_dim)
        d_out = case.array("d_out", *shape)
        which = f"pool ({case.compress_map})"
        bounds = pool_bounds(
            x.astype(np.float64),
            _float64(weights),
            d_out.astype(np.float64),
            sizes=case,
            semantics=case.semantics,
            numerics=implementation.numerics[case.dtype],
        )
        if not prop.backward:
            actual = as_float64("pool", call(implementation.run, "pool", case, x, weights), shape)
            expected = pool(x.astype(np.float64), _float64(weights), case, case.semantics)
            return settle([compare("C4", which, actual, expected, bounds.out)])
        dx, dweights = call(implementation.run_vjp, "pool", case, x, weights, d_out)
        want_dx, want_dweights = pool_vjp(
            x.astype(np.float64),
            _float64(weights),
            d_out.astype(np.float64),
            case,
            case.semantics,
        )
        if set(dweights) != set(want_dweights):
            raise Raised(
                f"pool_vjp gave gradients of {sorted(dweights)}; the weights are "
                f"{sorted(want_dweights)}"
            )
        assert bounds.dx is not None and bounds.dweights is not None  # d_out was given
        comparisons = [
            compare("C4", f"{which} dx", as_float64("dx", dx, x.shape), want_dx, bounds.dx)
        ]
        for name, want in want_dweights.items():
            have = as_float64(f"d{name}", dweights[name], want.shape)
            comparisons.append(compare("C4", f"{which} d{name}", have, want, bounds.dweights[name]))
        return settle(comparisons)

    return check()
