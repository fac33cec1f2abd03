"""Inputs of one attention, of every kind and for every row: what `nsa_ref.bounds` is tested on.

`computed` runs a kernel of `nsa_ref.testing.mutants` on them, right or wrong; `exact_attention` is
the same mathematics once, densely, in extended precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, Philox

from nsa_ref.numerics import NUMERICS
from nsa_ref.testing.case import DTYPES, INPUTS, Case
from nsa_ref.testing.mutants.kernel import LN_2, Kernel
from nsa_ref.testing.mutants.rounding import Way

Array = np.ndarray[Any, np.dtype[Any]]

KINDS = INPUTS
ORDERS = ("sequential", "reversed", "pairwise", "blocked")
ROWS = tuple(NUMERICS)


class Tensors(NamedTuple):
    """Results, or their errors or bounds, of one attention."""

    out: Array
    lse: Array
    dq: Array
    dk: Array
    dv: Array


class Inputs(NamedTuple):
    """One batch entry's worth of input, rounded to the row's dtype, as float64."""

    q: Array  # (1, q_heads, q_len, head_dim)
    k: Array  # (1, kv_heads, columns, head_dim)
    v: Array  # (1, kv_heads, columns, value_dim)
    mask: Array  # (1, q_heads, q_len, columns), multiplicities
    d_out: Array
    d_lse: Array | None
    scale: float


def generator(*seed: int) -> Generator:
    return Generator(Philox(np.random.SeedSequence(seed)))


def rounded(x: Array, row: str) -> Array:
    """x as the row's dtype stores it, in float64."""
    return np.asarray(x).astype(DTYPES[NUMERICS[row].dtype]).astype(np.float64)


def draw_inputs(
    kind: str,
    row: str,
    rng: Generator,
    *,
    sizes: tuple[int, int, int, int, int, int] | None = None,
    mask: Array | None = None,
) -> Inputs:
    """Random input of one kind; sizes = kv_heads, G, q_len, columns, head_dim, value_dim."""
    if sizes is None:
        kv_heads = int(rng.integers(1, 3))
        # one case in eight is long enough for several blocks of any size
        columns = 110 if rng.random() < 0.125 else 25
        sizes = (
            kv_heads,
            int(rng.integers(1, 5 if kv_heads == 1 else 3)),
            int(rng.integers(0 if rng.random() < 0.05 else 1, 25)),
            int(rng.integers(0 if rng.random() < 0.05 else 1, columns)),
            int(rng.choice([1, 2, 3, 4, 8, 16])),
            int(rng.choice([1, 2, 4, 5, 8])),
        )
    kv_heads, group, q_len, columns, head_dim, value_dim = sizes
    heads = kv_heads * group
    q = rng.standard_normal((1, heads, q_len, head_dim))
    k = rng.standard_normal((1, kv_heads, columns, head_dim))
    v = rng.standard_normal((1, kv_heads, columns, value_dim))
    d_out = rng.standard_normal((1, heads, q_len, value_dim))
    d_lse = rng.standard_normal((1, heads, q_len)) if rng.random() < 0.5 else None
    scale = float(rng.choice([head_dim**-0.5, head_dim**-0.5, 1.0, LN_2]))
    if kind == "integers":
        q, k, v, d_out = (
            np.where(rng.random(x.shape) < 0.4, rng.integers(-3, 4, x.shape), 0.0)
            for x in (q, k, v, d_out)
        )
    elif kind == "one_hot_v":
        v = np.zeros_like(v)
        v[..., np.arange(columns), np.arange(columns) % value_dim] = 1.0
    elif kind == "equal":
        k = np.broadcast_to(k[:, :, :1] if columns else k, k.shape)
    elif kind == "ties":
        q, k = (rng.integers(0, 2, x.shape).astype(float) for x in (q, k))
    elif kind == "flat":
        q = q * 0.2 / (head_dim**0.5 * scale)
    elif kind == "huge":
        q = q * rng.uniform(100.0, 330.0) / (head_dim**0.5 * scale)
    elif kind == "heavy":
        q, k, v, d_out = (
            np.clip(rng.standard_t(1.5, x.shape), -300.0, 300.0) for x in (q, k, v, d_out)
        )
    elif kind == "offsets":
        k, v = k + 5.0, v + 10.0
    elif kind == "tiny":
        exponents = rng.uniform(2.0, 6.0 if NUMERICS[row].dtype == "float16" else 25.0, 4)
        q, k, v, d_out = (x * 10.0**-e for x, e in zip((q, k, v, d_out), exponents))
    if mask is None:
        mask = _random_mask(rng, heads, q_len, columns)
    q, k, v, d_out = (rounded(x, row) for x in (q, k, v, d_out))
    if d_lse is not None:
        d_lse = d_lse.astype(np.float64 if row == "fp64" else np.float32).astype(np.float64)
    return Inputs(q, k, v, mask, d_out, d_lse, scale)


