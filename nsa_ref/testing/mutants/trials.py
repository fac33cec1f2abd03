"""How mutants die: the properties of a mutant's clause are tried, until one finds it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants.columns import COLUMNS
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
    alone : no other property of the clause finds it; None where that was not tried
    cannot : why it is right under these limits, ("not offered", what) or ("needs", name, rule)
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
    alone: bool | None = None
    cannot: Sequence[Sequence[str]] = ()
    cases: int = 0
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether it dies of its clause, and for what it does."""
        return self.found_by == self.clause and not self.raised and not self.beyond

    @property
    def right(self) -> bool:
        """Whether it dies as it must, or could not be told from what is right."""
        return self.killed or bool(self.cannot and not self.found_by and not self.raised)

    @property
    def died_of(self) -> str:
        """In a word or two."""
        if self.raised:
            return f"{self.found_by} (by an exception)" if self.found_by else "no end"
        if self.beyond:
            return f"{self.found_by} (beyond its needs)"
        return self.found_by or ("cannot be met" if self.cannot else "survives")

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
    if cannot:
        implementation.pace = "slow"  # some cases of each property show that it is right
    trial = Trial(name=name, limits=limits, seed=options.seed, clause=mutant.clause, cannot=cannot)
    options = dataclasses.replace(options, shrink=False)
    for prop in _of_clause(mutant.clause):
        if trial.found_by == mutant.clause and (once or trial.alone is not True):
            break
        record = run_property(prop, implementation, options)
        finding = record.finding
        if trial.found_by == mutant.clause:
            found = finding is not None and finding["clause"] == mutant.clause
            trial = dataclasses.replace(trial, alone=not found)
            continue
        cases += record.cases
        trial = dataclasses.replace(trial, cases=cases, seconds=_since(started))
        if finding is not None:
            case = Case.from_json(finding["case"])
            trial = dataclasses.replace(
                trial,
                found_by=finding["clause"],
                found=finding["text"],
                raised=finding["kind"] in FAILURES,
                beyond=not (
                    mutant.method in ("", prop.method)
                    and all(need.holds(case) for need in mutant.needs)
                ),
                by_property=prop.name,
                alone=None if once or limits != ALL else True,
            )
    return trial


def _since(started: float) -> float:
    return round(time.monotonic() - started, 2)


def _of_clause(clause: str) -> list[Property]:
    return [prop for prop in PROPERTIES.values() if prop.clause == clause]


def why_it_cannot_be_met(name: str, limits: str) -> Iterator[tuple[str, ...]]:
    """Why no kernel within these limits has the mutant's mistake; nothing if one may have it."""
    mutant, column = ZOO[name], COLUMNS[limits]
    placed = column.of(mutant.implementation)
    asked = [
        prop
        for prop in _of_clause(mutant.clause)
        if mutant.method in ("", prop.method) and not prop.why_not_offered(mutant.implementation)
    ]
    missing = [prop.why_not_offered(placed) for prop in asked]
    if asked and all(missing):
        yield from (("not offered", what) for what in dict.fromkeys(missing))
        return
    for need in mutant.needs:
        if column.excludes(placed, need):
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
    """Property -> the mutants that it alone finds, in one trial at least; of all that were asked.

    Where all properties can be asked: under other limits some have hardly a case.
    """
    free = [trial for trial in trials if trial.limits == ALL]
    found: dict[str, list[str]] = {}
    for trial in free:
        for prop in _of_clause(trial.clause):
            implementation = ZOO[trial.name].implementation
            if not (prop.why_not_offered(implementation) or prop.why_not_tried(implementation)):
                found.setdefault(prop.name, [])
    for trial in free:
        if trial.killed and trial.alone and trial.name not in found[trial.by_property]:
            found[trial.by_property].append(trial.name)
    return found


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
