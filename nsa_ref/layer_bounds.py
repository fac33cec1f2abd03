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

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsa_ref.bounds import _Exact, _group_bounds
from nsa_ref.checks import check_multiple, check_one_of, check_shape
from nsa_ref.compress import compress_windows, num_compress_blocks
from nsa_ref.layer import layer_weight_shapes
from nsa_ref.map_bounds import _pool
from nsa_ref.masks import check_semantics, compress_mask, fine_mask, sliding_mask
from nsa_ref.numerics import C_DIV, C_EXP, C_SCALE, NUMERICS, Array, Numerics
from nsa_ref.rounded import (
    _affine,
    _exactly,
    _final,
    _Layer,
    _overflow,
    _product,
    _stored,
    _sum_gradient,
    _weight_gradient,
)
from nsa_ref.selection import shared_strides
from nsa_ref.selection_bounds import logit_mean_bounds, score_bounds
from nsa_ref.semantics import BRANCHES, PerBranch, Semantics
from nsa_ref.sizes import Sizes

C_TRIG = 2  # sine and cosine: units of u_elementwise, absolute
EPS = 2.0**-23  # of RMSNorm, in every dtype
ROTARY_BASE = 10000.0


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
    check_semantics(semantics)
    x = np.asarray(x, dtype=np.float64)
    check_shape("x", x.shape, ("batch", "seq_len", sizes.model_dim))
    batch, seq_len, _ = x.shape
    check_multiple(
        "q_heads", sizes.q_heads, "kv_heads", sizes.kv_heads, why="groups are of equal size"
    )
    if semantics.rotary != "none":
        check_multiple("head_dim", sizes.head_dim, "2", 2, why="rotary turns pairs")
    shapes = layer_weight_shapes(sizes, semantics)
    if set(weights) != set(shapes):
        raise ValueError(f"weights has {sorted(weights)}; this layer takes {sorted(shapes)}.")
    w = {name: np.asarray(weights[name], dtype=np.float64) for name in shapes}
    for name, shape in shapes.items():
        check_shape(f"weights[{name!r}]", w[name].shape, shape)
    d_out_ = None
    if d_out is not None:
        out_dim = sizes.q_heads * sizes.value_dim
        d_out_ = np.asarray(d_out, dtype=np.float64)
        check_shape(
            "d_out",
            d_out_.shape,
            (batch, seq_len, sizes.model_dim if semantics.output_projection else out_dim),
        )

    masks = _masks(np.asarray(block_indices), batch, seq_len, sizes, semantics)
    rows = NUMERICS[numerics], NUMERICS["fp64"]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        passes = {
            row: _Pass(row, sizes, semantics, w, masks, seq_len).run(x, d_out_) for row in {*rows}
        }
        of_kernel, of_oracle = (passes[row] for row in rows)
        scores = _scores(of_kernel, of_oracle, w["mem_k"], masks, sizes, semantics, numerics)
    out = _final(of_kernel.out, rows[0]) + _final(of_oracle.out, rows[1])
    if of_kernel.dx is None or of_oracle.dx is None:
        return LayerBounds(out, scores, None, None)
    dx = _final(of_kernel.dx, rows[0]) + _final(of_oracle.dx, rows[1])
    dweights = {name: of_kernel.dweights[name] + of_oracle.dweights[name] for name in w}
    return LayerBounds(out, scores, dx, dweights)


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
    map_sizes = sizes.compress_block_size, sizes.compress_block_sliding_stride
    windows = [
        num_compress_blocks(length, *map_sizes, semantics.compress_alignment) for length in lengths
    ]
    summed = {}
    for name in layer_weight_shapes(sizes, semantics):
        terms = windows if name.startswith("compress_") else lengths
        each = [
            _Layer(
                np.asarray(gradient[name], dtype=np.float64),
                np.asarray(bound[name], dtype=np.float64) * (sum(terms) / count),
            )
            for gradient, bound, count in zip(dweights, bounds, terms)
            if count  # without a term the gradient is 0, and so is its bound
        ]
        if not each:
            summed[name] = np.zeros(layer_weight_shapes(sizes, semantics)[name])
            continue
        of_oracle = _total([_exactly(part.value) for part in each], NUMERICS["fp64"])
        summed[name] = _total(each, NUMERICS[numerics]).error + of_oracle.error
    return summed


