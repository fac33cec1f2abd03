"""Attention in float64, and how far a right one may be from it: a bound per element, no tolerance.

An implementation *declares* its numerics, a row of `NUMERICS`, and that is all it may choose.
Its inputs are rounded to its dtype and then taken as exact; what is left is the rounding of the
kernel's own arithmetic, and that is bounded here term by term, from the float64 quantities
(probabilities, logits, outputs, gradients) of the same inputs.

The unit roundoffs ``u`` and absolute errors ``eta`` are those of `nsa_ref.numerics`. Inputs are
exact, unless they are given with their errors (the layer does). Comments on a line name the error
it stands for; the whole formulas are in NUMERICS 2.

Two forms of bound. **Deterministic**: every rounding at its worst at once; never excused.
**Statistical**: independent roundings add in quadrature, at LAMBDA = 6 standard bounds, which by
Hoeffding fails for at most 2 exp(-LAMBDA^2 / 2) = 3e-8 of all elements. It holds for generic
data only, because equal values round alike. Terms that are shared (a rounded scale, a truncating
accumulator) stay linear in it.
A third, **shared**, bounds only what many rows may have in common, for the slope test.

Accept iff ``|error| <= min(deterministic, statistical)`` on generic data, and ``<=
deterministic`` on structured data. Rounding noise has no direction, so `slope_test` finds
systematic errors that are smaller than one rounding.

Inputs and results are pairs of `nsa_ref.rounded`. What lies between them is not made of its
operations: the bounds rest on identities over a whole row (P sums to 1, out is a mean of v), which
an analysis operation by operation does not see.

Source: NUMERICS 2, "Deterministic form", "Statistical form" and "Inputs that are off"
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nsa_ref.attention import attention_arguments
from nsa_ref.checks import as_float64, check_one_of, check_shape
from nsa_ref.numerics import C_DIV, C_EXP, C_SCALE, NUMERICS, Array, Numerics
from nsa_ref.rounded import Rounded, as_rounded, exact, unless_overflow

LAMBDA = 6.0  # standard bounds in the statistical form
KEYS_PER_BLOCK = 16  # the smallest key block of a flash kernel: one rescaling per block
LARGEST_EXPONENT = 200.0  # exp() beyond this is "anything": caps below it always win
FORMS = ("deterministic", "statistical", "shared")


class AttentionValues(NamedTuple):
    """What attention returns in float64, in the tensors' own shapes and units."""

    out: Array
    lse: Array
    dq: Array | None
    dk: Array | None
    dv: Array | None

    @property
    def gradients(self) -> tuple[Array, Array, Array]:
        """Of q, k and v, where a d_out was sent back."""
        assert self.dq is not None and self.dk is not None and self.dv is not None
        return self.dq, self.dk, self.dv


class AttentionBounds(NamedTuple):
    """Largest |error| of a right kernel, per element, in the tensors' own shapes and units."""

    out: Array
    lse: Array
    dq: Array | None
    dk: Array | None
    dv: Array | None


def attention_bounds(
    q: ArrayLike | Rounded,
    k: ArrayLike | Rounded,
    v: ArrayLike | Rounded,
    mask: ArrayLike,
    d_out: ArrayLike | Rounded | None = None,
    d_lse: ArrayLike | None = None,
    *,
    numerics: str,
    form: str,
    scale: float | None = None,
) -> AttentionBounds:
    """The bounds of `judged_attention`, in one form: its arguments, its errors.

    Source: NUMERICS 2
    """
    how: dict[str, Any] = {"numerics": numerics, "forms": (form,), "scale": scale}
    _, (bounds,) = judged_attention(q, k, v, mask, d_out, d_lse, **how)
    return bounds


