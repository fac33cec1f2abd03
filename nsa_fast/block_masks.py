"""The BlockMask of each branch, for the sizes and the Semantics of one call.

The attention functions look these builders up here, and so does the adapter: what is judged is what
is used, and a deliberately broken build is planted in one place. With q_lists=False the transposed
lists, which only a backward walks, are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nsa_fast import block_lists, mask_mods
from nsa_fast.block_lists import Crowded, count_blocks
from nsa_fast.mask_mods import PAST_THE_END
from nsa_ref.semantics import Semantics


def sliding_block_mask(
    q_len: int,
    kv_len: int,
    sliding_window_size: int,
    semantics: Semantics,
    *,
    block_size: tuple[int, int],
    device: torch.device,
    q_lists: bool = True,
) -> BlockMask:
    """W1, W2: the own key and the w before it (and behind it, if nothing is causal).

    returns : (1, 1, q_len, kv_len)
    """
    oldest = sliding_window_size if semantics.window_closed else sliding_window_size - 1
    newest = 0 if semantics.causal else -oldest
    offset = kv_len - q_len
    first, last, real = _positions(q_len, block_size[0], offset, device)
    # rows with p < 0 see nothing; those that are left see an interval that moves by one a row
    seeing = real & (last >= 0) & (oldest >= newest)
    earliest = first.clamp(min=0)
    nothing = torch.zeros_like(first)
    some = (
        torch.where(seeing, (earliest - oldest).clamp(0, kv_len), nothing),
        torch.where(seeing, (last - newest + 1).clamp(0, kv_len), nothing),
    )
    all_see = seeing & (first >= 0)
    every = (
        torch.where(all_see, (last - oldest).clamp(0, kv_len), nothing),
        torch.where(all_see, (first - newest + 1).clamp(0, kv_len), nothing),
    )
    columns = count_blocks(kv_len, block_size[1])
    reach = max(0, oldest - newest) + block_size[0]  # columns that a row block can see
    lists = block_lists.interval_lists(
        some,
        every,
        kv_len=kv_len,
        kv_block_size=block_size[1],
        slots=min(columns, -(-reach // block_size[1]) + 1),
        partial_slots=min(columns, -(-reach // block_size[1]) + 1),
    )
    mask_mod = mask_mods.sliding_mask_mod(
        f"sliding_{sliding_window_size}",
        offset=offset,
        newest=newest,
        oldest=oldest,
        kv_len=kv_len,
        device=device,
    )
    return block_lists.to_block_mask(
        lists, mask_mod, q_len=q_len, kv_len=kv_len, block_size=block_size, q_lists=q_lists
    )


def compress_block_mask(
    q_len: int,
    num_blocks: int,
    compress_block_sliding_stride: int,
    num_mem_kv: int,
    *,
    offset: int,
    first_end: int,
    causal: bool,
    block_size: tuple[int, int],
    device: torch.device,
    q_lists: bool = True,
) -> BlockMask:
    """C2, C3: memory columns, then every block i with i d + first_end <= p = t + offset.

    Where nothing is causal, every block for every query with p >= 0.

    first_end : the last token of block 0, in tokens; one more where a block is visible a step later
    returns : (1, 1, q_len, num_mem_kv + num_blocks)
    """
    stride, columns = compress_block_sliding_stride, num_mem_kv + num_blocks
    ahead = 0 if causal else PAST_THE_END
    first, last, real = _positions(q_len, block_size[0], offset, device)

    def stop(position: Tensor) -> Tensor:
        """Columns that a query at `position` sees; always the first ones."""
        ended = ((position + ahead - first_end) // stride + 1).clamp(0, num_blocks)
        return torch.where(real, num_mem_kv + torch.where(position >= 0, ended, 0), 0)

    start, blocks = torch.zeros_like(first), count_blocks(columns, block_size[1])
    # columns by which the rows of a block can differ
    moved = block_size[0] // stride + 1 if causal else num_blocks if offset < 0 else 0
    lists = block_lists.interval_lists(
        (start, stop(last)),
        (start, stop(first)),
        kv_len=columns,
        kv_block_size=block_size[1],
        slots=blocks,
        partial_slots=min(blocks, -(-moved // block_size[1]) + 1),
        from_first=True,
    )
    mask_mod = mask_mods.compress_mask_mod(
        f"compress_{stride}_mem_{num_mem_kv}",
        offset=offset,
        ahead=ahead,
        stride=stride,
        first_end=first_end,
        memory=num_mem_kv,
        columns=columns,
        device=device,
    )
    return block_lists.to_block_mask(
        lists, mask_mod, q_len=q_len, kv_len=columns, block_size=block_size, q_lists=q_lists
    )


def fine_block_mask(
    kv_len: int,
    block_indices: Tensor,
    selection_block_size: int,
    semantics: Semantics,
    *,
    rows_per_token: int,
    columns_per_block: int,
    complete: bool,
    q_lists: bool = True,
) -> tuple[BlockMask, Crowded | None]:
    """F1 to F4 for queries that stand token by token, each with `rows_per_token` rows.

    The rows of one token are one row block: they share its choice, so that the lists are the
    selected blocks themselves. Blocks before the query are full, the one that it cuts is partial.

    block_indices : integers (batch, heads, q_len, n), any values
    columns_per_block : columns of a selection block; those behind its tokens are empty
    complete : the predicate knows the choice as well, for eager FlexAttention, by a table of
        tokens x blocks bits; it wants no empty columns
    returns : (batch, heads, q_len * rows_per_token, columns), and the column blocks that the
        transposed lists leave out: `crowded.py` has their dk and dv
    """
    q_len = block_indices.shape[2]
    offset, ahead = kv_len - q_len, 0 if semantics.causal else PAST_THE_END
    chosen = block_lists.chosen_blocks(
        block_indices,
        kv_len=kv_len,
        block_size=selection_block_size,
        offset=offset,
        ahead=ahead,
        own_block=semantics.causal and semantics.own_block_extra,
    )
    name, columns = f"fine_{selection_block_size}", kv_len
    if complete:
        table, shape = block_lists.word_table(chosen)
        mask_mod = mask_mods.fine_mask_mod(
            name,
            table=table,
            shape=shape,
            offset=offset,
            ahead=ahead,
            block_size=selection_block_size,
            rows_per_token=rows_per_token,
            heads_per_choice=1,
            kv_len=kv_len,
        )
    else:
        mask_mod = mask_mods.named_mask_mod(
            name,
            offset=offset,
            ahead=ahead,
            block_size=selection_block_size,
            columns_per_block=columns_per_block,
            rows_per_token=rows_per_token,
            kv_len=kv_len,
            device=block_indices.device,
        )
        if columns_per_block != selection_block_size:
            columns = chosen.num_blocks * columns_per_block
    lists = block_lists.token_lists(chosen, columns_per_block)
    crowded = None
    if q_lists:
        crowded = block_lists.crowded_columns(lists, count_blocks(columns, columns_per_block))
    block_mask = block_lists.to_block_mask(
        lists,
        mask_mod,
        q_len=q_len * rows_per_token,
        kv_len=columns,
        block_size=(rows_per_token, columns_per_block),
        q_lists=q_lists,
        crowded=crowded,
    )
    return block_mask, crowded


def _positions(
    q_len: int, q_block_size: int, offset: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """p of the first and of the last row of every row block, and whether it has rows at all."""
    first = torch.arange(count_blocks(q_len, q_block_size), device=device) * q_block_size
    last = (first + q_block_size).clamp(max=q_len) - 1
    return first + offset, last + offset, last >= first
