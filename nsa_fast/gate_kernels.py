"""Gates and merge of the branches as Triton kernels (eq. 5): each number is read once.

::

    gated_sum            out[b, t, h] = sum over branches of sigmoid(logit) x[b, h, t]
    gated_sum_backward   the gradients of x and of the logits, from the same numbers

In torch the same is a copy of each branch in float32, forward and backward. Importing this module
imports triton; `layer.py` does so when the kernels are to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fast.checks import on_device
from nsa_fast.flex import FirstDerivativeOnly, wants_grad
from nsa_fast.triton_rows import dense

#: Numbers of a program: rows x value_dim.
NUMBERS = 4096

#: What changes from call to call is no reason to compile again.
LENGTHS = ("rows", "q_len")


@triton.jit
def _gate(
    logits: tl.tensor, row: tl.tensor, real: tl.tensor, BRANCH: tl.constexpr, H: tl.constexpr
) -> tl.tensor:
    """sigmoid of a branch's logits; those of a token stand branch by branch."""
    at = row // H * (3 * H) + BRANCH * H + row % H
    return tl.sigmoid(tl.load(logits + at, mask=real, other=0.0).to(tl.float32))


@triton.jit
def _of_branch(
    x: tl.tensor,
    row: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    q_len: tl.tensor,
    H: tl.constexpr,
) -> tl.tensor:
    """Where the rows of a branch begin; x is (batch, H, q_len, V)."""
    batch, token = row // H // q_len, row // H % q_len
    return x + batch * x_batch + row % H * x_head + token * x_token


