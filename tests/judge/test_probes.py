"""The read-outs are exact: one cell planted anywhere is seen, and nothing that was not planted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import trials
from nsa_ref.attention import Attention
from nsa_ref.semantics import LUCIDRAINS, PAPER
from nsa_ref.testing import Case, OracleImplementation, probes
from nsa_ref.testing.branches import BRANCHES, FINE, SLIDING, Branch, Raised
from nsa_ref.testing.case import DTYPES
from nsa_ref.testing.devices import Device
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.strategies import Drawn, cases, fresh_seeds
from port_zoo import Returns

branches = pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES)

Cell = tuple[int, int, int, int]


def of_small_cases(test: Callable[..., None]) -> Any:
    """Of every branch and dtype, with data to draw `small_cases` from."""
    return branches(dtypes(level_settings("quick", 8)(given(data=st.data())(test))))


class Planted(OracleImplementation):
    """The oracle with some cells of its mask changed: in the forward, or in single gradients."""

    def __init__(self, cells: Any, count: Any, *where: str) -> None:
        self.cells, self.count, self.where = cells, count, where

    def changed(self, mask: np.ndarray, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        mask = np.array(np.broadcast_to(mask, (*q.shape[:3], k.shape[2])))
        mask[self.cells] = self.count
        return mask

    def attend(self, case: Case, branch: str, mask: np.ndarray, *qkv: Any) -> Attention:
        if "out" in self.where:
            mask = self.changed(mask, *qkv[:2])
        return super().attend(case, branch, mask, *qkv)

    def attend_vjp(self, case: Case, branch: str, mask: np.ndarray, *given: Any) -> Any:
        right = super().attend_vjp(case, branch, mask, *given)
        wrong = super().attend_vjp(case, branch, self.changed(mask, *given[:2]), *given)
        names = ("dq", "dk", "dv")
        return tuple(w if n in self.where else r for n, r, w in zip(names, right, wrong))


def small_cases(branch: Branch, dtype: str) -> st.SearchStrategy[Case]:
    """Something to plant in: rows and columns in every branch, groups small enough to be probed."""

    def adjust(draw: st.DrawFn, sizes: Drawn) -> None:
        sizes["batch"] = max(1, min(2, sizes["batch"]))
        sizes["kv_heads"] = min(2, sizes["kv_heads"])
        sizes["q_heads"] = sizes["kv_heads"] * draw(st.integers(1, Device.heads_probed))
        sizes["q_len"] = max(1, min(10, sizes["q_len"]))
        sizes["kv_len"] = max(1, min(10, sizes["kv_len"]))
        sizes["num_mem_kv"] = max(1, min(3, sizes["num_mem_kv"]))
        sizes["num_selected_blocks"] = min(4, sizes["num_selected_blocks"])

    return cases(
        OracleImplementation(),
        branch.name,
        dtypes=[dtype],
        head_dims=(3, 8, 16),
        max_len=10,
        adjust=adjust,
    )


def mask_of(branch: Branch, case: Case) -> np.ndarray:
    return branch.mask(case, case.block_indices() if branch is FINE else None)


def a_cell(data: st.DataObject, mask: np.ndarray) -> Cell:
    b, h, t, j = (data.draw(st.integers(0, size - 1)) for size in mask.shape)
    return b, h, t, j


# --- the forward ----------------------------------------------------------------------------------


@of_small_cases
def test_forward_of_the_definition_is_its_mask(branch: Branch, dtype: str, data: Any) -> None:
    case = data.draw(small_cases(branch, dtype))
    mask = mask_of(branch, case)
    seen = probes.forward_mask(OracleImplementation(), branch, case, mask)
    np.testing.assert_array_equal(seen, mask)


@of_small_cases
def test_every_cell_planted_in_the_forward_is_seen(branch: Branch, dtype: str, data: Any) -> None:
    """0 and 1 swapped, or counted once more or less often; in that row and in no other."""
    case = data.draw(small_cases(branch, dtype))
    mask = mask_of(branch, case)
    cell = a_cell(data, mask)
    count = data.draw(st.sampled_from([c for c in range(4) if c != mask[cell]]), label="count")
    row, before = cell[:3], mask[cell]
    others = mask[row].sum() - before
    # what out cannot show: a lonely key counted twice (lse shows it), and whether an empty row is
    # the mean of its only column (A2's question)
    assume(others or not (before and count))
    assume(others or mask.shape[-1] > 1)
    seen = probes.forward_mask(Planted(cell, count, "out"), branch, case, mask)
    assert (seen[row] != mask[row]).any()
    if others and (before == 0 or count == 0):
        assert (seen[cell] == 0) == (count == 0)
        assert ((seen[row] == 0) == (mask[row] == 0)).sum() == mask.shape[-1] - 1
    seen[row] = mask[row]
    np.testing.assert_array_equal(seen, mask)


@dtypes
def test_every_single_bit_of_a_small_mask(dtype: str) -> None:
    """All flips of one mask, none missed, and nothing else seen."""
    case = Case(
        dtype=dtype, q_heads=2, q_len=8, kv_len=8, head_dim=8, value_dim=8, sliding_window_size=3
    )
    mask = mask_of(SLIDING, case)
    for cell in np.ndindex(*mask.shape):
        planted = Planted(cell, 1 - int(mask[cell]), "out")
        seen = probes.forward_mask(planted, SLIDING, case, mask)
        if mask[cell] and mask[cell[:3]].sum() == 1:
            # the lonely key taken away: the row is empty, and shows nothing
            assert (seen[cell[:3]] == 0).all()
        else:
            assert np.argwhere(seen != mask).tolist() == [list(cell)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (1, 1, 2), (2, 2, 1), (3, 1), (2, 3)])
def test_duplicates_in_short_rows(counts: tuple[int, ...], dtype: str) -> None:
    """Counted twice where once is right, and once where twice is: also among two keys."""
    n = len(counts)
    case = Case(dtype=dtype, q_len=1, kv_len=n, head_dim=4, value_dim=4, sliding_window_size=n)
    ones = mask_of(SLIDING, case)
    several = np.array(counts).reshape(ones.shape)

    counting = Planted(..., several, "out")
    seen = probes.forward_mask(counting, SLIDING, case, ones)
    assert (seen != ones).any()
    if min(counts) == 1:
        np.testing.assert_array_equal(seen, several)
    np.testing.assert_array_equal(probes.forward_mask(counting, SLIDING, case, several), several)
    assert (probes.forward_mask(OracleImplementation(), SLIDING, case, several) != several).any()


class Padding(OracleImplementation):
    """One zero key more than there are, seen by every row."""

    def attend(
        self, case: Case, branch: str, mask: np.ndarray, q: Any, k: Any, v: Any
    ) -> Attention:
        mask = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
        mask = np.pad(mask, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
        k, v = (np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]) for x in (k, v))
        return super().attend(case, branch, mask, q, k, v)


@of_small_cases
def test_padding_that_is_attended_to_is_seen(branch: Branch, dtype: str, data: Any) -> None:
    """Every row that sees anything sums to less than 1, and is marked where it should see."""
    case = data.draw(small_cases(branch, dtype))
    mask = mask_of(branch, case)
    if branch is not SLIDING:
        assume(mask.shape[-1])
    seen = probes.forward_mask(Padding(), branch, case, mask)
    np.testing.assert_array_equal(seen, np.where(mask != 0, -1, 0))


def test_a_row_of_nan_is_told_apart() -> None:
    """It is wrong wherever it should see a key."""

    class NotANumber(OracleImplementation):
        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
            out, lse = super().sliding(case, q, k, v)
            out[:, :, -1] = np.nan
            return Attention(out, lse)

    case = Case(q_len=3, kv_len=3, sliding_window_size=1)
    mask = mask_of(SLIDING, case)
    seen = probes.forward_mask(NotANumber(), SLIDING, case, mask)
    np.testing.assert_array_equal(seen[:, :, -1], np.where(mask[:, :, -1], -2, 0))
    assert mask[:, :, -1].any()
    np.testing.assert_array_equal(seen[:, :, :-1], mask[:, :, :-1])


@pytest.mark.parametrize("declared", [PAPER, LUCIDRAINS], ids=["zero", "uniform"])
@pytest.mark.parametrize("followed", [PAPER, LUCIDRAINS], ids=["zero", "uniform"])
def test_an_empty_row_sees_nothing_in_particular(declared: Any, followed: Any) -> None:
    """What it must hold is A2's question, whichever way it is declared."""
    case = Case(semantics=declared, q_len=4, kv_len=2, sliding_window_size=1)
    mask = mask_of(SLIDING, case)
    assert (mask[0, 0, :2] == 0).all()

    class Other(OracleImplementation):
        def attend(self, case: Case, *rest: Any) -> Attention:
            return super().attend(dataclasses.replace(case, semantics=followed), *rest)

    np.testing.assert_array_equal(probes.forward_mask(Other(), SLIDING, case, mask), mask)


