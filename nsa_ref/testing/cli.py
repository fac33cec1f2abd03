"""nsa-ref: verify an implementation, replay a finding, show a case's masks.

A thin front over pytest: `verify` and `replay` run the conformance suite in xdist workers, so that
an implementation that crashes, aborts or hangs takes a worker down and never the run.

Exit codes: 0 all offered clauses hold, 1 a clause is broken, 2 it could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa_ref.testing.branches import BRANCHES
from nsa_ref.testing.case import DTYPES, Case, load_case
from nsa_ref.testing.conformance import running_file, save_finding
from nsa_ref.testing.loading import DEVICES, SHORT_NAMES, CannotRun, try_loading
from nsa_ref.testing.pictures import one_mask
from nsa_ref.testing.profiles import LEVELS
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.report import show, to_json

HOLDS, BROKEN, COULD_NOT_RUN = 0, 1, 2

#: Seconds that importing an adapter may take.
LOADING_TIMEOUT = 120.0


class Collector:
    """Runs beside pytest: gathers the records of all workers and shows the progress."""

    def __init__(self, console: Console, findings: Path, total: int) -> None:
        self.records: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._folder = findings
        self._progress = Progress(
            TextColumn("{task.description:46}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting the workers", total=total)

    def __enter__(self) -> Collector:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One property is done, or died with its worker."""
        record = dict(report.user_properties).get("nsa_ref")
        if report.when == "call" and record is not None:
            self._add(record)
        elif report.when == "???":
            self._add(self._lost(report))
        elif report.failed:
            self.errors.append(f"{report.nodeid.rpartition('::')[2]}: {report.longreprtext}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A suite that cannot be collected is an error of the run."""
        if report.failed:
            self.errors.append(report.longreprtext)

    def _add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if record["finding"] is not None:
            self.findings.append(record["finding"])
        broken = f", {len(self.findings)} broken" if self.findings else ""
        self._progress.update(self._task, advance=1, description=f"{record['name']}{broken}")

    def _lost(self, report: pytest.TestReport) -> dict[str, Any]:
        """The record of a property whose worker died; its last words name the case."""
        worker = report.node.gateway.id  # type: ignore[attr-defined]
        path = running_file(self._folder, worker)
        name = report.nodeid.rpartition("::test_")[2]
        prop = next(p for p in sorted(PROPERTIES, key=len, reverse=True) if name.startswith(p))
        record: dict[str, Any] = {
            "name": prop,
            "clause": PROPERTIES[prop].clause,
            "branch": PROPERTIES[prop].branch,
            "implementation": "",
            "device": "",
            "cases": 0,
            "inconclusive": 0,
            "ambiguous": 0,
            "not_offered": 0,
            "budget_used": None,
            "reasons": {},
            "edges": {},
            "finding": None,
        }
        if not path.exists():
            self.errors.append(f"{name}: the worker died outside of any case")
            return record
        data = json.loads(path.read_text())
        took = time.time() - path.stat().st_mtime
        if took >= data["timeout"] - 1:
            text = f"the implementation hangs: no answer after {data['timeout']:g} s"
        else:
            text = "the implementation ended its process (a crash, an abort or an exit)"
        path.unlink()
        data |= {"text": text, "worst": {}}
        record |= {
            "implementation": data["implementation"],
            "device": data["device"],
            "cases": 1,
            "finding": save_finding(data, self._folder),
        }
        return record


def verify(arguments: argparse.Namespace, console: Console) -> int:
    """Judge an implementation, clause by clause."""
    started = time.monotonic()
    found = try_loading(arguments.implementation, arguments.device, LOADING_TIMEOUT)
    device = found["device"]
    names = ", ".join(i["name"] for i in found["implementations"])
    offered = {dtype for i in found["implementations"] for dtype in i["numerics"]}
    for dtype in arguments.dtype or ():
        if dtype not in offered:
            raise CannotRun(
                f"--dtype {dtype}: {names} on {device} declares {', '.join(sorted(offered))}"
            )
    if arguments.json:
        _writable(arguments.json)
    console.print(
        f"nsa-ref judges {names} on {device}, level {arguments.level}, seed {arguments.seed}"
    )
    wanted = arguments.branch or ()
    properties = [p for p in PROPERTIES.values() if not wanted or p.branch in wanted]
    collector = _run(
        console,
        arguments.implementation,
        device,
        total=len(properties) * len(found["implementations"]),
        workers=arguments.n,
        findings=Path(arguments.findings),
        options=[
            f"--level={arguments.level}",
            f"--seed={arguments.seed}",
            f"--case-timeout={arguments.case_timeout}",
            *(f"--branch={branch}" for branch in wanted),
            *(f"--dtype={dtype}" for dtype in arguments.dtype or ()),
        ],
    )
    seconds = time.monotonic() - started
    if arguments.json:
        report = to_json(
            collector.records,
            collector.findings,
            implementation=names,
            device=device,
            versions=found["versions"],
            seed=arguments.seed,
            level=arguments.level,
            seconds=seconds,
        )
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    show(
        console,
        collector.records,
        collector.findings,
        title=f"{names} on {device}",
        seconds=seconds,
    )
    if collector.errors:
        raise CannotRun(f"the judge itself failed: {collector.errors[0]}")
    if collector.findings:
        return BROKEN
    if not any(record["cases"] for record in collector.records):
        raise CannotRun(f"{names} offers nothing that could be judged: no case was decided")
    return HOLDS


def replay(arguments: argparse.Namespace, console: Console) -> int:
    """Run one saved case again, with the property that it broke."""
    path = Path(arguments.case)
    case, data = _read_case(path)
    spec = arguments.implementation or data.get("spec")
    if not spec:
        raise CannotRun(
            f"{path} does not say what it was found in. Try nsa-ref replay {path} MODULE:OBJECT"
        )
    device = arguments.device or data.get("device", "auto")
    name = data.get("property")
    if name is not None and name not in PROPERTIES:
        raise CannotRun(f"{path}: there is no property {name!r} in this version")
    found = try_loading(spec, device, LOADING_TIMEOUT)
    chosen = [i["name"] for i in found["implementations"]]
    only = data.get("implementation") if data.get("implementation") in chosen else None
    console.print(f"replaying {name or 'all properties'} on {spec}, {found['device']}: {case}")
    pattern = f"test_{name or ''}"
    if only and len(chosen) > 1:
        pattern += " and " + "".join(c if c.isalnum() else "_" for c in only)
    collector = _run(
        console,
        spec,
        found["device"],
        total=1 if name else len(PROPERTIES) * len(chosen),
        workers="1",
        findings=path.parent / "replays",
        options=[
            f"--nsa-case={path.resolve()}",
            f"--case-timeout={data.get('timeout', 120.0)}",
            "-k",
            pattern,
        ],
    )
    show(
        console,
        collector.records,
        collector.findings,
        title=f"{', '.join(chosen)} on {found['device']}",
        seconds=0.0,
    )
    if collector.errors:
        raise CannotRun(f"the judge itself failed: {collector.errors[0]}")
    return BROKEN if collector.findings else HOLDS


def show_case(arguments: argparse.Namespace, console: Console) -> int:
    """Draw the definition's masks of a case, in the terminal or into a PNG."""
    path = Path(arguments.case)
    case, _ = _read_case(path)
    if not case.batch:
        raise CannotRun(f"{path}: batch=0 has no mask to draw")
    masks = {}
    for branch in BRANCHES:
        indices = case.block_indices() if branch.name == "fine" else None
        masks[branch.name] = branch.mask(case, indices)[0, 0]
    console.print(str(case), soft_wrap=True, markup=False, highlight=False)
    if arguments.png:
        _writable(arguments.png)
        draw_png(masks, Path(arguments.png))
        console.print(f"wrote {arguments.png}")
        return HOLDS
    for name, mask in masks.items():
        console.print(
            f"\n{name}, batch 0, query head 0: {mask.shape[0]} rows, {mask.shape[1]} columns"
        )
        console.print(one_mask(mask), soft_wrap=True, markup=False, highlight=False)
    return HOLDS


def draw_png(masks: dict[str, np.ndarray], path: Path) -> None:
    """One picture, one panel a branch; darker means counted more often.

    Raises
    ------
    CannotRun : matplotlib is not installed
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise CannotRun("--png needs matplotlib: pip install 'nsa-ref[pictures]'") from None
    figure = Figure(figsize=(4 * len(masks), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, mask) in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks.items()):
        axes.imshow(mask, cmap="Blues", vmin=0, vmax=max(1, mask.max(initial=0)), aspect="auto")
        axes.set(title=name, xlabel="key j", ylabel="query t")
    figure.axes[0].set_xlabel("memory and compressed block i")
    figure.savefig(path, dpi=110)


def _run(
    console: Console,
    spec: str,
    device: str,
    *,
    total: int,
    workers: str,
    findings: Path,
    options: list[str],
) -> Collector:
    """pytest over the suite, in worker processes, saying nothing itself."""
    suite = Path(__file__).parent / "suite.py"
    findings = findings.resolve()
    with Collector(console, findings, total) as collector:
        code = pytest.main(
            [
                str(suite),
                "-p",
                "nsa_ref.testing.plugin",
                "-p",
                "no:terminal",
                "-p",
                "no:cacheprovider",
                "-c",
                os.devnull,
                f"--rootdir={suite.parent}",
                "--noconftest",
                "-n",
                workers,
                "--dist=worksteal",
                "--max-worker-restart=10000",
                f"--device={device}",
                f"--findings={findings}",
                f"--nsa-implementation={spec}",
                *options,
            ],
            plugins=[collector],
        )
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        detail = collector.errors[0] if collector.errors else "see the message above"
        raise CannotRun(f"pytest ended with exit code {int(code)}: {detail}")
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return collector


def _read_case(path: Path) -> tuple[Case, dict[str, Any]]:
    try:
        text = path.read_text()
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("it must hold a JSON object")
        return load_case(text), data
    except FileNotFoundError:
        raise CannotRun(f"there is no file {path}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CannotRun(f"{path} holds no case: {error}") from None


def _writable(name: str) -> None:
    """Fail now and not after the run."""
    try:
        with open(name, "a"):
            pass
    except OSError as error:
        raise CannotRun(f"cannot write {name}: {error.strerror}") from None


def _workers(text: str) -> str:
    if text != "auto" and (not text.isdigit() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"{text!r} must be auto or a number of at least 1")
    return text


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0")
    return value


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> Any:
        raise CannotRun(f"{message}. See {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nsa-ref", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("verify", help="judge an implementation, clause by clause")
    command.add_argument(
        "implementation",
        nargs="?",
        default="nsa_fast",
        help=f"package.module:object, or {', '.join(SHORT_NAMES)} (default nsa_fast)",
    )
    command.add_argument("--device", default="auto", choices=DEVICES)
    command.add_argument("--level", default="quick", choices=tuple(LEVELS))
    command.add_argument(
        "--branch",
        action="append",
        choices=(*(branch.name for branch in BRANCHES), "selection"),
        help="this branch only; may be repeated",
    )
    command.add_argument(
        "--dtype", action="append", choices=tuple(DTYPES), help="this dtype only; may be repeated"
    )
    command.add_argument("--seed", type=_seed, default=0, help="another number, other cases")
    command.add_argument("--json", metavar="FILE", help="write the report as data")
    command.add_argument(
        "--findings", metavar="DIR", default="nsa-ref-findings", help="where broken cases are kept"
    )
    command.add_argument(
        "--case-timeout", type=_seconds, default=120.0, help="seconds that one case may take"
    )
    command.add_argument("-n", type=_workers, default="auto", help="worker processes")
    command.set_defaults(run=verify)

    command = commands.add_parser("replay", help="run one saved case again")
    command.add_argument("case", metavar="CASE.json")
    command.add_argument("implementation", nargs="?", help="default: the one it was found in")
    command.add_argument("--device", choices=DEVICES, help="default: the one it was found on")
    command.set_defaults(run=replay)

    command = commands.add_parser("show", help="draw a case's masks")
    command.add_argument("case", metavar="CASE.json")
    command.add_argument("--png", metavar="FILE", help="into a picture (needs matplotlib)")
    command.set_defaults(run=show_case)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console script."""
    console = Console()
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments, console))
    except CannotRun as error:
        print(f"nsa-ref: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    except KeyboardInterrupt:
        print("nsa-ref: interrupted; what was found so far is kept", file=sys.stderr)
        return COULD_NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
