"""Sequences too long, and tensors too large, to hold a mask of: rows and batch entries are drawn.

No N x N array is made here; an implementation that makes one runs out of memory, which is a
finding: what it cannot do belongs into its `limits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from nsa_ref.numerics import NUMERICS
from nsa_ref.testing import probes
from nsa_ref.testing.branches import COMPRESS, GRADIENTS, Branch, Inputs, call, check_dtype
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.compare import check_exact, compare, first_at, wrong_element
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.properties.common import Outcome, Property, compare_all, expected_of
from nsa_ref.testing.properties.masks import wrong_cell
from nsa_ref.testing.strategies import far_lengths, large_sizes
from nsa_ref.testing.verdicts import (
    Broken,
    Inconclusive,
    NoAnswer,
    NotTried,
    Raised,
    Remark,
    WrongElement,
)

#: Rows of a long sequence whose mask is read out, besides its ends.
ROWS_DRAWN = 48

#: Pairs of a row of a group and a column whose values and bounds are computed at once.
PAIRS = 2**20

#: How a tensor scales in a batch entry whose v is f times and whose d_out is g times as large.
FACTORS: dict[str, Callable[[float, float], float]] = {
    "out": lambda f, g: f,
    "lse": lambda f, g: 1,
    "dq": lambda f, g: f * g,
    "dk": lambda f, g: f * g,
    "dv": lambda f, g: g,
}


def _some_rows(case: Case) -> list[int]:
    """Both ends, both sides of some multiples of 128, and others."""
    rng = case.generator("rows")
    drawn = rng.integers(0, case.q_len, ROWS_DRAWN)
    tiles = rng.integers(0, case.q_len // 128 + 1, ROWS_DRAWN // 4) * 128
    rows = {0, 1, case.q_len - 2, case.q_len - 1, *drawn, *tiles, *(tiles - 1)}
    return sorted(int(t) for t in rows if 0 <= t < case.q_len)


def _row(branch: Branch, case: Case, block_indices: np.ndarray | None, t: int) -> np.ndarray:
    """The oracle's multiplicities of one row, (batch, q_heads, columns).

    The row is causal, so what follows it is not needed.
    """
    row = np.zeros((case.batch, case.q_heads, branch.columns(case)), np.int64)
    p = t + case.kv_len - case.q_len
    # a row before every token sees memory at most, as if it stood there alone without any
    q_len, kv_len = (1, p + 1) if p >= 0 else (1 - p, 1)
    alone = dataclasses.replace(case, q_len=q_len, kv_len=kv_len)
    indices = block_indices
    if indices is not None:
        indices = np.repeat(indices[:, :, t : t + 1], q_len, axis=2)
    seen = branch.mask(alone, indices)[:, :, 0]
    row[..., : seen.shape[-1]] = seen
    return row


def long_mask(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """With q = k = 0 and v of random signs, out is S / n: S the sum of n signs that a row sees.

    A flash kernel adds whole numbers and divides once. One key more or less moves S by 1, and the
    quotient by about 1 / n; a column says so where |S| times its rounding is below that. And lse
    is log n.
    """
    branch = prop.the_branch
    blank = probes.zeros(case, branch)
    # the same in all batch entries and heads: who reads another's is not what the mask is about
    signs = case.generator("signs").integers(0, 2, (1, 1, *blank.v.shape[2:])) * 2.0 - 1
    inputs = dataclasses.replace(
        blank, v=np.broadcast_to(signs, blank.v.shape).astype(blank.v.dtype, order="C")
    )
    out, lse = branch.forward(implementation, case, inputs)
    rounds, rows = NUMERICS[implementation.numerics[case.dtype]], _some_rows(case)
    heads = (case.batch, case.kv_heads, case.group_size)
    n, total = [], []
    for t in rows:
        row = _row(branch, case, blank.block_indices, t).astype(np.float64)
        n.append(row.sum(-1))
        # whole numbers: exact
        by_group = row.reshape(*heads, row.shape[-1]) @ signs
        total.append(by_group.reshape(*row.shape[:2], case.value_dim))
    count, sums = np.stack(n, axis=2), np.stack(total, axis=2)

    def sum_slack(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        # P = 1 / n, if it is stored, may underflow, and n of it are added
        relative = rounds.u_p + rounds.u_store + 2.0**-20
        return relative * np.abs(sums) + rounds.eta * count**2 + 0.25

    def count_slack(count: np.ndarray) -> np.ndarray:
        return 0.25 + 2.0**-17 * count

    sees, slack = count > 0, sum_slack(sums, count[..., None])
    with np.errstate(invalid="ignore", over="ignore"):
        summed = out[:, :, rows] * count[..., None]
        counted = None if lse is None else np.exp(lse[:, :, rows])
    told = sees[..., None] & (slack < 0.5)
    try:
        compared = compare(
            prop.clause,
            f"{branch.name} out times the number of visible keys",
            summed,
            sums,
            np.where(sees[..., None], slack, np.inf),
            why="q = k = 0, and the values of the keys that the row sees add up to that",
            rows=rows,
        )
    except Broken as broken:
        if counted is None:
            raise
        assert isinstance(broken.fault, WrongElement)
        b, h, t, _ = broken.fault.index
        # through another mask whole numbers are read as well: so many keys, and their sums
        number = counted[b, h, rows.index(t)]
        read = out[b, h, t] * np.rint(number)
        off = np.abs(number - np.rint(number)), np.abs(read - np.rint(read))
        none = np.rint(number) == 0  # an empty row is what it is declared to be
        whole = none or (off[1] <= sum_slack(read, number)).all()
        whole = off[0] <= count_slack(number) and whole
        raise broken if whole else broken.noted(clause="A1") from None
    if counted is not None:
        # raises if it is wrong; the count of keys is no budget, and no more elements than out's
        compare(
            # where the sums are told to be right, so is the number of keys
            "A1" if told.any() else prop.clause,
            f"exp({branch.name} lse)",
            counted,
            count,
            np.where(sees, count_slack(count), np.inf),
            why="q = k = 0, and the row sees so many keys",
            rows=rows,
        )
    if not sees.any():
        raise Inconclusive("no visible key")
    if not told.any():
        raise Inconclusive("rounded sums")
    return Outcome(compared=compared.elements)


def blame_the_mask(implementation: Implementation, case: Case, prop: Property) -> None:
    """Raise Broken for the mask's clause if the forward of a long sequence reads other keys."""
    about_the_mask = dataclasses.replace(prop, clause=prop.the_branch.mask_clause(case))
    try:
        long_mask(about_the_mask, implementation, case)
    except Broken as broken:
        if broken.clause == about_the_mask.clause:
            raise
    except (Raised, NoAnswer, NotOffered):
        pass


