"""Is somebody else's choice of blocks a valid top-n, given how exactly scores can be known?"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from nsa_ref.checks import as_float64, check_shape
from nsa_ref.masks import check_block_indices
from nsa_ref.selection import (
    Scored,
    check_scored,
    ranked_scores,
    top_blocks,
)
from nsa_ref.semantics import PAPER, Semantics
from nsa_ref.sizes import Sizes

VALID = "valid"
AMBIGUOUS = "ambiguous"
INVALID = "invalid"

#: What a choice may break: "order" is a better block that was left out for a worse one.
Rule = Literal[
    "named once", "candidates", "at most n", "forced", "all candidates", "floor", "order"
]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a row is not VALID; `wording.choice` makes a sentence of it.

    verdict : AMBIGUOUS or INVALID
    clause : what is broken; I5 where the bounds leave it open
    rule : what is broken, in a word
    block : the block that breaks the rule; None for "at most n"
    count : "named once": how often the block is named; "at most n": how many blocks are named
    n : num_selected_blocks
    candidates : of the row
    floor : `score_floor`, where there is one
    worse : "order": the block that was taken in the place of `block`
    scores : "order": those of `block` and `worse`
    bound : "order": the sum of the bounds of the two scores
    """

    verdict: str = INVALID
    clause: str = "I4"
    rule: Rule
    block: int | None = None
    count: int = 0
    n: int = 0
    candidates: tuple[int, ...] = ()
    floor: float | None = None
    worse: int | None = None
    scores: tuple[float, ...] = ()
    bound: float = 0.0


class SelectionVerdict(NamedTuple):
    """What `valid_selection` finds.

    verdict : (batch, heads, q_len) of the strings VALID, AMBIGUOUS, INVALID
    reasons : (batch, heads, q_len) -> Reason, for every row that is not VALID
    """

    verdict: np.ndarray
    reasons: dict[tuple[int, int, int], Reason]


def valid_selection(
    block_indices: np.ndarray,
    blocks: Scored,
    score_bounds: np.ndarray,
    *,
    sizes: Sizes,
    semantics: Semantics = PAPER,
) -> SelectionVerdict:
    """Is this choice of blocks a valid top-n, given how exactly the scores can be known?

    Indices below 0 or not below the number of blocks are dropped, in any slot (I6). The rest of
    a row is VALID iff

    ::

        distinct candidates, at most n of them, all forced ones among them (I4; where more than n
            are forced at an infinite score, the lowest n)
        min(n, candidates) of them (I6), unless score_floor took some: then every candidate that
            was left out is at the floor or below, and every one that was taken is above (I4)
        no candidate that was left out scores higher than one that was taken (I4); equal scores
            may be resolved either way (I5)

    A comparison that comes out wrong, but by no more than the bounds of its two scores, makes the
    row AMBIGUOUS (I5); by more, INVALID.

    Shapes
    ------
    block_indices : (batch, heads, q_len, slots) integers
    blocks : what `nsa_ref.selection.scored` returns
    score_bounds : (batch, heads, q_len, blocks), the largest error of each score, or of what
        stands in its place; inf or NaN where none is known
    returns : SelectionVerdict(verdict, reasons)

    Raises
    ------
    ValueError : shapes that do not fit, a candidate whose score is NaN, a negative bound
    TypeError : block_indices that are no integers, arrays that hold no numbers

    Source
    ------
    I4, I5, I6
    """
    blocks = check_scored(blocks, semantics)
    batch, heads, q_len, _ = blocks.scores.shape
    block_indices = np.asarray(block_indices)
    check_block_indices(block_indices, q_len)
    check_shape("block_indices", block_indices.shape, (batch, heads, q_len, "slots"))
    known = _Known.of(blocks, score_bounds, sizes, semantics)

    verdict = np.full((batch, heads, q_len), VALID, dtype="<U9")
    reasons: dict[tuple[int, int, int], Reason] = {}
    for b, g, t in np.ndindex(batch, heads, q_len):
        named = [int(block) for block in block_indices[b, g, t]]
        reason = _judge_row(named, known, (b, g, t), sizes.num_selected_blocks, semantics)
        if reason is not None:
            verdict[b, g, t], reasons[b, g, t] = reason.verdict, reason
    return SelectionVerdict(verdict, reasons)


