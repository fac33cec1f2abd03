"""Native Sparse Attention's three branches in JAX, and the adapter that puts them before the judge.

In this folder: `nsa-ref verify jax_port:JaxPort`. It needs `pip install jax nsa-ref`.

JAX compiles a function anew for every shape of its arguments, and a judge draws many. `pace` has it
draw few: a dozen geometries for each branch. `padded` makes them fewer still: it fills lengths up
to 64, 256, 1024 ...; the true lengths and the sizes of the geometry are traced numbers, which cost
no compilation. `limits` holds what is left to few values.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nsa_ref import PAPER
from nsa_ref.testing import Attention, Case, Implementation

jax.config.update("jax_enable_x64", True)

Size = dict[str, Any]


# --- the port: masks, attention, branches ---------------------------------------------------------
# `size` holds the numbers of `traced_sizes`. Rows from q_len on, and columns behind the true number
# of keys, blocks or memory, are padding: no query reads such a column, and the adapter cuts off
# such a row.


def positions(size: Size, rows: int) -> jax.Array:
    """Absolute positions of the queries: the last of them stands at the last key."""
    return (jnp.arange(rows) + size["kv_len"] - size["q_len"])[:, None]


@functools.partial(jax.jit, static_argnums=(1, 2))
def sliding_mask(size: Size, rows: int, columns: int) -> jax.Array:
    """(rows, columns): the w keys before a query and its own; non-causal: the w after it, too."""
    p, j = positions(size, rows), jnp.arange(columns)
    near = jnp.abs(p - j) <= size["sliding_window_size"]
    return near & (p >= 0) & (j < size["kv_len"]) & ((j <= p) | ~size["causal"])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def compress_mask(size: Size, rows: int, columns: int, memory: int) -> jax.Array:
    """(rows, memory + columns): all real memory, and the blocks whose last token is not later."""
    p, i = positions(size, rows), jnp.arange(columns)
    last = i * size["compress_block_sliding_stride"] + size["compress_block_size"] - 1
    seen = (p >= 0) & (i < size["num_compress_blocks"]) & ((last <= p) | ~size["causal"])
    real = jnp.arange(memory) < size["num_mem_kv"]
    return jnp.concatenate([jnp.broadcast_to(real, (rows, memory)), seen], axis=1)


@functools.partial(jax.jit, static_argnums=2)
def fine_mask(size: Size, block_indices: jax.Array, columns: int) -> jax.Array:
    """(batch, heads, rows, columns): the tokens of the selected blocks, each once."""
    p, j = positions(size, block_indices.shape[2]), jnp.arange(columns)
    chosen = (block_indices[..., None] == j // size["selection_block_size"]).any(axis=3)
    return chosen & (p >= 0) & (j < size["kv_len"]) & ((j <= p) | ~size["causal"])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: Any) -> Any:
    """(out, lse) of a softmax over the keys that the mask shows; 0 and -inf where it shows none.

    The masked scores are replaced before exp, so that no gradient becomes inf * 0.
    """
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    empty = ~mask.any(axis=-1)
    scores = scale * jnp.einsum("bhtc,bhjc->bhtj", q, k, precision="highest")
    largest = jnp.where(mask, scores, -jnp.inf).max(axis=-1)
    largest = jax.lax.stop_gradient(jnp.where(empty, 0, largest))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - largest[..., None], 0)), 0)
    total = jnp.where(empty, 1, weights.sum(axis=-1))
    out = jnp.einsum("bhtj,bhjc->bhtc", weights / total[..., None], v, precision="highest")
    return out, jnp.where(empty, -jnp.inf, largest + jnp.log(total))


def sliding(size: Size, q: Any, k: Any, v: Any) -> Any:
    mask = sliding_mask(size, q.shape[2], k.shape[2])
    return attend(q, k, v, mask[None, None], size["scale"].astype(q.dtype))


def compress(size: Size, q: Any, k_cmp: Any, v_cmp: Any, mem_k: Any, mem_v: Any) -> Any:
    mask = compress_mask(size, q.shape[2], k_cmp.shape[2], mem_k.shape[2])
    k, v = jnp.concatenate([mem_k, k_cmp], axis=2), jnp.concatenate([mem_v, v_cmp], axis=2)
    return attend(q, k, v, mask[None, None], size["scale"].astype(q.dtype))


def fine(size: Size, q: Any, k: Any, v: Any, block_indices: Any) -> Any:
    mask = fine_mask(size, block_indices, k.shape[2])
    mask = jnp.repeat(mask, q.shape[1] // mask.shape[1], axis=1)
    return attend(q, k, v, mask, size["scale"].astype(q.dtype))


BRANCHES = {f.__name__: jax.jit(f) for f in (sliding, compress, fine)}


@functools.partial(jax.jit, static_argnums=0)
def gradients(branch: str, size: Size, tensors: Any, indices: Any, d_outputs: Any) -> Any:
    """Of <d_out, out> + <d_lse, lse> with respect to every tensor; indices have none."""
    return jax.vjp(lambda *given: BRANCHES[branch](size, *given, *indices), *tensors)[1](d_outputs)


# --- the adapter: NumPy in, NumPy out -------------------------------------------------------------


def traced_sizes(case: Case) -> Size:
    names = ["q_len", "kv_len", "sliding_window_size", "compress_block_size", "num_compress_blocks"]
    names += ["compress_block_sliding_stride", "selection_block_size", "num_mem_kv"]
    sizes = {name: np.int64(getattr(case, name)) for name in names}
    return sizes | {"scale": np.float64(case.scale), "causal": np.bool_(case.semantics.causal)}


def padded_length(length: int) -> int:
    """The next of 64, 256, 1024 ..."""
    return 64 if length <= 64 else 4 * padded_length(-(-length // 4))


def padded(array: np.ndarray) -> np.ndarray:
    """Zeros behind the rows of axis 2."""
    widths = [(0, 0)] * array.ndim
    widths[2] = (0, padded_length(array.shape[2]) - array.shape[2])
    return np.pad(array, widths)


def forward(branch: str, case: Case, *tensors: np.ndarray) -> Attention:
    out, lse = BRANCHES[branch](traced_sizes(case), *map(padded, tensors))
    return Attention(np.asarray(out)[:, :, : case.q_len], np.asarray(lse)[:, :, : case.q_len])


def backward(branch: str, case: Case, *tensors: np.ndarray) -> tuple[np.ndarray, ...]:
    *tensors, d_out, d_lse = tensors
    indices = [tensors.pop()] if branch == "fine" else []
    given = [[padded(array) for array in group] for group in (tensors, indices, [d_out, d_lse])]
    found = gradients(branch, traced_sizes(case), given[0], given[1], tuple(given[2]))
    return tuple(np.asarray(grad)[:, :, : own.shape[2]] for grad, own in zip(found, tensors))


class JaxPort(Implementation):
    name = "jax port"
    semantics = (PAPER, dataclasses.replace(PAPER, causal=False))
    numerics = {"float32": "fp32", "float64": "fp64"}  # noqa: RUF012
    pace = "compiles"
    limits = {  # noqa: RUF012
        "batch": (2,),
        "kv_heads": (2,),
        "group_size": (2,),
        "head_dim": (8,),
        "value_dim": (4,),
        "num_selected_blocks": (3,),
    }
    deterministic = True

    def compile_counts(self) -> dict[str, int]:
        compiled = (*BRANCHES.values(), gradients, sliding_mask, compress_mask, fine_mask)
        return {"shapes": sum(function._cache_size() for function in compiled)}

    def sliding_mask(self, case: Case) -> Any:
        lengths = padded_length(case.q_len), padded_length(case.kv_len)
        return np.asarray(sliding_mask(traced_sizes(case), *lengths))[: case.q_len, : case.kv_len]

    def compress_mask(self, case: Case) -> Any:
        counts = case.q_len, case.num_compress_blocks, case.num_mem_kv
        rows, columns, memory = map(padded_length, counts)
        mask = np.asarray(compress_mask(traced_sizes(case), rows, columns, memory))
        real = np.r_[: case.num_mem_kv, memory : memory + case.num_compress_blocks]
        return mask[: case.q_len, real]

    def fine_mask(self, case: Case, block_indices: Any) -> Any:
        columns = padded_length(case.kv_len)
        mask = np.asarray(fine_mask(traced_sizes(case), padded(block_indices), columns))
        mask = mask.repeat(case.q_heads // mask.shape[1], axis=1)
        return mask[:, :, : case.q_len, : case.kv_len]

    def sliding(self, case: Case, *tensors: Any) -> Attention:
        return forward("sliding", case, *tensors)

    def compress(self, case: Case, *tensors: Any) -> Attention:
        return forward("compress", case, *tensors)

    def fine(self, case: Case, *tensors: Any) -> Attention:
        return forward("fine", case, *tensors)

    def sliding_vjp(self, case: Case, *tensors: Any) -> Any:
        return backward("sliding", case, *tensors)

    def compress_vjp(self, case: Case, *tensors: Any) -> Any:
        return backward("compress", case, *tensors)

    def fine_vjp(self, case: Case, *tensors: Any) -> Any:
        return backward("fine", case, *tensors)
