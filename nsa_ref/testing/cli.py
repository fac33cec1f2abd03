"""nsa-ref: verify an implementation, replay findings, compare reports, show a case, judge mutants.

A thin front over pytest: `verify`, `replay` and `mutants` run a suite in xdist workers, so that
an implementation that crashes, aborts or hangs takes a worker down and never the run.

Exit codes: 0 all offered clauses hold (every mutant that limits allow dies of its clause), 1 a
clause is broken (or a mutant does not), 2 it could not run, 3 nothing is broken and an offered
clause was not decided.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from nsa_ref.semantics import PRESETS
from nsa_ref.testing.beginning import begin
from nsa_ref.testing.branches import BRANCHES
from nsa_ref.testing.causes import by_weight
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.difference import compare, read_report, show_difference
from nsa_ref.testing.drawing import TURNS
from nsa_ref.testing.evidence import Evidence, reachable, weighed
from nsa_ref.testing.explaining import SWITCHES, explain, pages_folder
from nsa_ref.testing.files import check_folder, read_text, write_text
from nsa_ref.testing.findings import Finding, findings_in, grouped, of_one_cause, told_by
from nsa_ref.testing.fuzz_folder import Folder
from nsa_ref.testing.fuzzing import Fuzzing
from nsa_ref.testing.implementation import TorchImplementation
from nsa_ref.testing.junit import to_xml
from nsa_ref.testing.last_words import left_running
from nsa_ref.testing.lattice import excused_edges, unmet_edges, unmet_pairs
from nsa_ref.testing.ledger import Entry, LedgerError, read_ledger, to_toml, wrong_entries
from nsa_ref.testing.loading import (
    DEVICES,
    SHORT_NAMES,
    CannotRun,
    Declared,
    own_version,
    try_loading,
    versions,
)
from nsa_ref.testing.mutants import ZOO
from nsa_ref.testing.mutants.columns import COLUMNS
from nsa_ref.testing.mutants.trials import (
    kills_of_its_own,
    show_trials,
    why_it_cannot_be_met,
    worker_died,
)
from nsa_ref.testing.narrowing import DIED, SAMPLED, entry_of, narrowed
from nsa_ref.testing.options import SHARED_OPTIONS, parse_duration, parse_seed
from nsa_ref.testing.page import to_html
from nsa_ref.testing.pictures import one_mask
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.properties.common import oracle_mask
from nsa_ref.testing.replays import (
    Kept,
    Replayed,
    read_case_file,
    read_kept,
    replayed,
    show_replays,
)
from nsa_ref.testing.report import Clause, clauses, compiled, graphs, show, to_json
from nsa_ref.testing.sessions import Collector, fold_findings, run_session, say, temporary_folder
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import (
    annotation,
    few,
    in_one_line,
    one_line,
    place,
    printable,
    reasons,
    remark,
)

HOLDS, BROKEN, COULD_NOT_RUN, UNDECIDED = 0, 1, 2, 3

#: Cells of a mask, of all heads, that `show` computes.
MOST_CELLS = 2**25

#: Cases that are drawn for edges that a thorough run did not meet.
THOROUGH_DRAWS = 3000

#: With `--time`, the share of it that may be spent behind it on which findings have one cause.
CAUSES_SHARE = 1 / 10

#: Seconds that importing an adapter may take.
LOADING_TIMEOUT = 120.0


def verify(arguments: argparse.Namespace, console: Console) -> int:
    """Judge an implementation, clause by clause."""
    started, began = time.monotonic(), time.time()
    reports = {"json": arguments.json, "html": arguments.html, "junit": arguments.junit}
    _check_each_writable(reports)
    if arguments.html and importlib.util.find_spec("jinja2") is None:
        raise CannotRun("--html needs jinja2: pip install 'nsa-ref[report]'")
    _check_findings(Path(arguments.findings))
    found = try_loading(arguments.implementation, arguments.device, LOADING_TIMEOUT)
    device, chosen = found["device"], found["implementations"]
    names = ", ".join(one["name"] for one in chosen)
    budget, loaded = arguments.time, time.time()
    wanted, dtypes = arguments.branch or (), arguments.dtype or ()
    _check_dtypes(dtypes, found)
    ledgers = [arguments.ledger] if arguments.ledger else filter(os.path.exists, found["ledgers"])
    entries = [
        entry for ledger in dict.fromkeys(ledgers) for entry in _checked_entries(Path(ledger))
    ]
    where = f"{device} ({found['device_name']})" if found["device_name"] else device
    level = f"level {arguments.level}, seed {arguments.seed}"
    say(console, f"nsa-ref judges {names} on {where}, {level}")
    numerics = {
        one["name"]: {d: row for d, row in one["numerics"].items() if d in (dtypes or [d])}
        for one in chosen
    }
    properties = [p for p in PROPERTIES.values() if not wanted or p.part in wanted]
    options = [
        f"--nsa-level={arguments.level}",
        f"--nsa-seed={arguments.seed}",
        f"--nsa-case-timeout={arguments.case_timeout}",
        *(f"--nsa-branch={branch}" for branch in wanted),
        *(f"--nsa-dtype={dtype}" for dtype in dtypes),
    ]
    if arguments.ledger:
        options.append(f"--nsa-ledger={Path(arguments.ledger).absolute()}")
    asked = console, arguments.implementation, device
    written = {"workers": arguments.n, "findings": Path(arguments.findings)}
    run = functools.partial(run_session, *asked, **written)
    warmed: list[Record] = []
    if arguments.warm:
        warming = run(total=None, options=[*options, "--nsa-warm"])
        if warming.interrupted:
            raise KeyboardInterrupt
        warmed = warming.warmed
        took = time.monotonic() - started
        counted = [f"{name} ({graphs(counts)})" for name, counts in compiled(warmed).items()]
        say(console, f"warmed up in {took:.0f} s: {', '.join(counted) or 'nothing to compile'}")
        if warming.errors:
            say(console, f"while warming up workers died {len(warming.errors)} times")
    taken_up = _taken_up(arguments, console, found)
    total = len(properties) * len(chosen)
    if budget is None:
        collector = run(total=total, options=options)
    else:
        # in the order of the turns, one after the other: see `suite_in_turns`
        deadline = loaded + budget
        timed = ["--dist=load", "--maxschedchunk=1", f"--nsa-deadline={deadline}"]
        collector = run(total=TURNS * total, options=[*options, *timed])
        collector.join_turns()
    collector.findings += taken_up
    if collector.interrupted:
        judged = arguments.implementation, [one["name"] for one in chosen]
        folder, told = Path(arguments.findings), collector.findings
        collector.findings = told + _not_yet_told(folder, began, told, *judged)
    _say_what_is_older(console, Path(arguments.findings), collector.findings)
    asked_for = Counter(p.clause for p in properties for _ in chosen)
    records, findings = collector.records, collector.findings
    stated = [Declared.from_json(one) for one in chosen]
    evidence: dict[str, Evidence] = {}
    whole: list[Entry] = []
    if not collector.interrupted and not collector.errors:
        whole = [one for one in entries if _is_asked(one, properties, stated, dtypes)]
    if not collector.interrupted:
        causes_until = None if budget is None else deadline + CAUSES_SHARE * budget
        findings[:] = by_weight(findings)
        fold_findings(findings, run, console, causes_until)
        evidence = weighed(records, stated)
    seconds = time.monotonic() - started
    about = {
        "implementation": names,
        **{name: found[name] for name in ("device", "device_name", "versions")},
        "numerics": numerics,
        "seed": arguments.seed,
        "level": arguments.level,
        "time": arguments.time,
        "seconds": round(seconds, 1),
        "complete": not collector.interrupted and not collector.errors,
    }
    how: dict[str, Any] = {"asked_for": asked_for, "evidence": evidence, "entries": whole}
    report = to_json(about, records, findings, warmed=warmed, **how)
    errors = [*collector.errors, *(["interrupted"] if collector.interrupted else [])]
    texts: dict[str, Callable[[], str]] = {}
    if arguments.json:
        texts[arguments.json] = lambda: json.dumps(report, indent=1, allow_nan=False) + "\n"
    if arguments.html:
        texts[arguments.html] = lambda: to_html(report)
    if arguments.junit:
        texts[arguments.junit] = lambda: to_xml(records, errors, seconds)
    title = f"{names} on {where}"
    how |= {"title": title, "seconds": seconds, "numerics": numerics}
    try:
        code = _show(console, collector, names, **how)
    finally:
        unwritten = _write_all(texts)
    if code == HOLDS and arguments.strict and (wrong := wrong_entries(records, whole)):
        lines = "; ".join(map(remark, wrong))
        wrong_ledger = printable(f"nsa-ref: --strict, and the ledger is wrong: {lines}")
        print(wrong_ledger, file=sys.stderr)
        return BROKEN
    if code == HOLDS:
        code = _undecided(clauses(records, findings, asked_for, evidence))
    if code == HOLDS and arguments.level == "thorough":
        code = _thorough(console, records, stated)
    return COULD_NOT_RUN if unwritten and code != BROKEN else code


def _not_yet_told(
    folder: Path, began: float, told: Sequence[Finding], spec: str, names: Sequence[str]
) -> list[Finding]:
    """Findings that workers had kept, and were making smaller, when the run was ended.

    began : when the run did, as files have it; what is older is of another run
    spec, names : what the run judges; another run may write into the same folder
    """
    known = {finding["file"] for finding in told}
    found = []
    for path, finding in findings_in(folder.resolve()):
        if str(path) in known or finding["spec"] != spec or finding["implementation"] not in names:
            continue
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= began:
                found.append(finding)
    return found


def _say_what_is_older(console: Console, folder: Path, findings: Sequence[Finding]) -> None:
    """Findings that were there before are no findings of this run, though they lie beside them."""
    now = {Path(finding["file"]).name for finding in findings}
    if older := [path for path, _ in findings_in(folder) if path.name not in now]:
        say(console, f"{len(older)} findings of earlier runs, not of this one, lie in {folder}")


def _taken_up(
    arguments: argparse.Namespace, console: Console, found: dict[str, Any]
) -> list[Finding]:
    """What is broken of the cases that were running when an earlier run was killed."""
    folder, names = Path(arguments.findings), {one["name"] for one in found["implementations"]}
    cases: list[Kept] = []
    ended: list[Path] = []
    for run, files in left_running(folder).items():
        own = []
        for file in files:
            with contextlib.suppress(CannotRun):
                kept = read_kept(file, None, found["device"])
                if (kept.spec, kept.implementation in names) == (arguments.implementation, True):
                    own.append(dataclasses.replace(kept, timeout=arguments.case_timeout))
        cases += own
        ended += [run] if len(own) == len(files) else []
    findings: list[Finding] = []
    if cases:
        say(console, f"an earlier run was killed: judging the {len(cases)} cases that it was at")
        collector = _run_kept(console, cases, found, folder)
        if collector.interrupted:
            raise KeyboardInterrupt
        findings = collector.findings
    for run in ended:
        shutil.rmtree(run, ignore_errors=True)
    return findings


def _write_all(texts: Mapping[str, Callable[[], str]]) -> bool:
    """Write each file, however the others fare; True, and a line for each, if one cannot be."""
    unwritten = False
    for name, text in texts.items():
        try:
            Path(name).write_text(text(), encoding="utf-8")
        except OSError as error:
            print(printable(f"nsa-ref: cannot write {name}: {error.strerror}"), file=sys.stderr)
            unwritten = True
    return unwritten


def _check_dtypes(dtypes: Sequence[str], found: dict[str, Any]) -> None:
    """Raise CannotRun for a dtype that no implementation of those found declares."""
    chosen = found["implementations"]
    declared = {dtype for one in chosen for dtype in one["numerics"]}
    for dtype in dtypes:
        if dtype not in declared:
            names, known = ", ".join(one["name"] for one in chosen), ", ".join(sorted(declared))
            raise CannotRun(f"--dtype {dtype}: {names} on {found['device']} declares {known}")


def _is_asked(
    entry: Entry,
    properties: Sequence[Property],
    declared: Sequence[Declared],
    dtypes: Sequence[str],
) -> bool:
    """Whether neither --branch nor --dtype leaves out any property that the entry is about."""
    left_out = (prop for prop in PROPERTIES.values() if prop not in properties)
    if any(map(entry.is_about, left_out)):
        return False
    about = (one for one in declared if entry.names(one.name))
    return not dtypes or all(set(dtypes) & set(one.numerics) for one in about)


def _thorough(console: Console, records: Sequence[Record], declared: Sequence[Declared]) -> int:
    """HOLDS; or UNDECIDED, with a line that names the edges, or pairs, of no decided case.

    A pair can be met if a case on both edges was built (see `pairs`). An edge on which none of many
    more cases stands, drawn within what is declared, is out of reach.
    """
    excused = excused_edges(records)
    unmet = [edge for edge in unmet_edges(records) if edge not in excused]
    reached: set[str] = set()
    for one in declared:
        own = [r for r in records if r.implementation == one.name and r.asked]
        props = [PROPERTIES[record.name] for record in own]
        reached |= reachable(unmet, props, one, draws=THOROUGH_DRAWS)
    if outside := [edge for edge in unmet if edge not in reached]:
        why = f"none of {THOROUGH_DRAWS} cases drawn within what is declared has them"
        say(console, f"edges out of reach: {', '.join(outside)} ({why})")
    if gaps := [edge for edge in unmet if edge in reached]:
        gap = (
            f"not as thorough as it must be: no decided case had {', '.join(gaps)}. Try "
            "another --seed; what the implementation cannot do belongs into its `limits`"
        )
        print(f"nsa-ref: {gap}", file=sys.stderr)
        return UNDECIDED
    if apart := unmet_pairs(records):
        gap = (
            f"not as thorough as it must be: no decided case had both of {', '.join(few(apart))}. "
            "Try another --seed; what the implementation cannot do belongs into its `limits`"
        )
        print(f"nsa-ref: {gap}", file=sys.stderr)
        return UNDECIDED
    return HOLDS


def _undecided(rows: Sequence[Clause]) -> int:
    """HOLDS; or UNDECIDED, with a line that names the clauses that are offered and no pass."""
    left = ", ".join(f"{row.id} is {row.verdict}" for row in rows if row.is_undecided)
    if not left:
        return HOLDS
    line = f"nsa-ref: nothing is broken, but not all is decided: {left}. Below the table stands why"
    print(line, file=sys.stderr)
    return UNDECIDED


class Found(Protocol):
    """What a run leaves: `Collector`, or the judge of answers."""

    records: list[Record]
    findings: list[Finding]
    errors: list[str]
    interrupted: bool


def _show(console: Console, collector: Found, names: str, **more: Any) -> int:
    """Show what was found, as far as the run came.

    Returns
    -------
    BROKEN, or HOLDS if the absence of findings means something

    Raises
    ------
    KeyboardInterrupt : the user ended the run
    CannotRun : nothing was found, and nothing was judged or not all
    """
    if collector.records or collector.findings:
        show(console, collector.records, collector.findings, **more)
        if os.environ.get("GITHUB_ACTIONS"):
            for first, *_ in grouped(collector.findings):
                print(annotation(first))
    if collector.interrupted:
        raise KeyboardInterrupt
    if collector.findings:
        for error in collector.errors:
            print(f"nsa-ref: {in_one_line(error)}", file=sys.stderr)
        return BROKEN
    if collector.errors:
        others = len(collector.errors) - 1
        raise CannotRun(collector.errors[0] + (f" (and {others} more like it)" if others else ""))
    if not any(record.cases or record.known for record in collector.records):
        if any(record.unreached for record in collector.records):
            raise CannotRun(f"the time was up before any case of {names} was judged: more --time")
        why = "; ".join(few([*dict.fromkeys(r for rec in collector.records for r in reasons(rec))]))
        raise CannotRun(f"nothing of {names} could be judged: {why or 'no case was tried'}")
    return HOLDS


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """A job that is cancelled reports what there is; one that nohup started goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    chosen = {number: was for number, was in before.items() if was is not signal.SIG_IGN}
    try:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in chosen:
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        with contextlib.suppress(ValueError):
            for number, was in chosen.items():
                signal.signal(number, was)


