"""`nsa_ref.bounds` is sharp on both sides: no right kernel exceeds it, every wrong one does.

Right kernels (`nsa_ref.testing.mutants.kernel`) run in every row of `NUMERICS`, with several block
sizes, summation orders and exponentials, on every kind of input. The budget they use is
printed: see it with ``-s``, or with ``-rP`` under pytest-xdist.
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

import flash_emulation as emulation
from flash_emulation import KINDS, ROWS, Inputs, Tensors, computed, draw_way, generator
from nsa_ref.bounds import FORMS, attention_bounds, slope_test
from nsa_ref.map_bounds import pool_bounds
from nsa_ref.numerics import NUMERICS
from nsa_ref.selection_bounds import logit_mean_bounds, score_bounds
from nsa_ref.semantics import Semantics
from nsa_ref.sizes import COMPRESS_MAPS, Sizes
from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants import arithmetic as zoo
from nsa_ref.testing.mutants import compression, selection
from nsa_ref.testing.mutants.compression import CompressionMap
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.rounding import Way, add_up
from nsa_ref.testing.mutants.selection import Selector

Array = np.ndarray[Any, np.dtype[Any]]

# independent roundings: no value occurs twice, so that errors do not line up
GENERIC_KINDS = ("flat", "randn", "heavy", "offsets")
CASES_PER_KIND = 36  # times 8 rows and 9 kinds: 2592 kernels
NAMES = Tensors._fields
SEQUENTIAL = Way(block=16, order="sequential", backward_order="sequential")


def bounds(x: Inputs, row: str, form: str) -> Tensors:
    out, lse, dq, dk, dv = attention_bounds(
        x.q, x.k, x.v, x.mask, x.d_out, x.d_lse, numerics=row, form=form, scale=x.scale
    )
    assert dq is not None and dk is not None and dv is not None
    return Tensors(out, lse, dq, dk, dv)


def budget_used(got: Array, right: Array, bound: Array) -> Array:
    """|error| / bound per element; an exact agreement uses nothing, not even of a bound of 0."""
    assert bound.shape == right.shape == got.shape
    assert not np.isnan(bound).any()
    with np.errstate(divide="ignore", invalid="ignore"):
        used = np.abs(got - right) / bound
    used = np.where(np.isnan(used) | np.isnan(got), np.inf, used)  # 0 / 0 is settled below
    return np.where((got == right) | np.isinf(bound), 0.0, used)


def slopes(got: Tensors, right: Tensors, noise: Tensors, shared: Tensors) -> dict[str, float]:
    """value / limit of the slope test, per tensor; only where the kernel's values are finite."""
    result = {}
    for name, g, r, b, s in zip(NAMES, got, right, noise, shared):
        if name == "lse":  # rows that see nothing are -inf on both sides
            g, r = (np.where(np.isfinite(right.lse), y, 0.0)[..., None] for y in (g, r))
            b, s = b[..., None], s[..., None]
        if not np.isfinite(g).all():
            result[name] = np.inf
            continue
        slope = slope_test(g - r, r, b, s)
        result[name] = slope.value / slope.limit if slope.limit else 0.0
    return result


def judged(kind: str, row: str, x: Inputs, *kernels: Tensors) -> list[dict[str, float]]:
    """The largest budget used per tensor, as a judge computes it: what a verdict hangs on."""
    right = emulation.exact_attention(x)
    deterministic = bounds(x, row, "deterministic")
    limits = list(deterministic)
    if kind in GENERIC_KINDS:
        statistical, shared = bounds(x, row, "statistical"), bounds(x, row, "shared")
        limits = [np.minimum(d, s) for d, s in zip(deterministic, statistical)]
    verdicts = []
    for got in kernels:
        used = {
            name: float(np.max(budget_used(g, r, b), initial=0.0))
            for name, g, r, b in zip(NAMES, got, right, limits)
        }
        if kind in GENERIC_KINDS:
            for name, slope in slopes(got, right, statistical, shared).items():
                used[name + " slope"] = slope
        verdicts.append(used)
    return verdicts


