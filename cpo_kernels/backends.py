"""The backends: which exist, which are available on this machine and why, and which one a call uses."""

from __future__ import annotations

from .kernels.backend import Backend
from .kernels.registry import BACKENDS, Status, available, describe, select

__all__ = ["BACKENDS", "Backend", "Status", "available", "describe", "select"]
