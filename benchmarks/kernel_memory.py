"""Memory that the whole layer takes as the sequence grows: python -m benchmarks.kernel_memory

Prints a table and writes it, with the versions, as JSON: the peak of what torch allocates in a
forward without gradients, and in a forward with its backward, on top of weights and inputs, and
the slope of log(peak) over log(tokens) from 8k tokens on. On CUDA seconds stand beside it.

With --device interpreter the same calls run on a CPU, and the same graphs allocate the same
tensors, but no kernel is executed: they would take days, and take no memory of their own. What is
in the tensors is then arbitrary; how many and how large they are does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(12, 17)])
    parser.add_argument("--output", type=Path, help="default: a file in benchmarks/results/")
    return parser.parse_args()


ARGUMENTS = _arguments()
DRY = ARGUMENTS.device == "interpreter"
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import torch  # noqa: E402

from benchmarks.cost import (  # noqa: E402
    RESULTS,
    SIZES,
    WINDOW,
    exponent,
    peak_bytes,
    processor,
)
from nsa_fast import NativeSparseAttention, interpreter  # noqa: E402
from nsa_ref.testing.loading import versions  # noqa: E402

LAYER = SIZES | {
    "model_dim": 512,
    "q_heads": 4,
    "kv_heads": 1,
    "head_dim": 128,
    "compress_map": "linear",
    "sliding_window_size": WINDOW,
}
DTYPE = torch.bfloat16


def run_no_kernel() -> None:
    """From now on Triton's interpreter takes every launch for done."""
    from triton.runtime.interpreter import GridExecutor

    GridExecutor.__call__ = lambda self, *arguments, **options: None


def peak_of_cuda(run: Callable[[], object]) -> tuple[int, float]:
    """Bytes that were allocated at most, on top of those before, and seconds."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start


def measure(tokens: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    device = "cpu" if DRY else "cuda"
    layer = NativeSparseAttention(**LAYER, backend="compiled").to(device, DTYPE)
    x = torch.randn(1, tokens, LAYER["model_dim"], device=device, dtype=DTYPE, requires_grad=True)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def forward_and_backward() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).sum().backward()

    found: dict[str, dict[str, float]] = {}
    for run in (forward, forward_and_backward):
        run()  # compiles
        name = run.__name__.replace("_", " ")
        if DRY:
            found[name] = {"MiB": peak_bytes(run) / 2**20}
        else:
            peaks, seconds = zip(*(peak_of_cuda(run) for _ in range(5)))
            found[name] = {"MiB": max(peaks) / 2**20, "seconds": min(seconds)}
    return found


def main() -> None:
    if DRY:
        interpreter.install()
        run_no_kernel()
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU here. Try --device interpreter, which shows how the script works")
    by_tokens = {tokens: measure(tokens) for tokens in ARGUMENTS.tokens}
    report: dict[str, Any] = {
        "device": f"{processor()}, no kernel executed" if DRY else torch.cuda.get_device_name(),
        "versions": versions(),
        "layer": LAYER | {"dtype": str(DTYPE), "semantics": "PAPER"},
        "measured": {},
    }
    for what in ("forward", "forward and backward"):
        found = {tokens: figures[what] for tokens, figures in by_tokens.items()}
        slopes = {
            name: exponent({tokens: figures[name] for tokens, figures in found.items()})
            for name in found[ARGUMENTS.tokens[0]]
        }
        report["measured"][what] = {"tokens": found, "exponents": slopes}
        cells = "".join(
            f"{tokens:>8}: " + " ".join(f"{value:.4g} {name}" for name, value in figures.items())
            for tokens, figures in found.items()
        )
        ends = ", ".join(
            f"{name} -" if x is None else f"{name} {x:.2f}" for name, x in slopes.items()
        )
        print(f"{what:22}{cells}   exponents: {ends}", flush=True)
    output = ARGUMENTS.output or RESULTS / f"kernel-memory-{ARGUMENTS.device}.json"
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
