"""The conventions on which public implementations of Native Sparse Attention differ.

`Semantics` holds one value for every switch of the specification; a preset is a `Semantics`
with a name. Sizes (block sizes, heads, window) are geometry and live elsewhere. Pure data:
nothing here computes, and this is the one module of `nsa_ref` that `nsa_fast` may import.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from nsa_ref.checks import check_kind, check_one_of

BRANCHES = ("compress", "fine", "sliding")

#: Values of `Semantics.rotary`, from nothing turned to everything turned before all else.
ROTARY = ("none", "fine_and_sliding", "all", "before_pooling")

#: Values of `Semantics.input_norm`.
INPUT_NORM = (False, True, "machine_eps")

T = TypeVar("T")


class PerBranch(NamedTuple, Generic[T]):
    """One value for each branch."""

    compress: T
    fine: T
    sliding: T


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """Every switch, each with the paper's value as its default.

    causal : queries see no later key (W1, W2, C3, F1, F4)
    window_closed : the sliding window is the closed range of w + 1 keys; False counts w (W1)
    compress_alignment : "start", block i covers [i d, i d + l); "end", [(i+1) d - l, (i+1) d) (C1)
    compress_strict : a block is visible only after its last token, one step later (C2)
    importance : "overlap", eq. 9; "logit_mean", the mean of the scaled logits (I2, I3)
    share_selection : one choice of blocks for all query heads of a group (I3)
    forced_score : the score of initial and local blocks, for each query head that shares the
        choice; inf always takes them (I4)
    own_block_extra : the query's own block is no candidate and visible on top of the n (I4)
    score_floor : a chosen block of lower or equal score becomes -1; None keeps all (I4)
    duplicates : "set" counts a block named twice once, "multiset" twice (F3)
    empty_row : out of a row that sees no key: "zero", "nan" or "uniform" over all columns (A2)
    empty_lse : lse of such a row: -inf, 0.0 or inf (A2)
    kv_per_branch : every branch has keys and values of its own (layer)
    rotary : whose q and k are rotated: "none"; "fine_and_sliding"; "all", with pooled keys where
        their windows start; "before_pooling", all, and keys are pooled once they are turned (G2)
    input_norm : RMSNorm before the layer: False; True adds 2^-23 to the mean square in every dtype,
        "machine_eps" the epsilon of the dtype that the norm is computed in (G1)
    output_projection : what the layer does behind it (G1)

    Raises
    ------
    ValueError, TypeError : a value outside these, named with what would be right
    """

    causal: bool = True
    window_closed: bool = True
    compress_alignment: str = "start"
    compress_strict: bool = False
    importance: str = "overlap"
    share_selection: bool = True
    forced_score: float = math.inf
    own_block_extra: bool = False
    score_floor: float | None = None
    duplicates: str = "set"
    empty_row: PerBranch[str] = PerBranch("zero", "zero", "zero")
    empty_lse: PerBranch[float] = PerBranch(-math.inf, -math.inf, -math.inf)
    kv_per_branch: bool = True
    rotary: str = "none"
    input_norm: bool | str = False
    output_projection: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Semantics):
            if field.type == "bool":  # a text, as are all annotations of this file
                check_kind(field.name, getattr(self, field.name), bool, "True or False")
        check_one_of("compress_alignment", self.compress_alignment, ("start", "end"))
        check_one_of("importance", self.importance, ("overlap", "logit_mean"))
        check_one_of("duplicates", self.duplicates, ("set", "multiset"))
        check_one_of("rotary", self.rotary, ROTARY)
        check_one_of("input_norm", self.input_norm, INPUT_NORM)
        for switch in ("empty_row", "empty_lse"):
            wanted = "a PerBranch(compress=, fine=, sliding=)"
            check_kind(switch, getattr(self, switch), PerBranch, wanted)
        for branch in BRANCHES:
            row, lse = getattr(self.empty_row, branch), getattr(self.empty_lse, branch)
            check_one_of(f"empty_row.{branch}", row, ("zero", "nan", "uniform"))
            check_one_of(f"empty_lse.{branch}", lse, (-math.inf, 0.0, math.inf))
        number = isinstance(self.forced_score, (int, float)) and self.forced_score is not True
        if not number or not self.forced_score > 0:
            raise ValueError(
                f"forced_score={self.forced_score!r} must be a positive number: a forced block "
                "competes with scores that are sums of probabilities. Try math.inf or 1.0."
            )
        floor = self.score_floor
        if floor is not None and not (isinstance(floor, (int, float)) and 0 <= floor < 1):
            raise ValueError(
                f"score_floor={self.score_floor!r} must be None or lie in [0, 1): "
                "it is compared with a softmax. Try None or 1e-10."
            )

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; infinities become the strings "inf" and "-inf"."""
        fields = dataclasses.asdict(self)
        fields["empty_row"] = self.empty_row._asdict()
        fields["empty_lse"] = {b: _number_to_json(x) for b, x in self.empty_lse._asdict().items()}
        fields["forced_score"] = _number_to_json(self.forced_score)
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Semantics:
        """The inverse of `to_json`; unknown or missing switches raise ValueError by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise ValueError(
                f"semantics has the switches {sorted(fields)}; they must be {sorted(known)}."
            )
        values = dict(fields)
        for name in ("empty_row", "empty_lse"):
            rows = values[name]
            if not isinstance(rows, dict) or set(rows) != set(BRANCHES):
                listed = ", ".join(BRANCHES)
                raise ValueError(f"{name}={rows!r} must have one value for each of {listed}.")
        lse = {b: _number_from_json("empty_lse", x) for b, x in values["empty_lse"].items()}
        values["empty_row"] = PerBranch(**values["empty_row"])
        values["empty_lse"] = PerBranch(**lse)
        values["forced_score"] = _number_from_json("forced_score", values["forced_score"])
        return cls(**values)


def _number_to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number_from_json(name: str, value: object) -> float:
    try:
        if not isinstance(value, bool):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pass
    raise ValueError(f'{name}={value!r} must be a number, "inf" or "-inf".')


def check_semantics(semantics: object) -> None:
    """Raise TypeError unless semantics is a Semantics."""
    check_kind("semantics", semantics, Semantics, "a Semantics, such as nsa_ref.PAPER")


PAPER = Semantics()

LUCIDRAINS = Semantics(
    compress_alignment="end",
    compress_strict=True,
    importance="logit_mean",
    own_block_extra=True,
    score_floor=1e-10,
    duplicates="multiset",
    empty_row=PerBranch("uniform", "uniform", "uniform"),
    kv_per_branch=False,
    rotary="fine_and_sliding",
    input_norm="machine_eps",
    output_projection=True,
)

LUCIDRAINS_FLEX = dataclasses.replace(
    LUCIDRAINS, score_floor=None, duplicates="set", empty_row=PerBranch("zero", "zero", "zero")
)

FLA = Semantics(
    window_closed=False,
    forced_score=1.0,
    duplicates="multiset",
    empty_row=PerBranch("zero", "nan", "zero"),
    empty_lse=PerBranch(0.0, -math.inf, -math.inf),
    kv_per_branch=False,
)

XUNHAO = Semantics(
    duplicates="multiset",
    empty_row=PerBranch("zero", "nan", "zero"),
    kv_per_branch=False,
    rotary="all",
)

PRESETS = {
    "PAPER": PAPER,
    "LUCIDRAINS": LUCIDRAINS,
    "LUCIDRAINS_FLEX": LUCIDRAINS_FLEX,
    "FLA": FLA,
    "XUNHAO": XUNHAO,
}
