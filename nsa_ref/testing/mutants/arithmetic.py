"""Mutants of attention's arithmetic: `Kernel` with one step changed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.semantics import PAPER
from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.rounding import Rounding, Way
from nsa_ref.testing.mutants.zoo import mutant


def _in_another_order(call: int, columns: int) -> np.ndarray:
    """Another order of the columns in every call."""
    return np.argsort(np.arange(columns) * call % 7, kind="stable")


def _accumulated(r: Rounding, weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Sums over keys, 8 at a time, in an accumulator of the inputs' dtype."""
    total = np.zeros((*weights.shape[:3], vectors.shape[3]), r.wide)
    for start in range(0, weights.shape[3], 8):
        eight = weights[..., start:][..., :8], vectors[:, :, start:][:, :, :8].swapaxes(-1, -2)
        total = r.store(total + r.dot(*eight))
    return total


def _eight_bits(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.float8_e4m3fn).astype(x.dtype)


# --- which keys -----------------------------------------------------------------------------------


@mutant("W1", "the mask that is shown is right, and each row's last key is not read")
class LastKeyNotRead(Kernel):
    def read(self, mask: np.ndarray) -> np.ndarray:
        column = np.arange(mask.shape[3])
        last = np.where(mask > 0, column, -1).max(-1, keepdims=True, initial=-1)
        return np.where(column == last, 0, mask)


@mutant("W1", "the mask that is shown is right, and the first key that it hides is read as well")
class HiddenKeyRead(Kernel):
    def read(self, mask: np.ndarray) -> np.ndarray:
        column = np.arange(mask.shape[3])
        hidden = np.where(mask > 0, mask.shape[3], column).min(-1, keepdims=True, initial=2**31)
        return np.where(column == hidden, 1, mask)


# --- forward --------------------------------------------------------------------------------------


@mutant("A1", "heads are interleaved: h % kv_heads for h // G", seen_in="ports laid out (qh h)")
class InterleavedHeads(Kernel):
    def kv_head_of_keys(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) % case.kv_heads


@mutant("A1", "keys and values are mapped to different kv heads")
class KeysAndValuesApart(Kernel):
    def kv_head_of_values(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) % case.kv_heads


@mutant("A1", "the scale is missing")
class NoScale(Kernel):
    def scale(self, case: Case) -> float:
        return 1.0


@mutant("A1", "the scale is off by 1 %")
class ScaleSlightlyOff(Kernel):
    def scale(self, case: Case) -> float:
        return 1.01 * super().scale(case)


@mutant("A1", "exp2 without log2 e")
class NoLog2E(Kernel):
    log2_e = 1.0

    def power(self, x: np.ndarray) -> np.ndarray:
        return np.exp2(x)


