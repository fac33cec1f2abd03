"""FlexAttention's Triton kernels and those of fine, in Triton's interpreter: no GPU needed.

They walk the block lists in both directions, which nothing else does on a CPU: out and dq the kv
lists, dk and dv the query lists, their transposes. `nsa-ref verify nsa_fast --device interpreter`
asks them every clause; here are wrong lists, wrong kernels, and what the judge does not see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch.nn.attention.flex_attention import AuxOutput  # noqa: E402

import nsa_fast  # noqa: E402
from broken_nsa_fast import BROKEN_GATES, BUILDS, in_place, with_mistakes  # noqa: E402
from interpreted import runs  # noqa: E402
from nsa_fast import fine_lists, flex, interpreter, tiles  # noqa: E402
from nsa_fast.adapter import (  # noqa: E402
    NsaFast,
    NsaFastCompiled,
    NsaFastInterpreted,
    NsaFastLayer,
    NsaFastLayerInterpreted,
)
from nsa_ref.semantics import LUCIDRAINS, PAPER, Semantics  # noqa: E402
from nsa_ref.testing import Case, probes  # noqa: E402
from nsa_ref.testing.branches import COMPRESS, FINE, SLIDING, Branch  # noqa: E402
from nsa_ref.testing.drawing import asked_of, generate  # noqa: E402
from nsa_ref.testing.loading import CannotRun, load  # noqa: E402
from nsa_ref.testing.options import Options  # noqa: E402
from nsa_ref.testing.properties import PROPERTIES  # noqa: E402
from nsa_ref.testing.properties.common import bounds_of  # noqa: E402
from nsa_ref.testing.running import run_property  # noqa: E402
from nsa_ref.testing.verdicts import (  # noqa: E402
    FAILURES,
    Broken,
    Inconclusive,
    Raised,
    WrongMask,
)
from trials import finding  # noqa: E402

INTERPRETED = NsaFastInterpreted()  # one process for all that can share it
# every dtype is graphs of its own, of seconds each: 16 bits are asked once, of blocks of 16 rows
INTERPRETED.numerics = {"float32": "fp32"}
LAYER = NsaFastLayerInterpreted(process=INTERPRETED.process)

#: Four selection blocks, three chosen: every row has full lists and a partial one.
CASE = Case(
    dtype="float32",
    batch=2,
    q_heads=2,
    kv_heads=2,
    q_len=3,
    kv_len=60,
    head_dim=64,
    value_dim=32,
    compress_block_sliding_stride=4,
    selection_block_size=16,
    num_selected_blocks=3,
)
#: build -> the gradients that read other keys than they should, or the same ones twice. Where dq
#: does, the forward does as well. Of PartialTakenForFull, BlockNamedTwice and StridesConfused only
#: the forward is asked here; their gradients are there for the reader, and compared with nothing.
MISREAD = {
    "KvBlockLost": {"dq"},
    "BlockNamedTwice": {"dq"},
    "ListsTooShort": {"dq", "dk", "dv"},
    "PartialTakenForFull": {"dq", "dk", "dv"},
    "StridesConfused": {"dq", "dk", "dv"},
    "QueryBlockLost": {"dk", "dv"},
    "QueryBlockNamedTwice": {"dk", "dv"},
    "QueryPartialTakenForFull": {"dk", "dv"},
    "QueryStridesConfused": {"dk", "dv"},
    "CrowdedRowLost": {"dk", "dv"},
}
#: Nine selection blocks, one chosen out of the first five: some are crowded.
CROWDED_CASE = dataclasses.replace(CASE, kv_len=130, num_selected_blocks=1, indices="few")
FORWARD = PROPERTIES["F1_fine_mask_as_read"]
NON_CAUSAL = dataclasses.replace(PAPER, causal=False)
OWN_BLOCK_EXTRA = dataclasses.replace(PAPER, own_block_extra=True)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts the kernels of a broken build into the process."""

    def planted(build: str) -> None:
        (broken,) = BUILDS[build]("interpreter")
        monkeypatch.setattr(INTERPRETED, "kernels", broken.kernels)

    return planted