def _projection(letter: str, branch: str, semantics: Semantics) -> str:
    return f"to_{letter}_{branch}.weight" if semantics.kv_per_branch else f"to_{letter}.weight"


def _masks(
    block_indices: NDArray[np.int64],
    batch: int,
    seq_len: int,
    sizes: Sizes,
    semantics: Semantics,
) -> PerBranch[Array]:
    """Multiplicities of each branch: (seq_len, columns), with (batch, q_heads) before for fine."""
    fine = fine_mask(
        seq_len, seq_len, sizes.selection_block_size, block_indices, sizes.q_heads, semantics
    )
    check_shape("block_indices", block_indices.shape, (batch, "heads", seq_len, "n"))
    compress = compress_mask(
        seq_len,
        seq_len,
        sizes.compress_block_size,
        sizes.compress_block_sliding_stride,
        sizes.num_mem_kv,
        semantics,
    )
    sliding = sliding_mask(seq_len, seq_len, sizes.sliding_window_size, semantics)
    return PerBranch(*(each.astype(np.float64) for each in (compress, fine, sliding)))


def _scores(
    of_kernel: _Result,
    of_oracle: _Result,
    mem_k: Array,
    masks: PerBranch[Array],
    sizes: Sizes,
    semantics: Semantics,
    numerics: str,
) -> Array | None:
    """Bounds of the selection's scores, from the q and k_cmp that either side has."""
    q, k_cmp = of_kernel.q, of_kernel.k_cmp
    stride, block = sizes.compress_block_sliding_stride, sizes.selection_block_size
    batch, _, seq_len, _ = q.value.shape
    q_error = _known(q.error + of_oracle.q.error)
    k_cmp_error = _known(k_cmp.error + of_oracle.k_cmp.error)
    if semantics.importance == "logit_mean":
        if block % stride:
            return None
        return logit_mean_bounds(
            q.value,
            k_cmp.value,
            visible=masks.compress[:, sizes.num_mem_kv :],
            strides_per_block=block // stride,
            numerics=numerics,
            share_selection=semantics.share_selection,
            k_cmp_error=k_cmp_error,
            q_error=q_error,
        )
    if block % stride or sizes.compress_block_size % stride:
        return None
    counts = shared_strides(
        seq_len, sizes.compress_block_size, stride, block, semantics.compress_alignment
    )
    return score_bounds(
        q.value,
        k_cmp.value,
        np.broadcast_to(mem_k, (batch, *mem_k.shape)),
        visible=masks.compress,
        counts=counts,
        numerics=numerics,
        share_selection=semantics.share_selection,
        k_cmp_error=k_cmp_error,
        q_error=q_error,
    )


def _known(error: Array) -> Array:
    """An error without NaN: 0 * inf is as unknown as inf."""
    return np.where(np.isnan(error), np.inf, error)


# --- operations -----------------------------------------------------------------------------------


def _times(a: _Layer, b: _Layer, row: Numerics) -> _Layer:
    error = np.abs(a.value) * b.error + a.error * b.size
    return _stored(a.value * b.value, error + row.u_elementwise * (a.size * b.size), row)


def _scaled(a: _Layer, factor: float, row: Numerics) -> _Layer:
    """a times a number that may be rounded before it is multiplied with."""
    error = a.error + 2.0 * row.u_elementwise * a.size
    return _stored(a.value * factor, abs(factor) * error, row)


def _total(parts: Sequence[_Layer], row: Numerics) -> _Layer:
    """The sum of some tensors, in any order; every partial sum may be stored."""
    value = np.sum([part.value for part in parts], axis=0)
    error = np.sum([part.error for part in parts], axis=0)
    size = np.sum([part.size for part in parts], axis=0)
    times = len(parts) - 1
    u = math.expm1(times * math.log1p(row.u_store + row.u_accumulate))
    return _Layer(value, _overflow(value, error + u * size + times * row.eta, row))


