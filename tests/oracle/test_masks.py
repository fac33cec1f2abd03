"""The oracle's masks (clauses W, C, F): literal tables, and broadcasting over random cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_ref import (
    LUCIDRAINS,
    LUCIDRAINS_FLEX,
    PAPER,
    Sizes,
    compress_mask,
    fine_mask,
    sliding_mask,
)
from nsa_ref.testing import OracleImplementation
from nsa_ref.testing.mutants.dense import DenseMasks
from refusals import refusal_test
from small_cases import cases, reaches
from tables import rows, strides

NON_CAUSAL = dataclasses.replace(PAPER, causal=False)
MULTISET = dataclasses.replace(PAPER, duplicates="multiset")
PAIRS = Sizes(selection_block_size=2)  # of tokens


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


BOTH = (True, False)
CASES = {
    "sliding": cases("sliding", causal=BOTH, window_closed=BOTH),
    "compress": cases(
        "compress", causal=BOTH, compress_alignment=("start", "end"), compress_strict=BOTH
    ),
    "fine": cases("fine", causal=BOTH, own_block_extra=BOTH, duplicates=("set", "multiset")),
}


@pytest.mark.parametrize("branch", CASES)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_every_mask_is_that_of_its_second_definition(branch, data):
    case = data.draw(CASES[branch])
    indices = [case.block_indices()] if branch == "fine" else []
    mask, expected = (
        getattr(definition, f"{branch}_mask")(case, *indices)
        for definition in (OracleImplementation(), DenseMasks())
    )
    assert mask.dtype == np.int64
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("branch", "corner"),
    [
        *(("sliding", name) for name in ("kv_len < q_len", "w = 0", "w > kv_len", "batch 0")),
        *(("compress", name) for name in ("kv_len < q_len", "kv_len < l", "l < d", "memory 1")),
        *(("fine", name) for name in ("kv_len < q_len", "kv_len < l'", "partial last block")),
        *(("fine", name) for name in ("n = 0", "n > blocks", "batch 0", "indices mixed")),
        pytest.param("fine", lambda case: case.q_heads > case.kv_heads > 1, id="fine-GQA"),
        pytest.param(
            "fine", lambda case: case.block_indices().max(initial=0) >= 2**32, id="fine-wraps"
        ),
    ],
)
def test_mask_cases_reach_the_corner(branch, corner):
    reaches(CASES[branch], corner, within=300)


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
    for mask in (sliding_mask, compress_mask, partial(fine_mask, block_indices=blocks([0], [0]))):
        with pytest.raises(error, match=message):
            mask(**arguments)


def indexed(indices: np.ndarray, **sizes: int) -> Callable[[], object]:
    return lambda: fine_mask(2, 2, indices, Sizes(**sizes))


SHAPE = "it must be (batch, heads, q_len=2, n): n independent block numbers per query"

test_the_fine_mask_refuses_indices_that_do_not_fit = refusal_test(
    {
        f"block_indices has shape (1, 1, 3, 1); {SHAPE}": indexed(blocks([0], [0], [0])),
        f"block_indices has shape (1, 2, 2); {SHAPE}": indexed(np.zeros((1, 2, 2), int)),
        "heads (axis 1 of block_indices)=0 must be at least 1": (
            indexed(np.zeros((1, 0, 2, 1), int))
        ),
        "q_heads=3 must be a positive multiple of heads (axis 1 of block_indices)=2: "
        "query heads share a choice of blocks in equal groups. Try 2 or 4": (
            indexed(np.zeros((1, 2, 2, 1), int), q_heads=3)
        ),
    },
    {
        "block_indices has dtype float64; it must hold integers: block numbers, and -1 in unused "
        "slots": indexed(blocks([0], [0]).astype(float)),
    },
    whole=True,
)
