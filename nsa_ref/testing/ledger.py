"""Known failures: the file in which a port keeps what it knows to be wrong with it.

`nsa-ref-known.toml` stands beside the adapter. Each of its entries says which cases fail, of which
clause, and why; those cases are no findings, and everything around them is judged as ever::

    [[known]]
    id = "short-last-block"
    clause = "F2"
    status = "tolerated"
    why = "https://github.com/somebody/port/issues/12"
    where = { kv_len_mod_selection_block_size = "!= 0", dtype = ["bfloat16", "float16"] }
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nsa_ref.checks import check_one_of
from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.conditions import Condition, RuleError, there_are
from nsa_ref.testing.files import read_text
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.verdicts import Record, Remark

FILE_NAME = "nsa-ref-known.toml"

#: tolerated : judged, and expected to fail; quarantined : never launched, because it takes the
#: process down
STATUSES = ("tolerated", "quarantined")


class LedgerError(ValueError):
    """An entry has no meaning; the message names the file, the entry, the value and the rule."""


@dataclass(frozen=True)
class Entry:
    """A known failure.

    id : what reports call it
    why : the link or the sentence that explains it
    status : one of STATUSES
    clause, property, method : what fails, at least one of them; clauses may be several, and in the
        others * and ? stand for anything. `method` is the plug's, as in "fine" or "fine_vjp"
    implementation : the name of the one that fails, where several stand beside the ledger; * and ?
        stand for anything; empty for all of them
    where : conditions that all hold for the cases that fail

    Raises
    ------
    LedgerError : a field with a value that has no meaning
    """

    id: str
    why: str
    status: str = "tolerated"
    clause: tuple[str, ...] = ()
    property: str = ""
    method: str = ""
    implementation: str = ""
    where: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "why"):
            if not getattr(self, name).strip():
                raise LedgerError(f"{name} is missing; every known failure needs one")
        try:
            check_one_of("status", self.status, STATUSES)
            for clause in self.clause:
                check_one_of("clause", clause, tuple(CLAUSES))
        except ValueError as error:
            raise LedgerError(str(error)) from None
        if not self.clause and not self.property and not self.method:
            raise LedgerError("it names neither a clause nor a property nor a method")
        given = {"property": self.property, "method": self.method}
        patterns = " and ".join(f"{name}={value!r}" for name, value in given.items() if value)
        meant = [prop for prop in PROPERTIES.values() if self._means(prop)]
        if not meant:
            raise LedgerError(f"no property of this version is meant by {patterns}")
        parts = {prop.part for prop in meant}
        for clause in self.clause:
            # another clause than a property's own may be to blame, of the same branch
            deciding = [prop for prop in PROPERTIES.values() if prop.clause == clause]
            if not parts & {prop.part for prop in deciding}:
                called = ", ".join(dict.fromkeys(prop.called for prop in deciding))
                raise LedgerError(
                    f"clause={clause!r} is not broken by {patterns}; it is asked of {called}"
                )

    def covers(self, case: Case) -> bool:
        """Whether the case is one of those that fail."""
        return all(condition.holds(case) for condition in self.where)

    def names(self, implementation: str) -> bool:
        """Whether it is about the implementation of this name."""
        return fnmatch.fnmatchcase(implementation, self.implementation or "*")

    def is_about(self, prop: Property) -> bool:
        """Whether this is what the property asks; or finds broken, if none asks it."""
        if not self.clause or prop.clause in self.clause or not self._is_asked:
            return self._means(prop)
        return False

    def explains(self, prop: Property, clause: str, case: Case) -> bool:
        """Whether a case that broke the clause, as the property found, is this known failure."""
        named = not self.clause or clause in self.clause
        return named and self._means(prop) and self.covers(case)

    @cached_property
    def _is_asked(self) -> bool:
        """Whether its clauses are those of a property that it means."""
        meant = (prop for prop in PROPERTIES.values() if self._means(prop))
        return any(prop.clause in self.clause for prop in meant)

    def _means(self, prop: Property) -> bool:
        return fnmatch.fnmatchcase(prop.name, self.property or "*") and fnmatch.fnmatchcase(
            prop.called, self.method or "*"
        )


def read_ledger(path: Path) -> tuple[Entry, ...]:
    """The entries of a ledger.

    Raises
    ------
    LedgerError : the file cannot be read, is no TOML, or an entry has no meaning
    """
    try:
        data = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"{path}: {error}") from None
    listed = data.pop("known", [])
    if data or not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise LedgerError(f"{path} must hold [[known]] tables and nothing else")
    entries: list[Entry] = []
    for number, fields in enumerate(listed, 1):
        called = f"{path}, entry {fields.get('id', number)!r}"
        try:
            entry = _entry(fields)
        except LedgerError as error:
            raise LedgerError(f"{called}: {error}") from None
        if entry.id in [other.id for other in entries]:
            raise LedgerError(f"{called}: another entry has the same id")
        entries.append(entry)
    return tuple(entries)


def _entry(fields: Mapping[str, Any]) -> Entry:
    known = [f.name for f in dataclasses.fields(Entry)]
    for name, value in fields.items():
        if name not in known:
            raise LedgerError(f"{name!r} is no key of an entry; {there_are(name, known)}")
        if name == "clause":
            listed = value if isinstance(value, list) else [value]
            right, wanted = all(isinstance(one, str) for one in listed), "a text or a list of them"
        elif name == "where":
            right, wanted = isinstance(value, dict), "a table"
        else:
            right, wanted = isinstance(value, str), "a text"
        if not right:
            raise LedgerError(f"{name} = {value!r} must be {wanted}")
        if name in ("clause", "property", "method", "implementation") and not value:
            raise LedgerError(f"{name} = {value!r} names nothing; name what fails, or leave it out")
    try:
        where = tuple(Condition(name, rule) for name, rule in fields.get("where", {}).items())
    except RuleError as error:
        raise LedgerError(str(error)) from None
    clause = fields.get("clause", [])
    clauses = tuple(clause) if isinstance(clause, list) else (clause,)
    return Entry(**{"id": "", "why": ""} | dict(fields) | {"clause": clauses, "where": where})


def ledger_of(implementation: Implementation, named: Path | None = None) -> tuple[Entry, ...]:
    """The entries about an implementation, of the ledger that was named or of the one beside it.

    That one lies in the folder of the file that defines the implementation's class.

    Raises
    ------
    LedgerError : as `read_ledger`
    """
    path = named or place_of(implementation)
    if path is None or (named is None and not path.exists()):
        return ()
    return tuple(entry for entry in read_ledger(path) if entry.names(implementation.name))


def place_of(implementation: object) -> Path | None:
    """Where the ledger of an implementation stands, if there is one."""
    module = sys.modules.get(type(implementation).__module__)
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).with_name(FILE_NAME)


def wrong_entries(records: Sequence[Record], entries: Sequence[Entry] = ()) -> list[Remark]:
    """What is wrong with entries of whose properties every case was tried, or none is offered.

    entries : of whose properties all were asked for
    """
    late = {name for r in records if r.unreached for name in {*r.inside, *r.outside}}
    inside, outside, failed, spared, held = (Counter[str]() for _ in range(5))
    for record in records:
        inside += record.inside
        outside += record.outside
        failed += record.known
        spared += record.spared
        held += record.held
    found: list[Remark] = []
    for name in sorted({*inside, *outside, *failed} - late):
        if not inside[name] and not failed[name]:
            found.append(("no case", name, outside[name]))
        elif not failed[name] and not spared[name]:
            # cases that nothing was decided of do not show that it is mended
            found += [("stale", name, held[name])] if held[name] else []
        elif inside[name] and not outside[name]:
            found.append(("every case", name, inside[name]))
    judged = {record.implementation for record in records}
    for entry in (one for one in entries if one.id not in {*inside, *outside, *failed}):
        own = [record for record in records if entry.names(record.implementation)]
        about = [record for record in own if entry.is_about(PROPERTIES[record.name])]
        if not any(map(entry.names, judged)):
            found.append(("no implementation", entry.id, entry.implementation))
        elif about and all(r.not_offered and not r.cases and not r.asked for r in about):
            found.append(("nothing offered", entry.id))
    return found


def to_toml(entry: Entry) -> str:
    """An entry as it stands in a ledger."""
    lines = ["[[known]]"]
    for field in dataclasses.fields(Entry):
        value = getattr(entry, field.name)
        if field.name == "clause":
            value = value[0] if len(value) == 1 else value
        if value and field.name != "where":
            lines.append(f"{field.name} = {_toml(value)}")
    conditions = ", ".join(f"{c.name} = {_toml(c.rule)}" for c in entry.where)
    return "\n".join([*lines, f"where = {{ {conditions} }}" if conditions else "where = {}", ""])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # TOML's basic strings take every character but these as it is
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda c: f"\\u{ord(c[0]):04x}", escaped) + '"'
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)
