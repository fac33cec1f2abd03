"""Masks: as an implementation exposes them, as its forward reads, and as its backward reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nsa_ref.semantics import PRESETS, Semantics
from nsa_ref.testing import probes
from nsa_ref.testing.branches import COMPRESS, FINE, Branch, call
from nsa_ref.testing.case import Case
from nsa_ref.testing.compare import first_at, wrong_element
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.pictures import excerpt
from nsa_ref.testing.properties.common import Outcome, Property, is_declared, oracle_mask
from nsa_ref.testing.verdicts import Broken, Convention, NoAnswer, Raised, WrongMask

#: The switches that change a branch's mask, and the other value that such a switch can have.
SWITCHES = {
    "sliding": ("window_closed", "causal"),
    "compress": ("compress_strict", "compress_alignment", "causal"),
    "fine": ("duplicates", "own_block_extra", "causal"),
}
OTHER: dict[Any, Any] = {True: False, False: True, "start": "end", "end": "start"}
OTHER |= {"set": "multiset", "multiset": "set"}


def wrong_cell(
    branch: Branch,
    case: Case,
    at: tuple[int, ...],
    expected: int,
    actual: int,
    reading: str,
    gradient: str = "",
) -> WrongMask:
    """The cell at (batch, query head, row, column), and how often it must be and is seen.

    reading, gradient : as in `WrongMask`
    """
    b, h, t, j = at
    return WrongMask(
        tensor=f"{branch.name} {gradient or 'mask'}",
        reading=reading,
        gradient=gradient,
        batch=b,
        query_head=h,
        row=t,
        position=t + case.kv_len - case.q_len,
        column=j,
        expected=int(expected),
        actual=int(actual),
        columns=branch.columns(case),
    )


def wrong_mask(
    branch: Branch,
    clause: str,
    case: Case,
    expected: np.ndarray,
    actual: np.ndarray,
    reading: str,
    *,
    is_list: bool = False,
) -> Broken:
    """The first wrong cell, the masks around it, the switch that would explain it.

    is_list : a list beside a predicate that was found right, which follows no convention
    """
    at = b, h, _, j = first_at(expected != actual)
    block = j - case.num_mem_kv if branch is COMPRESS and j >= case.num_mem_kv else None
    masks = excerpt(expected[b, h], actual[b, h])
    counts = expected[at], actual[at]
    fault = wrong_cell(branch, case, at, *counts, reading)
    fault = dataclasses.replace(fault, block=block, masks=masks)
    return Broken(clause, fault, convention=None if is_list else _convention(branch, case, actual))


def _convention(branch: Branch, case: Case, actual: np.ndarray) -> Convention | None:
    """The single switch, or the preset, that would explain what was seen."""

    def explains(semantics: Semantics) -> bool:
        mask = branch.mask(dataclasses.replace(case, semantics=semantics), indices)
        return mask.shape == actual.shape and bool((mask == actual).all())

    actual = np.where(actual == -2, 0, actual)  # 0 / 0, if the row sees no key
    indices = case.block_indices() if branch is FINE else None
    for switch in SWITCHES[branch.name]:
        value = OTHER[getattr(case.semantics, switch)]
        if explains(dataclasses.replace(case.semantics, **{switch: value})):
            return Convention(switch, value)
    for name, preset in PRESETS.items():
        # a preset's own duplicates, alignment and strictness, all at once
        if preset.causal == case.semantics.causal and explains(preset):
            return Convention("preset", name)
    return None


def exposed(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """The mask that the implementation shows, in each way in which it can be read."""
    branch = prop.the_branch
    arguments = (case.block_indices(),) if branch is FINE else ()
    expected = branch.mask(case, *arguments or (None,))
    value = call(implementation.run, f"{branch.name}_mask", case, *arguments)
    for name, actual, is_list in probes.exposed_readings(value, *expected.shape[2:]):
        try:
            # a view first: nobody has the memory for some shapes that are wrong
            actual = np.broadcast_to(actual, expected.shape).astype(np.int64)
        except ValueError:
            raise Raised(
                f"{branch.name}_mask {name} has shape {actual.shape}; it must broadcast to "
                f"{expected.shape}"
            ) from None
        if (actual != expected).any():
            reading = f"{branch.name}_mask as exposed{', ' if name else ''}{name}"
            raise wrong_mask(branch, prop.clause, case, expected, actual, reading, is_list=is_list)
    return Outcome(compared=expected.size)


def read_forward(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """The mask that the forward shows when one-hot values are read through it."""
    branch = prop.the_branch
    expected = oracle_mask(branch, case)
    actual = probes.forward_mask(implementation, branch, case, expected)
    if (actual != expected).any():
        _blame_the_values(implementation, branch, case)
        reading = f"{branch.name}, forward read out by one-hot values"
        raise wrong_mask(branch, prop.clause, case, expected, actual, reading)
    return Outcome(compared=expected.size)


def _blame_the_values(implementation: Implementation, branch: Branch, case: Case) -> None:
    """Raise Broken for A1 if no row is a finite number, not even with every key in sight.

    A row that a wrong mask leaves without a key is NaN as well, but not where everything is to be
    seen.
    """
    all_blocks = {"indices": "all", "num_selected_blocks": case.num_selection_blocks}
    open_to: dict[str, dict[str, Any]] = {
        "sliding": {"sliding_window_size": case.q_len + case.kv_len},
        "fine": all_blocks,
        # the last row, far behind some blocks
        "compress": {
            "q_len": 1,
            "kv_len": case.compress_block_size + 2 * case.compress_block_sliding_stride + 1,
        },
    }
    drawn, case = case, dataclasses.replace(case, **open_to[branch.name])
    if not is_declared(implementation, case, drawn):
        return
    inputs = probes.zeros(case, branch)
    inputs = dataclasses.replace(inputs, v=np.ones_like(inputs.v))
    sees = np.asarray(oracle_mask(branch, case).any(-1))
    try:
        out = branch.forward(implementation, case, inputs).out
    except (Raised, NoAnswer, NotOffered):
        return
    if sees.any() and not np.isfinite(out[sees]).any():
        why = "q = k = 0, v = 1, and every key is visible"
        at = first_at(np.broadcast_to(sees[..., None], out.shape))
        fault = wrong_element(f"{branch.name} out", at, out, np.ones_like(out), why=why)
        raise Broken("A1", fault)


def blame_the_mask(implementation: Implementation, case: Case, prop: Property) -> bool:
    """Whether the forward could be read, and reads what it should.

    Raises
    ------
    Broken : it reads other keys: for the property's own clause, if that is about a mask
    """
    own = prop.clause[0] in "WCF"
    clause = prop.clause if own else prop.the_branch.mask_clause(case)
    try:
        read_forward(dataclasses.replace(prop, clause=clause), implementation, case)
    except (Raised, NoAnswer, NotOffered):
        return False
    return True


def read_backward(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """The mask that gradients show: which pairs of rows and columns take part in them."""
    branch = prop.the_branch
    mask, compared = oracle_mask(branch, case), 0
    for pattern in probes.backward_patterns(implementation, branch, case, mask):
        wrong = pattern.wrong()
        if not wrong.any():
            compared += int(pattern.decided.sum())
            continue
        at = first_at(wrong)
        expected = pattern.visible[at[:2]].astype(int)
        seen = np.where(pattern.decided[at[:2]], pattern.seen[at[:2]], expected).astype(int)
        counts = pattern.visible[at], pattern.seen[at]
        how = f"{branch.name}, backward read out"
        fault = wrong_cell(branch, case, at, *counts, how, pattern.gradient)
        # an empty row shows nothing in the forward
        right = blame_the_mask(implementation, case, prop) and mask[at[:3]].any()
        but = "the forward is right" if right else ""
        raise Broken("A3", dataclasses.replace(fault, but=but, masks=excerpt(expected, seen)))
    return Outcome(compared=compared)
