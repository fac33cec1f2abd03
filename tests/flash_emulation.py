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
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.mutants.kernel import LN_2, EagerKernel, Kernel, Way
from nsa_ref.testing.mutants.rounding import Rounding, add_up

Array = np.ndarray[Any, np.dtype[Any]]

KINDS = (
    "integers",
    "one_hot_v",
    "equal",
    "flat",
    "ties",
    "randn",
    "huge",
    "heavy",
    "offsets",
    "tiny",
)
ORDERS = ("sequential", "reversed", "pairwise", "blocked")
ROWS = ("fp64", "fp32", "tf32", "bf16", "fp16", "bf16-head", "bf16-eager", "fp16-eager")


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


def inputs(
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
    return Way(
        block=int(rng.choice([16, 32, 64])),
        order=str(rng.choice(orders)),
        backward_order=str(rng.choice(orders)),
        exponential=str(rng.choice(["exp", "exp2", "exp2_late"])),
        delta_from=str(rng.choice(["out", "out", "p"])),
        d_lse_joins=str(rng.choice(["delta", "dp"])),
        scale_before=bool(rng.random() < 0.3),
        reciprocal=bool(rng.random() < 0.5),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Scaled(Case):
    """A case with a scale of its own."""

    scale: float = 1.0


def computed(x: Inputs, row: str, way: Way, kernel: type[Kernel] | None = None) -> Tensors:
    """What a kernel of the row makes of the input: the right one, if no other is given."""
    kernel = kernel or (EagerKernel if NUMERICS[row].rounds_every_operation else Kernel)
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


def pool(
    x: Array,
    weights: dict[str, Array],
    d_out: Array,
    row: str,
    order: str,
    *,
    first: list[int],
    length: int,
    bug: str = "",
) -> tuple[Array, Array, dict[str, Array]]:
    """A compression map and its gradient, every layer stored: (out, dx, dweights).

    The map follows from the weights. `first` is the first token of each window, possibly < 0.
    With row "fp64" this is the reference.
    """
    arithmetic = Rounding(row, order)
    wide, store = arithmetic.wide, arithmetic.store
    batch, kv_heads, _, dim = x.shape
    blocks = len(first)
    x, d_out = x.astype(wide), d_out.astype(wide)
    w = {key: value.astype(wide) for key, value in weights.items()}
    y = np.zeros((batch, kv_heads, blocks, length, dim), wide)
    for block, start in enumerate(first):
        for token in range(length):
            if start + token >= 0:
                y[:, :, block, token] = x[:, :, start + token]
    if "positions" in w and bug != "positions dropped":
        y = store(y + w["positions"][:, None])
    flat = y.reshape(-1, length * dim)
    g = d_out.reshape(-1, dim)

    def matmul(a: Array, b: Array) -> Array:
        return store(arithmetic.dot(a, np.swapaxes(b, 0, 1)))

    def bias_gradient(a: Array) -> Array:
        return store(add_up(np.swapaxes(a, 0, 1), order))

    d: dict[str, Array] = {}
    if "weight_in" in w:
        before = store(matmul(flat, w["weight_in"].T) + w["bias_in"])
        hidden = np.maximum(before, wide(0))
        out = store(matmul(hidden, w["weight_out"].T) + w["bias_out"])
        d["weight_out"], d["bias_out"] = matmul(g.T, hidden), bias_gradient(g)
        g = matmul(g, w["weight_out"])
        if bug != "relu passes all gradients":
            g = g * (before > 0)
        d["weight_in"], d["bias_in"] = matmul(g.T, flat), bias_gradient(g)
        dy = matmul(g, w["weight_in"])
    elif "weight" in w and w["weight"].ndim == 3:
        # each head, and for its gradient each batch entry, by itself
        y_heads = y.reshape(batch, kv_heads, blocks, length * dim)
        out, dy = np.zeros_like(d_out), np.zeros_like(y_heads)
        d["weight"], d["bias"] = np.zeros_like(w["weight"]), np.zeros_like(w["bias"])
        for h in range(kv_heads):
            mine = w["weight"][0 if bug == "the first head's map" else h]
            parts = []
            for b in range(batch):
                out[b, h] = store(matmul(y_heads[b, h], mine.T) + w["bias"][h])
                dy[b, h] = matmul(d_out[b, h], mine)
                parts.append(matmul(d_out[b, h].T, y_heads[b, h]))
            d["weight"][h] = store(add_up(np.stack(parts, axis=-1), order))
            d["bias"][h] = bias_gradient(d_out[:, h].reshape(-1, dim))
    elif "weight" in w:
        out = store(matmul(flat, w["weight"].T) + w["bias"])
        d["weight"], d["bias"] = matmul(g.T, flat), bias_gradient(g)
        dy = matmul(g, w["weight"])
    else:
        out = store(store(add_up(np.swapaxes(y, 3, 4), order)) / wide(length))
        if bug == "mean of real tokens only":
            real = np.minimum(np.asarray(first) + length, length)[None, None, :, None]
            out = store(add_up(np.swapaxes(y, 3, 4), order) / real.astype(wide))
        dy = store(np.repeat(g[:, None], length, axis=1) / wide(length))
    dy = dy.reshape(y.shape)
    if "positions" in w:
        d["positions"] = store(
            add_up(
                np.moveaxis(dy, (0, 2), (3, 4)).reshape(kv_heads, length, dim, batch * blocks),
                order,
            )
        )
    dx = np.zeros_like(x)
    for block, start in enumerate(first):
        for token in range(length):
            if start + token >= 0:
                dx[:, :, start + token] = store(dx[:, :, start + token] + dy[:, :, block, token])
    as_double = {key: d[key].astype(np.float64) for key in weights}
    out = out.reshape(batch, kv_heads, blocks, dim).astype(np.float64)
    return out, dx.astype(np.float64), as_double


def scores(
    q: Array,
    k: Array,
    visible: Array,
    counts: Array,
    row: str,
    order: str,
    *,
    scale: float,
    bug: str = "",
) -> Array:
    """Importance by overlap, summed over the group; memory columns of k come first."""
    arithmetic = Rounding(row, order)
    wide = arithmetic.wide
    kv_heads, memory = k.shape[1], k.shape[2] - counts.shape[0]
    group = q.shape[1] // kv_heads
    q_, k_ = q[0].astype(wide), np.repeat(k[0].astype(wide), group, axis=0)
    s = arithmetic.dot(q_, k_) * wide(scale)
    s = np.where(visible > 0, s, -np.inf)
    m = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isfinite(m), m, wide(0)))
    if bug == "memory left out of the softmax":
        p[..., :memory] = 0.0
    total = add_up(p, order)[..., None]
    p = arithmetic.store(p / np.where(total > 0, total, wide(1)))[..., memory:]
    if bug == "shifted by one stride":
        p = np.concatenate([p[..., 1:], np.zeros_like(p[..., :1])], axis=-1)
    each = add_up(p[:, :, None] * counts.T.astype(wide)[None, None], order)
    each = each.reshape(kv_heads, group, *each.shape[1:])
    return add_up(np.moveaxis(each, 1, -1), order)[None].astype(np.float64)
