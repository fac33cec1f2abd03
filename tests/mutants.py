"""The zoo: the oracle with one decision changed, and the clause that must notice.

Each mutant is a mistake that somebody has made, or could. Those of the masks stand in
`nsa_ref.testing.mutants`; those of the arithmetic change one line of `Kernel`, a second, dense
implementation of attention that is right as it stands.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.compress import compress_windows
from nsa_ref.selection import (
    compress_probabilities,
    forced_blocks,
    importance,
    selection_candidates,
)
from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.case import DTYPES
from nsa_ref.testing.mutants import mutant

#: Conventions with empty rows of zero, so that arithmetic can be changed one step at a time.
PLAIN = (
    PAPER,
    LUCIDRAINS_FLEX,
    dataclasses.replace(PAPER, causal=False),
    dataclasses.replace(PAPER, duplicates="multiset"),
)


class Kernel(OracleImplementation):
    """Dense attention in one piece, with every step a method that a mutant can change.

    In float32 for the cases of 32 and 16 bits, as kernels compute, else in float64.
    """

    name = "kernel"
    semantics = PLAIN
    nonfinite_invisible = False  # dense: 0 times inf is NaN

    def kv_head_of_keys(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) // case.group_size

    def kv_head_of_values(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) // case.group_size

    def scale(self, case: Case) -> float:
        return case.scale

    def masked(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.where(mask != 0, scores, -np.inf)

    def peak(self, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        peak = masked.max(-1, keepdims=True, initial=-np.inf)
        return np.where(np.isfinite(peak), peak, 0)

    def exp(self, x: np.ndarray) -> np.ndarray:
        return np.exp(x)

    def stored_weights(self, weights: np.ndarray) -> np.ndarray:
        return weights

    def over_values(self, case: Case, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.einsum("bhtj,bhjd->bhtd", weights, v)

    def over_keys(self, case: Case, ds: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.einsum("bhtj,bhjd->bhtd", ds, k)

    def empty(self, out: np.ndarray, v: np.ndarray, empty: np.ndarray) -> np.ndarray:
        return np.where(empty, 0, out)

    def lse(self, case: Case, total: np.ndarray, peak: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return (np.log(total) + peak)[..., 0]

    def delta(self, d_out: np.ndarray, out: np.ndarray, d_lse: np.ndarray) -> np.ndarray:
        return (d_out * out).sum(-1, keepdims=True) - d_lse[..., None]

    def backward_mask(self, case: Case, mask: np.ndarray) -> np.ndarray:
        return mask

    def for_keys(self, ds: np.ndarray) -> np.ndarray:
        return ds

    def for_values(self, p: np.ndarray) -> np.ndarray:
        return p

    def over_group(self, case: Case, gradient: np.ndarray) -> np.ndarray:
        grouped = gradient.reshape(case.batch, case.kv_heads, case.group_size, *gradient.shape[2:])
        return grouped.sum(2)

    def dq_scale(self, case: Case) -> float:
        return self.scale(case)

    def _weights(
        self, case: Case, mask: np.ndarray, q: np.ndarray, k: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """exp(s - peak) times multiplicity, its sum, and the peak."""
        k = k[:, self.kv_head_of_keys(case)]
        scores = q.dtype.type(self.scale(case)) * np.einsum("bhtd,bhjd->bhtj", q, k)
        masked = self.masked(scores, mask)
        peak = self.peak(scores, masked)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            weights = self.exp(masked - peak) * np.maximum(mask, masked > -np.inf)
        return weights.astype(q.dtype), weights.sum(-1, keepdims=True).astype(q.dtype), peak

    def attend(
        self, case: Case, branch: str, mask: np.ndarray, q: Any, k: Any, v: Any
    ) -> Attention:
        q, k, v = _as_computed(case, q, k, v)
        mask = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
        weights, total, peak = self._weights(case, mask, q, k)
        v = v[:, self.kv_head_of_values(case)]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            out = self.over_values(case, self.stored_weights(weights), v) / total
            return Attention(self.empty(out, v, total == 0), self.lse(case, total, peak))

    def attend_vjp(
        self,
        case: Case,
        branch: str,
        mask: np.ndarray,
        q: Any,
        k: Any,
        v: Any,
        d_out: Any,
        d_lse: Any,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, k, v, d_out, d_lse = _as_computed(case, q, k, v, d_out, d_lse)
        mask = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
        out = self.attend(case, branch, mask, q, k, v).out
        mask = self.backward_mask(case, mask)
        weights, total, _ = self._weights(case, mask, q, k)
        p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        keys, values = k[:, self.kv_head_of_keys(case)], v[:, self.kv_head_of_values(case)]
        dp = np.einsum("bhtd,bhjd->bhtj", d_out, values)
        ds = p * (dp - self.delta(d_out, out, d_lse))
        dq = q.dtype.type(self.dq_scale(case)) * self.over_keys(case, ds, keys)
        dk = q.dtype.type(self.scale(case)) * np.einsum("bhtj,bhtd->bhjd", self.for_keys(ds), q)
        dv = np.einsum("bhtj,bhtd->bhjd", self.for_values(p), d_out)
        return dq, self.over_group(case, dk), self.over_group(case, dv)


def _as_computed(case: Case, *arrays: np.ndarray) -> list[np.ndarray]:
    dtype = np.float64 if case.dtype == "float64" else np.float32
    return [array.astype(dtype) for array in arrays]


# --- arithmetic, forward --------------------------------------------------------------------------


@mutant("A1", "heads are interleaved: h % kv_heads for h // G")
class InterleavedHeads(Kernel):
    def kv_head_of_keys(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) % case.kv_heads

    def kv_head_of_values(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) % case.kv_heads


@mutant("A1", "keys and values are mapped to different kv heads")
class KeysAndValuesApart(Kernel):
    def kv_head_of_values(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) % case.kv_heads


@mutant("A1", "the scale is missing")
class NoScale(Kernel):
    def scale(self, case: Case) -> float:
        return 1.0


@mutant("A1", "exp2 without log2 e")
class NoLog2E(Kernel):
    def exp(self, x: np.ndarray) -> np.ndarray:
        return np.exp2(x)


@mutant("A1", "the maximum is not subtracted")
class NoMaximum(Kernel):
    """In float32, where exp overflows above 88; float64 would hide it up to 709."""

    def exp(self, x: np.ndarray) -> np.ndarray:
        return np.exp(x.astype(np.float32)).astype(x.dtype)

    def peak(self, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        return np.zeros_like(super().peak(scores, masked))


@mutant("A1", "lse in base 2")
class LseBaseTwo(Kernel):
    def lse(self, case: Case, total: np.ndarray, peak: np.ndarray) -> np.ndarray:
        return super().lse(case, total, peak) / math.log(2)


@mutant("A1", "weights rounded to fp8 before they meet v")
class EightBitWeights(Kernel):
    def stored_weights(self, weights: np.ndarray) -> np.ndarray:
        return weights.astype(ml_dtypes.float8_e4m3fn).astype(weights.dtype)


@mutant("A1", "everything is 0.3 % too large, less than one rounding in bf16")
class SlightlyTooLarge(Kernel):
    def stored_weights(self, weights: np.ndarray) -> np.ndarray:
        return weights * weights.dtype.type(1.003)


def _accumulated(case: Case, weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Sums over keys, 8 at a time, in an accumulator of the case's dtype."""
    total = np.zeros((*weights.shape[:3], vectors.shape[3]), DTYPES[case.dtype])
    for start in range(0, weights.shape[3], 8):
        keys = slice(start, start + 8)
        part = np.einsum("bhtj,bhjd->bhtd", weights[..., keys], vectors[:, :, keys])
        total = (total.astype(part.dtype) + part).astype(total.dtype)
    return total.astype(vectors.dtype)