def fuzz(arguments: argparse.Namespace, console: Console) -> int:
    """Judge fresh cases, round after round, until the time is up."""
    folder = Folder(Path(arguments.findings).absolute())
    with folder.taken():
        found = try_loading(arguments.implementation, arguments.device, LOADING_TIMEOUT)
        _check_dtypes(arguments.dtype or (), found)
        fuzzing = Fuzzing(arguments, console, folder, found)
        if arguments.export:
            fuzzing.export()
            return HOLDS
        return BROKEN if fuzzing.go_on(arguments.time) else HOLDS


def replay(arguments: argparse.Namespace, console: Console) -> int:
    """Run one saved case again, with the property that it broke; or all those of a folder."""
    started = time.monotonic()
    path = Path(arguments.case)
    if path.is_dir():
        return _replay_folder(path, arguments, console)
    kept = read_kept(path, arguments.implementation, arguments.device)
    found = try_loading(kept.spec, kept.device, LOADING_TIMEOUT)
    name, case = kept.property or "all properties", kept.case
    say(console, f"replaying {name} on {kept.spec}, {found['device']}: ", case)
    collector = _run_kept(console, [kept], found, path.parent / "replays")
    chosen = [one["name"] for one in found["implementations"]]
    names = kept.implementation if kept.implementation in chosen else ", ".join(chosen)
    seconds = time.monotonic() - started
    title = f"{names} on {found['device']}"
    return _show(console, collector, names, title=title, seconds=seconds, edges=False)