@pytest.mark.parametrize("row", ROWS)
def test_right_kernels_stay_within_their_bounds(row: str) -> None:
    """NUMERICS 2: deterministic always, min(both) and the slope on generic kinds."""
    largest: dict[tuple[str, str], list[float]] = {}
    for kind in KINDS:
        for seed in range(CASES_PER_KIND):
            # a statistical exceedance counts if 3 fresh draws do not clear it
            for redraw in range(4):
                rng = generator(ROWS.index(row), KINDS.index(kind), seed, redraw)
                x = emulation.inputs(kind, row, rng)
                way = draw_way(rng, row)
                with np.errstate(over="raise", divide="raise", invalid="raise"):
                    deterministic = bounds(x, row, "deterministic")
                    statistical = bounds(x, row, "statistical")
                got, right = computed(x, row, way), emulation.exact_attention(x)
                generic = kind in GENERIC_KINDS
                slope = {}
                if generic:
                    slope = slopes(got, right, statistical, bounds(x, row, "shared"))
                doubtful = [f"{name} slope {z:.2f}" for name, z in slope.items() if z > 1]
                for name, g, r, d, s in zip(NAMES, got, right, deterministic, statistical):
                    used = float(np.max(budget_used(g, r, d), initial=0.0))
                    assert used <= 1, f"{row}, {kind}, seed {seed}, {way}: {name} uses {used}"
                    largest.setdefault(("deterministic", name), []).append(used)
                    if generic:
                        used = float(np.max(budget_used(g, r, s), initial=0.0))
                        largest.setdefault(("statistical", name), []).append(used)
                        largest.setdefault(("slope", name), []).append(slope[name])
                        if used > 1:
                            doubtful.append(f"{name} {used:.2f}")
                if not doubtful:
                    break
            else:
                pytest.fail(f"{row}, {kind}, seed {seed}, {way}: four times over: {doubtful}")
    print(f"\nbudget used by right kernels, {row}: largest of a case, max (99th percentile)")
    for check in ("deterministic", "statistical", "slope"):
        cells = (largest[check, name] for name in NAMES)
        line = "  ".join(
            f"{name} {max(z):.3f} ({np.percentile(z, 99):.3f})" for name, z in zip(NAMES, cells)
        )
        print(f"  {check:13}  {line}")


@pytest.mark.parametrize("row", ROWS)
def test_worst_cases_of_one_or_two_keys_stay_within_their_bounds(row: str) -> None:
    """Few roundings conspire more often than many: a term too few in a bound shows here."""
    largest = dict.fromkeys(NAMES, 0.0)
    for seed in range(400):
        rng = generator(10, ROWS.index(row), seed)
        group, columns, head_dim, value_dim = (int(n) for n in rng.integers(1, 3, 4))
        sizes = (1, group, 1, columns, head_dim, value_dim)
        kind = str(rng.choice(["integers", "one_hot_v", "equal", "randn", "heavy", "tiny"]))
        everything = np.ones((1, group, 1, columns), np.int64)
        x = emulation.inputs(kind, row, rng, sizes=sizes, mask=everything)
        way = draw_way(rng, row)
        got, right = computed(x, row, way), emulation.exact_attention(x)
        for name, g, r, b in zip(NAMES, got, right, bounds(x, row, "deterministic")):
            used = float(np.max(budget_used(g, r, b), initial=0.0))
            assert used <= 1, f"{row}, {kind}, seed {seed}, {way}: {name} uses {used}"
            largest[name] = max(largest[name], used)
    cells = "  ".join(f"{name} {used:.3f}" for name, used in largest.items())
    print(f"\nbudget used by right kernels of one or two keys, {row}: {cells}")


