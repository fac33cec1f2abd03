"""The selection's Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

import nsa_ref.selection
from nsa_ref.semantics import LUCIDRAINS, PAPER
from nsa_ref.testing import Case
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.verdicts import Broken

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from broken_nsa_fast import in_place  # noqa: E402
from interpreted import runs  # noqa: E402
from nsa_fast import selection  # noqa: E402
from nsa_fast.adapter import NsaFastCompiled, NsaFastInterpreted  # noqa: E402
from nsa_fast.selection import Sizes, why_not_in_triton  # noqa: E402
from nsa_fast.windows import Windows  # noqa: E402

CASE = Case(
    dtype="float32",
    q_heads=4,
    kv_heads=2,
    q_len=40,
    kv_len=40,
    head_dim=24,
    value_dim=1,
    compress_block_size=4,
    compress_block_sliding_stride=2,
    selection_block_size=4,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=2,
)
FREE = {"num_initial_blocks": 0, "num_local_blocks": 0}


# --- the mistakes that a kernel may make ----------------------------------------------------------

#: mistake -> the clause that it breaks, the function of `selection_kernels`, what stands in for it
MISTAKES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "a tie goes to the higher index": ("I5", "_behind", lambda right, block: block),
    "the own block is not forced": (
        "I4",
        "_is_forced",
        lambda right, block, own, *rest: right(block, own, *rest) & (block != own),
    ),
    "an overlap is off by one window": (
        "I2",
        "_strides_shared",
        lambda right, apart, *rest: right(apart + 1, *rest),
    ),
    "a chunk's last row is lost": (
        "I6",
        "_is_token",
        lambda right, token, tokens: right(token, tokens - 1),
    ),
    "the group's last head is lost": ("I3", "_is_head", lambda right, head, group: head < 1),
    "the last window is missing in the lse": (
        "I3",
        "_columns",
        lambda right, memory, seen: right(memory, seen) - 1,
    ),
    "the number of blocks is one short": (
        "I6",
        "_candidates",
        lambda right, *given: right(*given) - 1,
    ),
}


class _Kernels(NsaFastCompiled):
    """In the process: nothing but the kernels chooses, and memory comes filled.

    steps : several chunks of tokens, and several steps over the blocks
    mistake : one of MISTAKES
    """

    def __init__(self, device: str, *, steps: bool = False, mistake: str = "") -> None:
        super().__init__(device)
        torch.use_deterministic_algorithms(True)  # what is not written is NaN, or 2^63 - 1
        self.steps, self.mistake = steps, mistake

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        from nsa_fast import selection_kernels as kernels

        mistakes: tuple[Any, ...] = ((selection, "chunks", _not_by_torch),)
        if self.mistake:
            mistakes += ((kernels, *MISTAKES[self.mistake][1:]),)
        chunk, scored = (1, 16) if self.steps else (kernels.CHUNK_ELEMENTS, kernels.SCORED)
        tiles = mock.patch.multiple(kernels, CHUNK_ELEMENTS=chunk, SCORED=scored)
        with in_place(mistakes), tiles:
            return super().run(method, case, *arguments)


def _not_by_torch(right: Any, *arguments: Any) -> Any:
    raise AssertionError("torch makes this choice")


INTERPRETED = NsaFastInterpreted(_Kernels)  # one process for all
INTERPRETED.numerics = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the process make its kernels in another way."""

    def changed(**how: Any) -> None:
        monkeypatch.setattr(INTERPRETED, "kernels", functools.partial(_Kernels, **how))

    return changed


# --- what is right --------------------------------------------------------------------------------

#: With steps, two chunks of tokens and two steps over the blocks.
STEPS = dataclasses.replace(CASE, q_heads=2, kv_heads=1, q_len=20)

#: what is special -> how the case differs
CASES: dict[str, dict[str, Any]] = {
    "one number a key, one head, blocks of a token": {
        "head_dim": 1,
        "q_heads": 1,
        "kv_heads": 1,
        "compress_block_size": 1,
        "compress_block_sliding_stride": 1,
        "selection_block_size": 1,
    },
    "a group that is no power of two": {"q_heads": 3, "kv_heads": 1, "head_dim": 40},
    "bfloat16": {"dtype": "bfloat16", "q_heads": 16, "head_dim": 192},
    "float16": {"dtype": "float16", "layout": "strided"},
    "memory, batch": {"num_mem_kv": 3, "batch": 2},
    "non-causal": {"semantics": dataclasses.replace(PAPER, causal=False), "q_len": 50},
    "at the end, strict": {
        "semantics": dataclasses.replace(PAPER, compress_alignment="end", compress_strict=True),
        "compress_block_size": 6,
    },
    "windows longer than blocks": {"compress_block_size": 12},
    "windows longer than blocks, at the end": {
        "compress_block_size": 12,
        "semantics": dataclasses.replace(PAPER, compress_alignment="end"),
    },
    "blocks of three strides": {"selection_block_size": 6},
    "one choice a head": {"semantics": dataclasses.replace(PAPER, share_selection=False)},
    "forced at 1, a floor": {
        "semantics": dataclasses.replace(PAPER, forced_score=1.0, score_floor=0.05)
    },
    "own block extra": {"semantics": dataclasses.replace(PAPER, own_block_extra=True)},
    "decoding": {"q_len": 1},
    "queries before every key": {"q_len": 45},
    "no window": {"kv_len": 3, "q_len": 3},
    "more slots than blocks": {"num_selected_blocks": 20},
    "a short last block, nothing forced": {"kv_len": 43, "q_len": 20, **FREE},
}


