"""The choice of blocks a second time, and its mutants (I1 to I6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nsa_ref.semantics import FLA, PAPER, Semantics
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.mutants.dense import DenseMasks, positions
from nsa_ref.testing.mutants.rounding import RoundedImplementation, Rounding
from nsa_ref.testing.mutants.zoo import mutant


class Selector(DenseMasks, RoundedImplementation):
    """Top-n in a few lines: score, sort, cut, fill up with -1."""

    name = "selector"
    semantics: tuple[Semantics, ...] = (
        PAPER,
        dataclasses.replace(PAPER, causal=False),
        dataclasses.replace(PAPER, compress_alignment="end", compress_strict=True),
        dataclasses.replace(PAPER, forced_score=1.0),
    )

    # steps

    def overlap(self, case: Case) -> np.ndarray:
        """Strides that windows and blocks share: (compressed blocks, selection blocks) (I2)."""
        start = (self.last_tokens(case) + 1 - case.compress_block_size)[:, None]
        first = np.arange(case.num_selection_blocks) * case.selection_block_size
        stop = np.minimum(start + case.compress_block_size, first + case.selection_block_size)
        tokens = np.maximum(stop - np.maximum(start, first), 0)
        return tokens // case.compress_block_sliding_stride

    def probabilities(self, r: Rounding, logits: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """Of all columns, memory among them (I1)."""
        masked = np.where(visible, logits, -np.inf)
        peak = masked.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(masked - np.where(np.isfinite(peak), peak, 0))
        total = r.total(weights)[..., None]
        return r.store(weights / np.where(total > 0, total, 1))

    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        """Of every selection block: (batch, selection heads, q_len, blocks) (I2, I3)."""
        r, visible = self.rounding(case), self.compress_mask(case)
        k = np.concatenate([mem_k, k_cmp], axis=2).repeat(case.group_size, axis=1)
        logits = r.dot(q.astype(r.wide), k.astype(r.wide)) * r.wide(case.scale)
        by_group = (case.batch, case.selection_heads, case.q_heads // case.selection_heads)
        if case.semantics.importance == "overlap":
            p = self.probabilities(r, logits, visible)[..., case.num_mem_kv :]
            each = r.products(p, self.overlap(case).T.astype(r.wide))
            return r.total(np.moveaxis(each.reshape(*by_group, *each.shape[2:]), 2, -1))
        invisible = -np.finfo(r.wide).max / 10
        logits = np.where(visible, logits, invisible)[..., case.num_mem_kv :]
        means = logits.reshape(*by_group, *logits.shape[2:]).mean(2)
        strides = case.strides_per_selection_block
        whole = means.shape[3] // strides
        means = means[..., : whole * strides].reshape(*means.shape[:3], whole, strides).mean(-1)
        scores = np.full((*means.shape[:3], case.num_selection_blocks), -np.inf, r.wide)
        scores[..., :whole] = means
        return self.ranked(np.where(self.candidates(case), scores, r.wide(-np.inf)))

    def ranked(self, means: np.ndarray) -> np.ndarray:
        """What becomes of means of logits: a softmax with one more logit of -1000 (I3)."""
        logits = np.pad(means, ((0, 0),) * 3 + ((0, 1),), constant_values=-1000)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(weights / weights.sum(-1, keepdims=True))[..., :-1]

    def candidates(self, case: Case) -> np.ndarray:
        """Blocks that a row may choose: (q_len, blocks) (I3, I4)."""
        semantics, size = case.semantics, case.selection_block_size
        p, block = positions(case), np.arange(case.num_selection_blocks)
        own, strides = block == p // size, size // case.compress_block_sliding_stride
        candidates = (block * size <= p) | (not semantics.causal)
        if semantics.own_block_extra and semantics.causal:
            candidates &= ~own
        if semantics.importance == "logit_mean":
            candidates &= (block + 1) * strides <= len(self.last_tokens(case))
            candidates &= ~own | (strides == 1)
        return candidates

    def forced(self, case: Case) -> np.ndarray:
        """Candidates that have `forced_score` in place of their own score (I4)."""
        block, own = np.arange(case.num_selection_blocks), positions(case)
        own = own // case.selection_block_size
        local = (own - case.num_local_blocks < block) & (block <= own)
        forced = local | (block < case.num_initial_blocks)
        return forced & self.candidates(case) & (not case.semantics.own_block_extra)

    def forced_total(self, case: Case) -> float:
        """By overlap: `forced_score` of every head that shares the choice (I4)."""
        return case.semantics.forced_score * case.q_heads / case.selection_heads

    def unused(self) -> int:
        return -1

    # the whole

    @np.errstate(invalid="ignore", over="ignore", under="ignore")
    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        candidates = self.candidates(case)
        scores = self.scores(case, q, k_cmp, mem_k)
        scores = np.where(self.forced(case), self.forced_total(case), scores)
        scores = np.where(candidates, scores, -np.inf)
        order = np.argsort(-scores, axis=-1, kind="stable")
        taken = np.arange(order.shape[-1]) < candidates.sum(-1)[:, None]
        if case.semantics.score_floor is not None:
            taken = taken & (np.take_along_axis(scores, order, -1) > case.semantics.score_floor)
        order = np.where(taken, order, self.unused())
        width = case.num_selected_blocks
        chosen = np.full((*order.shape[:3], width), self.unused(), dtype=np.int64)
        chosen[..., : order.shape[-1]] = order[..., :width]
        return chosen


@mutant("I1", "memory does not take part in the softmax")
class MemoryOutsideSoftmax(Selector):
    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        without = dataclasses.replace(case, num_mem_kv=0)
        return super().scores(without, q, k_cmp, mem_k[:, :, :0])


@mutant(
    "I2",
    "eq. 9 is read with 0-based indices as it is printed: off by l'/d - 1",
    seen_in="public kernels, and their references with them",
)
class EquationNineShifted(Selector):
    semantics = (PAPER,)

    def overlap(self, case: Case) -> np.ndarray:
        overlap = np.zeros_like(super().overlap(case))
        strides = case.strides_per_selection_block
        for m in range(strides):
            for n in range(case.compress_block_size // case.compress_block_sliding_stride):
                i = np.arange(overlap.shape[1]) * strides - m - n
                inside = (i >= 0) & (i < len(overlap))
                overlap[i[inside], np.flatnonzero(inside)] += 1
        return overlap


@mutant("I3", "scores are those of the group's first head only")
class FirstHeadOnly(Selector):
    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        alone = dataclasses.replace(case, q_heads=case.kv_heads)
        return super().scores(alone, q[:, :: case.group_size], k_cmp, mem_k)


@mutant("I4", "initial and local blocks are not forced")
class NothingForced(Selector):
    def forced(self, case: Case) -> np.ndarray:
        return np.zeros_like(super().forced(case))


@mutant("I4", "a forced block counts once for a group, and not for every query head")
class ForcedOnceForTheGroup(Selector):
    semantics = (FLA,)

    def forced_total(self, case: Case) -> float:
        return case.semantics.forced_score


@mutant(
    "I4",
    "blocks beyond the 128th are forced no more",
    seen_in="public kernels",
    needs={"num_selection_blocks": "> 128"},
)
class ForcedUpTo128(Selector):
    def forced(self, case: Case) -> np.ndarray:
        forced = super().forced(case)
        forced[..., 128:] = False
        return forced


@mutant("I2", "blocks beyond the 128th are no candidates", needs={"num_selection_blocks": "> 128"})
class CandidatesUpTo128(Selector):
    def candidates(self, case: Case) -> np.ndarray:
        candidates = super().candidates(case)
        candidates[..., 128:] = False
        return candidates


@mutant("I2", "blocks beyond the 256th are no candidates", needs={"num_selection_blocks": "> 256"})
class CandidatesUpTo256(Selector):
    def candidates(self, case: Case) -> np.ndarray:
        candidates = super().candidates(case)
        candidates[..., 256:] = False
        return candidates


@mutant("I2", "P is rounded to bfloat16 before it is summed up, in a port of float32")
class NarrowProbabilities(Selector):
    numerics: Mapping[str, str] = {"float32": "fp32"}

    def probabilities(self, r: Rounding, logits: np.ndarray, visible: np.ndarray) -> np.ndarray:
        p = super().probabilities(r, logits, visible)
        return p.astype(DTYPES["bfloat16"]).astype(r.wide)


@mutant(
    "I6",
    "causal by the block's index where its position is meant",
    seen_in="public kernels",
    method="select",
)
class OwnBlockNoCandidate(Selector):
    def candidates(self, case: Case) -> np.ndarray:
        own = positions(case) // case.selection_block_size
        before = np.arange(case.num_selection_blocks) < own
        return super().candidates(case) & (before | (not case.semantics.causal))


@mutant("I5", "a tie is resolved to a block that begins after p")
class TieIntoTheFuture(Selector):
    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        chosen = super().select(case, q, k_cmp, mem_k)
        future, scores = case.num_selection_blocks - 1, self.scores(case, q, k_cmp, mem_k)
        candidates, forced = self.candidates(case), self.forced(case)
        for b, g, t, slot in np.argwhere(chosen >= 0):
            block = chosen[b, g, t, slot]
            tied = scores[b, g, t, block] == scores[b, g, t, future]
            if tied and not (candidates[t, future] or forced[t, block]):
                chosen[b, g, t, slot] = future
                break
        return chosen


@mutant(
    "I6",
    "slots left over hold block 0 again",
    seen_in="ports whose unused slots hold 0",
    method="select",
)
class SlotsFilledWithZero(Selector):
    def unused(self) -> int:
        return 0


# --- what ran before ------------------------------------------------------------------------------


class _Kept(Selector):
    def __init__(self, *way: Any) -> None:
        super().__init__(*way)
        self.kept: dict[Any, np.ndarray] = {}


@mutant(
    "I4",
    "the next call writes its choice over that of the last",
    seen_in="captured CUDA graphs",
    method="select",
)
class ChoiceOverwritten(_Kept):
    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        chosen = super().select(case, q, k_cmp, mem_k)
        place = self.kept.setdefault(chosen.shape, chosen)
        place[...] = chosen
        return place


@mutant("I4", "the choice is kept, and serves the next call of the same sizes", method="select")
class ChoiceOfAnotherCall(_Kept):
    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        if case not in self.kept:
            self.kept[case] = super().select(case, q, k_cmp, mem_k)
        return self.kept[case].copy()
