"""What the command line says about a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nsa_ref.testing.case import Case


@dataclass(frozen=True, kw_only=True)
class Options:
    """How properties are run.

    spec : how the implementation was named on the command line, for replay commands
    case : run this one case instead of generated ones
    any_property : no property found the case, so that some may not be about such cases
    timeout : seconds that one case may take; only worker processes are ended for it
    traces : a worker that dies leaves a file that says where it was, because somebody reads it;
        otherwise it says so on its standard error
    shrink : a broken case is made smaller
    """

    spec: str = ""
    level: str = "quick"
    dtypes: tuple[str, ...] = ()
    seed: int = 0
    case: Case | None = None
    any_property: bool = False
    findings: Path = Path("nsa-ref-findings")
    timeout: float = 120.0
    traces: bool = False
    shrink: bool = True
