"""The whole layer: output, gradients, rotation, decoding, packed sequences (G1 to G4, A4).

A layer chooses its blocks itself. Where scores lie so close together that a right layer may choose
otherwise, a row is *undecided*: it is counted, its output is not compared, and no gradient is sent
through it. A layer that takes blocks from outside is asked with the definition's choice as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.compress import compress_windows
from nsa_ref.layer import NORM_EPS, layer, layer_block_indices, layer_vjp, selection_inputs
from nsa_ref.layer_bounds import LayerBounds, layer_bounds, packed_weight_bounds
from nsa_ref.selection import scored
from nsa_ref.semantics import BRANCHES, ROTARY
from nsa_ref.testing import probes
from nsa_ref.testing.branches import COMPRESS, as_float64, call
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.choices import undecided_rows
from nsa_ref.testing.compare import Comparison, compare
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.properties.common import Outcome, Property, is_declared, oracle_mask, settle
from nsa_ref.testing.properties.masks import wrong_mask
from nsa_ref.testing.verdicts import Broken, Convention, Failure, Inconclusive, Raised

#: A gate's bias at which its sigmoid is 1 or 0, in every dtype.
SHUT = 1e4

Weights = dict[str, np.ndarray]


class _Truth(NamedTuple):
    """The definition's side of a case, in float64.

    bounds : on the output, and on the scores of the choice
    undecided : bool (batch, kv_len), rows for which another choice of blocks may be right
    """

    x: np.ndarray
    weights: Weights
    block_indices: np.ndarray
    bounds: LayerBounds
    undecided: np.ndarray


def _truth(implementation: Implementation, case: Case, x: np.ndarray, weights: Weights) -> _Truth:
    x, weights = x.astype(np.float64), {n: w.astype(np.float64) for n, w in weights.items()}
    how, numerics = case.geometry, implementation.numerics[case.dtype]
    _check_pairs(case)
    block_indices = layer_block_indices(x, weights, **how)
    bounds = layer_bounds(x, weights, block_indices, **how, numerics=numerics)
    blocks = scored(*selection_inputs(x, weights, **how), kv_len=x.shape[1], **how)
    assert bounds.scores is not None
    undecided = undecided_rows(blocks, bounds.scores, **how)
    return _Truth(x, weights, block_indices, bounds, np.asarray(undecided.any(axis=1)))


def _check_pairs(case: Case) -> None:
    """NotOffered where limits leave nothing that could be turned."""
    if case.semantics.rotary != "none" and case.head_dim % 2:
        raise NotOffered(f"rotary={case.semantics.rotary!r} turns pairs, and head_dim is odd")


def _expected(case: Case, truth: _Truth) -> np.ndarray:
    return layer(truth.x, truth.weights, block_indices=truth.block_indices, **case.geometry)


def _run(
    implementation: Implementation, method: str, case: Case, weights: Weights, truth: _Truth
) -> np.ndarray:
    """What the implementation makes of the case, float64 (batch, tokens, width)."""
    x = truth.x.astype(DTYPES[case.dtype])
    extra = (truth.block_indices,) if method == "layer_with_blocks" else ()
    found = call(implementation.run, method, case, weights, x, *extra)
    return as_float64(method, found, (*x.shape[:2], case.layer_width))


def _rows_compared(clause: str, name: str, actual: Any, expected: Any, bound: Any, out: Any) -> Any:
    """`compare`, with the rows of `out` admitted whatever they hold."""
    return compare(clause, name, actual, expected, np.where(out[..., None], np.inf, bound))


def output(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1 by `layer` and `layer_with_blocks`, G3 by `decode`: every row is the definition's."""
    x, weights = case.tokens(), case.layer_weights()
    clause = "G3" if prop.method == "decode" else "G1"
    some_empty = not case.num_mem_kv or not case.num_selected_blocks
    if clause == "G3" and some_empty and "uniform" in case.semantics.empty_row:
        raise Inconclusive("the mean over all columns knows how many are to come")
    return _compared(implementation, prop.method, case, x, weights, clause)


