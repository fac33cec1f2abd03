"""From one broken case to another, step by step: are they one mistake, and how small is it?

Two cases that break show one mistake if the one can be changed into the other and every case on the
way breaks as well. Where cases in between pass, there are two mistakes. (A reducer of test cases
slips from one bug to another; here that is looked for.) All sizes of the sequence change in one
step: one by one they would lead from a mistake about many blocks to one about a short last block.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.conditions import least_of
from nsa_ref.testing.implementation import Implementation, NotOffered, OracleImplementation
from nsa_ref.testing.judging import judge
from nsa_ref.testing.limits import Limits, limited
from nsa_ref.testing.properties import Property
from nsa_ref.testing.properties.common import is_declared
from nsa_ref.testing.verdicts import FAILURES, Broken, Inconclusive

#: Seeds with which a case is tried, after its own: which block a row chooses goes by the data.
SEEDS = (0, 1)

LENGTHS = ("q_len", "kv_len")
BLOCKS = ("compress_block_size", "compress_block_sliding_stride", "selection_block_size")
HEADS = ("q_heads", "kv_heads")

FIELDS = tuple(field.name for field in dataclasses.fields(Case) if field.name != "seed")

#: What changes in one step, from one case to another.
STEPS = (
    (*LENGTHS, *BLOCKS),
    HEADS,
    *((name,) for name in FIELDS if name not in (*LENGTHS, *BLOCKS, *HEADS)),
)

#: Of names that stand for data, those that say the most plainly what is read.
PLAINEST = {"indices": ("distinct", "all", "none", "same", "few", "mixed")}

#: What is made smaller together, before every field is by itself.
TOGETHER = (LENGTHS, BLOCKS, HEADS, ("head_dim", "value_dim"))


def fault_of(prop: Property, implementation: Implementation, case: Case) -> tuple[str, bool] | None:
    """The clause that a case breaks, and whether no result came at all; None if it breaks none."""
    try:
        judge(prop, implementation, case)
    except Broken as broken:
        return broken.clause, broken.fault.kind in FAILURES
    except (NotOffered, Inconclusive):
        pass
    return None


def leads_to(
    prop: Property, implementation: Implementation, start: Case, goal: Case, until: float
) -> bool:
    """Whether a broken case can be changed into another one so that every case between breaks.

    Clauses may differ on the way.

    until : when the time is up, as `time.monotonic` counts
    """
    end = dataclasses.replace(goal, seed=start.seed)
    ends = all(_breaks(prop, implementation, case, goal) for case in (start, goal))
    reached, left = {start}, [start] if ends else []
    while left and time.monotonic() < until:
        case = left.pop()
        if case == end:
            return True
        for step in _steps(case, goal):
            if step not in reached and _breaks(prop, implementation, step, goal):
                reached.add(step)
                left.append(step)
    return False


def is_like(
    prop: Property, implementation: Implementation, case: Case, goal: Case, until: float
) -> bool:
    """Whether a broken case breaks after any one step towards another: more than `leads_to` asks.

    It is asked of cases of which there are many, and none is needed.

    until : as in `leads_to`
    """
    return all(
        time.monotonic() < until and _breaks(prop, implementation, step, goal)
        for step in _steps(case, goal)
    )


def _steps(case: Case, goal: Case) -> Iterator[Case]:
    """The cases that are one step nearer to the goal."""
    for names in STEPS:
        step = _changed(case, **{name: getattr(goal, name) for name in names})
        if step is not None and step != case:
            yield step


def _breaks(prop: Property, implementation: Implementation, case: Case, other: Case) -> bool:
    """Whether a case breaks with its seed, with that of another, or with one of the first ones."""
    seeds = dict.fromkeys([case.seed, other.seed, *SEEDS])
    tried = (dataclasses.replace(case, seed=seed) for seed in seeds)
    found = (fault_of(prop, implementation, one) for one in tried)
    return any(fault is not None and not fault[1] for fault in found)


def _changed(case: Case, **fields: object) -> Case | None:
    """The case with these fields; None if there is no such case."""
    try:
        return dataclasses.replace(case, **fields)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None


def made_smaller(prop: Property, implementation: Implementation, case: Case, until: float) -> Case:
    """The smallest case that is reached from a broken one by steps that break the same clause.

    until : when the time is up, as `time.monotonic` counts
    """
    fault = fault_of(prop, implementation, case)
    if fault is None or prop.extent:
        return case  # of those there are no small ones
    declared, smallest, tried = limited(implementation, prop.called), case, {case}
    found = True
    while found:
        found = False
        for smaller in _smaller(smallest, declared.limits):
            if time.monotonic() > until:
                break
            if smaller in tried or not _could_be(prop, declared, smaller, case):
                continue
            tried.add(smaller)
            if fault_of(prop, implementation, smaller) == fault:
                smallest, found = smaller, True
                break
    # the definition has the last word on whether the property is about such a case
    return case if fault_of(prop, OracleImplementation(), smallest) else smallest


def _smaller(case: Case, limits: Limits) -> Iterator[Case]:
    """Cases that are smaller or plainer, the smallest first; of limits, one of their values."""
    for names in (*TOGETHER, *((name,) for name in FIELDS)):
        now = {name: getattr(case, name) for name in names}
        if all(type(value) is int for value in now.values()):
            if len(names) == 1 and names[0] in limits:
                (value,) = now.values()
                for less in sorted(v for v in limits[names[0]] if v < value):
                    yield from _valid(case, {names[0]: less})
                continue
            least = {name: max(least_of(name), 1 if "len" in name else 0) for name in names}
            for share in (1.0, 0.5, 0.25, 0.125):
                yield from _valid(
                    case, {n: v - int(share * (v - least[n])) for n, v in now.items()}
                )
            yield from _valid(case, {n: max(least[n], v - 1) for n, v in now.items()})
        elif len(names) == 1:
            ((name, value),) = now.items()
            plainest = PLAINEST.get(name, (getattr(Case(), name), value))
            for plainer in plainest[: plainest.index(value)]:
                yield from _valid(case, {name: plainer})


def _valid(case: Case, fields: dict[str, Any]) -> Iterator[Case]:
    """The case with these fields, if there is one, with its own seed and with the first ones."""
    changed = _changed(case, **fields)
    if changed is not None and changed != case:
        for seed in dict.fromkeys([case.seed, *SEEDS]):
            yield dataclasses.replace(changed, seed=seed)


def _could_be(prop: Property, declared: Implementation, case: Case, found: Case) -> bool:
    """Whether the property is about such a case, and what is declared allows it, as it did the one
    that was found.
    """
    dims = prop.head_dims or (case.head_dim, case.value_dim)
    about = (
        prop.semantics(case.semantics)
        and case.inputs in (prop.inputs or (case.inputs,))
        and case.indices in (prop.indices or (case.indices,))
        and {case.head_dim, case.value_dim} <= set(dims)
        and not (prop.populated and (case.q_len < 2 or case.kv_len < 2))
    )
    offered = case.dtype in declared.numerics and case.semantics in list(declared.semantics)
    return about and offered and is_declared(declared, case, found)
