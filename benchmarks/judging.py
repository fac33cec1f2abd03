"""How fast the judge is, beside a suite of `assert_close`: python -m benchmarks.judging

The cases are those that `nsa-ref verify` draws for nsa_fast's eager branches: outputs, gradients
and masks that are read out. The plain suite runs each of them once through the same methods of
nsa_fast and of the definition, and compares with the tolerances that `torch.testing` has for the
dtype. Both run in this process with one thread, one behind the other. Prints cases per second and
the ratio of the two, and writes them, with the versions, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nsa_fast.adapter import implementations
from nsa_ref.testing.branches import Branch
from nsa_ref.testing.case import Case
from nsa_ref.testing.drawing import generate
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.judging import judge
from nsa_ref.testing.loading import versions
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.properties.common import oracle_mask
from nsa_ref.testing.properties.values import sent_back
from nsa_ref.testing.verdicts import Inconclusive

RESULTS = Path(__file__).parent / "results"

#: What is asked -> the properties of the three branches that ask it.
ASKED = {
    "outputs": ("A1_sliding_output", "A1_compress_output", "A1_fine_output"),
    "gradients": ("A3_sliding_gradients", "A3_compress_gradients", "A3_fine_gradients"),
    "masks, read out": (
        "W1_sliding_mask_as_read",
        "C2_compress_mask_as_read",
        "F1_fine_mask_as_read",
    ),
}

OneCase = Callable[[Property, Implementation, Case], object]


def drawn(prop: Property, implementation: Implementation) -> list[Case]:
    """The cases of a property at the quick level."""
    cases: list[Case] = []
    generate(prop, implementation, Options(), cases.append)
    return cases


def judged(prop: Property, implementation: Implementation, case: Case) -> None:
    """What `nsa-ref verify` does with a case."""
    # a case that decides nothing takes its time as well
    with contextlib.suppress(Inconclusive, NotOffered):
        judge(prop, implementation, case)


def asserted(prop: Property, implementation: Implementation, case: Case) -> None:
    """What a suite of `assert_close` does with it: one run of each, and a tolerance."""
    branch: Branch = prop.the_branch
    inputs, mask = branch.inputs(case), oracle_mask(branch, case)
    found: Sequence[np.ndarray | None]
    if prop.backward:
        d = sent_back(branch, case, mask, of_lse=implementation.lse_gradient)
        found = branch.backward(implementation, case, inputs, *d)
        expected: Sequence[np.ndarray] = branch.attend_vjp(case, mask, inputs, *d)
    else:
        found = branch.forward(implementation, case, inputs)
        expected = branch.attend(case, mask, inputs)
    dtype = getattr(torch, case.dtype)
    for actual, wanted in zip(found, expected):
        if actual is not None:
            pair = (torch.from_numpy(np.asarray(x)).to(dtype) for x in (actual, wanted))
            # a tolerance that is typed in may be too small: that is not measured here
            with contextlib.suppress(AssertionError):
                torch.testing.assert_close(*pair, equal_nan=True)


def cases_a_second(one: OneCase, prop: Property, port: Implementation, cases: list[Case]) -> float:
    """The faster of two runs."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        for case in cases:
            one(prop, port, case)
        seconds.append(time.perf_counter() - started)
    return len(cases) / min(seconds)


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default=RESULTS / "judging-cpu.json", type=Path)
    parser.add_argument("--cases", type=int, help="of each property, at most; default all")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    eager = next(one for one in implementations("cpu") if "eager" in one.name)
    measured = {}
    for asked, names in ASKED.items():
        pairs = []
        for prop in map(PROPERTIES.__getitem__, names):
            cases = drawn(prop, eager)[: arguments.cases]
            rates = [cases_a_second(one, prop, eager, cases) for one in (judged, asserted)]
            pairs.append([len(cases) / rate for rate in rates] + [len(cases)])
        judge_time, plain_time, count = map(sum, zip(*pairs))
        measured[asked] = {
            "cases": count,
            "judged a second": round(count / judge_time, 1),
            "asserted a second": round(count / plain_time, 1),
            "ratio": round(judge_time / plain_time, 2),
        }
        print(f"{asked}: {measured[asked]}")
    report = {
        "device": f"{platform.machine()}, one thread",
        "versions": versions(),
        "measured": measured,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
