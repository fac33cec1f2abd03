"""The fine branch as Triton kernels: a tile of several tokens reads all that one of them chose.

::

    fine_forward       out and lse of a tile, block after block (A1, F1 to F4)
    fine_backward_q    dq of a tile, over the same list, and D = dO.out - d lse of its rows (A3)
    fine_backward_kv   dk and dv of a block from one part of its tokens, whose rows are gathered
    fine_sum_parts     dk and dv of a block from those of its parts, in order

A tile's rows are T tokens x G heads. Keys and values of a block are read once for all of them, and
each row of the product is cut by the bit that its token has in the entry (`fine_lists.py`). No sum
is an atomic one: two runs give the same bits.

Importing this module imports triton; `branches.py` does so when the kernels are to run.
Paper's letters: l' is a selection block, in tokens; G is a group's query heads that share a choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fast import fine_lists
from nsa_fast.block_lists import Chosen
from nsa_fast.checks import on_device
from nsa_fast.flex import Attention, FirstDerivativeOnly, wants_grad
from nsa_fast.triton_rows import dense, load_rows

LOG2_E = tl.constexpr(math.log2(math.e))

#: Warps and stages of a kernel.
OPTIONS = {"num_warps": 4, "num_stages": 2}
KV_OPTIONS = {"num_warps": 8, "num_stages": 2}
SUM_OPTIONS = {"num_warps": 4, "num_stages": 1}

#: What changes from call to call is no reason to compile again.
LENGTHS = ("q_len", "kv_len", "offset", "ahead", "slots", "pairs", "blocks")


# --- rows, columns, and who sees what -------------------------------------------------------------


@triton.jit
def _store(
    x: tl.tensor,
    real: tl.tensor,
    found: tl.tensor,
    D: tl.constexpr,
    FROM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The inverse of `load_rows`, rounded to the dtype of x."""
    number = FROM + tl.arange(0, WIDTH)
    tl.store(
        x[:, None] + number[None, :],
        found.to(x.dtype.element_ty),
        mask=real[:, None] & (number[None, :] < D),
    )


@triton.jit
def _last_seen(position: tl.tensor, ahead: tl.tensor, kv_len: tl.tensor) -> tl.tensor:
    """F1: the last key that a position sees in a block of its own; -1 if it sees none."""
    return tl.where(position >= 0, tl.minimum(position + ahead, kv_len - 1), -1)


@triton.jit
def _is_member(entry: tl.tensor, token: tl.tensor) -> tl.tensor:
    """F3: whether a token of the tile has chosen the block of an entry."""
    return ((entry >> token) & 1) != 0


@triton.jit
def _list_length(counts: tl.tensor, at: tl.tensor) -> tl.tensor:
    """How many blocks a tile has."""
    return tl.load(counts + at)


@triton.jit
def _part_stop(start: tl.tensor, end: tl.tensor, PART: tl.constexpr) -> tl.tensor:
    """Where a part of a block's tokens ends."""
    return tl.minimum(start + PART, end)


@triton.jit
def _parts_stop(part_ends: tl.tensor, number: tl.tensor) -> tl.tensor:
    """Where the parts of a block end."""
    return tl.load(part_ends + number + 1)


