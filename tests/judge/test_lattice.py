"""The lattice: an edge that no case stood on is a gap, unless there is a reason for it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import trials
from nsa_ref.semantics import FLA, LUCIDRAINS, PAPER
from nsa_ref.testing import Case, OracleImplementation, running
from nsa_ref.testing.evidence import reachable
from nsa_ref.testing.judging import judge
from nsa_ref.testing.lattice import (
    EDGES,
    Edge,
    as_bits,
    case_edges,
    excused_edges,
    meetable_pairs,
    met_pairs,
    pairs_of,
    unmet_edges,
    unmet_pairs,
)
from nsa_ref.testing.limits import limited
from nsa_ref.testing.options import Options
from nsa_ref.testing.pairs import Builder, cases_of_pairs, first_asked
from nsa_ref.testing.properties import PROPERTIES, Outcome
from nsa_ref.testing.running import run_property
from nsa_ref.testing.strategies import ABOUT, VARIED_BY
from nsa_ref.testing.verdicts import Record
from port_zoo import Refuses, SlidingMask

NEVER_OF_LAYERS = {edge.name for edge in EDGES.values() if "layer" not in edge.about}


def record(name: str = "W1_sliding_mask_as_read", **edges: Counter[str]) -> Record:
    """What of a property's record says on which edges its cases stood."""
    return Record(name=name, clause="", cases=3, **edges)


def test_every_edge_must_be_met_unless_it_was_refused_or_nothing_reads_it() -> None:
    unmet = {"G = 16", "decode", "batch 3", "memory 16"}
    met = Counter(edge for edge in EDGES if edge not in unmet)
    records = [record(edges=met, refused_edges=Counter({"decode": 4}))]
    assert set(unmet_edges(records)) == unmet
    # a window has no memory, and what was refused cannot be met
    assert set(excused_edges(records)) == {"decode", "memory 16"}
    records.append(record(name="C2_compress_mask_as_read"))
    assert set(excused_edges(records)) == {"decode"}


@pytest.mark.parametrize(
    ("declared", "edge", "within"),
    [
        ({"limits": {"q_heads": (1, 2, 4)}}, "G = 16", False),
        ({"limits": {"q_heads": (1, 16)}}, "G = 16", True),
        ({"limits": {"kv_len": range(1, 300)}}, "length around 128", True),
        ({"limits": {"kv_len": range(1, 100)}}, "length around 128", False),
        ({"semantics": (FLA,)}, "w = 0", False),
        ({"semantics": (FLA, PAPER)}, "w = 0", True),
    ],
)
def test_what_is_declared_says_which_edges_can_be_reached(
    declared: dict[str, Any], edge: str, within: bool
) -> None:
    """Not which fields are limited: a limit may be wide, and a switch may exclude an edge."""
    port = OracleImplementation()
    for name, value in declared.items():
        setattr(port, name, value)
    asked = [PROPERTIES["W1_sliding_mask_as_exposed"]]
    assert reachable({edge}, asked, port, draws=300) == ({edge} if within else set())


def test_layers_of_lucidrains_have_no_rows_that_see_nothing() -> None:
    """Their empty rows are means of all columns, of which the generator makes no layer."""
    port = OracleImplementation()
    port.semantics = (LUCIDRAINS,)
    layers = [prop for prop in PROPERTIES.values() if prop.about == "layer"]
    wanted = {"memory 0", "n = 0", "memory 1", "n = 1"}
    assert reachable(wanted, layers, port) == {"memory 1", "n = 1"}


def test_edges_that_a_branch_never_has_are_excused() -> None:
    """Eq. 9 needs d to divide l, so that only compress and pool draw l and d apart."""
    apart = {"l no multiple of d", "l < d"}
    met = Counter(edge for edge in EDGES if edge not in apart)
    for name, excused in (
        ("F1_fine_mask_as_exposed", apart),
        ("I2_selection", apart),
        ("C2_compress_mask_as_exposed", set()),
        ("C4_pool", set()),
    ):
        records = [record(name=name, edges=met)]
        assert set(excused_edges(records)) == excused, name


@pytest.mark.parametrize(
    "name", ["W1_sliding_mask_as_exposed", "F1_fine_mask_as_exposed", "C4_pool"]
)
def test_a_field_that_is_not_varied_keeps_its_default(name: str, tmp_path: Path) -> None:
    """What VARIED_BY says, seen on the cases themselves."""
    tried: list[Case] = []

    def note(*asked: Any) -> Outcome:
        tried.append(asked[-1])
        return Outcome(compared=1)

    prop = dataclasses.replace(PROPERTIES[name], check=note)
    run_property(prop, OracleImplementation(), Options(findings=tmp_path))
    for field, groups in VARIED_BY.items():
        values = {getattr(case, field) for case in tried}
        varied = set(groups) & set(ABOUT[prop.about])
        assert varied or values == {getattr(Case(), field)}, field


def test_edges_that_no_layer_has_are_excused_for_layers_alone() -> None:
    """Its queries are its keys, and its sizes small: --branch layer can be thorough."""
    met = Counter(edge for edge in EDGES if edge not in NEVER_OF_LAYERS)
    layer, fine = (
        excused_edges([record(name=name, edges=met)])
        for name in ("G1_layer_output", "F1_fine_mask_as_exposed")
    )
    assert set(layer) == NEVER_OF_LAYERS > {"decode", "length around 128", "inputs offsets"}
    assert set(fine) == {"l no multiple of d", "l < d"}


