"""Upstream's `SparseAttention`: its weights load, and its output is that of the layer here.

The converter is tested on state dicts whose layout is written out here. The comparison needs the
package native-sparse-attention-pytorch and is skipped without it. Where upstream departs from the
definition, the smallest case and the clause have a test; docs/upstream.md lists them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import nsa_ref
from nsa_ref.layer import layer, layer_vjp, selection_inputs
from nsa_ref.layer_bounds import LayerBounds, layer_bounds
from nsa_ref.selection import scored, top_blocks
from nsa_ref.semantics import LUCIDRAINS, LUCIDRAINS_FLEX, PerBranch
from nsa_ref.testing.choices import INVALID, valid_selection
from nsa_ref.testing.compare import compare

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch import Tensor  # noqa: E402

import nsa_fast.layer  # noqa: E402
from nsa_fast import (  # noqa: E402
    NativeSparseAttention,
    create_fine_mask,
    create_sliding_mask,
    native_sparse_attention,
)
from nsa_fast.upstream_weights import from_upstream, upstream_weights  # noqa: E402

NUMERICS_OF = {torch.float64: "fp64", torch.float32: "fp32"}

needs_upstream = pytest.mark.skipif(
    importlib.util.find_spec("native_sparse_attention_pytorch") is None,
    reason="native-sparse-attention-pytorch is not installed",
)


# --- the converter --------------------------------------------------------------------------------


def upstream_state_dict(
    *, q_heads: int = 4, kv_heads: int = 2, head_dim: int = 6, norm: bool = True
) -> dict[str, Tensor]:
    """Upstream's names and shapes, written down from its source; every number is another one.

    The model is 5 wide, windows are of 3 tokens, and there are 2 columns of memory.
    """
    flat = 3 * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "to_qkv.weight": ((q_heads + 2 * kv_heads) * head_dim, 5),
        "compress_mem_kv": (2, kv_heads, 2, head_dim),
        "to_strategy_combine.0.weight": (3 * q_heads, 5),
        "to_strategy_combine.0.bias": (3 * q_heads,),
        "combine_heads.weight": (5, q_heads * head_dim),
    }
    if norm:
        shapes["norm.weight"] = (5,)
    for side in "kv":
        shapes[f"{side}_intrablock_positions"] = (kv_heads, 3, head_dim)
        for place, rows in ((1, flat), (3, head_dim)):
            shapes[f"{side}_compress.{place}.weight"] = (rows, flat)
            shapes[f"{side}_compress.{place}.bias"] = (rows,)
    counts = [math.prod(shape) for shape in shapes.values()]
    numbers = torch.arange(sum(counts)).double().split(counts)
    state = {name: part.reshape(shapes[name]) for name, part in zip(shapes, numbers)}
    state["rotary_emb.freqs"] = 10000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    return state


def back_to_upstream(weights: dict[str, Tensor], q_heads: int, head_dim: int) -> dict[str, Tensor]:
    """The converter's inverse, index by index."""
    state = {
        "to_qkv.weight": torch.cat([weights[f"to_{name}.weight"] for name in "qkv"]),
        "compress_mem_kv": torch.stack([weights["mem_k"], weights["mem_v"]]),
        "combine_heads.weight": weights["to_out.weight"],
        "rotary_emb.freqs": 10000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim),
    }
    if "norm.weight" in weights:
        state["norm.weight"] = weights["norm.weight"]
    for kind in ("weight", "bias"):
        ours = weights[f"gates.{kind}"]
        rows = [ours[branch * q_heads + head] for head in range(q_heads) for branch in range(3)]
        state[f"to_strategy_combine.0.{kind}"] = torch.stack(rows)
    for side in "kv":
        state[f"{side}_intrablock_positions"] = weights[f"compress_{side}.positions"]
        for place, end in ((1, "in"), (3, "out")):
            for kind in ("weight", "bias"):
                ours = weights[f"compress_{side}.{kind}_{end}"]
                state[f"{side}_compress.{place}.{kind}"] = ours
    return state


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
def test_every_number_of_a_state_dict_arrives_once(q_heads: int, kv_heads: int, norm: bool) -> None:
    state = upstream_state_dict(q_heads=q_heads, kv_heads=kv_heads, norm=norm)
    again = back_to_upstream(upstream_weights(state), q_heads, 6)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(name)


