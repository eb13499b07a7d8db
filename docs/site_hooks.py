"""What the site needs beyond mkdocs.yml: files beside docs/, links in notebooks, and docstrings as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
RECORDED = "bench/results"  # pictures of measurements, which pages call ../bench/results/...
EQUATION = re.compile(r"^([ ]*)\.\. math::[ ]*(.*(?:\n(?:\1[ ]+\S.*)?)*)", re.MULTILINE)
ROLE = re.compile(r":(math|class):`(~?)([^`]+)`")
SOURCE = re.compile(r'href="([\w./]+)\.(?:md|ipynb)((?:#[^"]*)?)"')
EXAMPLE = re.compile(r"::$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the recorded pictures and the changelog to the site."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for picture in sorted((ROOT / RECORDED).glob("*.png")):
        files.append(File.generated(config, f"{RECORDED}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to recorded pictures to where they are in the site."""
    return markdown.replace(f"(../{RECORDED}/", f"({RECORDED}/")


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Lead the links of a notebook to pages of the site, as those of Markdown do."""
    return SOURCE.sub(r'href="\1.html\2"', html) if page.file.src_uri.endswith(".ipynb") else html


class Docstrings(griffe.Extension):
    """Docstrings are written for an editor, in the little of reStructuredText that torch's have: make it Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with equations between dollars, and examples as Markdown has them."""

    def equation(found: re.Match[str]) -> str:
        lines = [line.strip() for line in found[2].strip().splitlines()]
        return "\n".join(f"{found[1]}{line}" for line in ("", "$$", *lines, "$$", "", ""))

    def role(found: re.Match[str]) -> str:
        return f"${found[3]}$" if found[1] == "math" else f"`{found[3]}`"

    text = EQUATION.sub(equation, text)
    return EXAMPLE.sub(":", ROLE.sub(role, text))
