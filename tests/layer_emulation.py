"""Right layers and wrong ones in torch: what `nsa_ref.layer_bounds` is tested against.

`layer` follows the definition of the layer once, in any dtype, every operation rounded and
stored by torch; gradients are torch's. In float64 it is the reference. `Way` holds what right
implementations differ on. A `bug` makes it wrong, in one line next to the line it breaks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flash_emulation
from flash_emulation import Array, Generator, Inputs, draw_way
from nsa_ref.compress import compress_windows, pool_weight_shapes
from nsa_ref.masks import compress_mask, fine_mask, sliding_mask
from nsa_ref.semantics import BRANCHES, ROTARY, Semantics
from nsa_ref.sizes import COMPRESS_MAPS, Sizes
from nsa_ref.testing.mutants import rounding as kernels

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-head": torch.bfloat16,
    "bf16-eager": torch.bfloat16,
    "fp16": torch.float16,
    "fp16-eager": torch.float16,
}


@dataclass(frozen=True)
class Way:
    """The decisions on which right layers differ.

    kernel : of a fused attention, or None for matmul, softmax, matmul
    fused_projections : all projections of h as one matrix product
    wide : RMSNorm, rotary and combine in float32, each stored once
    turn_once : one k for all branches is rotated once, not for each branch
    reverse : features are added up in the other order
    scale_first : without a fused attention, q is scaled before it meets k
    tf32 : matrix products read their factors in 11 bits
    """

    kernel: kernels.Way | None = None
    fused_projections: bool = False
    wide: bool = False
    turn_once: bool = False
    reverse: bool = False
    scale_first: bool = False
    tf32: bool = False

    @classmethod
    def draw(cls, rng: Generator, row: str) -> Way:
        flags = (bool(flag) for flag in rng.random(5) < 0.5)
        fused = row in ("tf32", "bf16", "bf16-head", "fp16") or (
            row in ("fp32", "fp64") and rng.random() < 0.4
        )
        return cls(draw_way(rng, row) if fused else None, *flags, tf32=row == "tf32")


@dataclass(frozen=True)
class LayerCase:
    """One layer's worth of input, as float64 that the dtype holds."""

    sizes: Sizes
    semantics: Semantics
    x: Array
    weights: dict[str, Array]
    block_indices: Array
    d_out: Array


@dataclass(frozen=True)
class Results:
    out: Array
    q: Array
    k_cmp: Array
    dx: Array
    dweights: dict[str, Array]


