"""The judge of whole layers before strange ports: limits, inputs written to, odd results."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trials
from nsa_ref import LUCIDRAINS, LUCIDRAINS_FLEX, PAPER
from nsa_ref.semantics import PerBranch
from nsa_ref.testing import Case, Implementation, OracleImplementation
from nsa_ref.testing.mutants.arithmetic import InterleavedHeads
from nsa_ref.testing.mutants.layer import LayerInSteps, LayerWay
from nsa_ref.testing.mutants.layers import (
    GradientThroughTheChoice,
    LayerGradientOverwritten,
    RotaryByHalves,
    SequencesLeak,
    WindowOfPadding,
)
from nsa_ref.testing.mutants.rounding import Way
from nsa_ref.testing.mutants.selection import Selector
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from trials import record
from unusual_ports import SIGMOIDS, NormOfTorch, SigmoidInSteps

EXACT = "G1_layer_output_in_exact_numbers"
#: Those that set up more than they draw.
SET_UP = (
    "W1_sliding_mask_through_the_layer",
    "C2_compress_mask_through_the_layer",
    "F1_fine_mask_through_the_layer",
    EXACT,
    "G3_decode",
    "G4_varlen",
)
TURNED = dataclasses.replace(PAPER, rotary="all")
BOTH_WAYS = dataclasses.replace(TURNED, causal=False)
ONE = {"semantics": (PAPER,), "numerics": {"float64": "fp64"}}


def port(base: type = OracleImplementation, **attributes: Any) -> Implementation:
    made: Implementation = base()
    for name, value in {**ONE, **attributes}.items():
        setattr(made, name, value)
    return made


finding = functools.partial(trials.finding, shrink=False)


@pytest.mark.parametrize(
    "row", ["bf16", "bf16-head", "bf16-eager", "fp16", "fp16-head", "fp16-eager"]
)
@pytest.mark.parametrize(
    ("order", "exponential", "reverse"),
    [("library", "exp", False), ("reversed", "exp2", True), ("truncated", "exp2_late", False)],
)
def test_right_layers_are_exact_where_the_dtype_holds_every_number(
    row: str, order: str, exponential: str, reverse: bool, tmp_path: Path
) -> None:
    """In every order of sums, fused or with every operation stored, and with another exp."""
    of_attention = Way(
        block=16,
        order=order,
        exponential=exponential,
        reciprocal=reverse,
        fused=not row.endswith("eager"),
        scale_first=reverse,
    )
    way = LayerWay(of_attention, fused_projections=reverse, wide=not reverse, reverse=reverse)
    layer = LayerInSteps(way, row)
    layer.name = f"{row} {way}"
    result = record(EXACT, layer, tmp_path, shrink=False)
    assert result.finding is None, result.finding["text"]
    assert result.cases


@pytest.mark.parametrize("formula", SIGMOIDS)
@pytest.mark.parametrize("row", ["bf16-eager", "fp16-eager"])
def test_a_sigmoid_whose_every_operation_is_stored_is_right(
    row: str, formula: str, tmp_path: Path
) -> None:
    layer = SigmoidInSteps(formula, row)
    for seed in range(4):
        found = record(EXACT, layer, tmp_path, shrink=False, seed=seed).finding
        assert found is None, found["text"]


@pytest.mark.parametrize(
    "attributes",
    [
        {"limits": {"compress_map": ("mean",), "compress_positions": (False,)}},
        {"limits": {"compress_map": ("linear_per_head",)}},
        {"limits": {"model_dim": (8,)}, "semantics": (LUCIDRAINS_FLEX,)},
        {"limits": {"q_len": (32,), "kv_len": (32,)}},
        {"limits": {"head_dim": (5,), "value_dim": (7,)}, "semantics": (LUCIDRAINS_FLEX,)},
        {"limits": {"num_mem_kv": (0,)}, "semantics": (LUCIDRAINS,)},
        {"limits": {"num_selected_blocks": (16,), "selection_block_size": (16,)}},
    ],
    ids=lambda attributes: ", ".join(attributes["limits"]),
)
def test_limits_make_no_right_layer_wrong(attributes: dict[str, Any], tmp_path: Path) -> None:
    """What is set up for a question may not fit into the limits: then it is not asked."""
    for name in SET_UP:
        found = record(name, port(**attributes), tmp_path, shrink=False).finding
        assert found is None, found["text"]


@pytest.mark.parametrize(
    ("port", "clause"), [(GradientThroughTheChoice, "A4"), (LayerGradientOverwritten, "G1")]
)
def test_what_is_wrong_in_one_request_is_not_blamed_on_two(
    port: type, clause: str, tmp_path: Path
) -> None:
    found = finding("G1_layer_gradients_after_another_request", port(), tmp_path)
    assert found["clause"] == clause


class WritesIntoItsInputs(OracleImplementation):
    """No gradient at all, by clearing d_out and then differentiating."""

    def layer_with_blocks_vjp(self, case: Case, *tensors: Any) -> Any:
        tensors[-1][...] = 0
        return super().layer_with_blocks_vjp(case, *tensors)

    def sliding_vjp(self, case: Case, *tensors: Any) -> Any:
        tensors[-2][...] = 0
        return super().sliding_vjp(case, *tensors)


@pytest.mark.parametrize("name", ["G1_layer_gradients_with_blocks", "A3_sliding_gradients"])
def test_what_a_port_writes_into_its_inputs_is_its_own(name: str, tmp_path: Path) -> None:
    assert finding(name, port(WritesIntoItsInputs), tmp_path)["clause"] == name[:2]


class GivesATuple(OracleImplementation):
    def layer(self, case: Case, weights: dict[str, Any], x: Any) -> Any:
        return super().layer(case, weights, x), None


class GivesComplexNumbers(OracleImplementation):
    def layer(self, case: Case, weights: dict[str, Any], x: Any) -> Any:
        return super().layer(case, weights, x).astype(np.complex128)


class ForgetsGates(OracleImplementation):
    def run_vjp(self, *arguments: Any) -> Any:
        dx, dweights = super().run_vjp(*arguments)
        return dx, {n: gradient for n, gradient in dweights.items() if n != "gates.bias"}


@pytest.mark.parametrize(
    ("base", "name", "text"),
    [
        (GivesATuple, "G1_layer_output", "layer is a tuple; it must be one array"),
        (GivesComplexNumbers, "G1_layer_output", "layer has dtype complex128; it must hold real"),
        (ForgetsGates, "G1_layer_gradients_with_blocks", "lacks gradients of ['gates.bias']"),
        (GivesATuple, "W1_sliding_mask_through_the_layer", "layer is a tuple"),
        (ForgetsGates, "G4_varlen_gradients", "lacks gradients of ['gates.bias']"),
    ],
)
def test_odd_results_are_said_in_one_line(base: type, name: str, text: str, tmp_path: Path) -> None:
    assert text in finding(name, port(base), tmp_path)["text"]


class GatesUpsideDown(OracleImplementation):
    """Wrong in all that it does, and equally."""

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        weights, *rest = arguments
        return super().run(method, case, weights | {"gates.bias": -weights["gates.bias"]}, *rest)


@pytest.mark.parametrize(
    ("name", "offered", "hint"),
    [
        ("G3_decode", ("decode",), "layer is not offered: a mistake of decode"),
        ("G4_varlen", ("varlen",), "layer is not offered: a mistake of varlen"),
        ("G4_varlen_gradients", ("layer", "varlen", "varlen_vjp"),
         "gradients of layer are not offered: a mistake of varlen"),
    ],
)  # fmt: skip
def test_without_the_layer_nobody_can_tell_whose_mistake_it_is(
    name: str, offered: tuple[str, ...], hint: str, tmp_path: Path
) -> None:
    """Which is said beside the finding; with it, the layer is to blame."""
    alone = finding(name, port(GatesUpsideDown, offers=lambda what: what in offered), tmp_path)
    assert alone["clause"] == name[:2]
    assert f"{hint} cannot be told from one of the layer itself" in alone["text"]
    whole = finding(name, port(GatesUpsideDown), tmp_path)
    assert whole["clause"] == "G1" and hint not in whole["text"]


class TwiceTheGate(LayerInSteps):
    """Of one branch, or of several."""

    branches: tuple[int, ...]

    def squashed(self, logits: Any) -> Any:
        gates = super().squashed(logits)
        gates[list(self.branches)] *= 2
        return gates


@pytest.mark.parametrize(
    ("branches", "text"),
    [
        ((1,), "with one gate open at a time, fine is wrong, compress and sliding are right"),
        ((0, 2), "with one gate open at a time, compress and sliding are wrong, fine is right"),
        ((0, 1, 2), "all branches are wrong with their gate alone open"),
    ],
)
def test_a_wrong_layer_hears_which_branch_is_wrong(
    branches: tuple[int, ...], text: str, tmp_path: Path
) -> None:
    found = finding("G1_layer_output", port(TwiceTheGate, branches=branches), tmp_path)
    assert text in found["text"]


def test_packed_sequences_are_asked_for_whatever_the_batch_is_limited_to(tmp_path: Path) -> None:
    found = finding("G4_varlen", port(SequencesLeak, limits={"batch": (2,)}), tmp_path)
    assert found["clause"] == "G4"


@pytest.mark.parametrize("name", ["G4_varlen", "G4_varlen_gradients"])
def test_limits_of_what_no_layer_has_do_not_take_its_sequences_away(
    name: str, tmp_path: Path
) -> None:
    """Nothing of a layer reads `indices`, so that its cases have what they have."""
    case = Case(head_dim=8, value_dim=2, model_dim=8, q_len=5, kv_len=5)
    right, options = port(limits={"indices": ("all",)}), Options(case=case, findings=tmp_path)
    found = run_property(PROPERTIES[name], right, options)
    assert (found.finding, found.cases) == (None, 1)


def test_a_norm_may_have_the_epsilon_of_its_dtype(tmp_path: Path) -> None:
    """Who follows torch's default says so, and is right in float64 as well."""
    numerics = {"float64": "fp64", "float32": "fp32"}
    for value in ("machine_eps", True):
        semantics = (dataclasses.replace(PAPER, input_norm=value),)
        asked = port(NormOfTorch, semantics=semantics, numerics=numerics)
        found = record("G1_layer_output", asked, tmp_path, shrink=False).finding
        assert (found is None) == (value == "machine_eps"), found


