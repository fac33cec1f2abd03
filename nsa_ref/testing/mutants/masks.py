"""Mutants of the masks: the oracle, asked about another case or with some cells changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nsa_ref.semantics import PAPER
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import OracleImplementation
from nsa_ref.testing.mutants.dense import positions
from nsa_ref.testing.mutants.zoo import mutant


def switched(case: Case, **switches: Any) -> Case:
    """The case under another convention."""
    semantics = dataclasses.replace(case.semantics, **switches)
    return dataclasses.replace(case, semantics=semantics)


def cut(case: Case, mask: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The mask of a causal case without the cells that are not `visible`."""
    return mask * visible if case.semantics.causal else mask


# --- sliding --------------------------------------------------------------------------------------


@mutant("W1", "the window is one key too long")
class WindowPlusOne(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        longer = dataclasses.replace(case, sliding_window_size=case.sliding_window_size + 1)
        return super().sliding_mask(longer)


@mutant("W1", "the window is one key too short")
class WindowMinusOne(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        closed = case.semantics.window_closed and case.sliding_window_size == 0
        return super().sliding_mask(switched(case, window_closed=closed))


class _LastKeyLost(OracleImplementation):
    """Of several tiles of so many keys, a last one of one key is not read."""

    keys = 0

    def sliding_mask(self, case: Case) -> np.ndarray:
        mask = super().sliding_mask(case)
        if case.kv_len > self.keys and case.kv_len % self.keys == 1:
            mask[:, -1] = 0
        return mask


@mutant(
    "W1",
    "of several tiles of 64 keys, a last one of one key is not read",
    needs={"kv_len": "> 64", "kv_len_mod_64": 1},
)
class LastKeyOfTilesOf64Lost(_LastKeyLost):
    keys = 64


@mutant(
    "W1",
    "of several tiles of 128 keys, a last one of one key is not read",
    needs={"kv_len": "> 128", "kv_len_mod_128": 1},
)
class LastKeyOfTilesOf128Lost(_LastKeyLost):
    keys = 128


@mutant("W1", "with a cache, row 0 is taken for position 0")
class RowForPosition(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        length = max(case.q_len, case.kv_len)
        square = dataclasses.replace(case, q_len=length, kv_len=length)
        return super().sliding_mask(square)[: case.q_len, : case.kv_len]


@mutant(
    "W1",
    "the causal cut is lost to the window's by the precedence of operators",
    seen_in="public ports: `mask & q_idx >= kv_idx`",
)
class WindowForgetsTheFuture(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        return super().sliding_mask(switched(case, causal=False))


@mutant("W2", "the non-causal window looks back only")
class WindowLooksBack(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        return super().sliding_mask(switched(case, causal=True))


def _early_rows(case: Case, mask: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The mask, and in rows with p < 0 another one, where nothing is causal."""
    return mask if case.semantics.causal else np.where(positions(case) >= 0, mask, other)


@mutant(
    "W2",
    "without causality, rows before every token see the first keys of their window",
    needs={"q_len": "> kv_len", "causal": False},
)
class EarlyRowsSeeTheWindow(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        reach = case.sliding_window_size + case.semantics.window_closed
        near = np.arange(case.kv_len) - positions(case) < reach
        return _early_rows(case, super().sliding_mask(case), near)


@mutant(
    "W2",
    "without causality, rows before every token see every key",
    needs={"q_len": "> kv_len", "causal": False},
)
class EarlyRowsSeeAll(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        return _early_rows(case, super().sliding_mask(case), np.ones(case.kv_len, int))


@mutant("W3", "a window of 0 is taken for no window at all", needs={"sliding_window_size": 0})
class NoWindow(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        w = case.sliding_window_size or case.kv_len
        return super().sliding_mask(dataclasses.replace(case, sliding_window_size=w))


@mutant(
    "W1",
    "distances are kept in 9 bits: the window is seen again 512 keys further back",
    needs={"kv_len": "> 512"},
)
class NarrowDistance(OracleImplementation):
    def sliding_mask(self, case: Case) -> np.ndarray:
        mask = super().sliding_mask(case)
        again = mask[:, 512:]
        return mask | np.pad(again, ((0, 0), (0, case.kv_len - again.shape[1])))


# --- compress -------------------------------------------------------------------------------------


@mutant("C2", "the last token of a block is kept in 9 bits", needs={"kv_len": "> 512"})
class NarrowLastToken(OracleImplementation):
    def compress_mask(self, case: Case) -> np.ndarray:
        mask = super().compress_mask(case)
        early = 512 // case.compress_block_sliding_stride + 1
        mask[:, case.num_mem_kv + early :] = 1
        return mask


@mutant("C2", "a block is hidden at its last token where it is visible, or the other way round")
class Strictness(OracleImplementation):
    def compress_mask(self, case: Case) -> np.ndarray:
        strict = not case.semantics.compress_strict
        return super().compress_mask(switched(case, compress_strict=strict))


@mutant("C2", "a block is visible from its first token on")
class BlockTooEarly(OracleImplementation):
    def compress_mask(self, case: Case) -> np.ndarray:
        mask = super().compress_mask(case)
        first = np.arange(case.num_compress_blocks) * case.compress_block_sliding_stride
        if case.semantics.causal:
            mask[:, case.num_mem_kv :] = first <= positions(case)
        return mask


@mutant(
    "C2",
    "a block's last token is found in whole strides, as if d divided l",
    needs={"compress_block_size_mod_compress_block_sliding_stride": "!= 0"},
)
class LastTokenByStride(OracleImplementation):
    semantics = (PAPER,)

    def compress_mask(self, case: Case) -> np.ndarray:
        mask = super().compress_mask(case)
        d, p = case.compress_block_sliding_stride, positions(case)
        last = (np.arange(case.num_compress_blocks) + case.compress_block_size // d) * d - 1
        mask[:, case.num_mem_kv :] = (p >= 0) & (last <= p)
        return mask


@mutant("C3", "memory is masked like the blocks")
class MemoryMasked(OracleImplementation):
    def compress_mask(self, case: Case) -> np.ndarray:
        mask = super().compress_mask(case)
        column = np.arange(mask.shape[1])
        return cut(case, mask, (column >= case.num_mem_kv) | (column <= positions(case)))


@mutant("C3", "without causality blocks are still hidden")
class AlwaysCausalBlocks(OracleImplementation):
    def compress_mask(self, case: Case) -> np.ndarray:
        return super().compress_mask(switched(case, causal=True))


# --- fine -----------------------------------------------------------------------------------------


@mutant("F1", "the index of a block is kept in 8 bits", needs={"num_selection_blocks": "> 256"})
class BlockInEightBits(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        real = (block_indices >= 0) & (block_indices < case.num_selection_blocks)
        return super().fine_mask(case, np.where(real, block_indices % 256, block_indices))


@mutant(
    "F2",
    "16 slots for 16 heads: a short last block is not read",
    seen_in="a public kernel whose tiles are 16 by 16",
)
class ShortBlockOfSixteenSlots(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        mask = super().fine_mask(case, block_indices)
        if case.group_size == case.num_selected_blocks == 16:
            whole = case.kv_len // case.selection_block_size * case.selection_block_size
            mask[..., whole:] = 0
        return mask


@mutant(
    "F1",
    "blocks are told by the first token, which is kept in 9 bits",
    needs={"kv_len": "> 512"},
)
class NarrowFirstToken(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        mask = super().fine_mask(case, block_indices)
        mask[..., 512:] = 0
        return mask


@mutant("F1", "the causal cut inside a block is missing")
class NoCausalCut(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        mask = super().fine_mask(switched(case, causal=False), block_indices)
        size = case.selection_block_size
        mask = cut(case, mask, np.arange(case.kv_len) // size * size <= positions(case))
        # what is seen anyway, as the own block may be, still is
        return np.maximum(mask, super().fine_mask(case, block_indices))


@mutant("F1", "the query's own block is dropped")
class OwnBlockDropped(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        mask = super().fine_mask(case, block_indices)
        size = case.selection_block_size
        return cut(case, mask, np.arange(case.kv_len) // size < positions(case) // size)


@mutant("F2", "the last block counts only if it is whole")
class PartialBlockDropped(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        whole = case.kv_len // case.selection_block_size
        return super().fine_mask(case, np.where(block_indices >= whole, -1, block_indices))


@mutant("F3", "a block that is named twice counts twice, or once where twice is declared")
class Duplicates(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        other = {"set": "multiset", "multiset": "set"}[case.semantics.duplicates]
        return super().fine_mask(switched(case, duplicates=other), block_indices)


@mutant("F4", "without causality keys after p are cut all the same")
class AlwaysCausalFine(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        causal = switched(case, causal=True, own_block_extra=False)
        return super().fine_mask(causal, block_indices)


@mutant(
    "F4",
    "without causality, rows before every token see the blocks that they selected",
    needs={"q_len": "> kv_len", "causal": False},
)
class EarlyRowsSeeTheirBlocks(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        more = dataclasses.replace(case, kv_len=max(case.q_len, case.kv_len))
        blocks = np.where(block_indices < case.num_selection_blocks, block_indices, -1)
        all_see = super().fine_mask(more, blocks)[..., : case.kv_len]
        return _early_rows(case, super().fine_mask(case, block_indices), all_see)


@mutant("I6", "-1 is read as block 0", seen_in="ports whose unused slots hold 0")
class MinusOneIsZero(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        return super().fine_mask(case, np.where(block_indices < 0, 0, block_indices))


@mutant("I6", "indices are cast to 32 bits, and 2^32 + 1 is block 1")
class IndicesWrap(OracleImplementation):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        return super().fine_mask(case, block_indices.astype(np.int32).astype(np.int64))