def _check_scores_decide(case: Case) -> None:
    """Inconclusive where every block is chosen, whatever the scores are."""
    if case.batch == 0 or case.num_selection_blocks <= case.num_selected_blocks:
        raise Inconclusive("no row has more blocks than it may choose")


def output_where_scores_decide(
    prop: Property, implementation: Implementation, case: Case
) -> Outcome:
    """The same, of cases in which a choice shows."""
    _check_scores_decide(case)
    return output(prop, implementation, case)


def _compared(
    implementation: Implementation,
    method: str,
    case: Case,
    x: np.ndarray,
    weights: Weights,
    clause: str,
) -> Outcome:
    truth = _truth(implementation, case, x, weights)
    undecided = truth.undecided & (method != "layer_with_blocks")
    try:
        actual = _run(implementation, method, case, weights, truth)
        expected = _expected(case, truth)
        compared = _rows_compared(clause, method, actual, expected, truth.bounds.out, undecided)
    except (Broken, Raised) as error:
        if clause != "G1" and implementation.offers("layer"):
            # what is wrong in parallel as well is not this clause's
            _compared(implementation, "layer", case, x, weights, "G1")
        elif clause != "G1" and isinstance(error, Broken):
            raise _hinted(error, method) from None
        if clause == "G1" and isinstance(error, Broken):
            _blame_the_rotation(implementation, method, case, x, weights)
            raise _located(error, implementation, method, case, x, weights) from None
        raise error
    settled = settle([compared])
    rows = int(undecided.sum())
    return dataclasses.replace(settled, ambiguous=rows, decided=not rows or rows < undecided.size)


def _hinted(broken: Broken, method: str, *, backward: bool = False) -> Broken:
    """The finding, and that it may lie in what `method` has in common with `layer`."""
    what = "gradients of layer are" if backward else "layer is"
    hint = f"{what} not offered: a mistake of {method} cannot be told from one of the layer itself"
    return broken.noted(hint)


def _blame_the_rotation(
    implementation: Implementation, method: str, case: Case, x: np.ndarray, weights: Weights
) -> None:
    """Raise Broken for G2 if another value of `rotary` explains what is wrong with the output.

    Or if wrong logits of rotated branches do: with to_q = 0 all logits are 0, turned or not. The
    compressed branch is shut, unless it is turned as well: its keys may be wrong by themselves.
    """

    def wrong(case: Case, weights: Weights, clause: str) -> Broken | None:
        truth = _truth(implementation, case, x, weights)
        undecided = truth.undecided & (method != "layer_with_blocks")
        actual = _run(implementation, method, declared, weights, truth)
        expected = _expected(case, truth)
        try:
            _rows_compared(clause, method, actual, expected, truth.bounds.out, undecided)
        except Broken as broken:
            return broken
        return None

    declared = case
    found = wrong(case, weights, "G2")
    if found is None:
        return
    for value in ROTARY:
        other = dataclasses.replace(case.semantics, rotary=value)
        if value == case.semantics.rotary or case.head_dim % 2:
            continue
        if wrong(dataclasses.replace(case, semantics=other), weights, "G2") is None:
            raise found.noted(convention=Convention("rotary", value))
    if case.semantics.rotary == "none":
        return
    forced = method == "layer" and implementation.offers("layer_with_blocks")
    if forced and _is_right(implementation, "layer_with_blocks", case, x, weights):
        return  # it chooses other blocks
    for semantics in implementation.semantics:
        plain = dataclasses.replace(case, semantics=semantics)
        if semantics.rotary == "none" and is_declared(implementation, plain):
            own = plain.tokens(), plain.layer_weights()
            if not _is_right(implementation, method, plain, *own):
                return  # wrong where nothing is turned as well
    if case.semantics.rotary == "fine_and_sliding":
        weights = _with_gates(case, weights, (branch != "compress" for branch in BRANCHES))
    flat = {**weights, "to_q.weight": np.zeros_like(weights["to_q.weight"])}
    found = wrong(case, weights, "G2")
    if found is not None and wrong(case, flat, "G1") is None:
        hint = (
            "with to_q = 0, which neither rotation nor scale changes, the same rows are right: "
            "rotation, or else the scale or the heads of q and k"
        )
        raise found.noted(hint)


