"""What the layer launches at 64k tokens, counted without a GPU: budgets that are kept."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")
pytest.importorskip("triton", reason="what is counted are launches of its kernels")

import nsa_fast.layer  # noqa: E402
from benchmarks import census, paper  # noqa: E402
from nsa_fast import block_masks, fine_lists, gate_kernels  # noqa: E402
from nsa_ref.semantics import PAPER  # noqa: E402

TOKENS = paper.TOKENS
#: direction -> the most launches
BUDGETS = {"forward": 100, "backward": 200}
#: What multiplies every query with every compressed key that it sees, and reads the result.
OF_LOGITS = {"group_probabilities", "top_blocks"}

counted = functools.cache(census.census_of_layer)


def over_budget(found: census.Census) -> list[str]:
    """What is more than it may be, in words."""
    rows = {direction: parts["sum"] for direction, parts in census.table(found).items()}
    said = []
    for direction, most in BUDGETS.items():
        row = rows[direction]
        if row["launches"] > most:
            said.append(f"{row['launches']} launches {direction}")
        said += [f"{row[what]} {what} {direction}" for what in ("syncs", "products") if row[what]]
    return said


def grown(tokens: int, count: Callable[[int], census.Census]) -> set[str]:
    """What more than doubles with the tokens, the logits' own work left out."""
    less, more = ({}, {})
    for found, kinds in ((count(tokens // 2), less), (count(tokens), more)):
        for (*_, kind), amounts in found.counts.items():
            kinds.setdefault(kind, Counter()).update(amounts)
    return {
        kind
        for kind in more.keys() - OF_LOGITS
        if more[kind]["launches"] > less[kind]["launches"]
        or more[kind]["bytes"] > 2.05 * less[kind]["bytes"] + 2**20
    }


def test_a_step_of_64k_tokens_keeps_within_its_budget() -> None:
    assert over_budget(counted(TOKENS)) == []
    chunks = Counter(kind for (*_, kind) in counted(TOKENS).counts)
    assert chunks.keys() >= OF_LOGITS | {"fine_forward", "fine_backward_kv", "FlexAttention"}


def test_rotary_is_one_launch_for_a_tensor_and_a_dozen_for_all() -> None:
    """q and a k for fine and for sliding, and compressed keys, which stand elsewhere."""
    found = census.census_of_layer(1024, semantics=dataclasses.replace(PAPER, rotary="all"))
    rows = census.table(found)
    assert rows["forward"]["sum"]["syncs"] == rows["backward"]["sum"]["syncs"] == 0
    assert rows["forward"]["rotary"]["launches"] <= 4 + 2 * 12
    for direction in rows:
        assert found.counts[direction, "rotary", "turned_pairs"]["launches"] == 4
    assert rows["backward"]["rotary"]["launches"] == 4


def test_the_host_waits_for_no_packed_sequences_whose_places_it_has() -> None:
    """Of like lengths, which are one batch, and of another."""
    found = census.census_of_layer(2048, cu_seqlens=torch.tensor([0, 300, 800, 2048]))
    rows = census.table(found)
    assert rows["forward"]["sum"]["syncs"] == rows["backward"]["sum"]["syncs"] == 0
    assert found.counts["forward", "fine", "fine_forward"]["launches"] == 2


def test_nothing_but_the_logits_grows_with_the_square_of_the_tokens() -> None:
    assert grown(TOKENS, counted) == set()


def test_q_is_copied_by_no_branch() -> None:
    """It is as large as all that the layer returns, and read by its strides."""
    bytes_of_q = TOKENS * paper.LAYER["q_heads"] * paper.LAYER["head_dim"] * 2
    for (direction, part, kind), amounts in counted(TOKENS).counts.items():
        if direction == "forward" and kind in ("clone", "copy", "_to_copy"):
            assert amounts["bytes"] < bytes_of_q, (part, kind)


def test_the_forward_keeps_q_and_three_outputs_once_and_as_they_are() -> None:
    """Nothing else that is as large, and no copy in float32."""
    found = counted(TOKENS)
    kept = [x for part, of in found.kept.items() if part != census.GIVEN for x in of.values()]
    least = TOKENS * paper.LAYER["q_heads"] * paper.LAYER["value_dim"]
    large = [x for x in kept if x.untyped_storage().nbytes() // x.element_size() >= least]
    assert sorted(x.shape[-1] for x in large) == [128, 128, 128, 192]
    assert {x.dtype for x in large} == {census.DTYPE}


def test_a_step_that_a_cuda_graph_captures_waits_for_nothing_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It makes its masks itself, of what stands on the device."""
    made = lambda build, *sizes, **named: build(*sizes, **named)  # noqa: E731
    monkeypatch.setattr(block_masks, "of_sizes", made)
    rows = census.table(census.census_of_layer(1024))
    assert rows["forward"]["sum"]["syncs"] == rows["backward"]["sum"]["syncs"] == 0
    assert rows["forward"]["sliding"]["launches"] > 50


def _with(place: Any, name: str, change: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
    right = getattr(place, name)
    patch.setattr(place, name, lambda *args, **kwargs: change(right, *args, **kwargs))


def test_what_waits_for_the_device_is_over_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_item(right: Any, blocks: Any, num_blocks: int) -> Any:
        return right(blocks, num_blocks if blocks.max().item() else 0)

    def with_copy(right: Any, logits: Any, outs: Any) -> Any:
        return right(logits * torch.tensor(1.0, device=logits.device), outs)

    _with(fine_lists, "parts", with_item, monkeypatch)
    _with(gate_kernels, "gated", with_copy, monkeypatch)
    assert over_budget(census.census_of_layer(1024)) == ["1 syncs forward", "1 syncs backward"]


def test_a_loop_over_chunks_is_over_budget_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_chunks(right: Any, q: Any, *rest: Any, **named: Any) -> Any:
        for rows in q.detach().split(256, dim=2):
            rows.float() @ rows.float().mT
        return right(q, *rest, **named)

    _with(nsa_fast.layer, "fine_attention", in_chunks, monkeypatch)
    found = over_budget(census.census_of_layer(2**15))
    assert len(found) == 2 and found[0].endswith("launches forward")
    assert found[1].endswith("products forward")
    assert grown(2**15, census.census_of_layer) == {"_to_copy", "bmm"}
