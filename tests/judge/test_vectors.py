"""Golden vectors: the same to the byte, on every edge, and answers judged as calls are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsa_ref.testing import cli, vectors
from nsa_ref.testing.answers import judge_answers
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, main
from nsa_ref.testing.lattice import EDGES
from nsa_ref.testing.loading import CannotRun
from nsa_ref.testing.vectors import MANIFEST, decoded, encoded, named_cases, write
from pages import ROOT
from vector_answers import Arrays, entries, right_answer, rounded_answer, write_answers

safetensors = pytest.importorskip("safetensors", reason="the extra 'vectors' is not installed")

#: Of layers, which take long, a few.
LAYERS = ("layer-PAPER-plain-float32", "layer-FLA-shown-bfloat16", "varlen-PAPER-plain-float32")


def wanted() -> list[vectors.Named]:
    """float32 of everything but layers, bfloat16 of two branches, three layers."""
    named = []
    for name, method, convention, case in named_cases():
        if method in ("layer", "varlen"):
            keep = name in LAYERS
        else:
            keep = case.dtype == "float32" or (case.dtype, method) == ("bfloat16", "sliding")
        if keep:
            named.append((name, method, convention, case))
    return named


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of vectors."""
    path = tmp_path_factory.mktemp("vectors") / "vectors"
    write(path, wanted())
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of those alone that a test makes a wrong answer to, and some others."""
    path = tmp_path_factory.mktemp("few") / "vectors"
    names = {f"{vector}-float32" for vector, *_ in WRONG}
    names |= {f"sliding-PAPER-{row}-bfloat16" for row in ("plain", "decode")}
    names |= {"sliding-FLA-shown-float32"}
    write(path, (named for named in wanted() if named[0] in names))
    return path


@pytest.fixture(scope="module")
def rounded(few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of right answers to those few."""
    answers = tmp_path_factory.mktemp("answers") / "answers"
    write_answers(few, answers, rounded_answer)
    return {path.name: path.read_bytes() for path in answers.iterdir()}


def lay_out(answers: Path, files: Mapping[str, bytes]) -> Path:
    answers.mkdir(exist_ok=True)
    for name, data in files.items():
        (answers / name).write_bytes(data)
    return answers


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_edge_that_a_file_can_show_is_met_in_every_dtype(dtype: str) -> None:
    met: dict[str, set[str]] = {}
    for _, method, convention, case in named_cases():
        if case.dtype == dtype and convention == "PAPER":
            about = vectors.METHODS[method]
            met.setdefault(about, set()).update(vectors.edges_of(method, case))
    for about, found in met.items():
        asked = {name for name, edge in EDGES.items() if edge.can_be_met(about)}
        assert asked - found - set(vectors.NO_FILE_HAS) == set(), f"cases about {about}"


def test_every_clause_but_two_is_asked_about(folder: Path) -> None:
    """A5 and G2 need another call: a key that is changed, a weight that is. A2 stands beside A1."""
    asked = {clause for entry in entries(folder) for clause in entry["asks"].values()}
    assert asked | {"A2"} == set(CLAUSES) - {"A5", "G2"}


