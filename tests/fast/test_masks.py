"""Block masks of nsa_fast: predicate, block lists and transposed lists say what the oracle says."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

import nsa_ref.masks
from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.sizes import Sizes
from nsa_ref.testing.branches import BRANCHES, FINE, Branch
from nsa_ref.testing.case import Case
from nsa_ref.testing.probes import block_mask_readings, exposed_readings

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch.nn.attention.flex_attention import BlockMask  # noqa: E402

from fast_memory import Largest  # noqa: E402
from nsa_fast import (  # noqa: E402
    block_lists,
    block_masks,
    create_compress_mask,
    create_fine_mask,
    create_sliding_mask,
    fine_lists,
    upstream,
)
from nsa_fast.adapter import SEMANTICS, NsaFastEager, implementations  # noqa: E402
from nsa_fast.crowded import visible_cells  # noqa: E402
from nsa_fast.layouts import FineLayout  # noqa: E402
from nsa_fast.windows import Windows  # noqa: E402
from refusals import Refusals, refusal_test  # noqa: E402

CPU = torch.device("cpu")
NOT_CAUSAL = dataclasses.replace(PAPER, causal=False)
LENGTHS = st.integers(0, 40)
SPANS = st.integers(1, 9)  # of windows, strides and blocks
BLOCK_SIZES = st.tuples(SPANS, SPANS)
COUNTS = st.integers(0, 4)  # n
GROUPS = st.integers(1, 3)
EXTRA = st.integers(0, 3)  # columns of memory, or empty ones
CONVENTIONS = st.sampled_from(SEMANTICS)
FLAGS = st.booleans()
SEEDS = st.integers(0, 2**32)
FEW = settings(max_examples=60, deadline=None)


def assert_reads(
    block_mask: BlockMask,
    expected: np.ndarray,
    crowded: block_lists.Crowded | None = None,
    complete: bool = True,
) -> None:
    """Every part of the block mask shows exactly the expected cells, and its lists are in order.

    What the transposed lists leave out is crowded, and stands there. A predicate that is not
    complete shows these cells, and may show others, which no list names.
    """
    rows, columns = expected.shape[-2:]
    readings = block_mask_readings(block_mask, rows, columns)
    assert set(readings) == {"mask_mod", "kv lists", "q lists"}
    if not complete:
        assert (readings.pop("mask_mod") >= expected).all()
    if crowded is not None:
        readings["q lists"] += visible_cells(crowded, block_mask).numpy()
    for part, cells in readings.items():
        np.testing.assert_array_equal(cells, np.broadcast_to(expected, cells.shape), part)
    assert_lists(block_mask, expected, crowded)


def per_block(cells: np.ndarray, block_size: tuple[int, int]) -> np.ndarray:
    """How many cells of each block are set; there is one block at least."""
    for axis, size in zip((-2, -1), block_size):
        starts = np.arange(0, max(1, cells.shape[axis]), size)
        before = np.cumsum(np.insert(cells, 0, 0, axis), axis)  # in the cells before each one
        ends = np.minimum(starts + size, cells.shape[axis])
        cells = before.take(ends, axis) - before.take(starts, axis)
    return cells


def assert_lists(
    block_mask: BlockMask, expected: np.ndarray, crowded: block_lists.Crowded | None = None
) -> None:
    """A block is full iff all of its real cells are visible, partial iff some are; both ascend."""
    rows, columns = expected.shape[-2:]
    assert block_mask.seq_lengths == (rows, columns)
    expected = np.broadcast_to(expected, (*block_mask.kv_num_blocks.shape[:2], rows, columns))
    visible, real = (
        per_block(cells, block_mask.BLOCK_SIZE)
        for cells in (expected.astype(int), np.ones(expected.shape, int))
    )
    # a lone column is never called full: it may get an invisible neighbour (LEAST_LENGTH)
    full = (visible == real) & (real > 0) & (columns >= block_lists.LEAST_LENGTH)
    for kind, named in (("", (visible > 0) & ~full), ("full_", full)):
        by_column = named.swapaxes(2, 3)
        if crowded is not None:
            by_column = by_column & ~crowded.left_out.numpy()[:, None, :, None]
        for side, wanted in (("kv", named), ("q", by_column)):
            numbers = getattr(block_mask, f"{kind}{side}_num_blocks")
            indices = getattr(block_mask, f"{kind}{side}_indices")
            assert numbers.dtype == indices.dtype == torch.int32
            assert numbers.shape == wanted.shape[:3]
            # one list whose beginning all walk has no order of its own, and is stored once
            shared = bool(kind) and block_lists.OWN_STRIDES and indices.stride(2) == 0
            assert numbers.is_contiguous() and (shared or indices.is_contiguous())
            if not block_lists.OWN_STRIDES:
                # 2.11 reads the full lists by the strides of the partial ones
                assert indices.shape == getattr(block_mask, f"{side}_indices").shape
            # the Triton kernels load the first entry even of an empty list
            assert indices.shape[3] >= 1
            if indices.numel():
                assert 0 <= int(indices.min()) <= int(indices.max()) < wanted.shape[3]
            for place in np.ndindex(*wanted.shape[:3]):
                found = indices[place][: int(numbers[place])].tolist()
                assert (sorted(found) if shared else found) == [*np.flatnonzero(wanted[place])]


def strange_indices(rng: np.random.Generator, shape: tuple[int, ...], blocks: int) -> np.ndarray:
    """Blocks, duplicates, -1, strangers, and numbers that a cast to 32 bits would make blocks."""
    indices = rng.integers(-2, blocks + 2, shape)
    return np.where(rng.random(shape) < 0.2, indices + 2**32, indices)


# --- the masks that the branches use --------------------------------------------------------------


@FEW
@given(LENGTHS, LENGTHS, LENGTHS, CONVENTIONS, BLOCK_SIZES)
def test_sliding_masks_of_any_size_and_block_size(
    q_len: int, kv_len: int, window: int, semantics: Semantics, block_size: tuple[int, int]
) -> None:
    block_mask = block_masks.sliding_block_mask(
        q_len, kv_len, window, semantics, block_size=block_size, device=CPU
    )
    sizes = Sizes(sliding_window_size=window)
    assert_reads(block_mask, nsa_ref.masks.sliding_mask(q_len, kv_len, sizes, semantics))


@FEW
@given(LENGTHS, LENGTHS, SPANS, SPANS, EXTRA, CONVENTIONS, BLOCK_SIZES, FLAGS)
# one row block names two blocks in part, at either end of their border; and every one there is
@example(40, 40, 8, 4, 0, PAPER, (8, 8), True)
@example(9, 8, 1, 1, 0, NOT_CAUSAL, (4, 2), True)
def test_compress_masks_of_any_size_and_block_size(
    q_len: int,
    kv_len: int,
    size: int,
    stride: int,
    memory: int,
    semantics: Semantics,
    block_size: tuple[int, int],
    own_strides: bool,
) -> None:
    sizes = Sizes(
        compress_block_size=size,
        compress_block_sliding_stride=stride,
        selection_block_size=stride,
        num_mem_kv=memory,
    )
    expected = nsa_ref.masks.compress_mask(q_len, kv_len, sizes, semantics)
    windows = Windows(size, stride, semantics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_lists, "OWN_STRIDES", own_strides)
        block_mask = block_masks.compress_block_mask(
            q_len,
            windows.count(kv_len),
            memory,
            windows,
            offset=kv_len - q_len,
            device=CPU,
            block_size=block_size,
        )
        assert_reads(block_mask, expected)


@FEW
@given(LENGTHS, LENGTHS, SPANS, COUNTS, GROUPS, EXTRA, CONVENTIONS, FLAGS, SEEDS)
# empty columns behind a short last block, and behind crowded ones
@example(6, 6, 4, 4, 1, 1, NOT_CAUSAL, False, 0)
@example(40, 40, 4, 4, 2, 3, PAPER, True, 0)
def test_fine_masks_of_any_size_and_tile(
    q_len: int,
    kv_len: int,
    block_size: int,
    n: int,
    rows_per_token: int,
    empty_columns: int,
    semantics: Semantics,
    all_crowded: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    indices = strange_indices(rng, (int(rng.integers(0, 3)), 2, q_len, n), -(-kv_len // block_size))
    columns_per_block = block_size + empty_columns
    layout = FineLayout(rows_per_token, rows_per_token, block_size, columns_per_block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_lists, "CROWDED", 0 if all_crowded else 64)
        block_mask, crowded = block_masks.fine_block_mask(
            kv_len, torch.as_tensor(indices), layout, semantics
        )
    sizes = Sizes(q_heads=2, selection_block_size=block_size)
    cells = nsa_ref.masks.fine_mask(q_len, kv_len, indices, sizes, semantics)
    expected = np.zeros((*cells.shape[:3], layout.num_columns(kv_len)), cells.dtype)
    key = np.arange(kv_len)
    expected[..., key // block_size * columns_per_block + key % block_size] = cells
    assert_reads(block_mask, expected.repeat(rows_per_token, axis=2), crowded, complete=False)


def test_more_blocks_than_one_word_of_the_table_holds() -> None:
    indices = np.array([[[[0, 31, 32, 63, 64, 69]] * 70]])
    block_mask = create_fine_mask(70, 1)(torch.as_tensor(indices))
    sizes = Sizes(selection_block_size=1)
    assert_reads(block_mask, nsa_ref.masks.fine_mask(70, 70, indices, sizes, LUCIDRAINS_FLEX))


# --- upstream's three calls -----------------------------------------------------------------------

PAIRS = torch.zeros(1, 1, 8, 2, dtype=torch.int64)


def fine(indices: Any, *group: int) -> BlockMask:
    return create_fine_mask(8, 4)(indices, *group)


def test_masks_are_named_after_their_sizes() -> None:
    masks = (create_sliding_mask(8, 3), create_compress_mask(8, 2, 4, 1), fine(PAIRS))
    names = [mask.mask_mod.__name__ for mask in masks]
    assert names == ["sliding_3", "compress_4_mem_1", "fine_4"]


@FEW
@given(LENGTHS, st.integers(0, 20), SPANS, EXTRA, FLAGS)
def test_create_compress_mask_for_lengths_that_do_not_fit(
    seq_len: int, kv_seq_len: int, stride: int, memory: int, causal: bool
) -> None:
    """Column c is visible iff c < memory or t > d (c - memory) + d - 1: the table's own words."""
    rows, columns = np.arange(seq_len)[:, None], np.arange(memory + kv_seq_len)
    expected = (columns < memory) | (rows > stride * (columns - memory) + stride - 1) | (not causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "BLOCK_SIZE", (4, 4))
        block_mask = create_compress_mask(seq_len, kv_seq_len, stride, memory, causal)
    assert_reads(block_mask, expected)


