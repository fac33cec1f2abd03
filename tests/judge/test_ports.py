"""The adapters that come with the judge: their presets are right, and their findings replay."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import nsa_ref
from nsa_ref.testing import Case, Implementation
from nsa_ref.testing.ledger import FILE_NAME
from nsa_ref.testing.loading import SHORT_NAMES, load
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.verdicts import Broken, Raised
from pages import ROOT, page
from trials import passes

#: Short name of a port -> the module that it takes.
PACKAGES = {"lucidrains": "native_sparse_attention_pytorch", "fla": "fla"}
#: id of an entry -> the case of docs/findings.md, as replay takes it.
FOUND: dict[str, dict[str, Any]] = {
    title: json.loads(case)
    for title, case in re.findall(
        r"^### (\S+)$.*?```json\n(.*?)```", page("docs/findings.md"), re.MULTILINE | re.DOTALL
    )
}


def ports(name: str) -> dict[str, Implementation]:
    """The implementations of a port; skipped where its package is not installed."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed: see nsa_ref/testing/ports/{name}")
    return {one.name: one for one in load(name, "cpu")}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_port_whose_package_is_missing_says_so_in_a_line(name: str) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is not None:
        pytest.skip(f"{PACKAGES[name]} is installed")
    done = nsa_ref("verify", name)
    assert done.returncode == 2
    assert f"{PACKAGES[name]} is not installed. Try pip install" in done.stderr


@pytest.mark.parametrize("finding", FOUND)
def test_a_finding_replays(finding: str) -> None:
    fields = FOUND[finding]
    port = ports(fields["spec"])[fields["implementation"]]
    with pytest.raises((Broken, Raised)):
        PROPERTIES[fields["property"]].run(port, Case.from_json(fields["case"]))


@pytest.mark.parametrize("name", PACKAGES)
def test_every_known_failure_is_explained(name: str) -> None:
    module = SHORT_NAMES[name].partition(":")[0]
    ledger = (ROOT / module.replace(".", "/") / FILE_NAME).read_text()
    listed = set(re.findall(r'^id = "(.*)"$', ledger, re.MULTILINE))
    assert listed == {title for title, fields in FOUND.items() if fields["spec"] == name}


@pytest.mark.parametrize(
    "prop",
    [
        "C2_compress_mask_as_read",
        "F1_fine_mask_as_read",
        "F3_fine_mask_as_read",
        "A2_fine_empty_rows",
        "I4_selection",
    ],
)
def test_the_reference_of_fla_follows_its_preset(prop: str, tmp_path: Path) -> None:
    passes(prop, ports("fla")["fla naive"], tmp_path)


SMALL: dict[str, Any] = {
    "dtype": "float32",
    "q_heads": 16,
    "q_len": 18,
    "kv_len": 18,
    "head_dim": 16,
    "value_dim": 16,
    "compress_block_size": 8,
    "compress_block_sliding_stride": 8,
    "selection_block_size": 8,
    "num_selected_blocks": 2,
    "num_initial_blocks": 1,
    "num_local_blocks": 2,
}


def test_the_kernels_of_fla_follow_its_preset() -> None:
    """A2, C2, F1, I4: an empty compressed row is 0 with lse 0, an empty selected one NaN."""
    port = ports("fla")["fla kernels"]
    case = Case(semantics=port.semantics[0], **SMALL)
    q, k_cmp, v_cmp, mem_k, mem_v = case.compressed()
    found = port.run("compress", case, q, k_cmp, v_cmp, mem_k, mem_v)
    assert not found.out[:, :, :7].any() and not found.lse[:, :, :7].any()
    blocks = np.full((1, 1, 18, 2), -1)
    assert np.isnan(port.run("fine", case, *case.qkv(), blocks).out).all()
    for prop in ("C2_compress_mask_as_read", "F1_fine_mask_as_read", "I4_selection"):
        PROPERTIES[prop].run(port, case)
