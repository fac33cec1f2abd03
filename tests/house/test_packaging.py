"""What a wheel holds, and what a package index shows of the README."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import python
from nsa_ref.testing import cli
from nsa_ref.testing.explaining import pages_folder
from pages import ROOT, page

for_an_index: Callable[[str, str], str] = runpy.run_path(str(ROOT / "setup.py"))["for_an_index"]

LINK = re.compile(r"!?\[[^\]]*\]\(([^)]*)\)")


@pytest.mark.parametrize("repository", ["", "https://forge.example/nsa-ref"])
def test_links_of_the_readme_work_on_a_package_index(repository: str) -> None:
    """Each leads to the repository, or is words that name the page in the wheel."""
    readme, shown = page("README.md"), for_an_index(page("README.md"), repository)
    targets = [target for target in LINK.findall(readme) if not target.startswith("http")]
    assert "docs/presets.md" in targets
    assert all(target.startswith("https://") for target in LINK.findall(shown))
    for target in targets:
        named = f"/{target})" if repository else Path(target.partition("#")[0]).name
        assert named in shown or (not repository and named.endswith(".png"))


def test_a_wheel_has_the_pages_the_template_and_the_marks_of_types(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    build = ("build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib"))
    done = python("setup.py", "-q", *build, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = ("presets.md", "upstream.md", "example-case.json", "masks.png")
    for name in (
        *("nsa_ref/py.typed", "nsa_fast/py.typed", "nsa_ref/testing/templates/report.html"),
        *(f"nsa_ref/docs/{file}" for file in pages),
    ):
        assert (tmp_path / "lib" / name).is_file(), name
    linked = 0
    for path in (tmp_path / "lib" / "nsa_ref" / "docs").glob("*.md"):
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            if not target.startswith(("http", "#")):
                linked += 1
                assert (path.parent / target.partition("#")[0]).exists(), (path.name, target)
    assert linked > 50


def test_the_command_says_where_the_pages_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.HOLDS
    assert str(pages_folder()) in "".join(capsys.readouterr().out.split())
    assert (pages_folder() / "presets.md").is_file()
