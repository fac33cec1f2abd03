"""Properties as pytest tests: `conformance_suite` makes them, `run_property` runs one.

Nothing that was found is lost: before a case is launched it is written to a file of the worker's
own, so that a crash, an abort or a hang leaves its case behind (`lost` reads it); a finding is
written to disk before it is made smaller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_ref.testing.branches import BRANCHES, Branch, Broken, Inconclusive, Raised
from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.implementation import Implementation, NotOffered, OracleImplementation
from nsa_ref.testing.judging import judge
from nsa_ref.testing.lattice import case_edges
from nsa_ref.testing.loading import check_declarations, one_line
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.properties import PROPERTIES, Outcome, Property
from nsa_ref.testing.properties.masks import CONVENTION

#: Seconds for making a broken case smaller; where a case takes seconds, it stays larger.
SHRINKING_TIME = 60.0

#: So many times the time of another case may be taken by tensors of more than 2^31 elements, most
#: of it by the judge.
LARGE = 5

#: A longer text of the implementation's is cut in its middle; the file of the finding has it whole.
LONGEST_TEXT = 6000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says about a run.

    spec : how the implementation was named there, for replay commands
    case : run this one case instead of generated ones
    any_property : the case was not found by a property, which may not be about such cases
    timeout : seconds that one case may take, where a worker process can be spared
    last_words : somebody reads where a worker was when it died; else it tells its standard error
    """

    spec: str = ""
    level: str = "quick"
    dtypes: tuple[str, ...] = ()
    seed: int = 0
    case: Case | None = None
    any_property: bool = False
    findings: Path = Path("nsa-ref-findings")
    timeout: float = 120.0
    last_words: bool = False
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
    refused_edges: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    finding: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as a dict of JSON values."""
        return dataclasses.asdict(self) | {
            "reasons": dict(self.reasons),
            "edges": dict(self.edges),
            "refused_edges": dict(self.refused_edges),
            "compiled": dict(self.compiled),
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
    if reason := _not_asked(prop, implementation, options):
        record.not_offered += 1
        record.reasons[reason] += 1
        return record

    compiled_before = Counter(implementation.compile_counts())
    broken_cases: dict[Case, Broken] = {}
    give_up = [0.0]

    def trial(case: Case) -> None:
        counting = not broken_cases  # cases tried while shrinking are no further evidence
        if not counting and time.monotonic() > give_up[0]:
            # out of time: what was seen stays true, and nothing smaller is looked for
            if case in broken_cases:
                raise broken_cases[case]
            return
        try:
            with announced(prop, implementation, options, case):
                outcome = _judge(prop, implementation, case)
        except NotOffered as reason:
            record.not_offered += counting
            record.reasons[f"not offered: {reason}"] += counting
            if counting:
                record.refused_edges.update(case_edges(prop, case))
            return
        except Inconclusive as reason:
            record.inconclusive += counting
            record.reasons[f"inconclusive: {reason}"] += counting
            return
        except Broken as broken:
            if counting:
                record.cases += 1
                give_up[0] = time.monotonic() + SHRINKING_TIME
            broken_cases.pop(case, None)
            broken_cases[case] = broken  # the last one is the smallest
            with announced(prop, implementation, options, case):  # a kernel may run for ever
                fault = device.fault()
            if fault:
                give_up[0] = -math.inf  # nothing runs here any more, smaller or not
                broken = broken_cases[case] = _leave(
                    prop, implementation, options, case, broken, fault
                )
            record.finding = finding(prop, implementation, options, case, broken)
            _let_go(broken)
            device.give_back()
            raise broken
        if not counting:
            return
        record.ambiguous += outcome.ambiguous
        if not outcome.decided:
            record.reasons["ambiguous: every row may be chosen either way"] += 1
            return
        record.cases += 1
        if outcome.powerless:
            record.inconclusive += 1
            record.reasons["inconclusive: the bound of one tensor admits any value"] += 1
        if outcome.budget is not None:
            record.budget_used = max(record.budget_used or 0.0, outcome.budget)
        record.edges.update(case_edges(prop, case))

    device = device_of(implementation.device)
    huge = prop.extent == "large"
    try:
        with device.alone() if huge else contextlib.nullcontext():
            if options.case is not None:
                trial(options.case)
            else:
                _generate(prop, implementation, options, trial)
            if huge:
                device.give_back()
    except Broken:
        pass
    except hypothesis.errors.Flaky:
        if not broken_cases:
            raise
        case, broken = list(broken_cases.items())[-1]
        text = f"{broken.text}\nNot every time: the same case also passed."
        flaky = Broken(broken.clause, text, worst=broken.worst)
        record.finding = finding(prop, implementation, options, case, flaky)
    finally:
        done(options)
    record.compiled = Counter(implementation.compile_counts()) - compiled_before
    return record


def _let_go(error: BaseException) -> None:
    """Drop what the frames of an error hold: tensors, that the next case may want the room of."""
    left, seen = [error], []
    while left:
        one = left.pop()
        traceback.clear_frames(one.__traceback__)
        seen.append(one)
        left += [e for e in (one.__cause__, one.__context__) if e is not None and e not in seen]


#: device -> why it answers no more in this process
_lost_devices: dict[str, str] = {}


def _leave(
    prop: Property,
    implementation: Implementation,
    options: Options,
    case: Case,
    broken: Broken,
    fault: str,
) -> Broken:
    """End this worker, if it is one: another takes over, on a device that answers.

    `lost` reports the finding from what is written here.
    """
    text = f"{broken.text}\nThe device does not answer any more in this process: {fault}"
    if (worker := worker_id()) is None:
        _lost_devices[implementation.device] = fault
        return Broken(broken.clause, text)
    data = finding_data(prop, implementation, options, case)
    data |= {"clause": broken.clause, "text": text, "ended": "device"}
    folder = running_folder(options.findings, os.environ.get("PYTEST_XDIST_TESTRUNUID", ""))
    _write(folder / f"{worker}.json", data)
    os._exit(1)


def _not_asked(prop: Property, implementation: Implementation, options: Options) -> str:
    """Why a property is not tried at all, or nothing."""
    if fault := _lost_devices.get(implementation.device):
        worker = "-n 1 -p nsa_ref.testing.plugin goes on in a fresh process"
        return f"not tried: {implementation.device} was lost to this process ({fault}); {worker}"
    if reason := prop.offered(implementation):
        return reason
    if options.dtypes and not set(options.dtypes) & set(implementation.numerics):
        return f"{', '.join(options.dtypes)} is not offered"
    case = options.case
    if case is None:
        return ""
    if case.dtype not in implementation.numerics:
        return f"{case.dtype} is not offered"
    if case.semantics not in implementation.semantics:
        return "the case's semantics are not declared"
    if not options.any_property:
        return ""
    wanted = prop.options
    about = (
        prop.semantics(case.semantics)
        and wanted.get("adjust") is None
        and all(
            getattr(case, field) in wanted.get(option, [getattr(case, field)])
            for field, option in (
                ("inputs", "inputs"),
                ("indices", "indices"),
                ("head_dim", "head_dims"),
                ("value_dim", "head_dims"),
            )
        )
    )
    return "" if about else f"{prop.name} is about other cases"


def _judge(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """`judge`, with every exception that the implementation is to blame for turned into Broken.

    Code under test may raise what no test expects: SystemExit, pytest.skip, an error out of an
    array that it returned. Whose fault such an exception is, the oracle says: if it gets through
    the same case, the judge is able to, and the implementation is at fault.
    """
    try:
        return judge(prop, implementation, case)
    except Broken as broken:
        raised = broken.__cause__
        if isinstance(raised, Raised) and raised.__cause__ is not None:
            text = f"{broken.text}{_where(raised.__cause__)}"
            raise Broken(broken.clause, text, worst=broken.worst) from raised
        raise
    except (NotOffered, Inconclusive):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _deaf():
            raise  # the user's
        if isinstance(error, Exception) and not _oracle_can(prop, case):
            raise
        text = f"the implementation failed: {one_line(error)}{_where(error)}"
        raise Broken(prop.clause, text) from error


def _deaf() -> bool:
    """Whether Ctrl-C cannot be the cause of a KeyboardInterrupt here (see plugin.py)."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def _oracle_can(prop: Property, case: Case) -> bool:
    """Whether the property gets to an answer when the definition itself is asked."""
    try:
        judge(prop, OracleImplementation(), case)
    except (Broken, NotOffered, Inconclusive):
        return True
    except Exception:
        return False
    return True


