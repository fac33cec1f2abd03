"""What the error bounds assume of the hardware, measured: python -m benchmarks.hardware_constants

Prints one line a constant and writes them, with the device's name and the versions, as JSON. The
rows of `nsa_ref.numerics.NUMERICS` stand on them; beside each stands what they assume.

With --device interpreter the same kernels run in Triton's interpreter, on a CPU: that shows that
the script works, and says nothing about hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--output", type=Path, help="default: a file in benchmarks/results/")
    parser.add_argument("--size", type=int, default=2**22, help="arguments of exp2 and of log2")
    return parser.parse_args()


ARGUMENTS = _arguments()
if ARGUMENTS.device == "interpreter":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
try:
    import triton
    from triton import language as tl
except ImportError:
    sys.exit("triton is not installed here, and this script is about its kernels")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from nsa_fast import interpreter, sliding_attention  # noqa: E402
from nsa_ref.testing.devices import device_of  # noqa: E402
from nsa_ref.testing.loading import versions  # noqa: E402

RESULTS = Path(__file__).parent / "results"
U = 2.0**-24
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.half}


@triton.jit
def exp2_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.math.exp2(tl.load(x + i)))


@triton.jit
def log2_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.math.log2(tl.load(x + i)))


@triton.jit
def dot_kernel(
    a, b, c, SIZE: tl.constexpr, STEPS: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """c (SIZE, SIZE) += a @ b, K columns of a at a time, as flash kernels do."""
    i, k = tl.arange(0, SIZE), tl.arange(0, K)
    total = tl.load(c + i[:, None] * SIZE + i[None, :])
    for step in tl.static_range(STEPS):
        left = tl.load(a + i[:, None] * (STEPS * K) + step * K + k[None, :])
        right = tl.load(b + (step * K + k[:, None]) * SIZE + i[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + i[:, None] * SIZE + i[None, :], total)


def elementwise(kernel: Any, x: np.ndarray, device: str) -> np.ndarray:
    """float32 in, what the kernel gives out, float64."""
    block = 1024
    padded = np.resize(x, -(-x.size // block) * block)
    source = torch.from_numpy(padded).to(device)
    target = torch.empty_like(source)
    kernel[(padded.size // block,)](source, target, BLOCK=block)
    return target.cpu().numpy()[: x.size].astype(np.float64)


def dot(row: str, a: np.ndarray, b: np.ndarray, start: float, device: str) -> np.ndarray:
    """start + a @ b as the matrix units add it up, (SIZE, SIZE) float64; K = 16 at a time."""
    left, right = (torch.from_numpy(x).to(device, DTYPES[row]).contiguous() for x in (a, b))
    size = len(a)
    total = torch.full((size, size), start, dtype=torch.float32, device=device)
    precision = "tf32" if row == "tf32" else "ieee"
    steps = a.shape[1] // 16
    dot_kernel[(1,)](left, right, total, SIZE=size, STEPS=steps, K=16, PRECISION=precision)
    return total.cpu().numpy().astype(np.float64)


def one_product(row: str, size: int, x: float, y: float, start: float, device: str) -> float:
    """start + x y."""
    a, b = np.zeros((size, 16)), np.zeros((16, size))
    a[:, 0], b[0] = x, y
    return float(dot(row, a, b, start, device)[0, 0])


def functions(device: str, size: int) -> dict[str, Any]:
    """exp2 and log2 against float64."""
    rng = np.random.default_rng(0)
    # what a softmax asks for: differences to the maximum, and sums from 1 on
    x = np.concatenate([-rng.random(size) * 126, -np.exp(-rng.random(size) * 40)])
    x = x.astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    exp2 = np.abs(elementwise(exp2_kernel, x, device) / exact - 1).max()
    y = np.exp2(rng.random(2 * size) * 16).astype(np.float32)
    log2 = elementwise(log2_kernel, y, device)
    exact = np.log2(y.astype(np.float64))
    return {
        "exp2(0)": float(elementwise(exp2_kernel, np.zeros(1, np.float32), device)[0]),
        "exp2, relative error in units of 2^-24": exp2 / U,
        "log2, absolute error where log2 < 1, in units of 2^-22": float(
            np.abs(log2 - exact)[exact < 1].max() / 2**-22
        ),
        "log2, relative error where log2 > 1, in units of 2^-24": float(
            (np.abs(log2 - exact) / np.maximum(exact, 1))[exact > 1].max() / U
        ),
    }


def accumulation(row: str, size: int, device: str) -> dict[str, Any]:
    """How the matrix units add. Tiles of 64 rows and more are other instructions on sm_90."""
    rng = np.random.default_rng(1)
    steps = 32
    a, b = rng.random((size, 16 * steps)) + 0.5, rng.random((16 * steps, size)) + 0.5
    a, b = (torch.from_numpy(x).to(DTYPES[row]).double().numpy() for x in (a, b))
    if row == "tf32":
        # operands of 11 bits, which are read as they are
        a, b = (np.round(x * 2**10) / 2**10 for x in (a, b))
    found, exact = dot(row, a, b, 0.0, device), a @ b
    error = (found - exact) / exact / U
    small = one_product(row, size, 1.5 * 2.0**-12, 2.0**-12, 1.0, device)
    many = np.full((size, 16), 2.0**-12)
    together = float(dot(row, many, many.T, 1.0, device)[0, 0])
    return {
        "1 + 0.75 x 2^-23, in units of 2^-23 above 1 (nearest 1, truncated 0)": (small - 1)
        / 2**-23,
        "1 + 16 x 2^-24, in units of 2^-23 above 1 (exact 8)": (together - 1) / 2**-23,
        f"{16 * steps} positive products, largest error in units of 2^-24": np.abs(error).max(),
        f"{16 * steps} positive products, mean error in units of 2^-24": error.mean(),
    }


def delta(dtype: torch.dtype, device: str) -> str:
    """In which dtype FlexAttention's backward keeps delta = dO . O.

    A row that sees one key has dP = delta, and so no dq. With v = (1, e), dO = (1, 1) both are
    1 + e, which the dtype cannot hold if e is small: rounded, delta differs, and dq shows it.
    """
    e = {torch.bfloat16: 2.0**-9, torch.half: 2.0**-12}[dtype]
    q = torch.ones(1, 1, 32, 16, dtype=dtype, device=device, requires_grad=True)
    k = torch.ones_like(q, requires_grad=True)
    v = torch.zeros_like(q)
    v[..., 0], v[..., 1] = 1.0, e
    v.requires_grad_()
    out = sliding_attention(q, k, v, sliding_window_size=0, backend="compiled").out
    d_out = torch.zeros_like(out)
    d_out[..., :2] = 1.0
    out.backward(d_out)
    assert q.grad is not None
    return "float32" if not q.grad.any() else "the dtype of the inputs"


def main() -> None:
    device = ARGUMENTS.device
    if device == "interpreter":
        interpreter.install()
        device = "cpu"
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU here. Try --device interpreter, which shows how the script works")
    rows = ("fp32", "tf32", "bf16", "fp16")
    if device == "cpu":
        rows = ("fp32", "bf16")  # what the interpreter computes as a GPU would
    measured: dict[str, Any] = {"functions": functions(device, ARGUMENTS.size)}
    measured |= {
        f"accumulation, {row}, tiles of {size}": accumulation(row, size, device)
        for row in rows
        for size in (16, 64)
    }
    if "tf32" in rows:
        read = one_product("tf32", 16, 1 + 0.75 * 2.0**-10, 1.0, 0.0, device)
        measured["tf32 operands"] = "truncated" if read == 1 else "rounded to nearest"
    halves = (
        {"bf16": torch.bfloat16}
        if device == "cpu"
        else {"bf16": torch.bfloat16, "fp16": torch.half}
    )
    measured["delta is kept in"] = {row: delta(dtype, device) for row, dtype in halves.items()}
    name = device_of(device).describe() or "Triton's interpreter (no hardware)"
    report = {"device": name, "versions": versions(), "measured": measured}
    text = json.dumps(report, indent=1)
    print(text)
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    output = ARGUMENTS.output or RESULTS / f"hardware-constants-{slug}.json"
    output.write_text(text + "\n")


if __name__ == "__main__":
    main()
