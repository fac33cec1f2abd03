"""Every operation of `nsa_ref.rounded` apart: few roundings, so that none can be missing.

In a whole layer errors hide behind larger ones. Here each operation is held to its formula, and is
done by torch 3000 times over, on exact inputs and on inputs that are off, and compared with
extended precision. The largest budget used is printed, and must not be small: a bound cannot
become generous unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_inputs import Array, Generator, generator
from attention_inputs import rounded as as_stored
from nsa_ref import rounded
from nsa_ref.layer import NORM_EPS
from nsa_ref.map_bounds import rounded_pool
from nsa_ref.numerics import C_DIV, C_EXP, C_SCALE, C_TRIG, NUMERICS, Numerics
from nsa_ref.rounded import Rounded, exact
from nsa_ref.semantics import PAPER
from nsa_ref.sizes import Sizes
from nsa_ref.testing.mutants.layer import rotated

ROWS = ("fp64", "fp32", "bf16", "fp16", "bf16-eager")
MANY = 3000
wide = np.longdouble

# --- formulas -------------------------------------------------------------------------------------

S, ETA, A, ETA_A, IN, E = 2.0**-5, 2.0**-20, 2.0**-7, 2.0**-22, 2.0**-9, 2.0**-11
#: Every error is of another size: none can stand for another.
ROW = Numerics(
    dtype="float32",
    largest=100.0,
    u_store=S,
    eta=ETA,
    u_accumulate=A,
    eta_accumulate=ETA_A,
    u_operand=IN,
    u_elementwise=E,
)
U_2 = 2 * IN + IN**2


def pair(value: Any, error: Any) -> Rounded:
    return Rounded(np.array(value, float), np.array(error, float))


def store(value: float, error: float) -> float:
    """The error of a value that is stored."""
    return error + S * (abs(value) + error) + ETA


X, Y = pair(3.0, 0.25), pair(-5.0, 0.5)
ROW_X, ROW_Y = pair([3.0, -1.0], [0.25, 0.0]), pair([-5.0, 2.0], [0.5, 0.125])
TIMES = store(-15, 3 * 0.5 + 0.25 * 5.5 + E * 3.25 * 5.5)
P_1 = store(-2, 1 * 0.125 + E * 1 * 2.125)  # -1 * 2
INNER = TIMES + P_1 + 2 * ETA_A + (4 * A + U_2) * (3.25 * 5.5 + 1 * 2.125 + TIMES + P_1)
PRODUCT = 3 * 0.5 + 0.25 * 5.5 + 1 * 0.125 + 2 * ETA_A
SIZE = 3.25 * 5.5 + 1 * 2.125
AFFINE = store(-17, 0.25 * 5 + (4 * A + U_2) * (3.25 * 5 + 1 * 2) + 2 * ETA_A)
MORE = store(15, 0.25 * 5 + (3 * A + U_2) * 3.25 * 5 + ETA_A) + A * 3.25 * 5
TWO = store(2, 2 * store(1, E) + 2 * ETA_A + (4 * A + U_2) * (2 + 2 * store(1, E)))  # 1 + 1
MEAN = store(1, (TWO + 2 * E * (2 + TWO)) / 2)
ROOT = (1 + NORM_EPS) ** -0.5
OFF = ROOT * ((1 - ROOT**2 * store(1 + NORM_EPS, MEAN + E * (1 + NORM_EPS + MEAN))) ** -0.5 - 1)
R = OFF + (C_DIV + 2) * E * (ROOT + OFF)
EXPONENT = math.log(10000) / 2
ANGLE = 3 * math.exp(-EXPONENT)

#: Operation -> what it finds, and the formula written out.
FORMULAS: dict[str, tuple[Rounded, float]] = {
    "stored": (rounded.stored(X, ROW), store(3, 0.25)),
    "stored twice": (rounded.stored(X, ROW, times=2), 0.25 + ((1 + S) ** 2 - 1) * 3.25 + 2 * ETA),
    "worse": (rounded.worse(X, Rounded(X.value, Y.error)), 0.5),
    "times": (rounded.times(X, Y, ROW), TIMES),
    "scaled": (rounded.scaled(X, -2.0, ROW), store(-6, 2 * (0.25 + 2 * E * 3.25))),
    "plus": (rounded.plus(Y, 3.0, A, ROW), store(-2, 0.5 + A * (2 + 0.5))),
    "total": (rounded.total([X, Y], ROW), 0.75 + (S + A) * (3.25 + 5.5) + ETA),
    "total of three": (
        rounded.total([X, Y, X], ROW),
        1.0 + ((1 + S + A) ** 2 - 1) * (2 * 3.25 + 5.5) + 2 * ETA,
    ),
    "summed": (rounded.summed(ROW_X, (0,), ROW), store(2, 0.25 + 4 * A * (3.25 + 1))),
    "inner": (rounded.inner(ROW_X, ROW_Y, ROW), store(-17, INNER)),
    "matmul": (rounded.matmul(ROW_X, ROW_Y, ROW), store(-17, PRODUCT + (4 * A + U_2) * SIZE)),
    "matmul, a part": (
        rounded.matmul(ROW_X, ROW_Y, ROW, terms=9),
        store(-17, PRODUCT + (11 * A + U_2) * SIZE),
    ),
    "affine": (
        rounded.affine(ROW_X, ROW_Y.value[None], np.array([40.0]), ROW),
        store(23, AFFINE + A * (23 + AFFINE)),
    ),
    "affine, a common factor": (
        rounded.affine(ROW_X, ROW_Y.value[None], None, ROW, np.array([0.5])),
        AFFINE + 0.5 * (17 + AFFINE),
    ),
    "weight gradient": (
        rounded.weight_gradient(ROW_X.at(..., None), ROW_Y.at(..., None), ROW),
        store(-17, PRODUCT + (4 * A + U_2) * SIZE),
    ),
    "weight gradient by entry": (
        rounded.weight_gradient_by_entry(
            *(y.at(None, None, ..., None) for y in (ROW_X, ROW_Y)), ROW
        ),
        store(-17, store(-17, PRODUCT + (4 * A + U_2) * SIZE)),
    ),
    "input gradient": (
        rounded.input_gradient([(X.at(None), np.array([[5.0]]))] * 2, ROW),
        2 * MORE + (S + A) * 2 * (15 + MORE) + ETA,
    ),
    "normed, its root": (
        rounded.normed(np.ones((1, 1, 2)), np.ones(2), NORM_EPS, ROW).r,
        R + ((1 + S) ** 2 - 1) * (ROOT + R) + 2 * ETA,
    ),
    "turn": (rounded.turn(np.array([3.0]), 4, ROW).sine.at(0, 0), store(math.sin(3), C_TRIG * E)),
    "turn of a later pair": (
        rounded.turn(np.array([3.0]), 4, ROW).cosine.at(0, 1),
        store(math.cos(ANGLE), (ANGLE * (3 * EXPONENT + C_EXP + 1) + C_TRIG) * E),
    ),
    "sigmoid": (
        rounded.sigmoid(pair(0.0, 0.5), ROW),
        store(0.5, 0.125 + E * (C_SCALE * 0.5 / 4 + (C_EXP + C_DIV + 1) * (0.5 + 0.125))),
    ),
}


@pytest.mark.parametrize("operation", FORMULAS)
def test_the_error_of_an_operation_is_its_formula(operation: str) -> None:
    """Up to float64's own rounding, which is far below every term."""
    found, error = FORMULAS[operation]
    assert np.abs(found.error - error).max() <= 2.0**-45 * error


