"""The fused losses as autograd sees them: gradients are built in forward, and handed over in backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.backend import Backend
from cpo_kernels.kernels.device import own_arithmetic
from cpo_kernels.objective import CPOProblem
from cpo_kernels.options import Head

from . import loop
from .call import Call, Grads
from .derivatives import first_order_only
from .losses import LossResult, launch_options


class FusedLoss(torch.autograd.Function):
    """A scalar loss of (hidden, weight, bias) whose gradients are built in its forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: Call, make_loss: Callable[..., Any], given: tuple[Tensor | None, ...]):
        """Return the loss and what comes with it, of which only the loss is differentiable.

        ``make_loss(call, *given)`` makes the loss from ``given``, the user's tensors that it reads.
        """
        with own_arithmetic(hidden.device):  # what run_loss does, with one stack frame less
            loss = make_loss(call, *given)
            sums, grads = loop.run(call, call.bind(hidden, weight, bias), loss)
            result = loss.finish(sums, call.summed(grads.result()))
        ctx.save_for_backward(hidden, weight, bias, *call.given, *given)
        ctx.call, ctx.make_loss, ctx.result = call, make_loss, result.without_outputs()
        ctx.mark_non_differentiable(*result.outputs[1:])
        ctx.set_materialize_grads(False)  # what is not differentiable needs no zeros
        return tuple(result.outputs)

    @staticmethod
    def backward(ctx, grad_loss, *_unused):
        """Return the stored gradients without a copy; build them anew when a retained graph runs backward again."""
        if grad_loss is None:
            return (None,) * 6
        result, ctx.result = ctx.result, None
        with torch.no_grad():
            if result is None:
                hidden, weight, bias, targets, rows, *given = ctx.saved_tensors
                call = ctx.call.with_given(targets, rows)
                result = run_loss(call, (hidden, weight, bias), ctx.make_loss(call, *given))
            grads = result.scaled_(grad_loss)
        sources = ctx.saved_tensors[:3] if torch.is_grad_enabled() else ()
        return (*first_order_only(grads, grad_loss, *sources), None, None, None)


def run_loss(call: Call, tensors: tuple[Tensor, Tensor, Tensor | None], loss: Any) -> LossResult:
    """Run a loss with its gradients, without autograd."""
    with own_arithmetic(tensors[0].device):
        sums, grads = loop.run(call, call.bind(*tensors), loss)
        return loss.finish(sums, call.summed(grads.result()))


@dataclass(frozen=True)
class LogitsCall:
    """All of a loss of stored logits (R, V) except logits and bias: padded groups of C segments of T rows.

    Attributes:
        backend: has a ``logits_loss``.
        head: the options of the head.
        targets: (R,) int64.
        problem: the objective bound to the groups.
        needs: whether logits and bias need gradients.
    """

    backend: Backend
    head: Head
    targets: Tensor
    problem: CPOProblem
    needs: tuple[bool, bool]

    @property
    def given(self) -> tuple[Tensor | None, ...]:
        """The tensors that users gave and may change: targets, ref_logps and ranks."""
        return self.targets, *self.problem.given

    def with_given(self, targets: Tensor, *of_problem: Tensor | None) -> LogitsCall:
        """Replace the tensors that users gave by others of the same values."""
        return replace(self, targets=targets, problem=self.problem.with_given(*of_problem))

    def run(self, logits: Tensor, bias: Tensor | None) -> LossResult:
        """Compute the loss and the gradients of logits and bias, in one launch; the gradient has its own memory."""
        problem, launch = self.problem, self.backend.logits_loss
        assert launch is not None
        segments = problem.lengths.numel()
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if any(self.needs) else None
        sums, _ = launch(
            logits.detach(),
            self.targets,
            grad,
            torch.arange(segments + 1, device=logits.device) * (self.targets.numel() // segments),
            None,
            problem.lengths,
            problem.ref_logps,
            problem.segment_ranks,
            None if bias is None else bias.detach(),
            *self.head.transform,
            gain=1.0,
            **launch_options(problem.objective, problem.num_groups, problem.num_target_tokens, problem.groups.shape[1]),
        )
        terms, grad_bias = problem.loss(sums), None
        if self.needs[1] and grad is not None and bias is not None:
            grad_bias = grad.sum(0, dtype=torch.float32).to(bias.dtype)
        grads = (grad if self.needs[0] else None, None, grad_bias)
        return LossResult((*terms, sums), grads, 1.0, self.backend.scale_)

    def grads_with_graph(self, logits: Tensor, bias: Tensor | None, grad_loss: Tensor) -> Grads:
        """Compute the gradients by autograd, so that they can be differentiated again."""
        with torch.enable_grad():
            # Views keep the graph that the upstream gradient was made by out of this one.
            x, b = logits.view_as(logits), None if bias is None else bias.view_as(bias)
            logps = self.backend.differentiable_rows(x, self.targets, None, b, *self.head.transform)[1]
            sums = logps.view(self.problem.lengths.numel(), -1).double().sum(-1).to(logps.dtype)
            wanted = [t for t, need in zip((x, b), self.needs, strict=True) if need and t is not None]
            grads = iter(torch.autograd.grad(self.problem.loss(sums).loss, wanted, grad_loss, create_graph=True))
        return next(grads) if self.needs[0] else None, None, next(grads) if self.needs[1] else None


class FusedLogitsLoss(torch.autograd.Function):
    """A scalar loss of (logits, bias) whose gradients are built in its forward pass."""

    @staticmethod
    def forward(ctx, logits, bias, call: LogitsCall):
        """Return the terms of the loss and the sums (S,); only the loss is differentiable."""
        with own_arithmetic(logits.device):
            result = call.run(logits, bias)
        ctx.save_for_backward(logits, bias, *call.given)
        ctx.call, ctx.result = call, result.without_outputs()
        ctx.mark_non_differentiable(*result.outputs[1:])
        ctx.set_materialize_grads(False)
        return result.outputs

    @staticmethod
    def backward(ctx, grad_loss, *_unused):
        """Return the stored gradients without a copy; build them anew when a retained graph runs backward again."""
        if grad_loss is None:
            return None, None, None
        result, ctx.result = ctx.result, None
        if torch.is_grad_enabled():
            logits, bias, *given = ctx.saved_tensors
            grad, _, grad_bias = ctx.call.with_given(*given).grads_with_graph(logits, bias, grad_loss)
            return grad, grad_bias, None
        if result is None:
            logits, bias, *given = ctx.saved_tensors
            with own_arithmetic(logits.device):
                result = ctx.call.with_given(*given).run(logits, bias)
        grad, _, grad_bias = result.scaled_(grad_loss)
        return grad, grad_bias, None
