"""The Triton kernels that Inductor writes for FlexAttention, as nsa_fast asks it to.

    python -m benchmarks.flex_sources FOLDER '[["sliding", "bfloat16", 192, 128, 64, 4, 64, ""]]'

Needs no GPU: Triton's interpreter stands for one (`nsa_fast/interpreter.py`), and no kernel is run.
A process of its own writes the sources (`write`), because under the interpreter nothing can be
compiled; the process that asked then reads them as kernels (`read`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from nsa_ref.semantics import PAPER, Semantics

#: Tokens of the keys.
LENGTH = 512


class Way(NamedTuple):
    """How a branch is called: by which rules, and with which tensors.

    memory : columns of memory before the compressed blocks
    head_major : a head's tokens side by side, not a token's heads, as a projection leaves them
    """

    semantics: Semantics = PAPER
    memory: int = 0
    q_len: int = LENGTH
    batch: int = 1
    gradients: bool = True
    head_major: bool = False


#: Rules and lengths: a mask captures them as tensors, so that none is compiled in.
CAPTURED = {
    "not causal": Way(dataclasses.replace(PAPER, causal=False, window_closed=False)),
    "other places": Way(
        dataclasses.replace(PAPER, compress_alignment="end"), memory=4, q_len=LENGTH - 100
    ),
}
#: What Inductor does compile in, beside dtype, heads, dims and the blocks of the mask.
COMPILED_IN = {
    "without gradients": Way(gradients=False),
    "a batch": Way(batch=2),
    "q by heads": Way(head_major=True),
    "a choice for each head": Way(dataclasses.replace(PAPER, share_selection=False)),
}
WAYS = {"": Way()} | CAPTURED | COMPILED_IN


class Call(NamedTuple):
    """A branch's forward and backward, as FlexAttention computes them.

    way : one of `WAYS`
    """

    branch: str
    dtype: str
    head_dim: int
    value_dim: int
    heads: int
    kv_heads: int
    block_size: int
    way: str = ""

    @property
    def name(self) -> str:
        return "_".join(str(part) for part in self).replace(" ", "_")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Of `KERNELS`, those that it launches."""
        return KERNELS if WAYS[self.way].gradients else ("forward", "lse")


#: What Inductor writes beside FlexAttention's templates: lse in natural units, and delta.
BESIDE = {"pointwise": "lse", "reduction": "delta", "persistent_reduction": "delta"}
KERNELS = ("forward", "backward", "lse", "delta")
#: Of an H200, by which Inductor chooses their blocks.
DEVICE = (
    "DeviceProperties(type='cuda', index=0, multi_processor_count=132, cc=90, major=9, "
    "regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, "
    "max_threads_per_block=1024, warp_size=32)"
)


class Written(NamedTuple):
    """A kernel that Inductor has written.

    signature : argument -> its type, "constexpr" if it is compiled in
    constants : argument -> what is compiled in
    aligned : arguments that are multiples of 16
    tile : BLOCK_M, BLOCK_N and so on
    source : what it computes, without the name that Inductor numbers
    """

    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    num_warps: int
    num_stages: int
    tile: dict[str, int]
    source: str


def written(calls: list[Call], folder: Path) -> dict[Call, dict[str, Written]]:
    """For every call its kernels, by KERNELS."""
    from nsa_fast import interpreter

    if reason := interpreter.missing():
        raise RuntimeError(f"Inductor's sources need Triton's interpreter, and {reason}.")
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.flex_sources",
            str(folder),
            json.dumps(calls),
        ],
        check=True,
        env=os.environ | interpreter.ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(folder)},
    )
    return {
        call: {
            which: (_read_beside if which in BESIDE.values() else _read)(
                folder / f"{call.name}_{which}.py"
            )
            for which in call.kernels
        }
        for call in calls
    }