def test_cases_of_layers_stand_on_every_edge_but_the_excused_ones(tmp_path: Path) -> None:
    """What `Edge.about` says, seen on the cases themselves: an excuse too many hides a gap."""
    of_layers = [prop for prop in PROPERTIES.values() if prop.about == "layer"]
    unchecked = [
        dataclasses.replace(prop, check=lambda *_: Outcome(compared=1)) for prop in of_layers
    ]
    oracle, options = OracleImplementation(), Options(findings=tmp_path)
    records = [run_property(prop, oracle, options) for prop in unchecked]
    unmet = set(unmet_edges(records))
    assert unmet >= NEVER_OF_LAYERS
    assert set(excused_edges(records)) == unmet


@pytest.mark.parametrize("about", ABOUT)
def test_cases_on_an_edge_can_decide_something(about: str) -> None:
    """Else a branch that is judged alone would never be thorough: no case of it met the edge."""
    oracle = OracleImplementation()
    prop = PROPERTIES[first_asked(oracle, about)]
    builder = Builder(limited(oracle, prop.called), prop)

    def is_decided(edge: Edge) -> bool:
        cases = (builder.case_of(edge, other) for other in (edge, *builder.edges))
        return any(case and judge(prop, oracle, case).compared for case in cases)

    built = [edge for edge in builder.edges if not edge.empty and builder.case_of(edge, edge)]
    assert len(built) > len(EDGES) / 2
    assert [edge.name for edge in built if not is_decided(edge)] == []


def test_an_edge_that_only_refused_cases_had_is_excused(tmp_path: Path) -> None:
    result = trials.record("W1_sliding_mask_as_exposed", Refuses(), tmp_path)
    assert not result.edges and result.refused_edges


# Pairs of edges

W1_EXPOSED = "W1_sliding_mask_as_exposed"
FEW = {"q_heads": (1, 2), "kv_heads": 1, "batch": (1, 3), "value_dim": 1, "kv_len": (2, 4)}


class FewSizes(SlidingMask):
    """Two lengths, and so few other sizes that there are few pairs."""

    limits: Any = FEW | {"q_len": (1, 4), "head_dim": 1, "layout": "contiguous"}


def thorough(folder: Path) -> Record:
    """What becomes of the pairs of edges, and of two drawn cases of each shape or so."""
    prop = dataclasses.replace(PROPERTIES[W1_EXPOSED], examples=2)
    return run_property(prop, FewSizes(), Options(findings=folder, level="thorough"))


def stood(*cases: tuple[str, ...]) -> Counter[str]:
    return Counter(map(as_bits, cases))


def test_a_pair_is_met_by_one_case_and_not_by_two() -> None:
    apart = record(stood=stood(("G = 16", "w = 0"), ("batch 3", "w = 1")))
    assert met_pairs([apart]) == {"w = 0 & G = 16", "w = 1 & batch 3"}
    # a case with nothing in it shows that emptiness is borne, and nothing else
    assert pairs_of(stood(("q_len 0", "w = 1", "batch 3"))) == {
        "q_len 0 & w = 1",
        "q_len 0 & batch 3",
    }


def test_a_pair_that_can_be_met_must_be_unless_it_was_refused() -> None:
    both = ("w = 1", "batch 3")
    one = record(asked=3, built=stood(both), stood=stood(*((edge,) for edge in both)))
    assert unmet_pairs([one]) == ["w = 1 & batch 3"]
    assert unmet_pairs([one, record(refused_at=stood(both))]) == []
    assert unmet_pairs([one, record(stood=stood(both))]) == []
    one.asked = 0  # its calls say that it is not offered
    assert unmet_pairs([one]) == []


def test_limits_say_which_pairs_can_be_met() -> None:
    built = {}
    for lengths in ((1, 4), (4,)):
        port = FewSizes()
        port.limits = FewSizes.limits | {"q_len": lengths}
        prop = PROPERTIES[W1_EXPOSED]
        cases = cases_of_pairs(port, prop)
        built[lengths] = pairs_of({as_bits(case_edges(prop, case)) for case in cases})
    assert {"decode & batch 3", "G = 2 & batch 3"} <= built[1, 4]
    assert "decode & batch 3" not in built[4,] >= {"G = 2 & batch 3"}
    # what excludes each other is no pair, whatever is declared
    assert not any({"w = 0", "w = 1"} <= set(pair.split(" & ")) for pair in built[1, 4])


def test_no_pair_that_is_drawn_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    """What is built stands on all pairs that cases have which the generator draws."""
    drawn, built = trials.record(W1_EXPOSED, FewSizes(), tmp_path), thorough(tmp_path)
    assert not drawn.built and met_pairs([drawn])
    assert met_pairs([drawn]) <= pairs_of(built.built)
    assert met_pairs([built]) == meetable_pairs([built])
    assert unmet_pairs([built]) == []


def test_a_pair_that_no_case_ever_has_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where cases of a pair are left out, drawn or built, all its edges are met, and it is not."""
    judged = running.judge

    def without(prop: Any, port: Any, case: Case) -> Outcome:
        left_out = case.batch == 3 and case.sliding_window_size == 0
        return Outcome(compared=0, ambiguous=1) if left_out else judged(prop, port, case)

    monkeypatch.setattr(running, "judge", without)
    result = thorough(tmp_path)
    assert {"w = 0", "batch 3"} <= set(result.edges)
    assert "w = 0 & batch 3" in unmet_pairs([result])


def test_pairs_of_refused_cases_are_no_met_ones(tmp_path: Path) -> None:
    result = trials.record(W1_EXPOSED, Refuses(), tmp_path)
    assert result.refused_at and not met_pairs([result]) and not unmet_pairs([result])
