"""Weights of upstream's `SparseAttention`, under the names of the layer here.

Upstream is native-sparse-attention-pytorch 0.2.3; it is not imported. Letters: l =
compress_block_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_fast.checks import check_tensor
from nsa_fast.pool import map_shapes
from nsa_ref.semantics import LUCIDRAINS, Semantics

#: The layer's sizes, and upstream's attributes that hold them.
SIZES = {
    "q_heads": "heads",
    "kv_heads": "kv_heads",
    "head_dim": "dim_head",
    "value_dim": "dim_head",
    "compress_block_size": "compress_block_size",
    "compress_block_sliding_stride": "compress_block_sliding_stride",
    "selection_block_size": "selection_block_size",
    "num_selected_blocks": "num_selected_blocks",
    "sliding_window_size": "sliding_window_size",
    "num_mem_kv": "num_mem_compress_kv",
}

#: Upstream's compression of keys ("k") and values ("v"), and the names of `map_shapes`.
COMPRESS_MAP = {
    "{}_intrablock_positions": "positions",
    "{}_compress.1.weight": "weight_in",
    "{}_compress.1.bias": "bias_in",
    "{}_compress.3.weight": "weight_out",
    "{}_compress.3.bias": "bias_out",
}


class UpstreamLayer(NamedTuple):
    """One of upstream's layers, taken apart.

    sizes : every size and map of the layer by name
    semantics : `LUCIDRAINS` with the switches that the layer sets; if it is not causal, with
        empty rows of the fine branch zero, see `from_upstream`
    weights : as `upstream_weights` returns them
    """

    sizes: dict[str, Any]
    semantics: Semantics
    weights: dict[str, Tensor]


def from_upstream(module: torch.nn.Module) -> UpstreamLayer:
    """Sizes, switches and weights of a `SparseAttention`, by its attributes and state dict.

    ::

        causal                          semantics.causal
        norm                            semantics.input_norm
        query_heads_share_selected_kv   semantics.share_selection
        num_selected_blocks = 0         num_selected_blocks = 0: the own block alone, if causal
        fine_selection_flex_mask        semantics.score_floor = None, for that call
        use_diff_topk                   none: ValueError, its choice has a gradient (A4)
        cache                           none: the layer's own decode (G3)

    LUCIDRAINS runs as it is if the layer is causal. If it is not, a row without a chosen block sees
    no key in the fine branch (F4), and there LUCIDRAINS says uniform over all columns, which does
    not run: semantics.empty_row.fine is "zero", all other rows are those of LUCIDRAINS. Upstream
    does neither: such a row is uniform over the blocks that it gathered, or reads its own block
    (docs/upstream.md); where these hold all tokens, the first is LUCIDRAINS.

    Raises
    ------
    ValueError : use_diff_topk, or weights that `upstream_weights` refuses
    TypeError : a module without the attributes of a `SparseAttention`
    """
    sizes = {ours: _attribute(module, theirs) for ours, theirs in SIZES.items()}
    if _attribute(module, "use_diff_topk"):
        raise ValueError(
            "use_diff_topk=True has no switch: it lets a gradient through the top-n choice, which "
            "A4 excludes. Its output is that of use_diff_topk=False; set the attribute to False "
            "to load the layer without that gradient."
        )
    weights = upstream_weights(module.state_dict())
    sizes |= {
        "model_dim": weights["to_q.weight"].shape[1],
        "num_initial_blocks": 0,
        "num_local_blocks": 0,
        "compress_map": "mlp",
        "compress_positions": True,
    }
    causal = _attribute(module, "causal")
    rows = LUCIDRAINS.empty_row
    semantics = dataclasses.replace(
        LUCIDRAINS,
        causal=causal,
        empty_row=rows if causal else rows._replace(fine="zero"),
        share_selection=_attribute(module, "query_heads_share_selected_kv"),
        input_norm="machine_eps" if "norm.weight" in weights else False,
    )
    return UpstreamLayer(sizes, semantics, weights)


def upstream_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's weights from upstream's state dict: split and reordered, no value is changed.

    ::

        to_qkv.weight                to_q.weight, to_k.weight, to_v.weight, in this order of rows
        compress_mem_kv              mem_k, mem_v
        k_intrablock_positions       compress_k.positions                          v alike
        k_compress.1, k_compress.3   compress_k.weight_in, .bias_in, .weight_out, .bias_out
        to_strategy_combine.0        gates; rows (head, branch) become (branch, head)
        combine_heads.weight         to_out.weight
        norm.weight                  norm.weight, absent for norm=False
        rotary_emb.freqs             nothing: it must hold 10000^(-2i / head_dim)

    All sizes are read off the shapes. What leaves no trace in a state dict, `from_upstream` reads
    off the module: stride, window, selection, causal.

    Shapes
    ------
    state_dict : mem_kv (2, kv_heads, num_mem_kv, head_dim) and so on, any floating dtype
    returns : the layer's names and shapes; detached, and views of the given tensors where no
        row moves

    Raises
    ------
    ValueError : a name that is missing or unknown (another compress_mlp or strategy_combine_mlp),
        a shape that does not fit (a compress_mlp_expand_factor other than 1), other rotary
        frequencies
    TypeError : a value that is no tensor
    """
    given = dict(state_dict)
    _check_names(given)
    # its axes name the sizes that all other shapes are made of
    memory = check_tensor(
        "compress_mem_kv", given["compress_mem_kv"], (2, "kv_heads", "num_mem_kv", "head_dim")
    )
    _, kv_heads, _, head_dim = memory.shape
    to_out = check_tensor(
        "combine_heads.weight", given["combine_heads.weight"], ("model_dim", "q_heads * head_dim")
    )
    model_dim, q_rows = to_out.shape
    q_heads, rest = divmod(q_rows, max(head_dim, 1))
    if min(kv_heads, head_dim, q_heads) < 1 or rest or q_heads % kv_heads:
        raise ValueError(
            f"combine_heads.weight has {q_rows} columns; they must be q_heads * head_dim with "
            f"head_dim={head_dim} and q_heads a multiple of kv_heads={kv_heads}, as "
            "compress_mem_kv has them."
        )
    kv_rows = kv_heads * head_dim
    positions = check_tensor(
        "k_intrablock_positions",
        given["k_intrablock_positions"],
        (kv_heads, "compress_block_size", head_dim),
    )
    size = positions.shape[1]
    flat = size * head_dim
    for name in ("k_compress.1.weight", "v_compress.1.weight"):
        hidden = check_tensor(name, given[name], ("hidden", flat)).shape[0]
        if hidden != flat:
            raise ValueError(
                f"{name} has {hidden} rows; there must be l * head_dim={flat}: a "
                "compress_mlp_expand_factor other than 1 is not supported."
            )
    for name, shape in _shapes(model_dim, q_heads, kv_heads, head_dim, size).items():
        if name in given:
            check_tensor(name, given[name], shape)
    _check_rotary(given["rotary_emb.freqs"], head_dim)

    given = {name: tensor.detach() for name, tensor in given.items()}
    weights = {"norm.weight": given["norm.weight"]} if "norm.weight" in given else {}
    rows = given["to_qkv.weight"].split((q_rows, kv_rows, kv_rows))
    weights |= zip(("to_q.weight", "to_k.weight", "to_v.weight"), rows)
    for kind in ("weight", "bias"):
        gates = given[f"to_strategy_combine.0.{kind}"].unflatten(0, (q_heads, 3))
        weights[f"gates.{kind}"] = gates.transpose(0, 1).flatten(0, 1)
    weights["mem_k"], weights["mem_v"] = given["compress_mem_kv"]
    for side in "kv":
        for theirs, ours in COMPRESS_MAP.items():
            weights[f"compress_{side}.{ours}"] = given[theirs.format(side)]
    weights["to_out.weight"] = given["combine_heads.weight"]
    return weights


