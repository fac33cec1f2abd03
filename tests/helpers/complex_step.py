"""Gradients beside the complex step: no cancellation, so the step may be as small as it likes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike

STEP = 1e-30


def check_gradients(
    loss: Callable[..., complex],
    arrays: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    bounds: Mapping[str, ArrayLike],
    *,
    few: bool = False,
) -> None:
    """Each gradient is the derivative of loss(**arrays) within its bound, element by element.

    With `few` of three elements of each array, its ends among them.
    """
    assert set(gradients) == set(arrays)
    for name, original in arrays.items():
        assert gradients[name].shape == original.shape
        bound = np.broadcast_to(bounds[name], original.shape)
        indices = list(np.ndindex(original.shape))
        if few:
            indices = [*indices[:1], *indices[len(indices) // 2 :][:1], *indices[-1:]]
        for index in indices:
            moved = original.astype(complex)
            moved[index] += STEP * 1j
            derivative = loss(**{**arrays, name: moved}).imag / STEP
            error = abs(gradients[name][index] - derivative)
            assert error <= bound[index], f"{name}{index}: {error} is above {bound[index]}"
