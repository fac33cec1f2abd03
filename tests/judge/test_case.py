"""A case travels as JSON and as Python, fills the same arrays, and says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_ref.attention import attend
from nsa_ref.layer import selection_inputs
from nsa_ref.semantics import INPUT_NORM, PRESETS, ROTARY, PerBranch, Semantics
from nsa_ref.sizes import Sizes
from nsa_ref.testing import Case, OracleImplementation
from nsa_ref.testing.case import DTYPES, INDICES, INPUTS, LAYOUTS, describe, load_case
from nsa_ref.testing.lattice import IN_LAYERS
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.strategies import ABOUT, cases

quiet = level_settings("quick", 100)

#: What must be in scope to paste a case.
SCOPE: dict[str, Any] = {
    "Case": Case,
    "replace": replace,
    "PerBranch": PerBranch,
    "inf": math.inf,
    **PRESETS,
}

ROWS = st.sampled_from(["zero", "nan", "uniform"])
LSES = st.sampled_from([-math.inf, 0.0, math.inf])
FLAGS = [field.name for field in dataclasses.fields(Semantics) if field.type == "bool"]
SWITCHES = dict(
    compress_alignment=st.sampled_from(["start", "end"]),
    importance=st.sampled_from(["overlap", "logit_mean"]),
    forced_score=st.sampled_from([math.inf, 1.0, 0.5]),
    score_floor=st.sampled_from([None, 1e-10]),
    duplicates=st.sampled_from(["set", "multiset"]),
    empty_row=st.builds(PerBranch, ROWS, ROWS, ROWS),
    empty_lse=st.builds(PerBranch, LSES, LSES, LSES),
    rotary=st.sampled_from(ROTARY),
    input_norm=st.sampled_from(INPUT_NORM),
    **dict.fromkeys(FLAGS, st.booleans()),
)
any_semantics = st.builds(Semantics, **SWITCHES)

any_case = st.builds(
    lambda case, semantics: replace(case, semantics=semantics),
    st.sampled_from(sorted(ABOUT)).flatmap(lambda about: cases(OracleImplementation(), about)),
    any_semantics | st.sampled_from(list(PRESETS.values())),
)


# --- there and back -------------------------------------------------------------------------------


def test_every_switch_is_drawn() -> None:
    assert sorted(SWITCHES) == sorted(field.name for field in dataclasses.fields(Semantics))


@quiet
@given(any_case)
def test_json_and_python_both_ways(case: Case) -> None:
    """Strict JSON, no NaN and no Infinity, whatever the switches; what is printed pastes back."""
    text = json.dumps(case.to_json(), allow_nan=False)
    assert load_case(text) == case
    assert load_case(json.dumps({"case": case.to_json(), "text": "a finding"})) == case
    assert "\n" not in repr(case)
    assert eval(repr(case), dict(SCOPE)) == case


def test_only_what_differs_is_printed() -> None:
    assert repr(Case()) == "Case()"
    case = Case(semantics=PRESETS["FLA"], dtype="bfloat16", q_len=3)
    assert repr(case) == "Case(semantics=FLA, dtype='bfloat16', q_len=3)"
    changed = replace(PRESETS["LUCIDRAINS"], causal=False)
    assert describe(changed) == "replace(LUCIDRAINS, causal=False)"


def test_the_sizes_of_a_case_are_plain_sizes() -> None:
    case = Case(q_heads=4, sliding_window_size=2, kv_len=9, seed=3)
    assert case.layer_sizes == Sizes(q_heads=4, sliding_window_size=2)


def test_missing_fields_keep_their_defaults_and_unknown_ones_are_named() -> None:
    """A case saved before a field existed still loads."""
    assert Case.from_json({"q_len": 3}) == Case(q_len=3)
    with pytest.raises(ValueError, match=r"case has unknown fields \['window'\]; known: .*'batch'"):
        Case.from_json({"window": 3})


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": -1}, "ValueError: batch=-1 must be at least 0."),
        ({"q_heads": 0}, "ValueError: q_heads=0 must be at least 1."),
        ({"q_len": 1.5}, "TypeError: q_len=1.5 must be an integer, not float."),
        ({"kv_len": True}, "TypeError: kv_len=True must be an integer, not bool."),
        ({"num_mem_kv": -2}, "ValueError: num_mem_kv=-2 must be at least 0."),
        (
            {"q_heads": 6, "kv_heads": 4},
            "ValueError: q_heads=6 must be a positive multiple of kv_heads=4: every kv head serves "
            "a group of equally many query heads. Try 4 or 8.",
        ),
        (
            {"selection_block_size": 10, "compress_block_sliding_stride": 4},
            "ValueError: selection_block_size=10 must be a positive multiple of "
            "compress_block_sliding_stride=4: eq. 9 counts the overlap of blocks in whole strides. "
            "Try 8 or 12.",
        ),
        ({"dtype": "half"}, "ValueError: dtype='half' must be one of 'float64', 'float32', "),
        ({"compress_positions": 1}, "TypeError: compress_positions=1 must be True or False"),
        (
            {"semantics": "PAPER"},
            "TypeError: semantics='PAPER' must be a Semantics, such as nsa_ref.PAPER",
        ),
    ],
)
def test_errors_name_field_value_and_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        Case(**fields)
    assert f"{caught.typename}: {caught.value}".startswith(message)


@pytest.mark.parametrize("wrong", [object(), "none of these", -1])
def test_every_field_is_checked(wrong: object) -> None:
    """No field takes what stands for nothing."""
    for field in dataclasses.fields(Case):
        with pytest.raises((ValueError, TypeError), match=field.name):
            Case(**{field.name: wrong})


# --- arrays ---------------------------------------------------------------------------------------


@level_settings("quick", 30)  # some of them have millions of numbers
@given(any_case)
def test_a_case_fills_the_same_arrays_every_time(case: Case) -> None:
    """Valid by construction: all arrays exist, and hold numbers in the case's dtype."""

    def arrays(case: Case) -> list[np.ndarray]:
        branches = *case.qkv(), *case.compressed(), *case.upstream_gradients()
        return [*branches, *case.pool_weights().values(), case.block_indices()]

    for one, two in zip(arrays(case), arrays(Case.from_json(case.to_json()))):
        assert one.dtype == two.dtype
        assert one.tobytes() == two.tobytes()
        assert one.dtype in (DTYPES[case.dtype], np.int64)
        assert np.isfinite(one.astype(np.float64)).all()


