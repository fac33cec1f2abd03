"""The second definition: whole arrays at once, by broadcasting and einsum.

It shares no line with nsa_ref, and no idea of how to get there: where the oracle loops over rows,
gathers visible keys and adds up, this file forms every pair, Jacobian and window, and contracts.
The two are compared exactly where the arithmetic is exact, else within a bound that is derived
where it is computed: a count of roundings times the sum of the magnitudes of the terms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

U = 2.0**-53  # the unit roundoff of float64
ETA = 2.0**-1022  # its smallest normal number: what underflow may cost a weight

# --- masks ----------------------------------------------------------------------------------------


def positions(q_len: int, kv_len: int) -> np.ndarray:
    return np.arange(q_len)[:, None] + (kv_len - q_len)


def dense_sliding_mask(q_len, kv_len, sizes, semantics):
    p, j = positions(q_len, kv_len), np.arange(kv_len)[None]
    after = p - j
    reach = sizes.sliding_window_size + semantics.window_closed
    near = (after < reach) & (after >= 0 if semantics.causal else after > -reach)
    return (near & (p >= 0)).astype(np.int64)


def dense_compress_mask(q_len, kv_len, sizes, semantics):
    length, d = sizes.compress_block_size, sizes.compress_block_sliding_stride
    i = np.arange(kv_len + 1)
    stops = i * d + length if semantics.compress_alignment == "start" else (i + 1) * d
    stops = stops[stops <= kv_len]
    p = positions(q_len, kv_len)
    seen = stops[None] <= (p if semantics.compress_strict else p + 1)
    blocks = (seen | (not semantics.causal)) & (p >= 0)
    return np.pad(blocks.astype(np.int64), ((0, 0), (sizes.num_mem_kv, 0)), constant_values=1)


def dense_fine_mask(q_len, kv_len, block_indices, sizes, semantics):
    size, causal = sizes.selection_block_size, semantics.causal
    num_blocks = math.ceil(kv_len / size)
    blocks = np.arange(num_blocks)
    count = (block_indices[..., None] == blocks).sum(axis=-2)
    p = positions(q_len, kv_len)
    if semantics.own_block_extra and causal:
        count = count + (np.floor_divide(p, size) == blocks)
    if semantics.duplicates == "set":
        count = np.minimum(count, 1)
    tokens = np.repeat(count, size, axis=-1)[..., :kv_len]
    j = np.arange(kv_len)[None]
    tokens = tokens * (((j <= p) | (not causal)) & (p >= 0))
    return np.repeat(tokens, sizes.q_heads // block_indices.shape[1], axis=1)


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


# --- compression ----------------------------------------------------------------------------------


def dense_windows(x, sizes, semantics):
    """(batch, heads, blocks, length, dim): a strided view of the tokens, padded on the left."""
    length, d = sizes.compress_block_size, sizes.compress_block_sliding_stride
    end = semantics.compress_alignment == "end"
    pad, skip = max(length - d, 0) * end, max(d - length, 0) * end
    padded = np.pad(x, ((0, 0), (0, 0), (pad, 0), (0, 0)))[:, :, skip:]
    if padded.shape[2] < length:
        return np.zeros((*x.shape[:2], 0, length, x.shape[3]))
    return sliding_window_view(padded, length, axis=2)[:, :, ::d].swapaxes(-1, -2)


def dense_pool(x, weights, sizes, semantics):
    length, compress_map = sizes.compress_block_size, sizes.compress_map
    X = dense_windows(x, sizes, semantics)
    if "positions" in weights:
        X = X + weights["positions"][None, :, None]
    if compress_map == "mean":
        return np.einsum("bhird->bhid", X) / length
    if compress_map == "linear_per_head":
        W = weights["weight"].reshape(x.shape[1], -1, length, x.shape[3])
        return np.einsum("bhird,hord->bhio", X, W) + weights["bias"][None, :, None]
    first = "weight" if compress_map == "linear" else "weight_in"
    W = weights[first].reshape(-1, length, x.shape[3])
    y = np.einsum("bhird,ord->bhio", X, W) + weights["bias" + first[len("weight") :]]
    if compress_map == "mlp":
        y = np.einsum("bhiz,oz->bhio", np.maximum(y, 0), weights["weight_out"])
        y = y + weights["bias_out"]
    return y


def dense_pool_vjp(x, weights, d_out, sizes, semantics):
    """(dx, dweights): every contraction of `dense_pool` turned round."""
    length, compress_map = sizes.compress_block_size, sizes.compress_map
    X = dense_windows(x, sizes, semantics)
    if "positions" in weights:
        X = X + weights["positions"][None, :, None]
    dweights = {}
    if compress_map == "mean":
        dX = np.broadcast_to(d_out[:, :, :, None] / length, X.shape)
    elif compress_map == "linear_per_head":
        W = weights["weight"].reshape(x.shape[1], -1, length, x.shape[3])
        dweights["weight"] = np.einsum("bhio,bhird->hord", d_out, X).reshape(
            weights["weight"].shape
        )
        dweights["bias"] = np.einsum("bhio->ho", d_out)
        dX = np.einsum("bhio,hord->bhird", d_out, W)
    else:
        first, bias = ("weight", "bias") if compress_map == "linear" else ("weight_in", "bias_in")
        W = weights[first].reshape(-1, length, x.shape[3])
        dy = d_out
        if compress_map == "mlp":
            y = np.einsum("bhird,ord->bhio", X, W) + weights[bias]
            dweights["weight_out"] = np.einsum("bhio,bhiz->oz", d_out, np.maximum(y, 0))
            dweights["bias_out"] = np.einsum("bhio->o", d_out)
            dy = np.einsum("bhio,oz->bhiz", d_out, weights["weight_out"]) * (y > 0)
        dweights[first] = np.einsum("bhio,bhird->ord", dy, X).reshape(weights[first].shape)
        dweights[bias] = np.einsum("bhio->o", dy)
        dX = np.einsum("bhio,ord->bhird", dy, W)
    if "positions" in weights:
        dweights["positions"] = np.einsum("bhird->hrd", dX)
    number = np.arange(1.0, x.shape[2] + 1)  # of each token, 0 for the padding
    holds = dense_windows(number.reshape(1, 1, -1, 1), sizes, semantics)[0, 0] == number
    return np.einsum("bhird,irj->bhjd", dX, holds), dweights


# --- importance -----------------------------------------------------------------------------------


def dense_overlap_scores(p_cmp, kv_len, sizes, semantics):
    """Eq. 9 and 10 as printed: the sum over m and n of p_cmp at an index, 0 outside the array.

    "start" uses the printed minus signs, with j and p_cmp counted from 1; "end" the plus signs of
    the specification, counted from 0.
    """
    length, d = sizes.compress_block_size, sizes.compress_block_sliding_stride
    size, start = sizes.selection_block_size, semantics.compress_alignment == "start"
    group = sizes.group_size if semantics.share_selection else 1
    blocks, num_blocks = p_cmp.shape[-1], math.ceil(kv_len / size)
    j = np.arange(num_blocks)
    total = np.zeros((*p_cmp.shape[:-1], num_blocks))
    for m in range(size // d):
        for n in range(length // d):
            printed, from_zero = (size // d) * (j + 1) - m - n - 1, (size // d) * j + m + n
            i = printed if start else from_zero
            inside = (i >= 0) & (i < blocks)
            total[..., inside] += p_cmp[..., i[inside]]
    batch, q_heads, *rest = total.shape
    return total.reshape(batch, q_heads // group, group, *rest).sum(axis=2)


def dense_candidates(q_len, kv_len, sizes, semantics):
    size, causal = sizes.selection_block_size, semantics.causal
    b = np.arange(math.ceil(kv_len / size))[None]
    p = positions(q_len, kv_len)
    own = (b * size <= p) & (p < (b + 1) * size)
    allowed = (b * size <= p) | (not causal)
    if semantics.own_block_extra and causal:
        allowed = allowed & ~own
    if semantics.importance == "logit_mean":
        per = size // sizes.compress_block_sliding_stride
        blocks = dense_compress_mask(0, kv_len, sizes, semantics).shape[1] - sizes.num_mem_kv
        allowed = allowed & ((b + 1) * per <= blocks)
        if per > 1:
            allowed = allowed & ~own
    return allowed
