"""What only a GPU has or suffers, on one that is made up; and what of it a CPU can show itself."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="devices are torch's")

from nsa_ref.testing import OracleImplementation, devices  # noqa: E402
from nsa_ref.testing.conformance import Options, Record, run_property  # noqa: E402
from nsa_ref.testing.properties import PROPERTIES  # noqa: E402
from standin_gpu import (  # noqa: E402
    CountsCompilations,
    IllegalAccess,
    NarrowOffsets,
    OnStandin,
    OutOfMemory,
    Standin,
    Unwritten,
)

HERE = Path(__file__).parent


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to stand in, with this folder on the path and no trace of this pytest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HERE), str(HERE.parent))))
    for name in [n for n in os.environ if n.startswith("PYTEST_") or n == "MALLOC_PERTURB_"]:
        monkeypatch.delenv(name)
    return tmp_path


def nsa_ref(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "nsa_ref.testing.cli", *arguments]
    environment = os.environ | {"COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def judged(name: str, implementation: Any, tmp_path: Path) -> Record:
    return run_property(PROPERTIES[name], implementation, Options(findings=tmp_path))


# --- a context that is lost -----------------------------------------------------------------------


def test_a_lost_context_ends_that_case_and_a_fresh_worker_goes_on(place: Path) -> None:
    """Every property of the window loses it; those of the compressed blocks are judged after it."""
    done = nsa_ref("verify", "standin_gpu:IllegalAccess", "-n", "1", "--json", "report.json")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(Path("report.json").read_text())
    verdicts = {clause["id"]: clause["verdict"] for clause in report["clauses"]}
    judged = {clause: verdict for clause, verdict in verdicts.items() if verdict != "not_offered"}
    assert judged == {"W1": "fail", "W3": "fail", "C2": "pass", "C3": "pass"}
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
    from nsa_ref.testing import conformance

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(Standin, "lost", "")
    monkeypatch.setattr(conformance, "_lost_devices", {})
    port = IllegalAccess()
    record = judged("W1_sliding_mask_as_exposed", port, tmp_path)
    assert record.finding is not None
    assert "does not answer any more" in record.finding["text"]
    # not made smaller: nothing runs there
    assert record.finding["case"]["kv_len"] > 8
    after = judged("C2_compress_mask_as_exposed", port, tmp_path)
    assert after.finding is None
    assert after.cases == 0
    (reason,) = after.reasons
    assert reason.startswith("not tried, standin:0 was lost to this process (CUDA error")
    assert judged("W1_sliding_mask_as_read", OracleImplementation(), tmp_path).cases > 0


# --- memory ---------------------------------------------------------------------------------------


def test_out_of_memory_is_a_finding_and_its_room_is_given_back(tmp_path: Path) -> None:
    Standin.done.clear()
    found = judged("W1_sliding_mask_as_read", OutOfMemory(), tmp_path).finding
    assert found is not None
    assert found["case"]["kv_len"] == 9
    assert "OutOfMemoryError: CUDA out of memory" in found["text"]
    assert "give back" in Standin.done


def test_a_failed_case_holds_no_tensors(tmp_path: Path) -> None:
    """The frames of its traceback would keep them, and the next case would not fit."""
    import weakref

    held: list[weakref.ref[Any]] = []

    class Hungry(OnStandin):
        def sliding(self, case: Any, *arguments: Any) -> Any:
            tensor = torch.zeros(16)
            held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    options = Options(findings=tmp_path, shrink=False)
    record = run_property(PROPERTIES["W1_sliding_mask_as_read"], Hungry(), options)
    assert record.finding is not None
    assert held
    assert not any(reference() is not None for reference in held)


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is the GNU C library's")
def test_an_output_that_is_not_written_shows(place: Path, tmp_path: Path) -> None:
    done = nsa_ref("verify", "standin_gpu:Unwritten", "--branch=sliding", "-n", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "W1 is broken by unwritten" in done.stdout
    # and without poison there often is the right answer of a moment ago
    record = judged("A1_sliding_output", Unwritten(), tmp_path)
    assert record.cases >= 1


def test_before_each_run_memory_is_poisoned_and_the_numerics_are_set() -> None:
    """tf32 where the row says so, and nowhere else."""

    class Port(Unwritten):
        numerics = {"float32": "tf32", "bfloat16": "bf16"}  # noqa: RUF012

    from nsa_ref.testing import Case

    port = Port("standin:1")
    for dtype, tf32 in (("float32", True), ("bfloat16", False)):
        case = Case(dtype=dtype, q_len=2, kv_len=2)
        Standin.done.clear()
        port._before(case)
        assert Standin.done == [("tf32", tf32), "poison"]
    ran: list[str] = []
    on_cpu = Port()
    on_cpu._before = lambda case: ran.append("before")  # type: ignore[method-assign]
    q, k, v = case.qkv()
    on_cpu.run("sliding", case, q, k, v)
    d_out, d_lse = case.upstream_gradients()
    on_cpu.run_vjp("sliding", case, q, k, v, d_out, 0 * d_lse)
    assert ran == ["before", "before"]


class _Torch:
    """As much of torch.cuda as `devices.Cuda` asks, without a GPU."""

    class cuda:
        calls: list[str] = []  # noqa: RUF012
        broken = ""

        @classmethod
        def is_available(cls) -> bool:
            return True

        @classmethod
        def synchronize(cls, device: str) -> None:
            if cls.broken:
                raise RuntimeError(cls.broken)

        @classmethod
        def empty_cache(cls) -> None:
            cls.calls.append("empty_cache")

        @classmethod
        def mem_get_info(cls, device: str) -> tuple[int, int]:
            return 2**37, 2**38

        @classmethod
        def get_device_name(cls, device: str) -> str:
            return f"GPU {device}"

    uint8 = "uint8"
    full_calls: list[tuple[Any, ...]] = []  # noqa: RUF012
    precision: list[str] = []  # noqa: RUF012

    @classmethod
    def full(cls, size: Any, value: int, *, dtype: Any, device: str) -> object:
        cls.full_calls.append((size, value, device))
        return object()

    @classmethod
    def set_float32_matmul_precision(cls, precision: str) -> None:
        cls.precision.append(precision)


def test_what_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", _Torch)  # type: ignore[arg-type]
    gpu = devices.device_of("cuda:3")
    assert isinstance(gpu, devices.Cuda)
    assert gpu.describe() == "GPU cuda:3"
    assert gpu.free_memory() == 2**37
    assert gpu.fault() == ""
    monkeypatch.setattr(_Torch.cuda, "broken", "CUDA error: device-side assert\nand more")
    assert gpu.fault() == "CUDA error: device-side assert"
    gpu.poison()
    assert _Torch.full_calls and all(c[1:] == (255, "cuda:3") for c in _Torch.full_calls)
    gpu.set_tf32(True)
    gpu.set_tf32(False)
    assert _Torch.precision == ["high", "highest"]


def test_a_port_without_torch_is_left_alone_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax, cupy: nothing of torch is loaded for them."""
    monkeypatch.delitem(sys.modules, "torch")
    gpu = devices.device_of("cuda")
    gpu.poison()
    gpu.set_tf32(True)
    gpu.give_back()
    assert (gpu.describe(), gpu.free_memory(), gpu.fault()) == ("", 0, "")
    assert "torch" not in sys.modules


