"""An implementation before one property: what is recorded, what must be found, what must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsa_ref.testing import Implementation
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import Record


def record(name: str, implementation: Implementation, folder: Path, **options: Any) -> Record:
    """What a property says of an implementation; findings are kept in the folder."""
    return run_property(PROPERTIES[name], implementation, Options(findings=folder, **options))


def finding(
    name: str, implementation: Implementation, folder: Path, **options: Any
) -> dict[str, Any]:
    """What a property finds wrong with an implementation, and it must find something."""
    found = record(name, implementation, folder, **options).finding
    assert found is not None, f"{name} finds nothing wrong with {implementation.name}"
    return found


def passes(name: str, implementation: Implementation, folder: Path, **options: Any) -> Record:
    """What a property says of an implementation that it must judge, and find right."""
    result = record(name, implementation, folder, **options)
    assert result.finding is None, result.finding["text"]
    assert result.cases, result
    return result