def _inner(a: _Layer, b: _Layer, row: Numerics) -> _Layer:
    """sum of a b over the last axis; the products may be stored."""
    product = _times(a, b, row)
    n = product.value.shape[-1]
    size = np.sum(a.size * b.size, axis=-1)
    error = np.sum(product.error, axis=-1) + n * row.eta_accumulate
    error += (row.accumulate(n) + row.u_operands) * (size + np.sum(product.error, axis=-1))
    return _stored(np.sum(product.value, axis=-1), error, row)


def _worse(a: _Layer, b: _Layer) -> _Layer:
    """Two ways to the same value; a right implementation goes either."""
    return _Layer(a.value, np.maximum(a.error, b.error))


def _projected(given: _Input, weight: Array, bias: Array | None, row: Numerics) -> _Layer:
    """h W^T + b. A common factor of h is one of h W^T: it does not add up over |h| |W|."""
    product = _product(given.rest, weight.T, row)
    product = _Layer(product.value, product.error + given.common * product.size)
    if bias is None:
        return product
    value = product.value + bias
    error = product.error + row.u_accumulate * (np.abs(value) + product.error)
    return _stored(value, error, row)


def _common_input_gradient(parts: Sequence[tuple[_Layer, Array]], row: Numerics) -> _Layer:
    """sum of g W over projections of one input, as one matrix product or one by one."""
    width = sum(weight.shape[0] for _, weight in parts)
    products = []
    for g, weight in parts:
        product = _product(g, weight, row)
        more = row.accumulate(width) - row.accumulate(weight.shape[0])
        products.append(_Layer(product.value, product.error + more * (g.size @ np.abs(weight))))
    return _total(products, row)


# --- RMSNorm --------------------------------------------------------------------------------------


class _Norm(NamedTuple):
    r: _Layer  # (batch, seq_len, 1): 1 / root mean square
    normal: _Layer  # x r
    out: _Layer  # x r weight
    given_r: _Layer  # x r weight, from the r that the layer has


class _Input(NamedTuple):
    """h, and the part of its error that is one factor (1 + common) of a whole row."""

    h: _Layer
    rest: _Layer  # h without that factor
    common: Array  # (batch, seq_len, 1)


def _norm(x: Array, weight: Array, row: Numerics) -> _Norm:
    """h = x / sqrt(mean x^2 + eps) * weight."""
    n, given = x.shape[-1], _exactly(x)
    mean = _scaled(_inner(given, given, row), 1.0 / n, row).map(lambda part: part[..., None])
    value = mean.value + EPS
    total = _stored(value, mean.error + row.u_elementwise * (value + mean.error), row)
    t = np.minimum(total.error / value, 1.0)
    root = value**-0.5
    error = root * ((1.0 - t) ** -0.5 - 1.0)  # inf where the mean may be 0 or less
    error += (C_DIV + 2) * row.u_elementwise * (root + error)
    r = _stored(root, error, row, times=2)  # the root, and its inverse
    normal, given_r = _times(given, r, row), _times(given, _exactly(root), row)
    factor = _exactly(weight)
    return _Norm(r, normal, _times(normal, factor, row), _times(given_r, factor, row))


def _norm_gradient(
    dh: _Layer, norm: _Norm, x: Array, weight: Array, row: Numerics
) -> tuple[_Layer, Array]:
    """dx and the bound of dweight: dx = r dn - r n mean(dn n), with n = x r, dn = dh weight."""
    size, given = x.shape[-1], _exactly(x)
    dweight = _sum_gradient(_times(dh, norm.normal, row), (0, 1), row)
    dn = _times(dh, _exactly(weight), row)
    first = _times(dn, norm.r, row)

    def column(y: _Layer) -> _Layer:
        return y.map(lambda part: part[..., None])

    by_normal = column(_scaled(_inner(dn, norm.normal, row), 1.0 / size, row))
    by_normal = _times(_times(norm.normal, by_normal, row), norm.r, row)
    cube = _times(_times(norm.r, norm.r, row), norm.r, row)
    by_cube = _times(column(_inner(dn, given, row)), cube, row)
    by_cube = _times(_scaled(by_cube, 1.0 / size, row), given, row)
    second = _worse(by_normal, by_cube)
    return _total([first, _Layer(-second.value, second.error)], row), dweight


