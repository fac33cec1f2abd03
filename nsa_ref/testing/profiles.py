"""Hypothesis settings of the levels, and how many examples a property gets at each."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import ExampleDatabase

#: level -> examples, as a multiple of what the property asks for at quick
LEVELS = {"quick": 1, "thorough": 10}

#: Examples of a property in one round of fuzzing, if there is time for them: with fewer `target`
#: has nothing to go by.
FUZZED = 1000


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


def fuzz_settings(database: ExampleDatabase) -> settings:
    """The settings of fuzzing, where no two runs are alike and the database is kept.

    Both are said here, because with CI=true in the environment Hypothesis would say the contrary.
    """
    return settings(
        level_settings("quick", FUZZED),
        derandomize=False,
        database=database,
        phases=(Phase.reuse, Phase.generate, Phase.target, Phase.shrink),
    )
