"""Hypothesis settings of the levels, and how many examples a property gets at each.

All profiles descend from "default" by name: with CI=true in the environment, Hypothesis loads a
profile of its own, and one registered without a parent would inherit that one's settings.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

#: level -> examples, as a multiple of what the property asks for at quick
LEVELS = {"quick": 1, "thorough": 10}


def profile_name(level: str) -> str:
    """The name under which Hypothesis knows a level."""
    return f"nsa-{level}"


def register_profiles() -> None:
    """Register one profile a level; reproducible runs that keep no database between them."""
    for level in LEVELS:
        settings.register_profile(
            profile_name(level),
            parent=settings.get_profile("default"),
            derandomize=True,
            database=None,
            deadline=None,  # a first call compiles; hangs are caught by the case's own timeout
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )


def level_settings(level: str, examples: int) -> settings:
    """The settings of a property that asks for `examples` at quick."""
    profile = settings.get_profile(profile_name(level))
    return settings(parent=profile, max_examples=examples * LEVELS[level])


register_profiles()