def test_what_may_overflow_is_unknown() -> None:
    """inf where |x| + e is beyond the largest number, and where e is NaN."""
    x = pair([99.0, -99.0, 99.5, 0.0, 0.0], [1.0, 1.5, 1.0, np.inf, np.nan])
    assert np.array_equal(rounded.unless_overflow(x, ROW).error, [1.0, *4 * [np.inf]])
    zero = exact(np.array([99.9]))
    assert np.isinf(rounded.stored(zero, ROW).error) and np.isinf(rounded.total([zero] * 2, ROW)[1])


def test_pairs_are_joined_and_taken_apart_alike() -> None:
    both = rounded.concatenated([X.at(None), Y.at(None)], axis=0)
    assert np.array_equal(both.size, [3.25, 5.5]) and both.at(1).size == Y.size
    assert np.array_equal(both.map(lambda part: part[::-1]).error, [0.5, 0.25])


# --- right implementations ------------------------------------------------------------------------


class Drawn:
    """Inputs of one operation: exact values with errors, and tensors that are off by them."""

    def __init__(self, rng: Generator, row: str, size: float) -> None:
        self.rng, self.row, self.size = rng, row, size
        self.numerics: Numerics = NUMERICS[row]
        self.dtype = getattr(torch, self.numerics.dtype)

    def normal(self, *shape: int, spread: float = 1.0, off: bool = True) -> tuple[Tensor, Rounded]:
        """A tensor that requires a gradient, and what it was meant to be."""
        value = as_stored(self.rng.standard_normal(shape) * spread, self.row)
        moved = value
        if self.size and off:
            by = self.size * self.rng.choice([-1.0, 0.3, 1.0], shape)
            moved = as_stored(value * (1.0 + by), self.row)
        tensor = torch.tensor(moved, dtype=self.dtype, requires_grad=True)
        return tensor, Rounded(value, np.abs(moved - value))


