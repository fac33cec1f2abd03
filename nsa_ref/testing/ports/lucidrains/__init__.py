"""lucidrains' `SparseAttention` before the judge: causal, not causal, and through FlexAttention.

An environment of its own, beside one that has torch and nsa-ref::

    python3 -m venv --system-site-packages lucidrains
    lucidrains/bin/pip install native-sparse-attention-pytorch==0.2.3
    lucidrains/bin/nsa-ref verify lucidrains

Its Triton kernel needs a GPU and is not tried. It has no queries apart from keys, and no layer that
takes a choice of blocks or packed sequences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nsa_ref.semantics import LUCIDRAINS, LUCIDRAINS_FLEX, Semantics
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Attention, TorchImplementation
from nsa_ref.testing.ports import check_installed

if TYPE_CHECKING:
    from torch import Tensor

    from nsa_ref.testing.implementation import Weights

PACKAGE = "native_sparse_attention_pytorch"

#: The module's sizes, and their names here.
SIZES = {
    "dim": "model_dim",
    "dim_head": "head_dim",
    "heads": "q_heads",
    "kv_heads": "kv_heads",
    "sliding_window_size": "sliding_window_size",
    "compress_block_size": "compress_block_size",
    "compress_block_sliding_stride": "compress_block_sliding_stride",
    "selection_block_size": "selection_block_size",
    "num_selected_blocks": "num_selected_blocks",
    "num_compressed_mem_kv": "num_mem_kv",
}

LIMITS: dict[str, Any] = {
    # there are no queries apart from keys, and no layer of no tokens
    "q_len": "== kv_len",
    "kv_len": ">= 1",
    # windows are at least as long as the stride, which the constructor asserts
    "compress_block_size": ">= compress_block_sliding_stride",
    "compress_map": ("mlp",),
    "compress_positions": (True,),
    "num_mem_kv": (1, 2, 16),
    "num_initial_blocks": (0,),
    "num_local_blocks": (0,),
    # one width for keys and values
    "head_dim": (8, 4, 16),
    "value_dim": "== head_dim",
    # the factory of fine masks scatters indices, all of which must be blocks
    "indices": ("distinct", "few", "same", "all"),
}

#: torch's flag for FlexAttention that is not compiled.
NOT_COMPILED = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"


class Lucidrains(TorchImplementation):
    """The plain path, and the mask factories with what they build not compiled."""

    name = "lucidrains"
    semantics: tuple[Semantics, ...] = (
        LUCIDRAINS,
        dataclasses.replace(LUCIDRAINS, share_selection=False),
    )
    numerics: Mapping[str, str] = {
        "float64": "fp64",
        "float32": "fp32",
        "bfloat16": "bf16-eager",
        "float16": "fp16-eager",
    }
    limits = LIMITS

    def sliding_mask(self, case: Case) -> Any:
        with _masks_of() as package:
            return package.create_sliding_mask(
                case.q_len, case.sliding_window_size, causal=case.semantics.causal
            )

    def compress_mask(self, case: Case) -> Any:
        with _masks_of() as package:
            return package.create_compress_mask(
                case.q_len,
                case.num_compress_blocks,
                case.compress_block_sliding_stride,
                case.num_mem_kv,
                causal=case.semantics.causal,
            )

    def sliding(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Attention:
        """By the module that the layer slides with."""
        module = _module(case)
        k, v = (x.repeat_interleave(case.group_size, dim=1) for x in (k, v))
        return Attention(module.sliding_window(q, k, v), None)  # type: ignore[arg-type]

    def layer(self, case: Case, weights: Weights, x: Tensor) -> Tensor:
        return self.called(case, weights, x)

    def decode(self, case: Case, weights: Weights, x: Tensor) -> Tensor:
        import torch

        rows, cache = [], None
        for t in range(case.kv_len):
            row, cache = self.called(case, weights, x[:, t : t + 1], cache=cache, return_cache=True)
            rows.append(row)
        return torch.cat(rows, dim=1)

    def called(self, case: Case, weights: Weights, x: Tensor, **how: Any) -> Any:
        """The module with these weights, which may ask for gradients."""
        import torch

        module = _module(case).to(x.dtype)
        parameters = upstream_parameters(case, weights)
        return torch.func.functional_call(module, parameters, (x,), how)


class LucidrainsNotCausal(Lucidrains):
    """The plain path without causality, which is what the module does unless it is told."""

    name = "lucidrains not causal"
    semantics = (dataclasses.replace(LUCIDRAINS, causal=False),)

    def offers(self, method: str) -> bool:
        return method in ("layer", "sliding", "sliding_mask")


class LucidrainsFlex(Lucidrains):
    """The path through FlexAttention, forward alone: on a CPU it has no backward."""

    name = "lucidrains flex"
    semantics = (
        LUCIDRAINS_FLEX,
        dataclasses.replace(LUCIDRAINS_FLEX, share_selection=False),
        dataclasses.replace(LUCIDRAINS_FLEX, causal=False),
    )

    def offers(self, method: str) -> bool:
        return method in ("layer", "fine_mask")

    def offers_vjp(self, method: str) -> bool:
        return False

    # every slot must hold a block
    limits_of: Mapping[str, Mapping[str, Any]] = {
        "fine_mask": {"num_selected_blocks": "<= num_selection_blocks"}
    }

    def fine_mask(self, case: Case, block_indices: Tensor) -> Any:
        with _masks_of() as package:
            made = package.create_fine_mask(
                case.q_len, case.selection_block_size, causal=case.semantics.causal
            )
            return made(block_indices, case.q_heads // block_indices.shape[1])

    def layer(self, case: Case, weights: Weights, x: Tensor) -> Tensor:
        causal = case.semantics.causal
        with _masks_of() as package:
            fine = package.create_fine_mask(case.q_len, case.selection_block_size, causal)
            sliding = package.create_sliding_mask(case.q_len, case.sliding_window_size, causal)
            masks = {"fine_selection_flex_mask": fine, "sliding_window_flex_mask": sliding}
            return self.called(case, weights, x, **masks)


def implementations(device: str = "cpu") -> list[TorchImplementation]:
    """All paths."""
    check_installed(PACKAGE, "native-sparse-attention-pytorch==0.2.3")
    return [Lucidrains(device), LucidrainsNotCausal(device), LucidrainsFlex(device)]


def upstream_parameters(case: Case, weights: Weights) -> Weights:
    """The layer's weights under the module's names, as functions of the weights.

    Rows of the gates are (branch, head) here and (head, branch) there.
    """
    import torch

    parameters = {
        "norm.weight": weights["norm.weight"],
        "to_qkv.weight": torch.cat([weights[f"to_{name}.weight"] for name in "qkv"]),
        "compress_mem_kv": torch.stack([weights["mem_k"], weights["mem_v"]]),
        "combine_heads.weight": weights["to_out.weight"],
    }
    for kind in ("weight", "bias"):
        gates = weights[f"gates.{kind}"].unflatten(0, (3, case.q_heads))
        parameters[f"to_strategy_combine.0.{kind}"] = gates.transpose(0, 1).flatten(0, 1)
    for side in "kv":
        parameters[f"{side}_intrablock_positions"] = weights[f"compress_{side}.positions"]
        for place, end in ((1, "in"), (3, "out")):
            for kind in ("weight", "bias"):
                of_map = weights[f"compress_{side}.{kind}_{end}"]
                parameters[f"{side}_compress.{place}.{kind}"] = of_map
    return parameters


def _package() -> Any:
    return importlib.import_module(f"{PACKAGE}.native_sparse_attention")


def _module(case: Case) -> Any:
    sizes = {theirs: getattr(case, ours) for theirs, ours in SIZES.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a remark for n = 0
        return _package().SparseAttention(
            **sizes,
            causal=case.semantics.causal,
            norm=bool(case.semantics.input_norm),
            query_heads_share_selected_kv=case.semantics.share_selection,
        )


@contextlib.contextmanager
def _masks_of() -> Iterator[Any]:
    """The package, with masks and FlexAttention that are not compiled: seconds for every shape."""
    package = _package()
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    made, debug = package.create_block_mask, getattr(flex, NOT_COMPILED)
    attention = package.flex_attention

    @functools.wraps(made)
    def not_compiled(*arguments: Any, **options: Any) -> Any:
        return made(*arguments, **(options | {"_compile": False, "device": "cpu"}))

    package.create_block_mask = not_compiled
    package.flex_attention = attention or flex.flex_attention
    setattr(flex, NOT_COMPILED, True)
    try:
        yield package
    finally:
        package.create_block_mask, package.flex_attention = made, attention
        setattr(flex, NOT_COMPILED, debug)
