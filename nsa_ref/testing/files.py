"""Files of a user's: read without waiting for ever, and written so that nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
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
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise ValueError("it is a pipe or a device, and no file")
    with open(handle, "rb") as file:
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


class Rewritten:
    """A file that one process writes again and again, in one call of the system each time.

    `write_json` takes five. A process that is killed leaves the old text or the new one; of a text
    that is longer than a page of memory it may leave a part, which whoever reads it must bear.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._longest = 0

    def write(self, data: dict[str, Any]) -> None:
        """Write JSON over whatever the file holds; make it again if somebody removed it.

        Raises
        ------
        OSError : the file cannot be written
        """
        text = json.dumps(data, allow_nan=False).encode()
        if self._file is None or not os.fstat(self._file).st_nlink:
            if self._file is not None:
                os.close(self._file)
            self._file, self._longest = None, 0
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        # of a longer text before, nothing may stand behind this one
        self._longest = max(self._longest, len(text))
        os.pwrite(self._file, text.ljust(self._longest), 0)


def check_folder(path: Path) -> None:
    """OSError unless a file can be written into a folder, which need not be there yet."""
    existed = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
    if not existed:
        path.rmdir()
