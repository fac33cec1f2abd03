"""What pyproject.toml cannot say: the README of a package index, and the pages in the wheel."""

import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

#: A link or a picture of Markdown: "!", its words, its target.
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)]*)\)")


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
        return "" if is_picture else named(text, target)

    return LINK.sub(link, readme)


def in_a_wheel(page: str, folder: Path) -> str:
    """A page of docs/ with links that work in the folder of the wheel where the pages are.

    What the wheel has not is named instead: the README, tests, benchmarks, examples.
    """

    def link(found: re.Match[str]) -> str:
        is_picture, text, target = found.groups()
        file, sharp, heading = target.partition("#")
        if re.match(r"https?:|#", target) or (folder / file).exists():
            return found[0]
        # docs/ stands beside the packages here, and there in one of them
        there = re.sub(r"^\.\./nsa_ref/", "../", re.sub(r"^\.\./(?!nsa_ref/)", "../../", file))
        if (folder / there).exists():
            return f"{is_picture}[{text}]({there}{sharp}{heading})"
        return named(text, file.removeprefix("../"))

    return LINK.sub(link, page)


def named(text: str, target: str) -> str:
    """A link as words."""
    page = target.partition("#")[0]
    return text if text == Path(page).name else f"{text} ({page})"


class WithPages(build_py):
    """docs/ goes into the wheel, beside the code that it is about."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "nsa_ref", "docs")
            shutil.copytree(ROOT / "docs", folder, dirs_exist_ok=True)
            for page in folder.glob("*.md"):
                text = in_a_wheel(page.read_text(encoding="utf-8"), folder)
                page.write_text(text, encoding="utf-8")


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
