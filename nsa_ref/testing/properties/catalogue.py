"""Every property once, a row each: what is asked, and on which cases.

A row begins with its name, clause, branch, method and check; `Property` says what each is. Suites
are generated in the order of the rows.
"""

from __future__ import annotations

from functools import partial

from nsa_ref.semantics import Semantics
from nsa_ref.testing.branches import COMPRESS, FINE, SLIDING
from nsa_ref.testing.case import GENERIC_INPUTS
from nsa_ref.testing.properties import (
    adjust,
    compression,
    extent,
    influence,
    laws,
    layer,
    masks,
    packed,
    selection,
    through_the_layer,
    values,
)
from nsa_ref.testing.properties.common import Property

#: Head dims of cases that are read out by one-hot vectors: one call per `head_dim` rows or columns.
PROBED_DIMS = (16, 24, 32)
#: Even, because rotary embedding turns pairs.
LAYER_DIMS = (8, 4, 2, 16, 6, 12)

RANDN = ("randn",)
LAYER_INPUTS = ("randn", "flat")
LARGE_LOGITS = ("huge", "heavy")
LONG_INPUTS = ("randn", "flat", "offsets")
CANARY_INPUTS = ("randn", "flat", "integers")
LINEAR_INPUTS = ("randn", "flat", "integers", "huge")
MIXED = ("mixed",)
DRIFT = ("drift",)


def causal(semantics: Semantics) -> bool:
    return semantics.causal


def not_causal(semantics: Semantics) -> bool:
    return not semantics.causal


def rotary(semantics: Semantics) -> bool:
    return semantics.rotary != "none"


def causal_and_rotary(semantics: Semantics) -> bool:
    return causal(semantics) and rotary(semantics)


def full_when_all_are_chosen(semantics: Semantics) -> bool:
    """Every key before a row is visible once, if every block is selected."""
    twice = semantics.own_block_extra and semantics.duplicates == "multiset"
    return semantics.causal and not twice


# fmt: off
# What all rows of a kind have in common
read_row = partial(Property, inputs=RANDN, head_dims=PROBED_DIMS, examples=36)
layer_row = partial(Property, inputs=LAYER_INPUTS, head_dims=LAYER_DIMS)
through_row = partial(Property, adjust=adjust.layer_to_read_through, inputs=RANDN,
                      head_dims=(8, 16), populated=True, examples=10)
canary_row = partial(Property, adjust=adjust.entries_apart, inputs=CANARY_INPUTS, populated=True,
                     examples=15)
long_row = partial(Property, extent="far", semantics=causal, why_not_tried=extent.no_long_sequences,
                   indices=MIXED, head_dims=PROBED_DIMS, populated=True, examples=4)
large_row = partial(Property, extent="large", why_not_tried=extent.no_large_tensors,
                    adjust=adjust.several_keys, inputs=RANDN, indices=MIXED, populated=True,
                    examples=1)

