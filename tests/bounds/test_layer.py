"""`nsa_ref.layer_bounds`: no right layer exceeds it, and in float32 every wrong one does by far.

Right layers (`nsa_ref.testing.mutants.layer`) run in several ways and every dtype. The
budget they use is printed: see it with ``-s``, or with ``-rP`` under pytest-xdist.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from attention_inputs import ROWS, Array, generator, rounded
from budgets import Budgets, budget_used
from layer_inputs import (
    LayerCase,
    Results,
    as_selected,
    draw_case,
    draw_way,
    reference,
    run_layer,
    with_semantics,
)
from nsa_ref.attention import attend, attend_vjp
from nsa_ref.bounds import AttentionInputs
from nsa_ref.layer import branch_masks, layer, layer_vjp, layer_weight_shapes, selection_inputs
from nsa_ref.layer_bounds import (
    LayerBounds,
    RoundedBranch,
    RoundedLayer,
    layer_bounds,
    packed_weight_bounds,
)
from nsa_ref.numerics import NUMERICS
from nsa_ref.rounded import Rounded, exact, summed
from nsa_ref.selection import importance
from nsa_ref.semantics import LUCIDRAINS, LUCIDRAINS_FLEX, PAPER, PRESETS, ROTARY, PerBranch
from nsa_ref.sizes import COMPRESS_MAPS
from nsa_ref.testing.mutants import layers
from nsa_ref.testing.mutants.layer import LayerInSteps

CASES = 10  # per row, two of each preset; half of them as small as can be
OF_ONE = ("model_dim", "q_heads", "kv_heads", "value_dim", "sliding_window_size")
TINY = {"seq_len": 3, "head_dim": 2, **dict.fromkeys(OF_ONE, 1)}


def bounds_of(case: LayerCase, row: str) -> LayerBounds:
    how: dict[str, Any] = {"sizes": case.sizes, "semantics": case.semantics, "numerics": row}
    return layer_bounds(case.x, case.weights, case.block_indices, case.d_out, **how)


def tensors(found: Results | LayerBounds) -> dict[str, Array]:
    return {"out": found.out, "dx": found.dx, **found.dweights}


@pytest.mark.parametrize("row", ROWS)
def test_right_layers_stay_within_their_bounds(row: str) -> None:
    """out and all gradients, of every preset, causal or not, with every rotary and map."""
    budgets = Budgets()
    for seed in range(CASES):
        rng = generator(40, ROWS.index(row), seed)
        semantics = with_semantics(list(PRESETS.values())[seed % len(PRESETS)], rng)
        case, way = draw_case(rng, row, semantics, **(TINY if seed % 2 else {})), draw_way(rng, row)
        each = run_layer(case, row, way), reference(case), bounds_of(case, row)
        budgets.add_all(*map(tensors, each), where=f"{row}, seed {seed}, {way}")
    budgets.print(f"right layers, {row}")


@pytest.mark.parametrize("row", ["fp64", "fp32", "tf32", "bf16", "bf16-eager", "fp16"])
def test_right_layers_that_pool_turned_keys_stay_within_their_bounds(row: str) -> None:
    """G2: every pooled key has the rounding of its tokens' rotation, and so has its gradient."""
    budgets = Budgets()
    for seed, compress_map in enumerate(COMPRESS_MAPS):
        rng = generator(54, ROWS.index(row), seed)
        semantics = dataclasses.replace(
            LUCIDRAINS if seed % 2 else PAPER,
            rotary="before_pooling",
            kv_per_branch=seed % 4 < 2,
            causal=seed != 1,
        )
        sizes: dict[str, Any] = {"seq_len": 9 + seed, "compress_map": compress_map}
        case, way = draw_case(rng, row, semantics, head_dim=4, **sizes), draw_way(rng, row)
        each = run_layer(case, row, way), reference(case), bounds_of(case, row)
        budgets.add_all(*map(tensors, each), where=f"{row}, {compress_map}, {way}")
    budgets.print(f"right layers that pool turned keys, {row}")


