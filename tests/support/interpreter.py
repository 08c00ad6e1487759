"""What Triton's interpreter does otherwise than a GPU, put right, so that one set of tests serves both."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch


def interpreter() -> ModuleType:
    """The module of Triton that runs kernels with numpy."""
    return import_module("triton.runtime.interpreter")


def rounding(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The interpreter's conversion of floats, but for float32 to bfloat16: to the nearest, where it cuts bits off."""

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, rounding_mode)
        single = np.array(values).view(np.float32)
        return torch.from_numpy(single).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    return convert_float
