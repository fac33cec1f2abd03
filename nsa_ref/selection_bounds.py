"""How far a right selection's scores may be from the float64 oracle's."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.bounds import Group, groups, recomputed_p_error
from nsa_ref.checks import check_at_least, check_multiple, check_one_of, check_shape
from nsa_ref.numerics import C_SCALE, NUMERICS, Array, Numerics
from nsa_ref.rounded import Rounded, exact


def score_bounds(
    q: ArrayLike,
    k_cmp: ArrayLike,
    mem_k: ArrayLike,
    *,
    visible: ArrayLike,
    counts: ArrayLike,
    numerics: str,
    scale: float | None = None,
    share_selection: bool = True,
    k_cmp_error: ArrayLike | None = None,
    q_error: ArrayLike | None = None,
) -> Array:
    """Bounds of the scores of the selection blocks by overlap (I1-I3, eq. 9 and 10).

    ::

        B(b) = sum_i count_ib (P_i E'_i + u_p P_i + eta) + acc(terms) sum_i count_ib P_i

    summed over the query heads of the group. A row of the selection is ambiguous iff some gap
    across its cutoff is at most B(b) + B(b').

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim); k_cmp : (batch, kv_heads, blocks, head_dim)
    mem_k : (batch, kv_heads, num_mem_kv, head_dim)
    visible : (q_len, num_mem_kv + blocks), memory columns first
    counts : (blocks, selection_blocks), strides that window i and selection block b share
    k_cmp_error, q_error : like k_cmp and q, what is already wrong with them; enter as
        scale (|q| . |k_cmp_error| + |q_error| . (|k_cmp| + |k_cmp_error|))
    returns : (batch, kv_heads, q_len, selection_blocks); with share_selection=False one score
        per query head, (batch, q_heads, ...)

    Source
    ------
    NUMERICS 2, "Selection"
    """
    check_one_of("numerics", numerics, NUMERICS)
    q, k_cmp, mem_k = (np.asarray(x, dtype=np.float64) for x in (q, k_cmp, mem_k))
    counts = np.asarray(counts, dtype=np.float64)
    check_shape("q", q.shape, ("batch", "q_heads", "q_len", "head_dim"))
    batch, q_heads, q_len, head_dim = q.shape
    check_shape("k_cmp", k_cmp.shape, (batch, "kv_heads", "blocks", head_dim))
    kv_heads, blocks = k_cmp.shape[1:3]
    check_shape("mem_k", mem_k.shape, (batch, kv_heads, "num_mem_kv", head_dim))
    memory = mem_k.shape[2]
    visible = np.asarray(visible)
    check_shape("visible", visible.shape, (q_len, memory + blocks))
    check_shape("counts", counts.shape, (blocks, "selection_blocks"))
    check_multiple("q_heads", q_heads, "kv_heads", kv_heads, why="groups are of equal size")
    group = q_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else float(scale)
    wrong, q_wrong = _score_errors(q, k_cmp, q_error, k_cmp_error)

    k = np.concatenate([mem_k, k_cmp], axis=2)
    k_wrong = np.concatenate([np.zeros_like(mem_k), wrong], axis=2)
    result = np.zeros((batch, kv_heads if share_selection else q_heads, q_len, counts.shape[1]))
    mask = np.broadcast_to(visible, (batch, q_heads, *visible.shape))
    no_v = exact(np.zeros((*k.shape[:3], 0)))
    terms = (counts > 0).sum(axis=0) * (group if share_selection else 1)
    of_kernel, of_oracle = (
        groups(q_, k_, no_v, mask=mask, scale=scale)
        for q_, k_ in ((Rounded(q, q_wrong), Rounded(k, k_wrong)), (exact(q), exact(k)))
    )
    for (b, g, heads, off), (*_, x) in zip(of_kernel, of_oracle):
        bound = _score_bound(off, NUMERICS[numerics], counts, terms, memory)
        bound += _score_bound(x, NUMERICS["fp64"], counts, terms, memory)
        bound = bound.reshape(group, q_len, counts.shape[1])
        if share_selection:
            result[b, g] = bound.sum(axis=0)
        else:
            result[b, heads] = bound
    return result


def _score_errors(
    q: Array, k_cmp: Array, q_error: ArrayLike | None, k_cmp_error: ArrayLike | None
) -> tuple[Array, Array]:
    """Errors of k_cmp and of q, 0 unless given."""
    wrong = np.zeros_like(k_cmp) if k_cmp_error is None else np.asarray(k_cmp_error, np.float64)
    check_shape("k_cmp_error", wrong.shape, k_cmp.shape)
    q_wrong = np.zeros_like(q) if q_error is None else np.asarray(q_error, np.float64)
    check_shape("q_error", q_wrong.shape, q.shape)
    return wrong, q_wrong


def _score_bound(x: Group, row: Numerics, counts: Array, terms: Array, memory: int) -> Array:
    """Bound of every query head's part of the scores: (rows, selection_blocks)."""
    pe = recomputed_p_error(x, row)
    error = pe + row.u_p * (x.p + pe) + row.eta * x.visible  # P, perhaps stored
    error, p = error[:, memory:], x.p[:, memory:]
    size = (p + error) @ counts
    bound = error @ counts + (row.accumulate(terms) + row.u_operands) * size
    if row.rounds_every_operation:
        # overlap sums and the sum over the group are stored
        stores = math.expm1((x.size + 1) * math.log1p(row.u_store))
        bound += stores * (size + bound) + 2.0 * row.eta
    return np.where(x.n > 0, bound, 0.0)


def logit_mean_bounds(
    q: ArrayLike,
    k_cmp: ArrayLike,
    *,
    visible: ArrayLike,
    strides_per_block: int,
    numerics: str,
    scale: float | None = None,
    share_selection: bool = True,
    k_cmp_error: ArrayLike | None = None,
    q_error: ArrayLike | None = None,
) -> Array:
    """Bounds of upstream's scores before their softmax: means of logits (I3, "logit_mean").

    ::

        B(b) = mean(d) + acc(terms) mean |s|

    over the l' / d strides of a selection block and the query heads of the group, where an
    invisible logit is -max / 10 of the dtype, exactly. Beside such a number a visible logit is
    lost in rounding: the bound says so.

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim); k_cmp : (batch, kv_heads, blocks, head_dim)
    visible : (q_len, blocks), no memory columns
    strides_per_block : l' / d; blocks // strides_per_block complete selection blocks
    returns : (batch, kv_heads, q_len, selection_blocks), or per query head

    Source
    ------
    NUMERICS 2, "Selection"
    """
    check_one_of("numerics", numerics, NUMERICS)
    check_at_least("strides_per_block", strides_per_block, 1)
    q, k_cmp = np.asarray(q, dtype=np.float64), np.asarray(k_cmp, dtype=np.float64)
    check_shape("q", q.shape, ("batch", "q_heads", "q_len", "head_dim"))
    batch, q_heads, q_len, head_dim = q.shape
    check_shape("k_cmp", k_cmp.shape, (batch, "kv_heads", "blocks", head_dim))
    kv_heads, blocks = k_cmp.shape[1:3]
    visible = np.asarray(visible) > 0
    check_shape("visible", visible.shape, (q_len, blocks))
    check_multiple("q_heads", q_heads, "kv_heads", kv_heads, why="groups are of equal size")
    group = q_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else float(scale)
    wrong, q_wrong = _score_errors(q, k_cmp, q_error, k_cmp_error)

    heads = np.arange(q_heads) // group
    k, wrong = np.swapaxes(k_cmp[:, heads], 2, 3), np.swapaxes(wrong[:, heads], 2, 3)
    s, a = scale * (q @ k), abs(scale) * (np.abs(q) + q_wrong) @ (np.abs(k) + wrong)
    extra = abs(scale) * (np.abs(q) @ wrong + q_wrong @ (np.abs(k) + wrong))
    extra = np.where(visible, extra, 0.0)
    selection_blocks = blocks // strides_per_block
    terms = strides_per_block * (group if share_selection else 1)

    def mean(per_logit: Array) -> Array:
        kept = per_logit[..., : selection_blocks * strides_per_block]
        kept = kept.reshape(batch, q_heads, q_len, selection_blocks, strides_per_block)
        kept = (kept / terms).sum(axis=-1)
        if not share_selection:
            return kept
        return kept.reshape(batch, kv_heads, group, q_len, selection_blocks).sum(axis=2)

    total = mean(extra)
    for row in (NUMERICS[numerics], NUMERICS["fp64"]):
        far = NUMERICS[numerics].largest / 10.0
        size = np.where(visible, np.abs(s) + extra, far)
        d = (row.accumulate(head_dim) + row.u_operands) * a  # the dot product
        # scaled, stored
        d = d + (C_SCALE * row.u_elementwise + row.u_scores) * (np.abs(s) + extra)
        d = np.where(visible, d, 0.0)
        bound = mean(d)
        if row.rounds_every_operation:  # two means are stored
            bound = bound + math.expm1(2 * math.log1p(row.u_store)) * mean(size + d)
        # adding up, and dividing by the number of terms
        total = total + bound + (row.accumulate(terms) + 2.0 * row.u_elementwise) * mean(size)
    return total