@pytest.mark.parametrize("compress_map", COMPRESS_MAPS)
@pytest.mark.parametrize("rotary", ROTARY)
def test_the_layer_that_is_bounded_is_the_definition(rotary: str, compress_map: str) -> None:
    """G1, G2, C4: the analysis in float64 has the oracle's values, within its own errors."""
    semantics = dataclasses.replace(LUCIDRAINS, rotary=rotary)
    sizes: dict[str, Any] = {"seq_len": 12, "head_dim": 4, "compress_map": compress_map}
    case = draw_case(generator(55), "fp64", semantics, **sizes)
    how: dict[str, Any] = {"sizes": case.sizes, "semantics": semantics}
    masks = branch_masks(12, 12, case.block_indices, case.sizes, semantics)
    found = RoundedLayer(case.x, case.weights, masks, case.sizes, semantics, NUMERICS["fp64"])
    found_dx, _ = found.gradients(case.d_out)
    q, k_cmp, _ = selection_inputs(case.x, case.weights, **how)
    how["block_indices"] = case.block_indices
    dx, _ = layer_vjp(case.x, case.weights, case.d_out, **how)
    out = layer(case.x, case.weights, **how)
    for mine, definition in ((found.q, q), (found.k_cmp, k_cmp), (found.out, out), (found_dx, dx)):
        assert (np.abs(mine.value - definition) <= mine.error).all()


@pytest.mark.parametrize("row", ["fp64", "fp32", "bf16-eager"])
def test_scores_of_a_right_layer_stay_within_their_bounds(row: str) -> None:
    """I1-I3: what q and k_cmp are off by on their way through the layer."""
    budgets = Budgets()
    for seed in range(4):
        rng = generator(41, seed)
        rotary = "all" if seed < 2 else "before_pooling"
        semantics = dataclasses.replace(PAPER if seed % 2 else LUCIDRAINS, rotary=rotary)
        case = draw_case(rng, row, semantics, seq_len=12)
        memory = np.broadcast_to(case.weights["mem_k"], (len(case.x), *case.weights["mem_k"].shape))
        how: dict[str, Any] = {"kv_len": 12, "sizes": case.sizes, "semantics": semantics}
        mine, other = (importance(*as_selected(case, y), memory, **how) for y in (row, "fp64"))
        finite, bound = np.isfinite(other), bounds_of(case, row).scores
        assert bound is not None and (finite == np.isfinite(mine)).all()
        budgets.add("scores", *(np.where(finite, y, 0.0) for y in (mine, other)), bound, seed)
    budgets.print(f"right layers, {row}")


WRONG = (
    layers.GatesPermuted,
    layers.SoftmaxGates,
    layers.WindowOneOffInTheLayer,
    layers.CompressionDetached,
    layers.NothingTurned,
    layers.RotaryForgottenInSliding,
    layers.PoolsKeysAsTheyAre,
    layers.LargeNormEpsilon,
    layers.GatesSlightlyOff,
    layers.GateDetached,
    layers.NoPositionsInTheLayer,
    layers.MemoryGradientOfOneEntry,
    layers.TokenMissingInAWeight,
)


@pytest.mark.parametrize("wrong", WRONG)
def test_every_wrong_layer_exceeds_a_bound_in_float32_by_far(wrong: type[LayerInSteps]) -> None:
    """Ten times the bound and more, in a layer as a judge draws it."""
    for seed in range(2):
        rng = generator(42, seed)
        semantics = LUCIDRAINS if seed else LUCIDRAINS_FLEX
        if wrong is layers.PoolsKeysAsTheyAre:
            semantics = dataclasses.replace(semantics, rotary="before_pooling")
        case = draw_case(
            rng,
            "fp32",
            semantics,
            batch=2,
            seq_len=24,
            model_dim=16,
            q_heads=4,
            kv_heads=2,
            head_dim=8,
            value_dim=8,
            num_mem_kv=1,
            compress_block_size=4,
            compress_block_sliding_stride=2,
            selection_block_size=4,
            # an MLP of small weights may pass next to nothing on
            compress_map="linear" if seed else "mean",
            compress_positions=True,
            num_selected_blocks=2,
            sliding_window_size=4,
        )
        way, bounds = draw_way(rng, "fp32"), tensors(bounds_of(case, "fp32"))
        right = tensors(reference(case))
        mine, its = (tensors(run_layer(case, "fp32", way, kind)) for kind in (LayerInSteps, wrong))
        Budgets().add_all(mine, right, bounds, where="without the mistake")
        far = {name: budget_used(its[name], right[name], bounds[name]) for name in bounds}
        assert max(far.values()) > 10, f"seed {seed}, {way} lets it through: {far}"


