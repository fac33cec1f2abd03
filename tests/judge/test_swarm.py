"""Rounds of fuzzing: what is drawn, within what, and how it grows."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, ClassVar

import pytest

from nsa_ref.semantics import FLA, PAPER, PRESETS
from nsa_ref.testing import Case, Implementation, OracleImplementation
from nsa_ref.testing.conditions import Condition
from nsa_ref.testing.drawing import generate
from nsa_ref.testing.limits import is_within
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import is_asked
from nsa_ref.testing.swarm import (
    LONGEST,
    MOST_CELLS,
    PRODUCTION,
    VALUES,
    Round,
    draw_round,
    every_property,
    longest_after,
)

ASKED = [prop for prop in PROPERTIES.values() if not prop.extent]
HOUR = 3600.0


def rounds(implementation: Implementation, count: int, seconds: float = 0.0) -> list[Round]:
    return [draw_round(number, 7, seconds, ASKED, implementation, 2) for number in range(count)]


def test_a_round_is_the_same_for_the_same_seed_and_crosses_processes() -> None:
    oracle = OracleImplementation()
    drawn = rounds(oracle, 20)
    assert drawn == rounds(oracle, 20)
    assert [Round.from_json(json.loads(json.dumps(r.to_json()))) for r in drawn] == drawn
    assert len({one.seed for one in drawn}) == len(drawn)
    assert drawn[0] != draw_round(0, 8, 0.0, ASKED, oracle, 2)


def test_rounds_differ_in_all_that_they_may_restrict() -> None:
    oracle = OracleImplementation()
    drawn = rounds(oracle, 200)
    assert {name for one in drawn for name in one.properties} == {prop.name for prop in ASKED}
    assert len({one.dtypes for one in drawn}) > 8 and len({one.semantics for one in drawn}) > 3
    fields = Counter(field for one in drawn for field in one.limits)
    assert set(fields) >= set(VALUES)
    assert all(20 < fields[name] < 150 for name in VALUES)
    production = {field: list(values) for field, values in PRODUCTION.items()}
    assert any({**one.limits, **production} == one.limits for one in drawn)


class Narrow(OracleImplementation):
    """Declares little, some of it awkward together."""

    semantics = (PAPER, FLA)
    limits: ClassVar[dict[str, Any]] = {
        "q_heads": (4, 16),
        "kv_heads": (1, 4),
        "selection_block_size": (6, 12),
        "compress_block_sliding_stride": (3, 6),
        "q_len": (5, 33),
        "kv_len": (33, 5, 40),
        "layout": ("strided",),
    }


class Ruled(OracleImplementation):
    """Declares rules, and more of one method."""

    limits: ClassVar[dict[str, Any]] = {"q_len": "== kv_len", "kv_len_mod_selection_block_size": 0}
    limits_of: ClassVar[dict[str, Any]] = {"fine": {"head_dim": (64,)}, "decode": {"batch": (1,)}}


@pytest.mark.parametrize("implementation", [OracleImplementation(), Narrow(), Ruled()])
def test_every_property_finds_cases_in_every_round(implementation: Implementation) -> None:
    """And they lie within what is declared, and within the round."""
    for one in rounds(implementation, 3, 2 * HOUR):
        narrow = one.of(implementation)
        assert set(narrow.semantics) <= set(implementation.semantics)
        assert set(narrow.numerics) <= set(implementation.numerics)
        for prop in ASKED[one.number :: 80]:
            drawn: list[Case] = []
            options = Options(seed=one.seed, shrink=False)
            if is_asked(prop, narrow, options):
                generate(prop, narrow, options, drawn.append)
                assert drawn, (one, prop.name)
            assert all(is_within(implementation, prop.called, case) for case in drawn)
            for field, values in implementation.limits.items():
                if isinstance(values, tuple):
                    assert {getattr(case, field) for case in drawn} <= set(values), field
                else:
                    assert all(Condition(field, values).holds(case) for case in drawn)


def test_lengths_grow_with_the_hours() -> None:
    assert [longest_after(h * HOUR) for h in (0, 0.1, 0.5, 2, 8)] == [40, 80, 160, 640, 2560]
    oracle = OracleImplementation()
    assert longest_after(1000 * HOUR) == LONGEST
    longest = [
        max(max(one.limits.get("kv_len", [0])) for one in rounds(oracle, 60, seconds))
        for seconds in (0.0, 8 * HOUR)
    ]
    assert longest[0] <= 300 < 1000 < longest[1]


def test_long_rounds_have_short_sequences_too() -> None:
    """Else a broken case could not become small."""
    for one in rounds(OracleImplementation(), 60, 8 * HOUR):
        assert min(one.limits.get("kv_len", [0])) <= 16


def test_long_sequences_are_read_by_few_rows() -> None:
    """Else their masks would not fit into the memory."""
    for one in rounds(OracleImplementation(), 60, 1000 * HOUR):
        rows, columns = (max(one.limits.get(name, [0])) for name in ("q_len", "kv_len"))
        assert rows * columns <= MOST_CELLS


def test_rounds_grow_and_properties_share_them() -> None:
    oracle = OracleImplementation()
    for seconds, lasts in ((0.0, 30.0), (60.0, 30.0), (200.0, 100.0), (HOUR, 240.0)):
        for workers in (1, 8):
            one = draw_round(3, 7, seconds, ASKED, oracle, workers)
            assert round(one.seconds * len(one.properties)) == lasts * workers


def test_the_first_round_asks_all() -> None:
    one = every_property(0, 7, ASKED, OracleImplementation(), 2)
    assert len(one.properties) == len(ASKED) and not one.limits
    whole = one.of(OracleImplementation())
    assert set(whole.semantics) == set(PRESETS.values()) | set(whole.semantics)
    assert whole.numerics == OracleImplementation.numerics
