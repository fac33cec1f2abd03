"""Ports that are slow, or compile for every shape: fewer cases, or a dozen geometries for all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

import trials
from nsa_ref.semantics import PAPER
from nsa_ref.testing import Attention, Case, OracleImplementation, conformance_suite
from nsa_ref.testing.devices import Interpreter
from nsa_ref.testing.drawing import SLOW_LEAST, asked_of, draw, generate, small_first
from nsa_ref.testing.findings import size_of
from nsa_ref.testing.geometries import DOZEN, VARIED, shared_geometries
from nsa_ref.testing.lattice import CLAUSE_EDGES, case_edges
from nsa_ref.testing.loading import Declared
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.running import is_asked
from nsa_ref.testing.strategies import ABOUT


class Paced(OracleImplementation):
    """Right, and as slow as it says; it counts the shapes that it is called with."""

    name = "paced"
    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32", "float64": "fp64"}

    def __init__(self, pace: str) -> None:
        self.pace = pace
        self.shapes: set[Any] = set()

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        self.shapes.add((method, case.dtype, *(x.shape for x in arguments)))
        return super().run(method, case, *arguments)


def drawn(prop: Property, port: Paced, **options: Any) -> list[Case]:
    """What the property is asked on."""
    cases: list[Case] = []
    generate(prop, port, Options(shrink=False, **options), cases.append)
    return cases


def asked_about(about: str, port: Paced) -> list[Property]:
    props = [prop for prop in PROPERTIES.values() if prop.about == about and not prop.extent]
    return [prop for prop in props if is_asked(prop, port, Options())]


def geometry(case: Case) -> tuple[Any, ...]:
    return tuple(value for name, value in vars(case).items() if name not in VARIED)


@pytest.mark.parametrize("about", ["fine", "pool"])
def test_all_properties_of_a_branch_share_a_dozen_geometries(about: str) -> None:
    """A JAX port had no verdict after half an hour: it compiled for a thousand."""
    port = Paced("compiles")
    cases = [case for prop in asked_about(about, port) for case in drawn(prop, port)]
    shared = {geometry(case) for case in cases}
    assert DOZEN / 2 < len(shared) <= DOZEN
    for field in ("dtype", "inputs", "seed"):
        assert len({getattr(case, field) for case in cases}) > 1
    if "indices" in ABOUT[about]:
        assert len({case.indices for case in cases}) > 3


def test_the_shapes_that_a_port_is_called_with_are_few(tmp_path: Path) -> None:
    """The law of prefixes needs further lengths: one more for each geometry."""
    port = Paced("compiles")
    for name in ("A1_sliding_permutation", "sliding_rows_do_not_know_what_follows"):
        trials.passes(name, port, tmp_path, dtypes=("float32",))
    assert len(port.shapes) <= 2 * DOZEN
    fast = {geometry(case) for case in drawn(PROPERTIES["A1_sliding_lse"], Paced("fast"))}
    assert len(fast) > 2 * DOZEN


def test_the_geometries_stand_on_the_edges_that_clauses_are_about() -> None:
    port = Paced("compiles")
    for clause in ("W3_sliding", "F2_fine"):
        prop = PROPERTIES[f"{clause}_mask_as_exposed"]
        cases = drawn(prop, port)
        assert len(cases) >= prop.examples
        met = {edge for case in cases for edge in case_edges(prop, case)}
        assert met >= set(CLAUSE_EDGES[prop.clause])


def test_the_geometries_are_those_of_the_seed() -> None:
    port, again = Paced("compiles"), Paced("compiles")
    one, same, other = (
        [shared.case for shared in shared_geometries(each, "pool", "", seed)]
        for each, seed in ((port, 0), (again, 0), (port, 1))
    )
    assert one == same != other


@pytest.mark.parametrize("name", ["A1_fine_output", "F2_fine_mask_as_read", "A5_compress_canary"])
def test_a_slow_port_is_asked_few_small_cases(name: str) -> None:
    prop, slow = PROPERTIES[name], Paced("slow")
    cases = drawn(prop, slow)
    asked = asked_of(prop, slow, Options())
    assert (
        len(cases) == asked == max(SLOW_LEAST, -(-asked_of(prop, Paced("fast"), Options()) // 10))
    )
    every: list[Case] = []
    draw(prop, slow, Options(shrink=False), every.append)
    tokens = Counter(size_of(case)[0] for case in every)
    assert max(size_of(case)[0] for case in cases) <= sorted(tokens.elements())[len(every) // 2]
    met = {edge for case in cases for edge in case_edges(prop, case)}
    assert met >= set(CLAUSE_EDGES[prop.clause])


def test_what_a_slow_port_breaks_is_made_smaller(tmp_path: Path) -> None:
    class Wrong(Paced):
        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
            found = super().sliding(case, q, k, v)
            return Attention(found.out * 2, found.lse)

    slow, fast = (
        trials.finding("A1_sliding_output", Wrong(pace), tmp_path) for pace in ("slow", "fast")
    )
    assert slow["case"] == fast["case"]


def test_long_sequences_are_not_tried_on_a_slow_port(tmp_path: Path) -> None:
    record = trials.record("W1_sliding_mask_of_long_sequences", Paced("slow"), tmp_path)
    assert not record.asked and dict(record.not_tried) == {("slow pace",): 1}


@pytest.mark.parametrize("name", ["A1_fine_output", "W3_sliding_mask_as_read", "G1_layer_output"])
def test_on_a_slow_device_edges_come_first(name: str) -> None:
    """Four cases as they are drawn missed what W3 is about, and the smallest ones show little."""
    prop, port = PROPERTIES[name], Paced("fast")
    port.device = "interpreter"
    cases = drawn(prop, port)
    assert len(cases) == asked_of(prop, port, Options()) == -(-prop.examples // 10)
    met = {edge for case in cases for edge in case_edges(prop, case)}
    assert met >= set(CLAUSE_EDGES[prop.clause])
    assert len({geometry(case) for case in cases}) == len(cases)
    if prop.about == "layer":
        assert min(case.kv_len for case in cases) >= Interpreter.shortest
    _, in_turns = small_first(port, prop, Options())
    assert {*in_turns} == {*cases}


def test_on_a_slow_device_cases_that_cannot_show_it_come_last() -> None:
    port = Paced("fast")
    port.device, port.numerics = "interpreter", {"float32": "fp32", "bfloat16": "bf16"}
    cases = drawn(PROPERTIES["G1_layer_output_in_exact_numbers"], port)
    assert [case.dtype for case in cases] == ["bfloat16"] * 2


def test_what_is_broken_on_a_slow_device_is_made_smaller(tmp_path: Path) -> None:
    class Wrong(Paced):
        device = "interpreter"

        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
            found = super().sliding(case, q, k, v)
            return Attention(found.out * 2, found.lse)

    found = trials.finding("A1_sliding_output", Wrong("fast"), tmp_path)
    assert found["case"]["q_len"] == found["case"]["kv_len"] == Interpreter.shortest


def test_a_pace_is_one_of_three() -> None:
    with pytest.raises(ValueError, match=r"pace='brisk' must be one of fast, slow, compiles\."):
        conformance_suite(Paced("brisk"))
    sent = json.loads(json.dumps(Declared(Paced("slow")).to_json()))
    assert Declared.from_json(sent).pace == "slow"
