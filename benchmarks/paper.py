"""The paper's shape, which the estimates, the census and the script for a GPU are about.

Source: arXiv 2502.11089, section 4.1
"""

from __future__ import annotations

#: As `NativeSparseAttention` takes them. An initial block and two local ones are its defaults.
LAYER = {
    "model_dim": 2560,
    "q_heads": 64,
    "kv_heads": 4,
    "head_dim": 192,
    "value_dim": 128,
    "compress_block_size": 32,
    "compress_block_sliding_stride": 16,
    "selection_block_size": 64,
    "num_selected_blocks": 16,
    "sliding_window_size": 512,
}
DTYPE = "bfloat16"
TOKENS = 2**16
#: Blocks of a tile of 4 tokens, in the mean. It depends on what is chosen: 16 if all choose the
#: same, some 55 if they choose at random.
UNION = 24
#: Kernels that walk the blocks of a tile: the more differ, the longer they take.
OF_TILES = ("fine_forward", "fine_backward_q")
