"""What an implementation's `limits` allow together: what lies within them, and whether anything.

A limit is a value, a list of values, or a rule of the language that ledgers speak (`conditions`).
What holds for one method alone stands in `limits_of`.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import fnmatch
import functools
import math
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nsa_ref.checks import check_at_least
from nsa_ref.sizes import COMPRESS_MAPS
from nsa_ref.testing.case import DTYPES, INDICES, LAYOUTS, Case
from nsa_ref.testing.conditions import FIELDS, SWITCHES, Condition, RuleError, least_of, there_are
from nsa_ref.testing.remembering import remembered

if TYPE_CHECKING:
    from nsa_ref.testing.implementation import Implementation

#: Field of a case, or "group_size" -> allowed values.
Limits = Mapping[str, Collection[Any]]

#: What an author writes: the same, and rules.
Stated = Mapping[str, Any]

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
    "dtype": tuple(DTYPES),
    "indices": INDICES,
    "layout": LAYOUTS,
}

#: Of a range with more values than this only so many, the smallest, are drawn.
MANY, SMALLEST = 1024, 16

#: How far a size may be changed to make a rule hold.
REACH = 130

#: Numbers of a tensor that every case has, along one axis, and the most of them.
AXES = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim", "model_dim")
MOST_OF_AN_AXIS = 2**20

#: Fields that make sense together only: where one is taken back, all are.
HEADS = frozenset({"q_heads", "kv_heads", "group_size"})
BLOCKS = frozenset({"compress_block_sliding_stride", "selection_block_size"})
LENGTHS = frozenset({"q_len", "kv_len"})

#: What follows from other sizes is changed by one of those.
CHANGED_BY = {
    "group_size": ("q_heads",),
    "num_compress_blocks": ("kv_len", "compress_block_size", "compress_block_sliding_stride"),
    "num_selection_blocks": ("kv_len", "selection_block_size"),
}

#: What a list of values may be about.
LISTED = ("group_size", *(field.name for field in dataclasses.fields(Case)))


#: Of a size that may be stated: one more could not be counted up to.
LARGEST = 2**62


def check_limits(name: str, stated: object, of_method: bool = False) -> None:
    """Limits of fields that can be limited, to values that such a field can have, and together.

    name : what the message calls them
    of_method : they are those of one method, which may have fewer dtypes and semantics than others

    Raises
    ------
    TypeError, ValueError : the field, its values and what would be right
    """
    if not isinstance(stated, Mapping):
        raise TypeError(f"{name}={stated!r} must be a dict of field -> values.")
    try:
        limits, rules = _values_and_rules(stated)
    except RuleError as error:
        raise ValueError(f"{name}: {error}.") from None
    if not of_method and (switches := SWITCHES & set(stated)):
        raise ValueError(
            f"{name} has {min(switches)!r}, which the attribute semantics declares; in limits_of "
            "it may say what one method has of it."
        )
    for field in (*limits, *(rule.name for rule in rules)):
        if field in NO_LIMITS and not (of_method and field == "dtype"):
            raise ValueError(
                f"{name} has {field!r}, {NO_LIMITS[field]}. What cannot be run is refused by "
                "supports(case)."
            )
    for field, values in limits.items():
        if field not in LISTED:
            listed = ", ".join(LISTED)
            raise ValueError(f"{name} has {field!r}, which is no field of a case. Valid: {listed}.")
        if not isinstance(values, Collection) or isinstance(values, (str, Mapping)) or not values:
            right = (values,) if _is_value(field, values) else NAMED_VALUES.get(field, (4, 8))
            raise ValueError(
                f"{name}[{field!r}]={values!r} must be the allowed values, at least one. Try "
                f"{right!r}."
            )
        # what is right at both ends of a range is right in between
        for value in (values[0], values[-1]) if isinstance(values, range) else values:
            if not _is_value(field, value):
                known = NAMED_VALUES.get(field, ())
                rule = ", ".join(map(str, known)) or f"integers of at least {least_of(field)}"
                if isinstance(value, int) and value > LARGEST:  # it may be too long to be printed
                    said = f"a larger number; valid are {rule} and at most {LARGEST}"
                    raise ValueError(f"{name}[{field!r}] has {said}.")
                raise ValueError(f"{name}[{field!r}] has {value!r}; valid are {rule}.")
    if broken := _broken_law(limits):
        raise ValueError(f"{name} leaves no case: {broken}.")


def some_of(values: Collection[Any]) -> Sequence[Any]:
    """The values in their order; of a long range, the smallest stand for all."""
    if isinstance(values, range):
        return _ascending(values)[: MANY if len(values) <= MANY else SMALLEST]
    return sorted(values)


def up_to(values: Collection[int], most: int) -> Sequence[int]:
    """The values that are no larger."""
    if isinstance(values, range):
        values = _ascending(values)
        return values[: bisect.bisect_right(values, most)]
    return [value for value in values if value <= most]


def common(values: Collection[Any], others: Collection[Any]) -> Collection[Any]:
    """The values that stand in both."""
    if isinstance(values, range) and len(values) > MANY:
        values, others = others, values
    if not (isinstance(values, range) and isinstance(others, range)) or len(values) <= MANY:
        return [value for value in values if value in others]
    one, other = sorted(map(_ascending, (values, others)), key=lambda r: r.step)
    least, last = max(one[0], other[0]), min(one[-1], other[-1])
    within = other[bisect.bisect_left(other, least) :][: one.step]
    first = next((value for value in within if value in one), last + 1)
    return range(first, last + 1, math.lcm(one.step, other.step))


def _ascending(values: range) -> range:
    return values if values.step > 0 else values[::-1]


def _broken_law(limits: Limits) -> str:
    """The values that leave no case, and the law that says so; nothing if there are cases."""
    for together, law, found in (
        (HEADS, "q_heads is kv_heads times group_size", head_counts(limits)),
        (BLOCKS, "selection_block_size is a multiple of the stride", block_sizes(limits)),
    ):
        if found is not None and not found:
            said = ", ".join(
                shown(field, limits[field]) for field in sorted(together & set(limits))
            )
            return f"{said}; but {law}"
    for field in AXES:
        if min(some_of(limits.get(field, (0,)))) > MOST_OF_AN_AXIS:
            return f"{shown(field, limits[field])}; but no case has more than {MOST_OF_AN_AXIS}"
    return ""


def shown(field: str, values: Collection[Any]) -> str:
    """The values of a limit as a message has them: of many, the first."""
    return f"{field}={reprlib.repr(values if isinstance(values, range) else tuple(values))}"


def check_limits_of(name: str, stated: object, methods: Collection[str]) -> None:
    """Limits of single methods, each named as the plug names it; * and ? stand for anything.

    Raises
    ------
    TypeError, ValueError : as `check_limits`, or a name that is no method's
    """
    if not isinstance(stated, Mapping):
        raise TypeError(f"{name}={stated!r} must be a dict of method -> limits.")
    for pattern, limits in stated.items():
        if not isinstance(pattern, str) or not fnmatch.filter(methods, pattern):
            near = there_are(str(pattern), methods)
            raise ValueError(f"{name} has {pattern!r}, no method; {near}.")
        check_limits(f"{name}[{pattern!r}]", limits, of_method=True)


def check_together(name: str, implementation: Implementation, method: str) -> None:
    """What is stated in limits and in limits_of for a method, or twice in these, agrees.

    Raises
    ------
    ValueError : the method, the field, and the values that exclude each other
    """
    values: dict[str, Collection[Any]] = {}
    for stated in _all_stated(implementation, method):
        for field, more in _values_and_rules(stated)[0].items():
            before = values.get(field, more)
            values[field] = common(more, before) if field in values else more
            if not values[field]:
                said = f"{shown(field, before)} and {shown(field, more)}"
                raise ValueError(f"{name} leave no case of {method}: {said}.")
    if broken := _broken_law(values):
        raise ValueError(f"{name} leave no case of {method}: {broken}.")


def _all_stated(implementation: Implementation, method: str) -> list[Stated]:
    """The limits of all methods, and then those of this one."""
    patterns = implementation.limits_of
    own = [limits for pattern, limits in patterns.items() if fnmatch.fnmatchcase(method, pattern)]
    return [implementation.limits, *own]


def _values_and_rules(stated: Stated) -> tuple[dict[str, Any], tuple[Condition, ...]]:
    """Limits as lists of values where they are, or can be written as, such; and rules.

    Raises
    ------
    RuleError : a rule without a meaning
    """
    values: dict[str, Any] = {}
    rules = []
    for name, written in stated.items():
        rule = plain(written)
        listed = isinstance(rule, Collection) and not isinstance(rule, (str, Mapping))
        if not isinstance(name, str):
            values[name] = rule  # no field is called so
        elif "_mod_" in name or (name in FIELDS and name not in LISTED):
            rules.append(Condition(name, list(rule) if listed else rule))
        elif isinstance(rule, (int, float)) or (isinstance(rule, str) and _is_value(name, rule)):
            values[name] = (rule,)
        elif not isinstance(rule, str):
            values[name] = rule
        else:
            condition = Condition(name, rule)
            found = _listed(name, condition)
            if found is None:
                rules.append(condition)
            else:
                values[name] = found
    return values, tuple(rules)


def plain(written: Any) -> Any:
    """Numbers and arrays of NumPy or another library as Python has them; all else as it is."""
    return written.tolist() if hasattr(written, "tolist") else written


def _listed(name: str, condition: Condition) -> Collection[Any] | None:
    """The values that a rule without another field leaves, if they are not endless."""
    if name in NAMED_VALUES:
        known = NAMED_VALUES[name]
        cases = [(value, dataclasses.replace(Case(), **{name: value})) for value in known]
        return [value for value, case in cases if condition.holds(case)]
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", condition.rule):
        return range(int(match[1]), int(match[2]) + 1)
    if match := re.fullmatch(r"(==|<=|<)\s*(\d+)", condition.rule):
        stop = int(match[2]) + (match[1] != "<")
        return range(stop - 1 if match[1] == "==" else least_of(name), stop)
    return None


@remembered
def limited(implementation: Implementation, method: str) -> Implementation:
    """The implementation as far as one method of it goes: all its limits are values, or `rules`.

    Where it states nothing but values, and nothing of single methods, it is that itself.
    """
    stated = _all_stated(implementation, method)
    values: dict[str, Any] = {}
    rules = list(implementation.rules)
    for one in stated:
        more, others = _values_and_rules(one)
        for field, allowed in more.items():
            values[field] = common(allowed, values[field]) if field in values else allowed
        rules += others
    as_stated = all(values[field] is implementation.limits.get(field) for field in values)
    if len(stated) == 1 and not rules and as_stated:
        return implementation
    limited = copy.copy(implementation)
    dtypes = values.pop("dtype", tuple(DTYPES))
    limited.numerics = {d: row for d, row in implementation.numerics.items() if d in dtypes}
    about_semantics = [rule for rule in rules if rule.name in SWITCHES]
    limited.semantics = [
        semantics
        for semantics in implementation.semantics
        if all(rule.holds(Case(semantics=semantics)) for rule in about_semantics)
    ]
    limited.limits = values
    about_sizes = [rule for rule in rules if rule not in about_semantics]
    limited.rules = tuple(r for i, r in enumerate(about_sizes) if r not in about_sizes[:i])
    return limited


def is_within(implementation: Implementation, method: str, case: Case) -> bool:
    """Whether a case lies within the limits that are stated for a method alone."""
    for stated in _all_stated(implementation, method)[1:]:
        values, rules = _values_and_rules(stated)
        held = all(getattr(case, field) in allowed for field, allowed in values.items())
        if not held or not all(rule.holds(case) for rule in rules):
            return False
    return True


def brought_within(
    sizes: dict[str, Any], rules: Sequence[Condition], limits: Limits, *, square: bool, least: int
) -> dict[str, Any] | None:
    """The sizes of a case with as small changes as make all rules hold; None if none was found.

    square : q_len is kv_len, as in a layer
    least : of q_len and kv_len
    """
    for _ in range(len(rules) + 2):
        broken = [rule for rule in rules if not rule.holds(Case(**sizes))]
        if not broken:
            return sizes
        near = _nearest(sizes, broken[0], limits, square, least)
        if near is None:
            return None
        sizes = near
    return None


def _nearest(
    sizes: dict[str, Any], rule: Condition, limits: Limits, square: bool, least: int
) -> dict[str, Any] | None:
    """The sizes with one of those that the rule reads changed, as little as makes it hold."""
    for read, field in ((r, f) for r in rule.reads for f in CHANGED_BY.get(r, (r,))):
        now = sizes.get(field)
        if type(now) is not int:
            continue
        others = [sizes[other] for other in rule.reads if other != read and other in sizes]
        compared = [n for n in (*rule.numbers, *others) if type(n) is int]
        if rule.is_equality and field == read:
            tried = set(compared)  # nothing else can make it hold
        else:
            tried = set(range(max(0, now - REACH), now + REACH))
            for number in (n + more for n in compared for more in (-1, 0, 1)):
                tried |= {max(0, n) for n in _sizes_for(read, number, sizes)}
        if field in limits:
            near = {v for v in tried if v in limits[field]}
            tried = {v for v in near.union(some_of(limits[field])) if type(v) is int and v != now}
        for value in sorted(tried, key=lambda v: abs(v - now)):
            if field in LENGTHS and value < least:
                continue
            changed = sizes | {field: value}
            if square and field in LENGTHS:
                changed |= dict.fromkeys(LENGTHS, value)
            try:
                case = Case(**changed)
            except ValueError:
                continue
            heads = {"group_size": case.group_size, **changed}
            allowed = all(heads[f] in limits[f] for f in (*HEADS, *LENGTHS) if f in limits)
            if allowed and rule.holds(case):
                return changed
    return None


def _sizes_for(read: str, number: int, sizes: dict[str, Any]) -> tuple[int, ...]:
    """Of the field that is changed, what makes the one that is read this number."""
    if read == "num_selection_blocks":
        return (number * sizes["selection_block_size"],)
    if read == "num_compress_blocks":
        stride = sizes["compress_block_sliding_stride"]
        return (number * stride, (number - 1) * stride + sizes["compress_block_size"])
    return (number,)


def _is_value(field: str, value: object) -> bool:
    if field in NAMED_VALUES:
        # True is 1, and 1.0 is; but no list is a name
        return any(type(value) is type(known) and value == known for known in NAMED_VALUES[field])
    try:
        check_at_least(field, value, least_of(field))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return value <= LARGEST  # type: ignore[operator]


def head_counts(limits: Limits) -> dict[int, list[int]] | None:
    """q_heads -> the kv_heads that go with it, of those that have any; None if q_heads is free."""
    if "q_heads" not in limits:
        return None
    fitting = _products(limits, "kv_heads", "group_size")
    found = {}
    for q_heads in _with(fitting, limits["q_heads"]):
        kv_heads = [q_heads // group for group in _dividing(q_heads, limits.get("group_size"))]
        found[q_heads] = [n for n in kv_heads if n in limits.get("kv_heads", (n,))]
    return {q_heads: kv_heads for q_heads, kv_heads in found.items() if kv_heads}


def block_sizes(limits: Limits) -> dict[int, list[int]] | None:
    """l' -> the strides d that divide it, of those that have any; None if l' is free."""
    if "selection_block_size" not in limits:
        return None
    stride = "compress_block_sliding_stride"
    found = {}
    for size in _with(_products(limits, stride), limits["selection_block_size"]):
        found[size] = _dividing(size, limits.get(stride))
    return {size: strides for size, strides in found.items() if strides}


def _with(fitting: Sequence[int], values: Collection[int]) -> Collection[int]:
    """The values as they were listed; of a long range the smallest, and what is fitting."""
    if not isinstance(values, range) or len(values) <= MANY:
        return values
    return sorted({*some_of(values), *(value for value in fitting if value in values)})


def _products(limits: Limits, *fields: str) -> list[int]:
    """Small multiples of what the fields may be, all together."""
    found = [1, 2, 3, 4]
    for field in fields:
        found = [n * value for n in found for value in some_of(limits.get(field, (1,)))[:8]]
    return found


def _dividing(number: int, allowed: Collection[int] | None) -> list[int]:
    """Of the values that are allowed, those that divide the number without a rest."""
    if allowed is not None and not (isinstance(allowed, range) and len(allowed) > MANY):
        return [value for value in allowed if number % value == 0]
    return [value for value in _divisors(number) if allowed is None or value in allowed]


@functools.lru_cache
def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def layer_lengths(limits: Limits) -> list[int] | None:
    """Lengths of a layer, whose queries are its keys: both limits hold. None if both are free."""
    if not LENGTHS & set(limits):
        return None
    either = limits.get("kv_len", limits.get("q_len", ()))
    return list(some_of(common(either, limits.get("q_len", either))))
