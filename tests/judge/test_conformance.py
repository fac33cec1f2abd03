"""Whatever an implementation does, the record says so: nothing lost, nothing passed falsely."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest

import trials
from commands import python
from nsa_ref.semantics import PAPER
from nsa_ref.testing import (
    Attention,
    Case,
    Implementation,
    OracleImplementation,
    TorchImplementation,
    conformance_suite,
    handing_over,
    judging,
    last_words,
    running,
    silence,
)
from nsa_ref.testing.last_words import announced, finding_of_dead_worker, folder_of_run
from nsa_ref.testing.mutants.kernel import Kernel
from nsa_ref.testing.mutants.masks import WindowPlusOne
from nsa_ref.testing.options import Options
from nsa_ref.testing.profiles import LEVELS
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import message
from port_zoo import (
    BadRefusal,
    OneKeyFewer,
    Raises,
    Returns,
    SlidingMask,
    SupportsAnswers,
    Unprintable,
    exceptions,
    twins,
)

EXPOSED = PROPERTIES["W1_sliding_mask_as_exposed"]


@pytest.fixture
def no_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the plugin's workers: a KeyboardInterrupt cannot come from the keyboard."""
    monkeypatch.setattr(judging, "ignores_ctrl_c", lambda: True)


def judged(implementation: Implementation, folder: Path, **options: Any) -> Record:
    """EXPOSED, tried on it."""
    return trials.record(EXPOSED.name, implementation, folder / "findings", **options)


def found_in(implementation: Implementation, folder: Path, **options: Any) -> dict[str, Any]:
    """What EXPOSED finds wrong with it."""
    return trials.finding(EXPOSED.name, implementation, folder / "findings", **options)


@pytest.mark.parametrize("error", exceptions(), ids=lambda error: type(error).__name__)
def test_whatever_a_method_raises_is_a_finding(
    error: BaseException, tmp_path: Path, no_ctrl_c: None
) -> None:
    """Also what would skip a test or end the run; and the case is made small."""
    found = found_in(Raises(error), tmp_path)
    assert found["clause"] == "W1"
    words = "no words" if isinstance(error, Unprintable) else type(error).__name__
    assert words in found["text"]
    assert "port_zoo.py:" in found["text"], "the line of the adapter is shown"
    case = Case.from_json(found["case"])
    assert case.kv_len == 2 and case.q_len <= 2


def test_ctrl_c_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "ignores_ctrl_c", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        judged(Raises(KeyboardInterrupt()), tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "mask",
        np.ones((2, 3, 4, 5, 6)),
        [[1, 2], [3]],
        {"a": object()},
        np.array(["x"], dtype=object),
    ],
    ids=["None", "text", "shape", "ragged", "object", "object array"],
)
def test_whatever_a_method_returns_is_a_finding(value: Any, tmp_path: Path) -> None:
    found = found_in(Returns("odd", value), tmp_path)
    assert found["text"]


@pytest.mark.parametrize(
    "error", [KeyError("head_dim"), pytest.skip.Exception("not today"), Unprintable()], ids=repr
)
def test_a_refusal_that_raises_is_no_finding(error: BaseException, tmp_path: Path) -> None:
    """The adapter says nothing of the case: neither that it can be run nor why not."""
    with pytest.raises(TypeError) as caught:
        judged(BadRefusal(error=error), tmp_path)
    line = str(caught.value)
    assert line.startswith(f"BadRefusal.supports(case) raised {type(error).__name__}")
    assert re.search(r" at .*port_zoo\.py:\d+; it must return None ", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("answer", [True, False, 0, ["no"], "", " "], ids=repr)
def test_supports_must_say_why_not(answer: Any, tmp_path: Path) -> None:
    """A bool can be read either way: True would refuse every case, False run what cannot be run."""
    with pytest.raises(TypeError) as caught:
        judged(SupportsAnswers(answer=answer), tmp_path)
    line = f"SupportsAnswers.supports(case) returned {answer!r}; it must return None where the"
    assert str(caught.value).startswith(line)
    assert not list(tmp_path.iterdir()), "it is no finding"


class NoBackward(OracleImplementation):
    """Has gradients by its name, and none where it runs."""

    semantics = (PAPER,)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def sliding_vjp(self, case: Case, *tensors: Any) -> tuple[Any, ...]:
        raise self.error

    def layer_vjp(self, case: Case, *tensors: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "name", ["A3_sliding_gradients", "A5_sliding_canary_backward", "A4_layer_gradients"]
)
@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("FlexAttention does not support backward on CPU. Please set the in"),
        NotImplementedError(
            "Could not run 'aten::_flash_attention_backward' with arguments from the 'CPU' "
            "backend. This could be because the operator doesn't exist for this backend"
        ),
    ],
    ids=["flex", "dispatcher"],
)
def test_a_backend_without_a_backward_here_has_none_to_offer(
    name: str, error: Exception, tmp_path: Path
) -> None:
    """As torch says it; nothing is broken."""
    record = trials.record(name, NoBackward(error), tmp_path)
    assert record.finding is None and not record.cases
    assert set(record.not_offered) == {str(error)}


