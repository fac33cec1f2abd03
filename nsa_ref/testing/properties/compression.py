"""Compression: which tokens a window holds (C1), and its map with gradients (C4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsa_ref.compress import pool, pool_vjp
from nsa_ref.map_bounds import pool_bounds
from nsa_ref.testing import probes
from nsa_ref.testing.branches import call, checked_tensor
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.compare import check_bits, compare, first_at
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Outcome, Property, settle
from nsa_ref.testing.strategies import fresh_seeds
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
    found = call(implementation.run, "pool", case, *_asked(prop, case))
    return _settled(prop, implementation, case, found)


def pooled_gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """C4: gradients reach the tokens and every weight."""
    found = call(implementation.run_vjp, "pool", case, *_asked(prop, case))
    return _settled(prop, implementation, case, found)


def in_pairs(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """C4: a call leaves the result of the one before as it is, and takes nothing from it."""
    both = _asked(prop, fresh_seeds(case, 1)[0]), _asked(prop, case)
    before, after, found = call(implementation.run_twice, prop.called, case, *both)
    why, part = "the next call has changed it", "of the call before"
    for name, one in _by_name(prop, case, before).items():
        check_bits("C4", name, _by_name(prop, case, after)[name], one, part=part, why=why)
    return _settled(prop, implementation, case, found)


def _asked(prop: Property, case: Case) -> tuple[Any, ...]:
    """What `pool`, or its backward, is called with."""
    d_out = (case.array("d_out", *_blocks(case)),) if prop.backward else ()
    x = case.array("x", case.batch, case.kv_heads, case.kv_len, case.head_dim)
    return x, case.pool_weights(), *d_out


def _by_name(prop: Property, case: Case, result: Any) -> dict[str, np.ndarray]:
    """What a call returned, float64: compressed keys, or dx and the gradient of every weight."""
    if not prop.backward:
        return {"pool": checked_tensor(case, "pool", result, _blocks(case))}
    dx, dweights = result
    tensors = {"dx": dx} | {f"d{name}": d for name, d in dweights.items()}
    return {name: checked_tensor(case, name, d, np.shape(d)) for name, d in tensors.items()}


def _settled(prop: Property, implementation: Implementation, case: Case, found: Any) -> Outcome:
    """Compressed keys that were returned, or gradients, against their bounds."""
    if not prop.backward:
        x, weights = _asked(prop, case)
        compared = _against_bounds(implementation, case, x, weights, found)
        return settle([compare("C4", f"pool ({case.compress_map})", *compared)])
    x, weights, d_out = _asked(prop, case)
    dx, dweights = found
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
    return _against_bounds(implementation, case, x, weights, found)


def _against_bounds(
    implementation: Implementation,
    case: Case,
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    found: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compressed keys that were returned, what the definition says, and the bound."""
    numerics = implementation.numerics[case.dtype]
    bounds = pool_bounds(x, weights, **case.geometry, numerics=numerics)
    expected = pool(x, weights, **case.geometry)
    return checked_tensor(case, "pool", found, _blocks(case)), expected, bounds.out


def _blocks(case: Case) -> tuple[int, ...]:
    return case.batch, case.kv_heads, case.num_compress_blocks, case.head_dim