def _located(
    broken: Broken,
    implementation: Implementation,
    method: str,
    case: Case,
    x: np.ndarray,
    weights: Weights,
) -> Broken:
    """The finding, and which branches are wrong by themselves: one gate open, the others shut."""

    def alone(branch: str) -> Weights:
        return _with_gates(case, weights, (b == branch for b in BRANCHES))

    wrong = [b for b in BRANCHES if not _is_right(implementation, method, case, x, alone(b))]
    right = [b for b in BRANCHES if b not in wrong]
    if not wrong:
        hint = "each branch is right with its gate alone open: the gates, their order or their sum"
    elif not right:
        hint = "all branches are wrong with their gate alone open: look at what they have in common"
    else:
        verb = "is" if len(wrong) == 1 else "are"
        hint = f"with one gate open at a time, {' and '.join(wrong)} {verb} wrong"
        hint += f", {' and '.join(right)} {'is' if len(right) == 1 else 'are'} right"
        forced = method == "layer" and implementation.offers("layer_with_blocks")
        if wrong == ["fine"] and forced:
            handed = _is_right(implementation, "layer_with_blocks", case, x, alone("fine"))
            hint += "; with the choice of blocks handed in, "
            hint += "all are right: it chooses others" if handed else "it is wrong as well"
    return broken.noted(hint)


def _is_right(
    implementation: Implementation, method: str, case: Case, x: np.ndarray, weights: Weights
) -> bool:
    """Whether the output is, without a word about what is wrong."""
    truth = _truth(implementation, case, x, weights)
    undecided = truth.undecided & (method != "layer_with_blocks")
    try:
        actual = _run(implementation, method, case, weights, truth)
        _rows_compared("G1", method, actual, _expected(case, truth), truth.bounds.out, undecided)
    except (Broken, Raised):
        return False
    return True


def _with_gates(case: Case, weights: Weights, opened: Any) -> Weights:
    """The weights with every branch's gate fully open or shut, whatever x is."""
    bias = np.repeat([SHUT if is_open else -SHUT for is_open in opened], case.q_heads)
    dtype = DTYPES[case.dtype]
    return {
        **weights,
        "gates.weight": np.zeros_like(weights["gates.weight"]),
        "gates.bias": bias.astype(dtype),
    }


def gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1: gradients of x and of every weight with the choice handed in; A4: with its own."""
    x, weights = case.tokens(), case.layer_weights()
    return _gradients_compared(implementation, prop.method, case, x, weights, prop.clause)


def gradients_where_scores_decide(
    prop: Property, implementation: Implementation, case: Case
) -> Outcome:
    """The same, of cases in which a choice shows."""
    _check_scores_decide(case)
    return gradients(prop, implementation, case)


def _gradients_compared(
    implementation: Implementation,
    method: str,
    case: Case,
    x: np.ndarray,
    weights: Weights,
    clause: str,
) -> Outcome:
    truth = _truth(implementation, case, x, weights)
    d_out = case.array("d_out", *x.shape[:2], case.layer_width)
    undecided = truth.undecided & (method != "layer_with_blocks")
    d_out = np.where(undecided[..., None], 0, d_out).astype(d_out.dtype)
    extra = (truth.block_indices,) if method == "layer_with_blocks" else ()
    found = _run_vjp(implementation, method, "G1", case, weights, x, *extra, d_out)
    dx, dweights, bounds = _true_gradients(implementation, case, truth, d_out)
    assert bounds.dx is not None and bounds.dweights is not None  # d_out was given
    try:
        compared = [
            compare(clause, "dx", found[0], dx, bounds.dx),
            *_weights_compared(clause, found[1], dweights, bounds.dweights),
        ]
    except Broken as broken:
        if clause != "A4":
            raise
        # a wrong choice has wrong gradients, too
        _compared(implementation, "layer", case, x, weights, "G1")
        if not implementation.offers_vjp("layer_with_blocks"):
            hint = "layer_with_blocks is not offered: this may be A4, a gradient of the choice"
            raise broken.noted(hint, clause="G1") from None
        # wrong with the choice handed in, too: nothing to do with the choice
        _gradients_compared(implementation, "layer_with_blocks", case, x, weights, "G1")
        raise
    rows = int(undecided.sum())
    decided = not rows or rows < undecided.size
    return dataclasses.replace(settle(compared), ambiguous=rows, decided=decided)


def _run_vjp(
    implementation: Implementation,
    method: str,
    clause: str,
    case: Case,
    weights: Weights,
    x: np.ndarray,
    *more: np.ndarray,
) -> tuple[np.ndarray, Weights]:
    """dx and dweights, float64, if they have the form that the plug says."""
    found = call(implementation.run_vjp, method, case, weights, x, *more)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        what = f"{method}_vjp must return (dx, dweights), a tuple with a dict"
        raise Broken(clause, Failure(kind="result", tensor=method, what=what))
    if set(found[1]) != set(weights):
        missing = sorted(set(weights) - set(found[1]))
        unknown = sorted(set(found[1]) - set(weights))
        what = f"{method}_vjp lacks gradients of {missing}, has {unknown}"
        raise Broken(clause, Failure(kind="result", tensor=method, what=what))
    dweights = {n: as_float64(f"d{n}", found[1][n], w.shape) for n, w in weights.items()}
    return as_float64("dx", found[0], x.shape), dweights


def _true_gradients(
    implementation: Implementation, case: Case, truth: _Truth, d_out: np.ndarray
) -> tuple[np.ndarray, Weights, LayerBounds]:
    """The definition's dx and dweights, and the bounds on them."""
    how: dict[str, Any] = case.geometry
    d_out = d_out.astype(np.float64)
    dx, dweights = layer_vjp(
        truth.x, truth.weights, d_out, block_indices=truth.block_indices, **how
    )
    numerics = implementation.numerics[case.dtype]
    given = truth.x, truth.weights, truth.block_indices, d_out
    return dx, dweights, layer_bounds(*given, numerics=numerics, **how)


def _weights_compared(
    clause: str, found: Weights, expected: Weights, bounds: Weights, part: str = ""
) -> list[Comparison]:
    return [
        compare(clause, f"d{name}", found[name], want, bounds[name], part=part)
        for name, want in expected.items()
    ]


class _Packed(NamedTuple):
    """Sequences one behind the other, and what each is by itself.

    batch : a batch that is declared, should 1 not be
    rows : where each stands in x
    alone : the case of each, which has its length and a batch of 1
    """

    case: Case
    batch: int
    weights: Weights
    x: np.ndarray
    cu_seqlens: np.ndarray
    lengths: list[int]
    rows: list[slice]
    alone: list[Case]
    truths: list[_Truth]

    @property
    def undecided(self) -> np.ndarray:
        """Rows for which another choice of blocks may be right: (tokens,)."""
        none = np.zeros(0, dtype=bool)
        return np.concatenate([none, *(truth.undecided[0] for truth in self.truths)])

    def settled(self, compared: list[Comparison]) -> Outcome:
        rows = int(self.undecided.sum())
        decided = not rows or rows < len(self.x)
        return dataclasses.replace(settle(compared), ambiguous=rows, decided=decided)

    def blame(self, implementation: Implementation, broken: Broken, *, backward: bool) -> Broken:
        """The finding, with a hint if nobody can tell whether the layer itself is right.

        Raises
        ------
        Broken : if it is not, for what is wrong with it
        """
        offered = implementation.offers_vjp if backward else implementation.offers
        if not offered("layer"):
            return _hinted(broken, "varlen", backward=backward)
        for alone, rows in zip(self.alone, self.rows):
            batch = 1 if is_declared(implementation, alone) else self.batch
            alone = dataclasses.replace(alone, batch=batch)
            x = np.repeat(self.x[None, rows], batch, axis=0)
            if backward:
                _gradients_compared(implementation, "layer", alone, x, self.weights, "A4")
            else:
                _compared(implementation, "layer", alone, x, self.weights, "G1")
        return broken


