"""Every operation of `nsa_ref.layer_bounds` apart: few roundings, so that none can be missing.

In a whole layer errors hide behind larger ones. Here each operation is done by torch 3000 times
over, on inputs that are off by what is stated and on exact ones, and compared with extended
precision. The largest budget used is printed (``-s``, ``-rP``), and must not be small: a bound
cannot become generous unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import attention_inputs
from attention_inputs import Array, Generator, generator
from nsa_ref import rounded
from nsa_ref.map_bounds import rounded_pool
from nsa_ref.numerics import NUMERICS, Numerics
from nsa_ref.rounded import Rounded
from nsa_ref.semantics import PAPER
from nsa_ref.sizes import Sizes
from nsa_ref.testing.mutants.layer import rotated

ROWS = ("fp64", "fp32", "bf16", "fp16", "bf16-eager")
MANY = 3000
wide = np.longdouble


class Drawn:
    """Inputs of one operation: exact values with errors, and tensors that are off by them."""

    def __init__(self, rng: Generator, row: str, size: float) -> None:
        self.rng, self.row, self.size = rng, row, size
        self.numerics: Numerics = NUMERICS[row]
        self.dtype = getattr(torch, self.numerics.dtype)

    def normal(
        self, *shape: int, spread: float = 1.0, exact: bool = False
    ) -> tuple[Tensor, Rounded]:
        """A tensor that requires a gradient, and what it was meant to be."""
        value = attention_inputs.rounded(self.rng.standard_normal(shape) * spread, self.row)
        moved = value
        if self.size and not exact:
            off = self.size * self.rng.choice([-1.0, 0.3, 1.0], shape)
            moved = attention_inputs.rounded(value * (1.0 + off), self.row)
        layer = Rounded(value, np.abs(moved - value))
        return torch.tensor(moved, dtype=self.dtype, requires_grad=True), layer

    def upcast(self, y: Tensor) -> Tensor:
        """float32 inside, where a right implementation may keep it."""
        return y if self.dtype == torch.float64 else y.float()


#: An operation: what a right implementation returns, the exact result, and its bound.
Case = tuple[Tensor, Array, Rounded]


def times(d: Drawn) -> Case:
    (a, x), (b, y) = d.normal(MANY), d.normal(MANY)
    return a * b, x.value.astype(wide) * y.value, rounded.times(x, y, d.numerics)


def total(d: Drawn) -> Case:
    drawn = [d.normal(MANY) for _ in range(3)]
    (a, x), (b, y), (c, z) = drawn
    exact = x.value.astype(wide) + y.value + z.value
    return a + b + c, exact, rounded.total([x, y, z], d.numerics)


def inner(d: Drawn) -> Case:
    (a, x), (b, y) = d.normal(MANY, 2), d.normal(MANY, 2)
    exact = (x.value.astype(wide) * y.value).sum(axis=-1)
    return (a * b).sum(dim=-1), exact, rounded.inner(x, y, d.numerics)


def projected(d: Drawn) -> Case:
    """h off as a whole row, too."""
    (_, h), (weight, w) = d.normal(MANY, 2), d.normal(2, 2, exact=True)
    (bias, b) = d.normal(2, exact=True)
    common = d.size * d.rng.choice([-1.0, 1.0], (MANY, 1))
    signs = d.rng.choice([-1.0, 1.0], h.value.shape)
    moved = attention_inputs.rounded((h.value + signs * h.error) * (1.0 + common), d.row)
    rest = Rounded(h.value, np.abs(moved / (1.0 + common) - h.value) * (1 + 2.0**-50))
    exact = h.value.astype(wide) @ w.value.T.astype(wide) + b.value
    bound = rounded.affine(rest, w.value, b.value, d.numerics, np.abs(common))
    return torch.tensor(moved, dtype=d.dtype) @ weight.T + bias, exact, bound


def common_input(d: Drawn, *, fused: bool) -> Case:
    (g, x), (f, y) = d.normal(MANY, 1), d.normal(MANY, 2)
    (v, left), (w, right) = d.normal(1, 2, exact=True), d.normal(2, 2, exact=True)
    got = torch.cat([g, f], dim=1) @ torch.cat([v, w]) if fused else g @ v + f @ w
    exact = x.value.astype(wide) @ left.value.astype(wide)
    exact = exact + y.value.astype(wide) @ right.value.astype(wide)
    parts = [(x, left.value), (y, right.value)]
    return got, exact, rounded.input_gradient(parts, d.numerics)


def weight_gradient(d: Drawn) -> Case:
    (g, x), (h, y) = d.normal(2, MANY), d.normal(2, 2)
    exact = x.value.T.astype(wide) @ y.value.astype(wide)
    return g.T @ h, exact, rounded.weight_gradient(x, y, d.numerics)


def sum_gradient(d: Drawn) -> Case:
    g, x = d.normal(3, MANY)
    exact = x.value.astype(wide).sum(axis=0)
    return g.sum(dim=0), exact, rounded.summed(x, (0,), d.numerics)


def normed(x: Tensor, weight: Tensor, d: Drawn, way: str) -> Tensor:
    if way == "wide":
        y = d.upcast(x)
        y = y * torch.rsqrt((y * y).mean(dim=-1, keepdim=True) + 2.0**-23)
        return y.to(x.dtype) * weight
    mean = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
    root = torch.sqrt(mean + 2.0**-23)
    return x / root * weight if way == "divides" else x * (1.0 / root) * weight


def norm(d: Drawn, *, way: str) -> Case:
    (x, given), (weight, w) = (d.normal(MANY, 2, exact=True), d.normal(2, exact=True))
    y = given.value.astype(wide)
    exact = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + 2.0**-23) * w.value
    bound = rounded.normed(given.value[None], w.value, d.numerics)
    h = Rounded(*(part[0] for part in bound.out))
    return normed(x, weight, d, way), exact, h


def norm_gradient(d: Drawn, *, way: str) -> Case:
    (x, given), (weight, w) = d.normal(MANY, 2, exact=True), d.normal(2, exact=True)
    dh, g = d.normal(MANY, 2)
    (got,) = torch.autograd.grad(normed(x, weight, d, way), x, dh)
    y, dn = given.value.astype(wide), g.value.astype(wide) * w.value
    r = 1.0 / np.sqrt((y * y).mean(axis=-1, keepdims=True) + 2.0**-23)
    exact = r * dn - r**3 * y * (dn * y).mean(axis=-1, keepdims=True)
    forward = rounded.normed(given.value[None], w.value, d.numerics)
    batched = Rounded(g.value[None], g.error[None])
    dx, _ = rounded.normed_gradient(batched, forward, given.value[None], w.value, d.numerics)
    return got, exact, Rounded(dx.value[0], dx.error[0])


def rotary(d: Drawn, *, back: bool, upcast: bool) -> Case:
    """Positions up to 3000; the gradient turns back."""
    (y, given), (g, dy) = d.normal(MANY, 4), d.normal(MANY, 4)
    dtype = torch.float32 if upcast and d.dtype != torch.float64 else d.dtype
    got = rotated(y, torch.arange(MANY), dtype)
    if back:
        (got,) = torch.autograd.grad(got, y, g)
        given = dy
    frequency = wide(10000) ** (-np.arange(0, 4, 2).astype(wide) / 4)
    angle = np.arange(MANY).astype(wide)[:, None] * frequency
    cosine, sine = np.cos(angle), np.sin(angle) * (-1 if back else 1)
    a, b = given.value[:, 0::2].astype(wide), given.value[:, 1::2].astype(wide)
    exact = np.stack([a * cosine - b * sine, a * sine + b * cosine], -1).reshape(MANY, 4)
    turn = rounded.turn(np.arange(MANY).astype(float), 4, d.numerics)
    turn = turn.back() if back else turn
    return got, exact, rounded.rotated(given, turn, d.numerics)


def joined(d: Drawn) -> Case:
    """The gradient of a tensor that is read as it is and by two readers of its rotation."""
    drawn = [d.normal(MANY, 2) for _ in range(3)]
    (a, plain), *turned = drawn
    y, _ = d.normal(MANY, 2)
    both = turned[0][0] + turned[1][0]
    (back,) = torch.autograd.grad(rotated(y, torch.arange(MANY), d.dtype), y, both)
    angle = np.arange(MANY).astype(wide)
    cosine, sine = np.cos(angle), np.sin(angle)
    u, v = (sum(part.value[:, i].astype(wide) for _, part in turned) for i in (0, 1))
    exact = np.stack([u * cosine + v * sine, v * cosine - u * sine], axis=-1) + plain.value
    turn = rounded.turn(np.arange(MANY).astype(float), 2, d.numerics)
    parts = [part for _, part in turned]
    return a + back, exact, rounded.turned_gradient([plain], parts, turn, d.numerics)


def pooled_once_turned(d: Drawn) -> Case:
    """Means of two tokens that are turned at positions up to 3000."""
    y, given = d.normal(1, 1, MANY, 4)
    got = rotated(y, torch.arange(MANY), d.dtype)
    got = (got[:, :, 0::2] + got[:, :, 1::2]) / 2
    frequency = wide(10000) ** (-np.arange(0, 4, 2).astype(wide) / 4)
    angle = np.arange(MANY).astype(wide)[:, None] * frequency
    a, b = given.value[..., 0::2].astype(wide), given.value[..., 1::2].astype(wide)
    first, second = (
        a * np.cos(angle) - b * np.sin(angle),
        a * np.sin(angle) + b * np.cos(angle),
    )
    exact = np.stack([first, second], -1).reshape(1, 1, MANY // 2, 2, 4).mean(axis=3)
    turn = rounded.turn(np.arange(MANY).astype(float), 4, d.numerics)
    turned = rounded.rotated(given, turn, d.numerics)
    sizes = Sizes(compress_block_size=2, compress_block_sliding_stride=2, selection_block_size=2)
    return got, exact, rounded_pool(turned, {}, None, sizes, PAPER, d.numerics).out


def head_weight_gradient(d: Drawn) -> Case:
    """The weight of one head, each of three batch entries by itself; one row in each."""
    (g, x), (h, y) = d.normal(3, 1, 1, MANY), d.normal(3, 1, 1, 2)
    exact = (x.value.swapaxes(2, 3).astype(wide) @ y.value.astype(wide)).sum(axis=0)
    return (g.mT @ h).sum(dim=0), exact, rounded.weight_gradient_by_entry(x, y, d.numerics)


def sigmoid(d: Drawn, *, spread: float) -> Case:
    z, given = d.normal(MANY, spread=spread)
    exact = 1.0 / (1.0 + np.exp(-given.value.astype(wide)))
    return torch.sigmoid(z), exact, rounded.sigmoid(given, d.numerics)


def sigmoid_gradient(d: Drawn, *, by_hand: bool) -> Case:
    (z, given), (g, dg) = d.normal(MANY, spread=3.0), d.normal(MANY)
    gate = torch.sigmoid(z)
    got = g * gate * (1 - gate) if by_hand else torch.autograd.grad(gate, z, g)[0]
    exact = 1.0 / (1.0 + np.exp(-given.value.astype(wide)))
    exact = dg.value * exact * (1.0 - exact)
    bound = rounded.sigmoid(given, d.numerics)
    return got, exact, rounded.sigmoid_gradient(dg, bound, d.numerics)


OPERATIONS: dict[str, Callable[[Drawn], Case]] = {
    "times": times,
    "total": total,
    "inner": inner,
    "projected": projected,
    "projections apart": lambda d: common_input(d, fused=False),
    "projections as one": lambda d: common_input(d, fused=True),
    "weight gradient": weight_gradient,
    "sum gradient": sum_gradient,
    **{f"norm {w}": lambda d, w=w: norm(d, way=w) for w in ("wide", "divides", "inverse")},
    **{
        f"norm gradient {w}": lambda d, w=w: norm_gradient(d, way=w)
        for w in ("wide", "divides", "inverse")
    },
    "rotary": lambda d: rotary(d, back=False, upcast=False),
    "rotary in float32": lambda d: rotary(d, back=False, upcast=True),
    "rotary gradient": lambda d: rotary(d, back=True, upcast=False),
    "rotary gradient of a sum": joined,
    "sigmoid": lambda d: sigmoid(d, spread=1.0),
    "sigmoid far out": lambda d: sigmoid(d, spread=6.0),
    "sigmoid gradient": lambda d: sigmoid_gradient(d, by_hand=False),
    "sigmoid gradient by hand": lambda d: sigmoid_gradient(d, by_hand=True),
    "pooled once turned": pooled_once_turned,
    "weight gradient of a head": head_weight_gradient,
}


def used(row: str, operation: str, size: float) -> float:
    """The largest |error| / bound of an operation whose inputs are off by size, relatively."""
    d = Drawn(generator(60, ROWS.index(row), list(OPERATIONS).index(operation)), row, size)
    got, exact, bound = OPERATIONS[operation](d)
    error = np.abs(got.detach().to(torch.float64).numpy().astype(wide) - exact)
    assert error.shape == bound.error.shape and (bound.error > 0).all()
    # 1 / |x|^3 of a small x may overflow in float16, and hardly ever does
    assert np.isfinite(bound.error).mean() > 0.99
    assert row == "fp64" or (np.abs(bound.value - exact) <= bound.error).all()
    return float(np.max(error / bound.error))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_of_exact_inputs_and_of_inputs_that_are_off(operation: str, row: str) -> None:
    exact, off = used(row, operation, 0.0), used(row, operation, 0.1)
    assert exact <= 1 and off <= 1, f"{operation}, {row}: {exact}, {off}"
    assert max(exact, off) > 1 / 8, f"{operation}, {row}: {exact}, {off}"
    print(f"\nbudget used, {operation}, {row}: {exact:.2f}, of inputs that are off {off:.3f}")
