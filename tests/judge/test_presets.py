"""Presets before ports that compute as those projects do: what is right there is right here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from nsa_ref.semantics import FLA, LUCIDRAINS, LUCIDRAINS_FLEX
from nsa_ref.testing import Case, Implementation
from nsa_ref.testing.mutants.selection import Selector
from trials import finding, passes

SELECTION = [f"{clause}_selection" for clause in ("I1", "I2", "I3", "I4", "I5", "I6")]


class FlaTopK(Implementation):
    """fla's choice: every query head counts a forced block as 1, and heads are added up.

    `forced` is what a forced block counts for a group of so many heads.
    """

    name = "fla's top-k"
    semantics = (FLA,)
    limits: ClassVar = {
        "group_size": (2, 16),
        "compress_block_size": (2,),
        "compress_block_sliding_stride": (2,),
        "selection_block_size": (2,),
        "num_mem_kv": (0,),
        "num_initial_blocks": (1,),
        "num_local_blocks": (2,),
    }

    def forced(self, group: int) -> float:
        return group

    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        known = Selector()
        candidates, forced = known.candidates(case), known.forced(case)
        scores = np.zeros((case.batch, case.kv_heads, case.q_len, case.num_selection_blocks), "f4")
        scores[..., : k_cmp.shape[2]] = known.scores(case, q, k_cmp, mem_k)[..., : k_cmp.shape[2]]
        scores = np.where(forced, np.float32(self.forced(case.group_size)), scores)
        order = np.argsort(-np.where(candidates, scores, -1), axis=-1, kind="stable")
        taken = np.arange(order.shape[-1]) < candidates.sum(-1)[:, None]
        return np.where(taken, order, -1)[..., : case.num_selected_blocks]


class CountsOnceForTheGroup(FlaTopK):
    def forced(self, group: int) -> float:
        return 1.0


@pytest.mark.parametrize("name", SELECTION)
def test_a_forced_block_of_fla_counts_for_every_query_head(name: str, tmp_path: Path) -> None:
    passes(name, FlaTopK(), tmp_path)


def test_a_forced_block_that_counts_once_for_the_group_is_found(tmp_path: Path) -> None:
    assert finding("I4_selection", CountsOnceForTheGroup(), tmp_path)["clause"] == "I4"


class LucidrainsTopK(Selector):
    """lucidrains ranks a softmax of the means; here in float32, where many are equal or 0."""

    name = "lucidrains' top-k"
    semantics = (LUCIDRAINS, LUCIDRAINS_FLEX)


class RanksMeans(LucidrainsTopK):
    """The same choice in exact arithmetic; only the floor needs the softmax."""

    name = "top-k of means"
    semantics = (LUCIDRAINS_FLEX,)

    def ranked(self, means: np.ndarray) -> np.ndarray:
        return means


@pytest.mark.parametrize("port", [LucidrainsTopK(), RanksMeans()], ids=lambda port: port.name)
@pytest.mark.parametrize("name", [name for name in SELECTION if not name.startswith("I2")])
def test_means_may_be_ranked_before_or_after_their_softmax(
    name: str, port: Implementation, tmp_path: Path
) -> None:
    passes(name, port, tmp_path)
