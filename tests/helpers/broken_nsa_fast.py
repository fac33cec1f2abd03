"""Deliberately broken builds of nsa_fast: one decision of its mask builders or cache changed each.

Every name in BUILDS is what `nsa-ref verify broken_nsa_fast:NAME` takes, started in this folder;
BROKEN_CACHES are asked what a cache alone can do; BROKEN_TILES, BROKEN_GATES and BROKEN_TURNS break
what goes into the kernels of our own, a step of theirs, or what comes from them. A build is broken
from within: one place is patched while an implementation's method runs, so that the attention
functions and the masks that the adapter exposes are wrong together, as if the line itself were.
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
from torch import Tensor

import nsa_fast.layer
from nsa_fast import Cache, adapter, block_lists, block_masks, fine_lists
from nsa_fast.block_lists import BlockLists, Crowded
from nsa_fast.checks import MAX_LENGTH
from nsa_fast.fine_lists import Parts, Union
from nsa_fast.layer import Layer
from nsa_ref.semantics import BRANCHES
from nsa_ref.testing import Case, Implementation, TorchImplementation

#: What stands in for a function: it takes the original, and the arguments of a call.
Wrong = Callable[..., Any]
#: (module or class, function, what stands in for it)
Mistake = tuple[ModuleType | type, str, Wrong]


@contextlib.contextmanager
def in_place(mistakes: tuple[Mistake, ...]) -> Iterator[None]:
    """The mistakes are made, and taken back afterwards."""
    with contextlib.ExitStack() as patches:
        for place, name, wrong in mistakes:
            instead = _with_original(wrong, getattr(place, name))
            patches.enter_context(mock.patch.object(place, name, instead))
        # masks that were kept are right, and those that are kept now will be wrong
        block_masks.made_once.cache_clear()
        patches.callback(block_masks.made_once.cache_clear)
        yield


def _with_original(wrong: Wrong, right: Callable[..., Any]) -> Callable[..., Any]:
    """A function, and no partial object: a class makes a method of it."""
    return lambda *given, **named: wrong(right, *given, **named)


class _Broken(TorchImplementation):
    """Runs every method with the mistakes in place."""

    mistakes: tuple[Mistake, ...] = ()

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        with in_place(self.mistakes):
            return super().run(method, case, *arguments)

    def run_vjp(self, method: str, case: Case, *arguments: Any) -> Any:
        with in_place(self.mistakes):
            return super().run_vjp(method, case, *arguments)


def with_mistakes(
    build: str, kind: type[TorchImplementation], device: str = "cpu"
) -> TorchImplementation:
    """One kind of nsa_fast with the mistakes in place."""
    attributes = {"name": f"{kind.name}, {build}", "mistakes": _mistakes_of(build)}
    return type(f"Broken{kind.__name__}", (_Broken, kind), attributes)(device)


def _mistakes_of(build: str) -> tuple[Mistake, ...]:
    if build not in BROKEN_GATES | BROKEN_TURNS:
        return (MISTAKES | BROKEN_CACHES | BROKEN_TILES)[build]
    from nsa_fast import gate_kernels, rotary_kernels  # which import triton

    if build in BROKEN_TURNS:
        return ((rotary_kernels, "turned", BROKEN_TURNS[build]),)
    return ((gate_kernels, *BROKEN_GATES[build]),)


def _make(build: str, device: str = "cpu") -> list[Implementation]:
    """As `nsa_fast.adapter.implementations`: the same kinds, with the mistakes."""
    if device == "interpreter":  # the mistakes are made where the kernels are, in a process
        interpreted = adapter.NsaFastInterpreted(
            functools.partial(with_mistakes, build, adapter.NsaFastCompiled)
        )
        interpreted.name += f", {build}"
        return [interpreted]
    return [with_mistakes(build, type(right), device) for right in adapter.implementations(device)]


# --- the same function, but ... -------------------------------------------------------------------


def _given(change: Callable[[Any], Any]) -> Wrong:
    """Its first argument is changed."""
    return lambda right, first, *rest, **named: right(change(first), *rest, **named)


def _returning(change: Callable[[Any], Any]) -> Wrong:
    """What it returns is changed."""
    return lambda right, *given, **named: change(right(*given, **named))


def _adding(**changes: int) -> Wrong:
    """Some of its keywords are changed by a number."""

    def wrong(right: Callable[..., Any], *given: Any, **named: Any) -> Any:
        return right(*given, **named | {name: named[name] + by for name, by in changes.items()})

    return wrong


def _one_key_more(right: Any, q_len: int, kv_len: int, w: int, *rest: Any, **named: Any) -> Any:
    return right(q_len, kv_len, w + 1, *rest, **named)


# --- lists ----------------------------------------------------------------------------------------


def _kv_lists(change: Callable[[BlockLists], BlockLists]) -> Wrong:
    """`to_block_mask` with other kv lists; the transposes stay those of the right ones."""

    def to_block_mask(right: Any, lists: BlockLists, *rest: Any, **named: Any) -> Any:
        mask, changed = right(lists, *rest, **named), change(lists)
        mask.kv_num_blocks, mask.kv_indices = changed.num_blocks, changed.indices
        mask.full_kv_num_blocks = changed.full_num_blocks
        mask.full_kv_indices = changed.full_indices
        return mask

    return to_block_mask


def _one_short(lists: BlockLists) -> BlockLists:
    """The last partial block of every row block is not walked."""
    return lists._replace(num_blocks=(lists.num_blocks - 1).clamp(min=0))


def _taken_for_each_other(lists: BlockLists) -> BlockLists:
    """Partial blocks are read whole, and full ones asked cell by cell."""
    return BlockLists(lists.full_num_blocks, lists.full_indices, lists.num_blocks, lists.indices)


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


def _last_row_lost(crowded: Crowded | None) -> Crowded | None:
    """A crowded column block does not hear of the last row block that names it."""
    return crowded and crowded._replace(rows=tuple(rows[:-1] for rows in crowded.rows))


#: build -> the mistakes. Where the lists are wrong, their transposes follow from them.
MISTAKES: dict[str, tuple[Mistake, ...]] = {
    # predicate and lists agree with each other, and not with the definition
    "WindowPlusOne": ((block_masks, "sliding_block_mask", _one_key_more),),
    # right lists
    "PredicateWrong": (
        (block_masks, "sliding_mask_mod", _adding(oldest=1)),  # a key too old
        (block_masks, "compress_mask_mod", _adding(first_seen=-1)),  # a token too early
        (block_masks, "fine_mask_mod", _adding(ahead=1)),  # the key after p
        (block_masks, "named_mask_mod", _adding(ahead=1)),
    ),
    # right predicate
    "ListsTooShort": ((block_lists, "to_block_mask", _given(_one_short)),),
    "PartialTakenForFull": ((block_lists, "to_block_mask", _given(_taken_for_each_other)),),
    "StridesConfused": ((block_lists, "to_block_mask", _given(_strides_of_the_partial)),),
    # right transposes
    "KvBlockLost": ((block_lists, "to_block_mask", _kv_lists(_one_short)),),
    "BlockNamedTwice": ((block_lists, "to_block_mask", _kv_lists(_last_one_twice)),),
    # right forward: the row blocks that dk and dv of a column block hear of are wrong
    "QueryBlockLost": ((block_lists, "transposed", _returning(_one_short)),),
    "QueryBlockNamedTwice": ((block_lists, "transposed", _returning(_last_one_twice)),),
    "QueryPartialTakenForFull": ((block_lists, "transposed", _returning(_taken_for_each_other)),),
    "QueryStridesConfused": ((block_lists, "transposed", _returning(_strides_of_the_partial)),),
    "CrowdedRowLost": ((block_lists, "crowded_columns", _returning(_last_row_lost)),),
}

BUILDS = {build: functools.partial(_make, build) for build in MISTAKES}
globals().update(BUILDS)


# --- wrong tiles of the fine branch's own kernels -------------------------------------------------


def _member_lost(right: Any, chosen: Any, tokens: int) -> Union:
    """A block that several tokens of a tile chose is not read for the first of them."""
    found: Union = right(chosen, tokens)
    members = found.entries & ((1 << tokens) - 1)
    others = members & (members - 1)
    return found._replace(entries=torch.where(others > 0, found.entries - members + others, 0))


def _all_are_members(right: Any, chosen: Any, tokens: int) -> Union:
    found: Union = right(chosen, tokens)
    return found._replace(entries=found.entries | ((1 << tokens) - 1))


def _wrong_member(right: Any, chosen: Any, tokens: int) -> Union:
    """The bits of a tile's tokens are in the reverse order."""
    found: Union = right(chosen, tokens)
    bits = [found.entries >> bit & 1 for bit in range(tokens)]
    turned = sum(value << (tokens - 1 - bit) for bit, value in enumerate(bits))
    return found._replace(entries=(found.entries >> tokens << tokens) + turned)


