"""One call of attention through a block mask. What a backend cannot do is an error.

::

    backend      device   gives
    "eager"      any      out, lse, gradients; plain torch (`eager.py`)
    "compiled"   CUDA     out, lse, gradients; float32, bfloat16, float16
    "compiled"   CPU      out alone, no gradients; float32, bfloat16, float16

"compiled" is FlexAttention's. On a CPU it is C++, on CUDA it is Triton; in a process of
`interpreter.py` it is Triton on a CPU as well, and all that speaks of Triton below holds there.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nsa_fast import eager
from nsa_fast.block_lists import LEAST_LENGTH, Crowded, count_blocks, padded, shared
from nsa_fast.checks import check_choice, check_floating, without_autocast
from nsa_fast.crowded import with_crowded_columns

BACKENDS = ("eager", "compiled")
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Types of devices whose compiled kernels are Triton's.
TRITON_DEVICES = {"cuda"}

#: `tl.dot` multiplies at least 16 x 16: shorter heads get zeros behind them.
LEAST_TRITON_DIM = 16


#: What a BlockMask is made of, by name; some names are younger than 2.11.
PARTS = tuple(inspect.signature(BlockMask).parameters)


class Attention(NamedTuple):
    """out : (batch, q_heads, q_len, value_dim), in the dtype of the inputs

    lse : (batch, q_heads, q_len), natural logarithm, float32 (float64 for float64 inputs); None
        where the backend has none
    """

    out: Tensor
    lse: Tensor | None


def resolve_backend(backend: str | None, q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> str:
    """The backend to use, or an error that says what runs."""
    if backend is None:
        backend = "compiled" if is_triton(q.device) else "eager"
    check_choice("backend", backend, BACKENDS)
    check_floating("q", q)
    if backend == "eager":
        return backend
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"backend='compiled' runs on cpu and cuda, not on {q.device.type}. Try backend='eager'."
        )
    if q.dtype not in COMPILED_DTYPES:
        listed = ", ".join(str(dtype) for dtype in COMPILED_DTYPES)
        raise TypeError(
            f"q has dtype {q.dtype}; backend='compiled' runs {listed}. "
            "backend='eager' runs torch.float64 too."
        )
    if is_triton(q.device) and (reason := why_no_tiles(q.dtype, q.shape[3], v.shape[3])):
        raise ValueError(f"backend='compiled' does not run here: {reason}. Use backend='eager'.")
    if wants_grad(q, k, v, *memory) and not is_triton(q.device):
        raise ValueError(
            "backend='compiled' gives no gradients on a CPU, and an input has requires_grad=True. "
            "Use backend='eager', or call it under torch.no_grad()."
        )
    return backend


def is_triton(device: torch.device) -> bool:
    """Whether what is compiled for the device is Triton."""
    return device.type in TRITON_DEVICES


def wants_grad(*tensors: Tensor) -> bool:
    """Whether a backward is to be recorded."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def walks_q_lists(backend: str, *tensors: Tensor) -> bool:
    """Whether a backward is to be recorded that walks the transposed lists."""
    return backend == "compiled" and wants_grad(*tensors)


def attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    crowded: Crowded | None = None,
    *,
    backend: str,
    scale: float,
) -> Attention:
    """Attention of q (batch, q_heads, q_len, head_dim) through a block mask.

    name : the branch, and what else is compiled in; compiled graphs carry it
    block_mask : for the lengths of q and k; with q lists if `walks_q_lists`
    crowded : the column blocks that these leave out
    """
    with without_autocast(q.device):
        if q.shape[0] == 0 or q.shape[2] == 0:
            return _of_no_query(q, k, v)
        q_len, value_dim = q.shape[2], v.shape[3]
        if backend == "compiled":
            block_mask, q, k, v = _fitted(block_mask, q, k, v)
        if wants_grad(q, k, v):
            q, k, v = FirstDerivativeOnly.apply(q, k, v)
        if backend == "eager":
            return Attention(*eager.attention(q, k, v, block_mask, scale))
        out, lse = _compiled(name, q, k, v, block_mask, scale)
        if crowded is not None and lse is not None:
            out, lse = with_crowded_columns(crowded, block_mask, scale, q, k, v, out, lse)
        out = out[:, :, :q_len, :value_dim]
        return Attention(out, None if lse is None else lse[:, :, :q_len])


