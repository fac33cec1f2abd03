"""A ledger's entry for a finding: the narrowest rule that a sample of cases bears out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.conditions import FIELDS, Condition, value_of
from nsa_ref.testing.drawing import draw
from nsa_ref.testing.findings import Finding
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.judging import BRANCH_NAMES, judge
from nsa_ref.testing.ledger import Entry
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.verdicts import Broken, Inconclusive

#: Numbers that kernels cut into tiles.
LENGTHS = ("q_len", "kv_len", "head_dim", "value_dim")

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


#: What a case is said to have broken if it took its process down.
DIED = "died"

#: Cases that are judged for one entry, at most.
SAMPLED = 120

#: As many, where a case that breaks takes its process down: each costs the start of another.
SAMPLED_IF_ENDED = 40

#: How often a property's cases are drawn to find so many.
MOST_ROUNDS = 10


@dataclass(frozen=True)
class Sample:
    """Cases of one property: those that broke the clause, and those that passed."""

    broken: list[Case]
    passed: list[Case]


class Sampled:
    """What worker processes say of the cases that they judge."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.clauses: dict[int, str | None] = {}

    def add(self, said: dict[str, Any]) -> None:
        """The cases, or what became of one: the clause that it broke, "" or None."""
        if "cases" in said:
            self.cases = [Case.from_json(case) for case in said["cases"]]
        else:
            self.clauses[said["number"]] = said["broken"]

    def sample(self, case: Case, clauses: Collection[str]) -> Sample:
        """With the finding's own case, which broke one of the clauses."""
        sample = Sample([case], [])
        for number, broken in self.clauses.items():
            if broken in clauses:
                sample.broken.append(self.cases[number])
            elif broken == "":
                sample.passed.append(self.cases[number])
        return sample


def drawn(prop: Property, implementation: Implementation, options: Options) -> list[Case]:
    """Cases of a property, the same in every process."""
    cases: dict[Case, None] = {}
    for seed in range(1, MOST_ROUNDS + 1):
        asked = dataclasses.replace(options, case=None, shrink=False, seed=options.seed + seed)
        draw(prop, implementation, asked, lambda case: cases.setdefault(case, None))
        if len(cases) >= SAMPLED:
            break
    return list(cases)[:SAMPLED]


def broken_clause(prop: Property, implementation: Implementation, case: Case) -> str | None:
    """The clause that a case breaks, or nothing; None if it was not decided."""
    try:
        outcome = judge(prop, implementation, case)
    except Broken as broken:
        return broken.clause
    except (NotOffered, Inconclusive):
        return None
    return "" if outcome.compared else None


def narrowed(sample: Sample) -> tuple[Condition, ...]:
    """Conditions that hold for all cases that broke and, together, for as few others as can be.

    Of two that exclude equally many the plainer one is taken, in the order of `_candidates`.
    """
    holding = [c for c in _candidates(sample) if all(map(c.holds, sample.broken))]
    left = list(sample.passed)
    chosen: dict[str, Condition] = {}
    while left:
        free = (c for c in holding if c.name not in chosen)  # a table has one rule for a name
        best = max(free, key=lambda c: sum(not c.holds(case) for case in left))
        kept = [case for case in left if best.holds(case)]
        if ".." in str(best.rule):
            # the other end may be no more than where the sample happened to end
            ends = [c for c in holding if c.name == best.name and str(c.rule)[:2] in (">=", "<=")]
            one = min(ends, key=lambda c: sum(map(c.holds, left)))
            if sum(map(one.holds, left)) < 2 * max(1, len(kept)):
                best, kept = one, [case for case in left if one.holds(case)]
        if (chosen and 2 * len(kept) >= len(left)) or len(kept) == len(left):
            break  # what tells few apart may be a coincidence of the sample
        left = kept
        chosen[best.name] = best
    return tuple(chosen.values())


def _candidates(sample: Sample) -> list[Condition]:
    """What a rule might say: remainders and comparisons first, then values, then ranges."""
    divided = [*PAIRS, *((a, 2**power) for a in LENGTHS for power in range(1, 8))]
    found = [Condition(f"{a}_mod_{b}", rule) for a, b in divided for rule in (0, "!= 0")]
    signs = ("==", "!=", "<", "<=", ">", ">=")
    found += [Condition(a, f"{sign} {b}") for a, b in PAIRS for sign in signs]
    for name in FIELDS:
        seen, others = (
            sorted({value_of(case, name) for case in cases}, key=lambda x: (str(type(x)), x))
            for cases in (sample.broken, sample.passed)
        )
        if len(seen) == 1:
            found.append(Condition(name, seen[0]))
        elif type(seen[0]) is int:
            rules = (f">= {seen[0]}", f"<= {seen[-1]}", f"{seen[0]}..{seen[-1]}")
            found += [Condition(name, rule) for rule in rules]
        elif 2 * len(seen) <= len(set(seen) | set(others)):
            # a list of nearly all words says only which the sample happened not to have
            found.append(Condition(name, seen))
    return found


def entry_of(
    alike: Sequence[Finding], conditions: tuple[Condition, ...], taken: Collection[str] = ()
) -> Entry:
    """The entry that calls findings of one cause known: their clauses, where these hold.

    The methods in which they were found are named, as far as one pattern can: what another method
    does wrong is another mistake.

    alike : the finding that tells it, and others of its cause
    taken : ids that other entries have
    """
    finding = alike[0]
    ended = "ended" in finding
    found = {one["clause"] for one in alike}
    methods = {PROPERTIES[one["property"]].called for one in ([finding] if ended else alike)}
    parts = (*BRANCH_NAMES, "pool", "select", "layer", "decode", "varlen")
    shared = [f"{part}*" for part in parts if all(name.startswith(part) for name in methods)]
    pattern = next(iter(methods if len(methods) == 1 else shared), "")
    name = f"{finding['clause']}-{finding['kind']}".replace(" ", "-")
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return Entry(
        id=next(id for id in itertools.chain([name], numbered) if id not in taken),
        why=finding["text"].partition("\n")[0],
        status="quarantined" if ended else "tolerated",
        clause=() if ended else tuple(clause for clause in CLAUSES if clause in found),
        method=pattern,
        where=conditions,
    )
