"""fla-core's operators before the judge: its Triton kernels, and its naive reference.

Without a GPU the kernels run in Triton's interpreter. An environment of their own, beside one that
has torch and nsa-ref::

    python3 -m venv --system-site-packages fla
    fla/bin/pip install --no-deps fla-core==0.6.0 einops==0.8.2
    fla/bin/nsa-ref verify fla

What these operators do not have: a sliding window without flash-attn, which needs a GPU; memory;
windows that overlap; and a layer, which is in another package. What the plug cannot ask of them is
tried by `beyond_the_plug.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nsa_ref.semantics import FLA, PerBranch
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Attention, TorchImplementation
from nsa_ref.testing.ports import check_installed

if TYPE_CHECKING:
    from torch import Tensor

#: The naive reference gives an empty row of the compress branch the lse -inf, the kernels 0.
NAIVE = dataclasses.replace(FLA, empty_lse=PerBranch(*[float("-inf")] * 3))

LIMITS: dict[str, Any] = {
    # 16 or another power of two above it, as `parallel_nsa` demands
    "group_size": (16,),
    "kv_heads": (1, 2),
    "batch": (1, 2),
    # a product on a GPU has at least 16 columns; above 128 only Hopper has the room
    "head_dim": (16, 24, 32, 64),
    # 136 takes two tiles
    "value_dim": (16, 24, 32, 64, 136),
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

#: What a CPU does in a part of a second, because the interpreter loops over programs in Python:
#: two blocks or three, of which the last is short, and a few rows behind more blocks than the
#: top-k sorts at once.
SHORT: dict[str, Any] = {
    "q_len": (*range(1, 11), 17),
    "kv_len": (*range(1, 11), 17, 40, 72),
}


def heads_last(x: Tensor) -> Tensor:
    """(batch, heads, tokens, ...) as fla has it, (batch, tokens, heads, ...); or back."""
    return x.transpose(1, 2)


class FlaKernels(TorchImplementation):
    """The kernels behind `parallel_nsa`."""

    name = "fla kernels"
    semantics = (FLA,)
    # the backward of the compress branch drops what arrives through its lse
    lse_gradient = False

    def __init__(self, device: str = "cpu") -> None:
        super().__init__("cpu" if device == "interpreter" else device)
        self.limits = LIMITS | SHORT if self.device == "cpu" else LIMITS
        # scale q is rounded to 16 bits before it meets k, which of all rows -eager alone admits
        if self.device == "cpu":  # the interpreter has no bfloat16
            self.numerics = {"float32": "fp32", "float16": "fp16-eager"}
        else:  # products of float32 are taken in tf32 where the hardware has it
            eager = {"bfloat16": "bf16-eager", "float16": "fp16-eager"}
            self.numerics = {"float32": "tf32"} | eager

    def supports(self, case: Case) -> str | None:
        if case.q_len > case.kv_len:
            return "queries are the last of the sequence, so that there are no more than keys"
        if case.q_len == 0:
            return "there is nothing to launch without a query"
        return None

    def fine(self, case: Case, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Attention:
        kernels = _kernels(self.device)
        given = [heads_last(x) for x in (q, k, v, block_indices)]
        slots, size, scale = case.num_selected_blocks, case.selection_block_size, case.scale
        if q.requires_grad:
            out = kernels.ParallelNSAFunction.apply(*given, slots, size, scale, None)
            return Attention(heads_last(out), None)  # type: ignore[arg-type]
        out, lse = kernels.parallel_nsa_fwd(*given, slots, size, scale)
        return Attention(heads_last(out), heads_last(lse))

    def compress(
        self, case: Case, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, mem_k: Tensor, mem_v: Tensor
    ) -> Attention:
        k_cmp, v_cmp = (heads_last(_with_last_block(case, x)) for x in (k_cmp, v_cmp))
        size, scale = case.compress_block_size, case.scale
        out, lse = _kernels(self.device).parallel_nsa_compression(
            heads_last(q), k_cmp, v_cmp, case.kv_len, size, scale
        )
        return Attention(heads_last(out), heads_last(lse))

    def pool(self, case: Case, x: Tensor, weights: Any) -> Tensor:
        pooled = _kernels(self.device).mean_pooling(heads_last(x), case.compress_block_size, None)
        return heads_last(pooled)[:, :, : case.num_compress_blocks]

    def select(self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor) -> Tensor:
        kernels, size, scale = _kernels(self.device), case.compress_block_size, case.scale
        q, k = heads_last(q), heads_last(_with_last_block(case, k_cmp))
        _, lse = kernels.parallel_nsa_compression(q, k, k, case.kv_len, size, scale)
        slots = case.num_selected_blocks
        blocks = kernels.parallel_nsa_topk(q, k, case.kv_len, lse, slots, size, scale)
        return heads_last(blocks).long()


class FlaNaive(TorchImplementation):
    """The reference that fla's own tests compare the kernels with: `fla.ops.nsa.naive`."""

    name = "fla naive"
    semantics = (NAIVE,)
    # attention is computed in float32 in every dtype
    numerics: Mapping[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    # it loops over rows in Python
    limits = LIMITS | {"q_len": "== kv_len", "kv_len": (*range(1, 20), 40)}

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
        _do_nothing_twice()
    return modules[0]


def _do_nothing_twice() -> None:
    """Two thirds of the interpreter's time go into what no result depends on.

    At every call of a device function it replaces the functions of `triton.language` by its own: at
    the launch of the kernel is enough, if both modules are replaced that a function may know. And
    it computes whether integers overflow, and tells nobody.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch_lang = interpreter._patch_lang
    knows_both = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        return self.rewrite()(*arguments, **named)

    interpreter._patch_lang = lambda kernel: patch_lang(knows_both)
    interpreter.InterpretedFunction.__call__ = call


@functools.cache
def _naive(device: str) -> Any:
    _kernels(device)
    return importlib.import_module("fla.ops.nsa.naive")