# --- who is to blame: what was not decided is not right -------------------------------------------


class LargestImportance(Selector):
    """The largest share of a group's heads, where their sum is meant."""

    def scores(self, case: Case, *keys: Any) -> Any:
        ungrouped = dataclasses.replace(case.semantics, share_selection=False)
        each = super().scores(dataclasses.replace(case, semantics=ungrouped), *keys)
        return each.reshape(case.batch, case.kv_heads, case.group_size, *each.shape[2:]).max(2)


class ChoosesByTheLargest(LayerInSteps):
    selector = LargestImportance()


class KeysInterleaved(InterleavedHeads):
    def kv_head_of_values(self, case: Case) -> Any:
        return np.arange(case.q_heads) // case.group_size


class KeysOfOtherHeads(LayerInSteps):
    kernel = KeysInterleaved()


SEVERAL: dict[str, Any] = {
    "head_dim": 8, "value_dim": 8, "model_dim": 8, "q_heads": 2, "sliding_window_size": 2
}  # fmt: skip
FINER = SEVERAL | {"compress_block_size": 4, "compress_block_sliding_stride": 2, "seed": 1}


@pytest.mark.parametrize("offered", [("layer",), ("layer", "layer_with_blocks")])
@pytest.mark.parametrize(
    ("base", "case"),
    [
        (WindowOfPadding, Case(q_len=5, kv_len=5, semantics=BOTH_WAYS, **SEVERAL)),
        (
            ChoosesByTheLargest,
            Case(q_len=12, kv_len=12, semantics=TURNED, selection_block_size=2, **FINER),
        ),
        (
            KeysOfOtherHeads,
            Case(q_len=6, kv_len=6, semantics=TURNED, kv_heads=2, **SEVERAL | {"q_heads": 4}),
        ),
    ],
    ids=["padding", "importance", "heads"],
)
def test_the_rotation_is_not_blamed_for_what_nothing_decides(
    base: type, case: Case, offered: tuple[str, ...], tmp_path: Path
) -> None:
    """With to_q = 0 all scores tie: what such rows hold says nothing, if no choice is handed in."""
    semantics = (case.semantics,)
    asked = port(base, semantics=semantics, offers=lambda method: method in offered)
    found = finding("G1_layer_output", asked, tmp_path, case=case)
    assert found["clause"] == "G1" and "to_q = 0" not in found["text"], found["text"]


