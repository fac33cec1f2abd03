"""What the command line says about a run: options that `nsa-ref verify` and pytest share."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.loading import DEVICES
from nsa_ref.testing.profiles import LEVELS


@dataclass(frozen=True, kw_only=True)
class Options:
    """How properties are run.

    spec : how the implementation was named on the command line, for replay commands
    case : run this one case instead of generated ones
    any_property : no property found the case, so that some may not be about such cases
    ledger : the file of known failures; None for the one beside the implementation, if any
    timeout : seconds that the port may run in one case; only worker processes are ended for it
    deadline : when the time is up that `--time` gives, as `time.time` counts
    turn : which of a property's turns it is, each with some of its cases (see `drawing`); None for
        all cases at once
    share : of the time that is left to all workers, what this turn may take
    examples, shared : of fuzzing: the folder of Hypothesis' examples, and a Redis server's URL
    seconds : of fuzzing: how long new cases of one property are drawn
    traces : a worker that dies writes where it was to a file (True) or to standard error (False)
    shrink : a broken case is made smaller
    """

    spec: str = ""
    level: str = "quick"
    dtypes: tuple[str, ...] = ()
    seed: int = 0
    case: Case | None = None
    any_property: bool = False
    findings: Path = Path("nsa-ref-findings")
    ledger: Path | None = None
    timeout: float = 120.0
    deadline: float = math.inf
    turn: int | None = None
    share: float = 1.0
    examples: str = ""
    shared: str = ""
    seconds: float = math.inf
    traces: bool = False
    shrink: bool = True

    @property
    def for_all_turns(self) -> Options:
        """The same for every turn of a property, none of which draws other cases."""
        return dataclasses.replace(self, turn=None, share=1.0, deadline=math.inf)

    @property
    def seconds_left(self) -> float:
        """Until the deadline; 0 behind it."""
        return max(0.0, self.deadline - time.time())


#: Seconds that anything may take: a thousand hours; and that a case needs, however small it is.
MOST_SECONDS, LEAST_SECONDS = 3.6e6, 0.1


def parse_seed(text: str) -> int:
    """The number that `--seed` gives, at least 0."""
    if not re.fullmatch("[0-9]{1,100}", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return int(text)


def parse_seconds(text: Any) -> float:
    """A number of seconds in which a case can run, and no more than a clock can wait for."""
    try:
        value = 0.0 if isinstance(text, bool) else float(text)
    except (TypeError, ValueError, OverflowError):
        value = 0.0
    if not LEAST_SECONDS <= value <= MOST_SECONDS:
        rule = f"must be a number of seconds from {LEAST_SECONDS} to {MOST_SECONDS:.0f}"
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return value


def parse_duration(text: str) -> float:
    """Seconds, from "90s", "5m" or "2h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < seconds <= MOST_SECONDS:
        rule = f"must be a time such as 90s, 5m or 2h, and at most {MOST_SECONDS / 3600:.0f}h"
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return seconds


#: name -> what argparse is told about it
SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--device": {"default": "auto", "choices": DEVICES, "help": "default: the best there is"},
    "--level": {"default": "quick", "choices": tuple(LEVELS), "help": "default: quick"},
    "--branch": {
        "action": "append",
        "choices": ("compress", "fine", "sliding", "selection", "layer"),
        "help": "this branch only; may be repeated (default: all)",
    },
    "--dtype": {
        "action": "append",
        "choices": tuple(DTYPES),
        "help": "this dtype only; may be repeated (default: all that are declared)",
    },
    "--seed": {
        "type": parse_seed,
        "default": 0,
        "help": "another number, other cases (default: 0)",
    },
    "--findings": {
        "metavar": "DIR",
        "default": "nsa-ref-findings",
        "help": "folder for the cases that broke a clause (default: nsa-ref-findings)",
    },
    "--ledger": {
        "metavar": "FILE",
        "help": "known failures (default: nsa-ref-known.toml beside the implementation, if any)",
    },
    "--case-timeout": {
        "type": parse_seconds,
        "default": 120.0,
        "metavar": "SECONDS",
        "help": "time that the port may run in one case, in a worker process (default: 120)",
    },
}


def option_name(name: str) -> str:
    """What pytest calls an option of `nsa-ref verify`: other plugins have a --device, too."""
    return f"--nsa-{name.removeprefix('--')}"


def destination(name: str) -> str:
    """Where pytest keeps its value."""
    return option_name(name).removeprefix("--").replace("-", "_")
