"""The judge of somebody else's choice of blocks (I4, I5, I6)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_ref import FLA, PAPER, Scored, Semantics, Sizes
from nsa_ref.testing.choices import AMBIGUOUS, INVALID, VALID, undecided_rows, valid_selection
from nsa_ref.testing.wording import choice
from tables import scored_row

FLOOR = dataclasses.replace(PAPER, score_floor=0.25)


def judge(
    named: list[int],
    scores: list[float],
    n: int,
    *,
    bound: float | list[float] = 0.0,
    candidates: Any = None,
    forced: Any = (),
    semantics: Semantics = PAPER,
) -> tuple[str, str | None, str]:
    """(verdict, clause, sentence) of valid_selection for one row."""
    blocks = scored_row(scores, candidates, forced)
    verdict, reasons = valid_selection(
        np.array(named, dtype=np.int64)[None, None, None],
        blocks,
        np.broadcast_to(bound, blocks.scores.shape),
        sizes=Sizes(num_selected_blocks=n),
        semantics=semantics,
    )
    reason = reasons.get((0, 0, 0))
    if reason is None:
        return str(verdict[0, 0, 0]), None, ""
    assert reason.verdict == verdict[0, 0, 0]
    return reason.verdict, reason.clause, choice(reason)


def test_i4_the_top_n_is_valid_in_any_order_with_minus_one_in_any_slot():
    for named in ([1, 3], [3, 1], [-1, 1, -1, 3], [3, 99, 1, -5]):
        assert judge(named, [0.1, 0.4, 0.2, 0.3], 2) == (VALID, None, "")


def test_i4_a_block_that_is_beaten_is_invalid_and_the_reason_names_both():
    verdict, clause, sentence = judge([1, 2], [0.1, 0.4, 0.2, 0.3], 2)
    assert (verdict, clause) == (INVALID, "I4")
    assert "block 3 (score 0.2999" in sentence and "block 2 (score 0.2000" in sentence
    assert "larger than the bound 0 of the two" in sentence
    _, _, sentence = judge([1, 2], [0.1, 0.4, 0.2, 0.25], 2, bound=0.25)
    assert sentence == (
        "block 3 (score 0.25) was left out and block 2 (score 0.20000000000000001) taken: the gap "
        "0.05 is within the bound 0.5 of the two."
    )


def test_i4_what_is_no_candidate_may_not_be_taken():
    verdict = judge([0, 3], [0.1, 0.4, 0.2, 0.3], 2, candidates=[0, 1, 2])
    assert verdict == (INVALID, "I4", "block 3 is no candidate; candidates are [0, 1, 2].")


def test_i4_a_block_may_be_named_only_once():
    verdict = judge([1, 1], [0.1, 0.4, 0.2], 2)
    assert verdict == (INVALID, "I4", "block 1 is named 2 times.")


def test_i4_no_more_than_n_blocks_may_be_taken():
    verdict = judge([0, 1, 2], [0.1, 0.4, 0.2], 2)
    assert verdict == (INVALID, "I4", "3 blocks are named, num_selected_blocks=2.")


def test_i4_forced_blocks_must_be_among_the_chosen_the_lowest_if_they_are_too_many():
    scores = [0.1, 0.4, 0.2, 0.3]
    assert judge([0, 1], scores, 2, forced=[0])[0] == VALID
    assert judge([1, 3], scores, 2, forced=[0]) == (
        INVALID, "I4", "block 0 is forced and was left out.",
    )  # fmt: skip
    assert judge([0, 2], scores, 2, forced=[0, 2, 3])[0] == VALID
    assert judge([2, 3], scores, 2, forced=[0, 2, 3])[:2] == (INVALID, "I4")
    # at a finite score they only compete, and tie
    assert judge([2, 3], scores, 2, forced=[0, 2, 3], semantics=FLA)[0] == VALID
    assert judge([1, 0], scores, 2, forced=[0, 3], semantics=FLA)[:2] == (INVALID, "I4")


def test_i5_equal_scores_may_be_resolved_either_way():
    for named in ([0, 1], [0, 2], [2, 0]):
        assert judge(named, [0.4, 0.3, 0.3], 2)[0] == VALID


def test_i5_a_gap_within_the_bounds_is_ambiguous_and_one_beyond_is_not():
    scores = [0.5, 0.375, 0.25]
    assert judge([0, 2], scores, 2, bound=[1.0, 0.0625, 0.0625])[:2] == (AMBIGUOUS, "I5")
    assert judge([0, 2], scores, 2, bound=[1.0, 0.0625, 0.0624])[:2] == (INVALID, "I4")
    assert judge([0, 1], scores, 2, bound=1.0)[0] == VALID


def test_i6_all_candidates_must_be_taken_where_they_are_fewer_than_n():
    assert judge([2, 0], [0.1, 0.4, 0.2], 3, candidates=[0, 2])[0] == VALID
    verdict = judge([2, -1], [0.1, 0.4, 0.2], 3, candidates=[0, 2])
    assert verdict == (INVALID, "I6", "block 0 was left out with a slot to spare.")
    assert judge([-1], [0.1], 1, candidates=[])[0] == VALID
    assert judge([], [0.1], 0)[0] == VALID


def test_i4_the_floor_takes_what_is_at_or_below_it_and_nothing_else():
    scores = [0.5, 0.25, 0.375]
    assert judge([0, 2, -1], scores, 3, semantics=FLOOR)[0] == VALID
    assert judge([0, 2, 1], scores, 3, semantics=FLOOR)[:2] == (INVALID, "I4")
    assert judge([0, -1, -1], scores, 3, semantics=FLOOR)[:2] == (INVALID, "I6")
    assert judge([0, 2, 1], scores, 3, semantics=FLOOR, bound=0.125)[:2] == (AMBIGUOUS, "I5")
    assert judge([0, -1, -1], scores, 3, semantics=FLOOR, bound=0.125) == (
        AMBIGUOUS, "I5", "block 2: score_floor=0.25 is within its bound.",
    )  # fmt: skip
    assert judge([0, -1, -1], scores, 3, semantics=FLOOR, bound=0.124)[:2] == (INVALID, "I6")
    row = judge([0, 1, 2], scores, 3, semantics=FLOOR)
    assert row[2] == "block 1 was taken, and its score is not above score_floor=0.25."


def test_an_invalid_row_is_told_with_its_place_and_rule():
    scores = np.zeros((1, 2, 2, 3))
    scores[..., 2] = 1
    indices = np.array([[[2], [-1]], [[0], [2]]])[None]
    candidates = np.array([[True, True, True], [False, False, False]])
    blocks = Scored(scores, candidates, forced=np.zeros((2, 3), bool))
    result = valid_selection(indices, blocks, np.zeros(scores.shape), sizes=Sizes())
    assert result.verdict.tolist() == [[[VALID, VALID], [INVALID, INVALID]]]
    rules = {place: (why.clause, why.rule, why.block) for place, why in result.reasons.items()}
    assert rules == {(0, 1, 0): ("I4", "order", 2), (0, 1, 1): ("I4", "candidates", 2)}


def valid_sets(score, forced, n, semantics) -> set[frozenset[int]]:
    """Every choice that I4, I5 and I6 allow when the scores are exact, by trying all subsets.

    score : of every candidate
    """
    m = min(n, len(score))
    best = sorted(score.values(), reverse=True)[:m]
    must = sorted(b for b in score if b in forced and math.isinf(score[b]))[:n]
    floor = semantics.score_floor
    return {
        frozenset(b for b in subset if floor is None or score[b] > floor)
        for subset in itertools.combinations(score, m)
        if sorted((score[b] for b in subset), reverse=True) == best and set(must) <= set(subset)
    }


EIGHTHS = st.integers(0, 6).map(lambda eighths: eighths / 8)


@given(
    row=st.lists(
        st.tuples(EIGHTHS, EIGHTHS.map(lambda x: x / 4), st.booleans(), st.booleans()), max_size=4
    ),
    n=st.integers(0, 4),
    semantics=st.sampled_from([PAPER, FLA, FLOOR, dataclasses.replace(FLOOR, forced_score=0.5)]),
)
@settings(deadline=None, max_examples=100)
def test_the_verdict_on_every_subset_is_that_of_trying_all_choices(row, n, semantics):
    """VALID: allowed under the scores. AMBIGUOUS: allowed under some scores within the bounds, and
    the most favourable ones lift what was taken and lower what was left. INVALID: neither.
    A row is undecided if more than one choice is not INVALID; also where equal scores are both
    below the floor, which leaves one choice."""
    scores, bounds = [block[0] for block in row], [block[1] for block in row]
    possible = 0
    candidates = [b for b, block in enumerate(row) if block[2]]
    forced = [b for b, block in enumerate(row) if block[2] and block[3]]
    exact = {b: semantics.forced_score if b in forced else scores[b] for b in candidates}
    for size in range(len(row) + 1):
        for taken in itertools.combinations(range(len(row)), size):
            moved = {b: exact[b] + (bounds[b] if b in taken else -bounds[b]) for b in candidates}
            if frozenset(taken) in valid_sets(exact, forced, n, semantics):
                expected = VALID
            elif frozenset(taken) in valid_sets(moved, forced, n, semantics):
                expected = AMBIGUOUS
            else:
                expected = INVALID
            verdict, _, sentence = judge(
                list(taken), scores, n, bound=bounds, candidates=candidates, forced=forced,
                semantics=semantics,
            )  # fmt: skip
            assert verdict == expected, f"{taken}: {sentence}"
            possible += verdict != INVALID
    undecided = undecided_rows(
        scored_row(scores, candidates, forced),
        np.broadcast_to(bounds, (1, 1, 1, len(scores))),
        sizes=Sizes(num_selected_blocks=n),
        semantics=semantics,
    )
    assert undecided if possible > 1 else semantics.score_floor is not None or not undecided


# --- bounds ---------------------------------------------------------------------------------------

TWO = scored_row([0.0, 0.0])
FIRST = np.zeros((1, 1, 1, 1), int)


def test_a_bound_that_is_not_known_is_as_large_as_any():
    apart = scored_row([0.0, 1.0])
    for unknown in (math.inf, math.nan):
        bounds = np.array([[[[0.0, unknown]]]])
        assert valid_selection(FIRST, apart, bounds, sizes=Sizes()).verdict.item() == AMBIGUOUS
        assert undecided_rows(apart, bounds, sizes=Sizes()).all()


def test_blocks_that_are_no_candidates_need_no_bound():
    alone = scored_row([0.0, 0.0], candidates=[0])
    bounds = np.array([[[[0.0, math.nan]]]])
    assert valid_selection(FIRST, alone, bounds, sizes=Sizes()).verdict == VALID
    assert not undecided_rows(alone, bounds, sizes=Sizes()).any()


@pytest.mark.parametrize(
    ("message", "bounds"),
    [
        ("score_bounds holds -1.0 at a candidate; it must be at least 0", TWO.scores - 1),
        ("score_bounds has shape (1, 1, 2); it must be (1, 1, 1, 2)", np.zeros((1, 1, 2))),
        ("score_bounds has shape (1, 1, 1, 1); it must be (1, 1, 1, 2)", np.zeros((1, 1, 1, 1))),
        ("score_bounds has shape (1, 1, 1, 3); it must be (1, 1, 1, 2)", np.zeros((1, 1, 1, 3))),
    ],
)
def test_bounds_that_do_not_fit_are_refused(message, bounds):
    with pytest.raises(ValueError, match=re.escape(message)):
        valid_selection(FIRST, TWO, bounds, sizes=Sizes())


def test_a_choice_that_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="block_indices has dtype float64; it must hold integers"):
        valid_selection(FIRST * 1.0, TWO, TWO.scores, sizes=Sizes())
    shape = r"block_indices has shape \(1, 1, 1\); it must be \(batch, heads, q_len=1, n\)"
    with pytest.raises(ValueError, match=shape):
        valid_selection(FIRST[0], TWO, TWO.scores, sizes=Sizes())
