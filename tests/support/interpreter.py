"""Corrections of Triton's interpreter: rounding as on a GPU, so that one set of tests serves both, and less work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


def sparing(module: ModuleType) -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, value) for the interpreter's ``module``: it then leaves out work that changes nothing.

    It puts its own functions into Triton's language in every call of a device function, where once a launch does, and
    computes for every integer operation whether it overflows without looking at the outcome unless it debugs. Together
    that is two thirds of the time.
    """
    patch, launch, builder = module._patch_lang, module.GridExecutor.__call__, module.interpreter_builder
    patched: set[str] = set()  # the Python modules whose functions the current launch has called
    table, known = module._get_np_dtype, {}

    def patch_once(function: Callable[..., Any]) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(executor, *args, **kwargs)

    def np_dtype(dtype: Any) -> np.dtype:
        if dtype.name not in known:
            known[dtype.name] = table(dtype)
        return known[dtype.name]

    return [
        (module, "_get_np_dtype", np_dtype),
        (module, "_patch_lang", patch_once),
        (module.GridExecutor, "__call__", launch_anew),
        (builder, "options", replace(builder.options, sanitize_overflow=builder.options.debug)),
    ]
