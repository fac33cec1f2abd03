"""Do two branches make the same mistake? What one gives for its rows is asked of the other.

A row of a branch is attention over the keys that it sees. Handed those keys alone, any branch gives
that row. What goes wrong in a helper that branches share gives the same wrong values in each; two
mistakes do not, if there are keys and heads enough to tell them apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nsa_ref.testing.branches import COMPRESS, GRADIENTS, SLIDING, Branch, Inputs
from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import Implementation, NotOffered
from nsa_ref.testing.properties import Property
from nsa_ref.testing.properties.common import is_declared, judged, oracle_mask, set_up
from nsa_ref.testing.properties.values import sent_back
from nsa_ref.testing.verdicts import NoAnswer, Raised

Tensors = dict[str, np.ndarray]

#: A case's rows, keys and heads that tell mistakes apart: with one key or one head several look
#: alike. Of two pairs the first has a row that sees nothing, or other heads than the finding has,
#: which not every port takes.
TELLING: tuple[dict[str, Any], ...] = tuple(
    {"q_len": rows, "kv_len": 8, **heads}
    for rows in (9, 8)
    for heads in ({"q_heads": 4, "kv_heads": 2}, {})
)


def same_mistake(
    implementation: Implementation, one: tuple[Property, Case], other: tuple[Property, Case]
) -> bool | None:
    """Whether two findings, each of a branch of its own, are shown to be one mistake.

    The values of each finding's case must be wrong as they are in the other's branch, and so must
    those of a case that tells mistakes apart. None if that cannot be tried, for instance because it
    lies outside of the implementation's limits.
    """
    (prop, case), (beside, _) = one, other
    try:
        for (asked, found), branch in ((one, beside.the_branch), (other, prop.the_branch)):
            _, inputs, mask = set_up(asked, found)
            theirs = _row_by_row(implementation, branch, asked, found, inputs, mask)
            if not _wrong_alike(implementation, asked, found, inputs, theirs):
                return False
        for sizes in TELLING:
            more = dataclasses.replace(case, inputs="randn", **sizes)
            telling = as_one_attention(more, prop.the_branch, beside.the_branch)
            if is_declared(implementation, telling, case) and all(
                _is_one(telling, p.the_branch) for p in (prop, beside)
            ):
                inputs = _inputs(telling)
                sent = _sent(implementation, prop, telling)
                theirs = beside.the_branch.tensors(implementation, telling, inputs, *sent)
                return _wrong_alike(implementation, prop, telling, inputs, theirs)
    except (NoAnswer, NotOffered, Raised):
        pass
    return None


def as_one_attention(case: Case, *branches: Branch) -> Case:
    """The case with sizes that make these branches one: each sees all keys up to its row.

    All blocks are chosen, the window reaches all keys, and every compressed block is one key. What
    the branches do not read, and what is large enough, stays as it is: a port may have no other.
    """
    reach, blocks = case.q_len + case.kv_len, case.num_selection_blocks
    alike: dict[str, Any] = {
        "sliding_window_size": max(case.sliding_window_size, reach),
        "num_selected_blocks": max(case.num_selected_blocks, blocks),
    }
    if COMPRESS in branches:
        alike |= {"compress_block_size": 1, "compress_block_sliding_stride": 1, "num_mem_kv": 0}
    return dataclasses.replace(case, indices="all", layout="contiguous", **alike)


def _is_one(case: Case, branch: Branch) -> bool:
    """Whether the branch is that attention by the definition; conventions may set it apart."""
    p = np.arange(case.q_len)[:, None] + case.kv_len - case.q_len
    reached = p >= np.arange(case.kv_len) if case.semantics.causal else p >= 0
    return bool((oracle_mask(branch, case) == reached).all())


def _inputs(case: Case) -> Inputs:
    """Those of all branches at once, where they are one attention."""
    return dataclasses.replace(SLIDING.inputs(case), block_indices=case.block_indices())


def _sent(implementation: Implementation, prop: Property, case: Case) -> tuple[np.ndarray, ...]:
    """d_out and d_lse, if the property is about gradients."""
    if not prop.backward:
        return ()
    mask = oracle_mask(prop.the_branch, case)
    return sent_back(prop.the_branch, case, mask, of_lse=implementation.lse_gradient)


def _wrong_alike(
    implementation: Implementation, prop: Property, case: Case, inputs: Inputs, theirs: Tensors
) -> bool:
    """Whether a branch's values are wrong, and up to the bounds those of `theirs`."""
    branch, sent = prop.the_branch, _sent(implementation, prop, case)
    mask = branch.mask(case, inputs.block_indices)
    how: dict[str, Any] = {"forms": ("deterministic",)}
    values, (bounds,) = judged(branch, implementation, case, inputs, mask, *sent, **how)
    right = values._asdict()
    mine = branch.tensors(implementation, case, inputs, *sent)
    names = mine.keys() & theirs.keys()
    limits = {name: getattr(bounds, name) for name in names}
    wrong = any(_differ(mine[name], right[name], limits[name]) for name in names)
    return wrong and not any(_differ(mine[name], theirs[name], limits[name]) for name in names)


