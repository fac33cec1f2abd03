"""Rows of tensors, as the Triton kernels read them. Importing this module imports triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_rows(
    x: tl.tensor, real: tl.tensor, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """Numbers FROM to FROM + WIDTH of some rows of D, with zeros where there is nothing."""
    number = FROM + tl.arange(0, WIDTH)
    return tl.load(
        x[:, None] + number[None, :], mask=real[:, None] & (number[None, :] < D), other=0.0
    )


def dense(x: Tensor) -> Tensor:
    """With numbers of the last axis side by side, as kernels read them; itself if they are."""
    return x if x.stride(-1) == 1 else x.contiguous()
