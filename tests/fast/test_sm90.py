"""What sm_90 makes of the kernels: read from machine code, without a GPU."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("torch", reason="nsa_fast is built on torch")
pytest.importorskip("triton", reason="machine code is made by triton's compiler")

from benchmarks import sm90
from pages import ROOT

LAUNCHES = sm90.launches()
#: Kernels that multiply no matrices.
WITHOUT_PRODUCTS = {"top_blocks", "fine_sum_parts", "gated_sum", "gated_sum_backward"}


def test_every_kernel_is_read() -> None:
    sources = [(ROOT / "nsa_fast" / f"{module}.py").read_text() for module in sm90.MODULES]
    started = {name for source in sources for name in re.findall(r"(\w+)\[.+\]\(\n", source)}
    assert started == set(LAUNCHES)


@pytest.mark.parametrize("name", LAUNCHES)
def test_sm90_keeps_everything_in_registers_and_multiplies_on_tensor_cores(name: str) -> None:
    """At the paper's shape; and no kernel became larger than the figures that are kept, by 5 %."""
    found = sm90.compiled_for_sm90(LAUNCHES[name])
    before = json.loads(sm90.KEPT.read_text())["kernels"][name]
    assert found["stack"] == found["spills"] == 0
    assert found["products"] == before["products"]
    assert found["products"] == ("none" if name in WITHOUT_PRODUCTS else "wgmma")
    assert found["registers"] <= 1.05 * before["registers"]
    assert found["shared"] <= before["shared"]
    assert sum(found["loops"]) <= 1.05 * sum(before["loops"])
