"""Corrections of Triton's interpreter: rounding as on a GPU, so that one set of tests serves both, and less of the same."""

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


def patching_once_a_launch(module: ModuleType) -> dict[tuple[Any, str], Callable[..., Any]]:
    """Return what replaces attributes of the interpreter's ``module`` so that a launch patches Triton's language once.

    The interpreter puts its own functions into the language in every call of a device function too, as if it were a
    launch: half of the time of a launch, for what is in place already.
    """
    patch, launch = module._patch_lang, module.GridExecutor.__call__
    patched: set[str] = set()  # the Python modules of the functions that the current launch has called

    def patch_lang(function: Callable[..., Any]) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(executor, *args, **kwargs)

    return {(module, "_patch_lang"): patch_lang, (module.GridExecutor, "__call__"): call}
