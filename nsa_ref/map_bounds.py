"""How far a right compression map may be from the float64 oracle's: its blocks and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsa_ref.checks import check_at_least, check_one_of, check_shape
from nsa_ref.compress import COMPRESS_MAPS
from nsa_ref.numerics import NUMERICS, Array, Numerics
from nsa_ref.rounded import (
    _affine,
    _exactly,
    _final,
    _head_weight_gradient,
    _Layer,
    _product,
    _stored,
    _sum_gradient,
    _weight_gradient,
)


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
    numerics: str,
    compress_block_size: int,
    compress_block_sliding_stride: int,
    compress_map: str,
    compress_alignment: str,
) -> PoolBounds:
    """Deterministic bounds of a compression map (C1, C4), layer by layer.

    A layer Y -> Y W^T + b whose input is off by dY is off by ``|dY| |W|^T`` and by its own
    ``acc(n) |Y| |W|^T``; every intermediate result may be stored in the dtype. A ReLU passes errors
    on as they are; in the backward pass, a hidden unit that lies within its error of 0 may count
    as on or off. Weights of one head may be multiplied with each batch entry by itself: their
    gradient is then stored for every entry before it is added up.

    Shapes
    ------
    x : (batch, kv_heads, kv_len, dim), already rounded to the kernel's dtype
    weights : "positions" (kv_heads, l, dim), optional; for "linear" "weight" (dim, l * dim) and
        "bias" (dim,), for "linear_per_head" the same with (kv_heads, ...); for "mlp" "weight_in"
        (hidden, l * dim), "bias_in", "weight_out" (dim, hidden), "bias_out"; windows are flattened
        token by token
    d_out : (batch, kv_heads, blocks, dim)
    returns : PoolBounds; dx and dweights (the keys of weights) are None without d_out

    Raises
    ------
    ValueError : an unknown row, map or alignment, sizes below 1, shapes that do not fit

    Source
    ------
    NUMERICS 2, "Gates and combine"; C1, C4
    """
    check_one_of("numerics", numerics, NUMERICS)
    check_one_of("compress_map", compress_map, COMPRESS_MAPS)
    check_one_of("compress_alignment", compress_alignment, ("start", "end"))
    check_at_least("compress_block_size", compress_block_size, 1)
    check_at_least("compress_block_sliding_stride", compress_block_sliding_stride, 1)
    x = np.asarray(x, dtype=np.float64)
    check_shape("x", x.shape, ("batch", "kv_heads", "kv_len", "dim"))
    w = {key: np.asarray(value, dtype=np.float64) for key, value in weights.items()}
    length, stride = compress_block_size, compress_block_sliding_stride
    _check_pool_weights(w, compress_map, x.shape[1], length, x.shape[3])
    kv_len = x.shape[2]
    if compress_alignment == "start":
        blocks = (kv_len - length) // stride + 1 if kv_len >= length else 0
        first = np.arange(blocks) * stride
    else:
        blocks = kv_len // stride
        first = (np.arange(blocks) + 1) * stride - length
    tokens = first[:, None] + np.arange(length)[None, :]  # (blocks, l); < 0 is padding
    g = None
    if d_out is not None:
        g = _exactly(np.asarray(d_out, dtype=np.float64))
        check_shape("d_out", g.value.shape, (*x.shape[:2], blocks, x.shape[3]))
    rows = NUMERICS[numerics], NUMERICS["fp64"]
    of_kernel, of_oracle = (_pool(_exactly(x), w, g, tokens, compress_map, row) for row in rows)
    out = _final(of_kernel.out, rows[0]) + _final(of_oracle.out, rows[1])
    if of_kernel.dx is None or of_oracle.dx is None:
        return PoolBounds(out, None, None)
    dx = _final(of_kernel.dx, rows[0]) + _final(of_oracle.dx, rows[1])
    dweights = {key: of_kernel.dweights[key] + of_oracle.dweights[key] for key in w}
    return PoolBounds(out, dx, dweights)


def _check_pool_weights(
    weights: Mapping[str, Array], compress_map: str, kv_heads: int, length: int, dim: int
) -> None:
    """Raise ValueError unless the weights are those of the map, positions being optional."""
    hidden = weights["weight_in"].shape[0] if weights.get("weight_in", np.zeros(())).ndim else 0
    maps: dict[str, dict[str, tuple[int | str, ...]]] = {
        "mean": {},
        "linear": {"weight": (dim, length * dim), "bias": (dim,)},
        "linear_per_head": {"weight": (kv_heads, dim, length * dim), "bias": (kv_heads, dim)},
        "mlp": {
            "weight_in": ("hidden", length * dim),
            "bias_in": (hidden,),
            "weight_out": (dim, hidden),
            "bias_out": (dim,),
        },
    }
    shapes = maps[compress_map]
    if set(weights) - {"positions"} != set(shapes):
        raise ValueError(
            f"weights has {sorted(weights)}; compress_map={compress_map!r} takes {sorted(shapes)}, "
            "and positions or not."
        )
    for name, value in weights.items():
        check_shape(f"weights[{name!r}]", value.shape, shapes.get(name, (kv_heads, length, dim)))


def _one_head(y: _Layer, head: int) -> _Layer:
    return y.map(lambda part: part[:, head])


def _all_heads(parts: Iterable[_Layer]) -> _Layer:
    """The inverse of `_one_head`, for every head."""
    return _Layer(*(np.stack(arrays, axis=1) for arrays in zip(*parts)))


class _Pool(NamedTuple):
    out: _Layer
    dx: _Layer | None
    dweights: dict[str, Array]


def _pool(
    x: _Layer,
    w: dict[str, Array],
    g: _Layer | None,
    tokens: NDArray[np.int64],
    compress_map: str,
    row: Numerics,
) -> _Pool:
    """A compression map and, with the gradient g of its blocks, that of its tokens and weights."""
    batch, kv_heads, kv_len, dim = x.value.shape
    blocks, length = tokens.shape
    inside = (tokens >= 0)[:, :, None]

    def windows_of(part: Array) -> Array:
        if not blocks:
            return np.zeros((batch, kv_heads, 0, length, dim))
        return np.where(inside, part[:, :, np.maximum(tokens, 0)], 0.0)

    y = x.map(windows_of)
    if "positions" in w:
        value = y.value + w["positions"][None, :, None]
        y = _stored(value, y.error + row.u_accumulate * (np.abs(value) + y.error), row)
    flat = y.map(lambda part: part.reshape(batch, kv_heads, blocks, length * dim))

    hidden: _Layer | None = None
    if compress_map == "mean":
        size = (np.abs(y.value) + y.error).sum(axis=3)
        error = y.error.sum(axis=3) + row.accumulate(length) * size  # the sum
        summed = _stored(y.value.sum(axis=3), error, row)
        error = summed.error + 2.0 * row.u_elementwise * summed.size  # 1 / l, times
        out = _stored(summed.value / length, error / length, row)
    elif compress_map == "linear":
        out = _affine(flat, w["weight"], w.get("bias"), row)
    elif compress_map == "linear_per_head":
        out = _all_heads(
            _affine(_one_head(flat, h), w["weight"][h], w["bias"][h], row) for h in range(kv_heads)
        )
    else:
        before = _affine(flat, w["weight_in"], w.get("bias_in"), row)
        # |relu(a) - relu(b)| <= |a - b|
        hidden = _Layer(np.maximum(before.value, 0.0), before.error)
        out = _affine(hidden, w["weight_out"], w.get("bias_out"), row)
    if g is None:
        return _Pool(out, None, {})

    dweights: dict[str, Array] = {}
    if compress_map == "mean":
        share = g.map(lambda part: np.broadcast_to(part[:, :, :, None] / length, y.value.shape))
        dy = _stored(share.value, share.error + 2.0 * row.u_elementwise * share.size, row)
    elif compress_map == "linear_per_head":
        heads = [(_one_head(g, h), _one_head(flat, h), w["weight"][h]) for h in range(kv_heads)]
        dweights["weight"] = np.stack([_head_weight_gradient(d, y, row) for d, y, _ in heads])
        dweights["bias"] = _sum_gradient(g, (0, 2), row)
        dflat = _all_heads(_product(d, weight, row) for d, _, weight in heads)
        dy = dflat.map(lambda part: part.reshape(y.value.shape))
    else:
        if compress_map == "mlp":
            assert hidden is not None
            dweights["weight_out"] = _weight_gradient(g, hidden, row)
            if "bias_out" in w:
                dweights["bias_out"] = _sum_gradient(g, (0, 1, 2), row)
            dh = _product(g, w["weight_out"], row)
            on = before.value > 0
            may_flip = np.abs(before.value) <= before.error
            # a unit that may be on or off: its whole gradient is in doubt
            error = np.where(may_flip, np.abs(dh.value) + dh.error, np.where(on, dh.error, 0.0))
            g = _Layer(np.where(on, dh.value, 0.0), error)
        name = "weight" if compress_map == "linear" else "weight_in"
        bias = "bias" if compress_map == "linear" else "bias_in"
        dweights[name] = _weight_gradient(g, flat, row)
        if bias in w:
            dweights[bias] = _sum_gradient(g, (0, 1, 2), row)
        dy = _Layer(*(part.reshape(y.value.shape) for part in _product(g, w[name], row)))
    if "positions" in w:
        dweights["positions"] = _sum_gradient(dy, (0, 2), row)

    dx, error, size = (np.zeros_like(x.value) for _ in range(3))
    windows = np.zeros(kv_len)
    for block, token in np.argwhere(tokens >= 0):
        j = tokens[block, token]
        dx[:, :, j] += dy.value[:, :, block, token]
        error[:, :, j] += dy.error[:, :, block, token]
        size[:, :, j] += np.abs(dy.value[:, :, block, token])
        windows[j] += 1
    # a token is read by several windows, and the sum over them may run in the stored dtype:
    # one rounding per addition
    u_sum = np.expm1(windows * math.log1p(row.u_store + row.u_accumulate))[None, None, :, None]
    error = error + u_sum * (size + error) + (windows * row.eta)[None, None, :, None]
    error = np.where(windows[None, None, :, None] > 0, error, 0.0)
    return _Pool(out, _Layer(dx, error), {key: dweights[key] for key in w})
