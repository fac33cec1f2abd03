"""The fast path: Native Sparse Attention through FlexAttention, by branches and whole.

The semantics are those of `nsa_ref`, written again: of that package only the switches are shared.
"""

from nsa_fast.branches import compress_attention, fine_attention, sliding_attention
from nsa_fast.cache import Cache
from nsa_fast.flex import Attention
from nsa_fast.layer import native_sparse_attention
from nsa_fast.module import NativeSparseAttention
from nsa_fast.pool import compress_pool
from nsa_fast.selection import select_blocks
from nsa_fast.upstream import create_compress_mask, create_fine_mask, create_sliding_mask

__all__ = [
    "Attention",
    "Cache",
    "NativeSparseAttention",
    "compress_attention",
    "compress_pool",
    "create_compress_mask",
    "create_fine_mask",
    "create_sliding_mask",
    "fine_attention",
    "native_sparse_attention",
    "select_blocks",
    "sliding_attention",
]
