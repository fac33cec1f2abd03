"""Tests that run kernels in Triton's interpreter take minutes: a marker asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nsa_fast import interpreter

#: Why nothing can be run here, if nothing can.
MISSING = interpreter.missing()


def runs(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test that runs kernels: `pytest -m interpreter` asks for it, `pytest` does not."""
    here = pytest.mark.skipif(bool(MISSING), reason=f"the interpreter does not run here: {MISSING}")
    marked: Callable[..., Any] = pytest.mark.interpreter(here(test))
    return marked
