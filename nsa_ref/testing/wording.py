"""Verdicts in words: the sentences that the terminal, pytest and the files of findings show."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_ref.testing.case import Case
from nsa_ref.testing.choices import INVALID, Reason
from nsa_ref.testing.clauses import CLAUSES
from nsa_ref.testing.pictures import side_by_side
from nsa_ref.testing.verdicts import (
    Broken,
    Convention,
    Failure,
    Fault,
    Record,
    Remark,
    RemarkName,
    WrongChoice,
    WrongElement,
    WrongFactor,
    WrongMask,
    WrongReader,
)

#: Longer texts of the implementation's are cut in their middle: what is kept of an exception; what
#: is shown of it; what stands in a line; a reason, of which there may be many, and a name.
LONGEST_KEPT, LONGEST_TEXT, LONGEST_LINE, LONGEST_REASON = 100_000, 6000, 2000, 300

#: A line names at most so many reasons.
MOST_REASONS = 30

#: A sentence names at most so many numbers of a list.
MOST_NUMBERS = 12

_REAL = r"(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+|nan|inf)"
_BOOL = r"(?:np\.)?(?:True|False)_?"
_NUMBER = re.compile(
    rf"(?<![\w.])(?<![a-z]:)(?:[-+]?{_REAL}(?: *[-+]{_REAL}j|j)?|{_BOOL})(?!\w)"  # not of cuda:0
)
#: What may stand between two numbers of an array: no word, but for `np.int64(` and `dtype=int64`.
_BETWEEN = re.compile(r"(?:\W|(?<!\w)[a-zA-Z][\w.]*\(|(?<!\w)\w+=['<]?[a-zA-Z][^\s,)]*)+")

#: The sentence of every remark, with a place for each of its values.
REMARKS: dict[RemarkName, str] = {
    # why a case could not tell
    "no hidden key": "every key is visible to every row",
    "never all visible": "the declared limits leave no case in which everything is visible",
    "empty rows": "rows before the first key follow empty_row",
    "too short to cut": "nothing to cut off",
    "every block is chosen": "no row has more blocks than it may choose",
    "uniform rows": "the mean over all columns knows how many are to come",
    "no visible key": "none of the drawn rows sees a key",
    "empty in some head": "none of the drawn rows sees a key in every head",
    "rounded sums": "every sum is too large for the rounding of this dtype",
    "NaN rows": "no gradient is defined for a NaN row",
    "narrow model": "model_dim={} is no feature for each token and head",
    "no linear map": "compressed values are read through a linear map",
    "no row sees a key": "no row with a visible key",
    "no empty row": "no row without a visible key",
    "not 16 bits": "wider dtypes have bounds that are small enough",
    "empty rows that are not zero": "gradients through a row that sees no key are 0 only for "
    "empty_row='zero'",
    "only powerless bounds": "the bounds admit any value: too ill-conditioned for this dtype",
    "powerless tensor": "the bound of one tensor admits any value",
    "of another clause": "{}: see {}",
    # why a property was not tried
    "determinism unstated": "whether it is deterministic, which it does not state",
    "limits without long sequences": "long sequences, which its limits exclude",
    "slow pace": "long sequences and large tensors, because its pace is slow",
    "not causal": "long sequences, which are causal ones, and it declares none",
    "limits without large tensors": "tensors beyond 2^{} elements, which its limits exclude",
    "little memory": "tensors beyond 2^{} elements, which take a GPU with {:.3g} GiB free",
    "lost device": "{} was lost to this process ({}); -n 1 -p nsa_ref.testing.plugin goes on in a "
    "fresh process",
    # what else was seen of a fault
    "fresh seeds": "With {} fresh seeds it is the same.",
    "device fault": "The device does not answer any more in this process: {}",
    "flaky": "Not every time: the same case also passed.",
    "no layer": "layer is not offered: a mistake of {} cannot be told from one of the layer itself",
    "no layer gradients": "gradients of layer are not offered: a mistake of {} cannot be told from "
    "one of the layer itself",
    "right without q": "with to_q = 0, which neither rotation nor scale changes, the same row is "
    "right: rotation, or else the scale",
    "maybe A4": "layer_with_blocks is not offered: this may be A4, a gradient of the choice",
    "choice of before": "It is what the call before chose, whose data were others.",
    "gates": "with one gate open at a time, {} wrong, {} right",
    # what is wrong with an entry of the ledger
    "no case": "{} covers none of {} cases",
    "every case": "{} covers all of {} cases",
    "stale": "{} is stale: none of its {} cases failed",
    "no implementation": "{} covers no case: no implementation of this run is called {}",
    "nothing offered": "{} covers no case: what it is about is not offered",
    # why a clause is thin, or lies outside of what is declared
    "few cases": "{} decided {} of the {} cases that it is asked",
    "edge refused": "{} refused every case with this: {} ({} cases)",
    "edge not met": "no decided case of {} has this: {}",
    "edge outside": "no case that {} declares has this: {}",
    # of answers to golden vectors
    "no element": "nothing that came back has an element that could be wrong",
    "vector": "vector: {}",
    "larger vectors": "and {} larger ones, such as {}",
}


def printable(text: str) -> str:
    """The same text with everything that steers a terminal, or that no screen shows, written out.

    An implementation chooses its name and its exceptions' messages. GitHub's runner obeys a line
    that begins with "::", which any text may when it is wrapped, or that has "##[" in it.
    """
    shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return re.sub(r"(?<!\S):(?=:)", r"\\x3a", shown).replace("##[", r"#\x23[")


def one_line(error: BaseException) -> str:
    """The exception's type and message, on one line."""
    try:
        text = " ".join(cut(str(error), LONGEST_KEPT).split())
    except Exception:
        text = "(its message cannot be printed)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(error: BaseException) -> str:
    """Where it was raised, and from where that was called: file:line, without what Python has."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename}:{f.lineno}" for f in frames if "importlib" not in f.filename]
    own = [where for where in places if not where.startswith(f"{Path(__file__).parent}{os.sep}")]
    first, last = (own or places)[0], places[-1]
    return last if first == last else f"{last}, called from {first}"


def cut(text: str, most: int, gap: str = " ... {} characters ... ") -> str:
    """The text without its middle if it is long."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}{gap.format(len(text) - 2 * half)}{text[-half:]}"


