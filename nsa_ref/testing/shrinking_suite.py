"""What `nsa-ref fuzz` hands to pytest: broken cases, to be judged again and made smaller."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest

from nsa_ref.testing import plugin
from nsa_ref.testing.case import Case
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.last_words import announced
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import SHRINKING_TIME, run_property
from nsa_ref.testing.steps import made_smaller


def _test(number: int, case: Case, finding: Finding) -> Callable[[pytest.FixtureRequest], None]:
    prop = PROPERTIES[finding["property"]]

    def smallest(implementation: Implementation, request: pytest.FixtureRequest) -> None:
        options = request.config.nsa_ref_options  # type: ignore[attr-defined]
        if not options.seconds_left:
            pytest.skip("the time is up")
        with announced(prop, implementation, options, case):
            until = time.monotonic() + min(SHRINKING_TIME, options.seconds_left)
            smaller = made_smaller(prop, implementation, case, until)
        # two findings may have one name
        folder = options.findings / "smaller" / str(number)
        options = dataclasses.replace(options, case=smaller, findings=folder)
        record = run_property(prop, implementation, options)
        request.node.user_properties.append(("nsa_ref", record.to_json()))

    def test(request: pytest.FixtureRequest) -> None:
        for implementation in plugin.implementations:
            if implementation.name == finding["implementation"]:
                smallest(implementation, request)

    return test


for _number, (_case, _finding) in enumerate(plugin.kept):
    # as those of `replaying_suite`: all that is left of a worker that dies is the name of its test
    globals()[f"test_{_finding['property']}_{_number}_smaller"] = _test(_number, _case, _finding)
