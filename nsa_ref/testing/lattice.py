"""The lattice: edges that cases are to stand on, which of them were met, which need not be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import gt, lt, ne

import numpy as np

from nsa_ref.testing.branches import COMPRESS
from nsa_ref.testing.case import INDICES, INPUTS, LAYOUTS, Case
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.properties.common import oracle_mask
from nsa_ref.testing.strategies import ABOUT, TILE_DIMS, is_varied
from nsa_ref.testing.verdicts import Record

#: What `Edge.reads` calls the mask, multiplicities (batch, q_heads, q_len, columns).
MASK = "mask"


@dataclass(frozen=True)
class Edge:
    """A corner that cases are to stand on.

    name : as reports print it
    reads : the fields of a case that decide it, or MASK
    met : whether a case stands on it, a function of the values of `reads`
    about : cases about anything else never stand on it (keys of `strategies.ABOUT`)
    empty : such cases may have nothing in them; it is enough that they are tried
    """

    name: str
    reads: tuple[str, ...]
    met: Callable[..., bool]
    about: Collection[str] = tuple(ABOUT)
    empty: bool = False

    def met_by(self, case: Case, mask: np.ndarray) -> bool:
        """True if the case, which has this mask, stands on it."""
        return self.met(*(mask if r == MASK else getattr(case, r) for r in self.reads))

    def can_be_met(self, about: str) -> bool:
        """True if cases about this can stand on it: all that it reads varies in them."""
        return about in self.about and all(is_varied(field, about) for field in self.reads)


#: A layer reads its own tokens, all of them and at least one, and takes long: its cases are small.
NOT_LAYERS = tuple(about for about in ABOUT if about != "layer")
#: What layers are filled with.
IN_LAYERS = ("randn", "flat", "huge", "heavy")
#: l and d are free of each other only where nothing needs eq. 9.
WINDOWS = ("compress", "pool")
COMPRESSED = tuple(about for about, groups in ABOUT.items() if "compress" in groups)
SELECTED = tuple(about for about, groups in ABOUT.items() if "blocks" in groups)
#: A choice of no block has nothing in it that could be wrong.
NOT_SELECTION = tuple(about for about in ABOUT if about != "selection")

LENGTHS = ("q_len", "kv_len")
WINDOW = ("compress_block_size", "compress_block_sliding_stride")
BLOCKS = ("kv_len", "selection_block_size")
CHOICE = ("num_selected_blocks", *BLOCKS)
FORCED = ("num_initial_blocks", "num_local_blocks")
REACH = ("sliding_window_size", "kv_len")
GROUP = ("q_heads", "kv_heads")


def _count(kv_len: int, block: int) -> int:
    return -(-kv_len // block)


def _one_beyond(tile: int) -> Callable[[int], bool]:
    """Whether a length fills several tiles, the last with one alone."""
    return lambda length: length > tile and length % tile == 1


def _rows_see(some: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], bool]:
    """Whether there are rows whose number of visible keys is such."""
    return lambda mask: bool(some((mask != 0).sum(-1)).any())


_EDGES = (
    # what all other edges are met in as well: pairs with it are edges of a layer
    Edge("a whole layer", (), lambda: True, ("layer",)),
    Edge("no visible key", (MASK,), _rows_see(lambda keys: keys == 0)),
    Edge("one visible key", (MASK,), _rows_see(lambda keys: keys == 1)),
    Edge("several visible keys", (MASK,), _rows_see(lambda keys: keys > 1)),
    Edge("a hidden key", (MASK,), lambda mask: bool((mask == 0).any())),
    Edge("partial last block", BLOCKS, lambda kv_len, block: kv_len % block != 0),
    Edge("kv_len < l", ("kv_len", "compress_block_size"), lt),
    Edge("kv_len < d", ("kv_len", "compress_block_sliding_stride"), lt),
    Edge("l no multiple of d", WINDOW, lambda block, stride: block % stride != 0, WINDOWS),
    Edge("l < d", WINDOW, lt, WINDOWS),
    Edge("l > d", WINDOW, gt, COMPRESSED),
    Edge("several windows", ("kv_len", *WINDOW), lambda kv_len, l, d: kv_len >= l + d),  # noqa: E741
    Edge(
        "more than 48 compressed blocks",
        ("kv_len", *WINDOW),
        lambda kv_len, l, d: kv_len >= l + 48 * d,  # noqa: E741
        COMPRESSED,
    ),
    Edge("l' > d", ("selection_block_size", WINDOW[1]), gt, SELECTED),
    Edge("kv_len < l'", BLOCKS, lt),
    Edge("q_len 0", ("q_len",), lambda q_len: q_len == 0, NOT_LAYERS, empty=True),
    Edge("q_len 1", ("q_len",), lambda q_len: q_len == 1),
    Edge("kv_len = q_len + 1", LENGTHS, lambda q_len, kv_len: kv_len == q_len + 1, NOT_LAYERS),
    Edge("kv_len = q_len - 1", LENGTHS, lambda q_len, kv_len: kv_len == q_len - 1, NOT_LAYERS),
    Edge("kv_len < q_len", LENGTHS, lambda q_len, kv_len: kv_len < q_len, NOT_LAYERS),
    Edge("decode", LENGTHS, lambda q_len, kv_len: q_len == 1 < kv_len, NOT_LAYERS),
    Edge("n = 1", ("num_selected_blocks",), lambda n: n == 1),
    Edge("n = 0", ("num_selected_blocks",), lambda n: n == 0, NOT_SELECTION),
    Edge("n = all blocks", CHOICE, lambda n, kv_len, block: n == _count(kv_len, block)),
    Edge("0 < n < blocks", CHOICE, lambda n, kv_len, block: 0 < n < _count(kv_len, block)),
    Edge("n > blocks", CHOICE, lambda n, kv_len, block: n > _count(kv_len, block)),
    Edge(
        "16 blocks, the last one short",
        CHOICE,
        lambda n, kv_len, block: n == 16 <= _count(kv_len, block) and kv_len % block != 0,
        tuple(about for about in SELECTED if about != "layer"),
    ),
    Edge("forced blocks", FORCED, lambda initial, local: initial + local > 0),
    Edge("w = 0", ("sliding_window_size",), lambda w: w == 0),
    Edge("w = 1", ("sliding_window_size",), lambda w: w == 1),
    Edge("0 < w < kv_len - 1", REACH, lambda w, kv_len: 0 < w < kv_len - 1),
    Edge("w = kv_len - 1", REACH, lambda w, kv_len: w == kv_len - 1),
    Edge("w = kv_len", REACH, lambda w, kv_len: w == kv_len),
    Edge("w > kv_len", REACH, lambda w, kv_len: w > kv_len),
    Edge("G = 1", GROUP, lambda q_heads, kv_heads: q_heads == kv_heads),
    Edge("G > 1", GROUP, gt),
    Edge("several groups", GROUP, lambda q_heads, kv_heads: q_heads > kv_heads > 1),
    Edge("G = 2", GROUP, lambda q_heads, kv_heads: q_heads == 2 * kv_heads),
    Edge("G prime > 2", GROUP, lambda q_heads, kv_heads: q_heads // kv_heads in (3, 5)),
    Edge("G = 5", GROUP, lambda q_heads, kv_heads: q_heads == 5 * kv_heads),
    Edge("G = 16", GROUP, lambda q_heads, kv_heads: q_heads == 16 * kv_heads),
    Edge("kv_heads = 1", ("kv_heads",), lambda kv_heads: kv_heads == 1),
    Edge("Dk != Dv", ("head_dim", "value_dim"), ne),
    Edge("head_dim no power of two", ("head_dim",), lambda dim: dim & (dim - 1) != 0),
    Edge("head_dim > 128", ("head_dim",), lambda head_dim: head_dim > 128, NOT_LAYERS),
    *(
        Edge(f"{field} {dim}", (field,), dim.__eq__, NOT_LAYERS)
        for field in ("head_dim", "value_dim")
        for dim in TILE_DIMS
    ),
    Edge("batch 0", ("batch",), lambda batch: batch == 0, empty=True),
    Edge("batch 3", ("batch",), lambda batch: batch == 3),
    Edge("memory 0", ("num_mem_kv",), lambda memory: memory == 0),
    Edge("memory", ("num_mem_kv",), lambda memory: memory > 0),
    Edge("memory 1", ("num_mem_kv",), lambda memory: memory == 1),
    Edge("memory 16", ("num_mem_kv",), lambda memory: memory == 16),
    Edge("more than 128 blocks", BLOCKS, lambda kv_len, block: _count(kv_len, block) > 128),
    Edge("more than 256 blocks", BLOCKS, lambda kv_len, block: _count(kv_len, block) > 256),
    Edge("more than 256 tokens", ("kv_len",), lambda kv_len: kv_len > 256),
    *(
        Edge(f"one {what} beyond {tile}", (field,), _one_beyond(tile), NOT_LAYERS)
        for what, field in (("row", "q_len"), ("key", "kv_len"))
        for tile in (64, 128)
    ),
    Edge("length around 128", ("kv_len",), lambda kv_len: 127 <= kv_len <= 130, NOT_LAYERS),
    *(
        Edge(f"inputs {kind}", ("inputs",), kind.__eq__, ABOUT if kind in IN_LAYERS else NOT_LAYERS)
        for kind in INPUTS
    ),
    *(Edge(f"indices {kind}", ("indices",), kind.__eq__) for kind in INDICES),
    *(Edge(f"layout {kind}", ("layout",), kind.__eq__) for kind in LAYOUTS),
)
EDGES = {edge.name: edge for edge in _EDGES}

#: Clause -> the edges that it is about. It does not pass unless decided cases of its own stood on
#: each of them that what is declared can reach.
CLAUSE_EDGES: dict[str, tuple[str, ...]] = {
    "A1": ("several visible keys", "several groups"),
    "A2": ("no visible key",),
    "A3": ("several visible keys", "several groups"),
    "A4": ("0 < n < blocks",),
    "A5": ("a hidden key",),
    "W1": ("0 < w < kv_len - 1",),
    "W2": ("0 < w < kv_len - 1",),
    "W3": ("w = 0", "w > kv_len"),
    "C1": ("several windows", "l > d"),
    "C2": ("several windows", "a hidden key"),
    "C3": ("memory",),
    "C4": ("several windows",),
    "F1": ("0 < n < blocks", "a hidden key"),
    "F2": ("partial last block",),
    "F3": ("indices same",),
    "F4": ("0 < n < blocks",),
    "I1": ("several windows", "memory"),
    "I2": ("several windows", "l > d"),
    "I3": ("G > 1",),
    "I4": ("0 < n < blocks", "forced blocks"),
    "I5": ("inputs equal",),
    "I6": ("n > blocks", "indices mixed"),
    "G1": ("0 < n < blocks", "several windows"),
    "G2": ("several windows",),
    "G3": ("0 < n < blocks", "several windows"),
    "G4": ("0 < n < blocks", "several windows"),
}


#: Clause about a mask -> the clauses that say what is special on edges of it, with those edges.
SPECIAL_CLAUSES: dict[str, dict[str, tuple[str, ...]]] = {
    "W1": {"W3": ("w = 0", "w > kv_len")},
    "C2": {"C3": ("memory",)},
    "F1": {
        "F2": ("partial last block",),
        "F3": ("indices few",),  # of those that F1 is asked about
        "I6": ("n > blocks",),
    },
}


def edges(case: Case, mask: np.ndarray) -> list[str]:
    """The edges that a case stands on, given its mask (batch, q_heads, q_len, columns)."""
    return [edge.name for edge in _EDGES if edge.met_by(case, mask)]


def case_edges(prop: Property, case: Case) -> list[str]:
    """The edges that this case tries this property on."""
    if prop.extent:
        return []
    # the choice of blocks and a whole layer have no keys of their own: those of compress count
    met = edges(case, oracle_mask(prop.branch or COMPRESS, case))
    return [name for name in met if prop.about in EDGES[name].about]


#: Edge -> its place in what `as_bits` writes.
PLACE = {name: place for place, name in enumerate(EDGES)}
_EMPTY = sum(1 << PLACE[edge.name] for edge in _EDGES if edge.empty)


def as_bits(names: Collection[str]) -> str:
    """A set of edges as a hexadecimal number: what a record keeps of every case."""
    return f"{sum(1 << PLACE[name] for name in names):x}"


def pairs_of(cases: Collection[str]) -> set[str]:
    """All pairs of edges, "one & other", on both of which one of the cases stands.

    Of a case that has nothing in it only those count of which one edge says so.

    cases : the edges of each, as `as_bits` has them
    """
    names, beside = list(EDGES), [0] * len(EDGES)
    for edges in (int(bits, 16) for bits in cases):
        empty = edges & _EMPTY
        for place in _places(edges):
            beside[place] |= empty if empty and not empty >> place & 1 else edges
    return {
        f"{name} & {names[other]}"
        for place, name in enumerate(names)
        for other in _places(beside[place] >> place + 1 << place + 1)
    }


def _places(edges: int) -> list[int]:
    return [place for place in range(len(EDGES)) if edges >> place & 1]


def met_pairs(records: Sequence[Record]) -> set[str]:
    """The pairs of edges on which decided cases stood."""
    return pairs_of({bits for record in records for bits in record.stood})


def meetable_pairs(records: Sequence[Record]) -> set[str]:
    """The pairs that can be met: cases that stand on them were built within what is declared.

    A case of which nothing could be wrong is none of these, but for empty ones.
    """
    built = {bits for record in records if record.asked for bits in record.built}
    return pairs_of(built) | met_pairs(records)


def unmet_pairs(records: Sequence[Record]) -> list[str]:
    """The pairs that can be met, and on which no case stood that was decided, or was refused."""
    if not any(record.built for record in records):
        return []  # it was not asked
    refused = pairs_of({bits for record in records for bits in record.refused_at})
    met = met_pairs(records) | refused
    return sorted(meetable_pairs(records) - met)


def unmet_edges(records: Sequence[Record]) -> list[str]:
    """Edges on which no decided case stood."""
    met = {edge for record in records for edge in record.edges}
    return [edge for edge in EDGES if edge not in met]


def excused_edges(records: Sequence[Record]) -> dict[str, str]:
    """Edges that need not be met whatever is declared, each with the reason."""
    excused = {}
    refused = {edge for record in records for edge in record.refused_edges}
    asked = {PROPERTIES[record.name].about for record in records if record.cases}
    for name in unmet_edges(records):
        if name in refused:
            excused[name] = "every such case was refused"
        elif not any(map(EDGES[name].can_be_met, asked)):
            excused[name] = "nothing that was asked reads it"
    return excused
