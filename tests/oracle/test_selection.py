"""The oracle's selection (clauses I): importance and top-n."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_ref import (
    FLA,
    LUCIDRAINS,
    LUCIDRAINS_FLEX,
    PAPER,
    Semantics,
    Sizes,
    compress_probabilities,
    forced_blocks,
    importance,
    scored,
    select,
    selection_candidates,
    selection_probability,
    shared_strides,
    top_blocks,
)
from nsa_ref.selection import logit_means
from nsa_ref.selection_bounds import score_bounds
from nsa_ref.testing import Case
from nsa_ref.testing.choices import INVALID, VALID, valid_selection
from nsa_ref.testing.mutants.selection import Selector
from refusals import NO_SEMANTICS, NO_SIZES, refusal_test
from small_cases import cases, reaches
from tables import rows, scored_row, strides

NON_CAUSAL = dataclasses.replace(PAPER, causal=False)
END = dataclasses.replace(PAPER, compress_alignment="end")
FLOOR = dataclasses.replace(PAPER, score_floor=0.25)
PAIRS = Sizes(selection_block_size=2)  # of tokens
FEW = st.integers(1, 4)
#: Every switch of the selection.
CASES = cases(
    "selection",
    causal=(True, False),
    compress_alignment=("start", "end"),
    compress_strict=(False, True),
    importance=("overlap", "logit_mean"),
    share_selection=(True, False),
    forced_score=(math.inf, 1.0, 0.5),
    own_block_extra=(False, True),
    score_floor=(None, 1e-10, 0.25),
)


def given_to_select(case: Case) -> tuple[list[np.ndarray], dict[str, Any]]:
    """q, k_cmp, mem_k, and the keywords that go with them."""
    q, k_cmp, _, mem_k, _ = case.compressed()
    return [q, k_cmp, mem_k], {"kv_len": case.kv_len, **case.geometry}


def the_scores(case: Case) -> np.ndarray:
    arrays, how = given_to_select(case)
    return importance(*arrays, **how)


CORNERS = {
    "memory": lambda case: case.num_mem_kv and case.semantics.importance == "overlap",
    "GQA": lambda case: case.q_heads > case.kv_heads > 1,
    "forced > n": lambda case: (
        Selector().forced(case).sum(axis=-1).max(initial=0) > case.num_selected_blocks
    ),
    "tie": lambda case: (np.diff(np.sort(the_scores(case), axis=-1)) == 0).any(),
    "below the floor": lambda case: (
        (case.semantics.score_floor, case.semantics.importance) == (0.25, "overlap")
        and ((the_scores(case) > 0) & (the_scores(case) < 0.25)).any()
    ),
}
EDGES = "partial last block", "kv_len < q_len", "n > blocks", "n = 0", "kv_len < l'", "batch 0"


@pytest.mark.parametrize("corner", [*CORNERS.values(), *EDGES], ids=[*CORNERS, *EDGES])
def test_selection_cases_reach_the_corner(corner):
    reaches(CASES, corner, within=300)


# --- candidates and forced blocks -----------------------------------------------------------------


def test_i4_candidates_begin_at_or_before_the_query():
    assert rows(selection_candidates(5, 5, PAIRS)) == ["100", "100", "110", "110", "111"]
    assert rows(selection_candidates(1, 5, PAIRS)) == ["111"]
    assert rows(selection_candidates(3, 1, PAIRS)) == ["0", "0", "1"]
    assert rows(selection_candidates(2, 5, PAIRS, NON_CAUSAL)) == ["111", "111"]


def test_i3_logit_mean_takes_no_incomplete_block_and_no_own_block_unless_strides_are_blocks():
    upstream = dataclasses.replace(LUCIDRAINS, causal=False)
    # 5 tokens, l' = 2: the third block lacks a token; with d = 1 the own block is out as well
    one = selection_candidates(5, 5, PAIRS, upstream)
    assert rows(one) == ["010", "010", "100", "100", "110"]
    whole = dataclasses.replace(PAIRS, compress_block_sliding_stride=2)
    assert rows(selection_candidates(5, 5, whole, upstream)) == ["110"] * 5
    # windows that start at their stride and are 4 long: block 1 lacks its last compressed block
    start = dataclasses.replace(upstream, compress_alignment="start")
    long = dataclasses.replace(PAIRS, compress_block_size=4)
    assert rows(selection_candidates(1, 6, long, start)) == ["100"]


def test_i4_initial_and_local_blocks_are_forced_where_they_are_candidates():
    def forced(q_len: int, kv_len: int, initial: int, local: int, size: int = 2) -> list[str]:
        blocks = {"num_initial_blocks": initial, "num_local_blocks": local}
        return rows(forced_blocks(q_len, kv_len, Sizes(selection_block_size=size, **blocks)))

    assert forced(8, 8, 1, 2) == ["1000", "1000", "1100", "1100", "1110", "1110", "1011", "1011"]
    assert forced(2, 8, 0, 1) == ["0001", "0001"]
    assert forced(2, 8, 9, 0) == ["1111", "1111"]
    assert forced(1, 8, 0, 0) == ["0000"]
    assert forced(3, 2, 1, 1, size=1) == ["00", "10", "11"]


@given(case=CASES)
@settings(deadline=None, max_examples=150)
def test_i3_i4_candidates_and_forced_blocks_are_those_of_the_second_definition(case):
    given = case.q_len, case.kv_len, case, case.semantics
    np.testing.assert_array_equal(selection_candidates(*given), Selector().candidates(case))
    np.testing.assert_array_equal(forced_blocks(*given), Selector().forced(case))


# --- importance -----------------------------------------------------------------------------------


def test_i1_memory_takes_part_in_the_softmax_and_is_no_candidate():
    """Equal logits: row p of 3 compressed blocks and 1 memory column gives each 1 / (p + 2)."""
    q, k_cmp, mem_k = np.zeros((1, 1, 3, 1)), np.zeros((1, 1, 3, 1)), np.zeros((1, 1, 1, 1))
    p_cmp = compress_probabilities(q, k_cmp, mem_k, kv_len=3, sizes=Sizes(num_mem_kv=1))
    assert p_cmp[0, 0].tolist() == [[0.5, 0, 0], [1 / 3, 1 / 3, 0], [0.25, 0.25, 0.25]]


@given(kv_len=st.integers(0, 14), d=FEW, windows=FEW, blocks=FEW)
@settings(deadline=None, max_examples=100)
def test_i2_the_strides_that_are_shared_are_the_sum_that_eq_9_prints(kv_len, d, windows, blocks):
    """sum over m < l'/d, n < l/d of p_cmp[l'/d j - m - n], with j and p_cmp counted from 1; windows
    that end at their stride stand at l'/d j + m + n, counted from 0."""
    sizes = dataclasses.replace(strides(windows * d, d), selection_block_size=blocks * d)
    for semantics in (PAPER, END):
        count = shared_strides(kv_len, sizes, semantics)
        printed = np.zeros_like(count)
        for j, m, n in np.ndindex(count.shape[1], blocks, windows):
            i = blocks * (j + 1) - m - n - 1 if semantics is PAPER else blocks * j + m + n
            if 0 <= i < len(count):
                printed[i, j] += 1
        assert count.dtype == np.int64
        np.testing.assert_array_equal(count, printed)