def with_(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("to_qkv.weight"), "lacks ['to_qkv.weight']"),
        (with_("extra", 1), "unknown names ['extra']"),
        (without("k_compress.3.bias"), "a compress_mlp other than the default is not supported"),
        (with_("v_compress.conv.weight", 1), "a compress_mlp other than the default"),
        (with_("to_strategy_combine.0.2.bias", 1), "a strategy_combine_mlp other than the default"),
        (with_("k_compress.1.weight", 36, 18), "compress_mlp_expand_factor other than 1"),
        (with_("v_compress.3.weight", 6, 17), "v_compress.3.weight has shape (6, 17)"),
        (with_("compress_mem_kv", 2, 6), "compress_mem_kv has shape (2, 6)"),
        (with_("combine_heads.weight", 5, 23), "combine_heads.weight has 23 columns"),
        (with_("combine_heads.weight", 5, 18), "q_heads a multiple of kv_heads=2"),
        (with_("to_qkv.weight", 47, 5), "to_qkv.weight has shape (47, 5); it must be (48, 5)"),
        (with_("to_strategy_combine.0.bias", 4), "bias has shape (4,); it must be (12)"),
        (with_("norm.weight", 4), "norm.weight has shape (4,); it must be (5)"),
        (with_("v_intrablock_positions", 2, 4, 6), "it must be (2, 3, 6)"),
        (with_("rotary_emb.freqs", 2), "rotary_emb.freqs has shape (2,)"),
        (with_("rotary_emb.freqs", 3), "must be 10000^(-2i / 6)"),
        (lambda state: state["rotary_emb.freqs"].pow_(1.25), "must be 10000^(-2i / 6)"),
    ],
)
def test_what_does_not_load_is_said(
    change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = upstream_state_dict()
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        upstream_weights(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_frequencies_may_be_rounded_to_the_dtype_of_the_weights(dtype: str) -> None:
    state = upstream_state_dict(head_dim=32)
    # as upstream computes them
    freqs = 1.0 / (10000.0 ** (torch.arange(0, 32, 2).float() / 32))
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    state["rotary_emb.freqs"] = freqs.to(getattr(torch, dtype))
    weights = upstream_weights(state)
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}


def stand_in(**changes: Any) -> Any:
    """The attributes of a `SparseAttention`, without the package."""
    attributes: dict[str, Any] = {
        "heads": 4,
        "kv_heads": 2,
        "dim_head": 6,
        "compress_block_size": 3,
        "compress_block_sliding_stride": 2,
        "selection_block_size": 4,
        "num_selected_blocks": 3,
        "sliding_window_size": 7,
        "num_mem_compress_kv": 2,
        "causal": True,
        "use_diff_topk": False,
        "query_heads_share_selected_kv": False,
        "state_dict": upstream_state_dict,
    }
    return SimpleNamespace(**(attributes | changes))


def test_sizes_and_switches_are_read_off_the_module() -> None:
    layer = from_upstream(stand_in())
    assert layer.sizes == {
        "model_dim": 5,
        "q_heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "value_dim": 6,
        "compress_block_size": 3,
        "compress_block_sliding_stride": 2,
        "compress_map": "mlp",
        "compress_positions": True,
        "selection_block_size": 4,
        "num_selected_blocks": 3,
        "num_initial_blocks": 0,
        "num_local_blocks": 0,
        "sliding_window_size": 7,
        "num_mem_kv": 2,
    }
    assert layer.semantics == dataclasses.replace(LUCIDRAINS, share_selection=False)
    assert from_upstream(stand_in(query_heads_share_selected_kv=True)).semantics == LUCIDRAINS


def test_an_empty_row_of_fine_is_zero_where_the_module_is_not_causal() -> None:
    """A2: the one switch that is neither LUCIDRAINS' nor the layer's."""
    found = from_upstream(stand_in(causal=False, query_heads_share_selected_kv=True)).semantics
    rows = PerBranch("uniform", "zero", "uniform")
    assert found == dataclasses.replace(LUCIDRAINS, causal=False, empty_row=rows)


def own_module(module: torch.nn.Module) -> NativeSparseAttention:
    """The layer here, as a module with upstream's weights."""
    sizes, semantics, weights = from_upstream(module)
    own = NativeSparseAttention(**sizes, semantics=semantics).to(weights["mem_k"].dtype)
    own.load_state_dict(weights)
    return own


def test_the_module_takes_sizes_switches_and_weights_as_they_are() -> None:
    expected = upstream_weights(upstream_state_dict())
    found = own_module(stand_in()).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_gradient_through_the_choice_has_no_switch() -> None:
    """A4."""
    with pytest.raises(ValueError, match="use_diff_topk=True has no switch"):
        from_upstream(stand_in(use_diff_topk=True))


def test_another_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"no attribute .heads.; .* not Linear"):
        from_upstream(torch.nn.Linear(2, 2))


