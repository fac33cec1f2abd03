"""The oracle's compressed blocks (C1, C4): literal windows, a second definition, complex step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from complex_step import check_gradients
from nsa_ref import (
    Semantics,
    Sizes,
    compress_windows,
    num_compress_blocks,
    pool,
    pool_vjp,
    pool_weight_shapes,
)
from nsa_ref.sizes import COMPRESS_MAPS
from nsa_ref.testing import Case
from nsa_ref.testing.mutants.compression import CompressionMap
from refusals import NO_SEMANTICS, NO_SIZES, refusal_test
from small_cases import cases, reaches
from tables import strides

END = Semantics(compress_alignment="end")


def pooled(compress_map: str) -> st.SearchStrategy[Case]:
    """Cases of one map, with and without positions."""
    return cases("pool", compress_alignment=("start", "end")).map(
        lambda case: dataclasses.replace(case, compress_map=compress_map)
    )


def integers(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(x, weights), of which all sums are exact in float64."""
    x = case.array("x", case.batch, case.kv_heads, case.kv_len, case.head_dim)
    return np.rint(2 * x), {name: np.rint(5 * w) for name, w in case.pool_weights().items()}


# --- C1 -------------------------------------------------------------------------------------------


def test_c1_windows_that_start_at_their_stride():
    assert compress_windows(7, strides(4, 2)) == [(0, 4), (2, 6)]
    assert compress_windows(8, strides(4, 2)) == [(0, 4), (2, 6), (4, 8)]
    assert compress_windows(3, strides(4, 2)) == []
    assert compress_windows(7, strides(2, 3)) == [(0, 2), (3, 5)]


def test_c1_windows_that_end_at_their_stride_stick_out_to_the_left():
    assert compress_windows(7, strides(4, 2), END) == [(-2, 2), (0, 4), (2, 6)]
    assert compress_windows(1, strides(4, 2), END) == []
    assert compress_windows(7, strides(2, 3), END) == [(1, 3), (4, 6)]


# --- C4 -------------------------------------------------------------------------------------------


def test_c4_the_mean_of_an_end_window_counts_the_zeros_left_of_token_0():
    x = np.array([1.0, 2, 3, 4, 5]).reshape(1, 1, 5, 1)
    end = pool(x, {}, strides(4, 2), END)
    assert end.ravel().tolist() == [(0 + 0 + 1 + 2) / 4, (1 + 2 + 3 + 4) / 4]
    start = pool(x, {}, strides(4, 2))
    assert start.ravel().tolist() == [(1 + 2 + 3 + 4) / 4]


def test_c4_positions_are_added_after_the_zeros():
    positions = {"positions": np.array([10.0, 20.0]).reshape(1, 2, 1)}
    out = pool(np.ones((1, 1, 1, 1)), positions, strides(2, 1, compress_positions=True), END)
    assert out.ravel().tolist() == [(0 + 10 + 1 + 20) / 2]


def test_c4_a_linear_map_reads_the_window_token_by_token():
    """weight of shape (dim, l dim) on the flat (token, dim): tokens (1, 2) and (3, 4)."""
    x = np.array([[1.0, 2.0], [3.0, 4.0]])[None, None]
    weights = {"weight": np.array([[1.0, 10, 100, 1000], [0, 0, 0, 1]]), "bias": np.array([0.5, 0])}
    out = pool(x, weights, strides(2, 2, compress_map="linear"))
    assert out.tolist() == [[[[4321.5, 4.0]]]]


def test_c4_an_mlp_has_its_relu_between_its_two_layers_and_no_gradient_at_0():
    x = np.array([2.0, -3.0, 0.0]).reshape(1, 1, 3, 1)
    weights = {
        "weight_in": np.eye(3),
        "bias_in": np.zeros(3),
        "weight_out": np.array([[10.0, 100.0, 1000.0]]),
        "bias_out": np.array([-50.0]),
    }
    sizes = strides(3, 3, compress_map="mlp")
    for tokens in (x, x + np.array([0, 1j, 1j]).reshape(x.shape)):  # closed at an imaginary step
        assert pool(tokens, weights, sizes).item() == -30.0  # 10 * 2 - 50
        dx, dweights = pool_vjp(tokens, weights, np.ones((1, 1, 1, 1)), sizes)
        assert dx.ravel().tolist() == [10.0, 0.0, 0.0]
        assert dweights["weight_out"].tolist() == [[2.0, 0.0, 0.0]]


