"""The three calls that the project began with, at their original sizes, bit by bit.

Upstream's script prints these masks and asserts nothing. Here each is compared with the oracle in
every cell, as its predicate, its block lists and its transposed lists show it.
"""

from __future__ import annotations

import numpy as np
import pytest

from nsa_ref.masks import compress_mask, fine_mask, sliding_mask
from nsa_ref.semantics import LUCIDRAINS_FLEX
from nsa_ref.sizes import Sizes
from nsa_ref.testing.probes import block_mask_readings

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch.nn.attention.flex_attention import BlockMask  # noqa: E402

from nsa_fast import create_compress_mask, create_fine_mask, create_sliding_mask  # noqa: E402


def assert_equal_in_every_bit(block_mask: BlockMask, expected: np.ndarray) -> None:
    readings = block_mask_readings(block_mask, *expected.shape[-2:])
    for part in ("mask_mod", "kv lists", "q lists"):
        np.testing.assert_array_equal(
            readings[part], np.broadcast_to(expected, readings[part].shape), part
        )
    assert block_mask.shape == readings["mask_mod"].shape
    printed = str(block_mask)
    assert printed.startswith("BlockMask(shape=") and "█" in printed


def test_compress_mask_of_512_tokens_in_128_blocks_with_16_memory_columns() -> None:
    block_mask = create_compress_mask(512, 128, 4, mem_kv_len=16)
    # l never enters the mask: windows end at (i + 1) d
    sizes = Sizes(
        compress_block_size=8,
        compress_block_sliding_stride=4,
        selection_block_size=4,
        num_mem_kv=16,
    )
    expected = compress_mask(512, 512, sizes, LUCIDRAINS_FLEX)
    assert expected.shape == (512, 144)
    row, column = np.arange(512)[:, None], np.arange(144)
    np.testing.assert_array_equal(expected != 0, (column < 16) | (row > 4 * (column - 16) + 3))
    assert_equal_in_every_bit(block_mask, expected)


def test_fine_mask_of_1024_tokens_mostly_in_the_first_blocks() -> None:
    selected = torch.randint(0, 5, (1, 1, 1024, 2), generator=torch.Generator().manual_seed(0))
    block_mask = create_fine_mask(1024, 64)(selected)
    expected = fine_mask(
        1024, 1024, selected.numpy(), Sizes(selection_block_size=64), LUCIDRAINS_FLEX
    )
    assert_equal_in_every_bit(block_mask, expected)


def test_sliding_mask_of_1024_tokens_shows_33_keys() -> None:
    block_mask = create_sliding_mask(1024, 32)
    expected = sliding_mask(1024, 1024, Sizes(sliding_window_size=32), LUCIDRAINS_FLEX)
    assert expected[-1].sum() == 33
    assert_equal_in_every_bit(block_mask, expected)
