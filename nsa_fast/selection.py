"""Which blocks the fine branch reads: importance (I1 to I3) and the top n (I4 to I6).

Paper's letters: l = compress_block_size, d = compress_block_sliding_stride,
l' = selection_block_size, n = num_selected_blocks. FlexAttention cannot hand its probabilities out,
so q and k_cmp are multiplied a second time here, without gradients (A4): on CUDA by the kernels of
`selection_kernels.py`, else, and where those do not serve, by torch in chunks of queries.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from nsa_fast.branches import default_scale
from nsa_fast.checks import (
    check_alike,
    check_device,
    check_floating,
    check_group,
    check_inside_mode,
    check_kind,
    check_length,
    check_size,
    check_stride_divides,
    check_tensor,
    check_untransformed,
    on_device,
    without_autocast,
)
from nsa_fast.flex import is_triton
from nsa_fast.windows import Windows
from nsa_ref.semantics import PAPER, Semantics

#: Scores of one chunk of queries: 2**28 float32 are 1 GiB, and a chunk is some fifty launches. A
#: CPU is several times as fast with chunks that fit into its cache.
CHUNK_ELEMENTS = 2**28
CPU_CHUNK_ELEMENTS = 2**20

#: Types of devices that multiply 16-bit numbers as they are and can return the sums in float32.
SUMS_IN_FLOAT32 = {"cuda"}

#: What the Triton kernels hold in registers and shared memory of sm_90: columns of q; rows of a
#: product, a token's heads being side by side in one; and probabilities, of which a program of
#: `top_blocks` reads all strides of at least n blocks at a time.
MOST_DIM = 256
ROWS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}
SCORED = 1024
MOST_CHOSEN = 128

#: The logit of one more column, before the blocks: a row without any block goes there (I3).
PAD_LOGIT = -1e3


class Sizes(NamedTuple):
    """What a choice depends on beside q and k_cmp."""

    kv_len: int
    windows: Windows
    num_windows: int
    block_size: int
    num_blocks: int
    num_selected: int
    num_initial: int
    num_local: int

    @property
    def semantics(self) -> Semantics:
        return self.windows.semantics

    @property
    def strides_per_block(self) -> int:
        return self.block_size // self.windows.stride

    @property
    def num_complete(self) -> int:
        """I3: how many selection blocks have all their windows; always the first ones."""
        return self.num_windows // self.strides_per_block


@_disable_dynamo
@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    mem_k: Tensor | None = None,
    *,
    kv_len: int,
    compress_block_size: int,
    compress_block_sliding_stride: int,
    selection_block_size: int,
    num_selected_blocks: int,
    num_initial_blocks: int = 1,
    num_local_blocks: int = 2,
    semantics: Semantics = PAPER,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The n selection blocks of the highest importance, for every query (I1 to I6).

    ::

        overlap      score[b] = sum over the group's heads and windows i of
                     p_cmp[i] * (strides that window i and block b share)          eq. 9 and 10
        logit_mean   mean over the group's heads and block b's windows of scale q.k_cmp, which has
                     the order of its softmax, the score
        choice       the n highest of the blocks that begin at or before p; initial and local
                     blocks at forced_score a query head; equal scores go to the lower index

    Computed in float32, or float64 for float64 inputs, under torch.autocast as well.

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim)
    k_cmp : (batch, kv_heads, blocks, head_dim), the blocks that C1 makes of kv_len tokens
    mem_k : (batch, kv_heads, num_mem_kv, head_dim), or None for none; part of the softmax
    scale : a finite number, no tensor; default head_dim ** -0.5
    lse : (batch, q_heads, q_len), what `compress_attention` returned for these q, k_cmp, mem_k,
        semantics and scale: the kernels need not compute it again. None where there is none
    returns : int64 (batch, heads, q_len, n), best first, then -1 in unused slots; heads =
        kv_heads, or q_heads without share_selection

    Raises
    ------
    ValueError : shapes or sizes that do not fit; a stride that does not divide
        selection_block_size or, for "overlap", compress_block_size
    TypeError : sizes that are no integers, dtypes that differ
    """
    check_kind(semantics)
    kv_len = check_length("kv_len", kv_len)
    windows = Windows.checked(compress_block_size, compress_block_sliding_stride, semantics)
    block_size = check_size("selection_block_size", selection_block_size, 1)
    sizes = Sizes(
        kv_len=kv_len,
        windows=windows,
        num_windows=windows.count(kv_len),
        block_size=block_size,
        num_blocks=-(-kv_len // block_size),
        num_selected=check_size("num_selected_blocks", num_selected_blocks, 0),
        num_initial=check_size("num_initial_blocks", num_initial_blocks, 0),
        num_local=check_size("num_local_blocks", num_local_blocks, 0),
    )
    check_stride_divides("selection_block_size", block_size, windows.stride)
    if semantics.importance == "overlap":
        check_stride_divides("compress_block_size", windows.size, windows.stride)
    check_tensor("q", q, ("batch", "q_heads", "q_len", "head_dim"))
    batch, q_heads, q_len, head_dim = q.shape
    check_floating("q", q)
    check_size("the last axis of q", head_dim, 1)
    factor = default_scale(scale, q)
    check_tensor("k_cmp", k_cmp, (batch, "kv_heads", sizes.num_windows, head_dim))
    kv_heads = k_cmp.shape[1]
    check_group(q_heads, kv_heads)
    check_alike(q=q, k_cmp=k_cmp)
    for name, tensor in (("q", q), ("k_cmp", k_cmp)):
        check_inside_mode(name, tensor)
    if mem_k is None:
        mem_k = k_cmp[:, :, :0]
    check_tensor("mem_k", mem_k, (batch, kv_heads, "num_mem_kv", head_dim))
    check_alike(q=q, mem_k=mem_k)
    given = {"q": q, "k_cmp": k_cmp, "mem_k": mem_k}
    if lse is not None:
        given["lse"] = check_tensor("lse", lse, (batch, q_heads, q_len))
        of_sums = torch.float64 if q.dtype == torch.float64 else torch.float32
        if lse.dtype != of_sums:
            raise TypeError(f"lse has dtype {lse.dtype}; for q of {q.dtype} it must be {of_sums}.")
        check_device("lse", lse, "q", q)
    for name, tensor in given.items():
        check_untransformed(name, tensor)
        check_inside_mode(name, tensor)

    heads = kv_heads if semantics.share_selection else q_heads
    shape: tuple[int, ...] = (batch, heads, q_len, sizes.num_selected)
    if math.prod(shape) == 0 or sizes.num_blocks == 0:
        return _unused(shape, q.device, sizes)
    if is_triton(q.device) and not why_not_in_triton(q, q_heads // heads, sizes):
        from nsa_fast import selection_kernels

        with on_device(q.device):
            return selection_kernels.choose(q, k_cmp, mem_k, lse, sizes, factor)
    chosen = _unused(shape, q.device, sizes)
    memory = mem_k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    product_dtype = q.dtype if q.device.type in SUMS_IN_FLOAT32 else dtype
    widened = product_dtype != dtype
    columns = torch.cat([mem_k, k_cmp], dim=2).to(product_dtype).transpose(-1, -2).flatten(0, 1)
    slices = list(chunks(q, max(columns.shape[-1], sizes.num_blocks)))
    # one for all chunks: new pages for each would cost as much as the softmax
    largest = batch * q_heads * slices[0].stop * columns.shape[-1]
    buffers = columns.new_empty((1 if widened else 2, largest), dtype=dtype)
    with without_autocast(q.device):
        for rows in slices:
            first, last = rows.start + kv_len - q_len, rows.stop - 1 + kv_len - q_len
            num_blocks, num_windows = _within_reach(last, sizes)
            if num_blocks == 0:
                continue
            position = torch.arange(first, last + 1, device=q.device)
            needed = memory + num_windows
            # (batch, heads, heads that share, rows, memory and windows)
            shape = (batch, heads, q_heads // heads, len(position), needed)
            p_cmp, *free = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            part = q[:, :, rows].to(product_dtype).reshape(len(columns), -1, head_dim)
            if widened:  # torch 2.11 knows no shapes of such a product with `out`
                logits = torch.bmm(part, columns[..., :needed], out_dtype=dtype).view(shape)
            else:
                (logits,) = free
                product = logits.view(*part.shape[:2], needed)
                torch.bmm(part, columns[..., :needed], out=product)
            logits.mul_(factor)
            best = _best(sizes, logits, p_cmp, position, first, memory, num_blocks)
            chosen[:, :, rows, : best.shape[-1]] = best
            del logits  # before the next chunk's
    return chosen


def _unused(shape: tuple[int, ...], device: torch.device, sizes: Sizes) -> Tensor:
    """A choice of no block; ValueError where there is no room for so many slots."""
    try:
        return torch.full(shape, -1, dtype=torch.int64, device=device)
    except RuntimeError as error:
        raise ValueError(
            f"num_selected_blocks={sizes.num_selected}: a choice of shape {shape} takes "
            f"{math.prod(shape) * 8 / 2**30:.1f} GiB, for which there is no room. There are "
            f"{sizes.num_blocks} blocks to choose from."
        ) from error


def why_not_in_triton(q: Tensor, group: int, sizes: Sizes) -> str:
    """What keeps `selection_kernels` from making this choice, in words; empty if nothing does.

    group : query heads that share a choice
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if sizes.semantics.importance != "overlap":
        return f"importance={sizes.semantics.importance!r} has another score than eq. 9's"
    if q.dtype == torch.float64:
        return "torch.float64 has no tensor cores, and the kernels add up in float32"
    chosen, strides = min(sizes.num_selected, sizes.num_blocks), sizes.strides_per_block
    for what, count, most in (
        ("head_dim", q.shape[3], MOST_DIM),
        ("query heads that share a choice", group, ROWS[q.dtype]),
        ("blocks chosen", chosen, MOST_CHOSEN),
        ("blocks chosen times strides of a block", chosen * strides, SCORED),
    ):
        if count > most:
            return f"{what}: {count} is more than the {most} that fit on an SM"
    return ""


def chunks(q: Tensor, columns: int) -> Iterator[slice]:
    """Slices of the queries whose scores are CHUNK_ELEMENTS at most, or a query each."""
    batch, q_heads, q_len, _ = q.shape
    most = CPU_CHUNK_ELEMENTS if q.device.type == "cpu" else CHUNK_ELEMENTS
    rows = max(1, most // (batch * q_heads * columns))
    for start in range(0, q_len, rows):
        yield slice(start, min(start + rows, q_len))


def _within_reach(position: int, sizes: Sizes) -> tuple[int, int]:
    """Blocks that a query up to `position` can choose, and the windows that score them.

    All others are left out of everything: half of the work where nothing lies ahead.
    """
    if not sizes.semantics.causal:
        return sizes.num_blocks, sizes.num_windows
    blocks = min(sizes.num_blocks, max(0, position // sizes.block_size + 1))
    if sizes.semantics.importance == "overlap":
        return blocks, _num_seen(position, sizes)
    return blocks, min(sizes.num_windows, blocks * sizes.strides_per_block)


def _num_seen(position: int, sizes: Sizes) -> int:
    """Windows that a query at `position` sees, if it is causal (C2)."""
    return min(sizes.num_windows, max(0, sizes.windows.num_seen(position)))


def _best(
    sizes: Sizes,
    logits: Tensor,
    p_cmp: Tensor,
    position: Tensor,
    first: int,
    memory: int,
    num_blocks: int,
) -> Tensor:
    """I4 to I6 for the rows from p = first on: (batch, heads, rows, at most n), -1 if unused.

    p_cmp : room for as many numbers as logits
    """
    semantics = sizes.semantics
    candidates, forced = _candidates(position, num_blocks, sizes)
    # most windows are seen by all rows, and need no mask
    seen_by_all = _num_seen(first, sizes) if semantics.causal else 0
    visible = _visible(position, slice(seen_by_all, logits.shape[-1] - memory), sizes)
    if semantics.importance == "overlap":
        logits[..., memory + seen_by_all :].masked_fill_(~visible, -torch.inf)
        torch.softmax(logits, dim=-1, out=p_cmp)
        if memory + seen_by_all == 0:  # of a row that sees nothing the softmax is NaN
            p_cmp.masked_fill_(~visible.any(dim=-1, keepdim=True), 0)
        scores = _overlap_scores(p_cmp[..., memory:], num_blocks, sizes)
        # every query head that shares the choice counts a forced block as forced_score
        of_forced = semantics.forced_score * logits.shape[2]
        quantity, ranked = scores, scores.masked_fill(forced, of_forced)
    else:
        visible = F.pad(visible, (seen_by_all, 0), value=True)
        scores = _logit_means(logits[..., memory:], visible, candidates, sizes)
        padded = F.pad(scores, (1, 0), value=PAD_LOGIT)
        quantity, of_forced = padded.softmax(dim=-1)[..., 1:], semantics.forced_score
        # where a block's probability would be forced_score
        forced_rank = math.log(semantics.forced_score) + padded.logsumexp(dim=-1, keepdim=True)
        ranked = torch.where(forced, forced_rank, scores)

    # candidates stand before all others, whatever their scores: -inf becomes the least number
    ranked = ranked.nan_to_num(nan=torch.inf).masked_fill(~candidates, -torch.inf)
    best = _highest(ranked, min(sizes.num_selected, num_blocks))
    valid = candidates.expand_as(ranked).gather(-1, best)
    if semantics.score_floor is not None:
        quantity = quantity.masked_fill(forced, of_forced)
        valid = valid & (quantity.gather(-1, best) > semantics.score_floor)
    return torch.where(valid, best, -1)


def _highest(scores: Tensor, n: int) -> Tensor:
    """The n highest along the last axis, best first; of equal ones those with the lower index.

    topk does not say which of equal ones it takes, and sorting all takes longer than the logits.
    """
    cutoff = scores.topk(n).values[..., -1:]
    above, level = scores > cutoff, scores == cutoff
    room = n - above.sum(dim=-1, keepdim=True)
    taken = above | (level & (level.cumsum(dim=-1) <= room))
    descending = torch.arange(scores.shape[-1], 0, -1, device=scores.device)
    best = torch.where(taken, descending, 0).topk(n).indices
    order = scores.gather(-1, best).sort(dim=-1, descending=True, stable=True).indices
    return best.gather(-1, order)


def _candidates(position: Tensor, num_blocks: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Which blocks may be chosen, and which of them are forced: bool (rows, blocks)."""
    semantics = sizes.semantics
    block = torch.arange(num_blocks, device=position.device)
    own = (position // sizes.block_size)[:, None]
    candidates = torch.ones((len(position), num_blocks), dtype=torch.bool, device=block.device)
    if semantics.causal:
        candidates = block * sizes.block_size <= position[:, None]
    own_excluded = semantics.causal and semantics.own_block_extra
    if semantics.importance == "logit_mean":
        candidates = candidates & (block < sizes.num_complete)
        own_excluded = own_excluded or sizes.strides_per_block != 1
    if own_excluded:
        candidates = candidates & (block != own)
    if semantics.own_block_extra:
        return candidates, torch.zeros_like(candidates)
    local = (block > own - sizes.num_local) & (block <= own)
    return candidates, candidates & ((block < sizes.num_initial) | local)


def _visible(position: Tensor, blocks: slice, sizes: Sizes) -> Tensor:
    """C2: bool (rows, blocks)."""
    if not sizes.semantics.causal:
        return (position >= 0)[:, None].expand(-1, blocks.stop - blocks.start)
    block = torch.arange(blocks.start, blocks.stop, device=position.device)
    return sizes.windows.sees(position[:, None], block)


def _overlap_scores(p_cmp: Tensor, num_blocks: int, sizes: Sizes) -> Tensor:
    """Eq. 9 and 10: (batch, heads, rows, blocks)."""
    p_cmp, num_windows = p_cmp.sum(dim=2), p_cmp.shape[-1]
    # Eq. 9 from 0: the sum of p_cmp over l'/d b + m - n - f, with m < l'/d and n < l/d, for windows
    # that cover l/d strides from stride i + f on: 0 in eq. 9, else where window 0 begins (C1).
    windows = sizes.windows
    per_block, per_window = sizes.strides_per_block, windows.size // windows.stride
    before = per_window - 1 + windows.first_token(0) // windows.stride
    if num_blocks == 1:  # which may be longer than all that there is
        per_block = min(per_block, num_windows + before)
    total_strides = num_blocks * per_block
    after = total_strides + per_window - 1 - before - num_windows
    padded = F.pad(p_cmp, (before, after))
    over_windows = padded[..., :total_strides].clone()
    for n in range(1, per_window):
        over_windows += padded[..., n : n + total_strides]
    return over_windows.unflatten(-1, (num_blocks, per_block)).sum(dim=-1)


def _logit_means(logits: Tensor, visible: Tensor, candidates: Tensor, sizes: Sizes) -> Tensor:
    """I3: (batch, heads, rows, blocks), -inf where a block is no candidate."""
    strides, num_blocks = sizes.strides_per_block, candidates.shape[-1]
    complete = min(sizes.num_complete, num_blocks)
    logits = logits[..., : complete * strides].masked_fill(~visible[:, : complete * strides], 0)
    terms = logits.shape[2] * strides
    total = logits.sum(dim=2).unflatten(-1, (complete, strides)).sum(dim=-1)
    shown = visible[:, : complete * strides].unflatten(-1, (complete, strides)).sum(dim=-1)
    hidden = 1 - shown.to(total.dtype) / strides
    # the share of invisible ones times their logit: the plain sum would overflow
    means = total / terms + hidden * (torch.finfo(total.dtype).min / 10)
    means = F.pad(means, (0, num_blocks - complete), value=-torch.inf)
    return means.masked_fill(~candidates, -torch.inf)
