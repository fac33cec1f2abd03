"""Selection: is the choice of blocks a valid top-n (I1 to I6)?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsa_ref.selection import Scored, scored
from nsa_ref.selection_bounds import score_bounds
from nsa_ref.testing.branches import as_array, call
from nsa_ref.testing.case import Case
from nsa_ref.testing.choices import AMBIGUOUS, INVALID, Reason, undecided_rows, valid_selection
from nsa_ref.testing.compare import check_bits
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties.common import Outcome, Property, is_declared
from nsa_ref.testing.strategies import fresh_seeds
from nsa_ref.testing.verdicts import Broken, Raised, WrongChoice

#: A finding has the scores of at most so many blocks.
SCORES = 12

#: Which clause an order breaks is asked of other cases: of scores, and of a forced block's rank.
ORDER, FORCED_ORDER = "order", "forced order"


@dataclass(frozen=True)
class _Row:
    """One query's choice: named indices, what is known of all blocks, and n."""

    named: np.ndarray
    scores: np.ndarray
    candidate: np.ndarray
    forced: np.ndarray
    n: int

    def around_the_cutoff(self) -> tuple[tuple[int, float], ...]:
        """(block, score) of the candidates next to the n-th best, the best one first."""
        candidates = np.flatnonzero(self.candidate)
        ranked = candidates[np.argsort(-self.scores[candidates], kind="stable")]
        start = max(0, min(self.n - SCORES // 2, len(ranked) - SCORES))
        near = ranked[start : start + SCORES]
        return tuple((int(block), float(self.scores[block])) for block in near)

    def clause_to_blame(self, reason: Reason) -> str:
        """The clause to blame, more closely than top-n as such (I4); or one of the orders."""
        if reason.clause != "I4":
            return reason.clause
        outside = [b for b in self.named if 0 <= b < len(self.scores) and not self.candidate[b]]
        left = [b for b in np.flatnonzero(self.candidate) if b not in self.named]
        if any(self.scores[b] == self.scores[other] for b in outside for other in left):
            return "I5"
        if self.candidate.sum() < self.n:
            return "I6"
        if reason.rule == "order":
            of_forced = any(self.forced[b] for b in (reason.block, reason.worse) if b is not None)
            return FORCED_ORDER if of_forced else ORDER
        return reason.clause


def valid_choice(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """I1 to I6: the choice is a valid top-n of the oracle's scores, up to rounding."""
    ambiguous, found = _invalid_rows(implementation, case)
    _blame(prop, implementation, case, found)
    return _outcome(case, ambiguous)


def in_pairs(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """I4: a call leaves the choice of the one before as it is, and takes nothing from it."""
    earlier = fresh_seeds(case, 1)[0]
    results = call(implementation.run_twice, "select", case, _given(earlier), _given(case))
    before, after, indices = map(as_array, results)
    _, wrong_before = invalid_rows(earlier, before, *_scores(implementation, earlier))
    _blame(prop, implementation, earlier, wrong_before)
    part, why = "of the call before", "the next call has changed it"
    tensors = after.astype(np.float64), before.astype(np.float64)
    check_bits(prop.clause, "select", *tensors, part=part, why=why)
    ambiguous, found = invalid_rows(case, indices, *_scores(implementation, case))
    if found:
        rows = [(fault.batch, fault.head, fault.row) for fault in found.values()]
        if all(np.array_equal(indices[row], before[row]) for row in rows):
            # it was right in the first call: the scores are no mistake
            raise Broken(prop.clause, next(iter(found.values())), notes=(("choice of before",),))
        _blame(prop, implementation, case, found)
    return _outcome(case, ambiguous)


def _outcome(case: Case, ambiguous: int) -> Outcome:
    rows = case.batch * case.selection_heads * case.q_len
    return Outcome(compared=(rows - ambiguous) * case.num_selected_blocks, ambiguous=ambiguous)


def _blame(
    prop: Property, implementation: Implementation, case: Case, found: dict[str, WrongChoice]
) -> None:
    """Raise Broken for what `invalid_rows` found, with the clause that is to blame."""
    if FORCED_ORDER in found:
        wrong = ORDER in found or _wrong_without_forced_blocks(implementation, case)
        found.setdefault(ORDER if wrong else "I4", found.pop(FORCED_ORDER))
    if ORDER in found:
        found[_whose_order(prop, implementation, case)] = found.pop(ORDER)
    if found:
        clause = prop.clause if prop.clause in found else next(iter(found))
        raise Broken(clause, found[clause])


def _wrong_without_forced_blocks(implementation: Implementation, case: Case) -> bool:
    """Whether the scores are wrong by themselves, as far as that can be asked (I2 or I3)."""
    without = dataclasses.replace(case, num_initial_blocks=0, num_local_blocks=0)
    declared = is_declared(implementation, without, case)
    return declared and bool(_invalid_rows(implementation, without)[1])


def _whose_order(prop: Property, implementation: Implementation, case: Case) -> str:
    """Which of I1, I2, I3 the scores break: the one whose part is needed to see it.

    What is right without the part must be so with other data as well, some of which decides.
    Where limits leave no case without the part of the property's clause, that is to blame.
    """
    smaller: tuple[tuple[str, dict[str, Any]], ...] = (
        ("I1", {"num_mem_kv": 0}),
        ("I3", {"num_mem_kv": 0, "q_heads": case.kv_heads}),
    )
    for clause, less in smaller:
        without = dataclasses.replace(case, **less)
        if without == case:
            continue
        if not is_declared(implementation, without, case):
            if clause == prop.clause:
                return clause
            continue
        tried = [without, *fresh_seeds(without, 4)]
        wrong = any(_invalid_rows(implementation, one)[1] for one in tried)
        if not wrong and any(_scores_decide(implementation, one) for one in tried):
            return clause
    return "I3" if case.semantics.importance == "logit_mean" else "I2"


def _scores_decide(implementation: Implementation, case: Case) -> bool:
    """Whether there is a row in which scores leave one choice of several."""
    of_blocks, bounds = _scores(implementation, case)
    several = of_blocks.candidates.sum(-1) > case.num_selected_blocks
    decided = several & ~undecided_rows(of_blocks, bounds, **case.geometry)
    return bool(case.num_selected_blocks and decided.any())


def _scores(implementation: Implementation, case: Case) -> tuple[Scored, np.ndarray]:
    """What is known of the blocks, and how exactly the implementation can know their scores."""
    how: dict[str, Any] = {"kv_len": case.kv_len, **case.geometry}
    given, numerics = _given(case), implementation.numerics[case.dtype]
    return scored(*given, **how), score_bounds(*given, **how, numerics=numerics)


def _invalid_rows(implementation: Implementation, case: Case) -> tuple[int, dict[str, WrongChoice]]:
    """`invalid_rows` of what the implementation chooses."""
    indices = as_array(call(implementation.run, "select", case, *_given(case)))
    return invalid_rows(case, indices, *_scores(implementation, case))


def _given(case: Case) -> tuple[np.ndarray, ...]:
    """What `select` is called with."""
    q, k_cmp, _, mem_k, _ = case.compressed()
    return q, k_cmp, mem_k


def check_form(case: Case, indices: np.ndarray) -> None:
    """Raise Raised for indices that have another form than the plug says."""
    rows = (case.batch, case.selection_heads, case.q_len)
    if indices.shape[:3] != rows or indices.ndim != 4 or indices.dtype.kind != "i":
        raise Raised(
            f"select returned {indices.dtype} of shape {indices.shape}; it must be integers of "
            f"shape {(*rows, case.num_selected_blocks)}"
        )


def invalid_rows(
    case: Case, indices: np.ndarray, of_blocks: Scored, bounds: np.ndarray
) -> tuple[int, dict[str, WrongChoice]]:
    """How many rows are ambiguous, and by clause (or order) the first row that is wrong.

    Raises
    ------
    Raised : indices that have another form than the plug says
    """
    check_form(case, indices)
    verdict = valid_selection(indices, of_blocks, bounds, **case.geometry)
    found: dict[str, WrongChoice] = {}
    for b, g, t in np.argwhere(verdict.verdict == INVALID).tolist():
        reason = verdict.reasons[b, g, t]
        scores, candidate = of_blocks.scores[b, g, t], of_blocks.candidates[t]
        forced, n = of_blocks.forced[t], case.num_selected_blocks
        chosen = _Row(indices[b, g, t], scores, candidate, forced, n)
        found.setdefault(
            chosen.clause_to_blame(reason),
            WrongChoice(
                batch=b,
                head=g,
                row=t,
                position=t + case.kv_len - case.q_len,
                chosen=tuple(chosen.named.tolist()),
                reason=reason,
                scores=chosen.around_the_cutoff(),
            ),
        )
    return int((verdict.verdict == AMBIGUOUS).sum()), found
