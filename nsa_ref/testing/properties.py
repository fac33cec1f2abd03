"""Every property once, each citing its clause.

A property is a function of an implementation and a case. It returns an `Outcome`, or raises
`Broken` (the clause does not hold), `Inconclusive` (this case could not tell) or `NotOffered`.
`judge` runs one, sets right which clause is to blame, and draws suspicions again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from nsa_ref.attention import Attention
from nsa_ref.bounds import (
    AttentionBounds,
    attention_bounds,
    logit_mean_bounds,
    pool_bounds,
    score_bounds,
)
from nsa_ref.compress import pool, pool_vjp
from nsa_ref.masks import compress_mask
from nsa_ref.selection import (
    AMBIGUOUS,
    INVALID,
    forced_blocks,
    importance,
    selection_candidates,
    shared_strides,
    valid_selection,
)
from nsa_ref.semantics import Semantics
from nsa_ref.testing import probes
from nsa_ref.testing.branches import (
    BRANCHES,
    COMPRESS,
    FINE,
    SLIDING,
    Branch,
    Broken,
    Inconclusive,
    Inputs,
    Raised,
    as_float64,
    call,
)
from nsa_ref.testing.case import DTYPES, GENERIC_INPUTS, Case
from nsa_ref.testing.compare import Comparison, compare
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.pictures import side_by_side
from nsa_ref.testing.strategies import Adjust, Sizes, cases, edges, fresh_seeds


@dataclass(frozen=True)
class Outcome:
    """budget : largest share of a bound that was used, None if nothing was compared with one
    ambiguous : rows whose choice of blocks cannot be decided (I5)
    suspicion : what speaks against the implementation only statistically
    """

    budget: float | None = None
    ambiguous: int = 0
    suspicion: str = ""


Check = Callable[[Implementation, Case], Outcome]


@dataclass(frozen=True, kw_only=True)
class Property:
    """name : stable, used by replay
    clause : what it decides; `judge` may find that another one is to blame
    branch : compress, fine, sliding, or "selection"
    method, backward : what the implementation must offer, and whether its gradients are needed
    semantics : which of the implementation's semantics it can be asked about
    options : further arguments of `strategies.cases`
    examples : at the quick level
    """

    name: str
    clause: str
    branch: str
    method: str
    backward: bool
    check: Check
    semantics: Callable[[Semantics], bool]
    options: dict[str, Any]
    examples: int

    def offered(self, implementation: Implementation) -> str | None:
        """None if it can be asked, else why not."""
        if not implementation.offers(self.method):
            return f"{self.method} is not offered"
        if self.backward and not implementation.offers_vjp(self.method):
            return f"gradients of {self.method} are not offered"
        if not any(map(self.semantics, implementation.semantics)):
            return f"none of the declared semantics has what {self.clause} is about"
        return None

    def cases(
        self, implementation: Implementation, dtypes: Collection[str] | None = None
    ) -> st.SearchStrategy[Case]:
        """Cases for this property within what the implementation declares."""
        allowed = [s for s in implementation.semantics if self.semantics(s)]
        return cases(implementation, semantics=allowed, dtypes=dtypes, **self.options)


PROPERTIES: dict[str, Property] = {}


def _register(
    clause: str,
    branch: Branch | str,
    check: Check,
    name: str,
    *,
    method: str | None = None,
    backward: bool = False,
    semantics: Callable[[Semantics], bool] = lambda s: True,
    examples: int = 20,
    **options: Any,
) -> None:
    where = branch.name if isinstance(branch, Branch) else branch
    PROPERTIES[name] = Property(
        name=name,
        clause=clause,
        branch=where,
        method=method or where,
        backward=backward,
        check=check,
        semantics=semantics,
        options=options,
        examples=examples,
    )


def judge(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """Run one property on one case.

    A wrong value whose case also shows a wrong mask is the mask's fault, and reported as such,
    with both masks side by side. A suspicion counts if three fresh seeds all show it again.

    Raises
    ------
    Broken, Inconclusive, NotOffered
    """
    if reason := implementation.supports(case):
        raise NotOffered(reason)
    try:
        outcome = prop.check(implementation, case)
        if outcome.suspicion:
            again = [prop.check(implementation, fresh) for fresh in fresh_seeds(case, 3)]
            if all(fresh.suspicion for fresh in again):
                raise Broken(prop.clause, f"{outcome.suspicion} (and with 3 fresh seeds)")
            outcome = dataclasses.replace(outcome, budget=None, suspicion="")
        return outcome
    except Raised as error:
        raise Broken(prop.clause, f"the implementation failed: {error}") from error
    except Broken as broken:
        if broken.clause in ("A1", "A3") and prop.branch != "selection":
            _blame_the_mask(prop, implementation, case)
        raise


def _blame_the_mask(prop: Property, implementation: Implementation, case: Case) -> None:
    """Raise Broken for the mask's clause if the forward reads other keys than it should."""
    branch = next(b for b in BRANCHES if b.name == prop.branch)
    try:
        _forward_mask(branch, branch.mask_clause(case))(implementation, case)
    except (Raised, Inconclusive, NotOffered):
        return


# --- masks ----------------------------------------------------------------------------------------


def _mask_broken(
    branch: Branch, clause: str, case: Case, expected: np.ndarray, actual: np.ndarray, how: str
) -> Broken:
    """The first wrong cell in the clause's terms, the masks side by side, the likely switch."""
    b, h, t, j = (int(i) for i in np.argwhere(expected != actual)[0])
    want, have = int(expected[b, h, t, j]), int(actual[b, h, t, j])
    p = t + case.kv_len - case.q_len
    if have < 0:
        deed = f"reads more than the {branch.columns(case)} columns that there are"
    elif want and have:
        deed = f"counts column {j} {have} times, the definition {want} times"
    else:
        deed = f"{'misses' if want else 'reads'} column {j}"
    memory = case.num_mem_kv if branch is COMPRESS else 0
    if branch is COMPRESS and j >= memory and want != have:
        deed += f" (block {j - memory})"
    text = (
        f"{how}: batch {b}, query head {h}, row t={t} (p={p}) {deed}\n"
        f"{side_by_side(expected[b, h], actual[b, h])}"
    )
    hint = _convention(branch, case, actual)
    return Broken(clause, f"{text}\n{hint}" if hint else text)