# --- rotary ---------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    """cosine and sine of every position and pair: (positions, head_dim / 2)."""

    cosine: _Layer
    sine: _Layer

    def back(self) -> _Turn:
        return _Turn(self.cosine, _Layer(-self.sine.value, self.sine.error))


def _turn(positions: Array, head_dim: int, row: Numerics) -> _Turn:
    exponent = math.log(ROTARY_BASE) * np.arange(0, head_dim, 2) / head_dim
    angle = positions[:, None] * np.exp(-exponent)
    u_e = row.u_elementwise
    error = angle * (3.0 * exponent + (C_EXP + 1) * (exponent > 0)) * u_e + C_TRIG * u_e
    return _Turn(*(_stored(of(angle), np.minimum(error, 2.0), row) for of in (np.cos, np.sin)))


def _rotated(y: _Layer, turn: _Turn | None, row: Numerics) -> _Layer:
    """(a, b) -> (a cos - b sin, a sin + b cos) for the pairs of the last axis."""
    if turn is None:
        return y
    a, b = y.map(lambda part: part[..., 0::2]), y.map(lambda part: part[..., 1::2])
    minus = turn.back().sine
    first = _total([_times(a, turn.cosine, row), _times(b, minus, row)], row)
    second = _total([_times(a, turn.sine, row), _times(b, turn.cosine, row)], row)
    pairs = zip(first, second)
    return _Layer(*(np.stack(pair, axis=-1).reshape(y.value.shape) for pair in pairs))


def _joined(
    plain: Sequence[_Layer], turned: Sequence[_Layer], turn: _Turn | None, row: Numerics
) -> _Layer:
    """The gradient of a tensor that is read as it is and rotated, perhaps by several readers."""
    if turn is None or not turned:
        return _total([*plain, *turned], row)
    back = turn.back()
    each = _total([*plain, *(_rotated(part, back, row) for part in turned)], row)
    if len(turned) == 1:
        return each
    return _worse(each, _total([*plain, _rotated(_total(turned, row), back, row)], row))


# --- gates ----------------------------------------------------------------------------------------


def _sigmoid(z: _Layer, row: Numerics) -> _Layer:
    u_e = row.u_elementwise
    small = np.exp(-np.abs(z.value))
    g = np.where(z.value >= 0, 1.0, small) / (1.0 + small)
    rest = np.where(z.value >= 0, small, 1.0) / (1.0 + small)  # 1 - g
    nearest = np.exp(-np.maximum(np.abs(z.value) - z.error, 0.0))  # where the slope is largest
    slope = nearest / (1.0 + nearest) ** 2
    error = np.minimum(slope * z.error, 1.0)  # g lies in [0, 1]
    error += g * rest * C_SCALE * u_e * z.size + (C_EXP + C_DIV + 1) * u_e * (g + error)
    return _stored(g, error, row)


def _sigmoid_gradient(dg: _Layer, g: _Layer, row: Numerics) -> _Layer:
    """dz = dg g (1 - g)."""
    rest = 1.0 - g.value
    other = _stored(rest, g.error + row.u_elementwise * (np.abs(rest) + g.error), row)
    return _times(_times(dg, g, row), other, row)


# --- attention ------------------------------------------------------------------------------------


class _Attended(NamedTuple):
    out: _Layer
    dq: _Layer
    dk: _Layer
    dv: _Layer


