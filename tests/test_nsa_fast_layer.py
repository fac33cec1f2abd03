"""The whole layer of nsa_fast beside the oracle, G1, G2 and G4, where the judge does not go.

Both sides compute in float64; every element is held to its bound (`nsa_ref.layer_bounds`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from nsa_ref.layer import layer as oracle
from nsa_ref.layer import layer_block_indices, layer_vjp, layer_weight_shapes
from nsa_ref.layer_bounds import LayerBounds, layer_bounds, packed_weight_bounds
from nsa_ref.semantics import FLA, LUCIDRAINS, LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.sizes import Sizes
from nsa_ref.testing.compare import compare

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch import Tensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import nsa_fast  # noqa: E402
from nsa_fast import NativeSparseAttention, native_sparse_attention  # noqa: E402

MODEL_DIM = 10

# windows of two strides and blocks of two: no two blocks have the same score but for rounding
SIZES: dict[str, Any] = {
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 6,
    "value_dim": 5,
    "compress_block_size": 4,
    "compress_block_sliding_stride": 2,
    "selection_block_size": 4,
    "num_selected_blocks": 3,
    "num_initial_blocks": 1,
    "num_local_blocks": 1,
    "sliding_window_size": 5,
}


def replace(semantics: Semantics, **changes: Any) -> Semantics:
    return dataclasses.replace(semantics, **changes)


#: semantics, compress_map, num_mem_kv
KINDS: dict[str, tuple[Semantics, str, int]] = {
    "PAPER": (PAPER, "mlp", 0),
    "PAPER with memory": (PAPER, "linear", 2),
    "PAPER, not causal": (replace(PAPER, causal=False), "mean", 1),
    "LUCIDRAINS_FLEX": (LUCIDRAINS_FLEX, "mlp", 1),
    "LUCIDRAINS_FLEX, not causal": (replace(LUCIDRAINS_FLEX, causal=False), "linear", 3),
    "one k and v": (replace(PAPER, kv_per_branch=False), "mean", 0),
    "one k and v, rotary on fine and sliding": (
        replace(PAPER, kv_per_branch=False, rotary="fine_and_sliding"),
        "linear",
        1,
    ),
    "one k and v, rotary on all": (replace(PAPER, kv_per_branch=False, rotary="all"), "mean", 1),
    "rotary on fine and sliding": (replace(PAPER, rotary="fine_and_sliding"), "mean", 0),
    "rotary on all": (replace(PAPER, rotary="all"), "mlp", 2),
    "one k and v, pooled once turned": (
        replace(PAPER, kv_per_branch=False, rotary="before_pooling"),
        "mean",
        1,
    ),
    "pooled once turned": (replace(PAPER, rotary="before_pooling"), "linear_per_head", 2),
    "norm": (replace(PAPER, input_norm=True), "mean", 0),
    "output projection": (replace(PAPER, output_projection=True), "mean", 0),
    "a choice for each query head": (replace(PAPER, share_selection=False), "linear", 0),
    "open window": (replace(PAPER, window_closed=False), "mean", 0),
}

#: Together these switches are in no convention that `NsaFastLayer` declares; the judge holds it to
#: G1 to G4 in all others.
UNJUDGED = (
    "LUCIDRAINS_FLEX, not causal",
    "one k and v, rotary on fine and sliding",
    "rotary on all",
    "one k and v, pooled once turned",
    "pooled once turned",
)


def tokens(batch: int, seq_len: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq_len, MODEL_DIM, generator=generator, dtype=torch.float64)
    x[:, :1] *= 2**-12  # where the eps of the norm counts
    return x


def some_blocks(semantics: Semantics, batch: int, seq_len: int) -> Tensor:
    """Blocks in any order: -1, duplicates, blocks to come and blocks that there are not."""
    heads = SIZES["kv_heads"] if semantics.share_selection else SIZES["q_heads"]
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-1, seq_len // 4 + 2, (batch, heads, seq_len, 3), generator=generator)


class Right(NamedTuple):
    """What the definition says about some tokens, and how far a right layer may be from it."""

    out: np.ndarray
    dx: np.ndarray
    dweights: dict[str, np.ndarray]
    bounds: LayerBounds


class Layer:
    """nsa_fast's layer and the definition, with the same weights: float64, none of them zero."""

    def __init__(
        self, semantics: Semantics, compress_map: str, num_mem_kv: int, **changes: Any
    ) -> None:
        how = SIZES | changes
        self.how: dict[str, Any] = how | {"semantics": semantics, "compress_map": compress_map}
        self.semantics = semantics
        self.sizes = Sizes(
            model_dim=MODEL_DIM,
            compress_map=compress_map,
            compress_positions=True,
            num_mem_kv=num_mem_kv,
            **how,
        )
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            / math.sqrt(max(1, shape[-1]))
            for name, shape in layer_weight_shapes(self.sizes, semantics).items()
        }

    @classmethod
    def of(cls, made: NativeSparseAttention) -> Layer:
        """With the sizes and the weights of a module, in float64."""
        layer = made.layer
        sizes = {name: getattr(layer, name) for name in SIZES}
        both = cls(layer.semantics, layer.compress_map, made.num_mem_kv, **sizes)
        both.weights = {name: weight.detach() for name, weight in made.named_parameters()}
        return both

    def __call__(self, x: Tensor, cache: nsa_fast.Cache | None = None, **how: Any) -> Tensor:
        return native_sparse_attention(x, self.weights, **(self.how | how), cache=cache)

    def right(self, x: Tensor, blocks: Tensor | None = None, d_out: Tensor | None = None) -> Right:
        """By the oracle, with blocks of its own choice if none are handed in."""
        weights = {name: weight.detach().numpy() for name, weight in self.weights.items()}
        given: tuple[Any, ...] = x.detach().numpy(), weights
        how: dict[str, Any] = {"sizes": self.sizes, "semantics": self.semantics}
        chosen = layer_block_indices(*given, **how) if blocks is None else blocks.numpy()
        out = oracle(*given, **how, block_indices=chosen)
        if d_out is None:
            bounds = layer_bounds(*given, chosen, numerics="fp64", **how)
            return Right(out, np.zeros(0), {}, bounds)
        gradient = d_out.numpy()
        dx, dweights = layer_vjp(*given, gradient, **how, block_indices=chosen)
        bounds = layer_bounds(*given, chosen, gradient, numerics="fp64", **how)
        return Right(out, dx, dweights, bounds)

    def assert_right(self, x: Tensor, blocks: Tensor | None = None, **found: Tensor) -> None:
        """Every one of these is the definition's rows of x, or the last of them."""
        right = self.right(x, blocks)
        for name, rows in found.items():
            first = x.shape[1] - rows.shape[1]
            assert_within(name, rows, right.out[:, first:], right.bounds.out[:, first:])


