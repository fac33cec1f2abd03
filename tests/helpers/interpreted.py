"""Tests that compile Triton kernels, or run them in its interpreter: a marker asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nsa_fast import interpreter

#: Why nothing can be run here, if nothing can.
MISSING = interpreter.missing()


def runs(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test that takes its seconds: `pytest -m triton` asks for it, `pytest` does not."""
    here = pytest.mark.skipif(bool(MISSING), reason=f"the interpreter does not run here: {MISSING}")
    marked: Callable[..., Any] = pytest.mark.triton(here(test))
    return marked
