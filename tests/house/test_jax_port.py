"""The port in JAX passes where it is asked, and dies of the right clause once it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax", reason="jax is not installed: pip install jax")

from examples.jax_port import jax_port
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property

#: One for all, because its geometries take seconds to choose.
PORT = jax_port.JaxPort()


@pytest.mark.parametrize(
    "name",
    [
        "W1_sliding_mask_as_exposed",
        "A1_sliding_output_by_shape",
        "A1_compress_lse",
        "A1_fine_output",
        "A3_fine_gradients",
    ],
)
def test_it_is_right(name: str, tmp_path: Path) -> None:
    record = run_property(PROPERTIES[name], PORT, Options(findings=tmp_path))
    assert record.finding is None, record.finding["text"]
    assert record.cases


def test_a_window_one_key_short_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = jax_port.traced_sizes

    def short(case: Any) -> jax_port.Size:
        sizes = right(case)
        return sizes | {"sliding_window_size": sizes["sliding_window_size"] - 1}

    monkeypatch.setattr(jax_port, "traced_sizes", short)
    prop = PROPERTIES["W1_sliding_mask_as_exposed"]
    finding = run_property(prop, PORT, Options(findings=tmp_path)).finding
    assert finding is not None and finding["clause"] == "W1"
    assert finding["convention"] == {"name": "window_closed", "value": False}
