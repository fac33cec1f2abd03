"""Attention a second time, by broadcasting and einsum.

Masks, compression maps and selection have their second definitions in `nsa_ref.testing.mutants`.

Neither shares a line with the oracle, nor an idea of how to get there: where the oracle loops over
rows, gathers visible keys and adds up, this file forms every pair and Jacobian, and contracts.
The two are compared within a bound that is derived where it is computed: a count of roundings
times the sum of the magnitudes of the terms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

U = 2.0**-53  # the unit roundoff of float64
ETA = 2.0**-1022  # its smallest normal number: what underflow may cost a weight

# --- attention ------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """Values; the sum of the magnitudes of the terms of each; and how far two float64
    computations of it may lie apart."""

    value: np.ndarray
    terms: np.ndarray
    bound: np.ndarray


def dense_attention(
    q, k, v, mask, d_out=None, d_lse=None, *, scale, empty_row="zero", empty_lse=-math.inf
) -> dict[str, Dense]:
    """out, lse, and with d_out also dq, dk, dv, each with a bound on the distance of two float64
    computations of it.

    The bound. Let u = 2^-53, n the columns. A logit is a sum of head_dim products, so it is off
    by at most (head_dim + 2) u scale sum |q||k|; subtracting the maximum and adding the log of
    the multiplicity adds u (|s| + max |s| + log mult) each. The exponential turns the absolute
    error e of its argument into a relative one of e + e^2 <= 2 e, and adds 4 u of its own. With
    E the largest of these over the row, numerator and denominator of P make its relative error at
    most 2 E + (n + 4) u =: r. All results are sums of products of P with inputs. So if S is the
    same sum with every term replaced by its magnitude, the error is at most (number of factors P)
    r + (length of all sums + 8) u times S. Two computations differ by twice that, and another
    factor 2 covers the products of errors, which are below u^2 S. lse = top + log of a sum whose
    relative error is r, which is absolute after the log. A P that underflows is off by
    ETA instead, which adds ETA times S with every such P replaced by 1.
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    kh, vh = (np.repeat(x, group, axis=1) for x in (k, v))
    mult = np.broadcast_to(mask, (*q.shape[:3], k.shape[2])).astype(np.float64)
    seen = mult > 0
    empty = ~seen.any(axis=-1, keepdims=True)
    n, head_dim, value_dim = k.shape[2], q.shape[3], v.shape[3]

    s = scale * np.einsum("bhtc,bhjc->bhtj", q, kh)
    with np.errstate(divide="ignore"):
        x = np.where(seen, s + np.log(mult), -np.inf)
    top = np.where(empty, 0, x.max(axis=-1, keepdims=True, initial=-np.inf))
    lse = np.log(np.where(empty, 1, np.exp(x - top).sum(axis=-1, keepdims=True))) + top
    P = np.exp(x - lse)

    a = abs(scale) * np.einsum("bhtc,bhjc->bhtj", abs(q), abs(kh))
    log_mult = np.log(np.maximum(mult, 1))
    e = (head_dim + 2) * U * a + 2 * U * (abs(s) + abs(top) + abs(lse) + log_mult)
    E = np.where(seen, 2 * e + 4 * U, 0).max(axis=-1, keepdims=True, initial=0)
    r = 2 * E + (n + 4) * U

    out = np.einsum("bhtj,bhjc->bhtc", P, vh)
    out_terms = np.einsum("bhtj,bhjc->bhtc", P, abs(vh))
    if empty_row == "nan":
        out = np.where(empty, np.nan, out)
    if empty_row == "uniform" and n:
        out = np.where(empty, vh.mean(axis=2, keepdims=True), out)
        out_terms = np.where(empty, abs(vh).mean(axis=2, keepdims=True), out_terms)
    largest = np.einsum("bhtj,bhjc->bhtc", seen, abs(vh))
    lse_terms = np.where(empty, 0, 1 + abs(lse) + abs(top))[..., 0]
    lse = np.where(empty, empty_lse, lse)[..., 0]
    results = {
        "out": Dense(out, out_terms, 4 * ((r + (n + 8) * U) * out_terms + ETA * largest)),
        "lse": Dense(lse, lse_terms, 4 * (r[..., 0] + 4 * U) * lse_terms),
    }
    if d_out is None:
        return results

    # the whole Jacobian of the softmax, d P_j / d s_i = P_j ([i = j] - P_i), contracted with dP
    J = P[..., None] * np.eye(n) - P[..., :, None] * P[..., None, :]
    dP = np.einsum("bhtc,bhjc->bhtj", d_out, vh)
    dS = np.einsum("bhtij,bhtj->bhti", J, dP) + P * d_lse[..., None]
    adP = np.einsum("bhtc,bhjc->bhtj", abs(d_out), abs(vh))
    M = P * (adP + (P * adP).sum(axis=-1, keepdims=True) + abs(d_lse[..., None]))
    shared = 0.0
    if empty_row == "uniform" and n:
        shared = np.where(empty, 1 / n, 0.0)

    def to_kv_head(pairs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        full = np.einsum("bhtj,bhtc->bhjc", pairs, rows)
        return full.reshape(full.shape[0], heads // group, group, *full.shape[2:]).sum(axis=2)

    sums = (n + value_dim + group * q.shape[2] + 8) * U
    factor = 4 * (2 * r + sums)  # dS holds two factors P
    weight = P + shared
    spread = factor * M + 4 * ETA * seen * (
        adP + 2 * (seen * adP).sum(axis=-1, keepdims=True) + abs(d_lse[..., None])
    )
    aq, ak, ad, size = abs(q), abs(kh), abs(d_out), abs(scale)
    results["dq"] = Dense(
        scale * np.einsum("bhtj,bhjc->bhtc", dS, kh),
        size * np.einsum("bhtj,bhjc->bhtc", M, ak),
        size * np.einsum("bhtj,bhjc->bhtc", spread, ak),
    )
    results["dk"] = Dense(
        scale * to_kv_head(dS, q), size * to_kv_head(M, aq), size * to_kv_head(spread, aq)
    )
    results["dv"] = Dense(
        to_kv_head(weight, d_out),
        to_kv_head(weight, ad),
        to_kv_head(factor * weight + 4 * ETA * seen, ad),
    )
    return results