def test_finer_arithmetic_has_smaller_bounds() -> None:
    case = draw_case(generator(43), "bf16", LUCIDRAINS, seq_len=12)
    rows = "fp64", "fp32", "bf16", "bf16-head", "bf16-eager"
    for finer, coarser in itertools.pairwise(tensors(bounds_of(case, row)) for row in rows):
        assert all((finer[name] <= coarser[name]).all() for name in finer)


def test_only_what_reads_a_row_of_nan_is_unbounded() -> None:
    """A2: with `empty_row="nan"` a row that selects nothing is NaN in the fine branch."""
    semantics = dataclasses.replace(PAPER, empty_row=PerBranch("zero", "nan", "zero"))
    case = draw_case(generator(44), "fp32", semantics, seq_len=8, num_selected_blocks=1)
    case.block_indices[...] = 0
    case.block_indices[0, :, 5] = -1
    bounds = bounds_of(case, "fp32")
    nothing = np.zeros(case.x.shape[:2], bool)
    nothing[0, 5] = True
    assert (np.isinf(bounds.out) == nothing[..., None]).all()
    assert bounds.dweights is not None and np.isfinite(bounds.dweights["to_k_fine.weight"]).all()
    filled = dataclasses.replace(case, block_indices=np.maximum(case.block_indices, 0))
    assert all(np.isfinite(bound).all() for bound in tensors(bounds_of(filled, "fp32")).values())


def test_what_a_dtype_cannot_hold_has_no_bound() -> None:
    """float16 ends at 65504: x^2 of one token may overflow in its norm."""
    case = draw_case(generator(45), "fp16", LUCIDRAINS_FLEX, seq_len=6)
    loud = case.x.copy()
    loud[0, -1] = 300.0
    louder = dataclasses.replace(case, x=loud)
    assert np.isinf(bounds_of(louder, "fp16").out[0, -1]).all()
    for row, wide in (("fp16", case), ("bf16", louder), ("fp32", louder)):
        found = bounds_of(wide, row)
        assert found.dx is not None and np.isfinite([found.out, found.dx]).all()


def test_scores_are_none_where_the_sizes_have_none() -> None:
    """I2 counts whole strides: l = 3 and d = 2 have no scores by overlap."""
    windows = {"compress_block_size": 3, "compress_block_sliding_stride": 2}
    case = draw_case(generator(46), "fp32", PAPER, **windows)
    assert bounds_of(case, "fp32").scores is None


def test_without_d_out_there_are_no_gradients() -> None:
    case = draw_case(generator(47), "fp32", PAPER)
    found = bounds_of(dataclasses.replace(case, d_out=None), "fp32")
    assert found.dx is None and found.dweights is None
    assert np.array_equal(found.out, bounds_of(case, "fp32").out)


# ---- packed sequences


def part(case: LayerCase, entry: int, length: int) -> LayerCase:
    """The first tokens of one batch entry, as a case of its own."""
    rows = slice(entry, entry + 1)
    return dataclasses.replace(
        case,
        x=case.x[rows, :length],
        block_indices=case.block_indices[rows, :, :length],
        d_out=case.d_out[rows, :length],
    )


