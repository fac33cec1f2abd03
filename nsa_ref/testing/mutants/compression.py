"""Compression maps a second time, as they are computed layer by layer; and their mutants (C1, C4).

`CompressionMap` is right as it stands. Every layer is stored, every sum is in the way's order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants.dense import DenseMasks
from nsa_ref.testing.mutants.rounding import RoundedImplementation, Rounding
from nsa_ref.testing.mutants.zoo import mutant


class Layers(NamedTuple):
    """A map's numbers: windows (batch, kv_heads, blocks, l, dim), the MLP's first layer, blocks."""

    windows: np.ndarray
    before_relu: np.ndarray
    out: np.ndarray


class CompressionMap(RoundedImplementation):
    name = "compression map"

    # steps

    def first_tokens(self, case: Case) -> np.ndarray:
        """Of every window that ends among the tokens (C1)."""
        return DenseMasks().last_tokens(case) + 1 - case.compress_block_size

    def windows(self, case: Case, x: np.ndarray) -> np.ndarray:
        tokens = self.first_tokens(case)[:, None] + np.arange(case.compress_block_size)
        return np.where((tokens >= 0)[..., None], x[:, :, np.maximum(tokens, 0)], 0)

    def sum_of_tokens(self, r: Rounding, windows: np.ndarray) -> np.ndarray:
        return r.store(r.total(windows.swapaxes(-1, -2)))

    def tokens_averaged(self, case: Case) -> np.ndarray:
        """By how many a mean divides; broadcasts to (blocks, dim)."""
        return np.array(case.compress_block_size)

    def through_relu(self, gradient: np.ndarray, before: np.ndarray) -> np.ndarray:
        return gradient * (before > 0)

    def overlapping(self, r: Rounding, there: np.ndarray, more: np.ndarray) -> np.ndarray:
        """The gradient of tokens, once another window's is added."""
        return r.store(there + more)

    # the whole

    def _affine(
        self, r: Rounding, x: np.ndarray, weight: np.ndarray, bias: np.ndarray
    ) -> np.ndarray:
        """One linear map for all heads, or one for each."""
        return r.store(r.store(r.dot(x, weight)) + bias[..., None, :])

    def _affine_vjp(
        self, r: Rounding, x: np.ndarray, weight: np.ndarray, d_out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of x, weight and bias. Of one head, each batch entry is summed by itself."""
        dx = r.store(r.dot(d_out, weight.swapaxes(-1, -2)))
        batch, heads, blocks, width = d_out.shape
        if weight.ndim == 3:
            each = r.store(r.dot(d_out.swapaxes(-1, -2), x.swapaxes(-1, -2)))
            of_head = d_out.transpose(1, 3, 0, 2).reshape(heads, width, batch * blocks)
            return dx, r.store(r.total(np.moveaxis(each, 0, -1))), r.store(r.total(of_head))
        rows = batch * heads * blocks
        columns = d_out.reshape(rows, width).T
        d_weight = r.dot(columns, x.reshape(rows, x.shape[3]).T)
        return dx, r.store(d_weight), r.store(r.total(columns))

    def _layers(self, case: Case, r: Rounding, x: Any, w: dict[str, np.ndarray]) -> Layers:
        windows = self.windows(case, x.astype(r.wide))
        if "positions" in w:
            windows = r.store(windows + w["positions"][:, None])
        if case.compress_map == "mean":
            total = self.sum_of_tokens(r, windows)
            mean = r.store(total / self.tokens_averaged(case).astype(r.wide))
            return Layers(windows, windows, mean)
        flat = windows.reshape(*windows.shape[:3], windows.shape[3] * windows.shape[4])
        if case.compress_map != "mlp":
            return Layers(windows, flat, self._affine(r, flat, w["weight"], w["bias"]))
        before = self._affine(r, flat, w["weight_in"], w["bias_in"])
        hidden = np.maximum(before, 0)
        return Layers(windows, before, self._affine(r, hidden, w["weight_out"], w["bias_out"]))

    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        r = self.rounding(case)
        w = {name: weight.astype(r.wide) for name, weight in weights.items()}
        return self._layers(case, r, x, w).out.astype(r.dtype)

    def pool_vjp(
        self, case: Case, x: Any, weights: dict[str, Any], d_out: Any
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        r = self.rounding(case)
        w = {name: weight.astype(r.wide) for name, weight in weights.items()}
        windows, before, _ = self._layers(case, r, x, w)
        r, gradient = self.rounding(case, backward=True), d_out.astype(r.wide)
        batch, kv_heads, blocks, length, dim = windows.shape
        flat = windows.reshape(batch, kv_heads, blocks, length * dim)
        d: dict[str, np.ndarray] = {}
        if case.compress_map == "mean":
            gradient = r.store(gradient / self.tokens_averaged(case).astype(r.wide))
            gradient = np.broadcast_to(gradient[..., None, :], windows.shape)
        elif case.compress_map == "mlp":
            found = self._affine_vjp(r, np.maximum(before, 0), w["weight_out"], gradient)
            gradient, d["weight_out"], d["bias_out"] = found
            gradient = self.through_relu(gradient, before)
            found = self._affine_vjp(r, flat, w["weight_in"], gradient)
            gradient, d["weight_in"], d["bias_in"] = found
        else:
            found = self._affine_vjp(r, flat, w["weight"], gradient)
            gradient, d["weight"], d["bias"] = found
        gradient = gradient.reshape(windows.shape)
        if "positions" in w:
            of_positions = gradient.transpose(1, 3, 4, 0, 2)
            terms = of_positions.reshape(kv_heads, length, dim, batch * blocks)
            d["positions"] = r.store(r.total(terms))
        dx, first = np.zeros(x.shape, r.wide), self.first_tokens(case)
        for j in range(length):
            real = first + j >= 0
            tokens = first[real] + j
            dx[:, :, tokens] = self.overlapping(r, dx[:, :, tokens], gradient[:, :, real, j])
        return dx.astype(r.dtype), {name: d[name].astype(r.dtype) for name in weights}


@mutant("C1", '"end" windows are averaged over their real tokens only')
class MeanOfRealTokens(CompressionMap):
    def tokens_averaged(self, case: Case) -> np.ndarray:
        stops = self.first_tokens(case) + case.compress_block_size
        return np.minimum(stops, case.compress_block_size)[:, None]


@mutant("C1", "windows begin one token late")
class WindowsLate(CompressionMap):
    def windows(self, case: Case, x: np.ndarray) -> np.ndarray:
        return super().windows(case, np.roll(x, -1, axis=2))


@mutant("C4", "means are accumulated in the dtype of the tokens")
class NarrowMean(CompressionMap):
    def sum_of_tokens(self, r: Rounding, windows: np.ndarray) -> np.ndarray:
        total = np.zeros_like(windows[..., 0, :])
        for j in range(windows.shape[3]):
            total = r.store(total + windows[..., j, :])
        return total


@mutant("C4", "intra-block positions are forgotten")
class NoPositions(CompressionMap):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        weights = {n: w * 0 if n == "positions" else w for n, w in weights.items()}
        return super().pool(case, x, weights)


@mutant("C4", "every kv head's map is the first head's")
class FirstHeadsMap(CompressionMap):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        if case.compress_map == "linear_per_head":
            first = np.broadcast_to(weights["weight"][:1], weights["weight"].shape)
            weights = {**weights, "weight": first}
        return super().pool(case, x, weights)


@mutant("C4", "the gradient passes the MLP's ReLU where it is shut")
class ReluPassesAll(CompressionMap):
    def through_relu(self, gradient: np.ndarray, before: np.ndarray) -> np.ndarray:
        return gradient


@mutant("C4", "overlapping windows overwrite each other's gradient")
class OverlapOverwritten(CompressionMap):
    def overlapping(self, r: Rounding, there: np.ndarray, more: np.ndarray) -> np.ndarray:
        return more


# --- what ran before ------------------------------------------------------------------------------


class _Static(CompressionMap):
    """Every result of a shape is written into the same memory, as by a captured graph."""

    def __init__(self, *way: Any) -> None:
        super().__init__(*way)
        self.memory: dict[Any, np.ndarray] = {}

    def written(self, result: np.ndarray) -> np.ndarray:
        """The result, where the next one will be."""
        place = self.memory.setdefault((result.shape, result.dtype), result)
        place[...] = result
        return place


@mutant(
    "C4",
    "the next call writes its compressed keys over those of the last",
    seen_in="captured CUDA graphs",
)
class CompressedKeysOverwritten(_Static):
    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        return self.written(super().pool(case, x, weights))


@mutant("C4", "the next call writes its dx over that of the last", seen_in="captured CUDA graphs")
class GradientOfTokensOverwritten(_Static):
    def pool_vjp(self, case: Case, *given: Any) -> Any:
        dx, dweights = super().pool_vjp(case, *given)
        return self.written(dx), dweights


@mutant("C4", "a map's weights are kept as they were when it was called first with these sizes")
class WeightsOfAnotherCall(CompressionMap):
    def __init__(self, *way: Any) -> None:
        super().__init__(*way)
        self.kept: dict[Case, dict[str, Any]] = {}

    def pool(self, case: Case, x: Any, weights: dict[str, Any]) -> np.ndarray:
        return super().pool(case, x, self.kept.setdefault(case, weights))
