"""The command ``cpo-kernels``, also ``python -m cpo_kernels``: train, negatives, evaluate, ensemble, info."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .cli import help as texts
from .cli.errors import InputError, unknown
from .cli.processes import leave_process_group

# What the commands need beside the package itself: the extra "trainer".
TRAINER = ("accelerate", "datasets", "jinja2", "peft", "tokenizers", "tqdm", "transformers", "xxhash", "yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for a mistake in what was asked for."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(texts.overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in texts.COMMANDS:
        message = f"{unknown('command', command, texts.COMMANDS)}; expected one of {', '.join(texts.COMMANDS)}"
        print(f"cpo-kernels: {message}", file=sys.stderr)
        return 2
    if command == "info":
        return _info(rest)
    try:
        if command in texts.DESCRIPTIONS and ({"-h", "--help"} & set(rest) or not rest):
            print(importlib.import_module("cpo_kernels.cli.parsing").help_of(command))
            return 0
        importlib.import_module(f"cpo_kernels.cli.{command}").run(rest)
    except InputError as error:
        print(f"cpo-kernels {command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in TRAINER:
            raise
        print(f"cpo-kernels {command}: {error}; pip install 'cpo-kernels[trainer]'", file=sys.stderr)
        return 2
    return 0


def _info(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] not in ("-h", "--help"):
        print(f"cpo-kernels info: takes no arguments, got {' '.join(arguments)!r}", file=sys.stderr)
        return 2
    if arguments:
        print(f"usage: cpo-kernels info\n\n{texts.COMMANDS['info']}")
        return 0
    from .cli.info import report

    print(report())
    return 0


def command() -> int:
    """:func:`main` as a process of its own, which also leaves the group of processes that it trained with."""
    status = main()
    if status == 0:  # after a mistake the others may be waiting for this process
        leave_process_group()
    return status


if __name__ == "__main__":
    sys.exit(command())
