"""The report for readers: as a page in a browser, as JUnit's XML, on GitHub, and beside another."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from browser import CHROMIUM, chromium, measured
from nsa_ref.testing import Attention, Case, cli, report, wording
from nsa_ref.testing.cli import BROKEN, COULD_NOT_RUN, HOLDS, main
from nsa_ref.testing.junit import to_xml
from nsa_ref.testing.options import Options
from nsa_ref.testing.page import to_html
from nsa_ref.testing.properties import PROPERTIES
from nsa_ref.testing.running import run_property
from nsa_ref.testing.verdicts import Record
from port_zoo import OneKeyFewer, Raises, SlidingMask

#: What a name or a message may hold that steers a terminal, a page, XML or GitHub.
HOSTILE = (
    "</title></pre><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
    "{{ 7 * 7 }}\x1b[2J\x1b]0;taken\x07\x00\x08\r\n::error::taken%0A, a:b \u202e \ud800 \ufffe "
    "]]>&amp;"
)


class Wandering(SlidingMask):
    """Misses keys, sees others instead, and some twice."""

    name = "wandering"

    def sliding_mask(self, case: Case) -> Any:
        mask = np.roll(super().sliding_mask(case), 2, axis=-1)
        return mask * (1 + (np.arange(mask.shape[-1]) % 7 == 0))


def records_of(folder: Path) -> list[Record]:
    """Of a small run with something of everything in it."""
    prop = PROPERTIES["W1_sliding_mask_as_exposed"]
    options = Options(findings=folder, spec="port_zoo:OneKeyFewer")
    large = Case(q_len=40, kv_len=60, sliding_window_size=9)
    hostile = Raises(ValueError(HOSTILE))
    hostile.name = HOSTILE
    return [
        run_property(prop, OneKeyFewer(), options),
        run_property(prop, Wandering(), dataclasses.replace(options, case=large)),
        run_property(prop, hostile, options),
        run_property(PROPERTIES["W3_sliding_mask_as_exposed"], SlidingMask(), options),
        Record(name="A1_sliding_output", clause="A1", cases=3, budget_used=0.25),
        Record(name="A1_sliding_lse", clause="A1", not_offered=Counter({HOSTILE: 2})),
    ]


def report_of(records: list[Record], **more: Any) -> dict[str, Any]:
    findings = [record.finding for record in records if record.finding is not None]
    about = {"implementation": HOSTILE, "device": "cpu", "device_name": "", "seed": 0}
    about |= {"numerics": {HOSTILE: {"float32": "bf16"}}}
    about |= {"versions": {"port": HOSTILE}, "level": "quick", "seconds": 1.0, "complete": True}
    made = report.to_json(about | more, records, findings)
    data: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    return data


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return records_of(tmp_path_factory.mktemp("findings"))


@pytest.fixture(scope="module")
def page(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("jinja2", reason="the extra 'report' is not installed")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(report_of(records)), encoding="utf-8")
    return path


# --- the page -------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags of a page, and its words without the style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] != "style":
            self.words += data


def test_the_page_says_what_the_terminal_says(records: list[Record], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    for record in records:
        if (finding := record.finding) is None:
            continue
        for words in (
            finding["replay"],
            str(Case.from_json(finding["case"])),
            wording.printable(finding["text"].partition("\n")[0]),
        ):
            assert words in reader.words
    assert "window_closed=False would explain it" in reader.words
    assert "2 fail" not in reader.words and "1 fail" in reader.words and "0.250" in reader.words
    assert "no visible key: " in reader.words and "n = 0: not met" in reader.words


def test_a_finding_shows_its_entry_for_the_ledger(records: list[Record], page: Path) -> None:
    """As `nsa-ref ledger add` writes it, but for the cases that it is about."""
    words = Reader(page.read_text(encoding="utf-8")).words
    for number, clause in enumerate(("W1", "W1", "W1")):
        finding = records[number].finding
        assert finding is not None
        assert f"nsa-ref ledger add {shlex.quote(finding['file'])}\n" in words
        entry = f'[[known]]\nid = "{clause}-{finding["kind"].replace(" ", "-")}"\nwhy = "'
        assert entry in words
    assert (
        words.count('status = "tolerated"\nclause = "W1"\nmethod = "sliding_mask"\nwhere = {}\n')
        == 3
    )


def test_the_page_has_all_in_itself_and_nothing_of_it_runs(page: Path) -> None:
    reader = Reader(page.read_text(encoding="utf-8"))
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    assert "{{ 7 * 7 }}" in reader.words, "what a port says is no template"


def test_a_picture_has_a_cell_for_every_sign(records: list[Record], page: Path) -> None:
    finding = records[1].finding
    assert finding is not None
    masks = finding["fault"]["masks"]
    wanted = {kind: sum(row.count(kind) for row in masks["actual"]) for kind in "#+-2."}
    assert all(wanted.values()), wanted
    text = page.read_text(encoding="utf-8")
    drawn = next(
        t
        for t in re.findall(r"<svg viewBox.*?</svg>", text, re.DOTALL)
        if "actual" in t and f"rows {masks['top']} to" in t and t.count("M") > 500
    )
    paths = dict(re.findall(r'<path class="(\w+)" d="([^"]*)"', drawn))
    kinds = {"#": "both", "+": "extra", "-": "missing", "2": "count", ".": "none"}
    assert {sign: paths[kind].count("M") for sign, kind in kinds.items()} == wanted
    assert paths["plus"].count("M") == wanted["+"] and paths["minus"].count("M") == wanted["-"]
    assert "(# both, + extra" not in text, "the picture stands for the one in letters"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (Debian: chromium)")
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(page: Path) -> None:
    """Nothing is wider than the window, no word is cut, and no text of a port is run."""
    narrow, wide = measured(
        page,
        """(d, f) => ({
            title: d.title,
            window: d.documentElement.clientWidth,
            page: d.documentElement.scrollWidth,
            wider: [...d.querySelectorAll("body *")].filter(
                e => e.getBoundingClientRect().right > d.documentElement.clientWidth + 1
            ).map(e => e.tagName),
            cut: [...d.querySelectorAll("body *")].filter(
                e => !e.closest("svg") && e.scrollWidth > e.clientWidth + 1
                     && f.getComputedStyle(e).display != "inline"
            ).map(e => e.tagName),
            heading: f.getComputedStyle(d.querySelector("thead")).display,
            split: [...d.querySelectorAll("thead th")].filter(e => {
                const range = d.createRange();
                range.selectNodeContents(e);
                const lines = new Set([...range.getClientRects()].map(r => r.top));
                return lines.size > e.textContent.split(" ").length;
            }).map(e => e.textContent),
            pictures: [...d.querySelectorAll("figure svg")].map(
                e => e.getBoundingClientRect().width),
            colours: ["both", "extra", "missing", "minus"].map(
                c => f.getComputedStyle(d.querySelector("figure ." + c))).map(
                s => [s.fill, s.stroke]),
            font: parseFloat(f.getComputedStyle(d.querySelector("pre")).fontSize),
        })""",
        390,
        1280,
    )
    for shown, width in ((narrow, 390), (wide, 1280)):
        assert shown["window"] == shown["page"] == width
        assert not shown["wider"] and not shown["cut"] and not shown["split"]
        assert "taken" in shown["title"] and shown["title"].startswith("nsa-ref: </title>")
        assert min(shown["pictures"]) > 0 and shown["font"] >= 12
    assert narrow["heading"] == "none" and wide["heading"] != "none"
    colours = {tuple(pair) for pair in wide["colours"]}
    assert len(colours) == len(wide["colours"])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (Debian: chromium)")
def test_a_browser_prints_the_page(page: Path) -> None:
    printed = page.with_suffix(".pdf")
    chromium(page.parent, f"--print-to-pdf={printed}", page.as_uri())
    assert printed.read_bytes().startswith(b"%PDF")


def test_a_cell_that_cannot_be_counted_is_in_the_legend(tmp_path: Path) -> None:
    """`?` is explained where it is shown, in letters and on the page, and nowhere else."""
    pytest.importorskip("jinja2", reason="the extra 'report' is not installed")

    class NotANumber(SlidingMask):
        def sliding(self, case: Case, q: Any, k: Any, v: Any) -> Any:
            out = np.zeros((case.batch, case.q_heads, case.q_len, case.value_dim))
            return Attention(
                out + (np.nan if case.sliding_window_size < case.q_len else v.mean()), None
            )

    prop = PROPERTIES["W1_sliding_mask_as_read"]
    hidden = Case(q_len=3, kv_len=3, head_dim=16, value_dim=16, sliding_window_size=1)
    record = run_property(prop, NotANumber(), Options(case=hidden, findings=tmp_path))
    assert record.finding is not None and "?" in record.finding["fault"]["masks"]["actual"][0]
    assert "? NaN or no number of times" in record.finding["text"]
    told = Reader(to_html(report_of([record]))).words
    assert "? NaN or no number of times" in told
    (other,) = records_of(tmp_path)[:1]
    assert other.finding is not None and "NaN or" not in other.finding["text"]


def luminance(colour: str) -> float:
    """Of an sRGB colour "#rrggbb", as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))