def _last_entry_lost(found: Union) -> Union:
    return found._replace(counts=(found.counts - 1).clamp(min=0))


def _last_entry_twice(found: Union) -> Union:
    last = (found.counts - 1).clamp(min=0)[..., None].long()
    entries = F.pad(found.entries, (0, 1))
    entries = entries.scatter(-1, last + 1, entries.gather(-1, last))
    return Union(entries, found.counts + (found.counts > 0).to(found.counts.dtype))


def _token_taken_for_the_next(found: Parts) -> Parts:
    """The last token of each block is named a second time, in the place of the one before."""
    first, stop = found.starts[:-1].long(), found.starts[1:].long()
    several = stop - first > 1
    tokens = found.tokens.clone()
    tokens[(stop - 2)[several]] = found.tokens[(stop - 1)[several]]
    return found._replace(tokens=tokens)


def _first_part_again(found: Parts) -> Parts:
    """All parts of a block's tokens are its first one."""
    tokens = found.tokens.clone()
    for first, stop in zip(found.starts.tolist(), found.starts[1:].tolist()):
        tokens[first + fine_lists.PART : stop] = found.tokens[first : stop - fine_lists.PART]
    return found._replace(tokens=tokens)


def _chunks_placed_on_the_first(found: Parts) -> Parts:
    """Those of a later chunk are placed as if no earlier token had chosen the block."""
    from nsa_fast import fine_list_kernels  # which imports triton

    tokens = found.tokens.clone()
    for first, stop in zip(found.starts.tolist(), found.starts[1:].tolist()):
        of_block = found.tokens[first:stop]
        later = of_block[of_block >= fine_list_kernels.LEAST_TOKENS]
        tokens[first : first + len(later)] = later
    return found._replace(tokens=tokens)


