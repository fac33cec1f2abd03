"""The whole layer: projections, three branches, gates; and its decoding, step by step (G1 to G4).

Paper's letters: l = compress_block_size, d = compress_block_sliding_stride, g_c = the gate of
branch c, in the order compress, fine, sliding. Complex inputs pass through, as in `attend`, so that
any derivative can be read off an imaginary step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.attention import attend, attend_vjp
from nsa_ref.checks import as_float64, as_weights, check_integer, check_shape
from nsa_ref.compress import Weights, num_compress_blocks, pool, pool_vjp, pool_weight_shapes
from nsa_ref.masks import compress_mask, fine_mask, sliding_mask
from nsa_ref.selection import select
from nsa_ref.semantics import BRANCHES, PAPER, Semantics, check_semantics
from nsa_ref.sizes import Sizes, check_sizes

#: Added to the mean square that `input_norm` divides by: float32's machine epsilon.
NORM_EPS = 2.0**-23

#: The angle of pair i at position p is p * ROTARY_BASE ** (-2 i / head_dim).
ROTARY_BASE = 10000.0


def layer_weight_shapes(sizes: Sizes, semantics: Semantics = PAPER) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the layer.

    ::

        norm.weight                (model_dim,)                         with input_norm
        to_q.weight                (q_heads head_dim, model_dim)
        to_k.weight, to_v.weight   (kv_heads head_dim or value_dim, model_dim); with kv_per_branch
                                   to_k_compress.weight, to_k_fine.weight, ... in their place
        gates.weight, gates.bias   (3 q_heads, model_dim), (3 q_heads,): branch by branch
        mem_k, mem_v               (kv_heads, num_mem_kv, head_dim or value_dim)
        compress_k.*, compress_v.* what `pool_weight_shapes` lists
        to_out.weight              (model_dim, q_heads value_dim)       with output_projection

    Raises
    ------
    TypeError : sizes that are no Sizes, semantics that is no Semantics

    Source
    ------
    G1, C3, C4; arXiv 2502.11089, eq. 5
    """
    check_sizes(sizes)
    check_semantics(semantics)
    dim, heads, kv_heads = sizes.model_dim, sizes.q_heads, sizes.kv_heads
    dims = {"k": sizes.head_dim, "v": sizes.value_dim}
    shapes: dict[str, tuple[int, ...]] = {}
    if semantics.input_norm:
        shapes["norm.weight"] = (dim,)
    shapes["to_q.weight"] = (heads * sizes.head_dim, dim)
    for kind in ("k", "v"):
        for branch in BRANCHES:
            shapes[projection_name(kind, branch, semantics)] = (kv_heads * dims[kind], dim)
    shapes["gates.weight"] = (len(BRANCHES) * heads, dim)
    shapes["gates.bias"] = (len(BRANCHES) * heads,)
    for kind in ("k", "v"):
        shapes[f"mem_{kind}"] = (kv_heads, sizes.num_mem_kv, dims[kind])
    for kind in ("k", "v"):
        of_map = pool_weight_shapes(sizes, dims[kind])
        shapes |= {f"compress_{kind}.{name}": shape for name, shape in of_map.items()}
    if semantics.output_projection:
        shapes["to_out.weight"] = (dim, heads * sizes.value_dim)
    return shapes


def layer_width(sizes: Sizes, semantics: Semantics = PAPER) -> int:
    """Features of a token as the layer returns it: model_dim, or all heads without a projection.

    Source: G1
    """
    if semantics.output_projection:
        return sizes.model_dim
    return sizes.q_heads * sizes.value_dim


def projection_name(kind: str, branch: str, semantics: Semantics) -> str:
    """The name of the weight that makes the keys ("k") or values ("v") of a branch."""
    return f"to_{kind}_{branch}.weight" if semantics.kv_per_branch else f"to_{kind}.weight"


# --- the parts ------------------------------------------------------------------------------------


