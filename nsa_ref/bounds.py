"""How far a right kernel may be from the float64 oracle: one bound per element, no tolerance.

An implementation *declares* its numerics, a row of `NUMERICS`, and that is all it may choose.
Its inputs are rounded to its dtype and then taken as exact; what is left is the rounding of the
kernel's own arithmetic, and that is bounded here term by term, from the float64 quantities
(probabilities, logits, outputs, gradients) of the same inputs.

The error model
---------------
``u`` is a unit roundoff: one rounding changes x by at most ``u |x|``, or by ``eta`` if the
result underflows.

- *Accumulation.* A sum of n products, in any order and blocking, is off by at most
  ``acc(n) sum |terms|`` with ``acc(n) = (n + 2) u_accumulate``. Tensor cores accumulate in
  float32 but may truncate, hence 2^-23 there and 2^-24 where arithmetic is IEEE.
- *Operands.* tf32 rounds both factors of a matrix product to 11 bits (``u_operand``).
- *Storage.* 16-bit kernels hold inputs in 16 bits and sums in float32, and round the
  probabilities before P V (``u_p``), dS before dS K (``u_ds``), delta (``u_delta``) and every
  result (``u_store``). "-head" rows also store each query head's dk and dv before the group
  sum; "-eager" rows round after every operation (``u_scores``, ``u_dp``) and keep the rounded
  P for the backward pass (``keeps_p``). The row total adds P before it is rounded: a kernel that
  adds the rounded P has lost half the digits of lse, and is not right here.
- *Elementwise* float32: scale and log2 e cost at most ``C_SCALE`` roundings of a logit, exp
  ``C_EXP`` units in its result (ex2.approx), division ``C_DIV``.
- *Inputs.* They are exact, unless their errors are given (the layer gives them). Then every size
  above includes them, a logit moves by ``scale (|dq| (|k| + |dk|) + |q| |dk|)``, out by a mean of
  |dv|, dP by ``|ddO| (|v| + |dv|) + |dO| |dv|``, and results that read an input once more take
  its error with them.

Two forms of bound. **Deterministic**: every rounding at its worst at once; never excused.
**Statistical**: independent roundings add in quadrature, at LAMBDA = 6 standard bounds, which by
Hoeffding fails for at most 2 exp(-LAMBDA^2 / 2) = 3e-8 of all elements. It holds for generic
data only, because equal values round alike. Terms that are shared (a rounded scale, a truncating
accumulator) stay linear in it.
A third, **shared**, bounds only what many rows may have in common, for the slope test.

Accept iff ``|error| <= min(deterministic, statistical)`` on generic data, and ``<=
deterministic`` on structured data. Rounding noise has no direction, so `slope_test` finds
systematic errors that are smaller than one rounding.

Source: NUMERICS 2. Comments on a line name the error it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.checks import check_at_least, check_multiple, check_one_of, check_shape
from nsa_ref.numerics import C_DIV, C_EXP, C_SCALE, NUMERICS, Array, Numerics
from nsa_ref.rounded import _overflow

LAMBDA = 6.0  # standard bounds in the statistical form
KEYS_PER_BLOCK = 16  # the smallest key block of a flash kernel: one rescaling per block
LARGEST_EXPONENT = 200.0  # exp() beyond this is "anything": caps below it always win
FORMS = ("deterministic", "statistical", "shared")


class AttentionBounds(NamedTuple):
    """Largest |error| of a right kernel, per element, in the tensors' own shapes and units."""

    out: Array
    lse: Array
    dq: Array | None
    dk: Array | None
    dv: Array | None


