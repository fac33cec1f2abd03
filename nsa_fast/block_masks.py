"""The mask of each branch: its predicate, its block lists, and both together as a BlockMask.

A predicate (FlexAttention's mask_mod) says whether a cell (row, column) is visible. Kernels walk
the lists, and ask it inside partial blocks only. All but `named_mask_mod` are complete in
themselves, as FlexAttention's eager operator needs them, which asks everywhere and ignores lists.

The attention functions and the adapter look the builders up here: what is judged is what is used,
and a deliberately broken build is planted in one place. q_lists=False leaves out the transposed
lists, which only a backward walks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nsa_fast import block_lists
from nsa_fast.block_lists import WORD_BITS, BlockLists, Chosen, Crowded, MaskMod, count_blocks
from nsa_fast.flex import is_triton
from nsa_fast.layouts import FineLayout
from nsa_fast.windows import Windows
from nsa_ref.semantics import Semantics

#: How far ahead of its position p a query sees where nothing is causal: past any end.
PAST_THE_END = 2**30

#: Masks of sizes alone that are kept: those of two branches, for a few lengths.
KEPT = 16


def of_sizes(build: Callable[..., BlockMask], *sizes: Any, **named: Any) -> BlockMask:
    """The mask that a builder makes of sizes alone; where kernels are Triton's, made once.

    So a step with the sizes of the one before launches nothing for it. Masks are kept apart by
    what reads them: a stream of the GPU, because another one may still be writing them, and
    inference mode, whose tensors no backward can save. A CUDA graph that is being captured makes
    its own, in its own memory.
    """
    device = named["device"]
    if not is_triton(device):
        return build(*sizes, **named)
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return build(*sizes, **named)
        stream = torch.cuda.current_stream(device).cuda_stream
    inference = torch.is_inference_mode_enabled()
    return made_once(build, sizes, tuple(named.items()), stream, inference)


@functools.lru_cache(maxsize=KEPT)
def made_once(
    build: Callable[..., BlockMask],
    sizes: tuple[Any, ...],
    named: tuple[tuple[str, Any], ...],
    stream: int,
    inference: bool,
) -> BlockMask:
    """What `of_sizes` keeps."""
    return build(*sizes, **dict(named))


def token_block_size(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block in the sliding and compress branches.

    128 is what FlexAttention's Triton tiles divide. A CPU has no such need, and small blocks leave
    more of a window out.
    """
    return (128, 128) if is_triton(device) else (16, 16)


def _scalars(device: torch.device, *values: int) -> list[Tensor]:
    """int32 tensors without axes, for a predicate to capture.

    A Python number would be compiled into the kernel, and every new window or length would be
    another graph.
    """
    return [torch.full((), value, dtype=torch.int32, device=device) for value in values]


def _ahead(semantics: Semantics) -> int:
    """How far ahead of its position a query sees in compress and fine."""
    return 0 if semantics.causal else PAST_THE_END


