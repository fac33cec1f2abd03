"""Properties as pytest tests: suites that judge implementations, replay cases, warm up."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest

from nsa_ref.testing.branches import BRANCHES, Branch
from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.drawing import AGAIN, REST, TURNS, asked_of, generate, turn_of
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.handing_over import own_settings
from nsa_ref.testing.implementation import Implementation, NotOffered, compiled_by, refusal
from nsa_ref.testing.last_words import announced, withdraw
from nsa_ref.testing.ledger import ledger_of
from nsa_ref.testing.limits import limited
from nsa_ref.testing.loading import check_declarations
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.running import is_asked, run_property
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import message, printable, reasons


def conformance_suite(*implementations: Implementation) -> dict[str, Callable[..., None]]:
    """Test functions for a port's own test file, one per property and implementation.

    ::

        from nsa_ref.testing import conformance_suite
        from my_port.nsa_adapter import MyPort
        globals().update(conformance_suite(MyPort()))

    Raises
    ------
    TypeError : an argument that is no `Implementation` instance
    TypeError, ValueError : what it declares makes no sense, or two have the same name; its ledger
        has an entry without meaning
    """
    tests: dict[str, Callable[..., None]] = {}
    for implementation in implementations:
        if not isinstance(implementation, Implementation):
            raise TypeError(
                f"conformance_suite takes instances of nsa_ref.testing.Implementation, not "
                f"{implementation!r}. Try conformance_suite(MyPort())."
            )
    check_declarations(implementations)
    for implementation in implementations:
        ledger_of(implementation)  # what is wrong with it is wrong before anything is judged
    # all tests of an implementation stand together, because xdist gives every worker long runs of
    # tests: what one worker compiles, another finds in the cache
    for implementation in implementations:
        for prop in PROPERTIES.values():
            name = f"test_{prop.name}"
            if len(implementations) > 1:
                name += f"_{_identifier(implementation.name)}"
            tests[name] = _judging_test(name, prop, implementation)
    return tests


def suite_in_turns(*implementations: Implementation) -> dict[str, Callable[..., None]]:
    """Test functions for a run that has little time: a few cases of each property at a time.

    The first turn comes first, and in it one property of every clause, then the second ones. A
    turn has a share of the time that is left, by how many cases it and the later ones have; what
    it does not need is left to those.
    """
    tests: dict[str, Callable[..., None]] = {}
    places: Counter[tuple[str, str]] = Counter()
    queue = []
    for implementation in implementations:
        for prop in PROPERTIES.values():
            whose = prop.clause, implementation.name
            asked = is_asked(prop, implementation, Options())
            places[whose] += asked
            place = places[whose] if asked else len(PROPERTIES)
            queue += [(turn, place, prop, implementation) for turn in range(TURNS)]
    for turn, _, prop, implementation in sorted(queue, key=lambda one: one[:2]):
        name = f"test_{prop.name}_{_identifier(implementation.name)}_turn_{turn}"
        tests[name] = _judging_test(name, prop, implementation, {"turn": turn})
    return tests


def _share(request: pytest.FixtureRequest, options: Options) -> float:
    """Of the time that is left to all workers, what the turn that now begins may take.

    The first turns go by how many cases they have. The cases of all others are spread evenly over
    the properties: what costs little is done with them all, and leaves the time to the next ones.
    """
    items = request.session.items
    if _WEIGHTS not in request.session.stash:
        turns = [item.function.nsa_ref_turn for item in items]  # type: ignore[attr-defined]
        cases = [count(options) for _, count in turns]
        rest = [n for n, (turn, _) in zip(cases, turns) if turn == REST]
        request.session.stash[_WEIGHTS] = [
            sum(rest) / len(rest) if turn == REST else n for n, (turn, _) in zip(cases, turns)
        ]
    left = request.session.stash[_WEIGHTS][items.index(request.node) :]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    own, all_left = (left[0], sum(left)) if options.turn != AGAIN else (1, len(left))
    return workers * own / max(1, all_left)


#: What the turns of a run weigh.
_WEIGHTS = pytest.StashKey[list[float]]()


def replaying_suite(
    kept: Sequence[tuple[Case, Finding]], implementations: Sequence[Implementation]
) -> dict[str, Callable[..., None]]:
    """Test functions that run kept cases again, each with the property that it broke.

    kept : as `read_finding` gives them. One that no property found is tried on all, and one that
        was found in none of these implementations is judged in all.
    """
    tests: dict[str, Callable[..., None]] = {}
    for number, (case, data) in enumerate(kept):
        found_in = [i for i in implementations if i.name == data.get("implementation")]
        found_by = data.get("property", "")
        for prop in [PROPERTIES[found_by]] if found_by else PROPERTIES.values():
            for implementation in found_in or implementations:
                # a worker that dies leaves no more than the name of its test
                name = f"test_{prop.name}_{number}_{_identifier(implementation.name)}"
                one = {"case": case, "any_property": not found_by}
                tests[name] = _judging_test(name, prop, implementation, one)
    return tests


def number_of_kept(test: str, prop: str) -> int | None:
    """Which of the kept cases a test of `replaying_suite` is about; None if it is no such test."""
    number = test.removeprefix(f"test_{prop}_").partition("_")[0]
    return int(number) if number.isdigit() else None


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _judging_test(
    name: str,
    prop: Property,
    implementation: Implementation,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[pytest.FixtureRequest], None]:
    """changes : fields of the run's options that are others for this test."""

    def test(request: pytest.FixtureRequest) -> None:
        options = dataclasses.replace(_options(request), **changes)
        if options.turn is not None:
            options = dataclasses.replace(options, share=_share(request, options))
        record = run_property(prop, implementation, options)
        request.node.user_properties.append(("nsa_ref", record.to_json()))
        if record.finding is not None:
            pytest.fail(message(record.finding), pytrace=False)
        if record.known or record.spared:
            pytest.xfail(f"known: {', '.join(record.known | record.spared)}")
        if not record.cases:
            # neither a pass nor a failure: pytest calls that skipped
            why = ", ".join(reasons(record)) or "no case was decided"
            pytest.skip(printable(f"{prop.clause}: {why}"))

    def cases(options: Options) -> int:
        if not is_asked(prop, implementation, options):
            return 0
        asked = asked_of(prop, implementation, options)
        return len(turn_of(range(asked), changes["turn"]))

    test.__name__ = test.__qualname__ = name
    test.__doc__ = f"{prop.clause}: {CLAUSES[prop.clause]}"
    test.nsa_ref_branch = prop.part  # type: ignore[attr-defined]
    test.nsa_ref_property = prop.name  # type: ignore[attr-defined]
    test.nsa_ref_implementation = implementation  # type: ignore[attr-defined]
    test.nsa_ref_turn = changes.get("turn"), cases  # type: ignore[attr-defined]
    return test


