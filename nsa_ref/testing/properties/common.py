"""What a property is, and how one or several tensors are settled against their bounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from nsa_ref.bounds import (
    AttentionBounds,
    attention_bounds,
)
from nsa_ref.semantics import Semantics
from nsa_ref.testing.branches import (
    Branch,
    Inconclusive,
    Inputs,
)
from nsa_ref.testing.case import DTYPES, GENERIC_INPUTS, INPUTS, Case
from nsa_ref.testing.compare import Comparison
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.strategies import cases, shapes_of


@dataclass(frozen=True)
class Outcome:
    """budget : largest share of a bound that was used, None if nothing was compared with one
    ambiguous : rows whose choice of blocks cannot be decided (I5)
    decided : False if that is all that there was
    powerless : tensors beside others whose bounds admit any value
    suspicion : what speaks against the implementation only statistically
    """

    budget: float | None = None
    ambiguous: int = 0
    decided: bool = True
    powerless: int = 0
    suspicion: str = ""


Check = Callable[[Implementation, Case], Outcome]


@dataclass(frozen=True, kw_only=True)
class Property:
    """name : stable, used by replay
    clause : what it decides; `judge` may find that another one is to blame
    branch : compress, fine, sliding, "selection" or "layer"
    about : what `strategies.cases` are to be about
    method, backward : what the implementation must offer, and whether its gradients are needed
    semantics : which of the implementation's semantics it can be asked about
    options : further arguments of `strategies.cases`
    extent : "far" or "large" if it is asked on such cases alone; their masks are too large to hold
    requires : why an implementation cannot be asked, or nothing
    by_dtype : whether lots of cases go by dtype and kind of input, or by shape
    examples : at the quick level
    """

    name: str
    clause: str
    branch: str
    about: str
    method: str
    backward: bool
    check: Check
    semantics: Callable[[Semantics], bool]
    options: dict[str, Any]
    extent: str
    requires: Callable[[Implementation], str]
    by_dtype: bool
    examples: int

    def offered(self, implementation: Implementation) -> str | None:
        """None if it can be asked, else why not."""
        if not implementation.offers(self.method):
            return f"{self.method} is not offered"
        if self.backward and not implementation.offers_vjp(self.method):
            return f"gradients of {self.method} are not offered"
        if not any(map(self.semantics, implementation.semantics)):
            return f"none of the declared semantics has what {self.clause} is about"
        return self.requires(implementation) or None

    def strata(
        self, implementation: Implementation, dtypes: Collection[str] | None = None
    ) -> list[st.SearchStrategy[Case]]:
        """Cases for this property within what the implementation declares, in several lots.

        Every shape is a lot, or every dtype where `by_dtype` says that rounding matters more.
        """
        allowed = [s for s in implementation.semantics if self.semantics(s)]
        declared = [d for d in implementation.numerics if d in (dtypes or [d])]
        if self.extent == "large":
            declared = [min(declared, key=lambda dtype: DTYPES[dtype].itemsize)]
        shapes = (self.extent,) if self.extent else shapes_of(self.about)
        lots: list[dict[str, Any]] = [{"shape": shape} for shape in shapes]
        if self.by_dtype:
            lots = [{"dtypes": [dtype]} for dtype in declared]
            kinds = self.options.get("inputs", INPUTS)
            generic = [kind for kind in kinds if kind in GENERIC_INPUTS]
            lots += [{"dtypes": [dtype], "inputs": generic} for dtype in declared if generic]
        if self.by_dtype and self.about == "layer":
            # a few tokens of any dtype, and sequences of each
            lots = [{"shape": "few tokens"}]
            lots += [{"shape": "square", "dtypes": [dtype]} for dtype in declared]
        common: dict[str, Any] = {"semantics": allowed, "dtypes": declared} | self.options
        return [cases(implementation, self.about, **(common | lot)) for lot in lots]


def declared(implementation: Implementation, case: Case) -> bool:
    """Whether a case that was derived from another one lies within what is declared as well."""
    within = all(getattr(case, name) in allowed for name, allowed in implementation.limits.items())
    return within and implementation.supports(case) is None


def bounds_of(
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


def all_bounds(case: Case, *arguments: Any) -> list[AttentionBounds]:
    """Deterministic; on generic data also statistical and shared: what `compare` takes."""
    forms = ("deterministic", "statistical", "shared") if case.generic else ("deterministic",)
    branch, implementation, inputs, mask, *gradients = arguments
    return [
        bounds_of(branch, implementation, case, inputs, mask, form, *gradients) for form in forms
    ]


def settle(comparisons: Sequence[Comparison]) -> Outcome:
    """Several tensors' comparisons in one."""
    if comparisons and all(c.powerless for c in comparisons):
        raise Inconclusive("the bounds admit any value: too ill-conditioned for this dtype")
    return Outcome(
        budget=max((c.budget for c in comparisons if not c.powerless), default=None),
        powerless=sum(c.powerless for c in comparisons),
        suspicion=next((c.suspicion for c in comparisons if c.suspicion), ""),
    )


def gradient_bounds(
    branch: Branch,
    implementation: Implementation,
    case: Case,
    inputs: Inputs,
    mask: np.ndarray,
    d_out: np.ndarray,
    d_lse: np.ndarray,
) -> list[np.ndarray]:
    """Deterministic bounds of dq, dk and dv."""
    asked = (branch, implementation, case, inputs, mask)
    _, _, dq, dk, dv = bounds_of(*asked, "deterministic", d_out, d_lse)
    assert dq is not None and dk is not None and dv is not None  # d_out was given
    return [dq, dk, dv]
