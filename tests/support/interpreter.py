"""Corrections of what Triton's interpreter does otherwise than a GPU, so that one set of tests serves both."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch


def interpreter() -> ModuleType:
    """Return the module of Triton that runs kernels with numpy."""
    return import_module("triton.runtime.interpreter")


def rounding(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Make the interpreter round float32 to the nearest bfloat16, where it cuts bits off."""

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, rounding_mode)
        single = np.array(values).view(np.float32)
        return torch.from_numpy(single).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    return convert_float
