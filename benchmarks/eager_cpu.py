"""The eager path on a CPU beside FlexAttention's eager operator: python -m benchmarks.eager_cpu

Fine, sliding and the whole layer, forward and with a backward, in this process with one thread.
Both sides take turns; of each the least of the seconds that the thread ran counts. The other side
is `torch._higher_order_ops.flex_attention` with the same masks, made before the clock starts for
the branches; in the layer it stands in the place of all three branches. Beside it, the most that
torch has allocated at a time, as the sequence grows. Prints all of it, and writes it with the
versions as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.nn.attention.flex_attention import BlockMask

import nsa_fast.layer
from benchmarks.cost import (
    CPU,
    GROUP,
    HEAD_DIM,
    RESULTS,
    SIZES,
    WINDOW,
    Run,
    choice,
    exponent,
    peak_bytes,
    processor,
)
from nsa_fast import Attention, NativeSparseAttention, block_masks, fine_attention
from nsa_fast import sliding_attention as sliding
from nsa_fast.windows import Windows
from nsa_ref.semantics import PAPER
from nsa_ref.testing.loading import versions

BLOCK_SIZE = SIZES["selection_block_size"]
LAYER = SIZES | {
    "model_dim": 512,
    "q_heads": GROUP,
    "kv_heads": 1,
    "head_dim": HEAD_DIM,
    "compress_map": "linear",
    "sliding_window_size": WINDOW,
}
WAYS = ("forward", "forward and backward")


def by_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Attention:
    """FlexAttention's eager operator: all scores at once, and the predicate everywhere."""
    scale = q.shape[3] ** -0.5
    out, lse, _ = flex_operator(q, k, v, _same, block_mask.as_tuple(), scale, {}, (), ())
    return Attention(out, lse * math.log(2))


def _same(score: Tensor, *place: Tensor) -> Tensor:
    return score


def sliding_mask(q: Tensor, k: Tensor) -> BlockMask:
    lengths = q.shape[2], k.shape[2]
    return block_masks.sliding_block_mask(*lengths, WINDOW, PAPER, device=CPU)


def compress_mask(q: Tensor, k_cmp: Tensor) -> BlockMask:
    windows = Windows(SIZES["compress_block_size"], SIZES["compress_block_sliding_stride"], PAPER)
    return block_masks.compress_block_mask(
        q.shape[2], k_cmp.shape[2], 0, windows, offset=0, device=CPU
    )


def fine_mask(block_indices: Tensor) -> BlockMask:
    return block_masks.tiled_fine_block_mask(
        block_indices, BLOCK_SIZE, PAPER, heads_per_choice=GROUP, block_size=(128, 128)
    )


#: The branches of a layer, each by FlexAttention's eager operator.
BY_FLEX: dict[str, Callable[..., Attention]] = {
    "sliding_attention": lambda q, k, v, **_: by_flex(q, k, v, sliding_mask(q, k)),
    "compress_attention": lambda q, k, v, *memory, **_: by_flex(q, k, v, compress_mask(q, k)),
    "fine_attention": lambda q, k, v, indices, **_: by_flex(q, k, v, fine_mask(indices)),
}


def with_branches_by_flex(run: Run) -> Run:
    def patched() -> object:
        with mock.patch.multiple(nsa_fast.layer, **BY_FLEX):
            return run()

    return patched


def branch(of: Callable[..., Attention], tokens: int, backward: bool) -> Run:
    """A run of a function of q, k and v."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, HEAD_DIM, requires_grad=True) for heads in (GROUP, 1, 1)
    )

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out, lse = of(q, k, v)
            if backward:
                assert lse is not None
                torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))

    return run


def layer(tokens: int, backward: bool) -> Run:
    torch.manual_seed(0)
    module = NativeSparseAttention(**LAYER)
    x = torch.randn(1, tokens, LAYER["model_dim"], requires_grad=True)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = module(x)
            if backward:
                torch.autograd.grad(out.sum(), [x, *module.parameters()], allow_unused=True)

    return run


def pair(what: str, tokens: int, backward: bool) -> tuple[Run, Run]:
    """The same thing by the eager path, and by FlexAttention's eager operator."""
    if what == "layer":
        run = layer(tokens, backward)
        return run, with_branches_by_flex(run)
    if what == "sliding":
        mask = sliding_mask(*torch.empty(2, 1, 1, tokens, 1))
        return (
            branch(lambda *qkv: sliding(*qkv, sliding_window_size=WINDOW), tokens, backward),
            branch(lambda *qkv: by_flex(*qkv, mask), tokens, backward),
        )
    indices = choice(tokens)
    mask = fine_mask(indices)
    return (
        branch(
            lambda *qkv: fine_attention(*qkv, indices, selection_block_size=BLOCK_SIZE),
            tokens,
            backward,
        ),
        branch(lambda *qkv: by_flex(*qkv, mask), tokens, backward),
    )


def in_turns(runs: tuple[Run, Run], rounds: int) -> list[float]:
    """The least seconds of each."""
    seconds = [[math.inf], [math.inf]]
    for _ in range(rounds):
        for run, found in zip(runs, seconds):
            # of this process alone: neighbours would count on a clock on the wall
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
    return [min(found) for found in seconds]


def measure(what: str, backward: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    for run in pair(what, min(256, arguments.at), backward):  # what is loaded or set up once
        run()
    ours, theirs = in_turns(pair(what, arguments.at, backward), arguments.rounds)
    peaks = {n: peak_bytes(pair(what, n, backward)[0]) / 2**20 for n in arguments.tokens}
    of_flex = peak_bytes(pair(what, arguments.at, backward)[1]) / 2**20
    return {
        "tokens": arguments.at,
        "seconds": ours,
        "seconds of FlexAttention": theirs,
        "ratio": round(theirs / ours, 2),
        "MiB": peaks,
        "MiB of FlexAttention": of_flex,
        "exponent of MiB": exponent(peaks),
    }


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", type=int, default=2**12, help="tokens of what is timed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(11, 15)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "eager-cpu.json")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "device": f"{processor()}, one thread",
        "versions": versions(),
        "sizes": LAYER | {"dtype": "float32", "semantics": "PAPER"},
        "measured": {},
    }
    for what in ("sliding", "fine", "layer"):
        for way in WAYS:
            found = measure(what, way != "forward", arguments)
            report["measured"][f"{what}, {way}"] = found
            peaks = ", ".join(f"{n}: {peak:.0f}" for n, peak in found["MiB"].items())
            print(
                f"{what}, {way}: {found['seconds']:.2f} s, FlexAttention "
                f"{found['seconds of FlexAttention']:.2f} s, ratio {found['ratio']}; MiB {peaks}, "
                f"FlexAttention {found['MiB of FlexAttention']:.0f}",
                flush=True,
            )
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
