"""The registry of backends: which exist, which are available on this machine, and which one a call uses.

A backend supplies the row kernels and may supply the contrast in one launch and a fused linear path; the engine exists
once. :mod:`cpo_kernels.kernels.selection` says which backend a call uses for what, by measured speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import ops, plain, selection
from .backend import Backend, FusedForward, KeptLinear, LinearSoftmax, UnitGradient, no_workspace
from .cpu import extension as cpu_extension
from .cpu import gemm as cpu_gemm
from .cpu import groups as cpu_groups
from .cpu import linear as cpu_linear
from .cpu import rows as cpu_rows
from .cuda import extension as cuda_extension
from .cuda import groups as cuda_groups
from .cuda import hopper as cuda_hopper
from .cuda import rows as cuda_rows
from .device import CPU, GPUS, architecture, why_too_old
from .selection import Sizes
from .triton import support as triton_support

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ops.RowKernels(plain.row_forward, plain.row_backward, plain.row_backward_)


def takes_all(*_of_call: Any) -> bool:
    """Return True: the kernel takes whatever a call may have."""
    return True


def triton_backend() -> Backend:
    """Return Triton's kernels with the device's own matrix products; imports triton."""
    rows = import_module(".triton.rows", __package__)
    unit = import_module(".triton.unit", __package__)
    contrast = import_module(".triton.contrast", __package__)
    summary = import_module(".triton.summary", __package__)
    gradients = import_module(".triton.gradients", __package__)
    linear = import_module(".triton.linear", __package__)
    on_cpu = triton_support.interpreted()
    kernels = ops.RowKernels(rows.row_forward, rows.row_backward, rows.row_backward_)
    return Backend(
        name="triton",
        devices=(CPU, *GPUS) if on_cpu else GPUS,
        dtypes=HALF_AND_SINGLE,
        rows=kernels,
        differentiable_rows=ops.declare_rows("triton_", kernels).forward,
        gemm_=cpu_gemm.fastest_gemm_ if on_cpu else plain.gemm_,
        gemm_pair_=cpu_gemm.fastest_gemm_pair_ if on_cpu else plain.gemm_pair_,
        gemm_workspace=cpu_gemm.gemm_workspace if on_cpu else no_workspace,
        column_stats=gradients.column_stats,
        scale_rows_=gradients.scale_rows_,
        scale_=gradients.scale_,
        unit_gradient=UnitGradient(takes_all, unit.unit_forward_, unit.unit_finish_),
        contrast=contrast.contrast,
        summarize=summary.summarize,
        contrast_candidates=contrast.MAX_CANDIDATES,
        linear_statistics=linear.linear_forward,
        too_old=partial(why_too_old, "triton"),
        optional={"linear_forward": FusedForward(takes_all, lambda *args: linear.linear_forward(*args).logps)},
    )


def cuda_backend() -> Backend:
    """Return the compiled CUDA kernels with the device's own matrix products."""
    kernels = ops.RowKernels(cuda_rows.row_forward, cuda_rows.row_backward, cuda_rows.row_backward_)
    return Backend(
        name="cuda",
        devices=("cuda",),
        dtypes=HALF_AND_SINGLE,
        rows=kernels,
        differentiable_rows=ops.declare_rows("cuda_", kernels).forward,
        gemm_=plain.gemm_,
        gemm_pair_=plain.gemm_pair_,
        scale_=cuda_rows.scale_,
        unit_gradient=UnitGradient(cuda_rows.unit_takes, cuda_rows.unit_forward_, cuda_rows.unit_finish_),
        contrast=cuda_groups.contrast,
        logits_loss=cuda_groups.cpo_loss,
        contrast_candidates=cuda_groups.MAX_CANDIDATES,
        too_old=partial(why_too_old, "cuda"),
        optional={
            "linear_forward": FusedForward(cuda_hopper.takes, lambda *args: cuda_hopper.linear_forward(*args)[1]),
            "linear_kept": KeptLinear(
                cuda_hopper.takes,
                cuda_hopper.row_elements,
                cuda_hopper.room,
                cuda_hopper.forward,
                cuda_hopper.linear_backward_,
            ),
        },
    )


def named_check(targets: Tensor, vocab: int) -> bool:
    """Check targets by the compiled CUDA kernel, whichever backend runs the call.

    Returns False, without a check, where the GPU is too old for the kernel.
    """
    if why_too_old("cuda", targets.device) is not None:
        return False
    cuda_rows.check_targets(targets, vocab)
    return True


def register_cpu_kernels() -> None:
    """Make the compiled kernels those of the operators for CPU tensors."""
    cpu_extension.isa()  # a wrong CPO_KERNELS_CPU_ISA is an error now, not in the first training step
    ops.row_forward.register_kernel("cpu")(cpu_rows.row_forward)
    ops.row_backward.register_kernel("cpu")(cpu_rows.row_backward)


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used here, and if not, why and what to install."""

    name: str
    available: bool
    reason: str


def gemms_within(workspace: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the products of the compiled CPU kernels in a workspace of at most so many bytes."""
    products = cpu_gemm.fastest_gemm_, cpu_gemm.fastest_gemm_pair_
    return cpu_gemm.limited(products[0], workspace), cpu_gemm.limited(products[1], workspace)