def _where(error: BaseException) -> str:
    """The line of the adapter that raised, and the innermost one, below the message."""
    here = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if here not in f.filename]
    lines = [f"\n  at {f.filename}:{f.lineno}, in {f.name}: {f.line}" for f in frames]
    return "".join(dict.fromkeys([*lines[:1], *lines[-1:]]))


def _generate(
    prop: Property, implementation: Implementation, options: Options, trial: Callable[..., None]
) -> None:
    strata = prop.strata(implementation, options.dtypes or None)
    examples = prop.examples
    share = device_of(implementation.device).share
    if share < 1:
        # too few for lots: the first case of each would be its smallest
        strata, examples = [st.one_of(strata)], math.ceil(examples * share)
    settings = level_settings(options.level, math.ceil(examples / len(strata)))
    if prop.extent == "large":
        # one takes a minute, and another one shows little else; not the first, which is the
        # smallest whatever the seed
        settings, judged = hypothesis.settings(settings, max_examples=2), trial
        first = iter([lambda case: None])

        def trial(case: Case) -> None:
            next(first, judged)(case)

    if not options.shrink or prop.extent == "large":
        settings = hypothesis.settings(settings, phases=[hypothesis.Phase.generate])

    def run(number: int, settings: hypothesis.settings) -> None:
        # the same cases in every run, others for every property, lot and seed
        seed = zlib.crc32(f"{prop.name} {number} {options.seed}".encode())
        settings(hypothesis.seed(seed)(given(case=strata[number])(trial)))()

    for number in range(len(strata)):
        try:
            run(number, settings)
        except Broken:
            if number and options.shrink:
                # the first lot has the smallest cases: what is broken may show there, too
                run(0, hypothesis.settings(settings, max_examples=100))
            raise


