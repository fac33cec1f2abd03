"""From what a user types to implementations: `nsa_fast`, `oracle`, or `package.module:object`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any

from nsa_ref.testing.implementation import Implementation, OracleImplementation

#: Names that stand for an adapter.
SHORT_NAMES = {
    "nsa_fast": "nsa_fast.adapter:implementations",
    "oracle": "nsa_ref.testing.implementation:OracleImplementation",
}
DEVICES = ("auto", "cpu", "cuda")


class CannotRun(Exception):
    """What is wrong and what to do, in one line."""


def resolve_device(device: str) -> str:
    """`auto` becomes the best device that there is."""
    if device not in DEVICES:
        raise CannotRun(f"--device {device}: must be one of {', '.join(DEVICES)}")
    if device == "cpu":
        return device
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
    """The implementations that `spec` names, on a device ("cpu" or "cuda").

    The object may be an `Implementation`, a list of them, or a class or function that makes one
    or several; those are called with the device, or with nothing if they take nothing.

    Raises
    ------
    CannotRun : in one line, with what to do
    """
    path = SHORT_NAMES.get(spec, spec)
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise CannotRun(
            f"{spec!r} names no implementation: write package.module:object, or one of "
            f"{', '.join(SHORT_NAMES)}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise CannotRun(
                f"no module named {error.name!r} is installed or lies in {os.getcwd()}"
            ) from error
        raise CannotRun(
            f"importing {module_name} failed: it needs {error.name!r}, which is not installed"
        ) from error
    except Exception as error:
        raise CannotRun(
            f"importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        names = sorted(
            name
            for name, value in vars(module).items()
            if isinstance(value, Implementation)
            or (
                isinstance(value, type)
                and issubclass(value, Implementation)
                and value.__module__ == module_name
            )
        )
        known = f"; it has {', '.join(names)}" if names else ""
        raise CannotRun(f"{module_name} has no {attribute!r}{known}")
    found = getattr(module, attribute)
    if callable(found) and not isinstance(found, Implementation):
        try:
            found = _call(found, device)
        except Exception as error:
            raise CannotRun(f"{path}: {type(error).__name__}: {error}") from error
    implementations = list(found) if isinstance(found, (list, tuple)) else [found]
    if not implementations:
        raise CannotRun(f"{path} gives no implementation for device {device}")
    for implementation in implementations:
        if not isinstance(implementation, Implementation):
            raise CannotRun(
                f"{path} gives a {type(implementation).__name__}; it must be a "
                "nsa_ref.testing.Implementation, a list of them, or something that makes them"
            )
        if not implementation.semantics or not implementation.numerics:
            raise CannotRun(
                f"{implementation.name} declares no semantics or no numerics: there is nothing "
                "to judge it by"
            )
    return implementations


def _call(make: Any, device: str) -> Any:
    import inspect

    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    takes_device = any(p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters)
    return make(device) if takes_device else make()


def try_loading(spec: str, device: str, timeout: float) -> dict[str, Any]:
    """Load in a process of its own, which may raise, hang or die, and say what was found there.

    Returns
    -------
    {"device": the device chosen, "implementations": [{"name", "numerics"}], "versions": {...}}

    Raises
    ------
    CannotRun : in one line
    """
    command = [sys.executable, "-m", "nsa_ref.testing.loading", spec, device]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        raise CannotRun(f"loading {spec} took more than {timeout:g} s") from None
    answer = done.stdout.rpartition("NSA-REF ")[2]
    if done.returncode == 0 and answer:
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise CannotRun(found["error"])
        return found
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise CannotRun(f"loading {spec} ended its process ({how}): {last}")


def _main(spec: str, device: str) -> None:
    try:
        chosen = resolve_device(device)
        implementations = load(spec, chosen)
        answer: dict[str, Any] = {
            "device": chosen,
            "implementations": [
                {"name": i.name, "numerics": dict(i.numerics)} for i in implementations
            ],
            "versions": versions(),
        }
    except CannotRun as error:
        answer = {"error": str(error)}
    print("NSA-REF " + json.dumps(answer))


def versions() -> dict[str, str]:
    """What the verdict depends on; only what is loaded is listed."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("nsa_ref", "nsa_fast", "numpy", "torch", "triton", "hypothesis"):
        if name in sys.modules:
            version = getattr(sys.modules[name], "__version__", None)
            if version is not None:
                found[name] = str(version)
    return found


__all__ = ["CannotRun", "OracleImplementation", "load", "resolve_device", "try_loading"]

if __name__ == "__main__":
    _main(*sys.argv[1:3])
