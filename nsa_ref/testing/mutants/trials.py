"""How mutants die: the properties of a mutant's clause are tried, until one finds it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from nsa_ref.testing.case import Case
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.mutants.columns import COLUMNS, excludes
from nsa_ref.testing.mutants.zoo import ZOO
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import FAILURES

#: Where all properties can be asked, it is seen which of them find what no other one finds.
ALL = "free"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a mutant under some limits (a key of COLUMNS), with a seed.

    clause : what must find it
    found_by, found : the clause and the words of the finding; "" if it survives
    raised : it was found by an exception of its own, or ended its process: that shows nothing
    beyond : it was found where it says that it is right
    by_property : which one found it
    alone : of the properties that ask a method those that find it as no other one does; of a
        mistake in several branches, in the first that shows it; None where that was not tried
    cannot : why it is right under these limits, ("not offered", what) or ("needs", name, rule)
    alike : results that are those of what it is made from, to the bit; tried where it needs what
        there is not
    cases, seconds : until it was found
    """

    name: str
    limits: str
    seed: int
    clause: str
    found_by: str = ""
    found: str = ""
    raised: bool = False
    beyond: bool = False
    by_property: str = ""
    alone: Sequence[str] | None = None
    cannot: Sequence[Sequence[str]] = ()
    alike: int = 0
    cases: int = 0
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether it dies of its clause, and for what it does."""
        return self.found_by == self.clause and not self.raised and not self.beyond

    @property
    def right(self) -> bool:
        """Whether it dies as it must, or could not be told from what is right."""
        if self.found_by or self.raised:
            return self.killed
        needs = any(kind == "needs" for kind, *_ in self.cannot)
        return bool(self.alike if needs else self.cannot)

    @property
    def died_of(self) -> str:
        """In a word or two."""
        if self.raised:
            return f"{self.found_by} (by an exception)" if self.found_by else "no end"
        if self.beyond:
            return f"{self.found_by} (beyond its needs)"
        if self.found_by:
            return self.found_by
        return "cannot be met" if self.right else "survives"

    def to_json(self) -> dict[str, Any]:
        """With what is known of the mutant."""
        mutant = ZOO[self.name]
        about = {"mistake": mutant.mistake, "seen_in": mutant.seen_in}
        return dataclasses.asdict(self) | about | {"right": self.right}


def try_mutant(name: str, options: Options, limits: str = ALL, *, once: bool = False) -> Trial:
    """Try the properties of its clause; what another clause finds counts if its own finds nothing.

    options.findings : a folder for findings, which nobody needs afterwards
    once : it is enough that one property finds it
    """
    mutant, started, cases = ZOO[name], time.monotonic(), 0
    implementation = COLUMNS[limits].of(mutant.implementation)
    cannot = tuple(why_it_cannot_be_met(name, limits))
    beside = Beside(mutant.implementation, implementation, limits) if cannot else None
    trial = Trial(name=name, limits=limits, seed=options.seed, clause=mutant.clause, cannot=cannot)
    options = dataclasses.replace(options, shrink=False)
    alone: list[str] = []
    for methods in _by_method(mutant.clause):
        for asked in methods:
            finders: list[str] = []
            for prop in asked:
                record = run_property(prop, implementation, options)
                finding = record.finding
                if finding is not None and finding["clause"] == mutant.clause:
                    finders.append(prop.name)
                if trial.found_by != mutant.clause:
                    cases += record.cases
                    trial = dataclasses.replace(trial, cases=cases, seconds=_since(started))
                    if finding is not None:
                        trial = _died(trial, prop, finding)
                if trial.found_by == mutant.clause and (once or limits != ALL):
                    return trial
                if len(finders) == 2:
                    break
            if finders:
                alone += finders if len(finders) == 1 else []
                break
    if limits == ALL and not once:
        trial = dataclasses.replace(trial, alone=alone)
    if beside is not None:
        trial = dataclasses.replace(trial, alike=beside.alike)
        if beside.differs and not trial.found_by:
            trial = dataclasses.replace(
                trial, found_by=mutant.clause, found=beside.differs, beyond=True
            )
    return trial


def _died(trial: Trial, prop: Property, finding: Finding) -> Trial:
    """The trial, with what was found."""
    mutant, case = ZOO[trial.name], Case.from_json(finding["case"])
    in_method = mutant.method in ("", prop.method)
    return dataclasses.replace(
        trial,
        found_by=finding["clause"],
        found=finding["text"],
        raised=finding["kind"] in FAILURES,
        beyond=not (in_method and all(need.holds(case) for need in mutant.needs)),
        by_property=prop.name,
    )


def _by_method(clause: str) -> Iterable[Iterable[list[Property]]]:
    """Properties of a clause by the method that they call; methods of the branches together."""
    kinds: dict[str, dict[str, list[Property]]] = {}
    for prop in _of_clause(clause):
        of_kind = kinds.setdefault(_of_any_branch(prop.called, prop), {})
        of_kind.setdefault(prop.called, []).append(prop)
    return [of_kind.values() for of_kind in kinds.values()]


def _of_any_branch(name: str, prop: Property) -> str:
    """The name of a property or its method, if it is a branch's without that and its clause."""
    if prop.branch is None:
        return name
    return name.removeprefix(f"{prop.clause}_").replace(prop.branch.name, "*")