def attention_bounds(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike,
    d_out: ArrayLike | None = None,
    d_lse: ArrayLike | None = None,
    *,
    numerics: str,
    form: str,
    scale: float | None = None,
    q_error: ArrayLike | None = None,
    k_error: ArrayLike | None = None,
    v_error: ArrayLike | None = None,
    d_out_error: ArrayLike | None = None,
) -> AttentionBounds:
    """Bounds on the error of attention through a mask, forward and (with d_out) backward.

    The float64 oracle's own error is included. Rows without a visible key and keys without a
    row have bound 0 (A2, A5 say what they hold, exactly). A bound is inf where a right kernel's
    dtype may overflow, and nowhere else.

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim), already rounded to the kernel's dtype
    k, v : (batch, kv_heads, columns, head_dim or value_dim); query head h reads h // G
    mask : integer multiplicities, broadcastable to (batch, q_heads, q_len, columns)
    d_out : like out, (batch, q_heads, q_len, value_dim); d_lse : like lse, default 0
    numerics : a key of NUMERICS
    form : "deterministic", "statistical" (for generic data only) or "shared" (for `slope_test`)
    q_error, k_error, v_error, d_out_error : like q, k, v, d_out; how far the kernel's own inputs
        may be from them, default 0. With form "deterministic" only
    returns : AttentionBounds; dq, dk, dv are None without d_out

    Raises
    ------
    ValueError : an unknown row or form, shapes that do not fit, d_lse without d_out, errors of
        inputs with another form than "deterministic"

    Source
    ------
    NUMERICS 2; the quantities are those of A1 and A3
    """
    check_one_of("numerics", numerics, NUMERICS)
    check_one_of("form", form, FORMS)
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    check_shape("q", q.shape, ("batch", "q_heads", "q_len", "head_dim"))
    batch, q_heads, q_len, head_dim = q.shape
    check_shape("k", k.shape, (batch, "kv_heads", "columns", head_dim))
    kv_heads, columns = k.shape[1:3]
    check_shape("v", v.shape, (batch, kv_heads, columns, "value_dim"))
    value_dim = v.shape[3]
    check_at_least("kv_heads", kv_heads, 1)
    check_multiple("q_heads", q_heads, "kv_heads", kv_heads, why="groups are of equal size")
    group = q_heads // kv_heads
    check_at_least("head_dim", head_dim, 1)
    counts = np.asarray(mask, np.float64)
    try:
        mask = np.broadcast_to(counts, (batch, q_heads, q_len, columns))
    except ValueError:
        raise ValueError(
            f"mask has shape {counts.shape}; it must broadcast to "
            f"({batch}, {q_heads}, {q_len}, {columns})."
        ) from None
    if scale is None:
        scale = head_dim**-0.5
    if d_out is None:
        if d_lse is not None:
            raise ValueError("d_lse was given without d_out: pass zeros for d_out.")
        d_out_ = None
    else:
        d_out_ = np.asarray(d_out, dtype=np.float64)
        check_shape("d_out", d_out_.shape, (batch, q_heads, q_len, value_dim))
    d_lse_ = np.zeros(q.shape[:3]) if d_lse is None else np.asarray(d_lse, dtype=np.float64)
    check_shape("d_lse", d_lse_.shape, (batch, q_heads, q_len))
    wrong: dict[str, Array] = {}
    for name, of, given in (
        ("q_error", q, q_error),
        ("k_error", k, k_error),
        ("v_error", v, v_error),
        ("d_out_error", d_out_, d_out_error),
    ):
        if given is None:
            continue
        if form != "deterministic":
            raise ValueError(f"{name} was given with form={form!r}; it takes 'deterministic'.")
        if of is None:
            raise ValueError(f"{name} was given without d_out: pass zeros for d_out.")
        wrong[name] = np.asarray(given, dtype=np.float64)
        check_shape(name, wrong[name].shape, of.shape)

    out, lse = np.zeros((batch, q_heads, q_len, value_dim)), np.zeros((batch, q_heads, q_len))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        for g in range(kv_heads):
            heads = slice(g * group, (g + 1) * group)
            errors = {
                name: each[b, g if name in ("k_error", "v_error") else heads]
                for name, each in wrong.items()
            }
            both_inputs = [
                _Exact.of(
                    q[b, heads],
                    k[b, g],
                    v[b, g],
                    mask[b, heads],
                    None if d_out_ is None else d_out_[b, heads],
                    d_lse_[b, heads],
                    float(scale),
                    q_error=of_inputs.get("q_error"),
                    k_error=of_inputs.get("k_error"),
                    v_error=of_inputs.get("v_error"),
                    d_out_error=of_inputs.get("d_out_error"),
                )
                for of_inputs in ([{}, errors] if errors else [{}])
            ]
            exact, off = both_inputs[0], both_inputs[-1]
            of_kernel = _group_bounds(off, NUMERICS[numerics], form)
            # the reference is float64 arithmetic too, and may err by its own bound
            of_oracle = of_kernel
            if numerics != "fp64" or errors:
                of_oracle = _group_bounds(exact, NUMERICS["fp64"], form)
            both = [x + y for x, y in zip(of_kernel, of_oracle)]
            out[b, heads] = both[0].reshape(group, q_len, value_dim)
            lse[b, heads] = both[1].reshape(group, q_len)
            if d_out_ is not None:
                dq[b, heads] = both[2].reshape(group, q_len, head_dim)
                dk[b, g], dv[b, g] = both[3], both[4]
    if d_out_ is None:
        return AttentionBounds(out, lse, None, None, None)
    return AttentionBounds(out, lse, dq, dk, dv)


