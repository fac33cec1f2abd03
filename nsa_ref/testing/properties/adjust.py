"""Each function changes the drawn sizes so that the case shows what its property is about.

Each is an `Adjust`. What an implementation's limits exclude is taken back afterwards. A further
draw belongs behind the existing ones, so that cases that were found stay as they are.
"""

from __future__ import annotations

from hypothesis import strategies as st

from nsa_ref.testing.strategies import Drawn

#: Maps whose weights are l dim^2 numbers, or that many for each head, at most.
SMALL_MAPS = ("linear", "mean", "linear_per_head")
#: Inputs of an MLP whose weights, the square of that, cost nothing; and that cost a second.
SMALL_MLP, LARGE_MLP = 256, 2048
ONE_SMALL_HEAD = {"batch": 1, "q_heads": 1, "kv_heads": 1, "compress_map": "mean"}
BLOCK_SIZES = ("compress_block_sliding_stride", "compress_block_size", "selection_block_size")

# Windows


def smallest_or_widest_window(draw: st.DrawFn, sizes: Drawn) -> None:
    """W3: the smallest window, or one that covers everything."""
    kv_len = sizes["kv_len"]
    closed = sizes["semantics"].window_closed
    covers = [kv_len, kv_len + 1, 2 * kv_len + 7]
    sizes["sliding_window_size"] = draw(st.sampled_from([0 if closed else 1, *covers]))


def window_of_everything(draw: st.DrawFn, sizes: Drawn) -> None:
    """W3: every key before a row is in its window."""
    sizes["sliding_window_size"] = sizes["kv_len"] + draw(st.integers(0, 3))


# Lists of blocks


def short_last_block(draw: st.DrawFn, sizes: Drawn) -> None:
    """F2: kv_len = m l' + r with 0 < r < l', and the last block selected."""
    size = sizes["selection_block_size"]
    if size == 1:
        size = sizes["selection_block_size"] = 2 * sizes["compress_block_sliding_stride"]
    decoded = sizes["kv_len"] - sizes["q_len"]
    many_and_short = sizes["kv_len"] > 8 * size and sizes["kv_len"] % size
    if size > 1 and not many_and_short:
        kv_len = size * draw(st.integers(0, 4)) + draw(st.integers(1, size - 1))
        sizes["kv_len"], sizes["q_len"] = kv_len, max(1, kv_len - max(decoded, 0))
    sizes["num_selected_blocks"] = max(1, sizes["num_selected_blocks"])


