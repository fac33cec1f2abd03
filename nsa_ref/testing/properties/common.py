"""What a property is, and how one or several tensors are settled against their bounds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from nsa_ref.attention import Attention
from nsa_ref.bounds import FORMS, AttentionBounds, AttentionValues, judged_attention
from nsa_ref.semantics import Semantics
from nsa_ref.testing.branches import FINE, GRADIENTS, Branch, Inputs
from nsa_ref.testing.case import (
    DTYPES,
    EXTREME_INPUTS,
    GENERIC_INPUTS,
    INDICES,
    INPUTS,
    Case,
)
from nsa_ref.testing.compare import Comparison, compare
from nsa_ref.testing.implementation import Implementation, refusal
from nsa_ref.testing.limits import is_within, layer_lengths, limited
from nsa_ref.testing.strategies import HEAD_DIMS, Adjust, cases, shapes_of
from nsa_ref.testing.verdicts import Inconclusive, Remark, WrongElement, WrongFactor


@dataclass(frozen=True)
class Outcome:
    """compared : how many elements could have been wrong; a case without any decides nothing
    budget : largest share of a bound that was used, None if nothing was compared with one
    ambiguous : rows whose choice of blocks cannot be decided (I5)
    powerless : tensors beside others whose bounds admit any value
    suspicion : what speaks against the implementation only statistically
    """

    compared: int
    budget: float | None = None
    ambiguous: int = 0
    powerless: int = 0
    suspicion: WrongElement | WrongFactor | None = None


#: What the cases of a method are about; those of all others are about its branch.
ABOUT_OF = {"pool": "pool", "select": "selection"} | dict.fromkeys(
    ("layer", "layer_with_blocks", "decode", "varlen"), "layer"
)


@dataclass(frozen=True)
class Property:
    """One row of the table: a clause, how it is checked, and on which cases.

    name : stable, used by replay
    clause : what it decides; `judge` may find that another one is to blame
    branch : whose columns and masks it is about; None for the choice of blocks and whole layers
    method, backward : what the implementation must offer, and whether its gradients are needed
    check : runs it on one case; reads of the property what it needs
    by_dtype : whether lots of cases go by dtype and kind of input, or by shape
    extent : "far" or "large" if it is asked on such cases alone; their masks are too large to hold
    semantics : which of the implementation's semantics it can be asked about
    why_not_tried : why the judge does not try it on an implementation, or None
    adjust : brings about what it is about (see adjust.py)
    precondition : raises Inconclusive for a case that cannot show it
    inputs, indices, head_dims : what cases are drawn from; all there are, if empty
    populated : whether its cases have a batch entry, two rows and two keys at least
    examples : at the quick level
    """

    name: str
    clause: str
    branch: Branch | None
    method: str
    check: Check
    _: KW_ONLY
    backward: bool = False
    by_dtype: bool = False
    extent: str = ""
    semantics: Callable[[Semantics], bool] = lambda semantics: True
    why_not_tried: Callable[[Implementation], Remark | None] = lambda implementation: None
    adjust: Adjust | None = None
    precondition: Callable[[Case], None] = lambda case: None
    inputs: Sequence[str] = ()
    indices: Sequence[str] = ()
    head_dims: Sequence[int] = ()
    populated: bool = False
    examples: int = 20

    @property
    def called(self) -> str:
        """The plug's method that it calls, as in "fine" or "fine_vjp"."""
        return f"{self.method}_vjp" if self.backward else self.method

    @property
    def about(self) -> str:
        """What its cases are about, a key of `strategies.ABOUT`."""
        return ABOUT_OF.get(self.method) or self.the_branch.name

    @property
    def part(self) -> str:
        """What `--branch` calls it: compress, fine, sliding, selection or layer."""
        return self.about if self.about in ("selection", "layer") else self.the_branch.name

    @property
    def the_branch(self) -> Branch:
        """`branch`, for the checks that are asked of one."""
        assert self.branch is not None, f"{self.name} is about no branch"
        return self.branch

    def run(self, implementation: Implementation, case: Case) -> Outcome:
        """Check one case.

        Raises
        ------
        Broken, Raised, Inconclusive, NotOffered
        """
        self.precondition(case)
        return self.check(self, implementation, case)

    def why_not_offered(self, implementation: Implementation) -> str:
        """What the implementation does not offer that this needs, or nothing."""
        if not implementation.offers(self.method):
            return self.method
        if self.backward and not implementation.offers_vjp(self.method):
            return f"gradients of {self.method}"
        implementation = limited(implementation, self.called)
        if not implementation.numerics:
            return f"{self.called}: none of the declared dtypes lies within its limits"
        if not any(map(self.semantics, implementation.semantics)):
            return f"none of the declared semantics has what {self.clause} is about"
        if self.about == "layer" and layer_lengths(implementation.limits) == []:
            return f"{self.method}: q_len is kv_len, and no length lies within the limits of both"
        return ""

    def could_draw(self, case: Case) -> bool:
        """Whether a case that comes from elsewhere is what this property is about."""
        dims = self.head_dims or (case.head_dim, case.value_dim)
        return (
            self.semantics(case.semantics)
            and self.adjust is None
            and case.inputs in (self.inputs or INPUTS)
            and case.indices in (self.indices or INDICES)
            and {case.head_dim, case.value_dim} <= set(dims)
        )

    def strata(
        self, implementation: Implementation, dtypes: Collection[str] | None = None
    ) -> list[st.SearchStrategy[Case]]:
        """Cases for this property within what the implementation declares, in several lots.

        Every shape is a lot, or every dtype where `by_dtype` says that rounding matters more.
        """
        implementation = limited(implementation, self.called)
        allowed = [s for s in implementation.semantics if self.semantics(s)]
        declared = [d for d in implementation.numerics if d in (dtypes or [d])]
        if self.extent == "large":
            declared = [min(declared, key=lambda dtype: DTYPES[dtype].itemsize)]
        inputs = self.inputs or INPUTS
        shapes = (self.extent,) if self.extent else shapes_of(self.about)
        lots: list[dict[str, Any]] = [{"shape": shape} for shape in shapes]
        if self.by_dtype and self.about == "layer":
            # a few tokens of any dtype, and sequences of each
            lots = [{"shape": "few tokens"}]
            lots += [{"shape": "square", "dtypes": [dtype]} for dtype in declared]
        elif self.by_dtype:
            generic = [kind for kind in inputs if kind in GENERIC_INPUTS]
            # of each dtype some cases with all that it has hardly room for; float16 has least
            extreme = [kind for kind in inputs if kind in EXTREME_INPUTS]
            lots = [
                {
                    "dtypes": [dtype],
                    "inputs": [*inputs, *(6 if dtype == "float16" else 2) * extreme],
                }
                for dtype in declared
            ]
            lots += [{"dtypes": [dtype], "inputs": generic} for dtype in declared if generic]
        every: dict[str, Any] = {
            "semantics": allowed,
            "dtypes": declared,
            "inputs": inputs,
            "indices": self.indices or INDICES,
            "head_dims": self.head_dims or HEAD_DIMS,
            "populated": self.populated,
            "adjust": self.adjust,
        }
        return [cases(implementation, self.about, **(every | lot)) for lot in lots]


