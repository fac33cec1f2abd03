"""Stand-in for the layer: its sizes alone. Replaced by the oracle of the layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """The geometry of one layer."""

    model_dim: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    compress_block_size: int
    compress_block_sliding_stride: int
    compress_map: str
    compress_positions: bool
    selection_block_size: int
    num_selected_blocks: int
    num_initial_blocks: int
    num_local_blocks: int
    sliding_window_size: int
    num_mem_kv: int
