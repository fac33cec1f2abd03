"""The compression maps and the selection of nsa_fast, where the judge's properties do not go."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import nsa_ref.selection
from nsa_ref.semantics import LUCIDRAINS, LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.testing.case import Case
from nsa_ref.testing.properties import PROPERTIES

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import nsa_fast  # noqa: E402
from fast_memory import Largest  # noqa: E402
from nsa_fast import selection  # noqa: E402
from nsa_fast.adapter import NsaFastEager  # noqa: E402
from nsa_fast.pool import MAP_WEIGHTS, map_shapes  # noqa: E402
from nsa_fast.windows import Windows  # noqa: E402
from refusals import Refusals, refusal_test  # noqa: E402

CASE = Case(
    dtype="float64",
    q_heads=4,
    kv_heads=2,
    q_len=37,
    kv_len=37,
    head_dim=4,
    value_dim=4,
    compress_block_size=6,
    compress_block_sliding_stride=2,
    selection_block_size=4,
    num_selected_blocks=3,
    num_mem_kv=1,
)


# --- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compress_map", MAP_WEIGHTS)
@pytest.mark.parametrize("semantics", [PAPER, LUCIDRAINS_FLEX], ids=["start", "end"])
def test_windows_that_overlap_touch_and_leave_gaps(compress_map: str, semantics: Semantics) -> None:
    """C1, C4: and sequences without a window, or with less than one."""
    for kv_len, size, stride in ((17, 6, 2), (5, 6, 2), (9, 2, 3), (1, 4, 2)):
        case = replace(
            CASE,
            semantics=semantics,
            kv_len=kv_len,
            compress_block_size=size,
            compress_block_sliding_stride=stride,
            selection_block_size=6,
            compress_map=compress_map,
            compress_positions=kv_len != 9,
        )
        PROPERTIES["C4_pool"].run(NsaFastEager(), case)
        PROPERTIES["C4_pool_gradients"].run(NsaFastEager(), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_many_small_numbers_is_taken_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 a sum of ones stands still at 256, in float16 at 2048."""
    x = torch.ones(1, 1, 4096, 1, dtype=dtype)
    y = nsa_fast.compress_pool(x, compress_block_size=4096, compress_block_sliding_stride=4096)
    assert y.dtype == dtype and y.item() == 1


PAIRS: dict[str, Any] = {"compress_block_size": 2, "compress_block_sliding_stride": 2}


@pytest.mark.parametrize("compress_map", MAP_WEIGHTS)
def test_pool_under_autocast_is_what_it_is_without(compress_map: str) -> None:
    x = torch.randn(1, 2, 12, 4)
    shapes = map_shapes(compress_map, 2, 2, 4, 5)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    expected = nsa_fast.compress_pool(x, weights, **PAIRS, compress_map=compress_map)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nsa_fast.compress_pool(x, weights, **PAIRS, compress_map=compress_map)
    assert torch.equal(found, expected)


# --- selection ------------------------------------------------------------------------------------

SELECTIONS = {
    "paper": PAPER,
    "end": replace(PAPER, compress_alignment="end"),
    "non-causal": replace(PAPER, causal=False),
    "per head": replace(PAPER, share_selection=False),
    "forced at 1": replace(PAPER, forced_score=1.0),
    "floor": replace(PAPER, score_floor=0.1),
    "logit mean": LUCIDRAINS,
    "logit mean, per head, non-causal": replace(LUCIDRAINS, share_selection=False, causal=False),
    "logit mean, no floor, non-causal": replace(LUCIDRAINS_FLEX, causal=False),
    "logit mean, own block": replace(PAPER, importance="logit_mean", compress_alignment="end"),
    "strict": replace(PAPER, compress_strict=True),
}


def selections(semantics: Semantics) -> Iterator[Case]:
    """Decode, no compressed block, queries before every key, fewer candidates than n, and so on."""
    free = {"num_selected_blocks": 9, "num_initial_blocks": 0, "num_local_blocks": 0}
    for seed, sizes in enumerate(
        (
            {},
            {"q_len": 1},
            {"kv_len": 1},
            {"kv_len": 0},
            {"kv_len": 9},
            {"num_selected_blocks": 20},
            {"num_selected_blocks": 0},
            {"num_initial_blocks": 3, "num_local_blocks": 3},
            # a window ends with the first query, and one with the last, in its own block
            {"q_len": 3, "kv_len": 40} | free,
            {"q_len": 3, "kv_len": 40, "selection_block_size": 2} | free,
        )
    ):
        forced = {"num_initial_blocks": 1, "num_local_blocks": 2}
        yield replace(CASE, semantics=semantics, seed=seed, **(forced | sizes))