def _read_beside(path: Path) -> Written:
    """In the first of the blocks among which Inductor chooses by running them."""
    (kernel,) = (x for x in vars(_module(path)).values() if hasattr(x, "triton_meta"))
    config = kernel.configs[0]
    warps, stages, tile = config.num_warps, config.num_stages, dict(config.kwargs)
    return _written(path, kernel.fn, kernel.triton_meta, warps, stages, tile)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(path: Path) -> Written:
    from torch._inductor.runtime import triton_heuristics

    found: list[tuple[Any, dict[str, Any]]] = []

    def template(**given: Any) -> Any:
        return lambda function: found.append((function, given)) or function

    with mock.patch.object(triton_heuristics, "template", template):
        _module(path)
    ((function, given),) = found
    sizes = given["inductor_meta"]["config_args"].items()
    tile = {name: size for name, size in sizes if name.startswith("BLOCK_")}
    warps, stages = given["num_warps"], given["num_stages"]
    return _written(path, function, given["triton_meta"], warps, stages, tile)


def _written(
    path: Path, function: Any, meta: dict[str, Any], warps: int, stages: int, tile: dict[str, int]
) -> Written:
    signature = dict(meta["signature"])
    names = list(signature)
    (config,) = meta["configs"]
    aligned = [names[place] for (place,) in dict(config)]
    # with the functions below it that it calls
    _, source = path.read_text().split(f"def {function.__name__}", 1)
    return Written(
        function, signature, dict(meta["constants"]), aligned, warps, stages, tile, source
    )


# --- in a process of its own ----------------------------------------------------------------------


def _write(folder: Path, calls: list[Call]) -> None:
    from nsa_fast import interpreter

    interpreter.install()
    import torch.compiler.config
    from torch._inductor.async_compile import AsyncCompile

    torch.compiler.config.force_disable_caches = True
    call: Call

    def keep(self: Any, kernel: str, source: str, device_str: str = "cuda") -> Any:
        (kind,) = re.findall(r"@triton_heuristics\.(\w+)", source)
        which = BESIDE.get(kind) or ("backward" if "arg_DQ" in source else "forward")
        source = re.sub(r"DeviceProperties\(type='cpu'[^)]*\)", DEVICE, source)
        (folder / f"{call.name}_{which}.py").write_text(source)
        return SimpleNamespace(run=lambda *args, **kwargs: None)

    with mock.patch.object(AsyncCompile, "triton", keep):
        for call in calls:
            _run(call)


def _run(call: Call) -> None:
    import torch

    import nsa_fast

    torch._dynamo.reset()
    semantics, memory, q_len, batch, gradients, head_major = WAYS[call.way]
    sizes = {"compress_block_size": 32, "compress_block_sliding_stride": 16}

    def tensor(length: int, heads: int, dim: int) -> Any:
        found = torch.randn(batch, length, heads, dim, dtype=getattr(torch, call.dtype))
        found = found.transpose(1, 2)  # as a projection leaves it: a token's heads side by side
        return (found.contiguous() if head_major else found).requires_grad_(gradients)

    q = tensor(q_len, call.heads, call.head_dim)
    k, v = (tensor(LENGTH, call.kv_heads, dim) for dim in (call.head_dim, call.value_dim))
    rules: dict[str, Any] = {"semantics": semantics, "backend": "compiled"}
    if call.branch == "sliding":
        found = nsa_fast.sliding_attention(q, k, v, sliding_window_size=128, **rules)
    elif call.branch == "compress":
        of_memory = [tensor(memory, call.kv_heads, x.shape[3]) for x in (k, v) if memory]
        k, v = (
            nsa_fast.compress_pool(x.detach(), semantics=semantics, **sizes).requires_grad_(
                gradients
            )
            for x in (k, v)
        )
        found = nsa_fast.compress_attention(q, k, v, *of_memory, kv_len=LENGTH, **sizes, **rules)
    else:
        own = torch.arange(LENGTH - q_len, LENGTH) // call.block_size
        heads = call.kv_heads if semantics.share_selection else call.heads
        found = nsa_fast.fine_attention(
            q,
            k,
            v,
            torch.stack([own * 0, own], -1).expand(batch, heads, -1, -1),
            selection_block_size=call.block_size,
            **rules,
        )
    if gradients:
        torch.autograd.grad(found.out.sum(), (q, k, v))


if __name__ == "__main__":
    _write(Path(sys.argv[1]), [Call(*call) for call in json.loads(sys.argv[2])])