def test_cells_differ_for_who_sees_no_colour() -> None:
    """In lightness alone `#` and `+` differ; `-` is empty, with its line; and both bear a sign."""
    style = (Path(cli.__file__).parent / "templates" / "report.html").read_text()
    dark, extra, missing = re.findall(r"--(?:dark|extra|missing): (#\w+);", style)
    light = {
        name: luminance(c if len(c) == 7 else "#" + "".join(x * 2 for x in c[1:]))
        for name, c in (("dark", dark), ("extra", extra), ("missing", missing))
    }
    assert (light["extra"] + 0.05) / (light["dark"] + 0.05) > 3
    assert 1.05 / (light["missing"] + 0.05) > 3


# --- XML, GitHub, the terminal --------------------------------------------------------------------


def test_junit_has_a_case_for_every_property(records: list[Record]) -> None:
    lost = Record(name="W1_sliding_mask_as_read", clause="W1", lost="its worker was killed")
    known = Record(name="W1_sliding_mask_as_read", clause="W1", cases=2, known=Counter(one=1))
    root = ET.fromstring(to_xml([*records, lost, known], [HOSTILE], 1.0))
    cases = root.findall("*/testcase")
    assert len(cases) == len(records) + 3
    counts = {
        kind: len(root.findall(f"*/testcase/{kind}")) for kind in ("failure", "error", "skipped")
    }
    assert counts == {"failure": 3, "error": 2, "skipped": 2}
    for name, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert sum(int(suite.attrib[attribute]) for suite in root) == counts[name]
    assert sum(int(suite.attrib["tests"]) for suite in root) == len(cases)
    (failed,) = root.findall("testsuite[@name='window [w]']/testcase/failure")
    assert failed.attrib["type"] == "W1" and failed.attrib["message"].startswith("W1 is broken by")
    assert "nsa-ref replay " in (failed.text or "")


