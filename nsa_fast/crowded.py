"""dk and dv of the column blocks that the transposed lists leave out (`block_lists.Crowded`).

FlexAttention's backward computes the rest, and dq. The gradient of a column block comes from one of
the two alone, so that nothing more is rounded to the dtype of the inputs. Here all rows that name a
block are taken at once, as a product of matrices; FlexAttention has one program walk them one by
one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nsa_fast.block_lists import Crowded
from nsa_fast.checks import without_autocast

#: Scores, or entries of q, of one chunk of rows: 2**24 float32 are 64 MiB.
CHUNK_ELEMENTS = 2**24


def with_crowded_columns(
    crowded: Crowded,
    block_mask: BlockMask,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """out and lse as they are; their gradients reach the crowded columns of k and v as well.

    q, k, v, block_mask : what FlexAttention was given to compute them
    """
    result: tuple[Tensor, Tensor] = _Crowded.apply(crowded, block_mask, scale, q, k, v, out, lse)
    return result


class _Crowded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, crowded: Crowded, block_mask: BlockMask, scale: float, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.crowded, ctx.block_mask, ctx.scale = crowded, block_mask, scale
        ctx.save_for_backward(*tensors)
        out, lse = tensors[-2:]
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        with torch.no_grad(), without_autocast(d_out.device):
            tensors = *ctx.saved_tensors, d_out, d_lse
            dk, dv = _gradients(ctx.crowded, ctx.block_mask, ctx.scale, *tensors)
        return None, None, None, None, dk, dv, d_out, d_lse


def _gradients(
    crowded: Crowded,
    block_mask: BlockMask,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """A3 for the crowded columns, 0 elsewhere; computed in float32."""
    rows_per_block = block_mask.BLOCK_SIZE[0]
    heads_per_kv_head = q.shape[1] // k.shape[1]
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    sums: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
    for (b, h, block), named in zip(crowded.places, crowded.rows):
        kv_head = h // heads_per_kv_head
        columns = _columns(block_mask, block)
        keys, values = k[b, kv_head, columns].float(), v[b, kv_head, columns].float()
        if (b, kv_head, block) not in sums:
            sums[b, kv_head, block] = torch.zeros_like(keys), torch.zeros_like(values)
        dk_sum, dv_sum = sums[b, kv_head, block]
        widest = max(len(keys), keys.shape[1], values.shape[1])
        for rows in named.split(max(1, CHUNK_ELEMENTS // (rows_per_block * widest))):
            visible = _visible(block_mask, b, h, rows, columns)
            visible = visible.repeat_interleave(rows_per_block, dim=0)
            at = rows[:, None] * rows_per_block + torch.arange(rows_per_block, device=rows.device)
            at = at.flatten()
            queries, d = q[b, h, at].float(), d_out[b, h, at].float()
            delta = (d * out[b, h, at].float()).sum(dim=-1) - d_lse[b, h, at]
            scores = (queries @ keys.T) * scale - lse[b, h, at, None]
            p = scores.masked_fill_(~visible, -torch.inf).exp_()
            dv_sum += p.T @ d
            p *= d @ values.T - delta[:, None]
            dk_sum += p.T @ queries
    for (b, kv_head, block), (dk_sum, dv_sum) in sums.items():
        columns = _columns(block_mask, block)
        dk[b, kv_head, columns] = (dk_sum * scale).to(dk.dtype)
        dv[b, kv_head, columns] = dv_sum.to(dv.dtype)
    return dk, dv


def _columns(block_mask: BlockMask, block: int) -> slice:
    size = block_mask.BLOCK_SIZE[1]
    return slice(block * size, min((block + 1) * size, block_mask.seq_lengths[1]))


def _visible(block_mask: BlockMask, b: int, h: int, rows: Tensor, columns: slice) -> Tensor:
    """bool (row blocks, columns): the rows of a block are those of one token, and see the same."""
    device = rows.device
    visible: Tensor = block_mask.mask_mod(
        torch.full((), b, device=device),
        torch.full((), h, device=device),
        rows[:, None] * block_mask.BLOCK_SIZE[0],
        torch.arange(columns.start, columns.stop, device=device),
    )
    return visible


def visible_cells(crowded: Crowded, block_mask: BlockMask) -> Tensor:
    """What is counted here: int64 (batch, heads, rows, columns), for small masks."""
    shape = (*block_mask.kv_num_blocks.shape[:2], *block_mask.seq_lengths)
    cells = torch.zeros(shape, dtype=torch.int64, device=crowded.left_out.device)
    size = block_mask.BLOCK_SIZE[0]
    for (b, h, block), rows in zip(crowded.places, crowded.rows):
        columns = _columns(block_mask, block)
        visible = _visible(block_mask, b, h, rows, columns).to(cells.dtype)
        for row in range(size):
            cells[b, h, :, columns].index_add_(0, rows * size + row, visible)
    return cells
