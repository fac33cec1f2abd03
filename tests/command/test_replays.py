"""A folder of kept cases is a regression suite: each is judged, and nothing is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import nsa_ref
from nsa_ref.testing import Case
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, main

AS_EXPOSED = "W1_sliding_mask_as_exposed"


def keep(folder: Path, name: str, spec: str, **more: Any) -> None:
    """A case as a finding of W1 is kept."""
    case = Case(q_len=3, kv_len=3, head_dim=8, value_dim=8, sliding_window_size=1)
    data = {"case": case.to_json(), "property": AS_EXPOSED, "device": "cpu", "spec": spec}
    (folder / f"{name}.json").write_text(json.dumps(data | more))


@pytest.fixture
def folder(place: Path) -> Path:
    (place / "kept").mkdir()
    return place / "kept"


def table(out: str) -> dict[str, str]:
    """Case -> verdict, as the table has them."""
    lines = [line.split(maxsplit=1) for line in out.splitlines() if ".json  " in line]
    return {name: verdict.strip() for name, verdict in lines}


def test_every_case_of_a_folder_is_judged(folder: Path) -> None:
    keep(folder, "wrong", "port_zoo:OneKeyFewer", implementation="window [w]")
    keep(folder, "right", "port_zoo:SlidingMask")
    keep(folder, "crashes", "port_zoo:Segfaults")
    keep(folder, "absent", "no_such_port:Port")
    keep(folder, "not-offered", "port_zoo:SlidingMask", property="A1_sliding_output")
    (folder / "by-hand.json").write_text("{}")
    (folder / "torn.json").write_text('{"case": \x1b[2J')
    (folder / "notes.txt").write_text("no case, and not asked to be one")

    done = nsa_ref("replay", "kept", columns=100)
    assert done.returncode == BROKEN and done.stderr == "", done
    assert table(done.stdout) == {
        "absent.json": "not judged",
        "by-hand.json": "not judged",
        "crashes.json": "fail",
        "not-offered.json": "not judged",
        "right.json": "pass",
        "torn.json": "not judged",
        "wrong.json": "fail",
    }
    lines = done.stdout.splitlines()
    for words in (
        "wrong.json: W1: sliding_mask as exposed: batch 0, query head 0, row t=",
        "crashes.json: W1: the implementation failed: it ended its process",
        "absent.json: there is no module 'no_such_port'",
        "not-offered.json: not offered: sliding",
        "kept/by-hand.json does not say what it was found in.",
        "kept/torn.json holds no case: ",
    ):
        assert sum(line.startswith(words) for line in lines) == 1, (words, done.stdout)
    assert "7 cases: 4 not judged, 2 fail, 1 pass; " in lines[-1]
    assert "\x1b" not in done.stdout


def test_a_folder_passes_if_all_of_it_does(folder: Path) -> None:
    """Of the implementation that is named, whatever the cases were found in."""
    keep(folder, "one", "port_zoo:OneKeyFewer", implementation="window [w]")
    (folder / "by-hand.json").write_text(json.dumps({"q_len": 3, "kv_len": 3}))
    done = nsa_ref("replay", "kept", "port_zoo:SlidingMask")
    assert done.returncode == HOLDS, done
    assert table(done.stdout) == {"by-hand.json": "pass", "one.json": "pass"}


def test_a_folder_of_which_nothing_can_be_judged_is_no_pass(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "torn.json").write_text("")
    assert main(["replay", "kept", "port_zoo:SlidingMask"]) == COULD_NOT_RUN
    assert "kept/torn.json holds no case: " in capsys.readouterr().out
