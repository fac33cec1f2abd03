"""Mutants of the layer: `LayerInSteps` with one step changed, or with a part that is a mutant."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER
from nsa_ref.testing.case import Case
from nsa_ref.testing.mutants.compression import CompressionMap, NoPositions
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.layer import LayerInSteps, LayerWay, Read
from nsa_ref.testing.mutants.masks import NoCausalCut, switched
from nsa_ref.testing.mutants.rounding import Rounding
from nsa_ref.testing.mutants.selection import (
    ForcedUpTo128,
    MemoryOutsideSoftmax,
    Selector,
    TieIntoTheFuture,
)
from nsa_ref.testing.mutants.zoo import mutant

if TYPE_CHECKING:
    from torch import Tensor

# --- gates, norm, projections ---------------------------------------------------------------------


@mutant("G1", "gates of fine and sliding are exchanged")
class GatesPermuted(LayerInSteps):
    def gates(self, case: Case, weights: Any, projected: Tensor) -> Tensor:
        return super().gates(case, weights, projected)[[0, 2, 1]]


@mutant("G1", "gates sum to 1: softmax where sigmoid is meant")
class SoftmaxGates(LayerInSteps):
    def squashed(self, logits: Tensor) -> Tensor:
        return logits.softmax(0)


@mutant("G1", "every head takes the first head's gate")
class OneGateForAllHeads(LayerInSteps):
    def gates(self, case: Case, weights: Any, projected: Tensor) -> Tensor:
        gates = super().gates(case, weights, projected)
        return gates[:, :, :1].expand_as(gates)


@mutant("G1", "one head's gate of one branch is 0.3 % too large, less than a rounding of bfloat16")
class GatesSlightlyOff(LayerInSteps):
    def squashed(self, logits: Tensor) -> Tensor:
        gates = super().squashed(logits)
        factor = gates.new_ones(gates.shape)
        factor[1, :, 0] = 1.003
        return gates * factor


@mutant("G1", "heads beyond a group's fourth take the fourth's gates")
class GatesOfFourHeads(LayerInSteps):
    def gates(self, case: Case, weights: Any, projected: Tensor) -> Tensor:
        head = np.arange(case.q_heads)
        in_group = head % case.group_size
        return super().gates(case, weights, projected)[:, :, head - in_group + in_group.clip(0, 3)]


class _LastHeadsGates(LayerInSteps):
    """Of a group of so many heads the last takes the gates of the one before."""

    group = 0

    def gates(self, case: Case, weights: Any, projected: Tensor) -> Tensor:
        gates, head = super().gates(case, weights, projected), np.arange(case.q_heads)
        if case.group_size != self.group:
            return gates
        return gates[:, :, head - (head % self.group == self.group - 1)]


@mutant(
    "G1",
    "of a group of 16 heads the last takes the gates of the one before",
    needs={"group_size": 16},
)
class GatesOf15Heads(_LastHeadsGates):
    group = 16


@mutant(
    "G1",
    "of a group of 5 heads the last takes the gates of the one before",
    needs={"group_size": 5},
)
class GatesOfFourHeadsOfFive(_LastHeadsGates):
    group = 5


@mutant("G1", "a third batch entry has the second one's gates", needs={"batch": "> 2"})
class GatesOfTwoEntries(LayerInSteps):
    def gates(self, case: Case, weights: Any, projected: Tensor) -> Tensor:
        gates = super().gates(case, weights, projected)
        # a copy is laid out in another way, and may be rounded in another way
        return gates if len(gates[0]) <= 2 else gates[:, np.arange(len(gates[0])).clip(0, 1)]


@mutant("G1", "in bfloat16 alone, gates are 1 % too large")
class GatesOnePercentOff(LayerInSteps):
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def squashed(self, logits: Tensor) -> Tensor:
        return super().squashed(logits) * 1.01


@mutant("G1", "in bfloat16 alone, a sigmoid that is right at 0 and 1 % too large elsewhere")
class GatesRightAtOneHalf(LayerInSteps):
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def squashed(self, logits: Tensor) -> Tensor:
        gates = super().squashed(logits)
        return gates.where(logits == 0, gates * 1.01)


@mutant("G1", "in bfloat16, with blocks handed in, gates are 1 % too large")
class GatesOnePercentOffWithBlocks(LayerInSteps):
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def layer_with_blocks(
        self, case: Case, weights: Any, x: Tensor, block_indices: Tensor
    ) -> Tensor:
        return GatesOnePercentOff().layer_with_blocks(case, weights, x, block_indices)


@mutant("G3", "in bfloat16, gates are 1 % too large at decoding")
class GatesOnePercentOffAtDecode(LayerInSteps):
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return GatesOnePercentOff().decoded(case, weights, x)


@mutant("G4", "in bfloat16, gates of packed sequences are 1 % too large")
class GatesOnePercentOffWhenPacked(LayerInSteps):
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        return GatesOnePercentOff().sequence(case, weights, x, start, stop)


@mutant("G1", "in bfloat16 alone, the output projection is 1 % too large")
class ProjectionOnePercentOff(LayerInSteps):
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def run_tokens(
        self, case: Case, weights: Any, x: Tensor, given: np.ndarray | None = None
    ) -> Tensor:
        weights = {n: w * 1.01 if n == "to_out.weight" else w for n, w in weights.items()}
        return super().run_tokens(case, weights, x, given)


@mutant("G1", "in bfloat16, kept in float32 on the way, one branch's gates are 1 % too small")
class FineGatesOnePercentSmall(LayerInSteps):
    def __init__(self) -> None:
        super().__init__(LayerWay(wide=True), "bf16")

    def squashed(self, logits: Tensor) -> Tensor:
        gates = super().squashed(logits)
        factor = gates.new_ones(gates.shape)
        factor[1] = 0.99
        return gates * factor


@mutant("G1", "in bfloat16 alone, gradients of gates are 1 % too large")
class GateGradientOnePercentOff(LayerInSteps):
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def squashed(self, logits: Tensor) -> Tensor:
        gates = super().squashed(logits)
        return gates + 0.01 * (gates - gates.detach())


@mutant("G1", "in bfloat16 alone, the projection's gradient is 1 % too large")
class ProjectionGradientOnePercentOff(LayerInSteps):
    semantics = (dataclasses.replace(PAPER, kv_per_branch=False, output_projection=True),)
    numerics: Mapping[str, str] = {"bfloat16": "bf16-eager"}

    def run_tokens(
        self, case: Case, weights: Any, x: Tensor, given: np.ndarray | None = None
    ) -> Tensor:
        weights = {
            n: w + 0.01 * (w - w.detach()) if n == "to_out.weight" else w
            for n, w in weights.items()
        }
        return super().run_tokens(case, weights, x, given)


@mutant("G1", "no gradient goes through one branch's gate")
class GateDetached(LayerInSteps):
    def squashed(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[1] = logits[1].detach()
        return super().squashed(logits)


@mutant("G1", "gates read x, where q, k and v read the normed x")
class GatesOfTheUnnormed(LayerInSteps):
    def normed(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        self.x = x
        return super().normed(case, weights, x)

    def gates(self, case: Case, weights: Any, projected: Tensor) -> Tensor:
        unnormed = self.linear(case, self.x, weights["gates.weight"])
        return super().gates(case, weights, unnormed)


@mutant("G1", "the norm adds an epsilon of 1e-2 to the mean square")
class LargeNormEpsilon(LayerInSteps):
    def norm_eps(self, case: Case) -> float:
        return 1e-2


@mutant(
    "G1",
    "the norm's epsilon is 2^-23 in float64, too, where machine_eps is declared",
    needs={"dtype": "float64"},
)
class NormEpsilonOfFloat32(LayerInSteps):
    def norm_eps(self, case: Case) -> float:
        return 2.0**-23


@mutant("G1", "the last token is missing in the gradient of the queries' weight")
class TokenMissingInAWeight(LayerInSteps):
    def projections(self, case: Case, weights: Any, h: Tensor) -> dict[str, Tensor]:
        projected, name = super().projections(case, weights, h), "to_q.weight"
        last = self.linear(case, h[:, -1:], weights[name].detach())
        projected[name] = projected[name].clone()
        projected[name][:, -1:] = last
        return projected


@mutant(
    "G1",
    "of a sequence of one token, nothing is read",
    seen_in="loops to the length less one",
    needs={"kv_len": 1},
)
class OneTokenNotRead(LayerInSteps):
    def run_tokens(
        self, case: Case, weights: Any, x: Tensor, given: np.ndarray | None = None
    ) -> Tensor:
        return super().run_tokens(case, weights, x, given) * int(x.shape[1] != 1)


# --- compression and memory -----------------------------------------------------------------------


@mutant("G1", "no gradient goes from the compressed blocks back to the tokens")
class CompressionDetached(LayerInSteps):
    def pooled(self, case: Case, weights: Any, kind: str, tokens: Tensor) -> Tensor:
        return super().pooled(case, weights, kind, tokens.detach())


@mutant("G1", "intra-block positions are forgotten, seen through the layer alone")
class NoPositionsInTheLayer(LayerInSteps):
    maps = NoPositions()


@mutant("G1", "memory has the gradient of the first batch entry alone")
class MemoryGradientOfOneEntry(LayerInSteps):
    def memory(self, weights: Any, kind: str, batch: int) -> Tensor:
        memory = super().memory(weights, kind, batch).clone()
        memory[1:] = memory[1:].detach()
        return memory


# --- rotation -------------------------------------------------------------------------------------


@mutant("G2", "nothing is turned")
class NothingTurned(LayerInSteps):
    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


@mutant("G2", "the compressed branch's queries are turned as well")
class RotaryOnCompress(LayerInSteps):
    def turns(self, case: Case, branch: str) -> bool:
        return case.semantics.rotary != "none"


@mutant("G2", "pairs (i, i + dim / 2) where (2i, 2i + 1) are meant")
class RotaryByHalves(LayerInSteps):
    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        swapped = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        turned = super().turned(swapped, positions)
        return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@mutant("G2", "q and k of the sliding branch are not turned")
class RotaryForgottenInSliding(LayerInSteps):
    def turns(self, case: Case, branch: str) -> bool:
        return super().turns(case, branch) and branch != "sliding"


@mutant("G2", "compressed key i is turned by i where i d is meant", needs={"rotary": "all"})
class RotaryByBlock(LayerInSteps):
    def places(self, case: Case, blocks: int) -> Tensor:
        return super().places(case, blocks) // case.compress_block_sliding_stride


@mutant(
    "G2",
    "keys are pooled as they are where they are to be turned before",
    needs={"rotary": "before_pooling"},
)
class PoolsKeysAsTheyAre(LayerInSteps):
    def turns_before_pooling(self, case: Case) -> bool:
        return False


@mutant(
    "G2",
    "positions are kept in bfloat16: beyond 256 every other one is lost",
    needs={"kv_len": "> 256"},
)
class PositionsInBfloat16(LayerInSteps):
    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().turned(x, positions.bfloat16().long())


@mutant(
    "G4",
    "packed: positions are kept in bfloat16, and beyond 256 every other one is lost",
    needs={"kv_len": "> 256"},
)
class PackedPositionsInBfloat16(LayerInSteps):
    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        return PositionsInBfloat16().sequence(case, weights, x, start, stop)


@mutant(
    "G3",
    "at decoding, positions are kept in bfloat16, and beyond 256 every other one is lost",
    needs={"kv_len": "> 256"},
)
class DecodePositionsInBfloat16(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return PositionsInBfloat16().decoded(case, weights, x)


@mutant("G4", "packed: rows beyond a sequence's 64th are not written", needs={"kv_len": "> 64"})
class PackedRowsUpTo64(LayerInSteps):
    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        import torch

        rows = super().sequence(case, weights, x, start, stop)
        written = torch.arange(stop - start)[:, None] < 64
        return torch.where(written, rows, 0)


@mutant("G2", "heads beyond the second are not turned", needs={"q_heads": "> 2"})
class TwoHeadsTurned(LayerInSteps):
    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        import torch

        return torch.cat([super().turned(x[:, :2], positions), x[:, 2:]], dim=1)


# --- logits that are large ------------------------------------------------------------------------


class _NoMaximum(Kernel):
    """Right while no logit is above 88; in float64 709."""

    def peak(self, before: np.ndarray, scores: np.ndarray, masked: np.ndarray) -> np.ndarray:
        return np.zeros_like(before)


@mutant("G1", "the maximum is not subtracted, seen through the layer alone")
class NoMaximumInTheLayer(LayerInSteps):
    kernel = _NoMaximum()


class _NoMaximumBackward(Kernel):
    """Right forward."""

    def attend_vjp(self, *given: Any) -> Any:
        return _NoMaximum().attend_vjp(*given)


@mutant("G1", "the maximum is subtracted, but not in the backward, seen through the layer alone")
class NoMaximumInTheLayerBackward(LayerInSteps):
    kernel = _NoMaximumBackward()


@mutant("G3", "the maximum is subtracted, but not at decoding")
class NoMaximumAtDecode(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return NoMaximumInTheLayer().decoded(case, weights, x)


@mutant("G4", "the maximum is subtracted, but not of packed sequences")
class NoMaximumWhenPacked(LayerInSteps):
    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        return NoMaximumInTheLayer().sequence(case, weights, x, start, stop)


class LayerWithFloor(LayerInSteps):
    """Blocks of next to no score are not read, as in upstream's plain path."""

    name = "layer with a floor"
    semantics = (dataclasses.replace(LUCIDRAINS_FLEX, score_floor=1e-10),)


