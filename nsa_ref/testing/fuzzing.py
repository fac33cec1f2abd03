"""`nsa-ref fuzz`: fresh cases, round after round, until the time is up."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nsa_ref.testing.case import Case
from nsa_ref.testing.causes import Question, by_weight
from nsa_ref.testing.examples import export
from nsa_ref.testing.files import write_json
from nsa_ref.testing.findings import Finding, read_finding
from nsa_ref.testing.fuzz_causes import Cause
from nsa_ref.testing.fuzz_folder import NO_CASE, Folder
from nsa_ref.testing.ledger import Entry, LedgerError, read_ledger, to_toml
from nsa_ref.testing.loading import CannotRun, Declared
from nsa_ref.testing.narrowing import DIED, SAMPLED, Sample, entry_of
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.sessions import Collector, answers_to, fold_findings, run_session, say
from nsa_ref.testing.sharing import (
    SharedFindings,
    check_where,
    digest_of,
    is_shared,
    shared_database,
)
from nsa_ref.testing.swarm import Round, draw_round, every_property
from nsa_ref.testing.verdicts import FAILURES
from nsa_ref.testing.wording import printable

#: Seconds from one line of a log, and from one note of what was done, to the next.
TOLD_EVERY = 60.0

#: Cases that are tried again in one go, of a run that was killed or of other machines.
MOST_AGAIN = 64

#: Broken cases that are enough to see what a finding is about.
ENOUGH_BROKEN = 8

#: Seconds for a case that may hang as another one did.
SHORT_TIMEOUT = 10.0

#: Seconds of a run, and the share of what is left of it, that are kept for sorting what a round
#: finds; and how many are too few for another round.
SORTING_TIME, SORTING_SHARE, LEAST_OF_A_ROUND = 60.0, 0.25, 5.0

#: A run ends when so many rounds, one after the other, have judged nothing.
IDLE_ROUNDS = 3


class TimeIsUp(Exception):
    """What is not sorted yet lies in the folder, for the next run."""


class Fuzzing:
    """One run: it goes on from what its folder knows.

    arguments : the command's
    found : what `try_loading` says of the implementation

    Raises
    ------
    CannotRun : the folder or the database is of no use
    """

    def __init__(
        self, arguments: argparse.Namespace, console: Console, folder: Folder, found: dict
    ) -> None:
        self.arguments, self.console, self.folder = arguments, console, folder
        self.spec = arguments.implementation
        self.state = folder.state(self.spec, arguments.seed)
        self.causes = folder.causes(self.state)
        where = arguments.database or str(folder.examples)
        check_where(where)
        self.url = where if is_shared(where) else ""
        self.examples = folder.examples if self.url else Path(where).absolute()
        try:
            self.examples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotRun(f"--database {where}: {error.strerror}. Try another folder") from None
        self.shared = shared_database(self.url) if self.url else None
        self.device, self.ledgers = found["device"], found["ledgers"]
        self.declared = [Declared.from_json(one) for one in found["implementations"]]
        self.workers = int(arguments.n) if arguments.n.isdigit() else os.cpu_count() or 1
        self.given = self._given()
        self._counting = threading.Lock()
        self._collector: Collector | None = None
        self._counted, self._since = 0, time.monotonic()
        self._why_lost = ""
        # file of a finding -> that of the one in the folder of which it was made
        self._made_of: dict[str, Path] = {}
        self._until = math.inf  # what an earlier run left is sorted however long that takes

    def go_on(self, seconds: float) -> bool:
        """Round after round until the time is up, or the user ends it; whether anything is broken.

        What is not sorted by then is left to the next run, and counts as broken: nothing shows yet
        that it is not.

        Raises
        ------
        CannotRun : nothing could be judged
        """
        until = time.monotonic() + seconds
        self._say_what_is_known()
        self._write_ledger()
        with self._watched():
            try:
                self._take_up()
                self._exchange()
                idle, self._until = 0, until
                left = until - time.monotonic()
                while left > 0:
                    collector = self._round()
                    idle = 0 if any(r.cases or r.known for r in collector.records) else idle + 1
                    idles = idle >= max(IDLE_ROUNDS, len(self.declared))
                    if idles and (collector.errors or not self.state.cases):
                        why = [*collector.errors, "no case was decided"][0]
                        raise CannotRun(f"nothing of {self.spec} could be judged: {why}")
                    self._exchange()
                    left = until - time.monotonic() - LEAST_OF_A_ROUND
            except (KeyboardInterrupt, TimeIsUp) as reason:
                if unsorted := len(self.folder.left()[0]):
                    why = "the time is up" if isinstance(reason, TimeIsUp) else "ended"
                    some = "1 property" if unsorted == 1 else f"{unsorted} properties"
                    say(self.console, f"{why}; the next run sorts what {some} found")
            finally:
                self._count()
                self.folder.save(self.state)
        say(self.console, self._line())
        self._say_causes()
        findings, _ = self.folder.left()
        for finding in findings:
            self._say_cause("unsorted", finding)
        if not (self.state.cases or self.causes or findings):
            raise CannotRun(f"no case of {self.spec} was judged in that time: more --time")
        return bool(self.causes or findings)

    def export(self) -> None:
        """Make what is known explicit examples for every later run of the implementation.

        Raises
        ------
        CannotRun : nothing is known, or it comes from no file that the examples could stand beside
        """
        unsorted, _ = self.folder.left()
        later = (
            f"findings that are not sorted by cause yet: {len(unsorted)}. nsa-ref fuzz sorts them"
        )
        if not self.causes:
            nothing = f"{self.folder.path} knows of nothing that is broken"
            raise CannotRun(f"{nothing}; {later}" if unsorted else nothing)
        if not self.ledgers:
            raise CannotRun(f"{self.spec} comes from no file that examples could stand beside")
        try:
            written = export([Path(c.finding["file"]) for c in self.causes], Path(self.ledgers[0]))
        except OSError as error:
            raise CannotRun(f"cannot write {error.filename}: {error.strerror}") from None
        for path in written:
            say(self.console, f"wrote {path}")
        if unsorted:
            say(self.console, later)
        say(self.console, "nsa-ref verify and your test suite try them first")

    # --- a round ----------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Take in what a run left that was killed or ended."""
        if cut := self.folder.cut_off():
            say(self.console, f"round {cut.number + 1} was cut off: what it left is taken up")
            self.state.rounds = max(self.state.rounds, cut.number + 1)
            self._take_in(cut, *self.folder.left())

    def _round(self) -> Collector:
        """Draw a round, run it, and take in what it found."""
        state, drawn = self.state, self._drawn()
        collector = self._judge(drawn)
        if drawn.implementation not in state.offered:
            state.offered[drawn.implementation] = [r.name for r in collector.records if r.asked]
        state.rounds += 1
        self._take_in(drawn, *self.folder.left())
        return collector

    def _drawn(self) -> Round:
        """The round that comes next."""
        state, wanted = self.state, self.arguments.branch
        implementation = copy.copy(self.declared[state.rounds % len(self.declared)])
        dtypes = self.arguments.dtype or implementation.numerics
        implementation.numerics = {
            dtype: row for dtype, row in implementation.numerics.items() if dtype in dtypes
        }
        asked: list[Property] = [
            prop
            for prop in PROPERTIES.values()
            if prop.extent != "large" and (not wanted or prop.part in wanted)
        ]
        number = state.rounds, state.seed
        offered = state.offered.get(implementation.name)
        if offered is None:
            return every_property(*number, asked, implementation, self.workers)
        asked = [prop for prop in asked if prop.name in offered] or asked
        return draw_round(*number, state.seconds, asked, implementation, self.workers)

    def _judge(self, drawn: Round) -> Collector:
        """Run a round, which leaves some time to sort what it finds."""
        left = self._until - time.monotonic()
        left -= min(SORTING_TIME, SORTING_SHARE * max(0.0, left - LEAST_OF_A_ROUND))
        options = [
            f"--nsa-round={self.folder.begin(drawn)}",
            f"--nsa-deadline={time.time() + left}",
            f"--nsa-examples={self.examples}",
            f"--nsa-shared={self.url}",
            *(f"--nsa-dtype={dtype}" for dtype in self.arguments.dtype or ()),
        ]
        return self._run(options=options, total=len(drawn.properties), counts=True)

    def _run(
        self,
        *,
        options: Sequence[str],
        total: int,
        tests: Sequence[str] = (),
        counts: bool = False,
        aside: str = "aside",
    ) -> Collector:
        """A session whose progress is a line of ours.

        counts : its cases are fresh ones, and what is broken is a finding of the round
        aside : the folder of its findings, if they are not those of the round

        Raises
        ------
        KeyboardInterrupt : the user ended it
        TimeIsUp : the time was up before what was found is sorted
        """
        if not counts:
            self._check_time()
            options = [*options, f"--nsa-deadline={time.time() + self._until - time.monotonic()}"]

        def gather(console: Console, total: int | None) -> Collector:
            collector = Collector(console, total)
            if counts:
                self._collector, self._counted = collector, 0
            return collector

        with open(os.devnull, "w") as nowhere:
            collector = run_session(
                Console(file=nowhere),
                self.spec,
                self.device,
                total=total,
                tests=tests,
                gather=gather,
                workers=self.arguments.n,
                findings=self.folder.found if counts else self.folder.found / aside,
                options=[
                    f"--nsa-case-timeout={self.arguments.case_timeout}",
                    f"--nsa-ledger={self.folder.ledger}",
                    *options,
                ],
            )
        self._count()
        self._collector = None
        if collector.interrupted:
            raise KeyboardInterrupt
        if not counts:
            self._check_time()
        return collector

    def _check_time(self) -> None:
        """Raise TimeIsUp for sorting that cannot be done in time."""
        if time.monotonic() >= self._until:
            raise TimeIsUp

    def _count(self) -> None:
        """Add to what is known what was done since this was called last."""
        with self._counting:
            now = time.monotonic()
            self.state.seconds += now - self._since
            self._since = now
            if self._collector is not None:
                records = self._collector.records[self._counted :]
                self._counted += len(records)
                self.state.count(records)

    # --- what was found ---------------------------------------------------------------------------

    def _take_in(
        self, drawn: Round | None, findings: Sequence[Finding], running: Sequence[Path] = ()
    ) -> None:
        """Keep what is new of a round's findings, and end the round.

        A process that died may have been killed by somebody: its case is tried once more.

        drawn : None for cases of other machines
        running : the files of the cases that were running when the run was killed
        """
        died = [finding for finding in findings if finding.get("ended") == "crash"]
        again = [*running, *(Path(finding["file"]) for finding in died)]
        new = [finding for finding in findings if finding not in died]
        new = by_weight(self._smaller([*again, *new]))
        if any(map(_goes_by_looks, new)):
            known = [cause.finding for cause in self.causes]
            fold_findings([*known, *new], self._run, self.console)
        new = self._not_of(self.causes, new)
        while new:
            first, *new = new
            new = self._not_of([self._begin_cause(first, drawn)], new)
        self.folder.end()
        self.folder.save(self.state)

    def _not_of(self, causes: Sequence[Cause], findings: Sequence[Finding]) -> list[Finding]:
        """The findings that have none of the causes; all others are counted for theirs.

        What raised, or is explained by one thing to declare, goes by what it looks like (`causes`).
        Of all else the finding's case must lead to that of the cause (`steps`), or lie where that
        is known to break.
        """
        asked: list[Question] = []
        of: dict[int, Cause] = {}  # number of the finding -> its cause
        for j, finding in enumerate(findings):
            prop, about = PROPERTIES[finding["property"]], _about(finding)
            for i, cause in enumerate(causes):
                other = cause.finding
                alike = finding.get("cause") in (cause.found_as, other["file"])
                if alike and _goes_by_looks(other):
                    of.setdefault(j, cause)
                elif _about(other) != about:
                    continue
                if j not in of and not {finding["kind"], other["kind"]} & set(FAILURES):
                    case, goal = (Case.from_json(one["case"]) for one in (finding, other))
                    asked.append(Question(j, i, prop.name, about[0], case, goal=goal))
        answers = answers_to(asked, self._run)
        for number, question in enumerate(asked):
            if answers.get(number):
                of.setdefault(question.finding, causes[question.of])
        for j, cause in of.items():
            cause.add(findings[j])
        for question in asked:
            cause = causes[question.of]
            if question.finding not in of and cause.covers(question.case):
                of[question.finding] = cause
                cause.add(findings[question.finding])
        if of:
            for cause in causes:
                self.folder.keep(cause)
            self._write_ledger()
            for j in of:
                self._is_sorted(findings[j]["file"])
        return [finding for j, finding in enumerate(findings) if j not in of]

    def _is_sorted(self, file: str) -> None:
        """A finding is no longer left to the next run, if it is the last of what it was made of."""
        of = self._made_of.pop(file, Path(file))
        if of not in self._made_of.values():
            of.unlink(missing_ok=True)

    def _smaller(self, kept: Sequence[Finding | Path]) -> list[Finding]:
        """What is broken once more of findings, or of the cases in files, as small as it can be.

        A finding that is not broken once more stays as it was found, and so does a hang.
        """
        found = [one for one in kept if not isinstance(one, Path) and "ended" in one]
        whole: list[tuple[Path, Finding | None]] = []
        for one in (one for one in kept if one not in found):
            with contextlib.suppress(*NO_CASE):
                finding, path = (None, one) if isinstance(one, Path) else (one, Path(one["file"]))
                if read_finding(path)[1]["property"] in PROPERTIES:
                    whole.append((path, finding))
        suite = str(Path(__file__).parent / "shrinking_suite.py")
        for start in range(0, len(whole), MOST_AGAIN):
            some = whole[start : start + MOST_AGAIN]
            options = [f"--nsa-case={path}" for path, _ in some]
            collector = self._run(
                options=options, total=len(some), tests=[suite], aside=f"again-{start}"
            )
            for number, (path, finding) in enumerate(some):
                records = collector.kept.get(number, ())
                smaller = [record.finding for record in records if record.finding is not None]
                self._made_of |= {one["file"]: path for one in smaller}
                found += smaller or ([finding] if finding else [])
                if records and not (smaller or finding):
                    path.unlink(missing_ok=True)  # somebody had killed the process
        return found

    def _begin_cause(self, finding: Finding, drawn: Round | None) -> Cause:
        """A cause that was not known: all that is known of it is written down, and a line said."""
        state, found_as = self.state, finding["file"]
        taken = [entry.id for entry in read_ledger(self.folder.ledger)]
        sample, clauses = self._sample(finding, drawn)
        number = max((int(name.partition("-")[0]) for name in state.causes), default=0) + 1
        finding = self.folder.first_of(finding, number)
        cause = Cause(finding, entry_of([finding], (), taken).id, sample, found_as=found_as)
        for clause in clauses:
            cause.add_clause(finding["property"], clause)
        self.folder.keep(cause)
        self.causes.append(cause)
        state.causes.append(Path(finding["file"]).name)
        self._write_ledger()
        self.folder.save(state)
        self._is_sorted(found_as)
        self._share(finding)
        self._say_cause("found", finding)
        return cause

    def _sample(self, finding: Finding, drawn: Round | None) -> tuple[Sample, list[str]]:
        """Cases of the finding's property, and the clauses that those break that lead to it.

        Cases of all that is declared; if few of them are broken, those of the round as well. One
        that leads to a known cause, too, tells nothing: the way to a longer sequence, in one step,
        may end in another mistake.
        """
        others = [
            cause.finding["file"]
            for cause in self.causes
            if _about(cause.finding) == _about(finding) and "ended" not in finding | cause.finding
        ]
        case, suite = read_finding(Path(finding["file"]))[0], "narrowing_suite.py"
        prop, sample, clauses = finding["property"], Sample([case], []), []
        rounds = [Round(0, self.state.seed, finding["implementation"], (prop,))]
        for one in rounds if drawn is None else [*rounds, drawn]:
            if len(sample.broken) > ENOUGH_BROKEN:
                break
            options = [f"--nsa-case={file}" for file in (finding["file"], *others)]
            options.append(f"--nsa-round={self.folder.begin(one)}")
            if "ended" in finding:
                options.append(
                    f"--nsa-case-timeout={min(SHORT_TIMEOUT, self.arguments.case_timeout)}"
                )
            collector = self._run(
                options=options,
                total=SAMPLED + 1,
                tests=[str(Path(__file__).parent / suite)],
            )
            said = collector.sampled.clauses.values()
            found = [DIED] if "ended" in finding else sorted({clause for clause in said if clause})
            more = collector.sampled.sample(case, found)
            sample.broken.extend(more.broken[1:])
            sample.passed.extend(more.passed)
            clauses += found
        return sample, [clause for clause in clauses if clause != DIED]

    def _write_ledger(self) -> None:
        """Call every cause known, where its cases break, so that rounds go on around it."""
        own = [cause.id for cause in self.causes]
        given = [entry for entry in self.given if entry.id not in own]
        entries = [*given, *(cause.entry(len(self.declared) > 1) for cause in self.causes)]
        half = self.folder.ledger.with_suffix(".half")
        half.write_text("\n".join(map(to_toml, entries)))
        half.replace(self.folder.ledger)

    def _share(self, finding: Finding) -> None:
        """Give a finding to other machines."""
        if self.shared is not None:
            self.state.seen.add(digest_of(finding))
            SharedFindings(self.shared, finding["implementation"]).add(finding)

    def _exchange(self) -> None:
        """Give other machines all that is known here, and try what they found.

        It is said if the database does not answer.
        """
        if self.shared is None:
            return
        for cause in self.causes:
            self._share(cause.finding)
        for implementation in self.declared:
            files = []
            others = SharedFindings(self.shared, implementation.name)
            unseen = dict(others.unseen(self.state.seen))
            for digest, finding in unseen.items():
                if finding.get("property") in PROPERTIES:
                    files.append(self.folder.found / "shared" / f"{digest}.json")
                    write_json(files[-1], finding)
            if files:
                say(self.console, f"others found {len(files)} cases: they are tried here")
                self._take_in(None, [], files)
            self.state.seen.update(unseen)
        if self.shared.why == self._why_lost:
            return
        self._why_lost = self.shared.why
        lost = f"the shared database does not answer ({self._why_lost}); what is found is kept in "
        answers = "the shared database answers again, and has all that is known here"
        say(self.console, f"{lost}{self.folder.path}" if self._why_lost else answers)

    def _given(self) -> list[Entry]:
        """What the port's ledger knows, or the one that was named.

        Raises
        ------
        CannotRun : it has no meaning
        """
        named, beside = self.arguments.ledger, filter(os.path.exists, self.ledgers)
        files = [Path(file) for file in dict.fromkeys([named] if named else beside)]
        try:
            return [entry for file in files for entry in read_ledger(file)]
        except LedgerError as error:
            raise CannotRun(str(error)) from None

    # --- what is said -----------------------------------------------------------------------------

    def _line(self) -> str:
        """All figures of this moment."""
        self._count()
        state = self.state
        closest = state.closest
        collector = self._collector  # another thread may take it away
        found = collector.findings if collector else ()
        to_be_sorted = f" (and {len(found)} to be sorted)" if found else ""
        return ", ".join(
            [
                f"{_clock(state.seconds)}, round {state.rounds + 1}: {state.cases:,} cases",
                f"{state.cases / max(state.seconds, 1):.0f} a second",
                f"{len(state.clauses)} clauses",
                *([f"best budget used {closest[1]:.2f} ({closest[0]})"] if closest else []),
                f"{len(state.pairs):,} pairs of edges",
                f"{len(self.causes)} findings{to_be_sorted}",
            ]
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A live line in a terminal, and a line a minute in a log; what was done is noted."""
        over, is_terminal = threading.Event(), self.console.is_terminal

        def tell() -> None:
            while not over.wait(TOLD_EVERY):
                line = self._line()
                self.folder.save(self.state)
                if not is_terminal:
                    say(self.console, line)

        teller = threading.Thread(target=tell, daemon=True)
        line = Live(console=self.console, get_renderable=lambda: Text(self._line()))
        with line if is_terminal else contextlib.nullcontext():
            teller.start()
            try:
                yield
            finally:
                over.set()
                teller.join()

    def _say_what_is_known(self) -> None:
        state = self.state
        if not state.rounds and not state.cases:
            say(self.console, f"nsa-ref fuzzes {self.spec} on {self.device}, seed {state.seed}")
            return
        done = f"{state.rounds} rounds and {state.cases:,} cases in {_clock(state.seconds)}"
        say(self.console, f"nsa-ref goes on with {self.spec} on {self.device} after {done}")
        self._say_causes()

    def _say_causes(self) -> None:
        for cause in self.causes:
            word = "known" if cause.times == 1 else f"known, {cause.times} times"
            self._say_cause(word, cause.finding)

    def _say_cause(self, word: str, finding: Finding) -> None:
        text = printable(finding["text"].partition("\n")[0])
        say(self.console, f"{word}: {finding['clause']}, {finding['property']}: {text}")
        say(self.console, f"    {finding['replay']}")


def _goes_by_looks(finding: Finding) -> bool:
    """Whether what it looks like says which findings have its cause, and not their cases.

    The same line raised, or one thing to declare explains them.
    """
    explained = (finding["convention"] or {}).get("value") is not None
    return finding["kind"] in FAILURES or explained


def _about(finding: Finding) -> tuple[str, str]:
    """The implementation, and what of it."""
    return finding["implementation"], PROPERTIES[finding["property"]].part


def _clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02}:{int(seconds % 60):02}"
