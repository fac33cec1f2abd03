"""Judging one case: what a property says of it, which clause is to blame, and who failed."""

from __future__ import annotations

import dataclasses
import signal
import traceback
from pathlib import Path

from nsa_ref.testing.branches import BRANCHES
from nsa_ref.testing.case import Case
from nsa_ref.testing.handing_over import Stopped, own_settings, stop_if_alarmed
from nsa_ref.testing.implementation import (
    Implementation,
    NotOffered,
    OracleImplementation,
    Refused,
    WrongDeclaration,
    refusal,
)
from nsa_ref.testing.limits import limited
from nsa_ref.testing.properties import extent, masks
from nsa_ref.testing.properties.common import Outcome, Property
from nsa_ref.testing.strategies import fresh_seeds
from nsa_ref.testing.verdicts import Broken, Failure, NoAnswer, Raised
from nsa_ref.testing.wording import LONGEST_KEPT, LONGEST_REASON, cut, one_line

BRANCH_NAMES = tuple(branch.name for branch in BRANCHES)


def judge(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """Run one property on one case.

    A wrong value whose case also shows a wrong mask is the mask's fault, and reported as such,
    with both masks side by side. A suspicion counts if three fresh seeds all show it again.

    Code under test may raise what no test expects: SystemExit, pytest.skip, an error when an array
    that it returned is read. The oracle decides who is at fault: if the same case can be judged
    for it, the implementation is; otherwise the judge is, and the exception goes on.

    Raises
    ------
    Broken, Inconclusive, NotTried, NotOffered
    WrongDeclaration : `supports` of the implementation says neither yes nor why not
    Stopped : an alarm rang that is not the implementation's, such as that of pytest-timeout
    """
    implementation = limited(implementation, prop.called)
    try:
        return _ask(prop, implementation, case)
    except (Broken, NotOffered, NoAnswer, WrongDeclaration, Stopped):
        raise
    except Raised as error:
        raise Broken(prop.clause, _failure(prop, str(error), error.__cause__)) from error
    except BaseException as error:
        stop_if_alarmed(error)
        if isinstance(error, KeyboardInterrupt) and not ignores_ctrl_c():
            raise  # the user's
        if isinstance(error, Exception) and not _oracle_can(prop, case):
            raise
        raise Broken(prop.clause, _failure(prop, one_line(error), error)) from error


def _ask(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    if reason := refusal(implementation, case):
        raise Refused(reason)
    try:
        outcome = _run(prop, implementation, case)
        if outcome.suspicion:
            again = [_run(prop, implementation, fresh) for fresh in fresh_seeds(case, 3)]
            if all(fresh.suspicion for fresh in again):
                raise Broken(prop.clause, outcome.suspicion, notes=(("fresh seeds", len(again)),))
            outcome = dataclasses.replace(outcome, budget=None, suspicion=None)
        return outcome
    except Broken as broken:
        values = broken.clause in ("A1", "A2", "A3", "A5")
        if values and prop.part in BRANCH_NAMES and prop.extent != "large":
            blame = extent.blame_the_mask if prop.extent else masks.blame_the_mask
            blame(implementation, case, prop)
        raise


def _run(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    return prop.run(implementation, case)


# CPython keeps the frames of calls in chunks of 16 KB. Where a loop happens to run at the end of
# one, each call in it maps a new chunk and unmaps it again: the fla kernels, in Triton's
# interpreter, took twice as long. A frame that asks for 320 KB gets a chunk of 512, and the port
# runs in what is left of it.
_run.__code__ = _run.__code__.replace(co_stacksize=40_000)


@own_settings()
def _oracle_can(prop: Property, case: Case) -> bool:
    """True if the property gets to an answer when it asks the definition itself."""
    try:
        _ask(prop, OracleImplementation(), case)
    except (Broken, NotOffered, NoAnswer, Raised):
        pass
    except Exception:
        return False
    return True


def ignores_ctrl_c() -> bool:
    """True in workers (see plugin.py): no user can cause a KeyboardInterrupt there."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def _failure(prop: Property, what: str, error: BaseException | None) -> Failure:
    """What came of the call, with the line of the adapter that raised, and the innermost one."""
    what = cut(what, LONGEST_KEPT)
    if error is None:
        return Failure(kind="result", tensor=prop.method, what=what)
    here = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if here not in f.filename]
    lines = [
        f"{f.filename}:{f.lineno}, in {f.name}: {cut(f.line or '', LONGEST_REASON)}" for f in frames
    ]
    where = tuple(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return Failure(kind="exception", tensor=prop.method, what=what, where=where)
