"""The three calls that the project began with, by upstream's names and signatures.

Each returns a FlexAttention BlockMask in blocks of 128 x 128, for `flex_attention` as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nsa_fast import block_masks
from nsa_fast.block_lists import count_blocks
from nsa_fast.checks import MAX_LENGTH, check_flag, check_indices, check_length, check_size
from nsa_fast.flex import padded
from nsa_fast.windows import Windows
from nsa_ref.semantics import LUCIDRAINS_FLEX, Semantics

BLOCK_SIZE = (128, 128)

#: Entries of a list that `printable` fills up: 1 GiB, 2 million tokens.
MOST_PRINTABLE = 2**28


def create_sliding_mask(
    seq_len: int, window_size: int, causal: bool = True, *, device: torch.device | str | None = None
) -> BlockMask:
    """The own key and the `window_size` before it: window_size + 1 keys (W1, W2).

    ::

        causal       visible iff  0 <= q - kv <= window_size
        non-causal   visible iff  |q - kv| <= window_size

    device : default the current accelerator, else the CPU
    returns : BlockMask (1, 1, seq_len, seq_len)

    Raises
    ------
    ValueError : a size below 0, a seq_len above 2**21
    TypeError : a size that is no integer, causal that is no bool
    """
    seq_len = check_length("seq_len", seq_len)
    window_size = check_length("window_size", window_size)
    blocks = count_blocks(seq_len, BLOCK_SIZE[0])
    if blocks * blocks > MOST_PRINTABLE:
        raise ValueError(
            f"seq_len={seq_len} makes block lists of {blocks} x {blocks} entries; they must be at "
            f"most {MOST_PRINTABLE}, because FlexAttention prints and compiles lists as wide as "
            "there are blocks. Try nsa_fast.sliding_attention, whose lists are as wide as the "
            "window."
        )
    block_mask = block_masks.sliding_block_mask(
        seq_len,
        seq_len,
        window_size,
        flex_semantics(causal),
        device=default_device(device),
        block_size=BLOCK_SIZE,
    )
    return printable(block_mask)


def create_compress_mask(
    seq_len: int,
    kv_seq_len: int,
    compress_block_sliding_stride: int,
    mem_kv_len: int = 0,
    causal: bool = True,
    *,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Memory columns, then compressed tokens, each visible one step after its stride (C2, C3).

    ::

        visible iff  c < mem_kv_len  or  q > d (c - mem_kv_len) + d - 1
        non-causal   everything

    kv_seq_len : compressed tokens, not tokens
    device : default the current accelerator, else the CPU
    returns : BlockMask (1, 1, seq_len, mem_kv_len + kv_seq_len)

    Raises
    ------
    ValueError : a length below 0, a stride below 1
    TypeError : a size that is no integer, causal that is no bool
    """
    seq_len = check_length("seq_len", seq_len)
    kv_seq_len = check_length("kv_seq_len", kv_seq_len)
    mem_kv_len = check_length("mem_kv_len", mem_kv_len)
    stride = check_size("compress_block_sliding_stride", compress_block_sliding_stride, 1)
    # the predicate multiplies in int32
    for name, value in (
        ("mem_kv_len + kv_seq_len", mem_kv_len + kv_seq_len),
        ("kv_seq_len * compress_block_sliding_stride", kv_seq_len * stride),
        ("compress_block_sliding_stride", stride),
    ):
        check_size(name, value, 0, MAX_LENGTH)
    block_mask = block_masks.compress_block_mask(
        seq_len,
        kv_seq_len,
        mem_kv_len,
        # l is not known, and does not matter: windows are aligned at their end
        Windows(stride, stride, flex_semantics(causal)),
        offset=0,
        device=default_device(device),
        block_size=BLOCK_SIZE,
    )
    return printable(block_mask)


def create_fine_mask(
    seq_len: int, fine_block_size: int, causal: bool = True
) -> Callable[..., BlockMask]:
    """A function from selected block indices to the mask of the fine branch (F1 to F4).

    ::

        mask(selected_block_indices, num_grouped_queries=1)
        causal       visible iff  kv <= q  and  the block of kv is selected or is that of q
        non-causal   visible iff  the block of kv is selected

    selected_block_indices : integers (batch, kv_heads, seq_len, n): n independent block indices;
        negative ones and those past the last block are ignored, duplicates count once
    num_grouped_queries : query heads that share one choice
    returns : BlockMask (batch, kv_heads * num_grouped_queries, seq_len, seq_len), on the device
        of the indices

    Raises
    ------
    ValueError : seq_len below 0, fine_block_size or num_grouped_queries below 1, a wrong shape
    TypeError : a size or indices that are no integers, causal that is no bool
    """
    seq_len = check_length("seq_len", seq_len)
    fine_block_size = check_size("fine_block_size", fine_block_size, 1, MAX_LENGTH)
    semantics = flex_semantics(causal)

    def mask(selected_block_indices: Tensor, num_grouped_queries: int = 1) -> BlockMask:
        indices = check_indices(
            "selected_block_indices", selected_block_indices, ("batch", "kv_heads", seq_len, "n")
        )
        group = check_size("num_grouped_queries", num_grouped_queries, 1, MAX_LENGTH)
        return block_masks.tiled_fine_block_mask(
            indices, fine_block_size, semantics, heads_per_choice=group, block_size=BLOCK_SIZE
        )

    return mask


def flex_semantics(causal: Any) -> Semantics:
    """The conventions of all three; TypeError unless causal is a bool."""
    return dataclasses.replace(LUCIDRAINS_FLEX, causal=check_flag("causal", causal))


def default_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the current accelerator, or the CPU."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return torch.device(device)


def printable(block_mask: BlockMask) -> BlockMask:
    """Lists as wide as there are blocks: FlexAttention cannot print narrower ones."""
    columns = count_blocks(block_mask.seq_lengths[1], block_mask.BLOCK_SIZE[1])
    for name in ("kv_indices", "full_kv_indices"):
        setattr(block_mask, name, padded(getattr(block_mask, name), 3, columns))
    return block_mask
