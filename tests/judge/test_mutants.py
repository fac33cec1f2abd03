"""The judge's sharpness: a mutant of each clause dies of it, and what is right is never failed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import nsa_ref, python
from nsa_ref.attention import Attention
from nsa_ref.testing import Case, Implementation, cli
from nsa_ref.testing.branches import BRANCHES
from nsa_ref.testing.conditions import Condition
from nsa_ref.testing.mutants import ZOO
from nsa_ref.testing.mutants.columns import COLUMNS
from nsa_ref.testing.mutants.compression import CompressionMap
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.layer import LayerInSteps
from nsa_ref.testing.mutants.layers import LayerWithFloor
from nsa_ref.testing.mutants.rounding import Rounding, Way
from nsa_ref.testing.mutants.selection import Selector
from nsa_ref.testing.mutants.trials import (
    Trial,
    kills_of_its_own,
    made_from_of,
    try_mutant,
    why_it_cannot_be_met,
    worker_died,
)
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.running import run_property
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


#: Of each clause the mutant that joined first; `nsa-ref mutants` tries them all.
FIRST = [*{mutant.clause: name for name, mutant in reversed(ZOO.items())}.values()][::-1]


@pytest.mark.parametrize("name", FIRST)
def test_a_mutant_of_each_clause_is_killed_by_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a property of the clause that it breaks, for what it does, and where it does it.

    Most die of a few small cases: all are drawn where those do not suffice.
    """
    options = Options(findings=tmp_path)
    with monkeypatch.context() as few:
        few.setattr(ZOO[name].implementation, "pace", "slow")
        trial = try_mutant(name, options, once=True)
    if not trial.killed:
        trial = try_mutant(name, options, once=True)
    assert trial.killed, f"{trial.died_of}, not {trial.clause}\n{trial.found}"


@pytest.mark.parametrize(
    ("name", "limits", "reason"),
    [
        ("DotProductsInFloat16", "production", ("needs", "dtype", "float16")),
        ("NoWindow", "production", ("needs", "sliding_window_size", "0")),
        ("BlockInEightBits", "interpreter", ("needs", "num_selection_blocks", "> 256")),
        ("LastRowTwice", "interpreter", ("needs", "q_len", "> 64")),
        ("LastRowTwice", "production", ("needs", "q_len", "> 64")),
        ("DuplicatesOnceBackward", "interpreter", ("needs", "duplicates", "multiset")),
        ("NarrowMean", "interpreter", ("not offered", "pool")),
        ("SequencesLeak", "production", ("not offered", "varlen")),
        (
            "LastTokenByStride",
            "production",
            ("needs", "compress_block_size_mod_compress_block_sliding_stride", "!= 0"),
        ),
        ("EarlyRowsSeeAll", "production", ("needs", "q_len", "> kv_len")),
        ("ForcedUpTo128", "production", None),
        ("EarlyRowsSeeAll", "interpreter", None),
        ("ScaleOfHalfTheWidth", "production", None),
        ("LastRowTwice", "free", None),
    ],
)
def test_what_limits_exclude_is_worked_out(
    name: str, limits: str, reason: tuple[str, ...] | None
) -> None:
    """From what the mutant needs and what the limits leave, never from a list of names."""
    found = list(why_it_cannot_be_met(name, limits))
    assert reason in found if reason else not found


def test_free_limits_exclude_no_mutant() -> None:
    """And of every one it can be worked out what the others exclude."""
    excluded = {(n, limits): [*why_it_cannot_be_met(n, limits)] for n in ZOO for limits in COLUMNS}
    assert not any(excluded[name, "free"] for name in ZOO)
    assert {limits for (_, limits), why in excluded.items() if why} == {*COLUMNS} - {"free"}


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("WindowPlusOne", "interpreter"),
        ("MinusOneIsZero", "interpreter"),
        ("LseBaseTwo", "interpreter"),
        # which are mistakes of the first rows alone
        ("TieIntoTheFuture", "production"),
        ("MemoryMasked", "production"),
    ],
)
def test_a_mutant_dies_under_other_limits(name: str, limits: str, tmp_path: Path) -> None:
    """Those of kernels."""
    trial = try_mutant(name, Options(findings=tmp_path), limits)
    assert trial.killed, f"{trial.died_of}\n{trial.found}"


def test_a_wrong_sum_over_heads_is_blamed_where_no_case_has_one_head_a_group(
    tmp_path: Path,
) -> None:
    """Its part cannot be left out under these limits: the clause is what the property is about."""
    trial = try_mutant("FirstHeadOnly", Options(findings=tmp_path), "production")
    assert trial.killed, f"{trial.died_of}\n{trial.found}"


