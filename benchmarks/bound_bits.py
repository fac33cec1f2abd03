"""Every bound of 200 fixed cases, as digests of their bits: does a change of the code move one?

``python -m benchmarks.bound_bits --json FILE`` writes the digests. ``--against FILE`` compares with
digests that were written before, names every bound that differs, and exits 1 if one does. NumPy's
and BLAS's last bits depend on the machine: compare on one machine, with one set of versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nsa_ref import (
    FLA,
    LUCIDRAINS,
    LUCIDRAINS_FLEX,
    PAPER,
    XUNHAO,
    Semantics,
    Sizes,
    layer_block_indices,
    layer_weight_shapes,
    num_compress_blocks,
    pool_weight_shapes,
)
from nsa_ref.bounds import FORMS, attention_bounds, slope_test
from nsa_ref.layer import layer_width
from nsa_ref.layer_bounds import layer_bounds, packed_weight_bounds
from nsa_ref.map_bounds import pool_bounds
from nsa_ref.numerics import NUMERICS
from nsa_ref.rounded import Rounded
from nsa_ref.selection_bounds import score_bounds
from nsa_ref.sizes import COMPRESS_MAPS

Bounds = Iterator[tuple[str, np.ndarray | None]]

#: Spreads of the arrays: ordinary, flat, peaked, near the end of float16.
SPREADS = (1.0, 0.1, 8.0, 60.0)


def attention(number: int, rng: np.random.Generator) -> Bounds:
    """Random multiplicities, empty rows and unseen keys among them."""
    batch, kv_heads, group = rng.integers(1, 3, 3)
    q_len, columns, head_dim, value_dim = rng.integers(1, 14, 4)
    spread = SPREADS[number % len(SPREADS)]
    heads = kv_heads * group
    q = spread * rng.standard_normal((batch, heads, q_len, head_dim))
    k = rng.standard_normal((batch, kv_heads, columns, head_dim))
    v = spread * rng.standard_normal((batch, kv_heads, columns, value_dim))
    mask = rng.choice([0, 1, 2], (batch, heads, q_len, columns), p=[0.5, 0.4, 0.1])
    d_out = rng.standard_normal((batch, heads, q_len, value_dim))
    d_lse = rng.standard_normal((batch, heads, q_len)) * (number % 3 > 0)
    off = [Rounded(x, 1e-3 * np.abs(x) * rng.random(x.shape)) for x in (q, k, v, d_out)]
    for row in NUMERICS:
        given = q, k, v, mask, d_out, d_lse
        for form in FORMS:
            found = attention_bounds(*given, numerics=row, form=form)
            yield from ((f"{row} {form} {n}", x) for n, x in found._asdict().items())
        found = attention_bounds(*off[:3], mask, off[3], d_lse, numerics=row, form=FORMS[0])
        yield from ((f"{row} with errors {n}", x) for n, x in found._asdict().items())
        soft, shared = (
            attention_bounds(*given[:4], numerics=row, form=f).out
            for f in ("statistical", "shared")
        )
        slope = slope_test(1e-3 * d_out, d_out, soft, shared)
        yield f"{row} slope", np.asarray(slope)


def maps(number: int, rng: np.random.Generator) -> Bounds:
    """Every map, both alignments, with and without positions."""
    batch, kv_heads, dim, stride, factor = rng.integers(1, 4, 5)
    size, kv_len = int(stride * factor), int(rng.integers(0, 20))
    name = COMPRESS_MAPS[number % len(COMPRESS_MAPS)]
    sizes = Sizes(
        q_heads=int(kv_heads),
        kv_heads=int(kv_heads),
        compress_block_size=size,
        compress_block_sliding_stride=int(stride),
        compress_map=name,
        selection_block_size=int(stride),
        compress_positions=bool(number % 3),
    )
    shapes = pool_weight_shapes(sizes, int(dim))
    x = rng.standard_normal((batch, kv_heads, kv_len, dim))
    weights = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    semantics = Semantics(compress_alignment=("start", "end")[number % 2])
    blocks = num_compress_blocks(kv_len, sizes, semantics)
    d_out = rng.standard_normal((batch, kv_heads, blocks, dim))
    for row in NUMERICS:
        found = pool_bounds(
            x,
            weights,
            d_out,
            sizes=sizes,
            semantics=semantics,
            numerics=row,
        )
        yield f"{row} out", found.out
        yield f"{row} dx", found.dx
        yield from ((f"{row} d{n}", bound) for n, bound in (found.dweights or {}).items())


def scores(number: int, rng: np.random.Generator) -> Bounds:
    """Overlap and means of logits, shared over the group or not, with errors of q and k_cmp."""
    batch, kv_heads, group, stride = (int(n) for n in rng.integers(1, 3, 4))
    kv_len, head_dim, memory = 24, int(rng.integers(1, 9)), int(rng.integers(0, 3))
    semantics = LUCIDRAINS if number % 2 else PAPER
    sizes = Sizes(
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        compress_block_size=2 * stride,
        compress_block_sliding_stride=stride,
        selection_block_size=4 * stride,
        num_mem_kv=memory,
    )
    blocks = num_compress_blocks(kv_len, sizes, semantics)
    q = rng.standard_normal((batch, kv_heads * group, 9, head_dim))
    k_cmp = rng.standard_normal((batch, kv_heads, blocks, head_dim))
    mem_k = rng.standard_normal((batch, kv_heads, memory, head_dim))
    off = Rounded(q, 1e-3 * np.abs(q)), Rounded(k_cmp, 1e-3 * np.abs(k_cmp))
    for row in NUMERICS:
        for given, ending in (((q, k_cmp), ""), (off, " with errors")):
            for how in ("overlap", "logit_mean"):
                switches = {"importance": how, "share_selection": number % 3 > 0}
                found = score_bounds(
                    *given,
                    mem_k,
                    kv_len=kv_len,
                    sizes=sizes,
                    semantics=dataclasses.replace(semantics, **switches),
                    numerics=row,
                )
                if how == "logit_mean":  # without the incomplete block behind them
                    found = found[..., : blocks // 4]
                yield f"{row} {how}{ending}", found


def layers(number: int, rng: np.random.Generator) -> Bounds:
    """Whole layers of every preset, forward, backward and packed."""
    presets = (PAPER, LUCIDRAINS, LUCIDRAINS_FLEX, FLA, XUNHAO)
    semantics = presets[number % len(presets)]
    kv_heads, group, stride = (int(n) for n in rng.integers(1, 3, 3))
    sizes = Sizes(
        model_dim=int(rng.integers(2, 7)),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=2 * int(rng.integers(1, 4)),
        value_dim=int(rng.integers(1, 5)),
        compress_block_size=2 * stride,
        compress_block_sliding_stride=stride,
        compress_map=COMPRESS_MAPS[number % len(COMPRESS_MAPS)],
        compress_positions=bool(number % 2),
        selection_block_size=2 * stride,
        num_selected_blocks=3,
        num_initial_blocks=number % 2,
        num_local_blocks=number % 3,
        sliding_window_size=3,
        num_mem_kv=1 + number % 2,
    )
    shapes = layer_weight_shapes(sizes, semantics)
    weights = {n: 0.5 * rng.standard_normal(shape) for n, shape in shapes.items()}
    x = rng.standard_normal((1, 11, sizes.model_dim))
    of: dict[str, Any] = {"sizes": sizes, "semantics": semantics}
    blocks = layer_block_indices(x, weights, **of)
    d_out = rng.standard_normal((1, 11, layer_width(sizes, semantics)))
    for row in NUMERICS:
        found = layer_bounds(x, weights, blocks, d_out, **of, numerics=row)
        gradients = found.dweights or {}
        scores = found.scores
        if scores is not None and semantics.importance == "logit_mean":
            scores = scores[..., : 11 // sizes.selection_block_size]  # as in `scores`
        yield from ((f"{row} {n}", x) for n, x in (("out", found.out), ("dx", found.dx)))
        yield f"{row} scores", scores
        yield from ((f"{row} d{n}", bound) for n, bound in gradients.items())
        packed = packed_weight_bounds([11, 5], [weights] * 2, [gradients] * 2, **of, numerics=row)
        yield from ((f"{row} packed d{n}", bound) for n, bound in packed.items())


#: kind -> (its function, number of cases): 200 in all
KINDS = {
    "attention": (attention, 100),
    "maps": (maps, 40),
    "scores": (scores, 30),
    "layers": (layers, 30),
}


def digests() -> dict[str, str]:
    """Name of a bound -> SHA-256 of its shape and bytes."""
    found = {}
    for kind, (bounds_of, count) in KINDS.items():
        for number in range(count):
            rng = np.random.Generator(np.random.Philox([len(kind), number]))
            for name, bound in bounds_of(number, rng):
                bits = b"None" if bound is None else np.ascontiguousarray(bound).tobytes()
                text = f"{None if bound is None else bound.shape} ".encode() + bits
                found[f"{kind} {number} {name}"] = hashlib.sha256(text).hexdigest()[:16]
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command: 1 if a bound differs from those of `--against`."""
    parser = argparse.ArgumentParser(prog="benchmarks.bound_bits", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the digests")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with these")
    options = parser.parse_args(arguments)
    found = digests()
    print(f"{len(found)} bounds")
    if options.json:
        where: Mapping[str, str] = {"numpy": np.__version__, "machine": platform.machine()}
        options.json.write_text(json.dumps({"versions": where, "digests": found}, indent=0) + "\n")
    if not options.against:
        return 0
    before = json.loads(options.against.read_text())["digests"]
    differ = [name for name in before | found if before.get(name) != found.get(name)]
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(differ)} differ from {options.against}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
