"""Findings: a broken case as data, kept in a file, read again for its replay, folded by cause."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nsa_ref.testing.case import Case, load_case
from nsa_ref.testing.files import read_text, write_json
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.verdicts import FAILURES, Broken
from nsa_ref.testing.wording import describe

#: Letters of a file's name.
LONGEST_NAME = 180

#: What the report needs to tell a finding.
TOLD = {"spec", "implementation", "clause", "kind", "tensor", "fault", "text", "file", "case"}

#: JSON values: what `described`, `broken_data` and `save_finding` give.
Finding = dict[str, Any]


def described(
    prop: Property, implementation: Implementation, options: Options, case: Case
) -> Finding:
    """What a replay needs to know; and the seed, unless one case was run."""
    drawn = {"seed": options.seed} if options.case is None else {}
    return {
        "property": prop.name,
        "clause": prop.clause,
        "spec": options.spec or _spec(implementation),
        "implementation": implementation.name,
        "device": implementation.device,
        "timeout": options.timeout,
        "case": case.to_json(),
        **drawn,
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
    """Write a finding into the folder; adds `file` and `replay`.

    What cannot be written says why in `unsaved`: the report has it all the same.
    """
    path = folder / f"{_file_name(finding)}.json"
    # the user names the implementation if nothing here can find its class again
    spec = "" if finding["spec"] else " MODULE:OBJECT"
    finding |= {"file": str(path), "replay": f"nsa-ref replay {shlex.quote(str(path))}{spec}"}
    finding.pop("unsaved", None)
    try:
        write_json(path, finding)
    except OSError as error:
        finding |= {"unsaved": error.strerror}
    return finding


def _file_name(finding: Finding) -> str:
    """What tells a finding from all others: another seed, or device, overwrites none."""
    if "seed" in finding:
        drawn = f"seed{finding['seed']}"
    else:
        drawn = f"case{zlib.crc32(json.dumps(finding['case']).encode()):08x}"
    # a broken case may crash when it is made smaller: that is another finding, in another file
    ended = [finding["ended"]] if "ended" in finding else []
    words = ("clause", "property", "implementation", "device")
    whole = "-".join([*(finding[word] for word in words), drawn, *ended])
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in whole)
    if name.isascii() and len(name) <= LONGEST_NAME:
        return name
    # file systems have room for some 255 bytes, and not all of them for every letter
    short = "".join(c if c.isascii() else "_" for c in name)
    half = LONGEST_NAME // 2
    short = short if len(short) <= LONGEST_NAME else f"{short[:half]}-{short[-half:]}"
    return f"{short}-{zlib.crc32(whole.encode(errors='surrogatepass')):08x}"


def finite(value: Any) -> Any:
    """The same data as JSON has it: tuples are lists, NaN and infinity are texts.

    Half of a pair of code units, as Python makes of a byte that is no UTF-8, is a question mark.
    """
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
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
    text = read_text(path)
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("it must hold a JSON object")
    if "case" not in data and data.keys() & {"spec", "property", "clause"}:
        raise ValueError("it has no 'case', which every finding has")
    for name in ("spec", "property", "implementation", "device"):
        if not isinstance(data.get(name, ""), str):
            raise ValueError(f"{name}={data[name]!r} must be a text")
    return load_case(text), data


def findings_in(folder: Path) -> Iterator[tuple[Path, Finding]]:
    """The findings that lie in a folder, each with its file, by name; other files are left out."""
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            _, finding = read_finding(path)
            if finding.get("property") in PROPERTIES and finding.keys() >= TOLD:
                yield path, finding


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


def told_by(path: Path, finding: Finding) -> Path:
    """The finding under which the report tells this one; itself, if the folder has no other.

    Its property sees the mistake best: others may meet it in few of their cases.
    """
    cause = finding.get("cause")
    first = path.with_name(Path(cause).name) if isinstance(cause, str) else path
    return first if first.is_file() else path


def of_one_cause(finding: Finding, folder: Path) -> list[Finding]:
    """The findings that have the cause of this one, as far as the folder has them; it is first."""
    found = [finding]
    for path in sorted(folder.glob("*.json")) if "cause" in finding else ():
        with contextlib.suppress(OSError, ValueError):
            other = json.loads(read_text(path))
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
