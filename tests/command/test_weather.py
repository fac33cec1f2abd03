"""Full disks, closed pipes, endless files: nothing found is lost, and an accident is no verdict."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import hypothesis
import hypothesis.strategies
import pytest
from rich.console import Console
from xdist.workermanage import NodeManager

import nsa_ref.__main__ as entry
from commands import nsa_ref, python, running, until
from nsa_ref.testing import Case, cli, files, last_words, sessions, silence
from nsa_ref.testing import workers as workers_plugin
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, Output, main
from nsa_ref.testing.findings import described, save_finding
from nsa_ref.testing.last_words import (
    _held,
    announced,
    finding_of_dead_worker,
    folder_of_run,
    hold_folder_of_run,
    left_running,
    remove_folder_of_run,
)
from nsa_ref.testing.lattice import EDGES
from nsa_ref.testing.narrowing import DIED
from nsa_ref.testing.options import Options
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.replays import replayed
from nsa_ref.testing.running import run_property
from nsa_ref.testing.sessions import Collector
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import few, in_one_line, message
from port_zoo import OneKeyFewer, Raises, SlidingMask

NO_ROOM = "No space left on device"
VERIFY = ["verify", "port_zoo:SlidingMask", "--device=cpu"]


def could_not_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `nsa-ref ARGUMENTS` says before it gives up."""
    assert main(list(arguments)) == COULD_NOT_RUN
    line = capsys.readouterr().err
    assert line.startswith("nsa-ref: ") and line.count("\n") == 1 and line.endswith("\n"), line
    return line


# --- what is no file ------------------------------------------------------------------------------

