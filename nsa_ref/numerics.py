"""What each class of kernels rounds, and how coarsely: the rows that an implementation declares.

``u`` is a unit roundoff: one rounding changes x by at most ``u |x|``, or by ``eta`` if the result
underflows. Where the numbers of a row come from:

- *The format.* ``largest``, ``eta`` and ``u_store`` are those of the dtype: 24 significant bits in
  float32, 11 in float16, 8 in bfloat16, and 11 in an operand of tf32.
- *What such kernels do.* 16-bit kernels hold inputs in 16 bits and sums in float32, and round what
  they store. "-head" rows also store each query head's dk and dv before the group sum. "-eager"
  rows store the result of every operation.
- *The hardware.* Tensor cores accumulate in float32 but may truncate: hence 2^-23 there, and 2^-24
  where arithmetic is IEEE. The C_* count units of float32's elementwise operations, ex2.approx
  among them, and ``u_lse`` is that of a logarithm. ``benchmarks/hardware_constants.py`` measures
  them on a GPU.

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
C_TRIG = 2  # sine and cosine: units of u_elementwise, absolute


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What one class of kernels rounds, and how coarsely. All u_* are relative, eta_* absolute.

    dtype : the dtype that inputs and results are stored in (NumPy's or ml_dtypes' name)
    largest : its largest finite number; a result beyond it may overflow, and its bound is inf
    u_store : storing a number in a dtype that is narrower than the sums; 0 if it is not
    eta : absolute error of storing a number that underflows the dtype
    u_accumulate : one addition inside a matrix product or a row sum
    accumulate_truncates : its rounding may have a direction, so it never averages out
    eta_accumulate : absolute error of a product that underflows inside the accumulator
    u_operand : each factor of a matrix product as the hardware reads it (tf32)
    u_elementwise : one scalar operation
    u_lse : absolute error of log and of adding the maximum back
    stores_each_head : dk and dv of each query head are stored before the group sum
    rounds_every_operation : the result of every operation is stored, also logits and dP, and the
        backward pass multiplies with the P that the forward pass stored
    """

    dtype: str
    largest: float
    u_store: float = 0.0
    eta: float = 2.0**-126
    u_accumulate: float
    accumulate_truncates: bool = False
    eta_accumulate: float = 2.0**-126
    u_operand: float = 0.0
    u_elementwise: float = 2.0**-24
    u_lse: float = 2.0**-22
    stores_each_head: bool = False
    rounds_every_operation: bool = False

    @property
    def rounds_on_store(self) -> bool:
        """The dtype is narrower than the sums: what is stored is rounded once more."""
        return self.u_store > 0

    @property
    def coarsest(self) -> float:
        """The unit roundoff of the coarsest thing that it does to a number."""
        return max(self.u_store, self.u_accumulate, self.u_operand)

    @property
    def u_p(self) -> float:
        """Probabilities, before they meet v or dO."""
        return self.u_store

    @property
    def u_delta(self) -> float:
        """delta = dO . O (minus d_lse), which may be stored."""
        return self.u_store

    @property
    def u_ds(self) -> float:
        """dS before it meets k or q; stored twice where softmax' gradient and its scale are two."""
        return self._stored_twice if self.rounds_every_operation else self.u_store

    @property
    def u_scores(self) -> float:
        """Logits: q.k is stored, and scale * q.k is stored, where every operation is."""
        return self._stored_twice if self.rounds_every_operation else 0.0

    @property
    def u_query(self) -> float:
        """q that is scaled before it meets k, and stored, where every operation is."""
        return self.u_store if self.rounds_every_operation else 0.0

    @property
    def u_dp(self) -> float:
        """dP, where every operation is stored."""
        return self.u_store if self.rounds_every_operation else 0.0

    @property
    def u_operands(self) -> float:
        """Relative error of a product of two rounded operands: 2 u_in + u_in^2."""
        return 2.0 * self.u_operand + self.u_operand**2

    @property
    def _stored_twice(self) -> float:
        return (1.0 + self.u_store) ** 2 - 1.0

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
            u_store=0.0,
            u_accumulate=self.u_accumulate if self.accumulate_truncates else 0.0,
            stores_each_head=False,
            rounds_every_operation=False,
        )


_FP32 = Numerics(dtype="float32", largest=float(np.finfo(np.float32).max), u_accumulate=2.0**-24)
_BF16 = Numerics(
    dtype="bfloat16",
    largest=(2.0 - 2.0**-7) * 2.0**127,
    u_store=2.0**-8,
    u_accumulate=2.0**-23,
    accumulate_truncates=True,
)
_FP16 = dataclasses.replace(_BF16, dtype="float16", largest=65504.0, u_store=2.0**-11, eta=2.0**-25)

NUMERICS: dict[str, Numerics] = {
    "fp64": Numerics(
        dtype="float64",
        largest=float(np.finfo(np.float64).max),
        eta=2.0**-1022,
        u_accumulate=2.0**-53,
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
    "bf16-head": dataclasses.replace(_BF16, stores_each_head=True),
    "fp16-head": dataclasses.replace(_FP16, stores_each_head=True),
    "bf16-eager": dataclasses.replace(_BF16, stores_each_head=True, rounds_every_operation=True),
    "fp16-eager": dataclasses.replace(_FP16, stores_each_head=True, rounds_every_operation=True),
}
