"""A run whose worker processes are the judge's alone: how they share a machine.

`nsa-ref` loads it beside `plugin`, and so does this repository. It changes whole processes, from
their start on: a suite with other tests in it that has several GPUs to itself names it with
`-p nsa_ref.testing.workers`.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from nsa_ref.testing.options import option_name
from nsa_ref.testing.plugin import ENVIRONMENT, distributes, ignore_ctrl_c

#: What one worker's CUDA context, compiler and test arrays may take of a GPU, in MiB.
GPU_MEMORY_PER_WORKER = 6 * 1024


def gpus() -> list[tuple[str, int]]:
    """(id, free MiB) of each GPU that this process may use, without starting CUDA."""
    query = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found: dict[str, int] = {}
    for line in listing.stdout.strip().splitlines():
        index, _, free = (part.strip() for part in line.partition(","))
        if index.isdigit():
            # a GPU that does not tell its memory (MIG answers "[N/A]") gets one worker
            found[index] = int(free) if free.isdigit() else GPU_MEMORY_PER_WORKER
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(found.items())
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if "-1" in names:  # CUDA stops reading there
        names = names[: names.index("-1")]
    # a GPU named by its UUID is not in the listing: it counts as the smallest one there
    return [(name, found.get(name, min(found.values(), default=0))) for name in names]


def assign_resources(worker: str) -> None:
    """Give this worker one OpenMP thread, and worker N the GPU number N modulo their count.

    This must run before torch is imported, which reads both only then.
    """
    os.environ.setdefault("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])
    if found := gpus():
        # Inductor would start as many processes as there are cores, in every worker
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        number = int(worker.removeprefix("gw"))
        os.environ["CUDA_VISIBLE_DEVICES"] = found[number % len(found)][0]


def max_workers(cpus: int, gpus: list[tuple[str, int]]) -> int:
    """As many workers as there are cores, and no more than fit on any of the GPUs.

    GPU i serves the workers i, i + count, i + 2 count, ...; there are no more workers than the
    first one that does not fit.
    """
    room = [(free // GPU_MEMORY_PER_WORKER) * len(gpus) + i for i, (_, free) in enumerate(gpus)]
    return max(1, min([cpus, *room]))


def end_with(parent: int) -> None:
    """End this process when the one that hands out the tests has died, whatever runs here."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    assign_resources(_worker)
    ignore_ctrl_c()
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Start the workers as the implementation was tried: the user's folder hides no module.

    A `random.py` there would be loaded in place of Python's.
    """
    for spec in specs:
        if spec.popen and not spec.python:
            spec.python = f"{shlex.quote(sys.executable)} -P"


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What `-n auto` means."""
    if config.getoption(option_name("--device")) in ("cpu", "interpreter"):
        return None
    found = gpus()
    return max_workers(os.cpu_count() or 1, found) if found else None


def pytest_internalerror() -> bool:
    """Of a worker it is told by the process that hands out the work, and once."""
    return "PYTEST_XDIST_WORKER" in os.environ


def draw_alike_everywhere() -> None:
    """Let a seed mean the same cases wherever the modules of a port, or of the judge, lie.

    Hypothesis also draws numbers that stand in the source of modules, but not of those that are
    installed; and it would read them all anew in every process.
    """
    from hypothesis.internal.conjecture import providers

    if hasattr(providers, "is_local_module_file"):
        providers.is_local_module_file = functools.cache(lambda path: False)


def pytest_configure(config: pytest.Config) -> None:
    """Workers inherit what is set here, and read it before any of this is loaded."""
    draw_alike_everywhere()
    if distributes(config):
        os.environ.setdefault("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])