def draw_case(
    rng: Generator,
    row: str,
    semantics: Semantics,
    *,
    seq_len: int | None = None,
    batch: int | None = None,
    **sizes: Any,
) -> LayerCase:
    """A random small layer."""
    seq_len = int(rng.integers(1, 25)) if seq_len is None else seq_len
    stride = int(rng.choice([1, 2, 4]))
    kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2, 4]))
    chosen: dict[str, Any] = {
        "model_dim": int(rng.choice([4, 8, 16])),
        "q_heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": int(rng.choice([2, 4, 8])),
        "value_dim": int(rng.choice([1, 4, 8])),
        "compress_block_size": stride * int(rng.integers(1, 3)),
        "compress_block_sliding_stride": stride,
        "compress_map": str(rng.choice(COMPRESS_MAPS)),
        "compress_positions": bool(rng.random() < 0.5),
        "selection_block_size": stride * int(rng.integers(1, 3)),
        "num_selected_blocks": int(rng.integers(0, 4)),
        "num_initial_blocks": 1,
        "num_local_blocks": 1,
        "sliding_window_size": int(rng.integers(0, 8)),
        "num_mem_kv": int(rng.choice([0, 1, 3])),
    }
    geometry = Sizes(**(chosen | sizes))
    batch = int(rng.integers(1, 3)) if batch is None else batch
    x = rng.standard_normal((batch, seq_len, geometry.model_dim)) * rng.choice([0.3, 1.0, 2.0])
    size = float(rng.choice([0.5, 1.0, 2.0]))
    weights = {}
    for name, shape in weight_shapes(geometry, semantics).items():
        is_matrix = ".weight" in name and name != "norm.weight"
        fan_in = shape[-1] if is_matrix else 1
        spread = size if is_matrix else 0.5
        weights[name] = rng.standard_normal(shape) * spread / max(fan_in, 1) ** 0.5
    if "norm.weight" in weights:
        weights["norm.weight"] += 1.0
    for name in ("mem_k", "mem_v"):
        weights[name] = 2.0 * weights[name]
    heads = geometry.kv_heads if semantics.share_selection else geometry.q_heads
    blocks = -(-seq_len // geometry.selection_block_size)
    block_indices = np.full((batch, heads, seq_len, geometry.num_selected_blocks), -1)
    for place in np.ndindex(block_indices.shape[:3]):
        own = place[2] // geometry.selection_block_size
        last = own if semantics.causal else blocks - 1
        picked = rng.permutation(last + 1)[: geometry.num_selected_blocks]
        block_indices[place][: len(picked)] = picked
    out_dim = geometry.q_heads * geometry.value_dim
    if semantics.output_projection:
        out_dim = geometry.model_dim
    d_out = rng.standard_normal((batch, seq_len, out_dim))

    def rounded(y: Array) -> Array:
        return flash_emulation.rounded(y, row)

    return LayerCase(
        geometry,
        semantics,
        rounded(x),
        {name: rounded(weight) for name, weight in weights.items()},
        block_indices,
        rounded(d_out),
    )


def weight_shapes(sizes: Sizes, semantics: Semantics) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if semantics.input_norm:
        shapes["norm.weight"] = (sizes.model_dim,)
    shapes["to_q.weight"] = (sizes.q_heads * sizes.head_dim, sizes.model_dim)
    dims = {"k": sizes.head_dim, "v": sizes.value_dim}
    endings = [f"_{branch}" for branch in BRANCHES] if semantics.kv_per_branch else [""]
    for letter, dim in dims.items():
        for ending in endings:
            shapes[f"to_{letter}{ending}.weight"] = (sizes.kv_heads * dim, sizes.model_dim)
        shapes[f"mem_{letter}"] = (sizes.kv_heads, sizes.num_mem_kv, dim)
        of_pool = pool_weight_shapes(sizes, dim)
        shapes |= {f"compress_{letter}.{name}": shape for name, shape in of_pool.items()}
    shapes["gates.weight"] = (3 * sizes.q_heads, sizes.model_dim)
    shapes["gates.bias"] = (3 * sizes.q_heads,)
    if semantics.output_projection:
        shapes["to_out.weight"] = (sizes.model_dim, sizes.q_heads * sizes.value_dim)
    return shapes


def reference(case: LayerCase) -> Results:
    return layer(case, "fp64", Way())


def layer(case: LayerCase, row: str, way: Way, bug: str = "") -> Results:
    """The layer and its gradients as a right implementation in this row may compute them."""
    dtype = TORCH_DTYPES[row]
    x = torch.tensor(case.x, dtype=dtype, requires_grad=True)
    w = {
        name: torch.tensor(weight, dtype=dtype, requires_grad=True)
        for name, weight in case.weights.items()
    }
    out, q, k_cmp = _forward(case, x, w, row, way, bug)
    wanted = [x, *w.values()]
    grads = torch.autograd.grad(
        out, wanted, torch.tensor(case.d_out, dtype=dtype), allow_unused=True
    )
    arrays = [
        np.zeros(tuple(of.shape)) if grad is None else _array(grad)
        for grad, of in zip(grads, wanted)
    ]
    return Results(_array(out), _array(q), _array(k_cmp), arrays[0], dict(zip(w, arrays[1:])))


def _array(y: Tensor) -> Array:
    return y.detach().to(torch.float64).numpy()


def _forward(
    case: LayerCase, x: Tensor, w: dict[str, Tensor], row: str, way: Way, bug: str
) -> tuple[Tensor, Tensor, Tensor]:
    sizes, semantics = case.sizes, case.semantics
    batch, seq_len, _ = x.shape
    wide = torch.float32 if way.wide and x.dtype != torch.float64 else x.dtype
    h = x
    if semantics.input_norm:
        eps = 1e-2 if bug == "norm eps 1e-2" else 2.0**-23
        y = x.to(wide)
        mean = (y * y).mean(dim=-1, keepdim=True)
        if way.reverse:
            h = (y / torch.sqrt(mean + eps)).to(x.dtype) * w["norm.weight"]
        else:
            h = (y * torch.rsqrt(mean + eps) * w["norm.weight"].to(wide)).to(x.dtype)

    names = [name for name in w if name.startswith("to_") and name != "to_out.weight"]
    names.append("gates.weight")
    widths = [w[name].shape[0] for name in names]
    if way.fused_projections:
        flat = _linear(h, torch.cat([w[name] for name in names]), way)
        projected = dict(zip(names, torch.split(flat, widths, dim=-1)))
    else:
        projected = {name: _linear(h, w[name], way) for name in names}

    if bug == "weight gradient without the last token":
        flat = projected["to_q.weight"]
        last = _linear(h[:, -1:], w["to_q.weight"].detach(), way)
        projected["to_q.weight"] = torch.cat([flat[:, :-1], last], dim=1)

    def heads(y: Tensor, count: int) -> Tensor:
        return y.reshape(batch, seq_len, count, y.shape[-1] // count).transpose(1, 2)

    def of(letter: str, branch: str) -> Tensor:
        ending = f"_{branch}" if semantics.kv_per_branch else ""
        return heads(projected[f"to_{letter}{ending}.weight"], sizes.kv_heads)

    q = heads(projected["to_q.weight"], sizes.q_heads)
    positions = torch.arange(seq_len)

    def turned(y: Tensor, branch: str, at: Tensor = positions) -> Tensor:
        which = {"none": (), "fine_and_sliding": ("fine", "sliding")}
        if branch not in which.get(semantics.rotary, BRANCHES) or bug == "rotary missing":
            return y
        if bug == "rotary on one branch only" and branch == "fine":
            return y
        return _rotated(y, at, wide)

    qs = {branch: turned(q, branch) for branch in BRANCHES}
    if way.turn_once:
        qs["sliding"] = qs["fine"] if bug != "rotary on one branch only" else qs["sliding"]
    ks = {branch: turned(of("k", branch), branch) for branch in ("fine", "sliding")}
    if way.turn_once and not semantics.kv_per_branch and bug != "rotary on one branch only":
        ks["sliding"] = ks["fine"]
    to_pool = {letter: of(letter, "compress") for letter in ("k", "v")}
    before = semantics.rotary == "before_pooling"
    if before and bug != "keys pooled before they are turned":
        once = way.turn_once and not semantics.kv_per_branch
        to_pool["k"] = ks["sliding"] if once else turned(to_pool["k"], "compress")
    pooled = {letter: _pool(y, letter, case, w, way, bug) for letter, y in to_pool.items()}
    if bug == "compressed keys detached":
        pooled["k"] = pooled["k"].detach()
    block_positions = torch.arange(pooled["k"].shape[2]) * sizes.compress_block_sliding_stride
    k_cmp = pooled["k"] if before else turned(pooled["k"], "compress", block_positions)
    memory = {letter: w[f"mem_{letter}"].expand(batch, -1, -1, -1) for letter in ("k", "v")}
    if bug == "memory takes one batch entry's gradient":
        memory = {key: torch.cat([y[:1], y[1:].detach()]) for key, y in memory.items()}
    ks["compress"] = torch.cat([memory["k"], k_cmp], dim=2)
    vs = {branch: of("v", branch) for branch in ("fine", "sliding")}
    vs["compress"] = torch.cat([memory["v"], pooled["v"]], dim=2)

    window = sizes.sliding_window_size + (bug == "window one longer")
    windowed = dataclasses.replace(sizes, sliding_window_size=window)
    masks = {
        "compress": compress_mask(seq_len, seq_len, sizes, semantics),
        "fine": fine_mask(seq_len, seq_len, case.block_indices, sizes, semantics),
        "sliding": sliding_mask(seq_len, seq_len, windowed, semantics),
    }
    outs = []
    for branch in BRANCHES:
        mask = np.broadcast_to(
            masks[branch], (batch, sizes.q_heads, seq_len, masks[branch].shape[-1])
        )
        empty_row = getattr(semantics.empty_row, branch)
        outs.append(_attention(qs[branch], ks[branch], vs[branch], mask, empty_row, row, way))

    logits = projected["gates.weight"] + w["gates.bias"]
    gates = logits.reshape(batch, seq_len, 3, sizes.q_heads).permute(2, 0, 3, 1)[..., None]
    gates = torch.softmax(gates, dim=0) if bug == "gates by softmax" else torch.sigmoid(gates)
    if bug == "gates permuted":
        gates = gates[[1, 0, 2]]
    if bug == "one gate 0.3 % off":
        factor = torch.ones_like(gates)
        factor[1, :, 0] = 1.003
        gates = gates * factor
    if bug == "one gate detached":
        gates = torch.stack([gates[0], gates[1].detach(), gates[2]])
    if way.wide:
        out = sum(g.to(wide) * o.to(wide) for g, o in zip(gates, outs)).to(x.dtype)
    elif way.reverse:
        out = torch.einsum("cbhtx,cbhtv->bhtv", gates, torch.stack(outs))
    else:
        out = gates[0] * outs[0] + gates[1] * outs[1] + gates[2] * outs[2]
    merged = out.transpose(1, 2).reshape(batch, seq_len, sizes.q_heads * sizes.value_dim)
    if semantics.output_projection:
        merged = _linear(merged, w["to_out.weight"], way)
    return merged, qs["compress"], k_cmp


def _linear(y: Tensor, weight: Tensor, way: Way) -> Tensor:
    if way.tf32:
        return _Tf32Linear.apply(y, weight)
    if way.reverse:
        return y.flip(-1) @ weight.flip(-1).T
    return y @ weight.T


def _linear_per_head(y: Tensor, weight: Tensor, way: Way) -> Tensor:
    """(batch, heads, rows, in) by (heads, out, in): at once, or one batch entry after the other."""
    if way.tf32:
        heads = [_Tf32Linear.apply(y[:, h], weight[h]) for h in range(y.shape[1])]
        return torch.stack(heads, dim=1)
    if way.reverse:
        return torch.einsum("bhri,hoi->bhro", y, weight)
    return y @ weight.mT


class _Tf32Linear(torch.autograd.Function):
    """y W^T and its gradients, every factor rounded to 11 bits."""

    @staticmethod
    def forward(context: Any, y: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(y, weight)
        return _eleven_bits(y) @ _eleven_bits(weight).T

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        y, weight = (_eleven_bits(each) for each in context.saved_tensors)
        g = _eleven_bits(grads[0])
        return g @ weight, g.reshape(-1, g.shape[-1]).T @ y.reshape(-1, y.shape[-1])


def _eleven_bits(y: Tensor) -> Tensor:
    """Rounded to nearest, ties away from zero."""
    return ((y.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _rotated(y: Tensor, positions: Tensor, wide: torch.dtype) -> Tensor:
    """Pairs turned by angles in float32 (float64 for float64), as stored cosines and sines."""
    exact = torch.float64 if y.dtype == torch.float64 else torch.float32
    head_dim = y.shape[-1]
    pair = torch.arange(0, head_dim, 2, dtype=exact)
    frequency = 1.0 / 10000.0 ** (pair / head_dim)
    if wide != y.dtype:
        frequency = torch.exp(-pair / head_dim * torch.log(torch.tensor(10000.0, dtype=exact)))
    angle = positions.to(exact)[:, None] * frequency[None, :]
    cosine, sine = torch.cos(angle).to(wide), torch.sin(angle).to(wide)
    a, b = y[..., 0::2].to(wide), y[..., 1::2].to(wide)
    pairs = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
    return pairs.reshape(y.shape).to(y.dtype)


def _pool(
    y: Tensor, letter: str, case: LayerCase, w: dict[str, Tensor], way: Way, bug: str
) -> Tensor:
    sizes = case.sizes
    batch, kv_heads, seq_len, dim = y.shape
    windows = compress_windows(seq_len, sizes, case.semantics)
    if not windows:
        return y.new_zeros(batch, kv_heads, 0, dim)
    before = max(0, -min(start for start, _ in windows))
    padded = torch.cat([y.new_zeros(batch, kv_heads, before, dim), y], dim=2)
    X = torch.stack([padded[:, :, start + before : stop + before] for start, stop in windows], 2)
    prefix = f"compress_{letter}."
    if f"{prefix}positions" in w and bug != "positions dropped":
        X = X + w[f"{prefix}positions"][None, :, None]
    flat = X.reshape(batch, kv_heads, len(windows), -1)
    if sizes.compress_map == "mean":
        return X.mean(dim=3)
    if sizes.compress_map == "linear":
        return _linear(flat, w[f"{prefix}weight"], way) + w[f"{prefix}bias"]
    if sizes.compress_map == "linear_per_head":
        bias = w[f"{prefix}bias"][:, None]
        return _linear_per_head(flat, w[f"{prefix}weight"], way) + bias
    hidden = torch.relu(_linear(flat, w[f"{prefix}weight_in"], way) + w[f"{prefix}bias_in"])
    return _linear(hidden, w[f"{prefix}weight_out"], way) + w[f"{prefix}bias_out"]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Array, empty_row: str, row: str, way: Way
) -> Tensor:
    columns = k.shape[2]
    if not columns:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    empty = torch.tensor(~mask.any(axis=-1))
    if way.kernel is not None:
        out = _Fused.apply(q, k, v, mask, row, way.kernel)
        if empty_row == "uniform":
            group = q.shape[1] // k.shape[1]
            mean = v.mean(dim=2).repeat_interleave(group, dim=1)[:, :, None]
            out = torch.where(empty[..., None], mean, out)
        return out
    group = q.shape[1] // k.shape[1]
    k, v = (
        y[:, :, None].expand(-1, -1, group, -1, -1).reshape(y.shape[0], -1, *y.shape[2:])
        for y in (k, v)
    )
    times = torch.tensor(mask)
    scale = q.shape[-1] ** -0.5
    keys = k.transpose(-1, -2)
    s = (q * scale) @ keys if way.scale_first else (q @ keys) * scale
    if mask.max() > 1:  # a key counted twice stands there twice
        s, times = torch.cat([s, s], dim=-1), torch.cat([times, times - 1], dim=-1)
        v = torch.cat([v, v], dim=2)
    s = s.masked_fill(times <= 0, -torch.finfo(s.dtype).max)
    out = torch.softmax(s, dim=-1) @ v
    if empty_row != "uniform":
        out = torch.where(empty[..., None], torch.zeros_like(out), out)
    return out


class _Fused(torch.autograd.Function):
    """`Kernel` for every batch entry."""

    @staticmethod
    def forward(
        context: Any, q: Tensor, k: Tensor, v: Tensor, mask: Array, row: str, kernel: kernels.Way
    ) -> Tensor:
        context.inputs = (q, k, v), mask, row, kernel
        d_out = q.new_zeros(*q.shape[:3], v.shape[-1])
        found = _flash(q, k, v, mask, d_out, row, kernel)
        return torch.tensor(found["out"], dtype=q.dtype)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        (q, k, v), mask, row, kernel = context.inputs
        found = _flash(q, k, v, mask, grads[0], row, kernel)
        dq, dk, dv = (torch.tensor(found[name], dtype=q.dtype) for name in ("dq", "dk", "dv"))
        return dq, dk, dv, None, None, None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Array, d_out: Tensor, row: str, kernel: kernels.Way
) -> dict[str, Array]:
    scale = q.shape[-1] ** -0.5
    arrays = [_array(y) for y in (q, k, v, d_out)]
    found = []
    for b in range(q.shape[0]):
        q_, k_, v_, d_out_ = (y[b : b + 1] for y in arrays)
        x = Inputs(q_, k_, v_, np.asarray(mask[b : b + 1]), d_out_, None, scale)
        found.append(flash_emulation.computed(x, row, kernel))
    return {
        name: np.concatenate([getattr(each, name) for each in found])
        for name in ("out", "dq", "dk", "dv")
    }


def with_semantics(semantics: Semantics, rng: Generator) -> Semantics:
    """The preset, sometimes with a switch of the layer turned."""
    changes: dict[str, Any] = {}
    if rng.random() < 0.2:
        changes["causal"] = False
    if rng.random() < 0.3:
        changes["rotary"] = str(rng.choice(ROTARY))
    for switch in ("kv_per_branch", "input_norm", "output_projection", "share_selection"):
        if rng.random() < 0.2:
            changes[switch] = not getattr(semantics, switch)
    return dataclasses.replace(semantics, **changes)