@pytest.mark.parametrize("row", ["fp64", "fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", GENERIC_KINDS)
def test_quadrature_holds_over_many_keys_and_rows(row: str, kind: str) -> None:
    """The statistical form and the slope win by sqrt(n): they must hold where n is not small."""
    for redraw in range(4):
        rng = generator(11, ROWS.index(row), KINDS.index(kind), redraw)
        x = emulation.inputs(
            kind, row, rng, sizes=(1, 2, 48, 200, 8, 4), mask=np.ones((1, 2, 48, 200), np.int64)
        )
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
    x = emulation.inputs(
        kind, row, rng, sizes=(kv_heads, group, q_len, columns, head_dim, value_dim)
    )
    got, right = computed(x, row, draw_way(rng, row)), emulation.exact_attention(x)
    limits = bounds(x, row, "deterministic")
    for name, g, r, b in zip(NAMES, got, right, limits):
        assert np.max(budget_used(g, r, b), initial=0.0) <= 1, name
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


@pytest.mark.parametrize("row", ["fp32", "tf32", "bf16", "fp16", "bf16-head"])
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
        x = emulation.inputs(kind, row, rng, sizes=(2, 2, rows, columns, 8, 8), mask=mask)
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
        x = emulation.inputs(
            "randn", row, rng, sizes=(1, 2, 6, 12, 4, 3), mask=np.ones((1, 2, 6, 12), np.int64)
        )
        for size in (1e4, 1e8):
            y = x._replace(q=emulation.rounded(x.q * size, row))
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
    x = emulation.inputs(
        "flat", "fp16", generator(15), sizes=(1, 1, 4, 4, 2, 2), mask=np.ones((1, 1, 4, 4), int)
    )
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
    x = emulation.inputs("randn", "fp32", rng, sizes=(1, 2, 5, 7, 4, 3), mask=mask)
    k, v = x.k.copy(), x.v.copy()
    k[:, :, 3], v[:, :, 3] = np.inf, np.nan
    for form in FORMS:
        for mine, other in zip(bounds(x, "fp32", form), bounds(x._replace(k=k, v=v), "fp32", form)):
            assert np.array_equal(mine, other)


def test_multiplicity_two_is_the_same_key_twice() -> None:
    """The bound of a key counted twice is that of two equal keys (A1)."""
    rng = generator(17)
    mask = np.ones((1, 2, 5, 7), np.int64)
    x = emulation.inputs("randn", "bf16", rng, sizes=(1, 2, 5, 7, 4, 3), mask=mask)
    mask = mask.copy()
    mask[..., 6] = 2
    twice = np.r_[0:7, 6]
    y = x._replace(k=x.k[:, :, twice], v=x.v[:, :, twice], mask=np.ones((1, 2, 5, 8), np.int64))
    once = bounds(x._replace(mask=mask), "bf16", "deterministic")
    spread = bounds(y, "bf16", "deterministic")
    for mine, other in zip(once[:3], spread[:3]):
        # both are float64 sums of the same terms in another order
        assert np.max(np.abs(mine - other) / other) < 2.0**-40


@pytest.mark.parametrize("form", FORMS)
def test_finer_arithmetic_has_smaller_bounds(form: str) -> None:
    rng = generator(18)
    x = emulation.inputs(
        "randn", "bf16", rng, sizes=(1, 2, 9, 9, 4, 4), mask=np.ones((1, 2, 9, 9), np.int64)
    )
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
    bound = attention_bounds(
        q, k, v, np.ones((1, 1, 1, columns), int), numerics="fp64", form="deterministic"
    )
    assert bound.dq is None and bound.dk is None and bound.dv is None
    assert abs(Fraction(mine) - exact) <= Fraction(float(bound.out.item()))


def test_a_stored_delta_takes_d_lse_with_it() -> None:
    """D - d_lse is rounded to 16 bits, then dS, then dq: three roundings of d_lse k.

    One key and 4000 rows, so that in some row all three are near their worst; the bound must
    hold there, and does not without d_lse in delta's rounding.
    """
    rng, rows = generator(27), 4000
    d_lse = rng.uniform(1.0, 1.02, (1, 1, rows)).astype(np.float32).astype(np.float64)
    x = Inputs(
        q=np.zeros((1, 1, rows, 1)),
        k=emulation.rounded(np.array([[[[1.37]]]]), "fp16"),
        v=emulation.rounded(np.array([[[[0.7]]]]), "fp16"),
        mask=np.ones((1, 1, rows, 1), np.int64),
        d_out=emulation.rounded(rng.uniform(0.01, 0.02, (1, 1, rows, 1)), "fp16"),
        d_lse=d_lse,
        scale=1.0,
    )
    got, right = computed(x, "fp16", SEQUENTIAL), emulation.exact_attention(x)
    error, bound = np.abs(got.dq - right.dq), bounds(x, "fp16", "deterministic").dq
    assert (error <= bound).all()
    of_d_lse = NUMERICS["fp16"].u_delta * np.abs(d_lse)[..., None] * np.abs(x.k)
    assert (error > bound - of_d_lse).any()


def test_the_slope_knows_what_rows_share() -> None:
    """Every row that reads one key in tf32 carries the same rounding of its v."""
    rng = generator(26)
    mask = np.ones((1, 4, 400, 1), np.int64)
    worst = 0.0
    for _ in range(10):
        x = emulation.inputs("randn", "tf32", rng, sizes=(1, 4, 400, 1, 2, 1), mask=mask)
        got = computed(x, "tf32", SEQUENTIAL)
        right = emulation.exact_attention(x)
        noise = bounds(x, "tf32", "statistical")
        assert slopes(got, right, noise, bounds(x, "tf32", "shared"))["out"] <= 1
        alone = slope_test(got.out - right.out, right.out, noise.out, 0.0 * noise.out)
        worst = max(worst, alone.value / alone.limit)
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
    q, k, v = np.ones((1, 1, 2, 1)), np.ones((1, 1, 3, 1)), np.ones((1, 1, 3, 1))
    d_out = np.ones((1, 1, 2, 1))
    if large == "logit":
        q[0, 0, 0], k[0, 0, 0] = 300.0, 300.0
    else:
        d_out[0, 0, 0], v[0, 0, 0] = 300.0, 300.0
    mask, sizes = np.ones((2, 3), int), {"form": "deterministic", "scale": 1e-4}
    found = attention_bounds(q, k, v, mask, d_out, numerics="fp16-eager", **sizes)
    assert np.isinf(found.dq[0, 0, 0]).all() and np.isinf(found.dk).all()
    if large == "logit":
        assert np.isinf(found.lse[0, 0, 0]) and np.isinf(found.dv).all()
    # the other row is its own, and a kernel that stores neither has a bound everywhere
    assert np.isfinite(found.dq[0, 0, 1]).all() and np.isfinite(found.lse[0, 0, 1])
    for bound in attention_bounds(q, k, v, mask, d_out, numerics="fp16", **sizes):
        assert np.isfinite(bound).all()


def test_bad_arguments_are_named() -> None:
    q, k, mask = np.zeros((1, 2, 3, 4)), np.zeros((1, 1, 5, 4)), np.ones((3, 5), int)
    with pytest.raises(ValueError, match="numerics='fp8' must be one of 'fp64', 'fp32'"):
        attention_bounds(q, k, k, mask, numerics="fp8", form="deterministic")
    with pytest.raises(ValueError, match="form='worst' must be one of 'deterministic'"):
        attention_bounds(q, k, k, mask, numerics="fp32", form="worst")
    with pytest.raises(ValueError, match=r"k has shape \(1, 1, 5, 3\); it must be"):
        attention_bounds(q, k[..., :3], k, mask, numerics="fp32", form="deterministic")
    with pytest.raises(ValueError, match="d_lse was given without d_out"):
        attention_bounds(
            q, k, k, mask, d_lse=np.zeros((1, 2, 3)), numerics="fp32", form="deterministic"
        )
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\); it must broadcast"):
        attention_bounds(q, k, k, np.ones((2, 2), int), numerics="fp32", form="deterministic")
    with pytest.raises(ValueError, match=r"kv_heads \(axis 1 of k\)=0 must be at least 1"):
        attention_bounds(q, k[:, :0], k[:, :0], mask, numerics="fp32", form="deterministic")
    how: dict[str, Any] = {
        "numerics": "fp32",
        "sizes": Sizes(compress_block_size=2, compress_map="linear"),
    }
    with pytest.raises(ValueError, match=r"weights has \['bias'\]; compress_map='linear' takes"):
        pool_bounds(k, {"bias": np.zeros(4)}, **how)
    weights = {"weight": np.zeros((4, 7)), "bias": np.zeros(4)}
    with pytest.raises(ValueError, match=r"weights\['weight'\] has shape \(4, 7\).*\(4, 8\)"):
        pool_bounds(k, weights, **how)