@pytest.mark.parametrize("row", ["fp32", "bf16-eager", "fp16"])
def test_right_layers_of_packed_sequences_stay_within_their_bounds(row: str) -> None:
    """One sum over the terms of all sequences, where they are of one length; or one by one."""
    budgets, rng = Budgets(), generator(57, ROWS.index(row))
    for seed in range(4):
        semantics = with_semantics(PAPER if seed % 2 else LUCIDRAINS_FLEX, rng)
        case = draw_case(rng, row, semantics, seq_len=8, batch=3, num_mem_kv=1)
        together = seed < 2
        lengths = [8, 8, 8] if together else rng.permutation([8, int(rng.integers(1, 8)), 1])
        alone = [part(case, i, int(length)) for i, length in enumerate(lengths)]
        right = [reference(each).dweights for each in alone]
        each_bound = [bounds_of(each, row).dweights for each in alone]
        bounds = packed_weight_bounds(
            lengths, right, each_bound, sizes=case.sizes, semantics=semantics, numerics=row
        )
        way = draw_way(rng, row)
        if together:
            got = run_layer(case, row, way).dweights
        else:
            got = {name: np.zeros_like(weight) for name, weight in case.weights.items()}
            for gradients in (run_layer(each, row, way).dweights for each in alone):
                got = {n: rounded(got[n] + gradients[n], row) for n in got}
        total = {name: np.sum([each[name] for each in right], axis=0) for name in bounds}
        budgets.add_all(got, total, bounds, where=f"{row}, seed {seed}, {lengths}, {way}")
    budgets.print(f"right layers of packed sequences, {row}")


#: A layer, for the names and shapes of its weights.
FLAT = draw_case(generator(58), "fp32", PAPER, num_mem_kv=1)
FLAT_SHAPES = layer_weight_shapes(FLAT.sizes, PAPER)


def bias_bounds(
    lengths: list[int], gradients: Any, bounds: Any, row: str = "fp32"
) -> dict[str, Array]:
    """Of sequences whose only gradients are these of the gates' biases, with these bounds."""
    zeros = {name: np.zeros(shape) for name, shape in FLAT_SHAPES.items()}
    given, errors = ([zeros | {"gates.bias": y} for y in each] for each in (gradients, bounds))
    how: dict[str, Any] = {"sizes": FLAT.sizes, "semantics": PAPER, "numerics": row}
    return packed_weight_bounds(lengths, given, errors, **how)


def test_gradients_that_are_added_up_in_a_coarse_dtype_are_rounded_every_time() -> None:
    """Four gradients without an error, added in bfloat16 in any order."""
    rng, shape = generator(59), (64 * FLAT_SHAPES["gates.bias"][0],)
    each = rounded(rng.standard_normal((4, *shape)), "bf16")
    bound = bias_bounds([3, 1, 9, 2], each, 0.0 * each, "bf16")["gates.bias"]
    largest = 0.0
    for order in itertools.permutations(range(4)):
        total = each[order[0]]
        for i in order[1:]:
            total = rounded(total + each[i], "bf16")
        largest = max(largest, budget_used(total, each.sum(axis=0), bound))
    assert 1 / 4 < largest <= 1


def test_terms_that_are_lost_in_the_sum_over_all_sequences_are_within_its_bound() -> None:
    """A sequence of one large term, then one of 1000: each less than half of the large one's ulp.

    By itself the second is all but exact, and so is the first.
    """
    small = np.float32(0.9 * 2.0**-24)
    terms = [np.ones((1, 1, 1)), np.full((1, 1000, 1), small, dtype=np.float64)]
    alone = [summed(exact(part), (0, 1), NUMERICS["fp32"]) for part in terms]
    bound = bias_bounds([1, 1000], *zip(*alone))["gates.bias"]
    in_one = np.float32(0.0)
    for term in np.concatenate(terms, axis=1).ravel():
        in_one += np.float32(term)
    error = abs(float(in_one) - sum(part.sum() for part in terms))
    assert in_one == 1 and (error > 100 * sum(each.error for each in alone)).all()
    assert (error <= bound).all()


