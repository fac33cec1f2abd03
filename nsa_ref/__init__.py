"""The definition of Native Sparse Attention: NumPy only, float64, slow and obvious."""

from nsa_ref.attention import Attention, attend, attend_vjp
from nsa_ref.compress import (
    compress_windows,
    num_compress_blocks,
    pool,
    pool_vjp,
    pool_weight_shapes,
)
from nsa_ref.layer import (
    decode,
    layer,
    layer_block_indices,
    layer_vjp,
    layer_weight_shapes,
    varlen,
    varlen_vjp,
)
from nsa_ref.masks import compress_mask, fine_mask, sliding_mask
from nsa_ref.selection import (
    Scored,
    compress_probabilities,
    forced_blocks,
    importance,
    scored,
    select,
    selection_candidates,
    selection_probability,
    shared_strides,
    top_blocks,
)
from nsa_ref.semantics import (
    FLA,
    LUCIDRAINS,
    LUCIDRAINS_FLEX,
    PAPER,
    PRESETS,
    XUNHAO,
    PerBranch,
    Semantics,
)
from nsa_ref.sizes import Sizes

__all__ = [
    "FLA",
    "LUCIDRAINS",
    "LUCIDRAINS_FLEX",
    "PAPER",
    "PRESETS",
    "XUNHAO",
    "Attention",
    "PerBranch",
    "Scored",
    "Semantics",
    "Sizes",
    "attend",
    "attend_vjp",
    "compress_mask",
    "compress_probabilities",
    "compress_windows",
    "decode",
    "fine_mask",
    "forced_blocks",
    "importance",
    "layer",
    "layer_block_indices",
    "layer_vjp",
    "layer_weight_shapes",
    "num_compress_blocks",
    "pool",
    "pool_vjp",
    "pool_weight_shapes",
    "scored",
    "select",
    "selection_candidates",
    "selection_probability",
    "shared_strides",
    "sliding_mask",
    "top_blocks",
    "varlen",
    "varlen_vjp",
]
