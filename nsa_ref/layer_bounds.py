"""How far a right layer may be from the float64 oracle: one bound per element of every tensor.

A running error analysis. Every intermediate result of the layer is a pair, its float64 value and
how far a right implementation may be from it, and every operation maps the errors of what it
reads to that of its result. It is done twice, once in the declared numerics and once in float64,
for the reference is arithmetic too; the bound is the sum. Deterministic form only: every rounding
at its worst at once, in the forward pass and in the backward pass.

The error model, beyond that of `nsa_ref.bounds`
------------------------------------------------
x, the weights and d_out are rounded to the dtype and then taken as exact. In 16-bit dtypes the
result of every operation may be stored (``u_store``, ``eta``), and a result that may overflow
makes all that reads it unknown: its bound is inf.

- *Projections*, as in the compression maps. Several may run as one matrix product, so that the
  gradients of their common input add up in one accumulator, or each is stored and they add up
  in the dtype, in any order.
- *RMSNorm.* The mean of x^2, plus eps, is off by a relative error t: its inverse square root by
  ``(1 - t)^(-1/2) - 1``. That is one factor of a whole row, and stays one through W. The
  gradient's second term is taken both ways: with the normalised x, and with r^3.
- *Rotary.* Frequencies and angles are float32 at least, whatever the dtype. With e the logarithm
  of the base times 2i / head_dim, a frequency exp(-e) is off by ``(3 e + C_EXP) u_e`` (e is made
  in three roundings, and exp or pow adds its own), the angle by one more; the first frequency
  is 1, exactly. Cosine and sine add ``C_TRIG u_e``, and may be stored. Gradients of rotated
  tensors may be added up before or after they are turned back: the larger bound counts. Keys that
  are pooled once they are turned enter the compression map with the error of their rotation.
- *Attention* of inputs that are off: ``scale (|dq| |k| + |q| |dk| + |dq| |dk|)`` joins the error
  of a logit, a mean of |dv| that of the output, and so on through the gradients.
- *Gates.* ``|dg| <= max sigmoid' |dz| + g (1 - g) C_SCALE u_e |z| + (C_EXP + C_DIV + 1) u_e g``,
  with the largest slope that the logit's interval reaches.
- *Combine.* Three products and two sums, each perhaps stored, or one matrix product.
- *Reuse.* Gradients of weights and products read forward values with their errors. The gradient of
  a ReLU that may be on or off is unknown by its whole size.

Where an operation may overflow, or a row is NaN by definition, everything that reads it has bound
inf: also a query that does not see the key, for a kernel may multiply it by 0.

Source: NUMERICS 2 "Gates and combine"; G1, G2, C1, C4, A1-A3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsa_ref.bounds import RoundedAttention, rounded_attention
from nsa_ref.checks import check_multiple, check_one_of, check_shape
from nsa_ref.compress import compress_windows, num_compress_blocks
from nsa_ref.layer import (
    is_rotated,
    layer_arguments,
    layer_weight_shapes,
    layer_width,
    map_weights,
    merge_heads,
    projection_name,
    split_heads,
)
from nsa_ref.map_bounds import RoundedPool, rounded_pool, window_tokens
from nsa_ref.masks import compress_mask, fine_mask, sliding_mask
from nsa_ref.numerics import NUMERICS, Array, Numerics
from nsa_ref.rounded import (
    Rounded,
    affine,
    exact,
    inner,
    input_gradient,
    joined,
    matmul,
    normed,
    normed_gradient,
    rotated,
    sigmoid,
    sigmoid_gradient,
    stored,
    summed,
    times,
    total,
    turn,
    turned_gradient,
    weight_gradient,
)
from nsa_ref.selection import shared_strides
from nsa_ref.selection_bounds import logit_mean_bounds, score_bounds
from nsa_ref.semantics import BRANCHES, Semantics
from nsa_ref.sizes import Sizes


class LayerBounds(NamedTuple):
    """Largest |error| of a right layer, per element, in the tensors' own shapes and units.

    out : (batch, seq_len, out_dim)
    scores : of the selection, as `score_bounds` or `logit_mean_bounds` returns them; None where
        the sizes have no such scores
    dx, dweights : like x and weights; None without d_out
    """

    out: Array
    scores: Array | None
    dx: Array | None
    dweights: dict[str, Array] | None


def layer_bounds(
    x: ArrayLike,
    weights: Mapping[str, ArrayLike],
    block_indices: ArrayLike,
    d_out: ArrayLike | None = None,
    *,
    sizes: Sizes,
    semantics: Semantics,
    numerics: str,
) -> LayerBounds:
    """Deterministic bounds on the error of the gated layer, forward and (with d_out) backward.

    The float64 oracle's own error is included. A bound is inf where a right layer's dtype may
    overflow somewhere on the way, where a right layer returns NaN (`empty_row="nan"`), and
    where an error may be of any size; nowhere else.

    Shapes
    ------
    x : (batch, seq_len, model_dim), already rounded to the layer's dtype, like weights and d_out
    weights : by the names of the layer's state dict
    block_indices : (batch, heads, seq_len, n), the selection that was used; -1 in unused slots.
        heads = kv_heads, or q_heads without share_selection
    d_out : (batch, seq_len, out_dim); out_dim = model_dim, or q_heads * value_dim without
        output_projection
    numerics : a key of NUMERICS
    returns : LayerBounds

    Raises
    ------
    ValueError : an unknown row, weights that are missing or unknown, shapes that do not fit, an
        odd head_dim that is to be rotated
    TypeError : block_indices that are no integers, semantics that is no Semantics

    Source
    ------
    NUMERICS 2 "Gates and combine"; G1, G2
    """
    check_one_of("numerics", numerics, NUMERICS)
    x, w = layer_arguments(x, weights, sizes, semantics)
    batch, seq_len, _ = x.shape
    if semantics.rotary != "none":
        check_multiple("head_dim", sizes.head_dim, "2", 2, why="rotary turns pairs")
    d_out_ = None
    if d_out is not None:
        d_out_ = np.asarray(d_out, dtype=np.float64)
        check_shape("d_out", d_out_.shape, (batch, seq_len, layer_width(sizes, semantics)))

    masks = branch_masks(np.asarray(block_indices), batch, seq_len, sizes, semantics)
    rows = NUMERICS[numerics], NUMERICS["fp64"]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        layers = {row: RoundedLayer(x, w, masks, sizes, semantics, row) for row in {*rows}}
        of_kernel, of_oracle = (layers[row] for row in rows)
        scores = _scores(of_kernel, of_oracle, w["mem_k"], masks, numerics)
        out = of_kernel.out.error + of_oracle.out.error
        if d_out_ is None:
            return LayerBounds(out, scores, None, None)
        back = {row: layer.gradients(d_out_) for row, layer in layers.items()}
    (dx, dw), (dx_oracle, dw_oracle) = (back[row] for row in rows)
    dweights = {name: dw[name].error + dw_oracle[name].error for name in w}
    return LayerBounds(out, scores, dx.error + dx_oracle.error, dweights)


def packed_weight_bounds(
    lengths: Sequence[int],
    dweights: Sequence[Mapping[str, ArrayLike]],
    bounds: Sequence[Mapping[str, ArrayLike]],
    *,
    sizes: Sizes,
    semantics: Semantics,
    numerics: str,
) -> dict[str, Array]:
    """Deterministic bounds on the weights' gradients of packed sequences, summed over them.

    A right layer runs its sequences one by one and adds up what it stored, or makes one sum over
    the terms of all of them, or something between the two. With c_s terms in sequence s::

        one sum        B_s holds acc(c_s) = (c_s + 2) u_a times the sizes of its terms, and the
                       sum of all has acc(C), C = sum c_s: at most C / c_s times as much
        one by one     S - 1 additions in any order, each perhaps stored
        B = sum_s B_s C / c_s + ((1 + u)^(S - 1) - 1) sum_s (|dW_s| + B_s C / c_s) + (S - 1) eta

    A term is a window for the weights of a compression map, and a token for all others (memory
    has one for every head of a group as well, which cancels). The oracle's own sum is included.
    dx needs nothing of this: each of its rows belongs to one sequence.

    Shapes
    ------
    lengths : tokens of each of the S sequences
    dweights : of each sequence by itself, the float64 oracle's
    bounds : on each of these, `layer_bounds(...).dweights`
    numerics : a key of NUMERICS
    returns : one bound for every element of every weight's gradient

    Raises
    ------
    ValueError : an unknown row, lists of different lengths

    Source
    ------
    G4; NUMERICS 2, acc(n)
    """
    check_one_of("numerics", numerics, NUMERICS)
    for name, given in (("dweights", dweights), ("bounds", bounds)):
        if len(given) != len(lengths):
            raise ValueError(f"{name} has {len(given)} entries; it must have {len(lengths)}.")
    windows = [num_compress_blocks(length, sizes, semantics) for length in lengths]
    of_all = {}
    for name in layer_weight_shapes(sizes, semantics):
        terms = windows if name.startswith("compress_") else lengths
        each = [
            Rounded(
                np.asarray(gradient[name], dtype=np.float64),
                np.asarray(bound[name], dtype=np.float64) * (sum(terms) / count),
            )
            for gradient, bound, count in zip(dweights, bounds, terms)
            if count  # without a term the gradient is 0, and so is its bound
        ]
        if not each:
            of_all[name] = np.zeros(layer_weight_shapes(sizes, semantics)[name])
            continue
        of_oracle = total([exact(part.value) for part in each], NUMERICS["fp64"])
        of_all[name] = total(each, NUMERICS[numerics]).error + of_oracle.error
    return of_all


def branch_masks(
    block_indices: NDArray[np.int64],
    batch: int,
    seq_len: int,
    sizes: Sizes,
    semantics: Semantics,
) -> dict[str, Array]:
    """Multiplicities of each branch: (seq_len, columns), with (batch, q_heads) before for fine.

    Source: W1, C2, F1
    """
    fine = fine_mask(seq_len, seq_len, block_indices, sizes, semantics)
    check_shape("block_indices", block_indices.shape, (batch, "heads", seq_len, "n"))
    compress = compress_mask(seq_len, seq_len, sizes, semantics)
    sliding = sliding_mask(seq_len, seq_len, sizes, semantics)
    return {"compress": compress, "fine": fine, "sliding": sliding}


def _scores(
    of_kernel: RoundedLayer,
    of_oracle: RoundedLayer,
    mem_k: Array,
    masks: Mapping[str, Array],
    numerics: str,
) -> Array | None:
    """Bounds of the selection's scores, from the q and k_cmp that either side has."""
    q, k_cmp = of_kernel.q, of_kernel.k_cmp
    sizes, semantics = of_kernel.sizes, of_kernel.semantics
    by_overlap = semantics.importance != "logit_mean"
    if by_overlap and sizes.compress_block_size % sizes.compress_block_sliding_stride:
        return None
    batch, _, seq_len, _ = q.value.shape
    how: dict[str, Any] = {
        "numerics": numerics,
        "share_selection": semantics.share_selection,
        "q_error": _known(q.error + of_oracle.q.error),
        "k_cmp_error": _known(k_cmp.error + of_oracle.k_cmp.error),
    }
    visible = masks["compress"]
    if not by_overlap:
        visible = visible[:, sizes.num_mem_kv :]
        per_block = sizes.strides_per_selection_block
        return logit_mean_bounds(
            q.value, k_cmp.value, visible=visible, strides_per_block=per_block, **how
        )
    counts = shared_strides(seq_len, sizes, semantics)
    mem_k = np.broadcast_to(mem_k, (batch, *mem_k.shape))
    return score_bounds(q.value, k_cmp.value, mem_k, visible=visible, counts=counts, **how)