def _replay_folder(folder: Path, arguments: argparse.Namespace, console: Console) -> int:
    """Run every case of a folder again, those of one implementation in one go."""
    started = time.monotonic()
    files = sorted(folder.glob("*.json"))
    if not files:
        raise CannotRun(f"the folder {folder} holds no case: none of its files ends in .json")
    rows: dict[Path, Replayed] = {}
    alike: dict[tuple[str, str, float], list[Kept]] = {}
    for file in files:
        try:
            kept = read_kept(file, arguments.implementation, arguments.device)
        except CannotRun as error:
            rows[file] = Replayed(file, "not judged", str(error))
        else:
            alike.setdefault((kept.spec, kept.device, kept.timeout), []).append(kept)
    interrupted = False
    for (spec, device, _), group in alike.items():
        try:
            found = try_loading(spec, device, LOADING_TIMEOUT)
            say(console, f"replaying {len(group)} cases on {spec}, {found['device']}")
            collector = _run_kept(console, group, found, folder / "replays")
        except CannotRun as error:
            rows |= {k.path: Replayed(k.path, "not judged", str(error)) for k in group}
            continue
        rows |= {k.path: replayed(k, collector.kept[i]) for i, k in enumerate(group)}
        for line in collector.errors:
            print(f"nsa-ref: {in_one_line(line)}", file=sys.stderr)
        if interrupted := collector.interrupted:
            break
    show_replays(
        console, [rows[file] for file in files if file in rows], time.monotonic() - started
    )
    if interrupted:
        raise KeyboardInterrupt
    verdicts = {row.verdict for row in rows.values()}
    return BROKEN if "fail" in verdicts else HOLDS if verdicts == {"pass"} else COULD_NOT_RUN


