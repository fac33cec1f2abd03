"""Source mutants of the definition: how many of them its own tests kill, module by module.

``python -m benchmarks.source_mutants`` has mutmut change one step at a time of every module that
``[tool.mutmut]`` names, and run tests/oracle before each change. Modules may be named (``masks
attention``). A run that was ended goes on where it stood: what was killed is not asked again while
its function stays as it is, and what lives is asked each time, for the tests may be sharper now;
without the folder ``mutants`` all are asked anew. ``--read`` runs nothing. Either prints a line for
each module and what lives as a diff, and writes the counts as JSON, with the versions, and with the
commit that each module was asked at. Counts of modules that were not asked are kept there while
neither they nor tests/oracle change.

A survivor that is equivalent stands in ``tests/oracle/equivalent_mutants.toml`` with the reason. It
counts as not killed. Exit 1: fewer than 97 % were killed, one that lives is not listed, one that is
listed does not live, or one has not been asked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nsa_ref.testing.loading import versions

LEAST = 97  # percent
LISTED = Path(__file__).parents[1] / "tests/oracle/equivalent_mutants.toml"
RESULTS = Path(__file__).parent / "results"
#: A timeout is no kill: nothing says that a test would have failed.
OUTCOMES = ("killed", "survived", "equivalent", "timeout", "no tests", "other", "not checked")

Key = tuple[str, str, str]


class Mutant(NamedTuple):
    """A changed step: the lines that it took away and put in, without their indentation."""

    name: str
    outcome: str
    was: str
    now: str

    @property
    def key(self) -> Key:
        """What a moved line leaves as it is: no number, of a line or of the mutant."""
        return self.name.rpartition("__mutmut")[0], self.was, self.now


def equivalent() -> dict[Key, str]:
    """(function, was, now) -> why no test can tell the two apart."""
    entries = tomllib.loads(LISTED.read_text(encoding="utf-8")).get("mutant", [])
    return {
        (function, change["was"], change["now"]): entry["why"]
        for entry in entries
        for function in entry["functions"]
        for change in entry["changes"]
    }


def mutants_of(module: str, reasons: dict[Key, str]) -> list[Mutant]:
    """What mutmut's files say of the mutants of a module; a survivor that is listed is equivalent.

    Only what lives has its lines read, which is slow.
    """
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    path = Path("nsa_ref", f"{module}.py")
    data = SourceFileMutationData(path=path)
    data.load()
    found = []
    for name, code in data.exit_code_by_key.items():
        outcome = status_by_exit_code[code]
        m = Mutant(name, outcome if outcome in OUTCOMES else "other", "", "")
        if m.outcome not in ("killed", "not checked"):
            lines = get_diff_for_mutant(name, path=path).splitlines()[2:]
            was, now = (
                "\n".join(line[1:].strip() for line in lines if line.startswith(sign))
                for sign in "-+"
            )
            m = m._replace(was=was, now=now)
        found.append(m)
    return list(judged(found, reasons))


def judged(mutants: Iterable[Mutant], reasons: dict[Key, str]) -> Iterator[Mutant]:
    """The same mutants; a survivor that is listed is equivalent."""
    for m in mutants:
        listed = m.outcome == "survived" and m.key in reasons
        yield m._replace(outcome="equivalent") if listed else m


def to_ask(module: str, reasons: dict[Key, str]) -> list[str]:
    """The mutants of a module that have yet to be killed, or the pattern of all of them."""
    found = mutants_of(module, reasons)
    if not found:
        return [f"nsa_ref.{module}.*"]
    return [m.name for m in found if m.outcome not in ("killed", "equivalent")]


def ask(modules: list[str], reasons: dict[Key, str], processes: int) -> None:
    """Have mutmut ask them, and then those of functions that it finds changed as it begins."""
    environment = os.environ | {
        # a process of one thread can be forked at any time
        "OMP_NUM_THREADS": "1",
        # it collects garbage five times, for two thirds of the time that a mutant takes
        "PYTEST_ADDOPTS": "-p no:unraisableexception",
    }
    names = [n for m in modules for n in to_ask(m, reasons)] or [
        mutants_of(modules[0], reasons)[0].name
    ]
    while names:
        mutmut = Path(sys.executable).with_name("mutmut")
        command = [mutmut, "run", f"--max-children={processes}", *names]
        subprocess.run(command, check=True, env=environment)
        asked = set(names)
        left = [
            m.name
            for module in modules
            for m in mutants_of(module, reasons)
            if m.outcome == "not checked"
        ]
        names = [name for name in left if name not in asked]


def row(counts: Counter[str]) -> dict[str, float]:
    """The counts of a module, and the shares that were killed: of all, and of what differs."""
    total, differ = counts.total(), counts.total() - counts["equivalent"]
    shares = {"killed of all": total, "killed of what differs": differ}
    percent = {name: round(100 * counts["killed"] / max(1, of), 2) for name, of in shares.items()}
    return {"mutants": total} | {o: counts[o] for o in OUTCOMES} | percent


def counted(found: dict[str, list[Mutant]]) -> dict[str, Counter[str]]:
    """Module -> how many ended how, if any was asked."""
    counts = {module: Counter(m.outcome for m in mutants) for module, mutants in found.items()}
    return {module: c for module, c in counts.items() if c.total() > c["not checked"]}


def report(counts: dict[str, Counter[str]]) -> dict[str, dict[str, float]]:
    """A row for each module, and one for all of them."""
    return {m: row(c) for m, c in (counts | {"all": sum(counts.values(), Counter())}).items()}


def kept(written: dict[str, Any]) -> dict[str, tuple[Counter[str], str]]:
    """Module -> its counts and commit, of those in a report that have not changed since."""
    found = {}
    for module, commit in written.get("commits", {}).items():
        same = ("git", "diff", "--quiet", commit, "--", f"nsa_ref/{module}.py", "tests/oracle/*.py")
        if subprocess.run(same, stderr=subprocess.DEVNULL).returncode == 0:
            cells = written["measured"][module]
            found[module] = Counter({outcome: cells[outcome] for outcome in OUTCOMES}), commit
    return found


def complaints(
    found: dict[str, list[Mutant]], rows: dict[str, dict[str, float]], reasons: dict[Key, str]
) -> list[str]:
    """What keeps the command from passing."""
    said = []
    for module, mutants in found.items():
        lives = {m.key: m for m in mutants if m.outcome not in ("killed", "not checked")}
        for key, m in lives.items():
            if key not in reasons:
                said.append(f"{m.name} {m.outcome}\n  - {m.was}\n  + {m.now}")
        if left := sum(m.outcome == "not checked" for m in mutants):
            said.append(f"{left} mutants of {module} have not been asked")
            continue
        for key in reasons:
            if key[0].split(".")[1] == module and key not in lives:
                said.append(f"{key[0]} is listed as equivalent, and does not live\n  + {key[2]}")
    if rows["all"]["killed of all"] < LEAST:
        said.append(f"{rows['all']['killed of all']} % were killed; it must be at least {LEAST} %")
    return said


def show(rows: dict[str, dict[str, float]]) -> None:
    """A line for each row, and the names of its cells above."""
    print(" " * 10 + "".join(f"{name:>{len(name) + 2}}" for name in rows["all"]))
    for module, cells in rows.items():
        print(f"{module:10}" + "".join(f"{x:{len(name) + 2}}" for name, x in cells.items()))


def main(given: list[str] | None = None) -> int:
    """The command."""
    configured = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    every = [Path(name).stem for name in configured["tool"]["mutmut"]["only_mutate"]]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(every))
    parser.add_argument("--read", action="store_true", help="run nothing, print what is known")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", default=RESULTS / "source-mutants.json", type=Path)
    asked = parser.parse_args(given)
    if unknown := set(asked.modules) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: the modules are {', '.join(every)}")
    reasons = equivalent()
    modules = asked.modules or every
    if not asked.read:
        ask(modules, reasons, asked.processes)

    found = {module: mutants_of(module, reasons) for module in every}
    own = versions()
    commit = own.get("commit", "")
    before = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    counts = kept(before) | {m: (c, commit) for m, c in counted(found).items()}
    rows = report({module: count for module, (count, _) in sorted(counts.items())})
    said = complaints({module: found[module] for module in modules}, rows, reasons)
    print("\n".join(said))
    show(rows)
    written = {
        "device": platform.machine(),
        "versions": own | {"mutmut": importlib.metadata.version("mutmut")},
        "commits": {module: commit for module, (_, commit) in sorted(counts.items())},
        "measured": rows,
    }
    asked.output.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
