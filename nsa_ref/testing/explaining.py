"""What a clause, a switch, a preset or a property is about, as a page of Markdown."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from pathlib import Path

import nsa_ref
from nsa_ref.semantics import PRESETS, Semantics
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.mutants import ZOO
from nsa_ref.testing.properties import PROPERTIES

SWITCHES = tuple(field.name for field in dataclasses.fields(Semantics))

#: Everything that can be explained.
SUBJECTS = (*CLAUSES, *SWITCHES, *PRESETS, *PROPERTIES)


def explain(subject: str) -> str:
    """The page about a clause, a switch, a preset or a property.

    Raises
    ------
    KeyError : there is no such thing; the argument names those that it may be about
    """
    name = {known.lower(): known for known in SUBJECTS}.get(subject.lower())
    if name is None:
        raise KeyError(_near(subject))
    if name in CLAUSES:
        return _clause(name)
    if name in SWITCHES:
        return _switch(name)
    return _preset(name) if name in PRESETS else _property(name)


def _near(subject: str) -> list[str]:
    """Clauses that have the words in their sentence, names that have them, and names like it."""
    words = subject.lower().split()
    said = [
        clause
        for clause, sentence in CLAUSES.items()
        if words
        and all(re.search(rf"\b{re.escape(w.rstrip('s'))}", sentence.lower()) for w in words)
    ]
    named = [name for name in (*SWITCHES, *PRESETS) if subject.lower() in name.lower()]
    alike = difflib.get_close_matches(subject, SUBJECTS, n=5, cutoff=0.7)
    return list(dict.fromkeys([*said[:4], *named[:3], *alike]))


def pages_folder() -> Path:
    """docs/: in a wheel beside the code, in a checkout beside the package."""
    package = Path(nsa_ref.__file__).parent
    inside = package / "docs"
    return inside if inside.is_dir() else package.parent / "docs"


def _page(name: str) -> str:
    return (pages_folder() / name).read_text("utf-8")


def _clause(name: str) -> str:
    # the section ends where another heading begins
    section = re.split(rf"^### {name}\n", _page("semantics.md"), flags=re.MULTILINE)[1]
    parts = [f"# {name}", re.split(r"^#", section, flags=re.MULTILINE)[0].strip()]
    rows = [row for row in _switches() if name in re.findall(r"\w+", row[3])]
    listed = [f"- {switch} ({values}): {says}" for switch, values, says, _ in rows]
    if listed:
        parts += ["## Switches that bear on it", "\n".join(listed)]
    else:
        parts.append("No switch bears on it.")
    if wrong := [mutant for mutant in ZOO.values() if mutant.clause == name]:
        parts.append("## How people get it wrong")
        lines = (m.mistake + (f" ({m.seen_in})" if m.seen_in else "") for m in wrong)
        parts.append("\n".join(f"- {line}" for line in lines))
    asked = [prop.name for prop in PROPERTIES.values() if prop.clause == name]
    parts += ["## Properties that decide it", "\n".join(f"- {prop}" for prop in asked)]
    return "\n\n".join(parts) + "\n"


def _switches() -> list[tuple[str, str, str, str]]:
    """Switch, values, what it says, clauses: the table of the specification."""
    found = re.findall(r"^\| (`\w+`) \| (.+?) \| (.+?) \| (.+?) \|$", _page("semantics.md"), re.M)
    return [row for row in found if row[0].strip("`") in SWITCHES]


def _switch(name: str) -> str:
    ((_, values, says, clauses),) = [row for row in _switches() if row[0] == f"`{name}`"]
    by_preset = "\n".join(f"- {p}: {getattr(preset, name)!r}" for p, preset in PRESETS.items())
    about = re.findall(r"\w+", clauses)
    sentences = "\n".join(f"- {clause}: {CLAUSES[clause]}" for clause in about if clause in CLAUSES)
    return (
        f"# {name}\n\n{says[0].upper()}{says[1:]}. Its values: {values}.\n\n"
        f"## What the presets say\n\n{by_preset}\n\n## Clauses that it bears on\n\n{sentences}\n"
    )


def _preset(name: str) -> str:
    preset, paper = PRESETS[name], PRESETS["PAPER"]
    (sentence,) = re.findall(rf"^- `{name}` (is .+)$", _page("presets.md"), re.M)
    differs = [s for s in SWITCHES if getattr(preset, s) != getattr(paper, s)]
    lines = "\n".join(f"- {s}: {getattr(preset, s)!r}, not {getattr(paper, s)!r}" for s in differs)
    return f"# {name}\n\n{name} {sentence}\n\n## Where it differs from PAPER\n\n" + (
        f"{lines}\n" if lines else "Nowhere.\n"
    )


def _property(name: str) -> str:
    prop = PROPERTIES[name]
    check = inspect.unwrap(getattr(prop.check, "func", prop.check))
    parts = [f"# {name}", inspect.cleandoc(check.__doc__ or "").partition("\n\n")[0]]
    gradients = "the gradients of " if prop.backward else ""
    parts.append(f"It asks {gradients}`{prop.method}` of an adapter, and decides {prop.clause}.")
    parts.append(f"> {prop.clause}: {CLAUSES[prop.clause]}")
    parts.append(f"`nsa-ref explain {prop.clause}` says more.")
    return "\n\n".join(parts) + "\n"