def judged_attention(
    q: ArrayLike | Rounded,
    k: ArrayLike | Rounded,
    v: ArrayLike | Rounded,
    mask: ArrayLike,
    d_out: ArrayLike | Rounded | None = None,
    d_lse: ArrayLike | None = None,
    *,
    numerics: str,
    forms: Sequence[str],
    scale: float | None = None,
) -> tuple[AttentionValues, list[AttentionBounds]]:
    """Attention through a mask in float64, and bounds on the error of a right kernel's.

    Forward and (with d_out) backward, all from one forward pass. The values are A1's and A3's once
    more, made in another way than `attend` and `attend_vjp`, and the error of float64 is included
    in the bounds: `verify oracle` holds the two against each other. Rows without a visible key and
    keys without a row have bound 0 (A2, A5 say what they hold, exactly). A bound is inf where a
    right kernel's dtype may overflow, and nowhere else.

    The values are A1's of finite inputs: what is not finite also spoils rows that do not see it,
    which have bound inf then.

    Shapes
    ------
    q : (batch, q_heads, q_len, head_dim), already rounded to the kernel's dtype
    k, v : (batch, kv_heads, columns, head_dim or value_dim); query head h reads h // G
    mask : integer multiplicities, broadcastable to (batch, q_heads, q_len, columns)
    d_out : like out, (batch, q_heads, q_len, value_dim); d_lse : like lse, default 0
    numerics : a key of NUMERICS
    forms : "deterministic", "statistical" (for generic data only), "shared" (for `slope_test`)
    returns : AttentionValues, and AttentionBounds of every form; dq, dk, dv are None without d_out.
        A row without a visible key has out 0 and lse 0

    q, k, v and d_out are exact, or each a `Rounded`: how far the kernel's own may be from it. With
    form "deterministic" only.

    Raises
    ------
    ValueError : an unknown row or form, shapes that do not fit, d_lse without d_out, inputs that
        are off with another form than "deterministic"
    TypeError : as `attend`

    Source
    ------
    NUMERICS 2; the quantities are those of A1 and A3
    """
    check_one_of("numerics", numerics, NUMERICS)
    for form in forms:
        check_one_of("form", form, FORMS)
    given = {"q": q, "k": k, "v": v} | ({} if d_out is None else {"d_out": d_out})
    inputs: dict[str, Any] = {name: as_rounded(name, x) for name, x in given.items()}
    of_q, of_k, of_v = (inputs[name].value for name in ("q", "k", "v"))
    _, _, _, mask, scale = attention_arguments(of_q, of_k, of_v, mask, scale)
    rows = of_q.shape[:3]
    if d_out is None and d_lse is not None:
        raise ValueError("d_lse was given without d_out: pass zeros for d_out.")
    if d_out is not None:
        check_shape("d_out", inputs["d_out"].value.shape, (*rows, of_v.shape[3]))
    d_lse = 0.0 if d_lse is None else as_float64("d_lse", d_lse, rows)
    off = [name for name, x in inputs.items() if x.error.any()]
    other = [form for form in forms if form != "deterministic"]
    if off and other:
        raise ValueError(f"{off[0]} is off, and form={other[0]!r} takes exact inputs.")

    how: dict[str, Any] = {"mask": mask, "scale": scale, "d_lse": d_lse}
    kernel = definition = Groups(AttentionInputs(**inputs, **how))
    if off:
        exactly: dict[str, Any] = {name: exact(x.value) for name, x in inputs.items()}
        definition = Groups(AttentionInputs(**exactly, **how))

    def results(x: Groups, row: Numerics, form: str) -> list[Rounded]:
        gradients = rounded_gradients(x, row, form) if d_out is not None else ()
        return [*rounded_output(x, row, form), *gradients]

    # The definition is float64 arithmetic, too, and may err by its own bound. Beside a coarser
    # kernel's that is nothing: the largest of its forms serves for all.
    as_exact = numerics == "fp64" and not off
    of_definition = [] if as_exact else results(definition, NUMERICS["fp64"], "deterministic")
    of_kernel = [results(kernel, NUMERICS[numerics], form) for form in forms]
    absent = () if d_out is not None else (None, None, None)
    bounds = []
    for found in of_kernel:
        both = [x.error + y.error for x, y in zip(found, of_definition or found)]
        bounds.append(AttentionBounds(*both, *absent))
    values = AttentionValues(*(x.value for x in of_definition or of_kernel[0]), *absent)
    return values, bounds


class AttentionInputs(NamedTuple):
    """What attention is given, checked."""

    q: Rounded
    k: Rounded
    v: Rounded
    mask: Array
    scale: float
    d_out: Rounded | None = None
    d_lse: Array | float = 0.0


class RoundedOutput(NamedTuple):
    """What attention returns, and how far a right kernel's may be from it."""

    out: Rounded
    lse: Rounded


class RoundedGradients(NamedTuple):
    """Its gradients, and how far a right kernel's may be from them."""

    dq: Rounded
    dk: Rounded
    dv: Rounded


