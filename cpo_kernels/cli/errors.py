"""Errors that the person who called a command can mend; they are told without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something in the configuration, on the command line or in the data; the message says what and where."""


@contextmanager
def input_errors(*more: type[Exception]) -> Iterator[None]:
    """What goes wrong inside is about the input: ``ValueError``, and the types in ``more``."""
    caught: tuple[type[Exception], ...] = (ValueError, *more)
    try:
        yield
    except InputError:
        raise
    except caught as error:
        raise InputError(str(error)) from error
