"""`nsa_ref.bounds` is sharp on both sides: no right kernel exceeds it, every wrong one does.

Right kernels (`nsa_ref.testing.mutants.kernel`) run in every row of `NUMERICS`, with several block
sizes, summation orders and exponentials, on every kind of input. The budget they use is printed.
"""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_inputs import (
    KINDS,
    ROWS,
    Generator,
    Inputs,
    Tensors,
    computed,
    draw_inputs,
    draw_way,
    exact_attention,
    generator,
    rounded,
)
from budgets import Array, Budgets, budget_used
from nsa_ref.bounds import FORMS, attention_bounds, slope_test
from nsa_ref.numerics import NUMERICS
from nsa_ref.rounded import Rounded
from nsa_ref.testing.mutants import arithmetic as zoo
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.rounding import Way

# independent roundings: no value occurs twice, so that errors do not line up
GENERIC_KINDS = ("flat", "randn", "heavy", "offsets")
CASES_PER_KIND = 36  # times 8 rows and 9 kinds: 2592 kernels
NAMES = Tensors._fields
SEQUENTIAL = Way(block=16, order="sequential", backward_order="sequential")
Share = dict[tuple[str, str], float]


def drawn(kind: str, row: str, rng: Generator, *sizes: int, mask: Array | None = None) -> Inputs:
    """Inputs of kv_heads, G, q_len, columns, head_dim, value_dim; every key visible by default."""
    if mask is None:
        mask = np.ones((1, sizes[0] * sizes[1], *sizes[2:4]), np.int64)
    return draw_inputs(kind, row, rng, sizes=sizes, mask=mask)


def bounds(x: Inputs, row: str, form: str = "deterministic") -> Tensors:
    given = x.q, x.k, x.v, x.mask, x.d_out, x.d_lse
    return Tensors(*attention_bounds(*given, numerics=row, form=form, scale=x.scale))


def slope_used(name: str, got: Array, right: Array, noise: Array, shared: Array) -> float:
    """value / limit of the slope test of one tensor; inf where the kernel's is not finite."""
    if name == "lse":  # rows that see nothing are -inf on both sides
        got, right = (np.where(np.isfinite(right), y, 0.0)[..., None] for y in (got, right))
        noise, shared = noise[..., None], shared[..., None]
    if not np.isfinite(got).all():
        return np.inf
    slope = slope_test(got - right, right, noise, shared)
    return slope.value / slope.limit if slope.limit else 0.0


def judged(kind: str, row: str, x: Inputs, *kernels: Tensors) -> list[Share]:
    """By form (or "slope") and tensor the largest share that each kernel uses: none is above 1."""
    right, generic = exact_attention(x), kind in GENERIC_KINDS
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        limits = {form: bounds(x, row, form) for form in (FORMS if generic else FORMS[:1])}
    verdicts = []
    for got in kernels:
        used: Share = {}
        for name, g, r, *bound in zip(NAMES, got, right, *limits.values()):
            used |= {(form, name): budget_used(g, r, b) for form, b in zip(FORMS[:2], bound)}
            if generic:
                used["slope", name] = slope_used(name, g, r, *bound[1:])
        verdicts.append(used)
    return verdicts


@pytest.mark.parametrize("row", ROWS)
def test_right_kernels_stay_within_their_bounds(row: str) -> None:
    """NUMERICS 2: deterministic always, statistical and the slope on generic kinds."""
    largest: dict[tuple[str, str], list[float]] = {}
    for kind, seed in itertools.product(KINDS, range(CASES_PER_KIND)):
        # a statistical exceedance counts if 3 fresh draws do not clear it
        for redraw in range(4):
            rng = generator(ROWS.index(row), KINDS.index(kind), seed, redraw)
            x, way = draw_inputs(kind, row, rng), draw_way(rng, row)
            (used,) = judged(kind, row, x, computed(x, row, way))
            for cell, share in used.items():
                largest.setdefault(cell, []).append(share)
            over = {cell: share for cell, share in used.items() if share > 1}
            where = f"{row}, {kind}, seed {seed}, {way}: {over}"
            assert not any(form == "deterministic" for form, _ in over), where
            if not over:
                break
        else:
            pytest.fail(f"four times over: {where}")
    print(f"\nbudget used by right kernels, {row}: largest of a case, max (99th percentile)")
    for form in ("deterministic", "statistical", "slope"):
        cells = ((name, largest[form, name]) for name in NAMES)
        line = "  ".join(f"{n} {max(z):.3f} ({np.percentile(z, 99):.3f})" for n, z in cells)
        print(f"  {form:13}  {line}")


