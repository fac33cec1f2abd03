"""Small layers of nsa_fast beside the definition: of every kind, with weights and tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nsa_fast
from nsa_fast import NativeSparseAttention, native_sparse_attention
from nsa_fast.adapter import keywords
from nsa_ref.layer import layer as oracle
from nsa_ref.layer import layer_block_indices
from nsa_ref.layer_bounds import layer_bounds
from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.testing.case import Case
from nsa_ref.testing.compare import compare

MODEL_DIM = 10

# windows of two strides and blocks of two: no two blocks have the same score but for rounding
SIZES: dict[str, Any] = {
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 6,
    "value_dim": 5,
    "compress_block_size": 4,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 4,
    "num_selected_blocks": 3,
    "num_initial_blocks": 1,
    "num_local_blocks": 1,
    "sliding_window_size": 5,
}
CASE = Case(dtype="float64", batch=2, model_dim=MODEL_DIM, compress_positions=True, **SIZES)


def replace(semantics: Semantics, **changes: Any) -> Semantics:
    return dataclasses.replace(semantics, **changes)


ONE_KV = replace(PAPER, kv_per_branch=False)

#: semantics, compress_map, num_mem_kv
KINDS: dict[str, tuple[Semantics, str, int]] = {
    "PAPER": (PAPER, "mlp", 0),
    "PAPER with memory": (PAPER, "linear", 2),
    "PAPER, not causal": (replace(PAPER, causal=False), "mean", 1),
    "LUCIDRAINS_FLEX": (LUCIDRAINS_FLEX, "mlp", 1),
    "LUCIDRAINS_FLEX, not causal": (replace(LUCIDRAINS_FLEX, causal=False), "linear", 3),
    "one k and v": (ONE_KV, "mean", 0),
    "one k and v, rotary on fine and sliding": (
        replace(ONE_KV, rotary="fine_and_sliding"),
        "linear",
        1,
    ),
    "one k and v, rotary on all": (replace(ONE_KV, rotary="all"), "mean", 1),
    "rotary on fine and sliding": (replace(PAPER, rotary="fine_and_sliding"), "mean", 0),
    "rotary on all": (replace(PAPER, rotary="all"), "mlp", 2),
    "one k and v, pooled once turned": (replace(ONE_KV, rotary="before_pooling"), "mean", 1),
    "pooled once turned": (replace(PAPER, rotary="before_pooling"), "linear_per_head", 2),
    "norm": (replace(PAPER, input_norm=True), "mean", 0),
    "output projection": (replace(PAPER, output_projection=True), "mean", 0),
    "a choice for each query head": (replace(PAPER, share_selection=False), "linear", 0),
    "open window": (replace(PAPER, window_closed=False), "mean", 0),
}

#: Together these switches are in no convention that `NsaFastLayer` declares; the judge holds it to
#: G1 to G4 in all others.
UNJUDGED = (
    "LUCIDRAINS_FLEX, not causal",
    "one k and v, rotary on fine and sliding",
    "rotary on all",
    "one k and v, pooled once turned",
    "pooled once turned",
)


def tokens(batch: int, seq_len: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq_len, MODEL_DIM, generator=generator, dtype=torch.float64)
    x[:, :1] *= 2**-12  # where the eps of the norm counts
    return x


def some_blocks(semantics: Semantics, batch: int, seq_len: int) -> Tensor:
    """Blocks in any order: -1, duplicates, blocks to come and blocks that there are not."""
    heads = SIZES["kv_heads"] if semantics.share_selection else SIZES["q_heads"]
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-1, seq_len // 4 + 2, (batch, heads, seq_len, 3), generator=generator)


class Layer:
    """nsa_fast's layer and the definition, with the same sizes and weights, in float64."""

    def __init__(
        self, semantics: Semantics, compress_map: str, num_mem_kv: int, **changes: Any
    ) -> None:
        changes |= {"semantics": semantics, "compress_map": compress_map, "num_mem_kv": num_mem_kv}
        self.case = dataclasses.replace(CASE, **changes)
        weights = self.case.layer_weights()
        self.weights = {name: torch.from_numpy(weight) for name, weight in weights.items()}

    @classmethod
    def of(cls, made: NativeSparseAttention) -> Layer:
        """With the sizes and the weights of a module, in float64."""
        layer = made.layer
        sizes = {name: getattr(layer, name) for name in SIZES}
        both = cls(layer.semantics, layer.compress_map, made.num_mem_kv, **sizes)
        both.weights = {name: weight.detach() for name, weight in made.named_parameters()}
        return both

    def __call__(self, x: Tensor, cache: nsa_fast.Cache | None = None, **how: Any) -> Tensor:
        how = keywords(native_sparse_attention, self.case) | how
        return native_sparse_attention(x, self.weights, **how, cache=cache)

    def assert_right(self, x: Tensor, blocks: Tensor | None = None, **found: Tensor) -> None:
        """Every one of these is the definition's rows of x, or the last of them.

        The definition makes a choice of blocks of its own if none are handed in.
        """
        weights = {name: weight.detach().numpy() for name, weight in self.weights.items()}
        given, how = (x.detach().numpy(), weights), self.case.geometry
        chosen = layer_block_indices(*given, **how) if blocks is None else blocks.numpy()
        right = oracle(*given, **how, block_indices=chosen)
        bound = layer_bounds(*given, chosen, numerics="fp64", **how).out
        for name, rows in found.items():
            array, first = rows.detach().numpy(), x.shape[1] - rows.shape[1]
            assert array.dtype == np.float64, name
            compare("G1", name, array, right[:, first:], bound[:, first:])


def module(semantics: Semantics = PAPER, **changes: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(MODEL_DIM, **(SIZES | {"semantics": semantics} | changes))
