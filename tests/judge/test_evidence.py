"""What is evidence: calls that leave their arguments alone, elements compared, enough cases."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

import trials
from nsa_ref.semantics import LUCIDRAINS, PAPER
from nsa_ref.testing import Attention, Case, Implementation, OracleImplementation
from nsa_ref.testing.branches import COMPRESS, FINE
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.drawing import REDRAWS
from nsa_ref.testing.evidence import reachable, weighed
from nsa_ref.testing.implementation import NotOffered, TorchImplementation
from nsa_ref.testing.lattice import CLAUSE_EDGES
from nsa_ref.testing.loading import Declared
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.report import Clause, clauses, show
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import Record
from port_zoo import Returns, SlidingMask

# --- arguments that a call writes into ------------------------------------------------------------


class Overwrites(OracleImplementation):
    """Right, and when it is done one of its arguments holds something else."""

    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32"}

    def __init__(self, method: str, place: int | tuple[int, str]) -> None:
        self.method, self.place = method, place

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        called = getattr(type(self), method)

        def call(case: Case, *given: Any) -> Any:
            found = called(self, case, *given)
            number, *name = self.place if isinstance(self.place, tuple) else (self.place,)
            argument = given[number].get(name[0]) if name else given[number]
            if argument is not None:
                argument[...] = argument + 1
            return found

        if method == self.method:
            setattr(self, method, call)
        return super().run(method, case, *arguments)


@pytest.mark.parametrize(
    ("name", "method", "place", "argument"),
    [
        ("A1_sliding_output", "sliding", 0, "q"),
        ("A1_compress_output", "compress", 4, "mem_v"),
        ("A3_sliding_gradients", "sliding_vjp", 3, "d_out"),
        ("F1_fine_mask_as_exposed", "fine_mask", 0, "block_indices"),
        ("I2_selection", "select", 1, "k_cmp"),
        ("C4_pool", "pool", (1, "weight"), "weights['weight']"),
        ("G1_layer_output", "layer", (0, "to_q.weight"), "weights['to_q.weight']"),
    ],
)
def test_a_port_that_overwrites_an_argument_is_found(
    name: str, method: str, place: Any, argument: str, tmp_path: Path
) -> None:
    """With each of ten seeds."""
    for seed in range(10):
        port = Overwrites(method, place)
        found = trials.finding(name, port, tmp_path, shrink=False, seed=seed)
        assert f"{method} wrote into its argument {argument}: " in found["text"]


def dense(case: Case, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """Sliding attention in torch."""
    import torch

    k, v = (x.repeat_interleave(case.group_size, dim=1) for x in (k, v))
    p = torch.arange(case.q_len)[:, None] + case.kv_len - case.q_len
    j = torch.arange(case.kv_len)
    s = q @ k.mT * case.scale
    s = s.masked_fill((j > p) | (p - j > case.sliding_window_size), -torch.inf)
    return s.softmax(-1).nan_to_num() @ v, s.logsumexp(-1)


class InPlace(TorchImplementation):
    """Scales q where it lies; of the backward, k as well."""

    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32"}

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        import torch

        class Forgets(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, k: Any) -> Any:
                ctx.save_for_backward(k)
                return k.clone()

            @staticmethod
            def backward(ctx: Any, d: Any) -> Any:
                ctx.saved_tensors[0].data.zero_()
                return d

        found = Attention(*dense(case, q, Forgets.apply(k), v))
        if not q.requires_grad:
            q.mul_(2)
        return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("A1_sliding_output", "sliding wrote into its argument q: "),
        ("A3_sliding_gradients", "sliding_vjp wrote into its argument k: "),
    ],
)
def test_so_is_a_torch_port_in_either_direction(name: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="tensors are overwritten here")
    assert words in trials.finding(name, InPlace(), tmp_path)["text"]


def test_what_an_adapter_does_to_its_dict_is_its_own(tmp_path: Path) -> None:
    """Its arrays are not: what is popped or replaced there was not written into."""

    class Pops(OracleImplementation):
        semantics = (PAPER,)

        def pool(self, case: Case, x: Any, weights: Any) -> Any:
            found = super().pool(case, x, weights)
            weights["weight"] = None
            weights.popitem()
            return found

    trials.passes("C4_pool", Pops(), tmp_path)


# --- masks that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "an empty dict"),
        ({"mine": {}}, "an empty dict"),
        ({"mine": np.ones(1, bool), "others": {}}, "an empty dict"),
        ({"a": {"b c": np.ones(1, bool)}, "a b": {"c": np.ones(1, bool)}}, "two masks 'a b c'"),
        ({1: np.ones(1, bool), "1": np.ones(1, bool)}, "two masks '1'"),
    ],
)
def test_a_dict_without_masks_shows_none(value: Any, words: str, tmp_path: Path) -> None:
    found = trials.finding("W1_sliding_mask_as_exposed", Returns("dict", value), tmp_path)
    assert words in found["text"]


def test_a_dict_of_masks_may_hold_dicts(tmp_path: Path) -> None:
    class Nested(SlidingMask):
        def sliding_mask(self, case: Case) -> Any:
            mask = super().sliding_mask(case)
            return {"a": {"b": mask, "c": mask}, "d": mask}

    trials.passes("W1_sliding_mask_as_exposed", Nested(), tmp_path)


# --- cases in which nothing is asked, or nothing compared -----------------------------------------


class NeverOffered(OracleImplementation):
    """Overrides everything, and offers nothing once it is called."""

    name = "never"
    numerics: ClassVar[dict[str, str]] = {"float64": "fp64"}

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        raise NotOffered("today")


class Limited(OracleImplementation):
    """The definition of a few cases."""

    name = "limited"
    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32"}

    def __init__(self, **limits: Any) -> None:
        self.limits = limits


def decided(implementation: Implementation, folder: Path) -> dict[str, int]:
    """How many cases each property decides, where it decides any; and it must find nothing.

    The three branches are asked alike: of one of them is enough.
    """
    found = {}
    for prop in PROPERTIES.values():
        if prop.branch in (COMPRESS, FINE) and prop.method in ("compress", "fine"):
            continue
        few = dataclasses.replace(prop, examples=2)
        record = run_property(few, implementation, Options(findings=folder))
        assert record.finding is None, record.finding["text"]
        if record.cases:
            found[prop.name] = record.cases
    return found


@pytest.mark.parametrize(
    ("implementation", "not_about_it"),
    [
        (NeverOffered(), ()),
        (Limited(batch=(0,)), ("varlen",)),  # packed sequences have no batch
        (Limited(q_len=(0,), batch=(1, 2)), ("pool", "windows_as_read")),
    ],
    ids=["never offered", "batch 0", "q_len 0"],
)
def test_a_case_with_nothing_in_it_decides_nothing(
    implementation: Implementation, not_about_it: tuple[str, ...], tmp_path: Path
) -> None:
    """Neither where nothing is called, nor where nothing comes back that could be wrong."""
    for name in decided(implementation, tmp_path):
        assert any(word in name for word in not_about_it), name


def test_an_empty_case_is_said_to_be_one(tmp_path: Path) -> None:
    """It is tried: it must not fail. And it stands on the edge that it is there for."""
    record = trials.record("A1_sliding_output", Limited(batch=(0,)), tmp_path)
    assert record.inconclusive == {("no element",): record.inconclusive.total()}
    assert {"batch 0"} <= set(record.edges) <= {"batch 0", "q_len 0"}
    (clause,) = clauses([record], [])
    assert clause.verdict == "inconclusive"


# --- dtypes ---------------------------------------------------------------------------------------


class Widens(OracleImplementation):
    """Gives float64 for whatever it gets, in one method."""

    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"bfloat16": "bf16", "float32": "fp32"}

    def __init__(self, method: str, number: int | None = None) -> None:
        self.method, self.number = method, number

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        found = super().run(method, case, *arguments)
        return self._wide(found, True) if method == self.method else found

    def _wide(self, found: Any, chosen: bool) -> Any:
        if isinstance(found, dict):
            return {name: self._wide(item, chosen) for name, item in found.items()}
        if isinstance(found, tuple):
            wide = [self._wide(x, self.number in (None, i)) for i, x in enumerate(found)]
            return Attention(*wide) if isinstance(found, Attention) else tuple(wide)
        return found.astype(np.float64) if chosen else found


@pytest.mark.parametrize(
    ("name", "port", "tensor"),
    [
        ("A1_sliding_output", Widens("sliding", 0), "sliding out"),
        ("A1_sliding_lse", Widens("sliding", 1), "sliding lse"),
        ("W1_sliding_mask_as_read", Widens("sliding", 0), "sliding out"),
        ("A3_fine_gradients", Widens("fine_vjp", 1), "dk"),
        ("A3_compress_gradients", Widens("compress_vjp", 3), "dk"),
        ("C4_pool", Widens("pool"), "pool"),
        ("C4_pool_gradients", Widens("pool_vjp", 0), "dx"),
        ("G1_layer_output", Widens("layer"), "layer"),
        ("G1_layer_gradients_with_blocks", Widens("layer_with_blocks_vjp", 1), "d"),
        ("G4_varlen", Widens("varlen"), "varlen"),
    ],
)
def test_what_comes_back_has_the_dtype_of_what_went_in(
    name: str, port: Implementation, tensor: str, tmp_path: Path
) -> None:
    """An lse is float32 beside 16 bits; float64 has float64."""
    text = trials.finding(name, port, tmp_path)["text"]
    assert f"{tensor}" in text and " has dtype float64; it must be " in text


def test_an_lse_of_float32_is_right_beside_16_bits(tmp_path: Path) -> None:
    class Sixteen(OracleImplementation):
        numerics: ClassVar[dict[str, str]] = {"bfloat16": "bf16", "float16": "fp16"}

    trials.passes("A1_sliding_lse", Sixteen(), tmp_path)


# --- clauses that are thin ------------------------------------------------------------------------


class Narrow(OracleImplementation):
    """The definition of those cases for which `refuses` is false."""

    name = "narrow"
    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32"}

    def __init__(self, refuses: Callable[[Case], bool], **limits: Any) -> None:
        self.refuses, self.limits = refuses, limits
        self.asked = 0

    def supports(self, case: Case) -> str | None:
        self.asked += 1
        return "it is too narrow" if self.refuses(case) else None


class WrongHeads(Narrow):
    """Query head h reads kv head h modulo their number, in one case of eleven; no other is run."""

    def __init__(self) -> None:
        super().__init__(lambda case: case.seed % 11 != 0)

    def fine(self, case: Case, *tensors: Any) -> Attention:
        heads = np.arange(case.q_heads) % case.kv_heads
        q, *of_kv_heads = tensors
        wide = dataclasses.replace(case, kv_heads=case.q_heads)
        return super().fine(wide, q, *(np.take(x, heads, axis=1) for x in of_kv_heads))


class SaysSoLate(Narrow):
    """Supports every case, and offers next to none once it is called."""

    def __init__(self) -> None:
        super().__init__(lambda case: False)

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        if case.seed % 31:
            raise NotOffered("this seed")
        return super().run(method, case, *arguments)


def judged(clause: str, implementation: Implementation, folder: Path, part: str = "") -> Clause:
    """The verdict of a clause, by all of its properties or by those of one branch."""
    options = Options(findings=folder, shrink=False)
    asked = [prop for prop in PROPERTIES.values() if prop.clause == clause and not prop.extent]
    asked = [prop for prop in asked if part in ("", prop.part)]
    records = [run_property(prop, implementation, options) for prop in asked]
    findings = [record.finding for record in records if record.finding]
    verdicts = clauses(records, findings, evidence=weighed(records, [implementation]))
    return next(verdict for verdict in verdicts if verdict.id == clause)


def test_a_case_that_is_refused_is_drawn_again(tmp_path: Path) -> None:
    port = Narrow(lambda case: case.seed % 2 != 0)
    record = trials.passes("F1_fine_mask_as_exposed", port, tmp_path)
    tried = record.cases + record.inconclusive.total()  # one without an element decides nothing
    assert tried == record.asked
    assert record.not_offered["it is too narrow"] == port.asked - tried > 0


def test_what_refuses_everything_is_soon_left_alone(tmp_path: Path) -> None:
    port = Narrow(lambda case: True)
    record = trials.record("F1_fine_mask_as_exposed", port, tmp_path)
    assert not record.cases and record.asked < port.asked <= (1 + REDRAWS) * record.asked


def test_a_mistake_behind_refusals_is_no_pass(tmp_path: Path) -> None:
    """With what was left of their cases, all passed."""
    assert judged("A1", WrongHeads(), tmp_path, "fine").verdict in ("fail", "thin")


def test_a_small_share_of_what_was_asked_is_thin(tmp_path: Path) -> None:
    clause = judged("W1", SaysSoLate(), tmp_path)
    assert clause.verdict == "thin" and clause.is_undecided
    assert re.search(r"^narrow decided \d+ of the \d+ cases that it is asked$", clause.against[0])


def test_a_clause_no_case_of_which_stood_on_its_edge_is_thin(tmp_path: Path) -> None:
    """Which query head reads which kv head shows in several groups alone."""
    clause = judged("A1", Narrow(lambda case: case.q_heads > case.kv_heads > 1), tmp_path, "fine")
    assert clause.verdict == "thin"
    said = r"narrow refused every case with this: several groups \(\d+ cases\)"
    assert re.search(said, clause.to_json()["reason"])


@pytest.mark.parametrize(
    ("clause", "limits"),
    [
        ("F2", {"kv_len": (16, 32), "selection_block_size": (8,)}),
        ("W3", {"sliding_window_size": (2,), "kv_len": (5, 9)}),
        ("A4", {"num_selected_blocks": (9,), "selection_block_size": (4,), "kv_len": (9, 12)}),
        ("A2", {"q_len": "== kv_len"}),
    ],
)
def test_what_lies_outside_of_the_limits_is_not_offered(
    clause: str, limits: dict[str, Any], tmp_path: Path
) -> None:
    """F2 passed with cases none of which had a short block."""
    part = "sliding" if clause == "A2" else ""  # whose rows see themselves, if no other key
    verdict = judged(clause, Narrow(lambda case: False, **limits), tmp_path, part)
    assert verdict.verdict == "not_offered"
    reason = f"no case that narrow declares has this: {CLAUSE_EDGES[clause][0]}"
    assert reason in verdict.to_json()["reason"]


@pytest.mark.parametrize("clause", CLAUSES)
def test_a_clause_is_about_edges_that_its_properties_reach(clause: str) -> None:
    """Else what is right would be thin."""
    asked = [prop for prop in PROPERTIES.values() if prop.clause == clause]
    edges = CLAUSE_EDGES[clause]
    assert edges and reachable(edges, asked, OracleImplementation()) == set(edges)


def test_a_thin_clause_is_shown_with_what_was_asked_of_it() -> None:
    record = Record(name="F1_fine_mask_as_read", clause="F1", cases=4, asked=44)
    record.implementation, record.edges = "narrow", Counter(CLAUSE_EDGES["F1"])
    evidence = weighed([record], [Narrow(lambda case: False)])
    console = Console(width=80, record=True, file=io.StringIO())
    show(console, [record], [], title="narrow", seconds=1.0, evidence=evidence)
    text = console.export_text()
    assert re.search(r"F1 +thin +4 of 44 ", text)
    assert "F1 thin: narrow decided 4 of the 44 cases that it is asked\n" in text


def test_a_declaration_survives_its_way_to_a_process_that_does_not_load_it() -> None:
    port = Narrow(lambda case: False, kv_len=range(3), layout=("strided",), q_heads={np.int64(4)})
    port.semantics = (PAPER, LUCIDRAINS)
    sent = json.loads(json.dumps(Declared(port).to_json()))
    back = Declared.from_json(sent)
    assert (back.name, back.device, back.numerics) == (port.name, port.device, port.numerics)
    assert tuple(back.semantics) == port.semantics
    assert back.limits == {"kv_len": range(3), "layout": ["strided"], "q_heads": [4]}