# ---- compression maps


def pooled(
    row: str, rng: np.random.Generator, compress_map: str, wrong: type[CompressionMap] | None = None
) -> dict[str, tuple[Array, Array, Array]]:
    """(computed, reference, bound) of every tensor of one random compression map."""
    length, stride = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    kv_len, dim, heads = int(rng.integers(0, 20)), int(rng.integers(1, 5)), 2
    alignment = str(rng.choice(["start", "end"]))
    if wrong:
        length, stride, kv_len, alignment = 4, 2, 18, "end"
    case = Case(
        q_heads=heads,
        kv_heads=heads,
        kv_len=kv_len,
        compress_block_size=length,
        compress_block_sliding_stride=stride,
        selection_block_size=stride,
        compress_map=compress_map,
        semantics=Semantics(compress_alignment=alignment),
    )

    def normal(*shape: int) -> Array:
        return emulation.rounded(rng.standard_normal(shape), row)

    weights = {"positions": normal(heads, length, dim)} if wrong or rng.random() < 0.7 else {}
    weights |= emulation.pool_weights(rng, row, compress_map, heads, length, dim, hidden=6)
    x, d_out = normal(2, heads, kv_len, dim), normal(2, heads, case.num_compress_blocks, dim)
    limits = pool_bounds(x, weights, d_out, sizes=case, semantics=case.semantics, numerics=row)
    arrays, order = (x, weights, d_out), str(rng.choice(emulation.ORDERS))
    got = emulation.pooled(case, row, order, *arrays, wrong or CompressionMap)
    right = emulation.pooled(case, "fp64", "sequential", *arrays)
    assert limits.dx is not None and limits.dweights is not None
    result = {"out": (got[0], right[0], limits.out), "dx": (got[1], right[1], limits.dx)}
    for key in weights:
        result[key] = got[2][key], right[2][key], limits.dweights[key]
    return result


