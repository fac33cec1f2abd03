"""From what a user types to implementations: `nsa_fast`, `oracle`, or `package.module:object`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import json
import operator
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nsa_ref.numerics import NUMERICS
from nsa_ref.semantics import Semantics
from nsa_ref.testing.case import DTYPES
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.implementation import PACES, Implementation, compiled_by
from nsa_ref.testing.ledger import LedgerError, ledger_of, place_of
from nsa_ref.testing.limits import (
    CHANGED_BY,
    check_limits,
    check_limits_of,
    check_together,
    limited,
    plain,
    shown,
)
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.wording import LONGEST_REASON, cut, one_line, place

#: Names that stand for an adapter.
SHORT_NAMES = {
    "nsa_fast": "nsa_fast.adapter:implementations",
    "oracle": "nsa_ref.testing.implementation:OracleImplementation",
    "lucidrains": "nsa_ref.testing.ports.lucidrains:implementations",
    "fla": "nsa_ref.testing.ports.fla:implementations",
}
DEVICES = ("auto", "cpu", "cuda", "interpreter")

#: What an implementation states: by yes or no; and all of it.
FLAGS = ("nonfinite_invisible", "lse_gradient", "deterministic")
STATED = (*FLAGS, "name", "semantics", "numerics", "pace", "limits", "limits_of", "device")

#: Letters of a name.
LONGEST_NAME = 1000


class Declared(Implementation):
    """What an implementation says of itself, for a process that does not load it."""

    def __init__(self, said: Implementation) -> None:
        self.name, self.device = said.name, said.device
        self.semantics, self.numerics, self.limits = said.semantics, said.numerics, said.limits
        self.pace, self.limits_of = said.pace, said.limits_of

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        limits_of = {method: _as_json(limits) for method, limits in self.limits_of.items()}
        semantics = [semantics.to_json() for semantics in self.semantics]
        about = {"name": self.name, "device": self.device, "numerics": dict(self.numerics)}
        about |= {"pace": self.pace, "limits": _as_json(self.limits), "limits_of": limits_of}
        return about | {"semantics": semantics}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Declared:
        """The inverse of `to_json`."""
        semantics = [Semantics.from_json(switches) for switches in data["semantics"]]
        limits = _from_json(data["limits"])
        limits_of = {method: _from_json(own) for method, own in data["limits_of"].items()}
        said = data | {"semantics": semantics, "limits": limits, "limits_of": limits_of}
        return cls(SimpleNamespace(**said))  # type: ignore[arg-type]


def _as_json(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Limits as JSON has them: rules as they are, values as lists, ranges by their ends."""

    def value(one: Any) -> Any:
        return one if isinstance(one, (str, bool)) else operator.index(one)

    def rule(written: Any) -> Any:
        if isinstance(written, range):
            return {"range": [written.start, written.stop, written.step]}
        listed = isinstance(written, Collection) and not isinstance(written, str)
        return [value(one) for one in written] if listed else value(written)

    return {field: rule(plain(written)) for field, written in limits.items()}


