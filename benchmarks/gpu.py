"""An hour on a GPU, in a box: python -m benchmarks.gpu --minutes 10

What matters most comes first, and each result is written as it comes: a run that is cut off has
lost nothing that it had measured. In order:

    ceilings     what the device copies and multiplies in a second
    oracle       every kernel at a small size, judged
    64k tokens   the branches, the selection, the layer, and what they have to beat, each timed
                 forward and backward beside its estimate (`benchmarks.sm90`), with peak memory;
                 the kernels of the layer one by one; a step of it in a CUDA graph, and inside of
                 `torch.compile`; and what kernels of our own have replaced, with how far apart
                 the two are
    constants    `benchmarks.hardware_constants`
    lengths      what was timed, from 4k to 128k tokens
    dtypes       the oracle again, for float16 and float32
    judge        `nsa-ref verify`, for the time that is left

Times are medians. On a GPU they are CUDA events' around calls that ran before, on random numbers,
with inputs that take turns where one set would stay in the L2 cache. Steps run in a process of
their own: one that fails, hangs or takes its process down is written with its reason, the next one
goes on, and the exit code is 1 in the end. A second run with the same output goes on where the
first one ended: what has failed is tried again.

With --device cpu the same steps run on toy sizes: that shows that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_fast.layer
from benchmarks import paper
from benchmarks.cost import RESULTS, peak_bytes, processor
from nsa_fast import (
    NativeSparseAttention,
    compress_attention,
    compress_pool,
    fine_attention,
    fine_lists,
    select_blocks,
    selection,
    sliding_attention,
)
from nsa_fast.adapter import implementations
from nsa_fast.layer import _gated, _rotated
from nsa_fast.rotary import turns
from nsa_ref.semantics import PAPER
from nsa_ref.testing import Case
from nsa_ref.testing.files import write_json
from nsa_ref.testing.judging import judge
from nsa_ref.testing.loading import versions
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.verdicts import Broken, Inconclusive
from nsa_ref.testing.wording import one_line

if TYPE_CHECKING:
    from rich.table import Table

#: Seconds after which a step is ended: it compiles, or it hangs.
LONGEST_STEP = 150.0
#: Seconds over which the calls of one figure go on, and how many are queued at a time.
TIMED, QUEUED = 1.0, 3
#: How the judge exits if time was up before all was decided. `nsa_ref.testing.cli`, where it stands
#: as well, wants rich, which a machine with a GPU may not have.
UNDECIDED = 3
#: Less than so many seconds are not begun with.
LEAST = 2.0
#: Seconds that the judge takes once its time is up, and that what is ended has for its report.
TO_END, TO_REPORT = 30.0, 15.0


@dataclass(frozen=True)
class Sizes:
    """Of what is timed; tokens in the order in which they are tried."""

    dtype: str
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    compress_block_size: int
    compress_block_sliding_stride: int
    selection_block_size: int
    num_selected_blocks: int
    sliding_window_size: int
    model_dim: int
    tokens: tuple[int, ...]
    ceiling: int  # numbers that are copied, and the square root of those of a matrix

    @property
    def windows(self) -> dict[str, int]:
        names = ("compress_block_size", "compress_block_sliding_stride")
        return {name: getattr(self, name) for name in names}

    @property
    def choice(self) -> dict[str, int]:
        names = ("selection_block_size", "num_selected_blocks")
        return {name: getattr(self, name) for name in names}

    def operations(self, tokens: int, *, backward: bool) -> float:
        """That the branches, and forward the selection, need: two for a product and its sum."""
        compressed = tokens / self.compress_block_sliding_stride / 2
        chosen = self.num_selected_blocks * self.selection_block_size
        read = compressed + chosen + self.sliding_window_size
        wide = self.head_dim + self.value_dim
        if backward:  # q k and dO v again, then dq, dk and dv
            return 2 * tokens * self.q_heads * read * (2 * wide + self.head_dim)
        return 2 * tokens * self.q_heads * (read * wide + compressed * self.head_dim)


SIZES = {
    "cuda": Sizes(
        paper.DTYPE,
        **paper.LAYER,
        tokens=(paper.TOKENS, 2**12, 2**14, 2**17, 2**15, 2**13),
        ceiling=2**14,
    ),
    "cpu": Sizes("float32", 8, 1, 16, 8, 8, 4, 8, 4, 16, 32, (128, 64), 2**8),
}


class Run(NamedTuple):
    """Something that is timed.

    forward : what is called
    inputs : tensors that it gets gradients for
    about : what its time depends on beside the sizes
    """

    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor] = ()
    about: Mapping[str, float | str] = MappingProxyType({})


class Refused(Exception):
    """What is compared with does not run here."""


class Bench:
    """The steps on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.sizes = torch.device(device), SIZES[device]
        self.cuda = device == "cuda"
        self.dtype: torch.dtype = getattr(torch, self.sizes.dtype)
        torch.manual_seed(0)

    def steps(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Every step by name, in the order in which they run."""
        return self.first_steps() | self.further_steps()

    def first_steps(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What comes before the constants: the oracle, and all of 64k tokens."""
        found: dict[str, Callable[[], dict[str, Any]]] = {"ceilings": self.ceilings}
        first = self.sizes.tokens[0]
        found |= self.checks(self.sizes.dtype) | self.clocks(first)
        found["kernels of the layer"] = functools.partial(self.kernels, first)
        found["a step in a CUDA graph"] = functools.partial(self.captured, first)
        found["the layer in torch.compile"] = functools.partial(self.compiled, first)
        for what, (ours, make) in self.replaced().items():
            found[f"{what}, {first} tokens"] = functools.partial(self.beside, ours, make, first)
        return found

    def further_steps(self) -> dict[str, Callable[[], dict[str, Any]]]:
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        for tokens in self.sizes.tokens[1:]:
            found |= self.clocks(tokens)
        for dtype in ("float16", "float32") if self.cuda else ():
            found |= self.checks(dtype)
        return found

    def checks(self, dtype: str) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            f"oracle: {name}, {dtype}": functools.partial(self.against_the_oracle, prop, case)
            for name, (prop, case) in self.asked(dtype).items()
        }

    def clocks(self, tokens: int) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            f"{what}, {tokens} tokens": functools.partial(self.time, make, tokens)
            for what, make in self.timed().items()
        }

    # --- what the device can do, and whether the kernels are right ----------------------------

    def ceilings(self) -> dict[str, Any]:
        """Bytes read and written, and operations of a product, in a second."""
        n = self.sizes.ceiling
        source = torch.randn(n, n, device=self.device).to(self.dtype)
        target = torch.empty_like(source)
        copied, multiplied = (
            self.seconds([run])[0]
            for run in (lambda: target.copy_(source), lambda: source @ source)
        )
        found: dict[str, Any] = {
            "copy, GB/s": 2 * source.nbytes / copied / 1e9,
            "matmul, TFLOP/s": 2 * n**3 / multiplied / 1e12,
        }
        if self.cuda:
            about = torch.cuda.get_device_properties(self.device)
            found |= {
                "SMs": about.multi_processor_count,
                "memory, GiB": about.total_memory / 2**30,
                "L2, MiB": about.L2_cache_size / 2**20,
                "CUDA": torch.version.cuda,
                "driver": driver(),
            }
        return found

    def asked(self, dtype: str) -> dict[str, tuple[str, Case]]:
        """Cases that between them run every kernel, forward and backward."""
        # few rows: the oracle takes them one by one
        rows, length = (24, 300) if self.cuda else (8, 40)
        sizes = self.sizes
        size = Case(
            q_len=rows,
            kv_len=length,
            q_heads=sizes.q_heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            value_dim=sizes.value_dim,
            num_mem_kv=1,
            compress_block_size=sizes.compress_block_size,
            compress_block_sliding_stride=sizes.compress_block_sliding_stride,
            selection_block_size=sizes.selection_block_size,
            num_selected_blocks=4,
            sliding_window_size=sizes.sliding_window_size // 8,
        )
        # more blocks than the choice looks at in one step, of which some are forced
        many = replace(size, q_len=8, kv_len=60 * length, num_initial_blocks=1, num_local_blocks=1)
        # groups of 4 heads read their blocks in FlexAttention
        few = replace(size, q_heads=4 * sizes.kv_heads)
        # a layer has as many rows as tokens: half as many, of which it chooses 2 of 3 blocks
        whole = replace(size, q_heads=8, kv_heads=1, q_len=length // 2, kv_len=length // 2)
        whole = replace(whole, num_selected_blocks=2)
        turned = replace(whole, semantics=replace(PAPER, rotary="all"))
        asked = {"selection": ("I4_selection", many)}
        for branch in ("fine", "compress", "sliding"):
            asked[f"{branch}, forward"] = f"A1_{branch}_output", size
            asked[f"{branch}, backward"] = f"A3_{branch}_gradients", size
        asked["fine of 4 heads, backward"] = "A3_fine_gradients", few
        asked["layer"] = "G1_layer_output", whole
        asked["layer with rotary"] = "G2_layer_rotation", turned
        if getattr(torch, dtype).itemsize == 2:
            # bounds of gradients in 16 bits admit a layer without its gates; exact numbers do not.
            # What they can tell are rows that read all blocks, and a linear map of windows
            exact = replace(whole, num_selected_blocks=3, compress_map="linear")
            asked["layer, exact numbers"] = "G1_layer_output_in_exact_numbers", exact
            asked["layer, backward"] = "G1_layer_gradients_in_exact_numbers", exact
        else:
            asked["layer, backward"] = "A4_layer_gradients", whole
            asked["layer with rotary, backward"] = "A4_layer_gradients", turned
        return {name: (prop, replace(case, dtype=dtype)) for name, (prop, case) in asked.items()}

    def against_the_oracle(self, name: str, case: Case) -> dict[str, Any]:
        """The judge's verdict on one case, by the first implementation that offers its method."""
        prop = PROPERTIES[name]
        one = next(
            one
            for one in implementations(self.device.type)
            if not prop.why_not_offered(one) and case.dtype in one.numerics
        )
        try:
            outcome = judge(prop, one, case)
        except (Broken, Inconclusive) as error:
            return {"error": one_line(error), "case": case.to_json()}
        if not outcome.compared:
            return {"error": "nothing could be compared", "case": case.to_json()}
        return {"holds": True, "budget used": outcome.budget}

    # --- what is timed ------------------------------------------------------------------------

    def timed(self) -> dict[str, Callable[[int], Run]]:
        """What is timed at a number of tokens, the most valuable first."""
        found: dict[str, Callable[[int], Run]] = {
            "select": self.selection,
            "fine": self.fine,
            "compress": self.compress,
            "sliding": self.sliding,
            "gates": self.gates,
            "rotary": self.rotary,
            "branches": functools.partial(self.branches, self.sizes.windows),
            "layer": self.layer,
            "dense FlexAttention": self.dense_flex,
        }
        for name, backends in self.dense_backends.items():
            found[f"dense {name}"] = functools.partial(self.dense, backends)
            # kernels of dense attention may want one head_dim: that of v is less work
            found[f"dense {name}, head_dim of v"] = functools.partial(
                self.dense, backends, dim=self.sizes.value_dim
            )
        if self.cuda and importlib.util.find_spec("fla"):
            # its windows are its selection blocks: so are ours, where it is compared
            size = self.sizes.selection_block_size
            windows = dict.fromkeys(self.sizes.windows, size)
            found["branches, windows of fla"] = functools.partial(self.branches, windows)
            found["parallel_nsa of fla"] = self.fla
        return found

    def replaced(self) -> dict[str, tuple[str, Callable[[int], Run]]]:
        """What kernels of our own have replaced, and what still serves all other sizes.

        returns : name -> what of `timed` it is compared with, and what is timed
        """
        is_triton, ours = (nsa_fast.layer, "is_triton", False), "to be compared"
        return {
            "fine in FlexAttention": ("fine", self.without("fine", fine_lists, "why_not", ours)),
            "select in torch": (
                "select",
                self.without("select", selection, "why_not_in_triton", ours),
            ),
            "gates in torch": ("gates", self.without("gates", *is_triton)),
            "rotary in torch": ("rotary", self.without("rotary", *is_triton)),
        }

    def without(
        self, what: str, module: ModuleType, asked: str, answer: object
    ) -> Callable[[int], Run]:
        """The same, where `asked` of the module says that our kernels do not serve."""

        def made(tokens: int) -> Run:
            run = self.timed()[what](tokens)

            def forward() -> Tensor:
                with mock.patch.object(module, asked, lambda *_, **__: answer):
                    return run.forward()

            return run._replace(forward=forward)

        return made

    def beside(self, ours: str, make: Callable[[int], Run], tokens: int) -> dict[str, Any]:
        """What was replaced, timed; and how far apart the two are on the same numbers."""
        torch.manual_seed(1)
        run = self.timed()[ours](tokens)
        torch.manual_seed(1)
        other = make(tokens)
        if run.inputs:
            d_out = torch.randn_like(run.forward())
            apart = differences(self.step(run, d_out), self.step(other, d_out))
        else:
            apart = {"rows that choose alike": alike(run.forward(), other.forward())}
        del run, other
        return self.time(make, tokens) | apart

    def random(self, heads: int, tokens: int, dim: int) -> Tensor:
        """(1, heads, tokens, dim), as a projection leaves it: a token's heads side by side."""
        shape = (1, tokens, heads, dim)
        made = torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2)
        return made.requires_grad_()

    def qkv(self, tokens: int, dim: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        sizes, dim = self.sizes, dim or self.sizes.head_dim
        return (
            self.random(sizes.q_heads, tokens, dim),
            self.random(sizes.kv_heads, tokens, dim),
            self.random(sizes.kv_heads, tokens, sizes.value_dim),
        )

    def pooled(self, *tokens: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = [compress_pool(each, **self.sizes.windows) for each in tokens]
        return [each.requires_grad_() for each in found]

    def compress(self, tokens: int) -> Run:
        q, k, v = self.qkv(tokens)
        k_cmp, v_cmp = self.pooled(k, v)

        def run() -> Tensor:
            return compress_attention(q, k_cmp, v_cmp, kv_len=tokens, **self.sizes.windows).out

        return Run(run, (q, k_cmp, v_cmp))

    def chosen(self, q: Tensor, k: Tensor) -> Callable[[], Tensor]:
        """The choice of blocks as the layer makes it, with the compress branch's lse."""
        (k_cmp,), tokens, sizes = self.pooled(k), k.shape[2], self.sizes
        with torch.no_grad():
            lse = compress_attention(q, k_cmp, k_cmp, kv_len=tokens, **sizes.windows).lse
        return lambda: select_blocks(
            q, k_cmp, kv_len=tokens, lse=lse, **sizes.windows, **sizes.choice
        )

    def selection(self, tokens: int) -> Run:
        q, k, _ = self.qkv(tokens)
        return Run(self.chosen(q, k))

    def fine(self, tokens: int) -> Run:
        q, k, v = self.qkv(tokens)
        indices, size = self.chosen(q, k)(), self.sizes.selection_block_size
        return Run(
            lambda: fine_attention(q, k, v, indices, selection_block_size=size).out,
            (q, k, v),
            {BLOCKS_OF_TILES: blocks_of_tiles(indices, 4)},
        )

    def sliding(self, tokens: int) -> Run:
        return self.windowed(tokens, self.sizes.sliding_window_size)

    def dense_flex(self, tokens: int) -> Run:
        """FlexAttention through a window of all tokens: the same kernels, of dense attention."""
        return self.windowed(tokens, tokens)

    def windowed(self, tokens: int, window: int) -> Run:
        q, k, v = self.qkv(tokens)
        return Run(lambda: sliding_attention(q, k, v, sliding_window_size=window).out, (q, k, v))

    def gates(self, tokens: int) -> Run:
        """Eq. 5: the gates, and the sum of what comes out of the branches."""
        sizes = self.sizes
        outs = [self.random(sizes.q_heads, tokens, sizes.value_dim) for _ in range(3)]
        logits = self.random(1, tokens, 3 * sizes.q_heads).detach()[0].requires_grad_()
        return Run(lambda: _gated(logits, outs, self.module.layer), (logits, *outs))

    def rotary(self, tokens: int) -> Run:
        """q, turned by its positions."""
        q = self.random(self.sizes.q_heads, tokens, self.sizes.head_dim)
        by = turns(torch.arange(tokens, device=self.device), self.sizes.head_dim, self.dtype)
        return Run(lambda: _rotated(q, by, self.module.layer), (q,))

    def branches(self, windows: dict[str, Any], tokens: int) -> Run:
        """All that stands between q, k, v and the merged heads: what is held against others."""
        sizes, (q, k, v) = self.sizes, self.qkv(tokens)
        logits = self.random(1, tokens, 3 * sizes.q_heads).detach()[0].requires_grad_()
        choice, width = sizes.choice, sizes.sliding_window_size

        def run() -> Tensor:
            k_cmp, v_cmp = compress_pool(k, **windows), compress_pool(v, **windows)
            compressed = compress_attention(q, k_cmp, v_cmp, kv_len=tokens, **windows)
            chosen = select_blocks(q, k_cmp, kv_len=tokens, lse=compressed.lse, **windows, **choice)
            size = choice["selection_block_size"]
            fine = fine_attention(q, k, v, chosen, selection_block_size=size)
            sliding = sliding_attention(q, k, v, sliding_window_size=width)
            return _gated(logits, [compressed.out, fine.out, sliding.out], self.module.layer)

        return Run(run, (q, k, v, logits))

    @functools.cached_property
    def module(self) -> NativeSparseAttention:
        named = asdict(self.sizes)
        for name in ("dtype", "tokens", "ceiling"):
            del named[name]
        return NativeSparseAttention(**named).to(self.device, self.dtype)

    def layer(self, tokens: int) -> Run:
        """The whole layer, with its projections."""
        x = self.random(1, tokens, self.sizes.model_dim).detach()[0].requires_grad_()
        weights = [weight for weight in self.module.parameters() if weight.numel()]
        return Run(lambda: self.module(x), (x, *weights))

    @property
    def dense_backends(self) -> dict[str, list[SDPBackend]]:
        """By name; on a CPU whichever torch takes."""
        if not self.cuda:
            return {"attention": [SDPBackend.MATH]}
        return {"cuDNN": [SDPBackend.CUDNN_ATTENTION], "flash": [SDPBackend.FLASH_ATTENTION]}

    def dense(self, backends: list[SDPBackend], tokens: int, dim: int | None = None) -> Run:
        q, k, v = self.qkv(tokens, dim)

        def run() -> Tensor:
            with sdpa_kernel(backends):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        try:
            run()
        except RuntimeError as error:
            raise Refused(one_line(error)) from None
        try:
            torch.autograd.grad(run().sum(), (q, k, v))
        except RuntimeError as error:
            return Run(run, about={"backward refused": one_line(error)})
        return Run(run, (q, k, v))

    def fla(self, tokens: int) -> Run:
        """Branches whose windows are the selection blocks, pooled by a mean."""
        sizes = self.sizes
        q, k, v = (
            each.detach().transpose(1, 2).contiguous().requires_grad_() for each in self.qkv(tokens)
        )
        kernels = importlib.import_module("fla.ops.nsa.parallel")
        gates = torch.rand(3, 1, tokens, sizes.q_heads, device=self.device, dtype=self.dtype)

        def run() -> Tensor:
            out: Tensor = kernels.parallel_nsa(
                q,
                k,
                v,
                *gates,
                block_counts=sizes.num_selected_blocks,
                block_size=sizes.selection_block_size,
                window_size=sizes.sliding_window_size,
            )
            return out

        return Run(run, (q, k, v))

    def time(self, make: Callable[[int], Run], tokens: int) -> dict[str, Any]:
        """Milliseconds forward and backward, and MiB at the most on top of what there is."""
        runs = [make(tokens)]
        held = sum(each.nbytes for each in runs[0].inputs)
        if self.cuda and held:
            # as many sets as do not fit into the L2 cache together
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            runs += [make(tokens) for _ in range(min(8, 2 * cache // held))]
        found: dict[str, Any] = dict(runs[0].about)
        with torch.no_grad():
            found["forward, ms"], found["calls"] = self.milliseconds([run.forward for run in runs])
        if not runs[0].inputs:
            return found
        # what a backward walks is made here as well
        found["training forward, ms"], _ = self.milliseconds([run.forward for run in runs])
        d_out = torch.randn_like(runs[0].forward())

        def backward(run: Run) -> Callable[[], object]:
            out = run.forward()
            return lambda: torch.autograd.grad(out, run.inputs, d_out, allow_unused=True)

        prepared = [functools.partial(backward, run) for run in runs]
        found["backward, ms"], _ = self.milliseconds(prepared, prepared=True)
        found["MiB"] = self.peak(lambda: backward(runs[0])()) / 2**20
        return found

    def kernels(self, tokens: int) -> dict[str, Any]:
        """Milliseconds of every kernel of one forward and backward of the layer, by name."""
        from torch.profiler import ProfilerActivity, profile

        run = self.layer(tokens)

        def both() -> None:
            out = run.forward()
            torch.autograd.grad(out.sum(), run.inputs, allow_unused=True)
            self.wait()

        both()
        activity = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        with profile(activities=[activity]) as recorded:
            both()
        events = [
            event
            for event in recorded.key_averages()
            if not self.cuda or event.device_type == torch.autograd.DeviceType.CUDA
        ]
        taken = {
            event.key: (event.self_device_time_total if self.cuda else event.self_cpu_time_total)
            for event in events
        }
        count, estimated = {event.key: event.count for event in events}, estimates()
        # a layer sums parts twice, for k and for v; an estimate is of one of them
        times = Counter(
            name for ways in ESTIMATED.values() for one in ways.values() for name in one
        )
        longest: dict[str, Any] = {}
        for name in sorted(taken, key=taken.__getitem__, reverse=True)[:40]:
            longest[name] = {"ms": taken[name] / 1e3, "launches": count[name]}
            if name in estimated:
                longest[name]["estimate, ms"] = {
                    end: max(1, times[name]) * takes for end, takes in estimated[name].items()
                }
        return {"launches": sum(count.values()), "longest": longest}

    def step(self, run: Run, d_out: Tensor) -> tuple[Tensor, ...]:
        """What a training step computes: the output, and the gradients of all inputs."""
        out = run.forward()
        found = torch.autograd.grad(out, run.inputs, d_out, allow_unused=True)
        return out, *(each for each in found if each is not None)

    def captured(self, tokens: int) -> dict[str, Any]:
        """A forward and a backward of the layer, captured once and replayed."""
        if not self.cuda:
            raise Refused("a CPU captures no graph")
        run = self.layer(tokens)
        d_out = torch.randn_like(run.forward())
        step = functools.partial(self.step, run, d_out)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is compiled or made once for a stream
                right = step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            found = step()
        graph.replay()
        self.wait()
        taken, _ = self.milliseconds([graph.replay])
        launched, _ = self.milliseconds([step])
        return {"ms": taken, "without a graph, ms": launched} | differences(found, right)

    def compiled(self, tokens: int) -> dict[str, Any]:
        """The layer inside of `torch.compile`; on a CPU its graphs are run as they are."""
        run = self.layer(tokens)
        backend = "inductor" if self.cuda else "eager"
        module = torch.compile(self.module, backend=backend)
        inside = run._replace(forward=lambda: module(run.inputs[0]))
        d_out = torch.randn_like(run.forward())
        found, right = (self.step(each, d_out) for each in (inside, run))
        taken, _ = self.milliseconds([functools.partial(self.step, inside, d_out)])
        launched, _ = self.milliseconds([functools.partial(self.step, run, d_out)])
        return {"ms": taken, "without it, ms": launched} | differences(found, right)

    # --- clocks -------------------------------------------------------------------------------

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(
        self, runs: Sequence[Callable[[], Any]], *, prepared: bool = False
    ) -> tuple[float, int]:
        seconds, calls = self.seconds(runs, prepared=prepared)
        return seconds * 1e3, calls

    def seconds(
        self, runs: Sequence[Callable[[], Any]], *, prepared: bool = False
    ) -> tuple[float, int]:
        """The median of a call, and how many calls it is of; the runs take turns.

        prepared : a run returns what is timed
        """
        turns = itertools.cycle(runs)

        def called() -> Callable[[], float]:
            run = next(turns)
            return self.clocked(run() if prepared else run)

        for _ in range(2):  # what is compiled or allocated once
            called()()
        found: list[float] = []
        until = time.monotonic() + (TIMED if self.cuda else 0.02)
        while not found or time.monotonic() < until:
            # one is queued while another runs, as in training
            clocks = [called() for _ in range(QUEUED if self.cuda else 1)]
            found += [read() for read in clocks]
        return statistics.median(found), len(found)

    def clocked(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Calls it; what is returned waits for its end, and says how many seconds it took."""
        if not self.cuda:
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
            return lambda: took
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()

        def read() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return read

    def peak(self, run: Callable[[], object]) -> int:
        if not self.cuda:
            return peak_bytes(run)
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def driver() -> str:
    """Its version, as it says; empty where nobody can be asked."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.strip().partition("\n")[0]


def differences(found: Sequence[Tensor], right: Sequence[Tensor]) -> dict[str, Any]:
    """Whether they are alike to the bit, and how far apart they are beside the largest number."""
    found, right = ([each.detach() for each in several] for several in (found, right))
    apart = (
        float((one.double() - other.double()).abs().max() / other.double().abs().max())
        for one, other in zip(found, right, strict=True)
    )
    same = all(map(torch.equal, found, right))
    return {"the same bits": same, "largest difference": max(apart)}


def alike(found: Tensor, right: Tensor) -> float:
    """The share of rows that name the same blocks, in any order."""
    same = found.sort(dim=-1).values == right.sort(dim=-1).values
    return float(same.all(dim=-1).double().mean())


def blocks_of_tiles(block_indices: Tensor, tokens: int) -> float:
    """How many blocks a tile of tokens reads in the mean: what the fine kernels' time goes by."""
    batch, heads, q_len, n = block_indices.shape
    whole = block_indices[:, :, : q_len // tokens * tokens].reshape(batch, heads, -1, tokens * n)
    ordered = whole.sort(dim=-1).values
    new = ordered[..., 1:] != ordered[..., :-1]
    named = new.sum(-1) + 1 - (ordered[..., 0] < 0).to(torch.int64)  # -1 is no block
    return float(named.double().mean())


def run_steps(device: str, names: Sequence[str]) -> None:
    """What a process of its own does: says in a line of JSON each what it begins, and what came."""
    # compilers print, too: what this process says goes where nothing else does
    own = os.dup(1)
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        os.write(own, (json.dumps(what) + "\n").encode())

    try:
        bench = Bench(device)
        steps = bench.steps()
        for name in names:
            say(begins=name)
            try:
                found = steps[name]()
            except Refused as reason:
                found = {"refused": str(reason)}
            except Exception as error:  # what is too large, or not offered here
                found = {"error": one_line(error)}
            say(name=name, found=found)
            if bench.cuda:
                bench.wait()  # a lost context ends this process, and a fresh one goes on
                torch.cuda.empty_cache()
    finally:
        os.dup2(own, 1)
        os.close(own)


# --- the process that writes ----------------------------------------------------------------------


class Box:
    """A time budget, and the report that is written after every step."""

    def __init__(self, device: str, minutes: float, output: Path) -> None:
        self.output = output
        self.until = time.monotonic() + 60 * minutes
        #: How the last process ended, as `subprocess` says it.
        self.ended = 0
        #: What goes through the steps whose names follow.
        self.process = [sys.executable, "-m", "benchmarks.gpu", f"--device={device}", "--steps"]
        about = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, toy sizes"
        self.report: dict[str, Any] = {
            "device": about,
            "versions": versions(),
            "minutes": minutes,
            "sizes": asdict(SIZES[device]) | {"semantics": "PAPER"},
            "measured": {},
            "not done": [],
        }
        self.report["measured"] |= self.kept()

    def kept(self) -> dict[str, Any]:
        """What an earlier run has measured here, of the same code and sizes.

        What failed is not, and no judge whose time was up.
        """
        try:
            before = json.loads(self.output.read_text())
            alike = all(before[name] == self.report[name] for name in ("device", "versions"))
            # JSON knows no tuples
            alike = alike and before["sizes"] == json.loads(json.dumps(self.report["sizes"]))
            return {
                name: found
                for name, found in before["measured"].items()
                if alike and "error" not in found and found.get("exit code") != UNDECIDED
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # there is none, or it is something else

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def write(self, name: str, found: dict[str, Any]) -> None:
        self.report["measured"][name] = found
        write_json(self.output, self.report)
        print(f"{name}: {json.dumps(found)[:300]}", flush=True)

    def go_through(self, names: Sequence[str]) -> None:
        """Every step that is not measured yet, in as many processes as it takes."""
        left = [name for name in names if name not in self.report["measured"]]
        while left and self.left > LEAST:
            begun, before = "", len(left)
            for said in self.child(left):
                begun = said.get("begins", "")
                if not begun:
                    self.write(said["name"], said["found"])
                    left.remove(said["name"])
            if begun and self.left <= LEAST:
                break  # the time is up
            if begun or len(left) == before:
                lost = begun or left[0]
                self.write(lost, {"error": f"its process ended ({self.ended}), or took too long"})
                left.remove(lost)
        self.report["not done"] += left
        write_json(self.output, self.report)

    def child(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What a process says that goes through the steps; it is ended if it is silent."""
        command = [*self.process, *names]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                while True:
                    alarm = threading.Timer(max(0.1, min(LONGEST_STEP, self.left)), process.kill)
                    alarm.daemon = True  # whoever ends this process does not wait for it
                    alarm.start()
                    line = process.stdout.readline()
                    alarm.cancel()
                    if not line:
                        return
                    yield json.loads(line, parse_constant=str)  # no JSON has inf or NaN
            finally:
                process.kill()
                self.ended = process.wait()

    def command(self, name: str, *arguments: str, kept: str) -> None:
        """A command of this repository, and the report that it writes beside ours."""
        if name in self.report["measured"]:
            return
        if self.left < LEAST:
            self.report["not done"].append(name)
            write_json(self.output, self.report)
            return
        path = self.output.with_name(f"{self.output.stem}-{kept}.json")
        path.unlink(missing_ok=True)
        # files, and a group of its own: what it started may outlive it, and would hold a pipe open
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=self.left)
            finally:
                end(process)
            said, failed = (_read(file).strip() for file in (out, errors))
        lines = (said or failed).splitlines() or [""]
        found: dict[str, Any] = {"exit code": process.returncode, "says": lines[-1]}
        if process.returncode < 0:
            found["error"] = f"it took too long, and was ended ({process.returncode})"
        elif process.returncode not in (0, UNDECIDED):
            found["error"] = (failed or lines[-1]).splitlines()[-1]
        if path.exists():
            found["report"] = path.name
        self.write(name, found)


def end(process: subprocess.Popen[Any]) -> None:
    """A process, and all that it started: it is told first, and may write what there is."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TO_REPORT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


WAYS = ("forward, ms", "backward, ms")
#: What a time of fine depends on, and the kernels that it is the time of.
BLOCKS_OF_TILES = "blocks of 4 tokens, mean"

#: What is timed, the way, and the kernels of which there are estimates.
ESTIMATED: dict[str, dict[str, tuple[str, ...]]] = {
    "select": {WAYS[0]: ("group_probabilities", "top_blocks")},
    "fine": {
        WAYS[0]: ("fine_forward",),
        WAYS[1]: (
            *("fine_backward_q", "count_tokens", "place_tokens", "fine_backward_kv"),
            *("fine_sum_parts", "fine_sum_parts"),
        ),
    },
    "compress": {WAYS[0]: ("compress_forward",), WAYS[1]: ("compress_backward",)},
    "sliding": {WAYS[0]: ("sliding_forward",), WAYS[1]: ("sliding_backward",)},
    "gates": {WAYS[0]: ("gated_sum",), WAYS[1]: ("gated_sum_backward",)},
    "rotary": {WAYS[0]: ("turned_pairs",), WAYS[1]: ("turned_pairs",)},
}


def estimates() -> dict[str, Any]:
    """Of the kernels at 64k tokens, by `benchmarks.sm90`; empty where there are none."""
    version = versions().get("triton", "")
    path = RESULTS / f"sm90-triton-{'.'.join(version.split('.')[:2])}.json"
    if not path.exists():
        return {}
    kernels = json.loads(path.read_text())["kernels"]
    return {name: facts["estimate_ms"] for name, facts in kernels.items()}


def curves(report: dict[str, Any], way: str) -> dict[str, dict[int, float]]:
    """Milliseconds by what was timed, and by tokens."""
    found: dict[str, dict[int, float]] = {}
    for name, figures in report["measured"].items():
        what, _, tokens = name.removesuffix(" tokens").rpartition(", ")
        if tokens.isdigit() and way in figures:
            found.setdefault(what, {})[int(tokens)] = figures[way]
    return {what: dict(sorted(of.items())) for what, of in found.items()}


def floor(report: dict[str, Any], way: str) -> dict[int, float]:
    """Milliseconds of what has to be multiplied, at the rate that was measured."""
    rate = report["measured"].get("ceilings", {}).get("matmul, TFLOP/s")
    if not rate:
        return {}
    sizes = dict(report["sizes"])
    sizes.pop("semantics")
    of = Sizes(**sizes)
    backward = way.startswith("backward")
    return {n: of.operations(n, backward=backward) / rate / 1e9 for n in sorted(of.tokens)}


def estimated(report: dict[str, Any], what: str, way: str) -> str:
    """Of the kernels alone, at 64k tokens, from `optimistic` to `expected`.

    Those of fine that walk the blocks of a tile are estimated for as many as there were.
    """
    kernels, known = ESTIMATED.get(what, {}).get(way, ()), report.get("estimates, ms", {})
    if not kernels or not all(name in known for name in kernels):
        return "-"
    timed = report["measured"].get(f"{what}, {paper.TOKENS} tokens", {})
    blocks = timed.get(BLOCKS_OF_TILES, paper.UNION) / paper.UNION
    ends = (
        sum(known[name][end] * (blocks if name in paper.OF_TILES else 1) for name in kernels)
        for end in ("optimistic", "expected")
    )
    return " to ".join(f"{end:.3g}" for end in ends)


def tables(report: dict[str, Any]) -> Iterator[Table]:
    from rich.table import Table

    for way in WAYS:
        found = curves(report, way)
        lengths = sorted({tokens for of in found.values() for tokens in of})
        table = Table(title=way)
        for column in ("", *map(str, lengths), "estimate at 65536"):
            table.add_column(column, justify="right" if column else "left")
        for what, of in (found | {"floor": floor(report, way)}).items():
            cells = (f"{of[tokens]:.3g}" if tokens in of else "-" for tokens in lengths)
            table.add_row(what, *cells, estimated(report, what, way))
        yield table


def show(report: dict[str, Any]) -> bool:
    """The tables, printed; none without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return False
    console = Console(width=max(100, Console().width))
    for table in tables(report):
        console.print(table)
    return True


def draw(report: dict[str, Any], path: Path) -> bool:
    """The curves of the forward, and its floor, in a picture; no picture without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    colors = {what: f"C{number}" for number, what in enumerate(curves(report, "forward, ms"))}
    for axes, way in zip(figure.subplots(1, 2), WAYS):
        for what, of in curves(report, way).items():
            axes.plot(list(of), list(of.values()), marker="o", label=what, color=colors.get(what))
        if lowest := floor(report, way):
            axes.plot(list(lowest), list(lowest.values()), "k--", label="floor of the branches")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=way)
        axes.legend(fontsize=7)
    figure.suptitle(report["device"])
    figure.savefig(path, dpi=120)
    return True


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="default: a file in benchmarks/results/")
    parser.add_argument("--steps", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here. Try --device cpu, which shows how the script works")
    if arguments.steps:
        run_steps(device, arguments.steps)
        return
    # what a batch system sends first: the steps' process is then ended as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    name = torch.cuda.get_device_name() if device == "cuda" else "toy"
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    box = Box(device, arguments.minutes, arguments.output or RESULTS / f"gpu-{slug}.json")
    box.report["estimates, ms"] = estimates()
    try:
        fill(box, device)
    finally:  # of a run that is ended, too
        show(box.report)
        picture = box.output.with_suffix(".png")
        if draw(box.report, picture):
            print(f"drawn into {picture}")
        print(f"written to {box.output}")
    failed = [name for name, found in box.report["measured"].items() if "error" in found]
    if failed:
        sys.exit(f"these steps failed, each with its reason in the report: {'; '.join(failed)}")


def fill(box: Box, device: str) -> None:
    """Everything, in its order, as far as the time goes."""
    bench = Bench(device)
    box.go_through(list(bench.first_steps()))
    constants = box.output.with_name(f"{box.output.stem}-constants.json")
    box.command(
        "constants",
        "benchmarks.hardware_constants",
        f"--device={'cuda' if device == 'cuda' else 'interpreter'}",
        f"--output={constants}",
        *([] if device == "cuda" else ["--size=2048"]),
        kept="constants",
    )
    box.go_through(list(bench.further_steps()))
    verdict = box.output.with_name(f"{box.output.stem}-verify.json")
    box.command(
        "judge",
        "nsa_ref.testing.cli",
        "verify",
        "nsa_fast",
        f"--device={device}",
        f"--time={max(1, round(box.left - TO_END))}s",
        f"--json={verdict}",
        kept="verify",
    )


if __name__ == "__main__":
    main()
