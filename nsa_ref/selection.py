"""Which blocks the fine branch reads: candidates, importance, top-n (I1 to I6).

Paper's letters: l = compress_block_size, d = compress_block_sliding_stride,
l' = selection_block_size, n = num_selected_blocks. Selection block b holds the tokens
[b l', (b + 1) l'); there are ceil(kv_len / l') of them, and the last may be short. The own block
of the query at p is p // l'. A stride is d tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.attention import rows_that_see_the_same
from nsa_ref.checks import as_float64, check_at_least, check_multiple, check_shape
from nsa_ref.compress import compress_windows, num_compress_blocks
from nsa_ref.masks import compress_mask
from nsa_ref.semantics import PAPER, Semantics, check_semantics
from nsa_ref.sizes import Sizes, check_sizes, num_selection_blocks

# Upstream masks logits with a tenth of the lowest finite number, and puts this logit before the
# means, so that a softmax over nothing visible goes to the pad (I3).
INVISIBLE_LOGIT = -np.finfo(np.float64).max / 10
PAD_LOGIT = -1e3


# --- candidates -----------------------------------------------------------------------------------


def selection_candidates(
    q_len: int, kv_len: int, sizes: Sizes, semantics: Semantics = PAPER
) -> np.ndarray:
    """Blocks that each query may choose from.

    ::

        causal            block b is a candidate iff b l' <= p (I4)
        non-causal        every block
        own_block_extra   causal: not the own block (I4)
        logit_mean        not a trailing block that lacks one of its l'/d compressed blocks; and,
                          if l' != d, not the own block, causal or not (I3)

    Shapes
    ------
    returns : (q_len, ceil(kv_len / l')) bool

    Raises
    ------
    ValueError : a length below 0
    TypeError : a length that is no integer, sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    I3, I4; arXiv 2502.11089, eq. 11
    """
    check_at_least("q_len", q_len, 0)
    num_blocks = num_selection_blocks(kv_len, sizes)
    check_semantics(semantics)
    own_excluded = semantics.causal and semantics.own_block_extra
    complete = num_blocks
    if semantics.importance == "logit_mean":
        strides = sizes.strides_per_selection_block
        complete = num_compress_blocks(kv_len, sizes, semantics) // strides
        own_excluded = own_excluded or strides != 1

    block = np.arange(num_blocks)
    p = np.arange(q_len)[:, None] + kv_len - q_len
    begun = (block * sizes.selection_block_size <= p) | (not semantics.causal)
    own = block == p // sizes.selection_block_size
    candidates: np.ndarray = (block < complete) & begun & ~(own & own_excluded)
    return candidates


def forced_blocks(
    q_len: int, kv_len: int, sizes: Sizes, semantics: Semantics = PAPER
) -> np.ndarray:
    """Candidates that compete at `forced_score` a query head, in place of their own score.

    ::

        initial   blocks 0 .. num_initial_blocks - 1
        local     the own block, and the num_local_blocks - 1 before it
        own_block_extra   none are forced, whatever the two numbers (I4)

    Shapes
    ------
    returns : (q_len, ceil(kv_len / l')) bool

    Raises
    ------
    ValueError, TypeError : as `selection_candidates`

    Source
    ------
    I4; arXiv 2502.11089, section 4.1 ("fixed activating the 1 initial block and 2 local blocks")
    """
    candidates = selection_candidates(q_len, kv_len, sizes, semantics)
    if semantics.own_block_extra:
        return np.zeros_like(candidates)
    block = np.arange(candidates.shape[1])
    p = np.arange(q_len)[:, None] + kv_len - q_len
    own = p // sizes.selection_block_size
    initial = block < sizes.num_initial_blocks
    local = (own - sizes.num_local_blocks < block) & (block <= own)
    return candidates & (initial | local)


# --- importance -----------------------------------------------------------------------------------


def shared_strides(kv_len: int, sizes: Sizes, semantics: Semantics = PAPER) -> np.ndarray:
    """How many strides of d tokens each compressed window shares with each selection block.

    ::

        count[i, b] = |window i  intersected with  [b l', (b + 1) l')| / d

    Eq. 9 prints p_slc[j] = sum_{m < l'/d} sum_{n < l/d} p_cmp[l'/d j - m - n]; with j and p_cmp
    counted from 1 it sums by overlap in strides. From 0 the same sum is over l'/d j + m - n for
    windows that start at i d, and over l'/d j + m + n for windows that end at (i + 1) d. The paper
    wants l <= l'; a longer window shares strides with more blocks, and the count is the same.

    Shapes
    ------
    returns : (compressed blocks, ceil(kv_len / l')) int64

    Raises
    ------
    ValueError : d that does not divide l, kv_len < 0
    TypeError : kv_len that is no integer, sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    I2; arXiv 2502.11089, eq. 9
    """
    windows = compress_windows(kv_len, sizes, semantics)
    length, d = sizes.compress_block_size, sizes.compress_block_sliding_stride
    why = "eq. 9 counts the overlap of windows and blocks in whole strides"
    check_multiple("compress_block_size", length, "compress_block_sliding_stride", d, why=why)
    size, num_blocks = sizes.selection_block_size, num_selection_blocks(kv_len, sizes)
    first = size * np.arange(num_blocks)
    start, stop = np.array(windows, dtype=np.int64).reshape(-1, 2).T[:, :, None]
    tokens = np.minimum(stop, first + size) - np.maximum(start, first)
    return np.maximum(tokens, 0) // d  # all four ends are multiples of d


def compress_probabilities(
    q: np.ndarray,
    k_cmp: np.ndarray,
    mem_k: np.ndarray,
    *,
    kv_len: int,
    sizes: Sizes,
    semantics: Semantics = PAPER,
) -> np.ndarray:
    """p_cmp: the softmax of the compress branch over its visible columns, without the memory.

    ::

        p_cmp = softmax(scale q.k)  over memory and visible compressed blocks; 0 where invisible

    Memory takes part in the softmax and is no candidate, so a row sums to less than 1 with it,
    and to 0 where no compressed block is visible. Eq. 8 prints no scale: it is that of eq. 2, for
    the compress branch attends with these very probabilities.

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim)      k_cmp : (batch, kv_heads, blocks, head_dim)
    mem_k : (batch, kv_heads, num_mem_kv, head_dim)
    returns : (batch, q_heads, q_len, blocks) float64, or complex128

    Raises
    ------
    ValueError : kv_len < 0, shapes that do not fit the sizes; blocks is what kv_len gives by C1
    TypeError : arrays that hold no numbers, sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    I1; arXiv 2502.11089, eq. 8
    """
    q, k_cmp, mem_k = selection_arguments(q, k_cmp, mem_k, kv_len, sizes, semantics)
    batch, q_heads, q_len, _ = q.shape
    group, num_mem_kv, blocks = sizes.group_size, sizes.num_mem_kv, k_cmp.shape[2]
    columns = np.concatenate([mem_k, k_cmp], axis=2)
    mask = compress_mask(q_len, kv_len, sizes, semantics)
    mask = np.broadcast_to(mask, (batch, q_heads, *mask.shape))

    p_cmp = np.zeros((batch, q_heads, q_len, blocks), dtype=np.result_type(q, columns))
    for g, rows, multiplicity in rows_that_see_the_same(mask, group):
        b, (visible,) = rows[0], multiplicity.nonzero()
        if visible.size == 0:
            continue
        s = sizes.scale * (q[rows] @ columns[b, g, visible].T)
        weight = np.exp(s - s.real.max(axis=-1, keepdims=True))
        probability = weight / weight.sum(axis=-1, keepdims=True)
        blocks_seen = visible[num_mem_kv:] - num_mem_kv
        p_cmp[rows][..., blocks_seen] = probability[..., num_mem_kv:]
    return p_cmp


def importance(
    q: np.ndarray,
    k_cmp: np.ndarray,
    mem_k: np.ndarray,
    *,
    kv_len: int,
    sizes: Sizes,
    semantics: Semantics = PAPER,
) -> np.ndarray:
    """The score of every selection block, for every query.

    ::

        "overlap"      score[b] = sum over the group's heads, sum_i p_cmp[i] count[i, b]
                       with p_cmp of `compress_probabilities`, count of `shared_strides`
        "logit_mean"   score[b] = `selection_probability` of the means of scale q.k_cmp[i] over the
                       group's heads and the l'/d compressed blocks i = b l'/d .. (b + 1) l'/d - 1;
                       an invisible one counts as -(largest float64) / 10, and a block that is no
                       candidate has the mean -inf

    Without share_selection every query head is a group of its own.

    Shapes
    ------
    q, k_cmp, mem_k : as in `compress_probabilities`
    returns : (batch, heads, q_len, ceil(kv_len / l')) float64; heads = kv_heads, or q_heads
        without share_selection

    Raises
    ------
    ValueError, TypeError : as `compress_probabilities`; for "overlap" d that does not divide l

    Source
    ------
    I1, I2, I3; arXiv 2502.11089, eq. 8, 9 and 10
    """
    q, k_cmp, mem_k = selection_arguments(q, k_cmp, mem_k, kv_len, sizes, semantics)
    batch, q_heads, q_len, _ = q.shape
    heads = sizes.kv_heads if semantics.share_selection else q_heads
    group = q_heads // heads
    if semantics.importance == "logit_mean":
        return selection_probability(logit_means(q, k_cmp, kv_len, sizes, semantics))

    score = np.zeros(
        (batch, heads, q_len, num_selection_blocks(kv_len, sizes)),
        dtype=np.result_type(q, k_cmp, mem_k),
    )
    count = shared_strides(kv_len, sizes, semantics)
    p_cmp = compress_probabilities(q, k_cmp, mem_k, kv_len=kv_len, sizes=sizes, semantics=semantics)
    # each head by itself first, so that blocks that are alike have equal scores
    of_heads = np.zeros((batch, q_heads, *score.shape[2:]), dtype=score.dtype)
    for i in range(len(count)):
        of_heads += p_cmp[..., i, None] * count[i]
    for h in range(q_heads):
        score[:, h // group] += of_heads[:, h]  # eq. 10
    return score


def logit_means(
    q: np.ndarray, k_cmp: np.ndarray, kv_len: int, sizes: Sizes, semantics: Semantics
) -> np.ndarray:
    """I3: the means of scaled logits, (batch, heads, q_len, blocks); -inf for no candidate."""
    heads = sizes.kv_heads if semantics.share_selection else sizes.q_heads
    group, strides = sizes.q_heads // heads, sizes.strides_per_selection_block
    batch, _, q_len, _ = q.shape
    num_blocks = num_selection_blocks(kv_len, sizes)
    means = np.full((batch, heads, q_len, num_blocks), -math.inf, np.result_type(q, k_cmp))
    candidates = selection_candidates(q_len, kv_len, sizes, semantics)
    visible = compress_mask(q_len, kv_len, sizes, semantics)[:, sizes.num_mem_kv :]
    invisible = visible == 0
    for b, g in np.ndindex(batch, heads):
        of_heads = range(g * group, (g + 1) * group)
        logits = [sizes.scale * (q[b, h] @ k_cmp[b, h // sizes.group_size].T) for h in of_heads]
        seen = np.where(visible, logits, 0.0)
        for block in np.flatnonzero(candidates.any(axis=0)):
            blocks = slice(block * strides, (block + 1) * strides)
            # The invisible ones are added as a share: their plain sum would overflow.
            share = invisible[:, blocks].sum(axis=1) / strides * INVISIBLE_LOGIT
            mean = seen[:, :, blocks].sum(axis=(0, 2)) / (group * strides) + share
            means[b, g, candidates[:, block], block] = mean[candidates[:, block]]
    return means


def selection_probability(means: np.ndarray) -> np.ndarray:
    """The softmax over blocks of the means of "logit_mean", with a pad logit of -1e3.

    ::

        probability[b] = exp(mean[b]) / (exp(-1e3) + sum_b exp(mean[b]));   0 where mean is -inf

    Shapes
    ------
    means : (..., blocks)
    returns : the same shape, float64

    Raises
    ------
    TypeError : means that hold no numbers

    Source
    ------
    I3; upstream's importance scores just before its top-k
    """
    means = as_float64("means", means)
    probability = np.zeros(means.shape, dtype=means.dtype)
    for row in np.ndindex(means.shape[:-1]):
        m = max(means[row].real.max(initial=-math.inf), PAD_LOGIT)
        weight = np.exp(means[row] - m)
        probability[row] = weight / (np.exp(PAD_LOGIT - m) + weight.sum())
    return probability


class Scored(NamedTuple):
    """What top-n chooses from.

    scores : (batch, heads, q_len, blocks), as `importance` returns them
    candidates, forced : (q_len, blocks) bool
    """

    scores: np.ndarray
    candidates: np.ndarray
    forced: np.ndarray


def scored(
    q: np.ndarray,
    k_cmp: np.ndarray,
    mem_k: np.ndarray,
    *,
    kv_len: int,
    sizes: Sizes,
    semantics: Semantics = PAPER,
) -> Scored:
    """The blocks' scores, with those that are candidates and those that are forced.

    Shapes
    ------
    q, k_cmp, mem_k : as in `compress_probabilities`

    Raises
    ------
    ValueError, TypeError : as `importance`

    Source
    ------
    I1 to I4
    """
    scores = importance(q, k_cmp, mem_k, kv_len=kv_len, sizes=sizes, semantics=semantics)
    of_blocks = scores.shape[2], kv_len, sizes, semantics
    return Scored(scores, selection_candidates(*of_blocks), forced_blocks(*of_blocks))


# --- top-n ----------------------------------------------------------------------------------------


def select(
    q: np.ndarray,
    k_cmp: np.ndarray,
    mem_k: np.ndarray,
    *,
    kv_len: int,
    sizes: Sizes,
    semantics: Semantics = PAPER,
) -> np.ndarray:
    """The blocks that each query reads in the fine branch, best first.

    `scored` scores the blocks, and `top_blocks` takes n of the candidates.

    Shapes
    ------
    q, k_cmp, mem_k : as in `compress_probabilities`
    returns : (batch, heads, q_len, n) int64, -1 in unused slots, which stand last; heads =
        kv_heads, or q_heads without share_selection

    Raises
    ------
    ValueError, TypeError : as `importance`

    Source
    ------
    I1 to I6; arXiv 2502.11089, eq. 8 to 11
    """
    found = scored(q, k_cmp, mem_k, kv_len=kv_len, sizes=sizes, semantics=semantics)
    return top_blocks(found, sizes, semantics)


def top_blocks(blocks: Scored, sizes: Sizes, semantics: Semantics = PAPER) -> np.ndarray:
    """The n candidates of the highest score, best first; of equal ones the lower index.

    ::

        forced blocks score `forced_total`; of several at inf the lowest are kept (I4)
        fewer candidates than n: all of them, and -1 in the slots that are left (I6)
        score_floor: a chosen block of lower or equal score becomes -1 (I4)

    Shapes
    ------
    blocks : what `scored` returns
    returns : (batch, heads, q_len, n) int64

    Raises
    ------
    ValueError : shapes that do not fit, a candidate whose score is NaN
    TypeError : arrays that hold no numbers, sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    I4, I5, I6; arXiv 2502.11089, eq. 11
    """
    check_sizes(sizes)
    blocks = check_scored(blocks, semantics)
    ranked = ranked_scores(blocks, sizes, semantics)
    n = sizes.num_selected_blocks
    chosen = np.full((*ranked.shape[:3], n), -1)
    for b, g, t in np.ndindex(ranked.shape[:3]):
        candidates = np.flatnonzero(blocks.candidates[t])
        # a stable sort leaves equal ones in the order of their indices
        best = candidates[np.argsort(-ranked[b, g, t, candidates], kind="stable")][:n]
        if semantics.score_floor is not None:
            best = best[ranked[b, g, t, best] > semantics.score_floor]
        chosen[b, g, t, : len(best)] = best
    return chosen


def forced_total(sizes: Sizes, semantics: Semantics) -> float:
    """The score of a forced block: `forced_score` for every query head that shares the choice.

    They are added up where scores are: "logit_mean" has one probability for the group (I3, I4).
    """
    summed = semantics.importance == "overlap" and semantics.share_selection
    return semantics.forced_score * (sizes.group_size if summed else 1)


def ranked_scores(blocks: Scored, sizes: Sizes, semantics: Semantics) -> np.ndarray:
    """What top-n ranks: `forced_total` in place of the own score of forced blocks (I4)."""
    ranked: np.ndarray = np.where(blocks.forced, forced_total(sizes, semantics), blocks.scores)
    return ranked


# --- checks ---------------------------------------------------------------------------------------


def selection_arguments(
    q: ArrayLike,
    k_cmp: ArrayLike,
    mem_k: ArrayLike,
    kv_len: int,
    sizes: Sizes,
    semantics: Semantics,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays as float64, if their shapes are those of the sizes."""
    blocks = num_compress_blocks(kv_len, sizes, semantics)
    q = as_float64("q", q, ("batch", sizes.q_heads, "q_len", sizes.head_dim))
    of_keys = q.shape[0], sizes.kv_heads
    k_cmp = as_float64("k_cmp", k_cmp, (*of_keys, blocks, sizes.head_dim))
    return q, k_cmp, as_float64("mem_k", mem_k, (*of_keys, sizes.num_mem_kv, sizes.head_dim))


def check_scored(blocks: Scored, semantics: Semantics) -> Scored:
    """The scores as float64, candidates and forced as bool, of fitting shapes; else raise."""
    check_semantics(semantics)
    scores = as_float64("scores", blocks.scores, ("batch", "heads", "q_len", "blocks")).real
    candidates, forced = np.asarray(blocks.candidates), np.asarray(blocks.forced)
    for name, array in (("candidates", candidates), ("forced", forced)):
        if array.dtype != bool:
            raise TypeError(f"{name} has dtype {array.dtype}; it must be bool.")
        check_shape(name, array.shape, scores.shape[2:])
    if np.isnan(scores[np.broadcast_to(candidates, scores.shape)]).any():
        raise ValueError("scores holds NaN at a candidate; scores must be numbers to be ranked.")
    return Scored(scores, candidates, forced & candidates)
