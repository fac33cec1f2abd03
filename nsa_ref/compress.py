"""Compressed blocks: their windows of tokens (C1), the maps over a window and their gradients (C4).

Paper's letters: l = compress_block_size, d = compress_block_sliding_stride, phi = compress_map.
Complex inputs pass through; ReLU decides on the real part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.checks import as_float64, as_weights, check_at_least
from nsa_ref.semantics import PAPER, Semantics, check_semantics
from nsa_ref.sizes import Sizes, check_sizes

#: Weights by name: of a compression map as `pool_weight_shapes` lists them, or of a layer.
Weights = Mapping[str, np.ndarray]


def compress_windows(
    kv_len: int, sizes: Sizes, semantics: Semantics = PAPER
) -> list[tuple[int, int]]:
    """The tokens [start, stop) of every compressed block, in order; no block ends beyond kv_len.

    ::

        "start"   block i covers [i d, i d + l)
        "end"     block i covers [(i + 1) d - l, (i + 1) d): start may be negative, and what
                  stands left of token 0 is zeros

    Raises
    ------
    ValueError : kv_len < 0
    TypeError : kv_len that is no integer, sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    C1; arXiv 2502.11089, eq. 7 ("start")
    """
    check_at_least("kv_len", kv_len, 0)
    check_sizes(sizes)
    check_semantics(semantics)
    size, d = sizes.compress_block_size, sizes.compress_block_sliding_stride
    first_stop = size if semantics.compress_alignment == "start" else d
    return [(stop - size, stop) for stop in range(first_stop, kv_len + 1, d)]


def num_compress_blocks(kv_len: int, sizes: Sizes, semantics: Semantics = PAPER) -> int:
    """How many compressed blocks kv_len tokens have.

    ::

        "start"   floor((kv_len - l) / d) + 1, and none if kv_len < l
        "end"     floor(kv_len / d)

    The set that eq. 7 prints, i = 0 .. floor((t - l) / d), has as many; the shape printed below it,
    d_k x floor((t - l) / d), has one less.

    Raises
    ------
    ValueError, TypeError : as `compress_windows`

    Source
    ------
    C1; arXiv 2502.11089, eq. 7 ("start")
    """
    return len(compress_windows(kv_len, sizes, semantics))


def pool_weight_shapes(sizes: Sizes, dim: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a compression map, for keys or values of `dim` features.

    ::

        positions         (kv_heads, l, dim)      only with compress_positions
        mean              none
        linear            weight (dim, l dim), bias (dim,)
        linear_per_head   weight (kv_heads, dim, l dim), bias (kv_heads, dim)
        mlp               weight_in (hidden, l dim), bias_in (hidden,), weight_out (dim, hidden),
                          bias_out (dim,), with hidden = l dim (upstream's expand factor of 1)

    Raises
    ------
    ValueError : dim below 1
    TypeError : dim that is no integer, sizes that are no Sizes

    Source
    ------
    C4; arXiv 2502.11089, eq. 7 (phi is "a learnable MLP with intra-block position encoding")
    """
    check_sizes(sizes)
    check_at_least("dim", dim, 1)
    kv_heads = sizes.kv_heads
    flat = hidden = sizes.compress_block_size * dim
    shapes: dict[str, tuple[int, ...]] = {}
    if sizes.compress_positions:
        shapes["positions"] = (kv_heads, sizes.compress_block_size, dim)
    if sizes.compress_map == "linear":
        shapes |= {"weight": (dim, flat), "bias": (dim,)}
    elif sizes.compress_map == "linear_per_head":
        shapes |= {"weight": (kv_heads, dim, flat), "bias": (kv_heads, dim)}
    elif sizes.compress_map == "mlp":
        shapes |= {"weight_in": (hidden, flat), "bias_in": (hidden,)}
        shapes |= {"weight_out": (dim, hidden), "bias_out": (dim,)}
    return shapes


def pool(x: np.ndarray, weights: Weights, sizes: Sizes, semantics: Semantics = PAPER) -> np.ndarray:
    """Compressed keys, or values, from tokens: one vector for each window.

    ::

        X    = the l tokens of the window, zeros left of token 0, plus positions if there are any
        mean              y = sum_r X_r / l    by l also where the window sticks out: zeros count
        linear            y = weight flat(X) + bias
        linear_per_head   y = weight_h flat(X) + bias_h        a map of its own for kv head h
        mlp               y = weight_out relu(weight_in flat(X) + bias_in) + bias_out

    flat is token-major: (token, dim) -> l dim. The heads share the weights of all maps but
    linear_per_head, and never the positions. Keys and values are pooled by two calls, each with
    weights of its own.

    Shapes
    ------
    x : (batch, kv_heads, kv_len, dim)
    weights : the names and shapes of `pool_weight_shapes`
    returns : (batch, kv_heads, blocks, dim) float64, or complex128

    Raises
    ------
    ValueError : wrong shapes, missing or unknown weights
    TypeError : arrays that hold no numbers, sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    C1, C4; arXiv 2502.11089, eq. 7. linear_per_head is ``linear_compress`` of
    XunhaoLai/native-sparse-attention-triton, whose weight is (kv_heads, l dim, dim) and has no bias
    """
    x, weights = pool_arguments(x, weights, sizes)
    batch, kv_heads, kv_len, dim = x.shape
    windows = compress_windows(kv_len, sizes, semantics)
    size, compress_map = sizes.compress_block_size, sizes.compress_map
    dtype = np.result_type(x, *weights.values())
    out = np.zeros((batch, kv_heads, len(windows), dim), dtype=dtype)
    for b, h in np.ndindex(batch, kv_heads):
        for i, (start, stop) in enumerate(windows):
            X = _window(x[b, h], start, stop, weights, h)
            if compress_map == "mean":
                out[b, h, i] = X.sum(axis=0) / size
            elif compress_map == "linear":
                out[b, h, i] = weights["weight"] @ X.ravel() + weights["bias"]
            elif compress_map == "linear_per_head":
                out[b, h, i] = weights["weight"][h] @ X.ravel() + weights["bias"][h]
            else:
                inner = weights["weight_in"] @ X.ravel() + weights["bias_in"]
                active = np.where(inner.real > 0, inner, 0)
                out[b, h, i] = weights["weight_out"] @ active + weights["bias_out"]
    return out


