"""The plug: what an implementation of Native Sparse Attention looks like to the judge.

Subclass `TorchImplementation` (tensors in and out, gradients from autograd) or `Implementation`
(NumPy in and out, gradients from the `*_vjp` methods), set the attributes, override what you have.
What is not overridden is reported as not offered, which is no pass.

Arrays: q (batch, q_heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch,
kv_heads, kv_len, value_dim), block_indices (batch, kv_heads, q_len, n) int64 with -1 in unused
slots; compress has k_cmp, v_cmp (batch, kv_heads, blocks, ...) and mem_k, mem_v (batch, kv_heads,
num_mem_kv, ...). lse is natural, (batch, q_heads, q_len).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nsa_ref.attention import Attention, attend, attend_vjp
from nsa_ref.compress import pool, pool_vjp
from nsa_ref.layer import decode, layer, layer_vjp, varlen, varlen_vjp
from nsa_ref.masks import compress_mask, fine_mask, sliding_mask
from nsa_ref.selection import select
from nsa_ref.semantics import PRESETS, Semantics
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.conditions import Condition
from nsa_ref.testing.devices import compile_counts, device_of
from nsa_ref.testing.handing_over import Stopped, handed_over
from nsa_ref.testing.limits import is_within
from nsa_ref.testing.verdicts import Raised
from nsa_ref.testing.wording import LONGEST_REASON, cut, one_line, place

if TYPE_CHECKING:
    import torch

__all__ = ["Attention", "Implementation", "OracleImplementation", "TorchImplementation"]

#: What an implementation may say of how fast it is.
PACES = ("fast", "slow", "compiles")

#: Rows of poison behind those of a strided tensor: as many as a small tile has.
PADDED_ROWS = 16

#: One flat dict of arrays; of a layer, with the names and shapes of `nsa_ref.layer_weight_shapes`.
Weights = dict[str, Any]
Gradients = tuple[Any, Weights]


class NotOffered(Exception):
    """The implementation does not have this; counted and shown, never a pass."""


class Refused(NotOffered):
    """`supports` says why this one case cannot be run; others may be."""


class WrongDeclaration(TypeError):
    """An adapter says something about itself that has no meaning; nothing can be judged."""


class _Call(NamedTuple):
    """A call of a method.

    arguments, handed : by name, what the judge has, and the copies or tensors that were handed in
    """

    method: str
    arguments: dict[str, Any]
    handed: dict[str, Any]
    found: Any


class Implementation:
    """NumPy in and out. Override what you have.

    name : shown in reports
    semantics : the conventions it follows; every case is drawn from one of them
    numerics : dtype -> row of bounds ("fp64", "fp32", "tf32", "bf16", "fp16", "bf16-head", ...)
    pace : "fast"; "slow", if a case takes a second or more; "compiles", if every new shape compiles
    limits : Case field (or "group_size") -> allowed values, or a rule as in a ledger; cases are
        drawn within them
    limits_of : method, or a pattern of methods such as "*_vjp" -> further limits of these alone
    rules : the judge's own, see `nsa_ref.testing.limits.limited`
    nonfinite_invisible : invisible keys may even hold inf and NaN (A5)
    lse_gradient : a gradient may arrive through lse; False if the backward takes none
    deterministic : the same call gives the same bits again; if stated, it is tried
    """

    name: str = "unnamed"
    semantics: Sequence[Semantics] = (PRESETS["PAPER"],)
    numerics: Mapping[str, str] = {"float32": "fp32"}
    pace: str = "fast"
    limits: Mapping[str, Any] = {}
    limits_of: Mapping[str, Mapping[str, Any]] = {}
    rules: Sequence[Condition] = ()
    nonfinite_invisible: bool = False
    lse_gradient: bool = True
    deterministic: bool = False
    device: str = "cpu"

    #: While two calls are compared: both, which hold the memory of what they returned.
    _calls: list[_Call] | None = None

    def supports(self, case: Case) -> str | None:
        """None, or the reason why this one case cannot be run."""
        return None

    # masks: multiplicities or booleans, broadcastable to (batch, q_heads, q_len, columns); or a
    # FlexAttention BlockMask (read out in all its parts); or a dict of several of these, by name

    def sliding_mask(self, case: Case) -> Any:
        raise NotOffered("sliding_mask")

    def compress_mask(self, case: Case) -> Any:
        """Columns: memory first, then the blocks."""
        raise NotOffered("compress_mask")

    def fine_mask(self, case: Case, block_indices: Any) -> Any:
        raise NotOffered("fine_mask")

    # branches

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        raise NotOffered("sliding")

    def compress(
        self, case: Case, q: Any, k_cmp: Any, v_cmp: Any, mem_k: Any, mem_v: Any
    ) -> Attention:
        raise NotOffered("compress")

    def fine(self, case: Case, q: Any, k: Any, v: Any, block_indices: Any) -> Attention:
        raise NotOffered("fine")

    # gradients, for implementations without autograd

    def sliding_vjp(
        self, case: Case, q: Any, k: Any, v: Any, d_out: Any, d_lse: Any
    ) -> tuple[Any, ...]:
        raise NotOffered("sliding_vjp")

    def compress_vjp(
        self,
        case: Case,
        q: Any,
        k_cmp: Any,
        v_cmp: Any,
        mem_k: Any,
        mem_v: Any,
        d_out: Any,
        d_lse: Any,
    ) -> tuple[Any, ...]:
        raise NotOffered("compress_vjp")

    def fine_vjp(
        self, case: Case, q: Any, k: Any, v: Any, block_indices: Any, d_out: Any, d_lse: Any
    ) -> tuple[Any, ...]:
        raise NotOffered("fine_vjp")

    # compression and selection

    def pool(self, case: Case, x: Any, weights: Weights) -> Any:
        raise NotOffered("pool")

    def pool_vjp(self, case: Case, x: Any, weights: Weights, d_out: Any) -> Gradients:
        raise NotOffered("pool_vjp")

    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> Any:
        raise NotOffered("select")

    # the whole layer: x and what comes back are (batch, kv_len, ...)

    def layer(self, case: Case, weights: Weights, x: Any) -> Any:
        """All rows in parallel."""
        raise NotOffered("layer")

    def layer_with_blocks(self, case: Case, weights: Weights, x: Any, block_indices: Any) -> Any:
        """The same with a choice of blocks that is handed in, in place of its own."""
        raise NotOffered("layer_with_blocks")

    def decode(self, case: Case, weights: Weights, x: Any) -> Any:
        """All rows, one token after the other through a cache."""
        raise NotOffered("decode")

    def varlen(self, case: Case, weights: Weights, x: Any, cu_seqlens: Any) -> Any:
        """Sequences one behind the other: x (tokens, model_dim), cu_seqlens (sequences + 1,)."""
        raise NotOffered("varlen")

    def layer_vjp(self, case: Case, weights: Weights, x: Any, d_out: Any) -> Gradients:
        raise NotOffered("layer_vjp")

    def layer_with_blocks_vjp(
        self, case: Case, weights: Weights, x: Any, block_indices: Any, d_out: Any
    ) -> Gradients:
        raise NotOffered("layer_with_blocks_vjp")

    def varlen_vjp(
        self, case: Case, weights: Weights, x: Any, cu_seqlens: Any, d_out: Any
    ) -> Gradients:
        """dx (tokens, model_dim); dweights summed over the sequences."""
        raise NotOffered("varlen_vjp")

    # how the judge calls them: NumPy in, NumPy out

    def offers(self, method: str) -> bool:
        """True if the subclass overrides `method`."""
        return getattr(type(self), method) is not getattr(Implementation, method)

    def run(self, method: str, case: Case, *arguments: Any) -> Any:
        """Call `method` with NumPy arrays and give NumPy arrays back."""
        if not self.offers(method):
            raise NotOffered(method)
        self._check_limits_of(method, case)
        given = self._given(case, arguments)
        handed = _named(method, given)  # now: a dict is the implementation's to change
        found = getattr(self, method)(case, *given)
        return self._noted(method, arguments, handed, found)

    def _given(self, case: Case, arguments: Sequence[Any]) -> list[Any]:
        """What a method is called with: what is written into copies, the judge does not go by."""
        return [_copied(argument) for argument in arguments]

    def _noted(
        self, method: str, arguments: Sequence[Any], handed: dict[str, Any], found: Any
    ) -> Any:
        """What was returned, as arrays, once what was handed in is seen to be as it was."""
        call = _Call(method, _named(method, arguments), handed, found)
        _check_untouched(method, call.arguments, self._arrays(call.handed))
        if self._calls is not None:
            self._calls.append(call)
        return self._arrays(found)

    def _arrays(self, value: Any) -> Any:
        """What a method takes or returns, as arrays, which it holds here already."""
        return value

    def _check_limits_of(self, method: str, case: Case) -> None:
        """Raise NotOffered for a case of another method that is beyond the limits of this one."""
        if self.limits_of and not is_within(self, method, case):
            raise NotOffered(f"{method} beyond its limits_of")

    def run_vjp(self, method: str, case: Case, *arguments: Any) -> Any:
        """Gradients of `method`: arguments as for it, then d_out (and d_lse for a branch)."""
        return self.run(f"{method}_vjp", case, *arguments)

    def offers_vjp(self, method: str) -> bool:
        """True if `run_vjp` can be called."""
        return self.offers(f"{method}_vjp")

    def run_twice(
        self,
        method: str,
        case: Case,
        first: Sequence[Any],
        second: Sequence[Any],
    ) -> tuple[Any, Any, Any]:
        """Two calls, one after the other; of "fine_vjp", say, by `run_vjp`.

        returns : what the first returned; the same once the second is over; what that returned

        Raises
        ------
        Raised : an argument was written into, be it one of the first in the second call
        """
        run = self.run_vjp if method.endswith("_vjp") else self.run
        self._calls = []
        try:
            found = run(method.removesuffix("_vjp"), case, *first)
            before = _copied(found)
            self._calls = self._calls[-1:]  # behind those that a method has made itself
            other = run(method.removesuffix("_vjp"), case, *second)
            for call in self._calls[:1]:
                again = self._arrays(call.handed)
                _check_untouched(call.method, call.arguments, again, " of the call before")
            return before, self._returned_first(found), other
        finally:
            self._calls = None

    def _returned_first(self, found: Any) -> Any:
        """What the first of two calls returned, as it is now."""
        return found

    def compile_counts(self) -> Mapping[str, int]:
        """What was compiled in this process so far, by kind, for the report."""
        return {}


def compiled_by(implementation: Implementation) -> Counter[str]:
    """What an implementation says that it has compiled so far.

    Raises
    ------
    WrongDeclaration : `compile_counts` raises, or gives anything but numbers by name
    """
    asked = f"{type(implementation).__name__}.compile_counts()"
    rule = "it must return a dict of numbers, by what was compiled."
    try:
        with handed_over():
            counts: Any = implementation.compile_counts()
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:
        where = place(error)
        raise WrongDeclaration(f"{asked} raised {one_line(error)} at {where}; {rule}") from error
    if isinstance(counts, Mapping):
        numbers = all(isinstance(n, (int, np.integer)) for n in counts.values())
        if numbers and all(isinstance(name, str) for name in counts):
            return Counter({name: int(number) for name, number in counts.items()})
    raise WrongDeclaration(f"{asked} returned {cut(repr(counts), LONGEST_REASON)}; {rule}")


def refusal(implementation: Implementation, case: Case) -> str | None:
    """Why the implementation refuses this case, or None.

    Raises
    ------
    WrongDeclaration : `supports` raises, or answers with anything but None or a text; an empty
        text says nothing
    """
    asked = f"{type(implementation).__name__}.supports(case)"
    rule = "it must return None where the case can be run, and a text that says why not where it "
    rule += "cannot."
    try:
        with handed_over():
            reason: Any = implementation.supports(case)
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:
        where = place(error)
        raise WrongDeclaration(f"{asked} raised {one_line(error)} at {where}; {rule}") from error
    if reason is None or (isinstance(reason, str) and reason.strip()):
        return reason
    raise WrongDeclaration(f"{asked} returned {cut(repr(reason), LONGEST_REASON)}; {rule}")


def _copied(argument: Any) -> Any:
    """A copy of an array, or of all in a container; tensors are their implementation's already."""
    if isinstance(argument, np.ndarray):
        return argument.copy()
    if isinstance(argument, dict):
        return {name: _copied(item) for name, item in argument.items()}
    if isinstance(argument, Attention):
        return Attention(*map(_copied, argument))
    if isinstance(argument, tuple):
        return tuple(map(_copied, argument))
    return argument


