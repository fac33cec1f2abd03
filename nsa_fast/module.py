"""The layer as an `nn.Module`: the weights of `native_sparse_attention`, and their first values."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor, nn

from nsa_fast.cache import Cache
from nsa_fast.checks import check_flag, check_size, check_stride_divides
from nsa_fast.layer import NORM_EPS, Layer, Weights, run, weight_shapes
from nsa_fast.pool import map_shapes
from nsa_ref.semantics import BRANCHES, PAPER, PRESETS, Semantics

#: Gate biases at first: the sliding branch is open, and the others learn beside it.
GATE_BIAS = {"compress": -2.0, "fine": -2.0, "sliding": 2.0}

#: Standard deviation of the positions at first.
POSITION_STD = 0.02


class NativeSparseAttention(nn.Module):
    """Native Sparse Attention as a layer (G1 to G4); see `native_sparse_attention`.

    Its state dict has the names and shapes that the functional form lists. forward calls each
    submodule, so that hooks on it run, and so does what stands in its place (LoRA, pruning).

    First values: projections and compression maps are those of `nn.Linear`, positions are small and
    memory is 0. The gates are the same for every token, and all but the sliding branch's are nearly
    shut.

    Parameters
    ----------
    model_dim, q_heads, kv_heads, head_dim : channels of x; heads of q, and of k and v; channels of
        a head of q and k
    value_dim : channels of a head of v; default head_dim
    compress_block_size, compress_block_sliding_stride : l and d, in tokens
    compress_map, compress_positions : "mean", "linear", "linear_per_head" or "mlp" from a window to
        one key; whether each place in a window has a vector of its own that is added first
    selection_block_size, num_selected_blocks : l' in tokens, and n
    num_initial_blocks, num_local_blocks : blocks that are always among the n (I4)
    sliding_window_size : w, in tokens
    num_mem_kv : keys and values that every query sees in the compress branch (C3)
    semantics : whose conventions; default the paper's
    backend : as `sliding_attention`

    Raises
    ------
    ValueError, TypeError : sizes that do not fit together, a switch that does not run here
    """

    def __init__(
        self,
        model_dim: int,
        *,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        compress_block_size: int,
        compress_block_sliding_stride: int,
        compress_map: str = "mlp",
        compress_positions: bool = True,
        selection_block_size: int,
        num_selected_blocks: int,
        num_initial_blocks: int = 1,
        num_local_blocks: int = 2,
        sliding_window_size: int,
        num_mem_kv: int = 0,
        semantics: Semantics = PAPER,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.model_dim = check_size("model_dim", model_dim, 1)
        self.compress_positions = check_flag("compress_positions", compress_positions)
        self.num_mem_kv = check_size("num_mem_kv", num_mem_kv, 0)
        value_dim = head_dim if value_dim is None else value_dim
        self.layer = layer = Layer(
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            compress_block_size=compress_block_size,
            compress_block_sliding_stride=compress_block_sliding_stride,
            compress_map=compress_map,
            selection_block_size=selection_block_size,
            num_selected_blocks=num_selected_blocks,
            num_initial_blocks=num_initial_blocks,
            num_local_blocks=num_local_blocks,
            sliding_window_size=sliding_window_size,
            semantics=semantics,
            backend=backend,
        )
        layer.as_run(self.num_mem_kv, own_choice=True)
        # at once, instead of at the first selection
        check_stride_divides("selection_block_size", selection_block_size, layer.windows.stride)
        if semantics.importance == "overlap":
            check_stride_divides("compress_block_size", compress_block_size, layer.windows.stride)
        if semantics.input_norm:
            own = semantics.input_norm == "machine_eps"
            self.norm = nn.RMSNorm(model_dim, eps=None if own else NORM_EPS)
        self.to_q = nn.Linear(model_dim, q_heads * head_dim, bias=False)
        for kind, dim in (("k", head_dim), ("v", value_dim)):
            for suffix in layer.suffixes:
                projection = nn.Linear(model_dim, kv_heads * dim, bias=False)
                self.add_module(f"to_{kind}{suffix}", projection)
            memory = torch.empty(kv_heads, num_mem_kv, dim)
            self.register_parameter(f"mem_{kind}", nn.Parameter(memory))
            self.add_module(f"compress_{kind}", _CompressMap(layer, dim, compress_positions))
        self.gates = nn.Linear(model_dim, len(BRANCHES) * q_heads)
        if semantics.output_projection:
            self.to_out = nn.Linear(q_heads * value_dim, model_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First values of memory and gates; the submodules have drawn theirs."""
        with torch.no_grad():
            self.mem_k.zero_()
            self.mem_v.zero_()
            self.gates.weight.zero_()
            bias = torch.tensor([GATE_BIAS[branch] for branch in BRANCHES])
            self.gates.bias.copy_(bias.repeat_interleave(self.layer.q_heads))

    def forward(
        self, x: Tensor, cache: Cache | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """`native_sparse_attention` with these weights; shapes, dtypes and errors are its own.

        Raises
        ------
        ValueError : also if the cache belongs to another module, which is then what it was, or if a
            submodule is gone
        TypeError : also under torch.export
        """
        if torch.compiler.is_exporting():  # here, because dynamo looks into no other function
            raise TypeError(
                "x cannot be traced by torch.export: which blocks a token reads depends on data. "
                "Export what stands around the layer."
            )
        if isinstance(cache, Cache):
            cache.check_owner(self)
        modules = {name: child for name, child in self._modules.items() if child is not None}
        needed = dict.fromkeys(
            name.partition(".")[0] for name in weight_shapes(self.layer) if "." in name
        )
        if gone := [name for name in needed if name not in modules]:
            raise ValueError(f"submodules {gone} are gone; the layer calls each of {list(needed)}.")
        weights = Weights(self._read(), modules)
        out = run(x, weights, self.layer, self.model_dim, cache=cache, cu_seqlens=cu_seqlens)
        if cache is not None:
            cache.bind(self)
        return out

    def _read(self) -> dict[str, Tensor]:
        """Memory, and the weights of the submodules that nothing else stands in the place of.

        Weights on meta are left out where a hook, or a forward of one's own, may fill them when the
        submodule is called, as offloading does.
        """
        read = {"mem_k": self.mem_k, "mem_v": self.mem_v}
        for of_child, child in self._modules.items():  # one may stand under two names
            if type(child) in (nn.Linear, nn.RMSNorm, _CompressMap):
                filled = bool(child._forward_pre_hooks) or "forward" in vars(child)
                for name, weight in child.named_parameters(recurse=False):
                    if not (filled and weight.is_meta):
                        read[f"{of_child}.{name}"] = weight
        return read

    def empty_cache(self, batch: int) -> Cache:
        """A cache without tokens for `batch` sequences, which belongs to this module."""
        cache = Cache(batch)
        cache.bind(self)
        return cache

    def extra_repr(self) -> str:
        own = ("model_dim", "num_mem_kv", "compress_positions")
        sizes = {name: getattr(self, name) for name in own} | self.layer.arguments()
        semantics = sizes.pop("semantics")
        text = [f"{name}={value!r}" for name, value in sizes.items()]
        return ", ".join([*text, f"semantics={_described(semantics)}"])


class _CompressMap(nn.Module):
    """`compress_pool`, and its weights by its names."""

    def __init__(self, layer: Layer, dim: int, positions: bool) -> None:
        super().__init__()
        self.layer = layer
        size = layer.compress_block_size
        flat = size * dim
        shapes = map_shapes(layer.compress_map, layer.kv_heads, size, dim, hidden=flat)
        for name, shape in shapes.items():
            if positions or name != "positions":
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._names = [name for name, _ in self.named_parameters()]
        self._bound = 1 / math.sqrt(flat)
        self.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, kv_heads, tokens, dim) -> (batch, kv_heads, blocks, dim)."""
        return self.layer.pooled(tokens, {name: getattr(self, name) for name in self._names})

    def reset_parameters(self) -> None:
        """Weights and biases as `nn.Linear` draws them: all of them read l dim numbers."""
        for name, parameter in self.named_parameters():
            if name == "positions":
                nn.init.normal_(parameter, std=POSITION_STD)
            else:
                nn.init.uniform_(parameter, -self._bound, self._bound)


def _described(semantics: Semantics) -> str:
    """The preset's name, or the switches that differ from the paper's."""
    for name, preset in PRESETS.items():
        if semantics == preset:
            return name
    switches = {field.name: getattr(semantics, field.name) for field in fields(semantics)}
    changed = {name: x for name, x in switches.items() if x != getattr(PAPER, name)}
    return f"replace(PAPER, {', '.join(f'{name}={x!r}' for name, x in changed.items())})"