BACKENDS = {
    "torch": Backend(
        name="torch",
        devices=None,
        dtypes=(*HALF_AND_SINGLE, torch.float64),
        rows=ROWS,
        differentiable_rows=plain.row_forward,
        gemm_=plain.gemm_,
        gemm_pair_=plain.gemm_pair_,
    ),
    "cpu": Backend(
        name="cpu",
        devices=("cpu",),
        dtypes=HALF_AND_SINGLE,
        rows=ops.RowKernels(cpu_rows.row_forward, cpu_rows.row_backward, cpu_rows.row_backward_),
        differentiable_rows=ops.row_forward,
        gemm_=cpu_gemm.fastest_gemm_,
        gemm_pair_=cpu_gemm.fastest_gemm_pair_,
        gemm_workspace=cpu_gemm.gemm_workspace,
        gemms_within=gemms_within,
        column_stats=cpu_rows.column_stats,
        take_columns=cpu_rows.take_columns,
        linear_softmax=LinearSoftmax(
            cpu_linear.takes, cpu_linear.floats_per_row, cpu_linear.linear_forward, cpu_linear.linear_scale
        ),
        contrast=cpu_groups.contrast,
        summarize=cpu_groups.summarize,
        count_targets=cpu_groups.count_targets,
        contrast_candidates=cpu_groups.MAX_CANDIDATES,
    ),
}

if cpu_extension.available():
    register_cpu_kernels()
if triton_support.unavailable_reason() is None:
    BACKENDS["triton"] = triton_backend()
if cuda_extension.unavailable_reason() is None:
    BACKENDS["cuda"] = cuda_backend()
    ops.TARGET_CHECKS["cuda"] = named_check


def describe() -> list[Status]:
    """Return the state of every backend of the project, in the order of the documentation."""
    cpu_reason, triton_reason = cpu_extension.unavailable_reason(), triton_support.unavailable_reason()
    cuda_reason = cuda_extension.unavailable_reason()
    return [
        Status("torch", True, "plain PyTorch, any device"),
        Status("cpu", cpu_reason is None, cpu_reason or f"compiled extension, instruction set {cpu_extension.isa()}"),
        Status("triton", triton_reason is None, triton_reason or triton_support.description()),
        Status("cuda", cuda_reason is None, cuda_reason or cuda_extension.description()),
    ]


def available() -> list[str]:
    """Return the names of the backends that can be used here."""
    return [status.name for status in describe() if status.available]


# Read once, at import: `select` is traced by torch.compile, which cannot call _cpu.
AVAILABLE = tuple(available())


def select(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> Backend:
    """Return the backend of a call.

    Args:
        name: ``"auto"`` or a backend's name.
        device: device of the tensors.
        dtype: dtype of the logits.
        sizes: of the call; None leaves the choices of ``selection.json`` out.

    Raises:
        RuntimeError: a backend that exists but is not available; the message says why and what to install.
        ValueError: an unknown name, or a backend that does not take this device or dtype.
    """
    if name == selection.AUTO:
        names = [n for n in selection.PREFERRED.get(device.type, ["torch"]) if n in AVAILABLE]
        usable = [BACKENDS[n] for n in names if BACKENDS[n].refuses(device, dtype) is None]
        return with_choices(usable[0] if usable else BACKENDS["torch"], name, device, sizes)
    if name not in AVAILABLE:
        reasons = {status.name: status.reason for status in describe()}
        if name in reasons:
            raise RuntimeError(f"backend {name!r} is not available: {reasons[name]}")
        raise ValueError(f"unknown backend {name!r}, expected 'auto' or one of {list(reasons)}")
    refusal = BACKENDS[name].refuses(device, dtype)
    if refusal:
        raise ValueError(refusal)
    return with_choices(BACKENDS[name], name, device, sizes)


def with_choices(base: Backend, name: str, device: torch.device, sizes: Sizes | None) -> Backend:
    """Return ``base`` with those kernels of any backend in it that measured faster for such a call.

    Args:
        base: the backend that serves the call where ``selection.json`` says nothing.
        name: the backend's name in the call, or ``"auto"``.
        device: device of the tensors.
        sizes: sizes of the call; None leaves the choices of ``selection.json`` out.
    """
    if sizes is None or not selection.CHOICES or torch.compiler.is_compiling():
        return base
    usable = tuple(n for n in AVAILABLE if BACKENDS[n].refuses(device, sizes.logits_dtype) is None)
    chosen = selection.choices_for(name, architecture(device), sizes, usable)
    if not chosen:
        return base
    ways: dict[str, Any] = {
        operation: BACKENDS[other].optional[operation]
        for operation, other in chosen.items()
        if operation in selection.OPTIONAL and other is not None
    }
    of = {operation: base if other is None else BACKENDS[other] for operation, other in chosen.items()}
    forward, backward = of.get("row_forward", base), of.get("row_backward", base)
    groups, whole = of.get("contrast", base), of.get("logits_loss", base)
    whole_launch = None if chosen.get("logits_loss", base.name) is None else whole.logits_loss
    unit = of.get("unit_gradient", base).unit_gradient
    launches = ((groups, groups.contrast), (whole, whole_launch))
    return replace(
        base,
        rows=ops.RowKernels(forward.rows.forward, *backward.rows[1:]),
        differentiable_rows=forward.differentiable_rows,
        unit_gradient=None if chosen.get("unit_gradient", base.name) is None else unit,
        contrast=groups.contrast,
        logits_loss=whole_launch,
        contrast_candidates=min((b.contrast_candidates for b, launch in launches if launch is not None), default=0),
        ways=ways,
    )
