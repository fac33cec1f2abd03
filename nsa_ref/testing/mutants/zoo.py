"""What a mutant is, and how a class becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nsa_ref.testing.implementation import Implementation


@dataclass(frozen=True)
class Mutant:
    """A right implementation with one mistake.

    implementation : what is judged
    clause : what the judge must find broken
    mistake : in one sentence
    seen_in : where somebody has made this mistake; "" if it was made up
    """

    implementation: Implementation
    clause: str
    mistake: str
    seen_in: str


ZOO: dict[str, Mutant] = {}


def mutant(clause: str, mistake: str, *, seen_in: str = "") -> Callable[[type], type]:
    """Register an implementation class as a mutant that `clause` must kill."""

    def register(cls: type) -> type:
        cls.name = cls.__name__  # type: ignore[attr-defined]
        ZOO[cls.__name__] = Mutant(cls(), clause, mistake, seen_in)
        return cls

    return register
