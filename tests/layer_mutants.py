"""The zoo's layers: `LayerInSteps` with one step changed, and the clause that must notice."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layer_in_steps import LayerInSteps
from nsa_ref.testing import Case
from nsa_ref.testing.mutants import mutant


@mutant("G1", "gates of fine and sliding exchanged")
class GatesPermuted(LayerInSteps):
    def gates(self, case: Case, weights: Any, h: Tensor) -> Tensor:
        return super().gates(case, weights, h)[[0, 2, 1]]


@mutant("G1", "gates that sum to 1: softmax where sigmoid is meant")
class SoftmaxGates(LayerInSteps):
    def squashed(self, logits: Tensor) -> Tensor:
        return logits.softmax(0)


@mutant("G1", "every head takes the first head's gate")
class OneGateForAllHeads(LayerInSteps):
    def gates(self, case: Case, weights: Any, h: Tensor) -> Tensor:
        gates = super().gates(case, weights, h)
        return gates[:, :, :1].expand_as(gates)


@mutant("G1", "gates 0.3 % too large, less than a rounding of bfloat16")
class GatesSlightlyOff(LayerInSteps):
    def squashed(self, logits: Tensor) -> Tensor:
        return 1.003 * torch.sigmoid(logits)


@mutant("G1", "gates read x, where q, k and v read the normed x")
class GatesOfTheUnnormed(LayerInSteps):
    def gates(self, case: Case, weights: Any, h: Tensor) -> Tensor:
        return super().gates(case, weights, self.x)

    def normed(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        self.x = x
        return super().normed(case, weights, x)


@mutant("G1", "no gradient goes from the compressed blocks back to the tokens")
class CompressionDetached(LayerInSteps):
    def compressed_inputs(self, tokens: Tensor) -> Tensor:
        return tokens.detach()


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


@mutant("G2", "compressed key i is turned by i where i d is meant")
class RotaryByBlock(LayerInSteps):
    def places(self, case: Case, blocks: int) -> Tensor:
        return torch.arange(blocks)


@mutant("G2", "keys are pooled as they are where they are to be turned before")
class PoolsKeysAsTheyAre(LayerInSteps):
    def keys_to_pool(self, case: Case, k: Tensor) -> Tensor:
        return k


@mutant("G1", "one forced local block too few")
class LocalOneFewer(LayerInSteps):
    def forced(self, case: Case, tokens: int, blocks: int) -> Tensor:
        fewer = max(0, case.num_local_blocks - 1)
        return super().forced(dataclasses.replace(case, num_local_blocks=fewer), tokens, blocks)


@mutant("G1", "the choice of blocks knows no memory")
class ChoiceWithoutMemory(LayerInSteps):
    def scores(self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor, decoding: bool) -> Tensor:
        return super().scores(case, q, k_cmp, mem_k[:, :, :0], decoding)


@mutant("G1", "every batch entry reads the blocks that the first one chose")
class ChoiceOfTheFirst(LayerInSteps):
    def chosen(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        chosen, scores = super().chosen(*arguments)
        return chosen[:1].expand_as(chosen), scores


@mutant("G4", "compressed windows and blocks count from the first token of the batch")
class PackedWindows(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        parts = []
        for start, stop in itertools.pairwise(self.bounds(case, cu_seqlens)):
            ahead = start % case.selection_block_size
            padded = F.pad(x[None, start:stop], (0, 0, ahead, 0))
            parts.append(self._run(case, weights, padded, None, False)[0, ahead:])
        return torch.cat(parts)


@mutant("G3", "decoding leaves the memory out while no compressed block exists")
class MemoryForgottenAtDecode(LayerInSteps):
    def _run(self, case: Case, weights: Any, x: Tensor, given: Any, decoding: bool) -> Tensor:
        size, stride = case.compress_block_size, case.compress_block_sliding_stride
        first = size if case.semantics.compress_alignment == "start" else stride
        if decoding and x.shape[1] < first:
            weights = {**weights, **{n: weights[n][:, :0] for n in ("mem_k", "mem_v")}}
        return super()._run(case, weights, x, given, decoding)


@mutant("G3", "w keys at decoding, w + 1 in parallel")
class WindowOneOffAtDecode(LayerInSteps):
    def reach(self, case: Case, decoding: bool) -> int:
        return super().reach(case, decoding) - decoding


@mutant("G3", "a window that is completed at decoding holds its newest stride alone")
class OverlapLostAtTheCacheBoundary(LayerInSteps):
    def windows(self, case: Case, tokens: Tensor, decoding: bool) -> Tensor:
        windows = super().windows(case, tokens, decoding)
        old = case.compress_block_size - case.compress_block_sliding_stride
        if not decoding or old <= 0:
            return windows
        kept = torch.arange(case.compress_block_size) >= old
        return windows * kept[:, None]


@mutant("G3", "heads are summed by exp(s) at decoding, by softmax in parallel")
class ImportanceNotNormalisedAtDecode(LayerInSteps):
    def scores(self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor, decoding: bool) -> Tensor:
        if not decoding or case.semantics.importance == "logit_mean":
            return super().scores(case, q, k_cmp, mem_k, decoding)
        tokens, blocks = q.shape[2], k_cmp.shape[2]
        s = q @ k_cmp.repeat_interleave(case.group_size, dim=1).mT * case.scale
        weight = s.exp() * self.compress_mask(case, tokens, blocks, 0)
        count = -(-tokens // case.selection_block_size)
        shared = self.shared_strides(case, blocks, count).to(s.dtype)
        return (weight @ shared).unflatten(1, (case.kv_heads, -1)).sum(2)


@mutant("G4", "every sequence begins with the last token of the one before")
class SequencesLeak(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        offsets = self.bounds(case, cu_seqlens)
        parts = [
            self._run(case, weights, x[None, max(0, start - 1) : stop], None, False)[0]
            for start, stop in itertools.pairwise(offsets)
        ]
        lengths = [stop - start for start, stop in itertools.pairwise(offsets)]
        return torch.cat([part[len(part) - length :] for part, length in zip(parts, lengths)])


@mutant("G4", "sequences begin at whole selection blocks: right while every length is a multiple")
class OffsetsInBlocks(LayerInSteps):
    def bounds(self, case: Case, cu_seqlens: Tensor) -> list[int]:
        size = case.selection_block_size
        offsets = super().bounds(case, cu_seqlens)
        return [0, *(offset // size * size for offset in offsets[1:-1]), offsets[-1]]


@mutant("G4", "memory has the gradient of the first sequence alone")
class MemoryGradientOfOneSequence(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        parts = []
        for start, stop in itertools.pairwise(self.bounds(case, cu_seqlens)):
            parts.append(self._run(case, weights, x[None, start:stop], None, False)[0])
            weights = {n: w.detach() if n.startswith("mem_") else w for n, w in weights.items()}
        return torch.cat(parts)


@mutant("G4", "dx of a sequence's first token goes to the last token of the one before")
class GradientsLeak(LayerInSteps):
    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        before = x.roll(1, 0)
        first = torch.isin(torch.arange(len(x)), cu_seqlens[1:])[:, None]
        # the value is x, whatever stands before it
        moved = torch.where(first, x.detach() + (before - before.detach()), x)
        return super().varlen(case, weights, moved, cu_seqlens)


@mutant("G1", "blocks beyond the 128th are forced no more, and scores decide")
class LayerForcedUpTo128(LayerInSteps):
    def forced(self, case: Case, tokens: int, blocks: int) -> Tensor:
        forced = super().forced(case, tokens, blocks).clone()
        forced[..., 128:] = False
        return forced


@mutant("A4", "a straight-through term: no change in the output, a gradient in the scores")
class GradientThroughTheChoice(LayerInSteps):
    def after_selection(self, out: Tensor, scores: Tensor) -> Tensor:
        # what is invisible scores like a lowest number, beside which nothing is exact
        usable = torch.where(scores > -1e3, scores, 0).sum(-1, keepdim=True)
        usable = usable.repeat_interleave(out.shape[1] // usable.shape[1], dim=1)
        return out * (1 + usable - usable.detach())


@mutant("W1", "w keys, seen through the layer alone")
class WindowOneOffInTheLayer(LayerInSteps):
    def reach(self, case: Case, decoding: bool) -> int:
        return super().reach(case, decoding) - 1


@mutant("C2", "a compressed block is seen from its last token but one on")
class BlocksSeenTooEarly(LayerInSteps):
    def compress_mask(self, case: Case, tokens: int, blocks: int, memory: int) -> Tensor:  # type: ignore[override]
        later = super().compress_mask(case, tokens + 1, blocks, memory)
        return later[1:]


@mutant("F1", "the own block is read to its end, past the query")
class FineWithoutCut(LayerInSteps):
    def fine_mask(self, case: Case, tokens: int, chosen: Tensor) -> Tensor:  # type: ignore[override]
        mask = super().fine_mask(case, tokens, chosen)
        t = torch.arange(tokens) // case.selection_block_size
        same = t[:, None] == t
        return mask | (
            mask.gather(-1, torch.arange(tokens)[:, None].expand_as(mask[..., :1])) & same
        )
