"""What sm_90 makes of Triton kernels, without a GPU: python -m benchmarks.sm90

Triton's wheel carries ptxas and the disassemblers of CUDA. Each kernel is compiled for sm_90 as it
is launched at the paper's shape (64 query heads, 4 kv heads, head_dim 192, l 32, d 16, l' 64, n 16,
bfloat16), and what can be read from the machine code is printed and written as JSON: registers,
stack, spills, shared memory, how products are computed, and how long loops are.

Nothing runs. The times at 64k tokens are ESTIMATES, of a model of an H200 with the constants below:

    optimistic   the time of the busiest unit alone: tensor cores, instructions, exponentials,
                 shared memory, the L2 cache, or memory
    expected     at least that, and one program's time, instruction after instruction, over the
                 programs that fit on an SM
    floor        the products that are needed, at the peak of the tensor cores
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nsa_fast import fine_kernels, fine_lists, gate_kernels, selection_kernels
from nsa_fast.selection import Sizes
from nsa_fast.windows import Windows
from nsa_ref.semantics import PAPER
from nsa_ref.testing.loading import versions

RESULTS = Path(__file__).parent / "results"
#: One for each version of Triton, which decides what becomes of a kernel.
KEPT = RESULTS / f"sm90-triton-{'.'.join(triton.__version__.split('.')[:2])}.json"
TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: Opcodes of products on tensor cores: those of a group of four warps, and those of one warp.
PRODUCTS = {"HGMMA": "wgmma", "HMMA": "mma.sync"}


#: Of an H200: SMs, clocks a second, and of one SM in a clock the operations of tensor cores in 16
#: bits (989 TFLOP/s in all), exponentials, and bytes from shared memory.
SMS, CLOCK, OPERATIONS, EXPONENTIALS, SHARED_BYTES = 132, 1.83e9, 4096, 16, 128
#: Bytes a second from the L2 cache (published for an H100; the least certain), and from memory.
L2, MEMORY = 5.5e12, 4.3e12
#: Clocks of an instruction in a program by itself, and of a step for which a warp waits.
CLOCKS, WAIT = 1.2, 20
#: Registers, and bytes of shared memory with those that a program reserves, of an SM.
REGISTERS, SHARED, RESERVED = 65536, 228 * 1024, 1024


class Work(NamedTuple):
    """What a kernel does at 64k tokens.

    iterations : of its largest loop, in all programs; 0 where memory alone takes time
    l2_bytes : read in one of them
    memory_bytes : read and written in all
    operations : of the products that are needed, in all
    """

    iterations: float = 0
    l2_bytes: float = 0
    memory_bytes: float = 0
    operations: float = 0


class Launch(NamedTuple):
    """A kernel as it is launched.

    types : of the arguments that are not compiled in, "*bf16", "i32" and so on
    aligned : those that are multiples of 16; pointers are, as torch allocates them
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Collection[str] = ()
    num_warps: int = 4
    num_stages: int = 2
    work: Work = Work()


class Instruction(NamedTuple):
    """target : of a branch; columns : of a product of 64 rows and 16 in between"""

    address: int
    opcode: str
    target: int | None
    columns: int


def compiled_for_sm90(launch: Launch) -> dict[str, Any]:
    """What is read from the machine code of one kernel.

    ::

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
        if signature[name].startswith("*") or name in launch.aligned
    ]
    made = triton.compile(
        ASTSource(
            launch.kernel,
            signature,
            {(names.index(name),): value for name, value in launch.constants.items()},
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
        "registers": registers,
        "stack": _number("STACK", usage),
        "spills": sum(opcode in ("LDL", "STL") for opcode in opcodes),
        "shared": shared,
        "products": "+".join(sorted(kinds)) or "none",
        "instructions": len(instructions),
        "loops": [len(loop) for loop in loops],
        "programs": programs,
        "estimate_ms": _estimate(launch, max(loops, key=len, default=[]), programs),
    }


def _programs(registers: int, shared: int, warps: int) -> int:
    """How many fit on an SM; a warp's registers are allocated by 256."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, SHARED // (shared + RESERVED), 64 // warps, 32)


