"""The command, as a naive and as a hostile user finds it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from commands import HELPERS, nsa_ref, python
from nsa_ref.testing import Case, OracleImplementation, cli, findings, report, sessions
from nsa_ref.testing.clauses import CLAUSES, SPEC_VERSION
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, UNDECIDED, main
from nsa_ref.testing.files import write_json
from nsa_ref.testing.last_words import LOCK
from nsa_ref.testing.lattice import EDGES, as_bits
from nsa_ref.testing.loading import CannotRun, load
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Outcome
from nsa_ref.testing.report import show
from nsa_ref.testing.running import run_property
from nsa_ref.testing.sessions import Collector
from nsa_ref.testing.verdicts import Record
from port_zoo import SlidingMask

NO_MODULE = "port_that_is_not_there"
TEXTS = ("spec", "property", "implementation", "device")


def could_not_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `nsa-ref ARGUMENTS` says before it gives up."""
    assert main(list(arguments)) == COULD_NOT_RUN
    line = capsys.readouterr().err
    assert line.startswith("nsa-ref: ") and line.count("\n") == 1 and line.endswith("\n"), line
    return line


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is judged for long, too; a terminal has its bar."""
    monkeypatch.setattr(sessions, "TOLD_EVERY", 0.05)
    for is_terminal in (False, True):
        log = io.StringIO()
        with Collector(Console(file=log, force_terminal=is_terminal), 3) as collector:
            collector.records.append(Record(name="A1_sliding_output", clause="A1", cases=7))
            time.sleep(0.5)
        assert ("0 of 3 done, 7 cases, 0 findings\n" in log.getvalue()) is not is_terminal


def test_looking_for_causes_is_told_and_is_a_part_of_the_time(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is printed leads from here to the finding.

    The case at which a run was that somebody killed comes first.
    """
    at = {"property": "W1_sliding_mask_as_exposed", "spec": "port_zoo:OneKeyFewer"}
    at |= {"implementation": "window [w]", "case": Case(q_len=3, kv_len=3).to_json()}
    running = place / "kept" / "running"
    for run, spec in (("dead", at["spec"]), ("other", "port_zoo:Leaves")):
        write_json(running / run / "gw0.json", at | {"spec": spec})
        (running / run / LOCK).touch()
    told = dict.fromkeys(findings.TOLD - at.keys(), "")
    write_json(place / "kept" / "older.json", at | told)
    write_json(place / "kept" / "half.json", {n: x for n, x in (at | told).items() if n != "kind"})
    write_json(place / "kept" / "report.json", {"findings": []})

    def slow(*arguments: Any) -> None:
        time.sleep(2)
        fold(*arguments)

    fold, started = sessions.fold, time.monotonic()
    monkeypatch.setattr(sessions, "fold", slow)
    command = ["verify", "port_zoo:OneKeyFewer", "--device=cpu", "--branch=sliding", "-n1"]
    assert main([*command, "--json=report.json", "--findings=kept"]) == BROKEN
    took = time.monotonic() - started
    assert json.loads(Path("report.json").read_text())["seconds"] > took - 2
    out = capsys.readouterr().out
    assert "an earlier run was killed: judging the 1 cases that it was at\n" in out
    assert [path.name for path in running.iterdir()] == ["other"]
    assert "1 findings of earlier runs, not of this one, lie in kept\n" in out
    assert "3 findings: judging " in out and " cases to see their causes\n" in out
    assert "replay: nsa-ref replay kept/W" in out and "the same by: W" in out


