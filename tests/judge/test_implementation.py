"""The plug: arrays to tensors and back unchanged, layouts that are real, gradients gathered."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from nsa_ref.semantics import PAPER
from nsa_ref.testing import (
    Attention,
    Case,
    Implementation,
    OracleImplementation,
    conformance_suite,
)
from nsa_ref.testing.branches import BRANCHES, SLIDING, Raised
from nsa_ref.testing.case import DTYPES, LAYOUTS
from nsa_ref.testing.implementation import PADDED_ROWS, NotOffered, TorchImplementation
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.verdicts import Broken

torch = pytest.importorskip("torch", reason="TorchImplementation hands out tensors")

from trials import record  # noqa: E402

SHAPE = (3, 2, 5, 4)
BRANCHES_AND_POOL = ("sliding", "compress", "fine", "pool")
GRADIENTS = PROPERTIES["A3_sliding_gradients"]
EVERY_KEY = dataclasses.replace(PAPER, causal=False)


class Dense(TorchImplementation):
    """Attention without a mask, and what `run` was handed."""

    numerics = MappingProxyType({"float64": "fp64"})
    seen: list[Any]

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        self.seen = [q, k, v]
        scores = case.scale * q @ k.transpose(-1, -2)
        return Attention(scores.softmax(-1) @ v, scores.logsumexp(-1))


class WithoutLse(Dense):
    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        return Attention(super().sliding(case, q, k, v).out, None)  # type: ignore[arg-type]


def a_case(layout: str = "contiguous", dtype: str = "float64", seed: int = 0) -> Case:
    return Case(
        semantics=EVERY_KEY, batch=3, q_heads=2, kv_heads=2, q_len=5, kv_len=5, head_dim=4,
        value_dim=4, sliding_window_size=5, dtype=dtype, layout=layout, seed=seed,
    )  # fmt: skip


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_holds_the_array_however_it_lies(layout: str, dtype: str) -> None:
    """Values survive the way there and back bit for bit, -0.0 and subnormals included."""
    case = a_case(layout, dtype)
    array = case.qkv()[0]
    array[:, 0, 0, 0], array[:, 1, 2, 3] = -0.0, np.finfo(np.float16).smallest_subnormal
    tensor = TorchImplementation().tensor(case, array)
    assert str(tensor.dtype) == f"torch.{dtype}"
    back = TorchImplementation().array(tensor)
    assert back.dtype == DTYPES[dtype]
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("layout", "stride"),
    [
        ("contiguous", (40, 20, 4, 1)),
        ("transposed", (40, 4, 8, 1)),
        ("strided", (336, 168, 8, 2)),
        ("expanded", (0, 20, 4, 1)),
    ],
)
def test_layouts_are_what_they_are_called(layout: str, stride: tuple[int, ...]) -> None:
    case = a_case(layout)
    for array in case.qkv():
        tensor = TorchImplementation().tensor(case, array, grad=True)
        assert tensor.shape == SHAPE
        assert tensor.stride() == stride
        assert tensor.is_contiguous() == (layout == "contiguous")
        assert tensor.is_leaf and tensor.requires_grad


def test_what_lies_between_strided_elements_is_poison() -> None:
    """A kernel that walks memory instead of strides reads NaN, and so does one that reads on."""
    case = a_case("strided")
    tensor = TorchImplementation().tensor(case, case.qkv()[0])
    memory = tensor.as_strided((tensor.numel() * 2 - 1,), (1,))
    assert memory[1::2].isnan().all()
    rows = tensor.shape[2]
    further = tensor.as_strided((*tensor.shape[:2], rows + PADDED_ROWS, 4), tensor.stride())
    assert (further[:, :, :rows] == tensor).all() and further[:, :, rows:].isnan().all()


class TakesOneHeadForAll(Dense):
    """Heads at stride 0 are one head to it, which gets all of the gradient."""

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        if k.stride(1) == 0 and k.shape[1] > 1:
            k = k[:, :1].expand(k.shape)
        return super().sliding(case, q, k, v)


def test_keys_of_one_entry_are_expanded_over_their_heads() -> None:
    case = dataclasses.replace(a_case("expanded"), batch=1)
    q, k, v = (TorchImplementation().tensor(case, array) for array in case.qkv())
    assert q.stride() == (40, 20, 4, 1) and k.stride() == v.stride() == (40, 0, 4, 1)
    GRADIENTS.run(Dense(), case)
    with pytest.raises(Broken, match="dk"):
        GRADIENTS.run(TakesOneHeadForAll(), case)


def test_only_what_is_the_same_in_every_batch_entry_is_expanded() -> None:
    """The canary of A5 sits in one entry, and stays there."""
    case = a_case("expanded")
    array = case.qkv()[1].copy()
    array[1, 0, 3] = 7
    tensor = TorchImplementation().tensor(case, array)
    assert tensor.stride() == (40, 20, 4, 1)
    assert (tensor.numpy() == array).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_have_a_layout_and_flat_weights_have_none(layout: str) -> None:
    """A kernel that takes the strides of its indices for granted is found as well."""
    case = a_case(layout)
    expected = case.block_indices()
    indices = TorchImplementation().tensor(case, expected)
    assert indices.dtype == torch.int64
    assert indices.is_contiguous() == (layout == "contiguous")
    assert (indices.numpy() == expected).all()
    assert TorchImplementation().tensor(case, np.ones((2, 3))).is_contiguous()


def test_the_tensor_is_a_copy() -> None:
    """What an implementation does in place stays its own."""
    array = np.ones(SHAPE)
    TorchImplementation().tensor(a_case(), array).zero_()
    assert (array == 1).all()


def test_containers_keep_their_form() -> None:
    one = torch.ones(2, dtype=torch.bfloat16)
    array = TorchImplementation().array
    found = array({"a": [one, (one,)], "b": Attention(one, None), "c": "text"})
    assert isinstance(found["a"], tuple) and isinstance(found["b"], Attention)
    assert found["b"].lse is None
    assert found["b"].out.dtype == found["a"][1][0].dtype == DTYPES["bfloat16"]
    assert found["c"] == "text"


# --- running --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_hands_out_tensors_and_gives_arrays_back(layout: str) -> None:
    case = a_case(layout)
    dense = Dense()
    found = dense.run("sliding", case, *case.qkv())
    assert isinstance(found, Attention) and isinstance(found.out, np.ndarray)
    assert found.lse.shape == SHAPE[:3]
    for tensor in dense.seen:
        assert isinstance(tensor, torch.Tensor) and not tensor.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_come_from_autograd(layout: str) -> None:
    """Of every input on its own, in any layout: an expanded q has a gradient per batch entry."""
    GRADIENTS.run(Dense(), a_case(layout, seed=1))


class OverwrittenOnAGpu(Dense):
    """The next call's output takes the place of the last; arrays are copies, as a GPU's are."""

    place: Any = None

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        found = super().sliding(case, q, k, v)
        if found.out.requires_grad:
            return found
        self.place = found.out if self.place is None else self.place.copy_(found.out)
        return Attention(self.place, found.lse)

    def array(self, value: Any) -> Any:
        found = super().array(value)
        return found.copy() if isinstance(found, np.ndarray) else found


def test_a_result_that_the_next_call_overwrites_is_found_where_arrays_are_copies() -> None:
    """The tensors are kept until the second call is over, and no longer."""
    port, case = OverwrittenOnAGpu(), a_case()
    with pytest.raises(Broken, match=r"the next call has changed it, and .* elements differ"):
        PROPERTIES["A1_sliding_in_pairs"].run(port, case)
    assert port._calls is None
    for name in ("A1_sliding_in_pairs", "A3_sliding_gradients_in_pairs"):
        assert PROPERTIES[name].run(Dense(), case).compared


class StaticInputs(Dense):
    """The first call's q is where a captured graph reads: the next one is copied into it."""

    place: Any = None

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        if self.place is None or q.requires_grad:
            self.place = q
        elif q is not self.place:
            self.place.copy_(q)
        return super().sliding(case, q, k, v)