@triton.jit(do_not_specialize=LENGTHS)
def gated_sum(
    logits: tl.tensor,
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    out: tl.tensor,
    batch0: tl.tensor,
    head0: tl.tensor,
    token0: tl.tensor,
    batch1: tl.tensor,
    head1: tl.tensor,
    token1: tl.tensor,
    batch2: tl.tensor,
    head2: tl.tensor,
    token2: tl.tensor,
    rows: tl.tensor,
    q_len: tl.tensor,
    H: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """R rows of out (batch, q_len, H, V), and as many of each branch; grid (tiles of R rows,)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = row < rows
    number = tl.arange(0, VP)
    here = real[:, None] & (number[None, :] < V)
    at0 = _of_branch(x0, row, batch0, head0, token0, q_len, H)
    at1 = _of_branch(x1, row, batch1, head1, token1, q_len, H)
    at2 = _of_branch(x2, row, batch2, head2, token2, q_len, H)
    found0 = tl.load(at0[:, None] + number[None, :], mask=here, other=0.0).to(tl.float32)
    found1 = tl.load(at1[:, None] + number[None, :], mask=here, other=0.0).to(tl.float32)
    found2 = tl.load(at2[:, None] + number[None, :], mask=here, other=0.0).to(tl.float32)
    total = _gate(logits, row, real, 0, H)[:, None] * found0
    total += _gate(logits, row, real, 1, H)[:, None] * found1
    total += _gate(logits, row, real, 2, H)[:, None] * found2
    at = out + row[:, None] * V + number[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _backward_of_branch(
    logits: tl.tensor,
    x: tl.tensor,
    d: tl.tensor,
    d_logits: tl.tensor,
    dx: tl.tensor,
    row: tl.tensor,
    real: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    q_len: tl.tensor,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
) -> None:
    """dx = gate d, and d logit = gate (1 - gate) d.x; dx is (batch, q_len, H, V), dense."""
    number = tl.arange(0, VP)
    here = real[:, None] & (number[None, :] < V)
    at = _of_branch(x, row, x_batch, x_head, x_token, q_len, H)
    found = tl.load(at[:, None] + number[None, :], mask=here, other=0.0).to(tl.float32)
    gate = _gate(logits, row, real, BRANCH, H)
    d_gate = tl.sum(found * d, axis=1) * gate * (1 - gate)
    logit_at = row // H * (3 * H) + BRANCH * H + row % H
    tl.store(d_logits + logit_at, d_gate.to(d_logits.dtype.element_ty), mask=real)
    dx_at = dx + row[:, None] * V + number[None, :]
    tl.store(dx_at, (gate[:, None] * d).to(dx.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=LENGTHS)
def gated_sum_backward(
    logits: tl.tensor,
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    d_out: tl.tensor,
    d_logits: tl.tensor,
    dx0: tl.tensor,
    dx1: tl.tensor,
    dx2: tl.tensor,
    batch0: tl.tensor,
    head0: tl.tensor,
    token0: tl.tensor,
    batch1: tl.tensor,
    head1: tl.tensor,
    token1: tl.tensor,
    batch2: tl.tensor,
    head2: tl.tensor,
    token2: tl.tensor,
    rows: tl.tensor,
    q_len: tl.tensor,
    H: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """The gradients of R rows, of three branches and of their logits; grid as `gated_sum`."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = row < rows
    number = tl.arange(0, VP)
    here = real[:, None] & (number[None, :] < V)
    d = tl.load(d_out + row[:, None] * V + number[None, :], mask=here, other=0.0).to(tl.float32)
    _backward_of_branch(
        logits, x0, d, d_logits, dx0, row, real, batch0, head0, token0, q_len, 0, H, V, VP
    )
    _backward_of_branch(
        logits, x1, d, d_logits, dx1, row, real, batch1, head1, token1, q_len, 1, H, V, VP
    )
    _backward_of_branch(
        logits, x2, d, d_logits, dx2, row, real, batch2, head2, token2, q_len, 2, H, V, VP
    )


# --- launches -------------------------------------------------------------------------------------


def gated(logits: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """Eq. 5: the branches' outputs, each times the sigmoid of its logits, added up in float32.

    logits : (batch, q_len, 3 * heads), branch by branch
    outs : three of (batch, heads, q_len, value_dim), any strides but on the last axis
    returns : (batch, q_len, heads * value_dim), in the dtype of outs
    """
    logits = logits.contiguous()
    outs = [dense(out) for out in outs]
    if wants_grad(logits, *outs):
        logits, *outs = FirstDerivativeOnly.apply(logits, *outs)
    with on_device(logits.device):
        result: Tensor = _Gated.apply(logits, *outs)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *outs: Tensor) -> Tensor:
        batch, heads, q_len, value_dim = outs[0].shape
        merged = outs[0].new_empty((batch, q_len, heads * value_dim))
        rows = batch * q_len * heads
        gated_sum[_grid(rows, value_dim)](
            logits, *outs, merged, *_strides(outs), rows, q_len, **constants(heads, value_dim)
        )
        ctx.save_for_backward(logits, *outs)
        return merged

    @staticmethod
    def backward(ctx: Any, d_merged: Tensor) -> Any:
        logits, *outs = ctx.saved_tensors
        batch, heads, q_len, value_dim = outs[0].shape
        rows = batch * q_len * heads
        d_logits = torch.empty_like(logits)
        d_outs = [out.new_empty((batch, q_len, heads, value_dim)) for out in outs]
        gated_sum_backward[_grid(rows, value_dim)](
            logits, *outs, d_merged.contiguous(), d_logits, *d_outs, *_strides(outs), rows, q_len,
            **constants(heads, value_dim),
        )  # fmt: skip
        return d_logits, *(d.transpose(1, 2) for d in d_outs)


def constants(heads: int, value_dim: int) -> dict[str, int]:
    """What the kernels compile in."""
    padded = triton.next_power_of_2(value_dim)
    return {"H": heads, "V": value_dim, "VP": padded, "R": max(1, NUMBERS // padded)}


def _grid(rows: int, value_dim: int) -> tuple[int]:
    return (triton.cdiv(rows, constants(1, value_dim)["R"]),)


def _strides(outs: Sequence[Tensor]) -> list[int]:
    return [stride for out in outs for stride in out.stride()[:3]]
