"""The device of the tests; this module can be imported before any that imports Triton."""

from __future__ import annotations

import os

import torch


def chosen_device() -> torch.device:
    """Return ``CPO_KERNELS_TEST_DEVICE``, or the GPU where there is one, or the CPU."""
    return torch.device(os.environ.get("CPO_KERNELS_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


DEVICE = chosen_device()