class Beside:
    """What a mutant is made from, called whenever the mutant is: their results have the same bits.

    mutant, placed : the mutant, and as a kernel within the limits, which is changed: some cases of
        each property are enough
    alike : results that were the same
    differs : the first call of which they were not
    """

    def __init__(self, mutant: Implementation, placed: Implementation, limits: str) -> None:
        self.alike, self.differs = 0, ""
        made_from = made_from_of(mutant)
        self._right = COLUMNS[limits].of(made_from)
        self._run, self._run_vjp = placed.run, placed.run_vjp
        placed.run, placed.run_vjp = self.run, self.run_vjp  # type: ignore[method-assign]
        placed.pace = "slow"

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        """As of the mutant."""
        found = self._run(method, case, *arguments)
        return self._noted(found, self._right.run(method, case, *arguments), method, case)

    def run_vjp(self, method: str, case: Case, *arguments: Any) -> Any:
        """As of the mutant."""
        found = self._run_vjp(method, case, *arguments)
        right = self._right.run_vjp(method, case, *arguments)
        return self._noted(found, right, f"{method}_vjp", case)

    def _noted(self, found: Any, right: Any, method: str, case: Case) -> Any:
        if _bits(found) == _bits(right):
            self.alike += 1
        else:
            self.differs = self.differs or f"{method} differs from {self._right.name} for {case}"
        return found


def made_from_of(mutant: Implementation) -> Implementation:
    """What a mutant is made from: right, in the mutant's way, dtypes and conventions."""
    public = (cls for cls in type(mutant).__mro__[1:] if not cls.__name__.startswith("_"))
    made_from: Implementation = next(cls for cls in public if cls.__name__ not in ZOO)()
    for name in ("way", "numerics", "semantics"):
        if hasattr(made_from, name):
            setattr(made_from, name, getattr(mutant, name))
    return made_from


def _bits(result: Any) -> Any:
    """What two results have in common if they are the same to the bit."""
    if result is None:
        return None
    if isinstance(result, Mapping):
        return {name: _bits(one) for name, one in result.items()}
    if isinstance(result, tuple):
        return [_bits(one) for one in result]
    array = np.asarray(result)
    return array.dtype.str, array.shape, array.tobytes()


def _since(started: float) -> float:
    return round(time.monotonic() - started, 2)


def _of_clause(clause: str) -> list[Property]:
    return [prop for prop in PROPERTIES.values() if prop.clause == clause]


def why_it_cannot_be_met(name: str, limits: str) -> Iterator[tuple[str, ...]]:
    """Why no kernel within these limits has the mutant's mistake; nothing if one may have it."""
    mutant = ZOO[name]
    placed = COLUMNS[limits].of(mutant.implementation)
    asked = [
        prop
        for prop in _of_clause(mutant.clause)
        if mutant.method in ("", prop.method) and not prop.why_not_offered(mutant.implementation)
    ]
    missing = [(prop.called, prop.why_not_offered(placed)) for prop in asked]
    offered = {method for method, what in missing if not what}
    if asked and not offered:
        yield from (("not offered", what) for what in dict.fromkeys(what for _, what in missing))
        return
    for need in mutant.needs:
        if all(excludes(placed, method, need) for method in offered):
            yield "needs", need.name, str(need.rule)


def worker_died(name: str, limits: str, seed: int) -> Trial:
    """A mutant that ended its worker process, or was ended for taking too long."""
    return Trial(
        name=name,
        limits=limits,
        seed=seed,
        clause=ZOO[name].clause,
        raised=True,
        found="its worker process came to an end",
    )


