"""The choice of blocks as Triton kernels: importance (I1 to I3), then the top n (I4 to I6).

::

    group_probabilities   p[t, i] = sum over the group's heads of exp(scale q.k_cmp[i] - lse)
    top_blocks            eq. 9 over p, forced blocks, and the n best blocks
    row_lse               the compress branch's lse, where nobody hands it over

Logits stay in registers. What lies in memory is p, one number for each token and window, for a
chunk of tokens at a time. Shapes alone decide what is launched, so the host never waits.

Importing this module imports triton; `selection.py` does so when the kernels are to run.
Paper's letters: l and d are windows and their stride, l' blocks, all in tokens; G is a group's
query heads that share a choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nsa_fast.selection import ROWS, SCORED, Sizes
from nsa_fast.triton_rows import dense, load_rows

#: p of one chunk of tokens: 2**27 float32 are 512 MiB.
CHUNK_ELEMENTS = 2**27
#: A grid's second axis has 65535 programs at most.
CHUNK_TOKENS = 2**15

#: Windows of one product. float32 is multiplied without tensor cores, which takes more registers.
WINDOWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}

PRODUCT_OPTIONS = {"num_warps": 4, "num_stages": 2}
CHOICE_OPTIONS = {"num_warps": 1, "num_stages": 1}

LOG2_E = tl.constexpr(math.log2(math.e))
LAST_BLOCK = tl.constexpr(2**31 - 1)

#: What changes from call to call is no reason to compile again.
LENGTHS = (
    *("first", "tokens", "q_len", "windows", "memory", "blocks", "offset", "first_end", "pairs"),
)


# --- rows of queries, and their products with windows ---------------------------------------------


@triton.jit
def _seen(
    position: tl.tensor,
    windows: tl.tensor,
    first_end: tl.tensor,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> tl.tensor:
    """C2: how many windows a position sees; always the first ones."""
    if CAUSAL:
        seen = tl.where(position >= first_end, (position - first_end) // STRIDE + 1, 0)
    else:
        seen = tl.where(position >= 0, windows, 0)
    return tl.minimum(seen, windows)


@triton.jit
def _columns(memory: tl.tensor, seen: tl.tensor) -> tl.tensor:
    """C3: what a softmax is over; memory is seen by all."""
    return memory + seen


@triton.jit
def _is_token(token: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """Whether a tile's token is one of the chunk's."""
    return token < tokens


@triton.jit
def _is_head(head: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """Whether a tile's head is one of the group's."""
    return head < G


@triton.jit
def _products(
    k: tl.tensor,
    real: tl.tensor,
    q1: tl.tensor,
    q2: tl.tensor,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
) -> tl.tensor:
    """k q^T, (windows, rows): so a token's heads lie in one thread's registers.

    D columns are D1, a power of two, and at most D2 more: 192 padded to 256 is a third more work.
    """
    s = tl.dot(load_rows(k, real, D, 0, D1), tl.trans(q1), input_precision="ieee")
    if D2 > 0:
        s = tl.dot(load_rows(k, real, D, D1, D2), tl.trans(q2), s, input_precision="ieee")
    return s


@triton.jit(do_not_specialize=LENGTHS)
def row_lse(
    q: tl.tensor,
    columns: tl.tensor,
    lse: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_window: tl.tensor,
    heads: tl.tensor,
    q_len: tl.tensor,
    memory: tl.tensor,
    windows: tl.tensor,
    offset: tl.tensor,
    first_end: tl.tensor,
    pairs: tl.tensor,
    scale_log2: tl.tensor,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    T: tl.constexpr,
    GP: tl.constexpr,
    BW: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """lse[b, h, t] = log of the sum of exp(scale q.k) over memory and the windows that t sees.

    ::

        grid         (tiles of T tokens x pairs,); the last tile, which sees most, first

    columns : memory, then the windows
    """
    pair = tl.program_id(0) % pairs
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // pairs
    batch, head = pair // heads, pair % heads
    row = tl.arange(0, T * GP)
    token, of_group = tile * T + row // GP, row % GP
    real = (token < q_len) & (of_group < G)
    q_rows = (
        q
        + batch.to(tl.int64) * q_batch
        + (head * G + of_group).to(tl.int64) * q_head
        + token.to(tl.int64) * q_token
    )
    q1 = load_rows(q_rows, real, D, 0, D1)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q_rows, real, D, D1, D2)
    seen = _columns(memory, _seen(token + offset, windows, first_end, STRIDE, CAUSAL))
    last = tl.minimum(tile * T + T, q_len) - 1 + offset
    reach = _columns(memory, _seen(last, windows, first_end, STRIDE, CAUSAL))
    k_rows = columns + batch.to(tl.int64) * k_batch + (head // SHARE).to(tl.int64) * k_head
    peak = tl.full((T * GP,), float("-inf"), tl.float32)
    total = tl.zeros((T * GP,), tl.float32)
    for start in tl.range(0, reach, BW):
        w = start + tl.arange(0, BW)
        s = _products(k_rows + w.to(tl.int64) * k_window, w < reach, q1, q2, D, D1, D2)
        s = tl.where(w[:, None] < seen[None, :], s * scale_log2, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.math.exp2(peak - shift)
        total += tl.sum(tl.math.exp2(s - shift[None, :]), axis=0)
        peak = higher
    found = (peak + tl.math.log2(tl.where(total > 0, total, 1.0))) / LOG2_E
    at = (pair * G + of_group).to(tl.int64) * q_len + token
    tl.store(lse + at, found, mask=real)


@triton.jit(do_not_specialize=LENGTHS)
def group_probabilities(
    q: tl.tensor,
    k_cmp: tl.tensor,
    lse: tl.tensor,
    p: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_window: tl.tensor,
    p_pair: tl.tensor,
    p_token: tl.tensor,
    heads: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    q_len: tl.tensor,
    windows: tl.tensor,
    offset: tl.tensor,
    first_end: tl.tensor,
    scale_log2: tl.tensor,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    T: tl.constexpr,
    GP: tl.constexpr,
    BW: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """p[t, i] = sum over the group's heads of exp(scale q.k_cmp[i] - lse), for tokens of a chunk.

    ::

        grid         (batch x heads, tiles of T tokens); the longest tiles first
        rows         T tokens x GP heads, GP being G or the next power of two
        p            a number for each window; those that a token does not see mean nothing

    heads : that choose; SHARE of them read one kv head, and each has G query heads
    """
    pair, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = pair // heads, pair % heads
    row = tl.arange(0, T * GP)
    token, of_group = tile * T + row // GP, row % GP
    real = _is_token(token, tokens) & _is_head(of_group, G)
    q_rows = (
        q
        + batch.to(tl.int64) * q_batch
        + (head * G + of_group).to(tl.int64) * q_head
        + (first + token).to(tl.int64) * q_token
    )
    q1 = load_rows(q_rows, real, D, 0, D1)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q_rows, real, D, D1, D2)
    at = (pair * G + of_group).to(tl.int64) * q_len + first + token
    shift = tl.load(lse + at, mask=real, other=0.0) * LOG2_E
    last = first + tl.minimum(tile * T + T, tokens) - 1 + offset
    reach = _seen(last, windows, first_end, STRIDE, CAUSAL)
    k_rows = k_cmp + batch.to(tl.int64) * k_batch + (head // SHARE).to(tl.int64) * k_head
    t = tile * T + tl.arange(0, T)
    p_rows = p + pair.to(tl.int64) * p_pair + t.to(tl.int64) * p_token
    written = _is_token(t, tokens)[None, :]
    for start in tl.range(0, reach, BW):
        w = start + tl.arange(0, BW)
        s = _products(k_rows + w.to(tl.int64) * k_window, w < windows, q1, q2, D, D1, D2)
        each = tl.math.exp2(s * scale_log2 - shift[None, :])
        if GP != G:
            each = tl.where(real[None, :], each, 0.0)
        of_token = tl.sum(tl.reshape(each, (BW, T, GP)), axis=2)
        tl.store(p_rows[None, :] + w[:, None], of_token, mask=written)


# --- from probabilities to blocks -----------------------------------------------------------------


@triton.jit
def _strides_shared(
    apart: tl.tensor, PER_BLOCK: tl.constexpr, PER_WINDOW: tl.constexpr
) -> tl.tensor:
    """Eq. 9: how many strides a window shares with a block that begins `apart` strides before it.

    There are so many m < l'/d and n < l/d with m - n = apart.
    """
    last = tl.minimum(PER_BLOCK - 1, apart + PER_WINDOW - 1)
    return tl.maximum(last - tl.maximum(apart, 0) + 1, 0)


@triton.jit
def _scores(
    p: tl.tensor,
    real: tl.tensor,
    seen: tl.tensor,
    block: tl.tensor,
    PER_BLOCK: tl.constexpr,
    PER_BLOCK_P: tl.constexpr,
    PER_WINDOW: tl.constexpr,
    AT_END: tl.constexpr,
) -> tl.tensor:
    """I2: the scores of blocks, (rows, blocks)."""
    # windows aligned at their end are counted from the stride in which they end
    ahead = 0
    if AT_END:
        ahead = PER_WINDOW - 1
    m = tl.arange(0, PER_BLOCK_P)
    w = block[:, None] * PER_BLOCK + m[None, :]
    within = (m[None, :] < PER_BLOCK)[None, :, :] & (w[None, :, :] < seen[:, None, None])
    x = tl.load(p[:, None, None] + w[None, :, :], mask=within & real[:, None, None], other=0.0)
    share = _strides_shared(m - ahead, PER_BLOCK, PER_WINDOW).to(tl.float32)
    score = tl.sum(x * share[None, None, :], axis=2)
    # and the windows beside the block's own that reach into it
    for beside in tl.range(1, PER_WINDOW):
        place = -beside
        if AT_END:
            place = PER_BLOCK - 1 + beside
        v = block * PER_BLOCK + place
        reaching = (v >= 0)[None, :] & (v[None, :] < seen[:, None]) & real[:, None]
        y = tl.load(p[:, None] + v[None, :], mask=reaching, other=0.0)
        score += y * _strides_shared(place - ahead, PER_BLOCK, PER_WINDOW).to(tl.float32)
    return score


@triton.jit
def _is_forced(block: tl.tensor, own: tl.tensor, initial: tl.tensor, local: tl.tensor) -> tl.tensor:
    """I4: initial blocks, and the own one with those before it."""
    return (block < initial) | ((block > own - local) & (block <= own))


@triton.jit
def _behind(block: tl.tensor) -> tl.tensor:
    """I5: of two blocks of one score the lower index has the larger number."""
    return block ^ LAST_BLOCK


@triton.jit
def _candidates(
    position: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr, CAUSAL: tl.constexpr
) -> tl.tensor:
    """I4: how many blocks begin at or before a position; always the first ones."""
    if CAUSAL:
        return tl.where(position >= 0, tl.minimum(position // BLOCK + 1, blocks), 0)
    else:
        return tl.zeros_like(position) + blocks


@triton.jit(do_not_specialize=(*LENGTHS, "initial", "local", "forced_score", "floor"))
def top_blocks(
    p: tl.tensor,
    chosen: tl.tensor,
    p_pair: tl.tensor,
    p_token: tl.tensor,
    first: tl.tensor,
    tokens: tl.tensor,
    q_len: tl.tensor,
    windows: tl.tensor,
    blocks: tl.tensor,
    offset: tl.tensor,
    first_end: tl.tensor,
    initial: tl.tensor,
    local: tl.tensor,
    forced_score: tl.tensor,
    floor: tl.tensor,
    N: tl.constexpr,
    NP: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PER_BLOCK_P: tl.constexpr,
    PER_WINDOW: tl.constexpr,
    AT_END: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN_EXTRA: tl.constexpr,
) -> None:
    """The n blocks of the highest score, best first, then -1 (I4 to I6).

    ::

        grid         (batch x heads, tiles of R tokens); the longest tiles first
        a step       the scores of B blocks as keys of 64 bits, the best NP of them, and of these
                     and the best so far the best NP; NP is n or the next power of two

    forced_score : of a forced block, summed over the group     floor : what is not above it is out
    """
    pair, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    token = tile * R + tl.arange(0, R)
    real = _is_token(token, tokens)
    position = first + token + offset
    own = tl.where(position >= 0, position // BLOCK, -1)
    seen = _seen(position, windows, first_end, STRIDE, CAUSAL)
    rows = p + pair.to(tl.int64) * p_pair + token.to(tl.int64) * p_token
    last = first + tl.minimum(tile * R + R, tokens) - 1 + offset
    begun = _candidates(position, blocks, BLOCK, CAUSAL)
    reach = _candidates(last, blocks, BLOCK, CAUSAL)
    best = tl.full((R, NP), -1, tl.int64)
    for start in tl.range(0, reach, B):
        block = start + tl.arange(0, B)
        score = _scores(rows, real, seen, block, PER_BLOCK, PER_BLOCK_P, PER_WINDOW, AT_END)
        score = tl.where(score >= 0, score, float("inf"))  # NaN
        candidate = block[None, :] < begun[:, None]
        if OWN_EXTRA and CAUSAL:
            candidate = candidate & (block[None, :] != own[:, None])
        forced = _is_forced(block[None, :], own[:, None], initial, local)
        score = tl.where(forced, forced_score, score)
        # no score is negative, and such numbers are in the order of their bits
        key = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | _behind(block)[None, :]
        key = tl.where(candidate & (score > floor), key, -1)
        both = tl.join(best, tl.topk(key, NP, dim=1))
        best = tl.topk(tl.reshape(both, (R, 2 * NP)), NP, dim=1)
    index = tl.where(best < 0, -1, _behind(best & LAST_BLOCK))
    slot = tl.arange(0, NP)
    at = (pair.to(tl.int64) * q_len + first + token) * N
    tl.store(chosen + at[:, None] + slot[None, :], index, mask=real[:, None] & (slot[None, :] < N))


# --- launches -------------------------------------------------------------------------------------


def product_constants(
    dtype: torch.dtype, head_dim: int, *, heads: int, kv_heads: int, group: int
) -> dict[str, Any]:
    """What `row_lse` and `group_probabilities` compile in of q and the heads that choose."""
    padded = triton.next_power_of_2(group)
    low = max(16, triton.next_power_of_2(head_dim + 1) // 2)
    left = head_dim - low
    return {
        "G": group,
        "GP": padded,
        "SHARE": heads // kv_heads,
        "T": ROWS[dtype] // padded,
        "BW": WINDOWS[dtype],
        "D": head_dim,
        "D1": low,
        "D2": max(16, triton.next_power_of_2(left)) if left > 0 else 0,
    }


def choice_constants(sizes: Sizes, n: int) -> dict[str, Any]:
    """What `top_blocks` compiles in."""
    per_block = sizes.strides_per_block
    slots = max(2, triton.next_power_of_2(n))
    step = max(1, SCORED // triton.next_power_of_2(per_block))
    blocks = min(step, triton.next_power_of_2(sizes.num_blocks))
    return {
        "N": n,
        "NP": slots,
        "B": max(slots, blocks),
        # few blocks leave room for several tokens
        "R": max(1, step // max(slots, blocks)),
        "PER_BLOCK": per_block,
        "PER_BLOCK_P": triton.next_power_of_2(per_block),
        "PER_WINDOW": sizes.windows.size // sizes.windows.stride,
        "AT_END": sizes.semantics.compress_alignment == "end",
        "BLOCK": sizes.block_size,
        "OWN_EXTRA": sizes.semantics.own_block_extra,
    }


def choose(
    q: Tensor, k_cmp: Tensor, mem_k: Tensor, lse: Tensor | None, sizes: Sizes, scale: float
) -> Tensor:
    """The chosen blocks, as `selection.select_blocks` returns them.

    lse : (batch, q_heads, q_len), the compress branch's; None for one of our own
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, num_windows = k_cmp.shape[1:3]
    windows, semantics = sizes.windows, sizes.semantics
    heads = kv_heads if semantics.share_selection else q_heads
    pairs, group = batch * heads, q_heads // heads
    n = min(sizes.num_selected, sizes.num_blocks)

    q, k_cmp = dense(q), dense(k_cmp)
    of_product = product_constants(q.dtype, head_dim, heads=heads, kv_heads=kv_heads, group=group)
    of_choice = choice_constants(sizes, n)
    seen = {"STRIDE": windows.stride, "CAUSAL": semantics.causal}
    lengths = {
        "q_len": q_len,
        "windows": num_windows,
        "offset": sizes.kv_len - q_len,
        "first_end": windows.seen_from(0),
    }
    scale_log2 = scale * math.log2(math.e)
    per_product = of_product["T"]

    if lse is None:
        columns = torch.cat([mem_k, k_cmp], dim=2) if mem_k.shape[2] else k_cmp
        lse = torch.empty((batch, q_heads, q_len), dtype=torch.float32, device=q.device)
        row_lse[(pairs * triton.cdiv(q_len, per_product),)](
            q, columns, lse, *q.stride()[:3], *columns.stride()[:3],
            heads=heads, pairs=pairs, memory=mem_k.shape[2], scale_log2=scale_log2,
            **lengths, **of_product, **seen, **PRODUCT_OPTIONS,
        )  # fmt: skip
    lse = lse.to(torch.float32).contiguous()

    width = triton.cdiv(num_windows, of_product["BW"]) * of_product["BW"]
    room = max(per_product, CHUNK_ELEMENTS // (pairs * max(1, width)))
    most = min(q_len, room, CHUNK_TOKENS)
    p = torch.empty((pairs, most, width), dtype=torch.float32, device=q.device)
    chosen = torch.empty((batch, heads, q_len, n), dtype=torch.int64, device=q.device)
    forced = {"initial": sizes.num_initial, "local": sizes.num_local}
    if semantics.own_block_extra:
        forced = {"initial": 0, "local": 0}
    floor = -1.0 if semantics.score_floor is None else semantics.score_floor
    for first in range(0, q_len, most):
        tokens = min(most, q_len - first)
        if num_windows:
            group_probabilities[pairs, triton.cdiv(tokens, per_product)](
                q, k_cmp, lse, p, *q.stride()[:3], *k_cmp.stride()[:3], *p.stride()[:2],
                heads=heads, first=first, tokens=tokens, scale_log2=scale_log2,
                **lengths, **of_product, **seen, **PRODUCT_OPTIONS,
            )  # fmt: skip
        top_blocks[pairs, triton.cdiv(tokens, of_choice["R"])](
            p, chosen, *p.stride()[:2],
            first=first, tokens=tokens, blocks=sizes.num_blocks, **lengths,
            **forced, forced_score=semantics.forced_score * group, floor=floor,
            **of_choice, **seen, **CHOICE_OPTIONS,
        )  # fmt: skip
    missing = sizes.num_selected - n
    return F.pad(chosen, (0, missing), value=-1) if missing else chosen
