"""The differentiable log-probabilities of logits that exist, as torch operators: schema, fake kernel, reference body.

They exist once per backend that can serve several devices: ``cpo_kernels::row_forward`` has the reference as its body
and the compiled extension as its kernel for CPU tensors, ``cpo_kernels::triton_row_forward`` is Triton's wherever that
runs. The engine, which makes its gradients itself, calls the row kernels without an operator: a first one makes torch
import its compiler, beyond the budget of the call. Tokens are grouped by row: those of row r are
``targets[row_starts[r]:row_starts[r + 1]]``; ``row_starts=None`` means one token a row. ``softcap=0.0`` means none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from . import plain
from .numerics import accumulate_dtype

# The name that the package was imported by: a copy of it under another name, as on the Hub, has operators of its own.
NAMESPACE = __name__.partition(".")[0]

# By device type, a check of targets (N,) against V that lets later work on the device fail with the token's name.
# Backends enter their checks here; a check returns False where it cannot serve a device.
TARGET_CHECKS: dict[str, Callable[[Tensor, int], bool]] = {}


class RowKernels(NamedTuple):
    """The row functions of a backend.

    Attributes:
        forward: as ``row_forward`` of :func:`declare_rows`.
        backward: as its ``row_backward``.
        backward_: ``(logits, ..., grad_dtype=None)``, what ``backward`` computes, over the logits; a narrower
            ``grad_dtype`` over each row's front: the gradient is ``logits.view(grad_dtype)[:, :V]``, see
            :func:`cpo_kernels.kernels.numerics.narrow_view`.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]
    backward_: Callable[..., None]


class RowOperators(NamedTuple):
    """The operators of a backend; ``forward`` is differentiable, and its gradient is ``backward``."""

    forward: CustomOpDef
    backward: CustomOpDef


def declare_rows(prefix: str, body: RowKernels) -> RowOperators:
    """Declare the operators ``cpo_kernels::<prefix>row_forward`` and ``cpo_kernels::<prefix>row_backward``."""

    @custom_op(f"{NAMESPACE}::{prefix}row_forward", mutates_args=())
    def row_forward(
        logits: Tensor,
        targets: Tensor,
        row_starts: Tensor | None,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Compute stats (2, R), max and log-sum-exp minus max, and log-probabilities (N,), 0 for a target of -100."""
        return body.forward(logits, targets, row_starts, bias, logit_scale, softcap, temperature)

    @custom_op(f"{NAMESPACE}::{prefix}row_backward", mutates_args=())
    def row_backward(
        logits: Tensor,
        targets: Tensor,
        row_starts: Tensor | None,
        stats: Tensor,
        coef: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float,
        temperature: float,
    ) -> Tensor:
        """Compute the gradient of ``sum_n coef_n * logp_n`` by the raw logits, a new (R, V) tensor of their dtype."""
        return body.backward(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature)

    operators = RowOperators(row_forward, row_backward)
    _register_fakes(operators)
    _register_autograd(operators)
    return operators


def _register_fakes(operators: RowOperators) -> None:
    @operators.forward.register_fake
    def _(logits, targets, row_starts, bias, logit_scale, softcap, temperature):
        dtype = accumulate_dtype(logits.dtype)
        return logits.new_empty((2, logits.shape[0]), dtype=dtype), logits.new_empty(targets.shape, dtype=dtype)

    @operators.backward.register_fake
    def _(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature):
        return logits.new_empty(logits.shape)


def _register_autograd(operators: RowOperators) -> None:
    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, targets, row_starts, bias, *ctx.transform = inputs
        stats, _ = output
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(logits, targets, row_starts, bias, stats)

    def backward(ctx: Any, _grad_stats: Tensor, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, row_starts, bias, stats = ctx.saved_tensors
        coef = grad_logps.to(stats.dtype).contiguous()
        grad = operators.backward(logits, targets, row_starts, stats, coef, bias, *ctx.transform)
        needs_logits, _, _, needs_bias, *_ = ctx.needs_input_grad
        grad_bias = grad.sum(0, dtype=stats.dtype).to(bias.dtype) if needs_bias else None
        return (grad if needs_logits else None), None, None, grad_bias, None, None, None

    def save_for_second_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, targets, row_starts, _stats, coef, bias, *ctx.transform = inputs
        ctx.save_for_backward(logits, targets, row_starts, coef, bias)

    def second_order(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, row_starts, coef, bias = ctx.saved_tensors
        needs_logits, _, _, _, needs_coef, needs_bias, *_ = ctx.needs_input_grad
        third_order = torch.is_grad_enabled()
        with torch.enable_grad():
            # A view of logits keeps the graph that coef was made by, in which they occur too, out of this one.
            x = logits.view_as(logits) if logits.requires_grad else logits.detach().requires_grad_()
            c, b = coef.view_as(coef), None if bias is None else bias.view_as(bias)
            logps = plain.row_forward(x, targets, row_starts, b, *ctx.transform)[1]
            (first,) = torch.autograd.grad(logps, x, c, create_graph=True)
        wanted: list[Any] = [t for t, need in ((x, needs_logits), (c, needs_coef), (b, needs_bias)) if need]
        grads = iter(torch.autograd.grad(first, wanted, grad, create_graph=third_order, materialize_grads=True))
        of_logits, of_coef, of_bias = (next(grads) if n else None for n in (needs_logits, needs_coef, needs_bias))
        return of_logits, None, None, None, of_coef, of_bias, None, None, None

    operators.forward.register_autograd(backward, setup_context=save_for_backward)
    operators.backward.register_autograd(second_order, setup_context=save_for_second_order)


row_forward, row_backward = declare_rows("", RowKernels(plain.row_forward, plain.row_backward, plain.row_backward_))
