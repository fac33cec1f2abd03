"""The files of a new port: an adapter to fill in, its tests, its ledger, and a workflow for CI."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from nsa_ref.testing.ledger import FILE_NAME
from nsa_ref.testing.loading import CannotRun

TEMPLATES = Path(__file__).parent / "templates"


def begin(port: str, folder: Path, *, numpy: bool) -> list[Path]:
    """Write the files of a port into a folder; they run as they are.

    port : its name, as Python spells names, e.g. "my_port"
    numpy : the adapter takes NumPy arrays, and not tensors
    returns : what was written; the first is the adapter

    Raises
    ------
    CannotRun : the name is none, none can be made of it for the class, or one of the files is
        there already
    """
    if not port.isidentifier() or keyword.iskeyword(port):
        raise CannotRun(f"{port!r} must be a name as Python has them. Try my_port")
    module, adapter = f"{port}_adapter", "numpy_adapter" if numpy else "torch_adapter"
    names = {
        "name": port.replace("_", " "),
        "module": module,
        "cls": _class_name(port, adapter),
        "needs": "" if numpy else " torch",
    }
    files = {
        folder / f"{module}.py": adapter,
        folder / f"test_{port}_nsa.py": "test",
        folder / FILE_NAME: "ledger",
        folder / "nsa-ref-workflow.yml": "workflow",
    }
    if there := [path.name for path in files if path.exists()]:
        are = "is" if len(there) == 1 else "are"
        why = f"{' and '.join(there)} {are} there already, and nothing was written"
        raise CannotRun(f"{why}. Try another folder, or move it away")
    for path, template in files.items():
        try:
            path.write_text(Template(_text(template)).substitute(names), "utf-8")
        except OSError as error:
            raise CannotRun(f"cannot write {path}: {error.strerror}") from None
    return list(files)


def _text(template: str) -> str:
    return (TEMPLATES / f"{template}.txt").read_text("utf-8")


def _class_name(port: str, adapter: str) -> str:
    """The words of the port's name; "Port" behind a keyword, or what the adapter imports."""
    name = "".join(part[:1].upper() + part[1:] for part in port.split("_"))
    if not name.isidentifier():
        raise CannotRun(f"{port!r} must begin with a letter, which names the class. Try my_port")
    imports = re.findall(r"^(?:from .+ )?import (.+)$", _text(adapter), re.MULTILINE)
    taken = re.findall(r"\w+", " ".join(imports))
    return f"{name}Port" if keyword.iskeyword(name) or name in taken else name
