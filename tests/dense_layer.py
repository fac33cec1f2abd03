"""The layer once more: dense masks, complex rotation, einsum, and autograd for its gradients.

It shares no line and no way of thinking with nsa_fast: every window is a row of a matrix, every
mask a whole array, and nothing is known of caches, block lists or branches that share a key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense_definitions import dense_compress_mask, dense_fine_mask, dense_sliding_mask
from nsa_ref.semantics import Semantics


def dense_projections(
    x: Tensor, weights: Mapping[str, Tensor], sizes: Mapping[str, Any], semantics: Semantics
) -> dict[str, Tensor]:
    """What the branches read, (batch, heads, tokens, dim): q, k, v by branch, and k_cmp, v_cmp."""
    h = x
    if semantics.input_norm:
        mean_square = torch.einsum("btc,btc->bt", x, x) / x.shape[-1]
        h = torch.einsum("btc,bt,c->btc", x, (mean_square + 2**-23) ** -0.5, weights["norm.weight"])

    def heads(weight: Tensor, count: int) -> Tensor:
        return torch.einsum("btm,hcm->bhtc", h, weight.reshape(count, -1, weight.shape[-1]))

    places = torch.arange(x.shape[1])
    found = {}
    for branch in ("compress", "fine", "sliding"):
        own = f"_{branch}" if semantics.kv_per_branch else ""
        q = heads(weights["to_q.weight"], sizes["q_heads"])
        k, v = (heads(weights[f"to_{kind}{own}.weight"], sizes["kv_heads"]) for kind in "kv")
        if branch == "compress":
            if semantics.rotary == "before_pooling":
                q, k = turned(q, places), turned(k, places)
            k, v = (dense_pooled(t, n, weights, sizes, semantics) for t, n in ((k, "k"), (v, "v")))
            if semantics.rotary == "all":
                q = turned(q, places)
                k = turned(k, torch.arange(k.shape[2]) * sizes["compress_block_sliding_stride"])
            memory = [weights[n].expand(len(x), -1, -1, -1) for n in ("mem_k", "mem_v")]
            found |= {"k_cmp": k, "mem_k": memory[0]}
            k, v = torch.cat([memory[0], k], 2), torch.cat([memory[1], v], 2)
        elif semantics.rotary != "none":
            q, k = turned(q, places), turned(k, places)
        found |= {f"q_{branch}": q, f"k_{branch}": k, f"v_{branch}": v}
    gates = torch.einsum("btm,chm->cbht", h, weights["gates.weight"].reshape(3, -1, x.shape[-1]))
    found["gates"] = 1 / (1 + torch.exp(-gates - weights["gates.bias"].reshape(3, 1, -1, 1)))
    return found


def dense_layer(
    x: Tensor,
    weights: Mapping[str, Tensor],
    block_indices: Tensor,
    sizes: Mapping[str, Any],
    semantics: Semantics,
) -> Tensor:
    """G1 with the selection handed in: (batch, seq_len, out_dim)."""
    found = dense_projections(x, weights, sizes, semantics)
    n = x.shape[1]
    causal = semantics.causal
    masks = {
        "compress": dense_compress_mask(
            n,
            n,
            sizes["compress_block_size"],
            sizes["compress_block_sliding_stride"],
            weights["mem_k"].shape[1],
            causal=causal,
            alignment=semantics.compress_alignment,
            strict=semantics.compress_strict,
        ),
        "fine": dense_fine_mask(
            n,
            n,
            sizes["selection_block_size"],
            block_indices.numpy(),
            sizes["q_heads"],
            causal=causal,
            own_extra=semantics.own_block_extra,
            duplicates="set",
        ),
        "sliding": dense_sliding_mask(
            n, n, sizes["sliding_window_size"], causal=causal, closed=semantics.window_closed
        ),
    }
    group = sizes["q_heads"] // sizes["kv_heads"]
    total = torch.zeros(())
    for gate, (branch, mask) in zip(found["gates"], masks.items()):
        k, v = (found[f"{kind}_{branch}"].repeat_interleave(group, dim=1) for kind in "kv")
        logits = torch.einsum("bhtc,bhjc->bhtj", found[f"q_{branch}"], k) / sizes["head_dim"] ** 0.5
        weight = torch.exp(logits) * torch.from_numpy(mask)
        # a row that sees nothing: 0 / 1
        share = weight / torch.where(weight.sum(-1, keepdim=True) > 0, weight.sum(-1, True), 1.0)
        total = total + torch.einsum("bht,bhtj,bhjc->bthc", gate, share, v)
    merged = total.reshape(*x.shape[:2], -1)
    if semantics.output_projection:
        return torch.einsum("bti,mi->btm", merged, weights["to_out.weight"])
    return merged


def turned(x: Tensor, position: Tensor) -> Tensor:
    """Every pair of channels as a complex number times e^(i angle)."""
    dim = x.shape[-1]
    speeds = torch.tensor([10000 ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    turn = torch.exp(1j * torch.outer(position.double(), speeds))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], dim // 2, 2).contiguous())
    return torch.view_as_real(pairs * turn).reshape(x.shape)


def dense_pooled(
    x: Tensor, kind: str, weights: Mapping[str, Tensor], sizes: Mapping[str, Any], s: Semantics
) -> Tensor:
    """C1 and C4: one 0/1 matrix takes the tokens to all places of all windows."""
    length, d = sizes["compress_block_size"], sizes["compress_block_sliding_stride"]
    tokens = x.shape[2]
    if s.compress_alignment == "start":
        starts = [i * d for i in range(tokens) if i * d + length <= tokens]
    else:
        starts = [(i + 1) * d - length for i in range(tokens) if (i + 1) * d <= tokens]
    place = np.array(starts, dtype=int).reshape(-1, 1) + np.arange(length)
    holds = torch.from_numpy((place[..., None] == np.arange(tokens)).astype(np.float64))
    windows = torch.einsum("irj,bhjc->bhirc", holds, x)
    own = {
        name.partition(".")[2]: weight
        for name, weight in weights.items()
        if name.startswith(f"compress_{kind}.")
    }
    if "positions" in own:
        windows = windows + own["positions"][:, None]
    if "weight" in own and own["weight"].ndim == 3:
        matrix = own["weight"].unflatten(-1, (length, x.shape[-1]))
        return torch.einsum("bhirc,horc->bhio", windows, matrix) + own["bias"][:, None]
    if "weight" in own:
        matrix = own["weight"].reshape(-1, length, x.shape[-1])
        return torch.einsum("bhirc,orc->bhio", windows, matrix) + own["bias"]
    if "weight_in" in own:
        matrix = own["weight_in"].reshape(-1, length, x.shape[-1])
        inner = torch.einsum("bhirc,orc->bhio", windows, matrix) + own["bias_in"]
        inner = inner * (inner > 0)
        return torch.einsum("bhiz,oz->bhio", inner, own["weight_out"]) + own["bias_out"]
    return windows.sum(3) / length


def weights_of(
    model_dim: int,
    sizes: Mapping[str, Any],
    semantics: Semantics,
    *,
    compress_map: str,
    positions: bool = True,
    num_mem_kv: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random weights by the names of the definition, none of them zero."""
    length = sizes["compress_block_size"]
    q_heads, kv_heads = sizes["q_heads"], sizes["kv_heads"]
    head_dim, value_dim = sizes["head_dim"], sizes["value_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "to_q.weight": (q_heads * head_dim, model_dim),
        "gates.weight": (3 * q_heads, model_dim),
        "gates.bias": (3 * q_heads,),
        "mem_k": (kv_heads, num_mem_kv, head_dim),
        "mem_v": (kv_heads, num_mem_kv, value_dim),
    }
    if semantics.input_norm:
        shapes["norm.weight"] = (model_dim,)
    if semantics.output_projection:
        shapes["to_out.weight"] = (model_dim, q_heads * value_dim)
    for kind, dim in (("k", head_dim), ("v", value_dim)):
        branches = ("_compress", "_fine", "_sliding") if semantics.kv_per_branch else ("",)
        for branch in branches:
            shapes[f"to_{kind}{branch}.weight"] = (kv_heads * dim, model_dim)
        flat = length * dim
        if positions:
            shapes[f"compress_{kind}.positions"] = (kv_heads, length, dim)
        if compress_map == "linear":
            shapes |= {f"compress_{kind}.weight": (dim, flat), f"compress_{kind}.bias": (dim,)}
        if compress_map == "linear_per_head":
            shapes[f"compress_{kind}.weight"] = (kv_heads, dim, flat)
            shapes[f"compress_{kind}.bias"] = (kv_heads, dim)
        if compress_map == "mlp":
            shapes |= {
                f"compress_{kind}.weight_in": (flat, flat),
                f"compress_{kind}.bias_in": (flat,),
                f"compress_{kind}.weight_out": (dim, flat),
                f"compress_{kind}.bias_out": (dim,),
            }
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        / math.sqrt(max(1, shape[-1]))
        for name, shape in shapes.items()
    }
