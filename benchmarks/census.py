"""What the layer launches at 64k tokens, counted without a GPU: python -m benchmarks.census

Runs a forward and a backward of the layer at the paper's shape (`paper.py`), with PAPER, on torch's
meta device, which has shapes and no numbers, as if it were a GPU. A step is counted that has the
sizes of the one before, part by part:

    launches    operators that do something, our Triton kernels, and what FlexAttention's compiled
                graphs start: 2 forward, 2 backward (`FLEX_LAUNCHES`). An operator counts once, but
                for those of which torch's sources say that they take several (`SEVERAL`)
    bytes       read and written: every tensor that a launch is handed, once
    operations  of matrix products that are no kernel's of ours or FlexAttention's
    products    those of them that are computed in float32
    syncs       what the host waits for: numbers and sizes that it reads, copies to and from it but
                for those that are said not to block
    kept        bytes that the forward leaves for the backward, beside weights and x

Prints a table and writes it as JSON. Nothing is timed: a launch is not a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nsa_fast.layer
from benchmarks import paper
from nsa_fast import NativeSparseAttention, flex
from nsa_ref.semantics import PAPER
from nsa_ref.testing.loading import versions

RESULTS = Path(__file__).parent / "results"
META = torch.device("meta")

DTYPE: torch.dtype = getattr(torch, paper.DTYPE)

#: Where each part of a layer begins: functions of `nsa_fast.layer`.
PARTS = {
    "compress_attention": "compress",
    "select_blocks": "selection",
    "fine_attention": "fine",
    "sliding_attention": "sliding",
    "_rotated": "rotary",
    "turns": "rotary",
    "_pool": "pooling",
    "_gated": "gates",
}
WHAT = ("launches", "bytes", "operations", "products", "syncs")
#: Weights and x: they are there anyway.
GIVEN = "given"
#: Projections, and what lies between the parts.
OTHER = "projections"

#: Of a graph that FlexAttention compiles: attention, and lse to base e; D = dO.out - d lse, and all
#: gradients. `tests/fast/test_interpreter.py` counts them.
FLEX_LAUNCHES = {"forward": 2, "backward": 2}

#: Operators that return a view, or memory that holds nothing yet.
NOTHING = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as_complex", "view_as_real"),
        *("expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute", "t"),
        *("as_strided", "unfold", "split", "split_with_sizes", "unbind", "detach", "alias"),
        *("_conj", "promote_types", "result_type"),
        *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh"),
    }
)
#: Operators that only write: what they are handed are sizes.
ONLY_WRITE = frozenset(
    {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "fill", "ones", "arange"}
)
#: What an operator launches, where it is more than one: a fill and a copy; indices, a copy and a
#: sort, of rows up to 4096 (`aten/src/ATen/native/cuda/Sort.cpp`); two passes of a scan.
SEVERAL = {"constant_pad_nd": 2, "sort": 3, "cumsum": 2}
#: Of a sort of longer rows: indices, a histogram, a scan, and CUB's passes of 8 bits each.
LONG_SORT, LONGEST_SHORT_SORT = 3, 4096
#: Operators whose result the host reads, or has to know the size of.
WAITS = frozenset(
    {
        *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"),
        *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
    }
)
#: Operators that multiply matrices: which of their arguments.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


class Census(TorchDispatchMode):
    """Counts, part by part, what runs while it is entered.

    A part of the backward is that which made its node in the forward.
    """

    def __init__(self) -> None:
        super().__init__()
        #: direction, part and kind -> as in WHAT
        self.counts: dict[tuple[str, str, str], Counter[str]] = {}
        self.direction = "forward"
        #: part -> what is kept, by where it is stored
        self.kept: dict[str, dict[int, Tensor]] = {}
        self._part = OTHER
        self._spans: list[tuple[int, int, str]] = []  # of numbers of autograd's nodes

    # where something happens

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        before, self._part = self._part, name
        first = torch.autograd._get_sequence_nr()
        try:
            yield
        finally:
            self._spans.append((first, torch.autograd._get_sequence_nr(), name))
            self._part = before

    def _here(self) -> tuple[str, str]:
        if self.direction == "forward":
            return "forward", self._part
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        inside = (name for first, stop, name in self._spans if first <= number < stop)
        return "backward", next(inside, OTHER)

    # what happens

    def add(self, kind: str, **amounts: int) -> None:
        self.counts.setdefault((*self._here(), kind), Counter()).update(amounts)

    def sync(self, kind: str) -> None:
        self.add(kind, syncs=1)

    def keep(self, tensor: Tensor) -> Tensor:
        """What autograd saves; a part has what it is the first to save."""
        place = tensor.untyped_storage()._cdata
        if not any(place in kept for kept in self.kept.values()):
            self.kept.setdefault(self._part, {})[place] = tensor.detach()
        return tensor

    def bytes_kept(self) -> dict[str, int]:
        found = {
            part: sum(x.untyped_storage().nbytes() for x in kept.values())
            for part, kept in self.kept.items()
            if part != GIVEN
        }
        return found | {"sum": sum(found.values())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        plain = name if name in NOTHING else name.rstrip("_")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if {x.device.type for x in tensors} == {"cpu"} and "device" not in kwargs:
            return func(*args, **kwargs)  # the host's own work
        if plain in WAITS:
            self.sync(plain)
            return _made_up(plain, args)
        waits = not kwargs.get("non_blocking")
        if waits and plain in ("_to_copy", "copy") and self._copied(kwargs.get("device"), tensors):
            self.sync("a copy between host and device")
            if torch.device(kwargs.get("device", META)) != META:
                return torch.zeros_like(args[0], device=kwargs["device"])
        result = func(*args, **kwargs)
        if plain in NOTHING or (plain == "_to_copy" and not tensors):
            return result
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        launches = SEVERAL.get(plain, 1)
        if plain == "sort" and made[0].numel() and _sorted_rows(args, kwargs) > LONGEST_SHORT_SORT:
            launches = LONG_SORT + made[0].element_size()
        read = [] if plain in ONLY_WRITE else tensors
        # what is read only where indices say
        if plain in ("gather", "index", "index_select"):
            read = tensors[1:] + made
        operations = products = 0
        if plain in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[plain])
            operations = 2 * left.numel() * right.shape[-1]
            if left.dtype == made[0].dtype == torch.float32:
                products = operations
        moved = sum(stored(x) for x in {x._cdata: x for x in (*read, *made)}.values())
        amounts = {"operations": operations, "products": products}
        self.add(plain, launches=launches, bytes=moved, **amounts)
        return result

    @staticmethod
    def _copied(device: Any, tensors: list[Tensor]) -> bool:
        kinds = {x.device.type for x in tensors} | (
            {torch.device(device).type} if device else set()
        )
        return len(kinds) > 1


def _sorted_rows(args: Any, kwargs: Any) -> int:
    x = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else -1)
    return x.shape[dim] if x.ndim else 1


def _made_up(name: str, args: Any) -> Any:
    """A result where there are no numbers: the host goes on, and what follows is counted."""
    x = args[0]
    if name == "_local_scalar_dense":
        return {torch.bool: True}.get(x.dtype, 1.0 if x.is_floating_point() else 1)
    if name == "equal":
        return True
    if name == "nonzero":
        return x.new_empty((x.numel(), x.ndim), dtype=torch.int64)
    return x.new_empty((x.numel(),), dtype=torch.int64)


def stored(tensor: Tensor) -> int:
    """Bytes of a tensor, those that it repeats once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride()) if stride or not n)
    count = 1
    for n in sizes:
        count *= n
    return count * tensor.element_size()


