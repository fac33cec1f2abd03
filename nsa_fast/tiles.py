"""What Inductor would not choose by itself: tiles of the Triton kernels, a backward that lasts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch._functorch import config as functorch_config
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V


class _Tiles(InductorChoices):
    """Inductor's choices, but a backward's tile is that of the kernel's options.

    Inductor first drops every tile of its own that does not divide the blocks of the mask, and then
    looks at a backward's options: blocks of 16 rows in bfloat16 ended in NoValidChoicesError on
    sm_90 (pytorch #176025).
    """

    def __init__(self, options: dict[str, Any]) -> None:
        # the names of FlexBwDConfig's fields
        self.tile = {
            name.removeprefix("bwd_").lower(): size
            for name, size in options.items()
            if name.startswith("bwd_BLOCK_")
        }

    def get_flex_attention_bwd_configs(self, *args: Any, **kwargs: Any) -> list[Any]:
        configs = super().get_flex_attention_bwd_configs(*args, **kwargs)
        if not self.tile:
            return configs
        return [dataclasses.replace(configs[0], **self.tile)]


@contextlib.contextmanager
def compiling_with(options: dict[str, Any]) -> Iterator[None]:
    """Compile with the tiles that the options of a kernel name.

    Inductor looks for a handler of choices in the thread that compiles. A backward is compiled at
    once, because otherwise autograd's own thread would compile it.
    """
    with (
        V.set_choices_handler(_Tiles(options)),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        saved_tensors_last(),
    ):
        yield


def saved_tensors_last() -> contextlib.AbstractContextManager[None]:
    """A backward that is compiled, or called, in here leaves the tensors that were saved for it.

    Else it writes over them, and refuses to run where they might be wanted again. The setting is
    read at both times.
    """
    patched: contextlib.AbstractContextManager[None] = functorch_config.patch(donated_buffer=False)
    return patched