def assert_within(name: str, found: Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    """No element is further from the definition than a right one may be."""
    array = found.detach().numpy()
    assert array.shape == expected.shape and array.dtype == np.float64, name
    assert np.isfinite(bound).all(), name
    compare("G1", name, array, expected, bound)


def some_d_out(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)


def gradients(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    # with 3 tokens there is no window, and nothing that the weights of a map take part in
    found = torch.autograd.grad(
        out, [*inputs.values()], some_d_out(out), allow_unused=True, materialize_grads=True
    )
    return dict(zip(inputs, found))


@pytest.mark.parametrize("kind", UNJUDGED)
@pytest.mark.parametrize("seq_len", [21, 3])
def test_the_layer_and_its_gradients_are_the_definition(kind: str, seq_len: int) -> None:
    """G1, G2: out, and the gradient of x and of every weight, for blocks that are handed in."""
    both = Layer(*KINDS[kind])
    x, blocks = tokens(2, seq_len), some_blocks(both.semantics, 2, seq_len)
    inputs = {"x": x, **both.weights}
    for tensor in inputs.values():
        tensor.requires_grad_()
    found = both(x, block_indices=blocks)
    right = both.right(x, blocks, some_d_out(found))
    assert right.bounds.dx is not None and right.bounds.dweights is not None
    assert_within("out", found, right.out, right.bounds.out)
    expected = {"x": right.dx} | right.dweights
    bounds = {"x": right.bounds.dx} | right.bounds.dweights
    for name, gradient in gradients(found, inputs).items():
        assert_within(f"d {name}", gradient, expected[name], bounds[name])


@pytest.mark.parametrize("kind", UNJUDGED)
def test_the_layer_selects_by_what_its_compress_branch_reads(kind: str) -> None:
    """I, G2: the choice is that of q, k_cmp and memory as the compress branch sees them.

    Near ties do not matter: k_cmp and q are off by float64's rounding, random scores by far more.
    """
    both, x = Layer(*KINDS[kind]), tokens(2, 30)
    both.assert_right(x, out=both(x))


EDGES: dict[str, dict[str, Any]] = {
    "one token": {"seq_len": 1},
    "no token": {"seq_len": 0},
    "no batch": {"batch": 0},
    "no block": {"num_selected_blocks": 0},
    "the own token alone": {"sliding_window_size": 0},
    "a window longer than all": {"sliding_window_size": 99},
    "windows of three strides": {"compress_block_size": 6},  # the second begins before token 0
    "windows with gaps": {"compress_block_size": 1},
    "windows of a token": {"compress_block_size": 1, "compress_block_sliding_stride": 1},
    "blocks of a token": {"compress_block_sliding_stride": 1, "selection_block_size": 1},
    "one head": {"q_heads": 1, "kv_heads": 1},
    "a prime group": {"q_heads": 3, "kv_heads": 1},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("kind", ["rotary on all", "LUCIDRAINS_FLEX", "pooled once turned"])
def test_sizes_at_the_edge_are_the_definition_too(kind: str, edge: str) -> None:
    """In parallel, and through a cache: the blocks are handed in."""
    changes = dict(EDGES[edge])
    batch, seq_len = changes.pop("batch", 2), changes.pop("seq_len", 19)
    both = Layer(*KINDS[kind], **changes)
    x, cache = tokens(batch, seq_len), nsa_fast.Cache(batch)
    shape = (batch, both.sizes.kv_heads, seq_len, both.sizes.num_selected_blocks)
    blocks = torch.randint(-1, 8, shape, generator=torch.Generator().manual_seed(0))
    found = both(x, block_indices=blocks)
    ends = [0, min(3, seq_len), *range(9, seq_len), seq_len]
    rows = [both(x[:, a:b], cache, block_indices=blocks[:, :, a:b]) for a, b in pairwise(ends)]
    assert cache.length == seq_len
    both.assert_right(x, blocks, out=found, rows=torch.cat(rows, dim=1))


# --- variable lengths -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LUCIDRAINS_FLEX", "rotary on all", "pooled once turned"])
def test_packed_sequences_are_the_sequences_one_by_one(kind: str) -> None:
    """G4, with sequences of no token, of one, and shorter than a window; gradients as well."""
    both = Layer(*KINDS[kind])
    lengths = [0, 17, 1, 0, 3, 9, 0]
    ends = np.cumsum([0, *lengths])
    x = tokens(1, sum(lengths))[0]
    inputs = {"x": x, **both.weights}
    for tensor in inputs.values():
        tensor.requires_grad_()
    found = both(x, cu_seqlens=torch.from_numpy(ends).int())
    d_out = some_d_out(found)
    alone = [both.right(x[None, a:b], None, d_out[None, a:b]) for a, b in pairwise(ends)]
    weights_bounds = packed_weight_bounds(
        lengths,
        [each.dweights for each in alone],
        [each.bounds.dweights or {} for each in alone],
        sizes=both.sizes,
        semantics=both.semantics,
        numerics="fp64",
    )
    got = gradients(found, inputs)
    for each, a, b in zip(alone, ends, ends[1:]):
        assert each.bounds.dx is not None
        assert_within(f"out {a}:{b}", found[None, a:b], each.out, each.bounds.out)
        assert_within(f"dx {a}:{b}", got["x"][None, a:b], each.dx, each.bounds.dx)
    for name, bound in weights_bounds.items():
        summed = np.sum([each.dweights[name] for each in alone], axis=0)
        assert_within(f"d {name}", got[name], summed, bound)

    blocks = some_blocks(both.semantics, 1, sum(lengths))[0]
    found = both(x, cu_seqlens=torch.from_numpy(ends), block_indices=blocks)
    for a, b in pairwise(ends):
        both.assert_right(x[None, a:b], blocks[None, :, a:b], out=found[None, a:b])


@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 0, 0]])
def test_no_tokens_at_all_are_packed_into_no_rows(ends: list[int]) -> None:
    x = tokens(1, 0)[0].requires_grad_()
    out = Layer(PAPER, "mean", 0)(x, cu_seqlens=torch.tensor(ends))
    assert out.shape == (0, 20)
    out.sum().backward()
    assert x.grad is not None