@pytest.mark.parametrize("compress_map", COMPRESS_MAPS)
@pytest.mark.parametrize("row", ["fp64", "fp32", "tf32", "bf16", "fp16"])
def test_right_compression_maps_stay_within_their_bounds(row: str, compress_map: str) -> None:
    """C1, C4, layer by layer, windows at both alignments, with and without positions."""
    largest: dict[str, float] = {}
    for seed in range(60):
        rng = generator(20, ROWS.index(row), seed)
        for name, (got, right, bound) in pooled(row, rng, compress_map).items():
            used = float(np.max(budget_used(got, right, bound), initial=0.0))
            assert used <= 1, f"seed {seed}: {name} uses {used}"
            largest[name] = max(used, largest.get(name, 0.0))
    cells = "  ".join(f"{name} {used:.3f}" for name, used in largest.items())
    print(f"\nbudget used by right compression maps, {row}, {compress_map}: {cells}")


@pytest.mark.parametrize("row", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("compress_map", "wrong"),
    [
        ("mean", compression.MeanOfRealTokens),
        ("linear", compression.NoPositions),
        ("linear_per_head", compression.FirstHeadsMap),
        ("mlp", compression.ReluPassesAll),
    ],
)
def test_wrong_compression_maps_exceed_their_bounds(
    compress_map: str, wrong: type[CompressionMap], row: str
) -> None:
    for seed in range(12):
        rng = generator(21, ROWS.index(row), seed)
        results = pooled(row, rng, compress_map, wrong)
        assert max(np.max(budget_used(*each)) for each in results.values()) > 1