@runs
@pytest.mark.parametrize("build", [build for build in MISREAD if "dq" in MISREAD[build]])
def test_wrong_kv_lists_are_read_out(build: str, plant: Callable[[str], None]) -> None:
    """In the forward; and, asked of two of them, in what of the backward walks the same lists."""
    plant(build)
    with pytest.raises(Broken) as found:
        FORWARD.run(INTERPRETED, CASE)
    assert found.value.clause == "F1" and isinstance(found.value.fault, WrongMask)
    assert found.value.fault.reading == "fine, forward read out by one-hot values"
    if build not in ("KvBlockLost", "ListsTooShort"):
        return
    mask = FINE.mask(CASE, CASE.block_indices())
    patterns = probes.backward_patterns(INTERPRETED, FINE, CASE, mask)
    assert {pattern.gradient for pattern in patterns if pattern.wrong().any()} == MISREAD[build]


@runs
@pytest.mark.parametrize(
    "build", ["QueryBlockNamedTwice", "QueryPartialTakenForFull", "QueryStridesConfused"]
)
def test_wrong_query_lists_are_wrong_in_dk_and_dv_alone(
    build: str, plant: Callable[[str], None]
) -> None:
    plant(build)
    FORWARD.run(INTERPRETED, CASE)
    assert wrong_gradients(CASE) == MISREAD[build]


def wrong_gradients(case: Case) -> set[str]:
    """Those of the fine branch that are past their bounds."""
    inputs, d = FINE.inputs(case), case.upstream_gradients()
    mask = FINE.mask(case, inputs.block_indices)
    found = FINE.backward(INTERPRETED, case, inputs, *d)
    right = FINE.attend_vjp(case, mask, inputs, *d)
    bounds = bounds_of(FINE, INTERPRETED, case, inputs, mask, *d)
    return {
        name
        for name, have, want in zip(("dq", "dk", "dv"), found, right)
        if not (abs(have - want) <= getattr(bounds, name)).all()
    }


#: Tiles of 8 tokens, the last of them short; the first blocks have several parts of tokens.
TILES_CASE = dataclasses.replace(
    CASE, batch=1, q_heads=16, q_len=19, kv_len=60, num_selected_blocks=2, indices="few"
)
#: broken tiles -> the gradients that are wrong, as MISREAD
MISREAD_TILES = {
    "MemberLost": {"dq"},
    "AllAreMembers": {"dq"},
    "WrongMember": {"dq"},
    "TileListShort": {"dq"},
    "TileBlockTwice": {"dq"},
    "TokenTakenForTheNext": {"dk", "dv"},
    "FirstPartAgain": {"dk", "dv"},
    "ChunksPlacedOnTheFirst": {"dk", "dv"},
    "PlacedOneBehind": {"dk", "dv"},
}


def _of_small_parts(make: Callable[[str], NsaFast], device: str) -> NsaFast:
    from nsa_fast import fine_list_kernels

    # for good, in the process: other tests ask the same of parts and chunks of any size
    fine_lists.PART, fine_list_kernels.LEAST_TOKENS = 8, 4
    return make(device)


