"""What sm_90 makes of Triton kernels, without a GPU: python -m benchmarks.sm90

Triton's wheel carries ptxas and the disassemblers of CUDA. Each kernel is compiled for sm_90 as it
is launched at the paper's shape (`paper.py`), and what can be read from the machine code is printed
and written as JSON: registers, stack, spills, shared memory, how products are computed, and how
long loops are.

Nothing runs. The times at 64k tokens are ESTIMATES, of a model of an H200 with the constants below:

    optimistic   the time of the busiest unit alone: tensor cores, instructions, exponentials,
                 shared memory, the L2 cache, or memory
    expected     at least that, and one program's time, instruction after instruction, over the
                 programs that fit on an SM; FlexAttention's programs are of unequal lengths, and
                 are started in their order, each where one has ended
    floor        the products that are needed, at the peak of the tensor cores
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import paper
from benchmarks.flex_sources import COMPILED_IN, Call, Written, written
from nsa_fast import (
    block_masks,
    fine_kernels,
    fine_list_kernels,
    fine_lists,
    flex,
    gate_kernels,
    rotary_kernels,
    selection_kernels,
)
from nsa_fast.selection import Sizes, why_not_in_triton
from nsa_fast.windows import Windows
from nsa_ref.semantics import PAPER, Semantics
from nsa_ref.testing.loading import versions

RESULTS = Path(__file__).parent / "results"
#: One for each version of Triton, which decides what becomes of a kernel.
_TRITON = ".".join(triton.__version__.split(".")[:2])
KEPT = RESULTS / f"sm90-triton-{_TRITON}.json"
SUPPORTED = RESULTS / f"sm90-supported-triton-{_TRITON}.json"
TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: Constants of a kernel that are its tile.
TILE = re.compile(r"BLOCK_[MN]\d?|XBLOCK|R0_BLOCK|T|BW|COLUMNS|R|B|NUMBERS|COUNTED|SLOTS")

#: Opcodes of products on tensor cores: those of a group of four warps, and those of one warp.
PRODUCTS = {"HGMMA": "wgmma", "HMMA": "mma.sync"}


#: Of an H200: SMs, clocks a second, and of one SM in a clock the operations of tensor cores in 16
#: bits (989 TFLOP/s in all), exponentials, and bytes from shared memory.
SMS, CLOCK, OPERATIONS, EXPONENTIALS, SHARED_BYTES = 132, 1.83e9, 4096, 16, 128
#: Bytes a second from the L2 cache (published for an H100; the least certain), and from memory.
L2, MEMORY = 5.5e12, 4.3e12
#: The share of the peak that torch's own products of matrices are taken to reach.
OF_TORCH = 0.7
#: Instructions of a loop that computes nothing.
SHORT = 40
#: Clocks of an instruction in a program by itself, and of a step for which a warp waits.
CLOCKS, WAIT = 1.2, 20
#: Registers, and bytes of shared memory with those that a program reserves, of an SM.
REGISTERS, SHARED, RESERVED = 65536, 228 * 1024, 1024


class Walk(NamedTuple):
    """Programs of one kind of FlexAttention's: those of out, of dq, or of dk and dv.

    partial, full : of every program, the iterations of its loop over partial blocks and over full
        ones, which stand in this order in the kernel
    l2_bytes : read in an iteration
    """

    partial: list[int]
    full: list[int]
    l2_bytes: int


class Work(NamedTuple):
    """What a kernel does at 64k tokens.

    iterations : of its largest loop, in all programs; 0 where memory alone takes time
    l2_bytes : read in one of them
    memory_bytes : read and written in all
    operations : of the products that are needed, in all
    walks : instead of iterations, the kinds of programs of one head, as their loops stand
    heads : how often these are launched; the last kind is started first
    """

    iterations: float = 0
    l2_bytes: float = 0
    memory_bytes: float = 0
    operations: float = 0
    walks: tuple[Walk, ...] = ()
    heads: int = 0


class Launch(NamedTuple):
    """A kernel as it is launched.

    types : of the arguments that are not compiled in, "*bf16", "i32" and so on
    aligned : those that are multiples of 16; pointers are, as torch allocates them
    unaligned : pointers that are none, because they begin at a later number
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Collection[str] = ()
    num_warps: int = 4
    num_stages: int = 2
    work: Work = Work()
    unaligned: Collection[str] = ()

    @property
    def tile(self) -> dict[str, int]:
        """What a program holds, and walks in a step, as the kernel calls it."""
        return {name: size for name, size in self.constants.items() if TILE.fullmatch(name)}


class Instruction(NamedTuple):
    """target : of a branch; columns : of a product of 64 rows and 16 in between"""

    address: int
    opcode: str
    target: int | None
    columns: int


