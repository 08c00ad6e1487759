"""What docstrings say, for the pages of docs/ that are made from them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\n((?: .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)
# Arguments that are left to a class: "beta, ..., num_target_tokens: see :class:`cpo_kernels.options.Objective`."
ELSEWHERE = re.compile(r"^( +)(\w+), \.\.\., (\w+): .*?:class:`([\w.]+)`.*$(?:\n\1 +.*$)*", re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?:~[\w.]*\.)?([^`]+)`")


def sections(docstring: str) -> dict[str, str]:
    """Return the sections of a docstring by title; "" is the text before and between them."""
    text = inspect.cleandoc(docstring) + "\n"
    return dict(SECTION.findall(text)) | {"": SECTION.sub("", text).strip()}


def entries(section: str) -> dict[str, str]:
    """Return what a section says of each name, in one line; names that share a text have it each."""
    return {
        name.lstrip("*"): " ".join(text.split()) for names, text in ENTRY.findall(section) for name in names.split(", ")
    }


def arguments(docstring: str) -> dict[str, str]:
    """Return the texts of "Args:" by name."""
    return entries(sections(docstring).get("Args", ""))


def with_all_options(docstring: str, docstring_of: Callable[[str], str]) -> str:
    """Return a docstring with the texts of the options that it leaves to classes.

    Args:
        docstring: that of a function.
        docstring_of: returns the docstring of a class, by its full name.
    """

    def options(match: re.Match[str]) -> str:
        indent, first, last, where = match.groups()
        texts = arguments(docstring_of(where))
        names = list(texts)
        shown = names[names.index(first) : names.index(last) + 1]
        return "\n".join(f"{indent}{name}: {texts[name]}" for name in shown)

    return ELSEWHERE.sub(options, inspect.cleandoc(docstring))


def markdown(text: str) -> str:
    """Return a text of a docstring as Markdown that shows every character outside of code."""
    code = re.split(r"(`[^`]*`)", ROLE.sub(r"`\1`", text).replace("``", "`"))
    return "".join(part if part.startswith("`") else re.sub(r"([*<\[|])", r"\\\1", part) for part in code)
