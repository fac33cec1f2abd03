"""Fuzzing loses nothing when it is killed, and shares what it finds: python -m benchmarks.fuzzing

Two faint bugs are planted: one needs more than 128 blocks, the other two empty slots beside a
short last block. `nsa-ref fuzz` runs for 30 minutes, or for --minutes, with one worker. A third
and two thirds of the way it gets SIGKILL, and another run goes on in its folder. Then two runs,
each with a folder and a seed of its own, share a Redis server on this machine: the second begins
when the first has found both bugs, and goes on beside it for a sixth of the time.

Writes what each run knew, did and found, with the versions, as JSON. Exit 1, and a line for each
reason: what was found is not exactly the two bugs, something was lost, or nothing was shared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.cli import BROKEN
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.fuzz_folder import Folder
from nsa_ref.testing.loading import CannotRun, versions
from nsa_ref.testing.sharing import SharedFindings, shared_database

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
SPEC, NAME = "faint_port:Port", "faint"
#: The helpers of the tests have the two bugs.
PORT = "from port_zoo import Faint\n\n\nclass Port(Faint): ...\n"
#: Seconds for the workers of a run that was killed to end, and for what should come at once.
PATIENCE = 15.0

Run = subprocess.Popen[bytes]


@contextlib.contextmanager
def fuzzing(folder: Path, log: Path, *options: str) -> Iterator[Run]:
    """`nsa-ref fuzz` in a process group of its own, of which nothing is left at the end."""
    places = [str(ROOT), str(ROOT / "tests/helpers"), str(folder.parent)]
    given = ["--device=cpu", "-n1", f"--findings={folder}", *options]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "nsa_ref", "fuzz", SPEC, *given],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as run,
    ):
        try:
            yield run
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def seconds_until(met: Callable[[], object], patience: float = PATIENCE) -> float | None:
    """How long it takes; None if it is not met in that time."""
    began = time.monotonic()
    while not met():
        if time.monotonic() > began + patience:
            return None
        time.sleep(0.05)
    return round(time.monotonic() - began, 2)


def is_over(run: Run) -> bool:
    """Whether neither the run nor a worker of it is left."""
    try:
        os.killpg(run.pid, 0)
    except ProcessLookupError:
        return True
    return False


def about(finding: Finding) -> dict[str, Any]:
    """What tells of which bug a finding is."""
    case = Case.from_json(finding["case"])
    sizes = ("num_selection_blocks", "kv_len", "selection_block_size")
    named = {name: finding[name] for name in ("clause", "property")}
    return named | {size: getattr(case, size) for size in sizes}


def causes_in(folder: Path) -> list[dict[str, Any]]:
    """What a folder knows to be broken, and where its ledger says that it is."""
    kept = Folder(folder)
    causes = kept.causes(kept.state(SPEC, None))
    entries = tomllib.loads(kept.ledger.read_text())["known"] if causes else []
    where = {entry["id"]: entry["where"] for entry in entries}
    return [about(c.finding) | {"times": c.times, "where": where.get(c.id)} for c in causes]


def known_at_start(log: Path) -> list[list[str]]:
    """Clause and property of each cause that a run says it knows, before all else."""
    _, *lines = log.read_text().splitlines()
    said = takewhile(re.compile("known|    ").match, lines)
    found = (re.match(r"known(?:, \d+ times)?: (\w+), (\w+):", line) for line in said)
    return [list(match.groups()) for match in found if match]


def killed_twice(place: Path, seconds: float) -> dict[str, Any]:
    """Three runs in one folder, of which only the last comes to its end.

    A fourth one, of a second, sorts what that one had no time to sort.
    """
    folder = Folder(place / "killed")
    legs: list[dict[str, Any]] = []
    until = time.monotonic() + seconds
    while len(legs) < 3 or (len(legs) == 3 and legs[-1]["unsorted"]):
        number = len(legs)
        before = folder.state(SPEC, None)
        log = place / f"killed-{number}.log"
        left = max(1.0, until - time.monotonic())
        with fuzzing(folder.path, log, f"--time={left:.0f}s") as run:
            if number < 2:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(left / (3 - number))
                run.kill()
            code = run.wait()
            workers_ended = seconds_until(partial(is_over, run))
        after, causes = folder.state(SPEC, None), causes_in(folder.path)
        noted, cases = after.seconds - before.seconds, after.cases - before.cases
        legs.append(
            {
                "known at the start": known_at_start(log),
                "exit code": code,
                "seconds until its workers had ended": workers_ended,
                # a run that is killed has noted what it had done a minute before
                "seconds, as noted": round(noted, 1),
                "rounds": after.rounds - before.rounds,
                "cases": cases,
                "cases a second": round(cases / max(noted, 1.0), 1),
                "known at the end": [[c["clause"], c["property"]] for c in causes],
                "found": sum(cause["times"] for cause in causes),
                "unsorted": len(folder.left()[0]),
            }
        )
        print(f"run {number + 1}: {legs[-1]}", flush=True)
    return {"seed": after.seed, "minutes": seconds / 60, "runs": legs, "causes": causes}


@contextlib.contextmanager
def redis_server(place: Path) -> Iterator[str]:
    """The URL of a server of our own, on a free port of this machine.

    Raises
    ------
    CannotRun : redis is not installed, or the server does not answer
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen([*command, "--dir", place], stdout=subprocess.DEVNULL) as server:
        try:
            database = shared_database(url)

            def answers() -> bool:
                list(database.fetch(b"ready"))
                return not database.why

            if seconds_until(answers) is None:
                raise CannotRun(f"redis-server does not answer: {database.why}")
            yield url
        finally:
            server.terminate()


