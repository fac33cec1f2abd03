"""What sm_90 makes of the kernels: read from machine code, without a GPU."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")
pytest.importorskip("triton", reason="machine code is made by triton's compiler")

from benchmarks import sm90  # noqa: E402
from benchmarks.flex_sources import CAPTURED, KERNELS, Call, written  # noqa: E402
from interpreted import runs  # noqa: E402
from nsa_fast import fine_lists, flex  # noqa: E402
from pages import ROOT  # noqa: E402

LAUNCHES = sm90.launches()
FLEX = [f"{branch}_{kernel}" for branch in sm90.CALLS for kernel in KERNELS]
#: Kernels that multiply no matrices.
WITHOUT_PRODUCTS = {
    *("top_blocks", "fine_sum_parts", "count_tokens", "place_tokens"),
    *("gated_sum", "gated_sum_backward", "turned_pairs", "turned_pairs_back"),
    *(name for name in FLEX if name.endswith(("_lse", "_delta"))),
}

KEPT: dict[str, Any] = json.loads(sm90.KEPT.read_text())
BEFORE: dict[str, Any] = KEPT["kernels"]


def test_every_kernel_is_read() -> None:
    sources = [(ROOT / "nsa_fast" / f"{module}.py").read_text() for module in sm90.MODULES]
    started = {name for source in sources for name in re.findall(r"(\w+)\[.+\]\(\n", source)}
    assert started == {name.removesuffix("_back") for name in LAUNCHES}
    assert {*LAUNCHES, *FLEX} == set(BEFORE)


@pytest.mark.triton
@pytest.mark.parametrize("name", LAUNCHES)
def test_sm90_keeps_everything_in_registers_and_multiplies_on_tensor_cores(name: str) -> None:
    """At the paper's shape; and no kernel became larger than the figures that are kept, by 5 %."""
    found = sm90.compiled_for_sm90(LAUNCHES[name])
    assert found["stack"] == found["spills"] == 0
    assert found["products"] == ("none" if name in WITHOUT_PRODUCTS else "wgmma")
    assert not sm90.grown(found, BEFORE[name])


@functools.cache
def flex_launches() -> dict[str, sm90.Launch]:
    return sm90.flex_launches()


@runs
@pytest.mark.parametrize("name", FLEX)
def test_no_kernel_of_flexattention_has_grown(name: str) -> None:
    """As nsa_fast configures it, at the paper's shape; nor what Inductor writes beside it."""
    found = sm90.compiled_for_sm90(flex_launches()[name])
    assert found["products"] == ("none" if name in WITHOUT_PRODUCTS else "wgmma")
    assert found["programs"] >= 1
    assert not sm90.grown(found, BEFORE[name])


@runs
def test_no_rule_and_no_length_is_compiled_into_flexattention(tmp_path: Path) -> None:
    """What is compiled with PAPER's rules is what runs with all others."""
    shape = (192, 128, 4, 1, 16)
    calls = [Call(branch, "bfloat16", *shape) for branch in ("sliding", "compress", "fine")]
    found = written([call._replace(way=way) for call in calls for way in ("", *CAPTURED)], tmp_path)
    for call, kernels in found.items():
        of_paper = found[call._replace(way="")]
        for name, kernel in kernels.items():
            # the first is the function itself
            assert kernel[1:] == of_paper[name][1:], (call, name)


@pytest.mark.parametrize("what", ["registers", "stack", "spills", "shared", "loops", "products"])
def test_a_kernel_that_grew_is_refused(what: str) -> None:
    before = BEFORE["compress_backward"]
    assert not sm90.grown(before, before)
    found = copy.deepcopy(before)
    if what == "loops":
        found["loops"][0] += found["loops"][0] // 15
    elif what == "products":
        found["products"] = "mma.sync"
    else:
        found[what] = int(found[what] * 1.06) + 1
    (said,) = sm90.grown(found, before)
    assert said.startswith(f"{what}: ")
    if what in ("registers", "stack", "spills", "loops"):
        smaller = copy.deepcopy(before)
        smaller[what] = before[what][:-1] if what == "loops" else before[what] - 1
        assert not sm90.grown(smaller, before)


def test_where_a_loop_was_split_their_sum_counts() -> None:
    before = {**BEFORE["row_lse"], "loops": [1000]}
    assert not sm90.grown({**before, "loops": [600, 440]}, before)
    assert sm90.grown({**before, "loops": [600, 460]}, before)


