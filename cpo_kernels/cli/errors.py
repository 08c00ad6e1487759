"""Errors that the person who called a command can mend; they are told without a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What the commands need beside the package itself: the extra "trainer".
TRAINER = ("accelerate", "datasets", "jinja2", "peft", "tokenizers", "tqdm", "transformers", "xxhash", "yaml")
FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit statuses; the last is that of shells for Ctrl-C


class InputError(ValueError):
    """Something in the configuration, on the command line or in the data; the message says what and where."""


@contextmanager
def input_errors(*more: type[Exception]) -> Iterator[None]:
    """Raise what goes wrong inside, a ``ValueError`` or a type in ``more``, as an error about the input.

    A server that fails is no fault of the input.
    """
    caught: tuple[type[Exception], ...] = (ValueError, *more)
    try:
        yield
    except InputError:
        raise
    except caught as error:
        if _is_of_a_server(error):
            raise
        raise InputError(str(error)) from error


def explain(error: Exception) -> tuple[str, int] | None:
    """Say in one sentence what went wrong, with the exit status; None for an error of the program, not of its use."""
    if isinstance(error, InputError):
        return str(error), MISUSED
    if isinstance(error, ImportError):
        return _explain_import(error)
    if isinstance(error, OSError):
        return _explain_system(error), FAILED
    return (str(error), FAILED) if _is_of_a_server(error) else None


def _is_of_a_server(error: BaseException) -> bool:
    endpoint = sys.modules.get("cpo_kernels.negatives.endpoint")  # not imported for its own sake
    return endpoint is not None and isinstance(error, endpoint.EndpointError)


def _explain_import(error: ImportError) -> tuple[str, int] | None:
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in TRAINER:
        return f"{error}; pip install 'cpo-kernels[trainer]'", MISUSED
    if sys.modules.get("torch") is None:  # what fails for want of it may name something else
        return f"torch cannot be imported ({error}); pip install torch", FAILED
    return None


def _explain_system(error: OSError) -> str:
    """Name the file and what is wrong with it, where the system says so: a disk that is full, a path that is a file."""
    if error.filename is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    return f"{error.filename}: {error.strerror}"


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that there is no ``what`` of this name, and which known name was probably meant."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no {what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
