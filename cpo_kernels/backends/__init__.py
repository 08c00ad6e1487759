"""Which backends exist, which are available here, and which one a call uses.

A backend supplies the row kernels; the engine exists once. ``selection.json`` orders the backends by measured speed
for each device type, and says where the measurements are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import ops, reference

from . import native

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def no_workspace(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Torch's products do not tell."""
    return 0


def reference_backward_(logits: Tensor, *args: Any) -> None:
    """:func:`cpo_kernels.reference.row_backward`, written over the logits."""
    logits.copy_(reference.row_backward(logits, *args))


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend; signatures as in :mod:`cpo_kernels.ops`.

    ``gemm_workspace(R, V, H, dtype)`` bounds the bytes that the products take.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    row_forward: Callable[..., tuple[Tensor, Tensor]]
    row_backward: Callable[..., Tensor]
    row_backward_: Callable[..., None]
    gemm_: Callable[[Tensor, Tensor, Tensor, bool], None]
    gemm_pair_: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
    gemm_workspace: Callable[[int, int, int, torch.dtype], int] = no_workspace

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take tensors of ``dtype`` on ``device``, or None."""
        if self.devices is not None and device.type not in self.devices:
            return f"backend {self.name!r} runs on {'/'.join(self.devices)} tensors, got {device}"
        if dtype not in self.dtypes:
            return f"backend {self.name!r} takes {', '.join(map(str, self.dtypes))}, got {dtype}"
        return None


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used here, and if not, why and what to install."""

    name: str
    available: bool
    reason: str


BACKENDS = {
    "torch": Backend(
        name="torch",
        devices=None,
        dtypes=(*HALF_AND_SINGLE, torch.float64),
        row_forward=reference.row_forward,
        row_backward=reference.row_backward,
        row_backward_=reference_backward_,
        gemm_=reference.gemm_,
        gemm_pair_=reference.gemm_pair_,
    ),
    "cpu": Backend(
        name="cpu",
        devices=("cpu",),
        dtypes=HALF_AND_SINGLE,
        row_forward=ops.row_forward,
        row_backward=ops.row_backward,
        row_backward_=ops.row_backward_,
        gemm_=ops.gemm_,
        gemm_pair_=ops.gemm_pair_,
        gemm_workspace=native.gemm_workspace,
    ),
}

PLANNED = {
    "triton": "not part of this version of cpo_kernels; backend='torch' runs on any device",
    "cuda": "not part of this version of cpo_kernels; backend='torch' runs on any device",
}

if native.available():
    native.register()


def describe() -> list[Status]:
    """The state of every backend of the project, in the order of the documentation."""
    cpu_reason = native.unavailable_reason()
    return [
        Status("torch", True, "plain PyTorch, any device"),
        Status("cpu", cpu_reason is None, cpu_reason or f"compiled extension, instruction set {native.isa()}"),
        *(Status(name, False, reason) for name, reason in PLANNED.items()),
    ]


def available() -> list[str]:
    """Names of the backends that can be used here."""
    return [status.name for status in describe() if status.available]


# Read once, at import, and as data: `select` is traced by torch.compile, which can neither open files nor call _cpu.
AVAILABLE = tuple(available())
PREFERRED: dict[str, list[str]] = json.loads(resources.files(__name__).joinpath("selection.json").read_text())["prefer"]


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a call.

    Args:
        name: ``"auto"`` or a backend's name.
        device: device of the tensors.
        dtype: dtype of the logits.

    Raises:
        RuntimeError: a backend that exists but is not available; the message says why and what to install.
        ValueError: an unknown name, or a backend that does not take this device or dtype.
    """
    if name == "auto":
        names = [n for n in PREFERRED.get(device.type, ["torch"]) if n in AVAILABLE]
        usable = [BACKENDS[n] for n in names if BACKENDS[n].refuses(device, dtype) is None]
        return usable[0] if usable else BACKENDS["torch"]
    if name not in AVAILABLE:
        reasons = {status.name: status.reason for status in describe()}
        if name in reasons:
            raise RuntimeError(f"backend {name!r} is not available: {reasons[name]}")
        raise ValueError(f"unknown backend {name!r}, expected 'auto' or one of {list(reasons)}")
    refusal = BACKENDS[name].refuses(device, dtype)
    if refusal:
        raise ValueError(refusal)
    return BACKENDS[name]
