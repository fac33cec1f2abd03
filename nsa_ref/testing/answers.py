"""Answers to golden vectors: what another program wrote, judged as `verify` judges what it calls.

An answer is a file of safetensors with the name of its vector, and tensors with the names that the
vector asks for. Its metadata may say "numerics", the row that its bounds are those of, and
"refused", why this one case cannot be run. Bounds are deterministic: nothing can be asked again
with fresh seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nsa_ref.attention import Attention
from nsa_ref.selection import Scored
from nsa_ref.testing.branches import BRANCHES, check_dtype, checked_result
from nsa_ref.testing.case import DTYPES, Case
from nsa_ref.testing.clauses import SPEC_VERSION
from nsa_ref.testing.compare import compare
from nsa_ref.testing.files import read_bytes, read_text
from nsa_ref.testing.findings import Finding, broken_data
from nsa_ref.testing.loading import CannotRun
from nsa_ref.testing.properties.common import Outcome, settle
from nsa_ref.testing.properties.masks import wrong_mask
from nsa_ref.testing.properties.selection import FORCED_ORDER, ORDER, invalid_rows
from nsa_ref.testing.properties.values import check_empty_rows
from nsa_ref.testing.vectors import MANIFEST, SCHEMA, SUFFIX, called, decoded
from nsa_ref.testing.verdicts import Broken, Failure, Inconclusive, Raised, Record, Remark

#: Branches by name.
BRANCH = {branch.name: branch for branch in BRANCHES}


@dataclass(frozen=True)
class Question:
    """A vector as it was read: what the manifest says of it, and its tensors."""

    entry: Mapping[str, Any]
    case: Case
    tensors: Mapping[str, np.ndarray]

    def offer(self, name: str) -> tuple[str, ...]:
        """Who answers one of these answers all: a method's tensor, in a dtype and a convention.

        Gradients are two, because not every backward takes one of lse.
        """
        entry = self.entry
        through_lse = name[0] == "d" and bool(np.any(self.tensors.get("in/d_lse", 0)))
        what = called(entry["method"], self.case, name) + (" with dlse" if through_lse else "")
        return entry["method"], entry["semantics"], self.case.dtype, what


@dataclass(frozen=True)
class Answer:
    """A file of the other program's.

    unreadable : why it holds nothing
    refused : why the program cannot run this case
    numerics : the row that it declares
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    unreadable: str = ""
    refused: str = ""
    numerics: str = ""


@dataclass
class Judged:
    """records, findings : as of `verify`, a record for each tensor and clause
    errors : what is wrong with the answers as a whole; they are no pass
    rows : dtype -> rows of numerics that its answers were held to
    interrupted : never, because it takes no time
    """

    records: list[Record]
    findings: list[Finding]
    errors: list[str]
    rows: dict[str, list[str]]
    interrupted: bool = False


