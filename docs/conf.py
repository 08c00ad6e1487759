"""The site of these pages, by Sphinx: `make docs` builds it into build/site."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
SOURCE = re.search(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
BESIDE = re.compile(r"\]\(\.\./([^)\s#]+)(#[^)\s]*)?\)")

project = "cpo-kernels"
author = "the authors of cpo-kernels"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
root_doc = "contents"
html_theme = "furo"
html_title = "cpo-kernels"
html_show_sourcelink = html_show_copyright = False
myst_heading_anchors = 4  # with GitHub's names
myst_fence_as_directive = ["mermaid"]


def link_to_repository(app: Sphinx, page: str, content: list[str]) -> None:
    """Let links to files beside docs/ lead to the repository; one to a file that does not exist is a warning."""

    def absolute(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if not (ROOT / path).exists():
            logging.getLogger(__name__).warning("%s links to %s, which does not exist", page, path)
        return f"]({SOURCE}/blob/main/{path}{anchor})"

    content[0] = BESIDE.sub(absolute, content[0])


def setup(app: Sphinx) -> None:
    """Register what is done to every page."""
    app.connect("source-read", link_to_repository)