# --- what cannot run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "command"),
        (["verfy"], "verify"),
        (["verify", "--brunch=fine"], "--brunch"),
        (["verify", "--branch=win"], "compress"),
        (["verify", "--device=tpu"], "cuda"),
        (["verify", "--level=fuzzy"], "thorough"),
        (["verify", "-n", "0"], "from 1 to 9999"),
        (["verify", "-n", "two"], "from 1 to 9999"),
        (["verify", "--seed", "-1"], "at least 0"),
        (["verify", "--case-timeout", "0"], "from 0.1 to 3600000"),
        (["verify", "--case-timeout", "1e-300"], "from 0.1 to 3600000"),
        (["verify", "--case-timeout", "nan"], "from 0.1 to 3600000"),
        (["verify", "--time", "5"], "such as 90s, 5m or 2h"),
        (["verify", "--time", "0m"], "such as 90s, 5m or 2h"),
        (["verify", "nsafast", "--device=cpu"], "package.module:object"),
        (["verify", "oracle", "--dtype=float8"], "bfloat16"),
        (
            ["verify", "port_zoo:SlidingMask", "--device=cpu", "--dtype=float16"],
            "float16: mask on cpu declares float64",
        ),
        (["verify", "oracle", "--device=cuda"], "--device cuda"),
        (["verify", "oracle", "--json", "no/such/folder.json"], "No such file"),
        (["verify", "oracle", "--json", "."], "directory"),
        (["verify", "oracle", "--json", ""], "has no name"),
        (["verify", "oracle", "--json", "one", "--html", "./one"], "is to be written twice"),
        (["mutants", "NoWindow", "--json", ""], "has no name"),
        (["verify", "oracle", "--html", "no/such/page.html"], "No such file"),
        (["verify", "oracle", "--junit", "no/such/page.xml"], "No such file"),
        (["verify", "oracle", "--findings", "a-file"], "--findings DIR"),
        (["replay", "missing.json"], "no file missing.json"),
        (["replay", "empty"], "the folder empty holds no case"),
        (["show", "."], "directory"),
        (["replay", "a-file"], "holds no case"),
        (["replay", "no-case.json"], "no-case.json holds no case: it has no 'case'"),
        (["ledger", "add", "no-case.json"], "no-case.json holds no case: it has no 'case'"),
        (["show", "list.json"], "JSON object"),
        (["show", "other.json"], "unknown fields ['colour']"),
        (["show", "wrong.json"], "q_heads=3"),
        (["show", "empty-batch.json"], "batch=0"),
        (["show", "right.json", "--png", "no/such.png"], "No such file"),
        (["replay", "right.json"], "MODULE:OBJECT"),
        (["replay", "old.json"], "'W9'"),
        (["replay", "hasty.json"], "timeout=-1 must be a number of seconds from 0.1"),
        (["replay", "forever.json"], "must be a number of seconds from 0.1 to 3600000"),
        (["replay", "granted.json"], "timeout=True must be a number of seconds"),
        *((["replay", f"{field}.json"], f"{field}=['a'] must be a text") for field in TEXTS),
    ],
)
def test_one_line_says_what_is_wrong_and_what_would_be_right(
    arguments: list[str],
    words: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    case = Case().to_json()
    kept = {"case": case, "spec": "oracle"}
    for name, data in {
        "list": [1],
        "other": {"colour": "red"},
        "wrong": case | {"q_heads": 3, "kv_heads": 2},
        "empty-batch": case | {"batch": 0},
        "right": case,
        "no-case": {"property": "A1_sliding_lse", "clause": "A1", "spec": "oracle"},
        "old": kept | {"property": "W9"},
        "hasty": kept | {"timeout": -1},
        "forever": kept | {"timeout": 10**400},
        "granted": kept | {"timeout": True},
        **{field: kept | {field: ["a"]} for field in TEXTS},
    }.items():
        (place / f"{name}.json").write_text(json.dumps(data))
    (place / "a-file").write_text("no JSON")
    (place / "empty").mkdir()
    before = sorted(place.iterdir())
    assert words in could_not_run(capsys, *arguments)
    assert sorted(place.iterdir()) == before, "a run that did not start leaves nothing behind"


def test_without_torch_the_fast_path_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nsa_fast"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CannotRun, match=r"needs 'torch'.*pip install 'nsa-ref\[fast\]'$"):
        load("nsa_fast", "cpu")


ADAPTERS = {
    f"{NO_MODULE}:Port": f"no module '{NO_MODULE}'",
    "needs_it:Port": f"importing needs_it failed: it needs '{NO_MODULE}'",
    "raises:Port": (
        "importing raises failed: ZeroDivisionError: division by zero at {place}/raises.py:2"
    ),
    "leaves:Port": "importing leaves failed: SystemExit: 5",
    "port_zoo:Prot": "port_zoo has no 'Prot'; it has BadRefusal, BreaksPytest",
    "port_zoo:not_an_implementation": "gives a dict",
    "port_zoo:ConstructorRaises": "OSError: no such kernel library",
    "port_zoo:undeclared": "'fp33'",
    "port_zoo:twins": "another implementation",
    "two_lines:Port": "name='one\\ntwo' must be a line of at least one letter",
    "port_zoo:leaves_at_once": "exit status 7); its last words: lib: fatal",
    "port_zoo:aborts": "signal 6",
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_that_cannot_be_loaded_is_one_line(
    adapter: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is tried in a process of its own, which it may take with it."""
    (place / "needs_it.py").write_text(f"import {NO_MODULE}")
    (place / "raises.py").write_text("import os\n1 / 0")
    (place / "leaves.py").write_text("raise SystemExit(5)")
    named = "from port_zoo import SlidingMask as Port\nPort.name = 'one\\ntwo'"
    (place / "two_lines.py").write_text(named)
    assert ADAPTERS[adapter].format(place=place) in could_not_run(
        capsys, "verify", adapter, "--device=cpu"
    )


def test_an_adapter_that_hangs_while_it_is_loaded_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LOADING_TIMEOUT", 1.0)
    assert "more than 1 s" in could_not_run(capsys, "verify", "port_zoo:hangs", "--device=cpu")


def test_a_page_without_its_template_engine_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run, not after it."""
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "nsa-ref[report]" in could_not_run(capsys, "verify", "oracle", "--html=page.html")


# --- what runs ------------------------------------------------------------------------------------


def test_crashes_hangs_and_exits_are_findings_and_all_else_is_still_judged(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of a hostile run: message, table, JSON, files, and replays that fail alike.

    Its process is one of its own, as a user's is.
    """
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("COLUMNS", "80")
    done = python(
        *("-m", "nsa_ref.testing.cli", "verify", "port_zoo:hostile", "--device=cpu", "-n", "2"),
        *("--branch=sliding", "--case-timeout=2"),
        *("--json=report.json", "--html=report.html", "--junit=report.xml"),
    )
    assert done.returncode == BROKEN, done
    assert done.stderr == ""
    for words in (
        "ValueError: no\nbrackets [0, 0]\n  at " + str(HELPERS / "port_zoo.py"),
        "Segmentation fault\n  at ",
        "it ended its process",
        'port_zoo.py", line ',
        f"W1: {CLAUSES['W1']}\n",
        "not offered by mask: ",
    ):
        assert words in done.stdout, done.stdout
    # on a machine that is slow, a case has more time
    assert re.search(r"it hangs: no answer after [\d.]+ s\n  at ", done.stdout), done.stdout
    assert not any(len(line) > 80 for line in done.stdout.splitlines() if "\u2500" in line)
    assert "\u2026" not in done.stdout, "the table fits into 80 columns"

    text = (place / "report.json").read_text()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert data["schema"] == report.SCHEMA and data["spec_version"] == SPEC_VERSION
    assert data["device"] == "cpu" and data["seed"] == 0 and data["complete"]
    assert {"python", "numpy", "nsa_ref"} <= set(data["versions"])
    verdicts = {clause["id"]: clause["verdict"] for clause in data["clauses"]}
    not_offered = dict.fromkeys(["A1", "A2", "A3", "A5", "W2"], "not_offered")
    assert verdicts == {**not_offered, "W1": "fail", "W3": "fail"}
    for clause in data["clauses"]:
        assert {"id", "verdict", "cases", "budget_used", "reason"} <= set(clause)
    kept = sorted((place / "nsa-ref-findings").iterdir())
    assert len(data["findings"]) == len(kept), "every finding is a file, and nothing else is there"
    blamed = {json.loads(path.read_text())["implementation"] for path in kept}
    assert blamed == {"raises ValueError", "segfaults", "leaves", "hangs"}

    groups = len(findings.grouped(data["findings"]))
    assert done.stdout.count("\n::error title=") == groups
    monkeypatch.delenv("GITHUB_ACTIONS")
    page = (place / "report.html").read_text(encoding="utf-8")
    failed = ET.fromstring((place / "report.xml").read_text()).findall("*/testcase/failure")
    assert len(failed) == len(data["findings"])

    for finding in data["findings"]:
        assert {"clause", "case", "worst", "replay"} <= set(finding)
        assert finding["replay"] in page
        command = finding["replay"].split()
        assert command[:2] == ["nsa-ref", "replay"]
        ended = finding.get("ended"), finding["implementation"]
        if finding["clause"] == "W3" and ended in (("hang", "hangs"), ("crash", "segfaults")):
            # a hang is one as well where the worker's own clock was stopped
            other = ["port_zoo:CancelsTheAlarm"] if ended[0] == "hang" else []
            again = nsa_ref(*command[1:], *other)
            assert again.returncode == BROKEN and again.stderr == "", again
            assert finding["text"].splitlines()[0] in again.stdout


def test_ctrl_c_reports_what_there_is(place: Path) -> None:
    """And ends the workers, though they are in the middle of a case."""
    command = ("verify", "port_zoo:hangs_later", "--device=cpu", "--branch=sliding", "-n", "1")
    with (place / "errors").open("w") as errors, (place / "out").open("w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "nsa_ref.testing.cli", *command, "--json=report.json"],
            stdout=out,
            stderr=errors,
            start_new_session=True,
            # a shell's background jobs hand an ignored signal down
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        for _ in range(600):
            if (place / "hanging").exists() or run.poll() is not None:
                break
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(timeout=30) == COULD_NOT_RUN
    assert (place / "errors").read_text().startswith("nsa-ref: interrupted; what was found")
    data = json.loads((place / "report.json").read_text())
    assert not data["complete"]
    assert data["findings"], "the first implementation was judged"
    for finding in data["findings"]:
        assert Path(finding["replay"].split()[2]).is_file()
    verdicts = {clause["id"]: clause["verdict"] for clause in data["clauses"]}
    assert verdicts["W1"] == "fail" and verdicts["A1"] == "inconclusive"
    assert "pass" not in verdicts.values()
    assert "W1 is broken by window [w] on cpu" in (place / "out").read_text()


def test_a_seed_is_the_cases(tmp_path: Path) -> None:
    """The same seed tries the same cases, another one others."""

    class Noting(SlidingMask):
        def sliding_mask(self, case: Case) -> Any:
            tried.append(case)
            return super().sliding_mask(case)

    runs = []
    for seed in (0, 0, 1):
        tried: list[Case] = []
        options = Options(findings=tmp_path, seed=seed)
        run_property(PROPERTIES["W1_sliding_mask_as_exposed"], Noting(), options)
        runs.append(tried)
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0]) & set(runs[2])) < len(runs[0]) / 2


@pytest.mark.parametrize(
    ("adapter", "branch", "words"),
    [
        ("port_zoo:SlidingMask", "selection", "nothing of mask could be judged: not offered: s"),
        ("port_zoo:Refuses", "sliding", "it is Sunday"),
        ("port_zoo:DiesInWorkers", "sliding", "not in the workers"),
        ("port_zoo:SupportsAnswers", "sliding", "supports(case) returned True; it must"),
        ("port_zoo:BadRefusal", "sliding", "supports(case) raised KeyError: 'head_dim' at "),
    ],
)
def test_a_run_that_decides_nothing_is_no_pass(
    adapter: str, branch: str, words: str, place: Path
) -> None:
    options = ("--device=cpu", f"--branch={branch}", "-n", "1", "--json=r.json")
    done = nsa_ref("verify", adapter, *options)
    assert done.returncode == COULD_NOT_RUN, done
    assert words in done.stderr and done.stderr.count("\n") == 1
    clauses = json.loads((place / "r.json").read_text())["clauses"]
    assert "pass" not in {clause["verdict"] for clause in clauses}
    assert not (place / "nsa-ref-findings").exists()


def test_a_replay_that_decides_nothing_is_no_pass(place: Path) -> None:
    """Asked of an implementation that does not offer it."""
    data = {"case": Case().to_json(), "property": "A1_sliding_output", "device": "cpu"}
    (place / "case.json").write_text(json.dumps(data))
    done = nsa_ref("replay", "case.json", "port_zoo:SlidingMask")
    assert done.returncode == COULD_NOT_RUN
    assert "not offered: sliding" in done.stderr


def test_a_finding_of_an_older_version_is_replayed(place: Path) -> None:
    """Of what it says, only the property, the case and the implementation are needed."""
    needed = {"property": "W1_sliding_mask_as_exposed", "spec": "port_zoo:OneKeyFewer"}
    needed["case"] = Case(q_len=2, kv_len=2).to_json()
    older = {"clause": "W1", "implementation": "window [w]", "device": "cpu", "timeout": 120.0}
    older |= {"text": "sliding_mask: ...\nThis may be a ...", "worst": {}, "file": "x.json"}
    for finding in (needed, needed | older):
        (place / "finding.json").write_text(json.dumps(finding))
        done = nsa_ref("replay", "finding.json", "--device=cpu")
        assert done.returncode == BROKEN and done.stderr == "", done
        assert "window_closed=False would explain it" in done.stdout


def test_a_case_of_ones_own_is_tried_on_properties_about_such_cases(place: Path) -> None:
    """W3 speaks of windows that cover everything; a window of 1 does not break it."""
    case = Case(q_len=5, kv_len=5, sliding_window_size=1, head_dim=8, value_dim=8)
    (place / "case.json").write_text(json.dumps(case.to_json()))
    done = nsa_ref("replay", "case.json", "oracle")
    assert done.returncode == HOLDS, done


# --- the report -----------------------------------------------------------------------------------


def record(**changes: Any) -> Record:
    """What a worker says about a property, by default that all is well."""
    fields: dict[str, Any] = {"name": "W1_sliding_mask_as_read", "clause": "W1", "cases": 3}
    counts = {name: Counter(value) for name, value in changes.items() if isinstance(value, dict)}
    return Record(**fields | {"implementation": "port [0, 0]"} | changes | counts)


def shown(records: list[Record], **more: Any) -> str:
    """What the terminal shows, 80 columns wide."""
    console = Console(width=80, record=True, file=io.StringIO())
    report.show(console, records, [], title="port [0, 0] on cpu", seconds=1.0, **more)
    return console.export_text()


def test_brackets_are_not_markup_and_no_word_is_cut() -> None:
    unlucky = {"inconclusive": {("only powerless bounds",): 12345}, "not_offered": {"lse": 123}}
    text = shown([record(**unlucky, ambiguous=12345, cases=0)])
    assert "port [0, 0] on cpu" in text
    assert "inconclusive" in text and "\u2026" not in text
    assert max(map(len, text.split("edges not reached")[0].splitlines())) <= 80


def test_what_is_not_offered_names_the_method_and_the_implementation() -> None:
    lse = record(not_offered={"lse of fine": 2}, inconclusive={("only powerless bounds",): 1})
    other = record(implementation="other", not_tried={("not causal",): 1})
    text = shown([record(cases=0, not_offered={"gradients of fine": 1}), lse, other])
    assert "not offered by port [0, 0]: gradients of fine; lse of fine (2 cases)\n" in text
    assert "by other" not in text
    why = "long sequences, which are causal ones, and it declares none"
    assert f"not tried with other: {why}\n" in text


def test_properties_that_came_to_no_end_are_no_pass() -> None:
    """After Ctrl-C, or when a worker was lost."""
    (clause,) = report.clauses([record()], [], {"W1": 2})
    assert clause.verdict == "inconclusive"
    assert "1 of 2 properties came to no end" in clause.to_json()["reason"]
    (clause,) = report.clauses(
        [record(), record(lost="its worker was killed", cases=0)], [], {"W1": 2}
    )
    assert clause.verdict == "inconclusive"


def test_the_report_is_json_whatever_is_in_it() -> None:
    data = report.to_json({"seconds": math.inf}, [record(budget_used=math.nan)], [])
    json.dumps(data, allow_nan=False)


def test_nothing_but_ambiguous_rows_is_no_pass(tmp_path: Path) -> None:
    undecided = Outcome(compared=0, ambiguous=3)
    prop = dataclasses.replace(PROPERTIES["I5_selection"], check=lambda *_: undecided)
    result = run_property(prop, OracleImplementation(), Options(findings=tmp_path))
    assert (result.cases, not result.edges) == (0, True)
    (clause,) = report.clauses([result], [])
    assert clause.verdict == "ambiguous"


VERIFY = ("verify", "port_zoo:SlidingMask", "--device=cpu")


def leaves(monkeypatch: pytest.MonkeyPatch, **changes: dict[str, Any]) -> None:
    """No run is made, and all is well but for what is said of some clauses."""

    well = {"implementation": "mask", "asked": 3, "edges": dict.fromkeys(EDGES, 1)}

    def run(console: Console, *_: Any, total: int, **__: Any) -> Collector:
        collector = Collector(console, total)
        collector.records = [
            record(name=prop.name, clause=prop.clause, **well | changes.get(prop.clause, {}))
            for prop in PROPERTIES.values()
        ]
        return collector

    monkeypatch.setattr(cli, "run_session", run)


def test_thorough_without_an_edge_has_not_decided_all(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    met = dict.fromkeys((edge for edge in EDGES if edge not in ("batch 3", "G = 16")), 1)
    leaves(monkeypatch, **{clause: {"edges": met} for clause in CLAUSES})
    monkeypatch.setattr(cli, "THOROUGH_DRAWS", 300)
    (place / "few_heads.py").write_text(
        "from port_zoo import SlidingMask\n\n\n"
        "class Port(SlidingMask):\n"
        "    limits = {'q_heads': (1, 2, 4)}\n"
    )
    thorough = "verify", "few_heads:Port", "--device=cpu", "--level=thorough"
    assert main([*thorough]) == UNDECIDED
    shown = capsys.readouterr()
    assert "no decided case had batch 3. Try another --seed" in shown.err
    assert "edges out of reach: G = 16 (none of 300 cases drawn" in shown.out
    met["batch 3"] = 1
    assert main([*thorough]) == HOLDS
    assert "pairs of edges met: 0\n" in capsys.readouterr().out


def test_thorough_without_a_pair_of_edges_has_not_decided_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = as_bits(("batch 3", "w = 1"))
    well = record(edges=Counter(EDGES), built=Counter([pair]), asked=3)
    assert cli._thorough(Console(), [well], []) == UNDECIDED
    said = "no decided case had both of w = 1 & batch 3. Try another --seed"
    assert said in capsys.readouterr().err
    show(Console(), [well], [], title="", seconds=0.0)
    assert "pairs of edges met: 0 of 1 that can be met" in capsys.readouterr().out
    well.stood[pair] += 1
    assert cli._thorough(Console(), [well], []) == HOLDS


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"cases": 0, "inconclusive": {("no hidden key",): 4}}, UNDECIDED, "A5 is inconclusive"),
        ({"cases": 0, "ambiguous": 4, "undecided": 1}, UNDECIDED, "A5 is ambiguous"),
        ({"cases": 3, "inconclusive": {("no hidden key",): 4}}, HOLDS, ""),
        ({"cases": 0, "not_offered": {"fine": 1}}, HOLDS, ""),
        ({"cases": 0, "known": {"a": 1}}, HOLDS, ""),
        ({"cases": 1, "asked": 9}, UNDECIDED, "A5 is thin"),
    ],
)
def test_what_is_offered_and_not_decided_does_not_hold(
    changes: dict[str, Any],
    code: int,
    words: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An exit code of its own: nothing is broken, and nothing is wrong with the call."""
    leaves(monkeypatch, A5=changes)
    assert main([*VERIFY]) == code
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == (code != HOLDS)


def test_the_rows_of_bounds_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is coarser than its dtype stands out: in the table, and in JSON."""
    (place / "coarse.py").write_text(
        "from port_zoo import SlidingMask\n\n\n"
        "class Port(SlidingMask):\n"
        "    numerics = {'float64': 'bf16', 'float32': 'tf32', 'bfloat16': 'bf16-eager'}\n"
    )
    leaves(monkeypatch)
    asked = ("coarse:Port", "--device=cpu", "--json=report.json", "--dtype=float64")
    assert main(["verify", *asked, "--dtype=bfloat16"]) == HOLDS
    said = "bounds of mask: float64 as bf16 (coarser than float64), bfloat16 as bf16-eager\n"
    assert said in capsys.readouterr().out
    rows = {"float64": "bf16", "bfloat16": "bf16-eager"}
    assert json.loads((place / "report.json").read_text())["numerics"] == {"mask": rows}


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(q_len=3, kv_len=3, sliding_window_size=1), ["0 #..", "1 ##.", "2 .##"]),
        (Case(q_len=0, kv_len=3), ["0 rows, 3 columns", "(nothing to draw)"]),
        (Case(q_len=300, kv_len=300), ["only rows 252..299, columns 228..299:"]),
    ],
)
def test_show_draws_what_fits(
    case: Case, words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "case.json").write_text(json.dumps(case.to_json()))
    assert main(["show", "case.json"]) == HOLDS
    text = capsys.readouterr().out
    for word in (str(case), *words):
        assert word in text
    drawn = [line for line in text.splitlines() if not line.startswith("Case(")]
    assert max(map(len, drawn)) <= 80


def test_show_paints_a_png_whatever_the_file_is_called(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'pictures' is not installed")
    for number, case in enumerate([Case(q_len=9, kv_len=9), Case(q_len=0, kv_len=0)]):
        (place / "case.json").write_text(json.dumps(case.to_json()))
        picture = place / f"{number}.mask"
        assert main(["show", "case.json", "--png", str(picture)]) == HOLDS
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == HOLDS
    assert capsys.readouterr().out.startswith("nsa-ref ")