# --- large tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A1_sliding_large_tensors", "A3_sliding_large_tensors_backward"])
def test_an_offset_that_wraps_is_found_by_large_tensors_alone(name: str, tmp_path: Path) -> None:
    port = NarrowOffsets()
    found = judged(name, port, tmp_path).finding
    assert found is not None
    assert found["clause"] == name[:2]
    assert "must be" in found["text"] and "times entry 0" in found["text"]
    assert judged("A3_sliding_gradients", port, tmp_path).finding is None


@pytest.mark.parametrize("branch", ["sliding", "compress", "fine"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_definition_passes_large_tensors(branch: str, backward: bool, tmp_path: Path) -> None:
    name = f"A3_{branch}_large_tensors_backward" if backward else f"A1_{branch}_large_tensors"
    record = judged(name, OnStandin(), tmp_path)
    assert record.finding is None, record.finding["text"]
    assert record.cases == 1


def test_large_tensors_are_tried_once_and_alone(tmp_path: Path) -> None:
    """At any level; the memory is given back before another worker comes in."""
    Standin.done.clear()
    options = Options(findings=tmp_path, level="thorough")
    record = run_property(PROPERTIES["A1_sliding_large_tensors"], OnStandin(), options)
    assert record.cases == 1
    assert Standin.done == ["alone", "give back", "not alone"]


def test_one_worker_at_a_time_is_alone_on_a_gpu(place: Path) -> None:
    """Another process waits until the first lets go, or is killed."""
    held = "import time; from nsa_ref.testing.devices import Cuda\n"
    held += "with Cuda('cuda:7').alone():\n    print('in', flush=True)\n    time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "in\n"
    second = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
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
    record = judged("A1_sliding_large_tensors", OracleImplementation(), tmp_path)
    assert dict(record.reasons) == {
        "tensors beyond 2^31 elements (a GPU with 64 GiB free)": 1,
    }
    # the real case, by its sizes alone
    many = devices.Device.many
    assert 4096 * 16 * (many // (4096 * 16 * 64) + 1) * 64 > many


# --- long sequences -------------------------------------------------------------------------------


def test_long_sequences_are_as_long_as_the_device_is_for(tmp_path: Path) -> None:
    lengths = set()

    class Watched(OnStandin):
        def sliding(self, case: Any, *arguments: Any) -> Any:
            lengths.add(case.kv_len)
            return super().sliding(case, *arguments)

    assert judged("W1_sliding_mask_of_long_sequences", Watched(), tmp_path).cases == 6
    assert max(lengths) > 300
    assert lengths <= {76, 303, 599, 600}
    assert devices.Cuda.longest == 64 * 1024

    class Short(OnStandin):
        limits = {"kv_len": range(131)}  # noqa: RUF012

    record = judged("W1_sliding_mask_of_long_sequences", Short(), tmp_path)
    assert dict(record.reasons) == {"long sequences: kv_len is limited to 130": 1}


# --- compilations ---------------------------------------------------------------------------------


def test_what_is_compiled_is_counted(tmp_path: Path) -> None:
    record = judged("W1_sliding_mask_as_read", CountsCompilations(), tmp_path)
    assert record.compiled == {"graphs": 2}


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
        *("verify", "standin_gpu:CountsCompilations", "--warm", "-n", "1"),
        *("--branch=sliding", "--json=report.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warmed up in" in done.stdout
    assert "compiled by counts compilations: 2 graphs" in done.stdout
    report = json.loads(Path("report.json").read_text())
    assert report["warmed"] == {"graphs": 2}
    assert report["compiled"] == {"counts compilations": {"graphs": 2}}
