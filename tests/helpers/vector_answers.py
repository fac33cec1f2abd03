"""Programs that answer golden vectors: one that is right in all, and what makes it wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.implementation import OracleImplementation
from nsa_ref.testing.vectors import MANIFEST, decoded, encoded

Arrays = dict[str, np.ndarray]

#: The arguments of a method, in the order of the plug.
ARGUMENTS = {
    "sliding": ("q", "k", "v"),
    "fine": ("q", "k", "v", "block_indices"),
    "compress": ("q", "k_cmp", "v_cmp", "mem_k", "mem_v"),
    "select": ("q", "k_cmp", "mem_k"),
}
GRADIENTS = {"compress": ("dq", "dk_cmp", "dv_cmp", "dmem_k", "dmem_v")}


def entries(folder: Path) -> list[dict[str, Any]]:
    """What the manifest lists."""
    listed: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["vectors"]
    return listed


def right_answer(entry: Mapping[str, Any], tensors: Arrays) -> Arrays:
    """What the definition behind the plug answers, in the case's dtype, from the file's inputs."""
    port, case, method = OracleImplementation(), Case.from_json(entry["case"]), entry["method"]
    given = {name[3:]: array for name, array in tensors.items() if name.startswith("in/")}
    if method in ARGUMENTS:
        arguments = [given[name] for name in ARGUMENTS[method]]
    if method == "select":
        return {"block_indices": port.run("select", case, *arguments)}
    if method in ARGUMENTS:
        out, lse = port.run(method, case, *arguments)
        found = port.run_vjp(method, case, *arguments, given["d_out"], given["d_lse"])
        more = [given["block_indices"]] if method == "fine" else []
        mask = port.run(f"{method}_mask", case, *more)
        shape = (case.batch, case.q_heads, *mask.shape[-2:])
        mask = np.broadcast_to(mask, shape).astype(np.uint8)
        gradients = dict(zip(GRADIENTS.get(method, ("dq", "dk", "dv")), found))
        return {"mask": mask, "out": out, "lse": lse, **gradients}

    weights = {name[8:]: array for name, array in given.items() if name.startswith("weights/")}
    x, d_out = given["x"], given["d_out"]
    if method == "pool":
        out = port.run("pool", case, x, weights)
        dx, dweights = port.run_vjp("pool", case, x, weights, d_out)
    else:
        more = [given["cu_seqlens"]] if method == "varlen" else []
        out = port.run(method, case, weights, x, *more)
        dx, dweights = port.run_vjp(method, case, weights, x, *more, d_out)
    answer = {"out": out, "dx": dx, **{f"d{name}": array for name, array in dweights.items()}}
    if method == "layer":
        blocks = given["block_indices"]
        answer["out_with_blocks"] = port.run("layer_with_blocks", case, weights, x, blocks)
        if "decoded" in entry["asks"]:
            answer["decoded"] = port.run("decode", case, weights, x)
    return answer


def rounded_answer(entry: Mapping[str, Any], tensors: Arrays) -> Arrays:
    """What the vector says itself, stored in the case's dtype."""
    dtype = DTYPES[entry["case"]["dtype"]]
    of_lse = np.float64 if dtype == np.float64 else np.float32
    stored = {"mask": np.uint8, "block_indices": np.int64, "lse": of_lse}
    with np.errstate(over="ignore"):
        return {name: tensors[name].astype(stored.get(name, dtype)) for name in entry["asks"]}


def write_answers(
    folder: Path, answers: Path, answer: Callable[[Mapping[str, Any], Arrays], Arrays | None]
) -> Path:
    """A file for every vector, but for those that have no answer; returns `answers`."""
    answers.mkdir()
    for entry in entries(folder):
        arrays = answer(entry, decoded((folder / entry["file"]).read_bytes())[0])
        if arrays is not None:
            (answers / entry["file"]).write_bytes(encoded(arrays, {}))
    return answers