def _placed_one_behind(found: Parts) -> Parts:
    """A block's tokens begin with the last one of the block before."""
    return found._replace(tokens=found.tokens[: int(found.starts[-1])].roll(1))


#: what is broken in the lists of tiles -> the mistakes
BROKEN_TILES: dict[str, tuple[Mistake, ...]] = {
    "MemberLost": ((fine_lists, "union", _member_lost),),
    "AllAreMembers": ((fine_lists, "union", _all_are_members),),
    "WrongMember": ((fine_lists, "union", _wrong_member),),
    "TileListShort": ((fine_lists, "union", _returning(_last_entry_lost)),),
    "TileBlockTwice": ((fine_lists, "union", _returning(_last_entry_twice)),),
    "TokenTakenForTheNext": ((fine_lists, "parts", _returning(_token_taken_for_the_next)),),
    "FirstPartAgain": ((fine_lists, "parts", _returning(_first_part_again)),),
    "ChunksPlacedOnTheFirst": ((fine_lists, "parts", _returning(_chunks_placed_on_the_first)),),
    "PlacedOneBehind": ((fine_lists, "parts", _returning(_placed_one_behind)),),
}


# --- wrong gates ---------------------------------------------------------------------------------


def _logits_head_by_head(right: Any, logits: Tensor, outs: list[Tensor]) -> Tensor:
    """The branches of a head are taken to stand together."""
    return right(logits.unflatten(-1, (-1, 3)).transpose(-1, -2).flatten(-2), outs)


def _gates_exchanged(right: Any, logits: Tensor, outs: list[Tensor]) -> Tensor:
    """Compress has the gate of sliding."""
    return right(logits, outs[::-1])


