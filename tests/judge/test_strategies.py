"""The corners that the judge counts on are drawn, and nothing outside the limits ever is."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import Phase, find, given, seed, settings
from hypothesis import strategies as st

import trials
from nsa_ref.semantics import LUCIDRAINS, PAPER
from nsa_ref.testing import Case, OracleImplementation, conformance_suite
from nsa_ref.testing import limits as ranges
from nsa_ref.testing.branches import BRANCHES, Branch
from nsa_ref.testing.case import DTYPES, LAYOUTS
from nsa_ref.testing.conditions import Condition
from nsa_ref.testing.drawing import asked_of, draw
from nsa_ref.testing.lattice import EDGES, MASK, Edge, edges
from nsa_ref.testing.limits import brought_within
from nsa_ref.testing.loading import Declared
from nsa_ref.testing.narrowing import broken_clause
from nsa_ref.testing.options import Options
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.properties.common import oracle_mask
from nsa_ref.testing.strategies import ABOUT, GROUP_SIZES, HEAD_DIMS, Drawn, cases, fresh_seeds

quiet = level_settings("quick", 60)


def finding(phases: Collection[Phase]) -> settings:
    return settings(quiet, max_examples=2000, phases=phases)


def sample(strategy: st.SearchStrategy[Case], count: int, number: int = 1) -> list[Case]:
    """What a run with this seed would draw."""
    drawn: list[Case] = []

    @seed(number)
    @settings(quiet, max_examples=count, derandomize=False, phases=[Phase.generate])
    @given(strategy)
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


@functools.cache
def drawn_about(about: str) -> list[Case]:
    """What a run of 350 cases would draw for the definition; cases cannot be changed."""
    return sample(cases(OracleImplementation(), about), 350)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.name)
@pytest.mark.parametrize("edge", EDGES.values(), ids=lambda edge: edge.name)
def test_an_edge_that_can_be_met_is_met(edge: Edge, branch: Branch) -> None:
    """What is not excused for a branch is found among its cases."""

    def stands_on_it(case: Case) -> bool:
        mask = oracle_mask(branch, case) if MASK in edge.reads else np.zeros((0, 0))
        return edge.met_by(case, mask)

    case = next(filter(stands_on_it, drawn_about(branch.name)), None)
    if case is None and edge.can_be_met(branch.name):  # a rare one
        strategy = cases(OracleImplementation(), branch.name)
        case = find(strategy, stands_on_it, settings=finding([Phase.generate]))
    assert case is None or edge.name in edges(case, oracle_mask(branch, case))


@pytest.mark.parametrize(
    "edge", [e for e in EDGES.values() if MASK not in e.reads], ids=lambda edge: edge.name
)
def test_every_field_that_an_edge_reads_can_decide_it(edge: Edge) -> None:
    """It sees no other; one that decides nothing would excuse it wherever that is limited."""
    drawn = [case for about in ABOUT for case in drawn_about(about)]
    given = {tuple(getattr(case, field) for field in edge.reads) for case in drawn}
    for i, field in enumerate(edge.reads):
        values = {each[i] for each in given}
        answers = ({edge.met(*each[:i], v, *each[i + 1 :]) for v in values} for each in given)
        assert any(len(answer) == 2 for answer in answers), field


@pytest.mark.parametrize("about", ABOUT)
def test_most_cases_have_something_in_them(about: str) -> None:
    """An empty batch, or no row, is worth a try; where a property wants rows, there is none."""
    drawn = drawn_about(about)
    empty = [case for case in drawn if case.batch * case.q_len == 0]
    assert 0 < len(empty) < len(drawn) / 3
    for case in sample(cases(OracleImplementation(), about, populated=True), count=100):
        assert case.batch >= 1
        assert min(case.q_len, case.kv_len) >= 2


@pytest.mark.parametrize("about", ABOUT)
def test_every_preset_dtype_and_size_takes_its_turn(about: str) -> None:
    # Hypothesis varies what it has drawn: one run in a dozen misses one of eleven semantics
    drawn = drawn_about(about) + sample(cases(OracleImplementation(), about), 350, number=2)
    assert {case.dtype for case in drawn} == set(DTYPES)
    assert {case.group_size for case in drawn} == set(GROUP_SIZES)
    assert {case.head_dim for case in drawn} == set(HEAD_DIMS)
    assert {case.value_dim for case in drawn} == set(HEAD_DIMS)
    assert {case.layout for case in drawn} == set(LAYOUTS)
    assert {case.semantics for case in drawn} == set(OracleImplementation.semantics)


# --- shrinking ------------------------------------------------------------------------------------


def smallest(about: str, wanted: Callable[[Case], bool]) -> Case:
    how = finding([Phase.generate, Phase.shrink])
    return find(cases(OracleImplementation(), about), wanted, settings=how)


def simplest(about: str) -> Case:
    """It differs from the defaults of `Case` in the first dims alone."""
    dim = HEAD_DIMS[0]
    return Case(head_dim=dim, value_dim=dim, model_dim=dim if about == "layer" else 1)


@pytest.mark.parametrize("about", ABOUT)
def test_cases_shrink_to_one_token_and_one_head(about: str) -> None:
    assert smallest(about, lambda case: True) == simplest(about)


@pytest.mark.parametrize(
    ("about", "wanted", "expected"),
    [
        ("sliding", lambda c: c.kv_len > c.q_len > 1, {"q_len": 2, "kv_len": 3}),
        ("sliding", lambda c: c.kv_heads > 1, {"kv_heads": 2, "q_heads": 2}),
        ("sliding", lambda c: c.q_len < c.kv_len == 7, {"kv_len": 7}),
        ("fine", lambda c: c.num_selected_blocks > 1, {"num_selected_blocks": 2}),
        ("fine", lambda c: c.indices == "same", {"indices": "same"}),
        ("compress", lambda c: c.num_mem_kv, {"num_mem_kv": 1}),
    ],
)
def test_what_does_not_matter_shrinks_away(
    about: str, wanted: Callable[[Case], bool], expected: dict[str, Any]
) -> None:
    """A failing case shows what it needs: everything else is as in the simplest one."""
    case = smallest(about, wanted)
    assert case == dataclasses.replace(simplest(about), **expected)


# --- limits ---------------------------------------------------------------------------------------

LIMITS: list[dict[str, Collection[Any]]] = [
    {"head_dim": (64,), "value_dim": (32, 64)},
    {"group_size": (16,)},
    {"group_size": (7,)},
    {"q_heads": (8,), "kv_heads": (2,)},
    {"q_heads": (6, 12)},
    {"kv_heads": (4,)},
    {"batch": (2,)},
    {"q_heads": (6, 8), "kv_heads": (4,)},
    {"q_heads": (6, 9), "group_size": (2,)},
    {"selection_block_size": (4, 8)},
    {"selection_block_size": (6,)},
    {"selection_block_size": (4, 6), "compress_block_sliding_stride": (3,)},
    {"selection_block_size": (16, 32)},
    {"selection_block_size": (6,), "compress_block_sliding_stride": (2, 3)},
    {"selection_block_size": (64,), "compress_block_size": (32,)},
    {"compress_block_sliding_stride": (5,)},
    {"q_len": (128,), "kv_len": (128, 256)},
    {"q_len": (4, 7), "kv_len": (7, 9)},
    {"q_len": (0, 1)},
    {"kv_len": (5,)},
    {"num_selected_blocks": (16,), "num_mem_kv": (1,)},
    {"sliding_window_size": (512,)},
    {"layout": ("contiguous", "transposed"), "dtype": ("bfloat16",)},
    {"compress_map": ("mlp",), "compress_positions": (True,)},
    {"compress_map": ("mean", "linear", "mlp")},
    {"num_initial_blocks": (1,), "num_local_blocks": (2,)},
    {"indices": ("distinct",)},
]


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(limits))
@settings(quiet, max_examples=30)
@given(data=st.data())
def test_limits_are_respected(limits: dict[str, Collection[Any]], data: Any) -> None:
    """Whatever a case is about; what a property adjusts stays within the limits too."""
    port = OracleImplementation()
    port.limits = limits
    about = data.draw(st.sampled_from(sorted(ABOUT)))

    def adjust(draw: st.DrawFn, sizes: Drawn) -> None:
        sizes["batch"] = 3
        sizes["sliding_window_size"] = 1
        sizes["num_selected_blocks"] = 2

    for how in (None, adjust):
        case = data.draw(cases(port, about, adjust=how))
        for field, allowed in limits.items():
            # what nothing reads keeps its default
            if field != "indices" or about == "fine":
                assert getattr(case, field) in allowed, field


#: Properties that move sizes away from what was drawn, and far.
MOVING = [p for p in PROPERTIES.values() if p.extent == "far" or p.about == "layer"]


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(limits))
@settings(quiet, max_examples=20)
@given(data=st.data())
def test_whatever_a_property_adjusts_lies_within_the_limits(
    limits: dict[str, Collection[Any]], data: Any
) -> None:
    """And is a case: sizes that depend on each other are taken back together."""
    port = OracleImplementation()
    port.limits = limits
    asked = [p for p in MOVING if not p.why_not_offered(port) and not p.why_not_tried(port)]
    case = data.draw(st.one_of([lot for prop in asked for lot in prop.strata(port)]))
    for field, allowed in limits.items():
        assert field == "indices" or getattr(case, field) in allowed, field
    assert case.q_len == case.kv_len or case.model_dim == 1, "a layer's queries are its keys"


def test_a_layer_for_which_the_limits_leave_no_length_is_not_offered() -> None:
    port = OracleImplementation()
    port.limits = {"q_len": (1,), "kv_len": (16, 32)}
    for prop in PROPERTIES.values():
        reason = prop.why_not_offered(port)
        assert ("q_len is kv_len" in reason) == (prop.about == "layer"), prop.name


@settings(quiet, max_examples=50)
@given(data=st.data())
def test_what_a_property_adjusts_within_the_limits_stays(data: Any) -> None:
    """Else a port with short queries would never be asked about rows without a key."""
    port = OracleImplementation()
    port.limits = {"q_len": range(21), "kv_len": range(131)}

    def adjust(draw: st.DrawFn, sizes: Drawn) -> None:
        sizes["q_len"], sizes["kv_len"] = 20, 131

    case = data.draw(cases(port, "sliding", adjust=adjust))
    assert case.q_len == 20
    assert case.kv_len < 131


@pytest.mark.parametrize("prop", PROPERTIES.values(), ids=lambda prop: prop.name)
@settings(quiet, max_examples=5)
@given(data=st.data())
def test_a_property_asks_what_was_declared(prop: Any, data: Any) -> None:
    """Its semantics are among the declared ones it is about; dtypes as the command line says."""
    port = OracleImplementation()
    port.numerics = {"float32": "fp32", "bfloat16": "bf16"}
    port.limits = {"head_dim": (16,), "value_dim": (16,)}
    options = Options(dtypes=("bfloat16", "float64"))
    case = data.draw(st.one_of(prop.strata(port, options.dtypes)))
    assert case.semantics in port.semantics
    assert prop.semantics(case.semantics)
    assert case.dtype == "bfloat16"
    assert case.head_dim == case.value_dim == 16


@settings(quiet, max_examples=30)
@given(count=st.integers(0, 5), start=st.integers(0, 2**16))
def test_fresh_seeds_are_the_same_case_with_other_data(count: int, start: int) -> None:
    """Above all seeds that are drawn, so that they are fresh for every case."""
    case = Case(semantics=LUCIDRAINS, q_len=3, seed=start)
    fresh = fresh_seeds(case, count)
    assert len({other.seed for other in fresh}) == count
    for other in fresh:
        assert other.seed > 2**16
        assert dataclasses.replace(other, seed=start) == case


# --- limits that are rules, and of single methods -------------------------------------------------


class Narrow(OracleImplementation):
    """Right, in prefill without short blocks; with fewer gradients, and one request at a time."""

    name = "narrow"
    semantics = (PAPER, dataclasses.replace(PAPER, causal=False))
    limits: ClassVar[dict[str, Any]] = {
        "q_len": "== kv_len",
        "kv_len_mod_selection_block_size": 0,
        "head_dim": (8, 16),
        "group_size": "<= 4",
    }
    limits_of: ClassVar[dict[str, Any]] = {
        "decode": {"batch": (1,), "num_mem_kv": "== 0"},
        "*_vjp": {"kv_len": "<= 64", "dtype": ["float32"], "causal": True},
    }

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        assert is_meant(case, method), (method, case)
        return super().run(method, case, *arguments)


def is_meant(case: Case, method: str) -> bool:
    """What the limits of `Narrow` say."""
    within = case.q_len == case.kv_len and case.kv_len % case.selection_block_size == 0
    within = within and case.head_dim in (8, 16) and case.group_size <= 4
    if method == "decode":
        within = within and case.batch == 1 and case.num_mem_kv == 0
    if method.endswith("_vjp"):
        within = within and case.kv_len <= 64 and case.dtype == "float32" and case.semantics.causal
    return within


@pytest.mark.parametrize(
    "name",
    [
        "W3_sliding_mask_as_exposed",
        "A1_fine_output_by_shape",
        "A2_compress_empty_rows",
        "A3_fine_gradients",
        "I4_selection",
        "G3_decode",
        "A4_layer_gradients",
        "A1_sliding_output_of_long_sequences",
    ],
)
def test_cases_are_drawn_within_relations_and_the_limits_of_their_method(name: str) -> None:
    """None is refused and drawn again."""
    prop, port = PROPERTIES[name], Narrow()
    drawn: list[Case] = []
    draw(prop, port, Options(shrink=False), drawn.append)
    assert len(drawn) >= 0.8 * asked_of(prop, port, Options())
    assert all(is_meant(case, prop.called) for case in drawn)
    lengths = {case.kv_len for case in drawn}
    assert len(lengths) > (len(drawn) > 4) * 5


@pytest.mark.parametrize(
    "name",
    [
        "A3_sliding_gradients",
        "sliding_rows_do_not_know_what_follows",
        "F3_fine_mask_as_exposed",
        "C4_pool_gradients",
        "G4_varlen",
    ],
)
def test_a_port_is_called_within_its_limits_alone(name: str, tmp_path: Path) -> None:
    trials.passes(name, Narrow(), tmp_path)


def test_a_case_by_itself_is_judged_within_the_limits() -> None:
    """As those are that show whether findings have one cause."""
    case = Case(dtype="float32", q_len=8, kv_len=8, head_dim=8, value_dim=8, sliding_window_size=2)
    prop = PROPERTIES["sliding_rows_do_not_know_what_follows"]
    assert broken_clause(prop, Narrow(), case) == ""


@pytest.mark.parametrize(
    ("stated", "listed"),
    [
        ({"head_dim": 64}, {"head_dim": (64,)}),
        ({"batch": np.int64(1)}, {"batch": (1,)}),
        ({"layout": "contiguous"}, {"layout": ("contiguous",)}),
        ({"compress_positions": False}, {"compress_positions": (False,)}),
        ({"compress_positions": "!= true"}, {"compress_positions": (False,)}),
        ({"kv_len": np.arange(3, 9)}, {"kv_len": (3, 4, 5, 6, 7, 8)}),
        ({"layout": np.array(["strided"])}, {"layout": ("strided",)}),
    ],
    ids=lambda limits: "-".join(map(str, limits)),
)
def test_a_limit_is_a_value_or_anything_that_lists_values(
    stated: dict[str, Any], listed: dict[str, tuple[Any, ...]]
) -> None:
    every = []
    for limits in (stated, listed):
        port = OracleImplementation()
        port.limits = limits
        conformance_suite(port)
        back = Declared.from_json(json.loads(json.dumps(Declared(port).to_json())))
        for one in (port, back):
            drawn: list[Case] = []
            draw(PROPERTIES["A1_sliding_output_by_shape"], one, Options(shrink=False), drawn.append)
            every.append(drawn)
    assert every[0] and all(drawn == every[0] for drawn in every)


@pytest.mark.parametrize(
    "limits",
    [
        {"kv_len": range(1, 10**9), "q_len": range(1, 10**9), "head_dim": "<= 1000000000"},
        {"kv_len": "1..1000000000", "batch": range(2, 10**9, 2), "value_dim": range(10**9, 0, -1)},
        {"q_heads": range(4, 10**9, 4), "group_size": range(2, 10**9, 2)},
        {"q_heads": range(1, 10**9), "kv_heads": (12,)},
        {"selection_block_size": range(6, 10**9, 6), "compress_block_sliding_stride": (48,)},
        {"compress_block_size": range(1, 10**9), "sliding_window_size": range(5, 10**9)},
    ],
    ids=str,
)
def test_a_range_of_a_billion_values_is_neither_listed_nor_walked_through(
    limits: dict[str, Any],
) -> None:
    port = OracleImplementation()
    port.limits, port.limits_of = limits, {"sliding": {"kv_len": range(3, 10**9, 3)}}
    conformance_suite(port)
    sent = json.dumps(Declared(port).to_json())
    assert len(sent) < 20_000
    drawn: list[list[Case]] = [[], []]
    for one, of_it in zip((port, Declared.from_json(json.loads(sent))), drawn):
        draw(PROPERTIES["A1_sliding_output"], one, Options(shrink=False), of_it.append)
    assert drawn[0] == drawn[1] and drawn[0]
    for case in drawn[0]:
        assert case.kv_len % 3 == 0 and case.q_heads <= 200 and case.kv_len <= 300


@given(
    ends=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    steps=st.lists(st.sampled_from([1, 2, 3, 4, 6, -1, -4]), min_size=2, max_size=2),
    most=st.integers(-1, 41),
)
@settings(quiet)
def test_what_is_known_of_long_ranges_is_what_lists_say(
    ends: list[int], steps: list[int], most: int
) -> None:
    one, other = range(ends[0], ends[1], steps[0]), range(ends[2], ends[3], steps[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "MANY", 0)
        if one and other:
            assert sorted(ranges.common(one, other)) == sorted(set(one) & set(other))
        assert sorted(ranges.up_to(one, most)) == sorted(n for n in one if n <= most)
        assert list(ranges.some_of(one)) == sorted(one)[: ranges.SMALLEST]


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({"num_selection_blocks": "<= 4"}, range(5)),
        ({"num_selection_blocks": (1, 3)}, (1, 3)),
        ({"num_selection_blocks": range(2, 5)}, range(2, 5)),
        ({"num_compress_blocks": "2..4"}, range(2, 5)),
        ({"num_compress_blocks": "== 3"}, (3,)),
        ({"num_compress_blocks": 3}, (3,)),
        ({"num_compress_blocks": 1}, (1,)),
        ({"num_compress_blocks": 0}, (0,)),
        ({"num_selection_blocks": 1}, (1,)),
        ({"num_compress_blocks": ">= 2"}, range(2, 1000)),
        ({"kv_len_mod_4": np.array([0, 1])}, None),
    ],
    ids=lambda limits: "-".join(map(str, limits.items())) if isinstance(limits, dict) else "",
)
def test_a_size_that_follows_from_others_is_limited_like_them(
    limits: dict[str, Any], allowed: Collection[int] | None
) -> None:
    port = OracleImplementation()
    port.limits = limits
    conformance_suite(port)
    back = Declared.from_json(json.loads(json.dumps(Declared(port).to_json())))
    prop, (field,) = dataclasses.replace(PROPERTIES["I4_selection"], examples=40), limits
    for one in (port, back):
        drawn: list[Case] = []
        draw(prop, one, Options(shrink=False), drawn.append)
        assert len(drawn) > 10
        if allowed is None:
            assert all(case.kv_len % 4 < 2 for case in drawn)
        else:
            assert all(getattr(case, field) in allowed for case in drawn)


def test_limits_of_a_method_are_nothing_to_the_others() -> None:
    class Decodes(OracleImplementation):
        limits_of: ClassVar[dict[str, Any]] = {"decode": {"batch": (1,)}}

    for name in ("G1_layer_output", "A3_fine_gradients"):
        every = []
        for port in (OracleImplementation(), Decodes()):
            drawn: list[Case] = []
            draw(PROPERTIES[name], port, Options(shrink=False), drawn.append)
            every.append(drawn)
        assert every[0] == every[1]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"q_length": "== kv_len"}, "'q_length' is no field of a case; did you mean q_len"),
        ({"q_len": "== kv_length"}, "'kv_length' is no number and no field; did you mean kv_len"),
        ({"q_len": "=< kv_len"}, "q_len = '=< kv_len' must be a whole number, a list"),
        ({"kv_len_mod_l": 0}, "'l' is no field of a case"),
        ({"head_dim": "big"}, "head_dim = 'big' must be a whole number, a list"),
        ({"compress_map": "!= median"}, "compress_map='median' must be one of"),
        ({"causal": True}, "'causal', which the attribute semantics declares"),
        ({"q_len": "> kv_len", "kv_len": "> q_len"}, "limits leave no case of "),
        (
            {"q_len": range(10**9, 2 * 10**9)},
            "q_len=range(1000000000, 2000000000); but no case has more than 1048576",
        ),
        ({"kv_len": range(10**30)}, "has a larger number; valid are integers of at least 0 and at"),
        ({"kv_len": f"<= {10**30}"}, "has a larger number; valid are integers of at least 0 and"),
        ({"head_dim": (8, 10**5000)}, "has a larger number; valid are integers of at least 1 and"),
    ],
)
def test_rules_without_a_meaning_are_refused_in_a_line(limits: dict[str, Any], words: str) -> None:
    port = OracleImplementation()
    port.limits = limits
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        conformance_suite(port)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"decoder": {"batch": (1,)}}, "limits_of has 'decoder', no method; did you mean decode"),
        ({"decode": {"batch": None}}, "limits_of['decode']['batch']=None must be the allowed"),
        ({"fine_vjp": {"dtype": ("float8",)}}, "['dtype'] has 'float8'; valid are float64, "),
        ({"fine_vjp": {"dtype": None}}, "['dtype']=None must be the allowed values"),
        ({"fine_vjp": {"dtype": ()}}, "['dtype']=() must be the allowed values"),
        ({"fine_vjp": (64,)}, "limits_of['fine_vjp']=(64,) must be a dict"),
        ({3: {"batch": (1,)}}, "limits_of has 3, no method; there are "),
    ],
)
def test_limits_of_methods_without_a_meaning_are_refused(limits: Any, words: str) -> None:
    port = OracleImplementation()
    port.limits_of = limits
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        conformance_suite(port)


@pytest.mark.parametrize(
    ("limits", "limits_of", "words"),
    [
        (
            {"kv_len": (1, 2)},
            {"sliding_mask": {"kv_len": (5,)}},
            "no case of sliding_mask: kv_len=(1, 2) and kv_len=(5,)",
        ),
        (
            {"kv_len": "<= 4"},
            {"*_vjp": {"kv_len": 5}},
            "_vjp: kv_len=range(0, 5) and kv_len=(5,)",
        ),
        (
            {"kv_heads": (4,)},
            {"sliding_mask": {"q_heads": (6,)}},
            "no case of sliding_mask: kv_heads=(4,), q_heads=(6,); but q_heads is kv_heads times",
        ),
        (
            {"selection_block_size": 8},
            {"fine": {"compress_block_sliding_stride": (3, 5)}},
            "no case of fine: compress_block_sliding_stride=(3, 5), selection_block_size=(8,); but",
        ),
        (
            {},
            {"*_vjp": {"dtype": "float32"}, "fine_vjp": {"dtype": ["float64"]}},
            "no case of fine_vjp: dtype=('float32',) and dtype=('float64',)",
        ),
        (
            {"q_len": (5, 6)},
            {"sliding_mask": {"q_len": ">= 7"}},
            "no case of sliding_mask: q_len = '>= 7', q_len=(5, 6)",
        ),
    ],
)
def test_limits_that_contradict_each_other_are_refused(
    limits: dict[str, Any], limits_of: dict[str, Any], words: str
) -> None:
    port = OracleImplementation()
    port.numerics = {"float32": "fp32", "float64": "fp64"}
    port.limits, port.limits_of = limits, limits_of
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        conformance_suite(port)
    assert "\n" not in str(error.value)


def test_limits_that_leave_one_property_of_a_method_no_case_are_no_contradiction() -> None:
    """Five tokens are not many, but a request."""
    port = OracleImplementation()
    port.limits, port.limits_of = {"num_selection_blocks": "3..4"}, {"decode": {"kv_len": 5}}
    conformance_suite(port)
    drawn: list[Case] = []
    draw(PROPERTIES["G3_decode"], port, Options(shrink=False), drawn.append)
    assert drawn and all(case.kv_len == 5 for case in drawn)


def test_a_method_without_a_dtype_left_is_not_offered(tmp_path: Path) -> None:
    port = OracleImplementation()
    port.numerics = {"float16": "fp16"}
    port.limits_of = {"fine_vjp": {"dtype": ("float32",)}}
    record = trials.record("A3_fine_gradients", port, tmp_path)
    why = "fine_vjp: none of the declared dtypes lies within its limits"
    assert dict(record.not_offered) == {why: 1}


def test_rules_survive_their_way_to_a_process_that_does_not_load_the_port() -> None:
    sent = json.loads(json.dumps(Declared(Narrow()).to_json()))
    back = Declared.from_json(sent)
    prop = dataclasses.replace(PROPERTIES["F1_fine_mask_as_exposed"], examples=20)
    drawn: list[list[Case]] = [[], []]
    for port, cases_of in zip((Narrow(), back), drawn):
        draw(prop, port, Options(shrink=False), cases_of.append)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("rule", "limits", "expected"),
    [
        (Condition("q_len", "== kv_len"), {}, {"q_len": 5000}),
        (Condition("q_len", "== kv_len"), {"q_len": range(64)}, {"kv_len": 3}),
        (Condition("kv_len", "<= q_len"), {}, {"kv_len": 3}),
        (Condition("kv_len", 64), {}, {"kv_len": 64}),
    ],
    ids=str,
)
def test_a_relation_is_met_however_far_apart_the_sizes_are(
    rule: Condition, limits: dict[str, Any], expected: dict[str, int]
) -> None:
    """And by the one of them that may be changed."""
    sizes = {"q_len": 3, "kv_len": 5000}
    found = brought_within(sizes, [rule], limits, square=False, least=1)
    assert found == sizes | expected


class FromTheFirstToken(OracleImplementation):
    """A kernel of fixed sizes, for a prompt of one block and a token, or a row behind a cache."""

    limits: ClassVar[dict[str, Any]] = {
        "head_dim": (64, 128),
        "compress_block_size": (32,),
        "compress_block_sliding_stride": (16,),
        "selection_block_size": (64,),
        "q_len": (1, 65),
        "kv_len": (65, 2048, 8257),
    }


@pytest.mark.parametrize("about", sorted({*ABOUT} - {"layer"}))
def test_within_limits_there_are_as_many_rows_as_keys(about: str) -> None:
    """So that rows stand at the first positions, whatever lengths may be."""
    strategy = cases(FromTheFirstToken(), about, shape="square")
    assert {(case.q_len, case.kv_len) for case in sample(strategy, 5)} == {(65, 65)}


@pytest.mark.parametrize("about", ["fine", "selection"])
def test_within_limits_there_are_many_blocks(about: str) -> None:
    """Where one length has them, it is that of the shape."""
    strategy = cases(FromTheFirstToken(), about, shape="many blocks")
    assert {case.kv_len for case in sample(strategy, 5)} == {8257}


def test_an_mlp_is_tried_where_limits_leave_large_ones_alone() -> None:
    """Of few tokens, because its weights are the square of its inputs."""
    drawn: list[Case] = []
    options = Options(shrink=False)
    draw(PROPERTIES["C4_pool_gradients"], FromTheFirstToken(), options, drawn.append)
    mlps = [case for case in drawn if case.compress_map == "mlp"]
    assert mlps and {(case.head_dim, case.kv_len) for case in mlps} == {(64, 65)}
