"""The port in C reads golden vectors, checks itself by them, and answers them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nsa_ref.testing.answers import judge_answers
from nsa_ref.testing.cli import HOLDS, main
from nsa_ref.testing.vectors import named_cases, write
from pages import ROOT

pytest.importorskip("safetensors", reason="the extra 'vectors' is not installed")

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler `cc` here")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sliding branch with the paper's conventions, causal and not: what the port knows."""
    folder = tmp_path_factory.mktemp("c_port") / "vectors"
    own = (n for n in named_cases() if n[1] == "sliding" and n[2].startswith("PAPER"))
    write(folder, own)
    return folder


def compiled(place: Path, *options: str) -> Path:
    program = place / "sliding"
    source = ROOT / "examples/c_port/sliding.c"
    strict = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
    command = [str(COMPILER), *strict, *options, "-o", str(program), str(source), "-lm"]
    subprocess.run(command, check=True)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True)


def test_it_is_right(vectors: Path, tmp_path: Path) -> None:
    """By its own check, and by `nsa-ref check` of what it writes."""
    program, files = compiled(tmp_path), sorted(map(str, vectors.glob("*.safetensors")))
    done = run(program, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{len(files)} vectors, 0 wrong\n")
    answers = tmp_path / "answers"
    answers.mkdir()
    assert run(program, "-o", str(answers), *files).returncode == 0
    judged = judge_answers(vectors, answers)
    passed = {record.clause for record in judged.records if record.cases}
    assert passed == {"A1", "A2", "W1", "W2", "W3"}
    refused = {why for record in judged.records for why in record.not_offered}
    assert "float16" in refused and "sliding dq" in refused
    assert main(["check", str(vectors), str(answers)]) == HOLDS


def test_a_planted_bug_is_found_by_both(vectors: Path, tmp_path: Path) -> None:
    """A window that is one key short."""
    program, files = compiled(tmp_path, "-DPLANTED_BUG"), sorted(vectors.glob("*.safetensors"))
    answers = tmp_path / "answers"
    answers.mkdir()
    done = run(program, "-o", str(answers), *map(str, files))
    assert done.returncode == 1
    assert "sliding-PAPER-plain-float32.safetensors: out[" in done.stdout
    findings = judge_answers(vectors, answers).findings
    assert [finding["clause"] for finding in findings] == ["W1", "W2", "W3"]
    assert findings[0]["convention"] == {"name": "window_closed", "value": False}


@pytest.mark.parametrize("data", [b"", b"\x10", b"\xff" * 32, (4).to_bytes(8, "little") + b"{}  "])
def test_what_it_cannot_read_it_says(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(data)
    done = run(compiled(tmp_path), str(file))
    assert done.returncode == 2 and "bad.safetensors: " in done.stderr
