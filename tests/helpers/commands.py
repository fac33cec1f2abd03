"""Python, in a process of its own, and `nsa-ref`, in this one or in one of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from nsa_ref.testing.cli import main

HELPERS = Path(__file__).parent


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, in the present directory and environment unless the options say else."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def nsa_ref(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """`nsa-ref ARGUMENTS`, in the present directory and environment.

    It is called in this process, which spares a second of imports; loading and judging are
    processes of its own all the same. What these write, and what it prints, is caught alike.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, COLUMNS=str(columns)))
        files = [
            stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(2)
        ]
        for number, (name, file) in enumerate(zip(("stdout", "stderr"), files), 1):
            stack.enter_context(mock.patch.object(sys, name, file))
            before = os.dup(number)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, number)
            os.dup2(file.fileno(), number)
        code = main(list(arguments))
        for file in files:
            file.flush()
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, *(file.read() for file in files))


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`nsa-ref ARGUMENTS` in a process of its own, killed at the end if it still runs."""
    command = [sys.executable, "-m", "nsa_ref.testing.cli", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # where nohup runs the tests, it would be ignored
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    ) as p:
        try:
            yield p
        finally:
            p.kill()


def until(met: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)
