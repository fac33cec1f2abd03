"""The command `nsa-ref`: what goes wrong before it has begun is one line as well."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """The console script."""
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
    return run()


if __name__ == "__main__":
    sys.exit(main())
