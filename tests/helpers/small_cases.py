"""Small cases about one part of the oracle, in all combinations of the switches that it reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import Phase, find, settings
from hypothesis import strategies as st

from nsa_ref import Semantics
from nsa_ref.testing import Case, OracleImplementation, strategies
from nsa_ref.testing.lattice import EDGES


class Small(OracleImplementation):
    """Sizes of which the loops of the oracle are short."""

    limits = {  # noqa: RUF012
        "batch": (1, 2, 0),
        "kv_heads": (1, 2),
        "group_size": (1, 2, 3),
        "compress_block_size": (1, 2, 3, 4, 6),
        "compress_block_sliding_stride": (1, 2, 3),
    }


@st.composite
def cases(draw: st.DrawFn, about: str, **switches: Sequence[Any]) -> Case:
    """In float64; `about` as the judge's strategies take it, each switch with its values."""
    chosen = itertools.product(*switches.values())
    return draw(
        strategies.cases(
            Small(),
            about,
            semantics=[Semantics(**dict(zip(switches, values))) for values in chosen],
            dtypes=["float64"],
            inputs=("randn", "ties", "integers", "huge"),
            head_dims=(1, 2, 3),
            shape=draw(st.sampled_from(strategies.SHAPES)),
            max_len=12,
        )
    )


def reaches(
    drawn: st.SearchStrategy[Case], corner: str | Callable[[Case], object], *, within: int
) -> None:
    """One of `within` cases stands in the corner: the name of an edge, or a condition.

    Narrowed, the cases would leave a second definition nothing to differ on. Which cases are drawn
    depends on the modules that are loaded: `within` leaves room for that.
    """

    def met(case: Case) -> bool:
        if isinstance(corner, str):
            return EDGES[corner].met_by(case, np.zeros(0))
        return bool(corner(case))

    some = settings(database=None, max_examples=within, phases=[Phase.generate], derandomize=True)
    find(drawn, met, settings=some)