@runs
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 2},
        {"dtype": "bfloat16"},
        {"q_heads": 32, "q_len": 7, "kv_len": 90, "head_dim": 40, "value_dim": 24},
        {"q_heads": 24, "selection_block_size": 20, "semantics": NON_CAUSAL},
        {"q_heads": 24, "kv_heads": 1, "q_len": 9, "kv_len": 5, "selection_block_size": 4},
        {"num_selected_blocks": 0, "semantics": OWN_BLOCK_EXTRA},
    ],
)
def test_tiles_of_several_tokens(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size that the fine branch's own kernels compile in, and lists of several parts."""
    monkeypatch.setattr(INTERPRETED, "numerics", NsaFastInterpreted.numerics)
    monkeypatch.setattr(INTERPRETED, "limits", {})
    monkeypatch.setattr(INTERPRETED, "semantics", (PAPER, NON_CAUSAL, OWN_BLOCK_EXTRA))
    small = functools.partial(_of_small_parts, NsaFastCompiled)
    monkeypatch.setattr(INTERPRETED, "kernels", small)
    case = dataclasses.replace(TILES_CASE, **changes)
    for name in ("A1_fine_output", "A1_fine_lse", "A3_fine_gradients"):
        PROPERTIES[name].run(INTERPRETED, case)


def _lists_that_differ() -> list[tuple[int, ...]]:
    """In the process: sizes whose transposed lists are not those that a look at all tokens finds.

    Chunks are of 4 tokens, the most of them 3, or longer ones; one sequence is a single token.
    """
    from nsa_fast import fine_list_kernels

    generator, found = torch.Generator().manual_seed(0), []
    changed = mock.patch.multiple(fine_list_kernels, CHUNKS=3, LEAST_TOKENS=4, COUNTED=8)
    for sizes in ((1, 2, 11, 3, 5), (2, 3, 33, 4, 9), (1, 1, 1, 1, 1), (1, 1, 7, 0, 2)):
        batch, heads, q_len, slots, blocks = sizes
        keys = torch.rand(batch, heads, q_len, blocks + slots, generator=generator)
        chosen = keys.argsort(dim=-1)[..., :slots].clamp(max=blocks)
        with changed:
            tokens, starts = fine_list_kernels.transposed(chosen, blocks)
        rows = (chosen[..., None] == torch.arange(blocks)).any(dim=3).flatten(0, 1).mT.flatten(0, 1)
        lists = [row.nonzero().flatten().tolist() for row in rows]
        pairs = zip(starts.tolist(), starts[1:].tolist())
        if [tokens[first:stop].tolist() for first, stop in pairs] != lists:
            found.append(sizes)
    return found


@runs
def test_the_tokens_of_a_block_are_listed_in_order() -> None:
    """Sums over them, dk and dv, have the same bits in every run."""
    assert INTERPRETED.process.call(_lists_that_differ) == []


class _InFlexAttention(NsaFastCompiled):
    """In the process: the fine branch without kernels of its own."""

    def run(self, *given: Any) -> Any:
        with mock.patch.object(fine_lists, "why_not", lambda *_, **__: "to be compared"):
            return super().run(*given)

    def run_vjp(self, *given: Any) -> Any:
        with mock.patch.object(fine_lists, "why_not", lambda *_, **__: "to be compared"):
            return super().run_vjp(*given)


@runs
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_of_the_fine_branch_agree_with_flexattention(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bounds of both; and not to the bit, or one path would have been taken twice."""
    monkeypatch.setattr(INTERPRETED, "numerics", NsaFastInterpreted.numerics)
    case = dataclasses.replace(TILES_CASE, dtype=dtype)
    inputs, d = FINE.inputs(case), case.upstream_gradients()
    bounds = bounds_of(FINE, INTERPRETED, case, inputs, FINE.mask(case, inputs.block_indices), *d)
    found = []
    for kernels in (NsaFastCompiled, _InFlexAttention):
        monkeypatch.setattr(INTERPRETED, "kernels", kernels)
        out, lse = FINE.forward(INTERPRETED, case, inputs)
        found.append([out, lse, *FINE.backward(INTERPRETED, case, inputs, *d)])
    names = ("out", "lse", "dq", "dk", "dv")
    differ = {name: own != other for name, own, other in zip(names, *found)}
    for name, own, other in zip(names, *found):
        apart = np.subtract(own, other, where=differ[name], out=np.zeros_like(own))
        assert (abs(apart) <= 2 * getattr(bounds, name)).all(), name
    assert any(where.any() for where in differ.values())


@runs
@pytest.mark.parametrize("build", MISREAD_TILES)
def test_wrong_tiles_are_read_out(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = functools.partial(with_mistakes, build, NsaFastCompiled)
    monkeypatch.setattr(INTERPRETED, "kernels", functools.partial(_of_small_parts, wrong))
    if "dq" in MISREAD_TILES[build]:
        with pytest.raises(Broken) as found:
            FORWARD.run(INTERPRETED, TILES_CASE)
        assert found.value.clause == "F1" and isinstance(found.value.fault, WrongMask)
    else:
        FORWARD.run(INTERPRETED, TILES_CASE)
    assert wrong_gradients(TILES_CASE) >= MISREAD_TILES[build]
    exposed = PROPERTIES["F1_fine_mask_as_exposed"]
    with pytest.raises(Broken):
        exposed.run(INTERPRETED, TILES_CASE)


#: a mistake of a kernel -> a function of its module, what stands in for it, and what is wrong
KERNEL_MISTAKES: dict[str, tuple[str, Callable[..., Any], set[str]]] = {
    "a token has the bit of the next": (
        "_is_member",
        lambda right, entry, token: right(entry, token + 1),
        {"out", "dq"},
    ),
    "a row sees the key behind its own": (
        "_last_seen",
        lambda right, position, *rest: right(position + 1, *rest),
        {"out", "dq", "dk", "dv"},
    ),
    "the last block of a tile is not read": (
        "_list_length",
        lambda right, *given: right(*given) - 1,
        {"out", "dq"},
    ),
    "the last token of a part is lost": (
        "_part_stop",
        lambda right, *given: right(*given) - 1,
        {"dk", "dv"},
    ),
    "the last part of a block is not added": (
        "_parts_stop",
        lambda right, *given: right(*given) - 1,
        {"dk", "dv"},
    ),
    "the last token of a chunk is not listed": (
        "_chunk_stop",
        lambda right, *given: right(*given) - 1,
        {"dk", "dv"},
    ),
    "tokens of a block are listed as its neighbour's": (
        "_cell",
        lambda right, cells, block: right(cells, block ^ 1),
        {"dk", "dv"},
    ),
}


class _Mistaken(NsaFastCompiled):
    """In the process: kernels of the fine branch with a mistake of KERNEL_MISTAKES."""

    def __init__(self, mistake: str, device: str) -> None:
        super().__init__(device)
        self.mistake = mistake

    def run(self, *given: Any) -> Any:
        with self._made():
            return super().run(*given)

    def run_vjp(self, *given: Any) -> Any:
        with self._made():
            return super().run_vjp(*given)

    def _made(self) -> contextlib.AbstractContextManager[None]:
        from nsa_fast import fine_kernels, fine_list_kernels

        name, wrong, _ = KERNEL_MISTAKES[self.mistake]
        kernels = fine_kernels if hasattr(fine_kernels, name) else fine_list_kernels
        return in_place(((kernels, name, wrong),))


@runs
@pytest.mark.parametrize("mistake", KERNEL_MISTAKES)
def test_a_mistake_of_a_kernel_is_read_out(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of what walks the lists is not right, or of what makes them."""
    wrong = functools.partial(_Mistaken, mistake)
    monkeypatch.setattr(INTERPRETED, "kernels", functools.partial(_of_small_parts, wrong))
    found = KERNEL_MISTAKES[mistake][2]
    if "out" in found:
        with pytest.raises(Broken) as broken:
            FORWARD.run(INTERPRETED, TILES_CASE)
        assert broken.value.clause == "F1" and isinstance(broken.value.fault, WrongMask)
    else:
        FORWARD.run(INTERPRETED, TILES_CASE)
    assert wrong_gradients(TILES_CASE) >= found - {"out"}


@runs
def test_crowded_columns_get_their_gradients_beside_the_kernels(
    plant: Callable[[str], None],
) -> None:
    assert wrong_gradients(CROWDED_CASE) == set()
    plant("CrowdedRowLost")
    assert wrong_gradients(CROWDED_CASE) == {"dk", "dv"}


@runs
def test_a_backward_that_lost_a_query_block_is_read_out(plant: Callable[[str], None]) -> None:
    """And reported as the backward's, though the forward is right."""
    plant("QueryBlockLost")
    with pytest.raises(Broken) as found:
        PROPERTIES["A3_fine_mask_as_read_backward"].run(INTERPRETED, CASE)
    assert found.value.clause == "A3" and isinstance(found.value.fault, WrongMask)
    assert found.value.fault.gradient and found.value.fault.actual == 0


@runs
@pytest.mark.parametrize("branch", [SLIDING, COMPRESS], ids=lambda b: b.name)
def test_lists_of_several_blocks_are_walked(branch: Branch) -> None:
    """Blocks of these branches are 128 tokens: two of rows, and two of columns."""
    case = dataclasses.replace(
        CASE,
        q_len=130,
        kv_len=132 if branch is SLIDING else 300,
        compress_block_size=2,
        compress_block_sliding_stride=2,
        sliding_window_size=1,
    )
    halves = np.split(branch.mask(case, None)[0, 0], [128])
    blocks = [bool(block.any()) for rows in halves for block in np.split(rows, [128], axis=1)]
    # of the window's blocks, the last rows do not need the first columns
    assert blocks == ([True, True, False, True] if branch is SLIDING else [True] * 4)
    PROPERTIES[f"A3_{branch.name}_gradients"].run(INTERPRETED, case)


@runs
@pytest.mark.parametrize(
    ("name", "tokens", "semantics"),
    [
        ("A4_layer_gradients", 40, LUCIDRAINS),
        ("G3_decode", 10, LUCIDRAINS),
        ("G1_layer_output", 40, PAPER),  # its choice is Triton's, with the compress branch's lse
    ],
)
def test_the_whole_layer_runs_on_the_kernels(name: str, tokens: int, semantics: Semantics) -> None:
    case = dataclasses.replace(
        CASE,
        semantics=semantics,
        batch=1,
        q_len=tokens,
        kv_len=tokens,
        compress_block_size=8,
        num_mem_kv=1,
        num_selected_blocks=2,
        sliding_window_size=20,
    )
    PROPERTIES[name].run(LAYER, case)


#: A mistake of a layer's own kernels -> a property that finds it, in any of its cases: bounds of
#: other outputs in 16 bits admit most of them.
SHOWN_BY = dict.fromkeys(BROKEN_GATES, "G1_layer_output_in_exact_numbers") | {
    "GradientsOfFineLost": "G1_layer_gradients_in_exact_numbers",
    "all is turned back": "G2_layer_rotation",
}


@runs
@pytest.mark.parametrize("build", SHOWN_BY)
def test_verify_finds_what_is_wrong_in_a_layers_kernels(build: str, tmp_path: Path) -> None:
    """In the few cases that it draws."""
    made = functools.partial(with_mistakes, build, NsaFastLayer)
    wrong = NsaFastLayerInterpreted(made, INTERPRETED.process)
    found = finding(SHOWN_BY[build], wrong, tmp_path, shrink=False)
    assert found["clause"] == SHOWN_BY[build][:2]
    assert found["kind"] not in FAILURES, found["text"]


class _Launching(NsaFastLayer):
    """In the process: remembers which kernels the last method launched."""

    launched: ClassVar[set[str]] = set()

    def run(self, *given: Any) -> Any:
        return self._remembered(super().run, *given)

    def run_vjp(self, *given: Any) -> Any:
        return self._remembered(super().run_vjp, *given)

    def _remembered(self, run: Callable[..., Any], *given: Any) -> Any:
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__
        self.launched.clear()

        def noted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launched.add(executor.fn.__name__)
            return launch(executor, *args, **kwargs)

        with mock.patch.object(GridExecutor, "__call__", noted):
            return run(*given)


def _last_launched() -> set[str]:
    """In the process."""
    return _Launching.launched


@runs
@pytest.mark.parametrize(
    "name", ["G2_layer_rotation", "G1_layer_gradients_with_blocks", "G3_decode", "G4_varlen"]
)
def test_what_verify_asks_of_a_layer_is_launched_as_on_a_gpu(name: str) -> None:
    """Gates, turns, attention and the choice of blocks: none falls back on plain torch."""
    layer, prop = NsaFastLayerInterpreted(_Launching, INTERPRETED.process), PROPERTIES[name]
    cases: list[Case] = []
    generate(prop, layer, Options(shrink=False), cases.append)
    assert len(cases) == asked_of(prop, layer, Options())
    for case in cases:
        with contextlib.suppress(Inconclusive):
            prop.run(layer, case)
        launched = INTERPRETED.process.call(_last_launched)
        assert launched >= {"gated_sum", "fine_forward"}
        assert any(kernel.startswith("triton_tem_fused_flex_attention") for kernel in launched)
        assert ("turned_pairs" in launched) == (case.semantics.rotary != "none")
        own_choice = "with_blocks" not in name and case.semantics.importance == "overlap"
        assert ("top_blocks" in launched) == own_choice
        assert ({"gated_sum_backward", "fine_backward_q"} <= launched) == prop.backward


def _asked_as_users_ask() -> dict[str, bool]:
    """In the process: a backward that is run again, under autocast, and what it keeps."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, dim, requires_grad=True) for dim in (64, 64, 32))
    kept: list[Any] = []
    differentiable = flex._Differentiable.apply

    def remembered(function: Callable[..., Any], *inputs: Any) -> Any:
        def run(*inner: Any) -> Any:
            found = function(*inner)
            kept.append(weakref.ref(found[0]))
            return found

        return differentiable(run, *inputs)

    def loss() -> Any:
        with mock.patch.object(flex._Differentiable, "apply", remembered):
            out, lse = nsa_fast.sliding_attention(q, k, v, sliding_window_size=8)
        assert lse is not None
        return out.square().sum() + lse.sum()

    one = loss()
    first = torch.autograd.grad(one, (q, k, v), retain_graph=True)
    again = torch.autograd.grad(one, (q, k, v))
    other = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = torch.autograd.grad(other, (q, k, v))
    q.requires_grad_(False)
    without_q = torch.autograd.grad(loss(), (k, v))
    return {
        "twice": all(map(torch.equal, first, again)),
        "under autocast": all(map(torch.equal, first, under_autocast)),
        "without dq": all(map(torch.equal, first[1:], without_q)),
        "freed": len(kept) == 3 and all(ref() is None for ref in kept),
    }


@runs
def test_a_backward_runs_again_and_is_freed_when_it_does_not() -> None:
    found = INTERPRETED.process.call(_asked_as_users_ask)
    assert found == dict.fromkeys(found, True) and len(found) == 4


def _with_q_as_a_projection_leaves_it() -> dict[str, Any]:
    """In the process: heads side by side, beside the same numbers head by head."""
    from torch._dynamo.utils import counters
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    launch = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    def results(q: Any, k: Any, v: Any) -> list[Any]:
        with mock.patch.object(GridExecutor, "__call__", counted):
            launched.clear()
            out, lse = nsa_fast.sliding_attention(q, k, v, sliding_window_size=8)
            forward = len(launched)
            gradients = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
        launches.append({"forward": forward, "backward": len(launched) - forward})
        return [out, lse, *gradients]

    launches: list[dict[str, int]] = []
    equal, graphs = [], []
    for tokens in (40, 45):
        k, v = (torch.randn(1, 2, tokens, dim, requires_grad=True) for dim in (64, 32))
        by_token = torch.randn(1, tokens, 2, 64, requires_grad=True)
        right = results(by_token.transpose(1, 2).contiguous(), k, v)
        before = counters["stats"]["unique_graphs"]
        found = results(by_token.transpose(1, 2), k, v)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        equal.append(all(map(torch.equal, found, right)))
    stands = found[0].transpose(1, 2).is_contiguous()
    return {"launches": launches, "equal": equal, "graphs": graphs, "out stands as q": stands}


@runs
def test_q_is_read_as_a_projection_leaves_it() -> None:
    """It is not copied; the layout is one graph, whatever the length. So `census` counts."""
    from benchmarks.census import FLEX_LAUNCHES

    found = INTERPRETED.process.call(_with_q_as_a_projection_leaves_it)
    assert found["launches"] == [FLEX_LAUNCHES] * 4
    assert found["equal"] == [True, True] and found["out stands as q"]
    assert found["graphs"] in ([1, 0], [0, 0])  # another test may have compiled it


def test_graphs_are_named_by_what_they_are_guarded_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """dynamo's limit of recompilations is one for each name."""
    monkeypatch.setattr(flex, "TRITON_DEVICES", {"cpu"})
    names: list[str] = []

    def graph(name: str, _: Any) -> Callable[..., Any]:
        names.append(name)

        def run(q: Any, k: Any, v: Any, *_: Any) -> Any:
            assert q.requires_grad == name.endswith("_grad")
            return q * 1, AuxOutput(lse=q[..., 0])

        return run

    monkeypatch.setattr(flex, "_graph", graph)

    def call(batch: int, *, requires_grad: bool = False) -> None:
        q, k, v = (torch.zeros(batch, 1, 4, 16, requires_grad=requires_grad) for _ in "qkv")
        nsa_fast.sliding_attention(q, k, v, sliding_window_size=2, backend="compiled")

    call(1)
    call(2)
    with torch.inference_mode():
        call(2)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "highest" else "highest")
    call(2)
    torch.set_float32_matmul_precision(precision)
    call(2, requires_grad=True)
    assert len(set(names)) == 5
    call(3)
    with torch.no_grad():
        call(2, requires_grad=True)
    assert len(set(names)) == 5


def _inductors_own_tiles(device: str) -> NsaFast:
    # in a process that ends with the test, and without what others have compiled
    torch.compiler.config.force_disable_caches = True
    tiles._Tiles.get_flex_attention_bwd_configs = (
        tiles.InductorChoices.get_flex_attention_bwd_configs
    )
    return NsaFastCompiled(device)


@runs
def test_blocks_of_16_rows_need_tiles_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 sm_90's tile of 64 rows does not divide them, and there is no other."""
    case = dataclasses.replace(CASE, dtype="bfloat16")
    gradients = PROPERTIES["A3_fine_gradients"]
    with pytest.raises(Raised, match="NoValidChoicesError"):
        gradients.run(NsaFastInterpreted(_inductors_own_tiles), case)
    monkeypatch.setattr(INTERPRETED, "numerics", NsaFastInterpreted.numerics)
    gradients.run(INTERPRETED, case)


def _ends_its_process(device: str) -> NsaFast:
    os._exit(3)


@runs
def test_kernels_that_end_their_process_are_a_finding(tmp_path: Path) -> None:
    """And the next call has a process again."""
    interpreted = NsaFastInterpreted(_ends_its_process)
    case = dataclasses.replace(CASE, q_len=2, kv_len=16)
    options = Options(case=case, findings=tmp_path)
    found = run_property(FORWARD, interpreted, options).finding
    assert found is not None
    assert "BrokenProcessPool" in found["text"]
    interpreted.kernels = NsaFastCompiled
    PROPERTIES["F1_fine_mask_as_exposed"].run(interpreted, case)
    # what holds in that process holds nowhere else
    assert "TRITON_INTERPRET" not in os.environ
    assert {"cuda"} == flex.TRITON_DEVICES


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.4.6"}, ""),
        ({"torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.3.5"}, ""),
        ({"torch": "2.13.0+cpu"}, "it needs triton, which is not installed"),
        (
            {"torch": "2.12.0", "triton": "3.7.0", "numpy": "2.4.6"},
            "it needs torch 2.13 with triton 3.7 or torch 2.11 with triton 3.6; here are torch "
            "2.12 and triton 3.7",
        ),
        (
            {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.10.0"},
            "the interpreter of triton 3.6 needs a numpy below 2.4; here is numpy 2.10",
        ),
    ],
    ids=["supported", "supported too", "no triton", "other versions", "numpy too new"],
)
def test_what_is_missing_is_said(
    versions: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert interpreter.missing() == reason
    if reason:
        with pytest.raises(CannotRun, match=f"the interpreter does not run here: {reason}"):
            load("nsa_fast", "interpreter")
        with pytest.raises(RuntimeError, match=reason):
            interpreter.install()


def test_install_wants_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes nothing before it has seen it."""
    monkeypatch.setattr(interpreter, "missing", lambda: "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must be 1"):
        interpreter.install()
