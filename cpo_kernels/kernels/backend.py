"""What a backend is made of: the kernels that it must have, and the optional ones that replace several at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, plain


def no_workspace(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype, threads: int | None = None) -> int:
    """Return 0: torch does not tell what its matrix products take besides their operands."""
    return 0


class FusedForward(NamedTuple):
    """Log-probabilities of a linear head without logits in memory.

    Attributes:
        takes: ``(hidden, weight)`` to whether the path can compute with these matrices.
        run: ``(hidden, weight, targets, row_starts, *transform)`` to log-probabilities (N,).
    """

    takes: Callable[[Tensor, Tensor], bool]
    run: Callable[..., Tensor]


class KeptLinear(NamedTuple):
    """A fused linear path that leaves what the gradient needs instead of logits, in the dtype of hidden.

    Attributes:
        takes: ``(hidden, weight)`` to whether the path can compute with these matrices.
        row_elements: V to the memory that a row takes, in elements of the inputs' dtype.
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


class LinearSoftmax(NamedTuple):
    """The softmax of a head's rows, made while their product is in the cache, without logits in memory.

    Attributes:
        takes: ``(hidden, weight)`` to whether the functions can compute with these matrices.
        floats_per_row: V to the float32 numbers that a row takes besides ``out``.
        forward: ``(hidden, weight, targets, row_starts, *transform, out=, memory=)`` to stats (2, R) and logps (N,);
            ``out`` (R, V), where given, becomes what the gradient needs, and ``memory`` has those numbers.
        scale: ``(out, targets, row_starts, stats, logps, coef, *transform, in_place=)`` to the number (R,) by which
            the products multiply each row of ``out`` to have its gradient; rows of several targets, or all
            ``in_place``, get it there, and the number 1.
    """

    takes: Callable[[Tensor, Tensor], bool]
    floats_per_row: Callable[[int], int]
    forward: Callable[..., tuple[Tensor, Tensor]]
    scale: Callable[..., Tensor]


class UnitGradient(NamedTuple):
    """Row kernels that read and write the logits once: gradients for a coefficient of 1, to be multiplied later.

    Attributes:
        takes: ``(V, dtype, device)`` of logits to whether the kernels can serve their rows.
        forward_: ``(logits, targets, row_starts, *transform, grad_dtype)`` to stats (2, R) and logps (N,); the logits
            of a row whose tokens all have one target become its gradient, those of a row without a token become 0.
        finish_: ``(logits, targets, row_starts, stats, coef, *transform, grad_dtype)`` to the number (R,) by which the
            products multiply each row; rows of several targets get their gradient here, and the number 1.
    """

    takes: Callable[[int, torch.dtype, torch.device], bool]
    forward_: Callable[..., tuple[Tensor, Tensor]]
    finish_: Callable[..., Tensor]


@dataclass(frozen=True)
class Backend:
    """The kernels of one backend, or the kernels that serve one call, which may come from several backends.

    Attributes:
        name: as users write it.
        devices: device types it runs on; None for all.
        dtypes: dtypes of logits it takes.
        rows: row kernels; signatures as in :mod:`cpo_kernels.kernels.ops`.
        differentiable_rows: ``rows.forward`` for autograd and torch.compile.
        gemm_: ``(a, b, out, accumulate)``, the matrix product.
        gemm_pair_: ``(a, b, high, low, accumulate)``, the product into a sum of two halves.
        gemm_workspace: ``(R, V, H, dtype, threads)`` to the most bytes that the products take besides their operands,
            on all threads where ``threads`` is None.
        gemms_within: bytes to ``gemm_`` and ``gemm_pair_`` in so much workspace, on fewer threads if need be, or None.
        column_stats: (r, V) to (2, V), largest absolute value and absolute sum of each column.
        take_columns: (r, V), (k,), (c,) to (k, c + 1), some columns of some rows, and each row's sum of the rest.
        scale_rows_: ``(grad, rows, targets, coef)``, rows of (R, H) times the coefficients of their slots, in place.
        scale_: ``(tensor, factor)``, in place, free for a factor of 1 if it can be.
        unit_gradient: row kernels that read and write the logits once, or None.
        linear_softmax: the softmax of a head's rows inside their product, or None.
        contrast: coefficients of a chunk in one launch; where None, :mod:`cpo_kernels.objective` computes them.
        summarize: loss and metrics from the sums of all segments; where None, :mod:`cpo_kernels.objective` computes
            them.
        count_targets: the tokens of the candidates of rank 0 of groups that are as they should be, else None; where
            None, :mod:`cpo_kernels.objective` counts them and looks at the groups.
        contrast_candidates: largest group that ``contrast`` and ``summarize`` take.
        logits_loss: loss and gradient of stored logits in one launch, for groups as for ``contrast``, or None.
        linear_statistics: log-probabilities, entropies and samples without logits in memory, or None.
        too_old: a device to the reason why it is too old for the kernels, or to None.
        optional: by name, kernels that replace the product and the row kernels (:mod:`cpo_kernels.engine.ways`).
        ways: the optional kernels, of any backend, that serve a call because they measured faster; none by default.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    rows: ops.RowKernels
    differentiable_rows: Callable[..., tuple[Tensor, Tensor]]
    gemm_: Callable[[Tensor, Tensor, Tensor, bool], None]
    gemm_pair_: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
    gemm_workspace: Callable[[int, int, int, torch.dtype, int | None], int] = no_workspace
    gemms_within: Callable[[int], tuple[Callable[..., None], Callable[..., None]]] | None = None
    column_stats: Callable[[Tensor], Tensor] = plain.column_stats
    take_columns: Callable[[Tensor, Tensor, Tensor], Tensor] = plain.take_columns
    scale_rows_: Callable[[Tensor, Tensor | None, Tensor, Tensor], None] = plain.scale_rows_
    scale_: Callable[[Tensor, Tensor], None] = plain.scale_
    unit_gradient: UnitGradient | None = None
    linear_softmax: LinearSoftmax | None = None
    contrast: Callable[..., tuple[Tensor, Tensor]] | None = None
    summarize: Callable[..., tuple[Tensor, ...]] | None = None
    count_targets: Callable[..., int | None] | None = None
    contrast_candidates: int = 0
    logits_loss: Callable[..., tuple[Tensor, Tensor]] | None = None
    linear_statistics: Callable[..., Any] | None = None
    too_old: Callable[[torch.device], str | None] | None = None
    optional: Mapping[str, Any] = field(default_factory=dict)
    ways: Mapping[str, Any] = field(default_factory=dict)

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Say why this backend cannot take tensors of ``dtype`` on ``device``; None if it can."""
        if self.devices is not None and device.type not in self.devices:
            return f"backend {self.name!r} runs on {'/'.join(self.devices)} tensors, got {device}"
        if dtype not in self.dtypes:
            return f"backend {self.name!r} takes {', '.join(map(str, self.dtypes))}, got {dtype}"
        # torch.compile cannot trace a question to the driver; Triton's compiler refuses old devices there.
        return None if self.too_old is None or torch.compiler.is_compiling() else self.too_old(device)

    def within(self, workspace: int) -> Backend:
        """Return this backend with products that take at most so many bytes of workspace, where it has any."""
        if self.gemms_within is None:
            return self
        gemm_, gemm_pair_ = self.gemms_within(workspace)
        return replace(self, gemm_=gemm_, gemm_pair_=gemm_pair_)

    def with_rows(self, rows: ops.RowKernels) -> Backend:
        """Return this backend with other row kernels and without any kernel that would go around them."""
        return replace(self, rows=rows, unit_gradient=None, linear_softmax=None, linear_statistics=None, ways={})
