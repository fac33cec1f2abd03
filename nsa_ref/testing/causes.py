"""Which findings have one cause: cases of others are judged again, to see.

A switch that would explain a finding is tried on the others' cases. The property of a finding is
tried on the others' cases. What raises, or gives NaN, is one cause wherever it does so. Findings of
one clause in several branches are one cause if `same_mistake` shows it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.conventions import declaring, under
from nsa_ref.testing.findings import Finding, alike_as
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.judging import BRANCH_NAMES
from nsa_ref.testing.last_words import announced
from nsa_ref.testing.lattice import SPECIAL_CLAUSES
from nsa_ref.testing.narrowing import broken_clause
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import judge_generated
from nsa_ref.testing.same_mistake import same_mistake
from nsa_ref.testing.steps import leads_to
from nsa_ref.testing.verdicts import FAILURES, Broken, Convention

#: A finding's case is tried on so many findings before it.
MOST_TRIED = 4

#: Seconds for the way from one finding's case to another's.
LEADING_TIME = 10.0


@dataclass(frozen=True)
class Question:
    """Does the case break the property, if the implementation declared the convention?

    finding, of : numbers of the finding whose case it is, and of the one that may be its cause
    beside : property and case of that one, if it is about another branch; then the question is
        whether both branches make the same mistake
    goal : the case of that one, if the question is whether this one leads to it (see `steps`)
    """

    finding: int
    of: int
    property: str
    implementation: str
    case: Case
    convention: Convention | None = None
    beside: tuple[str, Case] | None = None
    goal: Case | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, which can cross processes."""
        convention = self.convention and dataclasses.asdict(self.convention)
        beside = self.beside and [self.beside[0], self.beside[1].to_json()]
        cases = {"case": self.case.to_json(), "goal": self.goal and self.goal.to_json()}
        return vars(self) | {**cases, "convention": convention, "beside": beside}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Question:
        """The inverse of `to_json`."""
        convention = data["convention"] and Convention(**data["convention"])
        beside = data["beside"] and (data["beside"][0], Case.from_json(data["beside"][1]))
        case, goal = Case.from_json(data["case"]), data["goal"] and Case.from_json(data["goal"])
        about = {"case": case, "goal": goal, "convention": convention, "beside": beside}
        return cls(**dict(data) | about)

    def answered(self, implementation: Implementation, options: Options) -> str | None:
        """The clause that is broken, or nothing; None if it was not decided.

        The smallest case may be right by chance under a convention: then generated ones are tried.
        """
        prop, case = PROPERTIES[self.property], self.case
        if self.convention is not None:
            semantics = under(case.semantics, self.convention)
            implementation = declaring(implementation, self.convention)
            case = dataclasses.replace(case, semantics=semantics)
        if not prop.semantics(case.semantics):
            return None
        with announced(prop, implementation, options, case):
            if self.goal is not None:
                until = time.monotonic() + LEADING_TIME
                leads = leads_to(prop, implementation, case, self.goal, until)
                return prop.clause if leads else ""
            if self.beside is not None:
                name, other = self.beside
                same = same_mistake(implementation, (prop, case), (PROPERTIES[name], other))
                return None if same is None else prop.clause if same else ""
            broken = broken_clause(prop, implementation, case)
        if broken == "" and self.convention is not None:
            try:
                judge_generated(prop, implementation, options)
            except Broken as found:
                return found.clause
        return broken


def by_weight(findings: Iterable[Finding]) -> list[Finding]:
    """Those first that may be the cause of others: failures, then masks, then the smallest case.

    A mask that is wrong on the edges of a special clause alone stands behind the finding of that
    clause, and before it if it is wrong elsewhere as well.
    """
    findings = list(findings)

    def on_edges(finding: Finding, special: str) -> bool:
        """Whether a mask is wrong on the edges of the special clause alone, if it has such."""
        edges = SPECIAL_CLAUSES.get(finding["clause"], {}).get(special, ())
        return bool(set(edges).intersection(finding.get("edges", ())))

    def is_said_better(finding: Finding) -> bool:
        """Whether another finding is of the clause that fits."""
        who, clause = finding["implementation"], finding["clause"]
        return any(
            on_edges(finding, other["clause"])
            or (
                clause in SPECIAL_CLAUSES.get(other["clause"], {})
                and "edges" in other
                and not on_edges(other, clause)
            )
            for other in findings
            if other["implementation"] == who
        )

    def weight(finding: Finding) -> tuple[Any, ...]:
        case = finding["case"]
        kinds = (*FAILURES, "wrong mask", "wrong reader", "wrong pattern", "wrong choice")
        rank = kinds.index(finding["kind"]) if finding["kind"] in kinds else len(kinds)
        sizes = ("batch", "q_heads", "q_len", "kv_len", "num_mem_kv", "head_dim", "value_dim")
        size = [case[name] for name in sizes]
        clause = list(CLAUSES).index(finding["clause"])
        return rank, finding["convention"] is None, is_said_better(finding), *size, clause

    return sorted(findings, key=weight)


