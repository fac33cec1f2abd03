"""The layer a second time, step by step: right as it stands, and able to round as real ones do.

Attention, compression maps and the choice of blocks are parts: implementations by themselves, which
are called through the plug. Projections, norm, rotation and gates are torch's, with its gradients.
Decoding runs the tokens so far and keeps the last row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.numerics import NUMERICS
from nsa_ref.semantics import BRANCHES, LUCIDRAINS_FLEX, PAPER, Semantics
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Implementation, TorchImplementation
from nsa_ref.testing.mutants.compression import CompressionMap
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.rounding import RoundedImplementation, Rounding, Way
from nsa_ref.testing.mutants.selection import Selector

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerWay:
    """The decisions on which right layers differ.

    attention : of attention, compression maps and choice
    fused_projections : all projections of h as one matrix product
    wide : RMSNorm, rotary and combine in float32, each stored once
    turn_once : what several branches read is rotated once, not for each branch
    reverse : features are added up in the other order
    """

    attention: Way = Way()
    fused_projections: bool = False
    wide: bool = False
    turn_once: bool = False
    reverse: bool = False


class Read(NamedTuple):
    """What the branches attend with, one entry each; compress has the blocks without the memory.

    memory : of keys and values
    gates : (3, batch, q_heads, tokens)
    """

    q: dict[str, Tensor]
    k: dict[str, Tensor]
    v: dict[str, Tensor]
    memory: tuple[Tensor, Tensor]
    gates: Tensor


class LayerInSteps(TorchImplementation):
    """The row of numerics follows from the case's dtype, or is `row`."""

    name = "layer in steps"
    semantics: tuple[Semantics, ...] = (
        PAPER,
        LUCIDRAINS_FLEX,
        dataclasses.replace(PAPER, rotary="all", input_norm=True),
        dataclasses.replace(PAPER, kv_per_branch=False, output_projection=True),
        dataclasses.replace(PAPER, kv_per_branch=False, rotary="before_pooling"),
        dataclasses.replace(PAPER, causal=False),
    )
    numerics: Mapping[str, str] = {"float64": "fp64", "float32": "fp32"}
    kernel: RoundedImplementation = Kernel()
    maps: RoundedImplementation = CompressionMap()
    selector: RoundedImplementation = Selector()

    def __init__(self, way: LayerWay | None = None, row: str = "") -> None:
        super().__init__("cpu")
        self.way = way or LayerWay()
        if row:
            self.numerics = {NUMERICS[row].dtype: row}
            self.kernel = type(self.kernel)(self.way.attention, row)
            self.maps = type(self.maps)(self.way.attention, row)

    # steps

    def upcast(self, x: Tensor) -> Tensor:
        """In float32, where the way is to keep more digits for a moment."""
        return x.float() if self.way.wide and x.element_size() < 4 else x

    def norm_eps(self, case: Case) -> float:
        own = case.semantics.input_norm == "machine_eps" and case.dtype == "float64"
        return 2.0**-52 if own else 2.0**-23

    def normed(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        if not case.semantics.input_norm:
            return x
        wide, weight = self.upcast(x), weights["norm.weight"]
        mean = (wide * wide).mean(-1, keepdim=True) + self.norm_eps(case)
        if self.way.reverse:
            return (wide / mean.sqrt()).to(x.dtype) * weight
        return (wide * mean.rsqrt() * self.upcast(weight)).to(x.dtype)

    def linear(self, case: Case, x: Tensor, weight: Tensor) -> Tensor:
        r = Rounding(self.numerics[case.dtype])
        if r.tf32:
            of_x, of_weight = self.array((x, weight))

            def backward(d_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                columns = (y.reshape(-1, y.shape[-1]).T for y in (d_out, of_x))
                return r.dot(d_out, of_weight.T), r.dot(*columns)

            return self._bridge(case, (x, weight), lambda: r.dot(of_x, of_weight), backward)
        return x.flip(-1) @ weight.flip(-1).mT if self.way.reverse else x @ weight.mT

    def projections(self, case: Case, weights: Any, h: Tensor) -> dict[str, Tensor]:
        """Of all tokens by every matrix that reads h: (batch, tokens, width)."""
        import torch

        names = [n for n in weights if n.startswith("to_") and n != "to_out.weight"]
        names.append("gates.weight")
        if not self.way.fused_projections:
            return {name: self.linear(case, h, weights[name]) for name in names}
        together = self.linear(case, h, torch.cat([weights[name] for name in names]))
        return dict(zip(names, together.split([len(weights[name]) for name in names], dim=-1)))

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotated(x, positions, self.upcast(x).dtype)

    def turns(self, case: Case, branch: str) -> bool:
        rotary = case.semantics.rotary
        return rotary != "none" and (rotary != "fine_and_sliding" or branch != "compress")

    def turns_before_pooling(self, case: Case) -> bool:
        return case.semantics.rotary == "before_pooling"

    def places(self, case: Case, blocks: int) -> Tensor:
        """Where compressed keys stand when they are turned."""
        import torch

        return torch.arange(blocks) * case.compress_block_sliding_stride

    def memory(self, weights: Any, kind: str, batch: int) -> Tensor:
        return weights[f"mem_{kind}"].expand(batch, -1, -1, -1)

    def pooled(self, case: Case, weights: Any, kind: str, tokens: Tensor) -> Tensor:
        prefix = f"compress_{kind}."
        of_map = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        return self.part(case, self.maps, "pool", tokens, of_map)

    def squashed(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def gates(self, case: Case, weights: Any, projected: Tensor) -> Tensor:
        logits = (projected + weights["gates.bias"]).unflatten(-1, (3, case.q_heads))
        return self.squashed(logits.permute(2, 0, 3, 1))

    def chosen(self, case: Case, read: Read) -> np.ndarray:
        tensors = read.q["compress"], read.k["compress"], read.memory[0]
        return self.selector.run("select", case, *self.array(tensors))

    def after_selection(self, case: Case, out: Tensor, read: Read) -> Tensor:
        return out

    def combined(self, gates: Tensor, outs: list[Tensor]) -> Tensor:
        import torch

        if self.way.reverse and not self.way.wide:
            return torch.einsum("cbht,cbhtv->bhtv", gates, torch.stack(outs))
        terms = [self.upcast(g)[..., None] * self.upcast(out) for g, out in zip(gates, outs)]
        return (terms[0] + terms[1] + terms[2]).to(outs[0].dtype)

    # the whole

    def _bridge(
        self,
        case: Case,
        leaves: Sequence[Tensor],
        forward: Callable[[], np.ndarray],
        backward: Callable[[np.ndarray], Sequence[np.ndarray]],
    ) -> Tensor:
        """What NumPy computes of the leaves, as a tensor; the first of them have a gradient."""
        import torch

        class Bridge(torch.autograd.Function):
            @staticmethod
            def forward(*_: Any) -> Tensor:
                return self.tensor(case, forward())

            @staticmethod
            def backward(_: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
                found = [self.tensor(case, gradient) for gradient in backward(self.array(d_out))]
                return (*found, *[None] * (len(leaves) - len(found)))

        return Bridge.apply(*leaves)

    def part(self, case: Case, part: Implementation, method: str, *inputs: Any) -> Tensor:
        """What a part makes of tensors, or dicts of them."""
        arrays = self.array(inputs)

        def forward() -> np.ndarray:
            found = part.run(method, case, *arrays)
            return found.out if isinstance(found, Attention) else found

        def backward(d_out: np.ndarray) -> list[np.ndarray]:
            d_lse = () if method == "pool" else (np.zeros(d_out.shape[:3]),)
            return _leaves(part.run_vjp(method, case, *arrays, d_out, *d_lse))

        return self._bridge(case, _leaves(inputs), forward, backward)

    def read(self, case: Case, weights: Any, x: Tensor) -> Read:
        """Everything up to attention."""
        import torch

        projected = self.projections(case, weights, self.normed(case, weights, x))
        positions = torch.arange(x.shape[1])
        turned: dict[str, Tensor] = {}

        def of(kind: str, branch: str, turn: bool) -> Tensor:
            of_branch = f"_{branch}" if kind != "q" and case.semantics.kv_per_branch else ""
            name = f"to_{kind}{of_branch}.weight"
            heads = case.q_heads if kind == "q" else case.kv_heads
            y = projected[name].unflatten(-1, (heads, -1)).transpose(1, 2)
            if not turn:
                return y
            if name not in turned or not self.way.turn_once:
                turned[name] = self.turned(y, positions)
            return turned[name]

        before = self.turns_before_pooling(case)
        k_cmp = self.pooled(case, weights, "k", of("k", "compress", before))
        if self.turns(case, "compress") and case.semantics.rotary != "before_pooling":
            k_cmp = self.turned(k_cmp, self.places(case, k_cmp.shape[2]))
        v_cmp = self.pooled(case, weights, "v", of("v", "compress", False))
        k, v = {"compress": k_cmp}, {"compress": v_cmp}
        for branch in ("fine", "sliding"):
            k[branch] = of("k", branch, self.turns(case, branch))
            v[branch] = of("v", branch, False)
        q = {branch: of("q", branch, self.turns(case, branch)) for branch in BRANCHES}
        memory = self.memory(weights, "k", len(x)), self.memory(weights, "v", len(x))
        return Read(q, k, v, memory, self.gates(case, weights, projected["gates.weight"]))

    def run_tokens(
        self, case: Case, weights: Any, x: Tensor, given: np.ndarray | None = None
    ) -> Tensor:
        """All rows of x, as sequences of their own."""
        batch, tokens = x.shape[:2]
        lengths = {"batch": batch, "q_len": tokens, "kv_len": tokens}
        case = dataclasses.replace(case, layout="contiguous", **lengths)
        read = self.read(case, weights, x)
        blocks = self.chosen(case, read) if given is None else given
        more = {"compress": read.memory, "fine": (blocks,), "sliding": ()}
        outs = []
        for branch in BRANCHES:
            inputs = read.q[branch], read.k[branch], read.v[branch], *more[branch]
            outs.append(self.part(case, self.kernel, branch, *inputs))
        if given is None:
            outs[1] = self.after_selection(case, outs[1], read)
        out = self.combined(read.gates, outs).transpose(1, 2).flatten(2)
        to_out = weights.get("to_out.weight")
        return out if to_out is None else self.linear(case, out, to_out)

    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        """The newest row."""
        return self.run_tokens(case, weights, x)[:, -1:]

    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        """One of several that are packed."""
        return self.run_tokens(case, weights, x[None, start:stop])[0]

    # the plug

    def layer(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return self.run_tokens(case, weights, x)

    def layer_with_blocks(
        self, case: Case, weights: Any, x: Tensor, block_indices: Tensor
    ) -> Tensor:
        return self.run_tokens(case, weights, x, self.array(block_indices))

    def decode(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        import torch

        rows = [self.decoded(case, weights, x[:, : t + 1]) for t in range(x.shape[1])]
        return torch.cat([self.run_tokens(case, weights, x[:, :0]), *rows], dim=1)

    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        import torch

        bounds = itertools.pairwise(cu_seqlens.tolist())
        return torch.cat([self.sequence(case, weights, x, *one) for one in bounds])


def _leaves(value: Any) -> list[Any]:
    """The tensors or arrays in tuples and dicts, in order."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return [x for item in value for x in _leaves(item)] if isinstance(value, tuple) else [value]


def rotated(x: Tensor, positions: Tensor, dtype: Any) -> Tensor:
    """Pairs (2i, 2i + 1) turned, with cosines and sines as they are stored in a dtype.

    Angles are computed in float32 at least; the result has x's dtype.
    """
    import torch

    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    pair, dim = torch.arange(0, x.shape[-1], 2, dtype=exact), x.shape[-1]
    frequency = 1.0 / 10000.0 ** (pair / dim)
    if dtype != x.dtype:
        frequency = (-pair / dim * torch.tensor(10000.0, dtype=exact).log()).exp()
    angle = positions.to(exact)[:, None] * frequency
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    a, b = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
    pairs = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
    return pairs.reshape(x.shape).to(x.dtype)
