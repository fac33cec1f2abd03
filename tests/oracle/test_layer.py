"""The oracle's layer (G1 to G4): literal rows, complex step, decoding, packed sequences.

That it is the layer at all, a second definition says: `LayerInSteps`, here and before the judge.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from complex_step import check_gradients
from nsa_ref import (
    FLA,
    LUCIDRAINS,
    LUCIDRAINS_FLEX,
    PAPER,
    PRESETS,
    XUNHAO,
    Semantics,
    Sizes,
    decode,
    layer,
    layer_block_indices,
    layer_vjp,
    layer_weight_shapes,
    varlen,
    varlen_vjp,
)
from nsa_ref.layer import rotate, selection_inputs
from nsa_ref.layer_bounds import layer_bounds
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.mutants.layer import LayerInSteps
from nsa_ref.testing.properties.catalogue import PROPERTIES
from refusals import NO_SEMANTICS, NO_SIZES, refusal_test

ONE = Sizes(model_dim=2, head_dim=2, value_dim=2, num_local_blocks=1)


def zeros(sizes: Sizes, semantics: Semantics) -> dict[str, np.ndarray]:
    return {n: np.zeros(shape) for n, shape in layer_weight_shapes(sizes, semantics).items()}


#: What the judge asks about the layer.
CASES = PROPERTIES["G1_layer_output"].strata(OracleImplementation(), ["float64"])[0]


def of(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    return case.tokens(), case.layer_weights(), case.geometry


# --- G1 -------------------------------------------------------------------------------------------


def test_g1_every_branch_comes_through_its_own_gate():
    """With one key to see, every branch gives that key's value; the gates weigh them 1/2, 3/4, 0.

    sigmoid(0) = 1/2, sigmoid(log 3) = 3/4, sigmoid(-1e4) = 0.
    """
    weights = zeros(ONE, PAPER)
    for i, branch in enumerate(("compress", "fine", "sliding")):
        weights[f"to_v_{branch}.weight"] = 4.0 ** (i + 1) * np.eye(2)
    weights["gates.bias"] = np.array([0, math.log(3), -1e4])
    x = np.array([[[1.0, 2.0], [3.0, 5.0]]])
    own = layer(x[:, :1], weights, sizes=ONE)
    np.testing.assert_array_equal(own, [[[4 / 2 + 12, 8 / 2 + 24]]])
    # the compressed branch sees both tokens, fine and sliding their own
    both = layer(x, weights, sizes=ONE)[0, 1]
    np.testing.assert_array_equal(both, [4 * 2 / 2 + 16 * 3 * 3 / 4, 4 * 3.5 / 2 + 16 * 5 * 3 / 4])


def test_g1_gates_go_branch_by_branch_and_heads_stand_together():
    sizes = dataclasses.replace(ONE, q_heads=2, value_dim=1)
    weights = zeros(sizes, PAPER)
    for branch in ("compress", "fine", "sliding"):
        weights[f"to_v_{branch}.weight"] = np.array([[1.0, 0]])
    weights["gates.bias"] = np.array([-1e4, 1e4, -1e4, -1e4, 1e4, 1e4])
    out = layer(np.array([[[1.0, 0]]]), weights, sizes=sizes)
    assert out.tolist() == [[[1.0, 2.0]]]  # head 0: sliding; head 1: compress and sliding


@pytest.mark.parametrize(
    ("input_norm", "unit", "n"), [(True, 2.0**-12, 27), ("machine_eps", 2.0**-26, 26)]
)
def test_g1_input_norm_divides_by_the_root_mean_square_and_a_little(input_norm, unit, n):
    """x = (1, 7) units, so the mean square is 25 square units; epsilon, 2^-23 or 2^-52, is 2 or 1.

    ::

        r = 1 / (sqrt(n) unit)        x r = (1, 7) / sqrt(n)        times (2, 1)
        d_out = (1, 0): arriving at the norm (2, 0), whose mean with x is 1 unit
        dx = r ((2, 0) - (1, 7) / n)
    """
    semantics = dataclasses.replace(PAPER, input_norm=input_norm)
    weights = zeros(ONE, semantics)
    weights["norm.weight"] = np.array([2.0, 1.0])
    weights["to_v_sliding.weight"] = np.eye(2)
    weights["gates.bias"] = np.array([-1e4, -1e4, 1e4])
    how = {"sizes": ONE, "semantics": semantics}
    x = unit * np.array([[[1.0, 7.0]]])
    out = layer(x, weights, **how)
    np.testing.assert_array_equal(out, [[[2 * (1 / math.sqrt(n)), 7 / math.sqrt(n)]]])
    dx, dweights = layer_vjp(x, weights, np.array([[[1.0, 0.0]]]), **how)
    for found, expected in (
        (dx[0, 0], np.array([2 - 1 / n, -7 / n]) / (math.sqrt(n) * unit)),
        (dweights["norm.weight"], np.array([1 / math.sqrt(n), 0])),
    ):
        # a dozen operations, of which the largest term is twice the result at most
        assert (abs(found - expected) <= 24 * np.spacing(abs(expected).max())).all()


@settings(deadline=None, max_examples=10, derandomize=True, database=None)
@given(case=CASES)
def test_g1_every_gradient_is_the_complex_step(case):
    check_layer_gradients(case)


def check_layer_gradients(case):
    """x and every weight, within the bound of two float64 computations.

    The step's derivative is the sum of the same products in another order. The choice of blocks is
    held: a step cannot see through it (A4). Three elements of each tensor, its ends among them.
    """
    x, weights, how = of(case)
    chosen = layer_block_indices(x, weights, **how)
    d_out = case.array("d_out", case.batch, case.kv_len, case.layer_width)
    dx, dweights = layer_vjp(x, weights, d_out, **how)
    bounds = layer_bounds(x, weights, chosen, d_out, numerics="fp64", **how)

    def loss(x, **weights):
        return (layer(x, weights, block_indices=chosen, **how) * d_out).sum()

    allowed = {"x": bounds.dx} | bounds.dweights
    check_gradients(loss, {"x": x} | weights, {"x": dx} | dweights, allowed, few=True)


#: The presets, the layers of two projects whose operators they are, and all that is turned.
LAYERS = {name: (semantics, "mlp") for name, semantics in PRESETS.items()} | {
    "FLA, its layer": (dataclasses.replace(FLA, rotary="before_pooling"), "mean"),
    "XUNHAO, its layer": (XUNHAO, "linear_per_head"),
    "pooled once turned": (dataclasses.replace(PAPER, rotary="before_pooling"), "linear_per_head"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_preset_has_a_layer_and_its_gradients(name):
    """One small layer of each, also step by step; no gradient is zero throughout, all are the
    complex step's."""
    semantics, compress_map = LAYERS[name]
    case = Case(
        semantics=semantics,
        batch=2,
        q_heads=4,
        kv_heads=2,
        q_len=9,
        kv_len=9,
        head_dim=4,
        value_dim=3,
        model_dim=6,
        compress_block_size=4,
        compress_block_sliding_stride=2,
        compress_map=compress_map,
        compress_positions=True,
        selection_block_size=2,
        num_selected_blocks=2,
        num_local_blocks=1,
        sliding_window_size=3,
        num_mem_kv=1,
    )
    x, weights, how = of(case)
    out, chosen = layer(x, weights, **how), layer_block_indices(x, weights, **how)
    assert out.shape == (2, 9, 6 if semantics.output_projection else 12)
    bound = layer_bounds(x, weights, chosen, numerics="fp64", **how).out
    second = LayerInSteps().run("layer_with_blocks", case, weights, x, chosen)
    assert (abs(out - second) <= bound).all()
    dx, dweights = layer_vjp(x, weights, np.ones(out.shape), **how)
    assert np.isfinite(out).all() and dx.any()
    for weight in weights:
        assert dweights[weight].any(), weight
    check_layer_gradients(case)


