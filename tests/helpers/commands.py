"""`nsa-ref` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent


def nsa_ref(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """`nsa-ref ARGUMENTS`, in the present directory and environment."""
    return subprocess.run(
        [sys.executable, "-m", "nsa_ref.testing.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"COLUMNS": str(columns)},
    )
