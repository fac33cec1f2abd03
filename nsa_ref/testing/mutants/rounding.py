"""Arithmetic that rounds as a row of numerics says, and adds up every sum in a chosen order."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsa_ref.numerics import NUMERICS
from nsa_ref.testing.case import DTYPES

#: Of every sum. "library" is NumPy's own; tensor cores may truncate, which is the last.
ORDERS = ("library", "sequential", "reversed", "pairwise", "blocked", "truncated")


class Rounding:
    """What kernels of one row hold in registers and in memory.

    wide : dtype of registers and accumulators
    dtype : dtype in memory
    by_head : each query head's dk and dv are stored before the group sum
    """

    def __init__(self, row: str, order: str = "library") -> None:
        numerics = NUMERICS[row]
        self.dtype = DTYPES[numerics.dtype]
        self.wide: Any = np.float64 if numerics.dtype == "float64" else np.float32
        self.by_head = numerics.stores_each_head
        self.order = order
        self._tf32 = numerics.u_operand > 0

    def store(self, x: np.ndarray) -> np.ndarray:
        """x after it has been in memory."""
        return x.astype(self.dtype).astype(self.wide)

    def total(self, terms: np.ndarray) -> np.ndarray:
        """The sum over the last axis."""
        return add_up(terms, self.order)

    def products(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Inner products of the rows of a with the rows of b: (..., rows of a, rows of b)."""
        if self.order == "library":
            return a @ b.swapaxes(-1, -2)
        return self.total(a[..., :, None, :] * b[..., None, :, :])

    def dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The same with factors as a matrix unit reads them."""
        if self._tf32:
            a, b = _eleven_bits(a), _eleven_bits(b)
        return self.products(a, b)


def add_up(terms: np.ndarray, order: str) -> np.ndarray:
    """Sum over the last axis, in the terms' own dtype, in one of ORDERS."""
    n = terms.shape[-1]
    if order == "library" or n == 0:
        return terms.sum(-1)
    if order == "reversed":
        return add_up(terms[..., ::-1], "sequential")
    if order == "blocked" and n > 4:
        fours = np.zeros((*terms.shape[:-1], -(-n // 4), 4), terms.dtype)
        fours.reshape(*terms.shape[:-1], -(-n // 4) * 4)[..., :n] = terms
        return add_up(add_up(fours, "sequential"), "sequential")
    if order == "pairwise" and n > 1:
        return add_up(terms[..., : n // 2], order) + add_up(terms[..., n // 2 :], order)
    total = terms[..., 0]
    for i in range(1, n):
        if order == "truncated":
            total = _towards_zero(total.astype(np.float64) + terms[..., i], terms.dtype)
        else:
            total = total + terms[..., i]
    return total


def _towards_zero(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    near = x.astype(dtype)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, dtype.type(0)), near)


def _eleven_bits(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 11 significant bits, ties to even, as tf32 is."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)
