"""The whole layer: output, gradients, rotation, decoding (G1 to G3, A4), and who is to blame.

A layer chooses its blocks itself. Where scores lie so close together that a right layer may choose
otherwise, a row is *undecided*: it is counted, its output is not compared, and no gradient is sent
through it. A layer that takes blocks from outside is asked with the definition's choice as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsa_ref.layer import (
    branch_masks,
    layer,
    layer_block_indices,
    layer_vjp,
    projection_name,
    selection_inputs,
)
from nsa_ref.layer_bounds import BoundsOfLayer, LayerBounds
from nsa_ref.selection import scored, top_blocks
from nsa_ref.semantics import BRANCHES, ROTARY, Semantics
from nsa_ref.testing.branches import call, checked_tensor
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.choices import undecided_rows
from nsa_ref.testing.compare import Comparison, check_bits, compare
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.properties.common import (
    Outcome,
    Property,
    can_be_asked,
    is_declared,
    settle,
)
from nsa_ref.testing.strategies import fresh_seeds
from nsa_ref.testing.verdicts import (
    Broken,
    Convention,
    Failure,
    Inconclusive,
    Raised,
    Remark,
    WrongElement,
)

#: A gate's bias at which its sigmoid is 1 or 0, in every dtype.
SHUT = 1e4

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Truth:
    """The definition's side of a case, in float64.

    errors : the output and the gradients, and how far a right layer may be from them
    bounds : on the output, and on the scores of the choice
    undecided : bool (batch, kv_len), rows for which another choice of blocks may be right
    """

    case: Case
    x: np.ndarray
    weights: Weights
    block_indices: np.ndarray
    errors: BoundsOfLayer
    undecided: np.ndarray

    @classmethod
    def of(
        cls, implementation: Implementation, case: Case, x: np.ndarray, weights: Weights
    ) -> Truth:
        """That of a case which the implementation is asked."""
        check_pairs(case)
        given = x.astype(np.float64), {n: w.astype(np.float64) for n, w in weights.items()}
        how, numerics = case.geometry, implementation.numerics[case.dtype]
        blocks = scored(*selection_inputs(*given, **how), kv_len=x.shape[1], **how)
        block_indices = top_blocks(blocks, **how)
        errors = BoundsOfLayer(*given, block_indices, numerics=numerics, **how)
        assert errors.forward.scores is not None
        undecided = np.asarray(undecided_rows(blocks, errors.forward.scores, **how).any(axis=1))
        return cls(case, *given, block_indices, errors, undecided)

    @property
    def bounds(self) -> LayerBounds:
        return self.errors.forward

    @property
    def output(self) -> np.ndarray:
        """What a right layer returns, up to the bounds; NaN where it is NaN."""
        return self.errors.out

    def gradients(self, d_out: np.ndarray) -> tuple[np.ndarray, Weights, LayerBounds]:
        """dx, dweights, and the bounds on them."""
        return self.errors.gradients(d_out.astype(np.float64))


def check_pairs(case: Case) -> None:
    """NotOffered where limits leave nothing that could be turned."""
    if case.semantics.rotary != "none" and case.head_dim % 2:
        raise NotOffered(f"rotary={case.semantics.rotary!r} turns pairs, and head_dim is odd")


@dataclass(frozen=True)
class Asked:
    """What an implementation is asked: a method, and what it is called with."""

    implementation: Implementation
    method: str
    case: Case
    x: np.ndarray
    weights: Weights

    @classmethod
    def about(cls, implementation: Implementation, method: str, case: Case) -> Asked:
        """The case's own tokens and weights."""
        return cls(implementation, method, case, case.tokens(), case.layer_weights())

    @functools.cached_property
    def truth(self) -> Truth:
        """What the definition says to it."""
        return Truth.of(self.implementation, self.case, self.x, self.weights)

    def undecided(self, truth: Truth) -> np.ndarray:
        """Rows that may be right otherwise: none, if no choice of blocks of its own is read."""
        chooses = self.method != "layer_with_blocks" and not _is_shut(truth, "fine")
        return truth.undecided & chooses

    @property
    def d_out(self) -> np.ndarray:
        """Upstream gradients, 0 in rows that are undecided."""
        d_out = self.case.array("d_out", *self.x.shape[:2], self.case.layer_width)
        undecided = self.undecided(self.truth)[..., None]
        return np.where(undecided, 0, d_out).astype(d_out.dtype)

    def blocks(self, truth: Truth | None = None) -> tuple[np.ndarray, ...]:
        """The choice of blocks, if it is handed in; the definition's, unless there is another."""
        if self.method != "layer_with_blocks":
            return ()
        return (self.chosen if truth is None else truth.block_indices,)

    @functools.cached_property
    def chosen(self) -> np.ndarray:
        """The definition's choice; no bounds are computed, which nobody asks of a call before."""
        wide = {n: w.astype(np.float64) for n, w in self.weights.items()}
        return layer_block_indices(self.x.astype(np.float64), wide, **self.case.geometry)

    def compared(self, clause: str, truth: Truth, found: Any = None) -> Comparison:
        """The output against its bound; undecided rows are admitted whatever they hold.

        found : what was returned, if it was called already
        """
        run, case = self.implementation.run, self.case
        if found is None:
            found = call(run, self.method, case, self.weights, self.x, *self.blocks(truth))
        shape = (*self.x.shape[:2], case.layer_width)
        actual = checked_tensor(case, self.method, found, shape)
        bound = np.where(self.undecided(truth)[..., None], np.inf, truth.bounds.out)
        return compare(clause, self.method, actual, truth.output, bound)

    def is_right(self) -> bool:
        """True if the output is right."""
        try:
            self.compared("G1", self.truth)
        except (Broken, Raised):
            return False
        return True