LONG = "f" * 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "pipe"], "pipe holds no case: it is a pipe or a device"),
        (["show", "/dev/zero"], "a pipe or a device"),
        (["replay", "pipe", "oracle"], "a pipe or a device"),
        (["diff", "pipe", "pipe"], "a pipe or a device"),
        (["check", "folder", "folder"], "a pipe or a device"),
        (["verify", "oracle", "--device=cpu", "--ledger=pipe"], "a pipe or a device"),
        (["verify", "oracle", "--json=pipe"], "cannot write pipe: No such device"),
        (["verify", "oracle", f"--json={LONG}"], "File name too long"),
        (["verify", "oracle", f"--findings={LONG}"], "File name too long. Try --findings"),
        (["show", LONG], "File name too long"),
        (["show", "brackets"], "recursion"),
        (["show", "endless"], "longer than 0 MiB"),
        (["show", "no case"], "case=null must be an object"),
        (["show", "listed"], "case=[1] must be an object"),
        (["show", "dtype"], "dtype=[1] must be one of"),
        (["show", "long"], "too large to be drawn"),
        (["show", "wide"], "too large to be drawn"),
        (["replay", "patient"], "timeout=1e+300 must be a number of seconds from 0.1 to 3600000"),
        (["replay", "nul"], "has a letter that no name has"),
        (["verify", "oracle", "--case-timeout=1e300"], "from 0.1 to 3600000"),
        (["verify", "oracle", "--case-timeout=inf"], "from 0.1 to 3600000"),
        (["verify", "oracle", f"--time={'9' * 400}h"], "at most 1000h"),
        (["verify", "oracle", "--seed=²"], "at least 0"),
        (["verify", "oracle", f"--seed={'9' * 5000}"], "at least 0"),
        (["verify", "oracle", "-n", "9" * 5000], "from 1 to 9999"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(
    arguments: list[str],
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And waited for by nobody."""
    os.mkfifo("pipe")
    Path("folder").mkdir()
    os.mkfifo("folder/manifest.json")
    kept = {"case": {}, "spec": "oracle"}
    for name, data in {
        "no case": {"case": None},
        "listed": {"case": [1]},
        "dtype": {"dtype": [1]},
        "long": {"kv_len": 10**9},
        "wide": {"num_selected_blocks": 10**9},
        "patient": kept | {"timeout": 1e300},
        "nul": kept | {"spec": "or\0acle:x"},
        "endless": {},
    }.items():
        Path(name).write_text(json.dumps(data))
    Path("brackets").write_text("[" * 100_000)
    if "endless" in arguments:
        monkeypatch.setattr(files, "MOST_BYTES", 1)
    assert words in could_not_run(capsys, *arguments)


def test_a_folder_of_pipes_is_not_waited_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("kept").mkdir()
    os.mkfifo("kept/pipe.json")
    assert main(["replay", "kept", "oracle"]) == COULD_NOT_RUN
    assert "it is a pipe or a device" in capsys.readouterr().out


# --- what cannot be printed or written ------------------------------------------------------------


def well(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let a run judge nothing and find that all is well, but for what is changed."""
    edges = Counter(list(EDGES))

    def run(console: Console, *_: Any, total: int, **__: Any) -> Collector:
        collector = Collector(console, total)
        told: dict[str, Any] = {"implementation": "mask", "cases": 3, "asked": 3, "edges": edges}
        collector.records = [
            Record(name=prop.name, clause=prop.clause, **told | changes)
            for prop in PROPERTIES.values()
        ]
        return collector

    monkeypatch.setattr(cli, "run_session", run)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
def test_a_full_disk_loses_neither_the_table_nor_the_other_files(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    well(monkeypatch)
    assert main([*VERIFY, "--json=/dev/full", "--junit=report.xml"]) == COULD_NOT_RUN
    told = capsys.readouterr()
    assert told.err == f"nsa-ref: cannot write /dev/full: {NO_ROOM}\n"
    assert "clauses: " in told.out and Path("report.xml").stat().st_size
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*VERIFY, "--json=report.json"]) == COULD_NOT_RUN
        line = f"nsa-ref: not all could be printed: {NO_ROOM}\n"
        assert capsys.readouterr().err == line
    assert json.loads(Path("report.json").read_text())["complete"]
    for arguments in (["--help"], ["verify", "--help"], ["--version"]):
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main(arguments) == COULD_NOT_RUN
            assert capsys.readouterr().err == line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
def test_a_picture_that_cannot_be_written_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'pictures' is not installed")
    Path("case.json").write_text(json.dumps(Case().to_json()))
    line = could_not_run(capsys, "show", "case.json", "--png=/dev/full")
    assert line == f"nsa-ref: cannot write /dev/full: {NO_ROOM}\n"


def test_a_pipe_that_nobody_reads_is_no_broken_clause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert "Broken pipe" in could_not_run(capsys, "explain", "W1")
        pipe.write("what is left goes nowhere, and raises nothing")


def test_a_terminal_without_a_letter_shows_which() -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=Output(shown), width=20).print("\u65e5 \u2502 \u2026")  # type: ignore[arg-type]
    shown.seek(0)
    assert shown.read() == "\\u65e5 \\u2502 \\u2026\n"


