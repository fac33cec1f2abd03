"""Laws that need no oracle: what full causal attention, linearity and causality demand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nsa_ref.testing.branches import FINE, GRADIENTS, Branch, Inputs, call
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.compare import check_bits, compare
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.properties import masks
from nsa_ref.testing.properties.common import (
    Outcome,
    Property,
    bounds_of,
    chooses_lengths,
    compare_all,
    expected_of,
    is_declared,
    set_up,
    settle,
)
from nsa_ref.testing.properties.values import sent_back, upstream
from nsa_ref.testing.strategies import fresh_seeds
from nsa_ref.testing.verdicts import Broken, Inconclusive, Remark


def _full_causal_attention(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Textbook attention over keys j <= p, and its mask: a definition beside the oracle's loops."""
    position = np.arange(case.q_len)[:, None] + case.kv_len - case.q_len
    mask = np.broadcast_to(
        np.arange(case.kv_len)[None, :] <= position,
        (case.batch, case.q_heads, case.q_len, case.kv_len),
    )
    q, k, v = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
    k, v = (np.repeat(x, case.group_size, axis=1) for x in (k, v))
    scores = np.where(mask, case.scale * np.einsum("bhtd,bhjd->bhtj", q, k), -np.inf)
    peak = scores.max(-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    share = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhtj,bhjd->bhtd", share, v), mask.astype(np.int64)


def _covers_everything(branch: Branch, case: Case) -> bool:
    """By the sizes alone; a size in the implementation's `limits` is not ours to choose."""
    if branch is FINE:
        return case.indices == "all" and case.num_selected_blocks >= case.num_selection_blocks
    return case.sliding_window_size + case.semantics.window_closed >= case.kv_len


def _blame_the_values(
    prop: Property,
    implementation: Implementation,
    case: Case,
    inputs: Inputs,
    mask: np.ndarray,
    out: np.ndarray,
) -> None:
    """What breaks a law about a mask may have the right mask, and wrong values.

    Raises
    ------
    Broken : for the mask, if the forward reads another one; else A1, if these values are wrong
    """
    masks.blame_the_mask(implementation, case, prop)
    branch, sees = prop.the_branch, (mask != 0).any(-1)[..., None]
    expected = branch.attend(case, mask, inputs).out
    bound = bounds_of(branch, implementation, case, inputs, mask).out
    compare("A1", f"{branch.name} out", np.where(sees, out, expected), expected, bound)


def full_causal(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """Where everything is visible, a branch is full causal attention."""
    branch = prop.the_branch
    if not _covers_everything(branch, case):
        raise Inconclusive("never all visible")
    inputs = branch.inputs(case)
    expected, mask = _full_causal_attention(case, inputs)
    if branch.empty_row(case) != "zero" and (mask.sum(-1) == 0).any():
        raise Inconclusive("empty rows")
    actual = branch.forward(implementation, case, inputs).out
    hard = bounds_of(branch, implementation, case, inputs, mask)
    source = "full causal attention"
    name = f"{branch.name} out"
    try:
        compared = compare(prop.clause, name, actual, expected, hard.out, source=source)
    except Broken:
        _blame_the_values(prop, implementation, case, inputs, mask, actual)
        raise
    return settle([compared])


def linear_in_v(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A1: out(v1) + out(v2) = out(v1 + v2); small integers, so that the sum of values is exact."""
    branch, inputs, mask = set_up(prop, case)
    rng = case.generator("second values")
    values = rng.integers(-8, 9, (2, *inputs.v.shape)).astype(DTYPES[case.dtype])
    one, two, both = (
        dataclasses.replace(inputs, v=v.astype(DTYPES[case.dtype]))
        for v in (values[0], values[1], values[0] + values[1])
    )
    outs = [branch.forward(implementation, case, x).out for x in (one, two, both)]
    bound = sum(bounds_of(branch, implementation, case, x, mask).out for x in (one, two, both))
    name, total = f"{branch.name} out(v1) + out(v2)", outs[0] + outs[1]
    return settle([compare("A1", name, total, outs[2], np.asarray(bound), source="out(v1 + v2)")])


def permutation(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A1: batch entries and kv heads, with their groups, do not know of each other."""
    branch, inputs, mask = set_up(prop, case)
    rng = case.generator("permutation")
    batch, heads = rng.permutation(case.batch), rng.permutation(case.kv_heads)

    def moved(x: np.ndarray) -> np.ndarray:
        grouped = x.reshape(case.batch, case.kv_heads, x.shape[1] // case.kv_heads, *x.shape[2:])
        return grouped[batch][:, heads].reshape(x.shape)

    out = branch.forward(implementation, case, inputs).out
    other = branch.forward(implementation, case, inputs.changed(moved, moved)).out
    bound = 2 * bounds_of(branch, implementation, case, inputs, mask).out
    name, part = f"{branch.name} out", "of permuted batch entries and kv heads"
    source = "out before they were permuted"
    compared = compare("A1", name, other, moved(out), moved(bound), part=part, source=source)
    return settle([compared])


def prefix(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """Causality: taking the last tokens away leaves the rows before them as they are."""
    if min(case.q_len, case.kv_len) < 2:
        raise Inconclusive("too short to cut")
    branch, inputs, mask = set_up(prop, case)
    generator = chooses_lengths(implementation, case).generator("prefix")
    for cut in generator.permutation(min(case.q_len, case.kv_len) - 1) + 1:
        q_len, kv_len = int(case.q_len - cut), int(case.kv_len - cut)
        short = dataclasses.replace(case, q_len=q_len, kv_len=kv_len)
        if is_declared(implementation, short, case):
            break
    else:
        raise NotOffered("no shorter length is supported")
    rows, columns = short.q_len, branch.columns(short)
    less = inputs.changed(lambda x: x[:, :, :rows], lambda x: x[:, :, :columns])
    whole = branch.forward(implementation, case, inputs).out
    out = whole[:, :, :rows]
    other = branch.forward(implementation, short, less).out
    bound = 2 * bounds_of(branch, implementation, case, inputs, mask).out
    name, part = f"{branch.name} out", f"without the last {cut} tokens"
    clause = branch.mask_clause(case)
    # an empty row may be the mean of all columns, whose number has changed
    sees = (mask != 0).any(-1)[:, :, :rows, None]
    if np.isnan(out[sees[..., 0]]).any():
        # NaN stays NaN, whatever was taken away
        _blame_the_values(prop, implementation, case, inputs, mask, whole)
    tensors = np.where(sees, other, out), out, bound[:, :, :rows]
    try:
        compared = compare(clause, name, *tensors, part=part, source="out with them")
    except Broken:
        _blame_the_values(prop, implementation, case, inputs, mask, whole)
        _blame_the_values(prop, implementation, short, less, mask[:, :, :rows, :columns], other)
        raise
    return settle([compared])


def same_bits(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """What states to be deterministic gives the same bits for the same call."""
    branch = prop.the_branch
    inputs = branch.inputs(case)
    d = upstream(branch, implementation, case, inputs) if prop.backward else ()
    before, after = (branch.tensors(implementation, case, inputs, *d) for _ in range(2))
    sizes = [x.size for x in before.values()]
    for name, one in before.items():
        other = after.get(name, one)  # an lse that is there once has nothing to differ from
        why, part = "`deterministic` is stated", "of the same call again"
        check_bits(prop.clause, f"{branch.name} {name}", other, one, part=part, why=why)
    return Outcome(compared=sum(sizes) if all(sizes) else 0)  # gradients of no row are 0


def in_pairs(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A1, A3: a call leaves the result of the one before as it is, and takes nothing from it."""
    branch, inputs, mask = set_up(prop, case)
    earlier = fresh_seeds(case, 1)[0]
    of_both: list[tuple[Any, ...]] = []
    for each in (earlier, case):
        given = branch.inputs(each)
        d: tuple[np.ndarray, ...] = ()
        if prop.backward:
            d = sent_back(branch, each, branch.mask(each, given.block_indices), of_lse=False)
        of_both.append((*branch.arguments(each, given), *d))
    found = call(implementation.run_twice, prop.called, case, *of_both)
    results: list[tuple[np.ndarray, ...]]
    if prop.backward:
        results = [branch.gradients(case, inputs, result) for result in found]
    else:
        results = [branch.attention(case, result) for result in found]
    sent = of_both[1][-2:] if prop.backward else ()
    expected, bounds = expected_of(prop, implementation, case, inputs, mask, *sent)
    before, after, actual = results
    why, part = "the next call has changed it", "of the call before"
    for name, one, other in zip(GRADIENTS if prop.backward else ("out", "lse"), before, after):
        if one is not None:
            check_bits(prop.clause, f"{branch.name} {name}", other, one, part=part, why=why)
    return compare_all(prop, actual, expected, bounds, part="of a second call")


def unstated(implementation: Implementation) -> Remark | None:
    """Why determinism is not tried."""
    return None if implementation.deterministic else ("determinism unstated",)
