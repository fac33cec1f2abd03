"""The Triton kernels that Inductor writes for FlexAttention, as nsa_fast asks it to.

    python -m benchmarks.flex_sources FOLDER '[["sliding", "bfloat16", 192, 128, 64, 4, 64], ...]'

Needs no GPU: Triton's interpreter stands for one (`nsa_fast/interpreter.py`), and no kernel is run.
A process of its own writes the sources (`write`), because under the interpreter nothing can be
compiled; the process that asked then reads them as kernels (`read`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock


class Call(NamedTuple):
    """A branch's forward and backward, as FlexAttention computes them."""

    branch: str
    dtype: str
    head_dim: int
    value_dim: int
    heads: int
    kv_heads: int
    block_size: int

    @property
    def name(self) -> str:
        return "_".join(str(part) for part in self)


class Written(NamedTuple):
    """A kernel that Inductor has written.

    signature : argument -> its type, "constexpr" if it is compiled in
    constants : argument -> what is compiled in
    aligned : arguments that are multiples of 16
    tile : BLOCK_M, BLOCK_N and so on
    """

    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    num_warps: int
    num_stages: int
    tile: dict[str, int]


def written(calls: list[Call], folder: Path) -> dict[Call, dict[str, Written]]:
    """For every call its kernels, "forward" and "backward"."""
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
            which: _read(folder / f"{call.name}_{which}.py") for which in ("forward", "backward")
        }
        for call in calls
    }


def _read(path: Path) -> Written:
    from torch._inductor.runtime import triton_heuristics

    found: list[tuple[Any, dict[str, Any]]] = []

    def template(**given: Any) -> Any:
        return lambda function: found.append((function, given)) or function

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    with mock.patch.object(triton_heuristics, "template", template):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    ((function, given),) = found
    meta = given["triton_meta"]
    signature = dict(meta["signature"])
    names = list(signature)
    (config,) = meta["configs"]
    return Written(
        function,
        signature,
        dict(meta["constants"]),
        [names[place] for (place,) in dict(config)],
        given["num_warps"],
        given["num_stages"],
        {
            name: size
            for name, size in given["inductor_meta"]["config_args"].items()
            if name.startswith("BLOCK_")
        },
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
        if "triton_heuristics.template" in source:
            which = "backward" if "arg_DQ" in source else "forward"
            (folder / f"{call.name}_{which}.py").write_text(source)
        return SimpleNamespace(run=lambda *args, **kwargs: None)

    with mock.patch.object(AsyncCompile, "triton", keep):
        for call in calls:
            _run(call)


def _run(call: Call) -> None:
    import torch

    import nsa_fast

    torch._dynamo.reset()
    length, sizes = 512, {"compress_block_size": 32, "compress_block_sliding_stride": 16}
    q, k, v = (
        # as a projection leaves them: the heads of a token side by side
        torch.randn(1, length, heads, dim, dtype=getattr(torch, call.dtype))
        .transpose(1, 2)
        .requires_grad_()
        for heads, dim in (
            (call.heads, call.head_dim),
            (call.kv_heads, call.head_dim),
            (call.kv_heads, call.value_dim),
        )
    )
    if call.branch == "sliding":
        found = nsa_fast.sliding_attention(q, k, v, sliding_window_size=128, backend="compiled")
    elif call.branch == "compress":
        k, v = (nsa_fast.compress_pool(x.detach(), **sizes).requires_grad_() for x in (k, v))
        found = nsa_fast.compress_attention(q, k, v, kv_len=length, backend="compiled", **sizes)
    else:
        own = torch.arange(length) // call.block_size
        found = nsa_fast.fine_attention(
            q,
            k,
            v,
            torch.stack([own * 0, own], -1).expand(1, call.kv_heads, -1, -1),
            selection_block_size=call.block_size,
            backend="compiled",
        )
    torch.autograd.grad(found.out.sum(), (q, k, v))


if __name__ == "__main__":
    _write(Path(sys.argv[1]), [Call(*call) for call in json.loads(sys.argv[2])])