# --- the module -----------------------------------------------------------------------------------


def module(semantics: Semantics = PAPER, **changes: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(MODEL_DIM, **(SIZES | {"semantics": semantics} | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_has_the_names_of_the_definition(kind: str) -> None:
    semantics, compress_map, memory = KINDS[kind]
    both = Layer(*KINDS[kind])
    made = module(semantics, compress_map=compress_map, num_mem_kv=memory).double()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert shapes == layer_weight_shapes(both.sizes, semantics)
    made.load_state_dict(both.weights)
    x = tokens(2, 13)
    expected = both(x)
    assert torch.equal(made(x), expected)
    assert torch.equal(copy.deepcopy(made)(x), expected)


def test_a_new_layer_reads_its_sliding_branch_first() -> None:
    layer = module(num_mem_kv=1)
    assert (layer.mem_k == 0).all() and (layer.mem_v == 0).all()
    assert (layer.gates.weight == 0).all()
    assert layer.gates.bias.reshape(3, 4).tolist() == [[-2.0] * 4, [-2.0] * 4, [2.0] * 4]
    positions = layer.compress_k.positions
    assert 0 < positions.abs().max() < 0.2
    assert module(compress_positions=False).compress_k.state_dict().keys() == {
        "weight_in", "bias_in", "weight_out", "bias_out"
    }  # fmt: skip
    assert module(value_dim=None).layer.value_dim == 6


def test_a_layer_says_what_it_is() -> None:
    text = repr(module(replace(PAPER, rotary="all"), num_mem_kv=3))
    for part in ("model_dim=10", "q_heads=4", "sliding_window_size=5", "compress_map='mlp'",
                 "num_mem_kv=3", "semantics=replace(PAPER, rotary='all')"):  # fmt: skip
        assert part in text
    assert "semantics=LUCIDRAINS_FLEX" in repr(module(LUCIDRAINS_FLEX))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("semantics", [PAPER, LUCIDRAINS_FLEX], ids=["PAPER", "LUCIDRAINS_FLEX"])
def test_the_result_and_the_gradients_have_the_dtype_of_x(
    dtype: torch.dtype, semantics: Semantics
) -> None:
    layer = module(semantics).to(dtype)
    x = tokens(2, 9).to(dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype and out.isfinite().all()
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()
    cache = layer.empty_cache(2)
    assert layer(x, cache).dtype == dtype


@pytest.mark.parametrize("semantics", [PAPER, LUCIDRAINS_FLEX], ids=["PAPER", "LUCIDRAINS_FLEX"])
def test_under_autocast_the_result_has_its_dtype(semantics: Semantics) -> None:
    layer = module(semantics, num_mem_kv=1)
    for dtype in (torch.float32, torch.bfloat16):  # autocast takes both from the layer before
        x = tokens(2, 9).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
            rows = layer(x, layer.empty_cache(2))
        assert out.dtype == rows.dtype == torch.bfloat16
        out.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype
        assert layer.to_q.weight.grad.dtype == torch.float32


def test_checkpointing_changes_no_gradient() -> None:
    layer, x = module(LUCIDRAINS_FLEX).double(), tokens(2, 13).requires_grad_()
    inputs = {"x": x, **dict(layer.named_parameters())}
    expected = gradients(layer(x), inputs)
    found = gradients(checkpoint(layer, x, use_reentrant=False), inputs)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_no_gradient_comes_from_the_choice_of_blocks() -> None:
    """A4: with all gates but fine's shut, q and k_cmp of the selection get exactly none."""
    layer = module(PAPER, num_mem_kv=1).double()
    with torch.no_grad():
        layer.gates.bias.copy_(torch.tensor([-1e4, 1e4, -1e4]).repeat_interleave(4))
    layer(tokens(2, 30)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if "compress" in name or "mem" in name or "sliding" in name:
            assert (parameter.grad == 0).all(), name
    assert (layer.to_k_fine.weight.grad != 0).any()


# --- what does not run says so --------------------------------------------------------------------


def call(**changes: Any) -> Callable[[], object]:
    """A small call with some arguments changed; weights={name: tensor} changes single weights."""
    weights = Layer(PAPER, "mean", 1).weights | changes.pop("weights", {})
    arguments = SIZES | {"x": tokens(2, 8), "compress_map": "mean"} | changes
    arguments["weights"] = {name: x for name, x in weights.items() if x is not None}
    return lambda: native_sparse_attention(**arguments)


def packed(*ends: int, dtype: torch.dtype | None = None) -> Callable[[], object]:
    return call(x=tokens(1, 8)[0], cu_seqlens=torch.tensor(ends, dtype=dtype))


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "model_dim": (
        call(x=torch.zeros(2, 8, 9)),
        ValueError,
        r"x has shape \(2, 8, 9\); it must be \(batch, seq_len, 10\)",
    ),
    "packed tokens with a batch": (
        call(cu_seqlens=torch.tensor([0, 8])),
        ValueError,
        r"x has shape \(2, 8, 10\); it must be \(total_tokens, 10\)",
    ),
    "first sequence": (packed(1, 8), ValueError, r"cu_seqlens=\[1, 8\] must start with 0"),
    "no sequence": (packed(), TypeError, r"cu_seqlens has dtype torch\.float32"),
    "a sequence that runs back": (
        packed(0, 5, 3, 8),
        ValueError,
        r"cu_seqlens\[2\]=3 must be at least cu_seqlens\[1\]=5",
    ),
    "the last sequence": (
        packed(0, 7),
        ValueError,
        r"cu_seqlens\[-1\]=7 must be 8, the number of tokens in x",
    ),
    "a weight that is missing, and one too many": (
        call(weights={"to_k_fine.weight": None, "to_k.weight": torch.zeros(12, 10)}),
        ValueError,
        r"weights lacks \['to_k_fine\.weight'\] and has \['to_k\.weight'\]",
    ),
    "a weight's shape": (
        call(weights={"gates.weight": torch.zeros(4, 10)}),
        ValueError,
        r"weights\['gates\.weight'\] has shape \(4, 10\); it must be \(12, 10\)",
    ),
    "half a memory": (
        call(weights={"mem_v": torch.zeros(2, 3, 5).double()}),
        ValueError,
        r"weights\['mem_v'\] has shape \(2, 3, 5\); it must be \(2, 1, 5\)",
    ),
    "a weight's dtype": (
        call(weights={"gates.bias": torch.zeros(12)}),
        TypeError,
        r"weights\['gates\.bias'\] has dtype torch\.float32 and x torch\.float64",
    ),
    "a weight's device": (
        call(weights={"gates.bias": torch.zeros(12, dtype=torch.float64, device="meta")}),
        ValueError,
        r"weights\['gates\.bias'\] is on meta and x on cpu",
    ),
    "weights that are no mapping": (
        lambda: native_sparse_attention(tokens(1, 3), [], **SIZES, compress_map="mean"),
        TypeError,
        r"weights must be a mapping from name to tensor, not list",
    ),
    "tokens that are numbers": (
        call(x=torch.zeros(2, 8, 10, dtype=torch.int64)),
        TypeError,
        r"x has dtype torch\.int64; it must be a floating point type",
    ),
    "heads of the choice": (
        call(block_indices=torch.zeros(2, 4, 8, 1, dtype=torch.int64)),
        ValueError,
        r"block_indices has shape \(2, 4, 8, 1\); it must be \(2, 2, 8, n\)",
    ),
    "a choice on another device": (
        call(block_indices=torch.zeros(2, 2, 8, 1, dtype=torch.int64, device="meta")),
        ValueError,
        r"block_indices is on meta and x on cpu",
    ),
    "blocks handed in that would count twice": (
        call(
            semantics=replace(PAPER, duplicates="multiset"),
            block_indices=torch.zeros(2, 2, 8, 1, dtype=torch.int64),
        ),
        ValueError,
        r"semantics\.duplicates='multiset' is not what nsa_fast computes",
    ),
    "rows that might be empty": (
        lambda: module(semantics=replace(LUCIDRAINS, kv_per_branch=True), num_mem_kv=0),
        ValueError,
        r"semantics\.empty_row\.compress='uniform' would show.* Try num_mem_kv=1\.",
    ),
    "rows without a block": (
        lambda: module(semantics=FLA, num_selected_blocks=0),
        ValueError,
        r"semantics\.empty_row\.fine='nan' would show.* Try num_selected_blocks=1\.",
    ),
    "rows without a block, and no remedy": (
        lambda: module(semantics=replace(FLA, score_floor=1e-10)),
        ValueError,
        r"semantics\.empty_row\.fine='nan' is not what nsa_fast computes",
    ),
    "offsets that are no integers": (
        packed(0, dtype=torch.complex128),
        TypeError,
        r"cu_seqlens has dtype torch\.complex128; it must hold integers",
    ),
    "an unknown map": (
        call(compress_map="max"),
        ValueError,
        r"compress_map='max' must be one of 'mean', 'linear', 'linear_per_head', 'mlp'",
    ),
    "groups": (
        call(q_heads=5),
        ValueError,
        r"q_heads=5 must be a multiple of kv_heads=2: .* Try 4 or 6",
    ),
    "pairs to rotate": (
        lambda: module(replace(PAPER, rotary="all"), head_dim=5),
        ValueError,
        r"head_dim=5 must be even: semantics\.rotary='all' .* Try 4 or 6",
    ),
    "strides of a module": (
        lambda: module(selection_block_size=5),
        ValueError,
        r"selection_block_size=5 must be a multiple of .*Try 4 or 6",
    ),
    "strides of a module's windows": (
        lambda: module(compress_block_size=5),
        ValueError,
        r"compress_block_size=5 must be a multiple of .*Try 4 or 6",
    ),
    "positions": (
        lambda: module(compress_positions=1),
        TypeError,
        r"compress_positions=1 must be True or False",
    ),
    "gradients of compiled kernels on a CPU": (
        lambda: module(backend="compiled")(torch.zeros(1, 4, MODEL_DIM)),
        ValueError,
        r"backend='compiled' gives no gradients on a CPU",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_does_not_run_says_what_does(what: str) -> None:
    function, error, message = ERRORS[what]
    with pytest.raises(error, match=message):
        function()


def test_a_model_around_the_layer_can_be_compiled() -> None:
    """The layer is left as it is: on a GPU it compiles its own kernels."""
    layer = module()
    x = torch.randn(2, 20, layer.model_dim)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))
