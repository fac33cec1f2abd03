"""What sm_90 makes of Triton kernels, without a GPU: python -m benchmarks.sm90

Triton's wheel carries ptxas and the disassemblers of CUDA. Each kernel is compiled for sm_90 as it
is launched at the paper's shape (64 query heads, 4 kv heads, head_dim 192, l 32, d 16, l' 64, n 16,
bfloat16), and what can be read from the machine code is printed and written as JSON: registers,
stack, spills, shared memory, how products are computed, and how long loops are. Nothing runs, so
this is no measure of speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
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


class Instruction(NamedTuple):
    address: int
    opcode: str
    target: int | None


def compiled_for_sm90(launch: Launch) -> dict[str, Any]:
    """What is read from the machine code of one kernel.

    ::

        registers, stack   of a thread, stack in bytes
        spills             instructions that load from or store to local memory
        shared             bytes of shared memory of a program
        products           "wgmma", "mma.sync" or "none"
        instructions       all of them, and of every loop, the outermost of those that overlap
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
    return {
        "registers": _number("REG", usage),
        "stack": _number("STACK", usage),
        "spills": sum(opcode in ("LDL", "STL") for opcode in opcodes),
        "shared": made.metadata.shared,
        "products": "+".join(sorted(kinds)) or "none",
        "instructions": len(instructions),
        "loops": _loops(instructions),
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
        found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None))
    return found


def _loops(instructions: list[Instruction]) -> list[int]:
    """Instructions of each loop: from a branch's target back to the last branch that goes there."""
    ends: dict[int, int] = {}
    for each in instructions:
        if each.target is not None and each.target < each.address:
            ends[each.target] = max(each.address, ends.get(each.target, 0))
    return [
        sum(start <= each.address <= end for each in instructions)
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
        found[kernel.fn.__name__] = Launch(kernel, types, constants, aligned, **options)
    return found


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
    report = {"versions": versions(), "kernels": kernels}
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
