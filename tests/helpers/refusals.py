"""Calls that must raise: what the error says, and what is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

#: What is said -> what is called; in every call one thing is wrong.
Refusals = Mapping[str, Callable[[], object]]

#: What is said of sizes and of semantics of another type.
NO_SIZES = "must be a nsa_ref.Sizes, such as nsa_ref.Sizes(q_heads=4)"
NO_SEMANTICS = "must be a Semantics, such as nsa_ref.PAPER"


def refusal_test(
    value_errors: Refusals, type_errors: Refusals, *, whole: bool = False
) -> Callable[..., None]:
    """A test of each of these calls; they raise ValueError and TypeError.

    `whole`: what is said is the whole sentence but its full stop, and not only a part of it.
    """
    calls = [(ValueError, *call) for call in value_errors.items()]
    calls += [(TypeError, *call) for call in type_errors.items()]

    @pytest.mark.parametrize(("error", "message", "wrong"), calls)
    def test(error: type[Exception], message: str, wrong: Callable[[], object]) -> None:
        with pytest.raises(error, match=re.escape(message)) as raised:
            wrong()
        if whole:
            assert str(raised.value) == f"{message}."

    return test