# ---- scores of the selection


def scored(
    row: str, rng: np.random.Generator, wrong: type[Selector] | None = None
) -> tuple[Array, Array, Array]:
    """(computed, reference, bound) of the overlap scores of one random case."""
    group, memory = int(rng.integers(1, 4)), 1 if wrong else int(rng.integers(0, 3))
    case = Case(
        dtype=NUMERICS[row].dtype,
        q_heads=2 * group,
        kv_heads=2,
        q_len=10,
        kv_len=10,
        head_dim=4,
        compress_block_size=2,
        selection_block_size=3,
        num_mem_kv=memory,
    )
    size = float(rng.choice([1.0, 3.0]))
    q = emulation.rounded(rng.standard_normal((1, case.q_heads, 10, 4)) * size, row)
    k = emulation.rounded(rng.standard_normal((1, 2, memory + case.num_compress_blocks, 4)), row)
    k_cmp, mem_k = k[:, :, memory:], k[:, :, :memory]
    definition = Selector(row="fp64")
    how = {"visible": definition.compress_mask(case), "counts": definition.overlap(case)}
    bound = score_bounds(q, k_cmp, mem_k, numerics=row, **how)
    order = str(rng.choice(emulation.ORDERS))
    with np.errstate(invalid="ignore"):
        got = (wrong or Selector)(Way(order=order), row).scores(case, q, k_cmp, mem_k)
        exact = dataclasses.replace(case, dtype="float64")
        right = definition.scores(exact, q, k_cmp, mem_k)
    return got.astype(np.float64), right, bound


@pytest.mark.parametrize("row", ["fp64", "fp32", "tf32", "bf16", "fp16"])
def test_right_scores_stay_within_their_bounds_and_wrong_ones_do_not(row: str) -> None:
    """I1-I3, eq. 9 and 10: softmax with memory, overlap in strides, sum over the group."""
    largest = 0.0
    for seed in range(100):
        rng = generator(22, ROWS.index(row), seed)
        largest = max(largest, float(np.max(budget_used(*scored(row, rng)))))
    assert largest <= 1
    print(f"\nbudget used by right scores, {row}: {largest:.3f}")
    for wrong in (selection.MemoryOutsideSoftmax, selection.EquationNineShifted):
        for seed in range(12):
            assert np.max(budget_used(*scored(row, generator(23, seed), wrong))) > 1, wrong


def test_scores_bound_each_head_apart_and_take_errors_of_the_keys() -> None:
    """With share_selection=False the heads' bounds add up to less than the group's."""
    rng, how = generator(24), {"num_mem_kv": 1, "selection_block_size": 2, "head_dim": 3}
    semantics = Semantics(causal=False)
    case = Case(q_heads=4, kv_heads=2, q_len=5, kv_len=6, semantics=semantics, **how)
    q, k = rng.standard_normal((1, 4, 5, 3)), rng.standard_normal((1, 2, 6, 3))
    memory, counts = rng.standard_normal((1, 2, 1, 3)), np.repeat(np.eye(3, dtype=int), 2, axis=0)
    visible = np.ones((5, 7), np.int64)

    def bound(**more: Any) -> Array:
        return score_bounds(q, k, memory, visible=visible, counts=counts, numerics="fp32", **more)

    shared, single = bound(), bound(share_selection=False)
    assert shared.shape == (1, 2, 5, 3) and single.shape == (1, 4, 5, 3)
    assert (single.reshape(1, 2, 2, 5, 3).sum(axis=2) <= shared).all()
    right = Selector().scores(case, q, k, memory)
    for name, exact in (("k_cmp", k), ("q", q)):
        wrong = np.full(exact.shape, 1e-3)
        signs = np.where(rng.random(exact.shape) < 0.5, -1.0, 1.0)
        limit = bound(**{f"{name}_error": wrong})
        off = {"q": q, "k_cmp": k, name: exact + signs * wrong}
        moved = Selector().scores(case, off["q"], off["k_cmp"], memory)
        assert (np.abs(moved - right) <= limit).all() and (np.abs(moved - right) > shared).any()


def logit_means(
    q: Array,
    k: Array,
    visible: Array,
    strides: int,
    order: str,
    *,
    share_selection: bool,
    invisible: float,
    factor: float = 1.0,
) -> Array:
    """Upstream's scores in q's dtype: mean over l' / d strides, then over the group."""
    dtype = q.dtype.type
    kv_heads, blocks = k.shape[1:3]
    heads, q_len, head_dim = q.shape[1:]
    group, whole = heads // kv_heads, blocks // strides
    keys = np.repeat(k[0], group, axis=0)
    s = add_up(q[0][:, :, None] * keys[:, None], order)
    s = np.where(visible, s * dtype(factor * head_dim**-0.5), dtype(invisible))
    s = s[..., : whole * strides].reshape(kv_heads, group, q_len, whole, strides)
    s = add_up(s / dtype(strides), order)
    if share_selection:
        return add_up(np.moveaxis(s / dtype(group), 1, -1), order)[None]
    return s.reshape(1, heads, q_len, whole)


@pytest.mark.parametrize("share_selection", [True, False])
@pytest.mark.parametrize("row", ["fp32", "bf16", "fp16"])
def test_means_of_logits_stay_within_their_bounds_and_wrong_ones_do_not(
    row: str, share_selection: bool
) -> None:
    """I3, "logit_mean": the mean over the group and over l' / d strides, in float32."""
    far = -float(np.float32(NUMERICS[row].largest / 10))
    for seed in range(60):
        rng = generator(25, ROWS.index(row), seed)
        group, q_len, blocks, strides = int(rng.integers(1, 4)), 7, 11, int(rng.integers(1, 4))
        visible = rng.random((q_len, blocks)) < 0.9
        q = emulation.rounded(rng.standard_normal((1, 2 * group, q_len, 5)) * 3, row)
        k = emulation.rounded(rng.standard_normal((1, 2, blocks, 5)), row)
        limit = logit_mean_bounds(
            q,
            k,
            visible=visible,
            strides_per_block=strides,
            numerics=row,
            share_selection=share_selection,
        )
        q32, k32, order = q.astype("f4"), k.astype("f4"), str(rng.choice(emulation.ORDERS))
        how: dict[str, Any] = {"share_selection": share_selection, "invisible": far}
        right = logit_means(q, k, visible, strides, "sequential", **how)
        got = logit_means(q32, k32, visible, strides, order, **how)
        assert np.max(budget_used(got.astype("f8"), right, limit)) <= 1
        moved = logit_means(1.01 * q, 0.99 * k, visible, strides, "sequential", **how)
        errors = {"q_error": 0.01 * np.abs(q), "k_cmp_error": 0.01 * np.abs(k)}
        wider = logit_mean_bounds(
            q,
            k,
            visible=visible,
            strides_per_block=strides,
            numerics=row,
            share_selection=share_selection,
            **errors,
        )
        assert np.max(budget_used(moved, right, wider)) <= 1 and (wider >= limit).all()
        off = logit_means(q32, k32, visible, strides, order, factor=1.01, **how)
        assert np.max(budget_used(off.astype("f8"), right, limit)) > 1
