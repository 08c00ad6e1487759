"""Progress bars of work that may take long."""

from __future__ import annotations

from importlib import import_module
from typing import Any

DELAY = 3.0  # seconds before a bar is shown


def progress_bar(what: str, unit: str, total: int, disable_tqdm: bool = False) -> Any:
    """Make a bar with rate and time left: on a terminal only, and only if the work takes more than a few seconds.

    Args:
        what: what is done, the text in front of the bar.
        unit: what is counted.
        total: how many of them there are.
        disable_tqdm: show no bar. Nor is one shown after ``transformers.utils.logging.disable_progress_bar()``.

    Returns:
        A context manager with a method ``update(count)``.
    """
    try:
        module = import_module("transformers.utils.logging")
    except ImportError:  # a server is asked without it
        module = import_module("tqdm.auto")
    # None shows a bar on a terminal only, and leaves it there unless it is within another.
    disable = True if disable_tqdm else None
    return module.tqdm(desc=what, unit=unit, total=total, disable=disable, leave=None, delay=DELAY, dynamic_ncols=True)
