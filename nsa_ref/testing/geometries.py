"""A dozen geometries for a port that compiles for every shape: all properties of a kind share them.

Data, dtypes, kinds of input, block indices and semantics vary within them; all sizes, and how the
tensors lie in memory, are a geometry's.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from nsa_ref.testing.case import GENERIC_INPUTS, INDICES, INPUTS, Case
from nsa_ref.testing.findings import size_of
from nsa_ref.testing.implementation import Implementation, refusal
from nsa_ref.testing.lattice import CLAUSE_EDGES, case_edges
from nsa_ref.testing.profiles import level_settings
from nsa_ref.testing.properties import PROPERTIES, Property
from nsa_ref.testing.remembering import remembered
from nsa_ref.testing.strategies import Adjust

#: Geometries that the properties about one thing share; of longest sequences, and of tensors beyond
#: 2^31 elements, one each.
DOZEN = 12

#: Cases of each lot of a property that geometries are chosen from.
CANDIDATES = 8

#: Rows, and keys, of a case that shows more than the smallest ones do.
SOME = 4

#: What a case has beside its geometry.
VARIED = ("semantics", "dtype", "inputs", "indices", "seed")


@dataclass(frozen=True)
class Geometry:
    """The sizes of a case, and what brought them about.

    case : as it was drawn
    adjust : of the property that it was drawn for
    """

    case: Case
    adjust: Adjust | None

    @property
    def sizes(self) -> dict[str, Any]:
        """All fields that do not vary."""
        fields = dataclasses.fields(Case)
        return {f.name: getattr(self.case, f.name) for f in fields if f.name not in VARIED}

    def fits(self, prop: Property, implementation: Implementation) -> bool:
        """Whether cases of the property may have it: its `adjust` would leave it as it is."""
        case = self.case
        if prop.populated and (case.batch < 1 or min(case.q_len, case.kv_len) < 2):
            return False
        if prop.adjust in (None, self.adjust):
            return True
        return all(
            _leaves_alone(prop.adjust, dataclasses.replace(case, semantics=semantics))
            for semantics in implementation.semantics
            if prop.semantics(semantics)
        )


class _Draws(Exception):
    """`adjust` would choose a size."""


def _leaves_alone(adjust: Adjust | None, case: Case) -> bool:
    def draw(strategy: object, label: object = None) -> Any:
        raise _Draws

    before = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case)}
    after = dict(before)
    try:
        if adjust is not None:
            adjust(draw, after)  # type: ignore[arg-type]
    except _Draws:
        return False
    return all(after[name] == value for name, value in before.items() if name not in VARIED)


@remembered
def shared_geometries(
    implementation: Implementation, about: str, extent: str, seed: int
) -> tuple[Geometry, ...]:
    """The geometries of all properties about one thing, the same in every process.

    First those with which each property has the edges that its clause is about; then those that
    stand on most other edges of the lattice.
    """
    alike: dict[tuple[str, Adjust | None], Property] = {}
    for prop in PROPERTIES.values():
        asked = any(map(prop.semantics, implementation.semantics))
        if asked and (prop.about, prop.extent) == (about, extent):
            alike.setdefault((prop.clause, prop.adjust), prop)
    candidates: dict[Geometry, tuple[set[Any], set[str]]] = {}
    for prop in alike.values():
        for case in _candidates(prop, implementation, seed):
            edges = set(case_edges(prop, case))
            geometry = Geometry(case, prop.adjust)
            fitting = [one for one in alike.values() if geometry.fits(one, implementation)]
            candidates[geometry] = (
                {one.adjust for one in fitting}
                | {(one.name, edge) for one in fitting for edge in CLAUSE_EDGES[one.clause]}
                & {(one.name, edge) for one in fitting for edge in edges},
                edges,
            )
    chosen: list[Geometry] = []
    needed: set[Any] = set()
    met: set[str] = set()

    def gain(geometry: Geometry) -> tuple[Any, ...]:
        (needs, edges), case = candidates[geometry], geometry.case
        # all cases of some properties will have it: it should have rows and keys to be wrong at
        some = bool(needs - needed) and min(case.q_len, case.kv_len) >= SOME
        smaller = [-size for size in size_of(case)]
        return len(needs - needed), some, len(edges - met), smaller

    while candidates and len(chosen) < (1 if extent else DOZEN):
        best = max(candidates, key=gain)
        needs, edges = candidates.pop(best)
        needed |= needs
        met |= edges
        chosen.append(best)
        # another case of the same sizes is no other geometry
        candidates = {g: c for g, c in candidates.items() if g.sizes != best.sizes}
    return tuple(chosen)


def _candidates(prop: Property, implementation: Implementation, seed: int) -> list[Case]:
    """A few cases of every lot of the property, each with rows and keys."""
    drawn: list[Case] = []

    def note(case: Case) -> None:
        if case.batch * case.q_len * case.kv_len and refusal(implementation, case) is None:
            drawn.append(case)

    settings = level_settings("quick", CANDIDATES)
    settings = hypothesis.settings(settings, phases=[hypothesis.Phase.generate])
    for number, lot in enumerate(prop.strata(implementation)):
        own = zlib.crc32(f"geometry {prop.name} {number} {seed}".encode())
        settings(hypothesis.seed(own)(given(case=lot)(note)))()
    return drawn


def lots_within(
    prop: Property, implementation: Implementation, dtypes: Sequence[str], seed: int
) -> list[st.SearchStrategy[Case]]:
    """Cases of a property within the shared geometries, in several lots; none if none fits it.

    Every geometry is a lot, or every dtype where rounding matters more.
    """
    shared = shared_geometries(implementation, prop.about, prop.extent, seed)
    fitting = [geometry for geometry in shared if geometry.fits(prop, implementation)]
    inputs = prop.inputs or INPUTS
    generic = [kind for kind in inputs if kind in GENERIC_INPUTS]
    within: Callable[..., st.SearchStrategy[Case]]
    within = functools.partial(_cases_within, prop, implementation)
    if not fitting:
        return []
    if not prop.by_dtype:
        return [within([geometry], dtypes, inputs) for geometry in fitting]
    kinds = [inputs, generic] if generic and prop.about != "layer" else [inputs]
    return [within(fitting, [dtype], kind) for kind in kinds for dtype in dtypes]


@st.composite
def _cases_within(
    draw: st.DrawFn,
    prop: Property,
    implementation: Implementation,
    geometries: Sequence[Geometry],
    dtypes: Sequence[str],
    inputs: Sequence[str],
) -> Case:
    geometry = draw(st.sampled_from(geometries))
    case = geometry.case
    semantics = [
        semantics
        for semantics in implementation.semantics
        if prop.semantics(semantics) and (semantics.window_closed or case.sliding_window_size)
    ]
    # where a property leaves the indices open, what brought the sizes about may have chosen them
    own = prop.adjust is not None and prop.adjust is geometry.adjust
    indices = prop.indices or ((case.indices,) if own else INDICES)
    allowed = implementation.limits.get("indices", indices)
    return dataclasses.replace(
        case,
        semantics=draw(st.sampled_from(semantics or [case.semantics])),
        dtype=draw(st.sampled_from(dtypes)),
        inputs=draw(st.sampled_from(inputs)),
        indices=draw(st.sampled_from([i for i in indices if i in allowed] or [case.indices])),
        seed=draw(st.integers(0, 2**16)),
    )