@pytest.mark.parametrize("row", ROWS)
def test_worst_cases_of_one_or_two_keys_stay_within_their_bounds(row: str) -> None:
    """Few roundings conspire more often than many: a term too few in a bound shows here."""
    budgets = Budgets()
    for seed in range(400):
        rng = generator(10, ROWS.index(row), seed)
        group, columns, head_dim, value_dim = (int(n) for n in rng.integers(1, 3, 4))
        kind = str(rng.choice(["integers", "one_hot_v", "equal", "randn", "heavy", "tiny"]))
        x = drawn(kind, row, rng, 1, group, 1, columns, head_dim, value_dim)
        way = draw_way(rng, row)
        tensors = computed(x, row, way), exact_attention(x), bounds(x, row)
        budgets.add_all(*(y._asdict() for y in tensors), where=f"{kind}, seed {seed}, {way}")
    budgets.print(f"right kernels of one or two keys, {row}")


@pytest.mark.parametrize("row", ["fp64", "fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", GENERIC_KINDS)
def test_quadrature_holds_over_many_keys_and_rows(row: str, kind: str) -> None:
    """The statistical form and the slope win by sqrt(n): they must hold where n is not small."""
    for redraw in range(4):
        rng = generator(11, ROWS.index(row), KINDS.index(kind), redraw)
        x = drawn(kind, row, rng, 1, 2, 48, 200, 8, 4)
        (used,) = judged(kind, row, x, computed(x, row, draw_way(rng, row)))
        if max(used.values()) <= 1:
            return
    pytest.fail(f"four times over: {used}")


@given(
    st.sampled_from(ROWS),
    st.sampled_from(KINDS),
    st.tuples(*(st.integers(low, high) for low, high in ((1, 2), (1, 2), (0, 9), (0, 9)))),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_any_structure_is_within_the_deterministic_bound(
    row: str, kind: str, sizes: tuple[int, ...], head_dim: int, value_dim: int, seed: int
) -> None:
    """Shapes down to no query, no key; the pattern of empty rows and unseen keys is exact."""
    kv_heads, group, q_len, columns = sizes
    rng = generator(12, seed)
    x = draw_inputs(kind, row, rng, sizes=(kv_heads, group, q_len, columns, head_dim, value_dim))
    got, right, limits = computed(x, row, draw_way(rng, row)), exact_attention(x), bounds(x, row)
    Budgets().add_all(*(y._asdict() for y in (got, right, limits)))
    empty = ~x.mask.any(axis=-1)
    unseen = ~x.mask.any(axis=2).reshape(1, kv_heads, group, columns).any(axis=2)
    for bound, nothing in zip(limits, (empty, empty, empty, unseen, unseen)):
        assert not bound[nothing].any()


# wrong kernel -> the kind of input that shows it
WRONG = {
    zoo.ScaleSlightlyOff: "randn",
    zoo.NoLog2E: "randn",
    zoo.NoRescaling: "randn",
    zoo.LastKeyNotRead: "flat",
    zoo.HiddenKeyRead: "flat",
    zoo.EightBitWeights: "randn",
    zoo.NoMaximum: "huge",
    zoo.LseBaseTwo: "randn",
    zoo.SlightlyTooLarge: "randn",
    zoo.NoDelta: "randn",
    zoo.NoGradientThroughLse: "randn",
    zoo.EightBitDs: "randn",
    zoo.GroupGradientOnce: "randn",
    zoo.QueryMissingInDk: "randn",
}


@pytest.mark.parametrize("row", ["fp32", "tf32", "bf16", "fp16", "bf16-head", "fp16-head"])
@pytest.mark.parametrize("wrong", WRONG)
def test_every_wrong_kernel_exceeds_a_bound(wrong: type[Kernel], row: str) -> None:
    """Five draws, five kills: above 1 in some tensor, or off the slope."""
    kind = WRONG[wrong]
    # 0.3 % is less than one rounding in bfloat16: only the slope over many rows shows it
    rows, columns = (128, 132) if wrong is zoo.SlightlyTooLarge else (32, 40)
    lag = np.arange(rows)[:, None] + columns - rows - np.arange(columns)[None, :]
    # HiddenKeyRead shows the first key a window leaves out, so the window must end
    mask = np.broadcast_to((lag >= 0) & (lag <= 24), (1, 4, rows, columns)).astype(np.int64)
    for seed in range(5):
        rng = generator(13, list(WRONG).index(wrong), ROWS.index(row), seed)
        x = drawn(kind, row, rng, 2, 2, rows, columns, 8, 8, mask=mask)
        x = x._replace(scale=x.q.shape[-1] ** -0.5 if kind != "huge" else x.scale)
        if x.d_lse is None:
            x = x._replace(d_lse=rng.standard_normal(x.q.shape[:3]).astype(np.float32))
        way = dataclasses.replace(draw_way(rng, row), block=16)  # rescales on the way
        right, used = judged(kind, row, x, *(computed(x, row, way, k) for k in (Kernel, wrong)))
        assert max(right.values()) <= 1, f"without the mistake: {right}"
        assert max(used.values()) > 1, f"seed {seed}, {way} lets it through: {used}"


def test_bounds_are_finite_and_silent_on_extreme_logits() -> None:
    """Saturated at logits of 1e4, and out and lse at any; never NaN; out at most the spread of v.

    At 1e8 a dot product summed in another order moves by more than exp can bear, so a right
    backward pass may overflow, and its bound may say so.
    """
    rng = generator(14)
    for row, numerics in NUMERICS.items():
        if numerics.dtype == "float16":
            continue  # q itself would overflow
        x = drawn("randn", row, rng, 1, 2, 6, 12, 4, 3)
        for size in (1e4, 1e8):
            y = x._replace(q=rounded(x.q * size, row))
            for form in FORMS:
                with np.errstate(over="raise", divide="raise", invalid="raise"):
                    result = bounds(y, row, form)
                assert not any(np.isnan(b).any() for b in result)
                finite = result if size == 1e4 else result[:2]
                assert all(np.isfinite(b).all() for b in finite)
                spread = np.ptp(y.v, axis=2).max() + np.abs(y.v).max()
                assert result.out.max() <= 4 * spread


def test_only_an_overflow_makes_a_bound_infinite() -> None:
    """float16 ends at 65504: dk of loud queries may be inf in a right kernel, out may not."""
    x = drawn("flat", "fp16", generator(15), 1, 1, 4, 4, 2, 2)
    loud = x._replace(d_out=x.d_out * 1e3, k=x.k * 1e-4, q=x.q + 3e3)
    for form in ("deterministic", "statistical"):
        result, wide = bounds(loud, "fp16", form), bounds(loud, "fp32", form)
        assert np.isinf(result.dk).any()
        assert np.isfinite(result.out).all() and np.isfinite(result.lse).all()
        assert all(np.isfinite(b).all() for b in wide)


def test_invisible_keys_do_not_enter_the_bounds() -> None:
    """A5, and 0 * inf: a key that no row sees may hold anything."""
    rng = generator(16)
    mask = np.ones((1, 2, 5, 7), np.int64)
    mask[..., 3] = 0
    x = drawn("randn", "fp32", rng, 1, 2, 5, 7, 4, 3, mask=mask)
    k, v = x.k.copy(), x.v.copy()
    k[:, :, 3], v[:, :, 3] = np.inf, np.nan
    for form in FORMS:
        for mine, other in zip(bounds(x, "fp32", form), bounds(x._replace(k=k, v=v), "fp32", form)):
            assert np.array_equal(mine, other)


def test_multiplicity_two_is_the_same_key_twice() -> None:
    """The bound of a key counted twice is that of two equal keys (A1)."""
    x = drawn("randn", "bf16", generator(17), 1, 2, 5, 7, 4, 3)
    mask = x.mask.copy()
    mask[..., 6] = 2
    twice = np.r_[0:7, 6]
    y = x._replace(k=x.k[:, :, twice], v=x.v[:, :, twice], mask=np.ones((1, 2, 5, 8), np.int64))
    once, spread = bounds(x._replace(mask=mask), "bf16"), bounds(y, "bf16")
    for mine, other in zip(once[:3], spread[:3]):
        # both are float64 sums of the same terms in another order
        assert np.max(np.abs(mine - other) / other) < 2.0**-40


@pytest.mark.parametrize("form", FORMS)
def test_finer_arithmetic_has_smaller_bounds(form: str) -> None:
    x = drawn("randn", "bf16", generator(18), 1, 2, 9, 9, 4, 4)
    order = ["fp64", "fp32", "bf16", "bf16-head", "bf16-eager"]
    results = [bounds(x, row, form) for row in order]
    for finer, coarser in itertools.pairwise(results):
        for mine, other in zip(finer, coarser):
            if form == "shared":
                assert (mine <= other).all()
            else:
                assert mine.sum() <= other.sum()


def test_sums_of_three_tenths_are_within_fp64_of_the_exact_rational() -> None:
    """Equal logits: out is a mean of v, known exactly, and the fp64 row covers NumPy's own."""
    columns = 7
    v = np.array([[[[0.1 * j + 0.3] for j in range(columns)]]])
    q, k = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, columns, 2))
    exact = sum((Fraction(float(y)) for y in v.ravel()), Fraction(0)) / columns
    mine = float(v.mean())
    mask = np.ones((1, 1, 1, columns), int)
    bound = attention_bounds(q, k, v, mask, numerics="fp64", form="deterministic")
    assert bound.dq is None and bound.dk is None and bound.dv is None
    assert abs(Fraction(mine) - exact) <= Fraction(float(bound.out.item()))