@pytest.mark.parametrize("complex_one", ["x", "to_v_fine.weight", "d_out"])
def test_a4_gradients_go_to_the_blocks_that_are_given_and_complex_numbers_through(complex_one):
    """Every row reads token 0, through the fine branch alone; its gate is 1, with a slope of 0."""
    turn = {complex_one: 1j}
    x = turn.get("x", 1) * np.array([[[1.0, 2.0], [3.0, 5.0], [-4.0, 7.0]]])
    d_out = turn.get("d_out", 1) * np.array([[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]])
    weights = zeros(ONE, PAPER)
    of_v = turn.get("to_v_fine.weight", 1) * np.array([[3.0, 0.0], [0.0, 1.0]])
    weights["to_v_fine.weight"] = of_v
    weights["gates.bias"] = np.array([-1e4, 1e4, -1e4])
    how = {"sizes": ONE, "block_indices": np.zeros((1, 1, 3, 1), int)}
    out = layer(x, weights, **how)
    np.testing.assert_array_equal(out[0], [x[0, 0] @ of_v] * 3)
    dx, dweights = layer_vjp(x, weights, d_out, **how)
    arriving = turn.get("d_out", 1) * np.array([7.0, 70.0])
    np.testing.assert_array_equal(dx[0], [arriving @ of_v, [0, 0], [0, 0]])
    assert not any(dw.any() for name, dw in dweights.items() if name != "to_v_fine.weight")
    np.testing.assert_array_equal(dweights["to_v_fine.weight"], np.outer(arriving, x[0, 0]))


