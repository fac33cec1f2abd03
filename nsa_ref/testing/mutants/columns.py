"""The columns of the kill matrix: what kernels of a kind declare, and which mutants that excludes.

A mutant is judged as if it were such a kernel, within the kernel's limits. Some of the mistakes
cannot be made there: that is worked out from what is declared, and never stated of a mutant.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.conditions import SWITCHES, Condition
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.limits import BLOCKS, CHANGED_BY, Limits, limited
from nsa_ref.testing.swarm import PRODUCTION

#: What is read out of an implementation, key by key.
READ = ("sliding", "compress", "fine")
#: What a kernel is, beside a whole layer.
BRANCHES = (*READ, "sliding_mask", "compress_mask", "fine_mask")

#: A prompt from its first token on: one block, and one token of the next.
PROMPT = 65
#: Lengths that all methods of production kernels are asked: the last block of one key and whole,
#: and short of one key.
SHORTER = (PROMPT, 2048, 2049, 2111)
#: Far more than 128 blocks, the last of one key.
MANY_BLOCKS = 161 * 64 + 1
#: Rows behind a long cache.
FEW = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Column:
    """What kernels of a kind declare, with what the mutant itself declares as the outer bounds.

    limits, limits_of : as of an implementation
    dtypes, semantics, methods : those that they have; all, if empty
    layers : what whole layers of the kind declare, where that is something else
    """

    limits: Limits = dataclasses.field(default_factory=dict)
    limits_of: Mapping[str, Limits] = dataclasses.field(default_factory=dict)
    dtypes: Sequence[str] = ()
    semantics: Sequence[Semantics] = ()
    methods: Sequence[str] = ()
    layers: Column | None = None

    def of(self, implementation: Implementation) -> Implementation:
        """The implementation as a kernel of this kind."""
        if self.layers is not None and not any(map(implementation.offers, BRANCHES)):
            return self.layers.of(implementation)
        placed = copy.copy(implementation)
        placed.limits, placed.limits_of = self.limits, self.limits_of
        rows = implementation.numerics.items()
        placed.numerics = {d: row for d, row in rows if d in (self.dtypes or DTYPES)}
        follows = implementation.semantics
        placed.semantics = [s for s in follows if s in (self.semantics or follows)]
        if self.methods:
            placed.offers = lambda method: (  # type: ignore[method-assign]
                method.removesuffix("_vjp") in self.methods and implementation.offers(method)
            )
        return placed

    def to_json(self) -> dict[str, Any]:
        """What it declares; of a range its ends."""
        return {
            "limits": _written(self.limits),
            "limits_of": {method: _written(more) for method, more in self.limits_of.items()},
            "dtypes": list(self.dtypes),
            "semantics": [one.to_json() for one in self.semantics],
            "methods": list(self.methods),
            **({} if self.layers is None else {"layers": self.layers.to_json()}),
        }


def _written(limits: Limits) -> dict[str, Any]:
    return {
        field: f"{values[0]}..{values[-1]}" if isinstance(values, range) else list(values)
        for field, values in limits.items()
    }


def excludes(implementation: Implementation, method: str, need: Condition) -> bool:
    """Whether no case of a method, as it is declared, is as the condition says."""
    declared = limited(implementation, method)
    allowed: dict[str, Sequence[Any]] = {
        **{field: list(values) for field, values in declared.limits.items()},
        "dtype": list(declared.numerics),
        "semantics": list(declared.semantics),
    }
    fields: dict[str, None] = {}
    for read in need.reads:
        if read in allowed:
            fields[read] = None
        else:
            fields |= dict.fromkeys(
                ("semantics",) if read in SWITCHES else CHANGED_BY.get(read, (read,))
            )
    if not fields.keys() <= allowed.keys():
        return False
    for values in itertools.product(*(allowed[field] for field in fields)):
        if need.holds(_case(dict(zip(fields, values)))):
            return False
    return True


def _case(sizes: dict[str, Any]) -> Case:
    """A case with these sizes, whose others go with them."""
    if (group_size := sizes.pop("group_size", None)) is not None:
        sizes = {"kv_heads": 1, "q_heads": group_size} | sizes
    if BLOCKS & sizes.keys():
        stride = sizes.setdefault("compress_block_sliding_stride", 1)
        sizes = {"selection_block_size": stride, "compress_block_size": stride} | sizes
    return Case(**sizes)


#: name -> what is declared
COLUMNS: Mapping[str, Column] = {
    "free": Column(),
    # few rows behind several thousand keys: selection decides; and the first rows of a prompt
    "production": Column(
        limits=PRODUCTION | {"q_len": (*FEW, PROMPT), "kv_len": (*SHORTER, MANY_BLOCKS)},
        # of so many keys masks and maps take the definition seconds a case; so do many rows that
        # are read out of 2048 keys
        limits_of={f"{kind}*": {"kv_len": SHORTER} for kind in (*READ, "pool")}
        | {method: {"q_len": FEW} for branch in READ for method in (branch, f"{branch}_vjp")},
        dtypes=("bfloat16",),
        methods=(*BRANCHES, "pool", "select"),
    ),
    # what nsa_fast declares of its kernels in Triton's interpreter
    "interpreter": Column(
        limits={
            "batch": (0, 2),
            "q_heads": (2, 8, 16),
            "kv_heads": (1, 2),
            "group_size": (1, 4, 16),
            "head_dim": (64,),
            "value_dim": (32,),
            "selection_block_size": (4, 16),
            "q_len": range(21),
            "kv_len": range(131),
        },
        dtypes=("float32", "bfloat16"),
        semantics=(
            PAPER,
            LUCIDRAINS_FLEX,
            dataclasses.replace(PAPER, causal=False),
            dataclasses.replace(LUCIDRAINS_FLEX, causal=False),
            dataclasses.replace(PAPER, window_closed=False),
            dataclasses.replace(PAPER, window_closed=False, causal=False),
            dataclasses.replace(PAPER, compress_strict=True, forced_score=1.0, score_floor=1e-10),
        ),
        methods=(*BRANCHES, "select"),
        layers=Column(
            limits={
                "batch": (2,),
                "q_heads": (8,),
                "kv_heads": (1,),
                "group_size": (8,),
                "head_dim": (64,),
                "value_dim": (32,),
                "selection_block_size": (4,),
                "q_len": range(33),
                "kv_len": range(33),
            },
            limits_of={"decode": {"kv_len": range(6, 21)}},
            dtypes=("float32", "bfloat16"),
            # of those the ones that a second layer follows
            semantics=(PAPER, LUCIDRAINS_FLEX),
            methods=("layer", "layer_with_blocks", "decode", "varlen"),
        ),
    ),
}