# --- the backward ---------------------------------------------------------------------------------


@of_small_cases
def test_backward_of_the_definition_is_its_mask(branch: Branch, dtype: str, data: Any) -> None:
    case = data.draw(small_cases(branch, dtype))
    patterns = probes.backward_patterns(OracleImplementation(), branch, case, mask_of(branch, case))
    assert [pattern.gradient for pattern in patterns] == ["dv", "dq", "dk"]
    for pattern in patterns:
        assert not pattern.wrong().any()


@pytest.mark.parametrize("gradient", ["dv", "dq", "dk"])
@of_small_cases
def test_a_bit_flipped_in_one_gradient_alone_is_seen(
    branch: Branch, dtype: str, gradient: str, data: Any
) -> None:
    """Named by that gradient and by no other, in that row; with other data where D hides it."""
    case = data.draw(small_cases(branch, dtype))
    mask = mask_of(branch, case)
    cell = a_cell(data, mask)
    row, count = cell[:3], 0 if mask[cell] else 1
    others = int((mask[row] != 0).sum()) - int(mask[cell] != 0)
    # a lonely key weighs 1 whatever its logit: only dv knows of it
    assume(others or gradient == "dv")
    # the gradients through an empty row that is not zero are nobody's business
    assume(branch.empty_row(case) == "zero" or (mask[row].any() and others))
    planted = Planted(cell, count, gradient)
    assert not (probes.forward_mask(planted, branch, case, mask) != mask).any()
    found = False
    for fresh in [case, *fresh_seeds(case, 3)]:
        # the block indices come from the seed, and are to stay: only the fine mask reads them
        if branch is FINE and not (mask_of(branch, fresh) == mask).all():
            continue
        for pattern in probes.backward_patterns(planted, branch, fresh, mask):
            wrong = pattern.wrong()
            if pattern.gradient == gradient:
                found |= bool(wrong[cell])
                wrong[row] = False
            assert not wrong.any()
        if found:
            break
    if branch is not FINE or gradient == "dv":
        assert found


