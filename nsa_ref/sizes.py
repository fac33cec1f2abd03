"""The geometry of Native Sparse Attention: every size that is neither a length nor a convention.

Paper's letters: l = compress_block_size, d = compress_block_sliding_stride,
l' = selection_block_size, n = num_selected_blocks, w = sliding_window_size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nsa_ref.checks import check_at_least, check_kind, check_multiple, check_one_of

COMPRESS_MAPS = ("mean", "linear", "linear_per_head", "mlp")

#: These may be 0; every other size is at least 1.
MAY_BE_ZERO = (
    "num_selected_blocks",
    "num_initial_blocks",
    "num_local_blocks",
    "sliding_window_size",
    "num_mem_kv",
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Block sizes, stride and window in tokens; the rest in what the name says.

    Masks, compression, selection and layer read what they need of it, so that no size is passed or
    checked anywhere else.

    Raises
    ------
    ValueError, TypeError : a size that no layer could have, named with what would be right
    """

    q_heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    value_dim: int = 1
    compress_block_size: int = 1
    compress_block_sliding_stride: int = 1
    compress_map: str = "mean"
    compress_positions: bool = False
    selection_block_size: int = 1
    num_selected_blocks: int = 1
    num_initial_blocks: int = 0
    num_local_blocks: int = 0
    sliding_window_size: int = 0
    num_mem_kv: int = 0
    model_dim: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Sizes):
            if field.type == "int":  # a text, as are all annotations of this file
                least = 0 if field.name in MAY_BE_ZERO else 1
                check_at_least(field.name, getattr(self, field.name), least)
        why = "every kv head serves a group of equally many query heads"
        check_multiple("q_heads", self.q_heads, "kv_heads", self.kv_heads, why=why)
        size, d = self.selection_block_size, self.compress_block_sliding_stride
        why = "eq. 9 counts the overlap of blocks in whole strides"
        check_multiple("selection_block_size", size, "compress_block_sliding_stride", d, why=why)
        check_one_of("compress_map", self.compress_map, COMPRESS_MAPS)
        check_kind("compress_positions", self.compress_positions, bool, "True or False")

    @property
    def group_size(self) -> int:
        """G, the query heads that share a kv head."""
        return self.q_heads // self.kv_heads

    @property
    def scale(self) -> float:
        """What multiplies q.k (A1)."""
        return float(self.head_dim**-0.5)

    @property
    def strides_per_selection_block(self) -> int:
        """l' / d: how many strides, and so compressed blocks, begin in a selection block."""
        return self.selection_block_size // self.compress_block_sliding_stride


def num_selection_blocks(kv_len: int, sizes: Sizes) -> int:
    """Blocks of l' tokens in kv_len tokens, the last of which may be short: ceil(kv_len / l').

    Raises
    ------
    ValueError : kv_len < 0
    TypeError : kv_len that is no integer, sizes that are no Sizes

    Source
    ------
    F2; arXiv 2502.11089, section 3.3.2
    """
    check_at_least("kv_len", kv_len, 0)
    check_sizes(sizes)
    return -(-kv_len // sizes.selection_block_size)


def check_sizes(sizes: object) -> None:
    """Raise TypeError unless sizes is a Sizes."""
    wanted = "a nsa_ref.Sizes, such as nsa_ref.Sizes(q_heads=4)"
    check_kind("sizes", sizes, Sizes, wanted)
