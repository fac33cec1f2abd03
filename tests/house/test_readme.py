"""What the README and the pages of docs/ show is what happens."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from nsa_ref.numerics import NUMERICS
from nsa_ref.testing import cli
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.loading import SHORT_NAMES
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from pages import page, table

README = page("README.md")
SOURCE = re.search(r"```python\n(import torch\n.*?)```", README, re.DOTALL)


def adapter(source: str) -> Implementation:
    """The adapter of the README, made from its source."""
    namespace: dict[str, Any] = {"__name__": "my_adapter"}
    exec(source, namespace)
    made: Implementation = namespace["MyPort"]("cpu")
    return made


def test_the_adapter_is_right(tmp_path: Path) -> None:
    """What a stranger copies first must pass, where it offers something; in few cases of each."""
    assert SOURCE is not None
    port = adapter(SOURCE.group(1))
    for prop in PROPERTIES.values():
        few = dataclasses.replace(prop, examples=min(prop.examples, 8))
        record = run_property(few, port, Options(findings=tmp_path))
        assert record.finding is None, record.finding["text"]
        about = prop.method == "sliding" and prop.clause in ("A1", "A3", "W1", "W3")
        if about and not prop.why_not_tried(port):
            assert record.cases


def test_the_failure_shown_is_the_failure_found(tmp_path: Path) -> None:
    """The section on reading a failure: the same mistake, the same lines."""
    assert SOURCE is not None
    wrong = SOURCE.group(1).replace("p - j > case", "p - j >= case")
    assert wrong != SOURCE.group(1)
    prop = PROPERTIES["W1_sliding_mask_as_read"]
    found = run_property(prop, adapter(wrong), Options(findings=tmp_path)).finding
    assert found is not None
    for line in found["text"].splitlines():
        assert line in README


def test_the_table_of_options_is_complete() -> None:
    """Every option of verify has a row, and every row an option."""
    named = {row[0] for row in table("docs/command.md", "option") if row[0].startswith("-")}
    parser = cli._parser()
    commands = next(a for a in parser._actions if a.dest == "command")
    verify = commands.choices["verify"]  # type: ignore[index]
    options = {a.option_strings[-1] for a in verify._actions if a.option_strings}
    assert named == options - {"--help"}
    assert all(f"`{name}`" in page("docs/command.md") for name in SHORT_NAMES)


def test_the_page_on_porting_has_the_whole_plug() -> None:
    """Every method and attribute that is an adapter's to set, and every row of numerics."""
    the_judges = {"offers", "run", "run_twice", "run_vjp", "device", "rules"}
    plug = {name for name in vars(Implementation) if name[0] != "_"} - the_judges
    for name in plug | set(NUMERICS):
        assert re.search(rf"\b{name}[`(]", page("docs/porting.md")), name


def test_every_clause_that_is_judged_is_named() -> None:
    """The coverage section speaks of all clauses, the six of the selection as a range."""
    section = README[README.index("## What is covered") :]
    for clause in CLAUSES:
        assert re.search(rf"\b{clause}\b", section) or clause in ("I2", "I3", "I4", "I5")


def test_the_layer_shown_runs_as_its_comments_say() -> None:
    """Shapes as commented, the cache's rows those of the parallel form, sequences apart."""
    source = re.search(r"```python\n(.*?)```", page("docs/fast-path.md"), re.DOTALL)
    assert source is not None
    names: dict[str, Any] = {}
    exec(source.group(1), names)
    out, rows, layer, x = (names[name] for name in ("out", "rows", "layer", "x"))
    assert out.shape == (2, 200, 128) and names["packed"].shape == (200, 128)
    # to half the digits of float32: blocks that tie may be chosen differently, but not here
    assert bool(((torch.cat(rows, dim=1) - out).abs() <= 2**-12 * out.abs().max()).all())
    assert bool(((names["packed"][120:] - layer(x[:1, 120:])[0]).abs() <= 2**-12).all())
