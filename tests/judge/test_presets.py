"""Presets before ports that compute as those projects do: what is right there is right here."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_ref.testing import Implementation
from trials import finding, passes
from unusual_ports import FlaTopK, LucidrainsTopK, RanksMeans

SELECTION = [f"{clause}_selection" for clause in ("I1", "I2", "I3", "I4", "I5", "I6")]


class CountsOnceForTheGroup(FlaTopK):
    def forced(self, group: int) -> float:
        return 1.0


@pytest.mark.parametrize("name", SELECTION)
def test_a_forced_block_of_fla_counts_for_every_query_head(name: str, tmp_path: Path) -> None:
    passes(name, FlaTopK(), tmp_path)


def test_a_forced_block_that_counts_once_for_the_group_is_found(tmp_path: Path) -> None:
    assert finding("I4_selection", CountsOnceForTheGroup(), tmp_path)["clause"] == "I4"


@pytest.mark.parametrize("port", [LucidrainsTopK(), RanksMeans()], ids=lambda port: port.name)
@pytest.mark.parametrize("name", [name for name in SELECTION if not name.startswith("I2")])
def test_means_may_be_ranked_before_or_after_their_softmax(
    name: str, port: Implementation, tmp_path: Path
) -> None:
    passes(name, port, tmp_path)
