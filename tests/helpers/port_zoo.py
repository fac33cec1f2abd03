"""Bad adapters: what the command must survive, each with one thing wrong with it.

Most offer the sliding mask alone, so that judging one is a matter of two properties. `tests/` puts
this folder on the path of the processes that it starts.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import os
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from nsa_ref.masks import fine_mask, sliding_mask
from nsa_ref.semantics import PAPER
from nsa_ref.testing import Case, Implementation, OracleImplementation


class SlidingMask(Implementation):
    """Right, and nothing but a mask."""

    name = "mask"
    semantics = (PAPER,)
    numerics = MappingProxyType({"float64": "fp64"})

    def sliding_mask(self, case: Case) -> Any:
        return sliding_mask(case.q_len, case.kv_len, case, case.semantics)


class OneKeyFewer(SlidingMask):
    """As fla has it: a difference of convention."""

    name = "window [w]"  # brackets, which must not be taken for markup

    def sliding_mask(self, case: Case) -> Any:
        open_window = dataclasses.replace(case.semantics, window_closed=False)
        return sliding_mask(case.q_len, case.kv_len, case, open_window)


class Faint(Implementation):
    """Two faint bugs: more than 128 blocks; two empty slots beside a short last block."""

    name = "faint"
    semantics = (PAPER,)
    numerics = MappingProxyType({"float64": "fp64"})

    def fine_mask(self, case: Case, block_indices: Any) -> Any:
        indices = np.where(block_indices > 128, block_indices - 128, block_indices)
        short = case.kv_len % case.selection_block_size != 0
        if short and indices.shape[-1]:
            last = case.kv_len // case.selection_block_size
            empty = (indices == -1).sum(-1) > 1
            indices[..., 0] = np.where(empty, last, indices[..., 0])
        return fine_mask(case.q_len, case.kv_len, indices, case, case.semantics)


class Raises(SlidingMask):
    """Raises `error`, for cases of more than one key."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.name = f"raises {type(error).__name__}"

    def sliding_mask(self, case: Case) -> Any:
        if case.kv_len > 1:
            raise self.error
        return super().sliding_mask(case)


class Unprintable(Exception):
    """Raises when it is shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Returns(SlidingMask):
    """Returns `value` where a mask should be."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def sliding_mask(self, case: Case) -> Any:
        return self.value


class Segfaults(SlidingMask):
    """Reads address 0."""

    name = "segfaults"

    def sliding_mask(self, case: Case) -> Any:
        if case.q_len > 2:
            ctypes.string_at(0)
        return super().sliding_mask(case)


class Leaves(SlidingMask):
    """Ends its process with exit status 0, as if all were well."""

    name = "leaves"

    def sliding_mask(self, case: Case) -> Any:
        os._exit(0)


class Hangs(SlidingMask):
    """Sleeps for ever, in one property of two."""

    name = "hangs"

    def sliding_mask(self, case: Case) -> Any:
        while case.sliding_window_size > case.kv_len:  # W3's cases reach this, and W1's may
            time.sleep(60)
        return super().sliding_mask(case)


class CancelsTheAlarm(Hangs):
    """Hangs where it has cancelled what would end its process."""

    name = "cancels the alarm"

    def sliding_mask(self, case: Case) -> Any:
        faulthandler.cancel_dump_traceback_later()
        return super().sliding_mask(case)


class Sleeps(OracleImplementation):
    """Right, in one branch, and slow: as an interpreter is."""

    name = "sleeps"
    semantics = (PAPER,)
    numerics = MappingProxyType({"float32": "fp32"})

    def offers(self, method: str) -> bool:
        return method in ("sliding", "sliding_mask", "sliding_vjp")

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        time.sleep(0.5)
        return super().run(method, case, *arguments)


class Refuses(SlidingMask):
    """Supports no case that it is asked about."""

    name = "refuses"

    def supports(self, case: Case) -> str | None:
        return "it is Sunday"


class BadRefusal(SlidingMask):
    """Even the question whether it can is too much."""

    name = "bad refusal"

    def __init__(self, *, error: BaseException | None = None) -> None:
        self.error = error or KeyError("head_dim")

    def supports(self, case: Case) -> str | None:
        raise self.error


class SupportsAnswers(SlidingMask):
    """Answers the question whether it can, and not why it cannot."""

    name = "supports answers"

    def __init__(self, *, answer: Any = True) -> None:
        self.answer = answer

    def supports(self, case: Case) -> Any:
        return self.answer


class ConstructorRaises(SlidingMask):
    """Needs something that is not there."""

    def __init__(self) -> None:
        raise OSError("no such\nkernel library")


class LeavesAChild(SlidingMask):
    """Right; and a second process returns to the judge from every call."""

    name = "leaves a child"

    def sliding_mask(self, case: Case) -> np.ndarray:
        os.fork()
        return super().sliding_mask(case)


class BreaksPytest(SlidingMask):
    """Right; and what reports a test is gone."""

    name = "breaks pytest"

    def sliding_mask(self, case: Case) -> np.ndarray:
        import _pytest.runner

        _pytest.runner.call_and_report = None  # type: ignore[assignment]
        return super().sliding_mask(case)


class DiesInWorkers(SlidingMask):
    """Loads once, and not where the work is done."""

    name = "dies in workers"

    def __init__(self) -> None:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)


def hostile() -> list[Implementation]:
    """Each of them is to be judged, whatever the one before it does."""
    raising = Raises(ValueError("no\nbrackets [0, 0]"))
    return [raising, Segfaults(), Leaves(), Hangs(), SlidingMask()]


def hangs_later() -> list[Implementation]:
    """The first is judged and found wrong; the second leaves a file and hangs."""

    class LeavesAFile(Hangs):
        def sliding_mask(self, case: Case) -> Any:
            Path("hanging").touch()
            time.sleep(600)

    return [OneKeyFewer(), LeavesAFile()]


def exceptions() -> list[BaseException]:
    """What a method may raise."""
    return [
        ValueError("wrong"),
        Unprintable(),
        SystemExit(0),
        KeyboardInterrupt(),
        GeneratorExit(),
        pytest.skip.Exception("not today"),
        pytest.exit.Exception("enough"),
        RecursionError("too deep"),
        MemoryError(),
    ]


def undeclared() -> Implementation:
    """A row of bounds that does not exist."""
    port = SlidingMask()
    port.numerics = {"float32": "fp33"}
    return port


def twins() -> list[Implementation]:
    """Two that could not be told apart."""
    return [SlidingMask(), SlidingMask()]


def leaves_at_once() -> None:
    """The whole process goes."""
    sys.stderr.write("lib: fatal\n")
    os._exit(7)


def aborts() -> None:
    """As an assertion in C does."""
    os.abort()


def hangs() -> None:
    """Never returns."""
    time.sleep(600)


not_an_implementation = {"sliding": 1}