def test_every_pair_lost_by_dk_is_named() -> None:
    """The transposed list that loses a query: dk and dv miss exactly its pairs.

    P of the rows that are left is the same: only the sum over queries is short.
    """
    lost_query = Planted(np.s_[:, :, 2], 0, "dk", "dv")
    case = Case(
        batch=2, q_heads=4, kv_heads=2, q_len=5, kv_len=5, head_dim=4, value_dim=4,
        sliding_window_size=5,
    )  # fmt: skip
    mask = mask_of(SLIDING, case)
    for pattern in probes.backward_patterns(lost_query, SLIDING, case, mask):
        wrong = pattern.wrong()
        assert wrong.any() == (pattern.gradient != "dq")
        assert set(np.argwhere(wrong)[:, 2].tolist()) <= {2}
        if pattern.gradient == "dv":
            np.testing.assert_array_equal(wrong[:, :, 2], mask[:, :, 2] != 0)


def test_at_most_four_heads_of_a_group_are_sent_one_hot_rows() -> None:
    """Of 16 heads, dv and dk are read for 4, chosen by the seed; dq for all."""
    case = Case(q_heads=16, q_len=3, kv_len=3, head_dim=3, value_dim=3, sliding_window_size=3)
    chosen = set()
    for seed in range(8):
        seeded = dataclasses.replace(case, seed=seed)
        dv, dq, dk = probes.backward_patterns(
            OracleImplementation(), SLIDING, seeded, mask_of(SLIDING, case)
        )
        heads = np.flatnonzero(dv.decided.any((0, 2, 3)))
        assert len(heads) == Device.heads_probed
        assert set(np.flatnonzero(dk.decided.any((0, 2, 3)))) <= set(heads)
        assert dq.decided.any((0, 2, 3)).all()
        chosen |= set(heads.tolist())
    assert len(chosen) > Device.heads_probed


