"""Runs calls in processes of their own; one that dies says how, and leaves no children."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn
from unittest.mock import patch

import torch


class ProcessError(Exception):
    """Says why a process has no result: what its call raised, or how it ended."""


_answers: Connection  # of a process that call_alone has started


def call_alone(
    function: Callable[..., Any], *args: Any, preload: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Any:
    """Return what a function of a module returns in a process, and a process group, of its own.

    What it takes and returns can be pickled, and is no tensor. Modules to `preload` are imported once for all such
    processes, which are then forked; not where there is a GPU, since a process that has looked for one must not be.
    `environment` holds variables besides those of this process. Raise ProcessError if there is no result.
    """
    forked = bool(preload) and not torch.cuda.is_available()
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload([__name__, *preload])
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, args))
    with patch.dict(os.environ, environment or {}):
        process.start()
    theirs.close()
    try:
        result, error = answers.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        result, error = None, f"ended with {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
    finally:
        end_group(process.pid)
        process.kill()
        process.join()
    if error:
        raise ProcessError(error)
    return result


def _serve(answers: Connection, function: Callable[..., Any], args: Sequence[Any]) -> None:
    global _answers
    _answers = answers
    os.setsid()
    try:
        answers.send((function(*args), ""))
    except Exception as error:  # whatever the call raises
        answers.send((None, summary(error)))


def end_with(result: Any) -> NoReturn:
    """End this process with a result, from any of its threads: a call in another one cannot be interrupted."""
    _answers.send((result, ""))
    os._exit(0)


def end_group(group: int) -> None:
    """End what is left of a process group: a compiler, for instance."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def summary(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