def _run_kept(
    console: Console, group: Sequence[Kept], found: dict[str, Any], findings: Path
) -> Collector:
    """pytest over kept cases that are named and timed alike.

    Where nothing can be written, what is broken is told all the same.
    """
    try:
        _check_findings(findings)
    except CannotRun as error:
        with temporary_folder() as folder:
            collector = _run_kept(console, group, found, Path(folder))
        for finding in collector.findings:
            finding["unsaved"] = str(error).partition(". Try")[0]
        return collector
    names = [one["name"] for one in found["implementations"]]
    total = sum(
        (1 if kept.property else len(PROPERTIES))
        * (1 if kept.implementation in names else len(names))
        for kept in group
    )
    return run_session(
        console,
        group[0].spec,
        found["device"],
        total=total,
        workers="auto",
        findings=findings,
        options=[
            f"--maxprocesses={len(group)}",
            f"--nsa-case-timeout={group[0].timeout}",
            *(f"--nsa-case={kept.path.resolve()}" for kept in group),
        ],
    )


def mutants(arguments: argparse.Namespace, console: Console) -> int:
    """Judge the zoo: every mutant must die of its clause."""
    started, names = time.monotonic(), list(dict.fromkeys(arguments.mutant)) or list(ZOO)
    for name in names:
        if name not in ZOO:
            raise CannotRun(f"{name!r} is no mutant; there are {', '.join(ZOO)}")
    layers = [name for name in names if isinstance(ZOO[name].implementation, TorchImplementation)]
    if layers and importlib.util.find_spec("torch") is None:
        raise CannotRun(f"{layers[0]} needs torch, which is not installed here")
    if arguments.json is not None:
        _check_writable(arguments.json, "json")
    suite = Path(__file__).parent / "mutants" / "suite.py"
    asked = [
        (name, limits, seed)
        for limits in COLUMNS
        for seed in range(arguments.seeds)
        for name in names
        # what cannot be met is shown once
        if not (seed and any(why_it_cannot_be_met(name, limits)))
    ]
    with temporary_folder() as folder:
        listed = Path(folder) / "trials.json"
        listed.write_text(json.dumps(asked))
        collector = run_session(
            console,
            "",
            "cpu",
            tests=[str(suite)],
            total=len(asked),
            workers=arguments.n,
            findings=Path(folder),
            options=[f"--basetemp={folder}/pytest", f"--nsa-trials={listed}"],
        )
    if collector.interrupted:
        raise KeyboardInterrupt
    if collector.errors and not collector.trials:
        raise CannotRun(collector.errors[0])
    ended = {(trial.name, trial.limits, trial.seed): trial for trial in collector.trials}
    trials = [ended.get(one) or worker_died(*one) for one in asked]
    show_trials(console, trials, time.monotonic() - started)
    report = {
        "device": "cpu",
        "versions": versions(),
        "limits": {name: column.to_json() for name, column in COLUMNS.items()},
        "mutants": [trial.to_json() for trial in trials],
        "found_by_one_property_alone": kills_of_its_own(trials),
    }
    texts = {arguments.json: lambda: json.dumps(report, indent=1) + "\n"} if arguments.json else {}
    unwritten = _write_all(texts)
    if not all(trial.right for trial in trials):
        return BROKEN
    return COULD_NOT_RUN if unwritten else HOLDS


