"""Semantics: every switch is checked, every message names it, and JSON goes both ways."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from nsa_ref import Semantics
from nsa_ref.semantics import PAPER, PRESETS, PerBranch
from pages import table
from refusals import refusal_test


@pytest.mark.parametrize("name", PRESETS)
def test_json_goes_both_ways(name: str) -> None:
    assert Semantics.from_json(PRESETS[name].to_json()) == PRESETS[name]


@pytest.mark.parametrize(
    "switches",
    [
        {"input_norm": False},
        {"input_norm": "machine_eps"},
        {"forced_score": 1},
        {"forced_score": 1e-300},
        {"score_floor": 0},
        {"score_floor": 0.0},
        {"score_floor": 0.999},
        {"empty_row": PerBranch("uniform", "nan", "zero")},
        {"empty_lse": PerBranch(math.inf, 0.0, -math.inf)},
    ],
)
def test_what_a_switch_may_be_goes_both_ways_too(switches: dict[str, Any]) -> None:
    semantics = Semantics(**switches)
    found = semantics.to_json()
    assert list(found) == [field.name for field in dataclasses.fields(Semantics)]
    assert Semantics.from_json(json.loads(json.dumps(found, allow_nan=False))) == semantics


def test_infinities_are_texts_in_json() -> None:
    found = Semantics(empty_lse=PerBranch(math.inf, 0.0, -math.inf)).to_json()
    assert found["forced_score"] == "inf"
    assert found["empty_lse"] == {"compress": "inf", "fine": 0.0, "sliding": "-inf"}
    assert found["empty_row"] == {"compress": "zero", "fine": "zero", "sliding": "zero"}


def test_a_number_in_json_may_be_a_text() -> None:
    lse = {"compress": "-inf", "fine": "0", "sliding": "inf"}
    semantics = Semantics.from_json(PAPER.to_json() | {"forced_score": "1.5", "empty_lse": lse})
    assert semantics.forced_score == 1.5
    assert semantics.empty_lse == (-math.inf, 0.0, math.inf)


SWITCHES = sorted(field.name for field in dataclasses.fields(Semantics))
FORCED = (
    "must be a positive number: a forced block competes with scores that are sums of "
    "probabilities. Try math.inf or 1.0"
)
FLOOR = "must be None or lie in [0, 1): it is compared with a softmax. Try None or 1e-10"
PER_BRANCH = "must be a PerBranch(compress=, fine=, sliding=)"
EACH = "must have one value for each of compress, fine, sliding"
NUMBER = 'must be a number, "inf" or "-inf"'
BOOLEANS = [
    "causal",
    "window_closed",
    "compress_strict",
    "share_selection",
    "own_block_extra",
    "kv_per_branch",
    "output_projection",
]


def made(**switches: Any) -> Any:
    return lambda: Semantics(**switches)


def read(**switches: Any) -> Any:
    return lambda: Semantics.from_json(PAPER.to_json() | switches)


test_a_wrong_switch_is_named = refusal_test(
    {
        "compress_alignment='middle' must be one of 'start', 'end'": (
            made(compress_alignment="middle")
        ),
        "importance='mean' must be one of 'overlap', 'logit_mean'": made(importance="mean"),
        "duplicates='bag' must be one of 'set', 'multiset'": made(duplicates="bag"),
        "rotary='some' must be one of 'none', 'fine_and_sliding', 'all', 'before_pooling'": (
            made(rotary="some")
        ),
        "input_norm='rms' must be one of False, True, 'machine_eps'": made(input_norm="rms"),
        f"forced_score=0.0 {FORCED}": made(forced_score=0.0),
        f"forced_score=True {FORCED}": made(forced_score=True),
        f"forced_score='1' {FORCED}": made(forced_score="1"),
        f"forced_score=nan {FORCED}": made(forced_score=math.nan),
        f"score_floor=1.0 {FLOOR}": made(score_floor=1.0),
        f"score_floor=-0.1 {FLOOR}": made(score_floor=-0.1),
        f"score_floor='0' {FLOOR}": made(score_floor="0"),
    }
    | {
        f"empty_row.{branch}='one' must be one of 'zero', 'nan', 'uniform'": (
            made(empty_row=PAPER.empty_row._replace(**{branch: "one"}))
        )
        for branch in PerBranch._fields
    }
    | {
        f"empty_lse.{branch}=1.0 must be one of -inf, 0.0, inf": (
            made(empty_lse=PAPER.empty_lse._replace(**{branch: 1.0}))
        )
        for branch in PerBranch._fields
    },
    {f"{switch}=1 must be True or False, not int": made(**{switch: 1}) for switch in BOOLEANS}
    | {
        f"empty_row='nan' {PER_BRANCH}, not str": made(empty_row="nan"),
        f"empty_lse=0.0 {PER_BRANCH}, not float": made(empty_lse=0.0),
    },
    whole=True,
)

test_a_wrong_switch_in_json_is_named = refusal_test(
    {
        f"empty_row='nan' {EACH}": read(empty_row="nan"),
        f"empty_row={{'fine': 'nan'}} {EACH}": read(empty_row={"fine": "nan"}),
        f"empty_lse=0.0 {EACH}": read(empty_lse=0.0),
        f"forced_score='big' {NUMBER}": read(forced_score="big"),
        f"forced_score=True {NUMBER}": read(forced_score=True),
        f"empty_lse=None {NUMBER}": read(empty_lse={"compress": 0, "fine": None, "sliding": 0}),
        f"semantics has the switches {sorted([*SWITCHES, 'causality'])}; they must be {SWITCHES}": (
            read(causality=True)
        ),
        f"semantics has the switches ['causal']; they must be {SWITCHES}": (
            lambda: Semantics.from_json({"causal": True})
        ),
    },
    {},
    whole=True,
)


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
