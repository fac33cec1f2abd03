"""Which clause is blamed: wrong values are no wrong mask, and a wrong mask is no wrong value."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import trials
from nsa_ref.semantics import PAPER, PerBranch
from nsa_ref.testing import Attention, Case, Implementation, OracleImplementation
from nsa_ref.testing.mutants.arithmetic import (
    InterleavedHeads,
    LastKeyNotRead,
    NoScale,
    QueryMissingInDk,
    SlightlyTooLarge,
)
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.masks import switched
from nsa_ref.testing.mutants.selection import Selector
from standin_gpu import Mistaken, OnStandin

finding = functools.partial(trials.finding, shrink=False)
FULL = (
    "W3_window_of_everything_is_full_causal_attention",
    "F1_all_blocks_selected_is_full_causal_attention",
)
PREFIXES = [f"{branch}_rows_do_not_know_what_follows" for branch in ("compress", "fine", "sliding")]


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("base", [NoScale, InterleavedHeads, SlightlyTooLarge])
def test_wrong_values_are_not_blamed_on_a_window_or_a_block(
    base: type[Implementation], name: str, tmp_path: Path
) -> None:
    """By the law of what everything visible is: it compares values, and the mask is right."""
    assert finding(name, base(), tmp_path)["clause"] == "A1"


class ScaleOfTheLength(Kernel):
    def scale(self, case: Case) -> float:
        return super().scale(case) * (1 + case.kv_len / 10)


@pytest.mark.parametrize("name", PREFIXES)
def test_wrong_values_are_not_blamed_on_what_follows(name: str, tmp_path: Path) -> None:
    assert finding(name, ScaleOfTheLength(), tmp_path)["clause"] == "A1"


class SecondKeyOfShortSequences(Kernel):
    """Hides the second key of those of less than 8 tokens."""

    def read(self, mask: np.ndarray) -> np.ndarray:
        second = np.arange(mask.shape[3]) == 1
        return np.where(second, 0, mask) if mask.shape[3] < 8 else mask


@pytest.mark.parametrize(
    ("name", "clause"), [(FULL[0], "W3"), (FULL[1], "F1"), (PREFIXES[2], "W1")]
)
def test_a_wrong_mask_is_blamed_by_the_laws_about_it(
    name: str, clause: str, tmp_path: Path
) -> None:
    """Also where a prefix has it and the whole has not."""
    base = SecondKeyOfShortSequences if name in PREFIXES else LastKeyNotRead
    found = finding(name, base(), tmp_path)
    assert (found["clause"], found["kind"]) == (clause, "wrong mask")


class NotANumber(Kernel):
    """A value that no mask makes: every row is, or those of one kind of number."""

    value = np.nan

    def over_values(self, *how: Any) -> np.ndarray:
        return super().over_values(*how) * self.value


class Infinite(NotANumber):
    value = np.inf


@pytest.mark.parametrize(
    "name",
    [
        "W1_sliding_mask_as_read",
        "W2_sliding_mask_as_read",
        "C2_compress_mask_as_read",
        "F1_fine_mask_as_read",
        "F3_fine_mask_as_read",
    ],
)
@pytest.mark.parametrize("base", [NotANumber, Infinite])
def test_what_is_no_number_is_no_wrong_mask(
    base: type[Implementation], name: str, tmp_path: Path
) -> None:
    """It is none where every key is visible, either."""
    found = finding(name, base(), tmp_path)
    assert found["clause"] == "A1" and found["tensor"].endswith(" out"), found["text"]


class NoKeyAtAll(OracleImplementation):
    """0 / 0, in every row of a window of 0."""

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        out, lse = super().sliding(case, q, k, v)
        return Attention(out * (np.nan if case.sliding_window_size == 0 else 1), lse)


def test_rows_that_no_key_is_left_to_are_a_wrong_mask(tmp_path: Path) -> None:
    case = Case(q_len=3, kv_len=3, head_dim=16, value_dim=16)
    assert finding("W1_sliding_mask_as_read", NoKeyAtAll(), tmp_path, case=case)["clause"] == "W1"


# --- rows before every token ----------------------------------------------------------------------


class SeesAll(Kernel):
    """Rows with p < 0 attend to every key, where nothing is causal."""

    def read(self, mask: np.ndarray) -> np.ndarray:
        return np.where(mask.any(-1, keepdims=True), mask, 1.0)


@pytest.mark.parametrize("branch", ["sliding", "fine"])
@pytest.mark.parametrize("empty_row", ["zero", "uniform"])
def test_a_row_that_reads_every_key_is_not_empty(
    branch: str, empty_row: str, tmp_path: Path
) -> None:
    """With logits of 0 it looks like a mean over all columns, and with others it does not."""
    rows = PerBranch(empty_row, empty_row, empty_row)
    port, name = SeesAll(), {"sliding": "W2_sliding", "fine": "F4_fine"}[branch]
    port.semantics = (dataclasses.replace(PAPER, causal=False, empty_row=rows),)
    found = finding(f"{name}_mask_as_read", port, tmp_path)
    assert (found["clause"], found["kind"]) == (name[:2], "wrong mask"), found["text"]


# --- the choice of blocks -------------------------------------------------------------------------


class WorstBlocks(Selector):
    """Takes the blocks of the lowest score, by the negative of every logit."""

    def scores(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        return super().scores(case, -q, k_cmp, mem_k)


@pytest.mark.parametrize("seed", [6, 14, 15])
def test_a_choice_among_ties_is_not_called_right(seed: int, tmp_path: Path) -> None:
    """A single head's query is 0 here: what it chooses does not blame the sum over heads."""
    sizes = {"q_heads": 2, "q_len": 1, "kv_len": 8, "head_dim": 1, "num_selected_blocks": 2}
    case = Case(inputs="integers", seed=seed, **sizes)
    assert not dataclasses.replace(case, q_heads=1).compressed()[0].any()
    found = finding("I3_selection", WorstBlocks(), tmp_path, case=case)
    assert found["clause"] == "I2", found["text"]


