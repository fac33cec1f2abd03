"""Options, worker set-up and Hypothesis profiles all live in the plugins that ports use too."""

import pytest

from nsa_ref.testing.options import SHARED_OPTIONS, destination

pytest_plugins = ["nsa_ref.testing.plugin", "nsa_ref.testing.workers"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """In this repository nothing else has a --device: the names of `nsa-ref verify` do as well."""
    for name, about in SHARED_OPTIONS.items():
        parser.addoption(name, dest=destination(name), **about)