def settle_rows(comparisons: Sequence[Comparison], undecided: np.ndarray) -> Outcome:
    """Several comparisons in one, and how many rows were undecided."""
    settled = settle(comparisons)
    compared = 0 if undecided.all() else settled.compared  # of no rows, too
    return dataclasses.replace(settled, ambiguous=int(undecided.sum()), compared=compared)


def scores_decide(case: Case) -> None:
    """Inconclusive where every block is chosen, whatever the scores are."""
    if case.batch == 0 or case.num_selection_blocks <= case.num_selected_blocks:
        raise Inconclusive("every block is chosen")


def rows_decode(case: Case) -> None:
    """Inconclusive where a row reads what is to come, so that no cache could have it."""
    some_empty = not case.num_mem_kv or not case.num_selected_blocks
    if some_empty and "uniform" in case.semantics.empty_row:
        raise Inconclusive("uniform rows")


# The output


def output(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1 by `layer` and `layer_with_blocks`, G3 by `decode`: every row is the definition's."""
    clause = "G3" if prop.method == "decode" else "G1"
    if clause == "G3":
        rows_decode(case)
    return check_output(Asked.about(implementation, prop.method, case), clause)


def second_request(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1, G3: a request leaves the rows of the one before as they are, and has none of them.

    Both are as long as each other.
    """
    if prop.clause == "G3":
        rows_decode(case)
    asked = Asked.about(implementation, prop.method, case)
    earlier = Asked.about(implementation, prop.method, fresh_seeds(case, 1)[0])
    given = weights_before(asked, earlier), earlier.x, *earlier.blocks()
    both = given, (asked.weights, asked.x, *asked.blocks())
    before, after, found = call(implementation.run_twice, prop.method, case, *both)
    shape = (*asked.x.shape[:2], case.layer_width)
    one, other = (checked_tensor(case, prop.method, result, shape) for result in (before, after))
    why, part = "the next request has changed it", "of the request before"
    check_bits(prop.clause, prop.method, other, one, part=part, why=why)
    return check_output(asked, prop.clause, found)


def weights_before(asked: Asked, earlier: Asked) -> Weights:
    """Those of the request before: the same in one case of two, as of a model that is in use."""
    return asked.weights if asked.case.seed % 2 else earlier.weights


def check_output(asked: Asked, clause: str, found: Any = None) -> Outcome:
    """Hold the output to its bound, and find the clause and the branch that are to blame.

    found : the output, if it was asked for already

    Raises
    ------
    Broken, Raised
    """
    try:
        compared = asked.compared(clause, asked.truth, found)
    except (Broken, Raised) as error:
        if clause != "G1" and can_be_asked(asked.implementation, "layer", asked.case):
            # what is wrong in parallel as well is not this clause's
            check_output(dataclasses.replace(asked, method="layer"), "G1")
        elif clause != "G1" and isinstance(error, Broken):
            raise error.noted(("no layer", asked.method)) from None
        if clause == "G1" and isinstance(error, Broken):
            _blame_the_rotation(asked)
            raise _located(error, asked) from None
        raise error
    return settle_rows([compared], asked.undecided(asked.truth))


def _blame_the_rotation(asked: Asked) -> None:
    """Raise Broken for G2 if another value of `rotary` explains what is wrong with the output.

    Or if wrong logits of rotated branches do: with to_q = 0 all logits are 0, turned or not. The
    compressed branch is shut, unless it is turned as well: its keys may be wrong by themselves.
    What is wrong is explained if the same row is right, and decided, in another way.
    """
    implementation, case, own = asked.implementation, asked.case, asked.case.semantics

    def tried(weights: Weights, semantics: Semantics = own) -> tuple[Broken | None, np.ndarray]:
        """What is wrong with the output for these weights, by these semantics; undecided rows."""
        other = dataclasses.replace(case, semantics=semantics)
        truth = Truth.of(implementation, other, asked.x, weights)
        try:
            dataclasses.replace(asked, weights=weights).compared("G2", truth)
        except Broken as broken:
            return broken, asked.undecided(truth)
        return None, asked.undecided(truth)

    def explained(found: Broken, weights: Weights, semantics: Semantics = own) -> bool:
        """Whether nothing is wrong with these, and the row that was wrong is decided."""
        assert isinstance(found.fault, WrongElement)  # as `compare` has it
        wrong, undecided = tried(weights, semantics)
        return wrong is None and not undecided[found.fault.index[:2]]

    found, _ = tried(asked.weights)
    if found is None:
        return
    for value in ROTARY:
        if value == own.rotary or case.head_dim % 2:
            continue
        if explained(found, asked.weights, dataclasses.replace(own, rotary=value)):
            raise found.noted(convention=Convention("rotary", value))
    if own.rotary == "none":
        return
    if (with_blocks := _with_blocks(asked)) is not None:
        if with_blocks.is_right():
            return  # it chooses other blocks
        asked = with_blocks  # which decides every row
    for semantics in implementation.semantics:
        plain = dataclasses.replace(case, semantics=semantics)
        unrotated = semantics.rotary == "none" and is_declared(implementation, plain, case)
        if unrotated and not Asked.about(implementation, asked.method, plain).is_right():
            return  # wrong where nothing is turned as well
    turned = [b for b in BRANCHES if own.rotary != "fine_and_sliding" or b != "compress"]
    for opened in (turned, [b for b in turned if b != "fine"]):
        # with to_q = 0 scores tie: where the fine branch is open, few rows are decided
        weights = with_gates(case, asked.weights, (branch in opened for branch in BRANCHES))
        found, _ = tried(weights)
        flat = {**weights, "to_q.weight": np.zeros_like(weights["to_q.weight"])}
        if found is None or not explained(found, flat):
            continue
        if explained(found, _one_key_head(case, weights)):
            return  # heads read the keys of others
        raise found.noted(("right without q",))


def _is_shut(truth: Truth, branch: str) -> bool:
    """True if the branch's gate is shut, whatever x is."""
    heads, i = truth.case.q_heads, BRANCHES.index(branch)
    weight, bias = (truth.weights[f"gates.{name}"] for name in ("weight", "bias"))
    its = slice(i * heads, (i + 1) * heads)
    return bool((bias[its] < -SHUT / 2).all() and not weight[its].any())


def _one_key_head(case: Case, weights: Weights) -> Weights:
    """The weights with the keys of all kv heads alike."""
    by_head = ["to_k", "mem_k", "compress_k.positions"]
    if case.compress_map == "linear_per_head":
        by_head.append("compress_k")

    def of_first(weight: np.ndarray) -> np.ndarray:
        heads = weight.reshape(case.kv_heads, -1)
        return np.repeat(heads[:1], case.kv_heads, axis=0).reshape(weight.shape)

    alike = {n: of_first(w) for n, w in weights.items() if n.startswith(tuple(by_head))}
    return {**weights, **alike}


def _with_blocks(asked: Asked) -> Asked | None:
    """The same with the choice of blocks handed in, if `layer` was asked and that is offered."""
    method = "layer_with_blocks"
    if asked.method != "layer" or not can_be_asked(asked.implementation, method, asked.case):
        return None
    return dataclasses.replace(asked, method=method)


def _located(broken: Broken, asked: Asked) -> Broken:
    """The finding, and which branches are wrong by themselves: one gate open, the others shut."""

    def right_alone(asked: Asked, branch: str) -> bool:
        weights = with_gates(asked.case, asked.weights, (b == branch for b in BRANCHES))
        return dataclasses.replace(asked, weights=weights).is_right()

    wrong = [b for b in BRANCHES if not right_alone(asked, b)]
    right = [b for b in BRANCHES if b not in wrong]
    handed, with_blocks = None, _with_blocks(asked)
    if wrong == ["fine"] and with_blocks is not None:
        handed = right_alone(with_blocks, "fine")
    return broken.noted(("gates", wrong, right, handed))


def with_gates(case: Case, weights: Weights, opened: Iterable[bool]) -> Weights:
    """The weights with every branch's gate fully open or shut, whatever x is."""
    bias = np.repeat([SHUT if is_open else -SHUT for is_open in opened], case.q_heads)
    return {
        **weights,
        "gates.weight": np.zeros_like(weights["gates.weight"]),
        "gates.bias": bias.astype(DTYPES[case.dtype]),
    }


# Numbers that the dtype holds


def exact_numbers(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1, G3: in 16 bits, where the dtype holds every number on the way, no error is left.

    All tokens are 1, q and k are 0, values are powers of two, one branch's gates are open and the
    others shut. What float32 adds is far less than half the way to a number's neighbour, and lost
    when it is stored. So it is where a row sees 2^i keys, and the dtype holds their weights.

    Raises
    ------
    Inconclusive : another dtype
    """
    if prop.clause == "G3":
        rows_decode(case)
    compared, weights = [], weights_of_exact_numbers(case)
    for branch in told_in_exact_numbers(case):
        try:
            compared.append(
                exactly(prop.clause, prop.method, implementation, case, weights, branch)
            )
        except Broken as broken:
            if prop.clause != "G1" and not can_be_asked(implementation, "layer", case):
                raise broken.noted(("no layer", prop.method)) from None
            if prop.clause != "G1":
                # what is wrong in parallel as well is not this clause's
                exactly("G1", "layer", implementation, case, weights, branch)
            raise
    return settle(compared)


def no_narrow_dtype(implementation: Implementation) -> Remark | None:
    """Why a port is not asked in numbers that 16 bits hold."""
    narrow = any(DTYPES[dtype].itemsize == 2 for dtype in implementation.numerics)
    return None if narrow else ("not 16 bits",)


def sixteen_bits(case: Case) -> None:
    """Inconclusive for another dtype."""
    if DTYPES[case.dtype].itemsize > 2:
        raise Inconclusive("not 16 bits")


def weights_of_exact_numbers(case: Case) -> Weights:
    """Weights with which the dtype holds every number on the way, for tokens of 1.

    Raises
    ------
    Inconclusive : another dtype than of 16 bits
    """
    check_pairs(case)
    sixteen_bits(case)
    dtype = DTYPES[case.dtype]
    weights = {name: np.zeros_like(w) for name, w in case.layer_weights().items()}
    rng = case.generator("powers of two")
    for name, weight in weights.items():
        if name.startswith("to_v"):
            exponents = rng.integers(-2, 3, len(weight))
            weight[:, 0] = rng.choice([-1.0, 1.0], len(weight)) * 2.0**exponents
        elif name == "norm.weight":
            weight[...] = 1
        elif name == "to_out.weight":
            weight[...] = np.eye(*weight.shape, dtype=dtype)
        elif name == "compress_v.weight":
            # of a linear map, the window's last token
            weight[..., -case.value_dim :] = np.eye(case.value_dim, dtype=dtype)
    # memory holds what all other values of a head are, so that their mean is each of them
    compressed = weights[projection_name("v", "compress", case.semantics)][:, 0]
    weights["mem_v"][...] = compressed.reshape(case.kv_heads, 1, case.value_dim)
    return weights


def told_in_exact_numbers(case: Case) -> list[str]:
    """The branches whose rows the definition can tell exactly."""
    told = ["sliding"]
    if case.num_selected_blocks >= case.num_selection_blocks and not case.semantics.score_floor:
        told.append("fine")  # all blocks are chosen
    if case.compress_map in ("linear", "linear_per_head"):
        told.append("compress")
    return told


def with_one_gate(case: Case, weights: Weights, branch: str, *, at_half: bool = False) -> Weights:
    """The weights with this branch's gates open, and the others shut.

    A gate is 1/2, or close to another number that the dtype holds: some sigmoids are right at 0
    alone. Its logit is the bias, or comes of the tokens, which are 1.

    at_half : all gates are 1/2
    """
    dtype, heads, start = DTYPES[case.dtype], case.q_heads, BRANCHES.index(branch) * case.q_heads
    rng = case.generator("gates of exact numbers")
    logits = rng.choice(told_logits(case.dtype), heads) * (rng.random(heads) < 0.7)
    if at_half:
        logits = np.zeros(heads)
    of_tokens = rng.random(heads) < 0.5
    its = slice(start, start + heads)
    bias = np.full(len(BRANCHES) * heads, -SHUT)
    bias[its] = np.where(of_tokens, 0, logits)
    weight = np.zeros_like(weights["gates.weight"])
    weight[its, 0] = np.where(of_tokens, logits, 0)
    return {**weights, "gates.weight": weight, "gates.bias": bias.astype(dtype)}


@functools.cache
def told_logits(dtype: str) -> np.ndarray:
    """Numbers of the dtype whose sigmoid is stored as one number, however it is computed.

    In float32, it is at most 3/8 of a step away from that number, and half a step away another one
    would be as near. Where every operation is stored, each of three formulas ends there as well.
    """
    kind, logits = DTYPES[dtype], np.arange(-32, 33) / 8

    def stored(x: np.ndarray) -> np.ndarray:
        return np.asarray(x, np.float32).astype(kind).astype(np.float64)

    gates = 1 / (1 + np.exp(-logits))
    told = stored(gates)
    below = np.nextafter(told.astype(kind), np.zeros(1, kind)).astype(np.float64)
    holds = np.abs(gates - told) <= (told - below) * 3 / 8
    exp, tanh = stored(np.exp(logits)), stored(np.tanh(logits / 2))
    for gate in (1 / stored(1 + stored(np.exp(-logits))), exp / stored(1 + exp), (1 + tanh) / 2):
        holds &= stored(gate) == told
    return np.asarray(logits[holds])


def exactly(
    clause: str,
    method: str,
    implementation: Implementation,
    case: Case,
    weights: Weights,
    branch: str,
) -> Comparison:
    """The output of any method but `varlen` with one gate open, in exact numbers."""
    given = with_one_gate(case, weights, branch)
    x = np.ones((case.batch, case.kv_len, case.model_dim), DTYPES[case.dtype])
    blocks = Asked(implementation, method, case, x, given).blocks()
    found = call(implementation.run, method, case, given, x, *blocks)
    actual = checked_tensor(case, method, found, (*x.shape[:2], case.layer_width))
    return compare_exactly(clause, method, case, given, branch, actual)


def compare_exactly(
    clause: str,
    method: str,
    case: Case,
    weights: Weights,
    branch: str,
    actual: np.ndarray,
    of: str = "",
) -> Comparison:
    """Rows of tokens of 1 against the definition's, where they see 2^i keys.

    of : which sequence they are of
    """
    x = np.ones((case.batch, case.kv_len, case.model_dim))
    how = case.geometry
    given = x, {n: w.astype(np.float64) for n, w in weights.items()}
    blocks = layer_block_indices(*given, **how)
    held = _rows_of_exact_numbers(case, blocks, branch)
    held = held.swapaxes(1, 2).repeat(case.value_dim, axis=2)
    # what to_out has beyond all heads is 0
    expected = layer(*given, block_indices=blocks, **how)
    expected = expected.astype(DTYPES[case.dtype]).astype(np.float64)
    width = expected.shape[2]
    held = np.pad(held, [(0, 0), (0, 0), (0, max(0, width - held.shape[2]))])[..., :width]
    bound = np.where(held & np.isfinite(expected), 0.0, np.inf)
    expected = np.where(np.isfinite(expected), expected, actual)  # left to A2
    part = f"of tokens of 1, with the {branch} gates alone{of}"
    why = "the dtype holds every number on the way, or one that is close to it"
    return compare(clause, method, actual, expected, bound, part=part, why=why)


def exact_gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1: so no error is left in the gradients of a gate of 1/2, its values and the projection.

    d_out is 1 at one feature of each head, in one row, which sees 2^i keys: all sums are of a few
    numbers of one size. What 16 bits do not hold all the same, and NaN rows, are not compared.

    Raises
    ------
    Inconclusive : another dtype
    """
    weights, dtype = weights_of_exact_numbers(case), DTYPES[case.dtype]
    x = np.ones((case.batch, case.kv_len, case.model_dim), dtype)
    compared = []
    for branch in told_in_exact_numbers(case):
        given = with_one_gate(case, weights, branch, at_half=True)
        wide = x.astype(np.float64), {n: w.astype(np.float64) for n, w in given.items()}
        blocks = layer_block_indices(*wide, **case.geometry)
        rows = np.flatnonzero(_rows_of_exact_numbers(case, blocks, branch).all(axis=(0, 1)))
        if not rows.size:
            continue
        heads, dim = np.arange(case.q_heads), case.value_dim
        features = heads * dim + heads % dim
        d_out = np.zeros((*x.shape[:2], case.layer_width), dtype)
        d_out[:, rows[-1], features[features < case.layer_width]] = 1
        asked = Asked(implementation, prop.method, case, x, given)
        _, found = run_vjp(asked, prop.clause, d_out)
        back = d_out.astype(np.float64)
        _, wanted = layer_vjp(*wide, back, block_indices=blocks, **case.geometry)
        values = projection_name("v", branch, case.semantics)
        for name in ("gates.bias", "gates.weight", values, "to_out.weight"):
            if name not in wanted:
                continue
            want, have = wanted[name], found[name]
            held = np.isfinite(want) & (want.astype(dtype).astype(np.float64) == want)
            compared.append(
                compare(
                    prop.clause,
                    f"d{name}",
                    have,
                    np.where(held, want, have),
                    np.where(held, 0.0, np.inf),
                    part=f"of tokens of 1, with the {branch} gate at 1/2",
                    why="the dtype holds every number on the way",
                )
            )
    return settle(compared)


def _rows_of_exact_numbers(case: Case, blocks: np.ndarray, branch: str) -> np.ndarray:
    """Which rows see 2^i keys, so that a dtype holds their weights: (batch, q_heads, kv_len)."""
    mask = branch_masks(case.kv_len, case.kv_len, blocks, **case.geometry)[branch]
    keys = mask.sum(-1) * np.ones((case.batch, case.q_heads, case.kv_len))
    return np.where(keys > 0, np.log2(np.maximum(keys, 1)) % 1 == 0, False)


# The gradients


def gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1: gradients of x and of every weight with the choice handed in; A4: with its own."""
    return check_gradients(Asked.about(implementation, prop.method, case), prop.clause)


def second_gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G1: a request leaves the gradients of the one before as they are, and has none of them."""
    asked = Asked.about(implementation, prop.method, case)
    earlier = Asked.about(implementation, prop.method, fresh_seeds(case, 1)[0])
    given = weights_before(asked, earlier), earlier.x, *earlier.blocks(), earlier.d_out
    both = given, (asked.weights, asked.x, *asked.blocks(), asked.d_out)
    results = call(implementation.run_twice, f"{prop.method}_vjp", case, *both)
    before, after, _ = (gradients_of(asked, prop.clause, result) for result in results)
    check_unchanged(prop.clause, before, after)
    try:
        return check_gradients(asked, prop.clause, results[2])
    except Broken:
        check_gradients(asked, "A4")  # what is wrong in a request by itself is not of two
        raise


def check_unchanged(
    clause: str, before: tuple[np.ndarray, Weights], after: tuple[np.ndarray, Weights]
) -> None:
    """Raise Broken if gradients of one request are others once the next has run."""
    why, part = "the next request has changed it", "of the request before"
    pairs = {"dx": (after[0], before[0])}
    pairs |= {f"d{name}": (after[1][name], was) for name, was in before[1].items()}
    for name, (is_now, was) in pairs.items():
        check_bits(clause, name, is_now, was, part=part, why=why)


def check_gradients(asked: Asked, clause: str, found: Any = None) -> Outcome:
    """Hold the gradients to their bounds.

    found : what was returned, if it was called already

    Raises
    ------
    Broken, Raised : A4 only if the output is right, and gradients are with the choice handed in
    """
    truth, undecided, d_out = asked.truth, asked.undecided(asked.truth), asked.d_out
    if found is None:
        dx, dweights = run_vjp(asked, "G1", *asked.blocks(truth), d_out)
    else:
        dx, dweights = gradients_of(asked, "G1", found)
    want_dx, want_dweights, bounds = truth.gradients(d_out)
    assert bounds.dx is not None and bounds.dweights is not None  # d_out was given
    try:
        compared = [
            compare(clause, "dx", dx, want_dx, bounds.dx),
            *compare_weights(clause, dweights, want_dweights, bounds.dweights),
        ]
    except Broken as broken:
        if clause != "A4":
            raise
        # a wrong choice has wrong gradients, too
        if can_be_asked(asked.implementation, "layer", asked.case):
            check_output(dataclasses.replace(asked, method="layer"), "G1")
        if not can_be_asked(asked.implementation, "layer_with_blocks_vjp", asked.case):
            raise broken.noted(("maybe A4",), clause="G1") from None
        # wrong with the choice handed in, too: nothing to do with the choice
        check_gradients(dataclasses.replace(asked, method="layer_with_blocks"), "G1")
        raise
    return settle_rows(compared, undecided)


def run_vjp(asked: Asked, clause: str, *more: np.ndarray) -> tuple[np.ndarray, Weights]:
    """The gradients that are returned: dx and dweights."""
    given = asked.case, asked.weights, asked.x, *more
    return gradients_of(asked, clause, call(asked.implementation.run_vjp, asked.method, *given))


def gradients_of(asked: Asked, clause: str, found: Any) -> tuple[np.ndarray, Weights]:
    """dx and dweights, float64, if what was returned has the form that the plug says."""
    method, x, weights = asked.method, asked.x, asked.weights
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        what = f"{method}_vjp must return (dx, dweights), a tuple with a dict"
        raise Broken(clause, Failure(kind="result", tensor=method, what=what))
    if set(found[1]) != set(weights):
        missing = sorted(set(weights) - set(found[1]))
        unknown = sorted(set(found[1]) - set(weights))
        what = f"{method}_vjp lacks gradients of {missing}, has {unknown}"
        raise Broken(clause, Failure(kind="result", tensor=method, what=what))
    check = functools.partial(checked_tensor, asked.case)
    dweights = {n: check(f"d{n}", found[1][n], w.shape) for n, w in weights.items()}
    return check("dx", found[0], x.shape), dweights


def compare_weights(
    clause: str, found: Weights, expected: Weights, bounds: Weights, part: str = ""
) -> list[Comparison]:
    """The gradient of every weight against its bound."""
    return [
        compare(clause, f"d{name}", found[name], want, bounds[name], part=part)
        for name, want in expected.items()
    ]