def _from_json(limits: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    return {f: range(*r["range"]) if isinstance(r, dict) else r for f, r in limits.items()}


class CannotRun(Exception):
    """What is wrong and what to do, in one line."""


def resolve_device(device: str, spec: str = "") -> str:
    """`auto` becomes the best device that there is for what `spec` names."""
    if device not in DEVICES:
        raise CannotRun(f"--device {device}: must be one of {', '.join(DEVICES)}")
    if device in ("cpu", "interpreter"):
        return device
    if device == "auto" and spec == "oracle":
        return "cpu"  # NumPy has no other, and torch takes seconds to import
    try:
        import torch
    except ImportError:
        if device == "auto":
            return "cpu"
        raise CannotRun("--device cuda needs torch, which is not installed here") from None
    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise CannotRun(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here. Try --device cpu."
        )
    return "cpu"


def load(spec: str, device: str) -> list[Implementation]:
    """The implementations that `spec` names, on a device ("cpu", "cuda" or "interpreter").

    The object may be an `Implementation`, a list of them, or a class or function that makes one
    or several; those are called with the device, or with nothing if they take nothing.

    Raises
    ------
    CannotRun : in one line, with what to do
    """
    path = SHORT_NAMES.get(spec, spec)
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute and path.isprintable()):
        known = f"package.module:object, or one of {', '.join(SHORT_NAMES)}"
        raise CannotRun(f"{spec!r} names no implementation: write {known}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # an import that calls sys.exit is as wrong as one that raises
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        wanted = error.name or ""
        if module_name.endswith(".py"):
            name = module_name.removesuffix(".py").replace("/", ".")
            why = f"{module_name!r} is a file: name the module, {name}:{attribute}"
        elif wanted and f"{module_name}.".startswith(f"{wanted}."):
            why = f"there is no module {wanted!r}, neither installed nor in {os.getcwd()}. "
            why += "Install it, or go to where it lies"
        else:
            why = f"importing {module_name} failed: it needs {wanted!r}, which is not installed, "
            why += f"at {place(error)}"
            if module_name.startswith("nsa_fast"):
                why += ": pip install 'nsa-ref[fast]'"
        raise CannotRun(why) from error
    except (Exception, SystemExit) as error:
        why = f"{one_line(error)} at {place(error)}"
        raise CannotRun(f"importing {module_name} failed: {why}") from error
    if not hasattr(module, attribute):
        names = sorted(name for name, value in vars(module).items() if _is_adapter(value, module))
        known = f"it has {', '.join(names)}" if names else "nor any Implementation of its own"
        raise CannotRun(f"{module_name} has no {attribute!r}; {known}")
    found = getattr(module, attribute)
    if callable(found) and not isinstance(found, Implementation):
        try:
            found = _call(found, device)
        except (Exception, SystemExit) as error:
            why = f"{one_line(error)} at {place(error)}"
            raise CannotRun(f"calling {path} failed: {why}") from error
    implementations = list(found) if isinstance(found, (list, tuple)) else [found]
    if not implementations:
        raise CannotRun(f"{path} gives no implementation for device {device}")
    for implementation in implementations:
        if not isinstance(implementation, Implementation):
            raise CannotRun(
                f"{path} gives a {type(implementation).__name__}; it must be a "
                "nsa_ref.testing.Implementation, a list of them, or something that makes them"
            )
    try:
        check_declarations(implementations)
    except (TypeError, ValueError) as error:
        raise CannotRun(f"{path}: {error}") from error
    return implementations


def _is_adapter(value: Any, module: Any) -> bool:
    if isinstance(value, type):
        return issubclass(value, Implementation) and value.__module__ == module.__name__
    return isinstance(value, Implementation)


def check_declarations(implementations: Collection[Implementation]) -> None:
    """What an implementation says about itself, before anything is judged by it.

    Raises
    ------
    TypeError, ValueError : the attribute, its value and what would be right
    """
    for one in implementations:
        where = f"{type(one).__name__}."
        methods = {prop.called for prop in PROPERTIES.values()}
        called = ("offers", "supports", "compile_counts", *sorted(methods))
        for attribute in (*STATED, *called):
            # a method that is not there is not offered; one that is there may be a property
            is_there = inspect.getattr_static(one, attribute, None) is not None
            try:
                getattr(one, attribute, *(() if is_there else (None,)))
            except (Exception, SystemExit) as error:
                why = f"{one_line(error)} at {place(error)}"
                raise TypeError(f"{where}{attribute} raised {why}.") from error
        is_text = isinstance(one.name, str) and one.name.isprintable()
        if not is_text or not 0 < len(one.name) <= LONGEST_NAME:
            said = cut(repr(one.name), LONGEST_REASON)
            rule = f"must be a line of at least one letter, and at most {LONGEST_NAME}."
            raise TypeError(f"{where}name={said} {rule}")
        if not isinstance(one.device, str) or not one.device:
            raise TypeError(
                f"{where}device={one.device!r} must be a text such as 'cpu' or 'cuda:1'."
            )
        for flag in FLAGS:
            if not isinstance(said := getattr(one, flag), (bool, np.bool_)):
                raise TypeError(f"{where}{flag}={said!r} must be True or False.")
        semantics: Any = one.semantics
        if not isinstance(semantics, (list, tuple)):
            raise TypeError(
                f"{where}semantics={semantics!r} must be a list or tuple of nsa_ref.Semantics."
            )
        if not semantics or not all(isinstance(item, Semantics) for item in semantics):
            raise ValueError(
                f"{where}semantics={semantics!r} must hold at least one nsa_ref.Semantics, and "
                "nothing else: cases are drawn from them. Try (nsa_ref.PAPER,)."
            )
        if not isinstance(one.numerics, Mapping) or not one.numerics:
            raise TypeError(
                f"{where}numerics={one.numerics!r} must be a dict such as {{'float32': 'fp32'}}: "
                "without it there is no bound to judge by."
            )
        for dtype, row in one.numerics.items():
            if dtype not in DTYPES or not isinstance(row, str) or row not in NUMERICS:
                raise ValueError(
                    f"{where}numerics has {dtype!r}: {row!r}; a dtype is one of "
                    f"{', '.join(DTYPES)} and its row one of {', '.join(NUMERICS)}."
                )
        if one.pace not in PACES:
            raise ValueError(f"{where}pace={one.pace!r} must be one of {', '.join(PACES)}.")
        for name in called:
            if not callable(getattr(one, name, callable)):
                found = cut(repr(getattr(one, name)), LONGEST_REASON)
                raise TypeError(f"{where}{name}={found} must be a method.")
        compiled_by(one)
        check_limits(f"{where}limits", one.limits)
        check_limits_of(f"{where}limits_of", one.limits_of, methods)
        _check_some_case(where, one)
    names = ["".join(c if c.isalnum() else "_" for c in one.name) for one in implementations]
    for one, name in zip(implementations, names):
        if names.count(name) > 1:
            raise ValueError(
                f"{type(one).__name__}.name={one.name!r} is the name of another implementation "
                "as well: their findings could not be told apart."
            )


def _check_some_case(where: str, implementation: Implementation) -> None:
    """Raise ValueError if limits leave a method no case."""
    # what one property is about may lie outside where others have cases
    of_method: dict[str, dict[Any, Property]] = {}
    for prop in PROPERTIES.values():
        if not prop.extent:
            kind = (prop.adjust, prop.populated)
            of_method.setdefault(prop.called, {}).setdefault(kind, prop)
    for method, kinds in of_method.items():
        check_together(f"{where}limits", implementation, method)
        within = limited(implementation, method)
        offered = [p for p in kinds.values() if not p.why_not_offered(implementation)]
        if not within.rules or not offered or any(_has_case(p, implementation) for p in offered):
            continue
        said = [f"{rule.name} = {rule.rule!r}" for rule in within.rules]
        read = [field for rule in within.rules for field in rule.reads]
        read += [field for one in read for field in CHANGED_BY.get(one, ())]
        limits = {field: within.limits[field] for field in read if field in within.limits}
        said += [shown(field, values) for field, values in limits.items()]
        raise ValueError(f"{where}limits leave no case of {method}: {', '.join(said)}.")


def _has_case(prop: Property, implementation: Implementation) -> bool:
    """Whether a case of the property is soon found."""
    settings = hypothesis.settings(level_settings("quick", 100), phases=[hypothesis.Phase.generate])
    try:
        hypothesis.find(st.one_of(prop.strata(implementation)), bool, settings=settings)
    except (hypothesis.errors.NoSuchExample, hypothesis.errors.Unsatisfiable):
        return False
    return True


def _call(make: Any, device: str) -> Any:
    import inspect

    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return make()
    takes_device = any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    return make(device) if takes_device else make()


def try_loading(spec: str, device: str, timeout: float) -> dict[str, Any]:
    """Load in a process of its own, because loading may hang or die; say what was found.

    Returns
    -------
    {"device": the one chosen, "device_name": what it calls itself, "implementations": what each
    declares (`Declared.to_json`), "ledgers": where they would stand, "versions": {...}}

    Raises
    ------
    CannotRun : in one line
    """
    if not spec.isprintable():
        raise CannotRun(f"{spec!r} names no implementation: it has a letter that no name has")
    # the answer comes in a file: the adapter may print, and start processes that keep pipes open
    with (
        tempfile.NamedTemporaryFile(prefix="nsa-ref-", suffix=".json") as answer_file,
        tempfile.TemporaryFile() as words_file,
    ):
        program = "import sys; from nsa_ref.testing.loading import _main; _main(*sys.argv[1:])"
        command = [sys.executable, "-P", "-c", program, spec, device, answer_file.name]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words_file,
                timeout=timeout,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise CannotRun(
                f"loading {spec} took more than {timeout:g} s: importing it, or making its "
                "object, hangs"
            ) from None
        answer = Path(answer_file.name).read_text()
        words_file.seek(0)
        words = words_file.read().decode(errors="replace").strip().splitlines()
    if answer:
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise CannotRun(found["error"])
        return found
    code = done.returncode
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    last = f"; its last words: {words[-1].strip()}" if words else ""
    raise CannotRun(f"loading {spec} ended its process ({how}){last}")


def _main(spec: str, device: str, answer_file: str) -> None:
    try:
        chosen = resolve_device(device, spec)
        implementations = load(spec, chosen)
        if chosen != "cpu" and all(i.device.startswith("cpu") for i in implementations):
            # an instance is made before the device is known; NumPy has no device but the CPU
            if device != "auto":
                raise CannotRun(
                    f"--device {device}: {spec} is on the cpu. Name the class, which is then made "
                    f"with the device, or make the instance on {device}"
                )
            chosen = "cpu"
        answer: dict[str, Any] = {
            "device": chosen,
            "device_name": device_of(chosen).describe(),
            "implementations": [Declared(i).to_json() for i in implementations],
            "ledgers": [str(place) for i in implementations if (place := place_of(i))],
            "versions": versions(SHORT_NAMES.get(spec, spec).partition(":")[0]),
        }
        for one in implementations:
            ledger_of(one)
    except (CannotRun, LedgerError) as error:
        answer = {"error": str(error)}
    Path(answer_file).write_text(json.dumps(answer))
    # at once: the adapter may have left threads that would keep this process alive
    os._exit(0)


def versions(module_name: str = "") -> dict[str, str]:
    """Versions of what the verdict depends on, as far as it is loaded.

    module_name : the adapter's module, whose package may have a version as well
    """
    import platform

    found = {"python": platform.python_version(), "nsa_ref": own_version()}
    package = module_name.partition(".")[0]
    for name in ("numpy", "torch", "ml_dtypes", "hypothesis", package):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    if "torch" in found:
        # not loaded here, but by Inductor in the workers
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["triton"] = importlib.metadata.version("triton")
    if (commit := _commit()) is not None:
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """Of the checkout that this file lies in, with "+" if something in it is not committed.

    A copy of it without its history is told by NSA_REF_COMMIT.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        of_it = [*git, "ls-files", "--error-unmatch", __file__]
        subprocess.run(of_it, capture_output=True, timeout=30, check=True)
        head, changes = (
            subprocess.run(command, capture_output=True, timeout=30, check=True, text=True).stdout
            for command in ([*git, "rev-parse", "HEAD"], [*git, "status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("NSA_REF_COMMIT")
    return head.strip() + ("+" if changes.strip() else "")


def own_version() -> str:
    """Of the installed nsa-ref; "unknown" where only its source is on the path."""
    try:
        return importlib.metadata.version("nsa-ref")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