def questions(folder: Path) -> list[Question]:
    """The vectors of a folder, the smallest first.

    Raises
    ------
    CannotRun : there are none, or they are not what the manifest says
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_text(path))
        for name, own in (("schema", SCHEMA), ("spec_version", SPEC_VERSION)):
            if manifest[name] != own:
                raise ValueError(f"its {name} is {manifest[name]!r}, and here it is {own!r}")
        found = []
        for entry in sorted(manifest["vectors"], key=lambda entry: entry["bytes"]):
            data = read_bytes(folder / entry["file"])
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise ValueError(f"{entry['file']} is not the file that it lists (sha256)")
            found.append(Question(entry, Case.from_json(entry["case"]), decoded(data)[0]))
        return found
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"{path}: {type(error).__name__}: {error}"
    raise CannotRun(f"{folder} holds no vectors: {why}. nsa-ref vectors DIR writes them")


def _read(path: Path) -> Answer:
    try:
        arrays, metadata = decoded(read_bytes(path))
    except OSError as error:
        return Answer(unreadable=str(error.strerror))
    except ValueError as error:
        return Answer(unreadable=str(error))
    return Answer(arrays, "", metadata.get("refused", ""), metadata.get("numerics", ""))


def judge_answers(folder: Path, answers: Path) -> Judged:
    """Hold every answer in the folder `answers` to the vectors in `folder`.

    Raises
    ------
    CannotRun : one of them is no such folder
    """
    asked = questions(folder)
    if not answers.is_dir():
        raise CannotRun(f"{answers} is no folder. It must hold the answers, a file each")
    by_file = {path.name: _read(path) for path in sorted(answers.glob(f"*{SUFFIX}"))}
    judging = _Judging(asked, by_file, str(answers))
    for question in asked:
        judging.judge(question)
    judging.replay = f"nsa-ref check {shlex.quote(str(folder))} {shlex.quote(str(answers))}"
    return judging.judged()


class _Judging:
    """The records so far, and what was broken, the smallest vector first."""

    def __init__(self, asked: list[Question], answers: dict[str, Answer], name: str) -> None:
        self.answers, self.name, self.replay = answers, name, ""
        self.records: dict[tuple[str, str], Record] = {}
        self.broken: dict[tuple[str, str], list[tuple[Question, Broken]]] = {}
        self.errors = [
            f"{file} answers no vector: its name must be one that {MANIFEST} lists"
            for file in sorted(set(answers) - {question.entry["file"] for question in asked})
        ]
        self.rows: dict[str, set[str]] = {}
        #: what the program answers anywhere
        self.offered = {
            question.offer(name)
            for question in asked
            for name in self._answer(question).arrays
            if name in question.entry["asks"]
        }

    def _answer(self, question: Question) -> Answer:
        return self.answers.get(question.entry["file"], Answer())

    def _record(self, question: Question, name: str, clause: str) -> Record:
        key = called(question.entry["method"], question.case, name), clause
        record = Record(name=key[0], clause=clause, implementation=self.name)
        return self.records.setdefault(key, record)

    def judge(self, question: Question) -> None:
        """All that one vector asks for."""
        entry, answer = question.entry, self._answer(question)
        if unknown := sorted(set(answer.arrays) - set(entry["asks"])):
            self.errors.append(
                f"{entry['file']} has a tensor {unknown[0]!r}, and its vector asks for "
                f"{', '.join(entry['asks'])}"
            )
        if answer.numerics and answer.numerics not in entry["numerics"]:
            rows = ", ".join(entry["numerics"])
            self.errors.append(
                f"{entry['file']} has numerics={answer.numerics!r}; rows of "
                f"{question.case.dtype} are {rows}"
            )
            return
        silent = entry["file"] in self.answers and not answer.arrays and not answer.refused
        if silent:
            what = answer.unreadable or "it answers nothing, and does not say why by `refused`"
            fault = Failure(kind="result", tensor=entry["method"], what=f"{entry['file']}: {what}")
            first = next(iter(entry["asks"]))
            self._broken(question, first, Broken(entry["clause"], fault))
            return
        if answer.arrays:
            row = answer.numerics or entry["numerics"][0]
            self.rows.setdefault(question.case.dtype, set()).add(row)
        blame = ""
        for name, clause in entry["asks"].items():
            blame = self._judge_one(question, answer, name, clause, blame)

    def _not_offered(self, what: tuple[str, ...]) -> str:
        """The most general of what the program has no answer to, of which this is a part."""
        method, convention, dtype, tensor = what
        have = self.offered
        if not any(other[0] == method for other in have):
            return method
        if not any(other[:2] == what[:2] for other in have):
            return f"{method} of {convention}"
        if not any(other[0] == method and other[2] == dtype for other in have):
            return f"{method} in {dtype}"
        if not any(other[0] == method and other[3] == tensor for other in have):
            return tensor
        return f"{tensor} of {convention} in {dtype}"

    def _judge_one(
        self, question: Question, answer: Answer, name: str, clause: str, blame: str
    ) -> str:
        """One tensor; returns the clause that what follows in this file is to be blamed on."""
        record, what = self._record(question, name, clause), question.offer(name)
        if name not in answer.arrays:
            if answer.refused:
                record.not_offered[answer.refused] += 1
                record.refused_edges.update(question.entry["edges"])
            elif what not in self.offered:
                record.not_offered[self._not_offered(what)] += 1
            else:
                missing = f"{name} is missing from the answer to {question.entry['file']}"
                fault = Failure(kind="result", tensor=record.name, what=missing)
                self._broken(question, name, Broken(clause, fault))
            return blame
        try:
            outcome = _compared(question, answer, name, clause)
        except Inconclusive as reason:
            record.inconclusive[reason.args] += 1
        except Raised as error:
            fault = Failure(kind="result", tensor=record.name, what=str(error))
            self._broken(question, name, Broken(clause, fault))
        except Broken as broken:
            if blame:
                record.inconclusive["of another clause", question.entry["file"], blame] += 1
                return blame
            self._broken(question, name, broken)
            return broken.clause if name == "mask" else blame
        else:
            record.ambiguous += outcome.ambiguous
            if not outcome.compared:
                record.undecided += 1
                return blame
            record.cases += 1
            record.edges.update(question.entry["edges"])
            if outcome.budget is not None:
                record.budget_used = max(record.budget_used or 0.0, outcome.budget)
            if name in ("out", "lse") and _empty_rows(question):
                self._record(question, name, "A2").cases += 1
        return blame

    def _broken(self, question: Question, name: str, broken: Broken) -> None:
        record = self._record(question, name, broken.clause)
        record.cases += 1
        self.broken.setdefault((record.name, record.clause), []).append((question, broken))

    def judged(self) -> Judged:
        """The records, each with the smallest of its findings."""
        findings = []
        for key, found in self.broken.items():
            question, broken = found[0]
            notes: list[Remark] = [("vector", question.entry["file"])]
            if others := [other.entry["file"] for other, _ in found[1:]]:
                notes.append(("larger vectors", len(others), others[0]))
            finding: Finding = {
                "property": key[0],
                "implementation": self.name,
                "device": "",
                "spec": "",
                "file": question.entry["file"],
                "case": question.entry["case"],
                "replay": self.replay,
                **broken_data(broken.noted(*notes)),
            }
            self.records[key].finding = finding
            findings.append(finding)
        rows = {dtype: sorted(self.rows[dtype]) for dtype in DTYPES if dtype in self.rows}
        return Judged(list(self.records.values()), findings, self.errors, rows)


def _empty_rows(question: Question) -> bool:
    mask = question.tensors.get("mask")
    return mask is not None and bool((mask.sum(-1) == 0).any())


def _compared(question: Question, answer: Answer, name: str, clause: str) -> Outcome:
    """One tensor beside what the vector says of it.

    Raises
    ------
    Broken, Raised, Inconclusive
    """
    entry, case, tensors = question.entry, question.case, question.tensors
    actual, row = answer.arrays[name], answer.numerics or entry["numerics"][0]
    if name == "block_indices":
        candidates, forced = tensors["known/candidates"] != 0, tensors["known/forced"] != 0
        of_blocks = Scored(tensors["known/scores"], candidates, forced)
        bounds = tensors[f"known/{row}/scores"]
        ambiguous, found = invalid_rows(case, actual, of_blocks, bounds)
        if FORCED_ORDER in found:
            found.setdefault(ORDER if ORDER in found else "I4", found.pop(FORCED_ORDER))
        if ORDER in found:
            found[_order_clause(case, clause)] = found.pop(ORDER)
        if found:
            at_fault = clause if clause in found else next(iter(found))
            raise Broken(at_fault, found[at_fault])
        _check_some(actual.shape[:3])
        return Outcome(compared=math.prod(actual.shape[:3]) - ambiguous, ambiguous=ambiguous)

    what, expected = called(entry["method"], case, name), tensors[name]
    if name == "mask" and actual.dtype.kind not in "biu":
        raise Raised(f"{what} has dtype {actual.dtype}; it must be integers or booleans")
    found_values = checked_result(what, actual, expected.shape)
    if name == "mask":
        if (found_values < 0).any():
            raise Raised(f"{what} holds {found_values.min():.0f}; a column is seen 0 times or more")
        pair = expected.astype(np.int64), found_values.astype(np.int64)
        if (pair[0] != pair[1]).any():
            raise wrong_mask(BRANCH[entry["method"]], clause, case, *pair, "as answered")
        _check_some(expected.shape)
        return Outcome(compared=expected.size)
    check_dtype(case, what, actual)
    if entry["method"] in BRANCH and name in ("out", "lse"):
        # the other of the two is taken as right
        right = Attention(tensors["out"], tensors["lse"])
        given = right._replace(**{name: found_values})
        check_empty_rows(BRANCH[entry["method"]], case, tensors["mask"], right, given)
    _check_some(expected.shape)
    bound = tensors[f"bound/{row}/{name}"]
    return settle([compare(clause, what, found_values, expected, bound)])


def _check_some(shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise Inconclusive("no element")


def _order_clause(case: Case, clause: str) -> str:
    """I1, I2 or I3, whichever the vector is about: nothing smaller can be asked."""
    if clause in ("I1", "I2", "I3"):
        return clause
    return "I3" if case.semantics.importance == "logit_mean" or case.group_size > 1 else "I2"
