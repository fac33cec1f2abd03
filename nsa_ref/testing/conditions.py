"""The small language in which a port says which cases it means: of a ledger, and of limits.

A name and a rule: `kv_len = "2..8"`, `q_len = "== kv_len"`, `kv_len_mod_selection_block_size = 0`.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_ref.semantics import PAPER
from nsa_ref.sizes import MAY_BE_ZERO
from nsa_ref.testing.case import Case

#: What a condition may read, each with a value that it might have: the fields of a case, sizes that
#: follow from them, and the switches that are True or False or a word.
FIELDS: dict[str, int | str] = {
    name: value
    for name, value in (
        *((f.name, f.default) for f in dataclasses.fields(Case) if f.name != "seed"),
        *dict.fromkeys(("group_size", "num_compress_blocks", "num_selection_blocks"), 1).items(),
        *vars(PAPER).items(),
    )
    if isinstance(value, (int, str))
}
SWITCHES = frozenset(vars(PAPER))

#: What divides what in every case, and of what there is at most one for each key.
DIVIDES = (
    ("kv_heads", "q_heads"),
    ("group_size", "q_heads"),
    ("compress_block_sliding_stride", "selection_block_size"),
)
COUNTED_IN = (("num_compress_blocks", "kv_len"), ("num_selection_blocks", "kv_len"))

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "in": lambda value, listed: value in listed,
    "..": lambda value, ends: ends[0] <= value <= ends[1],
}

#: How a rule that is a text says them.
TRUTHS = {"true": True, "false": False}

#: What a rule may be where the case has a number.
OF_NUMBERS = "a whole number, a list of them, a range '2..8', or a comparison '!= 0' or '>= q_len'"


class RuleError(ValueError):
    """A rule has no meaning; the message has its name, the rule and what would be right."""


@dataclass(frozen=True)
class Condition:
    """One line of an entry's `where`, or of an implementation's limits.

    name : a field of the case, or a remainder by another one or by a number
        ("kv_len_mod_selection_block_size", "q_len_mod_128")
    rule : a value; a list of values; "!= 0", "< 5", ">= q_len" (a number or a field), "!= true";
        "2..8", both ends included

    Raises
    ------
    RuleError : a name or a rule outside of this language
    """

    name: str
    rule: Any

    def __post_init__(self) -> None:
        example, divisor = self._example()
        symbol, compared, is_field = self._read()
        says = f"{self.name} = {self.rule!r}"
        if is_field and compared == self.name:
            raise RuleError(f"{says} compares it with itself; name a number or another field")
        values = compared if isinstance(compared, list) else [compared]
        if not values:
            raise RuleError(f"{says} never holds; it must list a value at least")
        for value in [FIELDS[compared]] if is_field else values:
            if isinstance(example, str) or self.name in SWITCHES:
                _check_word(self.name, self.rule if symbol == ".." else value)
            elif type(value) is not type(example):
                if isinstance(value, str) and value != self.rule and type(example) is int:
                    near = there_are(value, FIELDS)
                    raise RuleError(f"{says}: {value!r} is no number and no field; {near}")
                right = OF_NUMBERS if type(example) is int else "true or false"
                raise RuleError(f"{says} must be {right}")
        if type(example) is not int:
            if symbol not in ("==", "!=", "in"):
                raise RuleError(f"{says} must say '==' or '!='; only numbers are larger or smaller")
        elif not is_field:
            _check_numbers(says, symbol, values, divisor)
        if type(example) is int and (why := _why_never(self.name, symbol, compared, is_field)):
            raise RuleError(f"{says} never holds: {why}")

    @property
    def reads(self) -> tuple[str, ...]:
        """What of a case decides it: the field that it is about, and then others."""
        name, _, divisor = self.name.partition("_mod_")
        _, compared, is_field = self._read()
        others = [compared] if is_field else []
        return (name, *others) if not divisor or divisor.isdecimal() else (name, divisor, *others)

    @property
    def numbers(self) -> list[int]:
        """The numbers that the case's value is compared with."""
        _, compared, _ = self._read()
        values = compared if isinstance(compared, list) else [compared]
        return [value for value in values if type(value) is int and "_mod_" not in self.name]

    @property
    def is_equality(self) -> bool:
        """Whether the case's value, and no remainder of it, is to be one value."""
        return self._read()[0] == "==" and "_mod_" not in self.name

    def holds(self, case: Case) -> bool:
        """Whether the case is meant."""
        name, modulo, divisor = self.name.partition("_mod_")
        value = value_of(case, name)
        if modulo:
            by = int(divisor) if divisor.isdecimal() else value_of(case, divisor)
            if not by:
                return False  # there is no remainder
            value %= by
        symbol, compared, is_field = self._read()
        return OPERATORS[symbol](value, value_of(case, compared) if is_field else compared)

    def _example(self) -> tuple[int | str, int | None]:
        """A value that the case might have there; the divisor, if it is a remainder by a number."""
        name, modulo, divisor = self.name.partition("_mod_")
        by = int(divisor) if divisor.isdecimal() else None
        for part in (name, divisor) if modulo and by is None else (name,):
            if part not in FIELDS:
                raise RuleError(f"{part!r} is no field of a case; {there_are(part, FIELDS)}")
            if modulo and type(FIELDS[part]) is not int:
                raise RuleError(f"{self.name!r} must name numbers, as kv_len_mod_q_len does")
        if name == divisor:
            raise RuleError(f"{self.name!r} is always 0; name a number or another field")
        if by is not None and by < 2:
            raise RuleError(f"{self.name!r} is no remainder; the divisor must be at least 2")
        return FIELDS[name], by

    def _read(self) -> tuple[str, Any, bool]:
        """The operator, what the case's value is compared with, and whether that is a field."""
        if isinstance(self.rule, list):
            return "in", self.rule, False
        text = self.rule if isinstance(self.rule, str) else ""
        if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
            return "..", [int(end) for end in match.groups()], False
        if match := re.fullmatch(r"(==|!=|<=|>=|<|>)\s*(\w+)", text):
            symbol, operand = match.groups()
            if operand.isdecimal():
                return symbol, int(operand), False
            if operand in FIELDS:
                return symbol, operand, True
            if symbol in ("==", "!="):
                words = TRUTHS if type(FIELDS.get(self.name)) is bool else {}
                return symbol, words.get(operand.lower(), operand), False
            near = there_are(operand, FIELDS)
            raise RuleError(
                f"{self.name} = {self.rule!r}: {operand!r} is no number and no field; {near}"
            )
        return "==", self.rule, False


