"""Deliberately broken builds of nsa_fast: each found, with the clause, a picture and a replay.

`READINGS` says what finds which on a CPU. There no kernel walks the q lists; Triton's do, on CUDA
and in the interpreter (test_interpreter.py).
Caches are broken too: each is found by the run of its state machine, and by the judge where
decoding token by token shows it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

import nsa_fast.adapter  # noqa: E402
from broken_nsa_fast import BROKEN_CACHES, BUILDS, MISTAKES, in_place, with_mistakes  # noqa: E402
from commands import nsa_ref  # noqa: E402
from fast_caches import RUN, Decoding  # noqa: E402
from nsa_ref.testing.case import Case, load_case  # noqa: E402
from nsa_ref.testing.implementation import Implementation  # noqa: E402
from nsa_ref.testing.properties import PROPERTIES  # noqa: E402
from nsa_ref.testing.verdicts import FAILURES  # noqa: E402
from nsa_ref.testing.wording import message  # noqa: E402
from trials import finding, passes  # noqa: E402

ALL, BOTH = ("sliding", "compress", "fine"), ("eager", "compiled")
#: build -> branches that it breaks, the part that is exposed wrong, whose forward reads wrong
READINGS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "WindowPlusOne": (("sliding",), "mask_mod", BOTH),
    "PredicateWrong": (ALL, "mask_mod", BOTH),
    "ListsTooShort": (ALL, "kv lists", BOTH),
    "PartialTakenForFull": (ALL, "kv lists", BOTH),
    "KvBlockLost": (("fine",), "kv lists", BOTH),
    "BlockNamedTwice": (("fine",), "kv lists", BOTH),
    "StridesConfused": (("fine",), "kv lists", BOTH),
    "QueryBlockLost": (ALL, "q lists", ()),
    "QueryBlockNamedTwice": (("fine",), "q lists", ()),
    "QueryPartialTakenForFull": (("fine",), "q lists", ()),
    "QueryStridesConfused": (("fine",), "q lists", ()),
    "CrowdedRowLost": (("fine",), "q lists", ()),
}
BROKEN = [(build, branch) for build, (branches, _, _) in READINGS.items() for branch in branches]
CLAUSES = {"sliding": "W1", "compress": "C2", "fine": "F1"}

#: A row of the picture: its number, what is expected, and what was seen, which differs.
PICTURE_ROW = re.compile(r"^ *\d+ ([#.\d*]+) +([#.+\-\d*?]+)$", re.MULTILINE)


def implementation(build: str, kind: str, device: str = "cpu") -> Implementation:
    """One of the two that a build makes."""
    return next(i for i in BUILDS[build](device) if f"nsa_fast {kind}," in i.name)


def pictured(
    name: str, broken: Implementation, clause: str, folder: Path, **options: Any
) -> dict[str, Any]:
    """A finding: the clause, both masks side by side, and a replay that fails the same way."""
    found = finding(name, broken, folder, **options)
    assert found["clause"] == clause
    rows = PICTURE_ROW.findall(found["text"])
    assert any(expected != actual for expected, actual in rows), found["text"]
    said = message(found)
    assert said.startswith(f"{clause} is broken by {broken.name}")
    assert found["replay"] in said

    saved = Path(found["file"]).read_text()
    again = finding(name, broken, folder / "replays", case=load_case(saved))
    assert again["clause"] == clause
    assert again["text"].splitlines()[0] == json.loads(saved)["text"].splitlines()[0]
    return found


def test_every_build_is_judged() -> None:
    assert set(READINGS) == set(BUILDS)


@pytest.mark.parametrize(("build", "branch"), BROKEN)
def test_exposed_mask_of_a_broken_build_is_found(build: str, branch: str, tmp_path: Path) -> None:
    """In the part that is wrong, and in no other before it."""
    clause, (_, part, _) = CLAUSES[branch], READINGS[build]
    if (branch, part) == ("fine", "mask_mod"):
        part = "kv lists"  # which are what asks it: alone it is not shown
    broken = implementation(build, "eager")
    found = pictured(f"{clause}_{branch}_mask_as_exposed", broken, clause, tmp_path)
    assert f"{branch}_mask as exposed, {branch}_attention {part}: " in found["text"]


#: No forward walks the lists of the backward: one build shows it.
NOT_READ = tuple(("QueryBlockLost", "sliding", kind) for kind in BOTH)


@pytest.mark.parametrize(
    ("build", "branch", "kind"),
    [
        (build, branch, kind)
        for build, branch in BROKEN
        for kind in ("eager", "compiled")
        if kind in READINGS[build][2] or (build, branch, kind) in NOT_READ
    ],
)
def test_forward_of_a_broken_build_is_read_out(
    build: str, branch: str, kind: str, tmp_path: Path
) -> None:
    """What the kernel really reads: the lists, and the predicate in partial blocks.

    The case is the first that is broken; that cases become smaller, the masks above show.
    """
    clause = CLAUSES[branch]
    name = f"{clause}_{branch}_mask_as_read"
    broken = implementation(build, kind)
    if kind not in READINGS[build][2]:
        record = passes(name, broken, tmp_path)
        # some cases have no element that could be wrong
        assert record.cases + record.inconclusive.total() >= PROPERTIES[name].examples
        return
    found = pictured(name, broken, clause, tmp_path, shrink=False)
    assert f"{branch}, forward read out by one-hot values: " in found["text"]


def test_wrong_gradients_are_blamed_on_the_wrong_mask(tmp_path: Path) -> None:
    """Those of WindowPlusOne are far off; W1 is what it breaks, and is shown."""
    pictured("A3_sliding_gradients", implementation("WindowPlusOne", "eager"), "W1", tmp_path)


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device; test_interpreter.py asks the same without one",
)
@pytest.mark.parametrize("branch", CLAUSES)
def test_backward_that_lost_a_query_block_is_read_out(branch: str, tmp_path: Path) -> None:
    """A3: dk or dv misses a pair, though the forward is right."""
    broken = implementation("QueryBlockLost", "compiled", "cuda")
    forward = f"{CLAUSES[branch]}_{branch}_mask_as_read"
    passes(forward, broken, tmp_path)
    found = pictured(f"A3_{branch}_mask_as_read_backward", broken, "A3", tmp_path)
    assert re.match(rf"{branch}, backward read out: d[kv] misses the pair", found["text"])


#: One of the two, its mask alone, on short sequences that no window covers: one property of one
#: clause is asked, because the command is what is tried here.
MASK_OF_A_BUILD = """\
from broken_nsa_fast import WindowPlusOne
from nsa_ref.semantics import PAPER


