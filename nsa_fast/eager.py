"""Attention through a BlockMask in plain torch: the path on a CPU, and the code to step through.

It walks the lists as compiled kernels do. For some row blocks at a time, with k and v the column
blocks that their lists name:

    s       scale q.k; -inf where the predicate hides a cell of a partial block, where a slot is not
            used, and past the last column
    out     P v with P = exp(s - max) / sum, and lse = max + log(sum)                          (A1)
    dv      P dO                                                                               (A3)
    dq, dk  dS k and dS q with dS = scale P (dP - D + dlse), dP = dO.v, D = sum P dP

The backward computes P again from q and k. So what is held grows with rows + columns, not with
their product. Everything is computed in float32, in float64 for float64 inputs, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from nsa_fast.block_lists import count_blocks, padded
from nsa_fast.checks import without_autocast
from nsa_fast.rotary import wide_dtype

#: Scores that are held at a time, and numbers of k or v: both fit into a core's cache.
SCORES = 2**19
GATHERED = 2**19


def attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse, as `flex.Attention`, with gradients for q, k and v.

    block_mask : for the lengths of q and k, with lists for all heads of q together or for each; the
        transposed lists are not read
    """
    out, lse = _Attention.apply(q, k, v, block_mask, scale)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.block_mask, ctx.scale = block_mask, scale
        walk = _Walk(q, k, v, block_mask)
        # what a row keeps that sees nothing
        out = walk.q.new_zeros((*walk.q.shape[:-1], v.shape[3]))
        lse = walk.q.new_full((*walk.q.shape[:-1], 1), -torch.inf)
        for chunk in walk.chunks():
            weights, total, lse_of_chunk = walk.softmax(walk.take(walk.q, chunk), chunk, scale)
            walk.put(out, chunk, walk.product(weights, walk.v, chunk).div_(total))
            walk.put(lse, chunk, lse_of_chunk)
        return walk.by_row(out).to(q.dtype), walk.by_row(lse)[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        with without_autocast(q.device):
            walk = _Walk(q, k, v, ctx.block_mask)
            d_out, d_lse = walk.by_row_block(d_out), walk.by_row_block(d_lse[..., None])
            dq, dk, dv = (torch.zeros_like(each) for each in (walk.q, walk.k, walk.v))
            for chunk in walk.chunks():
                q_, d_out_ = walk.take(walk.q, chunk), walk.take(d_out, chunk)
                weights, total, _ = walk.softmax(q_, chunk, ctx.scale)
                p, dp = weights.div_(total), walk.dots("dp", d_out_, walk.v, chunk)
                walk.add(dv, p, d_out_, chunk)
                delta = (p * dp).sum(-1, keepdim=True)
                ds = dp.sub_(delta - walk.take(d_lse, chunk)).mul_(p).mul_(ctx.scale)
                walk.put(dq, chunk, walk.product(ds, walk.k, chunk))
                walk.add(dk, ds, q_, chunk)
            gradients = walk.by_row(dq), walk.by_column(dk, k), walk.by_column(dv, v)
        return *(d.to(q.dtype) for d in gradients), None, None


class _Chunk(NamedTuple):
    """Some row blocks, and the column blocks that their lists name.

    rows : the row blocks
    place : where in `_Walk.k` the column blocks stand, int64 (lists, slots); there is a list for
        every row block of every head
    hidden : bool (batch or 1, heads or 1, row blocks, 1, rows of a block, columns)
    """

    rows: slice
    place: Tensor
    hidden: Tensor


class _Walk:
    """q, k and v as the lists count them, and the row blocks of the lists, some at a time.

    q : (batch, heads, query heads together, row blocks, rows of a block, head_dim), with zeros
        behind the last row; query heads are together that read the same keys by the same lists
    k, v : (batch * kv_heads * column blocks, numbers of a block), with zeros behind the last column
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> None:
        self.mask = block_mask
        self.batch, q_heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1:3]
        self.heads = q_heads if block_mask.kv_num_blocks.shape[1] > 1 else self.kv_heads
        self.rows, self.columns = block_mask.BLOCK_SIZE
        self.column_blocks = count_blocks(self.kv_len, self.columns)
        self.wide = wide_dtype(q.dtype)
        self.q = self.by_row_block(q)
        self.k, self.v = self._by_column_block(k), self._by_column_block(v)
        self._rooms: dict[str, Tensor] = {}

    # how rows and columns stand

    def by_row_block(self, x: Tensor) -> Tensor:
        """(batch, q_heads, q_len, dim) as `q` stands."""
        row_blocks = count_blocks(self.q_len, self.rows)
        x = padded(x.to(self.wide), 2, row_blocks * self.rows)
        return x.unflatten(2, (row_blocks, self.rows)).unflatten(1, (self.heads, -1))

    def by_row(self, x: Tensor) -> Tensor:
        """The inverse of `by_row_block`."""
        return x.flatten(1, 2).flatten(2, 3)[:, :, : self.q_len]

    def _by_column_block(self, x: Tensor) -> Tensor:
        x = padded(x.to(self.wide), 2, self.column_blocks * self.columns)
        return x.reshape(-1, self.columns * x.shape[3])

    def by_column(self, x: Tensor, like: Tensor) -> Tensor:
        """What stands as `k` as the k or v that it was made of."""
        return x.view(self.batch, self.kv_heads, -1, like.shape[3])[:, :, : self.kv_len]

    def take(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """The chunk's rows of what stands as `q`: (lists, rows of a list, dim)."""
        return x[:, :, :, chunk.rows].transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def put(self, x: Tensor, chunk: _Chunk, rows: Tensor) -> None:
        """The inverse of `take`."""
        into = x[:, :, :, chunk.rows].transpose(2, 3)
        into.copy_(rows.view(into.shape))

    # lists

    def chunks(self) -> Iterator[_Chunk]:
        """All row blocks that name a column block."""
        partial, full = self.mask.kv_num_blocks, self.mask.full_kv_num_blocks
        columns = (int(partial.max()) + int(full.max())) * self.columns
        scores = self.batch * self.q.shape[1] * self.q.shape[2] * self.rows * columns
        step = max(1, SCORES // max(1, scores))
        for start in range(0, partial.shape[2], step):
            rows = slice(start, min(start + step, partial.shape[2]))
            most = int(partial[:, :, rows].max()), int(full[:, :, rows].max())
            if sum(most):
                yield self._chunk(rows, *most)

    def _chunk(self, rows: slice, partial: int, full: int) -> _Chunk:
        """Row blocks that name at most so many partial and full column blocks."""
        mask, device = self.mask, self.q.device
        lists = (
            (mask.kv_num_blocks, mask.kv_indices, partial),
            (mask.full_kv_num_blocks, mask.full_kv_indices, full),
        )
        block = torch.cat([index[:, :, rows, :most] for _, index, most in lists], dim=3).long()
        used = torch.cat(
            [torch.arange(most, device=device) < num[:, :, rows, None] for num, _, most in lists],
            dim=3,
        )
        column = block[..., None] * self.columns + torch.arange(self.columns, device=device)
        visible = used[..., None] & (column < self.kv_len)
        visible, column = (each.flatten(3)[..., None, :] for each in (visible, column))

        batch, head = (torch.arange(count, device=device) for count in block.shape[:2])
        row = torch.arange(rows.start * self.rows, rows.stop * self.rows, device=device)
        asked = partial * self.columns
        seen = mask.mask_mod(
            batch[:, None, None, None, None],
            head[:, None, None, None],
            row.view(-1, self.rows, 1),
            column[..., :asked],
        )
        seen, whole = seen & visible[..., :asked], visible[..., asked:]
        hidden = ~torch.cat([seen, whole.expand(*seen.shape[:-1], -1)], dim=-1)

        kv_head = torch.arange(self.heads, device=device) // (self.heads // self.kv_heads)
        sequence = torch.arange(self.batch, device=device)[:, None]
        first = (sequence * self.kv_heads + kv_head) * self.column_blocks
        place = (first[:, :, None, None] + block).flatten(0, 2)
        return _Chunk(rows, place, hidden[:, :, :, None])

    # products with the column blocks of a chunk

    def softmax(self, q: Tensor, chunk: _Chunk, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """exp(s - max), its sum and lse; 0, 1 and -inf in rows that see nothing."""
        s = self.dots("s", q, self.k, chunk).mul_(scale)
        together = s.view(*self.q.shape[:2], -1, *self.q.shape[2:3], self.rows, s.shape[2])
        together.masked_fill_(chunk.hidden, -torch.inf)
        top = s.amax(-1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0)
        weights = s.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        return weights, total.masked_fill(total == 0, 1), top + total.log()

    def dots(self, name: str, rows: Tensor, blocks: Tensor, chunk: _Chunk) -> Tensor:
        """Rows times their columns: (lists, rows, columns)."""
        out = self._room(name, (*rows.shape[:2], chunk.place.shape[1] * self.columns))
        for lists, found in self._gathered(blocks, chunk):
            torch.bmm(rows[lists], found.mT, out=out[lists])
        return out

    def product(self, scores: Tensor, blocks: Tensor, chunk: _Chunk) -> Tensor:
        """The sum of the columns by their scores: (lists, rows, dim)."""
        out = scores.new_empty((*scores.shape[:2], blocks.shape[1] // self.columns))
        for lists, found in self._gathered(blocks, chunk):
            torch.bmm(scores[lists], found, out=out[lists])
        return out

    def add(self, blocks: Tensor, scores: Tensor, rows: Tensor, chunk: _Chunk) -> None:
        """To every column the sum of its rows by their scores."""
        for lists, part in self._parts(blocks, chunk):
            torch.bmm(scores[lists].mT, rows[lists], out=part)
            blocks.index_add_(0, chunk.place[lists].flatten(), part.view(-1, blocks.shape[1]))

    def _gathered(self, blocks: Tensor, chunk: _Chunk) -> Iterator[tuple[slice, Tensor]]:
        for lists, part in self._parts(blocks, chunk):
            place = chunk.place[lists].flatten()
            torch.index_select(blocks, 0, place, out=part.view(-1, blocks.shape[1]))
            yield lists, part

    def _parts(self, blocks: Tensor, chunk: _Chunk) -> Iterator[tuple[slice, Tensor]]:
        """Some lists at a time, and room for their columns: (lists, columns, dim)."""
        count, slots = chunk.place.shape
        step = max(1, GATHERED // (slots * blocks.shape[1]))
        for start in range(0, count, step):
            stop = min(start + step, count)
            shape = (stop - start, slots * self.columns, blocks.shape[1] // self.columns)
            yield slice(start, stop), self._room("blocks", shape)

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that is used again: fresh pages each time would cost more than the products."""
        size = torch.Size(shape).numel()
        if name not in self._rooms or len(self._rooms[name]) < size:
            self._rooms[name] = self.q.new_empty(size)
        return self._rooms[name][:size].view(shape)
