"""Attention a second time, as kernels compute it: right as it stands, every step a method.

Fused, that is key blocks with an online softmax, and P recomputed from lse. Without fusion, as a
framework computes it, every operation is stored. Mutants change one step; the bounds are tried on
it in every row of numerics and every `Way`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants.dense import DenseMasks
from nsa_ref.testing.mutants.rounding import RoundedImplementation, Rounding

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


class Inputs(NamedTuple):
    """As registers hold them: keys and values of every query head; mask of every head."""

    mask: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Forward(NamedTuple):
    """What the forward pass leaves behind.

    out : stored; 0 in empty rows
    lse : (..., 1) natural, finite in empty rows
    base : lse in the base of the exponential, or P itself without fusion
    empty : (..., 1) rows that see no key
    """

    out: np.ndarray
    lse: np.ndarray
    base: np.ndarray
    empty: np.ndarray


class Kernel(DenseMasks, RoundedImplementation):
    name = "kernel"
    semantics: tuple[Semantics, ...] = (
        PAPER,
        LUCIDRAINS_FLEX,
        dataclasses.replace(PAPER, causal=False),
        dataclasses.replace(PAPER, duplicates="multiset"),
    )
    nonfinite_invisible = False  # 0 times inf is NaN
    log2_e = LOG2_E

    # steps, forward

    def read(self, mask: np.ndarray) -> np.ndarray:
        """The multiplicities, as they are read in both directions."""
        return mask

    def kv_head_of_keys(self, case: Case) -> np.ndarray:
        return np.arange(case.q_heads) // case.group_size

    def kv_head_of_values(self, case: Case) -> np.ndarray:
        return self.kv_head_of_keys(case)

    def scale(self, case: Case) -> float:
        return case.scale

    def scores(self, case: Case, r: Rounding, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Logits, in base 2 if log2 e is folded into the scale."""
        scale = r.wide(self.scale(case))
        if not self.way.fused and self.way.scale_first:
            return r.store(r.dot(r.store(q * scale), k))
        if not self.way.fused:
            return r.store(scale * r.store(r.dot(q, k)))
        folded = self.log2_e if self.way.exponential == "exp2" else 1.0
        return r.dot(q, k) * (scale * r.wide(folded))

    def masked(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.where(mask > 0, scores, -np.inf)

    def peak(self, before: np.ndarray, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """The largest logit so far."""
        return np.maximum(before, masked.max(-1, keepdims=True, initial=-np.inf))

    def power(self, x: np.ndarray) -> np.ndarray:
        """exp of differences of logits, whatever their base."""
        if self.way.exponential == "exp":
            return np.exp(x)
        late = self.way.exponential == "exp2_late"
        return np.exp2(x * x.dtype.type(self.log2_e) if late else x)

    def rescaling(self, before: np.ndarray, peak: np.ndarray) -> np.ndarray:
        """What sums up to the peak before are multiplied with."""
        return np.where(np.isfinite(before), self.power(before - peak), 0)

    def stored_weights(self, r: Rounding, weights: np.ndarray) -> np.ndarray:
        return r.store(weights)

    def over_values(self, r: Rounding, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        return r.dot(weights, v.swapaxes(-1, -2))

    def empty_row(self, case: Case, branch: str) -> str:
        rule: str = getattr(case.semantics.empty_row, branch)
        return rule

    def lse(self, r: Rounding, lse: np.ndarray, empty: np.ndarray, of_empty: float) -> np.ndarray:
        return np.where(empty, of_empty, lse)

    # steps, backward

    def backward_mask(self, mask: np.ndarray) -> np.ndarray:
        return mask

    def delta(
        self, r: Rounding, d_out: np.ndarray, out: np.ndarray, p: np.ndarray, dp: np.ndarray
    ) -> np.ndarray:
        from_out = self.way.fused and self.way.delta_from == "out"
        return r.total(d_out * out if from_out else p * dp)[..., None]

    def stored_ds(self, r: Rounding, ds: np.ndarray) -> np.ndarray:
        return r.store(ds)

    def for_keys(self, case: Case, ds: np.ndarray) -> np.ndarray:
        return ds

    def for_values(self, case: Case, p: np.ndarray) -> np.ndarray:
        return self.for_keys(case, p)

    def over_keys(self, r: Rounding, ds: np.ndarray, k: np.ndarray) -> np.ndarray:
        return r.dot(ds, k.swapaxes(-1, -2))

    def scaled_dq(self, scale: Any, dq: np.ndarray) -> np.ndarray:
        return scale * dq

    # the whole

    def _inputs(self, case: Case, r: Rounding, mask: np.ndarray, q: Any, k: Any, v: Any) -> Inputs:
        mask = np.broadcast_to(mask, (*q.shape[:3], k.shape[2])).astype(r.wide)
        q, k, v = (x.astype(r.wide) for x in (q, k, v))
        of_keys, of_values = self.kv_head_of_keys(case), self.kv_head_of_values(case)
        return Inputs(self.read(mask), q, k[:, of_keys], v[:, of_values])

    def forward(self, case: Case, r: Rounding, x: Inputs) -> Forward:
        """The softmax of each row and its sums over values.

        Fused, block by block: what there is so far is rescaled when the peak rises. Unfused, over
        all columns at once.
        """
        if not self.way.fused:
            return self._unfused(case, r, x)
        rows, columns = x.mask.shape[:3], x.mask.shape[3]
        block = self.way.block or max(1, columns)
        peak, total = np.full((*rows, 1), -np.inf, r.wide), np.zeros((*rows, 1), r.wide)
        sums = np.zeros((*rows, x.v.shape[3]), r.wide)
        for start in range(0, columns, block):
            j = slice(start, start + block)
            scores = self.scores(case, r, x.q, x.k[:, :, j])
            masked = self.masked(scores, x.mask[..., j])
            before, peak = peak, self.peak(peak, scores, masked)
            base = np.where(np.isfinite(peak), peak, 0)
            weights = np.maximum(x.mask[..., j], masked > -np.inf) * self.power(masked - base)
            alpha = self.rescaling(before, base)
            # the total adds P before it is rounded: lse would lose 16 bits otherwise
            total = total * alpha + r.total(weights)[..., None]
            stored = self.stored_weights(r, weights)
            sums = sums * alpha + self.over_values(r, stored, x.v[:, :, j])
        empty = total == 0
        safe = np.where(empty, r.wide(1), total)
        out = r.store(sums * (r.wide(1) / safe) if self.way.reciprocal else sums / safe)
        base = np.where(np.isfinite(peak), peak, 0)
        if self.way.exponential == "exp2":
            base = base + np.log2(safe)
            return Forward(out, base * r.wide(LN_2), base, empty)
        base = base + np.log(safe)
        return Forward(out, base, base, empty)

    def _unfused(self, case: Case, r: Rounding, x: Inputs) -> Forward:
        """Softmax works in registers; what it returns is stored."""
        masked = self.masked(self.scores(case, r, x.q, x.k), x.mask)
        peak = masked.max(-1, keepdims=True, initial=-np.inf)
        peak = np.where(np.isfinite(peak), peak, 0)
        weights = x.mask * np.exp(masked - peak)
        total = r.total(weights)[..., None]
        empty = total == 0
        safe = np.where(empty, r.wide(1), total)
        p = r.store(weights / safe)
        return Forward(r.store(self.over_values(r, p, x.v)), peak + np.log(safe), p, empty)

    def probabilities(self, case: Case, r: Rounding, x: Inputs, found: Forward) -> np.ndarray:
        """P for the backward pass: from the logits again, or what the forward pass stored."""
        if not self.way.fused:
            return found.base
        masked = self.masked(self.scores(case, r, x.q, x.k), x.mask)
        times = np.maximum(x.mask, masked > -np.inf)
        return np.where(times > 0, times * self.power(masked - found.base), 0)

    def d_scores(self, r: Rounding, scale: Any, p: Any, dp: Any, delta: Any, d_lse: Any) -> Any:
        """dS as it is stored, and what its products are still to be multiplied with."""
        if not self.way.fused:
            return r.store(scale * r.store(p * (dp - delta + d_lse))), r.wide(1)
        if self.way.d_lse_joins == "delta":
            ds = p * (dp - r.store(delta - d_lse))
        else:
            ds = p * ((dp - r.store(delta)) + d_lse)
        if self.way.scale_before:
            return self.stored_ds(r, ds * scale), r.wide(1)
        return self.stored_ds(r, ds), scale

    @np.errstate(all="ignore")
    def attend(
        self, case: Case, branch: str, mask: np.ndarray, q: Any, k: Any, v: Any
    ) -> Attention:
        r = self.rounding(case)
        x = self._inputs(case, r, mask, q, k, v)
        found = self.forward(case, r, x)
        mean = x.v.sum(2, keepdims=True) / max(1, x.v.shape[2])
        of_empty = {"zero": 0, "nan": np.nan, "uniform": mean}[self.empty_row(case, branch)]
        lse = self.lse(r, found.lse, found.empty, getattr(case.semantics.empty_lse, branch))
        return Attention(np.where(found.empty, of_empty, found.out), lse[..., 0])

    @np.errstate(all="ignore")
    def attend_vjp(
        self, case: Case, branch: str, mask: np.ndarray, *tensors: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r = self.rounding(case)
        q, k, v, d_out, d_lse = (tensor.astype(r.wide) for tensor in tensors)
        x = self._inputs(case, r, mask, q, k, v)
        found = self.forward(case, r, x)
        r = self.rounding(case, backward=True)
        x = x._replace(mask=self.backward_mask(x.mask))
        p = self.probabilities(case, r, x, found)
        dp = r.dot(d_out, x.v) if self.way.fused else r.store(r.dot(d_out, x.v))
        delta = self.delta(r, d_out, found.out, p, dp)
        ds, scale = self.d_scores(r, r.wide(self.scale(case)), p, dp, delta, d_lse[..., None])
        dq = self.scaled_dq(scale, self.over_keys(r, ds, x.k))
        dk = scale * self._over_rows(case, r, self.for_keys(case, ds), x.q)
        if self.empty_row(case, branch) == "uniform":
            p = np.where(found.empty, r.wide(1 / max(1, p.shape[3])), p)
        dv = self._over_rows(case, r, r.store(self.for_values(case, p)), d_out)
        return r.store(dq), self._group_sum(case, r, dk), self._group_sum(case, r, dv)

    def _over_rows(
        self, case: Case, r: Rounding, weights: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Sums over the queries of a group's heads, or of one head: (batch, ..., columns, dim)."""
        parts = case.q_heads if r.by_head else case.kv_heads
        length = case.q_heads // parts * rows.shape[2]
        by_column = (
            y.reshape(len(y), parts, length, y.shape[3]).swapaxes(-1, -2) for y in (weights, rows)
        )
        return r.dot(*by_column)

    def _group_sum(self, case: Case, r: Rounding, gradient: np.ndarray) -> np.ndarray:
        """Stored; of single heads every partial sum is stored."""
        gradient = r.store(gradient)
        if not r.by_head:
            return gradient
        heads = len(gradient), case.kv_heads, case.group_size
        of_group = gradient.reshape(*heads, *gradient.shape[2:])
        total = of_group[:, :, 0]
        for head in range(1, case.group_size):
            total = r.store(total + of_group[:, :, head])
        return total
