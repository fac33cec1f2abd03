"""A Redis server of our own, on a free port of this machine; a test starts it, and may kill it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_ref.testing.sharing import shared_database


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def url_of(port: int) -> str:
    """How `--database` names it."""
    return f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def redis_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Its process, once it answers; the test is skipped where there is no redis-server."""
    pytest.importorskip("redis", reason="redis is not installed")
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server: apt-get install redis-server")
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL) as process:
        try:
            database = shared_database(url_of(port))
            for _ in range(100):
                list(database.fetch(b"ready"))
                if not database.why:
                    break
                time.sleep(0.05)
            yield process
        finally:
            process.kill()
