"""The oracle's attention and its gradients (clauses A): einsum, complex step, rationals, mpmath."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_definitions import Dense, U, dense_attention
from nsa_ref import Sizes, attend, attend_vjp, sliding_mask
from tables import reaches

STEP = 1e-30  # of the complex step: no cancellation, so it may be as small as it likes


class Arrays(NamedTuple):
    """The arguments of attention and the gradients that arrive; `mask` as multiplicities."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    d_out: np.ndarray
    d_lse: np.ndarray
    scale: float


@st.composite
def attentions(draw: st.DrawFn, *, most: int = 6, peak: float = 40.0) -> Arrays:
    """Arrays of every small geometry; the simplest has one head, no row and no column.

    The logits range from 0 (all equal) to about `peak`; multiplicities from 0 to 3, with rows
    that see nothing among them.
    """
    batch = draw(st.sampled_from([1, 2, 3, 0]))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len, columns = draw(st.integers(0, most)), draw(st.integers(0, most))
    head_dim, value_dim = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    size = draw(st.sampled_from([0.0, 0.1, 1.0, math.sqrt(peak)]))
    visible = draw(st.sampled_from([0.2, 0.7, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = (batch, kv_heads * group, q_len)
    seen = generator.random((*rows, columns)) < visible
    return Arrays(
        q=size * generator.standard_normal((*rows, head_dim)),
        k=size * generator.standard_normal((batch, kv_heads, columns, head_dim)),
        v=generator.standard_normal((batch, kv_heads, columns, value_dim)),
        mask=seen * generator.integers(1, 4, seen.shape),
        d_out=generator.standard_normal((*rows, value_dim)),
        d_lse=generator.standard_normal(rows),
        scale=draw(st.sampled_from([head_dim**-0.5, 0.3, -1.0])),
    )


def empty_rows(mask: np.ndarray) -> np.ndarray:
    return ~(mask > 0).any(axis=-1)


def within(actual: np.ndarray, dense: Dense) -> None:
    """Equal where the bound is 0 or the value is not finite, else no further than the bound."""
    expected, _, bound = dense
    assert actual.shape == expected.shape
    exact = ~np.isfinite(expected) | (bound == 0)
    np.testing.assert_array_equal(actual[exact], expected[exact])
    error = abs(actual - np.where(exact, 0, expected))
    for index in np.argwhere(~exact & ~(error <= bound)):
        at = tuple(index)
        raise AssertionError(f"{at}: {actual[at]} is not {expected[at]} within {bound[at]}")


# --- against the dense definition -----------------------------------------------------------------


@given(
    arrays=attentions(),
    empty_row=st.sampled_from(["zero", "nan", "uniform"]),
    empty_lse=st.sampled_from([-math.inf, 0.0, math.inf]),
)
@settings(deadline=None, max_examples=100)
def test_a1_a2_attend_is_the_dense_softmax(arrays, empty_row, empty_lse):
    q, k, v, mask, _, _, scale = arrays
    actual = attend(q, k, v, mask, scale=scale, empty_row=empty_row, empty_lse=empty_lse)
    dense = dense_attention(q, k, v, mask, scale=scale, empty_row=empty_row, empty_lse=empty_lse)
    within(actual.out, dense["out"])
    within(actual.lse, dense["lse"])


@given(arrays=attentions(), empty_row=st.sampled_from(["zero", "nan", "uniform"]))
@settings(deadline=None, max_examples=100)
def test_a3_attend_vjp_is_the_whole_jacobian_contracted(arrays, empty_row):
    actual = attend_vjp(*arrays[:6], scale=arrays.scale, empty_row=empty_row)
    dense = dense_attention(*arrays[:6], scale=arrays.scale, empty_row=empty_row)
    for gradient, name in zip(actual, ("dq", "dk", "dv")):
        within(gradient, dense[name])


@pytest.mark.parametrize(
    "corner",
    [
        lambda arrays: arrays.q.size and empty_rows(arrays.mask).any(),
        lambda arrays: arrays.q.size and (arrays.mask.sum(axis=-1) == 1).any(),
        lambda arrays: arrays.mask.size and arrays.q.shape[1] > arrays.k.shape[1] > 1,
        lambda arrays: arrays.q.shape[3] != arrays.v.shape[3] > 0,
        lambda arrays: arrays.q.size and arrays.k.shape[2] == 0,
        lambda arrays: arrays.mask.size and not arrays.q.any(),
        lambda arrays: (arrays.mask > 1).any(),
        lambda arrays: arrays.q.shape[0] == 0,
    ],
    ids=["no key", "one key", "GQA", "Dk != Dv", "no columns", "equal logits", "twice", "batch 0"],
)
def test_attentions_reach_the_corner(corner):
    reaches(attentions(), corner)


def test_a1_scale_defaults_to_head_dim_to_the_minus_half_and_bool_masks_count_once():
    generator = np.random.default_rng(7)
    q, k, v = (generator.standard_normal((1, 2, 3, 5)) for _ in range(3))
    mask = np.tri(3, dtype=bool)
    default = attend(q, k, v, mask)
    explicit = attend(q, k, v, mask.astype(np.int64)[None, None], scale=5**-0.5)
    np.testing.assert_array_equal(default.out, explicit.out)
    np.testing.assert_array_equal(default.lse, explicit.lse)


# --- complex step ---------------------------------------------------------------------------------


@given(arrays=attentions(most=3, peak=9.0), empty_row=st.sampled_from(["zero", "nan", "uniform"]))
@settings(deadline=None, max_examples=60)
def test_a3_every_gradient_is_the_complex_step_to_1e_12(arrays, empty_row):
    """Every element of q, k and v, through out and lse together.

    1e-12 is relative to the tensor's largest sum of |terms|: a single visible key has dq = 0 by
    cancellation, so the gradient itself is no scale.
    """
    q, k, v, mask, d_out, d_lse, scale = arrays
    gradients = attend_vjp(q, k, v, mask, d_out, d_lse, scale=scale, empty_row=empty_row)
    dense = dense_attention(*arrays[:6], scale=scale, empty_row=empty_row)
    seen = ~empty_rows(mask)
    # NaN has no derivative, and A2 says that its gradient is 0
    counted = np.broadcast_to(seen if empty_row == "nan" else True, seen.shape)

    def loss(inputs: list[np.ndarray]) -> complex:
        out, lse = attend(*inputs, mask, scale=scale, empty_row=empty_row)
        return complex((d_out[counted] * out[counted]).sum() + (d_lse[seen] * lse[seen]).sum())

    for which, name in enumerate(("dq", "dk", "dv")):
        x = (q, k, v)[which]
        largest = dense[name].terms.max(initial=0)
        for index in np.ndindex(x.shape):
            inputs = [q, k, v]
            inputs[which] = x.astype(complex)
            inputs[which][index] += STEP * 1j
            derivative = loss(inputs).imag / STEP
            error = abs(gradients[which][index] - derivative)
            assert error <= 1e-12 * largest, f"{name}{index}: {error}, terms up to {largest}"


# --- exact rationals ------------------------------------------------------------------------------

INTEGERS = st.integers(-4, 4)


@st.composite
def equal_logits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(v, k, mask, d): one row, q = 0, small integers, so that the exact results are fractions."""
    columns, dim = draw(st.integers(1, 6)), draw(st.integers(1, 3))

    def integers(*shape: int) -> np.ndarray:
        flat = [draw(INTEGERS) for _ in range(math.prod(shape))]
        return np.array(flat, dtype=np.float64).reshape(shape)

    mask = np.array([draw(st.integers(0, 3)) for _ in range(columns)])
    mask[draw(st.integers(0, columns - 1))] = draw(st.integers(1, 3))
    return integers(columns, dim), integers(columns, dim), mask, integers(dim)


@given(case=equal_logits(), d_lse=INTEGERS)
@settings(deadline=None, max_examples=100)
def test_a1_a3_equal_logits_give_the_exact_rational_means(case, d_lse):
    """q = 0, scale 1: P_j = mult_j / total, and everything but lse is a fraction.

    P has one rounding, a sum of `columns` products at most columns + 1 more, dS three more sums
    of that kind: 4 (columns + 4) u times the sum of |terms| holds them all.
    """
    v, k, mask, d_out = case
    columns, dim = v.shape
    q = np.zeros((1, 1, 1, dim))
    arguments = (q, k[None, None], v[None, None], mask)
    out, lse = attend(*arguments, scale=1.0)
    d_out_row, d_lse_row = d_out[None, None, None], np.full((1, 1, 1), float(d_lse))
    dq, dk, dv = attend_vjp(*arguments, d_out_row, d_lse_row, scale=1.0)

    total = int(mask.sum())
    P = [Fraction(int(m), total) for m in mask]
    V, K = ([[Fraction(x) for x in row] for row in array] for array in (v, k))
    dO = [Fraction(x) for x in d_out]
    dP = [sum((a * b for a, b in zip(dO, row)), Fraction(0)) for row in V]
    D = sum((p * x for p, x in zip(P, dP)), Fraction(0))
    dS = [p * (x - D + d_lse) for p, x in zip(P, dP)]
    size = [sum(abs(a * b) for a, b in zip(dO, row)) for row in V]
    M = [p * (x + sum(size) + abs(d_lse)) for p, x in zip(P, size)]

    unit = Fraction(4 * (columns + 4), 2**53)
    for c in range(dim):
        exact = sum(p * row[c] for p, row in zip(P, V))
        terms = sum(p * abs(row[c]) for p, row in zip(P, V))
        assert abs(Fraction(out[0, 0, 0, c]) - exact) <= unit * terms
        exact = sum(s * row[c] for s, row in zip(dS, K))
        terms = sum(m * abs(row[c]) for m, row in zip(M, K))
        assert abs(Fraction(dq[0, 0, 0, c]) - exact) <= unit * terms
        for j in range(columns):
            assert abs(Fraction(dv[0, 0, j, c]) - P[j] * dO[c]) <= unit * abs(P[j] * dO[c])
    assert not dk.any()  # q is 0
    # log of an exact integer: the logarithm's own rounding, at most 2 units in the last place
    assert abs(lse[0, 0, 0] - math.log(total)) <= 4 * U * math.log(total)


@pytest.mark.parametrize("hidden", [False, True], ids=["both keys", "and a hidden one"])
def test_a3_a5_two_heads_over_two_keys_by_hand(hidden):
    """Weights 1/4, 3/4 and 1/2, 1/2; a third key, which nobody sees, changes nothing.

    ::

        head  q  s        P           out  D  dS             lse
        0     1  0, ln 3  1/4, 3/4    3    3  -3/4, 3/4      ln 4
        1     0  0, 0     1/2, 1/2    2    2  -1,   1        ln 2
    """
    ln3 = math.log(3)
    keys, values, mask = [0.0, ln3], [0.0, 4.0], [1, 1]
    dk, dv = [-0.75, 0.75], [0.75, 1.25]
    if hidden:
        keys, values, mask = [*keys, 700.0], [*values, 1e300], [*mask, 0]
        dk, dv = [*dk, 0.0], [*dv, 0.0]
    q = np.array([1.0, 0.0]).reshape(1, 2, 1, 1)
    k, v = (np.array(x).reshape(1, 1, -1, 1) for x in (keys, values))
    mask = np.array(mask).reshape(1, 1, 1, -1)

    found = attend(q, k, v, mask, scale=1.0)
    gradients = attend_vjp(q, k, v, mask, np.ones_like(q), scale=1.0)
    table = ([3, 2], [math.log(4), math.log(2)], [0.75 * ln3, ln3], dk, dv)
    for array, expected in zip((*found, *gradients), table):
        # exp(ln 3) is 3 but for a few roundings, and nothing here is larger than 4
        assert np.abs(array.ravel() - expected).max() <= 16 * 4 * U
    if hidden:
        assert gradients[1].ravel()[2] == gradients[2].ravel()[2] == 0


def test_a1_halves_and_quarters_are_exact_to_the_last_bit():
    v = np.array([1.0, 2.0, 8.0, 1e300]).reshape(1, 1, 4, 1)
    zeros = np.zeros((1, 1, 4, 1))
    mask = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [2, 1, 1, 0], [0, 3, 1, 0]])
    out = attend(zeros, zeros, v, mask).out[0, 0, :, 0]
    assert out.tolist() == [1.0, 1.5, 3.0, 3.5]


# --- mpmath ---------------------------------------------------------------------------------------


@given(arrays=attentions(most=3, peak=2000.0))
@settings(deadline=None, max_examples=40)
def test_a1_a3_fifty_digits_agree_up_to_huge_logits(arrays):
    """The equations of A1 and A3 in mpmath, with no maximum subtracted: logits beyond exp's range.

    The bound is that of `dense_attention`, which counts the roundings of two computations.
    """
    q, k, v, mask, d_out, d_lse, scale = arrays
    out, lse = attend(q, k, v, mask, scale=scale)
    gradients = attend_vjp(q, k, v, mask, d_out, d_lse, scale=scale)
    dense = dense_attention(*arrays[:6], scale=scale)
    group = q.shape[1] // k.shape[1]
    with mpmath.workdps(50):
        real = np.vectorize(mpmath.mpf, otypes=[object])
        zero = mpmath.mpf(0)
        dq, dk, dv = (np.full(x.shape, zero, dtype=object) for x in (q, k, v))
        exact_out = np.full(out.shape, zero, dtype=object)
        exact_lse = np.full(lse.shape, -mpmath.inf, dtype=object)
        for b, h, t in zip(*np.nonzero(~empty_rows(mask))):
            g = h // group
            seen = np.flatnonzero(mask[b, h, t])
            Q, dO = (list(map(mpmath.mpf, x[b, h, t])) for x in (q, d_out))
            K, V = ({j: list(map(mpmath.mpf, x[b, g, j])) for j in seen} for x in (k, v))
            s = {j: mpmath.mpf(scale) * mpmath.fdot(Q, K[j]) for j in seen}
            weight = {j: int(mask[b, h, t, j]) * mpmath.exp(s[j]) for j in seen}
            total = mpmath.fsum(weight.values())
            P = {j: weight[j] / total for j in seen}
            dP = {j: mpmath.fdot(dO, V[j]) for j in seen}
            D = mpmath.fsum(P[j] * dP[j] for j in seen)
            exact_lse[b, h, t] = mpmath.log(total)
            for j in seen:
                dS = P[j] * (dP[j] - D + mpmath.mpf(d_lse[b, h, t]))
                exact_out[b, h, t] += P[j] * np.array(V[j], dtype=object)
                dq[b, h, t] += scale * dS * np.array(K[j], dtype=object)
                dk[b, g, j] += scale * dS * np.array(Q, dtype=object)
                dv[b, g, j] += P[j] * np.array(dO, dtype=object)
        for actual, exact, name in (
            (out, exact_out, "out"),
            (lse, exact_lse, "lse"),
            (gradients[0], dq, "dq"),
            (gradients[1], dk, "dk"),
            (gradients[2], dv, "dv"),
        ):
            finite = np.isfinite(actual)
            np.testing.assert_array_equal(finite, np.isfinite(exact.astype(float)))
            error = abs(real(actual[finite]) - exact[finite]) if finite.any() else np.zeros(0)
            assert (error <= dense[name].bound[finite]).all(), name


# --- literal tables -------------------------------------------------------------------------------


def two_heads() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(q, k, v, mask): one query that sees key 0, and one that sees nothing."""
    q, k = np.ones((1, 1, 2, 1)), np.ones((1, 1, 2, 1))
    v = np.array([3.0, 5.0]).reshape(1, 1, 2, 1)
    return q, k, v, np.array([[1, 0], [0, 0]])


@pytest.mark.parametrize(("empty_row", "value"), [("zero", 0.0), ("nan", math.nan), ("uniform", 4)])
@pytest.mark.parametrize("empty_lse", [-math.inf, 0.0, math.inf])
def test_a2_a_row_without_a_key_has_the_declared_out_and_lse(empty_row, value, empty_lse):
    out, lse = attend(*two_heads(), empty_row=empty_row, empty_lse=empty_lse)
    np.testing.assert_array_equal(out[0, 0, :, 0], [3.0, value])
    np.testing.assert_array_equal(lse[0, 0], [1.0, empty_lse])


@pytest.mark.parametrize("empty_row", ["zero", "nan", "uniform"])
@pytest.mark.parametrize("d_lse", [7.0, math.inf, math.nan])
def test_a2_a_row_without_a_key_has_gradients_of_exactly_zero(empty_row, d_lse):
    """But for "uniform", where out is the mean of v over both columns: dv gets half of d_out."""
    q, k, v, mask = two_heads()
    d_out = np.array([0.0, 6.0]).reshape(1, 1, 2, 1)
    gradients = attend_vjp(
        q, k, v, mask, d_out, np.array([0.0, d_lse])[None, None], empty_row=empty_row
    )
    dq, dk, dv = (gradient.ravel().tolist() for gradient in gradients)
    assert (dq, dk) == ([0, 0], [0, 0])
    assert dv == ([3, 3] if empty_row == "uniform" else [0, 0])


def test_a2_a_row_over_no_columns_at_all_is_zero_even_as_a_uniform_mean():
    q, none = np.ones((1, 1, 1, 2)), np.ones((1, 1, 0, 2))
    out, lse = attend(q, none, none, np.zeros((1, 0), int), empty_row="uniform")
    assert (out.tolist(), lse.tolist()) == ([[[[0, 0]]]], [[[-math.inf]]])
    dq, dk, dv = attend_vjp(q, none, none, np.zeros((1, 0), int), q, empty_row="uniform")
    assert not dq.any() and dk.shape == dv.shape == none.shape


@given(arrays=attentions(), canary=st.sampled_from([math.nan, math.inf, -math.inf, 1e308]))
@settings(deadline=None, max_examples=60)
def test_a5_an_invisible_key_has_no_influence_on_any_bit_and_zero_gradients(arrays, canary):
    """A key that no row sees, in the same place of the same buffers."""
    q, k, v, mask, d_out, d_lse, scale = arrays
    batch, kv_heads, columns, _ = k.shape
    rows = q.shape[1] // kv_heads * q.shape[2]
    unseen = (mask.reshape(batch, kv_heads, rows, columns) == 0).all(axis=2)
    k2, v2 = k.copy(), v.copy()
    k2[unseen], v2[unseen] = canary, canary
    for before, after in (
        (attend(q, k, v, mask, scale=scale), attend(q, k2, v2, mask, scale=scale)),
        (
            attend_vjp(q, k, v, mask, d_out, d_lse, scale=scale),
            attend_vjp(q, k2, v2, mask, d_out, d_lse, scale=scale),
        ),
    ):
        for one, two in zip(before, after):
            np.testing.assert_array_equal(one, two)
    _, dk, dv = attend_vjp(q, k2, v2, mask, d_out, d_lse, scale=scale)
    assert not dk[unseen].any() and not dv[unseen].any()


def test_a3_a_window_longer_than_the_row_changes_nothing():
    generator = np.random.default_rng(3)
    q, k, v = (generator.standard_normal((2, 2, 5, 4)) for _ in range(3))
    window = sliding_mask(5, 5, Sizes(sliding_window_size=9))
    long, full = attend(q, k, v, window), attend(q, k, v, np.tri(5, dtype=bool))
    np.testing.assert_array_equal(long.out, full.out)
    np.testing.assert_array_equal(long.lse, full.lse)


# --- errors ---------------------------------------------------------------------------------------

Q, KEYS, MASK = np.ones((1, 4, 2, 3)), np.ones((1, 2, 5, 3)), np.ones((2, 5), dtype=int)
GOOD = {"q": Q, "k": KEYS, "v": KEYS, "mask": MASK}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("q has shape (4, 2, 3); it must be (batch, q_heads, q_len, head_dim)", {"q": Q[0]}),
        ("k has shape (1, 2, 5, 2); it must be (1, kv_heads, columns, 3)", {"k": KEYS[..., :2]}),
        ("v has shape (1, 2, 4, 3); it must be (1, 2, 5, value_dim)", {"v": KEYS[:, :, :4]}),
        ("q_heads (axis 1 of q)=3 must be a positive multiple of kv_heads", {"q": Q[:, :3]}),
        ("kv_heads (axis 1 of k)=0 must be at least 1", {"k": KEYS[:, :0], "v": KEYS[:, :0]}),
        (
            "mask has shape (2, 4); it must broadcast to (batch=1, q_heads=4, ",
            {"mask": MASK[:, :4]},
        ),
        ("mask holds the multiplicity -1; multiplicities must be at least 0", {"mask": MASK - 2}),
        ("empty_row='skip' must be one of 'zero', 'nan', 'uniform'", {"empty_row": "skip"}),
        ("empty_lse=1.0 must be one of -inf, 0.0, inf", {"empty_lse": 1.0}),
        ("scale=nan must be a finite number. Try 0.57", {"scale": math.nan}),
    ],
)
def test_attention_refuses_what_does_not_fit_and_says_what_would(message, change):
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(**(GOOD | change))


def test_attention_refuses_what_holds_no_numbers_or_no_multiplicities():
    with pytest.raises(TypeError, match="q has dtype <U1; it must hold real or complex numbers"):
        attend(**GOOD | {"q": np.full(Q.shape, "x")})
    with pytest.raises(TypeError, match="mask has dtype float64; it must be integer or bool"):
        attend(**GOOD | {"mask": MASK * 1.0})


@pytest.mark.parametrize(
    ("message", "gradients"),
    [
        ("d_out has shape (1, 2, 2, 3); it must be (1, 4, 2, 3)", (Q[:, :2],)),
        ("d_lse has shape (1, 4, 2, 3); it must be (1, 4, 2)", (Q, Q)),
    ],
)
def test_gradients_that_do_not_fit_are_refused(message, gradients):
    with pytest.raises(ValueError, match=re.escape(message)):
        attend_vjp(Q, KEYS, KEYS, MASK, *gradients)
