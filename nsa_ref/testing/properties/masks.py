"""Masks: as an implementation exposes them, as its forward reads, and as its backward reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nsa_ref.semantics import PRESETS, Semantics
from nsa_ref.testing import probes
from nsa_ref.testing.branches import COMPRESS, FINE, Branch, Broken, Raised, call
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.pictures import side_by_side
from nsa_ref.testing.properties.common import Outcome, Property, first_at, oracle_mask

#: How a remark begins that the definition and the port may differ on purpose.
CONVENTION = "This may be a difference of convention"
REMEDY = "If it is meant, declare it in `semantics`."


def mask_broken(
    branch: Branch, clause: str, case: Case, expected: np.ndarray, actual: np.ndarray, how: str
) -> Broken:
    """The first wrong cell in the clause's terms, the masks side by side, the likely switch."""
    b, h, t, j = first_at(expected != actual)
    want, have = int(expected[b, h, t, j]), int(actual[b, h, t, j])
    p = t + case.kv_len - case.q_len
    if have < 0:
        deed = f"reads more than the {branch.columns(case)} columns that there are"
    elif want and have:
        deed = f"counts column {j} {have} times, the definition {want} times"
    else:
        deed = f"{'misses' if want else 'reads'} column {j}"
    memory = case.num_mem_kv if branch is COMPRESS else 0
    if branch is COMPRESS and j >= memory and want != have:
        deed += f" (block {j - memory})"
    text = (
        f"{how}: batch {b}, query head {h}, row t={t} (p={p}) {deed}\n"
        f"{side_by_side(expected[b, h], actual[b, h])}"
    )
    # lists beside a predicate that was found right follow no convention
    hint = "" if how.endswith(" lists") else _convention(branch, case, actual)
    return Broken(clause, f"{text}\n{hint}" if hint else text)


def _convention(branch: Branch, case: Case, actual: np.ndarray) -> str:
    """Which single switch, or which preset, would explain what was seen, in words, or nothing."""

    def explains(semantics: Semantics) -> bool:
        mask = branch.mask(case, indices, semantics)
        return mask.shape == actual.shape and bool((mask == actual).all())

    indices = case.block_indices() if branch is FINE else None
    switches: dict[str, dict[str, tuple[Any, ...]]] = {
        "sliding": {"window_closed": (True, False), "causal": (True, False)},
        "compress": {
            "compress_strict": (True, False),
            "compress_alignment": ("start", "end"),
            "causal": (True, False),
        },
        "fine": {
            "duplicates": ("set", "multiset"),
            "own_block_extra": (True, False),
            "causal": (True, False),
        },
    }
    for switch, values in switches[branch.name].items():
        for value in values:
            if value != getattr(case.semantics, switch) and explains(
                dataclasses.replace(case.semantics, **{switch: value})
            ):
                return f"{CONVENTION}: {switch}={value!r} would explain it. {REMEDY}"
    for name, preset in PRESETS.items():
        # a preset's own duplicates, alignment and strictness, all at once
        if preset.causal == case.semantics.causal and explains(preset):
            return f"{CONVENTION}: this is what the preset {name} does. {REMEDY}"
    return ""


def exposed(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """The mask that the implementation shows, in each way in which it can be read."""
    branch = prop.the_branch
    arguments = (case.block_indices(),) if branch is FINE else ()
    expected = branch.mask(case, *arguments or (None,))
    value = call(implementation.run, f"{branch.name}_mask", case, *arguments)
    for name, actual in probes.exposed_readings(value, *expected.shape[2:]).items():
        try:
            actual = np.broadcast_to(actual, expected.shape)
        except ValueError:
            raise Raised(
                f"{branch.name}_mask {name} has shape {actual.shape}; it must broadcast to "
                f"{expected.shape}"
            ) from None
        if (actual != expected).any():
            how = f"{branch.name}_mask as exposed{', ' if name else ''}{name}"
            raise mask_broken(branch, prop.clause, case, expected, actual, how)
    return Outcome()


def read_forward(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """The mask that the forward shows when one-hot values are read through it."""
    branch = prop.the_branch
    expected = oracle_mask(branch, case)
    actual = probes.forward_mask(implementation, branch, case, expected)
    if (actual != expected).any():
        how = f"{branch.name}, forward read out by one-hot values"
        raise mask_broken(branch, prop.clause, case, expected, actual, how)
    return Outcome()


def read_backward(prop: Property, implementation: Implementation, case: Case) -> Outcome:
    """The mask that gradients show: which pairs of rows and columns hear of each other."""
    branch = prop.the_branch
    for pattern in probes.backward_patterns(
        implementation, branch, case, oracle_mask(branch, case)
    ):
        wrong = pattern.wrong()
        if not wrong.any():
            continue
        b, h, t, j = first_at(wrong)
        deed = "misses" if pattern.visible[b, h, t, j] else "reads"
        expected = pattern.visible[b, h].astype(int)
        seen = np.where(pattern.decided[b, h], pattern.seen[b, h], expected).astype(int)
        raise Broken(
            "A3",
            f"{branch.name}, backward read out: {pattern.gradient} {deed} the pair of row "
            f"t={t} and column {j} (batch {b}, query head {h}), though the forward is right\n"
            f"{side_by_side(expected, seen)}",
        )
    return Outcome()