def test_a_stored_delta_takes_d_lse_with_it() -> None:
    """D - d_lse is rounded to 16 bits, then dS, then dq: three roundings of d_lse k.

    One key and 4000 rows, so that in some row all three are near their worst; the bound must
    hold there, and does not without d_lse in delta's rounding.
    """
    rng, rows = generator(27), 4000
    d_lse = rng.uniform(1.0, 1.02, (1, 1, rows)).astype(np.float32).astype(np.float64)
    d_out = rounded(rng.uniform(0.01, 0.02, (1, 1, rows, 1)), "fp16")
    k, v = (rounded(np.full((1, 1, 1, 1), each), "fp16") for each in (1.37, 0.7))
    mask = np.ones((1, 1, rows, 1), np.int64)
    x = Inputs(0.0 * d_out, k, v, mask, d_out, d_lse, scale=1.0)
    got, right = computed(x, "fp16", SEQUENTIAL), exact_attention(x)
    error, bound = np.abs(got.dq - right.dq), bounds(x, "fp16").dq
    assert (error <= bound).all()
    of_d_lse = NUMERICS["fp16"].u_delta * np.abs(d_lse)[..., None] * np.abs(x.k)
    assert (error > bound - of_d_lse).any()


def test_the_slope_knows_what_rows_share() -> None:
    """Every row that reads one key in tf32 carries the same rounding of its v."""
    rng, worst = generator(26), 0.0
    for _ in range(10):
        x = drawn("randn", "tf32", rng, 1, 4, 400, 1, 2, 1)
        got, right = computed(x, "tf32", SEQUENTIAL).out, exact_attention(x).out
        noise, shared = (bounds(x, "tf32", form).out for form in ("statistical", "shared"))
        assert slope_used("out", got, right, noise, shared) <= 1
        worst = max(worst, slope_used("out", got, right, noise, 0.0 * noise))
    assert worst > 1  # rows are not independent here: quadrature alone is a false alarm


