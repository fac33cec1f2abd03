"""What a worker process leaves behind when it dies: its case, and where it was.

A case is written to a file of the worker's own before it is launched, so that a crash, an abort or
a hang is a finding with its case (`finding_of_dead_worker`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import functools
import json
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from nsa_ref.testing import silence
from nsa_ref.testing.case import Case
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.files import Rewritten, write_json
from nsa_ref.testing.findings import (
    Finding,
    broken_data,
    described,
    remove_if_empty,
    save_finding,
)
from nsa_ref.testing.handing_over import Clock, timed
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.silence import Silence
from nsa_ref.testing.verdicts import Broken, Failure, Record

#: A case with tensors of more than 2^31 elements may take so many times as long as another one:
#: they are copied to their device and back.
LARGE_TIME_FACTOR = 5


#: The file that the process of a run keeps locked.
LOCK = "run.lock"

#: Signals by which somebody else ends a process: the system, where memory runs out, or a user.
NOT_ITS_OWN = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)

#: So many cases of a property say how slow the port is.
FIRST_CASES = 3

#: A case may take so many times as long as the slowest of those: the smallest makes one call where
#: one of some tokens and heads makes a hundred. It never has more than so many timeouts.
CALLS, MOST_TIMEOUTS = 100, 10


def grown_timeout(timeout: float, first: Sequence[float]) -> float:
    """Seconds for a case of a property whose first ones took so long; never less than `timeout`."""
    return min(max([timeout, *(CALLS * seconds for seconds in first)]), MOST_TIMEOUTS * timeout)


def worker_id() -> str | None:
    """The pytest-xdist worker that this process is, if it is one."""
    return os.environ.get("PYTEST_XDIST_WORKER")


def folder_of_run(findings: Path, run: str) -> Path:
    """Where the workers of one run write which case they are about to launch."""
    return findings / "running" / run


def own_folder(options: Options) -> Path:
    return folder_of_run(options.findings, os.environ.get("PYTEST_XDIST_TESTRUNUID", ""))


def begin_worker(options: Options) -> None:
    """Let this worker, if it is one, say what it does; and where it was, while it loads."""
    if (worker := worker_id()) is not None:
        folder = own_folder(options)
        # a worker that another program started is not watched
        with contextlib.suppress(OSError):
            if (folder / LOCK).read_text() == str(os.getppid()):
                silence.begin(folder / f"{worker}.sign")
                silence.end_with_parent()
        with contextlib.suppress(OSError):
            if options.spec:  # elsewhere pytest's own trace is still to come
                _trace_file(folder / f"{worker}.trace")


@contextlib.contextmanager
def announced(
    prop: Property, implementation: Implementation, options: Options, case: Case
) -> Iterator[Clock | None]:
    """Write the case down before it is launched; end this worker if the port takes too long.

    Only in a worker process, which then has a clock: the run's own process must not be ended. The
    file stays until `withdraw`, because a crash may come a little later than its cause.
    """
    worker = worker_id()
    if worker is None:
        yield None
        return
    silence.say("judging", silence.JUDGING)
    folder = own_folder(options)
    path = folder / f"{worker}.json"
    trace: TextIO | None = sys.__stderr__
    try:
        _announcement(path).write(described(prop, implementation, options, case))
        trace = _trace_file(folder / f"{worker}.trace") if options.traces else trace
    except OSError:
        # a crash is told without its case then, and not with the case before
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    assert trace is not None
    with timed(timeout_of(prop, implementation.device, options.timeout), trace) as clock:
        yield clock


def timeout_of(prop: Property, device: str, timeout: float) -> float:
    """Seconds that a case of this property may take on this device."""
    large = LARGE_TIME_FACTOR if prop.extent == "large" else 1
    return timeout * device_of(device).time_factor * large


def note_broken(prop: Property, implementation: str, folder: Path) -> None:
    """Tell all workers that this property has its finding: its later turns need none."""
    with contextlib.suppress(OSError):
        write_json(_file_of_turns(prop, implementation, folder, "broken"), {})


def is_known_to_break(prop: Property, implementation: Implementation, options: Options) -> bool:
    """Whether a worker of this run has noted a finding of this property."""
    folder = own_folder(options)
    return _file_of_turns(prop, implementation.name, folder, "broken").exists()


def leave_to_turns(
    prop: Property, implementation: Implementation, options: Options, numbers: Sequence[int]
) -> None:
    """Tell the later turns of a property which of its cases this one had no time for."""
    path = _file_of_turns(prop, implementation.name, own_folder(options), f"left-{options.turn}")
    if numbers:
        with contextlib.suppress(OSError):
            write_json(path, {"numbers": numbers})


def left_by_turns(prop: Property, implementation: Implementation, options: Options) -> list[int]:
    """The numbers of the cases that earlier turns have left, which are left no more."""
    numbers: list[int] = []
    for turn in range(options.turn or 0):
        folder = own_folder(options)
        path = _file_of_turns(prop, implementation.name, folder, f"left-{turn}")
        with contextlib.suppress(FileNotFoundError):
            numbers += json.loads(path.read_text())["numbers"]
            path.unlink()
    return sorted(numbers)


def _file_of_turns(prop: Property, implementation: str, folder: Path, what: str) -> Path:
    return folder / f"{prop.name}-{zlib.crc32(implementation.encode())}-{what}.json"


#: The file in which this worker says which case it is about to launch.
_announcement = functools.cache(Rewritten)

_trace_files: dict[Path, TextIO] = {}


def _trace_file(path: Path) -> TextIO:
    """The file to which Python writes its stack when it dies; kept open."""
    if path not in _trace_files:
        _trace_files[path] = path.open("w")
        faulthandler.enable(file=_trace_files[path])
    return _trace_files[path]


def withdraw(options: Options) -> None:
    """Remove this worker's announcement: its property is done."""
    if (worker := worker_id()) is None:
        return
    folder = own_folder(options)
    (folder / f"{worker}.json").unlink(missing_ok=True)
    remove_if_empty(folder, folder.parent, options.findings)