# --- heads ----------------------------------------------------------------------------------------


@branches
@pytest.mark.parametrize("interleaved", ["neither", "keys", "values"])
def test_the_head_maps_of_keys_and_values_are_read_apart(branch: Branch, interleaved: str) -> None:
    """h // G for both, or h % kv_heads for one of them."""
    blocked, woven = np.arange(6) // 2, np.arange(6) % 3
    of_k, of_v = (woven if interleaved == what else blocked for what in ("keys", "values"))

    class Interleaved(OracleImplementation):
        def attend(
            self, case: Case, name: str, mask: np.ndarray, q: Any, k: Any, v: Any
        ) -> Attention:
            return super().attend(case, name, mask, q, k[:, of_k], v[:, of_v])

    case = Case(
        q_heads=6, kv_heads=3, q_len=4, kv_len=4, head_dim=8, value_dim=8, num_mem_kv=2,
        num_selected_blocks=4, indices="all", sliding_window_size=3,
    )  # fmt: skip
    inputs = branch.inputs(case)
    for kv_head in range(3):
        found = probes.head_influence(Interleaved(), branch, case, inputs, kv_head)
        for moved, reads in zip(found, (of_k, of_v)):
            np.testing.assert_array_equal(moved.any((0, 2, 3)), reads == kv_head)


# --- block masks ----------------------------------------------------------------------------------

ROWS, COLUMNS, BLOCK = 5, 7, (2, 3)  # both ends are ragged


def a_mask() -> np.ndarray:
    """(2, 2, 5, 7), with full, partial and empty blocks in every head."""
    b, h, t, j = np.indices((2, 2, ROWS, COLUMNS))
    return (j <= t + b) | ((h > 0) & (j >= 6))


def predicate(mask: np.ndarray) -> Callable[..., Any]:
    torch = pytest.importorskip("torch", reason="a BlockMask is torch's")
    bits = torch.tensor(mask)
    return lambda b, h, t, j: bits[b, h, t, j]


