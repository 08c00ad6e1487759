"""torch.autograd.Functions around the engine. Gradients of a fused loss are built in its forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpo_kernels.kernels.device import without_autocast

from .call import Grads, LinearCall, Needs
from .logps import run_token_logps, token_logps_grads
from .losses import LossResult

Compute = Callable[[Tensor, Tensor, Tensor | None, Needs], LossResult]


def needs_grad(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Needs:
    """Which tensors autograd wants a gradient for, in the current grad mode."""
    enabled = torch.is_grad_enabled()
    return (
        enabled and hidden.requires_grad,
        enabled and weight is not None and weight.requires_grad,
        enabled and bias is not None and bias.requires_grad,
    )


def scale_grads_(result: LossResult, factor: Tensor) -> Grads:
    """The gradients of a result times ``factor``, in place; undoes the gain they were built with."""
    scale = factor / result.gain
    for grad in result.grads:
        if grad is not None:
            result.scale_(grad, scale)
    return result.grads


class FusedLoss(torch.autograd.Function):
    """A scalar loss of (hidden, weight, bias) whose gradients come with it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, compute: Compute, needs: Needs):
        """Returns loss, sums (S,), lengths (S,) and the dropped share; only the loss is differentiable."""
        with without_autocast(hidden.device):
            result = compute(hidden, weight, bias, needs)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.compute, ctx.needs = compute, needs
        ctx.result = result
        ctx.mark_non_differentiable(result.sums, result.lengths, result.dropped)
        return result.loss, result.sums, result.lengths, result.dropped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _sums, _lengths, _dropped):
        """Hand over the stored gradients without a copy; a retained graph builds them anew."""
        inputs = ctx.saved_tensors
        result, ctx.result = ctx.result, None
        if result is None:
            with without_autocast(inputs[0].device):
                result = ctx.compute(*inputs, ctx.needs)
        return (*scale_grads_(result, grad_loss), None, None)


class LinearTokenLogps(torch.autograd.Function):
    """Token log-probabilities (N,) of (hidden, weight, bias), whose upstream gradient arrives later."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: LinearCall, needs: Needs):
        """Returns (N,)."""
        with without_autocast(hidden.device):
            result = run_token_logps(call, hidden, weight, bias, needs)
        ctx.save_for_backward(hidden, weight, bias, result.unscaled)
        ctx.call, ctx.needs, ctx.kept = call, needs, result.kept
        return result.logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        """Scale what forward built, use what it kept, or recompute."""
        hidden, weight, bias, unscaled = ctx.saved_tensors
        if unscaled is not None:
            return scale_rows(ctx.call, unscaled, grad_logps), None, None, None, None
        # The kept logits are overwritten, so a retained graph recomputes them the second time.
        kept, ctx.kept = ctx.kept, None
        with without_autocast(hidden.device):
            grads = token_logps_grads(ctx.call, kept, grad_logps, hidden, weight, bias, ctx.needs)
        return (*grads, None, None)


def scale_rows(call: LinearCall, unscaled: Tensor, grad_logps: Tensor) -> Tensor:
    """Gradient (R, H) of hidden from that of the plain sum: each row times the gradient of its one token."""
    present = call.targets >= 0
    per_row = grad_logps.where(present, 0)
    if call.rows is not None:
        # The row of an absent token may be any number.
        per_row = grad_logps.new_zeros(unscaled.shape[0]).index_add_(0, call.rows.where(present, 0), per_row)
    return (unscaled * per_row.unsqueeze(1)).to(unscaled.dtype)