def _estimate(launch: Launch, loop: list[Instruction], programs: int) -> dict[str, float]:
    """Milliseconds by the model at the top of this file."""
    work, warps = launch.work, launch.num_warps
    count = Counter(each.opcode for each in loop)
    moved = count["LDS"] + count["STS"] + 4 * (count["LDSM"] + count["STSM"] + count["LDGSTS"])
    products = sum(64 * 16 * 2 * each.columns for each in loop) / OPERATIONS * warps / 4
    units = (
        products,
        len(loop) * warps / 4,  # four schedulers
        32 * count["MUFU"] * warps / EXPONENTIALS,
        32 * 4 * moved * warps / SHARED_BYTES,
        work.l2_bytes / (L2 / SMS / CLOCK),
    )
    # the warps of a program beyond four run beside the others, a little better packed
    beside = 1 if warps <= 4 else 0.8 * warps / 4
    waits = count["BAR"] + count["SHFL"] + count["LDS"]
    serial = products + CLOCKS * beside * len(loop) + WAIT * waits
    each_clock = work.iterations / SMS / CLOCK * 1e3
    memory = work.memory_bytes / MEMORY * 1e3
    optimistic = max(memory, each_clock * max(units))
    return {
        "optimistic": round(optimistic, 2),
        "expected": round(max(optimistic, each_clock * serial / programs), 2),
        "floor": round(work.operations / (OPERATIONS * CLOCK * SMS) * 1e3, 2),
    }


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


# --- the kernels ----------------------------------------------------------------------------------

#: Where kernels are started.
MODULES = ("selection_kernels", "fine_kernels", "gate_kernels")

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 64, 4, 192, 128
SIZES = Sizes(
    kv_len=65536,
    windows=Windows(32, 16, PAPER),
    num_windows=4095,
    block_size=64,
    num_blocks=1024,
    num_selected=16,
    num_initial=1,
    num_local=2,
)


#: Blocks of a tile of 4 tokens, in the mean. It depends on what is chosen: 16 if all choose the
#: same, some 55 if they choose at random.
UNION = 24