def test_another_failure_of_a_backward_is_a_finding(tmp_path: Path) -> None:
    error = RuntimeError("backward does not support strides")
    found = trials.finding("A3_sliding_gradients", NoBackward(error), tmp_path)
    assert str(error) in found["text"]


def test_flexattention_says_so(tmp_path: Path) -> None:
    """As it is in torch."""
    pytest.importorskip("torch", reason="FlexAttention is torch's")
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(TorchImplementation):
        numerics = MappingProxyType({"float32": "fp32"})

        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Attention:
            return Attention(flex_attention(q, k, v, enable_gqa=True), None)  # type: ignore[arg-type]

    record = trials.record("A3_sliding_gradients", Flex(), tmp_path)
    assert record.finding is None and not record.cases
    assert all("does not support backward on CPU" in why for why in record.not_offered)


def test_a_mistake_of_the_judge_is_nobodys_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that the definition meets as well is not the implementation's."""

    def check(*_: Any) -> Any:
        raise ZeroDivisionError("ours")

    broken = dataclasses.replace(EXPOSED, check=check)
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_property(broken, SlidingMask(), Options(findings=tmp_path / "findings"))
    assert not list(tmp_path.iterdir())


def test_a_finding_is_small_and_soon(tmp_path: Path) -> None:
    """Window + 1: two tokens show it, in seconds, whichever property sees it."""
    started = time.monotonic()
    for name in ("W1_sliding_mask_as_exposed", "A1_sliding_output", "A3_sliding_gradients"):
        found = trials.finding(name, WindowPlusOne(), tmp_path)
        assert found["clause"] == "W1"
        case = Case.from_json(found["case"])
        assert (case.batch, case.q_heads, case.kv_heads) == (1, 1, 1)
        assert case.q_len <= 2 and case.kv_len <= 2
    assert time.monotonic() - started < 20


def test_shrinking_ends_when_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is then reported is the smallest that was seen, and no flakiness is imagined."""
    monkeypatch.setattr(running, "SHRINKING_TIME", 0.0)
    found = found_in(WindowPlusOne(), tmp_path)
    assert "Not every time" not in found["text"]
    found_in(WindowPlusOne(), tmp_path, case=Case.from_json(found["case"]))


def test_a_finding_that_comes_and_goes_is_kept(tmp_path: Path) -> None:
    class Moody(SlidingMask):
        times = 0

        def sliding_mask(self, case: Case) -> Any:
            self.times += 1
            if self.times == 4:
                raise ValueError("once")
            return super().sliding_mask(case)

    found = found_in(Moody(), tmp_path)
    assert "once" in found["text"] and "Not every time" in found["text"]


def test_the_message_has_its_order(tmp_path: Path) -> None:
    """Clause, sentence, smallest case, picture, replay, and at last the convention."""
    found = found_in(OneKeyFewer(), tmp_path, spec="port_zoo:OneKeyFewer")
    text = message(found)
    places = [
        text.index(words)
        for words in (
            "W1 is broken by window [w] on cpu\n",
            "W1: Causal sliding window",
            "smallest case: Case(",
            "expected",
            "replay: nsa-ref replay ",
            "This may be a difference of convention: ",
        )
    ]
    assert places == sorted(places)
    assert "window_closed=False would explain it" in text
    assert max(len(line) for line in text.splitlines() if line[:4].strip().isdigit()) <= 80


def test_an_endless_message_is_cut_and_kept(tmp_path: Path) -> None:
    found = found_in(Raises(ValueError("long " * 10_000 + "\ud800 end")), tmp_path)
    text = message(found)
    assert len(text) < 10_000 and found["file"] in text and "end" in text
    text.encode()
    assert len(json.loads(Path(found["file"]).read_text())["text"]) > 50_000


# --- what is the judge's own, and what the implementation's ---------------------------------------


def _large() -> None:
    """Its frame takes 2 KB."""


_large.__code__ = _large.__code__.replace(co_stacksize=250)


class CallsInLoops(SlidingMask):
    """Calls in a loop at every depth, and counts the pages that were mapped for it."""

    def sliding_mask(self, case: Case) -> Any:
        self.most = max(self.mapped(depth) for depth in range(150))
        return super().sliding_mask(case)

    def mapped(self, depth: int) -> int:
        if depth:
            return self.mapped(depth - 1)
        _large()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(100):
            _large()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_no_loop_of_a_port_maps_memory_at_each_call() -> None:
    """As one does at the end of the interpreter's chunk of 16 KB for frames."""
    port = CallsInLoops()
    judging.judge(EXPOSED, port, Case())
    assert port.most < 100


