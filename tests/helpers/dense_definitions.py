"""Attention a second time, by broadcasting and einsum.

It shares no line with the oracle's attention, nor an idea of how to get there: where the oracle
loops over rows, gathers visible keys and adds up, this file forms every pair and Jacobian, and
contracts. How far apart the two may lie is what `nsa_ref.bounds` says of any float64 attention;
tests/bounds holds those bounds by themselves.

Masks, compression maps and selection have their second definitions in `nsa_ref.testing.mutants`:
`DenseMasks`, `CompressionMap` and `Selector`. What these do not override is the oracle itself, so
that a test of one compares no more than its class defines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nsa_ref.bounds import attention_bounds

U = 2.0**-53  # the unit roundoff of float64


class Dense(NamedTuple):
    """Values, how far the oracle's may lie from them, and the sum of the magnitudes of the terms
    of each (of gradients)."""

    value: np.ndarray
    bound: np.ndarray
    terms: np.ndarray | None = None


def dense_attention(
    q, k, v, mask, d_out=None, d_lse=None, *, scale, empty_row="zero", empty_lse=-math.inf
) -> dict[str, Dense]:
    """out, lse, and with d_out also dq, dk, dv; the bounds are those of any float64 attention."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    kh, vh = (np.repeat(x, group, axis=1) for x in (k, v))
    mult = np.broadcast_to(mask, (*q.shape[:3], k.shape[2])).astype(np.int64)
    empty = ~mult.any(axis=-1, keepdims=True)
    n = k.shape[2]
    uniform = empty & (empty_row == "uniform") & (n > 0)

    # a row that is the mean of all values is attention with equal logits
    given = np.where(uniform, 0.0, q), k, v, np.where(uniform, 1, mult), d_out, d_lse
    bounds = attention_bounds(*given, numerics="fp64", form="deterministic", scale=scale)

    s = np.where(mult > 0, scale * np.einsum("bhtc,bhjc->bhtj", q, kh), -np.inf)
    top = np.where(empty, 0, s.max(axis=-1, keepdims=True, initial=-np.inf))
    weight = mult * np.exp(s - top)
    total = np.where(empty, 1, weight.sum(axis=-1, keepdims=True))
    P, lse = weight / total, top + np.log(total)
    weight = np.where(uniform, 1 / max(1, n), P)
    out = np.einsum("bhtj,bhjc->bhtc", weight, vh)
    if empty_row == "nan":
        out = np.where(empty, np.nan, out)
    lse = np.where(empty, empty_lse, lse)[..., 0]
    results = {
        "out": Dense(out, bounds.out),
        "lse": Dense(lse, np.where(empty[..., 0], 0.0, bounds.lse)),
    }
    if d_out is None:
        return results

    # the whole Jacobian of the softmax, d P_j / d s_i = P_j ([i = j] - P_i), contracted with dP
    J = P[..., None] * np.eye(n) - P[..., :, None] * P[..., None, :]
    dP = np.einsum("bhtc,bhjc->bhtj", d_out, vh)
    dS = np.einsum("bhtij,bhtj->bhti", J, dP) + P * d_lse[..., None]
    adP = np.einsum("bhtc,bhjc->bhtj", abs(d_out), abs(vh))
    M = P * (adP + (P * adP).sum(axis=-1, keepdims=True) + abs(d_lse[..., None]))

    def to_kv_head(pairs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        full = np.einsum("bhtj,bhtc->bhjc", pairs, rows)
        return full.reshape(full.shape[0], heads // group, group, *full.shape[2:]).sum(axis=2)

    results["dq"] = Dense(
        scale * np.einsum("bhtj,bhjc->bhtc", dS, kh),
        np.where(empty, 0.0, bounds.dq),
        abs(scale) * np.einsum("bhtj,bhjc->bhtc", M, abs(kh)),
    )
    results["dk"] = Dense(scale * to_kv_head(dS, q), bounds.dk, abs(scale) * to_kv_head(M, abs(q)))
    dv, terms = to_kv_head(weight, d_out), to_kv_head(weight, abs(d_out))
    results["dv"] = Dense(dv, bounds.dv, terms)
    return results