def test_i2_equal_sizes_make_the_importance_the_probability_itself():
    """l = d = l': eq. 9 is the identity, as the paper says above it."""
    for semantics in (PAPER, END):
        np.testing.assert_array_equal(shared_strides(9, strides(3, 3), semantics), np.eye(3))


def test_i2_a_score_is_the_overlap_weighted_sum_of_probabilities():
    """Equal logits of 5 windows, 1/5 each; blocks share 3, 4 and 3 strides with them."""
    q, k_cmp, none = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 5, 1)), np.zeros((1, 1, 0, 1))
    straddling = dataclasses.replace(strides(4, 2), selection_block_size=4)
    score = importance(q, k_cmp, none, kv_len=12, sizes=straddling)
    assert [round(5 * x, 9) for x in score[0, 0, 0]] == [3, 4, 3]


def test_i5_blocks_that_are_alike_have_equal_scores():
    """The first and the last block share two strides and one with their windows, or one and two:
    the sums over the windows, and over the heads, round alike."""
    for group, blocks in itertools.product(range(1, 9), range(2, 9)):
        windows = 2 * blocks - 1
        q, k_cmp = np.zeros((1, group, 1, 1)), np.zeros((1, 1, windows, 1))
        straddling = dataclasses.replace(strides(4, 2), selection_block_size=4, q_heads=group)
        score = importance(q, k_cmp, k_cmp[:, :, :0], kv_len=4 * blocks, sizes=straddling)
        assert score[0, 0, 0, 0] == score[0, 0, 0, -1]