def _shapes(
    model_dim: int, q_heads: int, kv_heads: int, head_dim: int, size: int
) -> dict[str, tuple[int | str, ...]]:
    """Upstream's names and shapes."""
    of_map = map_shapes("mlp", kv_heads, size, head_dim, hidden=size * head_dim)
    shapes: dict[str, tuple[int | str, ...]] = {
        "norm.weight": (model_dim,),
        "to_qkv.weight": ((q_heads + 2 * kv_heads) * head_dim, model_dim),
        "compress_mem_kv": (2, kv_heads, "num_mem_kv", head_dim),
        "to_strategy_combine.0.weight": (3 * q_heads, model_dim),
        "to_strategy_combine.0.bias": (3 * q_heads,),
        "combine_heads.weight": (model_dim, q_heads * head_dim),
        "rotary_emb.freqs": (head_dim // 2,),
    }
    for side in "kv":
        shapes |= {theirs.format(side): of_map[ours] for theirs, ours in COMPRESS_MAP.items()}
    return shapes


def _check_names(given: Mapping[str, Tensor]) -> None:
    wanted = _shapes(1, 1, 1, 1, 1).keys() - {"norm.weight"}
    missing = sorted(wanted - set(given))
    unknown = sorted(set(given) - wanted - {"norm.weight"})
    if not missing and not unknown:
        return
    reasons = []
    for prefixes, option in (
        (("k_compress.", "v_compress."), "compress_mlp"),
        (("to_strategy_combine.",), "strategy_combine_mlp"),
    ):
        if any(name.startswith(prefixes) for name in (*missing, *unknown)):
            reasons.append(f"a {option} other than the default is not supported")
    raise ValueError(
        f"state_dict lacks {missing} and has the unknown names {unknown}; it must be that of a "
        f"SparseAttention of native-sparse-attention-pytorch 0.2.3{': ' if reasons else ''}"
        f"{' and '.join(reasons)}."
    )


def _check_rotary(freqs: Tensor, head_dim: int) -> None:
    """ValueError unless freqs is 10000^(-2i / head_dim), to the accuracy of its dtype."""
    exponent = torch.arange(0, head_dim - 1, 2, dtype=torch.float64) / head_dim
    expected = 10000.0**-exponent
    # Upstream computes 1 / 10000 ** x in float32 and may round the result: half a spacing of x,
    # which ln 10000 < 10 magnifies, one of the power, half of the quotient, half of the rounding.
    spacings = 10 / 2 + 1 + 1 / 2 + 1 / 2
    spacing = max(torch.finfo(torch.float32).eps, torch.finfo(freqs.dtype).eps)
    found = freqs.detach().to("cpu", torch.float64)
    if not bool(((found - expected).abs() <= spacings * spacing * expected).all()):
        raise ValueError(
            f"rotary_emb.freqs={found.tolist()} must be 10000^(-2i / {head_dim}) = "
            f"{expected.tolist()}: the layer has no other frequencies."
        )


def _attribute(module: torch.nn.Module, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise TypeError(
            f"module has no attribute {name!r}; it must be a SparseAttention of "
            f"native-sparse-attention-pytorch 0.2.3, not {type(module).__name__}."
        ) from None
