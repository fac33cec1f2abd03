"""Headless Chromium: what a page looks like to it, and how it prints."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

#: It is to look at one file, and to ask nobody anything.
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--allow-file-access-from-files"),
)


def chromium(folder: Path, *arguments: str) -> str:
    """What Chromium prints; folder : for its profile."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(page: Path, script: str, *widths: int) -> list[Any]:
    """What a function of the page's `document` returns where the window is so wide, in pixels.

    A second page shows it in frames: the page itself runs no script.
    """
    frames = "".join(
        f'<iframe src="{page.name}" style="width:{width}px;height:900px"></iframe>'
        for width in widths
    )
    around = page.with_name(f"around-{page.name}")
    around.write_text(
        f"<!DOCTYPE html><body>{frames}<script>const ask = {script};"
        "onload = () => { const answers = [...document.querySelectorAll('iframe')].map("
        "frame => ask(frame.contentDocument, frame.contentWindow));"
        "const pre = document.createElement('pre'); pre.id = 'answer';"
        "pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(answers))));"
        "document.body.replaceChildren(pre); };</script></body>"
    )
    dom = chromium(page.parent, "--window-size=1500,1000", "--dump-dom", around.as_uri())
    answer = re.search(r'<pre id="answer">([\w+/=]+)</pre>', dom)
    assert answer is not None, dom[:2000]
    answers: list[Any] = json.loads(base64.b64decode(answer.group(1)))
    return answers