def test_i3_scores_are_summed_over_the_group_or_kept_per_query_head():
    """Two query heads, one kv head: one-hot probabilities on blocks 0 and 1."""
    q = np.array([1000.0, -1000.0]).reshape(1, 2, 1, 1)
    k_cmp = np.array([1.0, -1.0]).reshape(1, 1, 2, 1)
    how = {"kv_len": 2, "sizes": Sizes(q_heads=2)}
    none = np.zeros((1, 1, 0, 1))
    assert importance(q, k_cmp, none, **how).tolist() == [[[[1, 1]]]]
    alone = dataclasses.replace(PAPER, share_selection=False)
    assert importance(q, k_cmp, none, **how, semantics=alone).tolist() == [[[[1, 0]], [[0, 1]]]]


def test_i3_means_are_over_group_and_strides_and_minus_inf_off_the_candidates():
    """Logits 1, 2, 3, ... of two heads, the second ten times the first; l' = 2 d."""
    q = np.array([1.0, 10.0]).reshape(1, 2, 1, 1)
    k_cmp = np.arange(1.0, 7.0).reshape(1, 1, 6, 1)
    sizes = Sizes(q_heads=2, selection_block_size=2, num_mem_kv=1)
    means = logit_means(q, k_cmp, 6, sizes, LUCIDRAINS)
    assert means.tolist() == [[[[(1 + 2 + 10 + 20) / 4, (3 + 4 + 30 + 40) / 4, -math.inf]]]]


def test_i3_an_invisible_logit_counts_as_a_tenth_of_the_lowest_number_and_never_overflows():
    """The own block at p = 2 with l' = 2: of its two strides only the first is visible."""
    semantics = dataclasses.replace(LUCIDRAINS, own_block_extra=False, compress_strict=False)
    sizes = dataclasses.replace(PAIRS, q_heads=12, compress_block_sliding_stride=2)
    q, k_cmp = np.ones((1, 12, 2, 1)), np.ones((1, 1, 2, 1))
    means = logit_means(q, k_cmp, 4, sizes, semantics)
    lowest = -np.finfo(np.float64).max / 10
    assert means.tolist() == [[[[1.0, lowest], [1.0, 1.0]]]]  # p = 2: block 1 is not over
    assert selection_probability(means)[0, 0, 0].tolist() == [1.0, 0.0]


def test_i3_logit_mean_scores_a_block_by_the_softmax_of_the_means():
    """Means log 1 and log 3 at the last query; a block that is no candidate scores 0."""
    q, k_cmp = np.ones((1, 1, 1, 1)), np.log([1.0, 3.0, 9.0])[None, None, :, None]
    how = {"kv_len": 3, "sizes": Sizes(), "semantics": LUCIDRAINS}
    score = importance(q, k_cmp, k_cmp[:, :, :0], **how)
    weights = [np.exp(-np.log(3.0)), 1.0]  # 1 and 3, below the largest
    assert score.tolist() == [[[[*(w / sum(weights) for w in weights), 0.0]]]]
    assert score.round(2).tolist() == [[[[0.25, 0.75, 0.0]]]]


def test_i3_the_pad_takes_the_probability_where_nothing_is_visible():
    lowest = -np.finfo(np.float64).max / 10
    means = np.array([[lowest, -math.inf], [-1000.0, -math.inf], [0.0, 0.0], [-1e3, -1e3]])
    expected = [[0, 0], [0.5, 0], [0.5, 0.5], [1 / 3, 1 / 3]]
    assert selection_probability(means).tolist() == expected
    assert selection_probability(np.zeros((2, 0))).shape == (2, 0)


