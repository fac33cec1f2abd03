"""Python, and `nsa-ref`, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parent


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, in the present directory and environment unless the options say else."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def nsa_ref(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """`nsa-ref ARGUMENTS`, in the present directory and environment."""
    environment = os.environ | {"COLUMNS": str(columns)}
    return python("-m", "nsa_ref.testing.cli", *arguments, env=environment)
