"""Exact read-outs: what an implementation sees, bit by bit, in any dtype, with no tolerance.

Zero queries and keys weigh all visible keys alike, so one-hot values give each key a column of its
own: what is not exactly zero was read. The backward is read in the same way, gradient by gradient,
and a FlexAttention BlockMask in all its parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nsa_ref.testing.branches import Branch, Inputs, as_array
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.handing_over import handed_over
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.verdicts import Raised


def one_hot(blank: np.ndarray, heads: Any = slice(None)) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Arrays that tell all tokens of these heads apart, as many tokens each as there are features.

    Each comes with the slice of its tokens and their number: token `start + c` has a 1 at feature
    c, and all else is 0.

    Shapes
    ------
    blank : (batch, heads, len, dim), and so is each array
    """
    length, dim = blank.shape[2:]
    for start in range(0, length, dim):
        width = min(dim, length - start)
        array = np.zeros_like(blank)
        array[:, heads, start : start + width, :width] = np.eye(width, dtype=array.dtype)
        yield slice(start, start + width), width, array


def zeros(case: Case, branch: Branch) -> Inputs:
    """q = k = v = 0 in the case's dtype, with the case's own block indices."""
    columns, dtype = branch.columns(case), DTYPES[case.dtype]
    return Inputs(
        q=np.zeros((case.batch, case.q_heads, case.q_len, case.head_dim), dtype),
        k=np.zeros((case.batch, case.kv_heads, columns, case.head_dim), dtype),
        v=np.zeros((case.batch, case.kv_heads, columns, case.value_dim), dtype),
        block_indices=case.block_indices() if branch.name == "fine" else None,
    )


def _with_logits(inputs: Inputs) -> Inputs:
    """The same, with larger logits at every other key, the same for all queries."""
    q, k = np.zeros_like(inputs.q), np.zeros_like(inputs.k)
    q[..., 0] = 4
    k[:, :, ::2, 0] = 4
    return dataclasses.replace(inputs, q=q, k=k)