@pytest.mark.parametrize("complex_one", ["q", "k_cmp", "mem_k"])
@pytest.mark.parametrize("semantics", [PAPER, LUCIDRAINS])
def test_i1_i3_complex_numbers_pass_through_from_every_argument(semantics, complex_one):
    """Two equal logits, of which the second has an imaginary step: 1/2 each, less or more a quarter
    of the step. One of the two is of memory, which has no part in means."""
    step = 2.0**-100
    given = {"q": np.ones(1), "k_cmp": np.zeros(2), "mem_k": np.zeros(0)}
    expected = [0.5 - 0.25j * step, 0.5 + 0.25j * step]
    if complex_one == "q":  # the step is in the logits' difference: k_cmp is 0 and 1
        given |= {"q": np.array([1j * step]), "k_cmp": np.array([0.0, 1.0])}
    elif complex_one == "k_cmp":
        given["k_cmp"] = np.array([0, 1j * step])
    else:
        given |= {"k_cmp": np.zeros(1), "mem_k": np.array([1j * step])}
        expected = expected[:1] if semantics is PAPER else [1]
    q, k_cmp, mem_k = (x.reshape(1, 1, -1, 1) for x in given.values())
    blocks = k_cmp.shape[2]
    how = {"kv_len": blocks, "sizes": Sizes(num_mem_kv=mem_k.shape[2])}
    whole = dataclasses.replace(semantics, own_block_extra=False, compress_strict=False)
    score = importance(q, k_cmp, mem_k, **how, semantics=whole)
    assert score.dtype == complex or complex_one == "mem_k"
    assert score.ravel().tolist() == expected
    if semantics is PAPER:
        found = compress_probabilities(q, k_cmp, mem_k, **how)
        assert found.ravel().tolist() == expected


@given(case=CASES)
@settings(deadline=None, max_examples=150)
def test_i1_i2_i3_scores_are_those_of_the_second_definition(case):
    """Masks, overlaps and means of whole arrays; within the bounds of a float64 kernel."""
    arrays, how = given_to_select(case)
    expected, actual = Selector().scores(case, *arrays), importance(*arrays, **how)
    forced = forced_blocks(case.q_len, case.kv_len, case, case.semantics)
    bounds = score_bounds(*arrays, **how, numerics="fp64")
    assert actual.shape == expected.shape
    assert (abs(actual - expected)[..., ~forced] <= bounds[..., ~forced]).all()


# --- top-n ----------------------------------------------------------------------------------------


def top(
    scores: list[float], n: int, *, group: int = 1, semantics: Semantics = PAPER, **blocks: Any
) -> list[int]:
    """top_blocks for one row."""
    sizes = Sizes(num_selected_blocks=n, q_heads=group)
    found = top_blocks(scored_row(scores, **blocks), sizes, semantics)
    return found[0, 0, 0].tolist()


def test_i4_the_n_highest_scores_are_taken_best_first():
    assert top([0.1, 0.4, 0.2, 0.3], 2) == [1, 3]
    assert top([0.1, 0.4, 0.2, 0.3], 2, candidates=[0, 2]) == [2, 0]
    assert top([0.1, 0.4], 0) == []


def test_i4_a_score_counts_by_its_real_part_and_only_at_a_candidate():
    assert top([0.1 + 9j, 0.4 - 9j, 0.2], 2) == [1, 2]
    assert top([math.nan, 0.4, 0.2], 2, candidates=[1, 2]) == [1, 2]


def test_i4_forced_blocks_are_counted_in_n_and_the_lowest_are_kept():
    assert top([0.1, 0.4, 0.2, 0.3], 2, forced=[0]) == [0, 1]
    assert top([0.1, 0.4, 0.2, 0.3], 2, forced=[0, 2, 3]) == [0, 2]
    assert top([0.1, 0.4, 0.2], 2, candidates=[1, 2], forced=[0]) == [1, 2]


