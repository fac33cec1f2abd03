"""Files of a user's: read without waiting for ever, and written so that nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

#: A file that is longer than this holds no case, report or ledger.
MOST_BYTES = 64 * 2**20


def read_bytes(path: Path) -> bytes:
    """What a file holds that is one: a device has no end, and a pipe may have no beginning.

    Raises
    ------
    OSError : it cannot be read
    ValueError : it is no file, or too long
    """
    # a pipe is waited for when it is opened
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise ValueError("it is a pipe or a device, and no file")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES >> 20} MiB")
    return data


def read_text(path: Path) -> str:
    """The same of a file of text.

    Raises
    ------
    OSError, ValueError : as `read_bytes`, or it is no UTF-8
    """
    return read_bytes(path).decode()


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a process that dies, or a full disk, leaves no half of it."""
    half = path.with_suffix(".half")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            half.write_text(text, "utf-8")
            half.replace(path)
            return
        except FileNotFoundError:  # another worker removed the empty folder
            continue
        except OSError:
            with contextlib.suppress(OSError):
                half.unlink()
            raise


def write_json(path: Path, data: dict[str, Any]) -> None:
    """The same with JSON."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