def undecided_rows(
    blocks: Scored, score_bounds: np.ndarray, *, sizes: Sizes, semantics: Semantics = PAPER
) -> np.ndarray:
    """Rows for which more than one choice of blocks is valid, given the scores' bounds.

    ::

        some block of the top n and some candidate left out differ in score by no more than the sum
        of their bounds; or the score of a candidate lies within its bound of `score_floor`

    Shapes
    ------
    blocks, score_bounds : as in `valid_selection`
    returns : (batch, heads, q_len) bool

    Raises
    ------
    ValueError, TypeError : as `valid_selection`

    Source
    ------
    I5
    """
    blocks = check_scored(blocks, semantics)
    known = _Known.of(blocks, score_bounds, sizes, semantics)
    ranked, bounds, floor = known.ranked, known.bounds, semantics.score_floor
    chosen = top_blocks(blocks, sizes, dataclasses.replace(semantics, score_floor=None))
    undecided = np.zeros(blocks.scores.shape[:3], dtype=bool)
    for row in np.ndindex(undecided.shape):
        rank, bound, taken = ranked[row], bounds[row], chosen[row][chosen[row] >= 0]
        left = blocks.candidates[row[2]].copy()
        left[taken] = False
        # forced: where even those are too many, the lowest are taken (I4)
        better = taken[~np.isinf(rank[taken])]
        gaps = rank[better][:, None] - rank[left]
        undecided[row] = (gaps <= bound[better][:, None] + bound[left]).any()
        if floor is not None:
            low, high = rank[taken] - bound[taken], rank[taken] + bound[taken]
            undecided[row] |= ((low <= floor) & (floor < high)).any()
    return undecided


class _Known(NamedTuple):
    """What is known of the scores.

    ranked, bounds : (batch, heads, q_len, blocks), what top-n ranks, and its largest error
    candidates, forced : (q_len, blocks) bool
    """

    ranked: np.ndarray
    bounds: np.ndarray
    candidates: np.ndarray
    forced: np.ndarray

    @classmethod
    def of(
        cls, blocks: Scored, score_bounds: np.ndarray, sizes: Sizes, semantics: Semantics
    ) -> _Known:
        ranked = ranked_scores(blocks, sizes, semantics)
        return cls(ranked, _whole_bounds(score_bounds, blocks), blocks.candidates, blocks.forced)


def _judge_row(
    named: list[int], known: _Known, row: tuple[int, int, int], n: int, semantics: Semantics
) -> Reason | None:
    """What is wrong with one row, or what may be; None if it is valid."""
    ranked, bounds = known.ranked[row], known.bounds[row]
    candidate, forced = known.candidates[row[2]], known.forced[row[2]]
    num_blocks = len(ranked)
    taken = [block for block in named if 0 <= block < num_blocks]
    left = [block for block in range(num_blocks) if candidate[block] and block not in taken]
    doubt: Reason | None = None

    for block in taken:
        if taken.count(block) > 1:
            return Reason(rule="named once", block=block, count=taken.count(block))
        if not candidate[block]:
            listed = tuple(np.flatnonzero(candidate).tolist())
            return Reason(rule="candidates", block=block, candidates=listed)
    if len(taken) > n:
        return Reason(rule="at most n", count=len(taken), n=n)
    if math.isinf(semantics.forced_score):
        for block in np.flatnonzero(forced)[:n].tolist():
            if block not in taken:
                return Reason(rule="forced", block=block)

    low, high = ranked - bounds, ranked + bounds
    floor = semantics.score_floor
    at_floor = Reason(verdict=AMBIGUOUS, clause="I5", rule="floor", floor=floor)
    if len(taken) < min(n, len(taken) + len(left)):
        for block in left:
            if floor is None or low[block] > floor:
                return Reason(clause="I6", rule="all candidates", block=block, floor=floor)
            if ranked[block] > floor:
                doubt = dataclasses.replace(at_floor, block=block)
    for block in taken:
        if floor is not None and high[block] <= floor:
            return Reason(rule="floor", block=block, floor=floor)
        if floor is not None and ranked[block] <= floor:
            doubt = dataclasses.replace(at_floor, block=block)

    for worse in taken:
        for better in left:
            if not ranked[better] > ranked[worse]:
                continue
            scores = float(ranked[better]), float(ranked[worse])
            bound = float(bounds[better] + bounds[worse])
            gap = Reason(rule="order", block=better, worse=worse, scores=scores, bound=bound)
            if scores[0] - scores[1] > bound:
                return gap
            doubt = dataclasses.replace(gap, verdict=AMBIGUOUS, clause="I5")
    return doubt


def _whole_bounds(score_bounds: np.ndarray, blocks: Scored) -> np.ndarray:
    """A number for every block: the largest there is for what is unknown, 0 for no candidate."""
    scores = blocks.scores
    bounds = as_float64("score_bounds", score_bounds)
    check_shape("score_bounds", bounds.shape, scores.shape)
    bounds = np.where(np.isfinite(bounds), bounds, np.finfo(np.float64).max)
    usable = np.broadcast_to(blocks.candidates, scores.shape)
    if (wrong := bounds[usable & (bounds < 0)]).size:
        raise ValueError(f"score_bounds holds {wrong[0]} at a candidate; it must be at least 0.")
    return np.where(usable, bounds, 0)
