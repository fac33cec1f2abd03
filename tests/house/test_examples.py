"""The examples run, write what they say, and their checks can fail."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")
pytest.importorskip("matplotlib", reason="the example draws a picture")

from examples import train_bytes  # noqa: E402

#: A length that no window spans, and more blocks than are selected.
TINY = train_bytes.Setup(
    steps=8,
    batch=4,
    seq_len=40,
    model_dim=24,
    head_dim=4,
    compress_block_size=8,
    compress_block_sliding_stride=4,
    selection_block_size=8,
    num_selected_blocks=2,
    sliding_window_size=8,
    learning_rate=1e-2,
    held_out_every=4,
    held_out_batch=8,
    checks=2,
    checked_tokens=32,
)


def test_both_models_learn_and_the_files_are_written(tmp_path: Path) -> None:
    results = train_bytes.run(TINY, tmp_path)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "training-cpu.json").read_text())
    assert written == json.loads(json.dumps(results))
    for name in ("sparse", "dense"):
        found = written[name]
        assert len(found["training"]) == TINY.steps
        assert all(map(math.isfinite, found["training"]))
        (first, before), *_, (last, after) = found["held_out"]
        assert (first, last) == (0, TINY.steps)
        assert after < before
    checks = written["sparse"]["checks"]
    assert [check["step"] for check in checks] == [0, TINY.steps - 1]
    assert {check["block"] for check in checks} == {0, 1}
    for check in checks:
        assert {"out of the step", "out", "dx", "dto_q.weight"} < set(check["budget_used"])
        assert 0 < max(check["budget_used"].values()) < 1
        assert check["undecided_rows"] < check["rows"] == TINY.checked_tokens
    assert written["dense"]["checks"] == []


def test_a_layer_that_is_wrong_ends_the_run() -> None:
    """A window that is one key short: the definition reads w + 1."""
    right = train_bytes.sparse_attention

    def short(setup: train_bytes.Setup) -> Any:
        return right(dataclasses.replace(setup, sliding_window_size=setup.sliding_window_size - 1))

    with pytest.raises(SystemExit, match=r"^step 0: .* block 0 .*: out of the step\[.*the budget$"):
        train_bytes.train("sparse", short, TINY)


def test_a_gradient_that_is_wrong_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right output, and one weight's gradient twice what it should be."""

    right = train_bytes.NativeSparseAttention.forward

    def doubled(self: Any, x: Any) -> Any:
        self.to_v.weight.register_hook(lambda gradient: 2 * gradient)
        return right(self, x)

    monkeypatch.setattr(train_bytes.NativeSparseAttention, "forward", doubled)
    with pytest.raises(SystemExit, match=r"^step 0: .* block 0 .*: dto_v.weight\[.*the budget$"):
        train_bytes.train("sparse", train_bytes.sparse_attention, TINY)
