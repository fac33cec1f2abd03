"""Masks a second time, as whole arrays: they share no line with the definition."""

from __future__ import annotations

import numpy as np

from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Implementation


def positions(case: Case) -> np.ndarray:
    """p of every row, as a column."""
    return np.arange(case.q_len)[:, None] + case.kv_len - case.q_len


class DenseMasks(Implementation):
    """W1, W2, C2, C3, F1 to F4."""

    def sliding_mask(self, case: Case) -> np.ndarray:
        p = positions(case)
        distance = p - np.arange(case.kv_len)
        distance = distance if case.semantics.causal else abs(distance)
        reach = case.sliding_window_size + case.semantics.window_closed
        return np.asarray((p >= 0) & (distance >= 0) & (distance < reach))

    def last_tokens(self, case: Case) -> np.ndarray:
        """Of every compressed block (C1)."""
        start = case.semantics.compress_alignment == "start"
        d = case.compress_block_sliding_stride
        return np.arange((case.compress_block_size if start else d) - 1, case.kv_len, d)

    def compress_mask(self, case: Case) -> np.ndarray:
        p = positions(case)
        seen = self.last_tokens(case) + case.semantics.compress_strict <= p
        blocks = (p >= 0) & (seen | (not case.semantics.causal))
        return np.pad(blocks, ((0, 0), (case.num_mem_kv, 0)), constant_values=True)

    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        p, causal, size = positions(case), case.semantics.causal, case.selection_block_size
        blocks = np.arange(-(-case.kv_len // size))
        times = (block_indices[..., None] == blocks).sum(-2)
        if case.semantics.own_block_extra and causal:
            times = times + (p // size == blocks)
        if case.semantics.duplicates == "set":
            times = np.minimum(times, 1)
        tokens = np.arange(case.kv_len)
        times = times[..., tokens // size] * ((p >= 0) & ((tokens <= p) | (not causal)))
        return times.repeat(case.q_heads // block_indices.shape[1], axis=1)
