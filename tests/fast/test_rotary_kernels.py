"""Rotary embedding as a Triton kernel, in Triton's interpreter (G2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from broken_nsa_fast import BROKEN_TURNS, in_place  # noqa: E402
from interpreted import runs  # noqa: E402
from nsa_fast import NativeSparseAttention, rotary  # noqa: E402
from nsa_fast.adapter import NsaFastLayer, NsaFastLayerInterpreted  # noqa: E402
from nsa_ref.semantics import PAPER, ROTARY  # noqa: E402
from nsa_ref.testing import Case  # noqa: E402
from nsa_ref.testing.properties import PROPERTIES  # noqa: E402
from nsa_ref.testing.verdicts import Broken  # noqa: E402

TURNED = {name: dataclasses.replace(PAPER, rotary=name) for name in ROTARY if name != "none"}

#: Two heads of 24 numbers: with tiles of 32, two tiles of which one is short.
CASE = Case(
    semantics=TURNED["all"],
    dtype="float32",
    model_dim=8,
    q_heads=2,
    kv_heads=1,
    q_len=12,
    kv_len=12,
    head_dim=24,
    value_dim=16,
    compress_block_size=4,
    compress_block_sliding_stride=2,
    selection_block_size=4,
    num_selected_blocks=2,
    sliding_window_size=3,
)


def _in_small_tiles(device: str, mistake: str = "") -> NsaFastLayer:
    """In the process: tiles of 32 numbers, and perhaps one of BROKEN_TURNS."""
    from nsa_fast import rotary_kernels

    right = vars(_in_small_tiles).setdefault("right", rotary_kernels.turned)
    rotary_kernels.NUMBERS = 32
    rotary_kernels.turned = functools.partial(BROKEN_TURNS[mistake], right) if mistake else right
    return NsaFastLayer(device)


def _right_again() -> None:
    """In the process: without a mistake, whatever the last test planted."""
    _in_small_tiles("cpu")


LAYER = NsaFastLayerInterpreted(_in_small_tiles)  # one process for all
LAYER.semantics = tuple(TURNED.values())


# --- the kernel by itself -------------------------------------------------------------------------


def _by_the_formula(x: Any, turns: Any, *, back: bool = False) -> Any:
    """G2 as it reads, in float32, every product and sum rounded."""
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = turns.real, -turns.imag if back else turns.imag
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def _is_torchs(out: Any, x: Any, turns: Any) -> bool:
    """Whether it is what torch computes, which fuses a product with the sum where vectors end.

    The product's rounding is missing there, and both sums are rounded: three times half an eps.
    """
    a, b = (x.double()[..., first::2].abs() for first in (0, 1))
    cos, sin = turns.real.abs(), turns.imag.abs()
    most = torch.stack([a * cos + b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    apart = (out.double() - rotary.rotate(x, turns).double()).abs()
    return bool((apart <= 1.5 * torch.finfo(x.dtype).eps * most).all())


#: how x stands in memory -> (batch, heads, tokens, dim), from (batch, tokens, heads, dim)
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "as a projection leaves it": lambda x: x.transpose(1, 2),
    "head by head": lambda x: x.transpose(1, 2).contiguous(),
    "every third number": lambda x: x.repeat_interleave(3, -1)[..., ::3].transpose(1, 2),
    "from an odd number on": lambda x: torch.cat([x[..., :1], x], dim=-1)[..., 1:].transpose(1, 2),
    "one token for all": lambda x: x[:, :1].transpose(1, 2).expand(-1, -1, x.shape[1], -1),
}
#: batch, tokens, heads, dim: one tile, several, and a short last one; no power of two
SHAPES = ((1, 1, 1, 2), (2, 5, 3, 40), (1, 7, 2, 64), (2, 3, 5, 6), (1, 2, 4, 192))


def _differences(layout: str, dtype: str) -> list[str]:
    """In the process: what is not to the bit what the formula gives, or far from torch's."""
    from nsa_fast import rotary_kernels

    found = []
    for shape in SHAPES:
        batch, tokens, heads, dim = shape
        torch.manual_seed(0)
        given = torch.randn(shape).to(getattr(torch, dtype))
        x = LAYOUTS[layout](given).detach().requires_grad_()
        d = torch.randn(batch, heads, tokens, dim).to(x.dtype)
        by = rotary.turns(torch.arange(tokens) + 1000, dim, x.dtype)
        out = rotary_kernels.rotated(x, by)
        (dx,) = torch.autograd.grad(out, x, d)
        equal = {
            "out": torch.equal(out, _by_the_formula(x, by)),
            "torch's out": _is_torchs(out, x, by),
            "dx": torch.equal(dx, _by_the_formula(d, by, back=True)),
            "torch's dx": _is_torchs(dx, d, by.conj()),
            "out's layout": out.transpose(1, 2).is_contiguous(),
            "dx's layout": dx.transpose(1, 2).is_contiguous(),
        }
        found += [f"{what} of {shape}" for what, is_so in equal.items() if not is_so]
    return found


@runs
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_is_the_formula_to_the_bit(layout: str, dtype: str) -> None:
    """Forward and backward. A GPU may fuse a product and the sum, which is one rounding fewer."""
    assert LAYER.process.call(_differences, layout, dtype) == []


