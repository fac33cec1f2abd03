"""A GPU without a GPU: what the judge asks of one, and implementations that suffer on it.

Importing it registers the device "standin"; like `port_zoo`, it is imported by the processes that
the command starts, most of which need no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.semantics import PAPER
from nsa_ref.testing import Case, OracleImplementation, TorchImplementation, devices

if TYPE_CHECKING:
    from torch import Tensor


class Standin(devices.Device):
    """Its context is lost once and for all in the process in which a kernel read where it must not.

    An offset does not fit beyond 2^16 elements.
    """

    longest = 600
    offset_limit = 2**16
    #: What was done to it in this process, for tests.
    done: ClassVar[list[Any]] = []
    lost = ""

    def describe(self) -> str:
        return "Stand-in H0"

    def free_memory(self) -> int:
        return 2**40

    def poison(self, sizes: Sequence[int]) -> None:
        self.done.append(("poison", *sizes))

    def set_tf32(self, allowed: bool) -> None:
        self.done.append(("tf32", allowed))

    def fault(self) -> str:
        return Standin.lost

    def free_cache(self) -> None:
        self.done.append("free cache")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        self.done.append("exclusive")
        yield
        self.done.append("not exclusive")


devices.KINDS["standin"] = Standin


class OnStandin(OracleImplementation):
    """The definition, on that device.

    asked : the cases that the judge brought, for tests
    """

    name = "on standin"
    device = "standin:0"
    semantics = (PAPER,)
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32"}

    def __init__(self) -> None:
        self.asked: list[Case] = []

    def supports(self, case: Case) -> None:
        self.asked.append(case)


class IllegalAccess(OnStandin):
    """Its windows lose the context in cases of more than 8 keys; after that nothing works."""

    name = "illegal access"

    def offers(self, method: str) -> bool:
        return method in ("sliding_mask", "compress_mask")

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        if Standin.lost or (method == "sliding_mask" and case.kv_len > 8):
            Standin.lost = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError(f"{Standin.lost}\nCompile with TORCH_USE_CUDA_DSA ...")
        return super().run(method, case, *arguments)


class OutOfMemory(OnStandin):
    """Runs out of memory for cases of more than 8 keys."""

    name = "out of memory"

    def sliding(self, case: Case, *arguments: Any) -> Attention:
        import torch

        if case.kv_len > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")
        return super().sliding(case, *arguments)


class Mistaken(OnStandin):
    """Changes some of these: q, k and v as the forward reads them; out, lse, dq, dk and dv.

    change : of a case and the right array
    """

    def __init__(self, change: Callable[[Case, np.ndarray], np.ndarray], *names: str) -> None:
        super().__init__()
        self.change, self.names = change, names

    def _changed(self, case: Case, **right: Any) -> list[Any]:
        return [
            self.change(case, np.asarray(array)) if name in self.names else array
            for name, array in right.items()
        ]

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        out, lse = super().sliding(case, *self._changed(case, q=q, k=k, v=v))
        return Attention(*self._changed(case, out=out, lse=lse))

    def sliding_vjp(self, case: Case, *given: Any) -> tuple[Any, ...]:
        dq, dk, dv = super().sliding_vjp(case, *given)
        return tuple(self._changed(case, dq=dq, dk=dk, dv=dv))


class Unwritten(TorchImplementation):
    """Writes every row but the last: there stands what freed memory held, often what is right."""

    name = "unwritten"
    numerics: ClassVar[dict[str, str]] = {"float32": "fp32"}

    def offers_vjp(self, method: str) -> bool:
        return False

    def sliding(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Attention:
        import torch

        k, v = (x.repeat_interleave(case.group_size, dim=1) for x in (k, v))
        t = torch.arange(case.q_len)[:, None] + case.kv_len - case.q_len
        j = torch.arange(case.kv_len)
        hidden = (j > t) | (t - j > case.sliding_window_size)
        s = (q @ k.mT * case.scale).masked_fill(hidden, -torch.inf)
        right = (s.softmax(-1).nan_to_num() @ v).contiguous()
        written = right[:, :, :-1].clone()
        del right  # what comes next is likely to get its memory
        out = torch.empty(*q.shape[:3], case.value_dim)
        out[:, :, :-1] = written
        return Attention(out, None)  # type: ignore[arg-type]


class CountsCompilations(OnStandin):
    """Says what it compiled: one graph for each number of query heads."""

    name = "counts compilations"
    limits: ClassVar[dict[str, Any]] = {
        "q_heads": (2, 4),
        "kv_heads": (2,),
        "q_len": range(41),
        "kv_len": range(41),
    }

    def __init__(self) -> None:
        super().__init__()
        self.graphs: set[int] = set()

    def offers(self, method: str) -> bool:
        return method == "sliding"

    def sliding(self, case: Case, *arguments: Any) -> Attention:
        self.graphs.add(case.q_heads)
        return super().sliding(case, *arguments)

    def compile_counts(self) -> dict[str, int]:
        return {"graphs": len(self.graphs), "cached": 0}