def _too_large(right: Any, *given: Any) -> Any:
    """Gates are 5 % too large, forward and backward."""
    return right(*given) * 1.05


def _nothing_of_fine(right: Any, logits: Any, x: Any, d: Any, *rest: Any) -> None:
    """The fine branch gets no gradients, and its gates none."""
    branch = rest[-4]
    right(logits, x, d * 0 if branch == BRANCHES.index("fine") else d, *rest)


#: Only where the module of the kernels can be imported: what is broken in them -> the function of
#: `gate_kernels`, and what stands in for it.
BROKEN_GATES: dict[str, tuple[str, Wrong]] = {
    "LogitsHeadByHead": ("gated", _logits_head_by_head),
    "GatesExchanged": ("gated", _gates_exchanged),
    "GatesTooLarge": ("_gate", _too_large),
    "GradientsOfFineLost": ("_backward_of_branch", _nothing_of_fine),
}


# --- wrong turns ----------------------------------------------------------------------------------


def _turned_on(right: Any, x: Tensor, turns: Tensor, back: bool) -> Tensor:
    """The backward has the forward's sign."""
    return right(x, turns, False)


def _turned_back(right: Any, x: Tensor, turns: Tensor, back: bool) -> Tensor:
    """The sine has the other sign, in the backward as well."""
    return right(x, turns, not back)


def _in_last_tile(instead: Callable[[Any, Tensor, Tensor, bool], Tensor]) -> Wrong:
    """The numbers of a token's last tile come from elsewhere."""

    def wrong(right: Any, x: Tensor, turns: Tensor, back: bool) -> Tensor:
        from nsa_fast import rotary_kernels  # which imports triton

        (heads, _, dim), step = x.shape[1:], rotary_kernels.constants(*x.shape[1::2])["NUMBERS"]
        tile = torch.arange(heads * dim).view(heads, 1, dim) // step
        return torch.where(
            tile == tile.max(), instead(right, x, turns, back), right(x, turns, back)
        )

    return wrong


def _halves(right: Any, x: Tensor, turns: Tensor, back: bool) -> Tensor:
    """Pairs are (i, i + dim / 2)."""
    swapped = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    turned: Tensor = right(swapped, turns, back)
    return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _of_the_next_token(right: Any, x: Tensor, turns: Tensor, back: bool) -> Tensor:
    """Positions are off by one; the last token has its own."""
    found: Tensor = right(x, torch.cat([turns[1:], turns[-1:]]), back)
    return found


#: Only where the module of the kernel can be imported: what is broken in its launches -> what
#: stands in for `rotary_kernels.turned`.
BROKEN_TURNS: dict[str, Wrong] = {
    "the gradient is turned on": _turned_on,
    "all is turned back": _turned_back,
    "the last tile pairs halves": _in_last_tile(_halves),
    "the last tile turns by the next token": _in_last_tile(_of_the_next_token),
}


# --- wrong caches ---------------------------------------------------------------------------------

#: (cache, name of a buffer, first row, rows); then what is written
Write = Callable[[Cache, str, int, Tensor], Tensor]
Appended = Callable[..., Tensor]


def _windows_kept(count: int) -> Wrong:
    """Up to `count` windows that were pooled before the newest tokens were forgotten stay."""

    def write(right: Write, cache: Cache, name: str, start: int, rows: Tensor) -> Tensor:
        if name.endswith("_cmp"):
            pooled = vars(cache).setdefault("pooled", {})
            again = min(max(pooled.get(name, 0) - start, 0), count, rows.shape[2])
            old = cache._buffers[name][:, :, start : start + again] if again else rows[:, :, :0]
            pooled[name] = max(pooled.get(name, 0), start + rows.shape[2])
            rows = torch.cat([old, rows[:, :, again:]], dim=2)
        return right(cache, name, start, rows)

    return write