def test_a_finding_is_one_annotation_on_github(records: list[Record]) -> None:
    """One line; what follows the title is what the terminal says."""
    for record in records:
        if record.finding is None:
            continue
        line = wording.annotation(record.finding)
        parts = re.fullmatch(r"::error title=([^:,\r\n]*)::([^\r\n]*)", line)
        assert parts is not None, line
        title, text = parts.groups()
        # as the runner reads it: of a property two characters more are escaped
        for escape, character in (("%3A", ":"), ("%2C", ",")):
            title = title.replace(escape, character)
        for escape, character in (("%0A", "\n"), ("%0D", "\r"), ("%25", "%")):
            title, text = (part.replace(escape, character) for part in (title, text))
        assert text == wording.message(record.finding)
        assert title == text.partition(" on cpu\n")[0]


def test_no_text_of_a_port_is_a_command_of_the_runner(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GitHub obeys a line that begins with "::", or has "##[" in it, wherever it comes from."""
    monkeypatch.chdir(tmp_path)
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    port = Raises(ValueError("no\n::error::taken\n \t::set-output name=a::b\n##[add-mask]c"))
    port.name = "a name ::warning::taken " * 4
    prop = PROPERTIES["W1_sliding_mask_as_exposed"]
    record = run_property(prop, port, Options(case=Case(q_len=2, kv_len=2), findings=Path("f")))
    assert record.finding is not None
    report.show(console, [record], [record.finding], title=port.name, seconds=1.0)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    lines += wording.annotation(record.finding).splitlines()[1:]
    assert any("taken" in line for line in lines)
    assert not any(line.lstrip().startswith("::") or "##[" in line for line in lines), lines
    assert wording.printable("a.py::test_b 1:2 C::d") == "a.py::test_b 1:2 C::d"


def test_the_table_fits_into_80_columns() -> None:
    """Nothing is cut, however large its numbers are."""
    known = Record(
        name="A1_sliding_lse", clause="A1", cases=12345, known=Counter(one=1234), ambiguous=123456
    )
    known.budget_used = 1.9071651623e15
    known.inconclusive[("no hidden key",)] = 1234
    known.not_offered["x"] = 12345
    stuck = Record(
        name="A2_sliding_empty_rows", clause="A2", inconclusive=Counter({("no hidden key",): 99999})
    )
    absent = Record(name="A3_sliding_gradients", clause="A3", not_offered=Counter(x=12345))
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    report.show(console, [known, stuck, absent], [], title="a port", seconds=1.0)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\u2026" not in text and "1.91e+15" in text
    for words in ("inconclusive", "ambig.", "12345", "123456", "not offered"):
        assert words in text


def test_no_name_and_no_message_steers_the_terminal(records: list[Record]) -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    findings = [record.finding for record in records if record.finding is not None]
    report.show(console, records, findings, title=HOSTILE, seconds=1.0)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b[2J" in text and "\\ud800" in text


# --- two reports ----------------------------------------------------------------------------------


def diff(old: Any, new: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What `nsa-ref diff` says of two reports."""
    for name, data in (("old.json", old), ("new.json", new)):
        (place / name).write_text(json.dumps(data))
    code = main(["diff", "old.json", "new.json"])
    return code, capsys.readouterr().out


def test_two_reports_are_compared(
    records: list[Record], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = report_of(records)
    mended = report_of([*records[3:], Record(name="x", clause="W1", cases=7, budget_used=0.5)])

    assert diff(broken, broken, place, capsys) == (HOLDS, "the same verdicts, cases and budgets\n")
    code, text = diff(broken, mended, place, capsys)
    assert code == HOLDS and "fail -> pass" in text and "none -> 0.500" in text
    assert text.count("gone: W1 by ") == 3 and text.endswith("equal or better\n")
    code, text = diff(mended, broken, place, capsys)
    assert code == BROKEN and "pass -> fail" in text
    assert text.count("new: W1 by ") == 3 and text.endswith("worse\n")
    assert all(c.isprintable() or c == "\n" for c in text)


def test_findings_of_one_cause_are_one_in_a_difference_too(
    records: list[Record], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cause is new if none of its findings was there; which properties see it is chance."""
    one, two, _ = (dict(r.finding) for r in records[:3] if r.finding is not None)
    one["cause"] = two["cause"] = one["file"]
    two["implementation"] = one["implementation"]
    two["tensor"] = "of another branch"
    asked = [Record(name="x", clause="W1", cases=1)]
    reports = {
        name: report_of(asked) | {"findings": found}
        for name, found in {"none": [], "one": [one], "two": [two], "both": [one, two]}.items()
    }
    code, text = diff(reports["none"], reports["both"], place, capsys)
    assert code == BROKEN and text.count("new: ") == 1 and "and 1 more of this cause" in text
    for old, new in (("one", "both"), ("both", "two"), ("both", "one")):
        code, text = diff(reports[old], reports[new], place, capsys)
        assert code == HOLDS and "new" not in text and "gone" not in text
    assert diff(reports["one"], reports["two"], place, capsys)[0] == BROKEN


def test_what_moved_and_under_which_circumstances(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More cases and a larger budget are said, and are nothing worse."""
    old = report_of([Record(name="x", clause="W1", cases=3, budget_used=0.5)])
    again = [Record(name="x", clause="W1", cases=30, budget_used=0.75)]
    new = report_of(again, seed=1, versions={"port": "2", "torch": "3"}, complete=False)
    code, text = diff(old, new, place, capsys)
    assert code == HOLDS
    for words in ("seed: 0 -> 1", "torch: none -> 3", "complete: True -> False", "3 -> 30"):
        assert words in text
    assert "0.500 -> 0.750" in text and "->" not in text[text.index("pass") :][:8]
    # a clause that is not judged any more is worse than one that passed, and fails are worst
    gone = report_of([])
    assert diff(old, gone, place, capsys)[0] == BROKEN
    inconclusive = report_of(
        [Record(name="x", clause="W1", inconclusive=Counter({("only powerless bounds",): 1}))]
    )
    assert diff(old, inconclusive, place, capsys)[0] == BROKEN
    assert diff(inconclusive, old, place, capsys)[0] == HOLDS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no file"),
        ("", "holds no report"),
        ("\x00\x1b[2J", "holds no report"),
        ("[" * 100000, "holds no report"),
        ("[]", "schema"),
        ('{"schema": "nsa-ref-report-1"}', "nsa-ref-report-2"),
        ('{"schema": "nsa-ref-report-2"}', "versions"),
        ('{"schema": "nsa-ref-report-2", "versions": 3}', "holds no report"),
    ],
)
def test_what_is_no_report_is_one_line(
    text: str | None, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "right.json").write_text(json.dumps(report_of([])))
    if text is not None:
        (place / "wrong.json").write_text(text)
    for files in (("right.json", "wrong.json"), ("wrong.json", "right.json")):
        assert main(["diff", *files]) == COULD_NOT_RUN
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1 and "\x1b" not in line
