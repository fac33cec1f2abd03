"""`nsa-ref fuzz`: what a night finds is found once, and kept, whatever dies."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import Phase, settings
from hypothesis.database import ExampleDatabase, InMemoryExampleDatabase
from rich.console import Console

from commands import HELPERS, running, until
from nsa_ref.testing import OracleImplementation, cli, fuzzing
from nsa_ref.testing.case import Case
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, main
from nsa_ref.testing.examples import FOLDER_NAME, examples_of, export
from nsa_ref.testing.findings import read_finding
from nsa_ref.testing.fuzz_causes import Cause
from nsa_ref.testing.fuzz_folder import Folder, State
from nsa_ref.testing.fuzzing import Fuzzing
from nsa_ref.testing.lattice import met_pairs
from nsa_ref.testing.ledger import read_ledger
from nsa_ref.testing.loading import CannotRun, Declared
from nsa_ref.testing.narrowing import Sample
from nsa_ref.testing.options import Options
from nsa_ref.testing.profiles import fuzz_settings
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from nsa_ref.testing.sharing import open_database
from nsa_ref.testing.swarm import Round
from port_zoo import Faint
from redis_server import free_port, redis_server, url_of


@pytest.fixture(autouse=True)
def _a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # a port with a place of its own: what is exported stands beside it
    Path("faint_port.py").write_text("from port_zoo import Faint\n\n\nclass Port(Faint): ...\n")
    monkeypatch.delitem(sys.modules, "faint_port", raising=False)
    for place in (str(HELPERS), str(tmp_path)):
        monkeypatch.syspath_prepend(place)
    places = [str(HELPERS), str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))


FUZZ = ("fuzz", "faint_port:Port", "-n", "1", "--branch", "fine", "--seed", "5")


def state() -> State:
    return State.from_json(json.loads(Path("nsa-ref-fuzz/state.json").read_text()))


def test_what_is_right_is_not_accused() -> None:
    assert main(["fuzz", "oracle", "-n", "1", "--branch", "sliding", "--time", "4s"]) == HOLDS
    assert not state().causes and state().cases and state().pairs


def test_fresh_cases_are_drawn_and_the_database_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CI=true as well, where Hypothesis would repeat the same cases for ever."""
    profile = settings.get_current_profile_name()
    settings.load_profile("ci")
    try:
        chosen = fuzz_settings(open_database("kept"))
        assert not chosen.derandomize and Phase.target in chosen.phases
        aimed: list[float] = []
        monkeypatch.setattr(hypothesis, "target", lambda budget, label: aimed.append(budget))
        prop, options = PROPERTIES["A1_sliding_output"], Options(examples="kept", seconds=0.5)
        records = [
            run_property(prop, OracleImplementation(), dataclasses.replace(options, seed=seed))
            for seed in (1, 2)
        ]
    finally:
        settings.load_profile(profile)
    assert all(record.cases and met_pairs([record]) for record in records)
    assert records[0].edges != records[1].edges
    assert len(aimed) == sum(record.cases for record in records)
    assert max(aimed) == max(record.budget_used or 0.0 for record in records) > 0