def test_slope_is_the_relative_size_of_a_systematic_error() -> None:
    reference = generator(19).standard_normal((1, 2, 50, 4))
    bound = np.abs(reference) * 2.0**-8
    off = slope_test(0.003 * reference, reference, bound, 0.0 * bound)
    assert abs(off.value - 0.003) < 2.0**-50 and off.value > off.limit
    nothing = slope_test(0.0 * reference, 0.0 * reference, bound, bound)
    assert nothing == (0.0, np.inf)
    unknown = slope_test(reference, reference, bound + np.inf, bound)
    assert unknown.limit == np.inf


@pytest.mark.parametrize("large", ["logit", "dO.v"])
def test_what_a_dtype_cannot_hold_has_no_bound(large: str) -> None:
    """q.k or dO.v of 90000, which eager float16 stores, in the first of two rows."""
    q, k, v, d_out = (np.ones((1, 1, length, 1)) for length in (2, 3, 3, 2))
    for loud in (q, k) if large == "logit" else (d_out, v):
        loud[0, 0, 0] = 300.0
    mask, sizes = np.ones((2, 3), int), {"form": "deterministic", "scale": 1e-4}
    found = attention_bounds(q, k, v, mask, d_out, numerics="fp16-eager", **sizes)
    assert np.isinf(found.dq[0, 0, 0]).all() and np.isinf(found.dk).all()
    if large == "logit":
        assert np.isinf(found.lse[0, 0, 0]) and np.isinf(found.dv).all()
    # the other row is its own, and a kernel that stores neither has a bound everywhere
    assert np.isfinite(found.dq[0, 0, 1]).all() and np.isfinite(found.lse[0, 0, 1])
    for bound in attention_bounds(q, k, v, mask, d_out, numerics="fp16", **sizes):
        assert np.isfinite(bound).all()


