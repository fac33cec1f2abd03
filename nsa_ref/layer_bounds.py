"""The layer in float64, and how far a right one may be from it: one bound per element of a tensor.

The layer as a running error analysis, made of the operations of `nsa_ref.rounded`. It is done
twice, in the declared numerics and in float64, for float64 is arithmetic too: the bound is
the sum. Deterministic form only: every rounding at its worst at once, in the forward pass and in
the backward pass.

x, the weights and d_out are rounded to the dtype and then taken as exact. Right layers differ, and
the bound holds for all of them: projections run as one matrix product or one by one, gradients
are added up before or after they are turned back, gates and outputs meet in one product or in
several, and every intermediate result may be stored.

Where an operation may overflow, or a row is NaN by definition, everything that reads it has bound
inf: also a query that does not see the key, for a kernel may multiply it by 0.

Source: NUMERICS 2, "The layer" and "Gates and combine"; G1, G2, C1, C4, A1-A3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref import rounded
from nsa_ref.bounds import (
    AttentionInputs,
    Groups,
    RoundedGradients,
    rounded_gradients,
    rounded_output,
)
from nsa_ref.checks import as_float64, check_multiple, check_one_of, check_shape
from nsa_ref.compress import num_compress_blocks
from nsa_ref.layer import (
    branch_masks,
    is_rotated,
    layer_arguments,
    layer_weight_shapes,
    layer_width,
    map_weights,
    merge_heads,
    norm_eps,
    projection_name,
    split_heads,
)
from nsa_ref.map_bounds import RoundedPool, rounded_pool
from nsa_ref.numerics import NUMERICS, Array, Numerics
from nsa_ref.rounded import Rounded, exact
from nsa_ref.selection_bounds import score_bounds
from nsa_ref.semantics import BRANCHES, Semantics
from nsa_ref.sizes import Sizes


class LayerBounds(NamedTuple):
    """Largest |error| of a right layer, per element, in the tensors' own shapes and units.

    out : (batch, seq_len, out_dim)
    scores : of the selection, as `score_bounds` returns them; None where
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
    ValueError, TypeError : as `layer_vjp`; an unknown row

    Source
    ------
    NUMERICS 2, "The layer" and "Gates and combine"; G1, G2
    """
    how: dict[str, Any] = {"sizes": sizes, "semantics": semantics, "numerics": numerics}
    of_layer = BoundsOfLayer(x, weights, block_indices, **how)
    return of_layer.forward if d_out is None else of_layer.gradients(d_out)[2]


class BoundsOfLayer:
    """`layer_bounds`, in two steps: of the forward pass, and with the gradients, which share it.

    forward : LayerBounds, without those of gradients
    out : what the layer returns in float64, made in another way than `layer`

    Its arguments and errors are those of `layer_bounds`. Source: NUMERICS 2, "The layer"
    """

    def __init__(
        self,
        x: ArrayLike,
        weights: Mapping[str, ArrayLike],
        block_indices: ArrayLike,
        *,
        sizes: Sizes,
        semantics: Semantics,
        numerics: str,
    ) -> None:
        check_one_of("numerics", numerics, NUMERICS)
        x, w = layer_arguments(x, weights, sizes, semantics)
        batch, seq_len, _ = x.shape
        if semantics.rotary != "none":
            check_multiple("head_dim", sizes.head_dim, "2", 2, why="rotary turns pairs")
        block_indices = np.asarray(block_indices)
        masks = branch_masks(seq_len, seq_len, block_indices, sizes, semantics)
        check_shape("block_indices", block_indices.shape, (batch, "heads", seq_len, "n"))
        rows = NUMERICS[numerics], NUMERICS["fp64"]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            layers = {row: RoundedLayer(x, w, masks, sizes, semantics, row) for row in {*rows}}
            self._both = of_kernel, of_oracle = layers[rows[0]], layers[rows[1]]
            scores = _scores(of_kernel, of_oracle, numerics)
            out = of_kernel.out.error + of_oracle.out.error
        self.forward, self.out = LayerBounds(out, scores, None, None), of_oracle.out.value

    def gradients(self, d_out: ArrayLike) -> tuple[Array, dict[str, Array], LayerBounds]:
        """dx and dweights in float64, of the gradient of out; and the bounds with theirs."""
        of_kernel, of_oracle = self._both
        width = layer_width(of_kernel.sizes, of_kernel.semantics)
        d_out = as_float64("d_out", d_out, (*of_kernel.x.shape[:2], width))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            dx, dw = found = of_kernel.gradients(d_out)
            dx_oracle, dw_oracle = found if of_oracle is of_kernel else of_oracle.gradients(d_out)
        dweights = {name: dw[name].error + dw_oracle[name].error for name in of_kernel.weights}
        bounds = self.forward._replace(dx=dx.error + dx_oracle.error, dweights=dweights)
        values = {name: dw_oracle[name].value for name in of_kernel.weights}
        return dx_oracle.value, values, bounds


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
    for name, shape in layer_weight_shapes(sizes, semantics).items():
        terms = windows if name.startswith("compress_") else lengths
        total = sum(terms)
        each = [
            Rounded(
                np.asarray(value[name], float), np.asarray(error[name], float) * (total / count)
            )
            for value, error, count in zip(dweights, bounds, terms)
            if count  # without a term the gradient is 0, and so is its bound
        ]
        if not each:
            of_all[name] = np.zeros(shape)
            continue
        of_oracle = rounded.total([exact(part.value) for part in each], NUMERICS["fp64"])
        of_all[name] = rounded.total(each, NUMERICS[numerics]).error + of_oracle.error
    return of_all


def _scores(of_kernel: RoundedLayer, of_oracle: RoundedLayer, numerics: str) -> Array | None:
    """Bounds of the selection's scores, from the q and k_cmp that either side has."""
    sizes, semantics = of_kernel.sizes, of_kernel.semantics
    in_strides = sizes.compress_block_size % sizes.compress_block_sliding_stride == 0
    if semantics.importance == "overlap" and not in_strides:
        return None

    def off(of_kernel: Rounded, of_oracle: Rounded) -> Rounded:
        error = of_kernel.error + of_oracle.error
        # 0 * inf is as unknown as inf
        return Rounded(of_kernel.value, np.where(np.isnan(error), np.inf, error))

    mem_k = of_kernel.weights["mem_k"]
    return score_bounds(
        off(of_kernel.q, of_oracle.q),
        off(of_kernel.k_cmp, of_oracle.k_cmp),
        np.broadcast_to(mem_k, (len(of_kernel.x), *mem_k.shape)),
        kv_len=of_kernel.x.shape[1],
        sizes=sizes,
        semantics=semantics,
        numerics=numerics,
    )


