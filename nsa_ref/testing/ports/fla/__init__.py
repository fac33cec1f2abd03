"""fla-core's operators before the judge: its Triton kernels, and its naive reference.

Without a GPU the kernels run in Triton's interpreter. An environment of their own, beside one that
has torch and nsa-ref::

    python3 -m venv --system-site-packages fla
    fla/bin/pip install --no-deps fla-core==0.6.0 einops==0.8.2
    fla/bin/nsa-ref verify fla

What these operators do not have: a sliding window without flash-attn, which needs a GPU; memory;
windows that overlap; and a layer, which is in another package.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from nsa_ref.semantics import FLA, PerBranch
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Attention, NotOffered, TorchImplementation
from nsa_ref.testing.ports import check_installed

if TYPE_CHECKING:
    from torch import Tensor

#: The naive reference gives an empty row of the compress branch the lse -inf, the kernels 0.
NAIVE = dataclasses.replace(FLA, empty_lse=PerBranch(*[float("-inf")] * 3))

LIMITS: dict[str, Collection[Any]] = {
    # 16 or another power of two above it, as `parallel_nsa` demands
    "group_size": (16,),
    "kv_heads": (1, 2),
    "batch": (1, 2),
    "head_dim": (16, 8, 4, 24, 64),
    "value_dim": (16, 8, 4, 24, 64),
    # one size for windows, strides and selected blocks
    "compress_block_size": (8,),
    "compress_block_sliding_stride": (8,),
    "selection_block_size": (8,),
    "compress_map": ("mean",),
    "compress_positions": (False,),
    "num_mem_kv": (0,),
    "num_initial_blocks": (1,),
    "num_local_blocks": (2,),
    # the top-k wants blocks of at least twice as many tokens as slots
    "num_selected_blocks": (1, 2, 3, 4),
}

#: Three blocks, and one that is not full.
SMALL: dict[str, Collection[Any]] = {
    "batch": (1,),
    "kv_heads": (1, 2),
    "q_len": range(1, 36),
    "kv_len": range(1, 36),
}


def heads_last(x: Tensor) -> Tensor:
    """(batch, heads, tokens, ...) as fla has it, (batch, tokens, heads, ...); or back."""
    return x.transpose(1, 2)


class _Operators(TorchImplementation):
    """What the kernels and the reference have in common."""

    limits = LIMITS
    lse_gradient = False

    def supports(self, case: Case) -> str | None:
        if case.q_len > case.kv_len:
            return "queries are the last of the sequence, so that there are no more than keys"
        if case.q_len == 0:
            return "there is nothing to launch without a query"
        return None


class FlaKernels(_Operators):
    """The kernels behind `parallel_nsa`."""

    name = "fla kernels"
    semantics = (FLA,)

    def __init__(self, device: str = "cpu") -> None:
        super().__init__("cpu" if device == "interpreter" else device)
        if self.device == "cpu":  # the interpreter takes a tenth of a second for a few rows
            self.limits = LIMITS | SMALL
        # matrix products of float32 are taken in tf32 where the hardware has it
        self.numerics = {"float32": "tf32" if self.device.startswith("cuda") else "fp32"}

    def fine(self, case: Case, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Attention:
        import torch

        slots = _next_power_of_two(case.num_selected_blocks)
        unused = slots - case.num_selected_blocks
        blocks = heads_last(torch.nn.functional.pad(block_indices, (0, unused), value=-1))
        given = [heads_last(x).contiguous() for x in (q, k, v)] + [blocks.contiguous()]
        kernels = _kernels(self.device)
        size, scale = case.selection_block_size, case.scale
        if not q.requires_grad:
            out, lse = kernels.parallel_nsa_fwd(*given, slots, size, scale)
            return Attention(heads_last(out), heads_last(lse))
        _check_square(case)
        out = kernels.ParallelNSAFunction.apply(*given, slots, size, scale, None)
        return Attention(heads_last(out), None)  # type: ignore[arg-type]

    def compress(
        self, case: Case, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, mem_k: Tensor, mem_v: Tensor
    ) -> Attention:
        if q.requires_grad:
            _check_square(case)
        k_cmp, v_cmp = (heads_last(_with_last_block(case, x)).contiguous() for x in (k_cmp, v_cmp))
        out, lse = _kernels(self.device).parallel_nsa_compression(
            heads_last(q).contiguous(),
            k_cmp,
            v_cmp,
            case.kv_len,
            case.compress_block_size,
            case.scale,
        )
        return Attention(heads_last(out), heads_last(lse))

    def pool(self, case: Case, x: Tensor, weights: Any) -> Tensor:
        pooled = _kernels(self.device).mean_pooling(
            heads_last(x).contiguous(), case.compress_block_size, None
        )
        return heads_last(pooled)[:, :, : case.num_compress_blocks]

    def select(self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor) -> Tensor:
        kernels, size = _kernels(self.device), case.compress_block_size
        q, k = heads_last(q).contiguous(), heads_last(_with_last_block(case, k_cmp)).contiguous()
        _, lse = kernels.parallel_nsa_compression(q, k, k, case.kv_len, size, case.scale)
        blocks = kernels.parallel_nsa_topk(
            q, k, case.kv_len, lse, case.num_selected_blocks, size, case.scale
        )
        return heads_last(blocks).long()


class FlaNaive(_Operators):
    """The reference that fla's own tests compare the kernels with: `fla.ops.nsa.naive`."""

    name = "fla naive"
    semantics = (NAIVE,)
    numerics: Mapping[str, str] = {"float32": "fp32"}

    def supports(self, case: Case) -> str | None:
        if case.q_len != case.kv_len:
            return "the reference has no queries apart from keys"
        return super().supports(case)

    def fine(self, case: Case, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Attention:
        tensors = map(heads_last, (q, k, v, block_indices))
        out = _naive(self.device).naive_nsa_selection(
            *tensors, case.selection_block_size, case.scale
        )
        return Attention(heads_last(out), None)  # type: ignore[arg-type]

    def compress(
        self, case: Case, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, mem_k: Tensor, mem_v: Tensor
    ) -> Attention:
        tensors = map(heads_last, (q, k_cmp, v_cmp))
        out, lse = _naive(self.device).naive_nsa_compression(
            *tensors, case.compress_block_size, case.scale
        )
        return Attention(heads_last(out), heads_last(lse))

    def select(self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor) -> Tensor:
        k = heads_last(_with_last_block(case, k_cmp))
        blocks = _naive(self.device).naive_nsa_topk(
            heads_last(q), k, case.num_selected_blocks, case.compress_block_size, case.scale
        )
        return heads_last(blocks)


def implementations(device: str = "cpu") -> list[TorchImplementation]:
    """Both, on a device ("cpu", "cuda" or "interpreter")."""
    check_installed("fla", "--no-deps fla-core==0.6.0 einops==0.8.2")
    return [FlaKernels(device), FlaNaive(device)]


def _check_square(case: Case) -> None:
    """fla documents that queries apart from keys have no backward."""
    if case.q_len != case.kv_len:
        raise NotOffered("gradients of queries apart from keys")


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _with_last_block(case: Case, x: Tensor) -> Tensor:
    """A row for the incomplete last block: fla counts it, and no query sees it."""
    import torch

    missing = -(-case.kv_len // case.compress_block_size) - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing))


@functools.cache
def _kernels(device: str) -> Any:
    """`fla.ops.nsa.parallel`, imported so that its kernels run on the device."""
    if not device.startswith("cuda"):
        os.environ["TRITON_INTERPRET"] = "1"
    modules = [
        importlib.import_module(f"fla.ops.{name}")
        for name in (
            "nsa.parallel",
            "nsa.compression",
            "attn.parallel",
            "utils.pooling",
            "utils.csr",
        )
    ]
    if not device.startswith("cuda"):
        from triton.runtime.autotuner import Autotuner

        # one configuration each: tuning would time them, which takes a driver
        for kernel in [value for module in modules for value in vars(module).values()]:
            while hasattr(kernel, "fn"):
                if isinstance(kernel, Autotuner):
                    kernel.configs = kernel.configs[:1]
                kernel = kernel.fn
    return modules[0]


@functools.cache
def _naive(device: str) -> Any:
    _kernels(device)
    return importlib.import_module("fla.ops.nsa.naive")
