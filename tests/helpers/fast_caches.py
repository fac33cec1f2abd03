"""Caches of nsa_fast that grow, forget and branch, as a state machine that Hypothesis drives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

import nsa_fast.layer
from fast_layers import KINDS, Layer, tokens
from nsa_fast import Cache
from nsa_ref.semantics import PRESETS

CAUSAL = {kind: parts for kind, parts in KINDS.items() if parts[0].causal}
AS_LAYERS = (
    "PAPER with memory",
    "LUCIDRAINS_FLEX",
    "rotary on all",
    "pooled once turned",
    "one k and v, pooled once turned",
)
IN_CACHES = {kind: KINDS[kind] for kind in AS_LAYERS} | {
    name: (PRESETS[name], "mlp", 1) for name in ("LUCIDRAINS", "FLA", "XUNHAO")
}

WHICH = st.integers(0, 2)
COUNT = st.one_of(st.just(1), st.integers(1, 9))


class Decoding(RuleBasedStateMachine):
    """Caches that grow, forget and branch, each beside the tokens that it should have seen.

    Whatever happens to a cache, tokens follow and their rows are looked at: Hypothesis often leaves
    rules out, and what is not read is not tested.

    The choice of blocks is the same on both sides: windows and blocks have two strides each, so
    that no two blocks have the same score but for rounding, and random scores that differ by less
    than float64's rounding do not come up.
    """

    def __init__(self) -> None:
        super().__init__()
        # caches, the tokens that they have seen, and their last rows, which are still to be read
        self.held: list[tuple[Cache, Tensor, list[Tensor]]] = []

    @initialize(
        kind=st.sampled_from(list(IN_CACHES)),
        batch=st.integers(1, 2),
        prefill=st.integers(0, 22),
    )
    def begin(self, kind: str, batch: int, prefill: int) -> None:
        self.layer, self.seed = Layer(*IN_CACHES[kind]), 0
        self.held = [(Cache(batch), tokens(batch, 0), [])]
        self.append(0, prefill)

    @rule(which=WHICH, count=st.one_of(st.just(0), COUNT))
    def append(self, which: int, count: int) -> None:
        cache, seen, rows = self.held[which % len(self.held)]
        self.seed += 1
        seen = torch.cat([seen, tokens(len(seen), count, seed=self.seed)], dim=1)
        rows = [*rows, self.layer(seen[:, cache.length :], cache)]
        self.held[which % len(self.held)] = cache, seen, rows

    def read(self, which: int) -> None:
        """Compare its rows, as long as the tokens are those that they were made of."""
        cache, seen, rows = self.held[which % len(self.held)]
        count = sum(part.shape[1] for part in rows)
        if count:
            name = f"rows {seen.shape[1] - count} to {seen.shape[1]}"
            self.layer.assert_right(seen, **{name: torch.cat(rows, dim=1)})
        self.held[which % len(self.held)] = cache, seen, []

    def teardown(self) -> None:
        for which in range(len(self.held)):
            self.read(which)

    @rule(which=WHICH, back=st.integers(1, 9), count=COUNT)
    def truncate(self, which: int, back: int, count: int) -> None:
        self.read(which)
        cache, seen, _ = self.held[which % len(self.held)]
        length = max(0, seen.shape[1] - back)
        cache.truncate(length)
        self.held[which % len(self.held)] = cache, seen[:, :length], []
        self.append(which, count)

    @rule(which=WHICH, count=COUNT, count_of_copy=COUNT)
    def branch(self, which: int, count: int, count_of_copy: int) -> None:
        """What one reads is not what came to the other in the meantime."""
        cache, seen, rows = self.held.pop(which % len(self.held))
        self.held = [(cache, seen, rows), (cache.copy(), seen, []), *self.held]
        if len(self.held) > 3:
            self.read(3)
            self.held.pop()
        self.append(0, count)
        self.append(1, count_of_copy)
        self.append(0, 1)

    @rule(which=WHICH, count=COUNT)
    def fail(self, which: int, count: int) -> None:
        """In the last of the branches, when everything before has run."""
        cache, seen, _ = self.held[which % len(self.held)]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(nsa_fast.layer, "sliding_attention", lambda *_, **__: 1 // 0)
            self.layer(tokens(len(seen), 5, seed=2000), cache)
        self.append(which, count)

    @invariant()
    def every_cache_has_seen_its_tokens(self) -> None:
        for cache, seen, _ in self.held:
            assert (cache.batch, cache.length) == seen.shape[:2]


#: test_broken_builds.py finds every broken cache by it
RUN = settings(max_examples=20, stateful_step_count=6, deadline=None)
