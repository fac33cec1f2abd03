"""How far a right selection's scores may be from the float64 oracle's."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.bounds import AttentionInputs, Group, groups, recomputed_p_error
from nsa_ref.checks import check_one_of
from nsa_ref.masks import compress_mask
from nsa_ref.numerics import C_SCALE, NUMERICS, Array, Numerics
from nsa_ref.rounded import Rounded, as_rounded, concatenated, exact
from nsa_ref.selection import forced_blocks, forced_total, selection_arguments, shared_strides
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
    """Deterministic bounds of the scores of `importance`: by overlap, or means of logits.

    ::

        "overlap"      B(b) = sum_i count_ib E_i + acc(terms) sum_i count_ib (P_i + E_i)
                       with E_i = P_i E'_i + u_p P_i + eta; the group's heads add up
                       of a forced block (u_e + acc(G)) G forced_score
        "logit_mean"   B(b) = mean(d) + acc(terms) mean |s|
                       over the l' / d strides of a block and the group's heads

    Beside an invisible logit of "logit_mean", -max / 10 of the dtype, a visible one is lost in
    rounding: the bound says so. A row of the selection is ambiguous iff some gap across its cutoff
    is at most B(b) + B(b').

    Shapes
    ------
    q, k_cmp, mem_k, kv_len : as in `importance`. q and k_cmp are exact, or each a `Rounded`: how
        far the kernel's own may be from it
    numerics : a key of NUMERICS
    returns : as `importance`; 0 for an incomplete last block of "logit_mean", which has no score

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
    if semantics.importance == "logit_mean":
        return _logit_mean_bounds(q, k_cmp, *of_choice, NUMERICS[numerics])
    k = concatenated([exact(mem_k), k_cmp], axis=2)
    bounds = _overlap_bounds(q, k, *of_choice, NUMERICS[numerics])
    if math.isfinite(semantics.forced_score):
        forced = forced_blocks(q.value.shape[2], *of_choice)
        of_forced = (_forced_bound(sizes, semantics, NUMERICS[r]) for r in (numerics, "fp64"))
        bounds[..., forced] = sum(of_forced)
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
    of_oracle = of_kernel._replace(q=exact(q.value), k=exact(k.value))
    result = np.zeros((batch, sizes.kv_heads if share else q_heads, q_len, counts.shape[1]))
    for (b, g, heads, off), (*_, x) in zip(groups(of_kernel), groups(of_oracle)):
        bound = _overlap_bound(off, row, counts, terms)
        bound += _overlap_bound(x, NUMERICS["fp64"], counts, terms)
        bound = bound.reshape(group, q_len, counts.shape[1])
        if share:
            result[b, g] = bound.sum(axis=0)
        else:
            result[b, heads] = bound
    return result


def _overlap_bound(x: Group, row: Numerics, counts: Array, terms: Array) -> Array:
    """Bound of every query head's part of the scores: (rows, selection blocks)."""
    pe = recomputed_p_error(x, row)
    error = pe + row.u_p * (x.p + pe) + row.eta * x.visible  # P, perhaps stored
    memory = x.p.shape[1] - len(counts)
    error, p = error[:, memory:], x.p[:, memory:]
    size = (p + error) @ counts
    bound = error @ counts + (row.accumulate(terms) + row.u_operands) * size
    if row.rounds_every_operation:
        # overlap sums and the sum over the group are stored
        stores = math.expm1((x.size + 1) * math.log1p(row.u_store))
        bound += stores * (size + bound) + 2.0 * row.eta
    return np.where(x.n > 0, bound, 0.0)


def _forced_bound(sizes: Sizes, semantics: Semantics, row: Numerics) -> float:
    """Bound of `forced_total`: a number that may be rounded, added up over the group."""
    group = sizes.group_size if semantics.share_selection else 1
    relative = float(row.u_elementwise + row.accumulate(group))
    if row.rounds_every_operation:  # the number and every sum are stored
        relative += math.expm1(group * math.log1p(row.u_store))
    return relative * forced_total(sizes, semantics)


def _logit_mean_bounds(
    q: Rounded, k_cmp: Rounded, kv_len: int, sizes: Sizes, semantics: Semantics, of_kernel: Numerics
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
        d = (row.accumulate(head_dim) + row.u_operands) * a  # the dot product
        # scaled, stored
        d = d + (C_SCALE * row.u_elementwise + row.u_scores) * (np.abs(s) + moved)
        d = np.where(visible, d, 0.0)
        bound = mean(d)
        if row.rounds_every_operation:  # two means are stored
            bound = bound + math.expm1(2 * math.log1p(row.u_store)) * mean(size + d)
        # adding up, and dividing by the number of terms
        total = total + bound + (row.accumulate(terms) + 2.0 * row.u_elementwise) * mean(size)
    result = np.zeros((*total.shape[:3], num_selection_blocks(kv_len, sizes)))
    result[..., :complete] = total
    return result
