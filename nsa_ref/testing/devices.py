"""What the judge must know of the device that an implementation runs on, and do to it.

All that is special about GPUs is behind `Device`; tests without a GPU put a stand-in into `KINDS`.
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

    The C library fills the memory that an implementation gets there (see handing_over.py).

    examples_share : the share of drawn cases that is judged; less where one takes seconds
    shortest : most sequences have at least so many tokens
    longest : no sequence has more tokens; attention on a CPU may be dense
    offset_limit : a tensor with more elements has offsets that do not fit into 32 bits
    heads_probed : so many heads of a group are read out backward; each is a call of its own
    time_factor : a case may take so many times as long as on another device
    """

    examples_share = 1.0
    shortest = 1
    longest = 1024
    offset_limit = 2**31
    heads_probed = 4
    time_factor = 1

    def __init__(self, name: str) -> None:
        """name : as torch writes it, for instance "cuda:1"."""
        self.name = name

    def describe(self) -> str:
        """What the device calls itself, for reports; empty if nothing."""
        return ""

    def free_memory(self) -> int:
        """Bytes that one case may take; 0 where no huge case is tried."""
        return 0

    def poison(self, sizes: Sequence[int]) -> None:
        """Fill free memory, so that an output which is not written shows.

        sizes : bytes of the inputs, because an output is likely to get memory of such a size
        """

    def set_tf32(self, allowed: bool) -> None:
        """Allow products of float32 matrices to round their operands to tf32, or forbid it."""

    def fault(self) -> str:
        """Wait for all kernels; why every further call fails in this process, or nothing."""
        return ""

    def free_cache(self) -> None:
        """Let other processes have the memory that nothing here uses any more."""

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no other worker is in here on this device."""
        yield


class Cuda(Device):
    """A GPU, as torch sees it; nothing is done to it for a port that does not use torch."""

    longest = 2**16

    #: Small pieces of memory are poisoned as well: (bytes, how many). torch keeps pieces of up to
    #: 1 MiB apart from larger ones.
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
        # what an earlier run left goes back to the driver, so that torch has no other memory than
        # the pieces below. They are held all at once, and then freed: torch hands the same memory
        # out again, as it is. Bytes of ones are NaN in every floating type
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

    def free_cache(self) -> None:
        if (cuda := _cuda()) is not None:
            cuda.empty_cache()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        import fcntl  # not at the top: Windows has all but this

        # workers see one GPU each, under the same name
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "") + self.name
        path = (
            Path(tempfile.gettempdir()) / f"nsa-ref-{zlib.crc32(gpu.encode())}-{os.getuid()}.lock"
        )
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or the process dies
            yield


class Interpreter(Device):
    """Triton's interpreter: few cases, and none of only a few tokens, which show little."""

    examples_share = 1 / 10
    shortest = 16
    heads_probed = 1
    time_factor = 5

    def describe(self) -> str:
        return "Triton's interpreter, as sm_90"


def _cuda() -> Any:
    """torch.cuda where torch is loaded and has such a device, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


#: The type of a device -> its class; any other type is taken for a CPU.
KINDS: dict[str, type[Device]] = {"cuda": Cuda, "interpreter": Interpreter}


def device_of(name: str) -> Device:
    """The device that an implementation's `device` names."""
    return KINDS.get(name.partition(":")[0], Device)(name)


def compile_counts() -> dict[str, int]:
    """What torch.compile has done in this process so far; empty if it was never used.

    graphs : graphs that dynamo has made
    cached : graphs that Inductor had in its cache; a forward and its backward are two
    compiled : graphs that Inductor compiled
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