@runs
@pytest.mark.parametrize("special", CASES)
def test_the_kernels_choose_right(special: str) -> None:
    PROPERTIES["I4_selection"].run(INTERPRETED, dataclasses.replace(CASE, **CASES[special]))


@runs
@pytest.mark.parametrize("causal", [True, False])
def test_several_chunks_and_steps_choose_the_same(
    causal: bool, kernels: Callable[..., None]
) -> None:
    case = dataclasses.replace(STEPS, semantics=dataclasses.replace(PAPER, causal=causal))
    kernels(steps=True)
    PROPERTIES["I4_selection"].run(INTERPRETED, case)
    assert_the_oracles(case)


def assert_the_oracles(case: Case, *, factor: float = 1.0) -> None:
    """Block by block and in its order, with q multiplied by the factor."""
    q, k_cmp, _, mem_k, _ = case.compressed()
    given = factor * q, k_cmp, mem_k
    expected = nsa_ref.selection.select(*given, kv_len=case.kv_len, **case.geometry)
    np.testing.assert_array_equal(INTERPRETED.run("select", case, *given), expected)


@runs
@pytest.mark.parametrize("steps", [False, True])
def test_equal_scores_go_to_the_lower_index(steps: bool, kernels: Callable[..., None]) -> None:
    """All windows weigh alike: in a tile of blocks, and where one tile's best meet another's."""
    kernels(steps=steps)
    case = dataclasses.replace(STEPS, num_mem_kv=1, num_selected_blocks=4, **FREE)
    assert_the_oracles(case, factor=0.0)


# --- what is wrong --------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_dies_of_its_clause(mistake: str, kernels: Callable[..., None]) -> None:
    clause = MISTAKES[mistake][0]
    kernels(mistake=mistake)
    if clause == "I5":  # the judge takes either of two equal ones
        with pytest.raises(AssertionError, match="Mismatched elements"):
            assert_the_oracles(dataclasses.replace(CASE, **FREE), factor=0.0)
        return
    sizes: dict[str, Any] = {} if clause == "I4" else {**FREE, "q_heads": 2}
    if clause == "I3":
        sizes["q_heads"] = 4
    if clause == "I6":
        sizes["num_selected_blocks"] = 12
    with pytest.raises(Broken) as found:
        PROPERTIES[f"{clause}_selection"].run(INTERPRETED, dataclasses.replace(CASE, **sizes))
    assert found.value.clause == clause


# --- which choices the kernels make ---------------------------------------------------------------

SIZES = Sizes(
    kv_len=256,
    windows=Windows(32, 16, PAPER),
    num_windows=15,
    block_size=64,
    num_blocks=4,
    num_selected=4,
    num_initial=1,
    num_local=2,
)
Q = torch.zeros(1, 8, 1, 192)


def test_what_the_kernels_do_not_serve_is_said() -> None:
    assert why_not_in_triton(Q, 2, SIZES) in ("", "triton is not installed")
    if importlib.util.find_spec("triton") is None:
        return
    of_means = SIZES._replace(windows=Windows(32, 16, LUCIDRAINS))
    many = SIZES._replace(num_selected=129, num_blocks=129)
    long = SIZES._replace(block_size=16 * 257)
    for given, reason in (
        ((Q, 2, of_means), "importance='logit_mean' has another score than eq. 9's"),
        ((Q.double(), 2, SIZES), "torch.float64 has no tensor cores, and the kernels add up in"),
        ((Q.new_zeros(1, 8, 1, 257), 2, SIZES), "head_dim: 257 is more than the 256 that fit"),
        ((Q, 33, SIZES), "query heads that share a choice: 33 is more than the 32 that fit"),
        ((Q.bfloat16(), 129, SIZES), "query heads that share a choice: 129 is more than the 128"),
        ((Q, 2, many), "blocks chosen: 129 is more than the 128 that fit on an SM"),
        ((Q, 2, long), "blocks chosen times strides of a block: 1028 is more than the 1024"),
    ):
        assert why_not_in_triton(*given).startswith(reason)
