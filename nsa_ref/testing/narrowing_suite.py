"""What `nsa-ref ledger add` hands to pytest: a finding's property on cases like its own."""

from __future__ import annotations

import functools
import time

import pytest

from nsa_ref.testing import plugin
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.last_words import announced
from nsa_ref.testing.narrowing import SAMPLED, SAMPLED_IF_ENDED, broken_clause, drawn
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.steps import is_like, leads_to

#: Of fuzzing: how many cases are judged, and seconds to see whether one that breaks is about the
#: finding's mistake, and about none that was known before.
SAMPLED_IN_FUZZING, LIKENESS_TIME = 60, 1.0


@pytest.fixture
def prop() -> Property:
    (_, finding), *_ = plugin.kept
    return PROPERTIES[finding["property"]]


@pytest.fixture
def implementation() -> Implementation:
    (_, finding), *_ = plugin.kept
    known = [one for one in plugin.implementations if one.name == finding.get("implementation")]
    return [*known, *plugin.implementations][0]


@pytest.fixture
def options(request: pytest.FixtureRequest) -> Options:
    return request.config.nsa_ref_options  # type: ignore[attr-defined]


_drawn = functools.cache(drawn)


def test_cases(
    request: pytest.FixtureRequest,
    prop: Property,
    implementation: Implementation,
    options: Options,
) -> None:
    """Says which cases there are, for what a case that takes its process down cannot say."""
    cases = _drawn(prop, implementation, options)
    said = {"cases": [case.to_json() for case in cases]}
    request.node.user_properties.append(("nsa_ref_sampled", said))


@pytest.mark.parametrize("number", range(SAMPLED))
def test_case(
    request: pytest.FixtureRequest,
    prop: Property,
    implementation: Implementation,
    options: Options,
    number: int,
) -> None:
    cases = _drawn(prop, implementation, options)
    (_, finding), *_ = plugin.kept
    most = SAMPLED if plugin.round is None else SAMPLED_IN_FUZZING
    asked = min(len(cases), SAMPLED_IF_ENDED if "ended" in finding else most)
    if number >= asked:
        pytest.skip(f"of {len(cases)} cases {asked} are asked")
    if not options.seconds_left:
        pytest.skip("the time is up")
    with announced(prop, implementation, options, cases[number]):
        broken = broken_clause(prop, implementation, cases[number])
        if broken and plugin.round is not None:
            # an entry that fuzzing writes is about one mistake, whatever else the port does
            goal, *others = [case for case, _ in plugin.kept]
            until = time.monotonic() + LIKENESS_TIME
            about = prop, implementation, cases[number]
            is_another = any(leads_to(*about, other, until) for other in others)
            if is_another or not is_like(*about, goal, until):
                broken = None
    request.node.user_properties.append(("nsa_ref_sampled", {"number": number, "broken": broken}))
