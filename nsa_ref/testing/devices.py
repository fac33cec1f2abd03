"""What the judge must know of the device that an implementation runs on, and do to it.

Everything that only a GPU has or suffers is behind `Device`; where there is no GPU, tests put a
stand-in into `KINDS`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class Device:
    """A CPU: nothing to look after.

    Memory that a program gets there is poisoned by the C library (MALLOC_PERTURB_, see plugin.py).

    share : of the examples that a level asks for; less where a case takes seconds
    shortest : tokens that most sequences have at least
    longest : tokens of the longest sequence that is tried; attention on a CPU may be dense
    many : elements beyond which an offset does not fit into 32 bits
    heads_probed : of a group in the backward read-out, where every head is a call of its own
    time_factor : a case may take so many times as long as on another device
    """

    share = 1.0
    shortest = 1
    longest = 1024
    many = 2**31
    heads_probed = 4
    time_factor = 1

    def __init__(self, name: str) -> None:
        """name : as torch writes it, for instance "cuda:1"."""
        self.name = name

    def describe(self) -> str:
        """What the device calls itself, for reports; empty if nothing."""
        return ""

    def free_memory(self) -> int:
        """Bytes that one case may take; 0 where huge cases do not belong."""
        return 0

    def poison(self, sizes: Sequence[int]) -> None:
        """Fill free memory, so that an output which is not written shows.

        sizes : bytes of the tensors that go in, which what comes out is like
        """

    def set_tf32(self, allowed: bool) -> None:
        """Whether products of float32 matrices may round their operands to tf32."""

    def fault(self) -> str:
        """Why every further call on this device fails in this process; empty if none has to."""
        return ""

    def give_back(self) -> None:
        """Let others have the memory that nothing here uses any more."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other worker is in here on this device at the same time."""
        yield


class Cuda(Device):
    """A GPU, as torch sees it; left alone in a process whose implementation does not use torch."""

    longest = 2**16

    #: Small pieces of free memory that are filled besides, (bytes, how many). torch keeps those of
    #: up to 1 MiB apart from larger ones.
    POISONED = ((2**20, 16), (16 * 2**20, 3))

    def describe(self) -> str:
        return str(cuda.get_device_name(self.name)) if (cuda := _cuda()) else ""

    def free_memory(self) -> int:
        cuda = _cuda()
        if cuda is None:
            return 0
        cuda.empty_cache()
        return int(cuda.mem_get_info(self.name)[0])

    def poison(self, sizes: Sequence[int]) -> None:
        cuda = _cuda()
        if cuda is None:
            return
        torch = sys.modules["torch"]
        # what an earlier run left goes back to the driver; the pieces below are then all there is.
        # bytes of ones are NaN in every floating type. All pieces are held at once, and then handed
        # back: torch's allocator gives the same memory out again, as it is
        cuda.empty_cache()
        pieces = [size for size, count in self.POISONED for _ in range(count)]
        if 4 * sum(sizes) < cuda.mem_get_info(self.name)[0]:
            pieces += [size for size in sizes for _ in range(2) if size]
        held = [torch.full((size,), 0xFF, dtype=torch.uint8, device=self.name) for size in pieces]
        held.clear()

    def set_tf32(self, allowed: bool) -> None:
        if _cuda() is not None:
            torch = sys.modules["torch"]
            torch.set_float32_matmul_precision("high" if allowed else "highest")

    def fault(self) -> str:
        cuda = _cuda()
        if cuda is None:
            return ""
        try:
            cuda.synchronize(self.name)
        except RuntimeError as error:
            # after an illegal access, for instance, every call raises, whoever makes it
            return str(error).strip().partition("\n")[0]
        return ""

    def give_back(self) -> None:
        if (cuda := _cuda()) is not None:
            cuda.empty_cache()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        import fcntl  # not on Windows, where nothing else is missing

        # workers see one GPU each, under the same name
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") + self.name
        path = (
            Path(tempfile.gettempdir()) / f"nsa-ref-{zlib.crc32(gpu.encode())}-{os.getuid()}.lock"
        )
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, or the process dies
            yield


class Interpreter(Device):
    """Triton's interpreter: few cases, and none of a handful of tokens, which show little."""

    share = 1 / 10
    shortest = 16
    heads_probed = 1
    time_factor = 5

    def describe(self) -> str:
        return "Triton's interpreter, as sm_90"


def _cuda() -> Any:
    """torch.cuda where torch is loaded and has such a device, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


#: type of a device -> what stands for it; any other is taken for a CPU
KINDS: dict[str, type[Device]] = {"cuda": Cuda, "interpreter": Interpreter}


def device_of(name: str) -> Device:
    """The device that an implementation's `device` names."""
    return KINDS.get(name.partition(":")[0], Device)(name)


def compile_counts() -> dict[str, int]:
    """What torch.compile has done in this process so far; empty if it was never used.

    graphs : that dynamo has made
    cached : asked of Inductor, which had them in its cache (a forward and its backward are two)
    compiled : asked of Inductor, and compiled
    """
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return {}
    stats, inductor = utils.counters["stats"], utils.counters["inductor"]
    return {
        "graphs": stats["unique_graphs"],
        "cached": inductor["fxgraph_cache_hit"],
        "compiled": inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
    }