def _random_mask(rng: Generator, heads: int, q_len: int, columns: int) -> Array:
    """Sliding, everything, random bits, or random multiplicities; sometimes per head."""
    shape = (1, heads, q_len, columns)
    lag = np.arange(q_len)[:, None] + columns - q_len - np.arange(columns)[None, :]
    which = rng.integers(0, 4)
    if which == 0:
        return np.broadcast_to((lag >= 0) & (lag <= rng.integers(0, 25)), shape).astype(np.int64)
    if which == 1:
        return np.ones(shape, dtype=np.int64)
    if which == 2:
        return (rng.random(shape) < rng.uniform(0.1, 0.9)).astype(np.int64)
    return np.broadcast_to(rng.integers(0, 3, (q_len, columns)), shape).astype(np.int64)


def exact_attention(x: Inputs) -> Tensors:
    """A1 and A3, dense, in extended precision (where the machine has it), as float64."""
    wide = np.longdouble
    q, d_out = x.q[0].astype(wide), x.d_out[0].astype(wide)
    heads, kv_heads = q.shape[0], x.k.shape[1]
    group = heads // kv_heads
    k, v = (np.repeat(y[0].astype(wide), group, axis=0) for y in (x.k, x.v))
    mask = x.mask[0]
    s = np.where(mask > 0, wide(x.scale) * (q @ np.swapaxes(k, 1, 2)), -np.inf)
    m = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
    m = np.where(np.isfinite(m), m, 0.0)
    weight = mask * np.exp(s - m)
    total = weight.sum(axis=-1, keepdims=True)
    p = weight / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        lse = (m + np.log(total))[..., 0]
    out = p @ v
    d_lse = np.zeros(lse.shape, wide) if x.d_lse is None else x.d_lse[0].astype(wide)
    delta = np.sum(d_out * out, axis=-1, keepdims=True)
    ds = p * (d_out @ np.swapaxes(v, 1, 2) - delta + d_lse[..., None])
    dq = x.scale * ds @ k
    dk = _sum_groups(x.scale * np.swapaxes(ds, 1, 2) @ q, kv_heads)
    dv = _sum_groups(np.swapaxes(p, 1, 2) @ d_out, kv_heads)
    return Tensors(*(y[None].astype(np.float64) for y in (out, lse, dq, dk, dv)))


def _sum_groups(x: Array, kv_heads: int) -> Array:
    return x.reshape(kv_heads, x.shape[0] // kv_heads, *x.shape[1:]).sum(axis=1)


def draw_way(rng: Generator, row: str) -> Way:
    """Block size, orders and whatever else right kernels of the row differ on."""
    # tensor cores may truncate; plain float32 and float64 arithmetic does not
    orders = ORDERS if row in ("fp64", "fp32") else (*ORDERS, "truncated")
    fused = not NUMERICS[row].rounds_every_operation
    return Way(
        block=int(rng.choice([16, 32, 64])),
        order=str(rng.choice(orders)),
        backward_order=str(rng.choice(orders)),
        exponential=str(rng.choice(["exp", "exp2", "exp2_late"])),
        delta_from=str(rng.choice(["out", "out", "p"])),
        d_lse_joins=str(rng.choice(["delta", "dp"])),
        scale_before=bool(rng.random() < 0.3),
        reciprocal=bool(rng.random() < 0.5),
        fused=fused,
        scale_first=not fused and bool(rng.random() < 0.5),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Scaled(Case):
    """A case with a scale of its own."""

    scale: float = 1.0


def computed(x: Inputs, row: str, way: Way, kernel: type[Kernel] = Kernel) -> Tensors:
    """What a kernel of the row makes of the input: the right one, if no other is given."""
    case = Scaled(
        dtype=NUMERICS[row].dtype,
        q_heads=x.q.shape[1],
        kv_heads=x.k.shape[1],
        head_dim=x.q.shape[3],
        scale=x.scale,
    )
    judged, d_lse = kernel(way, row), np.zeros(x.q.shape[:3]) if x.d_lse is None else x.d_lse
    arrays = x.mask, x.q, x.k, x.v
    found = judged.attend(case, "sliding", *arrays)
    gradients = judged.attend_vjp(case, "sliding", *arrays, x.d_out, d_lse)
    return Tensors(*(y.astype(np.float64) for y in (*found, *gradients)))
