"""Calls that must raise: what the error says, and what is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

#: What is said -> what is called; in every call one thing is wrong.
Refusals = Mapping[str, Callable[[], object]]


def refusal_test(value_errors: Refusals, type_errors: Refusals) -> Callable[..., None]:
    """A test of each of these calls; they raise ValueError and TypeError."""
    calls = [(ValueError, *call) for call in value_errors.items()]
    calls += [(TypeError, *call) for call in type_errors.items()]

    @pytest.mark.parametrize(("error", "message", "wrong"), calls)
    def test(error: type[Exception], message: str, wrong: Callable[[], object]) -> None:
        with pytest.raises(error, match=re.escape(message)):
            wrong()

    return test
