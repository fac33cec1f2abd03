"""The whole layer: projections, three branches, gates; in parallel, with a cache, or packed.

Paper's letters: w = sliding_window_size, l = compress_block_size,
d = compress_block_sliding_stride, l' = selection_block_size, n = num_selected_blocks. Branches
stand in the order compress, fine, sliding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from nsa_fast.branches import compress_attention, fine_attention, sliding_attention
from nsa_fast.cache import Cache
from nsa_fast.checks import (
    MAX_LENGTH,
    check_alike,
    check_choice,
    check_device,
    check_floating,
    check_indices,
    check_integers,
    check_kind,
    check_length,
    check_plain,
    check_semantics,
    check_size,
    check_tensor,
)
from nsa_fast.flex import BACKENDS, COMPILED_DTYPES, is_triton
from nsa_fast.layouts import split_heads, tokens_first
from nsa_fast.pool import MAP_WEIGHTS, compress_pool, map_shapes
from nsa_fast.rotary import rotate, turns, wide_dtype
from nsa_fast.selection import MOST_CHOSEN, select_blocks
from nsa_fast.windows import Windows, from_token
from nsa_ref.semantics import BRANCHES, PAPER, PerBranch, Semantics

#: Of the input norm: float32's machine epsilon, in every dtype unless it is to be the dtype's own.
NORM_EPS = 2.0**-23

#: Offsets of cu_seqlens that an error prints.
SHOWN_OFFSETS = 12

#: Switches that change what is done with keys and values, and none of those that a cache holds.
SWITCHES_OF_READING = (
    "window_closed",
    "compress_strict",
    "importance",
    "share_selection",
    "forced_score",
    "own_block_extra",
    "score_floor",
    "duplicates",
    "empty_row",
    "empty_lse",
    "output_projection",
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes and switches of a layer, checked."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    compress_block_size: int
    compress_block_sliding_stride: int
    compress_map: str
    selection_block_size: int
    num_selected_blocks: int
    num_initial_blocks: int
    num_local_blocks: int
    sliding_window_size: int
    semantics: Semantics
    backend: str | None

    def __post_init__(self) -> None:
        for name in ("q_heads", "kv_heads", "head_dim", "value_dim"):
            check_size(name, getattr(self, name), 1)
        Windows.checked(**self.compress_sizes, semantics=self.semantics)
        check_size("selection_block_size", self.selection_block_size, 1, MAX_LENGTH)
        for name in ("num_selected_blocks", "num_initial_blocks", "num_local_blocks"):
            check_size(name, getattr(self, name), 0)
        check_length("sliding_window_size", self.sliding_window_size)
        check_kind(self.semantics)
        check_choice("compress_map", self.compress_map, tuple(MAP_WEIGHTS))
        check_choice("backend", self.backend, (None, *BACKENDS))
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads={self.q_heads} must be a multiple of kv_heads={self.kv_heads}: query "
                f"head h reads kv head h // G. Try {self.q_heads // self.kv_heads * self.kv_heads} "
                f"or {(self.q_heads // self.kv_heads + 1) * self.kv_heads}."
            )
        if self.semantics.rotary != "none" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: semantics.rotary="
                f"{self.semantics.rotary!r} turns pairs of channels. "
                f"Try {self.head_dim - 1} or {self.head_dim + 1}."
            )

    def as_run(self, num_mem_kv: int, *, own_choice: bool) -> Layer:
        """The same layer with switches that the branches run, if no row would differ.

        `duplicates` shows in blocks that are handed in only: the layer's own choice names no block
        twice. `empty_row` shows in rows that see nothing only. There are none in compress if there
        is memory, in sliding if the own key is in the window, and in fine if the own block is
        extra, or if n >= 1 and no score is too low. The layer does not use lse.

        Raises
        ------
        ValueError : a switch that does not run and would show
        """
        semantics, n = self.semantics, self.num_selected_blocks
        own_block = semantics.causal and semantics.own_block_extra
        full_choice = semantics.importance == "overlap" and semantics.score_floor is None
        never_empty = PerBranch(
            compress=num_mem_kv > 0,
            fine=own_block or (full_choice and n > 0),
            sliding=semantics.window_closed or self.sliding_window_size > 0,
        )
        rows = ["zero" if never else row for never, row in zip(never_empty, semantics.empty_row)]
        semantics = dataclasses.replace(
            semantics,
            duplicates="set" if own_choice else semantics.duplicates,
            empty_row=PerBranch(*rows),
            empty_lse=PAPER.empty_lse,
        )
        remedy = {"compress": "num_mem_kv=1"}
        if full_choice and n == 0:
            remedy["fine"] = "num_selected_blocks=1"
        for branch, row in zip(BRANCHES, rows):
            if row != "zero" and branch in remedy:
                raise ValueError(
                    f"semantics.empty_row.{branch}={row!r} would show: some rows see no key. It "
                    f"runs where none is empty. Try {remedy[branch]}."
                )
            check_semantics(semantics, branch)
        return dataclasses.replace(self, semantics=semantics)

    def arguments(self) -> dict[str, Any]:
        """Its fields by name, as `native_sparse_attention` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def suffixes(self) -> list[str]:
        """What the names of the projections to k and v end in."""
        return [f"_{branch}" for branch in BRANCHES] if self.semantics.kv_per_branch else [""]

    @property
    def windows(self) -> Windows:
        return Windows(self.compress_block_size, self.compress_block_sliding_stride, self.semantics)

    @property
    def compress_sizes(self) -> dict[str, int]:
        return {
            "compress_block_size": self.compress_block_size,
            "compress_block_sliding_stride": self.compress_block_sliding_stride,
        }

    def pooled(self, tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The compressed keys or values of tokens that begin with a window (C1, C4)."""
        return compress_pool(
            tokens,
            {name: weight.to(tokens.dtype) for name, weight in weights.items()},
            **self.compress_sizes,
            compress_map=self.compress_map,
            semantics=dataclasses.replace(self.semantics, compress_alignment="start"),
        )

    def num_compress_blocks(self, kv_len: int) -> int:
        return self.windows.count(kv_len)

    def name(self, kind: str, branch: str) -> str:
        """Under which name `_project` leaves a branch's keys ("k") or values ("v")."""
        if self.semantics.kv_per_branch:
            return f"{kind}_{branch}"
        return "k_rotated" if kind == "k" and self.rotates_keys(branch) else kind

    def rotates_keys(self, branch: str) -> bool:
        """Whether a branch, or the pooling before it, reads keys rotated token by token."""
        if branch == "compress":
            return self.semantics.rotary == "before_pooling"
        return self.semantics.rotary != "none"


@dataclass(frozen=True)
class Weights:
    """The weights by name; of a module also its submodules, each of which is called where it acts.

    Thus hooks, and what stands in the place of a submodule or is made of its weight when it is
    called (LoRA, pruning, weight norm), have their effect.
    """

    tensors: Mapping[str, Tensor]
    modules: Mapping[str, Callable[..., Tensor]] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        """x W^T, with a bias where there is one: (..., width)."""
        if name not in self.modules:
            return F.linear(x, self[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
        found = self.modules[name](x)
        if not isinstance(found, Tensor) or found.shape != (*x.shape[:-1], width):
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{name} returned {what}; it must return a tensor {(*x.shape[:-1], width)}."
            )
        return found


@_disable_dynamo
def native_sparse_attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    compress_block_size: int,
    compress_block_sliding_stride: int,
    compress_map: str,
    selection_block_size: int,
    num_selected_blocks: int,
    num_initial_blocks: int,
    num_local_blocks: int,
    sliding_window_size: int,
    semantics: Semantics = PAPER,
    block_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: Cache | None = None,
    backend: str | None = None,
) -> Tensor:
    """Native Sparse Attention from tokens to tokens (G1 to G4).

    ::

        h            = x, or x / sqrt(mean x^2 + eps) * norm.weight with input_norm
        q, k, v      = h W^T, by heads. Where semantics.rotary is not "none", q and k of fine and
                       sliding are rotated at their position. So are, in compress, q and the pooled
                       k, at i d ("all"), or q and k of every token before pooling
                       ("before_pooling")
        k_cmp, v_cmp = pool(k of compress), pool(v of compress)
        out          = sum over compress, fine, sliding of sigmoid(h Wg^T + bg) * Attn        eq. 5
        returns        out, or out to_out^T with output_projection

    Gradients go to x and to every weight; none through the choice of blocks (A4), and none at all
    if there is a cache. With a cache, x holds the tokens that follow those in the cache, which
    holds them too afterwards. The rows are those that one call with all tokens returns.

    Under torch.autocast projections and branches run in its dtype, norm, rotation, sigmoid and the
    sum over branches in float32, and the result is in its dtype.

    Shapes
    ------
    x : (batch, seq_len, model_dim), or (total_tokens, model_dim) with cu_seqlens
    weights : "norm.weight" (model_dim,) with input_norm; "to_q.weight" (q_heads * head_dim,
        model_dim); "to_k.weight" (kv_heads * head_dim, model_dim) and "to_v.weight" (kv_heads *
        value_dim, model_dim), or with kv_per_branch "to_k_compress.weight", "to_k_fine.weight",
        "to_k_sliding.weight" and the same of v; "gates.weight" (3 * q_heads, model_dim) and
        "gates.bias" (3 * q_heads,), branch by branch; "mem_k" (kv_heads, num_mem_kv, head_dim),
        "mem_v" (kv_heads, num_mem_kv, value_dim); "compress_k.X", "compress_v.X" for the X that
        `compress_pool` takes; "to_out.weight" (model_dim, q_heads * value_dim) with
        output_projection
    block_indices : the blocks to read instead of a selection, integers (batch, heads, seq_len, n),
        or (heads, total_tokens, n) with cu_seqlens; heads = kv_heads, or q_heads without
        share_selection
    cu_seqlens : integers (sequences + 1,), where the sequences in x begin, and total_tokens; each
        attends to itself alone. The host reads it: on the CPU it waits for no other device
    cache : see `Cache`; only where semantics.causal
    backend : as `sliding_attention`
    returns : (batch, seq_len, out_dim) or (total_tokens, out_dim), with out_dim = model_dim with
        output_projection, else q_heads * value_dim; in the dtype of x

    Raises
    ------
    ValueError : shapes, sizes, names or devices that do not fit, a switch that does not run here;
        the cache is then what it was
    TypeError : dtypes or kinds that do not fit
    """
    layer = Layer(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        compress_block_size=compress_block_size,
        compress_block_sliding_stride=compress_block_sliding_stride,
        compress_map=compress_map,
        selection_block_size=selection_block_size,
        num_selected_blocks=num_selected_blocks,
        num_initial_blocks=num_initial_blocks,
        num_local_blocks=num_local_blocks,
        sliding_window_size=sliding_window_size,
        semantics=semantics,
        backend=backend,
    )
    model_dim = _check_weights(weights, layer)
    return run(x, Weights(weights), layer, model_dim, block_indices, cu_seqlens, cache)


@_disable_dynamo
def run(
    x: Tensor,
    weights: Weights,
    layer: Layer,
    model_dim: int,
    block_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """`native_sparse_attention` with weights whose names and shapes are right."""
    q_heads, kv_heads, semantics = layer.q_heads, layer.kv_heads, layer.semantics
    layer = layer.as_run(weights["mem_k"].shape[1], own_choice=block_indices is None)
    packed = cu_seqlens is not None
    axes = ("total_tokens",) if packed else ("batch", "seq_len")
    check_tensor("x", x, (*axes, model_dim))
    check_plain("x", x)
    _check_dtypes(x, weights.tensors)
    spans = [(0, x.shape[-2])] if cu_seqlens is None else _spans(cu_seqlens, x.shape[0])
    if packed:
        x = x[None]
    if block_indices is not None:
        shape = (kv_heads if semantics.share_selection else q_heads, x.shape[1], "n")
        check_indices("block_indices", block_indices, shape if packed else (x.shape[0], *shape))
        check_device("block_indices", block_indices, "x", x)
        block_indices = block_indices[None] if packed else block_indices
    if cache is None:
        out = _parallel(x, weights, layer, spans, block_indices)
        return out[0] if packed else out
    _check_cache(cache, x, layer, packed)
    with torch.no_grad():
        return _appended(x, weights, layer, cache, block_indices)


def _parallel(
    x: Tensor,
    weights: Weights,
    layer: Layer,
    spans: list[tuple[int, int]],
    block_indices: Tensor | None,
) -> Tensor:
    """All rows of every span of tokens, each span by itself; spans of like lengths in one batch."""
    h = _normed(x, weights, layer)
    tokens = _project(h, weights, layer, [(0, stop - start) for start, stop in spans])
    if len(spans) == 1:
        outs = _attend(_with_compressed(tokens, weights, layer), weights, layer, block_indices)
        return _combined(h, outs, weights, layer)
    # one more token, of zeros, and no block: what stands behind the shorter sequences of a batch
    tokens = {name: F.pad(tensor[0], (0, 0, 0, 1)) for name, tensor in tokens.items()}
    if block_indices is not None:
        block_indices = F.pad(block_indices[0], (0, 0, 0, 1), value=-1)
    batches = _batches(spans, layer)
    real = [row < x.shape[1] for row in batches]
    back = torch.cat([row[of_row] for row, of_row in zip(batches, real)]).argsort()
    places = [of_row.flatten().nonzero()[:, 0] for of_row in real]
    *sent, back = _sent([*batches, *places, back], x.device)
    parts = []
    for row, place in zip(sent[: len(batches)], sent[len(batches) :]):
        batch = {name: tensor[:, row].transpose(0, 1) for name, tensor in tokens.items()}
        indices = None if block_indices is None else block_indices[:, row].transpose(0, 1)
        outs = _attend(_with_compressed(batch, weights, layer), weights, layer, indices)
        parts.append([out.transpose(1, 2).flatten(0, 1)[place] for out in outs])
    outs = [torch.cat(each)[back].transpose(0, 1)[None] for each in zip(*parts)]
    return _combined(h, outs, weights, layer)


def _batches(spans: list[tuple[int, int]], layer: Layer) -> list[Tensor]:
    """Which tokens stand in each batch: int64 (sequences, longest length), on the CPU.

    Behind a shorter sequence stands the number of all tokens. Lengths are at most twice as large as
    others of their batch; they are equal where a row depends on the number of tokens.
    """
    alike = layer.semantics.causal and not _length_decides(layer)
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, stop in spans:
        length = stop - start
        groups.setdefault((length - 1).bit_length() if alike else length, []).append((start, stop))
    batches = []
    for group in groups.values():
        start, stop = torch.tensor(group, device="cpu").T[..., None]
        row = start + torch.arange(int((stop - start).max()), device="cpu")
        batches.append(torch.where(row < stop, row, spans[-1][1]))
    return batches


def _sent(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on another device, by one copy, for which the host does not wait."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def _with_compressed(
    tokens: Mapping[str, Tensor], weights: Weights, layer: Layer
) -> dict[str, Tensor]:
    """The tokens' q, k and v with "k_cmp" and "v_cmp"."""
    pooled = {
        f"{kind}_cmp": _pool(kind, tokens[layer.name(kind, "compress")], weights, layer)
        for kind in ("k", "v")
    }
    return {**tokens, **pooled}


def _length_decides(layer: Layer) -> bool:
    """I3: whether the number of tokens decides which blocks a row can choose.

    By mean logits a block is a candidate once its windows are complete, in the length of the call.
    """
    semantics = layer.semantics
    complete = semantics.compress_alignment == "end" and (
        semantics.own_block_extra
        or layer.selection_block_size != layer.compress_block_sliding_stride
    )
    return semantics.importance == "logit_mean" and not complete


def _appended(
    x: Tensor,
    weights: Weights,
    layer: Layer,
    cache: Cache,
    block_indices: Tensor | None,
) -> Tensor:
    """The rows of new tokens, which the cache holds afterwards."""
    before, after = cache.length, cache.length + x.shape[1]
    h = _normed(x, weights, layer)
    tokens = _project(h, weights, layer, [(before, after)])
    key = _cached_with(layer)
    cache.check(key, tokens["q"].dtype, x.device)
    for name in tokens.keys() - {"q", "q_cmp"}:
        tokens[name] = cache.write(name, before, tokens[name])
    old, new = layer.num_compress_blocks(before), layer.num_compress_blocks(after)
    for kind in ("k", "v"):
        seen = tokens[layer.name(kind, "compress")]
        pooled = _pool(kind, seen, weights, layer, skip=old) if new > old else seen[:, :, :0]
        tokens[f"{kind}_cmp"] = cache.write(f"{kind}_cmp", old, pooled)
    out = _combined(h, _attend(tokens, weights, layer, block_indices), weights, layer)
    cache.commit(after, key)
    return out


# --- from tokens to q, k and v --------------------------------------------------------------------


def _normed(x: Tensor, weights: Weights, layer: Layer) -> Tensor:
    if not layer.semantics.input_norm:
        return x
    if "norm" in weights.modules:
        return weights.modules["norm"](x)
    eps = None if layer.semantics.input_norm == "machine_eps" else NORM_EPS
    return F.rms_norm(x, x.shape[-1:], weights["norm.weight"], eps)


def _project(
    h: Tensor, weights: Weights, layer: Layer, positions: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """Every q, k, v that a branch reads, (batch, heads, tokens, dim); k and v by `Layer.name`.

    Fine and sliding read "q", compress and the selection "q_cmp".

    positions : of the tokens, from and to, sequence by sequence
    """
    rotary = layer.semantics.rotary
    by: Tensor | None = None

    def rotated(x: Tensor) -> Tensor:
        nonlocal by
        if by is None:
            position = torch.cat([torch.arange(*each, device=h.device) for each in positions])
            by = turns(position, layer.head_dim, x.dtype)
        return _rotated(x, by, layer)

    def projected(name: str, heads: int, dim: int) -> Tensor:
        return split_heads(weights.linear(name, h, heads * dim), heads)

    plain_q = projected("to_q", layer.q_heads, layer.head_dim)
    q = plain_q if rotary == "none" else rotated(plain_q)
    tokens = {"q": q, "q_cmp": q if rotary in ("all", "before_pooling") else plain_q}
    for kind, dim in (("k", layer.head_dim), ("v", layer.value_dim)):
        for branch in BRANCHES:
            name = layer.name(kind, branch)
            if name in tokens:
                continue
            if name == "k_rotated" and "k" in tokens:
                found = tokens["k"]
            else:
                found = projected(f"to_{name.removesuffix('_rotated')}", layer.kv_heads, dim)
            if kind == "k" and layer.rotates_keys(branch):
                found = rotated(found)
            tokens[name] = found
    return tokens


def _pool(kind: str, tokens: Tensor, weights: Weights, layer: Layer, *, skip: int = 0) -> Tensor:
    """Compressed keys or values from block `skip` on (C1, C4).

    Rotary "all" rotates key i by i d (G2).
    """
    name = f"compress_{kind}"
    # the first window that is left begins with the first token that is left
    left = from_token(tokens, layer.windows.first_token(skip))
    if name in weights.modules:
        pooled = weights.modules[name](left)
    else:
        own = {
            key.removeprefix(f"{name}."): weight
            for key, weight in weights.tensors.items()
            if key.startswith(f"{name}.")
        }
        pooled = layer.pooled(left, own)
    if kind == "v" or layer.semantics.rotary != "all":
        return pooled
    block = torch.arange(skip, skip + pooled.shape[2], device=pooled.device)
    position = block * layer.compress_block_sliding_stride
    return _rotated(pooled, turns(position, layer.head_dim, pooled.dtype), layer)


def _rotated(x: Tensor, by: Tensor, layer: Layer) -> Tensor:
    """G2, of (batch, heads, tokens, head_dim)."""
    compiled = is_triton(x.device) and layer.backend != "eager"
    if compiled and x.dtype in COMPILED_DTYPES and x.numel():
        from nsa_fast import rotary_kernels  # which imports triton

        return rotary_kernels.rotated(x, by)
    return rotate(x, by)


# --- branches -------------------------------------------------------------------------------------


def _attend(
    tokens: Mapping[str, Tensor],
    weights: Weights,
    layer: Layer,
    block_indices: Tensor | None,
) -> list[Tensor]:
    """Compress, fine, sliding: (batch, q_heads, q_len, value_dim), for the last q_len tokens."""
    q, q_cmp = tokens["q"], tokens["q_cmp"]
    k, v = ([tokens[layer.name(kind, branch)] for branch in BRANCHES] for kind in ("k", "v"))
    kv_len = k[0].shape[2]
    mem_k, mem_v = (
        weights[name].to(q.dtype).expand(q.shape[0], -1, -1, -1) for name in ("mem_k", "mem_v")
    )
    run: dict[str, Any] = {"semantics": layer.semantics, "backend": layer.backend}
    compressed = compress_attention(
        q_cmp, tokens["k_cmp"], tokens["v_cmp"], mem_k, mem_v, kv_len=kv_len,
        **layer.compress_sizes, **run,
    )  # fmt: skip
    if block_indices is None:
        # slots that no length can fill cost memory; below, their number is a shape that is compiled
        most = max(MOST_CHOSEN, -(-kv_len // layer.selection_block_size))
        block_indices = select_blocks(
            q_cmp,
            tokens["k_cmp"],
            mem_k,
            kv_len=kv_len,
            **layer.compress_sizes,
            selection_block_size=layer.selection_block_size,
            num_selected_blocks=min(layer.num_selected_blocks, most),
            num_initial_blocks=layer.num_initial_blocks,
            num_local_blocks=layer.num_local_blocks,
            semantics=layer.semantics,
            lse=compressed.lse,
        )

    k_fine, v_fine = k[1], v[1]
    size, chosen = layer.selection_block_size, block_indices.shape[-1]
    if layer.semantics.causal and q.shape[2] == 1 and (chosen + 1) * size < kv_len:
        k_fine, v_fine, block_indices = _gathered(k_fine, v_fine, block_indices, layer)
    fine = fine_attention(q, k_fine, v_fine, block_indices, selection_block_size=size, **run)

    oldest = 0  # key that a window reaches back to
    if layer.semantics.causal:
        oldest = max(0, kv_len - q.shape[2] - layer.sliding_window_size)
    k_recent, v_recent = k[2][:, :, oldest:], v[2][:, :, oldest:]
    sliding = sliding_attention(
        q, k_recent, v_recent, sliding_window_size=layer.sliding_window_size, **run
    )
    return [compressed.out, fine.out, sliding.out]


def _gathered(
    k: Tensor, v: Tensor, block_indices: Tensor, layer: Layer
) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks that the one query, the last token, may read, and their new numbers.

    The own block, which may be short, comes last: so the query is the last token here as well.
    """
    size, last = layer.selection_block_size, k.shape[2] - 1
    own = last // size
    chosen = block_indices[:, :, 0].to(torch.int64).sort(dim=-1).values
    batch, heads, n = chosen.shape
    again = F.pad(chosen[..., 1:] == chosen[..., :-1], (1, 0)) if n else chosen.bool()
    usable = (chosen >= 0) & (chosen < own) & ~again
    slot = torch.arange(n, device=k.device)
    renumbered = F.pad(torch.where(usable, slot, -1), (0, 1), value=-1)
    renumbered[..., n] = torch.where((chosen == own).any(dim=-1), n, -1)

    inside = torch.arange(size, device=k.device)
    token = torch.where(usable, chosen, 0)[..., None] * size + inside
    behind = torch.arange(own * size, last + 1, device=k.device).expand(batch, heads, -1)
    token = torch.cat([token.flatten(2), behind], dim=-1)
    sequence = torch.arange(batch, device=k.device)[:, None, None]
    head = torch.arange(heads, device=k.device)[:, None] // (heads // layer.kv_heads)
    return k[sequence, head, token], v[sequence, head, token], renumbered[:, :, None]


def _combined(h: Tensor, outs: list[Tensor], weights: Weights, layer: Layer) -> Tensor:
    """Eq. 5, the heads merged, and the output projection."""
    logits = weights.linear("gates", h, len(BRANCHES) * layer.q_heads)
    merged = _gated(logits, outs, layer)
    if not layer.semantics.output_projection:
        return merged
    return weights.linear("to_out", merged, h.shape[-1])


def _gated(logits: Tensor, outs: list[Tensor], layer: Layer) -> Tensor:
    """(batch, q_len, q_heads * value_dim): what comes out of the branches, times the gates."""
    if is_triton(logits.device) and layer.backend != "eager" and outs[0].numel():
        from nsa_fast import gate_kernels  # which imports triton

        return gate_kernels.gated(logits, outs)
    wide = wide_dtype(outs[0].dtype)
    gates = logits.to(wide).sigmoid().unflatten(-1, (len(BRANCHES), layer.q_heads))
    total = sum(
        gates[:, :, branch, :, None] * tokens_first(out).to(wide) for branch, out in enumerate(outs)
    )
    assert isinstance(total, Tensor)
    return total.to(outs[0].dtype).flatten(-2)


# --- checks ---------------------------------------------------------------------------------------


def _check_weights(weights: Mapping[str, Tensor], layer: Layer) -> int:
    """Names and shapes; the model_dim."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must be a mapping from name to tensor, not {type(weights).__name__}."
        )
    shapes = weight_shapes(layer)
    missing = sorted(name for name in shapes if name not in weights and "positions" not in name)
    unknown = sorted(set(weights) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"weights lacks {missing} and has {unknown}, which this layer does not know; the names "
            f"are {sorted(shapes)}, of which 'positions' may be left out."
        )
    to_q = check_tensor("weights['to_q.weight']", weights["to_q.weight"], shapes["to_q.weight"])
    mem_k = check_tensor("weights['mem_k']", weights["mem_k"], shapes["mem_k"])
    sizes: dict[int | str, int] = {"model_dim": to_q.shape[1], "num_mem_kv": mem_k.shape[1]}
    for name, weight in weights.items():
        shape = tuple(sizes.get(size, size) for size in shapes[name])
        check_tensor(f"weights[{name!r}]", weight, shape)
    return to_q.shape[1]


def weight_shapes(layer: Layer) -> dict[str, tuple[int | str, ...]]:
    """Name and shape of every weight; a string names a free size."""
    semantics, size = layer.semantics, layer.compress_block_size
    shapes: dict[str, tuple[int | str, ...]] = {}
    if semantics.input_norm:
        shapes["norm.weight"] = ("model_dim",)
    shapes["to_q.weight"] = (layer.q_heads * layer.head_dim, "model_dim")
    for kind, dim in (("k", layer.head_dim), ("v", layer.value_dim)):
        for suffix in layer.suffixes:
            shapes[f"to_{kind}{suffix}.weight"] = (layer.kv_heads * dim, "model_dim")
        shapes[f"mem_{kind}"] = (layer.kv_heads, "num_mem_kv", dim)
        of_map = map_shapes(layer.compress_map, layer.kv_heads, size, dim, "hidden")
        shapes |= {f"compress_{kind}.{name}": shape for name, shape in of_map.items()}
    shapes["gates.weight"] = (len(BRANCHES) * layer.q_heads, "model_dim")
    shapes["gates.bias"] = (len(BRANCHES) * layer.q_heads,)
    if semantics.output_projection:
        shapes["to_out.weight"] = ("model_dim", layer.q_heads * layer.value_dim)
    return shapes


def _check_dtypes(x: Tensor, weights: Mapping[str, Tensor]) -> None:
    check_floating("x", x)
    device = x.device.type
    named = {f"weights[{name!r}]": weight for name, weight in weights.items()}
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        for name, weight in named.items():  # which brings their dtypes together
            check_device(name, weight, "x", x)
        return
    check_alike(x=x, **named)


def _spans(cu_seqlens: Tensor, total_tokens: int) -> list[tuple[int, int]]:
    """First token and end of every sequence that has tokens; of one without, if none has."""
    check_integers("cu_seqlens", cu_seqlens, ("sequences + 1",), holds="offsets in tokens")
    check_plain("cu_seqlens", cu_seqlens)
    offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] != 0:
        more = len(offsets) - SHOWN_OFFSETS
        shown = f"{offsets[:SHOWN_OFFSETS]}" + (f" and {more} more" if more > 0 else "")
        raise ValueError(f"cu_seqlens={shown} must start with 0, where the first sequence begins.")
    for index, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens[{index + 1}]={stop} must be at least cu_seqlens[{index}]={start}: "
                "sequences stand one behind the other."
            )
    if offsets[-1] != total_tokens:
        raise ValueError(
            f"cu_seqlens[-1]={offsets[-1]} must be {total_tokens}, the number of tokens in x."
        )
    return [(a, b) for a, b in pairwise(offsets) if b > a] or [(0, 0)]


def _check_cache(cache: Cache, x: Tensor, layer: Layer, packed: bool) -> None:
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a nsa_fast.Cache, not {type(cache).__name__}.")
    if packed:
        raise ValueError(
            "cu_seqlens and cache must not be given together: a cache holds sequences of one "
            "length. Use a cache for each sequence."
        )
    if x.shape[0] != cache.batch:
        raise ValueError(f"x has batch {x.shape[0]}; it must be {cache.batch}, that of the cache.")
    semantics = layer.semantics
    if not semantics.causal:
        raise ValueError(
            "semantics.causal=False does not run with a cache: a later token would change the rows "
            "that were returned already. Call it without a cache."
        )
    if _length_decides(layer):
        raise ValueError(
            "semantics.importance='logit_mean' runs with a cache only for "
            "compress_alignment='end' with own_block_extra=True (or selection_block_size above "
            "compress_block_sliding_stride): else later tokens decide whether a block is a "
            "candidate (I3), and rows that were returned already would change."
        )


def _cached_with(layer: Layer) -> dict[str, object]:
    """What the contents of a cache depend on: every switch but those that act where it is read."""
    names = ("kv_heads", "head_dim", "value_dim", "compress_map", *layer.compress_sizes)
    found = {name: getattr(layer, name) for name in names}
    for field in dataclasses.fields(layer.semantics):
        if field.name not in SWITCHES_OF_READING:
            found[f"semantics.{field.name}"] = getattr(layer.semantics, field.name)
    return found
