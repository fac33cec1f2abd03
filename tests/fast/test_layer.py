"""The whole layer of nsa_fast beside the oracle, G1, G2 and G4, where the judge does not go.

Both sides compute in float64; every element is held to its bound (`nsa_ref.layer_bounds`).
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest

from nsa_ref.layer import layer_weight_shapes
from nsa_ref.semantics import FLA, LUCIDRAINS, LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.testing.properties import PROPERTIES

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch import Tensor  # noqa: E402
from torch._dynamo.testing import CompileCounter  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import nsa_fast  # noqa: E402
import nsa_fast.layer  # noqa: E402
from fast_layers import (  # noqa: E402
    KINDS,
    MODEL_DIM,
    SIZES,
    UNJUDGED,
    Layer,
    module,
    replace,
    some_blocks,
    tokens,
)
from nsa_fast import native_sparse_attention  # noqa: E402
from nsa_fast.adapter import NsaFastLayer  # noqa: E402
from refusals import Refusals, refusal_test  # noqa: E402


@pytest.mark.parametrize("kind", UNJUDGED)
@pytest.mark.parametrize("seq_len", [21, 3])
def test_the_layer_and_its_gradients_are_the_definition(kind: str, seq_len: int) -> None:
    """G1, G2, G4: out, and the gradient of x and of every weight; packed sequences as well."""
    case = dataclasses.replace(Layer(*KINDS[kind]).case, q_len=seq_len, kv_len=seq_len)
    for name in ("G1_layer_output_with_blocks", "G1_layer_gradients_with_blocks",
                 "G4_varlen", "G4_varlen_gradients"):  # fmt: skip
        PROPERTIES[name].run(NsaFastLayer(), case)


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
    shape = (batch, both.case.kv_heads, seq_len, both.case.num_selected_blocks)
    blocks = torch.randint(-1, 8, shape, generator=torch.Generator().manual_seed(0))
    found = both(x, block_indices=blocks)
    ends = [0, min(3, seq_len), *range(9, seq_len), seq_len]
    rows = [both(x[:, a:b], cache, block_indices=blocks[:, :, a:b]) for a, b in pairwise(ends)]
    assert cache.length == seq_len
    both.assert_right(x, blocks, out=found, rows=torch.cat(rows, dim=1))


# --- variable lengths -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LUCIDRAINS_FLEX", "rotary on all", "pooled once turned"])
def test_packed_sequences_read_the_blocks_that_are_handed_in(kind: str) -> None:
    """G4, with sequences of no token, of one, and shorter than a window."""
    both, lengths = Layer(*KINDS[kind]), [0, 17, 1, 0, 3, 9, 0]
    ends = np.cumsum([0, *lengths])
    x, blocks = tokens(1, sum(lengths))[0], some_blocks(both.case.semantics, 1, sum(lengths))[0]
    found = both(x, cu_seqlens=torch.from_numpy(ends).int(), block_indices=blocks)
    for a, b in pairwise(ends):
        both.assert_right(x[None, a:b], blocks[None, :, a:b], out=found[None, a:b])


@pytest.mark.parametrize(
    ("kind", "calls"), [("PAPER with memory", 4), ("PAPER, not causal", 6), ("LUCIDRAINS_FLEX", 4)]
)
def test_packed_sequences_of_like_lengths_run_in_one_batch(
    kind: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths of 1, 2, 3 and 4, 5 to 8; those of one length alone, where the length decides."""
    called = mock.Mock(wraps=nsa_fast.layer.sliding_attention)
    monkeypatch.setattr(nsa_fast.layer, "sliding_attention", called)
    both, ends = Layer(*KINDS[kind]), [0, 3, 4, 4, 5, 9, 17, 19, 24]
    x, blocks = tokens(1, 24)[0], some_blocks(both.case.semantics, 1, 24)[0]
    found = both(x, cu_seqlens=torch.tensor(ends), block_indices=blocks)
    assert called.call_count == calls
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_has_the_names_of_the_definition(kind: str) -> None:
    semantics, compress_map, memory = KINDS[kind]
    both = Layer(*KINDS[kind])
    made = module(semantics, compress_map=compress_map, num_mem_kv=memory).double()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert shapes == layer_weight_shapes(both.case, semantics)
    made.load_state_dict(both.weights)
    x = tokens(2, 13)
    expected = both(x)
    assert torch.equal(made(x), expected)
    assert torch.equal(copy.deepcopy(made)(x), expected)


# --- submodules are called ------------------------------------------------------------------------

#: Norm, rotation and output projection, keys and values of their own for every branch.
ALL_PARTS = replace(PAPER, input_norm=True, rotary="all", output_projection=True)