def test_what_nobody_thought_of_is_one_line_and_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the place, for whoever mends it."""
    for error, words in (
        (TypeError("un\nlucky"), "TypeError: un lucky at "),
        (MemoryError(), "memory ran out"),
        (OSError(24, "Too many open files", "a.json"), "a.json: Too many open files"),
    ):

        def unlucky(subject: str, error: BaseException = error) -> str:
            raise error

        monkeypatch.setattr(cli, "explain", unlucky)
        line = could_not_run(capsys, "explain", "W1")
        assert words in line and ("mistake" in line) is isinstance(error, TypeError)
        assert (f"{__file__}:" in line) is isinstance(error, TypeError)


def test_before_the_command_has_begun_it_is_one_line_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    assert entry.main() == COULD_NOT_RUN
    line = "nsa-ref: the folder that you are in is gone. Go to another one\n"
    assert capsys.readouterr().err == line


def test_a_module_in_the_place_of_pythons_is_one_line(place: Path) -> None:
    (place / "random.py").write_text("x = 1\n")
    done = python("-m", "nsa_ref", "explain", "W1")
    assert done.returncode == COULD_NOT_RUN and done.stderr.count("\n") == 1, done
    assert "cannot be loaded: ImportError" in done.stderr and "random" in done.stderr


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_where_nobody_listens_it_runs(closed: str, place: Path) -> None:
    """And nothing that is printed gets into a file of the run."""
    (place / "port.py").write_text(SAYS_HALF_A_LETTER)
    command = f"{shlex.quote(sys.executable)} -m nsa_ref"
    asked = "verify port:Port --branch=sliding --dtype=float64 -n1 --json=report.json"
    for arguments, code in (("explain W1", HOLDS), ("--version", HOLDS), (asked, BROKEN)):
        done = subprocess.run(["sh", "-c", f"{command} {arguments} {closed}"], timeout=120)
        assert done.returncode == code, arguments
    assert json.loads((place / "report.json").read_text())["findings"]


def test_a_child_that_the_port_leaves_behind_does_not_speak_for_the_worker(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["verify", "port_zoo:LeavesAChild", "--device=cpu", "--branch=sliding", "-n1"]
    assert main([*asked, "--json=report.json"]) == HOLDS, capsys.readouterr()
    report = json.loads((place / "report.json").read_text())
    assert report["complete"] and sum(row["cases"] for row in report["clauses"]) > 20


@pytest.mark.parametrize("kind", ["json", "html", "junit"])
def test_a_report_is_not_written_over_another_kind_of_file(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = place / "adapter.py"
    adapter.write_text("import numpy\n")
    line = could_not_run(capsys, "verify", "oracle", f"--{kind}=adapter.py")
    assert f"adapter.py is there and no {kind} file" in line
    assert adapter.read_text() == "import numpy\n"


def test_what_ends_the_session_of_a_worker_is_one_line(place: Path) -> None:
    """Not pytest's traceback, from the worker and from the process that it tells."""
    done = python("-m", "nsa_ref", "verify", "port_zoo:BreaksPytest", "--branch=sliding", "-n1")
    assert done.returncode == COULD_NOT_RUN, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("nsa-ref: the workers' session ended: TypeError: 'NoneType' object")


def test_of_a_workers_traceback_the_exception_is_told() -> None:
    """Not the end of its message, nor a note."""
    try:
        error = ValueError("first\n  second\nthird")
        error.add_note("a note")
        raise error
    except ValueError:
        text = traceback.format_exc()
    assert sessions.raised_in(text) == "ValueError: first"
    moved = text.replace("\n", "\n  ") + "assert False"  # as pytest tells an assertion
    assert sessions.raised_in(moved) == "ValueError: first"
    assert sessions.raised_in("Traceback") == "Traceback"


def test_what_is_sent_to_a_worker_that_has_just_ended_ends_no_run() -> None:
    sent: list[str] = []

    def send(name: str, **what: object) -> None:
        sent.append(name)
        raise OSError("cannot send (already closed?)")

    node = SimpleNamespace(sendcommand=send)
    sessions.Collector(Console(quiet=True), None).pytest_testnodeready(node)
    node.sendcommand("runtests", indices=[3])
    assert sent == ["runtests"]


def test_without_docstrings_it_runs() -> None:
    done = python("-OO", "-m", "nsa_ref", "explain", "W1")
    assert done.returncode == HOLDS and done.stderr == "", done


def test_without_docstrings_and_asserts_it_finds_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the workers as well, to whom the environment goes."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    one = ("-m", "nsa_ref", "verify", "port_zoo:OneKeyFewer", "--branch=sliding", "--device=cpu")
    done = python(*one, "-n1", "--json=report.json")
    assert done.returncode == BROKEN and done.stderr == "", done
    findings = json.loads((place / "report.json").read_text())["findings"]
    assert "W1" in {finding["clause"] for finding in findings}, done.stdout
    again = python("-m", "nsa_ref", "replay", "nsa-ref-findings")
    assert again.returncode == BROKEN and again.stderr == "", again


def test_letters_of_two_bytes_reach_no_worker(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """xdist speaks to its workers through their standard input."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    one = ("verify", "port_zoo:SlidingMask", "--branch=sliding", "--device=cpu", "-n1")
    done = nsa_ref(*one)
    assert done.returncode == HOLDS and done.stderr == "", done


#: An import that has no end where a worker does it.
HANGS_IN_WORKERS = """
import os, time
from port_zoo import SlidingMask

if "PYTEST_XDIST_WORKER" in os.environ:
    time.sleep(300)

class Port(SlidingMask):
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the process that hands out work reads /proc")
def test_an_import_that_hangs_in_workers_only_ends_the_run_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "port.py").write_text(HANGS_IN_WORKERS)
    (place / "soon").mkdir()
    patience = "from nsa_ref.testing import silence\nsilence.LOADING = 3.0\n"
    (place / "soon" / "sitecustomize.py").write_text(patience)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place / "soon"), before]))
    done = python("-m", "nsa_ref", "verify", "port:Port", "--branch=sliding", "-n1", "--device=cpu")
    assert done.returncode == COULD_NOT_RUN, done
    assert "hangs in the workers: no end after 3 s" in done.stdout + done.stderr, done