# --- nothing found is lost ------------------------------------------------------------------------


def worker_id() -> str | None:
    """The pytest-xdist worker that this process is, if it is one."""
    return os.environ.get("PYTEST_XDIST_WORKER")


def running_folder(findings: Path, run: str) -> Path:
    """Where the workers of one run say which case they are about to launch."""
    return findings / "running" / run


@contextlib.contextmanager
def announced(
    prop: Property, implementation: Implementation, options: Options, case: Case
) -> Iterator[None]:
    """Write the case down before it is launched; end this worker if it takes too long.

    Only in a worker process: the run's own process must not be ended, and needs no last words.
    The file stays until the property is done: a crash may come a little later than its cause.
    """
    worker = worker_id()
    if worker is None:
        yield
        return
    folder = running_folder(options.findings, os.environ.get("PYTEST_XDIST_TESTRUNUID", ""))
    _write(folder / f"{worker}.json", finding_data(prop, implementation, options, case))
    trace = _last_words(folder / f"{worker}.trace") if options.last_words else sys.__stderr__
    assert trace is not None
    seconds = _time(prop, implementation.device, options.timeout)
    faulthandler.dump_traceback_later(seconds, exit=True, file=trace)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _time(prop: Property, device: str, timeout: float) -> float:
    """Seconds that a case of this property may take on this device."""
    return timeout * device_of(device).patience * (LARGE if prop.extent == "large" else 1)


def _write(path: Path, data: dict[str, Any]) -> None:
    """In one step, so that a process which dies meanwhile leaves no half of a file."""
    text = json.dumps(data, indent=1) + "\n"
    half = path.with_suffix(".half")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another worker found the folder empty
            half.write_text(text)
            half.replace(path)
            return


def done(options: Options) -> None:
    """Nothing is running in this worker any more."""
    if (worker := worker_id()) is None:
        return
    folder = running_folder(options.findings, os.environ.get("PYTEST_XDIST_TESTRUNUID", ""))
    (folder / f"{worker}.json").unlink(missing_ok=True)
    _remove_empty(folder, folder.parent, options.findings)


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


_opened: dict[Path, TextIO] = {}


def _last_words(path: Path) -> TextIO:
    """The file into which the interpreter writes where it was when it died; open until then."""
    if path not in _opened:
        _opened[path] = path.open("w")
        faulthandler.enable(file=_opened[path])
    return _opened[path]


