"""What a folder keeps of fuzzing, so that nothing is lost when a run is killed.

`state.json` says what was done. `round.json`, and what lies in `round`, belong to the round under
way: a run that was killed is taken up from there. Each cause that was found has its smallest case
in a file of its own, an `@example` beside it, and an entry in `known.toml`, around which later
rounds go on. `samples` holds the cases from which that entry was made.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_ref.semantics import PRESETS
from nsa_ref.testing.case import Case
from nsa_ref.testing.files import write_json
from nsa_ref.testing.findings import Finding, read_finding
from nsa_ref.testing.fuzz_causes import Cause
from nsa_ref.testing.lattice import met_pairs
from nsa_ref.testing.loading import CannotRun
from nsa_ref.testing.swarm import Round
from nsa_ref.testing.verdicts import Record

#: Version of `state.json`.
SCHEMA = "nsa-ref-fuzz-1"

#: What reading a file raises that holds no case.
NO_CASE = (OSError, ValueError, TypeError, KeyError)


@dataclass
class State:
    """What a folder knows of its fuzzing.

    spec : the implementation, as the command names it
    seed : of all rounds; another one than any other folder's, unless the user chose it
    rounds, cases, seconds : done so far
    budget : clause -> the largest share of a bound that was used
    clauses : of which cases were decided
    pairs : of edges on which decided cases stood, "one & another"
    offered : implementation -> the properties that it can be asked
    causes : the files of what was found, one for each cause
    seen : digests of shared findings that were read
    """

    spec: str
    seed: int
    rounds: int = 0
    cases: int = 0
    seconds: float = 0.0
    budget: dict[str, float] = field(default_factory=dict)
    clauses: set[str] = field(default_factory=set)
    pairs: set[str] = field(default_factory=set)
    offered: dict[str, list[str]] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def count(self, records: Sequence[Record]) -> None:
        """Add what a round decided."""
        self.pairs.update(met_pairs(records))
        for record in records:
            self.cases += record.cases
            if record.cases:
                self.clauses.add(record.clause)
            if record.budget_used is not None:
                most = self.budget.get(record.clause, 0.0)
                self.budget[record.clause] = max(most, record.budget_used)

    @property
    def closest(self) -> tuple[str, float] | None:
        """The clause that came closest to its bound, and the share of it that was used."""
        return max(self.budget.items(), key=lambda item: item[1], default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        data: dict[str, Any] = {"schema": SCHEMA, **vars(self)}
        # copies: another thread may count meanwhile
        return {n: sorted(v) if isinstance(v, set) else copy.copy(v) for n, v in data.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> State:
        """The inverse of `to_json`.

        Raises
        ------
        ValueError, TypeError : another version's, or none
        """
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"its schema must be {SCHEMA}")
        sets = {name: set(data[name]) for name in ("clauses", "pairs", "seen")}
        return cls(**data | sets)


class Folder:
    """The folder of one fuzzing, which one process uses at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger, self.examples = path / "known.toml", path / "examples"
        self.found = path / "round"  # what the round under way finds
        self._round, self._state = path / "round.json", path / "state.json"
        self._samples = path / "samples"

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """While this process uses it.

        Raises
        ------
        CannotRun : another one does, or nothing can be written there
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    why = "another nsa-ref fuzz is at work there. Give this one a --findings DIR"
                    raise CannotRun(f"{self.path}: {why} of its own") from None
                yield
        except OSError as error:
            if not str(error.filename).startswith(str(self.path)):
                raise
            why = f"{error.strerror}. Try --findings DIR"
            raise CannotRun(f"cannot fuzz in the folder {self.path}: {why}") from None

    def state(self, spec: str, seed: int | None) -> State:
        """What is known here; a new state, if nothing is.

        seed : None for one that nobody else has

        Raises
        ------
        CannotRun : the folder is about another implementation, or holds what is no state
        """
        if not self._state.exists():
            return State(spec, random.SystemRandom().randrange(2**31) if seed is None else seed)
        try:
            state = State.from_json(json.loads(self._state.read_text()))
        except NO_CASE as error:
            raise CannotRun(f"{self._state} cannot be read: {error}. Try --findings DIR") from None
        if state.spec != spec:
            raise CannotRun(
                f"{self.path} is about {state.spec}, not {spec}: give this one a --findings DIR of "
                "its own"
            )
        if seed is not None and seed != state.seed:
            raise CannotRun(
                f"{self.path} goes on with seed {state.seed}: leave --seed {seed} away, or give it "
                "a --findings DIR of its own"
            )
        return state

    def save(self, state: State) -> None:
        """Write what is known, in one step."""
        write_json(self._state, state.to_json())

    def begin(self, round: Round) -> Path:
        """Note that a round is under way; the file that tells workers what it is."""
        write_json(self._round, round.to_json())
        return self._round

    def cut_off(self) -> Round | None:
        """The round that was under way when a run was killed."""
        with contextlib.suppress(*NO_CASE):
            return Round.from_json(json.loads(self._round.read_text()))
        return None

    def left(self) -> tuple[list[Finding], list[Path]]:
        """What a round left: its findings, and the files of the cases that were running."""
        found: list[Finding] = []
        for path in sorted(self.found.glob("*.json")):
            with contextlib.suppress(*NO_CASE):
                found.append(read_finding(path)[1])
        return found, sorted(self.found.glob("running/*/*.json"))

    def end(self) -> None:
        """The round is done, and all that it found is taken in."""
        self._round.unlink(missing_ok=True)
        shutil.rmtree(self.found, ignore_errors=True)

    def first_of(self, finding: Finding, number: int) -> Finding:
        """The finding as it is kept, the first of a cause, under this number."""
        path = self.path / f"{number}-{Path(finding['file']).name}"
        again = finding["replay"].replace(finding["file"], str(path))
        return finding | {"file": str(path), "replay": again, "cause": str(path)}

    def keep(self, cause: Cause) -> None:
        """Write down all that is known of a cause."""
        path = Path(cause.finding["file"])
        write_json(self._samples / path.name, cause.to_json())
        path.with_suffix(".py").write_text(example_of(cause.finding))
        write_json(path, cause.finding)

    def causes(self, state: State) -> list[Cause]:
        """All that is known, as far as the files are still there."""
        found = []
        for name in state.causes:
            with contextlib.suppress(*NO_CASE):
                path = self.path / name
                finding = read_finding(path)[1]
                # the folder may have been moved since
                again = finding["replay"].replace(finding["file"], str(path))
                finding |= {"file": str(path), "replay": again, "cause": str(path)}
                sample = json.loads((self._samples / name).read_text())
                found.append(Cause.from_json(finding, sample))
        return found


def example_of(finding: Finding) -> str:
    """A finding's case as a decorator of a Hypothesis test, ready to be pasted."""
    case = Case.from_json(finding["case"])
    about = finding["text"].partition("\n")[0]
    # what the text of a case names
    used = [name for name in (*PRESETS, "Semantics") if re.search(rf"\b{name}\b", repr(case))]
    lines = [
        f"# {finding['clause']}, found by {finding['property']}: {about}",
        *(["from dataclasses import replace", ""] if "replace(" in repr(case) else []),
        "from hypothesis import example",
        "",
        *([f"from nsa_ref import {', '.join(used)}"] if used else []),
        "from nsa_ref.testing import Case",
        "",
        f"@example(case={case!r})",
    ]
    return "\n".join(lines) + "\n"