def _compiled(
    name: str, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor | None]:
    key = "_".join(
        str(part)
        for part in (
            name,
            str(q.dtype).removeprefix("torch."),
            *(q.shape[1], k.shape[1], q.shape[3], v.shape[3]),
            *block_mask.BLOCK_SIZE,
            scale,
            *_guarded_settings(q),
            *(["token major"] if is_token_major(q) else []),
        )
    )
    options = kernel_options(block_mask.BLOCK_SIZE, q.device, q.dtype, q.shape[3], v.shape[3])
    # two sizes that happen to be equal are two sizes: else each coincidence is one more graph
    with shape_config.patch(use_duck_shape=False):
        if not is_triton(q.device):
            # one grad mode only: dynamo guards on it, and would compile everything twice
            with torch.no_grad():
                q, k, v = q.detach(), k.detach(), v.detach()  # refused even here, if they want it
                return _graph(f"{key}_out", _out_alone)(q, k, v, block_mask, scale, options), None
        # needs all of Inductor, which takes a second to load
        from nsa_fast.tiles import compiling_with

        name = f"{key}_grad" if wants_grad(q, k, v) else f"{key}_lse"

        def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            with compiling_with(options or {}):
                out, aux = _graph(name, _out_and_lse)(*inputs, block_mask, scale, options)
            return out, aux.lse

        if not wants_grad(q, k, v):
            with torch.no_grad():
                return run(q.detach(), k.detach(), v.detach())
        result: tuple[Tensor, Tensor] = _Differentiable.apply(run, q, k, v)
        return result


def _guarded_settings(q: Tensor) -> tuple[str, ...]:
    """What dynamo keeps graphs apart for, beside lengths: each gets a name of its own."""
    found = {
        "one": q.shape[0] == 1,
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return (
        str(q.device),
        *(name for name, is_so in found.items() if is_so),
        f"{torch.get_float32_matmul_precision()} products",
        f"{torch.get_num_threads()} threads",
        str(torch.get_default_dtype()),
    )


def _out_alone(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, options: Any
) -> Any:
    _check_compiling()
    return flex_attention(
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True, kernel_options=options
    )


def _out_and_lse(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, options: Any
) -> Any:
    _check_compiling()
    return flex_attention(
        q,
        k,
        v,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )


def _check_compiling() -> None:
    """torch.compile can be switched off from outside, and what it was given then runs eagerly.

    FlexAttention would ask the predicate about every cell, and the fine branch's knows the choice
    of blocks by the lists alone.
    """
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "backend='compiled' needs torch.compile, which is switched off (by "
            "TORCHDYNAMO_DISABLE=1, torch.compiler.set_stance or the like). Switch it on, or take "
            "backend='eager'."
        )


@functools.cache
def _graph(name: str, function: types.FunctionType) -> Callable[..., Any]:
    """`function` compiled under a name, and a recompile limit, of its own.

    dynamo counts recompilations by code object. Past its limit it would run eager FlexAttention,
    which ignores block lists; `fullgraph=True` makes that an error. What FlexAttention compiles in
    (heads, dims, block sizes, scale) and the settings that graphs are guarded on are in the name,
    so the count is of what should never grow.
    """
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name)
    return torch.compile(copy, dynamic=True, fullgraph=True)


class Tile(NamedTuple):
    """Rows that a program holds, columns of each step along the others, warps, stages."""

    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of heads with at most so many numbers; out and dq hold queries, dk and dv hold keys."""

    head_dim: int
    value_dim: int
    forward: Tile
    backward: Tile


#: Bytes of a number -> tiles that fit sm_90's 227 KiB of shared memory. `benchmarks/sm90.py`
#: compiles each; of those compiled these were the fastest by its estimate.
TILES = {
    2: (
        Tiles(64, 64, Tile(128, 64, 4, 3), Tile(128, 64, 8, 2)),
        Tiles(256, 128, Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
        Tiles(256, 256, Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    ),
    4: (Tiles(256, 256, Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),),
}


def why_no_tiles(dtype: torch.dtype, head_dim: int, value_dim: int) -> str:
    """What keeps Triton from such heads in FlexAttention, in words; empty if nothing does."""
    most = TILES[dtype.itemsize][-1]
    for name, dim, limit in (
        ("head_dim", head_dim, most.head_dim),
        ("value_dim", value_dim, most.value_dim),
    ):
        if dim > limit:
            return f"{name}={dim} is more than the {limit} numbers that fit on an SM"
    return ""


def kernel_options(
    block_size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
) -> dict[str, Any] | None:
    """What the Triton kernels are told: above all, tiles that divide the blocks of the mask."""
    if not is_triton(device):
        return None
    _, _, forward, backward = next(
        tiles
        for tiles in TILES[dtype.itemsize]
        if head_dim <= tiles.head_dim and value_dim <= tiles.value_dim
    )
    rows, columns = (size & -size for size in block_size)  # the largest power of two in each
    held, walked = min(forward.rows, rows), min(forward.columns, columns)
    of_q, of_k = min(backward.rows, rows), min(backward.rows, columns)
    options = {
        # one kernel for all lengths: FlexAttention has another for fewer than 128 rows
        "FORCE_USE_FLEX_ATTENTION": True,
        "fwd_BLOCK_M": held,
        "fwd_BLOCK_N": walked,
        "fwd_num_warps": max(4, forward.warps * held // forward.rows),
        "fwd_num_stages": forward.stages,
        "bwd_BLOCK_M1": min(backward.columns, rows, of_k),  # BLOCK_M1 must divide BLOCK_N1
        "bwd_BLOCK_N1": of_k,
        "bwd_BLOCK_M2": of_q,
        "bwd_BLOCK_N2": min(backward.columns, columns, of_q),  # BLOCK_N2 must divide BLOCK_M2
        "bwd_num_warps": max(4, backward.warps * min(of_q, of_k) // backward.rows),
        "bwd_num_stages": backward.stages,
    }
    if any(size % 128 for size in block_size):
        # else the kernels trust lengths that 128 divides, where a block of 80 reaches past the end
        options["IS_DIVISIBLE"] = False
    return options


class _Differentiable(torch.autograd.Function):
    """What a compiled function returns; its backward runs as often as it is asked to, and alike.

    A compiled backward runs once (its saved tensors are its workspace, unless both it and whoever
    calls it are told otherwise), and in whatever mode of autocast the caller is then.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = tuple(
                tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(inputs, ctx.needs_input_grad[1:])
            )
            out, lse = function(*inputs)
        # saved, and not kept: a backward without retain_graph then frees what hangs on them
        ctx.save_for_backward(out, lse, *inputs)
        return out.detach(), lse.detach()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        from nsa_fast.tiles import saved_tensors_last

        out, lse, *inputs = ctx.saved_tensors
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        with without_autocast(d_out.device), saved_tensors_last():
            found = iter(torch.autograd.grad((out, lse), wanted, (d_out, d_lse), retain_graph=True))
        return None, *(next(found) if tensor.requires_grad else None for tensor in inputs)