def test_two_processes_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Every fifth vector, from the last on."""
    code = "import sys, test_vectors as t; t.write(t.Path(sys.argv[1]), t.wanted()[::-5])"
    places = (str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tests/judge"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONHASHSEED": "7"}
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, env=environment)
    written = [path for path in again.iterdir() if path.name != MANIFEST]
    assert len(written) == len(wanted()[::-5])
    for path in written:
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    every = {entry["file"]: entry for entry in entries(folder)}
    assert entries(again) == [every[entry["file"]] for entry in entries(again)]


def test_the_manifest_is_what_its_schema_says(folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="it checks what the schema says")
    schema = json.loads((ROOT / "docs/vectors.schema.json").read_text())
    manifest = json.loads((folder / MANIFEST).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    rows = schema["$defs"]["vector"]["properties"]["numerics"]["items"]["enum"]
    assert set(rows) == {row for of_dtype in vectors.ROWS.values() for row in of_dtype}
    assert schema["$defs"]["vector"]["properties"]["method"]["enum"] == list(vectors.METHODS)


def test_the_manifest_lists_the_files(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    listed = {entry["file"] for entry in manifest["vectors"]}
    assert listed == {path.name for path in folder.iterdir()} - {MANIFEST}
    met = {edge for entry in manifest["vectors"] for edge in entry["edges"]}
    assert met.isdisjoint(manifest["unmet_edges"])
    assert met | set(manifest["unmet_edges"]) == set(EDGES)
    for entry in manifest["vectors"]:
        data = (folder / entry["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        _, metadata = decoded(data)
        for field in ("method", "clause", "semantics"):
            assert metadata[field] == entry[field]
        for field in ("asks", "numerics", "edges", "case"):
            assert json.loads(metadata[field]) == entry[field]


def test_a_file_says_all_that_a_reader_needs(folder: Path) -> None:
    """Keys in order, inputs in the case's dtype, a bound of every row beside what is computed."""
    for entry in entries(folder):
        path = folder / entry["file"]
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert list(header) == sorted(header)
        assert list(header["__metadata__"]) == sorted(header["__metadata__"])
        with safetensors.safe_open(path, framework="np") as opened:
            assert set(opened.keys()) == set(header) - {"__metadata__"}
        arrays, case = decoded(data)[0], Case.from_json(entry["case"])
        for name, array in arrays.items():
            if name.startswith("in/") and array.dtype != np.int64:
                assert array.dtype == DTYPES[case.dtype], name
        for name in entry["asks"]:
            if name in ("mask", "block_indices"):
                continue
            for row in entry["numerics"]:
                bound = arrays[f"bound/{row}/{name}"]
                assert bound.shape == arrays[name].shape and not (bound < 0).any()
                assert not np.isnan(bound).any()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["vectors", str(tmp_path)]) == COULD_NOT_RUN
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", [["vectors", "new"], ["check", "vectors", "answers"]])
def test_without_safetensors_one_line_says_what_to_install(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert main(command) == COULD_NOT_RUN
    line = "nsa-ref: golden vectors need safetensors: pip install 'nsa-ref[vectors]'\n"
    assert capsys.readouterr().err == line


# --- right answers --------------------------------------------------------------------------------


def test_the_definition_passes_when_it_answers_by_file(folder: Path, tmp_path: Path) -> None:
    """From the inputs of the files alone, every tensor that is asked for."""
    answers = write_answers(folder, tmp_path / "answers", right_answer)
    judged = judge_answers(folder, answers)
    assert not judged.findings and not judged.errors
    assert not any(record.not_offered for record in judged.records)
    found = {record.clause for record in judged.records if record.cases}
    assert found >= {"W1", "W2", "W3", "C1", "C2", "C3", "C4", "F1", "F2", "F3", "F4", "A1", "A2"}
    assert found >= {"A3", "I1", "I2", "I3", "I4", "I5", "I6", "A4", "G1", "G3", "G4"}
    assert main(["check", str(folder), str(answers)]) == HOLDS


def test_what_is_answered_nowhere_is_not_offered(
    few: Path, rounded: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One branch in one dtype, and of that the forward."""

    def only(name: str, data: bytes) -> bytes:
        arrays = {n: a for n, a in decoded(data)[0].items() if n in ("mask", "out")}
        return encoded(arrays, {})

    files = {
        name: only(name, data)
        for name, data in rounded.items()
        if name.startswith("sliding-PAPER-") and name.endswith("-float32.safetensors")
    }
    answers = lay_out(tmp_path / "answers", files)
    assert main(["check", str(few), str(answers)]) == HOLDS
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("not offered by"))
    said = line.partition(": ")[2].split("; ")
    assert {"compress", "layer", "sliding in bfloat16", "sliding of FLA", "sliding dq"} <= set(said)
    verdicts = dict(line.split()[:2] for line in shown.splitlines() if line[:4].strip() in CLAUSES)
    assert verdicts["W1"] == verdicts["A1"] == "pass"
    assert verdicts["A3"] == verdicts["F2"] == "not"


def test_a_case_may_be_refused(few: Path, rounded: dict[str, bytes], tmp_path: Path) -> None:
    name = "sliding-PAPER-plain-float32.safetensors"
    refusal = encoded({}, {"refused": "no causal window"})
    answers = lay_out(tmp_path / "answers", rounded | {name: refusal})
    judged = judge_answers(few, answers)
    assert not judged.findings and not judged.errors
    records = [record for record in judged.records if "no causal window" in record.not_offered]
    assert {record.name for record in records} == {
        f"sliding {tensor}" for tensor in ("mask", "out", "lse", "dq", "dk", "dv")
    }


def test_the_row_that_is_declared_is_the_row_that_is_used(
    few: Path, rounded: dict[str, bytes], tmp_path: Path
) -> None:
    """A port that rounds every operation is wrong as a fused one, and right as what it is."""
    name = "sliding-PAPER-plain-bfloat16.safetensors"
    tensors = decoded((few / name).read_bytes())[0]
    fused, eager = (tensors[f"bound/{row}/dq"] for row in ("bf16", "bf16-eager"))
    answer = decoded(rounded[name])[0]
    rounder = (tensors["dq"] + (fused + eager) / 2).astype(answer["dq"].dtype)
    error = np.abs(rounder.astype(float) - tensors["dq"])
    between = (fused < error) & (error <= eager)
    assert between.any()
    answer["dq"] = np.where(between, rounder, answer["dq"])
    files = rounded | {name: encoded(answer, {})}
    (finding,) = judge_answers(few, lay_out(tmp_path / "answers", files)).findings
    assert (finding["clause"], finding["tensor"]) == ("A3", "sliding dq")
    files[name] = encoded(answer, {"numerics": "bf16-eager"})
    judged = judge_answers(few, lay_out(tmp_path / "answers", files))
    assert not judged.findings and not judged.errors
    assert judged.rows == {"float32": ["fp32"], "bfloat16": ["bf16", "bf16-eager"]}


# --- wrong answers --------------------------------------------------------------------------------


def shifted(array: np.ndarray, by: float = 1.0) -> np.ndarray:
    """The last element is off."""
    wrong = array.copy()
    wrong[(-1,) * array.ndim] += by
    return wrong


WRONG = [
    # vector, tensor, what it becomes, clause and kind of the finding, words of it
    ("sliding-PAPER-plain", "mask", lambda a: 1 - a, "W1", "wrong mask", "as answered: batch 0"),
    ("sliding-PAPER-own-key", "mask", lambda a: 0 * a, "W3", "wrong mask", "window_closed"),
    ("fine-PAPER-plain", "mask", shifted, "F2", "wrong mask", "counts column 9 2 times"),
    ("sliding-PAPER-plain", "out", shifted, "A1", "wrong element", "times the budget"),
    ("sliding-PAPER-plain", "lse", lambda a: a * np.nan, "A1", "wrong element", "is nan"),
    ("sliding-PAPER-one-key-less", "out", lambda a: a + 1, "A2", "wrong element", "sees no key"),
    ("compress-PAPER-plain", "dmem_k", lambda a: 2 * a, "A3", "wrong element", "compress dmem_k"),
    ("pool-PAPER-no-query", "out", lambda a: a[..., ::-1], "C1", "wrong element", "pool (mean)"),
    ("pool-PAPER-plain", "dweight", lambda a: -a, "C4", "wrong element", "dweight"),
    ("select-PAPER-many-blocks", "block_indices", lambda a: 257 - a, "I1", "wrong choice", ""),
    ("select-PAPER-plain", "block_indices", lambda a: 0 * a, "I4", "wrong choice", "named 2 times"),
    ("layer-PAPER-plain", "dto_q.weight", lambda a: a + 1, "A4", "wrong element", "dto_q.weight"),
    ("layer-PAPER-plain", "decoded", shifted, "G3", "wrong element", "decode["),
    ("layer-PAPER-plain", "out_with_blocks", shifted, "G1", "wrong element", "layer_with_blocks"),
    ("varlen-PAPER-plain", "out", shifted, "G4", "wrong element", "varlen["),
    # what is no answer
    ("sliding-PAPER-plain", "out", lambda a: a[:, :1], "A1", "result", "has shape (1, 1, 10, 8)"),
    ("sliding-PAPER-plain", "mask", lambda a: a * 1.0, "W1", "result", "integers or booleans"),
    ("sliding-PAPER-plain", "mask", lambda a: a - np.int8(1), "W1", "result", "holds -1"),
    ("select-PAPER-plain", "block_indices", lambda a: a * 1.0, "I4", "result", "must be integers"),
    ("select-PAPER-plain", "block_indices", lambda a: a[0], "I4", "result", "must be integers"),
    ("sliding-PAPER-plain", "dq", None, "A3", "result", "dq is missing"),
]


@pytest.mark.parametrize(
    ("vector", "tensor", "change", "clause", "kind", "words"),
    WRONG,
    ids=[f"{vector}-{tensor}-{i}" for i, (vector, tensor, *_) in enumerate(WRONG)],
)
def test_one_wrong_tensor_is_one_finding(
    vector: str,
    tensor: str,
    change: Any,
    clause: str,
    kind: str,
    words: str,
    few: Path,
    rounded: dict[str, bytes],
    tmp_path: Path,
) -> None:
    name = f"{vector}-float32.safetensors"
    answer = decoded(rounded[name])[0]
    if change is None:
        del answer[tensor]
    else:
        answer[tensor] = change(answer[tensor])
    answers = lay_out(tmp_path / "answers", rounded | {name: encoded(answer, {})})
    judged = judge_answers(few, answers)
    (finding,) = judged.findings
    assert (finding["clause"], finding["kind"]) == (clause, kind), finding["text"]
    convention = json.dumps(finding["convention"])
    assert words in finding["text"] + convention and f"vector: {name}" in finding["text"]
    assert Case.from_json(finding["case"]) == next(c for n, *_, c in wanted() if name[:-12] == n)


def test_a_wrong_mask_is_to_blame_for_wrong_values(
    few: Path, rounded: dict[str, bytes], tmp_path: Path
) -> None:
    name = "sliding-PAPER-plain-float32.safetensors"
    wrong: Arrays = {n: a + 1 for n, a in decoded(rounded[name])[0].items()}
    answers = lay_out(tmp_path / "answers", rounded | {name: encoded(wrong, {})})
    judged = judge_answers(few, answers)
    assert [finding["clause"] for finding in judged.findings] == ["W1"]
    values = [r for r in judged.records if ("of another clause", name, "W1") in r.inconclusive]
    assert {record.name for record in values} == {
        f"sliding {tensor}" for tensor in ("out", "lse", "dq", "dk", "dv")
    }


def test_one_mistake_in_many_vectors_is_one_finding(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It shows the smallest, and says how many there are."""

    def open_window(entry: Mapping[str, Any], tensors: Arrays) -> Arrays | None:
        if entry["method"] != "sliding":
            return None
        case = entry["case"]
        case = case | {"semantics": case["semantics"] | {"window_closed": False}}
        return {"mask": right_answer(dict(entry, case=case), tensors)["mask"]}

    answers = write_answers(folder, tmp_path / "answers", open_window)
    assert main(["check", str(folder), str(answers)]) == BROKEN
    shown = capsys.readouterr().out
    assert shown.count("W1 is broken by") == 1
    assert "larger ones, such as sliding-" in shown
    assert "window_closed=False would explain it" in shown
    assert f"replay: nsa-ref check {folder} {answers}" in shown


FLOAT8 = {"t": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
UNREADABLE = {
    "nothing": b"",
    "short": b"\x05\x00",
    "huge header": b"\xff" * 64,
    "no JSON": (8).to_bytes(8, "little") + b"whatever",
    "no object": (8).to_bytes(8, "little") + b"[1,2,3] ",
    "beyond its end": encoded({"out": np.zeros(4)}, {})[:-1],
    "another dtype": (lambda h: len(h).to_bytes(8, "little") + h + b"\x00")(
        json.dumps(FLOAT8).encode()
    ),
    "no tensor": encoded({}, {}),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_file_that_answers_nothing_is_a_finding(
    what: str, few: Path, rounded: dict[str, bytes], tmp_path: Path
) -> None:
    name = "sliding-PAPER-plain-float32.safetensors"
    answers = lay_out(tmp_path / "answers", rounded | {name: UNREADABLE[what]})
    (finding,) = judge_answers(few, answers).findings
    assert (finding["clause"], finding["kind"]) == ("W1", "result")
    assert name in finding["text"]
    assert main(["check", str(few), str(answers)]) == BROKEN


def test_a_folder_in_place_of_a_file_is_a_finding(
    few: Path, rounded: dict[str, bytes], tmp_path: Path
) -> None:
    name = "sliding-PAPER-plain-float32.safetensors"
    answers = lay_out(tmp_path / "answers", {n: d for n, d in rounded.items() if n != name})
    (answers / name).mkdir()
    (finding,) = judge_answers(few, answers).findings
    assert "Is a directory" in finding["text"]


@pytest.mark.parametrize(
    ("file", "arrays", "metadata", "words"),
    [
        ("sliding-PAPER-plain-float32", {"dQ": np.zeros(1)}, {}, "dQ"),
        ("sliding-PAPER-plain-float32", {"in/q": np.zeros(1)}, {}, "in/q"),
        ("slidin", {"out": np.zeros(1)}, {}, "answers no vector"),
        ("sliding-PAPER-plain-float32", {}, {"numerics": "bf16"}, "fp32, tf32"),
    ],
)
def test_what_nobody_asked_for_is_no_pass(
    file: str,
    arrays: Arrays,
    metadata: dict[str, str],
    words: str,
    few: Path,
    rounded: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"{file}.safetensors"
    right = decoded(rounded[name])[0] if name in rounded else {}
    files = rounded | {name: encoded(right | arrays, metadata)}
    answers = lay_out(tmp_path / "answers", files)
    assert main(["check", str(few), str(answers)]) == COULD_NOT_RUN
    line = capsys.readouterr().err
    assert line.startswith("nsa-ref: ") and line.count("\n") == 1
    assert name in line and words in line


def test_vectors_are_no_answers_to_themselves(
    few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(few), str(few)]) == COULD_NOT_RUN
    assert "bound/" in capsys.readouterr().err


def test_no_answer_at_all_is_no_pass(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["check", str(few), str(empty)]) == COULD_NOT_RUN
    assert "nothing of" in capsys.readouterr().err
    assert main(["check", str(few), str(tmp_path / "missing")]) == COULD_NOT_RUN
    assert "is no folder" in capsys.readouterr().err


def test_answers_without_an_element_are_no_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of 0 alone: all of it is right, and nothing was compared."""
    vectors = tmp_path / "vectors"
    write(vectors, (named for named in wanted() if "-no-batch-" in named[0]))
    answers = write_answers(vectors, tmp_path / "answers", rounded_answer)
    assert main(["check", str(vectors), str(answers)]) == COULD_NOT_RUN
    assert "has an element that could be wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    ["a byte", "a file less", "no manifest", "no JSON", "another schema", "another specification"],
)
def test_vectors_that_are_not_what_was_written_are_not_used(
    change: str, few: Path, tmp_path: Path
) -> None:
    copy = lay_out(tmp_path / "copy", {path.name: path.read_bytes() for path in few.iterdir()})
    file, manifest = copy / "fine-PAPER-plain-float32.safetensors", copy / MANIFEST
    match change:
        case "a byte":
            changed = bytearray(file.read_bytes())
            changed[-1] ^= 1
            file.write_bytes(changed)
        case "a file less":
            file.unlink()
        case "no manifest":
            manifest.unlink()
        case "no JSON":
            manifest.write_text("{")
        case "another schema":
            manifest.write_text(manifest.read_text().replace(vectors.SCHEMA, "nsa-ref-vectors-0"))
        case "another specification":
            manifest.write_text(
                json.dumps(json.loads(manifest.read_text()) | {"spec_version": "0"})
            )
    with pytest.raises(CannotRun, match="holds no vectors"):
        judge_answers(copy, tmp_path)
