"""Rounds of fuzzing: each asks some properties of some corner of what is declared.

A bug that needs three rare things at once is not met by drawing all of them rarely. A round draws
few of many kinds instead (swarm testing): some dtypes, one or two conventions, some sizes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nsa_ref.sizes import COMPRESS_MAPS
from nsa_ref.testing.case import INDICES, LAYOUTS
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.limits import (
    BLOCKS,
    CHANGED_BY,
    HEADS,
    LENGTHS,
    block_sizes,
    head_counts,
    layer_lengths,
    limited,
)
from nsa_ref.testing.properties import PROPERTIES, Property

#: Of the properties, so many are asked in one round, at most.
ASKED = 12

#: Seconds of the first and of the longest rounds; those between have half of what was before them.
SHORTEST_ROUND, LONGEST_ROUND = 30.0, 240.0

#: Lengths grow by a factor of 2 when the time doubles, from here on, in seconds.
GROWS_AFTER = 300.0

#: The longest sequences that a night of fuzzing draws, in tokens.
LONGEST = 4096

#: Rows times columns of a mask: a hundred heads of them in float64 take 200 MB. Where sequences
#: are long, few rows read many keys.
MOST_CELLS = 2**18

#: Sizes that production kernels are made for: drawn together, now and then.
PRODUCTION: dict[str, tuple[Any, ...]] = {
    "group_size": (16,),
    "kv_heads": (1, 2),
    "head_dim": (64, 128),
    "value_dim": (64, 128),
    "compress_block_size": (32,),
    "compress_block_sliding_stride": (16,),
    "selection_block_size": (64,),
    "num_selected_blocks": (16,),
    "sliding_window_size": (512,),
    "batch": (1,),
}

#: Field -> values of which a round draws some. Lengths, heads and block sizes follow rules.
VALUES: dict[str, tuple[Any, ...]] = {
    "batch": (1, 2, 3),
    "kv_heads": (1, 2, 3),
    "group_size": (1, 2, 3, 4, 5, 16),
    "head_dim": (1, 2, 3, 8, 16, 24, 64, 128, 192),
    "value_dim": (1, 2, 3, 8, 16, 24, 64, 128),
    "num_selected_blocks": (0, 1, 2, 3, 4, 16, 17, 35),
    "num_initial_blocks": (0, 1, 2),
    "num_local_blocks": (0, 1, 2),
    "sliding_window_size": (1, 0, 2, 3, 7, 16, 64, 127, 512),
    "num_mem_kv": (0, 1, 3, 16),
    "compress_map": COMPRESS_MAPS,
    "indices": INDICES,
    "layout": LAYOUTS,
}

STRIDES = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Round:
    """What one round of fuzzing asks, and of what.

    implementation, properties : names
    seconds : that each property has
    dtypes : of those that are declared
    semantics : those of the declared ones that are tried, by their number
    limits : field of a case -> values, within the declared ones
    """

    number: int
    seed: int
    implementation: str
    properties: tuple[str, ...]
    seconds: float = 0.0
    dtypes: tuple[str, ...] = ()
    semantics: tuple[int, ...] = ()
    limits: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """The inverse of `to_json`."""
        lists = {name: tuple(data[name]) for name in ("properties", "dtypes", "semantics")}
        return cls(**dict(data) | lists)

    def of(self, implementation: Implementation) -> Implementation:
        """The implementation, as if its author had declared this much only."""
        narrow = copy.copy(implementation)
        numerics, semantics = implementation.numerics, list(implementation.semantics)
        narrow.numerics = {d: numerics[d] for d in numerics if d in self.dtypes} or numerics
        narrow.semantics = tuple(semantics[i] for i in self.semantics if i < len(semantics))
        narrow.semantics = narrow.semantics or tuple(semantics)
        narrow.limits = {**implementation.limits, **_fitting(self.limits, implementation)}
        return narrow


def every_property(
    number: int, seed: int, asked: Sequence[Property], implementation: Implementation, workers: int
) -> Round:
    """A round that asks all properties of all that is declared, as `nsa-ref verify` does."""
    names = tuple(prop.name for prop in asked)
    seed = random.Random(f"{seed} {number}").randrange(2**31)
    return Round(number, seed, implementation.name, names, _share(0.0, len(names), workers))


def draw_round(
    number: int,
    seed: int,
    seconds: float,
    asked: Sequence[Property],
    implementation: Implementation,
    workers: int,
) -> Round:
    """The round with this number: the same for the same arguments.

    seconds : how long has been fuzzed before; sizes, and rounds, grow with it
    asked : the properties that may be asked
    workers : how many share the work
    """
    draw = random.Random(f"{seed} {number}")
    properties = draw.sample([prop.name for prop in asked], min(ASKED, len(asked)))
    dtypes = _some(draw, list(implementation.numerics))
    semantics = _some(draw, list(range(len(list(implementation.semantics)))), most=2)
    limits = _limits(draw, seconds)
    return Round(
        number=number,
        seed=draw.randrange(2**31),
        implementation=implementation.name,
        properties=tuple(properties),
        seconds=_share(seconds, len(properties), workers),
        dtypes=tuple(dtypes),
        semantics=tuple(semantics),
        limits=_fitting(limits, implementation),
    )


def _share(seconds: float, properties: int, workers: int) -> float:
    """Seconds for each property of a round, after so much fuzzing."""
    return min(max(SHORTEST_ROUND, seconds / 2), LONGEST_ROUND) * workers / properties


def _some(draw: random.Random, values: Sequence[Any], most: int | None = None) -> list[Any]:
    """At least one of the values, in their order."""
    count = draw.randint(1, min(most or len(values), len(values)))
    chosen = set(draw.sample(range(len(values)), count))
    return [value for i, value in enumerate(values) if i in chosen]


def _limits(draw: random.Random, seconds: float) -> dict[str, list[Any]]:
    """Each field is restricted in every third round or so, to a few values."""
    longest = longest_after(seconds)
    if draw.random() < 1 / 8:
        return {f: list(v) for f, v in PRODUCTION.items()} | _lengths(draw, max(longest, 300))
    limits = {f: _some(draw, v, most=3) for f, v in VALUES.items() if draw.random() < 1 / 3}
    if draw.random() < 1 / 2:
        limits |= _lengths(draw, longest)
    if draw.random() < 1 / 2:
        stride = draw.choice(STRIDES)
        factors = _some(draw, (1, 2, 3, 4), most=2)
        limits["compress_block_sliding_stride"] = [stride]
        limits["selection_block_size"] = [stride * factor for factor in factors]
        limits["compress_block_size"] = [stride * f for f in _some(draw, (1, 2, 3, 4), most=2)]
    return limits


def longest_after(seconds: float) -> int:
    """The longest sequence, in tokens, that is drawn after so much fuzzing."""
    doublings = math.floor(math.log2(1 + seconds / GROWS_AFTER))
    return min(LONGEST, 40 * 2**doublings)


def _lengths(draw: random.Random, longest: int) -> dict[str, list[Any]]:
    """Some short ones, so that a broken case can become small, and some up to the longest."""
    short = draw.sample(range(1, 17), 6)
    tiles = [n for tile in (16, 64, 128) for n in (tile - 1, tile, tile + 1) if n <= longest]
    # as many of each order of magnitude
    long = [round(2 ** draw.uniform(4, math.log2(longest))) for _ in range(6)]
    lengths = sorted({*short, *long, *draw.sample(tiles, min(2, len(tiles)))})
    return {"q_len": [n for n in lengths if n * longest <= MOST_CELLS], "kv_len": lengths}


def _fitting(limits: Mapping[str, Sequence[Any]], said: Implementation) -> dict[str, list[Any]]:
    """What of the limits leaves every method something of what an implementation declares."""
    # "" names no method: what is declared for all
    declared = limited(said, "").limits
    fitting = {
        field: [value for value in values if value in declared.get(field, (value,))]
        for field, values in limits.items()
    }
    for method in dict.fromkeys(["", *(prop.called for prop in PROPERTIES.values())]):
        own = limited(said, method)
        # what a rule reads, it decides
        ruled = {changed for rule in own.rules for r in rule.reads for changed in _changed_by(r)}
        for name, values in own.limits.items():
            if not set(values) & set(fitting.get(name, values)):
                ruled.add(name)
        for together in (HEADS, BLOCKS, LENGTHS):
            ruled |= together if ruled & together else set()
        fitting = {f: values for f, values in fitting.items() if f not in ruled}
        for together, found in _FOUND.items():
            if found({**own.limits, **fitting}) in ({}, []):
                fitting = {f: values for f, values in fitting.items() if f not in together}
    return {field: values for field, values in fitting.items() if values}


def _changed_by(read: str) -> set[str]:
    """Fields that change what a rule reads."""
    return {read, *CHANGED_BY.get(read, ())}


#: Fields that make sense together only -> what says which of their values do.
_FOUND = {HEADS: head_counts, BLOCKS: block_sizes, LENGTHS: layer_lengths}