@pytest.mark.parametrize("compress_map", COMPRESS_MAPS)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_c4_pool_and_its_gradients_are_those_of_the_second_definition_to_the_last_bit(
    compress_map, data
):
    """Every sum is exact, and the mean has the one rounding of its division; d_out is a multiple
    of l, so that gradients are integers."""
    case = data.draw(pooled(compress_map))
    (x, weights), how = integers(case), case.geometry
    expected = CompressionMap().pool(case, x, weights)
    np.testing.assert_array_equal(pool(x, weights, **how), expected)
    d_out = case.compress_block_size * np.rint(2 * case.array("d_out", *expected.shape))
    expected, of_weights = CompressionMap().pool_vjp(case, x, weights, d_out)
    dx, dweights = pool_vjp(x, weights, d_out, **how)
    np.testing.assert_array_equal(dx, expected)
    assert set(dweights) == set(of_weights)
    for name, gradient in dweights.items():
        np.testing.assert_array_equal(gradient, of_weights[name])


@pytest.mark.parametrize("compress_map", COMPRESS_MAPS)
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_c4_every_gradient_is_the_complex_step_to_1e_12(compress_map, data):
    """Every token and every weight of every map; 1e-12 relative to the largest sum of |terms|.

    That sum is the gradient of the same map with every number replaced by its magnitude, which
    keeps every ReLU open.
    """
    case = data.draw(pooled(compress_map))
    (x, weights), how = integers(case), case.geometry
    blocks = case.num_compress_blocks
    d_out = case.array("d_out", case.batch, case.kv_heads, blocks, case.head_dim)
    dx, dweights = pool_vjp(x, weights, d_out, **how)
    magnitudes = {name: abs(weight) for name, weight in weights.items()}
    of_x, terms = pool_vjp(abs(x), magnitudes, abs(d_out), **how)

    def loss(x, **weights):
        return (pool(x, weights, **how) * d_out).sum()

    bounds = {name: 1e-12 * sums.max(initial=0) for name, sums in ({"x": of_x} | terms).items()}
    check_gradients(loss, {"x": x} | weights, {"x": dx} | dweights, bounds)


@pytest.mark.parametrize("complex_one", ["x", "weight", "d_out"])
def test_c4_complex_numbers_pass_through_gradients_from_every_argument(complex_one):
    turn = {complex_one: 1j}
    x = turn.get("x", 1) * np.array([2.0, 3.0])
    weight = turn.get("weight", 1) * np.array([[5.0, 7.0]])
    d_out = turn.get("d_out", 1) * np.array([4.0])
    weights, sizes = {"weight": weight, "bias": np.ones(1)}, strides(2, 2, compress_map="linear")
    dx, dweights = pool_vjp(x.reshape(1, 1, 2, 1), weights, d_out.reshape(1, 1, 1, 1), sizes)
    np.testing.assert_array_equal(dx.ravel(), d_out * weight[0])
    np.testing.assert_array_equal(dweights["weight"], [d_out * x])
    np.testing.assert_array_equal(dweights["bias"], d_out)


def blocks_apart(case: Case) -> int:
    """Tokens between two windows; negative where they overlap."""
    return case.compress_block_sliding_stride - case.compress_block_size


CORNERS = {
    "positions of two heads": lambda case: (
        case.compress_positions and case.kv_heads == 2 and case.num_compress_blocks
    ),
    "two heads without": lambda case: (
        not case.compress_positions and case.kv_heads == 2 and case.num_compress_blocks
    ),
    "sticks out": lambda case: (
        case.semantics == END and blocks_apart(case) < 0 < case.num_compress_blocks
    ),
    "gaps": lambda case: blocks_apart(case) > 0 and case.num_compress_blocks,
}
EDGES = "l no multiple of d", "kv_len < l", "batch 0", "G = 2"