def _attention(
    q: _Layer,
    k: _Layer,
    v: _Layer,
    mask: Array,
    empty_row: str,
    row: Numerics,
    d_out: _Layer | None = None,
) -> _Attended:
    """One branch; the gradients are 0 without d_out."""
    batch, q_heads, q_len, head_dim = q.value.shape
    kv_heads, columns, value_dim = v.value.shape[1:]
    group = q_heads // kv_heads
    mask = np.broadcast_to(mask, (batch, q_heads, q_len, columns))
    empty = ~np.any(mask > 0, axis=-1)
    uniform = empty & (empty_row == "uniform") & (columns > 0)
    # the mean of all columns is what q = 0 sees without a mask; no gradient reaches q or k
    mask = np.where(uniform[..., None], 1.0, mask)
    q = q.map(lambda part: np.where(uniform[..., None], 0.0, part))
    if row.u_scores:  # every operation is stored: q may be scaled, and stored, on its own
        q = _stored(*q, row)
    out, dq, dk, dv = (
        _exactly(np.zeros(shape))
        for shape in (
            (batch, q_heads, q_len, value_dim),
            q.value.shape,
            k.value.shape,
            v.value.shape,
        )
    )
    for b in range(batch):
        for g in range(kv_heads):
            heads = slice(g * group, (g + 1) * group)
            exact = _Exact.of(
                q.value[b, heads],
                k.value[b, g],
                v.value[b, g],
                mask[b, heads],
                None if d_out is None else d_out.value[b, heads],
                np.zeros((group, q_len)),
                head_dim**-0.5,
                q_error=q.error[b, heads],
                k_error=k.error[b, g],
                v_error=v.error[b, g],
                d_out_error=None if d_out is None else d_out.error[b, heads],
            )
            bounds = _group_bounds(exact, row, "deterministic")
            of_rows = (group, q_len, -1) if q_len else (group, 0, value_dim)
            out.value[b, heads] = exact.out.reshape(of_rows)
            out.error[b, heads] = bounds[0].reshape(of_rows)
            if d_out is not None:
                shape = (group, q_len, head_dim)
                dq.value[b, heads] = exact.dq.reshape(shape)
                dq.error[b, heads] = bounds[2].reshape(shape)
                dk.value[b, g], dv.value[b, g] = exact.dk, exact.dv
                dk.error[b, g], dv.error[b, g] = bounds[3], bounds[4]
    if empty_row == "nan":
        out.error[empty] = np.inf
    if row.u_scores:
        dq = _stored(*dq, row)
    dq.value[uniform], dq.error[uniform] = 0.0, 0.0
    return _Attended(out, dq, dk, dv)


# --- the layer ------------------------------------------------------------------------------------


class _Result(NamedTuple):
    out: _Layer
    q: _Layer  # of the compress branch and the selection
    k_cmp: _Layer
    dx: _Layer | None
    dweights: dict[str, Array]


