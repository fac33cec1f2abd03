"""Random small layers: what `nsa_ref.layer_bounds` is tested on.

`layer` runs `LayerInSteps` on them, right or with a mistake; in float64 it is the reference.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from attention_inputs import Array, Generator, rounded
from attention_inputs import draw_way as draw_attention_way
from nsa_ref.numerics import NUMERICS
from nsa_ref.semantics import ROTARY, Semantics
from nsa_ref.sizes import COMPRESS_MAPS
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.mutants.layer import LayerInSteps, LayerWay
from nsa_ref.testing.mutants.rounding import Way


def draw_way(rng: Generator, row: str) -> LayerWay:
    """Whatever right layers of the row differ on."""
    fused_projections, wide, turn_once, reverse, scale_first = rng.random(5) < 0.5
    always = row in ("tf32", "bf16", "bf16-head", "fp16", "fp16-head")
    fused = always or (row in ("fp32", "fp64") and rng.random() < 0.4)
    unfused = Way(fused=False, scale_first=scale_first)
    attention = draw_attention_way(rng, row) if fused else unfused
    return LayerWay(attention, fused_projections, wide, turn_once, reverse)


@dataclass(frozen=True)
class LayerCase:
    """One layer's worth of input, as float64 that the row's dtype holds."""

    sizes: Case
    x: Array
    weights: dict[str, Array]
    block_indices: Array
    d_out: Array

    @property
    def semantics(self) -> Semantics:
        return self.sizes.semantics

    def stored(self, row: str) -> LayerCase:
        """In the row's dtype, as the plug takes it."""
        batch, tokens, _ = self.x.shape
        case = dataclasses.replace(
            self.sizes, dtype=NUMERICS[row].dtype, batch=batch, q_len=tokens, kv_len=tokens
        )
        dtype = DTYPES[case.dtype]
        weights = {name: weight.astype(dtype) for name, weight in self.weights.items()}
        arrays = self.x.astype(dtype), weights, self.block_indices, self.d_out.astype(dtype)
        return LayerCase(case, *arrays)


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
        "batch": int(rng.integers(1, 3)) if batch is None else batch,
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
        "seed": int(rng.integers(0, 2**32)),
    }
    lengths = {"q_len": seq_len, "kv_len": seq_len, "semantics": semantics}
    case = Case(**(lengths | chosen | sizes))
    weights, size = case.layer_weights(), float(rng.choice([0.5, 1.0, 2.0]))
    for name, weight in weights.items():
        factor = size if ".weight" in name else 1.0 if name.startswith("mem_") else 0.5
        weights[name] = rounded(weight * (1.0 if name == "norm.weight" else factor), row)
    indices = np.full((case.batch, case.selection_heads, seq_len, case.num_selected_blocks), -1)
    for place in np.ndindex(indices.shape[:3]):
        own = place[2] // case.selection_block_size
        begun = own + 1 if semantics.causal else case.num_selection_blocks
        picked = rng.permutation(begun)[: case.num_selected_blocks]
        indices[place][: len(picked)] = picked
    x = rounded(case.tokens() * rng.choice([0.3, 1.0, 2.0]), row)
    d_out = rounded(case.array("d_out", *x.shape[:2], case.layer_width), row)
    return LayerCase(case, x, weights, indices, d_out)


def run_layer(
    case: LayerCase, row: str, way: LayerWay, kind: type[LayerInSteps] = LayerInSteps
) -> Results:
    """What a layer of the row makes of the case: the right one, if no other is given."""
    layer, given = kind(way, row), case.stored(row)
    arrays = given.sizes, given.weights, given.x, given.block_indices
    with np.errstate(invalid="ignore"):
        out = layer.run("layer_with_blocks", *arrays)
        dx, dweights = layer.run_vjp("layer_with_blocks", *arrays, given.d_out)
    wide = {name: gradient.astype(np.float64) for name, gradient in dweights.items()}
    return Results(out.astype(np.float64), dx.astype(np.float64), wide)


def reference(case: LayerCase) -> Results:
    return run_layer(case, "fp64", LayerWay())


def as_selected(case: LayerCase, row: str) -> tuple[Array, Array]:
    """q and k_cmp as the choice of blocks sees them in a right layer."""
    layer, given = LayerInSteps(row=row), case.stored(row)
    weights = {name: layer.tensor(given.sizes, w) for name, w in given.weights.items()}
    read = layer.read(given.sizes, weights, layer.tensor(given.sizes, given.x))
    q, k_cmp = (layer.array(y["compress"]).astype(np.float64) for y in (read.q, read.k))
    return q, k_cmp


def with_semantics(semantics: Semantics, rng: Generator) -> Semantics:
    """The preset, sometimes with a switch of the layer turned."""
    changes: dict[str, Any] = {}
    if rng.random() < 0.2:
        changes["causal"] = False
    if rng.random() < 0.3:
        changes["rotary"] = str(rng.choice(ROTARY))
    if rng.random() < 0.2:
        changes["input_norm"] = not semantics.input_norm
    elif semantics.input_norm:
        changes["input_norm"] = True  # the same in every row of numerics
    for switch in ("kv_per_branch", "output_projection", "share_selection"):
        if rng.random() < 0.2:
            changes[switch] = not getattr(semantics, switch)
    return dataclasses.replace(semantics, **changes)
