"""The zoo: the oracle with one decision changed, and the clause that must notice.

Each mutant is a mistake that somebody has made, or could. Those of the masks stand in
`nsa_ref.testing.mutants`; those of the arithmetic change one line of `Kernel`, a second, dense
implementation of attention that is right as it stands.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nsa_ref.compress import compress_windows
from nsa_ref.selection import (
    compress_probabilities,
    forced_blocks,
    importance,
    selection_candidates,
)
from nsa_ref.semantics import PAPER
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.mutants import mutant

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
        windows = compress_windows(case.kv_len, case, case.semantics)
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
        return importance(q, k_cmp, mem_k, kv_len=case.kv_len, sizes=case, semantics=case.semantics)

    def candidates(self, case: Case) -> np.ndarray:
        return selection_candidates(case.q_len, case.kv_len, case, case.semantics)

    def forced(self, case: Case) -> np.ndarray:
        return forced_blocks(case.q_len, case.kv_len, case, case.semantics)

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
        return super().scores(dataclasses.replace(case, num_mem_kv=0), q, k_cmp, mem_k[:, :, :0])


@mutant("I2", "eq. 9 read with 0-based indices as printed: off by l'/d - 1")
class EquationNineShifted(Selector):
    semantics = (PAPER,)

    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        p_cmp = compress_probabilities(
            q, k_cmp, mem_k, kv_len=case.kv_len, sizes=case, semantics=case.semantics
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
        alone = dataclasses.replace(case, q_heads=case.kv_heads)
        return super().scores(alone, q[:, :: case.group_size], k_cmp, mem_k)


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
