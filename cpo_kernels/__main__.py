"""The command ``cpo-kernels``, also ``python -m cpo_kernels``: train, negatives, evaluate, ensemble, info, options."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from .cli import help as texts
from .cli.errors import FAILED, INTERRUPTED, MISUSED, InputError, explain, unknown
from .cli.processes import leave_process_group
from .cli.quiet import without_warnings_of_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for a mistake in the arguments, 1 for a failure."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(texts.overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(texts.version())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in texts.COMMANDS:
        message = f"{unknown('command', command, texts.COMMANDS)}; expected one of {', '.join(texts.COMMANDS)}"
        print(f"cpo-kernels: {message}", file=sys.stderr)
        return MISUSED
    try:
        with without_warnings_of_libraries():
            _run(command, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # unwritten output must not fail at exit
        return FAILED
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        message, status = explained
        print(f"cpo-kernels {command}: {message}", file=sys.stderr)
        return status
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command == "info":
        _info(arguments)
    elif command in texts.DESCRIPTIONS and ({"-h", "--help"} & set(arguments) or not arguments):
        print(importlib.import_module("cpo_kernels.cli.parsing").help_of(command))
    elif command == "options" and {"-h", "--help"} & set(arguments):
        print(texts.OPTIONS)
    else:
        module = {"options": "search"}.get(command, command)
        importlib.import_module(f"cpo_kernels.cli.{module}").run(arguments)


def _info(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] not in ("-h", "--help"):
        raise InputError(f"takes no arguments, got {' '.join(arguments)!r}")
    if arguments:
        print(f"usage: cpo-kernels info\n\n{texts.COMMANDS['info']}")
        return
    from .cli.info import report

    print(report())


def command() -> int:
    """Run :func:`main` as a whole process, and leave the process group of distributed training at its end."""
    try:
        status = main()
    except KeyboardInterrupt:
        print(f"cpo-kernels {' '.join(sys.argv[1:2])}: interrupted", file=sys.stderr)
        return INTERRUPTED
    if status == 0:  # after a failure, other processes may still wait for this one
        leave_process_group()
    return status


if __name__ == "__main__":
    sys.exit(command())
