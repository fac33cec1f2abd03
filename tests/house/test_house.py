"""The rooms of the house: who may import whom, what importing costs, and what must be written."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import nsa_ref
from commands import python
from nsa_ref import bounds, layer_bounds, map_bounds, rounded, selection_bounds
from pages import ROOT

#: nsa_ref from the ground up; a room may import those before it.
ROOMS = (
    "checks",
    "semantics",
    "sizes",
    "compress",
    "masks",
    "attention",
    "selection",
    "layer",
    "numerics",
    "rounded",
    "bounds",
    "map_bounds",
    "selection_bounds",
    "layer_bounds",
)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Full names that a file imports when it is loaded; with `lazy`, inside functions too.

    `if TYPE_CHECKING:` is never loaded.
    """

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} imports relatively"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from visit(child)

    yield from visit(ast.parse(path.read_text()))


def roots(path: Path, *, lazy: bool) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, lazy=lazy)}


def graph(package: str) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports when it is loaded."""
    names = {module_name(path) for path in files(package)}
    found: dict[str, set[str]] = {}
    for path in files(package):
        # "from package.module import thing" names the thing, or a module
        wanted = {
            name if name in names else name.rpartition(".")[0] for name in imports(path, lazy=False)
        }
        found[module_name(path)] = wanted & names - {module_name(path)}
    return found


# --- who imports whom -----------------------------------------------------------------------------


def test_every_room_of_the_definition_is_in_the_plan() -> None:
    found = {path.stem for path in (ROOT / "nsa_ref").glob("*.py")} - {"__init__", "__main__"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_at_earlier_rooms(room: str) -> None:
    path = ROOT / "nsa_ref" / f"{room}.py"
    for name in imports(path, lazy=True):
        if name.startswith("nsa_ref"):
            other = name.split(".")[1]
            assert other in ROOMS[: ROOMS.index(room)], f"{room} imports {name}"


@pytest.mark.parametrize("room", ["__init__", *ROOMS])
def test_the_definition_needs_numpy_alone(room: str) -> None:
    allowed = {"nsa_ref", "numpy", *sys.stdlib_module_names}
    assert roots(ROOT / "nsa_ref" / f"{room}.py", lazy=True) <= allowed


@pytest.mark.parametrize("path", files("nsa_ref/testing"), ids=module_name)
def test_the_judge_imports_torch_only_where_it_is_used(path: Path) -> None:
    """Inside functions, so that a port without torch can be judged; and never a port."""
    assert not {"torch", "matplotlib", "triton", "jinja2"} & roots(path, lazy=False)
    assert not {"nsa_fast", "jax", "tests", "fla", "native_sparse_attention_pytorch"} & roots(
        path, lazy=True
    )


@pytest.mark.parametrize("path", files("nsa_fast"), ids=module_name)
def test_the_fast_path_shares_no_code_with_the_definition(path: Path) -> None:
    """Of nsa_ref it knows the switches, and its adapter the judge."""
    for name in imports(path, lazy=True):
        if not name.startswith("nsa_ref"):
            continue
        allowed = name.startswith("nsa_ref.semantics.") or (
            path.name == "adapter.py" and name.startswith("nsa_ref.testing.")
        )
        assert allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("package", ["nsa_ref", "nsa_fast"])
def test_no_import_goes_in_a_circle(package: str) -> None:
    graphlib.TopologicalSorter(graph(package)).prepare()


# --- what importing costs -------------------------------------------------------------------------


def test_importing_the_definition_loads_numpy_and_python_alone() -> None:
    """So that it costs what NumPy costs, and a few milliseconds."""
    done = python("-c", "import sys, nsa_ref; print(*sys.modules)", cwd=ROOT, check=True)
    began = python("-c", "import sys, numpy; print(*sys.modules)", cwd=ROOT, check=True)
    loaded, before = set(done.stdout.split()), set(began.stdout.split())
    others = {name.partition(".")[0] for name in loaded - before} - sys.stdlib_module_names
    assert others - {"numpy"} == {"nsa_ref"}
    assert not {name for name in loaded if name.startswith("nsa_ref.testing")}


def test_loading_the_judge_loads_no_torch() -> None:
    names = [module_name(path) for path in files("nsa_ref/testing")]
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names}]"
    done = python("-c", f"{code}; print(*sys.modules)", cwd=ROOT, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"hypothesis", "ml_dtypes"} <= loaded
    assert not loaded & {"torch", "matplotlib", "jinja2", "nsa_fast"}


# --- what must be written -------------------------------------------------------------------------

#: A clause of the specification, an equation, or another place to look the definition up.
SOURCE = re.compile(r"\b[ACFGIW]\d\b|eq\. \d+|section \d|NUMERICS|arXiv")


def public(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def test_everything_that_is_exported_exists() -> None:
    assert sorted(nsa_ref.__all__) == sorted(set(nsa_ref.__all__))
    for name in nsa_ref.__all__:
        assert hasattr(nsa_ref, name)


DEFINITIONS = [
    *((nsa_ref, name) for name in nsa_ref.__all__ if inspect.isfunction(getattr(nsa_ref, name))),
    *(
        (module, name)
        for module in (rounded, bounds, map_bounds, selection_bounds, layer_bounds)
        for name in public(module)
    ),
]


@pytest.mark.parametrize(
    ("module", "name"), DEFINITIONS, ids=[f"{m.__name__}.{n}" for m, n in DEFINITIONS]
)
def test_a_public_function_says_where_its_definition_stands(module: ModuleType, name: str) -> None:
    text = inspect.getdoc(getattr(module, name))
    assert text, f"{name} has no docstring"
    assert SOURCE.search(text), f"{name} cites no clause, equation or source"


@pytest.mark.parametrize(
    "path", [*files("nsa_ref"), *files("nsa_fast"), *files("examples")], ids=module_name
)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_tolerance_is_typed_in() -> None:
    """Bounds are computed; nothing here or in the tests compares with a constant."""
    forbidden = re.compile(r"\b(allclose|isclose|assert_close|approx)\(|\b[ar]tol\s*=")
    for package in ("nsa_ref", "nsa_fast", "tests", "examples"):
        for path in files(package):
            if path == Path(__file__):
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not forbidden.search(line), f"{path.name}:{number}: {line.strip()}"


def test_clauses_that_are_cited_are_clauses() -> None:
    """Every property decides a clause that has a sentence, and every sentence is decided."""
    clauses = importlib.import_module("nsa_ref.testing.clauses").CLAUSES
    properties = importlib.import_module("nsa_ref.testing.properties").PROPERTIES
    assert {prop.clause for prop in properties.values()} == set(clauses)


def test_no_file_of_the_house_is_ignored() -> None:
    """What git ignores the linters do not read, though it was committed."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-ci", "--exclude-standard"]
    try:
        done = subprocess.run(listed, capture_output=True, text=True)
    except OSError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip("this is no checkout")
    assert done.stdout == ""
