"""Semantics: every switch is checked, every message names it, and JSON goes both ways."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nsa_ref import Semantics
from nsa_ref.semantics import PAPER, PRESETS, PerBranch
from pages import table


@pytest.mark.parametrize("name", PRESETS)
def test_json_goes_both_ways(name: str) -> None:
    assert Semantics.from_json(PRESETS[name].to_json()) == PRESETS[name]


@pytest.mark.parametrize(
    ("switches", "error", "words"),
    [
        ({"causal": 1}, TypeError, "causal=1 must be True or False, not int"),
        ({"compress_alignment": "middle"}, ValueError, "'middle' must be one of 'start', 'end'"),
        ({"importance": "mean"}, ValueError, "'mean' must be one of 'overlap', 'logit_mean'"),
        ({"duplicates": "bag"}, ValueError, "'bag' must be one of 'set', 'multiset'"),
        ({"rotary": "some"}, ValueError, "'some' must be one of 'none'"),
        ({"forced_score": 0.0}, ValueError, "forced_score=0.0 must be a positive number"),
        ({"forced_score": True}, ValueError, "forced_score=True must be a positive number"),
        ({"score_floor": 1.0}, ValueError, r"score_floor=1.0 must be None or lie in \[0, 1\)"),
        ({"empty_row": "nan"}, TypeError, r"empty_row='nan' must be a PerBranch"),
        (
            {"empty_row": PerBranch("zero", "one", "zero")},
            ValueError,
            "empty_row.fine='one' must be one of 'zero', 'nan', 'uniform'",
        ),
    ],
)
def test_a_wrong_switch_is_named(
    switches: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Semantics(**switches)


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"empty_row": "nan"}, "empty_row='nan' must have one value for each of compress, fine"),
        ({"empty_row": {"fine": "nan"}}, "empty_row=.*must have one value for each"),
        ({"forced_score": "big"}, "forced_score='big' must be a number"),
        ({"empty_lse": {"compress": 0, "fine": None, "sliding": 0}}, "empty_lse=None must be"),
        ({"causality": True}, "semantics has the switches"),
    ],
)
def test_a_wrong_switch_in_json_is_named(switches: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Semantics.from_json(PAPER.to_json() | switches)


def test_the_table_of_presets_is_the_code() -> None:
    """docs/presets.md, one row for each switch, one column for each preset."""

    def shown(value: object) -> str:
        if not isinstance(value, PerBranch):
            return str(value)
        if len(set(value)) == 1:
            return str(value[0])
        return ", ".join(f"{branch} {one}" for branch, one in value._asdict().items())

    found = {row[0]: row[2:] for row in table("docs/presets.md", "switch")[1:]}
    assert found == {
        field.name: [shown(getattr(preset, field.name)) for preset in PRESETS.values()]
        for field in dataclasses.fields(Semantics)
    }
