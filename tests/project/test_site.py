"""The site of docs/: links lead somewhere, the page of options is that of the code, every public name has its entry."""

from __future__ import annotations

import inspect
import re
from itertools import pairwise

import pytest
from documentation import PAGES
from markdown_it import MarkdownIt
from project import ROOT

import cpo_kernels
from build_tools.docs_pages import PAGES as MADE
from build_tools.docstrings import arguments, with_all_options
from cpo_kernels import options

pytestmark = pytest.mark.cpu  # files, no device

DOCS = ROOT / "docs"
MARKDOWN = MarkdownIt("commonmark").enable("table")


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    tokens = MARKDOWN.parse(text)
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> list[str]:
    inline = [token for token in MARKDOWN.parse(text) if token.type == "inline"]
    targets = [child.attrs["href"] for token in inline for child in token.children if child.type == "link_open"]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def test_the_navigation_has_every_page_once():
    contents = (DOCS / "contents.rst").read_text(encoding="utf-8")
    named = re.findall(r"^   ([\w-]+)$", contents, re.MULTILINE)
    assert sorted(named) == sorted(page.stem for page in DOCS.glob("*.md"))


def test_no_line_begins_with_a_comment_that_text_follows():
    """Markdown takes such a line for HTML, which ends the paragraph before it."""
    wrong = [
        f"{page.name}: {line}"
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*<!--.*-->\s*\S", line)
    ]
    assert not wrong


@pytest.mark.parametrize("name", MADE)
def test_pages_are_what_the_code_says(name):
    if name == "api.md":
        pytest.importorskip("trl")
    assert (DOCS / name).read_text(encoding="utf-8") == MADE[name](), "run `make docs-pages`"


def test_every_public_name_has_an_entry():
    entries = re.findall(r"^### (\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(cpo_kernels.__all__) - set(entries) == {"backends"}


def test_options_that_a_docstring_leaves_to_a_class_have_its_texts():
    classes = {f"cpo_kernels.options.{cls.__name__}": cls.__doc__ for cls in (options.Head, options.Objective)}
    named = {options.Head: options.HEAD_OPTIONS, options.Objective: options.OBJECTIVE_OPTIONS}
    for name in ("linear_cpo_loss", "cpo_loss", "linear_token_logps", "linear_sequence_loss"):
        function = getattr(cpo_kernels, name)
        shown = arguments(with_all_options(inspect.cleandoc(function.__doc__), classes.__getitem__))
        for cls, own in named.items():
            taken = [option for option in own if option in inspect.signature(function).parameters]
            texts = arguments(cls.__doc__)
            missing = [option for option in taken if not shown.get(option)]
            assert not missing, f"{name}: {missing}"
            assert all(shown[option] == texts[option] for option in taken if option in ("beta", "softcap"))
