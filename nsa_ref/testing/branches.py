"""The three branches in one form, so that each property is written once.

Keys and values run over all columns of a branch's mask; for compress, memory stands first. What
comes back from an implementation is checked for shape here and turned into float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.handing_over import handed_over
from nsa_ref.testing.implementation import Implementation, NotOffered, OracleImplementation
from nsa_ref.testing.verdicts import NoAnswer, Raised

GRADIENTS = ("dq", "dk", "dv")
ArrayChange = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """q, k, v of a branch in the case's dtype, and the block indices if it is the fine one."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    block_indices: np.ndarray | None

    def changed(self, of_rows: ArrayChange, of_columns: ArrayChange) -> Inputs:
        """q and the block indices changed by one function, k and v by another."""
        indices = None if self.block_indices is None else of_rows(self.block_indices)
        q, k, v = of_rows(self.q), of_columns(self.k), of_columns(self.v)
        return Inputs(q=q, k=k, v=v, block_indices=indices)


@dataclass(frozen=True)
class Branch:
    """One of compress, fine, sliding."""

    name: str

    def columns(self, case: Case) -> int:
        """How many keys the branch's mask has columns for."""
        if self.name == "compress":
            return case.num_mem_kv + case.num_compress_blocks
        return case.kv_len

    def inputs(self, case: Case) -> Inputs:
        """The arrays that the case describes."""
        if self.name == "compress":
            q, k_cmp, v_cmp, mem_k, mem_v = case.compressed()
            k, v = np.concatenate([mem_k, k_cmp], axis=2), np.concatenate([mem_v, v_cmp], axis=2)
            return Inputs(q=q, k=k, v=v, block_indices=None)
        q, k, v = case.qkv()
        indices = case.block_indices() if self.name == "fine" else None
        return Inputs(q=q, k=k, v=v, block_indices=indices)

    def mask(self, case: Case, block_indices: np.ndarray | None) -> np.ndarray:
        """The oracle's multiplicities, (batch, q_heads, q_len, columns)."""
        oracle = OracleImplementation()
        if self.name == "sliding":
            mask = oracle.sliding_mask(case)
        elif self.name == "compress":
            mask = oracle.compress_mask(case)
        else:
            assert block_indices is not None
            mask = oracle.fine_mask(case, block_indices)
        return np.broadcast_to(mask, (case.batch, case.q_heads, case.q_len, mask.shape[-1]))

    def mask_clause(self, case: Case) -> str:
        """The clause that a wrong mask breaks on this case, if nothing more special is known."""
        causal = case.semantics.causal
        if self.name == "fine" and case.indices in ("mixed", "none"):
            return "I6"
        if self.name == "fine" and case.indices == "same":
            return "F3"
        return {
            "sliding": "W1" if causal else "W2",
            "compress": "C2" if causal else "C3",
            "fine": "F1" if causal else "F4",
        }[self.name]

    # the definition

    def empty_row(self, case: Case) -> str:
        """What a row that sees no key is declared to give: zero, nan or uniform (A2)."""
        rule: str = getattr(case.semantics.empty_row, self.name)
        return rule

    def attend(self, case: Case, mask: np.ndarray, inputs: Inputs) -> Attention:
        """The oracle's out and lse, float64."""
        arrays = inputs.q, inputs.k, inputs.v
        return OracleImplementation().attend(case, self.name, mask, *arrays)

    def attend_vjp(
        self, case: Case, mask: np.ndarray, inputs: Inputs, d_out: np.ndarray, d_lse: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The oracle's dq, dk, dv, float64."""
        arrays = inputs.q, inputs.k, inputs.v, d_out, d_lse
        return OracleImplementation().attend_vjp(case, self.name, mask, *arrays)

    # the implementation under test

    def arguments(self, case: Case, inputs: Inputs) -> tuple[np.ndarray, ...]:
        """The inputs in the order of the plug's method."""
        if self.name == "compress":
            m = case.num_mem_kv
            k, v = inputs.k, inputs.v
            return inputs.q, k[:, :, m:], v[:, :, m:], k[:, :, :m], v[:, :, :m]
        if self.name == "fine":
            assert inputs.block_indices is not None
            return inputs.q, inputs.k, inputs.v, inputs.block_indices
        return inputs.q, inputs.k, inputs.v

    def forward(self, implementation: Implementation, case: Case, inputs: Inputs) -> Attention:
        """The implementation's out and lse, float64; lse None if it has none."""
        result = call(implementation.run, self.name, case, *self.arguments(case, inputs))
        return self.attention(case, result)

    def attention(self, case: Case, result: Any) -> Attention:
        """What a forward returned, float64, if it has the form that the plug says."""
        if not isinstance(result, tuple) or len(result) != 2:
            raise Raised(f"{self.name} returned {type(result).__name__}, not Attention(out, lse)")
        out, lse = result
        rows = (case.batch, case.q_heads, case.q_len)
        out = checked_tensor(case, f"{self.name} out", out, (*rows, case.value_dim))
        if lse is not None:
            lse = checked_tensor(case, f"{self.name} lse", lse, rows)
        return Attention(out, lse)

    def backward(
        self,
        implementation: Implementation,
        case: Case,
        inputs: Inputs,
        d_out: np.ndarray,
        d_lse: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The implementation's dq, dk, dv over all columns, float64."""
        arguments = (*self.arguments(case, inputs), d_out, d_lse)
        result = call(implementation.run_vjp, self.name, case, *arguments)
        return self.gradients(case, inputs, result)

    def gradients(
        self, case: Case, inputs: Inputs, found: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a backward returned, float64, if it has the form that the plug says."""
        expected = 5 if self.name == "compress" else 3
        if not isinstance(found, tuple) or len(found) != expected:
            raise Raised(f"{self.name}_vjp must return a tuple of {expected} gradients")
        if self.name == "compress":
            dq, dk_cmp, dv_cmp, dmem_k, dmem_v = found
            dk, dv = (
                np.concatenate([as_array(memory), as_array(blocks)], 2)
                for memory, blocks in ((dmem_k, dk_cmp), (dmem_v, dv_cmp))
            )
        else:
            dq, dk, dv = found
        return (
            checked_tensor(case, "dq", dq, inputs.q.shape),
            checked_tensor(case, "dk", dk, inputs.k.shape),
            checked_tensor(case, "dv", dv, inputs.v.shape),
        )

    def tensors(
        self,
        implementation: Implementation,
        case: Case,
        inputs: Inputs,
        d_out: np.ndarray | None = None,
        d_lse: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """By name: out, and lse if there is one; with d_out and d_lse, dq, dk and dv."""
        if d_out is not None and d_lse is not None:
            gradients = self.backward(implementation, case, inputs, d_out, d_lse)
            return dict(zip(GRADIENTS, gradients))
        found = self.forward(implementation, case, inputs)._asdict()
        return {name: x for name, x in found.items() if x is not None}


SLIDING, COMPRESS, FINE = Branch("sliding"), Branch("compress"), Branch("fine")
BRANCHES = (COMPRESS, FINE, SLIDING)


#: What torch says where a kernel has no gradients on the device that it runs on.
NO_BACKWARD = re.compile(
    r"does not support backward on \w"
    r"|Could not run '\S*backward\S*' with arguments from the '\w+' backend"
)


def call(method: Any, *arguments: Any) -> Any:
    """Call the implementation; what it raises becomes `Raised`.

    Raises
    ------
    NotOffered : it says that it is not, or torch that there is no backward on this device
    """
    try:
        with handed_over():
            return method(*arguments)
    except (NotOffered, NoAnswer, Raised):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and NO_BACKWARD.search(str(error)):
            raise NotOffered(str(error)) from error  # NotImplementedError is a RuntimeError
        raise Raised(f"{type(error).__name__}: {error}") from error


def as_array(value: Any) -> np.ndarray:
    """What an implementation returned, which it may only now compute."""
    if type(value) is np.ndarray:  # nothing of the implementation's runs
        return value
    with handed_over():
        return np.asarray(value)


def checked_tensor(case: Case, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The value as float64, if it has the shape and the dtype that the plug says."""
    found = checked_result(name, value, shape)
    check_dtype(case, name, as_array(value))
    return found


def checked_result(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The value as float64, if it holds real numbers and has the shape that the plug says."""
    if isinstance(value, (tuple, list)):
        raise Raised(f"{name} is a {type(value).__name__}; it must be one array")
    array = as_array(value)
    if array.dtype.kind not in "fiubV":  # bfloat16 is of kind "V"
        raise Raised(f"{name} has dtype {array.dtype}; it must hold real numbers")
    if array.shape != tuple(shape):
        raise Raised(f"{name} has shape {array.shape}; it must be {tuple(shape)}")
    return array.astype(np.float64)


def check_dtype(case: Case, name: str, array: np.ndarray) -> None:
    """Raise Raised unless an array has the dtype of the case; an lse may be float32 beside any."""
    allowed = [DTYPES[case.dtype]]
    if name.endswith("lse"):
        # no row of bounds rounds an lse to 16 bits
        allowed = [np.dtype(np.float32)] + [dtype for dtype in allowed if dtype.itemsize == 8]
    if array.dtype not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise Raised(f"{name} has dtype {array.dtype}; it must be {wanted}")
