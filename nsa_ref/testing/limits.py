"""What an implementation's `limits` allow together: what lies within them, and whether anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from nsa_ref.checks import check_at_least
from nsa_ref.sizes import COMPRESS_MAPS, MAY_BE_ZERO
from nsa_ref.testing.case import INDICES, LAYOUTS, Case

#: Field of a case, or "group_size" -> allowed values.
Limits = Mapping[str, Collection[Any]]

#: Fields of a case that `limits` cannot restrict, and why.
NO_LIMITS = {
    "inputs": "which is what a property is about",
    "seed": "which stands for all data of its kind",
    "semantics": "which the attribute semantics declares",
    "dtype": "which the attribute numerics declares",
}

#: Fields whose values are names, or not numbers -> all valid ones.
NAMED_VALUES: dict[str, tuple[Any, ...]] = {
    "compress_map": COMPRESS_MAPS,
    "compress_positions": (False, True),
    "indices": INDICES,
    "layout": LAYOUTS,
}

#: Fields that make sense together only: where one is taken back, all are.
HEADS = frozenset({"q_heads", "kv_heads", "group_size"})
BLOCKS = frozenset({"compress_block_sliding_stride", "selection_block_size"})
LENGTHS = frozenset({"q_len", "kv_len"})


def check_limits(name: str, limits: object) -> None:
    """Limits of fields that can be limited, to values that such a field can have, and together.

    name : what the message calls them

    Raises
    ------
    TypeError, ValueError : the field, its values and what would be right
    """
    if not isinstance(limits, Mapping):
        raise TypeError(f"{name}={limits!r} must be a dict of field -> values.")
    fields = ["group_size", *(field.name for field in dataclasses.fields(Case))]
    for field, values in limits.items():
        if field in NO_LIMITS:
            raise ValueError(
                f"{name} has {field!r}, {NO_LIMITS[field]}. What cannot be run is refused by "
                "supports(case)."
            )
        if field not in fields:
            listed = ", ".join(fields)
            raise ValueError(f"{name} has {field!r}, which is no field of a case. Valid: {listed}.")
        if not isinstance(values, Collection) or isinstance(values, (str, Mapping)) or not values:
            right = (values,) if _is_value(field, values) else NAMED_VALUES.get(field, (4, 8))
            raise ValueError(
                f"{name}[{field!r}]={values!r} must be the allowed values, at least one. Try "
                f"{right!r}."
            )
        for value in values:
            if not _is_value(field, value):
                least = 0 if field in (*MAY_BE_ZERO, "batch", *LENGTHS) else 1
                known = NAMED_VALUES.get(field)
                rule = ", ".join(map(str, known)) if known else f"integers of at least {least}"
                raise ValueError(f"{name}[{field!r}] has {value!r}; valid are {rule}.")
    for together, rule, found in (
        (HEADS, "q_heads is kv_heads times group_size", head_counts(limits)),
        (BLOCKS, "selection_block_size is a multiple of the stride", block_sizes(limits)),
    ):
        if found is not None and not found:
            said = ", ".join(f"{f}={tuple(limits[f])}" for f in sorted(together & set(limits)))
            raise ValueError(f"{name} leaves no case: {said}; but {rule}.")


def _is_value(field: str, value: object) -> bool:
    if field in NAMED_VALUES:
        # True is 1, and 1.0 is; but no list is a name
        return any(type(value) is type(known) and value == known for known in NAMED_VALUES[field])
    least = 0 if field in (*MAY_BE_ZERO, "batch", *LENGTHS) else 1
    try:
        check_at_least(field, value, least)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def head_counts(limits: Limits) -> dict[int, list[int]] | None:
    """q_heads -> the kv_heads that go with it, of those that have any; None if q_heads is free."""
    if "q_heads" not in limits:
        return None
    found = {}
    for q_heads in limits["q_heads"]:
        groups = limits.get("group_size", range(1, q_heads + 1))
        kv_heads = [q_heads // group for group in groups if q_heads % group == 0]
        found[q_heads] = [n for n in kv_heads if n in limits.get("kv_heads", (n,))]
    return {q_heads: kv_heads for q_heads, kv_heads in found.items() if kv_heads}


def block_sizes(limits: Limits) -> dict[int, list[int]] | None:
    """l' -> the strides d that divide it, of those that have any; None if l' is free."""
    if "selection_block_size" not in limits:
        return None
    found = {}
    for size in limits["selection_block_size"]:
        strides = limits.get("compress_block_sliding_stride", range(1, size + 1))
        found[size] = [stride for stride in strides if size % stride == 0]
    return {size: strides for size, strides in found.items() if strides}


def layer_lengths(limits: Limits) -> list[int] | None:
    """Lengths of a layer, whose queries are its keys: both limits hold. None if both are free."""
    if not LENGTHS & set(limits):
        return None
    either = limits.get("kv_len", limits.get("q_len", ()))
    return [n for n in either if all(n in limits.get(field, (n,)) for field in LENGTHS)]