def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding: every pair of features turned by an angle that grows with the position.

    ::

        (x[2i], x[2i + 1])  turned by  p * 10000 ** (-2 i / head_dim)

    Turning back is `rotate(x, -positions)`, and so is the gradient.

    Shapes
    ------
    x : (..., len, head_dim), head_dim even      positions : (len,), in tokens
    returns : the shape of x

    Raises
    ------
    ValueError : an odd head_dim, positions of another length

    Source
    ------
    G2; RoFormer, arXiv 2104.09864, eq. 34
    """
    x = as_float64("x", x)
    length, dim = x.shape[-2:]
    positions = as_float64("positions", positions, (length,))
    if dim % 2:
        raise ValueError(
            f"head_dim={dim} must be even: rotary embedding turns pairs of features. Try {dim + 1}."
        )
    turned = np.zeros(x.shape, dtype=x.dtype)
    for i in range(dim // 2):
        angle = positions * ROTARY_BASE ** (-2 * i / dim)
        a, b = x[..., 2 * i], x[..., 2 * i + 1]
        turned[..., 2 * i] = a * np.cos(angle) - b * np.sin(angle)
        turned[..., 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return turned


def split_heads(flat: np.ndarray, heads: int) -> np.ndarray:
    """(batch, len, heads dim) -> (batch, heads, len, dim): a head's features stand together."""
    batch, length, width = flat.shape
    return flat.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def merge_heads(x: np.ndarray) -> np.ndarray:
    """The way back."""
    batch, heads, length, dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * dim)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # both forms are the same function; neither exp can overflow where it is used
    e = np.exp(np.where(x.real > 0, -x, x))
    return np.where(x.real > 0, 1 / (1 + e), e / (1 + e))


def norm_eps(semantics: Semantics) -> float:
    """What is added to the mean square (G1). Here all is computed in float64: its own is 2^-52."""
    return 2.0**-52 if semantics.input_norm == "machine_eps" else NORM_EPS


def is_rotated(semantics: Semantics, branch: str) -> bool:
    """Whether a branch's q and k are rotated (G2)."""
    if branch == "compress":
        return semantics.rotary in ("all", "before_pooling")
    return semantics.rotary != "none"


def map_weights(weights: Weights, kind: str) -> dict[str, np.ndarray]:
    """The weights of the compression map of keys ("k") or values ("v")."""
    prefix = f"compress_{kind}."
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def branch_masks(
    q_len: int, kv_len: int, block_indices: np.ndarray, sizes: Sizes, semantics: Semantics
) -> dict[str, np.ndarray]:
    """The multiplicities of every branch's keys (W1, C2, F1)."""
    return {
        "compress": compress_mask(q_len, kv_len, sizes, semantics),
        "fine": fine_mask(q_len, kv_len, block_indices, sizes, semantics),
        "sliding": sliding_mask(q_len, kv_len, sizes, semantics),
    }


class _Tokens(NamedTuple):
    """h and q of the rows, k and v of all tokens by branch; nothing is rotated."""

    h: np.ndarray
    q: np.ndarray
    k: dict[str, np.ndarray]
    v: dict[str, np.ndarray]


