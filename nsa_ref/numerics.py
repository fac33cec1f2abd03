"""What each class of kernels rounds, and how coarsely: the rows that an implementation declares.

Source: NUMERICS 2
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

C_EXP = 4  # ex2.approx and expf: units of u_elementwise in the result
C_SCALE = 4  # scale, log2 e, their product and their own rounding: units of u_elementwise |s|
C_DIV = 4  # the division by the row total, or a reciprocal and a product


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What one class of kernels rounds, and how coarsely. All u_* are relative, eta_* absolute.

    dtype : the dtype that inputs and results are stored in (NumPy's or ml_dtypes' name)
    largest : its largest finite number; a result beyond it may overflow, and its bound is inf
    u_accumulate : one addition inside a matrix product or a row sum
    accumulate_truncates : its rounding may have a direction, so it never averages out
    u_operand : each factor of a matrix product as the hardware reads it (tf32)
    u_p : probabilities, before they meet v or dO
    u_store : every stored result
    u_ds : dS, before it meets k or q
    u_delta : delta = dO . O (minus d_lse), if it is stored in the dtype
    eta : absolute error of storing a number that underflows the dtype
    eta_accumulate : the same for a product inside the accumulator
    u_elementwise : one scalar operation
    u_lse : absolute error of log and of adding the maximum back
    u_scores, u_dp : logits and dP, where every operation is rounded
    per_head_rounding : dk and dv of each query head are stored before the group sum
    keeps_p : the backward pass multiplies with the rounded P of the forward pass
    """

    dtype: str
    largest: float
    u_accumulate: float
    accumulate_truncates: bool = False
    u_operand: float = 0.0
    u_p: float = 0.0
    u_store: float = 0.0
    u_ds: float = 0.0
    u_delta: float = 0.0
    eta: float = 2.0**-126
    eta_accumulate: float = 2.0**-126
    u_elementwise: float = 2.0**-24
    u_lse: float = 2.0**-22
    u_scores: float = 0.0
    u_dp: float = 0.0
    per_head_rounding: bool = False
    keeps_p: bool = False

    def accumulate(self, terms: ArrayLike, form: str = "deterministic") -> Array:
        """acc(n): the relative error of a sum of n products, against the sum of their sizes.

        Roundings to nearest average out, so n + 2 of them weigh like sqrt(n + 2) in the
        statistical form; truncations all point the same way and do not.
        """
        n = np.asarray(terms, dtype=np.float64) + 2.0
        if form == "statistical" and not self.accumulate_truncates:
            n = np.sqrt(n)
        return n * self.u_accumulate

    def shared(self) -> Numerics:
        """Only what many rows may have in common, so that it does not average out over them.

        The rounded constants and the bias of exp and log, accumulators that truncate, and
        operands: a rounded v_j is read by every row that sees key j.
        """
        return dataclasses.replace(
            self,
            u_accumulate=self.u_accumulate if self.accumulate_truncates else 0.0,
            u_p=0.0,
            u_store=0.0,
            u_ds=0.0,
            u_delta=0.0,
            u_scores=0.0,
            u_dp=0.0,
            per_head_rounding=False,
            keeps_p=False,
        )

    @property
    def u_operands(self) -> float:
        """Relative error of a product of two rounded operands: 2 u_in + u_in^2."""
        return 2.0 * self.u_operand + self.u_operand**2


def _sixteen_bit(dtype: str, u: float, eta: float, largest: float) -> Numerics:
    return Numerics(
        dtype=dtype,
        largest=largest,
        u_accumulate=2.0**-23,
        accumulate_truncates=True,
        u_p=u,
        u_store=u,
        u_ds=u,
        u_delta=u,
        eta=eta,
    )


def _by_head(row: Numerics) -> Numerics:
    return dataclasses.replace(row, per_head_rounding=True)


def _eager(row: Numerics) -> Numerics:
    twice = (1.0 + row.u_store) ** 2 - 1.0  # two roundings on top of each other
    return dataclasses.replace(
        row,
        per_head_rounding=True,
        keeps_p=True,
        u_scores=twice,  # q.k is stored, and scale * q.k is stored
        u_dp=row.u_store,
        u_ds=twice,  # softmax' output is stored, and scale times it is stored
    )


_LARGEST_FP32 = float(np.finfo(np.float32).max)
_LARGEST_BF16 = (2.0 - 2.0**-7) * 2.0**127
_FP32 = Numerics(dtype="float32", largest=_LARGEST_FP32, u_accumulate=2.0**-24)
_BF16 = _sixteen_bit("bfloat16", 2.0**-8, 2.0**-126, _LARGEST_BF16)
_FP16 = _sixteen_bit("float16", 2.0**-11, 2.0**-25, 65504.0)

NUMERICS: dict[str, Numerics] = {
    "fp64": Numerics(
        dtype="float64",
        largest=float(np.finfo(np.float64).max),
        u_accumulate=2.0**-53,
        eta=2.0**-1022,
        eta_accumulate=2.0**-1022,
        u_elementwise=2.0**-53,
        u_lse=2.0**-51,
    ),
    "fp32": _FP32,
    "tf32": dataclasses.replace(
        _FP32, u_accumulate=2.0**-23, accumulate_truncates=True, u_operand=2.0**-11
    ),
    "bf16": _BF16,
    "fp16": _FP16,
    "bf16-head": _by_head(_BF16),
    "bf16-eager": _eager(_BF16),
    "fp16-eager": _eager(_FP16),
}