def assert_the_oracles(case: Case, *, factor: int = 1) -> None:
    """The choice is the oracle's, block by block, with q multiplied by the factor."""
    q, k_cmp, _, mem_k, _ = case.compressed()
    given = factor * q, k_cmp, mem_k
    expected = nsa_ref.selection.select(*given, kv_len=case.kv_len, **case.geometry)
    found = NsaFastEager().run("select", case, *given)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_in_float64_is_the_oracles(name: str) -> None:
    """Random scores have no gap that float64 rounding could cross."""
    for case in selections(SELECTIONS[name]):
        assert_the_oracles(case)


def test_equal_scores_go_to_the_lower_index() -> None:
    assert_the_oracles(replace(CASE, num_selected_blocks=4), factor=0)


def test_selection_in_chunks_is_the_same_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "q": torch.randn(1, 4, 2048, 8, generator=generator),
        "k_cmp": torch.randn(1, 2, 1023, 8, generator=generator),
        "kv_len": 2048,
        "compress_block_size": 4,
        "selection_block_size": 8,
    }
    whole = select(**tensors)
    monkeypatch.setattr(selection, "CPU_CHUNK_ELEMENTS", 2**18)
    with Largest() as largest:
        in_chunks = select(**tensors)
    assert torch.equal(whole, in_chunks)
    assert largest.elements <= 2**19 < 4 * 2048 * 1023


def select(**changes: Any) -> Any:
    """A small selection with some arguments changed."""
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 4, 64, 16),
        "k_cmp": torch.zeros(1, 2, 32, 16),
        "kv_len": 64,
        **PAIRS,
        "selection_block_size": 4,
        "num_selected_blocks": 4,
    }
    return nsa_fast.select_blocks(**(arguments | changes))