def _known(error: Array) -> Array:
    """An error without NaN: 0 * inf is as unknown as inf."""
    return np.where(np.isnan(error), np.inf, error)


# --- in one row of numerics -----------------------------------------------------------------------


def rounded_branch(
    q: Rounded,
    k: Rounded,
    v: Rounded,
    d_out: Rounded | None = None,
    *,
    mask: Array,
    empty_row: str,
    row: Numerics,
) -> RoundedAttention:
    """One branch, with what its empty rows hold; the gradients are 0 without d_out.

    Source: A2; NUMERICS 2
    """
    columns = k.value.shape[2]
    mask = np.broadcast_to(mask, (*q.value.shape[:3], columns))
    empty = ~np.any(mask > 0, axis=-1)
    uniform = empty & (empty_row == "uniform") & (columns > 0)
    # the mean of all columns is what q = 0 sees without a mask; no gradient reaches q or k
    mask = np.where(uniform[..., None], 1.0, mask)
    q = q.map(lambda part: np.where(uniform[..., None], 0.0, part))
    if row.rounds_every_operation:  # q may be scaled, and stored, on its own
        q = stored(q, row)
    found = rounded_attention(q, k, v, d_out, mask=mask, scale=q.value.shape[3] ** -0.5, row=row)
    if empty_row == "nan":
        found.out.error[empty] = np.inf
    dq = stored(found.dq, row) if row.rounds_every_operation else found.dq
    dq.value[uniform], dq.error[uniform] = 0.0, 0.0
    return found._replace(dq=dq)


