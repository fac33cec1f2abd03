"""The checks at every entry: what passes them, and the whole sentence about what does not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nsa_ref.checks import (
    as_float64,
    as_weights,
    check_at_least,
    check_integer,
    check_kind,
    check_multiple,
    check_one_of,
    check_shape,
)
from refusals import refusal_test


@pytest.mark.parametrize(
    "dtype",
    [bool, np.int8, np.uint64, np.float16, np.float32, np.longdouble, ml_dtypes.bfloat16],
)
def test_numbers_of_every_kind_become_float64(dtype: Any) -> None:
    found = as_float64("x", np.array([0, 1], dtype=dtype), ("len",))
    assert found.dtype == np.float64
    assert found.tolist() == [0.0, 1.0]


def test_complex_numbers_stay_complex_and_lists_are_arrays() -> None:
    found = as_float64("x", np.array([1 + 2j], dtype=np.complex64))
    assert found.dtype == np.complex128
    assert found.tolist() == [1 + 2j]
    assert as_float64("x", [[1], [2]], (2, "any")).tolist() == [[1.0], [2.0]]


def test_what_was_given_is_never_written_to() -> None:
    given = np.zeros(2)
    as_float64("x", given)[0] = 1.0
    assert given.tolist() == [0.0, 0.0]


def test_weights_keep_the_order_of_their_shapes() -> None:
    found = as_weights({"b": [1, 2], "a": 3}, {"a": (), "b": (2,)})
    assert [(name, weight.tolist()) for name, weight in found.items()] == [("a", 3), ("b", [1, 2])]


def test_what_is_right_passes() -> None:
    check_integer("n", np.uint8(3))
    check_at_least("n", 0, 0)
    check_multiple("a", 4, "b", 2, why="")
    check_multiple("a", 2, "b", 2, why="")
    check_multiple("a", 1, "b", 1, why="")
    check_one_of("x", 2, (1, 2))
    check_kind("x", True, int, "")
    check_shape("x", (2, 3), ("rows", 3))
    check_shape("x", (), ())


class Text:
    """Something that NumPy holds as an object, and that turns into a number if it is asked to."""

    def __float__(self) -> float:
        return 1.0


def refused(x: Any, **how: Any) -> Any:
    return lambda: as_float64("x", x, **how)


NUMBERS = "it must hold real or complex numbers"
WHY = "there is a reason"

test_what_is_wrong_is_named = refusal_test(
    {
        "n=-1 must be at least 0": lambda: check_at_least("n", -1, 0),
        f"n=1 must be at least 2: {WHY}": lambda: check_at_least("n", 1, 2, why=WHY),
        f"a=5 must be a positive multiple of b=2: {WHY}. Try 4 or 6": (
            lambda: check_multiple("a", 5, "b", 2, why=WHY)
        ),
        f"a=7 must be a positive multiple of b=3: {WHY}. Try 6 or 9": (
            lambda: check_multiple("a", 7, "b", 3, why=WHY)
        ),
        f"a=0 must be a positive multiple of b=3: {WHY}. Try 3 or 6": (
            lambda: check_multiple("a", 0, "b", 3, why=WHY)
        ),
        f"a=-3 must be a positive multiple of b=3: {WHY}. Try 3 or 6": (
            lambda: check_multiple("a", -3, "b", 3, why=WHY)
        ),
        "x=[] must be one of 1, 'two'": lambda: check_one_of("x", [], {1: None, "two": None}),
        "x has shape (2, 3); it must be (rows, 4)": lambda: check_shape("x", (2, 3), ("rows", 4)),
        "x has shape (2,); it must be (rows, 2)": lambda: check_shape("x", (2,), ("rows", 2)),
        "x has shape (2, 3); it must be (2)": lambda: check_shape("x", (2, 3), (2,)),
        "x has shape (1,); it must be (2)": refused([0.0], shape=(2,)),
        "weights lacks ['a', 'b'] and has the unknown names ['c', 'd']; it must have ['a', 'b']": (
            lambda: as_weights({"d": 1, "c": 1}, {"b": (), "a": ()})
        ),
        "weights['a'] has shape (); it must be (2)": lambda: as_weights({"a": 1}, {"a": (2,)}),
    },
    {
        "n=1.0 must be an integer, not float": lambda: check_integer("n", 1.0),
        "n=True must be an integer, not bool": lambda: check_integer("n", True),
        "n='1' must be an integer, not str": lambda: check_at_least("n", "1", 0),
        "a=2.0 must be an integer, not float": lambda: check_multiple("a", 2.0, "b", 2, why=WHY),
        "x=1 must be a text, not int": lambda: check_kind("x", 1, str, "a text"),
        f"x has dtype <U1; {NUMBERS}": refused(["1"]),
        f"x has dtype |S1; {NUMBERS}": refused([b"1"]),
        f"x has dtype object; {NUMBERS}": refused([Text()]),
        f"x has dtype datetime64[D]; {NUMBERS}": refused(np.zeros(1, "M8[D]")),
        f"x has dtype timedelta64[s]; {NUMBERS}": refused(np.zeros(1, "m8[s]")),
        f"x has dtype [('f0', '<f8'), ('f1', '<f8')]; {NUMBERS}": refused(np.zeros(1, "f8,f8")),
        f"weights['a'] has dtype <U1; {NUMBERS}": lambda: as_weights({"a": "x"}, {"a": ()}),
    },
    whole=True,
)
