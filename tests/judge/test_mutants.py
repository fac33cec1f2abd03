"""The judge's sharpness: every mutant dies of its clause, and what is right is never failed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from commands import nsa_ref, python
from nsa_ref.testing import Case, Implementation, cli
from nsa_ref.testing.mutants import ZOO
from nsa_ref.testing.mutants.compression import CompressionMap
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.layer import LayerInSteps
from nsa_ref.testing.mutants.layers import LayerWithFloor
from nsa_ref.testing.mutants.rounding import Rounding, Way
from nsa_ref.testing.mutants.selection import Selector
from nsa_ref.testing.mutants.suite import test_mutant_is_killed_by_its_clause  # noqa: F401
from nsa_ref.testing.properties import PROPERTIES, Property
from trials import passes


class Unsteady(Kernel):
    """Right, and its last bits differ on one call in ten: what is not stated is no mistake."""

    name = "unsteady"
    now_and_then = Way(
        block=16, order="reversed", backward_order="reversed", exponential="exp2_late"
    )

    def __init__(self) -> None:
        super().__init__()
        self.chance = np.random.default_rng(0)

    def rounding(self, case: Case, *, backward: bool = False) -> Rounding:
        """Asked for at the beginning of every pass."""
        self.way = self.now_and_then if self.chance.random() < 0.1 else Way()
        return super().rounding(case, backward=backward)


#: A few of the cases of each property, small ones first, as of a port that is slow: a mutant
#: dies of small cases, and the other right implementations are asked of all sizes.
RIGHT: list[tuple[Implementation, Property]] = []
for base in (Kernel(), CompressionMap(), Selector(), LayerInSteps()):
    # what the mutants that are made from it are asked
    clauses = {m.clause for m in ZOO.values() if isinstance(m.implementation, type(base))}
    asked = (p for p in PROPERTIES.values() if p.clause in clauses)
    RIGHT += [(base, p) for p in asked if not (p.why_not_offered(base) or p.why_not_tried(base))]

#: The score floor of the mutants of `LayerWithFloor` is all that it has beside `LayerInSteps`.
LARGE = [prop for prop in PROPERTIES.values() if prop.name.endswith("_of_large_logits")]
RIGHT += [(LayerWithFloor(), prop) for prop in LARGE]

#: Properties that compare several runs; all others are the same for it as for `Kernel`.
TWICE = ("canary", "canary_backward", "heads", "linear_in_v", "permutation", "what_follows")
RIGHT += [(Unsteady(), prop) for prop in PROPERTIES.values() if prop.name.endswith(TWICE)]


@pytest.mark.parametrize(
    ("implementation", "prop"), RIGHT, ids=[f"{i.name}-{p.name}" for i, p in RIGHT]
)
def test_what_the_mutants_are_made_from_is_right(
    implementation: Implementation, prop: Property, tmp_path: Path
) -> None:
    """A mutant dies of its one mistake: without it, nothing is found."""
    implementation.pace = "fast" if prop.extent else "slow"
    passes(prop.name, implementation, tmp_path)


def test_no_mutant_is_lost_and_none_dies_of_another_clause_than_before() -> None:
    """A new one is added to mutant_names.txt, with the clause that must kill it."""
    pinned = Path(__file__).with_name("mutant_names.txt").read_text().splitlines()
    assert sorted(f"{mutant.clause} {name}" for name, mutant in ZOO.items()) == sorted(pinned)


def test_every_clause_has_a_mutant() -> None:
    assert {mutant.clause for mutant in ZOO.values()} == {p.clause for p in PROPERTIES.values()}


# --- the command ----------------------------------------------------------------------------------

#: Read by every Python that starts with this folder on its path: the command and its workers.
PLANTED = """
from nsa_ref.testing import OracleImplementation
from nsa_ref.testing.mutants import layers, mutant


@mutant("F2", "none")
class Survivor(OracleImplementation):
    pass


@mutant("A4", "gradients are wrong, and so is the output")
class OfAnotherClause(layers.GatesPermuted):
    pass


@mutant("C4", "it raises")
class Raises(OracleImplementation):
    def pool(self, case, x, weights):
        raise ZeroDivisionError
"""


@pytest.fixture
def planted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory but for the planted mutants, which every process here finds."""
    (place / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(place), os.environ["PYTHONPATH"])))
    return place


def test_the_command_prints_what_every_mutant_died_of(planted: Path) -> None:
    """Exit code 0; the same as data."""
    names = ("WindowPlusOne", "SequencesLeak")
    done = nsa_ref("mutants", *names, "-n", "1", "--json", "mutants.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^WindowPlusOne +W1 +W1 +\d+ +[\d.]+$", done.stdout, re.MULTILINE)
    assert re.search(r"^SequencesLeak +G4 +G4 +\d+ +[\d.]+$", done.stdout, re.MULTILINE)
    assert "2 of 2 mutants die of their clause" in done.stdout
    written = json.loads((planted / "mutants.json").read_text())["mutants"]
    assert [one["name"] for one in written] == list(names)
    assert all(one["right"] and one["cases"] and ZOO[one["name"]] for one in written)


def test_a_survivor_and_what_dies_of_something_else_are_shown(planted: Path) -> None:
    """Exit code 1. The command's process is one of its own, which finds the planted ones."""
    names = ("Survivor", "OfAnotherClause", "Raises", "WindowPlusOne")
    done = python("-m", "nsa_ref.testing.cli", "mutants", *names, "-n", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    for line in ("Survivor +F2 +survives", "OfAnotherClause +A4 +G1", r"Raises +C4 +C4 \(by an"):
        assert re.search(f"^{line}", done.stdout, re.MULTILINE), done.stdout
    assert "1 of 4 mutants die of their clause" in done.stdout


def test_what_cannot_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2."""
    assert cli.main(["mutants", "WindowPlusTwo"]) == 2
    assert capsys.readouterr().err.startswith("nsa-ref: 'WindowPlusTwo' is no mutant; there are")
