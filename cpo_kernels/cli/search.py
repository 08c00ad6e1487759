"""``cpo-kernels options``: every option with its default and its text, and a search among them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cpo_kernels.options import Head, Objective

from .errors import InputError, unknown
from .parsing import option_groups

FUNCTIONS = {
    Objective: "linear_cpo_loss, cpo_loss, plan and their modules: the objective",
    Head: "every function that takes a head: linear_cpo_loss, linear_sequence_logps, ...",
}


@dataclass(frozen=True)
class Option:
    """An option: its name, its default, who takes it, and what it is."""

    name: str
    default: Any
    taken_by: str
    text: str

    def has(self, word: str) -> bool:
        """Tell whether the name or the text has a word; a hyphen counts as an underscore."""
        return _plain(word) in _plain(f"{self.name} {self.text}")

    def shown(self, width: int) -> str:
        """Return a line of name, default and taker, and the text below it."""
        text = textwrap.fill(self.text, width, initial_indent="    ", subsequent_indent="    ")
        return f"{self.name} = {self.default}    [{self.taken_by}]\n{text}"


def run(arguments: Sequence[str]) -> None:
    """Print the options that have all words of ``arguments``, those with the words in their names first."""
    options = list(every_option())
    found = [option for option in options if all(map(option.has, arguments))]
    if not found:
        raise InputError(unknown("option", " ".join(arguments), [option.name for option in options]))
    found.sort(key=lambda option: not all(_plain(word) in option.name for word in arguments))  # the order is kept
    width = min(shutil.get_terminal_size().columns, 120)
    print("\n\n".join(option.shown(width) for option in found))


def every_option() -> Iterator[Option]:
    """Yield the options of the functions, then those of the commands in the order of their help text."""
    for cls, takers in FUNCTIONS.items():
        texts = argument_texts(cls)
        for item in dataclasses.fields(cls):
            yield Option(item.name, item.default, takers, texts[item.name])
    for group in option_groups():
        for item in dataclasses.fields(group):
            text = item.metadata.get("help", "")
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            yield Option(item.name, default, group._argument_group_name, " ".join(text.replace("%%", "%").split()))


def argument_texts(cls: type) -> dict[str, str]:
    """Return what a docstring says of each argument, without its markup."""
    # Python 3.13 and later keep docstrings without their indentation.
    text = inspect.cleandoc(cls.__doc__ or "") + "\n"
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^ {4}(\w+): (.*\n(?: {5,}.*\n)*)", section[1] if section else "", re.MULTILINE)
    return {name: _without_markup(text) for name, text in entries}


def _without_markup(text: str) -> str:
    text = re.sub(r":\w+:`~?\.?([^`]*)`", r"\1", text)
    return " ".join(text.replace("``", "").split())


def _plain(text: str) -> str:
    return text.lower().replace("-", "_")
