"""pytest options for a conformance suite, and what its tests need of a worker process.

Load it with `-p nsa_ref.testing.plugin`, or by naming it in a conftest's `pytest_plugins`. Tests
beside those of the suite do not notice it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from nsa_ref.testing import silence
from nsa_ref.testing.case import Case
from nsa_ref.testing.files import check_folder
from nsa_ref.testing.findings import Finding, grouped
from nsa_ref.testing.handing_over import memory_filled
from nsa_ref.testing.last_words import (
    begin_worker,
    finding_of_dead_worker,
    hold_folder_of_run,
    remove_folder_of_run,
    where_it_was,
    worker_id,
)
from nsa_ref.testing.ledger import LedgerError, read_ledger
from nsa_ref.testing.loading import CannotRun, load, resolve_device
from nsa_ref.testing.options import SHARED_OPTIONS, Options, destination, option_name
from nsa_ref.testing.replays import read_case_file
from nsa_ref.testing.swarm import Round
from nsa_ref.testing.wording import annotation, message, printable

#: The implementations that `suite.py` judges, from --nsa-implementation; and --device, for test
#: files that choose an implementation by it.
implementations: list = []
device = "auto"

#: The suite warms them up and judges nothing, from --nsa-warm.
warming = False

#: The suite gives every property several turns, because --nsa-deadline ends the run.
in_turns = False

#: The round of fuzzing that the suite is part of, from --nsa-round.
round: Round | None = None

#: The cases that the suite runs again, from --nsa-case.
kept: list[tuple[Case, Finding]] = []


#: What a worker process has while it judges. One thread each: there are as many workers as cores.
#: glibc fills the memory that an implementation gets: -1.7e38 or NaN (each byte is 0xFF ^ 1). An
#: output that is not written does not hold what an earlier, right run left there.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "1"}


def ignore_ctrl_c() -> Any:
    """Make this process ignore Ctrl-C; what it did before.

    Ctrl-C reaches the process that hands out the tests, which ends the workers: there, only the
    implementation can raise KeyboardInterrupt.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        return signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _as_worker() -> Iterator[None]:
    """One thread, memory that is filled and no Ctrl-C, and afterwards all as it was.

    What somebody has chosen in the environment stays.
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ |= missing
    torch = sys.modules.get("torch") if "OMP_NUM_THREADS" in missing else None
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    interrupts = ignore_ctrl_c()
    byte = missing.get("MALLOC_PERTURB_")
    try:
        with memory_filled(int(byte)) if byte else contextlib.nullcontext():
            yield
    finally:
        if interrupts is not None:
            signal.signal(signal.SIGINT, interrupts)
        if torch:
            torch.set_num_threads(threads)
        for name in missing:
            os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Conformance tests have a worker process as they need it; other tests have it as it was."""
    judges = hasattr(getattr(item, "function", None), "nsa_ref_property")
    if judges:
        if refused := getattr(item.config, "nsa_ref_refused", ""):
            pytest.fail(refused, pytrace=False)
        silence.say("judging", silence.JUDGING)
    try:
        with _as_worker() if judges and worker_id() is not None else contextlib.nullcontext():
            return (yield)
    finally:
        silence.say("idle")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa-ref", "judging an implementation of Native Sparse Attention")
    for name, about in SHARED_OPTIONS.items():
        group.addoption(option_name(name), dest=destination(name), **about)
    group.addoption("--nsa-implementation", default="", help="for nsa-ref verify")
    group.addoption("--nsa-warm", action="store_true", help="for nsa-ref verify --warm")
    group.addoption("--nsa-questions", default="", help="for nsa-ref verify: what is to be tried")
    group.addoption("--nsa-trials", default="", help="for nsa-ref mutants: what is to be tried")
    deadline = "for nsa-ref verify --time: when the time is up"
    group.addoption("--nsa-deadline", type=float, default=math.inf, help=deadline)
    group.addoption("--nsa-round", default="", help="for nsa-ref fuzz: what this round asks")
    group.addoption("--nsa-examples", default="", help="for nsa-ref fuzz: the database's folder")
    group.addoption("--nsa-shared", default="", help="for nsa-ref fuzz: the database's server")
    group.addoption("--nsa-case", action="append", help="for nsa-ref replay: run this file's case")


def pytest_configure(config: pytest.Config) -> None:
    global device, warming, in_turns, round
    device, warming = config.getoption("--nsa-device"), config.getoption("--nsa-warm")
    ledger = Path(named).absolute() if (named := config.getoption("--nsa-ledger")) else None
    try:
        kept[:] = [read_case_file(Path(file)) for file in config.getoption("--nsa-case") or ()]
        if ledger is not None:
            read_ledger(ledger)
    except (CannotRun, LedgerError) as error:
        raise pytest.UsageError(str(error)) from None
    spec = config.getoption("--nsa-implementation")
    if not spec and worker_id() is None:
        _check_place(config)
    if file := config.getoption("--nsa-round"):
        round = Round.from_json(json.loads(Path(file).read_text()))
    in_turns = round is None and config.getoption("--nsa-deadline") < math.inf
    config.nsa_ref_options = Options(  # type: ignore[attr-defined]
        spec=spec,
        level=config.getoption("--nsa-level"),
        dtypes=tuple(config.getoption("--nsa-dtype") or ()),
        seed=round.seed if round else config.getoption("--nsa-seed"),
        examples=config.getoption("--nsa-examples"),
        shared=config.getoption("--nsa-shared"),
        seconds=round.seconds if round else math.inf,
        # workers may run in another directory
        findings=Path(config.getoption("--nsa-findings")).absolute(),
        ledger=ledger,
        timeout=config.getoption("--nsa-case-timeout"),
        deadline=config.getoption("--nsa-deadline"),
        traces=True,
    )
    if distributes(config):
        if config.option.testrunuid is None:  # xdist would draw one and keep it to itself
            config.option.testrunuid = uuid.uuid4().hex
        return
    begin_worker(config.nsa_ref_options)  # type: ignore[attr-defined]
    # the process that hands out the tests never loads the implementation
    if spec:
        silence.say("loading", silence.LOADING)
        try:
            device_of_spec = resolve_device(config.getoption("--nsa-device"), spec)
            implementations[:] = load(spec, device_of_spec)
        except CannotRun as error:
            raise pytest.UsageError(str(error)) from None
        if round:
            asked = [i for i in implementations if i.name == round.implementation]
            implementations[:] = map(round.of, asked)
        silence.say("idle")