def _copied(buffers: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Wrong:
    """A copy that has these buffers in place of its own."""

    def copy(right: Callable[[Cache], Cache], cache: Cache) -> Cache:
        other = right(cache)
        other._buffers = buffers(cache._buffers)
        return other

    return copy


def _growth_loses_a_row(right: Write, cache: Cache, name: str, start: int, rows: Tensor) -> Tensor:
    """The last of those that are moved to a larger buffer."""
    old = cache._buffers.get(name)
    found = right(cache, name, start, rows)
    if old is not None and cache._buffers[name] is not old:
        found[:, :, max(0, start - 1) : start] = 0
    return found


def _one_doubling(right: Write, cache: Cache, name: str, start: int, rows: Tensor) -> Tensor:
    """A buffer grows once, by doubling, however many rows come."""
    old = cache._buffers.get(name)
    room = rows.shape[2] if old is None else max(0, 2 * old.shape[2] - start)
    return right(cache, name, start, rows[:, :, :room])


def _tokens_exchanged(right: Write, cache: Cache, name: str, start: int, rows: Tensor) -> Tensor:
    """A single token's rows go to the sequences in the reverse order."""
    return right(cache, name, start, rows.flip(0) if rows.shape[2] == 1 else rows)


def _longest(cache: Cache) -> int:
    """The most tokens that a cache has held, where `_longest_kept` keeps it."""
    return max(vars(cache).get("longest", 0), cache.length)


def _longest_kept(right: Callable[[Cache, int], None], cache: Cache, length: int) -> None:
    vars(cache)["longest"] = _longest(cache)
    right(cache, length)


def _positions_go_on(
    right: Appended, x: Tensor, weights: Any, layer: Any, cache: Cache, *rest: Any
) -> Tensor:
    """Positions follow those of the longest length."""
    ahead = _longest(cache) - cache.length
    shifted = _positions_moved(lambda first: first + ahead)
    with in_place(((nsa_fast.layer, "_project", shifted),)):
        return right(x, weights, layer, cache, *rest)


def _positions_moved(move: Callable[[int], int]) -> Wrong:
    """Where the tokens of each sequence begin."""
    return lambda right, h, weights, layer, positions: right(
        h, weights, layer, [(move(first), move(first) + end - first) for first, end in positions]
    )


def _windows_counted_at_the_longest(
    right: Appended, x: Tensor, weights: Any, layer: Any, cache: Cache, *rest: Any
) -> Tensor:
    """How many windows are complete, before the new tokens."""
    before, longest = cache.length, _longest(cache)

    def of_the_longest(count: Any, layer: Layer, kv_len: int) -> Any:
        return count(layer, longest if kv_len == before else kv_len)

    with in_place(((Layer, "num_compress_blocks", of_the_longest),)):
        return right(x, weights, layer, cache, *rest)


def _failures_counted(
    right: Appended, x: Tensor, weights: Any, layer: Any, cache: Cache, *rest: Any
) -> Tensor:
    """Tokens whose rows were never returned."""
    try:
        return right(x, weights, layer, cache, *rest)
    except ZeroDivisionError:
        cache.commit(cache.length + x.shape[1], nsa_fast.layer._cached_with(layer))
        raise


#: what is broken in the cache -> the mistakes
BROKEN_CACHES: dict[str, tuple[Mistake, ...]] = {
    "windows outlive their tokens": ((Cache, "write", _windows_kept(MAX_LENGTH)),),
    "the window that is cut outlives its tokens": ((Cache, "write", _windows_kept(1)),),
    "windows are counted at the longest length": (
        (Cache, "truncate", _longest_kept),
        (nsa_fast.layer, "_appended", _windows_counted_at_the_longest),
    ),
    "positions go on from the longest length": (
        (Cache, "truncate", _longest_kept),
        (nsa_fast.layer, "_appended", _positions_go_on),
    ),
    "positions begin again": ((nsa_fast.layer, "_project", _positions_moved(lambda first: 0)),),
    "copies share buffers": ((Cache, "copy", _copied(dict)),),
    "copies exchange sequences": (
        (Cache, "copy", _copied(lambda buffers: {n: b.flip(0) for n, b in buffers.items()})),
    ),
    "growth loses a row": ((Cache, "write", _growth_loses_a_row),),
    "buffers only double": ((Cache, "write", _one_doubling),),
    "single tokens exchange sequences": ((Cache, "write", _tokens_exchanged),),
    "calls that fail are counted": ((nsa_fast.layer, "_appended", _failures_counted),),
}
