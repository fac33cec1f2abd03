"""A value and how far a right implementation may be from it, and the operations on such pairs.

A running error analysis. Every intermediate result is a pair: its float64 value x, and e, how far
the number x^ of a right implementation may be from it. Every operation makes the pair of its
result out of the pairs that it reads, each rounding at its worst: what the errors of the operands
become, and what the operation rounds itself, in one row of `nsa_ref.numerics`. The formulas below
state that error; ``|x^|`` in them is the largest that it may be, ``|x| + e``.

In 16-bit dtypes the result of every operation may be stored, which rounds it once more. A number
that may overflow makes all that reads it unknown: its error is inf.

Source: NUMERICS 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.checks import as_float64
from nsa_ref.layer import ROTARY_BASE
from nsa_ref.numerics import C_DIV, C_EXP, C_SCALE, C_TRIG, Array, Numerics


class Rounded(NamedTuple):
    """A value, and how far the number of a right implementation may be from it."""

    value: Array
    error: Array

    @property
    def size(self) -> Array:
        """The largest magnitude of such a number."""
        return np.abs(self.value) + self.error

    def at(self, *index: Any) -> Rounded:
        """The same part of both."""
        return Rounded(self.value[index], self.error[index])

    def map(self, change: Callable[[Array], Array]) -> Rounded:
        """The same reshaping, transposition or choice of both."""
        return Rounded(change(self.value), change(self.error))


def exact(value: Array) -> Rounded:
    """A number that every right implementation has. Source: NUMERICS 2."""
    return Rounded(value, np.zeros_like(value))


def as_rounded(name: str, x: ArrayLike | Rounded) -> Rounded:
    """A pair as it is, an array as an exact value; float64. Source: NUMERICS 2.

    Raises
    ------
    ValueError : an error of another shape than the value
    TypeError : arrays that hold no numbers
    """
    if not isinstance(x, Rounded):
        return exact(as_float64(name, x))
    value = as_float64(name, x.value)
    return Rounded(value, as_float64(f"the error of {name}", x.error, value.shape))


def concatenated(parts: Sequence[Rounded], axis: int) -> Rounded:
    """Several pairs as one; nothing is rounded. Source: NUMERICS 2."""
    return Rounded(*(np.concatenate(arrays, axis) for arrays in zip(*parts)))


def worse(x: Rounded, y: Rounded) -> Rounded:
    """Two ways to one value, of which an implementation goes either: the larger error.

    Source: NUMERICS 2
    """
    return Rounded(x.value, np.maximum(x.error, y.error))


def unless_overflow(x: Rounded, row: Numerics) -> Rounded:
    """inf where ``|x^|`` may lie beyond the dtype's largest number, else the error.

    An error that is NaN came from 0 * inf, of something that overflowed before: inf as well.

    Source: NUMERICS 2, "Overflow"
    """
    return Rounded(x.value, np.where(x.size <= row.largest, x.error, np.inf))


def stored(x: Rounded, row: Numerics, times: int = 1) -> Rounded:
    """x, stored so many times: ``e + ((1 + u_store)^times - 1) |x^| + times eta``.

    Source: NUMERICS 2, "Rounded values"
    """
    u = math.expm1(times * math.log1p(row.u_store))
    error = x.error + u * x.size + times * row.eta
    return unless_overflow(Rounded(x.value, error), row)


# --- products and sums ----------------------------------------------------------------------------


def times(x: Rounded, y: Rounded, row: Numerics) -> Rounded:
    """x y, element by element: ``|x| e_y + e_x |y^| + u_elementwise |x^| |y^|``, stored.

    Source: NUMERICS 2, "Rounded values"
    """
    error = np.abs(x.value) * y.error + x.error * y.size
    error = error + row.u_elementwise * (x.size * y.size)
    return stored(Rounded(x.value * y.value, error), row)


def scaled(x: Rounded, factor: float, row: Numerics) -> Rounded:
    """x times a number that may be rounded: ``|factor| (e + 2 u_elementwise |x^|)``, stored.

    Source: NUMERICS 2, "Rounded values"
    """
    error = x.error + 2.0 * row.u_elementwise * x.size
    return stored(Rounded(x.value * factor, abs(factor) * error), row)


def plus(x: Rounded, constant: Array | float, u: float, row: Numerics) -> Rounded:
    """x + constant, an addition of unit roundoff u: ``e + u (|x + constant| + e)``, stored.

    Source: NUMERICS 2, "Rounded values"
    """
    moved = Rounded(x.value + constant, x.error)
    return stored(Rounded(moved.value, x.error + u * moved.size), row)


def total(parts: Sequence[Rounded], row: Numerics) -> Rounded:
    """The sum of n tensors, in any order; every partial sum may be stored.

    ::

        sum e + ((1 + u_store + u_accumulate)^(n - 1) - 1) sum |x^| + (n - 1) eta

    Source: NUMERICS 2, "Rounded values"
    """
    value = np.sum([part.value for part in parts], axis=0)
    error = np.sum([part.error for part in parts], axis=0)
    size = np.sum([part.size for part in parts], axis=0)
    additions = len(parts) - 1
    u = math.expm1(additions * math.log1p(row.u_store + row.u_accumulate))
    return unless_overflow(Rounded(value, error + u * size + additions * row.eta), row)


def summed(x: Rounded, axes: tuple[int, ...], row: Numerics) -> Rounded:
    """The sum of n terms over `axes`, in one accumulator: ``sum e + acc(n) sum |x^|``, stored.

    Source: NUMERICS 2, acc(n)
    """
    n = math.prod(x.value.shape[axis] for axis in axes)
    error = x.error.sum(axis=axes) + row.accumulate(n) * x.size.sum(axis=axes)
    return stored(Rounded(x.value.sum(axis=axes), error), row)


def inner(x: Rounded, y: Rounded, row: Numerics) -> Rounded:
    """sum of x y over the last axis, n terms, stored; the products p may be stored before.

    ::

        sum e_p + n eta_accumulate + (acc(n) + u_operands) (sum |x^| |y^| + sum e_p)

    Source: NUMERICS 2, acc(n)
    """
    product = times(x, y, row)
    n = product.value.shape[-1]
    of_products = np.sum(product.error, axis=-1)
    size = np.sum(x.size * y.size, axis=-1) + of_products
    error = of_products + n * row.eta_accumulate + (row.accumulate(n) + row.u_operands) * size
    return stored(Rounded(np.sum(product.value, axis=-1), error), row)


def matmul(x: Rounded, y: Rounded, row: Numerics, terms: int | None = None) -> Rounded:
    """x @ y, sums of n products in a matrix unit, stored.

    ::

        |x| @ e_y + e_x @ |y^| + (acc(terms) + u_operands) |x^| @ |y^| + n eta_accumulate

    terms : of the whole sum that this is a part of, default n

    Source: NUMERICS 2, acc(n)
    """
    n = x.value.shape[-1]
    error = x.error @ y.size + np.abs(x.value) @ y.error
    error += (row.accumulate(n if terms is None else terms) + row.u_operands) * (x.size @ y.size)
    error += n * row.eta_accumulate
    return stored(Rounded(x.value @ y.value, error), row)


def affine(
    x: Rounded, weight: Array, bias: Array | None, row: Numerics, common: Array | None = None
) -> Rounded:
    """x W^T + b, of exact W and b; the product may be stored before b is added.

    weight, bias : (out, in) and (out,), or of every head, (heads, out, in) and (heads, out)
    common : a relative error that whole rows of x have beside e. It is one factor of a row, and
        one of the same row of x W^T: it does not add up over |x| |W|

    Source: NUMERICS 2, "Compression maps" and "The layer"
    """
    product = matmul(x, exact(np.swapaxes(weight, -1, -2)), row)
    if common is not None:
        product = Rounded(product.value, product.error + common * product.size)
    return product if bias is None else plus(product, bias[..., None, :], row.u_accumulate, row)


def weight_gradient(g: Rounded, x: Rounded, row: Numerics) -> Rounded:
    """g^T x over all axes but the last: the gradient of W in x W^T. Source: NUMERICS 2, acc(n)."""
    g, x = (pair.map(lambda part: part.reshape(-1, part.shape[-1])) for pair in (g, x))
    return matmul(g.map(np.transpose), x, row)


def weight_gradient_by_entry(g: Rounded, x: Rounded, row: Numerics) -> Rounded:
    """`weight_gradient` where each batch entry's part may be stored before the sum.

    g : (batch, heads, rows, out)      x : (batch, heads, rows, in)      returns : (heads, out, in)

    Source: NUMERICS 2, "Compression maps"
    """
    batch, _, n, _ = g.value.shape
    parts = matmul(g.map(lambda part: np.swapaxes(part, 2, 3)), x, row, terms=batch * n)
    return stored(parts.map(lambda part: part.sum(axis=0)), row)


def input_gradient(parts: Sequence[tuple[Rounded, Array]], row: Numerics) -> Rounded:
    """sum of g W over several projections of one input, as one matrix product or one by one.

    Each has besides its own error (acc(all terms) - acc(its own)) |g^| @ |W|.

    Source: NUMERICS 2, "The layer"
    """
    width = sum(weight.shape[0] for _, weight in parts)
    products = []
    for g, weight in parts:
        product = matmul(g, exact(weight), row)
        more = row.accumulate(width) - row.accumulate(weight.shape[0])
        products.append(Rounded(product.value, product.error + more * (g.size @ np.abs(weight))))
    return total(products, row)


# --- RMSNorm --------------------------------------------------------------------------------------


class Normed(NamedTuple):
    """x / sqrt(mean x^2 + eps) * weight, and what its gradient reads of it."""

    r: Rounded  # (batch, seq_len, 1): 1 / root mean square
    normal: Rounded  # x r
    out: Rounded  # x r weight
    out_of_r: Rounded  # x r weight, where the implementation's own r counts as exact


def normed(x: Array, weight: Array, eps: float, row: Numerics) -> Normed:
    """RMSNorm of exact x, (batch, seq_len, dim).

    ::

        t     relative error of mean x^2 + eps
        r     ((1 - t)^(-1/2) - 1) r + (C_DIV + 2) u_elementwise |r^|, stored twice: root, inverse

    r is one factor of a whole row, and stays one through a projection.

    Source: G1; NUMERICS 2, "The layer"
    """
    given, factor = exact(x), exact(weight)
    mean = scaled(inner(given, given, row), 1.0 / x.shape[-1], row).at(..., None)
    square = plus(mean, eps, row.u_elementwise, row)
    t = np.minimum(square.error / square.value, 1.0)
    root = square.value**-0.5
    error = root * ((1.0 - t) ** -0.5 - 1.0)  # inf where the mean may be 0 or less
    error += (C_DIV + 2) * row.u_elementwise * (root + error)
    r = stored(Rounded(root, error), row, times=2)  # the root, and its inverse
    normal, of_r = times(given, r, row), times(given, exact(root), row)
    return Normed(r, normal, times(normal, factor, row), times(of_r, factor, row))


def normed_gradient(
    g: Rounded, norm: Normed, x: Array, weight: Array, row: Numerics
) -> tuple[Rounded, Rounded]:
    """dx and dweight of RMSNorm, of the gradient g of its result.

    ::

        dweight = sum g x r      dx = r dn - r n mean(dn n), with n = x r and dn = g weight

    The second term of dx is made from n, or from x and r^3: the larger error counts.

    Source: G1; NUMERICS 2, "The layer"
    """
    dim, given = x.shape[-1], exact(x)
    dweight = summed(times(g, norm.normal, row), (0, 1), row)
    dn = times(g, exact(weight), row)
    first = times(dn, norm.r, row)
    by_normal = scaled(inner(dn, norm.normal, row), 1.0 / dim, row).at(..., None)
    by_normal = times(times(norm.normal, by_normal, row), norm.r, row)
    cube = times(times(norm.r, norm.r, row), norm.r, row)
    by_cube = times(inner(dn, given, row).at(..., None), cube, row)
    by_cube = times(scaled(by_cube, 1.0 / dim, row), given, row)
    second = worse(by_normal, by_cube)
    return total([first, Rounded(-second.value, second.error)], row), dweight


# --- rotary ---------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """cosine and sine of every position and pair of features: (positions, head_dim / 2)."""

    cosine: Rounded
    sine: Rounded


def turn(positions: np.ndarray, head_dim: int, row: Numerics) -> Turn:
    """The angles of rotary embedding, float32 at least whatever the dtype.

    ::

        E         log(base) 2 i / head_dim: the frequency is exp(-E), made from E in float32
        angle     angle (3 E + C_EXP + 1) u_elementwise; the first pair's frequency is 1, exactly
        result    that, and C_TRIG u_elementwise; cosine and sine may be stored

    Source: G2; NUMERICS 2, "The layer"
    """
    exponent = math.log(ROTARY_BASE) * np.arange(0, head_dim, 2) / head_dim
    angle = positions[:, None] * np.exp(-exponent)
    u_e = row.u_elementwise
    error = angle * (3.0 * exponent + (C_EXP + 1) * (exponent > 0)) * u_e + C_TRIG * u_e
    error = np.minimum(error, 2.0)
    return Turn(*(stored(Rounded(of(angle), error), row) for of in (np.cos, np.sin)))


def rotated(x: Rounded, by: Turn | None, row: Numerics, *, back: bool = False) -> Rounded:
    """(a, b) -> (a cos - b sin, a sin + b cos) for the pairs of the last axis; None turns nothing.

    back : the turn that undoes it, and that gradients take

    Source: G2; two products and their sum, each perhaps stored
    """
    if by is None:
        return x
    a, b, cosine = x.at(..., slice(0, None, 2)), x.at(..., slice(1, None, 2)), by.cosine
    sine, minus = by.sine, Rounded(-by.sine.value, by.sine.error)
    if back:
        sine, minus = minus, sine
    first = total([times(a, cosine, row), times(b, minus, row)], row)
    second = total([times(a, sine, row), times(b, cosine, row)], row)
    pairs = zip(first, second)
    return Rounded(*(np.stack(pair, axis=-1).reshape(x.value.shape) for pair in pairs))


def turned_gradient(
    plain: Sequence[Rounded], turned: Sequence[Rounded], by: Turn | None, row: Numerics
) -> Rounded:
    """The gradient of a tensor that some read as it is, and some turned.

    The gradients of its turned readers may be added up before or after they are turned back: the
    larger error counts.

    Source: G2; NUMERICS 2, "The layer"
    """
    if by is None or not turned:
        return total([*plain, *turned], row)
    each = total([*plain, *(rotated(part, by, row, back=True) for part in turned)], row)
    if len(turned) == 1:
        return each
    at_once = rotated(total(turned, row), by, row, back=True)
    return worse(each, total([*plain, at_once], row))


# --- gates ----------------------------------------------------------------------------------------


def sigmoid(z: Rounded, row: Numerics) -> Rounded:
    """g = 1 / (1 + exp(-z)), stored.

    ::

        min(slope e, 1) + g (1 - g) C_SCALE u_elementwise |z^| + (C_EXP + C_DIV + 1) u_elementwise g

    slope : the largest of sigmoid' over z - e .. z + e

    Source: G1; NUMERICS 2, "Gates and combine"
    """
    u_e = row.u_elementwise
    small = np.exp(-np.abs(z.value))
    g = np.where(z.value >= 0, 1.0, small) / (1.0 + small)
    rest = np.where(z.value >= 0, small, 1.0) / (1.0 + small)  # 1 - g
    nearest = np.exp(-np.maximum(np.abs(z.value) - z.error, 0.0))  # where the slope is largest
    slope = nearest / (1.0 + nearest) ** 2
    error = np.minimum(slope * z.error, 1.0)  # g lies in [0, 1]
    error += g * rest * C_SCALE * u_e * z.size + (C_EXP + C_DIV + 1) * u_e * (g + error)
    return stored(Rounded(g, error), row)


def sigmoid_gradient(dg: Rounded, g: Rounded, row: Numerics) -> Rounded:
    """dz = dg g (1 - g), of g = sigmoid(z).

    Source: G1; two products and a difference, each perhaps stored
    """
    other = plus(Rounded(-g.value, g.error), 1.0, row.u_elementwise, row)
    return times(times(dg, g, row), other, row)
