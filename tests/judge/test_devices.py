"""What only a GPU has or suffers, on one that is made up; and what of it a CPU can show itself."""

from __future__ import annotations

import functools
import json
import select
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="devices are torch's")

from commands import nsa_ref  # noqa: E402
from nsa_fast.adapter import NsaFastCompiled  # noqa: E402
from nsa_ref.numerics import NUMERICS  # noqa: E402
from nsa_ref.semantics import FLA, LUCIDRAINS, PAPER, Semantics  # noqa: E402
from nsa_ref.testing import Case, OracleImplementation, devices  # noqa: E402
from nsa_ref.testing.case import DTYPES  # noqa: E402
from nsa_ref.testing.last_words import timeout_of  # noqa: E402
from nsa_ref.testing.properties import PROPERTIES  # noqa: E402
from nsa_ref.testing.strategies import far_lengths, large_sizes  # noqa: E402
from nsa_ref.testing.wording import remark  # noqa: E402
from standin_gpu import (  # noqa: E402
    CountsCompilations,
    IllegalAccess,
    Mistaken,
    OnStandin,
    OutOfMemory,
    Standin,
    Unwritten,
)
from trials import finding, passes, record  # noqa: E402

# --- a context that is lost -----------------------------------------------------------------------


def test_a_lost_context_ends_that_case_and_a_fresh_worker_goes_on(place: Path) -> None:
    """Every property of the window loses it; those of the compressed blocks are judged after it.

    That is told once, and the other clause of the window is not judged.
    """
    done = nsa_ref(
        "verify", "standin_gpu:IllegalAccess", "--device=cpu", "-n", "1", "--json=report.json"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(Path("report.json").read_text())
    verdicts = {clause["id"]: clause["verdict"] for clause in report["clauses"]}
    judged = {clause: verdict for clause, verdict in verdicts.items() if verdict != "not_offered"}
    assert judged.pop("C2") == judged.pop("C3") == "pass"
    assert sorted(judged.items()) in (
        [("W1", "fail"), ("W3", "inconclusive")],
        [("W1", "inconclusive"), ("W3", "fail")],
    )
    assert report["complete"]
    assert report["implementation"] == "illegal access"
    assert len(report["findings"]) == 2
    for found in report["findings"]:
        assert "The device does not answer any more in this process: CUDA error" in found["text"]
        assert found["case"]["kv_len"] > 8

    replay = report["findings"][0]["replay"].split()
    again = nsa_ref(*replay[1:])
    assert again.returncode == 1, again.stdout + again.stderr
    assert "does not answer any more" in again.stdout


def test_without_a_worker_to_end_nothing_more_is_tried_on_that_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_ref.testing import running

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(Standin, "lost", "")
    monkeypatch.setattr(running, "_lost_devices", {})
    port = IllegalAccess()
    found = finding("W1_sliding_mask_as_exposed", port, tmp_path)
    assert "does not answer any more" in found["text"]
    # not made smaller: nothing runs there
    assert found["case"]["kv_len"] > 8
    after = record("C2_compress_mask_as_exposed", port, tmp_path)
    assert after.finding is None
    assert after.cases == 0
    (reason,) = after.not_tried
    assert remark(reason).startswith("standin:0 was lost to this process (CUDA error")
    passes("W1_sliding_mask_as_read", OracleImplementation(), tmp_path)


# --- memory ---------------------------------------------------------------------------------------


def test_out_of_memory_is_a_finding_and_its_room_is_given_back(tmp_path: Path) -> None:
    Standin.done.clear()
    found = finding("W1_sliding_mask_as_read", OutOfMemory(), tmp_path)
    assert found["case"]["kv_len"] == 9
    assert "OutOfMemoryError: CUDA out of memory" in found["text"]
    assert "free cache" in Standin.done


def test_a_failed_case_holds_no_tensors(tmp_path: Path) -> None:
    """The frames of its traceback would keep them, and the next case would not fit."""
    held: list[weakref.ref[Any]] = []

    class Hungry(OnStandin):
        def sliding(self, case: Any, *arguments: Any) -> Any:
            tensor = torch.zeros(16)
            held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    finding("W1_sliding_mask_as_read", Hungry(), tmp_path, shrink=False)
    assert held
    assert not any(reference() is not None for reference in held)


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is the GNU C library's")
def test_an_output_that_is_not_written_shows(place: Path) -> None:
    """In the worker processes of any run: one case is enough."""
    case = Case(dtype="float32", q_len=3, kv_len=3, head_dim=16, value_dim=16)
    kept = {"case": case.to_json(), "property": "W1_sliding_mask_as_read"}
    (place / "case.json").write_text(json.dumps(kept))
    done = nsa_ref("replay", "case.json", "standin_gpu:Unwritten", "--device=cpu")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "W1 is broken by unwritten" in done.stdout


def test_before_each_run_memory_is_poisoned_and_the_numerics_are_set() -> None:
    """tf32 where the row says so, and nowhere else; before a backward once more."""

    class Port(Unwritten):
        numerics = {"float32": "tf32", "bfloat16": "bf16"}  # noqa: RUF012

    port = Port("standin:1")
    port.tensor = functools.partial(Port.tensor, Port())  # type: ignore[method-assign]
    for dtype, tf32, size in (("float32", True, 4), ("bfloat16", False, 2)):
        case = Case(dtype=dtype, q_len=2, kv_len=3, head_dim=16, value_dim=8)
        inputs = case.qkv()
        sizes = (2 * 16 * size, 3 * 16 * size, 3 * 8 * size)
        Standin.done.clear()
        port.run("sliding", case, *inputs)
        assert Standin.done == [("tf32", tf32), ("poison", *sizes)]
        Standin.done.clear()
        d_out, d_lse = case.upstream_gradients()
        port.run_vjp("sliding", case, *inputs, d_out, 0 * d_lse)
        sizes = (*sizes, 2 * 8 * size)
        assert Standin.done == [
            *(("tf32", tf32), ("poison", *sizes, 2 * size)),
            *(("tf32", tf32), ("poison", *sizes)),  # there is no lse
        ]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """As much of torch as `devices.Cuda` asks, without a GPU."""
    torch = mock.Mock(uint8="uint8")
    torch.cuda.get_device_name = "GPU {}".format
    torch.cuda.mem_get_info.return_value = 2**37, 2**38
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_what_is_asked_of_torch(fake: mock.Mock) -> None:
    gpu, calls = devices.device_of("cuda:3"), fake.method_calls
    assert isinstance(gpu, devices.Cuda)
    assert gpu.describe() == "GPU cuda:3"
    assert gpu.free_memory() == 2**37
    assert calls[-2:] == [mock.call.cuda.empty_cache(), mock.call.cuda.mem_get_info("cuda:3")]
    assert gpu.fault() == ""
    fake.cuda.synchronize.side_effect = RuntimeError("CUDA error: device-side assert\nand more")
    assert gpu.fault() == "CUDA error: device-side assert"
    fake.cuda.synchronize.assert_called_with("cuda:3")
    gpu.set_tf32(True)
    gpu.set_tf32(False)
    precisions = [call.args for call in fake.set_float32_matmul_precision.call_args_list]
    assert precisions == [("high",), ("highest",)]
    gpu.free_cache()
    assert calls[-1] == mock.call.cuda.empty_cache()


def test_what_is_poisoned(fake: mock.Mock) -> None:
    """Twice what goes in, and small pieces, all held at once, after nothing old is left."""
    held, in_all = weakref.WeakSet[Any](), []

    class Piece:
        def __init__(self, size: tuple[int], value: int, *, dtype: str, device: str) -> None:
            assert (value, dtype, device) == (0xFF, "uint8", "cuda:3")
            fake.cuda.empty_cache.assert_called_once()
            (self.size,) = size
            held.add(self)
            in_all.append(sum(piece.size for piece in held))

    fake.full = Piece
    gpu = devices.Cuda("cuda:3")
    small = sum(size * count for size, count in gpu.POISONED)
    gpu.poison([5 * 2**30, 0, 2**20])
    assert max(in_all) == small + 2 * (5 * 2**30 + 2**20)
    assert not held
    in_all.clear()
    fake.cuda.empty_cache.reset_mock()
    gpu.poison([2**36])  # there is no room for twice as much
    assert max(in_all) == small


def test_a_port_without_torch_is_left_alone_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax, cupy: nothing of torch is loaded for them."""
    monkeypatch.delitem(sys.modules, "torch")
    gpu = devices.device_of("cuda")
    gpu.poison([1])
    gpu.set_tf32(True)
    gpu.free_cache()
    assert (gpu.describe(), gpu.free_memory(), gpu.fault()) == ("", 0, "")
    assert "torch" not in sys.modules


# --- large tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A1_sliding_large_tensors", "A3_sliding_large_tensors_backward"])
def test_an_offset_that_wraps_is_found_by_large_tensors_alone(name: str, tmp_path: Path) -> None:
    """Of q, and of what has its shape."""

    def wrapped(case: Case, tensor: np.ndarray) -> np.ndarray:
        return tensor.take(np.arange(tensor.size) % Standin.offset_limit).reshape(tensor.shape)

    port = Mistaken(wrapped, "q", "dq")
    found = finding(name, port, tmp_path, shrink=False)
    assert found["clause"] == name[:2]
    assert "must be" in found["text"] and "times entry 0" in found["text"]
    # of the usual sizes none is beyond what the stand-in can tell apart
    port.limits = {"head_dim": (8, 16), "value_dim": (8, 16), "group_size": (1, 2)}
    passes("A3_sliding_gradients", port, tmp_path)


@pytest.mark.parametrize("branch", ["sliding", "compress", "fine"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("preset", [PAPER, LUCIDRAINS, FLA], ids=["zero", "uniform", "nan"])
def test_the_definition_passes_large_tensors(
    branch: str, backward: bool, preset: Semantics, tmp_path: Path
) -> None:
    """Rows that see nothing may be NaN, or the mean of everything."""
    port = OnStandin()
    port.semantics = (preset,)
    name = f"A3_{branch}_large_tensors_backward" if backward else f"A1_{branch}_large_tensors"
    judged = record(name, port, tmp_path)
    assert judged.finding is None, judged.finding["text"]
    assert judged.cases + judged.inconclusive.total() == 1


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("wrong", ["zero", "another entry's"])
def test_what_large_tensors_alone_show(name: str, wrong: str, tmp_path: Path) -> None:
    """Every tensor counts, in the first batch entry as in the others."""

    def mistaken(case: Case, tensor: np.ndarray) -> np.ndarray:
        if case.batch * case.q_heads * case.q_len * case.head_dim <= Standin.offset_limit:
            return tensor
        if wrong == "zero":
            return np.zeros_like(tensor)
        # lse is the same in all entries: the heads move
        return np.roll(tensor, 1, axis=1 if name == "lse" else 0)

    asked = "A1_sliding_large_tensors"
    if name.startswith("d"):
        asked = "A3_sliding_large_tensors_backward"
    found = finding(asked, Mistaken(mistaken, name), tmp_path, shrink=False)
    assert f"sliding {name}" in found["text"]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"batch": (0, 2, 4)}, ""),
        ({"group_size": (4,), "q_heads": (4, 8)}, ""),
        ({"kv_heads": (3,)}, "limits without large tensors"),
        ({"batch": (1,)}, "limits without large tensors"),
        ({"kv_len": range(32)}, "limits without large tensors"),
    ],
    ids=str,
)
def test_large_tensors_keep_to_the_limits(
    limits: dict[str, Any], said: str, tmp_path: Path
) -> None:
    port = OnStandin()
    port.limits = limits
    judged = record("A1_sliding_large_tensors", port, tmp_path)
    assert judged.finding is None, judged.finding["text"]
    assert judged.cases == (not said)
    assert all(said in reason for reason in judged.not_tried)
    for case in port.asked:
        assert all(getattr(case, field) in allowed for field, allowed in limits.items())


def test_layouts_are_what_they_are_called() -> None:
    """A broadcast array in its own order in memory would not be contiguous."""
    array = np.broadcast_to(np.ones((1, 2, 3, 4), np.float32), (5, 2, 3, 4))
    for dtype in ("float32", "bfloat16"):
        tensor = Unwritten().tensor(Case(dtype=dtype), array.astype(DTYPES[dtype], order="K"))
        assert tensor.is_contiguous()


def test_large_tensors_are_tried_once_and_alone(tmp_path: Path) -> None:
    """At any level; the memory is given back before another worker comes in."""
    Standin.done.clear()
    name = "A1_sliding_large_tensors"
    assert record(name, OnStandin(), tmp_path, level="thorough").cases == 1
    assert Standin.done == ["exclusive", "free cache", "not exclusive"]
    # other data with another seed
    port = OnStandin()
    for seed in range(3):
        record(name, port, tmp_path, seed=seed)
    assert len({case.seed for case in port.asked}) == 3


def test_one_worker_at_a_time_is_alone_on_a_gpu(place: Path) -> None:
    """Another process waits until the first lets go, or is killed."""
    held = "import time; from nsa_ref.testing.devices import Cuda\n"
    held += "with Cuda('cuda:7').exclusive():\n    print('in', flush=True)\n    time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    second = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(3)
        assert not select.select([second.stdout], [], [], 0)[0]
        first.kill()
        assert second.stdout.readline() == "in\n"
    finally:
        first.kill()
        second.kill()


def test_large_tensors_wait_for_a_gpu_with_room(tmp_path: Path) -> None:
    (reason,) = record("A1_sliding_large_tensors", OracleImplementation(), tmp_path).not_tried
    assert reason == ("little memory", 31, 64)
    for port in (OracleImplementation(), NsaFastCompiled("cuda")):
        sizes = large_sizes(port)
        assert sizes["batch"] * sizes["q_heads"] * sizes["q_len"] * sizes["head_dim"] > 2**31
        assert sizes["q_len"] <= 1024  # the definition holds the mask of one entry


# --- long sequences -------------------------------------------------------------------------------


def test_long_sequences_are_as_long_as_the_device_is_for(tmp_path: Path) -> None:
    port = OnStandin()
    record("W1_sliding_mask_of_long_sequences", port, tmp_path, level="thorough")
    # whole, a chunk, and decoding
    assert {case.q_len for case in port.asked} == {1, 33, 38, 599, 600}
    assert {case.kv_len for case in port.asked} == {599, 600}
    assert devices.Cuda.longest == 64 * 1024


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        ({"kv_len": range(131)}, []),
        ({"kv_len": range(600)}, [596, 597, 598, 599]),
        ({"kv_len": (16, 560)}, [560]),
        ({"kv_len": (560,), "q_len": (1, 2)}, [560]),
        ({"q_len": range(21)}, [599, 600]),
    ],
    ids=str,
)
def test_long_sequences_keep_to_the_limits(
    limits: dict[str, Any], lengths: list[int], tmp_path: Path
) -> None:
    port = OnStandin()
    port.limits = limits
    found = far_lengths(port)
    assert sorted({sizes["kv_len"] for sizes in found}) == lengths
    for sizes in found:
        assert sizes["q_len"] <= sizes["kv_len"]
        assert all(sizes[field] in limits.get(field, (sizes[field],)) for field in sizes)
    judged = record("W1_sliding_mask_of_long_sequences", port, tmp_path)
    assert judged.finding is None
    assert bool(judged.cases) == bool(lengths)
    if not lengths:
        assert judged.not_tried == {("limits without long sequences",): 1}


def forgotten(case: Case, v: np.ndarray) -> np.ndarray:
    """By decoding: token 500 and those after it."""
    return v if case.q_len > 33 else np.where(np.arange(v.shape[2])[:, None] < 500, v, 0)


#: What is done beyond 300 tokens, and to what.
MISTAKES: dict[str, tuple[Callable[[Case, Any], Any], tuple[str, ...]]] = {
    "row": (lambda case, q: np.roll(q, 1, axis=2), ("q",)),
    "head": (lambda case, x: x[:, ::-1], ("k", "v")),
    "entry": (lambda case, x: x[::-1], ("k", "v")),
    "decoding": (forgotten, ("v",)),
    "lse": (lambda case, lse: lse + 3, ("lse",)),
    "dq": (lambda case, dq: 0 * dq, ("dq",)),
    "dk": (lambda case, dk: 0 * dk, ("dk",)),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_of_long_sequences_are_found(what: str, tmp_path: Path) -> None:
    """By a property that is about these; a gradient's by the one about gradients."""
    change, names = MISTAKES[what]
    port = Mistaken(lambda case, x: change(case, x) if case.kv_len > 300 else x, *names)
    wanted = "A3_sliding_gradients_of_long" if what in ("dq", "dk") else "of_long_sequences"
    assert any(
        record(prop.name, port, tmp_path, shrink=False).finding is not None
        for prop in PROPERTIES.values()
        if prop.extent == "far" and prop.part == "sliding" and wanted in prop.name
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_whoever_stores_p_is_not_failed_for_its_underflow(dtype: str, tmp_path: Path) -> None:
    """1 / n is subnormal in float16 beyond 16384 keys, and n of them are added."""
    n = 61566
    signs = np.where(np.arange(n) % 3 == 0, 1.0, -1.0)
    stored = np.full(n, 1 / n).astype(DTYPES[dtype]).astype(np.float64)
    out = float((stored * signs).sum().astype(DTYPES[dtype]))
    numerics = NUMERICS[{"float32": "fp32", "float16": "fp16-eager"}.get(dtype, "bf16-eager")]
    slack = (numerics.u_p + numerics.u_store + 2.0**-20) * abs(signs.sum()) + numerics.eta * n**2
    assert abs(out * n - signs.sum()) <= slack + 0.25


# --- compilations ---------------------------------------------------------------------------------


def test_what_is_compiled_is_counted(tmp_path: Path) -> None:
    counted = record("W1_sliding_mask_as_read", CountsCompilations(), tmp_path)
    assert counted.compiled == {"graphs": 2}


def test_counts_come_from_dynamo_and_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter, defaultdict

    counters: Any = defaultdict(Counter)
    counters["stats"]["unique_graphs"] = 5
    counters["inductor"].update(fxgraph_cache_hit=3, fxgraph_cache_miss=2, fxgraph_cache_bypass=1)
    utils = SimpleNamespace(counters=counters)
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", utils)  # type: ignore[misc]
    assert devices.compile_counts() == {"graphs": 5, "cached": 3, "compiled": 3}
    monkeypatch.delitem(sys.modules, "torch._dynamo.utils")
    assert devices.compile_counts() == {}


def test_warm_compiles_each_kind_once_and_then_judges(place: Path) -> None:
    done = nsa_ref(
        *("verify", "standin_gpu:CountsCompilations", "--device=cpu", "--warm", "-n", "1"),
        *("--branch=sliding", "--dtype=float32", "--json=report.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warmed up in" in done.stdout
    assert "counts compilations (graphs: 2)" in done.stdout
    assert "compiled by counts compilations: graphs: 2" in done.stdout
    report = json.loads(Path("report.json").read_text())
    assert report["warmed"] == report["compiled"] == {"counts compilations": {"graphs": 2}}


def test_a_case_in_the_interpreter_may_take_longer():
    """A gradient's read-out of some 130 keys takes a minute there, on a machine of its own."""
    prop = PROPERTIES["A3_sliding_mask_as_read_backward"]
    times = [timeout_of(prop, device, 120.0) for device in ("cpu", "cuda", "interpreter")]
    assert times == [120.0, 120.0, 600.0]
