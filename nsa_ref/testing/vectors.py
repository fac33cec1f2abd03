"""Golden vectors: files that ask what a case asks, for ports that Python cannot call.

A vector is a file of safetensors: inputs in the case's dtype under "in/", what the definition makes
of them under the name that an answer must have, and under "bound/ROW/" how far a port whose kernels
round as that row of numerics says may be from it. `answers` judges what comes back.

Nothing is drawn: the cases are the rows of the tables below, and the arrays are the cases' own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nsa_ref.compress import pool, pool_vjp
from nsa_ref.map_bounds import pool_bounds
from nsa_ref.numerics import NUMERICS
from nsa_ref.selection import scored, top_blocks
from nsa_ref.selection_bounds import score_bounds
from nsa_ref.semantics import PAPER, PRESETS, Semantics
from nsa_ref.testing.branches import BRANCHES, COMPRESS, FINE, SLIDING, Branch
from nsa_ref.testing.case import DTYPES, LAYOUTS, Case
from nsa_ref.testing.choices import undecided_rows
from nsa_ref.testing.clauses import SPEC_VERSION
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.lattice import EDGES, IN_LAYERS, edges
from nsa_ref.testing.loading import CannotRun, own_version
from nsa_ref.testing.properties.common import bounds_of
from nsa_ref.testing.properties.layer import Truth, Weights, rows_decode
from nsa_ref.testing.properties.packed import Packed
from nsa_ref.testing.properties.values import sent_back
from nsa_ref.testing.strategies import ABOUT, VARIED_BY
from nsa_ref.testing.verdicts import Inconclusive

SCHEMA = "nsa-ref-vectors-1"
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"

#: dtype -> rows of numerics whose kernels store in it, the usual one first.
ROWS = {
    dtype: tuple(name for name, row in NUMERICS.items() if row.dtype == dtype) for dtype in DTYPES
}

#: What the cases of a method are about, a key of ABOUT.
METHODS = {
    "sliding": "sliding",
    "compress": "compress",
    "fine": "fine",
    "pool": "pool",
    "select": "selection",
    "layer": "layer",
    "varlen": "layer",
}

#: Sizes of every case, where its row says nothing else.
USUAL: dict[str, Any] = {
    "q_heads": 2,
    "head_dim": 8,
    "value_dim": 8,
    "q_len": 10,
    "kv_len": 10,
    "compress_block_size": 4,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 4,
    "num_selected_blocks": 2,
    "sliding_window_size": 3,
    "model_dim": 6,
}

# fmt: off
#: The edges of the lattice: together the rows stand on all that a file can show.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "one-token": {
        "q_heads": 1, "q_len": 1, "kv_len": 1, "num_selected_blocks": 1, "sliding_window_size": 1,
    },
    "plain": {"num_mem_kv": 1, "compress_map": "linear", "num_local_blocks": 1},
    "decode": {
        "q_len": 1, "kv_len": 19, "sliding_window_size": 18, "num_selected_blocks": 7,
        "num_mem_kv": 1, "inputs": "low", "indices": "mixed",
    },
    "one-more-key": {"kv_len": 11, "inputs": "flat", "indices": "same", "compress_map": "mlp"},
    "one-key-less": {"kv_len": 9, "inputs": "integers", "seed": 1},
    "few-keys": {
        "head_dim": 6, "kv_len": 5, "inputs": "offsets", "indices": "none",
        "num_selected_blocks": 0, "compress_positions": True,
    },
    "no-query": {"q_len": 0, "kv_len": 5},
    "no-batch": {"batch": 0},
    "three-entries": {
        "batch": 3, "q_heads": 6, "kv_heads": 2, "value_dim": 16, "inputs": "heavy",
        "indices": "few", "compress_map": "linear_per_head",
        "num_initial_blocks": 1, "seed": 1,
    },
    "sixteen-heads": {
        "q_heads": 16, "head_dim": 128, "value_dim": 64, "q_len": 7, "kv_len": 7,
        "inputs": "one_hot_v", "seed": 1,
    },
    "own-key": {"q_heads": 5, "sliding_window_size": 0, "inputs": "equal", "indices": "all"},
    "wide-window": {
        "sliding_window_size": 13, "num_mem_kv": 16, "inputs": "tiny", "indices": "all",
        "num_selected_blocks": 3, "seed": 1,
    },
    "wide-head": {"head_dim": 136, "value_dim": 3, "inputs": "ties"},
    "huge-logits": {"inputs": "huge", "kv_heads": 2, "seed": 1},
    "many-blocks": {
        "q_len": 2, "kv_len": 258, "compress_block_size": 2, "compress_block_sliding_stride": 1,
        "selection_block_size": 1, "num_selected_blocks": 17, "num_mem_kv": 1,
    },
    "tiles-and-one": {
        "head_dim": 64, "value_dim": 128, "q_len": 129, "kv_len": 129, "inputs": "drift",
        "selection_block_size": 8, "num_selected_blocks": 16, "sliding_window_size": 128,
    },
}

#: Windows that leave gaps, or overlap by no whole stride: nothing but eq. 9 forbids them.
WINDOWS: dict[str, dict[str, Any]] = {
    "gaps": {"compress_block_size": 1},
    "odd-windows": {"compress_block_size": 5, "seed": 1},
}

#: Packed sequences are layers side by side: the edges are the layer's.
PACKED = ("one-token", "plain", "decode", "three-entries", "wide-window", "shown")

#: What differs between conventions: windows, alignment, empty rows, duplicates, forced blocks.
CONVENTIONS: dict[str, Semantics] = {
    "PAPER": PAPER,
    "PAPER-not-causal": dataclasses.replace(PAPER, causal=False),
    **{name: preset for name, preset in PRESETS.items() if preset != PAPER},
}
SHOWN: dict[str, dict[str, Any]] = {
    "shown": {
        "q_heads": 4, "kv_heads": 2, "kv_len": 11, "num_mem_kv": 1, "num_selected_blocks": 3,
        "num_initial_blocks": 1, "indices": "few", "seed": 1,
    },
    "empty-rows": {"kv_len": 7, "indices": "mixed"},
}
# fmt: on

#: Sizes that are no fields of VARIED_BY, and the groups of ABOUT for which they are varied.
ALSO_VARIED_BY = {
    "compress_map": ("map",),
    "compress_positions": ("map",),
    "model_dim": ("model",),
}

#: Edges that no file can show.
NO_FILE_HAS = {f"layout {name}": "a file has no layout in memory" for name in LAYOUTS[1:]}


@dataclass(frozen=True)
class Asked:
    """One tensor that an answer may have.

    clause : what it decides
    bounds : row of numerics -> the largest error; none if nothing may differ
    """

    clause: str
    expected: np.ndarray
    bounds: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Vector:
    """What one file holds.

    name : of the file, without its suffix
    convention : the name of the case's semantics
    inputs, asked : by the names of the plug
    known : what else decides whether an answer is right: scores of blocks and what they admit
    """

    name: str
    method: str
    convention: str
    case: Case
    inputs: Mapping[str, np.ndarray]
    asked: Mapping[str, Asked]
    known: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def edges(self) -> list[str]:
        """The edges of the lattice that its case stands on, of those that its method reads."""
        return edges_of(self.method, self.case)

    def tensors(self) -> dict[str, np.ndarray]:
        """All arrays, by their names in the file."""
        found = {f"in/{name}": array for name, array in self.inputs.items()}
        for name, asked in self.asked.items():
            found[name] = asked.expected
            found |= {f"bound/{row}/{name}": bound for row, bound in asked.bounds.items()}
        return found | {f"known/{name}": array for name, array in self.known.items()}

    def header(self) -> dict[str, Any]:
        """What the file says of itself, and the manifest of it."""
        return {
            "method": self.method,
            "clause": next(iter(self.asked.values())).clause,
            "asks": {name: asked.clause for name, asked in self.asked.items()},
            "semantics": self.convention,
            "numerics": list(ROWS[self.case.dtype]),
            "edges": self.edges,
            "case": self.case.to_json(),
        }


# Which cases


#: Name of a vector, method, convention and case.
Named = tuple[str, str, str, Case]


def named_cases() -> Iterator[Named]:
    """What there are vectors of; the edges first."""
    for convention, semantics in CONVENTIONS.items():
        for method, about in METHODS.items():
            rows = GEOMETRIES if semantics == PAPER else SHOWN
            if semantics == PAPER and about in ("compress", "pool"):
                rows = GEOMETRIES | WINDOWS
            elif method == "varlen":
                rows = {row: sizes for row, sizes in rows.items() if row in PACKED}
            for (row, sizes), dtype in itertools.product(rows.items(), DTYPES):
                case = _case(about, dict(USUAL, **sizes), semantics, dtype)
                if case is not None:
                    yield f"{method}-{convention}-{row}-{dtype}", method, convention, case


def _case(about: str, fields: dict[str, Any], semantics: Semantics, dtype: str) -> Case | None:
    """A case about this: sizes that nothing reads have their defaults. None if it takes long."""
    groups = set(ABOUT[about])
    for field, varied_for in {**VARIED_BY, **ALSO_VARIED_BY}.items():
        if not groups & set(varied_for):
            fields.pop(field, None)
    if about == "layer":
        # it reads its own tokens, all of them, and its heads are narrow where these are many
        if fields["head_dim"] > (128 if fields["kv_len"] < 64 else 8):
            return None
        fields["q_len"] = fields["kv_len"]
        if fields.get("inputs") not in IN_LAYERS:
            fields.pop("inputs", None)
    return Case(semantics=semantics, dtype=dtype, **fields)


def edges_of(method: str, case: Case) -> list[str]:
    """The edges that a case stands on, of those that cases of the method can stand on."""
    about = METHODS[method]
    branch = {"sliding": SLIDING, "fine": FINE}.get(about, COMPRESS)
    indices = case.block_indices() if branch is FINE else None
    met = edges(case, branch.mask(case, indices))
    return [name for name in met if EDGES[name].can_be_met(about)]


def called(method: str, case: Case, name: str) -> str:
    """What findings call the tensor that an answer to `method` has by this name."""
    if method in ("sliding", "compress", "fine"):
        return f"{method} {name}"
    if method == "pool":
        which = f"pool ({case.compress_map})"
        return which if name == "out" else f"{which} {name}"
    named = {
        "block_indices": "select",
        "out": method,
        "out_with_blocks": "layer_with_blocks",
        "decoded": "decode",
    }
    return named.get(name, name)


# What they ask


def make(name: str, method: str, convention: str, case: Case) -> Vector:
    """The vector of a case: its inputs, what the definition makes of them, and the bounds."""
    makers: dict[str, Callable[[Case], Parts]] = {
        "pool": _pool,
        "select": _select,
        "layer": _layer,
        "varlen": _varlen,
    }
    for branch in BRANCHES:
        makers[branch.name] = functools.partial(_attention, branch)
    return Vector(name, method, convention, case, *makers[method](case))


#: Inputs, what is asked, and what else is known.
Parts = tuple[dict[str, np.ndarray], dict[str, Asked], dict[str, np.ndarray]]


def _held_to(case: Case, row: str) -> Implementation:
    """A port that rounds as this row says, and has nothing else."""
    port = Implementation()
    port.numerics = {case.dtype: row}
    return port


def _by_row(case: Case, bounds: Callable[[str], Any]) -> dict[str, Any]:
    return {row: bounds(row) for row in ROWS[case.dtype]}


def mask_clause(branch: Branch, case: Case) -> str:
    """The clause that a mask is mostly about."""
    reach, blocks = case.sliding_window_size, case.kv_len % case.selection_block_size
    if branch is SLIDING and case.semantics.causal and (not reach or reach >= case.kv_len):
        return "W3"
    if branch is COMPRESS and case.num_mem_kv:
        return "C3"
    if branch is FINE and case.semantics.causal and blocks and case.indices in ("distinct", "all"):
        return "F2"
    return branch.mask_clause(case)


def _attention(branch: Branch, case: Case) -> Parts:
    given = branch.inputs(case)
    mask = branch.mask(case, given.block_indices)
    d_outputs = sent_back(branch, case, mask)
    names = {
        "sliding": ("q", "k", "v"),
        "fine": ("q", "k", "v", "block_indices"),
        "compress": ("q", "k_cmp", "v_cmp", "mem_k", "mem_v"),
    }[branch.name]
    inputs = dict(zip(names, branch.arguments(case, given)))
    inputs |= {"d_out": d_outputs[0], "d_lse": d_outputs[1]}

    def apart(found: Any, gradients: Any) -> dict[str, np.ndarray]:
        """By the names of the plug; columns of memory stand first in dk and dv."""
        dq, dk, dv = gradients
        tensors = {"out": found.out, "lse": found.lse, "dq": dq}
        if branch is not COMPRESS:
            return tensors | {"dk": dk, "dv": dv}
        m = case.num_mem_kv
        tensors |= {"dk_cmp": dk[:, :, m:], "dv_cmp": dv[:, :, m:]}
        return tensors | {"dmem_k": dk[:, :, :m], "dmem_v": dv[:, :, :m]}

    def bounds(row: str) -> dict[str, np.ndarray]:
        all_of = bounds_of(branch, _held_to(case, row), case, given, mask, *d_outputs)
        return apart(all_of, all_of[2:])

    by_row = _by_row(case, bounds)
    expected = apart(
        branch.attend(case, mask, given), branch.attend_vjp(case, mask, given, *d_outputs)
    )
    counted = mask.astype(np.uint8)
    asked = {"mask": Asked(mask_clause(branch, case), counted)}
    for name, value in expected.items():
        clause = "A1" if name in ("out", "lse") else "A3"
        own = {row: of_row[name] for row, of_row in by_row.items()}
        asked[name] = Asked(clause, value, own)
    return inputs, asked, {}


def _with_weights(inputs: dict[str, np.ndarray], weights: Weights) -> dict[str, np.ndarray]:
    return inputs | {f"weights/{name}": array for name, array in weights.items()}


def _pool(case: Case) -> Parts:
    x = case.array("x", case.batch, case.kv_heads, case.kv_len, case.head_dim)
    weights = case.pool_weights()
    blocks = case.batch, case.kv_heads, case.num_compress_blocks, case.head_dim
    d_out = case.array("d_out", *blocks)
    by_row = _by_row(
        case, lambda row: pool_bounds(x, weights, d_out, **case.geometry, numerics=row)
    )
    dx, dweights = pool_vjp(x, weights, d_out, **case.geometry)
    # the mean of given tokens is made by the windows alone
    plain = case.compress_map == "mean" and not case.compress_positions
    out = pool(x, weights, **case.geometry)
    asked = {
        "out": Asked("C1" if plain else "C4", out, {row: b.out for row, b in by_row.items()}),
        "dx": Asked("C4", dx, {row: b.dx for row, b in by_row.items()}),
    }
    for name, want in dweights.items():
        bounds = {row: b.dweights[name] for row, b in by_row.items()}
        asked[f"d{name}"] = Asked("C4", want, bounds)
    return _with_weights({"x": x, "d_out": d_out}, weights), asked, {}


def _select(case: Case) -> Parts:
    q, k_cmp, _, mem_k, _ = case.compressed()
    given: dict[str, Any] = {"kv_len": case.kv_len, **case.geometry}
    of_blocks = scored(q, k_cmp, mem_k, **given)
    known = {
        "scores": of_blocks.scores,
        "candidates": of_blocks.candidates.astype(np.uint8),
        "forced": of_blocks.forced.astype(np.uint8),
    }
    for row in ROWS[case.dtype]:
        bounds = score_bounds(q, k_cmp, mem_k, **given, numerics=row)
        known[f"{row}/scores"] = bounds
        undecided = undecided_rows(of_blocks, bounds, **case.geometry)
        known[f"{row}/undecided"] = undecided.astype(np.uint8)
    chosen = top_blocks(of_blocks, case, case.semantics)
    asked = {"block_indices": Asked(_choice_clause(case), chosen)}
    return {"q": q, "k_cmp": k_cmp, "mem_k": mem_k}, asked, known


def _choice_clause(case: Case) -> str:
    """The clause that a choice is mostly about."""
    if case.num_selected_blocks >= case.num_selection_blocks:
        return "I6"
    if case.inputs in ("equal", "ties", "integers"):
        return "I5"
    if case.num_initial_blocks or case.num_local_blocks:
        return "I4"
    if case.num_mem_kv:
        return "I1"
    return "I3" if case.group_size > 1 else "I2"


def _layer(case: Case) -> Parts:
    x, weights = case.tokens(), case.layer_weights()
    truths = _by_row(case, lambda row: Truth.of(_held_to(case, row), case, x, weights))
    usual = truths[ROWS[case.dtype][0]]
    # nothing is sent back through a row that a right port may choose other blocks for
    undecided = np.any([truth.undecided for truth in truths.values()], axis=0)
    d_out = case.array("d_out", *x.shape[:2], case.layer_width)
    d_out = np.where(undecided[..., None], 0, d_out).astype(d_out.dtype)
    inputs = {"x": x, "d_out": d_out, "block_indices": usual.block_indices}
    out = usual.output
    handed = {row: truth.bounds.out for row, truth in truths.items()}
    own = {
        row: np.where(truth.undecided[..., None], np.inf, truth.bounds.out)
        for row, truth in truths.items()
    }
    asked = {"out": Asked("G1", out, own)}
    asked["out_with_blocks"] = Asked("G1", out, handed)
    if case.semantics.causal:
        with contextlib.suppress(Inconclusive):
            rows_decode(case)
            asked["decoded"] = Asked("G3", out, own)
    found: dict[str, Any] = {row: truth.gradients(d_out) for row, truth in truths.items()}
    dx, dweights, _ = found[ROWS[case.dtype][0]]
    bounds = {row: of_row[2] for row, of_row in found.items()}
    clause = "A4" if case.num_selection_blocks > case.num_selected_blocks else "G1"
    asked["dx"] = Asked(clause, dx, {row: b.dx for row, b in bounds.items()})
    for name, want in dweights.items():
        of_weight = {row: b.dweights[name] for row, b in bounds.items()}
        asked[f"d{name}"] = Asked(clause, want, of_weight)
    return _with_weights(inputs, weights), asked, {}


def _varlen(case: Case) -> Parts:
    every = _by_row(case, lambda row: Packed.of(_held_to(case, row), case))
    usual = every[ROWS[case.dtype][0]]
    x, weights = usual.asked.x, usual.asked.weights
    undecided = np.any([packed.undecided for packed in every.values()], axis=0)
    d_out = case.array("d_out", len(x), case.layer_width)
    d_out = np.where(undecided[:, None], 0, d_out).astype(d_out.dtype)

    def gradients(packed: Packed) -> tuple[Any, ...]:
        """Bound of out, dx, its bound, dweights, their bounds."""
        pairs = zip(packed.truths, packed.rows)
        of_each: list[Any] = [truth.gradients(d_out[None, rows]) for truth, rows in pairs]
        outs = [np.where(t.undecided[0][:, None], np.inf, t.bounds.out[0]) for t in packed.truths]
        dx, dx_bounds = [dx[0] for dx, _, _ in of_each], [b.dx[0] for _, _, b in of_each]
        summed = packed.summed([dw for _, dw, _ in of_each], [b.dweights for _, _, b in of_each])
        return (*map(np.concatenate, (outs, dx, dx_bounds)), *summed)

    found = {row: gradients(packed) for row, packed in every.items()}
    out = np.concatenate([truth.output[0] for truth in usual.truths])
    _, dx, _, dweights, _ = found[ROWS[case.dtype][0]]
    asked = {
        "out": Asked("G4", out, {row: f[0] for row, f in found.items()}),
        "dx": Asked("G4", dx, {row: f[2] for row, f in found.items()}),
    }
    for name, want in dweights.items():
        asked[f"d{name}"] = Asked("G4", want, {r: f[4][name] for r, f in found.items()})
    inputs = {"x": x, "cu_seqlens": usual.cu_seqlens, "d_out": d_out}
    return _with_weights(inputs, weights), asked, {}


# Files


def encoded(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A file of safetensors, the same bytes for the same arrays and texts.

    The library writes metadata in another order every time, so the header is written again, its
    keys sorted.
    """
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    written = save(whole)
    start = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(written[8:start]) | {"__metadata__": dict(metadata)}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + written[start:]


