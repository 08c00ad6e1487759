"""Checks that another package has the names that an integration uses, and temporary replacements of some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

# What every refusal of a TRL configuration offers.
WAY_OUT = "trl.DPOTrainer takes what TRL has, with patch_fused_head() on our products"


def require_names(package: str, tested: str, owner: object, *names: str) -> None:
    """Check that an object of another package still has the names that an integration builds on.

    Args:
        package: name of the distribution, whose version the message gives.
        tested: versions with which the integration is tested.
        owner: a module, a class or an object.
        names: attributes that it must have.

    Raises:
        RuntimeError: a name is missing; the message has it and both versions.
    """
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        where = getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(
            f"{package} {version(package)} has no {', '.join(f'{where}.{name}' for name in missing)}, which this "
            f"integration builds on; it is tested with {package} {tested}. Install that version, or use "
            "attach_linear_loss and a compute_loss of your own (docs/own-loop.md)"
        )


@contextmanager
def replaced(owner: object, values: dict[str, Any]) -> Iterator[None]:
    """Give attributes of ``owner`` other values within the context."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