def add_to_ledger(arguments: argparse.Namespace, console: Console) -> int:
    """Write the entry of a ledger that calls a finding known."""
    path = Path(arguments.case)
    path = told_by(path, read_case_file(path)[1])
    case, finding = read_case_file(path)
    name, spec = finding.get("property", ""), arguments.implementation or finding.get("spec")
    if name not in PROPERTIES or finding.get("clause") not in CLAUSES or not spec:
        raise CannotRun(f"{path} is no finding: it names no property, clause or implementation")
    found = try_loading(spec, arguments.device, LOADING_TIMEOUT)
    if not arguments.ledger and not found["ledgers"]:
        raise CannotRun(
            f"{spec} comes from no file that a ledger could stand beside: --ledger FILE"
        )
    ledger = Path(arguments.ledger or found["ledgers"][0])
    _check_writable(str(ledger))
    known = _checked_entries(ledger) if ledger.exists() else ()
    suite = Path(__file__).parent / "narrowing_suite.py"
    with tempfile.TemporaryDirectory(prefix="nsa-ref-", ignore_cleanup_errors=True) as folder:
        collector = run_session(
            console,
            spec,
            found["device"],
            tests=[str(suite)],
            total=SAMPLED + 1,
            workers="auto",
            findings=Path(folder),
            options=[f"--nsa-case={path.resolve()}"],
        )
    if collector.interrupted:
        raise KeyboardInterrupt
    if collector.errors:  # an entry from half of a sample may cover too much
        raise CannotRun(collector.errors[0])
    alike = of_one_cause(finding, path.parent)
    broken = [DIED] if "ended" in finding else [one["clause"] for one in alike]
    sample = collector.sampled.sample(case, broken)
    entry = entry_of(alike, narrowed(sample), [one.id for one in known])
    what = entry.clause, entry.method, entry.where
    for other in known:
        if what == (other.clause, other.method, other.where):
            raise CannotRun(f"the ledger has it already: {other.id}")
    before = read_text(ledger) + "\n" if ledger.exists() else ""
    write_text(ledger, before + to_toml(entry))
    say(console, to_toml(entry))
    fate = "die" if "ended" in finding else f"break {' or '.join(entry.clause)}"
    covered = sum(map(entry.covers, sample.passed))
    say(
        console,
        f"Written to {ledger}. Of the cases that it covers {len(sample.broken)} {fate} and "
        f"{covered} pass; {len(sample.passed) - covered} others pass.",
    )
    return HOLDS