def _convention(branch: Branch, case: Case, actual: np.ndarray) -> str:
    """Which single switch would explain what was seen, in words, or nothing."""
    indices = case.block_indices() if branch is FINE else None
    alternatives: dict[str, Sequence[Any]] = {
        "sliding": {"window_closed": (True, False), "causal": (True, False)},
        "compress": {
            "compress_strict": (True, False),
            "compress_alignment": ("start", "end"),
            "causal": (True, False),
        },
        "fine": {
            "duplicates": ("set", "multiset"),
            "own_block_extra": (True, False),
            "causal": (True, False),
        },
    }[branch.name]
    for switch, values in alternatives.items():
        for value in values:
            if value == getattr(case.semantics, switch):
                continue
            other = dataclasses.replace(case.semantics, **{switch: value})
            mask = branch.mask(case, indices, other)
            if mask.shape == actual.shape and (mask == actual).all():
                return (
                    f"This may be a difference of convention: {switch}={value!r} would explain it. "
                    "If it is meant, declare it in `semantics`."
                )
    return ""


def _exposed_mask(branch: Branch, clause: str) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        arguments = (case.block_indices(),) if branch is FINE else ()
        expected = branch.mask(case, *arguments or (None,))
        value = call(implementation.run, f"{branch.name}_mask", case, *arguments)
        for name, actual in probes.exposed_readings(value, *expected.shape[2:]).items():
            try:
                actual = np.broadcast_to(actual, expected.shape)
            except ValueError:
                raise Raised(
                    f"{branch.name}_mask {name} has shape {actual.shape}; it must broadcast to "
                    f"{expected.shape}"
                ) from None
            if (actual != expected).any():
                how = f"{branch.name}_mask as exposed{', ' if name else ''}{name}"
                raise _mask_broken(branch, clause, case, expected, actual, how)
        return Outcome()

    return check


def _forward_mask(branch: Branch, clause: str) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        indices = case.block_indices() if branch is FINE else None
        expected = branch.mask(case, indices)
        actual = probes.forward_mask(implementation, branch, case, expected)
        if (actual != expected).any():
            how = f"{branch.name}, forward read out by one-hot values"
            raise _mask_broken(branch, clause, case, expected, actual, how)
        return Outcome()

    return check


def _backward_mask(branch: Branch) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        indices = case.block_indices() if branch is FINE else None
        mask = branch.mask(case, indices)
        for pattern in probes.backward_patterns(implementation, branch, case, mask):
            wrong = pattern.wrong()
            if not wrong.any():
                continue
            b, h, t, j = (int(i) for i in np.argwhere(wrong)[0])
            deed = "misses" if pattern.visible[b, h, t, j] else "reads"
            expected = pattern.visible[b, h].astype(int)
            seen = np.where(pattern.decided[b, h], pattern.seen[b, h], expected).astype(int)
            raise Broken(
                "A3",
                f"{branch.name}, backward read out: {pattern.gradient} {deed} the pair of row "
                f"t={t} and column {j} (batch {b}, query head {h}), though the forward is right\n"
                f"{side_by_side(expected, seen)}",
            )
        return Outcome()

    return check


# --- values ---------------------------------------------------------------------------------------


def _bounds(
    branch: Branch,
    implementation: Implementation,
    case: Case,
    inputs: Inputs,
    mask: np.ndarray,
    form: str = "deterministic",
    d_out: np.ndarray | None = None,
    d_lse: np.ndarray | None = None,
) -> AttentionBounds:
    q, k, v = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
    if getattr(case.semantics.empty_row, branch.name) == "uniform":
        # such a row is attention with equal logits over all columns
        empty = mask.sum(-1, keepdims=True) == 0
        mask, q = np.where(empty, 1, mask), np.where(empty, 0.0, q)
    return attention_bounds(
        q,
        k,
        v,
        mask,
        None if d_out is None else d_out.astype(np.float64),
        None if d_lse is None else d_lse.astype(np.float64),
        numerics=implementation.numerics[case.dtype],
        form=form,
        scale=case.scale,
    )


def _all_bounds(case: Case, *arguments: Any) -> list[AttentionBounds]:
    """Deterministic; on generic data also statistical and shared: what `compare` takes."""
    forms = ("deterministic", "statistical", "shared") if case.generic else ("deterministic",)
    branch, implementation, inputs, mask, *gradients = arguments
    return [
        _bounds(branch, implementation, case, inputs, mask, form, *gradients) for form in forms
    ]


def _check_empty_rows(
    branch: Branch, case: Case, mask: np.ndarray, expected: Attention, actual: Attention
) -> None:
    """A2 for out and lse; a "uniform" out is left to the bounds."""
    empty = mask.sum(-1) == 0
    for name, have, want in (
        ("out", actual.out, expected.out),
        ("lse", actual.lse, expected.lse),
    ):
        if have is None:
            continue
        if name == "out" and getattr(case.semantics.empty_row, branch.name) == "uniform":
            continue
        where = empty[..., None] if name == "out" else empty
        same = (have == want) | (np.isnan(have) & np.isnan(want))
        wrong = np.broadcast_to(where, have.shape) & ~same
        if wrong.any():
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise Broken(
                "A2",
                f"{branch.name} {name}{list(index)} is {have[index]!r} in a row that sees no key, "
                f"and must be {want[index]!r}\n"
                f"This may be a difference of convention: see empty_row and empty_lse.",
            )


