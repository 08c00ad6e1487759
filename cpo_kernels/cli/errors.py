"""Errors that the user of a command can mend, which are reported without a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# The packages of the extra "trainer", which the commands need.
TRAINER = ("accelerate", "datasets", "jinja2", "peft", "tokenizers", "tqdm", "transformers", "xxhash", "yaml")
FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit statuses; shells use the last one for Ctrl-C


class InputError(ValueError):
    """An error in the configuration, on the command line or in the data; the message says what and where."""


@contextmanager
def input_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn a ``ValueError``, or an error of a type in ``more``, raised within the context into an ``InputError``.

    An error of a server is left as it is, since the input is not at fault.
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
    """Return a sentence about an error and the exit status; None for an error of the program itself."""
    if isinstance(error, InputError):
        return str(error), MISUSED
    if isinstance(error, ImportError):
        return _explain_import(error)
    if isinstance(error, OSError):
        return _explain_system(error), FAILED
    return (str(error), FAILED) if _is_of_a_server(error) else None


def _is_of_a_server(error: BaseException) -> bool:
    endpoint = sys.modules.get("cpo_kernels.negatives.endpoint")  # not imported only to check this
    return endpoint is not None and isinstance(error, endpoint.EndpointError)


def _explain_import(error: ImportError) -> tuple[str, int] | None:
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in TRAINER:
        return f"{error}; pip install 'cpo-kernels[trainer]'", MISUSED
    if sys.modules.get("torch") is None:  # an import that fails without torch may name another module
        return f"torch cannot be imported ({error}); pip install torch", FAILED
    return None


def _explain_system(error: OSError) -> str:
    """Name the file of a system error and its fault, if the error has them: a full disk, a path that is a file."""
    if error.filename is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    return f"{error.filename}: {error.strerror}"


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that there is no ``what`` of this name, and which known name was probably meant."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no {what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
