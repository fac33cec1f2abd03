"""What a mutant is, and how a class becomes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nsa_ref.testing.conditions import Condition
from nsa_ref.testing.implementation import Implementation


@dataclass(frozen=True)
class Mutant:
    """A right implementation with one mistake.

    implementation : what is judged
    clause : what the judge must find broken
    mistake : in one sentence
    seen_in : where somebody has made this mistake; "" if it was made up
    method : the plug's method that is wrong; "" for all that are asked about the clause
    needs : what is so of every case in which it differs from what is right
    """

    implementation: Implementation
    clause: str
    mistake: str
    seen_in: str
    method: str = ""
    needs: tuple[Condition, ...] = ()


ZOO: dict[str, Mutant] = {}


def mutant(
    clause: str,
    mistake: str,
    *,
    seen_in: str = "",
    method: str = "",
    needs: Mapping[str, Any] | None = None,
) -> Callable[[type], type]:
    """Register an implementation class as a mutant that `clause` must kill.

    needs : in the language of limits and ledgers, {"kv_len": "> 512"}
    """
    conditions = tuple(Condition(name, rule) for name, rule in (needs or {}).items())

    def register(cls: type) -> type:
        cls.name = cls.__name__  # type: ignore[attr-defined]
        ZOO[cls.__name__] = Mutant(cls(), clause, mistake, seen_in, method, conditions)
        return cls

    return register