def kills_of_its_own(trials: Collection[Trial]) -> dict[str, list[str]]:
    """Property -> the mutants that it alone finds with the first seed; of all that were asked.

    What finds a mistake in one branch does so for the others, and for what other clauses say of
    the same mask. Only where all properties can be asked: under other limits some have hardly a
    case.
    """
    free = [trial for trial in trials if trial.limits == ALL]
    found: dict[str, set[str]] = {}
    asked: dict[str, str] = {}
    for trial in free:
        for prop in _of_clause(trial.clause):
            implementation = ZOO[trial.name].implementation
            if not (prop.why_not_offered(implementation) or prop.why_not_tried(implementation)):
                asked[prop.name] = _of_any_branch(prop.name, prop)
        for name in trial.alone or ():
            if trial.killed:
                found.setdefault(_of_any_branch(name, PROPERTIES[name]), set()).add(trial.name)
    return {name: sorted(found.get(kind, ())) for name, kind in asked.items()}


def show_trials(console: Console, trials: Collection[Trial], seconds: float) -> None:
    """For each limits a table with a line for each mutant; then what is wrong, and the sums."""
    by_limits = {name: [t for t in trials if t.limits == name] for name in COLUMNS}
    for limits, some in by_limits.items():
        if some:
            console.print(Text(f"\nlimits: {limits}", style="bold"))
            _show_table(console, some)
    wrong = [trial for trial in trials if not trial.right]
    for trial in wrong:
        about = f"{trial.name} ({ZOO[trial.name].mistake}), {trial.limits}, seed {trial.seed}"
        text = f"\n{about}, must die of {trial.clause}: {trial.died_of}\n{trial.found}"
        console.print(Text(text), soft_wrap=True)
    idle = [name for name, alone in kills_of_its_own(trials).items() if not alone]
    if idle:
        text = f"\nproperties that find no mutant alone ({ALL}): {', '.join(idle)}"
        console.print(Text(text), soft_wrap=True)
    console.print()
    for limits, some in by_limits.items():
        names = {trial.name for trial in some}
        wrongly = {trial.name for trial in some if not trial.right}
        cannot = {trial.name for trial in some if trial.cannot} - wrongly
        killed, count = len(names - wrongly - cannot), len(names)
        text = f"{limits}: {killed} of {count} mutants die of their clause"
        if cannot:
            text += f", {len(cannot)} cannot be met under these limits"
        if some:
            console.print(Text(text), soft_wrap=True)
    console.print(Text(f"{len(trials)} trials, in {seconds:.0f} s"))


def _show_table(console: Console, trials: Collection[Trial]) -> None:
    """A line for each mutant, with medians over the seeds; and what of it cannot be met."""
    headings = ("mutant", "must die of", "died of", "cases", "seconds")
    rows, styles = [headings], [""]
    of_mutant: dict[str, list[Trial]] = {}
    for trial in trials:
        of_mutant.setdefault(trial.name, []).append(trial)
    for name, some in of_mutant.items():
        ends = Counter(trial.died_of for trial in some)
        died = ", ".join(end if len(ends) == 1 else f"{end} {n}x" for end, n in ends.items())
        cases, spent = (
            statistics.median(getattr(trial, what) for trial in some)
            for what in ("cases", "seconds")
        )
        rows.append((name, some[0].clause, died, f"{cases:g}", f"{spent:.1f}"))
        styles.append("" if all(trial.right for trial in some) else "bold red")
    widths = [max(map(len, column)) for column in zip(*rows)]
    for style, row in zip(styles, rows):
        words = [word.ljust(width) for word, width in zip(row[:3], widths)]
        figures = [word.rjust(width) for word, width in zip(row[3:], widths[3:])]
        console.print(Text("  ".join([*words, *figures]), style=style), soft_wrap=True)
    why: dict[str, list[str]] = {}
    for name, some in of_mutant.items():
        for reason in dict.fromkeys(tuple(why) for trial in some for why in trial.cannot):
            why.setdefault(_reason_line(reason), []).append(name)
    for line, names in why.items():
        console.print(Text(f"cannot be met, {line}: {', '.join(names)}"), soft_wrap=True)


def _reason_line(reason: Sequence[str]) -> str:
    kind, *about = reason
    return f"{kind} ({' '.join(about)})"