def test_in_a_folder_that_takes_no_file_a_case_is_judged_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, whom no mode of a folder stops, a file in its place does."""
    finding = found(OneKeyFewer(), place)
    kept = place / finding["file"]
    kept.with_name("nsa-ref-findings").write_text("no folder")
    done = nsa_ref("replay", str(kept), "port_zoo:OneKeyFewer")
    assert done.returncode == BROKEN and done.stderr == "", done


# --- findings -------------------------------------------------------------------------------------


def found(port: Any, folder: Path) -> dict[str, Any]:
    """What is wrong with a port on one case."""
    prop, case = PROPERTIES["W1_sliding_mask_as_exposed"], Case(q_len=2, kv_len=2)
    finding = run_property(prop, port, Options(findings=folder, case=case)).finding
    assert finding is not None
    return finding


def test_a_finding_that_cannot_be_kept_is_in_the_report(place: Path) -> None:
    """With what is needed to keep it by hand."""
    Path("a-file").touch()
    finding = found(OneKeyFewer(), place / "a-file" / "findings")
    assert finding["unsaved"] == "Not a directory"
    (line,) = [line for line in message(finding).splitlines() if "could not be kept" in line]
    again = json.loads(line[line.index("{") :])
    assert Case.from_json(again["case"]) == Case.from_json(finding["case"])
    assert again["property"] == finding["property"] and again["spec"] == finding["spec"]
    assert "replay:" not in message(finding)


def saved(folder: Path, **changes: Any) -> Path:
    """Where a finding is kept."""
    about = {"clause": "W1", "property": "W1_sliding_mask_as_read", "spec": "", "seed": 0}
    about |= {"implementation": "mine [w]", "device": "cpu", "case": Case().to_json()}
    finding = {name: value for name, value in (about | changes).items() if value is not None}
    return Path(save_finding(finding, folder)["file"])


@pytest.mark.parametrize("name", ["n" * 300, "\xc4\u65e5" * 90, "\U0001f600" * 100, "\ud800"])
def test_a_name_of_any_length_names_a_file(name: str, place: Path) -> None:
    """And two that begin and end alike name two."""
    files = {saved(place, implementation=f"{name}{letter}{name}") for letter in "\u65e5\u65e6"}
    assert len(files) == 2 and all(file.is_file() for file in files)


def test_another_seed_device_or_case_overwrites_no_finding(place: Path) -> None:
    first = saved(place)
    assert first.name == "W1-W1_sliding_mask_as_read-mine__w_-cpu-seed0.json"
    cases = [{"seed": None, "case": Case(q_len=n, kv_len=n).to_json()} for n in (3, 4)]
    others = [saved(place, **changes) for changes in ({"seed": 1}, {"device": "cuda:1"}, *cases)]
    assert len({first, *others}) == 5
    prop = PROPERTIES["W1_sliding_mask_as_read"]
    of_a_run = described(prop, SlidingMask(), Options(seed=7), Case())
    of_a_replay = described(prop, SlidingMask(), Options(seed=7, case=Case()), Case())
    assert of_a_run["seed"] == 7 and "seed" not in of_a_replay


def test_a_file_is_replaced_in_one_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves what was there."""
    path = place / "known.toml"
    path.write_text("old")

    def full(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(b"half")
        raise OSError(28, NO_ROOM)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=NO_ROOM):
        files.write_text(path, "new")
    assert path.read_text() == "old" and list(place.iterdir()) == [path]


# --- what a port says -----------------------------------------------------------------------------


def test_a_text_of_a_port_is_cut(place: Path) -> None:
    """However long, in the finding as well; and quickly."""
    finding = found(Raises(ValueError("1, " * 7_000_000)), place)
    assert len(message(finding)) < 10_000 and Path(finding["file"]).stat().st_size < 500_000


