"""The adapters that come with the judge: their presets are right, and their findings replay."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import nsa_ref
from nsa_ref.testing import Case, Implementation
from nsa_ref.testing.judging import judge
from nsa_ref.testing.ledger import FILE_NAME, ledger_of, read_ledger
from nsa_ref.testing.loading import SHORT_NAMES, load
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import Broken
from pages import ROOT, headings
from trials import passes

#: Short name of a port -> the module that it takes.
PACKAGES = {"lucidrains": "native_sparse_attention_pytorch", "fla": "fla"}
#: Folder of a port.
FOLDERS = {
    name: (ROOT / SHORT_NAMES[name].partition(":")[0].replace(".", "/")) for name in PACKAGES
}
#: id of a finding -> its case, as replay takes it.
FOUND: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text())
    for folder in FOLDERS.values()
    for path in sorted(folder.glob("found/*.json"))
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
    done = nsa_ref("verify", name, "--device=cpu")
    assert done.returncode == 2
    assert f"{PACKAGES[name]} is not installed. Try pip install" in done.stderr


@pytest.mark.parametrize("finding", FOUND)
def test_a_finding_replays(finding: str) -> None:
    """And is what its ledger calls known, if it is drawn at all."""
    fields = FOUND[finding]
    port = ports(fields["spec"])[fields["implementation"]]
    prop, case = PROPERTIES[fields["property"]], Case.from_json(fields["case"])
    entry = {one.id: one for one in ledger_of(port)}.get(finding)
    if entry is not None and entry.status == "quarantined":
        assert entry.explains(prop, prop.clause, case)
        pytest.skip("it may take this process down")
    with pytest.raises(Broken) as broken:
        judge(prop, port, case)
    assert entry is None or entry.explains(prop, broken.value.clause, case)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_known_failure_is_explained(name: str) -> None:
    """A finding has its heading and its case; what is not in the ledger is not drawn."""
    listed = {entry.id for entry in read_ledger(FOLDERS[name] / FILE_NAME)}
    found = {finding for finding, fields in FOUND.items() if fields["spec"] == name}
    told = headings("docs/findings.md")
    assert found <= set(told)
    assert listed == {finding for finding in found if "Not drawn" not in told[finding]}


@pytest.mark.parametrize(
    ("prop", "implementation"),
    [
        ("W1_sliding_mask_as_exposed", "lucidrains"),
        ("G3_decode", "lucidrains"),
        ("W2_sliding_mask_as_read", "lucidrains not causal"),
        ("F1_fine_mask_as_exposed", "lucidrains flex"),
    ],
)
def test_lucidrains_is_right_but_for_what_is_known(
    prop: str, implementation: str, tmp_path: Path
) -> None:
    port = ports("lucidrains")[implementation]
    options = Options(dtypes=("float32",), findings=tmp_path)
    record = run_property(PROPERTIES[prop], port, options)
    assert record.finding is None, record.finding["text"]
    assert record.cases


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


def test_what_the_plug_cannot_ask_of_fla_is_shown() -> None:
    """As docs/findings.md says it."""
    ports("fla")
    from nsa_ref.testing.ports.fla import _kernels, beyond_the_plug

    kernels = _kernels("cpu")
    said = [line for question in beyond_the_plug.QUESTIONS for line in question(kernels)]
    assert said == [
        "block_counts = 3 in the place of 4 changes: dk, dv",
        "block_counts = a tensor of 3 in the place of 4 changes: out, dq, dk, dv",
        "an empty sequence between two others changes: out, dq, dk, dv",
        "lse.requires_grad is True; the largest element of its gradient is 0.0",
        "of the blocks 0 to 3 the kernel chooses [-1, 0, 2, 3]",
        "of the blocks 0 to 3 the naive reference chooses [-1, 0, 2, 3]",
    ]
