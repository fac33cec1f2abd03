"""Running one property on one case, and finding the clause that is to blame."""

from __future__ import annotations

import dataclasses

from nsa_ref.testing.branches import (
    BRANCHES,
    Broken,
    Inconclusive,
    Raised,
)
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.properties.common import Outcome, Property
from nsa_ref.testing.properties.masks import forward_mask
from nsa_ref.testing.strategies import fresh_seeds

BRANCH_NAMES = tuple(branch.name for branch in BRANCHES)


def judge(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """Run one property on one case.

    A wrong value whose case also shows a wrong mask is the mask's fault, and reported as such,
    with both masks side by side. A suspicion counts if three fresh seeds all show it again.

    Raises
    ------
    Broken, Inconclusive, NotOffered
    """
    if reason := implementation.supports(case):
        raise NotOffered(reason)
    try:
        outcome = prop.check(implementation, case)
        if outcome.suspicion:
            again = [prop.check(implementation, fresh) for fresh in fresh_seeds(case, 3)]
            if all(fresh.suspicion for fresh in again):
                raise Broken(prop.clause, f"{outcome.suspicion} (and with 3 fresh seeds)")
            outcome = dataclasses.replace(outcome, budget=None, suspicion="")
        return outcome
    except Raised as error:
        raise Broken(prop.clause, f"the implementation failed: {error}") from error
    except Broken as broken:
        values = broken.clause in ("A1", "A2", "A3", "A5")
        if values and prop.branch in BRANCH_NAMES and not prop.extent:
            _blame_the_mask(prop, implementation, case)
        raise


def _blame_the_mask(prop: Property, implementation: Implementation, case: Case) -> None:
    """Raise Broken for the mask's clause if the forward reads other keys than it should."""
    branch = next(b for b in BRANCHES if b.name == prop.branch)
    try:
        forward_mask(branch, branch.mask_clause(case))(implementation, case)
    except (Raised, Inconclusive, NotOffered):
        return
