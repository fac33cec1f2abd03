"""The oracle's attention and its gradients (clauses A): einsum, complex step, mpmath, rationals."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from complex_step import check_gradients
from dense_definitions import Dense, U, dense_attention
from nsa_ref import attend, attend_vjp
from refusals import refusal_test


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
    expected, bound, _ = dense
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


@given(arrays=attentions(peak=2000.0), empty_row=st.sampled_from(["zero", "nan", "uniform"]))
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
    some = settings(database=None, max_examples=2000)
    find(attentions(), lambda arrays: bool(corner(arrays)), settings=some)


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
    inputs, (mask, d_out, d_lse, scale) = dict(zip("qkv", arrays)), arrays[3:]
    gradients = attend_vjp(*arrays[:6], scale=scale, empty_row=empty_row)
    dense = dense_attention(*arrays[:6], scale=scale, empty_row=empty_row)
    seen = ~empty_rows(mask)
    # NaN has no derivative, and A2 says that its gradient is 0
    counted = np.broadcast_to(seen if empty_row == "nan" else True, seen.shape)

    def loss(q, k, v):
        out, lse = attend(q, k, v, mask, scale=scale, empty_row=empty_row)
        return (d_out[counted] * out[counted]).sum() + (d_lse[seen] * lse[seen]).sum()

    bounds = {name: 1e-12 * dense[f"d{name}"].terms.max(initial=0) for name in inputs}
    check_gradients(loss, inputs, dict(zip(inputs, gradients)), bounds)


@pytest.mark.parametrize("complex_one", ["q", "k", "v", "d_out", "d_lse"])
def test_complex_numbers_pass_through_from_every_argument(complex_one):
    """Two keys of equal logits, P = 1/2 each; logits of 0 do not see which of q and k is complex.

    ::

        dP_j = 3 v_j      D = 3 (v_0 + v_1) / 2      dS_j = (3 v_j - D + dlse) / 2
    """
    turn = {complex_one: 1j}
    v, dO = turn.get("v", 1) * np.array([2.0, 4.0]), turn.get("d_out", 1) * 3.0
    dlse = turn.get("d_lse", 1) * 8.0
    k = turn.get("k", 1) * np.array([1.0, 5.0])
    q = turn.get("q", 1) * np.zeros((1, 1, 1, 1))
    arguments = q, k.reshape(1, 1, 2, 1), v.reshape(1, 1, 2, 1), np.ones((1, 2), int)
    out, lse = attend(*arguments, scale=1.0)
    assert out.item() == (v[0] + v[1]) / 2
    assert abs(lse.item() - math.log(2)) <= 4 * U
    dq, dk, dv = attend_vjp(*arguments, np.full(q.shape, dO), np.full((1, 1, 1), dlse), scale=1.0)
    dS = (dO * v - dO * out.item() + dlse) / 2
    assert dq.item() == dS @ k
    assert dk.ravel().tolist() == [0, 0]
    assert dv.ravel().tolist() == [dO / 2, dO / 2]


# --- mpmath ---------------------------------------------------------------------------------------


@given(arrays=attentions(most=3, peak=2000.0))
@settings(deadline=None, max_examples=100)
def test_a1_a3_fifty_digits_agree_up_to_huge_logits(arrays):
    """The equations of A1 and A3 in mpmath, with no maximum subtracted: logits beyond exp's range.

    The bound is that of any float64 attention; the error of the definition is in it.
    """
    q, k, v, mask, d_out, d_lse, scale = arrays
    out, lse = attend(q, k, v, mask, scale=scale)
    dq, dk, dv = attend_vjp(*arrays[:6], scale=scale)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    dense = dense_attention(*arrays[:6], scale=scale)
    group = q.shape[1] // k.shape[1]
    real = np.vectorize(mpmath.mpf, otypes=[object])
    with mpmath.workdps(50):
        exact = {name: real(np.zeros(array.shape)) for name, array in found.items()}
        for b, h, t in np.ndindex(lse.shape):
            seen = np.flatnonzero(mask[b, h, t])
            if not seen.size:
                exact["lse"][b, h, t] = -mpmath.inf
                continue
            query, arriving = real(q[b, h, t]), real(d_out[b, h, t])
            keys, values = (real(x[b, h // group, seen]) for x in (k, v))
            s = mpmath.mpf(scale) * (keys @ query)
            weight = np.array([int(mask[b, h, t, j]) * mpmath.exp(x) for j, x in zip(seen, s)])
            total = mpmath.fsum(weight)
            p, dp = weight / total, np.array([mpmath.fdot(row, arriving) for row in values])
            ds = scale * p * (dp - p @ dp + d_lse[b, h, t])
            exact["out"][b, h, t], exact["lse"][b, h, t] = p @ values, mpmath.log(total)
            exact["dq"][b, h, t] = ds @ keys
            exact["dk"][b, h // group, seen] += np.outer(ds, query)
            exact["dv"][b, h // group, seen] += np.outer(p, arriving)
        for name, array in found.items():
            error = abs(real(array) - exact[name])
            assert ((array == exact[name]) | (error <= dense[name].bound)).all(), name


# --- exact rationals ------------------------------------------------------------------------------


@given(columns=st.integers(1, 6), dim=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_a1_a3_equal_logits_give_the_exact_rational_means(columns, dim, seed):
    """q = 0: P_j = mult_j / total, and everything but lse is a fraction.

    P has one rounding, a sum of `columns` products at most columns + 1 more, dS three more sums
    of that kind: 4 (columns + 4) u times the sum of |terms| holds them all.
    """
    generator = np.random.default_rng(seed)
    k, v = (generator.integers(-4, 5, (1, 1, columns, dim)).astype(float) for _ in range(2))
    mask = generator.permutation([*generator.integers(0, 4, columns - 1), 2])
    d_out, d_lse = generator.integers(-4, 5, (1, 1, 1, dim)), generator.integers(-4, 5, (1, 1, 1))
    arguments = np.zeros((1, 1, 1, dim)), k, v, mask
    out, lse = attend(*arguments, scale=1.0)
    dq, dk, dv = attend_vjp(*arguments, d_out.astype(float), d_lse.astype(float), scale=1.0)

    fraction = np.vectorize(Fraction, otypes=[object])
    total = int(mask.sum())
    P, V, K, dO = (fraction(x) for x in (mask / 1.0, v[0, 0], k[0, 0], d_out[0, 0, 0] / 1.0))
    P, dL = P / total, int(d_lse.item())
    dP, sizes = V @ dO, abs(V) @ abs(dO)
    dS, M = P * (dP - P @ dP + dL), P * (sizes + P @ sizes + abs(dL))
    expected = [(out, P @ V, P @ abs(V)), (dq, dS @ K, M @ abs(K)), (dk, 0 * K, 0 * K)]
    expected.append((dv, np.outer(P, dO), abs(np.outer(P, dO))))
    unit = Fraction(4 * (columns + 4), 2**53)
    for actual, exact, terms in expected:
        assert (abs(fraction(actual[0, 0]) - exact) <= unit * terms).all()
    # log of an exact integer: the logarithm's own rounding, at most 2 units in the last place
    assert abs(lse.item() - math.log(total)) <= 4 * U * math.log(total)


# --- literal tables -------------------------------------------------------------------------------


def test_a3_two_heads_over_two_keys_by_hand():
    """Weights 1/4, 3/4 and 1/2, 1/2.

    ::

        head  q  s        P           out  D  dS             lse
        0     1  0, ln 3  1/4, 3/4    3    3  -3/4, 3/4      ln 4
        1     0  0, 0     1/2, 1/2    2    2  -1,   1        ln 2
    """
    ln3 = math.log(3)
    q = np.array([1.0, 0.0]).reshape(1, 2, 1, 1)
    k, v = (np.array(x).reshape(1, 1, 2, 1) for x in ([0.0, ln3], [0.0, 4.0]))
    mask = np.ones((1, 2), int)
    found = attend(q, k, v, mask, scale=1.0)
    gradients = attend_vjp(q, k, v, mask, np.ones_like(q), scale=1.0)
    table = [3, 2], [math.log(4), math.log(2)], [0.75 * ln3, ln3], [-0.75, 0.75], [0.75, 1.25]
    for array, expected in zip((*found, *gradients), table):
        # exp(ln 3) is 3 but for a few roundings, and nothing here is larger than 4
        assert np.abs(array.ravel() - expected).max() <= 16 * 4 * U


def test_a1_halves_and_quarters_are_exact_to_the_last_bit():
    v = np.array([1.0, 2.0, 8.0, 1e300]).reshape(1, 1, 4, 1)
    zeros = np.zeros((1, 1, 4, 1))
    mask = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [2, 1, 1, 0], [0, 3, 1, 0]])
    out = attend(zeros, zeros, v, mask).out[0, 0, :, 0]
    assert out.tolist() == [1.0, 1.5, 3.0, 3.5]


def test_a1_a3_heads_of_a_group_have_maxima_of_their_own():
    """The logits of one are 3000 below those of the other, where exp would be 0."""
    q = np.array([1000.0, -1000.0]).reshape(1, 2, 1, 1)
    k, v = (np.array(numbers).reshape(1, 1, 2, 1) for numbers in ([1.0, 2.0], [3.0, 5.0]))
    mask, d_out = np.ones((1, 1), dtype=bool), np.array([1.0, 7.0]).reshape(1, 2, 1, 1)
    out, lse = attend(q, k, v, mask, scale=1.0)
    assert out.ravel().tolist() == [5.0, 3.0] and lse.ravel().tolist() == [2000.0, -1000.0]
    dq, dk, dv = attend_vjp(q, k, v, mask, d_out, scale=1.0)
    assert not dq.any() and not dk.any() and dv.ravel().tolist() == [7.0, 1.0]


@pytest.mark.parametrize("empty_row", ["zero", "nan", "uniform"])
@pytest.mark.parametrize("d_lse", [7.0, math.inf, math.nan])
def test_a2_a_row_without_a_key_has_gradients_of_exactly_zero(empty_row, d_lse):
    """But for "uniform", where out is the mean of v over both columns: dv gets half of d_out."""
    x, d_out = np.ones((1, 1, 2, 1)), np.array([0.0, 6.0]).reshape(1, 1, 2, 1)
    mask = np.array([[1, 0], [0, 0]])
    d_lse = np.array([[[0.0, d_lse]]])
    gradients = attend_vjp(x, x, x, mask, d_out, d_lse, empty_row=empty_row)
    dq, dk, dv = (gradient.ravel().tolist() for gradient in gradients)
    assert (dq, dk) == ([0, 0], [0, 0])
    assert dv == ([3, 3] if empty_row == "uniform" else [0, 0])


def test_a2_a_row_over_no_columns_at_all_is_zero_even_as_a_uniform_mean():
    q, none = np.ones((1, 1, 1, 2)), np.ones((1, 1, 0, 2))
    out, lse = attend(q, none, none, np.zeros((1, 0), int), empty_row="uniform")
    assert (out.tolist(), lse.tolist()) == ([[[[0, 0]]]], [[[-math.inf]]])
    with np.errstate(all="raise"):  # nothing is divided by no columns
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

    def everything(k, v):
        gradients = attend_vjp(q, k, v, mask, d_out, d_lse, scale=scale)
        return *attend(q, k, v, mask, scale=scale), *gradients

    found = everything(k2, v2)
    for one, two in zip(everything(k, v), found):
        np.testing.assert_array_equal(one, two)
    *_, dk, dv = found
    assert not dk[unseen].any() and not dv[unseen].any()


# --- errors ---------------------------------------------------------------------------------------

Q, KEYS, MASK = np.ones((1, 4, 2, 3)), np.ones((1, 2, 5, 3)), np.ones((2, 5), dtype=int)


def refused(call=attend, **change):
    return lambda: call(**{"q": Q, "k": KEYS, "v": KEYS, "mask": MASK} | change)


test_attention_refuses_what_does_not_fit_and_says_what_would = refusal_test(
    {
        "q has shape (4, 2, 3); it must be (batch, q_heads, q_len, head_dim)": refused(q=Q[0]),
        "k has shape (1, 2, 5, 2); it must be (1, kv_heads, columns, 3)": refused(k=KEYS[..., 1:]),
        "v has shape (1, 2, 4, 3); it must be (1, 2, 5, value_dim)": refused(v=KEYS[:, :, 1:]),
        "q_heads (axis 1 of q)=3 must be a positive multiple of kv_heads (axis 1 of k)=2: "
        "query head h reads kv head h // (q_heads // kv_heads). Try 2 or 4": refused(q=Q[:, :3]),
        "kv_heads (axis 1 of k)=0 must be at least 1": refused(k=KEYS[:, :0], v=KEYS[:, :0]),
        "head_dim (axis 3 of q)=0 must be at least 1": refused(q=Q[..., :0], k=KEYS[..., :0]),
        "mask has shape (4,); it must broadcast to (batch=1, q_heads=4, q_len=2, columns=5)": (
            refused(mask=MASK[0, :4])
        ),
        "mask holds the multiplicity -1; multiplicities must be at least 0": refused(mask=MASK - 2),
        "empty_row='skip' must be one of 'zero', 'nan', 'uniform'": refused(empty_row="skip"),
        "empty_lse=1.0 must be one of -inf, 0.0, inf": refused(empty_lse=1.0),
        f"scale=nan must be a finite number. Try {3**-0.5}": refused(scale=math.nan),
        "empty_row=0 must be one of 'zero', 'nan', 'uniform'": (
            refused(attend_vjp, d_out=Q, empty_row=0)
        ),
        "d_out has shape (1, 2, 2, 3); it must be (1, 4, 2, 3)": (
            refused(attend_vjp, d_out=Q[:, :2])
        ),
        "d_lse has shape (1, 4, 2, 3); it must be (1, 4, 2)": refused(attend_vjp, d_out=Q, d_lse=Q),
    },
    {
        "q has dtype <U1; it must hold real or complex numbers": refused(q=np.full(Q.shape, "x")),
        "mask has dtype float64; it must be integer or bool: how often each key counts": (
            refused(mask=MASK * 1.0)
        ),
    },
    whole=True,
)