def launches(dtype: torch.dtype = torch.bfloat16) -> dict[str, Launch]:
    """Every kernel by name, as it is launched at the paper's shape."""
    product = selection_kernels.product_constants(
        dtype, HEAD_DIM, heads=KV_HEADS, kv_heads=KV_HEADS, group=HEADS // KV_HEADS
    )
    choice = selection_kernels.choice_constants(SIZES, SIZES.num_selected)
    seen = {"STRIDE": SIZES.windows.stride, "CAUSAL": True}
    fine = fine_kernels.constants(HEAD_DIM, VALUE_DIM, SIZES.block_size, HEADS // KV_HEADS)
    part = {"PART": fine_lists.PART}
    summed = {key: fine[key] for key in ("BLOCK", "COLUMNS", "D")} | {"DP": 256}
    gates = gate_kernels.constants(HEADS, VALUE_DIM)
    rows = [
        (selection_kernels.row_lse, product | seen, selection_kernels.PRODUCT_OPTIONS),
        (selection_kernels.group_probabilities, product | seen, selection_kernels.PRODUCT_OPTIONS),
        (selection_kernels.top_blocks, choice | seen, selection_kernels.CHOICE_OPTIONS),
        (fine_kernels.fine_forward, fine, fine_kernels.OPTIONS),
        (fine_kernels.fine_backward_q, fine, fine_kernels.OPTIONS),
        (fine_kernels.fine_backward_kv, fine | part, fine_kernels.KV_OPTIONS),
        (fine_kernels.fine_sum_parts, summed, fine_kernels.SUM_OPTIONS),
        (gate_kernels.gated_sum, gates, {}),
        (gate_kernels.gated_sum_backward, gates, {}),
    ]
    found = {}
    for kernel, constants, options in rows:
        types = {name: _type(name, dtype) for name in kernel.arg_names if name not in constants}
        aligned = [name for name in types if STRIDE.fullmatch(name)]
        name = kernel.fn.__name__
        found[name] = Launch(
            kernel, types, constants, aligned, **options, work=_work()[name](constants)
        )
    return found


def _work() -> dict[str, Callable[[Mapping[str, Any]], Work]]:
    """What each kernel does with 64k tokens, from what it compiles in."""
    tokens, group, n, block = SIZES.kv_len, HEADS // KV_HEADS, SIZES.num_selected, SIZES.block_size
    tile_of = tokens * KV_HEADS  # over T, the tiles
    windows = (SIZES.num_windows + 1) / 2  # that a token sees, in the mean
    wide = HEAD_DIM + VALUE_DIM
    pairs = tokens * HEADS * n * block  # of a row and a key that it reads
    branch = 2 * tokens * HEADS * VALUE_DIM  # bytes of its output
    parts = 4 * wide * block * (tile_of * n / fine_lists.PART + SIZES.num_blocks * KV_HEADS)

    def of_windows(c: Mapping[str, Any]) -> Work:
        return Work(
            tile_of / c["T"] * windows / c["BW"],
            2 * c["BW"] * HEAD_DIM,
            4 * tile_of * windows,
            2 * tokens * HEADS * windows * HEAD_DIM,
        )

    def of_tiles(c: Mapping[str, Any], operations: float) -> Work:
        return Work(tile_of / c["T"] * UNION, 2 * block * wide, operations=pairs * operations)

    return {
        "row_lse": of_windows,
        "group_probabilities": of_windows,
        "top_blocks": lambda c: Work(
            tile_of / c["R"] * (SIZES.num_blocks / c["B"] + 1) / 2,
            memory_bytes=4 * tile_of * windows,
        ),
        "fine_forward": lambda c: of_tiles(c, 2 * wide),
        "fine_backward_q": lambda c: of_tiles(c, 2 * (wide + HEAD_DIM)),
        "fine_backward_kv": lambda c: Work(
            tile_of * n / c["T"], 2 * c["T"] * group * wide, parts, pairs * 4 * wide
        ),
        "fine_sum_parts": lambda c: Work(memory_bytes=parts * c["D"] / wide),
        "gated_sum": lambda c: Work(memory_bytes=4 * branch),
        "gated_sum_backward": lambda c: Work(memory_bytes=7 * branch),
    }


#: Arguments that are no integers -> their types; of all others that are pointers, the dtype's.
TYPES = {
    "*fp32": ("lse", "d_lse", "delta", "p", "dk_parts", "dv_parts", "x_parts"),
    "*i32": ("entries", "counts", "token_lists", "starts", "part_block", "part_ends"),
    "*i64": ("chosen",),
    "fp32": ("scale", "scale_log2", "forced_score", "floor", "factor"),
}
TENSORS = re.compile(r"d?[qkvx]\d?|k_cmp|columns|d?_?out|d?_?logits")
STRIDE = re.compile(r"\w_(batch|head|token|window|pair)|(batch|head|token)\d")


def _type(name: str, dtype: torch.dtype) -> str:
    """What an argument is to Triton, by its name."""
    for found, names in TYPES.items():
        if name in names:
            return found
    number = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    return number if TENSORS.fullmatch(name) else "i32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=KEPT)
    output = parser.parse_args().output
    kernels = {name: compiled_for_sm90(launch) for name, launch in launches().items()}
    for name, facts in kernels.items():
        print(name, ", ".join(f"{what} {value}" for what, value in facts.items()))
    report = {"device": "none; for sm_90", "versions": versions(), "kernels": kernels}
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
