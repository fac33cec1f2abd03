"""Names of properties are promises: a finding that somebody kept is replayed by its name."""

from __future__ import annotations

from pathlib import Path

from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.properties.catalogue import ROWS

NAMES = Path(__file__).with_name("property_names.txt").read_text().split()


def test_no_property_was_renamed_or_lost() -> None:
    assert not set(NAMES) - set(PROPERTIES)


def test_every_property_is_pinned() -> None:
    assert not set(PROPERTIES) - set(NAMES), "add the new names to property_names.txt"


def test_a_name_is_that_of_one_row() -> None:
    """A second row of the same name, copied and not renamed, would take the first one's place."""
    assert len(PROPERTIES) == len(ROWS)