# --- G2 -------------------------------------------------------------------------------------------


def test_g2_the_first_pair_turns_by_one_radian_a_token():
    turned = rotate(np.array([[1.0, 0, 1, 0], [1, 0, 1, 0]]), np.array([0, 3]))
    assert turned[0].tolist() == [1, 0, 1, 0]
    slow = 3 * 10000.0**-0.5
    assert turned[1].tolist() == [math.cos(3), math.sin(3), math.cos(slow), math.sin(slow)]


@given(shift=st.integers(0, 1000), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20, derandomize=True, database=None)
def test_g2_logits_depend_on_the_distance_alone(shift, seed):
    """To a float32 unit of the vectors' lengths: angles of some thousand radians lose 2^-41."""
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 8))
    near = rotate(q, np.array([5])) @ rotate(k, np.array([2])).T
    far = rotate(q, np.array([5 + shift])) @ rotate(k, np.array([2 + shift])).T
    assert abs(near - far) <= np.spacing(np.float32(np.abs(q).sum() * np.abs(k).max()))


def test_g2_keys_are_pooled_once_they_are_turned_or_turned_once_they_are_pooled():
    """Two tokens of one window, k = (1, 0) at 0 and (1, 0) turned by one radian at 1.

    "before_pooling": their mean, and q of row 1 is turned as well; "all": the mean of (1, 0) twice,
    turned by the window's first position, 0. Nothing is turned in "none", and memory never.
    """
    sizes = dataclasses.replace(ONE, model_dim=1, compress_block_size=2, num_mem_kv=1)
    x = np.ones((1, 2, 1))
    found = {}
    for rotary in ("none", "all", "before_pooling"):
        semantics = dataclasses.replace(FLA, rotary=rotary)
        weights = zeros(sizes, semantics)
        weights["to_q.weight"] = weights["to_k.weight"] = np.array([[1.0], [0.0]])
        weights["mem_k"] = np.array([[[5.0, 7.0]]])
        found[rotary] = selection_inputs(x, weights, sizes=sizes, semantics=semantics)
    q, k_cmp, _ = found["before_pooling"]
    turned = [math.cos(1), math.sin(1)]
    assert q[0, 0].tolist() == [[1, 0], turned]
    assert k_cmp[0, 0].tolist() == [[(1 + turned[0]) / 2, turned[1] / 2]]
    assert found["all"][0][0, 0].tolist() == [[1, 0], turned]
    assert found["all"][1][0, 0].tolist() == found["none"][1][0, 0].tolist() == [[1, 0]]
    assert all(mem_k.tolist() == [[[[5, 7]]]] for _, _, mem_k in found.values())


