"""Masks read through a whole layer, one gate open at a time (W1, W2, C2, C3, F1, F4)."""

from __future__ import annotations

import dataclasses

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.compress import compress_windows
from nsa_ref.layer import norm_eps
from nsa_ref.semantics import BRANCHES
from nsa_ref.testing import probes
from nsa_ref.testing.branches import COMPRESS, Branch, Inputs, call, checked_tensor
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import (
    Outcome,
    Property,
    can_be_asked,
    is_declared,
    oracle_mask,
)
from nsa_ref.testing.properties.layer import Asked, check_output, check_pairs, with_gates
from nsa_ref.testing.properties.masks import wrong_mask
from nsa_ref.testing.verdicts import Inconclusive


class ThroughTheLayer(Branch):
    """One branch, as a whole layer has it.

    x is a one-hot row for each token, so that `to_v` holds the values; its gate is open, the others
    are shut. A linear map that picks the last token of a window makes compressed values of them.
    """

    def forward(self, implementation: Implementation, case: Case, inputs: Inputs) -> Attention:
        """The output of the layer for these values, and zero queries and keys."""
        v, mem_v = inputs.v, None
        if self.name == "compress":
            mem_v, v_cmp = v[0, :, : case.num_mem_kv], v[:, :, case.num_mem_kv :]
            v = np.zeros((case.batch, case.kv_heads, case.kv_len, case.value_dim), v.dtype)
            for i, (_, stop) in enumerate(compress_windows(case.kv_len, case, case.semantics)):
                v[:, :, stop - 1] = v_cmp[:, :, i]
        dtype = DTYPES[case.dtype]
        weights = {name: np.zeros_like(weight) for name, weight in case.layer_weights().items()}
        weights = with_gates(case, weights, (b == self.name for b in BRANCHES))
        values = np.swapaxes(v[0], 1, 2).reshape(case.kv_heads * case.value_dim, case.kv_len)
        for name in ("to_v.weight", f"to_v_{self.name}.weight"):
            if name in weights:
                weights[name][:, : case.kv_len] = values
        if "norm.weight" in weights:
            # the root mean square of a one-hot row, so that it stays one
            root = (1 / case.model_dim + norm_eps(case.geometry["semantics"])) ** 0.5
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
        blocks = () if inputs.block_indices is None else (inputs.block_indices,)
        method = "layer_with_blocks" if blocks else "layer"
        found = call(implementation.run, method, case, weights, x, *blocks)
        shape = (case.batch, case.kv_len, case.layer_width)
        out = checked_tensor(case, method, found, shape)[..., : case.q_heads * case.value_dim]
        out = out.reshape(case.batch, case.kv_len, case.q_heads, case.value_dim)
        return Attention(out.transpose(0, 2, 1, 3), None)  # type: ignore[arg-type]


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
        raise Inconclusive("no row sees a key")
    # input_norm rounds its weight, a quotient and a product; all else is exact on such inputs
    roundings = 5 if case.semantics.input_norm else 2
    through = ThroughTheLayer(branch.name)
    actual = probes.forward_mask(implementation, through, case, expected, roundings=roundings)
    if (actual != expected).any():
        if implementation.offers("layer"):
            # what is wrong with a single token, in the window for sure, is no mask; unless it is
            # right where the window shows that token alone
            windows = case.sliding_window_size + 1, 1 - case.semantics.window_closed
            alone = dataclasses.replace(case, q_len=1, kv_len=1)
            tokens = [dataclasses.replace(alone, sliding_window_size=w) for w in windows]
            asked = [Asked.about(implementation, "layer", token) for token in tokens]
            asked = [
                one
                for one in asked
                if is_declared(implementation, one.case, case)
                and can_be_asked(implementation, "layer", one.case)
            ]
            if asked and not any(one.is_right() for one in asked):
                check_output(asked[0], "G1")
        reading = f"{branch.name} mask read through the layer"
        raise wrong_mask(branch, prop.clause, case, expected, actual, reading)
    return Outcome(compared=expected.size)
