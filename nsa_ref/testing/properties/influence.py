"""What must not matter: invisible keys (A5) and other heads (A1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np

from nsa_ref.bounds import AttentionBounds
from nsa_ref.testing import probes
from nsa_ref.testing.branches import GRADIENTS, Branch, Inputs
from nsa_ref.testing.case import Case
from nsa_ref.testing.compare import Comparison, check_exact, compare
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Outcome, Property, bounds_of, set_up, settle
from nsa_ref.testing.properties.values import upstream
from nsa_ref.testing.verdicts import Broken, Inconclusive, WrongReader


def _plant_canary(
    case: Case, inputs: Inputs, mask: np.ndarray
) -> tuple[Inputs, tuple[int, int, int]]:
    """One key with the largest logit and v = 1e4, invisible to at least one row.

    Returns the inputs with it, and where it sits: (batch, kv_head, column).
    """
    rng = case.generator("canary")
    group = case.group_size
    hidden = np.argwhere(mask == 0)
    if not len(hidden):
        raise Inconclusive("no hidden key")
    b, h, t, j = (int(i) for i in hidden[rng.integers(len(hidden))])
    kv_head = h // group
    direction = inputs.q[b, h, t].astype(np.float64)
    queries = inputs.q[b, kv_head * group : (kv_head + 1) * group].astype(np.float64)
    products = np.abs(queries @ direction).max(initial=0.0)
    # far above any finite "minus infinity", and no dot product may overflow
    largest = 2.0**13 if case.dtype == "float16" else 2.0**20
    key = direction * (largest / products) if products > 0 else direction
    key = np.clip(key, -largest, largest)
    k, v = inputs.k.copy(), inputs.v.copy()
    k[b, kv_head, j] = key.astype(k.dtype)
    v[b, kv_head, j] = 0
    v[b, kv_head, j, 0] = np.asarray(1e4, dtype=v.dtype)  # in one place: dO.v must not overflow
    return dataclasses.replace(inputs, k=k, v=v), (b, kv_head, j)


#: What a run gives, by the names of the plug.
Tensors = dict[str, np.ndarray]


def _plants(
    implementation: Implementation, planted: Inputs, where: tuple[int, int, int]
) -> Iterator[tuple[str, Inputs]]:
    """The canary, and where the implementation declares `nonfinite_invisible`, inf and NaN."""
    yield "the largest logit and v = 1e4", planted
    for value in (np.inf, np.nan) if implementation.nonfinite_invisible else ():
        k, v = planted.k.copy(), planted.v.copy()
        k[where], v[where] = value, value
        yield f"k = v = {value}", dataclasses.replace(planted, k=k, v=v)


def _unchanged(
    implementation: Implementation,
    branch: Branch,
    what: str,
    base: Tensors,
    planted: Tensors,
    compared: Tensors,
    bounds: AttentionBounds,
) -> list[Comparison]:
    """A5: within the bounds; bit for bit, if the same call is stated to give the same bits.

    What states nothing may add up in another order in one call of many: that shows no key.

    compared : bool, the elements that must not change
    """
    comparisons = []
    for name, x in base.items():
        tensor, other = f"{branch.name} {name}", np.where(compared[name], planted[name], x)
        if implementation.deterministic:
            check_exact("A5", tensor, other, x, why=f"so it was before an invisible key got {what}")
            continue
        bound = 2 * getattr(bounds, name)  # two right results are at most two bounds apart
        part, source = f"where an invisible key has {what}", "the run without it"
        comparisons.append(compare("A5", tensor, other, x, bound, part=part, source=source))
    return comparisons


def _sees(branch: Branch, case: Case, mask: np.ndarray, where: tuple[int, int, int]) -> np.ndarray:
    """Rows that see the planted key: bool (batch, q_heads, q_len)."""
    b, kv_head, j = where
    rows = np.zeros(mask.shape[:3], bool)
    heads = slice(kv_head * case.group_size, (kv_head + 1) * case.group_size)
    rows[b, heads] = mask[b, heads, :, j] != 0
    if branch.empty_row(case) == "uniform":
        # the mean of all columns sees them all
        rows[b, heads] |= ~(mask[b, heads] != 0).any(-1)
    return rows


def canary(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A5: rows that do not see a key give the same out and lse whatever it holds.

    Backward, so do the gradients that come from these rows, and the key's own are exactly 0.
    """
    branch, inputs, mask = set_up(prop, case)
    planted, where = _plant_canary(case, inputs, mask)
    sees = _sees(branch, case, mask, where)
    compared: Tensors = {"out": ~sees[..., None], "lse": ~sees}
    d: tuple[np.ndarray, ...] = ()
    if prop.backward:
        compared = dict.fromkeys(GRADIENTS, np.ones((), bool))
        d_out, d_lse = upstream(branch, implementation, case, inputs)
        silent = sees | (mask.sum(-1) == 0)
        d_out = np.where(silent[..., None], 0, d_out).astype(d_out.dtype)
        d = d_out, np.where(silent, 0, d_lse).astype(d_lse.dtype)

    run = partial(branch.tensors, implementation, case)
    base = run(inputs, *d)
    bounds = bounds_of(branch, implementation, case, inputs, mask, *d)
    comparisons: list[Comparison] = []
    # what is NaN already shows no change
    elements = sum(int((compared[name] & ~np.isnan(x)).sum()) for name, x in base.items())
    if prop.backward and silent.all():
        elements = 0  # nothing is sent, and nothing comes back
    for what, other in _plants(implementation, planted, where):
        finite = np.isfinite(other.v[where].astype(np.float64)).all()
        if prop.backward and sees.any() and not finite:
            continue  # a row that sees it is NaN, and so is all that it reaches
        with np.errstate(invalid="ignore"):  # rows that see inf are NaN, rightly
            found = run(other, *d)
        comparisons += _unchanged(implementation, branch, what, base, found, compared, bounds)
        if prop.backward:
            for name in ("dk", "dv"):
                here = np.zeros(found[name].shape, bool)
                here[where] = True
                why = "nothing comes back to rows that see this key"
                check_exact("A5", f"{branch.name} {name}", found[name], 0.0, here, why=why)
    return dataclasses.replace(settle(comparisons), compared=elements)


def heads(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A1: query head h reads the keys and the values of kv head h // G, and of no other."""
    branch, inputs, mask = set_up(prop, case)
    rows = (mask != 0).sum(-1).max(axis=(0, 2), initial=0)
    owners = np.arange(case.q_heads) // case.group_size
    # two right results are at most two bounds apart, and may be so for small reasons
    apart = 2 * bounds_of(branch, implementation, case, inputs, mask).out
    for kv_head in range(case.kv_heads):
        moved_by = probes.head_influence(implementation, branch, case, inputs, kv_head)
        for what, moved, needs in zip(("keys", "values"), moved_by, (2, 1)):
            for head, owner in enumerate(owners):
                reads = bool((moved > apart)[:, head].any())
                ignores = rows[head] >= needs and not moved[:, head].any()
                if not (ignores if owner == kv_head else reads):
                    continue
                fault = WrongReader(
                    tensor=branch.name,
                    reader=("query head", head),
                    read=(f"the {what} of kv head", kv_head),
                    reads=reads,
                    why=f"h // G with G={case.group_size} is {owner}",
                )
                raise Broken("A1", fault)
    return Outcome(compared=case.kv_heads * int((rows > 0).sum()))