#: One case of a property. Raises what `Property.run` does.
Check = Callable[[Property, Implementation, Case], Outcome]


@functools.lru_cache(maxsize=1)  # the property asks for it, and then whoever counts its edges
def oracle_mask(branch: Branch, case: Case) -> np.ndarray:
    """The definition's multiplicities for the case's own blocks; nobody may write into them."""
    return branch.mask(case, case.block_indices() if branch is FINE else None)


def set_up(prop: Property, case: Case) -> tuple[Branch, Inputs, np.ndarray]:
    """The property's branch, the case's inputs for it, and the definition's multiplicities."""
    branch = prop.the_branch
    return branch, branch.inputs(case), oracle_mask(branch, case)


def chooses_lengths(implementation: Implementation, case: Case) -> Case:
    """The case that further lengths are drawn from: one for all, where every shape compiles."""
    return dataclasses.replace(case, seed=0) if implementation.pace == "compiles" else case


def is_declared(implementation: Implementation, case: Case, drawn: Case) -> bool:
    """Whether a case that was derived from a drawn one lies within what is declared as well.

    What it has of that one does: limits of what its cases are not about, as of a layer's `indices`,
    do not matter to it.
    """
    limits, rules = implementation.limits.items(), implementation.rules
    within = all(
        getattr(case, name) in (getattr(drawn, name), *allowed) for name, allowed in limits
    )
    within = within and all(rule.holds(case) or not rule.holds(drawn) for rule in rules)
    return within and refusal(implementation, case) is None