#: A mistake of the kernel -> a function of its module, and what stands in for it.
STEPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a pair is read backwards, and so are cos and sin": (
        "_split",
        lambda right, *given: right(*given)[::-1],
    ),
    "the second of a pair is lost": (
        "_split",
        lambda right, *given: (right(*given)[0], right(*given)[1] * 0),
    ),
}


def _differences_with(mistake: str) -> list[str]:
    """In the process: the same, with a mistake of STEPS."""
    from nsa_fast import rotary_kernels

    with in_place(((rotary_kernels, *STEPS[mistake]),)):
        return _differences("head by head", "float32")


@runs
@pytest.mark.parametrize("mistake", STEPS)
def test_a_mistake_of_the_kernel_shows(mistake: str) -> None:
    found = LAYER.process.call(_differences_with, mistake)
    assert {what.split(" of ")[0] for what in found} >= {"out", "dx"}


def _second_derivative() -> tuple[bool, str]:
    """In the process: of the kernel, which is linear, and of a layer that has it."""
    from nsa_fast import rotary_kernels

    x = torch.randn(1, 2, 3, 6, requires_grad=True)
    by = rotary.turns(torch.arange(3), 6, x.dtype)
    twice = _by_the_formula(2 * _by_the_formula(torch.ones_like(x), by), by, back=True)
    (dx,) = torch.autograd.grad(rotary_kernels.rotated(x, by).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    layer, tokens = _module(), torch.randn(1, 4, 8, requires_grad=True)
    (d_tokens,) = torch.autograd.grad(layer(tokens).sum(), tokens, create_graph=True)
    try:
        d_tokens.sum().backward()
    except RuntimeError as error:
        return torch.equal(ddx, twice), str(error)
    return False, ""


def _module(**changes: Any) -> NativeSparseAttention:
    names = (
        *("model_dim", "q_heads", "kv_heads", "head_dim", "value_dim", "compress_block_size"),
        *("compress_block_sliding_stride", "selection_block_size", "num_selected_blocks"),
        "sliding_window_size",
    )
    sizes = {name: getattr(CASE, name) for name in names}
    return NativeSparseAttention(**sizes, semantics=CASE.semantics, **changes)


@runs
def test_the_kernel_has_second_derivatives_and_a_layer_refuses_them() -> None:
    right, said = LAYER.process.call(_second_derivative)
    assert right and said.startswith("nsa_fast has no second derivatives")


def _launched(tokens: int, dtype: str, **changes: Any) -> int:
    """In the process: how often the kernel runs in a layer."""
    from nsa_fast import rotary_kernels

    layer = _module(**changes).to(getattr(torch, dtype))
    with mock.patch.object(rotary_kernels, "turned", wraps=rotary_kernels.turned) as turned:
        out = layer(torch.randn(1, tokens, 8).to(getattr(torch, dtype)))
    assert out.shape == (1, tokens, CASE.q_heads * CASE.value_dim)
    return turned.call_count


@runs
def test_a_layer_without_compiled_kernels_or_without_tokens_turns_in_torch() -> None:
    def launched(*given: Any, **changes: Any) -> int:
        return LAYER.process.call(functools.partial(_launched, *given, **changes))

    assert launched(9, "float32") == 4  # q, k of fine and of sliding, compressed keys
    assert launched(3, "float32") == 3  # no window is complete
    assert launched(0, "float32") == 0
    assert launched(9, "float32", backend="eager") == 0
    assert launched(9, "float64", backend="eager") == 0


# --- in the layer, before the judge ---------------------------------------------------------------


@runs
@pytest.mark.parametrize(
    ("asked", "name"),
    [
        *(("A4_layer_gradients", name) for name in TURNED),
        ("G2_layer_rotation", "all"),
        ("G3_decode", "all"),
        ("G4_varlen", "before_pooling"),
    ],
)
def test_layers_that_turn_are_right(asked: str, name: str) -> None:
    case = dataclasses.replace(CASE, semantics=TURNED[name])
    PROPERTIES[asked].run(LAYER, case)


@runs
def test_a_layer_in_16_bits_is_right() -> None:
    case = dataclasses.replace(CASE, dtype="bfloat16")
    PROPERTIES["G2_layer_rotation"].run(LAYER, case)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a mistake into the process, for one test."""

    def planted(mistake: str) -> None:
        wrong = functools.partial(_in_small_tiles, mistake=mistake)
        monkeypatch.setattr(LAYER, "kernels", wrong)

    yield planted
    LAYER.process.call(_right_again)


@runs
@pytest.mark.parametrize("mistake", BROKEN_TURNS)
def test_a_mistake_of_the_kernel_is_found(mistake: str, plant: Callable[[str], None]) -> None:
    """G2 where rows are wrong, G1 where their gradients are."""
    plant(mistake)
    rows, gradients = PROPERTIES["G2_layer_rotation"], PROPERTIES["A4_layer_gradients"]
    if mistake == "the gradient is turned on":
        rows.run(LAYER, CASE)
        with pytest.raises(Broken, match="dx") as found:
            gradients.run(LAYER, CASE)
        assert found.value.clause == "G1"
    else:
        with pytest.raises(Broken) as found:
            rows.run(LAYER, CASE)
        assert found.value.clause == "G2"
