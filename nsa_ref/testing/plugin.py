"""pytest options for a conformance suite, and how xdist workers share a machine.

Load it with `-p nsa_ref.testing.plugin`, or by naming it in a conftest's `pytest_plugins`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

#: What one worker's CUDA context, compiler and test arrays may take of a GPU, in MiB.
GPU_MEMORY_PER_WORKER = 6 * 1024

#: The implementations that `suite.py` judges; set from --nsa-implementation.
implementations: list = []


def _gpus() -> list[tuple[str, int]]:
    """(id, free MiB) of each GPU that this process may use, without starting CUDA."""
    query = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",") for line in listing.stdout.strip().splitlines()]
    found = {index.strip(): int(free) for index, free in rows}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(found.items())
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # a GPU named by its UUID is not in the listing by index; the smallest one then speaks for it
    return [(name, found.get(name, min(found.values(), default=0))) for name in names]


def assign_resources(worker: str) -> None:
    """One OpenMP thread for this worker, and GPU number N modulo their count for worker N.

    Must run before torch is imported: neither is read again afterwards.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gpus = _gpus()
    if gpus:
        number = int(worker.removeprefix("gw"))
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)][0]


def max_workers(cpus: int, gpus: list[tuple[str, int]]) -> int:
    """As many workers as there are cores, and no more than the GPUs have memory for."""
    if not gpus:
        return cpus
    return max(1, min(cpus, sum(free // GPU_MEMORY_PER_WORKER for _, free in gpus)))


if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    assign_resources(_worker)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What `-n auto` means."""
    if config.getoption("--device") == "cpu":
        return None
    gpus = _gpus()
    return max_workers(os.cpu_count() or 1, gpus) if gpus else None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa-ref", "judging an implementation of Native Sparse Attention")
    group.addoption("--device", default="auto", help="auto, cpu or cuda (default auto)")
    group.addoption("--level", default="quick", help="quick or thorough (default quick)")
    group.addoption(
        "--branch",
        action="append",
        default=None,
        help="compress, fine, sliding or selection; may be repeated (default all)",
    )
    group.addoption(
        "--dtype",
        action="append",
        default=None,
        help="float64, float32, bfloat16 or float16; may be repeated (default all declared)",
    )
    group.addoption("--seed", type=int, default=0, help="another number, other cases (default 0)")
    group.addoption(
        "--findings",
        default="nsa-ref-findings",
        help="folder for the cases that broke a clause (default nsa-ref-findings)",
    )
    group.addoption(
        "--case-timeout",
        type=float,
        default=120.0,
        help="seconds that one case may take in a worker process (default 120)",
    )
    group.addoption("--nsa-implementation", default="", help="for nsa-ref verify")
    group.addoption("--nsa-case", default="", help="for nsa-ref replay")


def pytest_configure(config: pytest.Config) -> None:
    # not before: importing hypothesis and NumPy at the top would slow every pytest run down
    from nsa_ref.testing.branches import BRANCHES
    from nsa_ref.testing.case import DTYPES, load_case
    from nsa_ref.testing.conformance import Options
    from nsa_ref.testing.loading import CannotRun, load, resolve_device
    from nsa_ref.testing.profiles import LEVELS

    known = {
        "--level": tuple(LEVELS),
        "--branch": (*(branch.name for branch in BRANCHES), "selection"),
        "--dtype": tuple(DTYPES),
    }
    for option, allowed in known.items():
        given = config.getoption(option) or []
        for value in [given] if isinstance(given, str) else given:
            if value not in allowed:
                raise pytest.UsageError(f"{option} {value}: must be one of {', '.join(allowed)}")
    case_file, spec = config.getoption("--nsa-case"), config.getoption("--nsa-implementation")
    config.nsa_ref_options = Options(  # type: ignore[attr-defined]
        spec=spec,
        level=config.getoption("--level"),
        dtypes=tuple(config.getoption("--dtype") or ()),
        seed=config.getoption("--seed"),
        case=load_case(Path(case_file).read_text()) if case_file else None,
        findings=Path(config.getoption("--findings")),
        timeout=config.getoption("--case-timeout"),
    )
    # only where tests run: the process that hands them out never loads the implementation
    distributing = getattr(config.option, "dist", "no") != "no" and not hasattr(
        config, "workerinput"
    )
    if spec and not distributing:
        try:
            implementations[:] = load(spec, resolve_device(config.getoption("--device")))
        except CannotRun as error:
            raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--branch deselects the properties of other branches."""
    wanted = config.getoption("--branch")
    if not wanted:
        return
    kept, dropped = [], []
    for item in items:
        branch = getattr(getattr(item, "function", None), "nsa_ref_branch", None)
        (kept if branch is None or branch in wanted else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_report_header(config: pytest.Config) -> str:
    """What is under test, and with which options."""
    options = config.nsa_ref_options  # type: ignore[attr-defined]
    return (
        f"nsa-ref: device {config.getoption('--device')}, level {options.level}, "
        f"seed {options.seed}, dtypes {', '.join(options.dtypes) or 'all declared'}"
    )