def test_an_argument_that_the_next_call_writes_into_is_found() -> None:
    message = "sliding wrote into its argument q of the call before: "
    with pytest.raises(Raised, match=message):
        PROPERTIES["A1_sliding_in_pairs"].run(StaticInputs(), a_case())


def test_an_input_that_is_not_used_has_a_gradient_of_zero() -> None:
    class ReadsQueriesAlone(TorchImplementation):
        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
            return Attention(q * 2, q.sum(-1))

    case = a_case()
    d_out, d_lse = case.upstream_gradients()
    dq, dk, dv = ReadsQueriesAlone().run_vjp("sliding", case, *case.qkv(), d_out, 0 * d_lse)
    np.testing.assert_array_equal(dq, 2 * d_out)
    assert dk.shape == dv.shape == SHAPE and not dk.any() and not dv.any()


def test_without_lse_there_are_gradients_of_out_alone() -> None:
    """A gradient arrives through lse in cases of odd seeds."""
    case = a_case()
    assert WithoutLse().run("sliding", case, *case.qkv()).lse is None
    GRADIENTS.run(WithoutLse(), case)
    with pytest.raises(NotOffered, match="lse of sliding"):
        GRADIENTS.run(WithoutLse(), a_case(seed=1))


def test_weights_are_a_dict_and_so_are_their_gradients() -> None:
    class Pooling(TorchImplementation):
        def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> Any:
            assert all(tensor.dtype == x.dtype for tensor in weights.values())
            return 3 * x + weights["shift"]

    case = a_case()
    x, d_out = case.array("x", *SHAPE), case.array("d_out", *SHAPE)
    weights = {"unused": np.ones((2, 3)), "shift": case.array("weights/shift", *SHAPE)}
    np.testing.assert_array_equal(Pooling().run("pool", case, x, weights), 3 * x + weights["shift"])
    dx, dweights = Pooling().run_vjp("pool", case, x, weights, d_out)
    np.testing.assert_array_equal(dx, 3 * d_out)
    assert list(dweights) == ["unused", "shift"]
    np.testing.assert_array_equal(dweights["shift"], d_out)
    np.testing.assert_array_equal(dweights["unused"], np.zeros((2, 3)))