class Talks(SlidingMask):
    """Refuses every other case, each with another long text."""

    name = "talks"

    def __init__(self) -> None:
        self.asked = 0

    def supports(self, case: Case) -> str | None:
        self.asked += 1
        return f"\x1b[2J{self.asked} \n" + "x" * 1000 if self.asked % 2 else None


def test_many_reasons_are_few_lines(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_ref.testing.running.MANY_REASONS", 10)
    record = run_property(PROPERTIES["W1_sliding_mask_as_exposed"], Talks(), Options())
    assert record.not_offered.pop("other reasons") > 1
    assert len(record.not_offered) == 10 and sum(record.not_offered.values()) == 10
    for reason in record.not_offered:
        assert len(reason) < 400 and reason.isprintable()
    assert few(["a"] * 40)[-1] == "and 10 more" and len(few(["a"] * 40)) == 31
    assert in_one_line("a\n\x1b" + "b" * 9000, 100).count("b") == 98  # and one of \x1b


def test_a_case_that_could_not_be_judged_says_why_in_few_words() -> None:
    record = Record(name="W1", clause="W1")
    record.not_offered.update(map(str, range(100)))
    kept: Any = type("Kept", (), {"path": Path("a.json")})
    assert len(replayed(kept, [record]).why) < 1000


# --- silence --------------------------------------------------------------------------------------


@pytest.fixture
def workers(place: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that has said something, as a worker does."""
    started = []

    def start(name: str, doing: str, seconds: float, command: str = "exec sleep 60") -> Any:
        process = subprocess.Popen(["sh", "-c", f"echo; {command}"], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.read(1)  # it runs
        started.append(process)
        number = get_args(silence.Doing).index(doing)
        said = silence._FORMAT.pack(process.pid, number, 7, seconds)
        (place / f"{name}.sign").write_bytes(said)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_worker_that_says_nothing_is_ended(workers: Any, place: Path) -> None:
    """Not before its time, and no other."""
    watch = silence.Watch(place, stopped=9.0)
    silent, speaks = workers("gw0", "waiting", 5.0), workers("gw1", "waiting", 5.0)
    idle, known = workers("gw2", "idle", math.inf), workers("gw3", "judging", 0.0)
    for number in range(6):
        watch.look(1.0)
        (place / "gw1.sign").write_bytes(silence._FORMAT.pack(speaks.pid, 3, number, 5.0))
        if number == 0:
            watch.forget("gw3")
    assert silent.poll() is None and not watch.ended
    watch.look(1.0)
    assert silent.wait(10) == -signal.SIGABRT
    assert watch.ended == {"gw0": silence.Silence("waiting", 5.0, stopped=False)}
    watch.look(100.0)
    assert [process.poll() for process in (idle, known)] == [None, None]


def test_a_worker_that_is_stopped_is_ended_whatever_it_did(workers: Any, place: Path) -> None:
    watch = silence.Watch(place, stopped=3.0)
    stopped = workers("gw0", "idle", math.inf)
    stopped.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
    for _ in range(7):
        watch.look(1.0)
    assert stopped.wait(10) == -signal.SIGABRT
    assert watch.ended["gw0"].stopped


def test_a_worker_that_will_not_end_is_killed(workers: Any, place: Path) -> None:
    deaf = workers("gw0", "loading", 1.0, "trap : ABRT; while :; do sleep 0.1; done")
    watch = silence.Watch(place, stopped=9.0)
    for _ in range(9):
        watch.look(1.0)
    assert deaf.wait(10) == -signal.SIGKILL


def test_nobody_else_is_ended(place: Path) -> None:
    """What says a process that is no child of ours, or a file that is half written."""
    watch = silence.Watch(place, stopped=1.0)
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        stranger = int(parent.stdout.readline())
        parent.wait()
        for name, pid in (("gw0", stranger), ("gw1", parent.pid), ("gw2", os.getpid())):
            (place / f"{name}.sign").write_bytes(silence._FORMAT.pack(pid, 3, 1, 0.0))
        (place / "gw3.sign").write_bytes(b"half")
        for _ in range(9):
            watch.look(1.0)
        os.kill(stranger, signal.SIGTERM)  # it is still there
    assert not watch.ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_run_that_is_cancelled_reports_what_there_is(number: int, place: Path) -> None:
    """As a CI service cancels a job, and a terminal that is closed."""
    with running("verify", "port_zoo:Sleeps", "-n", "2", "--json", "report.json") as process:
        until(lambda: [*place.glob("nsa-ref-findings/running/*/gw*.json")])
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == COULD_NOT_RUN and "Traceback" not in said
    report = json.loads((place / "report.json").read_text())
    assert report["complete"] is False and "interrupted" in said
    assert not [*place.glob("nsa-ref-findings/running/*")]


#: Every mask is wrong, and it takes its time.
SLOW_AND_WRONG = """
import time
from nsa_ref.testing import OracleImplementation

class Port(OracleImplementation):
    name = "port"

    def sliding_mask(self, case):
        time.sleep(0.5)
        return 1 - super().sliding_mask(case)
"""


def test_a_finding_that_is_being_made_smaller_is_reported(place: Path) -> None:
    """And none of another run, which writes into the same folder."""
    (place / "port.py").write_text(SLOW_AND_WRONG)
    asked = "--branch=sliding", "--dtype=float64", "-n1", "--json=report.json"
    with running("verify", "port:Port", *asked) as process:
        until(lambda: [*place.glob("nsa-ref-findings/*.json")])
        (kept,) = place.glob("nsa-ref-findings/*.json")
        for file, other in (
            ("spec", {"spec": "other:Port"}),
            ("name", {"implementation": "other"}),
        ):
            files.write_json(kept.with_stem(file), json.loads(kept.read_text()) | other)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == COULD_NOT_RUN, said
    (finding,) = json.loads((place / "report.json").read_text())["findings"]
    assert finding["clause"] == "W1" and "W1 is broken" in said
    assert finding["implementation"] == "port" and "2 findings of earlier runs" in said


#: A byte of a file's name that is no UTF-8.
SAYS_HALF_A_LETTER = """
from nsa_ref.testing import OracleImplementation

class Port(OracleImplementation):
    name = "port"

    def offers(self, method):
        return method == "sliding_mask"

    def sliding_mask(self, case):
        raise ValueError("cannot open lib\\udcff.so")
"""


def test_half_a_letter_in_an_exception_loses_no_finding(place: Path) -> None:
    (place / "port.py").write_text(SAYS_HALF_A_LETTER)
    asked = "--branch=sliding", "--dtype=float64", "-n1", "--json=report.json"
    with running("verify", "port:Port", *asked) as process:
        said, _ = process.communicate(timeout=100)
    assert process.returncode == BROKEN and "INTERNALERROR" not in said, said
    assert "cannot open lib?.so" in said
    assert json.loads((place / "report.json").read_text())["findings"]


def test_a_full_disk_does_not_end_a_run_that_was_told_all(place: Path) -> None:
    class Full(io.StringIO):
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    last_words._held[folder_of_run(place, "run")] = Full()
    remove_folder_of_run(place, "run")
    assert not last_words._held


def test_a_worker_says_what_it_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a port runs, how long it may; and that the judge works, once it has answered."""
    told: list[tuple[str, float]] = []

    class Tells(SlidingMask):
        def sliding_mask(self, case: Case) -> Any:
            told.append(now())
            return super().sliding_mask(case)

    def now() -> tuple[str, float]:
        _, doing, _, seconds = silence._FORMAT.unpack(Path("gw0.sign").read_bytes())
        return get_args(silence.Doing)[doing], seconds

    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(silence, "_file", None)
    silence.begin(Path("gw0.sign"))
    assert silence._file is not None
    prop, options = PROPERTIES["W1_sliding_mask_as_exposed"], Options(timeout=50.0, case=Case())
    run_property(prop, Tells(), options)
    told.append(now())
    silence.say("idle")
    assert [doing for doing, _ in (*told, now())] == ["waiting", "judging", "idle"]
    assert told[0][1] <= 50.0 and told[1][1] == silence.JUDGING
    os.close(silence._file)


PROP = PROPERTIES["W1_sliding_mask_as_exposed"]


def test_a_worker_to_whom_nobody_listens_has_a_clock_of_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the plugin is not in the process that hands out the tests, or another started it."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "run")
    monkeypatch.setattr(silence, "_file", None)
    monkeypatch.setattr(silence, "end_with_parent", lambda: None)  # this process goes on
    options, folder = Options(findings=place), last_words.folder_of_run(place, "run")
    folder.mkdir(parents=True)
    last_words.begin_worker(options)
    assert not silence.say("waiting", 1.0)
    last_words.hold_folder_of_run(place, "run")
    last_words.begin_worker(options)
    assert not silence.say("waiting", 1.0)
    monkeypatch.setattr(os, "getppid", os.getpid)
    last_words.begin_worker(options)
    assert silence.say("waiting", 1.0) and silence._file is not None
    os.close(silence._file)


WAITING = silence.Silence("waiting", 2.0, stopped=False)


@pytest.mark.parametrize(
    ("silent", "code", "words"),
    [
        (WAITING, -6, "it hangs: no answer after 2 s"),
        (
            dataclasses.replace(WAITING, stopped=True),
            -6,
            "was stopped, by itself or by others, and",
        ),
        (None, 3, "it ended its process (exit status 3)"),
        (None, -11, "it ended its process (signal 11, SIGSEGV)"),
        (None, None, "it ended its process (a crash, an abort or an exit)"),
        (None, -9, "was ended by others (signal 9, SIGKILL), as by a system whose memory"),
        (None, -15, "was ended by others (signal 15, SIGTERM)"),
        (silence.Silence("judging", 9.0, stopped=False), -6, "said nothing for 9 s, and is ended"),
        (
            silence.Silence("judging", 9.0, stopped=True),
            -9,
            "was stopped, by itself or by others, and is ended",
        ),
    ],
)
def test_a_crash_a_hang_and_a_death_by_others_are_told_apart(
    silent: silence.Silence | None, code: int, words: str, place: Path, monkeypatch: Any
) -> None:
    """Each with its case; what others did is no finding, and no pass."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "run")
    case = Case(q_len=3, kv_len=5)
    with announced(PROP, SlidingMask(), Options(findings=place, timeout=2.0), case):
        pass
    asked = f"test_{PROP.name}", "gw0", "run", place, silent, code
    record = finding_of_dead_worker(*asked)
    assert record is not None
    by_others = "by others" in words or "is ended" in words
    assert (record.finding is None) is bool(record.lost) is by_others
    told = record.lost if record.finding is None else message(record.finding)
    assert words in told and str(case) in told
    again = finding_of_dead_worker(*asked)
    assert again is not None and "outside of any case" in again.lost


def test_a_case_that_is_written_over_another_one_stands_alone(place: Path) -> None:
    """And again where somebody has removed its folder."""
    (folder := place / "folder").mkdir()
    file = files.Rewritten(folder / "case.json")
    for length in (300, 2, 80):
        file.write({"case": "x" * length})
        assert json.loads(file.path.read_text()) == {"case": "x" * length}
    shutil.rmtree(folder)
    file.write({})
    assert file.path.read_text() == "{}"
    file.path.unlink()
    folder.rmdir()
    folder.touch()
    with pytest.raises(OSError):
        file.write({})


def test_half_a_case_is_no_case(place: Path) -> None:
    folder = folder_of_run(place, "run")
    folder.mkdir(parents=True)
    (folder / "gw0.json").write_text('{"case"')
    record = finding_of_dead_worker(f"test_{PROP.name}", "gw0", "run", place, None, -6)
    assert record is not None and "outside of any case" in record.lost


def test_cases_of_a_run_that_was_killed_are_found_again(place: Path) -> None:
    """Not those of one that goes on."""
    for run in ("alive", "dead"):
        hold_folder_of_run(place, run)
        for name in ("gw0.json", "W1-1-broken.json", "gw0.sign"):
            (folder_of_run(place, run) / name).touch()
    _held[folder_of_run(place, "dead")].close()  # as the end of its process does
    dead = folder_of_run(place, "dead")
    assert left_running(place) == {dead: [dead / "gw0.json"]}
    remove_folder_of_run(place, "alive")
    assert left_running(place) == {dead: [dead / "gw0.json"]}
    remove_folder_of_run(place, "dead")
    assert not (place / "running").exists()


def test_what_a_worker_dies_of_before_it_judges_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NodeManager, "EXIT_TIMEOUT", 10)
    collector = Collector(Console(file=io.StringIO()), 3)
    watch = silence.Watch(Path(), 1.0)
    node: Any = SimpleNamespace(
        config=SimpleNamespace(
            nsa_ref_watch=watch, nsa_ref_options=SimpleNamespace(findings=Path("none"))
        ),
        gateway=SimpleNamespace(id="gw0"),
        workerinput={"testrunuid": "run"},
    )
    with pytest.raises(pytest.exit.Exception):
        for _ in range(9):
            collector.pytest_testnodedown(node, "Traceback:\n  ...\nImportError: no Random\n")
    assert "not in the workers (ImportError: no Random)" in collector.errors.pop()
    watch.ended["gw0"] = silence.Silence("loading", 240.0, stopped=False)
    with pytest.raises(pytest.exit.Exception):
        collector.pytest_testnodedown(node, "Not properly terminated")
    assert "hangs in the workers: no end after 240 s" in collector.errors.pop()
    info: Any = SimpleNamespace(value=OSError(24, "Too many open files"))
    assert collector.pytest_internalerror(info)
    assert "session ended: OSError: [Errno 24] Too many" in collector.errors.pop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends it then")
def test_a_worker_that_lets_no_thread_run_ends_with_its_run(place: Path) -> None:
    (place / "port.py").write_text(KEEPS_THE_LOCK)
    with running("verify", "port:Port", "--branch=sliding", "-n1") as process:
        until((place / "pid").exists)
        worker = int((place / "pid").read_text())
        assert Path(f"/proc/{worker}").exists()
        process.kill()
        process.wait()
        until(lambda: not Path(f"/proc/{worker}").exists(), 10.0)


#: A call of C's that keeps Python's lock.
KEEPS_THE_LOCK = """
import ctypes, os
from pathlib import Path
from nsa_ref.testing import OracleImplementation

class Port(OracleImplementation):
    name = "port"

    def sliding_mask(self, case):
        Path("half").write_text(str(os.getpid()))
        Path("half").replace("pid")
        ctypes.PyDLL(None).sleep(300)
"""


def test_workers_may_die_of_many_cases_one_after_the_other() -> None:
    collector = Collector(Console(file=io.StringIO()), 40)
    node: Any = SimpleNamespace(
        config=SimpleNamespace(nsa_ref_watch=silence.Watch(Path(), 1.0)),
        gateway=SimpleNamespace(id="gw0"),
    )
    for number in range(9):
        collector.pytest_testnodedown(node, "Not properly terminated")
        test = f"narrowing_suite.py::test_case[{number}]"
        ended: Any = SimpleNamespace(nodeid=test, when="???", failed=True, user_properties=[])
        collector.pytest_runtest_logreport(ended)
    assert collector.sampled.clauses == dict.fromkeys(range(9), DIED) and not collector.errors


def test_workers_do_not_take_the_users_modules_for_pythons() -> None:
    spec = SimpleNamespace(popen=True, python=None)
    workers_plugin.pytest_xdist_setupnodes([spec])
    assert spec.python == f"{shlex.quote(sys.executable)} -P"


def test_an_error_is_told_by_its_type_and_message() -> None:
    """And not by what Hypothesis notes about it."""

    def unlucky(text: str) -> None:
        raise OSError(28, text)

    unlucky.__name__ = "unlucky"

    def told(longrepr: Any) -> str:
        report = pytest.CollectReport("suite.py", "failed", longrepr, None)
        return sessions._error_line(report)

    trial = hypothesis.settings(level_settings("quick", 3))(
        hypothesis.given(text=hypothesis.strategies.just(NO_ROOM))(unlucky)
    )
    with pytest.raises(OSError, match=NO_ROOM) as error:
        trial()
    assert error.value.__notes__
    words = f"OSError: [Errno 28] {NO_ROOM}"
    assert told(error.getrepr()) == words
    assert told(str(error.getrepr())) == words
    assert told("nothing marked\nthe end") == "the end"