@mutant("G1", "a layer knows no score_floor, where all tokens are given at once")
class FloorIgnoredInTheLayer(LayerWithFloor):
    def layer(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return super().layer(switched(case, score_floor=None), weights, x)


@mutant(
    "G3",
    "decoding knows no score_floor",
    seen_in="lucidrains/native-sparse-attention-pytorch, the other way round",
)
class FloorIgnoredAtDecode(LayerWithFloor):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return super().decoded(switched(case, score_floor=None), weights, x)


@mutant("G4", "packed sequences know no score_floor")
class FloorIgnoredWhenPacked(LayerWithFloor):
    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        return super().sequence(switched(case, score_floor=None), weights, x, start, stop)


class _PaddedScale(Kernel):
    """That of the next power of two, to which tiles are padded."""

    def scale(self, case: Case) -> float:
        return float((1 << (case.head_dim - 1).bit_length()) ** -0.5)


@mutant(
    "G1",
    "a head's features are padded to a power of two, and the scale is that of the padded",
    needs={"head_dim": "!= 64"},
)
class ScaleOfPaddedHeads(LayerInSteps):
    kernel = _PaddedScale()


# --- masks and choice -----------------------------------------------------------------------------


class _ShortWindow(Kernel):
    def sliding_mask(self, case: Case) -> np.ndarray:
        return super().sliding_mask(switched(case, window_closed=False))


class _EarlyBlocks(Kernel):
    def last_tokens(self, case: Case) -> np.ndarray:
        return super().last_tokens(case) - 1


class _NoCut(Kernel):
    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        return NoCausalCut().fine_mask(case, block_indices)


class _ReadsPadding(Kernel):
    """Without causality, a window of zero keys stands before the first one and behind the last."""

    def attend(
        self, case: Case, branch: str, mask: np.ndarray, q: Any, k: Any, v: Any
    ) -> Attention:
        if branch == "sliding" and not case.semantics.causal:
            w = case.sliding_window_size
            k, v = (np.pad(x, [(0, 0), (0, 0), (w, w), (0, 0)]) for x in (k, v))
            row = np.arange(case.q_len)[:, None] + case.kv_len - case.q_len
            mask = np.abs(row - np.arange(-w, case.kv_len + w)) <= w
        return super().attend(case, branch, mask, q, k, v)


class _CausalBlocks(Kernel):
    """Even where nothing else is causal."""

    def compress_mask(self, case: Case) -> np.ndarray:
        return super().compress_mask(switched(case, causal=True))

    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        return super().fine_mask(switched(case, causal=True), block_indices)


@mutant(
    "W2", "keys of zeros before the first token and behind the last are read, in the layer alone"
)
class WindowOfPadding(LayerInSteps):
    kernel = _ReadsPadding()


@mutant(
    "C3", "without causality, blocks that end behind the query are not read, in the layer alone"
)
class LaterBlocksNotReadInTheLayer(LayerInSteps):
    kernel = _CausalBlocks()


@mutant("F4", "without causality, selected blocks are cut at the query, in the layer alone")
class FineCutBothWays(LayerInSteps):
    kernel = _CausalBlocks()


@mutant("W1", "w keys, seen through the layer alone")
class WindowOneOffInTheLayer(LayerInSteps):
    kernel = _ShortWindow()


@mutant("C2", "a compressed block is seen from its last token but one on")
class BlocksSeenTooEarly(LayerInSteps):
    kernel = _EarlyBlocks()


@mutant("F1", "the own block is read to its end, past the query")
class FineWithoutCut(LayerInSteps):
    kernel = _NoCut()


@mutant("G1", "one forced local block too few")
class LocalOneFewer(LayerInSteps):
    def chosen(self, case: Case, read: Read) -> np.ndarray:
        fewer = max(0, case.num_local_blocks - 1)
        return super().chosen(dataclasses.replace(case, num_local_blocks=fewer), read)


@mutant("G1", "the choice of blocks knows no memory")
class ChoiceWithoutMemory(LayerInSteps):
    selector = MemoryOutsideSoftmax()


@mutant(
    "G1",
    "blocks beyond the 128th are forced no more, and scores decide",
    needs={"num_selection_blocks": "> 128"},
)
class LayerForcedUpTo128(LayerInSteps):
    selector = ForcedUpTo128()


@mutant(
    "G3",
    "at decoding, blocks beyond the 128th are forced no more",
    needs={"num_selection_blocks": "> 128"},
)
class DecodeForcedUpTo128(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return LayerForcedUpTo128().decoded(case, weights, x)


@mutant("G1", "of equal scores at the cutoff, the future's 0 is taken before the past's")
class FutureZerosInTheLayer(LayerInSteps):
    selector = TieIntoTheFuture()


@mutant("G1", "every batch entry reads the blocks that the first one chose")
class ChoiceOfTheFirst(LayerInSteps):
    def chosen(self, case: Case, read: Read) -> np.ndarray:
        chosen = super().chosen(case, read)
        return np.broadcast_to(chosen[:1], chosen.shape)


@mutant("A4", "a straight-through term: no change in the output, a gradient in the logits")
class GradientThroughTheChoice(LayerInSteps):
    def after_selection(self, case: Case, out: Tensor, read: Read) -> Tensor:
        k_cmp = read.k["compress"].repeat_interleave(case.group_size, dim=1)
        logits = read.q["compress"] @ k_cmp.mT
        usable = logits.sum(-1, keepdim=True)
        return out * (1 + usable - usable.detach())


# --- decoding -------------------------------------------------------------------------------------


@mutant(
    "G3",
    "decoding leaves the memory out while no compressed block exists",
    seen_in="lucidrains/native-sparse-attention-pytorch",
)
class MemoryForgottenAtDecode(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        if not dataclasses.replace(case, kv_len=x.shape[1]).num_compress_blocks:
            weights = {**weights, **{n: weights[n][:, :0] for n in ("mem_k", "mem_v")}}
            case = dataclasses.replace(case, num_mem_kv=0)
        return super().decoded(case, weights, x)


@mutant("G3", "w keys at decoding, w + 1 in parallel", seen_in="public layers, the other way round")
class WindowOneOffAtDecode(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return WindowOneOffInTheLayer().decoded(case, weights, x)


@mutant(
    "G3",
    "a cache that was not emptied holds the first token of an earlier request",
    seen_in="public caches",
)
class CacheOfAnotherRequest(LayerInSteps):
    def __init__(self) -> None:
        super().__init__()
        self.earlier: dict[Case, Tensor] = {}

    def decode(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        import torch

        earlier = self.earlier.setdefault(case, x)
        return super().decode(case, weights, torch.cat([earlier[:, :1], x[:, 1:]], dim=1))


class _FirstBlocks(Kernel):
    def compress_mask(self, case: Case) -> np.ndarray:
        mask = super().compress_mask(case)
        mask[:, case.num_mem_kv + 48 :] = False
        return mask


@mutant(
    "G3",
    "the cache has room for 48 compressed blocks, and later ones are not read",
    needs={"kv_len": "> 48"},
)
class CacheOf48Blocks(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        layer = LayerInSteps()
        layer.kernel = _FirstBlocks()
        return layer.decoded(case, weights, x)


@mutant(
    "G3",
    "the cache has compressed keys of two sequences, and a third reads the second's",
    needs={"batch": "> 2"},
)
class CacheOfTwoSequences(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return _BlocksOfTwoSequences().decoded(case, weights, x)


class _BlocksOfTwoSequences(LayerInSteps):
    def pooled(self, case: Case, weights: Any, kind: str, tokens: Tensor) -> Tensor:
        pooled = super().pooled(case, weights, kind, tokens)
        return pooled[[min(entry, 1) for entry in range(len(pooled))]]


class _Overwritten(LayerInSteps):
    """Every result of a shape is written into the same memory, as by a captured graph."""

    def __init__(self) -> None:
        super().__init__()
        self.memory_of: dict[Any, Tensor] = {}

    def written(self, result: Tensor) -> Tensor:
        """The result, where the next one will be."""
        if result.requires_grad:
            return result
        return self.memory_of.setdefault((result.shape, result.dtype), result).copy_(result)

    def with_static_gradient(self, x: Tensor) -> Tensor:
        """The same numbers; what comes back to x stands where the next one will be."""
        import torch

        class Static(torch.autograd.Function):
            @staticmethod
            def forward(_: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(_: Any, d: Tensor) -> Tensor:
                return self.written(d.clone())

        return Static.apply(x)


@mutant(
    "G1", "the next call writes its output over that of the last", seen_in="captured CUDA graphs"
)
class LayerOutputOverwritten(_Overwritten):
    def layer(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return self.written(super().layer(case, weights, x))


@mutant(
    "G3", "the next request writes its output over that of the last", seen_in="captured CUDA graphs"
)
class DecodedOutputOverwritten(_Overwritten):
    def decode(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return self.written(super().decode(case, weights, x))


@mutant("G1", "the next call writes its dx over that of the last", seen_in="captured CUDA graphs")
class LayerGradientOverwritten(_Overwritten):
    def layer(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return super().layer(case, weights, self.with_static_gradient(x))


@mutant("G1", "with blocks handed in, the next call writes its output over that of the last")
class OutputWithBlocksOverwritten(_Overwritten):
    def layer_with_blocks(
        self, case: Case, weights: Any, x: Tensor, block_indices: Tensor
    ) -> Tensor:
        return self.written(super().layer_with_blocks(case, weights, x, block_indices))


@mutant("G1", "with blocks handed in, the next call writes its dx over that of the last")
class GradientWithBlocksOverwritten(_Overwritten):
    def layer_with_blocks(
        self, case: Case, weights: Any, x: Tensor, block_indices: Tensor
    ) -> Tensor:
        return super().layer_with_blocks(case, weights, self.with_static_gradient(x), block_indices)


@mutant("G1", "blocks that are handed in are kept, and serve the next call")
class BlocksHandedInBefore(LayerInSteps):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Case, Tensor] = {}

    def layer_with_blocks(
        self, case: Case, weights: Any, x: Tensor, block_indices: Tensor
    ) -> Tensor:
        kept = self.kept.setdefault(case, block_indices)
        return super().layer_with_blocks(case, weights, x, kept)


@mutant("G1", "a projection's weight is kept, and serves the next call")
class ProjectionOfAnotherCall(LayerInSteps):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Case, Tensor] = {}

    def layer(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        kept = self.kept.setdefault(case, weights["to_q.weight"].detach())
        return super().layer(case, {**weights, "to_q.weight": kept}, x)


@mutant("G3", "compressed keys of a request are kept in the cache, and serve the next one")
class BlocksOfAnotherRequest(LayerInSteps):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Any, Tensor] = {}
        self.decoding = False

    def pooled(self, case: Case, weights: Any, kind: str, tokens: Tensor) -> Tensor:
        pooled = super().pooled(case, weights, kind, tokens)
        if not self.decoding:
            return pooled
        return self.kept.setdefault((case, kind), pooled.detach())

    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        self.decoding = True
        try:
            return super().decoded(case, weights, x)
        finally:
            self.decoding = False


@mutant("G1", "compressed values are kept, and serve the next call of the same sizes")
class BlocksOfAnotherCall(LayerInSteps):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def pooled(self, case: Case, weights: Any, kind: str, tokens: Tensor) -> Tensor:
        pooled = super().pooled(case, weights, kind, tokens)
        of = tokens.detach()
        last, blocks = self.kept.get((case, kind), (of, pooled))
        self.kept[case, kind] = of, pooled.detach()
        return pooled if last.equal(of) else blocks


class _NewestStride(CompressionMap):
    """Windows are zero but for their newest stride."""

    def windows(self, case: Case, x: np.ndarray) -> np.ndarray:
        old = case.compress_block_size - case.compress_block_sliding_stride
        kept = np.arange(case.compress_block_size) >= old
        return super().windows(case, x) * kept[:, None]


@mutant(
    "G3",
    "a window that is completed at decoding holds its newest stride alone",
    seen_in="public caches",
)
class OverlapLostAtTheCacheBoundary(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        layer = LayerInSteps()
        layer.maps = _NewestStride()
        return layer.decoded(case, weights, x)


@mutant(
    "G3",
    "of a request of one token, nothing is decoded",
    seen_in="loops to the length less one",
    needs={"kv_len": 1},
)
class OneTokenNotDecoded(LayerInSteps):
    def decode(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return super().decode(case, weights, x) * int(x.shape[1] != 1)


class _SumOfExponentials(Selector):
    """Scores are not normalised over the columns."""

    def probabilities(self, r: Rounding, logits: np.ndarray, visible: np.ndarray) -> np.ndarray:
        return np.exp(logits) * visible


@mutant(
    "G3", "heads are summed by exp(s) at decoding, by softmax in parallel", seen_in="public layers"
)
class ImportanceNotNormalisedAtDecode(LayerInSteps):
    def decoded(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        layer = LayerInSteps()
        layer.selector = _SumOfExponentials()
        return layer.decoded(case, weights, x)


# --- packed sequences -----------------------------------------------------------------------------


@mutant("G4", "compressed windows and blocks count from the first token of the batch")
class PackedWindows(LayerInSteps):
    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        ahead = start % case.selection_block_size
        padded = x.new_zeros(ahead + stop - start, x.shape[1])
        padded[ahead:] = x[start:stop]
        return super().sequence(case, weights, padded, 0, len(padded))[ahead:]


@mutant("G4", "every sequence begins with the last token of the one before")
class SequencesLeak(LayerInSteps):
    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        before = max(0, start - 1)
        return super().sequence(case, weights, x, before, stop)[start - before :]


@mutant("G4", "memory has the gradient of the first sequence alone")
class MemoryGradientOfOneSequence(LayerInSteps):
    def sequence(self, case: Case, weights: Any, x: Tensor, start: int, stop: int) -> Tensor:
        if start:
            weights = {n: w.detach() if n.startswith("mem_") else w for n, w in weights.items()}
        return super().sequence(case, weights, x, start, stop)


@mutant("G4", "sequences begin at whole selection blocks", seen_in="public kernels")
class OffsetsInBlocks(LayerInSteps):
    """Right while every length is a multiple of one."""

    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        rounded = cu_seqlens // case.selection_block_size * case.selection_block_size
        rounded[-1] = cu_seqlens[-1]
        return super().varlen(case, weights, x, rounded)


@mutant("G4", "one sequence alone takes another path, whose window has one key less")
class OneSequenceAlone(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        layer = WindowOneOffInTheLayer() if len(cu_seqlens) == 2 else LayerInSteps()
        return layer.varlen(case, weights, x, cu_seqlens)


@mutant("G4", "the sequence before an empty last one loses its last row")
class LastSequenceEmpty(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        found = super().varlen(case, weights, x, cu_seqlens)
        if len(cu_seqlens) > 2 and cu_seqlens[-1] == cu_seqlens[-2] > 0:
            kept = found.new_ones(len(found), 1)
            kept[-1] = 0
            found = found * kept
        return found


@mutant(
    "G4",
    "where no sequence has more than one token, none is read",
    seen_in="loops to the longest length less one",
    needs={"kv_len": 1},
)
class SingleTokensNotRead(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        found = super().varlen(case, weights, x, cu_seqlens)
        return found * int(max(cu_seqlens.diff(), default=0) > 1)


@mutant(
    "G4", "the next batch writes its output over that of the last", seen_in="captured CUDA graphs"
)
class PackedOutputOverwritten(_Overwritten):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.written(super().varlen(case, weights, x, cu_seqlens))


@mutant("G4", "the next batch writes its dx over that of the last", seen_in="captured CUDA graphs")
class PackedGradientOverwritten(_Overwritten):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return super().varlen(case, weights, self.with_static_gradient(x), cu_seqlens)


@mutant("G4", "offsets are kept, and serve the next batch of as many tokens and sequences")
class OffsetsOfAnotherBatch(LayerInSteps):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Case, Tensor] = {}

    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return super().varlen(case, weights, x, self.kept.setdefault(case, cu_seqlens))


@mutant("G4", "dx of a sequence's first token goes to the last token of the one before")
class GradientsLeak(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        # the value is x, whatever stands before it
        moved, first = x.clone(), cu_seqlens[1:-1].unique()
        first = first[(first > 0) & (first < len(x))]
        moved[first] = x[first].detach() + (x[first - 1] - x[first - 1].detach())
        return super().varlen(case, weights, moved, cu_seqlens)