def _packed(implementation: Implementation, case: Case) -> _Packed:
    _check_pairs(case)
    # packed tokens have no batch, so that limits of it do not matter
    every = [dataclasses.replace(case, q_len=n, kv_len=n) for n in case.sequence_lengths()]
    every = [each for each in every if is_declared(implementation, each)]
    alone = [dataclasses.replace(each, batch=1) for each in every]
    batch, case = case.batch, dataclasses.replace(case, batch=1)
    lengths = [each.kv_len for each in alone]
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int64)
    rows = [slice(start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]
    weights, x = case.layer_weights(), case.array("x", int(cu_seqlens[-1]), case.model_dim)
    truths = [_truth(implementation, each, x[None, r], weights) for each, r in zip(alone, rows)]
    return _Packed(case, batch, weights, x, cu_seqlens, lengths, rows, alone, truths)


def packed(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G4: sequences one behind the other are what each is by itself."""
    given = _packed(implementation, case)
    case, x = given.case, given.x
    actual = as_float64(
        "varlen",
        call(implementation.run, "varlen", case, given.weights, x, given.cu_seqlens),
        (len(x), case.layer_width),
    )
    compared = []
    try:
        for i, (rows, truth) in enumerate(zip(given.rows, given.truths)):
            part = f"of sequence {i}"
            expected, out = _expected(given.alone[i], truth), truth.undecided
            have = actual[None, rows]
            bound = np.where(out[..., None], np.inf, truth.bounds.out)
            compared.append(compare("G4", "varlen", have, expected, bound, part=part))
    except Broken as broken:
        raise given.blame(implementation, broken, backward=False) from None
    return given.settled(compared)


def packed_where_scores_decide(
    prop: Property, implementation: Implementation, case: Case
) -> Outcome:
    """The same, of sequences in which a choice shows."""
    _check_scores_decide(case)
    return packed(prop, implementation, case)


def packed_gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G4: so are their gradients; those of the weights, which they share, add up."""
    given = _packed(implementation, case)
    case, x = given.case, given.x
    d_out = case.array("d_out", len(x), case.layer_width)
    d_out = np.where(given.undecided[:, None], 0, d_out).astype(d_out.dtype)
    arguments = given.weights, x, given.cu_seqlens, d_out
    found = _run_vjp(implementation, "varlen", "G4", case, *arguments)
    of_each, bounds_of_each, compared = [], [], []
    sizes: dict[str, Any] = case.geometry
    try:
        for i, (rows, truth) in enumerate(zip(given.rows, given.truths)):
            alone = given.alone[i]
            dx, dweights, bounds = _true_gradients(implementation, alone, truth, d_out[None, rows])
            assert bounds.dx is not None and bounds.dweights is not None  # d_out was given
            part = f"of sequence {i}"
            compared.append(compare("G4", "dx", found[0][None, rows], dx, bounds.dx, part=part))
            of_each.append(dweights)
            bounds_of_each.append(bounds.dweights)
        summed = {n: np.sum([each[n] for each in of_each], axis=0) for n in given.weights}
        numerics = implementation.numerics[case.dtype]
        bounds_of_sum = packed_weight_bounds(
            given.lengths, of_each, bounds_of_each, numerics=numerics, **sizes
        )
        part = f"summed over {len(given.lengths)} sequences"
        compared += _weights_compared("G4", found[1], summed, bounds_of_sum, part)
    except Broken as broken:
        raise given.blame(implementation, broken, backward=True) from None
    return given.settled(compared)


class _ThroughTheLayer(Implementation):
    """One branch of somebody's layer, as an implementation of that branch alone.

    x is a one-hot row for each token, so that `to_v` holds the values; its gate is open, the others
    are shut. A linear map that picks the last token of a window makes compressed values of them.
    """

    def __init__(self, implementation: Implementation) -> None:
        self.numerics = implementation.numerics
        self.implementation = implementation

    def offers(self, method: str) -> bool:
        return method in ("sliding", "compress", "fine")

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        return self._through(case, "sliding", v)

    def compress(
        self, case: Case, q: Any, k_cmp: Any, v_cmp: Any, mem_k: Any, mem_v: Any
    ) -> Attention:
        v = np.zeros((case.batch, case.kv_heads, case.kv_len, case.value_dim), v_cmp.dtype)
        for i, (_, stop) in enumerate(compress_windows(case.kv_len, case, case.semantics)):
            v[:, :, stop - 1] = v_cmp[:, :, i]
        return self._through(case, "compress", v, mem_v[0])

    def fine(self, case: Case, q: Any, k: Any, v: Any, block_indices: Any) -> Attention:
        return self._through(case, "fine", v, block_indices=block_indices)

    def _through(
        self,
        case: Case,
        branch: str,
        v: np.ndarray,
        mem_v: np.ndarray | None = None,
        block_indices: np.ndarray | None = None,
    ) -> Attention:
        dtype = DTYPES[case.dtype]
        weights = {name: np.zeros_like(weight) for name, weight in case.layer_weights().items()}
        weights = _with_gates(case, weights, (b == branch for b in BRANCHES))
        values = np.swapaxes(v[0], 1, 2).reshape(case.kv_heads * case.value_dim, case.kv_len)
        for name in ("to_v.weight", f"to_v_{branch}.weight"):
            if name in weights:
                weights[name][:, : case.kv_len] = values
        if "norm.weight" in weights:
            # the root mean square of a one-hot row, so that it stays one
            root = (1 / case.model_dim + NORM_EPS) ** 0.5
            weights["norm.weight"] = np.full(case.model_dim, root, dtype)
        if "to_out.weight" in weights:
            weights["to_out.weight"] = np.eye(*weights["to_out.weight"].shape, dtype=dtype)
        if "compress_v.weight" in weights:
            last = weights["compress_v.weight"][..., -case.value_dim :]
            last[...] = np.eye(case.value_dim, dtype=dtype)
        if mem_v is not None:
            weights["mem_v"] = mem_v
        x = np.zeros((case.batch, case.kv_len, case.model_dim), dtype)
        x[:, :, : case.kv_len] = np.eye(case.kv_len, dtype=dtype)
        method, extra = ("layer", ()) if block_indices is None else (
            "layer_with_blocks",
            (block_indices,),
        )  # fmt: skip
        found = call(self.implementation.run, method, case, weights, x, *extra)
        shape = (case.batch, case.kv_len, case.layer_width)
        out = as_float64(method, found, shape)[..., : case.q_heads * case.value_dim]
        out = out.reshape(case.batch, case.kv_len, case.q_heads, case.value_dim)
        return Attention(out.transpose(0, 2, 1, 3), None)  # type: ignore[arg-type]


def mask_through_the_layer(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """A branch's mask, bit by bit, read through the whole layer with one gate open."""
    branch = prop.the_branch
    _check_pairs(case)
    width = case.q_heads * case.value_dim if case.semantics.output_projection else 0
    if max(case.kv_len, width) > case.model_dim:
        raise Inconclusive(f"model_dim={case.model_dim} is no feature for each token and head")
    if branch is COMPRESS and case.compress_map not in ("linear", "linear_per_head"):
        raise Inconclusive("compressed values are read through a linear map")
    expected = oracle_mask(branch, case)
    if branch is COMPRESS and not expected.any():
        raise Inconclusive("no row with a visible key")
    through = _ThroughTheLayer(implementation)
    # input_norm rounds its weight, a quotient and a product; all else is exact on such inputs
    roundings = 5 if case.semantics.input_norm else 2
    actual = probes.forward_mask(through, branch, case, expected, roundings=roundings)
    if (actual != expected).any():
        if implementation.offers("layer"):
            # what is wrong with a single token, in the window for sure, is no mask
            window = case.sliding_window_size + 1
            alone = dataclasses.replace(case, q_len=1, kv_len=1, sliding_window_size=window)
            if is_declared(implementation, alone):
                own = alone.tokens(), alone.layer_weights()
                _compared(implementation, "layer", alone, *own, "G1")
        reading = f"{branch.name} mask read through the layer"
        raise wrong_mask(branch, prop.clause, case, expected, actual, reading)
    return Outcome()