class RoundedLayer:
    """The layer in one row of numerics: its forward pass, and what its gradients read of it.

    out, q, k_cmp : the result, and what the selection reads
    """

    def __init__(
        self,
        x: Array,
        weights: Mapping[str, Array],
        masks: Mapping[str, Array],
        sizes: Sizes,
        semantics: Semantics,
        row: Numerics,
    ) -> None:
        self.x, self.weights, self.masks = x, weights, masks
        self.sizes, self.semantics, self.row = sizes, semantics, row
        seq_len = x.shape[1]
        self.norm = normed(x, weights["norm.weight"], row) if semantics.input_norm else None
        self.h = exact(x) if self.norm is None else self.norm.out
        windows = compress_windows(seq_len, sizes, semantics)
        self.tokens = window_tokens(windows, sizes.compress_block_size)
        self.turn = self.block_turn = None
        if semantics.rotary != "none":
            self.turn = turn(np.arange(seq_len, dtype=np.float64), sizes.head_dim, row)
        if semantics.rotary == "all":
            starts = np.arange(len(windows)) * sizes.compress_block_sliding_stride
            self.block_turn = turn(starts.astype(np.float64), sizes.head_dim, row)

        q = self._heads("to_q.weight", sizes.q_heads)
        turned = rotated(q, self.turn, row)
        self.branch_q = {c: turned if is_rotated(semantics, c) else q for c in BRANCHES}
        k, v = (
            {c: self._heads(projection_name(kind, c, semantics), sizes.kv_heads) for c in BRANCHES}
            for kind in ("k", "v")
        )
        self.to_pool = {"k": k["compress"], "v": v["compress"]}
        for branch in ("fine", "sliding"):
            k[branch] = rotated(k[branch], self.turn, row)
        if semantics.rotary == "before_pooling":
            self.to_pool["k"] = rotated(k["compress"], self.turn, row)
        self.q = self.branch_q["compress"]
        self.k_cmp = rotated(self._pool("k").out, self.block_turn, row)
        self.branch_k = k | {"compress": self._with_memory("mem_k", self.k_cmp)}
        self.branch_v = v | {"compress": self._with_memory("mem_v", self._pool("v").out)}

        self.attended = {c: self._attend(c).out for c in BRANCHES}
        logits = self._projected("gates.weight", weights["gates.bias"])
        self.gates = sigmoid(logits, row).map(self._split_gates)
        self.gate = {
            c: Rounded(self.gates.value[i, ..., None], self.gates.error[i, ..., None])
            for i, c in enumerate(BRANCHES)
        }
        self.merged = self._combined().map(merge_heads)
        self.out = self.merged
        if semantics.output_projection:
            self.out = affine(self.merged, weights["to_out.weight"], None, row)

    def gradients(self, d_out: Array) -> tuple[Rounded, dict[str, Rounded]]:
        """dx and dweights, of the gradient of out."""
        row, semantics, memory = self.row, self.semantics, self.sizes.num_mem_kv
        dw: dict[str, Rounded] = {}
        g = exact(d_out)
        if semantics.output_projection:
            dw["to_out.weight"] = weight_gradient(g, self.merged, row)
            g = matmul(g, exact(self.weights["to_out.weight"]), row)
        g = g.map(lambda part: split_heads(part, self.sizes.q_heads))
        back = {c: self._attend(c, times(self.gate[c], g, row)) for c in BRANCHES}
        dg = joined([inner(g, self.attended[c], row) for c in BRANCHES], np.stack)
        dz = sigmoid_gradient(dg, self.gates, row).map(self._merge_gates)
        dw["gates.bias"] = summed(dz, (0, 1), row)

        # of keys and values by branch: those of the compress branch's tokens, through the maps
        d_tokens = {c: {"k": back[c].dk, "v": back[c].dv} for c in BRANCHES}
        turn_back = None if self.block_turn is None else self.block_turn.back()
        for kind, d in d_tokens["compress"].items():
            dw[f"mem_{kind}"] = summed(d.map(lambda part: part[:, :, :memory]), (0,), row)
            blocks = d.map(lambda part: part[:, :, memory:])
            found = self._pool(kind, rotated(blocks, turn_back, row) if kind == "k" else blocks)
            assert found.dx is not None
            d_tokens["compress"][kind] = found.dx
            dw |= {f"compress_{kind}.{name}": each for name, each in found.dweights.items()}

        # of every projection, those who read it as it is, and those who read it turned
        plain: dict[str, list[Rounded]] = {"to_q.weight": []}
        turned: dict[str, list[Rounded]] = {"to_q.weight": []}
        for c in BRANCHES:
            turns_q = is_rotated(semantics, c)
            # with "all" the compress branch turns blocks, once they are pooled
            turns_k = turns_q and (c != "compress" or semantics.rotary == "before_pooling")
            for name, turns, d in (
                ("to_q.weight", turns_q, back[c].dq),
                (projection_name("k", c, semantics), turns_k, d_tokens[c]["k"]),
                (projection_name("v", c, semantics), False, d_tokens[c]["v"]),
            ):
                for readers in (plain, turned):
                    readers.setdefault(name, [])
                (turned if turns else plain)[name].append(d)
        projected = {
            name: turned_gradient(plain[name], turned[name], self.turn, row).map(merge_heads)
            for name in plain
        }
        projected["gates.weight"] = dz
        for name, d in projected.items():
            dw[name] = weight_gradient(d, self.h, row)
        dh = input_gradient([(d, self.weights[name]) for name, d in projected.items()], row)
        if self.norm is None:
            return dh, dw
        weight = self.weights["norm.weight"]
        dx, dw["norm.weight"] = normed_gradient(dh, self.norm, self.x, weight, row)
        return dx, dw

    def _projected(self, name: str, bias: Array | None = None) -> Rounded:
        """h W^T + b; the error of RMSNorm's r is one factor of a whole row of h."""
        common, rest = np.zeros((*self.x.shape[:2], 1)), self.h
        if self.norm is not None:
            common, rest = self.norm.r.error / self.norm.r.value, self.norm.out_of_r
        return affine(rest, self.weights[name], bias, self.row, common)

    def _heads(self, name: str, heads: int) -> Rounded:
        return self._projected(name).map(lambda part: split_heads(part, heads))

    def _pool(self, kind: str, d_blocks: Rounded | None = None) -> RoundedPool:
        """The blocks of keys ("k") or values ("v"), and the gradients of their map."""
        weights, compress_map = map_weights(self.weights, kind), self.sizes.compress_map
        y = self.to_pool[kind]
        return rounded_pool(y, weights, d_blocks, self.tokens, compress_map, self.row)

    def _with_memory(self, name: str, blocks: Rounded) -> Rounded:
        memory = self.weights[name]
        every = exact(np.broadcast_to(memory, (blocks.value.shape[0], *memory.shape)))
        return joined([every, blocks], lambda parts: np.concatenate(parts, axis=2))

    def _attend(self, branch: str, d_out: Rounded | None = None) -> RoundedAttention:
        return rounded_branch(
            self.branch_q[branch],
            self.branch_k[branch],
            self.branch_v[branch],
            d_out,
            mask=self.masks[branch],
            empty_row=getattr(self.semantics.empty_row, branch),
            row=self.row,
        )

    def _combined(self) -> Rounded:
        """sum_c g_c out_c; a matrix product, or products and sums of their own."""
        row, parts = self.row, [(self.gate[c], self.attended[c]) for c in BRANCHES]
        apart = total([times(gate, out, row) for gate, out in parts], row)
        size = sum(gate.size * out.size for gate, out in parts)
        more = (row.accumulate(len(parts)) + row.u_operands) * size
        return stored(Rounded(apart.value, apart.error + more), row)

    def _split_gates(self, part: Array) -> Array:
        """(batch, seq_len, 3 * q_heads) -> (3, batch, q_heads, seq_len)."""
        split = part.reshape(*part.shape[:2], len(BRANCHES), self.sizes.q_heads)
        return split.transpose(2, 0, 3, 1)

    def _merge_gates(self, part: Array) -> Array:
        """The inverse of `_split_gates`."""
        merged = part.transpose(1, 3, 0, 2)
        return merged.reshape(*merged.shape[:2], len(BRANCHES) * self.sizes.q_heads)