def mask(device):
    eager = next(i for i in WindowPlusOne(device) if "eager" in i.name)
    eager.offers = lambda method: method == "sliding_mask"
    eager.offers_vjp = lambda method: False
    eager.semantics = (PAPER,)
    eager.limits = {"kv_len": range(4, 17), "sliding_window_size": range(3)}
    return eager
"""


def test_the_command_finds_and_replays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nsa-ref verify` of a broken build, then `nsa-ref replay`: exit code 1 twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("one_build.py").write_text(MASK_OF_A_BUILD)

    def finds(*arguments: str) -> str:
        done = nsa_ref(*arguments, columns=200)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout

    spec = "one_build:mask"
    printed = finds(
        *("verify", spec, "--device", "cpu", "--branch", "sliding", "--dtype", "float64"),
        *("-n", "1", "--findings", str(place)),
    )
    assert "W1 is broken by nsa_fast eager, WindowPlusOne on cpu" in printed
    (path,) = place.glob("W1-W1_sliding_mask_as_exposed-*.json")
    found = json.loads(path.read_text())
    assert PICTURE_ROW.search(found["text"])
    assert found["spec"] == spec

    printed = finds("replay", str(path))
    assert PICTURE_ROW.search(printed)
    (path,) = place.glob("replays/W1-W1_sliding_mask_as_exposed-*.json")
    again = json.loads(path.read_text())
    for key in ("clause", "property", "case", "text"):
        assert again[key] == found[key]


class KeepsItsMemory(nsa_fast.NativeSparseAttention):
    """Reads the memory that it was made with: right after `load_state_dict`, which writes there."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.kept = [self.mem_k]

    def forward(self, x: Any, cache: Any = None, *, cu_seqlens: Any = None) -> Any:
        weights = dict(self.named_parameters())
        weights["mem_k"] = self.kept[0].to(x.dtype)
        run = nsa_fast.native_sparse_attention
        return run(x, weights, **self.layer.arguments(), cache=cache, cu_seqlens=cu_seqlens)


def test_a_module_that_ignores_a_weight_it_is_given_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """G1: the judge hands its weights to the module itself, and to nothing that it kept."""
    monkeypatch.setattr(nsa_fast, "NativeSparseAttention", KeepsItsMemory)
    found = finding("G1_layer_output", nsa_fast.adapter.NsaFastLayer(), tmp_path, shrink=False)
    assert found["clause"] == "G1"
    assert found["kind"] not in FAILURES, found["text"]


# --- caches ---------------------------------------------------------------------------------------

#: Those that decoding token by token shows. The judge knows neither `truncate` nor `copy`.
JUDGED_CACHES = (
    "positions begin again",
    "growth loses a row",
    "buffers only double",
    "single tokens exchange sequences",
)


@pytest.mark.parametrize("what", BROKEN_CACHES)
def test_broken_cache_is_found_by_the_run_that_the_right_one_passes(what: str) -> None:
    """G3, through everything that may happen to a cache: by a row, or by a check before it."""
    run = settings(RUN, derandomize=True, database=None, phases=[Phase.generate])
    shown = r"tensor='rows \d+ to \d+'|^k_cmp has shape"
    wrong = pytest.raises((AssertionError, ValueError), match=shown)
    with in_place(BROKEN_CACHES[what]), wrong:
        run_state_machine_as_test(Decoding, settings=run)


@pytest.mark.parametrize("what", JUDGED_CACHES)
def test_broken_cache_is_found_by_the_judge(what: str, tmp_path: Path) -> None:
    """G3, with a replay."""
    layer = with_mistakes(what, nsa_fast.adapter.NsaFastLayer)
    found = finding("G3_decode", layer, tmp_path, shrink=False)
    assert found["clause"] == "G3"
    assert re.match(r"decode\[\d+, \d+, \d+\] is ", found["text"])


def test_a_broken_build_leaves_nothing_behind() -> None:
    """What is patched is patched back, also when the call raises."""
    places = [place[:2] for mistakes in MISTAKES.values() for place in mistakes]
    before = [getattr(module, name) for module, name in places]
    case = Case(dtype="float32", q_len=3, kv_len=3)
    for build in BUILDS:
        broken = implementation(build, "eager")
        broken.run("sliding_mask", case)
        with pytest.raises(TypeError):
            broken.run("sliding", case)
    assert [getattr(module, name) for module, name in places] == before
    right = nsa_fast.adapter.NsaFastEager()
    assert type(right.run("sliding_mask", case)["sliding_attention"]).__name__ == "BlockMask"
