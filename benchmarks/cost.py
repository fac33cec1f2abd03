"""What masks and selection cost on a CPU, as the sequence grows: python -m benchmarks.cost

Prints a table and writes it, with the versions, as JSON. One kv head; every figure comes from a
process of its own with one thread: seconds of that thread, the least of up to seven runs, and, of
one more run, the most that torch had allocated on top of the inputs.

An exponent is the slope of log(figure) over log(tokens) by least squares, from 8k tokens on, or
from the start where fewer are asked for. Beside the selection stands the bare product q k_cmp, in
the same chunks: of all N x N/d pairs, and of the half that is visible, which the selection needs.
Beside the lists stands FlexAttention's `create_block_mask` of the same predicate, for one head and
for G, which looks at every pair of a query and a key.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import ProfilerActivity, profile

from benchmarks import paper
from nsa_fast import block_lists, block_masks, compress_pool, select_blocks
from nsa_fast import selection as selection_module
from nsa_fast.layouts import FineLayout
from nsa_fast.windows import Windows
from nsa_ref.semantics import PAPER
from nsa_ref.testing.loading import versions

RESULTS = Path(__file__).parent / "results"

#: The paper's sizes, but for the heads and their width, which a CPU has to bear.
SIZES = {
    name: paper.LAYER[name]
    for name in (
        "compress_block_size",
        "compress_block_sliding_stride",
        "selection_block_size",
        "num_selected_blocks",
    )
}
WINDOW, GROUP, HEAD_DIM = paper.LAYER["sliding_window_size"], 4, 128

WINDOWS = Windows(SIZES["compress_block_size"], SIZES["compress_block_sliding_stride"], PAPER)
LAYOUT = FineLayout(GROUP, GROUP, SIZES["selection_block_size"], SIZES["selection_block_size"])

CPU = torch.device("cpu")
FIRST_OF_SLOPE = 2**13
DENSE_UP_TO = 2**13

Run = Callable[[], object]


def choice(tokens: int) -> torch.Tensor:
    """PAPER's three forced blocks, and others at random: (1, 1, tokens, n)."""
    torch.manual_seed(0)
    n = SIZES["num_selected_blocks"]
    own = (torch.arange(tokens) // SIZES["selection_block_size"])[:, None]
    others = (torch.rand(tokens, n - 3) * (own + 1)).to(torch.int64)
    return torch.cat([torch.zeros_like(own), own - 1, own, others], dim=1)[None, None]


def queries_and_blocks(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q (1, G, tokens, head_dim), k_cmp (1, 1, blocks, head_dim)."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, tokens, HEAD_DIM)
    k_cmp = compress_pool(
        k,
        compress_block_size=SIZES["compress_block_size"],
        compress_block_sliding_stride=SIZES["compress_block_sliding_stride"],
    )
    return torch.randn(1, GROUP, tokens, HEAD_DIM), k_cmp


def fine_lists(tokens: int, q_lists: bool) -> Run:
    indices = choice(tokens)
    return lambda: block_masks.fine_block_mask(tokens, indices, LAYOUT, PAPER, q_lists=q_lists)


def selection(tokens: int) -> Run:
    q, k_cmp = queries_and_blocks(tokens)
    return lambda: select_blocks(q, k_cmp, kv_len=tokens, **SIZES)


def logits(tokens: int, visible: bool) -> Run:
    q, k_cmp = queries_and_blocks(tokens)
    columns = k_cmp.transpose(-1, -2)

    def run() -> None:
        for rows in selection_module.chunks(q, columns.shape[-1]):
            seen = WINDOWS.count(rows.stop) if visible else columns.shape[-1]
            _ = q[:, :, rows].reshape(1, 1, -1, HEAD_DIM) @ columns[..., :seen]

    return run


def everything(tokens: int) -> Run:
    q, k_cmp = queries_and_blocks(tokens)

    def run() -> object:
        indices = select_blocks(q, k_cmp, kv_len=tokens, **SIZES)
        return [
            block_masks.fine_block_mask(tokens, indices, LAYOUT, PAPER),
            block_masks.sliding_block_mask(
                tokens, tokens, WINDOW, PAPER, block_size=(128, 128), device=CPU
            ),
            block_masks.compress_block_mask(
                tokens, k_cmp.shape[2], 0, WINDOWS, offset=0, device=CPU
            ),
        ]

    return run


def dense(tokens: int, heads: int) -> Run:
    """The same predicate, head by head as FlexAttention's users have them."""
    chosen = block_lists.chosen_blocks(
        choice(tokens),
        kv_len=tokens,
        block_size=SIZES["selection_block_size"],
        offset=0,
        ahead=0,
        own_block=False,
    )
    mask_mod = block_masks.fine_mask_mod(chosen, offset=0, ahead=0, heads_per_choice=heads)
    return lambda: create_block_mask(mask_mod, 1, heads, tokens, tokens, device="cpu")


WHAT: dict[str, Callable[[int], Run]] = {
    "lists": lambda tokens: fine_lists(tokens, q_lists=False),
    "lists and transposes": lambda tokens: fine_lists(tokens, q_lists=True),
    "selection": selection,
    "all logits alone": lambda tokens: logits(tokens, visible=False),
    "visible logits alone": lambda tokens: logits(tokens, visible=True),
    "selection and all masks": everything,
    "create_block_mask, one head": lambda tokens: dense(tokens, 1),
    "create_block_mask, G heads": lambda tokens: dense(tokens, GROUP),
}


def processor() -> str:
    """What the CPU calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def peak_bytes(run: Run) -> int:
    """What torch allocates on a CPU, at most at a time: from what its allocator tells a profiler.

    The system knows less: pages that were asked for before serve again, and count for nobody.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler.kineto_results
    events, changes = list(results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
    return peak


def measure(what: str, tokens: int) -> dict[str, float]:
    """In this process, which had better be a fresh one."""
    torch.set_num_threads(1)
    WHAT[what](256)()  # what is loaded or set up once
    run = WHAT[what](tokens)
    seconds: list[float] = []
    for _ in range(7):
        # of this process alone: neighbours make a clock on the wall tell other exponents
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
        if sum(seconds) > 10:
            break
    return {"seconds": min(seconds), "MiB": peak_bytes(run) / 2**20}


def measured_apart(what: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cost", "--measure", what, str(tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def exponent(figures: dict[int, float]) -> float | None:
    """The slope over the last sizes; None where there are no two, or one is 0."""
    kept = {n: y for n, y in figures.items() if n >= min(FIRST_OF_SLOPE, max(figures) // 2)}
    if len(kept) < 2 or min(kept.values()) <= 0:
        return None
    return float(np.polyfit(np.log(list(kept)), np.log(list(kept.values())), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(12, 17)])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--output", type=Path, default=RESULTS / "cost-cpu.json")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, tokens = arguments.measure
        print(json.dumps(measure(what, int(tokens))))
        return
    report: dict[str, Any] = {
        "device": f"{processor()}, one thread",
        "versions": versions(),
        "sizes": SIZES
        | {"sliding_window_size": WINDOW, "G": GROUP, "head_dim": HEAD_DIM, "kv_heads": 1},
        "measured": {},
    }
    head = "".join(f"{n:>20}" for n in arguments.tokens)
    print(f"{'tokens':28}{head}   exponents of time, memory")
    for what in arguments.what:
        sizes = [n for n in arguments.tokens if "create_block_mask" not in what or n <= DENSE_UP_TO]
        found = {n: measured_apart(what, n) for n in sizes}
        slopes = {
            name: exponent({n: figures[name] for n, figures in found.items()})
            for name in ("seconds", "MiB")
        }
        report["measured"][what] = {"tokens": found, "exponents": slopes}
        cells = "".join(
            f"{found[n]['seconds']:9.3f} s {found[n]['MiB']:5.0f} MiB" if n in found else " " * 20
            for n in arguments.tokens
        )
        ends = ", ".join("-" if x is None else f"{x:.2f}" for x in slopes.values())
        print(f"{what:28}{cells}   {ends}", flush=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