@mutant("A1", "the maximum is not subtracted")
class NoMaximum(Kernel):
    """In float32, where exp overflows above 88; float64 would hide it up to 709."""

    def power(self, x: np.ndarray) -> np.ndarray:
        return super().power(x.astype(np.float32)).astype(x.dtype)

    def peak(self, before: np.ndarray, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        return np.zeros_like(before)


@mutant("A1", "what is summed up is not rescaled when the maximum rises")
class NoRescaling(Kernel):
    way = Way(block=16)

    def rescaling(self, before: np.ndarray, peak: np.ndarray) -> np.ndarray:
        return np.ones_like(peak)


@mutant("A1", "lse in base 2", seen_in="XunhaoLai/native-sparse-attention-triton, by convention")
class LseBaseTwo(Kernel):
    def lse(self, r: Rounding, lse: np.ndarray, empty: np.ndarray, of_empty: float) -> np.ndarray:
        return super().lse(r, lse, empty, of_empty) / math.log(2)


@mutant("A1", "weights are rounded to fp8 before they meet v")
class EightBitWeights(Kernel):
    def stored_weights(self, r: Rounding, weights: np.ndarray) -> np.ndarray:
        return _eight_bits(weights)


@mutant("A1", "everything is 0.3 % too large, less than one rounding in bf16")
class SlightlyTooLarge(Kernel):
    def stored_weights(self, r: Rounding, weights: np.ndarray) -> np.ndarray:
        return super().stored_weights(r, weights) * r.wide(1.003)


@mutant("A1", "P V is accumulated in the dtype of the inputs")
class NarrowAccumulator(Kernel):
    def over_values(self, r: Rounding, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        return _accumulated(r, weights, v)


@mutant("A1", "lse is stored in the dtype of the inputs")
class NarrowLse(Kernel):
    def lse(self, r: Rounding, lse: np.ndarray, empty: np.ndarray, of_empty: float) -> np.ndarray:
        return r.store(super().lse(r, lse, empty, of_empty))


@mutant("A1", "states to be deterministic, and adds in another order each time")
class AnotherOrder(Kernel):
    deterministic = True
    calls = 0

    def over_values(self, r: Rounding, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.calls += 1
        order = _in_another_order(self.calls, v.shape[2])
        return super().over_values(r, weights[..., order], v[:, :, order])


@mutant(
    "A1",
    "where heads have 128 features, and values as many, the scale is that of 64",
    needs={"head_dim": 128, "value_dim": 128},
)
class ScaleOfHalfTheWidth(Kernel):
    def scale(self, case: Case) -> float:
        halved = case.head_dim == case.value_dim == 128
        return super().scale(case) * 2**0.5 if halved else super().scale(case)


class _LastRowTwice(Kernel):
    """Of several tiles of so many rows, a last one of one row is added up twice."""

    rows = 0

    def attend(self, case: Case, branch: str, mask: np.ndarray, *tensors: Any) -> Attention:
        found = super().attend(case, branch, mask, *tensors)
        if case.q_len > self.rows and case.q_len % self.rows == 1:
            found.out[:, :, -1] *= 2
        return found


@mutant(
    "A1",
    "of several tiles of 64 rows, a last one of one row is added up twice",
    needs={"q_len": "> 64", "q_len_mod_64": 1},
)
class LastRowTwice(_LastRowTwice):
    rows = 64


@mutant("A1", "of 64 features, values lose the last", needs={"value_dim": 64})
class LastOf64Values(Kernel):
    def over_values(self, r: Rounding, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        found = super().over_values(r, weights, v)
        if v.shape[3] == 64:
            found[..., -1] = 0
        return found


@mutant(
    "A1",
    "where values have 128 features, the scale is that of as many",
    needs={"value_dim": 128, "head_dim": "!= 128"},
)
class ScaleOf128Values(Kernel):
    def scale(self, case: Case) -> float:
        return 128**-0.5 if case.value_dim == 128 else super().scale(case)


class _FeatureLost(Kernel):
    """Of so many features, logits lose the last."""

    features = 0

    def scores(self, case: Case, r: Rounding, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        if q.shape[3] == self.features:
            q = np.where(np.arange(self.features) < self.features - 1, q, 0).astype(q.dtype)
        return super().scores(case, r, q, k)


@mutant("A1", "of 64 features, logits lose the last", needs={"head_dim": 64})
class LastOf64Features(_FeatureLost):
    features = 64


@mutant("A1", "of 128 features, logits lose the last", needs={"head_dim": 128})
class LastOf128Features(_FeatureLost):
    features = 128


@mutant(
    "A1",
    "of several tiles of 128 rows, a last one of one row is added up twice",
    needs={"q_len": "> 128", "q_len_mod_128": 1},
)
class LastRowOfTilesOf128Twice(_LastRowTwice):
    rows = 128


@mutant("A1", "logits start from a maximum of -1e4, and below it nothing is left")
class MaximumFromMinus1e4(Kernel):
    def peak(self, before: np.ndarray, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        return np.maximum(super().peak(before, scores, masked), before.dtype.type(-1e4))


@mutant(
    "A1",
    "q.k is kept in the range of float16 before it is scaled",
    needs={"dtype": "float16"},
)
class DotProductsInFloat16(Kernel):
    def scores(self, case: Case, r: Rounding, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        scores, largest = super().scores(case, r, q, k), np.finfo(np.float16).max
        narrow = case.dtype == "float16"
        lost = narrow & (np.abs(scores) > largest * abs(self.scale(case)))
        return np.where(lost, np.copysign(np.inf, scores), scores)


@mutant("A1", "values that are subnormal in float16 are read as 0", needs={"dtype": "float16"})
class SubnormalValuesLost(Kernel):
    def over_values(self, r: Rounding, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        if r.dtype == np.float16:
            v = np.where(np.abs(v) < np.finfo(np.float16).tiny, 0, v)
        return super().over_values(r, weights, v)


# --- what ran before ------------------------------------------------------------------------------


class _Static(Kernel):
    """Every result of a shape is written into the same memory, as by a captured graph."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[Any, np.ndarray] = {}

    def written(self, name: str, result: np.ndarray) -> np.ndarray:
        """The result, where the next one will be."""
        place = self.memory.setdefault((name, result.shape, result.dtype), result)
        place[...] = result
        return place


@mutant(
    "A1", "the next call writes its output over that of the last", seen_in="captured CUDA graphs"
)
class OutputOverwritten(_Static):
    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        found = super().run(method, case, *arguments)
        if not isinstance(found, Attention):
            return found
        return Attention(self.written(method, found.out), found.lse)


@mutant("A3", "the next call writes its dq over that of the last", seen_in="captured CUDA graphs")
class GradientOverwritten(_Static):
    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        found = super().run(method, case, *arguments)
        if not method.endswith("_vjp") or method == "pool_vjp":
            return found
        return self.written(method, found[0]), *found[1:]


@mutant("A2", "a row without keys is 0 / 0")
class EmptyRowNaN(Kernel):
    def empty_row(self, case: Case, branch: str) -> str:
        return "nan"


@mutant("A2", "a row without keys is the mean of all values")
class EmptyRowUniform(Kernel):
    def empty_row(self, case: Case, branch: str) -> str:
        return "uniform"


@mutant("A2", "the lse of a row without keys is 0")
class EmptyLseZero(Kernel):
    def lse(self, r: Rounding, lse: np.ndarray, empty: np.ndarray, of_empty: float) -> np.ndarray:
        return np.where(empty, 0, lse)


@mutant("A5", 'a finite "minus infinity" is added, and large logits leak through')
class FiniteMinusInfinity(Kernel):
    def masked(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        masked = np.where(mask > 0, scores, scores - scores.dtype.type(1e4))
        return np.where(mask.any(-1, keepdims=True), masked, -np.inf)


@mutant(
    "A5",
    'a finite "minus infinity" hides the keys outside of windows and blocks, without causality',
)
class FiniteMinusInfinityBothWays(FiniteMinusInfinity):
    semantics = (dataclasses.replace(PAPER, causal=False),)


@mutant("A5", "inf and NaN are declared harmless, and 0 times inf is NaN")
class ZeroTimesInfinity(Kernel):
    nonfinite_invisible = True


@mutant("A5", "invisible keys take part in the maximum")
class MaximumOfAll(Kernel):
    def peak(self, before: np.ndarray, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        return np.maximum(before, scores.max(-1, keepdims=True, initial=-1e30))


def _wrapped(k: np.ndarray) -> np.ndarray:
    return k[:, :, np.arange(k.shape[2]) % 512]


@mutant(
    "A1",
    "beyond the 512th token the first ones' keys are read again, and the right values",
    seen_in="rings of keys and values with lengths of their own",
    needs={"kv_len": "> 512"},
)
class KeysWrapAround(Kernel):
    def attend(
        self, case: Case, branch: str, mask: np.ndarray, q: Any, k: Any, v: Any
    ) -> Attention:
        return super().attend(case, branch, mask, q, _wrapped(k), v)


# --- backward -------------------------------------------------------------------------------------


@mutant(
    "A3",
    "beyond the 512th token the backward reads the first ones' keys again",
    needs={"kv_len": "> 512"},
)
class KeysWrapAroundBackward(Kernel):
    def attend_vjp(
        self, case: Case, branch: str, mask: np.ndarray, q: Any, k: Any, *more: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return super().attend_vjp(case, branch, mask, q, _wrapped(k), *more)


@mutant("A3", "queries beyond the 512th are lost in dk and dv", needs={"q_len": "> 512"})
class NarrowQueries(Kernel):
    def for_keys(self, case: Case, ds: np.ndarray) -> np.ndarray:
        return np.where(np.arange(ds.shape[2])[:, None] < 512, ds, 0)


class _LastRowLost(Kernel):
    """Of several tiles of so many rows, a last one of one row is lost in dk and dv."""

    rows = 0

    def for_keys(self, case: Case, ds: np.ndarray) -> np.ndarray:
        if case.q_len > self.rows and case.q_len % self.rows == 1:
            return np.where(np.arange(case.q_len)[:, None] < case.q_len - 1, ds, 0)
        return ds


@mutant(
    "A3",
    "of several tiles of 64 rows, a last one of one row is lost in dk and dv",
    needs={"q_len": "> 64", "q_len_mod_64": 1},
)
class RowBeyond64Lost(_LastRowLost):
    rows = 64


@mutant(
    "A3",
    "of several tiles of 128 rows, a last one of one row is lost in dk and dv",
    needs={"q_len": "> 128", "q_len_mod_128": 1},
)
class RowBeyond128Lost(_LastRowLost):
    rows = 128


class _LastKeyLost(Kernel):
    """Of several tiles of so many keys, a last one of one key is lost in dq."""

    keys = 0

    def over_keys(self, r: Rounding, ds: np.ndarray, k: np.ndarray) -> np.ndarray:
        if k.shape[2] > self.keys and k.shape[2] % self.keys == 1:
            ds, k = ds[..., :-1], k[:, :, :-1]
        return super().over_keys(r, ds, k)


@mutant("A3", "of several tiles of 64 keys, a last one of one key is lost in dq")
class KeyBeyond64Lost(_LastKeyLost):
    keys = 64


@mutant("A3", "of several tiles of 128 keys, a last one of one key is lost in dq")
class KeyBeyond128Lost(_LastKeyLost):
    keys = 128


@mutant("A3", "states to be deterministic, and adds up dq in another order each time")
class AnotherOrderBackward(Kernel):
    deterministic = True
    calls = 0

    def over_keys(self, r: Rounding, ds: np.ndarray, k: np.ndarray) -> np.ndarray:
        self.calls += 1
        order = _in_another_order(self.calls, k.shape[2])
        return super().over_keys(r, ds[..., order], k[:, :, order])


@mutant("A3", "delta is dropped")
class NoDelta(Kernel):
    def delta(self, r: Rounding, *of: np.ndarray) -> np.ndarray:
        return np.zeros_like(super().delta(r, *of))


@mutant("A3", "the gradient through lse is dropped")
class NoGradientThroughLse(Kernel):
    def attend_vjp(self, case: Case, branch: str, mask: np.ndarray, *tensors: Any) -> Any:
        return super().attend_vjp(case, branch, mask, *tensors[:-1], np.zeros_like(tensors[-1]))


@mutant("A3", "dS is rounded to fp8")
class EightBitDs(Kernel):
    def stored_ds(self, r: Rounding, ds: np.ndarray) -> np.ndarray:
        return _eight_bits(ds)


@mutant("A3", "dk and dv come from the first head of the group only")
class GroupGradientOnce(Kernel):
    def for_keys(self, case: Case, ds: np.ndarray) -> np.ndarray:
        first = np.arange(case.q_heads) % case.group_size == 0
        return np.where(first[:, None, None], ds, 0)


@mutant("A3", "the last query is missing in dk")
class QueryMissingInDk(Kernel):
    def for_keys(self, case: Case, ds: np.ndarray) -> np.ndarray:
        ds = ds.copy()
        ds[:, :, -1:] = 0
        return ds

    def for_values(self, case: Case, p: np.ndarray) -> np.ndarray:
        return p


@mutant("A3", "dq lacks the scale")
class DqWithoutScale(Kernel):
    def scaled_dq(self, scale: Any, dq: np.ndarray) -> np.ndarray:
        return dq


@mutant("A3", "dq is accumulated in the dtype of the inputs, block by block")
class NarrowDq(Kernel):
    def over_keys(self, r: Rounding, ds: np.ndarray, k: np.ndarray) -> np.ndarray:
        return _accumulated(r, ds, k)


@mutant(
    "A3",
    "the backward counts a block that is named twice once, where twice is declared",
    needs={"duplicates": "multiset"},
)
class DuplicatesOnceBackward(Kernel):
    def backward_mask(self, mask: np.ndarray) -> np.ndarray:
        return np.minimum(mask, 1)


@mutant("A3", "the backward loses each row's first key")
class BackwardLosesAKey(Kernel):
    def backward_mask(self, mask: np.ndarray) -> np.ndarray:
        several = (mask > 0).sum(-1, keepdims=True) > 1
        first = np.cumsum(mask > 0, axis=-1) == 1
        return np.where(several & first & (mask > 0), 0, mask)