def can_be_asked(implementation: Implementation, method: str, case: Case) -> bool:
    """Whether a case of one method lies within what is declared of another one, as its name is.

    What is wrong by the first may be told better by the second, and is not lost where it cannot.
    """
    vjp = method.endswith("_vjp")
    offers = implementation.offers_vjp if vjp else implementation.offers
    return offers(method.removesuffix("_vjp")) and is_within(implementation, method, case)


def judged(
    branch: Branch,
    implementation: Implementation,
    case: Case,
    inputs: Inputs,
    mask: np.ndarray,
    d_out: np.ndarray | None = None,
    d_lse: np.ndarray | None = None,
    *,
    forms: Sequence[str] = FORMS,
) -> tuple[AttentionValues, list[AttentionBounds]]:
    """What a branch returns, and bounds on it, from one float64 forward; A2 for rows without keys.

    Out and lse; the gradients as well, if d_out and d_lse are given.

    forms : on data that is not generic the first one alone; what `compare` takes
    """
    q, empty, rule = inputs.q.astype(np.float64), mask.sum(-1) == 0, branch.empty_row(case)
    if rule == "uniform":
        # such a row is attention with equal logits over all columns; nothing goes back to q
        mask, q = np.where(empty[..., None], 1, mask), np.where(empty[..., None], 0.0, q)
    if not case.generic:
        forms = forms[:1]
    how: dict[str, Any] = {"numerics": implementation.numerics[case.dtype], "scale": case.scale}
    values, bounds = judged_attention(q, inputs.k, inputs.v, mask, d_out, d_lse, forms=forms, **how)
    if rule == "nan":
        values = values._replace(out=np.where(empty[..., None], np.nan, values.out))
    if values.dq is not None:
        values = values._replace(dq=np.where(empty[..., None], 0.0, values.dq))
    empty_lse = getattr(case.semantics.empty_lse, branch.name)
    return values._replace(lse=np.where(empty, empty_lse, values.lse)), bounds


def expected_of(
    prop: Property,
    implementation: Implementation,
    case: Case,
    *given: Any,
    forms: Sequence[str] = FORMS[:1],
) -> tuple[tuple[np.ndarray, ...], list[AttentionBounds]]:
    """Out and lse, or the gradients, and the bounds on them; given, forms : as for `judged`."""
    values, bounds = judged(prop.the_branch, implementation, case, *given, forms=forms)
    return values.gradients if prop.backward else (values.out, values.lse), bounds


def bounds_of(
    branch: Branch, implementation: Implementation, case: Case, *given: Any
) -> AttentionBounds:
    """The deterministic bounds alone; given : the further arguments of `judged`."""
    return judged(branch, implementation, case, *given, forms=FORMS[:1])[1][0]


def compare_all(
    prop: Property,
    found: Attention | tuple[np.ndarray, ...],
    expected: Attention | tuple[np.ndarray, ...],
    bounds: Sequence[AttentionBounds],
    *,
    part: str = "",
    rows: Sequence[int] | None = None,
) -> Outcome:
    """Out and lse, or dq, dk and dv, against their bounds; lse may be None.

    part, rows : as in `compare`; dk and dv have no such rows
    """
    names = GRADIENTS if prop.backward else ("out", "lse")
    comparisons = []
    for name, actual, wanted in zip(names, found, expected):
        if actual is None:
            continue
        tensor = f"{prop.the_branch.name} {name}"
        limits = [getattr(bound, name) for bound in bounds]
        some = None if name in ("dk", "dv") else rows
        comparisons.append(
            compare(prop.clause, tensor, actual, wanted, *limits, part=part, rows=some)
        )
    return settle(comparisons, sent=bool(not prop.backward or expected[0].size))


def settle(comparisons: Sequence[Comparison], *, sent: bool = True) -> Outcome:
    """Several tensors' comparisons in one.

    sent : False if no gradient was sent: that none comes back then shows nothing
    """
    if comparisons and all(c.powerless for c in comparisons):
        raise Inconclusive("only powerless bounds")
    return Outcome(
        compared=sum(c.elements for c in comparisons) if sent else 0,
        budget=max((c.budget for c in comparisons if not c.powerless), default=None),
        powerless=sum(c.powerless for c in comparisons),
        suspicion=next((c.suspicion for c in comparisons if c.suspicion), None),
    )
