"""Rotary position embedding (G2)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Wavelengths run from 2 pi tokens to this many times as many.
BASE = 10000.0


def turns(position: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """By what each pair of channels is turned: the complex numbers cos + i sin of its angle (G2).

    ::

        angle_i        = p base^(-2 i / dim)

    position : integers (tokens,)
    dtype : of what is to be turned; computed in float64, and rounded once
    returns : (tokens, dim / 2)
    """
    # float32 would be off by 0.004 at token 65536
    frequency = BASE ** (
        -torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim
    )
    angle = position.to(torch.float64)[:, None] * frequency
    wide = wide_dtype(dtype)
    return torch.complex(angle.cos().to(wide), angle.sin().to(wide))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of neighbouring channels, turned (G2).

    ::

        (a, b)         = channels 2 i and 2 i + 1
        becomes          (a cos - b sin, a sin + b cos): a product of complex numbers

    Shapes
    ------
    x : (..., tokens, dim), dim even
    turns : of these tokens
    returns : as x; computed in float32 at least, and rounded once
    """
    pairs = x.to(wide_dtype(x.dtype)).unflatten(-1, (-1, 2))
    *strides, last = pairs.stride()
    if last != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in strides):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # no view as complex numbers
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
    return turned.flatten(-2).to(x.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and products of a dtype are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
