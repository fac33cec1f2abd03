"""One trial: sizes, semantics, dtype and a recipe for the data. No arrays are stored.

A `Case` prints whole, pastes back as Python, travels as JSON, and always fills the same arrays:
each array has a generator of its own, seeded from the case's seed and the array's name, so that
shrinking one size leaves the other arrays alone.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from nsa_ref.checks import check_at_least, check_one_of
from nsa_ref.compress import num_compress_blocks, pool_weight_shapes
from nsa_ref.layer import layer_weight_shapes, layer_width
from nsa_ref.semantics import PAPER, PRESETS, Semantics, check_semantics
from nsa_ref.sizes import Sizes, num_selection_blocks

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

#: How q, k and v are filled. Roundings are independent only on the `GENERIC_INPUTS`.
INPUTS = (
    "randn",
    "flat",
    "integers",
    "one_hot_v",
    "equal",
    "ties",
    "huge",
    "heavy",
    "offsets",
    "tiny",
    "low",
    "drift",
)
GENERIC_INPUTS = ("randn", "flat", "heavy", "offsets", "drift")
#: What float16 has room for, and only just: drawn more often where rounding is tried.
EXTREME_INPUTS = ("tiny", "low")

#: How the block indices of the fine branch are filled.
INDICES = ("distinct", "few", "mixed", "same", "all", "none")

#: How the arrays lie in memory (tensors only; NumPy implementations get them contiguous).
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")

#: The fields that a case prints first, for a reader; the sizes follow, and then the data.
PRINTED_FIRST = ("semantics", "dtype", "batch", "q_heads", "kv_heads", "q_len", "kv_len")


@dataclass(frozen=True, kw_only=True, repr=False)
class Case(Sizes):
    """The sizes, and what else a trial needs. A case is handed to the definition as its sizes.

    batch, q_len, kv_len : how many sequences, queries and keys
    inputs, indices, layout : how the arrays are filled, and how they lie in memory
    seed : of every array

    Raises
    ------
    ValueError, TypeError : a size that no implementation could run, named with what would be right
    """

    semantics: Semantics = PAPER
    dtype: str = "float64"
    batch: int = 1
    q_len: int = 1
    kv_len: int = 1
    inputs: str = "randn"
    indices: str = "distinct"
    layout: str = "contiguous"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_semantics(self.semantics)
        check_one_of("dtype", self.dtype, DTYPES)
        for name in ("batch", "q_len", "kv_len", "seed"):
            check_at_least(name, getattr(self, name), 0)
        check_one_of("inputs", self.inputs, INPUTS)
        check_one_of("indices", self.indices, INDICES)
        check_one_of("layout", self.layout, LAYOUTS)

    # sizes that follow from the others

    @property
    def selection_heads(self) -> int:
        """Heads that choose blocks of their own: kv heads, or query heads if nothing is shared."""
        return self.kv_heads if self.semantics.share_selection else self.q_heads

    @property
    def num_compress_blocks(self) -> int:
        """Compressed keys (C1), memory not counted."""
        return num_compress_blocks(self.kv_len, self, self.semantics)

    @property
    def num_selection_blocks(self) -> int:
        """Blocks of l' tokens, the last of which may be short (F2)."""
        return num_selection_blocks(self.kv_len, self)

    @property
    def layer_sizes(self) -> Sizes:
        """The geometry by itself, as a layer takes it (G1)."""
        return Sizes(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sizes)})

    @property
    def geometry(self) -> dict[str, Any]:
        """Sizes and semantics, as the definition's functions take them."""
        semantics = self.semantics
        if semantics.input_norm == "machine_eps" and self.dtype != "float64":
            # the definition computes in float64, and what is judged in float32, which is True's
            semantics = dataclasses.replace(semantics, input_norm=True)
        return {"sizes": self, "semantics": semantics}

    @property
    def layer_width(self) -> int:
        """Features of a token as the layer returns it."""
        return layer_width(self, self.semantics)

    @property
    def generic(self) -> bool:
        """True if roundings are independent, so that the statistical bounds apply."""
        return self.inputs in GENERIC_INPUTS and self.layout != "expanded"

    # JSON

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["semantics"] = self.semantics.to_json()
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """The inverse of `to_json`; unknown fields raise ValueError by name, no fields TypeError.

        Written by hand, `semantics` may also be a preset's name, or the switches that differ from
        PAPER's.
        """
        if not isinstance(fields, dict):
            raise TypeError(f"case={json.dumps(fields)} must be an object: the case's fields.")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise ValueError(f"case has unknown fields {sorted(unknown)}; known: {sorted(known)}.")
        values = dict(fields)
        switches = values.get("semantics", {})
        if isinstance(switches, str):
            check_one_of("semantics", switches, PRESETS)
            values["semantics"] = PRESETS[switches]
        elif isinstance(switches, dict):
            values["semantics"] = Semantics.from_json(PAPER.to_json() | switches)
        return cls(**values)

    def __repr__(self) -> str:
        """The fields that differ from their defaults, on one line that pastes back as Python."""
        default_of = {field.name: field.default for field in dataclasses.fields(self)}
        shown = []
        for name in dict.fromkeys((*PRINTED_FIRST, *default_of)):
            value = getattr(self, name)
            if value == default_of[name]:
                continue
            text = str(describe(value)) if isinstance(value, Semantics) else repr(value)
            shown.append(f"{name}={text}")
        return f"Case({', '.join(shown)})"

    # data

    def generator(self, name: str) -> np.random.Generator:
        """The array's own source of random numbers."""
        return np.random.Generator(np.random.Philox([self.seed, zlib.crc32(name.encode())]))

    def array(self, name: str, *shape: int) -> np.ndarray:
        """The array called `name`, in the case's dtype; q, k, v and their kin follow `inputs`.

        `name` is one of q, k, v, k_cmp, v_cmp, mem_k, mem_v, x, d_out, d_lse, or "weights/...".
        """
        rng = self.generator(name)
        shared = ("q", "k", "v", "k_cmp", "v_cmp", "mem_k", "mem_v", "x", "d_out", "d_lse")
        filled = list(shape)
        if self.layout == "expanded" and name in shared:
            # one batch entry, seen `batch` times, or one head of keys and values, seen by all:
            # an expanded tensor has nothing else to show
            axis = 1 if shape[0] == 1 and name.removeprefix("mem_")[0] in "kv" else 0
            filled[axis] = min(1, shape[axis])
        values = np.broadcast_to(self._fill(rng, name, tuple(filled)), shape)
        return values.astype(DTYPES[self.dtype], order="C")

    def _fill(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        role = {"mem_k": "k", "mem_v": "v"}.get(name, name[:1])
        if role not in ("q", "k", "v"):
            return rng.standard_normal(shape)
        match self.inputs, role:
            case "integers", _:
                # zeros of both signs
                return rng.integers(-2, 3, shape).astype(float) * (rng.random(shape) < 0.5)
            case "one_hot_v", "v":
                return np.eye(shape[-1])[rng.integers(0, shape[-1], shape[:-1])]
            case "equal", "k":
                return np.ones(shape)
            case "ties", "q" | "k":
                return rng.integers(0, 2, shape).astype(float)
            case "flat" | "drift", "q":
                return 0.2 * rng.standard_normal(shape)
            case "huge", "q" | "k":
                return 20.0 * rng.standard_normal(shape)
            case "heavy", _:
                return np.clip(rng.standard_t(2, shape), -100, 100)
            case "offsets", "k":
                return rng.standard_normal(shape) + 5
            case "offsets", "v":
                return rng.standard_normal(shape) + 10
            case "drift", "k":
                return rng.standard_normal(shape) + 2
            case "drift", "v":
                # all keys weigh alike, and sums over them go far before they come back
                return rng.standard_normal(shape) + np.linspace(-3, 3, shape[-2])[:, None]
            case "tiny", _:
                return 1e-4 * rng.standard_normal(shape)
            case "low", "q" | "k":
                # logits below -1e4 whatever the scale, from products beyond those of float16
                values = rng.standard_normal(shape)
                size = max(1.5e4 * shape[-1] ** 0.5, 8e4) ** 0.5
                values[..., :1] = size if role == "q" else -size
                return values
            case _:
                return rng.standard_normal(shape)

    def qkv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v of the fine and sliding branches."""
        return (
            self.array("q", self.batch, self.q_heads, self.q_len, self.head_dim),
            self.array("k", self.batch, self.kv_heads, self.kv_len, self.head_dim),
            self.array("v", self.batch, self.kv_heads, self.kv_len, self.value_dim),
        )

    def compressed(self) -> tuple[np.ndarray, ...]:
        """q, k_cmp, v_cmp, mem_k, mem_v of the compress branch."""
        kv = (self.batch, self.kv_heads)
        return (
            self.array("q", self.batch, self.q_heads, self.q_len, self.head_dim),
            self.array("k_cmp", *kv, self.num_compress_blocks, self.head_dim),
            self.array("v_cmp", *kv, self.num_compress_blocks, self.value_dim),
            self.array("mem_k", *kv, self.num_mem_kv, self.head_dim),
            self.array("mem_v", *kv, self.num_mem_kv, self.value_dim),
        )

    def upstream_gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """d_out and d_lse, the gradients that arrive from above."""
        rows = (self.batch, self.q_heads, self.q_len)
        return self.array("d_out", *rows, self.value_dim), self.array("d_lse", *rows)

    def pool_weights(self) -> dict[str, np.ndarray]:
        """Weights of the compression map for keys (C4), scaled to keep outputs near one."""
        weights = {}
        for name, shape in pool_weight_shapes(self, self.head_dim).items():
            values = self.generator(f"weights/{name}").standard_normal(shape)
            if name.startswith("weight"):
                values = values / max(1, shape[-1]) ** 0.5
            weights[name] = values.astype(DTYPES[self.dtype])
        return weights

    def layer_weights(self) -> dict[str, np.ndarray]:
        """Weights of the layer (G1), scaled to keep q, k, v, gates and outputs near one."""
        weights = {}
        for name, shape in layer_weight_shapes(self, self.semantics).items():
            values = self.generator(f"weights/{name}").standard_normal(shape)
            if name == "norm.weight":
                values = 1 + values / 4
            elif ".weight" in name:
                values = values / shape[-1] ** 0.5
            if name == "to_q.weight":
                values = self._of_queries(values)
            weights[name] = values.astype(DTYPES[self.dtype])
        return weights

    def _of_queries(self, values: np.ndarray) -> np.ndarray:
        """What `inputs` makes of the weight of a layer's queries; its keys stay as they are."""
        match self.inputs:
            case "flat":
                return values / 5
            case "huge":
                return 400.0 * values  # as if both q and k were 20 times as large
            case "heavy":
                rng = self.generator("weights/to_q.weight tails")
                return values * np.clip(rng.standard_t(2, values.shape), -100, 100)
            case _:
                return values

    def tokens(self) -> np.ndarray:
        """x, what the layer reads: (batch, kv_len, model_dim)."""
        return self.array("x", self.batch, self.kv_len, self.model_dim)

    def sequence_lengths(self) -> list[int]:
        """Lengths of the sequences that are packed for G4: kv_len and shorter, none among them.

        One case of four has kv_len alone.
        """
        rng = self.generator("sequence_lengths")
        lengths = [self.kv_len, 0, *rng.integers(0, self.kv_len + 1, 2).tolist()]
        lengths = [lengths[i] for i in rng.permutation(len(lengths))]
        return lengths if rng.integers(0, 4) else [self.kv_len]

    def block_indices(self) -> np.ndarray:
        """Indices for the fine branch, int64 (batch, selection_heads, q_len, n), by `indices`.

        Everything that I6 and F3 speak of occurs: -1 in any slot, indices past the last block
        (among them some that a cast to 32 bits would wrap into the array), duplicates.
        """
        shape = (self.batch, self.selection_heads, self.q_len, self.num_selected_blocks)
        if self.layout == "expanded" and self.batch > 1:
            once = dataclasses.replace(self, batch=1).block_indices()
            return np.broadcast_to(once, shape).copy()
        rng = self.generator("block_indices")
        blocks = self.num_selection_blocks
        if self.indices == "none" or blocks == 0:
            return np.full(shape, -1, dtype=np.int64)
        if self.indices == "few":
            return rng.integers(0, min(5, blocks), shape)
        if self.indices == "same":
            return np.broadcast_to(rng.integers(0, blocks, (*shape[:-1], 1)), shape).copy()
        if self.indices == "mixed":
            indices = rng.integers(-2, blocks + 2, shape)
            wraps = rng.random(shape) < 0.1
            return np.where(wraps, indices + 2**32, indices)
        # "all" and "distinct": every row an order of its own; slots beyond the blocks hold -1
        order = np.argsort(rng.random((*shape[:-1], max(blocks, shape[-1]))), axis=-1)
        indices = np.where(order < blocks, order, -1)
        if self.indices == "all":
            indices = np.sort(indices, axis=-1)[..., ::-1]
        return np.ascontiguousarray(indices[..., : shape[-1]])


def describe(semantics: Semantics) -> str:
    """The preset's name, or the nearest preset and the switches that differ."""

    def differences(preset: Semantics) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(Semantics)]
        return {n: v for n in names if (v := getattr(semantics, n)) != getattr(preset, n)}

    name = min(PRESETS, key=lambda preset: len(differences(PRESETS[preset])))
    changed = differences(PRESETS[name])
    if not changed:
        return name
    return f"replace({name}, {', '.join(f'{n}={v!r}' for n, v in changed.items())})"


def load_case(text: str) -> Case:
    """A case from JSON text: the case itself, or a finding that carries one under "case"."""
    fields = json.loads(text)
    return Case.from_json(fields.get("case", fields))
