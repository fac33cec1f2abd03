"""The report as JUnit's XML, which CI services show: a test case for every property."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from nsa_ref.testing.verdicts import Record
from nsa_ref.testing.wording import message, printable, reasons


def to_xml(records: Sequence[Record], errors: Sequence[str], seconds: float) -> str:
    """One suite for each implementation; a case fails, or is skipped if nothing was decided.

    errors : what went wrong beside the properties: an error each, in a suite of their own
    """
    root = ET.Element("testsuites", name="nsa-ref", time=f"{seconds:.1f}")
    for implementation in dict.fromkeys(record.implementation for record in records):
        suite = ET.SubElement(root, "testsuite", name=printable(implementation or "nsa-ref"))
        for record in records:
            if record.implementation == implementation:
                _add(suite, record)
    if errors:
        suite = ET.SubElement(root, "testsuite", name="the run")
        for number, error in enumerate(errors, 1):
            case = ET.SubElement(suite, "testcase", classname="nsa-ref", name=f"error {number}")
            _say(case, "error", error)
    for suite in root:
        counts = {"tests": len(suite)}
        for kind in ("failure", "error", "skipped"):
            counts[kind] = sum(case.find(kind) is not None for case in suite)
        plurals = {"failure": "failures", "error": "errors"}
        for kind, count in counts.items():
            suite.set(plurals.get(kind, kind), str(count))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _add(suite: ET.Element, record: Record) -> None:
    """What became of a property."""
    classname = printable(f"{record.implementation}.{record.clause}")
    case = ET.SubElement(suite, "testcase", classname=classname, name=record.name)
    if record.finding is not None:
        _say(case, "failure", message(record.finding), type=record.finding["clause"])
    elif record.lost:
        _say(case, "error", record.lost)
    elif record.known or record.spared:
        _say(case, "skipped", f"known: {', '.join(record.known | record.spared)}")
    elif not record.cases:
        _say(case, "skipped", "; ".join(reasons(record)) or "no case was decided")


def _say(case: ET.Element, kind: str, text: str, **attributes: str) -> None:
    text = printable(text)
    element = ET.SubElement(case, kind, {"message": text.partition("\n")[0], **attributes})
    element.text = text
