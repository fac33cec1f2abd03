"""Right kernels and wrong ones, emulated in NumPy: what `nsa_ref.bounds` is tested against.

`flash_attention` does what a fused kernel does, in float32 (or float64) arithmetic: key blocks
with an online softmax, P recomputed from lse, 16-bit operands, every sum in a chosen order.
`eager_attention` does what a framework does without fusion: every operation rounded and stored.
`exact_attention` is the same mathematics once, densely, in extended precision.

A `bug` turns either into a wrong kernel; each is one line, next to the line it breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.random import Generator, Philox

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
DTYPES: dict[str, Any] = {
    "fp64": np.float64,
    "fp32": np.float32,
    "tf32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "bf16-head": ml_dtypes.bfloat16,
    "bf16-eager": ml_dtypes.bfloat16,
    "fp16-eager": np.float16,
}
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


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
    return np.asarray(x).astype(DTYPES[row]).astype(np.float64)


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
        exponents = rng.uniform(2.0, 6.0 if DTYPES[row] == np.float16 else 25.0, 4)
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


@dataclass(frozen=True)
class Kernel:
    """The decisions on which right kernels differ.

    block : keys per block of the online softmax
    order : of every sum, one of ORDERS, or "truncated": sequential, rounded towards zero
    exponential : "exp", "exp2" (log2 e folded into the scale), "exp2_late" (s - m times log2 e)
    delta_from : "out", dO . O, or "p", sum P dP
    d_lse_joins : "delta" or "dp"
    scale_before : dS is scaled before it is rounded, instead of the product after
    reciprocal : multiply by 1 / total instead of dividing
    """

    block: int = 16
    order: str = "sequential"
    backward_order: str = "sequential"
    exponential: str = "exp"
    delta_from: str = "out"
    d_lse_joins: str = "delta"
    scale_before: bool = False
    reciprocal: bool = False

    @classmethod
    def draw(cls, rng: Generator, row: str) -> Kernel:
        # tensor cores may truncate; plain float32 and float64 arithmetic does not
        orders = ORDERS if row in ("fp64", "fp32") else (*ORDERS, "truncated")
        return cls(
            block=int(rng.choice([16, 32, 64])),
            order=str(rng.choice(orders)),
            backward_order=str(rng.choice(orders)),
            exponential=str(rng.choice(["exp", "exp2", "exp2_late"])),
            delta_from=str(rng.choice(["out", "out", "p"])),
            d_lse_joins=str(rng.choice(["delta", "dp"])),
            scale_before=bool(rng.random() < 0.3),
            reciprocal=bool(rng.random() < 0.5),
        )


def add_up(terms: Array, order: str) -> Array:
    """Sum over the last axis, in the terms' own dtype, in one of several orders."""
    n = terms.shape[-1]
    if n == 0:
        return np.zeros(terms.shape[:-1], terms.dtype)
    if order == "truncated":
        total = terms[..., 0]
        for i in range(1, n):
            total = _towards_zero(total.astype(np.float64) + terms[..., i], terms.dtype)
        return total
    if order == "reversed":
        terms, order = terms[..., ::-1], "sequential"
    if order == "blocked" and n > 4:
        blocks = -(-n // 4)
        whole = np.zeros((*terms.shape[:-1], blocks * 4), terms.dtype)
        whole[..., :n] = terms
        inner = whole.reshape(*terms.shape[:-1], blocks, 4)
        return add_up(add_up(inner, "sequential"), "sequential")
    if order == "pairwise" and n > 1:
        half = n // 2
        return add_up(terms[..., :half], order) + add_up(terms[..., half:], order)
    total = terms[..., 0]
    for i in range(1, n):
        total = total + terms[..., i]
    return total


def _towards_zero(x: Array, dtype: Any) -> Array:
    near = x.astype(dtype)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, dtype.type(0)), near)


def _tf32(x: Array) -> Array:
    """float32 rounded to 11 significant bits, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


class _Arithmetic:
    """One row's roundings: `wide` is what registers hold, `store` what memory holds."""

    def __init__(self, row: str) -> None:
        self.wide: Any = np.float64 if row == "fp64" else np.float32
        self.dtype = DTYPES[row]
        self.tf32 = row == "tf32"

    def store(self, x: Array) -> Array:
        return x.astype(self.dtype).astype(self.wide)

    def dot(self, a: Array, b: Array, order: str) -> Array:
        """sum_c a[..., c] b[..., c], broadcast; operands as a matrix unit reads them."""
        if self.tf32:
            a, b = _tf32(a), _tf32(b)
        return add_up(a * b, order)