def end_worker(finding: Finding, options: Options) -> NoReturn:
    """End this worker, whose device is lost; another one takes over, on a device that answers.

    `finding_of_dead_worker` reports the finding from what is written here.
    """
    path = own_folder(options) / f"{worker_id()}.json"
    with contextlib.suppress(OSError):
        write_json(path, finding | {"ended": "device"})
    os._exit(1)


def finding_of_dead_worker(
    test: str,
    worker: str,
    run: str,
    findings: Path,
    silent: Silence | None = None,
    code: int | None = None,
) -> Record | None:
    """What became of a property whose worker died.

    test : the name of its test function
    silent : why the worker was ended, if it was
    code : of its process: an exit status, or less a signal; None if it is not known
    returns : None if the test is no property's; a record that is `lost` if the worker died outside
        of any case, or was ended by others, which is no fault of the port's that could be proved
    """
    name = test.removeprefix("test_")
    known = [p for p in PROPERTIES if name == p or name.startswith(f"{p}_")]
    if not known:
        return None
    prop = PROPERTIES[max(known, key=len)]
    record = Record(name=prop.name, clause=prop.clause)
    folder = folder_of_run(findings, run)
    path = folder / f"{worker}.json"
    try:
        finding = json.loads(path.read_text())
    except (OSError, ValueError):  # there is none, or a worker died while it wrote it
        record.lost = f"its worker process {_death(silent, code)}, outside of any case"
        return record
    path.unlink()
    if "ended" not in finding:
        last_words = _last_words(folder, worker)
        # whoever stopped it, the port or somebody else, it had no time to answer
        is_stopped = silent is not None and silent.stopped
        hangs = last_words.startswith("Timeout") or (silent and silent.doing == "waiting")
        hangs = hangs and not is_stopped
        ended_by_others = code is not None and -code in NOT_ITS_OWN
        if not hangs and (silent or ended_by_others):
            case = Case.from_json(finding["case"])
            record.lost = f"its worker process {_death(silent, code)}; it was at {case}"
            return record
        if hangs:
            seconds = timeout_of(prop, finding["device"], finding["timeout"])
            what = f"it hangs: no answer after {seconds:g} s"
        else:
            what = f"it ended its process ({_way(code) or 'a crash, an abort or an exit'})"
            if last_words.startswith("Fatal Python error"):
                what += f": {last_words.splitlines()[0].removeprefix('Fatal Python error: ')}"
        finding["ended"] = "hang" if hangs else "crash"
        failure = Failure(
            kind=finding["ended"], tensor=prop.method, what=what, where=_frames(last_words)
        )
        finding |= broken_data(Broken(prop.clause, failure))
    record.implementation, record.cases = finding["implementation"], 1
    note_broken(prop, record.implementation, folder)
    record.finding = save_finding(finding, findings)
    return record


