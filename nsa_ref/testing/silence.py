"""A worker that says nothing any more is ended by the process that hands out the tests.

A clock of its own could be cancelled by the implementation, or stopped with the whole process. So
it keeps writing what it does, and for how long it may, into a file of 32 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

#: Loading the implementation, judging, waiting for it to answer, or none of these.
Doing = Literal["idle", "loading", "judging", "waiting"]

#: Seconds that loading an implementation may take where several processes do it at once.
LOADING = 240.0

#: Seconds that the judge may take between two calls: the largest cases take it minutes.
JUDGING = 1800.0

#: Seconds from one look at all workers to the next.
EVERY = 0.5

#: What a file holds: process, what it does, how often that has changed, seconds that it may take.
_FORMAT = struct.Struct("=QQQd")

_file: int | None = None
_said = 0

#: Of Linux: a process may have a signal sent to it when its parent ends.
_PR_SET_PDEATHSIG = 1

#: Whether the system ends this process with its parent.
is_bound = False


def begin(path: Path) -> None:
    """Let this worker write into a file; where nothing can be written, nobody is told anything."""
    global _file
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)


def end_with_parent() -> None:
    """Let the system end this worker with the process that listens, its parent, where it can."""
    global is_bound
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        is_bound = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0


def say(doing: Doing, seconds: float = math.inf) -> bool:
    """Write what this worker does from now on, and for how long it may; whether that is written."""
    global _said
    if _file is None:
        return False
    _said += 1
    number = get_args(Doing).index(doing)
    with contextlib.suppress(OSError):
        os.pwrite(_file, _FORMAT.pack(os.getpid(), number, _said, seconds), 0)
        return True
    return False


@dataclass(frozen=True)
class Silence:
    """Why a worker was ended.

    doing, seconds : what it did, and how long it might have
    stopped : its process had been stopped, as by SIGSTOP
    """

    doing: Doing
    seconds: float
    stopped: bool


@dataclass
class _Watched:
    """said : the number of what a worker wrote last; silent : seconds since then"""

    said: int = -1
    silent: float = 0.0
    ended: int = 0


@dataclass
class Watch:
    """Looks after the workers whose files lie in a folder; `ended` says whom it has ended, and why.

    stopped : seconds after which a process that is stopped is ended, whatever it did
    """

    folder: Path
    stopped: float
    ended: dict[str, Silence] = field(default_factory=dict)
    _workers: dict[str, _Watched] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)
    _over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def forget(self, worker: str) -> None:
        """It has ended; another process may get its number."""
        self._gone.add(worker)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(EVERY):
            now = time.monotonic()
            # whoever was stopped himself, or sent to sleep, has not listened meanwhile
            self.look(min(now - before, 2 * EVERY))
            before = now

    def look(self, seconds: float) -> None:
        """See who has written nothing for too long; so many seconds have passed since the last."""
        for path in self.folder.glob("*.sign"):
            worker = path.stem
            if worker in self._gone:
                continue
            try:
                pid, number, said, allowed = _FORMAT.unpack(path.read_bytes())
            except (OSError, struct.error):
                continue
            known = self._workers.setdefault(worker, _Watched())
            known.silent = known.silent + seconds if said == known.said else 0.0
            known.said = said
            is_stopped = _is_stopped(pid)
            if is_stopped is None:
                continue
            most = min(allowed, self.stopped) if is_stopped else allowed
            if known.silent > most:
                doing = get_args(Doing)[number]
                self.ended.setdefault(worker, Silence(doing, allowed, is_stopped))
                _end(pid, hard=known.ended > 2)
                known.ended += 1


def _is_stopped(pid: int) -> bool | None:
    """Whether a child of this process is stopped; None if it is none, or has ended."""
    try:
        state = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return False if state is None else True if state.si_code == os.CLD_STOPPED else None


def _end(pid: int, hard: bool) -> None:
    """At first so that it can still write where it was."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if hard else signal.SIGABRT)
        os.kill(pid, signal.SIGCONT)
