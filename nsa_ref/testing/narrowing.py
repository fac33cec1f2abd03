"""A ledger's entry for a finding: the narrowest rule that a sample of cases bears out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa_ref.testing.case import Case
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.judging import judge
from nsa_ref.testing.ledger import FIELDS, Condition, Entry, value_of
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import Property
from nsa_ref.testing.running import generate
from nsa_ref.testing.verdicts import Broken, Inconclusive

#: Pairs of numbers of which a rule may say which is larger, or whether one divides the other.
PAIRS = (
    ("kv_len", "selection_block_size"),
    ("kv_len", "compress_block_size"),
    ("kv_len", "compress_block_sliding_stride"),
    ("kv_len", "sliding_window_size"),
    ("q_len", "kv_len"),
    ("q_len", "selection_block_size"),
    ("num_selected_blocks", "num_selection_blocks"),
    ("compress_block_size", "compress_block_sliding_stride"),
    ("head_dim", "value_dim"),
)


@dataclass(frozen=True)
class Sample:
    """Cases of one property: those that broke the clause, and those that did not."""

    broken: list[Case]
    passed: list[Case]


def sampled(
    prop: Property, implementation: Implementation, clause: str, case: Case, options: Options
) -> Sample:
    """Judge the case of a finding and generated ones."""
    sample = Sample([case], [])

    def trial(case: Case) -> None:
        try:
            judge(prop, implementation, case)
        except Broken as broken:
            if broken.clause == clause:
                sample.broken.append(case)
        except (NotOffered, Inconclusive):
            pass
        else:
            sample.passed.append(case)

    generate(prop, implementation, dataclasses.replace(options, shrink=False), trial)
    return sample


def narrowed(sample: Sample) -> tuple[Condition, ...]:
    """Conditions that hold for all cases that broke and, together, for as few others as can be.

    Of two that exclude equally many the plainer one is taken, in the order of `_candidates`.
    """
    holding = [c for c in _candidates(sample.broken) if all(map(c.holds, sample.broken))]
    left = list(sample.passed)
    chosen: dict[str, Condition] = {}
    while left:
        free = (c for c in holding if c.name not in chosen)  # a table has one rule for a name
        best = max(free, key=lambda c: sum(not c.holds(case) for case in left))
        kept = [case for case in left if best.holds(case)]
        if len(kept) == len(left):
            break
        left = kept
        chosen[best.name] = best
    return tuple(chosen.values())


def _candidates(broken: Sequence[Case]) -> list[Condition]:
    """What a rule might say: remainders and comparisons first, then values, then ranges."""
    found = [Condition(f"{a}_mod_{b}", rule) for a, b in PAIRS for rule in (0, "!= 0")]
    signs = ("==", "!=", "<", "<=", ">", ">=")
    found += [Condition(a, f"{sign} {b}") for a, b in PAIRS for sign in signs]
    for name in FIELDS:
        seen = sorted({value_of(case, name) for case in broken})
        if len(seen) == 1:
            found.append(Condition(name, seen[0]))
        elif isinstance(seen[0], str):
            found.append(Condition(name, seen))
        else:
            rules = (f">= {seen[0]}", f"<= {seen[-1]}", f"{seen[0]}..{seen[-1]}")
            found += [Condition(name, rule) for rule in rules if type(seen[0]) is int]
    return found


def entry_of(finding: Finding, conditions: tuple[Condition, ...]) -> Entry:
    """The entry that calls a finding known: its clause, where these hold."""
    quarantined = finding.get("ended") in ("crash", "hang")
    return Entry(
        id=Path(finding["file"]).stem if "file" in finding else finding["property"],
        why=finding["text"].partition("\n")[0],
        status="quarantined" if quarantined else "tolerated",
        clause=finding["clause"],
        where=conditions,
    )
