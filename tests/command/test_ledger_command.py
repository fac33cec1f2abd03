"""Known failures, from a finding to a green run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from commands import nsa_ref
from nsa_ref.attention import Attention
from nsa_ref.testing import Case, NotOffered, OracleImplementation
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, main
from nsa_ref.testing.ledger import FILE_NAME, wrong_entries
from nsa_ref.testing.narrowing import SAMPLED_IF_ENDED
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.report import clauses
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import Record

ENTRY = """
[[known]]
id = "long-windows"
clause = "A1"
why = "of the test"
where = { kv_len = "<= sliding_window_size" }
"""


class Doubles(OracleImplementation):
    """Values are twice too large where the window reaches beyond all keys, and for `also`."""

    mended = False
    also = staticmethod(lambda case: False)

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        wrong = case.kv_len <= case.sliding_window_size and not self.mended
        found = super().sliding(case, q, k, v)
        return found._replace(out=found.out * 2) if wrong or self.also(case) else found


def judged(port: Doubles, place: Path, entry: str = ENTRY) -> Record:
    (place / FILE_NAME).write_text(entry)
    options = Options(ledger=place / FILE_NAME, findings=place)
    return run_property(PROPERTIES["A1_sliding_output"], port, options)


def test_a_known_failure_is_counted_and_is_no_finding(tmp_path: Path) -> None:
    record = judged(Doubles(), tmp_path)
    assert record.finding is None and record.cases and record.known["long-windows"]
    assert record.inside["long-windows"] >= record.known["long-windows"]
    (clause,) = clauses([record], [])
    assert clause.verdict == "known" and clause.known == record.known.total()
    assert not wrong_entries([record])


def test_a_second_bug_is_found_beside_the_known_one_and_made_smaller_beside_it(
    tmp_path: Path,
) -> None:
    port = Doubles()
    port.also = lambda case: case.q_heads > 1  # type: ignore[assignment, misc]
    finding = judged(port, tmp_path).finding
    assert finding is not None
    case = Case.from_json(finding["case"])
    assert case.q_heads > 1 and case.kv_len > case.sliding_window_size


class OffersNoLongWindows(Doubles):
    """Nothing is decided of the cases that the entry covers."""

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        if case.kv_len <= case.sliding_window_size:
            raise NotOffered("long windows")
        return super().sliding(case, q, k, v)


def test_an_entry_of_whose_cases_none_was_decided_is_not_stale(tmp_path: Path) -> None:
    record = judged(OffersNoLongWindows(), tmp_path)
    assert record.inside["long-windows"] and not record.held and not record.known
    assert not wrong_entries([record])


def test_an_entry_whose_failure_was_mended_is_stale(tmp_path: Path) -> None:
    port = Doubles()
    port.mended = True
    ((name, *_),) = wrong_entries([judged(port, tmp_path)])
    assert name == "stale"


def test_a_known_failure_of_another_clause_is_a_finding(tmp_path: Path) -> None:
    assert judged(Doubles(), tmp_path, ENTRY.replace("A1", "A2")).finding is not None


def test_what_is_quarantined_is_never_launched(tmp_path: Path) -> None:
    class Deadly(Doubles):
        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
            assert case.kv_len > case.sliding_window_size
            return super().sliding(case, q, k, v)

    record = judged(Deadly(), tmp_path, ENTRY + 'status = "quarantined"\n')
    assert record.finding is None and record.cases and record.spared["long-windows"]


PORT = """
import os
from nsa_ref.testing import OracleImplementation

class Port(OracleImplementation):
    name = "port"
    semantics = OracleImplementation.semantics[:1]

    def offers(self, method):
        return method == "sliding_mask"

    def sliding_mask(self, case):
        if case.sliding_window_size == 1:
            os.abort()
        return super().sliding_mask(case)
"""


UNMET = """
[[known]]
id = "not-offered"
method = "sliding"
why = "of the test"

[[known]]
id = "somebody-else"
implementation = "another port"
method = "sliding_mask"
why = "of the test"

[[known]]
id = "left-out"
clause = "G3"
why = "of the test"
"""


def test_what_takes_its_process_down_goes_from_a_finding_to_a_green_run(place: Path) -> None:
    (place / "port.py").write_text(PORT)
    (place / FILE_NAME).write_text(UNMET)
    small = ("--dtype=float64", "--branch=sliding")
    run = ("verify", "port:Port", *small, "--json=report.json", "-n1")
    done = nsa_ref(*run)
    assert done.returncode == BROKEN
    wrong = json.loads((place / "report.json").read_text())["ledger"]["wrong"]
    assert [name for _, name, *_ in wrong] == ["not-offered", "somebody-else"]
    assert all(f"{name} covers no case" in done.stdout for _, name, *_ in wrong)
    (place / FILE_NAME).unlink()
    finding = next((place / "nsa-ref-findings").glob("W1-W1_sliding_mask_as_exposed-*-crash.json"))
    added = nsa_ref("ledger", "add", str(finding))
    assert added.returncode == HOLDS, added.stderr
    entry = (place / FILE_NAME).read_text()
    assert entry in added.stdout and 'status = "quarantined"' in entry
    counted = re.search(r"covers (\d+) die and (\d+) pass; (\d+) others pass", added.stdout)
    assert counted, added.stdout
    # a few are like another one, or decide nothing
    assert SAMPLED_IF_ENDED / 2 < sum(map(int, counted.groups())) <= SAMPLED_IF_ENDED
    assert 'method = "sliding_mask"' in entry and "sliding_window_size = 1" in entry
    done = nsa_ref(*run, "--strict")
    assert done.returncode == HOLDS, done.stdout + done.stderr
    report = json.loads((place / "report.json").read_text())
    assert report["ledger"]["failed"] == {} and report["ledger"]["spared"].keys() == {"W1-crash"}


def test_a_ledger_without_meaning_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "port.py").write_text(PORT)
    wrong = ENTRY.replace("A1", "W9")
    (place / "mine.toml").write_text(wrong)
    for name in ("mine.toml", "none.toml"):
        assert main(["verify", "port:Port", f"--ledger={name}"]) == COULD_NOT_RUN
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and name in said.err and not said.out
    (place / FILE_NAME).write_text(wrong)
    assert main(["verify", "port:Port"]) == COULD_NOT_RUN
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and FILE_NAME in said.err and "W9" in said.err
    assert not said.out, "it is found before anything is said of a run"
