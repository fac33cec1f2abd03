"""What the oracle's tests are written with: masks as digits, geometry, a row of blocks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from nsa_ref import Scored, Sizes


def rows(mask: np.ndarray) -> list[str]:
    """A mask as one string of digits for each row, so that a table reads like the mask."""
    return ["".join(str(int(multiplicity)) for multiplicity in row) for row in mask]


def strides(length: int, d: int, num_mem_kv: int = 0, **others: Any) -> Sizes:
    """Compressed blocks of `length` tokens, one every d; l' is one stride, the least it can be."""
    return Sizes(
        compress_block_size=length,
        compress_block_sliding_stride=d,
        selection_block_size=d,
        num_mem_kv=num_mem_kv,
        **others,
    )


def scored_row(
    scores: list[float], candidates: Collection[int] | None = None, forced: Collection[int] = ()
) -> Scored:
    """One row of one head; every block is a candidate unless they are listed."""
    blocks = np.arange(len(scores))
    listed = blocks if candidates is None else list(candidates)
    return Scored(
        np.array(scores)[None, None, None],
        candidates=np.isin(blocks, listed)[None],
        forced=np.isin(blocks, list(forced))[None],
    )
