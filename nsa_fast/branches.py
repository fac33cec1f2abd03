"""The three branches as attention: out and lse, with gradients for q, k and v.

Paper's letters: w = sliding_window_size, l = compress_block_size,
d = compress_block_sliding_stride, l' = selection_block_size. Query head h reads kv head h // G.
Row t stands at p = t + kv_len - q_len. A row that sees no key: out 0, lse -inf, gradients 0.

On CUDA the kernels are compiled; on a CPU the default is plain torch (`eager.py`), which has
gradients and float64, and backend="compiled" is forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from nsa_fast import block_masks, fine_lists, flex, layouts
from nsa_fast.checks import (
    MAX_LENGTH,
    check_alike,
    check_device,
    check_finite,
    check_group,
    check_indices,
    check_length,
    check_plain,
    check_semantics,
    check_size,
    check_tensor,
    check_untransformed,
)
from nsa_fast.flex import Attention
from nsa_fast.windows import Windows
from nsa_ref.semantics import PAPER, Semantics

#: Tokens of a block that keys are padded to, whatever their number.
LONGEST_PADDED = 1024


@_disable_dynamo
def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sliding_window_size: int,
    semantics: Semantics = PAPER,
    scale: float | None = None,
    backend: str | None = None,
) -> Attention:
    """Attention to the own key and the w before it (W1, W2).

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim)
    k : (batch, kv_heads, kv_len, head_dim)     v : (batch, kv_heads, kv_len, value_dim)
    scale : a finite number, no tensor; default head_dim ** -0.5
    backend : "eager", "compiled", or None: "compiled" on CUDA, else "eager"
    returns : Attention(out, lse), in the dtype of the inputs under torch.autocast as well

    Raises
    ------
    ValueError : shapes or sizes that do not fit, a switch or backend that does not run here
    TypeError : dtypes that do not fit
    """
    check_semantics(semantics, "sliding")
    window = check_length("sliding_window_size", sliding_window_size)
    check_qkv(q, k, v)
    backend = flex.resolve_backend(backend, q, k, v)
    scale = default_scale(scale, q)
    block_mask = block_masks.of_sizes(
        block_masks.sliding_block_mask,
        q.shape[2],
        k.shape[2],
        window,
        semantics,
        device=q.device,
        q_lists=flex.walks_q_lists(backend, q, k, v),
    )
    return flex.attend("sliding", q, k, v, block_mask, backend=backend, scale=scale)


@_disable_dynamo
def compress_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    mem_k: Tensor | None = None,
    mem_v: Tensor | None = None,
    *,
    kv_len: int,
    compress_block_size: int,
    compress_block_sliding_stride: int,
    semantics: Semantics = PAPER,
    scale: float | None = None,
    backend: str | None = None,
) -> Attention:
    """Attention to memory and to the compressed blocks that have ended (C2, C3).

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim)
    k_cmp, v_cmp : (batch, kv_heads, blocks, head_dim or value_dim); blocks is what C1 makes of
        kv_len, the number of tokens
    mem_k, mem_v : (batch, kv_heads, num_mem_kv, head_dim or value_dim), or None for none
    scale, backend, returns, Raises : as `sliding_attention`
    """
    check_semantics(semantics, "compress")
    kv_len = check_length("kv_len", kv_len)
    windows = Windows.checked(compress_block_size, compress_block_sliding_stride, semantics)
    check_qkv(q, k_cmp, v_cmp, suffix="_cmp")
    batch, kv_heads = k_cmp.shape[:2]
    blocks = windows.count(kv_len)
    check_tensor("k_cmp", k_cmp, (batch, kv_heads, blocks, q.shape[3]))
    if (mem_k is None) != (mem_v is None):
        raise TypeError("mem_k and mem_v must be given together, or neither.")
    of_memory: list[Tensor] = []
    memory = 0
    if mem_k is not None and mem_v is not None:
        check_tensor("mem_k", mem_k, (batch, kv_heads, "num_mem_kv", q.shape[3]))
        memory = mem_k.shape[2]
        check_tensor("mem_v", mem_v, (batch, kv_heads, memory, v_cmp.shape[3]))
        check_alike(q=q, mem_k=mem_k, mem_v=mem_v)
        check_untransformed("mem_k", mem_k)
        check_untransformed("mem_v", mem_v)
        if memory or flex.wants_grad(mem_k, mem_v):  # which then gets a gradient, without elements
            of_memory = [mem_k, mem_v]
    tensors = [q, k_cmp, v_cmp, *of_memory]
    backend = flex.resolve_backend(backend, *tensors)
    scale = default_scale(scale, q)
    group = 1
    if flex.is_triton(q.device) and flex.walks_q_lists(backend, *tensors):
        # A program of the backward walks all queries of its keys' head. The first keys are seen by
        # all, and with one head for G of queries the rest of the GPU would wait for them.
        group = q.shape[1] // kv_heads
    k = _joined([*of_memory[:1], k_cmp], group)
    v = _joined([*of_memory[1:], v_cmp], group)
    block_mask = block_masks.of_sizes(
        block_masks.compress_block_mask,
        q.shape[2],
        blocks,
        memory,
        windows,
        offset=kv_len - q.shape[2],
        device=q.device,
        q_lists=flex.walks_q_lists(backend, q, k, v),
    )
    return flex.attend("compress", q, k, v, block_mask, backend=backend, scale=scale)


@_disable_dynamo
def fine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    selection_block_size: int,
    semantics: Semantics = PAPER,
    scale: float | None = None,
    backend: str | None = None,
) -> Attention:
    """Attention to the tokens of the selected blocks, up to the query's own (F1 to F4).

    Nothing of the size q_len x kv_len is built. In Triton, groups of 8 heads and more have kernels
    of their own (`fine_kernels.py`). In FlexAttention the heads of a group stand together, token by
    token, so that one token's rows are one row block and its block list is its selection.

    Shapes
    ------
    q, k, v : as `sliding_attention`
    block_indices : integers (batch, kv_heads, q_len, n), or (batch, q_heads, q_len, n) without
        share_selection; -1 in unused slots, indices of no block are ignored, duplicates count once
    scale, backend, returns, Raises : as `sliding_attention`
    """
    check_semantics(semantics, "fine")
    block_size = check_size("selection_block_size", selection_block_size, 1, MAX_LENGTH)
    check_qkv(q, k, v)
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    # Keys are padded to whole blocks: of one that is longer than all of them, to a power of two, of
    # which there are few, because kernels compile it in
    block_size = min(block_size, max(LONGEST_PADDED, 1 << kv_len.bit_length()))
    heads = kv_heads if semantics.share_selection else q_heads
    check_indices("block_indices", block_indices, (batch, heads, q_len, "n"))
    check_device("block_indices", block_indices, "q", q)
    backend = flex.resolve_backend(backend, q, k, v)
    scale = default_scale(scale, q)
    if (
        backend == "compiled"
        and flex.is_triton(q.device)
        and q.shape[0] * q_len > 0
        and not fine_lists.why_not(
            q.dtype,
            pairs=batch * heads,
            group=q_heads // heads,
            block_size=block_size,
            head_dim=q.shape[3],
            value_dim=v.shape[3],
        )
    ):
        from nsa_fast import fine_kernels  # which imports triton

        chosen, ahead = block_masks.chosen_blocks(kv_len, block_indices, block_size, semantics)
        return fine_kernels.attend(q, k, v, chosen, ahead=ahead, scale=scale)
    layout = layouts.fine_layout(q_heads // heads, block_size, q.device, backend)
    block_mask, crowded = block_masks.fine_block_mask(
        kv_len,
        block_indices,
        layout,
        semantics,
        q_lists=flex.walks_q_lists(backend, q, k, v),
    )
    q, k, v = layout.token_major(q), layout.spread(k), layout.spread(v)
    out, lse = flex.attend("fine", q, k, v, block_mask, crowded, backend=backend, scale=scale)
    if lse is not None:
        lse = layout.head_major(lse[..., None])[..., 0]
    return Attention(layout.head_major(out), lse)


def _joined(parts: list[Tensor], times: int) -> Tensor:
    """One behind the other along the tokens, in one copy; each head so many times."""
    if times > 1:
        parts = [part[:, :, None].expand(-1, -1, times, -1, -1) for part in parts]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    return joined.flatten(1, 2) if times > 1 else joined


def default_scale(scale: float | None, q: Tensor) -> float:
    """A1: head_dim ** -0.5 unless another is given."""
    return q.shape[3] ** -0.5 if scale is None else check_finite("scale", scale)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, suffix: str = "") -> None:
    """Fitting shapes, dtypes and devices; `suffix` ends the names of k and v."""
    named = {"q": q, f"k{suffix}": k, f"v{suffix}": v}
    check_tensor("q", q, ("batch", "q_heads", "q_len", "head_dim"))
    check_tensor(f"k{suffix}", k, (q.shape[0], "kv_heads", "kv_len", q.shape[3]))
    check_tensor(f"v{suffix}", v, (*k.shape[:3], "value_dim"))
    for name, tensor in named.items():
        check_size(f"the last axis of {name}", tensor.shape[3], 1)
        check_length(f"the length of {name}", tensor.shape[2])
        check_plain(name, tensor)
    check_alike(**named)
    check_group(q.shape[1], k.shape[1])
