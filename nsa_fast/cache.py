"""What decoding keeps of the tokens that it has seen (G3)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from nsa_fast.checks import check_size


class Cache:
    """Keys and values of the tokens so far, for `native_sparse_attention(..., cache=...)`.

    Of every token it keeps k and v of every branch, rotated if the branch, or the pooling before
    it, reads them rotated; what branches share is kept once. Of every complete window it keeps
    compressed k and v. Tokens that the sliding branch will not read again, or that are pooled
    already, are kept as well: `truncate` may go back to them.

    A call with a cache records no gradients, neither to the weights nor through what is cached.
    Memory is taken when the first tokens come, with their dtype and device, and grows by doubling.

    Every layer of a model needs a cache of its own. A module (`NativeSparseAttention`) owns the
    cache that it made or used first, and the copies of it; the functional form can compare sizes
    and switches only. A cache that was pickled or deep-copied belongs to the module that uses it
    next.

    Shapes
    ------
    batch : sequences that are decoded together; all have the same length

    Raises
    ------
    ValueError, TypeError : batch below 0, or no integer
    """

    def __init__(self, batch: int) -> None:
        self.batch = check_size("batch", batch, 0)
        self._length = 0
        #: (batch, kv_heads, capacity, dim) by name; what stands behind the length is not valid
        self._buffers: dict[str, Tensor] = {}
        #: sizes and switches of the layer that filled it, by name
        self._layer: dict[str, object] = {}
        #: the module whose weights made the keys; None before the first
        self._owner: weakref.ref[object] | None = None

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self._length

    def truncate(self, length: int) -> None:
        """Forget the newest tokens, all but the first `length`.

        Raises
        ------
        ValueError, TypeError : length outside [0, self.length], or no integer
        """
        length = check_size("length", length, 0)
        if length > self._length:
            raise ValueError(
                f"length={length} must be at most {self._length}, the tokens that the cache holds."
            )
        self._length = length

    def copy(self) -> Cache:
        """Another cache with the same tokens: neither sees what happens to the other."""
        other = Cache(self.batch)
        other._length = self._length
        other._layer = dict(self._layer)
        other._owner = self._owner
        with torch.inference_mode(False):
            other._buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return other

    __copy__ = copy

    def __repr__(self) -> str:
        return f"Cache(batch={self.batch}, length={self._length})"

    def __getstate__(self) -> dict[str, Any]:
        # a module that is stored beside it comes back as another object
        return vars(self) | {"_owner": None}

    # for the layer

    def check_owner(self, module: object) -> None:
        """ValueError if another module made the cache or used it first."""
        if self._owner is not None and self._owner() is not module:
            raise ValueError(
                f"cache={self!r} belongs to another layer: another module made it or used it "
                "first. Every layer, of equal sizes or not, needs a cache of its own: try "
                f"empty_cache({self.batch}) of this one."
            )

    def bind(self, module: object) -> None:
        """From now on, this module alone may use the cache."""
        self._owner = weakref.ref(module)

    def check(self, layer: dict[str, object], dtype: torch.dtype, device: torch.device) -> None:
        """ValueError unless tokens of this layer, dtype and device can be added."""
        if not self._layer:
            self._buffers = {}  # of a first call that failed
            return
        for name, value in layer.items():
            if value != self._layer[name]:
                raise ValueError(
                    f"cache was filled by a layer with {name}={self._layer[name]!r}, and this one "
                    f"has {name}={value!r}; a cache belongs to one layer."
                )
        buffer = next(iter(self._buffers.values()))
        for name, have, new in (("dtype", buffer.dtype, dtype), ("device", buffer.device, device)):
            if have != new:
                raise ValueError(
                    f"cache holds keys of {name} {have}, and the new ones have {name} {new}; "
                    "they must be the same."
                )

    def write(self, name: str, start: int, rows: Tensor) -> Tensor:
        """Put rows (batch, kv_heads, rows, dim) at `start`, and return all rows up to their end.

        The length stays: until `commit`, the cache is what it was.
        """
        stop = start + rows.shape[2]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[2] < stop:
            old, capacity = buffer, stop if buffer is None else max(stop, 2 * buffer.shape[2])
            # a tensor that is made in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                buffer = rows.new_empty((*rows.shape[:2], capacity, rows.shape[3]))
            if old is not None:
                buffer[:, :, :start] = old[:, :, :start]
            self._buffers[name] = buffer
        buffer[:, :, start:stop] = rows
        return buffer[:, :, :stop]

    def commit(self, length: int, layer: dict[str, object]) -> None:
        """What was written for `length` tokens is valid from now on."""
        self._length, self._layer = length, layer
