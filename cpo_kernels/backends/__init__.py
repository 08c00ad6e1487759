"""Which backends exist, which are available here, and which one a call uses.

A backend supplies the row kernels and may supply the contrast in one launch and a fused linear path; the engine exists
once. ``selection.json`` orders the backends by measured speed for each device type, and says where it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, resources
from typing import Any

import torch
from torch import Tensor

from cpo_kernels import ops, reference

from . import native, native_cuda, native_gemm, native_groups, triton_support
from .triton import tuning

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ops.RowKernels(reference.row_forward, reference.row_backward, reference.row_backward_)


def no_workspace(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Torch's products do not tell."""
    return 0


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend.

    Attributes:
        name: as users write it.
        devices: device types it runs on; None for all.
        dtypes: dtypes of logits it takes.
        rows: row kernels; signatures as in :mod:`cpo_kernels.ops`. ``forward`` is differentiable.
        gemm_: ``(a, b, out, accumulate)``, the matrix product.
        gemm_pair_: ``(a, b, high, low, accumulate)``, the product into a sum of two halves.
        gemm_workspace: ``(R, V, H, dtype)`` to the bytes that the products take besides their operands.
        column_stats: (r, V) to (2, V), largest absolute value and absolute sum of each column.
        take_columns: (r, V), (k,), (c,) to (k, c + 1), some columns of some rows, and the sum of the others.
        scale_: ``(tensor, factor)``, in place, free for a factor of 1 if it can be.
        contrast: coefficients of a chunk in one launch, or None: :mod:`cpo_kernels.objective` in plain torch.
        contrast_candidates: largest group that ``contrast`` takes.
        logits_loss: loss and gradient of logits that exist, in one launch, or None; for ``contrast_candidates`` too.
        linear_forward: log-probabilities without logits in memory, or None.
        too_old: why a device is too old for the kernels, or None.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    rows: ops.RowKernels | ops.RowOperators
    gemm_: Callable[[Tensor, Tensor, Tensor, bool], None]
    gemm_pair_: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
    gemm_workspace: Callable[[int, int, int, torch.dtype], int] = no_workspace
    column_stats: Callable[[Tensor], Tensor] = reference.column_stats
    take_columns: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.take_columns
    scale_: Callable[[Tensor, Tensor], None] = reference.scale_
    contrast: Callable[..., tuple[Tensor, Tensor]] | None = None
    contrast_candidates: int = 0
    logits_loss: Callable[..., tuple[Tensor, Tensor]] | None = None
    linear_forward: Callable[..., Any] | None = None
    too_old: Callable[[torch.device], str | None] | None = None

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take tensors of ``dtype`` on ``device``, or None."""
        if self.devices is not None and device.type not in self.devices:
            return f"backend {self.name!r} runs on {'/'.join(self.devices)} tensors, got {device}"
        if dtype not in self.dtypes:
            return f"backend {self.name!r} takes {', '.join(map(str, self.dtypes))}, got {dtype}"
        # The driver's answer cannot be traced: in compiled code, Triton's own compiler refuses.
        return None if self.too_old is None or torch.compiler.is_compiling() else self.too_old(device)


def triton_backend() -> Backend:
    """Triton's kernels, with the device's own matrix products; importing them imports triton."""
    rows = import_module("cpo_kernels.backends.triton.rows")
    contrast = import_module("cpo_kernels.backends.triton.contrast")
    gradients = import_module("cpo_kernels.backends.triton.gradients")
    linear = import_module("cpo_kernels.backends.triton.linear")
    return Backend(
        name="triton",
        devices=("cpu", "cuda") if triton_support.interpreted() else ("cuda",),
        dtypes=HALF_AND_SINGLE,
        rows=ops.declare_rows("triton_", ops.RowKernels(rows.row_forward, rows.row_backward, rows.row_backward_)),
        gemm_=ops.gemm_,
        gemm_pair_=ops.gemm_pair_,
        gemm_workspace=native_gemm.gemm_workspace if triton_support.interpreted() else no_workspace,
        column_stats=gradients.column_stats,
        scale_=gradients.scale_,
        contrast=contrast.contrast,
        contrast_candidates=contrast.MAX_CANDIDATES,
        linear_forward=linear.linear_forward,
        too_old=partial(triton_support.refusal, "triton"),
    )


def cuda_backend() -> Backend:
    """The compiled CUDA kernels, with the device's own matrix products."""
    kernels = ops.RowKernels(native_cuda.row_forward, native_cuda.row_backward, native_cuda.row_backward_)
    return Backend(
        name="cuda",
        devices=("cuda",),
        dtypes=HALF_AND_SINGLE,
        rows=ops.declare_rows("cuda_", kernels),
        gemm_=ops.gemm_,
        gemm_pair_=ops.gemm_pair_,
        contrast=native_groups.contrast,
        logits_loss=native_groups.cpo_loss,
        contrast_candidates=native_groups.MAX_CANDIDATES,
        too_old=partial(triton_support.refusal, "cuda"),
    )


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
        rows=ROWS,
        gemm_=reference.gemm_,
        gemm_pair_=reference.gemm_pair_,
    ),
    "cpu": Backend(
        name="cpu",
        devices=("cpu",),
        dtypes=HALF_AND_SINGLE,
        rows=ops.RowOperators(ops.row_forward, ops.row_backward, ops.row_backward_),
        gemm_=ops.gemm_,
        gemm_pair_=ops.gemm_pair_,
        gemm_workspace=native_gemm.gemm_workspace,
        column_stats=ops.column_stats,
        take_columns=ops.take_columns,
    ),
}

if native.available():
    native.register()
if triton_support.unavailable_reason() is None:
    BACKENDS["triton"] = triton_backend()
if native_cuda.unavailable_reason() is None:
    BACKENDS["cuda"] = cuda_backend()


def describe() -> list[Status]:
    """The state of every backend of the project, in the order of the documentation."""
    cpu_reason, triton_reason = native.unavailable_reason(), triton_support.unavailable_reason()
    cuda_reason = native_cuda.unavailable_reason()
    return [
        Status("torch", True, "plain PyTorch, any device"),
        Status("cpu", cpu_reason is None, cpu_reason or f"compiled extension, instruction set {native.isa()}"),
        Status("triton", triton_reason is None, triton_reason or triton_support.description()),
        Status("cuda", cuda_reason is None, cuda_reason or native_cuda.description()),
    ]


def available() -> list[str]:
    """Names of the backends that can be used here."""
    return [status.name for status in describe() if status.available]


# Read once, at import, and as data: `select` is traced by torch.compile, which can neither open files nor call _cpu.
AVAILABLE = tuple(available())
SELECTION = json.loads(resources.files(__name__).joinpath("selection.json").read_text())
PREFERRED: dict[str, list[str]] = SELECTION["prefer"]
FUSED_FORWARD: dict[str, dict[str, dict[str, int]]] = SELECTION["fused_forward_up_to_hidden_size"]


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


def prefers_fused_forward(backend: Backend, hidden: Tensor, weight: Tensor) -> bool:
    """Whether the backend's fused linear path measured faster than a product and the row kernel, for (R, H), (V, H).

    ``selection.json`` lists up to which H it does, by backend, architecture and dtype; what it does not list does not.
    """
    if backend.linear_forward is None:
        return False
    arch = tuning.architecture(hidden.device)
    largest: int = FUSED_FORWARD.get(backend.name, {}).get(arch, {}).get(str(hidden.dtype).removeprefix("torch."), 0)
    return weight.shape[1] <= largest
