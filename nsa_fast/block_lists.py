"""Which blocks a kernel walks: FlexAttention's block lists, straight from arithmetic.

A block of query rows has two lists of blocks of key columns: partial ones, which the kernel masks
cell by cell, and full ones, which it reads whole. A block is full if all of its rows and columns
that exist are visible; the kernels cut what lies past the end. Nothing here is ever as large as
rows x columns.

All lists are int32, ascending, free of duplicates, and filled up with 0: a number in range, because
the Triton kernels load the first entry of an empty list too. A list that is stored once for all
rows (`shared`) names every block, and each row walks the beginning of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

#: A predicate: (batch, head, row, column), tensors that broadcast -> whether the cell is visible.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: The attention functions lengthen anything shorter to this: the compiler makes a graph of its own
#: for a length of 1, and FlexAttention refuses 0.
LEAST_LENGTH = 2

#: Blocks to a word of the membership table.
WORD_BITS = 32

#: Entries of the smallest membership table: 65536 tokens x 32 blocks.
LEAST_TABLE = 2**16

#: A transposed list may be at most this many times as long as the average one. Lists are filled up
#: to the longest, so that the transposes take at most this many times the room of the lists.
CROWDED = 4

#: Whether full lists may be narrower or wider than partial ones. PyTorch 2.11 reads both with the
#: strides of the partial ones, without a word. So say the sources of 2.11 and 2.13; 2.12 counts as
#: 2.11.
OWN_STRIDES = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)


class BlockLists(NamedTuple):
    """Partial and full blocks of every row block.

    num_blocks, full_num_blocks : int32 (batch, heads, row blocks)
    indices, full_indices : int32 (batch, heads, row blocks, slots); where OWN_STRIDES, each with
        slots of its own, and full_indices may be one list for all rows (`shared`)
    """

    num_blocks: Tensor
    indices: Tensor
    full_num_blocks: Tensor
    full_indices: Tensor


class Crowded(NamedTuple):
    """Column blocks that too many row blocks name, and which row blocks do.

    left_out : bool (batch, columns), the column blocks that the transposed lists leave out
    places : (batch, head, column block), once for every head that names such a block
    rows : for every place the row blocks that name it, int64 (row blocks,)
    """

    left_out: Tensor
    places: list[tuple[int, int, int]]
    rows: tuple[Tensor, ...]


def count_blocks(length: int, block_size: int) -> int:
    """Blocks that cover `length`, at least one: an empty list has no place to read from."""
    return max(1, -(-length // block_size))


def padded(tensor: Tensor, axis: int, least: int) -> Tensor:
    """The tensor with zeros behind it until the axis is `least` long; itself if it is."""
    missing = least - tensor.shape[axis]
    if missing <= 0:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - axis) + (0, missing))


def to_block_mask(
    lists: BlockLists,
    mask_mod: MaskMod,
    *,
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    q_lists: bool = True,
    q_slots: int | None = None,
    crowded: Crowded | None = None,
) -> BlockMask:
    """The lists, their transpose and the predicate as one BlockMask.

    FlexAttention's own transposition raises IndexError on lists narrower than the number of blocks.

    q_lists : False leaves the transpose out (None): only a backward walks it
    q_slots : the most row blocks that have a column block in one of their lists, but for a list
        that is stored once; None to look, for which the host waits
    crowded : column blocks that the transpose leaves out: their dk and dv are computed elsewhere
    """
    columns = count_blocks(kv_len, block_size[1])
    by_column = None
    if q_lists:
        left_out = {} if crowded is None else {"left_out": crowded.left_out}
        by_column = transposed(lists, columns, q_slots, **left_out)
    return BlockMask(
        seq_lengths=(q_len, kv_len),
        kv_num_blocks=lists.num_blocks,
        kv_indices=lists.indices,
        full_kv_num_blocks=lists.full_num_blocks,
        full_kv_indices=lists.full_indices,
        q_num_blocks=by_column and by_column.num_blocks,
        q_indices=by_column and by_column.indices,
        full_q_num_blocks=by_column and by_column.full_num_blocks,
        full_q_indices=by_column and by_column.full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
    )


def transposed(
    lists: BlockLists, columns: int, slots: int | None = None, left_out: Tensor | None = None
) -> BlockLists:
    """For every column block the row blocks that name it: what dk and dv walk.

    slots : as q_slots of `to_block_mask`
    left_out : bool (batch, columns), column blocks with an empty list
    """
    num_blocks, indices = _transposed(lists.num_blocks, lists.indices, columns, slots, left_out)
    if lists.full_indices.stride(2) == 0 and left_out is None:
        full_num_blocks, full_indices = _transposed_shared(lists.full_num_blocks, columns)
    else:
        full_num_blocks, full_indices = _transposed(
            lists.full_num_blocks, lists.full_indices, columns, slots, left_out
        )
    if not OWN_STRIDES:
        # one list may be as wide as there are row blocks and the other 1: this can double them
        wider = max(indices.shape[-1], full_indices.shape[-1])
        indices = F.pad(indices, (0, wider - indices.shape[-1]))
        full_indices = F.pad(full_indices, (0, wider - full_indices.shape[-1]))
    return BlockLists(num_blocks, indices, full_num_blocks, full_indices)


def _transposed(
    num_blocks: Tensor,
    indices: Tensor,
    columns: int,
    slots: int | None,
    left_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = indices.shape
    every = batch * heads * columns
    used, column = _used(num_blocks, indices, columns)
    if left_out is not None:
        used &= ~_by_head(left_out, heads)[column]
    # entries come row by row; a stable sort by column keeps the rows of a column ascending. The
    # slots that are not in use are counted behind the rest
    column, order = torch.where(used, column, every).flatten().sort(stable=True)
    starts = torch.searchsorted(column, torch.arange(every + 2, device=column.device))
    counts = starts.diff()
    if slots is None:
        slots = int(counts[:every].max()) if every else 0
    slots = max(1, slots)
    place = torch.arange(len(column), device=column.device) - starts[column]
    row = (order // max(1, width) % rows).to(indices.dtype)
    out = indices.new_zeros((every + 1, slots))
    out[column, place.clamp(max=slots - 1)] = row
    return (
        counts[:every].to(torch.int32).view(batch, heads, columns),
        out[:every].view(batch, heads, columns, slots),
    )


def shared(indices: Tensor, rows: int) -> Tensor:
    """One list (slots,) for all `rows` rows, stored once; each row walks the beginning of it.

    It is not expanded: that would make it a view, and graphs are guarded on what a view is of.
    """
    slots = len(indices)
    stored = torch.empty_strided(
        (1, 1, rows, slots), (0, 0, 0, 1), dtype=torch.int32, device=indices.device
    )
    stored[0, 0, 0] = indices
    return stored


def _transposed_shared(num_blocks: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The transpose of lists that all are 0, 1, 2, ...: rows walk beginnings of different length.

    Column c is named by the rows that walk more than c blocks. Sort the rows by how many they walk,
    most first: then these stand at the front, for every c. So the transpose is one list for all
    columns, too.
    """
    fewer, order = (-num_blocks.flatten()).sort(stable=True)
    column = torch.arange(columns, dtype=fewer.dtype, device=fewer.device)
    longer = torch.searchsorted(fewer, -column)
    return longer[None, None].to(torch.int32), shared(order, columns)