@pytest.mark.parametrize("compress_map", COMPRESS_MAPS)
@pytest.mark.parametrize("corner", [*CORNERS.values(), *EDGES], ids=[*CORNERS, *EDGES])
def test_pooled_cases_reach_the_corner(compress_map, corner):
    reaches(pooled(compress_map), corner, within=300)


def test_c4_the_weights_of_each_map_have_the_listed_names_and_shapes():
    def shapes(compress_map: str, positions: bool) -> dict[str, tuple[int, ...]]:
        two_heads = {"q_heads": 2, "kv_heads": 2, "compress_block_size": 4}
        sizes = Sizes(compress_map=compress_map, compress_positions=positions, **two_heads)
        return pool_weight_shapes(sizes, 3)

    assert shapes("mean", False) == {}
    assert shapes("mean", True) == {"positions": (2, 4, 3)}
    assert shapes("linear", False) == {"weight": (3, 12), "bias": (3,)}
    for compress_map in ("linear", "linear_per_head"):
        positions = {"positions": (2, 4, 3)}
        assert shapes(compress_map, True) == positions | shapes(compress_map, False)
    assert shapes("linear_per_head", False) == {"weight": (2, 3, 12), "bias": (2, 3)}
    assert shapes("mlp", True) == {
        "positions": (2, 4, 3),
        "weight_in": (12, 12),
        "bias_in": (12,),
        "weight_out": (3, 12),
        "bias_out": (3,),
    }


# --- errors ---------------------------------------------------------------------------------------

X = np.ones((1, 2, 4, 3))
WEIGHT, BIAS = np.ones((3, 6)), np.ones(3)
LINEAR = {"weight": WEIGHT, "bias": BIAS}
SIZES = strides(2, 2, q_heads=2, kv_heads=2, compress_map="linear")
PER_HEAD = dataclasses.replace(SIZES, compress_map="linear_per_head")

test_compression_refuses_what_does_not_fit_and_says_what_would = refusal_test(
    {
        "x has shape (2, 4, 3); it must be (batch, 2, kv_len, dim)": (
            lambda: pool(X[0], LINEAR, SIZES)
        ),
        "weights['weight'] has shape (3, 6); it must be (2, 3, 6)": (
            lambda: pool(X, LINEAR, PER_HEAD)
        ),
        "weights lacks ['bias'] and has the unknown names []; it must have ['bias', 'weight']": (
            lambda: pool(X, {"weight": WEIGHT}, SIZES)
        ),
        "weights lacks [] and has the unknown names ['positions']; "
        "it must have ['bias', 'weight']": (
            lambda: pool(X, LINEAR | {"positions": np.ones((2, 2, 3))}, SIZES)
        ),
        "weights['bias'] has shape (4,); it must be (3)": (
            lambda: pool(X, LINEAR | {"bias": np.ones(4)}, SIZES)
        ),
        "d_out has shape (1, 2, 3, 3); it must be (1, 2, 2, 3)": (
            lambda: pool_vjp(X, LINEAR, np.ones((1, 2, 3, 3)), SIZES)
        ),
        "kv_len=-1 must be at least 0": lambda: num_compress_blocks(-1, SIZES),
        "dim=0 must be at least 1": lambda: pool_weight_shapes(SIZES, 0),
    },
    {
        f"semantics='end' {NO_SEMANTICS}, not str": lambda: num_compress_blocks(1, SIZES, "end"),
        f"sizes=None {NO_SIZES}, not NoneType": lambda: num_compress_blocks(1, None),
        f"sizes=1 {NO_SIZES}, not int": lambda: pool_weight_shapes(1, 1),
        f"sizes='' {NO_SIZES}, not str": lambda: pool(X, LINEAR, ""),
    },
    whole=True,
)