def _options(request: pytest.FixtureRequest) -> Options:
    return getattr(request.config, "nsa_ref_options", None) or Options()


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
                    direction = "backward" if backward else "forward"
                    parts = ("test_warm", branch.name, direction, dtype, implementation.name)
                    name = _identifier("_".join(parts))
                    tests[name] = _warming_test(name, implementation, branch, backward, dtype)
    return tests


def _warming_test(
    name: str, implementation: Implementation, branch: Branch, backward: bool, dtype: str
) -> Callable[[pytest.FixtureRequest], None]:
    @own_settings()
    def test(request: pytest.FixtureRequest) -> None:
        options = _options(request)
        if options.dtypes and dtype not in options.dtypes:
            pytest.skip(f"{dtype} is not asked for")
        before = compiled_by(implementation)
        failed = 0
        for prop, case in _one_case_a_graph(implementation, branch, backward, dtype, options):
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
        withdraw(options)
        counts = compiled_by(implementation) - before
        if failed:
            counts["cases that failed"] = failed
        record = Record(name=name, clause="", implementation=implementation.name, compiled=counts)
        request.node.user_properties.append(("nsa_ref_warm", record.to_json()))

    test.__name__ = test.__qualname__ = name
    test.nsa_ref_branch = branch.name  # type: ignore[attr-defined]
    return test


def _one_case_a_graph(
    implementation: Implementation, branch: Branch, backward: bool, dtype: str, options: Options
) -> list[tuple[Property, Case]]:
    """For every kind of graph, one case like those that will be judged.

    An implementation compiles one graph for each value of what it has limits on, but for lengths;
    and one for each length of a long sequence.
    """
    method = f"{branch.name}_vjp" if backward else branch.name
    own = limited(implementation, method).limits
    fields = [f for f in own if f not in ("q_len", "kv_len", "group_size")]
    kinds: dict[tuple[Any, ...], tuple[Property, Case]] = {}

    def keep(case: Case) -> None:
        if case.batch and case.q_len and not refusal(implementation, case):
            sizes = (case.q_len, case.kv_len, case.num_selected_blocks) if prop.extent else ()
            kind = (case.semantics, *sizes, *(getattr(case, field) for field in fields))
            kinds.setdefault(kind, (prop, case))

    asked = dataclasses.replace(options, dtypes=(dtype,))
    for prop in PROPERTIES.values():
        alike = prop.method == branch.name and prop.backward == backward
        if alike and prop.extent != "large" and is_asked(prop, implementation, asked):
            generate(prop, implementation, asked, keep)
    return list(kinds.values())