def test_a_mutant_is_not_excused_by_what_it_does_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies where it says that it is right; and what cannot be met is tried all the same."""
    for needs, limits in (
        ({"kv_len": "> 512"}, "interpreter"),
        ({"method": "select"}, "free"),
    ):
        conditions = () if "method" in needs else (Condition(*next(iter(needs.items()))),)
        changed = dataclasses.replace(
            ZOO["WindowPlusOne"], needs=conditions, method=needs.get("method", "")
        )
        monkeypatch.setitem(ZOO, "WindowPlusOne", changed)
        trial = try_mutant("WindowPlusOne", Options(findings=tmp_path), limits)
        assert (trial.died_of, trial.right) == ("W1 (beyond its needs)", False)


@pytest.mark.parametrize(
    ("name", "found_by", "seed"),
    [
        # rows that read no key, and are NaN as declared
        ("NarrowFirstToken", "F1_fine_mask_of_long_sequences", 4),
        # a block that is read anyway, in the layer
        ("FineWithoutCut", "F1_fine_mask_through_the_layer", 5),
    ],
)
def test_a_mutant_of_a_mask_is_no_wrong_value(
    name: str, found_by: str, seed: int, tmp_path: Path
) -> None:
    """Seeds at which another clause was blamed."""
    options = Options(findings=tmp_path, seed=seed, shrink=False)
    finding = run_property(PROPERTIES[found_by], ZOO[name].implementation, options).finding
    assert finding is not None and finding["clause"] == ZOO[name].clause


def test_what_cannot_be_met_excuses_a_survivor_alone() -> None:
    """A survivor without a reason, another clause, an exception and a lost worker are failures."""
    what = {"name": "NoScale", "limits": "production", "seed": 0, "clause": "A1"}
    reason = ("needs", "dtype", "float16")
    assert Trial(**what, cannot=[reason], alike=1).died_of == "cannot be met"
    assert Trial(**what, cannot=[reason], alike=1).right
    assert Trial(**what, cannot=[("not offered", "select")]).right
    assert Trial(**what, found_by="A1").right
    assert not Trial(**what).right
    assert not Trial(**what, cannot=[reason]).right
    assert not Trial(**what, found_by="A3").right
    assert not Trial(**what, found_by="A3", cannot=[reason], alike=1).right
    assert not Trial(**what, found_by="A1", raised=True).right
    assert not worker_died("NoScale", "production", 0).right


class LastBitOfLse(Kernel):
    """Within every bound, and not what it is made from."""

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        out, lse = super().sliding(case, q, k, v)
        return Attention(out, np.nextafter(lse, np.inf, dtype=lse.dtype))


def test_what_cannot_be_met_gives_the_bits_of_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is told, even if its bounds admit it."""
    options = Options(findings=tmp_path)
    trial = try_mutant("NarrowDistance", options, "interpreter")
    assert (trial.died_of, trial.right) == ("cannot be met", True)
    assert trial.alike >= trial.cases > 0
    changed = dataclasses.replace(ZOO["NarrowDistance"], implementation=LastBitOfLse())
    monkeypatch.setitem(ZOO, "NarrowDistance", changed)
    trial = try_mutant("NarrowDistance", options, "interpreter")
    assert (trial.died_of, trial.right) == ("W1 (beyond its needs)", False)
    assert trial.found.startswith("sliding differs from kernel for Case(")


@pytest.mark.parametrize("name", ["NoRescaling", "NarrowProbabilities", "OutputOverwritten"])
def test_what_a_mutant_is_made_from_rounds_as_it_does(name: str) -> None:
    mutant = ZOO[name].implementation
    right = made_from_of(mutant)
    assert type(right) in (Kernel, Selector)
    assert all(getattr(right, x) == getattr(mutant, x) for x in ("way", "numerics", "semantics"))


def test_a_property_that_alone_finds_a_mutant_is_told(tmp_path: Path) -> None:
    """Of two that call the same method and both find it, neither does."""
    options = Options(findings=tmp_path)
    by_two = kills_of_its_own([try_mutant("NoScale", options)])
    assert by_two["A1_compress_output"] == by_two["A1_compress_output_by_shape"] == []
    by_one = kills_of_its_own([try_mutant("FirstHeadOnly", options)])
    assert by_one == {"I3_selection": ["FirstHeadOnly"]}


def test_what_finds_a_mistake_in_one_branch_finds_it_in_all() -> None:
    """The mistake is in all of them, and it was tried in the first."""
    died = {"name": "LseBaseTwo", "limits": "free", "seed": 0, "clause": "A1", "found_by": "A1"}
    alone = kills_of_its_own([Trial(**died, alone=["A1_compress_lse"])])
    finders = {name for name, mutants in alone.items() if mutants}
    assert finders == {f"A1_{branch.name}_lse" for branch in BRANCHES}


