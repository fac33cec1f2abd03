"""FlexAttention's Triton kernels on a CPU, in Triton's interpreter: what torch must be told for it.

`install()` changes the process that it is called in, for good, and so is called in processes of
their own (`adapter.py`). Nothing on disk is changed. What the interpreter does not show: PTX,
races, overflow of 32-bit offsets, TMA, the rounding of tensor cores.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import sys
import warnings
from types import SimpleNamespace
from typing import Any

#: Versions of (torch, triton) under which every name below was seen to mean what it says: 2.13.0
#: with 3.7.1, 2.11.0 with 3.6.0.
SUPPORTED = (("2.13", "3.7"), ("2.11", "3.6"))

#: The GPU that the interpreter stands for.
CAPABILITY = (9, 0)


def missing() -> str:
    """What keeps the interpreter from running here, in words; empty if nothing does."""
    found = []
    for package in ("torch", "triton", "numpy"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"it needs {package}, which is not installed"
        found.append(".".join(version.split(".")[:2]))
    torch, triton, numpy = found
    if (torch, triton) not in SUPPORTED:
        known = " or ".join(f"torch {torch} with triton {triton}" for torch, triton in SUPPORTED)
        return f"it needs {known}; here are torch {torch} and triton {triton}"
    if triton == "3.6" and tuple(map(int, numpy.split("."))) >= (2, 4):
        return f"the interpreter of triton 3.6 needs a numpy below 2.4; here is numpy {numpy}"
    return ""


#: Must be set when triton is imported: its functions are made for the interpreter, or they are not.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def install() -> None:
    """Let `backend="compiled"` be Triton on the CPU of this process.

    Raises
    ------
    RuntimeError : the versions are not supported, or triton was imported without the interpreter
    """
    if reason := missing():
        raise RuntimeError(f"the interpreter does not run here: {reason}.")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET must be 1 before torch is imported.")
    warnings.filterwarnings("ignore", "Could not find an active CPU backend")
    inductor_writes_triton()
    a_driver_answers()
    triton_is_there()
    the_cpu_has_no_lowering_of_its_own()
    flexattention_has_gradients_and_lse()
    tiles_are_a_gpus()
    scalars_stay_tensors()
    bfloat16_is_rounded()
    nothing_is_done_twice()
    exclusive_or_takes_no_loop()
    types_are_described_once()

    from nsa_fast import flex

    flex.TRITON_DEVICES.add("cpu")


def inductor_writes_triton() -> None:
    """1. Inductor writes C++ for a CPU, and compiles in processes that are not told any of this.

    What it writes here must not be mistaken for what others have in the same cache.
    """
    import torch.compiler.config
    from torch._inductor import config

    config.cpu_backend = "triton"
    config.compile_threads = 1
    torch.compiler.config.cache_key_tag = "nsa_ref interpreter"


def a_driver_answers() -> None:
    """2. Triton asks its driver what it compiles for, and without a GPU there is no driver."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = CAPABILITY
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
            get_device_interface=lambda: torch.cpu,
        )
    )


def triton_is_there() -> None:
    """3. torch looks for a GPU that Triton can use, in many modules."""
    import torch._inductor.scheduler
    import torch.utils._triton

    found = torch.utils._triton.has_triton
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("has_triton") is found:
            vars(module)["has_triton"] = lambda: True


def the_cpu_has_no_lowering_of_its_own() -> None:
    """4. The lowering of FlexAttention leaves for C++ as soon as it sees a CPU.

    It is registered once more, from its own source without that branch.
    """
    from torch._inductor.kernel.flex import flex_attention as module

    source = inspect.getsource(module.flex_attention)
    branch = 'query.get_device().type == "cpu"'
    if source.count(branch) != 1:
        raise RuntimeError("the lowering of flex_attention is not the one that is known here.")
    exec(compile(source.replace(branch, "False"), module.__file__, "exec"), vars(module))


def flexattention_has_gradients_and_lse() -> None:
    """5. On a CPU it refuses inputs that want gradients, and keeps no lse for a backward."""
    from torch.nn.attention import flex_attention as module

    options = module._apply_kernel_options
    module._validate_device = lambda query, key, value: None
    module._apply_kernel_options = lambda *a, **kw: options(*a, **kw) | {"OUTPUT_LOGSUMEXP": True}


def tiles_are_a_gpus() -> None:
    """6. Inductor's heuristics for a CPU know no tiles of FlexAttention: sm_90's are used."""
    import torch
    from torch._inductor.choices import InductorChoices

    heuristics = InductorChoices.get_config_heuristics
    InductorChoices.get_config_heuristics = lambda self, device_type="cuda": heuristics(
        self, "cuda" if device_type == "cpu" else device_type
    )
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY


def scalars_stay_tensors() -> None:
    """7. Triton kernels get CPU tensors without axes as numbers, and FlexAttention's load them."""
    from torch._inductor.graph import GraphLowering

    GraphLowering.is_unspec_arg = lambda self, name: False


def bfloat16_is_rounded() -> None:
    """8. To the interpreter bfloat16 is an integer of 16 bits: a cast cuts where a GPU rounds to
    nearest, and a dot multiplies the bits as they are.
    """
    import ml_dtypes
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded_cast(self: Any, value: Any, to: Any) -> Any:
        source, target = value.dtype.scalar, to.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            return TensorHandle(value.data.astype(ml_dtypes.bfloat16).view(np.uint16), target)
        if (source, target) == (tl.bfloat16, tl.float32):
            return TensorHandle(value.data.view(ml_dtypes.bfloat16).astype(np.float32), target)
        return cast(self, value, to)

    def dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            rounded_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl = rounded_cast
    InterpreterBuilder.create_dot = dot_of_values


def nothing_is_done_twice() -> None:
    """9. Two things cost most of the interpreter's time, and no result depends on them.

    It computes whether integers overflow, and asserts it in debug mode alone. And it replaces the
    functions of `triton.language` by its own at every call of a device function: at the launch of
    the kernel is enough, if both modules are replaced that such a function may know.
    """
    import dataclasses
    import types

    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patch_lang = interpreter._patch_lang
    knows_both = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda kernel: patch_lang(knows_both)
    interpreter.InterpretedFunction.__call__ = call


def exclusive_or_takes_no_loop() -> None:
    """10. A sort reduces by exclusive or, which the interpreter does element by element."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import ReduceOps

    apply = ReduceOps.apply_impl

    def apply_impl(self: Any, operands: Any) -> Any:
        if self.combine_fn != tl.standard._xor_combine:
            return apply(self, operands)
        (operand,) = operands
        found = np.bitwise_xor.reduce(operand.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, operand.dtype)

    ReduceOps.apply_impl = apply_impl


def types_are_described_once() -> None:
    """11. Each result of each operation works out anew what its type is called, and its shape.

    That is a quarter of the interpreter's time. What a name or a shape says never changes.
    """
    from triton.language import core
    from triton.runtime import interpreter

    describe_block, describe_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    tensors: dict[str, tuple[Any, Any]] = {}
    np_dtypes: dict[str, Any] = {}
    np_dtype = interpreter._get_np_dtype

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            describe_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            describe_tensor(self, handle, type)
            tensors[type.name] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = tensors[type.name]

    def known_np_dtype(type: Any) -> Any:
        if type.name not in np_dtypes:
            np_dtypes[type.name] = np_dtype(type)
        return np_dtypes[type.name]

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = known_np_dtype
