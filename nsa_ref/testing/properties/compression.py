"""Compression: which tokens a window holds (C1), and its map with gradients (C4)."""

from __future__ import annotations

import numpy as np

from nsa_ref.compress import pool, pool_vjp
from nsa_ref.map_bounds import pool_bounds
from nsa_ref.testing import probes
from nsa_ref.testing.branches import call, checked_tensor
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.compare import compare, first_at
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Outcome, Property, settle
from nsa_ref.testing.verdicts import Broken, Raised, WrongReader


def windows(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """C1: one-hot tokens through the mean show which tokens a window holds, and their weight."""
    weights = case.pool_weights()
    comparisons = []
    tokens = (case.batch, case.kv_heads, case.kv_len, case.head_dim)
    for chunk, _, x in probes.one_hot(np.zeros(tokens, DTYPES[case.dtype])):
        actual, expected, bound = _pooled(implementation, case, x, weights)
        wrong = (actual != 0) != (expected != 0)
        if wrong.any():
            _, _, i, c = first_at(wrong)
            block, token = ("compressed block", i), ("token", chunk.start + c)
            reads = bool(actual[wrong][0] != 0)
            raise Broken("C1", WrongReader(tensor="pool", reader=block, read=token, reads=reads))
        part = f"of one-hot tokens from {chunk.start} on"
        comparisons.append(compare("C1", "pool", actual, expected, bound, part=part))
    return settle(comparisons)


def pooled(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """C4: compressed keys are the map of their window's tokens."""
    x = case.array("x", case.batch, case.kv_heads, case.kv_len, case.head_dim)
    found = _pooled(implementation, case, x, case.pool_weights())
    return settle([compare("C4", f"pool ({case.compress_map})", *found)])


def pooled_gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """C4: gradients reach the tokens and every weight."""
    x = case.array("x", case.batch, case.kv_heads, case.kv_len, case.head_dim)
    d_out = case.array("d_out", *_blocks(case))
    weights = case.pool_weights()
    dx, dweights = call(implementation.run_vjp, "pool", case, x, weights, d_out)
    want_dx, want_dweights = pool_vjp(x, weights, d_out, **case.geometry)
    if set(dweights) != set(want_dweights):
        wanted = f"the weights are {sorted(want_dweights)}"
        raise Raised(f"pool_vjp gave gradients of {sorted(dweights)}; {wanted}")
    numerics = implementation.numerics[case.dtype]
    bounds = pool_bounds(x, weights, d_out, **case.geometry, numerics=numerics)
    assert bounds.dx is not None and bounds.dweights is not None  # d_out was given
    comparisons = []
    for name, have, want, bound in [
        ("dx", dx, want_dx, bounds.dx),
        *((f"d{n}", dweights[n], want, bounds.dweights[n]) for n, want in want_dweights.items()),
    ]:
        have = checked_tensor(case, name, have, want.shape)
        comparisons.append(compare("C4", f"pool ({case.compress_map}) {name}", have, want, bound))
    return settle(comparisons, sent=d_out.size > 0)


def _pooled(
    implementation: Implementation, case: Case, x: np.ndarray, weights: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the implementation makes of tokens, what the definition does, and the bound."""
    found = call(implementation.run, "pool", case, x, weights)
    numerics = implementation.numerics[case.dtype]
    bounds = pool_bounds(x, weights, **case.geometry, numerics=numerics)
    expected = pool(x, weights, **case.geometry)
    return checked_tensor(case, "pool", found, _blocks(case)), expected, bounds.out


def _blocks(case: Case) -> tuple[int, ...]:
    return case.batch, case.kv_heads, case.num_compress_blocks, case.head_dim
