"""The scripts in benchmarks/ run, and what they write can be read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import operator
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="nsa_fast is built on torch")

import nsa_fast.layer  # noqa: E402
import nsa_fast.selection  # noqa: E402
from benchmarks import cost, eager_cpu, fuzzing, gpu, judging, soak, source_mutants  # noqa: E402
from commands import python  # noqa: E402
from interpreted import runs  # noqa: E402
from nsa_fast import flex  # noqa: E402
from nsa_ref.testing import cli, loading  # noqa: E402
from nsa_ref.testing.cli import BROKEN, HOLDS  # noqa: E402
from pages import ROOT  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.usefixtures("place")


def report_of(script: str, *arguments: str, says: str = "") -> dict[str, Any]:
    """What a script writes, run as a process of its own, once it has said something."""
    done = python("-m", f"benchmarks.{script}", *arguments, "--output=report.json")
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    report: dict[str, Any] = json.loads(Path("report.json").read_text())
    return report


@runs
def test_the_constants_of_the_interpreter_are_those_of_numpy() -> None:
    """Every kernel of the script runs; in NumPy's float32 everything is rounded to nearest."""
    report = report_of("hardware_constants", "--device=interpreter", "--size=2048")
    assert "no hardware" in report["device"]
    assert {"torch", "triton", "python"} <= set(report["versions"])
    measured = report["measured"]
    assert measured["functions"]["exp2(0)"] == 1
    assert 0 < measured["functions"]["exp2, relative error in units of 2^-24"] < 4
    for row in ("fp32, tiles of 16", "fp32, tiles of 64", "bf16, tiles of 64"):
        one, sixteen, largest, mean = measured[f"accumulation, {row}"].values()
        assert one == 1
        assert sixteen == 8
        assert abs(mean) < largest < 530
    assert measured["delta is kept in"] == {"bf16": "float32"}


@runs
def test_what_the_kernels_graphs_allocate_grows_with_the_tokens() -> None:
    """Without a kernel being executed."""
    arguments = ("--device=interpreter", "--tokens", "1024", "2048")
    report = report_of("kernel_memory", *arguments, says="forward and backward")
    assert "no kernel executed" in report["device"]
    for figures in report["measured"].values():
        less, more = (found["MiB"] for found in figures["tokens"].values())
        assert 0 < less < more <= 2 * less + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.skipif(not TRITON, reason="the script needs triton")
