"""The compiled CUDA extension: whether it can be used here, and where it launches."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.device import count_gpus, current_stream, is_amd, is_gpu


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension, or None and the reason why it cannot be used."""
    try:
        return import_module("..._cuda", __package__), None
    except ModuleNotFoundError:
        return None, (
            f"this installation has no CUDA extension: it was {cpu_extension.cuda_summary()}; backend='triton' runs on "
            f"NVIDIA GPUs without it"
        )
    except ImportError as error:
        return None, f"the CUDA extension cannot be loaded ({error}); backend='triton' runs on NVIDIA GPUs"


def unavailable_reason() -> str | None:
    """Say why the CUDA kernels cannot be used here; None if they can."""
    module, reason = _load()
    if module is None:
        return reason
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver == 0:
        return "no NVIDIA driver was found"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver supports CUDA {_version(driver)}, the extension was compiled with CUDA {_version(runtime)}; "
            f"update the driver, rebuild with an older toolkit, or use backend='triton'"
        )
    # Counting makes no CUDA context, which an import must not.
    if count_gpus() == 0 or is_amd():
        return "torch finds no NVIDIA GPU"
    return None


def description() -> str:
    """Say how the extension was compiled."""
    return f"compiled extension, CUDA {_version(load().runtime_version())}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def load() -> ModuleType:
    """Return the extension, or raise a ``RuntimeError`` that says why it cannot be used."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"backend 'cuda' is not available: {reason}")
    return module


def queue(device: torch.device) -> dict[str, int]:
    """Return the device and stream to launch on: the current stream of the tensors' device."""
    if not is_gpu(device):
        raise ValueError(f"logits are on {device}; expected a CUDA tensor")
    return {"device": device.index, "stream": current_stream(device)}


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)
