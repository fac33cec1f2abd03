"""Which keys a query reads in each branch: clauses W (sliding), C (compress), F (fine).

A mask is an int64 array of multiplicities: 0 is invisible, 1 visible, 2 counted twice.

Paper's letters: w = sliding_window_size, l = compress_block_size,
d = compress_block_sliding_stride, l' = selection_block_size, n = the last axis of block_indices.
Row t is the query at the absolute position p = t + kv_len - q_len: with a KV cache, row 0 is not
position 0. With kv_len < q_len the first rows have p < 0: they stand before every token and see
memory at most, causal or not.
"""

from __future__ import annotations

import numpy as np

from nsa_ref.checks import check_at_least, check_multiple
from nsa_ref.compress import compress_windows
from nsa_ref.semantics import PAPER, Semantics, check_semantics
from nsa_ref.sizes import Sizes, check_sizes, num_selection_blocks


def sliding_mask(q_len: int, kv_len: int, sizes: Sizes, semantics: Semantics = PAPER) -> np.ndarray:
    """Keys that each query reads in the sliding branch: its own and the w before it.

    ::

        causal      (W1, W3)   mask[t, j] = 1  iff  0 <= p - j <= w    that is w + 1 keys
        non-causal  (W2)       mask[t, j] = 1  iff  |p - j| <= w and p >= 0
        not window_closed      < w instead of <= w: w keys, and none for w = 0

    Shapes
    ------
    returns : (q_len, kv_len) int64

    Raises
    ------
    ValueError : a length below 0
    TypeError : a length that is no integer, sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    W1, W2, W3; arXiv 2502.11089, section 3.3.3 (no equation number), k_{t-w:t}
    """
    check_at_least("q_len", q_len, 0)
    check_at_least("kv_len", kv_len, 0)
    check_sizes(sizes)
    check_semantics(semantics)
    w = sizes.sliding_window_size
    reach = w if semantics.window_closed else w - 1
    p, j = np.arange(kv_len - q_len, kv_len)[:, None], np.arange(kv_len)
    seen = (j <= p) & (p - j <= reach) if semantics.causal else abs(p - j) <= reach
    return (seen & (p >= 0)).astype(np.int64)


def compress_mask(
    q_len: int, kv_len: int, sizes: Sizes, semantics: Semantics = PAPER
) -> np.ndarray:
    """Memory columns and compressed blocks that each query reads in the compress branch.

    ::

        column c < num_mem_kv          memory, always visible (C3)
        column c = num_mem_kv + i      block i of C1, visible iff its last token <= p (C2),
                                       or < p (compress_strict); non-causal: always (C3)

    Shapes
    ------
    returns : (q_len, num_mem_kv + number of blocks) int64

    Raises
    ------
    ValueError, TypeError : as `sliding_mask`

    Source
    ------
    C1, C2, C3; arXiv 2502.11089, eq. 7
    """
    check_at_least("q_len", q_len, 0)
    windows = compress_windows(kv_len, sizes, semantics)
    num_mem_kv = sizes.num_mem_kv
    p = np.arange(kv_len - q_len, kv_len)[:, None]
    last = np.array([stop - 1 for _, stop in windows])
    mask = np.ones((q_len, num_mem_kv + len(windows)), dtype=np.int64)
    if semantics.causal:
        mask[:, num_mem_kv:] = last < p if semantics.compress_strict else last <= p
    else:
        mask[:, num_mem_kv:] = p >= 0
    return mask


def fine_mask(
    q_len: int, kv_len: int, block_indices: np.ndarray, sizes: Sizes, semantics: Semantics = PAPER
) -> np.ndarray:
    """Keys that each query reads in the fine branch: the tokens of its selected blocks.

    ::

        causal      (F1)   mult_j = [j // l' is selected] * [j <= p]
        non-causal  (F4)   mult_j = [j // l' is selected]
        block named twice  counted once ("set") or twice ("multiset") (F3)
        own_block_extra    causal: block p // l' is added to the selected ones (I4); in a
                           multiset an own block that was also selected then counts twice

    The last block may be short and holds its real tokens only (F2). Indices that are negative
    or at least the number of blocks, ceil(kv_len / l'), are ignored, in any slot (I6).

    Shapes
    ------
    block_indices : (batch, heads, q_len, n) integers; query head h reads heads axis
        h // (q_heads // heads): heads = kv_heads, or q_heads where selection is not shared
    returns : (batch, q_heads, q_len, kv_len) int64

    Raises
    ------
    ValueError, TypeError : as `sliding_mask`; block_indices of a wrong shape or that are no
        integers, q_heads no multiple of heads

    Source
    ------
    F1, F2, F3, F4, I6; arXiv 2502.11089, eq. 12, which does not cut the own block at p
    """
    check_at_least("q_len", q_len, 0)
    num_blocks = num_selection_blocks(kv_len, sizes)
    check_semantics(semantics)
    block_indices = np.asarray(block_indices)
    check_block_indices(block_indices, q_len)
    batch, heads, _, _ = block_indices.shape
    check_at_least("heads (axis 1 of block_indices)", heads, 1)
    why = "query heads share a choice of blocks in equal groups"
    check_multiple("q_heads", sizes.q_heads, "heads (axis 1 of block_indices)", heads, why=why)
    group = sizes.q_heads // heads
    size = sizes.selection_block_size

    times = np.zeros((batch, heads, q_len, num_blocks), dtype=np.int64)  # a block is named
    for slot in np.moveaxis(block_indices, -1, 0):
        times += slot[..., None] == np.arange(num_blocks)
    p, j = np.arange(kv_len - q_len, kv_len)[:, None], np.arange(kv_len)
    if semantics.causal and semantics.own_block_extra:
        times += p // size == np.arange(num_blocks)
    if semantics.duplicates == "set":
        times = np.minimum(times, 1)
    of_tokens = times.repeat(group, axis=1)[..., j // size]
    seen = (p >= 0) & (j <= p) if semantics.causal else p >= 0
    return np.where(seen, of_tokens, 0)


def check_block_indices(block_indices: np.ndarray, q_len: int) -> None:
    """Raise unless block_indices are integers of the shape (batch, heads, q_len, n)."""
    if block_indices.dtype.kind not in "iu":
        raise TypeError(
            f"block_indices has dtype {block_indices.dtype}; it must hold integers: block "
            "numbers, and -1 in unused slots."
        )
    if block_indices.ndim != 4 or block_indices.shape[2] != q_len:
        raise ValueError(
            f"block_indices has shape {block_indices.shape}; it must be "
            f"(batch, heads, q_len={q_len}, n): n independent block numbers per query."
        )
