"""What `nsa-ref mutants` hands to pytest: one test a mutant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nsa_ref.testing.mutants import ZOO
from nsa_ref.testing.mutants.trials import try_mutant
from nsa_ref.testing.options import Options


@pytest.mark.parametrize("name", ZOO)
def test_mutant_is_killed_by_its_clause(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """By a property of the clause that it breaks, and for what it does."""
    options = getattr(request.config, "nsa_ref_options", None) or Options()
    trial = try_mutant(name, dataclasses.replace(options, findings=tmp_path))
    request.node.user_properties.append(("nsa_ref_mutant", dataclasses.asdict(trial)))
    mistake = ZOO[name].mistake
    assert trial.right, f"{name} ({mistake}): {trial.died_of}, not {trial.clause}\n{trial.found}"