#: An operation: what a right implementation returns, the exact result, and its bound.
Results = tuple[Tensor, Array, Rounded]


def simple(
    shapes: list[tuple[int, ...]], computes: Callable[..., Any], bound: Callable[..., Rounded]
) -> Callable[[Drawn], Results]:
    """An operation on inputs of these shapes, the same on tensors and on arrays."""

    def results(d: Drawn) -> Results:
        tensors, pairs = zip(*(d.normal(*shape) for shape in shapes))
        right = computes(*(x.value.astype(wide) for x in pairs))
        return computes(*tensors), right, bound(*pairs, d.numerics)

    return results


def projected(d: Drawn) -> Results:
    """h off as a whole row, too."""
    (_, h), (weight, w) = d.normal(MANY, 2), d.normal(2, 2, off=False)
    bias, b = d.normal(2, off=False)
    common = d.size * d.rng.choice([-1.0, 1.0], (MANY, 1))
    signs = d.rng.choice([-1.0, 1.0], h.value.shape)
    moved = as_stored((h.value + signs * h.error) * (1.0 + common), d.row)
    rest = Rounded(h.value, np.abs(moved / (1.0 + common) - h.value) * (1 + 2.0**-50))
    right = h.value.astype(wide) @ w.value.T.astype(wide) + b.value
    bound = rounded.affine(rest, w.value, b.value, d.numerics, np.abs(common))
    return torch.tensor(moved, dtype=d.dtype) @ weight.T + bias, right, bound


def common_input(d: Drawn, *, fused: bool) -> Results:
    (g, x), (f, y) = d.normal(MANY, 1), d.normal(MANY, 2)
    (v, left), (w, right) = d.normal(1, 2, off=False), d.normal(2, 2, off=False)
    got = torch.cat([g, f], dim=1) @ torch.cat([v, w]) if fused else g @ v + f @ w
    parts = [(x, left.value), (y, right.value)]
    exactly = sum(z.value.astype(wide) @ weight.astype(wide) for z, weight in parts)
    return got, exactly, rounded.input_gradient(parts, d.numerics)


