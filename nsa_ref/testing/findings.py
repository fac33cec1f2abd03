"""Findings: a broken case as data, kept in a file, read again for its replay, folded by cause."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nsa_ref.testing.case import Case, load_case
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import Property
from nsa_ref.testing.verdicts import FAILURES, Broken
from nsa_ref.testing.wording import describe

#: JSON values: what `described`, `broken_data` and `save_finding` give.
Finding = dict[str, Any]


def described(
    prop: Property, implementation: Implementation, options: Options, case: Case
) -> Finding:
    """What a replay needs to know."""
    return {
        "property": prop.name,
        "clause": prop.clause,
        "spec": options.spec or _spec(implementation),
        "implementation": implementation.name,
        "device": implementation.device,
        "timeout": options.timeout,
        "case": case.to_json(),
    }


def _spec(implementation: Implementation) -> str:
    """How a replay can name an implementation that a test file made: by its class, if it can."""
    cls = type(implementation)
    module = sys.modules.get(cls.__module__)
    if module is None or getattr(module, cls.__qualname__, None) is not cls:
        return ""
    return f"{cls.__module__}:{cls.__qualname__}"


def broken_data(broken: Broken) -> Finding:
    """What is broken: its fields, and the text that is made of them."""
    # an exception's message may hold what no terminal can print
    text = describe(broken).encode(errors="replace").decode()
    data: Finding = finite(broken.to_json() | {"text": text})
    return data


def save_finding(finding: Finding, folder: Path) -> Finding:
    """Write a finding into the folder; adds `file` and `replay`."""
    # a broken case may crash when it is made smaller: that is another finding, in another file
    ended = [finding["ended"]] if "ended" in finding else []
    name = "-".join((finding["clause"], finding["property"], finding["implementation"], *ended))
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    path = folder / f"{name}.json"
    # the user names the implementation if nothing here can find its class again
    spec = "" if finding["spec"] else " MODULE:OBJECT"
    finding |= {"file": str(path), "replay": f"nsa-ref replay {shlex.quote(str(path))}{spec}"}
    write_json(path, finding)
    return finding


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON in one step: a process that dies meanwhile leaves no half of a file."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    half = path.with_suffix(".half")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another worker removed the empty folder
            half.write_text(text)
            half.replace(path)
            return


def finite(value: Any) -> Any:
    """The same data as JSON has it: tuples are lists, NaN and infinity are texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def read_finding(path: Path) -> tuple[Case, Finding]:
    """A case and what its file says besides, which is nothing if it was written by hand.

    Raises
    ------
    OSError, ValueError, TypeError, KeyError : the file holds no case
    """
    text = path.read_text()
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("it must hold a JSON object")
    if "case" not in data and data.keys() & {"spec", "property", "clause"}:
        raise ValueError("it has no 'case', which every finding has")
    for name in ("spec", "property", "implementation", "device"):
        if not isinstance(data.get(name, ""), str):
            raise ValueError(f"{name}={data[name]!r} must be a text")
    return load_case(text), data


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings that are likely to have one cause, together; the first is the one to look at.

    They have the same `cause`, if that was tried (see `causes`), or are alike but for numbers; of
    these the smallest case stands first.
    """
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding["cause"],) if "cause" in finding else alike_as(finding)
        groups.setdefault(key, []).append(finding)
    for key, group in groups.items():
        if len(key) > 1:
            group.sort(key=lambda finding: size_of(Case.from_json(finding["case"])))
    return list(groups.values())


def size_of(case: Case) -> tuple[int, ...]:
    """What makes a case larger: tokens, then heads, then features."""
    return case.q_len + case.kv_len, case.batch * case.q_heads, case.head_dim + case.value_dim


def alike_as(finding: Finding) -> tuple[str, ...]:
    """What findings share that are alike in all but place and numbers."""
    who, fault = finding["implementation"], finding["fault"]
    if finding["kind"] in FAILURES:
        # the line that raised, and not the message, which may name sizes
        return who, finding["kind"], fault["where"][-1] if fault["where"] else finding["tensor"]
    if fault.get("actual") == "nan":
        return who, "nan", finding["tensor"].partition(" ")[0]
    return who, finding["clause"], finding["kind"], finding["tensor"]


def of_one_cause(finding: Finding, folder: Path) -> list[Finding]:
    """The findings that have the cause of this one, as far as the folder has them; it is first."""
    found = [finding]
    for path in sorted(folder.glob("*.json")) if "cause" in finding else ():
        with contextlib.suppress(OSError, ValueError):
            other = json.loads(path.read_text())
            if isinstance(other, dict) and other.get("cause") == finding["cause"]:
                found.append(other)
    return found


def seen_under(findings: Iterable[Finding]) -> dict[str, str]:
    """File of a finding -> the clause under which its failure, or its NaN, is told already."""
    under = {}
    for first, *others in grouped(findings):
        no_value = first["kind"] in FAILURES or first["fault"].get("actual") == "nan"
        for other in others if no_value else ():
            if other["clause"] != first["clause"]:
                under[other["file"]] = first["clause"]
    return under


def remove_if_empty(*folders: Path) -> None:
    """Remove those folders that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
