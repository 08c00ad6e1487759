"""Errors that the person who called a command can mend; they are told without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something in the configuration, on the command line or in the data; the message says what and where."""


@contextmanager
def input_errors(*more: type[Exception]) -> Iterator[None]:
    """Raise what goes wrong inside, a ``ValueError`` or a type in ``more``, as an error about the input."""
    caught: tuple[type[Exception], ...] = (ValueError, *more)
    try:
        yield
    except InputError:
        raise
    except caught as error:
        raise InputError(str(error)) from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that there is no ``what`` of this name, and which known name was probably meant."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no {what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