class RaisesAtEveryZero(Kernel):
    """Sets all of NumPy's errors to exceptions, in every call and for good, and is right."""

    def run(self, *arguments: Any) -> Any:
        self.found = np.geterr()
        np.seterr(all="raise")
        with np.errstate(all="ignore"):
            return super().run(*arguments)


@pytest.mark.parametrize(
    "name",
    ["A1_sliding_output", "A3_fine_gradients", "A5_compress_canary", "W1_sliding_mask_as_read"],
)
def test_what_a_port_sets_of_numpy_is_its_own(name: str, tmp_path: Path) -> None:
    """It has it again in its next call, and when all is over; the judge's arithmetic never has."""
    port, before = RaisesAtEveryZero(), np.geterr()
    try:
        trials.passes(name, port, tmp_path)
        assert set(port.found.values()) == set(np.geterr().values()) == {"raise"}
    finally:
        np.seterr(**before)


def test_a_port_that_is_judged_raises_what_numpy_is_set_to(tmp_path: Path) -> None:
    """Outside of it: by the user, for instance."""

    class DividesByZero(SlidingMask):
        def sliding_mask(self, case: Case) -> Any:
            np.ones(1) / np.zeros(1)
            return super().sliding_mask(case)

    with np.errstate(divide="ignore"):
        judged(DividesByZero(), tmp_path)
    with np.errstate(divide="raise"):
        assert "FloatingPointError: divide by zero" in found_in(DividesByZero(), tmp_path)["text"]


def test_only_what_a_port_takes_counts_as_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still while the judge works, and goes on with what is left of the time."""
    left: list[float] = []
    clock = {"running": False}

    def say(doing: str, seconds: float = math.inf) -> bool:
        clock["running"] = doing == "waiting"
        if clock["running"]:
            left.append(seconds)
        return True

    monkeypatch.setattr(silence, "say", say)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")

    class Slow(SlidingMask):
        def supports(self, case: Case) -> None:
            assert clock["running"]

        def sliding_mask(self, case: Case) -> Any:
            assert clock["running"]
            time.sleep(0.05)
            return super().sliding_mask(case)

    def twice(prop: Any, implementation: Implementation, case: Case) -> Any:
        for _ in range(2):
            assert not clock["running"]
            time.sleep(0.2)
            outcome = EXPOSED.check(prop, implementation, case)
        return outcome

    options = Options(findings=tmp_path, case=Case(), timeout=2.0)
    record = run_property(dataclasses.replace(EXPOSED, check=twice), Slow(), options)
    assert record.finding is None and record.cases == 1
    assert left == sorted(left, reverse=True)
    assert left[0] == 2.0 and 1.7 < left[-1] <= 1.95  # 0.05 s of its own, 0.4 s of the judge's


@pytest.mark.parametrize(
    ("first", "seconds"), [([0.01], 120), ([5.0], 500), ([1, 2, 1], 200), ([60], 1200)]
)
def test_a_case_has_more_time_where_the_first_ones_took_long(
    first: list[float], seconds: float
) -> None:
    """A hundred times what they took: five seconds for one call are no hang, nor five hundred."""
    assert last_words.grown_timeout(120.0, first) == seconds


def test_the_first_cases_say_how_long_later_ones_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody can be told, by a clock of Python's."""
    given: list[float] = []
    monkeypatch.setattr(silence, "_file", None)
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: None)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda s, **_: given.append(s))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")
    last = silence.JUDGING  # the clock of a whole case, should nobody listen any more

    class Slow(SlidingMask):
        def sliding_mask(self, case: Case) -> Any:
            time.sleep(0.05)
            return super().sliding_mask(case)

    record = run_property(EXPOSED, Slow(), Options(findings=tmp_path, timeout=1.0))
    assert record.finding is None
    given = [seconds for seconds in given if seconds < last]
    assert given[0] == 1.0  # nothing is known yet
    assert 4.9 < max(given) <= 10.0


