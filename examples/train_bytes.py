"""Train a small byte model twice, with Native Sparse Attention and with dense attention.

    python examples/train_bytes.py

Both models see the same bytes in the same order: the documentation of the language that ships with
Python (`pydoc_data.topics`, some 450 KB of English), its last tenth held out. They differ in one
module, `NativeSparseAttention` or `DenseAttention`. Every so many steps one of the sparse layers is
stopped at: what it made of the first tokens of a sample, and the gradients of that, are held to the
definition in float64 (`nsa_ref`), with a bound for every element. A step that is outside ends the
run and says where.

The bounds are worst cases: some 0.2 to 1 % of the output's size and 0.2 to 40 % of most gradients',
a few hundred times what float32 needs here. A window that is one key short uses 50 times its bound;
a rotation whose angles are off by 1e-4 passes.

Some paragraphs stand in two topics: 8 % of the longer lines that are held out have been read, by
both models (Python 3.11).

Options
-------
--steps N   optimiser steps of each model, default 400: two minutes on two cores
--out DIR   where training.png and training-cpu.json go, default the current folder

Needs `pip install -e '.[fast,pictures]'`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import Tensor, nn

from nsa_fast import NativeSparseAttention
from nsa_fast.rotary import rotate, turns
from nsa_ref import (
    LUCIDRAINS_FLEX,
    Sizes,
    layer,
    layer_block_indices,
    layer_vjp,
    scored,
)
from nsa_ref.layer import selection_inputs
from nsa_ref.layer_bounds import layer_bounds
from nsa_ref.testing.choices import undecided_rows
from nsa_ref.testing.compare import compare
from nsa_ref.testing.loading import versions
from nsa_ref.testing.verdicts import Broken
from nsa_ref.testing.wording import describe

#: Rotary, input norm and output projection inside of the layer, one k and v for all branches.
SEMANTICS = LUCIDRAINS_FLEX


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Lengths in tokens, which are bytes.

    checks : how many steps are held to the definition, of the sparse model
    checked_tokens : of the first sample of the batch, whole selection blocks; causal, so those
        behind them change nothing
    """

    steps: int = 400
    batch: int = 8
    seq_len: int = 256
    blocks: int = 2
    model_dim: int = 128
    q_heads: int = 2
    kv_heads: int = 1
    head_dim: int = 32
    compress_block_size: int = 16
    compress_block_sliding_stride: int = 8
    selection_block_size: int = 16
    num_selected_blocks: int = 3
    sliding_window_size: int = 32
    num_mem_kv: int = 1
    learning_rate: float = 3e-3
    held_out_every: int = 25
    held_out_batch: int = 16
    checks: int = 8
    checked_tokens: int = 128

    @property
    def sizes(self) -> Sizes:
        """Of one sparse layer, as the definition takes them."""
        return Sizes(
            model_dim=self.model_dim,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            compress_block_size=self.compress_block_size,
            compress_block_sliding_stride=self.compress_block_sliding_stride,
            compress_map="linear",
            compress_positions=True,
            selection_block_size=self.selection_block_size,
            num_selected_blocks=self.num_selected_blocks,
            sliding_window_size=self.sliding_window_size,
            num_mem_kv=self.num_mem_kv,
        )


# --- the model ------------------------------------------------------------------------------------


