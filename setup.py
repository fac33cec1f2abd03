"""What pyproject.toml cannot say: the README of a package index, and the pages in the wheel."""

import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def for_an_index(readme: str, repository: str) -> str:
    """The README with links that work where its folder is not: on the page of a package index.

    repository : the project's address; empty if it has none, and then a link is the name of its
        page, which the wheel has as well, and a picture is left out
    """

    def link(found: re.Match[str]) -> str:
        is_picture, text, target = found.groups()
        if re.match(r"https?:|#", target):
            return found[0]
        if repository:
            place = f"{repository}/{'raw' if is_picture else 'blob'}/main"
            return f"{is_picture}[{text}]({place}/{target})"
        page = target.partition("#")[0]
        return "" if is_picture else text if text == Path(page).name else f"{text} ({page})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)]*)\)", link, readme)


class WithPages(build_py):
    """docs/ goes into the wheel, beside the code that it is about."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "nsa_ref", "docs")
            shutil.copytree(ROOT / "docs", folder, dirs_exist_ok=True)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        cmdclass={"build_py": WithPages},
        long_description=for_an_index(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            project["urls"].get("Repository", ""),
        ),
        long_description_content_type="text/markdown",
    )
