"""Where a command is tried: an empty directory, and no trace of the pytest that tries it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commands import HELPERS
from pages import ROOT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to stand in; processes find tests/helpers, and this checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HELPERS), str(ROOT))))
    ours = ("MALLOC_PERTURB_", "GITHUB_ACTIONS")
    for name in [n for n in os.environ if n.startswith("PYTEST_") or n in ours]:
        monkeypatch.delenv(name)
    return tmp_path
