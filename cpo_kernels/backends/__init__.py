"""Which backends exist, which are available here, and which one a call uses.

A backend supplies the row kernels and may supply the contrast in one launch and a fused linear path; the engine exists
once. :mod:`cpo_kernels.backends.selection` says which backend a call uses for what, by measured speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels import ops, reference

from . import native, native_cuda, native_gemm, native_groups, native_hopper, selection, triton_support
from .selection import Sizes
from .triton import tuning

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ops.RowKernels(reference.row_forward, reference.row_backward, reference.row_backward_)


def no_workspace(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Torch's products do not tell."""
    return 0


class KeptLinear(NamedTuple):
    """A fused linear path that leaves what the gradient needs instead of logits, in the dtype of hidden.

    Attributes:
        takes: ``(hidden, weight)``, whether it takes these matrices.
        row_elements: V to the elements of the inputs' dtype that a row takes.
        room: ``(R, hidden, V)`` to memory for blocks of up to R rows.
        forward: ``(room or None, hidden, weight, targets, row_starts, bias, *transform)`` to stats (2, R), logps (N,),
            and what was kept: None without room.
        backward_: ``(kept, targets, row_starts, stats, logps, coef, *transform)`` to the gradient (R, V), over it.
    """

    takes: Callable[[Tensor, Tensor], bool]
    row_elements: Callable[[int], int]
    room: Callable[[int, Tensor, int], Any]
    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward_: Callable[..., Tensor]


class RowGradient(NamedTuple):
    """Forward and gradient of rows in one read and one write, for coefficients that are known beforehand.

    Attributes:
        takes: logits, whether their rows fit.
        run_: ``(logits, targets, row_starts, coef, *head, grad_dtype)`` to stats (2, R) and logps (N,).
    """

    takes: Callable[[Tensor], bool]
    run_: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend, or what serves one call, which may be of several.

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
        linear_statistics: log-probabilities, entropies and samples without logits in memory, or None.
        too_old: why a device is too old for the kernels, or None.
        optional: kernels that a call gets only where they measured faster than what they go around, by operation.
        row_gradient_: one of them, in a backend that serves a call; else None, like the two after it.
        linear_forward: ``(hidden, weight, targets, row_starts, *head)`` to log-probabilities (N,), without logits.
        linear_kept: see :class:`KeptLinear`.
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
    linear_statistics: Callable[..., Any] | None = None
    too_old: Callable[[torch.device], str | None] | None = None
    optional: Mapping[str, Any] = field(default_factory=dict)
    row_gradient_: RowGradient | None = None
    linear_forward: Callable[..., Tensor] | None = None
    linear_kept: KeptLinear | None = None

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take tensors of ``dtype`` on ``device``, or None."""
        if self.devices is not None and device.type not in self.devices:
            return f"backend {self.name!r} runs on {'/'.join(self.devices)} tensors, got {device}"
        if dtype not in self.dtypes:
            return f"backend {self.name!r} takes {', '.join(map(str, self.dtypes))}, got {dtype}"
        # The driver's answer cannot be traced: in compiled code, Triton's own compiler refuses.
        return None if self.too_old is None or torch.compiler.is_compiling() else self.too_old(device)

    def with_rows(self, rows: ops.RowKernels | ops.RowOperators) -> Backend:
        """Other row kernels, and no path around them: they do what the others do not."""
        return replace(
            self, rows=rows, linear_statistics=None, row_gradient_=None, linear_forward=None, linear_kept=None
        )


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
        linear_statistics=linear.linear_forward,
        too_old=partial(triton_support.refusal, "triton"),
        optional={"linear_forward": lambda *args: linear.linear_forward(*args).logps},
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
        optional={
            "row_gradient_": RowGradient(native_cuda.row_gradient_takes, native_cuda.row_gradient_),
            "linear_forward": lambda *args: native_hopper.linear_forward(*args)[1],
            "linear_kept": KeptLinear(
                native_hopper.takes,
                native_hopper.row_elements,
                native_hopper.room,
                native_hopper.forward,
                native_hopper.linear_backward_,
            ),
        },
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


# Read once, at import: `select` is traced by torch.compile, which cannot call _cpu.
AVAILABLE = tuple(available())


def select(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> Backend:
    """The backend of a call.

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
    """What serves a call: ``base``, with the kernels of other backends and the ways around that measured faster.

    Args:
        base: what serves it without a choice.
        name: as the call names it.
        device: of the tensors.
        sizes: of the call, or None.
    """
    if sizes is None or not selection.CHOICES or torch.compiler.is_compiling():
        return base
    usable = tuple(n for n in AVAILABLE if BACKENDS[n].refuses(device, sizes.logits_dtype) is None)
    chosen = selection.choices_for(name, tuning.architecture(device), sizes, usable)
    served: dict[str, Any] = {
        operation: BACKENDS[other].optional[operation]
        for operation, other in chosen.items()
        if operation in selection.OPTIONAL and other is not None
    }
    of = {operation: base if other is None else BACKENDS[other] for operation, other in chosen.items()}
    forward, backward = of.get("row_forward", base).rows, of.get("row_backward", base).rows
    groups, whole = of.get("contrast", base), of.get("logits_loss", base)
    launches = ((groups, groups.contrast), (whole, whole.logits_loss))
    return replace(
        base,
        rows=forward if forward is backward else ops.RowKernels(forward.forward, *backward[1:]),
        contrast=groups.contrast,
        logits_loss=whole.logits_loss,
        contrast_candidates=min((b.contrast_candidates for b, launch in launches if launch is not None), default=0),
        **served,
    )