def in_one_line(text: str, most: int = LONGEST_LINE) -> str:
    """A text that others wrote, as a part of a line."""
    return printable(" ".join(cut(text, most).split()))


def shortened(text: str, file: str) -> str:
    """What was seen, without its middle if it is long; the file has more of it."""
    return cut(text, LONGEST_TEXT, f"\n... {{}} characters, in {file} ...\n")


def few(listed: Sequence[str]) -> list[str]:
    """No more reasons than a reader looks at."""
    more = len(listed) - MOST_REASONS
    return [*listed[:MOST_REASONS], *([f"and {more} more"] if more > 0 else [])]


def message(finding: Mapping[str, Any]) -> str:
    """A finding: the clause, the smallest case, what was seen, how to see it again."""
    # what takes its process down cannot be made smaller in it
    size = "case" if "ended" in finding else "smallest case"
    # answers that come as files say not where they were made
    where = f" on {finding['device']}" if finding["device"] else ""
    lines = [
        f"{finding['clause']} is broken by {finding['implementation']}{where}",
        f"{finding['clause']}: {CLAUSES[finding['clause']]}",
        f"{size}: {Case.from_json(finding['case'])}",
        shortened(finding["text"], finding["file"]),
        f"replay: {from_here(finding)}" if "unsaved" not in finding else unsaved(finding),
    ]
    if finding["convention"] is not None:
        # last, because it is read only if the rest is no surprise
        lines.append(convention(Convention(**finding["convention"])))
    if "gone" in finding:
        gone, of = finding["gone"]
        lines.append(f"With that declared, {gone} of {of} findings are gone.")
    return printable("\n".join(lines))


def unsaved(finding: Mapping[str, Any]) -> str:
    """What is needed to run a case again whose file could not be written."""
    kept = {name: finding[name] for name in ("property", "spec", "device", "case")}
    return f"it could not be kept ({finding['unsaved']}); as a file it would be {json.dumps(kept)}"


def from_here(finding: Mapping[str, Any]) -> str:
    """The replay command, with the path from the present folder if the file lies in it."""
    replay, path = finding["replay"], Path(finding["file"])
    with contextlib.suppress(FileNotFoundError, ValueError):  # no folder, or it lies elsewhere
        near = shlex.quote(str(path.relative_to(Path.cwd())))
        replay = replay.replace(shlex.quote(str(path)), near)
    return str(replay)


