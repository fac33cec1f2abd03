"""Decoding with a cache, clause G3: every row is the definition's, and so the parallel form's."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from nsa_ref.semantics import LUCIDRAINS_FLEX, PAPER, Semantics

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

from torch import Tensor  # noqa: E402

import nsa_fast  # noqa: E402
import nsa_fast.layer  # noqa: E402
from fast_caches import CAUSAL, RUN, Decoding  # noqa: E402
from fast_layers import SIZES, UNJUDGED, Layer, module, replace, some_blocks, tokens  # noqa: E402
from nsa_fast import Cache, NativeSparseAttention, native_sparse_attention  # noqa: E402

TestDecoding = Decoding.TestCase
TestDecoding.settings = RUN


@pytest.mark.parametrize("kind", [kind for kind in UNJUDGED if kind in CAUSAL])
def test_decoding_token_by_token_is_the_parallel_form(kind: str) -> None:
    """G3: at every step, from the first token on; the choice of blocks is decode's own."""
    layer, x = Layer(*CAUSAL[kind]), tokens(2, 27)
    cache = Cache(2)
    rows = [layer(x[:, t : t + 1], cache) for t in range(27)]
    layer.assert_right(x, rows=torch.cat(rows, dim=1), parallel=layer(x))


@pytest.mark.parametrize("kind", ["PAPER", "LUCIDRAINS_FLEX", "a choice for each query head"])
def test_blocks_that_are_handed_in_are_read_once_in_any_order(kind: str) -> None:
    """F3, I6: duplicates, -1 and strangers, where one token reads copies of its blocks alone."""
    semantics, compress_map, memory = CAUSAL[kind]
    layer, x = Layer(semantics, compress_map, memory), tokens(2, 27)
    blocks, cache = some_blocks(semantics, 2, 27), Cache(2)
    rows = [layer(x[:, t : t + 1], cache, block_indices=blocks[:, :, t : t + 1]) for t in range(27)]
    parallel = layer(x, block_indices=blocks)
    layer.assert_right(x, blocks, rows=torch.cat(rows, dim=1), parallel=parallel)


def test_one_token_reads_what_attention_reads_and_pools_at_most_one_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x, cache = Layer(*CAUSAL["LUCIDRAINS_FLEX"]), tokens(1, 64), Cache(1)
    layer(x[:, :40], cache)
    memory, calls = set(), {}
    for name in ("sliding_attention", "fine_attention", "compress_pool"):
        calls[name] = mock.Mock(wraps=getattr(nsa_fast.layer, name))
        monkeypatch.setattr(nsa_fast.layer, name, calls[name])
    for t in range(40, 64):
        layer(x[:, t : t + 1], cache)
        memory.add(cache._buffers["k"].data_ptr())
    for name, argument, most in (
        ("sliding_attention", 1, SIZES["sliding_window_size"] + 1),
        ("fine_attention", 1, 4 * SIZES["selection_block_size"]),
        ("compress_pool", 0, SIZES["compress_block_size"]),
    ):
        read = [call.args[argument].shape[2] for call in calls[name].call_args_list]
        # the stride is 2: k and v are pooled at every second token
        assert len(read) == 24 and max(read) <= most, name
    assert len(memory) == 1  # room for 80 tokens was made when the 41st came


def test_what_branches_share_is_kept_once() -> None:
    for kind, names in (
        ("PAPER", {f"{kv}_{branch}" for kv in "kv" for branch in ("compress", "fine", "sliding")}),
        ("one k and v", {"k", "v"}),
        ("one k and v, rotary on all", {"k", "k_rotated", "v"}),
        ("one k and v, pooled once turned", {"k_rotated", "v"}),
    ):
        cache = Cache(1)
        Layer(*CAUSAL[kind])(tokens(1, 3), cache)
        assert cache._buffers.keys() == names | {"k_cmp", "v_cmp"}


def test_a_call_with_a_cache_records_no_gradient() -> None:
    """Neither for the new tokens nor through the old ones, so that none is silently partial."""
    layer = module(num_mem_kv=1).double()
    x, cache = tokens(1, 9).requires_grad_(), layer.empty_cache(1)
    for part in x.split(5, dim=1):
        rows = layer(part, cache)
        assert not rows.requires_grad
    assert layer(x).requires_grad


def test_a_cache_that_was_filled_in_inference_mode_is_used_outside_of_it() -> None:
    layer, x, cache = module().double(), tokens(1, 40), Cache(1)
    with torch.inference_mode():
        first = [layer(x[:, :20], cache), layer(x[:, 20:21], cache)]
    second = layer(x[:, 21:], cache.copy())
    with torch.no_grad():
        third = layer(x[:, 21:], cache)
    rows = torch.cat([*first, second], dim=1)
    Layer.of(layer).assert_right(x, rows=rows, again=third, parallel=layer(x))


def test_a_cache_says_how_far_it_is() -> None:
    cache = Cache(2)
    module().double()(tokens(2, 7), cache)
    assert repr(cache) == "Cache(batch=2, length=7)"
    assert cache.copy().length == 7


# --- a cache belongs to one layer -----------------------------------------------------------------

BELONGS = (
    r"cache=Cache\(batch=2, length=\d\) belongs to another layer: .* made it or used it first\. "
    r".* its own: try empty_cache\(2\)"
)


def used_by(layer: NativeSparseAttention) -> Cache:
    """Made without a layer, and filled by this one."""
    cache = Cache(2)
    layer(tokens(2, 9)[:, :5], cache)
    return cache


def emptied(cache: Cache) -> Cache:
    cache.truncate(0)
    return cache


