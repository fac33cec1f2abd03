"""Who is at work, the judge or an implementation: NumPy's settings, the clock, others' alarms.

The judge's arithmetic and its time are its own. While an implementation runs, NumPy raises and
warns as that has set it, its clock runs, and the memory that it gets is filled; all that ends when
it returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, TextIO

import numpy as np

from nsa_ref.testing import silence


@dataclass
class Clock:
    """The time that an implementation may run; then this process is ended.

    The process that hands out the tests is told how much is left, and ends this one. Where nobody
    listens, or no time is left, a thread of Python's does; one for every call would take longer
    than most calls.

    file : where Python writes then what it was doing
    charged : seconds that it has run so far
    """

    seconds: float
    file: TextIO
    charged: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The time within is charged."""
        started = time.monotonic()
        left = self.seconds - self.charged
        told = silence.say("waiting", max(left, 0.0)) and left > 0
        if not told:
            # it takes no time of 0
            faulthandler.dump_traceback_later(max(left, 0.001), exit=True, file=self.file)
        try:
            yield
        finally:
            silence.say("judging", silence.JUDGING)
            if not told:
                faulthandler.cancel_dump_traceback_later()
            self.charged += time.monotonic() - started


@dataclass
class _Judging:
    """Who is judged, and by whom.

    settings : what the implementation has set of NumPy; None while nobody is judged
    handlers : of the signals that whoever runs the judge may want to be told of
    """

    settings: Any = None
    handlers: frozenset[CodeType] = field(default_factory=frozenset)
    clock: Clock | None = None


_now = _Judging()


#: `mallopt(M_PERTURB, n)` does in a running process what MALLOC_PERTURB_=n does at its start.
_M_PERTURB = -6


@dataclass
class _Memory:
    """Fills the memory that an implementation gets, by the GNU C library; or nothing does."""

    mallopt: Any = None
    byte: int = 0

    def fill(self, on: bool) -> None:
        if self.mallopt is not None:
            self.mallopt(_M_PERTURB, self.byte if on else 0)


_memory = _Memory()


@contextlib.contextmanager
def memory_filled(byte: int) -> Iterator[None]:
    """Within, the memory that an implementation gets is filled, where the C library is GNU's.

    The judge's own is not: it would take an eighth of its time.

    byte : as MALLOC_PERTURB_ has it
    """
    global _memory
    before = _memory
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        _memory = _Memory(ctypes.CDLL(None).mallopt, byte)
    try:
        yield
    finally:
        _memory = before


class Stopped(BaseException):
    """An alarm rang: no `except` on the way, Hypothesis' neither, may take it for a finding."""


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """The judge's own arithmetic, in which nothing that NumPy meets is an error or a warning.

    What is set outside is taken to be the implementation's. It has that while it runs, and it is
    set again in the end, as it was left.

    Raises
    ------
    BaseException : what a signal's handler raised, which was there before the implementation ran
    """
    global _now
    before = _now
    handlers = frozenset(_handlers()) if before.settings is None else before.handlers
    _now = _Judging(np.geterr(), handlers)
    np.seterr(all="ignore")
    try:
        yield
    except Stopped as stopped:
        assert stopped.__cause__ is not None
        raise (stopped if before.settings is not None else stopped.__cause__) from None
    finally:
        np.seterr(**_now.settings)
        _now = before


@contextlib.contextmanager
def timed(seconds: float, file: TextIO) -> Iterator[Clock]:
    """End this process once the implementation has run for so long in here."""
    before, _now.clock = _now.clock, Clock(seconds, file)
    if not silence.is_bound:
        # should the process that listens die while an implementation lets no thread of Python's run
        faulthandler.dump_traceback_later(seconds + silence.JUDGING, exit=True, file=file)
    try:
        yield _now.clock
    finally:
        if not silence.is_bound:
            faulthandler.cancel_dump_traceback_later()
        _now.clock = before


@contextlib.contextmanager
def handed_over() -> Iterator[None]:
    """The implementation runs: under its own settings, with its clock, and memory is filled.

    Raises
    ------
    Stopped : from what an alarm raised meanwhile
    """
    if _now.settings is not None:
        np.seterr(**_now.settings)
    _memory.fill(True)
    process = os.getpid()
    try:
        with _now.clock.running() if _now.clock else contextlib.nullcontext():
            yield
    except BaseException as error:
        stop_if_alarmed(error)
        raise
    finally:
        if os.getpid() != process:
            os._exit(0)  # a child that the port has left behind: two would speak for one worker
        _memory.fill(False)
        if _now.settings is not None:
            _now.settings = np.geterr()
            np.seterr(all="ignore")


def stop_if_alarmed(error: BaseException) -> None:
    """Raise Stopped from what the handler of a signal raised, as that of pytest-timeout does.

    Whatever it interrupted, and whatever was made of it on the way: it is nobody's mistake.
    """
    left, seen = [error], []
    while left:
        one = left.pop()
        seen.append(one)
        left += [e for e in (one.__cause__, one.__context__) if e is not None and e not in seen]
        trace = one.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in _now.handlers:
                raise Stopped from one
            trace = trace.tb_next


def _handlers() -> Iterator[CodeType]:
    """The Python functions that signals call in this process."""
    for number in signal.valid_signals():
        code = getattr(signal.getsignal(number), "__code__", None)
        if isinstance(code, CodeType):
            yield code