def all_blocks(draw: st.DrawFn, sizes: Drawn) -> None:
    """F1: every block is selected, in any order, with a slot left over or none."""
    blocks = -(-sizes["kv_len"] // sizes["selection_block_size"])
    if blocks > 32:
        sizes["kv_len"] = sizes["q_len"] = 32 * sizes["selection_block_size"] - 1
        blocks = 32
    sizes["indices"] = "all"
    sizes["num_selected_blocks"] = blocks + draw(st.integers(0, 1))


def several_slots(draw: st.DrawFn, sizes: Drawn) -> None:
    """F3, I6: room for a block twice, or for indices that name no block."""
    sizes["num_selected_blocks"] = draw(st.integers(2, 5))


# Rows and keys


def few_rows(draw: st.DrawFn, sizes: Drawn) -> None:
    """One backward for every few rows: the last 33 see as far back as any."""
    sizes["q_len"] = min(sizes["q_len"], 33)


def key_for_every_row(draw: st.DrawFn, sizes: Drawn) -> None:
    """The prefix law cuts off tokens that are both queries and keys."""
    sizes["kv_len"] = max(sizes["kv_len"], sizes["q_len"])


def several_keys(draw: st.DrawFn, sizes: Drawn) -> None:
    """A row of a single key has no dq and no dk."""
    sizes["sliding_window_size"], sizes["num_selected_blocks"] = 100, 4


def many_visible_keys(draw: st.DrawFn, sizes: Drawn) -> None:
    """A3: rows that see more than a hundred keys each, so that sums over keys are long."""
    sizes["q_len"], sizes["kv_len"] = 16, 129
    sizes["sliding_window_size"] = sizes["kv_len"]
    sizes["compress_block_size"] = sizes["compress_block_sliding_stride"] = 1
    sizes["num_selected_blocks"] = -(-sizes["kv_len"] // sizes["selection_block_size"])


def entries_apart(draw: st.DrawFn, sizes: Drawn) -> None:
    """A5: the canary sits in one batch entry, so the entries cannot share memory."""
    if sizes["layout"] == "expanded":
        sizes["layout"] = "contiguous"


def rows_before_the_first_key(draw: st.DrawFn, sizes: Drawn) -> None:
    """A2: the first rows stand before every token."""
    sizes["q_len"] = sizes["kv_len"] + draw(st.integers(1, 4))


def rows_before_the_first_block(draw: st.DrawFn, sizes: Drawn) -> None:
    """A2: no memory, and the first rows come before the end of the first compressed block."""
    sizes["num_mem_kv"] = 0
    sizes["q_len"] = sizes["kv_len"] + draw(st.integers(0, 2))
    if not sizes["semantics"].compress_strict and sizes["compress_block_size"] == 1:
        sizes["q_len"] = sizes["kv_len"] + 1


def rows_without_blocks(draw: st.DrawFn, sizes: Drawn) -> None:
    """A2: rows whose indices name no block that they see, unless they see their own anyway."""
    if sizes["semantics"].own_block_extra:
        rows_before_the_first_key(draw, sizes)
    else:
        sizes["indices"] = draw(st.sampled_from(["mixed", "none", "few"]))
        sizes["q_len"] = max(sizes["q_len"], sizes["kv_len"])


# Memory and the maps of compression


def memory(draw: st.DrawFn, sizes: Drawn) -> None:
    """I1: memory columns, and a choice to which nothing is forced."""
    nothing_forced(draw, sizes)
    sizes["num_mem_kv"] = draw(st.sampled_from([1, 16, 2, 16]))  # many weigh more


def memory_where_causal(draw: st.DrawFn, sizes: Drawn) -> None:
    """C3: memory columns; without causality, that all blocks are visible is enough to see.

    A first one alone would be seen from the first position on, were it masked as keys are.
    """
    if sizes["semantics"].causal and sizes["num_mem_kv"] < 2:
        sizes["num_mem_kv"] = draw(st.sampled_from([16, 2]))


def mean_without_positions(draw: st.DrawFn, sizes: Drawn) -> None:
    """C1: a compressed key is the mean of its window's tokens, and nothing else."""
    sizes["compress_map"], sizes["compress_positions"] = "mean", False


def affordable_map(draw: st.DrawFn, sizes: Drawn) -> None:
    """C4: an MLP has l * dim inputs and as many hidden units; a large one reads few tokens."""
    length = sizes["compress_block_size"]
    inputs = length * sizes["head_dim"]
    if inputs > SMALL_MLP:
        few = inputs <= LARGE_MLP and sizes["kv_len"] <= 3 * length
        # the first one is that of the smallest case: limits may leave no smaller MLP
        sizes["compress_map"] = draw(st.sampled_from((*(["mlp"] if few else []), *SMALL_MAPS)))


def map_with_weights(draw: st.DrawFn, sizes: Drawn) -> None:
    """C4: compressed keys, of a map that has weights and is affordable."""
    window = sizes["compress_block_size"] + sizes["compress_block_sliding_stride"]
    sizes["kv_len"] = max(sizes["kv_len"], window)
    sizes["compress_map"] = draw(st.sampled_from(("linear", "linear_per_head", "mlp")))
    affordable_map(draw, sizes)


# The choice of blocks


def more_blocks_than_slots(draw: st.DrawFn, sizes: Drawn) -> None:
    """More candidates than n, so that scores decide; compressed blocks that overlap."""
    size = sizes["selection_block_size"]
    if sizes["kv_len"] < 4 * size:
        sizes["kv_len"] = 4 * size + draw(st.integers(0, 3))
        sizes["q_len"] = max(1, min(sizes["q_len"], sizes["kv_len"]))
    most = sizes["kv_len"] // size // 2
    sizes["num_selected_blocks"] = max(1, min(sizes["num_selected_blocks"], most))


def something_forced(draw: st.DrawFn, sizes: Drawn) -> None:
    """I4: initial blocks, local ones, or both."""
    more_blocks_than_slots(draw, sizes)
    forced = draw(st.sampled_from([(0, 1), (1, 1), (1, 0), (0, 2), (2, 1), (2, 2)]))
    sizes["num_initial_blocks"], sizes["num_local_blocks"] = forced


def nothing_forced(draw: st.DrawFn, sizes: Drawn) -> None:
    """Scores alone decide, and they are those of tokens."""
    more_blocks_than_slots(draw, sizes)
    sizes["num_initial_blocks"] = sizes["num_local_blocks"] = sizes["num_mem_kv"] = 0


def more_slots_than_blocks(draw: st.DrawFn, sizes: Drawn) -> None:
    """I6: every row has fewer candidates than slots, where there are few blocks."""
    sizes["kv_len"] = max(1, sizes["kv_len"])
    blocks = -(-sizes["kv_len"] // sizes["selection_block_size"])
    if blocks <= 64:
        sizes["num_selected_blocks"] = blocks + draw(st.integers(1, 3))


def one_head_a_group(draw: st.DrawFn, sizes: Drawn) -> None:
    """I2: no sum over heads."""
    nothing_forced(draw, sizes)
    sizes["q_heads"] = sizes["kv_heads"]


def like_scores(draw: st.DrawFn, sizes: Drawn) -> None:
    """I2: many candidates that are almost as good as each other, a part of which is chosen."""
    sizes["kv_len"] = max(sizes["kv_len"], 128)
    one_head_a_group(draw, sizes)
    blocks = sizes["kv_len"] // sizes["selection_block_size"]
    sizes["num_selected_blocks"] = max(1, blocks // 4)


def several_heads_a_group(draw: st.DrawFn, sizes: Drawn) -> None:
    """I3: sums over heads."""
    nothing_forced(draw, sizes)
    if sizes["q_heads"] == sizes["kv_heads"]:
        sizes["q_heads"] *= 2


def rows_before_the_first_window(draw: st.DrawFn, sizes: Drawn) -> None:
    """I5: the first rows see no compressed block: all blocks score 0, past or future."""
    nothing_forced(draw, sizes)
    if sizes["kv_len"] <= 64:
        sizes["q_len"] = sizes["kv_len"]


# Whole layers


def affordable_layer(draw: st.DrawFn, sizes: Drawn) -> None:
    """The compression map is affordable. Where an empty row is not zero, no row is empty."""
    empty = sizes["semantics"].empty_row
    if empty.compress == "uniform":
        # the mean over all columns would know how many are to come
        sizes["num_mem_kv"] = max(1, sizes["num_mem_kv"])
    if empty.fine != "zero":
        sizes["num_selected_blocks"] = max(1, sizes["num_selected_blocks"])
    if sizes["compress_block_size"] * max(sizes["head_dim"], sizes["value_dim"]) > 64:
        sizes["compress_map"] = draw(st.sampled_from(SMALL_MAPS))


def layer_with_windows(draw: st.DrawFn, sizes: Drawn) -> None:
    """G1, G3, G4: three sequences with compressed keys, which one before may have left behind."""
    affordable_layer(draw, sizes)
    sizes["batch"] = 3
    least = sizes["compress_block_size"] + sizes["compress_block_sliding_stride"]
    sizes["q_len"] = sizes["kv_len"] = max(sizes["kv_len"], least + draw(st.integers(0, 2)))


def layer_with_blocks_to_keep(draw: st.DrawFn, sizes: Drawn) -> None:
    """G1: the same, and few of many blocks: two requests are handed different ones."""
    layer_with_windows(draw, sizes)
    more_blocks_than_slots(draw, sizes)
    sizes["q_len"] = sizes["kv_len"]
    sizes["num_initial_blocks"] = sizes["num_local_blocks"] = 0


def layer_that_chooses(draw: st.DrawFn, sizes: Drawn) -> None:
    """A4: more candidates than n, within limits: scores decide, and could be differentiated."""
    affordable_layer(draw, sizes)
    more_blocks_than_slots(draw, sizes)
    sizes["q_len"] = sizes["kv_len"]
    sizes["num_initial_blocks"] = sizes["num_local_blocks"] = 0


def layer_of_groups_that_chooses(draw: st.DrawFn, sizes: Drawn) -> None:
    """Forced blocks and one or two of several others, weighed differently by a group's heads."""
    affordable_layer(draw, sizes)
    if sizes["q_heads"] == sizes["kv_heads"]:
        sizes["q_heads"] *= 2
    stride = sizes["compress_block_sliding_stride"]
    size = min(sizes["selection_block_size"], stride * max(1, 8 // stride))
    sizes["selection_block_size"] = size
    forced = sizes["num_initial_blocks"] + sizes["num_local_blocks"]
    least = (forced + 4) * size
    sizes["kv_len"] = sizes["q_len"] = max(sizes["kv_len"], least + draw(st.integers(0, 3)))
    sizes["num_selected_blocks"] = forced + draw(st.integers(1, 2))


def many_tokens(draw: st.DrawFn, sizes: Drawn) -> None:
    """G2 to G4: far more tokens than a window, a block or a chunk of a cache holds; a small head.

    Positions that do not fit into the 8 bits of bfloat16, and more than 48 compressed blocks.
    """
    affordable_layer(draw, sizes)
    sizes |= ONE_SMALL_HEAD | {
        "compress_block_size": 32,
        "compress_block_sliding_stride": 4,
        "selection_block_size": 16 * draw(st.integers(1, 2)),
        "num_selected_blocks": draw(st.integers(3, 4)),
        "sliding_window_size": draw(st.integers(20, 64)),
    }
    sizes["kv_len"] = sizes["q_len"] = draw(st.integers(262, 272))


def many_blocks(draw: st.DrawFn, sizes: Drawn) -> None:
    """More than 256 selection blocks of one token, forced ones among those that are chosen."""
    affordable_layer(draw, sizes)
    sizes |= ONE_SMALL_HEAD | {
        "compress_block_size": 2,
        "compress_block_sliding_stride": 1,
        "selection_block_size": 1,
        "num_initial_blocks": 1,
        "num_local_blocks": 2,
        "num_selected_blocks": 4,
    }
    sizes["kv_len"] = sizes["q_len"] = draw(st.integers(262, 272))


def rows_that_rotation_changes(draw: st.DrawFn, sizes: Drawn) -> None:
    """G2: rows that see several keys, and compressed blocks further apart than tokens."""
    if sizes["compress_block_sliding_stride"] == 1:
        for size in BLOCK_SIZES:
            sizes[size] *= 2
    affordable_layer(draw, sizes)
    sizes["sliding_window_size"] = max(2, sizes["sliding_window_size"])
    sizes["kv_len"] = sizes["q_len"] = max(sizes["kv_len"], 3 * sizes["compress_block_size"])


def layer_to_read_through(draw: st.DrawFn, sizes: Drawn) -> None:
    """A one-hot row for every token, a linear map, room for all heads; where limits allow it."""
    affordable_layer(draw, sizes)
    sizes["q_len"] = sizes["kv_len"] = min(sizes["kv_len"], 24)
    sizes["compress_map"], sizes["compress_positions"] = "linear", False
    sizes["model_dim"] = max(sizes["q_heads"] * sizes["value_dim"], sizes["kv_len"])


def layer_of_exact_numbers(draw: st.DrawFn, sizes: Drawn) -> None:
    """A linear map, and room for every block: scores are all the same, and decide nothing."""
    affordable_layer(draw, sizes)
    sizes["compress_map"], sizes["compress_positions"] = "linear", False
    blocks = -(-sizes["kv_len"] // sizes["selection_block_size"])
    sizes["num_selected_blocks"] = max(blocks, sizes["num_selected_blocks"])
