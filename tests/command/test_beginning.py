"""Getting in: the files of a new port, and what a clause is about."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tomllib
from pathlib import Path

import pytest

from nsa_ref.semantics import PAPER, PRESETS
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.cli import COULD_NOT_RUN, HOLDS, main
from nsa_ref.testing.explaining import SUBJECTS, SWITCHES, explain
from nsa_ref.testing.implementation import Implementation, TorchImplementation
from nsa_ref.testing.loading import load
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property


@pytest.mark.parametrize(
    ("kind", "base"), [("torch", TorchImplementation), ("numpy", Implementation)]
)
def test_a_new_port_runs_as_it_was_written(
    kind: str, base: type, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its example is right, forward and, with autograd, backward; it has all methods to fill in."""
    if kind == "torch":
        pytest.importorskip("torch", reason="a port of tensors needs torch")
    name = f"my_{kind}"
    assert main(["new", name, f"--{kind}"]) == HOLDS
    monkeypatch.syspath_prepend(str(place))
    (port,) = load(f"{name}_adapter:My{kind.capitalize()}", "cpu")
    assert isinstance(port, base) and port.name == f"my {kind}"
    port.semantics = (PAPER, dataclasses.replace(PAPER, causal=False))
    names = ["A1_sliding_output_by_shape", "A2_sliding_empty_rows", "A5_sliding_canary"]
    names += ["W1_sliding_mask_as_read", "W2_sliding_mask_as_read"]
    for prop in [*names, *["A3_sliding_gradients"] * (kind == "torch")]:
        few = dataclasses.replace(PROPERTIES[prop], examples=12)
        record = run_property(few, port, Options(findings=place))
        assert record.finding is None and record.cases, (prop, record)
    text = (place / f"{name}_adapter.py").read_text()
    for method, value in vars(Implementation).items():
        autograd = kind == "torch" and method.endswith("_vjp")
        takes_case = callable(value) and "case" in inspect.signature(value).parameters
        the_judges = method in ("run", "run_twice", "run_vjp") or method.startswith("_")
        if takes_case and not the_judges and not autograd:
            assert f"def {method}(self, case" in text, method
    ast.parse((place / f"test_{name}_nsa.py").read_text())
    assert tomllib.loads((place / "nsa-ref-known.toml").read_text()) == {}
    assert (
        f"verify {name}_adapter:My{kind.capitalize()}"
        in (place / "nsa-ref-workflow.yml").read_text()
    )


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize(
    "name",
    [
        *("true", "none", "false", "attention", "implementation", "torch_implementation"),
        *("paper", "PAPER", "np", "torch", "_my_port", "port", "my_2"),
    ],
)
def test_a_class_is_no_keyword_and_hides_no_import(name: str, kind: str, place: Path) -> None:
    """What is written compiles, and each name in it is bound once."""
    assert main(["new", name, f"--{kind}"]) == HOLDS
    text = (place / f"{name}_adapter.py").read_text()
    compile(text, name, "exec")
    statements = ast.parse(text).body
    (cls,) = (one.name for one in statements if isinstance(one, ast.ClassDef))
    imports = (one for one in statements if isinstance(one, ast.Import | ast.ImportFrom))
    assert cls not in [alias.asname or alias.name for one in imports for alias in one.names]
    test = (place / f"test_{name}_nsa.py").read_text()
    compile(test, name, "exec")
    assert f"import {cls}\n" in test
    assert f"{name}_adapter:{cls}" in (place / "nsa-ref-workflow.yml").read_text()


@pytest.mark.parametrize("name", ["_", "__", "_1", "__2_a"])
def test_a_name_without_a_letter_at_its_front_is_refused(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", name]) == COULD_NOT_RUN
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and repr(name) in line and "my_port" in line
    assert not list(place.iterdir())


def test_nothing_that_is_there_is_overwritten(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "nsa-ref-known.toml").write_text("# mine\n")
    for name in ("my_port", "my-port", "class"):
        assert main(["new", name]) == COULD_NOT_RUN
        assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in place.iterdir()] == ["nsa-ref-known.toml"]
    assert main(["new", "my_port"]) == COULD_NOT_RUN
    assert "Try another folder, or move it away" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_an_adapter_names_pages_that_are_where_it_was_written(kind: str, place: Path) -> None:
    """A wheel has no docs/ beside the port."""
    assert main(["new", "my_port", f"--{kind}"]) == HOLDS
    text = (place / "my_port_adapter.py").read_text()
    assert "docs/" not in text and "nsa-ref --help" in text


def test_everything_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """A clause's page has its sentence, a switch's its values in the presets, and so on."""
    for subject in SUBJECTS:
        page = explain(subject)
        assert page.startswith(f"# {subject}\n") and "None" not in page.partition("\n\n")[0]
        if subject in CLAUSES:
            assert f"> {CLAUSES[subject]}" in page and "How people get it wrong" in page
            assert all(p.name in page for p in PROPERTIES.values() if p.clause == subject)
            assert ("Switches that bear on it" in page) != ("No switch bears on it." in page)
        if subject in SWITCHES:
            assert all(f"- {preset}: " in page for preset in PRESETS)
        if subject in PROPERTIES:
            assert CLAUSES[PROPERTIES[subject].clause] in page
    assert main(["explain", "w1"]) == HOLDS
    assert capsys.readouterr().out == explain("W1")


def test_what_cannot_be_explained_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {
        "window_close": "window_closed",
        "§": "no clause",
        "sliding": "W1",
        "lse": "empty_lse",
        "topk": "clauses A1, ",
        "xyzzy": "presets PAPER, ",
        "short last block": "F2",
        "gates": "G1",
        "rope": "clauses A1, ",
    }
    for subject, words in asked.items():
        assert main(["explain", subject]) == COULD_NOT_RUN
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and words in line
