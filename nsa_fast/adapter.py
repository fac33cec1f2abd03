"""The plug: nsa_fast before the judge. The one file here that imports `nsa_ref.testing`.

There are five implementations. Eager attention and compiled FlexAttention are different code; the
whole layer follows more conventions than its branches; and the Triton kernels, those of branches
and those of a layer, run in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor

import nsa_fast
from nsa_fast import block_masks, fine_lists, flex, interpreter, layouts
from nsa_fast.crowded import visible_cells
from nsa_fast.windows import Windows
from nsa_ref.semantics import FLA, LUCIDRAINS, LUCIDRAINS_FLEX, PAPER, XUNHAO, Semantics
from nsa_ref.testing.case import Case
from nsa_ref.testing.devices import compile_counts
from nsa_ref.testing.implementation import (
    Attention,
    Implementation,
    NotOffered,
    TorchImplementation,
)
from nsa_ref.testing.probes import block_mask_readings, exposed_readings

#: Every combination of switches that the kernels read differently.
SEMANTICS = (
    PAPER,
    LUCIDRAINS_FLEX,
    dataclasses.replace(PAPER, causal=False),
    dataclasses.replace(LUCIDRAINS_FLEX, causal=False),
    dataclasses.replace(PAPER, window_closed=False),
    dataclasses.replace(PAPER, window_closed=False, causal=False),
    dataclasses.replace(PAPER, share_selection=False),
    dataclasses.replace(PAPER, compress_strict=True, forced_score=1.0, score_floor=1e-10),
)
SHARED_SELECTION = tuple(semantics for semantics in SEMANTICS if semantics.share_selection)

#: Few graphs, for groups of 1, 4 and 16; each is compiled for every branch and dtype.
TRITON_LIMITS: Mapping[str, Collection[Any]] = {
    "batch": (0, 2),
    "q_heads": (2, 8, 16),
    "kv_heads": (1, 2),
    "group_size": (1, 4, 16),
    "head_dim": (64,),
    "value_dim": (32,),
    "selection_block_size": (4, 16),
}
#: What is the same code for both kinds: on a CPU the eager one is asked about it.
ALIKE = ("pool", "select", "sliding_mask", "compress_mask", "fine_mask")


class NsaFast(TorchImplementation):
    """What both kinds have in common: everything that `nsa_fast` exports."""

    backend: str
    semantics: tuple[Semantics, ...] = SEMANTICS

    # masks: what the branch uses, and upstream's call where it means the same

    def sliding_mask(self, case: Case) -> dict[str, Any]:
        device = torch.device(self.device)
        masks: dict[str, Any] = {
            "sliding_attention": block_masks.sliding_block_mask(
                case.q_len, case.kv_len, case.sliding_window_size, case.semantics, device=device
            )
        }
        if case.q_len == case.kv_len and case.semantics.window_closed:
            masks["create_sliding_mask"] = nsa_fast.create_sliding_mask(
                case.kv_len, case.sliding_window_size, case.semantics.causal, device=device
            )
        return masks

    def compress_mask(self, case: Case) -> dict[str, Any]:
        device, stride = torch.device(self.device), case.compress_block_sliding_stride
        windows = Windows(case.compress_block_size, stride, case.semantics)
        masks: dict[str, Any] = {
            "compress_attention": block_masks.compress_block_mask(
                case.q_len,
                windows.count(case.kv_len),
                case.num_mem_kv,
                windows,
                offset=case.kv_len - case.q_len,
                device=device,
            )
        }
        # upstream's call knows neither l nor the number of tokens: it is strict, ends its blocks
        # at (i + 1) d, and takes p = t
        upstream = case.semantics.compress_strict and case.semantics.compress_alignment == "end"
        if case.q_len == case.kv_len and (upstream or not case.semantics.causal):
            masks["create_compress_mask"] = nsa_fast.create_compress_mask(
                case.q_len,
                case.num_compress_blocks,
                stride,
                case.num_mem_kv,
                case.semantics.causal,
                device=device,
            )
        return masks

    def fine_mask(self, case: Case, block_indices: Tensor) -> dict[str, Any]:
        group, eager = case.q_heads // block_indices.shape[1], self.backend == "eager"
        own_block = case.semantics.own_block_extra or not case.semantics.causal
        masks: dict[str, Any] = {}
        if case.q_len == case.kv_len and own_block:
            create = nsa_fast.create_fine_mask(
                case.kv_len, case.selection_block_size, case.semantics.causal
            )
            masks["create_fine_mask"] = create(block_indices, group)
        if flex.is_triton(block_indices.device) and not eager and _has_tiles(case, group):
            return masks | _tile_masks(case, block_indices)
        layout = layouts.fine_layout(
            group, case.selection_block_size, block_indices.device, self.backend
        )
        block_mask, crowded = block_masks.fine_block_mask(
            case.kv_len, block_indices, layout, case.semantics
        )
        readings = block_mask_readings(block_mask, *block_mask.seq_lengths)
        del readings["mask_mod"]  # it knows what is cut, and the lists what is chosen
        if crowded is not None:
            readings["q lists"] += visible_cells(crowded, block_mask).cpu().numpy()
        for part, cells in readings.items():
            cells = layout.gathered(torch.from_numpy(cells), case.kv_len)
            masks[f"fine_attention {part}"] = layout.head_major(cells).numpy()
        return masks

    # branches

    def sliding(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Attention:
        return self._attend(nsa_fast.sliding_attention, case, q, k, v)

    def compress(
        self, case: Case, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, mem_k: Tensor, mem_v: Tensor
    ) -> Attention:
        return self._attend(nsa_fast.compress_attention, case, q, k_cmp, v_cmp, mem_k, mem_v)

    def fine(self, case: Case, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Attention:
        return self._attend(nsa_fast.fine_attention, case, q, k, v, block_indices)

    def _attend(self, attention: Callable[..., Any], case: Case, *tensors: Tensor) -> Attention:
        return Attention(*attention(*tensors, **keywords(attention, case), backend=self.backend))

    # compression and selection

    def pool(self, case: Case, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return nsa_fast.compress_pool(x, weights, **keywords(nsa_fast.compress_pool, case))

    def select(self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor) -> Tensor:
        return nsa_fast.select_blocks(q, k_cmp, mem_k, **keywords(nsa_fast.select_blocks, case))


def _has_tiles(case: Case, group: int) -> bool:
    """Whether the fine branch's own kernels run."""
    return case.batch * case.q_len > 0 and not fine_lists.why_not(
        getattr(torch, case.dtype),
        pairs=case.batch * case.q_heads // group,
        group=group,
        block_size=case.selection_block_size,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
    )