def pool_vjp(
    x: np.ndarray, weights: Weights, d_out: np.ndarray, sizes: Sizes, semantics: Semantics = PAPER
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gradients of <d_out, pool(x, weights)> with respect to the tokens and every weight.

    ::

        mean     dX_r = dy / l
        linear   dflat = weight^T dy           dweight = dy flat^T           dbias = dy
                 linear_per_head the same, with the head's own weight and bias
        mlp      dinner = [inner > 0] weight_out^T dy     (the gradient of ReLU at 0 is 0)
                 dweight_out = dy relu(inner)^T           dbias_out = dy
                 dweight_in = dinner flat^T               dbias_in = dinner
                 dflat = weight_in^T dinner
        dpositions = dX summed over batch and windows; dx = dX summed over the windows that hold
        the token; what falls left of token 0 is dropped

    Shapes
    ------
    x, weights : as in `pool`
    d_out : (batch, kv_heads, blocks, dim)
    returns : (dx, dweights), of the shapes of x and of each of the weights

    Raises
    ------
    ValueError, TypeError : as `pool`; d_out of a wrong shape

    Source
    ------
    C4; derived by hand from `pool`
    """
    x, weights = pool_arguments(x, weights, sizes)
    batch, kv_heads, kv_len, dim = x.shape
    windows = compress_windows(kv_len, sizes, semantics)
    size, compress_map = sizes.compress_block_size, sizes.compress_map
    d_out = as_float64("d_out", d_out, (batch, kv_heads, len(windows), dim))
    dtype = np.result_type(x, d_out, *weights.values())
    dx = np.zeros(x.shape, dtype=dtype)
    dweights = {name: np.zeros(weight.shape, dtype=dtype) for name, weight in weights.items()}
    for b, h in np.ndindex(batch, kv_heads):
        for i, (start, stop) in enumerate(windows):
            X = _window(x[b, h], start, stop, weights, h)
            dy = d_out[b, h, i]
            if compress_map == "mean":
                dX = np.repeat(dy[None] / size, size, axis=0)
            elif compress_map == "linear":
                dX = (weights["weight"].T @ dy).reshape(X.shape)
                dweights["weight"] += np.outer(dy, X.ravel())
                dweights["bias"] += dy
            elif compress_map == "linear_per_head":
                dX = (weights["weight"][h].T @ dy).reshape(X.shape)
                dweights["weight"][h] += np.outer(dy, X.ravel())
                dweights["bias"][h] += dy
            else:
                inner = weights["weight_in"] @ X.ravel() + weights["bias_in"]
                active = np.where(inner.real > 0, inner, 0)
                dinner = np.where(inner.real > 0, weights["weight_out"].T @ dy, 0)
                dX = (weights["weight_in"].T @ dinner).reshape(X.shape)
                dweights["weight_out"] += np.outer(dy, active)
                dweights["bias_out"] += dy
                dweights["weight_in"] += np.outer(dinner, X.ravel())
                dweights["bias_in"] += dinner
            if "positions" in weights:
                dweights["positions"][h] += dX
            for j in range(max(start, 0), stop):
                dx[b, h, j] += dX[j - start]
    return dx, dweights


def _window(tokens: np.ndarray, start: int, stop: int, weights: Weights, head: int) -> np.ndarray:
    """X: tokens start .. stop - 1 of (kv_len, dim), zeros left of token 0, plus positions."""
    X = np.zeros((stop - start, tokens.shape[1]), dtype=tokens.dtype)
    for j in range(max(start, 0), stop):
        X[j - start] = tokens[j]
    return X + weights["positions"][head] if "positions" in weights else X


def pool_arguments(
    x: ArrayLike, weights: Mapping[str, ArrayLike], sizes: Sizes
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """x and the weights as float64, of the right names and shapes."""
    check_sizes(sizes)
    x = as_float64("x", x, ("batch", sizes.kv_heads, "kv_len", "dim"))
    return x, as_weights(weights, pool_weight_shapes(sizes, x.shape[3]))
