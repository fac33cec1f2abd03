"""Random small layers: what `nsa_ref.layer_bounds` is tested on.

`layer` runs `LayerInSteps` on them, right or with a mistake; in float64 it is the reference.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import flash_emulation
from flash_emulation import Array, Generator
from nsa_ref.layer import layer_weight_shapes
from nsa_ref.numerics import NUMERICS
from nsa_ref.semantics import ROTARY, Semantics
from nsa_ref.sizes import COMPRESS_MAPS, Sizes
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.mutants.layer import LayerInSteps, LayerWay
from nsa_ref.testing.mutants.rounding import Way


def draw_way(rng: Generator, row: str) -> LayerWay:
    fused_projections, wide, turn_once, reverse, scale_first = rng.random(5) < 0.5
    always = row in ("tf32", "bf16", "bf16-head", "fp16")
    fused = always or (row in ("fp32", "fp64") and rng.random() < 0.4)
    attention = (
        flash_emulation.draw_way(rng, row) if fused else Way(fused=False, scale_first=scale_first)
    )
    return LayerWay(attention, fused_projections, wide, turn_once, reverse)


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
    for name, shape in layer_weight_shapes(geometry, semantics).items():
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


def layer(
    case: LayerCase, row: str, way: LayerWay, kind: type[LayerInSteps] = LayerInSteps
) -> Results:
    """What a layer of the row makes of the case: the right one, if no other is given."""
    computes, inputs = kind(way, row), _as_stored(case, row)
    given = inputs.weights, inputs.x, case.block_indices
    with np.errstate(invalid="ignore"):
        out = computes.run("layer_with_blocks", inputs.case, *given)
        dx, dweights = computes.run_vjp("layer_with_blocks", inputs.case, *given, inputs.d_out)
    return Results(_wide(out), _wide(dx), {name: _wide(g) for name, g in dweights.items()})


def reference(case: LayerCase) -> Results:
    return layer(case, "fp64", LayerWay())


def selection_inputs(case: LayerCase, row: str, way: LayerWay) -> tuple[Array, Array]:
    """q and k_cmp as the choice of blocks sees them in a right layer."""
    computes, inputs = LayerInSteps(way, row), _as_stored(case, row)
    tensors = {name: computes.tensor(inputs.case, w) for name, w in inputs.weights.items()}
    read = computes.read(inputs.case, tensors, computes.tensor(inputs.case, inputs.x))
    q, k_cmp = (_wide(computes.array(y["compress"])) for y in (read.q, read.k))
    return q, k_cmp


class _Inputs(NamedTuple):
    case: Case
    x: Array
    weights: dict[str, Array]
    d_out: Array


def _as_stored(case: LayerCase, row: str) -> _Inputs:
    """The input as the plug takes it, in the row's dtype."""
    batch, tokens, _ = case.x.shape
    judged = Case(
        **{f.name: getattr(case.sizes, f.name) for f in dataclasses.fields(Sizes)},
        semantics=case.semantics,
        dtype=NUMERICS[row].dtype,
        batch=batch,
        q_len=tokens,
        kv_len=tokens,
    )
    dtype = DTYPES[judged.dtype]
    weights = {name: weight.astype(dtype) for name, weight in case.weights.items()}
    return _Inputs(judged, case.x.astype(dtype), weights, case.d_out.astype(dtype))


def _wide(y: Array) -> Array:
    return y.astype(np.float64)


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
