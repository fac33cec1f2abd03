"""Ports that are right in another way than most: of a soak, and of the judge's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from nsa_ref.semantics import FLA, LUCIDRAINS, LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.testing import Case, Implementation
from nsa_ref.testing.mutants.layer import LayerInSteps, LayerWay
from nsa_ref.testing.mutants.selection import Selector

#: What a sigmoid may be taken apart into, where every operation is stored.
SIGMOIDS: dict[str, Callable[[Any], Any]] = {
    "1 / (1 + exp(-z))": lambda z: 1 / (1 + (-z).exp()),
    "exp(z) / (1 + exp(z))": lambda z: z.exp() / (1 + z.exp()),
    "(1 + tanh(z / 2)) / 2": lambda z: (1 + (z / 2).tanh()) / 2,
}
#: That of them which is right at every logit: exp overflows, and the second one's gradient cancels.
STABLE = "(1 + tanh(z / 2)) / 2"


class SigmoidInSteps(LayerInSteps):
    """By one of `SIGMOIDS`."""

    def __init__(self, formula: str, row: str) -> None:
        super().__init__(LayerWay(), row)
        self.name, self.sigmoid = f"layer, {row}, gates {formula}", SIGMOIDS[formula]

    def squashed(self, logits: Any) -> Any:
        return self.sigmoid(logits)


class NormOfTorch(LayerInSteps):
    """By torch's own RMSNorm, that is with the machine epsilon of what it computes in."""

    name = "layer, normed by torch"
    semantics: tuple[Semantics, ...] = (dataclasses.replace(PAPER, input_norm="machine_eps"),)

    def normed(self, case: Case, weights: Any, x: Any) -> Any:
        import torch

        if not case.semantics.input_norm:
            return x
        norm = torch.nn.functional.rms_norm
        return norm(x, x.shape[-1:], weights["norm.weight"])


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
