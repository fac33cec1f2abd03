"""How far a right selection's scores may be from the float64 oracle's."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.bounds import AttentionInputs, Groups, recomputed_p_error
from nsa_ref.checks import check_one_of
from nsa_ref.masks import compress_mask
from nsa_ref.numerics import C_DIV, C_EXP, C_SCALE, NUMERICS, Array, Numerics
from nsa_ref.rounded import Rounded, as_rounded, concatenated, exact
from nsa_ref.selection import (
    INVISIBLE_LOGIT,
    PAD_LOGIT,
    forced_blocks,
    forced_total,
    selection_arguments,
    selection_candidates,
    shared_strides,
)
from nsa_ref.semantics import PAPER, Semantics
from nsa_ref.sizes import Sizes, num_selection_blocks


def score_bounds(
    q: ArrayLike | Rounded,
    k_cmp: ArrayLike | Rounded,
    mem_k: ArrayLike,
    *,
    kv_len: int,
    sizes: Sizes,
    semantics: Semantics = PAPER,
    numerics: str,
) -> Array:
    """Deterministic bounds of the scores of `importance`: by overlap, or from means of logits.

    ::

        "overlap"      B(b) = sum_i count_ib E_i + acc(terms) sum_i count_ib (P_i + E_i)
                       with E_i = P_i E'_i + u_p P_i + eta; the group's heads add up
                       of a forced block (u_e + acc(G)) G forced_score
        "logit_mean"   B(b) = P_b expm1(D(b)) + 2 eta,  D(b) = M(b) + what the softmax adds to it
                       with M(b) = mean(d) + acc(terms) mean |s|, the error of the mean
                       over the l' / d strides of a block and the group's heads

    Beside an invisible logit of "logit_mean", -max / 10 of the dtype, a visible one is lost in
    rounding: the bound says so. A kernel may rank the means themselves: their order is the same.
    A row of the selection is ambiguous iff some gap across its cutoff is at most B(b) + B(b').

    Shapes
    ------
    q, k_cmp, mem_k, kv_len : as in `importance`. q and k_cmp are exact, or each a `Rounded`: how
        far the kernel's own may be from it
    numerics : a key of NUMERICS
    returns : as `importance`; 0 for a block that is no candidate of "logit_mean"

    Raises
    ------
    ValueError, TypeError : as `importance`; an unknown row, errors of a wrong shape

    Source
    ------
    I1, I2, I3, eq. 9 and 10; NUMERICS 2, "Selection"
    """
    check_one_of("numerics", numerics, NUMERICS)
    q, k_cmp = as_rounded("q", q), as_rounded("k_cmp", k_cmp)
    of_choice = kv_len, sizes, semantics
    _, _, mem_k = selection_arguments(q.value, k_cmp.value, mem_k, *of_choice)
    forced = forced_blocks(q.value.shape[2], *of_choice)
    if semantics.importance == "logit_mean":
        return _logit_mean_bounds(q, k_cmp, *of_choice, forced, NUMERICS[numerics])
    k = concatenated([exact(mem_k), k_cmp], axis=2)
    bounds = _overlap_bounds(q, k, *of_choice, NUMERICS[numerics])
    if math.isfinite(semantics.forced_score):
        of_forced = (_forced_error(sizes, semantics, NUMERICS[r]) for r in (numerics, "fp64"))
        bounds[..., forced] = forced_total(sizes, semantics) * sum(of_forced)
    return bounds


def _overlap_bounds(
    q: Rounded, k: Rounded, kv_len: int, sizes: Sizes, semantics: Semantics, row: Numerics
) -> Array:
    """k : memory first"""
    counts = shared_strides(kv_len, sizes, semantics).astype(np.float64)
    share, group = semantics.share_selection, sizes.group_size
    terms = (counts > 0).sum(axis=0) * (group if share else 1)
    batch, q_heads, q_len, _ = q.value.shape
    visible = compress_mask(q_len, kv_len, sizes, semantics)
    mask = np.broadcast_to(visible, (batch, q_heads, *visible.shape))
    no_v = exact(np.zeros((*k.value.shape[:3], 0)))
    of_kernel = AttentionInputs(q, k, no_v, mask, sizes.scale)
    off = exactly = Groups(of_kernel)
    if off.perturbed:
        exactly = Groups(of_kernel._replace(q=exact(q.value), k=exact(k.value)))
    bound = _overlap_bound(off, row, counts, terms)
    bound += _overlap_bound(exactly, NUMERICS["fp64"], counts, terms)
    by_head: Array = bound.reshape(batch, sizes.kv_heads, group, q_len, counts.shape[1])
    if share:
        return by_head.sum(axis=2)
    return by_head.reshape(batch, q_heads, q_len, counts.shape[1])


def _overlap_bound(x: Groups, row: Numerics, counts: Array, terms: Array) -> Array:
    """Bound of every query head's part of the scores: (rows, selection blocks)."""
    pe = recomputed_p_error(x, row)
    error = pe + row.u_p * (x.p + pe) + row.eta * x.visible  # P, perhaps stored
    memory = x.p.shape[-1] - len(counts)
    error, p = error[..., memory:], x.p[..., memory:]
    size = (p + error) @ counts
    bound = error @ counts + (row.accumulate(terms) + row.u_operands) * size
    if row.rounds_every_operation:
        # overlap sums and the sum over the group are stored
        stores = math.expm1((x.size + 1) * math.log1p(row.u_store))
        bound += stores * (size + bound) + 2.0 * row.eta
    return np.where(x.n > 0, bound, 0.0)


def _forced_error(sizes: Sizes, semantics: Semantics, row: Numerics) -> float:
    """Relative, of `forced_total`: a number that may be rounded, added up over the group."""
    group = sizes.group_size if semantics.share_selection else 1
    error = float(row.u_elementwise + row.accumulate(group))
    if row.rounds_every_operation:  # the number and every sum are stored
        error += math.expm1(group * math.log1p(row.u_store))
    return error


def _logit_mean_bounds(
    q: Rounded,
    k_cmp: Rounded,
    kv_len: int,
    sizes: Sizes,
    semantics: Semantics,
    forced: Array,
    of_kernel: Numerics,
) -> Array:
    batch, q_heads, q_len, head_dim = q.value.shape
    share, group = semantics.share_selection, sizes.group_size
    strides = sizes.strides_per_selection_block
    visible = compress_mask(q_len, kv_len, sizes, semantics)[:, sizes.num_mem_kv :] > 0
    heads = np.arange(q_heads) // group
    k = k_cmp.map(lambda part: np.swapaxes(part[:, heads], 2, 3))
    s, a = sizes.scale * (q.value @ k.value), sizes.scale * q.size @ k.size
    moved = sizes.scale * (np.abs(q.value) @ k.error + q.error @ k.size)
    moved = np.where(visible, moved, 0.0)
    complete = k.value.shape[3] // strides
    terms = strides * (group if share else 1)

    def mean(per_logit: Array) -> Array:
        kept = per_logit[..., : complete * strides] / terms
        kept = kept.reshape(batch, q_heads, q_len, complete, strides).sum(axis=-1)
        by_group = kept.reshape(batch, sizes.kv_heads, group, q_len, complete)
        return by_group.sum(axis=2) if share else kept

    total = mean(moved)
    for row in (of_kernel, NUMERICS["fp64"]):
        size = np.where(visible, np.abs(s) + moved, of_kernel.largest / 10.0)
        d = (row.accumulate(head_dim) + row.u_operands + row.u_query) * a  # the dot product
        # scaled, stored
        d = d + (C_SCALE * row.u_elementwise + row.u_scores) * (np.abs(s) + moved)
        d = np.where(visible, d, 0.0)
        bound = mean(d)
        if row.rounds_every_operation:  # two means are stored
            bound = bound + math.expm1(2 * math.log1p(row.u_store)) * mean(size + d)
        # adding up, and dividing by the number of terms
        total = total + bound + (row.accumulate(terms) + 2.0 * row.u_elementwise) * mean(size)
    candidates = selection_candidates(q_len, kv_len, sizes, semantics)[:, :complete]
    means = mean(np.where(visible, s, INVISIBLE_LOGIT))
    errors = _softmax_errors(np.where(candidates, means, -math.inf), total, of_kernel)
    result = np.zeros((*total.shape[:3], num_selection_blocks(kv_len, sizes)))
    result[..., :complete] = np.where(candidates, errors.of_each, 0.0)
    if math.isfinite(semantics.forced_score):
        value = semantics.forced_score * (np.exp(errors.of_total) - 1.0)
        result = np.where(forced, value[..., None], result)
    return result


class _SoftmaxErrors(NamedTuple):
    """of_each : of every probability, absolute; of_total : of the log of their sum"""

    of_each: Array
    of_total: Array


@np.errstate(invalid="ignore", over="ignore")
def _softmax_errors(means: Array, errors: Array, of_kernel: Numerics) -> _SoftmaxErrors:
    """Of `selection_probability`, for means that are off: (..., blocks), -inf for no candidate.

    Source: I3; NUMERICS 2, "Selection"
    """
    pad = np.full((*means.shape[:-1], 1), PAD_LOGIT)
    logits = np.concatenate([pad, means], axis=-1)
    peak = logits.max(axis=-1, keepdims=True)
    log_total = peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    off = logits + np.concatenate([0 * pad, errors], axis=-1)
    highest = off.max(axis=-1, keepdims=True)
    # how far the log of the total moves with the means
    moved = highest + np.log(np.exp(off - highest).sum(axis=-1, keepdims=True)) - log_total
    away = np.abs(means - peak) + errors + moved  # the maximum is subtracted
    of_total, log_error, eta = moved, errors + moved, np.zeros(moved.shape)
    for row in (of_kernel, NUMERICS["fp64"]):
        # exp, the division, the total, and P that may be stored
        relative = (C_EXP + C_DIV) * row.u_elementwise + row.accumulate(logits.shape[-1]) + row.u_p
        of_subtraction = row.u_elementwise
        if row.rounds_every_operation:  # the difference, exp and the total are stored
            relative += math.expm1(2 * math.log1p(row.u_store))
            of_subtraction += row.u_store
        log_error = log_error + of_subtraction * away - math.log1p(-relative)
        # who ranks means takes the one that has forced_score
        of_rank = row.u_lse + C_SCALE * row.u_elementwise * (np.abs(peak) + np.abs(log_total))
        of_total = of_total + of_rank - math.log1p(-relative)
        eta = eta + 2.0 * row.eta * np.exp(moved)
    p, log_p = np.exp(means - log_total), means - log_total
    lowest, largest = np.exp(log_p - log_error), np.exp(log_p + log_error)
    return _SoftmaxErrors(np.maximum(p - lowest, largest - p) + eta, of_total[..., 0])