# --- long sequences -------------------------------------------------------------------------------


def beyond_300(change: Any, *names: str) -> Implementation:
    return Mistaken(lambda case, x: change(x) if case.kv_len > 300 else x, *names)


@pytest.mark.parametrize(
    "exchanged", [lambda x: x[:, ::-1], lambda x: x[::-1]], ids=["heads", "entries"]
)
def test_another_heads_values_are_no_wrong_mask(exchanged: Any, tmp_path: Path) -> None:
    port = beyond_300(exchanged, "k", "v")
    assert finding("A1_sliding_output_of_long_sequences", port, tmp_path)["clause"] == "A1"
    for name in ("W1_sliding_mask_of_long_sequences", "F1_fine_mask_of_long_sequences"):
        trials.passes(name, port, tmp_path, shrink=False)


@pytest.mark.parametrize(
    ("change", "of"),
    [(lambda x: 1.03 * x, "out"), (lambda x: x + np.nan, "out"), (lambda x: x + 3, "lse")],
    ids=["factor", "NaN", "lse"],
)
def test_what_is_no_sum_of_keys_is_no_wrong_mask(change: Any, of: str, tmp_path: Path) -> None:
    found = finding("W1_sliding_mask_of_long_sequences", beyond_300(change, of), tmp_path)
    assert found["clause"] == "A1" and of in found["text"]


class ShortWindow(OnStandin):
    def sliding_mask(self, case: Case) -> Any:
        shorter = case.kv_len > 300
        return super().sliding_mask(switched(case, window_closed=False) if shorter else case)


@pytest.mark.parametrize("name", ["A1_sliding_output", "A3_sliding_gradients", "W1_sliding_mask"])
def test_a_wrong_mask_of_long_sequences_is_blamed_whatever_shows_it(
    name: str, tmp_path: Path
) -> None:
    """Wrong sums of another number of keys, and wrong values, are the mask's fault."""
    found = finding(f"{name}_of_long_sequences", ShortWindow(), tmp_path)
    assert found["clause"] == "W1" and "add up to that" in found["text"]


# --- though the forward is right ------------------------------------------------------------------


def test_the_forward_is_called_right_where_it_was_read(tmp_path: Path) -> None:
    found = finding("A3_sliding_mask_as_read_backward", QueryMissingInDk(), tmp_path)
    assert "though the forward is right" in found["text"]

    class RaisesOnZeros(QueryMissingInDk):
        """In the forward pass."""

        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Any:
            if not np.any(q):
                raise ZeroDivisionError
            return super().sliding(case, q, k, v)

    found = finding("A3_sliding_mask_as_read_backward", RaisesOnZeros(), tmp_path)
    assert found["clause"] == "A3" and "the forward" not in found["text"]


class NanEverywhere(OracleImplementation):
    """NaN wherever there is to be a number."""

    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32"}

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        found = super().run(method, case, *arguments)
        nan = [np.full_like(x, np.nan) for x in found]
        return Attention(*nan) if isinstance(found, Attention) else tuple(nan)


@pytest.mark.parametrize(
    "name", ["A5_sliding_canary", "sliding_rows_do_not_know_what_follows", "A5_fine_canary"]
)
def test_nan_that_stays_nan_is_no_evidence(name: str, tmp_path: Path) -> None:
    result = trials.record(name, NanEverywhere(), tmp_path)
    if result.finding is None:
        assert not result.cases and result.inconclusive
    else:
        assert result.finding["clause"] == "A1"


def test_a_gradient_of_nan_reads_no_pair_of_row_and_column(tmp_path: Path) -> None:
    name = "A3_sliding_mask_of_long_sequences_backward"
    text = trials.finding(name, NanEverywhere(), tmp_path)["text"]
    assert " is nan" in text and "pair" not in text
