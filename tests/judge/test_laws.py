"""A law asks a port against itself: it finds what both definitions have wrong in the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trials
from nsa_ref.attention import Attention
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.branches import Branch
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, values
from nsa_ref.testing.running import run_property

Definition = Callable[..., Any]


def last_key_seen_by_all(mask: Definition) -> Definition:
    def wrong(self: OracleImplementation, case: Case, *given: Any) -> np.ndarray:
        found: np.ndarray = mask(self, case, *given)
        found[..., -1:] = 1
        return found

    return wrong


def first_key_never_seen(mask: Definition) -> Definition:
    def wrong(self: OracleImplementation, case: Case, *given: Any) -> np.ndarray:
        found: np.ndarray = mask(self, case, *given)
        found[..., :1] = 0
        return found

    return wrong


def keys_of_the_first_head(attend: Definition) -> Definition:
    def wrong(self: Any, case: Case, name: str, mask: Any, q: Any, k: Any, v: Any) -> Attention:
        found: Attention = attend(self, case, name, mask, q, np.broadcast_to(k[:, :1], k.shape), v)
        return found

    return wrong


def cubed(attend: Definition) -> Definition:
    def wrong(self: Any, *given: Any) -> Attention:
        out, lse = attend(self, *given)
        return Attention(out**3, lse)

    return wrong


def by_rows(judged: Definition) -> Definition:
    """The values are those of `attend`, as if the other definition had the mistake as well."""

    def other(branch: Branch, port: Any, case: Case, inputs: Any, mask: Any, **how: Any) -> Any:
        values, bounds = judged(branch, port, case, inputs, mask, **how)
        return values._replace(**branch.attend(case, mask, inputs)._asdict()), bounds

    return other


@pytest.mark.parametrize(
    ("law", "beside", "method", "mistake"),
    [
        (
            "sliding_rows_do_not_know_what_follows",
            "W1_sliding_mask_as_read",
            "sliding_mask",
            last_key_seen_by_all,
        ),
        (
            "W3_window_of_everything_is_full_causal_attention",
            "W3_sliding_mask_as_read",
            "sliding_mask",
            first_key_never_seen,
        ),
        (
            "F1_all_blocks_selected_is_full_causal_attention",
            "F1_fine_mask_as_read",
            "fine_mask",
            first_key_never_seen,
        ),
        ("A1_sliding_permutation", "A1_sliding_output", "attend", keys_of_the_first_head),
        ("A1_sliding_heads", "A1_sliding_output", "attend", keys_of_the_first_head),
        ("A1_sliding_is_linear_in_v", "A1_sliding_output", "attend", cubed),
    ],
)
def test_a_law_finds_what_the_definition_has_wrong_as_well(
    law: str,
    beside: str,
    method: str,
    mistake: Callable[[Definition], Definition],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What holds a port to the definition finds nothing: both are the same."""
    monkeypatch.setattr(values, "judged", by_rows(values.judged))
    wrong = mistake(getattr(OracleImplementation, method))
    monkeypatch.setattr(OracleImplementation, method, wrong)
    port = OracleImplementation()
    port.semantics, port.numerics = port.semantics[:1], {"float64": "fp64"}
    port.pace, options = "slow", Options(findings=tmp_path, shrink=False)
    assert run_property(PROPERTIES[beside], port, options).finding is None
    port.pace = "fast"
    assert run_property(PROPERTIES[law], port, options).finding is not None


@pytest.mark.parametrize("mistake", [keys_of_the_first_head, cubed])
def test_one_definition_finds_what_the_other_has_wrong(
    mistake: Callable[[Definition], Definition], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values of the bounds' forward are not those of `attend`, once more."""
    monkeypatch.setattr(OracleImplementation, "attend", mistake(OracleImplementation.attend))
    port = OracleImplementation()
    port.semantics, port.numerics = port.semantics[:1], {"float64": "fp64"}
    trials.finding("A1_sliding_output", port, tmp_path, shrink=False)