def _tile_masks(case: Case, block_indices: Tensor) -> dict[str, Any]:
    """What the fine branch's own kernels walk: forward and dq tiles, dk and dv parts of blocks."""
    chosen, ahead = block_masks.chosen_blocks(
        case.kv_len, block_indices, case.selection_block_size, case.semantics
    )
    heads, q_len, blocks = case.kv_heads, case.q_len, chosen.num_blocks
    tokens = fine_lists.tokens_per_tile(case.q_heads // heads)
    named = {
        "tiles": fine_lists.named_by_tiles(fine_lists.union(chosen, tokens), q_len, blocks, tokens),
        "parts": fine_lists.named_by_parts(
            fine_lists.parts(chosen.blocks, blocks), case.batch, heads, q_len, blocks
        ),
    }
    device = block_indices.device
    key = torch.arange(case.kv_len, device=device)
    position = torch.arange(q_len, device=device)[:, None] + case.kv_len - q_len
    last = torch.where(position >= 0, position + ahead, -1)
    group = case.q_heads // heads
    masks: dict[str, Any] = {}
    for part, blocks_of in named.items():
        cells = blocks_of[..., key // case.selection_block_size] * (key <= last)
        masks[f"fine_attention {part}"] = cells.repeat_interleave(group, dim=1).cpu().numpy()
    return masks


def keywords(function: Callable[..., Any], case: Case) -> dict[str, Any]:
    """What a function of nsa_fast takes by keyword and a case has under the same name."""
    of_case = {field.name for field in dataclasses.fields(Case)}
    taken = inspect.signature(function).parameters.values()
    names = {one.name for one in taken if one.kind is one.KEYWORD_ONLY}
    return {name: getattr(case, name) for name in names & of_case}


class NsaFastEager(NsaFast):
    """Plain torch that walks the lists: every size, gradients, float64."""

    name = "nsa_fast eager"
    backend = "eager"
    numerics: Mapping[str, str] = {
        "float64": "fp64",
        "float32": "fp32",
        "bfloat16": "bf16",
        "float16": "fp16",
    }


#: The compress branch's backward gives dk and dv of each query head, which are then added up.
TRITON_NUMERICS: Mapping[str, str] = {
    "float32": "fp32",
    "bfloat16": "bf16-head",
    "float16": "fp16-head",
}


class NsaFastCompiled(NsaFast):
    """FlexAttention as Inductor compiles it: C++ without gradients on a CPU, Triton on CUDA."""

    name = "nsa_fast compiled"
    backend = "compiled"
    numerics: Mapping[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    # every new value is a compilation of several seconds, for each branch and dtype; a batch of one
    # is a graph of its own as well
    limits: Mapping[str, Collection[Any]] = {
        "batch": (0, 2),
        "q_heads": (4,),
        "kv_heads": (2,),
        "head_dim": (16,),
        "value_dim": (16,),
        "selection_block_size": (4,),
    }

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        if self._is_triton():
            self.numerics = TRITON_NUMERICS
            # no atomics; sums on a CPU may depend on how memory is aligned
            self.deterministic = True
            # 4096: with 16 heads and 513 tokens, offsets do not fit into 32 bits
            self.limits = {**TRITON_LIMITS, "batch": (0, 2, 4096)}
        else:
            # that switch is one more graph for every dtype, and eager is asked about it
            self.semantics = SHARED_SELECTION

    def offers(self, method: str) -> bool:
        return (self._is_triton() or method not in ALIKE) and super().offers(method)

    def offers_vjp(self, method: str) -> bool:
        # FlexAttention compiled to C++ has no backward
        return self._is_triton() and super().offers_vjp(method)

    def _is_triton(self) -> bool:
        return flex.is_triton(torch.device(self.device))


class NsaFastLayer(TorchImplementation):
    """The whole layer, through the kernels that it takes by itself.

    It follows every preset, its branches do not: a layer's own choice names no block twice, and
    rows that see nothing, where presets differ, do not occur in it.
    """

    name = "nsa_fast layer"
    semantics = (
        PAPER,
        LUCIDRAINS,
        LUCIDRAINS_FLEX,
        FLA,
        XUNHAO,
        dataclasses.replace(PAPER, causal=False, output_projection=True),
        dataclasses.replace(PAPER, share_selection=False, kv_per_branch=False, input_norm=True),
        # flash-linear-attention's layer; FLA is its operator
        dataclasses.replace(FLA, rotary="before_pooling", output_projection=True),
    )

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        compiled = flex.is_triton(torch.device(device))
        self.numerics = TRITON_NUMERICS if compiled else NsaFastEager.numerics
        self.limits = TRITON_LIMITS if compiled else {}

    def layer(self, case: Case, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return _of_module(_module(case), weights, x)

    def layer_with_blocks(
        self, case: Case, weights: dict[str, Tensor], x: Tensor, block_indices: Tensor
    ) -> Tensor:
        semantics = case.semantics
        if semantics.duplicates == "multiset":
            if _named_twice(case, block_indices):
                raise NotOffered("a block that is handed in twice and counts twice")
            case = dataclasses.replace(
                case, semantics=dataclasses.replace(semantics, duplicates="set")
            )
        # by the function: a module takes no blocks
        run = nsa_fast.native_sparse_attention
        return run(x, weights, **keywords(run, case), block_indices=block_indices)

    def decode(self, case: Case, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Token by token through a cache, from the first one on."""
        module = _module(case)
        cache = module.empty_cache(x.shape[0])
        rows = [_of_module(module, weights, x[:, :0], cache=cache)]
        for t in range(x.shape[1]):
            rows.append(_of_module(module, weights, x[:, t : t + 1], cache=cache))
        return torch.cat(rows, dim=1)

    def varlen(
        self, case: Case, weights: dict[str, Tensor], x: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        return _of_module(_module(case), weights, x, cu_seqlens=cu_seqlens)

    def offers_vjp(self, method: str) -> bool:
        # a cache records no gradients
        return method != "decode" and super().offers_vjp(method)


def _module(case: Case) -> nsa_fast.NativeSparseAttention:
    make = nsa_fast.NativeSparseAttention
    return make(case.model_dim, **keywords(make, case))


def _of_module(
    module: nsa_fast.NativeSparseAttention, weights: dict[str, Tensor], x: Tensor, **how: Any
) -> Tensor:
    """What the module returns with these weights in the place of its own."""
    out: Tensor = torch.func.functional_call(module, weights, (x,), how, strict=True)
    return out


def _named_twice(case: Case, block_indices: Tensor) -> bool:
    """Whether a row names a block of its own twice, or the own block where that is seen anyway."""
    named = block_indices
    if case.semantics.causal and case.semantics.own_block_extra:
        own = torch.arange(named.shape[2], device=named.device) // case.selection_block_size
        named = torch.cat([named, own[:, None].expand(*named.shape[:3], 1)], dim=-1)
    named = named.sort(dim=-1).values
    known = (named >= 0) & (named < case.num_selection_blocks)
    return bool(((named[..., 1:] == named[..., :-1]) & known[..., 1:]).any())


class InterpreterProcess:
    """A process in which Triton's interpreter is installed, for all who are to share it.

    It is started by the first call, and again after one that it did not survive.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """What the function returns there; it is imported by name."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _in_the_process
            )
            before = dict(os.environ)
            os.environ.update(interpreter.ENVIRONMENT)
            try:
                self._pool.submit(int).result()
            finally:
                os.environ.clear()
                os.environ.update(before)
        try:
            return self._pool.submit(function, *given).result()
        except BrokenProcessPool:
            self._pool = None
            raise

    def compile_counts(self) -> Mapping[str, int]:
        """What was compiled there; nothing, if it does not answer."""
        if self._pool is None:
            return {}
        try:
            counts: Mapping[str, int] = self._pool.submit(compile_counts).result(timeout=60)
        except (BrokenProcessPool, TimeoutError):
            self._pool = None
            return {}
        return counts


class NsaFastInterpreted(Implementation):
    """The Triton kernels of `NsaFastCompiled` without a GPU, in a process of their own."""

    name = "nsa_fast interpreted"
    device = "interpreter"
    deterministic = True
    # a head that chooses for itself has the rows of a group of 1
    semantics: tuple[Semantics, ...] = SHARED_SELECTION
    numerics: Mapping[str, str] = {
        dtype: row for dtype, row in TRITON_NUMERICS.items() if dtype != "float16"
    }
    # a call takes seconds
    limits: Mapping[str, Collection[Any]] = {
        **TRITON_LIMITS,
        "q_len": range(21),
        "kv_len": range(131),
    }

    def __init__(
        self,
        kernels: Callable[[str], TorchImplementation] = NsaFastCompiled,
        process: InterpreterProcess | None = None,
    ) -> None:
        """kernels : makes, from a device, what runs in the process; it is imported there by name
        process : if others run in it, too
        """
        self.kernels = kernels
        self.process = process or InterpreterProcess()

    def offers(self, method: str) -> bool:
        # pool is plain torch
        return method in ("sliding", "compress", "fine", "select") or method.endswith("_mask")

    def offers_vjp(self, method: str) -> bool:
        return method in ("sliding", "compress", "fine")

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        return self._called("run", method, case, *arguments)

    def run_vjp(self, method: str, case: Case, *arguments: Any) -> Any:
        return self._called("run_vjp", method, case, *arguments)

    def run_twice(
        self, method: str, case: Case, first: Sequence[Any], second: Sequence[Any]
    ) -> tuple[Any, Any, Any]:
        # there, where the second call could still reach what the first one returned
        found: tuple[Any, Any, Any] = self._called("run_twice", method, case, first, second)
        return found

    def _called(self, call: str, method: str, case: Case, *arguments: Any) -> Any:
        return self.process.call(_interpreted, self.kernels, call, method, case, arguments)

    def compile_counts(self) -> Mapping[str, int]:
        return self.process.compile_counts()


class NsaFastLayerInterpreted(NsaFastInterpreted):
    """The same of `NsaFastLayer`. What it leaves to torch on a GPU, torch computes on the CPU."""

    name = "nsa_fast layer interpreted"
    semantics = tuple(s for s in NsaFastLayer.semantics if s.share_selection)
    # a group of 8 has kernels of its own for the blocks it chooses: fewer graphs, and the fastest
    limits: Mapping[str, Collection[Any]] = {
        **TRITON_LIMITS,
        "batch": (2,),
        "q_heads": (8,),
        "kv_heads": (1,),
        "group_size": (8,),
        "selection_block_size": (4,),
        # two blocks more than are forced and chosen: scores decide
        "q_len": range(33),
        "kv_len": range(33),
    }
    # half a second a token
    limits_of: Mapping[str, Mapping[str, Any]] = {"decode": {"kv_len": range(6, 21)}}

    def __init__(
        self,
        kernels: Callable[[str], TorchImplementation] = NsaFastLayer,
        process: InterpreterProcess | None = None,
    ) -> None:
        super().__init__(kernels, process)

    def offers(self, method: str) -> bool:
        return method in ("layer", "layer_with_blocks", "decode", "varlen")

    def offers_vjp(self, method: str) -> bool:
        return method in ("layer", "layer_with_blocks", "varlen")


def _in_the_process() -> None:
    interpreter.install()
    # a judge that is killed, for instance because a kernel hangs, leaves nothing running
    threading.Thread(target=_end_with_the_judge, daemon=True).start()


def _end_with_the_judge() -> None:
    judge = multiprocessing.parent_process()
    assert judge is not None
    judge.join()
    os._exit(1)


def _interpreted(
    make: Callable[[str], TorchImplementation],
    call: str,
    method: str,
    case: Case,
    arguments: tuple[Any, ...],
) -> Any:
    """In the process: NumPy in and out; a mask is read out here, where its tensors are."""
    found = getattr(make("cpu"), call)(method, case, *arguments)
    if not method.endswith("_mask"):
        return found
    columns = case.kv_len
    if method == "compress_mask":
        columns = case.num_mem_kv + case.num_compress_blocks
    readings = exposed_readings(found, case.q_len, columns)
    return {reading.name: reading._replace(name="") for reading in readings}


def implementations(device: str) -> list[Implementation]:
    """What nsa_fast runs on a device: both kinds on "cpu", the compiled one on "cuda"; the layer.

    On "interpreter" they are the compiled one and the layer in Triton's interpreter.

    Raises
    ------
    ValueError : another device
    RuntimeError : the interpreter does not run here
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return [NsaFastEager(device), NsaFastCompiled(device), NsaFastLayer(device)]
    if kind == "cuda":
        return [NsaFastCompiled(device), NsaFastLayer(device)]
    if kind == "interpreter":
        if reason := interpreter.missing():
            raise RuntimeError(
                f"the interpreter does not run here: {reason}. "
                "Try pip install 'nsa-ref[fast,interpreter]'"
            )
        process = InterpreterProcess()
        return [NsaFastInterpreted(process=process), NsaFastLayerInterpreted(process=process)]
    raise ValueError(f"device={device!r} must be one of 'cpu', 'cuda', 'interpreter'.")
