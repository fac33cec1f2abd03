"""Which cases a property is asked on: lot by lot, or in turns with the small ones first."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import unittest
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from nsa_ref.testing.case import Case
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.findings import size_of
from nsa_ref.testing.geometries import lots_within
from nsa_ref.testing.implementation import Implementation, refusal
from nsa_ref.testing.lattice import CLAUSE_EDGES, case_edges
from nsa_ref.testing.limits import limited
from nsa_ref.testing.options import Options
from nsa_ref.testing.profiles import fuzz_settings, level_settings
from nsa_ref.testing.properties import Property
from nsa_ref.testing.remembering import remembered
from nsa_ref.testing.sharing import open_database
from nsa_ref.testing.verdicts import Broken, Inconclusive

T = TypeVar("T")

#: For every case that a property asks for, so many are drawn again where `supports` refuses.
REDRAWS = 5

#: The share of its cases that an implementation is asked whose pace is slow, and how many at least.
SLOW_SHARE, SLOW_LEAST = 1 / 10, 3

#: How many cases of a property its first turns have. The next one has all others, and whatever
#: its share of the time did not reach is left to the last one.
FIRST_TURNS = (1, 3, 8)
REST, AGAIN = len(FIRST_TURNS), len(FIRST_TURNS) + 1
TURNS = AGAIN + 1


Lots = list[st.SearchStrategy[Case]]


class TimeIsUp(unittest.SkipTest):
    """Raised by a trial: no more cases are to be drawn. Hypothesis stops at once for this class."""


def _lots(
    prop: Property, implementation: Implementation, options: Options
) -> tuple[Lots, hypothesis.settings]:
    """Cases for a property in several lots, and the settings of each of them."""
    implementation = limited(implementation, prop.called)
    dtypes = [d for d in implementation.numerics if d in (options.dtypes or [d])]
    strata: Lots = []
    if implementation.pace == "compiles" and prop.extent != "large":
        strata = lots_within(prop, implementation, dtypes, options.seed)
    strata = strata or prop.strata(implementation, dtypes)
    if options.examples:
        # one lot, whose time nothing has to divide
        kept = open_database(options.examples, options.shared)
        return [st.one_of(strata)], fuzz_settings(kept)
    if _is_device_slow(implementation):
        # of few cases the first ones should be of any lot, and not all of the first one
        strata = [st.one_of(strata)]
    return strata, level_settings(options.level, math.ceil(prop.examples / len(strata)))


def asked_of(prop: Property, implementation: Implementation, options: Options) -> int:
    """How many cases of the property are to be decided."""
    strata, settings = _lots(prop, implementation, options)
    if prop.extent == "large":
        return 1
    share = device_of(implementation.device).examples_share
    asked = math.ceil(share * len(strata) * settings.max_examples)
    return min(asked, _most(asked)) if implementation.pace == "slow" else asked


def _most(drawn: int) -> int:
    """How many of so many cases a slow implementation is asked."""
    return max(SLOW_LEAST, math.ceil(SLOW_SHARE * drawn))


def generate(
    prop: Property, implementation: Implementation, options: Options, trial: Callable[..., object]
) -> None:
    """Draw cases for a property and hand each to `trial`; where cases take long, only some.

    Of a slow implementation they are the smallest; on a slow device, whichever are drawn. Those on
    the edges that the clause is about come first.

    Whatever `trial` raises is raised, once Hypothesis has made its case smaller.
    """
    if implementation.pace == "slow":
        refused, some = small_first(implementation, prop, options.for_all_turns)
    elif _is_device_slow(implementation) and not options.examples and prop.extent != "large":
        refused, some = edges_first(implementation, prop, options)
    else:
        draw(prop, implementation, options, trial)
        return
    for case in (*refused, *some):
        try:
            trial(case)
        except Broken:
            if options.shrink:
                make_smaller(prop, implementation, options, case, trial)
            raise


def make_smaller(
    prop: Property,
    implementation: Implementation,
    options: Options,
    broken: Case,
    trial: Callable[..., object],
) -> None:
    """Let Hypothesis draw until it meets the broken case, and go on from there."""
    met = False

    def passing(case: Case) -> object:
        nonlocal met
        met = met or case == broken
        return trial(case) if met else None

    draw(prop, implementation, options, passing)


def draw(
    prop: Property, implementation: Implementation, options: Options, trial: Callable[..., object]
) -> None:
    """Draw cases for a property, lot by lot, however slow it is, and hand each to `trial`.

    Another case is drawn, up to a limit, in the place of one for which `trial` returns True. None
    is drawn once `trial` has raised TimeIsUp. Whatever else it raises is raised, once Hypothesis
    has made its case smaller.
    """
    strata, settings = _lots(prop, implementation, options)
    # of one case it is the second that is drawn: the first is the smallest, for every seed
    one_each = prop.extent == "large" or settings.max_examples == 1
    if one_each:
        settings = hypothesis.settings(settings, max_examples=2)

    if not options.shrink or prop.extent == "large":
        settings = hypothesis.settings(settings, phases=[hypothesis.Phase.generate])

    def run(number: int, settings: hypothesis.settings, *, pass_over: int) -> None:
        redraws = iter(range(REDRAWS * settings.max_examples))
        passed_over = iter(range(pass_over))

        def judged_once(case: Case) -> None:
            if next(passed_over, None) is not None:
                return
            if trial(case) is True and next(redraws, None) is not None:
                hypothesis.reject()

        # every run draws the same cases; every property, lot and seed draws others
        seed = zlib.crc32(f"{prop.name} {number} {options.seed}".encode())
        test = given(case=strata[number])(judged_once)
        # every round, and every machine, goes on from what the others kept; without a key,
        # Hypothesis would make one of the test's source, also where nothing is kept
        key = f"{prop.name} of {implementation.name}".encode(errors="backslashreplace")
        test._hypothesis_internal_database_key = key  # type: ignore[attr-defined]
        with contextlib.suppress(hypothesis.errors.Unsatisfiable, TimeIsUp):
            settings(hypothesis.seed(seed)(test))()

    for number in range(len(strata)):
        try:
            run(number, settings, pass_over=int(one_each))
        except Broken:
            if number and options.shrink:
                # the first lot has the smallest cases, and one of them may be broken, too
                run(0, hypothesis.settings(settings, max_examples=100), pass_over=0)
            raise


@remembered  # a turn asks for the same cases as the one before it
def small_first(
    implementation: Implementation, prop: Property, options: Options
) -> tuple[list[Case], list[Case]]:
    """The cases that are drawn: those that `supports` refuses; and the others in order.

    The smallest on each edge that the clause is about come first, then all by size, empty ones
    behind them. A slow implementation is asked the first of these.
    """
    judged = edges_first if _is_device_slow(implementation) else _drawn
    refused, drawn = judged(implementation, prop, options)
    ordered = _edges_first(prop, sorted(drawn, key=size_of))
    return refused, ordered[: asked_of(prop, implementation, options)]


def edges_first(
    implementation: Implementation, prop: Property, options: Options
) -> tuple[list[Case], list[Case]]:
    """The cases that are drawn, as many as a slow device is asked: of any size, dtype and lot.

    The last ones come first, and neighbours far apart: the first ones are small for every seed, and
    Hypothesis varies what it has just drawn.
    """
    refused, drawn = _drawn(implementation, prop, options)
    step = math.ceil(1 / device_of(implementation.device).examples_share)
    apart = [case for start in range(step) for case in drawn[::-1][start::step]]
    return refused, _edges_first(prop, apart)[: asked_of(prop, implementation, options)]


def _is_device_slow(implementation: Implementation) -> bool:
    return device_of(implementation.device).examples_share < 1


def _drawn(
    implementation: Implementation, prop: Property, options: Options
) -> tuple[list[Case], list[Case]]:
    """All cases that are drawn: those that `supports` refuses, and the others."""
    drawn: dict[bool, list[Case]] = {True: [], False: []}

    def note(case: Case) -> bool:
        refused = refusal(implementation, case) is not None
        drawn[refused].append(case)
        return refused

    draw(prop, implementation, dataclasses.replace(options, shrink=False), note)
    return drawn[True], drawn[False]


def _edges_first(prop: Property, cases: Sequence[Case]) -> list[Case]:
    """The cases, the first one on each edge that the clause is about before all others.

    Empty ones, and those that cannot show what the property is about, come last.
    """

    def says_little(case: Case) -> tuple[bool, bool]:
        return not case.batch * case.q_len * case.kv_len, not _can_show(prop, case)

    cases = sorted(cases, key=says_little)
    first: list[Case] = []
    for edge in CLAUSE_EDGES[prop.clause]:
        first += itertools.islice((c for c in cases if edge in case_edges(prop, c)), 1)
    return list(dict.fromkeys([*first, *cases]))


def _can_show(prop: Property, case: Case) -> bool:
    try:
        prop.precondition(case)
    except Inconclusive:
        return False
    return True


def turn_of(cases: Sequence[T], turn: int) -> Sequence[T]:
    """Those of the ordered cases that are judged first in this turn."""
    before = sum(FIRST_TURNS[:turn])
    if turn >= REST:
        return cases[before:] if turn == REST else cases[:0]
    return cases[before : before + FIRST_TURNS[turn]]
