"""Rotary position embedding (G2)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Wavelengths run from 2 pi tokens to this many times as many.
BASE = 10000.0


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Pairs of neighbouring channels, turned by an angle that grows with the position (G2).

    ::

        angle_i        = p base^(-2 i / dim)
        (a, b)         = channels 2 i and 2 i + 1
        becomes          (a cos - b sin, a sin + b cos)

    Shapes
    ------
    x : (..., tokens, dim), dim even
    position : integers (tokens,)
    returns : as x; computed in float32 at least, and rounded once
    """
    dim = x.shape[-1]
    # float32 would be off by 0.004 at token 65536
    frequency = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    angle = position.to(torch.float64)[:, None] * frequency
    wide = wide_dtype(x.dtype)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x.to(wide).unflatten(-1, (dim // 2, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and products of a dtype are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
