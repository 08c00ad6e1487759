"""Warnings of other libraries about calls that the commands make and their users cannot change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Each the beginning of a message: the layers of GPT-2 under LoRA, and a head that is saved because it has adapters.
KNOWN = ("fan_in_fan_out is set to", "Setting `save_embedding_layers` to `True`")


@contextmanager
def without_warnings_of_libraries() -> Iterator[None]:
    """Ignore, within the context, what libraries plan for their next releases, and warnings that change nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for message in KNOWN:
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
