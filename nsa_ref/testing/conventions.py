"""An implementation as if its author had declared another convention."""

from __future__ import annotations

import copy
import dataclasses

from nsa_ref.semantics import PRESETS, Semantics
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.verdicts import Convention


def under(semantics: Semantics, convention: Convention) -> Semantics:
    """The semantics with the switch, or all switches of the preset, as the convention says."""
    if convention.name == "preset":
        return PRESETS[convention.value]
    return dataclasses.replace(semantics, **{convention.name: convention.value})


def declaring(implementation: Implementation, convention: Convention) -> Implementation:
    """The implementation, as if its author had declared the convention."""
    other = copy.copy(implementation)
    other.semantics = tuple(dict.fromkeys(under(s, convention) for s in implementation.semantics))
    return other
