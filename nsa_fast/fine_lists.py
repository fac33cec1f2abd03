"""Which blocks a tile of tokens reads, and which tokens read a block: lists for `fine_kernels.py`.

A tile is T tokens of one choice of blocks. Its list names each block that one of them chose once,
as an entry of 32 bits: block << T | tokens, where bit t stands for token t of the tile. So the
entry itself says who sees the block, and no table is as large as tokens x blocks.

The transposed list of a block, its tokens, may be as long as there are tokens, as is that of a
block which all must read. It is cut into parts, each of them a program's work.

Shapes alone decide how large anything is, so the host never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_fast.block_lists import Chosen

#: Rows of a tile, tokens x heads: what a tensor core multiplies at once.
ROWS = 64
#: The least and the most heads of a group that the kernels take.
GROUPS = (8, 128)
#: The most tokens of a selection block, and numbers of a head. In float32 nothing is multiplied on
#: tensor cores, and more does not fit in registers: 64 and 64 need 6 KB of stack a thread.
MOST = {torch.bfloat16: (128, 256), torch.float16: (128, 256), torch.float32: (32, 64)}
#: Programs of a grid's second axis: batch x heads.
PAIRS = 65535
#: Bytes of shared memory that a program can have on sm_90.
SHARED = 227 * 1024
#: Behind every entry.
NONE = 2**31 - 1
#: Tokens of a part of a transposed list.
PART = 4096


class Union(NamedTuple):
    """The blocks of each tile.

    entries : int32 (batch, heads, tiles, slots), ascending, the used ones first
    counts : int32 (batch, heads, tiles)
    """

    entries: Tensor
    counts: Tensor


class Parts(NamedTuple):
    """The tokens of each block, in parts.

    tokens : int32 (entries,), block by block, ascending, and behind them whatever was there; a
        block is numbered on from head to head
    starts : int32 (blocks + 1,), where the tokens of a block begin
    block : int32 (parts,), whose tokens a part holds; the number of blocks, if it holds none
    ends : int32 (blocks + 1,), the parts of all blocks before, and of all
    """

    tokens: Tensor
    starts: Tensor
    block: Tensor
    ends: Tensor


def padded_group(group: int) -> int:
    """Rows of a token: the next power of two."""
    return 1 << (group - 1).bit_length()


def tokens_per_tile(group: int) -> int:
    """T, for so many heads that share a choice."""
    return max(1, ROWS // padded_group(group))


def why_not(
    dtype: torch.dtype, *, pairs: int, group: int, block_size: int, head_dim: int, value_dim: int
) -> str:
    """What keeps the kernels from such sizes, in words; empty if nothing does.

    FlexAttention takes the others.

    pairs : batch x heads that choose
    """
    if pairs > PAIRS:
        return f"batch x heads is {pairs}, more than the {PAIRS} of a grid's second axis"
    least, most = GROUPS
    if not least <= group <= most:
        return f"{group} heads that share a choice are not within {least} to {most}"
    most_columns, most_dim = MOST[dtype]
    for what, count, limit in (
        ("selection_block_size", block_size, most_columns),
        ("head_dim", head_dim, most_dim),
        ("value_dim", value_dim, most_dim),
    ):
        if count > limit:
            return f"{what}={count} in {dtype} is more than the {limit} that fit in registers"
    # Of keys and values, or of q and d_out, whichever is walked, two lots, one of them on its way,
    # and one of the other; and of each row its token, lse and delta. Short blocks take less.
    low = max(16, 1 << (head_dim.bit_length() - 1))
    wide = low + _padded(head_dim - low) + _padded(value_dim)
    rows, columns = padded_group(group) * tokens_per_tile(group), _padded(block_size)
    shared = (rows + columns + max(rows, columns)) * wide * dtype.itemsize + 12 * rows
    if shared > SHARED:
        return (
            f"selection blocks of {block_size} tokens and {group} heads with head_dim={head_dim} "
            f"and value_dim={value_dim} take {shared} bytes of an SM, of {SHARED}"
        )
    return ""


def _padded(dim: int) -> int:
    """What Triton makes of it: the next power of two, 16 at least; 0 of nothing."""
    return max(16, 1 << (dim - 1).bit_length()) if dim > 0 else 0


def union(chosen: Chosen, tokens: int) -> Union:
    """The list of every tile of so many tokens.

    Raises
    ------
    ValueError : more blocks than the bits that an entry has left can number
    """
    most = 2 ** (31 - tokens) - 1
    if chosen.num_blocks >= most:
        raise ValueError(
            f"kv_len={chosen.kv_len} makes {chosen.num_blocks} selection blocks of "
            f"{chosen.block_size}; there must be fewer than {most}. Take larger blocks."
        )
    q_len, slots = chosen.blocks.shape[2:]
    tiles = -(-q_len // tokens)
    blocks = chosen.blocks.to(torch.int32)
    missing = tiles * tokens - q_len
    if missing or not slots:  # tokens that the last tile is short of, a slot where there is none
        blocks = F.pad(blocks, (0, max(0, 1 - slots), 0, missing), value=chosen.num_blocks)
    blocks = blocks.unflatten(2, (tiles, tokens))
    token = torch.arange(tokens, dtype=torch.int32, device=blocks.device)[:, None]
    # one sort by block and token; no token names a block twice
    keys = torch.add(token, blocks, alpha=tokens).flatten(-2).sort(dim=-1).values
    blocks, bits = keys // tokens, 1 << keys % tokens
    entries = torch.add(bits, blocks, alpha=1 << tokens)
    again = blocks[..., 1:] == blocks[..., :-1]
    for step in range(1, min(tokens, keys.shape[-1])):
        same = again if step == 1 else blocks[..., step:] == blocks[..., :-step]
        entries[..., :-step].addcmul_(bits[..., step:], same)
    entries[..., 1:].masked_fill_(again, NONE)  # the first entry of a block has the bits of all
    entries.masked_fill_(blocks == chosen.num_blocks, NONE)
    entries = entries.sort(dim=-1).values
    return Union(entries, (entries != NONE).sum(dim=-1, dtype=torch.int32))


def parts(blocks: Tensor, num_blocks: int) -> Parts:
    """The transposed lists, in parts of PART tokens, where the kernels are Triton's.

    blocks : as `Chosen.blocks`
    """
    from nsa_fast.fine_list_kernels import transposed  # which imports triton

    tokens, starts = transposed(blocks, num_blocks)
    ends = -((starts[:-1] - starts[1:]) // PART)
    ends = F.pad(ends, (1, 0)).cumsum(dim=0, dtype=torch.int32)
    most = tokens.numel() // PART + len(starts) - 1
    part = torch.arange(most, dtype=torch.int32, device=blocks.device)
    return Parts(
        tokens, starts, torch.searchsorted(ends[1:], part, right=True, out_int32=True), ends
    )


# --- what the lists name, read back ---------------------------------------------------------------


def named_by_tiles(union: Union, q_len: int, num_blocks: int, tokens: int) -> Tensor:
    """How often each token's tile names each block to it: int64 (batch, heads, q_len, blocks)."""
    batch, heads, tiles, slots = union.entries.shape
    used = torch.arange(slots, device=union.entries.device) < union.counts[..., None]
    block = torch.where(used, union.entries >> tokens, num_blocks).long()
    token = torch.arange(tokens, device=block.device)[:, None]
    member = (union.entries[..., None, :] >> token & 1).long()
    found = member.new_zeros((batch, heads, tiles, tokens, num_blocks + 1))
    found.scatter_add_(-1, block[..., None, :].expand(member.shape), member)
    return found.flatten(2, 3)[:, :, :q_len, :num_blocks]


def named_by_parts(parts: Parts, batch: int, heads: int, q_len: int, num_blocks: int) -> Tensor:
    """The same of the transposed lists."""
    found = torch.zeros(
        (batch * heads * num_blocks, q_len), dtype=torch.int64, device=parts.tokens.device
    )
    for part, block in enumerate(parts.block.tolist()):
        if block < len(found):
            start = int(parts.starts[block]) + (part - int(parts.ends[block])) * PART
            stop = min(start + PART, int(parts.starts[block + 1]))
            tokens = parts.tokens[start:stop].long()
            found[block].index_add_(0, tokens, torch.ones_like(tokens))
    return found.view(batch, heads, num_blocks, q_len).transpose(2, 3)