class Groups:
    """The float64 quantities of attention, of all groups of query heads: axes (batch, kv_heads).

    Behind these two, the rows of a group are stacked: rows = G * q_len. Per pair (rows, columns):
    multiplicity, visible, s, a (= sum_c |q_c| |k_c|), log_p, p (both with the multiplicity), dp,
    r (= dP - D + d_lse), ds. Per row (rows, 1): m, lse, n, delta, d_lse. Per key (columns, 1):
    n_col.

    Inputs that are off have their sizes in a. They move a logit by at most `moved`
    (rows, columns), and the maximum and lse of a row by `moved_row`. `perturbed` is 1 if there
    are such errors, else 0: it multiplies what is of second order where inputs are exact.

    Source: A1, A3
    """

    def __init__(self, given: AttentionInputs) -> None:
        q, k, v, mask, scale, d_out, d_lse = given
        self.of_q, self.of_k, self.of_v = q.value.shape, k.value.shape, v.value.shape
        kv_heads, columns = self.of_v[1:3]
        self.size = self.of_q[1] // kv_heads
        mask = self.stacked(np.broadcast_to(mask, (*self.of_q[:3], columns)))
        self.off = any(x.error.any() for x in (q, k, v))
        self.perturbed = float(self.off)
        self.signed, self.scale = scale, abs(scale)
        self.visible = visible = np.asarray(mask > 0)
        self.multiplicity = np.where(visible, mask, 0.0)
        self.n = _over_keys(self.multiplicity)
        self.n_col = self.multiplicity.sum(axis=-2)[..., None]
        empty = ~visible.any(axis=-1, keepdims=True)
        # keys that nobody sees have no influence, not even as 0 * inf (A5)
        seen = np.any(visible, axis=-2)[..., None]
        self.k, self.v = (x.map(lambda part: np.where(seen, part, 0.0)) for x in (k, v))
        self.q = q.map(self.stacked)
        q_, k_, v_ = (x.value for x in (self.q, self.k, self.v))

        self.s = np.where(visible, scale * (q_ @ _turned(k_)), 0.0)
        self.a = np.where(visible, self.q.size @ _turned(self.k.size), 0.0)
        self.moved = np.zeros_like(self.s)
        if self.perturbed:
            moved = self.q.error @ _turned(self.k.size) + np.abs(q_) @ _turned(self.k.error)
            self.moved = np.where(visible, self.scale * moved, 0.0)
        self.moved_row = np.max(self.moved, axis=-1, keepdims=True, initial=0.0)
        m = np.max(self.s, axis=-1, keepdims=True, initial=-np.inf, where=visible)
        self.m = np.where(empty, 0.0, m)
        weight = np.where(visible, mask * np.exp(np.minimum(self.s - self.m, 0.0)), 0.0)
        total = _over_keys(weight) + empty
        self.lse = np.where(empty, 0.0, self.m + np.log(total))
        self.p = weight / total
        log_mask = np.log(np.where(visible, mask, 1.0))
        self.log_p = np.where(visible, self.s + log_mask - self.lse, -np.inf)
        self.out = self.p @ v_

        self.forward_bounds: dict[tuple[Numerics, str], _Forward] = {}
        if d_out is not None:
            self.send(d_out, d_lse)

    def send(self, d_out: Rounded, d_lse: Array | float = 0.0) -> None:
        """Add the quantities of the backward pass: out's and lse's gradients are known only now."""
        self.perturbed = float(self.off or d_out.error.any())
        d_lse = np.broadcast_to(d_lse, self.of_q[:3])
        self.d_out = d_out.map(self.stacked)
        q, k, v, d_out_ = (x.value for x in (self.q, self.k, self.v, self.d_out))
        self.d_lse = self.stacked(d_lse[..., None]) * (self.n > 0)
        self.dp = np.where(self.visible, d_out_ @ _turned(v), 0.0)
        self.delta = _over_keys(d_out_ * self.out)
        self.r = np.where(self.visible, self.dp - self.delta + self.d_lse, 0.0)
        self.ds = self.p * self.r
        self.dq, self.dk = self.signed * self.ds @ k, self.signed * _turned(self.ds) @ q
        self.dv = _turned(self.p) @ d_out_

    def stacked(self, part: Array) -> Array:
        """The rows of a group one behind the other: (batch, kv_heads, rows, dim)."""
        batch, kv_heads = self.of_v[:2]
        return part.reshape(batch, kv_heads, self.size * self.of_q[2], part.shape[-1])

    @property
    def blocks(self) -> int:
        """Rescalings of an online softmax: one per key block."""
        return self.p.shape[-1] // KEYS_PER_BLOCK

    @property
    def distance(self) -> Array:
        """The largest |s - lse| that a kernel may have."""
        return np.abs(self.s - self.lse) + self.moved + self.moved_row

    def by_head(self, left: Array, right: Array) -> Array:
        """left^T right of each query head on its own: (G, columns, dim)."""

        def apart(x: Array) -> Array:
            rows, last = x.shape[-2:]
            return x.reshape(*x.shape[:-2], self.size, rows // self.size, last)

        return _turned(apart(left)) @ apart(right)

    @cached_property
    def furthest(self) -> Array:
        """The largest visible |v_j - out| of every row: (rows, value_dim)."""
        largest = np.zeros_like(self.out)
        for part, deviation in self._deviations():
            seen = self.visible[:, :, part, :, None]
            largest[:, :, part] = np.max(deviation, axis=-2, initial=0.0, where=seen)
        return largest

    def spread(self, weights: Array, power: int) -> Array:
        """sum_j weights_j |v_j - out|^power of every row: (rows, value_dim)."""
        total = np.zeros_like(self.out)
        for part, deviation in self._deviations():
            powers = deviation if power == 1 else deviation**power
            total[:, :, part] = (weights[:, :, part, None, :] @ powers)[..., 0, :]
        return total

    def _deviations(self) -> Iterator[tuple[slice, Array]]:
        """|v_j - out| of some rows after others: (part of the rows, columns, value_dim).

        All of them at once would be rows * columns * value_dim; a few stay in the cache.
        """
        step = max(1, 2**16 // max(1, self.v.value.size))
        for start in range(0, self.p.shape[2], step):
            part = slice(start, start + step)
            deviation = self.v.value[:, :, None] - self.out[:, :, part, None]
            yield part, np.abs(deviation, out=deviation)


def _turned(x: Array) -> Array:
    """The last two axes, the other way round."""
    return np.swapaxes(x, -1, -2)


def _over_keys(terms: Array) -> Array:
    """The sum of a row: (rows, 1)."""
    return np.sum(terms, axis=-1, keepdims=True)


def rounded_output(x: Groups, row: Numerics, form: str = "deterministic") -> RoundedOutput:
    """Out and lse, and how far a right kernel's may be from them.

    Source: NUMERICS 2; the quantities are those of A1
    """
    row, forward = _forward(x, row, form)
    empty, lost, rows = x.n == 0, _lost(x, row), x.of_q[:3]
    out = _result((*rows, x.of_v[3]), x.out, forward.out, row, lost, empty)
    # lse is never stored in 16 bits
    lse = np.where(empty, 0.0, np.where(lost, np.inf, forward.lse))
    return RoundedOutput(out, Rounded(x.lse.reshape(rows), lse.reshape(rows)))


def rounded_gradients(x: Groups, row: Numerics, form: str = "deterministic") -> RoundedGradients:
    """dq, dk and dv, and how far a right kernel's may be from them, once d_out was sent.

    Source: NUMERICS 2; the quantities are those of A3
    """
    row, forward = _forward(x, row, form)
    backward = _statistical_backward if form == "statistical" else _deterministic_backward
    dq, dk, dv, ds = backward(x, row, forward)
    lost = _lost(x, row)
    # an intermediate dS beyond the dtype takes its row of dq and its key's dk with it
    over = np.asarray(row.rounds_on_store & (np.abs(x.ds) + ds > row.largest))
    # a stored dO.v beyond it meets every key of its row through D = sum P dP; so does a logit
    largest_dp = np.max(x.d_out.size @ _turned(x.v.size), axis=-1, keepdims=True, initial=0)
    lost_back = lost | (row.rounds_every_operation & (largest_dp > row.largest / 1.01))
    over = over | (lost_back & x.visible)
    of_dq, of_dk = (np.any(over, axis)[..., None] for axis in (-1, -2))
    of_dv = np.any(lost & x.visible, -2)[..., None]
    empty, unseen = x.n == 0, x.n_col == 0
    return RoundedGradients(
        _result(x.of_q, x.dq, dq, row, of_dq, empty),
        _result(x.of_k, x.dk, dk, row, of_dk, unseen),
        _result(x.of_v, x.dv, dv, row, of_dv, unseen),
    )


def _forward(x: Groups, row: Numerics, form: str) -> tuple[Numerics, _Forward]:
    """The row of numerics that the form is about, and the bounds of the forward pass."""
    if form == "shared":
        row = row.shared()
    if (row, form) not in x.forward_bounds:
        of_form = _statistical_forward if form == "statistical" else _deterministic_forward
        x.forward_bounds[row, form] = of_form(x, row)
    return row, x.forward_bounds[row, form]


def _lost(x: Groups, row: Numerics) -> np.ndarray:
    """Rows of which nothing is known: (rows, 1) bool."""
    # eager kernels store q.k itself: in float16 it may be beyond 65504, and takes its row with it
    lost = np.asarray(np.max(x.a, axis=-1, keepdims=True, initial=0) > row.largest)
    lost &= row.rounds_every_operation
    # what the kernel was given may be inf or NaN
    lost |= ~np.isfinite(x.moved_row)
    return lost


def _result(
    shape: tuple[int, ...],
    value: Array,
    error: Array,
    row: Numerics,
    unknown: np.ndarray,
    nothing: np.ndarray,
) -> Rounded:
    """A tensor in its own shape; its error is inf where it is unknown, 0 where it is nothing."""
    error = np.where(unknown, np.inf, unless_overflow(Rounded(value, error), row).error)
    error = np.where(nothing, 0.0, error)
    return Rounded(value.reshape(shape), error.reshape(shape))


class _Forward(NamedTuple):
    """Bounds of the forward pass, and what the backward pass needs of them."""

    out: Array
    lse: Array  # (rows, 1)
    d: Array  # |error of a logit|, (rows, columns)
    pe: Array  # |error of P| before the division, relative to the true total
    z: Array  # the smallest row total, relative to the true one
    by_logits: Array  # the part of out that is sum P_j e_j (v_j - o); 0 in rows with a cap


def _weight_error(x: Groups, d: Array, c: float) -> Array:
    """P E = P (expm1(d) + c exp(d)): error of P exp(s - m) when s is off by at most d.

    In logarithms where d is large, because P may be 0 and exp(d) inf: 0 * inf is NaN, but the
    weight exp(log P + d) that a kernel may really see is a plain number.
    """
    lifted = np.exp(np.minimum(x.log_p + d, LARGEST_EXPONENT))
    near = x.p * np.expm1(np.minimum(d, 1.0))
    return np.where(d < 1.0, near, lifted - x.p) + c * lifted


def _smallest_total(d: Array, lost: Array, c: float) -> Array:
    """The row total relative to the true one, of which `lost` may be lost: (rows, 1).

    Its largest logit is off by at most d, and adds 1 to the true total in any case.
    """
    d_max = np.minimum(np.max(d, axis=-1, keepdims=True, initial=0.0), LARGEST_EXPONENT)
    return np.maximum(1.0 - lost, np.exp(-d_max) * (1.0 - c))


def _stored_out(x: Groups, row: Numerics, error: Array) -> Array:
    """The error of out, once P and P v may have underflowed and it is stored."""
    error = error + row.eta * (x.multiplicity @ x.v.size)
    error += x.n * row.eta_accumulate
    return error * (1.0 + row.u_store) + row.u_store * np.abs(x.out) + row.eta


def _deterministic_forward(x: Groups, row: Numerics) -> _Forward:
    u_e, head_dim = row.u_elementwise, x.q.value.shape[-1]
    c_exp = C_EXP * u_e
    d = (
        x.scale * (row.accumulate(head_dim) + row.u_operands) * x.a  # the dot product q.k
        + x.scale * head_dim * row.eta_accumulate  # products that underflow
        + _scaled_query(x, row)  # q, scaled and stored before it meets k
        + row.u_scores * (np.abs(x.s) + x.moved)  # logits stored in 16 bits
        + C_SCALE * u_e * (np.abs(x.s) + x.moved)  # scale and log2 e: constants and products
        # s - m, and its product with log2 e where that is not folded into the scale (the
        # constant's own error is a common factor of s, above, and a shift that cancels)
        + 2.0 * u_e * (np.abs(x.s - x.m) + x.moved + x.moved_row)
        + x.moved  # q and k that are off already
    ) * x.visible
    pe = _weight_error(x, d, c_exp)
    z = _smallest_total(d, _over_keys(x.p * (-np.expm1(-d) + c_exp)), c_exp)
    acc = row.accumulate(x.n + x.blocks)  # acc(n'): one more rounding per rescaling
    u_v = row.u_p + row.u_operands  # P and v as P V reads them

    # o^ - o = sum P_j e_j (v_j - o) / (1 + sum P_j e_j), exactly; then the rounding of P v
    first, furthest = x.spread(pe, 1), x.furthest
    core = (first + (u_v + acc) * ((x.p + pe) @ x.v.size)) / z
    if x.perturbed:  # v that is off already: the same mean of its errors
        core += ((x.p + pe) @ x.v.error) / z
        furthest = furthest + _largest_visible(x, x.v.error)
    # whatever the weights, o^ is a mean of visible v: no further off than the furthest
    cap = furthest + (u_v + acc) * np.maximum(x.p @ x.v.size, np.abs(x.out) + furthest)
    error = np.minimum(core, cap)
    error *= 1.0 + x.perturbed * (acc + C_DIV * u_e)
    error += (acc + C_DIV * u_e) * np.abs(x.out)  # the row total and the division by it
    out = _stored_out(x, row, error)

    log_terms = row.u_lse + C_SCALE * u_e * (np.abs(x.m) + np.abs(x.lse) + 2.0 * x.moved_row)
    from_weights = (
        np.maximum(np.log1p(_over_keys(pe)), -np.log(z))
        + acc  # adding the weights up
        + c_exp * (x.blocks + 1)  # one exp per rescaling
    )
    # a sum of exponentials moves by no more than the logit that moves most
    from_logits = np.max(d, axis=-1, keepdims=True, initial=0.0) + acc
    from_logits += (C_EXP * (x.blocks + 2) + 1) * u_e
    lse = np.minimum(from_weights, from_logits) + log_terms  # log, log2 e, adding m back
    by_logits = np.where(np.all(core < cap, axis=-1, keepdims=True), first / z, 0.0)
    return _Forward(out, lse, d, pe, z, by_logits)


def _scaled_query(x: Groups, row: Numerics) -> Array:
    """What a logit is off by if scale q is stored on its own: (rows, columns)."""
    if not row.rounds_every_operation:
        return np.zeros_like(x.s)
    of_key = x.k.size.sum(axis=-1)[..., None, :]
    off: Array = x.scale * row.u_query * x.a + row.eta * of_key
    return (1.0 + row.u_scores) * off


def _largest_visible(x: Groups, of_key: Array) -> Array:
    """The largest of the visible keys' values: (rows, value_dim)."""
    largest = np.zeros_like(x.out)
    for c in range(of_key.shape[-1]):
        seen = np.where(x.visible, of_key[..., None, :, c], 0.0)
        largest[..., c] = np.max(seen, axis=-1, initial=0.0)
    return largest


def _statistical_forward(x: Groups, row: Numerics) -> _Forward:
    u_e, head_dim = row.u_elementwise, x.q.value.shape[-1]
    c_exp = C_EXP * u_e
    # independent errors of one logit; the constants scale and log2 e are a common factor of
    # all logits and stay apart (`common`), only the rounding of the two products is in here
    d = np.sqrt(
        (x.scale * row.accumulate(head_dim, "statistical") * x.a) ** 2
        + (row.u_scores * x.s) ** 2
        + 2.0 * (u_e * x.s) ** 2
        + 2.0 * (u_e * (x.s - x.m)) ** 2
    )
    # a rounded row of q is shared by all keys: linear
    d += x.scale * row.u_operands * x.a + _scaled_query(x, row)
    d *= x.visible
    pe = _weight_error(x, d, c_exp)
    common = C_SCALE * u_e
    spread = LAMBDA * np.sqrt(_over_keys(pe**2))
    z = _smallest_total(d, spread, c_exp)
    acc = row.accumulate(x.n + x.blocks, "statistical")
    u_v = row.u_p + row.u_operands

    first, furthest = x.spread(pe**2, 2), x.furthest
    size = x.p @ x.v.size
    core = LAMBDA * np.sqrt(first + u_v**2 * (x.p**2 @ x.v.value**2) + (acc * size) ** 2) / z
    ps = x.p * x.s
    mean_s = _over_keys(ps)
    core += common * np.abs(ps @ x.v.value - mean_s * x.out)  # the common factor, signed
    cap = furthest + (u_v + acc) * np.maximum(size, np.abs(x.out) + furthest)
    error = np.minimum(core, cap)
    error += LAMBDA * (acc + C_DIV * u_e) * np.abs(x.out)
    out = _stored_out(x, row, error)

    lse = np.maximum(np.log1p(spread), -np.log(z))
    lse += LAMBDA * (acc + c_exp * (x.blocks + 1))
    lse += row.u_lse + C_SCALE * u_e * (np.abs(x.m) + np.abs(x.lse))
    lse += common * np.abs(mean_s)
    return _Forward(out, lse, d, pe, z, np.zeros_like(out))


# --- P, made again from lse -----------------------------------------------------------------------


def recomputed_p_error(x: Groups, row: Numerics, forward: _Forward | None = None) -> Array:
    """|error| of P = exp(s - lse), made from rounded logits and a rounded lse: (rows, columns).

    ::

        min(P E(d + B_lse + 2 u_elementwise |s - lse|), max(P, largest P))

    Source: NUMERICS 2, "Deterministic form" and "Selection"
    """
    if forward is None:
        forward = _deterministic_forward(x, row)
    return _capped_p_error(x, row, forward.d + forward.lse + 2.0 * row.u_elementwise * x.distance)


def _capped_p_error(x: Groups, row: Numerics, off: Array) -> Array:
    """P E where s - lse is off by at most `off`, and at most max(P, P^)."""
    pe = _weight_error(x, off * x.visible, C_EXP * row.u_elementwise)
    largest = np.maximum(x.p, _largest_p(x, row, _lse_noise(x, row)))
    return np.minimum(pe, largest) * x.visible


def _largest_p(x: Groups, row: Numerics, lse_noise: Array) -> Array:
    """What a recomputed P = exp(s - lse) can reach: 1, but for s and lse rounded twice.

    lse is at least every logit of the same kernel; the backward pass may add the same dot
    product up in another order. Operand and score rounding are the same both times.
    """
    u_e, head_dim = row.u_elementwise, x.q.value.shape[-1]
    twice = x.scale * row.accumulate(head_dim) * x.a + C_SCALE * u_e * (np.abs(x.s) + x.moved)
    return np.exp(np.minimum(2.0 * twice + lse_noise, LARGEST_EXPONENT))


def _lse_noise(x: Groups, row: Numerics) -> Array:
    """How far a stored lse may lie from the log of the sum over the kernel's own logits."""
    u_e = row.u_elementwise
    return (
        row.accumulate(x.n + x.blocks)
        + C_EXP * (x.blocks + 3) * u_e
        + row.u_lse
        + (C_SCALE + 2.0) * u_e * (np.abs(x.m) + np.abs(x.lse) + 2.0 * x.moved_row)
    )


def _not_one(x: Groups, row: Numerics, pb: Array) -> Array:
    """How far the P of one kernel, at most pb, may be from adding up to 1: (rows, 1)."""
    u_e = row.u_elementwise
    each = _largest_p(x, row, _lse_noise(x, row) + 2.0 * u_e * x.distance)  # s and lse twice
    error = pb * (each * (1.0 + C_EXP * u_e) - 1.0)
    if row.rounds_every_operation:
        error = error + row.u_p * pb + row.eta * x.visible
    return _over_keys(error)


# --- backward -------------------------------------------------------------------------------------


def _deterministic_backward(
    x: Groups, row: Numerics, forward: _Forward
) -> tuple[Array, Array, Array, Array]:
    u_e, value_dim = row.u_elementwise, x.v.value.shape[-1]
    d_out, visible = x.d_out.size, x.visible
    pe = recomputed_p_error(x, row, forward)
    pe_dv = pe + (row.u_p + row.u_operands) * (x.p + pe)  # P, stored for P^T dO
    if row.rounds_every_operation:
        # dS is made from the P that was stored; where that underflows it is off by eta, and
        # dS by eta |dP - D|, which heavy tails make large
        pe = pe + row.u_p * (x.p + pe) + row.eta * visible
    pb = x.p + pe

    ddp = (
        (row.accumulate(value_dim) + row.u_operands) * (d_out @ _turned(x.v.size))  # dO . v
        + value_dim * row.eta_accumulate
        + row.u_dp * np.abs(x.dp)  # stored, where every operation is
    ) * visible
    if x.perturbed:  # dO and v that are off already
        moved = x.d_out.error @ _turned(x.v.size) + np.abs(x.d_out.value) @ _turned(x.v.error)
        ddp += (1.0 + row.u_dp) * moved * visible
    # delta as dO . O, from the stored O
    through_out = _over_keys(d_out * forward.out)
    sizes = _over_keys(d_out * (np.abs(x.out) + forward.out))
    d_delta = through_out + row.accumulate(value_dim) * sizes
    deviation = np.abs(x.dp - x.delta) * visible
    if x.perturbed:
        # errors of the logits are large here, and move O by sum P e (v - o): dO of that is
        # sum P e (dP - D), which is less than dO of its size
        less = _over_keys(d_out * forward.by_logits)
        moved = _over_keys(forward.pe * deviation) / forward.z
        moved += _over_keys(x.d_out.error * forward.by_logits)
        d_delta -= np.maximum(less - moved, 0.0)
        d_delta += _over_keys(x.d_out.error * np.abs(x.out))
    # delta as sum P dP (autograd's softmax): (P^ - P) (dP - D) + D (sum P^ - 1) + P (dP^ - dP)
    by_p = pe * (deviation + np.abs(x.delta)) + pb * ddp
    by_p = _over_keys(by_p + row.accumulate(x.n) * pb * (np.abs(x.dp) + ddp))
    if x.perturbed:  # whatever the logits, P sums to 1 but for rounding
        too_much = _over_keys(pe) - _not_one(x, row, pb)
        by_p -= np.maximum(too_much, 0.0) * np.abs(x.delta)
    d_delta = np.maximum(d_delta, by_p)
    d_delta += row.u_delta * (np.abs(x.delta) + np.abs(x.d_lse) + d_delta)  # stored
    d_delta += 4.0 * u_e * np.abs(x.d_lse)  # ln 2, and d_lse joins delta or dP
    d_delta += value_dim * row.eta_accumulate + row.eta * row.rounds_on_store

    r = np.abs(x.r)
    error = pe * (r + d_delta) + pb * (ddp + 3.0 * u_e * r)  # P (dP - D + d_lse), three roundings
    error *= 1.0 + x.perturbed * 3.0 * u_e
    u_ds = row.u_ds + row.u_operands
    ds = error + u_ds * (np.abs(x.ds) + error) + _eta_ds(x, row) * visible  # dS, stored
    through_delta = x.p * d_delta
    ds_all = ds + through_delta * (1.0 + u_ds)

    # dq: the delta error is one number per row, so it meets the *signed* sum of P k
    abs_k, abs_q, abs_ds = x.k.size, x.q.size, np.abs(x.ds)
    dq = ds @ abs_k + d_delta * (np.abs(x.p @ x.k.value) + u_ds * (x.p @ abs_k))
    dq += (abs_ds + through_delta) @ x.k.error
    dq += row.accumulate(x.n) * ((abs_ds + ds + through_delta) @ abs_k)
    dq += x.n * row.eta_accumulate
    # dk, dv: summed over the queries and the heads of the group
    acc = row.accumulate(x.n_col)
    dk = _turned(ds_all) @ abs_q + acc * (_turned(abs_ds + ds_all) @ abs_q)
    dk += _turned(abs_ds) @ x.q.error
    dk += x.n_col * row.eta_accumulate
    dv = _turned(pe_dv) @ d_out + acc * (_turned(x.p + pe_dv) @ d_out)
    dv += _turned(x.p) @ x.d_out.error
    return *_stored_gradients(x, row, dq, dk, dv), ds_all


def _eta_ds(x: Groups, row: Numerics) -> float:
    """Underflow of dS: stored before the scale, after it, or (eager) both."""
    return row.eta * (1.0 + (1.0 / x.scale if x.scale else 0.0))


def _stored_gradients(
    x: Groups, row: Numerics, dq: Array, dk: Array, dv: Array
) -> tuple[Array, Array, Array]:
    """The errors of dq and dk before the scale, and of dv before P underflows: once stored."""
    lost = row.eta * (_turned(x.multiplicity) @ x.d_out.size) + x.n_col * row.eta_accumulate
    return (
        _store(x.scale * dq, x.dq, row),
        _store_group(x.scale * dk, x.dk, x.scale * x.by_head(x.ds, x.q.value), row),
        _store_group(dv + lost, x.dv, x.by_head(x.p, x.d_out.value), row),
    )


def _store(error: Array, reference: Array, row: Numerics) -> Array:
    """Storing one result: its own rounding, and that of the last scalar factor before it."""
    u_e = row.u_elementwise
    return (1.0 + row.u_store) * error + (row.u_store + 2.0 * u_e) * np.abs(reference) + row.eta


def _store_group(error: Array, reference: Array, heads: Array, row: Numerics) -> Array:
    """Storing a sum over the group's heads, once, or each head and each partial sum.

    heads : the exact part of each head, (G, columns, dim)
    """
    group = heads.shape[-3]
    if not row.stores_each_head:
        return _store(error, reference, row) + (group - 1) * row.eta
    # G roundings lie on the first head, fewer on the others: (1 + u)^G - 1 on all of them
    u_group = math.expm1(group * math.log1p(row.u_store))
    size = np.abs(heads).sum(axis=-3)
    error = error + 2.0 * row.u_elementwise * size
    return (1.0 + u_group) * error + u_group * size + 2 * group * row.eta


def _statistical_backward(
    x: Groups, row: Numerics, forward: _Forward
) -> tuple[Array, Array, Array, Array]:
    u_e, value_dim = row.u_elementwise, x.v.value.shape[-1]
    d_out, visible = x.d_out.size, x.visible
    q, k, v = x.q.value, x.k.value, x.v.value
    u_v, u_ds = row.u_p + row.u_operands, row.u_ds + row.u_operands
    # independent part of the error of P; the row's lse error is shared by its keys (s_lse)
    pe = _capped_p_error(x, row, np.sqrt(forward.d**2 + 2.0 * (u_e * (x.s - x.lse)) ** 2))
    pe_dv = np.sqrt(pe**2 + (u_v * x.p) ** 2)
    if row.rounds_every_operation:
        pe = np.sqrt(pe**2 + (row.u_p * x.p) ** 2) + row.eta * visible
    s_lse = forward.lse / LAMBDA
    common = C_SCALE * u_e

    ddp = np.sqrt(
        (row.accumulate(value_dim, "statistical") * (d_out @ _turned(x.v.size))) ** 2
        + row.u_operands**2 * (d_out**2 @ _turned(v**2))
        + (row.u_dp * x.dp) ** 2
    )
    ddp = (ddp + value_dim * row.eta_accumulate) * visible
    acc = row.accumulate(x.n + x.blocks, "statistical")
    size = _over_keys(d_out * np.abs(x.out))
    r_out = x.r - x.d_lse * visible  # dP - D: what O's errors reach delta through
    by_out = (  # delta as dO . O
        row.u_store**2 * _over_keys((x.d_out.value * x.out) ** 2)  # O as stored
        + _over_keys((pe * r_out) ** 2)  # logits and exp
        + (acc * _over_keys(d_out * (x.p @ x.v.size))) ** 2  # P V
        + (row.accumulate(value_dim, "statistical") * size) ** 2  # dO . O
        + (C_DIV * u_e * size) ** 2  # the row total
    )
    by_p = (  # delta as sum P dP: here P need not add up to 1, and lse's error meets delta
        _over_keys((pe * x.dp) ** 2)
        + (s_lse * x.delta) ** 2
        + _over_keys((x.p * ddp) ** 2)
        + (acc * _over_keys(x.p * np.abs(x.dp))) ** 2
    )
    s_delta = np.sqrt(
        np.maximum(by_out, by_p)
        + u_v**2 * _over_keys((x.p * x.dp) ** 2)  # P as P V or P dP reads it
        + (row.u_delta * (np.abs(x.delta) + np.abs(x.d_lse))) ** 2  # delta as stored
        + (4.0 * u_e * x.d_lse) ** 2  # ln 2, and d_lse joins delta or dP
    )
    s_delta += value_dim * row.eta_accumulate + row.eta * row.rounds_on_store
    s_ds = np.sqrt(
        (pe * x.r) ** 2 + (x.p * ddp) ** 2 + (u_ds * x.ds) ** 2 + 3.0 * (u_e * x.ds) ** 2
    )
    eta_ds, dss = _eta_ds(x, row), x.ds * x.s
    # the common factor c of all logits: P moves by c s (and by the lse), delta by c sum dS s
    delta_common = np.abs(_over_keys(x.p * r_out * x.s))

    abs_k, abs_q = x.k.size, x.q.size
    dq = LAMBDA * np.sqrt(
        s_ds**2 @ k**2
        + (s_delta * (x.p @ k)) ** 2  # one number per row: the signed sum of P k
        + (s_lse * (x.ds @ k)) ** 2
        + (row.accumulate(x.n, "statistical") * (np.abs(x.ds) @ abs_k)) ** 2
    )
    dq += common * (2.0 * np.abs(dss @ k) + delta_common * np.abs(x.p @ k))
    dq += eta_ds * (x.multiplicity @ abs_k) + x.n * row.eta_accumulate

    acc = row.accumulate(x.n_col, "statistical")
    shared = (x.p * s_delta) ** 2 + (x.ds * s_lse) ** 2
    dk = LAMBDA * np.sqrt(
        _turned(s_ds**2 + shared) @ q**2 + (acc * (_turned(np.abs(x.ds)) @ abs_q)) ** 2
    )
    dk += common * (_turned(2.0 * np.abs(dss) + x.p * delta_common) @ abs_q)
    dk += eta_ds * (_turned(x.multiplicity) @ abs_q) + x.n_col * row.eta_accumulate

    dv = LAMBDA * np.sqrt(
        _turned(pe_dv**2 + (x.p * s_lse) ** 2) @ d_out**2 + (acc * (_turned(x.p) @ d_out)) ** 2
    )
    dv += 2.0 * common * (_turned(x.p * np.abs(x.s)) @ d_out)
    return *_stored_gradients(x, row, dq, dk, dv), LAMBDA * np.sqrt(s_ds**2 + shared)


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
    reference = as_float64("reference", reference)
    error = as_float64("error", error, reference.shape)
    bound = as_float64("statistical_bound", statistical_bound, reference.shape)
    shared = as_float64("shared_bound", shared_bound, reference.shape)
    size = np.max(np.abs(reference), initial=0.0)
    if size == 0.0 or not np.all(np.isfinite(bound + shared)):
        return Slope(0.0, math.inf)
    unit = reference / size  # so that squares neither overflow nor vanish
    square = float(np.sum(unit * unit)) * size
    rows = np.sum(np.abs(unit) * bound, axis=-1)
    noise = math.sqrt(float(np.sum(rows * rows)))
    common = float(np.sum(np.abs(unit) * shared))
    return Slope(abs(float(np.sum(error * unit))) / square, (noise + common) / square)
