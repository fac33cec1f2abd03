"""Compressed keys or values from tokens: windows (C1) and the maps over them (C4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_fast.checks import check_choice, check_size, check_tensor, without_autocast
from nsa_ref.semantics import PAPER, Semantics

#: The weights that each map takes, besides "positions".
MAP_WEIGHTS: dict[str, tuple[str, ...]] = {
    "mean": (),
    "linear": ("weight", "bias"),
    "linear_per_head": ("weight", "bias"),
    "mlp": ("weight_in", "bias_in", "weight_out", "bias_out"),
}


def num_compress_blocks(
    kv_len: int,
    compress_block_size: int,
    compress_block_sliding_stride: int,
    semantics: Semantics = PAPER,
) -> int:
    """Compressed blocks of kv_len tokens (C1): incomplete windows are dropped."""
    if semantics.compress_alignment == "end":
        return kv_len // compress_block_sliding_stride
    if kv_len < compress_block_size:
        return 0
    return (kv_len - compress_block_size) // compress_block_sliding_stride + 1


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
    if not isinstance(semantics, Semantics):
        raise TypeError(f"semantics={semantics!r} must be a nsa_ref.Semantics.")
    size = check_size("compress_block_size", compress_block_size, 1)
    stride = check_size("compress_block_sliding_stride", compress_block_sliding_stride, 1)
    check_tensor("x", x, ("batch", "kv_heads", "kv_len", "dim"))
    weights = _checked_weights(dict(weights or {}), x, size, compress_map)
    with without_autocast(x.device):
        return _pooled(x, weights, size, stride, compress_map, semantics)


def _pooled(
    x: Tensor,
    weights: Mapping[str, Tensor],
    size: int,
    stride: int,
    compress_map: str,
    semantics: Semantics,
) -> Tensor:
    dtype = x.dtype
    if compress_map == "mean" and dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    windows = _windows(x, size, stride, semantics)
    if "positions" in weights:
        windows = windows + weights["positions"].to(windows.dtype)[:, None]
    if compress_map == "mean":
        return windows.mean(dim=-2).to(dtype)
    flat = windows.flatten(-2)
    if compress_map == "linear":
        return F.linear(flat, weights["weight"], weights["bias"])
    if compress_map == "linear_per_head":
        # the batch joins the rows: one product for each head, and one sum for its gradient
        rows = flat.transpose(0, 1).flatten(1, 2)
        out = torch.baddbmm(weights["bias"][:, None], rows, weights["weight"].mT)
        return out.unflatten(1, (flat.shape[0], flat.shape[2])).transpose(0, 1)
    inner = F.relu(F.linear(flat, weights["weight_in"], weights["bias_in"]))
    return F.linear(inner, weights["weight_out"], weights["bias_out"])


def _windows(x: Tensor, size: int, stride: int, semantics: Semantics) -> Tensor:
    """(batch, kv_heads, blocks, l, dim); zeros where a window begins before token 0."""
    batch, heads, kv_len, dim = x.shape
    blocks = num_compress_blocks(kv_len, size, stride, semantics)
    if blocks == 0:
        return x[:, :, :0, None].expand(batch, heads, 0, size, dim)
    if semantics.compress_alignment == "end":
        before = size - stride  # block 0 ends with token d - 1, so it begins l - d before token 0
        x = F.pad(x, (0, 0, before, 0)) if before > 0 else x[:, :, -before:]
    return x.unfold(2, size, stride)[:, :, :blocks].transpose(-1, -2)


def _checked_weights(
    weights: dict[str, Tensor], x: Tensor, size: int, compress_map: str
) -> dict[str, Tensor]:
    wanted = MAP_WEIGHTS[compress_map]
    if set(weights) - {"positions"} != set(wanted):
        raise ValueError(
            f"weights has the names {sorted(weights)}; compress_map={compress_map!r} takes "
            f"{list(wanted)}, and 'positions' if there are any."
        )
    heads, dim = x.shape[1], x.shape[3]
    flat = size * dim
    hidden: int | str = "hidden"
    if compress_map == "mlp":
        first = check_tensor("weights['weight_in']", weights["weight_in"], ("hidden", flat))
        hidden = first.shape[0]
    per_head = (heads,) if compress_map == "linear_per_head" else ()
    shapes: dict[str, tuple[int | str, ...]] = {
        "positions": (heads, size, dim),
        "weight": (*per_head, dim, flat),
        "bias": (*per_head, dim),
        "weight_in": (hidden, flat),
        "bias_in": (hidden,),
        "weight_out": (dim, hidden),
        "bias_out": (dim,),
    }
    for name, weight in weights.items():
        check_tensor(f"weights[{name!r}]", weight, shapes[name])
        if weight.dtype != x.dtype:
            raise TypeError(
                f"weights[{name!r}] has dtype {weight.dtype} and x {x.dtype}; "
                "they must be the same."
            )
    return weights