# --- G3, G4 ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(case=CASES.filter(lambda case: case.semantics.causal))
def test_g3_decoding_is_the_same_row_of_the_parallel_form(case):
    """Within the bound of two float64 computations; the same blocks are chosen, ties and all."""
    x, weights, how = of(case)
    chosen = layer_block_indices(x, weights, **how)
    bound = layer_bounds(x, weights, chosen, numerics="fp64", **how).out
    parallel = layer(x, weights, block_indices=chosen, **how)
    assert (abs(decode(x, weights, **how) - parallel) <= bound).all()


def test_g3_complex_numbers_pass_through_decoding():
    """Of x alone, and of one weight alone: the first row sees what a layer of one token sees."""
    x, weights, how = of(Case(semantics=LUCIDRAINS, q_len=3, kv_len=3, model_dim=4, head_dim=2))
    last = weights["to_out.weight"]
    for tokens, of_layer in (
        (x + 1j * x[:, ::-1], weights),
        (x, weights | {"to_out.weight": last + 1j}),
    ):
        found = decode(tokens, of_layer, **how)
        alone = layer(tokens[:, :1], of_layer, **how)
        assert found.imag.all()
        np.testing.assert_array_equal(found[:, :1], alone)


@pytest.mark.parametrize("semantics", [PAPER, LUCIDRAINS])
def test_g4_packed_sequences_and_their_gradients_are_each_by_itself_to_the_last_bit(semantics):
    """Those of the weights are summed in order; the second sequence has no tokens."""
    sizes = {"model_dim": 4, "head_dim": 2, "value_dim": 2, "sliding_window_size": 2}
    case = Case(semantics=semantics, q_len=7, kv_len=7, **sizes)
    x, weights, how = of(case)
    d_out, ends = case.array("d_out", 7, case.layer_width), np.array([0, 3, 3, 7])
    dx, dweights = varlen_vjp(x[0], weights, ends, d_out, **how)
    parts = [slice(0, 3), slice(3, 3), slice(3, 7)]
    rows = [layer(x[:, part], weights, **how)[0] for part in parts]
    of_x, of_weights = zip(*(layer_vjp(x[:, p], weights, d_out[None, p], **how) for p in parts))
    np.testing.assert_array_equal(varlen(x[0], weights, ends, **how), np.concatenate(rows))
    np.testing.assert_array_equal(dx[None], np.concatenate(of_x, axis=1))
    assert set(dweights) == set(weights)
    for name, gradient in dweights.items():
        np.testing.assert_array_equal(gradient, sum(one[name] for one in of_weights))


def test_g4_no_sequence_at_all_has_no_rows():
    x, weights, how = of(Case(model_dim=4, head_dim=2, value_dim=2))
    ends = np.array([0])
    assert varlen(x[0, :0], weights, ends, **how).shape == (0, 2)
    dx, dweights = varlen_vjp(x[0, :0], weights, ends, np.zeros((0, 2)), **how)
    assert dx.shape == (0, 4) and not any(gradient.any() for gradient in dweights.values())


# --- weights and errors ---------------------------------------------------------------------------


def test_the_weights_of_each_preset():
    shared = {"to_k.weight", "to_v.weight"}
    for semantics in (LUCIDRAINS, LUCIDRAINS_FLEX, FLA, XUNHAO):
        assert shared <= set(layer_weight_shapes(ONE, semantics))
    paper = layer_weight_shapes(ONE, PAPER)
    assert not shared & set(paper)
    assert paper["to_k_fine.weight"] == (2, 2)
    assert {"norm.weight", "to_out.weight"} <= set(layer_weight_shapes(ONE, LUCIDRAINS))
    assert not {"norm.weight", "to_out.weight"} & set(paper)


X, WEIGHTS = np.zeros((1, 7, 2)), zeros(ONE, PAPER)
NON_CAUSAL = dataclasses.replace(PAPER, causal=False)