def compiled_for_sm90(launch: Launch) -> dict[str, Any]:
    """What is read from the machine code of one kernel.

    ::

        tile, warps        of a program
        registers, stack   of a thread, stack in bytes
        spills             instructions that load from or store to local memory
        shared             bytes of shared memory of a program
        products           "wgmma", "mma.sync" or "none"
        instructions       all of them, and of every loop, the outermost of those that overlap
        programs           that fit on an SM
        estimate_ms        optimistic, expected and floor, at 64k tokens
    """
    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    aligned = [
        (place,)
        for place, name in enumerate(names)
        if name in launch.aligned or signature[name].startswith("*")
        if name not in launch.unaligned
    ]
    made = triton.compile(
        ASTSource(
            launch.kernel,
            signature,
            {
                (names.index(name),): value
                for name, value in launch.constants.items()
                if name in names  # a tile is written into what Inductor makes
            },
            # else every load is as narrow as one number, which is another kernel
            {place: [["tt.divisibility", 16]] for place in aligned},
        ),
        target=TARGET,
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _disassembled("-res-usage", cubin)
        instructions = _instructions(_disassembled("-sass", cubin))
    opcodes = [each.opcode for each in instructions]
    kinds = {PRODUCTS[opcode] for opcode in opcodes if opcode in PRODUCTS}
    registers, shared, loops = _number("REG", usage), made.metadata.shared, _loops(instructions)
    programs = _programs(registers, shared, launch.num_warps)
    return {
        "tile": launch.tile,
        "warps": launch.num_warps,
        "registers": registers,
        "stack": _number("STACK", usage),
        "spills": sum(opcode in ("LDL", "STL") for opcode in opcodes),
        "shared": shared,
        "products": "+".join(sorted(kinds)) or "none",
        "instructions": len(instructions),
        "loops": [len(loop) for loop in loops],
        "programs": programs,
        "estimate_ms": _estimate(launch, loops, programs),
    }


def _programs(registers: int, shared: int, warps: int) -> int:
    """How many fit on an SM; a warp's registers are allocated by 256."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, SHARED // (shared + RESERVED), 64 // warps, 32)


def _estimate(launch: Launch, loops: list[list[Instruction]], programs: int) -> dict[str, float]:
    """Milliseconds by the model at the top of this file."""
    work, seconds = launch.work, 1 / SMS / CLOCK
    optimistic = expected = work.memory_bytes / MEMORY
    if work.walks:
        if programs:
            busiest, expected = _of_walks(launch, _innermost(loops), programs)
            optimistic = max(optimistic, busiest * seconds)
    else:
        unit, serial = _clocks(max(loops, key=len, default=[]), launch.num_warps, work.l2_bytes)
        optimistic = max(optimistic, work.iterations * seconds * unit)
        expected = work.iterations * seconds * serial / programs
    return {
        "optimistic": round(optimistic * 1e3, 2),
        "expected": round(max(optimistic, expected) * 1e3, 2),
        "floor": round(work.operations / (OPERATIONS * CLOCK * SMS) * 1e3, 2),
    }


def _clocks(loop: list[Instruction], warps: int, l2_bytes: float) -> tuple[float, float]:
    """Of an iteration: those of the busiest unit, and those of a program by itself."""
    count = Counter(each.opcode for each in loop)
    moved = count["LDS"] + count["STS"] + 4 * (count["LDSM"] + count["STSM"] + count["LDGSTS"])
    products = sum(64 * 16 * 2 * each.columns for each in loop) / OPERATIONS * warps / 4
    units = (
        products,
        len(loop) * warps / 4,  # four schedulers
        32 * count["MUFU"] * warps / EXPONENTIALS,
        32 * 4 * moved * warps / SHARED_BYTES,
        l2_bytes / (L2 / SMS / CLOCK),
    )
    # the warps of a program beyond four run beside the others, a little better packed
    beside = 1 if warps <= 4 else 0.8 * warps / 4
    waits = count["BAR"] + count["SHFL"] + count["LDS"]
    return max(units), products + CLOCKS * beside * len(loop) + WAIT * waits


def _of_walks(launch: Launch, loops: list[list[Instruction]], programs: int) -> tuple[float, float]:
    """Clocks of the busiest unit in all, and seconds until the last program has ended."""
    work, busiest, lengths = launch.work, 0.0, []
    assert len(loops) == 2 * len(work.walks), [len(loop) for loop in loops]
    for walk, pair in zip(work.walks, zip(loops[::2], loops[1::2])):
        (unit, serial), (full_unit, full_serial) = (
            _clocks(loop, launch.num_warps, walk.l2_bytes) for loop in pair
        )
        busiest += work.heads * (sum(walk.partial) * unit + sum(walk.full) * full_unit)
        # beside others that want the same unit
        serial, full_serial = max(serial, programs * unit), max(full_serial, programs * full_unit)
        lengths.append(
            [serial * few + full_serial * many for few, many in zip(walk.partial, walk.full)]
        )
    free = [0.0] * (SMS * programs)
    for length in (length for _ in range(work.heads) for kind in lengths[::-1] for length in kind):
        heapq.heapreplace(free, free[0] + length)
    return busiest, max(free) / CLOCK


def _disassembled(what: str, cubin: Path) -> str:
    run = subprocess.run(
        [TOOLS / "cuobjdump", what, cubin], capture_output=True, text=True, check=True
    )
    return run.stdout + run.stderr


def _number(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def _instructions(sass: str) -> list[Instruction]:
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*?);", sass, re.M)
    found = []
    for address, opcode, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        shape = re.match(r"\.64x(\d+)x16\.", rest) if opcode == "HGMMA" else None
        found.append(
            Instruction(
                int(address, 16),
                opcode,
                int(target[1], 16) if target else None,
                int(shape[1]) if shape else 0,
            )
        )
    return found


def _loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Each loop: from a branch's target back to the last branch that goes there."""
    ends: dict[int, int] = {}
    for each in instructions:
        if each.target is not None and each.target < each.address:
            ends[each.target] = max(each.address, ends.get(each.target, 0))
    return [
        [each for each in instructions if start <= each.address <= end]
        for start, end in sorted(ends.items())
    ]


def _innermost(loops: list[list[Instruction]]) -> list[list[Instruction]]:
    """Those without another in them, that are more than a wait."""
    spans = [(loop[0].address, loop[-1].address) for loop in loops]
    return [
        loop
        for loop, (start, end) in zip(loops, spans)
        if len(loop) > SHORT
        and not any(
            start <= first and last <= end and (start, end) != (first, last)
            for first, last in spans
        )
    ]


# --- the kernels ----------------------------------------------------------------------------------

#: Where kernels are started.
MODULES = (
    "selection_kernels",
    "fine_kernels",
    "fine_list_kernels",
    "gate_kernels",
    "rotary_kernels",
)

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, WINDOW = (
    paper.LAYER[name]
    for name in ("q_heads", "kv_heads", "head_dim", "value_dim", "sliding_window_size")
)
_WINDOWS = Windows(
    paper.LAYER["compress_block_size"], paper.LAYER["compress_block_sliding_stride"], PAPER
)
SIZES = Sizes(
    kv_len=paper.TOKENS,
    windows=_WINDOWS,
    num_windows=_WINDOWS.count(paper.TOKENS),
    block_size=paper.LAYER["selection_block_size"],
    num_blocks=paper.TOKENS // paper.LAYER["selection_block_size"],
    num_selected=paper.LAYER["num_selected_blocks"],
    num_initial=1,
    num_local=2,
)


def launches(dtype: torch.dtype = torch.bfloat16) -> dict[str, Launch]:
    """Every kernel by name, as it is launched at the paper's shape."""
    product = selection_kernels.product_constants(
        dtype, HEAD_DIM, heads=KV_HEADS, kv_heads=KV_HEADS, group=HEADS // KV_HEADS
    )
    choice = selection_kernels.choice_constants(SIZES, SIZES.num_selected)
    seen = {"STRIDE": SIZES.windows.stride, "CAUSAL": True}
    fine = fine_kernels.constants(HEAD_DIM, VALUE_DIM, SIZES.block_size, HEADS // KV_HEADS)
    gates = gate_kernels.constants(HEADS, VALUE_DIM)
    rotary = rotary_kernels.constants(HEADS, HEAD_DIM)
    rows = [
        (selection_kernels.row_lse, product | seen, selection_kernels.PRODUCT_OPTIONS),
        (selection_kernels.group_probabilities, product | seen, selection_kernels.PRODUCT_OPTIONS),
        (selection_kernels.top_blocks, choice | seen, selection_kernels.CHOICE_OPTIONS),
        *_fine_rows(fine),
        (gate_kernels.gated_sum, gates, {}),
        (gate_kernels.gated_sum_backward, gates, {}),
        (rotary_kernels.turned_pairs, rotary | {"BACK": False}, {}),
        (rotary_kernels.turned_pairs, rotary | {"BACK": True}, {}),
    ]
    found = {}
    for kernel, constants, options in rows:
        name = kernel.fn.__name__
        launch = _launch(kernel, dtype, constants, options, _work()[name](constants))
        found[f"{name}_back" if constants.get("BACK") else name] = launch
    return found


def _fine_rows(fine: dict[str, Any]) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """The fine branch's kernels, and of `fine_sum_parts`, which runs for k and v, that of k."""
    part = {"PART": fine_lists.PART}
    summed = {key: fine[key] for key in ("BLOCK", "COLUMNS", "D")}
    summed |= {"DP": max(16, triton.next_power_of_2(fine["D"]))}
    counted = {"COUNTED": fine_list_kernels.COUNTED}
    slots = {"SLOTS": SIZES.num_selected}
    return [
        (fine_kernels.fine_forward, fine, fine_kernels.OPTIONS),
        (fine_kernels.fine_backward_q, fine, fine_kernels.OPTIONS),
        (fine_kernels.fine_backward_kv, fine | part, fine_kernels.KV_OPTIONS),
        (fine_kernels.fine_sum_parts, summed, fine_kernels.SUM_OPTIONS),
        (fine_list_kernels.count_tokens, counted, fine_list_kernels.COUNT_OPTIONS),
        (fine_list_kernels.place_tokens, slots, fine_list_kernels.PLACE_OPTIONS),
    ]


def _launch(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    options: dict[str, int],
    work: Work,
) -> Launch:
    types = {name: _type(name, dtype) for name in kernel.arg_names if name not in constants}
    aligned = [name for name in types if STRIDE.fullmatch(name)]
    unaligned = UNALIGNED.get(kernel.fn.__name__, ())
    return Launch(kernel, types, constants, aligned, **options, work=work, unaligned=unaligned)


def _work() -> dict[str, Callable[[Mapping[str, Any]], Work]]:
    """What each kernel does with 64k tokens, from what it compiles in."""
    tokens, group, n, block = SIZES.kv_len, HEADS // KV_HEADS, SIZES.num_selected, SIZES.block_size
    tile_of = tokens * KV_HEADS  # over T, the tiles
    windows = (SIZES.num_windows + 1) / 2  # that a token sees, in the mean
    wide = HEAD_DIM + VALUE_DIM
    pairs = tokens * HEADS * n * block  # of a row and a key that it reads
    branch = 2 * tokens * HEADS * VALUE_DIM  # bytes of its output
    parts = 4 * wide * block * (tile_of * n / fine_lists.PART + SIZES.num_blocks * KV_HEADS)
    # bytes of the choices, and of the counts, which are read and written
    choices = 8 * tile_of * n
    counts = 8 * SIZES.num_blocks * KV_HEADS * fine_list_kernels.CHUNKS

    def of_windows(c: Mapping[str, Any]) -> Work:
        return Work(
            tile_of / c["T"] * windows / c["BW"],
            2 * c["BW"] * HEAD_DIM,
            4 * tile_of * windows,
            2 * tokens * HEADS * windows * HEAD_DIM,
        )

    def of_tiles(c: Mapping[str, Any], operations: float) -> Work:
        return Work(tile_of / c["T"] * paper.UNION, 2 * block * wide, operations=pairs * operations)

    return {
        "row_lse": of_windows,
        "group_probabilities": of_windows,
        "top_blocks": lambda c: Work(
            tile_of / c["R"] * (SIZES.num_blocks / c["B"] + 1) / 2,
            memory_bytes=4 * tile_of * windows,
        ),
        "fine_forward": lambda c: of_tiles(c, 2 * wide),
        # logits and the products with v are computed in both, and needed once
        "fine_backward_q": lambda c: of_tiles(c, 2 * (wide + HEAD_DIM)),
        "fine_backward_kv": lambda c: Work(
            tile_of * n / c["T"], 2 * c["T"] * group * wide, parts, pairs * 2 * wide
        ),
        "fine_sum_parts": lambda c: Work(memory_bytes=parts * c["D"] / wide),
        "count_tokens": lambda c: Work(memory_bytes=choices + counts),
        "place_tokens": lambda c: Work(memory_bytes=choices + counts + choices / 2),
        "gated_sum": lambda c: Work(memory_bytes=4 * branch),
        "gated_sum_backward": lambda c: Work(memory_bytes=7 * branch),
        # of q, which is read and written, and of cos and sin
        "turned_pairs": lambda c: Work(memory_bytes=4 * tokens * HEAD_DIM * (HEADS + 1)),
    }


# --- what Inductor writes -------------------------------------------------------------------------

#: The branches that are FlexAttention's, at the paper's shape.
CALLS = {
    branch: Call(branch, paper.DTYPE, HEAD_DIM, VALUE_DIM, HEADS, KV_HEADS, SIZES.block_size)
    for branch in ("compress", "sliding")
}


def flex_launches() -> dict[str, Launch]:
    """FlexAttention's kernels by name, as nsa_fast configures them at the paper's shape."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        kernels = written(list(CALLS.values()), Path(folder))
    for branch, call in CALLS.items():
        for direction, kernel in kernels[call].items():
            work = _flex_work(branch, direction, kernel.tile)
            found[f"{branch}_{direction}"] = of_inductor(kernel, work)
    return found


def of_inductor(kernel: Written, work: Work) -> Launch:
    """A kernel that Inductor has written, as Inductor launches it."""
    types = {name: type for name, type in kernel.signature.items() if type != "constexpr"}
    warps, stages = kernel.num_warps, kernel.num_stages
    constants = kernel.constants | kernel.tile
    return Launch(kernel.function, types, constants, kernel.aligned, warps, stages, work)


def _flex_work(branch: str, direction: str, tile: Mapping[str, int]) -> Work:
    """What such a kernel does with 64k tokens, from the lists that it walks."""
    rows = SIZES.kv_len * HEADS
    if direction == "lse":
        return Work(memory_bytes=8 * rows)
    if direction == "delta":  # of out and its gradient, and of lse's gradient
        return Work(memory_bytes=rows * (4 * VALUE_DIM + 8))
    block, cpu, tokens = (128, 128), torch.device("cpu"), SIZES.kv_len
    if branch == "sliding":
        mask = block_masks.sliding_block_mask(
            tokens, tokens, WINDOW, PAPER, device=cpu, block_size=block
        )
        kv_heads, columns = KV_HEADS, float(WINDOW)
    else:
        mask = block_masks.compress_block_mask(
            tokens, SIZES.num_windows, 0, SIZES.windows, offset=0, device=cpu, block_size=block
        )
        kv_heads, columns = HEADS, (SIZES.num_windows + 1) / 2
    group, wide = HEADS // kv_heads, HEAD_DIM + VALUE_DIM

    def walk(lists: str, held: int, step: int, *, programs: int = 1, times: int = 1) -> Walk:
        partial, full = (
            (getattr(mask, f"{kind}{lists}_num_blocks").flatten() * (block[0] // step * times))
            .repeat_interleave(block[0] // held)
            .repeat(programs)
            .tolist()
            for kind in ("", "full_")
        )
        return Walk(partial, full, 2 * step * wide)

    pairs = 2 * tokens * HEADS * columns
    if direction == "forward":
        return Work(
            operations=pairs * wide,
            walks=(walk("kv", tile["BLOCK_M"], tile["BLOCK_N"]),),
            heads=HEADS,
        )
    return Work(
        operations=pairs * (3 * HEAD_DIM + 2 * VALUE_DIM),
        walks=(
            walk("kv", tile["BLOCK_M2"], tile["BLOCK_N2"], programs=group),
            walk("q", tile["BLOCK_N1"], tile["BLOCK_M1"], times=group),
        ),
        heads=kv_heads,
    )


#: Arguments that are no integers -> their types; of all others that are pointers, the dtype's.
TYPES = {
    "*fp32": ("lse", "d_lse", "delta", "p", "dk_parts", "dv_parts", "x_parts", "turns"),
    "*i32": (
        "entries",
        "counts",
        "token_lists",
        "starts",
        "part_block",
        "part_ends",
        "begins",
    ),
    "*i64": ("chosen",),
    "fp32": ("scale", "scale_log2", "forced_score", "floor", "factor"),
}
#: Of a kernel, the pointers that do not begin where memory was allocated.
UNALIGNED = {"count_tokens": ("counts",)}
TENSORS = re.compile(r"d?[qkvx]\d?|k_cmp|columns|d?_?out|d?_?logits")
STRIDE = re.compile(r"\w_(batch|head|token|window|pair)|(batch|head|token)\d")


def _type(name: str, dtype: torch.dtype) -> str:
    """What an argument is to Triton, by its name."""
    for found, names in TYPES.items():
        if name in names:
            return found
    number = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    return number if TENSORS.fullmatch(name) else "i32"


# --- what has grown -------------------------------------------------------------------------------


def grown(found: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What has become worse of a kernel since the figures that are kept, in words.

    Registers, stack, spills and the instructions of each loop may grow by 5 %, shared memory not at
    all; products stay as they are computed. Where there are more loops, or fewer, their sum counts.
    """
    allowed = {"registers": 1.05, "stack": 1.05, "spills": 1.05, "shared": 1.0}
    worse = [name for name, factor in allowed.items() if found[name] > factor * before[name]]
    now, then = found["loops"], before["loops"]
    if len(now) != len(then):
        now, then = [sum(now)], [sum(then)]
    if any(is_now > 1.05 * was for is_now, was in zip(now, then)):
        worse.append("loops")
    if found["products"] != before["products"]:
        worse.append("products")
    return [f"{name}: {before[name]} before, {found[name]} now" for name in worse]


# --- the sum --------------------------------------------------------------------------------------

#: Kernels of each part of a layer, forward and backward.
PARTS = {
    "compress": (("compress_forward", "compress_lse"), ("compress_delta", "compress_backward")),
    "selection": (("group_probabilities", "top_blocks"), ()),
    "fine": (
        ("fine_forward",),
        (
            *("fine_backward_q", "count_tokens", "place_tokens", "fine_backward_kv"),
            *("fine_sum_parts", "fine_sum_parts"),
        ),
    ),
    "sliding": (("sliding_forward", "sliding_lse"), ("sliding_delta", "sliding_backward")),
    "gates": (("gated_sum",), ("gated_sum_backward",)),
}
#: Milliseconds of each part before it had these kernels and tiles, by the same model (fine's
#: backward with its crowded columns): forward, backward.
BEFORE = {
    "compress": (18.0, 95.0),
    "selection": (475.0, 0.0),
    "fine": (32.0, 101.0),
    "sliding": (6.0, 24.0),
    "gates": (10.0, 20.0),
    "pooling": (3.0, 0.0),
}
#: What was said of each part before it was written: least and most.
PREDICTED = {
    "compress": ((14.0, 14.0), (35.0, 35.0)),
    "selection": ((7.0, 9.0), None),
    "fine": ((10.0, 16.0), (21.0, 21.0)),
    "sliding": ((4.5, 4.5), (11.0, 11.0)),
    "gates": ((1.2, 1.2), (5.0, 5.0)),
}
#: Dense attention of this shape by a kernel of FlashAttention 3's class, at its published speed.
DENSE = (138.0, 416.0)
#: What the census calls all that is in no part: to be added, and none of attention.
PROJECTIONS = "projections"
#: What the parts should take at most.
TARGETS = (60.0, 110.0)
#: Blocks of a tile: of tokens that all choose the same, in the mean, and that choose at random.
UNIONS = (16, paper.UNION, 55)


class Sum(NamedTuple):
    """Of one part in one direction, in milliseconds; around : what is no kernel's above.

    before, predicted : None of what had none; predicted : at least, and at most
    """

    part: str
    before: float | None
    predicted: tuple[float, float] | None
    optimistic: float
    expected: float
    floor: float
    around: float


def sums(
    kernels: Mapping[str, Mapping[str, Any]], union: float = paper.UNION
) -> dict[str, list[Sum]]:
    """Each part of the layer's attention, their sum, and then its projections, by direction.

    union : blocks of a tile of tokens, in the mean
    """
    around = around_kernels()
    found = {}
    for which, direction in enumerate(("forward", "backward")):
        rows = []
        for part in (*BEFORE, PROJECTIONS):
            names = PARTS.get(part, ((), ()))[which]
            optimistic, expected = (
                sum(
                    kernels[name]["estimate_ms"][end]
                    * (union / paper.UNION if name in paper.OF_TILES else 1)
                    for name in names
                )
                for end in ("optimistic", "expected")
            )
            floor = sum(kernels[name]["estimate_ms"]["floor"] for name in names)
            beside = around.get((direction, part), Around(0.0, 0.0))
            rows.append(
                Sum(
                    part,
                    BEFORE[part][which] if part in BEFORE else None,
                    PREDICTED[part][which] if part in PREDICTED else None,
                    optimistic + beside.estimate,
                    expected + beside.estimate,
                    floor + beside.floor,
                    beside.estimate,
                )
            )
        *parts, projections = rows
        of_all = (
            sum(getattr(part, name) for part in parts)
            for name in ("optimistic", "expected", "floor", "around")
        )
        before = sum(part.before or 0.0 for part in parts)
        found[direction] = [*parts, Sum("sum", before, None, *of_all), projections]
    return found


def dense_floors() -> tuple[float, float]:
    """Milliseconds of causal dense attention at the peak, forward and backward."""
    pairs = SIZES.kv_len * (SIZES.kv_len + 1) * HEADS  # twice: a product and a sum
    peak = SMS * CLOCK * OPERATIONS / 1e3
    forward, backward = HEAD_DIM + VALUE_DIM, 3 * HEAD_DIM + 2 * VALUE_DIM
    return pairs * forward / peak, pairs * backward / peak


class Around(NamedTuple):
    """Milliseconds of what runs beside the kernels; floor : of its products, at the peak."""

    estimate: float
    floor: float


def around_kernels() -> dict[tuple[str, str], Around]:
    """What runs beside the kernels, by direction and part: arithmetic.

    Bytes that `benchmarks.census` counts, at the speed of memory: lists, copies, pooling. Torch's
    own products, those of pooling's MLP and of the projections, take at least `OF_TORCH` of the
    peak. Rotary is none of PAPER's.
    """
    from benchmarks.census import census_of_layer

    peak = SMS * CLOCK * OPERATIONS
    found: dict[tuple[str, str], Around] = {}
    for (direction, part, kind), amounts in census_of_layer(SIZES.kv_len).counts.items():
        if kind != "FlexAttention" and not _is_ours(kind):
            before = found.get((direction, part), Around(0.0, 0.0))
            computing = amounts["operations"] / peak * 1e3
            takes = max(amounts["bytes"] / MEMORY * 1e3, computing / OF_TORCH)
            found[direction, part] = Around(before.estimate + takes, before.floor + computing)
    return found


def _is_ours(kind: str) -> bool:
    return any(kind in names for pair in PARTS.values() for names in pair)


def print_sums(kernels: Mapping[str, Mapping[str, Any]]) -> None:
    """The parts in each direction, and beside them what the sum depends on and is held against."""
    found = sums(kernels)
    of_unions = {union: sums(kernels, union) for union in UNIONS}
    for (direction, rows), target, dense, floor in zip(
        found.items(), TARGETS, DENSE, dense_floors()
    ):
        print(f"\n{direction}, ESTIMATES in ms; target {target:.0f}")
        print(
            f"{'':12}{'before':>8}{'predicted':>11}{'optimistic':>12}{'expected':>10}{'floor':>8}"
            "  of it around"
        )
        for row in rows:
            before = "" if row.before is None else f"{row.before:.0f}"
            print(
                f"{row.part:12}{before:>8}{_range(row.predicted):>11}{row.optimistic:12.1f}"
                f"{row.expected:10.1f}{row.floor:8.1f}{row.around:12.2f}"
            )
        for union, others in of_unions.items():
            *_, of_all, _ = others[direction]
            ends = f"{of_all.optimistic:.1f} to {of_all.expected:.1f}"
            print(f"the sum with {union} blocks of a tile of tokens: {ends}")
        print(f"dense attention: {dense:.0f} at a published speed, floor {floor:.0f}")


def _range(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else " to ".join(f"{end:g}" for end in dict.fromkeys(ends))


# --- what runs at all -----------------------------------------------------------------------------


class Shape(NamedTuple):
    """group : query heads of a kv head; block_size : tokens of a selection block"""

    dtype: str
    head_dim: int
    value_dim: int
    group: int = 16
    block_size: int = 64


SHAPES = [
    Shape("bfloat16", 192, 128),
    Shape("float16", 192, 128),
    Shape("float32", 192, 128),
    Shape("bfloat16", 64, 64),
    Shape("bfloat16", 128, 128),
    Shape("bfloat16", 256, 256),
    Shape("bfloat16", 192, 128, group=4),
    Shape("bfloat16", 192, 128, block_size=16),
    Shape("bfloat16", 192, 128, block_size=80),
    Shape("bfloat16", 192, 128, block_size=128),
    Shape("bfloat16", 256, 128, block_size=128),
    Shape("bfloat16", 192, 192, block_size=128),
    Shape("bfloat16", 192, 128, group=8),
    Shape("bfloat16", 192, 128, group=128),
    Shape("bfloat16", 256, 128, group=128),
    Shape("float16", 128, 128, group=8),
    Shape("float32", 64, 64, block_size=16),
    Shape("float32", 64, 64, block_size=32),
    Shape("bfloat16", 512, 512),
]
#: Of these FlexAttention's kernels are compiled with all that Inductor compiles in: where fine is
#: ours, and where it is not.
IN_EVERY_WAY = (Shape("bfloat16", 192, 128), Shape("bfloat16", 192, 128, group=4))
#: Switches that the selection's kernels compile in; they are compiled for the first shape.
OTHER_RULES = {
    "not causal": dataclasses.replace(PAPER, causal=False),
    "windows end at a stride": dataclasses.replace(PAPER, compress_alignment="end"),
    "own block extra": dataclasses.replace(PAPER, own_block_extra=True),
    "a choice for each head": dataclasses.replace(PAPER, share_selection=False),
}
#: Bytes of shared memory that a program may have on sm_90.
MOST_SHARED = 227 * 1024


def supported(shapes: list[Shape]) -> Iterator[dict[str, Any]]:
    """Of each shape, who serves it, or why nobody does, and what its kernels are compiled to."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = written(sorted({c for shape in shapes for c in _calls(shape)}), Path(folder))
    for shape in shapes:
        row: dict[str, Any] = shape._asdict()
        dtype = getattr(torch, shape.dtype)
        if refused := flex.why_no_tiles(dtype, shape.head_dim, shape.value_dim):
            yield row | {"refused": refused}
            continue
        launches = {
            f"{call.branch}_{which}{call.way and ', ' + call.way}": of_inductor(kernel, Work())
            for call in _calls(shape)
            for which, kernel in kernels[call].items()
        }
        ours = not _why_not_ours(shape)
        row["fine"] = "fine_kernels" if ours else "FlexAttention"
        launches |= _fine_launches(shape) if ours else {}
        row["selection"] = why_no_selection(shape) or "selection_kernels"
        launches |= own_launches(shape)
        yield row | {"kernels": {name: _compiled_row(each) for name, each in launches.items()}}


def _calls(shape: Shape) -> list[Call]:
    """What FlexAttention does."""
    dtype, head_dim, value_dim, group, block_size = shape
    if flex.why_no_tiles(getattr(torch, dtype), head_dim, value_dim):
        return []
    branches = ["compress", "sliding", *(["fine"] if _why_not_ours(shape) else [])]
    calls = [Call(each, dtype, head_dim, value_dim, group, 1, block_size) for each in branches]
    if shape in IN_EVERY_WAY:
        # compress and sliding have no choice
        calls += [
            call._replace(way=way)
            for way, each in COMPILED_IN.items()
            for call in calls
            if call.branch == "fine" or each.semantics.share_selection
        ]
    return calls


def _why_not_ours(shape: Shape) -> str:
    dtype, head_dim, value_dim, group, block_size = shape
    return fine_lists.why_not(
        getattr(torch, dtype),
        pairs=1,
        group=group,
        block_size=block_size,
        head_dim=head_dim,
        value_dim=value_dim,
    )


def _fine_launches(shape: Shape) -> dict[str, Launch]:
    fine = fine_kernels.constants(shape.head_dim, shape.value_dim, shape.block_size, shape.group)
    return {
        kernel.fn.__name__: _launch(kernel, getattr(torch, shape.dtype), constants, options, Work())
        for kernel, constants, options in _fine_rows(fine)
    }


def _sizes(shape: Shape) -> Sizes:
    block_size = shape.block_size
    return SIZES._replace(block_size=block_size, num_blocks=SIZES.kv_len // block_size)


def why_no_selection(shape: Shape) -> str:
    q = torch.empty(1, shape.group, 1, shape.head_dim, dtype=getattr(torch, shape.dtype))
    return why_not_in_triton(q, shape.group, _sizes(shape))


def own_launches(shape: Shape) -> dict[str, Launch]:
    """The kernels of selection, gates and rotary, as they are launched for a shape."""
    dtype, head_dim, value_dim, group, _ = shape
    heads, kind = KV_HEADS * group, getattr(torch, dtype)
    gates = gate_kernels.constants(heads, value_dim)
    rotary = rotary_kernels.constants(heads, head_dim)
    rows: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (gate_kernels.gated_sum, gates, {}),
        (gate_kernels.gated_sum_backward, gates, {}),
        (rotary_kernels.turned_pairs, rotary | {"BACK": False}, {}),
    ]
    found = {
        kernel.fn.__name__: _launch(kernel, kind, constants, options, Work())
        for kernel, constants, options in rows
    }
    if not why_no_selection(shape):
        found |= _selection_launches(shape, PAPER)
        for rule, semantics in OTHER_RULES.items() if shape == SHAPES[0] else ():
            others = _selection_launches(shape, semantics)
            found |= {f"{name}, {rule}": launch for name, launch in others.items()}
    return found


def _selection_launches(shape: Shape, semantics: Semantics) -> dict[str, Launch]:
    """The selection's kernels, with the switches that they compile in."""
    heads = KV_HEADS if semantics.share_selection else KV_HEADS * shape.group
    sizes, kind = _sizes(shape), getattr(torch, shape.dtype)
    sizes = sizes._replace(windows=sizes.windows._replace(semantics=semantics))
    seen = {"STRIDE": sizes.windows.stride, "CAUSAL": semantics.causal}
    product = seen | selection_kernels.product_constants(
        kind,
        shape.head_dim,
        heads=heads,
        kv_heads=KV_HEADS,
        group=KV_HEADS * shape.group // heads,
    )
    choice = seen | selection_kernels.choice_constants(sizes, sizes.num_selected)
    rows = [
        (selection_kernels.row_lse, product, selection_kernels.PRODUCT_OPTIONS),
        (selection_kernels.group_probabilities, product, selection_kernels.PRODUCT_OPTIONS),
        (selection_kernels.top_blocks, choice, selection_kernels.CHOICE_OPTIONS),
    ]
    return {
        kernel.fn.__name__: _launch(kernel, kind, constants, options, Work())
        for kernel, constants, options in rows
    }


def _compiled_row(launch: Launch) -> dict[str, Any]:
    facts = compiled_for_sm90(launch)
    assert facts["shared"] <= MOST_SHARED, facts
    kept = ("registers", "stack", "spills", "shared", "loops", "products")
    return {name: facts[name] for name in kept}


def print_supported(row: dict[str, Any]) -> None:
    print(*(row[name] for name in Shape._fields), row.get("refused") or "fine by " + row["fine"])
    for name, facts in row.get("kernels", {}).items():
        print("  ", name, ", ".join(f"{what} {value}" for what, value in facts.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--supported", action="store_true", help="which dtypes and sizes run, each compiled"
    )
    given = parser.parse_args()
    if given.supported:
        rows = []
        for row in supported(SHAPES):
            print_supported(row)
            rows.append(row)
        report = {"device": "none; for sm_90", "versions": versions(), "shapes": rows}
        (given.output or SUPPORTED).write_text(json.dumps(report, indent=1) + "\n")
        return
    every = launches() | flex_launches()
    kernels = {name: compiled_for_sm90(launch) for name, launch in every.items()}
    for name, facts in kernels.items():
        print(name, ", ".join(f"{what} {value}" for what, value in facts.items()))
    in_float16 = {
        name: compiled_for_sm90(launch) for name, launch in launches(torch.float16).items()
    }
    report = {
        "device": "none; for sm_90",
        "versions": versions(),
        "kernels": kernels,
        "kernels in float16": in_float16,
    }
    (given.output or KEPT).write_text(json.dumps(report, indent=1) + "\n")
    print_sums(kernels)


if __name__ == "__main__":
    main()
