"""Source mutants of the definition: how many of them its own tests kill, module by module.

``python -m benchmarks.source_mutants`` has mutmut change one step at a time of every module that
``[tool.mutmut]`` names, and run tests/oracle before each change. A run that was ended goes on where
it stood. With names of modules (``masks attention``) these alone are asked, and asked anew.
``--read`` runs nothing. Either prints a line for each module, and every survivor as a diff.

A survivor that is equivalent stands in ``tests/oracle/equivalent_mutants.toml`` with the reason. It
is printed, and counts as not killed. Exit 1: fewer than 97 % were killed, a survivor is not listed,
a listed one was killed, or one has not been asked.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LEAST = 0.97
LISTED = Path("tests/oracle/equivalent_mutants.toml")
#: A timeout is no kill: nothing says that a test would have failed.
OUTCOMES = ("killed", "survived", "equivalent", "timeout", "no tests", "other", "not checked")


class Mutant(NamedTuple):
    """A changed step: the lines that it took away and put in, without their indentation."""

    name: str
    outcome: str
    was: str
    now: str

    @property
    def function(self) -> str:
        return self.name.rpartition("__mutmut")[0]

    @property
    def key(self) -> tuple[str, str, str]:
        """What a moved line leaves as it is: no number, of a line or of the mutant."""
        return self.function, self.was, self.now


def equivalent() -> dict[tuple[str, str, str], str]:
    """(function, was, now) -> why no test can tell the two apart."""
    entries = tomllib.loads(LISTED.read_text(encoding="utf-8")).get("mutant", [])
    return {(e["function"], e["was"], e["now"]): e["why"] for e in entries}


def mutants_of(module: str) -> list[Mutant]:
    """What mutmut's files say of the mutants of a module; diffs of those alone that live."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    path = Path("nsa_ref", f"{module}.py")
    data = SourceFileMutationData(path=path)
    data.load()
    found = []
    for name, code in data.exit_code_by_key.items():
        outcome = status_by_exit_code[code]
        lines = get_diff_for_mutant(name, path=path).splitlines()[2:]
        was, now = (
            "\n".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
        )
        found.append(Mutant(name, outcome if outcome in OUTCOMES else "other", was, now))
    return found


def report(modules: list[str]) -> bool:
    """Print the table and the survivors; True if all is well."""
    reasons = equivalent()
    total: Counter[str] = Counter()
    bad: list[str] = []
    print(f"{'module':12}{'mutants':>9}" + "".join(f"{o:>13}" for o in OUTCOMES) + "   killed")
    for module in modules:
        counts: Counter[str] = Counter()
        for m in mutants_of(module):
            outcome = m.outcome
            if outcome == "survived" and m.key in reasons:
                outcome = "equivalent"
            elif m.key in reasons and outcome == "killed":
                bad.append(f"{m.name} is listed as equivalent, and was killed")
            elif outcome not in ("killed", "not checked"):
                bad.append(f"{m.name} {outcome}\n  - {m.was}\n  + {m.now}")
            counts[outcome] += 1
        total += counts
        _row(module, counts)
    _row("all", total)
    print()
    print("\n".join(bad))
    for function, was, now in (key for key in reasons if key[0].split(".")[1] in modules):
        print(f"equivalent: {function}\n  - {was}\n  + {now}\n  {reasons[function, was, now]}")
    enough = total["killed"] >= LEAST * total.total()
    return enough and not bad and not total["not checked"]


def _row(name: str, counts: Counter[str]) -> None:
    share = counts["killed"] / max(1, counts.total())
    cells = "".join(f"{counts[o]:13}" for o in OUTCOMES)
    print(f"{name:12}{counts.total():9}{cells}{100 * share:8.1f}%")


def main() -> int:
    configured = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    every = [Path(name).stem for name in configured["tool"]["mutmut"]["only_mutate"]]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(every))
    parser.add_argument("--read", action="store_true", help="run nothing, print what is known")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    if unknown := set(asked.modules) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: the modules are {', '.join(every)}")
    if not asked.read:
        mutmut = Path(sys.executable).with_name("mutmut")
        names = [f"nsa_ref.{module}.*" for module in asked.modules]
        subprocess.run([mutmut, "run", f"--max-children={asked.processes}", *names], check=True)
    return 0 if report(asked.modules or every) else 1


if __name__ == "__main__":
    sys.exit(main())