@mutant("A1", "P V is accumulated in the dtype of the inputs")
class NarrowAccumulator(Kernel):
    def over_values(self, case: Case, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        return _accumulated(case, weights, v)


@mutant("A1", "lse is stored in the dtype of the inputs")
class NarrowLse(Kernel):
    def lse(self, case: Case, total: np.ndarray, peak: np.ndarray) -> np.ndarray:
        lse = super().lse(case, total, peak)
        return lse.astype(DTYPES[case.dtype]).astype(lse.dtype)


@mutant("A2", "a row without keys is 0 / 0")
class EmptyRowNaN(Kernel):
    def empty(self, out: np.ndarray, v: np.ndarray, empty: np.ndarray) -> np.ndarray:
        return np.where(empty, np.nan, out)


@mutant("A2", "a row without keys is the mean of all values")
class EmptyRowUniform(Kernel):
    def empty(self, out: np.ndarray, v: np.ndarray, empty: np.ndarray) -> np.ndarray:
        return np.where(empty, v.sum(2, keepdims=True) / max(1, v.shape[2]), out)


@mutant("A2", "the lse of a row without keys is 0")
class EmptyLseZero(Kernel):
    def lse(self, case: Case, total: np.ndarray, peak: np.ndarray) -> np.ndarray:
        return np.where(total[..., 0] == 0, 0.0, super().lse(case, total, peak))


@mutant("A5", 'a finite "minus infinity" is added, and large logits leak through')
class FiniteMinusInfinity(Kernel):
    def masked(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        masked = np.where(mask != 0, scores, scores - scores.dtype.type(1e4))
        return np.where(mask.any(-1, keepdims=True), masked, -np.inf)


@mutant("A5", "the same where nothing is causal, and window or selection hide the keys")
class FiniteMinusInfinityBothWays(FiniteMinusInfinity):
    semantics = (dataclasses.replace(PAPER, causal=False),)


@mutant("A5", "inf and NaN are declared harmless, and 0 times inf is NaN")
class ZeroTimesInfinity(Kernel):
    nonfinite_invisible = True


@mutant("A5", "invisible keys take part in the maximum")
class MaximumOfAll(Kernel):
    def peak(self, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        return scores.max(-1, keepdims=True, initial=-1e30)


# --- arithmetic, backward -------------------------------------------------------------------------


@mutant("A3", "queries beyond the 512th are lost in dk and dv")
class NarrowQueries(Kernel):
    def for_keys(self, ds: np.ndarray) -> np.ndarray:
        return np.where(np.arange(ds.shape[2])[:, None] < 512, ds, 0)

    def for_values(self, p: np.ndarray) -> np.ndarray:
        return self.for_keys(p)


@mutant("A1", "states to be deterministic, and adds in another order each time")
class AnotherOrder(Kernel):
    deterministic = True
    calls = 0

    def over_values(self, case: Case, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.calls += 1
        order = np.argsort(np.arange(v.shape[2]) * self.calls % 7, kind="stable")
        return super().over_values(case, weights[..., order], v[:, :, order])


@mutant("A3", "states to be deterministic, and adds up dq in another order each time")
class AnotherOrderBackward(Kernel):
    deterministic = True
    calls = 0

    def over_keys(self, case: Case, ds: np.ndarray, k: np.ndarray) -> np.ndarray:
        self.calls += 1
        order = np.argsort(np.arange(k.shape[2]) * self.calls % 7, kind="stable")
        return super().over_keys(case, ds[..., order], k[:, :, order])


@mutant("A3", "delta is dropped")
class NoDelta(Kernel):
    def delta(self, d_out: np.ndarray, out: np.ndarray, d_lse: np.ndarray) -> np.ndarray:
        return -d_lse[..., None]


@mutant("A3", "the gradient through lse is dropped")
class NoGradientThroughLse(Kernel):
    def delta(self, d_out: np.ndarray, out: np.ndarray, d_lse: np.ndarray) -> np.ndarray:
        return (d_out * out).sum(-1, keepdims=True)


@mutant("A3", "dk and dv come from the first head of the group only")
class GroupGradientOnce(Kernel):
    def for_values(self, p: np.ndarray) -> np.ndarray:
        return p

    def over_group(self, case: Case, gradient: np.ndarray) -> np.ndarray:
        return gradient[:, :: case.group_size]


@mutant("A3", "the last query is missing in dk")
class QueryMissingInDk(Kernel):
    def for_keys(self, ds: np.ndarray) -> np.ndarray:
        ds = ds.copy()
        ds[:, :, -1:] = 0
        return ds


@mutant("A3", "dq lacks the scale")
class DqWithoutScale(Kernel):
    def dq_scale(self, case: Case) -> float:
        return 1.0


@mutant("A3", "dq is accumulated in the dtype of the inputs, block by block")
class NarrowDq(Kernel):
    def over_keys(self, case: Case, ds: np.ndarray, k: np.ndarray) -> np.ndarray:
        return _accumulated(case, ds, k)


@mutant("A3", "the backward counts a block that is named twice once, where twice is declared")
class DuplicatesOnceBackward(Kernel):
    def backward_mask(self, case: Case, mask: np.ndarray) -> np.ndarray:
        return np.minimum(mask, 1)


@mutant("A3", "the backward loses each row's first key")
class BackwardLosesAKey(Kernel):
    def backward_mask(self, case: Case, mask: np.ndarray) -> np.ndarray:
        if not mask.size:
            return mask
        mask = mask.copy()
        several = (mask != 0).sum(-1) > 1
        first = (mask != 0).argmax(-1)
        b, h, t = np.nonzero(several)
        mask[b, h, t, first[b, h, t]] = 0
        return mask


# --- compression ----------------------------------------------------------------------------------


@mutant("C1", '"end" windows are averaged over their real tokens only')
class MeanOfRealTokens(OracleImplementation):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        pooled = super().pool(case, x, weights).astype(np.float64)
        if case.compress_map == "mean" and case.semantics.compress_alignment == "end":
            size = case.compress_block_size
            for i in range(pooled.shape[2]):
                real = min(size, (i + 1) * case.compress_block_sliding_stride)
                pooled[:, :, i] *= size / real
        return pooled.astype(x.dtype)


@mutant("C1", "windows begin one token late")
class WindowsLate(OracleImplementation):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        return super().pool(case, np.roll(x, -1, axis=2), weights)


@mutant("C4", "means are accumulated in the dtype of the tokens")
class NarrowMean(OracleImplementation):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        pooled = super().pool(case, x, weights)
        if case.compress_map != "mean":
            return pooled
        positions = weights.get("positions")
        size = case.compress_block_size
        windows = compress_windows(
            case.kv_len,
            size,
            case.compress_block_sliding_stride,
            case.semantics.compress_alignment,
        )
        for i, (start, stop) in enumerate(windows):
            total = np.zeros_like(pooled[:, :, i])
            for j in range(start, stop):
                token = x[:, :, j] if j >= 0 else np.zeros_like(total)
                if positions is not None:
                    token = token + positions[:, j - start]
                total = (total + token).astype(x.dtype)
            pooled[:, :, i] = total / x.dtype.type(size)
        return pooled


@mutant("C4", "intra-block positions are forgotten")
class NoPositions(OracleImplementation):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        weights = {n: w * 0 if n == "positions" else w for n, w in weights.items()}
        return super().pool(case, x, weights)


@mutant("C4", "every kv head's map is the first head's")
class FirstHeadsMap(OracleImplementation):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        if case.compress_map == "linear_per_head":
            weights = {
                **weights,
                "weight": np.broadcast_to(weights["weight"][:1], weights["weight"].shape),
            }
        return super().pool(case, x, weights)


@mutant("C4", "overlapping windows overwrite each other's gradient")
class OverlapOverwritten(OracleImplementation):
    def pool_vjp(
        self, case: Case, x: Any, weights: dict[str, Any], d_out: Any
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        dx, dweights = super().pool_vjp(case, x, weights, d_out)
        last = d_out.copy()
        last[:, :, :-1] = 0
        only_last, _ = super().pool_vjp(case, x, weights, last)
        return np.where(only_last != 0, only_last, dx), dweights


# --- selection ------------------------------------------------------------------------------------


class Selector(OracleImplementation):
    """Top-n in a few lines, right as it stands: sort, cut, fill up with -1."""

    name = "selector"
    semantics = (
        PAPER,
        dataclasses.replace(PAPER, causal=False),
        dataclasses.replace(PAPER, compress_alignment="end", compress_strict=True),
    )

    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        return importance(
            q,
            k_cmp,
            mem_k,
            kv_len=case.kv_len,
            compress_block_size=case.compress_block_size,
            compress_block_sliding_stride=case.compress_block_sliding_stride,
            selection_block_size=case.selection_block_size,
            semantics=case.semantics,
        )

    def candidates(self, case: Case) -> np.ndarray:
        return selection_candidates(
            case.q_len, case.kv_len, case.selection_block_size, case.semantics
        )

    def forced(self, case: Case) -> np.ndarray:
        return forced_blocks(
            case.q_len,
            case.kv_len,
            case.selection_block_size,
            case.num_initial_blocks,
            case.num_local_blocks,
            case.semantics,
        )

    def unused(self) -> int:
        return -1

    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        q, k_cmp, mem_k = (x.astype(np.float64) for x in (q, k_cmp, mem_k))
        candidates = self.candidates(case)
        scores = self.scores(case, q, k_cmp, mem_k)
        scores = np.where(self.forced(case), np.inf, scores)
        scores = np.where(candidates, scores, -np.inf)
        order = np.argsort(-scores, axis=-1, kind="stable")
        taken = np.arange(order.shape[-1]) < candidates.sum(-1)[:, None]
        order = np.where(taken, order, self.unused())
        width = case.num_selected_blocks
        chosen = np.full((*order.shape[:3], width), self.unused(), dtype=np.int64)
        chosen[..., : order.shape[-1]] = order[..., :width]
        return chosen


@mutant("I1", "memory does not take part in the softmax")
class MemoryOutsideSoftmax(Selector):
    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        return super().scores(case, q, k_cmp, mem_k[:, :, :0])


@mutant("I2", "eq. 9 read with 0-based indices as printed: off by l'/d - 1")
class EquationNineShifted(Selector):
    semantics = (PAPER,)

    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        p_cmp = compress_probabilities(
            q,
            k_cmp,
            mem_k,
            kv_len=case.kv_len,
            compress_block_size=case.compress_block_size,
            compress_block_sliding_stride=case.compress_block_sliding_stride,
            semantics=case.semantics,
        )
        p_cmp = p_cmp.reshape(case.batch, case.kv_heads, case.group_size, *p_cmp.shape[2:]).sum(2)
        strides = case.selection_block_size // case.compress_block_sliding_stride
        overlap = case.compress_block_size // case.compress_block_sliding_stride
        scores = np.zeros((*p_cmp.shape[:3], case.num_selection_blocks))
        for b in range(case.num_selection_blocks):
            for m in range(strides):
                for n in range(overlap):
                    if 0 <= (i := strides * b - m - n) < p_cmp.shape[3]:
                        scores[..., b] += p_cmp[..., i]
        return scores


@mutant("I3", "scores of the group's first head only")
class FirstHeadOnly(Selector):
    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        return super().scores(case, q[:, :: case.group_size], k_cmp, mem_k)


@mutant("I4", "initial and local blocks are not forced")
class NothingForced(Selector):
    def forced(self, case: Case) -> np.ndarray:
        return np.zeros_like(super().forced(case))


@mutant("I4", "blocks beyond the 128th are forced no more")
class ForcedUpTo128(Selector):
    def forced(self, case: Case) -> np.ndarray:
        forced = super().forced(case).copy()
        forced[..., 128:] = False
        return forced


@mutant("I2", "blocks beyond the 128th are no candidates")
class CandidatesUpTo128(Selector):
    def candidates(self, case: Case) -> np.ndarray:
        candidates = super().candidates(case).copy()
        candidates[..., 128:] = False
        return candidates


@mutant("I6", "causal by the block's index where its position is meant")
class OwnBlockNoCandidate(Selector):
    def candidates(self, case: Case) -> np.ndarray:
        candidates = super().candidates(case).copy()
        if case.semantics.causal:
            for t in range(case.q_len):
                p = t + case.kv_len - case.q_len
                candidates[t, max(0, p // case.selection_block_size) :] = False
        return candidates


@mutant("I5", "a tie is resolved to a block that begins after p")
class TieIntoTheFuture(Selector):
    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        chosen = super().select(case, q, k_cmp, mem_k)
        blocks = case.num_selection_blocks
        scores = self.scores(case, *(x.astype(np.float64) for x in (q, k_cmp, mem_k)))
        for b, g, t, slot in np.ndindex(*chosen.shape):
            block = chosen[b, g, t, slot]
            future = blocks - 1
            if (
                block >= 0
                and not self.candidates(case)[t, future]
                and scores[b, g, t, block] == scores[b, g, t, future]
                and not self.forced(case)[t, block]
            ):
                chosen[b, g, t, slot] = future
                break
        return chosen


@mutant("I6", "slots left over hold block 0 again")
class SlotsFilledWithZero(Selector):
    def unused(self) -> int:
        return 0
