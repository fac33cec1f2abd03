"""The predicates: which cell (row, column) is visible, as FlexAttention asks for it.

Eager FlexAttention evaluates nothing else, and ignores the block lists; compiled kernels ask it
inside partial blocks only. All but `named_mask_mod` are complete in themselves.

Scalars are captured as tensors without axes: a Python number would be compiled into the kernel, and
every new window or length would be another graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: How far ahead of its position p a query sees where nothing is causal: past any end.
PAST_THE_END = 2**30

#: Blocks to a word of the fine branch's membership table.
WORD_BITS = 32


def scalar(value: int, device: torch.device) -> Tensor:
    """An int32 without axes."""
    return torch.full((), value, dtype=torch.int32, device=device)


def sliding_mask_mod(
    name: str, *, offset: int, newest: int, oldest: int, kv_len: int, device: torch.device
) -> MaskMod:
    """W1, W2: visible iff newest <= p - j <= oldest, where p = t + offset is not negative."""
    offset_, newest_, oldest_, kv_len_ = (
        scalar(value, device) for value in (offset, newest, oldest, kv_len)
    )

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        position = row + offset_
        distance = position - column
        real = (position >= 0) & (column < kv_len_)
        return real & (distance >= newest_) & (distance <= oldest_)

    mask_mod.__name__ = name
    return mask_mod


def compress_mask_mod(
    name: str,
    *,
    offset: int,
    ahead: int,
    stride: int,
    first_end: int,
    memory: int,
    columns: int,
    device: torch.device,
) -> MaskMod:
    """C2, C3: memory, and block i iff i d + first_end <= p + ahead, where p = t + offset >= 0.

    first_end : the last token of block 0; one more where a block is visible a step later
    """
    offset_, ahead_, stride_, first_end_, memory_, columns_ = (
        scalar(value, device) for value in (offset, ahead, stride, first_end, memory, columns)
    )

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        position = row + offset_
        ended = (column - memory_) * stride_ + first_end_ <= position + ahead_
        real = (position >= 0) & (column < columns_)
        return (column < memory_) | (ended & real)

    mask_mod.__name__ = name
    return mask_mod


def fine_mask_mod(
    name: str,
    *,
    table: Tensor,
    shape: tuple[int, int, int],
    offset: int,
    ahead: int,
    block_size: int,
    rows_per_token: int,
    heads_per_choice: int,
    kv_len: int,
) -> MaskMod:
    """F1: visible iff the column's block is one of the token's and j <= p + ahead, p >= 0.

    The table knows every block, so that it grows with tokens x blocks.

    table : int32 (entries,), words of 32 blocks; bit b of word w stands for block 32 w + b
    shape : (heads that choose, tokens, words), by which the table is read: one flat table of a
        size that hardly varies, because Inductor's C++ template confuses the symbols of captured
        sizes with its own
    rows_per_token : rows of the mask that belong to one token, one after the other
    heads_per_choice : heads of the mask that share a choice of blocks
    """
    device = table.device
    heads_, tokens_, words_ = (scalar(value, device) for value in shape)
    offset_, ahead_, block_size_, rows_per_token_, heads_per_choice_, kv_len_ = (
        scalar(value, device)
        for value in (offset, ahead, block_size, rows_per_token, heads_per_choice, kv_len)
    )

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        token = row // rows_per_token_
        block = column // block_size_
        choice = (batch * heads_ + head // heads_per_choice_) * tokens_ + token
        # what table[...] becomes in the end, without the custom Function that carries gradients to
        # captured tensors and costs an eager call 5 ms
        word = torch.ops.aten.index(table, [choice * words_ + block // WORD_BITS])
        chosen = ((word >> (block % WORD_BITS)) & 1) == 1
        position = token + offset_
        real = (position >= 0) & (column < kv_len_)
        return chosen & (column <= position + ahead_) & real

    mask_mod.__name__ = name
    return mask_mod


def named_mask_mod(
    name: str,
    *,
    offset: int,
    ahead: int,
    block_size: int,
    columns_per_block: int,
    rows_per_token: int,
    kv_len: int,
    device: torch.device,
) -> MaskMod:
    """F1 inside the blocks that the lists name: visible iff j <= p + ahead, where p >= 0.

    Which blocks a token has is what its lists say, and no kernel asks about others: nothing here
    grows with tokens x blocks.

    columns_per_block : the block_size columns of a block's tokens, and empty ones behind them
    """
    offset_, ahead_, block_size_, columns_per_block_, rows_per_token_, kv_len_ = (
        scalar(value, device)
        for value in (offset, ahead, block_size, columns_per_block, rows_per_token, kv_len)
    )

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        position = row // rows_per_token_ + offset_
        block, place = column // columns_per_block_, column % columns_per_block_
        key = block * block_size_ + place
        real = (position >= 0) & (place < block_size_) & (key < kv_len_)
        return real & (key <= position + ahead_)

    mask_mod.__name__ = name
    return mask_mod
