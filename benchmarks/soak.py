"""Whether the judge accuses who is right: python -m benchmarks.soak --time 80m

Fuzzes the right implementations of `tests/helpers/innocents.py`. A run goes on in its --folder
where the last one was cut off. Writes how many cases have been judged there, how close one came to
its bound, and the versions, as JSON. Exit 1 if something was found: it is a mistake of the judge.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_ref.testing.cli import HOLDS
from nsa_ref.testing.files import write_json
from nsa_ref.testing.fuzz_folder import Folder
from nsa_ref.testing.loading import versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SPEC = "innocents:implementations"


def soak(folder: Path, device: str, time: str) -> dict[str, Any]:
    """What `nsa-ref fuzz` has done in a folder after so much time more, and how it ended."""
    places = (ROOT, ROOT / "tests" / "helpers", os.environ.get("PYTHONPATH", ""))
    asked = ["fuzz", SPEC, f"--device={device}", f"--findings={folder}", f"--time={time}"]
    # its exit code says whether something was found; a case has time on a busy machine
    done = subprocess.run(
        [sys.executable, "-m", "nsa_ref", *asked, "--case-timeout=1200"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))},
    )
    state = Folder(folder).state(SPEC, None)
    clause, share = state.closest or ("", 0.0)
    return {
        "exit code": done.returncode,
        "cases": state.cases,
        "rounds": state.rounds,
        "seconds": round(state.seconds),
        "implementations": len(state.offered),
        "pairs of edges": len(state.pairs),
        "causes of findings": len(state.causes),
        "closest to its bound": f"{clause}, {share:.3f} of it",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", default="80m", help="as of nsa-ref fuzz; default: 80m")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "interpreter"))
    parser.add_argument("--folder", type=Path, default=Path("nsa-ref-soak"), help="goes on there")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/soak-DEVICE.json")
    given = parser.parse_args(arguments)
    found = soak(given.folder, given.device, given.time)
    device = f"{platform.machine()}, {os.cpu_count()} cores, {given.device}"
    report = {"device": device, "versions": versions(), "measured": found}
    write_json(given.output or RESULTS / f"soak-{given.device}.json", report)
    print(f"{found['cases']} cases, exit code {found['exit code']}")
    if found["exit code"] != HOLDS:  # which a finding is that no cause has been seen of yet
        sys.exit(1)


if __name__ == "__main__":
    main()
