"""A pytest session in worker processes, and what it gathers: how the command runs its suites."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa_ref.testing.case import Case
from nsa_ref.testing.causes import Question, fold, questions
from nsa_ref.testing.drawing import TURNS
from nsa_ref.testing.files import write_json
from nsa_ref.testing.findings import Finding, size_of
from nsa_ref.testing.mutants.trials import Trial
from nsa_ref.testing.narrowing import DIED, Sampled
from nsa_ref.testing.plugin import loading_that_hangs
from nsa_ref.testing.suites import number_of_kept
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import one_line, printable

#: What a run of ours loads into its workers, which are ours alone.
PLUGINS = ("nsa_ref.testing.plugin", "nsa_ref.testing.workers")

#: Seconds from one line to the next where the output is no terminal.
TOLD_EVERY = 20.0

#: A run ends when more workers than this died one after the other without judging anything.
IDLE_DEATHS = 3


class Collector:
    """Runs beside pytest: gathers the records of all workers and shows the progress."""

    def __init__(self, console: Console, total: int | None) -> None:
        self.records: list[Record] = []
        self.warmed: list[Record] = []
        self.trials: list[Trial] = []
        self.sampled = Sampled()
        self.answers: dict[int, str | None] = {}
        self.findings: list[Finding] = []
        self.kept: defaultdict[int, list[Record]] = defaultdict(list)
        self.errors: list[str] = []
        self.interrupted = False
        self._idle_deaths = 0
        self._progress = Progress(
            TextColumn("{task.description:46}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting the workers", total=total)
        self._console, self._over = console, threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Collector:
        self._progress.start()
        if not self._console.is_terminal:
            self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._progress.stop()

    def _tell(self) -> None:
        """A line now and then, where no bar moves: a log shows that the run goes on."""
        while not self._over.wait(TOLD_EVERY):
            task = self._progress.tasks[0]
            of = "" if task.total is None else f" of {task.total:g}"
            done = f"{task.elapsed or 0:.0f} s: {task.completed:g}{of} done"
            if self.records:
                cases = sum(record.cases for record in self.records)
                done += f", {cases} cases, {len(self.findings)} findings"
            say(self._console, done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One property is done, or died with its worker."""
        if report.when == "???":  # xdist's word for a test whose worker died: it did judge
            self._idle_deaths = 0
        properties: Any = dict(report.user_properties)
        if "nsa_ref_warm" in properties and report.when == "call":
            self.warmed.append(Record.from_json(properties["nsa_ref_warm"]))
            self._advance("compiling what will be run")
        elif "nsa_ref_mutant" in properties and report.when == "call":
            self.trials.append(Trial(**properties["nsa_ref_mutant"]))
            self._advance(self.trials[-1].name)
        elif "nsa_ref_sampled" in properties and report.when == "call":
            self.sampled.add(properties["nsa_ref_sampled"])
            self._advance("judging cases like it")
        elif "nsa_ref_answer" in properties and report.when == "call":
            number, broken = properties["nsa_ref_answer"]
            self.answers[number] = broken
            self._advance("trying what the findings have in common")
        elif "nsa_ref" in properties and report.when in ("call", "???"):
            record = Record.from_json(properties["nsa_ref"])
            self.records.append(record)
            if record.lost:
                self.errors.append(f"{record.name}: {record.lost}")
            if record.finding is not None:
                self.findings.append(record.finding)
            test = report.nodeid.rpartition("::")[2]
            if (number := number_of_kept(test, record.name)) is not None:
                self.kept[number].append(record)
            broken = f", {len(self.findings)} broken" if self.findings else ""
            self._advance(f"{record.name}{broken}")
        elif report.failed and (died := re.search(r"::test_case\[(\d+)\]$", report.nodeid)):
            # it took its worker down, as the finding says
            self.sampled.add({"number": int(died[1]), "broken": DIED})
        elif report.failed and "asking_suite.py" in report.nodeid:
            pass  # a question without an answer: nothing is folded for it
        elif report.failed:
            name = report.nodeid.rpartition("::test_")[2]
            self.errors.append(f"{name}: {_error_line(report)}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A suite that cannot be collected is an error of the run."""
        if report.failed:
            self.errors.append(_error_line(report))

    def pytest_internalerror(self, excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
        """What goes wrong with the session itself is one line: its exception, not its traceback."""
        told = str(excinfo.value)
        # xdist raises a worker's traceback as the message of `assert False`
        of_worker = isinstance(excinfo.value, AssertionError) and told.startswith("Traceback")
        why = raised_in(told) if of_worker else one_line(excinfo.value)
        self.errors.append(f"the workers' session ended: {why}")
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node: Any) -> None:
        """What is sent to a worker that has just ended is lost with it, and ends no run.

        xdist hears of the end a little later, and hands out again what that worker was to do.
        """
        send = node.sendcommand

        def sent(name: str, **what: object) -> None:
            with contextlib.suppress(OSError):
                send(name, **what)

        node.sendcommand = sent

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """End the run if workers keep dying before they judge anything: xdist replaces each."""
        if hanging := loading_that_hangs(node):
            self.errors.append(hanging)
            self._end("loading hangs")
        if error:
            self._idle_deaths += 1
            if self._idle_deaths > IDLE_DEATHS:
                # of a worker that could still say why, the traceback
                why = str(error).strip().rpartition("\n")[2]
                self.errors.append(
                    "the worker processes die before they have judged anything: loading the "
                    f"implementation works in one process and not in the workers ({why})"
                )
                self._end("workers die")

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Ctrl-C: what there is will be reported."""
        self.interrupted = excinfo.errisinstance(KeyboardInterrupt)
        self._leave_workers()

    def _end(self, why: str) -> NoReturn:
        self._leave_workers()
        pytest.exit(why, returncode=pytest.ExitCode.INTERNAL_ERROR)

    def _leave_workers(self) -> None:
        """A worker that is busy with a case does not hear that the session is over."""
        with contextlib.suppress(ImportError):
            from xdist.workermanage import NodeManager

            NodeManager.EXIT_TIMEOUT = 1

    def _advance(self, description: str) -> None:
        self._idle_deaths = 0
        self._progress.update(self._task, advance=1, description=description)

    def join_turns(self) -> None:
        """One record, and one finding, of each property; it is lost if one of its turns is."""
        joined: dict[tuple[str, str], Record] = {}
        ended: Counter[tuple[str, str]] = Counter()
        for record in self.records:
            whose = record.name, record.implementation
            ended[whose] += 1
            if whose in joined:
                joined[whose].add(record)
            else:
                joined[whose] = record
        for whose, record in joined.items():
            if ended[whose] < TURNS:
                record.lost = record.lost or f"{ended[whose]} of its {TURNS} turns came to an end"
            record.settle()
        self.records[:] = joined.values()
        smallest: dict[str, Finding] = {}
        for finding in sorted(self.findings, key=lambda f: size_of(Case.from_json(f["case"]))):
            smallest.setdefault(finding["file"], finding)
        self.findings[:] = smallest.values()
        for record in self.records:
            if record.finding is not None:
                record.unreached = 0
                record.finding = smallest[record.finding["file"]]


def raised_in(traceback: str) -> str:
    """The line of a traceback's last exception; its message may go on below, and notes."""
    lines = traceback.strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith('File "')]
    if not frames:
        return lines[-1]

    def depth(line: str) -> int:
        return len(line) - len(line.lstrip())

    # pytest may have moved all of it to the right
    of_frame = depth(lines[frames[-1]])
    behind = (line.strip() for line in lines[frames[-1] + 1 :] if depth(line) < of_frame)
    return next(filter(None, behind), lines[-1])


