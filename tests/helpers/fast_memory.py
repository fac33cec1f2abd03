"""How large the tensors are that a call makes on its way."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returned, as it is stored."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(item, torch.Tensor):
                stored = item.untyped_storage().nbytes() // item.element_size()
                self.elements = max(self.elements, stored)
        return result