def test_a_case_whose_time_goes_in_short_calls_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be too short for whoever listens to notice."""
    armed: list[float] = []
    monkeypatch.setattr(silence, "say", lambda *_: True)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda s, **_: armed.append(s))
    clock = handing_over.Clock(0.1, sys.stderr)
    for _ in range(2):
        assert not armed
        with clock.running():
            time.sleep(0.06)
    with clock.running():
        assert armed == [0.001]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is the GNU C library's")
def test_memory_is_filled_while_an_implementation_runs_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an implementation does not write holds no result of an earlier run."""
    with handing_over.memory_filled(1), handing_over.handed_over():
        assert (np.empty(20_000, np.uint8) == 0xFE).all()
    told: list[int] = []
    library = SimpleNamespace(mallopt=lambda _, byte: told.append(byte))
    monkeypatch.setattr("ctypes.CDLL", lambda _: library)
    with handing_over.memory_filled(1):
        assert told == []
        with handing_over.handed_over():
            assert told == [1]
        assert told == [1, 0]
    with handing_over.handed_over():
        assert told == [1, 0]


def test_an_alarm_of_somebody_else_ends_the_property(tmp_path: Path) -> None:
    """That of pytest-timeout, which fails the test from a signal's handler: it rings once."""
    calls = []

    class Endless(SlidingMask):
        def sliding_mask(self, case: Case) -> Any:
            calls.append(case)
            until = time.monotonic() + 5
            try:
                while time.monotonic() < until:
                    time.sleep(0.01)
            except BaseException as error:
                raise RuntimeError("interrupted") from error
            return super().sliding_mask(case)

    def handler(*_: Any) -> None:
        pytest.fail("Timeout (>0.3s) from pytest-timeout.")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(pytest.fail.Exception, match="from pytest-timeout"):
            judged(Endless(), tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(calls) == 1
    assert not list(tmp_path.rglob("*.json"))


# --- the last words of a worker -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ("", "it ended its process (a crash, an abort or an exit)"),
        (
            "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call "
            f'first):\n  File "/port.py", line 3 in sliding\n  File "{last_words.__file__}", '
            "line 9 in run\n",
            'Segmentation fault\n  at "/port.py", line 3 in sliding',
        ),
        (
            "Timeout (0:00:02)!\nThread 0x2 (most recent call first):\n"
            f'  File "{last_words.__file__}", line 1 in wait\n  File "/threading.py", line 1 in '
            "wait\n\nThread 0x3 (most recent call first):\n"
            '  File "/threading.py", line 1 in wait\n\nThread 0x1 (most recent call first):\n'
            '  File "/torch.py", line 1 in wait\n  File "/torch.py", line 7 in sync\n'
            f'  File "/port.py", line 4 in fine\n  File "{last_words.__file__}", line 9 in run\n',
            'it hangs: no answer after 2 s\n  at "/port.py", line 4 in fine\n  at "/torch.py"',
        ),
    ],
    ids=["exit", "crash", "hang"],
)
def test_the_case_that_took_its_worker_down_is_what_is_reported(
    trace: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "run")
    case = Case(q_len=3, kv_len=5)
    with announced(EXPOSED, SlidingMask(), Options(findings=tmp_path, timeout=2.0), case):
        pass
    folder = folder_of_run(tmp_path, "run")
    (folder / "gw7.trace").write_text(trace)
    asked = ("gw7", "run", tmp_path)
    record = finding_of_dead_worker(f"test_{EXPOSED.name}_mask", *asked)
    assert record is not None and record.finding is not None
    assert Case.from_json(record.finding["case"]) == case
    text = message(record.finding)
    assert words in text and f"case: {case}" in text
    assert not (folder / "gw7.json").exists()
    # and a second death, outside of any case, blames nobody
    record = finding_of_dead_worker(f"test_{EXPOSED.name}_mask", *asked)
    assert record is not None and record.finding is None and record.cases == 0
    assert finding_of_dead_worker("test_something_else", *asked) is None


# --- the suite ------------------------------------------------------------------------------------