# ---- inputs that are off

INPUTS = ("q", "k", "v", "d_out")


def with_errors(x: Inputs, errors: list[Array]) -> Inputs:
    return x._replace(**{n: Rounded(getattr(x, n), e) for n, e in zip(INPUTS, errors)})


def between(x: Inputs, y: Inputs) -> Inputs:
    """x, and how far each input of y is from it."""
    return with_errors(x, [np.abs(getattr(y, n) - getattr(x, n)) for n in INPUTS])


@pytest.mark.parametrize("row", ["fp64", "fp32", "bf16", "fp16", "bf16-eager"])
def test_bounds_hold_for_inputs_that_are_off(row: str) -> None:
    """A right kernel of any inputs within their errors, against the exact inputs' attention."""
    budgets = Budgets()
    for seed in range(60):
        rng = generator(48, ROWS.index(row), seed)
        kind = str(rng.choice(["integers", "randn", "heavy", "offsets", "tiny", "equal", "flat"]))
        if seed % 2:  # few roundings conspire more often than many
            group, columns, head_dim, value_dim = (int(n) for n in rng.integers(1, 3, 4))
            x = drawn(kind, row, rng, 1, group, 1, columns, head_dim, value_dim)
        else:
            x = draw_inputs(kind, row, rng)
        x, size = x._replace(d_lse=None), 2.0 ** -float(rng.integers(1, 20))
        kept = {name: size * (rng.random() < 0.7) for name in INPUTS}
        moved = {}
        for name in INPUTS:
            exact = getattr(x, name)
            signs = rng.choice([-1.0, 1.0, 0.5], exact.shape)
            moved[name] = rounded(exact + kept[name] * np.abs(exact) * signs, row)
        y, way = x._replace(**moved), draw_way(rng, row)
        tensors = computed(y, row, way), exact_attention(x), bounds(between(x, y), row)
        budgets.add_all(*(z._asdict() for z in tensors), where=f"{kind}, seed {seed}, {way}")
    budgets.print(f"kernels of inputs that are off, {row}")


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("which", INPUTS)
def test_an_error_of_an_input_may_move_every_result_that_reads_it(which: str, flat: bool) -> None:
    """The bound without it is too small: errors of one input alone, in float64."""
    x = drawn("randn", "fp64", generator(49), 1, 2, 6, 8, 4, 4)._replace(d_lse=None)
    if flat:  # q moves dk without the logits' help; dO moves dS of a key without v through D
        x = x._replace(k=1e-3 * x.k, v=x.v * (np.arange(8) > 0)[:, None])
    y = x._replace(**{which: getattr(x, which) + 1e-3 * np.abs(getattr(x, which))})
    moved, right = exact_attention(y), exact_attention(x)
    without, limits = bounds(x, "fp64"), bounds(between(x, y), "fp64")
    assert all(budget_used(*each) <= 1 for each in zip(moved, right, limits))
    over = [name for name, *each in zip(NAMES, moved, right, without) if budget_used(*each) > 1]
    reads = {"v": ["out", "dq", "dk"], "d_out": ["dq", "dk", "dv"]}
    assert over == reads.get(which, list(NAMES))


