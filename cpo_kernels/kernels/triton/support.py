"""Checks whether the Triton backend can be used, without importing triton, which takes a second.

Nothing here creates a CUDA context: importing the package must not, or processes could not be forked after it.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

import torch

from cpo_kernels.kernels.device import count_gpus

# Triton's own rule for its switches.
TRUE_VALUES = ("1", "true", "yes", "on", "y")


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in TRUE_VALUES


@cache
def unavailable_reason() -> str | None:
    """Say why the backend cannot be used and what to do about it; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`"
    # Counted through the driver's management library, where there is one.
    if not interpreted() and count_gpus() == 0:
        return "no NVIDIA or AMD GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    try:
        import_module(".linear", __package__)
    except Exception as error:  # whatever a triton that does not fit raises
        return f"its kernels cannot be imported ({type(error).__name__}: {error}); install triton 3.4 or newer"
    return interpreter_failure() if interpreted() else None


def interpreter_failure() -> str | None:
    """Say why Triton's interpreter cannot run a kernel; None if it can.

    The interpreter computes with NumPy and not every pair of versions fits: from 2.4 on, NumPy no longer takes the
    array of one element, which the interpreter of triton 3.6 has for a scalar, as the bound of a loop.
    """
    gradients = import_module(".gradients", __package__)
    try:
        gradients.scale_(torch.ones(1, device="cpu"), torch.zeros(1, device="cpu"))
    except Exception as error:  # whatever NumPy raises
        versions = f"triton {version('triton')} with NumPy {version('numpy')}"
        fitting = "install triton 3.7 or newer, or NumPy below 2.4"
        return f"the interpreter of {versions} cannot run its kernels ({error}); {fitting}"
    return None


def description() -> str:
    """Name what runs the kernels, and its version."""
    found = import_module("triton").__version__
    return f"triton {found}, in the interpreter" if interpreted() else f"triton {found}"
