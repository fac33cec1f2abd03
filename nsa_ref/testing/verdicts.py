"""What a property says of an implementation, as data: a fault, or why there is no answer.

`wording` makes sentences of it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from nsa_ref.testing.choices import Reason
from nsa_ref.testing.pictures import Excerpt

# fmt: off
#: Why a case could not tell, why a property was not tried, what else was seen of a fault, and what
#: is wrong with an entry of the ledger.
RemarkName = Literal[
    "no hidden key", "never all visible", "empty rows", "too short to cut", "every block is chosen",
    "uniform rows", "no visible key", "empty in some head", "rounded sums", "NaN rows",
    "narrow model", "no linear map", "no row sees a key", "no empty row", "not 16 bits",
    "empty rows that are not zero", "only powerless bounds", "powerless tensor",
    "of another clause",
    "determinism unstated", "limits without long sequences", "not causal",
    "limits without large tensors", "little memory", "lost device", "slow pace",
    "fresh seeds", "device fault", "flaky", "no layer", "no layer gradients", "right without q",
    "gates", "maybe A4", "choice of before",
    "no case", "every case", "stale", "no implementation", "nothing offered",
    "few cases", "edge refused", "edge not met", "edge outside",
    "no element", "vector", "larger vectors",
]
# fmt: on

#: A remark, and the values that its sentence names (see `wording.REMARKS`).
Remark: TypeAlias = tuple[RemarkName, *tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class WrongElement:
    """An element of a tensor is outside of its bound.

    tensor : what the implementation returned, e.g. "sliding out" or "dto_q.weight"
    part : what that is a part or a variant of, or nothing
    index : where in the tensor
    form : of the bound: "exact" (only the expected value is right), "deterministic", "statistical"
    budget_used : |actual - expected| / bound
    source : what says which value is right
    why : why it is that value, where a reader cannot know
    """

    kind: ClassVar[str] = "wrong element"
    tensor: str
    part: str = ""
    index: tuple[int, ...]
    actual: float
    expected: float
    bound: float = 0.0
    budget_used: float = math.inf
    form: str = "exact"
    source: str = "the definition"
    why: str = ""

    def worst(self) -> dict[str, Any]:
        """What the report calls the worst element."""
        names = ("tensor", "index", "actual", "expected", "bound", "budget_used")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class WrongFactor:
    """All of a tensor is too large, or too small, by the same factor 1 + slope."""

    kind: ClassVar[str] = "wrong factor"
    tensor: str
    slope: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class WrongMask:
    """A row sees other columns than it should, or sees them another number of times.

    tensor : what shows it, e.g. "sliding mask" or "sliding dv"
    reading : how it was read
    gradient : "dq", "dk" or "dv", if it was read off one
    expected, actual : how often the column is seen; -1 if the row reads beyond all columns,
        -2 if it is NaN
    columns : how many there are
    block : the compressed block that the column is
    but : what is right nevertheless
    masks : of this batch entry and query head
    """

    tensor: str
    reading: str
    gradient: str = ""
    batch: int
    query_head: int
    row: int
    position: int
    column: int
    expected: int
    actual: int
    columns: int
    block: int | None = None
    but: str = ""
    masks: Excerpt | None = None

    @property
    def kind(self) -> str:
        return "wrong pattern" if self.gradient else "wrong mask"


@dataclass(frozen=True, kw_only=True)
class WrongReader:
    """A query head, or a compressed block, reads what it must not, or does not read what it must.

    reader, read : what they are, each with its number
    reads : whether it does
    """

    kind: ClassVar[str] = "wrong reader"
    tensor: str
    reader: tuple[str, int]
    read: tuple[str, int]
    reads: bool
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class WrongChoice:
    """A row chose blocks that are no valid top-n.

    head : kv head, or query head where each chooses
    reason : what was broken
    scores : (block, score) of the candidates around the cutoff, the best one first
    """

    kind: ClassVar[str] = "wrong choice"
    tensor: str = "select"
    batch: int
    head: int
    row: int
    position: int
    chosen: tuple[int, ...]
    reason: Reason
    scores: tuple[tuple[int, float], ...]


#: The kinds of `Failure`.
FAILURES = ("exception", "result", "crash", "hang")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """There is no result to judge.

    kind : "exception"; "result" if what came back has another form than the plug says; "crash"
        or "hang" if it took its process down
    tensor : the method that was called
    what : the exception, or what is wrong with the result
    where : lines of the implementation, the outermost one first
    """

    kind: str
    tensor: str
    what: str
    where: tuple[str, ...] = ()


Fault: TypeAlias = WrongElement | WrongFactor | WrongMask | WrongReader | WrongChoice | Failure


@dataclass(frozen=True)
class Convention:
    """A switch of `Semantics` and the value that would explain a fault; None if any other may.

    Its name is "preset" where only all switches of a preset would, whose name is the value.
    """

    name: str
    value: Any = None


class Broken(AssertionError):
    """A clause does not hold.

    clause, fault : which, and what is wrong
    convention : what would explain it, if the implementation declared it
    notes : what else was tried
    """

    def __init__(
        self,
        clause: str,
        fault: Fault,
        *,
        convention: Convention | None = None,
        notes: tuple[Remark, ...] = (),
    ) -> None:
        super().__init__(f"{clause}: {fault}")
        self.clause = clause
        self.fault = fault
        self.convention = convention
        self.notes = notes

    def noted(
        self, *notes: Remark, clause: str = "", convention: Convention | None = None
    ) -> Broken:
        """The same fault with more notes, and another clause or convention if one is given."""
        return Broken(
            clause or self.clause,
            self.fault,
            convention=convention or self.convention,
            notes=(*self.notes, *notes),
        )

    def to_json(self) -> dict[str, Any]:
        """As data: `kind` and `tensor` say which faults are alike, `fault` has all fields."""
        return {
            "clause": self.clause,
            "kind": self.fault.kind,
            "tensor": self.fault.tensor,
            "fault": asdict(self.fault),
            "worst": self.fault.worst() if isinstance(self.fault, WrongElement) else {},
            "convention": None if self.convention is None else asdict(self.convention),
            "notes": list(self.notes),
        }


class Raised(Exception):
    """The implementation under test raised; the judge's own mistakes are never this."""


