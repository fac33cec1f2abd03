"""The judge's sharpness: every mutant dies of its clause, and what is right is never failed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from nsa_ref.testing import Implementation
from nsa_ref.testing.mutants import ZOO
from nsa_ref.testing.mutants.arithmetic import AnotherOrder
from nsa_ref.testing.mutants.compression import CompressionMap
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.layer import LayerInSteps
from nsa_ref.testing.mutants.selection import Selector
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import FAILURES


@pytest.mark.parametrize("name", ZOO)
def test_mutant_is_killed_by_its_clause(name: str, tmp_path: Path) -> None:
    """At the quick level, by a property of the clause that it breaks, and for what it does."""
    mutant = ZOO[name]
    options = Options(findings=tmp_path, shrink=False)
    found = []
    for prop in PROPERTIES.values():
        if prop.clause != mutant.clause:
            continue
        record = run_property(prop, mutant.implementation, options)
        if record.finding is not None:
            found.append(record.finding)
            if record.finding["clause"] == mutant.clause:
                break
    blamed = [finding["clause"] for finding in found]
    assert mutant.clause in blamed, f"{name} ({mutant.mistake}) survives; others blamed: {blamed}"
    assert found[-1]["kind"] not in FAILURES, found[-1]["text"]


class Unsteady(AnotherOrder):
    """Right, and never twice the same: what is not stated is no mistake."""

    name = "unsteady"
    deterministic = False
    # rounding to 16 bits hides the order of a sum in most runs, and shows it in another
    numerics: ClassVar = {"float64": "fp64", "float32": "fp32"}


RIGHT: list[tuple[Implementation, Property]] = []
for base in (Kernel(), CompressionMap(), Selector(), LayerInSteps()):
    # what the mutants that are made from it are asked
    clauses = {m.clause for m in ZOO.values() if isinstance(m.implementation, type(base))}
    asked = (p for p in PROPERTIES.values() if p.clause in clauses)
    RIGHT += [(base, p) for p in asked if not (p.why_not_offered(base) or p.why_not_tried(base))]

#: Properties that compare two runs; all others are the same for it as for `Kernel`.
TWICE = ("canary", "canary_backward", "heads", "linear_in_v", "permutation", "what_follows")
RIGHT += [(Unsteady(), prop) for prop in PROPERTIES.values() if prop.name.endswith(TWICE)]


@pytest.mark.parametrize(
    ("implementation", "prop"), RIGHT, ids=[f"{i.name}-{p.name}" for i, p in RIGHT]
)
def test_what_the_mutants_are_made_from_is_right(
    implementation: Implementation, prop: Property, tmp_path: Path
) -> None:
    """A mutant dies of its one mistake: without it, nothing is found."""
    record = run_property(prop, implementation, Options(findings=tmp_path))
    assert record.finding is None, record.finding["text"]


def test_the_zoo_is_large_and_covers_the_clauses() -> None:
    """At least 20, and a mutant for every clause that a property decides."""
    assert len(ZOO) >= 20
    assert {mutant.clause for mutant in ZOO.values()} == {p.clause for p in PROPERTIES.values()}