def test_every_array_has_a_source_of_its_own() -> None:
    """So that other lengths of k leave q alone, and another seed changes all."""
    case = Case(q_len=4, kv_len=5, head_dim=8, value_dim=8, num_mem_kv=2)
    q, k, _ = case.qkv()
    names = ("q", "k", "v", "k_cmp", "v_cmp", "mem_k", "mem_v", "x", "d_out", "d_lse")
    assert len({case.array(name, 1, 1, 4, 8).tobytes() for name in names}) == len(names)
    assert (replace(case, kv_len=9, value_dim=3).qkv()[0] == q).all()
    for one, two in zip(case.qkv(), replace(case, seed=1).qkv()):
        assert (one != two).any()
    # rounded from the same numbers
    for dtype in DTYPES:
        rounded = replace(case, dtype=dtype).qkv()[1]
        assert rounded.tobytes() == k.astype(DTYPES[dtype]).tobytes()


SIZED = Case(batch=3, q_heads=4, kv_heads=2, q_len=12, kv_len=12, head_dim=16, value_dim=8)


def logits(case: Case) -> np.ndarray:
    q, k, _ = case.qkv()
    return case.scale * np.einsum("bhtd,bhjd->bhtj", q, np.repeat(k, case.group_size, axis=1))


@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_are_what_they_are_called(inputs: str) -> None:
    case = replace(SIZED, inputs=inputs)
    q, k, v = case.qkv()
    scores = logits(case)
    match inputs:
        case "randn":
            assert all(0.5 < x.std() < 2 for x in (q, k, v))
        case "flat":  # hardly any key stands out
            assert np.ptp(scores, axis=-1).max() < np.ptp(logits(SIZED), axis=-1).max() / 2
        case "integers":
            assert all((x == np.rint(x)).all() and np.abs(x).max() == 2 for x in (q, k, v))
        case "one_hot_v":
            assert (np.sort(v, axis=-1) == np.eye(8)[-1]).all()
        case "equal":
            assert (scores == scores[..., :1]).all()
        case "ties":  # some keys share a score, not all
            for row in scores.reshape(-1, 12):
                assert 1 < len(np.unique(row)) < 12
        case "huge":  # exp overflows float32 unless the maximum is taken off first
            assert scores.max() > 88
            peak = np.exp(scores - scores.max(-1, keepdims=True))
            assert (peak / peak.sum(-1, keepdims=True)).max() > 1 - 2.0**-20
        case "heavy":
            assert np.abs(q).max() > 4 * np.abs(q).std()
            assert max(np.abs(x).max() for x in (q, k, v)) <= 100
        case "offsets":
            assert v.mean() > 9 and k.mean() > 4
        case "drift":  # hardly any key stands out, and the last values are others than the first
            assert np.ptp(scores, axis=-1).max() < np.ptp(logits(SIZED), axis=-1).max() / 2
            assert v[:, :, -1].mean() > 2 > -2 > v[:, :, 0].mean()
        case "tiny":
            assert 0 < max(np.abs(x).max() for x in (q, k, v)) < 1e-3


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_recipe_overflows(inputs: str, dtype: str) -> None:
    """Finite in every dtype, and so are the results."""
    case = replace(SIZED, inputs=inputs, dtype=dtype)
    q, k, v = (x.astype(np.float64) for x in case.qkv())
    found = attend(q, k, v, np.ones((12, 12), int), scale=case.scale)
    assert np.isfinite(found.out).all()


