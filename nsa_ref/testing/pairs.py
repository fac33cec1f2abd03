"""Pairs of edges: which can be met within what is declared, shown by a case that stands on both.

A case is built, not drawn: the values with which one edge is met are joined with those with which
the other one is, and the rest of the case is filled up. What `strategies` draws has no part in it:
a generator that never makes a pair does not make it impossible.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nsa_ref.testing.branches import COMPRESS
from nsa_ref.testing.case import DTYPES, INDICES, INPUTS, LAYOUTS, Case
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.lattice import EDGES, MASK, Edge, case_edges
from nsa_ref.testing.limits import brought_within, limited, some_of
from nsa_ref.testing.properties import PROPERTIES, Property, adjust
from nsa_ref.testing.properties.common import oracle_mask
from nsa_ref.testing.remembering import remembered
from nsa_ref.testing.strategies import ABOUT, HEAD_DIMS, is_varied

Values = dict[str, Any]

_NO_MASK = np.zeros((0, 0, 0, 0))

#: What makes cases of a layer or a map affordable, and chooses no size.
AFFORDABLE = (adjust.affordable_layer, adjust.affordable_map)
#: What a property may have that rests on no sizes: the last one makes more of its cases decide.
NO_CONDITION = (None, *AFFORDABLE, adjust.more_slots_than_blocks)

#: Of the values with which two edges are met, so many are filled up to cases.
TRIED = 100

#: Of what reads a mask, so many ways of filling up are tried for each of those.
FILLED = 12

#: Elements of a mask: no larger case is built.
MOST_CELLS = 2**20

#: Fields that make sense together only, as they stand in a case.
TOGETHER = (
    ("q_heads", "kv_heads"),
    ("compress_block_size", "compress_block_sliding_stride", "selection_block_size"),
    ("q_len", "kv_len"),
)


def takes_any(prop: Property) -> bool:
    """Whether cases of any sizes may be asked of the property."""
    plain = PROPERTIES["I6_selection"]
    bound = prop.indices or prop.populated or prop.extent or prop.precondition != plain.precondition
    if bound or prop.adjust not in NO_CONDITION:
        return False
    return prop.about == "layer" or not (prop.inputs or prop.head_dims)


@remembered
def cases_of_pairs(implementation: Implementation, prop: Property) -> tuple[Case, ...]:
    """Cases within what is declared that stand on all pairs of edges that cases of it can have.

    Of the properties about one thing only the first one that takes any cases has some. There are
    none for a port that is slow, or compiles: cases of their own sizes are what it has no time for.
    """
    if implementation.pace != "fast" or prop.name != first_asked(implementation, prop.about):
        return ()
    return Builder(limited(implementation, prop.called), prop).cases()


def first_asked(implementation: Implementation, about: str) -> str:
    """The property that is asked about pairs: the first that can be, whatever the semantics."""
    some = (p for p in PROPERTIES.values() if p.about == about and takes_any(p))
    offered = [p for p in some if not p.why_not_offered(implementation)]
    plain = PROPERTIES["I6_selection"].semantics
    offered.sort(key=lambda prop: prop.semantics is not plain)
    return offered[0].name if offered else ""


class Builder:
    """Builds cases of one property for pairs of edges.

    implementation : with the limits of the method that the property calls
    """

    def __init__(self, implementation: Implementation, prop: Property) -> None:
        self.implementation, self.prop, self.limits = implementation, prop, implementation.limits
        self.groups = ABOUT[prop.about]
        self.semantics = [s for s in implementation.semantics if prop.semantics(s)]
        widest = max(implementation.numerics, key=lambda dtype: DTYPES[dtype].itemsize)
        self.values = self._values() | {"dtype": [widest]}
        self.number = 0  # of the case under way: those fields that are free are others in each
        self.sets = [
            [
                v
                for v in itertools.product(*(self.values[f] for f in fields))
                if self._together(fields, v)
            ]
            for fields in TOGETHER
        ]
        self.edges = [edge for edge in EDGES.values() if edge.can_be_met(prop.about)]
        self.ways = {e.name: self._ways(e) for e in self.edges if e.reads != (MASK,)}

    # --- what the fields may be -------------------------------------------------------------------

    def _within(self, field: str, wished: Sequence[Any]) -> list[Any]:
        """Of the wished values those that are allowed; what is allowed, if none is."""
        if not is_varied(field, self.prop.about):
            wished = wished[:1]
        if field not in self.limits:
            return list(dict.fromkeys(wished))
        allowed = self.limits[field]
        own = [v for v in wished if v in allowed]
        return list(dict.fromkeys(own)) or list(some_of(allowed))[:8]

    def _values(self) -> dict[str, list[Any]]:
        """Field -> the values that make a difference to an edge, those of small cases first."""
        layer, within = self.prop.about == "layer", self._within
        dims = self.prop.head_dims or HEAD_DIMS
        values: dict[str, list[Any]] = {
            "batch": within("batch", (1, 2, 3, 0)),
            "head_dim": within("head_dim", dims),
            "value_dim": within("value_dim", dims),
            "num_initial_blocks": within("num_initial_blocks", (0, 1)),
            "num_local_blocks": within("num_local_blocks", (0, 1)),
            "num_mem_kv": within("num_mem_kv", (0, 1, 3, 16)),
            "compress_map": within("compress_map", ("mean",)),
            "compress_positions": within("compress_positions", (False,)),
            "model_dim": within("model_dim", (8,) if layer else (1,)),
            "inputs": list(self.prop.inputs or INPUTS),
            "indices": within("indices", INDICES) if "indices" in self.groups else ["distinct"],
            "layout": within("layout", LAYOUTS),
        }
        strides = within("compress_block_sliding_stride", (1, 2, 4))
        if "compress_block_sliding_stride" not in self.limits:
            # so that a stride divides what is allowed of l'
            strides += [d for d in (8, 16, 32) if "selection_block_size" in self.limits]
        values["compress_block_sliding_stride"] = strides
        products = sorted({d * factor for d in strides for factor in (1, 2, 4)})
        values["selection_block_size"] = within("selection_block_size", products)
        windows = products
        if self.prop.about in ("compress", "pool"):
            windows = sorted(
                {*products, *(d + 1 for d in strides), *(d - 1 for d in strides if d > 1)}
            )
        values["compress_block_size"] = within("compress_block_size", windows)
        blocks = values["selection_block_size"]
        some = sorted({*values["compress_block_size"][:4], *strides[:3], *blocks[:4]})
        lengths = {0, *range(1, 10), *(x + more for x in some for more in (-1, 0, 1, x + 1))}
        lengths |= {sum(pair) for pair in zip(values["compress_block_size"], strides)}
        lengths |= {24} if layer else {127, 128, 129, 130, 257}
        if "blocks" in self.groups and not layer:
            lengths |= {
                size * count + more
                for size in blocks[:2]
                for count in (129, 130, 257)
                for more in (0, 1)
            }
        least = 1 if layer else 0
        lengths = {n for n in lengths if n >= least}
        small = sorted(lengths, key=lambda n: (n == 0, n))
        values["kv_len"] = within("kv_len", small)
        near = {0, 1, 2, 3, *(n + more for n in values["kv_len"] for more in (-1, 0, 1))}
        values["q_len"] = within(
            "q_len", sorted({n for n in near if n >= least}, key=lambda n: (n == 0, n))
        )
        if layer:
            both = [n for n in values["kv_len"] if n in values["q_len"]]
            values["kv_len"] = values["q_len"] = both
        counts = {-(-n // size) for n in values["kv_len"] for size in blocks}
        slots = sorted({0, 1, 2, 3, 4, 5, *counts}, key=lambda n: (n == 0, n))
        values["num_selected_blocks"] = within("num_selected_blocks", slots)
        reach = sorted(
            {0, 1, 2, *(n + more for n in values["kv_len"] for more in (-1, 0, 3))} - {-1}
        )
        if all(not s.window_closed for s in self.semantics):
            reach = [w for w in reach if w]
        values["sliding_window_size"] = within("sliding_window_size", reach)
        values["kv_heads"] = within("kv_heads", (1, 2, 3))
        factors = [g for g in (1, 2, 3, 4, 5, 16) if g in self.limits.get("group_size", (g,))]
        factors = factors or list(some_of(self.limits["group_size"]))[:4]
        heads = sorted({n * g for n in values["kv_heads"] for g in factors})
        values["q_heads"] = within("q_heads", heads)
        if "q_heads" in self.limits and "kv_heads" not in self.limits:
            values["kv_heads"] = sorted(
                {q // g for q in values["q_heads"] for g in (1, 2, 3, 4, 5, 8, 16) if q % g == 0}
            )
        return values

    def _together(self, fields: tuple[str, ...], values: Sequence[int]) -> bool:
        """Whether sizes that make sense together only do so."""
        if fields == TOGETHER[0]:
            q_heads, kv_heads = values
            group = q_heads // kv_heads
            return q_heads % kv_heads == 0 and group in self.limits.get("group_size", (group,))
        if fields == TOGETHER[1]:
            window, stride, size = values
            return size % stride == 0 and (
                window % stride == 0 or self.prop.about in ("compress", "pool")
            )
        return values[0] == values[1] if self.prop.about == "layer" else True

    # --- cases ------------------------------------------------------------------------------------

    def cases(self) -> tuple[Case, ...]:
        """One for each pair that has any, unless one of those before it stands on it as well."""
        if not self.semantics or not all(self.values.values()):
            return ()
        found: list[Case] = []
        covered: dict[str, set[str]] = defaultdict(set)
        # what reads a mask last: most of its pairs stand already
        pairs = sorted(
            itertools.combinations(self.edges, 2),
            key=lambda pair: sum(e.reads == (MASK,) for e in pair),
        )
        for one, other in pairs:
            if other.name in covered[one.name]:
                continue
            case = self.case_of(one, other)
            if case is None:
                continue
            found.append(case)
            self.number += 1
            names = case_edges(self.prop, case)
            empty = not (case.batch and case.q_len)
            for name in names:
                if not empty or EDGES[name].empty:
                    covered[name].update(names)
                else:
                    covered[name].update(n for n in names if EDGES[n].empty)
        return tuple(found)

    def _ways(self, edge: Edge) -> list[Values]:
        """All values, of those that make a difference, with which the edge is met."""
        own = itertools.product(*(self.values[field] for field in edge.reads))
        return [dict(zip(edge.reads, values)) for values in own if edge.met(*values)]

    def case_of(self, one: Edge, other: Edge) -> Case | None:
        """A case on both edges, or None if there is none."""
        of_mask, empty = MASK in one.reads + other.reads, one.empty or other.empty
        if of_mask and empty:
            return None  # without rows there is nothing to see
        joined = _joined(self.ways.get(one.name), self.ways.get(other.name))
        for values in itertools.islice(joined, TRIED):
            for case in self._filled(values, FILLED if of_mask else 1):
                if not ((case.batch and case.q_len) or empty):
                    continue
                mask = oracle_mask(self.prop.branch or COMPRESS, case) if of_mask else _NO_MASK
                if one.met_by(case, mask) and other.met_by(case, mask):
                    return case
        return None

    def _filled(self, values: Values, count: int) -> Iterator[Case]:
        """Cases with these values, so many at most."""
        sets = []
        for fields, own in zip(TOGETHER, self.sets):
            fitting = (
                dict(zip(fields, v))
                for v in own
                if all(values.get(f, x) == x for f, x in zip(fields, v))
            )
            sets.append(list(itertools.islice(fitting, 3 * count)))
        if not all(sets):
            return
        for number in range(count):
            chosen = dict(values)
            for place, some in enumerate(sets):
                chosen |= some[(number * (2 * place + 1)) % len(some)]
            for place, (field, own) in enumerate(self.values.items()):
                if field not in chosen:
                    few = own[:6]
                    chosen[field] = few[(self.number + number + place * self.number) % len(few)]
            if (case := self._case(chosen, number)) is not None:
                yield case

    def _case(self, sizes: Values, number: int) -> Case | None:
        """The case with these sizes, if it lies within what is declared."""
        cells = sizes["batch"] * sizes["q_heads"] * sizes["q_len"] * sizes["kv_len"]
        if cells > MOST_CELLS:
            return None
        open_too = [s for s in self.semantics if s.window_closed or sizes["sliding_window_size"]]
        if not open_too:
            return None
        semantics = open_too[(self.number + number) % len(open_too)]
        sizes = sizes | {"semantics": semantics, "seed": self.number}
        if self.prop.adjust in AFFORDABLE:
            maps = self.values["compress_map"]
            self.prop.adjust(lambda *_: maps[0], sizes)  # type: ignore[arg-type]
        rules = self.implementation.rules
        if rules:
            layer = self.prop.about == "layer"
            within = brought_within(sizes, rules, self.limits, square=layer, least=0)
            if within is None:
                return None
            sizes = within
        try:
            case = Case(**sizes)
        except ValueError:
            return None
        allowed = (
            getattr(case, field) in own
            for field, own in self.limits.items()
            if is_varied(field, self.prop.about) or field == "group_size"
        )
        return case if all(allowed) else None


def _joined(one: list[Values] | None, other: list[Values] | None) -> Iterator[Values]:
    """Values of one with those of the other that say the same of what both name."""
    if one is None or other is None:
        yield from (one if one is not None else other if other is not None else [{}])
        return
    if not one or not other:
        return
    shared = [field for field in one[0] if field in other[0]]
    beside = defaultdict(list)
    for values in other:
        beside[tuple(values[field] for field in shared)].append(values)
    for values in one:
        for more in beside[tuple(values[field] for field in shared)]:
            yield values | more
