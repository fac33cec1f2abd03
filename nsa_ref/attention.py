"""Attention through a mask of multiplicities, and its gradients: clauses A1 to A5.

Over each row's visible keys alone: a key that is invisible never enters the arithmetic, so that
even NaN or inf in it has no influence (A5). Rows that read the same keys are worked on together,
because a judge calls this a million times.

Complex inputs pass through, and the row maximum is taken of the real parts. Thus a derivative can
be read off an imaginary step, Im f(x + i h) / h, which has no cancellation error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.checks import as_float64, check_at_least, check_multiple, check_one_of


class Attention(NamedTuple):
    """What attention returns.

    out : (batch, q_heads, q_len, value_dim)
    lse : (batch, q_heads, q_len), natural logarithm
    """

    out: np.ndarray
    lse: np.ndarray


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    *,
    scale: float | None = None,
    empty_row: str = "zero",
    empty_lse: float = -math.inf,
) -> Attention:
    """Softmax attention over the visible keys, each as often as its multiplicity says.

    ::

        s_j = scale q.k_j                          query head h reads kv head h // G
        P_j = mult_j exp(s_j) / sum_j mult_j exp(s_j)
        out = sum_j P_j v_j                        lse = log sum_j mult_j exp(s_j)

    A row that sees no key (A2): out is 0 (`empty_row="zero"`), NaN ("nan"), or the mean of v
    over all columns, visible or not ("uniform": what a softmax of equal, finite mask values
    gives); over no columns at all that mean is 0. Its lse is `empty_lse`.

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim)      k : (batch, kv_heads, columns, head_dim)
    v : (batch, kv_heads, columns, value_dim)
    mask : integer or bool, broadcastable to (batch, q_heads, q_len, columns)
    scale : default head_dim ** -0.5
    returns : Attention(out, lse), float64 (complex128 where an input is complex)

    Raises
    ------
    ValueError : shapes that do not fit, q_heads no multiple of kv_heads, a negative
        multiplicity, an unknown empty_row or empty_lse
    TypeError : a mask that is neither integer nor bool, arrays that hold no numbers

    Source
    ------
    A1, A2, A5; arXiv 2502.11089, eq. 1 and 2
    """
    q, k, v, mask, scale = attention_arguments(q, k, v, mask, scale)
    check_one_of("empty_row", empty_row, ("zero", "nan", "uniform"))
    check_one_of("empty_lse", empty_lse, (-math.inf, 0.0, math.inf))
    batch, q_heads, q_len, columns = mask.shape
    group = q_heads // k.shape[1]

    out = np.zeros((batch, q_heads, q_len, v.shape[3]), dtype=np.result_type(q, k, v))
    lse = np.zeros((batch, q_heads, q_len), dtype=np.result_type(q, k))
    for g, rows, multiplicity in rows_that_see_the_same(mask, group):
        b, (visible,) = rows[0], multiplicity.nonzero()
        if visible.size == 0:
            # The sums of A1 are 0 / 0 here, so the value is a convention and has a switch.
            lse[rows] = empty_lse
            if empty_row == "nan":
                out[rows] = math.nan
            elif empty_row == "uniform" and columns > 0:
                out[rows] = v[b, g].sum(axis=0) / columns
            continue
        s = scale * (q[rows] @ k[b, g, visible].T)
        m = s.real.max(axis=-1, keepdims=True)  # exp(s - m) cannot overflow; m cancels in P
        weight = multiplicity[visible] * np.exp(s - m)
        total = weight.sum(axis=-1, keepdims=True)
        out[rows] = (weight / total) @ v[b, g, visible]
        lse[rows] = (m + np.log(total))[..., 0]
    return Attention(out, lse)


def attend_vjp(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    d_out: np.ndarray,
    d_lse: np.ndarray | None = None,
    *,
    scale: float | None = None,
    empty_row: str = "zero",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of <d_out, out> + <d_lse, lse> with respect to q, k and v.

    ::

        dP_j = dO.v_j        D = dO.O        dS_j = P_j (dP_j - D + dlse)
        dq   = scale sum_j dS_j k_j
        dk_j = scale sum over the group's heads and the queries of dS_j q
        dv_j =       sum over the group's heads and the queries of P_j dO

    The multiplicities are in P: d lse / d s_j = P_j, and d P_j / d s_i = P_j ([i = j] - P_i).
    A row that sees no key has gradients of exactly 0, whatever d_out and d_lse hold there (A2);
    for `empty_row="uniform"`, where out is the mean of v, dv gets d_out / columns in every column.

    Shapes
    ------
    q, k, v, mask, scale, empty_row : as in `attend`
    d_out : (batch, q_heads, q_len, value_dim)
    d_lse : (batch, q_heads, q_len), or None for 0
    returns : (dq, dk, dv), of the shapes of q, k and v

    Raises
    ------
    ValueError, TypeError : as `attend`; d_out or d_lse of a wrong shape

    Source
    ------
    A2, A3, A5; derived by hand from A1
    """
    q, k, v, mask, scale = attention_arguments(q, k, v, mask, scale)
    check_one_of("empty_row", empty_row, ("zero", "nan", "uniform"))
    batch, q_heads, q_len, columns = mask.shape
    group = q_heads // k.shape[1]
    all_rows = batch, q_heads, q_len
    d_out = as_float64("d_out", d_out, (*all_rows, v.shape[3]))
    d_lse = np.zeros(all_rows) if d_lse is None else as_float64("d_lse", d_lse, all_rows)

    dtype = np.result_type(q, k, v, d_out, d_lse)
    dq, dk, dv = (np.zeros(x.shape, dtype=dtype) for x in (q, k, v))
    for g, rows, multiplicity in rows_that_see_the_same(mask, group):
        b, (visible,) = rows[0], multiplicity.nonzero()
        dO = d_out[rows]
        if visible.size == 0:
            if empty_row == "uniform" and columns > 0:
                dv[b, g] += dO.sum(axis=(0, 1)) / columns
            continue
        queries, keys, values = q[rows], k[b, g, visible], v[b, g, visible]
        s = scale * (queries @ keys.T)
        weight = multiplicity[visible] * np.exp(s - s.real.max(axis=-1, keepdims=True))
        P = weight / weight.sum(axis=-1, keepdims=True)
        dP = dO @ values.T
        D = (dO * (P @ values)).sum(axis=-1, keepdims=True)
        dS = P * (dP - D + d_lse[rows][..., None])
        dq[rows] = scale * (dS @ keys)
        dk[b, g, visible] += scale * (dS.swapaxes(1, 2) @ queries).sum(axis=0)
        dv[b, g, visible] += (P.swapaxes(1, 2) @ dO).sum(axis=0)
    return dq, dk, dv