def test_i4_a_finite_forced_score_competes():
    assert top([0.1, 1.5, 0.2, 0.3], 2, forced=[0], semantics=FLA) == [1, 0]
    assert top([0.1, 1.5, 1.2, 0.3], 2, forced=[0], semantics=FLA) == [1, 2]
    assert top([0.1, 1.0, 0.2, 0.3], 1, forced=[2], semantics=FLA) == [1]
    # every query head counts it, unless it chooses for itself
    alone = dataclasses.replace(FLA, share_selection=False)
    assert top([0.1, 1.5, 1.2, 0.3], 2, group=2, forced=[0], semantics=FLA) == [0, 1]
    assert top([0.1, 1.5, 1.2, 0.3], 2, group=2, forced=[0], semantics=alone) == [1, 2]
    # with logit_mean it is a probability, of which there is one for the group
    half = dataclasses.replace(LUCIDRAINS_FLEX, own_block_extra=False, forced_score=0.5)
    assert top([0.3, 0.6, 0.1], 2, group=2, forced=[2], semantics=half) == [1, 2]


def test_i4_a_score_at_or_below_the_floor_becomes_minus_one():
    assert top([0.25, 0.5, 0.2], 3, semantics=FLOOR) == [1, -1, -1]
    assert top([0.25, 0.5, 0.2], 3, semantics=FLOOR, forced=[2]) == [2, 1, -1]
    fifth = dataclasses.replace(FLOOR, forced_score=0.2)
    assert top([0.25, 0.5, 0.2], 3, semantics=fifth, forced=[2]) == [1, -1, -1]
    assert top([0.25, 0.5, 0.2], 3, group=2, semantics=fifth, forced=[2]) == [1, 2, -1]


def test_i5_a_tie_takes_the_lower_index():
    assert top([0.2, 0.3, 0.3, 0.3], 2) == [1, 2]
    assert top([0.0, 0.0, 0.0], 2) == [0, 1]


def test_i6_fewer_candidates_than_n_are_all_taken_and_minus_one_fills_the_rest():
    assert top([0.1, 0.2, 0.3], 5) == [2, 1, 0, -1, -1]
    assert top([0.1, 0.2, 0.3], 2, candidates=[]) == [-1, -1]
    assert top([], 2) == [-1, -1]


@given(case=CASES)
@settings(deadline=None, max_examples=150)
def test_i4_i5_i6_select_is_a_stable_sort_of_the_scores(case):
    """The second definition sorts the blocks of all rows at once: no candidate comes last."""
    arrays, how = given_to_select(case)
    (scores, candidates, forced), semantics = scored(*arrays, **how), case.semantics
    chosen, n = select(*arrays, **how), case.num_selected_blocks
    assert chosen.shape == (*scores.shape[:3], n)
    assert chosen.dtype == np.int64
    means = semantics.importance == "logit_mean"
    heads = 1 if means else case.q_heads // scores.shape[1]
    ranked = np.where(forced, heads * semantics.forced_score, scores)
    floor = -1 if semantics.score_floor is None else semantics.score_floor
    taken = candidates & (ranked > floor)
    order = np.argsort(-np.where(candidates, ranked, -1), axis=-1, kind="stable")[..., :n]
    expected = np.full(chosen.shape, -1)
    expected[..., : order.shape[-1]] = np.where(
        np.take_along_axis(taken, order, axis=-1), order, -1
    )
    np.testing.assert_array_equal(chosen, expected)


