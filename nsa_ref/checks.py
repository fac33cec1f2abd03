"""The checks at the entry of every public function: name, value, rule, reason, remedy.

They are passed the argument's name, so that a message speaks the caller's words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np


def check_integer(name: str, value: object) -> None:
    """Raise TypeError unless value is an int (NumPy integers included, bool excluded)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}.")


def check_at_least(name: str, value: int, least: int, *, why: str = "") -> None:
    """Raise ValueError unless the integer `value` is at least `least`."""
    check_integer(name, value)
    if value < least:
        reason = f": {why}" if why else ""
        raise ValueError(f"{name}={value} must be at least {least}{reason}.")


def check_multiple(name: str, value: int, of_name: str, of: int, *, why: str) -> None:
    """Raise ValueError unless value is a positive multiple of `of`, and name two that are."""
    check_integer(name, value)
    if value < 1 or value % of:
        near = max(value // of, 1) * of
        raise ValueError(
            f"{name}={value} must be a positive multiple of {of_name}={of}: {why}. "
            f"Try {near} or {near + of}."
        )


def check_one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless value is one of `allowed`, and list them all."""
    if value not in list(allowed):  # a value may have no hash
        listed = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}={value!r} must be one of {listed}.")


def check_kind(name: str, value: object, kind: type, wanted: str) -> None:
    """Raise TypeError unless value is a `kind`; `wanted` is what the message calls it."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} must be {wanted}, not {type(value).__name__}.")


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `shape` is `expected`; a string in `expected` names a free axis."""
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, expected)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name} has shape {tuple(shape)}; it must be ({wanted}).")


def as_float64(name: str, x: object, shape: tuple[int | str, ...] | None = None) -> np.ndarray:
    """The numbers of x as float64, or complex128 where they are complex; of this shape, if given.

    Raises TypeError, with the argument's name, for what holds no numbers, and as `check_shape`.
    """
    array = np.asarray(x)
    if shape is not None:
        check_shape(name, array.shape, shape)
    if array.dtype.kind == "c":
        return array.astype(np.complex128)
    try:
        if array.dtype.kind in "OSUMm":
            raise TypeError
        return array.astype(np.float64)  # bfloat16 and its like, of kind "V", convert as well
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} has dtype {array.dtype}; it must hold real or complex numbers."
        ) from None


def as_weights(
    weights: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The weights as float64, if their names and shapes are these; else raise."""
    if set(weights) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
        raise ValueError(
            f"weights lacks {missing} and has the unknown names {unknown}; it must have "
            f"{sorted(shapes)}."
        )
    return {n: as_float64(f"weights[{n!r}]", weights[n], shape) for n, shape in shapes.items()}
