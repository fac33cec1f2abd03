"""Answers about an implementation are kept: what was drawn takes a while, and is asked again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

#: Answers of a function that are kept at a time.
KEPT = 512

Answer = TypeVar("Answer")


def remembered(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """The function, whose first argument is an implementation, with its answers kept.

    An implementation is told by which object it is: it may be one that has no hash.
    """
    kept: dict[tuple[int, Hashable], tuple[Any, Answer]] = {}

    @functools.wraps(function)
    def asked(implementation: Any, *others: Hashable) -> Answer:
        key = id(implementation), others
        if key not in kept:
            if len(kept) >= KEPT:
                kept.pop(next(iter(kept)))
            # the object is kept as well, so that no other one gets its id
            kept[key] = implementation, function(implementation, *others)
        return kept[key][1]

    return asked
