"""Makes docs/options.md, every option from A to Z, from where options are defined.

Those of functions are the fields of ``cpo_kernels.options``, described by the docstrings there. Fields of ``CPOConfig``
and options of the command are described by the texts that ``cpo-kernels train --help`` shows.
"""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

from build_tools.docstrings import arguments, markdown
from cpo_kernels.cli.options import RunConfig
from cpo_kernels.options import Head, Objective
from cpo_kernels.trainer.config import CPOConfig

INTRODUCTION = """\
# Options A to Z

<!-- Written by `make docs-pages` from the docstrings of cpo_kernels/options.py and the texts of the fields of CPOConfig
and of the command; a test fails when they differ. -->

Where an option is used stands before its text:

- *function*: a keyword of `linear_cpo_loss` and of the functions beside it. A function has those that mean something to
  it: [Functions and classes](api.md) lists them one by one.
- *trainer*: a field of `CPOConfig`, which is also a key of a configuration file and an option of the command,
  `--name value`. All other fields are those of `transformers.TrainingArguments`.
- *command*: a key of a configuration file, and an option of the command, alone.

`cpo-kernels train --help` shows the last two, and those of `TrainingArguments`. A name that does not exist is answered
with the nearest one that does.
"""


def of_functions() -> dict[str, tuple[Any, str]]:
    """Return default and text of every option of the head and of the objective."""
    found = {}
    for options in (Head, Objective):
        texts = arguments(options.__doc__)
        found |= {field.name: (field.default, texts[field.name]) for field in dataclasses.fields(options)}
    return found


def of_fields(configuration: type) -> dict[str, tuple[Any, str]]:
    """Return default and text of the fields that a class adds to those of transformers."""
    own = {name for cls in configuration.__mro__ if cls.__module__.startswith("cpo_kernels") for name in vars(cls)}
    fields = [field for field in dataclasses.fields(configuration) if field.name in own]
    return {field.name: (field.default, field.metadata["help"]) for field in fields}


def page() -> str:
    """Return the text of docs/options.md."""
    sources = {"function": of_functions(), "trainer": of_fields(CPOConfig), "command": of_fields(RunConfig)}
    names = sorted(set().union(*sources.values()))
    lines = [INTRODUCTION.rstrip()]
    for letter, group in groupby(names, key=lambda name: name[0].upper()):
        lines += ["", f"## {letter}", ""]
        for name in group:
            uses = [(source, *options[name]) for source, options in sources.items() if name in options]
            for source, default, text in uses:
                lines.append(f"- **`{name}`** = `{default!r}` (*{source}*): {markdown(text).rstrip('.')}.")
    return "\n".join(lines) + "\n"
