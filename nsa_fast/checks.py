"""Checks at the entry of the public functions: name, value, rule, reason, remedy.

Written apart from `nsa_ref.checks`: of `nsa_ref`, this package imports the semantics alone.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from nsa_ref.semantics import Semantics

#: The kernels compare p and j as int32, and p may stand one length past the end.
MAX_LENGTH = 2**30

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Sizes and counts that are no lengths are less than this: so are torch's 32-bit sizes.
MAX_SIZE = 2**31


def check_size(name: str, value: Any, least: int, most: int = MAX_SIZE) -> int:
    """`value` as an int, or TypeError for another kind, ValueError outside [least, most]."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}.")
    size = int(value.__index__())
    if size < least:
        raise ValueError(f"{name}={size} must be at least {least}.")
    if size >= most:
        raise ValueError(f"{name}={size} must be below {most}.")
    return size


def check_length(name: str, value: Any) -> int:
    """A number of tokens that the kernels' int32 positions can hold."""
    return check_size(name, value, 0, MAX_LENGTH)


def check_finite(name: str, value: Any) -> float:
    """`value` as a float, or TypeError for another kind, ValueError unless it is finite."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, not a torch.Tensor: it would get no gradient. "
            f"Try float({name}), or multiply q by it."
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite; it is larger than every float.") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r} must be finite.")
    return number


def check_flag(name: str, value: Any) -> bool:
    """`value`, or TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False, not {type(value).__name__}.")
    return value


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} must be one of {listed}.")


def check_tensor(name: str, value: Any, shape: tuple[int | str, ...]) -> Tensor:
    """A tensor of this shape; a string names a free axis."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}.")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor; it must have one size along each axis.")
    if value.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {value.layout}; it must be dense. Try {name}.to_dense()."
        )
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, shape)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({wanted}).")
    return value


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError unless its dtype is a real floating point type that sums can be formed in."""
    if tensor.dtype not in FLOATING:
        listed = ", ".join(str(dtype) for dtype in FLOATING)
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; it must be a floating point type: {listed}."
        )


def check_plain(name: str, tensor: Tensor) -> None:
    """TypeError, ValueError for what holds no numbers that a kernel could read, or is traced."""
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta, which holds no numbers: move it to cpu or cuda.")
    if isinstance(tensor, FakeTensor):
        raise TypeError(
            f"{name} is a fake tensor, as torch.export makes them: the lists of blocks depend on "
            "data, and cannot be made of shapes alone."
        )
    if torch.jit.is_tracing():
        raise TypeError(
            f"{name} is traced by torch.jit.trace, which has no record of these kernels. Try "
            "torch.compile."
        )
    check_untransformed(name, tensor)


def check_untransformed(name: str, tensor: Tensor) -> None:
    """TypeError inside a transform of torch.func, and in forward-mode AD."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{name} is inside a transform of torch.func (vmap, grad, jvp, ...), which has no rule "
            "for these kernels. Use a batch axis for vmap, and torch.autograd for gradients."
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{name} has a tangent of forward-mode AD, which has no rule for these kernels. Use "
            "backward()."
        )


def check_integers(name: str, value: Any, shape: tuple[int | str, ...], *, holds: str) -> Tensor:
    """A tensor of integers (bool is none) of this shape; `holds` says what they mean."""
    tensor = check_tensor(name, value, shape)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; it must hold integers: {holds}. Try torch.int64."
        )
    return tensor


def check_inside_mode(name: str, tensor: Tensor) -> None:
    """TypeError for a fake tensor outside of its mode, where what is made beside it is real."""
    if isinstance(tensor, FakeTensor) and active_fake_tensor_mode() is None:
        raise TypeError(f"{name} is a fake tensor outside of its FakeTensorMode. Call it inside.")


def active_fake_tensor_mode() -> Any:
    """The FakeTensorMode that is entered, or None."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def check_indices(name: str, value: Any, shape: tuple[int | str, ...]) -> Tensor:
    """Numbers of selection blocks, of this shape."""
    tensor = check_integers(name, value, shape, holds="block numbers, and -1 in unused slots")
    check_untransformed(name, tensor)
    return tensor


def check_alike(**tensors: Tensor) -> None:
    """One dtype, one device."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} and {first} {reference.dtype}; "
                "they must be the same."
            )
        check_device(name, tensor, first, reference)


def check_device(name: str, tensor: Tensor, of_name: str, of: Tensor) -> None:
    """ValueError unless both are on one device; TypeError if one of them is a fake tensor."""
    mode = active_fake_tensor_mode()
    real_ones_too = mode is not None and mode.allow_non_fake_inputs
    if isinstance(tensor, FakeTensor) != isinstance(of, FakeTensor) and not real_ones_too:
        fake, other = (name, of_name) if isinstance(tensor, FakeTensor) else (of_name, name)
        raise TypeError(
            f"{fake} is a fake tensor, which holds no numbers, and {other} is not: make both in "
            "one FakeTensorMode, or neither."
        )
    modes = {getattr(one, "fake_mode", None) for one in (tensor, of)}
    if len(modes) > 1 and not real_ones_too:
        raise TypeError(
            f"{name} and {of_name} are fake tensors of two FakeTensorModes: make both in one."
        )
    if tensor.device != of.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {of_name} on {of.device}; "
            "they must be on one device."
        )


def check_group(q_heads: int, kv_heads: int) -> int:
    """G: how many query heads share a kv head."""
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(
            f"q has {q_heads} heads (axis 1) and k has {kv_heads}; the heads of q must be a "
            "positive multiple of the heads of k: query head h reads kv head h // G."
        )
    return q_heads // kv_heads


def check_stride_divides(name: str, size: int, stride: int) -> None:
    """ValueError unless a size in tokens is a whole number of strides."""
    if size % stride:
        near = max(size // stride, 1) * stride
        raise ValueError(
            f"{name}={size} must be a multiple of compress_block_sliding_stride={stride}: eq. 9 "
            f"counts the overlap of windows and blocks in whole strides. Try {near} or "
            f"{near + stride}."
        )


def check_semantics(semantics: Any, branch: str) -> Semantics:
    """TypeError for another kind; ValueError for a switch that FlexAttention cannot follow."""
    check_kind(semantics)
    runs: list[tuple[str, Any, Any]] = [
        (f"empty_row.{branch}", getattr(semantics.empty_row, branch), "zero"),
        (f"empty_lse.{branch}", getattr(semantics.empty_lse, branch), float("-inf")),
    ]
    if branch == "fine":
        runs.append(("duplicates", semantics.duplicates, "set"))
    for switch, value, only in runs:
        if value != only:
            raise ValueError(
                f"semantics.{switch}={value!r} is not what nsa_fast computes; it runs {only!r}. "
                "nsa_ref follows every value of this switch."
            )
    checked: Semantics = semantics
    return checked


def check_kind(semantics: Any) -> None:
    """TypeError for what is no Semantics."""
    if not isinstance(semantics, Semantics):
        raise TypeError(
            f"semantics={semantics!r} must be a nsa_ref.Semantics, such as nsa_ref.PAPER, "
            f"not {type(semantics).__name__}."
        )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Operations in the dtype of their inputs, whatever torch.autocast asks for."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches kernels on the current GPU, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