# --- what is not offered --------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Implementation, TorchImplementation])
@pytest.mark.parametrize(
    "method", [*BRANCHES_AND_POOL, "sliding_mask", "compress_mask", "fine_mask", "select"]
)
def test_what_is_not_overridden_is_not_offered(base: type[Implementation], method: str) -> None:
    assert not base().offers(method)
    with pytest.raises(NotOffered, match=method):
        base().run(method, Case())
    if method in BRANCHES_AND_POOL:
        assert not base().offers_vjp(method)
        with pytest.raises(NotOffered, match=method):
            base().run_vjp(method, Case())


def test_gradients_of_numpy_ports_are_methods_of_their_own() -> None:
    """And those of torch ports come with the method."""

    class ForwardOnly(Implementation):
        sliding = OracleImplementation.sliding

    assert ForwardOnly().offers("sliding")
    assert not ForwardOnly().offers_vjp("sliding")
    with pytest.raises(NotOffered, match="sliding_vjp"):
        ForwardOnly().run_vjp("sliding", Case())
    assert Dense().offers_vjp("sliding")
    assert all(OracleImplementation().offers_vjp(branch.name) for branch in BRANCHES)


# --- the branches' view of what comes back --------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda q: q, "sliding returned ndarray, not Attention"),
        (lambda q: (q,), "sliding returned tuple, not Attention"),
        (lambda q: (q[:1], None), r"sliding out has shape \(1, 2, 5, 4\); it must be \(3, 2, 5, 4"),
        (lambda q: (q, q), r"sliding lse has shape \(3, 2, 5, 4\); it must be \(3, 2, 5\)"),
    ],
)
def test_a_result_of_the_wrong_form_is_said_to_be(
    result: Callable[[np.ndarray], Any], message: str
) -> None:
    class Odd(Implementation):
        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Any:
            return result(q)

    case = a_case()
    with pytest.raises(Raised, match=message):
        SLIDING.forward(Odd(), case, SLIDING.inputs(case))


# --- what it states -------------------------------------------------------------------------------


class Unlucky:
    """Raises when it is read."""

    def __get__(self, port: object, owner: object) -> str:
        raise OSError("no\nfile")


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("device", None, "Stated.device=None must be a text such as 'cpu'"),
        ("device", "", "Stated.device='' must be"),
        ("name", "n" * 2000, "characters ... "),
        ("name", Unlucky(), "Stated.name raised OSError: no file at "),
        ("limits", Unlucky(), "Stated.limits raised OSError: no file at "),
        ("name", property(lambda self: self.nothing), "Stated.name raised AttributeError: "),
        ("sliding", property(lambda self: self.nothing), "Stated.sliding raised AttributeError: "),
        ("sliding", Unlucky(), "Stated.sliding raised OSError: no file at "),
        ("supports", Unlucky(), "Stated.supports raised OSError: no file at "),
        ("compile_counts", Unlucky(), "Stated.compile_counts raised OSError: no file at "),
        ("numerics", {"float32": ["fp32"]}, "Stated.numerics has 'float32': ['fp32']; a dtype"),
        ("numerics", {"float32": {"fp32"}}, "Stated.numerics has 'float32': {'fp32'}; a dtype"),
        ("deterministic", "no", "Stated.deterministic='no' must be True or False"),
        ("lse_gradient", None, "Stated.lse_gradient=None must be True or False"),
        ("compile_counts", lambda self: {}["graphs"], "Stated.compile_counts() raised KeyError"),
        ("compile_counts", lambda self: None, "Stated.compile_counts() returned None; it must"),
        ("compile_counts", None, "compile_counts=None must be a method"),
        ("supports", None, "supports=None must be a method"),
        ("sliding", 3, "sliding=3 must be a method"),
        ("compile_counts", lambda self: {"graphs": "3"}, "returned {'graphs': '3'}; it must"),
        ("compile_counts", lambda self: {3: 4}, "returned {3: 4}; it must return a dict of"),
    ],
)
def test_what_an_attribute_must_be_is_said_by_its_name(
    attribute: str, value: Any, words: str
) -> None:
    port = type("Stated", (OracleImplementation,), {attribute: value})()
    with pytest.raises((TypeError, ValueError), match=re.escape(words)) as error:
        conformance_suite(port)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_counts_that_fail_later_are_told_by_their_name(tmp_path: Path) -> None:
    """They may need what only a run brings."""
    counted = itertools.count()

    class Stated(OracleImplementation):
        def compile_counts(self) -> dict[str, int]:
            return {} if next(counted) < 2 else {}["graphs"]

    port = Stated()
    conformance_suite(port)
    with pytest.raises(TypeError, match=r"Stated.compile_counts\(\) raised KeyError: 'graphs' at "):
        record("W1_sliding_mask_as_read", port, tmp_path, case=Case())
