"""Whether the Triton backend can be used here, found out without importing triton, which takes a second."""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

# Triton's own rule for its switches.
TRUE_VALUES = ("1", "true", "yes", "on", "y")
# tl.dot of bfloat16 and cp.async need it.
OLDEST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in TRUE_VALUES


@cache
def unavailable_reason() -> str | None:
    """Why the backend cannot be used and what to do about it, or None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no NVIDIA or AMD GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"the GPU has compute capability {found}, 8.0 is needed; backend='torch' runs on any device"
    return None


def description() -> str:
    """What runs the kernels."""
    version = metadata.version("triton")
    return (
        f"triton {version}, in the interpreter"
        if interpreted()
        else f"triton {version} on {torch.cuda.get_device_name()}"
    )