@pytest.mark.parametrize("decoding", [False, True])
def test_every_submodule_is_called(decoding: bool) -> None:
    """So hooks on it run."""
    layer, called = module(ALL_PARTS, num_mem_kv=1), set()
    for name, child in layer.named_children():
        child.register_forward_hook(lambda *_, name=name: called.add(name))
    layer(tokens(1, 13).float(), layer.empty_cache(1) if decoding else None)
    assert called == {name for name, _ in layer.named_children()} and len(called) == 12


class Twice(torch.nn.Module):
    """In the place of a projection, as LoRA stands there: what it returns is added to the base's.

    As often as the base itself, so that the sum is exact.
    """

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base, self.more = base, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x)
        return found + self.more * found


def doubled(layer: torch.nn.Module, *names: str) -> torch.nn.Module:
    layer = copy.deepcopy(layer)
    for name in names:
        for weight in layer.get_submodule(name).parameters():
            weight.data.mul_(2)
    return layer


@pytest.mark.parametrize("name", ["to_q", "to_k_fine", "to_v_sliding", "gates", "to_out"])
def test_what_stands_in_the_place_of_a_projection_has_its_effect(name: str) -> None:
    layer, x = module(ALL_PARTS).double(), tokens(2, 13)
    torch.nn.init.normal_(layer.gates.weight)
    expected = doubled(layer, name)(x)
    setattr(layer, name, Twice(layer.get_submodule(name)).double())
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.get_submodule(name).more.grad