def questions(findings: Sequence[Finding]) -> list[Question]:
    """What must be tried to see which of the findings have one cause; in the order of `by_weight`.

    Of findings that are alike the first speaks for all, but for the convention of the very first,
    which is tried on each. Nothing that took its process down is launched again.
    """
    asked = []
    first_alike: dict[tuple[str, ...], int] = {}
    for j, finding in enumerate(findings):
        is_first = first_alike.setdefault(alike_as(finding), j) == j
        if finding["kind"] in FAILURES:
            continue
        who, case = finding["implementation"], Case.from_json(finding["case"])
        part = PROPERTIES[finding["property"]].part
        before = [
            i
            for i in first_alike.values()
            if i < j
            and findings[i]["implementation"] == who
            and PROPERTIES[findings[i]["property"]].part == part
            and findings[i]["kind"] not in FAILURES
        ]
        for i in before[:MOST_TRIED]:
            found = findings[i]["convention"]
            if found and found["value"] is not None and i == before[0]:
                # under a convention that explains it the finding's own property is satisfied
                own = finding["property"]
                asked.append(Question(j, i, own, who, case, Convention(**found)))
            if is_first:
                asked.append(Question(j, i, findings[i]["property"], who, case))
    return asked + list(_between_branches(findings, sorted(first_alike.values())))


def _between_branches(findings: Sequence[Finding], firsts: Sequence[int]) -> Iterator[Question]:
    """Whether findings of one clause in several branches are one mistake; firsts : to be asked."""

    def about(finding: Finding) -> tuple[Any, ...]:
        """What findings of one mistake have in common."""
        prop = PROPERTIES[finding["property"]]
        return finding["implementation"], finding["clause"], prop.clause, prop.backward

    told = {
        j: PROPERTIES[findings[j]["property"]]
        for j in firsts
        if findings[j]["kind"] not in FAILURES
        and (findings[j]["convention"] or {}).get("value") is None
    }
    asked = {j: p for j, p in told.items() if p.part in BRANCH_NAMES and not p.extent}
    for j, prop in asked.items():
        before = [
            i
            for i, other in asked.items()
            if i < j and other.part != prop.part and about(findings[i]) == about(findings[j])
        ]
        for i in before[:MOST_TRIED]:
            case, other = (Case.from_json(findings[n]["case"]) for n in (j, i))
            beside = findings[i]["property"], other
            yield Question(j, i, prop.name, findings[j]["implementation"], case, beside=beside)


def fold(
    findings: Sequence[Finding], asked: Sequence[Question], answers: Mapping[int, str | None]
) -> None:
    """Write into each finding its `cause`, the file of the finding to look at first.

    A finding whose convention was tried on others says `gone`: how many of how many it explains.

    findings : in the order of `by_weight`
    answers : number of a question -> the clause that its case broke, "" if it passed; None, or no
        answer, if it was not decided
    """
    root = list(range(len(findings)))
    tried = {(q.finding, q.of): answers.get(n) for n, q in enumerate(asked) if q.convention}
    for i, finding in enumerate(findings):
        if _is_coincidence(i, findings, tried):
            finding["convention"] = None
            tried = {pair: broken for pair, broken in tried.items() if pair[1] != i}
    # what a convention leaves broken has another cause, however alike it looks: one, if several do
    stays = {pair for pair, broken in tried.items() if broken}
    first_of: dict[tuple[str, ...], int] = {}
    first_left: dict[tuple[str, ...], int] = {}
    for j, finding in enumerate(findings):
        alike = alike_as(finding)
        first = first_of.setdefault(alike, j)
        if (j, first) not in stays:
            root[j] = first
            continue
        root[j] = first_left.setdefault(alike, j)
        if finding["convention"] == findings[first]["convention"]:
            finding["convention"] = None  # with it declared, the finding is there all the same
    for number, question in enumerate(asked):
        broken, i, j = answers.get(number), question.of, question.finding
        if question.convention:
            broken = tried.get((j, i))
        if root[j] != j or broken is None or (j, i) in stays:
            continue
        if broken == ("" if question.convention else findings[i]["clause"]):
            root[j] = root[i]
    first_with: dict[tuple[Any, ...], int] = {}
    for j, finding in enumerate(findings):
        convention = finding["convention"]
        if root[j] == j and convention and convention["value"] is not None:
            # one thing to declare is one cause
            declared = finding["implementation"], *convention.values()
            first = first_with.setdefault(declared, j)
            root[j] = j if (j, first) in stays else first
    groups: dict[int, list[Finding]] = {}
    for j, finding in enumerate(findings):
        at = j
        while root[at] != at:
            at = root[at]
        groups.setdefault(at, []).append(finding)
    for at, group in groups.items():
        for finding in group:
            finding["cause"] = group[0]["file"]
        known = [broken for (_, of), broken in tried.items() if of == at and broken is not None]
        if known:
            group[0]["gone"] = [1 + known.count(""), 1 + len(known)]


def _is_coincidence(
    i: int, findings: Sequence[Finding], tried: Mapping[tuple[int, int], str | None]
) -> bool:
    """Whether the convention of a finding explains none of several others that are alike.

    tried : (finding, of) -> what the case of the one breaks under the convention of the other
    """
    known = [
        broken
        for (j, of), broken in tried.items()
        if of == i and broken is not None and alike_as(findings[j]) == alike_as(findings[i])
    ]
    return len(known) > 1 and all(known)