def _settle(comparisons: Sequence[Comparison]) -> Outcome:
    """Several tensors' comparisons in one."""
    if comparisons and all(c.powerless for c in comparisons):
        raise Inconclusive("the bounds admit any value: too ill-conditioned for this dtype")
    return Outcome(
        budget=max((c.budget for c in comparisons if not c.powerless), default=None),
        suspicion=next((c.suspicion for c in comparisons if c.suspicion), ""),
    )


def _output(branch: Branch, which: str) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        mask = branch.mask(case, inputs.block_indices)
        actual = branch.forward(implementation, case, inputs)
        if which == "lse" and actual.lse is None:
            raise NotOffered("lse")
        expected = branch.attend(case, mask, inputs)
        _check_empty_rows(branch, case, mask, expected, actual)
        bounds = _all_bounds(case, branch, implementation, inputs, mask)
        tensors = [getattr(x, which) for x in (actual, expected, *bounds)]
        if which == "lse":
            tensors = [x[..., None] for x in tensors]  # a row of its own, for the slope test
        return _settle([compare("A1", f"{branch.name} {which}", *tensors)])

    return check


def _gradients(branch: Branch) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        mask = branch.mask(case, inputs.block_indices)
        d_out, d_lse = case.upstream_gradients()
        if case.seed % 2 == 0:
            d_lse = np.zeros_like(d_lse)  # what a layer sends; the odd seeds send both
        if getattr(case.semantics.empty_row, branch.name) == "nan":
            # the gradient of a NaN row is nobody's business
            empty = mask.sum(-1) == 0
            d_out = np.where(empty[..., None], 0, d_out).astype(d_out.dtype)
        actual = branch.backward(implementation, case, inputs, d_out, d_lse)
        expected = branch.attend_vjp(case, mask, inputs, d_out, d_lse)
        bounds = _all_bounds(case, branch, implementation, inputs, mask, d_out, d_lse)
        return _settle(
            [
                compare("A3", f"{branch.name} {name}", have, want, *(getattr(x, name) for x in bounds))
                for name, have, want in zip(("dq", "dk", "dv"), actual, expected)
            ]
        )

    return check


def _empty_rows(branch: Branch, backward: bool) -> Check:
    """A2: nothing comes out of a row that sees no key, and nothing goes back through it."""

    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        mask = branch.mask(case, inputs.block_indices)
        empty = mask.sum(-1) == 0
        if not empty.any():
            raise Inconclusive("no row without a visible key")
        if not backward:
            actual = branch.forward(implementation, case, inputs)
            _check_empty_rows(branch, case, mask, branch.attend(case, mask, inputs), actual)
            return Outcome()
        if getattr(case.semantics.empty_row, branch.name) != "zero":
            raise Inconclusive("gradients through such a row are 0 only for empty_row='zero'")
        d_out, d_lse = case.upstream_gradients()
        if not _has_lse(branch, implementation, case, inputs):
            d_lse = np.zeros_like(d_lse)
        d_out = np.where(empty[..., None], d_out, 0).astype(d_out.dtype)
        d_lse = np.where(empty, d_lse, 0).astype(d_lse.dtype)
        gradients = branch.backward(implementation, case, inputs, d_out, d_lse)
        for name, gradient in zip(("dq", "dk", "dv"), gradients):
            if (gradient != 0).any():
                index = tuple(int(i) for i in np.argwhere(gradient != 0)[0])
                raise Broken(
                    "A2",
                    f"{branch.name} {name}{list(index)} is {gradient[index]!r}, though d_out is 0 "
                    "in every row that sees a key: it must be exactly 0",
                )
        return Outcome()

    return check


def _has_lse(branch: Branch, implementation: Implementation, case: Case, inputs: Inputs) -> bool:
    return branch.forward(implementation, case, inputs).lse is not None


# --- what must not matter -------------------------------------------------------------------------


def _plant_canary(
    branch: Branch, case: Case, inputs: Inputs, mask: np.ndarray
) -> tuple[Inputs, tuple[int, int, int]]:
    """One key with the largest logit and v = 1e4, invisible to at least one row.

    Returns the inputs with it, and where it sits: (batch, kv_head, column).
    """
    rng = case.generator("canary")
    group = case.group_size
    hidden = np.argwhere(mask == 0)
    if not len(hidden):
        raise Inconclusive("every key is visible to every row")
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
    v[b, kv_head, j] = np.asarray(1e4, dtype=v.dtype)
    return dataclasses.replace(inputs, k=k, v=v), (b, kv_head, j)


Tensors = Sequence[np.ndarray]


def _runs(run: Callable[[], Tensors]) -> Iterator[Tensors]:
    """The same run again and again, its buffers lying elsewhere each time.

    Sums on a CPU may depend on how their operands are aligned in memory, so that two runs which
    look identical are not; arrays of odd sizes in between move what is allocated next.
    """
    ballast = []
    for i in range(4):
        ballast.append([np.empty(8 * (i + 1) * size + 8) for size in (1, 3, 17, 130)])
        yield run()


