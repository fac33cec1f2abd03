"""The fast path: Native Sparse Attention's branches through FlexAttention.

The semantics are those of `nsa_ref`, written again: of that package only the switches are shared.
"""

from nsa_fast.branches import compress_attention, fine_attention, sliding_attention
from nsa_fast.flex import Attention
from nsa_fast.pool import compress_pool
from nsa_fast.selection import select_blocks
from nsa_fast.upstream import create_compress_mask, create_fine_mask, create_sliding_mask

__all__ = [
    "Attention",
    "compress_attention",
    "compress_pool",
    "create_compress_mask",
    "create_fine_mask",
    "create_sliding_mask",
    "fine_attention",
    "select_blocks",
    "sliding_attention",
]