def lost(test: str, worker: str, run: str, findings: Path) -> tuple[Record | None, str]:
    """What became of a property whose worker died, and in words.

    test : the name of its test function
    returns : None if the test is no property's; a record without a finding if the worker died
        outside of any case, which is nobody's fault that could be proved
    """
    name = test.removeprefix("test_")
    known = [p for p in PROPERTIES if name == p or name.startswith(f"{p}_")]
    if not known:
        return None, ""
    prop = PROPERTIES[max(known, key=len)]
    record = Record(
        name=prop.name, clause=prop.clause, branch=prop.branch, implementation="", device=""
    )
    folder = running_folder(findings, run)
    path, trace = folder / f"{worker}.json", folder / f"{worker}.trace"
    if not path.exists():
        return record, f"{name}: its worker process died outside of any case"
    data = json.loads(path.read_text())
    path.unlink()
    last_words = trace.read_text(errors="replace") if trace.exists() else ""
    if "ended" in data:
        text = ""
    elif last_words.startswith("Timeout"):
        seconds = _time(prop, data["device"], data["timeout"])
        data["ended"], text = "hang", f"it hangs: no answer after {seconds:g} s"
    else:
        data["ended"], text = "crash", "it ended its process (a crash, an abort or an exit)"
        if last_words.startswith("Fatal Python error"):
            text += f": {last_words.splitlines()[0].removeprefix('Fatal Python error: ')}"
    if text:
        data["text"] = f"the implementation failed: {text}{_frames(last_words)}"
    data["worst"] = {}
    record.implementation, record.device = data["implementation"], data["device"]
    record.cases = 1
    record.finding = save_finding(data, findings)
    return record, message(record.finding)


def _frames(last_words: str) -> str:
    """The innermost lines of the thread that ran the case, up to the judge's own."""
    here = str(Path(__file__).parent)
    for thread in last_words.split("\n\n"):
        frames = [line for line in thread.splitlines() if line.startswith("  File")]
        ours = [i for i, line in enumerate(frames) if here in line]
        if ours:
            return "".join(f"\n  at{f.removeprefix('  File')}" for f in frames[: ours[0]][:4])
    return ""


def forget_running(findings: Path, run: str) -> None:
    """Remove what the workers of a finished run left, and folders that hold nothing then."""
    shutil.rmtree(running_folder(findings, run), ignore_errors=True)
    _remove_empty(findings / "running", findings)


def finding_data(
    prop: Property, implementation: Implementation, options: Options, case: Case
) -> dict[str, Any]:
    """What a replay needs."""
    return {
        "property": prop.name,
        "clause": prop.clause,
        "spec": options.spec or _spec(implementation),
        "implementation": implementation.name,
        "device": implementation.device,
        "timeout": options.timeout,
        "case": case.to_json(),
    }


def _spec(implementation: Implementation) -> str:
    """How a replay can name an implementation that a test file made: by its class, if it can."""
    cls = type(implementation)
    module = sys.modules.get(cls.__module__)
    if module is None or getattr(module, cls.__qualname__, None) is not cls:
        return ""
    return f"{cls.__module__}:{cls.__qualname__}"


def finding(
    prop: Property, implementation: Implementation, options: Options, case: Case, broken: Broken
) -> dict[str, Any]:
    """The finding as data, written to disk, its message included."""
    data = finding_data(prop, implementation, options, case)
    data |= {"clause": broken.clause, "text": broken.text, "worst": broken.worst}
    return save_finding(data, options.findings)


def save_finding(data: dict[str, Any], findings: Path) -> dict[str, Any]:
    """Write a finding into the folder; adds `file` and `replay`."""
    # an exception's message may hold what no terminal can print
    data["text"] = data["text"].encode(errors="replace").decode()
    # a crash while a broken case is made smaller is a finding of its own
    ended = [data["ended"]] if "ended" in data else []
    name = "-".join((data["clause"], data["property"], data["implementation"], *ended))
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    path = findings / f"{name}.json"
    # a finding names its implementation itself, unless nothing can find its class again
    spec = "" if data["spec"] else " MODULE:OBJECT"
    data |= {"file": str(path), "replay": f"nsa-ref replay {shlex.quote(str(path))}{spec}"}
    _write(path, data)
    return data


