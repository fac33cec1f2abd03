"""What `nsa-ref verify` hands to pytest to see which findings have one cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_ref.testing import plugin
from nsa_ref.testing.causes import Question


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    listed = json.loads(Path(metafunc.config.getoption("--nsa-questions")).read_text())
    metafunc.parametrize("number", range(len(listed)))


def test_question(request: pytest.FixtureRequest, number: int) -> None:
    listed = json.loads(Path(request.config.getoption("--nsa-questions")).read_text())
    question = Question.from_json(listed[number])
    (implementation,) = [i for i in plugin.implementations if i.name == question.implementation]
    options = request.config.nsa_ref_options  # type: ignore[attr-defined]
    if not options.seconds_left:
        pytest.skip("the time is up")
    broken = question.answered(implementation, options)
    request.node.user_properties.append(("nsa_ref_answer", [number, broken]))