class _Branch(NamedTuple):
    """What a branch attends with; the columns of compress are the memory, then the blocks."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class _Parts:
    """The parts of the layer that has these weights, sizes and semantics."""

    weights: Weights
    sizes: Sizes
    semantics: Semantics

    def tokens(self, x: np.ndarray) -> _Tokens:
        h = x
        if "norm.weight" in self.weights:
            root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + norm_eps(self.semantics))
            h = x / root * self.weights["norm.weight"]

        def heads(name: str, number: int) -> np.ndarray:
            return split_heads(h @ self.weights[name].T, number)

        def of_branches(kind: str) -> dict[str, np.ndarray]:
            names = {c: projection_name(kind, c, self.semantics) for c in BRANCHES}
            return {c: heads(name, self.sizes.kv_heads) for c, name in names.items()}

        q = heads("to_q.weight", self.sizes.q_heads)
        return _Tokens(h, q, of_branches("k"), of_branches("v"))

    def to_pool(self, tokens: _Tokens) -> dict[str, np.ndarray]:
        """The tokens' keys ("k") and values ("v") as the compression map reads them (G2)."""
        k = tokens.k["compress"]
        if self.semantics.rotary == "before_pooling":
            k = rotate(k, np.arange(k.shape[2]))
        return {"k": k, "v": tokens.v["compress"]}

    def blocks(self, tokens: _Tokens) -> dict[str, np.ndarray]:
        """The compressed blocks of all tokens, as the compression map leaves them."""
        return {
            kind: pool(of_tokens, map_weights(self.weights, kind), self.sizes, self.semantics)
            for kind, of_tokens in self.to_pool(tokens).items()
        }

    def last_block(self, tokens: _Tokens) -> dict[str, np.ndarray]:
        """One block over the last l tokens, zeros left of token 0: (batch, kv_heads, 1, dim)."""
        size = self.sizes.compress_block_size
        last = {}
        for kind, x in self.to_pool(tokens).items():
            window = np.pad(x, ((0, 0), (0, 0), (size, 0), (0, 0)))[:, :, -size:]
            # l tokens are one window that starts at the first of them, whatever the alignment was
            last[kind] = pool(window, map_weights(self.weights, kind), self.sizes)
        return last

    def through_pool(
        self, dk: np.ndarray, dv: np.ndarray, tokens: _Tokens, dweights: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gradients of the tokens from those of the compress branch's columns."""
        sizes, semantics = self.sizes, self.semantics
        d_tokens = {}
        for (kind, of_tokens), d in zip(self.to_pool(tokens).items(), (dk, dv)):
            d_memory, d_blocks = np.split(d, [sizes.num_mem_kv], axis=2)
            dweights[f"mem_{kind}"] = d_memory.sum(axis=0)
            if kind == "k" and semantics.rotary == "all":
                i = np.arange(d_blocks.shape[2])
                d_blocks = rotate(d_blocks, -i * sizes.compress_block_sliding_stride)
            of_map = map_weights(self.weights, kind)
            d_tokens[kind], d_map = pool_vjp(of_tokens, of_map, d_blocks, sizes, semantics)
            for name, gradient in d_map.items():
                dweights[f"compress_{kind}.{name}"] = gradient
        if semantics.rotary == "before_pooling":
            d_tokens["k"] = rotate(d_tokens["k"], -np.arange(tokens.h.shape[1]))
        return d_tokens["k"], d_tokens["v"]

    def read(
        self, tokens: _Tokens, blocks: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """By branch: q of the last rows, keys and values of all columns, rotated; memory first."""
        sizes, semantics = self.sizes, self.semantics
        q, k_cmp = tokens.q, blocks["k"]
        k, v = dict(tokens.k), dict(tokens.v)
        batch, q_len, kv_len = q.shape[0], q.shape[2], k["fine"].shape[2]
        p = np.arange(q_len) + kv_len - q_len
        turned = {c: is_rotated(semantics, c) for c in BRANCHES}
        rows = {c: rotate(q, p) if turned[c] else q for c in BRANCHES}
        for branch in ("fine", "sliding"):
            if turned[branch]:
                k[branch] = rotate(k[branch], np.arange(kv_len))
        if semantics.rotary == "all":
            # block i stands where its window starts: XunhaoLai's choice; memory stands nowhere
            i = np.arange(k_cmp.shape[2])
            k_cmp = rotate(k_cmp, i * sizes.compress_block_sliding_stride)
        mem_k, mem_v = (
            np.broadcast_to(self.weights[name], (batch, *self.weights[name].shape))
            for name in ("mem_k", "mem_v")
        )
        k["compress"] = np.concatenate([mem_k, k_cmp], axis=2)
        v["compress"] = np.concatenate([mem_v, blocks["v"]], axis=2)
        return rows, k, v

    def selection_inputs(
        self, rows: dict[str, np.ndarray], k: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k_cmp and mem_k of what `read` returns."""
        mem_k, k_cmp = np.split(k["compress"], [self.sizes.num_mem_kv], axis=2)
        return rows["compress"], k_cmp, mem_k

    def branches(
        self, tokens: _Tokens, blocks: dict[str, np.ndarray], block_indices: np.ndarray | None
    ) -> tuple[dict[str, _Branch], np.ndarray]:
        """What `read` returns, selected and masked."""
        rows, k, v = self.read(tokens, blocks)
        q_len, kv_len = rows["fine"].shape[2], k["fine"].shape[2]
        how: dict[str, Any] = {"sizes": self.sizes, "semantics": self.semantics}
        if block_indices is None:
            block_indices = select(*self.selection_inputs(rows, k), kv_len=kv_len, **how)
        mask = branch_masks(q_len, kv_len, block_indices, **how)
        return {c: _Branch(rows[c], k[c], v[c], mask[c]) for c in BRANCHES}, block_indices

    def attended(self, branches: dict[str, _Branch]) -> dict[str, np.ndarray]:
        empty_row = self.semantics.empty_row._asdict()
        return {c: attend(*branches[c], empty_row=empty_row[c]).out for c in BRANCHES}

    def gates(self, h: np.ndarray) -> dict[str, np.ndarray]:
        """g_c = sigmoid(gates(h)), one number a head and token: (batch, q_heads, len)."""
        gates = _sigmoid(h @ self.weights["gates.weight"].T + self.weights["gates.bias"])
        of_branch = np.split(gates, len(BRANCHES), axis=2)
        return {branch: g.transpose(0, 2, 1) for branch, g in zip(BRANCHES, of_branch)}

    def of_all_rows(
        self, x: np.ndarray, block_indices: np.ndarray | None = None
    ) -> tuple[_Tokens, dict[str, _Branch], np.ndarray]:
        tokens = self.tokens(x)
        return tokens, *self.branches(tokens, self.blocks(tokens), block_indices)

    def out(self, h: np.ndarray, branches: dict[str, _Branch]) -> np.ndarray:
        """Eq. 5, heads merged, projected if there is a projection."""
        merged = _merged(self.gates(h), self.attended(branches))
        if "to_out.weight" not in self.weights:
            return merged
        return merged @ self.weights["to_out.weight"].T


def _merged(gates: dict[str, np.ndarray], attended: dict[str, np.ndarray]) -> np.ndarray:
    return merge_heads(sum(gates[c][..., None] * attended[c] for c in BRANCHES))


# --- the layer ------------------------------------------------------------------------------------


def layer(
    x: np.ndarray,
    weights: Weights,
    *,
    sizes: Sizes,
    semantics: Semantics = PAPER,
    block_indices: np.ndarray | None = None,
) -> np.ndarray:
    """The gated layer, all rows in parallel.

    ::

        h      = x, or with input_norm x / sqrt(mean x^2 + `norm_eps`) times norm.weight
        q      = to_q h, k_c = to_k h, v_c = to_v h         one q; k, v for each branch or for all
        k_cmp  = the compression map over k_compress, v_cmp over v_compress
        rotary   "fine_and_sliding": q and k of these two at their positions
                 "all": the compressed branch too, block i at position i d, once it is pooled
                 "before_pooling": q and every branch's k at their positions before anything else;
                 k_cmp is pooled from turned keys, and not turned again
        blocks = top-n by q and k_cmp as the compress branch sees them
        out    = sum over c of sigmoid(gates_c h) * Attn_c(q, k_c, v_c), then to_out

    The paper derives the gates by "an MLP and sigmoid activation" (section 3.2). Here they are one
    linear map, as in the layers that the presets follow: upstream's default, fla's and XunhaoLai's.

    Shapes
    ------
    x : (batch, seq_len, model_dim)
    weights : the names and shapes of `layer_weight_shapes`
    block_indices : None to select, or the selection to use, (batch, selection heads, seq_len, n)
    returns : (batch, seq_len, model_dim), or without output_projection
        (batch, seq_len, q_heads value_dim); float64, or complex128

    Raises
    ------
    ValueError : wrong shapes, missing or unknown weights, an odd head_dim with rotary
    TypeError : arrays that hold no numbers, sizes or semantics of another type

    Source
    ------
    G1, G2; arXiv 2502.11089, eq. 5
    """
    x, weights = layer_arguments(x, weights, sizes, semantics)
    parts = _Parts(weights, sizes, semantics)
    tokens, branches, _ = parts.of_all_rows(x, block_indices)
    return parts.out(tokens.h, branches)


def layer_block_indices(
    x: np.ndarray, weights: Weights, *, sizes: Sizes, semantics: Semantics = PAPER
) -> np.ndarray:
    """The blocks that `layer` selects: (batch, selection heads, seq_len, n) int64.

    Raises
    ------
    ValueError, TypeError : as `layer`

    Source
    ------
    I1 to I6
    """
    x, weights = layer_arguments(x, weights, sizes, semantics)
    _, _, block_indices = _Parts(weights, sizes, semantics).of_all_rows(x)
    return block_indices


def selection_inputs(
    x: np.ndarray, weights: Weights, *, sizes: Sizes, semantics: Semantics = PAPER
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k_cmp and mem_k as the layer's selection sees them: rotated if the switch says so.

    Shapes
    ------
    returns : (batch, q_heads, seq_len, head_dim), (batch, kv_heads, blocks, head_dim),
        (batch, kv_heads, num_mem_kv, head_dim)

    Raises
    ------
    ValueError, TypeError : as `layer`

    Source
    ------
    I1, G2
    """
    x, weights = layer_arguments(x, weights, sizes, semantics)
    parts = _Parts(weights, sizes, semantics)
    tokens = parts.tokens(x)
    rows, k, _ = parts.read(tokens, parts.blocks(tokens))
    return parts.selection_inputs(rows, k)


def layer_vjp(
    x: np.ndarray,
    weights: Weights,
    d_out: np.ndarray,
    *,
    sizes: Sizes,
    semantics: Semantics = PAPER,
    block_indices: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gradients of <d_out, layer(x, weights)> with respect to x and every weight.

    ::

        dO_c     = g_c dO                    dg_c = sum_c' dO O_c, and dlogit = dg g (1 - g)
        branches   `attend_vjp`; what was rotated is turned back
        k_cmp, v_cmp   through the compression map to the tokens of the compress branch (C4)
        h          the sum over everything that was projected from it
        norm       with r = 1 / sqrt(mean x^2 + eps): dx = r (dh w - x r^2 mean(x dh w))

    No gradient flows through the choice of blocks (A4).

    Shapes
    ------
    d_out : as `layer` returns
    returns : (dx, dweights), of the shapes of x and of each of the weights

    Raises
    ------
    ValueError, TypeError : as `layer`; d_out of a wrong shape

    Source
    ------
    G1, A3, A4, C4; derived by hand from `layer`
    """
    x, weights = layer_arguments(x, weights, sizes, semantics)
    parts = _Parts(weights, sizes, semantics)
    tokens, branches, _ = parts.of_all_rows(x, block_indices)
    attended, gates = parts.attended(branches), parts.gates(tokens.h)
    d_out = as_float64("d_out", d_out, (*x.shape[:2], layer_width(sizes, semantics)))
    dtype = np.result_type(x, d_out, *weights.values())
    dweights = {name: np.zeros(weight.shape, dtype=dtype) for name, weight in weights.items()}
    dh = np.zeros(tokens.h.shape, dtype=dtype)

    def through(name: str, d_projected: np.ndarray) -> np.ndarray:
        """Gradient of h from that of h W^T; the gradient of W is noted."""
        dweights[name] += np.einsum("bto,bti->oi", d_projected, tokens.h)
        return d_projected @ weights[name]

    d_heads = d_out
    if "to_out.weight" in weights:
        merged = _merged(gates, attended)
        dweights["to_out.weight"] = np.einsum("bto,bti->oi", d_out, merged)
        d_heads = d_out @ weights["to_out.weight"]
    d_heads = split_heads(d_heads, sizes.q_heads)

    d_logits = []
    dq = np.zeros(tokens.q.shape, dtype=dtype)
    p = np.arange(x.shape[1])
    for branch in BRANCHES:
        g = gates[branch]
        dg = (d_heads * attended[branch]).sum(axis=3)
        d_logits.append((dg * g * (1 - g)).transpose(0, 2, 1))
        empty_row = getattr(semantics.empty_row, branch)
        dO = g[..., None] * d_heads
        dq_c, dk_c, dv_c = attend_vjp(*branches[branch], dO, empty_row=empty_row)
        turned = is_rotated(semantics, branch)
        if branch == "compress":
            dk_c, dv_c = parts.through_pool(dk_c, dv_c, tokens, dweights)
        elif turned:
            dk_c = rotate(dk_c, -p)
        dq += rotate(dq_c, -p) if turned else dq_c
        dh += through(projection_name("k", branch, semantics), merge_heads(dk_c))
        dh += through(projection_name("v", branch, semantics), merge_heads(dv_c))
    dh += through("to_q.weight", merge_heads(dq))
    d_logit = np.concatenate(d_logits, axis=2)
    dh += through("gates.weight", d_logit)
    dweights["gates.bias"] = d_logit.sum(axis=(0, 1))

    if "norm.weight" not in weights:
        return dh, dweights
    r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + norm_eps(semantics))
    dweights["norm.weight"] = (dh * x * r).sum(axis=(0, 1))
    d_normed = dh * weights["norm.weight"]
    dx = r * (d_normed - x * r**2 * (x * d_normed).mean(axis=-1, keepdims=True))
    return dx, dweights


# --- decoding, and batches of sequences -----------------------------------------------------------


def decode(
    x: np.ndarray, weights: Weights, *, sizes: Sizes, semantics: Semantics = PAPER
) -> np.ndarray:
    """The same rows as `layer`, one token after the other through a cache.

    The cache holds h's projections of all tokens so far, and the compressed blocks that are
    complete. A token is appended, then the blocks that it completes, then its one row attends to
    what is there. Memory stands before the blocks from the first token on.

    Shapes
    ------
    x, weights, returns : as `layer`

    Raises
    ------
    ValueError, TypeError : as `layer`; non-causal semantics, where a row would need later tokens

    Source
    ------
    G3
    """
    x, weights = layer_arguments(x, weights, sizes, semantics)
    if not semantics.causal:
        raise ValueError(
            "semantics.causal=False must be True to decode: a row would need later tokens."
        )
    batch, seq_len, _ = x.shape

    def none(dim: int) -> np.ndarray:
        return np.zeros((batch, sizes.kv_heads, 0, dim))

    k = dict.fromkeys(BRANCHES, none(sizes.head_dim))
    v = dict.fromkeys(BRANCHES, none(sizes.value_dim))
    blocks = {"k": none(sizes.head_dim), "v": none(sizes.value_dim)}
    dtype = np.result_type(x, *weights.values())
    out = np.zeros((batch, seq_len, layer_width(sizes, semantics)), dtype=dtype)
    parts = _Parts(weights, sizes, semantics)
    for t in range(seq_len):
        new = parts.tokens(x[:, t : t + 1])
        k = {c: np.concatenate([k[c], new.k[c]], axis=2) for c in BRANCHES}
        v = {c: np.concatenate([v[c], new.v[c]], axis=2) for c in BRANCHES}
        cache = new._replace(k=k, v=v)
        if num_compress_blocks(t + 1, sizes, semantics) > blocks["k"].shape[2]:
            last = parts.last_block(cache)
            blocks = {kind: np.concatenate([blocks[kind], last[kind]], axis=2) for kind in blocks}
        branches, _ = parts.branches(cache, blocks, None)
        out[:, t] = parts.out(new.h, branches)[:, 0]
    return out


def varlen(
    x: np.ndarray,
    weights: Weights,
    cu_seqlens: np.ndarray,
    *,
    sizes: Sizes,
    semantics: Semantics = PAPER,
) -> np.ndarray:
    """Sequences of different lengths, packed one behind the other: `layer` of each by itself.

    Shapes
    ------
    x : (total tokens, model_dim)
    cu_seqlens : (sequences + 1,) integers, in tokens; sequence i is the rows from cu_seqlens[i] on,
        before cu_seqlens[i + 1]
    returns : (total tokens, what `layer` returns per token)

    Raises
    ------
    ValueError, TypeError : as `layer`; cu_seqlens that do not start at 0, that decrease, or that do
        not end at the number of tokens

    Source
    ------
    G4
    """
    x = as_float64("x", x, ("total tokens", sizes.model_dim))
    # (0, 0) first: a batch of no sequence is checked too, and its result has the right width
    spans = [(0, 0), *itertools.pairwise(check_cu_seqlens(cu_seqlens, x.shape[0]))]
    how: dict[str, Any] = {"sizes": sizes, "semantics": semantics}
    return np.concatenate([layer(x[None, i:j], weights, **how)[0] for i, j in spans])


def varlen_vjp(
    x: np.ndarray,
    weights: Weights,
    cu_seqlens: np.ndarray,
    d_out: np.ndarray,
    *,
    sizes: Sizes,
    semantics: Semantics = PAPER,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gradients of <d_out, varlen(x, weights, cu_seqlens)> with respect to x and every weight.

    ::

        dx        each sequence's own, one behind the other
        dweights  the sum over the sequences, for they share the weights

    Shapes
    ------
    x, cu_seqlens : as `varlen`
    d_out : as `varlen` returns
    returns : (dx, dweights), of the shapes of x and of each of the weights

    Raises
    ------
    ValueError, TypeError : as `varlen`; d_out of a wrong shape

    Source
    ------
    G4; G1, A3, A4, C4 for each sequence
    """
    x = as_float64("x", x, ("total tokens", sizes.model_dim))
    d_out = as_float64("d_out", d_out, (x.shape[0], "out_dim"))
    # (0, 0) first: a batch of no sequence is checked too, and its dweights are zeros
    spans = [(0, 0), *itertools.pairwise(check_cu_seqlens(cu_seqlens, x.shape[0]))]
    how: dict[str, Any] = {"sizes": sizes, "semantics": semantics}
    each = [layer_vjp(x[None, i:j], weights, d_out[None, i:j], **how) for i, j in spans]
    rows, dweights = zip(*each)
    total = {name: np.sum([dw[name] for dw in dweights], axis=0) for name in dweights[0]}
    return np.concatenate([dx[0] for dx in rows]), total


def check_cu_seqlens(cu_seqlens: np.ndarray, tokens: int) -> list[int]:
    """The offsets as a list, if they start at 0, never decrease and end at `tokens`.

    Raises
    ------
    ValueError : offsets that do not
    TypeError : offsets that are no integers
    """
    array = np.asarray(cu_seqlens)
    check_shape("cu_seqlens", array.shape, ("sequences + 1",))
    offsets = array.tolist()
    for offset in offsets:
        check_integer("cu_seqlens", offset)
    rising = all(start <= stop for start, stop in itertools.pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != tokens or not rising:
        # six of either end at most, so that a long batch leaves the message readable
        shown = np.array2string(
            array, 1000, threshold=12, edgeitems=6, separator=", ", formatter={"all": str}
        )
        raise ValueError(
            f"cu_seqlens={shown} must start at 0, never decrease and end at the number of "
            f"tokens, {tokens}."
        )
    return offsets


def layer_arguments(
    x: ArrayLike, weights: Mapping[str, ArrayLike], sizes: Sizes, semantics: Semantics
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """x and the weights as float64.

    Raises
    ------
    ValueError, TypeError : as `layer`
    """
    shapes = layer_weight_shapes(sizes, semantics)
    x = as_float64("x", x, ("batch", "seq_len", sizes.model_dim))
    return x, as_weights(weights, shapes)