# --- in one row of numerics -----------------------------------------------------------------------


class RoundedBranch:
    """One branch in one row of numerics, with what its empty rows hold.

    Source: A2; NUMERICS 2
    """

    def __init__(self, given: AttentionInputs, empty_row: str, row: Numerics) -> None:
        columns = given.k.value.shape[2]
        mask = np.broadcast_to(given.mask, (*given.q.value.shape[:3], columns))
        empty = ~np.any(mask > 0, axis=-1)
        self._uniform = uniform = empty & (empty_row == "uniform") & (columns > 0)
        # the mean of all columns is what q = 0 sees without a mask; no gradient reaches q or k
        mask = np.where(uniform[..., None], 1.0, mask)
        q = given.q.map(lambda part: np.where(uniform[..., None], 0.0, part))
        self._groups, self._row = Groups(given._replace(q=q, mask=mask)), row
        self.out = rounded_output(self._groups, row).out
        if empty_row == "nan":
            self.out.error[empty] = np.inf
            # a copy: the gradients of rows that are numbers are computed from what stands there
            values = np.where(empty[..., None], np.nan, self.out.value)
            self.out = self.out._replace(value=values)

    def gradients(self, d_out: Rounded) -> RoundedGradients:
        """Of q, k and v, from that of out."""
        self._groups.send(d_out)
        dq, dk, dv = rounded_gradients(self._groups, self._row)
        dq = rounded.stored(dq, self._row) if self._row.rounds_every_operation else dq
        dq.value[self._uniform], dq.error[self._uniform] = 0.0, 0.0
        return RoundedGradients(dq, dk, dv)


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
        self.x, self.weights, self.row = x, weights, row
        self.sizes, self.semantics = sizes, semantics
        seq_len = x.shape[1]
        self.norm = None
        if semantics.input_norm:
            self.norm = rounded.normed(x, weights["norm.weight"], norm_eps(semantics), row)
        self.h = exact(x) if self.norm is None else self.norm.out
        self.turn = self.block_turn = None
        if semantics.rotary != "none":
            self.turn = rounded.turn(np.arange(seq_len, dtype=np.float64), sizes.head_dim, row)
        if semantics.rotary == "all":
            starts = np.arange(seq_len) * float(sizes.compress_block_sliding_stride)
            blocks = num_compress_blocks(seq_len, sizes, semantics)
            self.block_turn = rounded.turn(starts[:blocks], sizes.head_dim, row)

        q = self._heads("to_q.weight", sizes.q_heads)
        turned = rounded.rotated(q, self.turn, row)
        q_of = {c: turned if is_rotated(semantics, c) else q for c in BRANCHES}
        k, v = (
            {c: self._heads(projection_name(kind, c, semantics), sizes.kv_heads) for c in BRANCHES}
            for kind in ("k", "v")
        )
        self.to_pool = {"k": k["compress"], "v": v["compress"]}
        for branch in ("fine", "sliding"):
            k[branch] = rounded.rotated(k[branch], self.turn, row)
        if semantics.rotary == "before_pooling":
            self.to_pool["k"] = rounded.rotated(k["compress"], self.turn, row)
        self.q = q_of["compress"]
        self.k_cmp = rounded.rotated(self._pool("k").out, self.block_turn, row)
        k["compress"] = self._with_memory("mem_k", self.k_cmp)
        v["compress"] = self._with_memory("mem_v", self._pool("v").out)
        empty_row = semantics.empty_row._asdict()
        self.branches = {
            c: RoundedBranch(
                AttentionInputs(q_of[c], k[c], v[c], masks[c], sizes.scale), empty_row[c], row
            )
            for c in BRANCHES
        }
        # a gate is one number of a head: (batch, 3 q_heads, seq_len, 1), branch by branch
        logits = self._heads("gates.weight", len(BRANCHES) * sizes.q_heads, weights["gates.bias"])
        of_branches = (
            np.split(part, len(BRANCHES), axis=1) for part in rounded.sigmoid(logits, row)
        )
        self.gate = {c: Rounded(*pair) for c, *pair in zip(BRANCHES, *of_branches)}
        self.merged = self._combined().map(merge_heads)
        self.out = self.merged
        if semantics.output_projection:
            self.out = rounded.affine(self.merged, weights["to_out.weight"], None, row)

    def gradients(self, d_out: Array) -> tuple[Rounded, dict[str, Rounded]]:
        """dx and dweights, of the gradient of out."""
        row, semantics, memory = self.row, self.semantics, self.sizes.num_mem_kv
        dw: dict[str, Rounded] = {}
        g = exact(d_out)
        if semantics.output_projection:
            dw["to_out.weight"] = rounded.weight_gradient(g, self.merged, row)
            g = rounded.matmul(g, exact(self.weights["to_out.weight"]), row)
        g = g.map(lambda part: split_heads(part, self.sizes.q_heads))
        branches = self.branches
        back = {c: branches[c].gradients(rounded.times(self.gate[c], g, row)) for c in BRANCHES}
        dg = {c: rounded.inner(g, branches[c].out, row).at(..., None) for c in BRANCHES}
        of_branches = [rounded.sigmoid_gradient(dg[c], self.gate[c], row) for c in BRANCHES]
        dz = rounded.concatenated(of_branches, axis=1).map(merge_heads)
        dw["gates.bias"] = rounded.summed(dz, (0, 1), row)

        # of keys and values by branch: those of the compress branch's tokens, through the maps
        d_tokens = {c: {"k": back[c].dk, "v": back[c].dv} for c in BRANCHES}
        for kind, turn in (("k", self.block_turn), ("v", None)):
            d = d_tokens["compress"][kind]
            dw[f"mem_{kind}"] = rounded.summed(d.map(lambda part: part[:, :, :memory]), (0,), row)
            blocks = d.map(lambda part: part[:, :, memory:])
            found = self._pool(kind, rounded.rotated(blocks, turn, row, back=True))
            assert found.dx is not None
            d_tokens["compress"][kind] = found.dx
            dw |= {f"compress_{kind}.{name}": each for name, each in found.dweights.items()}

        # of every projection, those who read it as it is, and those who read it turned
        readers: dict[str, tuple[list[Rounded], list[Rounded]]] = {}

        def read(name: str, d: Rounded, *, is_turned: bool) -> None:
            readers.setdefault(name, ([], []))[is_turned].append(d)

        for c in BRANCHES:
            # with "all" the compress branch turns blocks, once they are pooled
            tokens_turned = c != "compress" or semantics.rotary == "before_pooling"
            turned = is_rotated(semantics, c)
            read("to_q.weight", back[c].dq, is_turned=turned)
            k, v = (projection_name(kind, c, semantics) for kind in ("k", "v"))
            read(k, d_tokens[c]["k"], is_turned=turned and tokens_turned)
            read(v, d_tokens[c]["v"], is_turned=False)
        projected = {
            name: rounded.turned_gradient(plain, turned, self.turn, row).map(merge_heads)
            for name, (plain, turned) in readers.items()
        }
        projected["gates.weight"] = dz
        for name, d in projected.items():
            dw[name] = rounded.weight_gradient(d, self.h, row)
        dh = rounded.input_gradient([(d, self.weights[name]) for name, d in projected.items()], row)
        if self.norm is None:
            return dh, dw
        weight = self.weights["norm.weight"]
        dx, dw["norm.weight"] = rounded.normed_gradient(dh, self.norm, self.x, weight, row)
        return dx, dw

    def _heads(self, name: str, heads: int, bias: Array | None = None) -> Rounded:
        """h W^T + b by heads; the error of RMSNorm's r is one factor of a whole row of h."""
        common, rest = np.zeros((*self.x.shape[:2], 1)), self.h
        if self.norm is not None:
            common, rest = self.norm.r.error / self.norm.r.value, self.norm.out_of_r
        flat = rounded.affine(rest, self.weights[name], bias, self.row, common)
        return flat.map(lambda part: split_heads(part, heads))

    def _pool(self, kind: str, d_blocks: Rounded | None = None) -> RoundedPool:
        """The blocks of keys ("k") or values ("v"), and the gradients of their map."""
        weights, sizes, semantics = map_weights(self.weights, kind), self.sizes, self.semantics
        return rounded_pool(self.to_pool[kind], weights, d_blocks, sizes, semantics, self.row)

    def _with_memory(self, name: str, blocks: Rounded) -> Rounded:
        memory = self.weights[name]
        every = exact(np.broadcast_to(memory, (blocks.value.shape[0], *memory.shape)))
        return rounded.concatenated([every, blocks], axis=2)

    def _combined(self) -> Rounded:
        """sum_c g_c out_c; a matrix product, or products and sums of their own."""
        row, parts = self.row, [(self.gate[c], b.out) for c, b in self.branches.items()]
        apart = rounded.total([rounded.times(gate, out, row) for gate, out in parts], row)
        size = sum(gate.size * out.size for gate, out in parts)
        more = (row.accumulate(len(parts)) + row.u_operands) * size
        return rounded.stored(Rounded(apart.value, apart.error + more), row)
