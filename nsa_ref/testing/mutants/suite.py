"""What `nsa-ref mutants` hands to pytest: a test for each mutant, limits and seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nsa_ref.testing.mutants.trials import try_mutant


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    listed = json.loads(Path(metafunc.config.getoption("--nsa-trials")).read_text())
    metafunc.parametrize(("name", "limits", "seed"), listed)


def test_mutant_is_killed_by_its_clause(
    name: str, limits: str, seed: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """By a property of the clause that it breaks, and for what it does."""
    options = request.config.nsa_ref_options  # type: ignore[attr-defined]
    options = dataclasses.replace(options, findings=tmp_path, seed=seed)
    # one seed shows which properties nothing else could replace
    trial = try_mutant(name, options, limits, once=seed > 0)
    request.node.user_properties.append(("nsa_ref_mutant", dataclasses.asdict(trial)))
