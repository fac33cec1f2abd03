"""Running one property: cases are drawn, judged and counted, and a broken one is made smaller."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
from collections.abc import Callable

import hypothesis
from hypothesis import currently_in_test_context

from nsa_ref.testing.case import Case
from nsa_ref.testing.conventions import declaring
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.drawing import (
    REST,
    TimeIsUp,
    asked_of,
    generate,
    make_smaller,
    small_first,
    turn_of,
)
from nsa_ref.testing.examples import examples_of
from nsa_ref.testing.findings import Finding, broken_data, described, save_finding
from nsa_ref.testing.handing_over import handed_over, own_settings
from nsa_ref.testing.implementation import Implementation, NotOffered, Refused, compiled_by
from nsa_ref.testing.judging import judge
from nsa_ref.testing.last_words import (
    FIRST_CASES,
    announced,
    end_worker,
    grown_timeout,
    is_known_to_break,
    leave_to_turns,
    left_by_turns,
    note_broken,
    own_folder,
    withdraw,
    worker_id,
)
from nsa_ref.testing.lattice import EDGES, SPECIAL_CLAUSES, as_bits, case_edges
from nsa_ref.testing.ledger import Entry, ledger_of
from nsa_ref.testing.limits import limited
from nsa_ref.testing.options import Options
from nsa_ref.testing.pairs import cases_of_pairs
from nsa_ref.testing.properties import Outcome, Property
from nsa_ref.testing.verdicts import (
    Broken,
    Convention,
    Inconclusive,
    NoAnswer,
    NotTried,
    Record,
)
from nsa_ref.testing.wording import LONGEST_REASON, in_one_line

#: A case of an implementation that is slow, or compiles, may take so many times as long.
SLOW_TIME_FACTOR = 5

#: An implementation that gives more reasons than this gives another one for every case.
MANY_REASONS = 100

#: Seconds that are spent on making a broken case smaller.
SHRINKING_TIME = 60.0

#: Of fuzzing: seconds for the cases that show what a finding has to do with edges and switches.
CONFIRMING_TIME = 10.0


@own_settings()
def run_property(prop: Property, implementation: Implementation, options: Options) -> Record:
    """Try a property on generated cases, on those of a turn, or on the one case of the options.

    Raises nothing of the implementation's: what is broken is the record's `finding`, that of the
    smallest case found.
    """
    implementation = limited(implementation, prop.called)
    trials = _Trials(prop, implementation, options)
    if reason := _why_not_asked(prop, implementation, options):
        if not options.turn:
            trials.count_refused(reason)
        return trials.record

    compiled_before = compiled_by(implementation)
    device = device_of(implementation.device)
    large = prop.extent == "large"
    try:
        with device.exclusive() if large else contextlib.nullcontext():
            if options.case is not None:
                trials.run(options.case)
            elif options.turn is not None:
                trials.take_turn(options.turn)
            else:
                trials.record.asked = asked_of(prop, implementation, options)
                trials.try_examples()
                generate(prop, implementation, options, trials.run)
                if options.level == "thorough":
                    trials.try_pairs()
            if large:
                device.free_cache()
    except (Broken, TimeIsUp):
        pass
    except hypothesis.errors.Flaky:
        if not trials.broken:
            raise
        trials.keep_flaky()
    finally:
        withdraw(options)
    if options.turn is None:
        trials.record.settle()
    trials.confirm_convention()
    trials.note_edges()
    trials.record.compiled = compiled_by(implementation) - compiled_before
    return trials.record


class _Trials:
    """The cases of one property on one implementation, and the record of what became of them."""

    def __init__(self, prop: Property, implementation: Implementation, options: Options) -> None:
        self.prop, self.implementation, self.options = prop, implementation, options
        self.record = Record(name=prop.name, clause=prop.clause, implementation=implementation.name)
        # a replay shows what it shows, known or not
        self.ledger = ledger_of(implementation, options.ledger) if options.case is None else ()
        self.broken: dict[Case, Broken] = {}  # the last one is the smallest
        self.shrink_until = 0.0
        longer = implementation.pace != "fast" and options.case is None  # a kept case says it all
        self.timeout = options.timeout * (SLOW_TIME_FACTOR if longer else 1)
        self.options = dataclasses.replace(options, timeout=self.timeout)
        self.until = min(options.deadline, time.time() + options.seconds)
        if not options.examples:
            self.until = math.inf  # turns look after themselves
        self.first: list[float] = []  # seconds that the port took for its first cases

    def run(self, case: Case) -> bool:
        """Judge a case and count it; True if it is to be drawn again, because it was refused.

        After the first broken case only smaller ones are tried, and those are not counted.

        Raises
        ------
        Broken : and the record has its finding
        TimeIsUp : of fuzzing, and nothing is broken
        """
        counting = not self.broken
        if not counting and time.monotonic() > self.shrink_until:
            # out of time: what was seen stays true, and nothing smaller is looked for
            if case in self.broken:
                raise self.broken[case]
            return False
        if counting and time.time() > self.until:
            raise TimeIsUp("no case is drawn any more")
        if counting:
            self._count_covered(case)
        if self._is_spared(case, counting):
            return False
        try:
            outcome = self._judged(case)
        except (NotOffered, NoAnswer) as reason:
            if counting:
                self.count_refused(reason, case)
            self.record.refused += counting and isinstance(reason, Refused)
            return isinstance(reason, Refused)
        except Broken as broken:
            if known := self._known(broken.clause, case):
                if counting:
                    self.record.known[known.id] += 1
                    self._note_undecided(case)
                # to Hypothesis it passed: what else is broken is made smaller beside it
                return False
            if counting:
                self.record.cases += 1
                left = min(SHRINKING_TIME, self.options.seconds_left)
                self.shrink_until = time.monotonic() + left
            broken = self._kept(case, broken)
            raise broken
        else:
            if counting:
                self._count(case, outcome)
                if outcome.compared or not outcome.ambiguous:
                    self.record.held.update(self._covering(case))
            return False

    def _judged(self, case: Case) -> Outcome:
        """What the property says of the case; its first cases say how much time later ones have."""
        with announced(self.prop, self.implementation, self.options, case) as clock:
            try:
                return judge(self.prop, self.implementation, case)
            except Refused:
                clock = None  # it was not run
                raise
            finally:
                if clock is not None and len(self.first) < FIRST_CASES:
                    self.first.append(clock.charged)
                    timeout = grown_timeout(self.timeout, self.first)
                    self.options = dataclasses.replace(self.options, timeout=timeout)

    def try_examples(self) -> None:
        """Judge the cases that once broke the property.

        Raises
        ------
        Broken : as `run`
        """
        for case in examples_of(self.implementation, self.prop):
            self.record.asked += 1
            self.run(case)

    def try_pairs(self) -> None:
        """Judge the cases that were built so that every pair of edges is met.

        Raises
        ------
        Broken : as `run`
        """
        numerics, dtypes = self.implementation.numerics, self.options.dtypes
        asked = [dtype for dtype in dtypes or numerics if dtype in numerics]
        for case in cases_of_pairs(self.implementation, self.prop):
            if case.dtype not in asked:
                case = dataclasses.replace(case, dtype=asked[0])
            edges, record = case_edges(self.prop, case), self.record
            record.asked += 1
            before = record.inconclusive["no element",]
            self.run(case)
            # where nothing could be wrong, the case does not show that its pairs can be met
            if record.inconclusive["no element",] == before or any(EDGES[e].empty for e in edges):
                record.built[as_bits(edges)] += 1

    def take_turn(self, turn: int) -> None:
        """Judge the cases of a turn, the small ones first, while there is time.

        The first of a turn may take more than its share. No case begins that would outlast the
        deadline, as far as the one before it tells.

        Raises
        ------
        Broken : as `run`, once the case was made smaller
        """
        prop, implementation, options = self.prop, self.implementation, self.options
        if turn == 0:
            self.record.asked = self.record.unreached = asked_of(prop, implementation, options)
        if not options.seconds_left:
            return  # drawing takes time as well
        refused, ordered = small_first(implementation, prop, options.for_all_turns)
        cases = list(turn_of(ordered, turn))
        if turn == 0:
            self.try_examples()
            self.record.unreached = len(ordered)
            for case in refused:
                self.run(case)
        elif is_known_to_break(prop, implementation, options):
            return
        if turn >= REST:
            left = left_by_turns(prop, implementation, options)
            cases[:0] = [ordered[number] for number in left]
        what = prop.name, implementation.name
        until = time.time() + options.share * options.seconds_left
        begun = 0
        for case in cases:
            started = time.time()
            last = min(until, options.deadline) if begun else options.deadline
            if started + _took.get(what, 0.0) >= last:
                break
            begun += 1
            self.record.unreached -= 1
            try:
                self.run(case)
            except Broken:
                make_smaller(prop, implementation, options, case, self.run)
                raise
            _took[what] = time.time() - started
        leave_to_turns(prop, implementation, options, [*map(ordered.index, cases[begun:])])

    def _count_covered(self, case: Case) -> None:
        """Count the case for each entry of the ledger that is about the property."""
        covering = self._covering(case)
        about = [entry.id for entry in self.ledger if entry.is_about(self.prop)]
        self.record.inside.update(covering)
        self.record.outside.update(id for id in about if id not in covering)

    def _covering(self, case: Case) -> list[str]:
        """Entries of the ledger that are about the property, and cover the case."""
        return [e.id for e in self.ledger if e.is_about(self.prop) and e.covers(case)]

    def _is_spared(self, case: Case, counting: bool) -> bool:
        """True if the ledger says that the case must not be launched."""
        for entry in self.ledger:
            if entry.status == "quarantined" and entry.explains(self.prop, self.prop.clause, case):
                if counting:
                    self.record.spared[entry.id] += 1
                    self._note_undecided(case)
                return True
        return False

    def _known(self, clause: str, case: Case) -> Entry | None:
        """The entry of the ledger that tells of such a case, if it broke this clause."""
        return next((e for e in self.ledger if e.explains(self.prop, clause, case)), None)

    def count_refused(self, reason: Exception, case: Case | None = None) -> None:
        """Count a case that was not decided, or that the property was not asked at all."""
        match reason:
            case NotTried(args=why):
                self.record.not_tried[why] += 1
            case Inconclusive(args=why):
                self.record.inconclusive[why] += 1
            case NotOffered():
                what = in_one_line(str(reason), LONGEST_REASON)
                known = self.record.not_offered
                known[what if what in known or len(known) < MANY_REASONS else "other reasons"] += 1
                if case is not None:
                    self._note_undecided(case)

    def _note_undecided(self, case: Case) -> None:
        """The edges of a case that the port, or its ledger, leaves nothing to decide on."""
        edges = case_edges(self.prop, case)
        self.record.refused_edges.update(edges)
        self.record.refused_at[as_bits(edges)] += 1

    def _count(self, case: Case, outcome: Outcome) -> None:
        record = self.record
        record.ambiguous += outcome.ambiguous
        edges = case_edges(self.prop, case)
        if not outcome.compared and outcome.ambiguous:
            record.undecided += 1
            return
        if not outcome.compared:
            # it was tried, and did not fail
            record.inconclusive["no element",] += 1
            record.edges.update(edge for edge in edges if EDGES[edge].empty)
            record.stood[as_bits([e for e in edges if EDGES[e].empty] and edges)] += 1
            return
        record.cases += 1
        if outcome.powerless:
            record.inconclusive[("powerless tensor",)] += 1
        if outcome.budget is not None:
            record.budget_used = max(record.budget_used or 0.0, outcome.budget)
        record.edges.update(edges)
        record.stood[as_bits(edges)] += 1
        if self.options.examples:
            self._aim(outcome)

    def _aim(self, outcome: Outcome) -> None:
        """Of fuzzing: tell Hypothesis how near the bound was."""
        budget = outcome.budget
        # examples of the port's folder, and cases of a slow port, are no draws of Hypothesis
        if budget is not None and math.isfinite(budget) and currently_in_test_context():
            hypothesis.target(budget, label=self.prop.name)

    def _kept(self, case: Case, broken: Broken) -> Broken:
        """Write the finding to disk, before anything smaller is tried."""
        device = device_of(self.implementation.device)
        with announced(self.prop, self.implementation, self.options, case), handed_over():
            fault = device.fault()  # waits for kernels, one of which may run for ever
        _drop_tensors(broken)
        if fault:
            self.shrink_until = -math.inf  # nothing runs here any more, smaller or not
            broken = broken.noted(("device fault", fault))
            if worker_id() is not None:
                end_worker(self._finding(case, broken), self.options)
            _lost_devices[self.implementation.device] = fault
        if self.options.turn is not None and not self.broken:
            note_broken(self.prop, self.implementation.name, own_folder(self.options))
        self.broken.pop(case, None)
        self.broken[case] = broken
        self.record.finding = save_finding(self._finding(case, broken), self.options.findings)
        device.free_cache()
        return broken

    def keep_flaky(self) -> None:
        """The smallest broken case did not break again: say so in its finding."""
        case, broken = list(self.broken.items())[-1]
        flaky = broken.noted(("flaky",))
        self.record.finding = save_finding(self._finding(case, flaky), self.options.findings)

    def confirm_convention(self) -> None:
        """Drop the switch that would explain the smallest case if it does not explain all cases."""
        finding, options = self.record.finding, self.options
        if finding is None or finding["convention"] is None or options.case is not None:
            return
        convention = Convention(**finding["convention"])
        if convention.value is None:
            return
        declared = declaring(self.implementation, convention)
        if not is_asked(self.prop, declared, options):
            return  # it is about other conventions, of which no case can be broken
        explained = False
        try:
            explained = judge_generated(self.prop, declared, _for_a_moment(options)) > 0
        except Broken:
            pass
        finally:
            withdraw(options)
        if not explained:
            self.record.finding = save_finding(finding | {"convention": None}, options.findings)

    def note_edges(self) -> None:
        """Write into the finding of a mask the edges on which all broken cases stand."""
        finding, options, clause = self.record.finding, self.options, self.prop.clause
        once = options.case is not None or options.turn is not None or not options.shrink
        if finding is None or once or clause not in SPECIAL_CLAUSES:
            return
        if finding["kind"] != "wrong mask" or finding["clause"] != clause:
            return
        common = set(case_edges(self.prop, Case.from_json(finding["case"])))

        def note(case: Case, broken: Broken) -> None:
            if broken.clause == clause:
                common.intersection_update(case_edges(self.prop, case))

        try:
            judge_generated(self.prop, self.implementation, _for_a_moment(options), note)
        finally:
            withdraw(options)
        self.record.finding = save_finding(finding | {"edges": sorted(common)}, options.findings)

    def _finding(self, case: Case, broken: Broken) -> Finding:
        data = described(self.prop, self.implementation, self.options, case)
        return data | broken_data(broken)


def _for_a_moment(options: Options) -> Options:
    """Of fuzzing: without its database, and with an end."""
    if not options.examples:
        return options
    until = time.time() + CONFIRMING_TIME
    return dataclasses.replace(options, examples="", shared="", deadline=until)


def _drop_tensors(error: BaseException) -> None:
    """Drop what the frames of an error hold: the next case may want the room of its tensors."""
    left, seen = [error], []
    while left:
        one = left.pop()
        traceback.clear_frames(one.__traceback__)
        seen.append(one)
        left += [e for e in (one.__cause__, one.__context__) if e is not None and e not in seen]


#: (property, implementation) -> seconds that its last case took in this process
_took: dict[tuple[str, str], float] = {}

#: device -> why every call on it fails in this process
_lost_devices: dict[str, str] = {}


def is_asked(prop: Property, implementation: Implementation, options: Options) -> bool:
    """Whether the property is tried on the implementation at all."""
    return _why_not_asked(prop, implementation, options) is None


def _why_not_asked(
    prop: Property, implementation: Implementation, options: Options
) -> NotOffered | NotTried | None:
    if fault := _lost_devices.get(implementation.device):
        return NotTried("lost device", implementation.device, fault)
    if what := prop.why_not_offered(implementation):
        return NotOffered(what)
    if reason := prop.why_not_tried(limited(implementation, prop.called)):
        return NotTried(*reason)
    if options.dtypes and not set(options.dtypes) & set(implementation.numerics):
        return NotOffered(", ".join(options.dtypes))
    case = options.case
    if case is None:
        return None
    if case.dtype not in implementation.numerics:
        return NotOffered(case.dtype)
    if case.semantics not in implementation.semantics:
        return NotOffered("the case's semantics are not declared")
    if options.any_property and not prop.could_draw(case):
        return NotOffered(f"{prop.name} is about other cases")
    return None


def _stop(case: Case, broken: Broken) -> None:
    raise broken


def judge_generated(
    prop: Property,
    implementation: Implementation,
    options: Options,
    on_broken: Callable[[Case, Broken], None] = _stop,
) -> int:
    """Judge generated cases of a property until one is broken, or the time is up; none is kept.

    What the ledger knows counts as it would if it were right.

    on_broken : called with what is broken, and the next case is judged unless it raises
    returns : how many there was time for

    Raises
    ------
    Broken
    """

    ledger = ledger_of(implementation, options.ledger)
    judged = 0

    def trial(case: Case) -> None:
        nonlocal judged
        if not options.seconds_left:
            return
        judged += 1
        if any(entry.status == "quarantined" and entry.covers(case) for entry in ledger):
            return
        not_decided = contextlib.suppress(NotOffered, Inconclusive)
        try:
            with announced(prop, implementation, options, case), not_decided:
                judge(prop, implementation, case)
        except Broken as broken:
            if not any(entry.explains(prop, broken.clause, case) for entry in ledger):
                on_broken(case, broken)

    if is_asked(prop, implementation, options):
        generate(prop, implementation, dataclasses.replace(options, shrink=False), trial)
    return judged
