"""Values: outputs, lse and gradients against their bounds, and rows that see nothing."""

from __future__ import annotations

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.bounds import FORMS, AttentionValues
from nsa_ref.testing.branches import GRADIENTS, Branch, Inputs
from nsa_ref.testing.case import Case
from nsa_ref.testing.compare import check_exact, compare
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.properties.common import (
    Outcome,
    Property,
    compare_all,
    expected_of,
    judged,
    set_up,
    settle,
)
from nsa_ref.testing.verdicts import Convention, Inconclusive


def check_empty_rows(
    branch: Branch,
    case: Case,
    mask: np.ndarray,
    expected: Attention | AttentionValues,
    actual: Attention,
) -> int:
    """A2 for out and lse; a "uniform" out is left to the bounds. How many elements there were."""
    empty, compared = mask.sum(-1) == 0, 0
    why, name = "the row sees no key", branch.name
    if branch.empty_row(case) != "uniform":
        out = actual.out, expected.out, empty[..., None]
        switch = Convention("empty_row")
        compared += check_exact("A2", f"{name} out", *out, why=why, convention=switch)
    if actual.lse is not None:
        lse = actual.lse, expected.lse, empty
        switch = Convention("empty_lse")
        compared += check_exact("A2", f"{name} lse", *lse, why=why, convention=switch)
    return compared


def output(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A1: out is the definition's, up to its bounds."""
    return _forward(prop, implementation, case, "out")


def lse(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A1: so is lse."""
    return _forward(prop, implementation, case, "lse")


def _forward(prop: Property, implementation: Implementation, case: Case, which: str) -> Outcome:
    branch, inputs, mask = set_up(prop, case)
    actual = branch.forward(implementation, case, inputs)
    if which == "lse" and actual.lse is None:
        raise NotOffered("lse")
    expected, bounds = judged(branch, implementation, case, inputs, mask)
    check_empty_rows(branch, case, mask, expected, actual)
    tensors = [getattr(x, which) for x in (actual, expected, *bounds)]
    if which == "lse":
        tensors = [x[..., None] for x in tensors]  # a row of its own, for the slope test
    return settle([compare("A1", f"{branch.name} {which}", *tensors)])


def gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A3: dq, dk and dv are the definition's, up to their bounds."""
    branch, inputs, mask = set_up(prop, case)
    d_out, d_lse = sent_back(branch, case, mask, of_lse=implementation.lse_gradient)
    actual = branch.backward(implementation, case, inputs, d_out, d_lse)
    sent = d_out, d_lse
    expected, bounds = expected_of(prop, implementation, case, inputs, mask, *sent, forms=FORMS)
    return compare_all(prop, actual, expected, bounds)


def sent_back(
    branch: Branch, case: Case, mask: np.ndarray, *, of_lse: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """d_out and d_lse, of which the odd seeds have both; of_lse : a gradient may go through lse."""
    d_out, d_lse = case.upstream_gradients()
    if case.seed % 2 == 0 or not of_lse:
        d_lse = np.zeros_like(d_lse)  # what a layer sends
    if branch.empty_row(case) == "nan":
        # no gradient is defined for a NaN row
        empty = mask.sum(-1) == 0
        d_out = np.where(empty[..., None], 0, d_out).astype(d_out.dtype)
    return d_out, d_lse


def empty_rows(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A2: nothing comes out of a row that sees no key, and nothing goes back through it."""
    branch, inputs, mask = set_up(prop, case)
    empty = mask.sum(-1) == 0
    if not empty.any():
        raise Inconclusive("no empty row")
    if not prop.backward:
        actual = branch.forward(implementation, case, inputs)
        wanted = branch.attend(case, mask, inputs)
        return Outcome(compared=check_empty_rows(branch, case, mask, wanted, actual))
    if branch.empty_row(case) != "zero":
        raise Inconclusive("empty rows that are not zero")
    d_out, d_lse = upstream(branch, implementation, case, inputs)
    d_out = np.where(empty[..., None], d_out, 0).astype(d_out.dtype)
    d_lse = np.where(empty, d_lse, 0).astype(d_lse.dtype)
    gradients = branch.backward(implementation, case, inputs, d_out, d_lse)
    why = "d_out is 0 in every row that sees a key"
    return Outcome(
        compared=sum(
            check_exact("A2", f"{branch.name} {name}", gradient, 0.0, why=why)
            for name, gradient in zip(GRADIENTS, gradients)
        )
    )


def upstream(
    branch: Branch, implementation: Implementation, case: Case, inputs: Inputs
) -> tuple[np.ndarray, np.ndarray]:
    """d_out and d_lse; d_lse is 0 where no gradient may arrive through lse."""
    d_out, d_lse = case.upstream_gradients()
    takes_both = (
        implementation.lse_gradient and branch.forward(implementation, case, inputs).lse is not None
    )
    return d_out, d_lse if takes_both else np.zeros_like(d_lse)