class FirstDerivativeOnly(torch.autograd.Function):
    """The identity, whose gradients raise if they are differentiated again.

    FlexAttention's own second derivative is wrong without a word.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return gradients
        # create_graph=True: tied to all inputs, so that no second derivative can miss the error
        return tuple(_Refused.apply(gradient, *ctx.saved_tensors) for gradient in gradients)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "nsa_fast has no second derivatives: FlexAttention's would be wrong. "
            "Use create_graph=False."
        )


def _of_no_query(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    """Results without elements, in the graph of q, k and v; FlexAttention raises IndexError."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return Attention(scores @ v, scores.sum(-1).to(dtype))


def _fitted(
    mask: BlockMask, q: Tensor, k: Tensor, v: Tensor
) -> tuple[BlockMask, Tensor, Tensor, Tensor]:
    """Inputs and lists as the kernels take them: no length below 2, one layout.

    What is added is invisible (zero keys that the predicate excludes) or cut off the result.
    """
    q, k, v = (padded(t, 2, LEAST_LENGTH) for t in (q, k, v))
    if is_triton(q.device):
        q, k, v = (padded(t, 3, LEAST_TRITON_DIM) for t in (q, k, v))
    if is_token_major(q):
        q = _no_view(q.transpose(1, 2)).transpose(1, 2)
    else:
        q = _no_view(q.contiguous())
    k, v = _no_view(k.contiguous()), _no_view(v.contiguous())
    # the C++ kernels want as many slots as there are blocks
    blocks = 0 if is_triton(q.device) else count_blocks(k.shape[2], mask.BLOCK_SIZE[1])
    lists: dict[str, Tensor | None] = {}
    for side, slots in (("kv", blocks), ("q", 0)):
        for kind in (side, f"full_{side}"):
            numbers, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
            if numbers is None:  # there is no backward to walk them
                continue
            lists[f"{kind}_num_blocks"] = padded(numbers, 2, LEAST_LENGTH)
            rows, width = max(LEAST_LENGTH, indices.shape[2]), max(LEAST_LENGTH, slots)
            if indices.stride(2) == 0:  # one list for all rows: what is padded would be no more
                indices = shared(padded(indices[:, :, 0], 2, width)[0, 0], rows)
            lists[f"{kind}_indices"] = padded(padded(indices, 2, rows), 3, width)
    return _replaced(mask, seq_lengths=(q.shape[2], k.shape[2]), **lists), q, k, v


def is_token_major(q: Tensor) -> bool:
    """Whether the heads of a token stand side by side, as a projection leaves them.

    Triton's kernels read q, the largest of the inputs, in this layout as well.
    """
    return is_triton(q.device) and not q.is_contiguous() and q.transpose(1, 2).is_contiguous()


def _no_view(tensor: Tensor) -> Tensor:
    """The same, which nobody knows to be a view of another tensor.

    Graphs are guarded on strides, and a view's on those of its base: every layout of the caller's
    would be a graph of its own. A copy costs less than that.
    """
    return torch.ops.aten._unsafe_view(tensor, tensor.shape)


def _replaced(mask: BlockMask, **changes: Any) -> BlockMask:
    """The mask with some of its parts replaced."""
    return BlockMask(**({name: getattr(mask, name) for name in PARTS} | changes))
