"""Properties as pytest tests: `conformance_suite` makes them, `run_property` runs one.

Nothing that was found is lost: before a case is launched it is written to a file of the worker's
own, so that a crash, an abort or a hang leaves its case behind; a finding is written to disk
before it is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given

from nsa_ref.testing.branches import Broken, Inconclusive
from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.properties import PROPERTIES, Property, case_edges, judge


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says about a run.

    spec : how the implementation was named there, for replay commands
    case : run this one case instead of generated ones
    timeout : seconds that one case may take, where a worker process can be spared
    """

    spec: str = ""
    level: str = "quick"
    dtypes: tuple[str, ...] = ()
    seed: int = 0
    case: Case | None = None
    findings: Path = Path("nsa-ref-findings")
    timeout: float = 120.0
    shrink: bool = True


@dataclass(kw_only=True)
class Record:
    """What became of one property: plain data, so that it can cross processes."""

    name: str
    clause: str
    branch: str
    implementation: str
    device: str
    cases: int = 0
    inconclusive: int = 0
    ambiguous: int = 0
    not_offered: int = 0
    budget_used: float | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    edges: Counter[str] = field(default_factory=Counter)
    finding: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as a dict of JSON values."""
        return dataclasses.asdict(self) | {
            "reasons": dict(self.reasons),
            "edges": dict(self.edges),
        }


def run_property(prop: Property, implementation: Implementation, options: Options) -> Record:
    """Try a property on generated cases, or on the one case of the options.

    Raises nothing of the implementation's: what is broken is the record's `finding`, that of the
    smallest case found.
    """
    record = Record(
        name=prop.name,
        clause=prop.clause,
        branch=prop.branch,
        implementation=implementation.name,
        device=implementation.device,
    )
    if reason := prop.offered(implementation):
        record.not_offered += 1
        record.reasons[reason] += 1
        return record
    if options.dtypes and not set(options.dtypes) & set(implementation.numerics):
        record.not_offered += 1
        record.reasons[f"dtypes {', '.join(implementation.numerics)} only"] += 1
        return record

    last: list[tuple[Case, Broken]] = []

    def trial(case: Case) -> None:
        counting = not last  # cases tried while shrinking are no further evidence
        try:
            with announced(prop, implementation, options, case):
                outcome = judge(prop, implementation, case)
        except NotOffered as reason:
            record.not_offered += counting
            record.reasons[f"not offered: {reason}"] += counting
            return
        except Inconclusive as reason:
            record.inconclusive += counting
            record.reasons[f"inconclusive: {reason}"] += counting
            return
        except Broken as broken:
            record.cases += counting
            last.append((case, broken))
            raise
        if not counting:
            return
        record.cases += 1
        record.ambiguous += outcome.ambiguous
        if outcome.budget is not None:
            record.budget_used = max(record.budget_used or 0.0, outcome.budget)
        record.edges.update(case_edges(prop, case))

    try:
        if options.case is not None:
            trial(options.case)
        else:
            _generate(prop, implementation, options, trial)
    except Broken:
        pass
    except hypothesis.errors.Flaky as error:
        if not last:
            raise
        case, broken = last[-1]
        text = f"{broken.text}\nNot every time: the same case also passed ({error})."
        last.append((case, Broken(broken.clause, text, worst=broken.worst)))
    if last:
        case, broken = last[-1]
        record.finding = finding(prop, implementation, options, case, broken)
    return record


def _generate(
    prop: Property, implementation: Implementation, options: Options, trial: Callable[..., None]
) -> None:
    settings = level_settings(options.level, prop.examples)
    if not options.shrink:
        settings = hypothesis.settings(settings, phases=[hypothesis.Phase.generate])
    wrapped = given(case=prop.cases(implementation, options.dtypes or None))(trial)
    # the same cases in every run, others for every property and seed
    wrapped = hypothesis.seed(zlib.crc32(prop.name.encode()) + options.seed)(wrapped)
    settings(wrapped)()


# --- nothing found is lost ------------------------------------------------------------------------


def worker_id() -> str | None:
    """The pytest-xdist worker that this process is, if it is one."""
    return os.environ.get("PYTEST_XDIST_WORKER")


def running_file(findings: Path, worker: str) -> Path:
    """Where a worker says which case it is about to launch."""
    return findings / "running" / f"{worker}.json"


@contextlib.contextmanager
def announced(
    prop: Property, implementation: Implementation, options: Options, case: Case
) -> Iterator[None]:
    """Write the case down before it is launched; end this worker if it takes too long.

    Only in a worker process: the run's own process must not be ended, and needs no last words.
    """
    worker = worker_id()
    if worker is None:
        yield
        return
    path = running_file(options.findings, worker)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finding_data(prop, implementation, options, case)))
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(options.timeout, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    path.unlink(missing_ok=True)


def finding_data(
    prop: Property, implementation: Implementation, options: Options, case: Case
) -> dict[str, Any]:
    """What a replay needs."""
    return {
        "property": prop.name,
        "clause": prop.clause,
        "spec": options.spec,
        "implementation": implementation.name,
        "device": implementation.device,
        "timeout": options.timeout,
        "case": case.to_json(),
    }


def finding(
    prop: Property, implementation: Implementation, options: Options, case: Case, broken: Broken
) -> dict[str, Any]:
    """The finding as data, written to disk, its message included."""
    data = finding_data(prop, implementation, options, case)
    data |= {"clause": broken.clause, "text": broken.text, "worst": broken.worst}
    return save_finding(data, options.findings)


def save_finding(data: dict[str, Any], findings: Path) -> dict[str, Any]:
    """Write a finding into the folder; adds `file` and `replay`."""
    findings.mkdir(parents=True, exist_ok=True)
    name = "-".join((data["clause"], data["property"], data["implementation"]))
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    path = findings / f"{name}.json"
    # a finding names its implementation itself, unless a test file made it in passing
    spec = "" if data["spec"] else " MODULE:OBJECT"
    data |= {"file": str(path), "replay": f"nsa-ref replay {shlex.quote(str(path))}{spec}"}
    path.write_text(json.dumps(data, indent=1))
    return data


def message(data: dict[str, Any]) -> str:
    """A finding for the terminal: clause, smallest case, what was seen, how to see it again."""
    case = Case.from_json(data["case"])
    return (
        f"{data['clause']} is broken by {data['implementation']} on {data['device']}\n"
        f"{data['clause']}: {CLAUSES[data['clause']]}\n"
        f"smallest case: {case}\n"
        f"{data['text']}\n"
        f"replay: {data['replay']}"
    )


# --- the suite ------------------------------------------------------------------------------------


def conformance_suite(*implementations: Implementation) -> dict[str, Callable[..., None]]:
    """Test functions for a port's own test file, one per property and implementation.

    ::

        from nsa_ref.testing import conformance_suite
        from my_port.nsa_adapter import MyPort
        globals().update(conformance_suite(MyPort()))

    Raises
    ------
    TypeError : an argument that is no `Implementation` instance
    """
    tests: dict[str, Callable[..., None]] = {}
    for implementation in implementations:
        if not isinstance(implementation, Implementation):
            raise TypeError(
                f"conformance_suite takes instances of nsa_ref.testing.Implementation, not "
                f"{implementation!r}. Try conformance_suite(MyPort())."
            )
        for prop in PROPERTIES.values():
            name = f"test_{prop.name}"
            if len(implementations) > 1:
                name += "_" + "".join(c if c.isalnum() else "_" for c in implementation.name)
            tests[name] = _as_test(name, prop, implementation)
    return tests


def _as_test(
    name: str, prop: Property, implementation: Implementation
) -> Callable[[pytest.FixtureRequest], None]:
    def test(request: pytest.FixtureRequest) -> None:
        options = getattr(request.config, "nsa_ref_options", None) or Options()
        record = run_property(prop, implementation, options)
        request.node.user_properties.append(("nsa_ref", record.to_json()))
        if record.finding is not None:
            pytest.fail(message(record.finding), pytrace=False)
        if not record.cases:
            # neither a pass nor a failure, and pytest has one word for that
            reason = ", ".join(record.reasons) or "no case was decided"
            pytest.skip(f"{prop.clause}: {reason}")

    test.__name__ = test.__qualname__ = name
    test.__doc__ = f"{prop.clause}: {CLAUSES[prop.clause]}"
    test.nsa_ref_branch = prop.branch  # type: ignore[attr-defined]
    test.nsa_ref_property = prop.name  # type: ignore[attr-defined]
    return test
