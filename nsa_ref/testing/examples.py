"""Explicit examples: cases in the port's repository that every run tries first.

`nsa-ref-examples` stands beside the adapter, like the ledger. `nsa-ref fuzz --export` writes into
it: cases that once broke a property, each with the property.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from nsa_ref.testing.case import Case
from nsa_ref.testing.findings import read_finding
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.ledger import place_of
from nsa_ref.testing.limits import limited
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.strategies import is_varied

FOLDER_NAME = "nsa-ref-examples"


def examples_of(implementation: Implementation, prop: Property) -> list[Case]:
    """The cases of the property, as far as they lie within what is declared.

    Raises
    ------
    ValueError : a file there holds no case
    """
    place = place_of(implementation)
    found = []
    for path in sorted(place.with_name(FOLDER_NAME).glob("*.json")) if place else ():
        try:
            case, kept = read_finding(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no case: {error}. Remove it, or export again") from None
        if kept.get("property") != prop.name:
            continue
        own = limited(implementation, prop.called)
        declared = case.dtype in own.numerics and case.semantics in list(own.semantics)
        within = all(
            getattr(case, field) in allowed or not is_varied(field, prop.about)
            for field, allowed in own.limits.items()
        )
        if declared and within and all(rule.holds(case) for rule in own.rules):
            found.append(case)
    return found


def export(findings: Sequence[Path], ledger: Path) -> list[Path]:
    """Copy findings into the folder of examples that stands beside a ledger; their new files.

    Raises
    ------
    OSError : nothing can be written there
    """
    folder = ledger.with_name(FOLDER_NAME)
    folder.mkdir(exist_ok=True)
    written = []
    for path in findings:
        _, finding = read_finding(path)
        if finding.get("property") in PROPERTIES:
            # the name begins with a number of the folder that it was found in
            target = folder / path.name.partition("-")[2]
            number = 2
            while target.exists() and target.read_bytes() != path.read_bytes():
                target = folder / f"{path.stem.partition('-')[2]}-{number}.json"
                number += 1
            shutil.copy(path, target)
            written.append(target)
    return written