class _Made(TorchFunctionMode):
    """Tensors made of Python's numbers are copied from the host: no dispatcher sees that."""

    def __init__(self, census: Census) -> None:
        super().__init__()
        self.census = census

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and found.device == META:
            self.census.sync("numbers of the host")
        return found


class _Flex(torch.autograd.Function):
    """What FlexAttention's compiled graphs return, and launch."""

    @staticmethod
    def forward(ctx: Any, census: Census, lists: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, _, v = tensors
        out = q.new_empty((*q.shape[:-1], v.shape[3]))
        if flex.is_token_major(q):  # the graph's output stands as q does
            out = q.new_empty((*q.transpose(1, 2).shape[:-1], v.shape[3])).transpose(1, 2)
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.census, ctx.lists = census, lists
        moved = lists + sum(stored(x) for x in (*tensors, out, lse, lse, lse))
        census.add("FlexAttention", launches=FLEX_LAUNCHES["forward"], bytes=moved)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        if d_out.stride() != out.stride():  # the graph takes no other layout
            d_out = torch.empty_like(out).copy_(d_out)
        read = (q, k, v, out, lse, d_out, d_out, d_lse, lse, lse, *gradients)
        moved = 2 * ctx.lists + sum(stored(x) for x in read)
        ctx.census.add("FlexAttention", launches=FLEX_LAUNCHES["backward"], bytes=moved)
        return None, None, *gradients


@contextlib.contextmanager
def counted() -> Iterator[Census]:
    """The layer runs on meta as on a GPU, and is counted."""
    census = Census()

    def by_flex(name: str, q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float) -> Any:
        lists = sum(
            stored(found)
            for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
            if (found := getattr(block_mask, part)) is not None
        )
        return _Flex.apply(census, lists, q, k, v)

    def by_triton(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        # a chunk of the tokens reads its part of what has them all
        q_len = kwargs.get("q_len", 0)
        share = kwargs["tokens"] / q_len if "tokens" in kwargs else 1
        moved = sum(stored(x) * (share if q_len in x.shape else 1) for x in tensors)
        census.add(kernel.fn.__name__, launches=1, bytes=int(moved))

    def of_part(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with census.part(part):
                return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(flex, "TRITON_DEVICES", {*flex.TRITON_DEVICES, "meta"}))
        patch(mock.patch.object(flex, "_compiled", by_flex))
        patch(mock.patch.object(triton.runtime.jit.JITFunction, "run", by_triton))
        patch(mock.patch.object(nsa_fast.layer, "check_plain", lambda *_: None))
        patch(mock.patch.object(nsa_fast.branches, "check_plain", lambda *_: None))
        patch(mock.patch.object(flex, "resolve_backend", lambda *_: "compiled"))
        for name, part in PARTS.items():
            found = getattr(nsa_fast.layer, name)
            patch(mock.patch.object(nsa_fast.layer, name, of_part(found, part)))
        patch(_Made(census))
        patch(census)
        yield census


def census_of_layer(tokens: int, cu_seqlens: Tensor | None = None, **changes: Any) -> Census:
    """A forward that is recorded, and its backward, of the second of two steps alike.

    cu_seqlens : of packed sequences, on the CPU
    """
    with torch.device(META):
        layer = NativeSparseAttention(**paper.LAYER | changes).to(DTYPE)
        x = torch.empty(1, tokens, layer.model_dim, dtype=DTYPE, requires_grad=True)
        d_out = torch.empty(1, tokens, layer.layer.q_heads * layer.layer.value_dim, dtype=DTYPE)
    given: dict[str, Any] = {}
    if cu_seqlens is not None:
        given, x, d_out = {"cu_seqlens": cu_seqlens}, x.detach()[0].requires_grad_(), d_out[0]
    with counted():
        layer(x, **given)
    with counted() as census:
        census.kept[GIVEN] = {
            there.untyped_storage()._cdata: there for there in (x, *layer.parameters())
        }
        with torch.autograd.graph.saved_tensors_hooks(census.keep, lambda kept: kept):
            out = layer(x, **given)
        census.direction = "backward"
        out.backward(d_out)
    return census


def table(census: Census) -> dict[str, dict[str, dict[str, int]]]:
    """direction -> part -> what was counted; "sum" is all of it."""
    found: dict[str, dict[str, Counter[str]]] = {"forward": {}, "backward": {}}
    for (direction, part, _), amounts in census.counts.items():
        for row in (part, "sum"):
            found[direction].setdefault(row, Counter()).update(amounts)
    return {
        direction: {
            part: {name: rows[part][name] for name in WHAT}
            for part in sorted(rows, key=lambda part: (part == "sum", part))
        }
        for direction, rows in found.items()
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=paper.TOKENS)
    parser.add_argument(
        *("--switch", "-s"),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another semantics than PAPER, such as rotary=all or causal=false",
    )
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/census.json, of PAPER alone"
    )
    parser.add_argument("--operators", action="store_true", help="what each part launches")
    arguments = parser.parse_args(given)
    words = {"true": True, "false": False}
    switches = {
        name: words.get(value, value)
        for name, _, value in (switch.partition("=") for switch in arguments.switch)
    }
    census = census_of_layer(arguments.tokens, semantics=replace(PAPER, **switches))
    found = table(census)
    for direction, rows in found.items():
        print(f"{direction:14}{'launches':>9}{'GB':>9}{'float32 TFLOP':>15}{'syncs':>7}")
        for part, row in rows.items():
            print(
                f"  {part:12}{row['launches']:9.0f}{row['bytes'] / 1e9:9.2f}"
                f"{row['products'] / 1e12:15.3f}{row['syncs']:7.0f}"
            )
            if arguments.operators:
                kinds = {
                    kind: amounts["launches"]
                    for (*here, kind), amounts in census.counts.items()
                    if here == [direction, part]
                }
                print("   ", ", ".join(f"{kind} {n}" for kind, n in kinds.items()))
    kept = census.bytes_kept()
    print("kept, GB: ", ", ".join(f"{part} {count / 1e9:.2f}" for part, count in kept.items()))
    report = {
        "device": "none; counted on torch's meta device",
        "versions": versions(),
        "layer": paper.LAYER
        | {"dtype": str(DTYPE), "semantics": "PAPER", "tokens": arguments.tokens}
        | switches,
        "counted": found,
        "kept": kept,
    }
    output = arguments.output or (None if switches else RESULTS / "census.json")
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
