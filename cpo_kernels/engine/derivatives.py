"""Errors for the derivatives that the fused functions lack: second order, forward mode, transforms of torch.func."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


class SecondOrderRefusal(torch.autograd.Function):
    """The identity of a gradient, which refuses to be differentiated by the sources of that gradient."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor | None) -> Tensor:
        """Return the gradient."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> NoReturn:
        """Raise ``RuntimeError``, which names functions that have second derivatives."""
        raise RuntimeError(
            "the gradient of a fused head cannot be differentiated again, because its logits are gone: take "
            "token_logps, sequence_logps or cpo_loss of hidden @ weight.T, which have second derivatives"
        )


def first_order_only(grads: Sequence[Tensor | None], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """Make a second derivative of ``grads``, computed from ``sources`` without autograd, an error.

    ``create_graph=True`` alone raises nothing: the error comes when the gradients are differentiated with respect to
    the upstream gradient or any other source. torch's ``once_differentiable`` checks the upstream gradient only.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    return tuple(None if grad is None else SecondOrderRefusal.apply(grad, *sources) for grad in grads)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Tell whether forward-mode differentiation is under way in any of the tensors."""
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise ``NotImplementedError`` where forward mode or a transform of ``torch.func`` is asked of a fused head."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            "a fused head has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); take "
            "token_logps, sequence_logps or cpo_loss of hidden @ weight.T, which have one"
        )
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "transforms of torch.func do not reach inside a fused head: take torch.autograd for its gradient, or "
            "token_logps, sequence_logps or cpo_loss of hidden @ weight.T"
        )