def rows_that_see_the_same(
    mask: np.ndarray, group: int
) -> Iterator[tuple[int, tuple[int, slice, slice], np.ndarray]]:
    """(kv head, (b, query heads, rows), multiplicities of the keys): each row is in one of them.

    Neighbouring rows, of all query heads that share a kv head where these have one mask.
    """
    batch, q_heads, q_len, _ = mask.shape
    for b, g in np.ndindex(batch, q_heads // group):
        of_heads = mask[b, g * group : (g + 1) * group]
        together = group if (of_heads == of_heads[:1]).all() else 1
        for first in range(0, group, together):
            rows = of_heads[first]
            heads = slice(g * group + first, g * group + first + together)
            (last,) = (rows[1:] != rows[:-1]).any(axis=-1).nonzero()
            for start, end in itertools.pairwise(sorted({0, *(last + 1).tolist(), q_len})):
                yield g, (b, heads, slice(start, end)), rows[start]


def attention_arguments(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: ArrayLike, scale: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """What `attend` and `attend_vjp` share and check: float64, mask broadcast, scale set.

    Raises
    ------
    ValueError, TypeError : as `attend`
    """
    q = as_float64("q", q, ("batch", "q_heads", "q_len", "head_dim"))
    batch, q_heads, q_len, head_dim = q.shape
    check_at_least("head_dim (axis 3 of q)", head_dim, 1)
    k = as_float64("k", k, (batch, "kv_heads", "columns", head_dim))
    _, kv_heads, columns, _ = k.shape
    v = as_float64("v", v, (batch, kv_heads, columns, "value_dim"))
    check_at_least("kv_heads (axis 1 of k)", kv_heads, 1)
    why = "query head h reads kv head h // (q_heads // kv_heads)"
    check_multiple("q_heads (axis 1 of q)", q_heads, "kv_heads (axis 1 of k)", kv_heads, why=why)
    mask = np.asarray(mask)
    if mask.dtype.kind not in "iub":
        raise TypeError(
            f"mask has dtype {mask.dtype}; it must be integer or bool: how often each key counts."
        )
    try:
        mask = np.broadcast_to(mask, (batch, q_heads, q_len, columns))
    except ValueError:
        raise ValueError(
            f"mask has shape {mask.shape}; it must broadcast to (batch={batch}, "
            f"q_heads={q_heads}, q_len={q_len}, columns={columns})."
        ) from None
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale={scale!r} must be a finite number. Try {head_dim**-0.5}.")
    if mask.size and mask.min() < 0:
        raise ValueError(
            f"mask holds the multiplicity {mask.min()}; multiplicities must be at least 0."
        )
    return q, k, v, mask, head_dim**-0.5 if scale is None else scale
