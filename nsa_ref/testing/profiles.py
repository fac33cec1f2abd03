"""Hypothesis settings of the levels, and how many examples a property gets at each."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

#: level -> examples, as a multiple of what the property asks for at quick
LEVELS = {"quick": 1, "thorough": 10}


def level_settings(level: str, examples: int) -> settings:
    """The settings of a property that asks for `examples` at quick; runs are reproducible."""
    return settings(
        # by name: with CI=true in the environment, Hypothesis loads a profile of its own
        parent=settings.get_profile("default"),
        max_examples=examples * LEVELS[level],
        derandomize=True,
        database=None,
        deadline=None,  # a first call compiles; hangs are caught by the case's own timeout
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
