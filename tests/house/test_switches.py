"""A switch stands in many places: the one that was forgotten shows here.

docs/semantics.md lists every switch, its values and the clauses that it is about.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nsa_ref.semantics import PAPER, PerBranch, Semantics
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from pages import table

LISTED: dict[str, tuple[list[Any], list[str]]] = {}
for switch, values, _, clauses in table("docs/semantics.md", "switch")[1:]:
    words = [word.replace("inf", "1e999") for word in values.split(", ") if " " not in word]
    LISTED[switch] = [ast.literal_eval(word) for word in words], clauses.split(", ")
OTHERS = [(switch, value) for switch, (values, _) in LISTED.items() for value in values[1:]]


def switched(switch: str, value: Any) -> Semantics:
    if isinstance(getattr(PAPER, switch), PerBranch):
        value = PerBranch(value, value, value)
    return dataclasses.replace(PAPER, **{switch: value})


class Declares(OracleImplementation):
    """The oracle, which declares one convention and may follow another."""

    name = "declares"

    def __init__(self, declared: Semantics, followed: Semantics) -> None:
        self.semantics, self.followed = (declared,), followed

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        return super().run(method, dataclasses.replace(case, semantics=self.followed), *arguments)


@pytest.mark.parametrize("switch", LISTED)
def test_a_switch_takes_what_is_listed_and_nothing_else(switch: str) -> None:
    """The first value is the default; what is of no kind that it takes is refused by name."""
    default, *others = (switched(switch, value) for value in LISTED[switch][0])
    assert default == PAPER and PAPER not in others
    with pytest.raises((TypeError, ValueError), match=switch):
        dataclasses.replace(PAPER, **{switch: object()})


@pytest.mark.parametrize(("switch", "value"), OTHERS)
def test_a_convention_that_is_declared_and_not_followed_is_found(
    switch: str, value: Any, tmp_path: Path
) -> None:
    """By a clause that the switch is about; of masks a hint names it. Who follows it is right.

    Of the right one some ten cases are asked: presets and the oracle are judged elsewhere.
    """
    declared, options = switched(switch, value), Options(findings=tmp_path, shrink=False)
    for prop in PROPERTIES.values():
        if prop.clause not in LISTED[switch][1]:
            continue
        if found := run_property(prop, Declares(declared, PAPER), options).finding:
            assert "mask" not in prop.name or found["convention"]["name"] == switch, found["text"]
            few = dataclasses.replace(prop, examples=min(10, prop.examples))
            right = run_property(few, Declares(declared, declared), options).finding
            assert right is None, right["text"]
            return
    pytest.fail(f"{switch}={value!r} may be declared, and PAPER's followed: nothing sees it")


@pytest.mark.parametrize(("switch", "value"), OTHERS)
def test_the_fast_path_is_judged_by_it_or_refuses_it(switch: str, value: Any) -> None:
    torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")
    import nsa_fast
    from nsa_fast.adapter import implementations

    declared = {getattr(s, switch) for port in implementations("cpu") for s in port.semantics}
    if not any(value in (one if isinstance(one, PerBranch) else (one,)) for one in declared):
        q = torch.zeros(1, 1, 1, 1)
        with pytest.raises(ValueError, match=switch):
            nsa_fast.sliding_attention(
                q, q, q, sliding_window_size=1, semantics=switched(switch, value)
            )
