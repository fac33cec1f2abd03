"""Packed sequences (G4): sequences of different lengths in one batch are what each is by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from nsa_ref.layer_bounds import packed_weight_bounds
from nsa_ref.testing.branches import call, checked_tensor
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.compare import check_bits, compare
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.properties import layer
from nsa_ref.testing.properties.common import (
    Outcome,
    Property,
    can_be_asked,
    chooses_lengths,
    is_declared,
    settle,
)
from nsa_ref.testing.properties.layer import Asked, Truth, Weights
from nsa_ref.testing.strategies import fresh_seeds
from nsa_ref.testing.verdicts import Broken


@dataclass(frozen=True)
class Packed:
    """Sequences one behind the other, and what each is by itself.

    asked : `varlen`, with the tokens of all sequences
    drawn : the case, whose batch is declared, should 1 not be
    rows : where each sequence stands among the tokens
    truths : what the definition says to each, as a batch of 1
    """

    asked: Asked
    drawn: Case
    cu_seqlens: np.ndarray
    rows: list[slice]
    truths: list[Truth]

    @classmethod
    def of(cls, implementation: Implementation, case: Case) -> Packed:
        """The sequences of a case, of the lengths that are declared."""
        layer.check_pairs(case)
        alone = _sequences(implementation, case)
        cu_seqlens = np.cumsum([0, *(each.kv_len for each in alone)]).astype(np.int64)
        rows = [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
        x = case.array("x", int(cu_seqlens[-1]), case.model_dim)
        one, weights = dataclasses.replace(case, batch=1), case.layer_weights()
        asked = Asked(implementation, "varlen", one, x, weights)
        truths = [
            Truth.of(implementation, each, x[None, r], weights) for each, r in zip(alone, rows)
        ]
        return cls(asked, case, cu_seqlens, rows, truths)

    @property
    def given(self) -> tuple[Weights, np.ndarray, np.ndarray]:
        """What `varlen` is called with."""
        return self.asked.weights, self.asked.x, self.cu_seqlens

    @property
    def given_before(self) -> tuple[Weights, np.ndarray, np.ndarray]:
        """What a request before it has: other tokens, and the lengths in another order."""
        lengths = np.diff(self.cu_seqlens)
        others = lengths[::-1]
        if (others == lengths).all():
            others = np.roll(lengths, 1)
        offsets = np.cumsum([0, *others]).astype(np.int64)
        earlier = fresh_seeds(self.drawn, 1)[0]
        of_earlier = dataclasses.replace(self.asked, weights=earlier.layer_weights())
        weights = layer.weights_before(self.asked, of_earlier)
        return weights, earlier.array("x", *self.asked.x.shape), offsets

    @property
    def d_out(self) -> np.ndarray:
        """Upstream gradients, 0 in rows that are undecided."""
        d_out = self.drawn.array("d_out", len(self.asked.x), self.drawn.layer_width)
        return np.where(self.undecided[:, None], 0, d_out).astype(d_out.dtype)

    def rows_of(self, found: Any) -> np.ndarray:
        """What `varlen` returned, float64, if it has the form that the plug says."""
        case = self.asked.case
        return checked_tensor(case, "varlen", found, (len(self.asked.x), case.layer_width))

    @property
    def undecided(self) -> np.ndarray:
        """Rows for which another choice of blocks may be right: (tokens,)."""
        none = np.zeros(0, dtype=bool)
        return np.concatenate([none, *(truth.undecided[0] for truth in self.truths)])

    def summed(
        self, of_each: Sequence[Weights], bounds_of_each: Sequence[Weights]
    ) -> tuple[Weights, Weights]:
        """Gradients of the weights, summed over the sequences, and the bounds of the sums."""
        summed = {n: np.sum([each[n] for each in of_each], axis=0) for n in self.asked.weights}
        asked = self.asked
        bounds = packed_weight_bounds(
            [truth.case.kv_len for truth in self.truths],
            of_each,
            bounds_of_each,
            numerics=asked.implementation.numerics[asked.case.dtype],
            **asked.case.geometry,
        )
        return summed, bounds

    def blame(self, broken: Broken, *, backward: bool) -> Broken:
        """The finding, noted if nobody can tell whether the layer itself is right.

        Raises
        ------
        Broken : if it is not, for what is wrong with it
        """
        implementation = self.asked.implementation
        offers = implementation.offers_vjp if backward else implementation.offers
        if not offers("layer"):
            return broken.noted(("no layer gradients" if backward else "no layer", "varlen"))
        for truth, rows in zip(self.truths, self.rows):
            alone = _as_batch(implementation, self.drawn, truth.case)
            if not can_be_asked(implementation, "layer_vjp" if backward else "layer", alone):
                continue
            x = np.repeat(self.asked.x[None, rows], alone.batch, axis=0)
            asked = Asked(implementation, "layer", alone, x, self.asked.weights)
            if backward:
                layer.check_gradients(asked, "A4")
            else:
                layer.check_output(asked, "G1")
        return broken


def _sequences(implementation: Implementation, case: Case) -> list[Case]:
    """The sequences of a case, of the lengths that are declared, each a batch of 1."""
    # packed tokens have no batch, so that limits of it do not matter
    lengths = chooses_lengths(implementation, case).sequence_lengths()
    every = [dataclasses.replace(case, q_len=n, kv_len=n) for n in lengths]
    every = [each for each in every if is_declared(implementation, each, case)]
    return [dataclasses.replace(each, batch=1) for each in every]


def _as_batch(implementation: Implementation, case: Case, alone: Case) -> Case:
    """A sequence by itself, as `layer` can be asked: of the case's batch, should 1 not be."""
    batch = 1 if is_declared(implementation, alone, case) else case.batch
    return dataclasses.replace(alone, batch=batch)


