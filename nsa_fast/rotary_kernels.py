"""Rotary embedding as a Triton kernel (G2): each number is read once and written once.

::

    turned_pairs   pairs of neighbouring channels, turned, or turned back: (a, b) becomes
                   (a cos - b sin, a sin + b cos), with the other sign of sin where BACK

A turn has the turn back as its gradient, and that one this one: derivatives of any order are the
same kernel. In torch it is three launches: a copy in float32, a product of complex numbers, a copy
in the dtype. Importing this module imports triton; `layer.py` does so when the kernel is to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fast.checks import on_device
from nsa_fast.layouts import tokens_first
from nsa_fast.triton_rows import dense

#: The most numbers of a program; a power of two.
NUMBERS = 4096

#: What changes from call to call is no reason to compile again.
LENGTHS = ("heads", "tokens")


@triton.jit
def _split(x: tl.tensor, NUMBERS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Every other number, from the first and from the second on, in float32."""
    first, second = tl.split(tl.reshape(x, (NUMBERS // 2, 2)))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(do_not_specialize=LENGTHS)
def turned_pairs(
    x: tl.tensor,
    turns: tl.tensor,
    out: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    heads: tl.tensor,
    tokens: tl.tensor,
    D: tl.constexpr,
    NUMBERS: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """NUMBERS numbers of a token, whose heads follow each other.

    ::

        grid       (batch x tokens, tiles of NUMBERS)
        x          (batch, heads, tokens, D)
        turns      (tokens, D), float32: cos and sin of each pair side by side
        out        (batch, tokens, heads, D), contiguous
    """
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    place = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    head, number = place // D, place % D
    real = head < heads
    x_at = x + batch * x_batch + token * x_token + head.to(tl.int64) * x_head + number
    a, b = _split(tl.load(x_at, mask=real, other=0.0), NUMBERS)
    cos, sin = _split(tl.load(turns + token * D + number, mask=real, other=0.0), NUMBERS)
    if BACK:
        sin = -sin
    found = tl.interleave(a * cos - b * sin, a * sin + b * cos)
    out_at = out + row.to(tl.int64) * (heads * D) + place
    tl.store(out_at, found.to(out.dtype.element_ty), mask=real)


# --- launches -------------------------------------------------------------------------------------


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of neighbouring channels, turned, as `rotary.rotate` turns them (G2).

    x : (batch, heads, tokens, dim), dim even, not empty; float32, bfloat16 or float16, any strides
    turns : complex64 (tokens, dim / 2)
    returns : as x; computed in float32 and rounded once. A token's heads stand side by side, as a
        projection leaves them
    """
    with on_device(x.device):
        result: Tensor = _Rotated.apply(x, torch.view_as_real(turns).contiguous(), False)
    return result


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(turns)
        ctx.back = back
        return turned(dense(x), turns, back)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        (turns,) = ctx.saved_tensors
        return _Rotated.apply(d, turns, not ctx.back), None, None


def turned(x: Tensor, turns: Tensor, back: bool) -> Tensor:
    """One launch; the numbers of x's last axis stand side by side."""
    batch, heads, tokens, dim = x.shape
    out = x.new_empty((batch, tokens, heads, dim))
    compiled_in = constants(heads, dim)
    turned_pairs[batch * tokens, triton.cdiv(heads * dim, compiled_in["NUMBERS"])](
        x, turns, out, *x.stride()[:3], heads, tokens, **compiled_in, BACK=back
    )
    return tokens_first(out)


def constants(heads: int, dim: int) -> dict[str, int]:
    """What the kernel compiles in, beside the direction."""
    return {"D": dim, "NUMBERS": min(NUMBERS, triton.next_power_of_2(heads * dim))}