CACHES: dict[str, Callable[[NativeSparseAttention], Cache]] = {
    "made by it": lambda layer: layer.empty_cache(2),
    "used by it": used_by,
    "a copy": lambda layer: used_by(layer).copy(),
    "another copy": lambda layer: copy.copy(used_by(layer)),
    "emptied": lambda layer: emptied(used_by(layer)),
}
OTHERS: dict[str, Callable[[NativeSparseAttention], NativeSparseAttention]] = {
    "an equal layer": lambda _: module().double(),
    "a copy": copy.deepcopy,
    "unpickled": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("made", CACHES)
def test_a_cache_is_no_other_layers_and_is_what_it_was(made: str, other: str) -> None:
    """G3: even where sizes, switches and all weights are equal, and weights may change."""
    layer, x = module().double(), tokens(2, 9)
    another, cache = OTHERS[other](layer), CACHES[made](layer)
    seen = cache.length
    with pytest.raises(ValueError, match=BELONGS):
        another(x[:, seen:], cache)
    Layer.of(layer).assert_right(x, rows=layer(x[:, seen:], cache))


def test_a_cache_outlives_its_layer_and_is_nobodys() -> None:
    """It keeps no layer alive, and none takes its place."""
    layer = module().double()
    gone, cache = weakref.ref(layer), layer.empty_cache(2)
    del layer
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match=BELONGS):
        module().double()(tokens(2, 1), cache)


@pytest.mark.parametrize("stored", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_stored_cache_belongs_to_the_layer_that_uses_it_first(
    stored: Callable[[Any], Any],
) -> None:
    """Such as one that was stored with it."""
    layer, x = module().double(), tokens(2, 9)
    again, cache = stored((layer, used_by(layer)))
    Layer.of(layer).assert_right(x[:, :7], rows=again(x[:, 5:7], cache))
    with pytest.raises(ValueError, match=BELONGS):
        layer(x[:, 7:], cache)


def test_a_layer_that_made_a_cache_is_what_it_was() -> None:
    """Its attributes and its state dict, so that it is copied and stored as before."""
    layer = module().double()
    before = set(vars(layer)), set(layer.state_dict())
    layer(tokens(2, 9), layer.empty_cache(2))
    assert (set(vars(layer)), set(layer.state_dict())) == before


# --- what does not run says so, and changes nothing -----------------------------------------------


def calling(
    x: Tensor, semantics: Semantics = PAPER, cu_seqlens: Tensor | None = None, **sizes: Any
) -> Callable[[Cache], object]:
    """The functional form, which knows a cache by its sizes and switches alone."""
    layer = module(semantics, **sizes).to(x.dtype)
    how = layer.layer.arguments() | {"cu_seqlens": cu_seqlens}
    weights = dict(layer.named_parameters())
    return lambda cache: native_sparse_attention(x, weights, **how, cache=cache)


#: What is said -> what is called with a cache of five tokens.
VALUE_ERRORS: dict[str, Callable[[Cache], object]] = {
    "x has batch 3; it must be 2, that of the cache": calling(tokens(3, 1)),
    "x has shape (2, 1, 9); it must be (batch, seq_len, 10)": calling(tokens(2, 1)[..., :9]),
    "cu_seqlens and cache must not be given together": calling(
        tokens(1, 4)[0], cu_seqlens=torch.tensor([0, 4])
    ),
    "semantics.causal=False does not run with a cache: a later token would change": calling(
        tokens(2, 1), replace(PAPER, causal=False)
    ),
    "semantics.importance='logit_mean' runs with a cache only for compress_alignment='end'": (
        calling(tokens(2, 1), replace(LUCIDRAINS_FLEX, compress_alignment="start"))
    ),
    "cache holds keys of dtype torch.float64, and the new ones have dtype torch.float32": calling(
        tokens(2, 1).float()
    ),
    "cache was filled by a layer with kv_heads=2, and this one has kv_heads=1": calling(
        tokens(2, 1), kv_heads=1
    ),
    "cache was filled by a layer with semantics.rotary='none', and this one has": calling(
        tokens(2, 1), replace(PAPER, rotary="all")
    ),
    "cache was filled by a layer with semantics.input_norm=False, and this one has": calling(
        tokens(2, 1), replace(PAPER, input_norm=True)
    ),
    "length=6 must be at most 5, the tokens that the cache holds": lambda it: it.truncate(6),
    "length=-1 must be at least 0": lambda it: it.truncate(-1),
    "batch=-1 must be at least 0": lambda it: Cache(-1),
}


@pytest.mark.parametrize(("message", "wrong"), VALUE_ERRORS.items())
def test_what_does_not_run_says_what_does_and_the_cache_is_what_it_was(
    message: str, wrong: Callable[[Cache], object]
) -> None:
    layer, x, cache = module().double(), tokens(2, 9), Cache(2)
    layer(x[:, :5], cache)
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong(cache)
    Layer.of(layer).assert_right(x, rows=layer(x[:, 5:], cache))


def test_what_is_no_cache_is_named() -> None:
    with pytest.raises(TypeError, match=r"cache must be a nsa_fast\.Cache, not dict"):
        module().double()(tokens(2, 1), {"k": Cache(2)})


def test_a_first_call_that_fails_leaves_a_new_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, x = Cache(1), tokens(1, 9)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(nsa_fast.layer, "fine_attention", lambda *_, **__: 1 // 0)
        module()(x.float(), cache)
    layer = module(kv_heads=1).double()
    Layer.of(layer).assert_right(x, rows=layer(x, cache), parallel=layer(x))