def test_what_hypothesis_kept_of_one_round_is_tried_in_the_next() -> None:
    options = Options(examples="kept", seconds=5.0, findings=Path("found"))
    prop = PROPERTIES["I6_fine_mask_as_exposed"]
    assert run_property(prop, Faint(), dataclasses.replace(options, seed=1)).finding
    assert list(Path("kept").glob("*/*"))
    record = run_property(prop, Faint(), dataclasses.replace(options, seed=2))
    assert record.finding and record.cases < 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--time", "soon"], "--time: 'soon' must be a time such as 90s, 5m or 2h"),
        (["--database", "redis://host:port"], "--database redis://host:port: "),
        (["--database", "redis://host/x"], "'x' must be the number of a database"),
        (["--database", "http://host"], "http:// is neither a folder nor a Redis server"),
        (["--findings", "/dev/null/x"], "cannot fuzz in the folder /dev/null/x: "),
        (["--export"], "knows of nothing that is broken"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: faint on cpu declares float64"),
        (["--ledger", "none.toml"], "none.toml: [Errno 2] No such file or directory"),
        (["--level", "quick"], "unrecognized arguments: --level"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_line(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"device": "cpu", "ledgers": [], "implementations": [Declared(Faint()).to_json()]}
    monkeypatch.setattr(cli, "try_loading", lambda *_: found)
    if "--database" in arguments:
        pytest.importorskip("redis", reason="redis is not installed")
    assert main([*FUZZ, *arguments]) == COULD_NOT_RUN
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_folder_is_about_one_implementation_and_one_seed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "kept")
    with folder.taken():
        folder.save(folder.state("one:Port", 3))
        assert folder.state("one:Port", None).seed == 3
        with pytest.raises(CannotRun, match="is about one:Port, not other:Port"):
            folder.state("other:Port", None)
        with pytest.raises(CannotRun, match="goes on with seed 3: leave --seed 4 away"):
            folder.state("one:Port", 4)
        with (
            pytest.raises(CannotRun, match="another nsa-ref fuzz is at work there"),
            folder.taken(),
        ):
            pass
        (tmp_path / "kept" / "state.json").write_text("{}")
        with pytest.raises(CannotRun, match=r"state.json cannot be read: its schema"):
            folder.state("one:Port", None)


class Far(ExampleDatabase):
    """A shared database that does not answer while it is down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.down, self.why = InMemoryExampleDatabase(), True, ""

    def save(self, key: bytes, value: bytes) -> None:
        self.why = "nobody there" if self.down else ""
        if not self.down:
            self.inner.save(key, value)

    def fetch(self, key: bytes) -> Iterator[bytes]:
        self.why = "nobody there" if self.down else ""
        return iter([] if self.down else list(self.inner.fetch(key)))

    def delete(self, key: bytes, value: bytes) -> None:
        raise AssertionError("nothing is taken away")


def fuzzing_in(folder: Folder, said: io.StringIO, *arguments: str) -> Fuzzing:
    """A run that goes on in this folder, and has not begun."""
    parsed = cli._parser().parse_args(["fuzz", "faint_port:Port", "-n", "1", *arguments])
    declared = {"device": "cpu", "ledgers": [], "implementations": []}
    return Fuzzing(parsed, Console(file=said, width=500), folder, declared)


def test_what_is_not_sorted_when_the_time_is_up_is_left_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something is broken all the same, and no session begins when the time is up."""
    folder, said = Folder(tmp_path / "folder"), io.StringIO()
    prop, round = PROPERTIES["I6_fine_mask_as_exposed"], Round(4, 1, "faint", ("I6_selection",))
    options = Options(findings=folder.found, shrink=False)
    with folder.taken():
        fuzz = fuzzing_in(folder, said)

        def found_at_the_end() -> None:
            folder.begin(round)
            assert run_property(prop, Faint(), options).finding
            fuzz._until = time.monotonic()
            fuzz._take_in(round, *folder.left())

        def no_session(*_: Any, **__: Any) -> None:
            raise AssertionError("the time is up")

        monkeypatch.setattr(fuzz, "_round", found_at_the_end)
        monkeypatch.setattr(fuzzing, "run_session", no_session)
        assert fuzz.go_on(600.0)
        assert "the time is up; the next run sorts what 1 property found" in said.getvalue()

        later, taken = fuzzing_in(folder, said), []
        monkeypatch.setattr(later, "_take_in", lambda cut, found, _: taken.append((cut, found)))
        later.go_on(1e-9)
        ((cut, (finding,)),) = taken
        assert cut == round and finding["property"] == prop.name
        assert later._until < math.inf


@pytest.mark.parametrize("ended", [{}, {"ended": "hang"}, {"ended": "crash"}], ids=str)
def test_a_run_does_not_end_well_with_what_it_did_not_sort(
    ended: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is: it is said, and the exit code is 1."""
    folder, said = Folder(tmp_path / "folder"), io.StringIO()
    options = Options(findings=folder.found, shrink=False)
    with folder.taken():
        fuzz = fuzzing_in(folder, said)
        fuzz.state.cases = 1

        def round_that_ends_the_time() -> None:
            folder.begin(Round(0, 1, "faint", ("I6_fine_mask_as_exposed",)))
            found = run_property(PROPERTIES["I6_fine_mask_as_exposed"], Faint(), options).finding
            assert found is not None
            Path(found["file"]).write_text(json.dumps(found | ended))
            raise fuzzing.TimeIsUp

        monkeypatch.setattr(fuzz, "_round", round_that_ends_the_time)
        assert fuzz.go_on(600.0) is True
        with pytest.raises(
            CannotRun, match=r"nothing that is broken; findings .* yet: 1\. nsa-ref"
        ):
            fuzz.export()
    assert re.search(r"^unsorted: I6, I6_fine_mask_as_exposed: ", said.getvalue(), re.M)


def test_what_was_sorted_before_the_time_was_up_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run has the others left, and no more."""
    folder, said = Folder(tmp_path / "folder"), io.StringIO()
    options = Options(findings=folder.found, shrink=False)
    monkeypatch.setattr(fuzzing, "answers_to", lambda asked, run: {})
    round, names = Round(0, 1, "faint", ()), ["F3_fine_mask_as_exposed", "I6_fine_mask_as_exposed"]
    with folder.taken():
        folder.begin(round)
        for name in names:
            assert run_property(PROPERTIES[name], Faint(), options).finding

        def sorting(*, until: float) -> tuple[Fuzzing, list[str]]:
            """A run, and the properties of the findings that it sampled, as far as it came."""
            fuzz, sampled = fuzzing_in(folder, said), list[str]()
            fuzz._write_ledger()

            def sample(finding: Any, drawn: Any) -> tuple[Sample, list[str]]:
                if len(sampled) >= until:
                    raise fuzzing.TimeIsUp
                sampled.append(finding["property"])
                return Sample([read_finding(Path(finding["file"]))[0]], []), []

            monkeypatch.setattr(fuzz, "_sample", sample)
            # as where nothing could be made smaller
            monkeypatch.setattr(fuzz, "_smaller", lambda kept: kept)
            return fuzz, sampled

        first, sampled = sorting(until=1)
        with pytest.raises(fuzzing.TimeIsUp):
            first._take_in(round, *folder.left())
        left = [found["property"] for found in folder.left()[0]]
        assert sorted([*sampled, *left]) == names
        second, sampled = sorting(until=math.inf)
        second._take_in(round, *folder.left())
        assert sampled == left and folder.left() == ([], [])
        assert [cause.times for cause in sorting(until=0)[0].causes] == [1, 1]


def test_a_case_that_leads_to_another_cause_too_says_nothing_of_a_new_one(tmp_path: Path) -> None:
    """One case of the other mistake would make the entry so wide that it hides a third one."""
    folder = Folder(tmp_path / "folder")
    name, options = "F1_fine_mask_as_exposed", Options(findings=folder.found, shrink=False)
    short = Case(selection_block_size=2, num_selected_blocks=2, indices="none")
    many = Case(kv_len=131, num_selected_blocks=14, seed=1)
    with folder.taken():
        fuzz = fuzzing_in(folder, io.StringIO(), "--seed", "2")
        found = []
        for case in (short, many):
            finding = run_property(PROPERTIES[name], Faint(), options).finding
            assert finding is not None
            path = tmp_path / f"{case.kv_len}.json"
            found.append(finding | {"case": case.to_json(), "file": str(path)})
            path.write_text(json.dumps(found[-1]))
        fuzz.causes.append(Cause(found[0], "id", Sample([short], [])))
        fuzz._write_ledger()
        sample, _ = fuzz._sample(found[1], None)
    assert len(sample.broken) > 1 and sample.passed
    assert all(case.num_selection_blocks > 128 for case in sample.broken)


def test_a_lost_connection_is_said_and_loses_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, said = Far(), io.StringIO()
    monkeypatch.setattr(fuzzing, "shared_database", lambda url: database)
    prop, options = PROPERTIES["I6_fine_mask_as_exposed"], Options(findings=tmp_path / "kept")
    finding = run_property(prop, Faint(), options).finding
    assert finding is not None
    far = "--database", "redis://far"
    one, other = (fuzzing_in(Folder(tmp_path / name), said, *far) for name in ("one", "other"))
    one.causes.append(Cause(finding, "id", Sample([], [])))
    for down, line in (
        (True, "the shared database does not answer (nobody there); what is found is kept in"),
        (True, ""),
        (False, "the shared database answers again, and has all that is known here"),
        (False, ""),
    ):
        database.down = down
        one._exchange()
        assert said.getvalue().startswith(line) and bool(said.getvalue()) == bool(line)
        said.truncate(said.seek(0))

    # the other machine tries what this one found, and this one does not
    tried: list[Path] = []
    for fuzz in (one, other):
        fuzz.declared = [Declared(Faint())]
        monkeypatch.setattr(fuzz, "_take_in", lambda drawn, found, files: tried.extend(files))
        fuzz._exchange()
        assert bool(tried) is (fuzz is other)
    case, read = read_finding(tried[0])
    assert case == Case.from_json(finding["case"]) and read["property"] == prop.name
    other._exchange()
    assert len(tried) == 1


def test_a_server_that_is_killed_and_comes_back_has_all_that_was_found(tmp_path: Path) -> None:
    """A real one: the run says so both times, and another machine tries what it found meanwhile."""
    prop, options = PROPERTIES["I6_fine_mask_as_exposed"], Options(findings=tmp_path / "kept")
    finding = run_property(prop, Faint(), options).finding
    assert finding is not None
    port, said = free_port(), io.StringIO()
    far = "--database", url_of(port)
    with redis_server(tmp_path, port) as server:
        one, other = (fuzzing_in(Folder(tmp_path / name), said, *far) for name in ("one", "other"))
        one._exchange()
        assert not said.getvalue()
        server.kill()
        server.wait()
        one.causes.append(Cause(finding, "id", Sample([], [])))
        one._exchange()
        assert "the shared database does not answer" in said.getvalue()
    with redis_server(tmp_path, port):
        one._exchange()
        assert "answers again, and has all that is known here" in said.getvalue()
        tried: list[Path] = []
        other.declared = [Declared(Faint())]
        other._take_in = lambda drawn, found, files: tried.extend(files)  # type: ignore[assignment]
        other._exchange()
    assert [read_finding(path)[0] for path in tried] == [Case.from_json(finding["case"])]


def children(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_nothing_is_lost_when_a_worker_and_the_run_are_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two faint bugs are two findings, which the next run says, and every later one tries first.

    One needs more than 128 blocks, the other two empty slots beside a short last block.
    """
    with running(*FUZZ, "--time", "5m") as process:
        # a case that somebody killed is no finding
        until(lambda: list(Path("nsa-ref-fuzz/round/running").glob("*/gw*.json")))
        killed = children(process)
        os.kill(killed[0], signal.SIGKILL)
        until(lambda: set(children(process)) - set(killed))
        until(lambda: {"F3", "I6"} <= {p.name[:2] for p in Path("nsa-ref-fuzz/round").iterdir()})
        workers = children(process)
        process.kill()
        process.wait()
        until(lambda: not any(map(is_alive, workers)), 15.0)
    assert Path("nsa-ref-fuzz/round.json").exists()

    assert main([*FUZZ, "--time", "1s"]) == BROKEN
    said = capsys.readouterr().out
    assert "round 1 was cut off: what it left is taken up\n" in said
    lines, first = said.splitlines(), state()
    assert len([line for line in lines if line.startswith("found: ")]) == 2 == len(first.causes)
    assert len([line for line in lines if line.startswith("known")]) == 2
    figures = r"^\d:\d\d:\d\d, round \d: [\d,]+ cases, \d+ a second, \d clauses, .*2 findings"
    assert re.search(figures, said, re.M)

    cases = [read_finding(Path("nsa-ref-fuzz", file))[0] for file in first.causes]
    assert sum(case.num_selection_blocks > 128 for case in cases) == 1
    assert sum(case.kv_len % case.selection_block_size != 0 for case in cases) == 1
    for file, case in zip(first.causes, cases):
        names: dict[str, object] = {}
        pasted = Path("nsa-ref-fuzz", file).with_suffix(".py").read_text()
        exec(pasted.replace("@example(", "found = dict("), names)
        assert names["found"] == {"case": case}
    entries = read_ledger(Path("nsa-ref-fuzz/known.toml"))
    assert len(entries) == 2 and all(any(e.covers(case) for e in entries) for case in cases)

    # it goes on from there, and says what it knows
    with running(*FUZZ[:-2], "--time", "5m") as process:
        until(lambda: list(Path("nsa-ref-fuzz/round/running").glob("*/gw*.json")))
        # a job that is cancelled says what there is
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == BROKEN and "Traceback" not in said
    assert f"goes on with faint_port:Port on cpu after {first.rounds} rounds" in said
    assert len(re.findall("^known", said, re.M)) == 4 and state().causes == first.causes

    # and what was found is tried first by every later run
    assert main([*FUZZ[:-2], "--export"]) == HOLDS
    kept = sorted(Path(FOLDER_NAME).glob("*.json"))
    # what is there already stays as it is
    again = export([Path("nsa-ref-fuzz", file) for file in first.causes], Path("x.toml"))
    assert sorted(again) == kept == sorted(Path(FOLDER_NAME).glob("*.json")) and len(kept) == 2
    port = importlib.import_module("faint_port").Port()
    asked = [PROPERTIES[str(read_finding(path)[1]["property"])] for path in kept]
    found = [case for prop in asked for case in examples_of(port, prop)]
    assert {repr(case) for case in found} == {repr(case) for case in cases}
    record = run_property(asked[0], port, Options(shrink=False))
    assert record.finding is not None and Case.from_json(record.finding["case"]) in found
    kept[0].write_text("[]")
    with pytest.raises(ValueError, match=r"holds no case: .*Remove it, or export again"):
        examples_of(port, asked[0])