def _checked_entries(path: Path) -> tuple[Entry, ...]:
    try:
        return read_ledger(path)
    except LedgerError as error:
        raise CannotRun(str(error)) from None


def diff(arguments: argparse.Namespace, console: Console) -> int:
    """Say what changed from one report to another."""
    old, new = (read_report(Path(name)) for name in (arguments.old, arguments.new))
    difference = compare(old, new)
    show_difference(console, difference)
    return BROKEN if difference.is_worse else HOLDS


def begin_port(arguments: argparse.Namespace, console: Console) -> int:
    """Write the files of a new port, which run as they are."""
    adapter, *others = begin(arguments.port, Path(), numpy=arguments.numpy)
    say(console, f"wrote {adapter}: put your own code in, and uncomment what you have")
    for path in others:
        say(console, f"wrote {path}")
    name = next(iter(re.findall(r"^class (\w+)", adapter.read_text("utf-8"), re.MULTILINE)))
    say(console, f"now: nsa-ref verify {adapter.stem}:{name}")
    return HOLDS


def explain_subject(arguments: argparse.Namespace, console: Console) -> int:
    """Say what a clause, a switch, a preset or a property is about."""
    try:
        page = explain(arguments.subject)
    except KeyError as error:
        (alike,) = error.args
        near = f"Did you mean {', '.join(alike)}?"
        if not alike:
            near = f"There are the clauses {', '.join(CLAUSES)}, the switches {', '.join(SWITCHES)}"
            near += f" and the presets {', '.join(PRESETS)}"
        raise CannotRun(
            f"{arguments.subject!r} is no clause, switch, preset or property. {near}"
        ) from None
    if console.is_terminal:
        console.print(Markdown(page))
    else:
        print(page, end="")
    return HOLDS


def show_case(arguments: argparse.Namespace, console: Console) -> int:
    """Draw the definition's masks of a case, in the terminal or into a PNG."""
    path = Path(arguments.case)
    case, _ = read_case_file(path)
    if not case.batch:
        raise CannotRun(f"{path}: with batch=0 there is no mask to draw")
    columns = max(case.kv_len + case.num_mem_kv, case.num_selected_blocks)
    if (cells := case.batch * case.q_heads * case.q_len * columns) > MOST_CELLS:
        raise CannotRun(
            f"{path}: a mask of {cells} cells is too large to be drawn, {MOST_CELLS} are the most"
        )
    masks = {branch.name: oracle_mask(branch, case)[0, 0] for branch in BRANCHES}
    say(console, case)
    if arguments.png:
        _check_writable(arguments.png, "png")
        try:
            draw_png(masks, Path(arguments.png))
        except OSError as error:
            raise CannotRun(f"cannot write {arguments.png}: {error.strerror}") from None
        say(console, f"wrote {arguments.png}")
        return HOLDS
    for name, mask in masks.items():
        rows, columns = mask.shape
        say(console, f"\n{name}, batch 0, query head 0: {rows} rows, {columns} columns")
        say(console, one_mask(mask))
    return HOLDS


def write_vectors(arguments: argparse.Namespace, console: Console) -> int:
    """Write golden vectors, for ports that Python cannot call."""
    _need_safetensors()
    from nsa_ref.testing.vectors import write

    started, folder = time.monotonic(), Path(arguments.folder)
    vectors = write(folder)["vectors"]
    size = sum(vector["bytes"] for vector in vectors) / 1e6
    seconds = time.monotonic() - started
    say(console, f"wrote {len(vectors)} vectors, {size:.0f} MB, in {seconds:.0f} s: {folder}")
    return HOLDS


def check(arguments: argparse.Namespace, console: Console) -> int:
    """Judge what another program answered to golden vectors."""
    _need_safetensors()
    from nsa_ref.testing.answers import judge_answers

    started, names = time.monotonic(), arguments.answers
    judged = judge_answers(Path(arguments.vectors), Path(names))
    seconds = time.monotonic() - started
    held_to = ", ".join(f"{dtype} as {' or '.join(rows)}" for dtype, rows in judged.rows.items())
    title = f"{names} ({held_to})" if held_to else names
    code = _show(console, judged, names, title=title, seconds=seconds, edges=False)
    return _undecided(clauses(judged.records, judged.findings)) if code == HOLDS else code


