"""How mutants die: the properties of a mutant's clause are tried, until one finds it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nsa_ref.testing.mutants.zoo import ZOO
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import FAILURES


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a mutant.

    clause : what must find it
    found_by, found : the clause and the words of the finding; "" if it survives
    raised : it was found by an exception of its own, or ended its process: that shows nothing
    by_property : which one found it
    cases : decided until then
    """

    name: str
    clause: str
    found_by: str = ""
    found: str = ""
    raised: bool = False
    by_property: str = ""
    cases: int = 0
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether it dies of its clause, and for what it does."""
        return self.found_by == self.clause and not self.raised

    @property
    def died_of(self) -> str:
        """In a word or two."""
        if self.raised:
            return f"{self.found_by} (by an exception)" if self.found_by else "no end"
        return self.found_by or "survives"

    def to_json(self) -> dict[str, Any]:
        """With what is known of the mutant."""
        mutant = ZOO[self.name]
        about = {"mistake": mutant.mistake, "seen_in": mutant.seen_in}
        return dataclasses.asdict(self) | about | {"right": self.right}


def try_mutant(name: str, options: Options) -> Trial:
    """Try the properties of its clause; what another clause finds counts if its own finds nothing.

    options.findings : a folder for findings, which nobody needs afterwards
    """
    mutant, started, cases = ZOO[name], time.monotonic(), 0
    trial = Trial(name=name, clause=mutant.clause)
    options = dataclasses.replace(options, shrink=False)
    for prop in PROPERTIES.values():
        if prop.clause != mutant.clause or trial.found_by == mutant.clause:
            continue
        record = run_property(prop, mutant.implementation, options)
        cases += record.cases
        if (finding := record.finding) is not None:
            trial = dataclasses.replace(
                trial,
                found_by=finding["clause"],
                found=finding["text"],
                raised=finding["kind"] in FAILURES,
                by_property=prop.name,
            )
    return dataclasses.replace(trial, cases=cases, seconds=round(time.monotonic() - started, 2))


def worker_died(name: str) -> Trial:
    """A mutant that ended its worker process, or was ended for taking too long."""
    return Trial(
        name=name, clause=ZOO[name].clause, raised=True, found="its worker process came to an end"
    )


def show_trials(console: Console, trials: Collection[Trial], seconds: float) -> None:
    """A line for each; then what is wrong, and a last line."""
    headings = ("mutant", "must die of", "died of", "cases", "seconds")
    rows = [(t.name, t.clause, t.died_of, str(t.cases), f"{t.seconds:.1f}") for t in trials]
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    styles = ("", *("" if trial.right else "bold red" for trial in trials))
    for style, row in zip(styles, (headings, *rows)):
        words = [word.ljust(width) for word, width in zip(row[:3], widths)]
        figures = [word.rjust(width) for word, width in zip(row[3:], widths[3:])]
        console.print(Text("  ".join([*words, *figures]), style=style), soft_wrap=True)
    wrong = [trial for trial in trials if not trial.right]
    for trial in wrong:
        about = f"{trial.name} ({ZOO[trial.name].mistake}) must die of {trial.clause}"
        console.print(Text(f"\n{about}: {trial.died_of}\n{trial.found}"), soft_wrap=True)
    count = len(trials)
    text = f"{count - len(wrong)} of {count} mutants die of their clause, in {seconds:.0f} s"
    console.print(Text(text))