def _unchanged(
    names: Sequence[str],
    base: Tensors,
    planted: Tensors,
    compared: Sequence[np.ndarray],
    again: Callable[[], Tensors],
    bounds: Callable[[], Tensors],
) -> None:
    """A5: bit for bit, or within the bounds if identical runs already differ by themselves."""
    wrong = [
        mask & (one != other) & ~(np.isnan(one) & np.isnan(other))
        for mask, one, other in zip(compared, base, planted)
    ]
    if not any(w.any() for w in wrong):
        return
    repeatable = all(
        np.array_equal(one, other, equal_nan=True)
        for repeated in _runs(again)
        for one, other in zip(base, repeated)
    )
    for i, name in enumerate(names):
        if repeatable and wrong[i].any():
            index = tuple(int(n) for n in np.argwhere(wrong[i])[0])
            raise Broken(
                "A5",
                f"{name}{list(index)} changes from {base[i][index]:.9g} to {planted[i][index]:.9g} "
                "when a key that is invisible there gets the largest logit and v = 1e4",
            )
        # two right results are at most two bounds apart
        there = np.where(compared[i], planted[i], base[i])
        compare("A5", f"{name} with an invisible canary", there, base[i], 2 * bounds()[i])


def _sees(case: Case, mask: np.ndarray, where: tuple[int, int, int]) -> np.ndarray:
    """Rows that see the planted key: bool (batch, q_heads, q_len)."""
    b, kv_head, j = where
    rows = np.zeros(mask.shape[:3], bool)
    heads = slice(kv_head * case.group_size, (kv_head + 1) * case.group_size)
    rows[b, heads] = mask[b, heads, :, j] != 0
    return rows


def _canary_forward(branch: Branch) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        mask = branch.mask(case, inputs.block_indices)
        planted, where = _plant_canary(branch, case, inputs, mask)
        sees = _sees(case, mask, where)
        present = [
            name
            for name in ("out", "lse")
            if getattr(branch.forward(implementation, case, inputs), name) is not None
        ]

        def run(some: Inputs) -> Tensors:
            result = branch.forward(implementation, case, some)
            return [getattr(result, name) for name in present]

        base = run(inputs)
        _unchanged(
            [f"{branch.name} {name}" for name in present],
            base,
            run(planted),
            [np.broadcast_to(~sees.reshape(sees.shape + (1,) * (x.ndim - 3)), x.shape) for x in base],
            lambda: run(inputs),
            lambda: [getattr(_bounds(branch, implementation, case, inputs, mask), n) for n in present],
        )
        return Outcome()

    return check


def _canary_backward(branch: Branch) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        mask = branch.mask(case, inputs.block_indices)
        planted, where = _plant_canary(branch, case, inputs, mask)
        sees = _sees(case, mask, where)
        d_out, d_lse = case.upstream_gradients()
        empty = mask.sum(-1) == 0
        silent = sees | empty
        d_out = np.where(silent[..., None], 0, d_out).astype(d_out.dtype)
        d_lse = np.where(silent, 0, d_lse).astype(d_lse.dtype)
        if not _has_lse(branch, implementation, case, inputs):
            d_lse = np.zeros_like(d_lse)

        def run(some: Inputs) -> Tensors:
            return branch.backward(implementation, case, some, d_out, d_lse)

        base, other = run(inputs), run(planted)
        _unchanged(
            [f"{branch.name} {name}" for name in ("dq", "dk", "dv")],
            base,
            other,
            [np.ones(x.shape, bool) for x in base],
            lambda: run(inputs),
            lambda: _bounds(
                branch, implementation, case, inputs, mask, "deterministic", d_out, d_lse
            )[2:],
        )
        for name, gradient in zip(("dk", "dv"), other[1:]):
            if (gradient[where] != 0).any():
                raise Broken(
                    "A5",
                    f"{branch.name} {name}{list(where)} is {gradient[where].tolist()}: nothing "
                    "comes back to rows that see this key, so it must be exactly 0",
                )
        return Outcome()

    return check


def _heads(branch: Branch) -> Check:
    """A1: query head h reads the keys and the values of kv head h // G, and of no other."""

    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        mask = branch.mask(case, inputs.block_indices)
        rows = (mask != 0).sum(-1).max(axis=(0, 2), initial=0)
        for kv_head in range(case.kv_heads):
            by_k, by_v = probes.head_influence(implementation, branch, case, inputs, kv_head)
            for what, seen, needs in (("keys", by_k, 2), ("values", by_v, 1)):
                for head in range(case.q_heads):
                    owner = head // case.group_size
                    if seen[head] and owner != kv_head:
                        raise Broken(
                            "A1",
                            f"{branch.name}: query head {head} reads the {what} of kv head "
                            f"{kv_head}; h // G with G={case.group_size} is {owner}",
                        )
                    if not seen[head] and owner == kv_head and rows[head] >= needs:
                        raise Broken(
                            "A1",
                            f"{branch.name}: query head {head} does not read the {what} of kv "
                            f"head {kv_head}, which is its own (h // G with G={case.group_size})",
                        )
        return Outcome()

    return check


# --- laws that need no oracle ---------------------------------------------------------------------


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


def _is_full_causal(branch: Branch, clause: str) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        expected, mask = _full_causal_attention(case, inputs)
        if getattr(case.semantics.empty_row, branch.name) != "zero" and (mask.sum(-1) == 0).any():
            raise Inconclusive("rows before the first key follow empty_row")
        actual = branch.forward(implementation, case, inputs).out
        hard = _bounds(branch, implementation, case, inputs, mask)
        name = f"{branch.name} out against full causal attention"
        return _settle([compare(clause, name, actual, expected, hard.out)])

    return check


def _linear_in_v(branch: Branch) -> Check:
    """A1: out(v1) + out(v2) = out(v1 + v2); small integers, so that the sum of values is exact."""

    def check(implementation: Implementation, case: Case) -> Outcome:
        first = branch.inputs(case)
        rng = case.generator("second values")
        values = rng.integers(-8, 9, (2, *first.v.shape)).astype(DTYPES[case.dtype])
        mask = branch.mask(case, first.block_indices)
        one, two, both = (
            dataclasses.replace(first, v=v.astype(DTYPES[case.dtype]))
            for v in (values[0], values[1], values[0] + values[1])
        )
        outs = [branch.forward(implementation, case, x).out for x in (one, two, both)]
        bound = sum(
            _bounds(branch, implementation, case, x, mask).out
            for x in (one, two, both)
        )
        name = f"{branch.name} out(v1) + out(v2) against out(v1 + v2)"
        return _settle([compare("A1", name, outs[0] + outs[1], outs[2], np.asarray(bound))])

    return check