def test_an_input_that_may_be_anything_leaves_no_bound() -> None:
    """q of the first of two rows: its out, and what its dS enters."""
    x = drawn("randn", "fp32", generator(56), 1, 1, 2, 3, 2, 2)
    error = np.zeros_like(x.q)
    error[0, 0, 0, 1] = np.inf
    with np.errstate(invalid="ignore"):
        found = bounds(x._replace(q=Rounded(x.q, error)), "fp32")
    for bound in (found.out, found.lse, found.dq):
        assert np.isinf(bound[0, 0, 0]).all() and np.isfinite(bound[0, 0, 1]).all()
    assert np.isinf(found.dk).all() and np.isinf(found.dv).all()


def test_errors_next_to_nothing_change_nothing_but_the_second_order() -> None:
    """And errors of 0 change nothing."""
    x = draw_inputs("randn", "bf16", generator(50))
    nothing, little = (
        bounds(with_errors(x, [size * np.abs(getattr(x, n)) for n in INPUTS]), "bf16")
        for size in (0.0, 2.0**-60)
    )
    for exact, same, other in zip(bounds(x, "bf16"), nothing, little):
        assert np.array_equal(exact, same) and (other <= exact * (1 + 2.0**-18)).all()


def test_bad_arguments_are_named() -> None:
    """As by `attend`, and what bounds take besides."""
    q, k, mask = np.zeros((1, 2, 3, 4)), np.zeros((1, 1, 5, 4)), np.ones((3, 5), int)

    def named(message: str, **changes: Any) -> None:
        how = {"q": q, "k": k, "v": k, "mask": mask, "numerics": "fp32", "form": "deterministic"}
        with pytest.raises(ValueError, match=message):
            attention_bounds(**(how | changes))

    named("numerics='fp8' must be one of 'fp64', 'fp32'", numerics="fp8")
    named("form='worst' must be one of 'deterministic'", form="worst")
    named(r"k has shape \(1, 1, 5, 3\); it must be", k=k[..., :3])
    named("d_lse was given without d_out", d_lse=np.zeros((1, 2, 3)))
    named("q is off, and form='shared' takes exact inputs", form="shared", q=Rounded(q, q + 1.0))
    named("the error of q has shape", q=Rounded(q, q[..., :0]))
