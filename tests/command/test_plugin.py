"""The plugin in a stranger's pytest, and how workers share a machine."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest

from commands import python
from nsa_ref.testing import plugin
from nsa_ref.testing import workers as workers_plugin
from nsa_ref.testing.options import SHARED_OPTIONS
from pages import ROOT
from port_zoo import SlidingMask

ROOM = workers_plugin.GPU_MEMORY_PER_WORKER

FIVE_LINES = """\
from nsa_ref.testing import conformance_suite
from port_zoo import {port}

globals().update(conformance_suite({port}()))
"""


@pytest.fixture
def stranger(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with no conftest above it; what configures pytest further up is not read."""
    (place / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return place


def run_pytest(*arguments: str) -> CompletedProcess[str]:
    """pytest on what lies here."""
    return python("-m", "pytest", "--rootdir=.", "-p", "no:cacheprovider", *arguments)


PLUGIN = ("-p", "nsa_ref.testing.plugin")


@pytest.mark.parametrize(
    "arguments",
    [(*PLUGIN, "--nsa-branch=sliding"), (*PLUGIN, "-p", "no:xdist"), (), ("-n", "2")],
    ids=["plugin", "no xdist", "plain", "plain -n 2"],
)
def test_a_strangers_five_lines_run(arguments: tuple[str, ...], stranger: Path) -> None:
    """With the plugin and without; what is not offered is skipped, with its reason."""
    (stranger / "test_port.py").write_text(FIVE_LINES.format(port="SlidingMask"))
    done = run_pytest("-rs", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "SKIPPED" in done.stdout and "not offered" in done.stdout
    assert not (stranger / "nsa-ref-findings").exists()


def test_a_crash_in_a_strangers_worker_is_told_with_its_case(
    stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GitHub in an annotation as well."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    (stranger / "test_port.py").write_text(FIVE_LINES.format(port="Segfaults"))
    done = run_pytest(*PLUGIN, "-n", "1", "--nsa-branch=sliding")
    assert done.returncode == 1
    assert "W1 is broken by segfaults on cpu" in done.stdout, done.stdout
    assert "case: Case(" in done.stdout and "nsa-ref replay " in done.stdout
    assert "\n::error title=W1 is broken by segfaults::W1 is broken" in done.stdout
    kept = [path.name for path in (stranger / "nsa-ref-findings").iterdir()]
    assert len(kept) == 2 and all(name.endswith("-crash.json") for name in kept)


GUEST = """\
import os, signal
import torch

import nsa_ref.testing
from nsa_ref.testing import conformance_suite
from port_zoo import SlidingMask

THREADS = torch.get_num_threads()
NAMES = ("OMP_NUM_THREADS", "MALLOC_PERTURB_")


def as_it_was():
    return (
        not any(name in os.environ for name in NAMES)
        and torch.get_num_threads() == THREADS
        and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        and "CUDA_VISIBLE_DEVICES" not in os.environ
    )


class Port(SlidingMask):
    def sliding_mask(self, case):
        assert all(os.environ[name] == "1" for name in NAMES)
        assert torch.get_num_threads() == 1
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return super().sliding_mask(case)


def test_before():
    assert as_it_was()


globals().update(conformance_suite(Port()))


def test_after():
    assert as_it_was()
"""


def test_tests_beside_the_suite_do_not_notice_it(
    stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in their options, nor in what their worker process is like."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = [name for name in SHARED_OPTIONS]
    (stranger / "conftest.py").write_text(
        "def pytest_addoption(parser):\n"
        f"    for name in {options}:\n        parser.addoption(name, default='theirs')\n"
    )
    (stranger / "test_port.py").write_text(GUEST)
    arguments = ("-n", "1", "--device=theirs", "--nsa-branch=sliding", "--nsa-device=cpu")
    # a run that was started in the background ignores Ctrl-C, and so would its children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run_pytest(*PLUGIN, *arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_this_repository_has_the_names_of_the_command_as_well() -> None:
    """`pytest -n auto --device cuda`, as the pages say."""
    arguments = ("--collect-only", "--device=cpu", "--seed=7", "--branch=fine")
    done = python("-m", "pytest", *arguments, "tests/house/test_property_names.py", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nsa-ref: device cpu, level quick, seed 7" in done.stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--nsa-branch=win", r"choose from \W*compress.*selection"),
        ("--nsa-level=deep", r"choose from \W*quick\W*thorough"),
        ("--nsa-dtype=float8", "choose from .*bfloat16"),
        ("--nsa-device=tpu", r"choose from \W*auto\W*cpu\W*cuda"),
        ("--nsa-seed=-1", "at least 0"),
        ("--nsa-case-timeout=0", "from 0.1 to 3600000"),
        ("--nsa-case-timeout=inf", "from 0.1 to 3600000"),
        ("--nsa-case-timeout=nan", "from 0.1 to 3600000"),
    ],
)
def test_options_are_checked(option: str, words: str) -> None:
    """In this process: the plugin is asked as pytest asks it."""
    parser = pytest.Parser(_ispytest=True)
    plugin.pytest_addoption(parser)
    with pytest.raises(pytest.UsageError, match=words):
        parser.parse([option])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"--nsa-implementation": "nowhere"}, r"package\.module:object"),
        ({"--nsa-case": ["missing.json"]}, r"there is no file missing\.json"),
        ({"--nsa-case": ["wrong.json"]}, r"wrong\.json holds no case: case=null"),
        ({"--nsa-ledger": "missing.toml"}, r"missing\.toml: \[Errno 2\]"),
        ({"--nsa-findings": "/dev/null"}, "--nsa-findings /dev/null: cannot write there: File"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_a_usage_error(
    given: dict[str, Any], words: str, place: Path
) -> None:
    Path("wrong.json").write_text('{"case": null}')
    options: dict[str, Any] = {"--nsa-device": "cpu", "--nsa-deadline": math.inf}
    options |= {"--nsa-findings": str(place)} | given
    config = SimpleNamespace(option=object(), getoption=options.get)
    with pytest.raises(pytest.UsageError, match=words):
        plugin.pytest_configure(config)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["plain", "workers"])