def _death(silent: Silence | None, code: int | None) -> str:
    """How a worker ended that no case is to blame for."""
    if silent is not None:
        if silent.stopped:
            return "was stopped, by itself or by others, and is ended"
        return f"said nothing for {silent.seconds:g} s, and is ended"
    if code is not None and -code in NOT_ITS_OWN:
        return f"was ended by others ({_way(code)}), as by a system whose memory runs out"
    return f"died ({way})" if (way := _way(code)) else "died"


def _way(code: int | None) -> str:
    """The exit status, or the signal, of a process."""
    if code is None or code >= 0:
        return "" if code is None else f"exit status {code}"
    with contextlib.suppress(ValueError):
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"signal {-code}"


def where_it_was(findings: Path, run: str, worker: str) -> tuple[str, ...]:
    """Lines of the implementation, the outermost first, in which a worker was when it ended."""
    return _frames(_last_words(folder_of_run(findings, run), worker))


def _last_words(folder: Path, worker: str) -> str:
    with contextlib.suppress(OSError):
        return (folder / f"{worker}.trace").read_text(errors="replace")
    return ""


def _frames(last_words: str) -> tuple[str, ...]:
    """Of the thread that ran the case, the line of the adapter and the innermost one."""
    here = str(Path(__file__).parent)
    for thread in last_words.split("\n\n"):
        frames = [line for line in thread.splitlines() if line.startswith("  File")]
        ours = [i for i, line in enumerate(frames) if here in line]
        # threads of the judge's own have no frame before ours
        if ours and ours[0]:
            others = [frame for frame in frames[: ours[0]] if "importlib" not in frame]
            theirs = [frame.removeprefix("  File ") for frame in others]
            return tuple(dict.fromkeys([*theirs[-1:], *theirs[:1]]))
    return ()


def hold_folder_of_run(findings: Path, run: str) -> Path:
    """The folder, which tells others as long as this process lives that its cases are running.

    Its lock holds the number of this process, which listens to its workers.
    """
    folder = folder_of_run(findings, run)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _held[folder] = (folder / LOCK).open("w")
        fcntl.flock(_held[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held[folder].write(str(os.getpid()))
        _held[folder].flush()
    return folder


#: folder of a run of this process -> its file, which is locked
_held: dict[Path, TextIO] = {}


def left_running(findings: Path) -> dict[Path, list[Path]]:
    """Folders of runs that were killed -> the cases that were running there."""
    found = {}
    for folder in sorted((findings / "running").glob("*")):
        with contextlib.suppress(OSError), (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found[folder] = sorted(folder.glob("gw[0-9]*.json"))
    return found


def remove_folder_of_run(findings: Path, run: str) -> None:
    """Remove what the workers of a finished run left, and folders that hold nothing then."""
    folder = folder_of_run(findings, run)
    shutil.rmtree(folder, ignore_errors=True)
    if (lock := _held.pop(folder, None)) is not None:
        # what a full disk had no room for is tried once more, and that is no matter
        with contextlib.suppress(OSError):
            lock.close()
    remove_if_empty(findings / "running", findings)
