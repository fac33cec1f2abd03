"""Masks read through a whole layer, one gate open at a time (W1, C2, F1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.compress import compress_windows
from nsa_ref.layer import NORM_EPS
from nsa_ref.semantics import BRANCHES
from nsa_ref.testing import probes
from nsa_ref.testing.branches import COMPRESS, call, checked_tensor
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Outcome, Property, is_declared, oracle_mask
from nsa_ref.testing.properties.layer import Asked, check_output, check_pairs, with_gates
from nsa_ref.testing.properties.masks import wrong_mask
from nsa_ref.testing.verdicts import Inconclusive


class OneBranch(Implementation):
    """One branch of somebody's layer, as an implementation of that branch alone.

    x is a one-hot row for each token, so that `to_v` holds the values; its gate is open, the others
    are shut. A linear map that picks the last token of a window makes compressed values of them.
    """

    def __init__(self, implementation: Implementation) -> None:
        self.numerics = implementation.numerics
        self.implementation = implementation

    def offers(self, method: str) -> bool:
        return method in ("sliding", "compress", "fine")

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        return self._through(case, "sliding", v)

    def compress(
        self, case: Case, q: Any, k_cmp: Any, v_cmp: Any, mem_k: Any, mem_v: Any
    ) -> Attention:
        v = np.zeros((case.batch, case.kv_heads, case.kv_len, case.value_dim), v_cmp.dtype)
        for i, (_, stop) in enumerate(compress_windows(case.kv_len, case, case.semantics)):
            v[:, :, stop - 1] = v_cmp[:, :, i]
        return self._through(case, "compress", v, mem_v[0])

    def fine(self, case: Case, q: Any, k: Any, v: Any, block_indices: Any) -> Attention:
        return self._through(case, "fine", v, block_indices=block_indices)

    def _through(
        self,
        case: Case,
        branch: str,
        v: np.ndarray,
        mem_v: np.ndarray | None = None,
        block_indices: np.ndarray | None = None,
    ) -> Attention:
        dtype = DTYPES[case.dtype]
        weights = {name: np.zeros_like(weight) for name, weight in case.layer_weights().items()}
        weights = with_gates(case, weights, (b == branch for b in BRANCHES))
        values = np.swapaxes(v[0], 1, 2).reshape(case.kv_heads * case.value_dim, case.kv_len)
        for name in ("to_v.weight", f"to_v_{branch}.weight"):
            if name in weights:
                weights[name][:, : case.kv_len] = values
        if "norm.weight" in weights:
            # the root mean square of a one-hot row, so that it stays one
            root = (1 / case.model_dim + NORM_EPS) ** 0.5
            weights["norm.weight"] = np.full(case.model_dim, root, dtype)
        if "to_out.weight" in weights:
            weights["to_out.weight"] = np.eye(*weights["to_out.weight"].shape, dtype=dtype)
        if "compress_v.weight" in weights:
            last = weights["compress_v.weight"][..., -case.value_dim :]
            last[...] = np.eye(case.value_dim, dtype=dtype)
        if mem_v is not None:
            weights["mem_v"] = mem_v
        x = np.zeros((case.batch, case.kv_len, case.model_dim), dtype)
        x[:, :, : case.kv_len] = np.eye(case.kv_len, dtype=dtype)
        blocks = () if block_indices is None else (block_indices,)
        method = "layer_with_blocks" if blocks else "layer"
        found = call(self.implementation.run, method, case, weights, x, *blocks)
        shape = (case.batch, case.kv_len, case.layer_width)
        out = checked_tensor(case, method, found, shape)[..., : case.q_heads * case.value_dim]
        out = out.reshape(case.batch, case.kv_len, case.q_heads, case.value_dim)
        return Attention(out.transpose(0, 2, 1, 3).astype(dtype), None)  # type: ignore[arg-type]


def mask(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A branch's mask, bit by bit, read through the whole layer with one gate open."""
    branch = prop.the_branch
    check_pairs(case)
    width = case.q_heads * case.value_dim if case.semantics.output_projection else 0
    if max(case.kv_len, width) > case.model_dim:
        raise Inconclusive("narrow model", case.model_dim)
    if branch is COMPRESS and case.compress_map not in ("linear", "linear_per_head"):
        raise Inconclusive("no linear map")
    expected = oracle_mask(branch, case)
    if not expected.size:
        raise Inconclusive("no element")
    if branch is COMPRESS and not expected.any():
        raise Inconclusive("no visible block")
    through = OneBranch(implementation)
    # input_norm rounds its weight, a quotient and a product; all else is exact on such inputs
    roundings = 5 if case.semantics.input_norm else 2
    actual = probes.forward_mask(through, branch, case, expected, roundings=roundings)
    if (actual != expected).any():
        if implementation.offers("layer"):
            # what is wrong with a single token, in the window for sure, is no mask
            window = case.sliding_window_size + 1
            alone = dataclasses.replace(case, q_len=1, kv_len=1, sliding_window_size=window)
            if is_declared(implementation, alone):
                check_output(Asked.about(implementation, "layer", alone), "G1")
        reading = f"{branch.name} mask read through the layer"
        raise wrong_mask(branch, prop.clause, case, expected, actual, reading)
    return Outcome(compared=expected.size)