def output(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G4: sequences one behind the other are what each is by itself."""
    packed = Packed.of(implementation, case)
    return _check_output(
        packed, call(implementation.run, "varlen", packed.asked.case, *packed.given)
    )


def second_request(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G4: a request leaves the rows of the one before as they are, and has none of them.

    Both have as many tokens, and as many sequences, in another order of their lengths.
    """
    packed = Packed.of(implementation, case)
    both = packed.given_before, packed.given
    before, after, found = call(implementation.run_twice, "varlen", packed.asked.case, *both)
    one, other = (packed.rows_of(result) for result in (before, after))
    why, part = "the next request has changed it", "of the request before"
    check_bits("G4", "varlen", other, one, part=part, why=why)
    return _check_output(packed, found)


def _check_output(packed: Packed, found: Any) -> Outcome:
    """The rows that were returned, against those of every sequence by itself."""
    actual, compared = packed.rows_of(found), []
    try:
        for i, (rows, truth) in enumerate(zip(packed.rows, packed.truths)):
            bound = np.where(truth.undecided[..., None], np.inf, truth.bounds.out)
            tensors = actual[None, rows], truth.output, bound
            compared.append(compare("G4", "varlen", *tensors, part=f"of sequence {i}"))
    except Broken as broken:
        raise packed.blame(broken, backward=False) from None
    return layer.settle_rows(compared, packed.undecided)


def exact_numbers(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G4: in 16 bits, where the dtype holds every number on the way, no error is left.

    Raises
    ------
    Inconclusive : another dtype
    """
    one, alone = dataclasses.replace(case, batch=1), _sequences(implementation, case)
    weights, compared = layer.weights_of_exact_numbers(one), []
    ends = np.cumsum([0, *(each.kv_len for each in alone)]).astype(np.int64)
    x = np.ones((int(ends[-1]), case.model_dim), DTYPES[case.dtype])
    for branch in layer.told_in_exact_numbers(one):
        given = layer.with_one_gate(one, weights, branch)
        found = call(implementation.run, "varlen", one, given, x, ends)
        rows = checked_tensor(case, "varlen", found, (len(x), case.layer_width))
        for i, (each, (start, stop)) in enumerate(zip(alone, pairwise(ends.tolist()))):
            if not each.kv_len:
                continue
            asked = each, given, branch, rows[None, start:stop], f", of sequence {i}"
            try:
                compared.append(layer.compare_exactly("G4", "varlen", *asked))
            except Broken as broken:
                by_itself = _as_batch(implementation, case, each)
                if not can_be_asked(implementation, "layer", by_itself):
                    raise broken.noted(("no layer", "varlen")) from None
                layer.exactly("G1", "layer", implementation, by_itself, weights, branch)
                raise
    return settle(compared)


def gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G4: so are their gradients; those of the weights, which they share, add up."""
    packed = Packed.of(implementation, case)
    given = packed.cu_seqlens, packed.d_out
    return _check_gradients(packed, *layer.run_vjp(packed.asked, "G4", *given))


def second_gradients(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """G4: a request leaves the gradients of the one before as they are, and has none of them."""
    packed = Packed.of(implementation, case)
    asked, d_out = packed.asked, packed.d_out
    both = (*packed.given_before, d_out), (*packed.given, d_out)
    results = call(implementation.run_twice, "varlen_vjp", asked.case, *both)
    before, after, found = (layer.gradients_of(asked, "G4", result) for result in results)
    layer.check_unchanged("G4", before, after)
    return _check_gradients(packed, *found)


def _check_gradients(packed: Packed, dx: np.ndarray, dweights: Weights) -> Outcome:
    """The gradients that were returned, against those of every sequence by itself."""
    d_out = packed.d_out
    of_each, bounds_of_each, compared = [], [], []
    try:
        for i, (rows, truth) in enumerate(zip(packed.rows, packed.truths)):
            want_dx, want_dweights, bounds = truth.gradients(d_out[None, rows])
            assert bounds.dx is not None and bounds.dweights is not None  # d_out was given
            tensors = dx[None, rows], want_dx, bounds.dx
            compared.append(compare("G4", "dx", *tensors, part=f"of sequence {i}"))
            of_each.append(want_dweights)
            bounds_of_each.append(bounds.dweights)
        summed, bounds_of_sum = packed.summed(of_each, bounds_of_each)
        part = f"summed over {len(packed.rows)} sequences"
        compared += layer.compare_weights("G4", dweights, summed, bounds_of_sum, part)
    except Broken as broken:
        raise packed.blame(broken, backward=True) from None
    return layer.settle_rows(compared, packed.undecided)
