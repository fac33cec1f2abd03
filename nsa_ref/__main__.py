"""The command `nsa-ref`: what goes wrong before it has begun is one line as well."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """The console script."""
    _open_what_is_closed()
    try:
        os.getcwd()  # nothing of the judge can be imported without
    except OSError:
        print("nsa-ref: the folder that you are in is gone. Go to another one", file=sys.stderr)
        return 2
    try:
        from nsa_ref.testing.cli import main as run
    except KeyboardInterrupt:
        print("nsa-ref: interrupted", file=sys.stderr)
        return 2
    except Exception as error:  # too little memory, or a module of the user's in place of Python's
        said = " ".join(str(error).split())
        print(f"nsa-ref: it cannot be loaded: {type(error).__name__}: {said}", file=sys.stderr)
        return 2
    return run()


def _open_what_is_closed() -> None:
    """Let what is printed go nowhere if nobody listens, and not into the next file of a run."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