def long_backward_mask(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """With q = k = 0 and d_out one-hot in some rows, dv has the mask of those rows, exactly."""
    branch = prop.the_branch
    blank = probes.zeros(case, branch)
    rng = case.generator("one-hot rows")
    rows = sorted(rng.permutation(_some_rows(case))[: case.value_dim].tolist())
    head = int(rng.integers(0, case.group_size))
    heads = np.arange(case.kv_heads) * case.group_size + head
    shape = (case.batch, case.q_heads, case.q_len)
    d_out = np.zeros((*shape, case.value_dim), DTYPES[case.dtype])
    for c, t in enumerate(rows):
        d_out[:, heads, t, c] = 1
    d_lse = np.zeros(shape, DTYPES[case.dtype])
    _, _, dv = branch.backward(implementation, case, blank, d_out, d_lse)
    told, compared = False, 0
    for c, t in enumerate(rows):
        visible = _row(branch, case, blank.block_indices, t)[:, heads] != 0
        told |= bool(visible.any())
        compared += visible.size
        keys = visible.sum(-1, keepdims=True)
        if (missing := np.isnan(dv[..., c]) & (keys > 0)).any():
            at = first_at(missing)
            wanted = np.zeros_like(dv)
            wanted[..., c] = visible / np.maximum(keys, 1)
            why = "the mean of what the row sees, with q = k = 0"
            raise Broken("A3", wrong_element(f"{branch.name} dv", (*at, c), dv, wanted, why=why))
        seen = dv[..., c] != 0
        if branch.empty_row(case) != "zero":
            # such a row reads all columns, or none
            visible = np.where(visible.any(-1, keepdims=True), visible, seen)
        if (visible != seen).any():
            b, g, j = first_at(visible != seen)
            counts = int(visible[b, g, j]), int(seen[b, g, j])
            reading = f"{branch.name}, backward of a long sequence, read out by one-hot rows"
            fault = wrong_cell(branch, case, (b, int(heads[g]), t, j), *counts, reading, "dv")
            raise Broken("A3", fault)
    if not told:
        raise Inconclusive("no visible key")
    return Outcome(compared=compared)


def long_values(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """out and lse of a few rows within their bounds; or all gradients, when d_out is 0 elsewhere.

    Rows know nothing of each other, so the definition is asked about these alone.
    """
    branch = prop.the_branch
    inputs = branch.inputs(case)
    most = max(2, PAIRS // (case.group_size * max(1, branch.columns(case))))
    rng = case.generator("rows with values")
    rows = sorted(rng.permutation(_some_rows(case))[: min(most, 16)].tolist())
    masks = [_row(branch, case, inputs.block_indices, t) for t in rows]
    # in an empty row A2 speaks
    kept = [i for i, mask in enumerate(masks) if mask.any(-1).all()]
    if not kept:
        raise Inconclusive("empty in some head")
    rows, mask = [rows[i] for i in kept], np.stack([masks[i] for i in kept], axis=2)
    few = dataclasses.replace(case, q_len=len(rows))
    asked = Inputs(q=inputs.q[:, :, rows], k=inputs.k, v=inputs.v, block_indices=None)
    part = f"of a sequence of {case.q_len} queries"
    if not prop.backward:
        out, lse = branch.forward(implementation, case, inputs)
        found = (out[:, :, rows], None if lse is None else lse[:, :, rows])
        expected, bounds = expected_of(prop, implementation, few, asked, mask)
        return compare_all(prop, found, expected, bounds, part=part, rows=rows)
    d_out = np.zeros((*inputs.q.shape[:3], case.value_dim), inputs.q.dtype)
    d_lse = np.zeros(inputs.q.shape[:3], inputs.q.dtype)
    d_out[:, :, rows] = case.upstream_gradients()[0][:, :, rows]
    dq, dk, dv = branch.backward(implementation, case, inputs, d_out, d_lse)
    others = np.ones((case.q_len, 1), bool)
    others[rows] = False
    check_exact("A3", f"{branch.name} dq", dq, 0.0, others, why="d_out is 0 in that row")
    there = (d_out[:, :, rows], d_lse[:, :, rows])
    expected, bounds = expected_of(prop, implementation, few, asked, mask, *there)
    gradients = (dq[:, :, rows], dk, dv)
    return compare_all(prop, gradients, expected, bounds, part=part, rows=rows)


def large(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """More elements than 32 bits can count: batch entries that are alike but for powers of two.

    v and d_out are f and g times those of the first entry, and so is all that comes back. An offset
    that wraps reads, or writes, another entry. The first entry is held to its bounds.
    """
    if reason := no_large_tensors(implementation):  # others may hold the memory by now
        raise NotTried(*reason)
    branch = prop.the_branch
    alone = dataclasses.replace(case, batch=1)
    once = branch.inputs(alone)
    rng = case.generator("factors")
    f, g = (2.0 ** rng.integers(0, 4, case.batch) for _ in range(2))
    f[0] = g[0] = 1

    def spread(x: np.ndarray, factor: np.ndarray | None = None) -> np.ndarray:
        if factor is not None:
            x = x * factor.astype(x.dtype)[:, None, None, None]
        return np.broadcast_to(x, (case.batch, *x.shape[1:]))

    inputs = dataclasses.replace(once.changed(spread, spread), v=spread(once.v, f))
    arguments = branch.arguments(case, inputs)
    names: tuple[str, ...] = ("out", "lse")
    gradients: tuple[np.ndarray, ...] = ()
    if prop.backward:
        d_out, d_lse = alone.upstream_gradients()
        d_lse = np.zeros_like(d_lse)
        arguments += (spread(d_out, g), spread(d_lse))
        gradients = (d_out, d_lse)
        names = (*GRADIENTS, "dk", "dv") if branch is COMPRESS else GRADIENTS
    run = implementation.run_vjp if prop.backward else implementation.run
    found = call(run, branch.name, case, *arguments)
    if len(found) != len(names):
        raise Raised(f"{branch.name} returned {len(found)} arrays, not {len(names)}")
    for name, tensor in zip(names, found):
        if tensor is not None:
            check_dtype(case, name, tensor)
            _check_entries(prop, name, tensor, f, g)
    return _first_entry(prop, implementation, alone, once, found, gradients)


def _check_entries(
    prop: Property, name: str, tensor: np.ndarray, f: np.ndarray, g: np.ndarray
) -> None:
    """Broken if an entry is not what its factors make of the first one."""
    once = tensor[0].astype(np.float32)
    finite = np.isfinite(once)
    size = np.abs(once[finite]).max(initial=0)
    for b in range(1, len(tensor)):
        factor = FACTORS[name](f[b], g[b])
        other = tensor[b].astype(np.float32)
        with np.errstate(invalid="ignore"):
            # right ones differ by roundings, wrong ones by a factor of 2 or more
            near = np.abs(other - factor * once) <= factor * size / 8
        alike = np.where(finite, near, (other == once) | (np.isnan(other) & np.isnan(once)))
        if not alike.all():
            at = first_at(~alike)
            bound = factor * size / 8 if finite[at] else 0.0
            used = abs(other[at] - factor * once[at]) / bound if bound else np.inf
            fault = WrongElement(
                tensor=f"{prop.the_branch.name} {name}",
                index=(b, *at),
                actual=float(other[at]),
                expected=float(factor * once[at]),
                bound=float(bound),
                budget_used=float(used),
                form="deterministic",
                why=f"batch entry {b} must be {factor:g} times entry 0, of {tensor.size} elements",
            )
            raise Broken(prop.clause, fault)


def _first_entry(
    prop: Property,
    implementation: Implementation,
    alone: Case,
    once: Inputs,
    found: tuple[np.ndarray, ...],
    gradients: tuple[np.ndarray, ...],
) -> Outcome:
    """The first entry of what was found against its bounds."""
    branch, mask = prop.the_branch, prop.the_branch.mask(alone, once.block_indices)
    first = tuple(x[:1].astype(np.float64) for x in found if x is not None)
    if prop.backward and branch is COMPRESS:
        dq, dk, dv, dmem_k, dmem_v = first
        first = (dq, np.concatenate([dmem_k, dk], 2), np.concatenate([dmem_v, dv], 2))
    empty = not mask.any(-1).all()
    if prop.backward and empty and branch.empty_row(alone) == "nan":
        raise Inconclusive("NaN rows")
    expected, bounds = expected_of(prop, implementation, alone, once, mask, *gradients)
    return compare_all(prop, first, expected, bounds)


def no_long_sequences(implementation: Implementation) -> Remark | None:
    """Why long sequences are not tried, if they are not."""
    if implementation.pace == "slow":
        return ("slow pace",)
    if not far_lengths(implementation):
        return ("limits without long sequences",)
    causal = any(semantics.causal for semantics in implementation.semantics)
    return None if causal else ("not causal",)


def no_large_tensors(implementation: Implementation) -> Remark | None:
    """Why tensors of more than 2^31 elements are not tried, if they are not."""
    if implementation.pace == "slow":
        return ("slow pace",)
    device = device_of(implementation.device)
    exponent, need = device.offset_limit.bit_length() - 1, 32 * device.offset_limit
    if large_sizes(implementation) is None:
        return "limits without large tensors", exponent
    if device.free_memory() < need:
        return "little memory", exponent, need / 2**30
    return None