def test_a_rotation_that_is_wrong_is_still_blamed(tmp_path: Path) -> None:
    """Without a choice handed in, and although no other value of the switch would explain it."""
    case = Case(q_len=6, kv_len=6, semantics=TURNED, **SEVERAL)
    asked = port(RotaryByHalves, semantics=(TURNED,), offers=lambda method: method == "layer")
    found = finding("G1_layer_output", asked, tmp_path, case=case)
    assert found["clause"] == "G2" and "with to_q = 0" in found["text"]


@pytest.mark.parametrize("name", ["G3_decode", "G4_varlen", "G4_varlen_gradients"])
def test_what_layer_cannot_be_asked_hides_no_finding(name: str, tmp_path: Path) -> None:
    """Limits of one method are none of another's, which would tell the finding better."""

    class Doubled(OracleImplementation):
        def decode(self, *given: Any) -> Any:
            return 2 * super().decode(*given)

        def varlen(self, *given: Any) -> Any:
            return 2 * super().varlen(*given)

        def varlen_vjp(self, *given: Any) -> Any:
            dx, dweights = super().varlen_vjp(*given)
            return 2 * dx, dweights

    elsewhere = {"layer*": {"kv_len": range(100, 104)}}
    found = finding(name, port(Doubled, limits_of=elsewhere), tmp_path)
    assert found["clause"] == name[:2]


class NumbersForNaN(OracleImplementation):
    """Numbers where the definition has NaN."""

    name = "numbers for NaN"

    def layer(self, *given: Any) -> Any:
        return np.nan_to_num(super().layer(*given))

    def layer_with_blocks_vjp(self, *given: Any) -> Any:
        dx, dweights = super().layer_with_blocks_vjp(*given)
        return np.nan_to_num(dx), {name: np.nan_to_num(dw) for name, dw in dweights.items()}


@pytest.mark.parametrize("name", ["G1_layer_output", "G1_layer_gradients_with_blocks"])
def test_a_layer_has_nan_where_the_definition_has_it(name: str, tmp_path: Path) -> None:
    """And a right one is not accused: numbers stand beside them."""
    semantics = dataclasses.replace(PAPER, empty_row=PerBranch("nan", "zero", "zero"))
    wrong = port(NumbersForNaN, semantics=(semantics,))
    assert "must be exactly nan" in finding(name, wrong, tmp_path)["text"]
    assert trials.passes(name, port(semantics=(semantics,)), tmp_path).cases > 10
