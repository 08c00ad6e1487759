"""Targets of other libraries, in which any value may say that there is no token, as ours, in which -100 does."""

from __future__ import annotations

import torch
from torch import Tensor

from cpo_kernels.kernels.device import is_host
from cpo_kernels.kernels.numerics import IGNORE_INDEX


def without_ignored(targets: Tensor, ignore_index: int) -> Tensor:
    """Return targets of any shape and integer dtype as int64, with -100 where they are ``ignore_index``.

    Raises:
        ValueError: targets that are no integers, or -100 where that is not the ``ignore_index``: it would silently
            count as no token. On a GPU the check is a device assertion, which does not wait.
    """
    targets = as_int64(targets)
    if ignore_index == IGNORE_INDEX:
        return targets
    return mark_absent(targets, targets == ignore_index, f"ignore_index={ignore_index}")


def mark_absent(targets: Tensor, absent: Tensor, otherwise: str) -> Tensor:
    """Return targets as int64, with -100 where they are ``absent`` (bool, of their shape), and nowhere else.

    ``otherwise`` names what says that there is no token, for the message of the ``ValueError`` that any other -100 is.
    """
    targets = as_int64(targets)
    stray = (targets == IGNORE_INDEX) & ~absent
    # The engine refuses -1 wherever it checks targets: on a GPU, and in compiled code, without waiting.
    if not torch.compiler.is_compiling() and is_host(targets.device) and stray.any():
        place = tuple(stray.nonzero()[0].tolist())
        raise ValueError(f"target {place} is {IGNORE_INDEX}, expected a word or {otherwise}")
    return targets.masked_fill(stray, -1).masked_fill(absent, IGNORE_INDEX)


def as_int64(targets: Tensor) -> Tensor:
    """Return targets as int64; raise ``ValueError`` unless they are integers."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    return targets.long()
