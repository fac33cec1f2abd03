"""How far a right compression map may be from the float64 oracle's: its blocks and gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref import rounded
from nsa_ref.checks import as_float64, check_one_of
from nsa_ref.compress import Weights, compress_windows, num_compress_blocks, pool_arguments
from nsa_ref.numerics import NUMERICS, Array, Numerics
from nsa_ref.rounded import Rounded, exact
from nsa_ref.semantics import PAPER, Semantics
from nsa_ref.sizes import Sizes


class PoolBounds(NamedTuple):
    """Bounds of a compression map: its blocks, the gradient of its tokens and of its weights."""

    out: Array
    dx: Array | None
    dweights: dict[str, Array] | None


def pool_bounds(
    x: ArrayLike,
    weights: Mapping[str, ArrayLike],
    d_out: ArrayLike | None = None,
    *,
    sizes: Sizes,
    semantics: Semantics = PAPER,
    numerics: str,
) -> PoolBounds:
    """Deterministic bounds of a compression map (C1, C4), layer by layer.

    A layer Y -> Y W^T + b whose input is off by dY is off by ``|dY| |W|^T`` and by its own
    ``acc(n) |Y| |W|^T``; every intermediate result may be stored in the dtype. A ReLU passes errors
    on as they are; in the backward pass, a hidden unit that lies within its error of 0 may count
    as on or off. Weights of one head may be multiplied with each batch entry by itself: their
    gradient is then stored for every entry before it is added up.

    Shapes
    ------
    x, weights : as in `pool`, already rounded to the kernel's dtype
    d_out : (batch, kv_heads, blocks, dim)
    returns : PoolBounds; dx and dweights (the keys of weights) are None without d_out

    Raises
    ------
    ValueError, TypeError : as `pool_vjp`; an unknown row

    Source
    ------
    C1, C4; NUMERICS 2, "Compression maps"
    """
    check_one_of("numerics", numerics, NUMERICS)
    x, w = pool_arguments(x, weights, sizes)
    g = None
    if d_out is not None:
        blocks = num_compress_blocks(x.shape[2], sizes, semantics)
        g = exact(as_float64("d_out", d_out, (*x.shape[:2], blocks, x.shape[3])))
    rows = NUMERICS[numerics], NUMERICS["fp64"]
    of_kernel, of_oracle = (rounded_pool(exact(x), w, g, sizes, semantics, row) for row in rows)
    out = of_kernel.out.error + of_oracle.out.error
    if of_kernel.dx is None or of_oracle.dx is None:
        return PoolBounds(out, None, None)
    dweights = {key: of_kernel.dweights[key].error + of_oracle.dweights[key].error for key in w}
    return PoolBounds(out, of_kernel.dx.error + of_oracle.dx.error, dweights)


class RoundedPool(NamedTuple):
    """The results of a compression map, and how far a right kernel's may be from them."""

    out: Rounded
    dx: Rounded | None
    dweights: dict[str, Rounded]


def rounded_pool(
    x: Rounded, w: Weights, g: Rounded | None, sizes: Sizes, semantics: Semantics, row: Numerics
) -> RoundedPool:
    """A compression map and, with the gradient g of its blocks, that of its tokens and weights.

    Source: C1, C4; NUMERICS 2, "Compression maps"
    """
    batch, kv_heads, kv_len, dim = x.value.shape
    compress_map, length = sizes.compress_map, sizes.compress_block_size
    starts = [start for start, _ in compress_windows(kv_len, sizes, semantics)]
    blocks = len(starts)
    tokens = np.array(starts, dtype=np.int64)[:, None] + np.arange(length)  # < 0 is padding
    inside = (tokens >= 0)[:, :, None]
    y = x.map(lambda part: np.where(inside, part[:, :, np.maximum(tokens, 0)], 0.0))
    if "positions" in w:
        y = rounded.plus(y, w["positions"][None, :, None], row.u_accumulate, row)
    flat = y.map(lambda part: part.reshape(batch, kv_heads, blocks, length * dim))
    dweights: dict[str, Rounded] = {}

    def through(d: Rounded, of: Rounded, ending: str = "") -> Rounded:
        """The gradient of `of` from that of its affine map; those of the map's are noted."""
        weight = w["weight" + ending]
        per_head = weight.ndim == 3
        of_weight = rounded.weight_gradient_by_entry if per_head else rounded.weight_gradient
        dweights["weight" + ending] = of_weight(d, of, row)
        dweights["bias" + ending] = rounded.summed(d, (0, 2) if per_head else (0, 1, 2), row)
        return rounded.matmul(d, exact(weight), row)

    if compress_map == "mean":
        of_sum = rounded.summed(y, (3,), row)
        error = of_sum.error + 2.0 * row.u_elementwise * of_sum.size  # 1 / l, times
        out = rounded.stored(Rounded(of_sum.value / length, error / length), row)
        if g is not None:
            share = g.map(lambda part: np.broadcast_to(part[:, :, :, None] / length, y.value.shape))
            error = share.error + 2.0 * row.u_elementwise * share.size
            dflat = rounded.stored(Rounded(share.value, error), row)
    elif compress_map != "mlp":
        out = rounded.affine(flat, w["weight"], w["bias"], row)
        if g is not None:
            dflat = through(g, flat)
    else:
        before = rounded.affine(flat, w["weight_in"], w["bias_in"], row)
        # |relu(a) - relu(b)| <= |a - b|
        hidden = Rounded(np.maximum(before.value, 0.0), before.error)
        out = rounded.affine(hidden, w["weight_out"], w["bias_out"], row)
        if g is not None:
            dh = through(g, hidden, "_out")
            on = before.value > 0
            # a unit that may be on or off: its whole gradient is in doubt
            may_flip = np.abs(before.value) <= before.error
            error = np.where(may_flip, dh.size, np.where(on, dh.error, 0.0))
            dflat = through(Rounded(np.where(on, dh.value, 0.0), error), flat, "_in")
    if g is None:
        return RoundedPool(out, None, {})
    dy = dflat.map(lambda part: part.reshape(y.value.shape))
    if "positions" in w:
        dweights["positions"] = rounded.summed(dy, (0, 2), row)

    dx, error, size = (np.zeros_like(x.value) for _ in range(3))
    windows = np.zeros((kv_len, 1))
    for block, token in np.argwhere(tokens >= 0):
        j, (value, off) = tokens[block, token], dy.at(..., block, token, slice(None))
        dx[:, :, j] += value
        error[:, :, j] += off
        size[:, :, j] += np.abs(value)
        windows[j] += 1
    # a token is read by several windows, and the sum over them may run in the stored dtype:
    # one rounding per addition
    u_sum = np.expm1(windows * math.log1p(row.u_store + row.u_accumulate))
    error = error + u_sum * (size + error) + windows * row.eta
    error = np.where(windows > 0, error, 0.0)
    dweights = {name: dweights[name] for name in w}
    return RoundedPool(out, rounded.unless_overflow(Rounded(dx, error), row), dweights)