def flash_attention(x: Inputs, row: str, kernel: Kernel, bug: str = "") -> Tensors:
    """A fused kernel, forward and backward. Warnings belong to bugs and invisible rows."""
    with np.errstate(all="ignore"):
        return _flash_attention(x, row, kernel, bug)


def _flash_attention(x: Inputs, row: str, kernel: Kernel, bug: str) -> Tensors:
    arithmetic = _Arithmetic(row)
    wide, store, dot = arithmetic.wide, arithmetic.store, arithmetic.dot
    q, d_out = x.q[0].astype(wide), x.d_out[0].astype(wide)
    heads, q_len, _ = q.shape
    kv_heads, columns = x.k.shape[1:3]
    group = heads // kv_heads
    k, v = (np.repeat(y[0].astype(wide), group, axis=0) for y in (x.k, x.v))
    mask = x.mask[0].astype(wide)
    if bug == "one key dropped":
        mask = mask.copy()
        last = columns - 1 - np.argmax(mask[..., ::-1] > 0, axis=-1)
        np.put_along_axis(mask, last[..., None], 0.0, axis=-1)
    if bug == "one key too many":
        mask = mask.copy()
        first = np.argmin(mask > 0, axis=-1)
        np.put_along_axis(mask, first[..., None], 1.0, axis=-1)
    scale = wide(x.scale * (1.01 if bug == "scale off by 1 %" else 1.0))
    log2_e, ln_2 = wide(LOG2_E), wide(LN_2)
    # logits live in base 2 if log2 e is folded into the scale
    factor = scale * log2_e if kernel.exponential == "exp2" else scale
    if bug == "log2 e missing":
        factor = scale

    def power(y: Array) -> Array:
        if kernel.exponential == "exp2":
            return np.exp2(y)
        if kernel.exponential == "exp2_late":
            return np.exp2(y if bug == "log2 e missing" else y * log2_e)
        return np.exp2(y) if bug == "log2 e missing" else np.exp(y)

    def p_operand(p: Array) -> Array:
        if bug == "fp8 P":
            return p.astype(ml_dtypes.float8_e4m3fn).astype(wide)
        return store(p)

    m = np.full((heads, q_len), -np.inf, wide)
    total = np.zeros((heads, q_len), wide)
    acc = np.zeros((heads, q_len, v.shape[-1]), wide)
    for start in range(0, columns, kernel.block):
        keys = slice(start, start + kernel.block)
        s = dot(q[:, :, None], k[:, None, keys], kernel.order) * factor
        s = np.where(mask[..., keys] > 0, s, -np.inf)
        m_new = np.maximum(m, s.max(axis=-1))
        if bug == "no max-subtraction":
            m_new = np.zeros_like(m)
        base = np.where(np.isfinite(m_new), m_new, wide(0))
        p = mask[..., keys] * power(s - base[..., None])
        alpha = np.where(np.isfinite(m), power(m - base), wide(0))
        if bug == "no rescaling":
            alpha = np.ones_like(alpha)
        p_v = p_operand(p)
        # the total adds P before it is rounded: lse would lose 16 bits otherwise
        total = total * alpha + add_up(p, kernel.order)
        pv = dot(p_v[:, :, None], np.swapaxes(v, 1, 2)[:, None, :, keys], kernel.order)
        acc = acc * alpha[..., None] + pv
        m = m_new
    some = total > 0
    safe = np.where(some | ~np.isfinite(total), total, wide(1))
    base = np.where(np.isfinite(m), m, wide(0))
    out = acc * (wide(1) / safe)[..., None] if kernel.reciprocal else acc / safe[..., None]
    if bug == "out 0.3 % large":
        out = out * wide(1.003)
    out = store(out)
    if kernel.exponential == "exp2":
        lse_2 = base + np.log2(safe)  # base 2, as such kernels keep it
        lse = lse_2 if bug == "lse in base 2" else lse_2 * ln_2
    else:
        lse_2 = lse = base + np.log(safe)
        lse = lse * log2_e if bug == "lse in base 2" else lse
    lse_out = np.where(mask.any(axis=-1), lse, -np.inf)

    # backward: P from the logits again, summed in an order of their own
    order = kernel.backward_order
    s = dot(q[:, :, None], k[:, None], order) * factor
    p = np.where(mask > 0, mask * power(s - lse_2[..., None]), wide(0))
    dp = dot(d_out[:, :, None], v[:, None], order)
    delta = add_up(d_out * out if kernel.delta_from == "out" else p * dp, order)
    if bug == "delta dropped":
        delta = np.zeros_like(delta)
    d_lse = np.zeros_like(delta) if x.d_lse is None else x.d_lse[0].astype(wide)
    if bug == "d_lse dropped":
        d_lse = np.zeros_like(delta)
    if kernel.d_lse_joins == "delta":
        ds = p * (dp - store(delta - d_lse)[..., None])
    else:
        ds = p * ((dp - store(delta)[..., None]) + d_lse[..., None])
    after = wide(1) if kernel.scale_before else scale
    ds = store(ds * scale) if kernel.scale_before else store(ds)
    if bug == "dS in fp8":
        ds = ds.astype(ml_dtypes.float8_e4m3fn).astype(wide)
    dq = store(after * dot(ds[:, :, None], np.swapaxes(k, 1, 2)[:, None], order))

    # the sum for dk and dv runs over all rows of the group, or over each head's on its own
    parts = heads if row.endswith("-head") else kv_heads

    def columns_of(y: Array) -> Array:
        return np.swapaxes(y.reshape(parts, heads // parts * q_len, y.shape[-1]), 1, 2)

    if bug == "one query missing in dk":
        ds = ds.copy()
        ds[:, q_len // 2] = 0.0
    if bug == "group gradient taken once":
        ds = ds.copy()
        ds.reshape(kv_heads, group, *ds.shape[1:])[:, 1:] = 0.0
    dk = store(after * dot(columns_of(ds)[:, :, None], columns_of(q)[:, None], order))
    dv = store(dot(columns_of(store(p))[:, :, None], columns_of(d_out)[:, None], order))
    if row.endswith("-head"):
        dk, dv = (_stored_group_sum(y, kv_heads, store) for y in (dk, dv))
    return Tensors(*(y[None].astype(np.float64) for y in (out, lse_out, dq, dk, dv)))


def _stored_group_sum(x: Array, kv_heads: int, store: Callable[[Array], Array]) -> Array:
    """Sum over the heads of a group, each partial sum stored."""
    x = x.reshape(kv_heads, x.shape[0] // kv_heads, *x.shape[1:])
    total = x[:, 0]
    for head in range(1, x.shape[1]):
        total = store(total + x[:, head])
    return total


def eager_attention(x: Inputs, row: str, kernel: Kernel) -> Tensors:
    """Unfused: every operation stored in the dtype; softmax works in float32 inside."""
    with np.errstate(all="ignore"):
        arithmetic = _Arithmetic(row)
        wide, store, dot = arithmetic.wide, arithmetic.store, arithmetic.dot
        q, d_out = x.q[0].astype(wide), x.d_out[0].astype(wide)
        kv_heads = x.k.shape[1]
        k, v = (np.repeat(y[0].astype(wide), q.shape[0] // kv_heads, axis=0) for y in (x.k, x.v))
        mask, order = x.mask[0].astype(wide), kernel.order
        scale = wide(x.scale)
        s = store(scale * store(dot(q[:, :, None], k[:, None], order)))
        s = np.where(mask > 0, s, -np.inf)
        m = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
        m = np.where(np.isfinite(m), m, wide(0))
        weight = mask * np.exp(s - m)
        total = add_up(weight, order)[..., None]
        p = store(weight / np.where(total > 0, total, wide(1)))
        lse = (m + np.log(total))[..., 0]
        out = store(dot(p[:, :, None], np.swapaxes(v, 1, 2)[:, None], order))
        dp = store(dot(d_out[:, :, None], v[:, None], order))
        delta = add_up(p * dp, order)[..., None]
        d_lse = np.zeros_like(delta) if x.d_lse is None else x.d_lse[0].astype(wide)[..., None]
        ds = store(scale * store(p * (dp - delta + d_lse)))
        dq = store(dot(ds[:, :, None], np.swapaxes(k, 1, 2)[:, None], order))
        dk = store(dot(np.swapaxes(ds, 1, 2)[:, :, None], np.swapaxes(q, 1, 2)[:, None], order))
        dv = store(dot(np.swapaxes(p, 1, 2)[:, :, None], np.swapaxes(d_out, 1, 2)[:, None], order))
        dk, dv = (_stored_group_sum(y, kv_heads, store) for y in (dk, dv))
        return Tensors(*(y[None].astype(np.float64) for y in (out, lse, dq, dk, dv)))


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
    arithmetic = _Arithmetic(row)
    wide, store, dot = arithmetic.wide, arithmetic.store, arithmetic.dot
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
        return store(dot(a[:, None, :], np.swapaxes(b, 0, 1)[None], order))

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
    arithmetic = _Arithmetic(row)
    wide, dot = arithmetic.wide, arithmetic.dot
    kv_heads, memory = k.shape[1], k.shape[2] - counts.shape[0]
    group = q.shape[1] // kv_heads
    q_, k_ = q[0].astype(wide), np.repeat(k[0].astype(wide), group, axis=0)
    s = dot(q_[:, :, None], k_[:, None], order) * wide(scale)
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