@functools.cache
def _parameters(method: str) -> list[str]:
    """Of the plug's method, behind self and the case."""
    return list(inspect.signature(getattr(Implementation, method)).parameters)[2:]


def _named(method: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arrays, or tensors, among the arguments of a method, by the names that the plug has."""
    found: dict[str, Any] = {}
    for name, argument in zip(_parameters(method), arguments):
        if isinstance(argument, dict):
            found |= {f"{name}[{key!r}]": item for key, item in argument.items()}
        else:
            found[name] = argument
    return found


def _check_untouched(
    method: str, before: Mapping[str, Any], after: Mapping[str, Any], whose: str = ""
) -> None:
    """Compare the bits of arrays that were handed in with what they hold after the call.

    whose : " of the call before", if another one has followed

    Raises
    ------
    Raised : one was written into, which another kernel may still have to read
    """
    for name, old in before.items():
        new = after[name]
        bits = np.dtype(f"i{old.itemsize}")
        changed = old.view(bits) != new.view(bits) if new.shape == old.shape else np.ones(1, bool)
        if changed.any():
            raise Raised(
                f"{method} wrote into its argument {name}{whose}: {changed.sum()} of {old.size} "
                "elements are no longer what was handed in"
            )


def _leaves(inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among them, and in the dicts among them."""
    leaves: list[torch.Tensor] = []
    for item in inputs:
        leaves += item.values() if isinstance(item, dict) else [item]
    return leaves


class TorchImplementation(Implementation):
    """Tensors in and out on `self.device`; gradients come from autograd.

    The tensors have the case's dtype and lie in memory as `case.layout` says.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def tensor(self, case: Case, array: np.ndarray, *, grad: bool = False) -> torch.Tensor:
        """The array on the device, laid out as the case says."""
        import torch

        if array.dtype == DTYPES["bfloat16"]:
            # NumPy's bfloat16 is foreign to torch: its bits are not
            bits = np.array(array, order="C").view(np.int16)
            tensor = torch.from_numpy(bits).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.array(array, order="C"))
        tensor = tensor.to(self.device)
        if tensor.ndim >= 3:  # all but matrices and vectors among the weights
            match case.layout:
                case "transposed":  # (batch, len, heads, dim) in memory, as projections leave it
                    tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
                case "strided":  # every other element of a row, from the second on, poison between
                    # and in further rows, as of a batch that is padded
                    poison = math.nan if tensor.is_floating_point() else 2**40
                    *outer, rows, width = tensor.shape
                    wide = tensor.new_full((*outer, rows + PADDED_ROWS, 2 * width), poison)
                    wide[..., :rows, 1::2] = tensor
                    tensor = wide[..., :rows, 1::2]
                case "expanded":  # over the batch; keys and values of one entry over the heads
                    axis = 0 if tensor.shape[0] > 1 or tensor.ndim < 4 else 1
                    one = tensor.narrow(axis, 0, min(1, tensor.shape[axis]))
                    if tensor.shape[axis] > 1 and bool((tensor == one).all()):
                        tensor = one.expand(tensor.shape)
        return tensor.detach().requires_grad_(grad)

    def array(self, value: Any) -> Any:
        """Tensors become arrays (bfloat16 as ml_dtypes'), containers of them keep their form."""
        import torch

        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            if value.dtype == torch.bfloat16:
                bits = value.contiguous().view(torch.int16)
                return bits.numpy().view(DTYPES["bfloat16"])
            return value.numpy()
        if isinstance(value, Attention):
            return Attention(self.array(value.out), self.array(value.lse))
        if isinstance(value, dict):
            return {name: self.array(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return tuple(self.array(item) for item in value)
        return value

    def _tensors(self, case: Case, arguments: Sequence[Any], *, grad: bool) -> list[Any]:
        tensors: list[Any] = []
        for argument in arguments:
            if isinstance(argument, dict):
                names = list(argument)
                items = self._tensors(case, [argument[name] for name in names], grad=grad)
                tensors.append(dict(zip(names, items)))
            else:
                floating = argument.dtype != np.int64
                tensors.append(self.tensor(case, argument, grad=grad and floating))
        return tensors

    def _before(self, case: Case, tensors: Sequence[Any]) -> None:
        """Set the declared numerics, and poison free memory, which may hold an earlier result."""
        device = device_of(self.device)
        device.set_tf32(self.numerics.get(case.dtype) == "tf32")
        device.poison([leaf.numel() * leaf.element_size() for leaf in _leaves(tensors)])

    def _given(self, case: Case, arguments: Sequence[Any]) -> list[Any]:
        tensors = self._tensors(case, arguments, grad=False)
        self._before(case, tensors)
        return tensors

    def _arrays(self, value: Any) -> Any:
        return self.array(value)

    def _returned_first(self, found: Any) -> Any:
        # of a GPU's tensors, arrays are copies: they are made again
        return self.array(self._calls[0].found) if self._calls else found

    def offers_vjp(self, method: str) -> bool:
        return self.offers(method)

    def compile_counts(self) -> Mapping[str, int]:
        return compile_counts()

    def run_vjp(self, method: str, case: Case, *arguments: Any) -> Any:
        import torch

        if not self.offers(method):
            raise NotOffered(method)
        self._check_limits_of(f"{method}_vjp", case)
        attention = method in ("sliding", "compress", "fine")
        gradients = 2 if attention else 1
        inputs = self._tensors(case, arguments[:-gradients], grad=True)
        d_outputs = self._tensors(case, arguments[-gradients:], grad=False)
        handed = _named(f"{method}_vjp", [*inputs, *d_outputs])
        self._before(case, [*inputs, *d_outputs])
        outputs: Any = getattr(self, method)(case, *inputs)
        if not attention:
            outputs = (outputs,)
        elif outputs.lse is None or not self.lse_gradient:
            if np.any(arguments[-1].astype(np.float64)):
                raise NotOffered(f"lse of {method}")
            outputs, d_outputs = (outputs.out,), d_outputs[:1]
        elif outputs.out.requires_grad and not outputs.lse.requires_grad:
            raise TypeError(
                f"the lse of {method} has no gradient for autograd; a port whose backward takes "
                "none says so by `lse_gradient = False`"
            )
        if not any(output.requires_grad for output in outputs):
            raise TypeError(
                f"what {method} returns has no gradient for autograd (a tensor was detached, or "
                "torch.no_grad() is on); a port without gradients says so by "
                "`def offers_vjp(self, method): return False`"
            )
        leaves = [leaf for leaf in _leaves(inputs) if leaf.requires_grad]
        self._before(case, [*inputs, *d_outputs])
        found = torch.autograd.grad(
            outputs, leaves, grad_outputs=d_outputs, allow_unused=True, materialize_grads=True
        )
        gradients_of = {id(leaf): grad for leaf, grad in zip(leaves, found)}

        def gather(item: Any) -> Any:
            if isinstance(item, dict):
                return {name: gradients_of[id(leaf)] for name, leaf in item.items()}
            return gradients_of[id(item)]

        gathered = tuple(gather(i) for i in inputs if isinstance(i, dict) or i.requires_grad)
        # a layer takes its weights first, and its gradients come as those of pool do
        gathered = gathered if attention or method == "pool" else gathered[::-1]
        return self._noted(f"{method}_vjp", arguments, handed, gathered)


class OracleImplementation(Implementation):
    """The definition behind the plug: float64 inside, the result rounded once to the case's dtype.

    The mutants are subclasses of it with one decision changed.
    """

    name = "oracle"
    nonfinite_invisible = True
    semantics = (
        *PRESETS.values(),
        *(dataclasses.replace(preset, causal=False) for preset in PRESETS.values()),
        dataclasses.replace(PRESETS["FLA"], rotary="before_pooling"),
    )
    numerics: Mapping[str, str] = {
        "float64": "fp64",
        "float32": "fp32",
        "bfloat16": "bf16",
        "float16": "fp16",
    }

    def sliding_mask(self, case: Case) -> np.ndarray:
        return sliding_mask(case.q_len, case.kv_len, **case.geometry)

    def compress_mask(self, case: Case) -> np.ndarray:
        return compress_mask(case.q_len, case.kv_len, **case.geometry)

    def fine_mask(self, case: Case, block_indices: np.ndarray) -> np.ndarray:
        return fine_mask(case.q_len, case.kv_len, block_indices, **case.geometry)

    def attend(
        self, case: Case, branch: str, mask: np.ndarray, q: Any, k: Any, v: Any
    ) -> Attention:
        """A1 and A2 in float64."""
        empty_row = getattr(case.semantics.empty_row, branch)
        empty_lse = getattr(case.semantics.empty_lse, branch)
        return attend(q, k, v, mask, scale=case.scale, empty_row=empty_row, empty_lse=empty_lse)

    def attend_vjp(
        self, case: Case, branch: str, mask: np.ndarray, *tensors: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A3 in float64; the tensors are q, k, v, d_out and d_lse."""
        q, k, v, *d_outputs = tensors
        empty_row = getattr(case.semantics.empty_row, branch)
        return attend_vjp(q, k, v, mask, *d_outputs, scale=case.scale, empty_row=empty_row)

    def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
        return _stored(case, self.attend(case, "sliding", self.sliding_mask(case), q, k, v))

    def fine(self, case: Case, q: Any, k: Any, v: Any, block_indices: Any) -> Attention:
        mask = self.fine_mask(case, block_indices)
        return _stored(case, self.attend(case, "fine", mask, q, k, v))

    def compress(
        self, case: Case, q: Any, k_cmp: Any, v_cmp: Any, mem_k: Any, mem_v: Any
    ) -> Attention:
        k = np.concatenate([mem_k, k_cmp], axis=2)
        v = np.concatenate([mem_v, v_cmp], axis=2)
        return _stored(case, self.attend(case, "compress", self.compress_mask(case), q, k, v))

    def sliding_vjp(self, case: Case, *tensors: Any) -> tuple[Any, ...]:
        return _stored(case, self.attend_vjp(case, "sliding", self.sliding_mask(case), *tensors))

    def fine_vjp(
        self, case: Case, q: Any, k: Any, v: Any, block_indices: Any, *d_outputs: Any
    ) -> tuple[Any, ...]:
        mask = self.fine_mask(case, block_indices)
        return _stored(case, self.attend_vjp(case, "fine", mask, q, k, v, *d_outputs))

    def compress_vjp(self, case: Case, *tensors: Any) -> tuple[Any, ...]:
        q, k_cmp, v_cmp, mem_k, mem_v, *d_outputs = tensors
        k = np.concatenate([mem_k, k_cmp], axis=2)
        v = np.concatenate([mem_v, v_cmp], axis=2)
        mask = self.compress_mask(case)
        dq, dk, dv = _stored(case, self.attend_vjp(case, "compress", mask, q, k, v, *d_outputs))
        memory = case.num_mem_kv
        return dq, dk[:, :, memory:], dv[:, :, memory:], dk[:, :, :memory], dv[:, :, :memory]

    def pool(self, case: Case, x: Any, weights: Weights) -> np.ndarray:
        return _stored(case, pool(x, weights, **case.geometry))

    def pool_vjp(self, case: Case, x: Any, weights: Weights, d_out: Any) -> Gradients:
        return _stored(case, pool_vjp(x, weights, d_out, **case.geometry))

    def select(self, case: Case, q: Any, k_cmp: Any, mem_k: Any) -> np.ndarray:
        return select(q, k_cmp, mem_k, kv_len=case.kv_len, **case.geometry)

    def layer(self, case: Case, weights: Weights, x: Any) -> np.ndarray:
        return _stored(case, layer(x, weights, **case.geometry))

    def layer_with_blocks(
        self, case: Case, weights: Weights, x: Any, block_indices: Any
    ) -> np.ndarray:
        return _stored(case, layer(x, weights, block_indices=block_indices, **case.geometry))

    def decode(self, case: Case, weights: Weights, x: Any) -> np.ndarray:
        return _stored(case, decode(x, weights, **case.geometry))

    def varlen(self, case: Case, weights: Weights, x: Any, cu_seqlens: Any) -> np.ndarray:
        return _stored(case, varlen(x, weights, cu_seqlens, **case.geometry))

    def layer_vjp(self, case: Case, weights: Weights, x: Any, d_out: Any) -> Gradients:
        return _stored(case, layer_vjp(x, weights, d_out, **case.geometry))

    def layer_with_blocks_vjp(
        self, case: Case, weights: Weights, x: Any, block_indices: Any, d_out: Any
    ) -> Gradients:
        found = layer_vjp(x, weights, d_out, block_indices=block_indices, **case.geometry)
        return _stored(case, found)

    def varlen_vjp(
        self, case: Case, weights: Weights, x: Any, cu_seqlens: Any, d_out: Any
    ) -> Gradients:
        return _stored(case, varlen_vjp(x, weights, cu_seqlens, d_out, **case.geometry))


def _stored(case: Case, value: Any) -> Any:
    """Rounded to the case's dtype, as a kernel stores its result; lse stays in float64 or 32."""
    dtype = DTYPES[case.dtype]
    if isinstance(value, Attention):
        lse_dtype = np.float64 if case.dtype == "float64" else np.float32
        return Attention(value.out.astype(dtype), value.lse.astype(lse_dtype))
    if isinstance(value, dict):
        return {name: array.astype(dtype) for name, array in value.items()}
    if isinstance(value, tuple):
        return tuple(_stored(case, item) for item in value)
    return value.astype(dtype)
