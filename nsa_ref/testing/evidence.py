"""Is what was decided enough? Clauses of which too few cases were, or none on their own edges."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nsa_ref.testing.case import Case
from nsa_ref.testing.drawing import draw
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.lattice import CLAUSE_EDGES, case_edges
from nsa_ref.testing.options import Options
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.verdicts import Record, Remark

#: A clause is thin if a smaller share of the cases was decided than this. A port without lse has
#: no answer to half of A3's, which send a gradient through it: what is left of those is enough.
SHARE = 1 / 4

#: Cases that are drawn, and not judged, before an edge is said to be out of reach.
DRAWS = 300


@dataclass(frozen=True)
class Evidence:
    """What speaks against a pass of a clause of which nothing is broken.

    thin : why so few cases, or others than the clause is about, say little
    outside : why what it is about lies outside of what is declared: then it is not offered
    """

    thin: tuple[Remark, ...] = ()
    outside: tuple[Remark, ...] = ()


def weighed(records: Sequence[Record], declared: Sequence[Implementation]) -> dict[str, Evidence]:
    """The evidence of every clause of which cases were tried, by what was asked of whom.

    declared : the implementations; no more is asked of them than what they declare
    """
    thin: dict[str, list[Remark]] = {}
    outside: dict[str, list[Remark]] = {}
    inside: set[str] = set()
    for implementation in declared:
        name = implementation.name
        for clause, edges in CLAUSE_EDGES.items():
            own = [r for r in records if (r.clause, r.implementation) == (clause, name)]
            decided = sum(record.cases for record in own)
            if any(record.finding for record in own):
                continue
            # cases that could not tell may be all that there are within the limits
            tried = any(record.inconclusive for record in own)
            if not decided and (not tried or any(record.unreached for record in own)):
                continue
            answered = decided + sum(r.known.total() + r.spared.total() for r in own)
            asked = sum(record.asked for record in own)
            why: list[Remark] = []
            if decided and answered < SHARE * asked:
                why.append(("few cases", name, decided, asked))
                if any(record.unreached for record in own):
                    thin[clause] = [*thin.get(clause, []), *why]
                    inside.add(clause)
                    continue  # the time is up: which edges are within reach is not the question
            unmet = [edge for edge in edges if not any(edge in record.edges for record in own)]
            props = [PROPERTIES[record.name] for record in own if record.asked]
            reached = reachable(unmet, props, implementation)
            for edge in unmet:
                if refused := sum(record.refused_edges[edge] for record in own):
                    why.append(("edge refused", name, edge, refused))
                elif edge in reached:
                    why.append(("edge not met", name, edge))
            if edges and set(unmet) == set(edges) and not why:
                outside.setdefault(clause, []).append(("edge outside", name, ", ".join(edges)))
                continue
            inside.add(clause)
            thin.setdefault(clause, []).extend(why if decided else [])
    return {
        clause: Evidence(
            tuple(thin.get(clause, ())), () if clause in inside else tuple(outside[clause])
        )
        for clause in {*thin, *outside}
    }


def reachable(
    edges: Collection[str],
    props: Sequence[Property],
    implementation: Implementation,
    draws: int = DRAWS,
) -> set[str]:
    """Those of the edges on which a case of these properties can stand, within what is declared.

    As far as drawing so many others shows it: what is declared decides what `adjust` leaves of a
    size, and that is nowhere written down but there.
    """
    wanted, found, drawn = set(edges), set[str](), 0
    props = [prop for prop in props if not prop.extent]
    for seed in itertools.count(1):
        for prop in props:
            if found == wanted or drawn >= draws:
                return found

            def note(case: Case, prop: Property = prop) -> None:
                nonlocal drawn
                drawn += 1
                found.update(wanted.intersection(case_edges(prop, case)))

            draw(prop, implementation, Options(seed=seed, shrink=False), note)
        if not drawn:
            return found
    raise AssertionError  # the loop has no end of its own
