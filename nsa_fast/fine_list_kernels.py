"""Which tokens read a block, by a count and a scatter, as Triton kernels: for `fine_lists.parts`.

::

    count_tokens   how many tokens of a chunk have chosen each block
    place_tokens   each token, where it stands in the lists of its blocks

In between, a sum over what comes before says where the tokens of each chunk begin in the list of
each block. A program walks its chunk token by token, and nobody else writes where it writes. So the
place of a token is the number of earlier tokens that have chosen the block: lists are ascending,
and the same in every run. Chunks grow with the tokens: there are at most CHUNKS counts for a block,
half as many numbers as the lists have at the paper's sizes.

Importing this module imports triton; `fine_lists.py` does so when the kernels are to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fast.checks import on_device

#: The most chunks of a sequence, and the fewest tokens of a chunk.
CHUNKS, LEAST_TOKENS = 512, 32
#: Slots that are counted at once.
COUNTED = 1024

#: Warps and stages of a kernel. One warp walks a token's slots, and waits for itself alone; nothing
#: of the next token may be loaded before.
COUNT_OPTIONS = {"num_warps": 4, "num_stages": 2}
PLACE_OPTIONS = {"num_warps": 1, "num_stages": 1}

#: What changes from call to call is no reason to compile again.
LENGTHS = ("q_len", "slots", "blocks", "of_chunk")


@triton.jit
def _cells(x: tl.tensor, blocks: tl.tensor) -> tl.tensor:
    """Where the numbers of this program's chunk stand, block by block a chunk's length apart."""
    return x + tl.program_id(1).to(tl.int64) * blocks * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _cell(cells: tl.tensor, block: tl.tensor) -> tl.tensor:
    """That of a block."""
    return cells + block * tl.num_programs(0)


@triton.jit
def _chunk_stop(first: tl.tensor, of_chunk: tl.tensor, q_len: tl.tensor) -> tl.tensor:
    """The first token behind a chunk; the last chunk may be short."""
    return tl.minimum(first + of_chunk, q_len)


@triton.jit(do_not_specialize=LENGTHS)
def count_tokens(
    chosen: tl.tensor,
    counts: tl.tensor,
    q_len: tl.tensor,
    slots: tl.tensor,
    blocks: tl.tensor,
    of_chunk: tl.tensor,
    COUNTED: tl.constexpr,
) -> None:
    """Adds one to the count of every block that a token of a chunk has chosen.

    ::

        grid       (chunks, batch x heads)
        chosen     (batch x heads, q_len, slots); `blocks` and more where there is none
        counts     int32 (batch x heads, blocks, chunks), zeros before

    of_chunk : tokens
    """
    cells = _cells(counts, blocks)
    of_pair = chosen + tl.program_id(1).to(tl.int64) * q_len * slots
    first = tl.program_id(0) * of_chunk
    stop = _chunk_stop(first, of_chunk, q_len) * slots
    for at in tl.range(first * slots, stop, COUNTED):
        slot = at + tl.arange(0, COUNTED)
        block = tl.load(of_pair + slot, mask=slot < stop, other=blocks).to(tl.int64)
        # whole numbers: in whichever order they are added up, the sum is the same
        tl.atomic_add(_cell(cells, block), 1, mask=block < blocks, sem="relaxed")


@triton.jit(do_not_specialize=LENGTHS)
def place_tokens(
    chosen: tl.tensor,
    begins: tl.tensor,
    token_lists: tl.tensor,
    q_len: tl.tensor,
    slots: tl.tensor,
    blocks: tl.tensor,
    of_chunk: tl.tensor,
    SLOTS: tl.constexpr,
) -> None:
    """Writes every token of a chunk into the lists of its blocks.

    ::

        grid         as `count_tokens`
        begins       int32, as its counts: where the tokens of a chunk begin in the list of a block;
                     afterwards, where they end
        token_lists  int32, the lists, one behind the other
    """
    cells = _cells(begins, blocks)
    slot = tl.arange(0, SLOTS)
    first = tl.program_id(0) * of_chunk
    of_token = chosen + (tl.program_id(1).to(tl.int64) * q_len + first) * slots
    for token in tl.range(first, _chunk_stop(first, of_chunk, q_len)):
        block = tl.load(of_token + slot, mask=slot < slots, other=blocks).to(tl.int64)
        real = block < blocks
        cell = _cell(cells, block)
        place = tl.load(cell, mask=real, other=0)
        # no token has chosen a block twice: each of these is another cell
        tl.store(token_lists + place, token, mask=real)
        tl.store(cell, place + 1, mask=real)
        of_token += slots
        tl.debug_barrier()  # the next token may have the same block in another slot


# --- launches -------------------------------------------------------------------------------------


def transposed(chosen: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The tokens of every block, and where they begin.

    chosen : integers (batch, heads, q_len, slots), distinct in a token; `blocks` in unused slots
    returns : int32 (entries,), block by block, ascending, and what is left of it as it comes; int32
        (batch * heads * blocks + 1,). Blocks are numbered on from head to head
    """
    chosen = chosen.contiguous()
    batch, heads, q_len, slots = chosen.shape
    of_chunk = max(LEAST_TOKENS, -(-q_len // CHUNKS))
    grid = chunks, pairs = max(1, -(-q_len // of_chunk)), batch * heads
    device = chosen.device
    # one number more before the first, so that sums are of what comes before
    counts = torch.zeros(pairs * blocks * chunks + 1, dtype=torch.int32, device=device)
    token_lists = torch.empty(chosen.numel(), dtype=torch.int32, device=device)
    lengths = {"q_len": q_len, "slots": slots, "blocks": blocks, "of_chunk": of_chunk}
    with on_device(device):
        count_tokens[grid](
            chosen, counts[1:], **lengths, COUNTED=COUNTED, **COUNT_OPTIONS,
        )  # fmt: skip
        begins = counts.cumsum(dim=0, dtype=torch.int32)
        starts = begins[::chunks].clone(memory_format=torch.contiguous_format)
        place_tokens[grid](
            chosen, begins, token_lists, **lengths,
            SLOTS=triton.next_power_of_2(max(1, slots)), **PLACE_OPTIONS,
        )  # fmt: skip
    return token_lists, starts
