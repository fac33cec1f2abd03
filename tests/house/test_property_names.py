"""Names of properties are promises: a finding that somebody kept is replayed by its name."""

from __future__ import annotations

import re
from pathlib import Path

from nsa_ref.testing import properties
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.properties.catalogue import ROWS

NAMES = Path(__file__).with_name("property_names.txt").read_text().split()


def test_every_property_is_pinned() -> None:
    """None was renamed or lost; a new name is to be added to property_names.txt."""
    assert set(PROPERTIES) == set(NAMES)


def test_a_name_is_that_of_one_row() -> None:
    """A second row of the same name, copied and not renamed, would take the first one's place."""
    assert len(PROPERTIES) == len(ROWS)


def test_every_check_is_that_of_a_row() -> None:
    checks = {(row.check.__module__, row.check.__name__) for row in ROWS}
    for path in Path(properties.__file__).parent.glob("*.py"):
        # what takes a property, an implementation and a case, and says how the case ended
        check = r"^def ([a-z]\w*)\(\s*prop: Property,[^)]*case: Case[^)]*\)\s*-> Outcome:"
        for name in re.findall(check, path.read_text(), re.MULTILINE):
            module = f"{properties.__name__}.{path.stem}"
            assert (module, name) in checks, f"no row of the table asks {module}.{name}"