def there_are(name: str, known: Collection[str]) -> str:
    """The names that are spelled like it, and then all."""
    alike = difflib.get_close_matches(name, known, n=3)
    did_you = f"did you mean {' or '.join(alike)}? There are " if alike else "there are "
    return f"{did_you}{', '.join(sorted(known))}"


def _check_numbers(says: str, symbol: str, values: Sequence[int], divisor: int | None) -> None:
    """Raise RuleError if no number, or no remainder by the divisor, is what the rule says."""
    if symbol == ".." and values[0] > values[1]:
        raise RuleError(f"{says} never holds; try '{values[1]}..{values[0]}'")
    if divisor is not None:
        remainders = range(divisor)
        compared = values if symbol in ("in", "..") else values[0]
        met = any(OPERATORS[symbol](remainder, compared) for remainder in remainders)
        if not met or not set(values) <= set(remainders):
            raise RuleError(
                f"{says} must compare with a remainder by {divisor}: 0 to {divisor - 1}"
            )
    elif min(values) < 0:
        raise RuleError(f"{says} must compare with numbers of at least 0")


def _why_never(name: str, symbol: str, compared: Any, is_field: bool) -> str:
    """What is so of every case and excludes the rule; nothing if that leaves some."""
    of, modulo, divisor = name.partition("_mod_")
    no_remainder = f"{divisor} divides {of}" if (divisor, of) in DIVIDES else ""
    if not is_field:
        if no_remainder and not OPERATORS[symbol](0, compared):
            return no_remainder
        least = 0 if modulo else least_of(name)
        most = max(compared) if isinstance(compared, list) else compared - (symbol == "<")
        bounded = symbol in ("==", "<", "<=", "in", "..")
        return f"{name} is at least {least}" if bounded and most < least else ""
    if no_remainder and symbol in ("==", ">=", ">") and least_of(compared):
        return no_remainder
    if compared == divisor and symbol in ("==", ">=", ">"):
        return f"a remainder is less than {divisor}"
    for less, more in (*DIVIDES, *COUNTED_IN):
        if (name, symbol, compared) in ((less, ">", more), (more, "<", less)):
            return f"{less} is at most {more}"
    return ""


def least_of(name: str) -> int:
    """The least that the number of this name is in any case."""
    zero = (*MAY_BE_ZERO, "batch", "q_len", "kv_len", "num_compress_blocks", "num_selection_blocks")
    return 0 if name in zero else 1


def _check_word(name: str, word: object) -> None:
    """Raise RuleError if no case could have this word there."""
    try:
        dataclasses.replace(PAPER if name in SWITCHES else Case(), **{name: word})  # type: ignore
    except (TypeError, ValueError) as error:
        raise RuleError(str(error)) from None


def value_of(case: Case, name: str) -> Any:
    """What a case has in a field, or what its semantics has in a switch."""
    return getattr(case.semantics if name in SWITCHES else case, name)