@pytest.mark.parametrize(
    "preset", [PAPER, LUCIDRAINS, LUCIDRAINS_FLEX], ids=["PAPER", "LUCIDRAINS", "FLEX"]
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_chunk_leaves_out_nothing_that_its_rows_can_choose(
    preset: Semantics, causal: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows or all at once: the same choice, in a prefill, a later part, and before p = 0."""
    semantics = replace(preset, causal=causal)
    sizes = {"compress_block_size": 4, "selection_block_size": 6, "num_selected_blocks": 2}
    sizes |= {"num_initial_blocks": 0, "num_local_blocks": 0}
    generator = torch.Generator().manual_seed(0)
    for q_len, kv_len in ((50, 50), (7, 50), (50, 41), (9, 3)):
        windows = Windows(4, 2, semantics).count(kv_len)
        q, k_cmp, mem_k = (
            torch.randn(1, heads, length, 5, generator=generator, dtype=torch.float64)
            for heads, length in ((2, q_len), (1, windows), (1, 2))
        )
        chosen = []
        for elements in (2**20, rows * 2 * max(windows + 2, -(-kv_len // 6))):
            monkeypatch.setattr(selection, "CPU_CHUNK_ELEMENTS", elements)
            given = {"q": q, "k_cmp": k_cmp, "mem_k": mem_k, "kv_len": kv_len}
            chosen.append(select(**given, **sizes, semantics=semantics))
        assert torch.equal(*chosen)


def test_selection_under_autocast_is_what_it_is_without() -> None:
    torch.manual_seed(0)
    tensors = {"q": torch.randn(1, 4, 64, 16), "k_cmp": torch.randn(1, 2, 32, 16)}
    expected = select(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = select(**tensors)
    assert torch.equal(found, expected)


class _Operations(TorchDispatchMode):
    """Every operation, with the tensors that it takes and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Tensor], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.seen.append((str(func), given, result))
        return result

    def copied_to(self, device: str) -> list[str]:
        """Operations that bring a tensor from another device, for which the host waits."""
        return [
            name
            for name, given, result in self.seen
            if isinstance(result, torch.Tensor)
            and result.device.type == device
            and any(tensor.device.type != device for tensor in given)
        ]


@pytest.mark.parametrize("semantics", [LUCIDRAINS, replace(PAPER, forced_score=1.0)])
def test_on_cuda_nothing_is_copied_from_the_host_and_16_bits_are_multiplied(
    semantics: Semantics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which operations run, and in which dtypes: a meta tensor has no values, and stands for it."""
    monkeypatch.setattr(selection, "SUMS_IN_FLOAT32", {"meta"})
    q, k_cmp = (
        torch.empty(1, heads, length, 16, dtype=torch.bfloat16, device="meta")
        for heads, length in ((4, 64), (2, 32))
    )
    with _Operations() as operations:
        select(q=q, k_cmp=k_cmp, semantics=semantics)
    assert operations.copied_to("meta") == []
    products = [seen for seen in operations.seen if "bmm" in seen[0]]
    assert len(products) == 1  # one chunk
    (left, right, *_), result = products[0][1:]
    assert (left.dtype, right.dtype, result.dtype) == (torch.bfloat16,) * 2 + (torch.float32,)


def test_selection_asks_for_no_gradient() -> None:
    chosen = select(q=torch.randn(1, 4, 64, 16, requires_grad=True))
    assert chosen.dtype == torch.int64 and not chosen.requires_grad


def fakes(**tensors: Tensor) -> dict[str, Tensor]:
    """Fake tensors of their own shapes, of one mode."""
    mode = FakeTensorMode()
    return {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}


def test_a_selection_of_fake_tensors_has_the_shape_of_a_real_one() -> None:
    with FakeTensorMode():
        assert select().shape == (1, 2, 64, 4)


def test_a_mode_may_take_real_tensors_beside_fake_ones() -> None:
    """As torch.export does with those that a model holds."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        assert select(k_cmp=mode.from_tensor(torch.zeros(1, 2, 32, 16))).shape == (1, 2, 64, 4)


def test_on_a_cpu_a_selection_can_be_traced() -> None:
    q = torch.randn(1, 4, 64, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of tracing
        traced = torch.jit.trace(lambda q: select(q=q), (q,))
    assert torch.equal(traced(q), select(q=q))


X, Q = torch.zeros(1, 1, 4, 2), torch.zeros(1, 4, 64, 16)
LARGE = 10**30


def inside_a_mode() -> Tensor:
    """A mode that takes no real tensors, with one beside a fake one."""
    k_cmp = torch.zeros(1, 2, 32, 16)
    with FakeTensorMode() as mode:
        return select(q=mode.from_tensor(Q), k_cmp=k_cmp)


def test_a_block_may_be_longer_than_all_that_there_is() -> None:
    """Neither memory nor time grows with it."""
    sizes = {"selection_block_size": 2**31 - 2, "num_selected_blocks": 2}
    with _Operations() as operations:
        chosen = select(**sizes)
    made = [result for *_, result in operations.seen if isinstance(result, torch.Tensor)]
    assert max(result.numel() for result in made) < 2**16
    assert chosen.unique().tolist() == [-1, 0]


def pool(x: Tensor = X, weights: Any = None, **sizes: int) -> Tensor:
    return nsa_fast.compress_pool(x, weights, **(PAIRS | sizes))


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a prototype
        return torch.nested.nested_tensor([tensor[0], tensor[0]])


def test_pooling_is_plain_torch_for_transforms_exports_and_tensors_without_numbers() -> None:
    x = torch.randn(2, 1, 4, 2)
    assert torch.equal(torch.func.vmap(pool)(x[:, None])[:, 0], pool(x))
    of_all = torch.func.grad(lambda x: pool(x).sum())(x)
    assert torch.equal(of_all, torch.full_like(x, 0.5))
    assert torch.equal(torch.func.jvp(pool, (x,), (x,))[1], pool(x))
    assert pool(X.to("meta")).shape == pool().shape

    class Pools(torch.nn.Module):
        forward = staticmethod(pool)

    for strict in (False, True):
        exported = torch.export.export(Pools(), (x,), strict=strict).module()
        assert torch.equal(exported(x), pool(x))


def test_threads_that_train_pool_and_choose_as_one_does() -> None:
    q, x = torch.randn(1, 4, 64, 16), torch.randn(1, 1, 64, 2)

    def step(number: int) -> tuple[Tensor, Tensor]:
        mine = (x * number).requires_grad_()
        pool(mine).square().sum().backward()
        assert mine.grad is not None
        return mine.grad, select(q=q)

    with ThreadPoolExecutor(4) as threads:
        for number, (gradient, chosen) in enumerate(threads.map(step, range(12))):
            alone, of_one = step(number)
            assert torch.equal(gradient, alone) and torch.equal(chosen, of_one)


VALUE_ERRORS: Refusals = {
    f"compress_block_size={LARGE} must be below": lambda: pool(compress_block_size=LARGE),
    f"num_selected_blocks={LARGE} must be below": lambda: select(num_selected_blocks=LARGE),
    f"selection_block_size={LARGE} must be below": lambda: select(selection_block_size=LARGE),
    f"kv_len={LARGE} must be below": lambda: select(kv_len=LARGE),
    "weights['positions'] is on meta and x on cpu; they must be on one device": (
        lambda: pool(X, {"positions": torch.zeros(1, 2, 2, device="meta")})
    ),
    "k_cmp is on cpu and q on meta; they must be on one device": lambda: select(q=Q.to("meta")),
    "compress_block_size=3 must be a multiple of compress_block_sliding_stride=2": (
        lambda: select(compress_block_size=3)
    ),
    "in whole strides. Try 4 or 6": lambda: select(selection_block_size=5),
    "scale=inf must be finite": lambda: select(scale=float("inf")),
    "compress_map='linear' takes ['weight', 'bias']": lambda: nsa_fast.compress_pool(
        torch.zeros(1, 1, 4, 2), {"weight_in": torch.zeros(2, 4)}, **PAIRS, compress_map="linear"
    ),
}
TYPE_ERRORS: Refusals = {
    "x has dtype torch.bool; it must be a floating point type": lambda: pool(X.bool()),
    "x has dtype torch.int64; it must be a floating point type": lambda: pool(X.long()),
    "x has layout torch.sparse_coo; it must be dense. Try x.to_dense()": (
        lambda: pool(X.to_sparse())
    ),
    "x is a nested tensor": lambda: pool(nested(X)),
    "q has dtype torch.bool; it must be a floating point type": lambda: select(q=Q.bool()),
    "q has dtype torch.complex64; it must be a floating point type": lambda: select(q=Q.cfloat()),
    "k_cmp has dtype torch.bool and q torch.float32; they must be the same": (
        lambda: select(k_cmp=torch.zeros(1, 2, 32, 16).bool())
    ),
    "q has layout torch.sparse_coo; it must be dense. Try q.to_dense()": (
        lambda: select(q=Q.to_sparse())
    ),
    "q is a nested tensor": lambda: select(q=nested(Q)),
    "x has dtype torch.complex64; it must be a floating point type": (
        lambda: nsa_fast.compress_pool(torch.zeros(1, 1, 4, 2).cfloat(), **PAIRS)
    ),
    "q has dtype torch.int64; it must be a floating point type": (
        lambda: select(q=torch.zeros(1, 4, 64, 16, dtype=torch.int64))
    ),
    "q is inside a transform of torch.func": (
        lambda: torch.func.vmap(lambda q: select(q=q))(torch.zeros(2, 1, 4, 64, 16))
    ),
    "q is inside a transform of torch.func (vmap, grad, jvp, ...)": (
        lambda: torch.func.jvp(lambda q: select(q=q), *[(torch.zeros(1, 4, 64, 16),)] * 2)
    ),
    "lse is inside a transform of torch.func": (
        lambda: torch.func.vmap(lambda lse: select(lse=lse))(torch.zeros(2, 1, 4, 64))
    ),
    "lse has dtype torch.float64; for q of torch.float32 it must be torch.float32": (
        lambda: select(lse=torch.zeros(1, 4, 64, dtype=torch.float64))
    ),
    "q is a fake tensor, which holds no numbers, and k_cmp is not": (
        lambda: select(q=FakeTensorMode().from_tensor(torch.zeros(1, 4, 64, 16)))
    ),
    "q is a fake tensor outside of its FakeTensorMode": lambda: select(
        **fakes(q=torch.zeros(1, 4, 64, 16), k_cmp=torch.zeros(1, 2, 32, 16))
    ),
    "q is a fake tensor, which holds no numbers, and k_cmp is not: make both in": inside_a_mode,
    "k_cmp and q are fake tensors of two FakeTensorModes": lambda: select(
        q=fakes(q=Q)["q"], k_cmp=fakes(k_cmp=torch.zeros(1, 2, 32, 16))["k_cmp"]
    ),
    "weights must be a mapping from name to tensor, not list": lambda: pool(weights=[1]),
    "weights must be a mapping from name to tensor, not str": lambda: pool(weights="x"),
    "weights['positions'] is a fake tensor, which holds no numbers, and x is not": (
        lambda: nsa_fast.compress_pool(
            torch.zeros(1, 1, 4, 2), fakes(positions=torch.zeros(1, 2, 2)), **PAIRS
        )
    ),
}
test_what_does_not_run_is_named = refusal_test(VALUE_ERRORS, TYPE_ERRORS)
