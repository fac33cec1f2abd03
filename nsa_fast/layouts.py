"""Where heads and tokens stand in memory: each layout beside the way back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fast.block_lists import padded
from nsa_fast.flex import is_triton


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * dim) -> (batch, heads, tokens, dim)."""
    return tokens_first(x.unflatten(-1, (heads, -1)))


def tokens_first(x: Tensor) -> Tensor:
    """(batch, heads, tokens, dim) -> (batch, tokens, heads, dim), and back."""
    return x.transpose(1, 2)


class FineLayout(NamedTuple):
    """The order of rows and columns in the fine branch's kernels.

    Rows stand token by token: the heads that share a choice of blocks, then empty rows. So one
    token's rows are one row block, and its block list is its selection. Columns stand block by
    block: the tokens of a selection block, then empty columns.

    heads_per_choice : query heads that share a choice
    rows_per_token : at least heads_per_choice
    block_size : tokens of a selection block
    columns_per_block : at least block_size
    """

    heads_per_choice: int
    rows_per_token: int
    block_size: int
    columns_per_block: int

    def token_major(self, q: Tensor) -> Tensor:
        """(batch, q_heads, q_len, dim) -> (batch, choices, q_len * rows_per_token, dim)."""
        batch, q_heads, q_len, dim = q.shape
        choices = q_heads // self.heads_per_choice
        q = q.reshape(batch, choices, self.heads_per_choice, q_len, dim).transpose(2, 3)
        q = padded(q, 3, self.rows_per_token)
        return q.reshape(batch, choices, q_len * self.rows_per_token, dim)

    def head_major(self, rows: Tensor) -> Tensor:
        """The inverse of `token_major`; empty rows are left out."""
        batch, choices, count, dim = rows.shape
        q_len = count // self.rows_per_token
        rows = rows.reshape(batch, choices, q_len, self.rows_per_token, dim)
        rows = rows[:, :, :, : self.heads_per_choice].transpose(2, 3)
        return rows.reshape(batch, choices * self.heads_per_choice, q_len, dim)

    def num_columns(self, kv_len: int) -> int:
        """Columns of kv_len tokens."""
        if self.columns_per_block == self.block_size:
            return kv_len  # the last block may be short
        return -(-kv_len // self.block_size) * self.columns_per_block

    def spread(self, x: Tensor) -> Tensor:
        """(batch, kv_heads, kv_len, dim) -> (batch, kv_heads, num_columns, dim)."""
        if self.columns_per_block == self.block_size:
            return x
        batch, kv_heads, kv_len, dim = x.shape
        blocks = -(-kv_len // self.block_size)
        x = padded(x, 2, blocks * self.block_size)
        x = x.reshape(batch, kv_heads, blocks, self.block_size, dim)
        x = padded(x, 3, self.columns_per_block)
        return x.reshape(batch, kv_heads, blocks * self.columns_per_block, dim)

    def gathered(self, columns: Tensor, kv_len: int) -> Tensor:
        """The inverse of `spread`, for columns on the last axis; empty ones are left out."""
        key = torch.arange(kv_len, device=columns.device)
        return columns[..., key // self.block_size * self.columns_per_block + key % self.block_size]


def fine_layout(
    heads_per_choice: int, block_size: int, device: torch.device, backend: str
) -> FineLayout:
    """The layout that the kernels of a backend can take.

    The Triton kernels multiply tiles of at least 16 x 16, in powers of two: smaller groups get
    empty rows, and selection blocks that 16 does not divide get empty columns. All others
    take tiles of any size.
    """
    rows, columns = heads_per_choice, block_size
    if backend == "compiled" and is_triton(device):
        least = 16
        rows = max(least, 1 << (heads_per_choice - 1).bit_length())
        columns = -(-block_size // least) * least
    return FineLayout(heads_per_choice, rows, block_size, columns)