def test_a_device_that_is_not_here_is_no_pass(workers: tuple[str, ...], stranger: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (stranger / "test_port.py").write_text(FIVE_LINES.format(port="SlidingMask"))
    done = run_pytest(*PLUGIN, "--nsa-device=cuda", *workers)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.strip().splitlines()
    assert re.search("--nsa-device cuda: torch .* sees no CUDA device here", line)


def test_a_dtype_that_nothing_here_declares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker, which may not raise there, by each of its tests."""
    function = SimpleNamespace(nsa_ref_implementation=SlidingMask(), nsa_ref_property="W1")
    options: dict[str, Any] = {"--nsa-dtype": ["float16"]}
    config: Any = SimpleNamespace(getoption=options.get)
    items: Any = [SimpleNamespace(function=function, config=config), SimpleNamespace()]
    words = "--nsa-dtype float16: mask declare float64"
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.UsageError, match=words):
        plugin.pytest_collection_modifyitems(config, items)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    plugin.pytest_collection_modifyitems(config, items)
    with pytest.raises(pytest.fail.Exception, match=words):
        next(plugin.pytest_runtest_call(items[0]))
    options["--nsa-dtype"].append("float64")
    options["--nsa-dtype"].remove("float16")
    plugin.pytest_collection_modifyitems(config, items)
    plugin.pytest_collection_modifyitems(config, items[1:])


# --- workers and GPUs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "free", "workers"),
    [
        (8, [], 8),
        (8, [100 * ROOM], 8),
        (8, [3 * ROOM], 3),
        (8, [3 * ROOM, 3 * ROOM], 6),
        (8, [1 * ROOM, 9 * ROOM], 2),  # worker 2 would be the second on the first GPU
        (8, [9 * ROOM, 1 * ROOM], 3),
        (8, [ROOM // 2], 1),  # one can always try
        (1, [9 * ROOM], 1),
    ],
)
def test_there_are_no_more_workers_than_any_gpu_has_memory_for(
    cpus: int, free: list[int], workers: int
) -> None:
    gpus = [(str(i), memory) for i, memory in enumerate(free)]
    assert workers_plugin.max_workers(cpus, gpus) == workers
    for i, memory in enumerate(free):
        served = len(range(i, workers, len(free)))
        assert served * ROOM <= memory or workers == 1


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an `nvidia-smi` that says what the file `answer` holds."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "answer").write_text("0, 20000\n1, 50000\n2, [N/A]\n")
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, [("0", 20000), ("1", 50000), ("2", ROOM)]),
        ("1", [("1", 50000)]),
        ("1,0", [("1", 50000), ("0", 20000)]),
        ("GPU-abc", [("GPU-abc", ROOM)]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [("0", 20000)]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    visible: str | None,
    gpus: list[tuple[str, int]],
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers_plugin.gpus() == gpus


@pytest.mark.parametrize("answer", ["", "No devices were found\n", "garbage, , ,\n"])
def test_an_nvidia_smi_without_gpus_is_no_gpu(answer: str, machine: Path) -> None:
    (machine / "answer").write_text(answer)
    assert workers_plugin.gpus() == []


def test_worker_n_gets_gpu_n_modulo_their_count(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    for name in threads:
        monkeypatch.delenv(name, raising=False)
    for worker, gpu in (("gw0", "0"), ("gw1", "1"), ("gw2", "2"), ("gw10", "1")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        workers_plugin.assign_resources(worker)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu
        assert {os.environ[name] for name in threads} == {"1"}


def test_threads_that_somebody_has_chosen_stay(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    workers_plugin.assign_resources("gw0")
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_seed_does_not_depend_on_where_modules_lie() -> None:
    """Hypothesis draws no number from the source of this repository."""
    from hypothesis.internal.conjecture import providers

    assert len(providers._get_local_constants()) == 0