def message(data: dict[str, Any]) -> str:
    """A finding for the terminal: clause, smallest case, what was seen, how to see it again."""
    case = Case.from_json(data["case"])
    # last, because it is read only if the rest is no surprise
    seen, hint, convention = data["text"].partition(CONVENTION)
    if len(seen) > LONGEST_TEXT:
        half = LONGEST_TEXT // 2
        cut = len(seen) - 2 * half
        seen = f"{seen[:half]}\n... {cut} characters, in {data['file']} ...\n{seen[-half:]}"
    # what takes its process down cannot be made smaller in it
    size = "case" if "ended" in data else "smallest case"
    return (
        f"{data['clause']} is broken by {data['implementation']} on {data['device']}\n"
        f"{data['clause']}: {CLAUSES[data['clause']]}\n"
        f"{size}: {case}\n"
        f"{seen.rstrip()}\n"
        f"replay: {data['replay']}" + (f"\n{hint}{convention.rstrip()}" if hint else "")
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
    TypeError, ValueError : what it declares makes no sense, or two have the same name
    """
    tests: dict[str, Callable[..., None]] = {}
    for implementation in implementations:
        if not isinstance(implementation, Implementation):
            raise TypeError(
                f"conformance_suite takes instances of nsa_ref.testing.Implementation, not "
                f"{implementation!r}. Try conformance_suite(MyPort())."
            )
    check_declarations(implementations)
    # one implementation after the other: workers begin with long runs of tests, and what one of
    # them compiles is in the cache when another comes to it
    for implementation in implementations:
        for prop in PROPERTIES.values():
            name = f"test_{prop.name}"
            if len(implementations) > 1:
                name += "_" + "".join(c if c.isalnum() else "_" for c in implementation.name)
            tests[name] = _as_test(name, prop, implementation)
    return tests


def warming_suite(*implementations: Implementation) -> dict[str, Callable[..., None]]:
    """Test functions that compile what `conformance_suite` will run, and judge nothing.

    One for each branch, dtype and direction of each implementation: no two compile the same.
    """
    tests: dict[str, Callable[..., None]] = {}
    for implementation in implementations:
        for branch in BRANCHES:
            for backward in (False, True):
                offers = implementation.offers_vjp if backward else implementation.offers
                if not offers(branch.name):
                    continue
                for dtype in implementation.numerics:
                    parts = (branch.name, "backward" if backward else "forward", dtype)
                    name = "_".join(("test_warm", *parts, implementation.name))
                    name = "".join(c if c.isalnum() else "_" for c in name)
                    tests[name] = _as_warming(name, implementation, branch, backward, dtype)
    return tests


def _as_warming(
    name: str, implementation: Implementation, branch: Branch, backward: bool, dtype: str
) -> Callable[[pytest.FixtureRequest], None]:
    def test(request: pytest.FixtureRequest) -> None:
        options = getattr(request.config, "nsa_ref_options", None) or Options()
        if options.dtypes and dtype not in options.dtypes:
            pytest.skip(f"{dtype} is not asked for")
        before = Counter(implementation.compile_counts())
        failed = 0
        for prop, case in _kinds(implementation, branch, backward, dtype, options).values():
            try:
                with announced(prop, implementation, options, case):
                    inputs = branch.inputs(case)
                    if backward:
                        branch.backward(implementation, case, inputs, *case.upstream_gradients())
                    else:
                        branch.forward(implementation, case, inputs)
            except NotOffered:
                continue
            except Exception:  # what goes wrong here goes wrong again before the judge
                failed += 1
        done(options)
        counts = Counter(implementation.compile_counts()) - before
        if failed:
            counts["cases that failed"] = failed
        data = {"implementation": implementation.name, "compiled": dict(counts)}
        request.node.user_properties.append(("nsa_ref_warm", data))

    test.__name__ = test.__qualname__ = name
    test.nsa_ref_branch = branch.name  # type: ignore[attr-defined]
    return test


def _kinds(
    implementation: Implementation, branch: Branch, backward: bool, dtype: str, options: Options
) -> dict[tuple[Any, ...], tuple[Property, Case]]:
    """A case like those that will be judged for every kind of graph.

    What an implementation compiles for is what it has limits on, but for lengths; and whatever
    becomes of long ones.
    """
    fields = [f for f in implementation.limits if f not in ("q_len", "kv_len", "group_size")]
    kinds: dict[tuple[Any, ...], tuple[Property, Case]] = {}

    def keep(case: Case) -> None:
        if case.batch and case.q_len and implementation.supports(case) is None:
            sizes = (case.q_len, case.kv_len, case.num_selected_blocks) if prop.extent else ()
            kind = (case.semantics, *sizes, *(getattr(case, field) for field in fields))
            kinds.setdefault(kind, (prop, case))

    asked = dataclasses.replace(options, dtypes=(dtype,))
    for prop in PROPERTIES.values():
        alike = prop.method == branch.name and prop.backward == backward
        if alike and prop.extent != "large" and not _not_asked(prop, implementation, asked):
            _generate(prop, implementation, asked, keep)
    return kinds


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
    test.nsa_ref_implementation = implementation.name  # type: ignore[attr-defined]
    return test
