"""What fla-core does with arguments that the plug has no name for.

::

    fla/bin/python -m nsa_ref.testing.ports.fla.beyond_the_plug

prints what docs/findings.md says of `block_counts`, of empty sequences, of the lse and of blocks
without weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nsa_ref.testing.ports.fla import _kernels, _naive

if TYPE_CHECKING:
    from torch import Tensor

HEADS, DIM, BLOCK, SCALE = 16, 16, 8, 0.25


def random_inputs(tokens: int) -> list[Tensor]:
    """q, k and v of one sequence, of HEADS query heads and one kv head."""
    import torch

    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, 1, 1)
    return [torch.randn(1, tokens, n, DIM, generator=generator) for n in heads]


def with_gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What a call returns, and the gradients of the sum of it: out, dq, dk, dv."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    out.sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def changed(found: list[Tensor], other: list[Tensor]) -> str:
    """The names of those that are not equal."""
    import torch

    names = ("out", "dq", "dk", "dv")
    differ = [name for name, a, b in zip(names, found, other) if not torch.equal(a, b)]
    return ", ".join(differ) or "nothing"


def block_counts(kernels: Any) -> Iterator[str]:
    """4 slots that hold the blocks 0 to 3, and fewer of them asked for: what becomes another?"""
    import torch

    tokens = 4 * BLOCK
    blocks = torch.arange(4).expand(1, tokens, 1, 4).contiguous()

    def found(counts: Any) -> list[Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = kernels.parallel_nsa(
                q, k, v, block_indices=blocks, block_counts=counts, block_size=BLOCK, scale=SCALE
            )
            return out

        return with_gradients(call, random_inputs(tokens))

    of_four = found(4)
    for what, counts in (("3", 3), ("a tensor of 3", torch.full((1, tokens, 1), 3))):
        changes = changed(found(counts), of_four)
        yield f"block_counts = {what} in the place of 4 changes: {changes}"


def empty_sequences(kernels: Any) -> Iterator[str]:
    """Sequences of 10 and 17 tokens, one behind the other, and an empty one between them."""
    import torch

    inputs = random_inputs(27)
    blocks = torch.zeros(1, 27, 1, 1, dtype=torch.int64)

    def found(starts: list[int]) -> list[Tensor]:
        cu_seqlens = torch.tensor(starts)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = kernels.parallel_nsa(
                q,
                k,
                v,
                block_indices=blocks,
                block_counts=1,
                block_size=BLOCK,
                scale=SCALE,
                cu_seqlens=cu_seqlens,
            )
            return out

        return with_gradients(call, inputs)

    changes = changed(found([0, 10, 10, 27]), found([0, 10, 27]))
    yield f"an empty sequence between two others changes: {changes}"


def gradient_of_lse(kernels: Any) -> Iterator[str]:
    """The lse of the compress branch is differentiable to autograd; what is its gradient?"""
    q, k, v = random_inputs(BLOCK)
    leaf = q.clone().requires_grad_()
    pooled = [kernels.mean_pooling(x, BLOCK, None) for x in (k, v)]
    _, lse = kernels.parallel_nsa_compression(leaf, *pooled, BLOCK, BLOCK, SCALE)
    says = lse.requires_grad
    lse.sum().backward()
    assert leaf.grad is not None
    largest = float(leaf.grad.abs().max())
    yield f"lse.requires_grad is {says}; the largest element of its gradient is {largest}"


def blocks_without_weight(kernels: Any) -> Iterator[str]:
    """4 slots for the 32nd token of 33 and its 4 blocks, where the first has all the weight."""
    import torch

    q, k = torch.ones(1, 33, HEADS, DIM), torch.zeros(1, 5, 1, DIM)
    k[:, 0] = 100.0
    _, lse = kernels.parallel_nsa_compression(q, k, k, 33, BLOCK, SCALE)
    of_kernel = kernels.parallel_nsa_topk(q, k, 33, lse, 4, BLOCK, SCALE)
    of_naive = _naive("cpu").naive_nsa_topk(q, k, 4, BLOCK, SCALE)
    for name, blocks in (("kernel", of_kernel), ("naive reference", of_naive)):
        yield f"of the blocks 0 to 3 the {name} chooses {sorted(blocks[0, 31, 0].tolist())}"


QUESTIONS = (block_counts, empty_sequences, gradient_of_lse, blocks_without_weight)


def main() -> None:
    """Print all of it."""
    kernels = _kernels("cpu")
    for question in QUESTIONS:
        for line in question(kernels):
            print(line)


if __name__ == "__main__":
    main()