def _error_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The exception's type and message; of several that led to one another, the last one's."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message).partition("\n")[0]
    lines = report.longreprtext.strip().splitlines()
    # the lines of one exception stand together, and what Hypothesis notes about it comes last
    first = [i for i, line in enumerate(lines) if line[:3] == "E  " != lines[i - 1][:3]]
    return lines[first[-1]][1:].strip() if first else (lines or [""])[-1]


def run_session(
    console: Console,
    spec: str,
    device: str,
    *,
    total: int | None,
    workers: str,
    findings: Path,
    options: list[str],
    tests: Sequence[str] = (),
    gather: Callable[[Console, int | None], Collector] = Collector,
) -> Collector:
    """pytest over these tests, or the conformance suite, in workers; it says nothing itself."""
    suite = Path(__file__).parent / "suite.py"
    with gather(console, total) as collector, _own_pytest():
        code = pytest.main(
            [
                *(tests or [str(suite)]),
                *(f"-p{name}" for name in ("xdist", *PLUGINS)),
                *(f"-pno:{name}" for name in ("terminal", "cacheprovider", "faulthandler")),
                f"-c{os.devnull}",
                f"--rootdir={suite.parent}",
                "--noconftest",
                f"-n{workers}",
                "--dist=worksteal",
                "--max-worker-restart=10000",
                f"--nsa-device={device}",
                f"--nsa-findings={findings.resolve()}",
                f"--nsa-implementation={spec}",
                *options,
            ],
            plugins=[collector],
        )
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        if not collector.errors:
            collector.errors.append(f"pytest ended with exit code {int(code)}, see above")
    elif code == pytest.ExitCode.INTERRUPTED:
        collector.interrupted = True
    return collector


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nsa-ref-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def _own_pytest() -> Iterator[None]:
    """Ignore the user's pytest options and plugins, which may change the run.

    Hypothesis keeps its caches out of the user's folder, too.
    """
    before = dict(os.environ)
    with temporary_folder() as folder:
        os.environ.pop("PYTEST_ADDOPTS", None)
        os.environ.pop("PYTEST_PLUGINS", None)
        os.environ.pop("PYTHONIOENCODING", None)  # xdist speaks to its workers in plain letters
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", folder)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def say(console: Console, *parts: object) -> None:
    """Print as it is: brackets are brackets, and a long line stays one line."""
    text = printable("".join(map(str, parts)))
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def answers_to(
    asked: Sequence[Question], run: Callable[..., Collector], deadline: float | None = None
) -> dict[int, str | None]:
    """What the port says to questions about findings: number of a question -> `answered`."""
    if not asked:
        return {}
    with temporary_folder() as folder:
        listed = Path(folder) / "questions.json"
        listed.write_text(json.dumps([question.to_json() for question in asked]))
        suite = Path(__file__).parent / "asking_suite.py"
        options = [f"--nsa-questions={listed}"]
        if deadline is not None:
            options.append(f"--nsa-deadline={deadline}")
        return run(total=len(asked), tests=[str(suite)], options=options).answers


def fold_findings(
    findings: Sequence[Finding],
    run: Callable[..., Collector],
    console: Console,
    deadline: float | None = None,
) -> None:
    """Find out which findings, in the order of `by_weight`, have one cause; and write it down."""
    asked = questions(findings)
    if asked:
        say(console, f"{len(findings)} findings: judging {len(asked)} cases to see their causes")
    fold(findings, asked, answers_to(asked, run, deadline))
    for finding in findings:
        with contextlib.suppress(OSError):  # it was kept before, or says why not
            write_json(Path(finding["file"]), finding)
