"""Deliberately broken builds of nsa_fast: one decision of its mask builders changed each.

Every name at the end is what `nsa-ref verify broken_nsa_fast:NAME` takes, started in this folder.
A build is broken from within: one place is patched while an implementation's method runs, so that
the attention functions and the masks that the adapter exposes are wrong together, as if the line
itself were.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from nsa_fast import adapter, block_lists, block_masks, mask_mods
from nsa_fast.block_lists import BlockLists, Crowded
from nsa_ref.testing import Case, Implementation, TorchImplementation

#: (module, function, what stands in for it, given the original)
Mistake = tuple[ModuleType, str, Callable[[Callable[..., Any]], Callable[..., Any]]]


class _Broken(TorchImplementation):
    """Runs every method with the mistakes in place, and takes them back afterwards."""

    mistakes: tuple[Mistake, ...] = ()

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        with contextlib.ExitStack() as patches:
            for module, name, wrong in self.mistakes:
                replacement = wrong(getattr(module, name))
                patches.enter_context(mock.patch.object(module, name, replacement))
            yield

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        with self._in_place():
            return super().run(method, case, *arguments)

    def run_vjp(self, method: str, case: Case, *arguments: Any) -> Any:
        with self._in_place():
            return super().run_vjp(method, case, *arguments)


#: what is broken -> the mistakes
MISTAKES: dict[str, tuple[Mistake, ...]] = {}


def broken(what: str, kind: type[TorchImplementation], device: str) -> TorchImplementation:
    """One kind of nsa_fast with the mistakes in place."""
    name = f"{kind.name}, {what}"
    attributes = {"name": name, "mistakes": MISTAKES[what]}
    return type(f"Broken{kind.__name__}", (_Broken, kind), attributes)(device)


def _broken_kernels(what: str, device: str) -> TorchImplementation:
    return broken(what, adapter.NsaFastCompiled, device)


def _build(what: str, *mistakes: Mistake) -> Callable[[str], list[Implementation]]:
    """A maker like `nsa_fast.adapter.implementations`: the same kinds, with the mistakes."""
    MISTAKES[what] = mistakes

    def make(device: str = "cpu") -> list[Implementation]:
        if device == "interpreter":  # the mistakes are made where the kernels are, in a process
            interpreted = adapter.NsaFastInterpreted(functools.partial(_broken_kernels, what))
            interpreted.name += f", {what}"
            return [interpreted]
        return [broken(what, type(right), device) for right in adapter.implementations(device)]

    return make


def _adding(**changes: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same function, called with some of its keywords changed by a number."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **keywords: Any) -> Any:
            changed = {name: keywords[name] + step for name, step in changes.items()}
            return right(*arguments, **(keywords | changed))

        return function

    return wrong


# --- w + 1: predicate and lists agree with each other, and not with the definition ----------------


def _one_key_more(right: Callable[..., Any]) -> Callable[..., Any]:
    def sliding_block_mask(q_len: int, kv_len: int, w: int, *rest: Any, **keywords: Any) -> Any:
        return right(q_len, kv_len, w + 1, *rest, **keywords)

    return sliding_block_mask


# --- right predicate, wrong lists -----------------------------------------------------------------


def _with_lists(
    change: Callable[[BlockLists], BlockLists],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`to_block_mask` with other lists; their transposes follow from them."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def to_block_mask(lists: BlockLists, *rest: Any, **keywords: Any) -> Any:
            return right(change(lists), *rest, **keywords)

        return to_block_mask

    return wrong


def _one_short(lists: BlockLists) -> BlockLists:
    """The last partial block of every row block is not walked."""
    return lists._replace(num_blocks=(lists.num_blocks - 1).clamp(min=0))


def _taken_for_each_other(lists: BlockLists) -> BlockLists:
    """Partial blocks are read whole, and full ones asked cell by cell."""
    return BlockLists(lists.full_num_blocks, lists.full_indices, lists.num_blocks, lists.indices)


def _kv_lists(
    change: Callable[[BlockLists], BlockLists],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`to_block_mask` with other kv lists; the transposes stay those of the right ones."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def to_block_mask(lists: BlockLists, *rest: Any, **keywords: Any) -> Any:
            mask, changed = right(lists, *rest, **keywords), change(lists)
            mask.kv_num_blocks, mask.kv_indices = changed.num_blocks, changed.indices
            mask.full_kv_num_blocks = changed.full_num_blocks
            mask.full_kv_indices = changed.full_indices
            return mask

        return to_block_mask

    return wrong


def _last_one_twice(lists: BlockLists) -> BlockLists:
    """The last partial block of every row block is named a second time."""
    last = (lists.num_blocks - 1).clamp(min=0)[..., None].long()
    indices = F.pad(lists.indices, (0, 1))
    indices = indices.scatter(-1, last + 1, indices.gather(-1, last))
    more = lists.num_blocks + (lists.num_blocks > 0).to(lists.num_blocks.dtype)
    return lists._replace(num_blocks=more, indices=indices)


def _strides_of_the_partial(lists: BlockLists) -> BlockLists:
    """Full lists wider than the partial ones, as a kernel of PyTorch 2.11 reads them.

    It walks full_indices with the strides of indices (`block_lists.OWN_STRIDES`): entry s of row r
    is found at r * slots + s, whatever the row's real length.
    """
    slots, width = lists.indices.shape[-1], lists.full_indices.shape[-1]
    flat = F.pad(lists.full_indices, (0, max(0, slots + 1 - width))).flatten()
    row = torch.arange(lists.full_num_blocks.numel(), device=flat.device)[:, None]
    place = row * slots + torch.arange(width, device=flat.device)
    found = flat[place.clamp(max=flat.numel() - 1)]
    return lists._replace(full_indices=found.view(lists.full_indices.shape))


# --- right forward, wrong transposes --------------------------------------------------------------


def _transposes(
    change: Callable[[BlockLists], BlockLists],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The row blocks that dk and dv of a column block hear of, changed."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def transposed(*arguments: Any, **keywords: Any) -> BlockLists:
            return change(right(*arguments, **keywords))

        return transposed

    return wrong


def _last_row_lost(right: Callable[..., Any]) -> Callable[..., Any]:
    """A crowded column block does not hear of the last row block that names it."""

    def crowded_columns(*arguments: Any) -> Crowded | None:
        crowded = right(*arguments)
        return crowded and crowded._replace(rows=tuple(rows[:-1] for rows in crowded.rows))

    return crowded_columns


WindowPlusOne = _build("w + 1", (block_masks, "sliding_block_mask", _one_key_more))

PredicateWrong = _build(
    "mask_mod wrong",
    (mask_mods, "sliding_mask_mod", _adding(oldest=1)),  # a key too old
    (mask_mods, "compress_mask_mod", _adding(first_end=-1)),  # a token too early
    (mask_mods, "fine_mask_mod", _adding(ahead=1)),  # the key after p
    (mask_mods, "named_mask_mod", _adding(ahead=1)),
)

ListsTooShort = _build("lists one short", (block_lists, "to_block_mask", _with_lists(_one_short)))

PartialTakenForFull = _build(
    "partial taken for full", (block_lists, "to_block_mask", _with_lists(_taken_for_each_other))
)

QueryBlockLost = _build("query block lost", (block_lists, "transposed", _transposes(_one_short)))

QueryBlockNamedTwice = _build(
    "query block named twice", (block_lists, "transposed", _transposes(_last_one_twice))
)

QueryPartialTakenForFull = _build(
    "partial taken for full by dk and dv",
    (block_lists, "transposed", _transposes(_taken_for_each_other)),
)

QueryStridesConfused = _build(
    "strides confused by dk and dv",
    (block_lists, "transposed", _transposes(_strides_of_the_partial)),
)

CrowdedRowLost = _build(
    "row of a crowded column lost", (block_lists, "crowded_columns", _last_row_lost)
)

KvBlockLost = _build("kv block lost", (block_lists, "to_block_mask", _kv_lists(_one_short)))

BlockNamedTwice = _build(
    "block named twice", (block_lists, "to_block_mask", _kv_lists(_last_one_twice))
)

StridesConfused = _build(
    "strides confused", (block_lists, "to_block_mask", _with_lists(_strides_of_the_partial))
)

BUILDS = {
    "WindowPlusOne": WindowPlusOne,
    "PredicateWrong": PredicateWrong,
    "ListsTooShort": ListsTooShort,
    "PartialTakenForFull": PartialTakenForFull,
    "QueryBlockLost": QueryBlockLost,
    "QueryBlockNamedTwice": QueryBlockNamedTwice,
    "QueryPartialTakenForFull": QueryPartialTakenForFull,
    "QueryStridesConfused": QueryStridesConfused,
    "CrowdedRowLost": CrowdedRowLost,
    "KvBlockLost": KvBlockLost,
    "BlockNamedTwice": BlockNamedTwice,
    "StridesConfused": StridesConfused,
}
