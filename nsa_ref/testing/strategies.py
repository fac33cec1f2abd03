"""Valid cases by construction, leaning on the edges; they shrink towards one token and one head.

Nothing is filtered: dependent sizes are built from factors and remainders. A property passes what
it is about as `adjust`, a function of draw and the sizes drawn so far.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from nsa_ref.semantics import Semantics
from nsa_ref.sizes import COMPRESS_MAPS
from nsa_ref.testing.case import INDICES, INPUTS, LAYOUTS, Case
from nsa_ref.testing.devices import device_of
from nsa_ref.testing.implementation import Implementation
from nsa_ref.testing.limits import (
    BLOCKS,
    HEADS,
    LENGTHS,
    block_sizes,
    brought_within,
    common,
    head_counts,
    layer_lengths,
    some_of,
    up_to,
)

#: Fields of a case, drawn so far.
Drawn = dict[str, Any]
Adjust = Callable[[st.DrawFn, Drawn], None]

GROUP_SIZES = (1, 2, 4, 3, 5, 16)
HEAD_DIMS = (8, 16, 4, 1, 3, 24, 64, 128, 136)
#: Features of a head that production kernels are made for.
TILE_DIMS = (64, 128)
#: Heads of a group, and slots, that fill a tile of such a kernel.
TILE = 16


#: What a case can be about, and the groups of sizes that this takes. Sizes that nothing reads keep
#: their defaults: a smallest case then shows only what matters.
ABOUT = {
    "sliding": ("window",),
    "compress": ("compress",),
    "fine": ("blocks", "indices"),
    "pool": ("compress", "map"),
    "selection": ("compress", "blocks", "forced"),
    "layer": ("window", "compress", "map", "blocks", "forced", "model"),
}

#: The groups for which a field is varied; fields that are not named here always are.
VARIED_BY = {
    "sliding_window_size": ("window",),
    "num_mem_kv": ("compress",),
    # these are multiples of one another, so whoever reads one varies all
    "compress_block_size": ("compress", "blocks"),
    "compress_block_sliding_stride": ("compress", "blocks"),
    "selection_block_size": ("compress", "blocks"),
    "num_selected_blocks": ("blocks",),
    "num_initial_blocks": ("forced",),
    "num_local_blocks": ("forced",),
    "indices": ("indices",),
}


def is_varied(field: str, about: str) -> bool:
    """Whether cases about this (a key of `ABOUT`) have more than one value of the field."""
    groups = set(ABOUT[about])
    return bool(groups & set(VARIED_BY.get(field, groups)))


#: How q_len and kv_len stand to each other. A property tries them one after the other: left to
#: itself, Hypothesis varies what it has already tried, and whole shapes stay out of a short run.
SHAPES = ("square", "decode", "short keys", "edge")
LONG_SHAPES = ("around 128", "long", "full tiles", "many blocks")
#: A layer reads its own keys: hardly any tokens, or some.
LAYER_SHAPES = ("few tokens", "square")
FEW = 3
#: More blocks than a kernel may have counted on.
MANY_BLOCKS = 128
#: Shapes that a property must ask for: the longest sequences that the device is for, and tensors
#: whose offsets do not fit into 32 bits.
EXTENTS = ("far", "large")
#: Tokens from which on a sequence is a long one.
FAR = 512


def shapes_of(about: str) -> tuple[str, ...]:
    """The shapes of cases about this; many blocks only where blocks are chosen."""
    if about == "layer":
        return LAYER_SHAPES
    return SHAPES + (LONG_SHAPES if "blocks" in ABOUT[about] else LONG_SHAPES[:3])


@st.composite
def cases(
    draw: st.DrawFn,
    implementation: Implementation,
    about: str,
    *,
    semantics: Sequence[Semantics] | None = None,
    dtypes: Collection[str] | None = None,
    inputs: Sequence[str] = INPUTS,
    indices: Sequence[str] = INDICES,
    head_dims: Sequence[int] = HEAD_DIMS,
    shape: str | None = None,
    populated: bool = False,
    max_len: int = 40,
    adjust: Adjust | None = None,
) -> Case:
    """Cases that the implementation's `semantics`, `numerics` and `limits` allow.

    about : a key of ABOUT
    semantics, dtypes, inputs, indices, head_dims : further restrictions
    shape : one of `shapes_of(about)`, default any of them; or one of EXTENTS
    populated : at least one batch entry, and two rows and two keys before `adjust`
    max_len : q_len and kv_len in tokens, but for the long shapes; a layer has 24 at most
    adjust : changes the sizes to what a property is about
    """
    limits = implementation.limits
    groups = ABOUT[about]

    def pick(
        field: str,
        choices: Sequence[Any],
        group: str | None = None,
        allowed: Collection[Any] | None = None,
    ) -> Any:
        """One of `choices` that is allowed; of what is allowed, if none is.

        allowed : by default what the limits say
        """
        if group is not None and group not in groups:
            choices = choices[:1]
        allowed = limits.get(field) if allowed is None else allowed
        if allowed is not None:
            choices = [c for c in choices if c in allowed] or some_of(allowed)
        # Hypothesis keeps strategies of integers; one of `sampled_from` is made for each draw
        return choices[0] if len(choices) == 1 else choices[draw(st.integers(0, len(choices) - 1))]

    sizes: Drawn = {}
    sizes["semantics"] = draw(st.sampled_from(list(semantics or implementation.semantics)))
    sizes["dtype"] = pick("dtype", [d for d in implementation.numerics if d in (dtypes or [d])])

    shape = shape or draw(st.sampled_from(shapes_of(about)))
    groups_tried = {"far": GROUP_SIZES[:3], "full tiles": (TILE,)}.get(shape, GROUP_SIZES)
    group_size = pick("group_size", groups_tried)
    few_heads = (2, 1) if shape == "far" else (1,) if about == "layer" else (1, 2)
    sizes["kv_heads"] = pick(
        "kv_heads", (1, 2, 3) if shape != "far" and group_size < 5 else few_heads
    )
    # an empty batch is worth a try, and no more than that
    batches = (1, 2, 3) * 5 + (() if populated else (0,))
    if shape == "far":
        batches = (2, 1)  # another entry's keys, or head's, must be there to be read
    sizes["batch"] = pick("batch", batches)
    if shape in LONG_SHAPES:
        # they stay cheap; the same draws as for the others, so that they can shrink to them
        if shape != "full tiles":
            group_size = group_size if "group_size" in limits else min(group_size, 2)
        sizes["kv_heads"] = sizes["kv_heads"] if "kv_heads" in limits else 1
        sizes["batch"] = sizes["batch"] if "batch" in limits else 1
    sizes["q_heads"] = sizes["kv_heads"] * group_size
    if (heads := head_counts(limits)) is not None:
        sizes["q_heads"] = pick("q_heads", (sizes["q_heads"],), allowed=heads)
        sizes["kv_heads"] = pick("kv_heads", heads[sizes["q_heads"]])
    if shape == "full tiles":
        head_dims = [dim for dim in TILE_DIMS if dim in head_dims] or head_dims
    sizes["head_dim"] = pick("head_dim", head_dims)
    as_wide = (sizes["head_dim"],) if shape == "full tiles" else head_dims
    sizes["value_dim"] = pick("value_dim", as_wide)

    if about == "layer":
        # it is all branches at once, and the definition takes its time
        max_len = min(max_len, 24 if sizes["q_heads"] <= 8 else 12)
        most = 3 if sizes["q_heads"] <= 4 else 1 if sizes["q_heads"] > 8 else 2
        sizes["batch"] = sizes["batch"] if "batch" in limits else min(sizes["batch"], most)
    dims = (8, 6, 3, 16) if "model" in groups else (1,)
    sizes["model_dim"] = pick("model_dim", dims)

    device = device_of(implementation.device)
    if "q_len" in limits and not device.shortest > 1:
        max_len = max(2, min(max_len, some_of(limits["q_len"])[-1]))
    enough = 4 * device.shortest
    if about == "layer" and (lengths := layer_lengths(limits)):
        enough = min(enough, lengths[-1])
    max_len = max(max_len, enough)
    rows = sizes["batch"] * sizes["q_heads"]
    shortest = 2 if populated else 1
    least = max(shortest, device.shortest)
    if about == "layer" and shape == "square":
        least = max(least, 6)
    length = draw(st.integers(least, max(least, max_len if rows <= 16 else min(max_len, 20))))
    sizes["q_len"] = sizes["kv_len"] = length
    if shape == "decode":
        sizes["q_len"] = draw(st.integers(shortest, min(length, 3)))
    elif shape == "short keys":
        sizes["kv_len"] = draw(st.integers(2 if populated else 0, length))
    elif shape == "edge":
        sizes["q_len"] = length + draw(st.sampled_from([1, -1, 1, -1, -length]))
        sizes["q_len"] = max(2 if populated else 0, sizes["q_len"])
    elif shape == "few tokens" and device.shortest <= FEW:
        sizes["q_len"] = sizes["kv_len"] = draw(st.integers(shortest, FEW))
    elif shape == "around 128":
        # a last tile of one key, or of one row, is worth as much as all other lengths
        sizes["kv_len"] = draw(st.sampled_from([129, 65]) | st.integers(127, 130))
        sizes["q_len"] = draw(st.sampled_from([sizes["kv_len"], shortest, 33, 65]))
    elif shape == "long":
        sizes["kv_len"] = draw(st.just(257) | st.integers(250, 270))
        sizes["q_len"] = draw(st.sampled_from([sizes["kv_len"], shortest, 33, 65]))
    elif shape == "full tiles":
        sizes["kv_len"] = draw(st.sampled_from([65, 129]))
        sizes["q_len"] = draw(st.integers(shortest, 3))

    if shape == "far":
        sizes |= draw(st.sampled_from(far_lengths(implementation)))
    elif shape == "large":
        sizes |= large_sizes(implementation) or {}

    # l, d and l' with d dividing both; l' first where the implementation limits it
    strides: tuple[int, ...] = (1,) if shape == "many blocks" else (1, 2, 4, 3, 8)
    if shape == "full tiles" and "blocks" in groups:
        strides = (4, 2)
    if shape in EXTENTS:
        strides = (16, 4, 8)  # as in the paper, or near it: the blocks of a mask are not tokens
    group = "compress" if "compress" in groups else "blocks"
    if (blocks := block_sizes(limits)) is not None:
        size = sizes["selection_block_size"] = pick("selection_block_size", (), allowed=blocks)
        fitting = [s for s in strides if s in blocks[size]]
        stride = pick("compress_block_sliding_stride", fitting, group, allowed=blocks[size])
    else:
        stride = pick("compress_block_sliding_stride", strides, group)
        most = 2 if shape == "many blocks" else 4
        factors = st.integers(1, most if "blocks" in groups else 1)
        sizes["selection_block_size"] = stride * draw(factors)
    sizes["compress_block_sliding_stride"] = stride
    windows = [stride * factor for factor in (1, 2, 3, 4)]
    if about in ("compress", "pool") and stride > 1:
        # nothing but eq. 9 needs d to divide l; windows may even leave gaps
        windows += [2 * stride + 1, stride - 1]
    windows.append(stride * (24 // stride + 1))  # longer than any tile of 16
    sizes["compress_block_size"] = pick("compress_block_size", windows, "compress")
    if shape == "many blocks":
        # far enough beyond 128, or 256, that the blocks up there are chosen
        size = sizes["selection_block_size"]
        sizes["kv_len"] = size * draw(st.integers(129, 170) if size > 1 else st.integers(260, 300))
        sizes["kv_len"] += draw(st.integers(0, 1))
        sizes["q_len"] = draw(st.integers(shortest, 4))
    elif shape == "full tiles" and "blocks" in groups:
        # every slot taken, by blocks of which the last one is short
        size = sizes["selection_block_size"]
        sizes["kv_len"] = size * TILE + draw(st.integers(1, max(1, size - 1)))
    if about == "layer" and (lengths := layer_lengths(limits)) is not None:
        sizes["q_len"] = sizes["kv_len"] = pick("kv_len", (sizes["kv_len"],), allowed=lengths)
    elif shape == "square" and (lengths := layer_lengths(limits)):
        # rows from the first position on are as many as keys, whatever lengths there are
        sizes["q_len"] = sizes["kv_len"] = pick("kv_len", (sizes["kv_len"],), allowed=lengths)
    elif shape not in EXTENTS and ("q_len" in limits or "kv_len" in limits):
        sizes["q_len"] = pick("q_len", (sizes["q_len"],))
        allowed = some_of(limits.get("kv_len", ()))
        if shape == "many blocks":
            allowed = [n for n in allowed if n > MANY_BLOCKS * sizes["selection_block_size"]]
        sizes["kv_len"] = pick("kv_len", (sizes["kv_len"],), allowed=allowed or None)

    kv_len = sizes["kv_len"]
    count = min(-(-kv_len // sizes["selection_block_size"]), 32)
    slots: tuple[int, ...] = (1, 2, count, count + 1, 0, 3, 4)
    if shape == "many blocks":
        slots = (17, 3, 35)
    elif shape == "full tiles" and "blocks" in groups:
        slots = (TILE,)
    sizes["num_selected_blocks"] = pick("num_selected_blocks", slots, "blocks")
    sizes["num_initial_blocks"] = pick("num_initial_blocks", (0, 1, 2), "forced")
    sizes["num_local_blocks"] = pick("num_local_blocks", (0, 1, 2), "forced")
    reach: tuple[int, ...] = (0, 1, max(kv_len - 1, 0), kv_len, kv_len + 3)
    if "window" in groups and draw(st.booleans()):
        reach = tuple(range(kv_len + 1))
    if "window" in groups and not sizes["semantics"].window_closed:
        reach = tuple(max(1, w) for w in reach)  # w keys: none at all are no window
    sizes["sliding_window_size"] = pick("sliding_window_size", reach, "window")
    sizes["num_mem_kv"] = pick("num_mem_kv", (0, 1, 16, 3), "compress")
    sizes["compress_map"] = pick("compress_map", COMPRESS_MAPS, "map")
    sizes["compress_positions"] = pick("compress_positions", (False, True), "map")
    sizes["inputs"] = draw(st.sampled_from(list(inputs)))
    if "indices" in groups:
        sizes["indices"] = pick("indices", list(indices))
    sizes["layout"] = pick("layout", LAYOUTS[:1] if shape == "large" else LAYOUTS)
    sizes["seed"] = draw(st.integers(0, 2**16))
    if adjust is not None:
        within = dict(sizes)
        adjust(draw, sizes)
        now = sizes | {"group_size": sizes["q_heads"] // sizes["kv_heads"]}
        beyond = {field for field in limits if field in now and now[field] not in limits[field]}
        for together in (HEADS, BLOCKS, *([LENGTHS] if about == "layer" else [])):
            beyond |= together if beyond & together else set()
        sizes.update({field: within[field] for field in beyond if field in within})
    if implementation.rules:
        square, least = about == "layer", 2 if populated else 0
        rules = implementation.rules
        inside = brought_within(sizes, rules, limits, square=square, least=least)
        if inside is None:
            reject()
        sizes = inside
    return Case(**sizes)


def far_lengths(implementation: Implementation) -> list[Drawn]:
    """q_len and kv_len of long sequences, within the limits; none if those allow only short ones.

    As long as each other, a chunk of a long prompt, or a few rows behind a long cache.
    """
    limits = implementation.limits
    most = device_of(implementation.device).longest
    allowed = up_to(limits.get("kv_len", ()), most)
    if "kv_len" not in limits:
        allowed = [most // 8 + 1, most // 2 + 3, most - 1, most]
    found = []
    for kv_len in sorted(n for n in allowed if n >= FAR)[-4:]:
        wanted = (kv_len, 33, most // 16 + 1, 1)
        found += [
            {"q_len": q_len, "kv_len": kv_len}
            for q_len in dict.fromkeys(wanted)
            if q_len <= kv_len and q_len in limits.get("q_len", (q_len,))
        ]
    return found


def large_sizes(implementation: Implementation) -> Drawn | None:
    """Sizes with which q has more elements than its device's offsets of 32 bits can tell apart.

    None if the limits allow none with sequences short enough to be compared with the definition.
    """
    limits, many = implementation.limits, device_of(implementation.device).offset_limit
    groups = limits.get("group_size", range(1, 17))

    def widest(field: str, wished: int) -> int:
        return max(up_to(limits.get(field, (wished,)), wished), default=0)

    q_heads, head_dim = widest("q_heads", 16), widest("head_dim", 64)
    kv_heads = [
        n
        for n in up_to(limits.get("kv_heads", range(1, q_heads + 1)), q_heads)
        if n and q_heads % n == 0 and q_heads // n in groups
    ]
    row = q_heads * head_dim
    if not row or not kv_heads:
        return None
    least = max(2, many // (512 * row))
    batches = common(limits.get("batch", (least,)), range(least, sys.maxsize))
    batch = min(some_of(batches), default=0)
    if not batch:
        return None
    length = many // (batch * row) + 1
    if any(length not in limits.get(field, (length,)) for field in ("q_len", "kv_len")):
        return None
    heads = {"q_heads": q_heads, "kv_heads": max(kv_heads), "head_dim": head_dim}
    return heads | {"batch": batch, "q_len": length, "kv_len": length}


def fresh_seeds(case: Case, count: int) -> list[Case]:
    """The same case with other data."""
    return [dataclasses.replace(case, seed=case.seed + 2**20 * (i + 1)) for i in range(count)]