def test_programs_of_unequal_lengths_leave_a_tail() -> None:
    """One long program among many short ones, started last, keeps the rest waiting."""
    loop = [sm90.Instruction(address, "IADD3", None, 0) for address in range(100)]
    launch = sm90.Launch(None, {}, {})

    def clocks(*full: int) -> int:
        walk = sm90.Walk([0] * len(full), list(full), 0)
        work = sm90.Work(walks=(walk,), heads=1)
        return round(sm90._of_walks(launch._replace(work=work), [loop, loop], 1)[1] * sm90.CLOCK)

    iteration = clocks(1)
    assert clocks(*[100] * sm90.SMS) == 100 * iteration
    assert clocks(*[100] * sm90.SMS, 100) == 200 * iteration
    assert clocks(*[50] * 2 * sm90.SMS, 1000) == 1100 * iteration
    assert clocks(1000, *[50] * 2 * sm90.SMS) == 1000 * iteration


@pytest.mark.triton
@pytest.mark.parametrize("name", LAUNCHES)
def test_in_float16_no_kernel_has_grown(name: str) -> None:
    found = sm90.compiled_for_sm90(sm90.launches(torch.float16)[name])
    assert sm90.grown(found, KEPT["kernels in float16"][name]) == []
    assert found["products"] == BEFORE[name]["products"]


@pytest.mark.parametrize(
    "path", sorted(sm90.RESULTS.glob("sm90-supported-*.json")), ids=lambda path: path.name
)
def test_what_is_supported_fits_or_is_refused_in_words(path: Any) -> None:
    for row in json.loads(path.read_text())["shapes"]:
        shape = sm90.Shape(**{name: row[name] for name in sm90.Shape._fields})
        dtype = getattr(torch, shape.dtype)
        refused = flex.why_no_tiles(dtype, shape.head_dim, shape.value_dim)
        assert row.get("refused", "") == refused
        if refused:
            continue
        for name, facts in row["kernels"].items():
            assert facts["shared"] <= sm90.MOST_SHARED, name
            # what does not fit into registers at all takes 6 KB and more
            assert facts["stack"] < 4096 and facts["registers"] > 0, name
        ours = not fine_lists.why_not(
            dtype,
            pairs=1,
            group=shape.group,
            block_size=shape.block_size,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
        )
        assert row["fine"] == ("fine_kernels" if ours else "FlexAttention")
        assert row["selection"] == (sm90.why_no_selection(shape) or "selection_kernels")
        assert {"compress_forward", "sliding_backward", "gated_sum"} <= row["kernels"].keys()


@runs
@pytest.mark.parametrize(
    "shape",
    [
        sm90.Shape("float32", 192, 128),
        sm90.Shape("float16", 192, 128),
        sm90.Shape("bfloat16", 192, 128, group=4),
        sm90.Shape("bfloat16", 192, 128, group=128),
    ],
    ids=str,
)
def test_what_is_compiled_for_a_shape_is_what_is_kept(shape: sm90.Shape) -> None:
    """Numbers that are the widest, other ones of 16 bits, FlexAttention's fine, and many heads."""
    rows = json.loads(sm90.SUPPORTED.read_text())["shapes"]
    (kept,) = (row for row in rows if shape == tuple(row[f] for f in shape._fields))
    (found,) = sm90.supported([shape])
    assert found["fine"] == kept["fine"] and found["kernels"].keys() == kept["kernels"].keys()
    for name, facts in found["kernels"].items():
        assert not sm90.grown(facts, kept["kernels"][name]), name


def test_the_sums_are_below_what_was_asked_for() -> None:
    """By the upper estimates, and with the projections; of tiles whose tokens choose alike."""
    for rows, target in zip(sm90.sums(BEFORE).values(), sm90.TARGETS):
        expected = {row.part: row.expected for row in rows}
        assert 0 < expected["sum"] + expected[sm90.PROJECTIONS] <= target


def test_the_floors_of_dense_attention_are_arithmetic() -> None:
    """2 (d + v) operations forward and 2 (3 d + 2 v) backward for a row and a key that it sees."""
    pairs, of_a_clock = 64 * 2**16 * (2**16 + 1) // 2, 132 * 4096
    for floor, wide in zip(sm90.dense_floors(), (192 + 128, 3 * 192 + 2 * 128)):
        assert round(floor * 1.83e6) == round(2 * wide * pairs / of_a_clock)  # clocks


def test_of_tiles_whose_tokens_choose_apart_fine_alone_takes_longer() -> None:
    few, many = sm90.sums(BEFORE, 24), sm90.sums(BEFORE, 48)
    for direction in ("forward", "backward"):
        for one, other in zip(few[direction], many[direction]):
            longer = one.part in ("fine", "sum")
            assert (other.expected > one.expected) == longer
            assert (other.expected == one.expected) != longer
            assert (other.floor, other.around) == (one.floor, one.around)