def forward_mask(
    implementation: Implementation,
    branch: Branch,
    case: Case,
    expected: np.ndarray,
    *,
    roundings: int = 2,
) -> np.ndarray:
    """The multiplicities that the forward really uses, (batch, q_heads, q_len, columns).

    With q = k = 0, `out[t, j]` is mult_j / sum of the row's multiplicities, which says how they
    stand to each other. A row in which they stand as expected is the expected one; in any other the
    smallest weight counts as 1. (All keys of a row counted twice is no difference here: lse tells.)
    A row that reads more than the real columns (padding) sums to less than 1 and is marked by -1
    in the columns it should see, a row of NaN by -2: it may be 0 / 0. A row that should see nothing
    sees nothing if it weighs all columns alike, whatever the logits are: what it must hold is A2's
    question.

    roundings : how often a weight is rounded to the dtype on its way: P and out, if no more
    """
    inputs = zeros(case, branch)

    def weights_for(inputs: Inputs) -> np.ndarray:
        weights = np.zeros(expected.shape)
        for chunk, width, v in one_hot(inputs.v):
            out = branch.forward(implementation, case, dataclasses.replace(inputs, v=v)).out
            weights[..., chunk] = out[..., :width]
        return weights

    def alike_in(weights: np.ndarray) -> np.ndarray:
        return (weights == weights[..., :1]).all(-1, keepdims=True)

    weights = weights_for(inputs)
    total = expected.sum(-1, keepdims=True)
    alike = alike_in(weights)
    no_number = np.isnan(weights).all(-1, keepdims=True)
    if ((total == 0) & alike & (weights != 0)).any():
        # a mean over all columns, or attention to all of them: another logit at every other one
        # tells, of more than one
        alike = alike & alike_in(weights_for(_with_logits(inputs)))
    nothing = ((total == 0) & alike) | no_number
    weights = np.where(nothing, 0.0, weights)

    unit_roundoff = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(case.dtype, 2.0**-20)
    seen = weights != 0  # NaN counts as seen
    same = (seen == (expected != 0)).all(-1, keepdims=True)
    # P and out rounded move a weight by at most 2 u, a ratio of two by 4 u (and a bit)
    slack = (2 * roundings + 1) * unit_roundoff
    with np.errstate(invalid="ignore", over="ignore"):
        share = np.abs(weights) / np.maximum(expected, 1)
        most = np.where(seen, share, 0).max(-1, initial=0, keepdims=True)
        fewest = np.where(seen, share, np.inf).min(-1, initial=np.inf, keepdims=True)
        right = same & ((total == 0) | (most <= fewest * (1 + slack)))
        least = np.where(seen, np.abs(weights), np.inf).min(-1, initial=np.inf, keepdims=True)
        counts = np.where(seen, np.maximum(np.rint(weights / least), 1), 0)
    counts = np.where(right, expected, np.where(np.isnan(counts), -1, counts))
    # a wrong row that looks right once its smallest weight counts as 1
    alike = ~right & (counts == expected).all(-1, keepdims=True)
    counts = np.where(alike & (share == most), -1, counts)

    # one key too many in the denominator takes 1 / (n + 1) of the sum; a rounded weight is off by
    # at most u (2^-8 in bf16), so rows short enough to tell the two apart are judged
    short = 2 * roundings * unit_roundoff * (total + 1) < 1
    padding = right & short & (total > 0) & (weights.sum(-1, keepdims=True) < 1 - 0.5 / (total + 1))
    counts = np.where(padding & (expected != 0), -1, counts)
    counts = np.where(no_number & (expected != 0), -2, counts)
    return counts.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which (query, key) pairs a gradient depends on.

    seen : bool (batch, q_heads, q_len, columns), an element that is not exactly zero
    visible, decided : what the definition says, and where it says it; elsewhere a right gradient
        may happen to be zero
    """

    gradient: str
    seen: np.ndarray
    visible: np.ndarray
    decided: np.ndarray

    def wrong(self) -> np.ndarray:
        """Pairs read that must not be, or not read that must be."""
        return self.decided & (self.seen != self.visible)


def backward_patterns(
    implementation: Implementation, branch: Branch, case: Case, mask: np.ndarray
) -> list[Pattern]:
    """What dv, dq and dk read, one pattern each.

    dv: q = k = 0 and one-hot rows of d_out make dv[j, c(t)] the weight of key j in row t.
    dq: q = 0 and one-hot keys make dq[t, c(j)] = scale dS[t, j]; values are small integers, exact
    in every dtype, and a pair is decided where |dP - D| >= 1: at most 16 in size, D is off by less
    than 1/2 even if every step is rounded to bf16. dk: k = 0 and one-hot queries, likewise.
    """
    group, blank, visible = case.group_size, zeros(case, branch), mask != 0
    rng = case.generator("backward_patterns")
    # one-hot rows are sent for some heads of every group; more would only repeat them
    members = sorted(rng.permutation(group)[: device_of(implementation.device).heads_probed])
    one_per_group = [np.arange(case.kv_heads) * group + member for member in members]
    rows = (case.batch, case.q_heads, case.q_len)
    d_lse = np.zeros(rows, blank.q.dtype)
    d_out = np.zeros((*rows, case.value_dim), blank.q.dtype)

    # where an empty row is no zero, neither are its gradients
    plain = (branch.empty_row(case) == "zero") | visible.any(-1, keepdims=True)
    probed = np.zeros(visible.shape, bool)
    probed[:, np.concatenate(one_per_group)] = True
    probed &= plain

    seen_dv = np.zeros(visible.shape, bool)
    for heads in one_per_group:
        for chunk, width, one_hot_d_out in one_hot(d_out, heads):
            _, _, dv = branch.backward(implementation, case, blank, one_hot_d_out, d_lse)
            seen_dv[:, heads, chunk] = dv[..., :width].swapaxes(-1, -2) != 0

    # q = 0 or k = 0: all visible keys weigh mult / total, dP is an integer, D their mean
    v = blank.v.copy()
    v[..., 0] = rng.integers(-16, 17, v.shape[:-1])
    d_out[..., 0] = 1
    dp = np.repeat(v[..., 0].astype(np.float64), group, axis=1)[:, :, None, :]
    share = mask / np.maximum(mask.sum(-1, keepdims=True), 1)
    decided = ~visible | (np.abs(dp - (share * dp).sum(-1, keepdims=True)) >= 1)
    decided &= plain

    seen_dq = np.zeros(visible.shape, bool)
    for chunk, width, k in one_hot(blank.k):
        inputs = dataclasses.replace(blank, k=k, v=v)
        dq, _, _ = branch.backward(implementation, case, inputs, d_out, d_lse)
        seen_dq[..., chunk] = dq[..., :width] != 0

    seen_dk = np.zeros(visible.shape, bool)
    for heads in one_per_group:
        for chunk, width, q in one_hot(blank.q, heads):
            inputs = dataclasses.replace(blank, q=q, v=v)
            _, dk, _ = branch.backward(implementation, case, inputs, d_out, d_lse)
            seen_dk[:, heads, chunk] = dk[..., :width].swapaxes(-1, -2) != 0

    return [
        Pattern("dv", seen_dv, visible, probed),
        Pattern("dq", seen_dq, visible, decided),
        Pattern("dk", seen_dk, visible, decided & probed),
    ]


def block_mask_readings(block_mask: Any, rows: int, columns: int) -> dict[str, np.ndarray]:
    """What each part of a FlexAttention BlockMask says, as multiplicities (B, H, rows, columns).

    "mask_mod": the predicate alone, all that eager FlexAttention evaluates. "kv lists": the blocks
    that the forward and dq walk; a full block shows every cell without asking mask_mod, a block
    named twice counts twice. "q lists": the transposed lists that dk and dv walk.

    Raises
    ------
    Raised : a list that names a block outside the mask
    """
    from torch.nn.attention.flex_attention import create_mask

    q_block, kv_block = block_mask.BLOCK_SIZE
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    device = block_mask.kv_indices.device.type
    if rows and columns and batch and heads:
        with handed_over():
            predicate = create_mask(block_mask.mask_mod, batch, heads, rows, columns, device)
            predicate = predicate.expand(batch, heads, rows, columns).cpu().numpy()
    else:
        predicate = np.zeros((batch, heads, rows, columns), bool)
    readings = {"mask_mod": predicate.astype(np.int64)}

    def walk(prefix: str, outer: int, inner: int, swap: bool) -> np.ndarray:
        counts = np.zeros(predicate.shape, np.int64)
        for kind, full in ((f"{prefix}", False), (f"full_{prefix}", True)):
            numbers = getattr(block_mask, f"{kind}_num_blocks")
            indices = getattr(block_mask, f"{kind}_indices")
            if numbers is None:
                continue
            numbers, indices = numbers.cpu().numpy(), indices.cpu().numpy()
            inner_blocks = -(-(rows if swap else columns) // inner)
            for b, h, i in np.ndindex(*numbers.shape):
                for slot in range(int(numbers[b, h, i])):
                    j = int(indices[b, h, i, slot]) if slot < indices.shape[-1] else -1
                    if not 0 <= j < max(inner_blocks, 1):
                        raise Raised(
                            f"{kind}_indices[{b}, {h}, {i}, {slot}] names block {j} of "
                            f"{inner_blocks}"
                        )
                    a = slice(i * outer, (i + 1) * outer)
                    c = slice(j * inner, (j + 1) * inner)
                    cells = (b, h, c, a) if swap else (b, h, a, c)
                    counts[cells] += 1 if full else readings["mask_mod"][cells]
        return counts

    readings["kv lists"] = walk("kv", q_block, kv_block, swap=False)
    if getattr(block_mask, "q_indices", None) is not None:
        readings["q lists"] = walk("q", kv_block, q_block, swap=True)
    return readings


class Reading(NamedTuple):
    """A mask that an implementation shows, in one of the ways in which it can be read.

    name : "" if there is only one
    cells : multiplicities, integers or bool, of any shape
    is_list : read off the block lists of a BlockMask, which its predicate stands beside
    """

    name: str
    cells: np.ndarray
    is_list: bool = False


def exposed_readings(value: Any, rows: int, columns: int) -> list[Reading]:
    """What a `*_mask` method returned, in every way in which it can be read.

    A `Reading` in it is taken as it is: masks that do not leave their process are read there.

    Raises
    ------
    Raised : no mask, an empty dict, or two masks whose names are the same
    """
    if isinstance(value, Reading):
        return [value]
    if isinstance(value, dict):
        found = [
            reading._replace(name=f"{name} {reading.name}".strip())
            for name, item in value.items()
            for reading in exposed_readings(item, rows, columns)
        ]
        if not found:
            raise Raised("an empty dict is no mask")
        names = [reading.name for reading in found]
        for name in names:
            if names.count(name) > 1:
                raise Raised(f"a dict has two masks {name!r}: each must have a name of its own")
        return found
    if hasattr(value, "kv_num_blocks") and hasattr(value, "mask_mod"):
        parts = block_mask_readings(value, rows, columns)
        return [Reading(part, cells, part != "mask_mod") for part, cells in parts.items()]
    array = as_array(value)
    if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise Raised(f"a mask of dtype {array.dtype}; it must hold booleans or integers")
    return [Reading("", array)]


def head_influence(
    implementation: Implementation, branch: Branch, case: Case, inputs: Inputs, kv_head: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far out moves when the keys, or the values, of one kv head change, element by element.

    `inputs` must not be degenerate: a row that sees a single key does not notice its logit.

    returns : both (batch, q_heads, q_len, value_dim); a NaN that stays NaN has not moved, one that
        comes or goes has moved by inf
    """
    base = branch.forward(implementation, case, inputs).out
    moved = []
    for name in ("k", "v"):
        array = getattr(inputs, name).copy()
        array[:, kv_head] = -array[:, kv_head] + 1
        out = branch.forward(implementation, case, dataclasses.replace(inputs, **{name: array})).out
        same = (out == base) | (np.isnan(out) & np.isnan(base))
        with np.errstate(invalid="ignore", over="ignore"):
            moved.append(np.where(same, 0.0, np.nan_to_num(np.abs(out - base), nan=np.inf)))
    return moved[0], moved[1]