def test_a_weight_that_is_made_when_its_module_is_called_is_the_one_that_is_read() -> None:
    """As by pruning, whose hook makes it, and by a parametrization such as weight norm."""
    layer, x = module(ALL_PARTS).double(), tokens(2, 13)
    pruned = copy.deepcopy(layer)
    for name, weight in (("to_q", "weight"), ("compress_k", "weight_in")):
        of = pruned.get_submodule(name)
        mask = torch.ones_like(getattr(of, weight))
        mask[0] = 0
        prune.custom_from_mask(of, weight, mask)
        with torch.no_grad():  # a step of the optimizer
            getattr(of, f"{weight}_orig").mul_(2)
            getattr(layer.get_submodule(name), weight).mul_(2 * mask)
    assert torch.equal(pruned(x), layer(x))

    class Double(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    expected = doubled(layer, "to_k_fine")(x)
    parametrize.register_parametrization(layer.to_k_fine, "weight", Double())
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", ["to_v_fine", "compress_k"])
def test_weights_on_meta_may_be_filled_when_their_module_is_called(name: str) -> None:
    """As offloading does, by a hook or by a forward of its own."""
    layer, x = module(ALL_PARTS).double(), tokens(2, 13)
    expected = layer(x)
    state = copy.deepcopy(layer.get_submodule(name).state_dict())

    def fill(child: torch.nn.Module, arguments: object) -> None:
        child.to_empty(device="cpu").load_state_dict(state)

    hooked, wrapped = copy.deepcopy(layer), copy.deepcopy(layer)
    hooked.get_submodule(name).to("meta").register_forward_pre_hook(fill)
    assert torch.equal(hooked(x), expected)

    child = wrapped.get_submodule(name).to("meta")
    child.forward = lambda x: (fill(child, x), type(child).forward(child, x))[1]
    assert torch.equal(wrapped(x), expected)


def test_a_projection_may_stand_under_two_names() -> None:
    layer, x = module(ALL_PARTS).double(), tokens(2, 13)
    layer.to_k_sliding.load_state_dict(layer.to_k_fine.state_dict())
    tied = copy.deepcopy(layer)
    tied.to_k_sliding = tied.to_k_fine
    assert torch.equal(tied(x), layer(x))


def test_a_submodule_that_returns_something_else_is_named() -> None:
    layer = module()
    layer.to_q = torch.nn.Linear(MODEL_DIM, 3)
    with pytest.raises(ValueError, match=r"to_q returned \(1, 8, 3\); it must return a tensor "):
        layer(tokens(1, 8).float())


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
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    out = checkpoint(layer, x, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert all(map(torch.equal, found, expected))


class _Model(torch.nn.Module):
    """Two layers, with something before, between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = module(PAPER), module(PAPER)
        self.width = self.first(tokens(1, 4).float()).shape[2]
        self.between = torch.nn.Linear(self.width, self.first.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.between(self.first(torch.relu(x)))))


def test_a_compiled_model_breaks_once_at_each_layer() -> None:
    """And computes the same bits, gradients as well."""
    model = _Model()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs)
    x = tokens(2, 13).float().requires_grad_()
    inputs = [x, *model.parameters()]
    expected, found = (
        torch.autograd.grad(run(x).square().sum(), inputs) for run in (model, compiled)
    )
    assert all(map(torch.equal, found, expected))
    assert graphs.frame_count == 3
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(x)


def test_several_threads_train_at_a_time() -> None:
    """Each its own layer, and the same numbers as alone."""

    def trained(seed: int) -> list[Tensor]:
        layer, x = copy.deepcopy(start), tokens(2, 13 + seed)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        return [weight.detach() for weight in layer.parameters()]

    start, seeds = module(PAPER, num_mem_kv=1).double(), range(2)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(trained, seeds))
    for seed in seeds:
        assert all(map(torch.equal, found[seed], trained(seed)))


# --- what does not run says so --------------------------------------------------------------------


def call(**changes: Any) -> Callable[[], object]:
    """A small call with some arguments changed; weights={name: tensor} changes single weights."""
    weights = Layer(PAPER, "mean", 1).weights | changes.pop("weights", {})
    arguments = SIZES | {"x": tokens(2, 8), "compress_map": "mean"} | changes
    arguments["weights"] = {name: x for name, x in weights.items() if x is not None}
    return lambda: native_sparse_attention(**arguments)


def packed(*ends: int, dtype: torch.dtype | None = None) -> Callable[[], object]:
    return call(x=tokens(1, 8)[0], cu_seqlens=torch.tensor(ends, dtype=dtype))


def blocks(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, **how)


X = torch.zeros(1, 4, MODEL_DIM)


def under_autocast(run: Callable[[], object]) -> Callable[[], object]:
    def autocasting() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run()

    return autocasting


def fake() -> object:
    with FakeTensorMode():
        return module()(torch.zeros(X.shape))


def fake_weights() -> object:
    with FakeTensorMode():
        layer = module()
    return layer(X)


def in_forward_mode() -> object:
    with forward_ad.dual_level():
        return module()(forward_ad.make_dual(X, torch.ones_like(X)))


def traced() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of tracing
        return torch.jit.trace(module(), (X,))


def without(name: str) -> Callable[[], object]:
    layer = module()
    delattr(layer, name)
    return lambda: layer(X)


VALUE_ERRORS: Refusals = {
    "submodules ['to_q'] are gone; the layer calls each of ['to_q', ": without("to_q"),
    "submodules ['compress_v'] are gone": without("compress_v"),
    "q_heads=1000000000000 must be below 2147483648": lambda: module(q_heads=10**12, kv_heads=1),
    "num_mem_kv=1000000000000 must be below 2147483648": lambda: module(num_mem_kv=10**12),
    "num_selected_blocks=1000000000000 must be below": lambda: module(num_selected_blocks=10**12),
    "kv_heads=1000000000000000000000000000000 must be below": lambda: module(kv_heads=10**30),
    "head_dim=1000000000000000000000000000000 must be below": lambda: module(head_dim=10**30),
    "num_local_blocks=1000000000000000000000000000000 must": lambda: module(
        num_local_blocks=10**30
    ),
    "sliding_window_size=1000000000000000000000000000000 mu": (
        lambda: module(sliding_window_size=10**30)
    ),
    "backend='x' must be one of None, 'eager', 'compiled'": lambda: module(backend="x"),
    "x is on meta, which holds no numbers": lambda: module().to("meta")(X.to("meta")),
    "x has shape (2, 8, 9); it must be (batch, seq_len, 10)": call(x=torch.zeros(2, 8, 9)),
    "x has shape (2, 8, 10); it must be (total_tokens, 10)": call(cu_seqlens=torch.tensor([0, 8])),
    "cu_seqlens=[1, 8] must start with 0": packed(1, 8),
    "cu_seqlens=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] and 3 more must start with 0": (
        packed(*range(1, 16))
    ),
    "cu_seqlens[2]=3 must be at least cu_seqlens[1]=5": packed(0, 5, 3, 8),
    "cu_seqlens[-1]=7 must be 8, the number of tokens in x": packed(0, 7),
    "cu_seqlens is on meta, which holds no numbers": call(
        x=tokens(1, 8)[0], cu_seqlens=torch.tensor([0, 8], device="meta")
    ),
    "weights lacks ['to_k_fine.weight'] and has ['to_k.weight']": call(
        weights={"to_k_fine.weight": None, "to_k.weight": torch.zeros(12, 10)}
    ),
    "weights['gates.weight'] has shape (4, 10); it must be (12, 10)": call(
        weights={"gates.weight": torch.zeros(4, 10)}
    ),
    "weights['mem_v'] has shape (2, 3, 5); it must be (2, 1, 5)": call(
        weights={"mem_v": torch.zeros(2, 3, 5).double()}
    ),
    "weights['gates.bias'] is on meta and x on cpu": call(
        weights={"gates.bias": torch.zeros(12, dtype=torch.float64, device="meta")}
    ),
    "weights['mem_k'] is on meta and x on cpu; they must be on one device": under_autocast(
        lambda: module().to("meta")(X)
    ),
    "block_indices has shape (2, 4, 8, 1); it must be (2, 2, 8, n)": call(
        block_indices=blocks(2, 4, 8, 1)
    ),
    "block_indices is on meta and x on cpu": call(block_indices=blocks(2, 2, 8, 1, device="meta")),
    "semantics.duplicates='multiset' is not what nsa_fast computes": call(
        semantics=replace(PAPER, duplicates="multiset"), block_indices=blocks(2, 2, 8, 1)
    ),
    (
        "semantics.empty_row.compress='uniform' would show: some rows see no key. It runs where "
        "none is empty. Try num_mem_kv=1."
    ): lambda: module(replace(LUCIDRAINS, kv_per_branch=True), num_mem_kv=0),
    (
        "semantics.empty_row.fine='nan' would show: some rows see no key. It runs where none is "
        "empty. Try num_selected_blocks=1."
    ): lambda: module(FLA, num_selected_blocks=0),
    "semantics.empty_row.fine='nan' is not what nsa_fast computes": (
        lambda: module(replace(FLA, score_floor=1e-10))
    ),
    "compress_map='max' must be one of 'mean', 'linear', 'linear_per_head', 'mlp'": call(
        compress_map="max"
    ),
    "q_heads=5 must be a multiple of kv_heads=2: query head h reads kv head h // G. Try 4 or 6": (
        call(q_heads=5)
    ),
    "head_dim=5 must be even: semantics.rotary='all' turns pairs of channels. Try 4 or 6": (
        lambda: module(replace(PAPER, rotary="all"), head_dim=5)
    ),
    "selection_block_size=5 must be a multiple of compress_block_sliding_stride=2": (
        lambda: module(selection_block_size=5)
    ),
    "compress_block_size=5 must be a multiple of compress_block_sliding_stride=2": (
        lambda: module(compress_block_size=5)
    ),
    "backend='compiled' gives no gradients on a CPU": lambda: module(backend="compiled")(X),
}
TYPE_ERRORS: Refusals = {
    "cu_seqlens has dtype torch.float32": packed(),
    "cu_seqlens has dtype torch.complex128; it must hold integers": packed(
        0, dtype=torch.complex128
    ),
    "weights['gates.bias'] has dtype torch.float32 and x torch.float64": call(
        weights={"gates.bias": torch.zeros(12)}
    ),
    "weights must be a mapping from name to tensor, not list": (
        lambda: native_sparse_attention(X, [], **SIZES, compress_map="mean")
    ),
    "x has dtype torch.int64; it must be a floating point type": call(
        x=torch.zeros(2, 8, 10, dtype=torch.int64)
    ),
    "compress_positions=1 must be True or False": lambda: module(compress_positions=1),
    "x is a nested tensor": call(x=torch.nested.nested_tensor([X[0], X[0]])),
    "x has layout torch.sparse_coo; it must be dense. Try x.to_dense()": call(x=X.to_sparse()),
    "x is inside a transform of torch.func": lambda: torch.func.vmap(module())(X[None]),
    "x is a fake tensor, as torch.export makes them": fake,
    "weights['mem_k'] is a fake tensor, which holds no numbers, and x is not": fake_weights,
    "x has a tangent of forward-mode AD, which has no rule for these kernels": in_forward_mode,
    "x is traced by torch.jit.trace, which has no record of these kernels": traced,
}
test_what_does_not_run_is_named = refusal_test(VALUE_ERRORS, TYPE_ERRORS)


def test_a_model_around_the_layer_can_be_compiled() -> None:
    """The layer is left as it is: on a GPU it compiles its own kernels."""
    layer = module()
    x = torch.randn(2, 20, layer.model_dim)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


def test_places_are_sent_to_a_gpu_by_one_copy_from_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From memory that is not pinned the host would wait for the copy."""
    done: list[Any] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        done.append("pinned")
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        done.append((tensor.shape, device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    given = [torch.arange(6).view(2, 3), torch.arange(4)]
    sent = nsa_fast.layer._sent(given, torch.device("cuda"))
    assert all(map(torch.equal, sent, given))
    assert done == ["pinned", ((10,), "cuda", True)]


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_refused_by_name(strict: bool) -> None:
    """Of a strict one dynamo tells it, among its own words."""
    with pytest.raises(Exception, match=r"x cannot be traced by torch\.export"):
        torch.export.export(module(), (X,), strict=strict)


def test_slots_for_more_blocks_than_there_are_take_no_memory() -> None:
    few, many = module(num_selected_blocks=8), module(num_selected_blocks=2**31 - 1)
    many.load_state_dict(few.state_dict())
    x = torch.randn(1, 20, MODEL_DIM)
    assert torch.equal(many(x), few(x))