@given(case=CASES, seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_the_oracles_own_choice_is_valid_and_one_from_scores_within_the_bounds_never_invalid(
    case, seed
):
    """The bounds are of the size of the scores' gaps, so that the noise does change choices."""
    arrays, how = given_to_select(case)
    blocks, chosen, how = scored(*arrays, **how), select(*arrays, **how), case.geometry
    shape, generator = blocks.scores.shape, np.random.default_rng(seed)
    assert (valid_selection(chosen, blocks, np.zeros(shape), **how).verdict == VALID).all()
    bounds = 0.5 * generator.random(shape)
    shuffled = generator.permuted(chosen, axis=-1)
    assert (valid_selection(shuffled, blocks, bounds, **how).verdict == VALID).all()
    noise = bounds * generator.uniform(-1, 1, shape)
    noisy = top_blocks(blocks._replace(scores=blocks.scores + noise), **how)
    assert INVALID not in valid_selection(noisy, blocks, bounds, **how).verdict


# --- errors ---------------------------------------------------------------------------------------

Q, K, NONE = np.ones((1, 2, 3, 2)), np.ones((1, 1, 3, 2)), np.ones((1, 1, 0, 2))
SIZES, ROW = strides(2, 2, q_heads=2, head_dim=2), scored_row([0.0, 0.0])


NUMBERS = "it must hold real or complex numbers"


def asked(q=Q, k_cmp=K, mem_k=NONE, **how):
    return lambda: importance(q, k_cmp, mem_k, **{"kv_len": 6, "sizes": SIZES} | how)


test_selection_refuses_what_does_not_fit_and_says_what_would = refusal_test(
    {
        "q has shape (1, 1, 3, 2); it must be (batch, 2, q_len, 2)": asked(q=Q[:, :1]),
        "k_cmp has shape (1, 1, 2, 2); it must be (1, 1, 3, 2)": asked(k_cmp=K[:, :, 1:]),
        "mem_k has shape (1, 1, 0, 1); it must be (1, 1, 0, 2)": asked(mem_k=NONE[..., 1:]),
        "kv_len=-1 must be at least 0": asked(kv_len=-1),
        "q_len=-1 must be at least 0": lambda: forced_blocks(-1, 2, SIZES),
        "compress_block_size=3 must be a positive multiple of compress_block_sliding_stride=2: "
        "eq. 9 counts the overlap of windows and blocks in whole strides. Try 2 or 4": (
            lambda: shared_strides(6, strides(3, 2))
        ),
        "scores holds NaN at a candidate; scores must be numbers to be ranked": (
            lambda: top_blocks(scored_row([math.nan]), SIZES)
        ),
        "scores has shape (2,); it must be (batch, heads, q_len, blocks)": (
            lambda: top_blocks(ROW._replace(scores=np.zeros(2)), SIZES)
        ),
        "candidates has shape (2,); it must be (1, 2)": (
            lambda: top_blocks(ROW._replace(candidates=np.ones(2, bool)), SIZES)
        ),
        "forced has shape (2, 2); it must be (1, 2)": (
            lambda: top_blocks(ROW._replace(forced=np.eye(2) > 0), SIZES)
        ),
    },
    {
        "candidates has dtype float64; it must be bool": (
            lambda: top_blocks(ROW._replace(candidates=np.ones((1, 2))), SIZES)
        ),
        "forced has dtype int64; it must be bool": (
            lambda: top_blocks(ROW._replace(forced=np.ones((1, 2), int)), SIZES)
        ),
        f"scores has dtype <U1; {NUMBERS}": (
            lambda: top_blocks(ROW._replace(scores=np.full((1, 1, 1, 2), "a")), SIZES)
        ),
        f"means has dtype <U1; {NUMBERS}": lambda: selection_probability(np.array(["a"])),
        f"q has dtype <U1; {NUMBERS}": asked(q=np.full(Q.shape, "a")),
        f"k_cmp has dtype <U1; {NUMBERS}": asked(k_cmp=np.full(K.shape, "a")),
        f"mem_k has dtype <U1; {NUMBERS}": asked(mem_k=np.full(NONE.shape, "a")),
        f"sizes=None {NO_SIZES}, not NoneType": asked(sizes=None),
        f"sizes=0 {NO_SIZES}, not int": lambda: selection_candidates(2, 2, 0),
        f"sizes=1 {NO_SIZES}, not int": lambda: top_blocks(ROW, 1),
        f"semantics=None {NO_SEMANTICS}, not NoneType": asked(semantics=None),
        f"semantics=0 {NO_SEMANTICS}, not int": lambda: selection_candidates(2, 2, SIZES, 0),
        f"semantics=1 {NO_SEMANTICS}, not int": lambda: top_blocks(ROW, SIZES, 1),
    },
    whole=True,
)
