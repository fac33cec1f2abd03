"""Sequences too long, and tensors too large, to hold a mask of: rows and batch entries are drawn.

No N x N array is made here; an implementation that makes one runs out of memory, which is a
finding: what it cannot do belongs into its `limits`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nsa_ref.bounds import NUMERICS
from nsa_ref.testing import probes
from nsa_ref.testing.branches import COMPRESS, Branch, Broken, Inconclusive, call
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Check, Outcome

#: Rows of a long sequence that are read out, besides its ends.
ROWS_DRAWN = 48

#: How a tensor scales in a batch entry whose v is f times and whose d_out is g times as large.
FACTORS = {
    "out": lambda f, g: f,
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
    """The oracle's multiplicities of one row, (batch, q_heads, columns): causal, so what follows it
    is not needed.
    """
    alone = dataclasses.replace(case, q_len=1, kv_len=t + case.kv_len - case.q_len + 1)
    indices = None if block_indices is None else block_indices[:, :, t : t + 1]
    seen = branch.mask(alone, indices)[:, :, 0]
    row = np.zeros((case.batch, case.q_heads, branch.columns(case)), np.int64)
    row[..., : seen.shape[-1]] = seen
    return row


def _where(branch: Branch, case: Case, batch: int, head: int, t: int) -> str:
    p = t + case.kv_len - case.q_len
    columns = branch.columns(case)
    return f"batch {batch}, query head {head}, row t={t} (p={p}), {columns} columns"


def long_forward(branch: Branch, clause: str) -> Check:
    """With q = k = 0 and v of random signs, out is S / n: S the sum of n signs that a row sees.

    A flash kernel adds whole numbers and divides once. One key more or less moves S by 1, and the
    quotient by about 1 / n; a column says so where |S| times its rounding is below that.
    """

    def check(implementation: Implementation, case: Case) -> Outcome:
        blank = probes.zeros(case, branch)
        signs = case.generator("signs").integers(0, 2, blank.v.shape) * 2 - 1
        inputs = dataclasses.replace(blank, v=signs.astype(blank.v.dtype))
        out = branch.forward(implementation, case, inputs).out
        row_of = NUMERICS[implementation.numerics[case.dtype]]
        rounding = row_of.u_p + row_of.u_store + 2.0**-20
        told = False
        for t in _some_rows(case):
            row = _row(branch, case, blank.block_indices, t)
            for b, h in np.ndindex(case.batch, case.q_heads):
                n = row[b, h].sum()
                if n == 0:
                    continue  # A2
                expected = row[b, h] @ signs[b, h // case.group_size]
                off = np.abs(out[b, h, t] * n - expected) - rounding * np.abs(expected)
                told |= bool((rounding * np.abs(expected) < 0.25).any())
                if not (off <= 0.25).all():
                    c = int(np.argmax(~(off <= 0.25)))
                    raise Broken(
                        clause,
                        f"{branch.name}, forward of a long sequence, read out by the sum of random "
                        f"signs: {_where(branch, case, b, h, t)}: the {n} keys that the row sees "
                        f"have the sum {expected[c]}, and not {out[b, h, t, c] * n:.6g}",
                    )
        if not told:
            raise Inconclusive("every sum is too large for the rounding of this dtype")
        return Outcome()

    return check


def long_backward(branch: Branch) -> Check:
    """With q = k = 0 and d_out one-hot in some rows, dv has the mask of those rows, exactly."""

    def check(implementation: Implementation, case: Case) -> Outcome:
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
        for c, t in enumerate(rows):
            visible = _row(branch, case, blank.block_indices, t)[:, heads] != 0
            seen = dv[..., c] != 0
            if getattr(case.semantics.empty_row, branch.name) != "zero":
                # such a row reads all columns, or none
                visible = np.where(visible.any(-1, keepdims=True), visible, seen)
            if (visible != seen).any():
                b, g, j = (int(i) for i in np.argwhere(visible != seen)[0])
                deed = "misses" if visible[b, g, j] else "reads"
                raise Broken(
                    "A3",
                    f"{branch.name}, backward of a long sequence, read out by one-hot rows: dv "
                    f"{deed} column {j} in {_where(branch, case, b, int(heads[g]), t)}",
                )
        return Outcome()

    return check


def large(branch: Branch, *, backward: bool) -> Check:
    """More elements than 32 bits can count: batch entries that are alike but for powers of two.

    v and d_out are f and g times those of the first entry, and so is all that comes back. An offset
    that wraps reads, or writes, another entry.
    """

    def check(implementation: Implementation, case: Case) -> Outcome:
        need = device_of(implementation.device).many
        if case.batch * case.q_heads * case.q_len * case.head_dim <= need:
            raise Inconclusive(f"no case of more than {need} elements lies within the limits")
        once = branch.inputs(dataclasses.replace(case, batch=1))
        rng = case.generator("factors")
        f, g = (2.0 ** rng.integers(0, 4, case.batch) for _ in range(2))
        f[0] = g[0] = 1

        def spread(x: np.ndarray, factor: np.ndarray | None = None) -> np.ndarray:
            if factor is not None:
                x = x * factor.astype(x.dtype)[:, None, None, None]
            return np.broadcast_to(x, (case.batch, *x.shape[1:]))

        inputs = dataclasses.replace(
            once,
            q=spread(once.q),
            k=spread(once.k),
            v=spread(once.v, f),
            block_indices=None if once.block_indices is None else spread(once.block_indices),
        )
        arguments = branch.arguments(case, inputs)
        names: tuple[str, ...] = ("out",)
        if backward:
            d_out, d_lse = dataclasses.replace(case, batch=1).upstream_gradients()
            arguments += (spread(d_out, g), spread(np.zeros_like(d_lse)))
            names = ("dq", "dk", "dv", "dk", "dv") if branch is COMPRESS else ("dq", "dk", "dv")
            found = call(implementation.run_vjp, branch.name, case, *arguments)
        else:
            found = call(implementation.run, branch.name, case, *arguments)[:1]
        for name, tensor in zip(names, found):
            first = tensor[0].astype(np.float32)  # enough for a factor of 2
            size = np.abs(first).max(initial=0)
            for b in range(1, case.batch):
                factor = FACTORS[name](f[b], g[b])
                # right ones differ by roundings, wrong ones by a factor of 2 or more
                off = np.abs(tensor[b].astype(np.float32) - factor * first)
                if not (off <= factor * size / 8).all():
                    at = tuple(int(i) for i in np.argwhere(~(off <= factor * size / 8))[0])
                    raise Broken(
                        "A3" if backward else "A1",
                        f"{branch.name}, {tensor.size} elements of {name}: batch entry {b} must be "
                        f"{factor:g} times entry 0, and is not at {at}: {tensor[(b, *at)]} against "
                        f"{tensor[(0, *at)]}",
                    )
        return Outcome()

    return check


def not_far(implementation: Implementation) -> str:
    """Why long sequences are not tried, if they are not."""
    lengths = implementation.limits.get("kv_len")
    if lengths is not None and max(lengths) < 512:
        return f"long sequences: kv_len is limited to {max(lengths)}"
    if not any(semantics.causal for semantics in implementation.semantics):
        return "long sequences are causal ones, and no declared semantics is"
    return ""


def not_large(implementation: Implementation) -> str:
    """Why tensors of more than 2^31 elements are not tried, if they are not."""
    device = device_of(implementation.device)
    free, need = device.free_memory(), 32 * device.many
    if free < need:
        elements = f"2^{device.many.bit_length() - 1}"
        return f"tensors beyond {elements} elements (a GPU with {need / 2**30:.3g} GiB free)"
    return ""