def test_sequences_without_a_term_are_nothing_in_the_sum() -> None:
    """G4: neither their bounds nor their number counts; without any, 0 is exact."""
    ones = np.ones(FLAT_SHAPES["gates.bias"])
    one = bias_bounds([3], [ones], [ones])
    three = bias_bounds([3, 0, 0], [ones, 0 * ones, 0 * ones], [ones] * 3)
    assert all(np.array_equal(one[name], three[name]) for name in FLAT_SHAPES)
    none = bias_bounds([], [], [])
    assert {name: bound.shape for name, bound in none.items()} == FLAT_SHAPES
    assert not any(bound.any() for bound in none.values())
    with pytest.raises(ValueError, match=r"bounds has 2 entries; it must have 3"):
        bias_bounds([3, 0, 0], [ones] * 3, [ones] * 2)


@pytest.mark.parametrize("which", ["q", "k", "v", "d_out"])
def test_a_branch_takes_the_errors_of_all_that_it_reads(which: str) -> None:
    """Empty rows are the mean of v over all columns here, and send no gradient to q and k (A2)."""
    rng = generator(55)
    lag = np.arange(6)[:, None] - np.arange(6)[None, :]
    mask = np.broadcast_to((lag > 0) & (lag < 4), (2, 4, 6, 6)).astype(np.int64)
    arrays = {
        "q": rng.standard_normal((2, 4, 6, 3)),
        "k": rng.standard_normal((2, 2, 6, 3)),
        "v": rng.standard_normal((2, 2, 6, 5)),
        "d_out": rng.standard_normal((2, 4, 6, 5)),
    }
    errors = {name: 1e-3 * np.abs(y) * (name == which) for name, y in arrays.items()}
    moved = {
        name: y + rng.choice([-1.0, 1.0], y.shape) * errors[name] for name, y in arrays.items()
    }
    pairs = {name: Rounded(y, errors[name]) for name, y in arrays.items()}
    d_out = pairs.pop("d_out")
    given = AttentionInputs(**pairs, mask=mask, scale=3**-0.5)
    branch = RoundedBranch(given, "uniform", NUMERICS["fp64"])
    found = {"out": branch.out, **branch.gradients(d_out)._asdict()}

    def results(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
        how: dict[str, Any] = {"mask": mask, "empty_row": "uniform"}
        return attend(q, k, v, **how).out, *attend_vjp(q, k, v, d_out=d_out, **how)

    got, right = results(**moved), results(**arrays)
    for name, mine, other in zip(("out", "dq", "dk", "dv"), got, right):
        bound = found[name]
        assert budget_used(mine, other, bound.error) <= 1, name
        assert budget_used(bound.value, other, bound.error) <= 1, name
    assert not found["dq"].error[:, :, 0].any()


# ---- arguments


def test_bad_arguments_are_named() -> None:
    """As by `layer_vjp`, and what bounds take besides."""
    case = draw_case(generator(52), "fp32", LUCIDRAINS)
    given = {"x": case.x, "weights": case.weights, "block_indices": case.block_indices}
    how: dict[str, Any] = given | {"sizes": case.sizes, "semantics": LUCIDRAINS, "numerics": "fp32"}

    def named(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            layer_bounds(**(how | changes))

    layer_bounds(**how)
    named("numerics='fp8' must be one of", numerics="fp8")
    named("x has shape", x=case.x[..., :-1])
    fewer = {name: weight for name, weight in case.weights.items() if name != "to_q.weight"}
    named(r"weights lacks \['to_q.weight'\]", weights=fewer)
    named(r"block_indices has shape", block_indices=case.block_indices.repeat(2, axis=0))
    named("d_out has shape", d_out=case.d_out[:, :0])
    odd = dataclasses.replace(case.sizes, head_dim=3)
    shapes = layer_weight_shapes(odd, LUCIDRAINS)
    weights = {name: np.zeros(shape) for name, shape in shapes.items()}
    named("head_dim=3 must be a positive multiple of 2", sizes=odd, weights=weights)
