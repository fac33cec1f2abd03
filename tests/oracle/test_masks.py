"""The oracle's masks (clauses W, C, F): literal tables, and broadcasting over random cases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_ref import (
    LUCIDRAINS,
    LUCIDRAINS_FLEX,
    PAPER,
    Semantics,
    Sizes,
    compress_mask,
    fine_mask,
    sliding_mask,
)
from nsa_ref.testing.mutants.dense import DenseMasks
from tables import as_case, reaches, rows, strides

NON_CAUSAL = dataclasses.replace(PAPER, causal=False)
MULTISET = dataclasses.replace(PAPER, duplicates="multiset")
PAIRS = Sizes(selection_block_size=2)  # of tokens
LENGTHS = st.integers(0, 12)


def window(w: int) -> Sizes:
    return Sizes(sliding_window_size=w)


def blocks(*per_row: list[int]) -> np.ndarray:
    """(1, 1, q_len, n) indices from one list for each row."""
    return np.array(per_row, dtype=np.int64)[None, None]


# --- W: sliding -----------------------------------------------------------------------------------


def test_w1_a_window_of_two_shows_three_keys():
    assert rows(sliding_mask(5, 5, window(2))) == ["10000", "11000", "11100", "01110", "00111"]


def test_w1_an_open_window_of_two_shows_two_keys():
    open_window = dataclasses.replace(PAPER, window_closed=False)
    assert rows(sliding_mask(4, 4, window(2), open_window)) == ["1000", "1100", "0110", "0011"]
    assert not sliding_mask(4, 4, window(0), open_window).any()


def test_w1_the_rows_of_a_decode_step_are_the_last_rows_of_the_prefill():
    for q_len in range(7):
        last = sliding_mask(6, 6, window(2))[6 - q_len :]
        np.testing.assert_array_equal(sliding_mask(q_len, 6, window(2)), last)


def test_w2_a_non_causal_window_reaches_both_ways():
    assert rows(sliding_mask(4, 4, window(1), NON_CAUSAL)) == ["1100", "1110", "0111", "0011"]
    open_window = dataclasses.replace(NON_CAUSAL, window_closed=False)
    assert rows(sliding_mask(4, 4, window(2), open_window)) == ["1100", "1110", "0111", "0011"]


def test_w3_a_window_of_zero_is_the_own_key_and_a_long_one_is_full_causal_attention():
    np.testing.assert_array_equal(sliding_mask(5, 5, window(0)), np.eye(5))
    for w in (4, 5, 99):
        np.testing.assert_array_equal(sliding_mask(5, 5, window(w)), np.tri(5))


def test_rows_before_every_token_see_none_of_them_causal_or_not():
    assert rows(sliding_mask(4, 2, window(1))) == ["00", "00", "10", "11"]
    assert rows(sliding_mask(4, 2, window(9), NON_CAUSAL)) == ["00", "00", "11", "11"]
    assert rows(compress_mask(4, 2, strides(1, 1, 1))) == ["100", "100", "110", "111"]
    assert rows(compress_mask(4, 2, strides(1, 1, 1), NON_CAUSAL)) == ["100", "100", "111", "111"]
    every = blocks(*[[0, 1]] * 4)
    assert rows(fine_mask(4, 2, every, Sizes())[0, 0]) == ["00", "00", "10", "11"]
    assert rows(fine_mask(4, 2, every, Sizes(), NON_CAUSAL)[0, 0]) == ["00", "00", "11", "11"]


# --- C: compress ----------------------------------------------------------------------------------


def test_c1_windows_that_start_at_their_stride_drop_the_incomplete_ones():
    # 7 tokens, l = 4, d = 2: blocks 0..3 and 2..5; block 4..7 would be incomplete
    assert rows(compress_mask(7, 7, strides(4, 2))) == ["00", "00", "00", "10", "10", "11", "11"]
    assert compress_mask(3, 3, strides(4, 2)).shape == (3, 0)


def test_c1_windows_that_end_at_their_stride_are_kv_len_over_d():
    end = dataclasses.replace(PAPER, compress_alignment="end")
    # 5 tokens, d = 2: blocks end at tokens 1 and 3, whatever their length
    for length in (1, 2, 4, 9):
        mask = compress_mask(5, 5, strides(length, 2), end)
        assert rows(mask) == ["00", "10", "10", "11", "11"]


def test_c2_a_strict_block_is_visible_one_step_later():
    strict = dataclasses.replace(PAPER, compress_strict=True)
    assert rows(compress_mask(6, 6, strides(2, 2))) == ["000", "100", "100", "110", "110", "111"]
    assert rows(compress_mask(6, 6, strides(2, 2), strict)) == [
        "000", "000", "100", "100", "110", "110",
    ]  # fmt: skip


def test_c3_memory_is_always_visible_and_so_are_all_blocks_without_causality():
    assert rows(compress_mask(3, 3, strides(1, 1, 2))) == ["11100", "11110", "11111"]
    assert rows(compress_mask(3, 3, strides(1, 1, 2), NON_CAUSAL)) == ["11111"] * 3


# --- F: fine --------------------------------------------------------------------------------------


def test_f1_selected_blocks_are_cut_at_the_own_position():
    indices = blocks([0, 1], [0, 1], [0, 1], [0, 1], [1, 2], [1, 2])
    assert rows(fine_mask(6, 6, indices, PAIRS)[0, 0]) == [
        "100000", "110000", "111000", "111100", "001110", "001111",
    ]  # fmt: skip


def test_f2_a_short_last_block_shows_only_real_tokens():
    assert rows(fine_mask(1, 5, blocks([2]), PAIRS)[0, 0]) == ["00001"]
    assert rows(fine_mask(1, 5, blocks([1]), Sizes(selection_block_size=3), NON_CAUSAL)[0, 0]) == [
        "00011"
    ]


def test_f3_a_block_named_twice_counts_once_in_a_set_and_twice_in_a_multiset():
    indices = blocks([1, 0, 1])
    assert rows(fine_mask(1, 4, indices, PAIRS)[0, 0]) == ["1111"]
    assert rows(fine_mask(1, 4, indices, PAIRS, MULTISET)[0, 0]) == ["1122"]


def test_f4_without_causality_the_selected_blocks_are_shown_uncut_and_nothing_else():
    indices = blocks([1], [0], [1], [0])
    expected = ["0011", "1100", "0011", "1100"]
    assert rows(fine_mask(4, 4, indices, PAIRS, NON_CAUSAL)[0, 0]) == expected
    upstream = dataclasses.replace(LUCIDRAINS, causal=False)
    assert rows(fine_mask(4, 4, indices, PAIRS, upstream)[0, 0]) == expected


def test_i4_the_own_block_is_visible_on_top_of_the_selected_ones():
    indices = blocks([0], [0], [0], [0], [0], [2])
    expected = ["100000", "110000", "111000", "111100", "110010", "000011"]
    assert rows(fine_mask(6, 6, indices, PAIRS, LUCIDRAINS_FLEX)[0, 0]) == expected
    # in a multiset, an own block that was selected as well counts twice
    expected = ["200000", "220000", "111000", "111100", "110010", "000022"]
    assert rows(fine_mask(6, 6, indices, PAIRS, LUCIDRAINS)[0, 0]) == expected


def test_i6_indices_outside_the_blocks_are_ignored_in_any_slot():
    for indices in ([-1, 1, 2], [1, -7, 2**40], [99, -1, 1]):
        assert rows(fine_mask(1, 4, blocks(indices), PAIRS)[0, 0]) == ["0011"]
    assert not fine_mask(1, 4, blocks([-1, -2, 2]), PAIRS).any()
    assert not fine_mask(1, 4, np.zeros((1, 1, 1, 0), np.int64), PAIRS).any()


def test_query_heads_read_the_choice_of_their_own_contiguous_group():
    indices = np.array([0, 1], dtype=np.int64).reshape(1, 2, 1, 1)
    mask = fine_mask(1, 4, indices, dataclasses.replace(PAIRS, q_heads=4))
    assert [rows(mask[0, h])[0] for h in range(4)] == ["1100", "1100", "0011", "0011"]


# --- random cases ---------------------------------------------------------------------------------


@given(
    q_len=LENGTHS, kv_len=LENGTHS, w=st.integers(0, 14), causal=st.booleans(), closed=st.booleans()
)
@settings(deadline=None, max_examples=100)
def test_the_sliding_mask_is_the_band_of_its_second_definition(q_len, kv_len, w, causal, closed):
    given = q_len, kv_len, window(w), Semantics(causal=causal, window_closed=closed)
    mask = sliding_mask(*given)
    assert mask.dtype == np.int64
    np.testing.assert_array_equal(mask, DenseMasks().sliding_mask(as_case(*given)))


@given(
    q_len=LENGTHS,
    kv_len=LENGTHS,
    sizes=st.builds(strides, st.integers(1, 7), st.integers(1, 5), st.integers(0, 3)),
    causal=st.booleans(),
    alignment=st.sampled_from(["start", "end"]),
    strict=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_the_compress_mask_is_the_staircase_of_its_second_definition(
    q_len, kv_len, sizes, causal, alignment, strict
):
    semantics = Semantics(causal=causal, compress_alignment=alignment, compress_strict=strict)
    given = q_len, kv_len, sizes, semantics
    mask = compress_mask(*given)
    assert mask.dtype == np.int64
    np.testing.assert_array_equal(mask, DenseMasks().compress_mask(as_case(*given)))


@st.composite
def fine_cases(draw: st.DrawFn) -> tuple[int, int, np.ndarray, Sizes]:
    """(q_len, kv_len, block_indices, sizes); the simplest has no token."""
    q_len, kv_len, size = draw(LENGTHS), draw(LENGTHS), draw(st.integers(1, 5))
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = (draw(st.integers(0, 2)), heads, q_len, draw(st.integers(0, 4)))
    num_blocks = -(-kv_len // size)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    indices = generator.integers(-2, num_blocks + 2, shape)
    return q_len, kv_len, indices, Sizes(q_heads=heads * group, selection_block_size=size)


@given(
    case=fine_cases(),
    causal=st.booleans(),
    own_extra=st.booleans(),
    duplicates=st.sampled_from(["set", "multiset"]),
)
@settings(deadline=None, max_examples=100)
def test_the_fine_mask_is_the_one_hot_count_of_its_second_definition(
    case, causal, own_extra, duplicates
):
    semantics = Semantics(causal=causal, own_block_extra=own_extra, duplicates=duplicates)
    q_len, kv_len, indices, sizes = case
    mask = fine_mask(*case, semantics)
    assert mask.dtype == np.int64
    second = DenseMasks().fine_mask(as_case(q_len, kv_len, sizes, semantics), indices)
    np.testing.assert_array_equal(mask, second)


@pytest.mark.parametrize(
    "corner",
    [
        lambda q_len, kv_len, indices, size: kv_len % size and indices.size > 0,
        lambda q_len, kv_len, indices, size: 0 < kv_len < q_len,
        lambda q_len, kv_len, indices, size: 0 < kv_len < size,
        lambda q_len, kv_len, indices, size: indices.shape[3] == 0 < q_len * kv_len,
        lambda q_len, kv_len, indices, size: indices.shape[0] == 0,
    ],
    ids=["partial last block", "kv_len < q_len", "kv_len < l'", "n = 0", "batch = 0"],
)
def test_fine_cases_reach_the_corner(corner):
    reaches(fine_cases(), lambda case: corner(*case[:3], case[3].selection_block_size))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_len": -1}, ValueError, r"q_len=-1 must be at least 0"),
        ({"kv_len": -3}, ValueError, r"kv_len=-3 must be at least 0"),
        ({"q_len": True}, TypeError, r"q_len=True must be an integer, not bool"),
        ({"sizes": 1}, TypeError, r"sizes=1 must be a nsa_ref.Sizes, .* not int"),
        ({"semantics": "PAPER"}, TypeError, r"semantics='PAPER' must be a Semantics, .* not str"),
    ],
)
def test_every_mask_refuses_lengths_sizes_and_semantics_that_are_none(change, error, message):
    arguments = {"q_len": 2, "kv_len": 2, "sizes": Sizes(), "semantics": PAPER} | change
    for mask in (sliding_mask, compress_mask):
        with pytest.raises(error, match=message):
            mask(**arguments)
    with pytest.raises(error, match=message):
        fine_mask(block_indices=blocks([0], [0]), **arguments)


def test_the_fine_mask_refuses_indices_that_do_not_fit():
    with pytest.raises(TypeError, match="block_indices has dtype float64; it must hold integers"):
        fine_mask(2, 2, blocks([0], [0]).astype(float), Sizes())
    shape = r"block_indices has shape \(1, 1, 3, 1\); it must be \(batch, heads, q_len=2, n\)"
    with pytest.raises(ValueError, match=shape):
        fine_mask(2, 2, blocks([0], [0], [0]), Sizes())
    groups = r"q_heads=3 must be a positive multiple of heads \(axis 1 of .*\)=2.* Try 2 or 4"
    with pytest.raises(ValueError, match=groups):
        fine_mask(2, 2, np.zeros((1, 2, 2, 1), int), Sizes(q_heads=3))