@dataclass(frozen=True)
class _Exact:
    """The float64 quantities of one group of query heads, its rows stacked: rows = G * q_len.

    Per pair (rows, columns): multiplicity, s, a (= sum_c |q_c| |k_c|), log_p, p (both with the
    multiplicity), dp, r (= dP - D + d_lse), ds. Per row (rows, 1): m, lse, n, delta, d_lse.

    Inputs that are off by *_error are largest at *_size, and a is made of those. They move a
    logit by at most `moved` (rows, columns), and the maximum and lse of a row by `moved_row`.
    `perturbed` is 1 if there are such errors, else 0: it multiplies what is of second order
    where inputs are exact.
    """

    group: int
    scale: float
    q: Array
    k: Array
    v: Array
    multiplicity: Array
    s: Array
    a: Array
    m: Array
    lse: Array
    n: Array
    n_col: Array
    log_p: Array
    p: Array
    out: Array
    d_out: Array | None
    d_lse: Array
    dp: Array
    delta: Array
    r: Array
    ds: Array
    dq: Array
    dk: Array
    dv: Array
    q_error: Array
    k_error: Array
    v_error: Array
    d_out_error: Array
    q_size: Array
    k_size: Array
    v_size: Array
    d_out_size: Array
    moved: Array
    moved_row: Array
    perturbed: float

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        v: Array,
        mask: Array,
        d_out: Array | None,
        d_lse: Array,
        scale: float,
        *,
        q_error: Array | None = None,
        k_error: Array | None = None,
        v_error: Array | None = None,
        d_out_error: Array | None = None,
    ) -> _Exact:
        group, q_len, head_dim = q.shape
        columns, value_dim = v.shape
        exact_inputs = all(e is None for e in (q_error, k_error, v_error, d_out_error))
        q, mask = q.reshape(group * q_len, head_dim), mask.reshape(group * q_len, columns)
        q_error = np.zeros_like(q) if q_error is None else q_error.reshape(q.shape)
        k_error = np.zeros_like(k) if k_error is None else k_error
        v_error = np.zeros_like(v) if v_error is None else v_error
        visible = np.asarray(mask > 0)
        # keys that nobody sees have no influence, not even as 0 * inf (A5)
        seen = np.any(visible, axis=0)[:, None]
        k, v = np.where(seen, k, 0.0), np.where(seen, v, 0.0)
        k_error, v_error = np.where(seen, k_error, 0.0), np.where(seen, v_error, 0.0)
        q_size, k_size = np.abs(q) + q_error, np.abs(k) + k_error
        empty = ~visible.any(axis=1, keepdims=True)

        s = np.where(visible, scale * (q @ k.T), 0.0)
        a = np.where(visible, q_size @ k_size.T, 0.0)
        moved = np.zeros_like(s)
        if not exact_inputs:
            moved = abs(scale) * (q_error @ k_size.T + np.abs(q) @ k_error.T)
            moved = np.where(visible, moved, 0.0)
        m = np.max(s, axis=1, keepdims=True, initial=-np.inf, where=visible)
        m = np.where(empty, 0.0, m)
        weight = np.where(visible, mask * np.exp(np.minimum(s - m, 0.0)), 0.0)
        total = weight.sum(axis=1, keepdims=True) + empty
        lse = np.where(empty, 0.0, m + np.log(total))
        p = weight / total
        log_mask = np.log(np.where(visible, mask, 1.0))
        log_p = np.where(visible, s + log_mask - lse, -np.inf)
        out = p @ v

        d_lse = d_lse.reshape(group * q_len, 1) * ~empty
        pairs, nothing = np.zeros_like(p), np.zeros_like
        dp, delta, r, ds = pairs, np.zeros_like(m), pairs, pairs
        dq, dk, dv = nothing(q), nothing(k), nothing(v)
        wrong = d_out_size = np.zeros((group * q_len, value_dim))
        if d_out is not None:
            d_out = d_out.reshape(group * q_len, value_dim)
            d_out_size = np.abs(d_out)
            if d_out_error is not None:
                wrong = d_out_error.reshape(d_out.shape)
                d_out_size = d_out_size + wrong
            dp = np.where(visible, d_out @ v.T, 0.0)
            delta = np.sum(d_out * out, axis=1, keepdims=True)
            r = np.where(visible, dp - delta + d_lse, 0.0)
            ds = p * r
            dq, dk, dv = scale * ds @ k, scale * ds.T @ q, p.T @ d_out
        return cls(
            group=group,
            scale=abs(scale),
            q=q,
            k=k,
            v=v,
            multiplicity=np.where(visible, mask, 0.0),
            s=s,
            a=a,
            m=m,
            lse=lse,
            n=np.where(visible, mask, 0.0).sum(axis=1, keepdims=True),
            n_col=np.where(visible, mask, 0.0).sum(axis=0)[:, None],
            log_p=log_p,
            p=p,
            out=out,
            d_out=d_out,
            d_lse=d_lse,
            dp=dp,
            delta=delta,
            r=r,
            ds=ds,
            dq=dq,
            dk=dk,
            dv=dv,
            q_error=q_error,
            k_error=k_error,
            v_error=v_error,
            d_out_error=wrong,
            q_size=q_size,
            k_size=k_size,
            v_size=np.abs(v) + v_error,
            d_out_size=d_out_size,
            moved=moved,
            moved_row=np.max(moved, axis=1, keepdims=True, initial=0.0),
            perturbed=0.0 if exact_inputs else 1.0,
        )

    def by_head(self, left: Array, right: Array) -> Array:
        """left^T right of each query head on its own: (G, columns, dim)."""
        rows, columns = left.shape
        left = left.reshape(self.group, rows // self.group, columns)
        right = right.reshape(self.group, rows // self.group, right.shape[1])
        return left.transpose(0, 2, 1) @ right

    def deviations(self) -> Iterator[tuple[slice, Array]]:
        """|v_j - out_i| as (rows, columns, value_dim), a few rows at a time (memory)."""
        rows, columns = self.p.shape
        step = max(1, 2**20 // max(1, columns * self.v.shape[1]))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            yield part, np.abs(self.v[None] - self.out[part, None, :])


class _Forward(NamedTuple):
    """Bounds of the forward pass, and what the backward pass needs of them."""

    out: Array
    lse: Array  # (rows, 1)
    d: Array  # |error of a logit|, (rows, columns)
    pe: Array  # |error of P| before the division, relative to the true total
    z: Array  # the smallest row total, relative to the true one
    by_logits: Array  # the part of out that is sum P_j e_j (v_j - o); 0 in rows with a cap


def _group_bounds(x: _Exact, row: Numerics, form: str) -> tuple[Array, ...]:
    """Bounds of one group: out (rows, value_dim), lse (rows, 1), and with d_out dq, dk, dv."""
    if form == "shared":
        row = row.shared()
    if form == "statistical":
        forward = _statistical_forward(x, row)
    else:
        forward = _deterministic_forward(x, row)
    empty = np.asarray(x.n == 0)
    out = np.where(empty, 0.0, _overflow(x.out, forward.out, row))
    # eager kernels store q.k itself: in float16 it may be beyond 65504, and takes its row with it
    lost = np.asarray(np.max(x.a, axis=1, keepdims=True, initial=0) > row.largest)
    lost &= row.u_scores > 0
    # what the kernel was given may be inf or NaN
    lost |= ~np.isfinite(x.moved_row)
    out = np.where(lost, np.inf, out)
    lse = np.where(empty, 0.0, np.where(lost, np.inf, forward.lse))
    if x.d_out is None:
        return out, lse
    if form == "statistical":
        dq, dk, dv, ds = _statistical_backward(x, row, forward)
    else:
        dq, dk, dv, ds = _deterministic_backward(x, row, forward)
    # an intermediate dS beyond the dtype takes its row of dq and its key's dk with it
    stored = np.bool_(row.u_store > 0)
    over = stored & (np.abs(x.ds) + ds > row.largest)
    # a stored dO.v beyond it meets every key of its row through D = sum P dP; so does a logit
    largest_dp = np.max(x.d_out_size @ x.v_size.T, axis=1, keepdims=True, initial=0)
    lost_back = lost | ((row.u_dp > 0) & (largest_dp > row.largest / 1.01))
    over |= lost_back & (x.multiplicity > 0)
    dq = np.where(over.any(axis=1, keepdims=True), np.inf, _overflow(x.dq, dq, row))
    dk = np.where(np.any(over, axis=0)[:, None], np.inf, _overflow(x.dk, dk, row))
    unread = np.any(lost & (x.multiplicity > 0), axis=0)[:, None]
    dv = np.where(unread, np.inf, _overflow(x.dv, dv, row))
    unseen = np.asarray(x.n_col == 0)
    return (
        out,
        lse,
        np.where(empty, 0.0, dq),
        np.where(unseen, 0.0, dk),
        np.where(unseen, 0.0, dv),
    )


def _weight_error(x: _Exact, d: Array, c: float) -> Array:
    """P E = P (expm1(d) + c exp(d)): error of P exp(s - m) when s is off by at most d.

    In logarithms where d is large, because P may be 0 and exp(d) inf: 0 * inf is NaN, but the
    weight exp(log P + d) that a kernel may really see is a plain number.
    """
    lifted = np.exp(np.minimum(x.log_p + d, LARGEST_EXPONENT))
    near = x.p * np.expm1(np.minimum(d, 1.0))
    return np.where(d < 1.0, near, lifted - x.p) + c * lifted


def _blocks(x: _Exact) -> int:
    """Rescalings of an online softmax: one per key block."""
    return x.p.shape[1] // KEYS_PER_BLOCK


def _deterministic_forward(x: _Exact, row: Numerics) -> _Forward:
    u_e, head_dim = row.u_elementwise, x.q.shape[1]
    c_exp = C_EXP * u_e
    d = (
        x.scale * (row.accumulate(head_dim) + row.u_operands) * x.a  # the dot product q.k
        + x.scale * head_dim * row.eta_accumulate  # products that underflow
        + row.u_scores * (np.abs(x.s) + x.moved)  # logits stored in 16 bits
        + C_SCALE * u_e * (np.abs(x.s) + x.moved)  # scale and log2 e: constants and products
        # s - m, and its product with log2 e where that is not folded into the scale (the
        # constant's own error is a common factor of s, above, and a shift that cancels)
        + 2.0 * u_e * (np.abs(x.s - x.m) + x.moved + x.moved_row)
        + x.moved  # q and k that are off already
    ) * (x.multiplicity > 0)
    pe = _weight_error(x, d, c_exp)
    d_max = np.minimum(np.max(d, axis=1, keepdims=True, initial=0.0), LARGEST_EXPONENT)
    # the row total relative to the true one; it holds 1 in any case, from the largest logit
    z = np.maximum(
        1.0 - np.sum(x.p * (-np.expm1(-d) + c_exp), axis=1, keepdims=True),
        np.exp(-d_max) * (1.0 - c_exp),
    )
    acc = row.accumulate(x.n + _blocks(x))  # acc(n'): one more rounding per rescaling
    u_v = row.u_p + row.u_operands  # P and v as P V reads them

    first, furthest = np.zeros_like(x.out), np.zeros_like(x.out)
    visible = (x.multiplicity > 0)[:, :, None]
    for part, deviation in x.deviations():
        first[part] = (pe[part, None, :] @ deviation)[:, 0]
        furthest[part] = np.max(np.where(visible[part], deviation, 0.0), axis=1, initial=0.0)
    # o^ - o = sum P_j e_j (v_j - o) / (1 + sum P_j e_j), exactly; then the rounding of P v
    core = (first + (u_v + acc) * ((x.p + pe) @ x.v_size)) / z
    if x.perturbed:  # v that is off already: the same mean of its errors
        core += ((x.p + pe) @ x.v_error) / z
        furthest += _largest_visible(x, x.v_error)
    # whatever the weights, o^ is a mean of visible v: no further off than the furthest
    cap = furthest + (u_v + acc) * np.maximum(x.p @ x.v_size, np.abs(x.out) + furthest)
    error = np.minimum(core, cap)
    error *= 1.0 + x.perturbed * (acc + C_DIV * u_e)
    error += (acc + C_DIV * u_e) * np.abs(x.out)  # the row total and the division by it
    error += row.eta * (x.multiplicity @ x.v_size)  # P that underflows, and
    error += x.n * row.eta_accumulate  # P v that does
    out = error * (1.0 + row.u_store) + row.u_store * np.abs(x.out) + row.eta  # storing

    log_terms = row.u_lse + C_SCALE * u_e * (np.abs(x.m) + np.abs(x.lse) + 2.0 * x.moved_row)
    from_weights = (
        np.maximum(np.log1p(np.sum(pe, axis=1, keepdims=True)), -np.log(z))
        + acc  # adding the weights up
        + c_exp * (_blocks(x) + 1)  # one exp per rescaling
    )
    # a sum of exponentials moves by no more than the logit that moves most
    from_logits = np.max(d, axis=1, keepdims=True, initial=0.0) + acc
    from_logits += (C_EXP * (_blocks(x) + 2) + 1) * u_e
    lse = np.minimum(from_weights, from_logits) + log_terms  # log, log2 e, adding m back
    by_logits = np.where(np.all(core < cap, axis=1, keepdims=True), first / z, 0.0)
    return _Forward(out, lse, d, pe, z, by_logits)


def _largest_visible(x: _Exact, of_key: Array) -> Array:
    """The largest of the visible keys' values: (rows, value_dim)."""
    columns = [
        np.max(np.where(x.multiplicity > 0, each, 0.0), axis=1, initial=0.0) for each in of_key.T
    ]
    return np.stack(columns, axis=1) if columns else np.zeros_like(x.out)


def _largest_p(x: _Exact, row: Numerics, lse_noise: Array) -> Array:
    """What a recomputed P = exp(s - lse) can reach: 1, but for s and lse rounded twice.

    lse is at least every logit of the same kernel; the backward pass may add the same dot
    product up in another order. Operand and score rounding are the same both times.
    """
    u_e, head_dim = row.u_elementwise, x.q.shape[1]
    twice = x.scale * row.accumulate(head_dim) * x.a + C_SCALE * u_e * (np.abs(x.s) + x.moved)
    return np.exp(np.minimum(2.0 * twice + lse_noise, LARGEST_EXPONENT))


def _not_one(x: _Exact, row: Numerics, pb: Array, distance: Array) -> Array:
    """How far the P of one kernel may be from adding up to 1: (rows, 1).

    pb : the largest |P| it may have; distance : the largest |s - lse|
    """
    u_e = row.u_elementwise
    each = _largest_p(x, row, _lse_noise(x, row) + 2.0 * u_e * distance)  # s and lse twice
    error = pb * (each * (1.0 + C_EXP * u_e) - 1.0)
    if row.keeps_p:
        error = error + row.u_p * pb + row.eta * (x.multiplicity > 0)
    return np.sum(error, axis=1, keepdims=True)


def _lse_noise(x: _Exact, row: Numerics) -> Array:
    """How far a stored lse may lie from the log of the sum over the kernel's own logits."""
    u_e = row.u_elementwise
    return (
        row.accumulate(x.n + _blocks(x))
        + C_EXP * (_blocks(x) + 3) * u_e
        + row.u_lse
        + (C_SCALE + 2.0) * u_e * (np.abs(x.m) + np.abs(x.lse) + 2.0 * x.moved_row)
    )


def _deterministic_backward(
    x: _Exact, row: Numerics, forward: _Forward
) -> tuple[Array, Array, Array, Array]:
    assert x.d_out is not None
    u_e, value_dim = row.u_elementwise, x.v.shape[1]
    d_out, visible = x.d_out_size, x.multiplicity > 0
    # P again, from the rounded logits and the rounded lse
    distance = np.abs(x.s - x.lse) + x.moved + x.moved_row
    off = (forward.d + forward.lse + 2.0 * u_e * distance) * visible
    pe = _weight_error(x, off, C_EXP * u_e)
    largest = np.maximum(x.p, _largest_p(x, row, _lse_noise(x, row)))  # |P^ - P| <= max(P, P^)
    pe = np.minimum(pe, largest) * visible
    pe_dv = pe + (row.u_p + row.u_operands) * (x.p + pe)  # P, stored for P^T dO
    if row.keeps_p:
        # dS is made from the P that was stored; where that underflows it is off by eta, and
        # dS by eta |dP - D|, which heavy tails make large
        pe = pe + row.u_p * (x.p + pe) + row.eta * visible
    pb = x.p + pe

    ddp = (
        (row.accumulate(value_dim) + row.u_operands) * (d_out @ x.v_size.T)  # dO . v
        + value_dim * row.eta_accumulate
        + row.u_dp * np.abs(x.dp)  # stored, where every operation is
    ) * visible
    if x.perturbed:  # dO and v that are off already
        moved = x.d_out_error @ x.v_size.T + np.abs(x.d_out) @ x.v_error.T
        ddp += (1.0 + row.u_dp) * moved * visible
    # delta as dO . O, from the stored O
    through_out = np.sum(d_out * forward.out, axis=1, keepdims=True)
    d_delta = through_out + row.accumulate(value_dim) * np.sum(
        d_out * (np.abs(x.out) + forward.out), axis=1, keepdims=True
    )
    deviation = np.abs(x.dp - x.delta) * visible
    if x.perturbed:
        # errors of the logits are large here, and move O by sum P e (v - o): dO of that is
        # sum P e (dP - D), which is less than dO of its size
        less = np.sum(d_out * forward.by_logits, axis=1, keepdims=True)
        moved = np.sum(forward.pe * deviation, axis=1, keepdims=True) / forward.z
        moved += np.sum(x.d_out_error * forward.by_logits, axis=1, keepdims=True)
        d_delta -= np.maximum(less - moved, 0.0)
        d_delta += np.sum(x.d_out_error * np.abs(x.out), axis=1, keepdims=True)
    # delta as sum P dP (autograd's softmax): (P^ - P) (dP - D) + D (sum P^ - 1) + P (dP^ - dP)
    by_p = np.sum(
        pe * (deviation + np.abs(x.delta))
        + pb * ddp
        + row.accumulate(x.n) * pb * (np.abs(x.dp) + ddp),
        axis=1,
        keepdims=True,
    )
    if x.perturbed:  # whatever the logits, P sums to 1 but for rounding
        too_much = np.sum(pe, axis=1, keepdims=True) - _not_one(x, row, pb, distance)
        by_p -= np.maximum(too_much, 0.0) * np.abs(x.delta)
    d_delta = np.maximum(d_delta, by_p)
    d_delta += row.u_delta * (np.abs(x.delta) + np.abs(x.d_lse) + d_delta)  # stored
    d_delta += 4.0 * u_e * np.abs(x.d_lse)  # ln 2, and d_lse joins delta or dP
    d_delta += value_dim * row.eta_accumulate + row.eta * (row.u_delta > 0)

    r = np.abs(x.r)
    error = pe * (r + d_delta) + pb * (ddp + 3.0 * u_e * r)  # P (dP - D + d_lse), three roundings
    error *= 1.0 + x.perturbed * 3.0 * u_e
    u_ds = row.u_ds + row.u_operands
    ds = error + u_ds * (np.abs(x.ds) + error) + _eta_ds(x, row) * visible  # dS, stored
    through_delta = x.p * d_delta
    ds_all = ds + through_delta * (1.0 + u_ds)

    # dq: the delta error is one number per row, so it meets the *signed* sum of P k
    abs_k, abs_q, abs_ds = x.k_size, x.q_size, np.abs(x.ds)
    dq = ds @ abs_k + d_delta * (np.abs(x.p @ x.k) + u_ds * (x.p @ abs_k))
    dq += (abs_ds + through_delta) @ x.k_error
    dq += row.accumulate(x.n) * ((abs_ds + ds + through_delta) @ abs_k)
    dq += x.n * row.eta_accumulate
    dq = _store(x.scale * dq, x.dq, row)
    # dk, dv: summed over the queries and the heads of the group
    acc = row.accumulate(x.n_col)
    dk = ds_all.T @ abs_q + acc * ((abs_ds + ds_all).T @ abs_q)
    dk += abs_ds.T @ x.q_error
    dk += x.n_col * row.eta_accumulate
    dk = _store_group(x.scale * dk, x.dk, x.scale * x.by_head(x.ds, x.q), row)
    dv = pe_dv.T @ d_out + acc * ((x.p + pe_dv).T @ d_out)
    dv += x.p.T @ x.d_out_error
    dv += row.eta * (x.multiplicity.T @ d_out) + x.n_col * row.eta_accumulate  # P underflows
    dv = _store_group(dv, x.dv, x.by_head(x.p, x.d_out), row)
    return dq, dk, dv, ds_all


def _eta_ds(x: _Exact, row: Numerics) -> float:
    """Underflow of dS: stored before the scale, after it, or (eager) both."""
    return row.eta * (1.0 + (1.0 / x.scale if x.scale else 0.0))


def _store(error: Array, reference: Array, row: Numerics) -> Array:
    """Storing one result: its own rounding, and that of the last scalar factor before it."""
    u_e = row.u_elementwise
    return (1.0 + row.u_store) * error + (row.u_store + 2.0 * u_e) * np.abs(reference) + row.eta


def _store_group(error: Array, reference: Array, heads: Array, row: Numerics) -> Array:
    """Storing a sum over the group's heads, once, or each head and each partial sum.

    heads : the exact part of each head, (G, columns, dim)
    """
    group = heads.shape[0]
    if not row.per_head_rounding:
        return _store(error, reference, row) + (group - 1) * row.eta
    # G roundings lie on the first head, fewer on the others: (1 + u)^G - 1 on all of them
    u_group = math.expm1(group * math.log1p(row.u_store))
    size = np.abs(heads).sum(axis=0)
    error = error + 2.0 * row.u_elementwise * size
    return (1.0 + u_group) * error + u_group * size + 2 * group * row.eta


def _statistical_forward(x: _Exact, row: Numerics) -> _Forward:
    u_e, head_dim = row.u_elementwise, x.q.shape[1]
    c_exp = C_EXP * u_e
    # independent errors of one logit; the constants scale and log2 e are a common factor of
    # all logits and stay apart (`common`), only the rounding of the two products is in here
    d = np.sqrt(
        (x.scale * row.accumulate(head_dim, "statistical") * x.a) ** 2
        + (row.u_scores * x.s) ** 2
        + 2.0 * (u_e * x.s) ** 2
        + 2.0 * (u_e * (x.s - x.m)) ** 2
    )
    d += x.scale * row.u_operands * x.a  # a rounded row of q is shared by all keys: linear
    d *= x.multiplicity > 0
    pe = _weight_error(x, d, c_exp)
    common = C_SCALE * u_e
    d_max = np.minimum(np.max(d, axis=1, keepdims=True, initial=0.0), LARGEST_EXPONENT)
    lowest = np.exp(-d_max) * (1.0 - c_exp)
    spread = LAMBDA * np.sqrt(np.sum(pe**2, axis=1, keepdims=True))
    z = np.maximum(1.0 - spread, lowest)
    acc = row.accumulate(x.n + _blocks(x), "statistical")
    u_v = row.u_p + row.u_operands

    first, furthest = np.zeros_like(x.out), np.zeros_like(x.out)
    visible = (x.multiplicity > 0)[:, :, None]
    for part, deviation in x.deviations():
        first[part] = ((pe[part] ** 2)[:, None, :] @ deviation**2)[:, 0]
        furthest[part] = np.max(np.where(visible[part], deviation, 0.0), axis=1, initial=0.0)
    size = x.p @ np.abs(x.v)
    core = LAMBDA * np.sqrt(first + u_v**2 * (x.p**2 @ x.v**2) + (acc * size) ** 2) / z
    ps = x.p * x.s
    mean_s = ps.sum(axis=1, keepdims=True)
    core += common * np.abs(ps @ x.v - mean_s * x.out)  # the common factor, signed
    cap = furthest + (u_v + acc) * np.maximum(size, np.abs(x.out) + furthest)
    error = np.minimum(core, cap)
    error += LAMBDA * (acc + C_DIV * u_e) * np.abs(x.out)
    error += row.eta * (x.multiplicity @ np.abs(x.v)) + x.n * row.eta_accumulate
    out = error * (1.0 + row.u_store) + row.u_store * np.abs(x.out) + row.eta

    lse = np.maximum(np.log1p(spread), -np.log(z))
    lse += LAMBDA * (acc + c_exp * (_blocks(x) + 1))
    lse += row.u_lse + C_SCALE * u_e * (np.abs(x.m) + np.abs(x.lse))
    lse += common * np.abs(mean_s)
    return _Forward(out, lse, d, pe, z, np.zeros_like(out))


def _statistical_backward(
    x: _Exact, row: Numerics, forward: _Forward
) -> tuple[Array, Array, Array, Array]:
    assert x.d_out is not None
    u_e, value_dim = row.u_elementwise, x.v.shape[1]
    d_out, visible = np.abs(x.d_out), x.multiplicity > 0
    u_v, u_ds = row.u_p + row.u_operands, row.u_ds + row.u_operands
    # independent part of the error of P; the row's lse error is shared by its keys (s_lse)
    off = np.sqrt(forward.d**2 + 2.0 * (u_e * (x.s - x.lse)) ** 2) * visible
    pe = _weight_error(x, off, C_EXP * u_e)
    pe = np.minimum(pe, np.maximum(x.p, _largest_p(x, row, _lse_noise(x, row)))) * visible
    pe_dv = np.sqrt(pe**2 + (u_v * x.p) ** 2)
    if row.keeps_p:
        pe = np.sqrt(pe**2 + (row.u_p * x.p) ** 2) + row.eta * visible
    s_lse = forward.lse / LAMBDA
    common = C_SCALE * u_e

    ddp = np.sqrt(
        (row.accumulate(value_dim, "statistical") * (d_out @ np.abs(x.v).T)) ** 2
        + row.u_operands**2 * (d_out**2 @ (x.v**2).T)
        + (row.u_dp * x.dp) ** 2
    )
    ddp = (ddp + value_dim * row.eta_accumulate) * visible
    acc = row.accumulate(x.n + _blocks(x), "statistical")
    size = np.sum(d_out * np.abs(x.out), axis=1, keepdims=True)

    def over_keys(terms: Array) -> Array:
        return np.sum(terms, axis=1, keepdims=True)

    r_out = x.r - x.d_lse * visible  # dP - D: what O's errors reach delta through
    by_out = (  # delta as dO . O
        row.u_store**2 * over_keys((x.d_out * x.out) ** 2)  # O as stored
        + over_keys((pe * r_out) ** 2)  # logits and exp
        + (acc * over_keys(d_out * (x.p @ np.abs(x.v)))) ** 2  # P V
        + (row.accumulate(value_dim, "statistical") * size) ** 2  # dO . O
        + (C_DIV * u_e * size) ** 2  # the row total
    )
    by_p = (  # delta as sum P dP: here P need not add up to 1, and lse's error meets delta
        over_keys((pe * x.dp) ** 2)
        + (s_lse * x.delta) ** 2
        + over_keys((x.p * ddp) ** 2)
        + (acc * over_keys(x.p * np.abs(x.dp))) ** 2
    )
    s_delta = np.sqrt(
        np.maximum(by_out, by_p)
        + u_v**2 * over_keys((x.p * x.dp) ** 2)  # P as P V or P dP reads it
        + (row.u_delta * (np.abs(x.delta) + np.abs(x.d_lse))) ** 2  # delta as stored
        + (4.0 * u_e * x.d_lse) ** 2  # ln 2, and d_lse joins delta or dP
    )
    s_delta += value_dim * row.eta_accumulate + row.eta * (row.u_delta > 0)
    s_ds = np.sqrt(
        (pe * x.r) ** 2 + (x.p * ddp) ** 2 + (u_ds * x.ds) ** 2 + 3.0 * (u_e * x.ds) ** 2
    )
    eta_ds, dss = _eta_ds(x, row), x.ds * x.s
    # the common factor c of all logits: P moves by c s (and by the lse), delta by c sum dS s
    delta_common = np.abs(over_keys(x.p * r_out * x.s))

    abs_k, abs_q = np.abs(x.k), np.abs(x.q)
    dq = LAMBDA * np.sqrt(
        s_ds**2 @ x.k**2
        + (s_delta * (x.p @ x.k)) ** 2  # one number per row: the signed sum of P k
        + (s_lse * (x.ds @ x.k)) ** 2
        + (row.accumulate(x.n, "statistical") * (np.abs(x.ds) @ abs_k)) ** 2
    )
    dq += common * (2.0 * np.abs(dss @ x.k) + delta_common * np.abs(x.p @ x.k))
    dq += eta_ds * (x.multiplicity @ abs_k) + x.n * row.eta_accumulate
    dq = _store(x.scale * dq, x.dq, row)

    acc = row.accumulate(x.n_col, "statistical")
    shared = (x.p * s_delta) ** 2 + (x.ds * s_lse) ** 2
    dk = LAMBDA * np.sqrt((s_ds**2 + shared).T @ x.q**2 + (acc * (np.abs(x.ds).T @ abs_q)) ** 2)
    dk += common * ((2.0 * np.abs(dss) + x.p * delta_common).T @ abs_q)
    dk += eta_ds * (x.multiplicity.T @ abs_q) + x.n_col * row.eta_accumulate
    dk = _store_group(x.scale * dk, x.dk, x.scale * x.by_head(x.ds, x.q), row)

    dv = LAMBDA * np.sqrt(
        (pe_dv**2 + (x.p * s_lse) ** 2).T @ d_out**2 + (acc * (x.p.T @ d_out)) ** 2
    )
    dv += 2.0 * common * ((x.p * np.abs(x.s)).T @ d_out)
    dv += row.eta * (x.multiplicity.T @ d_out) + x.n_col * row.eta_accumulate
    dv = _store_group(dv, x.dv, x.by_head(x.p, x.d_out), row)
    return dq, dk, dv, LAMBDA * np.sqrt(s_ds**2 + shared)


class Slope(NamedTuple):
    """Relative size of the error along the reference, and what rounding noise explains."""

    value: float
    limit: float


def slope_test(
    error: ArrayLike, reference: ArrayLike, statistical_bound: ArrayLike, shared_bound: ArrayLike
) -> Slope:
    """Find a systematic error (a gate off by 0.3 %) that is smaller than one rounding.

    ::

        value = |<error, reference>| / <reference, reference>
        limit = (sqrt(sum over rows of (sum_c |reference_c| B_c)^2)
                 + sum |reference| shared) / <reference, reference>

    Rounding errors have no common direction: rows (all axes but the last) add in quadrature,
    the elements of a row, which share P and delta, linearly. What rows share (constants, tf32
    operands, truncation) is bounded apart and adds up linearly: without it, 100 rows that read
    one key in tf32 are a false alarm. A result that is off by the factor 1 + x has value x.
    Right iff ``value <= limit``; without a reference to lean on (all zero, or an infinite
    bound) the limit is inf and the test says nothing.

    Shapes
    ------
    error, reference, statistical_bound, shared_bound : one tensor of the attention, all of the
        same shape; lse as (..., q_len, 1), rows that see nothing left out or set to 0. The
        bounds are `attention_bounds` of those two forms

    Source
    ------
    NUMERICS 2, "Slope test"
    """
    error, reference, bound, shared = (
        np.asarray(x, dtype=np.float64) for x in (error, reference, statistical_bound, shared_bound)
    )
    check_shape("error", error.shape, reference.shape)
    check_shape("statistical_bound", bound.shape, reference.shape)
    check_shape("shared_bound", shared.shape, reference.shape)
    size = np.max(np.abs(reference), initial=0.0)
    if size == 0.0 or not np.all(np.isfinite(bound + shared)):
        return Slope(0.0, math.inf)
    unit = reference / size  # so that squares neither overflow nor vanish
    square = float(np.sum(unit * unit)) * size
    rows = np.sum(np.abs(unit) * bound, axis=-1)
    noise = math.sqrt(float(np.sum(rows * rows)))
    common = float(np.sum(np.abs(unit) * shared))
    return Slope(abs(float(np.sum(error * unit))) / square, (noise + common) / square)