def _check_place(config: pytest.Config) -> None:
    """UsageError for a device that is not here, and for findings that could not be written."""
    try:
        if (named := config.getoption("--nsa-device")) != "auto":
            resolve_device(named)
    except CannotRun as error:
        raise pytest.UsageError(f"--nsa-{str(error).removeprefix('--')}") from None
    folder = config.getoption("--nsa-findings")
    if folder == SHARED_OPTIONS["--findings"]["default"]:
        return  # nobody has asked for it, and findings are in the report as well
    try:
        check_folder(Path(folder))
    except OSError as error:
        raise pytest.UsageError(
            f"--nsa-findings {folder}: cannot write there: {error.strerror}"
        ) from None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """From the first worker on, the process that hands out the tests listens to them."""
    config = session.config
    if distributes(config):
        options = config.nsa_ref_options  # type: ignore[attr-defined]
        folder = hold_folder_of_run(options.findings, config.option.testrunuid)
        config.nsa_ref_watch = silence.Watch(folder, options.timeout)  # type: ignore[attr-defined]
        config.nsa_ref_watch.start()  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker that has ended needs to say nothing."""
    node.config.nsa_ref_watch.forget(node.gateway.id)


def loading_that_hangs(node: Any) -> str:
    """Where loading hangs, if the worker was ended for that; nothing if not."""
    ended = node.config.nsa_ref_watch.ended.get(node.gateway.id)
    if ended is None or ended.doing != "loading":
        return ""
    options, run = node.config.nsa_ref_options, node.workerinput["testrunuid"]
    where = "".join(
        f" at {place}" for place in where_it_was(options.findings, run, node.gateway.id)
    )
    return (
        "loading the implementation works in one process and hangs in the workers: no end after "
        f"{ended.seconds:g} s{where}"
    )


def distributes(config: pytest.Config) -> bool:
    """Whether this process hands the tests out to others."""
    return getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the judge's tests that --nsa-branch does not ask for; refuse a dtype of none."""
    functions: list[Any] = [getattr(item, "function", None) for item in items]
    judged = [f.nsa_ref_implementation for f in functions if hasattr(f, "nsa_ref_implementation")]
    declared = {dtype for implementation in judged for dtype in implementation.numerics}
    for dtype in config.getoption("--nsa-dtype") or ():
        if judged and dtype not in declared:
            names = ", ".join(dict.fromkeys(implementation.name for implementation in judged))
            known = ", ".join(sorted(declared))
            line = printable(f"--nsa-dtype {dtype}: {names} declare {known}")
            if worker_id() is None:
                raise pytest.UsageError(line)
            config.nsa_ref_refused = line  # type: ignore[attr-defined]
    wanted = config.getoption("--nsa-branch")
    if not wanted:
        return
    asked: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        branch = getattr(getattr(item, "function", None), "nsa_ref_branch", None)
        (asked if branch is None or branch in wanted else dropped).append(item)
    items[:] = asked
    if dropped:
        config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: Any) -> None:
    """A property whose worker died is reported with the case that did it."""
    node, test = report.node, crashitem.rpartition("::")[2]
    folder, worker = node.config.nsa_ref_options.findings, node.gateway.id
    run, silent = node.workerinput["testrunuid"], node.config.nsa_ref_watch.ended.get(worker)
    record = finding_of_dead_worker(test, worker, run, folder, silent, _exit_code(node.gateway))
    if record is not None:
        report.longrepr = (
            f"{test}: {record.lost}" if record.finding is None else message(record.finding)
        )
        report.user_properties.append(("nsa_ref", record.to_json()))


def _exit_code(gateway: Any) -> int | None:
    """Of a worker process that has ended; None if it is on another machine."""
    with contextlib.suppress(AttributeError, subprocess.TimeoutExpired):
        code: int = gateway._io.popen.wait(timeout=5)
        return code
    return None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What the workers left to be read by `pytest_handlecrashitem` is needed no more."""
    if distributes(session.config):
        session.config.nsa_ref_watch.stop()  # type: ignore[attr-defined]
        findings = session.config.nsa_ref_options.findings  # type: ignore[attr-defined]
        remove_folder_of_run(findings, session.config.option.testrunuid)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """On GitHub a finding is an annotation of the run."""
    if not os.environ.get("GITHUB_ACTIONS"):
        return
    reports = terminalreporter.getreports("failed")
    records = [dict(report.user_properties).get("nsa_ref") for report in reports]
    for first, *_ in grouped(r["finding"] for r in records if r is not None and r["finding"]):
        terminalreporter.write_line(annotation(first))


def pytest_report_header(config: pytest.Config) -> str:
    """What is under test, and with which options."""
    options = config.nsa_ref_options  # type: ignore[attr-defined]
    return (
        f"nsa-ref: device {config.getoption('--nsa-device')}, level {options.level}, "
        f"seed {options.seed}, dtypes {', '.join(options.dtypes) or 'all declared'}"
    )
