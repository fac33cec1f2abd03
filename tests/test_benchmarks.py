"""The scripts in benchmarks/ run, and what they write can be read."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from nsa_fast import interpreter  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MISSING = interpreter.missing()
TRITON = importlib.util.find_spec("triton") is not None


def constants(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.hardware_constants", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )


@pytest.mark.skipif(bool(MISSING), reason=f"the interpreter does not run here: {MISSING}")
def test_the_constants_of_the_interpreter_are_those_of_numpy(tmp_path: Path) -> None:
    """Every kernel of the script runs; in NumPy's float32 everything is rounded to nearest."""
    output = tmp_path / "constants.json"
    done = constants("--device=interpreter", "--size=2048", f"--output={output}")
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert "no hardware" in report["device"]
    assert {"torch", "triton", "python"} <= set(report["versions"])
    measured: dict[str, Any] = report["measured"]
    assert measured["functions"]["exp2(0)"] == 1
    assert 0 < measured["functions"]["exp2, relative error in units of 2^-24"] < 4
    for row in ("fp32, tiles of 16", "fp32, tiles of 64", "bf16, tiles of 64"):
        one, sixteen, largest, mean = measured[f"accumulation, {row}"].values()
        assert one == 1
        assert sixteen == 8
        assert abs(mean) < largest < 530
    assert measured["delta is kept in"] == {"bf16": "float32"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.skipif(not TRITON, reason="the script needs triton")
def test_without_a_gpu_it_says_so() -> None:
    done = constants()
    assert done.returncode == 1
    assert done.stderr.endswith(
        "there is no GPU here. Try --device interpreter, which shows how the script works\n"
    )


@pytest.mark.skipif(TRITON, reason="triton is here")
def test_without_triton_it_says_so() -> None:
    done = constants()
    assert done.returncode == 1
    assert done.stderr == "triton is not installed here, and this script is about its kernels\n"


def test_results_say_where_they_come_from() -> None:
    for path in RESULTS.glob("*.json"):
        report = json.loads(path.read_text())
        assert report["versions"]["commit"], path
        assert report["device"], path