# What is asked stands first in a row; then, by name, how and on which cases
ROWS = (
    # Masks, bit by bit: as the implementation shows them, and as its forward reads
    Property("W1_sliding_mask_as_exposed", "W1", SLIDING, "sliding_mask", masks.exposed,
             semantics=causal, examples=36),
    read_row("W1_sliding_mask_as_read", "W1", SLIDING, "sliding", masks.read_forward,
             semantics=causal),
    Property("W2_sliding_mask_as_exposed", "W2", SLIDING, "sliding_mask", masks.exposed,
             semantics=not_causal, examples=36),
    read_row("W2_sliding_mask_as_read", "W2", SLIDING, "sliding", masks.read_forward,
             semantics=not_causal),
    Property("W3_sliding_mask_as_exposed", "W3", SLIDING, "sliding_mask", masks.exposed,
             semantics=causal, adjust=adjust.smallest_or_widest_window, examples=36),
    read_row("W3_sliding_mask_as_read", "W3", SLIDING, "sliding", masks.read_forward,
             semantics=causal, adjust=adjust.smallest_or_widest_window),
    Property("W3_window_of_everything_is_full_causal_attention", "W3", SLIDING, "sliding",
             laws.full_causal, semantics=causal, adjust=adjust.window_of_everything),
    Property("C2_compress_mask_as_exposed", "C2", COMPRESS, "compress_mask", masks.exposed,
             semantics=causal, examples=36),
    read_row("C2_compress_mask_as_read", "C2", COMPRESS, "compress", masks.read_forward,
             semantics=causal),
    Property("C3_compress_mask_as_exposed", "C3", COMPRESS, "compress_mask", masks.exposed,
             adjust=adjust.memory_where_causal, examples=36),
    read_row("C3_compress_mask_as_read", "C3", COMPRESS, "compress", masks.read_forward,
             adjust=adjust.memory_where_causal),
    Property("C1_windows_as_read", "C1", COMPRESS, "pool", compression.windows,
             adjust=adjust.mean_without_positions, head_dims=PROBED_DIMS, examples=36),
    Property("C4_pool", "C4", COMPRESS, "pool", compression.pooled,
             by_dtype=True, adjust=adjust.affordable_map, examples=96),
    Property("C4_pool_in_pairs", "C4", COMPRESS, "pool", compression.in_pairs,
             adjust=adjust.map_with_weights, populated=True, examples=7),
    Property("C4_pool_gradients", "C4", COMPRESS, "pool", compression.pooled_gradients,
             backward=True, adjust=adjust.affordable_map, examples=48),
    Property("C4_pool_gradients_in_pairs", "C4", COMPRESS, "pool", compression.in_pairs,
             backward=True, adjust=adjust.map_with_weights, populated=True, examples=7),
    Property("F1_fine_mask_as_exposed", "F1", FINE, "fine_mask", masks.exposed,
             semantics=causal, indices=("distinct", "few", "all"), examples=36),
    read_row("F1_fine_mask_as_read", "F1", FINE, "fine", masks.read_forward,
             semantics=causal, indices=("distinct", "few", "all")),
    Property("F2_fine_mask_as_exposed", "F2", FINE, "fine_mask", masks.exposed,
             semantics=causal, adjust=adjust.short_last_block, indices=("distinct", "all"),
             examples=36),
    read_row("F2_fine_mask_as_read", "F2", FINE, "fine", masks.read_forward,
             semantics=causal, adjust=adjust.short_last_block, indices=("distinct", "all")),
    Property("F3_fine_mask_as_exposed", "F3", FINE, "fine_mask", masks.exposed,
             adjust=adjust.several_slots, indices=("same", "few"), examples=36),
    read_row("F3_fine_mask_as_read", "F3", FINE, "fine", masks.read_forward,
             adjust=adjust.several_slots, indices=("same", "few")),
    Property("F4_fine_mask_as_exposed", "F4", FINE, "fine_mask", masks.exposed,
             semantics=not_causal, indices=("distinct", "few", "all", "mixed"), examples=36),
    read_row("F4_fine_mask_as_read", "F4", FINE, "fine", masks.read_forward,
             semantics=not_causal, indices=("distinct", "few", "all", "mixed")),
    Property("I6_fine_mask_as_exposed", "I6", FINE, "fine_mask", masks.exposed,
             semantics=causal, adjust=adjust.several_slots, indices=("mixed", "none"), examples=36),
    read_row("I6_fine_mask_as_read", "I6", FINE, "fine", masks.read_forward,
             semantics=causal, adjust=adjust.several_slots, indices=("mixed", "none")),
    Property("F1_all_blocks_selected_is_full_causal_attention", "F1", FINE, "fine",
             laws.full_causal, semantics=full_when_all_are_chosen, adjust=adjust.all_blocks),

    # compress: values and gradients (rounding is tried by dtype, edges by shape), and what must not
    # matter to them. Without causality every block is visible, and no canary is hidden.
    Property("A1_compress_output", "A1", COMPRESS, "compress", values.output,
             by_dtype=True, examples=48),
    Property("A1_compress_output_by_shape", "A1", COMPRESS, "compress", values.output, examples=24),
    Property("A1_compress_lse", "A1", COMPRESS, "compress", values.lse, by_dtype=True, examples=32),
    Property("A1_compress_heads", "A1", COMPRESS, "compress", influence.heads,
             inputs=RANDN, head_dims=PROBED_DIMS, populated=True, examples=15),
    Property("A1_compress_is_linear_in_v", "A1", COMPRESS, "compress", laws.linear_in_v,
             inputs=LINEAR_INPUTS, populated=True, examples=10),
    Property("A1_compress_permutation", "A1", COMPRESS, "compress", laws.permutation,
             populated=True, examples=10),
    Property("A1_compress_same_bits_again", "A1", COMPRESS, "compress", laws.same_bits,
             why_not_tried=laws.unstated, examples=15),
    Property("A3_compress_same_bits_again", "A3", COMPRESS, "compress", laws.same_bits,
             backward=True, why_not_tried=laws.unstated, examples=10),
    Property("A1_compress_in_pairs", "A1", COMPRESS, "compress", laws.in_pairs,
             populated=True, examples=7),
    Property("A3_compress_gradients_in_pairs", "A3", COMPRESS, "compress", laws.in_pairs,
             backward=True, populated=True, examples=7),
    Property("A2_compress_empty_rows", "A2", COMPRESS, "compress", values.empty_rows,
             semantics=causal, adjust=adjust.rows_before_the_first_block, populated=True),
    Property("A2_compress_empty_rows_backward", "A2", COMPRESS, "compress", values.empty_rows,
             backward=True, semantics=lambda s: s.causal and s.empty_row.compress == "zero",
             adjust=adjust.rows_before_the_first_block, populated=True, examples=15),
    Property("A3_compress_gradients", "A3", COMPRESS, "compress", values.gradients,
             backward=True, by_dtype=True, examples=48),
    Property("A3_compress_gradients_by_shape", "A3", COMPRESS, "compress", values.gradients,
             backward=True, examples=24),
    Property("A3_compress_gradients_of_long_sums", "A3", COMPRESS, "compress", values.gradients,
             backward=True, by_dtype=True, adjust=adjust.many_visible_keys, inputs=DRIFT,
             populated=True, examples=16),
    Property("A3_compress_mask_as_read_backward", "A3", COMPRESS, "compress", masks.read_backward,
             backward=True, adjust=adjust.few_rows, head_dims=PROBED_DIMS),
    canary_row("A5_compress_canary", "A5", COMPRESS, "compress", influence.canary,
               semantics=causal),
    canary_row("A5_compress_canary_backward", "A5", COMPRESS, "compress", influence.canary,
               backward=True, semantics=causal),
    Property("compress_rows_do_not_know_what_follows", "C2", COMPRESS, "compress", laws.prefix,
             semantics=causal, adjust=adjust.key_for_every_row, populated=True, examples=10),

    # fine: the same. Without causality a key is hidden in a block that is not selected.
    Property("A1_fine_output", "A1", FINE, "fine", values.output, by_dtype=True, examples=48),
    Property("A1_fine_output_by_shape", "A1", FINE, "fine", values.output, examples=24),
    Property("A1_fine_lse", "A1", FINE, "fine", values.lse, by_dtype=True, examples=32),
    Property("A1_fine_heads", "A1", FINE, "fine", influence.heads,
             adjust=adjust.several_heads_a_group, inputs=RANDN, head_dims=PROBED_DIMS,
             populated=True, examples=15),
    Property("A1_fine_is_linear_in_v", "A1", FINE, "fine", laws.linear_in_v,
             inputs=LINEAR_INPUTS, populated=True, examples=10),
    Property("A1_fine_permutation", "A1", FINE, "fine", laws.permutation,
             populated=True, examples=10),
    Property("A1_fine_same_bits_again", "A1", FINE, "fine", laws.same_bits,
             why_not_tried=laws.unstated, examples=15),
    Property("A3_fine_same_bits_again", "A3", FINE, "fine", laws.same_bits,
             backward=True, why_not_tried=laws.unstated, examples=10),
    Property("A1_fine_in_pairs", "A1", FINE, "fine", laws.in_pairs,
             populated=True, examples=7),
    Property("A3_fine_gradients_in_pairs", "A3", FINE, "fine", laws.in_pairs,
             backward=True, populated=True, examples=7),
    Property("A2_fine_empty_rows", "A2", FINE, "fine", values.empty_rows,
             adjust=adjust.rows_without_blocks, populated=True),
    Property("A2_fine_empty_rows_backward", "A2", FINE, "fine", values.empty_rows,
             backward=True, semantics=lambda s: s.empty_row.fine == "zero",
             adjust=adjust.rows_without_blocks, populated=True, examples=15),
    Property("A3_fine_gradients", "A3", FINE, "fine", values.gradients,
             backward=True, by_dtype=True, examples=48),
    Property("A3_fine_gradients_by_shape", "A3", FINE, "fine", values.gradients,
             backward=True, examples=24),
    Property("A3_fine_gradients_of_long_sums", "A3", FINE, "fine", values.gradients,
             backward=True, by_dtype=True, adjust=adjust.many_visible_keys, inputs=DRIFT,
             indices=("all",), populated=True, examples=16),
    Property("A3_fine_mask_as_read_backward", "A3", FINE, "fine", masks.read_backward,
             backward=True, adjust=adjust.few_rows, head_dims=PROBED_DIMS),
    canary_row("A5_fine_canary", "A5", FINE, "fine", influence.canary),
    canary_row("A5_fine_canary_backward", "A5", FINE, "fine", influence.canary, backward=True),
    Property("fine_rows_do_not_know_what_follows", "F1", FINE, "fine", laws.prefix,
             semantics=causal, adjust=adjust.key_for_every_row, populated=True, examples=10),

    # sliding: the same.
    Property("A1_sliding_output", "A1", SLIDING, "sliding", values.output,
             by_dtype=True, examples=48),
    Property("A1_sliding_output_by_shape", "A1", SLIDING, "sliding", values.output, examples=24),
    Property("A1_sliding_lse", "A1", SLIDING, "sliding", values.lse, by_dtype=True, examples=32),
    Property("A1_sliding_heads", "A1", SLIDING, "sliding", influence.heads,
             inputs=RANDN, head_dims=PROBED_DIMS, populated=True, examples=15),
    Property("A1_sliding_is_linear_in_v", "A1", SLIDING, "sliding", laws.linear_in_v,
             inputs=LINEAR_INPUTS, populated=True, examples=10),
    Property("A1_sliding_permutation", "A1", SLIDING, "sliding", laws.permutation,
             populated=True, examples=10),
    Property("A1_sliding_same_bits_again", "A1", SLIDING, "sliding", laws.same_bits,
             why_not_tried=laws.unstated, examples=15),
    Property("A3_sliding_same_bits_again", "A3", SLIDING, "sliding", laws.same_bits,
             backward=True, why_not_tried=laws.unstated, examples=10),
    Property("A1_sliding_in_pairs", "A1", SLIDING, "sliding", laws.in_pairs,
             populated=True, examples=7),
    Property("A3_sliding_gradients_in_pairs", "A3", SLIDING, "sliding", laws.in_pairs,
             backward=True, populated=True, examples=7),
    Property("A2_sliding_empty_rows", "A2", SLIDING, "sliding", values.empty_rows,
             semantics=causal, adjust=adjust.rows_before_the_first_key, populated=True),
    Property("A2_sliding_empty_rows_backward", "A2", SLIDING, "sliding", values.empty_rows,
             backward=True, semantics=lambda s: s.causal and s.empty_row.sliding == "zero",
             adjust=adjust.rows_before_the_first_key, populated=True, examples=15),
    Property("A3_sliding_gradients", "A3", SLIDING, "sliding", values.gradients,
             backward=True, by_dtype=True, examples=48),
    Property("A3_sliding_gradients_by_shape", "A3", SLIDING, "sliding", values.gradients,
             backward=True, examples=24),
    Property("A3_sliding_gradients_of_long_sums", "A3", SLIDING, "sliding", values.gradients,
             backward=True, by_dtype=True, adjust=adjust.many_visible_keys, inputs=DRIFT,
             populated=True, examples=16),
    Property("A3_sliding_mask_as_read_backward", "A3", SLIDING, "sliding", masks.read_backward,
             backward=True, adjust=adjust.few_rows, head_dims=PROBED_DIMS),
    canary_row("A5_sliding_canary", "A5", SLIDING, "sliding", influence.canary),
    canary_row("A5_sliding_canary_backward", "A5", SLIDING, "sliding", influence.canary,
               backward=True),
    Property("sliding_rows_do_not_know_what_follows", "W1", SLIDING, "sliding", laws.prefix,
             semantics=causal, adjust=adjust.key_for_every_row, populated=True, examples=10),

    # Sequences and tensors too long to hold a mask of; a case takes seconds, so there are few
    long_row("W1_sliding_mask_of_long_sequences", "W1", SLIDING, "sliding", extent.long_mask,
             inputs=RANDN),
    long_row("A3_sliding_mask_of_long_sequences_backward", "A3", SLIDING, "sliding",
             extent.long_backward_mask, backward=True, inputs=RANDN),
    long_row("A1_sliding_output_of_long_sequences", "A1", SLIDING, "sliding", extent.long_values,
             inputs=LONG_INPUTS),
    long_row("A3_sliding_gradients_of_long_sequences", "A3", SLIDING, "sliding", extent.long_values,
             backward=True, inputs=LONG_INPUTS),
    large_row("A1_sliding_large_tensors", "A1", SLIDING, "sliding", extent.large),
    large_row("A3_sliding_large_tensors_backward", "A3", SLIDING, "sliding", extent.large,
              backward=True),
    long_row("C2_compress_mask_of_long_sequences", "C2", COMPRESS, "compress", extent.long_mask,
             inputs=RANDN, examples=6),
    long_row("A3_compress_mask_of_long_sequences_backward", "A3", COMPRESS, "compress",
             extent.long_backward_mask, backward=True, inputs=RANDN),
    long_row("A1_compress_output_of_long_sequences", "A1", COMPRESS, "compress", extent.long_values,
             inputs=LONG_INPUTS),
    long_row("A3_compress_gradients_of_long_sequences", "A3", COMPRESS, "compress",
             extent.long_values, backward=True, inputs=LONG_INPUTS),
    large_row("A1_compress_large_tensors", "A1", COMPRESS, "compress", extent.large),
    large_row("A3_compress_large_tensors_backward", "A3", COMPRESS, "compress", extent.large,
              backward=True),
    long_row("F1_fine_mask_of_long_sequences", "F1", FINE, "fine", extent.long_mask, inputs=RANDN),
    long_row("A3_fine_mask_of_long_sequences_backward", "A3", FINE, "fine",
             extent.long_backward_mask, backward=True, inputs=RANDN),
    long_row("A1_fine_output_of_long_sequences", "A1", FINE, "fine", extent.long_values,
             inputs=LONG_INPUTS),
    long_row("A3_fine_gradients_of_long_sequences", "A3", FINE, "fine", extent.long_values,
             backward=True, inputs=LONG_INPUTS),
    large_row("A1_fine_large_tensors", "A1", FINE, "fine", extent.large),
    large_row("A3_fine_large_tensors_backward", "A3", FINE, "fine", extent.large, backward=True),

    # The choice of blocks: one check, asked where the part that a clause is about decides
    Property("I1_selection", "I1", None, "select", selection.valid_choice,
             adjust=adjust.memory, inputs=GENERIC_INPUTS, examples=64),
    Property("I2_selection", "I2", None, "select", selection.valid_choice,
             semantics=lambda s: s.importance == "overlap", adjust=adjust.one_head_a_group,
             inputs=GENERIC_INPUTS, examples=42),
    Property("I2_selection_of_like_scores", "I2", None, "select", selection.valid_choice,
             semantics=lambda s: s.importance == "overlap", adjust=adjust.like_scores,
             inputs=("flat",), populated=True, by_dtype=True, examples=8),
    Property("I3_selection", "I3", None, "select", selection.valid_choice,
             adjust=adjust.several_heads_a_group, inputs=GENERIC_INPUTS, examples=42),
    Property("I4_selection", "I4", None, "select", selection.valid_choice,
             adjust=adjust.something_forced, examples=42),
    Property("I5_selection", "I5", None, "select", selection.valid_choice,
             adjust=adjust.rows_before_the_first_window, inputs=("equal", "ties", "integers"),
             examples=42),
    Property("I6_selection", "I6", None, "select", selection.valid_choice,
             adjust=adjust.more_slots_than_blocks, examples=42),
    Property("I4_selection_in_pairs", "I4", None, "select", selection.in_pairs,
             adjust=adjust.nothing_forced, inputs=GENERIC_INPUTS, populated=True, examples=7),

    # Whole layers: with its own choice of blocks and with one that is handed in, decoded, packed
    layer_row("G1_layer_output", "G1", None, "layer", layer.output,
              by_dtype=True, adjust=adjust.affordable_layer),
    layer_row("G2_layer_rotation", "G2", None, "layer", layer.output,
              by_dtype=True, semantics=rotary, adjust=adjust.rows_that_rotation_changes,
              examples=16),
    layer_row("G2_layer_rotation_of_many_tokens", "G2", None, "layer", layer.output,
              semantics=rotary, adjust=adjust.many_tokens, populated=True, examples=2),
    layer_row("A4_layer_gradients", "A4", None, "layer", layer.gradients,
              precondition=layer.scores_decide, backward=True, by_dtype=True,
              adjust=adjust.layer_that_chooses),
    layer_row("G1_layer_output_with_blocks", "G1", None, "layer_with_blocks", layer.output,
              by_dtype=True, adjust=adjust.affordable_layer),
    layer_row("G2_layer_rotation_with_blocks", "G2", None, "layer_with_blocks", layer.output,
              by_dtype=True, semantics=rotary, adjust=adjust.rows_that_rotation_changes,
              examples=16),
    layer_row("G1_layer_gradients_with_blocks", "G1", None, "layer_with_blocks", layer.gradients,
              backward=True, by_dtype=True, adjust=adjust.affordable_layer),
    layer_row("G1_layer_output_where_scores_decide", "G1", None, "layer", layer.output,
              precondition=layer.scores_decide, by_dtype=True,
              adjust=adjust.layer_of_groups_that_chooses, populated=True, examples=16),
    layer_row("G1_layer_output_of_large_logits", "G1", None, "layer", layer.output,
              precondition=layer.scores_decide, inputs=LARGE_LOGITS, populated=True,
              adjust=adjust.layer_of_groups_that_chooses, examples=8),
    layer_row("G1_layer_output_in_exact_numbers", "G1", None, "layer", layer.exact_numbers,
              why_not_tried=layer.no_narrow_dtype, precondition=layer.sixteen_bits, by_dtype=True,
              adjust=adjust.layer_of_exact_numbers, populated=True, examples=12),
    layer_row("G1_layer_output_with_blocks_in_exact_numbers", "G1", None, "layer_with_blocks",
              layer.exact_numbers, why_not_tried=layer.no_narrow_dtype,
              precondition=layer.sixteen_bits, by_dtype=True,
              adjust=adjust.layer_of_exact_numbers, populated=True, examples=5),
    layer_row("G1_layer_gradients_in_exact_numbers", "G1", None, "layer", layer.exact_gradients,
              why_not_tried=layer.no_narrow_dtype, precondition=layer.sixteen_bits,
              backward=True, by_dtype=True,
              adjust=adjust.layer_of_exact_numbers, populated=True, examples=12),
    layer_row("G1_layer_output_after_another_request", "G1", None, "layer", layer.second_request,
              adjust=adjust.layer_with_windows, populated=True, examples=6),
    layer_row("G1_layer_gradients_after_another_request", "G1", None, "layer",
              layer.second_gradients, backward=True, adjust=adjust.layer_with_windows,
              populated=True, examples=6),
    layer_row("G1_layer_output_with_blocks_after_another_request", "G1", None, "layer_with_blocks",
              layer.second_request, adjust=adjust.layer_with_blocks_to_keep, populated=True,
              examples=4),
    layer_row("G1_layer_gradients_with_blocks_after_another_request", "G1", None,
              "layer_with_blocks", layer.second_gradients, backward=True,
              adjust=adjust.layer_with_blocks_to_keep, populated=True, examples=4),
    layer_row("G1_layer_gradients_of_large_logits", "G1", None, "layer_with_blocks",
              layer.gradients, backward=True, inputs=LARGE_LOGITS, populated=True,
              adjust=adjust.layer_with_windows, examples=8),
    layer_row("G3_decode", "G3", None, "decode", layer.output,
              by_dtype=True, semantics=causal, adjust=adjust.affordable_layer),
    layer_row("G3_decode_in_exact_numbers", "G3", None, "decode", layer.exact_numbers,
              why_not_tried=layer.no_narrow_dtype, precondition=layer.sixteen_bits, by_dtype=True,
              semantics=causal,
              adjust=adjust.layer_of_exact_numbers, populated=True, examples=5),
    layer_row("G3_decode_of_large_logits", "G3", None, "decode", layer.output,
              precondition=layer.scores_decide, inputs=LARGE_LOGITS, populated=True,
              semantics=causal, adjust=adjust.layer_of_groups_that_chooses, examples=12),
    layer_row("G3_decode_after_another_request", "G3", None, "decode", layer.second_request,
              semantics=causal, adjust=adjust.layer_with_windows, populated=True, examples=6),
    layer_row("G3_decode_of_many_tokens", "G3", None, "decode", layer.output,
              semantics=causal, adjust=adjust.many_tokens, populated=True, examples=2),
    layer_row("G3_decode_rotation_of_many_tokens", "G3", None, "decode", layer.output,
              semantics=causal_and_rotary, adjust=adjust.many_tokens, populated=True, examples=2),
    layer_row("G3_decode_of_many_blocks", "G3", None, "decode", layer.output,
              semantics=causal, adjust=adjust.many_blocks, populated=True, examples=2),
    layer_row("G4_varlen_of_many_tokens", "G4", None, "varlen", packed.output,
              adjust=adjust.many_tokens, populated=True, examples=2),
    layer_row("G4_varlen_rotation_of_many_tokens", "G4", None, "varlen", packed.output,
              semantics=rotary, adjust=adjust.many_tokens, populated=True, examples=2),
    layer_row("G1_layer_output_of_many_blocks", "G1", None, "layer", layer.output,
              adjust=adjust.many_blocks, populated=True, examples=2),
    layer_row("G4_varlen", "G4", None, "varlen", packed.output,
              by_dtype=True, adjust=adjust.affordable_layer, examples=12),
    layer_row("G4_varlen_in_exact_numbers", "G4", None, "varlen", packed.exact_numbers,
              why_not_tried=layer.no_narrow_dtype, precondition=layer.sixteen_bits, by_dtype=True,
              adjust=adjust.layer_of_exact_numbers, populated=True, examples=5),
    layer_row("G4_varlen_after_another_request", "G4", None, "varlen", packed.second_request,
              adjust=adjust.layer_with_windows, populated=True, examples=6),
    layer_row("G4_varlen_of_large_logits", "G4", None, "varlen", packed.output,
              precondition=layer.scores_decide, inputs=LARGE_LOGITS, populated=True,
              adjust=adjust.layer_of_groups_that_chooses, examples=12),
    layer_row("G4_varlen_gradients", "G4", None, "varlen", packed.gradients,
              backward=True, by_dtype=True, adjust=adjust.affordable_layer, examples=8),
    layer_row("G4_varlen_gradients_after_another_request", "G4", None, "varlen",
              packed.second_gradients, backward=True, adjust=adjust.layer_with_windows,
              populated=True, examples=6),

    # Masks again, read through a layer that offers no branch by itself
    through_row("W1_sliding_mask_through_the_layer", "W1", SLIDING, "layer",
                through_the_layer.mask, semantics=causal),
    through_row("W2_sliding_mask_through_the_layer", "W2", SLIDING, "layer",
                through_the_layer.mask, semantics=not_causal),
    through_row("C2_compress_mask_through_the_layer", "C2", COMPRESS, "layer",
                through_the_layer.mask, semantics=causal),
    through_row("C3_compress_mask_through_the_layer", "C3", COMPRESS, "layer",
                through_the_layer.mask, semantics=not_causal),
    through_row("F1_fine_mask_through_the_layer", "F1", FINE, "layer_with_blocks",
                through_the_layer.mask, semantics=causal),
    through_row("F4_fine_mask_through_the_layer", "F4", FINE, "layer_with_blocks",
                through_the_layer.mask, semantics=not_causal),
)
# fmt: on

PROPERTIES = {row.name: row for row in ROWS}