@FEW
@given(LENGTHS, st.integers(1, 50), COUNTS, GROUPS, FLAGS, BLOCK_SIZES, SEEDS)
def test_create_fine_mask(
    seq_len: int, size: int, n: int, group: int, causal: bool, tile: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    indices = strange_indices(rng, (2, 2, seq_len, n), -(-seq_len // size))
    semantics = dataclasses.replace(LUCIDRAINS_FLEX, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "BLOCK_SIZE", tile)
        patch.setattr(block_lists, "LEAST_LENGTH", 0)  # these are used at their own length
        block_mask = create_fine_mask(seq_len, size, causal)(torch.as_tensor(indices), group)
        sizes = Sizes(q_heads=2 * group, selection_block_size=size)
        expected = nsa_ref.masks.fine_mask(seq_len, seq_len, indices, sizes, semantics)
        assert_reads(block_mask, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_flexattention_prints_and_compiles_upstreams_masks(causal: bool) -> None:
    """Both read lists that are as wide as there are blocks; narrower ones are an IndexError."""
    indices = torch.zeros(1, 1, 700, 1, dtype=torch.int64)
    for block_mask in (
        create_sliding_mask(700, 3, causal),
        create_compress_mask(700, 600, 1, 3, causal),
        create_fine_mask(700, 32, causal)(indices),
    ):
        rows, columns = block_mask.seq_lengths
        cells = block_mask_readings(block_mask, rows, columns)["mask_mod"][0, 0]
        row, column = np.arange(0, rows, 128), np.arange(0, columns, 128)
        blocks = np.maximum.reduceat(np.maximum.reduceat(cells, row), column, axis=1)
        np.testing.assert_array_equal(block_mask.to_dense()[0, 0], blocks)
        assert str(block_mask)
        for listed in (block_mask.kv_indices, block_mask.full_kv_indices):
            assert listed is not None and listed.shape[3] == len(column)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_block_indices_of_any_integer_type(dtype: torch.dtype) -> None:
    indices = torch.randint(0, 2, (1, 1, 8, 2), generator=torch.Generator().manual_seed(0))
    sizes = Sizes(selection_block_size=4)
    expected = nsa_ref.masks.fine_mask(8, 8, indices.numpy(), sizes, LUCIDRAINS_FLEX)
    assert_reads(fine(indices.to(dtype)), expected)


VALUE_ERRORS: Refusals = {
    "seq_len=-1 must be at least 0.": lambda: create_sliding_mask(-1, 2),
    "seq_len=2147483648 must be below 1073741824.": lambda: create_sliding_mask(2**31, 2),
    "seq_len=134217728 makes block lists of 1048576 x 1048576 entries; they must be at most "
    "268435456, because FlexAttention prints and compiles lists as wide as there are blocks": (
        lambda: create_sliding_mask(2**27, 1000)
    ),
    "compress_block_sliding_stride=0 must be at least 1.": lambda: create_compress_mask(8, 2, 0),
    "fine_block_size=0 must be at least 1.": lambda: create_fine_mask(8, 0),
    "selected_block_indices has shape (1, 1, 7, 2); it must be (batch, kv_heads, 8, n)": (
        lambda: fine(PAIRS[:, :, :7])
    ),
    "num_grouped_queries=0 must be at least 1.": lambda: fine(PAIRS, 0),
}
TYPE_ERRORS: Refusals = {
    "window_size=2.0 must be an integer, not float.": lambda: create_sliding_mask(8, 2.0),
    "causal=1 must be True or False, not int.": lambda: create_sliding_mask(8, 2, 1),
    "mem_kv_len=True must be an integer, not bool.": lambda: create_compress_mask(8, 2, 4, True),
    "it must hold integers: block numbers, and -1 in unused slots. Try torch.int64": (
        lambda: fine(PAIRS.float())
    ),
    "selected_block_indices must be a torch.Tensor, not list.": lambda: fine([[0, 1]]),
}
test_what_does_not_run_is_named = refusal_test(VALUE_ERRORS, TYPE_ERRORS)


# --- nothing as large as rows x columns -----------------------------------------------------------


def test_fine_lists_of_16k_tokens_grow_with_tokens_times_n() -> None:
    tokens, block_size, n = 2**14, 64, 16
    indices = torch.randint(0, tokens // block_size, (1, 1, tokens, n))
    with Largest() as largest:
        block_mask, _ = block_masks.fine_block_mask(
            tokens, indices, FineLayout(16, 16, block_size, block_size), PAPER
        )
    # the transposes may be that many times as large as the lists
    assert largest.elements <= block_lists.CROWDED * tokens * n
    assert block_mask.kv_indices.shape == (1, 1, tokens, n)


def test_sliding_lists_of_a_million_tokens_are_as_wide_as_the_window() -> None:
    tokens = 2**20
    with Largest() as largest:
        block_mask = block_masks.sliding_block_mask(
            tokens, tokens, 512, PAPER, block_size=(128, 128), device=CPU
        )
    assert block_mask.kv_indices.shape[2:] == (tokens // 128, 6)
    # finding the entries of a list takes four indices each
    assert largest.elements <= 4 * block_mask.kv_indices.numel() < 2 * tokens


@pytest.mark.skipif(not block_lists.OWN_STRIDES, reason="lists with strides of their own")
@pytest.mark.parametrize("num_mem_kv", [0, 200])
def test_compress_lists_of_a_million_tokens_grow_with_the_tokens(num_mem_kv: int) -> None:
    """What all rows walk the beginning of is stored once, and the rest is as narrow as a window."""
    tokens = 2**20
    windows = Windows(32, 16, PAPER)
    blocks = windows.count(tokens)
    with Largest() as largest:
        block_mask = block_masks.compress_block_mask(
            tokens, blocks, num_mem_kv, windows, offset=0, device=CPU, block_size=(16, 16)
        )
    assert largest.elements <= 8 * tokens // 16
    assert block_mask.full_kv_indices.shape[3] == -(-(num_mem_kv + blocks) // 16)


def test_upstream_fine_mask_counts_cells_by_block_not_by_token() -> None:
    tokens = 2**14
    indices = torch.randint(0, tokens // 64, (1, 1, tokens, 2))
    with Largest() as largest:
        create_fine_mask(tokens, 64)(indices)
    assert largest.elements < tokens * tokens // 16


def chosen_of(batch: int, heads: int, tokens: int, num_blocks: int) -> block_lists.Chosen:
    """Sizes alone, without memory behind them."""
    none = torch.zeros((batch, heads, tokens, 0), dtype=torch.int64, device="meta")
    return block_lists.Chosen(none, num_blocks, 64, 64 * num_blocks, offset=0, ahead=0)


@pytest.mark.parametrize("tokens", [2**10, 2**16, 3 * 2**16, 2**18])
def test_the_membership_table_is_at_most_twice_what_is_needed(tokens: int) -> None:
    table, shape = block_lists.word_table(chosen_of(2, 4, tokens, tokens // 64))
    needed = 2 * 4 * tokens * shape[2]
    assert needed < len(table) <= max(block_lists.LEAST_TABLE, 2 * needed + 4 * shape[2])


def test_a_membership_table_that_int32_cannot_index_is_refused() -> None:
    block_lists.table_entries(8, 16, 2**19 - 1, 2**10)
    message = (
        r"batch=8 x heads=16 x tokens=524288 x selection blocks=1024 make a membership table of "
        r"2147483681 words .* below 2\*\*31"
    )
    with pytest.raises(ValueError, match=message):
        block_lists.word_table(chosen_of(8, 16, 2**19, 2**10))


@pytest.mark.parametrize("own_strides", [False, True])
def test_transposed_lists_are_of_one_width_only_for_the_torch_that_needs_it(
    own_strides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_lists, "OWN_STRIDES", own_strides)
    monkeypatch.setattr(block_lists, "CROWDED", 64)
    indices = torch.zeros(1, 1, 64, 1, dtype=torch.int64)  # all see block 0: whole, but for 3
    block_mask, crowded = block_masks.fine_block_mask(64, indices, FineLayout(1, 1, 4, 4), PAPER)
    assert crowded is None
    assert block_mask.q_indices.shape[3] == (3 if own_strides else 61)
    assert block_mask.full_q_indices.shape[3] == 61
    expected = nsa_ref.masks.fine_mask(
        64, 64, indices.numpy(), Sizes(selection_block_size=4), PAPER
    )
    assert_reads(block_mask, expected, complete=False)


def test_the_host_does_not_wait_for_lists() -> None:
    """Tensors without numbers: what asks for one raises."""
    nowhere = torch.device("meta")
    block_masks.sliding_block_mask(1000, 1000, 512, PAPER, device=nowhere)
    windows = Windows(32, 16, PAPER)
    block_masks.compress_block_mask(1000, windows.count(1000), 1, windows, offset=0, device=nowhere)
    indices = torch.empty(1, 4, 1000, 16, dtype=torch.int64, device=nowhere)
    chosen, _ = block_masks.chosen_blocks(1000, indices, 64, PAPER)
    fine_lists.union(chosen, fine_lists.tokens_per_tile(16))


def test_masks_of_sizes_are_made_once_for_each_that_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream of a GPU, inference mode; a CUDA graph that is captured makes its own each time."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    stream = mock.Mock(cuda_stream=1)
    capturing = mock.Mock(return_value=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
    builder = mock.Mock(side_effect=lambda *sizes, **named: object())

    def made(*sizes: int, device: torch.device = gpu, q_lists: bool = True) -> int:
        before = builder.call_count
        block_masks.of_sizes(builder, *sizes, device=device, q_lists=q_lists)
        return builder.call_count - before

    assert [made(8, 8), made(8, 8), made(8, 9), made(8, 8, q_lists=False)] == [1, 0, 1, 1]
    stream.cuda_stream = 2
    assert [made(8, 8), made(8, 8)] == [1, 0]
    with torch.inference_mode():
        assert [made(8, 8), made(8, 8)] == [1, 0]
    capturing.return_value = True
    assert [made(8, 8), made(8, 8)] == [1, 1]
    assert [made(8, 8, device=cpu), made(8, 8, device=cpu)] == [1, 1]


def papers_choice(tokens: int, block_size: int, n: int) -> torch.Tensor:
    """The initial block, the own and the one before, and others at random: (1, 2, tokens, n)."""
    own = (torch.arange(tokens) // block_size)[:, None]
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(1, 2, tokens, n - 3, generator=generator) * (own + 1)
    forced = torch.cat([torch.zeros_like(own), own, own - 1], dim=1)
    return torch.cat([forced.expand(1, 2, tokens, 3), others.long()], dim=3)


def test_transposed_lists_stay_narrow_where_every_token_sees_the_initial_block() -> None:
    """They are as wide as CROWDED times the mean, n l', whatever the number of tokens."""
    block_size, n = 16, 4
    widths = []
    for tokens in (1024, 2048, 4096):
        block_mask, crowded = block_masks.fine_block_mask(
            tokens,
            papers_choice(tokens, block_size, n),
            FineLayout(4, 4, block_size, block_size),
            PAPER,
        )
        assert crowded is not None
        assert [place for place in crowded.places if place[2] == 0] == [(0, 0, 0), (0, 1, 0)]
        assert len(crowded.rows[0]) == tokens
        # chance takes early blocks more often than late ones: a few are crowded as well
        assert len(crowded.places) <= 2 * (tokens // block_size) // 16
        widths.append((block_mask.q_indices.shape[3], block_mask.full_q_indices.shape[3]))
    assert all(max(pair) <= block_lists.CROWDED * n * block_size for pair in widths)


# --- the adapter shows what the branches use ------------------------------------------------------

CASE = Case(semantics=LUCIDRAINS_FLEX, q_heads=2, q_len=40, kv_len=40)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
def test_adapter_exposes_the_branch_and_upstreams_call(branch: Branch) -> None:
    """In all their parts; that each is the oracle's is a property of the judge.

    The fine branch's predicate alone says nothing: it knows what is cut, and the lists what is
    chosen.
    """
    given = [CASE.block_indices()] if branch is FINE else []
    value = NsaFastEager().run(f"{branch.name}_mask", CASE, *given)
    readings = exposed_readings(value, *branch.mask(CASE, *given or [None]).shape[-2:])
    assert {reading.name for reading in readings} == {
        f"{maker} {part}"
        for maker in (f"{branch.name}_attention", f"create_{branch.name}_mask")
        for part in ("mask_mod", "kv lists", "q lists")
    } - {"fine_attention mask_mod"}


def test_implementations_by_device() -> None:
    kinds = ["nsa_fast eager", "nsa_fast compiled", "nsa_fast layer"]
    assert [i.name for i in implementations("cpu")] == kinds
    assert [i.name for i in implementations("cuda")] == kinds[1:]
    eager, compiled, layer = implementations("cpu")
    assert eager.offers_vjp("fine") and not compiled.offers_vjp("fine")
    # the layer runs what there is: float64 as well here, and there what is compiled
    cuda, layer_on_cuda = implementations("cuda")
    assert (layer.numerics, layer_on_cuda.numerics) == (eager.numerics, cuda.numerics)
    # there compress's backward stores dk and dv of each query head
    assert (compiled.numerics["float16"], cuda.numerics["float16"]) == ("fp16", "fp16-head")
    assert layer.offers_vjp("layer") and not layer.offers_vjp("decode")
    assert not any(i.offers("layer") for i in (eager, compiled))
    assert cuda.offers_vjp("fine")
    # compiled to C++, heads that choose for themselves are left to eager
    unshared = dataclasses.replace(PAPER, share_selection=False)
    asked = {i.name: unshared in i.semantics for i in (eager, compiled)}
    assert asked == {"nsa_fast eager": True, "nsa_fast compiled": False}
    assert unshared in cuda.semantics
    with pytest.raises(ValueError, match="device='tpu' must be one of 'cpu', 'cuda', 'int"):
        implementations("tpu")
