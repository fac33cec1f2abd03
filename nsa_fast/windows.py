"""The windows that become compressed blocks: where they stand (C1) and who sees them (C2).

Paper's letters: l = size, d = stride, both in tokens. Blocks are counted from 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor

from nsa_fast.checks import MAX_LENGTH, check_size
from nsa_ref.semantics import Semantics

Number = TypeVar("Number", int, Tensor)


class Windows(NamedTuple):
    """Windows of l tokens, one every d tokens."""

    size: int
    stride: int
    semantics: Semantics

    @classmethod
    def checked(
        cls, compress_block_size: Any, compress_block_sliding_stride: Any, semantics: Semantics
    ) -> Windows:
        """TypeError for sizes that are no integers, ValueError for those below 1 or too large."""
        return cls(
            check_size("compress_block_size", compress_block_size, 1, MAX_LENGTH),
            check_size(
                "compress_block_sliding_stride", compress_block_sliding_stride, 1, MAX_LENGTH
            ),
            semantics,
        )

    def last_token(self, block: Number) -> Number:
        """C1: i d + l - 1 where windows are aligned at their start, else (i + 1) d - 1."""
        start = self.semantics.compress_alignment == "start"
        return block * self.stride + (self.size if start else self.stride) - 1

    def first_token(self, block: Number) -> Number:
        """C1; negative where a window begins before token 0."""
        return self.last_token(block) - self.size + 1

    def count(self, kv_len: int) -> int:
        """Compressed blocks of kv_len tokens (C1): incomplete windows are dropped."""
        return max(0, (kv_len - 1 - self.last_token(0)) // self.stride + 1)

    def seen_from(self, block: Number) -> Number:
        """C2: the first position that sees a block, if it is causal."""
        return self.last_token(block) + int(self.semantics.compress_strict)

    def sees(self, position: Tensor, block: Tensor) -> Tensor:
        """C2: whether a position sees a block, if it is causal."""
        return self.seen_from(block) <= position

    def num_seen(self, position: Number) -> Number:
        """How many blocks a position `sees`, if it is causal; always the first ones.

        Not yet cut to those that there are: it may be negative, or more than all.
        """
        return (position - self.seen_from(0)) // self.stride + 1


def from_token(x: Tensor, first: int) -> Tensor:
    """x (batch, heads, tokens, dim) from token `first` on, with zeros for tokens before 0."""
    return F.pad(x, (0, 0, -first, 0)) if first < 0 else x[:, :, first:]