def annotation(finding: Mapping[str, Any]) -> str:
    """The line that makes GitHub show a finding beside the run: a workflow command.

    Source: "Workflow commands for GitHub Actions", and the toolkit's `command.ts`, which escapes
    what would end the command or a property of it.
    """
    title = f"{finding['clause']} is broken by {finding['implementation']}"
    escapes = (("%", "%25"), ("\r", "%0D"), ("\n", "%0A"), (":", "%3A"), (",", "%2C"))
    title, text = printable(title), message(finding)
    for character, escaped in escapes:
        title = title.replace(character, escaped)
    for character, escaped in escapes[:3]:
        text = text.replace(character, escaped)
    return f"::error title={title}::{text}"


def convention(explains: Convention) -> str:
    """Which switch or preset would explain a fault."""
    name, value = explains.name, explains.value
    if value is None:
        how = f"see {name}."
    elif name == "preset":
        how = f"this is what the preset {value} does. If it is meant, declare it in `semantics`."
    else:
        how = f"{name}={value!r} would explain it. If it is meant, declare it in `semantics`."
    return f"This may be a difference of convention: {how}"


def describe(broken: Broken) -> str:
    """What was seen: the fault and the notes."""
    return "\n".join([sentence(broken.fault), *map(remark, broken.notes)])


def remark(said: Remark) -> str:
    """Why there is no answer, or what else was seen, in a sentence."""
    name, *values = said
    return _gates(*values) if name == "gates" else REMARKS[name].format(*values)


def _gates(wrong: Sequence[str], right: Sequence[str], handed: bool | None) -> str:
    """Which branches are wrong, each with its gate alone open.

    handed : whether the fine branch is right with the choice of blocks handed in, if it was asked
    """
    if not wrong:
        return "each branch is right with its gate alone open: the gates, their order or their sum"
    if not right:
        return "all branches are wrong with their gate alone open: look at what they have in common"
    both = (" and ".join(some) + (" is" if len(some) == 1 else " are") for some in (wrong, right))
    line = REMARKS["gates"].format(*both)
    if handed is not None:
        seen = "all are right: it chooses others" if handed else "it is wrong as well"
        line += f"; with the choice of blocks handed in, {seen}"
    return line


def choice(reason: Reason) -> str:
    """What is wrong with a choice of blocks, or what may be."""
    block, floor = f"block {reason.block}", f"score_floor={reason.floor}"
    match reason.rule:
        case "named once":
            return f"{block} is named {reason.count} times."
        case "candidates":
            return f"{block} is no candidate; candidates are {numbers(reason.candidates)}."
        case "at most n":
            return f"{reason.count} blocks are named, num_selected_blocks={reason.n}."
        case "forced":
            return f"{block} is forced and was left out."
        case "all candidates":
            above = "" if reason.floor is None else f", and its score is above {floor}"
            return f"{block} was left out with a slot to spare{above}."
        case "floor" if reason.verdict == INVALID:
            return f"{block} was taken, and its score is not above {floor}."
        case "floor":
            return f"{block}: {floor} is within its bound."
        case "order":
            better, worse = reason.scores
            how = "larger than" if reason.verdict == INVALID else "within"
            return (
                f"{block} (score {better:.17g}) was left out and block {reason.worse} (score "
                f"{worse:.17g}) taken: the gap {better - worse:.3g} is {how} the bound "
                f"{reason.bound:.3g} of the two."
            )


def sentence(fault: Fault) -> str:
    """What is wrong, in one line; masks and places in a program in more lines below it."""
    match fault:
        case WrongElement():
            return _wrong_element(fault)
        case WrongFactor():
            sign = "-" if fault.slope < 0 else "+"
            return (
                f"{fault.tensor} is off by a factor of about 1 {sign} {abs(fault.slope):.3g} "
                f"throughout: "
                f"slope {fault.slope:.3g}, limit {fault.limit:.3g}"
            )
        case WrongMask():
            return _wrong_mask(fault)
        case WrongReader():
            deed = "reads" if fault.reads else "does not read"
            reader, read = (" ".join(map(str, pair)) for pair in (fault.reader, fault.read))
            why = f"; {fault.why}" if fault.why else ""
            return f"{fault.tensor}: {reader} {deed} {read}{why}"
        case WrongChoice():
            told = [f"{score:.5g}" for _, score in fault.scores]
            if len(set(told)) < len({score for _, score in fault.scores}):
                told = [f"{score:.17g}" for _, score in fault.scores]  # what differs looks so
            scores = ", ".join(f"{block}: {t}" for (block, _), t in zip(fault.scores, told))
            return (
                f"select at batch {fault.batch}, head {fault.head}, row t={fault.row} "
                f"(p={fault.position}) chose {numbers(fault.chosen)}: {choice(fault.reason)}\n"
                f"scores around the cutoff, by block: {scores}"
            )
        case Failure():
            lines = [f"the implementation failed: {without_arrays(fault.what)}"]
            return "\n  at ".join([*lines, *fault.where])