#: safetensors' names of what a tensor may hold.
STORED = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    **{f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint"))
       for bits in (8, 16, 32, 64)},
}  # fmt: skip


def decoded(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file of safetensors.

    Raises
    ------
    ValueError : it is none, or holds what is neither a number nor a bool of NumPy's
    """
    from safetensors import SafetensorError, deserialize

    try:
        found = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    arrays = {}
    for name, tensor in found:
        dtype = STORED.get(tensor["dtype"])
        if dtype is None:
            known = ", ".join(STORED)
            raise ValueError(f"{name} has dtype {tensor['dtype']}; it must be one of {known}")
        values = np.frombuffer(tensor["data"], DTYPES.get(dtype, np.dtype(dtype)))
        arrays[name] = values.reshape(tensor["shape"])
    return arrays, header.get("__metadata__") or {}


def write(folder: Path, named: Iterable[Named] | None = None) -> dict[str, Any]:
    """Write the vectors and their manifest into a folder, which must be new or empty.

    named : those of `named_cases` that are wanted, all of them by default

    Raises
    ------
    CannotRun : it holds something, or cannot be written
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CannotRun(f"{folder} is not empty. Try another folder, or empty this one")
        listed = []
        for each in named_cases() if named is None else named:
            vector = make(*each)
            header = vector.header()
            metadata = {
                "schema": SCHEMA,
                "spec_version": SPEC_VERSION,
                **{k: v if isinstance(v, str) else json.dumps(v)
                   for k, v in header.items()},
            }  # fmt: skip
            data = encoded(vector.tensors(), metadata)
            file = folder / f"{vector.name}{SUFFIX}"
            file.write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            listed.append({"file": file.name, "bytes": len(data), "sha256": digest, **header})
        met = {edge for vector in listed for edge in vector["edges"]}
        manifest = {
            "schema": SCHEMA,
            "spec_version": SPEC_VERSION,
            "nsa_ref": own_version(),
            "vectors": listed,
            "unmet_edges": {
                edge: NO_FILE_HAS.get(edge, "no row has it") for edge in EDGES if edge not in met
            },
        }
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        (folder / MANIFEST).write_text(text)
    except OSError as error:
        raise CannotRun(f"cannot write into {folder}: {error.strerror}. Try another") from None
    return manifest