class _Pass(NamedTuple):
    """The layer in one row of numerics."""

    row: Numerics
    sizes: Sizes
    semantics: Semantics
    weights: dict[str, Array]
    masks: PerBranch[Array]
    seq_len: int

    def run(self, x: Array, d_out: Array | None) -> _Result:
        row, sizes, w = self.row, self.sizes, self.weights
        norm = _norm(x, w["norm.weight"], row) if self.semantics.input_norm else None
        h = _exactly(x) if norm is None else norm.out
        given = _Input(h, h, np.zeros((*x.shape[:2], 1)))
        if norm is not None:
            given = _Input(h, norm.given_r, norm.r.error / norm.r.value)
        turn, block_turn = self._turns()
        turned = self.semantics.rotary != "none"
        everywhere = self.semantics.rotary in ("all", "before_pooling")
        pools_turned = self.semantics.rotary == "before_pooling"

        q_plain = self._project(given, "to_q.weight", sizes.q_heads)
        q_turned = _rotated(q_plain, turn, row)
        k, v = (
            {
                branch: self._project(
                    given, _projection(letter, branch, self.semantics), sizes.kv_heads
                )
                for branch in BRANCHES
            }
            for letter in "kv"
        )
        to_pool = {"k": k["compress"], "v": v["compress"]}
        if pools_turned:
            to_pool["k"] = _rotated(k["compress"], turn, row)
        pooled = {letter: self._pooled(letter, tokens) for letter, tokens in to_pool.items()}
        q = {branch: q_turned for branch in BRANCHES}
        if not everywhere:
            q["compress"] = q_plain
        keys = {branch: _rotated(k[branch], turn, row) for branch in ("fine", "sliding")}
        k_cmp = _rotated(pooled["k"], block_turn, row)
        keys["compress"] = self._with_memory("mem_k", k_cmp)
        values = dict(v)
        values["compress"] = self._with_memory("mem_v", pooled["v"])

        outs = {
            branch: self._attend(branch, q[branch], keys[branch], values[branch])
            for branch in BRANCHES
        }
        logits = _projected(given, w["gates.weight"], w["gates.bias"], row)
        gates = _sigmoid(logits, row).map(self._split_gates)  # (3, batch, q_heads, seq_len)
        gate = {
            branch: _Layer(gates.value[i, ..., None], gates.error[i, ..., None])
            for i, branch in enumerate(BRANCHES)
        }
        combined = self._combined([(gate[branch], outs[branch].out) for branch in BRANCHES])
        merged = combined.map(_merge_heads)
        out = _affine(merged, w["to_out.weight"], None, row) if self._projects_out else merged
        if d_out is None:
            return _Result(out, q["compress"], k_cmp, None, {})

        # backward
        dw: dict[str, Array] = {}
        g = _exactly(d_out)
        if self._projects_out:
            dw["to_out.weight"] = _weight_gradient(g, merged, row)
            g = _product(g, w["to_out.weight"], row)
        g = g.map(lambda part: _split_heads(part, sizes.q_heads))
        back = {
            branch: self._attend(
                branch, q[branch], keys[branch], values[branch], _times(gate[branch], g, row)
            )
            for branch in BRANCHES
        }
        d_gates = [_inner(g, outs[branch].out, row) for branch in BRANCHES]
        dg = _Layer(*(np.stack(parts) for parts in zip(*d_gates)))
        dz = _sigmoid_gradient(dg, gates, row).map(self._merge_gates)
        dw["gates.bias"] = _sum_gradient(dz, (0, 1), row)

        memory = sizes.num_mem_kv
        for letter, of in (("k", back["compress"].dk), ("v", back["compress"].dv)):
            of_memory = of.map(lambda part: part[:, :, :memory])
            dw[f"mem_{letter}"] = _sum_gradient(of_memory, (0,), row)
        d_blocks = {
            "k": _rotated(
                back["compress"].dk.map(lambda part: part[:, :, memory:]),
                None if block_turn is None else block_turn.back(),
                row,
            ),
            "v": back["compress"].dv.map(lambda part: part[:, :, memory:]),
        }
        d_tokens: dict[str, _Layer] = {}
        for letter, tokens in to_pool.items():
            d_tokens[letter], of_pool = self._pool_gradient(letter, tokens, d_blocks[letter])
            dw |= of_pool

        into: list[tuple[str, _Layer]] = []
        plain = [] if everywhere or not turned else [back["compress"].dq]
        rotated = [back[branch].dq for branch in BRANCHES if everywhere or branch != "compress"]
        if not turned:
            plain, rotated = [back[branch].dq for branch in BRANCHES], []
        into.append(("to_q.weight", _joined(plain, rotated, turn, row)))
        dk, dv = ([back[branch] for branch in ("fine", "sliding")] for _ in range(2))
        pooled_k = ([], [d_tokens["k"]]) if pools_turned else ([d_tokens["k"]], [])
        if self.semantics.kv_per_branch:
            into.append(("to_k_compress.weight", _joined(*pooled_k, turn, row)))
            into.append(("to_v_compress.weight", d_tokens["v"]))
            for branch in ("fine", "sliding"):
                of_k = _joined([], [back[branch].dk], turn, row)
                into.append((f"to_k_{branch}.weight", of_k))
                into.append((f"to_v_{branch}.weight", back[branch].dv))
        else:
            plain, rotated = pooled_k
            of_k = _joined(plain, [*rotated, *(each.dk for each in dk)], turn, row)
            of_v = _total([d_tokens["v"], *(each.dv for each in dv)], row)
            into += [("to_k.weight", of_k), ("to_v.weight", of_v)]
        flat = [(name, each.map(_merge_heads)) for name, each in into] + [("gates.weight", dz)]
        for name, each in flat:
            dw[name] = _weight_gradient(each, h, row)
        dh = _common_input_gradient([(each, w[name]) for name, each in flat], row)
        if norm is None:
            dx = dh
        else:
            dx, dw["norm.weight"] = _norm_gradient(dh, norm, x, w["norm.weight"], row)
        return _Result(out, q["compress"], k_cmp, dx, dw)

    @property
    def _projects_out(self) -> bool:
        return self.semantics.output_projection

    def _turns(self) -> tuple[_Turn | None, _Turn | None]:
        """Of the tokens, and of the compressed blocks."""
        if self.semantics.rotary == "none":
            return None, None
        head_dim, row = self.sizes.head_dim, self.row
        tokens = _turn(np.arange(self.seq_len, dtype=np.float64), head_dim, row)
        if self.semantics.rotary != "all":
            return tokens, None
        first = np.arange(len(self._windows())) * self.sizes.compress_block_sliding_stride
        return tokens, _turn(first.astype(np.float64), head_dim, row)

    def _windows(self) -> list[tuple[int, int]]:
        return compress_windows(
            self.seq_len,
            self.sizes.compress_block_size,
            self.sizes.compress_block_sliding_stride,
            self.semantics.compress_alignment,
        )

    def _project(self, given: _Input, name: str, heads: int) -> _Layer:
        flat = _projected(given, self.weights[name], None, self.row)
        return flat.map(lambda part: _split_heads(part, heads))

    def _pool_weights(self, letter: str) -> dict[str, Array]:
        prefix = f"compress_{letter}."
        return {
            name.removeprefix(prefix): weight
            for name, weight in self.weights.items()
            if name.startswith(prefix)
        }

    def _tokens(self) -> NDArray[np.int64]:
        first = np.array([start for start, _ in self._windows()], dtype=np.int64)
        return first[:, None] + np.arange(self.sizes.compress_block_size)[None, :]

    def _pooled(self, letter: str, y: _Layer) -> _Layer:
        weights = self._pool_weights(letter)
        return _pool(y, weights, None, self._tokens(), self.sizes.compress_map, self.row).out

    def _pool_gradient(self, letter: str, y: _Layer, g: _Layer) -> tuple[_Layer, dict[str, Array]]:
        weights = self._pool_weights(letter)
        found = _pool(y, weights, g, self._tokens(), self.sizes.compress_map, self.row)
        assert found.dx is not None
        return found.dx, {f"compress_{letter}.{name}": d for name, d in found.dweights.items()}

    def _with_memory(self, name: str, blocks: _Layer) -> _Layer:
        memory = self.weights[name]
        every = np.broadcast_to(memory, (blocks.value.shape[0], *memory.shape))
        parts = zip(_exactly(every), blocks)
        return _Layer(*(np.concatenate(pair, axis=2) for pair in parts))

    def _attend(
        self, branch: str, q: _Layer, k: _Layer, v: _Layer, d_out: _Layer | None = None
    ) -> _Attended:
        mask = getattr(self.masks, branch)
        empty_row = getattr(self.semantics.empty_row, branch)
        return _attention(q, k, v, mask, empty_row, self.row, d_out)

    def _combined(self, parts: Sequence[tuple[_Layer, _Layer]]) -> _Layer:
        """sum_c g_c out_c; a matrix product, or products and sums of their own."""
        row = self.row
        total = _total([_times(gate, out, row) for gate, out in parts], row)
        size = sum(gate.size * out.size for gate, out in parts)
        more = (row.accumulate(len(parts)) + row.u_operands) * size
        return _stored(total.value, total.error + more, row)

    def _split_gates(self, part: Array) -> Array:
        """(batch, seq_len, 3 * q_heads) -> (3, batch, q_heads, seq_len)."""
        split = part.reshape(*part.shape[:2], len(BRANCHES), self.sizes.q_heads)
        return split.transpose(2, 0, 3, 1)

    def _merge_gates(self, part: Array) -> Array:
        """The inverse of `_split_gates`."""
        merged = part.transpose(1, 3, 0, 2)
        return merged.reshape(*merged.shape[:2], len(BRANCHES) * self.sizes.q_heads)


def _split_heads(part: Array, heads: int) -> Array:
    """(batch, seq_len, heads * dim) -> (batch, heads, seq_len, dim)."""
    batch, seq_len, width = part.shape
    return part.reshape(batch, seq_len, heads, width // heads).transpose(0, 2, 1, 3)


def _merge_heads(part: Array) -> Array:
    """(batch, heads, seq_len, dim) -> (batch, seq_len, heads * dim)."""
    batch, heads, seq_len, dim = part.shape
    return part.transpose(0, 2, 1, 3).reshape(batch, seq_len, heads * dim)