@pytest.mark.parametrize("script", ["hardware_constants", "kernel_memory"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    done = python("-m", f"benchmarks.{script}")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "there is no GPU here. Try --device interpreter, which shows how the script works\n"
    )


@pytest.mark.skipif(TRITON, reason="triton is here")
def test_without_triton_it_says_so() -> None:
    done = python("-m", "benchmarks.hardware_constants")
    assert done.returncode == 1
    assert done.stderr == "triton is not installed here, and this script is about its kernels\n"


def test_the_cost_of_everything_is_measured() -> None:
    """Each thing in this process, for a few tokens."""
    for what, prepared in cost.WHAT.items():
        assert prepared(256)() is not None or what.endswith("logits alone")


def test_an_exponent_is_the_slope_from_8k_on() -> None:
    square = cost.exponent({2**12: 9.0, 2**13: 1.0, 2**14: 4.0, 2**15: 16.0})
    line = cost.exponent({128: 9.0, 256: 1.0, 512: 2.0})
    assert square is not None and line is not None
    assert (round(square, 9), round(line, 9)) == (2, 1)
    assert cost.exponent({2**13: 1.0}) is None
    assert cost.exponent({2**13: 0.0, 2**14: 1.0}) is None


def test_costs_are_measured_in_processes_of_their_own() -> None:
    what = "lists and transposes"
    report = report_of("cost", "--tokens", "256", "--what", what, says=what)
    assert report["device"] and {"torch", "python"} <= set(report["versions"])
    figures = report["measured"][what]
    (found,) = figures["tokens"].values()
    assert found["seconds"] > 0 and found["MiB"] >= 0
    assert figures["exponents"] == {"seconds": None, "MiB": None}


def test_the_eager_path_is_timed_beside_flexattention() -> None:
    eager_cpu.main(["--at=64", "--tokens", "32", "64", "--rounds=1", "--output=report.json"])
    measured = json.loads(Path("report.json").read_text())["measured"]
    assert all(found["ratio"] > 0 and found["MiB"]["64"] > 0 for found in measured.values())
    kept = json.loads((RESULTS / "eager-cpu.json").read_text())["measured"]
    assert list(kept) == list(measured)
    assert all(found["ratio"] >= 5 and found["exponent of MiB"] < 1.1 for found in kept.values())


def test_every_step_for_a_gpu_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    toy = dataclasses.replace(gpu.SIZES["cpu"], tokens=(32,))
    monkeypatch.setitem(gpu.SIZES, "cpu", toy)
    names = list(gpu.Bench("cpu").steps())
    gpu.run_steps("cpu", names)
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [each["name"] for each in said if "name" in each] == names
    box = gpu.Box("cpu", 1.0, Path("report.json"))
    for each in said:
        if "name" in each:
            assert "error" not in each["found"], each
            box.write(each["name"], each["found"])
    measured = box.report["measured"]
    assert measured["the layer in torch.compile"]["the same bits"]
    assert measured["a step in a CUDA graph"] == {"refused": "a CPU captures no graph"}
    forward, backward = (gpu.curves(box.report, f"{way}, ms") for way in ("forward", "backward"))
    bench = gpu.Bench("cpu")
    assert list(forward) == [*bench.timed(), *bench.replaced()]
    assert set(forward) - set(backward) == {"select", "select in torch"}  # without gradients
    assert all(
        measured[f"{what}, 32 tokens"].keys() & {"largest difference", "rows that choose alike"}
        for what in bench.replaced()
    )
    assert all(gpu.floor(box.report, way)[32] > 0 for way in gpu.WAYS)
    tables = list(gpu.tables(box.report))
    assert [table.row_count for table in tables] == [len(forward) + 1, len(backward) + 1]


def _scaled(*args: Any, **named: Any) -> Any:
    out, lse = ATTEND(*args, **named)
    return flex.Attention(out * 1.02, lse)


def _without_fine(logits: Any, outs: list[Any], layer: Any) -> Any:
    compressed, fine, sliding = outs
    return GATED(logits, [compressed, fine * 0, sliding], layer)


ATTEND, GATED = flex.attend, nsa_fast.layer._gated
#: What every check of the script for a GPU has to find, by how its name begins.
PLANTED: dict[str, tuple[Any, str, Any]] = {
    "selection": (nsa_fast.selection, "_overlap_scores", lambda scores, *_: scores * 0),
    "fine": (flex, "attend", _scaled),
    "compress": (flex, "attend", _scaled),
    "sliding": (flex, "attend", _scaled),
    "layer with rotary": (nsa_fast.layer, "_rotated", lambda x, *_: x),
    "layer": (nsa_fast.layer, "_gated", _without_fine),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("begins", PLANTED)
def test_every_check_of_the_script_for_a_gpu_can_fail(
    begins: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = gpu.Bench("cpu")
    of_it = {
        name: asked
        for name, asked in bench.asked(dtype).items()
        if begins == next(known for known in PLANTED if name.startswith(known))
    }
    monkeypatch.setattr(*PLANTED[begins])
    assert of_it
    for name, asked in of_it.items():
        assert "Broken" in bench.against_the_oracle(*asked).get("error", ""), name


def test_what_was_replaced_is_held_against_what_replaced_it() -> None:
    bench = gpu.Bench("cpu")
    ours, make = bench.replaced()["fine in FlexAttention"]
    assert bench.beside(ours, make, 64)["the same bits"]
    ours, make = bench.replaced()["select in torch"]
    assert bench.beside(ours, make, 64)["rows that choose alike"] == 1
    one = torch.tensor([[[[0, 2], [1, 3], [0, -1], [2, 1]]]])
    other = torch.tensor([[[[2, 0], [1, 2], [0, -1], [1, 2]]]])
    assert gpu.alike(one, other) == 3 / 4


def test_what_is_estimated_of_fine_goes_by_the_blocks_that_there_were() -> None:
    known = {
        name: {"optimistic": 1.0, "expected": 2.0} for name in gpu.ESTIMATED["fine"][gpu.WAYS[1]]
    }
    name = f"fine, {gpu.paper.TOKENS} tokens"
    report = {"estimates, ms": known, "measured": {name: {gpu.BLOCKS_OF_TILES: 48.0}}}
    # dq walks the blocks of tiles, and the five others do not
    assert gpu.estimated(report, "fine", gpu.WAYS[1]) == "7 to 14"
    assert gpu.estimated(report | {"measured": {}}, "fine", gpu.WAYS[1]) == "6 to 12"


def test_without_rich_and_matplotlib_there_is_the_file_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine with a GPU may have neither, and cannot install them."""
    report: dict[str, Any] = {"measured": {"layer, 32 tokens": {"forward, ms": 1.0}}, "device": "x"}
    assert gpu.show(report) and "forward, ms" in capsys.readouterr().out
    for name in ("rich.console", "rich.table", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not gpu.show(report) and not gpu.draw(report, Path("picture.png"))
    importlib.reload(gpu)  # the module itself needs neither


def test_the_script_for_a_gpu_knows_how_the_judge_exits() -> None:
    assert gpu.UNDECIDED == cli.UNDECIDED


#: Takes "a", and "c" once it is the first: "b" hangs, and "d" ends the process.
FAILS = """
import json, os, sys, time
for name in sys.argv[1:]:
    print(json.dumps({"begins": name}), flush=True)
    if name == "b":
        time.sleep(60)
    if name == "d":
        os.abort()
    print(json.dumps({"name": name, "found": {"ms": 1.0}}), flush=True)
"""


#: Writes its report when it is told to end.
SLOW = """
import signal, sys, time
def report(*_):
    open("report-verify.json", "w").write("{}")
    sys.exit(3)
signal.signal(signal.SIGTERM, report)
time.sleep(60)
"""


def test_a_step_that_hangs_or_ends_its_process_is_written_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "LONGEST_STEP", 0.5)
    box = gpu.Box("cpu", 1.0, Path("report.json"))
    box.process = [sys.executable, "-c", FAILS]
    box.go_through(["a", "b", "c", "d", "e"])
    report = json.loads(Path("report.json").read_text())
    failed = {name for name, found in report["measured"].items() if "error" in found}
    assert list(report["measured"]) == ["a", "b", "c", "d", "e"] and failed == {"b", "d"}
    assert "-6" in report["measured"]["d"]["error"]
    box.until = time.monotonic() + gpu.LEAST + 0.3
    del box.report["measured"]["b"]
    box.go_through(["b"])  # which hangs until the time is up
    box.until = time.monotonic()
    box.go_through(["f"])
    box.command("judge", "nowhere", kept="verify")
    assert box.report["not done"] == ["b", "f", "judge"]
    # what takes too long is ended, and may write what there is
    monkeypatch.setattr(gpu, "LEAST", -1.0)
    Path("slow.py").write_text(SLOW)
    box.until = time.monotonic() + 3
    box.command("slow", "slow", kept="verify")
    assert box.report["measured"]["slow"] == {
        "exit code": 3,
        "says": "",
        "report": "report-verify.json",
    }
    assert json.loads(Path("report.json").read_text())["not done"] == ["b", "f", "judge"]


#: Starts a process that nobody has told to end, and waits for it.
STARTS_ANOTHER = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
"""


def test_a_command_is_ended_with_what_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TO_REPORT", 0.5)
    Path("starts.py").write_text(STARTS_ANOTHER)
    box = gpu.Box("cpu", 1.0, Path("report.json"))
    started = time.monotonic()
    box.until = started + gpu.LEAST + 1
    box.command("starts", "starts", kept="verify")
    assert time.monotonic() - started < 30
    assert box.report["measured"]["starts"]["error"].endswith("was ended (-9)")


#: A box that is at a command when it is told to end.
AT_A_COMMAND = """
import signal, sys
from pathlib import Path
from benchmarks import gpu
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
box = gpu.Box("cpu", 1.0, Path("report.json"))
print("begins", flush=True)
box.command("slow", "slow", kept="verify")
"""


def test_a_run_that_is_ended_ends_its_command() -> None:
    Path("slow.py").write_text(SLOW)
    command = [sys.executable, "-c", AT_A_COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "begins\n"
        time.sleep(1)  # until its command has begun
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=30) == 143
    assert Path("report-verify.json").exists()


def test_a_second_run_goes_on_where_the_first_one_ended() -> None:
    path = Path("report.json")
    box = gpu.Box("cpu", 1.0, path)
    box.process = [sys.executable, "-c", FAILS]
    box.go_through(["a", "d"])
    box.write("judge", {"exit code": gpu.UNDECIDED})
    box = gpu.Box("cpu", 1.0, path)
    # "d", which failed, and a judge whose time was up are tried again
    assert list(box.report["measured"]) == ["a"]
    box.process = [sys.executable, "-c", "raise SystemExit('nothing is left to do')"]
    box.go_through(["a"])
    box.write("constants", {"exit code": 0})
    box.command("constants", "nowhere", kept="constants")
    assert box.report["measured"]["constants"] == {"exit code": 0}
    # what is another machine's, of other code, or no report is not gone on with
    kept = json.loads(path.read_text())
    for other in (
        json.dumps(kept | {"device": "another"}),
        json.dumps(kept | {"versions": {}}),
        json.dumps(kept | {"sizes": {}}),
        "[]",
        "{",
    ):
        path.write_text(other)
        assert gpu.Box("cpu", 1.0, path).report["measured"] == {}


def test_what_was_measured_stays_when_the_run_is_ended() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--output=report.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("ceilings: ")
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) == 128 + signal.SIGTERM
    report = json.loads(Path("report.json").read_text())
    assert report["measured"]["ceilings"]["copy, GB/s"] > 0 and report["versions"]


def test_a_copy_without_its_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    known = loading.versions().get("commit")  # none in such a copy itself
    monkeypatch.setenv("NSA_REF_COMMIT", "told")
    assert loading.versions()["commit"] == (known or "told")
    monkeypatch.setenv("PATH", "nowhere")  # without git
    assert loading.versions()["commit"] == "told"


def test_results_say_where_they_come_from() -> None:
    """A commit as it is: with a "+" behind it, something of it had been changed."""
    for path in RESULTS.glob("*.json"):
        report = json.loads(path.read_text())
        assert re.fullmatch("[0-9a-f]{40}", report["versions"]["commit"]), path
        assert report["device"], path


def test_the_costs_that_are_kept_are_those_of_this_script() -> None:
    kept = json.loads((RESULTS / "cost-cpu.json").read_text())
    assert list(kept["measured"]) == list(cost.WHAT)


def test_judging_is_held_against_a_suite_of_assert_close(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {name: properties[:1] for name, properties in judging.ASKED.items()}
    monkeypatch.setattr(judging, "ASKED", asked)
    judging.main(["--cases=2", "--output=report.json"])
    measured = json.loads(Path("report.json").read_text())["measured"]
    assert list(measured) == list(asked)
    assert all(found["cases"] == 2 and found["ratio"] > 0 for found in measured.values())


@pytest.mark.parametrize(("spec", "right"), [("oracle", True), ("port_zoo:OneKeyFewer", False)])
def test_a_soak_says_how_many_cases_it_has_judged_and_fails_if_it_found_something(
    spec: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "SPEC", spec)
    asked = ["--time=4s", "--folder=kept", "--output=report.json"]
    with contextlib.nullcontext() if right else pytest.raises(SystemExit, match=r"^1$"):
        soak.main(asked)
    measured = json.loads(Path("report.json").read_text())["measured"]
    assert measured["cases"] > 0 and measured["exit code"] == (HOLDS if right else BROKEN)


#: Where the record of fuzzing is changed, and to what -> a word of the complaint.
LOST = {
    "killed": (("killed twice", "runs", 0, "exit code"), 1),
    "workers were there": (
        ("killed twice", "runs", 1, "seconds until its workers had ended"),
        None,
    ),
    "became []": (("killed twice", "runs", 1, "known at the start"), []),
    "a finding was lost": (("killed twice", "runs", 2, "found"), -1),
    "not sorted": (("killed twice", "runs", -1, "unsorted"), 1),
    "exit code 1": (("shared through Redis", "exit codes"), [0, 1]),
    "what was shared": (("shared through Redis", "shared"), []),
    "did not try": (("shared through Redis", "cases of others that the second tried"), 1),
    "by itself": (("shared through Redis", "cases of its own until it had both"), 1),
    "at the same time": (
        ("shared through Redis", "the first was at work until the second ended"),
        False,
    ),
    "not exactly the two bugs": (("shared through Redis", "second", "causes"), []),
}


def test_the_record_of_fuzzing_shows_that_nothing_was_lost_and_two_bugs_were_shared() -> None:
    kept = json.loads((RESULTS / "fuzzing.json").read_text())["measured"]
    assert kept["killed twice"]["minutes"] == 30 and fuzzing.complaints(kept) == []
    for words, ((*path, last), value) in LOST.items():
        changed = copy.deepcopy(kept)
        functools.reduce(operator.getitem, path, changed)[last] = value
        assert any(words in said for said in fuzzing.complaints(changed)), words
    once = kept["killed twice"]["causes"]
    assert fuzzing.are_the_two(once) and not fuzzing.are_the_two(once + once[:1])


def test_what_a_run_says_it_knows_is_read_from_its_first_lines() -> None:
    log = Path("log")
    log.write_text(
        "nsa-ref goes on with port:Port on cpu after 1 rounds and 9 cases in 0:00:09\n"
        "known: I6, I6_fine_mask_as_exposed: reads column 0\n    nsa-ref replay 1.json\n"
        "known, 2 times: F3, F3_fine_mask_as_exposed: reads column 1\n    nsa-ref replay 2.json\n"
        "round 2 was cut off: what it left is taken up\n"
        "known: W1, W1_sliding_mask_as_exposed: reads column 0\n"
    )
    named = [["I6", "I6_fine_mask_as_exposed"], ["F3", "F3_fine_mask_as_exposed"]]
    assert fuzzing.known_at_start(log) == named


def test_a_source_mutant_that_lives_must_stand_in_the_list_with_its_reason() -> None:
    mutants = [
        source_mutants.Mutant(f"nsa_ref.masks.x_fine_mask__mutmut_{i}", outcome, f"{i}", "other")
        for i, outcome in enumerate(["killed"] * 98 + ["survived", "timeout"])
    ]

    def said(*listed: int) -> list[str]:
        reasons = {mutants[i].key: "a reason" for i in listed}
        found = {"masks": list(source_mutants.judged(mutants, reasons))}
        rows = source_mutants.report(source_mutants.counted(found))
        assert rows["masks"] == rows["all"]
        assert rows["all"]["killed of all"] == 98
        assert rows["all"]["equivalent"] == (98 in listed)
        return source_mutants.complaints(found, rows, reasons)

    name = "nsa_ref.masks.x_fine_mask__mutmut_"
    lives, ends_late = (
        f"{name}98 survived\n  - 98\n  + other",
        f"{name}99 timeout\n  - 99\n  + other",
    )
    assert said() == [lives, ends_late]
    assert said(98, 99) == []
    assert said(0, 98, 99) == [
        "nsa_ref.masks.x_fine_mask is listed as equivalent, and does not live\n  + other"
    ]
    mutants[2:6] = [m._replace(outcome="not checked") for m in mutants[2:6]]
    counts = source_mutants.counted({"masks": mutants, "sizes": mutants[2:6]})
    rows = source_mutants.report(counts)
    assert list(rows) == ["masks", "all"]
    assert source_mutants.complaints({"masks": mutants}, rows, {})[2:] == [
        "4 mutants of masks have not been asked",
        "94.0 % were killed; it must be at least 97 %",
    ]


def test_counts_of_a_module_are_kept_until_it_or_its_tests_change(place: Path) -> None:
    def git(*arguments: str) -> str:
        made = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        return subprocess.run(made, check=True, capture_output=True, text=True).stdout.strip()

    files = [Path("nsa_ref/masks.py"), Path("nsa_ref/sizes.py"), Path("tests/oracle/test_it.py")]
    git("init", "-q")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    commit, counts = git("rev-parse", "HEAD"), Counter(killed=3, equivalent=1)
    measured = {module: source_mutants.row(counts) for module in ("masks", "sizes")}
    written = {"commits": dict.fromkeys(measured, commit), "measured": measured}
    assert source_mutants.kept(written) == {m: (counts, commit) for m in measured}
    files[0].write_text("2\n")
    assert source_mutants.kept(written) == {"sizes": (counts, commit)}
    files[2].write_text("2\n")
    assert source_mutants.kept(written) == {}
    assert source_mutants.kept({}) == {}


def test_equivalent_source_mutants_are_listed_by_lines_that_stand_there() -> None:
    """And a line is a whole one, of the function that is named."""
    for function, was, now in source_mutants.equivalent():
        _, module, name = function.split(".")
        source = (ROOT / "nsa_ref" / f"{module}.py").read_text()
        of_class, _, plain = name.removeprefix("x_").rpartition("ǁ")
        indent = "    " if of_class else ""
        of_function = source.split(f"\n{indent}def {plain}(")[1].split(f"\n{indent}def ")[0]
        lines = [line.strip() for line in of_function.splitlines()]
        assert was != now and set(was.splitlines()) <= set(lines), (function, was)