def _positions(
    q_len: int, q_block_size: int, offset: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """p of the first and of the last row of every row block, and whether it has rows at all."""
    first = torch.arange(count_blocks(q_len, q_block_size), device=device) * q_block_size
    last = (first + q_block_size).clamp(max=q_len) - 1
    return first + offset, last + offset, last >= first


# --- sliding: W1, W2 ------------------------------------------------------------------------------


def sliding_mask_mod(
    name: str, *, offset: int, newest: int, oldest: int, kv_len: int, device: torch.device
) -> MaskMod:
    """Visible iff newest <= p - j <= oldest, where p = t + offset is not negative."""
    offset_, newest_, oldest_, kv_len_ = _scalars(device, offset, newest, oldest, kv_len)

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        position = row + offset_
        distance = position - column
        real = (position >= 0) & (column < kv_len_)
        return real & (distance >= newest_) & (distance <= oldest_)

    mask_mod.__name__ = name
    return mask_mod


def sliding_block_mask(
    q_len: int,
    kv_len: int,
    sliding_window_size: int,
    semantics: Semantics,
    *,
    device: torch.device,
    block_size: tuple[int, int] | None = None,
    q_lists: bool = True,
) -> BlockMask:
    """W1, W2: the own key and the w before it (and behind it, if nothing is causal).

    block_size : rows and columns of a block; default `token_block_size`
    returns : (1, 1, q_len, kv_len)
    """
    block_size = block_size or token_block_size(device)
    oldest = sliding_window_size if semantics.window_closed else sliding_window_size - 1
    newest = 0 if semantics.causal else -oldest
    offset = kv_len - q_len
    first, last, real = _positions(q_len, block_size[0], offset, device)
    # rows with p < 0 see nothing; those that are left see an interval that moves by one a row
    seeing = real & (last >= 0) & (oldest >= newest)

    def interval(seeing: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = (torch.where(seeing, end.clamp(0, kv_len), 0) for end in (start, stop))
        return start, stop

    some = interval(seeing, first.clamp(min=0) - oldest, last - newest + 1)
    every = interval(seeing & (first >= 0), last - oldest, first - newest + 1)
    reach = max(0, oldest - newest) + block_size[0]  # columns that a row block can see
    slots = min(count_blocks(kv_len, block_size[1]), -(-reach // block_size[1]) + 1)
    lists = block_lists.interval_lists(
        some, every, kv_len=kv_len, kv_block_size=block_size[1], slots=slots, partial_slots=slots
    )
    mask_mod = sliding_mask_mod(
        f"sliding_{sliding_window_size}",
        offset=offset,
        newest=newest,
        oldest=oldest,
        kv_len=kv_len,
        device=device,
    )
    # rows that see a column of the block stand this far apart at most
    reach = max(0, oldest - newest) + block_size[1]
    return block_lists.to_block_mask(
        lists,
        mask_mod,
        q_len=q_len,
        kv_len=kv_len,
        block_size=block_size,
        q_lists=q_lists,
        q_slots=min(len(first), -(-reach // block_size[0]) + 1),
    )


# --- compress: C2, C3 -----------------------------------------------------------------------------


def compress_mask_mod(
    name: str,
    *,
    offset: int,
    ahead: int,
    stride: int,
    first_seen: int,
    memory: int,
    columns: int,
    device: torch.device,
) -> MaskMod:
    """Memory, and block i iff i d + first_seen <= p + ahead, where p = t + offset >= 0.

    first_seen : the first position that sees block 0; every further one is seen d later
    """
    offset_, ahead_, stride_, first_seen_, memory_, columns_ = _scalars(
        device, offset, ahead, stride, first_seen, memory, columns
    )

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        position = row + offset_
        # `Windows.sees`, on scalars that are captured: its Python numbers would be compiled in
        seen = (column - memory_) * stride_ + first_seen_ <= position + ahead_
        real = (position >= 0) & (column < columns_)
        return (column < memory_) | (seen & real)

    mask_mod.__name__ = name
    return mask_mod


def compress_block_mask(
    q_len: int,
    num_blocks: int,
    num_mem_kv: int,
    windows: Windows,
    *,
    offset: int,
    device: torch.device,
    block_size: tuple[int, int] | None = None,
    q_lists: bool = True,
) -> BlockMask:
    """C2, C3: memory columns, then the first num_blocks windows, each from its position on.

    Where nothing is causal, every block for every query with p >= 0.

    offset : p - t
    block_size : as `sliding_block_mask`
    returns : (1, 1, q_len, num_mem_kv + num_blocks)
    """
    block_size = block_size or token_block_size(device)
    columns = num_mem_kv + num_blocks
    causal, ahead = windows.semantics.causal, _ahead(windows.semantics)
    first, last, real = _positions(q_len, block_size[0], offset, device)

    def stop(position: Tensor) -> Tensor:
        """Columns that a query at `position` sees; always the first ones."""
        seen = windows.num_seen(position + ahead).clamp(0, num_blocks)
        return torch.where(real, num_mem_kv + torch.where(position >= 0, seen, 0), 0)

    start, blocks = torch.zeros_like(first), count_blocks(columns, block_size[1])
    # columns by which the rows of a block can differ
    moved = block_size[0] // windows.stride + 1 if causal else num_blocks if offset < 0 else 0
    lists = block_lists.interval_lists(
        (start, stop(last)),
        (start, stop(first)),
        kv_len=columns,
        kv_block_size=block_size[1],
        slots=blocks,
        partial_slots=min(blocks, -(-moved // block_size[1]) + 1),
        from_first=True,
    )
    mask_mod = compress_mask_mod(
        f"compress_{windows.stride}_mem_{num_mem_kv}",
        offset=offset,
        ahead=ahead,
        stride=windows.stride,
        first_seen=windows.seen_from(0),
        memory=num_mem_kv,
        columns=columns,
        device=device,
    )
    # where full blocks are stored once, those that see some and not all of a block's columns: from
    # its first window to its last, and before any window those that see memory alone
    apart = max(0, -offset) + windows.seen_from(0) + block_size[1] * windows.stride
    once = lists.full_indices.stride(2) == 0 and columns >= block_lists.LEAST_LENGTH
    return block_lists.to_block_mask(
        lists,
        mask_mod,
        q_len=q_len,
        kv_len=columns,
        block_size=block_size,
        q_lists=q_lists,
        q_slots=min(len(first), -(-apart // block_size[0]) + 1) if once else len(first),
    )


# --- fine: F1 to F4 -------------------------------------------------------------------------------


def fine_mask_mod(chosen: Chosen, *, offset: int, ahead: int, heads_per_choice: int) -> MaskMod:
    """Visible iff the column's block is one of the token's and j <= p + ahead, p >= 0.

    It reads the choice in a table of tokens x blocks bits: bit b of word w stands for block
    32 w + b. The table is flat and of a size that hardly varies, because Inductor's C++ template
    confuses the symbols of captured sizes with its own.

    heads_per_choice : heads of the mask that share a choice of blocks
    """
    table, (heads, tokens, words) = block_lists.word_table(chosen)
    heads_, tokens_, words_, offset_, ahead_, block_size_ = _scalars(
        table.device, heads, tokens, words, offset, ahead, chosen.block_size
    )
    heads_per_choice_, kv_len_ = _scalars(table.device, heads_per_choice, chosen.kv_len)

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        block = column // block_size_
        choice = (batch * heads_ + head // heads_per_choice_) * tokens_ + row
        # what table[...] becomes in the end, without the custom Function that carries gradients to
        # captured tensors and costs an eager call 5 ms
        word = torch.ops.aten.index(table, [choice * words_ + block // WORD_BITS])
        named = ((word >> (block % WORD_BITS)) & 1) == 1
        position = row + offset_
        real = (position >= 0) & (column < kv_len_)
        return named & (column <= position + ahead_) & real

    mask_mod.__name__ = f"fine_{chosen.block_size}"
    return mask_mod


def named_mask_mod(
    layout: FineLayout, *, offset: int, ahead: int, kv_len: int, device: torch.device
) -> MaskMod:
    """F1 inside the blocks that the lists name: visible iff j <= p + ahead, where p >= 0.

    A token's lists say which blocks it has, and no kernel asks about others: nothing here grows
    with tokens x blocks.
    """
    offset_, ahead_, kv_len_ = _scalars(device, offset, ahead, kv_len)
    rows_per_token_, block_size_, columns_per_block_ = _scalars(
        device, layout.rows_per_token, layout.block_size, layout.columns_per_block
    )

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        position = row // rows_per_token_ + offset_
        block, place = column // columns_per_block_, column % columns_per_block_
        key = block * block_size_ + place
        real = (position >= 0) & (place < block_size_) & (key < kv_len_)
        return real & (key <= position + ahead_)

    mask_mod.__name__ = f"fine_{layout.block_size}"
    return mask_mod


def chosen_blocks(
    kv_len: int, block_indices: Tensor, selection_block_size: int, semantics: Semantics
) -> tuple[Chosen, int]:
    """The blocks that each token sees (F1, F3), and how far ahead of its p it sees in them."""
    ahead = _ahead(semantics)
    chosen = block_lists.chosen_blocks(
        block_indices,
        kv_len=kv_len,
        block_size=selection_block_size,
        offset=kv_len - block_indices.shape[2],
        ahead=ahead,
        own_block=semantics.causal and semantics.own_block_extra,
    )
    return chosen, ahead


def fine_block_mask(
    kv_len: int,
    block_indices: Tensor,
    layout: FineLayout,
    semantics: Semantics,
    *,
    q_lists: bool = True,
) -> tuple[BlockMask, Crowded | None]:
    """F1 to F4 for queries that stand token by token, as `layout` says.

    The rows of one token are one row block: they share its choice, so that the lists are the
    selected blocks themselves. Blocks before the query are full, the one that it cuts is partial.

    block_indices : integers (batch, heads, q_len, n), any values
    returns : (batch, heads, q_len * rows_per_token, columns), and the column blocks that the
        transposed lists leave out: `crowded.py` has their dk and dv
    """
    q_len = block_indices.shape[2]
    chosen, ahead = chosen_blocks(kv_len, block_indices, layout.block_size, semantics)
    mask_mod = named_mask_mod(
        layout, offset=kv_len - q_len, ahead=ahead, kv_len=kv_len, device=block_indices.device
    )
    columns = layout.num_columns(kv_len)
    lists = block_lists.token_lists(chosen, layout.columns_per_block)
    crowded = None
    if q_lists:
        blocks = count_blocks(columns, layout.columns_per_block)
        crowded = block_lists.crowded_columns(lists, blocks)
    block_mask = block_lists.to_block_mask(
        lists,
        mask_mod,
        q_len=q_len * layout.rows_per_token,
        kv_len=columns,
        block_size=(layout.rows_per_token, layout.columns_per_block),
        q_lists=q_lists,
        crowded=crowded,
    )
    return block_mask, crowded


def tiled_fine_block_mask(
    block_indices: Tensor,
    selection_block_size: int,
    semantics: Semantics,
    *,
    heads_per_choice: int,
    block_size: tuple[int, int],
) -> BlockMask:
    """F1 to F4 for queries that stand head by head, as many as keys, in blocks of any size.

    block_indices : as `fine_block_mask`
    returns : (batch, heads * heads_per_choice, q_len, q_len)
    """
    seq_len = block_indices.shape[2]
    chosen, ahead = chosen_blocks(seq_len, block_indices, selection_block_size, semantics)
    lists = block_lists.tiled_lists(
        chosen, q_len=seq_len, q_block_size=block_size[0], kv_block_size=block_size[1]
    )
    lists = BlockLists(*(part.repeat_interleave(heads_per_choice, dim=1) for part in lists))
    mask_mod = fine_mask_mod(
        chosen,
        offset=0,
        ahead=ahead,
        heads_per_choice=heads_per_choice,
    )
    return block_lists.to_block_mask(
        lists, mask_mod, q_len=seq_len, kv_len=seq_len, block_size=block_size
    )