def test_gradients_that_arrive_are_generic_whatever_the_inputs() -> None:
    """d_out and d_lse do not follow the recipe."""
    d_outs = [replace(SIZED, inputs=inputs).upstream_gradients()[0] for inputs in INPUTS]
    assert all((d_out == d_outs[0]).all() for d_out in d_outs)


def test_memory_follows_the_recipe_of_keys_and_values() -> None:
    case = replace(SIZED, inputs="offsets", num_mem_kv=50)
    *_, mem_k, mem_v = case.compressed()
    assert mem_k.mean() > 4 and mem_v.mean() > 9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expanded_case_shows_one_batch_entry_three_times(layout: str) -> None:
    for array in replace(SIZED, layout=layout).qkv():
        assert array.flags.c_contiguous
        assert (array == array[:1]).all() == (layout == "expanded")


@pytest.mark.parametrize("inputs", IN_LAYERS)
def test_the_logits_of_a_layer_are_what_its_inputs_are_called(inputs: str) -> None:
    """All else in it stays as it is, and so do keys and values."""
    case = replace(SIZED, inputs=inputs, model_dim=16)
    usual = replace(case, inputs="randn").layer_weights()
    differ = {n for n, weight in case.layer_weights().items() if (weight != usual[n]).any()}
    assert differ == (set() if inputs == "randn" else {"to_q.weight"})
    q, k, _ = selection_inputs(case.tokens(), case.layer_weights(), **case.geometry)
    scores = case.scale * np.einsum("bhtd,bhjd->bhtj", q, np.repeat(k, case.group_size, axis=1))
    low, high = {"flat": (0, 2), "randn": (1, 10), "heavy": (5, 88), "huge": (88, 4000)}[inputs]
    assert low < np.abs(scores).max() < high


def test_weights_keep_pooled_values_near_one() -> None:
    mlp = {"compress_map": "mlp", "compress_positions": True, "compress_block_size": 8}
    weights = replace(SIZED, dtype="bfloat16", **mlp).pool_weights()
    assert all(array.dtype == DTYPES["bfloat16"] for array in weights.values())
    for name, array in weights.items():
        if name.startswith("weight"):
            values = array.astype(np.float64)
            assert values.std() * values.shape[-1] ** 0.5 < 2
    assert not Case(compress_map="mean").pool_weights()


# --- block indices --------------------------------------------------------------------------------

BLOCKS = Case(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=30,
    kv_len=30,
    selection_block_size=4,
    num_selected_blocks=5,
)


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("share", [True, False])
def test_indices_are_what_they_are_called(indices: str, share: bool) -> None:
    case = replace(BLOCKS, semantics=Semantics(share_selection=share), indices=indices)
    found = case.block_indices()
    assert found.dtype == np.int64
    assert found.shape == (2, 2 if share else 4, 30, 5)
    rows, blocks = found.reshape(-1, 5), 8
    match indices:
        case "none":
            assert (rows == -1).all()
        case "same":
            assert (rows == rows[:, :1]).all()
            assert set(rows.flatten()) == set(range(blocks))
        case "few":  # duplicates, next to others
            assert set(rows.flatten()) == set(range(5))
            assert any(1 < len(set(row)) < 5 for row in rows.tolist())
        case "mixed":  # everything that I6 speaks of
            assert {-2, -1, blocks, blocks + 1} <= set(rows.flatten().tolist())
            assert any(-1 in row[:-1] and row[-1] >= 0 for row in rows.tolist())
            wrapped = rows[rows > 2**31]
            assert set(wrapped.astype(np.int32).tolist()) & set(range(blocks))
            assert any(len(set(row)) < 5 for row in rows.tolist())
        case "distinct":
            assert all(len(set(row)) == 5 for row in rows.tolist())
            assert rows.min() == 0
            assert rows.max() == blocks - 1
        case "all":
            assert (np.diff(rows, axis=-1) < 0).all()
            assert rows.min() >= 0


@pytest.mark.parametrize("indices", ["distinct", "all"])
def test_slots_beyond_the_blocks_hold_minus_one(indices: str) -> None:
    case = replace(BLOCKS, indices=indices, num_selected_blocks=10)
    rows = case.block_indices().reshape(-1, 10)
    for row in rows.tolist():
        assert sorted(row) == [-1, -1, *range(8)]
    slots = set(np.argwhere(rows == -1)[:, 1].tolist())
    assert slots == ({8, 9} if indices == "all" else set(range(10)))


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("empty", ["batch", "q_len", "kv_len", "num_selected_blocks"])
def test_indices_of_nothing(indices: str, empty: str) -> None:
    """No batch, row, block or slot: an array of the right shape, and -1 where there are slots."""
    case = replace(BLOCKS, indices=indices, **{empty: 0})
    found = case.block_indices()
    assert found.shape == (case.batch, 2, case.q_len, case.num_selected_blocks)
    assert (found == -1).all()
