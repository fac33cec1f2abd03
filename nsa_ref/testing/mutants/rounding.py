"""Arithmetic that rounds as a row of numerics says, and adds up every sum in a chosen order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nsa_ref.numerics import NUMERICS
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.implementation import OracleImplementation

#: Of every sum. "library" is NumPy's own; tensor cores may truncate, which is the last.
ORDERS = ("library", "sequential", "reversed", "pairwise", "blocked", "truncated")


@dataclass(frozen=True)
class Way:
    """The decisions on which right kernels differ.

    block : keys per block of the online softmax; 0 takes all at once
    order, backward_order : of every sum, one of ORDERS
    exponential : "exp", "exp2" (log2 e folded into the scale), "exp2_late" (s - m times log2 e)
    delta_from : "out", dO . O, or "p", sum P dP
    d_lse_joins : "delta" or "dp"
    scale_before : dS is scaled before it is rounded, instead of the product after
    reciprocal : multiply by 1 / total instead of dividing
    fused : else every operation is stored, and P is kept for the backward pass
    scale_first : without fusion, q is scaled before it meets k
    """

    block: int = 0
    order: str = "library"
    backward_order: str = "library"
    exponential: str = "exp"
    delta_from: str = "out"
    d_lse_joins: str = "delta"
    scale_before: bool = False
    reciprocal: bool = False
    fused: bool = True
    scale_first: bool = False


class Rounding:
    """What kernels of one row hold in registers and in memory.

    wide : dtype of registers and accumulators
    dtype : dtype in memory
    tf32 : factors of a matrix product are read in 11 bits
    by_head : each query head's dk and dv are stored before the group sum
    """

    def __init__(self, row: str, order: str = "library") -> None:
        numerics = NUMERICS[row]
        self.dtype = DTYPES[numerics.dtype]
        self.wide: Any = np.float64 if numerics.dtype == "float64" else np.float32
        self.by_head = numerics.stores_each_head
        self.order = order
        self.tf32 = numerics.u_operand > 0

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
        if self.tf32:
            a, b = _eleven_bits(a), _eleven_bits(b)
        return self.products(a, b)


class RoundedImplementation(OracleImplementation):
    """A second implementation of a part of the definition, which rounds as real ones do.

    The row of numerics follows from the case's dtype, or is `row`.
    """

    way = Way()

    def __init__(self, way: Way | None = None, row: str = "") -> None:
        self.way = way or self.way
        if row:
            self.numerics = {NUMERICS[row].dtype: row}

    def rounding(self, case: Case, *, backward: bool = False) -> Rounding:
        """The arithmetic of one direction."""
        order = self.way.backward_order if backward else self.way.order
        return Rounding(self.numerics[case.dtype], order)


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