def _need_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise CannotRun("golden vectors need safetensors: pip install 'nsa-ref[vectors]'")


def draw_png(masks: dict[str, np.ndarray], path: Path) -> None:
    """One picture, one panel a branch; darker means counted more often.

    Raises
    ------
    CannotRun : matplotlib is not installed
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise CannotRun("--png needs matplotlib: pip install 'nsa-ref[pictures]'") from None
    figure = Figure(figsize=(4 * len(masks), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, mask) in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks.items()):
        if mask.size:
            axes.imshow(mask, cmap="Blues", vmin=0, vmax=max(1, mask.max()), aspect="auto")
        axes.set(title=name, xlabel="key j", ylabel="query t")
    figure.axes[0].set_xlabel("memory and compressed block i")
    figure.savefig(path, dpi=110, format="png")


#: How each kind of file begins that the command writes.
BEGINNINGS = {"json": b"{", "html": b"<!DOCTYPE", "junit": b"<testsuites", "png": b"\x89PNG"}


def _check_each_writable(files: dict[str, str | None]) -> None:
    """The same of several reports; no two of them are one file, unless it is a device."""
    named = {kind: file for kind, file in files.items() if file is not None}
    paths = [os.path.realpath(file) for file in named.values()]
    for (kind, file), path in zip(named.items(), paths):
        _check_writable(file, kind)
        if paths.count(path) > 1 and (os.path.isfile(path) or not os.path.exists(path)):
            raise CannotRun(f"{file} is to be written twice. Give each report a file of its own")


def _check_writable(file: str, kind: str = "") -> None:
    """Raise CannotRun now, not after the run, if the file cannot be written; leave nothing.

    kind : one of BEGINNINGS; another file is not written over, such as an adapter behind `--json`
    """
    path = Path(file)
    if not file:
        raise CannotRun("a file to write has no name. Name it, or leave its option out")
    try:
        existed = path.exists()
        # a pipe that nobody reads is not waited for
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666))
        if not existed:
            path.unlink()
        elif path.is_file() and os.access(path, os.R_OK):
            with path.open("rb") as old:
                begins = old.read(2**16).lstrip()
            if begins and not begins.startswith(BEGINNINGS.get(kind, b"")):
                raise CannotRun(f"{path} is there and no {kind} file. Try another path")
    except OSError as error:
        raise CannotRun(f"cannot write {path}: {error.strerror}. Try another path") from None


def _check_findings(path: Path) -> None:
    """The same for a folder."""
    try:
        check_folder(path)
    except OSError as error:
        why = f"{error.strerror}. Try --findings DIR"
        raise CannotRun(f"cannot write into the folder {path}: {why}") from None


def _parse_workers(text: str) -> str:
    if text != "auto" and not re.fullmatch("0*[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be auto or a number from 1 to 9999")
    return text


def _parse_count(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 to 9999")
    return int(text)


#: name -> what argparse is told about it; some say something else than for `verify`
FUZZ_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: about for name, about in SHARED_OPTIONS.items() if name != "--level"},
    "--seed": {
        "type": parse_seed,
        "help": "of all rounds (default: one that nobody else has; the folder keeps it)",
    },
    "--findings": {
        "metavar": "DIR",
        "default": "nsa-ref-fuzz",
        "help": "folder that keeps all that is known (default: nsa-ref-fuzz)",
    },
    "--time": {
        "type": parse_duration,
        "default": 600.0,
        "metavar": "TIME",
        "help": "how long, e.g. 30m or 8h (default: 10m)",
    },
    "--database": {
        "metavar": "DIR|redis://...",
        "help": "where Hypothesis keeps examples; several machines may share one through Redis",
    },
    "-n": {"type": _parse_workers, "default": "auto", "help": "worker processes"},
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> Any:
        raise CannotRun(f"{message}. See {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nsa-ref",
        description="Judge implementations of Native Sparse Attention, clause by clause.",
        epilog=f"presets, upstream's departures and all other pages: {pages_folder()}",
    )
    parser.add_argument("--version", action="version", version=f"nsa-ref {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about)
        command.set_defaults(run=run)
        return command

    command = add("verify", verify, "judge an implementation, clause by clause")
    what = f"package.module:object, or {', '.join(SHORT_NAMES)} (default nsa_fast)"
    command.add_argument("implementation", nargs="?", default="nsa_fast", help=what)
    for name, about in SHARED_OPTIONS.items():
        command.add_argument(name, **about)
    spend = "wall time to spend, e.g. 5m: small cases of every clause first (default: no end)"
    command.add_argument("--time", type=parse_duration, metavar="TIME", help=spend)
    command.add_argument("--json", metavar="FILE", help="write the report as data")
    command.add_argument("--html", metavar="FILE", help="write it as a page (needs jinja2)")
    command.add_argument("--junit", metavar="FILE", help="write it as XML that CI services show")
    warm = "first fill the compiler's cache, each graph once"
    command.add_argument("--warm", action="store_true", help=warm)
    strict = "an entry of the ledger that says nothing is an error"
    command.add_argument("--strict", action="store_true", help=strict)
    command.add_argument("-n", type=_parse_workers, default="auto", help="worker processes")

    command = add("fuzz", fuzz, "judge fresh cases until the time is up")
    command.add_argument("implementation", nargs="?", default="nsa_fast", help=what)
    for name, about in FUZZ_OPTIONS.items():
        command.add_argument(name, **about)
    explicit = "judge nothing: what was found becomes an explicit example for every later run"
    command.add_argument("--export", action="store_true", help=explicit)

    command = add("replay", replay, "run one saved case again, or a folder of them")
    command.add_argument("case", metavar="CASE.json|FOLDER")
    command.add_argument("implementation", nargs="?", help="default: the one it was found in")
    command.add_argument("--device", choices=DEVICES, help="default: the one it was found on")

    command = add("vectors", write_vectors, "write cases for ports that Python cannot call")
    command.add_argument("folder", metavar="DIR", help="a new or empty folder")

    command = add("check", check, "judge what another program answered to vectors")
    command.add_argument("vectors", metavar="DIR", help="what nsa-ref vectors wrote")
    command.add_argument("answers", metavar="ANSWERS", help="a folder with the answers")

    command = add("mutants", mutants, "judge the judge: every mutant must be found")
    command.add_argument("mutant", nargs="*", help="default: all")
    seeds = "try each with so many seeds (default: 1)"
    command.add_argument("--seeds", type=_parse_count, default=1, metavar="N", help=seeds)
    command.add_argument("--json", metavar="FILE", help="write the table as data")
    command.add_argument("-n", type=_parse_workers, default="auto", help="worker processes")

    command = add("new", begin_port, "write an adapter to fill in, its tests, ledger and workflow")
    command.add_argument("port", metavar="NAME", help="e.g. my_port")
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--torch", action="store_true", help="it takes tensors (default)")
    kind.add_argument("--numpy", action="store_true", help="it takes NumPy arrays")

    command = add("explain", explain_subject, "what a clause or a switch is about")
    command.add_argument("subject", help="a clause (W1), switch, preset or property")

    command = commands.add_parser("ledger", help="keep what is known to fail")
    actions = command.add_subparsers(dest="action", required=True)
    command = actions.add_parser("add", help="write an entry from a finding, as narrow as it is")
    command.add_argument("case", metavar="FINDING.json")
    command.add_argument("implementation", nargs="?", help="default: the one it was found in")
    command.add_argument("--device", default="auto", choices=DEVICES, help="default: the best")
    command.add_argument("--ledger", metavar="FILE", help="default: beside the implementation")
    command.set_defaults(run=add_to_ledger)
    command = add("diff", diff, "compare two reports of verify --json")
    command.add_argument("old", metavar="OLD.json")
    command.add_argument("new", metavar="NEW.json")

    command = add("show", show_case, "draw a case's masks")
    command.add_argument("case", metavar="CASE.json")
    command.add_argument("--png", metavar="FILE", help="into a picture (needs matplotlib)")
    return parser


class Output:
    """Standard output as a run needs it: a full disk, or a pipe that was closed, ends no run.

    error : the first; nothing is written after it
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """What the terminal's encoding has not is written out, such as \\u2502."""
        encoding = self._file.encoding or "utf-8"
        try:
            self._file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.error = self.error or error
        with contextlib.suppress(OSError):  # or Python itself fails, when it ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def main(argv: list[str] | None = None) -> int:
    """The console script."""
    output = Output(sys.stdout)
    with contextlib.redirect_stdout(output):
        try:
            code = _main(argv)
        finally:
            output.flush()
    if output.error is not None:
        line = f"nsa-ref: not all could be printed: {output.error.strerror}"
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)
    return COULD_NOT_RUN if output.error is not None and code != BROKEN else code


def _main(argv: list[str] | None) -> int:
    """What the command says, with 2 and one line for whatever goes wrong."""
    console = Console()
    try:
        arguments = _parser().parse_args(argv)
        with _ended_as_by_ctrl_c():
            return int(arguments.run(arguments, console))
    except SystemExit as ended:  # argparse's, behind --help and --version
        return int(ended.code or HOLDS)
    except CannotRun as error:
        line = str(error)
    except KeyboardInterrupt:
        line = "interrupted; what was found so far is kept"
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        line = f"{what}{error.strerror or one_line(error)}"
    except MemoryError as error:
        line = f"memory ran out ({one_line(error)})"
    except Exception as error:
        line = f"{one_line(error)} at {place(error)}, which is a mistake of nsa-ref's own"
    with contextlib.suppress(OSError):
        print(f"nsa-ref: {in_one_line(line)}", file=sys.stderr)
    return COULD_NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
