"""Every property once: its clause, its branch, and the cases that it is asked on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from nsa_ref.semantics import Semantics
from nsa_ref.testing.branches import (
    BRANCHES,
    COMPRESS,
    FINE,
    SLIDING,
    Branch,
)
from nsa_ref.testing.case import GENERIC_INPUTS
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Check, Property
from nsa_ref.testing.properties.compression import pooled, windows
from nsa_ref.testing.properties.extent import (
    large,
    long_backward_mask,
    long_mask,
    long_values,
    not_far,
    not_large,
)
from nsa_ref.testing.properties.influence import canary_backward, canary_forward, heads
from nsa_ref.testing.properties.laws import (
    is_full_causal,
    linear_in_v,
    permutation,
    prefix,
    same_bits,
    unstated,
)
from nsa_ref.testing.properties.layer import (
    layer_gradients,
    layer_output,
    mask_through_the_layer,
    packed,
    packed_gradients,
    where_scores_decide,
)
from nsa_ref.testing.properties.masks import backward_mask, exposed_mask, forward_mask
from nsa_ref.testing.properties.selection import selection
from nsa_ref.testing.properties.values import empty_rows, gradients, output
from nsa_ref.testing.strategies import Adjust, Sizes

#: Head dims of cases that are read out by one-hot vectors: one call per `head_dim` rows or columns.
PROBED_DIMS = (16, 24, 32)


def _any(semantics: Semantics) -> bool:
    return True


PROPERTIES: dict[str, Property] = {}


def _register(
    clause: str,
    branch: Branch | str,
    check: Check,
    name: str,
    *,
    method: str | None = None,
    backward: bool = False,
    by_dtype: bool = False,
    extent: str = "",
    requires: Callable[[Implementation], str] = lambda implementation: "",
    semantics: Callable[[Semantics], bool] = _any,
    examples: int = 20,
    **options: Any,
) -> None:
    where = branch.name if isinstance(branch, Branch) else branch
    PROPERTIES[name] = Property(
        name=name,
        clause=clause,
        branch=where,
        about="pool" if method == "pool" else where,
        method=method or where,
        backward=backward,
        check=check,
        semantics=semantics,
        options=options,
        extent=extent,
        requires=requires,
        by_dtype=by_dtype,
        examples=examples,
    )


def _causal(semantics: Semantics) -> bool:
    return semantics.causal


def _rotary(semantics: Semantics) -> bool:
    return semantics.rotary != "none"


def _not_causal(semantics: Semantics) -> bool:
    return not semantics.causal


def _zero_rows(branch: Branch) -> Callable[[Semantics], bool]:
    return lambda semantics: (
        (semantics.causal or branch is FINE) and getattr(semantics.empty_row, branch.name) == "zero"
    )


def _window(draw: st.DrawFn, sizes: Sizes) -> None:
    """W3: the smallest window, or one that covers everything."""
    kv_len = sizes["kv_len"]
    closed = sizes["semantics"].window_closed
    covers = [kv_len, kv_len + 1, 2 * kv_len + 7]
    sizes["sliding_window_size"] = draw(st.sampled_from([0 if closed else 1, *covers]))


def _window_covers(draw: st.DrawFn, sizes: Sizes) -> None:
    sizes["sliding_window_size"] = sizes["kv_len"] + draw(st.integers(0, 3))


def _short_last_block(draw: st.DrawFn, sizes: Sizes) -> None:
    """F2: kv_len = m l' + r with 0 < r < l', and the last block selected."""
    size = sizes["selection_block_size"]
    if size == 1:
        size = sizes["selection_block_size"] = 2 * sizes["compress_block_sliding_stride"]
    decoded = sizes["kv_len"] - sizes["q_len"]
    if size > 1:
        kv_len = size * draw(st.integers(0, 4)) + draw(st.integers(1, size - 1))
        sizes["kv_len"], sizes["q_len"] = kv_len, max(1, kv_len - max(decoded, 0))
    sizes["num_selected_blocks"] = max(1, sizes["num_selected_blocks"])


def _all_blocks(draw: st.DrawFn, sizes: Sizes) -> None:
    blocks = -(-sizes["kv_len"] // sizes["selection_block_size"])
    if blocks > 32:
        sizes["kv_len"] = sizes["q_len"] = 32 * sizes["selection_block_size"] - 1
        blocks = 32
    sizes["indices"] = "all"
    sizes["num_selected_blocks"] = blocks + draw(st.integers(0, 1))


def _several_slots(draw: st.DrawFn, sizes: Sizes) -> None:
    sizes["num_selected_blocks"] = draw(st.integers(2, 5))


def _hidden_keys(draw: st.DrawFn, sizes: Sizes) -> None:
    """A5: the canary sits in one batch entry, so the entries cannot share memory."""
    if sizes["layout"] == "expanded":
        sizes["layout"] = "contiguous"


def _few_rows(draw: st.DrawFn, sizes: Sizes) -> None:
    """One backward for every few rows: the last 33 see as far back as any."""
    sizes["q_len"] = min(sizes["q_len"], 33)


def _square(draw: st.DrawFn, sizes: Sizes) -> None:
    """The prefix law cuts off tokens that are both queries and keys."""
    sizes["kv_len"] = max(sizes["kv_len"], sizes["q_len"])


def _memory_or_not_causal(draw: st.DrawFn, sizes: Sizes) -> None:
    if sizes["semantics"].causal and sizes["num_mem_kv"] == 0:
        sizes["num_mem_kv"] = draw(st.sampled_from([1, 2, 16]))


def _rows_without_keys(branch: Branch) -> Adjust:
    def adjust(draw: st.DrawFn, sizes: Sizes) -> None:
        if branch is COMPRESS:
            # the first tokens come before the end of the first block
            sizes["num_mem_kv"] = 0
            sizes["q_len"] = sizes["kv_len"] + draw(st.integers(0, 2))
            if not sizes["semantics"].compress_strict and sizes["compress_block_size"] == 1:
                sizes["q_len"] = sizes["kv_len"] + 1
        elif branch is FINE and not sizes["semantics"].own_block_extra:
            sizes["indices"] = draw(st.sampled_from(["mixed", "none", "few"]))
            sizes["q_len"] = max(sizes["q_len"], sizes["kv_len"])
        else:
            # queries that stand before the first key
            sizes["q_len"] = sizes["kv_len"] + draw(st.integers(1, 4))

    return adjust


def _several_keys(draw: st.DrawFn, sizes: Sizes) -> None:
    """A row of a single key has no dq and no dk."""
    sizes["sliding_window_size"], sizes["num_selected_blocks"] = 100, 4


def _mean_without_positions(draw: st.DrawFn, sizes: Sizes) -> None:
    sizes["compress_map"], sizes["compress_positions"] = "mean", False


#: Maps whose weights are l dim^2 numbers, or that many for each head, at most.
SMALL_MAPS = ("linear", "mean", "linear_per_head")


def _small_maps(draw: st.DrawFn, sizes: Sizes) -> None:
    """An MLP of l * dim inputs and as many hidden units is kept affordable."""
    if sizes["compress_block_size"] * sizes["head_dim"] > 256:
        sizes["compress_map"] = draw(st.sampled_from(SMALL_MAPS))


def _rows_that_choose(draw: st.DrawFn, sizes: Sizes) -> None:
    """More candidates than n, so that scores decide; compressed blocks that overlap."""
    size = sizes["selection_block_size"]
    if sizes["kv_len"] < 4 * size:
        sizes["kv_len"] = 4 * size + draw(st.integers(0, 3))
        sizes["q_len"] = max(1, min(sizes["q_len"], sizes["kv_len"]))
    most = sizes["kv_len"] // size // 2
    sizes["num_selected_blocks"] = max(1, min(sizes["num_selected_blocks"], most))


def _something_forced(draw: st.DrawFn, sizes: Sizes) -> None:
    _rows_that_choose(draw, sizes)
    forced = draw(st.sampled_from([(0, 1), (1, 1), (1, 0), (0, 2), (2, 1), (2, 2)]))
    sizes["num_initial_blocks"], sizes["num_local_blocks"] = forced


def _nothing_forced(draw: st.DrawFn, sizes: Sizes) -> None:
    _rows_that_choose(draw, sizes)
    sizes["num_initial_blocks"] = sizes["num_local_blocks"] = sizes["num_mem_kv"] = 0


def _one_head_a_group(draw: st.DrawFn, sizes: Sizes) -> None:
    _nothing_forced(draw, sizes)
    sizes["q_heads"] = sizes["kv_heads"]


def _early_rows(draw: st.DrawFn, sizes: Sizes) -> None:
    """Rows before the end of the first window: no score but 0, for past and future alike."""
    _nothing_forced(draw, sizes)
    if sizes["kv_len"] <= 64:
        sizes["q_len"] = sizes["kv_len"]


def _memory(draw: st.DrawFn, sizes: Sizes) -> None:
    _nothing_forced(draw, sizes)
    sizes["num_mem_kv"] = draw(st.sampled_from([1, 2, 16]))


def _groups(draw: st.DrawFn, sizes: Sizes) -> None:
    _nothing_forced(draw, sizes)
    if sizes["q_heads"] == sizes["kv_heads"]:
        sizes["q_heads"] *= 2


def _whole_layer(draw: st.DrawFn, sizes: Sizes) -> None:
    """Affordable maps; within limits, no row without keys where that is no number."""
    empty = sizes["semantics"].empty_row
    if empty.compress == "uniform":
        # the mean over all columns would know how many are to come
        sizes["num_mem_kv"] = max(1, sizes["num_mem_kv"])
    if empty.fine != "zero":
        sizes["num_selected_blocks"] = max(1, sizes["num_selected_blocks"])
    if sizes["compress_block_size"] * max(sizes["head_dim"], sizes["value_dim"]) > 64:
        sizes["compress_map"] = draw(st.sampled_from(SMALL_MAPS))


def _layer_that_chooses(draw: st.DrawFn, sizes: Sizes) -> None:
    """More candidates than n, within limits: scores decide, and could be differentiated."""
    _whole_layer(draw, sizes)
    _rows_that_choose(draw, sizes)
    sizes["q_len"] = sizes["kv_len"]
    sizes["num_initial_blocks"] = sizes["num_local_blocks"] = 0


def _layer_of_groups_that_chooses(draw: st.DrawFn, sizes: Sizes) -> None:
    """Forced blocks and one or two of several others, weighed differently by a group's heads."""
    _whole_layer(draw, sizes)
    if sizes["q_heads"] == sizes["kv_heads"]:
        sizes["q_heads"] *= 2
    stride = sizes["compress_block_sliding_stride"]
    size = min(sizes["selection_block_size"], stride * max(1, 8 // stride))
    sizes["selection_block_size"] = size
    forced = sizes["num_initial_blocks"] + sizes["num_local_blocks"]
    least = (forced + 4) * size
    sizes["kv_len"] = sizes["q_len"] = max(sizes["kv_len"], least + draw(st.integers(0, 3)))
    sizes["num_selected_blocks"] = forced + draw(st.integers(1, 2))


def _many_tokens(draw: st.DrawFn, sizes: Sizes) -> None:
    """Far more tokens than a window, a block or a chunk of a cache holds; one small head."""
    _whole_layer(draw, sizes)
    sizes |= {
        "batch": 1,
        "q_heads": 1,
        "kv_heads": 1,
        "compress_block_size": 32,
        "compress_block_sliding_stride": 16,
        "compress_map": "mean",
        "selection_block_size": 16 * draw(st.integers(1, 2)),
        "num_selected_blocks": draw(st.integers(3, 4)),
        "sliding_window_size": draw(st.integers(20, 64)),
    }
    sizes["kv_len"] = sizes["q_len"] = draw(st.integers(240, 260))


def _many_blocks(draw: st.DrawFn, sizes: Sizes) -> None:
    """More than 128 selection blocks of two tokens, forced ones among those that are chosen."""
    _whole_layer(draw, sizes)
    sizes |= {
        "batch": 1,
        "q_heads": 1,
        "kv_heads": 1,
        "compress_block_size": 4,
        "compress_block_sliding_stride": 2,
        "compress_map": "mean",
        "selection_block_size": 2,
        "num_initial_blocks": 1,
        "num_local_blocks": 2,
        "num_selected_blocks": 4,
    }
    sizes["kv_len"] = sizes["q_len"] = draw(st.integers(266, 272))


def _rotated(draw: st.DrawFn, sizes: Sizes) -> None:
    """Rows that see several keys, and compressed blocks further apart than tokens."""
    if sizes["compress_block_sliding_stride"] == 1:
        for size in (
            "compress_block_sliding_stride",
            "compress_block_size",
            "selection_block_size",
        ):
            sizes[size] *= 2
    _whole_layer(draw, sizes)
    sizes["sliding_window_size"] = max(2, sizes["sliding_window_size"])
    sizes["kv_len"] = sizes["q_len"] = max(sizes["kv_len"], 3 * sizes["compress_block_size"])


def _read_through_the_layer(draw: st.DrawFn, sizes: Sizes) -> None:
    """A one-hot row for every token, a linear map, room for all heads; where limits allow it."""
    _whole_layer(draw, sizes)
    sizes["q_len"] = sizes["kv_len"] = min(sizes["kv_len"], 24)
    sizes["compress_map"], sizes["compress_positions"] = "linear", False
    sizes["model_dim"] = max(sizes["q_heads"] * sizes["value_dim"], sizes["kv_len"])


def _window_properties() -> None:
    probe: dict[str, Any] = {"head_dims": PROBED_DIMS, "inputs": ("randn",)}
    for clause, semantics, adjust in (
        ("W1", _causal, None),
        ("W2", _not_causal, None),
        ("W3", _causal, _window),
    ):
        exposed: dict[str, Any] = {"semantics": semantics, "adjust": adjust, "examples": 36}
        _register(
            clause,
            SLIDING,
            exposed_mask(SLIDING, clause),
            f"{clause}_sliding_mask_as_exposed",
            method="sliding_mask",
            **exposed,
        )
        _register(
            clause,
            SLIDING,
            forward_mask(SLIDING, clause),
            f"{clause}_sliding_mask_as_read",
            **(exposed | probe),
        )
    _register(
        "W3",
        SLIDING,
        is_full_causal(SLIDING, "W3"),
        "W3_window_of_everything_is_full_causal_attention",
        semantics=_causal,
        adjust=_window_covers,
    )


def _compress_properties() -> None:
    probe: dict[str, Any] = {"head_dims": PROBED_DIMS, "inputs": ("randn",)}
    for clause, semantics, adjust in (
        ("C2", _causal, None),
        ("C3", _any, _memory_or_not_causal),
    ):
        exposed: dict[str, Any] = {"semantics": semantics, "adjust": adjust, "examples": 36}
        _register(
            clause,
            COMPRESS,
            exposed_mask(COMPRESS, clause),
            f"{clause}_compress_mask_as_exposed",
            method="compress_mask",
            **exposed,
        )
        _register(
            clause,
            COMPRESS,
            forward_mask(COMPRESS, clause),
            f"{clause}_compress_mask_as_read",
            **(exposed | probe),
        )
    _register(
        "C1",
        COMPRESS,
        windows,
        "C1_windows_as_read",
        method="pool",
        adjust=_mean_without_positions,
        head_dims=PROBED_DIMS,
        examples=36,
    )
    _register(
        "C4",
        COMPRESS,
        pooled(False),
        "C4_pool",
        method="pool",
        by_dtype=True,
        adjust=_small_maps,
        examples=64,
    )
    _register(
        "C4",
        COMPRESS,
        pooled(True),
        "C4_pool_gradients",
        method="pool",
        backward=True,
        adjust=_small_maps,
    )


def _fine_properties() -> None:
    probe: dict[str, Any] = {"head_dims": PROBED_DIMS, "inputs": ("randn",)}
    for clause, semantics, adjust, indices in (
        ("F1", _causal, None, ("distinct", "few", "all")),
        ("F2", _causal, _short_last_block, ("distinct", "all")),
        ("F3", _any, _several_slots, ("same", "few")),
        ("F4", _not_causal, None, ("distinct", "few", "all", "mixed")),
        ("I6", _causal, _several_slots, ("mixed", "none")),
    ):
        exposed: dict[str, Any] = {
            "semantics": semantics,
            "adjust": adjust,
            "indices": indices,
            "examples": 36,
        }
        _register(
            clause,
            FINE,
            exposed_mask(FINE, clause),
            f"{clause}_fine_mask_as_exposed",
            method="fine_mask",
            **exposed,
        )
        _register(
            clause,
            FINE,
            forward_mask(FINE, clause),
            f"{clause}_fine_mask_as_read",
            **(exposed | probe),
        )
    _register(
        "F1",
        FINE,
        is_full_causal(FINE, "F1"),
        "F1_all_blocks_selected_is_full_causal_attention",
        semantics=lambda s: s.causal and not (s.own_block_extra and s.duplicates == "multiset"),
        adjust=_all_blocks,
    )


def _attention_properties() -> None:
    for branch in BRANCHES:
        name = branch.name
        _register(
            "A1", branch, output(branch, "out"), f"A1_{name}_output", by_dtype=True, examples=48
        )
        _register("A1", branch, output(branch, "out"), f"A1_{name}_output_by_shape", examples=24)
        _register("A1", branch, output(branch, "lse"), f"A1_{name}_lse", by_dtype=True, examples=32)
        _register(
            "A1",
            branch,
            heads(branch),
            f"A1_{name}_heads",
            populated=True,
            inputs=("randn",),
            head_dims=PROBED_DIMS,
            adjust=_groups if branch is FINE else None,
            examples=15,
        )
        _register(
            "A1",
            branch,
            linear_in_v(branch),
            f"A1_{name}_is_linear_in_v",
            populated=True,
            inputs=("randn", "flat", "integers", "huge"),
            examples=10,
        )
        _register(
            "A1",
            branch,
            permutation(branch),
            f"A1_{name}_permutation",
            populated=True,
            examples=10,
        )
        for backward in (False, True):
            _register(
                "A3" if backward else "A1",
                branch,
                same_bits(branch, backward=backward),
                f"{'A3' if backward else 'A1'}_{name}_same_bits_again",
                backward=backward,
                requires=unstated,
                examples=10,
            )
        _register(
            "A2",
            branch,
            empty_rows(branch, backward=False),
            f"A2_{name}_empty_rows",
            populated=True,
            semantics=_any if branch is FINE else _causal,
            adjust=_rows_without_keys(branch),
        )
        _register(
            "A2",
            branch,
            empty_rows(branch, backward=True),
            f"A2_{name}_empty_rows_backward",
            populated=True,
            backward=True,
            semantics=_zero_rows(branch),
            adjust=_rows_without_keys(branch),
            examples=15,
        )
        _register(
            "A3",
            branch,
            gradients(branch),
            f"A3_{name}_gradients",
            backward=True,
            by_dtype=True,
            examples=48,
        )
        _register(
            "A3",
            branch,
            gradients(branch),
            f"A3_{name}_gradients_by_shape",
            backward=True,
            examples=24,
        )
        _register(
            "A3",
            branch,
            backward_mask(branch),
            f"A3_{name}_mask_as_read_backward",
            backward=True,
            adjust=_few_rows,
            head_dims=PROBED_DIMS,
            examples=20,
        )
        quiet: dict[str, Any] = {
            "inputs": ("randn", "flat", "integers"),
            "populated": True,
            "adjust": _hidden_keys,
            # without causality every block is visible, and nothing is hidden
            "semantics": _causal if branch is COMPRESS else _any,
            "examples": 15,
        }
        _register("A5", branch, canary_forward(branch), f"A5_{name}_canary", **quiet)
        _register(
            "A5",
            branch,
            canary_backward(branch),
            f"A5_{name}_canary_backward",
            backward=True,
            **quiet,
        )
        _register(
            {"sliding": "W1", "compress": "C2", "fine": "F1"}[name],
            branch,
            prefix(branch),
            f"{name}_rows_do_not_know_what_follows",
            populated=True,
            adjust=_square,
            semantics=_causal,
            examples=10,
        )


def _extent_properties() -> None:
    for branch, clause in ((SLIDING, "W1"), (COMPRESS, "C2"), (FINE, "F1")):
        name = branch.name
        far: dict[str, Any] = {
            "extent": "far",
            "populated": True,
            "requires": not_far,
            "semantics": _causal,
            "inputs": ("randn",),
            "indices": ("mixed",),
            "head_dims": PROBED_DIMS,
            "examples": 4,
        }
        _register(
            clause,
            branch,
            long_mask(branch, clause),
            f"{clause}_{name}_mask_of_long_sequences",
            **far,
        )
        _register(
            "A3",
            branch,
            long_backward_mask(branch),
            f"A3_{name}_mask_of_long_sequences_backward",
            backward=True,
            **far,
        )
        for backward in (False, True):
            _register(
                "A3" if backward else "A1",
                branch,
                long_values(branch, backward=backward),
                f"A3_{name}_gradients_of_long_sequences"
                if backward
                else f"A1_{name}_output_of_long_sequences",
                backward=backward,
                **(far | {"inputs": ("randn", "flat", "offsets")}),
            )
        huge: dict[str, Any] = {
            "extent": "large",
            "adjust": _several_keys,
            "populated": True,
            "requires": not_large,
            "inputs": ("randn",),
            "indices": ("mixed",),
            "examples": 1,
        }
        _register("A1", branch, large(branch, backward=False), f"A1_{name}_large_tensors", **huge)
        _register(
            "A3",
            branch,
            large(branch, backward=True),
            f"A3_{name}_large_tensors_backward",
            backward=True,
            **huge,
        )


def _layer_properties() -> None:
    common: dict[str, Any] = {
        "head_dims": (8, 4, 2, 16),  # even: rotary embedding turns pairs
        "inputs": ("randn", "flat"),
        "by_dtype": True,
        "adjust": _whole_layer,
    }
    for method, how in (("layer", ""), ("layer_with_blocks", "_with_blocks")):
        _register(
            "G1", "layer", layer_output(method), f"G1_layer_output{how}", method=method, **common
        )
        rotated: dict[str, Any] = {"semantics": _rotary, "adjust": _rotated, "examples": 16}
        _register(
            "G2",
            "layer",
            layer_output(method),
            f"G2_layer_rotation{how}",
            method=method,
            **(common | rotated),
        )
        clause = "A4" if method == "layer" else "G1"
        scored = {"adjust": _layer_that_chooses} if method == "layer" else {}
        check = layer_gradients(method, clause)
        _register(
            clause,
            "layer",
            where_scores_decide(check) if method == "layer" else check,
            f"{clause}_layer_gradients{how}",
            method=method,
            backward=True,
            **(common | scored),
        )
    chooses: dict[str, Any] = common | {"adjust": _layer_of_groups_that_chooses, "populated": True}
    _register(
        "G1",
        "layer",
        where_scores_decide(layer_output("layer")),
        "G1_layer_output_where_scores_decide",
        method="layer",
        **(chooses | {"examples": 16}),
    )
    decode: dict[str, Any] = {"method": "decode", "semantics": _causal}
    row = layer_output("decode", "G3")
    _register("G3", "layer", row, "G3_decode", **decode, **common)
    _register(
        "G3",
        "layer",
        where_scores_decide(row),
        "G3_decode_where_scores_decide",
        **decode,
        **(chooses | {"examples": 16}),
    )
    many: dict[str, Any] = common | {"adjust": _many_tokens, "populated": True}
    many |= {"by_dtype": False, "examples": 2}
    _register("G3", "layer", row, "G3_decode_of_many_tokens", **decode, **many)
    blocks: dict[str, Any] = many | {"adjust": _many_blocks}
    output = layer_output("layer")
    _register("G1", "layer", output, "G1_layer_output_of_many_blocks", method="layer", **blocks)
    _register("G4", "layer", packed, "G4_varlen", method="varlen", **(common | {"examples": 12}))
    _register(
        "G4",
        "layer",
        where_scores_decide(packed),
        "G4_varlen_of_many_blocks",
        method="varlen",
        **(chooses | {"examples": 8}),
    )
    _register(
        "G4",
        "layer",
        packed_gradients,
        "G4_varlen_gradients",
        method="varlen",
        backward=True,
        **(common | {"examples": 8}),
    )
    for branch, clause in ((SLIDING, "W1"), (COMPRESS, "C2"), (FINE, "F1")):
        _register(
            clause,
            "layer",
            mask_through_the_layer(branch, clause),
            f"{clause}_{branch.name}_mask_through_the_layer",
            method="layer_with_blocks" if branch is FINE else "layer",
            semantics=_causal,
            populated=True,
            adjust=_read_through_the_layer,
            inputs=("randn",),
            head_dims=(8, 16),
            examples=10,
        )


def _selection_properties() -> None:
    generic: dict[str, Any] = {"inputs": GENERIC_INPUTS, "method": "select"}
    for clause, options in (
        ("I1", {**generic, "adjust": _memory}),
        (
            "I2",
            {
                **generic,
                "adjust": _one_head_a_group,
                "semantics": lambda s: s.importance == "overlap",
            },
        ),
        ("I3", {**generic, "adjust": _groups}),
        ("I4", {"method": "select", "adjust": _something_forced}),
        (
            "I5",
            {"method": "select", "inputs": ("equal", "ties", "integers"), "adjust": _early_rows},
        ),
        ("I6", {"method": "select"}),
    ):
        _register(
            clause, "selection", selection(clause), f"{clause}_selection", examples=42, **options
        )


_window_properties()
_compress_properties()
_fine_properties()
_attention_properties()
_extent_properties()
_selection_properties()
_layer_properties()