#: One more than is shown, in one line.
LONG = [str(10**15 + i) for i in range(13)]
OFFSETS = "must start at 0, never decrease and end at the number of tokens, 7"


def packed(*offsets):
    return lambda: varlen(X[0], WEIGHTS, np.array(offsets), sizes=ONE)


test_a_layer_refuses_what_does_not_fit_and_says_what_would = refusal_test(
    {
        "weights lacks ['to_q.weight'] and has the unknown names []; it must have "
        "['gates.bias', 'gates.weight', 'mem_k', 'mem_v', 'to_k_compress.weight', "
        "'to_k_fine.weight', 'to_k_sliding.weight', 'to_q.weight', 'to_v_compress.weight', "
        "'to_v_fine.weight', 'to_v_sliding.weight']": (
            lambda: layer(X, {n: w for n, w in WEIGHTS.items() if n != "to_q.weight"}, sizes=ONE)
        ),
        "weights['mem_k'] has shape (2,); it must be (1, 0, 2)": (
            lambda: layer(X, WEIGHTS | {"mem_k": np.zeros(2)}, sizes=ONE)
        ),
        "x has shape (7, 2); it must be (batch, seq_len, 2)": (
            lambda: layer(X[0], WEIGHTS, sizes=ONE)
        ),
        "d_out has shape (7, 2); it must be (1, 7, 2)": (
            lambda: layer_vjp(X, WEIGHTS, X[0], sizes=ONE)
        ),
        "head_dim=3 must be even: rotary embedding turns pairs of features. Try 4": (
            lambda: rotate(np.zeros((1, 3)), np.zeros(1))
        ),
        "positions has shape (2,); it must be (1)": lambda: rotate(np.zeros((1, 4)), np.zeros(2)),
        "semantics.causal=False must be True to decode: a row would need later tokens": (
            lambda: decode(X, WEIGHTS, sizes=ONE, semantics=NON_CAUSAL)
        ),
        "x has shape (1, 7, 2); it must be (total tokens, 2)": (
            lambda: varlen(X, WEIGHTS, np.array([0, 7]), sizes=ONE)
        ),
        "x has shape (0, 7, 2); it must be (total tokens, 2)": (
            lambda: varlen_vjp(X[:0], WEIGHTS, np.array([0, 7]), X[0], sizes=ONE)
        ),
        "d_out has shape (6, 2); it must be (7, out_dim)": (
            lambda: varlen_vjp(X[0], WEIGHTS, np.array([0, 7]), X[0, 1:], sizes=ONE)
        ),
        f"cu_seqlens=[1, 7] {OFFSETS}": packed(1, 7),
        f"cu_seqlens=[0, 5, 4, 7] {OFFSETS}": packed(0, 5, 4, 7),
        f"cu_seqlens=[0, 6] {OFFSETS}": packed(0, 6),
        f"cu_seqlens=[] {OFFSETS}": packed(),
        f"cu_seqlens=[1, 2, 3, 4, 5, 6, ..., 10, 11, 12, 13, 14, 15] {OFFSETS}": packed(
            *range(1, 16)
        ),
        f"cu_seqlens=[{', '.join(LONG[:6])}, ..., {', '.join(LONG[-6:])}] {OFFSETS}": (
            packed(*map(int, LONG))
        ),
        "cu_seqlens has shape (1, 2); it must be (sequences + 1)": packed([0, 7]),
    },
    {
        "cu_seqlens=0.0 must be an integer, not float": packed(0.0, 7.0),
        "x has dtype <U1; it must hold real or complex numbers": (
            lambda: rotate(np.array([["a", "b"]]), np.zeros(1))
        ),
        "positions has dtype <U1; it must hold real or complex numbers": (
            lambda: rotate(np.zeros((1, 4)), np.array(["a"]))
        ),
        f"sizes=None {NO_SIZES}, not NoneType": lambda: layer(X, WEIGHTS, sizes=None),
        f"semantics=None {NO_SEMANTICS}, not NoneType": lambda: layer_weight_shapes(ONE, None),
    },
    whole=True,
)
