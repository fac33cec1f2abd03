"""A run that has little time: who comes first, what was not reached, when it ends."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import trials
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.cli import COULD_NOT_RUN, UNDECIDED, main
from nsa_ref.testing.drawing import AGAIN, TURNS, generate, small_first, turn_of
from nsa_ref.testing.findings import size_of
from nsa_ref.testing.lattice import CLAUSE_EDGES, case_edges
from nsa_ref.testing.options import Options, parse_duration
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import is_asked, run_property
from nsa_ref.testing.sessions import Collector
from nsa_ref.testing.suites import suite_in_turns
from nsa_ref.testing.verdicts import Record
from port_zoo import Sleeps


class Sliding(Sleeps):
    """Awake."""

    name = "sliding"

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        return OracleImplementation.run(self, method, case, *arguments)


class OneKeyFewer(Sliding):
    """Wrong wherever a window has more than the row's own key."""

    name = "one key fewer"

    def sliding_mask(self, case: Case) -> Any:
        mask = super().sliding_mask(case)
        mask[..., 0] = 0 if case.kv_len > 2 else mask[..., 0]
        return mask


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("2h", 7200), ("0.5m", 30)]
)
def test_a_time_has_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "name", ["W1_sliding_mask_as_read", "A1_fine_output", "F2_fine_mask_as_exposed", "G3_decode"]
)
def test_the_turns_of_a_property_have_the_cases_of_a_run_without_an_end(name: str) -> None:
    prop, port = PROPERTIES[name], OracleImplementation()
    drawn: list[Case] = []
    generate(prop, port, Options(shrink=False), drawn.append)
    refused, ordered = small_first(port, prop, Options())
    assert not refused
    assert Counter(ordered) == Counter(dict.fromkeys(drawn, 1))
    assert [case for turn in range(TURNS) for case in turn_of(ordered, turn)] == ordered
    edges = CLAUSE_EDGES[prop.clause]
    met = {edge for case in ordered[: len(edges)] for edge in case_edges(prop, case)}
    assert met >= set(edges)
    # one without keys says little, too
    behind = [case for case in ordered[len(edges) :] if case.batch * case.q_len * case.kv_len]
    assert [*map(size_of, behind)] == sorted(map(size_of, behind))


def test_every_clause_has_a_case_before_any_has_two() -> None:
    """A property that is not tried takes no place before those that are."""
    names = list(suite_in_turns(OracleImplementation()))
    tried = [p for p in PROPERTIES.values() if is_asked(p, OracleImplementation(), Options())]
    first = {prop.clause: prop.name for prop in reversed(tried)}
    assert {*names[: len(first)]} == {f"test_{name}_oracle_turn_0" for name in first.values()}
    turns = [int(name.rpartition("_")[2]) for name in names]
    assert turns == sorted(turns)


def test_what_is_left_by_one_turn_is_judged_in_a_later_one(tmp_path: Path) -> None:
    name = "W1_sliding_mask_as_exposed"

    def turn(number: int, **options: Any) -> Record:
        return trials.record(name, Sliding(), tmp_path, turn=number, **options)

    total = Record(name=name, clause="W1")
    for number in range(AGAIN):
        record = turn(number, share=0.0, deadline=time.time() + 3600)
        assert record.cases + record.inconclusive.total() <= 1  # the first may take more
        total.add(record)
    assert total.unreached > 20
    total.add(turn(AGAIN))
    assert total.unreached == 0
    assert total.cases + total.inconclusive.total() >= 30


def test_nothing_is_drawn_once_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*given: object) -> None:
        raise AssertionError("cases were drawn")

    monkeypatch.setattr("nsa_ref.testing.running.small_first", drawn)
    records = [
        trials.record("A1_fine_output", OracleImplementation(), tmp_path, turn=turn, deadline=1.0)
        for turn in range(TURNS)
    ]
    assert records[0].asked == records[0].unreached > 20
    assert not any(record.asked or record.unreached for record in records[1:])


def test_a_case_that_is_broken_in_a_turn_is_made_smaller(tmp_path: Path) -> None:
    prop = PROPERTIES["W1_sliding_mask_as_exposed"]
    port = OneKeyFewer()
    by_turns = [
        run_property(prop, port, Options(findings=tmp_path, turn=turn)).finding
        for turn in range(TURNS)
    ]
    found = [finding for finding in by_turns if finding is not None]
    assert len(found) == 1  # the later turns know of it
    at_once = run_property(prop, port, Options(findings=tmp_path)).finding
    assert at_once is not None
    smallest, wanted = (Case.from_json(f["case"]) for f in (found[0], at_once))
    assert size_of(smallest) == size_of(wanted)


def test_a_run_ends_when_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without an end would take minutes."""
    monkeypatch.chdir(tmp_path)
    asked = ["verify", "port_zoo:Sleeps", "--branch=sliding", "-n2", "--json=report.json"]
    budget, started = 9, time.monotonic()
    code = main([*asked, f"--time={budget}s"])
    took = time.monotonic() - started
    # the implementation was loaded before that, the last cases end, and so do the workers
    assert took < budget + 30, took
    shown, errors = capsys.readouterr()
    if code == COULD_NOT_RUN:  # a busy machine has hardly started its workers by then
        assert "the time was up before any case of sleeps was judged: more --time" in errors
        return
    assert code == UNDECIDED
    report = json.loads(Path("report.json").read_text())
    rows = {row["id"]: row for row in report["clauses"]}
    for name, row in rows.items():
        assert row["verdict"] in ("thin", "inconclusive") or name == "W2"
        if row["unreached"]:
            assert f"{name} ({row['unreached']} of {row['asked']} cases)" in shown
    assert report["time"] == budget
    assert any(row["cases"] for row in rows.values())


def test_a_turn_that_came_to_no_end_leaves_its_property_undecided() -> None:
    collector = Collector(Console(quiet=True), None)
    for turn in range(TURNS):
        for name in ("A1_sliding_output", "A1_sliding_lse"):
            if (turn, name) != (1, "A1_sliding_lse"):
                collector.records.append(Record(name=name, clause="A1", cases=2, asked=3))
    collector.join_turns()
    output, lse = collector.records
    assert (output.cases, output.asked, output.lost) == (2 * TURNS, 3 * TURNS, "")
    assert lse.lost
    assert math.isinf(Options().seconds_left)
