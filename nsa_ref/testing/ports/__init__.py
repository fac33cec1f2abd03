"""Adapters of public packages, as models of good ones; each needs its package to be installed."""

from __future__ import annotations

import importlib.util


def check_installed(module: str, requirement: str) -> None:
    """Raise ModuleNotFoundError, with what would install it, where a module is not there."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"{module} is not installed. Try pip install {requirement}", name=module
        )
