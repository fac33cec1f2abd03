"""The layer a second time: dense torch, gradients from autograd, every step a method.

Right for the semantics that it declares; the mutants of the layer change one step. It decodes by
running the tokens so far and keeping the last row, with `decoding` telling each step so.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER
from nsa_ref.testing import Case, TorchImplementation

BRANCHES = ("compress", "fine", "sliding")


class LayerInSteps(TorchImplementation):
    name = "layer in steps"
    semantics = (
        PAPER,
        LUCIDRAINS_FLEX,
        dataclasses.replace(PAPER, rotary="all", input_norm=True),
        dataclasses.replace(PAPER, kv_per_branch=False, output_projection=True),
        dataclasses.replace(PAPER, kv_per_branch=False, rotary="before_pooling"),
        dataclasses.replace(PAPER, causal=False),
    )
    numerics: Mapping[str, str] = {"float64": "fp64", "float32": "fp32"}

    # steps

    def normed(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        if not case.semantics.input_norm:
            return x
        return F.rms_norm(x, (case.model_dim,), weights["norm.weight"], eps=2**-23)

    def project(self, h: Tensor, weight: Tensor, heads: int) -> Tensor:
        return F.linear(h, weight).unflatten(-1, (heads, -1)).transpose(1, 2)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        dim = x.shape[-1]
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = positions.to(torch.float64)[:, None] * frequency
        turn = torch.polar(torch.ones_like(angle), angle)
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    def turns(self, case: Case, branch: str) -> bool:
        return case.semantics.rotary in ("all", "before_pooling") or (
            case.semantics.rotary == "fine_and_sliding" and branch != "compress"
        )

    def places(self, case: Case, blocks: int) -> Tensor:
        """Where compressed keys stand when they are turned."""
        return torch.arange(blocks) * case.compress_block_sliding_stride

    def keys_to_pool(self, case: Case, k: Tensor) -> Tensor:
        turned = case.semantics.rotary == "before_pooling"
        return self.turned(k, torch.arange(k.shape[2])) if turned else k

    def memory(self, weights: Any, kind: str, batch: int, decoding: bool) -> Tensor:
        return weights[f"mem_{kind}"].expand(batch, -1, -1, -1)

    def windows(self, case: Case, tokens: Tensor, decoding: bool) -> Tensor:
        """(batch, kv_heads, blocks, l, dim)."""
        size, stride = case.compress_block_size, case.compress_block_sliding_stride
        if case.semantics.compress_alignment == "end":
            # windows may also be shorter than their stride
            before = size - stride
            tokens = F.pad(tokens, (0, 0, before, 0)) if before > 0 else tokens[:, :, -before:]
        if tokens.shape[2] < size:
            return tokens.new_zeros((*tokens.shape[:2], 0, size, tokens.shape[3]))
        return tokens.unfold(2, size, stride).transpose(-1, -2)

    def pooled(self, case: Case, weights: Any, kind: str, tokens: Tensor, decoding: bool) -> Tensor:
        w = {n[11:]: x for n, x in weights.items() if n.startswith(f"compress_{kind}.")}
        windows = self.windows(case, tokens, decoding)
        if "positions" in w:
            windows = windows + w["positions"][:, None]
        if case.compress_map == "mean":
            return windows.mean(-2)
        flat = windows.flatten(-2)
        if case.compress_map == "linear_per_head":
            return flat @ w["weight"].mT + w["bias"][:, None]
        if case.compress_map == "linear":
            return F.linear(flat, w["weight"], w["bias"])
        hidden = F.relu(F.linear(flat, w["weight_in"], w["bias_in"]))
        return F.linear(hidden, w["weight_out"], w["bias_out"])

    def gates(self, case: Case, weights: Any, h: Tensor) -> Tensor:
        """(3, batch, q_heads, tokens)."""
        logits = F.linear(h, weights["gates.weight"], weights["gates.bias"])
        return self.squashed(logits.unflatten(-1, (3, case.q_heads)).permute(2, 0, 3, 1))

    def squashed(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def reach(self, case: Case, decoding: bool) -> int:
        closed = case.semantics.window_closed
        return case.sliding_window_size if closed else case.sliding_window_size - 1

    def sliding_mask(self, case: Case, tokens: int, decoding: bool) -> Tensor:  # type: ignore[override]
        t = torch.arange(tokens)
        distance = t[:, None] - t
        if not case.semantics.causal:
            distance = distance.abs()
        return (distance >= 0) & (distance <= self.reach(case, decoding))

    def ends(self, case: Case, blocks: int) -> Tensor:
        """Last token of every compressed block."""
        stride = case.compress_block_sliding_stride
        start = case.semantics.compress_alignment == "start"
        first = case.compress_block_size if start else stride
        return torch.arange(blocks) * stride + first - 1

    def compress_mask(self, case: Case, tokens: int, blocks: int, memory: int) -> Tensor:  # type: ignore[override]
        ends = self.ends(case, blocks) + case.semantics.compress_strict
        seen = ends <= torch.arange(tokens)[:, None]
        if not case.semantics.causal:
            seen = torch.ones_like(seen)
        return F.pad(seen, (memory, 0), value=True)

    def fine_mask(self, case: Case, tokens: int, chosen: Tensor) -> Tensor:  # type: ignore[override]
        size = case.selection_block_size
        blocks = -(-tokens // size)
        known = (chosen >= 0) & (chosen < blocks)
        member = torch.zeros((*chosen.shape[:3], blocks + 1), dtype=torch.bool)
        member.scatter_(-1, torch.where(known, chosen, blocks), True)
        t = torch.arange(tokens)
        if case.semantics.own_block_extra and case.semantics.causal:
            member[:, :, t, t // size] = True
        mask = member[..., t // size]
        if case.semantics.causal:
            mask = mask & (t <= t[:, None])
        return mask.repeat_interleave(case.q_heads // chosen.shape[1], dim=1)

    def attended(self, case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(case.group_size, dim=1) for x in (k, v))
        if k.shape[2] == 0:
            return q.new_zeros((*q.shape[:3], v.shape[3]))
        scores = (q @ k.mT * case.scale).masked_fill(~mask, -math.inf)
        empty = ~mask.any(-1, keepdim=True)
        return (scores.masked_fill(empty, 0).softmax(-1) * ~empty) @ v

    def scores(self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor, decoding: bool) -> Tensor:
        """Of every selection block: (batch, selection heads, tokens, blocks)."""
        tokens, blocks, memory = q.shape[2], k_cmp.shape[2], mem_k.shape[2]
        mask = self.compress_mask(case, tokens, blocks, memory)
        k = torch.cat([mem_k, k_cmp], 2).repeat_interleave(case.group_size, dim=1)
        s = q @ k.mT * case.scale
        size, stride = case.selection_block_size, case.compress_block_sliding_stride
        count = -(-tokens // size)
        if case.semantics.importance == "logit_mean":
            s = torch.where(mask, s, -torch.finfo(s.dtype).max / 10)[..., memory:]
            s = s.unflatten(1, (case.kv_heads, -1)).mean(2)
            whole = blocks // (size // stride)
            mean = (
                s[..., : whole * (size // stride)].unflatten(-1, (whole, size // stride)).mean(-1)
            )
            return F.pad(mean, (0, count - whole), value=-math.inf)
        empty = ~mask.any(-1, keepdim=True)
        p = s.masked_fill(~mask, -math.inf).masked_fill(empty, 0).softmax(-1) * ~empty
        shared = self.shared_strides(case, blocks, count).to(p.dtype)
        return (p[..., memory:] @ shared).unflatten(1, (case.kv_heads, -1)).sum(2)

    def shared_strides(self, case: Case, blocks: int, count: int) -> Tensor:
        """(compressed blocks, selection blocks)."""
        size = case.selection_block_size
        start = (self.ends(case, blocks) + 1 - case.compress_block_size)[:, None]
        first = torch.arange(count) * size
        stop = torch.minimum(start + case.compress_block_size, first + size)
        tokens = (stop - torch.maximum(start, first)).clamp(min=0)
        return tokens // case.compress_block_sliding_stride

    def forced(self, case: Case, tokens: int, blocks: int) -> Tensor:
        t, block = torch.arange(tokens)[:, None], torch.arange(blocks)
        own = t // case.selection_block_size
        local = (own - case.num_local_blocks < block) & (block <= own)
        return local | (block < case.num_initial_blocks)

    def chosen(
        self, case: Case, q: Tensor, k_cmp: Tensor, mem_k: Tensor, decoding: bool
    ) -> tuple[Tensor, Tensor]:
        """Indices, and the scores that they were chosen by."""
        scores = self.scores(case, q, k_cmp, mem_k, decoding)
        tokens, blocks = scores.shape[2:]
        t, block = torch.arange(tokens)[:, None], torch.arange(blocks)
        size = case.selection_block_size
        candidate = (block * size <= t) | (not case.semantics.causal)
        ranked = scores.detach()
        if case.semantics.own_block_extra:
            own = block == t // size
            strides = size // case.compress_block_sliding_stride
            if case.semantics.causal or strides != 1:
                candidate = candidate & ~own
            ranked = torch.where(torch.isinf(ranked), -math.inf, ranked)
            candidate = candidate & (ranked > -math.inf)
        else:
            ranked = torch.where(self.forced(case, tokens, blocks), math.inf, ranked)
        ranked = torch.where(candidate, ranked, -math.inf)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        allowed = candidate.expand_as(ranked).gather(-1, order)
        order = torch.where(allowed, order, -1)
        width = case.num_selected_blocks
        return F.pad(order, (0, max(0, width - blocks)), value=-1)[..., :width], scores

    def after_selection(self, out: Tensor, scores: Tensor) -> Tensor:
        return out

    def combined(self, gates: Tensor, outs: list[Tensor]) -> Tensor:
        return sum(g[..., None] * out for g, out in zip(gates, outs))  # type: ignore[return-value]

    def compressed_inputs(self, tokens: Tensor) -> Tensor:
        return tokens

    # the plug

    def _run(
        self, case: Case, weights: Any, x: Tensor, given: Tensor | None, decoding: bool
    ) -> Tensor:
        h = self.normed(case, weights, x)
        tokens, batch = x.shape[1], x.shape[0]
        p = torch.arange(tokens)

        def of(kind: str, branch: str) -> Tensor:
            one = (
                f"to_{kind}_{branch}.weight"
                if case.semantics.kv_per_branch
                else f"to_{kind}.weight"
            )
            return self.project(h, weights[one], case.kv_heads)

        q = self.project(h, weights["to_q.weight"], case.q_heads)
        rows = {b: self.turned(q, p) if self.turns(case, b) else q for b in BRANCHES}
        mem_k, mem_v = (self.memory(weights, kind, batch, decoding) for kind in "kv")
        to_pool = {"k": self.keys_to_pool(case, of("k", "compress")), "v": of("v", "compress")}
        k_cmp, v_cmp = (
            self.pooled(case, weights, kind, self.compressed_inputs(each), decoding)
            for kind, each in to_pool.items()
        )
        if self.turns(case, "compress") and case.semantics.rotary != "before_pooling":
            k_cmp = self.turned(k_cmp, self.places(case, k_cmp.shape[2]))
        chosen, scores = self.chosen(case, rows["compress"], k_cmp, mem_k, decoding)
        chosen = chosen if given is None else given
        outs = []
        for branch in BRANCHES:
            if branch == "compress":
                k, v = torch.cat([mem_k, k_cmp], 2), torch.cat([mem_v, v_cmp], 2)
                mask = self.compress_mask(case, tokens, k_cmp.shape[2], mem_k.shape[2])
            else:
                k, v = of("k", branch), of("v", branch)
                k = self.turned(k, p) if self.turns(case, branch) else k
                mask = (
                    self.fine_mask(case, tokens, chosen)
                    if branch == "fine"
                    else self.sliding_mask(case, tokens, decoding)
                )
            outs.append(self.attended(case, rows[branch], k, v, mask))
        if given is None:
            outs[1] = self.after_selection(outs[1], scores)
        out = self.combined(self.gates(case, weights, h), outs).transpose(1, 2).flatten(2)
        return F.linear(out, weights["to_out.weight"]) if "to_out.weight" in weights else out

    def layer(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        return self._run(case, weights, x, None, False)

    def layer_with_blocks(
        self, case: Case, weights: Any, x: Tensor, block_indices: Tensor
    ) -> Tensor:
        return self._run(case, weights, x, block_indices, False)

    def decode(self, case: Case, weights: Any, x: Tensor) -> Tensor:
        rows = [
            self._run(case, weights, x[:, : t + 1], None, True)[:, -1:] for t in range(x.shape[1])
        ]
        return torch.cat([self._run(case, weights, x[:, :0], None, False), *rows], dim=1)

    def bounds(self, case: Case, cu_seqlens: Tensor) -> list[int]:
        return cu_seqlens.tolist()

    def varlen(self, case: Case, weights: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        offsets = self.bounds(case, cu_seqlens)
        parts = [
            self._run(case, weights, x[None, start:stop], None, False)[0]
            for start, stop in itertools.pairwise(offsets)
        ]
        return torch.cat(parts)

    def offers(self, method: str) -> bool:
        return method in ("layer", "layer_with_blocks", "decode", "varlen")