# --- out and lse ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def fine_forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    entries: tl.tensor,
    counts: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    o_batch: tl.tensor,
    o_head: tl.tensor,
    o_token: tl.tensor,
    heads: tl.tensor,
    q_len: tl.tensor,
    kv_len: tl.tensor,
    offset: tl.tensor,
    ahead: tl.tensor,
    slots: tl.tensor,
    scale_log2: tl.tensor,
    G: tl.constexpr,
    GP: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
) -> None:
    """out and lse of T tokens x G heads.

    ::

        grid         (tiles of T tokens, batch x heads)
        rows         T tokens x GP heads, GP being G or the next power of two
        columns      the keys of a block, then none, up to COLUMNS

    heads : kv heads, each with G query heads
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    row = tl.arange(0, T * GP)
    of_tile, of_group = row // GP, row % GP
    token = tile * T + of_tile
    real = (token < q_len) & (of_group < G)
    q_rows = q + batch * q_batch + (head * G + of_group).to(tl.int64) * q_head
    q_rows += token.to(tl.int64) * q_token
    q1 = load_rows(q_rows, real, D, 0, D1)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q_rows, real, D, D1, D2)
    last = _last_seen(token + offset, ahead, kv_len)
    k_rows = k + batch * k_batch + head.to(tl.int64) * k_head
    v_rows = v + batch * v_batch + head.to(tl.int64) * v_head
    place = tl.arange(0, COLUMNS)
    peak = tl.full((T * GP,), float("-inf"), tl.float32)
    total = tl.zeros((T * GP,), tl.float32)
    sums = tl.zeros((T * GP, VP), tl.float32)
    at = pair * tl.num_programs(0) + tile
    list_ = entries + at.to(tl.int64) * slots
    for i in tl.range(0, _list_length(counts, at)):
        entry = tl.load(list_ + i)
        key = (entry >> T) * BLOCK + place
        inside = (place < BLOCK) & (key < kv_len)
        at_key = key.to(tl.int64)
        s = tl.dot(q1, tl.trans(load_rows(k_rows + at_key * k_token, inside, D, 0, D1)),
                   input_precision="ieee")  # fmt: skip
        if D2 > 0:
            s = tl.dot(q2, tl.trans(load_rows(k_rows + at_key * k_token, inside, D, D1, D2)), s,
                       input_precision="ieee")  # fmt: skip
        member = _is_member(entry, of_tile)
        visible = member[:, None] & inside[None, :] & (key[None, :] <= last[:, None])
        s = tl.where(visible, s * scale_log2, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.math.exp2(s - shift[:, None])
        shrunk = tl.math.exp2(peak - shift)
        total = total * shrunk + tl.sum(p, axis=1)
        values = load_rows(v_rows + at_key * v_token, inside, V, 0, VP)
        sums = tl.dot(p.to(values.dtype), values, sums * shrunk[:, None], input_precision="ieee")
        peak = higher
    seen = total > 0
    whole = tl.where(seen, total, 1.0)
    o_rows = out + batch * o_batch + (head * G + of_group).to(tl.int64) * o_head
    _store(o_rows + token.to(tl.int64) * o_token, real, sums / whole[:, None], V, 0, VP)
    found = tl.where(seen, (peak + tl.math.log2(whole)) / LOG2_E, float("-inf"))
    tl.store(lse + (pair * G + of_group).to(tl.int64) * q_len + token, found, mask=real)


# --- gradients ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def fine_backward_q(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    d_out: tl.tensor,
    d_lse: tl.tensor,
    dq: tl.tensor,
    delta: tl.tensor,
    entries: tl.tensor,
    counts: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    o_batch: tl.tensor,
    o_head: tl.tensor,
    o_token: tl.tensor,
    d_batch: tl.tensor,
    d_head: tl.tensor,
    d_token: tl.tensor,
    g_batch: tl.tensor,
    g_head: tl.tensor,
    g_token: tl.tensor,
    heads: tl.tensor,
    q_len: tl.tensor,
    kv_len: tl.tensor,
    offset: tl.tensor,
    ahead: tl.tensor,
    slots: tl.tensor,
    scale: tl.tensor,
    G: tl.constexpr,
    GP: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
) -> None:
    """dq and delta = dO.out - d lse of T tokens x G heads; grid and rows as `fine_forward`.

    *_batch, *_head, *_token : strides of q, k, v, out, d_out and, named g, of dq
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    row = tl.arange(0, T * GP)
    of_tile, of_group = row // GP, row % GP
    token = tile * T + of_tile
    real = (token < q_len) & (of_group < G)
    q_head_at = (head * G + of_group).to(tl.int64)
    q_at = batch * q_batch + q_head_at * q_head + token.to(tl.int64) * q_token
    q1 = load_rows(q + q_at, real, D, 0, D1)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q + q_at, real, D, D1, D2)
    o_at = batch * o_batch + q_head_at * o_head + token.to(tl.int64) * o_token
    d_at = batch * d_batch + q_head_at * d_head + token.to(tl.int64) * d_token
    d = load_rows(d_out + d_at, real, V, 0, VP)
    row_at = (pair * G + of_group).to(tl.int64) * q_len + token
    row_delta = tl.sum(
        d.to(tl.float32) * load_rows(out + o_at, real, V, 0, VP).to(tl.float32), axis=1
    )
    row_delta -= tl.load(d_lse + row_at, mask=real, other=0.0)
    tl.store(delta + row_at, row_delta, mask=real)
    row_lse = tl.load(lse + row_at, mask=real, other=0.0)
    # a row that sees nothing has lse -inf, and no visible column
    shift = tl.where(row_lse == float("-inf"), 0.0, row_lse) * LOG2_E
    last = _last_seen(token + offset, ahead, kv_len)
    k_rows = k + batch * k_batch + head.to(tl.int64) * k_head
    v_rows = v + batch * v_batch + head.to(tl.int64) * v_head
    place = tl.arange(0, COLUMNS)
    dq1 = tl.zeros((T * GP, D1), tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros((T * GP, D2), tl.float32)
    at = pair * tl.num_programs(0) + tile
    list_ = entries + at.to(tl.int64) * slots
    for i in tl.range(0, _list_length(counts, at)):
        entry = tl.load(list_ + i)
        key = (entry >> T) * BLOCK + place
        inside = (place < BLOCK) & (key < kv_len)
        at_key = key.to(tl.int64)
        k1 = load_rows(k_rows + at_key * k_token, inside, D, 0, D1)
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        k2 = k1
        if D2 > 0:
            k2 = load_rows(k_rows + at_key * k_token, inside, D, D1, D2)
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
        member = _is_member(entry, of_tile)
        visible = member[:, None] & inside[None, :] & (key[None, :] <= last[:, None])
        p = tl.where(visible, tl.math.exp2(s * (scale * LOG2_E) - shift[:, None]), 0.0)
        values = load_rows(v_rows + at_key * v_token, inside, V, 0, VP)
        dp = tl.dot(d, tl.trans(values), input_precision="ieee")
        ds = (p * (dp - row_delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
    g_at = dq + batch * g_batch + q_head_at * g_head + token.to(tl.int64) * g_token
    _store(g_at, real, dq1 * scale, D, 0, D1)
    if D2 > 0:
        _store(g_at, real, dq2 * scale, D, D1, D2)


@triton.jit(do_not_specialize=LENGTHS)
def fine_backward_kv(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    d_out: tl.tensor,
    delta: tl.tensor,
    dk_parts: tl.tensor,
    dv_parts: tl.tensor,
    token_lists: tl.tensor,
    starts: tl.tensor,
    part_block: tl.tensor,
    part_ends: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    d_batch: tl.tensor,
    d_head: tl.tensor,
    d_token: tl.tensor,
    heads: tl.tensor,
    q_len: tl.tensor,
    kv_len: tl.tensor,
    offset: tl.tensor,
    ahead: tl.tensor,
    pairs: tl.tensor,
    blocks: tl.tensor,
    scale: tl.tensor,
    G: tl.constexpr,
    GP: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
) -> None:
    """dk and dv of a block, from the tokens of one part.

    ::

        grid         (parts,)
        rows         T of the block's tokens x GP heads, gathered
        dk_parts     float32 (parts, COLUMNS, D), not yet scaled; dv_parts (parts, COLUMNS, V)

    pairs : batch x heads    blocks : of one of them; they are numbered on from pair to pair
    """
    part = tl.program_id(0)
    number = tl.load(part_block + part)
    if number < pairs * blocks:
        pair, block = number // blocks, number % blocks
        batch, head = (pair // heads).to(tl.int64), pair % heads
        row = tl.arange(0, T * GP)
        of_tile, of_group = row // GP, row % GP
        q_head_at = (head * G + of_group).to(tl.int64)
        place = tl.arange(0, COLUMNS)
        key = block * BLOCK + place
        inside = (place < BLOCK) & (key < kv_len)
        at_key = key.to(tl.int64)
        k_at = k + batch * k_batch + head.to(tl.int64) * k_head + at_key * k_token
        k1 = load_rows(k_at, inside, D, 0, D1)
        k2 = k1
        if D2 > 0:
            k2 = load_rows(k_at, inside, D, D1, D2)
        v_at = v + batch * v_batch + head.to(tl.int64) * v_head + at_key * v_token
        values = load_rows(v_at, inside, V, 0, VP)
        dk1 = tl.zeros((COLUMNS, D1), tl.float32)
        dk2 = dk1
        if D2 > 0:
            dk2 = tl.zeros((COLUMNS, D2), tl.float32)
        dv = tl.zeros((COLUMNS, VP), tl.float32)
        start = tl.load(starts + number) + (part - tl.load(part_ends + number)) * PART
        stop = _part_stop(start, tl.load(starts + number + 1), PART)
        for first in tl.range(start, stop, T):
            at = first + of_tile
            real = (at < stop) & (of_group < G)
            token = tl.load(token_lists + at, mask=at < stop, other=0)
            at_token = token.to(tl.int64)
            q_at = q + batch * q_batch + q_head_at * q_head + at_token * q_token
            q1 = load_rows(q_at, real, D, 0, D1)
            s = tl.dot(k1, tl.trans(q1), input_precision="ieee")
            q2 = q1
            if D2 > 0:
                q2 = load_rows(q_at, real, D, D1, D2)
                s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")
            row_at = (pair * G + of_group).to(tl.int64) * q_len + at_token
            # a token that has chosen the block sees one of its keys: its lse is finite
            shift = tl.load(lse + row_at, mask=real, other=0.0) * LOG2_E
            row_delta = tl.load(delta + row_at, mask=real, other=0.0)
            last = tl.where(real, _last_seen(token + offset, ahead, kv_len), -1)
            visible = inside[:, None] & (key[:, None] <= last[None, :])
            p = tl.where(visible, tl.math.exp2(s * (scale * LOG2_E) - shift[None, :]), 0.0)
            d_at = d_out + batch * d_batch + q_head_at * d_head + at_token * d_token
            d = load_rows(d_at, real, V, 0, VP)
            dv = tl.dot(p.to(d.dtype), d, dv, input_precision="ieee")
            dp = tl.dot(values, tl.trans(d), input_precision="ieee")
            ds = (p * (dp - row_delta[None, :])).to(q1.dtype)
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
            if D2 > 0:
                dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
        every = place >= 0
        part_at = (part.to(tl.int64) * COLUMNS + place) * D
        _store(dk_parts + part_at, every, dk1, D, 0, D1)
        if D2 > 0:
            _store(dk_parts + part_at, every, dk2, D, D1, D2)
        _store(dv_parts + (part.to(tl.int64) * COLUMNS + place) * V, every, dv, V, 0, VP)


@triton.jit(do_not_specialize=LENGTHS)
def fine_sum_parts(
    x_parts: tl.tensor,
    x: tl.tensor,
    part_ends: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    heads: tl.tensor,
    kv_len: tl.tensor,
    blocks: tl.tensor,
    factor: tl.tensor,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
) -> None:
    """A gradient of a block's keys: the sum over its parts.

    ::

        grid         (blocks, batch x heads)
        x            factor times the sum, in its dtype; 0 for a block that nobody has chosen
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    place = tl.arange(0, COLUMNS)
    key = block * BLOCK + place
    inside = (place < BLOCK) & (key < kv_len)
    sums = tl.zeros((COLUMNS, DP), tl.float32)
    number = pair * blocks + block
    begin = tl.load(part_ends + number)
    of_part = x_parts + (begin.to(tl.int64) * COLUMNS + place) * D
    for _ in tl.range(begin, _parts_stop(part_ends, number)):
        sums += load_rows(of_part, inside, D, 0, DP)
        of_part += COLUMNS * D
    x_at = x + batch * x_batch + head.to(tl.int64) * x_head + key.to(tl.int64) * x_token
    _store(x_at, inside, sums * factor, D, 0, DP)


# --- launches -------------------------------------------------------------------------------------


def constants(head_dim: int, value_dim: int, block_size: int, group: int) -> dict[str, Any]:
    """What the kernels compile in.

    A head of head_dim numbers is D1, a power of two, and at most D2 more: 192 padded to 256 is a
    third more work.
    """
    low = max(16, triton.next_power_of_2(head_dim + 1) // 2)
    left = head_dim - low
    return {
        "G": group,
        "GP": fine_lists.padded_group(group),
        "T": fine_lists.tokens_per_tile(group),
        "BLOCK": block_size,
        "COLUMNS": max(16, triton.next_power_of_2(block_size)),
        "D": head_dim,
        "D1": low,
        "D2": max(16, triton.next_power_of_2(left)) if left > 0 else 0,
        "V": value_dim,
        "VP": max(16, triton.next_power_of_2(value_dim)),
    }


def attend(
    q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, *, ahead: int, scale: float
) -> Attention:
    """The fine branch: each token's heads read the blocks that it has chosen.

    q : (batch, q_heads, q_len, head_dim), any strides but on the last axis; k, v likewise
    chosen : (batch, kv_heads, q_len, slots)
    ahead : as `block_lists.chosen_blocks`
    """
    q, k, v = dense(q), dense(k), dense(v)
    if wants_grad(q, k, v):
        q, k, v = FirstDerivativeOnly.apply(q, k, v)
    with on_device(q.device):
        result: tuple[Tensor, Tensor] = _Fine.apply(q, k, v, chosen, ahead, scale)
    return Attention(*result)


class _Fine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, ahead: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, q_heads, q_len, head_dim = q.shape
        heads, kv_len, value_dim = v.shape[1:]
        compiled_in = constants(head_dim, value_dim, chosen.block_size, q_heads // heads)
        union = fine_lists.union(chosen, compiled_in["T"])
        # token by token, as the gates and the projection behind them read it
        out = q.new_empty((batch, q_len, q_heads, value_dim)).transpose(1, 2)
        lse = torch.empty((batch, q_heads, q_len), dtype=torch.float32, device=q.device)
        lengths = {
            "heads": heads,
            "q_len": q_len,
            "kv_len": kv_len,
            "offset": kv_len - q_len,
            "ahead": ahead,
        }
        tiles, slots = union.entries.shape[2:]
        fine_forward[tiles, batch * heads](
            q, k, v, out, lse, *union, *_strides(q, k, v, out),
            **lengths, slots=slots, scale_log2=scale * math.log2(math.e), **compiled_in, **OPTIONS,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, chosen.blocks, *union)
        ctx.how = chosen.num_blocks, lengths, scale, compiled_in
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        q, k, v, out, lse, chosen, entries, counts = ctx.saved_tensors
        num_blocks, lengths, scale, compiled_in = ctx.how
        pairs = q.shape[0] * lengths["heads"]
        d_out, d_lse = dense(d_out), d_lse.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        delta = torch.empty_like(lse)
        tiles, slots = entries.shape[2:]
        fine_backward_q[tiles, pairs](
            q, k, v, out, lse, d_out, d_lse, dq, delta, entries, counts,
            *_strides(q, k, v, out, d_out, dq),
            **lengths, slots=slots, scale=scale, **compiled_in, **OPTIONS,
        )  # fmt: skip
        if num_blocks == 0:
            return dq, dk, dv, None, None, None
        parts = fine_lists.parts(chosen, num_blocks)
        columns = compiled_in["COLUMNS"]
        dk_parts, dv_parts = (
            torch.empty(
                (len(parts.block), columns, x.shape[3]), dtype=torch.float32, device=q.device
            )
            for x in (k, v)
        )
        fine_backward_kv[(len(parts.block),)](
            q, k, v, lse, d_out, delta, dk_parts, dv_parts, *parts, *_strides(q, k, v, d_out),
            **lengths, pairs=pairs, blocks=num_blocks, scale=scale, PART=fine_lists.PART,
            **compiled_in, **KV_OPTIONS,
        )  # fmt: skip
        for found, x, factor in ((dk_parts, dk, scale), (dv_parts, dv, 1.0)):
            fine_sum_parts[num_blocks, pairs](
                found, x, parts.ends, *_strides(x),
                heads=lengths["heads"], kv_len=lengths["kv_len"], blocks=num_blocks, factor=factor,
                BLOCK=compiled_in["BLOCK"], COLUMNS=columns,
                D=x.shape[3], DP=max(16, triton.next_power_of_2(x.shape[3])), **SUM_OPTIONS,
            )  # fmt: skip
        return dq, dk, dv, None, None, None


def _strides(*tensors: Tensor) -> list[int]:
    """Batch, head and token of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
