"""Known failures, from a finding to a green run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import nsa_ref
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, main

PORT = """
import os
from nsa_ref.testing import OracleImplementation

class Port(OracleImplementation):
    name = "port"

    def offers(self, method):
        return method == "sliding"

    def sliding(self, case, q, k, v):
        found = super().sliding(case, q, k, v)
        if case.q_len % 3 == 2 and {first}:
            {deed}
        if case.sliding_window_size == 0 and {second}:
            found.out[...] *= 2
        return found
"""


def port(first: bool = True, second: bool = False, deed: str = "found.out[...] *= 2") -> None:
    Path("port.py").write_text(PORT.format(first=first, second=second, deed=deed))


def verify(*arguments: str) -> tuple[int, dict[str, str], dict, str]:
    """Exit code, verdicts by clause, the report's ledger, and what was said."""
    done = nsa_ref("verify", "port:Port", "--branch=sliding", "--json=report.json", *arguments)
    report = json.loads(Path("report.json").read_text())
    verdicts = {row["id"]: row["verdict"] for row in report["clauses"]}
    return done.returncode, verdicts, report, done.stdout + done.stderr