class DenseAttention(nn.Module):
    """Causal attention over all tokens, with the heads, norm and rotary of the sparse layer."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        dim, width = setup.model_dim, setup.head_dim
        self.heads = (setup.q_heads, setup.kv_heads, setup.kv_heads)
        self.norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, sum(self.heads) * width, bias=False)
        self.to_out = nn.Linear(setup.q_heads * width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)
        turn = turns(torch.arange(x.shape[1]), q.shape[3], x.dtype)
        out = F.scaled_dot_product_attention(
            rotate(q, turn), rotate(k, turn), v, is_causal=True, enable_gqa=True
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


def sparse_attention(setup: Setup) -> NativeSparseAttention:
    return NativeSparseAttention(**vars(setup.sizes), semantics=SEMANTICS)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, dim: int) -> None:
        super().__init__()
        self.attention = attention  # which norms its input itself
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


def byte_model(attention: type[nn.Module] | Any, setup: Setup) -> nn.Sequential:
    """From bytes (batch, len) to the logits of the next ones, (batch, len, 256)."""
    dim = setup.model_dim
    return nn.Sequential(
        nn.Embedding(256, dim),
        *(Block(attention(setup), dim) for _ in range(setup.blocks)),
        nn.RMSNorm(dim),
        nn.Linear(dim, 256),
    )


def bits_per_byte(model: nn.Module, text: Tensor) -> Tensor:
    """The mean over text (batch, len + 1) of -log2 of what the model gave to the next byte."""
    logits = model(text[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / math.log(2)


# --- a layer beside the definition ----------------------------------------------------------------


def check_layer(
    attention: NativeSparseAttention, x: Tensor, step_out: Tensor, d_out: Tensor, setup: Setup
) -> dict[str, Any]:
    """Output and gradients of one layer, each within its bound, and how much of that was used.

    The output is compared as the step had it, and as the layer gives it for these tokens alone. A
    bound without power is one that would admit anything, such as where a gradient is nearly 0. A
    row whose blocks rounding may choose otherwise is undecided: its output is not compared, and
    no gradient is sent through it.

    Shapes
    ------
    x : (1, tokens, model_dim), what the layer read in this step, and step_out what came of it
    d_out : like step_out, the gradient of the loss that arrived there

    Raises
    ------
    Broken : an element outside its bound, named
    """
    sizes, rules = setup.sizes, {"sizes": setup.sizes, "semantics": SEMANTICS}
    weights = {n: w.detach().double().numpy() for n, w in attention.named_parameters()}
    x64, d_out64 = x.double().numpy(), d_out.double().numpy()
    block_indices = layer_block_indices(x64, weights, **rules)

    bounds = layer_bounds(x64, weights, block_indices, **rules, numerics="fp32")
    undecided = undecided_tokens(x64, weights, bounds.scores, sizes)[None, :, None]
    d_out64 = np.where(undecided, 0, d_out64)
    bounds = layer_bounds(x64, weights, block_indices, d_out64, **rules, numerics="fp32")
    expected = layer(x64, weights, **rules, block_indices=block_indices)
    dx, dweights = layer_vjp(x64, weights, d_out64, **rules, block_indices=block_indices)

    x = x.clone().requires_grad_()
    out = attention(x)
    names, parameters = zip(*attention.named_parameters())
    found = torch.autograd.grad(out, (x, *parameters), torch.from_numpy(d_out64).to(out.dtype))

    of_decided = np.where(undecided, np.inf, bounds.out)
    compared = {
        "out of the step": compare("G1", "out of the step", array(step_out), expected, of_decided),
        "out": compare("G1", "out", array(out), expected, of_decided),
        "dx": compare("G1", "dx", array(found[0]), dx, bounds.dx),
    }
    for name, gradient in zip(names, found[1:]):
        compared[f"d{name}"] = compare(
            "G1", f"d{name}", array(gradient), dweights[name], bounds.dweights[name]
        )
    return {
        "undecided_rows": int(undecided.sum()),
        "rows": undecided.size,
        "budget_used": {name: found.budget for name, found in compared.items()},
        "bounds_without_power": [name for name, found in compared.items() if found.powerless],
    }


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def undecided_tokens(
    x: np.ndarray, weights: dict[str, np.ndarray], score_bounds: np.ndarray, sizes: Sizes
) -> np.ndarray:
    """(tokens,) bool: another choice of blocks may be right too (I5)."""
    how = {"sizes": sizes, "semantics": SEMANTICS}
    blocks = scored(*selection_inputs(x, weights, **how), kv_len=x.shape[1], **how)
    return undecided_rows(blocks, score_bounds, **how).any(axis=(0, 1))


# --- training -------------------------------------------------------------------------------------


def remember(attention: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
    """Forward hook: leaves what a layer read and gave where `check_step` finds it."""
    if out.requires_grad:
        out.retain_grad()
    attention.seen = (*inputs, out)


def check_step(model: nn.Sequential, block: int, setup: Setup) -> dict[str, Any]:
    """`check_layer` of the attention in one block, with what passed through it just now."""
    attention = model[1 + block].attention
    x, out = attention.seen
    part = (slice(1), slice(setup.checked_tokens))
    verdict = check_layer(attention, x.detach()[part], out.detach()[part], out.grad[part], setup)
    return {"block": block, **verdict}


def train(name: str, attention: Any, setup: Setup) -> dict[str, Any]:
    """One model from its first values; the losses, and what the checks said.

    Raises
    ------
    SystemExit : a step that is not within its bounds, with the tensor and the share of the bound
    """
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
    windows = text.long().unfold(0, setup.seq_len + 1, 1)
    last = len(windows) * 9 // 10
    behind = torch.linspace(last + setup.seq_len, len(windows) - 1, setup.held_out_batch)
    held_out = windows[behind.long()]

    torch.manual_seed(0)
    model = byte_model(attention, setup)
    sparse = [m for m in model.modules() if isinstance(m, NativeSparseAttention)]
    for layer_of_block in sparse:
        layer_of_block.register_forward_hook(remember)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / setup.steps)
    )
    order = torch.Generator().manual_seed(1)
    checked = torch.linspace(0, setup.steps - 1, setup.checks).long().tolist() if sparse else []
    training: list[float] = []
    held_out_losses: list[tuple[int, float]] = []
    checks: list[dict[str, Any]] = []
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(setup.steps + 1):
        if step % setup.held_out_every == 0 or step == setup.steps:
            with torch.no_grad():
                held_out_losses.append((step, round(bits_per_byte(model, held_out).item(), 4)))
            print(f"{name}, step {step}: {held_out_losses[-1][1]:.3f} bits a byte, held out")
        if step == setup.steps:
            break
        batch = windows[torch.randint(last, (setup.batch,), generator=order)]
        loss = bits_per_byte(model, batch)
        optimizer.zero_grad()
        loss.backward()
        if step in checked:
            block = len(checks) % setup.blocks
            try:
                verdict = check_step(model, block, setup)
            except Broken as broken:
                raise SystemExit(
                    f"step {step}: the attention of block {block} is not the definition's: "
                    f"{describe(broken)}"
                ) from None
            checks.append({"step": step, **verdict})
            print(
                f"{name}, step {step}: block {block} is within its bounds, "
                f"of which {max(verdict['budget_used'].values()):.4f} is used; "
                f"{verdict['undecided_rows']} of {verdict['rows']} rows undecided"
            )
        optimizer.step()
        schedule.step()
        training.append(round(loss.item(), 4))
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "held_out": held_out_losses,
        "checks": checks,
        "training": training,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses above, and below how much of its bounds each checked step used."""
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, height_ratios=(3, 1), figsize=(8, 6), layout="constrained"
    )
    for name, color in (("sparse", "C0"), ("dense", "C1")):
        found = results[name]
        above.plot(found["training"], color=color, alpha=0.3, linewidth=0.8)
        above.plot(*zip(*found["held_out"]), color=color, label=f"{name} attention, held out")
    checks = results["sparse"]["checks"]
    steps = [check["step"] for check in checks]
    losses = [results["sparse"]["training"][step] for step in steps]
    above.plot(
        steps, losses, "o", color="black", fillstyle="none", label="step held to the definition"
    )
    above.set(
        title="A byte model with Native Sparse Attention, and with dense",
        ylabel="bits a byte (faint: training)",
        yscale="log",
    )
    above.set_yticks(range(2, 9), range(2, 9))
    above.minorticks_off()
    above.legend()
    below.semilogy(*_budgets(checks, "out"), "o", color="black", label="output")
    below.semilogy(*_budgets(checks, "d"), "v", color="C2", label="worst gradient")
    below.axhline(1, color="C3", label="the bound")
    below.legend(ncols=3)
    below.set(xlabel="step", ylabel="share of the bound", ylim=(None, 30))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _budgets(checks: list[dict[str, Any]], prefix: str) -> tuple[list[int], list[float]]:
    """Steps, and the largest share used by a tensor whose name begins so."""
    return [check["step"] for check in checks], [
        max(used for name, used in check["budget_used"].items() if name.startswith(prefix))
        for check in checks
    ]


def run(setup: Setup, out: Path) -> dict[str, Any]:
    """Train both, write both files, return what the JSON holds."""
    results: dict[str, Any] = {
        "versions": versions(),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "setup": vars(setup),
    }
    for name, attention in (("sparse", sparse_attention), ("dense", DenseAttention)):
        results[name] = train(name, attention, setup)
    out.mkdir(parents=True, exist_ok=True)
    (out / "training-cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, out / "training.png")
    return results


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Setup.steps, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path(), help="folder, default this one")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} must be at least 1")
    results = run(Setup(steps=arguments.steps), arguments.out)
    for name in ("sparse", "dense"):
        found = results[name]
        print(
            f"{name}: {found['held_out'][-1][1]:.3f} bits a byte held out, "
            f"{found['parameters']} parameters, {found['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
