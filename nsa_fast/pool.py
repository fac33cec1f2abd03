"""Compressed keys or values from tokens: the maps over windows (C4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_fast.checks import (
    check_alike,
    check_choice,
    check_floating,
    check_kind,
    check_tensor,
    without_autocast,
)
from nsa_fast.windows import Windows, from_token
from nsa_ref.semantics import PAPER, Semantics

#: The weights that each map takes, besides "positions".
MAP_WEIGHTS: dict[str, tuple[str, ...]] = {
    "mean": (),
    "linear": ("weight", "bias"),
    "linear_per_head": ("weight", "bias"),
    "mlp": ("weight_in", "bias_in", "weight_out", "bias_out"),
}


def map_shapes(
    compress_map: str, kv_heads: int, compress_block_size: int, dim: int, hidden: int | str
) -> dict[str, tuple[int | str, ...]]:
    """Name and shape of every weight that a map takes, "positions" first."""
    flat = compress_block_size * dim
    per_head = (kv_heads,) if compress_map == "linear_per_head" else ()
    shapes: dict[str, tuple[int | str, ...]] = {
        "positions": (kv_heads, compress_block_size, dim),
        "weight": (*per_head, dim, flat),
        "bias": (*per_head, dim),
        "weight_in": (hidden, flat),
        "bias_in": (hidden,),
        "weight_out": (dim, hidden),
        "bias_out": (dim,),
    }
    return {name: shapes[name] for name in ("positions", *MAP_WEIGHTS[compress_map])}


def compress_pool(
    x: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    *,
    compress_block_size: int,
    compress_block_sliding_stride: int,
    compress_map: str = "mean",
    semantics: Semantics = PAPER,
) -> Tensor:
    """One vector for each window of l tokens (C1, C4).

    ::

        X               = the window's tokens, zeros left of token 0, plus positions if any
        mean              sum of X over the window / l; accumulated in float32 for smaller dtypes
        linear            weight flat(X) + bias                   flat: (token, dim) -> l dim
        linear_per_head   the same, with weight and bias of the kv head
        mlp               weight_out relu(weight_in flat(X) + bias_in) + bias_out

    Shapes
    ------
    x : (batch, kv_heads, kv_len, dim)
    weights : "positions" (kv_heads, l, dim), optional; linear: "weight" (dim, l dim), "bias"
        (dim,); linear_per_head: "weight" (kv_heads, dim, l dim), "bias" (kv_heads, dim); mlp:
        "weight_in" (hidden, l dim), "bias_in" (hidden,), "weight_out" (dim, hidden), "bias_out"
        (dim,)
    returns : (batch, kv_heads, blocks, dim), in the dtype of x, under torch.autocast as well;
        differentiable

    Raises
    ------
    ValueError : an unknown map, weights missing, unknown or of a wrong shape, sizes below 1
    TypeError : something that is no tensor, or of another dtype than x
    """
    check_choice("compress_map", compress_map, tuple(MAP_WEIGHTS))
    check_kind(semantics)
    windows = Windows.checked(compress_block_size, compress_block_sliding_stride, semantics)
    check_tensor("x", x, ("batch", "kv_heads", "kv_len", "dim"))
    check_floating("x", x)
    weights = _checked_weights(weights, x, windows.size, compress_map)
    with without_autocast(x.device):
        return _pooled(x, weights, windows, compress_map)


def _pooled(
    x: Tensor, weights: Mapping[str, Tensor], windows: Windows, compress_map: str
) -> Tensor:
    dtype = x.dtype
    if compress_map == "mean" and dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    tokens = _tokens_of(windows, x)
    if "positions" in weights:
        tokens = tokens + weights["positions"].to(tokens.dtype)[:, None]
    if compress_map == "mean":
        return tokens.mean(dim=-2).to(dtype)
    flat = tokens.flatten(-2)
    if compress_map == "linear":
        return F.linear(flat, weights["weight"], weights["bias"])
    if compress_map == "linear_per_head":
        # the batch joins the rows: one product for each head, and one sum for its gradient
        rows = flat.transpose(0, 1).flatten(1, 2)
        out = torch.baddbmm(weights["bias"][:, None], rows, weights["weight"].mT)
        return out.unflatten(1, (flat.shape[0], flat.shape[2])).transpose(0, 1)
    inner = F.relu(F.linear(flat, weights["weight_in"], weights["bias_in"]))
    return F.linear(inner, weights["weight_out"], weights["bias_out"])


def _tokens_of(windows: Windows, x: Tensor) -> Tensor:
    """(batch, kv_heads, blocks, l, dim); zeros where a window begins before token 0."""
    blocks = windows.count(x.shape[2])
    if blocks == 0:
        return x[:, :, :0, None].expand(*x.shape[:2], 0, windows.size, x.shape[3])
    x = from_token(x, windows.first_token(0))
    return x.unfold(2, windows.size, windows.stride)[:, :, :blocks].transpose(-1, -2)


def _checked_weights(
    given: Mapping[str, Tensor] | None, x: Tensor, size: int, compress_map: str
) -> dict[str, Tensor]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"weights must be a mapping from name to tensor, not {type(given).__name__}."
        )
    weights, wanted = dict(given or {}), MAP_WEIGHTS[compress_map]
    if set(weights) - {"positions"} != set(wanted):
        raise ValueError(
            f"weights has the names {sorted(weights, key=str)}; compress_map={compress_map!r} "
            f"takes {list(wanted)}, and 'positions' if there are any."
        )
    heads, dim = x.shape[1], x.shape[3]
    hidden: int | str = "hidden"
    if compress_map == "mlp":
        first = check_tensor("weights['weight_in']", weights["weight_in"], ("hidden", size * dim))
        hidden = first.shape[0]
    shapes = map_shapes(compress_map, heads, size, dim, hidden)
    for name, weight in weights.items():
        check_tensor(f"weights[{name!r}]", weight, shapes[name])
    check_alike(x=x, **{f"weights[{name!r}]": weight for name, weight in weights.items()})
    return weights