def _permutation(branch: Branch) -> Check:
    """A1: batch entries and kv heads, with their groups, do not know of each other."""

    def check(implementation: Implementation, case: Case) -> Outcome:
        inputs = branch.inputs(case)
        rng = case.generator("permutation")
        batch, heads = rng.permutation(case.batch), rng.permutation(case.kv_heads)

        def moved(x: np.ndarray) -> np.ndarray:
            grouped = x.reshape(case.batch, case.kv_heads, x.shape[1] // case.kv_heads, *x.shape[2:])
            return grouped[batch][:, heads].reshape(x.shape)

        shuffled = Inputs(
            q=moved(inputs.q),
            k=moved(inputs.k),
            v=moved(inputs.v),
            block_indices=None if inputs.block_indices is None else moved(inputs.block_indices),
        )
        mask = branch.mask(case, inputs.block_indices)
        out = branch.forward(implementation, case, inputs).out
        other = branch.forward(implementation, case, shuffled).out
        bound = 2 * _bounds(branch, implementation, case, inputs, mask).out
        name = f"{branch.name} out of permuted batch {batch.tolist()}, kv heads {heads.tolist()}"
        return _settle([compare("A1", name, other, moved(out), moved(bound))])

    return check


def _prefix(branch: Branch) -> Check:
    """Causality: taking the last tokens away leaves the rows before them as they are."""

    def check(implementation: Implementation, case: Case) -> Outcome:
        if min(case.q_len, case.kv_len) < 2:
            raise Inconclusive("nothing to cut off")
        cut = int(case.generator("prefix").integers(1, min(case.q_len, case.kv_len)))
        inputs = branch.inputs(case)
        short = dataclasses.replace(case, q_len=case.q_len - cut, kv_len=case.kv_len - cut)
        rows, columns = short.q_len, branch.columns(short)
        indices = inputs.block_indices
        less = Inputs(
            q=inputs.q[:, :, :rows],
            k=inputs.k[:, :, :columns],
            v=inputs.v[:, :, :columns],
            block_indices=None if indices is None else indices[:, :, :rows],
        )
        mask = branch.mask(case, indices)
        out = branch.forward(implementation, case, inputs).out[:, :, :rows]
        other = branch.forward(implementation, short, less).out
        bound = 2 * _bounds(branch, implementation, case, inputs, mask).out
        name = f"{branch.name} out without the last {cut} tokens"
        clause = branch.mask_clause(case)
        # an empty row may be the mean of all columns, whose number has changed
        sees = (mask != 0).any(-1)[:, :, :rows, None]
        other = np.where(sees, other, out)
        return _settle([compare(clause, name, other, out, bound[:, :, :rows])])

    return check


# --- compression and selection --------------------------------------------------------------------


def _pool_sizes(case: Case) -> dict[str, Any]:
    return {
        "compress_block_size": case.compress_block_size,
        "compress_block_sliding_stride": case.compress_block_sliding_stride,
        "compress_map": case.compress_map,
        "compress_alignment": case.semantics.compress_alignment,
    }


def _float64(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in weights.items()}


def _windows(implementation: Implementation, case: Case) -> Outcome:
    """C1: one-hot tokens through the mean show which tokens a window holds, and with what weight."""
    weights = case.pool_weights()
    shape = (case.batch, case.kv_heads, case.num_compress_blocks, case.head_dim)
    comparisons = []
    for chunk in probes.chunks(case.kv_len, case.head_dim):
        width = chunk.stop - chunk.start
        x = np.zeros((case.batch, case.kv_heads, case.kv_len, case.head_dim), DTYPES[case.dtype])
        x[:, :, chunk, :width] = np.eye(width, dtype=x.dtype)
        actual = as_float64("pool", call(implementation.run, "pool", case, x, weights), shape)
        expected = pool(x.astype(np.float64), _float64(weights), **_pool_sizes(case))
        bounds = pool_bounds(
            x.astype(np.float64),
            _float64(weights),
            numerics=implementation.numerics[case.dtype],
            **_pool_sizes(case),
        )
        wrong = (actual != 0) != (expected != 0)
        if wrong.any():
            _, _, i, c = (int(n) for n in np.argwhere(wrong)[0])
            deed = "holds" if actual[wrong][0] != 0 else "misses"
            raise Broken("C1", f"compressed block {i} {deed} token {chunk.start + c}")
        name = f"pool of one-hot tokens {chunk.start}.."
        comparisons.append(compare("C1", name, actual, expected, bounds.out))
    return _settle(comparisons)


def _pool(backward: bool) -> Check:
    def check(implementation: Implementation, case: Case) -> Outcome:
        x = case.array("x", case.batch, case.kv_heads, case.kv_len, case.head_dim)
        weights = case.pool_weights()
        shape = (case.batch, case.kv_heads, case.num_compress_blocks, case.head_dim)
        d_out = case.array("d_out", *shape)
        bounds = pool_bounds(
            x.astype(np.float64),
            _float64(weights),
            d_out.astype(np.float64),
            numerics=implementation.numerics[case.dtype],
            **_pool_sizes(case),
        )
        if not backward:
            actual = as_float64("pool", call(implementation.run, "pool", case, x, weights), shape)
            expected = pool(x.astype(np.float64), _float64(weights), **_pool_sizes(case))
            return _settle([compare("C4", "pool", actual, expected, bounds.out)])
        dx, dweights = call(implementation.run_vjp, "pool", case, x, weights, d_out)
        want_dx, want_dweights = pool_vjp(
            x.astype(np.float64), _float64(weights), d_out.astype(np.float64), **_pool_sizes(case)
        )
        if set(dweights) != set(want_dweights):
            raise Raised(
                f"pool_vjp gave gradients of {sorted(dweights)}; the weights are "
                f"{sorted(want_dweights)}"
            )
        comparisons = [
            compare("C4", "pool dx", as_float64("dx", dx, x.shape), want_dx, bounds.dx)
        ]
        for name, want in want_dweights.items():
            have = as_float64(f"d{name}", dweights[name], want.shape)
            comparisons.append(compare("C4", f"pool d{name}", have, want, bounds.dweights[name]))
        return _settle(comparisons)

    return check


@dataclass(frozen=True)
class _Row:
    """One query's choice: named indices, scores and candidates of all blocks, and n."""

    named: np.ndarray
    scores: np.ndarray
    candidate: np.ndarray
    n: int

    def at_fault(self, asked: str, blamed: str) -> str:
        """The clause to blame for an invalid choice, more closely than top-n as such (I4)."""
        if blamed != "I4":
            return blamed
        if self.candidate.sum() < self.n:
            return "I6"
        outside = [b for b in self.named if 0 <= b < len(self.scores) and not self.candidate[b]]
        left = [b for b in np.flatnonzero(self.candidate) if b not in self.named]
        if any(self.scores[b] == self.scores[other] for b in outside for other in left):
            return "I5"
        # a wrong order of scores is the fault of whatever the property varies
        return asked if asked in ("I1", "I2", "I3") and not outside else blamed


def _selection(clause: str) -> Check:
    """I1 to I6: the choice is a valid top-n of the oracle's scores, up to what rounding can move."""

    def check(implementation: Implementation, case: Case) -> Outcome:
        q, k_cmp, _, mem_k, _ = case.compressed()
        semantics = case.semantics
        indices = np.asarray(call(implementation.run, "select", case, q, k_cmp, mem_k))
        rows = (case.batch, case.selection_heads, case.q_len)
        if indices.shape[:3] != rows or indices.ndim != 4 or indices.dtype.kind != "i":
            raise Raised(
                f"select returned {indices.dtype} of shape {indices.shape}; it must be integers of "
                f"shape {(*rows, case.num_selected_blocks)}"
            )
        q, k_cmp, mem_k = (x.astype(np.float64) for x in (q, k_cmp, mem_k))
        strides = {
            "compress_block_size": case.compress_block_size,
            "compress_block_sliding_stride": case.compress_block_sliding_stride,
        }
        scores = importance(
            q,
            k_cmp,
            mem_k,
            kv_len=case.kv_len,
            selection_block_size=case.selection_block_size,
            semantics=semantics,
            **strides,
        )
        visible = compress_mask(
            case.q_len, case.kv_len, *strides.values(), case.num_mem_kv, semantics
        )
        # selection runs in float32 or better whatever the dtype of its operands
        row = "fp64" if case.dtype == "float64" else "fp32"
        common = {"numerics": row, "scale": case.scale, "share_selection": semantics.share_selection}
        if semantics.importance == "overlap":
            counts = shared_strides(
                case.kv_len,
                *strides.values(),
                case.selection_block_size,
                semantics.compress_alignment,
            )
            bounds = score_bounds(q, k_cmp, mem_k, visible=visible, counts=counts, **common)
        else:
            complete = logit_mean_bounds(
                q,
                k_cmp,
                visible=visible[:, case.num_mem_kv :],
                strides_per_block=case.selection_block_size // case.compress_block_sliding_stride,
                **common,
            )
            # an incomplete trailing block is no candidate: no bound is needed
            bounds = np.zeros(scores.shape)
            bounds[..., : complete.shape[-1]] = complete
        sizes = (case.q_len, case.kv_len, case.selection_block_size)
        candidates = selection_candidates(*sizes, semantics, **strides)
        verdict = valid_selection(
            indices,
            scores,
            np.where(np.isfinite(bounds), bounds, np.finfo(np.float64).max),
            candidates=candidates,
            forced=forced_blocks(
                *sizes, case.num_initial_blocks, case.num_local_blocks, semantics, **strides
            ),
            num_selected_blocks=case.num_selected_blocks,
            semantics=semantics,
        )
        found: dict[str, str] = {}
        for b, g, t in np.argwhere(verdict.verdict == INVALID).tolist():
            blamed, sentence = verdict.reasons[b, g, t]
            row = _Row(indices[b, g, t], scores[b, g, t], candidates[t], case.num_selected_blocks)
            found.setdefault(
                row.at_fault(clause, blamed),
                f"select at batch {b}, head {g}, row t={t} (p={t + case.kv_len - case.q_len}) "
                f"chose {row.named.tolist()}: {sentence}\n"
                f"scores {np.array2string(row.scores, precision=4)}",
            )
        if found:
            at_fault = clause if clause in found else next(iter(found))
            raise Broken(at_fault, found[at_fault])
        return Outcome(ambiguous=int((verdict.verdict == AMBIGUOUS).sum()))

    return check


# --- what each clause is asked on -----------------------------------------------------------------


def _causal(semantics: Semantics) -> bool:
    return semantics.causal


def _not_causal(semantics: Semantics) -> bool:
    return not semantics.causal


def _window(draw: st.DrawFn, sizes: Sizes) -> None:
    """W3: the smallest window, or one that covers everything."""
    kv_len = sizes["kv_len"]
    closed = sizes["semantics"].window_closed
    covers = [kv_len, kv_len + 1, 2 * kv_len + 7]
    sizes["sliding_window_size"] = draw(st.sampled_from([0 if closed else 1, *covers]))


def _window_covers(draw: st.DrawFn, sizes: Sizes) -> None:
    sizes["sliding_window_size"] = sizes["kv_len"] + draw(st.integers(0, 3))


def _short_last_block(draw: st.DrawFn, sizes: Sizes) -> None:
    """F2: kv_len = m l' + r with 0 < r < l', and the last block selected."""
    size = sizes["selection_block_size"]
    if size == 1:
        size = sizes["selection_block_size"] = 2 * sizes["compress_block_sliding_stride"]
    decoded = sizes["kv_len"] - sizes["q_len"]
    if size > 1:
        kv_len = size * draw(st.integers(0, 4)) + draw(st.integers(1, size - 1))
        sizes["kv_len"], sizes["q_len"] = kv_len, max(1, kv_len - max(decoded, 0))
    sizes["num_selected_blocks"] = max(1, sizes["num_selected_blocks"])


def _all_blocks(draw: st.DrawFn, sizes: Sizes) -> None:
    blocks = -(-sizes["kv_len"] // sizes["selection_block_size"])
    if blocks > 32:
        sizes["kv_len"] = sizes["q_len"] = 32 * sizes["selection_block_size"] - 1
        blocks = 32
    sizes["indices"] = "all"
    sizes["num_selected_blocks"] = blocks + draw(st.integers(0, 1))


def _several_slots(draw: st.DrawFn, sizes: Sizes) -> None:
    sizes["num_selected_blocks"] = draw(st.integers(2, 5))


def _hidden_keys(draw: st.DrawFn, sizes: Sizes) -> None:
    """A5: something to hide."""
    sizes["batch"] = max(1, sizes["batch"])
    if sizes["kv_len"] < 2:
        sizes["kv_len"] += draw(st.integers(2, 8))
    sizes["q_len"] = max(2, sizes["q_len"])
    if sizes["layout"] == "expanded":
        sizes["layout"] = "contiguous"  # the canary sits in one batch entry only


def _memory_or_not_causal(draw: st.DrawFn, sizes: Sizes) -> None:
    if sizes["semantics"].causal and sizes["num_mem_kv"] == 0:
        sizes["num_mem_kv"] = draw(st.sampled_from([1, 2, 16]))


def _rows_without_keys(branch: Branch) -> Adjust:
    def adjust(draw: st.DrawFn, sizes: Sizes) -> None:
        if branch is COMPRESS:
            # the first tokens come before the end of the first block
            sizes["num_mem_kv"] = 0
            if sizes["compress_block_size"] == 1:
                sizes["compress_block_size"] = 2 * sizes["compress_block_sliding_stride"]
            sizes["q_len"] = max(1, sizes["kv_len"])
        elif branch is FINE and not sizes["semantics"].own_block_extra:
            sizes["indices"] = draw(st.sampled_from(["mixed", "none", "few"]))
        else:
            # queries that stand before the first key
            sizes["q_len"] = sizes["kv_len"] + draw(st.integers(1, 4))

    return adjust


def _mean_without_positions(draw: st.DrawFn, sizes: Sizes) -> None:
    sizes["compress_map"], sizes["compress_positions"] = "mean", False


def _small_maps(draw: st.DrawFn, sizes: Sizes) -> None:
    """An MLP of l * dim inputs and as many hidden units is kept affordable."""
    if sizes["compress_block_size"] * sizes["head_dim"] > 256:
        sizes["compress_map"] = "linear"


def _rows_that_choose(draw: st.DrawFn, sizes: Sizes) -> None:
    """More candidates than n, so that scores decide; compressed blocks that overlap."""
    sizes["num_selected_blocks"] = max(1, min(sizes["num_selected_blocks"], 4))
    if sizes["kv_len"] < 4 * sizes["selection_block_size"]:
        sizes["kv_len"] = 4 * sizes["selection_block_size"] + draw(st.integers(0, 3))
        sizes["q_len"] = max(1, min(sizes["q_len"], sizes["kv_len"]))


def _nothing_forced(draw: st.DrawFn, sizes: Sizes) -> None:
    _rows_that_choose(draw, sizes)
    sizes["num_initial_blocks"] = sizes["num_local_blocks"] = 0


def _memory(draw: st.DrawFn, sizes: Sizes) -> None:
    _nothing_forced(draw, sizes)
    sizes["num_mem_kv"] = max(1, sizes["num_mem_kv"])


def _groups(draw: st.DrawFn, sizes: Sizes) -> None:
    _nothing_forced(draw, sizes)
    if sizes["q_heads"] == sizes["kv_heads"]:
        sizes["q_heads"] *= 2


def _window_properties() -> None:
    probe = {"head_dims": (8, 16, 24), "inputs": ("randn",)}
    for clause, semantics, adjust in (
        ("W1", _causal, None),
        ("W2", _not_causal, None),
        ("W3", _causal, _window),
    ):
        exposed = {"semantics": semantics, "adjust": adjust, "examples": 25}
        _register(
            clause,
            SLIDING,
            _exposed_mask(SLIDING, clause),
            f"{clause}_sliding_mask_as_exposed",
            method="sliding_mask",
            **exposed,
        )
        _register(
            clause,
            SLIDING,
            _forward_mask(SLIDING, clause),
            f"{clause}_sliding_mask_as_read",
            **(exposed | probe),
        )
    _register(
        "W3",
        SLIDING,
        _is_full_causal(SLIDING, "W3"),
        "W3_window_of_everything_is_full_causal_attention",
        semantics=_causal,
        adjust=_window_covers,
    )


def _compress_properties() -> None:
    probe = {"head_dims": (8, 16, 24), "inputs": ("randn",)}
    for clause, semantics, adjust in (
        ("C2", _causal, None),
        ("C3", lambda s: True, _memory_or_not_causal),
    ):
        exposed = {"semantics": semantics, "adjust": adjust, "examples": 25}
        _register(
            clause,
            COMPRESS,
            _exposed_mask(COMPRESS, clause),
            f"{clause}_compress_mask_as_exposed",
            method="compress_mask",
            **exposed,
        )
        _register(
            clause,
            COMPRESS,
            _forward_mask(COMPRESS, clause),
            f"{clause}_compress_mask_as_read",
            **(exposed | probe),
        )
    _register(
        "C1",
        COMPRESS,
        _windows,
        "C1_windows_as_read",
        method="pool",
        adjust=_mean_without_positions,
        head_dims=(8, 16, 24),
    )
    _register("C4", COMPRESS, _pool(False), "C4_pool", method="pool", adjust=_small_maps)
    _register(
        "C4",
        COMPRESS,
        _pool(True),
        "C4_pool_gradients",
        method="pool",
        backward=True,
        adjust=_small_maps,
    )


def _fine_properties() -> None:
    probe = {"head_dims": (8, 16, 24), "inputs": ("randn",)}
    for clause, semantics, adjust, indices in (
        ("F1", _causal, None, ("distinct", "few", "all")),
        ("F2", _causal, _short_last_block, ("distinct", "all")),
        ("F3", lambda s: True, _several_slots, ("same", "few")),
        ("F4", _not_causal, None, ("distinct", "few", "all", "mixed")),
        ("I6", _causal, _several_slots, ("mixed", "none")),
    ):
        exposed = {
            "semantics": semantics,
            "adjust": adjust,
            "indices": indices,
            "examples": 25,
        }
        _register(
            clause,
            FINE,
            _exposed_mask(FINE, clause),
            f"{clause}_fine_mask_as_exposed",
            method="fine_mask",
            **exposed,
        )
        _register(
            clause,
            FINE,
            _forward_mask(FINE, clause),
            f"{clause}_fine_mask_as_read",
            **(exposed | probe),
        )
    _register(
        "F1",
        FINE,
        _is_full_causal(FINE, "F1"),
        "F1_all_blocks_selected_is_full_causal_attention",
        semantics=lambda s: s.causal and not (s.own_block_extra and s.duplicates == "multiset"),
        adjust=_all_blocks,
    )


def _attention_properties() -> None:
    for branch in BRANCHES:
        name = branch.name
        _register("A1", branch, _output(branch, "out"), f"A1_{name}_output", examples=40)
        _register("A1", branch, _output(branch, "lse"), f"A1_{name}_lse", examples=25)
        _register(
            "A1",
            branch,
            _heads(branch),
            f"A1_{name}_heads",
            inputs=("randn",),
            head_dims=(8, 16, 24),
            adjust=_groups if branch is FINE else None,
            examples=15,
        )
        _register(
            "A1",
            branch,
            _linear_in_v(branch),
            f"A1_{name}_is_linear_in_v",
            inputs=("randn", "flat", "integers", "huge"),
            examples=10,
        )
        _register("A1", branch, _permutation(branch), f"A1_{name}_permutation", examples=10)
        _register(
            "A2",
            branch,
            _empty_rows(branch, backward=False),
            f"A2_{name}_empty_rows",
            semantics=_causal,
            adjust=_rows_without_keys(branch),
        )
        _register(
            "A2",
            branch,
            _empty_rows(branch, backward=True),
            f"A2_{name}_empty_rows_backward",
            backward=True,
            semantics=lambda s, name=name: s.causal and getattr(s.empty_row, name) == "zero",
            adjust=_rows_without_keys(branch),
            examples=15,
        )
        _register(
            "A3", branch, _gradients(branch), f"A3_{name}_gradients", backward=True, examples=40
        )
        _register(
            "A3",
            branch,
            _backward_mask(branch),
            f"A3_{name}_mask_as_read_backward",
            backward=True,
            head_dims=(8, 16, 24),
            examples=20,
        )
        quiet = {
            "inputs": ("randn", "flat", "integers"),
            "adjust": _hidden_keys,
            "semantics": _causal,
            "examples": 15,
        }
        _register("A5", branch, _canary_forward(branch), f"A5_{name}_canary", **quiet)
        _register(
            "A5",
            branch,
            _canary_backward(branch),
            f"A5_{name}_canary_backward",
            backward=True,
            **quiet,
        )
        _register(
            {"sliding": "W1", "compress": "C2", "fine": "F1"}[name],
            branch,
            _prefix(branch),
            f"{name}_rows_do_not_know_what_follows",
            semantics=_causal,
            examples=10,
        )


def _selection_properties() -> None:
    generic = {"inputs": GENERIC_INPUTS, "method": "select"}
    for clause, options in (
        ("I1", {**generic, "adjust": _memory}),
        (
            "I2",
            {**generic, "adjust": _nothing_forced, "semantics": lambda s: s.importance == "overlap"},
        ),
        ("I3", {**generic, "adjust": _groups}),
        ("I4", {"method": "select", "adjust": _rows_that_choose}),
        ("I5", {"method": "select", "inputs": ("equal", "ties", "integers")}),
        ("I6", {"method": "select"}),
    ):
        _register(
            clause, "selection", _selection(clause), f"{clause}_selection", examples=30, **options
        )


_window_properties()
_compress_properties()
_fine_properties()
_attention_properties()
_selection_properties()


def case_edges(prop: Property, case: Case) -> list[str]:
    """The edges of `strategies.EDGES` that this case tries this property on."""
    branch = next((b for b in BRANCHES if b.name == prop.branch), COMPRESS)
    indices = case.block_indices() if branch is FINE else None
    return edges(case, branch.mask(case, indices))


__all__ = ["PROPERTIES", "Outcome", "Property", "case_edges", "judge"]