def _used(num_blocks: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which slots are used, and the column block in each, counted on from head to head."""
    batch, heads, _, slots = indices.shape
    used = torch.arange(slots, device=indices.device) < num_blocks[..., None]
    head = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1, 1)
    return used, indices + head * columns


def _entries(used: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Row block and column block of the slots in use, in order."""
    rows, slots = used.shape[2:]
    place = used.flatten().nonzero()[:, 0]
    return place // slots % rows, column.flatten()[place]


def _by_head(left_out: Tensor, heads: int) -> Tensor:
    """left_out for every head, in one row, numbered as `_used` numbers columns."""
    return left_out[:, None].expand(-1, heads, -1).flatten()


def crowded_columns(lists: BlockLists, columns: int) -> Crowded | None:
    """The column blocks that are better left out of the transposed lists, if there are any.

    The transposed lists are as wide as the longest of them, and one program walks each. A block
    that every later token sees (PAPER's initial one) would make them as wide as there are tokens.
    So a column block is crowded if more row blocks name it than CROWDED times the mean. A block
    that is crowded for one head is left out for all: where heads share keys, their gradients are
    one sum.
    """
    batch, heads, rows, slots = lists.indices.shape
    size = batch * heads * columns
    both = [
        _used(lists.num_blocks, lists.indices, columns),
        _used(lists.full_num_blocks, lists.full_indices, columns),
    ]
    # the slots that are not in use are counted behind the rest
    counts = sum(
        torch.where(used, column, size).flatten().bincount(minlength=size + 1)[:size]
        for used, column in both
    )
    most = CROWDED * rows * slots // columns
    left_out = (counts.view(batch, heads, columns) > most).any(dim=1)
    if not left_out.any():
        return None
    named = counts * _by_head(left_out, heads)
    entries = [_entries(used & (named > 0)[column], column) for used, column in both]
    row, column = (torch.cat(parts) for parts in zip(*entries))
    order = column.sort(stable=True).indices
    place = named.nonzero()[:, 0]
    return Crowded(
        left_out,
        [(p // columns // heads, p // columns % heads, p % columns) for p in place.tolist()],
        row[order].split(named[place].tolist()),
    )


# --- sliding and compress: an interval of columns per row -----------------------------------------


def interval_lists(
    some: tuple[Tensor, Tensor],
    every: tuple[Tensor, Tensor],
    *,
    kv_len: int,
    kv_block_size: int,
    slots: int,
    partial_slots: int,
    from_first: bool = False,
) -> BlockLists:
    """Lists of a mask whose rows each see one interval of columns, which moves with the row.

    some : [start, stop) of the columns that at least one row of the block sees, int64 (row blocks,)
    every : [start, stop) of those that all rows of the block see
    slots : the most blocks that `some` can touch
    partial_slots : the most of them that can be partial
    from_first : every interval begins at column 0: full blocks are the first ones for all rows, and
        their list is stored once
    returns : lists of shape (1, 1, row blocks[, slots])
    """
    size, blocks = kv_block_size, count_blocks(kv_len, kv_block_size)
    first = some[0] // size
    stop = torch.where(some[1] > some[0], -(-some[1] // size), first)
    full_first = -(-every[0] // size)
    # the last block may be short: it is whole as soon as its real columns are
    full_stop = torch.where(every[1] >= kv_len, blocks, every[1] // size)
    whole = (every[1] > every[0]) & (full_stop > full_first) & (kv_len >= LEAST_LENGTH)
    full_first = torch.where(whole, full_first, stop)
    full_stop = torch.where(whole, full_stop, stop)
    full = full_stop - full_first

    slot = torch.arange(slots, device=first.device)
    if not OWN_STRIDES:
        from_first, partial_slots = False, slots
    partial_slot = slot[:partial_slots]
    partial_indices = first[:, None] + partial_slot  # up to the full blocks, then on behind them
    partial_indices = torch.where(
        partial_indices < full_first[:, None], partial_indices, partial_indices + full[:, None]
    )
    partial = stop - first - full
    lists = _filled(partial[None, None], partial_indices[None, None])
    if from_first:
        whole_blocks = shared(torch.arange(blocks, device=slot.device), len(full))
        return BlockLists(*lists, full[None, None].to(torch.int32), whole_blocks)
    full_indices = full_first[:, None] + slot
    return BlockLists(*lists, *_filled(full[None, None], full_indices[None, None]))


def _filled(num_blocks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Both as int32, with 0 in the slots that are not used."""
    slot = torch.arange(indices.shape[-1], device=indices.device)
    indices = torch.where(slot < num_blocks[..., None], indices, 0)
    return num_blocks.to(torch.int32).contiguous(), indices.to(torch.int32).contiguous()


# --- fine: a set of selection blocks per token ----------------------------------------------------


class Chosen(NamedTuple):
    """The selection blocks that each token sees at least one cell of.

    blocks : int64 (batch, heads, tokens, slots), ascending, distinct; `num_blocks` in unused
        slots, which may stand between the others
    offset, ahead : as `chosen_blocks`
    """

    blocks: Tensor
    num_blocks: int
    block_size: int
    kv_len: int
    offset: int
    ahead: int

    def cells(self) -> Tensor:
        """int64, as blocks: how many columns of the block the token sees."""
        last = _last_seen(self)[:, None]
        stop = ((self.blocks + 1) * self.block_size).clamp(max=self.kv_len).minimum(last + 1)
        return torch.where(self.blocks < self.num_blocks, stop - self.blocks * self.block_size, 0)


def chosen_blocks(
    block_indices: Tensor,
    *,
    kv_len: int,
    block_size: int,
    offset: int,
    ahead: int,
    own_block: bool,
) -> Chosen:
    """Block indices as a set: each once; none unknown, none past the query (F1, F3, I6).

    block_indices : integers (batch, heads, tokens, n), any values
    offset : p - t; a token with p < 0 stands before everything and sees nothing
    ahead : 0, or PAST_THE_END where nothing is cut at p
    own_block : the query's own block is seen as well
    """
    blocks = block_indices.to(torch.int64)
    num_blocks = -(-kv_len // block_size)
    found = Chosen(blocks, num_blocks, block_size, kv_len, offset, ahead)
    last = _last_seen(found)[:, None]
    if own_block:
        own = (last - ahead) // block_size
        blocks = torch.cat([blocks, own.expand(*blocks.shape[:3], 1)], dim=-1)
    # compared, and not multiplied: an index may be anything up to 2**63
    begun = (blocks >= 0) & (blocks <= (last // block_size).clamp(max=num_blocks - 1))
    blocks = torch.where(begun, blocks, num_blocks).sort(dim=-1).values
    again = blocks[..., 1:] == blocks[..., :-1]
    blocks[..., 1:].masked_fill_(again, num_blocks)
    return found._replace(blocks=blocks)


def _last_seen(chosen: Chosen) -> Tensor:
    """F1: the last position that each token sees, int64 (tokens,); -1 where it sees nothing."""
    tokens, offset = chosen.blocks.shape[2], chosen.offset
    start = offset + chosen.ahead
    last = torch.arange(start, start + tokens, device=chosen.blocks.device)
    if offset < 0:
        last[:-offset] = -1  # before token 0
    return last


def word_table(chosen: Chosen) -> tuple[Tensor, tuple[int, int, int]]:
    """Membership, one bit per token and block: int32 (entries,), and how to read it.

    returns : the table, flat, and (heads, tokens, words); what lies behind its end is 0

    A captured table is compiled in with its size, so it is taken from a few: `table_entries`.
    """
    batch, heads, tokens, _ = chosen.blocks.shape
    entries = table_entries(batch, heads, tokens, chosen.num_blocks)
    words = _words(chosen.num_blocks)
    bit = torch.bitwise_left_shift(torch.ones_like(chosen.blocks), chosen.blocks % WORD_BITS)
    bit = torch.where(chosen.blocks < chosen.num_blocks, bit, 0)
    # bit 31 is the sign of an int32
    bit = torch.where(bit == 2**31, -(2**31), bit).to(torch.int32)
    table = bit.new_zeros(entries)
    index = (chosen.blocks // WORD_BITS).clamp(max=words - 1)
    row = torch.arange(batch * heads * tokens, device=bit.device).view(batch, heads, tokens, 1)
    # no block occurs twice: adding is or-ing
    table.scatter_add_(0, (row * words + index).flatten(), bit.flatten())
    torch._dynamo.mark_static(table)
    return table, (heads, tokens, words)


def table_entries(batch: int, heads: int, tokens: int, num_blocks: int) -> int:
    """Size of the membership table: a power of two, 256 KiB at least.

    Raises
    ------
    ValueError : more entries than an int32 can number
    """
    # lengths below 2 are lengthened: their added row and column must find an entry
    needed = (batch * heads * tokens + 1) * _words(num_blocks) + 1
    if needed >= 2**31:
        raise ValueError(
            f"batch={batch} x heads={heads} x tokens={tokens} x selection blocks={num_blocks} make "
            f"a membership table of {needed} words of {WORD_BITS} blocks; it must be below 2**31, "
            "because the kernels index it in int32. Split the batch or the heads, or take larger "
            "selection blocks."
        )
    return min(2**31 - 1, max(LEAST_TABLE, 1 << (needed - 1).bit_length()))


def _words(num_blocks: int) -> int:
    return max(1, -(-num_blocks // WORD_BITS))


def token_lists(chosen: Chosen, columns_per_block: int) -> BlockLists:
    """Lists with one row block per token and one selection block to a column block.

    columns_per_block : at least the tokens of a block; with more, none is full
    returns : lists of shape (batch, heads, tokens[, slots]), only as wide as needed
    """
    blocks, tokens = chosen.num_blocks, chosen.blocks.shape[2]
    slots = min(chosen.blocks.shape[3], blocks)
    if tokens == 0 or slots == 0:
        return _empty_lists(chosen, rows=max(1, tokens))
    start = chosen.blocks * chosen.block_size
    cells = chosen.cells()
    seen = (chosen.blocks < blocks) & (cells > 0)
    full = seen & (cells == (start + chosen.block_size).clamp(max=chosen.kv_len) - start)
    # the last block may be short: it is whole as soon as its real columns are
    full &= columns_per_block == chosen.block_size and chosen.kv_len >= LEAST_LENGTH
    return BlockLists(
        *_ascending(seen & ~full, chosen.blocks, blocks, slots),
        *_ascending(full, chosen.blocks, blocks, slots),
    )


def tiled_lists(chosen: Chosen, *, q_len: int, q_block_size: int, kv_block_size: int) -> BlockLists:
    """Lists with blocks of any size, by counting the visible cells of each block.

    A block is partial if some of its cells are visible and full if all are. The count is one number
    per block, filled from the selected indices.
    """
    batch, heads, tokens, _ = chosen.blocks.shape
    rows, columns = count_blocks(q_len, q_block_size), count_blocks(chosen.kv_len, kv_block_size)
    counts = chosen.blocks.new_zeros((batch, heads, rows * columns))
    row = (torch.arange(tokens, device=counts.device) // q_block_size * columns)[:, None]
    visible = chosen.cells()
    start = torch.where(visible > 0, chosen.blocks * chosen.block_size, 0)
    stop = start + visible
    for step in range(min(columns, -(-chosen.block_size // kv_block_size) + 1)):
        column = start // kv_block_size + step
        cells = stop.minimum((column + 1) * kv_block_size) - start.maximum(column * kv_block_size)
        place = row + column.clamp(max=columns - 1)
        counts.scatter_add_(-1, place.expand_as(cells).flatten(2), cells.clamp(min=0).flatten(2))
    counts = counts.view(batch, heads, rows, columns)
    height = _extents(q_len, q_block_size, rows, counts.device)
    width = _extents(chosen.kv_len, kv_block_size, columns, counts.device)
    full = (counts > 0) & (counts == height[:, None] * width)
    column = torch.arange(columns, device=counts.device).expand_as(counts)
    return BlockLists(
        *_ascending((counts > 0) & ~full, column, columns, columns),
        *_ascending(full, column, columns, columns),
    )


def _extents(length: int, block_size: int, blocks: int, device: torch.device) -> Tensor:
    """How much of each block is real."""
    start = torch.arange(blocks, device=device) * block_size
    return (start + block_size).clamp(max=length) - start


def _ascending(wanted: Tensor, tile: Tensor, tiles: int, slots: int) -> tuple[Tensor, Tensor]:
    """The wanted tiles at the front of each row, in order."""
    indices = torch.where(wanted, tile, tiles).sort(dim=-1).values[..., :slots]
    return _filled(wanted.sum(dim=-1), indices)


def _empty_lists(chosen: Chosen, rows: int) -> BlockLists:
    batch, heads = chosen.blocks.shape[:2]
    none = torch.zeros((batch, heads, rows), dtype=torch.int32, device=chosen.blocks.device)
    return BlockLists(none, none[..., None].clone(), none.clone(), none[..., None].clone())
