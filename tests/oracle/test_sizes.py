"""Sizes: every size is checked, and every message names what would be right."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from nsa_ref import Sizes
from nsa_ref.sizes import MAY_BE_ZERO, num_selection_blocks
from refusals import NO_SIZES, refusal_test

#: The sizes that are numbers, each with the least that it may be.
LEAST = {
    field.name: int(field.name not in MAY_BE_ZERO)
    for field in dataclasses.fields(Sizes)
    if field.name not in ("compress_map", "compress_positions")
}


def test_five_sizes_may_be_zero() -> None:
    assert MAY_BE_ZERO == (
        "num_selected_blocks",
        "num_initial_blocks",
        "num_local_blocks",
        "sliding_window_size",
        "num_mem_kv",
    )
    assert len(LEAST) == 13


@pytest.mark.parametrize("size", LEAST)
def test_a_size_has_its_least_value(size: str) -> None:
    least = LEAST[size]
    assert getattr(Sizes(**{size: least}), size) == least
    assert getattr(Sizes(**{size: np.int64(least)}), size) == least
    with pytest.raises(ValueError) as raised:
        Sizes(**{size: least - 1})
    assert str(raised.value) == f"{size}={least - 1} must be at least {least}."
    with pytest.raises(TypeError) as raised:
        Sizes(**{size: True})
    assert str(raised.value) == f"{size}=True must be an integer, not bool."


def test_what_follows_from_the_sizes() -> None:
    sizes = Sizes(
        q_heads=6,
        kv_heads=2,
        head_dim=16,
        selection_block_size=6,
        compress_block_sliding_stride=2,
    )
    assert (sizes.group_size, sizes.scale, sizes.strides_per_selection_block) == (3, 0.25, 3)
    blocks = [num_selection_blocks(kv_len, sizes) for kv_len in (0, 1, 6, 7, 12, 13)]
    assert blocks == [0, 1, 1, 2, 2, 3]


def made(**sizes: Any) -> Any:
    return lambda: Sizes(**sizes)


test_sizes_that_do_not_fit_are_refused_and_what_would_is_said = refusal_test(
    {
        "q_heads=6 must be a positive multiple of kv_heads=4: every kv head serves a group of "
        "equally many query heads. Try 4 or 8": made(q_heads=6, kv_heads=4),
        "q_heads=1 must be a positive multiple of kv_heads=2: every kv head serves a group of "
        "equally many query heads. Try 2 or 4": made(kv_heads=2),
        "selection_block_size=10 must be a positive multiple of compress_block_sliding_stride=4: "
        "eq. 9 counts the overlap of blocks in whole strides. Try 8 or 12": (
            made(selection_block_size=10, compress_block_sliding_stride=4)
        ),
        "compress_map='sum' must be one of 'mean', 'linear', 'linear_per_head', 'mlp'": (
            made(compress_map="sum")
        ),
        "kv_len=-1 must be at least 0": lambda: num_selection_blocks(-1, Sizes()),
    },
    {
        "compress_positions=1 must be True or False, not int": made(compress_positions=1),
        "kv_len=1.0 must be an integer, not float": lambda: num_selection_blocks(1.0, Sizes()),
        f"sizes=2 {NO_SIZES}, not int": lambda: num_selection_blocks(1, 2),
    },
    whole=True,
)
