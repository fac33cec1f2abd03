"""A value and how far a right implementation may be from it, and the operations on such pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nsa_ref.numerics import Array, Numerics


class _Layer(NamedTuple):
    """An intermediate result and how far a right kernel may be from it."""

    value: Array
    error: Array

    @property
    def size(self) -> Array:
        return np.abs(self.value) + self.error

    def map(self, change: Callable[[Array], Array]) -> _Layer:
        """The same reshaping, transposition or choice of both."""
        return _Layer(change(self.value), change(self.error))


def _exactly(value: Array) -> _Layer:
    return _Layer(value, np.zeros_like(value))


def _stored(value: Array, error: Array, row: Numerics, times: int = 1) -> _Layer:
    """An intermediate or final result, stored `times` times on its way."""
    u = math.expm1(times * math.log1p(row.u_store))
    error = error + u * (np.abs(value) + error) + times * row.eta
    return _Layer(value, _overflow(value, error, row))


def _product(y: _Layer, matrix: Array, row: Numerics) -> _Layer:
    """y @ matrix, rounded and stored; matrix is exact."""
    n, size = matrix.shape[0], np.abs(y.value) + y.error
    error = y.error @ np.abs(matrix)  # what came in
    error += (row.accumulate(n) + row.u_operands) * (size @ np.abs(matrix))  # the sum itself
    error += n * row.eta_accumulate
    return _stored(y.value @ matrix, error, row)


def _affine(y: _Layer, weight: Array, bias: Array | None, row: Numerics) -> _Layer:
    """y W^T + b; the product may be stored before the bias is added."""
    product = _product(y, weight.T, row)
    if bias is None:
        return product
    value = product.value + bias
    error = product.error + row.u_accumulate * (np.abs(value) + product.error)
    return _stored(value, error, row)


def _weight_gradient(g: _Layer, y: _Layer, row: Numerics) -> Array:
    """Bound of sum over rows of g^T y, the gradient of a weight matrix; rows are flattened."""
    g = _Layer(*(part.reshape(-1, part.shape[-1]) for part in g))
    y = _Layer(*(part.reshape(-1, part.shape[-1]) for part in y))
    n = g.value.shape[0]
    g_size, y_size = np.abs(g.value) + g.error, np.abs(y.value) + y.error
    error = g.error.T @ y_size + np.abs(g.value).T @ y.error
    error += (row.accumulate(n) + row.u_operands) * (g_size.T @ y_size)
    error += n * row.eta_accumulate
    return _final(_stored(g.value.T @ y.value, error, row), row)


def _head_weight_gradient(g: _Layer, y: _Layer, row: Numerics) -> Array:
    """Bound of `_weight_gradient` where each batch entry's part may be stored before the sum.

    g : (batch, rows, out), y : (batch, rows, in)
    """
    g_t, size_t = np.swapaxes(g.value, 1, 2), np.swapaxes(g.size, 1, 2)
    batch, n = g.value.shape[:2]
    error = np.swapaxes(g.error, 1, 2) @ y.size + np.abs(g_t) @ y.error
    error += (row.accumulate(batch * n) + row.u_operands) * (size_t @ y.size)
    error += n * row.eta_accumulate
    parts = _stored(g_t @ y.value, error, row)
    value, stored = parts.value.sum(axis=0), parts.error.sum(axis=0)
    return _final(_stored(value, stored, row), row)


def _sum_gradient(g: _Layer, axes: tuple[int, ...], row: Numerics) -> Array:
    """Bound of a plain sum of g over `axes`: biases and positions."""
    n = math.prod(g.value.shape[axis] for axis in axes)
    size = (np.abs(g.value) + g.error).sum(axis=axes)
    error = g.error.sum(axis=axes) + row.accumulate(n) * size
    return _final(_stored(g.value.sum(axis=axes), error, row), row)


def _final(result: _Layer, row: Numerics) -> Array:
    return _overflow(result.value, result.error, row)


def _overflow(reference: Array, bound: Array, row: Numerics) -> Array:
    """inf where a right result may lie beyond the dtype's largest number, else the bound.

    A bound that is NaN came from 0 * inf, of something that overflowed before.
    """
    return np.where(np.abs(reference) + bound <= row.largest, bound, np.inf)
