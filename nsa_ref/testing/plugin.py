"""pytest options for a conformance suite, and how xdist workers share a machine.

Load it with `-p nsa_ref.testing.plugin`, or by naming it in a conftest's `pytest_plugins`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from nsa_ref.testing.case import load_case
from nsa_ref.testing.last_words import finding_of_dead_worker, remove_folder_of_run
from nsa_ref.testing.loading import CannotRun, load, resolve_device
from nsa_ref.testing.options import SHARED_OPTIONS, Options
from nsa_ref.testing.wording import message

#: What one worker's CUDA context, compiler and test arrays may take of a GPU, in MiB.
GPU_MEMORY_PER_WORKER = 6 * 1024

#: The implementations that `suite.py` judges, from --nsa-implementation; and --device, for test
#: files that choose an implementation by it.
implementations: list = []
device = "auto"

#: The suite warms them up and judges nothing, from --nsa-warm.
warming = False


def _gpus() -> list[tuple[str, int]]:
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
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gpus = _gpus()
    if gpus:
        # Inductor would start as many processes as there are cores, in every worker
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        number = int(worker.removeprefix("gw"))
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)][0]


def max_workers(cpus: int, gpus: list[tuple[str, int]]) -> int:
    """As many workers as there are cores, and no more than fit on any of the GPUs.

    GPU i serves the workers i, i + count, i + 2 count, ...; there are no more workers than the
    first one that does not fit.
    """
    room = [(free // GPU_MEMORY_PER_WORKER) * len(gpus) + i for i, (_, free) in enumerate(gpus)]
    return max(1, min([cpus, *room]))


if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    assign_resources(_worker)
    # Ctrl-C reaches the process that hands out the tests, which ends this one: here, only the
    # implementation can raise KeyboardInterrupt
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What `-n auto` means."""
    if config.getoption("--device") in ("cpu", "interpreter"):
        return None
    gpus = _gpus()
    return max_workers(os.cpu_count() or 1, gpus) if gpus else None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsa-ref", "judging an implementation of Native Sparse Attention")
    for name, about in SHARED_OPTIONS.items():
        group.addoption(name, **about)
    group.addoption("--nsa-implementation", default="", help="for nsa-ref verify")
    group.addoption("--nsa-warm", action="store_true", help="for nsa-ref verify --warm")
    group.addoption("--nsa-case", default="", help="for nsa-ref replay: run this case alone")
    group.addoption("--nsa-property", default="", help="for nsa-ref replay: this property alone")
    group.addoption("--nsa-only", default="", help="for nsa-ref replay: the implementation's name")


def pytest_configure(config: pytest.Config) -> None:
    global device, warming
    device, warming = config.getoption("--device"), config.getoption("--nsa-warm")
    case_file, spec = config.getoption("--nsa-case"), config.getoption("--nsa-implementation")
    config.nsa_ref_options = Options(  # type: ignore[attr-defined]
        spec=spec,
        level=config.getoption("--level"),
        dtypes=tuple(config.getoption("--dtype") or ()),
        seed=config.getoption("--seed"),
        case=load_case(Path(case_file).read_text()) if case_file else None,
        any_property=not config.getoption("--nsa-property"),
        # workers may run in another directory
        findings=Path(config.getoption("--findings")).absolute(),
        ledger=Path(ledger).absolute() if (ledger := config.getoption("--ledger")) else None,
        timeout=config.getoption("--case-timeout"),
        traces=True,
    )
    if _distributes(config):
        # workers inherit it: there, NumPy reads it before this file is loaded
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # glibc fills the memory that workers get with -1.7e38 or NaN (each byte is 0xFF ^ 1): an
        # output that is not written does not hold what an earlier, right run left there
        os.environ.setdefault("MALLOC_PERTURB_", "1")
        if config.option.testrunuid is None:  # xdist would draw one and keep it to itself
            config.option.testrunuid = uuid.uuid4().hex
    # the process that hands out the tests never loads the implementation
    elif spec:
        try:
            implementations[:] = load(spec, resolve_device(config.getoption("--device")))
        except CannotRun as error:
            raise pytest.UsageError(str(error)) from None


def _distributes(config: pytest.Config) -> bool:
    """Whether this process hands the tests out to others."""
    return getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the judge's tests that --branch and the options of replay do not ask for."""
    wanted = {
        "nsa_ref_branch": config.getoption("--branch") or [],
        "nsa_ref_property": [name] if (name := config.getoption("--nsa-property")) else [],
        "nsa_ref_implementation": [name] if (name := config.getoption("--nsa-only")) else [],
    }
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        function = getattr(item, "function", None)
        asked = all(
            not names or getattr(function, attribute, names[0]) in names
            for attribute, names in wanted.items()
        )
        (kept if asked else dropped).append(item)
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: Any) -> None:
    """A property whose worker died is reported with the case that did it."""
    node, test = report.node, crashitem.rpartition("::")[2]
    folder = node.config.nsa_ref_options.findings
    run = node.workerinput["testrunuid"]
    record = finding_of_dead_worker(test, node.gateway.id, run, folder)
    if record is not None:
        report.longrepr = (
            f"{test}: its worker process died outside of any case"
            if record.finding is None
            else message(record.finding)
        )
        report.user_properties.append(("nsa_ref", record.to_json()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What the workers left to be read by `pytest_handlecrashitem` is needed no more."""
    if _distributes(session.config):
        findings = session.config.nsa_ref_options.findings  # type: ignore[attr-defined]
        remove_folder_of_run(findings, session.config.option.testrunuid)


def pytest_report_header(config: pytest.Config) -> str:
    """What is under test, and with which options."""
    options = config.nsa_ref_options  # type: ignore[attr-defined]
    return (
        f"nsa-ref: device {config.getoption('--device')}, level {options.level}, "
        f"seed {options.seed}, dtypes {', '.join(options.dtypes) or 'all declared'}"
    )