class NoAnswer(Exception):
    """There is no answer, and `args` is the `Remark` that says why."""

    def __init__(self, name: RemarkName, *values: object) -> None:
        super().__init__(name, *values)


class Inconclusive(NoAnswer):
    """The check had no power on this case; counted and shown, never a pass."""


class NotTried(NoAnswer):
    """The property is not asked here: the port may have what it is about."""


@dataclass(kw_only=True)
class Record:
    """What became of one property on one implementation.

    cases : how many were decided
    asked : how many were to be; 0 if the property is not offered
    unreached : how many were not tried because the time was up
    refused : how many `supports` refused
    inconclusive : why a case could not tell -> how many cases
    ambiguous : rows whose choice of blocks may go either way
    undecided : cases that have no other rows
    not_offered : what the implementation does not have, or why it refused a case -> how often
    not_tried : why the property was not tried on it -> how often
    edges, refused_edges : edges of the lattice -> how many decided, or refused, cases stood there
    stood, refused_at : all edges of a case at once, as `lattice.as_bits` has them -> how many cases
        had them that were decided, or had nothing in them; and how many that were refused
    built : the same of the cases that were built so that all pairs of edges are met (see `pairs`)
    inside, outside : entry of the ledger about the property -> cases that it covers, and others
    known, spared, held : entry -> cases that broke as it says, cases that were not launched for it,
        and cases that it covers, and that hold
    finding : see `findings`
    lost : why nothing is known of it, such as that its worker died outside of any case
    """

    name: str
    clause: str
    implementation: str = ""
    cases: int = 0
    asked: int = 0
    unreached: int = 0
    refused: int = 0
    inconclusive: Counter[Remark] = field(default_factory=Counter)
    ambiguous: int = 0
    undecided: int = 0
    not_offered: Counter[str] = field(default_factory=Counter)
    not_tried: Counter[Remark] = field(default_factory=Counter)
    budget_used: float | None = None
    edges: Counter[str] = field(default_factory=Counter)
    refused_edges: Counter[str] = field(default_factory=Counter)
    stood: Counter[str] = field(default_factory=Counter)
    refused_at: Counter[str] = field(default_factory=Counter)
    built: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    spared: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    finding: dict[str, Any] | None = None
    lost: str = ""

    def settle(self) -> None:
        """Once all its cases were tried: nothing is asked of what its calls say is not there."""
        if not self.cases and not self.refused and self.not_offered:
            self.asked = 0

    def add(self, other: Record) -> None:
        """Count what became of more cases of the same property."""
        for name, value in vars(other).items():
            if isinstance(value, Counter) or type(value) is int:
                setattr(self, name, getattr(self, name) + value)
        self.lost = self.lost or other.lost
        used = [b for b in (self.budget_used, other.budget_used) if b is not None]
        self.budget_used = max(used, default=None)
        self.finding = self.finding or other.finding

    def to_json(self) -> dict[str, Any]:
        """Plain data, which can cross processes."""
        return {
            name: list(value.items()) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The inverse of `to_json`."""
        record = cls(**data)
        for name, value in data.items():
            if isinstance(value, list):
                counts = ((tuple(k) if isinstance(k, list) else k, count) for k, count in value)
                setattr(record, name, Counter(dict(counts)))
        return record