def _differ(one: np.ndarray, other: np.ndarray, bound: np.ndarray) -> bool:
    """Whether two tensors are further apart than a bound; NaN is equal to NaN."""
    with np.errstate(invalid="ignore"):
        same = (one == other) | (np.isnan(one) & np.isnan(other)) | (np.abs(one - other) <= bound)
    return not same.all()


def _row_by_row(
    implementation: Implementation,
    branch: Branch,
    prop: Property,
    case: Case,
    inputs: Inputs,
    mask: np.ndarray,
) -> Tensors:
    """What another branch gives for the rows of a case, each with the keys that it sees.

    Rows with equally many keys are the entries of one batch. In each the row stands last, below
    others that are like it, so that q_len is kv_len; one that sees no key stands first, before the
    only key.

    Raises
    ------
    NotOffered : the implementation does not take such a case, or there is no key
    NoAnswer, Raised
    """
    sent, seen = _sent(implementation, prop, case), mask.sum(-1)
    q, k, v = inputs.q, inputs.k, inputs.v
    if prop.backward:
        found = {name: np.zeros(x.shape) for name, x in zip(GRADIENTS, (q, k, v))}
    else:
        found = {"out": np.zeros((*seen.shape, case.value_dim)), "lse": np.zeros(seen.shape)}
    for keys in np.unique(seen):
        places = [tuple(place) for place in np.argwhere(seen == keys)]
        rows, at, columns = (keys, -1, keys) if keys else (2, 0, 1)
        sizes: dict[str, Any] = {"batch": len(places), "q_len": int(rows), "kv_len": int(columns)}
        like = as_one_attention(dataclasses.replace(case, **sizes), branch)
        if (
            not v.shape[2]
            or not is_declared(implementation, like, case)
            or not _is_one(like, branch)
        ):
            raise NotOffered("a row by itself")
        read = [
            np.repeat(np.arange(v.shape[2]), mask[place]) if keys else np.zeros(1, int)
            for place in places
        ]
        handed = Inputs(
            q=np.stack([np.repeat(q[b][:, t : t + 1], rows, axis=1) for b, _, t in places]),
            k=np.stack([k[b][:, js] for (b, _, _), js in zip(places, read)]),
            v=np.stack([v[b][:, js] for (b, _, _), js in zip(places, read)]),
            block_indices=like.block_indices(),
        )
        sent_like = [
            np.zeros((len(places), *x.shape[1:2], rows, *x.shape[3:]), x.dtype) for x in sent
        ]
        for n, place in enumerate(places):
            for like_d, d in zip(sent_like, sent):
                like_d[n, place[1], at] = d[place]
        given = branch.tensors(implementation, like, handed, *sent_like)
        for n, (place, js) in enumerate(zip(places, read)):
            b, h, t = place
            if prop.backward:
                found["dq"][b, :, t] += given["dq"][n, :, at]
                for name in ("dk", "dv"):
                    np.add.at(found[name][b].swapaxes(0, 1), js, given[name][n].swapaxes(0, 1))
                continue
            for name in found.keys() & given.keys():
                found[name][place] = given[name][n, h, at]
            found = {name: found[name] for name in found.keys() & given.keys()}
    return found