def shared(place: Path, seconds: float) -> dict[str, Any]:
    """Two runs with one Redis server: the second begins with what the first has found."""
    folders, logs = ([place / f"{n}{end}" for n in ("first", "second")] for end in ("", ".log"))
    found: dict[str, Any] = {}
    with redis_server(place) as url:
        options = f"--database={url}", "--seed=1", "--time=2h"
        with fuzzing(folders[0], logs[0], *options) as first:
            found["seconds until the first had both"] = seconds_until(
                lambda: len(causes_in(folders[0])) > 1, max(seconds, 300.0)
            )
            database = SharedFindings(shared_database(url), NAME)
            found["shared"] = [about(finding) for _, finding in database.unseen(())]
            options = f"--database={url}", "--seed=2", f"--time={seconds:.0f}s"
            with fuzzing(folders[1], logs[1], *options) as second:
                found["seconds until the second had both"] = seconds_until(
                    lambda: len(causes_in(folders[1])) > 1, seconds
                )
                until_then = Folder(folders[1]).state(SPEC, None).cases
                code = second.wait()
            found["the first was at work until the second ended"] = first.poll() is None
            first.terminate()
            found["exit codes"] = [first.wait(), code]
    said = re.findall(r"others found (\d+) cases", logs[1].read_text())
    found["cases of others that the second tried"] = sum(map(int, said))
    found["cases of its own until it had both"] = until_then
    for name, path in zip(("first", "second"), folders):
        folder = Folder(path)
        state = folder.state(SPEC, None)
        done = {"seed": state.seed, "rounds": state.rounds, "cases": state.cases}
        unsorted = len(folder.left()[0])
        found[name] = done | {"unsorted": unsorted, "causes": causes_in(path)}
    return found


def bug_of(cause: dict[str, Any]) -> str:
    """Which bug was found, as its case shows."""
    # 128 are enough for an index that lies past the last one
    if cause["num_selection_blocks"] >= 128:
        return "many blocks"
    is_short = cause["kv_len"] % cause["selection_block_size"] != 0
    return "short last block" if is_short else "another"


def are_the_two(causes: list[dict[str, Any]]) -> bool:
    """Whether each bug that was planted was found once, and nothing else."""
    return sorted(map(bug_of, causes)) == ["many blocks", "short last block"]


def complaints(measured: dict[str, Any]) -> list[str]:
    """What keeps the command from passing."""
    killed, redis = measured["killed twice"], measured["shared through Redis"]
    said = []
    for run in killed["runs"][:2]:
        if run["exit code"] != -signal.SIGKILL:
            said.append(f"a run was to be killed, and ended with exit code {run['exit code']}")
        if run["seconds until its workers had ended"] is None:
            said.append(f"workers were there {PATIENCE:.0f} s after their run was gone")
    for one, other in pairwise(killed["runs"]):
        if other["known at the start"] != one["known at the end"]:
            said.append(f"{one['known at the end']} became {other['known at the start']}")
        if other["found"] + other["unsorted"] < one["found"] + one["unsorted"]:
            said.append("a finding was lost over a kill")
    last = killed["runs"][-1]
    if last["unsorted"]:
        said.append(f"{last['unsorted']} findings are not sorted")
    if {last["exit code"], *redis["exit codes"]} != {BROKEN}:
        said.append("a run that was not killed did not end with exit code 1")
    if not are_the_two(redis["shared"]):
        said.append(f"what was shared is not the two bugs: {redis['shared']}")
    if redis["cases of others that the second tried"] < 2:
        said.append("the second run did not try what the first had found")
    if redis["cases of its own until it had both"]:
        said.append("the second run found a bug by itself")
    if not redis["the first was at work until the second ended"]:
        said.append("the two runs were not at work at the same time")
    for causes in (found["causes"] for found in (killed, redis["first"], redis["second"])):
        if not are_the_two(causes):
            said.append(f"not exactly the two bugs: {causes}")
    return said


def main(given: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of the run that is killed")
    parser.add_argument("--folder", type=Path, help="keep folders and logs of all runs there")
    parser.add_argument("--json", default=RESULTS / "fuzzing.json", type=Path, metavar="FILE")
    asked = parser.parse_args(given)
    with contextlib.ExitStack() as stack:
        temporary = asked.folder or stack.enter_context(tempfile.TemporaryDirectory())
        place = Path(temporary).absolute()
        place.mkdir(parents=True, exist_ok=True)
        (place / "faint_port.py").write_text(PORT)
        seconds = 60 * asked.minutes
        measured = {"killed twice": killed_twice(place, seconds)}
        measured["shared through Redis"] = shared(place, seconds / 6)
    said = complaints(measured)
    print("\n".join(said) or "each bug was found once, nothing was lost, and both were shared")
    report = {
        "device": f"{platform.machine()}, one worker a run",
        "versions": versions(),
        "measured": measured,
    }
    asked.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