def normed(x: Tensor, weight: Tensor, way: str) -> Tensor:
    if way == "wide":  # float32 inside, where a right implementation may keep it
        y = x if x.dtype == torch.float64 else x.float()
        y = y * torch.rsqrt((y * y).mean(dim=-1, keepdim=True) + NORM_EPS)
        return y.to(x.dtype) * weight
    root = torch.sqrt((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + NORM_EPS)
    return x / root * weight if way == "divides" else x * (1.0 / root) * weight


def norm(d: Drawn, *, way: str, gradient: bool) -> Results:
    (x, given), (weight, w) = d.normal(MANY, 2, off=False), d.normal(2, off=False)
    dh, g = d.normal(MANY, 2)
    y, dn = given.value.astype(wide), g.value.astype(wide) * w.value
    r = 1.0 / np.sqrt((y * y).mean(axis=-1, keepdims=True) + NORM_EPS)
    found = rounded.normed(given.value[None], w.value, NORM_EPS, d.numerics)
    got = normed(x, weight, way)
    if not gradient:
        return got, y * r * w.value, found.out.at(0)
    (got,) = torch.autograd.grad(got, x, dh)
    right = r * dn - r**3 * y * (dn * y).mean(axis=-1, keepdims=True)
    dx, _ = rounded.normed_gradient(g.at(None), found, given.value[None], w.value, d.numerics)
    return got, right, dx.at(0)


def turned(x: Array, *, back: bool = False) -> Array:
    """x, (..., MANY, head_dim), turned at positions 0 to MANY - 1 in extended precision."""
    dim = x.shape[-1]
    angle = np.arange(MANY)[:, None] * wide(10000) ** (-np.arange(0, dim, 2).astype(wide) / dim)
    cosine, sine = np.cos(angle), np.sin(angle) * (-1 if back else 1)
    a, b = x[..., 0::2].astype(wide), x[..., 1::2].astype(wide)
    return np.stack([a * cosine - b * sine, a * sine + b * cosine], -1).reshape(x.shape)


def turn_of(d: Drawn, head_dim: int) -> rounded.Turn:
    return rounded.turn(np.arange(MANY).astype(float), head_dim, d.numerics)


def rotary(d: Drawn, *, back: bool = False, upcast: bool = False) -> Results:
    """The gradient turns back."""
    (y, given), (g, dy) = d.normal(MANY, 4), d.normal(MANY, 4)
    dtype = torch.float32 if upcast and d.dtype != torch.float64 else d.dtype
    got = rotated(y, torch.arange(MANY), dtype)
    if back:
        (got,), given = torch.autograd.grad(got, y, g), dy
    right = turned(given.value, back=back)
    return got, right, rounded.rotated(given, turn_of(d, 4), d.numerics, back=back)


def turned_gradient(d: Drawn) -> Results:
    """Of a tensor that is read as it is and by two readers of its rotation."""
    (a, plain), (b, x), (c, y) = (d.normal(MANY, 2) for _ in range(3))
    z, _ = d.normal(MANY, 2)
    (back,) = torch.autograd.grad(rotated(z, torch.arange(MANY), d.dtype), z, b + c)
    right = turned(x.value.astype(wide) + y.value, back=True) + plain.value
    return a + back, right, rounded.turned_gradient([plain], [x, y], turn_of(d, 2), d.numerics)


def pooled_once_turned(d: Drawn) -> Results:
    """Means of two tokens that are turned."""
    y, given = d.normal(1, 1, MANY, 4)
    got = rotated(y, torch.arange(MANY), d.dtype)
    got = (got[:, :, 0::2] + got[:, :, 1::2]) / 2
    right = turned(given.value).reshape(1, 1, MANY // 2, 2, 4).mean(axis=3)
    keys = rounded.rotated(given, turn_of(d, 4), d.numerics)
    sizes = Sizes(compress_block_size=2, compress_block_sliding_stride=2, selection_block_size=2)
    return got, right, rounded_pool(keys, {}, None, sizes, PAPER, d.numerics).out


def sigmoid(d: Drawn, *, spread: float) -> Results:
    z, given = d.normal(MANY, spread=spread)
    right = 1.0 / (1.0 + np.exp(-given.value.astype(wide)))
    return torch.sigmoid(z), right, rounded.sigmoid(given, d.numerics)


def sigmoid_gradient(d: Drawn, *, by_hand: bool) -> Results:
    (z, given), (g, dg) = d.normal(MANY, spread=3.0), d.normal(MANY)
    gate = torch.sigmoid(z)
    got = g * gate * (1 - gate) if by_hand else torch.autograd.grad(gate, z, g)[0]
    right = 1.0 / (1.0 + np.exp(-given.value.astype(wide)))
    bound = rounded.sigmoid_gradient(dg, rounded.sigmoid(given, d.numerics), d.numerics)
    return got, dg.value * right * (1.0 - right), bound


WAYS = ("wide", "divides", "inverse")
OPERATIONS: dict[str, Callable[[Drawn], Results]] = {
    "times": simple([(MANY,)] * 2, lambda a, b: a * b, rounded.times),
    "scaled": simple([(MANY,)], lambda a: a * 0.3, lambda x, row: rounded.scaled(x, 0.3, row)),
    "plus": simple(
        [(MANY,)], lambda a: a + 0.75, lambda x, row: rounded.plus(x, 0.75, row.u_accumulate, row)
    ),
    "total": simple(
        [(MANY,)] * 3, lambda a, b, c: a + b + c, lambda *x: rounded.total(x[:-1], x[-1])
    ),
    "inner": simple([(MANY, 2)] * 2, lambda a, b: (a * b).sum(-1), rounded.inner),
    "sum": simple([(3, MANY)], lambda a: a.sum(0), lambda x, row: rounded.summed(x, (0,), row)),
    "matmul": simple([(MANY, 2), (2, 2)], lambda a, b: a @ b, rounded.matmul),
    "weight gradient": simple([(2, MANY), (2, 2)], lambda g, y: g.T @ y, rounded.weight_gradient),
    "weight gradient of a head": simple(  # each of three batch entries by itself, one row in each
        [(3, 1, 1, MANY), (3, 1, 1, 2)],
        lambda g, y: (g.swapaxes(2, 3) @ y).sum(0),
        rounded.weight_gradient_by_entry,
    ),
    "projected": projected,
    "projections apart": lambda d: common_input(d, fused=False),
    "projections as one": lambda d: common_input(d, fused=True),
    **{f"norm {w}": lambda d, w=w: norm(d, way=w, gradient=False) for w in WAYS},
    **{f"norm gradient {w}": lambda d, w=w: norm(d, way=w, gradient=True) for w in WAYS},
    "rotary": rotary,
    "rotary in float32": lambda d: rotary(d, upcast=True),
    "rotary gradient": lambda d: rotary(d, back=True),
    "rotary gradient of a sum": turned_gradient,
    "sigmoid": lambda d: sigmoid(d, spread=1.0),
    "sigmoid far out": lambda d: sigmoid(d, spread=6.0),
    "sigmoid gradient": lambda d: sigmoid_gradient(d, by_hand=False),
    "sigmoid gradient by hand": lambda d: sigmoid_gradient(d, by_hand=True),
    "pooled once turned": pooled_once_turned,
}


def used(row: str, operation: str, size: float) -> float:
    """The largest |error| / bound of an operation whose inputs are off by size, relatively."""
    d = Drawn(generator(60, ROWS.index(row), list(OPERATIONS).index(operation)), row, size)
    got, right, bound = OPERATIONS[operation](d)
    error = np.abs(got.detach().to(torch.float64).numpy().astype(wide) - right)
    assert error.shape == bound.error.shape and (bound.error > 0).all()
    # 1 / |x|^3 of a small x may overflow in float16, and hardly ever does
    assert np.isfinite(bound.error).mean() > 0.99
    assert row == "fp64" or (np.abs(bound.value - right) <= bound.error).all()
    return float(np.max(error / bound.error))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_right_operation_exceeds_its_error(operation: str, row: str) -> None:
    """Of exact inputs, and of inputs that are off."""
    of_exact, of_off = used(row, operation, 0.0), used(row, operation, 0.1)
    assert of_exact <= 1 and of_off <= 1, f"{operation}, {row}: {of_exact}, {of_off}"
    assert max(of_exact, of_off) > 1 / 8, f"{operation}, {row}: {of_exact}, {of_off}"
    print(f"\nbudget used, {operation}, {row}: {of_exact:.2f}, of inputs off {of_off:.3f}")