def block_mask(mask: np.ndarray, **changes: Any) -> Any:
    """A right BlockMask of a boolean mask, with some of its parts changed by functions."""
    torch = pytest.importorskip("torch", reason="a BlockMask is torch's")
    from torch.nn.attention.flex_attention import BlockMask

    batch, heads, rows, columns = mask.shape
    shape = (batch, heads, -(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    some, every = np.zeros(shape, bool), np.zeros(shape, bool)
    for b, h, i, j in np.ndindex(*shape):
        cells = mask[b, h, i * 2 : i * 2 + 2, j * 3 : j * 3 + 3]
        some[b, h, i, j], every[b, h, i, j] = cells.any(), cells.all()

    parts = {"mask_mod": predicate(mask)}
    for side, axes in (("kv", (0, 1, 2, 3)), ("q", (0, 1, 3, 2))):
        for kind, wanted in ((side, some & ~every), (f"full_{side}", every)):
            wanted = wanted.transpose(axes)
            parts[f"{kind}_num_blocks"] = torch.tensor(wanted.sum(-1), dtype=torch.int32)
            order = np.argsort(~wanted, axis=-1, kind="stable")
            parts[f"{kind}_indices"] = torch.tensor(order, dtype=torch.int32)
    for name, change in changes.items():
        parts[name] = change(parts[name])
    return BlockMask(seq_lengths=(rows, columns), BLOCK_SIZE=BLOCK, **parts)


def readings(**changes: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    return probes.block_mask_readings(block_mask(a_mask(), **changes), ROWS, COLUMNS)


def setting(index: tuple[int, ...], value: int) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def assert_read(found: dict[str, np.ndarray], **expected: np.ndarray) -> None:
    """These parts, by their first words, show this; all others the mask."""
    assert list(found) == ["mask_mod", "kv lists", "q lists"]
    for part, cells in found.items():
        np.testing.assert_array_equal(cells, expected.get(part.split()[0], a_mask()), part)


def test_a_right_block_mask_reads_the_same_in_all_its_parts() -> None:
    """Ragged ends included: what lies past them is no cell."""
    assert_read(readings())


def test_a_block_mask_without_full_blocks_or_transposes() -> None:
    """FlexAttention allows both to be missing; then everything is asked cell by cell."""
    everything = block_mask(np.ones((1, 1, ROWS, COLUMNS), bool))
    moved = {
        "kv_num_blocks": lambda _: everything.full_kv_num_blocks,
        "kv_indices": lambda _: everything.full_kv_indices,
    }
    kinds, ends = ("full_kv", "q", "full_q"), ("num_blocks", "indices")
    gone = dict.fromkeys([f"{kind}_{end}" for kind in kinds for end in ends], lambda _: None)
    mask = a_mask()[:1, :1]
    found = probes.block_mask_readings(block_mask(mask, **moved, **gone), ROWS, COLUMNS)
    assert list(found) == ["mask_mod", "kv lists"]
    np.testing.assert_array_equal(found["kv lists"], mask)


def test_a_full_block_that_is_not_full_shows() -> None:
    """The right mask_mod is not asked inside a full block: the kernel reads all of it."""
    changed = a_mask()
    changed[1, 0, 4, 0] = False  # the lists stay as they are for the mask
    assert_read(readings(mask_mod=lambda _: predicate(changed)), mask_mod=changed)


def test_partial_and_full_taken_for_each_other_show() -> None:
    """Partial blocks are then read whole: extra cells, and none missing."""
    mask = a_mask()
    right = block_mask(mask)
    found = readings(
        kv_num_blocks=lambda _: right.full_kv_num_blocks,
        kv_indices=lambda _: right.full_kv_indices,
        full_kv_num_blocks=lambda _: right.kv_num_blocks,
        full_kv_indices=lambda _: right.kv_indices,
    )
    cells = found["kv lists"]
    assert_read(found, kv=cells)
    assert (cells >= mask).all()
    assert (cells > mask).any((2, 3)).all()


def test_a_block_named_twice_counts_twice() -> None:
    right = block_mask(a_mask())
    numbers, indices = right.kv_num_blocks.clone(), right.kv_indices.clone()
    block = int(indices[0, 1, 2, 0])
    indices[0, 1, 2, int(numbers[0, 1, 2])] = block
    numbers[0, 1, 2] += 1
    expected = a_mask().astype(int)
    expected[0, 1, 4:, 3 * block : 3 * block + 3] *= 2
    assert expected.max() == 2
    assert_read(
        readings(kv_num_blocks=lambda _: numbers, kv_indices=lambda _: indices), kv=expected
    )


@pytest.mark.parametrize("kind", ["q", "full_q"])
def test_a_transposed_block_that_is_missing_shows_in_the_q_lists_alone(kind: str) -> None:
    right = block_mask(a_mask())
    numbers, indices = getattr(right, f"{kind}_num_blocks"), getattr(right, f"{kind}_indices")
    last = int(numbers[1, 0, 0]) - 1
    row_block = int(indices[1, 0, 0, last])
    expected = a_mask()
    expected[1, 0, 2 * row_block : 2 * row_block + 2, :3] = False
    assert (expected != a_mask()).any()
    assert_read(readings(**{f"{kind}_num_blocks": setting((1, 0, 0), last)}), q=expected)


@pytest.mark.parametrize("kind", ["kv", "full_kv", "q", "full_q"])
@pytest.mark.parametrize("block", [3, -1, 2**31 - 1])
def test_a_block_that_does_not_exist_is_an_error(kind: str, block: int) -> None:
    """Rows and columns have 3 blocks each; a kernel would read outside of the tensors."""
    numbers = getattr(block_mask(a_mask()), f"{kind}_num_blocks")
    where = tuple(int(i) for i in np.argwhere(numbers.numpy() > 0)[0])
    with pytest.raises(Raised, match=rf"{kind}_indices\[.*\] names block {block} of 3"):
        readings(**{f"{kind}_indices": setting((*where, 0), block)})
    # in a slot that is not used it is nothing
    free = tuple(int(i) for i in np.argwhere(numbers.numpy() < 3)[0])
    assert_read(readings(**{f"{kind}_indices": setting((*free, 2), block)}))


def test_more_blocks_than_slots_is_an_error() -> None:
    with pytest.raises(Raised, match="kv_indices"):
        readings(kv_num_blocks=setting((0, 0, 0), 4))


def test_lists_of_one_batch_and_head_are_read_once() -> None:
    """(1, 1, rows, columns), to be broadcast by whoever compares."""
    mask = a_mask()[:1, :1]
    found = probes.block_mask_readings(block_mask(mask), ROWS, COLUMNS)
    for cells in found.values():
        np.testing.assert_array_equal(cells, mask)
        assert cells.shape == (1, 1, ROWS, COLUMNS)


def test_row_blocks_that_the_lists_do_not_have_are_not_read() -> None:
    """A BlockMask that is too short for its rows leaves the last ones without keys."""
    lists = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    found = readings(**dict.fromkeys(lists, lambda t: t[:, :, :2]))
    expected = a_mask()
    expected[:, :, 4] = False
    assert_read(found, kv=expected)


def test_what_a_mask_method_may_return() -> None:
    """Arrays, block masks, or a dict of them; numbers that are no multiplicities are refused."""
    mask = np.array([[True, False]])
    (plain,) = probes.exposed_readings(mask, 1, 2)
    assert (plain.name, plain.is_list) == ("", False)
    assert plain.cells is mask
    masks = {"lists": block_mask(a_mask()), "from my kv lists": mask}
    readings = probes.exposed_readings(masks, ROWS, COLUMNS)
    found = {r.name: r.is_list for r in readings}
    assert found == {
        "lists mask_mod": False,
        "lists kv lists": True,
        "lists q lists": True,
        "from my kv lists": False,  # a port's own name for a mask says nothing
    }
    elsewhere = {r.name: r._replace(name="") for r in readings}  # read in another process
    assert probes.exposed_readings(elsewhere, ROWS, COLUMNS) == readings
    with pytest.raises(Raised, match="a mask of dtype float64; it must hold booleans or integers"):
        probes.exposed_readings(np.zeros((2, 2)), 2, 2)


def test_a_mask_that_no_memory_would_hold_is_refused_by_its_shape(tmp_path: Path) -> None:
    mask = np.broadcast_to(np.array(True), (1, 1, 10**15))
    found = trials.finding("W1_sliding_mask_as_exposed", Returns("vast", mask), tmp_path)
    assert "has shape (1, 1, 1000000000000000); it must broadcast to" in found["text"]