def test_the_suite_takes_instances() -> None:
    with pytest.raises(TypeError, match=r"Try conformance_suite\(MyPort\(\)\)"):
        conformance_suite(SlidingMask)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"semantics": PAPER}, TypeError, "list or tuple"),
        ({"semantics": ()}, ValueError, "at least one"),
        ({"numerics": {}}, TypeError, "float32"),
        ({"numerics": {"float32": "fp33"}}, ValueError, "'fp33'.*fp32"),
        ({"numerics": {"float8": "fp32"}}, ValueError, "bfloat16"),
        ({"limits": {"heads": (1,)}}, ValueError, "'heads'.*q_heads"),
        ({"limits": {"q_heads": 0}}, ValueError, "0; valid are integers of at least 1"),
        ({"limits": {"q_heads": -1}}, ValueError, "-1; valid are integers of at least 1"),
        ({"limits": {"q_heads": float("nan")}}, ValueError, "nan; valid are integers of at least"),
        ({"limits": {"kv_len": (float("inf"),)}}, ValueError, "inf; valid are integers of at leas"),
        ({"limits": {"q_heads": 8.0}}, ValueError, "8.0; valid are integers of at least 1"),
        ({"limits": {"inputs": "!= randn"}}, ValueError, "'inputs', which is what a property"),
        ({"limits": {3: "x"}}, ValueError, "has 3, which is no field of a case.*q_heads"),
        ({"limits": {"kv_len": np.ones((2, 2), int)}}, ValueError, r"\[1, 1\]; valid are integers"),
        ({"limits": {"inputs": ("randn",)}}, ValueError, "'inputs', which is what a property"),
        (
            {"limits": {"compress_map": ("mean", "per_head")}},
            ValueError,
            "'per_head'; valid are mean, linear, linear_per_head, mlp",
        ),
        ({"numerics": {"float32": ["fp32"]}}, ValueError, r"\['fp32'\]; a dtype is one of"),
        ({"limits": ()}, TypeError, "must be a dict"),
        ({"limits": None}, TypeError, "must be a dict"),
        ({"limits": {"kv_len": ()}}, ValueError, r"at least one. Try \(4, 8\)"),
        ({"limits": {"kv_len": None}}, ValueError, r"at least one. Try \(4, 8\)"),
        ({"limits": {"kv_len": {"least": 4}}}, ValueError, r"at least one. Try \(4, 8\)"),
        ({"limits": {"kv_len": ("64",)}}, ValueError, "'64'; valid are integers of at least 0"),
        ({"limits": {"head_dim": (0, 64)}}, ValueError, "0; valid are integers of at least 1"),
        ({"limits": {"layout": (["strided"],)}}, ValueError, "valid are contiguous"),
        ({"limits": {"compress_positions": (1,)}}, ValueError, "1; valid are False, True"),
        (
            {"limits": {"q_heads": (6,), "kv_heads": (4,)}},
            ValueError,
            r"no case: kv_heads=\(4,\), q_heads=\(6,\); but q_heads is kv_heads times group_size",
        ),
        (
            {"limits": {"q_heads": (8,), "kv_heads": (2,), "group_size": (2,)}},
            ValueError,
            r"group_size=\(2,\), kv_heads=\(2,\), q_heads=\(8,\)",
        ),
        (
            {"limits": {"selection_block_size": (8,), "compress_block_sliding_stride": (3, 5)}},
            ValueError,
            r"stride=\(3, 5\), selection_block_size=\(8,\); but selection_block_size is a multiple",
        ),
        ({"name": ""}, TypeError, "name"),
    ],
)
def test_what_an_implementation_declares_must_make_sense(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    port = SlidingMask()
    for name, value in changes.items():
        setattr(port, name, value)
    with pytest.raises(error, match=words):
        conformance_suite(port)


def test_two_of_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="name of another"):
        conformance_suite(*twins())


def test_every_property_is_a_test_for_every_implementation() -> None:
    one, two = SlidingMask(), OneKeyFewer()
    assert len(conformance_suite(one)) == len(PROPERTIES)
    assert len(conformance_suite(one, two)) == 2 * len(PROPERTIES)


# --- profiles -------------------------------------------------------------------------------------


def test_the_profile_in_force_is_ours(tmp_path: Path) -> None:
    """While a property runs: no deadline, no database, and as many examples as the level says."""
    seen = []

    class Looking(SlidingMask):
        def sliding_mask(self, case: Case) -> Any:
            seen.append(hypothesis.settings.default)
            return super().sliding_mask(case)

    record = judged(Looking(), tmp_path)
    assert record.cases > 0
    for settings in seen:
        assert settings.deadline is None and settings.database is None
        assert settings.derandomize
        assert settings.max_examples == -(-EXPOSED.examples // len(EXPOSED.strata(Looking())))


@pytest.mark.parametrize("level", LEVELS)
def test_a_profile_keeps_its_settings_where_ci_is_true(level: str) -> None:
    """Hypothesis has a profile for CI, which must not become a parent of ours."""
    program = (
        "from nsa_ref.testing.profiles import *; "
        f"s = level_settings({level!r}, 7); "
        "print(s.max_examples, s.deadline, s.database, s.derandomize, s.print_blob)"
    )
    environment = os.environ | {"CI": "true"}
    done = python("-c", program, env=environment)
    assert done.stdout == f"{7 * LEVELS[level]} None None True False\n", done.stderr