def _wrong_element(fault: WrongElement) -> str:
    actual, expected = (f"{value:.9g}" for value in (fault.actual, fault.expected))
    if actual == expected:
        actual, expected = repr(fault.actual), repr(fault.expected)
    line = f"{fault.tensor}{list(fault.index)}{f' {fault.part}' if fault.part else ''} is {actual}"
    if fault.form == "exact":
        line += f" and must be exactly {expected}"
    elif not math.isfinite(fault.actual):
        line += f", {fault.source} says {expected}"
    else:
        line += (
            f", {fault.source} says {expected}: off by {abs(fault.actual - fault.expected):.3g}, "
            f"bound {fault.bound:.3g}, {fault.budget_used:.3g} times the budget"
        )
    if fault.form == "statistical":
        line += " of the statistical bound"
    return line + (f": {fault.why}" if fault.why else "")


def _wrong_mask(fault: WrongMask) -> str:
    deed, column = "misses" if fault.expected else "reads", f"column {fault.column}"
    if fault.actual == -2:
        deed = "is NaN where it must see"
    elif fault.actual < 0:
        deed, column = "reads more than", f"the {fault.columns} columns that there are"
    elif fault.expected and fault.actual:
        deed = "counts"
        column += f" {fault.actual} times, the definition {fault.expected} times"
    if fault.block is not None:
        column += f" (block {fault.block})"
    row, head = f"row t={fault.row}", f"batch {fault.batch}, query head {fault.query_head}"
    if fault.gradient:
        what = f"{fault.gradient} {deed} the pair of {row} and {column} ({head})"
    else:
        what = f"{head}, {row} (p={fault.position}) {deed} {column}"
    line = f"{fault.reading}: {what}"
    if fault.but:
        line += f", though {fault.but}"
    return line if fault.masks is None else f"{line}\n{side_by_side(fault.masks)}"


def numbers(listed: Sequence[int]) -> str:
    """A list, of which no more is shown than a reader looks at."""
    shown = ", ".join(map(str, listed[:MOST_NUMBERS]))
    more = len(listed) - MOST_NUMBERS
    return f"[{shown}, and {more} more]" if more > 0 else f"[{shown}]"


def without_arrays(text: str) -> str:
    """The text without the middle of any long run of numbers, as printed arrays have."""
    runs: list[list[re.Match[str]]] = []
    for number in _NUMBER.finditer(text):
        if runs and _BETWEEN.fullmatch(text, runs[-1][-1].end(), number.start()):
            runs[-1].append(number)
        else:
            runs.append([number])
    half = MOST_NUMBERS // 2
    for run in reversed(runs):
        if len(run) > MOST_NUMBERS:
            start, stop = run[half - 1].end(), run[-half].start()
            text = f"{text[:start]} ... {len(run) - 2 * half} more ... {text[stop:]}"
    return text


def reasons(record: Record) -> list[str]:
    """Why cases were not decided."""
    return [
        *few([f"not offered: {what}" for what in record.not_offered]),
        *(f"not tried: {remark(why)}" for why in record.not_tried),
        *(f"inconclusive: {remark(why)}" for why in record.inconclusive),
        *(f"ambiguous: {why}" for why in _ambiguous(record)),
        *_unreached(record),
    ]


def undecided(record: Record) -> list[str]:
    """Why those were not that were offered."""
    return [*map(remark, record.inconclusive), *_ambiguous(record), *_unreached(record)]


def _unreached(record: Record) -> list[str]:
    count = record.unreached
    return [f"the time was up before {count} of its cases"] if count else []


def _ambiguous(record: Record) -> list[str]:
    return ["every row may be chosen either way"] if record.undecided else []