# --- upstream's module ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpstreamSizes(nsa_ref.Sizes):
    """One of upstream's layers, and an input for it, by the names here."""

    seq_len: int
    batch: int = 1
    model_dim: int = 3
    head_dim: int = 4
    sliding_window_size: int = 1
    num_mem_kv: int = 1
    causal: bool = True
    norm: bool = False
    share_selection: bool = True


#: These have the same names in upstream's layer.
SAME_NAMES = (
    "kv_heads",
    "sliding_window_size",
    "compress_block_size",
    "compress_block_sliding_stride",
    "selection_block_size",
    "num_selected_blocks",
    "causal",
    "norm",
)


def random_sizes(seed: int, *, causal: bool) -> UpstreamSizes:
    """Any sizes that upstream takes: l >= d, d divides l', w >= 1, head_dim even and above 2.

    Non-causal ones have a block to choose for every row, and a window that divides the length:
    what upstream does otherwise has tests of its own below.
    """
    rng = np.random.default_rng([seed, causal])

    def draw(least: int, most: int) -> int:
        return int(rng.integers(least, most + 1))

    kv_heads, stride, window = draw(1, 3), draw(1, 3), draw(1, 8)
    block = stride * draw(1, 4)
    seq_len = (
        draw(1, 3 if seed % 5 == 0 else 28)
        if causal
        else window * draw(-(-2 * block // window), 24 // window + 1)
    )
    return UpstreamSizes(
        seq_len=seq_len,
        batch=draw(1, 2),
        model_dim=draw(1, 20),
        q_heads=kv_heads * draw(1, 3),
        kv_heads=kv_heads,
        head_dim=2 * draw(2, 6),
        compress_block_size=stride + draw(0, 6),
        compress_block_sliding_stride=stride,
        selection_block_size=block,
        num_selected_blocks=draw(0 if causal else 1, 4),
        sliding_window_size=window,
        num_mem_kv=draw(1, 3),
        causal=causal,
        norm=bool(draw(0, 1)),
        share_selection=bool(draw(0, 1)),
    )


def upstream_layer(
    sizes: UpstreamSizes, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.nn.Module, Tensor]:
    """Upstream's module, every parameter random, and an input.

    In float64 one of its constants is not the definition's and is set to that: the frequencies,
    which it computes in float32.
    """
    from native_sparse_attention_pytorch import SparseAttention

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a remark for n = 0
        module = SparseAttention(
            dim=sizes.model_dim,
            dim_head=sizes.head_dim,
            heads=sizes.q_heads,
            num_compressed_mem_kv=sizes.num_mem_kv,
            query_heads_share_selected_kv=sizes.share_selection,
            **{name: getattr(sizes, name) for name in SAME_NAMES},
        )
    module = module.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # matrices keep the size of what they multiply
            width = parameter.shape[-1] if parameter.ndim == 2 else 1
            if name != "rotary_emb.freqs":
                parameter.normal_(std=width**-0.5, generator=generator)
        # every third seed has logits so large that some blocks are below the floor of 1e-10
        module.to_qkv.weight[: -module.qkv_split[2]] *= 4 if seed % 3 == 2 else 1
        if dtype == torch.float64:
            exponent = torch.arange(0, sizes.head_dim, 2).double() / sizes.head_dim
            module.rotary_emb.freqs.copy_(10000.0**-exponent)
    shape = (sizes.batch, sizes.seq_len, sizes.model_dim)
    return module, torch.randn(shape, generator=generator, dtype=dtype)


class Heard(Exception):
    """The choice is known, and the rest of the call is not needed."""


def upstream_choice(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The blocks that upstream's top-k takes, as it hands them to a mask: (batch, heads, rows, n).

    Among them are blocks that it hides again: those at the floor, and where there are too few
    candidates, others.
    """
    heard: list[Tensor] = []

    def listen(selected: Tensor, num_grouped_queries: int) -> None:
        heard.append(selected)
        raise Heard

    with contextlib.suppress(Heard), torch.no_grad():
        module(x, fine_selection_flex_mask=listen)
    heads = module.kv_heads if module.query_heads_share_selected_kv else module.heads
    none = torch.zeros((x.shape[0], heads, x.shape[1], 0), dtype=torch.int64)
    return heard[0] if heard else none


class Definition(NamedTuple):
    """The layer that upstream's module is to be, for the blocks that upstream chose.

    how : sizes, semantics and blocks
    another : rows in which that choice is valid and not the definition's own
    """

    how: dict[str, Any]
    numerics: str
    weights: dict[str, np.ndarray]
    x: np.ndarray
    another: int = 0

    def __call__(self) -> np.ndarray:
        return layer(self.x, self.weights, **self.how)

    def gradients(self, d_out: np.ndarray) -> dict[str, np.ndarray]:
        dx, dweights = layer_vjp(self.x, self.weights, d_out, **self.how)
        return {"x": dx, **dweights}

    def bounds(self, d_out: np.ndarray | None = None) -> LayerBounds:
        how = self.how | {"numerics": self.numerics}
        return layer_bounds(self.x, self.weights, d_out=d_out, **how)

    def assert_right(self, **found: Tensor) -> None:
        """Each of these is the definition's output, within its bound."""
        expected, bound = self(), self.bounds().out
        for who, out in found.items():
            assert_within(out, expected, bound, f"{who}, {self.how['sizes']}: out")


def valid_choice(module: torch.nn.Module, x: Tensor, *, flex: bool = False) -> Definition:
    """The definition of a module, and that the blocks which upstream chooses are a valid top-n.

    ReLU makes equal keys, and upstream's top-k promises no order of equal scores (I5).
    """
    parts = from_upstream(module)
    switches = ("causal", "share_selection", "input_norm")
    semantics = dataclasses.replace(
        LUCIDRAINS_FLEX if flex else LUCIDRAINS,
        **{name: getattr(parts.semantics, name) for name in switches},
    )
    if semantics.input_norm and x.dtype != torch.float64:
        semantics = dataclasses.replace(semantics, input_norm=True)  # what is declared is float32's
    sizes = nsa_ref.Sizes(**parts.sizes)
    weights = {name: weight.double().numpy() for name, weight in parts.weights.items()}
    tokens = x.detach().double().numpy()
    how: dict[str, Any] = {"sizes": sizes, "semantics": semantics}
    blocks = scored(*selection_inputs(tokens, weights, **how), kv_len=x.shape[1], **how)

    taken = upstream_choice(module, x).numpy()
    candidates = np.broadcast_to(blocks.candidates, blocks.scores.shape)
    shown = np.take_along_axis(candidates, taken, axis=-1)
    if semantics.score_floor is not None:
        shown &= np.take_along_axis(blocks.scores, taken, axis=-1) > semantics.score_floor
    taken = np.where(shown, taken, -1)
    found = Definition(how | {"block_indices": taken}, NUMERICS_OF[x.dtype], weights, tokens)
    verdict = valid_selection(taken, blocks, found.bounds().scores, **how)
    assert INVALID not in verdict.verdict, verdict.reasons
    all_slots = dataclasses.replace(sizes, num_selected_blocks=taken.shape[-1])
    expected = top_blocks(blocks, all_slots, semantics)
    another = (np.sort(taken, axis=-1) != np.sort(expected, axis=-1)).any(axis=-1)
    return found._replace(another=int(another.sum()))


@contextlib.contextmanager
def choice_of(definition: Definition) -> Iterator[None]:
    """The module here reads the blocks that upstream chose, if it might choose others.

    So no row is left out: each is compared for one valid choice.
    """
    with pytest.MonkeyPatch.context() as patch:
        if definition.another:
            chosen = torch.from_numpy(definition.how["block_indices"])
            patch.setattr(nsa_fast.layer, "select_blocks", lambda *_, **__: chosen)
        yield


def own_layer(
    module: torch.nn.Module, x: Tensor, *, flex: bool = False, **arguments: Any
) -> Tensor:
    """The functional form with the converted weights, for blocks of choice."""
    sizes, semantics, weights = from_upstream(module)
    # blocks that are handed in might be named twice (F3)
    semantics = dataclasses.replace(semantics, duplicates="set")
    if flex:
        semantics = dataclasses.replace(semantics, score_floor=None)
    for name in ("model_dim", "compress_positions", "num_mem_kv"):  # these are read off the weights
        del sizes[name]
    return native_sparse_attention(x, weights, **sizes, semantics=semantics, **arguments)


def assert_within(found: Tensor, expected: np.ndarray, bound: np.ndarray, what: str) -> None:
    compare("G1", what, found.detach().double().numpy(), expected, bound)


CONFIGURATIONS = [(seed, causal) for seed in range(25) for causal in (True, False)]


@needs_upstream
@pytest.mark.parametrize(("seed", "causal"), CONFIGURATIONS)
def test_upstream_and_the_layer_here_are_lucidrains(
    seed: int, causal: bool, record_property: Callable[[str, object], None]
) -> None:
    """G1, A4: the modules' output and all gradients, within the bounds of the dtype."""
    sizes = random_sizes(seed, causal=causal)
    dtype = torch.float32 if seed % 2 else torch.float64
    module, x = upstream_layer(sizes, seed, dtype)
    definition = valid_choice(module, x)
    record_property("rows_of_another_choice", definition.another)
    d_out = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    expected = {"out": definition(), **definition.gradients(d_out.double().numpy())}
    bounds = definition.bounds(d_out.double().numpy())
    bound_of = {"out": bounds.out, "x": bounds.dx, **bounds.dweights}

    own = own_module(module)
    with choice_of(definition):
        theirs, ours = (forward_and_backward(each, x, d_out) for each in (module, own))
    # a gradient is laid out as its parameter, and the converter only lays out anew
    of_weights = theirs.pop("weights") | {"rotary_emb.freqs": module.rotary_emb.freqs}
    theirs |= upstream_weights(of_weights)
    ours |= ours.pop("weights")
    for who, found in (("upstream", theirs), ("here", ours)):
        for name, value in expected.items():
            assert_within(found[name], value, bound_of[name], f"{who}, {sizes}: {name}")


def forward_and_backward(module: torch.nn.Module, x: Tensor, d_out: Tensor) -> dict[str, Any]:
    """The output, and the gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(d_out)
    weights = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in module.named_parameters()
    }
    return {"out": out, "x": x.grad, "weights": weights}


def test_the_configurations_reach_the_corners() -> None:
    drawn = [random_sizes(seed, causal=causal) for seed, causal in CONFIGURATIONS]
    assert len(drawn) >= 50
    corners: dict[str, Callable[[UpstreamSizes], bool]] = {
        "shorter than a block": lambda s: s.seq_len < s.selection_block_size,
        "shorter than a stride": lambda s: s.seq_len < s.compress_block_sliding_stride,
        "a partial last block": lambda s: s.seq_len % s.selection_block_size > 0,
        "l is no multiple of d": lambda s: (
            s.compress_block_size % s.compress_block_sliding_stride > 0
        ),
        "l = d": lambda s: s.compress_block_size == s.compress_block_sliding_stride,
        "l' = d": lambda s: s.selection_block_size == s.compress_block_sliding_stride,
        "n = 0": lambda s: s.num_selected_blocks == 0,
        "more than there are": lambda s: s.num_selected_blocks * s.selection_block_size > s.seq_len,
        "each head its own choice": lambda s: not s.share_selection and s.q_heads > s.kv_heads,
        "no norm": lambda s: not s.norm,
    }
    for corner, reached in corners.items():
        assert any(reached(sizes) for sizes in drawn), corner


@needs_upstream
def test_equal_scores_are_resolved_in_a_valid_way() -> None:
    """I5: all compressed keys are one key; upstream does not take the lower indices."""
    sizes = UpstreamSizes(seq_len=24, num_selected_blocks=2)
    module, x = upstream_layer(sizes, 0)
    with torch.no_grad():
        module.k_compress[3].weight.zero_()
    definition = valid_choice(module, x)
    assert definition.another
    with choice_of(definition):
        ours = own_module(module)(x)
    definition.assert_right(upstream=module(x), here=ours)


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without Dynamo, which takes seconds for every new shape."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@needs_upstream
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("untraced")
def test_upstream_through_the_masks_here_is_lucidrains_flex(seed: int) -> None:
    """LUCIDRAINS_FLEX: upstream runs FlexAttention with the project's masks in its own place."""
    sizes = random_sizes(seed, causal=seed % 3 > 0)
    if not sizes.causal:  # I4: with as many slots as blocks it takes an excluded own block
        sizes = dataclasses.replace(sizes, num_selected_blocks=1)
    module, x = upstream_layer(sizes, seed)
    definition = valid_choice(module, x, flex=True)
    fine = create_fine_mask(sizes.seq_len, sizes.selection_block_size, causal=sizes.causal)
    sliding = create_sliding_mask(sizes.seq_len, sizes.sliding_window_size, causal=sizes.causal)
    with torch.no_grad():  # FlexAttention on a CPU
        theirs = module(x, fine_selection_flex_mask=fine, sliding_window_flex_mask=sliding)
    definition.assert_right(upstream=theirs)


# --- where upstream departs from the definition ---------------------------------------------------

BRANCH = {"compress": 0, "fine": 1, "sliding": 2}


def only_branch(branch: str, **sizes: Any) -> tuple[torch.nn.Module, Tensor]:
    """A layer whose other two gates are exactly 0, and this one exactly 1."""
    module, x = upstream_layer(UpstreamSizes(**sizes), 0)
    gates = module.to_strategy_combine[0]
    with torch.no_grad():
        gates.weight.zero_()
        gates.bias.fill_(-torch.inf).unflatten(0, (-1, 3))[:, BRANCH[branch]] = torch.inf
    return module.requires_grad_(False), x


def agree(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of float64 sums: within one spacing of float32.

    Both sides sum the same products, a few dozen in a row, each sum off by at most that many
    spacings of its largest term. A float32 spacing is 2^29 of them, which leaves a factor of 10^7
    for what cancels and what a softmax magnifies.
    """
    largest = expected.detach().abs().max().item()
    return (found - expected).abs().max().item() <= np.spacing(np.float32(largest))


def own_blocks(seq_len: int, block_size: int) -> Tensor:
    return (torch.arange(seq_len) // block_size)[None, None, :, None]


@needs_upstream
@pytest.mark.parametrize(
    ("branch", "sizes"),
    [("sliding", {"sliding_window_size": 2}), ("fine", {"selection_block_size": 2})],
    ids=["W2", "F2"],
)
@pytest.mark.usefixtures("untraced")
def test_padding_is_read_where_not_causal(branch: str, sizes: dict[str, int]) -> None:
    """W2: one token and w = 2; F2: without a block to choose, one token and l' = 2.

    A zero key takes part, as if the next token were zero. With the mask of a sliding window, which
    is tried as well, none does.
    """
    module, x = only_branch(branch, seq_len=1, **sizes, causal=False)
    alone = own_layer(module, x, block_indices=own_blocks(1, 2))
    assert not agree(module(x), alone)
    # without a norm, the keys and values of a zero token are zeros as well
    longer = torch.nn.functional.pad(x, (0, 0, 0, 1))
    padded = own_layer(module, longer, block_indices=own_blocks(2, 2))
    assert agree(module(x), padded[:, :1])
    if branch == "sliding":
        mask = create_sliding_mask(1, 2, causal=False)
        assert agree(module(x, sliding_window_flex_mask=mask), alone)


@needs_upstream
def test_without_a_block_to_choose_the_own_one_is_read_where_not_causal() -> None:
    """F4, I4: two tokens, l' = 1 and n = 0."""
    module, x = only_branch("fine", seq_len=2, num_selected_blocks=0, causal=False)
    assert agree(module(x), own_layer(module, x, block_indices=own_blocks(2, 1)))
    assert not own_layer(module, x).any()


@needs_upstream
@pytest.mark.parametrize("seq_len", [2, 3])
def test_an_empty_row_is_uniform_over_what_was_gathered_where_not_causal(seq_len: int) -> None:
    """A2: l' = 2, d = 1; block 0 has no candidate, and the mean is of its tokens.

    Of two tokens these are all, and LUCIDRAINS says that; zero is what runs here.
    """
    module, x = only_branch("fine", seq_len=seq_len, selection_block_size=2, causal=False)
    weights = upstream_weights(module.state_dict())
    v = x @ weights["to_v.weight"].T
    gathered, all_columns = (
        v[:, :columns].mean(dim=1) @ weights["to_out.weight"].T for columns in (2, seq_len)
    )
    theirs, ours = module(x), own_module(module)(x)
    for row in (0, 1):
        assert agree(theirs[:, row], gathered)
        assert agree(theirs[:, row], all_columns) == (seq_len == 2)
        assert not ours[:, row].any()
    if seq_len == 2:
        valid_choice(module, x).assert_right(upstream=theirs)
    else:
        assert agree(theirs[:, 2:], ours[:, 2:])


@needs_upstream
@pytest.mark.usefixtures("untraced")
def test_a_mask_shows_the_excluded_own_block_where_not_causal() -> None:
    """I3, LUCIDRAINS_FLEX: two tokens, l' = 2, d = 1; the top-k fills its slot all the same."""
    module, x = only_branch("fine", seq_len=2, selection_block_size=2, causal=False)
    found = module(x, fine_selection_flex_mask=create_fine_mask(2, 2, causal=False))
    assert agree(found, own_layer(module, x, flex=True, block_indices=own_blocks(2, 2)))
    assert not own_layer(module, x, flex=True).any()


@needs_upstream
def test_its_own_fine_mask_knows_no_short_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """F2: three tokens and l' = 2; the mask here does."""
    from native_sparse_attention_pytorch import native_sparse_attention as upstream

    create = upstream.create_block_mask

    def on_the_cpu(*arguments: Any, _compile: bool, **named: Any) -> Any:
        return create(*arguments, **named, device="cpu")

    monkeypatch.setattr(upstream, "create_block_mask", on_the_cpu)
    chosen = torch.zeros((1, 1, 3, 1), dtype=torch.int64)
    with pytest.raises(IndexError, match="out of bounds"):
        upstream.create_fine_mask(3, 2)(chosen)
    create_fine_mask(3, 2)(chosen)


def decoded(module: torch.nn.Module, x: Tensor, prefill: int) -> Tensor:
    """Rows from a cache after `prefill` tokens in one call."""
    rows, cache = [], None
    with torch.no_grad():
        for start in (0, *range(prefill, x.shape[1])):
            stop = prefill if start == 0 else start + 1
            row, cache = module(x[:, start:stop], cache=cache, return_cache=True)
            rows.append(row)
    return torch.cat(rows, dim=1)


@needs_upstream
@pytest.mark.parametrize("seed", range(4))
def test_its_cache_gives_the_parallel_rows_once_a_block_is_compressed(seed: int) -> None:
    """G3, where heads share a choice and the cache holds a compressed block."""
    sizes = random_sizes(seed, causal=True)
    stride = sizes.compress_block_sliding_stride
    sizes = dataclasses.replace(sizes, share_selection=True, seq_len=max(sizes.seq_len, stride))
    module, x = upstream_layer(sizes, seed)
    assert agree(decoded(module, x, stride), module(x)), str(sizes)


@needs_upstream
def test_its_cache_forgets_memory_while_there_is_no_compressed_block() -> None:
    """C3, G3: the second of two tokens, d = 2; the compress branch is 0 and should be memory."""
    two = dict.fromkeys(
        ("compress_block_size", "compress_block_sliding_stride", "selection_block_size"), 2
    )
    module, x = only_branch("compress", seq_len=2, **two)
    parallel, own = module(x), own_module(module)
    cache = own.empty_cache(1)
    assert agree(torch.cat([own(x[:, t : t + 1], cache) for t in range(2)], dim=1), parallel)
    cached = decoded(module, x, 1)
    assert not cached[:, 1].any() and parallel[:, 1].any()


@needs_upstream
def test_its_cache_cannot_choose_for_each_head() -> None:
    """I3, G3: the second of two tokens, two heads of one kv head that choose for themselves."""
    module, x = upstream_layer(UpstreamSizes(seq_len=2, q_heads=2, share_selection=False), 0)
    with pytest.raises(RuntimeError, match="Size does not match"):
        decoded(module, x, 1)


@needs_upstream
@pytest.mark.parametrize(("dtype", "position"), [("bfloat16", 256), ("float16", 2048)])
def test_its_rotation_repeats_positions_in_half_precision(dtype: str, position: int) -> None:
    """G2: positions are rounded to the dtype of q, so two tokens turn alike."""
    module, _ = upstream_layer(UpstreamSizes(seq_len=1), 0)
    q = torch.ones((1, 1, position + 2, 4), dtype=getattr(torch, dtype))
    rotated = module.rotary_emb.rotate_queries_or_keys(q)[0, 0]
    assert torch.equal(rotated[position], rotated[position + 1])
    assert not torch.equal(rotated[position - 1], rotated[position])


@needs_upstream
def test_its_norm_divides_by_the_epsilon_of_the_dtype() -> None:
    """2^-52 in float64, which the layer follows, and not 2^-23."""
    module, x = upstream_layer(UpstreamSizes(seq_len=1, norm=True), 0)
    x *= 2.0**-12
    assert agree(module(x).detach(), own_layer(module, x).detach())
    module.norm.eps = 2.0**-23
    assert not agree(module(x).detach(), own_layer(module, x).detach())


@needs_upstream
@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        (UpstreamSizes(seq_len=1, head_dim=2), ZeroDivisionError),
        (UpstreamSizes(seq_len=1, sliding_window_size=0), ZeroDivisionError),
        (UpstreamSizes(seq_len=0), Exception),
    ],
    ids=["head_dim 2", "w = 0 (W3)", "no token"],
)
def test_sizes_that_it_does_not_take(sizes: UpstreamSizes, error: type[Exception]) -> None:
    with pytest.raises(error):
        module, x = upstream_layer(sizes, 0)
        module(x)
