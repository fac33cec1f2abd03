"""How mutmut runs these tests: see "Source mutants" in CONTRIBUTING.md."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

#: Every run draws the same cases, and the first that fails ends the test: nobody reads it.
SOURCE_MUTANTS = "source_mutants"
settings.register_profile(
    SOURCE_MUTANTS,
    parent=settings.get_profile("default"),
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before a mutant literal cases come first, which take no time, and random ones last."""
    if settings.get_current_profile_name() == SOURCE_MUTANTS:
        items.sort(key=lambda item: hasattr(getattr(item, "obj", None), "hypothesis"))
