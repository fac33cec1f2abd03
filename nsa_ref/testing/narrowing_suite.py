"""What `nsa-ref ledger add` hands to pytest: a finding's property on cases like its own."""

from __future__ import annotations

import functools

import pytest

from nsa_ref.testing import plugin
from nsa_ref.testing.last_words import announced
from nsa_ref.testing.narrowing import SAMPLED, broken_clause, drawn
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property


@pytest.fixture
def prop() -> Property:
    ((_, finding),) = plugin.kept
    return PROPERTIES[finding["property"]]


@pytest.fixture
def options(request: pytest.FixtureRequest) -> Options:
    return request.config.nsa_ref_options  # type: ignore[attr-defined]


_drawn = functools.cache(drawn)


def test_cases(request: pytest.FixtureRequest, prop: Property, options: Options) -> None:
    """Says which cases there are, for what a case that takes its process down cannot say."""
    cases = _drawn(prop, plugin.implementations[0], options)
    said = {"cases": [case.to_json() for case in cases]}
    request.node.user_properties.append(("nsa_ref_sampled", said))


@pytest.mark.parametrize("number", range(SAMPLED))
def test_case(
    request: pytest.FixtureRequest, prop: Property, options: Options, number: int
) -> None:
    implementation = plugin.implementations[0]
    cases = _drawn(prop, implementation, options)
    if number >= len(cases):
        pytest.skip(f"there are {len(cases)} cases")
    with announced(prop, implementation, options, cases[number]):
        broken = broken_clause(prop, implementation, cases[number])
    request.node.user_properties.append(("nsa_ref_sampled", {"number": number, "broken": broken}))
