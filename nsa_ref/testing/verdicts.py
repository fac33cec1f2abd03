"""What became of a property, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Record:
    """What became of one property: plain data, so that it can cross processes.

    cases : how many were decided
    inconclusive : why a case could not tell -> how many cases
    ambiguous : rows whose choice of blocks may go either way
    undecided : cases that have no other rows
    not_offered : what the implementation does not have, or why it refused a case -> how often
    not_tried : why the property was not tried on it -> how often
    edges, refused_edges : edges of the lattice -> how many decided, or refused, cases stood there
    finding : see `findings`
    """

    name: str
    clause: str
    branch: str
    implementation: str
    device: str
    cases: int = 0
    inconclusive: Counter[str] = field(default_factory=Counter)
    ambiguous: int = 0
    undecided: int = 0
    not_offered: Counter[str] = field(default_factory=Counter)
    not_tried: Counter[str] = field(default_factory=Counter)
    budget_used: float | None = None
    edges: Counter[str] = field(default_factory=Counter)
    refused_edges: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    finding: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as a dict of JSON values."""
        return {
            name: dict(value) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }
