"""`nsa_ref.selection_bounds`: no right scores exceed their bounds, all wrong ones do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from attention_inputs import ORDERS, ROWS, Generator, generator, rounded
from budgets import Array, Budgets, budget_used
from nsa_ref.numerics import NUMERICS
from nsa_ref.rounded import Rounded
from nsa_ref.selection_bounds import score_bounds
from nsa_ref.semantics import Semantics
from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants import selection
from nsa_ref.testing.mutants.rounding import Way, add_up
from nsa_ref.testing.mutants.selection import Selector


def bound(case: Case, q: Any, k_cmp: Any, mem_k: Array, row: str) -> Array:
    how: dict[str, Any] = {"kv_len": case.kv_len, "sizes": case, "semantics": case.semantics}
    return score_bounds(q, k_cmp, mem_k, **how, numerics=row)


def scored(
    row: str, rng: Generator, wrong: type[Selector] | None = None
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
    q = rounded(rng.standard_normal((1, case.q_heads, 10, 4)) * size, row)
    k = rounded(rng.standard_normal((1, 2, memory + case.num_compress_blocks, 4)), row)
    arrays = q, k[:, :, memory:], k[:, :, :memory]
    order = str(rng.choice(ORDERS))
    with np.errstate(invalid="ignore"):
        got = (wrong or Selector)(Way(order=order), row).scores(case, *arrays)
        right = Selector().scores(dataclasses.replace(case, dtype="float64"), *arrays)
    return got.astype(np.float64), right, bound(case, *arrays, row)


@pytest.mark.parametrize("row", ["fp64", "fp32", "tf32", "bf16", "fp16"])
def test_right_scores_stay_within_their_bounds_and_wrong_ones_do_not(row: str) -> None:
    """I1-I3, eq. 9 and 10: softmax with memory, overlap in strides, sum over the group."""
    budgets = Budgets()
    for seed in range(100):
        budgets.add("scores", *scored(row, generator(22, ROWS.index(row), seed)), where=seed)
    budgets.print(f"right scores, {row}")
    for wrong in (selection.MemoryOutsideSoftmax, selection.EquationNineShifted):
        for seed in range(12):
            assert budget_used(*scored(row, generator(23, seed), wrong)) > 1, wrong


def test_scores_bound_each_head_apart_and_take_errors_of_the_keys() -> None:
    """With share_selection=False the heads' bounds add up to less than the group's."""
    rng, how = generator(24), {"num_mem_kv": 1, "selection_block_size": 2, "head_dim": 3}
    together, apart = (Semantics(causal=False, share_selection=share) for share in (True, False))
    case = Case(q_heads=4, kv_heads=2, q_len=5, kv_len=6, semantics=together, **how)
    given = {
        "q": rng.standard_normal((1, 4, 5, 3)),
        "k_cmp": rng.standard_normal((1, 2, 6, 3)),
        "mem_k": rng.standard_normal((1, 2, 1, 3)),
    }
    shared = bound(case, **given, row="fp32")
    single = bound(dataclasses.replace(case, semantics=apart), **given, row="fp32")
    assert shared.shape == (1, 2, 5, 3) and single.shape == (1, 4, 5, 3)
    assert (single.reshape(1, 2, 2, 5, 3).sum(axis=2) <= shared).all()
    right = Selector().scores(case, **given)
    for name in ("k_cmp", "q"):
        wrong = np.full(given[name].shape, 1e-3)
        signs = np.where(rng.random(wrong.shape) < 0.5, -1.0, 1.0)
        limit = bound(case, **(given | {name: Rounded(given[name], wrong)}), row="fp32")
        moved = Selector().scores(case, **given | {name: given[name] + signs * wrong})
        assert (np.abs(moved - right) <= limit).all() and (np.abs(moved - right) > shared).any()


@pytest.mark.parametrize("row", ["fp64", "fp32", "bf16", "fp16-eager"])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_a_forced_score_that_is_rounded_and_added_up_stays_within_its_bound(
    row: str, group: int
) -> None:
    """I4: 0.1 is no number of any dtype, and sixteen of them round at every step."""
    semantics = Semantics(forced_score=0.1)
    how = {"dtype": NUMERICS[row].dtype, "q_heads": group, "num_initial_blocks": 1}
    case = Case(q_len=2, kv_len=2, num_local_blocks=0, semantics=semantics, **how)
    q, k_cmp, _, mem_k, _ = case.compressed()
    limit = bound(case, q, k_cmp, mem_k, row)[..., 0]
    stores = np.dtype("f2") if row == "fp16-eager" else np.dtype("f8" if row == "fp64" else "f4")
    once, total = stores.type(0.1), stores.type(0)
    for _ in range(group):
        total = stores.type(total + once)
    error = abs(float(total) - group * 0.1)
    assert (error <= limit).all() and (limit < group * 0.002).all()


def softmax_of_means(
    case: Case, q: Array, k: Array, order: str, *, invisible: float, factor: float = 1.0
) -> Array:
    """Upstream's scores in q's dtype: mean over l' / d strides, over the group, then softmax."""
    dtype, strides = q.dtype.type, case.strides_per_selection_block
    whole = case.num_compress_blocks // strides
    keys = np.repeat(k[0], case.group_size, axis=0)
    s = add_up(q[0][:, :, None] * keys[:, None], order)
    visible = Selector().compress_mask(case)
    s = np.where(visible, s * dtype(factor * case.scale), dtype(invisible))
    s = s[..., : whole * strides].reshape(2, case.group_size, case.q_len, whole, strides)
    s = add_up(s / dtype(strides), order)
    if case.semantics.share_selection:
        s = add_up(np.moveaxis(s / dtype(case.group_size), 1, -1), order)
    else:
        s = s.reshape(case.q_heads, case.q_len, whole)
    means = np.where(Selector().candidates(case)[:, :whole], s, dtype(-np.inf))
    pad = np.full((*s.shape[:2], 1), dtype(-1000))
    weights = np.concatenate([means, pad], axis=-1)
    weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
    return (weights / add_up(weights, order)[..., None])[None, ..., :-1]


@pytest.mark.parametrize("share_selection", [True, False])
@pytest.mark.parametrize("row", ["fp32", "bf16", "fp16"])
def test_softmaxes_of_means_stay_within_their_bounds_and_wrong_ones_do_not(
    row: str, share_selection: bool
) -> None:
    """I3, "logit_mean": the mean over the group and over l' / d strides, its softmax; float32."""
    far = -float(np.float32(NUMERICS[row].largest / 10))
    for seed in range(60):
        rng = generator(25, ROWS.index(row), seed)
        group, strides = (int(n) for n in rng.integers(1, 4, 2))
        case = Case(
            q_heads=2 * group,
            kv_heads=2,
            q_len=7,
            kv_len=11,
            head_dim=5,
            selection_block_size=strides,
            semantics=Semantics(
                importance="logit_mean",
                share_selection=share_selection,
                compress_strict=bool(seed % 2),
                causal=bool(seed % 3),
            ),
        )
        q = rounded(rng.standard_normal((1, 2 * group, 7, 5)) * 3, row)
        k = rounded(rng.standard_normal((1, 2, 11, 5)), row)
        none, whole = np.zeros((1, 2, 0, 5)), 11 // strides
        limit = bound(case, q, k, none, row)
        assert limit.shape[-1] == case.num_selection_blocks
        assert not limit[..., ~Selector().candidates(case)].any()
        limit = limit[..., :whole]
        q32, k32, order = q.astype("f4"), k.astype("f4"), str(rng.choice(ORDERS))
        right = softmax_of_means(case, q, k, "sequential", invisible=far)
        got = softmax_of_means(case, q32, k32, order, invisible=far)
        assert budget_used(got.astype("f8"), right, limit) <= 1
        moved = softmax_of_means(case, 1.01 * q, 0.99 * k, "sequential", invisible=far)
        around = (Rounded(y, 0.01 * np.abs(y)) for y in (q, k))
        wider = bound(case, *around, none, row)[..., :whole]
        assert budget_used(moved, right, wider) <= 1 and (wider >= limit).all()
        off = softmax_of_means(case, q32, k32, order, invisible=far, factor=1.01)
        assert budget_used(off.astype("f8"), right, limit) > 1