def test_the_interpreter_is_tried_within_what_is_declared_there() -> None:
    """nsa_ref states the limits, because it imports nothing of nsa_fast."""
    torch = pytest.importorskip("torch")
    assert torch
    from nsa_fast.adapter import NsaFastInterpreted, NsaFastLayerInterpreted

    stated, column = NsaFastInterpreted(), COLUMNS["interpreter"]
    assert column.limits == stated.limits
    assert column.semantics == stated.semantics
    assert set(column.dtypes) == set(stated.numerics)
    offered = {method for method in vars(Implementation) if method.endswith("_mask")}
    assert set(column.methods) == {"sliding", "compress", "fine", "select"} | offered
    assert all(map(stated.offers, column.methods))

    whole, layers = NsaFastLayerInterpreted(), column.layers
    assert layers is not None
    assert (layers.limits, layers.limits_of) == (whole.limits, whole.limits_of)
    assert set(layers.dtypes) == set(whole.numerics)
    followed = (semantics for semantics in LayerInSteps.semantics if semantics in whole.semantics)
    assert set(layers.semantics) == set(followed)
    assert all(map(whole.offers, layers.methods))


def test_no_mutant_is_lost_and_none_dies_of_another_clause_than_before() -> None:
    """A new one is added to mutant_names.txt, with the clause that must kill it."""
    pinned = Path(__file__).with_name("mutant_names.txt").read_text().splitlines()
    assert sorted(f"{mutant.clause} {name}" for name, mutant in ZOO.items()) == sorted(pinned)


def test_every_clause_has_a_mutant() -> None:
    assert {mutant.clause for mutant in ZOO.values()} == {p.clause for p in PROPERTIES.values()}


# --- the command ----------------------------------------------------------------------------------

#: Read by every Python that starts with this folder on its path: the command and its workers.
PLANTED = """
import time

from nsa_ref.testing import OracleImplementation, last_words
from nsa_ref.testing.mutants import layers, mutant


@mutant("F2", "none")
class Survivor(OracleImplementation):
    pace = "slow"


@mutant("A4", "gradients are wrong, and so is the output")
class OfAnotherClause(layers.GatesPermuted):
    pass


@mutant("C4", "it raises")
class Raises(OracleImplementation):
    pace = "slow"

    def pool(self, case, x, weights):
        raise ZeroDivisionError


@mutant("F2", "it hangs", needs={"dtype": "float64"})
class Hangs(OracleImplementation):
    pace = "slow"

    def fine_mask(self, case, block_indices):
        if case.dtype == "float64":
            time.sleep(600)
        return super().fine_mask(case, block_indices)


last_words.timeout_of = lambda prop, *case: 1.0 if prop.clause == "F2" else 120.0
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
    done = nsa_ref("mutants", *names, "--seeds", "2", "-n", "1", "--json", "mutants.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^WindowPlusOne +W1 +W1 +\d+ +[\d.]+$", done.stdout, re.MULTILINE)
    assert re.search(r"^SequencesLeak +G4 +G4 +\d+ +[\d.]+$", done.stdout, re.MULTILINE)
    assert "free: 2 of 2 mutants die of their clause\n" in done.stdout
    some = "production: 1 of 2 mutants die of their clause, 1 cannot be met under these limits"
    assert some in done.stdout
    assert "cannot be met, not offered (varlen): SequencesLeak" in done.stdout
    assert "properties that find no mutant alone (free): W1_sliding_mask_as_read" in done.stdout
    written = json.loads((planted / "mutants.json").read_text())
    assert written["limits"].keys() == COLUMNS.keys()
    alone = written["found_by_one_property_alone"]
    assert alone["W1_sliding_mask_as_exposed"] == ["WindowPlusOne"]
    assert alone["W1_sliding_mask_as_read"] == []
    trials = [(one["name"], one["limits"], one["seed"]) for one in written["mutants"]]
    for limits, again in (("free", names), ("production", names[:1]), ("interpreter", names)):
        of_limits = [(n, seed) for n, placed, seed in trials if placed == limits]
        assert of_limits == [(n, 0) for n in names] + [(n, 1) for n in again]
    assert all(one["right"] and one["cases"] + len(one["cannot"]) for one in written["mutants"])


def test_a_survivor_and_what_dies_of_something_else_are_shown(planted: Path) -> None:
    """Exit code 1. The command's process is one of its own, which finds the planted ones.

    A mutant that hangs is ended, and that is no kill.
    """
    names = ("Survivor", "OfAnotherClause", "Raises", "Hangs", "WindowPlusOne")
    done = python("-m", "nsa_ref.testing.cli", "mutants", *names, "-n", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    for line in (
        "Survivor +F2 +survives",
        "OfAnotherClause +A4 +G1",
        r"Raises +C4 +C4 \(by an",
        "Hangs +F2 +no end",
    ):
        assert re.search(f"^{line}", done.stdout, re.MULTILINE), done.stdout
    assert "Hangs (it hangs), free, seed 0, must die of F2: no end\n" in done.stdout
    assert "free: 1 of 5 mutants die of their clause\n" in done.stdout
    assert "production: 1 of 5 mutants die of their clause, 2 cannot be met" in done.stdout


def test_what_cannot_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2."""
    assert cli.main(["mutants", "WindowPlusTwo"]) == 2
    assert capsys.readouterr().err.startswith("nsa-ref: 'WindowPlusTwo' is no mutant; there are")
